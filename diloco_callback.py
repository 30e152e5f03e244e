r"""The worker's side of DiLoCo: hooks into an optimizer or a trainer and synchronizes its model.

In a script, and in a trainer with callbacks:

    diloco = DiLoCoWorker.attach(model, optimizer, "host:8512", sync_every=500)
    for batch in data:
        ...
        optimizer.step()  # every 500th also synchronizes
    diloco.flush()  # the model is now the global one

    trainer = transformers.Trainer(..., callbacks=[TransformersCallback("host:8512", 500)])
    trainer = lightning.Trainer(..., callbacks=[LightningCallback("host:8512", 500)])

Notable:
- Copy this file and protocol.py into your project; they need torch and nothing else.
- The global model is a log: an entry of it is the update from one version to the next. Every worker
  adds the same entries to its *anchor*, so all replicas at one version are equal to the bit, and a
  checksum in each entry proves it.
- Every `sync_every` optimizer steps a worker pushes what it has beyond the anchor. A push is never
  changed, recalled or made again; it is sent until an entry lists it, so it counts exactly once.
- With `num_fragments` the model travels in slices, each pushed at its own step of the cycle and
  adopted `fragment_sync_delay` steps later, while training goes on (Streaming DiLoCo, arXiv
  2501.18512). The steps made in between are kept.
- Networks fail in threads of the link; the training thread alone joins again and moves parameters.
  While the server is away for longer than `reconnect_timeout`, training goes on.
- Where all workers change what they train at the same step, they join anew before it; see `Anew`.
- Without a server (no argument, no DILOCO_SERVER) `attach` and the callbacks do nothing.
- Importing this file starts nothing. A process forked from a worker's, as for a DataLoader, is no
  worker.

The life of a push:

    worker   steps --make--> OUTBOX --an entry lists it--> FOLDED    later steps stay on top
                                    \--an entry lists it as refused--> DROPPED  counted, logged
    server   read whole, checked --push()--> in the open round --fold--> listed in an entry of the log

Environment, where no argument is given: DILOCO_SERVER, DILOCO_SYNC_EVERY, DILOCO_WORKER_ID,
DILOCO_NUM_FRAGMENTS, DILOCO_TOKEN, DILOCO_TLS (see `protocol.Access`).
"""

import atexit
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import fnmatch
import glob
import importlib
import json
import math
import operator
import os
import queue
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

if __package__:  # explicit: inside a package, another `protocol` must never be imported
    from . import protocol
else:
    import protocol

CODECS, FRESH, NONE, Version = protocol.CODECS, protocol.FRESH, protocol.NONE, protocol.Version
Checksum, Payload, reason_of = protocol.Checksum, protocol.Payload, protocol.reason_of
ProtocolError, Refused, Progress = protocol.ProtocolError, protocol.Refused, protocol.Progress

SYNC_EVERY = 500  # steps of a round, where nobody says otherwise
RECONNECT_SECONDS = 600.0  # time that training waits for a server that is gone, before it goes on
LEAVE_SECONDS = 5.0  # time that a server has for each thing that a worker which ends waits for
MAX_BRINGS = 100  # uploads that a server asks for in one join: by bad luck a few
SAY_SECONDS = 60.0  # how often a wait that lasts is logged
PARTING_SECONDS = 5.0  # time that a worker which is told to stop waits for its last push to arrive
FIRST_PAUSE_SECONDS = 0.2  # between two attempts to connect; later pauses are longer
LONGEST_PAUSE_SECONDS = 10.0
RESIDUAL_FILE = "diloco_residual.safetensors"  # beside a checkpoint
MAX_REFUSALS = 3  # drops in a row after which training is broken
# Attributes of a worker that the other ranks take over from rank 0.
TOLD = (
    "ahead", "run_step", "stop_ordered", "index", "rank", "world", "num_shares", "fragment_syncs",
    "dropped_steps", "clearings", "kept_local", "fetched", "skipped",
)  # fmt: skip


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


@contextlib.contextmanager
def own_modes():
    """Within the block no gradients are recorded, and new tensors are ordinary ones even where the
    program is in torch.inference_mode: other threads are to write into them."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def default_id(saved):
    """The id of a worker that is given none; `saved`: what its checkpoint says, or {}."""
    known = os.environ.get("DILOCO_WORKER_ID") or saved.get("worker_id")
    return known or f"{socket.gethostname()}-{os.getpid()}"


def check_settings(worker):
    """Raise ValueError where a setting of a DiLoCoWorker is out of its range."""
    every, delay, count = worker.sync_every, worker.delay, worker.num_fragments
    if every < 1:
        raise ValueError(f"sync_every must be 1 or more, not {every}")
    if not 1 <= count <= every:
        raise ValueError(
            f"num_fragments is {count} and sync_every {every}: every fragment needs a step of its own, "
            "so the number lies between 1 and sync_every"
        )
    if not 0 <= delay <= every:
        raise ValueError(
            f"fragment_sync_delay must be within 0 and sync_every ({every}), not {delay}"
        )
    if worker.fragment_update not in ("predict", "rebase", "mix"):
        raise ValueError(f"fragment_update: predict, rebase or mix, not {worker.fragment_update!r}")
    if not 0 <= worker.alpha <= 1:
        raise ValueError(f"fragment_update_alpha must be within 0 and 1, not {worker.alpha}")


# --- When a slice is pushed and adopted, and what became of a push ------------------------------
#
# `Schedule` and `Outbox` decide; they know no tensor, thread, socket or clock, so that
# tests/simulator.py can run them by the thousand. Steps come in as calls; the sequence numbers,
# versions and places that go to the server come out.


class Schedule:
    """The cycle of a worker: slice k, one among `fragments` slices, is pushed after step
    (k + 1) * every // fragments of the cycle. Slices beyond these, up to `count` (a model's
    buffers), are pushed with the last fragment.

    next: slice pushed next; left: steps until then; pace: steps of the next cycle, None for `whole`.
    """

    def __init__(self, every, fragments, count=None):
        self.every = self.whole = every
        self.fragments, self.count = fragments, count or fragments
        self.next, self.left, self.pace = 0, self.due(0), None

    def due(self, k):
        """The step of the cycle after which slice k is pushed."""
        return min(k + 1, self.fragments) * self.every // self.fragments

    def interval(self, k):
        """Steps between the push of the slice before k and that of k."""
        return self.due(k) - (self.due(k - 1) if k else 0)

    @property
    def position(self):
        """Steps since the cycle began."""
        return (self.due(self.next) - self.left) % self.every

    def tick(self):
        """Count a step; return the slices that are to be pushed now, in their order."""
        self.left -= 1
        due = []
        while self.left <= 0:
            due.append(self.next)
            self.next = (self.next + 1) % self.count
            if self.next == 0:
                self.every = max(self.pace or self.whole, self.fragments)
            self.left = self.interval(self.next)
        return due

    def align(self, turns, steps=None, out=()):
        """Let the slice with the lowest turn be pushed next, in `steps`, or where that is None in a
        whole interval. With None the place is kept where the slice is next already. `turns`: by
        slice, the turn that its next push is for. Pushes of the slices in `out` are on their way to
        the server; no round up to the latest of their turns waits for this worker then, and the
        steps do not hold where another slice is next by that."""
        passed = max((turns[k] for k in out), default=-1)
        after = [turn + self.count * (turn <= passed) for turn in turns]
        k = after.index(min(after))
        steps = steps if turns[k] == min(turns) else None
        if (k, steps) != (self.next, None):
            whole = max(1, self.interval(k))
            self.next, self.left = k, min(steps or whole, whole)

    def resume(self, position, every):
        """Go on at a saved position within a cycle of `every` steps."""
        self.every = every
        left = [self.due(k) - position for k in range(self.fragments)]
        self.next = next(k for k in range(self.fragments) if left[k] > 0)
        self.left = left[self.next]

    def order(self):
        """All slices in the order of turns, beginning with the one that is pushed next."""
        return [(self.next + i) % self.count for i in range(self.count)]


@dataclass(eq=False, kw_only=True)
class Pending:
    """A push in the outbox. Its name is (worker id, k, seq); it is never changed or made again."""

    k: int  # slice
    seq: int
    base: Version  # version that its oldest step started from
    first: int  # local step behind which its steps begin
    last: int  # local step at which it was made
    tokens: int
    closing: bool
    adopt_at: int  # local step at which it is to be adopted
    answered: bool = False  # whether the server has all of it
    late: bool = False  # whether training went on when it was to be adopted
    queued: list | None = None  # events of the GPUs behind its numbers; None: not there yet
    facts: dict = field(default_factory=dict)  # further fields of its message

    @property
    def steps(self):
        return self.last - self.first


@dataclass(eq=False, kw_only=True)
class Place:
    """One slice, as the outbox knows it."""

    version: Version = FRESH  # version of the anchor
    folded: dict = field(default_factory=dict)  # worker -> Fate, of pushes folded in that version
    base: Version = FRESH  # version that the oldest step which is in no push started from
    seq: int = 0  # sequence number of the last push
    mark: tuple = (0, 0)  # (local step, tokens) up to which steps are in a push or dropped
    pending: Pending | None = None
    is_closed: bool = False  # whether an entry lists the closing push


class Outbox:
    """The fate of a worker's pushes. Each slice has one place, which a push takes when it is made
    and gives back when an entry of the log, or the slice in full, lists it as folded or refused.
    While its place is taken no other push of the slice is made: those steps go with the next one.

    places: [Place] by slice; queue: [Pending] in the order in which they were made.
    """

    def __init__(self, worker_id, count):
        self.worker_id, self.max_staleness = worker_id, 1 << 53
        self.places = [Place() for _ in range(count)]
        self.queue = []

    def make(self, k, step, tokens, delay=0, closing=False):
        """Return a new push of slice k with all steps in no push yet; None where its place is taken."""
        place = self.places[k]
        if place.pending:
            return None
        place.seq += 1
        push = Pending(
            k=k,
            seq=place.seq,
            base=place.base,
            first=place.mark[0],
            last=step,
            tokens=tokens - place.mark[1],
            closing=closing,
            adopt_at=step if closing else step + delay,
        )
        place.pending, place.mark = push, (step, tokens)
        self.queue.append(push)
        return push

    def close(self, order, step, tokens):
        """Make the closing pushes, in the order of turns, and return the new ones. A slice whose
        place is taken holds up those behind it: call again when its push is listed."""
        made = []
        for k in order:
            place = self.places[k]
            if place.pending and not place.pending.closing:
                break
            if not place.is_closed and not place.pending:
                made.append(self.make(k, step, tokens, closing=True))
        return made

    @property
    def is_closed(self):
        return all(place.is_closed for place in self.places)

    @property
    def closed(self):
        """The slices that are closed."""
        return [k for k, place in enumerate(self.places) if place.is_closed]

    def upload(self):
        """The push that is to be sent next: the oldest one that the server has not answered."""
        return next((push for push in self.queue if not push.answered), None)

    def resend(self, push=None):
        """Have one push sent again, or after a join all of them, in the order they were made in."""
        for each in self.queue if push is None else [push]:
            each.answered = False

    def is_due(self, k, step):
        """Whether training adopts the pending push of slice k at this step, and so waits for it.
        One that training has gone on without is adopted when it is listed."""
        push = self.places[k].pending
        return push is not None and not push.late and step >= push.adopt_at

    def blocked(self, step):
        """(slice, sequence number) of the push that training waits for, or ()."""
        due = [push for push in self.queue if self.is_due(push.k, step)]
        return (due[0].k, due[0].seq) if due else ()

    def take(self, k, version, fates, whole, step):
        """The anchor of slice k has come to a version, whose entry lists `fates`, {worker: Fate};
        `whole`: by the slice in full, where they are all that are folded in it. `step`: local step.
        Returns (the push of this worker that is listed, why it was refused or ""), or (None, "")."""
        place = self.places[k]
        place.version = version
        known = fates if whole else {**place.folded, **fates}
        place.folded = protocol.recent(known, version, self.max_staleness, [self.worker_id])
        push, fate = place.pending, place.folded.get(self.worker_id)
        if push is None and step == place.mark[0]:
            place.base = version  # no step is left that started from an older version
        if push is None or fate is None or fate.seq < push.seq:
            return None, ""
        self.queue.remove(push)
        place.pending, place.is_closed, place.base = None, push.closing, version
        return push, fate.refused

    def resume(self, k, version, steps):
        """Slice k is where a checkpoint left it, from which `steps` are in no push yet."""
        place = self.places[k]
        place.base, place.mark = version, (place.mark[0] - steps, place.mark[1])

    def know(self, known):
        """The server knows this worker id's pushes up to `known`, by slice: later ones get higher
        numbers. Returns the slices whose push it does not know yet."""
        for place, seq in zip(self.places, known, strict=True):
            place.seq = max(place.seq, seq) if place.pending is None else place.seq
        return [k for k, place in enumerate(self.places) if place.pending and place.seq > known[k]]

    def drop(self, step, tokens):
        """The steps that are in no push are given up; returns [(slice, first, last)] of them."""
        dropped = []
        for k, place in enumerate(self.places):
            if place.mark[0] < step:
                dropped.append((k, place.mark[0], step))
            place.mark = (step, tokens)
            if place.pending is None:
                place.base = place.version
        return dropped

    def forget(self):
        """The server has another run's model: the pushes that are out are given up. Returns them."""
        forgotten, self.queue = self.queue, []
        for push in forgotten:
            self.places[push.k].pending = None
        for place in self.places:
            place.seq = 0  # its server counts for itself
        return forgotten

    def renewed(self, count, step, tokens):
        """An Outbox for `count` slices in place of these, which are closed; it knows what this does."""
        version = min(place.version for place in self.places)
        found = protocol.last_fates(place.folded for place in self.places)
        fates = {id: f._replace(round=min(f.round, version.number)) for id, f in found.items()}
        renewed = Outbox(self.worker_id, count)
        for place in renewed.places:
            place.version, place.base, place.folded = version, version, dict(fates)
            place.seq = max(old.seq for old in self.places)
            place.mark = step, tokens
        return renewed


# --- A slice's numbers --------------------------------------------------------------------------
#
# A worker's *anchor* is its copy of the global parameters at some version. At a push the worker notes
# a *mark*: the values that training goes on from, which are the local ones or, with `predict`, where
# the slice would be if all workers had pushed what this one has. Local work is what a worker has
# beyond the log: when an entry lists the push, local = rounded(anchor + (local - mark)). While
# training stands still the local values are the mark, and none is kept.


class NotFinite(Exception):
    """A difference is not finite, or far too large: it is not encoded, and its steps are dropped."""


