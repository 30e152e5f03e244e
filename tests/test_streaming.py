"""Fragments that travel while training goes on: numbers, timeline, joining, faults.

python -m pytest tests/test_streaming.py

The workers are Counters, whose numbers can be worked out by `simulate` and by hand.
"""

import signal
import threading
from fractions import Fraction

import pytest
import torch
from conftest import digest_of, result, status, until
from peers import Counter, Gate, Numbers, rounds, simulate, spread

import protocol
from diloco_callback import DiLoCoWorker, Slice
from protocol import Version

PLAIN = ["--upload-codec", "fp32", "--download-codec", "fp32", "--no-momentum-warmup"]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("delay", [0, 1, None], ids=["delay-0", "delay-1", "delay-interval"])
@pytest.mark.parametrize(
    ("update", "alpha"),
    [("rebase", 0.5), ("mix", 0.0), ("mix", 0.5), ("mix", 1.0), ("predict", 0.5)],
)
def test_numbers_worked_out_in_fractions(serve, count, delay, update, alpha):
    # With Nesterov a prediction divides by 1 + momentum, which is no fraction of a power of two.
    nesterov = update != "predict"
    plain = [*PLAIN, *([] if nesterov else ["--no-nesterov"])]
    server = serve("-n", 2, *plain, "--outer-lr", 0.5, "--outer-momentum", 0.5)
    steps, sync_every, gains = 21, 8, (1.0, 0.5)
    delay = sync_every // count if delay is None else delay
    options = dict(
        sync_every=sync_every,
        num_fragments=count,
        fragment_sync_delay=delay,
        fragment_update=update,
        fragment_update_alpha=alpha,
    )
    trainers = [Counter(server, f"w{i}", gain, **options) for i, gain in enumerate(gains)]
    for trainer in trainers:
        trainer.finish(steps)
    ends = [trainer.result() for trainer in trainers]
    trails, end = simulate(
        gains,
        steps,
        sync_every,
        count,
        delay,
        update,
        Fraction(alpha),
        Fraction(1, 2),
        Fraction(1, 2),
        nesterov,
    )
    for trainer, expected in zip(trainers, trails, strict=True):
        for step, (got, want) in enumerate(zip(trainer.trail, expected, strict=True), 1):
            assert got == spread(want), f"step {step}"
    assert ends == [spread(end)] * 2


def test_a_prediction_with_nesterov_is_as_exact_as_float32(serve):
    server = serve("-n", 2, *PLAIN, "--outer-lr", 0.7, "--outer-momentum", 0.9)
    options = dict(sync_every=8, num_fragments=4, fragment_update="predict")
    trainers = [Counter(server, "a", 1.0, **options), Counter(server, "b", 0.5, **options)]
    for trainer in trainers:
        trainer.finish(61)
    ends = [trainer.result() for trainer in trainers]
    trails, end = simulate((1.0, 0.5), 61, 8, 4, 2, "predict", 0, Fraction(7, 10), Fraction(9, 10))
    for trainer, expected in zip(trainers, trails, strict=True):
        for got, want in zip(trainer.trail, expected, strict=True):
            assert got == pytest.approx(spread(want), rel=1e-5)
    assert ends[0] == ends[1] == pytest.approx(spread(end), rel=1e-5)


def test_steps_since_the_push_are_kept(serve):
    """Worked out by hand: two fragments, pushed at steps 2 and 4 of each cycle, adopted 2 later."""
    server = serve("-n", 2, *PLAIN, "--outer-lr", 1, "--outer-momentum", 0)
    trainers = [
        Counter(server, name, gain, sync_every=4, num_fragments=2, fragment_update="rebase")
        for name, gain in (("a", 1.0), ("b", 3.0))
    ]
    for trainer in trainers:
        trainer.finish(6)
    ends = [trainer.result() for trainer in trainers]
    first = [[row[0] for row in trainer.trail] for trainer in trainers]
    second = [[row[7] for row in trainer.trail] for trainer in trainers]
    # Fragment 0: pushed at 2 with values 2 and 6, mean 4. At 4 the locals are 4 and 12, of which 2
    # and 6 came after the push: 4 + 2 and 4 + 6. A system that overwrites would show 4 and 4.
    assert first == [[1, 2, 3, 6, 7, 8], [3, 6, 9, 10, 13, 16]]
    # Fragment 1: pushed at 4 with 4 and 12, mean 8; at 6 it is 8 + 2 and 8 + 6.
    assert second == [[1, 2, 3, 4, 5, 10], [3, 6, 9, 12, 15, 14]]
    # Fragment 0 was pushed again at 6 with 8 and 16, mean 12, and nothing came after it. Fragment 1
    # closes with 10 and 14, mean 12.
    assert ends == [[12.0] * 8] * 2


