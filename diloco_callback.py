"""The worker's side of DiLoCo: hooks into an optimizer or a trainer and synchronizes its model.

In a trainer with callbacks, and in a plain loop:

    trainer = Trainer(..., callbacks=[DiLoCoCallback(server="host:8512", sync_every=500)])

    with DiLoCoWorker(model, optimizer, server="host:8512", sync_every=500):
        for batch in data:
            ...
            optimizer.step()  # every 500th also synchronizes

Notable:
- Copy this file and protocol.py into your project; they need torch and nothing else.
- Every `sync_every` optimizer steps the difference between the parameters that the round started
  from (the anchor) and those of now is pushed; the server answers with an update, which every
  worker adds to its anchor. So all replicas stay equal to the bit, and a checksum proves it.
- With `num_fragments` the model travels in slices, each pushed at its own step of the cycle from a
  thread of a pool, and adopted `fragment_sync_delay` steps later, while training goes on (Streaming
  DiLoCo, arXiv 2501.18512). The steps made in between are kept.
- Nothing local is overwritten before its difference has been accepted. A push whose reply is lost
  is sent again under the same name, so that it counts exactly once; while the server is away for
  longer than `reconnect_timeout`, training goes on and the push stays pending.
- Networks fail in the pool's threads; the training thread alone joins again and moves parameters.
- Without a server (no argument, no DILOCO_SERVER) the callback does nothing.
- Importing it starts nothing. A process forked from a worker's, as for a DataLoader, is no worker.

Environment, where no argument is given: DILOCO_SERVER, DILOCO_SYNC_EVERY, DILOCO_WORKER_ID,
DILOCO_NUM_FRAGMENTS.
"""

import atexit
import concurrent.futures
import contextlib
import datetime
import itertools
import json
import math
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

if __package__:  # asked, not tried: a package must never get a `protocol` that is not its own
    from . import protocol
    from .protocol import CHUNK, CODECS, Buffer, Checksum, ProtocolError, Refused, TensorSpec
else:
    import protocol
    from protocol import CHUNK, CODECS, Buffer, Checksum, ProtocolError, Refused, TensorSpec

SYNC_EVERY = 500  # steps of a round, where nobody says otherwise
RECONNECT_SECONDS = 600.0  # that training waits for a server that is gone, before it goes on
PARTING_SECONDS = 5.0  # that a worker which is told to stop waits for its last push to arrive
LONGEST_PAUSE_SECONDS = 10.0  # between two attempts to connect
RESIDUAL_FILE = "diloco_residual.safetensors"  # beside a checkpoint
RANKS_PATIENCE = datetime.timedelta(days=30)  # of a worker's ranks, while one waits for a round
# What rank 0 tells the others as it is, apart from the step and the shares of the data.
TOLD = (
    "run_step",
    "stop_ordered",
    "index",
    "rank",
    "world",
    "num_shares",
    "fragment_syncs",
    "dropped_steps",
    "kept_local",
    "fetched",
)
MAX_REFUSALS = 3  # pushes in a row that are not finite, after which training is broken


def log(text):
    sys.stderr.write(f"diloco: {text}\n")  # one write: threads must not mix their lines


def reason_of(error):
    """An exception in one line, for the server's log."""
    return ": ".join([type(error).__name__, *filter(None, [" ".join(str(error).split())])])


def retry(action, seconds, what, stop=None):
    """Call `action` until it works, with growing pauses, for at most `seconds` or until the event
    `stop`. Raises ConnectionError then; Refused at once, as a retry cannot mend that."""
    began, pause, stop = time.monotonic(), 0.2, stop or threading.Event()
    while True:
        try:
            return action()
        except (OSError, ProtocolError) as error:
            waited = time.monotonic() - began
            if waited > seconds or stop.is_set():
                raise ConnectionError(
                    f"{what}: {error}, for {waited:.0f} s. Is the server running there, and does a "
                    "firewall let you through?"
                ) from error
            if pause == 0.2:
                log(f"{what}: {error}; trying again for up to {seconds:.0f} s")
        stop.wait(min(pause, LONGEST_PAUSE_SECONDS))
        pause *= 1.5