class Slice:
    """One slice of the model: its numbers and the arithmetic on them, chunk by chunk, on the device
    of the parameters. Encoded bytes alone are on the CPU. Positions are within the slice.

    flat: FlatModel of the local parameters; anchor, mark: float32 vectors, the mark or None;
    residual: float32 vector of the losses in encoding the pushes so far, or None; velocity: the
    outer optimizer's, for predictions, or None; payload: the encoded push; update: the encoded entry
    that was read last. `lock` is held while a chunk of these is read or written. `carries_values`:
    the buffers' slice, whose pushes are the values themselves and whose global values replace the
    local ones.
    """

    def __init__(self, flat, up, down, has_residual=False, predicts=False, carries_values=False):
        self.flat, self.size, self.device = flat, flat.numel, flat.device
        self.up, self.down, self.carries_values = up, down, carries_values
        self.anchor = torch.zeros(self.size, dtype=torch.float32, device=self.device)
        self.residual = torch.zeros_like(self.anchor) if has_residual else None
        self.velocity = torch.zeros_like(self.anchor) if predicts else None
        self.mark = self.spare = None  # `spare` is a mark's memory that is kept
        pinned = self.device.type == "cuda"
        self.payload = Payload(up.layout(self.size), pinned=pinned)
        self.update = Payload([*down.layout(self.size), Checksum.SPEC], pinned=pinned)
        self.encoded = 0  # elements of the push that are in the payload
        self.is_empty = True  # whether the push has no numbers
        self.is_blank = True  # whether the anchor has no numbers yet
        self.is_broken = False  # whether its numbers are not finite, and its steps not dropped yet
        self.outer = (0.0, 0.0, True, 1.0)  # lr, momentum, nesterov, part of the step that follows
        self.stages = {}  # (codec, elements) -> Payload on the device for one chunk
        self.lock = threading.RLock()

    def _at(self, codec, payload, start, count):
        """Return where a codec works on a chunk of a message, as (tensors, position in them, bytes
        there, the bytes of the message that they stand for). On the CPU the tensors are the
        message's own, and both bytes are one tensor, which costs nothing to copy to itself."""
        if self.device.type == "cpu":
            return payload.tensors, start, payload.raw, payload.raw
        if (codec, count) not in self.stages:
            self.stages[codec, count] = Payload(codec.layout(count), device=self.device)
        stage, first = self.stages[codec, count], protocol.payload_bytes(codec.layout(start))
        return stage.tensors, 0, stage.raw, payload.raw[first : first + len(stage.raw)]

    def _size(self, codec):
        """Return the elements that are worked on at once. A GPU has no cache for which few were better."""
        return codec.size if self.device.type == "cpu" else protocol.CHUNK

    def tiles(self):
        """The chunks that training works on: what the caches of its cores hold. They are larger where a
        GPU has no such cache, or some parameter's memory has another order and is copied each time."""
        is_small = self.device.type == "cpu" and all(p[0].is_contiguous() for p in self.flat.parts)
        tile = torch.get_num_threads() * protocol.TILE if is_small else protocol.CHUNK
        return protocol.chunks(self.size, min(tile, protocol.CHUNK))

    # --- A push ---

    def begin(self, has_numbers, goes_on):
        """Begin a push of the local values. Training `goes_on`, or stands until the push is listed."""
        with self.lock:
            self.encoded, self.is_empty, self.is_broken = 0, not has_numbers, False
            if goes_on:
                self.keep_mark(predicts=self.velocity is not None and has_numbers)

    def keep_mark(self, predicts=False):
        """Note the local values, from which training is about to go on, or if it `predicts` from the
        prediction that they lead to."""
        with self.lock:
            is_kept = self.mark is not None
            self.mark = self.mark if is_kept else self._vector()
            for start, stop in self.tiles() if predicts or not is_kept else ():
                if not is_kept:
                    self.flat.read(start, self.mark[start:stop])
                if predicts:  # while the chunk is in the cache
                    ahead = protocol.scratch("ahead", self.mark, stop - start)
                    self.flat.write(start, self._predict(start, ahead))

    def settle(self):
        """Wait for what this thread has asked of the GPUs: other threads have other streams."""
        for stream in self.flat.streams():
            stream.synchronize()

    def _vector(self):
        mark, self.spare = self.spare, None
        return torch.empty_like(self.anchor) if mark is None else mark

    def has_changed(self):
        """Whether the local values differ from the global ones, as far as their own dtypes tell."""
        for start, stop in protocol.chunks(self.size):
            anchor = self.anchor[start:stop]
            local = protocol.scratch("local", anchor, stop - start)
            self.flat.read(start, local)
            if not torch.equal(local, self.flat.rounded(start, anchor)):
                return True
        return False

    def _difference(self, start, out):
        """Return `out`, filled with anchor minus local at the push, in their dtype, plus the residual."""
        part = slice(start, start + out.numel())
        if self.carries_values:
            self.flat.read(start, out) if self.mark is None else out.copy_(self.mark[part])
        elif self.mark is None:
            self.flat.subtract_from(start, self.anchor[part], out)
        else:
            torch.sub(self.flat.rounded(start, self.anchor[part]), self.mark[part], out=out)
        return out if self.residual is None else out.add_(self.residual[part])

    def pieces(self):
        """Yield the bytes of a push, chunk by chunk: while one is on its way the next is encoded.
        Raises NotFinite, after which the push is empty and the residual as before it."""
        for start, stop, first, last in protocol.chunk_bytes(self.up, self.size):
            with self.lock:
                begin = stop if self.is_empty else max(start, self.encoded)
                for tile in protocol.chunks(stop, self._size(self.up), begin):
                    self._encode(*tile)
                if self.is_empty:
                    raise NotFinite
            yield self.payload.raw[first:last]

    def finish_encoding(self):
        """Encode the rest of a push, whose local values are about to go."""
        with contextlib.suppress(NotFinite):
            for _ in () if self.is_empty else self.pieces():
                pass

    def _encode(self, start, stop):
        delta = self._difference(start, protocol.scratch("delta", self.anchor, stop - start))
        if not math.isfinite(delta.dot(delta).item()):
            self._put_back(start)
            self.is_empty = self.is_broken = True
            raise NotFinite
        tensors, at, device, host = self._at(self.up, self.payload, start, stop - start)
        if self.residual is None:
            self.up.encode(delta, tensors, at)
        else:
            torch.sub(delta, self.up.sent(delta, tensors, at), out=self.residual[start:stop])
        host.copy_(device)  # waits for a GPU to have done all this
        self.encoded = stop
        if stop == self.size and self.velocity is not None and self.mark is not None:
            # Not before: a later chunk that is not finite has `_put_back` ask for the differences.
            for start, stop in protocol.chunks(self.size):
                mark = self.mark[start:stop]
                mark.copy_(self.flat.rounded(start, self._predict(start, mark)))
            self.settle()

    def _put_back(self, count):
        """Make the first `count` elements of the residual what they were before this push: what it
        carries and what it left, less the difference that it was made from."""
        for start, stop in protocol.chunks(count) if self.residual is not None else ():
            left = self.residual[start:stop]
            carried = torch.empty_like(left)
            tensors, at, device, host = self._at(self.up, self.payload, start, stop - start)
            device.copy_(host)
            self.up.decode(tensors, at, carried)
            carried.add_(left)
            left.zero_()  # `_difference` adds the residual
            delta = self._difference(start, torch.empty_like(carried))
            left.copy_(carried.sub_(delta)) if delta.isfinite().all() else left.zero_()
        self.settle()

    def _predict(self, start, out):
        """Return `out`, filled with a chunk as if all workers had pushed the same as this one: SGD with
        Nesterov momentum as torch.optim.SGD defines it, or a part of such a step as the server's Outer
        does, with the own difference in the gradient's place. All that goes in is still what it was
        at the push. `out` may be the chunk of the mark."""
        lr, momentum, nesterov, part = self.outer
        vectors = self.anchor, self.velocity, self.mark
        anchor, velocity, mark = (vector[start : start + len(out)] for vector in vectors)
        own = torch.sub(self.flat.rounded(start, anchor), mark, out=out)
        # With v = momentum * velocity + part * own: own + momentum * v, or v without Nesterov.
        share, kept = (1 + momentum * part, momentum**2) if nesterov else (part, momentum)
        step = own.add_(velocity, alpha=kept / share)
        return torch.add(anchor, step, alpha=-lr * part * share, out=out)

    def copied_residual(self):
        """Return the residual as it is now, on the CPU."""
        with self.lock:
            return self.residual.cpu().clone()

    # --- The log ---

    def take(self, moves, whole=None, has_update=True, learns=False):
        """Add the entry in `update` to the anchor, if the entry `has_update`; or set the anchor to
        `whole`, a float32 vector on the CPU. With `moves` set the local values to the anchor too,
        while it is in the cache. `learns`: the entry is an outer step with momentum. Returns False
        where the checksum then differs from the one in `update`. Raises ProtocolError at the first
        numbers of an entry that are not finite, with those before them added."""
        checksum, self.is_blank = Checksum(), False
        for start, stop in protocol.chunks(self.size, self._size(self.down)):
            anchor = self.anchor[start:stop]
            if whole is not None:
                anchor.copy_(whole[start:stop])
            elif has_update:
                tensors, at, device, host = self._at(self.down, self.update, start, stop - start)
                device.copy_(host)
                update = self.down.decoded(tensors, at, anchor)
                if self.down.square(update, tensors, at) == math.inf:
                    raise ProtocolError("an update is not finite")
                anchor.add_(update)
                if learns and self.velocity is not None:
                    self._learn_velocity(start, stop, update)
            checksum.add(anchor)
            if moves:
                self.flat.write(start, anchor)
        self.settle()
        return torch.equal(checksum.digest(), self.update.tensors["checksum"])

    def _learn_velocity(self, start, stop, update):
        """Work out the outer optimizer's velocity v from an update, a part f of a step. With the mean
        g of the pushes and m = mu^f, v' = m * v + f * g and update = -lr * f * (g + m * v'), or
        -lr * f * v' without Nesterov. A velocity that starts from zero, as a late joiner's, is right
        after a few rounds."""
        velocity = self.velocity[start:stop]
        lr, momentum, nesterov, part = self.outer
        if lr and part and nesterov:
            velocity.mul_(momentum).add_(update, alpha=-1 / lr).div_(1 + part * momentum)
        elif lr and part:
            torch.mul(update, -1 / (lr * part), out=velocity)

    # --- Adopting ---

    def adopt(self, alpha=None):
        """Put the local work since the mark on top of the anchor; with `alpha` (`mix`), alpha of the
        local values and the rest of the anchor instead. Returns False where the work is not finite."""
        with self.lock:
            mark = self.mark
            if mark is None:
                return True  # the local values have moved with the anchor
            self.unmark()
            if self.carries_values:
                self.show_anchor()
                return True
            is_finite = True
            for start, stop in self.tiles():
                old, anchor = mark[start:stop], self.anchor[start:stop]
                if alpha is None:
                    is_finite = self.flat.move(start, old, anchor) and is_finite
                else:
                    target = protocol.scratch("local", anchor, stop - start)
                    self.flat.read(start, target)
                    target.mul_(alpha).add_(anchor, alpha=1 - alpha)
                    self.flat.write(start, target)
            return is_finite

    def mark_anchor(self):
        """Make the anchor the mark, so that the local work beyond it goes on top of a later anchor. A
        mark that is kept already stays: training has gone on from it."""
        with self.lock:
            if self.mark is None:
                self.mark = self._vector()
                self.mark.copy_(self.flat.rounded(0, self.anchor))

    def unmark(self):
        """Let the local values be what they are: the anchor has not moved."""
        with self.lock:
            self.mark, self.spare = None, self.mark

    def show_anchor(self):
        """Set the local values to the anchor, rounded to the parameters' dtypes."""
        with self.lock:
            for start, stop in protocol.chunks(self.size):
                self.flat.write(start, self.anchor[start:stop])

    def drop(self):
        """Give up all local work. A push that is out keeps its numbers."""
        with self.lock:
            self.show_anchor()
            if self.mark is not None:
                self.mark.copy_(self.flat.rounded(0, self.anchor))
            self.settle()


# --- What the server says -----------------------------------------------------------------------
#
# Each reply is parsed once, into a record, before anything is done with it: types, ranges, and that
# it carries no bytes which nobody reads. The functions raise ProtocolError; a server that talks
# nonsense twice running is given up, with an error that names it.

MOST = 1 << 20  # processes, members and shares that a server may speak of
MOST_ENTRIES = 1000  # that a pull may bring; the server keeps fewer


class Joined(NamedTuple):
    """A reply to a join: a place in the run."""

    run: str
    index: int
    rank: int
    world: int
    num_shares: int
    heartbeat_seconds: float
    up: protocol.Codec
    down: protocol.Codec
    error_feedback: bool
    max_staleness: int
    settings: dict  # of the outer optimizer, by name
    step: int
    pace: int | None  # steps of a cycle; None: the worker's own sync_every
    turns: list  # by slice, the turn that its next push is for
    steps: int | None  # until the first of these pushes; None: a whole interval
    known: list  # by slice, sequence number that the server knows
    frozen: list  # names of frozen tensors that differ from the server's


def joined_of(reply, count):
    """A Joined, of a run with `count` slices."""
    reply.typed("join").expect([])
    field, frozen = reply.field, reply.field("frozen", list, [])
    if not all(type(name) is str for name in frozen):
        raise ProtocolError("join: a frozen tensor without a name")
    world, rank = field("world", int, low=1, high=MOST), field("rank", int)
    if rank >= world:
        raise ProtocolError(f"join: rank {rank} of {world}")
    return Joined(
        run=field("run", str),
        index=field("index", int, high=MOST),
        rank=rank,
        world=world,
        num_shares=field("num_shares", int, low=1, high=MOST),
        heartbeat_seconds=field("heartbeat_seconds", float, low=0.01, high=3600.0),
        up=codec_of(reply, "upload_codec"),
        down=codec_of(reply, "download_codec"),
        error_feedback=field("error_feedback", bool, True),
        max_staleness=field("max_staleness", int),
        settings=settings_of(field("settings", dict)),
        step=field("step", int),
        pace=field("pace", int, None, low=1),
        turns=reply.numbers("turns", count),
        steps=field("steps", int, None, low=1),
        known=reply.numbers("known", count),
        frozen=frozen,
    )


def codec_of(reply, name):
    """The codec that a field names."""
    if (codec := reply.field(name, str)) not in CODECS:
        raise ProtocolError(f"{reply.type}: there is no codec {codec!r}")
    return CODECS[codec]


def settings_of(settings):
    """{name: value} of the outer optimizer's settings."""
    found = protocol.Message("settings", settings, [])
    return {
        "outer_lr": found.field("outer_lr", float, high=protocol.MAX_ABS),
        "outer_momentum": found.field("outer_momentum", float, high=1.0),
        "nesterov": found.field("nesterov", bool),
        "momentum_warmup": found.field("momentum_warmup", bool),
        "outer": found.field("outer", str, "whole"),
    }


class News(NamedTuple):
    """An entry of a slice's log, or a slice in full: what its numbers lead to."""

    version: Version
    base: Version | None  # version that an entry leads on from; None: the slice in full
    fates: dict  # worker -> Fate
    plain: bool
    part: float  # of an outer step that an entry makes
    made: float  # outer steps that have been made by then
    step: int
    more: bool  # whether another one follows


def news_of(reply, k):
    """A News, about slice k."""
    reply.typed("entry", "slice").field("slice", int, k, low=k, high=k)
    is_entry, version = reply.type == "entry", protocol.version_of(reply.field("version", list))
    base = protocol.version_of(reply.field("base", list)) if is_entry else None
    if base is not None and not base < version:
        raise ProtocolError(f"an entry leads from version {base.number} to {version.number}")
    more = reply.field("more", bool, False)
    if more and not is_entry:
        raise ProtocolError("a slice in full is not the last message of a reply")
    return News(
        version=version,
        base=base,
        fates=protocol.fates_of(reply.field("folded", dict)),
        plain=not is_entry or reply.field("plain", bool),
        part=reply.field("part", float, 1.0, high=1.0),
        made=reply.field("made", float),
        step=reply.field("step", int),
        more=more,
    )


class Beat(NamedTuple):
    """A reply to a heartbeat."""

    rank: int
    world: int
    orders: list
    stalls: list  # of dicts: rounds that wait too long
    pace: int | None  # as in Joined


def beat_of(reply):
    """A Beat."""
    reply.typed("heartbeat").expect([])
    rank, world = reply.field("rank", int), reply.field("world", int, low=1, high=MOST)
    orders = reply.field("orders", list)
    if rank >= world or not all(type(order) is str for order in orders):
        raise ProtocolError("heartbeat: a rank beyond the members, or an order that is no word")
    pace = reply.field("pace", int, None, low=1)
    return Beat(rank, world, orders, reply.field("stalls", list, []), pace)


def wanted_of(reply, count):
    """(slices, among `count`, and whether descriptive files too) that the server asks a worker for."""
    reply.typed("bring").expect([])
    slices = reply.numbers("slices", None, high=count - 1)
    if len(set(slices)) < len(slices):
        raise ProtocolError("bring: the server asks for a slice twice")
    return slices, reply.field("files", bool, False)


# --- The link to the server ---------------------------------------------------------------------
#
# Networks fail, servers are restarted. `Link` makes requests in threads of its own and never gives
# up until it is told to: it connects again, with growing pauses, and makes the same request anew,
# which is always safe. Two things end a request early: the server says that this worker is no member
# (`lost` is set: the training thread joins again), or the training thread interrupts.


log = protocol.Log("stderr", "diloco: ")


