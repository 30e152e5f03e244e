"""Tests of `Ranks` by itself: processes on gloo, without a server.

    python -m pytest tests/test_ranks_alone.py

As a script, this file is one of the processes:

    python tests/test_ranks_alone.py check_tell 0 2 /tmp/store
"""

import atexit
import contextlib
import gc
import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from conftest import until

import protocol
from diloco_callback import Ranks, fsdp_modules, is_sharded, misplaced, reshard

IMPORTS = ("torch", "torch._dynamo", "torch.distributed.fsdp")
ODD = torch.tensor([float("nan"), -0.0, 1e-42, float("inf"), -1e30])  # values that a cast may lose


class Model(torch.nn.Module):
    """Five rows, which no two ranks can share evenly; one row, so that all ranks but one are empty;
    two layers that share a weight; bfloat16; a scalar that is not sharded; frozen parameters."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 5)
        self.again = torch.nn.Linear(5, 5)
        self.again.weight = self.first.weight
        self.low = torch.nn.Linear(5, 3).bfloat16()
        self.back = torch.nn.Linear(3, 1)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.frozen = torch.nn.Linear(3, 7).requires_grad_(False)

    def forward(self, x):
        x = self.low(self.again(self.first(x)).tanh().bfloat16()).float()
        return self.back(x + self.frozen(x)[:, :3]) * self.scale


def shard(model, mesh):
    fully_shard(model.low, mesh=mesh)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model.back, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, ignored_params={model.scale})
    return model


def same(one, other):
    """Whether two tensors have one shape, one dtype and equal bits."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in (one, other)))


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).clone()


def local(tensor):
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def noise(like, seed):
    """Values for a tensor, drawn alike in every process; some are ODD."""
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    values.view(-1)[: len(ODD)] = ODD[: values.numel()]
    return values.to(like.dtype)


# --- What the ranks of a worker check, each in its process ---------------------------------------


def trained(ranks):
    return [name for name, tensor in ranks.named.items() if tensor.requires_grad]


def check_shards(mesh):
    """One turn of gather, work and spread, and another after a step of training."""
    torch.manual_seed(1)
    model = Model()
    wanted = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    shard(model, mesh)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert named["again.weight"] is named["first.weight"]
    ranks = Ranks(named)
    assert ranks.is_sharded and not any(map(misplaced, filter(is_sharded, named.values())))
    places = {name: local(tensor).data_ptr() for name, tensor in named.items()}

    ranks.gather(trained(ranks))
    if ranks.leads:
        assert ranks.mirror.keys() == {name for name in named if not name.startswith("frozen")}
        assert ranks.mirror["again.weight"] is ranks.mirror["first.weight"]
        for name, whole in zip(trained(ranks), ranks.whole(trained(ranks)), strict=True):
            assert whole is ranks.mirror[name] and whole.is_cpu
            assert same(whole, wanted[name.replace("again.weight", "first.weight")]), name
    else:
        assert ranks.mirror is None

    names = [name for name, _ in model.named_parameters() if not name.startswith("frozen")]
    for seed, name in enumerate(names):
        wanted[name] = noise(wanted[name], seed)
        if ranks.leads:
            ranks.mirror[name].copy_(wanted[name])
    ranks.spread(trained(ranks))
    check_all(named, wanted, places)

    ranks.gather(["frozen.weight"])
    if ranks.leads:
        assert same(ranks.mirror["frozen.weight"], wanted["frozen.weight"])
        ranks.mirror["frozen.weight"].fill_(3.0)
    wanted["frozen.weight"].fill_(3.0)
    ranks.spread(["frozen.weight"])
    ranks.release(["frozen.weight", "frozen.bias"])
    assert not ranks.leads or "frozen.weight" not in ranks.mirror
    check_all(named, wanted, places)
    check_training(model, ranks, names)


def check_all(named, wanted, places):
    for name, values in wanted.items():
        assert same(full(named[name]), values), name
    assert places == {name: local(tensor).data_ptr() for name, tensor in named.items()}


