"""Tests of a worker that is several processes: torchrun and DistributedDataParallel on gloo.

python -m pytest tests/test_ranks.py
"""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import LAUNCHER, ROOT, TRAINER, digest_of, status, until
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

import protocol
from diloco_callback import DiLoCoWorker, Outbox, Trained

AS_TORCHRUN = "import sys; from torch.distributed.run import main; sys.exit(main())"
TORCHRUN = ["-c", AS_TORCHRUN, "--standalone", "--nproc_per_node=2"]
WORKER = os.path.join(ROOT, "tests", "ddp_worker.py")
FSDP_WORKER = os.path.join(ROOT, "tests", "fsdp_worker.py")
HF_WORKER = os.path.join(ROOT, "tests", "hf_worker.py")
SMALL = ["--set=model.hidden_size=32", "--set=model.intermediate_size=32", "--set=train.context=32",
         "--set=model.num_hidden_layers=1", "--set=data.source=builtin", "--set=output.eval_tokens=64",
         "--set=train.warmup_steps=2", "--set=output.log_every=2"]  # fmt: skip


@pytest.fixture
def launch(start):
    """launch(script, *args): a torchrun with two ranks. Killed, it would leave them behind."""
    launched = []

    def run(*command, **options):
        launched.append(start(*TORCHRUN, *command, imports=LAUNCHER, **options))
        return launched[-1]

    yield run
    for process in launched:
        process.signal(signal.SIGTERM)
        process.wait()


@pytest.fixture
def torchrun(launch):
    """torchrun(server, worker_id, **options): tests/ddp_worker.py as two ranks."""

    def run(server, worker_id, **options):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        place = ["--server", server.address, "--worker-id", worker_id]
        return launch(WORKER, *place, *flags)

    return run


def ends(process):
    """What the ranks say, in their order."""
    assert process.wait() == 0, process.output
    lines = [json.loads(line) for line in process.lines if line.startswith("{")]
    return sorted(lines, key=lambda line: line["rank"])


@pytest.mark.parametrize("fragments", [1, 2])
def test_all_ranks_have_the_same_bits_after_each_step(serve, torchrun, tmp_path, fragments):
    host = serve("-n", 2, "--until-done")
    options = {"num_fragments": fragments}
    workers = [torchrun(host, f"w{k}", seed=k + 1, **options) for k in (0, 1)]
    host.wait_for("the run starts at round 0 with w0, w1")
    said = [ends(worker) for worker in workers]
    assert host.wait() == 0
    for ranks in said:
        assert [line["rank"] for line in ranks] == [0, 1]
        assert ranks[0]["digests"] == ranks[1]["digests"] and len(ranks[0]["digests"]) == 14
        assert {key: ranks[0][key] for key in ("step", "world", "syncs", "moments", "dropped")} == {
            "step": 14, "world": 2, "syncs": 4, "moments": 4, "dropped": 0}  # fmt: skip
        for key in ("step", "world", "syncs", "moments", "dropped"):
            assert ranks[0][key] == ranks[1][key]
    assert said[0][0]["digests"][5] != said[1][0]["digests"][5]  # different data, between syncs
    finals = {line["final"] for ranks in said for line in ranks}
    assert finals == {digest_of(tmp_path / "model")}
    seen = load_file(tmp_path / "model" / "model.safetensors")["seen"].item()
    assert {line["seen"] for ranks in said for line in ranks} == {seen}  # rank 0's of all workers
    assert seen == 14 if fragments == 1 else seen < 14  # less what was added while they travelled


def test_all_ranks_get_the_frozen_numbers_of_the_server(serve, torchrun, tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"base": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "base" / "model.safetensors")
    host = serve("-m", tmp_path / "base", "--until-done")
    ranks = ends(torchrun(host, "w0", base=7, steps=2))
    assert [line["base"] for line in ranks] == [[1.0, 2.0, 3.0]] * 2
    assert host.wait() == 0


