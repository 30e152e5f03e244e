"""Somebody's own training loop, of several kinds, synchronized by DiLoCoWorker: the worker of
test_anywhere.py. Writes its final parameters to --out, and says how many steps it made.

    python tests/loop_worker.py amp --server 127.0.0.1:8512 --worker-id w0 --out w0.safetensors

A kind is a function: it builds what trains a network, and returns (the module that is trained, its
optimizers, a function that makes one step). The network has a tied, a frozen and a seldom used
layer.
"""

import argparse
import json
import os
import sys

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from diloco_callback import DiLoCoWorker

WORDS, WIDTH = 12, 8


class Net(torch.nn.Module):
    """The loss of telling which word follows which. `seldom` has a gradient where it is asked
    for, and the head is the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, WIDTH)
        self.hidden, self.seldom = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = torch.nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words, with_seldom=True):
        x = self.frozen(torch.tanh(self.hidden(self.embed(words[:, :-1]))))
        if with_seldom:
            x = x + self.seldom(x)
        return cross_entropy(self.head(x).float().flatten(0, 1), words[:, 1:].flatten())


def build(dtype="float32"):
    """The same network in every worker."""
    torch.manual_seed(0)
    return Net().to(getattr(torch, dtype))


def batches(count, seed):
    """(step, words) where every word follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        first = torch.randint(WORDS, [16, 1], generator=generator)
        yield step, (first + torch.arange(6)) % WORDS


def plain(net, args, trained=None):
    """One optimizer; every third batch leaves a layer without a gradient."""
    trained = net if trained is None else trained
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)

    def step(index, words):
        optimizer.zero_grad(set_to_none=True)
        loss = trained(words, with_seldom=index % 3 != 0)
        loss.backward()
        optimizer.step()
        return loss

    return trained, optimizer, step


def compiled(net, args):
    return plain(net, args, torch.compile(net, backend="eager"))


class Wrapper(torch.nn.DataParallel):
    """As DistributedDataParallel wraps a module: under one more name."""


def wrapped(net, args):
    return plain(net, args, Wrapper(torch.compile(net, backend="eager")))


def amp(net, args):
    """Mixed precision. Where a scaled gradient is infinite the scaler makes no step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(index, words):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(words)
        scaler.scale(loss).backward()
        if index in args.inf_at:
            net.hidden.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    return net, optimizer, step


def several(net, args):
    """Muon for the matrices within, AdamW for the rest."""
    matrices = [net.hidden.weight, net.seldom.weight]
    rest = [p for p in net.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.02)]

    def step(index, words):
        loss = net(words)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return net, optimizers, step


def scheduled(net, args):
    """A learning rate that warms up and decays; its scheduler wraps the optimizer's step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=args.steps)

    def step(index, words):
        loss = net(words)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss

    return net, optimizer, step


def closure(net, args):
    """An optimizer that asks for the loss as often as it likes."""
    optimizer = torch.optim.LBFGS(
        net.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe"
    )

    def step(index, words):
        def evaluate():
            optimizer.zero_grad()
            loss = net(words)
            loss.backward()
            return loss

        return optimizer.step(evaluate)

    return net, optimizer, step


KINDS = {kind.__name__: kind for kind in
         (plain, compiled, wrapped, amp, several, scheduled, closure)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--server", required=True)
    parser.add_argument("--worker-id", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--sync-every", type=int, default=5)
    parser.add_argument("--num-fragments", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--inf-at", type=lambda text: [int(step) for step in text.split(",")],
                        default=[], help="steps, as 3,8, with an infinite gradient")  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = build(args.dtype)
    trained, optimizers, step = KINDS[args.kind](net, args)
    with DiLoCoWorker(
        trained,
        optimizers,
        server=args.server,
        sync_every=args.sync_every,
        worker_id=args.worker_id,
        num_fragments=args.num_fragments,
    ) as worker:
        losses = [step(*batch).item() for batch in batches(args.steps, args.seed)]
    save_file({name: p.detach().clone() for name, p in net.named_parameters()}, args.out)
    print(json.dumps({"steps": worker.local_step, "syncs": worker.sync_count, "losses": losses}))


if __name__ == "__main__":
    main()