def test_the_documented_timeline(serve, tmp_path):
    """sync_every 500, four fragments: which is pushed and adopted when, seen from outside. With an
    outer lr of 1 and one worker, whose steps add 1, adoption changes nothing but under `mix` with
    alpha 0, where the slice falls back to its value at the push, 125 steps before."""
    server = serve("-n", 1, *PLAIN, "--outer-lr", 1, "--outer-momentum", 0)
    trainer = Counter(
        server,
        "w",
        1.0,
        sync_every=500,
        num_fragments=4,
        fragment_update="mix",
        fragment_update_alpha=0.0,
    )
    trainer.finish(700)
    trainer.result()
    drops = []
    for step, (before, after) in enumerate(zip(trainer.trail, trainer.trail[1:], strict=False), 2):
        for k in range(4):
            if after[k] < before[k]:
                drops.append((step, k, after[k] - before[k]))
    # Taking step `s` adds 1, then adoption goes back by 125: a net of -124.
    assert drops == [(250, 0, -124), (375, 1, -124), (500, 2, -124), (625, 3, -124)]
    lines = rounds(tmp_path / "model")
    pushes = [(line["fragment"], line["steps"]) for line in lines if not line["closing"]]
    assert pushes == [(0, 125), (1, 250), (2, 375), (3, 500), (0, 500)]


@pytest.mark.parametrize(("delay", "phase"), [(1, 0), (1, 3), (8, 4), (8, 7)])
def test_joining_at_each_phase_of_a_cycle(serve, tmp_path, delay, phase):
    """A third worker joins after each number of steps within a cycle. It pushes with the others
    from then on, and nobody waits for ever."""
    options = dict(sync_every=8, num_fragments=4, fragment_sync_delay=delay)
    server = serve("-n", 2, *PLAIN, "--worker-timeout", 1)  # so heartbeats come every 0.25 s
    trainers = [Counter(server, name, 0.5, **options) for name in "ab"]
    for trainer in trainers:
        trainer.step(8 + phase)
    for trainer in trainers:
        trainer.stepped()
    until(
        lambda: [w["position"] for w in status(server)["workers"]] == [phase, phase], "heartbeats"
    )
    trainers.append(Counter(server, "c", 0.5, **options))
    until(lambda: len(status(server)["workers"]) == 3, "a member more")
    for trainer in trainers:
        trainer.finish(19)
    ends = [trainer.result() for trainer in trainers]
    assert ends[0] == ends[1] == ends[2]
    joined = [line for line in rounds(tmp_path / "model") if "c" in line["members"]]
    assert all(set(line["losses"]) >= set(line["members"]) for line in joined)
    assert sum(set(line["losses"]) == {"a", "b", "c"} for line in joined) > 8


@pytest.mark.parametrize("delay", [0, 8])
def test_a_push_of_one_fragment_that_fails_twice_counts_once(serve, delay):
    server = serve("-n", 2, *PLAIN, "--outer-lr", 0.5, "--outer-momentum", 0.5)
    gate = Gate(server, slice=2)
    gate.pushes += ["lost", "no reply"]
    options = dict(sync_every=8, num_fragments=4, fragment_sync_delay=delay)
    trainers = [Counter(gate, "a", 1.0, **options), Counter(server, "b", 0.5, **options)]
    for trainer in trainers:
        trainer.finish(20)
    ends = [trainer.result() for trainer in trainers]
    _, end = simulate((1.0, 0.5), 20, 8, 4, delay, "rebase", 0, Fraction(1, 2), Fraction(1, 2))
    assert gate.met == ["lost", "no reply"]
    assert ends == [spread(end)] * 2