def test_two_ranks_are_one_worker(serve, torchrun, start):
    host = serve("-n", 2)
    torchrun(host, "w0")
    until(lambda: status(host)["joining"] == ["w0"], "it waits to start")
    torchrun(host, "w1", seed=2, steps=100_000)
    workers = until(lambda: status(host)["workers"], "the run starts")
    assert [(worker["id"], worker["ranks"]) for worker in workers] == [("w0", 2), ("w1", 2)]
    screen = start(os.path.join(ROOT, "status.py"), "--server", host.address)
    screen.wait_for("w1 .*, 2 ranks$")


def test_what_rank_0_drops_all_ranks_drop(serve, torchrun):
    host = serve("--until-done")
    ranks = ends(torchrun(host, "w0", nan_at=6))
    assert ranks[0]["digests"][7:] == ranks[1]["digests"][7:]
    assert [line["dropped"] for line in ranks] == [4, 4]
    assert host.wait() == 0


def test_where_the_server_refuses_no_rank_is_left_waiting(serve, torchrun, toy):
    host = serve("-n", 2)
    toy(host, "a", steps=8, sync_every=4, num_fragments=2)
    until(lambda: status(host)["joining"] == ["a"], "it waits to start")
    process = torchrun(host, "w0")
    assert process.wait() != 0
    assert "num_fragments is 1 here and 2" in process.output


class Rank:
    """Stands for the `Ranks` of one of two processes, and notes what is told."""

    count, is_alone, is_sharded, is_broken = 2, False, False, False

    def __init__(self, leads, *words):
        self.leads, self.words, self.told = leads, iter(words), []
        self.gather = self.spread = self.broadcast = self.release = lambda *args: None

    def tell(self, value):
        self.told.append(value)
        return value if self.leads else {**value, **next(self.words)}


@pytest.fixture
def rank():
    """rank(leads, *words): the worker of one of two ranks, which has made a step. words: facts that
    it is told, one by one, where it does not lead."""

    def make(leads, *words):
        model = torch.nn.Linear(2, 1)
        worker = DiLoCoWorker(model, torch.optim.Adam(model.parameters()), "127.0.0.1:1", 4)
        model(torch.ones(1, 2)).sum().backward()
        worker.optimizer.step()
        worker.ranks, worker.replica.outbox = Rank(leads, *words), Outbox("w0", 1)
        return worker

    return make


def test_a_step_without_work_tells_one_thing(rank):
    worker = rank(True)
    worker._after_step()
    worker._after_step()
    assert [told["is_busy"] for told in worker.ranks.told] == [False, False]
    assert worker.ranks.told[0] == worker.ranks.told[1] and worker.schedule.left == 2


def test_what_a_heartbeat_says_all_ranks_take_over_in_the_same_turn(rank):
    worker = rank(True)
    reply = protocol.Message("heartbeat", {"orders": ["stop"], "rank": 2, "world": 3}, [])
    worker.leader.beat(SimpleNamespace(request=lambda *_: reply))
    assert (worker.rank, worker.world, worker.stop_ordered) == (0, 1, False)
    worker._after_step()
    assert (worker.rank, worker.world, worker.stop_ordered) == (2, 3, True)
    assert (worker.ranks.told[0]["rank"], worker.ranks.told[0]["world"]) == (2, 3)


def test_a_rank_forgets_its_moments_when_rank_0_does(rank):
    idle = {"is_busy": False}
    worker = rank(False, {**idle, "dropped_steps": 4}, {**idle, "clearings": 1}, idle)
    worker._after_step()  # a push was refused, which leaves the moments of rank 0 alone
    assert worker.dropped_steps == 4 and worker.optimizer.state
    worker._after_step()
    assert not worker.optimizer.state and worker.clearings == 1


