"""Tests of a worker that is several processes: torchrun and DistributedDataParallel on gloo.

python -m pytest tests/test_ranks.py
"""

import json
import os
import signal

import pytest
import torch
from conftest import LAUNCHER, ROOT, TRAINER, digest_of, status, until
from safetensors.torch import load_file

AS_TORCHRUN = "import sys; from torch.distributed.run import main; sys.exit(main())"
TORCHRUN = ["-c", AS_TORCHRUN, "--standalone", "--nproc_per_node=2"]
WORKER = os.path.join(ROOT, "tests", "ddp_worker.py")
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


def test_two_ranks_are_one_worker(serve, torchrun, start):
    host = serve("-n", 2)
    torchrun(host, "w0")
    until(lambda: status(host)["joining"] == ["w0"], "it waits to start")
    torchrun(host, "w1", seed=2, steps=100_000)
    workers = until(lambda: status(host)["workers"], "the run starts")
    assert [(worker["id"], worker["ranks"]) for worker in workers] == [("w0", 2), ("w1", 2)]
    screen = start(os.path.join(ROOT, "status.py"), "--server", host.address)
    screen.wait_for("w1 .*, 2 ranks ")


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


@pytest.fixture
def ours(start, launch, tmp_path):
    """ours(*options, ranks=2): worker.py on a small model, with its output in tmp_path / `name`."""

    def run(name, *options, ranks=2):
        script, config = os.path.join(ROOT, "worker.py"), os.path.join(ROOT, "default.yaml")
        run_it = launch if ranks > 1 else start
        return run_it(script, config, f"--output-dir={tmp_path / name}", *SMALL, *options)

    return run


def test_two_ranks_train_as_one_process_with_twice_the_batch_does(ours, tmp_path):
    steps = "--max-steps=6"
    two = ours("two", steps, "--set=train.batch_size=2")
    one = ours("one", steps, "--set=train.batch_size=4", ranks=1)
    for process in (one, two):
        assert process.wait() == 0, process.output
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
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


def test_ranks_stop_together_and_go_on_together(ours, serve, tmp_path):
    host = serve("--until-done")
    options = ["--server", host.address, "--sync-every=4", "--worker-id=w0"]
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


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, {root!r})
from diloco_callback import DiLoCoWorker
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
model = fully_shard(torch.nn.Linear(2, 3), mesh=mesh)
DiLoCoWorker(model, torch.optim.SGD(model.parameters()), "127.0.0.1:1")
"""


def test_shards_are_refused_by_name(start):
    process = start("-c", SHARDED.format(root=ROOT))
    assert process.wait() == 1
    assert "ValueError: parameter 'weight' is a shard (DTensor)" in process.output
