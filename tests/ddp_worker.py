"""A training loop of a user with several devices a machine, for tests/test_ranks.py: torchrun starts
it, DistributedDataParallel averages the gradients of its ranks, and DiLoCoWorker those of machines.

    torchrun --standalone --nproc_per_node=2 tests/ddp_worker.py --server 127.0.0.1:8512 --seed 1

Each rank prints a line of JSON with the digests of its parameters after each step.
"""

import argparse
import json
import os
import sys

import torch
import torch.distributed as dist
from toy_worker import build, digest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from diloco_callback import DiLoCoWorker


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server")
    parser.add_argument("--worker-id")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--sync-every", type=int, default=4)
    parser.add_argument("--num-fragments", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base", type=int, help="seed of a frozen parameter")
    parser.add_argument("--nan-at", type=int, help="step in which a gradient is not a number")
    parser.add_argument("--device", default="cpu", help="or cuda, which ranks may have to share")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    has_own = device.type == "cuda" and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    dist.init_process_group("nccl" if has_own else "gloo")
    rank, digests, widest = dist.get_rank(), [], 0
    model = build((5, 7, 2), seed=args.seed)
    model.register_buffer("seen", torch.zeros(1))  # each rank its own, between syncs
    if args.base is not None:
        noise = torch.randn(3, generator=torch.Generator().manual_seed(args.base))
        model.base = torch.nn.Parameter(noise, requires_grad=False)
    model.to(device)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)

    def before_step(step):
        model.seen += rank + 1
        if step == args.nan_at:
            model[0].weight.grad[0, 0] = torch.nan

    options = {"num_fragments": args.num_fragments}
    with DiLoCoWorker(
        wrapped, optimizer, args.server, args.sync_every, args.worker_id, **options
    ) as worker:
        for _ in train_ranks(wrapped, model, optimizer, args, rank, before_step):
            digests.append(digest(model))
            widest = max(widest, worker.world)
    told = {"step": worker.step, "world": widest, "syncs": worker.sync_count}
    told |= {"seen": model.seen.item(), "base": getattr(model, "base", torch.zeros(0)).tolist()}
    told |= {"dropped": worker.dropped_steps, "moments": len(optimizer.state)}
    line = {"rank": rank, "digests": digests, "final": digest(model), **told}
    sys.stdout.write(json.dumps(line) + "\n")  # one write: the ranks share the output
    sys.stdout.flush()
    dist.destroy_process_group()


def train_ranks(wrapped, model, optimizer, args, rank, before_step):
    """Steps on noise that is another one for each rank."""
    generator = torch.Generator().manual_seed(10 * args.seed + rank)
    for step in range(args.steps):
        x = torch.randn(8, 5, generator=generator).to(model.seen.device)
        optimizer.zero_grad()
        (wrapped(x) - x[:, :2]).square().mean().backward()
        before_step(step)
        optimizer.step()
        yield


if __name__ == "__main__":
    main()
