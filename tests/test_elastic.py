"""Workers come and go, lines are cut, the server dies: nothing is lost, and nothing counts twice.

python -m pytest tests/test_elastic.py

Most tests count. A step adds 1 (or the worker's `gain`) to every number of the model; there is no
momentum, nothing is rounded, and the outer learning rate is the number of workers, so the global
numbers are the sum of all steps that were folded: with gains of 1 and 1000 one number tells how
many of each worker are in it. A `Counter` is a worker in the test's process, which steps when it is
told to; this file run as a script is one in a process of its own, to be killed. A `Gate` is a relay
before the server, which cuts, stalls and slows connections at chosen frames.
"""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from fractions import Fraction

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from conftest import DEADLINE, ROOT, result, status, until
from safetensors.torch import load_file
from test_server import Peer, ask, join_all
from test_streaming import Line, simulate, spread

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
ADD_ONE, ADD_TWO = [*PLAIN, "--outer-lr", 1], [*PLAIN, "--outer-lr", 2, "-n", 2]
SOON = ["--worker-timeout", 1]  # heartbeats come every 0.25 s


# --- Workers ------------------------------------------------------------------------------------


class Quit(Exception):
    """Ends a Counter where the test does."""


class Counter(threading.Thread):
    """A worker that takes as many steps as it is told to."""

    def __init__(self, server, name, gain=A, size=8, kind=DiLoCoWorker, **options):
        super().__init__(daemon=True)
        self.gain, self.model = gain, Line(gain)
        self.model.weight = torch.nn.Parameter(torch.zeros(size))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.worker = kind(
            self.model, self.optimizer, server.address, worker_id=name,
            **{"reconnect_timeout": 60.0, **options},
        )  # fmt: skip
        self.steps, self.total, self.last, self.error = 0, 0, None, None
        self.allowed, self.quits = threading.Semaphore(0), threading.Event()
        self.start()

    def step(self, count):
        """Allow so many steps more. Gives the Counter."""
        self.total += count
        if count:
            self.allowed.release(count)
        return self

    def finish(self, count):
        """Allow the last ones."""
        self.last = self.total + count
        return self.step(count)

    def run(self):
        try:
            with self.worker:
                while self.steps != self.last:
                    if self.allowed.acquire(timeout=0.02):
                        self.model.step(self.optimizer)
                        self.steps += 1
                    if self.quits.is_set():
                        raise Quit
        except BaseException as error:
            self.error = error

    def quit(self):
        self.quits.set()
        self.worker.part(0)
        if not self.worker.fragments:
            self.worker.closed.set()

    def stepped(self):
        """Wait until it has taken all steps that it was allowed."""
        until(lambda: self.steps == self.total or self.error, f"steps of {self.worker.worker_id}")
        assert self.error is None, repr(self.error)
        return self

    @property
    def joined(self):
        return self.worker.heart is not None

    def waits(self):
        """Wait until its push has arrived and it waits for others."""
        until(lambda: any(f.flight and f.flight.arrived for f in self.worker.fragments), "a wait")
        return self

    @property
    def local(self):
        return self.model.weight.tolist()

    @property
    def anchor(self):
        """The global numbers, as far as it has adopted them."""
        numbers = torch.zeros(self.model.weight.numel())
        for k, fragment in enumerate(self.worker.fragments):
            protocol.fragment_of(numbers, k, len(self.worker.fragments)).copy_(fragment.anchor)
        return numbers.tolist()

    @property
    def versions(self):
        return [fragment.version for fragment in self.worker.fragments]

    def result(self):
        """Its numbers at the end."""
        self.join(DEADLINE)
        assert not self.is_alive(), "still running"
        if self.error:
            raise self.error
        return self.local


@pytest.fixture
def count(serve):
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


def pair(count, server, mode, gate=None, **options):
    """Two Counters that have joined: a adds 1 a step, and b, which may be behind a gate, 1000."""
    a = count(server, "a", A, **mode, **options)
    b = count(gate or server, "b", B, **mode, **options)
    until(lambda: a.joined and b.joined, "both have joined")
    return a, b


def steps_in(value):
    """How many steps of a and of b are in a number of the sum."""
    assert value == int(value)
    return int(value) % 1000, int(value) // 1000


