"""Workers and networks in the hands of a test: what they send, and what gets through, is up to it.

Notable:
- A `Peer` speaks the protocol by hand, message by message, and checks what it hears.
- A `Counter` is a DiLoCoWorker in a thread of the test, which steps when it is told to. A step adds
  its `gain` to every number of the model, so the global numbers tell how many steps of whom are in
  them.
- A `Gate` is a relay before a server, which cuts, stalls and slows connections at chosen messages.
- Every wait has a deadline.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import secrets
import socket
import struct
import threading
import time
from fractions import Fraction

import pytest
import torch
from conftest import DEADLINE, until
from trail import places

import diloco_callback
import protocol
from protocol import CODECS, FRESH, Fate, Refused

MANIFEST = [["w", "F32", [3, 4]], ["b", "BF16", [5]]]
P = 17  # numbers in it


def numbers(seed, count=P, scale=0.1):
    """Noise from a seed."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def same_bits(a, b):
    plain = (tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in (a, b))
    return a.dtype == b.dtype and torch.equal(*(tensor.view(torch.uint8) for tensor in plain))


def background(call):
    """Call in a thread that cannot keep the tests from ending; gives a Future."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def together(*calls):
    """Call all at the same time; their results in order."""
    return [future.result(DEADLINE) for future in [background(call) for call in calls]]


def ask(server, request, **fields):
    """The fields of the reply to somebody who only looks."""
    conn, _ = protocol.connect(server.address, {})
    with contextlib.closing(conn):
        return conn.request(request, fields).fields


def rounds(folder, count=0, fragment=None):
    """The lines of rounds.jsonl, or those on one fragment, once there are `count`."""

    def read():
        path = folder / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [line for line in map(json.loads, lines) if fragment in (None, line["fragment"])]
        return [found] if len(found) >= count else None

    return until(read, f"{count} lines in rounds.jsonl")[0]


# --- A worker that speaks by hand ---------------------------------------------------------------


class Peer:
    """A worker by hand. `params` is its copy of the model, flat; `values` that of the buffers.

    versions, seqs, folded: by slice, the version it holds, the sequence number of its last push, and
    {worker: Fate} of what is folded in that version. reply: fields of the last reply to a join.
    """

    def __init__(
        self, server, worker, params=None, manifest=None, files=None, session=None, fragments=1,
        buffers=None, values=None,
    ):  # fmt: skip
        self.server, self.files = server.address, files or {}
        self.session = {"worker": worker, "session": session or secrets.token_hex(4)}
        self.manifest = protocol.manifest_from_json(manifest or MANIFEST)
        self.buffers = protocol.manifest_from_json(buffers or [], trained=False)
        if params is None:  # of a model that is far too large there are none
            params = numbers(0, min(_size(self.manifest), 1 << 20))
        self.params = params.clone()
        for spec, start, stop in protocol.ranges(self.manifest):
            part = self.params[start:stop]
            part.copy_(part.to(spec.dtype))
        self.values = values if values is not None else torch.zeros(_size(self.buffers))
        self.fragments, self.count = fragments, fragments + bool(self.buffers)
        self.versions, self.seqs = [FRESH] * self.count, [0] * self.count
        self.folded = [{} for _ in range(self.count)]
        self.control = self.data = self.reply = None
        self.brought, self.took = [], []  # slices that it was asked for; messages that brought news

    @property
    def version(self):
        return self.versions[0]

    @property
    def seq(self):
        return self.seqs[0]

    def place(self, k):
        """(vector that slice k is in, its places there)."""
        if k == self.fragments:
            return self.values, slice(None)
        is_whole = self.fragments == 1
        return self.params, slice(None) if is_whole else places(len(self.params), k, self.fragments)

    def slice(self, k):
        """The numbers of slice k."""
        vector, place = self.place(k)
        return vector[place]

    def connect(self):
        conn, _ = protocol.connect(self.server, self.session)
        conn.stall = DEADLINE
        return conn

    @staticmethod
    def receive(conn, on_wait=None):
        """The next message that is no `wait`. Raises Refused where it is an error."""
        end = time.monotonic() + DEADLINE
        while True:
            message = conn.receive(DEADLINE)
            if message.type == "error":
                raise Refused(message.fields["code"], message.fields["message"])
            if message.type != "wait":
                return message
            if on_wait:
                on_wait(message.fields)
            assert time.monotonic() < end, f"still waits for {message.fields}"

    # --- Joining ---

    def join(self, on_wait=None, **fields):
        """Ask to take part, bring what the server asks for, and take what it lacks itself."""
        reply = self.ask(on_wait, **fields)
        while reply.type == "bring":
            reply = self.bring(reply.fields["slices"], reply.fields["files"], on_wait)
        return self.enter(reply)

    def ask(self, on_wait=None, **fields):
        """Ask to take part, on a new control connection; the reply."""
        is_new = all(version == FRESH for version in self.versions)
        fields = {
            "manifest": protocol.manifest_to_json(self.manifest),
            "buffers": protocol.manifest_to_json(self.buffers),
            "frozen": [],
            "sync_every": 5,
            "num_fragments": self.fragments,
            "source": "",
            "host": "h",
            "ranks": 1,
            "step": 0,
            "position": 0,
            "run": "" if is_new else self.reply["run"],
            "versions": self.versions,
            "folded": [] if is_new else self.folded,
            "closed": [],
            "resumes": [],
            **fields,
        }
        if self.control:
            self.control.close()
        self.control = self.connect()
        self.control.send("join", fields)
        return self.receive(self.control, on_wait)

    def bring(self, slices, files=True, on_wait=None):
        """Upload the slices that the server has asked for, and the files; the reply."""
        self.brought += slices
        tensors = {f"slice:{k}": self.slice(k) for k in slices}
        sizes = {name: len(text) for name, text in self.files.items()} if files else {}
        for name in sizes:
            raw = torch.frombuffer(bytearray(self.files[name]), dtype=torch.uint8)
            tensors[f"file:{name}"] = raw
        fields = {"slices": slices, "files": sizes}
        specs = protocol.specs_of(tensors.items())
        self.control.send("bring", fields, specs, tensors.values())
        return self.receive(self.control, on_wait)

    def enter(self, reply):
        """Take the reply to a join that has succeeded, and the slices that are newer."""
        assert reply.type == "join" and not reply.specs
        self.reply = reply.fields
        self.manifest = protocol.manifest_from_json(reply.fields["manifest"])
        self.buffers = protocol.manifest_from_json(reply.fields["buffers"], trained=False)
        self.seqs = [max(pair) for pair in zip(self.seqs, reply.fields["known"], strict=True)]
        for k in range(self.count):
            self.pull(k, 0)
        return self

    # --- Rounds ---

    def send(self, values=None, k=0, codec=None, seq=None, **fields):
        """Push numbers (None: an empty push) of a slice; whether they are taken."""
        if seq is None:
            self.seqs[k] += 1
        name = {"slice": k, "seq": seq or self.seqs[k], "base": self.versions[k]}
        told = {"step": 5 * name["seq"], "position": 0, "steps": 5 * (values is not None)}
        told |= {"tokens": 0, "loss": None, "closing": False}
        specs, tensors = (), ()
        if values is not None:
            payload = encode(values, codec or self.codecs(k)[0])
            specs, tensors = payload.specs, payload.tensors.values()
        self.data = self.data or self.connect()
        self.data.send("push", {**name, **told, **fields}, specs, tensors)
        reply = self.receive(self.data)
        assert reply.type == "push" and not reply.specs
        return reply.fields["taken"]

    def pull(self, k=0, seq=None, on_wait=None):
        """Take entries up to the one that lists the push `seq` (its last one; 0: up to the head).
        The type of the last message."""
        self.data = self.data or self.connect()
        seq = self.seqs[k] if seq is None else seq
        fields = {"slice": k, "version": self.versions[k], "seq": seq}
        self.data.send("pull", fields)
        while True:
            message = self.receive(self.data, on_wait)
            payload = protocol.Payload(message.specs)
            self.data.read(payload.raw)
            if message.type in ("again", "current"):
                assert message.fields["slice"] == k
                return message.type
            self.take(message, payload.tensors)
            if not message.fields["more"]:
                return message.type

    def take(self, message, tensors):
        """Follow an entry of the log, or take a slice in full."""
        k, version = message.fields["slice"], protocol.version_of(message.fields["version"])
        listed = protocol.fates_of(message.fields["folded"])
        vector, place = self.place(k)
        mine = vector[place]
        if message.type == "slice":
            mine.copy_(tensors["slice"])
            self.folded[k] = listed
        else:
            assert message.type == "entry" and tuple(message.fields["base"]) == self.versions[k]
            if len(tensors) > 1:
                codec, decoded = CODECS[self.codecs(k)[1]], torch.empty(mine.numel())
                for start, stop in protocol.chunks(mine.numel()):
                    codec.decode(tensors, start, decoded[start:stop])
                mine.add_(decoded)
            self.folded[k].update(listed)
        assert same_bits(protocol.checksum_of(mine), tensors["checksum"])
        vector[place] = mine
        self.versions[k] = version
        self.took.append(message.type)

    def push(self, values=None, k=0, **fields):
        """Push numbers, and wait for the entry that lists them; how they came out, a Fate."""
        self.send(values, k, **fields)
        assert self.pull(k) in ("entry", "slice")
        fate = self.folded[k][self.session["worker"]]
        assert isinstance(fate, Fate) and fate.seq == self.seqs[k]
        return fate

    def codecs(self, k):
        """The names of the codecs that slice k goes up and comes down in."""
        if k == self.fragments:
            return "fp32", "fp32"
        return self.reply["upload_codec"], self.reply["download_codec"]

    # --- The rest ---

    def heartbeat(self, **fields):
        told = {"step": 0, "position": 0, "steps_per_second": 0.0, "loss": None, "blocked": []}
        self.control.send("heartbeat", {**told, **fields})
        return self.receive(self.control).fields

    def leave(self, reason="done"):
        self.control.send("leave", {"reason": reason})
        assert self.receive(self.control).type == "leave"
        self.close()

    def close(self):
        """Hang up without a word."""
        for conn in (self.control, self.data):
            if conn:
                conn.close()
        self.control = self.data = None


def _size(specs):
    return sum(spec.numel for spec in specs)


def encode(values, codec):
    """A Payload with numbers as a codec has them."""
    payload = protocol.Payload(CODECS[codec].layout(values.numel()))
    for start, stop in protocol.chunks(values.numel()):
        CODECS[codec].encode(values[start:stop].float(), payload.tensors, start)
    return payload


def join_all(*peers):
    """Have all join, none without the others; gives them."""
    together(*[peer.join for peer in peers])
    return peers


# --- A worker that counts -----------------------------------------------------------------------


class Numbers(torch.nn.Module):
    """Some numbers; its loss makes every SGD step of lr 1 add `gain` to each."""

    def __init__(self, gain, size=8):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self.gain = gain

    def step(self, optimizer):
        optimizer.zero_grad()
        (self.weight * -self.gain).sum().backward()
        optimizer.step()


class Quit(Exception):
    """Ends a Counter where the test does."""


class Counter(threading.Thread):
    """A worker that takes as many steps as it is told to, and notes its numbers after each.

    steps, total: steps taken, and allowed; joined: set once it has joined; error: what ended it.
    """

    def __init__(self, server, name, gain=1, size=8, **options):
        super().__init__(daemon=True)
        self.gain, self.model = gain, Numbers(gain, size)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        options = {"reconnect_timeout": DEADLINE, **options}
        self.worker = diloco_callback.DiLoCoWorker(
            self.model, self.optimizer, server.address, worker_id=name, **options
        )
        self.trail, self.total, self.last, self.error = [], 0, None, None
        self.allowed, self.joined, self.quits = (
            threading.Semaphore(0), threading.Event(), threading.Event()
        )  # fmt: skip
        self.start()

    @property
    def steps(self):
        return len(self.trail)

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
                self.joined.set()
                while self.steps != self.last:
                    if self.allowed.acquire(timeout=0.02):
                        self.model.step(self.optimizer)
                        self.trail.append(self.model.weight.tolist())
                    if self.quits.is_set():
                        raise Quit
        except BaseException as error:
            self.error = error

    def quit(self):
        """Leave without a last push, whatever it waits for."""
        self.quits.set()
        self.worker.part(0)
        if not self.joined.is_set():
            self.worker.link.closed.set()

    def stepped(self):
        """Wait until it has taken all steps that it was allowed. Gives the Counter."""
        until(lambda: self.steps == self.total or self.error, f"steps of {self.worker.worker_id}")
        assert self.error is None, repr(self.error)
        return self

    def waits(self):
        """Wait until a push of its own has arrived that no entry lists yet. Gives the Counter."""
        until(lambda: any(push.answered for push in self.flying), "a push that waits")
        return self

    @property
    def flying(self):
        """Its pushes that no entry lists yet, as far as it knows."""
        with self.worker.replica.changed:
            return list(self.worker.outbox.queue) if self.worker.outbox else []

    @property
    def is_settled(self):
        """Whether no push is out, and none is listed that training has not adopted."""
        with self.worker.replica.changed:
            return not self.flying and not self.worker.replica.listed

    @property
    def local(self):
        return self.model.weight.tolist()

    @property
    def anchor(self):
        """The global numbers, as far as it has adopted them."""
        vector, slices = torch.zeros(self.model.weight.numel()), self.worker.slices
        for k, slice in enumerate(slices):
            vector[places(len(vector), k, len(slices))] = slice.anchor
        return vector.tolist()

    @property
    def versions(self):
        return self.worker.versions

    def result(self):
        """Its numbers at the end."""
        self.join(DEADLINE)
        assert not self.is_alive(), "still running"
        if self.error:
            raise self.error
        return self.local


def steps_in(value):
    """How many steps of a worker with gain 1, and of one with gain 1000, are in a number."""
    assert value == int(value)
    return int(value) % 1000, int(value) // 1000


def drive(a, b, condition):
    """Step both, the one that is behind first, until `condition()` while both rest. After a join
    their cycles may be some steps apart, so a is led ahead of b or behind it, further and further."""

    def resting():
        assert not (a.error or b.error), (a.error, b.error)
        return [counter for counter in (a, b) if counter.steps == counter.total]

    end, leads = time.monotonic() + DEADLINE, (0, 1, -1, 2, -2)
    for turn in itertools.count():
        lead = leads[turn // 20 % len(leads)]
        wait = time.monotonic() + 0.1
        while len(found := resting()) < 2 and time.monotonic() < wait:
            time.sleep(0.005)
        time.sleep(0.005)  # what it has sent may be listed soon
        if len(found) == 2 and condition():
            return
        if time.monotonic() > end:
            break
        reached = {a: a.total - lead, b: b.total}
        behind = [counter for counter in found if reached[counter] == min(reached.values())]
        for counter in behind or found:  # the other one may wait for a step of this one
            counter.step(1)
    pytest.fail(f"steps {a.steps}, {b.steps}, versions {a.versions}, {b.versions}")


def settle(a, b):
    """Step both until nothing is under way and both have the same versions, then check that every
    step of each is in the global numbers once, or is local still."""
    drive(a, b, lambda: a.versions == b.versions and a.is_settled and b.is_settled)
    assert a.anchor == b.anchor
    for value, of_a, of_b in zip(a.anchor, a.local, b.local, strict=True):
        in_a, in_b = steps_in(value)
        assert of_a == value + a.gain * (a.steps - in_a), f"{a.steps} of a: {value}, {of_a}"
        assert of_b == value + b.gain * (b.steps - in_b), f"{b.steps} of b: {value}, {of_b}"


def simulate(gains, steps, sync_every, count, delay, update, alpha, lr, momentum, nesterov=True):
    """The run of Counters worked out in exact fractions, one number a fragment: for each worker the
    list of its fragments' values after every step, and what all end with."""
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


