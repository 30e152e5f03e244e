"""One rank of a worker whose model is sharded (FSDP2), or with --ranks 1 a worker with the same model
in one piece, for tests/test_ranks.py.

    python tests/fsdp_worker.py --server 127.0.0.1:8512 --rank 0 --ranks 2 --out /tmp/out &
    python tests/fsdp_worker.py --server 127.0.0.1:8512 --rank 1 --ranks 2 --out /tmp/out

Each rank writes the final parameters, gathered, into the folder --out, and prints a line of JSON.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from trail import places

import protocol
from diloco_callback import DiLoCoWorker, Ranks


class Model(torch.nn.Module):
    """Five rows, which no two ranks can share evenly; one row, so that a rank has none; two layers
    that share their weight; another dtype; a number that is not sharded; and `wide`, for long ones."""

    def __init__(self, wide):
        super().__init__()
        self.first = torch.nn.Linear(5, 5)
        self.again = torch.nn.Linear(5, 5)
        self.again.weight = self.first.weight
        self.low = torch.nn.Linear(5, 3).bfloat16()
        self.wide = torch.nn.Linear(3, wide)
        self.back = torch.nn.Linear(wide, 1)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.low(self.again(self.first(x)).tanh().bfloat16()).float()
        return self.back(self.wide(x).tanh()) * self.scale


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that memory is taken for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        there = {memory for memory, _ in map(place, tensors_in((args, kwargs)))}
        for memory, count in map(place, tensors_in(made)):
            if memory not in there:
                Largest.count = max(Largest.count, count)
        return made


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def place(tensor):
    """(where the memory of a tensor begins, how many elements it has), on this rank."""
    tensor = tensor.to_local() if hasattr(tensor, "full_tensor") else tensor
    tensor = getattr(tensor, "elem", tensor)  # of a transfer that is under way
    return tensor.untyped_storage().data_ptr(), tensor.numel()


def gathered(model):
    """{name: tensor} of the whole parameters; of all ranks at once."""
    return {name: gather(parameter) for name, parameter in model.named_parameters()}


def gather(tensor):
    """A copy of a whole tensor; of all ranks at once."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def shard(model, shape):
    names = ("replicas", "shards")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(model.low, mesh=mesh)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model.wide, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, ignored_params={model.scale})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server")
    parser.add_argument("--out")
    parser.add_argument("--worker-id", default="w0")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1, help="HSDP, where it is more than 1")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--sync-every", type=int, default=4)
    parser.add_argument("--num-fragments", type=int, default=1)
    parser.add_argument("--fragment-update", default="predict")
    parser.add_argument("--wide", type=int, default=9)
    parser.add_argument("--optimizer", default="adamw", help="or muon, for matrices of many rows")
    parser.add_argument("--reconnect-timeout", type=float, default=60.0)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a step takes")
    parser.add_argument("--nan-at", type=int, help="step in which a gradient is not a number")
    parser.add_argument("--fails-in", default="gather", help="where this rank fails, or spread")
    parser.add_argument("--fails-at", type=int, help="the how manieth of these it fails in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.worker_id == "w0")
    model = Model(args.wide)
    if args.ranks > 1:
        store = f"file://{args.out}/{args.worker_id}.store"
        dist.init_process_group("gloo", init_method=store, rank=args.rank, world_size=args.ranks)
        shape = (args.replicas, args.ranks // args.replicas)
        shard(model, shape if args.replicas > 1 else (args.ranks,))
    print(json.dumps(train(model, args)), flush=True)
    path = f"{args.out}/{args.worker_id}-{args.rank}.safetensors"
    protocol.save_file(path, gathered(model))
    if args.ranks > 1:
        dist.destroy_process_group()


def make_optimizers(model, args):
    """AdamW, or behind Muon for the matrices that have a row for each rank."""
    is_inner = {p: p.dim() == 2 and len(p) >= args.ranks for p in model.parameters()}
    if args.optimizer != "muon":
        return [torch.optim.AdamW(model.parameters(), lr=0.01)]
    muon = torch.optim.Muon([p for p in is_inner if is_inner[p]], lr=0.01)
    return [muon, torch.optim.AdamW([p for p in is_inner if not is_inner[p]], lr=0.01)]


def step_apart(optimizer):
    """Make an optimizer's first step, of shards; return how far from that of one which has the whole
    matrices it ends, as a part of the largest change. Muon works in bfloat16."""
    sharded = [p for group in optimizer.param_groups for p in group["params"]]
    wholes = [torch.nn.Parameter(gather(p)) for p in sharded]
    for whole, parameter in zip(wholes, sharded, strict=True):
        whole.grad = gather(parameter.grad)
    before = [whole.detach().clone() for whole in wholes]
    type(optimizer)(wholes, lr=0.01).step()
    optimizer.step()
    pairs = [pair for pair in zip(before, wholes, sharded, strict=True) if pair[0].itemsize == 4]
    return max(
        ((gather(p) - whole).abs().max() / (whole - old).abs().max()).item()
        for old, whole, p in pairs
    )


def train(model, args):
    optimizers = make_optimizers(model, args)
    first = gathered(model)
    with torch.no_grad():
        model(torch.zeros(1, 5))  # leaves the root's parameters in one piece
    if args.fails_at:
        fail_in_transfer(args.rank, args.fails_in, args.fails_at)
    options = {name: vars(args)[name] for name in
               ("num_fragments", "fragment_update", "reconnect_timeout")}  # fmt: skip
    worker = DiLoCoWorker(
        model, optimizers, args.server, args.sync_every, args.worker_id, **options
    )
    if args.rank:
        after_step, enter = worker._after_step, worker.start

        def watched(action):
            with Largest():
                return action()

        worker._after_step = lambda: watched(after_step)
        watched(enter)
    else:
        worker.start()
    joined = gathered(model)
    is_same = all(torch.equal(first[name], joined[name]) for name in first)
    is_read = args.ranks == 1 or reads_right(worker, joined)
    generator = torch.Generator().manual_seed(args.ranks + args.rank)
    evaluated, apart = [], None if args.optimizer == "muon" else 0.0
    try:
        for step in range(args.steps):
            x = torch.randn(8, 5, generator=generator)
            (model(x) - x[:, :1]).square().mean().backward()
            if step == args.nan_at:
                for parameter in model.parameters():
                    parameter.grad.mul_(torch.nan)
            for optimizer in optimizers:
                if apart is None:
                    apart = step_apart(optimizer)
                else:
                    optimizer.step()
                optimizer.zero_grad()
            time.sleep(args.pause)
            if step in (5, args.steps - 1):
                evaluated.append(evaluate(model, worker))
            if worker.run_is_over(args.steps):
                break
        worker.flush()
    finally:
        worker.close()
    return {"rank": args.rank, "step": worker.step, "apart": apart, "largest": Largest.count, "evaluated": evaluated, "is_same": is_same,
            "is_read": is_read,
            "syncs": worker.sync_count, "dropped": worker.dropped_steps}  # fmt: skip


@torch.no_grad()
def reads_right(worker, whole):
    """Whether rank 0 reads each fragment of the shards as it is in the whole parameters."""
    named, ranks, fits = worker.trained.named, worker.ranks, True
    vector = torch.cat([whole[name].float().flatten() for name in named])
    ranks.gather(named)
    for k in range(3) if ranks.leads else ():
        flat = protocol.FlatModel(ranks.whole(named), k, 3)
        expected = vector[places(len(vector), k, 3)]
        out, difference = torch.empty(2, len(expected))
        flat.read(0, out)
        flat.subtract_from(0, torch.zeros(len(expected)), difference)
        fits &= torch.equal(out, expected) and torch.equal(difference, -expected)
    return fits


def fail_in_transfer(rank, place, number):
    """Let this rank fail at the third parameter of its so many-th gather or spread: rank 0 raises,
    another one dies."""
    transfer, calls, left = getattr(Ranks, place), iter(range(1, number)), iter(range(2))
    owner, name = (Ranks, "_mirrored" if place == "gather" else "_spread_whole")
    if rank and place == "gather":
        owner, name = DTensor, "full_tensor"
    inner = getattr(owner, name)

    def failing(*args):
        if next(left, None) is None:
            if rank:
                os._exit(9)
            raise MemoryError("no room for it")
        return inner(*args)

    def counted(*args):
        if next(calls, None) is None:
            setattr(owner, name, failing)
        return transfer(*args)

    setattr(Ranks, place, counted)


@torch.no_grad()
def evaluate(model, worker):
    """The outputs for one batch before, within and after `global_model`, as the module computes
    them."""
    x = torch.ones(2, 5)
    outputs = [model(x)]
    with worker.global_model():
        outputs.append(model(x))
    outputs.append(model(x))
    return [output.flatten().tolist() for output in outputs]


if __name__ == "__main__":
    main()