def test_what_fails_in_a_turn_fails_on_all_ranks(rank):
    worker = rank(True)
    with pytest.raises(KeyboardInterrupt), worker._together():
        raise KeyboardInterrupt
    assert worker.ranks.told[1:] == [{"error": "KeyboardInterrupt"}]
    with pytest.raises(KeyboardInterrupt), worker._together(False):
        raise KeyboardInterrupt  # nobody waits to hear of it
    assert len(worker.ranks.told) == 3
    worker = rank(False, {"is_busy": True}, {"error": "MemoryError"})
    with pytest.raises(ConnectionError, match=r"rank 0 of .*: MemoryError"):
        worker.flush()
    assert not worker.flushed


@pytest.fixture
def ours(start, launch, tmp_path):
    """ours(*options, ranks=2): worker.py on a small model, with its output in tmp_path / `name`."""

    def run(name, *options, ranks=2):
        script, config = os.path.join(ROOT, "worker.py"), os.path.join(ROOT, "default.yaml")
        run_it = launch if ranks > 1 else start
        return run_it(script, config, f"--output-dir={tmp_path / name}", *SMALL, *options)

    return run


def test_two_ranks_train_as_one_process_with_twice_the_batch_does(ours, tmp_path):
    """With Muon, which works in bfloat16, and AdamW beside it."""
    steps = "--max-steps=6", "--set=train.optimizer=muon"
    two = ours("two", *steps, "--set=train.batch_size=2")
    one = ours("one", *steps, "--set=train.batch_size=4", ranks=1)
    for process in (one, two):
        assert process.wait() == 0, process.output
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert two.output.count("final validation loss") == 1


def test_our_worker_with_two_ranks_is_one_worker_of_a_run(ours, serve, tmp_path):
    host = serve("-n", 2, "--until-done")
    options = ["--server", host.address, "--sync-every=4", "--max-steps=10", "--worker-id"]
    workers = [ours("two", *options, "w0"), ours("one", *options, "w1", ranks=1)]
    host.wait_for("the run starts at round 0 with w0, w1")
    for process in workers:
        assert process.wait() == 0, process.output
    assert host.wait() == 0, host.output
    final = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("one", "two"):
        mine = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(mine[key], final[key]) for key in final)
    assert workers[0].output.count("final validation loss") == 1
    assert len(list((tmp_path / "two").glob("step-*"))) == 1


def test_all_ranks_of_a_slow_worker_go_on_from_the_step_of_the_fastest(ours, serve, tmp_path):
    host = serve("-n", 2, "--until-done", "--own-pace")
    options = ["--server", host.address, "--sync-every=10", "--max-steps=150", "--worker-id"]
    slow = ours("two", *options, "w0", "--set=train.batch_size=64")
    fast = ours("one", *options, "w1", ranks=1)
    for process in (slow, fast):
        assert process.wait() == 0, process.output
    assert host.wait() == 0, host.output
    final = load_file(tmp_path / "model" / "model.safetensors")
    mine = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(mine[key], final[key]) for key in final)
    lines = map(json.loads, (tmp_path / "model" / "rounds.jsonl").read_text().splitlines())
    assert min(line["paces"]["w0"] for line in lines if "w0" in line["paces"]) < 10


def test_ranks_stop_together_and_go_on_together(ours, serve, tmp_path):
    host = serve("--until-done")
    options = ["--server", host.address, "--sync-every=4", "--worker-id=w0"]
    options.append("--set=train.optimizer=muon")
    process = ours("two", *options, "--max-steps=100000")
    process.wait_for("step 8/")
    process.signal(signal.SIGTERM)
    assert process.wait() != 0
    saved = process.wait_for(r"saved .*step-(\d+)")
    assert "stopping after this step" in process.output and "w0 leaves: done" in host.output
    assert host.wait() == 0
    again = serve("--until-done")
    options[1] = again.address
    process = ours("two", *options, "--max-steps=100000", "--resume")
    process.wait_for(f"steps {saved[1]} to|taking its model at step {saved[1]}")
    process.wait_for(f"step {int(saved[1]) // 2 * 2 + 4}/")
    process.signal(signal.SIGTERM)
    process.wait()
    assert again.wait() == 0, again.output