def spread(values):
    """Values of fragments as the eight numbers of a Counter."""
    return [float(value) for value in values] * (8 // len(values))


# --- The network --------------------------------------------------------------------------------


class Gate(threading.Thread):
    """A relay before a server. `pushes` and `pulls` are what becomes of the next pushes that carry
    numbers, and of the next pulls that wait for a push, one each (None: nothing):

    "lost": cut before the server hears of it. "half": cut in the middle of the push. "no reply": cut
    when the reply comes. "half a reply": cut in the middle of that. "gone": cut when the reply comes,
    with all other lines; then nobody gets through. "stalled": half of the push is passed on, and no
    more. "slow": it, or its reply, is passed on slowly.

    slice: number of the only slice that is meant, or None. is_narrow: whether all is slow. met: faults
    that have struck. seen: (slice, sequence number, base) of the pushes with numbers that came by.
    """

    def __init__(self, server, slice=None):
        super().__init__(daemon=True)
        self.port, self.slice, self.open, self.is_narrow = server.port, slice, True, False
        self.pushes, self.pulls = collections.deque(), collections.deque()
        self.met, self.seen = [], []
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
            line = {"near": near, "far": far, "request": None, "fault": None}
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

    def frame(self, stream):
        """(header, its bytes with the length, bytes of payload to come) of the next frame."""
        length = stream.read(8)
        raw = stream.read(struct.unpack("<Q", length)[0])
        fields, specs = protocol.parse_header(raw)
        return fields, length + raw, protocol.payload_bytes(specs)

    def pass_on(self, stream, to, size, slow=False):
        while size:
            part = stream.read1(min(size, 1 << 16))
            if not part:
                raise ConnectionError
            size -= len(part)
            to.sendall(part)
            if slow or self.is_narrow:
                time.sleep(0.035)

    def fault_of(self, fields, size):
        """What is to become of a request."""
        if self.slice not in (None, fields.get("slice")):
            return None
        faults = None
        if fields["type"] == "push" and size:
            faults = self.pushes
            self.seen.append((fields["slice"], fields["seq"], tuple(fields["base"])))
        elif fields["type"] == "pull" and fields["seq"]:
            faults = self.pulls
        return faults.popleft() if faults else None

    def up(self, line):
        near, far = line["near"], line["far"]
        with contextlib.suppress(OSError, struct.error), near.makefile("rb") as stream:
            while True:
                fields, raw, size = self.frame(stream)
                line["fault"] = fault = self.fault_of(fields, size)
                line["request"] = fields["type"]
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
                fault = line["fault"] if fields["type"] not in ("wait", "error") else None
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
