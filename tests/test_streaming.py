"""Fragments that travel while training goes on: numbers, timeline, joining, faults.

python -m pytest tests/test_streaming.py
"""

import contextlib
import json
import signal
import socket
import struct
import threading
from fractions import Fraction

import pytest
import torch
from conftest import digest_of, result, status, until

import protocol
from diloco_callback import DiLoCoWorker

PLAIN = ["--upload-codec", "fp32", "--download-codec", "fp32", "--no-momentum-warmup"]


class Line(torch.nn.Module):
    """Eight numbers; its loss makes every SGD step of lr 1 add `gain` to each."""

    def __init__(self, gain):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.gain = gain

    def step(self, optimizer):
        optimizer.zero_grad()
        (self.weight * -self.gain).sum().backward()
        optimizer.step()


class Trainer(threading.Thread):
    """A worker that takes as many steps as it is told to, and notes its numbers after each."""

    def __init__(self, server, name, gain, **options):
        super().__init__(daemon=True)
        self.model, self.error = Line(gain), None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.worker = DiLoCoWorker(
            self.model, self.optimizer, server.address, worker_id=name, **options
        )
        self.trail = []
        self.allowed = threading.Semaphore(0)
        self.total = 0
        self.start()

    def allow(self, steps):
        self.total += steps
        self.allowed.release(steps)

    def finish(self, steps):
        """Let it take its last steps."""
        self.last = self.total + steps
        self.allow(steps)

    def run(self):
        try:
            with self.worker:
                while len(self.trail) != getattr(self, "last", -1):
                    if not self.allowed.acquire(timeout=0.05):
                        continue
                    self.model.step(self.optimizer)
                    self.trail.append(self.model.weight.tolist())
        except BaseException as error:
            self.error = error

    def result(self):
        """Its numbers at the end, with all threads gone."""
        self.join(60)
        assert not self.is_alive(), "still running"
        if self.error:
            raise self.error
        return self.model.weight.tolist()


def simulate(gains, steps, sync_every, count, delay, update, alpha, lr, momentum, nesterov=True):
    """The same run worked out in exact fractions, one number a fragment: for each worker the list
    of its fragments' values after every step, and what all end with."""
    half = [Fraction(gain) for gain in gains]
    local = [[Fraction(0)] * count for _ in gains]
    anchor, velocity = [Fraction(0)] * count, [Fraction(0)] * count
    flights = {}  # fragment -> (adopted at, values at the push, values that training went on from)
    trails = [[] for _ in gains]

    def outer(k, values, plain=False):
        mean = sum(anchor[k] - value for value in values) / len(values)
        if plain:
            anchor[k] -= mean
            return
        velocity[k] = momentum * velocity[k] + mean
        anchor[k] -= lr * (mean + momentum * velocity[k] if nesterov else velocity[k])

    def foreseen(k, value):
        own = anchor[k] - value
        ahead = momentum * velocity[k] + own
        return anchor[k] - lr * (own + momentum * ahead if nesterov else ahead)

    def adopt(k):
        _, pushed, before = flights.pop(k)
        outer(k, pushed)
        for i in range(len(gains)):
            if update == "mix" and delay:
                local[i][k] = alpha * local[i][k] + (1 - alpha) * anchor[k]
            else:
                local[i][k] = anchor[k] + local[i][k] - before[i]

    for step in range(1, steps + 1):
        for i, gain in enumerate(half):
            local[i] = [value + gain for value in local[i]]
        for k in [k for k in flights if flights[k][0] == step]:
            adopt(k)
        for k in range(count):
            if (k + 1) * sync_every // count == (step - 1) % sync_every + 1:
                pushed = before = [values[k] for values in local]
                if update == "predict" and delay:
                    before = [foreseen(k, value) for value in pushed]
                    for i, value in enumerate(before):
                        local[i][k] = value
                flights[k] = (step + delay, pushed, before)
                if delay == 0:
                    adopt(k)
        for i in range(len(gains)):
            trails[i].append(list(local[i]))
    for k in list(flights):
        adopt(k)
    for k in range(count):
        if any(anchor[k] != values[k] for values in local):
            outer(k, [values[k] for values in local], plain=True)
    return trails, anchor


def rounds(folder):
    """The lines of rounds.jsonl."""
    return [json.loads(t) for t in (folder / "model" / "rounds.jsonl").read_text().splitlines()]