def test_a_trainer_of_transformers_with_two_ranks_is_one_worker(start, launch, serve, tmp_path):
    host = serve("-n", 2, "--until-done")
    env = {"DILOCO_SERVER": host.address, "DILOCO_SYNC_EVERY": "5"}
    steps = ["--set", "max_steps=12"]
    workers = [
        launch(HF_WORKER, tmp_path / "w0", "--seed", 0, *steps, "ddp_backend=gloo",
               env={**env, "DILOCO_WORKER_ID": "w0"}),
        start(HF_WORKER, tmp_path / "w1", "--seed", 1, *steps,
              env={**env, "DILOCO_WORKER_ID": "w1"}, imports=TRAINER),
    ]  # fmt: skip
    host.wait_for("the run starts at round 0 with w0, w1")
    for worker in workers:
        assert worker.wait() == 0, worker.output
    assert host.wait() == 0
    final = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("w0", "w0-rank1", "w1"):
        mine = load_file(tmp_path / f"{name}-end.safetensors")
        assert all(torch.equal(mine[key], final[key]) for key in final), name


# --- Shards ---------------------------------------------------------------------------------


@pytest.fixture
def sharded(start, tmp_path):
    """sharded(server, worker_id, ranks=2, **options): the ranks of tests/fsdp_worker.py, started
    without torchrun, which would be one process more that has to import torch. fails: (rank, what
    that one has as --fails-at)."""

    def run(server, worker_id="w0", ranks=2, fails=(0, 0), **options):
        options |= {"out": tmp_path, "worker_id": worker_id, "ranks": ranks}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        flags += ["--server", server.address]
        number = {fails[0]: fails[1]}
        return [
            start(FSDP_WORKER, *flags, "--rank", rank, "--fails-at", number.get(rank, 0))
            for rank in range(ranks)
        ]

    return run


def check_finals(processes, folder):
    """All ranks have ended well and with the model of the server, to the bit."""
    said = [ends(process)[0] for process in processes]
    assert all(line["is_read"] for line in said)
    final = load_file(folder / "model" / "model.safetensors")
    paths = list(folder.glob("w*.safetensors"))
    assert len(paths) == len(processes)
    for path in paths:
        mine = load_file(path)
        assert mine.keys() == final.keys()
        assert all(torch.equal(mine[name], final[name]) for name in final), path
    return said


def test_shards_are_synchronized_with_a_worker_that_has_none(serve, sharded, tmp_path):
    host = serve("-n", 2, "--until-done")
    workers = sharded(host, wide=400_000) + sharded(host, "w1", ranks=1, wide=400_000)
    assert host.wait() == 0
    zero, one, plain = check_finals(workers, tmp_path)
    assert {(line["step"], line["syncs"]) for line in (zero, one, plain)} == {(14, 4)}
    assert zero["is_same"] and one["is_same"] and not plain["is_same"]  # w0 brought the model
    for line in (zero, one, plain):
        for before, _, after in line["evaluated"]:
            assert before == after
    assert zero["evaluated"][0][1] == one["evaluated"][0][1] != one["evaluated"][0][0]
    assert 600_000 <= one["largest"] <= 1_200_000  # one parameter of a model of 2 million numbers


def test_replicas_of_shards_stream_and_drop_what_is_not_finite(serve, sharded, tmp_path):
    host = serve("-n", 2, "--until-done")
    options = {"num_fragments": 4, "optimizer": "muon"}
    workers = sharded(host, ranks=4, replicas=2, nan_at=6, **options)
    workers += sharded(host, "w1", ranks=1, **options)
    assert host.wait() == 0
    *ranks, _ = check_finals(workers, tmp_path)
    assert all(line["apart"] < 0.1 for line in ranks)
    assert len({line["dropped"] for line in ranks}) == 1 and ranks[0]["dropped"]