@contextlib.contextmanager
def uninterrupted():
    """Put off a Ctrl-C until the block is through, so that no slice stays half applied."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending = []
    before = signal.signal(signal.SIGINT, lambda *args: pending.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if pending and callable(before):
        before(*pending[0])


def describe(server, timeout=60.0):
    """What a server says of its run: {"files": {name: text}, "source": str or None, "shares": int}.

    Raises ConnectionError when there is none within `timeout` seconds, Refused when it says no.
    """

    def ask():
        conn, _ = protocol.connect(server, {})
        with contextlib.closing(conn):
            status = conn.request("status").fields
            reply = conn.request("fetch", {"files": True})
            files = {}
            for spec in reply.specs:
                if spec.name not in protocol.FILE_NAMES or spec.nbytes > protocol.MAX_FILES_BYTES:
                    raise ProtocolError(f"fetch: an unexpected file {protocol.describe(spec)}")
                raw = torch.empty(spec.shape, dtype=torch.uint8)
                conn.read(raw)
                files[spec.name] = bytes(protocol.memory(raw)).decode("utf-8", errors="replace")
            return {"files": files, "source": status["source"], "shares": status["shares"]}

    return retry(ask, timeout, f"server {server}")


class Pool:
    """Daemon threads that run tasks, started as they are needed, at most `limit`. Those of
    concurrent.futures would keep a process from ending while a round is waited for."""

    def __init__(self, limit):
        self.limit, self.tasks, self.threads, self.free = limit, queue.SimpleQueue(), [], 0
        self.lock = threading.Lock()

    def submit(self, task):
        with self.lock:
            if self.free <= 0 and len(self.threads) < self.limit:
                self.threads.append(threading.Thread(target=self._run, daemon=True))
                self.threads[-1].start()
                self.free += 1
            self.free -= 1
        self.tasks.put(task)

    def _run(self):
        while task := self.tasks.get():
            task()
            with self.lock:
                self.free += 1

    def close(self, seconds):
        """End the threads; those whose task does not end within `seconds` are left to it."""
        for _ in self.threads:
            self.tasks.put(None)
        deadline = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))


@dataclass
class Flight:
    """A push on its way, and what became of it."""

    fields: dict  # of the request
    steps: int  # that it carries; 0 makes it an empty push
    mark: tuple  # (local step, tokens) at the push
    adopt_at: int  # the local step at which its reply is adopted
    # Begins with the local values at the push; None while they stand still anyway.
    snapshot: torch.Tensor | None
    buffers: dict = field(default_factory=dict)  # those that go with it, of the model's
    predicted: bool = False  # the local values have jumped to `_predicted`
    late: bool = False  # training has gone on without its reply
    arrived: bool = False  # the server has all of it, and waits for others
    moved: bool = False  # the local values are the new global ones already
    queued: tuple = ()  # of each GPU: the event that the local values of the push are there
    encoded: int = 0  # elements that are in the push buffer, and whose rounding is in the residual
    dropped: bool = False  # its values are gone: sent again it would be an empty push
    lock: threading.Lock = field(default_factory=threading.Lock)  # while local values are read
    done: threading.Event = field(default_factory=threading.Event)
    reply: protocol.Message | None = None
    error: BaseException | None = None
    seconds: float = 0.0  # from the start of encoding to the end of decoding


class Fragment:
    """A slice of the model with a version and pushes of its own: its numbers, and the arithmetic on
    them, chunk by chunk. Positions are within the slice.

    flat: the local parameters. anchor, residual (None without error feedback) and velocity (of the
    outer optimizer; None without prediction): float32 vectors of its own, where the parameters
    live. There everything is worked out; encoded bytes alone are on the host.
    """

    def __init__(self, flat, anchor, residual, velocity, up, down):
        self.flat, self.size, self.device = flat, flat.numel, anchor.device
        self.anchor, self.residual, self.velocity = anchor, residual, velocity
        self.up, self.down = up, down
        pinned = self.device.type == "cuda"
        self.push = Buffer(up.layout(self.size), pinned=pinned)
        self.update = Buffer([*down.layout(self.size), Checksum.SPEC], pinned=pinned)
        self.is_staged = self.device.type != "cpu"
        self.stages = {}  # (codec, elements) -> Buffer on the device for one chunk
        self.version = None  # [origin, number] of the anchor
        self.outer = None  # the outer step that follows the next push: lr, momentum, nesterov
        self.seq = 0  # of the last push
        self.folded = {}  # worker id -> its highest sequence number in the anchor
        self.staleness = 0  # rounds that the local steps missed before they were rebased
        self.mark = (0, 0)  # local step and tokens up to which steps have been pushed
        self.closed = False  # the closing push is in the global model
        self.flight = None  # the push that is under way

    def scratch(self):
        """Room for a chunk."""
        return torch.empty(CHUNK, device=self.device)

    def _at(self, codec, buffer, start, count):
        """What a codec is to work on for a chunk of a message: (tensors, position in them, bytes on
        the device, the bytes on the host that those stand for). On the host the tensors are the
        message's own, and there are no others; elsewhere they are a buffer of the chunk's size."""
        if not self.is_staged:
            return buffer.tensors, start, None, None
        if (codec, count) not in self.stages:
            self.stages[codec, count] = Buffer(codec.layout(count), device=self.device)
        stage, first = self.stages[codec, count], protocol.payload_bytes(codec.layout(start))
        return stage.tensors, 0, stage.raw, buffer.raw[first : first + len(stage.raw)]

    def difference(self, flight, start, out):
        """Anchor minus local at the push, plus what rounding lost before, into `out`."""
        part = slice(start, start + out.numel())
        if flight.snapshot is None:
            self.flat.subtract_from(start, self.anchor[part], out)
        else:
            torch.sub(self.flat.rounded(start, self.anchor[part]), flight.snapshot[part], out=out)
        return out if self.residual is None else out.add_(self.residual[part])

    def encode(self, flight, start, stop, scratch):
        """Fill a chunk of the push buffer, and keep what rounding takes from it. The residual is
        that of an accepted push from here on: `take_back` is for the few that are not."""
        delta = self.difference(flight, start, scratch[: stop - start])
        tensors, at, device, host = self._at(self.up, self.push, start, stop - start)
        self.up.encode(delta, tensors, at)
        if device is not None:
            host.copy_(device)
        if self.residual is not None:
            self.up.subtract(delta, tensors, at, self.residual[start:stop])
        flight.encoded = stop

    def take_back(self, flight):
        """Make the residual what it was before a push that was not accepted: what the push carried
        and what it left, less the difference that it was made from."""
        if self.residual is None or not flight.encoded:
            return
        scratch, carried = self.scratch(), self.scratch()
        for start, stop in protocol.chunks(flight.encoded):
            left, total = self.residual[start:stop], carried[: stop - start]
            tensors, at, device, host = self._at(self.up, self.push, start, stop - start)
            if device is not None:
                device.copy_(host)
            self.up.decode(tensors, at, total)
            total.add_(left)
            left.zero_()  # it is a term of the difference
            torch.sub(total, self.difference(flight, start, scratch[: stop - start]), out=left)
        flight.encoded = 0

    def predicted(self, flight):
        """Where the slice would be if all workers had pushed what this one has: (start, stop,
        values rounded to the parameters' dtypes) of each chunk. The outer step is the server's, and
        all that it needs is still what it was at the push."""
        lr, mu, nesterov = (self.outer[name] for name in ("lr", "momentum", "nesterov"))
        scratch, other = self.scratch(), self.scratch()
        for start, stop in protocol.chunks(self.size):
            own, ahead, anchor = (
                scratch[: stop - start],
                other[: stop - start],
                self.anchor[start:stop],
            )
            torch.sub(self.flat.rounded(start, anchor), flight.snapshot[start:stop], out=own)
            torch.mul(self.velocity[start:stop], mu, out=ahead).add_(own)
            step = own.add_(ahead, alpha=mu) if nesterov else ahead
            yield start, stop, self.flat.rounded(start, torch.add(anchor, step, alpha=-lr, out=own))

    def predict(self, flight):
        """Let training go on from the prediction."""
        for start, _, values in self.predicted(flight):
            self.flat.write(start, values)
        flight.predicted = True

    def keep_prediction(self, flight):
        """From here on the snapshot is what the steps since the push were added to."""
        if flight.predicted:
            for start, stop, values in self.predicted(flight):
                flight.snapshot[start:stop].copy_(values)
            flight.predicted = False

    def undo_prediction(self, flight):
        """Make the local values what they would be without the jump."""
        if flight.predicted:
            for start, stop, values in self.predicted(flight):
                local = torch.empty_like(values)
                self.flat.read(start, local)
                self.flat.write(start, local.sub_(values).add_(flight.snapshot[start:stop]))
            flight.predicted = False

    def advance(self, reply, whole, move=False):
        """Bring the anchor to a reply's version: by its update, to the slice in full, or not at all
        where nothing was folded; with `move` the local values too, while they are in the cache.
        False if the checksum then differs from the server's."""
        checksum, scratch = Checksum(), self.scratch()
        learns = self.velocity is not None and not reply.field("plain", bool, True)
        for start, stop in protocol.chunks(self.size):
            anchor, step = self.anchor[start:stop], scratch[: stop - start]
            if whole is not None:
                anchor.copy_(whole[start:stop])
            elif reply.specs == self.update.specs:
                tensors, at, device, host = self._at(self.down, self.update, start, stop - start)
                if device is not None:
                    device.copy_(host)
                self.down.add(tensors, at, anchor)
                if learns:
                    self.down.decode(tensors, at, step)
                    self._learn_velocity(start, stop, step)
            checksum.add(anchor)
            if move:
                self.flat.write(start, anchor)
        self.version, self.outer = reply.field("version", list), reply.field("outer", dict)
        folded = reply.field("folded", dict)
        self.folded = {**({} if whole is not None else self.folded), **folded}
        return torch.equal(checksum.digest(), self.update.tensors["checksum"])

    def _learn_velocity(self, start, stop, update):
        """Work out the outer optimizer's velocity v from an update. With the mean g of the pushes,
        v' = mu * v + g and update = -lr * (g + mu * v'), or -lr * v' without Nesterov. One that
        starts from zero, as a late joiner's, is right after a few rounds."""
        velocity = self.velocity[start:stop]
        lr, mu, nesterov = (self.outer[name] for name in ("lr", "momentum", "nesterov"))
        if lr and nesterov:
            velocity.mul_(mu).add_(update, alpha=-1 / lr).div_(1 + mu)
        elif lr:
            torch.mul(update, -1 / lr, out=velocity)

    def moved(self, flight, alpha):
        """Adopt a flight's reply: the anchor, with what was done since the push on top of it.
        `alpha`: of `fragment_update: mix`, which is for steps of one interval, not of an outage."""
        if not flight.moved:
            self.move(self.anchor, flight.snapshot, None if flight.late else alpha)

    def move(self, new, since=None, alpha=None):
        """Set the local values to the global slice `new`, with what was done since they were
        `since` on top; with `alpha`, to so much of the local values and the rest of `new`."""
        scratch = self.scratch()
        for start, stop in protocol.chunks(self.size):
            target, local = new[start:stop], scratch[: stop - start]
            if since is not None:
                self.flat.read(start, local)
                if alpha is None:
                    target = local.sub_(since[start:stop]).add_(target)
                else:
                    target = local.mul_(alpha).add_(target, alpha=1 - alpha)
            self.flat.write(start, target)


class Buffers:
    """The persistent buffers of a model, such as the statistics of BatchNorm. The last fragment of
    a cycle carries those that have changed; the server answers with the mean of floating-point ones,
    and with others as the worker with the lowest index has them.

    Those that are not persistent, complex ones, and large integer ones, which are quantized
    weights, stay local. `anchor`: the global ones, {name: CPU tensor as it travels}.
    """

    LARGEST_INTEGERS = 1 << 20  # elements; more are quantized weights and not counters

    def __init__(self, model):
        self.places, self.anchor = {}, {}  # name -> (module, attribute): it may get a new tensor
        self.news = {}  # global ones that have come with a reply, and are not adopted yet
        self.writes = 0  # changes made here
        kept = set(model.state_dict(keep_vars=True))
        modules = dict(model.named_modules())
        for name, buffer in model.named_buffers():
            owner, _, attribute = name.rpartition(".")
            known = buffer.dtype in protocol.DTYPE_NAMES and not buffer.is_meta
            small = buffer.is_floating_point() or buffer.numel() <= self.LARGEST_INTEGERS
            if name in kept and known and small:
                self.places[name] = modules[owner], attribute
        plain = _plain_names(model)
        self.places = {plain(name): place for name, place in self.places.items()}
        found = {name: getattr(*place) for name, place in self.places.items()}
        self.specs = protocol.specs_of(found.items())  # for the whole run

    @property
    def local(self):
        """{name: the model's own tensor}. One that has gone, or got another shape, stays local."""
        found = {spec.name: (getattr(*self.places[spec.name], None), spec) for spec in self.specs}
        return {
            name: buffer
            for name, (buffer, spec) in found.items()
            if isinstance(buffer, torch.Tensor) and buffer.shape == spec.shape
        }

    def now(self):
        """{name: CPU tensor of its own} of the local ones, as they travel."""
        local = self.local
        wire = zip(self.specs, protocol.buffer_specs(self.specs), strict=True)
        return {
            spec.name: local[spec.name].detach().to("cpu", as_sent.dtype, copy=True).contiguous()
            for spec, as_sent in wire
            if spec.name in local
        }

    def changed(self):
        """Those of `now` that differ from the global ones, as far as their own dtype can tell."""
        now, dtypes = self.now(), {spec.name: spec.dtype for spec in self.specs}
        return {
            name: values
            for name, values in now.items()
            if not protocol.same_bits(values, self.anchor[name].to(dtypes[name]).to(values.dtype))
        }

    def put(self, values):
        """Make local ones what `values` says, {name: tensor as it travels}."""
        local, now = self.local, self.now()
        for name in local.keys() & values.keys():
            if not protocol.same_bits(now[name], values[name]):  # an expanded one cannot be written
                local[name].copy_(values[name])
            self.writes += 1

    def enter(self, values, keep):
        """Take the global ones at a join; with `keep` where no local change would be lost."""
        own = {}
        if keep:
            own = self.changed() if self.anchor else values
        self.anchor, self.news = {**self.anchor, **values}, {}
        self.put({name: new for name, new in values.items() if name not in own})

    def adopt(self, pushed):
        """Take the global ones that came with the reply to a push of `pushed`. What an integer has
        counted since then stays; statistics forget what is older than some steps anyway, and a
        variance to which a difference is added may become negative."""
        values, local = dict(self.news), self.now() if self.news else {}
        for name, new in self.news.items():
            if name in local and not new.is_floating_point() and new.dtype != torch.bool:
                # In int64, and back: torch does not add wide unsigned numbers.
                since = local[name].long() - pushed.get(name, self.anchor[name]).long()
                values[name] = (new.long() + since).to(new.dtype)
        self.anchor |= self.news
        self.put(values)
        self.news = {}


class Ranks:
    """The processes of one worker, as torch.distributed has them (DistributedDataParallel,
    fully_shard): rank 0 speaks to the server, and tells the others after each step what has become
    of it. Until then they listen, and hand out or take in what they hold of a sharded model. Without
    torch.distributed there is one rank, and nothing to tell."""

    FACTS, READ, WRITE = range(3)  # what a message is about

    def __init__(self):
        there = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        # A group of their own: a round may take longer than the trainer's group would wait.
        self.group = (
            dist.new_group(backend="gloo", timeout=RANKS_PATIENCE) if self.count > 1 else None
        )
        self.last = None  # what was told last
        self.shards = {}  # name -> Sharded, of a model that is; in the same order on each rank
        self.lock = threading.Lock()  # of rank 0, while it says something: any thread may
        self.listening = False  # whether the others wait for that

    @property
    def leads(self):
        """Whether this rank speaks to the server."""
        return self.rank == 0

    def share(self, facts):
        """What rank 0 gives as `facts`, a dict for JSON, on every rank; most often it is what was
        told before, and goes without saying."""
        if self.count == 1:
            return facts
        if self.leads:
            raw = json.dumps(facts).encode() if facts != self.last else b""
            with self.lock:
                self.listening = False
                self._say(self.FACTS, torch.tensor(list(raw), dtype=torch.uint8))
        else:
            kind, raw = self._hear()
            while kind != self.FACTS:
                self._serve(kind, raw.view(-1, 4).tolist())
                kind, raw = self._hear()
            raw = bytes(raw.tolist())
        if raw:
            self.last = json.loads(raw)
        return self.last

    def _say(self, kind, data):
        """Send a message, whose data is a tensor of one dimension, to all ranks."""
        dist.broadcast(torch.tensor([kind, data.numel()]), 0, group=self.group)
        if data.numel():
            dist.broadcast(data, 0, group=self.group)

    def _hear(self):
        """(kind, data) of the next message."""
        head = torch.empty(2, dtype=torch.int64)
        dist.broadcast(head, 0, group=self.group)
        kind, count = head.tolist()
        data = torch.empty(count, dtype=torch.uint8 if kind == self.FACTS else torch.int64)
        if count:
            dist.broadcast(data, 0, group=self.group)
        return kind, data

    @torch.no_grad()
    def transfer(self, kind, rows, values):
        """On rank 0: READ elements of the shards on all ranks into the float32 chunk `values`, or
        WRITE them from it. rows: [index in `shards`, start, stop, step], whose elements are those of
        the chunk one after the other. Raises RuntimeError where the others do not listen, and when
        one of them is gone."""
        with self.lock, uninterrupted():  # half a transfer would leave a rank waiting for the rest
            if not self.listening:
                raise RuntimeError("the other ranks do not listen: shards stay as they are")
            if self.count > 1:
                self._say(kind, torch.tensor(rows).view(-1))
            for rank in range(self.count):
                packed, pieces = self._pieces(kind, rows, rank)
                if kind == self.WRITE:
                    for *_, place, part in pieces:
                        part.copy_(values[place])
                if rank == self.rank:
                    self._copy(kind, pieces)
                elif pieces:
                    (dist.recv if kind == self.READ else dist.send)(packed, rank, group=self.group)
                if kind == self.READ:
                    for *_, place, part in pieces:
                        values[place].copy_(part)

    @torch.no_grad()
    def _serve(self, kind, rows):
        """What another rank does for that."""
        packed, pieces = self._pieces(kind, rows, self.rank)
        if pieces and kind == self.WRITE:
            dist.recv(packed, 0, group=self.group)
        self._copy(kind, pieces)
        if pieces and kind == self.READ:
            dist.send(packed, 0, group=self.group)

    def _pieces(self, kind, rows, rank):
        """What a rank has to do with a transfer: (room for all the elements, on the CPU, [(shard,
        slice of the elements that the rank holds of it, slice of the chunk, part of the room)])."""
        shards, pieces, start = list(self.shards.values()), [], 0
        for index, *inside in rows:
            shard, wanted = shards[index], range(*inside)
            if kind == self.WRITE or rank in shard.readers:
                local, part = shard.held(rank, wanted)
                if part.start < part.stop:
                    pieces.append((shard, local, slice(start + part.start, start + part.stop)))
            start += len(wanted)
        counts = [place.stop - place.start for *_, place in pieces]
        packed = torch.empty(sum(counts))
        parts = packed.split(counts)
        return packed, [(*piece, part) for piece, part in zip(pieces, parts, strict=True)]

    def _copy(self, kind, pieces):
        for shard, local, _, part in pieces:
            if kind == self.READ:
                part.copy_(shard.local().reshape(-1)[local])
            else:
                protocol.fill(shard.local(), local, part)

    def spread(self, parameters):
        """Give every rank the parameters of rank 0, to the bit; shards are where they belong."""
        for parameter in parameters if self.count > 1 else ():
            if _is_sharded(parameter):
                continue
            raw = parameter.detach().contiguous().view(-1).view(torch.uint8)  # gloo has few dtypes
            dist.broadcast(raw, 0)
            if not self.leads:
                parameter.copy_(raw.view(parameter.dtype).view(parameter.shape))


class Sharded:
    """A parameter of a sharded model: each rank holds a run of its elements in row order, as
    fully_shard cuts it, or all of them. Stands for it in a FlatModel.

    parameter: a DTensor in which `_misplaced` finds no fault, or a plain tensor; count: of ranks.
    """

    def __init__(self, parameter, count):
        self.parameter, self.dtype = parameter, parameter.dtype
        self.device, self.is_cuda = parameter.device, parameter.is_cuda
        held = [self._run(rank) for rank in range(count)]
        self.runs = [run for run, _ in held]  # of each rank
        self.readers = {rank for rank, (_, is_first) in enumerate(held) if is_first}

    def _run(self, rank):
        """(range of the elements that a rank holds, whether it is the first that does)."""
        if not _is_sharded(self.parameter):
            return range(self.numel()), rank == 0
        placements, mesh = self.parameter.placements, self.parameter.device_mesh.mesh
        run, is_first, (place,) = range(self.numel()), True, (mesh == rank).nonzero().tolist()
        for placement, size, i in zip(placements, mesh.shape, place, strict=True):
            if placement.is_replicate():
                is_first &= i == 0
            else:  # as torch.chunk cuts: the last ones may be short, or empty
                rows, *others = self.parameter.shape
                width = -(-rows // size) * math.prod(others)
                run = run[i * width : (i + 1) * width]
        return run, is_first

    def numel(self):
        return self.parameter.numel()

    def local(self):
        """The tensor that this rank holds, to be changed in place."""
        tensor = self.parameter.detach()
        return tensor.to_local() if _is_sharded(tensor) else tensor

    def held(self, rank, wanted):
        """What a rank holds of `wanted`, a range of elements with a step: (slice of its own
        elements, slice of `wanted`)."""
        run, step = self.runs[rank], wanted.step
        first, last = (
            min(max(-(-(border - wanted.start) // step), 0), len(wanted))
            for border in (run.start, run.stop)
        )
        mine = wanted[first:last]
        return slice(mine.start - run.start, mine.stop - run.start, step), slice(first, last)


class ShardedModel(protocol.FlatModel):
    """The FlatModel of a sharded model, on rank 0: what is read and written goes to and from the
    ranks that hold it, chunk by chunk, by way of the CPU. Raises RuntimeError where those do not
    listen, or are gone. `names`: of the parameters, in the order of the manifest."""

    def __init__(self, ranks, names, first=0, stride=1):
        super().__init__([ranks.shards[name] for name in names], first, stride)
        self.ranks = ranks
        self.index = {shard: index for index, shard in enumerate(ranks.shards.values())}

    @property
    def device(self):
        """Where anchors and the like are kept: no GPU of one rank is to hold a whole model."""
        return torch.device("cpu")

    def _transfer(self, kind, start, values):
        for a, b in protocol.chunks(values.numel()):
            spans = self.spans(start + a, start + b)
            rows = [[self.index[shard], i.start, i.stop, i.step] for shard, i, _ in spans]
            self.ranks.transfer(kind, rows, values[a:b])

    def read(self, start, out, non_blocking=False):
        self._transfer(Ranks.READ, start, out)

    def subtract_from(self, start, numbers, out):
        self.read(start, out)
        torch.sub(self.rounded(start, numbers), out, out=out)

    def write(self, start, values):
        self.writes += 1
        self._transfer(Ranks.WRITE, start, values)


STARTED = weakref.WeakSet()  # the DiLoCoWorkers of this process


def _after_fork():
    for worker in STARTED:
        worker._disown()


os.register_at_fork(after_in_child=_after_fork)


class DiLoCoWorker:
    """One worker of a run: synchronizes `model` through `optimizer`'s step hook.

    model: torch.nn.Module whose trainable parameters (float) are synchronized.
    optimizer: torch.optim.Optimizer; each of its steps counts as one local step. Or a list of
    them, in the order in which they step: the last one's steps count, as all have stepped then.
    server: "host:port". sync_every: steps a round. worker_id: names this worker, unique in the run.
    num_fragments: slices that the model travels in, one after the other within `sync_every` steps.
    fragment_sync_delay: steps from push to adoption, at most `sync_every`; 0 waits for the reply.
    Default: the interval between two pushes, or 0 for one fragment.
    fragment_update: what becomes of the steps since the push. "rebase" keeps them on top of the new
    global slice; "predict" too, but they start from where the slice would be if all workers had
    pushed what this one has, so that less is left to move on adoption (4 more bytes a parameter);
    "mix" takes fragment_update_alpha of the local slice and the rest of the global (the paper's).
    files: {name: text} of descriptive files (config.json, ...), given to a server that has none.
    source: names the training data; all workers of a run must name the same.
    reconnect_timeout: seconds that a step waits for a server that cannot be reached, once per
    outage; then training goes on, and what it does is sent when the server is back.
    state: what `state_dict` gave, to go on with local work that had not been sent.
    residual: path of what `save_residual` wrote with that; or `residual()` is in it as "residual".

    Where torch.distributed is initialized, all its ranks are one worker: each makes one of these, rank 0
    speaks to the server, and all have the same parameters to the bit after each step. Of a model that
    `fully_shard` has been applied to, each keeps its shards; rank 0 holds the anchor, on the CPU.
    Raises ValueError where a DTensor is placed in another way than that does by default.

    A context manager: joins on entry, and on exit sends what is left and leaves. Raises Refused
    when the server says no (wrong model, wrong setting), and ConnectionError on entry and exit when
    there is no server for `reconnect_timeout`. `optimizer.step()` raises Refused, and
    FloatingPointError where three pushes running are not finite; nothing else.
    """

    def __init__(
        self,
        model,
        optimizer,
        server=None,
        sync_every=None,
        worker_id=None,
        *,
        num_fragments=None,
        fragment_sync_delay=None,
        fragment_update="predict",
        fragment_update_alpha=0.5,
        files=None,
        source="",
        reconnect_timeout=RECONNECT_SECONDS,
        state=None,
        residual=None,
    ):
        self.server = server or os.environ.get("DILOCO_SERVER")
        if not self.server:
            raise ValueError("no server: pass server='host:port' or set DILOCO_SERVER")
        self.saved, self.residual_path = state or {}, residual
        self.sync_every = int(sync_every or os.environ.get("DILOCO_SYNC_EVERY") or SYNC_EVERY)
        self.num_fragments = int(num_fragments or os.environ.get("DILOCO_NUM_FRAGMENTS") or 1)
        self.update = fragment_update
        self.alpha = float(fragment_update_alpha) if fragment_update == "mix" else None
        self.delay = fragment_sync_delay
        if self.delay is None:
            self.delay = 0 if self.num_fragments == 1 else self.sync_every // self.num_fragments
        self._check_settings()
        self.worker_id = (
            worker_id
            or os.environ.get("DILOCO_WORKER_ID")
            or self.saved.get("worker_id")
            or f"{socket.gethostname()}-{os.getpid()}"
        )
        self.session = secrets.token_hex(8)
        self.source, self.reconnect_timeout = source, reconnect_timeout
        self.files = files if files is not None else _config_of(model)
        several = isinstance(optimizer, list | tuple)
        self.optimizers = [_unwrapped(each) for each in (optimizer if several else [optimizer])]
        if not self.optimizers:
            raise ValueError("optimizer is an empty list: its last one's steps are to be counted")
        self.optimizer = self.optimizers[-1]
        self.fsdp_modules = _fsdp_modules(model)
        self._reshard()
        self.named, self.frozen, self.buffers = _trainable(model), _frozen(model), Buffers(model)
        self.is_sharded = any(map(_is_sharded, [*self.named.values(), *self.frozen.values()]))
        self.fingerprints = {}  # of frozen parameters, worked out once
        self.fetched = 0  # frozen parameters that were taken from the server

        self.control = None  # the Connection of join, heartbeat and leave
        self.control_lock = threading.Lock()
        self.data = []  # idle Connections for pushes
        self.used = set()  # those in use
        self.pool = Pool(self.num_fragments)
        self.closed = threading.Event()
        self.must_join = threading.Event()  # the server does not know this worker any more
        self.interrupt = threading.Event()  # ends the flights: the run is joined again, or left
        self.down_since = None  # when the outage of the server that lasts still was noticed
        self.heart = None
        self.hook = None
        self.anchor_lock = threading.Lock()  # while a slice of the anchor moves
        self.fragments, self.snapshots = [], []

        self.run, self.ticket = self.saved.get("run", ""), ""  # the run, and the place in it
        self.index, self.rank, self.world = 0, 0, 1
        self.shares, self.num_shares = (0,), 1  # of the data: those that are this worker's
        self.step = self.run_step = 0  # mine, and that of the worker that was furthest
        self.local_step = 0  # optimizer steps of this process
        self.next, self.wait = 0, self._due(0)  # fragment pushed next, and in how many steps
        self.tokens = 0
        self.loss = None
        self.joins = 0
        self.kept_local = self.kept_place = False  # local work of a checkpoint; also where it was
        self.ending = self.flushed = self.stop_ordered = self.away = False
        self.leave_by = None  # when a worker that was told to leave waits no longer
        self.fragment_syncs = self.dropped_steps = self.mismatches = self.refusals = 0
        self.ranks = None  # those of this worker, from `start` on
        self.last_sync_time = self.total_sync_time = self.stall_time = 0.0
        self.last_send = self.last_recv = 0
        self.started = time.monotonic()

    def _check_settings(self):
        if self.sync_every < 1:
            raise ValueError(f"sync_every must be 1 or more, not {self.sync_every}")
        if not 1 <= self.num_fragments <= self.sync_every:
            raise ValueError(
                f"num_fragments is {self.num_fragments} and sync_every {self.sync_every}: every "
                "fragment needs a step of its own, so the number lies between 1 and sync_every"
            )
        if not 0 <= self.delay <= self.sync_every:
            raise ValueError(
                f"fragment_sync_delay must be within 0 and sync_every ({self.sync_every}), "
                f"not {self.delay}"
            )
        if self.update not in ("predict", "rebase", "mix"):
            raise ValueError(f"fragment_update is predict, rebase or mix, not {self.update!r}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"fragment_update_alpha must be within 0 and 1, not {self.alpha}")

    # --- Joining ---

    def start(self):
        """Join the run (waits until it starts), take its parameters and hook into the optimizer."""
        STARTED.add(self)
        try:
            self.ranks = Ranks()
            if self.is_sharded:
                count = self.ranks.count
                every = {**self.named, **self.frozen}
                self.ranks.shards = {n: Sharded(p, count) for n, p in every.items()}
            with torch.no_grad(), self._telling():
                if self.ranks.leads:
                    self._enter_run()
        except BaseException as error:
            if self.control and not self.joins:
                self.control.close()  # to `leave` there, one would have to wait for the run to start
            self.close(reason_of(error))
            raise
        self.started = time.monotonic()
        hook = torch.compiler.disable(self._stepped)  # a compiled step ends where this begins
        self.hook = self.optimizer.register_step_post_hook(hook)
        return self

    __enter__ = start

    def _enter_run(self):
        while True:
            due = retry(self._join, self.reconnect_timeout, f"server {self.server}", self.closed)
            if self._await_shares():
                break
        self.heart = threading.Thread(target=self._heartbeat_loop, daemon=True)
        self.heart.start()
        atexit.register(self._close_at_exit)
        self._align(due)

    def __exit__(self, kind, error, _):
        try:
            if kind is None:
                self.flush()
        except BaseException as failure:
            self.close(reason_of(failure))
            raise
        self.close(reason_of(error) if kind else "done")

    def _connect(self):
        session = {"worker": self.worker_id, "session": self.session}
        return protocol.connect(self.server, session)[0]

    def _join(self):
        """Join or join again, and lay what is not yet in the global model on top of it. Returns
        what the server says of the next pushes, for `_align`."""
        with self.control_lock:
            if self.control:
                self.control.close()
            conn = self.control = self._connect()
            self.must_join.clear()
            reply = conn.request("join", self._introduction(), on_wait=self._say_awaited)
            while reply.type == "init":
                reply = self._upload(conn, reply)
            names, params, buffers = self._read_model(conn, reply)
        with torch.no_grad(), uninterrupted():
            if not self.fragments:
                self._enter(reply, params, names)
            else:
                self._reenter(reply, params)
            self.buffers.enter(buffers, keep=self.kept_local or self.joins > 0)
        self.run, self.ticket = reply.field("run", str), reply.field("ticket", str)
        if differing := reply.field("frozen", list, []):
            self._fetch_frozen(differing)
        self.joins += 1
        self.down_since = None
        self.index = reply.field("index", int)
        self.num_shares = reply.field("num_shares", int, low=1)
        self.heartbeat_seconds = reply.field("heartbeat_seconds", float, low=0.01)
        self._take_share(reply)
        self._say_joined()
        return reply.field("due", dict)

    def _introduction(self):
        """What a join says of this worker."""
        return {
            "manifest": protocol.manifest_to_json(protocol.specs_of(self.named.items())),
            "buffers": protocol.manifest_to_json(self.buffers.specs),
            "frozen": self._describe_frozen(),
            "sync_every": self.sync_every,
            "num_fragments": self.num_fragments,
            "source": self.source,
            "host": socket.gethostname(),
            "ranks": self.ranks.count,
            "step": self.step,
            "position": self.position,
            "run": self.run,
            "versions": [fragment.version for fragment in self.fragments] or self._resumable(),
            "folded": [fragment.folded for fragment in self.fragments],
        }

    def _read_model(self, conn, reply):
        """The global model that a join is answered with: (names of the parameters in the server's
        order, their float32 vector on the CPU, {name: buffer as it travels})."""
        buffers, names = reply.split_buffers(), [spec.name for spec in reply.specs]
        if sorted(names) != sorted(self.named):
            raise ProtocolError("join: the server sent other tensors than it was told")
        reply.expect(TensorSpec(n, torch.float32, tuple(self.named[n].shape)) for n in names)
        params = torch.empty(sum(spec.numel for spec in reply.specs))
        conn.read(params)
        return names, params, self._read_buffers(conn, buffers)

    def _say_joined(self):
        labels = [fragment.version for fragment in self.fragments]
        self._audit("joined", labels=labels, index=self.index, again=self.joins > 1)
        for fragment in self.fragments:
            self._audit_anchor(fragment)
        numbers = [number for _, number in labels]
        log(
            f"{self.worker_id} {'has joined again as' if self.joins > 1 else 'is'} worker "
            f"{self.index}, {self.world} in all, at step {self.step}, version "
            f"{numbers[0] if len(numbers) == 1 else numbers}"
        )

    def _describe_frozen(self):
        """[name, dtype, shape, fingerprint] of each frozen parameter."""
        specs = protocol.specs_of(self.frozen.items())
        if self.is_sharded and not self.fingerprints:
            self.fingerprints = {
                spec.name: protocol.fingerprint_of_pieces(self._gathered([spec])) for spec in specs
            }
        elif self.frozen and not self.fingerprints:
            with concurrent.futures.ThreadPoolExecutor() as threads:
                found = threads.map(protocol.fingerprint, self.frozen.values())
                self.fingerprints = dict(zip(self.frozen, found, strict=True))
        listed = protocol.manifest_to_json(specs)
        return [[*entry, self.fingerprints[entry[0]]] for entry in listed]

    def _fetch_frozen(self, names):
        """Take frozen parameters that differ from the server's."""
        if not self.frozen.keys() >= set(map(str, names)):
            raise ProtocolError("join: the server names frozen tensors that are not this worker's")
        chosen = {name: self.frozen[name] for name in names}
        conn = self._connect()
        self.data.append(conn)
        try:
            reply = conn.request("fetch", {"frozen": names})
        except Refused as refusal:
            if refusal.code != "rejoin":
                raise
            raise ConnectionError(str(refusal)) from None  # it was restarted: join once more
        reply.expect(protocol.specs_of(chosen.items()))
        for spec, parameter in zip(reply.specs, chosen.values(), strict=True):
            values = torch.empty(spec.shape, dtype=spec.dtype)
            conn.read(values)
            with torch.no_grad():
                if self.is_sharded:
                    ShardedModel(self.ranks, [spec.name]).write(0, values.view(-1).float())
                else:
                    parameter.copy_(values)
            self.fingerprints[spec.name] = protocol.fingerprint(values)
        self.fetched += len(names)
        log(f"{self.worker_id}: {len(names)} frozen tensors, such as {names[0]!r}, were not those of the "
            f"server's -m: took {protocol.payload_bytes(reply.specs) / 1e6:.3g} MB of them")  # fmt: skip

    def _read_buffers(self, conn, specs):
        """The buffers that end a reply, by their own names. Raises ProtocolError where one is none
        of this worker's."""
        own = dict(zip(protocol.buffer_specs(self.buffers.specs), self.buffers.places, strict=True))
        if not own.keys() >= set(specs):
            raise ProtocolError("the server sent buffers that are none of this model's")
        values = {own[spec]: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
        for tensor in values.values():
            conn.read(tensor)
        return values

    def _resumable(self):
        """The versions that the local work of a checkpoint started from. A push that was under way
        when it was written has lost the values that it was made from: what came after it cannot be
        told from what it carries."""
        saved = self.saved.get("fragments", [])
        labels = [None if old["in_flight"] else old["version"] for old in saved]
        return labels if len(labels) == self.num_fragments else []

    def _upload(self, conn, reply):
        """Bring the model that the run starts from, or what of it the server lacks; or the slices of
        the anchor of which it lost the newest versions when it died."""
        newer, wanted = (
            reply.field("fragments", list, []),
            set(map(str, reply.field("tensors", list))),
        )
        files = {n: t.encode() for n, t in self.files.items() if n in protocol.FILE_NAMES}
        raw = {
            f"file:{name}": torch.frombuffer(bytearray(text), dtype=torch.uint8)
            for name, text in files.items()
        }
        if newer:
            chosen = {f"slice:{k}": self.fragments[k].anchor for k in newer}
            specs = protocol.specs_of(chosen.items())
            parameters = (anchor.cpu() for anchor in chosen.values())
        else:
            specs = protocol.specs_of((n, p) for n, p in self.named.items() if n in wanted)
            parameters = (self.named[spec.name].detach().cpu().contiguous() for spec in specs)
            if self.is_sharded:
                parameters = self._gathered(specs)
        buffers = {
            n: t for n, t in (self.buffers.anchor or self.buffers.now()).items() if n in wanted
        }
        return conn.request(
            "init",
            {"files": {name: len(text) for name, text in files.items()}},
            specs + protocol.specs_of_buffers(buffers) + protocol.specs_of(raw.items()),
            itertools.chain(parameters, buffers.values(), raw.values()),
            on_wait=self._say_awaited,
        )

    def _gathered(self, specs):
        """Parameters of a sharded model, in pieces of up to CHUNK elements, on the CPU. Through
        float32, which is what the server makes of them."""
        flat = ShardedModel(self.ranks, [spec.name for spec in specs])
        for spec, first, last in protocol.ranges(specs):
            for start, stop in protocol.chunks(last - first):
                piece = torch.empty(stop - start)
                flat.read(first + start, piece)
                yield piece.to(spec.dtype)

    def _say_awaited(self, fields):
        if self.leave_by is not None:
            raise ConnectionError("this worker leaves")
        log(f"{self.worker_id} waits for {fields.get('awaited')}")

    def _enter(self, reply, params, names):
        """The first join of this process: set up, and take the parameters or keep one's own."""
        count = self.num_fragments
        up, down = (CODECS[reply.field(f"{way}_codec", str)] for way in ("upload", "download"))
        wanted = (
            up.lossy and reply.field("error_feedback", bool, True),  # a residual
            self.update == "predict" and self.delay,  # a velocity
        )
        for k in range(count):
            if self.is_sharded:
                flat = ShardedModel(self.ranks, names, k, count)
            else:
                flat = protocol.FlatModel([self.named[name] for name in names], k, count)
            anchor = protocol.fragment_of(params, k, count).to(flat.device).contiguous()
            more = (torch.zeros_like(anchor) if wants else None for wants in wanted)
            self.fragments.append(Fragment(flat, anchor, *more, up, down))
        self.step = self.run_step = reply.field("step", int)
        held, kept = self._resumable() or [None] * count, []
        for k, fragment in enumerate(self.fragments):
            fragment.version, fragment.outer = (
                reply.field(n, list)[k] for n in ("versions", "outer")
            )
            fragment.seq, fragment.folded = (reply.field(n, list)[k] for n in ("seqs", "folded"))
            kept.append(fragment.version == held[k])
            if kept[k]:
                # Not what the server says: a push that was made after the checkpoint and did not
                # get through is made again under its name.
                old = self.saved["fragments"][k]
                fragment.seq, fragment.mark = old["seq"], (-old["steps"], 0)
            else:
                fragment.move(fragment.anchor)
        if self.saved:
            self._load_residual()
        self.kept_local = any(kept)
        if self.kept_local:
            self.step = self.saved["step"]
        elif self.saved:
            log("the server has moved on since the checkpoint: took the global model")
        if all(kept):  # the others wait for it just there
            left = [self._due(k) - self.saved["position"] for k in range(count)]
            self.next = next(k for k in range(count) if left[k] > 0)
            self.wait, self.kept_place = left[self.next], True

    def _load_residual(self):
        """Take up what rounding had lost of the pushes before the checkpoint."""
        lossy = {f"residual.{k}": f.residual for k, f in enumerate(self.fragments)
                 if f.residual is not None}  # fmt: skip
        if not lossy:
            return
        try:
            if "residual" in self.saved:
                fields, tensors = self.saved, self.saved["residual"]
            else:
                fields, tensors = protocol.load_file(self.residual_path)
            if protocol.specs_of(tensors.items()) != protocol.specs_of(lossy.items()):
                raise ProtocolError("it is of another model, or of other fragments")
            if fields.get("run") != self.saved.get("run"):
                raise ProtocolError("it is of another run")
        except (OSError, TypeError, ProtocolError) as error:
            return log(f"{self.worker_id}: no residual beside the checkpoint ({error}): what rounding "
                       "lost of the pushes before it is not made up for")  # fmt: skip
        for name, residual in lossy.items():
            residual.copy_(tensors[name])

    def _reenter(self, reply, params):
        """A later join: the server was restarted, or had given this worker up. Local work stays, on
        top of the new global parameters: all of it, or where a push was folded after all, what
        came after the push. Work that is too old for the server goes."""
        names = ("versions", "seqs", "outer", "folded", "staleness")
        news = zip(*(reply.field(name, list) for name in names), strict=True)
        limit, stale = reply.field("max_staleness", int), 0
        for k, (fragment, news_of) in enumerate(zip(self.fragments, news, strict=True)):
            label, seq, outer, folded, staleness = news_of
            flight = fragment.flight
            new = protocol.fragment_of(params, k, self.num_fragments).to(fragment.device)
            if flight and seq >= flight.fields["seq"] and self._is_sound(fragment, flight):
                fragment.keep_prediction(flight)
                fragment.anchor.copy_(new)
                fragment.moved(flight, self.alpha)
                self.buffers.anchor |= flight.buffers  # no local changes any more
                self._settle(fragment)
            elif label != fragment.version:
                if flight:
                    self._release(fragment)
                fragment.move(new, since=fragment.flat.rounded(0, fragment.anchor))
                fragment.anchor.copy_(new)
                if self.local_step > fragment.mark[0]:
                    fragment.staleness += staleness
                    stale = max(stale, fragment.staleness)
            else:
                fragment.anchor.copy_(new)  # where a bit of it was wrong, it no longer is
            fragment.version, fragment.seq, fragment.outer = label, max(fragment.seq, seq), outer
            fragment.folded = folded
        if reply.field("run", str) != self.run:
            self._drop("the server has the model of another run")
        elif stale > limit:
            self._drop(f"the global model is {stale} rounds ahead, over --max-staleness {limit}")

    @staticmethod
    def _is_sound(fragment, flight):
        """Whether a push was fit to count: one that is not finite is named as folded, so that its
        round need not wait for it, but nothing of it is in the global model."""
        floats = [b.reshape(-1) for b in flight.buffers.values() if b.is_floating_point()]
        return not flight.steps or (
            protocol.all_finite(fragment.up, fragment.push.tensors, fragment.size)
            and all(map(protocol.within, floats))
        )

    def _align(self, due):
        """Begin where the others are: push at once what they have begun to push, and come to the
        next fragment when they do. So no two workers wait for each other on different ones. Where
        the server names no time, and the next one is the same as here, the place is kept."""
        again = [fragment for fragment in self.fragments if fragment.flight]
        place, steps, relaunched = due["next"], due["steps"], []
        while self.fragments[place] in again:  # pushed before the connection was lost: once more
            again.remove(self.fragments[place])
            relaunched.append(self.fragments[place])
            place, steps = (place + 1) % self.num_fragments, None
        for fragment in again:  # not what the others wait for next: its time will come
            self._release(fragment)
        if not self.kept_place and (place != self.next or steps is not None):
            whole = self._due(place) - (self._due(place - 1) if place else 0)
            self.next, self.wait = place, whole if steps is None else min(steps, whole)
        for fragment in relaunched:
            flight = fragment.flight
            if flight.dropped:
                flight.steps = flight.fields["steps"] = 0
            flight.error, flight.arrived = None, False
            flight.done.clear()
            self._launch(fragment)
        opened = [] if self.kept_place else due["open"]  # it comes to them in its own time
        self.kept_place = False
        for k in opened:
            if self.fragments[k].flight is None:
                self._begin(self.fragments[k])
                if self.delay == 0:
                    self._adopt(self.fragments[k])

    def _due(self, k):
        """The step of the cycle after which fragment k is pushed."""
        return (k + 1) * self.sync_every // self.num_fragments

    @property
    def position(self):
        """Steps since the cycle began."""
        return (self._due(self.next) - self.wait) % self.sync_every

    def _take_share(self, reply):
        """What the server says of who reads what. Returns whether that is news."""
        before = self.shares
        self.rank = reply.field("rank", int, self.rank)
        self.world = reply.field("world", int, self.world, low=1)
        self.shares = tuple(reply.field("shares", list, self.shares))
        return self.shares != before

    def _await_shares(self):
        """Wait until the others have let go of what this worker is to read, a heartbeat or two.
        False where the server is gone meanwhile."""
        while self.source and not self.shares and not self.closed.wait(0.1):
            with self.control_lock:
                try:
                    self._heartbeat()
                except (OSError, ProtocolError, Refused):
                    return False
        return True

    # --- The ranks of one worker ---

    @contextlib.contextmanager
    def _telling(self):
        """At the end of the block rank 0 tells the others where the worker is, and hands them its
        parameters where they have changed; if it failed there, they fail too. Within it rank 0 can
        read and write their shards."""
        self._reshard()
        self.ranks.listening = True
        try:
            yield
        except BaseException as error:
            if self.ranks.leads:
                self.ranks.share({"error": reason_of(error)})
            raise
        if self.ranks.count == 1:
            return
        before = self.ranks.last
        writes = self.buffers.writes + sum(fragment.flat.writes for fragment in self.fragments)
        facts = {name: getattr(self, name) for name in TOLD}
        facts |= {"ahead": self.step - self.local_step, "shares": list(self.shares)}
        told = self.ranks.share({**facts, "writes": writes, "error": ""})
        if told["error"]:
            raise ConnectionError(f"rank 0 of {self.worker_id}: {told['error']}")
        if before is None or told["writes"] != before["writes"]:
            self.ranks.spread([*self.named.values(), *self.buffers.local.values()])
        if told["fetched"] != (before["fetched"] if before else 0):
            self.ranks.spread(self.frozen.values())
        if not self.ranks.leads:
            self._heed(told)

    def _reshard(self):
        """Let go of whole parameters that a forward pass without a backward pass has left in a
        module: later ones would go on with them, whatever is written into the shards."""
        for module in self.fsdp_modules:
            module.reshard()

    def _heed(self, told):
        """What another rank than 0 learns from it."""
        if told["dropped_steps"] != self.dropped_steps:
            self._clear_moments()
        for name in TOLD:
            setattr(self, name, told[name])
        self.step, self.shares = self.local_step + told["ahead"], tuple(told["shares"])

    # --- Rounds ---

    def _stepped(self, optimizer, args, kwargs):
        """The optimizer's hook. A subclass's `step` that calls its parent's runs it twice."""
        if not _is_nested_step(optimizer):
            self._after_step()

    def _after_step(self):
        """A local step is through."""
        with torch.no_grad(), self._telling():
            self.local_step += 1
            if self.ranks.leads:
                self._step_on()

    def _step_on(self):
        """Count the step, adopt what is due, then push what is due."""
        self.step += 1
        self.wait -= 1
        if self.must_join.is_set():
            self._rejoin()
        for fragment in self.fragments:
            if fragment.flight and self._is_due(fragment.flight):
                self._adopt(fragment)
        if self.wait > 0:
            return
        fragment, before = self.fragments[self.next], self._due(self.next) % self.sync_every
        self.next = (self.next + 1) % self.num_fragments
        self.wait = self._due(self.next) - before
        self._begin(fragment)
        if self.delay == 0 and fragment.flight:
            self._adopt(fragment)

    def _is_due(self, flight):
        """Whether the reply to a push is to be adopted now. One that training has gone on without
        is adopted when it comes; what needs another join waits for a heartbeat to get through."""
        if flight.late:
            return flight.done.is_set() and not flight.error
        return self.local_step >= flight.adopt_at

    @torch.no_grad()
    def flush(self):
        """Adopt what is under way, send the steps since then as the closing round, and take the
        final global model. Once; later calls do nothing. Raises ConnectionError where the server
        cannot be reached for `reconnect_timeout`. After `part`, what has arrived is left to count."""
        if self.flushed:
            return
        with self._telling():
            if self.ranks.leads:
                self._close_run()
            self.flushed = True

    def _close_run(self):
        self.down_since, self.ending = None, True
        for fragment in self.fragments:
            if fragment.flight:
                self._adopt(fragment)
        self.flushed = True
        for fragment in self.fragments:  # all at once: others may still wait for any of them
            if fragment.flight is None:
                self._begin(fragment)
        for fragment in self.fragments:
            while not fragment.closed:
                if fragment.flight is None:  # given up for joining again
                    self._begin(fragment)
                if not self._adopt(fragment):
                    if self.leave_by is not None:
                        return
                    raise ConnectionError(
                        f"server {self.server} cannot be reached: {self.steps} steps of "
                        f"{self.worker_id} have not been sent"
                    )

    def part(self, seconds=PARTING_SECONDS):
        """Leave soon: from now on a step, or `flush`, waits at most so long for its push to arrive,
        and for no other worker. A push that has arrived counts. Safe to call in a signal handler."""
        self.leave_by = time.monotonic() + seconds

    def _begin(self, fragment):
        """Send a fragment on its way: note the local values, and leave the rest to the pool. Where
        the push before it is still pending, its steps go with a later one."""
        if fragment.flight:
            joins = self.joins
            if not self._adopt(fragment) or self.joins != joins:
                return
        steps, tokens = self.local_step - fragment.mark[0], self.tokens - fragment.mark[1]
        fragment.seq += 1
        fields = {
            "fragment": self.fragments.index(fragment),
            "seq": fragment.seq,
            "base": fragment.version,
            "staleness": fragment.staleness,
            "step": self.step,
            "position": self.position,
            "steps": steps,
            "tokens": tokens,
            "loss": self._sane_loss(),
            "closing": self.flushed,
        }
        named = {name: fields[name] for name in ("fragment", "seq", "base")}
        self._audit("push", **named, first=fragment.mark[0], last=self.local_step)
        snapshot = None
        if self.delay and not self.flushed:
            snapshot = self._copy_out(fragment)
        fragment.flight = Flight(
            fields,
            steps,
            (self.local_step, self.tokens),
            self.local_step + self.delay,
            snapshot,
            self.buffers.changed() if steps and self._carries_buffers(fragment) else {},
        )
        if snapshot is not None and fragment.velocity is not None:
            fragment.predict(fragment.flight)
        self._launch(fragment)

    def _carries_buffers(self, fragment):
        return fragment is self.fragments[-1]

    def _copy_out(self, fragment):
        """A copy of a slice of the local parameters, where they live."""
        if self.snapshots:
            snapshot = self.snapshots.pop()
        else:
            largest = max(fragment.size for fragment in self.fragments)
            snapshot = torch.empty(largest, device=fragment.device)
        fragment.flat.read(0, snapshot[: fragment.size])
        return snapshot

    def _launch(self, fragment):
        flight = fragment.flight
        # The pool's thread has another stream, perhaps.
        flight.queued = [stream.record_event() for stream in fragment.flat.streams()]
        self.pool.submit(lambda: self._fly(fragment, flight))

    @torch.no_grad()
    def _fly(self, fragment, flight):
        """A push from encoding to the new anchor; everything but the local parameters, which belong
        to the training thread. Never raises: see `flight.error`."""
        began = time.monotonic()
        try:
            for event in flight.queued:
                event.synchronize()
            reply, whole = self._persist(lambda: self._exchange(fragment, flight))
            with flight.lock:
                fragment.keep_prediction(flight)
                still = flight.snapshot is None and not reply.fields.get("refused")
                with self.anchor_lock:
                    equal = fragment.advance(reply, whole, move=still)
                flight.moved = still and equal
            if not equal:  # the anchor is not what the server holds
                self.mismatches += 1
                log(f"WARNING: checksum mismatch at {fragment.version}; fetching the parameters")
                self._persist(lambda: self._fetch(fragment))
            self._audit_anchor(fragment)
            flight.reply = reply
        except BaseException as error:
            flight.error = error
            if isinstance(error, Refused) and error.code == "rejoin":
                self.must_join.set()
        for stream in fragment.flat.streams():
            stream.synchronize()
        flight.seconds += time.monotonic() - began
        flight.done.set()

    def _persist(self, action):
        """Call `action` until it works, with growing pauses. Raises Refused, and ConnectionError
        where the flights are interrupted."""
        pause = 0.2
        while True:
            try:
                result = action()
                self._reached()
                return result
            except (OSError, ProtocolError) as error:
                self._note_outage(error)
            if self.interrupt.wait(min(pause, LONGEST_PAUSE_SECONDS)):
                raise ConnectionError("interrupted")
            pause *= 1.5

    def _note_outage(self, error):
        while self.data:  # they have most likely died of the same
            with contextlib.suppress(IndexError):
                self.data.pop().close()
        if self.down_since is None and not self.interrupt.is_set():
            self.down_since = time.monotonic()
            log(f"server {self.server}: {error}; trying again")

    def _reached(self):
        if self.down_since is not None:
            log(f"server {self.server} is there, after {time.monotonic() - self.down_since:.1f} s")
        self.down_since = None

    def _exchange(self, fragment, flight):
        """Send a push and read its reply: (message, the slice in full or None)."""
        conn = self.data.pop() if self.data else self._connect()
        self.used.add(conn)
        if self.interrupt.is_set():
            conn.close()
        before = conn.bytes_out, conn.bytes_in
        try:
            push = fragment.push
            specs, payload = [], []
            if flight.steps:
                specs = push.specs + protocol.specs_of_buffers(flight.buffers)
                payload = itertools.chain(self._payload(fragment, flight), flight.buffers.values())
            fields = {**flight.fields, "ticket": self.ticket}
            reply = conn.request("push", fields, specs, payload, lambda _: self._arrived(flight))
            whole = self._read_update(conn, fragment, reply)
        except BaseException:
            conn.close()
            raise
        finally:
            self.used.discard(conn)
        self.last_send, self.last_recv = conn.bytes_out - before[0], conn.bytes_in - before[1]
        self.data.append(conn)
        return reply, whole

    @staticmethod
    def _payload(fragment, flight):
        """The bytes of a push, chunk by chunk: while one is on its way the next is made."""
        scratch = fragment.scratch()
        for start, stop, first, last in protocol.chunk_bytes(fragment.up, fragment.size):
            if flight.encoded < stop:
                with flight.lock:
                    fragment.encode(flight, start, stop, scratch)
            yield fragment.push.raw[first:last]

    def _arrived(self, flight):
        flight.arrived = True
        self._reached()

    def _read_update(self, conn, fragment, reply):
        full = [TensorSpec("slice", torch.float32, (fragment.size,)), Checksum.SPEC]
        whole, update, news = None, fragment.update, reply.split_buffers()
        if reply.specs == full:
            whole = torch.empty(fragment.size)
            conn.read(whole)
            conn.read(update.tensors["checksum"])
        elif reply.specs == [Checksum.SPEC]:
            conn.read(update.tensors["checksum"])
        else:
            reply.expect(update.specs)
            conn.read(update.raw)
        if self._carries_buffers(fragment):
            self.buffers.news = self._read_buffers(conn, news)
        return whole

    def _fetch(self, fragment):
        """Take a slice of the anchor in full."""
        with contextlib.closing(self._connect()) as conn:
            reply = conn.request("fetch", {"fragment": self.fragments.index(fragment)})
            whole = self._read_update(conn, fragment, reply)
        with self.anchor_lock:
            fragment.advance(reply, whole)

    def _adopt(self, fragment):
        """Wait for the reply to a fragment's push, and move the local parameters with the anchor.
        False where training is to go on without it: the push stays pending."""
        flight, began = fragment.flight, time.monotonic()
        try:
            while fragment.flight is flight:
                if not self._await(flight):
                    return self._go_on(fragment)
                if flight.error and not self._needs_join(flight.error):
                    raise flight.error
                if not (flight.error or self.must_join.is_set()):
                    self._finish(fragment)
                elif not self._rejoin():
                    return fragment.flight is not flight or self._go_on(fragment)
            return True
        finally:
            self.stall_time += time.monotonic() - began

    def _await(self, flight):
        """Wait until it is known what became of a push, or can be by joining again. False when an
        outage has lasted too long for that, or a worker that leaves need not wait any longer."""
        while not flight.done.is_set() and not self.must_join.is_set():
            left = 0.5  # how long an order to join again, or to leave, may go unnoticed
            if self.down_since is not None:
                left = min(left, self.down_since + self.reconnect_timeout - time.monotonic())
            if self.leave_by is not None:
                left = 0 if flight.arrived else min(left, self.leave_by - time.monotonic())
            if left <= 0:
                return False
            flight.done.wait(left)
        return True

    @staticmethod
    def _needs_join(error):
        interrupted = isinstance(error, ConnectionError)
        return interrupted or (isinstance(error, Refused) and error.code == "rejoin")

    def _go_on(self, fragment):
        """Leave a push pending, and let training go on from the values that it was made from."""
        flight = fragment.flight
        with flight.lock:  # they may be being read
            if flight.snapshot is None:
                flight.snapshot = self._copy_out(fragment)
                for stream in fragment.flat.streams():
                    stream.synchronize()
        if not flight.late and self.leave_by is None:
            log(f"WARNING: {self.worker_id} trains on without the server; the push of "
                f"{flight.steps} steps is kept until it is back")  # fmt: skip
        flight.late = True
        return False

    def _finish(self, fragment):
        """Adopt the reply to a push, which is there."""
        flight, reply = fragment.flight, fragment.flight.reply
        if refused := reply.field("refused", str, ""):
            stale = reply.field("stale", bool, False)
            self.refusals += not stale
            self._drop(refused)
            if self.refusals >= MAX_REFUSALS:
                raise FloatingPointError(
                    f"{refused}, {self.refusals} times running: training diverges on "
                    f"{self.worker_id}; lower the learning rate, clip gradients, or check its data "
                    "and hardware"
                )
        else:
            self.refusals = 0
            with uninterrupted():
                fragment.moved(flight, self.alpha)
                self._settle(fragment)
        self.run_step = max(self.run_step, reply.field("step", int))
        self.last_sync_time = flight.seconds
        self.total_sync_time += flight.seconds

    def _settle(self, fragment):
        """The steps of a fragment's push are in the global model."""
        flight = fragment.flight
        if not (flight.reply and flight.reply.fields.get("refused")):
            self._audit("settled", fragment=flight.fields["fragment"], seq=flight.fields["seq"])
        if self._carries_buffers(fragment):
            self.buffers.adopt(flight.buffers)
        fragment.mark, fragment.staleness = flight.mark, 0
        fragment.closed = flight.fields["closing"]
        self.fragment_syncs += 1
        self._forget_flight(fragment)

    def _release(self, fragment):
        """Take back a push that is not in the global model: its steps go with the next."""
        fields = fragment.flight.fields
        self._audit("released", fragment=fields["fragment"], seq=fields["seq"])
        fragment.take_back(fragment.flight)
        fragment.undo_prediction(fragment.flight)
        self._forget_flight(fragment)

    def _forget_flight(self, fragment):
        if fragment.flight.snapshot is not None:
            self.snapshots.append(fragment.flight.snapshot)
        fragment.flight = None

    def _rejoin(self):
        """Join again: the server was restarted, or had given this worker up. What became of the
        pushes under way is learnt from it. False where it cannot be reached."""
        self.interrupt.set()
        for conn in self.used.copy():
            conn.close()
        for fragment in self.fragments:
            if fragment.flight:
                fragment.flight.done.wait()
        self.interrupt.clear()
        for fragment in self.fragments:
            if fragment.flight and not fragment.flight.error:
                self._finish(fragment)
        left = self.reconnect_timeout
        if self.down_since is not None:
            left = max(0.0, self.down_since + left - time.monotonic())
        if self.leave_by is not None:
            left = 0.0
        try:
            due = retry(self._join, left, f"server {self.server}", self.closed)
        except ConnectionError as error:
            self._note_outage(error)
            self.must_join.clear()  # a heartbeat that gets through will say so again
            return False
        except BaseException:
            self.control.close()  # within a message, perhaps: none can follow it
            raise
        self._await_shares()
        self._align(due)
        return True

    def _drop(self, why):
        """A push was refused. All that is local goes, in all fragments: what is not finite in one
        would be in the others after the next step."""
        dropped = self.steps
        self.dropped_steps += dropped
        for k, fragment in enumerate(self.fragments):
            flight, first = fragment.flight, fragment.mark[0]
            answered = flight and self._await(flight) and flight.done.is_set() and not flight.error
            with flight.lock if flight else contextlib.nullcontext():
                fragment.move(fragment.anchor)
                if flight and not answered:  # it may count yet; what came after it does not
                    if flight.snapshot is None:
                        flight.snapshot = torch.empty(fragment.size, device=fragment.device)
                    fragment.flat.read(0, flight.snapshot[: fragment.size])
                    flight.predicted, flight.dropped = False, True
                    if flight.encoded < fragment.size:  # the rest of it cannot be made any more
                        flight.steps = flight.fields["steps"] = 0
                    first, flight.mark = flight.mark[0], (self.local_step, self.tokens)
            if answered:
                refused = flight.reply.field("refused", str, "")
                first = first if refused else flight.mark[0]
                self._settle(fragment)
            if first < self.local_step:
                self._audit("dropped", fragment=k, first=first, last=self.local_step, why=why)
            fragment.mark, fragment.staleness = (self.local_step, self.tokens), 0
            if fragment.residual is not None:
                fragment.residual.zero_()
        self.buffers.put(self.buffers.anchor)
        self._clear_moments()
        log(f"WARNING: {why}: dropped {dropped} steps, took the global model, and cleared the "
            "optimizer's state")  # fmt: skip

    def _clear_moments(self):
        """The inner optimizers' state belongs to parameters that are gone."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def _audit(self, event, **facts):
        protocol.audit(event, worker=self.worker_id, session=self.session, **facts)

    def _audit_anchor(self, fragment):
        if protocol.is_audited():
            checksum = bytes(protocol.checksum_of(fragment.anchor).tolist()).hex()
            k, label = self.fragments.index(fragment), fragment.version
            self._audit("adopt", fragment=k, label=label, checksum=checksum)

    # --- Heartbeats, leaving ---

    def _heartbeat_loop(self):
        pause, failures = self.heartbeat_seconds, 0
        while not self.closed.wait(pause):
            with self.control_lock:
                if self.closed.is_set():
                    return
                pause = self.heartbeat_seconds
                try:
                    if self._heartbeat():
                        pause = 0.05  # others wait to hear that this worker knows
                    failures = 0
                except (OSError, ProtocolError):
                    self.control.close()
                    failures += 1
                    pause = pause if failures > 1 else 0.05  # a line that was cut is made anew
                except Refused as refusal:
                    if refusal.code == "rejoin":
                        self.must_join.set()  # the training thread does, after its step

    def _heartbeat(self):
        """Say that this worker lives; returns whether it is to read other shares from now on."""
        if self.control.sock.fileno() < 0:
            self.control = self._connect()
        fields = {
            "step": self.step,
            "position": self.position,
            "steps_per_second": self.steps_per_second,
            "loss": self._sane_loss(),
            "shares": list(self.shares),
            "ending": self.ending,
            "closed": [k for k, fragment in enumerate(self.fragments) if fragment.closed],
        }
        reply = self.control.request("heartbeat", fields)
        orders = reply.field("orders", list)
        self.stop_ordered |= "stop" in orders
        if "away" in orders and not self.away:
            log(f"server {self.server} was stopped; it has saved, and is awaited back")
        self.away = "away" in orders
        return self._take_share(reply)

    def _sane_loss(self):
        """The loss as the wire takes it: a number within its limits, or nothing."""
        return self.loss if self.loss is not None and abs(self.loss) < protocol.MAX_ABS else None

    @property
    def steps_per_second(self):
        return self.local_step / max(time.monotonic() - self.started, 1e-9)

    def close(self, reason="done"):
        """Leave the run without sending what is left; does nothing the second time."""
        if self.closed.is_set():
            return
        self.closed.set()
        atexit.unregister(self._close_at_exit)
        if self.hook:
            self.hook.remove()
        with self.control_lock:
            if self.control:
                with contextlib.suppress(OSError, ProtocolError, Refused):
                    self.control.stall = 5.0
                    self.control.request("leave", {"reason": reason[:200]})
                self.control.close()
        self.interrupt.set()
        for conn in [*self.data, *self.used.copy()]:
            conn.close()
        self.pool.close(seconds=5.0)
        with torch.no_grad(), uninterrupted():  # leave the local values as training made them
            # But for shards: after a failure, or where one rank leaves, the others do not listen.
            for fragment in () if self.is_sharded else self.fragments:
                if fragment.flight and fragment.flight.reply:
                    fragment.moved(fragment.flight, self.alpha)
                    self._settle(fragment)
                elif fragment.flight:
                    fragment.undo_prediction(fragment.flight)
        if self.heart:
            self.heart.join(5.0)

    def _close_at_exit(self):
        error = getattr(sys, "last_value", None)  # what nobody caught
        self.close(f"the process ended after {reason_of(error)}" if error else "the process ended")

    def _disown(self):
        """In a process forked from the worker's: leave the worker alone. The copies of its sockets
        go, so that the server hears when the worker dies; they are not shut down, as that would
        reach the worker's own. Locks may be held by threads that are not in this process."""
        for conn in filter(None, [self.control, *self.data, *self.used]):
            conn.sock.close()
        self.closed, self.flushed = threading.Event(), True
        self.closed.set()
        self.anchor_lock = threading.Lock()
        if self.hook:
            self.hook.remove()

    # --- What others want to know ---

    @property
    def version(self):
        """[origin, number] of the first slice of the anchor."""
        return self.fragments[0].version

    @property
    def steps(self):
        """Steps of this process, or of the one that it goes on from, that are in no push yet."""
        return self.local_step - min(fragment.mark[0] for fragment in self.fragments)

    @property
    def sync_count(self):
        """Rounds adopted: all fragments once."""
        return self.fragment_syncs // self.num_fragments

    @property
    def overlap(self):
        """The share of the time of transfers, waiting for others included, in which this worker
        went on training."""
        return max(0.0, 1 - self.stall_time / self.total_sync_time) if self.total_sync_time else 0.0

    def run_is_over(self, max_steps):
        """Whether to stop: the server says so, or another worker has reached the run's length. All
        ranks of a worker say the same after the same step."""
        told = self.ranks.last or vars(self)
        return told["stop_ordered"] or 0 < max_steps <= told["run_step"]

    @contextlib.contextmanager
    @torch.no_grad()
    def global_model(self):
        """Within the block the model's parameters and buffers are the global ones, as far as this
        worker has adopted them; afterwards its own again, to the bit. For evaluation. With a sharded
        model all ranks have to enter it, and leave it, between the same steps."""
        tensors = [*self.named.values(), *self.buffers.local.values()]
        local = [tensor.detach().clone() for tensor in tensors]
        with self._telling() if self.is_sharded else contextlib.nullcontext(), self.anchor_lock:
            self.buffers.put(self.buffers.anchor)
            for fragment in self.fragments:
                fragment.move(fragment.anchor)
        try:
            yield
        finally:
            self._reshard()
            with torch.no_grad():
                for tensor, values in zip(tensors, local, strict=True):
                    # An expanded buffer, which has not changed either, cannot be written.
                    if _is_sharded(tensor) or not torch.equal(tensor, values):
                        tensor.copy_(values)

    def metrics(self):
        """The numbers for a log, under `diloco/`."""
        return {
            "diloco/sync_count": self.sync_count,
            "diloco/local_step": self.local_step,
            "diloco/last_sync_time": self.last_sync_time,
            "diloco/total_sync_time": self.total_sync_time,
            "diloco/last_send_mb": self.last_send / 1e6,
            "diloco/last_recv_mb": self.last_recv / 1e6,
            "diloco/steps_per_second": self.steps_per_second,
            "diloco/sync_every": self.sync_every,
            "diloco/num_fragments": self.num_fragments,
            "diloco/fragment_syncs": self.fragment_syncs,
            "diloco/overlap": self.overlap,
            "diloco/stall_time": self.stall_time,
            "diloco/dropped_steps": self.dropped_steps,
            "diloco/mismatches": self.mismatches,
        }

    def residual(self):
        """What rounding has lost so far, which the next pushes make up for, as {name: tensor}; empty
        where the upload codec loses nothing. Belongs to a checkpoint: as "residual" in `state_dict`
        where tensors can be saved with that, or in a file of its own."""
        residuals = {}
        for k, fragment in enumerate(self.fragments):
            if fragment.residual is not None:
                flight = fragment.flight
                with flight.lock if flight else contextlib.nullcontext():
                    residuals[f"residual.{k}"] = fragment.residual.cpu().clone()
        return residuals

    def save_residual(self, path):
        """Write `residual` into a safetensors file, if it is not empty."""
        if residuals := self.residual():
            protocol.save_file(path, residuals, {"program": "diloco", "run": self.run})

    def state_dict(self):
        """Sync progress as JSON-able values, never parameters. With the model's parameters of the
        same moment it lets another process go on with local work that had not been sent."""
        return {
            "worker_id": self.worker_id,
            "run": self.run,
            "step": self.step,
            "position": self.position,
            "fragments": [
                {
                    "version": fragment.version,
                    "seq": fragment.seq,
                    "steps": self.local_step - fragment.mark[0],
                    "in_flight": fragment.flight is not None,
                }
                for fragment in self.fragments
            ],
        }


def _plain_names(model):
    """A function from a name within `model` to the one that it has before the model is compiled or
    wrapped for data parallelism."""
    plain = [name.replace("_orig_mod.", "") for name, _ in model.named_parameters()]
    wrapper = "module." if all(name.startswith("module.") for name in plain) else ""
    return lambda name: name.replace("_orig_mod.", "").removeprefix(wrapper)


def _frozen(model):
    """{name: parameter} of what is not trained and can be compared with others': floating-point
    numbers that are there and whole. Quantized weights are none, nor is what an adapter trains a copy
    of (peft's `modules_to_save`): no forward pass uses it, and a new head is another in each worker."""
    plain = _plain_names(model)
    copied = tuple(
        f"{name}.original_module."
        for name, module in model.named_modules()
        if isinstance(getattr(module, "modules_to_save", None), torch.nn.ModuleDict)
    )
    return {
        plain(name): parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
        and not name.startswith(copied)
        and (_is_plain(parameter) or (_is_sharded(parameter) and not _misplaced(parameter)))
        and parameter.is_floating_point()
        and parameter.dtype in protocol.DTYPE_NAMES
        and not parameter.is_meta
    }


def _trainable(model):
    """{name: parameter} of what is trained, under plain names."""
    plain = _plain_names(model)
    named = {
        plain(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not named:
        raise ValueError("the model has no parameter that requires grad: nothing to train")
    for name, parameter in named.items():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run one batch, then begin")
        if parameter.is_meta:
            raise ValueError(f"parameter {name!r} is on the meta device, so it has no numbers yet: "
                             "load or initialize the model, then begin")  # fmt: skip
        if "_fsdp_wrapped_module" in name:
            raise ValueError(f"parameter {name!r} is flattened by FullyShardedDataParallel, which hides "
                             "what it was: use fully_shard (FSDP2)")  # fmt: skip
        if _is_sharded(parameter) and (fault := _misplaced(parameter)):
            raise ValueError(f"parameter {name!r} {fault}")
        if not parameter.is_floating_point():
            raise ValueError(f"parameter {name!r} is {parameter.dtype}: only floating-point numbers "
                             "can be synchronized; freeze it with requires_grad_(False)")  # fmt: skip
    return named


def _is_sharded(parameter):
    """Whether it is a DTensor. Told without importing those: most programs have none."""
    return hasattr(parameter, "full_tensor")


def _is_plain(parameter):
    """Whether it is no tensor of a special kind, as some quantized weights are."""
    return type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor


def _misplaced(parameter):
    """In what way a DTensor lies on the ranks otherwise than fully_shard puts it, or ""."""
    from torch.distributed.tensor import Replicate, Shard

    placements, mesh = parameter.placements, parameter.device_mesh
    cuts = [place for place in placements if type(place) is not Replicate]
    if len(cuts) > 1 or any(type(place) is not Shard or place.dim != 0 for place in cuts):
        return (
            f"is placed as {placements}: a DTensor can be synchronized if it is "
            "replicated, and cut into rows (Shard(0)) over one dimension of its mesh"
        )
    if mesh.size() != dist.get_world_size():
        return (
            f"is on a mesh of {mesh.size()} ranks, and the worker has "
            f"{dist.get_world_size()}: give fully_shard a mesh of all, as (Replicate, Shard(0))"
        )
    return ""


def _fsdp_modules(model):
    """Those that fully_shard has been applied to."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [module for module in model.modules() if isinstance(module, fsdp)]


def _unwrapped(optimizer):
    """The innermost optimizer of wrappers such as accelerate's. What else may be in an attribute
    of that name is the business of its owner."""
    inner, found, seen = optimizer, None, []
    while inner is not None and not any(inner is known for known in seen):
        if hasattr(inner, "register_step_post_hook"):
            found = inner
        seen.append(inner)
        inner = getattr(inner, "optimizer", None)
    if found is None:
        raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
    return found


def _is_nested_step(optimizer):
    """Whether a step of `optimizer` is under way within another one of its own. Told by the stack,
    as no count of hooks survives a step that raises."""
    code = getattr(type(optimizer).step, "__code__", None)  # torch's, that of each class with hooks
    frame, depth = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code is code:
            depth += any(value is optimizer for value in frame.f_locals.values())
        frame = frame.f_back
    return depth > 1


def _config_of(model):
    """config.json of a Hugging Face model, also a wrapped one, as {name: text}."""
    for inner in (model, getattr(model, "module", None)):
        if config := getattr(inner, "config", None):
            break
    to_json = getattr(config, "to_json_string", None)
    return {"config.json": to_json()} if to_json else {}


class DiLoCoCallback:
    """DiLoCoWorker behind the hooks that trainers call. Arguments as there; all are optional.

    Without a server every hook does nothing. Unknown `on_...` hooks do nothing either. Trainers call
    no hook where training raises: the worker leaves then when the process ends, when training
    begins anew, or with `close`. A copy has the options and the progress, and no worker. `state` is
    what the Trainer of transformers puts into its checkpoints; the README says how.
    """

    def __init__(self, server=None, sync_every=None, worker_id=None, **options):
        self.server = server or os.environ.get("DILOCO_SERVER")
        self.options = {"sync_every": sync_every, "worker_id": worker_id, **options}
        self.arguments = {"server": server, **self.options}
        self.worker = None
        self.saved, self.folder = {}, None
        self.warned = False

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)

    def __getstate__(self):
        return {**self.__dict__, "worker": None, "saved": self.state_dict()}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Join the run."""
        if not self.server:
            if not self.warned:
                log("no server given and DILOCO_SERVER is not set: training standalone")
            self.warned = True
            return
        self.close("training begins anew")  # as after a batch that was too large for the memory
        self.worker = None
        saved, folder = self._checkpoint(args, state)
        residual = os.path.join(folder, RESIDUAL_FILE) if folder else None
        saved = {"state": saved, "residual": residual}
        self.worker = DiLoCoWorker(model, optimizer, self.server, **saved, **self.options)
        self.worker.start()

    def _checkpoint(self, args, state):
        """The progress and the folder that training goes on from: what `load_state_dict` was told,
        or those of the trainer's checkpoint. transformers' Trainer hands a callback its state only
        if asked to, but always has it in its own."""
        saved, folder = self.saved, self.folder
        if getattr(state, "global_step", 0):
            folder = folder or f"{args.output_dir}/checkpoint-{state.global_step}"
            held = getattr(state, "stateful_callbacks", None)
            if held is not None:
                # The Trainer saves into this entry, and a checkpoint made without us lacks it.
                own = held.setdefault(type(self).__name__, self.state())
                saved = saved or own["attributes"]["saved"]
        return saved, folder

    def on_step_end(self, args, state, control, **kwargs):
        """Stop with the run; where training stops, close it while the model is still the trained
        one: a trainer may load its best checkpoint after this."""
        if self.worker is None:
            return
        if self.worker.run_is_over(getattr(state, "max_steps", 0)):
            control.should_training_stop = True
        if control.should_training_stop:
            self.worker.flush()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the metrics to `logs`, and report its loss to the server."""
        if self.worker is None or logs is None:
            return
        if isinstance(logs.get("loss"), int | float):
            self.worker.loss = float(logs["loss"])
        # The Trainer's summary is its last call before it loads the best checkpoint, also where
        # training was stopped after the last step's hook, as early stopping does.
        if getattr(control, "should_training_stop", False) or "train_runtime" in logs:
            self.worker.flush()
        metrics = self.worker.metrics()
        logs.update(metrics)
        history = getattr(state, "log_history", None)  # where the Trainer has put a copy already
        if history and history[-1].get("step") == state.global_step:
            history[-1].update(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the run, unless the trainer has put its best checkpoint in the model's place."""
        if self.worker is not None:
            try:
                if not getattr(args, "load_best_model_at_end", False):
                    self.worker.flush()
            finally:
                self.close()

    def on_save(self, args, state, control, **kwargs):
        """Put the residual into the trainer's checkpoint."""
        self.save_residual(f"{args.output_dir}/checkpoint-{state.global_step}")

    def save_residual(self, folder):
        """Write what rounding has lost so far into a checkpoint's folder, where there is one."""
        if self.worker is not None and os.path.isdir(folder):
            self.worker.save_residual(os.path.join(folder, RESIDUAL_FILE))

    def close(self, reason="done"):
        """Leave the run; what has not been sent is not sent."""
        if self.worker is not None:
            self.worker.close(reason)

    def state_dict(self):
        """Sync progress, to be saved beside the model's parameters; see DiLoCoWorker."""
        return self.worker.state_dict() if self.worker else dict(self.saved)

    def load_state_dict(self, state, folder=None):
        """Progress from `state_dict`, before training begins, and the folder of `save_residual`."""
        self.saved, self.folder = dict(state), folder

    def state(self):
        """The same as transformers' ExportableState wants it. Arguments from the environment are
        left to it: a run that goes on may find its server elsewhere."""
        given = {name: value for name, value in self.arguments.items() if value is not None}
        return {"args": given, "attributes": {"saved": self.state_dict()}}