def spread(values):
    """Values of fragments as the eight numbers of a Line."""
    return [float(value) for value in values] * (8 // len(values))


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
    trainers = [Trainer(server, f"w{i}", gain, **options) for i, gain in enumerate(gains)]
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
    trainers = [Trainer(server, "a", 1.0, **options), Trainer(server, "b", 0.5, **options)]
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
        Trainer(server, name, gain, sync_every=4, num_fragments=2, fragment_update="rebase")
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
    trainer = Trainer(
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
    lines = rounds(tmp_path)
    pushes = [(line["fragment"], line["steps"]) for line in lines if not line["closing"]]
    assert pushes == [(0, 125), (1, 250), (2, 375), (3, 500), (0, 500)]


@pytest.mark.parametrize("delay", [1, 8])
@pytest.mark.parametrize("phase", range(8))
def test_joining_at_each_phase_of_a_cycle(serve, tmp_path, delay, phase):
    """A third worker joins after each number of steps within a cycle. It pushes with the others
    from then on, and nobody waits for ever."""
    options = dict(sync_every=8, num_fragments=4, fragment_sync_delay=delay)
    server = serve("-n", 2, *PLAIN, "--worker-timeout", 1)  # so heartbeats come every 0.25 s
    trainers = [Trainer(server, name, 0.5, **options) for name in "ab"]
    for trainer in trainers:
        trainer.allow(8 + phase)
    for trainer in trainers:
        until(lambda t=trainer: len(t.trail) == 8 + phase or t.error, "the steps")
    until(
        lambda: [w["position"] for w in status(server)["workers"]] == [phase, phase], "heartbeats"
    )
    trainers.append(Trainer(server, "c", 0.5, **options))
    until(lambda: len(status(server)["workers"]) == 3, "a member more")
    for trainer in trainers:
        trainer.finish(19)
    ends = [trainer.result() for trainer in trainers]
    assert ends[0] == ends[1] == ends[2]
    joined = [line for line in rounds(tmp_path) if "c" in line["members"]]
    assert all(set(line["losses"]) >= set(line["members"]) for line in joined)
    assert sum(set(line["losses"]) == {"a", "b", "c"} for line in joined) > 8


class Cutter(threading.Thread):
    """A TCP relay that cuts the connection on which a push of `fragment` has come, whole, `times`
    times, before the server hears of it or after."""

    def __init__(self, server, fragment, times):
        super().__init__(daemon=True)
        self.target, self.fragment, self.times, self.cuts = server.port, fragment, times, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self):
        while True:
            client, _ = self.listener.accept()
            upstream = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self.requests, args=[client, upstream], daemon=True).start()
            threading.Thread(target=self.replies, args=[upstream, client], daemon=True).start()

    def requests(self, client, upstream):
        with contextlib.suppress(OSError), client, upstream, client.makefile("rb") as stream:
            while start := stream.read(8):
                raw = stream.read(struct.unpack("<Q", start)[0])
                fields, specs = protocol.parse_header(raw)
                payload = stream.read(protocol.payload_bytes(specs))
                chosen = fields["type"] == "push" and fields["fragment"] == self.fragment
                if chosen and self.cuts < self.times:
                    self.cuts += 1
                    if self.cuts % 2 == 0:  # this time the server gets it
                        upstream.sendall(start + raw + payload)
                    upstream.shutdown(socket.SHUT_RDWR)
                    client.shutdown(socket.SHUT_RDWR)
                    return
                upstream.sendall(start + raw + payload)
            upstream.shutdown(socket.SHUT_WR)

    @staticmethod
    def replies(upstream, client):
        with contextlib.suppress(OSError):
            while data := upstream.recv(1 << 16):
                client.sendall(data)


@pytest.mark.parametrize("delay", [0, 2, 8])
def test_a_push_of_one_fragment_that_fails_twice_counts_once(serve, delay):
    server = serve("-n", 2, *PLAIN, "--outer-lr", 0.5, "--outer-momentum", 0.5)
    cutter = Cutter(server, fragment=2, times=2)
    options = dict(sync_every=8, num_fragments=4, fragment_sync_delay=delay)
    trainers = [Trainer(cutter, "a", 1.0, **options), Trainer(server, "b", 0.5, **options)]
    for trainer in trainers:
        trainer.finish(20)
    ends = [trainer.result() for trainer in trainers]
    _, end = simulate((1.0, 0.5), 20, 8, 4, delay, "rebase", 0, Fraction(1, 2), Fraction(1, 2))
    assert cutter.cuts == 2
    assert ends == [spread(end)] * 2


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
    model = Line(1.0)
    with pytest.raises(ValueError, match=words):
        DiLoCoWorker(model, torch.optim.SGD(model.parameters(), lr=1.0), "localhost:1", **options)


def test_a_stop_in_the_middle_leaves_whole_slices(serve):
    """The other worker never pushes, so a push is under way when the exception comes."""
    server = serve("-n", 2, *PLAIN)
    before = set(threading.enumerate())
    other = Trainer(server, "b", 1.0, sync_every=4, num_fragments=2)
    model = Line(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with (
        pytest.raises(RuntimeError, match="enough"),
        DiLoCoWorker(model, optimizer, server.address, 4, "a", num_fragments=2),
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
    model = Line(1.0)
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