@pytest.mark.parametrize("fragments", [1, 4])
def test_shards_outlive_the_server(serve, sharded, tmp_path, fragments):
    host = serve("--save-every=1")
    options = {"steps": 100_000, "pause": 0.02, "reconnect_timeout": 0.5}
    workers = sharded(host, num_fragments=fragments, **options)
    until(lambda: status(host)["round"] >= 2, "two rounds are through")
    host.kill()
    workers[0].wait_for("trains on without the server")
    host = serve("--until-done", "--port", host.port)
    workers[0].wait_for("has joined again as")
    seen = until(lambda: status(host)["round"], "it is back")
    until(lambda: status(host)["round"] > seen + 1, "rounds go on")
    protocol.connect(host.address, {})[0].request("stop")
    check_finals(workers, tmp_path)


@pytest.mark.parametrize("place", ["gather", "spread"])
@pytest.mark.parametrize("number", [1, 3])
def test_no_rank_is_left_waiting_in_a_transfer(serve, sharded, place, number):
    host = serve("-n", 2)
    raises = sharded(host, "w0", fails=(0, number), fails_in=place)
    dies = sharded(host, "w1", fails=(1, number), fails_in=place)
    assert all(worker.wait() != 0 for worker in raises + dies)
    assert "MemoryError: no room for it" in raises[0].output
    if place == "gather":  # what rank 0 has no room for, the others send all the same
        assert "rank 0 of w0: MemoryError: no room for it" in raises[1].output


@pytest.mark.filterwarnings("ignore:FSDP is switching to use")
def test_other_placements_are_refused_by_name(mesh, monkeypatch):
    def worker(model):
        return DiLoCoWorker(model, torch.optim.SGD(model.parameters()), "127.0.0.1:1")

    model = torch.nn.Linear(2, 3)
    for place in (Shard(1), Partial()):
        shard = DTensor.from_local(torch.zeros(3, 2), mesh, [place])
        model.weight = torch.nn.Parameter(shard)
        with pytest.raises(
            ValueError, match=rf"'weight' is placed as \({place.__class__.__name__}"
        ):
            worker(model)
    model = torch.nn.Sequential(fully_shard(torch.nn.Linear(2, 3), mesh=mesh))
    assert worker(model).trained.named.keys() == {"0.weight", "0.bias"}
    monkeypatch.setattr(type(mesh), "size", lambda *_: 4)  # of the mesh, or one of its dimensions
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    muon = [torch.optim.Muon([model[0].weight]), torch.optim.SGD([model[0].bias])]
    with pytest.raises(ValueError, match=r"'0.weight' has 3 rows on 4 shards.*AdamW"):
        Trained(model, muon)
    monkeypatch.undo()
    wrapped = FullyShardedDataParallel(
        torch.nn.Linear(2, 3), use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="weight' is flattened by FullyShardedDataParallel"):
        worker(wrapped)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="weight' is on a mesh of 1 ranks, and the worker has 2"):
        worker(model)


def test_frozen_shards_are_compared_and_those_of_the_server_are_taken(serve, mesh, tmp_path):
    torch.manual_seed(0)
    base = {"0.weight": torch.randn(3, 2), "0.bias": torch.randn(3)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    host = serve("-m", tmp_path / "base")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].bias.copy_(base["0.bias"])
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model[1].parameters())
    worker = DiLoCoWorker(model, optimizer, host.address, 4, worker_id="w0").start()
    worker.close()
    assert worker.fetched == ["0.weight"]  # the bias was the server's
    assert worker.ranks.mirror.keys() == {"1.weight", "1.bias"}  # frozen ones are not kept
    for name, tensor in base.items():
        assert torch.equal(model.state_dict()[name].full_tensor(), tensor)