@pytest.mark.parametrize("step", [5, 8], ids=["closing", "next-push"])
def test_an_entry_that_comes_just_before_the_next_push_is_adopted_first(serve, capsys, step):
    """The push of step 4 is on its way, and what is on top of it is not: whoever sends the slice again
    before it has moved on top of the entry sends wrong numbers."""
    server = serve("-n", 1, *PLAIN, "--outer-lr", 1, "--outer-momentum", 0)
    model = Numbers(1, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = dict(num_fragments=1, fragment_sync_delay=4, fragment_update="rebase")
    with DiLoCoWorker(model, optimizer, server.address, 4, "w", **options) as worker:
        owner, name = {5: (worker.watch, "heed_moved"), 8: (worker.schedule, "tick")}[step]
        replica, lock, call = worker.replica, worker.slices[0].lock, getattr(owner, name)
        adopt = worker.leader.adopt

        def adopt_behind_it(k):
            until(lambda: replica.outbox.upload() is None, "all that is to be sent has arrived")
            adopt(k)

        worker.leader.adopt = adopt_behind_it

        def listed_first(*args):
            setattr(owner, name, call)
            lock.release()
            until(lambda: replica.listed, "an entry lists the push")
            return call(*args)

        for number in range(1, step + 1):
            if number == 4:
                lock.acquire()  # the push is not sent
            if number == step == 8:  # training has gone on without an answer
                replica.outbox.places[0].pending.late = True
                setattr(owner, name, listed_first)
            model.step(optimizer)
        if step == 5:
            setattr(owner, name, listed_first)
        worker.flush()
        anchor = worker.slices[0].anchor
    assert model.weight.tolist() == anchor.tolist() == [step] * 8
    assert "have moved" not in capsys.readouterr().err


def test_settings_that_differ_are_refused_with_both_values(serve, toy):
    server = serve("-n", 2)
    first = toy(server, "a", num_fragments=4, sync_every=8)
    until(lambda: status(server)["joining"] == ["a"], "a waits")
    other = toy(server, "b", num_fragments=2, sync_every=8)
    assert other.wait() == 3
    assert "num_fragments is 2 here and 4 in 'a' on" in other.output
    other = toy(server, "b", num_fragments=4, sync_every=16)
    assert other.wait() == 3
    assert "sync_every is 16 here and 8 in 'a' on" in other.output
    toy(server, "b", num_fragments=4, sync_every=8)
    assert result(first)["metrics"]["diloco/num_fragments"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(sync_every=3, num_fragments=4), "between 1 and sync_every"),
        (dict(sync_every=8, fragment_sync_delay=9), "fragment_sync_delay must be within"),
        (dict(fragment_update="overwrite"), "rebase or mix"),
        (dict(fragment_update="mix", fragment_update_alpha=2), "fragment_update_alpha"),
    ],
)
def test_settings_that_make_no_sense(options, words):
    model = Numbers(1.0)
    with pytest.raises(ValueError, match=words):
        DiLoCoWorker(model, torch.optim.SGD(model.parameters(), lr=1.0), "localhost:1", **options)