def drive(a, b, condition):
    """Step both, as far as they do not wait for each other, until `condition()` while both rest."""
    for _ in range(400):
        resting = [c for c in (a, b) if c.steps == c.total]
        if len(resting) == 2 and condition():
            return
        flying = [c for c in resting if any(f.flight for f in c.worker.fragments)]
        for counter in flying or resting:
            counter.step(1)
        time.sleep(0.05)  # where one of them still is under way, it may need a step of the other
        assert not (a.error or b.error), (a.error, b.error)
    pytest.fail(f"steps {a.steps}, {b.steps}, versions {a.versions}, {b.versions}")


def settle(a, b):
    """Step both until nothing is under way and both have the same versions, then check that every
    step of each is in the global numbers once, or is local still."""
    drive(
        a,
        b,
        lambda: (
            a.versions == b.versions
            and not any(f.flight for c in (a, b) for f in c.worker.fragments)
        ),
    )
    assert a.anchor == b.anchor
    for value, of_a, of_b in zip(a.anchor, a.local, b.local, strict=True):
        in_a, in_b = steps_in(value)
        assert of_a == value + A * (a.steps - in_a), f"{a.steps} steps of a: {value}, {of_a}"
        assert of_b == value + B * (b.steps - in_b), f"{b.steps} steps of b: {value}, {of_b}"


def lines_of(folder, fragment=0):
    """The lines of rounds.jsonl on a fragment."""
    path = folder / "model" / "rounds.jsonl"
    lines = [json.loads(t) for t in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["fragment"] == fragment]


def round_line(folder, number, fragment=0):
    """The line of one round, once it is written."""
    lines = until(
        lambda: [x for x in lines_of(folder, fragment) if x["round"] == number],
        f"round {number} in rounds.jsonl",
        10,
    )
    return lines[0]


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
    model, state = Line(own["gain"]), None
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


# --- The network --------------------------------------------------------------------------------