def check_training(model, ranks, names):
    """The mirror follows the optimizer, and modules use the values that were spread."""
    if ranks.leads:
        rooms = ranks.whole(trained(ranks))
        for seed, name in enumerate(names):
            ranks.mirror[name].copy_(
                noise(ranks.mirror[name], seed).nan_to_num(0.5, 1, -1).clamp(-1, 1)
            )
    ranks.spread(trained(ranks))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(ranks.rank))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        before = model(torch.ones(1, 5))  # leaves the root's parameters in one piece
    modules = fsdp_modules(model)
    assert len(modules) == 3
    reshard(modules)
    ranks.gather(trained(ranks))
    now = [full(ranks.named[name]) for name in trained(ranks)]
    if ranks.leads:
        assert all(
            room is again for room, again in zip(rooms, ranks.whole(trained(ranks)), strict=True)
        )
        # The plain scalar is each rank's own, without an average of gradients: rank 0's counts.
        assert all(map(same, ranks.whole(trained(ranks)), now))
        flat = protocol.FlatModel(ranks.whole(names), 1, 3)
        flat.write(0, torch.full((flat.numel,), 0.25))
    ranks.spread(trained(ranks))
    with torch.no_grad():
        after = model(torch.ones(1, 5))
    for module in modules:
        module.reshard()
    with torch.no_grad():
        assert torch.equal(after, model(torch.ones(1, 5)))  # nothing old was left in a module
    assert not torch.equal(before, after)
    reshard(modules)
    whole = torch.cat([full(ranks.named[name]).float().view(-1) for name in names])
    assert torch.equal(whole[1::3], torch.full((len(whole[1::3]),), 0.25))
    assert not (whole[0::3] == 0.25).all()


def check_meshes():
    """Shards on all ranks, also in another order of the ranks, and on replicas of shards."""
    count = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (count,)), DeviceMesh("cpu", list(reversed(range(count))))]
    if count == 4:
        names = ("replicas", "shards")
        meshes += [init_device_mesh("cpu", (2, 2), mesh_dim_names=names)]
        meshes += [DeviceMesh("cpu", [[3, 1], [2, 0]], mesh_dim_names=names)]
    for mesh in meshes:
        check_shards(mesh)


def check_plain():
    """Ranks of DistributedDataParallel, each with other values at first."""
    rank = dist.get_rank()
    model = Model()
    model.conv = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    model.none = torch.nn.Parameter(torch.empty(0, 3))
    named = dict(model.named_parameters())
    wanted = {name: noise(tensor, seed) for seed, (name, tensor) in enumerate(named.items())}
    own = {name: tensor.detach().clone() for name, tensor in named.items()}
    if rank == 0:
        with torch.no_grad():
            for name, tensor in named.items():
                tensor.copy_(wanted[name])
    places = {name: tensor.data_ptr() for name, tensor in named.items()}
    ranks = Ranks(named)
    assert (ranks.leads, ranks.is_sharded, ranks.mirror) == (rank == 0, False, None)
    assert all(whole is named[name] for name, whole in zip(named, ranks.whole(named), strict=True))
    ranks.gather(trained(ranks))
    ranks.release(named)
    ranks.spread(trained(ranks))
    frozen = {name for name in named if name.startswith("frozen")}
    for name, tensor in named.items():
        mine = own if name in frozen and rank else wanted
        assert same(tensor.detach(), mine[name]), name
    ranks.spread(["frozen.weight", "frozen.bias"])
    check_all(named, wanted, places)
    assert named["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert all(tensor.requires_grad != (name in frozen) for name, tensor in named.items())
    dtypes = (torch.int64, torch.bool, torch.float16, torch.complex64, torch.uint16)
    buffers = [torch.full((3,), 1 - rank).to(dtype) for dtype in dtypes]
    ranks.broadcast(buffers)
    assert all((buffer.long() == 1).all() for buffer in map(torch.real, buffers))


def check_tell():
    """The ranks hear rank 0, in few words where there is no news."""
    ranks, sent = Ranks({}), []
    broadcast = dist.broadcast

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return broadcast(tensor, *args, **kwargs)

    dist.broadcast = counted
    values = [
        None,
        {"step": 3, "text": "Grüße"},
        [1, 2.5, None],
        [1, 2.5, None],
        {"e": "x" * 10**6},
    ]
    for value in values:
        assert ranks.tell(value if ranks.leads else "not mine") == value
    news = [4, None, None, 0, None]
    for value, count in zip(values, news, strict=True):
        assert sent.pop(0) == 8
        if count != 0:
            assert sent.pop(0) >= len(str(value)) - 20
    assert not sent
    heard = ranks.tell([[1]])
    heard[0].append(2)
    assert ranks.tell([[1]]) == [[1]]


def check_death(call):
    """The last rank dies before the second transfer of a call; the other ranks notice."""
    count = dist.get_world_size()
    ranks = Ranks(dict(shard(Model(), init_device_mesh("cpu", (count,))).named_parameters()))
    ranks.gather(trained(ranks))
    ranks.tell(0)
    dist.barrier()
    if ranks.rank == count - 1:
        left = iter(range(1))

        def dying(method):
            def call(*args, **kwargs):
                if next(left, None) is None:
                    os._exit(9)
                return method(*args, **kwargs)

            return call

        DTensor.full_tensor = dying(DTensor.full_tensor)
        dist.broadcast = dying(dist.broadcast)
    given = "news" if call == "tell" else trained(ranks)
    with contextlib.suppress(RuntimeError):
        getattr(ranks, call)(given)
        ranks.tell("a rank that needed nothing more from the dead one notices here")
        ranks.tell("or here")
        raise SystemExit("nobody noticed")


def threads():
    """The number of threads of this process, gloo's among them."""
    return len(os.listdir("/proc/self/task"))


def check_end(how):
    """The threads of the ranks' own group end with the Ranks, or with Python if that is sooner."""
    before = threads()
    ranks = Ranks({})
    assert threads() > before
    assert ranks.tell("news" if ranks.leads else None) == "news"
    dist.barrier()  # whoever ends a group ends it for the others
    if how == "exit":
        atexit._run_exitfuncs()  # as when Python ends
        assert ranks.groups == []
    else:
        del ranks
        gc.collect()
    until(lambda: threads() <= before, "the threads end", 10)  # the system takes a moment


def main():
    check, rank, count, path = sys.argv[1:]
    torch.set_num_threads(1)
    store = f"file://{path}"
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(count))
    name, *args = check.split("=")
    globals()[name](*args)
    print("checked", flush=True)
    if name == "check_death":
        os._exit(0)
    dist.destroy_process_group()


