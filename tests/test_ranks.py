"""Tests of a worker that is several processes: torchrun and DistributedDataParallel on gloo.

python -m pytest tests/test_ranks.py
"""

import json
import os

import pytest
from conftest import ROOT, digest_of, status, until

WORKER = os.path.join(ROOT, "tests", "ddp_worker.py")


@pytest.fixture
def torchrun(start):
    """torchrun(server, worker_id, **options): tests/ddp_worker.py as two ranks."""

    def run(server, worker_id, **options):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", WORKER]
        return start(*command, "--server", server.address, "--worker-id", worker_id, *flags)

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
