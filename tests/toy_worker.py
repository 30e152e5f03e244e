"""A tiny trainer for the tests: a linear model on noise made from a seed, synchronized by
DiLoCoWorker. Prints a line per sync and at the end, as JSON, what it ended with.

    python tests/toy_worker.py --server 127.0.0.1:8512 --worker-id w0 --steps 20 --sync-every 5
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from diloco_callback import DiLoCoWorker
from protocol import Refused


def build(sizes, dtype="float32", seed=0):
    """A stack of linear layers, the same for the same seed."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return torch.nn.Sequential(*layers).to(getattr(torch, dtype))


def train(model, optimizer, steps, seed, before_step=lambda step: None, skip=0):
    """`steps` steps of regression on noise, after the first `skip` batches of it; yields the loss
    that each step began with."""
    generator = torch.Generator().manual_seed(seed)
    width, dtype = model[0].in_features, model[0].weight.dtype
    for _ in range(skip):
        torch.randn(8, width, generator=generator)
    for step in range(steps):
        x = torch.randn(8, width, generator=generator).to(dtype)
        loss = (model(x) - x[:, : model[-1].out_features]).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        before_step(step)
        optimizer.step()
        yield loss.item()


def digest(model):
    """A hash of all parameters' bits."""
    return digest_of(model.parameters())


def digest_of(tensors):
    """The same of tensors in the order of the parameters."""
    flat = torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])
    return hashlib.sha256(bytes(flat.view(torch.uint8).tolist())).hexdigest()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--worker-id", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sync-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--model-seed", type=int, default=0)
    parser.add_argument("--sizes", default="5,7,2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--source", default="")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a step takes")
    parser.add_argument("--nan-at", default="", help="steps, as 3,8, whose gradient is made NaN")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--evaluate", type=int, default=0, help="1: tell a loss after each sync")
    parser.add_argument("--reconnect-timeout", type=float, default=60.0)
    parser.add_argument("--num-fragments", type=int, default=1)
    parser.add_argument("--fragment-sync-delay", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)

    model = build([int(size) for size in args.sizes.split(",")], args.dtype, args.model_seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    bad = {int(step) for step in args.nan_at.split(",") if step}

    def before_step(step):
        time.sleep(args.pause)
        if step in bad:
            model[0].weight.grad[0, 0] = float("nan")

    try:
        worker = DiLoCoWorker(
            model,
            optimizer,
            server=args.server,
            sync_every=args.sync_every,
            worker_id=args.worker_id,
            source=args.source,
            num_fragments=args.num_fragments,
            fragment_sync_delay=args.fragment_sync_delay,
            reconnect_timeout=args.reconnect_timeout,
        )
        with worker:
            print(f"joined at step {worker.step}", flush=True)
            syncs = worker.sync_count
            for loss in train(model, optimizer, args.steps, args.seed, before_step):
                worker.loss = loss
                if worker.sync_count != syncs:
                    syncs = worker.sync_count
                    print(f"synced {syncs} version {worker.version[1]}", flush=True)
                    if args.evaluate:
                        worker.evaluated(loss)
                if worker.run_is_over(args.steps):
                    break
    except Refused as refusal:
        print(f"refused: {refusal}", flush=True)
        sys.exit(3)
    print(
        json.dumps(
            {
                "digest": digest(model),
                "version": worker.version,
                "index": worker.index,
                "step": worker.step,
                "metrics": worker.metrics(),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