def pauses():
    """Yield the seconds to wait after each attempt to reach the server; they grow."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield min(pause, LONGEST_PAUSE_SECONDS)
        pause *= 1.5


class Interrupted(Exception):
    """The training thread has ended a request, to join again or to leave."""


class Link:
    """The connections and threads of one worker: `control` joins, sends heartbeats and leaves; data
    connections come and are kept as pushes and pulls need them."""

    def __init__(self, server, worker_id, access):
        self.server, self.worker_id, self.access = server, worker_id, access
        self.session = secrets.token_hex(8)  # name of this process
        self.control, self.control_lock = None, threading.RLock()
        self.idle, self.used = [], set()  # data connections
        self.tasks, self.threads = queue.SimpleQueue(), set()  # the threads take a task each
        self.busy = 0  # tasks that have not ended
        self.rested = threading.Condition()  # guards the two lines above; notified when a task ends
        self.joining = None  # control connection while the worker joins
        self.is_leaving = False  # whether no join is worth waiting for any more
        self.lost = threading.Event()  # set while the server does not know this worker any more
        self.must_join = False  # whether a join has failed, of which the server may know nothing
        self.interrupted = threading.Event()
        self.closed = threading.Event()
        self.outage = None  # time when the outage that still lasts was noticed, in seconds, or None
        self.heart = None

    # --- Connections ---

    def connect(self):
        hello = {"worker": self.worker_id, "session": self.session}
        try:
            return protocol.connect(self.server, hello, access=self.access)[0]
        except ProtocolError as error:  # something else answers there, perhaps not for long
            raise ConnectionError(f"no DiLoCo server answers there: {error}") from error

    def nonsense(self, error, times):
        """Note a reply that breaks a rule; raises Refused where it is not the first one running."""
        if times > 1:
            raise Refused(
                "protocol",
                f"server {self.server}: {error}, {times} times running; check that server and worker "
                "are of one version, and their memory and network",
            ) from error
        self.note_outage(error)

    def exchange(self, action):
        """Return action(connection), tried until it works, with pauses. Raises Interrupted, Refused."""
        faults = 0
        for pause in pauses():
            if self.interrupted.is_set():
                raise Interrupted
            try:
                with self.borrowed() as conn:
                    if self.interrupted.is_set():
                        raise Interrupted
                    result = action(conn)
                    self.reached()
                    return result
            except OSError as error:
                self.note_outage(error)
            except ProtocolError as error:
                faults += 1
                self.nonsense(error, faults)
            except Refused as refusal:
                if refusal.code != "rejoin":
                    raise
                self.lost.set()
                raise Interrupted from None
            self.interrupted.wait(pause)

    @contextlib.contextmanager
    def borrowed(self):
        """Yield a data connection, idle or new, and keep it if the block succeeds."""
        try:
            conn = self.idle.pop()
        except IndexError:
            conn = self.connect()
        self.used.add(conn)
        try:
            yield conn
            self.idle.append(conn)
        except BaseException:
            conn.close()
            raise
        finally:
            self.used.discard(conn)

    def note_outage(self, error):
        """Note that a request has failed. Idle connections have most likely died with it."""
        self.drop_idle()
        if self.outage is None and not self.interrupted.is_set():
            self.outage = time.monotonic()
            log(f"server {self.server}: {error}; trying again")

    def drop_idle(self):
        while self.idle:
            with contextlib.suppress(IndexError):
                self.idle.pop().close()

    def reached(self):
        """Note that the server has answered."""
        since, self.outage = self.outage, None
        if since is not None:
            log(f"server {self.server} is there, after {time.monotonic() - since:.1f} s")

    def patience(self, seconds):
        """Return how many of `seconds` since the outage began are left; all if there is none."""
        since = self.outage
        return seconds if since is None else max(0.0, since + seconds - time.monotonic())

    # --- Threads ---

    def submit(self, task):
        """Have a daemon thread call `task()`: those of concurrent.futures keep a process from ending.
        A thread that rests does it, as training would wait for a new one to begin."""
        with self.rested:
            if self.closed.is_set():  # the threads have been told to end
                return
            if self.busy == len(self.threads):
                self.threads.add(self.start(self._work))
            self.busy += 1
            self.tasks.put(task)

    def start(self, target, *args):
        """Return a daemon thread that calls target(*args), as soon as the system has one left."""
        for pause in pauses():
            thread = threading.Thread(target=target, args=args, daemon=True)
            try:
                thread.start()
                return thread
            except RuntimeError as error:
                if self.closed.is_set():
                    raise ConnectionError(f"{self.worker_id}: {error}") from error
                if pause == FIRST_PAUSE_SECONDS:
                    log(f"WARNING: {self.worker_id}: {error}; trying again")
            self.closed.wait(pause)

    def _work(self):
        """Do tasks, until another thread rests as well, or the link is closed."""
        while task := self.tasks.get():
            try:
                task()
            except BaseException:  # whatever happens, nobody waits for a task that has ended
                log.trace(f"WARNING: a task of {self.worker_id} has failed")
            with self.rested:
                self.busy -= 1
                self.rested.notify_all()
                if len(self.threads) - self.busy > 1:
                    self.threads.discard(threading.current_thread())
                    return

    def interrupt(self):
        """End all requests, and wait until no task is left. Idle connections may be dead too."""
        self.interrupted.set()
        with self.rested:
            while self.busy:
                for conn in self.used.copy():
                    conn.hang_up()
                self.rested.wait(0.1)
        self.drop_idle()
        self.interrupted.clear()

    # --- Joining, heartbeats, leaving ---

    def retry(self, action, seconds):
        """Call `action` until it works, for at most `seconds`. Raises ConnectionError then, and
        Refused at once, unless the server was only restarted meanwhile."""
        began, faults = time.monotonic(), 0
        for pause in pauses():
            try:
                return action()
            except (OSError, ProtocolError, Refused) as error:
                if isinstance(error, Refused) and error.code != "rejoin":
                    raise
                if isinstance(error, ProtocolError):
                    faults += 1
                    self.nonsense(error, faults)
                waited = time.monotonic() - began
                if waited > seconds or self.closed.is_set() or self.is_leaving:
                    raise ConnectionError(
                        f"server {self.server}: {error}, for {waited:.0f} s. Is the server running "
                        "there, and does a firewall let you through?"
                    ) from error
                if pause == FIRST_PAUSE_SECONDS:
                    log(f"server {self.server}: {error}; trying again for up to {seconds:.0f} s")
            self.closed.wait(pause)

    def leave_soon(self):
        """End a join that waits, and try no other: a worker that was told to leave needs none. Takes no
        lock, so that a signal handler may call it."""
        self.is_leaving = True
        for conn in (self.joining, *self.used.copy()) if self.joining else ():
            conn.hang_up()

    def open_control(self):
        """Return a new control connection. The caller holds `control_lock`."""
        if self.control:
            self.control.close()
        self.control = self.connect()
        return self.control

    def start_heart(self, seconds, beat):
        """Call beat(control connection) every so many seconds from now on."""
        self.heart = self.start(self._beat, seconds, beat)

    def _beat(self, seconds, beat):
        pause, failures = seconds, 0
        while not self.closed.wait(pause):
            with self.control_lock:
                if self.closed.is_set():
                    return
                pause = seconds
                try:
                    if self.control.sock.fileno() < 0:
                        self.open_control()
                    beat(self.control)
                    failures = 0
                    if self.must_join:  # the server may take this worker for a member all the same
                        self.lost.set()
                except (OSError, ProtocolError):
                    self.control.close()
                    failures += 1
                    pause = pause if failures > 1 else 0.05  # a line that was cut is made anew
                except Refused as refusal:
                    if refusal.code == "rejoin":
                        self.lost.set()  # the training thread joins again, after its step
                except Exception:  # the heart beats on: without it the worker counts as gone
                    log.trace(f"WARNING: a heartbeat of {self.worker_id} failed: it is tried again")
                    self.control.close()

    def close(self, reason, was_member, evaluation=None):
        """Leave the run, and end all threads; a task that does not end is left to itself."""
        self.closed.set()
        control = self.control
        if self.control_lock.acquire(timeout=LEAVE_SECONDS):
            try:
                if self.control and was_member:
                    self.control.deadline = time.monotonic() + LEAVE_SECONDS
                    last_words = {"reason": reason[:200], "evaluation": evaluation}
                    with contextlib.suppress(OSError, ProtocolError, Refused):
                        self.control.request("leave", last_words)
            finally:
                self.control_lock.release()
        for conn in filter(None, {control, self.control}):
            conn.close()  # also where another thread waits on it for a server that never lets go
        self.interrupted.set()
        for conn in [*self.idle, *self.used.copy()]:
            conn.close()
        deadline = time.monotonic() + LEAVE_SECONDS
        with self.rested:
            threads = [*self.threads, *filter(None, [self.heart])]
            for _ in self.threads:
                self.tasks.put(None)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def disown(self):
        """In a process forked from the worker's: close its copies of the sockets, so that the server
        hears when the worker dies. They are not shut down, as that would reach the worker's own.
        Locks may be held by threads that are not in this process."""
        for conn in filter(None, [self.control, *self.idle, *self.used]):
            conn.sock.close()
        self.closed = threading.Event()
        self.closed.set()


# --- The replica --------------------------------------------------------------------------------
#
# The worker's copy of the global model: a position in the log for each slice, and the pushes whose
# fate is not known yet. Threads of the link send the pushes, one after the other in the order in
# which they were made, and pull what the log says of each; the training thread moves the local
# parameters. A thread that needs both locks takes a slice's first and `changed` second.


class Replica:
    """The slices of the global model on one worker, and the traffic that keeps them up to date.

    slices: [Slice]; outbox: Outbox; listed: {slice: (Pending, reason of a refusal or "", step of the
    run)} for pushes that an entry lists and training has not adopted yet; broken: the Pendings whose
    numbers were not finite; error: exception that ended a request for good. `changed` guards all of
    these and is notified when one of them changes. step: local steps so far; the hook counts them.
    stream: of a GPU, for the threads of the link: in training's they would wait for its steps.
    """

    def __init__(self, worker_id, link):
        self.worker_id, self.link = worker_id, link
        self.slices, self.outbox = [], Outbox(worker_id, 0)  # ranks other than 0 have none
        self.stream = None
        self.changed = threading.Condition(threading.RLock())
        self.listed, self.broken, self.error = {}, [], None
        self.is_uploading = False
        self.step = 0
        self.settings = {}  # settings of the outer optimizer, by name
        self.mismatches = self.last_send = self.last_recv = 0
        self.sent = self.received = 0  # bytes of pushes, and of the pulls that wait for these
        self.awaited = {}  # slice, or "join" -> whom its reply waits for, in the server's words
        self.held_up = {}  # those who were waited for since the last round, as keys
        self.transferred = 0.0  # seconds; see `moving`
        self.began = {}  # slice -> seconds when its push was made
        self.last_sync_time = self.total_sync_time = 0.0

    def set_up(self, flats, reply):
        """Make the slices of a run, from the first Joined. flats: [(FlatModel, whether it
        is the buffers', whether it predicts)] by slice, the buffers last."""
        up, down, self.settings = reply.up, reply.down, reply.settings
        feedback = up.feedback and reply.error_feedback
        self.slices = []
        if not self.outbox.places:  # those of a worker that joins anew are there
            self.outbox = Outbox(self.worker_id, len(flats))
        self.outbox.max_staleness = reply.max_staleness
        for flat, carries_values, predicts in flats:
            if carries_values:
                up = down = CODECS["fp32"]
            has_residual = feedback and not carries_values
            self.slices.append(Slice(flat, up, down, has_residual, predicts, carries_values))
        device = self.slices[0].device
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def outer_at(self, made, part):
        """Return (lr, momentum, nesterov, part) of an outer step behind so many, or of a part of one.
        Delayed momentum comes with few of the parts: a prediction leaves it out."""
        lr, top, nesterov = (self.settings[n] for n in ("outer_lr", "outer_momentum", "nesterov"))
        momentum = protocol.momentum_at(made, top, self.settings["momentum_warmup"]) ** part
        return lr, 0.0 if self.settings["outer"] == "delayed" else momentum, nesterov, part

    @contextlib.contextmanager
    def moving(self):
        """A block in which a push is sent and answered, or numbers of the log are read: its seconds are
        those that `transferred` counts. They are those of encoding, decoding and the line, and not
        those in which a round is open. What moves at the same time on two connections counts twice."""
        began = time.monotonic()
        try:
            yield
        finally:
            with self.changed:
                self.transferred += time.monotonic() - began

    # --- Pushes ---

    def push(self, made, goes_on, facts):
        """Send a push that the outbox has made on its way. facts: further fields of its message."""
        slice = self.slices[made.k]
        has_numbers = slice.has_changed() if slice.carries_values else made.steps > 0
        slice.begin(has_numbers, goes_on)
        made.facts = facts
        self.began[made.k] = time.monotonic()
        # The thread that uploads may have another stream.
        queued = [stream.record_event() for stream in slice.flat.streams()]
        with self.changed:
            made.queued = queued  # before this, no thread sends it
        self.audit("push", made, base=made.base, first=made.first, last=made.last)
        self.kick()

    def kick(self):
        """Have the next push sent that the server has not answered, one at a time."""
        with self.changed:
            made = self.outbox.upload()
            stopped = self.error or self.link.interrupted.is_set() or self.link.lost.is_set()
            if self.is_uploading or stopped or made is None or made.queued is None:
                return
            self.is_uploading = True
        self.link.submit(lambda: self._deliver(made))

    def resend(self, push=None):
        """Have one push sent again, or after a join all that no entry lists, in their order."""
        with self.changed:
            self.outbox.resend(push)
        self.kick()

    def _deliver(self, made):
        """Send a push, then take the log up to where it is listed, while a thread sends the next."""
        torch.cuda.set_stream(self.stream)  # of this thread; None: as it is
        try:
            is_sent = self._upload(made)
            self.kick()
            if is_sent and not self.link.exchange(lambda conn: self.pull(conn, made.k, made.seq)):
                self.resend(made)
        except Interrupted:
            return
        except BaseException as error:  # a request has ended for good: training raises its error
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()

    def _upload(self, made):
        """Send a push. Returns False where its numbers are not finite: it is sent again without."""
        try:
            self.link.exchange(lambda conn: self._send(conn, made))
            made.answered = True
        except NotFinite:
            self.broken.append(made)
        finally:
            with self.changed:
                self.is_uploading = False
                self.changed.notify_all()
        return made.answered

    @torch.no_grad()
    def _send(self, conn, made):
        slice, before = self.slices[made.k], conn.bytes_out
        for event in made.queued:
            event.synchronize()
        fields = {
            "slice": made.k,
            "seq": made.seq,
            "base": made.base,
            "steps": 0 if slice.is_empty and not slice.carries_values else made.steps,
            "tokens": made.tokens,
            "closing": made.closing,
            **made.facts,
        }
        specs = () if slice.is_empty else slice.payload.specs
        pieces = self.progress_of(made, "up", specs, conn).over(slice.pieces()) if specs else ()
        with self.moving():
            conn.request("push", fields, specs, pieces).typed("push").expect([])
        self.last_send = conn.bytes_out - before
        self.sent += self.last_send

    def progress_of(self, push, way, specs, conn):
        """The Progress of a transfer: of a push or the entry that lists it, or without a push of the model.
        The log hears of a push only where training waits for it, and nothing at its end, as there is a
        line on each round."""
        size, done = protocol.payload_bytes(specs), conn.moved_since()
        if push is None:
            return Progress(log, "downloading the model", size, done)
        part = f" of slice {push.k}" if len(self.slices) > 1 else ""
        told = log if push.adopt_at == push.last else None
        return Progress(told, f"sync{part}, {way}", size, done, closes=False)

    def wait_for(self, k, fields):
        """Note whom the reply on slice k waits for, by the fields of a `wait` message."""
        self.link.reached()
        self.awaited[k] = protocol.printable(fields.get("awaited"))[:200]

    @property
    def waits_for(self):
        """Whom all that is under way waits for, in words; "" where that is nobody."""
        if self.link.outage is not None:
            return "the server"
        return " and ".join(dict.fromkeys([*self.awaited.values()]))

    # --- The log ---

    @torch.no_grad()
    def pull(self, conn, k, seq):
        """Take the entries that slice k lacks, up to the one that lists push `seq`; 0: up to the
        head. False where the server does not have that push. Raises ProtocolError where the numbers
        then differ from the server's: the next try gets the slice in full."""
        before, held = conn.bytes_in, self.outbox.places[k].version
        conn.send("pull", {"slice": k, "version": held, "seq": seq})
        on_wait = (lambda fields: self.wait_for(k, fields)) if seq else None  # the head is there
        for _ in range(MOST_ENTRIES):
            reply = conn.reply(on_wait)
            if whom := self.awaited.pop(k, ""):
                self.held_up[whom] = None
            if reply.type in ("again", "current"):
                reply.expect([])
                return reply.type == "current"
            news, push = news_of(reply, k), self.outbox.places[k].pending
            try:
                with self.moving(), self.progress_of(push, "down", reply.specs, conn):
                    whole = self._read(conn, k, news, reply)
                self._take(k, news, whole, len(reply.specs) > 1)
            except ProtocolError:
                self.outbox.places[k].version = NONE  # the next try gets the slice in full
                raise
            if not news.more:
                self.last_recv = conn.bytes_in - before
                with self.changed:
                    self.received += self.last_recv if seq else 0
                return True
        raise ProtocolError(f"pull: more than {MOST_ENTRIES} entries of slice {k}")

    def _read(self, conn, k, news, reply):
        """Read the numbers of an entry or a slice in full, and return the latter, else None. Raises
        ProtocolError where the latter are not finite: the anchor is as before then, or has none yet."""
        slice, place, whole, is_finite = self.slices[k], self.outbox.places[k], None, True
        if news.base is None:
            spec = protocol.TensorSpec("slice", torch.float32, (slice.size,))
            reply.expect([spec, Checksum.SPEC])
            # An anchor on the CPU that has no numbers yet takes those of the message itself.
            in_place = slice.is_blank and slice.device.type == "cpu"
            whole = slice.anchor if in_place else torch.empty_like(slice.anchor, device="cpu")
            for part in whole.split(protocol.CHUNK):
                conn.read(part)
                is_finite = is_finite and protocol.within(part)
        elif news.base != place.version:
            raise ProtocolError(f"the entry does not lead on from version {place.version}")
        elif reply.specs != [Checksum.SPEC]:
            reply.expect(slice.update.specs)
            conn.read(slice.update.tensors["values"])
        conn.read(slice.update.tensors["checksum"])
        if not is_finite:
            raise ProtocolError(f"slice {k} at version {news.version.number} is not finite")
        return whole

    def _take(self, k, news, whole, has_update):
        """Bring the anchor to where an entry or a slice in full leads, as `_read` has read it."""
        slice, place = self.slices[k], self.outbox.places[k]
        version, fates = news.version, news.fates
        with uninterrupted(), slice.lock:
            fate, pending = fates.get(self.worker_id), place.pending
            is_listed = pending is not None and fate is not None and fate.seq >= pending.seq
            moves = is_listed and slice.mark is None
            learns = whole is None and not news.plain
            slice.outer = self.outer_at(max(0.0, news.made - news.part), news.part)
            is_equal = slice.take(moves, whole, has_update, learns)
            with self.changed:
                if not is_equal:
                    self.mismatches += 1
                    place.version = NONE
                    raise ProtocolError(f"slice {k} at {version} has another checksum than there")
                slice.outer = self.outer_at(news.made, news.part or 1.0)  # as large as the last one
                made, refused = self.outbox.take(k, version, fates, whole is not None, self.step)
                if made:
                    self.listed[k] = made, refused, news.step
                    self.last_sync_time = time.monotonic() - self.began[k]
                    self.total_sync_time += self.last_sync_time
                    self.changed.notify_all()
        self.audit_anchor(k)

    def catch_up(self, conn, k):
        """Bring a slice without a push on its way to the head of the log, and the local values with
        it, and local work on top, if the log has anything newer. Returns whether they are finite."""
        slice, held = self.slices[k], self.outbox.places[k].version
        goes_on = slice.mark is not None
        slice.mark_anchor()
        try:
            self.pull(conn, k, 0)
        finally:  # a mark that stays would be taken for that of the next push
            is_finite = True
            if self.outbox.places[k].version == held and not goes_on:
                slice.unmark()
            else:
                is_finite = slice.adopt()
        return is_finite

    def is_global(self):
        """Whether the local values are the global ones: nothing is on top of them in any slice, and
        nothing is under way."""
        with self.changed:
            places = self.outbox.places
            return not self.listed and all(
                place.pending is None and place.mark[0] == self.step for place in places
            )

    def progress(self):
        """Return the progress of each slice for a checkpoint, as JSON has it."""
        return [
            {
                "version": list(place.version),
                "seq": place.seq,
                "steps": self.step - place.mark[0],
                "in_flight": place.pending is not None or k in self.listed,
            }
            for k, place in enumerate(self.outbox.places)
        ]

    # --- For tests/trail.py ---

    def audit(self, event, made=None, **facts):
        """Write down an event, and the name of the push that it is about."""
        if protocol.is_audited():
            named = {"fragment": made.k, "seq": made.seq} if made else {}
            who = {"worker": self.worker_id, "session": self.link.session}
            protocol.audit(event, **who, **named, **facts)

    def audit_anchor(self, k):
        """Write down the checksum of an anchor."""
        if protocol.is_audited():
            checksum = bytes(protocol.checksum_of(self.slices[k].anchor).tolist()).hex()
            label = self.outbox.places[k].version
            self.audit("adopt", fragment=k, label=label, checksum=checksum)


# --- One worker, several processes ---------------------------------------------------------------
#
# All processes of a torch.distributed program (DistributedDataParallel, fully_shard) are one worker.
# Rank 0 alone talks to the server; the other ranks follow. Each synchronization is one turn:
#
#     all ranks   tell     the other ranks hear whether there is work; if not, the turn ends here
#     all ranks   gather   rank 0 gets the current values of what the ranks hold in shards
#     rank 0      works on whole tensors, as if it were alone; the other ranks wait in `tell`
#     all ranks   tell     the other ranks hear what became of the turn, an error included
#     all ranks   spread   each rank's parameters become rank 0's, to the bit
#
# Every rank must make these calls in one order. A call that fails in the middle leaves the ranks at
# different points, and nobody would answer the next one: none is made any more, and the other ranks
# fail when the process of the first one ends. Rank 0 may work for hours, since a round lasts as
# long as its slowest worker: `tell` has a process group with a patience of its own. The transfers of
# gather and spread begin only when all ranks have arrived, so they take the program's own groups
# (NCCL between GPUs). Both move one parameter at a time: no GPU ever holds a second whole model.
#
# A plain model (no DTensor) needs no gather: rank 0 works on its parameters themselves. For a sharded
# model rank 0 keeps a *mirror* in CPU memory: each parameter whole, in the parameter's dtype, plain
# parameters and buffers included, so that all of rank 0's work happens in one place.

RANKS_PATIENCE = datetime.timedelta(days=30)  # time that the other ranks wait for rank 0's work


class Ranks:
    """The processes of one worker; just this process where torch.distributed is not initialized.

    named: {name: tensor} of all that may be read or written here, in one order on every rank: plain
    tensors, or DTensors with which `misplaced` finds no fault. Methods take some of these names, in
    one order too. All ranks make each call together, but for `whole` and `release`. Raises
    RuntimeError, in any of the joint calls, where another rank has died or a joint call before has
    failed.
    """

    def __init__(self, named):
        there = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        self.leads = self.rank == 0  # whether this rank talks to the server
        self.groups = []  # one gloo group, for `tell` and for tensors in CPU memory; or none
        if self.count > 1:
            self.groups.append(dist.new_group(backend="gloo", timeout=RANKS_PATIENCE))
            weakref.finalize(self, end_groups, self.groups)
        self.named = dict(named)
        self.is_sharded = any(map(is_sharded, self.named.values()))
        self.mirror = {} if self.is_sharded and self.leads else None  # {name: whole CPU tensor}
        self.told = b""  # last value that was told, as JSON
        self.is_broken = False  # whether a joint call has failed, or is under way

    @property
    def is_alone(self):
        """Whether this process has the whole model, and nobody to tell."""
        return self.count == 1 and not self.is_sharded

    @contextlib.contextmanager
    def _joint(self):
        """Mark a joint call. If it fails here, no rank can tell where the others are."""
        if self.is_broken:
            raise RuntimeError("a transfer between the ranks of this worker has failed before")
        self.is_broken = True
        yield
        self.is_broken = False

    def tell(self, value):
        """Return rank 0's `value`, as JSON gives it back, on every rank; with one rank, `value`
        itself. Other ranks' values are ignored. An unchanged value costs a broadcast of 8 bytes."""
        if self.count == 1:
            return value
        news = json.dumps(value).encode() if self.leads else b""
        with self._joint():
            size = torch.tensor(0 if news == self.told else len(news), device="cpu")
            dist.broadcast(size, 0, group=self.groups[0])
            if size:
                raw = bytearray(news or size.item())
                text = torch.frombuffer(raw, dtype=torch.uint8)
                dist.broadcast(text, 0, group=self.groups[0])
                self.told = bytes(raw)
        return json.loads(self.told)

    def whole(self, names):
        """Return the list of tensors that rank 0 works on: the parameters themselves, or of a sharded
        model the mirror's tensors, on the CPU, each of its parameter's dtype and full shape. A
        mirror's tensor holds noise until the first `gather`. Only on rank 0."""
        return [self._mirrored(name) if self.is_sharded else self.named[name] for name in names]

    def _mirrored(self, name):
        """Return the mirror's tensor, made on the first call; two names of a tensor share one."""
        if name not in self.mirror:
            own = self.named[name]
            twins = [room for twin, room in self.mirror.items() if self.named[twin] is own]
            room = twins[0] if twins else torch.empty(own.shape, dtype=own.dtype, device="cpu")
            self.mirror[name] = room
        return self.mirror[name]

    def release(self, names):
        """Free the mirror's tensors with these names; frozen parameters are needed at a join only."""
        for name in names if self.mirror else ():
            self.mirror.pop(name, None)

    @torch.no_grad()
    def gather(self, names, seen=(), see=None):
        """Fill rank 0's mirror with current values; and have rank 0 call see(name, whole tensor) for
        the names `seen`, of which none is kept. Where nothing is sharded there is no need. An error of
        rank 0's own, such as a lack of memory, is raised when all transfers are through: the other
        ranks make them too."""
        kept, failure = list(names), None
        with self._joint():
            for i, name in enumerate([*kept, *seen] if self.is_sharded else ()):
                tensor = self.named[name].detach()
                if is_sharded(tensor):
                    # Shards that are offloaded to the CPU still travel between the mesh's devices.
                    tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
                if not self.leads or failure:
                    continue
                try:
                    self._mirrored(name).copy_(tensor) if i < len(kept) else see(name, tensor)
                except Exception as error:
                    failure = error
        if failure:
            raise failure

    @torch.no_grad()
    def spread(self, names):
        """Make every rank's tensors equal to rank 0's, to the bit; rank 0's own shards too become what
        the mirror says. Memory stays in place: optimizers and fully_shard hold on to it."""
        with self._joint():
            for name in names:
                own = self.named[name].detach()
                self._spread_whole(name, own) if self.is_sharded else self._send(own)

    def _spread_whole(self, name, own):
        part = part_of(own)
        if self.leads:
            whole = self.mirror[name].to(part.device)
        else:
            whole = torch.empty(own.shape, dtype=own.dtype, device=part.device)
        self._send(whole)
        part.copy_(cut_like(whole, own) if is_sharded(own) else whole)

    @torch.no_grad()
    def broadcast(self, tensors):
        """Make plain tensors, such as buffers, equal to rank 0's."""
        with self._joint():
            for tensor in tensors:
                self._send(tensor.detach())

    def _send(self, own):
        """Send rank 0's values of a plain tensor to all, as bytes, since gloo has few dtypes."""
        if self.count == 1 or not own.numel():
            return
        dense = own.contiguous()  # `own` itself, or a copy in row order
        group = self.groups[0] if own.is_cpu else None  # None: the program's own, such as NCCL
        dist.broadcast(dense.view(-1).view(torch.uint8), 0, group=group)
        if dense is not own:
            own.copy_(dense)


def end_groups(groups):
    """End process groups, with gloo's threads. A thread that lets go of a tensor takes Python's lock
    for it; if Python has ended by then, the thread aborts the process."""
    while groups:
        group = groups.pop()
        # Where the program has ended all groups itself, this one's name is gone.
        if dist.is_initialized():
            dist.destroy_process_group(group)


def is_sharded(tensor):
    """Whether a tensor is a DTensor; told without an import, since most programs have no DTensors."""
    return hasattr(tensor, "full_tensor")


def part_of(tensor):
    """What this rank has of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shards_of(tensor):
    """In how many shards a tensor is cut; 1 where it is whole."""
    cuts = tensor.placements if is_sharded(tensor) else ()
    return math.prod(tensor.device_mesh.size(i) for i, cut in enumerate(cuts) if cut.is_shard())


def cut_like(whole, tensor):
    """Return the rows of a whole tensor that belong in this rank's part of the DTensor `tensor`.
    fully_shard cuts as torch.chunk does, in the order of the mesh's process group, by rank."""
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            group = tensor.device_mesh.get_group(dim)
            parts = whole.chunk(group.size())  # fewer parts than ranks where rows are few
            whole = parts[group.rank()] if group.rank() < len(parts) else whole[:0]
    return whole


def misplaced(tensor):
    """What is wrong with where a DTensor lies, to end a sentence; "" if fully_shard could do it."""
    from torch.distributed.tensor import Replicate, Shard

    placements, mesh = tensor.placements, tensor.device_mesh
    cuts = [placement for placement in placements if type(placement) is not Replicate]
    if len(cuts) > 1 or any(type(cut) is not Shard or cut.dim != 0 for cut in cuts):
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


def fsdp_modules(model):
    """Return the modules of a model that fully_shard has been applied to."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [module for module in model.modules() if isinstance(module, fsdp)]


def reshard(modules):
    """Free the whole parameters that a forward pass without a backward pass has left in modules, as
    `fsdp_modules` lists them: the next pass would use old values, whatever the shards say."""
    for module in modules:
        module.reshard()


# --- What is trained ----------------------------------------------------------------------------


class Buffers(protocol.FlatModel):
    """The persistent floating-point buffers of a model as one flat vector, such as the statistics
    of BatchNorm. A module may put a new tensor in a buffer's place at any time.

    places: {name: (module, attribute)}.
    """

    def __init__(self, places):
        self.places = places
        self.tensors = [getattr(module, attribute) for module, attribute in places.values()]
        super().__init__(self.tensors)

    def parts_in(self, start, stop):
        for i, (module, attribute) in enumerate(self.places.values()):
            found = getattr(module, attribute, None)
            if isinstance(found, torch.Tensor) and found.shape == self.tensors[i].shape:
                self.tensors[i] = found
                self.parts[i] = (found, *self.parts[i][1:])
        return super().parts_in(start, stop)


class Trained:
    """The synchronized tensors of a model, under their names from before it is compiled or wrapped.

    named: {name: synchronized parameter}; later: names of those that are frozen now and trained
    later in the run, and `patterns` that name them; dropped: names that were trained once, then not;
    frozen: {name: parameter that is not trained, and can be compared with other workers'}; buffers:
    {name: (module, attribute)}; optimizers: the innermost ones; files: {name: text} of descriptive
    files. Names that a pattern in `local` fits are in none of these. Raises ValueError where a
    parameter cannot be synchronized.
    """

    def __init__(self, model, optimizer, files=None, local=(), trained=()):
        several = isinstance(optimizer, list | tuple)
        given = list(optimizer) if several else [optimizer]
        refuse_deepspeed(model, given)
        self.optimizers = [unwrapped(each) for each in given]
        if not self.optimizers:
            raise ValueError("optimizer is an empty list: its last one's steps are to be counted")
        self.model, self.fsdp_modules = innermost(model), fsdp_modules(model)
        reshard(self.fsdp_modules)
        self.local, self.patterns = patterns(local), patterns(trained or thawed_later(model))
        self.named, self.dropped = {}, set()
        self.foreign = set()  # ids of the optimizers' parameters that the model lacks
        self.given_files = files
        self.read()

    def read(self):
        """Find what is trained now. What is trained again from now on stays synchronized."""
        known = self.parameters()
        found = {n: p for n, p in known.items() if not fits(n, self.local)}
        again = [name for name in self.dropped & found.keys() if found[name].requires_grad]
        self.patterns += map(glob.escape, again)
        before, frozen = self.named, set(comparable_names(self.model))
        frozen = {n: p for n, p in found.items() if n in frozen}
        self.later = {name for name in frozen if fits(name, self.patterns)}
        self.named = {n: p for n, p in found.items() if p.requires_grad or n in self.later}
        self.dropped |= before.keys() - self.named.keys()
        if not any(parameter.requires_grad for parameter in self.named.values()):
            raise ValueError("the model has no parameter that requires grad: nothing to train")
        for name, parameter in self.named.items():
            check_parameter(name, parameter)
        self.check_optimizers()
        self.say_foreign(known)
        self.frozen = {n: p for n, p in frozen.items() if n not in self.later}
        plain = plain_names(self.model)
        self.places = {plain(name): place for name, place in floating_buffers(self.model)}
        self.places = {n: place for n, place in self.places.items() if not fits(n, self.local)}
        self.buffers = {
            name: place
            for name, place in self.places.items()
            if protocol.within(getattr(*place).detach().float().reshape(-1))
        }  # a mask may hold its dtype's lowest number, which counts as not finite
        self.files = self.given_files
        if self.files is None:
            known = self.named.keys() | (self.dropped & self.frozen.keys())
            self.files = description_of(self.model, known, self.frozen, self.buffers)

    def parameters(self):
        """{name: parameter} of the whole model as it is now."""
        plain = plain_names(self.model)
        return {plain(name): parameter for name, parameter in self.model.named_parameters()}

    def stripe(self, count):
        """Elements of a stripe, as `count` slices share what is trained."""
        return protocol.stripe_of(sum(p.numel() for p in self.named.values()), count)

    def check_optimizers(self):
        """Raise ValueError where a trained parameter is in none of the optimizers, or in a wrong one."""
        held = {id(p): each for each in self.optimizers for p in parameters_of(each)}
        for name, parameter in self.named.items():
            is_muon = isinstance(held.get(id(parameter)), getattr(torch.optim, "Muon", ()))
            if is_muon and len(parameter) < (shards := shards_of(parameter)):
                raise ValueError(
                    f"parameter {name!r} has {len(parameter)} rows on {shards} shards, and torch's Muon "
                    "cannot step a matrix with fewer rows than shards: give it to AdamW"
                )
            if hasattr(parameter, "_in_backward_optimizers"):
                raise ValueError(
                    f"parameter {name!r} has an optimizer that steps within the backward pass: there "
                    "is no moment between two steps at which the model is whole. Use an optimizer "
                    "that steps after the backward pass"
                )
            if name not in self.later and id(parameter) not in held:
                kinds = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
                raise ValueError(
                    f"parameter {name!r} requires grad, but is in no group of the optimizer that was "
                    f"given ({kinds}). Give the one that steps, or all of them as a list in the order "
                    "in which they step; else freeze the parameter with requires_grad_(False), or "
                    "name it in local=[...] if it is to be this worker's own"
                )

    def say_foreign(self, known):
        """Say which parameters of the optimizers the model lacks, which has the `known` ones."""
        known = {id(parameter) for parameter in known.values()} | self.foreign
        held = (p for optimizer in self.optimizers for p in parameters_of(optimizer))
        found = [parameter for parameter in held if id(parameter) not in known]
        self.foreign |= {id(parameter) for parameter in found}
        if found:
            log(
                f"WARNING: {len(found)} parameters of the optimizer are not in the model that was "
                f"given, such as one of shape {list(found[0].shape)}: they are not synchronized"
            )

    @property
    def buffer_tensors(self):
        """{name: buffer} as they are now."""
        found = {name: getattr(*place, None) for name, place in self.buffers.items()}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    def clear_moments(self):
        """Forget the optimizers' state: it belongs to parameters that are gone."""
        for optimizer in self.optimizers:
            optimizer.state.clear()


# Classes that wrap a module, and the attribute that it is in. They are known by name, since an import
# of torch._dynamo takes longer than a small training.
WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",  # of torch.compile
    "_FabricModule": "_forward_module",  # of Lightning's Fabric
}


def wrapped_in(kind):
    """The attribute in which a class of WRAPPERS has its module, else ""."""
    return next((WRAPPERS[c.__name__] for c in kind.__mro__ if c.__name__ in WRAPPERS), "")


def plain_names(model):
    """A function from a name within `model` to what it was before anything in it was wrapped."""
    modules = [*model.named_modules()]
    inners = {kind: wrapped_in(kind) for kind in {type(module) for _, module in modules}}
    wrappers = [(path, inners[type(module)]) for path, module in modules]
    wrappers = [(f"{path}." if path else "", f"{inner}.") for path, inner in wrappers if inner]
    if not wrappers:
        return str

    def plain(name):
        for path, inner in reversed(wrappers):  # the innermost first: outer paths stay as they are
            if name.startswith(path + inner):
                name = path + name[len(path + inner) :]
        return name

    return plain


def patterns(given):
    """A list of name patterns, as fnmatch has them; one may be given as it is."""
    return [given] if isinstance(given, str) else list(given)


def fits(name, patterns):
    """Whether a name fits one of some patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def thawed_later(model):
    """Patterns for what a finetuning callback of Lightning may train later: all, or [] without one."""
    callbacks = getattr(getattr(model, "_trainer", None), "callbacks", None) or []
    kinds = {cls.__name__ for callback in callbacks for cls in type(callback).__mro__}
    return ["*"] if "BaseFinetuning" in kinds else []


def refuse_deepspeed(model, optimizers):
    """Raise ValueError where DeepSpeed trains: what an optimizer of its holds is not the model's."""
    things = [model, *model.modules(), *(layer for each in optimizers for layer in layers_of(each))]
    made_by = {cls.__module__: cls.__name__ for thing in things for cls in type(thing).__mro__}
    found = [name for module, name in made_by.items() if module.startswith("deepspeed.runtime")]
    if found or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"DeepSpeed ({found[0] if found else 'ZeRO-3'}) cannot be synchronized: it trains a float32 "
            "copy of the parameters and writes it over them at each step, and with ZeRO-3 the model's "
            "own are empty. Use DistributedDataParallel, or fully_shard (FSDP2) for large models"
        )


def comparable_names(model):
    """The plain names of what is not trained and can be compared with others': floating-point
    numbers that are there and whole. Quantized weights are left out, and so are originals of which
    an adapter trains a copy (peft's `modules_to_save`), as no forward pass uses those."""
    plain = plain_names(model)
    copied = tuple(
        f"{name}.original_module."
        for name, module in model.named_modules()
        if isinstance(getattr(module, "modules_to_save", None), torch.nn.ModuleDict)
    )
    for name, parameter in model.named_parameters():
        is_plain = type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor
        is_known = parameter.is_floating_point() and parameter.dtype in protocol.DTYPE_NAMES
        if parameter.requires_grad or name.startswith(copied) or parameter.is_meta:
            continue
        if is_known and (is_plain or (is_sharded(parameter) and not misplaced(parameter))):
            yield plain(name)


def floating_buffers(model):
    """(name, (module, attribute)) of the persistent floating-point buffers. Others stay local:
    counters, masks, and those of which several elements share their memory."""
    kept, modules = set(model.state_dict(keep_vars=True)), dict(model.named_modules())
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        is_known = buffer.is_floating_point() and buffer.dtype in protocol.DTYPE_NAMES
        is_expanded = any(
            n > 1 and s == 0 for n, s in zip(buffer.shape, buffer.stride(), strict=True)
        )
        is_there = buffer.numel() > 0 and not (buffer.is_meta or is_expanded)
        if name in kept and is_known and is_there:
            yield name, (modules[owner], attribute)


def check_parameter(name, parameter):
    """Raise ValueError where a parameter that is trained cannot be synchronized."""
    fault = ""
    if torch.nn.parameter.is_lazy(parameter):
        fault = "has no shape yet: run one batch, then begin"
    elif parameter.is_meta:
        fault = "is on the meta device, so it has no numbers yet: load or initialize the model, then begin"
    elif "_fsdp_wrapped_module" in name:
        fault = "is flattened by FullyShardedDataParallel, which hides what it was: use fully_shard (FSDP2)"
    elif is_sharded(parameter) and misplaced(parameter):
        fault = misplaced(parameter)
    elif not parameter.is_floating_point():
        fault = (
            f"is {parameter.dtype}: only floating-point numbers can be synchronized; freeze it with "
            "requires_grad_(False)"
        )
    elif parameter.dtype == torch.float64:
        fault = (
            "is float64, and what is synchronized is float32: each round would round it. Make the "
            "model float32 with model.float()"
        )
    if fault:
        raise ValueError(f"parameter {name!r} {fault}")


def layers_of(optimizer):
    """An optimizer, and what it wraps in an attribute called `optimizer`, from the outside in."""
    layers = []
    while optimizer is not None and not any(optimizer is known for known in layers):
        layers.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return layers


def unwrapped(optimizer):
    """The innermost optimizer of wrappers such as accelerate's, which have it in `optimizer`."""
    found = [each for each in layers_of(optimizer) if hasattr(each, "register_step_post_hook")]
    if not found:
        raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
    return found[-1]


def is_nested_step(optimizer, outer=None):
    """Whether a step of `optimizer` is made within another one of its own, or of `outer`: no count of
    hooks survives a step that raises, so the stack tells."""
    code = getattr(type(optimizer).step, "__code__", None)  # torch's, that of each class with hooks
    steps, most = [frame for frame in callers() if frame.f_code is code], 0 if outer else 1
    if len(steps) <= most:  # as a rule: it takes longer to look at the variables of a frame
        return False
    depth = sum(any(v is (outer or optimizer) for v in each.f_locals.values()) for each in steps)
    return depth > most


def callers():
    """The frames of all calls that are under way in this thread, from the innermost on."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def innermost(model):
    """The model within torch.compile's, DistributedDataParallel's and other wrappers."""
    while inner := wrapped_in(type(model)):
        model = getattr(model, inner)
    return model


def load_weights(model, path):
    """Fill a model from a run's result, which has tied weights once: the server's folder, a file of
    it, or a checkpoint folder. The model may be compiled or wrapped. Raises ValueError where a tensor
    is lacking, odd, or of another shape. Frozen parameters that the result lacks stay what they are,
    with a line in the log. Raises OSError and ProtocolError where there are no weights."""
    plain, weights = plain_names(model), protocol.load_folder(os.fspath(path))
    own = {plain(n): tensor for n, tensor in model.named_parameters(remove_duplicate=False)}
    filled = {id(own[name]) for name in weights if name in own}
    lacking = {name: tensor for name, tensor in own.items() if id(tensor) not in filled}
    own |= {plain(name): buffer for name, buffer in model.named_buffers()}
    for name, tensor in own.items():
        is_other = name in weights and weights[name].shape != tensor.shape
        if is_other or (name in lacking and tensor.requires_grad):
            raise ValueError(f"{path} does not fit the model: it lacks {name!r} of this shape")
    for name in weights.keys() - own.keys():
        raise ValueError(f"{path} does not fit the model, which lacks {name!r}")
    with torch.no_grad():
        for name, values in weights.items():
            own[name].copy_(values)
    if lacking:
        log(
            f"{path} lacks {len(lacking)} frozen tensors, such as {min(lacking)!r}: they stay as is"
        )


def description_of(model, trained, frozen, buffers):
    """{name: text} of the files that let others open what the server writes; trained, frozen,
    buffers: names of the tensors that a run knows. config.json, if transformers builds a model of these
    names from it; of a peft model adapter_config.json and adapter_names.json; else nothing."""
    peft, transformers = map(sys.modules.get, ("peft", "transformers.modeling_utils"))
    if peft and isinstance(model, peft.PeftModel):
        return adapter_files(model, peft, {*trained}, {*buffers})
    every, plain = model.named_parameters(), plain_names(model)
    is_known = all(plain(name) in trained or plain(name) in frozen for name, _ in every)
    if transformers and isinstance(model, transformers.PreTrainedModel) and is_known:
        if is_as_built(model, plain):
            return {"config.json": model.config.to_json_string()}
        log(f"{type(model).__name__} is not what its config describes: it gets no config.json")
    return {}


def is_as_built(model, plain):
    """Whether a model of transformers has the tensors of the one that its config describes, without
    an adapter or a parametrization. plain: as `plain_names` gives it."""
    try:
        with torch.random.fork_rng([]), torch.device("meta"):
            built = type(model)(copy.deepcopy(model.config))
    except Exception:  # a class of the program's own, which wants more than a config
        return False
    own, its = (m.named_parameters(remove_duplicate=False) for m in (model, built))
    return {plain(n): p.shape for n, p in own} == {n: p.shape for n, p in its}


def adapter_files(model, peft, trained, buffers):
    """The two files of a peft model: the adapter's config, and for each tensor the name that it has
    in adapter_model.safetensors. {}, with a line in the log, where that file would not be all of the
    adapter, as with parts of it that are not trained, or prompts that peft saves encoded."""
    first, *others = model.peft_config
    config = copy.copy(model.peft_config[first])
    own, plain = model.state_dict(keep_vars=True), plain_names(model)
    chosen = {"adapter_name": first, "save_embedding_layers": False}
    saved = peft.get_peft_model_state_dict(model, own, **chosen)
    twins = {id(tensor): plain(name) for name, tensor in reversed(own.items())}
    if config.is_prompt_learning:  # of which peft saves a copy, unless it encodes it
        ours = [tensor for name, tensor in own.items() if plain(name) in trained]
        pairs = [(tensor, twin) for tensor in ours for twin in saved.values()]
        twins |= {id(b): twins[id(a)] for a, b in pairs if torch.equal(a.cpu(), b.cpu())}
    names = {twins.get(id(tensor), name): name for name, tensor in saved.items()}
    odd = [*others, *sorted((trained - names.keys()) | (names.keys() - trained - buffers))]
    if odd:
        log(
            f"WARNING: PeftModel.from_pretrained cannot open the result, as {odd[0]!r} is not as it is "
            "in the file of one adapter, all of it trained; load_weights(model, folder) can"
        )
        return {}
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
            return {"adapter_config.json": file.read(), "adapter_names.json": json.dumps(names)}


# --- What would go wrong in silence --------------------------------------------------------------
#
# A worker sees the steps of the optimizers that it was given, and the values of the parameters that
# were there when it joined. A program may do more: train other parameters, step another optimizer, or
# keep a copy of the weights that it writes over them. `Watch` looks for that where a round ends, so
# that no step has to pay for it; `Copies` moves copies that can be recognised, and `Jumps` finds
# out about the others.

REQUIRES_GRAD = operator.attrgetter("requires_grad")
LISTENING = []  # a tuple of Watches that hear of each step of any optimizer, once there is one


def listen(watch):
    """Have watch.heard() called after each step from now on."""
    if not LISTENING:
        # Once and for good: the hooks must not change while another thread's optimizer steps.
        register_optimizer_step_pre_hook(torch.compiler.disable(_stepping))
        register_optimizer_step_post_hook(torch.compiler.disable(_stepped))
    LISTENING[:] = [(*(LISTENING[0] if LISTENING else ()), watch)]


def unlisten(watch):
    if LISTENING:
        LISTENING[:] = [tuple(other for other in LISTENING[0] if other is not watch)]


def _stepping(optimizer, args, kwargs):
    for watch in LISTENING[0]:
        watch.about(optimizer)


def _stepped(optimizer, args, kwargs):  # a compiled step ends where this begins
    for watch in LISTENING[0]:
        watch.heard(optimizer)


def parameters_of(optimizer):
    """The parameters of an optimizer, of all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def marks_of(optimizer):
    """By group, how many parameters an optimizer has, the first and the last: quick to compare."""
    groups = [group["params"] for group in optimizer.param_groups]
    return [(len(group), *map(id, group[:1]), *map(id, group[-1:])) for group in groups]


class Watch:
    """What the program does beside the worker, in the training thread of each rank.

    trained: Trained; seen: {name: (parameter, shape)} of the model at the join; held: {id of an
    optimizer: its marks then}; resting: parameters that were not trained then; strangers: {type of
    an optimizer that was not given: (name of a parameter, its steps)}; behind: types of optimizers
    that stepped behind the one whose steps count; doubtful: found_inf of each step since the last
    boundary of which a GradScaler on a GPU says there whether it was one.
    """

    def __init__(self, worker):
        self.worker, self.trained = worker, worker.trained
        self.note(self.trained.parameters())
        self.harmless = weakref.WeakSet()  # other optimizers, which have no parameter of ours
        self.unseen = [*self.trained.optimizers[:-1]]  # those that have not stepped yet
        self.strangers, self.behind, self.doubtful, self.noted = {}, [], [], {}
        self.copies, self.jumps, self.beside = Copies(self.trained), Jumps(worker), Beside(worker)
        self.has_told_frozen = self.has_told_over = False

    def note(self, found):
        """Note what is trained now; found: {name: parameter} of the whole model."""
        trained = self.trained
        self.seen = {name: (p, p.shape) for name, p in found.items()}
        self.names = {id(parameter): name for name, parameter in trained.named.items()}
        others = {n: p for n, p in found.items() if n not in trained.named}
        self.resting = [p for n, p in others.items() if not fits(n, trained.local)]
        self.held = {id(each): marks_of(each) for each in trained.optimizers}

    def about(self, optimizer):
        """An optimizer of this process is about to step. Looks closely only where a step ends a round,
        or where the optimizer has other parameters or a frozen one is trained."""
        held = self.held.get(id(optimizer))
        if held is None or not self.worker.ranks.is_alone:
            return
        is_end = self.worker.schedule.left <= 1 or not self.worker.slices
        if is_end or marks_of(optimizer) != held or any(map(REQUIRES_GRAD, self.resting)):
            self.worker.leader.anew.heed(optimizer)

    def heard(self, optimizer):
        """An optimizer of this process has stepped."""
        if optimizer is self.trained.optimizers[-1]:
            if not is_nested_step(optimizer):  # as where a subclass's `step` calls its parent's
                self.worker._after_step()
        elif optimizer in self.beside.alike:
            self.beside.count(optimizer)
        elif optimizer not in self.harmless:
            self.other(optimizer)

    def other(self, optimizer):
        """Another optimizer than the one whose steps count has stepped."""
        if optimizer in (given := self.trained.optimizers):
            if optimizer in self.unseen:
                self.unseen.remove(optimizer)
                if self.worker.local_step == 1:
                    self.behind.append(type(optimizer).__name__)
            return
        held = map(id, parameters_of(optimizer))
        name, last = next((self.names[i] for i in held if i in self.names), None), given[-1]
        is_inner = any(value is optimizer for value in vars(last).values())
        if name and is_inner and not is_nested_step(optimizer, last):  # as of SAM in two halves
            given[-1], self.held[id(optimizer)] = optimizer, marks_of(optimizer)
            return self.worker._after_step()
        is_part = self.is_part(optimizer)
        if name is None and not is_part and self.beside.heed(optimizer):
            return
        if name is None or is_part:
            self.harmless.add(optimizer)
            return
        kind = type(optimizer).__name__
        self.strangers[kind] = name, self.strangers.get(kind, (name, 0))[1] + 1

    def is_part(self, optimizer):
        """Whether an optimizer wraps one that was given, or steps within a step of one."""
        given = self.trained.optimizers
        inner = [*vars(optimizer).values()]
        inner += [each for value in inner if isinstance(value, list | tuple) for each in value]
        inner += [frame.f_locals.get("self") for frame in callers()]
        return any(value is own for value in inner for own in given)

    # --- Steps that are none ---

    def note_scaler(self, optimizer):
        """Note what a GradScaler tells an optimizer which skips steps by itself, as fused ones do."""
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            self.doubtful.append(found)
            if found.device.type == "cpu":
                self.settle()

    def settle(self):
        """Take back the count of the steps that were none."""
        doubtful, self.doubtful = self.doubtful, []
        if doubtful and self.worker.ranks.leads:
            worker, none = self.worker, int(torch.stack(doubtful).count_nonzero())
            worker.skipped += none
            worker.replica.step -= none
            worker.schedule.left += none

    # --- At boundaries ---

    def check(self):
        """Raise RuntimeError where something else is trained than at the join, or by another one."""
        if fault := self.change(self.trained.parameters()):
            fault += (
                ", since this worker joined, and it cannot join anew now: that takes a step after the "
                "change, and a worker of one process. Make a DiLoCoWorker when the model is as it will "
                "be trained; name what is frozen at first and trained later in trained=[...] (patterns "
                "such as 'backbone.*'), on all workers"
            )
        if fault := fault or self.strange():
            raise RuntimeError(f"{self.worker.worker_id}: {fault}")

    def strange(self):
        """Say which optimizer should not have stepped, or not at its place; or ""."""
        for kind, (name, steps) in self.strangers.items():
            return (
                f"{kind}, an optimizer that DiLoCoWorker was not given, has stepped parameter {name!r} "
                f"{steps} times. Its steps are not counted, and what they did is not sent. Make a "
                "DiLoCoWorker with the optimizer that steps (several as a list in their order), after "
                "close() of this one"
            )
        if self.behind:
            last = type(self.trained.optimizers[-1]).__name__
            return (
                f"{self.behind[0]} steps after {last}, which is the last of the optimizers that were "
                "given and so the one whose steps count: give them in the order in which they step"
            )
        return ""

    def change(self, now):
        """Say how {name: parameter} differ now from what was trained at the join, or ""."""
        trained = self.trained
        trained.say_foreign(now)
        for name, parameter in now.items():
            before, shape = self.seen.get(name, (None, None))
            is_ours = name in trained.named
            if not is_ours and (not parameter.requires_grad or fits(name, trained.local)):
                continue
            if before is None:
                return f"parameter {name!r} is new"
            if parameter.dtype == torch.float64:
                return f"parameter {name!r} is float64 now"
            if parameter.shape != shape:
                return f"parameter {name!r} was {list(shape)} and is {list(parameter.shape)}"
            if parameter is not before:
                return f"parameter {name!r} has been replaced by another tensor"
            if not is_ours:
                return f"parameter {name!r} was frozen and is trained now"
            if not (parameter.requires_grad or name in trained.later or self.has_told_frozen):
                self.has_told_frozen = True
                log(
                    f"parameter {name!r} has requires_grad=False now: it stays synchronized, with "
                    "what the other workers make of it"
                )
        gone = [name for name in trained.named if name not in now]
        return f"parameter {gone[0]!r} is not in the model any more" if gone else ""

    def frozen_in(self, optimizer):
        """Say which synchronized parameter of an optimizer that is about to step, or of none at all,
        is not trained any more; or "". One that rests while another optimizer steps is trained."""
        trained = self.trained
        held = {id(each): {*map(id, parameters_of(each))} for each in trained.optimizers}
        for name, parameter in trained.named.items():
            is_its = id(parameter) in held[id(optimizer)]
            is_its = is_its or not any(id(parameter) in ids for ids in held.values())
            if is_its and not (parameter.requires_grad or fits(name, trained.patterns)):
                return f"parameter {name!r} was trained and is frozen now"
        return ""

    def moved(self):
        """Return the slices that have moved since the last boundary without a step: work in no push."""
        worker, step = self.worker, self.worker.local_step
        if worker.fragment_update == "mix":  # which leaves local values as they are not in the log
            return []
        places = enumerate(worker.outbox.places[: worker.num_fragments])
        idle = [k for k, p in places if p.mark[0] == step and not (p.pending or p.is_closed)]
        idle = [k for k in idle if k not in worker.replica.listed]
        return [k for k in idle if worker.slices[k].has_changed()]

    def heed_moved(self):
        """Count what `moved` finds as a step. Raises RuntimeError where none was ever counted."""
        worker, places = self.worker, self.worker.outbox.places
        moved = self.moved()
        if moved and worker.local_step == 0:
            raise RuntimeError(self.unseen_steps())
        for k in moved:
            places[k].mark = worker.local_step - 1, places[k].mark[1]
        if moved:
            log(
                f"WARNING: {worker.worker_id}: parameters have moved since the last step of "
                f"{type(worker.optimizer).__name__}; that is sent too, as one step"
            )

    def unseen_steps(self):
        return (
            f"{self.worker.worker_id}: parameters have moved since the join, but no step of the "
            f"{type(self.worker.optimizer).__name__} that DiLoCoWorker was given has been seen. So "
            "nothing was sent, and the parameters stay as they are. Give it the optimizer that "
            "steps, and load weights before the join"
        )

    def last_words(self):
        """Say what is amiss where the process ends without a flush, or ""."""
        worker = self.worker
        can_tell = worker.ranks.is_alone and not worker.flushed
        if can_tell and worker.local_step == 0 and self.moved():
            return self.unseen_steps()
        return self.strange() or self.beside.words()

    def tell_over(self, max_steps):
        """Say once why training ends before its time."""
        worker, begun = self.worker, self.worker.ahead
        if self.has_told_over:
            return
        self.has_told_over = True
        if 0 < max_steps <= begun:
            log(
                f"WARNING: {worker.worker_id}: the run was at step {begun} already when this worker "
                f"joined, and is over at {max_steps}: training ends after {worker.local_step} steps "
                "here. For a new run, start a server with another folder; to go on with this one, "
                "raise the trainer's number of steps"
            )
        elif worker.stop_ordered:
            log(f"{worker.worker_id} ends training: the server says so")
        elif worker.step < max_steps:
            log(f"{worker.worker_id} ends training: the run is at step {worker.run_step}")

    # --- Frozen parameters ---

    def note_frozen(self):
        """Note a few numbers of each frozen parameter, as they are after the join."""
        self.noted = {name: self.few(p) for name, p in self.trained.frozen.items()}

    def own_names(self):
        """Return the names of frozen parameters that have changed, as a teacher's do, here or before."""
        frozen = self.trained.frozen
        changed = {n for n, few in self.noted.items() if not torch.equal(few, self.few(frozen[n]))}
        return sorted(changed.union(self.worker.saved.get("local", [])))

    @staticmethod
    def few(parameter):
        flat = part_of(parameter.detach()).reshape(-1)
        return flat[:: max(1, flat.numel() // 16)].clone()


class Copies:
    """Second copies of parameters that optimizers keep in their state and write over them at each
    step, such as float32 masters and schedule-free's z. They move as the parameters move when the
    global model is taken, so that what they have beyond the parameters' dtype stays.

    known: keys in an optimizer's state of what has been found a copy.
    """

    TELLING = ("master", "fp32", "param", "weight", "copy")  # words in a copy's key

    def __init__(self, trained):
        self.trained, self.known = trained, set()
        self.noted = []  # (parameter, copy, value of the parameter)

    def candidates(self):
        """{key: {id of a tensor: (parameter, that tensor of its shape)}} of the state of the optimizers
        that were given, of those that they wrap, and of those around a step that is under way."""
        given, found = self.trained.optimizers, {}
        near = [*given, *(value for each in given for value in vars(each).values())]
        near += [frame.f_locals.get("self") for frame in callers()]
        for optimizer in (each for each in near if isinstance(each, torch.optim.Optimizer)):
            for parameter in self.trained.named.values():
                state = optimizer.state.get(parameter) if parameter in optimizer.state else None
                for key, value in state.items() if isinstance(state, dict) else ():
                    is_like = isinstance(value, torch.Tensor) and value.shape == parameter.shape
                    if is_like and value.is_floating_point() and key != "step":
                        found.setdefault(key, {})[id(value)] = parameter, value
        return found

    def note(self):
        """Note where the parameters are, of which there are copies, before they move."""
        self.noted = []
        for key, found in self.candidates().items():
            parts = [(part_of(p.detach()), part_of(value)) for p, value in found.values()]
            if key not in self.known and self.is_copy(key, parts[:8]):
                self.known.add(key)
                log(f"{key!r} in the optimizer's state is a copy of the weights: it moves along")
            if key in self.known:
                self.noted += [
                    (own, twin, own.clone())
                    for own, twin in parts
                    if own.data_ptr() != twin.data_ptr()
                ]

    def move(self):
        """Move the copies as the parameters have moved since `note`."""
        for own, twin, before in self.noted:
            twin.add_(own.to(twin.dtype) - before.to(twin.dtype))
        self.noted = []

    def is_copy(self, key, pairs):
        """Whether the state's tensors under a key are copies: the first ones equal their parameters,
        or are near them where the key says that they follow. Zeros, which moments may be too, say so
        only with the key's name."""
        groups = [group for each in self.trained.optimizers for group in each.param_groups]
        if key == "z" and any("weight_sum" in group for group in groups):
            return True  # schedule-free: x and y are in between
        if "slow" in str(key) or "cached" in str(key):  # as Lookahead's, or an average of gradients
            apart = sum((own - twin).float().square().sum() for own, twin in pairs)
            return bool(4 * apart <= sum(own.float().square().sum() for own, _ in pairs))
        for own, twin in ((own.reshape(-1), twin.reshape(-1)) for own, twin in pairs):
            parts = (slice(64), slice(None))
            if not all(torch.equal(own[part], twin[part].to(own.dtype)) for part in parts):
                return False
        is_named = any(word in str(key) for word in self.TELLING)
        return is_named or any(bool(own.any()) for own, _ in pairs)


class Beside:
    """Steps of optimizers that were not given, of parameters that look like the model's: the program
    may train a copy in its place. Who trains two networks alike lets the given optimizer go on soon:
    the steps since its last one are too many where they are over twice as many as ever before, and
    while training lasts a round's and 100.

    alike: those optimizers; kind: the type of the last; steps: their steps since `since`, a local
    step; most: as many as ever were between two local steps.
    """

    def __init__(self, worker):
        self.worker, self.alike, self.kind = worker, weakref.WeakSet(), ""
        self.since, self.steps, self.most, self.has_told = 0, 0, 0, False

    def heed(self, optimizer):
        """Whether an optimizer that has stepped is one of these: nine in ten of the trained parameters
        have one of their shape in it. Other workers' are not."""
        own = collections.Counter(p.shape for p in self.worker.trained.named.values())
        its = collections.Counter(parameter.shape for parameter in parameters_of(optimizer))
        is_known = any(optimizer in other.trained.optimizers for other in [*STARTED])
        if is_known or 10 * (own & its).total() < 9 * own.total():
            return False
        self.alike.add(optimizer)
        self.count(optimizer)
        return True

    def count(self, optimizer):
        """Count a step of one of these."""
        step = self.worker.local_step
        if self.since != step:
            self.since, self.steps, self.most = step, 0, max(self.most, self.steps)
        self.kind, self.steps = type(optimizer).__name__, self.steps + 1
        if self.steps >= max(100, self.worker.sync_every):
            self.tell()

    def words(self):
        """Say that there are too many of these steps, or ""."""
        is_over = self.has_told or self.worker.flushed or self.since != self.worker.local_step
        if is_over or self.steps <= 2 * self.most:
            return ""
        return (
            f"the last {self.steps} steps are those of {self.kind}, which DiLoCoWorker was not given, and "
            "of another model of the same shapes, such as a copy.deepcopy. They are not sent. Give the "
            "model and the optimizer that train, or flush() before another one is trained"
        )

    def tell(self):
        """Log `words`, once."""
        if words := self.words():
            self.has_told = True
            log(f"WARNING: {self.worker.worker_id}: {words}")


JUMPED = (
    "the first step after the global model was taken has put the parameters back to where they were "
    "before. Something around the optimizer keeps a second copy of the weights (float32 masters, an "
    "average) and writes it over them, so that this worker trains its own model and not the run's: use "
    "an optimizer that steps the parameters themselves, with torch.autocast for lower precision"
)


class Jumps:
    """Whether parameters jump back after an adoption to where they were before: then something
    else holds the weights. Looks at a few windows of each slice, at one boundary of a round and at two
    steps: in the first rounds of this process, and then now and then. A look takes as long as an adoption.

    turns: boundaries so far; records: {slice: [samples: before it was moved, behind that, after one
    step, after two]}; counts: {slice: how many times running it has jumped back}.
    """

    WINDOWS, WIDTH, TIMES = 16, 64, 4.0
    ROUNDS = 8  # that it looks at first, and of which it then looks at one

    def __init__(self, worker):
        self.worker, self.turns = worker, 0
        self.before, self.records, self.counts = {}, {}, {}

    def sample(self, k):
        """Return windows of a slice's local values, one a row."""
        slice, count = self.worker.slices[k], self.worker.num_fragments
        width = min(self.WIDTH, slice.size)
        windows = min(max(2, self.WINDOWS // count), slice.size // width)
        found = torch.empty(windows, width, dtype=torch.float32, device=slice.device)
        for i in range(windows):
            slice.flat.read(i * (slice.size - width) // max(1, windows - 1), found[i])
        return found

    def begin(self):
        """Note where the slices are, which may be moved now."""
        worker, count = self.worker, self.worker.num_fragments
        rounds, boundary, self.turns = *divmod(self.turns, count), self.turns + 1
        look = rounds if rounds < self.ROUNDS else rounds / self.ROUNDS
        is_time = boundary == look % count  # a fraction, as of most later rounds, equals none
        can_tell = is_time and worker.sync_every > 1 and not worker.ranks.is_sharded
        for optimizer in worker.trained.optimizers:  # this one may well find back within one step
            can_tell = can_tell and not isinstance(optimizer, torch.optim.LBFGS)
        slices = worker.slices[:count] if can_tell else ()
        self.before = {k: self.sample(k) for k, slice in enumerate(slices) if slice.size}

    def end(self):
        """The slices have been moved; what an earlier move of one would have shown is lost."""
        for k, old in self.before.items():
            if not torch.equal(old, new := self.sample(k)):
                self.records[k] = [old, new]
        self.before = {}

    def follow(self):
        """A step has been made after slices were moved. Nothing here waits for a GPU."""
        for k, samples in self.records.items():
            if len(samples) < 4:
                samples.append(self.sample(k))

    def judge(self):
        """Judge the moves that two steps have followed: after the first that jumped back, warn. Raises
        RuntimeError after the second in a row."""
        for k in [k for k, samples in self.records.items() if len(samples) == 4]:
            verdicts = self.jumped(*self.records.pop(k)).tolist()
            moved = [verdict for verdict in verdicts if verdict >= 0]
            has_jumped = sum(moved) * 2 > len(moved)
            self.counts[k] = self.counts.get(k, 0) + 1 if has_jumped else 0
            if self.counts[k] > 1:
                raise RuntimeError(f"{self.worker.worker_id}: {JUMPED}, twice running")
            if has_jumped:
                log(
                    f"WARNING: {self.worker.worker_id}: {JUMPED}. It ends training if it does so again"
                )

    def jumped(self, before, adopted, first, second):
        """Return 1 for each window that has jumped back, 0 for one that has not, and -1 for one that
        was not moved. One that has is near where it was before, from far away as steps go."""

        def apart(a, b):
            return (a - b).square().sum(1).sqrt()

        move = apart(first, adopted)
        back = move > self.TIMES * torch.maximum(apart(first, before), apart(second, first))
        return back.float().masked_fill(apart(before, adopted) == 0, -1.0)


def say_unstarted(worker_id, pid, held):  # held: {parameter: its version when the worker was made}
    """Where a worker goes, or process `pid` ends, say that it was never started, if it was to train."""
    if os.getpid() == pid and any(parameter._version != held[parameter] for parameter in held):
        log(
            f"WARNING: DiLoCoWorker {worker_id!r} was made but never started: what this process has "
            "trained is its own. Use it in a `with` statement, or call start()"
        )


def check_process(worker):
    """Raise Refused where this process has a worker already that holds the same id at the same
    server, or the same optimizer, as where a cell of a notebook is run again."""
    held, mine = {*map(id, worker.trained.optimizers)}, (worker.worker_id, worker.server)
    for other in [each for each in STARTED if not (each is worker or each.closed.is_set())]:
        shares = not held.isdisjoint(map(id, other.trained.optimizers))
        if shares or (other.worker_id, other.server) == mine:
            raise Refused(
                "id",
                f"{'the optimizer' if shares else f'worker id {mine[0]!r}'} is held at {other.server} by "
                f"this process itself (pid {os.getpid()}): call close() of the DiLoCoWorker that it made "
                "before, such as in a cell that was run already",
            )


# --- Joining ------------------------------------------------------------------------------------


class HolderEnded(ConnectionError):
    """The process that held this worker's id has ended."""


class Admission:
    """The joining of a worker, for the first time or again: it says what it is and holds, brings
    what the server lacks, and takes what it lacks itself from the log."""

    def __init__(self, leader):
        self.leader, self.worker, self.replica = leader, leader.worker, leader.replica
        self.link, self.trained = leader.link, leader.worker.trained
        self.fingerprints = {}  # fingerprints of frozen parameters by name, worked out once
        self.said, self.said_at = "", -SAY_SECONDS  # whom the log has named last, and when
        self.kept = []  # slices whose local work of a checkpoint goes on
        self.out = []  # slices whose push comes to the server only now
        self.ended = []  # [process id, start] of the process that held the id, if it is gone

    def ask(self):
        """Ask to join until there is an answer, while the worker waits. Returns a Joined."""
        # Before the lock, without which no heart beats, and before the connection, on which a server
        # waits a minute: it may take long.
        introduction = self.introduction()
        with self.link.control_lock:
            conn = self.link.open_control()
            self.link.lost.clear()
            self.link.must_join = False
            if self.worker.leave_by is not None:
                conn.deadline = time.monotonic() + LEAVE_SECONDS
            self.link.joining = conn
            try:
                reply = self.converse(conn, introduction)
            except HolderEnded:  # says so, too, and has the id at once
                conn = self.link.joining = self.link.open_control()
                reply = self.converse(conn, self.introduction())
            conn.deadline = None
        self.replica.awaited.clear()
        joined = joined_of(reply, self.worker.schedule.count)
        orders = self.orders_of(reply)
        if not (self.worker.joins and self.replica.slices):
            self.kept = []
            self.replica.set_up(self.flats(*orders), joined)
        if self.link.heart is None:
            self.link.start_heart(joined.heartbeat_seconds, self.leader.beat)
        with torch.no_grad():
            self.take(joined)
        return joined

    def converse(self, conn, introduction):
        """Ask to join, and bring what the server asks for; returns the reply to the join."""
        reply = conn.request("join", introduction, on_wait=self.say_awaited)
        asked = 0
        while reply.type == "bring":
            asked += 1
            if asked > MAX_BRINGS:
                raise ProtocolError(f"the server has asked for {MAX_BRINGS} uploads and goes on")
            reply = self.bring(conn, reply)
        return reply

    def introduction(self):
        """Return the fields of a join: this worker's settings, tensors and progress."""
        worker, count = self.worker, self.worker.schedule.count
        specs = protocol.specs_of(self.trained.named.items())
        buffers = protocol.specs_of(self.trained.buffer_tensors.items())
        places = self.replica.outbox.places if worker.joins else []
        return {
            "manifest": protocol.manifest_to_json(specs),
            "buffers": protocol.manifest_to_json(buffers),
            "frozen": self.describe_frozen(),
            "sync_every": worker.sync_every,
            "num_fragments": worker.num_fragments,
            "source": worker.source,
            "host": socket.gethostname(),
            "ranks": worker.ranks.count,
            "step": worker.step,
            "position": worker.schedule.position,
            "cycle": worker.schedule.every,
            "run": worker.run,
            "versions": [place.version for place in places] or [FRESH] * count,
            "folded": [place.folded for place in places],
            "closed": self.replica.outbox.closed,
            "adapter": "adapter_config.json" in self.trained.files,
            "resumes": [] if places else self.resumable(),
            "process": protocol.identity(),
            "ended": self.ended,
            "again": self.leader.anew.count > 0,
        }

    @property
    def is_cut_alike(self):
        """Whether the fragments of the worker's checkpoint have the same elements as they have now."""
        count = self.worker.num_fragments
        return count == 1 or self.worker.saved.get("stripe", 1) == self.trained.stripe(count)

    def resumable(self):
        """Return, by slice, the version that the local work of a checkpoint started from. A slice
        that was saved while its push was out is resumed from the global one: the steps after the
        push cannot be told from those in the push."""
        saved = self.worker.saved.get("fragments", []) if self.is_cut_alike else []
        found = [FRESH if old["in_flight"] else Version(*old["version"]) for old in saved]
        more = self.worker.schedule.count - len(found)
        if not saved or more not in (0, len(self.trained.buffers) > 0):
            return []
        return found + [FRESH] * more

    def describe_frozen(self):
        """Return [name, dtype, shape, fingerprint] of each frozen parameter."""
        frozen = self.trained.frozen
        if frozen and not self.fingerprints:
            whole = self.worker.ranks.whole(frozen)
            with concurrent.futures.ThreadPoolExecutor() as threads:
                found = threads.map(protocol.fingerprint, whole)
                self.fingerprints = dict(zip(frozen, found, strict=True))
        listed = protocol.manifest_to_json(protocol.specs_of(frozen.items()))
        return [[*entry, self.fingerprints[entry[0]]] for entry in listed]

    def note_frozen(self, name, whole):
        """Note a frozen parameter of a sharded model, as `Ranks.gather` finds it."""
        self.fingerprints[name] = protocol.fingerprint(whole)

    def say_awaited(self, fields):
        """Log that the server still waits for others: at most once a second, and where nothing
        changes once a minute. Raises HolderEnded where those are a process of this machine that had
        this worker's id, and has ended."""
        if self.worker.leave_by is not None:
            raise ConnectionError("this worker leaves")
        holder = fields.get("holder")
        if holder != self.ended and self.has_gone(holder):  # the server hears it once
            self.ended = holder
            raise HolderEnded("the process that had this id has ended")
        said, text = (
            time.monotonic() - self.said_at,
            protocol.printable(fields.get("awaited"))[:200],
        )
        self.replica.awaited["join"] = text
        if said >= SAY_SECONDS or (said >= 1.0 and text != self.said):
            self.said_at, self.said = time.monotonic(), text
            log(f"{self.worker.worker_id} waits for {text}")

    def has_gone(self, holder):
        """Whether a process of this machine has ended: [process id, start]; where that is this very
        process, whether the worker in it that had the id was closed."""
        if type(holder) is not list or [type(number) for number in holder] != [int, int]:
            return False
        if holder[0] != os.getpid():
            return protocol.has_ended(*holder)
        me = self.worker
        same = [w for w in STARTED if w is not me and w.worker_id == me.worker_id]
        return all(other.link.closed.is_set() for other in same)

    def bring(self, conn, reply):
        """Upload the slices that the server asks for: of the anchor, or the model at the start."""
        slices, wants_files = wanted_of(reply, self.worker.schedule.count)
        files = self.trained.files if wants_files else {}
        raw = {
            name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            for name, text in files.items()
            if name in protocol.FILE_NAMES
        }
        here = self.replica.slices if self.worker.joins else []
        flats = [slice.flat for slice in here]
        flats = flats or [flat for flat, *_ in self.flats(*self.orders_of(reply))]
        found = {}
        for k in slices:
            values = here[k].anchor if here and not here[k].is_blank else None
            if values is None:
                values = torch.empty(flats[k].numel, dtype=torch.float32, device=flats[k].device)
                flats[k].read(0, values)
            found[f"slice:{k}"] = values.cpu()
        found |= {f"file:{name}": text for name, text in raw.items()}
        fields = {"slices": slices, "files": {name: len(text) for name, text in raw.items()}}
        specs = protocol.specs_of(found.items())
        size = protocol.payload_bytes(specs)
        progress = Progress(log, "uploading the model", size, conn.moved_since())
        values = progress.over(found.values())
        return conn.request("bring", fields, specs, values, on_wait=self.say_awaited)

    def flats(self, names, buffers):
        """Return [(FlatModel, whether it is of buffers, whether it predicts)] of these names, by slice."""
        worker, count = self.worker, self.worker.num_fragments
        predicts = worker.fragment_update == "predict" and worker.delay > 0
        whole = worker.ranks.whole(names)
        found = [(protocol.FlatModel(whole, k, count), False, predicts) for k in range(count)]
        if buffers:
            places = {name: self.trained.buffers[name] for name in buffers}
            found.append((Buffers(places), True, False))
        return found

    def orders_of(self, reply):
        """Return [names of the parameters, names of the buffers] in the server's order."""
        orders = []
        tensors = {"manifest": self.trained.named, "buffers": self.trained.buffer_tensors}
        for name, own in tensors.items():
            specs = protocol.manifest_from_json(reply.field(name, list), trained=name == "manifest")
            if {s.name: s.shape for s in specs} != {n: tuple(t.shape) for n, t in own.items()}:
                raise ProtocolError("join: the server names other tensors than this worker has")
            orders.append([spec.name for spec in specs])
        return orders

    def take(self, joined):
        """Take from the log what this worker lacks, and note what the server knows of its pushes."""
        worker, replica, outbox = self.worker, self.replica, self.replica.outbox
        is_first, is_finite = worker.joins == 0, True
        if not is_first and joined.run != worker.run:
            forgotten = outbox.forget()
            self.leader.drop("the server has the model of another run", *forgotten)
            self.leader.refusals = 0
        worker.run, resumes = joined.run, self.resumable() if is_first else []
        self.out = outbox.know(joined.known)
        with self.link.borrowed() as conn:
            for k in range(len(replica.slices)):
                if outbox.places[k].pending:
                    continue  # a pull of that push takes what this slice lacks
                if is_first or replica.slices[k].is_blank:
                    self.take_first(conn, k, resumes[k] if resumes else NONE)
                else:
                    is_finite = replica.catch_up(conn, k) and is_finite
        if not is_finite:
            self.leader.drop("local work is not finite")
        self.fetch_frozen(joined.frozen)
        self.leader.heard = {}
        worker.index, worker.rank, worker.world = joined.index, joined.rank, joined.world
        worker.num_shares, worker.schedule.pace = joined.num_shares, joined.pace
        if is_first:
            self.resume(joined)

    def take_first(self, conn, k, resumed):
        """Take a slice in full, at the first join or anew. Local work of a checkpoint that started from the
        very version stays; else the local values become the global ones."""
        slice, places = self.replica.slices[k], self.replica.outbox.places
        places[k].version = NONE
        self.replica.pull(conn, k, 0)
        if places[k].version == resumed and not slice.carries_values:
            self.replica.outbox.resume(k, resumed, self.worker.saved["fragments"][k]["steps"])
            self.kept.append(k)
        else:
            slice.show_anchor()

    def resume(self, joined):
        """After the first join, go on where the checkpoint was, if the run is still there."""
        worker = self.worker
        worker.ahead = worker.run_step = joined.step
        if worker.saved:
            self.load_residual()
        worker.kept_local = bool(self.kept)
        if self.kept:
            worker.ahead = worker.saved["step"]
        elif worker.saved:
            why = "the server has moved on since the checkpoint"
            if not self.is_cut_alike:
                why = "the checkpoint is of an earlier version, whose fragments have other elements"
            log(f"{why}: took the global model, without the steps that were in no push")
        if len(self.kept) == worker.num_fragments:  # the others wait for it just there
            worker.schedule.resume(
                worker.saved["position"], worker.saved.get("cycle", worker.sync_every)
            )
        else:
            worker.schedule.every = max(joined.pace or worker.sync_every, worker.num_fragments)
            worker.schedule.align(joined.turns, joined.steps)

    def load_residual(self):
        """Take up the losses in encoding the pushes before the checkpoint."""
        saved, slices = self.worker.saved, self.replica.slices
        kept = {f"residual.{k}": slice.residual for k, slice in enumerate(slices)}
        kept = {name: residual for name, residual in kept.items() if residual is not None}
        if not kept:
            return
        try:
            if "residual" in saved:
                fields, tensors = saved, saved["residual"]
            else:
                fields, tensors = protocol.load_file(self.worker.residual_path)
            fits = protocol.specs_of(tensors.items()) == protocol.specs_of(kept.items())
            if not (fits and self.is_cut_alike):
                raise ProtocolError("it is of another model, or of other fragments")
            if fields.get("run") != saved.get("run"):
                raise ProtocolError("it is of another run")
        except (OSError, TypeError, ProtocolError) as error:
            log(
                f"{self.worker.worker_id}: no residual beside the checkpoint ({error}): what rounding "
                "lost of the pushes before it is not made up for"
            )
            return
        for name, residual in kept.items():
            residual.copy_(tensors[name])

    def fetch_frozen(self, names):
        """Take frozen parameters that differ from those of the server's -m."""
        if not names:
            return
        frozen = self.trained.frozen
        if not frozen.keys() >= set(names):
            raise ProtocolError("join: the server names frozen tensors that are not this worker's")
        whole = self.worker.ranks.whole(names)
        with self.link.borrowed() as conn:
            reply = conn.request("fetch", {"frozen": names}).typed("fetch")
            reply.expect(protocol.specs_of((name, frozen[name]) for name in names))
            size = protocol.payload_bytes(reply.specs)
            with Progress(log, "downloading frozen tensors", size, conn.moved_since()):
                for spec, parameter in zip(reply.specs, whole, strict=True):
                    values = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
                    conn.read(values)
                    if values.isnan().any():
                        raise ProtocolError(f"fetch: frozen tensor {spec.name!r} is not finite")
                    with torch.no_grad():
                        parameter.copy_(values)
                    self.fingerprints[spec.name] = protocol.fingerprint(values)
                    self.worker.fetched.append(spec.name)
        log(
            f"{self.worker.worker_id}: {len(names)} frozen tensors, such as {names[0]!r}, were not "
            f"those of the server's -m: took {size / 1e6:.3g} MB of them"
        )


class Anew:
    """A change of what is trained in the midst of training, which all workers make at the same step:
    the worker closes its part as at the end, and joins again with the tensors that are trained now,
    before the step that trains them.

    Tensors that are trained before and after keep their global values and the server's momentum. The
    losses in encoding the pushes so far are dropped, with a line in the log: the next pushes are cut
    in other slices. A tensor that takes the place of one of its shape is no such change: it is
    synchronized in its place, and what its values differ by is sent like a step. Where the server
    refuses a change, each further step asks again, with what is trained by then.

    count: how often that has happened.
    """

    def __init__(self, leader):
        self.leader, self.worker, self.count = leader, leader.worker, 0

    def heed(self, optimizer):
        """Join anew where what is trained has changed, before a step of `optimizer`."""
        worker, watch = self.worker, self.worker.watch
        if worker.leave_by is not None or worker.flushed:
            return
        found = worker.trained.parameters()
        is_replaced = self.replace(found)
        how = watch.change(found) or watch.frozen_in(optimizer)
        how = how or ("" if worker.slices else "the run has not taken this worker back yet")
        if how:
            log(f"{worker.worker_id}: {how}: joins anew behind step {worker.step}, as all must do")
            try:
                with own_modes():
                    self.join()
            except ConnectionError:
                if worker.leave_by is None:
                    raise
                worker.flushed = True  # it was told to leave, and its steps are sent
            found = worker.trained.parameters()
        elif is_replaced:
            worker.trained.check_optimizers()
        watch.note(found)

    def replace(self, found):
        """Synchronize the parameters among {name: parameter} that have taken the place of others of their
        shape; returns whether there are any. Raises RuntimeError where one has changed its shape."""
        worker, trained, seen = self.worker, self.worker.trained, self.worker.watch.seen
        is_replaced = False
        for name, parameter in found.items():
            before, shape = seen.get(name, (parameter, parameter.shape))
            if name not in trained.named or (parameter is before and parameter.shape == shape):
                continue
            if parameter is before:
                raise RuntimeError(
                    f"{worker.worker_id}: parameter {name!r} was {list(shape)} and is "
                    f"{list(parameter.shape)}, but is the same object: what it was cannot be sent any "
                    "more. Put a new torch.nn.Parameter in its place"
                )
            if parameter.shape == shape:
                check_parameter(name, parameter)
                trained.named[name], seen[name], is_replaced = parameter, (parameter, shape), True
                for slice in worker.replica.slices:
                    slice.flat.replace(before, parameter)
                log(f"{worker.worker_id}: another tensor of its shape has replaced {name!r}")
        return is_replaced

    def join(self):
        """Close this worker's part, and join with what is trained now."""
        worker, replica, trained = self.worker, self.worker.replica, self.worker.trained
        worker.watch.settle()
        worker.watch.copies.note()
        if replica.slices:  # else they are closed, and the server has refused to take it back
            self.leader.close_slices()
            found = trained.parameters()
            own = [n for n in worker.watch.own_names() if n in found and not found[n].requires_grad]
            trained.local += map(glob.escape, own)
        trained.read()
        if any(slice.residual is not None for slice in replica.slices):
            log(f"{worker.worker_id}: what rounding lost of the pushes so far is not made up for")
        self.leader.link.interrupt()
        worker.ranks = Ranks({**trained.named, **trained.frozen})
        worker.schedule.count = worker.num_fragments + bool(trained.buffers)
        self.leader.admission.fingerprints.clear()
        worker.watch.jumps.records.clear()
        with replica.changed:
            outbox = replica.outbox.renewed(worker.schedule.count, replica.step, worker.tokens)
            replica.slices, replica.outbox = [], outbox
            replica.listed.clear()  # where `part` has ended the wait for the closing pushes
        self.count += 1
        self.leader.join(worker.reconnect_timeout)
        worker.watch.copies.move()
        worker.watch.note_frozen()


# --- The worker ---------------------------------------------------------------------------------
#
# Everything below runs in the training thread, after an optimizer step. A step first adopts what is
# due, then pushes what is due. Training waits in one place only: where it adopts a slice, until its
# own push is listed. Of several ranks rank 0 does all this, and the others take over what it says.


class Leader:
    """The work of rank 0 for a worker, which may have other ranks: to join, to adopt and push what is
    due, to give up what is not finite, and to close the run. The `worker` has what is for all ranks."""

    def __init__(self, worker):
        self.worker = worker
        self.schedule, self.replica, self.link = worker.schedule, worker.replica, worker.link
        self.admission, self.anew = Admission(self), Anew(self)
        self.refusals = 0  # drops in a row
        self.said_at = -SAY_SECONDS  # seconds when the log last named who keeps a round open
        self.heard = {}  # facts of heartbeats that all ranks are to take over in their next turn
        self.told = 0, 0, 0.0  # bytes sent and received, and seconds waited, by the line on a round

    def join(self, seconds):
        """Join, also again. Raises ConnectionError where there is no server for so many seconds."""
        worker = self.worker
        try:
            joined = self.link.retry(self.admission.ask, seconds)
        finally:
            self.link.joining = None
        worker.joins += 1
        self.link.reached()
        if worker.joins > 1:
            self.schedule.align(joined.turns, joined.steps, self.admission.out)
        labels = worker.versions
        self.replica.audit("joined", labels=labels, index=worker.index, again=worker.joins > 1)
        for k in range(len(self.replica.slices)):
            self.replica.audit_anchor(k)
        numbers = [number for _, number in labels]
        log(
            f"{worker.worker_id} {'has joined again as' if worker.joins > 1 else 'is'} worker "
            f"{worker.index}, {worker.world} in all, at step {worker.step}, version "
            f"{numbers[0] if len(numbers) == 1 else numbers}"
        )
        self.replica.resend()

    def rejoin(self):
        """Join again a server that restarted, or had given this worker up; False without one."""
        self.link.interrupt()
        leaves = self.worker.leave_by is not None
        try:
            self.join(0.0 if leaves else self.link.patience(self.worker.reconnect_timeout))
        except ConnectionError as error:
            self.link.note_outage(error)
            self.link.must_join = True
            self.link.lost.clear()  # a heartbeat that gets through sets it again
            return False
        return True

    def is_busy(self):
        """Whether there is something to do after this step, on rank 0."""
        if not (self.worker.ranks.leads and self.replica.slices):
            return False
        due = any(self.is_due(k) for k in range(self.schedule.count))
        return bool(self.is_stirred()) or due or self.schedule.left <= 1

    def is_due(self, k):
        """Whether slice k is to be adopted now; a late push is when an entry lists it."""
        if listed := self.replica.listed.get(k):
            return listed[0].late or self.replica.step >= listed[0].adopt_at
        return self.replica.outbox.is_due(k, self.replica.step)

    def work(self):
        """Adopt what is due after a step, then push what is due. Only if `is_busy`, else `tick`."""
        worker, watch = self.worker, self.worker.watch
        watch.settle()
        if self.schedule.left <= 1:
            watch.check()
        watch.jumps.judge()
        watch.jumps.begin()
        if self.link.lost.is_set():
            self.rejoin()
        self.heed_replica()
        for k in filter(self.is_due, range(self.schedule.count)):
            self.adopt(k)
        due = self.schedule.tick()
        delay = -(-worker.delay * self.schedule.every // worker.sync_every)  # in this cycle's steps
        for k in due:
            steps = worker.local_step, worker.tokens, delay
            with self.replica.changed:  # an entry may have come since the look above
                push = self.replica.outbox.make(k, *steps) if k not in self.replica.listed else None
            if push:  # else the one before is under way, and these steps go with the next
                facts = self.facts()  # and in how many seconds it adopts, as far as it can tell
                facts["adopts_in"] = delay * facts["trained"] / facts["made"]
                self.replica.push(push, goes_on=delay > 0, facts=facts)
        for k in filter(self.is_due, due if delay == 0 else ()):
            self.adopt(k)
        watch.jumps.end()

    def facts(self):
        """Return this worker's progress for a message; of the loss, a number within limits only."""
        worker, loss = self.worker, self.worker.loss
        if loss is not None and not abs(loss) < protocol.MAX_ABS:
            loss = None
        waited = worker.waited
        return {
            "step": worker.step,
            "position": self.schedule.position,
            "cycle": self.schedule.every,
            "loss": loss,
            "made": worker.local_step,
            "trained": max(0.0, time.monotonic() - worker.started - waited),
            "waited": waited,
            "transferred": self.replica.transferred,
            "max_steps": worker.max_steps,
            "evaluation": worker.evaluation,
        }

    def adopt(self, k):
        """Wait until slice k's push is listed, then move the local values; or go on without the server."""
        worker, replica = self.worker, self.replica
        worker.stalled_since = time.monotonic()
        try:
            if not self.wait(lambda: self.is_decided(k)):
                self.go_on(k)
        finally:
            worker.stall_time, worker.stalled_since = worker.waited, None
        self.heed_replica()
        if k not in replica.listed:
            return  # training goes on without, or the server has the model of another run
        with replica.changed:
            push, refused, step = replica.listed.pop(k)
        worker.run_step = max(worker.run_step, step)
        if self.schedule.pace:  # a slower worker goes on from the step of the furthest one
            worker.ahead = max(worker.ahead, worker.run_step - worker.local_step)
        alpha = worker.alpha if worker.fragment_update == "mix" and not push.late else None
        with uninterrupted():
            is_finite = replica.slices[k].adopt(alpha)
        worker.fragment_syncs += k < worker.num_fragments
        if refused:
            self.count_refused(push, refused)
        else:
            replica.audit("settled", push)
        if not is_finite:
            self.drop("local work is not finite")
        elif not replica.slices[k].is_empty and not refused:
            self.refusals = 0
        if k == self.schedule.count - 1:
            self.tell_round(k)

    def tell_round(self, k):
        """Log a line on a round, of which slice k was the last one to be adopted: the version that it led
        to, the seconds from its push to its entry, and what has moved since the line before."""
        worker, replica = self.worker, self.replica
        told, self.told = self.told, (replica.sent, replica.received, worker.stall_time)
        up, down, waited = (now - then for now, then in zip(self.told, told, strict=True))
        whom, replica.held_up = replica.held_up, {}
        parts = [f"round {replica.outbox.places[k].version.number}, step {worker.step}"]
        parts += [] if worker.loss is None else [f"loss {worker.loss:.4f}"]
        parts.append(f"synced in {replica.last_sync_time:.2f} s")
        parts += [f"waited {waited:.2f} s for {' and '.join(whom)}"] if whom else []
        parts.append(f"up {up / 1e6:.2f} MB, down {down / 1e6:.2f} MB")
        log.seldom("rounds", f"{worker.worker_id}: {' | '.join(parts)}")

    def is_decided(self, k):
        """Whether slice k has no push whose fate is open."""
        return k in self.replica.listed or not self.replica.outbox.places[k].pending

    def wait(self, condition):
        """Wait until `condition()`, and join again meanwhile if that is needed. False where an outage
        lasts longer than `reconnect_timeout`, or where a worker that leaves need not wait."""
        worker, replica, outbox = self.worker, self.replica, self.replica.outbox
        while not condition():
            self.heed_replica()
            if self.link.lost.is_set() and not self.rejoin():
                return condition()
            left = 0.5
            if self.link.outage is not None:
                left = min(left, self.link.patience(worker.reconnect_timeout))
            if worker.leave_by is not None:
                arrived = outbox.upload() is None
                left = 0.0 if arrived else min(left, worker.leave_by - time.monotonic())
            if left <= 0:
                return condition()
            with replica.changed:
                replica.changed.wait_for(lambda: condition() or self.is_stirred(), left)
        return True

    def is_stirred(self):
        """Whether the link's threads have met something that training must see to."""
        return self.replica.broken or self.replica.error or self.link.lost.is_set()

    def heed_replica(self):
        """Raise an error of the link's threads, and drop numbers that are not finite."""
        if self.replica.error:
            raise self.replica.error
        while self.replica.broken:
            push = self.replica.broken.pop(0)
            if self.replica.slices[push.k].is_broken:  # else its steps went with another slice's
                self.drop("the pseudo-gradient is not finite", push)

    def go_on(self, k):
        """Let training go on from the values that the push of slice k was made from."""
        slice, replica = self.replica.slices[k], self.replica
        with slice.lock:
            if k in replica.listed:
                return
            slice.keep_mark()
            slice.settle()
            push = replica.outbox.places[k].pending
            if not push.late and self.worker.leave_by is None:
                log(
                    f"WARNING: {self.worker.worker_id} trains on without the server; the push of "
                    f"{push.steps} steps is kept until it is back"
                )
            push.late = True

    def count_refused(self, push, why):
        """Count the steps of a push that an entry lists as refused: they are in no version."""
        self.worker.dropped_steps += push.steps
        self.replica.audit("dropped", push, first=push.first, last=push.last, why=why)
        log(f"WARNING: {self.worker.worker_id}: {why}; its {push.steps} steps are dropped")

    def drop(self, why, *pushes):
        """Give up all local work, in all slices, and the steps of `pushes`: what is not finite in one
        slice would be in all after a step. Raises FloatingPointError where that is too often."""
        worker, replica, pushes = self.worker, self.replica, [*pushes]
        for k, slice in enumerate(replica.slices):
            pending = replica.outbox.places[k].pending
            if pending:
                slice.finish_encoding()
            if slice.is_broken:
                pushes += [p for p in (pending, *replica.broken) if p and p.k == k]
                slice.is_broken = False
            slice.drop()
        pushes = dict.fromkeys(pushes)  # each once
        with replica.changed:
            given_up = replica.outbox.drop(worker.local_step, worker.tokens)
        given_up += [(push.k, push.first, push.last) for push in pushes]
        steps = [0] * len(replica.slices)
        for k, first, last in given_up:
            replica.audit("dropped", fragment=k, first=first, last=last, why=why)
            steps[k] += last - first
        worker.dropped_steps += max(steps)
        self.refusals += 1
        worker.clearings += 1
        worker.trained.clear_moments()
        log(
            f"WARNING: {why}: dropped {max(steps)} steps, took the global model, and cleared the "
            "optimizer's state"
        )
        if self.refusals >= MAX_REFUSALS:
            raise FloatingPointError(
                f"{why}, {self.refusals} times running: training diverges on {worker.worker_id}; "
                "lower the learning rate, clip gradients, or check its data and hardware"
            )

    def close_slices(self):
        """Adopt what is under way, and send the rest as closing pushes; see DiLoCoWorker.flush."""
        worker, outbox, self.link.outage = self.worker, self.replica.outbox, None
        worker.watch.jumps.judge()
        while self.replica.slices and (not outbox.is_closed or self.replica.listed):
            for k in list(self.replica.listed):
                self.adopt(k)
            worker.watch.heed_moved()
            given = self.schedule.order(), worker.local_step, worker.tokens
            with self.replica.changed:  # an entry that has come meanwhile is adopted first
                made = [] if self.replica.listed else outbox.close(*given)
            for push in made:
                self.replica.push(push, goes_on=False, facts=self.facts())
            if self.replica.listed or outbox.is_closed:
                continue
            if worker.leave_by is not None and outbox.upload() is None and not made:
                return  # all that is left has arrived, and counts
            if not self.wait(lambda: bool(self.replica.listed) or not outbox.queue):
                if worker.leave_by is not None:
                    return
                raise ConnectionError(
                    f"server {worker.server} cannot be reached: {worker.steps} steps of "
                    f"{worker.worker_id} have not been sent"
                )

    def beat(self, control):
        """Send a heartbeat, from a thread of the link, and take in the reply."""
        worker = self.worker
        with self.replica.changed:
            blocked = list(self.replica.outbox.blocked(worker.local_step))
        facts = {**self.facts(), "steps_per_second": worker.steps_per_second, "blocked": blocked}
        beat = beat_of(control.request("heartbeat", facts))
        if "away" in beat.orders and not worker.is_server_away:
            log(f"server {worker.server} was stopped; it has saved, and is awaited back")
        worker.is_server_away = "away" in beat.orders
        self.say_stalled(beat.stalls)
        self.hear(rank=beat.rank, world=beat.world)
        self.schedule.pace = beat.pace
        if "stop" in beat.orders:
            self.hear(stop_ordered=True)

    def hear(self, **facts):
        """Set attributes of the worker: at once, or where it has several ranks in their next turn, in
        which all take them over. Takes no lock: a heartbeat or a signal may come at any time."""
        alone = self.worker.ranks.count == 1
        (vars(self.worker) if alone else self.heard).update(facts)

    def say_stalled(self, stalls):
        """Log for whom, maybe this worker, a round waits too long by a heartbeat's reply."""
        if not stalls or time.monotonic() - self.said_at < SAY_SECONDS:
            return
        match stalls[0]:
            case {"slice": int(k), "seconds": int() | float() as seconds, "missing": [*missing]}:
                missing = [name for name in missing if type(name) is str and name.isprintable()]
            case _:
                raise ProtocolError("heartbeat: a stall is not slice, seconds and missing")
        self.said_at = time.monotonic()
        me, whom = self.worker.worker_id, ", ".join(map(protocol.shown, missing[:20]))
        text = f"the round of slice {k} has waited {seconds:.0f} s for {whom or 'more workers'}"
        if me in missing:
            text += f": all wait for this worker, whose training is at step {self.worker.step}"
        log(f"WARNING: {me}: {text}")


def count_step(worker):
    """Count a step of the optimizer, and do what is due after it."""
    watch = worker.watch
    worker.replica.step += 1
    watch.note_scaler(worker.optimizer)
    if watch.jumps.records:
        watch.jumps.follow()
    is_busy = worker.leader.is_busy()
    if worker.ranks.is_alone and not is_busy:
        worker.schedule.tick()
        return
    with own_modes():
        with worker._together(is_busy) as is_busy:
            if is_busy:
                watch.copies.note()
            if worker.ranks.leads:
                worker.leader.work() if is_busy else worker.schedule.tick()
        watch.copies.move()


@contextlib.contextmanager
def showing_global(worker):
    """Within the block the model's parameters and buffers are the global ones, as far as this worker
    has adopted them; afterwards its own again, to the bit. For evaluation. With a sharded model all
    ranks have to enter it, and leave it, between the same steps."""
    trained, is_sharded = worker.trained, worker.ranks.is_sharded
    tensors = [*trained.named.values(), *trained.buffer_tensors.values()]
    with own_modes():
        local = [tensor.detach().clone() for tensor in tensors]
        with worker._together() if is_sharded else contextlib.nullcontext():
            for slice in worker.slices:
                slice.show_anchor()
    try:
        worker.shows_global = True
        yield
    finally:
        worker.shows_global = False
        reshard(trained.fsdp_modules)
        with own_modes():
            for tensor, values in zip(tensors, local, strict=True):
                tensor.copy_(values)


STARTED = weakref.WeakSet()  # the DiLoCoWorkers of this process
ATTACHED = weakref.WeakSet()  # those that `attach` has started


def _after_fork():
    """In a process forked from the workers': leave the workers alone."""
    for worker in STARTED:
        worker.link.disown()
        worker.closed = threading.Event()
        worker.closed.set()
        for slice in worker.replica.slices:
            slice.lock = threading.RLock()
        unlisten(worker.watch)


os.register_at_fork(after_in_child=_after_fork)


def metrics_of(worker):
    """Return the numbers of a worker for a log, under `diloco/`."""
    replica = worker.replica
    own = "sync_count", "local_step", "steps_per_second", "num_fragments", "fragment_syncs"
    own += "overlap", "stall_time", "dropped_steps"
    theirs = "last_sync_time", "total_sync_time", "mismatches"
    found = {name: getattr(worker, name) for name in own} | {"sync_every": worker.schedule.every}
    found |= {name: getattr(replica, name) for name in theirs}
    found |= {"last_send_mb": replica.last_send / 1e6, "last_recv_mb": replica.last_recv / 1e6}
    return {f"diloco/{name}": number for name, number in found.items()}


def told_length(max_steps):
    """The length of a run as messages have it: 0 where there is none."""
    return int(max_steps) if 0 < max_steps < 1 << 53 else 0


def attach(cls, model, optimizer, server=None, sync_every=None, worker_id=None, **options):
    """Join a run and return its worker, with the arguments of the class; for scripts. Where there is
    no server, neither here nor in DILOCO_SERVER, return a Standalone: the script trains alone.

    Nothing else is needed until the last step, then `flush`, before the last evaluation and
    checkpoint. A script that ends without it has sent its last steps all the same, but has saved its
    own model. Raises what the class raises on entry."""
    if not (server or os.environ.get("DILOCO_SERVER")):
        log("no server given and DILOCO_SERVER is not set: training standalone")
        return Standalone(optimizer, options.get("state"))
    worker = cls(model, optimizer, server, sync_every, worker_id, **options).start()
    if not ATTACHED:  # a thread that the process waits for; in functions for atexit none can start
        threading.Thread(target=_close_attached, name="diloco end").start()
    ATTACHED.add(worker)
    return worker


def _close_attached():
    """When the script has come to its end, send what is left, and leave. After an exception nothing
    is sent. The ranks of a worker send together, so in `flush` only."""
    threading.main_thread().join()
    for worker in [*ATTACHED] if getattr(sys, "last_value", None) is None else ():
        try:
            if not worker.closed.is_set() and worker.ranks.count == 1:
                worker.flush()
        except Exception as error:
            log(f"{worker.worker_id}: {worker.steps} steps are not sent: {reason_of(error)}")
        worker.close()


class Standalone:
    """What `attach` returns without a server: it takes the same calls as a DiLoCoWorker, counts the
    optimizer's steps, and does nothing else. `state`: what `state_dict` gave, of either."""

    server, worker_id, loss, tokens = None, "standalone", None, 0
    index, rank, world, num_shares = 0, 0, 1, 1
    sync_count = dropped_steps = run_step = max_steps = 0
    stop_ordered = kept_local = False
    evaluation = None

    def __init__(self, optimizer, state=None):
        self.step, self.local_step = (state or {}).get("step", 0), 0
        several = isinstance(optimizer, list | tuple)
        self.optimizer = unwrapped(optimizer[-1] if several else optimizer)
        self.hook = self.optimizer.register_step_post_hook(torch.compiler.disable(self._stepped))

    def _stepped(self, optimizer, args, kwargs):
        if not is_nested_step(optimizer):
            self.step, self.local_step = self.step + 1, self.local_step + 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def flush(self, *ignored, **more):
        """Nothing: the model is the only one, nobody is waited for, and nothing was rounded."""

    part = save_residual = flush

    def close(self, reason="done"):
        """Count no more steps."""
        self.hook.remove()

    def run_is_over(self, max_steps):
        """Whether to stop: after a SIGTERM that a SigtermNotice watches for."""
        self.max_steps = told_length(max_steps)
        return self.stop_ordered

    def evaluated(self, loss):
        """Note an evaluation's loss, of the only model that there is."""
        self.evaluation = {"step": self.step, "loss": float(loss), "is_global": True}

    def global_model(self):
        """A block within which the model is what it is."""
        return contextlib.nullcontext()

    def metrics(self):
        """Return {}: there is nothing to log, and nothing was rounded."""
        return {}

    residual = metrics

    def state_dict(self):
        """Return the number of steps, for `state`."""
        return {"step": self.step}


class SigtermNotice:
    """Take SIGTERM as a notice, as Slurm, Kubernetes and cloud machines give it some time before they
    kill: from then on the worker waits for nobody, and `run_is_over` says True, for all its ranks, so
    that the script can send, save and leave. Where the program has a handler of its own, that one is
    called and says what comes; then the worker only waits for nobody. A second SIGTERM does what it
    did before. Signals come to the main thread only; in another thread this does nothing.

    came: whether SIGTERM is to end the program and has come.
    """

    def __init__(self, worker):
        self.worker, self.came = worker, False
        self.before = signal.getsignal(signal.SIGTERM)
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and (self.before == signal.SIG_DFL or callable(self.before)):
            signal.signal(signal.SIGTERM, self.handle)

    def handle(self, number, frame):
        """What happens when the signal comes."""
        self.end()
        self.worker.part()
        if callable(self.before):
            return self.before(number, frame)
        self.came, leader = True, getattr(self.worker, "leader", None)
        if leader:
            leader.hear(stop_ordered=True)
        else:
            self.worker.stop_ordered = True

    def end(self):
        """Take the signal no more."""
        if signal.getsignal(signal.SIGTERM) == self.handle:
            signal.signal(signal.SIGTERM, self.before)


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
    token: the run's secret. tls: True, a fingerprint or a CA file; see `protocol.Access`.
    local: name patterns ("teacher.*") of parameters and buffers that are this worker's own: neither
    synchronized nor compared, such as a teacher or an average that changes without an optimizer.
    trained: name patterns of parameters that are frozen now and trained later in the run: they are
    synchronized from the beginning. All workers must name the same.

    Where torch.distributed is initialized, all its ranks are one worker: each makes one of these,
    rank 0 speaks to the server, and all have the same parameters to the bit after each step. Of a
    model that `fully_shard` has been applied to, each keeps its shards; rank 0 holds the anchor, and
    a copy of the model, on the CPU. Raises ValueError where a DTensor is placed in another way.

    A context manager: joins on entry, and on exit sends what is left and leaves. Raises Refused
    when the server says no (wrong model, wrong setting) or talks nonsense twice running, and
    ConnectionError on entry and exit when there is no server for `reconnect_timeout`.
    `optimizer.step()` raises Refused, FloatingPointError where three pushes running are not finite,
    and RuntimeError or ValueError where something else than the given optimizer trains the model.

    What is trained may change, as where a layer is unfrozen, where all workers make the change at the
    same step of the run: then `optimizer.step()` first waits for all of them; see `Anew`. It raises
    Refused where another worker does not make it, ConnectionError where the server cannot be reached
    for it, and RuntimeError where the worker has several ranks. Nothing else, but ConnectionError on
    ranks that follow a rank which has failed.
    """

    # Where the worker is before it has joined. What its arguments decide is made in `__init__`.
    ranks = None  # the processes of this worker, from `start` on
    index, rank, world, num_shares = 0, 0, 1, 1
    local_step = property(operator.attrgetter("replica.step"))  # optimizer steps of this process
    ahead = 0  # steps of the run that this process has not made itself
    step = property(lambda self: self.local_step + self.ahead)  # this worker's step of the run
    run_step = 0  # the furthest worker's
    skipped = 0  # steps of which a GradScaler said later that they were none
    tokens, loss, stall_time = 0, None, 0.0
    max_steps = 0  # length of the run, as `run_is_over` was asked last; 0: unknown
    evaluation = None  # the newest one, as messages have it
    shows_global = False  # whether the model's values are the global ones, within `global_model`
    stalled_since = None  # seconds when it began to wait for an entry
    joins = fragment_syncs = dropped_steps = 0
    clearings = 0  # how often the optimizers' state has been cleared
    kept_local = flushed = stop_ordered = is_server_away = False
    leave_by = None  # seconds when a worker that was told to leave waits no longer

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
        token=None,
        tls=None,
        local=(),
        trained=(),
    ):
        self.server = server or os.environ.get("DILOCO_SERVER")
        if not self.server:
            raise ValueError("no server: pass server='host:port' or set DILOCO_SERVER")
        self.sync_every = int(sync_every or os.environ.get("DILOCO_SYNC_EVERY") or SYNC_EVERY)
        self.num_fragments = int(num_fragments or os.environ.get("DILOCO_NUM_FRAGMENTS") or 1)
        self.fragment_update, self.alpha = fragment_update, float(fragment_update_alpha)
        self.delay = fragment_sync_delay
        if self.delay is None:
            self.delay = 0 if self.num_fragments == 1 else self.sync_every // self.num_fragments
        check_settings(self)
        self.saved, self.residual_path = state or {}, residual
        self.worker_id = worker_id or default_id(self.saved)
        self.source, self.reconnect_timeout = source, reconnect_timeout
        local = [*patterns(local), *map(glob.escape, self.saved.get("local", []))]
        self.trained = Trained(model, optimizer, files, local, trained)
        self.link = Link(self.server, self.worker_id, protocol.Access.of(token, tls))
        self.replica = Replica(self.worker_id, self.link)
        count = self.num_fragments + bool(self.trained.buffers)
        self.schedule = Schedule(self.sync_every, self.num_fragments, count)
        self.run = self.saved.get("run", "")  # id of the run that local work belongs to
        self.fetched = []  # names of frozen parameters that were taken from the server
        self.closed = threading.Event()
        self.started = time.monotonic()
        self.leader, self.watch = Leader(self), Watch(self)
        held = {parameter: parameter._version for parameter in self.trained.named.values()}
        self.unstarted = weakref.finalize(self, say_unstarted, self.worker_id, os.getpid(), held)

    # --- Beginning and ending ---

    attach = classmethod(attach)

    def start(self):
        """Join the run (waits until it starts), take its parameters and hook into the optimizer."""
        if self.closed.is_set():
            raise RuntimeError(f"{self.worker_id} has left the run: make a new DiLoCoWorker")
        if self in STARTED:  # as in `with DiLoCoWorker.attach(...)`
            return self
        self.unstarted.detach()
        try:
            check_process(self)
            STARTED.add(self)
            self.ranks = Ranks({**self.trained.named, **self.trained.frozen})
            found = self.ranks.tell(list(self.trained.buffers))  # names of buffers finite on rank 0
            self.trained.buffers = {name: self.trained.places[name] for name in found}
            with own_modes():
                self.watch.copies.note()
                with self._together(frozen=self.trained.frozen):
                    if self.ranks.leads:
                        self.leader.join(self.reconnect_timeout)
                self.watch.copies.move()
                self.watch.note_frozen()
        except BaseException as error:
            self.close(reason_of(error))
            raise
        atexit.register(self._close_at_exit)
        self.started = time.monotonic()
        listen(self.watch)
        return self

    __enter__ = start

    def __exit__(self, kind, error, _):
        try:
            if kind is None:
                self.flush()
        except BaseException as failure:
            self.close(reason_of(failure))
            raise
        self.close(reason_of(error) if kind else "done")

    def flush(self):
        """Adopt what is under way, send the steps since then as closing pushes, and take the final
        global model. Once; later calls do nothing. Raises ConnectionError where the server cannot be
        reached for `reconnect_timeout`. After `part`, does not wait for other workers."""
        if self.flushed or self.closed.is_set():
            return
        with own_modes(), self._together():
            if self.ranks.leads:
                self.watch.settle()
                self.watch.check()
                self.watch.beside.tell()
                self.leader.close_slices()
        self.flushed = True

    def part(self, seconds=PARTING_SECONDS):
        """Leave soon: from now on a step, or `flush`, waits at most so long for its push to arrive,
        and for no other worker. A push that has arrived counts. Safe to call in a signal handler."""
        self.leave_by = time.monotonic() + seconds
        self.link.leave_soon()

    def close(self, reason="done"):
        """Leave the run without sending what is left; does nothing the second time."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.unstarted.detach()
        atexit.unregister(self._close_at_exit)
        unlisten(self.watch)
        self.link.close(reason, self.joins > 0, self.evaluation)
        # After a failure, or where one rank leaves, the others do not listen: all ranks stay as is.
        if self.ranks and self.ranks.is_alone:
            with torch.no_grad(), uninterrupted():
                for k in self.replica.listed:
                    self.replica.slices[k].adopt()
                self.replica.listed.clear()

    def _close_at_exit(self):
        error = getattr(sys, "last_value", None)  # the exception that nobody caught
        if words := self.watch.last_words():
            log(f"ERROR: {words}")
        self.close(f"the process ended after {reason_of(error)}" if error else "the process ended")

    # --- The ranks of one worker ---

    @contextlib.contextmanager
    def _together(self, is_busy=True, frozen=()):
        """A turn of the ranks: within the block rank 0 works as if it were alone, if it says that it
        `is_busy`; yields that. At its end the others take over where the worker is, and its tensors
        where they have changed; if rank 0 failed there, they fail too. frozen: names of parameters
        that are to be compared with the server's."""
        ranks = self.ranks
        if ranks.is_alone:
            yield is_busy
            return
        before, known = self._writes(), len(self.fetched)
        try:
            with uninterrupted():
                is_busy = self._report(is_busy=is_busy)["is_busy"]
                if is_busy:
                    reshard(self.trained.fsdp_modules)
                    ranks.gather(self.trained.named, frozen, self.leader.admission.note_frozen)
            yield is_busy
        except BaseException as error:
            if is_busy and ranks.leads and not ranks.is_broken:
                with uninterrupted(), contextlib.suppress(RuntimeError):
                    ranks.tell({"error": reason_of(error)})
            raise
        if is_busy:
            with uninterrupted():
                wrote = [old != new for old, new in zip(before, self._writes(), strict=True)]
                wrote = self._report(is_busy=False, wrote=wrote)["wrote"]
                fetched = self.fetched[known:]
                ranks.spread([*(self.trained.named if wrote[0] else ()), *fetched])
                ranks.broadcast(self.trained.buffer_tensors.values() if wrote[1] else ())
                ranks.release(fetched)

    def _writes(self):
        """Return how often each slice has been changed here: ([parameters'], [buffers'])."""
        counts, n = [slice.flat.writes for slice in self.replica.slices], self.num_fragments
        return counts[:n], counts[n:]

    def _report(self, **more):
        """Rank 0 tells the other ranks where the worker is, and they take it over."""
        vars(self).update(self.leader.heard)
        facts = {name: getattr(self, name) for name in TOLD}
        told = self.ranks.tell({**facts, **more})
        if "error" in told:
            raise ConnectionError(f"rank 0 of {self.worker_id}: {told['error']}")
        if not self.ranks.leads:
            if told["clearings"] != self.clearings:
                self.trained.clear_moments()
            self.replica.step -= told["skipped"] - self.skipped
            vars(self).update((name, told[name]) for name in TOLD)
        return told

    _after_step = count_step

    # --- What others want to know ---

    optimizer = property(lambda self: self.trained.optimizers[-1])  # whose steps count
    slices = property(operator.attrgetter("replica.slices"))  # the buffers', if any, is the last
    outbox = property(operator.attrgetter("replica.outbox"))  # pushes whose fate is not known yet
    versions = property(lambda self: [place.version for place in self.outbox.places])  # of anchors
    version = property(lambda self: self.versions[0])  # of the first slice: (life, number)
    sync_count = property(lambda self: self.fragment_syncs // self.num_fragments)  # rounds adopted

    @property
    def steps(self):
        """Steps of this process, or of the one that it goes on from, that no entry lists yet."""
        places = self.replica.outbox.places[: self.num_fragments]
        listed = [p.pending.first if p.pending else p.mark[0] for p in places]
        return self.local_step - min(listed, default=self.local_step)

    @property
    def steps_per_second(self):
        """Optimizer steps of this process over the time since it joined."""
        return self.local_step / max(time.monotonic() - self.started, 1e-9)

    @property
    def waited(self):
        """Seconds in which training has waited for entries."""
        since = self.stalled_since
        return self.stall_time + (0.0 if since is None else time.monotonic() - since)

    @property
    def overlap(self):
        """Share of the time of transfers, waits included, in which this worker went on training."""
        total = self.replica.total_sync_time
        return max(0.0, 1 - self.stall_time / total) if total else 0.0

    def run_is_over(self, max_steps):
        """Whether to stop: the server says so, or another worker has reached the run's length. All
        ranks of a worker say the same after the same step."""
        self.max_steps = told_length(max_steps)
        is_over = self.stop_ordered or 0 < max_steps <= self.run_step
        if is_over:
            self.watch.tell_over(max_steps)
        return is_over

    def evaluated(self, loss):
        """Note the loss of an evaluation that has just been made: the server shows the newest one of each
        worker, and a curve of those of the global model. That is what was evaluated where no step was
        made since the last adoption, or within `global_model`. One that is not finite is not told."""
        if abs(loss := float(loss)) < protocol.MAX_ABS:
            is_global = self.shows_global or self.replica.is_global()
            self.evaluation = {"step": self.step, "loss": loss, "is_global": is_global}

    global_model, metrics = showing_global, metrics_of

    def residual(self):
        """Return the losses of rounding so far, by slice, as {name: CPU tensor}; empty if there are
        none. They belong to a checkpoint: as "residual" in `state_dict`, or in a file."""
        slices = {f"residual.{k}": slice for k, slice in enumerate(self.slices)}
        return {name: s.copied_residual() for name, s in slices.items() if s.residual is not None}

    def save_residual(self, path):
        """Write `residual` into a safetensors file, if it is not empty."""
        if residuals := self.residual():
            protocol.save_file(path, residuals, {"program": "diloco", "run": self.run})

    def state_dict(self):
        """Return the sync progress as JSON-able values, never parameters. With the parameters of the
        same moment another process can go on with local work that had not been sent."""
        return {
            "worker_id": self.worker_id,
            "run": self.run,
            "step": self.step,
            "position": self.schedule.position,
            "cycle": self.schedule.every,
            "fragments": self.replica.progress(),
            "stripe": self.trained.stripe(self.num_fragments),
            "local": self.watch.own_names(),
        }


# --- Trainers with callbacks ---


class DiLoCoCallback:
    """DiLoCoWorker behind the hooks that trainers call. Arguments as there; all are optional.

    Without a server every hook does nothing. Unknown `on_...` hooks do nothing either. Trainers call
    no hook where training raises: the worker leaves then when the process ends, when training
    begins anew, or with `close`. A copy has the options and the progress, and no worker. `state` is
    what the Trainer of transformers puts into its checkpoints; the README says how.
    """

    _tokens = {}  # noqa: RUF012 - {server: the last token that a callback of this process was given}

    def __init__(self, server=None, sync_every=None, worker_id=None, **options):
        self.server = server or os.environ.get("DILOCO_SERVER")
        self.options = {"sync_every": sync_every, "worker_id": worker_id, **options}
        # The arguments go into checkpoints. The secret must not, but a trainer may make the callback
        # anew from a checkpoint, in the same process.
        self.arguments = {"server": server, **self.options}
        if token := self.arguments.pop("token", None):
            self._tokens[self.server] = token
        elif self.server in self._tokens:
            self.options["token"] = self._tokens[self.server]
        self.worker = None
        self.saved, self.folder = {}, None
        self.warned = False
        self.notice, self.told = None, {}  # SigtermNotice; metrics as they were logged last

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)

    def __getstate__(self):
        return {**self.__dict__, "worker": None, "notice": None, "saved": self.state_dict()}

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
        self.notice, self.told = SigtermNotice(self.worker), {}

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
        """Stop with the run, or close it where training stops, before a best checkpoint is loaded."""
        if self.worker is None:
            return
        if self.worker.run_is_over(getattr(state, "max_steps", 0)):
            control.should_training_stop = True
            if getattr(args, "save_strategy", "no") != "no":
                control.should_save = True
        if control.should_training_stop:
            self.worker.flush()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add to `logs` the metrics that have changed since the last time, to the summary all, and to
        the lines of evaluations none. Report the loss to the server."""
        if self.worker is None or logs is None or is_evaluation(logs):
            return
        if isinstance(logs.get("loss"), int | float):
            self.worker.loss = float(logs["loss"])
        # The Trainer's summary is its last call before it loads the best checkpoint, also where
        # training was stopped after the last step's hook, as early stopping does.
        if getattr(control, "should_training_stop", False) or "train_runtime" in logs:
            self.worker.flush()
        metrics = self.changed_metrics(whole="train_runtime" in logs)
        logs.update(metrics)
        history = getattr(state, "log_history", None)  # its last entry may be a copy of `logs`
        if history and history[-1].get("step") == state.global_step:
            history[-1].update(metrics)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Report the evaluation's loss to the server."""
        loss = (metrics or {}).get("eval_loss")
        if self.worker is not None and isinstance(loss, int | float):
            self.worker.evaluated(loss)

    def changed_metrics(self, whole):
        """Return the metrics that have changed since the last call, or all."""
        before, self.told = self.told, self.worker.metrics()
        return {name: n for name, n in self.told.items() if whole or before.get(name) != n}

    def on_train_end(self, args, state, control, **kwargs):
        """Close the run, unless the trainer has put its best checkpoint in the model's place. After
        SIGTERM, raises SystemExit: the program ends as the signal would have ended it."""
        if self.worker is not None:
            try:
                if not getattr(args, "load_best_model_at_end", False):
                    self.worker.flush()
            finally:
                self.close()
            if self.notice.came:
                raise SystemExit(128 + signal.SIGTERM)

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
        if self.notice:
            self.notice.end()

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


def is_evaluation(logs):
    """Whether a line of a log is an evaluation's or a prediction's, not of training."""
    others = [name for name in logs if name.endswith("_runtime") or name.startswith("eval_")]
    return bool(others) and "train_runtime" not in logs


class LightningHooks(DiLoCoCallback):
    """The callback behind the hooks of Lightning; `LightningCallback` is this and Lightning's own."""

    def on_train_start(self, trainer, module):
        """Join the run."""
        self.on_train_begin(None, None, None, module, trainer.optimizers)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """Stop with the run; close it before the last validation and checkpoint; log."""
        if self.worker is None:
            return
        if self.worker.run_is_over(trainer.max_steps):
            trainer.should_stop = True
        last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        last = last or 0 < trainer.max_steps <= trainer.global_step
        if last:
            self.worker.flush()
        if last or trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            if "loss" in (outputs or {}):
                loss = outputs["loss"].item()  # of a part of the batch, where it is accumulated
                self.worker.loss = loss * trainer.accumulate_grad_batches
            module.log_dict(self.changed_metrics(whole=last))

    def on_validation_end(self, trainer, module):
        """Report the validation's `val_loss` to the server, but not that of the check before training."""
        loss = trainer.callback_metrics.get("val_loss")
        if self.worker is not None and loss is not None and not trainer.sanity_checking:
            self.worker.evaluated(loss)

    def on_train_end(self, trainer, module):
        """Close the run."""
        super().on_train_end(None, None, None)

    def on_exception(self, trainer, module, exception):
        """Leave the run; after SIGTERM, which comes between two steps here, send what is left first."""
        if self.worker is not None and type(exception).__name__ == "SIGTERMException":
            self.worker.part()
            with contextlib.suppress(OSError):
                self.worker.flush()
        self.close(reason_of(exception))

    def state_dict(self):
        """The progress, with what rounding has lost."""
        residual = {"residual": self.worker.residual()} if self.worker else {}
        return super().state_dict() | residual


def without_metrics(on_log):
    """The hook of a printer of the Trainer, which prints all that is in the logs, without our metrics: a
    line tells of each round."""

    def printing(self, args, state, control, logs=None, **kwargs):
        ours = {name: logs.pop(name) for name in [*(logs or ())] if name.startswith("diloco/")}
        try:
            return on_log(self, args, state, control, logs=logs, **kwargs)
        finally:
            if ours:
                logs.update(ours)

    return printing


def _made_for(name):
    """The class of a trainer's own kind that has our hooks; it imports the trainer's package."""
    if name == "TransformersCallback":
        from transformers import PrinterCallback, ProgressCallback, TrainerCallback
        from transformers.trainer_callback import ExportableState

        for printer in (PrinterCallback, ProgressCallback):
            printer.on_log = without_metrics(printer.on_log)
        return type(name, (DiLoCoCallback, TrainerCallback, ExportableState), {})
    packages = ("lightning.pytorch", "pytorch_lightning")
    known = [sys.modules[package] for package in packages if package in sys.modules]
    for package in packages if not known else ():
        with contextlib.suppress(ModuleNotFoundError):
            known = known or [importlib.import_module(package)]
    if not known:
        raise ModuleNotFoundError(
            "LightningCallback needs the package lightning: pip install lightning"
        )
    return type(name, (LightningHooks, *(package.Callback for package in known)), {})


def __getattr__(name):
    """Make the callbacks of trainers when they are asked for first: this file needs torch only."""
    docs = {
        "TransformersCallback": "DiLoCoCallback for transformers' Trainer, trl, sentence-transformers: "
        "its progress is in every checkpoint, for resume_from_checkpoint.",
        "LightningCallback": "DiLoCoCallback for Lightning: its progress is in every checkpoint, for "
        "fit(ckpt_path=...).",
    }
    if name not in docs:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _made_for(name)
    made.__module__, made.__qualname__, made.__doc__ = __name__, name, docs[name]
    return globals().setdefault(name, made)