def test_a_stop_in_the_middle_leaves_whole_slices(serve):
    """The other worker never pushes, so a push is under way when the exception comes."""
    server = serve("-n", 2, *PLAIN)
    before = set(threading.enumerate())
    other = Counter(server, "b", 1.0, sync_every=4, num_fragments=2)
    model = Numbers(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with (
        pytest.raises(RuntimeError, match="enough"),
        DiLoCoWorker(
            model, optimizer, server.address, 4, "a", num_fragments=2, fragment_update="rebase"
        ),
    ):
        for _ in range(3):
            model.step(optimizer)
        raise RuntimeError("enough")
    assert model.weight.tolist() == [3.0] * 8
    assert [w["id"] for w in status(server)["workers"]] == ["b"]
    other.finish(5)
    other.result()
    until(lambda: set(threading.enumerate()) <= before, "threads gone")


def test_a_gradient_that_is_not_finite_costs_its_steps_only(serve, toy):
    server = serve("-n", 2)
    options = dict(num_fragments=4, sync_every=8, steps=60)
    bad = toy(server, "a", nan_at="21", **options)
    good = toy(server, "b", seed=1, **options)
    one, two = result(bad), result(good)
    assert one["digest"] == two["digest"]
    assert one["metrics"]["diloco/dropped_steps"] > 0 == two["metrics"]["diloco/dropped_steps"]


@pytest.mark.parametrize("delay", [0, 2])
def test_server_killed_and_started_again(serve, toy, tmp_path, delay):
    options = dict(num_fragments=4, sync_every=8, steps=150, pause=0.02, fragment_sync_delay=delay)
    server = serve("-n", 2, "--save-every", 2)
    workers = [toy(server, name, seed=k, **options) for k, name in enumerate("ab")]
    server.wait_for("saved .*checkpoint-4")
    server.kill()
    again = serve("-n", 2, "--save-every", 2, "--port", server.port)
    again.wait_for("continuing from .*checkpoint-")
    one, two = (result(worker) for worker in workers)
    assert one["digest"] == two["digest"] and one["version"] == two["version"]
    assert one["step"] == two["step"] == 150


def test_a_worker_that_is_given_up_joins_again(serve, toy, tmp_path):
    server = serve("-n", 2, "--worker-timeout", 1)
    options = dict(num_fragments=4, sync_every=8, steps=200, pause=0.02)
    workers = [toy(server, name, seed=k, **options) for k, name in enumerate("ab")]
    until(lambda: status(server)["round"] >= 2, "rounds")
    workers[0].signal(signal.SIGSTOP)
    server.wait_for("a is gone")
    reached = status(server)["round"]
    until(lambda: status(server)["round"] >= reached + 2, "the other goes on alone")
    workers[0].signal(signal.SIGCONT)
    late, _ = result(workers[0]), result(workers[1])
    server.wait_for("the model of round")
    assert late["digest"] == digest_of(tmp_path / "model")


def test_global_model_is_swapped_in_and_out(serve):
    server = serve("-n", 1, *PLAIN, "--outer-lr", 0.5, "--outer-momentum", 0)
    model = Numbers(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with DiLoCoWorker(model, optimizer, server.address, 4, "a", num_fragments=2) as worker:
        for _ in range(4):
            model.step(optimizer)
        local = model.weight.tolist()
        with worker.global_model():
            # Fragment 0 went out with 2 and came back half; fragment 1 has just been pushed.
            assert model.weight.tolist()[::2] == [1.0] * 4
        assert model.weight.tolist() == local


def test_momentum_and_version_belong_to_the_slice_and_survive(serve, toy, tmp_path):
    server = serve("-n", 1, "--until-done")
    first = result(toy(server, "a", num_fragments=3, sync_every=7, steps=50))
    assert server.wait() == 0
    again = serve("-n", 1, "--until-done")
    assert "round 8" in again.wait_for("continuing from .*")[0]
    refused = toy(again, "a", num_fragments=2, sync_every=7, steps=7)
    assert (
        refused.wait() == 3 and "num_fragments is 2 here and 3 in the run so far" in refused.output
    )
    second = result(toy(again, "a", num_fragments=3, sync_every=7, steps=7))
    assert second["version"][1] > first["version"][1]


def test_a_checkpoint_whose_fragments_have_other_elements_is_not_resumed(capsys):
    """As one of protocol version 5, whose fragments were every fourth element and no stripes."""
    model, version = Numbers(1.0, size=4096), Version("0123456789abcdef0123", 3)
    place = {"version": list(version), "seq": 1, "steps": 2, "in_flight": False}

    def begun(count, **more):
        kept = {f"residual.{k}": torch.ones(4096 // count) for k in range(count)}
        state = {"run": "r", "fragments": [place] * count, "residual": kept, **more}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        worker = DiLoCoWorker(model, optimizer, "h:1", 8, num_fragments=count, state=state)
        flats = [protocol.FlatModel([model.weight], k, count) for k in range(count)]
        bf16 = protocol.CODECS["bf16"]
        worker.replica.slices = [Slice(flat, bf16, bf16, has_residual=True) for flat in flats]
        worker.leader.admission.load_residual()
        kept = {slice.residual.mean().item() for slice in worker.slices}
        return worker.leader.admission.resumable(), kept, worker.state_dict()["stripe"]

    assert begun(4, stripe=16) == ([version] * 4, {1.0}, 16)
    assert "no residual" not in capsys.readouterr().err
    assert begun(4) == ([], {0.0}, 16)
    assert "other fragments" in capsys.readouterr().err
    assert begun(1) == ([version], {1.0}, 4096)


def test_a_checkpoint_is_of_a_whole_cycle_and_written_once(serve, toy):
    server = serve("-n", 1, "--save-every", 2, "--until-done")
    result(toy(server, "a", num_fragments=4, sync_every=8, steps=48, pause=0.02))
    assert server.wait() == 0
    saved = [int(line.rsplit("-", 1)[1]) for line in server.lines if " saved " in line]
    assert saved == [0, 2, 4, 6, 7], saved


def test_status_shows_the_fragments(serve, toy, start):
    server = serve("-n", 2)
    options = dict(num_fragments=4, sync_every=8, steps=10**6, pause=0.001)
    for name in "ab":
        toy(server, name, **options)
    until(lambda: status(server)["round"] >= 2, "rounds")
    said = status(server)
    assert said["mode"] == "streaming" and len(said["fragments"]) == 4
    shown = start("status.py", "--server", server.address)
    assert shown.wait() == 0 and "fragments" in shown.output