class Gate(threading.Thread):
    """A relay before a server. `faults` are what becomes of the next pushes that carry numbers, one
    each (None: nothing):

    "lost": cut before the server hears of it. "half": cut in the middle of its payload.
    "no reply": cut when the reply comes. "half a reply": cut in the middle of that.
    "gone": cut when the reply comes, with all other lines; then nobody gets through.
    "stalled": half of it is passed on, and no more. "slow": it and its reply are passed on slowly.
    """

    def __init__(self, server):
        super().__init__(daemon=True)
        self.port, self.open = server.port, True
        self.faults, self.met, self.pushes = collections.deque(), [], []
        self.lines, self.lock = set(), threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self):
        while True:
            near, _ = self.listener.accept()
            try:
                if not self.open:
                    raise ConnectionError
                far = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                near.close()
                continue
            line = {"near": near, "far": far, "fault": None}
            with self.lock:
                self.lines.add((near, far))
            for carry in (self.up, self.down):
                threading.Thread(target=carry, args=[line], daemon=True).start()

    def cut(self):
        """Cut all connections."""
        with self.lock:
            for line in self.lines:
                self.end(*line)
            self.lines.clear()

    def close(self):
        """Cut all, and take no more."""
        self.open = False
        self.cut()

    @staticmethod
    def end(*socks):
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def frame(stream):
        """(header, its bytes with the length, bytes of payload to come) of the next frame."""
        length = stream.read(8)
        raw = stream.read(struct.unpack("<Q", length)[0])
        fields, specs = protocol.parse_header(raw)
        return fields, length + raw, protocol.payload_bytes(specs)

    @staticmethod
    def pass_on(stream, to, size, slow=False):
        while size:
            part = stream.read1(min(size, 1 << 16))
            if not part:
                raise ConnectionError
            size -= len(part)
            to.sendall(part)
            if slow:
                time.sleep(0.035)

    def up(self, line):
        near, far = line["near"], line["far"]
        with contextlib.suppress(OSError, struct.error), near.makefile("rb") as stream:
            while True:
                fields, raw, size = self.frame(stream)
                if fields["type"] == "push" and size:
                    line["fault"] = self.faults.popleft() if self.faults else None
                    self.pushes.append((fields["fragment"], fields["seq"], fields["base"]))
                fault = line["fault"]
                if fault == "lost":
                    self.met.append(fault)
                    break
                far.sendall(raw)
                if fault in ("half", "stalled"):
                    self.pass_on(stream, far, size // 2)
                    self.met.append(fault)
                    while fault == "stalled" and stream.read1(1 << 16):
                        pass
                    break
                self.pass_on(stream, far, size, slow=fault == "slow")
        self.end(near, far)

    def down(self, line):
        near, far = line["near"], line["far"]
        with contextlib.suppress(OSError, struct.error), far.makefile("rb") as stream:
            while True:
                fields, raw, size = self.frame(stream)
                fault = line["fault"] if fields["type"] == "push" else None
                if fault in ("no reply", "gone"):
                    self.met.append(fault)
                    if fault == "gone":
                        self.close()
                    break
                near.sendall(raw)
                if fault == "half a reply":
                    self.pass_on(stream, near, size // 2)
                    self.met.append(fault)
                    break
                self.pass_on(stream, near, size, slow=fault == "slow")
        self.end(near, far)


# --- A worker dies ------------------------------------------------------------------------------


@both_modes
def test_a_push_of_a_killed_worker_that_had_arrived_whole_counts(
    serve, count, process, tmp_path, mode
):
    """kill -9 while it waits for the reply. The rounds after that go on without it."""
    server = serve(*ADD_TWO, *SOON)
    a = process(server, "a", steps=100, **mode)
    b = count(server, "b", B, **mode)
    until(lambda: status(server)["fragments"][:1] == [{"version": 0, "pushes": 1}], "a's push")
    a.kill()
    b.step(first_push(mode) + 1).stepped()
    line = round_line(tmp_path, 1)
    assert line["losses"].keys() == {"a", "b"}
    assert steps_in(b.anchor[0]) == (first_push(mode), first_push(mode))
    b.step(mode["sync_every"]).stepped()
    server.wait_for("a is gone: not heard of for 1 s")
    assert round_line(tmp_path, 2)["losses"].keys() == {"b"}


@both_modes
def test_half_a_push_of_a_killed_worker_leaves_no_trace(serve, count, process, tmp_path, mode):
    server = serve(*PLAIN, "--outer-lr", 1, "-n", 2, *SOON)
    gate = Gate(server)
    gate.faults.append("stalled")
    a = process(gate, "a", steps=100, **mode)
    b = count(server, "b", B, **mode)
    until(lambda: gate.met, "half a push")
    a.kill()
    b.step(first_push(mode) + 1).stepped()
    server.wait_for("a is gone")
    line = round_line(tmp_path, 1)
    assert (line["losses"].keys(), line["steps"]) == ({"b"}, first_push(mode))
    assert steps_in(b.anchor[0]) == (0, first_push(mode))


def test_a_cut_connection_starts_the_clock_and_only_leave_removes_at_once(serve):
    server = serve("-n", 3, "--worker-timeout", 3)
    a, b, _ = join_all(*(Peer(server, name) for name in "abc"))
    b.leave()
    assert [w["id"] for w in status(server)["workers"]] == ["a", "c"]
    threads = f"/proc/{server.process.pid}/task"
    before = len(os.listdir(threads))
    a.close()
    until(lambda: len(os.listdir(threads)) < before, "the server has seen the cut")
    assert [w["id"] for w in status(server)["workers"]] == ["a", "c"]
    server.wait_for("a is gone: not heard of for 3 s")


# --- The same id at once ------------------------------------------------------------------------


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
    server = serve(*ADD_ONE)
    gate = Gate(server)
    a = count(gate, "a", **FULL)
    until(lambda: a.joined, "a has joined")
    for cut in (False, True):
        thief = Peer(server, "a")
        if cut:
            gate.cut()
        with pytest.raises(
            Refused, match=r"worker id 'a' is held by a live process on .*127.0.0.1"
        ):
            thief.join()
    other = toy(server, "a")
    assert other.wait() == 3
    assert f"held by a live process on {socket.gethostname()}" in other.output
    a.step(8).stepped()
    assert a.anchor == [8.0] * 8 and a.worker.joins == 1


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


# --- A worker comes late ------------------------------------------------------------------------


@both_modes
def test_a_late_joiner_pushes_with_the_others(serve, count, tmp_path, mode):
    """It comes three steps into the second cycle; the very next push of every fragment is of all."""
    server = serve(*PLAIN, "-n", 2, *SOON)
    a, b = pair(count, server, mode, source="tales")
    for counter in (a, b):
        counter.step(11)
    for counter in (a, b):
        counter.stepped()
    until(lambda: [w["position"] for w in status(server)["workers"]] == [3, 3], "heartbeats")
    c = count(server, "c", **mode, source="tales")
    until(lambda: c.joined and c.worker.wait, "c has joined")
    assert c.worker.index == 2 and c.worker.shares
    left = c.worker.wait  # less than 5 where the server takes the others to have gone on since
    assert 1 <= left <= (5 if mode is FULL else 1)
    for counter in (a, b, c):
        counter.step(left + 7)
    for counter in (a, b, c):
        counter.stepped()
    for k in range(mode["num_fragments"]):
        late = [line for line in lines_of(tmp_path, k) if "c" in line["members"]]
        assert late and all(line["losses"].keys() == {"a", "b", "c"} for line in late)
    assert a.anchor == b.anchor == c.anchor


def test_the_lowest_free_index_and_an_id_that_comes_back_its_own(serve):
    server = serve("-n", 3)
    a, b, c = join_all(*(Peer(server, name) for name in "abc"))
    b.leave(), c.leave()
    c = Peer(server, "c").join()
    d = Peer(server, "d").join()
    assert [peer.reply["index"] for peer in (a, c, d)] == [0, 2, 1]
    b = Peer(server, "b").join()  # another has taken its place
    assert b.reply["index"] == 3


# --- A worker is slow ---------------------------------------------------------------------------


@both_modes
def test_a_round_closes_without_the_slow_one_whose_push_counts_in_the_next(
    serve, count, tmp_path, mode
):
    """a adds 1 and b 3 a step, the outer lr is 1. Worked out by hand for fragment 0."""
    server = serve(*PLAIN, "--outer-lr", 1, "-n", 2, "--round-timeout", 0.3)
    a, b = (count(server, name, gain, **mode) for name, gain in (("a", 1), ("b", 3)))
    first = first_push(mode)
    a.step(first + 1).stepped()
    assert round_line(tmp_path, 1)["losses"].keys() == {"a"}
    assert a.anchor[0] == first
    b.step(first).waits()  # version 0, and version 1 is there
    a.step(mode["sync_every"]).stepped()
    line = round_line(tmp_path, 2)
    assert line["losses"].keys() == {"a", "b"} and line["staleness"] == {"b": 1}
    b.step(1).stepped()
    assert a.anchor[0] == b.anchor[0] == first + (8 + 3 * first) / 2
    assert a.worker.fragments[0].version == b.worker.fragments[0].version
    assert b.worker.dropped_steps == 0


@both_modes
def test_a_push_over_max_staleness_is_dropped_counted_and_the_global_model_taken(
    serve, count, tmp_path, mode
):
    server = serve(*PLAIN, "--outer-lr", 1, "-n", 2, "--round-timeout", 0.3, "--max-staleness", 0)
    a, b = (count(server, name, gain, **mode) for name, gain in (("a", 1), ("b", 3)))
    first = first_push(mode)
    a.step(first + 1).stepped()
    b.step(first + 1).stepped()
    dropped = first if mode is FULL else first + 1  # adopted one step after the push
    assert b.worker.metrics()["diloco/dropped_steps"] == dropped
    assert b.anchor[0] == first and b.local == [v + 3 * (first + 1 - dropped) for v in b.anchor]
    server.wait_for("WARNING: b: .*over --max-staleness")
    a.step(mode["sync_every"] - 1), b.step(mode["sync_every"] - 1)
    a.stepped(), b.stepped()
    settled = round_line(tmp_path, 2)
    assert settled["losses"].keys() == {"a", "b"} and not settled["staleness"]
    assert a.worker.fragments[0].anchor.equal(b.worker.fragments[0].anchor)


# --- Too few workers ----------------------------------------------------------------------------


@both_modes
def test_below_min_workers_rounds_wait_and_status_says_so(serve, count, start, mode):
    server = serve(*ADD_TWO, "--min-workers", 2)
    a, b = pair(count, server, mode)
    b.quit()
    server.wait_for("b leaves")
    a.step(first_push(mode) + 1).waits()
    shown = start("status.py", "--server", server.address)
    assert shown.wait() == 0 and "too few workers" in shown.output
    said = status(server)
    assert (said["state"], said["fragments"][0]) == ("too few workers", {"version": 0, "pushes": 1})
    c = count(server, "c", B, **mode)
    a.stepped()
    assert status(server)["state"] == "running"
    # The joiner's push of this round was empty. The mean of one, twice:
    until(lambda: c.joined, "c has joined")
    assert a.anchor[0] == 2 * first_push(mode)


@pytest.mark.parametrize("delay", [None, 1, 8], ids=["full", "streaming", "streaming-delay-8"])
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


def test_a_worker_that_ends_alone_below_min_workers_does_not_hang_on_a_push_under_way(serve, count):
    """Its training is over one step after it pushed fragment 0, which waits for more workers."""
    server = serve(*ADD_TWO, "--min-workers", 2)
    a, b = pair(count, server, STREAMING)
    b.quit()
    server.wait_for("b leaves")
    a.finish(2)
    a.join(DEADLINE)
    assert not a.is_alive(), status(server)


@both_modes
def test_stop_does_not_hang_below_min_workers(serve, count, start, mode):
    server = serve(*ADD_ONE, "--min-workers", 2, "--until-done")
    a = count(server, "a", **mode)
    a.step(first_push(mode) + 1).waits()
    assert start("status.py", "--server", server.address, "--stop").wait() == 0
    a.stepped()
    until(lambda: a.worker.run_is_over(0), "the order to stop")
    a.finish(0)
    assert a.result() == [first_push(mode) + 1.0] * 8
    assert server.wait() == 0


# --- The network hiccups ------------------------------------------------------------------------


@both_modes
def test_cut_pushes_and_replies_count_once_with_the_same_numbers(serve, count, tmp_path, mode):
    """Each fault at another push; the numbers are those of `simulate`, in fractions."""
    server = serve(*PLAIN, "--outer-lr", 0.5, "--outer-momentum", 0.5, "--no-momentum-warmup",
                   "--no-nesterov", "-n", 2)  # fmt: skip
    gate = Gate(server)
    faults = ["lost", "half", "no reply", "half a reply"]
    for fault in faults:
        gate.faults += [fault, None]  # and then it gets through
    a, b = count(gate, "a", 1.0, **mode), count(server, "b", 0.5, **mode)
    a.finish(44), b.finish(44)
    delay = mode.get("fragment_sync_delay", 0)
    _, end = simulate(
        (1.0, 0.5), 44, 8, mode["num_fragments"], delay, "predict", 0,
        Fraction(1, 2), Fraction(1, 2), nesterov=False,
    )  # fmt: skip
    assert a.result() == b.result() == spread(end)
    assert gate.met == faults
    assert len(gate.pushes) == len(set(map(str, gate.pushes))) + len(faults)
    assert a.worker.mismatches == b.worker.mismatches == 0
    for k in range(mode["num_fragments"]):
        numbers = [line["round"] for line in lines_of(tmp_path, k)]
        assert numbers == list(range(1, a.versions[k][1] + 1))


def test_a_push_that_is_overtaken_by_its_workers_next_join_never_counts(serve):
    """The join has said that it is not folded, so its steps go with the next push."""
    server = serve(*ADD_ONE)
    a = Peer(server, "a", torch.zeros(17)).join()
    late, _ = protocol.connect(server.address, a.session)
    fields = {"type": "push", "fragment": 0, "seq": 1, "base": a.version, "step": 1, "steps": 1,
              "ticket": a.reply["ticket"]}  # fmt: skip
    payload = bytes(protocol.memory(-torch.ones(17)))
    late.sock.sendall(protocol.encode_header(fields, protocol.CODECS["fp32"].layout(17)))
    late.sock.sendall(payload[:40])
    a.join()
    assert a.seq == 0
    late.sock.sendall(payload[40:])
    with pytest.raises(Refused, match="from before its worker joined again"):
        late._raise_refused(late.receive(idle=DEADLINE))
    a.seq = 1
    a.push(torch.full((17,), -2.0), "fp32")
    assert set(a.params.tolist()) == {2.0}


class Impatient(DiLoCoWorker):
    """Takes a line on which nothing moves for `limit` seconds for dead."""

    limit = 1.5

    def _connect(self):
        conn = super()._connect()
        conn.stall = self.limit
        return conn


@both_modes
def test_a_stalled_transfer_is_noticed_and_sent_again(serve, count, capsys, mode):
    server = serve(*ADD_ONE)
    gate = Gate(server)
    gate.faults.append("stalled")
    a = count(gate, "a", kind=Impatient, **mode)
    a.finish(11)
    assert a.result() == [11.0] * 8
    assert gate.met == ["stalled"] and gate.pushes[0] == gate.pushes[1]
    assert "no byte for 2 s" in capsys.readouterr().err  # 1.5, rounded


@both_modes
def test_a_slow_transfer_that_moves_takes_longer_than_the_stall_limit(serve, count, capsys, mode):
    """Some 2.3 s each way."""
    server = serve(*ADD_ONE)
    gate = Gate(server)
    gate.faults += ["slow"] * mode["num_fragments"]
    size = mode["num_fragments"] << 20  # 4 MB a push, 64 kB at once
    a = count(gate, "a", size=size, kind=Impatient, **mode)
    until(lambda: a.joined, "a has joined")
    began = time.monotonic()
    a.step(first_push(mode) + 1).stepped()
    assert time.monotonic() - began > 2 * Impatient.limit
    assert len(gate.pushes) == 1 and "trying again" not in capsys.readouterr().err
    assert set(a.worker.fragments[0].anchor.tolist()) == {float(first_push(mode))}


WAITS_OFTEN = "import protocol, runpy; protocol.WAIT_SECONDS = 0.5; runpy.run_path('server.py', run_name='__main__')"


@both_modes
def test_a_worker_that_waits_for_a_slow_peer_longer_than_the_stall_limit_lives_on(
    start, count, tmp_path, mode
):
    server = start("-c", WAITS_OFTEN, "-m", tmp_path / "model", "--port", 0, *ADD_TWO)
    server.port = int(server.wait_for(r"listening on port (\d+)")[1])
    server.address = f"127.0.0.1:{server.port}"
    gate = Gate(server)
    a = count(gate, "a", A, kind=Impatient, **mode)
    b = count(server, "b", B, **mode)
    a.step(first_push(mode) + 1).waits()
    end = time.monotonic() + 2 * Impatient.limit
    until(lambda: time.monotonic() > end or len(gate.pushes) > 1, "two stall limits")
    assert len(gate.pushes) == 1 and not a.worker.fragments[0].flight.error
    b.step(first_push(mode) + 1)
    a.stepped(), b.stepped()
    assert len(gate.pushes) == 1 and a.worker.down_since is None
    assert steps_in(a.anchor[0]) == (first_push(mode), first_push(mode))


# --- The server is gone for longer --------------------------------------------------------------


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
    names = [
        (k, f.flight.fields["seq"], f.flight.fields["base"])
        for k, f in enumerate(a.worker.fragments)
    ]
    sent = len(gate.pushes)
    again = serve(*ADD_ONE, "--save-every", 1)
    gate.port = again.port
    until(lambda: a.worker.must_join.is_set(), "the server is found")
    a.step(1).stepped()
    assert a.worker.joins == 2
    a.finish(13)
    assert a.result() == [54.0] * 8
    from_there = [push for push in gate.pushes[sent:] if push[2] == names[0][2]]
    assert set(map(str, from_there)) == set(map(str, names))  # each once, or again by its name


@both_modes
def test_steps_of_a_push_whose_reply_was_lost_do_not_count_twice(serve, count, mode):
    """The server folds it and lives on, but the line is dead for 20 steps."""
    server = serve(*ADD_ONE)
    gate = Gate(server)
    a = count(gate, "a", reconnect_timeout=0.3, **mode)
    a.step(8).stepped()
    # The last one travels while training goes on, and the fault is for the one after it.
    until(lambda: len(gate.pushes) == mode["num_fragments"], "a push of each fragment")
    gate.faults.append("gone")
    a.step(20).stepped()
    assert gate.met == ["gone"] and status(server)["fragments"][0]["version"] == 2
    assert a.local == [28.0] * 8
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
    gate.faults.append("gone")
    for counter in (a, b):
        counter.step(first_push(mode))
    a.stepped(), b.stepped()
    assert (a.versions[0][1], b.versions[0][1]) == (2, 1)
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
    for counter in (a, b):
        until(lambda c=counter: c.worker.must_join.is_set(), "the server is found")
        counter.step(1)
    a.stepped(), b.stepped()
    again.wait_for("fragment 0: version 2 comes from a")
    settle(a, b)
    assert a.worker.joins == b.worker.joins == 2


@both_modes
def test_an_offer_that_comes_late_gets_the_slice_in_full(serve, count, tmp_path, mode):
    """As above, but a is not back before --worker-timeout: round 2 is made anew, without it."""
    command = [*ADD_TWO, "--save-every", 0, *SOON]
    server = serve(*command)
    gate, other = Gate(server), Gate(server)
    a, b = count(other, "a", A, **mode), count(gate, "b", B, reconnect_timeout=0.5, **mode)
    a.worker.reconnect_timeout = 0.5
    until(lambda: a.joined and b.joined, "both have joined")
    die_after_round_2(server, tmp_path, a, b, gate, mode)
    other.close()
    again = serve(*command, "--port", server.port)
    gate.open = True
    until(lambda: b.worker.must_join.is_set(), "the server is found")
    b.step(1).stepped()
    again.wait_for("the run starts at round 1 with b")
    other.open = True
    until(lambda: a.worker.must_join.is_set(), "the server is found")
    a.step(1)
    again.wait_for("a joins the run")
    a.stepped()
    assert a.local[0] - a.anchor[0] == 4  # its steps since the push that is lost with round 2
    drive(a, b, lambda: a.versions == b.versions and min(v for _, v in a.versions) > 2)
    assert a.anchor == b.anchor
    assert "comes from" not in again.output


# --- The server dies ----------------------------------------------------------------------------


@both_modes
def test_a_restart_waits_for_the_members_of_the_checkpoint(serve, count, mode):
    command = [*ADD_TWO, "--save-every", 1]
    server = serve(*command)
    gate = Gate(server)
    a, b = pair(count, server, mode, gate)
    for counter in (a, b):
        counter.step(9)
    a.stepped(), b.stepped()
    server.wait_for("saved .*checkpoint-1")
    gate.close()
    server.kill()
    again = serve(*command, "--port", server.port)
    until(lambda: a.worker.must_join.is_set(), "the server is found")
    a.step(1)
    until(lambda: status(again)["joining"] == ["a"], "a is back")
    said = status(again)
    assert (said["state"], said["expected"]) == ("waiting for workers to come back", ["b"])
    gate.open = True
    until(lambda: b.worker.must_join.is_set(), "the server is found")
    b.step(1)
    a.stepped(), b.stepped()
    settle(a, b)
    assert again.wait_for("the run starts at round 1 with (.*)")[1] == "a, b"


@both_modes
@pytest.mark.parametrize("save_every", [1, 0], ids=["checkpoint", "no-checkpoint"])
def test_a_restart_goes_on_with_those_who_are_left_though_n_is_more(
    serve, count, process, mode, save_every
):
    """One of the two workers dies with the server."""
    command = [*ADD_TWO, "--save-every", save_every, *SOON]
    server = serve(*command)
    b = process(server, "b", gain=B, steps=9, holds=True, **mode)
    a = count(server, "a", **mode)
    a.step(9).stepped()
    b.wait_for("took step 9")
    if save_every:
        server.wait_for("saved .*checkpoint-1")
    server.kill(), b.kill()
    again = serve(*command, "--port", server.port)
    assert ("continuing from" in again.output) == bool(save_every)
    before = a.anchor
    assert steps_in(before[7]) == (8, 8)
    until(lambda: a.worker.must_join.is_set(), "the server is found")
    a.step(1).stepped()
    again.wait_for("the run starts at round 1 with a")
    assert ("comes from a" in again.output) == (not save_every)
    a.step(16).stepped()
    assert a.versions[0][1] >= 3 and a.worker.joins == 2
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
    for counter in (a, b):
        until(lambda c=counter: c.worker.must_join.is_set(), "the server is found")
        counter.step(1)
    a.stepped(), b.stepped()
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
        assert set(a.params.tolist()) == {float(a.version[1])}
        for _ in range(2):
            a.push(torch.full((size,), -1.0), "fp32")
            until((folder / f"checkpoint-{a.version[1]}").exists, "the checkpoint")
        a.push(torch.full((size,), -1.0), "fp32")
        model, last = beside / "model.safetensors", folder / f"checkpoint-{a.version[1]}"
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
    assert steps_in(b.worker.fragments[0].anchor[0].item()) == (of_a, first + more)
    assert (line["losses"].keys(), line["steps"]) == ({"a", "b"}, pushed + (more or first))


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
    until(lambda: a.worker.away and b.worker.away, "both are told")
    assert capsys.readouterr().err.count("was stopped; it has saved, and is awaited back") == 2
    again = serve(*command, "--port", server.port)
    b.step(8)
    a.stepped(), b.stepped()
    settle(a, b)
    assert "continuing from" in again.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_second_signal_ends_the_server_at_once(serve, number):
    """The first one waits for the heartbeat of a worker that sends none."""
    server = serve("-n", 1)
    Peer(server, "a").join()
    server.signal(number)
    server.wait_for("stopping: saving, and telling the workers; once more leaves at once")
    server.signal(number)
    assert server.wait() == 128 + number
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
        gate.faults += [fault] * 4
        b = Peer(server, "b", manifest=manifest)
        b.join(**mode_fields(mode), source=status(server)["source"])
        if fault:
            until(lambda: fault in gate.met, fault)
        else:
            until(lambda: any(f["pushes"] for f in status(server)["fragments"]), "a's push")
        return server, a, b

    return run


def mode_fields(mode):
    return {name: mode[name] for name in ("sync_every", "num_fragments")}


@both_modes
def test_a_worker_leaves_at_ctrl_c_while_it_waits_and_its_push_counts(
    waiting_worker, tmp_path, mode
):
    server, a, b = waiting_worker(mode)
    open_round = next(k for k, f in enumerate(status(server)["fragments"]) if f["pushes"])
    version = status(server)["fragments"][open_round]["version"]
    a.signal(signal.SIGINT)
    assert a.wait() == 128 + signal.SIGINT
    assert "stopping after this step" in a.output and "saved" in a.output
    until(lambda: [w["id"] for w in status(server)["workers"]] == ["b"], "a has left")
    b.version, b.seq = b.reply["versions"][open_round], b.reply["seqs"][open_round]
    data, _ = protocol.connect(server.address, b.session)
    data.request("push", {"fragment": open_round, "seq": b.seq + 1, "base": b.version, "step": 0,
                          "steps": 0, "ticket": b.reply["ticket"]})  # fmt: skip
    line = round_line(tmp_path, version + 1, open_round)
    assert line["losses"].keys() == {"a", "b"} and line["steps"] > 0


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


ROUNDS, JOINS, GARBAGE = 10_000, 1_000, 1_000


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_memory_and_threads_stay_flat(serve):
    """Each after a tenth of it as a warm-up."""
    server = serve(*ADD_ONE, "--save-every", 0)
    a = Peer(server, "a", torch.zeros(17)).join()

    def rounds(count, _):
        for _ in range(count):
            a.push(-torch.ones(17), "fp32")

    def joins(count, begin):
        for number in range(begin, begin + count):
            Peer(server, f"guest-{number}").join().leave()

    def garbage(count, begin):
        for number in range(begin, begin + count):
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall([b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8, b"{" * 99][number % 3])
                if number % 2:
                    sock.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionResetError):
                        while sock.recv(1 << 16):
                            pass

    for act, count in ((rounds, ROUNDS), (joins, JOINS), (garbage, GARBAGE)):
        act(count // 10, 0)
        before = resources(server)
        act(count - count // 10, count // 10)
        until(lambda b=before: resources(server)[1] <= b[1] + 5, f"{act.__name__}: threads ended")
        after = resources(server)
        assert after[0] - before[0] < 20, f"{act.__name__}: {before} {after}"
        assert after[2] <= before[2] + 5, f"{act.__name__}: {before} {after}"
    assert set(a.params.tolist()) == {float(ROUNDS)}


# --- Shares of data -----------------------------------------------------------------------------


class Watch(threading.Thread):
    """Looks all the time at which shares of the text live workers read."""

    def __init__(self, workers):
        super().__init__(daemon=True)
        self.workers, self.clashes, self.looks, self.done = workers, [], 0, False
        self.start()

    def run(self):
        while not self.done:
            self.looks += 1
            first = {counter: set(counter.worker.shares) for counter in list(self.workers)}
            again = {counter: set(counter.worker.shares) for counter in first}
            for one in first:
                for two in first:  # `one` held it before and after `two` was seen with it
                    if one is not two and one.joined and two.joined:
                        held = set(one.worker.shares) & first[one] & again[one]
                        if both := held & again[two] & first[two]:
                            self.clashes.append((one.worker.worker_id, two.worker.worker_id, both))
            time.sleep(0.001)


@both_modes
def test_no_two_live_workers_read_the_same_share(serve, count, process, mode):
    """Members join, leave and are killed; in the end all shares are read again."""
    server = serve(*PLAIN, "-n", 2, *SOON, "--shares", 8)
    live = []
    watch = Watch(live)

    def come(name):
        live.append(count(server, name, source="tales", **mode))
        return live[-1]

    def all_read(*counters):
        until(lambda: all(c.joined for c in counters), "all have joined")
        until(
            lambda: sorted(s for c in counters for s in c.worker.shares) == list(range(8)),
            "every share is read by one",
        )

    a, b = come("a"), come("b")
    all_read(a, b)
    c, d = come("c"), come("d")
    all_read(a, b, c, d)
    doomed = process(server, "e", steps=1, holds=True, source="tales", **mode)
    doomed.wait_for("took step 1")
    until(lambda: {s for x in live for s in x.worker.shares} != set(range(8)), "e has its shares")
    live.remove(b)
    b.quit()
    doomed.kill()
    server.wait_for("e is gone")
    all_read(a, c, d)
    live.remove(c)
    c.quit()
    f = come("f")
    all_read(a, d, f)
    watch.done = True
    assert watch.looks > 100 and not watch.clashes


if __name__ == "__main__":
    main()