# --- What pytest runs ----------------------------------------------------------------------------


@pytest.fixture
def launch(start, tmp_path):
    """launch(check, count): the ranks, as processes that run one of the functions above."""

    def run(check, count):
        place = [count, tmp_path / "store"]
        return [start(__file__, check, rank, *place, imports=IMPORTS) for rank in range(count)]

    return run


@pytest.mark.parametrize(
    ("check", "count"),
    [("check_meshes", 2), ("check_meshes", 4), ("check_plain", 2), ("check_plain", 3), ("check_tell", 2),
     ("check_end=exit", 2), ("check_end=collected", 2)],
)  # fmt: skip
def test_every_rank_finds_its_check_true(launch, check, count):
    processes = launch(check, count)
    for process in processes:
        assert process.wait() == 0, process.output
        assert process.lines[-1] == "checked"


@pytest.mark.parametrize("call", ["gather", "spread", "tell"])
def test_a_rank_that_dies_ends_the_calls_of_the_others(launch, call):
    *others, dead = launch(f"check_death={call}", 3)
    assert dead.wait() == 9, dead.output
    for process in others:
        assert process.wait() == 0, process.output
        assert process.lines[-1] == "checked"


def test_one_process_needs_no_torch_distributed():
    model, value = Model(), object()
    named = dict(model.named_parameters())
    ranks = Ranks(named)
    assert (ranks.rank, ranks.count, ranks.leads, ranks.groups) == (0, 1, True, [])
    assert ranks.tell(value) is value
    before = [tensor.detach().clone() for tensor in named.values()]
    ranks.gather(trained(ranks))
    ranks.spread(trained(ranks))
    reshard(fsdp_modules(model))
    assert all(map(same, before, (tensor.detach() for tensor in named.values())))
    assert all(whole is named[name] for name, whole in zip(named, ranks.whole(named), strict=True))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
def test_one_rank_can_be_sharded(mesh):
    check_shards(mesh)


def test_a_dtensor_in_another_place_is_named(mesh, monkeypatch):
    for place in (Shard(1), Partial()):
        tensor = DTensor.from_local(torch.zeros(3, 2), mesh, [place])
        assert misplaced(tensor).startswith(f"is placed as ({type(place).__name__}")
    tensor = DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)])
    assert misplaced(tensor) == ""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert misplaced(tensor).startswith("is on a mesh of 1 ranks, and the worker has 2")


if __name__ == "__main__":
    main()
