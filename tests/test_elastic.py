"""Workers come and go, lines are cut, the server dies: nothing is lost, and nothing counts twice.

python -m pytest tests/test_elastic.py

Most tests count. A step adds 1 (or the worker's `gain`) to every number of the model; there is no
momentum, nothing is rounded, and the outer learning rate is the number of workers, so the global
numbers are the sum of all steps that were folded: with gains of 1 and 1000 one number tells how
many of each worker are in it. This file run as a script is such a worker in a process of its own,
to be killed. The rules by themselves are tried in test_rules.py and simulator.py.
"""

import contextlib
import json
import operator
import os
import re
import signal
import socket
import sys
import time
from fractions import Fraction

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from conftest import DEADLINE, ROOT, result, status, until
from peers import (
    Counter,
    Gate,
    Numbers,
    Peer,
    ask,
    background,
    drive,
    join_all,
    rounds,
    settle,
    simulate,
    spread,
    steps_in,
)
from safetensors.torch import load_file

import protocol
from diloco_callback import DiLoCoWorker
from protocol import Refused

FULL = dict(sync_every=8, num_fragments=1)
STREAMING = dict(
    sync_every=8, num_fragments=4, fragment_sync_delay=1
)  # at 2, 4, 6, 8; adopts 1 later
both_modes = pytest.mark.parametrize("mode", [FULL, STREAMING], ids=["full", "streaming"])
A, B = 1, 1000  # gains of two workers whose steps are told apart in their sum
PLAIN = ["--upload-codec", "fp32", "--download-codec", "fp32", "--outer-momentum", 0]
WHOLE = ["--outer", "whole", "--weights", "equal", "--stale-weight", 0]  # as where all are awaited
ADD_ONE, ADD_TWO = [*PLAIN, "--outer-lr", 1], [*PLAIN, "--outer-lr", 2, "-n", 2]
SOON = ["--worker-timeout", 1]  # heartbeats come every 0.25 s


@pytest.fixture
def count():
    """count(server, name, **options): a Counter that ends with the test."""
    counters = []

    def make(*args, **options):
        counters.append(Counter(*args, **options))
        return counters[-1]

    yield make
    for counter in counters:
        counter.quit()
    for counter in counters:
        counter.join(15)


def joined(*counters):
    """Wait until all of them have joined. Gives them."""
    for counter in counters:
        until(lambda c=counter: c.joined.is_set() or c.error, f"{counter.worker.worker_id} joins")
    return counters


def pair(count, server, mode, gate=None, **options):
    """Two Counters that have joined: a adds 1 a step, and b, which may be behind a gate, 1000."""
    a = count(server, "a", A, **mode, **options)
    b = count(gate or server, "b", B, **mode, **options)
    return joined(a, b)


def back(*counters):
    """Step those that have found the server again, until all of them have joined again."""

    def are_back():
        for counter in counters:
            assert counter.error is None, repr(counter.error)
            if counter.worker.link.lost.is_set() and counter.steps == counter.total:
                counter.step(1)
        return all(counter.worker.joins == 2 for counter in counters)

    until(are_back, "all have joined again")


def round_line(folder, number, fragment=0):
    """The line of one round, once it is written."""
    return rounds(folder / "model", number, fragment)[number - 1]


def first_push(mode):
    """Steps before the first push of fragment 0."""
    return mode["sync_every"] // mode["num_fragments"]


@pytest.fixture
def process(start):
    """process(server, name, **options): this file as a worker in a process; see `main`."""

    def run(server, name, **options):
        return start(__file__, json.dumps({"server": server.address, "worker_id": name, **options}))

    return run


def main():
    """A Counter as a process: takes `steps` steps, writes what a checkpoint has after `save_at` of
    them to `file`, and where it `holds`, waits to be killed then. `resume`: from such a file."""
    options = json.loads(sys.argv[1])
    own = {"gain": A, "steps": 0, "file": "", "save_at": 0, "resume": "", "holds": False}
    own |= {name: options.pop(name) for name in own if name in options}
    torch.set_num_threads(1)
    model, state = Numbers(own["gain"]), None
    if own["resume"]:
        saved = torch.load(own["resume"], weights_only=True)
        state = saved["state"]
        with torch.no_grad():
            model.weight.copy_(saved["numbers"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with DiLoCoWorker(model, optimizer, state=state, **options) as worker:
        print(f"joined with {model.weight.tolist()} as worker {worker.index}", flush=True)
        for step in range(1, own["steps"] + 1):
            model.step(optimizer)
            if step == own["save_at"]:
                torch.save({"state": worker.state_dict(), "numbers": model.weight}, own["file"])
            print(f"took step {step}: {model.weight[0].item()}", flush=True)
        while own["holds"]:
            time.sleep(1)
    print(f"ends with {model.weight.tolist()}", flush=True)


# --- A worker dies ------------------------------------------------------------------------------


@both_modes
def test_a_push_of_a_killed_worker_that_had_arrived_whole_counts(
    serve, count, process, tmp_path, mode
):
    """kill -9 while it waits for the others. The rounds after that go on without it."""
    server = serve(*ADD_TWO, *SOON)
    a = process(server, "a", steps=100, **mode)
    b = count(server, "b", B, **mode)
    until(lambda: status(server)["fragments"][:1] == [{"version": 0, "pushes": 1}], "a's push")
    a.kill()
    b.step(first_push(mode) + 1).stepped()
    assert round_line(tmp_path, 1)["losses"].keys() == {"a", "b"}
    assert steps_in(b.anchor[0]) == (first_push(mode), first_push(mode))
    b.step(mode["sync_every"]).stepped()
    server.wait_for("a is gone: not heard of for 1 s")
    assert sum("connection to a ended" in line for line in server.lines) == 1  # of several
    assert round_line(tmp_path, 2)["losses"].keys() == {"b"}


def test_half_a_push_of_a_killed_worker_leaves_no_trace(serve, count, process, tmp_path):
    server = serve(*PLAIN, "--outer-lr", 1, "-n", 2, *SOON)
    gate = Gate(server)
    gate.pushes.append("stalled")
    a = process(gate, "a", steps=100, **FULL)
    b = count(server, "b", B, **FULL)
    until(lambda: gate.met, "half a push")
    a.kill()
    b.step(9).stepped()
    server.wait_for("a is gone")
    line = round_line(tmp_path, 1)
    assert (line["losses"].keys(), line["steps"]) == ({"b"}, 8)
    assert steps_in(b.anchor[0]) == (0, 8)


def test_an_id_is_free_again_when_its_process_is_dead(serve, process):
    """Long before --worker-timeout, and with the index that it had."""
    server = serve(*ADD_TWO, "--worker-timeout", 600)
    options = dict(steps=1, holds=True, **FULL)
    a, b = (process(server, name, **options) for name in "ab")
    a.wait_for("took step 1"), b.wait_for("took step 1")
    b.kill()
    again = process(server, "b", **options)
    assert again.wait_for(r"as worker (\d)")[1] == "1"
    assert [w["id"] for w in status(server)["workers"]] == ["a", "b"]


def test_an_uploader_that_is_frozen_does_not_hold_the_start_for_ever(serve):
    server = serve("-n", 2, *SOON)
    a, b, c = (Peer(server, name) for name in "abc")
    asked = background(a.ask)
    waits = background(b.join)
    assert asked.result(DEADLINE).type == "bring"  # and it does not move any more
    c.join()
    waits.result(DEADLINE)
    assert b.brought == [0] and [w["id"] for w in status(server)["workers"]] == ["b", "c"]


# --- A worker restarts from its checkpoint ------------------------------------------------------


@both_modes
@pytest.mark.parametrize("fate", ["open", "folded"])
def test_steps_that_a_worker_repeats_from_its_checkpoint_are_not_counted_twice(
    serve, count, process, tmp_path, mode, fate
):
    """The checkpoint is from one step before a push; the worker is killed after it."""
    server = serve(*ADD_TWO)
    first, delay, file = first_push(mode), int(mode is STREAMING), str(tmp_path / "saved.pt")
    steps = first + delay
    a = process(server, "a", steps=steps, holds=True, save_at=first - 1, file=file, **mode)
    b = count(server, "b", B, **mode)
    until(lambda: status(server)["fragments"][:1] == [{"version": 0, "pushes": 1}], "a's push")
    if fate == "folded":
        b.step(steps).stepped()
        a.wait_for(f"took step {steps}")
    a.kill()
    again = process(server, "a", steps=20, resume=file, holds=True, **mode)
    numbers = json.loads(again.wait_for(r"joined with (\[.*\])")[1])
    kept = float(first - 1)
    if fate == "open":
        assert numbers == [kept] * 8
    else:
        whole = kept if mode is STREAMING else first + B * first
        assert numbers == [first + B * first, whole, whole, whole] * 2
    more = 0 if fate == "open" else mode["sync_every"]
    b.step(more or first)
    line = round_line(tmp_path, 2 if more else 1)
    trail = numbers[:1]
    for step in range(1, 21):
        trail.append(float(again.wait_for(rf"took step {step}: (.*)")[1]))
        if trail[-1] - trail[-2] != 1:  # it has pushed: adopted that, or predicts it
            break
    own = len(trail) - 1
    b.step(1).stepped()
    if fate == "open":
        assert own == 1
    pushed = own if more else first - 1 + own
    of_a = first + own if more else pushed
    assert steps_in(b.anchor[0]) == (of_a, first + more)
    assert (line["losses"].keys(), line["steps"]) == ({"a", "b"}, pushed + (more or first))


# --- Lines are cut ------------------------------------------------------------------------------


@both_modes
def test_a_worker_whose_lines_are_all_cut_takes_up_where_it_was(serve, count, mode):
    """In the middle of a cycle, and again while its push waits."""
    server = serve(*ADD_TWO)
    gate = Gate(server)
    a, b = pair(count, server, mode, gate)
    for counter in (a, b):
        counter.step(11)
    a.stepped(), b.stepped()
    gate.cut()
    b.step(5).waits() if mode is FULL else b.step(1).waits()
    gate.cut()
    a.step(b.total - a.total)
    a.stepped(), b.stepped()
    settle(a, b)
    assert b.worker.joins == 1 and b.steps > 8
    assert steps_in(a.anchor[0])[1] >= 8


def test_another_process_with_an_id_that_lives_is_refused_by_name_also_after_a_cut(
    serve, count, toy
):
    server = serve(*ADD_ONE, "--worker-timeout", 5)
    gate = Gate(server)
    a = count(gate, "a", **FULL)
    joined(a)
    other, heard = toy(server, "a"), []
    one = background(lambda: Peer(server, "a").join(on_wait=heard.append))
    until(lambda: heard, "the newcomer is told to wait")
    gate.cut()
    two = background(lambda: Peer(server, "a").join())
    for newcomer in (one, two):
        with pytest.raises(
            Refused, match=r"worker id 'a' is held by a live process on .*127.0.0.1"
        ):
            newcomer.result(DEADLINE)
    assert other.wait() == 3
    assert f"held by a live process on {socket.gethostname()}" in other.output
    a.step(8).stepped()
    assert a.anchor == [8.0] * 8 and a.worker.joins == 1


@both_modes
def test_cut_pushes_and_replies_count_once_with_the_same_numbers(serve, count, tmp_path, mode):
    """Each fault at another push; the numbers are those of `simulate`, in fractions."""
    server = serve(*PLAIN, "--outer-lr", 0.5, "--outer-momentum", 0.5, "--no-momentum-warmup",
                   "--no-nesterov", "-n", 2)  # fmt: skip
    gate = Gate(server)
    again, only = ["lost", "half", "no reply"], ["lost", "no reply", "half a reply"]
    for of_push, of_pull in zip(again, only, strict=True):
        gate.pushes += [of_push, None]  # and then it gets through
        gate.pulls += [of_pull, None]
    a, b = count(gate, "a", 1.0, **mode), count(server, "b", 0.5, **mode)
    a.finish(44), b.finish(44)
    delay = mode.get("fragment_sync_delay", 0)
    _, end = simulate(
        (1.0, 0.5), 44, 8, mode["num_fragments"], delay, "predict", 0,
        Fraction(1, 2), Fraction(1, 2), nesterov=False,
    )  # fmt: skip
    assert a.result() == b.result() == spread(end)
    assert sorted(gate.met) == sorted(again + only)
    assert len(gate.seen) == len(set(gate.seen)) + len(again)
    assert a.worker.replica.mismatches == b.worker.replica.mismatches == 0
    for k in range(mode["num_fragments"]):
        numbers = [line["round"] for line in rounds(tmp_path / "model", fragment=k)]
        assert numbers == list(range(1, a.versions[k].number + 1))


def test_a_worker_that_ends_while_it_is_cut_off_longer_than_the_worker_timeout_is_counted(
    serve, count
):
    server = serve(*ADD_TWO, *SOON)
    gate = Gate(server)
    a, b = pair(count, server, FULL, gate)
    gate.close()
    b.finish(3)
    server.wait_for("b is gone")
    a.step(8).stepped()  # alone, so its steps count twice
    gate.open = True
    until(lambda: status(server)["fragments"][0]["pushes"] == 1, "b's last push")
    a.step(8)
    assert b.result() == [24.0 + 3 * B] * 8
    a.stepped()
    assert a.anchor == b.local


def test_stop_reaches_a_worker_that_is_away_when_it_is_ordered(serve, count):
    server = serve(*ADD_TWO, *SOON, "--until-done")
    gate = Gate(server)
    a, b = pair(count, server, FULL, gate)
    b.step(3).stepped()
    gate.close()
    server.wait_for("b is gone")
    ask(server, "stop")
    until(lambda: a.worker.run_is_over(0), "a hears it")
    gate.open = True
    back(b)
    until(lambda: b.worker.run_is_over(0), "b hears it")
    a.finish(0), b.finish(0)
    assert a.result() == b.result() and steps_in(a.local[0])[1] == 4
    assert server.wait() == 0


def test_a_stalled_transfer_is_noticed_and_sent_again(serve, count, capsys, impatient):
    server = serve(*ADD_ONE)
    gate = Gate(server)
    gate.pushes.append("stalled")
    a = count(gate, "a", **FULL)
    a.finish(11)
    assert a.result() == [11.0] * 8
    assert gate.met == ["stalled"] and gate.seen[0] == gate.seen[1]
    assert "no byte for 2 s" in capsys.readouterr().err  # 1.5, rounded


def test_a_slow_transfer_that_moves_takes_longer_than_the_stall_limit(
    serve, count, capsys, impatient
):
    """Some 2.3 s each way."""
    server = serve(*ADD_ONE)
    gate = Gate(server)
    gate.pushes.append("slow"), gate.pulls.append("slow")
    a = count(gate, "a", size=1 << 20, **FULL)  # 4 MB a push, 64 kB at once
    joined(a)
    began = time.monotonic()
    a.step(9).stepped()
    assert time.monotonic() - began > 2 * impatient
    assert len(gate.seen) == 1 and "trying again" not in capsys.readouterr().err
    assert set(a.anchor) == {8.0}


@pytest.fixture
def impatient(monkeypatch):
    """Workers in the test's process take a line on which nothing moves for so long for dead."""
    monkeypatch.setattr(protocol.Connection.__init__, "__defaults__", (1.5,))
    return 1.5


WAITS_OFTEN = "import protocol, runpy; protocol.WAIT_SECONDS = 0.5; runpy.run_path('server.py', run_name='__main__')"


def test_a_worker_that_waits_for_a_slow_peer_longer_than_the_stall_limit_lives_on(
    start, count, tmp_path, impatient
):
    server = start("-c", WAITS_OFTEN, "-m", tmp_path / "model", "--port", 0, *ADD_TWO)
    server.port = int(server.wait_for(r"listening on port (\d+)")[1])
    server.address = f"127.0.0.1:{server.port}"
    gate = Gate(server)
    a, b = count(gate, "a", A, **FULL), count(server, "b", B, **FULL)
    pulls = []

    def note(fields, size):
        pulls.extend([fields] if fields["type"] == "pull" and fields["seq"] else [])

    gate.fault_of = note
    a.step(9).waits()
    until(lambda: pulls, "a asks for the entry of its push")
    time.sleep(2 * impatient)
    assert len(pulls) == 1  # the answer is awaited, and not asked for again
    b.step(9)
    a.stepped(), b.stepped()
    assert steps_in(a.anchor[0]) == (8, 8)


# --- A worker is slow, or late ------------------------------------------------------------------


@both_modes
def test_a_late_joiner_pushes_with_the_others(serve, count, tmp_path, mode):
    """It comes three steps into the second cycle; the very next push of every fragment is of all."""
    server = serve(*PLAIN, "-n", 2, *SOON)
    a, b = pair(count, server, mode, source="tales")
    for counter in (a, b):
        counter.step(11)
    a.stepped(), b.stepped()
    until(lambda: [w["position"] for w in status(server)["workers"]] == [3, 3], "heartbeats")
    (c,) = joined(count(server, "c", **mode, source="tales"))
    left = c.worker.schedule.left  # less than 5 where the server takes the others to have gone on
    assert c.worker.index == 2 and 1 <= left <= (5 if mode is FULL else 1)
    until(lambda: [x.worker.world for x in (a, b, c)] == [3] * 3, "all hear of the third")
    assert sorted(x.worker.rank for x in (a, b, c)) == [0, 1, 2]
    for counter in (a, b, c):
        counter.step(left + 7)
    for counter in (a, b, c):
        counter.stepped()
    for k in range(mode["num_fragments"]):
        late = [x for x in rounds(tmp_path / "model", fragment=k) if "c" in x["members"]]
        assert late and all(line["losses"].keys() == {"a", "b", "c"} for line in late)
    assert a.anchor == b.anchor == c.anchor


@both_modes
def test_a_round_closes_without_the_slow_one_whose_push_counts_in_the_next(
    serve, count, tmp_path, mode
):
    """a adds 1 and b 3 a step, the outer lr is 1. Worked out by hand for fragment 0."""
    server = serve(*PLAIN, "--outer-lr", 1, "-n", 2, "--round-timeout", 0.5, *WHOLE)
    a, b = joined(*(count(server, name, gain, **mode) for name, gain in (("a", 1), ("b", 3))))
    first = first_push(mode)
    a.step(first + 1).stepped()
    assert round_line(tmp_path, 1)["losses"].keys() == {"a"}
    assert a.anchor[0] == first
    b.step(first), a.step(mode["sync_every"]).stepped()
    line = round_line(tmp_path, 2)
    assert line["losses"].keys() == {"a", "b"} and line["staleness"] == {"b": 1}
    b.step(1).stepped()
    assert a.anchor[0] == b.anchor[0] == first + (8 + 3 * first) / 2
    assert a.versions[0] == b.versions[0]
    assert b.worker.dropped_steps == 0


def test_a_push_over_max_staleness_is_dropped_counted_and_the_global_model_taken(
    serve, count, tmp_path
):
    server = serve(
        *PLAIN, "--outer-lr", 1, "-n", 2, "--round-timeout", 0.3, "--max-staleness", 0, *WHOLE
    )
    a, b = joined(*(count(server, name, gain, **FULL) for name, gain in (("a", 1), ("b", 3))))
    a.step(9).stepped()
    b.step(9).stepped()
    assert b.worker.metrics()["diloco/dropped_steps"] == 8
    assert b.anchor[0] == 8 and b.local == [8 + 3.0] * 8
    assert round_line(tmp_path, 2)["refused"] == ["b"]
    a.step(8), b.step(8)
    a.stepped(), b.stepped()
    assert b.worker.dropped_steps == 8 and a.anchor == b.anchor


def test_a_round_that_holds_only_late_pushes_is_overdue_too(serve):
    server = serve(*ADD_TWO, "--round-timeout", 0.3)
    a, b = join_all(*(Peer(server, name) for name in "ab"))
    a.push(torch.ones(17))
    b.send(torch.ones(17))  # it does not know of round 1; a is silent from now on
    assert b.pull() in ("entry", "slice") and b.folded[0]["b"].refused == ""
    assert b.version.number == 2


@pytest.mark.parametrize("delay", [None, 1], ids=["full", "streaming"])
def test_the_end_of_a_run_does_not_hang_below_min_workers(serve, toy, delay):
    """Both have the same number of steps; the slower one is alone when the other has left."""
    server = serve("-n", 2, "--min-workers", 2, "--until-done")
    options = {"steps": 40, "sync_every": 8}
    if delay:
        options |= {"num_fragments": 4, "fragment_sync_delay": delay}
    workers = [toy(server, "a", **options), toy(server, "b", pause=0.02, **options)]
    for worker in workers:
        result(worker)
    assert server.wait() == 0


# --- The server dies ----------------------------------------------------------------------------


@both_modes
def test_training_goes_on_without_a_server_and_the_push_keeps_its_name(serve, count, capsys, mode):
    """Killed before it got the push; 31 steps later it is started again, from round 1."""
    server = serve(*ADD_ONE, "--save-every", 1)
    gate = Gate(server)
    a = count(gate, "a", reconnect_timeout=0.3, **mode)
    a.step(9).stepped()
    server.wait_for("saved .*checkpoint-1")
    server.kill()
    a.step(31).stepped()
    assert "trains on without the server" in capsys.readouterr().err
    assert a.local == [40.0] * 8
    names = {(push.k, push.seq, push.base) for push in a.flying}
    assert len(names) == mode["num_fragments"]
    sent = len(gate.seen)
    again = serve(*ADD_ONE, "--save-every", 1)
    gate.port = again.port
    back(a)
    a.finish(13)
    assert a.result() == [float(a.steps)] * 8
    assert names <= set(gate.seen[sent:])  # each by its name


@both_modes
def test_steps_of_a_push_whose_reply_was_lost_do_not_count_twice(serve, count, mode):
    """The server folds it and lives on, but the line is dead for 20 steps."""
    server = serve(*ADD_ONE)
    gate = Gate(server)
    a = count(gate, "a", reconnect_timeout=0.3, **mode)
    a.step(8).stepped()
    until(lambda: not a.flying or mode is STREAMING, "nothing is under way")
    gate.pulls.append("gone")
    a.step(20).stepped()
    assert gate.met == ["gone"] and a.local == [28.0] * 8
    gate.open = True
    a.finish(9)
    assert a.result() == [37.0] * 8


def die_after_round_2(server, tmp_path, a, b, gate, mode):
    """Round 1 is in the checkpoint. Round 2 of fragment 0 has pushes of a and b; a adopts it, the
    reply to b is lost, and the server is killed. They train on."""
    for counter in (a, b):
        counter.step(9)
    a.stepped(), b.stepped()
    ask(server, "save")
    server.wait_for("saved .*checkpoint-1")
    gate.slice = 0
    gate.pulls.append("gone")
    for counter in (a, b):
        counter.step(first_push(mode))
    a.stepped(), b.stepped()
    assert (a.versions[0].number, b.versions[0].number) == (2, 1)
    server.kill()
    a.step(2).stepped(), b.step(3).stepped()
    assert [f.name for f in (tmp_path / "model").glob("checkpoint-*")] == ["checkpoint-1"]


@both_modes
def test_a_push_that_only_the_others_know_to_be_folded_is_not_folded_again(
    serve, count, tmp_path, mode
):
    command = [*ADD_TWO, "--save-every", 0]
    server = serve(*command)
    gate = Gate(server)
    a, b = pair(count, server, mode, gate, reconnect_timeout=0.5)
    die_after_round_2(server, tmp_path, a, b, gate, mode)
    again = serve(*command, "--port", server.port)
    gate.open = True
    back(a, b)
    again.wait_for("slice 0: version 2 comes from a")
    settle(a, b)


def test_an_offer_that_comes_late_gets_the_slice_in_full(serve, count, tmp_path):
    """As above, but a is not back before --worker-timeout: round 2 is made anew, without it."""
    command = [*ADD_TWO, "--save-every", 0, *SOON]
    server = serve(*command)
    gate, other = Gate(server), Gate(server)
    a = count(other, "a", A, **FULL, reconnect_timeout=0.5)
    b = count(gate, "b", B, **FULL, reconnect_timeout=0.5)
    joined(a, b)
    die_after_round_2(server, tmp_path, a, b, gate, FULL)
    other.close()
    again = serve(*command, "--port", server.port)
    gate.open = True
    back(b)
    again.wait_for("the run starts at round 1 with b")
    other.open = True
    back(a)
    again.wait_for("a joins the run")
    drive(a, b, lambda: a.versions == b.versions and min(v.number for v in a.versions) > 2)
    assert a.anchor == b.anchor
    assert "comes from" not in again.output


def test_a_restart_waits_for_the_members_of_before(serve, count):
    command = [*ADD_TWO, "--save-every", 1]
    server = serve(*command)
    gate = Gate(server)
    a, b = pair(count, server, FULL, gate)
    for counter in (a, b):
        counter.step(9)
    a.stepped(), b.stepped()
    server.wait_for("saved .*checkpoint-1")
    gate.close()
    server.kill()
    again = serve(*command, "--port", server.port)
    a.step(7)
    until(lambda: status(again)["joining"] == ["a"], "a is back")
    said = status(again)
    assert (said["state"], said["expected"]) == ("waiting for workers to come back", ["b"])
    gate.open = True
    b.step(7)
    a.stepped(), b.stepped()
    settle(a, b)
    assert again.wait_for("the run starts at round 1 with (.*)")[1] == "a, b"


def test_a_restart_goes_on_with_those_who_are_left_though_n_is_more(serve, count, process):
    """One of the two workers dies with the server, which has no checkpoint."""
    command = [*ADD_TWO, "--save-every", 0, *SOON]
    server = serve(*command)
    b = process(server, "b", gain=B, steps=9, holds=True, **FULL)
    a = count(server, "a", **FULL)
    a.step(9).stepped()
    b.wait_for("took step 9")
    server.kill(), b.kill()
    again = serve(*command, "--port", server.port)
    assert "continuing from" not in again.output
    before = a.anchor
    assert steps_in(before[7]) == (8, 8)
    back(a)
    again.wait_for("the run starts at round 1 with a")
    assert "comes from a" in again.output
    a.step(16).stepped()
    assert a.versions[0].number >= 3
    assert steps_in(a.anchor[0] - before[0])[1] == 0


@both_modes
def test_a_crash_before_the_first_checkpoint_costs_nothing(serve, count, mode):
    """In the middle of a cycle: the workers bring all slices."""
    command = [*ADD_TWO, "--save-every", 0]
    server = serve(*command)
    a, b = pair(count, server, mode)
    for counter in (a, b):
        counter.step(11)
    a.stepped(), b.stepped()
    server.kill()
    again = serve(*command, "--port", server.port)
    assert "NO WEIGHTS" in again.output
    back(a, b)
    assert len(re.findall("comes from", again.output)) == mode["num_fragments"]
    settle(a, b)
    assert steps_in(a.anchor[0])[0] >= 8


def test_a_server_killed_while_it_writes_a_checkpoint_finds_a_whole_one(serve, tmp_path):
    """Every push adds 1 to 2 million numbers, so in a whole checkpoint all are its round."""
    size, folder = 2_000_000, tmp_path / "model"
    beside, torn = folder / ".tmp-checkpoint", 0
    for life in range(5):
        server = serve(*ADD_ONE, "--save-every", 1)
        assert "WARNING" not in server.output
        a = Peer(server, "a", torch.zeros(size), manifest=[["w", "F32", [size]]]).join()
        assert set(a.params.tolist()) == {float(a.version.number)}
        for _ in range(2):
            a.push(torch.full((size,), -1.0))
            until((folder / f"checkpoint-{a.version.number}").exists, "the checkpoint")
        a.push(torch.full((size,), -1.0))
        model, last = beside / "model.safetensors", folder / f"checkpoint-{a.version.number}"
        while not last.exists():
            with contextlib.suppress(FileNotFoundError):
                if model.stat().st_size >= life * size:  # of 4 bytes a number
                    break
        server.kill()
        a.close()
        torn += beside.exists()
        for path in folder.glob("checkpoint-*"):
            (numbers,) = load_file(path / "model.safetensors").values()
            assert set(numbers.tolist()) == {float(path.name.split("-")[1])}
            load_file(path / "outer.safetensors")
    assert torn >= 3


# --- Ctrl-C and SIGTERM -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "mode"), [(signal.SIGINT, FULL), (signal.SIGTERM, STREAMING)], ids=["int", "term"]
)
def test_a_server_that_is_stopped_saves_tells_its_workers_and_they_carry_on(
    serve, count, capsys, number, mode
):
    """A push waits for the other worker all the while."""
    command = [*ADD_TWO, "--save-every", 0, *SOON]
    server = serve(*command)
    a, b = pair(count, server, mode)
    for counter in (a, b):
        counter.step(9)
    a.stepped(), b.stepped()
    a.step(8).waits()
    server.signal(number)
    assert server.wait() == 0
    assert "Traceback" not in server.output and "saved" in server.output
    told = []

    def are_told():
        told.append(capsys.readouterr().err)
        return "".join(told).count("was stopped; it has saved, and is awaited back") == 2

    until(are_told, "both are told")
    again = serve(*command, "--port", server.port)
    b.step(8)
    a.stepped(), b.stepped()
    settle(a, b)
    assert "continuing from" in again.output


def test_a_second_signal_ends_the_server_at_once(serve):
    """The first one waits for the heartbeat of a worker that sends none."""
    server = serve("-n", 1)
    Peer(server, "a").join()
    server.signal(signal.SIGINT)
    server.wait_for("stopping: saving, and telling the workers; once more leaves at once")
    server.signal(signal.SIGINT)
    assert server.wait() == 128 + signal.SIGINT
    assert "ends; the newest checkpoint" not in server.output


SMALL = ["model.hidden_size=16", "model.intermediate_size=16", "model.num_hidden_layers=1",
         "model.num_attention_heads=2", "data.source=builtin", "train.context=16",
         "train.max_steps=1000", "output.eval_tokens=16", "diloco.sync_every=8"]  # fmt: skip


@pytest.fixture
def waiting_worker(serve, start, tmp_path):
    """waiting_worker(mode, fault): a server, a process of worker.py whose push waits for a Peer
    that never pushes, or meets a fault on its way, and that Peer."""

    def run(mode, fault=None):
        server = serve("--worker-timeout", 600)
        gate = Gate(server)
        settings = [*SMALL, f"output.dir={tmp_path / 'out'}"]
        settings += [f"diloco.{name}={value}" for name, value in mode.items()]
        more = [part for setting in settings for part in ("--set", setting)]
        config = os.path.join(ROOT, "default.yaml")
        a = start("worker.py", config, "--server", gate.address, "--worker-id", "a", *more)
        server.wait_for("saved .*checkpoint-0")
        tensors = load_file(tmp_path / "model" / "checkpoint-0" / "model.safetensors")
        manifest = [[name, "F32", list(tensor.shape)] for name, tensor in tensors.items()]
        size = sum(tensor.numel() for tensor in tensors.values())
        gate.pushes += [fault] * 4
        b = Peer(server, "b", torch.zeros(size), manifest, fragments=mode["num_fragments"])
        b.join(sync_every=mode["sync_every"], source=status(server)["source"])
        if fault:
            until(lambda: fault in gate.met, fault)
        else:
            until(lambda: any(f["pushes"] for f in status(server)["fragments"]), "a's push")
        return server, a, b

    return run


@both_modes
def test_a_worker_leaves_at_ctrl_c_while_it_waits_and_its_push_counts(
    waiting_worker, tmp_path, mode
):
    server, a, b = waiting_worker(mode)
    k = next(k for k, f in enumerate(status(server)["fragments"]) if f["pushes"])
    version = status(server)["fragments"][k]["version"]
    a.signal(signal.SIGINT)
    assert a.wait() == 128 + signal.SIGINT
    assert "stopping after this step" in a.output and "saved" in a.output
    until(lambda: [w["id"] for w in status(server)["workers"]] == ["b"], "a has left")
    b.pull(k, 0)
    if b.versions[k].number == version:
        b.push(k=k)
    line = round_line(tmp_path, version + 1, k)
    assert "a" in line["losses"] and line["steps"] > 0


def test_a_second_ctrl_c_ends_a_worker_at_once(waiting_worker):
    """Its push is stuck on the way, and the first one gives it some seconds to arrive."""
    server, a, _ = waiting_worker(FULL, "stalled")
    a.signal(signal.SIGINT)
    a.wait_for("stopping after this step; once more stops at once")
    a.signal(signal.SIGINT)
    assert a.wait() == 128 + signal.SIGINT
    server.wait_for("a leaves: interrupted")
    assert "saved" not in a.output and "Traceback" not in a.output


# --- Memory and threads -------------------------------------------------------------------------


def resources(process):
    """(resident megabytes, threads, open files) of a process."""
    folder = f"/proc/{process.process.pid}"
    with open(f"{folder}/status") as file:
        said = dict(line.split(":", 1) for line in file)
    return (
        int(said["VmRSS"].split()[0]) / 1e3,
        int(said["Threads"]),
        len(os.listdir(f"{folder}/fd")),
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_memory_and_threads_stay_flat(serve):
    """Each after a tenth of it as a warm-up."""
    server = serve(*ADD_ONE, "--save-every", 0)
    a = Peer(server, "a", torch.zeros(17), manifest=[["w", "F32", [17]]]).join()

    def push(count, _):
        for _ in range(count):
            a.push(-torch.ones(17))

    def join(count, begin):
        for number in range(begin, begin + count):
            manifest = protocol.manifest_to_json(a.manifest)
            Peer(server, f"guest-{number}", torch.zeros(17), manifest).join().leave()

    def garbage(count, begin):
        for number in range(begin, begin + count):
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall([b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8, b"{" * 99][number % 3])
                if number % 2:
                    sock.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionResetError):
                        while sock.recv(1 << 16):
                            pass

    for act, count in ((push, 1000), (join, 200), (garbage, 400)):
        act(count // 10, 0)
        before = resources(server)
        act(count - count // 10, count // 10)
        most = [before[0] + 20, before[1] + 5, before[2] + 5]
        until(
            lambda most=most: all(map(operator.le, resources(server), most)),
            f"{act.__name__}: no more memory, threads and files than {most}",
        )
    assert set(a.params.tolist()) == {1000.0}


if __name__ == "__main__":
    main()
