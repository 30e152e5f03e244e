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
  is sent again under the same name, so that it counts exactly once.
- Without a server (no argument, no DILOCO_SERVER) the callback does nothing.

Environment, where no argument is given: DILOCO_SERVER, DILOCO_SYNC_EVERY, DILOCO_WORKER_ID,
DILOCO_NUM_FRAGMENTS.
"""

import atexit
import contextlib
import itertools
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field

import torch

try:
    from . import protocol
    from .protocol import CHUNK, CODECS, Buffer, Checksum, ProtocolError, Refused, TensorSpec
except ImportError:
    import protocol
    from protocol import CHUNK, CODECS, Buffer, Checksum, ProtocolError, Refused, TensorSpec

SYNC_EVERY = 500  # steps of a round, where nobody says otherwise
RECONNECT_SECONDS = 600.0
LONGEST_PAUSE_SECONDS = 10.0  # between two attempts to connect
MAX_REFUSALS = 3  # pushes in a row that are not finite, after which training is broken


def log(text):
    sys.stderr.write(f"diloco: {text}\n")  # one write: threads must not mix their lines


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
    predicted: bool = False  # the local values have jumped to `_predicted`
    done: threading.Event = field(default_factory=threading.Event)
    reply: protocol.Message | None = None
    error: BaseException | None = None
    seconds: float = 0.0  # from the start of encoding to the end of decoding


class Fragment:
    """A slice of the model with a version and pushes of its own: its numbers, and the arithmetic on
    them, chunk by chunk. Positions are within the slice.

    flat: the local parameters. anchor, residual (None where the upload codec loses nothing) and
    velocity (of the outer optimizer; None without prediction): views of float32 vectors.
    """

    def __init__(self, flat, due, anchor, residual, velocity, up, down):
        self.flat, self.size = flat, flat.numel
        self.due = due  # step of the cycle after which it is pushed
        self.anchor, self.residual, self.velocity = anchor, residual, velocity
        self.up, self.down = up, down
        self.push = Buffer(up.layout(self.size))
        self.update = Buffer([*down.layout(self.size), Checksum.SPEC])
        self.version = None  # [origin, number] of the anchor
        self.outer = None  # the outer step that follows the next push: lr, momentum, nesterov
        self.seq = 0  # of the last push
        self.mark = (0, 0)  # local step and tokens up to which steps have been pushed
        self.closed = False  # the closing push is in the global model
        self.flight = None  # the push that is under way

    def difference(self, flight, start, out):
        """Anchor minus local at the push, plus what rounding lost before, into `out`."""
        part = slice(start, start + out.numel())
        if flight.snapshot is None:
            self.flat.read(start, out)
        else:
            out.copy_(flight.snapshot[part])
        torch.sub(self.flat.rounded(start, self.anchor[part]), out, out=out)
        return out if self.residual is None else out.add_(self.residual[part])

    def encode(self, flight):
        """Fill the push buffer."""
        scratch = torch.empty(CHUNK)
        for start, stop in protocol.chunks(self.size):
            delta = self.difference(flight, start, scratch[: stop - start])
            self.up.encode(delta, self.push.tensors, start)

    def commit_residual(self, flight):
        """Keep what rounding took from a push that was accepted. The difference is worked out once
        more, which costs less than keeping it: neither side of it has changed since the push."""
        if self.residual is None or not flight.steps:
            return
        scratch, sent = torch.empty(CHUNK), torch.empty(CHUNK)
        for start, stop in protocol.chunks(self.size):
            delta, part = (
                self.difference(flight, start, scratch[: stop - start]),
                sent[: stop - start],
            )
            self.up.decode(self.push.tensors, start, part)
            self.residual[start:stop].copy_(delta.sub_(part))

    def predicted(self, flight):
        """Where the slice would be if all workers had pushed what this one has: (start, stop,
        values rounded to the parameters' dtypes) of each chunk. The outer step is the server's, and
        all that it needs is still what it was at the push."""
        lr, mu, nesterov = (self.outer[name] for name in ("lr", "momentum", "nesterov"))
        scratch, other = torch.empty(CHUNK), torch.empty(CHUNK)
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

    def advance(self, reply, whole):
        """Bring the anchor to a reply's version: by its update, to the slice in full, or not at all
        where nothing was folded. False if the checksum then differs from the server's."""
        checksum, scratch = Checksum(), torch.empty(CHUNK)
        for start, stop in protocol.chunks(self.size):
            anchor, step = self.anchor[start:stop], scratch[: stop - start]
            if whole is not None:
                anchor.copy_(whole[start:stop])
            elif reply.specs == self.update.specs:
                self.down.decode(self.update.tensors, start, step)
                anchor.add_(step)
                if self.velocity is not None and not reply.field("plain", bool):
                    self._learn_velocity(start, stop, step)
            checksum.add(anchor)
        self.version, self.outer = reply.field("version", list), reply.field("outer", dict)
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

    def move(self, new, since=None, alpha=None):
        """Set the local values to the global slice `new`, with what was done since they were
        `since` on top; with `alpha`, to so much of the local values and the rest of `new`."""
        scratch = torch.empty(CHUNK)
        for start, stop in protocol.chunks(self.size):
            target, local = new[start:stop], scratch[: stop - start]
            if since is not None:
                self.flat.read(start, local)
                if alpha is None:
                    target = local.sub_(since[start:stop]).add_(target)
                else:
                    target = local.mul_(alpha).add_(target, alpha=1 - alpha)
            self.flat.write(start, target)


class DiLoCoWorker:
    """One worker of a run: synchronizes `model` through `optimizer`'s step hook.

    model: torch.nn.Module whose trainable parameters (float) are synchronized.
    optimizer: torch.optim.Optimizer; each of its steps counts as one local step.
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
    reconnect_timeout: seconds that an outage of the server or the network may take.
    state: what `state_dict` gave, to go on with local work that had not been sent.

    A context manager: joins on entry, and on exit sends what is left and leaves. Raises Refused
    when the server says no (wrong model, wrong setting), ConnectionError when there is no server.
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
    ):
        self.server = server or os.environ.get("DILOCO_SERVER")
        if not self.server:
            raise ValueError("no server: pass server='host:port' or set DILOCO_SERVER")
        self.saved = state or {}
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
        while hasattr(optimizer, "optimizer"):  # as accelerate wraps them
            optimizer = optimizer.optimizer
        self.optimizer = optimizer
        self.named = _trainable(model)
        if not self.named:
            raise ValueError("the model has no parameter that requires grad: nothing to train")

        self.control = None  # the Connection of join, heartbeat and leave
        self.control_lock = threading.Lock()
        self.data = []  # idle Connections for pushes
        self.used = set()  # those in use
        self.pool = Pool(self.num_fragments)
        self.closed = threading.Event()
        self.heart = None
        self.hook = None
        self.stream = None  # of CUDA, for copies to the host
        self.anchor_lock = threading.Lock()  # while a slice of the anchor moves
        self.fragments, self.snapshots = [], []

        self.index, self.rank, self.world, self.shares = 0, 0, 1, 1
        self.step = self.run_step = 0  # mine, and that of the worker that was furthest
        self.local_step = 0  # optimizer steps of this process
        self.position = 0  # steps since the cycle began
        self.tokens = 0
        self.loss = None
        self.joins = 0
        self.kept_local = self.flushed = self.stop_ordered = False
        self.fragment_syncs = self.dropped_steps = self.mismatches = self.refusals = 0
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
        due = retry(self._join, self.reconnect_timeout, f"server {self.server}")
        self.started = time.monotonic()
        self.heart = threading.Thread(target=self._heartbeat_loop, daemon=True)
        self.heart.start()
        atexit.register(self.close, "the process ended")
        with torch.no_grad():
            self._align(due, keep_position=self.kept_local)
        self.hook = self.optimizer.register_step_post_hook(lambda *_: self._after_step())
        return self

    __enter__ = start

    def __exit__(self, kind, error, _):
        try:
            if kind is None:
                self.flush()
        except BaseException as failure:
            self.close(f"{type(failure).__name__}: {failure}")
            raise
        self.close(f"{kind.__name__}: {error}" if kind else "done")

    def _connect(self):
        session = {"worker": self.worker_id, "session": self.session}
        return protocol.connect(self.server, session)[0]

    def _join(self):
        """Join or join again, and lay what is not yet in the global model on top of it. Returns
        what the server says of the next pushes, for `_align`."""
        manifest = protocol.specs_of(self.named.items())
        with self.control_lock:
            if self.control:
                self.control.close()
            conn = self.control = self._connect()
            fields = {
                "manifest": protocol.manifest_to_json(manifest),
                "sync_every": self.sync_every,
                "num_fragments": self.num_fragments,
                "source": self.source,
                "host": socket.gethostname(),
                "step": self.step,
            }
            reply = conn.request("join", fields, on_wait=self._say_awaited)
            if reply.type == "init":
                reply = self._upload(conn, manifest)
            if sorted(s.name for s in reply.specs) != sorted(self.named):
                raise ProtocolError("join: the server sent other tensors than it was told")
            params = torch.empty(sum(spec.numel for spec in manifest))
            reply.expect([s._replace(dtype=torch.float32, shape=tuple(self.named[s.name].shape))
                          for s in reply.specs])  # fmt: skip
            conn.read(params)
        with torch.no_grad(), uninterrupted():
            if not self.fragments:
                self._enter(reply, params)
            else:
                self._reenter(reply, params)
        self.joins += 1
        self.index = reply.field("index", int)
        self.shares = reply.field("shares", int, low=1)
        self.heartbeat_seconds = reply.field("heartbeat_seconds", float, low=0.01)
        self._take_share(reply)
        numbers = [fragment.version[1] for fragment in self.fragments]
        log(
            f"{self.worker_id} {'has joined again as' if self.joins > 1 else 'is'} worker "
            f"{self.index}, {self.world} in all, at step {self.step}, version "
            f"{numbers[0] if len(numbers) == 1 else numbers}"
        )
        return reply.field("due", dict)

    def _upload(self, conn, manifest):
        files = {n: t.encode() for n, t in self.files.items() if n in protocol.FILE_NAMES}
        raw = {
            f"file:{name}": torch.frombuffer(bytearray(text), dtype=torch.uint8)
            for name, text in files.items()
        }
        parameters = (p.detach().cpu().contiguous() for p in self.named.values())
        return conn.request(
            "init",
            {"files": {name: len(text) for name, text in files.items()}},
            manifest + protocol.specs_of(raw.items()),
            itertools.chain(parameters, raw.values()),
            on_wait=self._say_awaited,
        )

    def _say_awaited(self, fields):
        if not self.fragments:
            log(f"{self.worker_id} waits for {fields.get('awaited')}")

    def _enter(self, reply, params):
        """The first join of this process: set up, and take the parameters or keep one's own."""
        names, count = [spec.name for spec in reply.specs], self.num_fragments
        up, down = (CODECS[reply.field(f"{way}_codec", str)] for way in ("upload", "download"))
        residual = torch.zeros_like(params) if up.lossy else None
        predicts = self.update == "predict" and self.delay
        velocity = torch.zeros_like(params) if predicts else None
        for k in range(count):
            flat = protocol.FlatModel([self.named[name] for name in names], k, count)
            due = (k + 1) * self.sync_every // count
            views = (
                None if vector is None else protocol.fragment_of(vector, k, count)
                for vector in (params, residual, velocity)
            )
            self.fragments.append(Fragment(flat, due, *views, up, down))
        if self.fragments[0].flat.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.fragments[0].flat.device)
        self.step = self.run_step = reply.field("step", int)
        saved = self.saved.get("fragments", [])
        labels = reply.field("versions", list)
        saved = saved if len(saved) == len(labels) else [None] * len(labels)
        for k, (fragment, old) in enumerate(zip(self.fragments, saved, strict=True)):
            fragment.version, fragment.seq = labels[k], reply.field("seqs", list)[k]
            fragment.outer = reply.field("outer", list)[k]
            # A push that was under way when the checkpoint was written has lost the values that it
            # was made from: what came after it cannot be told from what it carries.
            if old and old["version"] == labels[k] and not old["in_flight"]:
                fragment.mark = (-old["steps"], 0)
                self.kept_local = True
            else:
                fragment.move(fragment.anchor)
        if self.kept_local:
            self.step, self.position = self.saved["step"], self.saved["position"]
        elif self.saved:
            log("the server has moved on since the checkpoint: took the global model")

    def _reenter(self, reply, params):
        """A later join: the server was restarted, or had given this worker up. Local work stays, on
        top of the new global parameters: all of it, or where the push was folded after all, what
        came after the push."""
        news = (reply.field(name, list) for name in ("versions", "seqs", "outer"))
        for k, (fragment, label, seq, outer) in enumerate(zip(self.fragments, *news, strict=True)):
            flight, new = fragment.flight, protocol.fragment_of(params, k, self.num_fragments)
            same = label == fragment.version
            if flight and seq >= flight.fields["seq"]:
                fragment.commit_residual(flight)
                fragment.keep_prediction(flight)
                fragment.move(new, flight.snapshot, self.alpha)
                self._settle(fragment)
            elif not same:
                if flight:
                    fragment.undo_prediction(flight)
                    self._release(fragment)
                fragment.move(new, since=fragment.flat.rounded(0, fragment.anchor))
            fragment.anchor.copy_(new)
            fragment.version, fragment.seq, fragment.outer = label, max(fragment.seq, seq), outer

    def _align(self, due, keep_position=False):
        """Begin where the others are: push at once what they have begun to push, and come to the
        next fragment when they do. So no two workers wait for each other on different ones."""
        again = [fragment for fragment in self.fragments if fragment.flight]
        place, steps, relaunched = due["next"], due["steps"], []
        while self.fragments[place] in again:  # pushed before the connection was lost: once more
            again.remove(self.fragments[place])
            relaunched.append(self.fragments[place])
            place, steps = (place + 1) % self.num_fragments, None
        for fragment in again:  # not what the others wait for next: its time will come
            fragment.undo_prediction(fragment.flight)
            self._release(fragment)
        if not keep_position:
            earlier = self.fragments[place - 1].due if place else 0
            later = self.fragments[place].due
            self.position = earlier if steps is None else max(earlier, later - steps)
        for fragment in relaunched:
            fragment.flight.error = None
            fragment.flight.done.clear()
            self._launch(fragment)
        for k in due["open"]:
            if self.fragments[k].flight is None:
                self._begin(self.fragments[k])
                if self.delay == 0:
                    self._adopt(self.fragments[k])

    def _take_share(self, reply):
        self.rank = reply.field("rank", int, self.rank)
        self.world = reply.field("world", int, self.world, low=1)

    # --- Rounds ---

    def _after_step(self):
        """The optimizer's hook: count the step, adopt what is due, then push what is due."""
        self.step += 1
        self.local_step += 1
        self.position += 1
        flying = (f for f in self.fragments if f.flight and self.local_step >= f.flight.adopt_at)
        pushed = [f for f in self.fragments if f.due == self.position]
        with torch.no_grad():
            joins = self.joins
            for fragment in flying:
                self._adopt(fragment)
            if self.joins != joins:
                return  # it has another place in the cycle now, and has pushed what is due there
            for fragment in pushed:
                self._begin(fragment)
                if self.delay == 0:
                    self._adopt(fragment)
        if self.position >= self.sync_every:
            self.position = 0

    @torch.no_grad()
    def flush(self):
        """Adopt what is under way, send the steps since then as the closing round, and take the
        final global model. Once; later calls do nothing."""
        if self.flushed:
            return
        for fragment in self.fragments:
            if fragment.flight:
                self._adopt(fragment)
        self.flushed = True
        for fragment in self.fragments:  # all at once: others may still wait for any of them
            self._begin(fragment)
        for fragment in self.fragments:
            while not fragment.closed:
                if fragment.flight is None:  # given up for joining again
                    self._begin(fragment)
                self._adopt(fragment)

    def _begin(self, fragment):
        """Send a fragment on its way: note the local values, and leave the rest to the pool."""
        if fragment.flight:
            self._adopt(fragment)
        steps, tokens = self.local_step - fragment.mark[0], self.tokens - fragment.mark[1]
        fragment.seq += 1
        fields = {
            "fragment": self.fragments.index(fragment),
            "seq": fragment.seq,
            "base": fragment.version,
            "step": self.step,
            "position": self.position % self.sync_every,
            "steps": steps,
            "tokens": tokens,
            "loss": self._sane_loss(),
            "closing": self.flushed,
        }
        snapshot = None
        if self.delay and not self.flushed:
            snapshot = self.snapshots.pop() if self.snapshots else self._new_snapshot()
            self._copy_out(fragment, snapshot[: fragment.size])
        fragment.flight = Flight(
            fields,
            steps,
            (self.local_step, self.tokens),
            self.local_step + self.delay,
            snapshot,
        )
        if snapshot is not None and fragment.velocity is not None:
            if self.stream is not None:
                self.stream.synchronize()  # the prediction is worked out from the snapshot
            fragment.predict(fragment.flight)
        self._launch(fragment)

    def _new_snapshot(self):
        largest = max(fragment.size for fragment in self.fragments)
        return torch.empty(largest, pin_memory=self.stream is not None)

    def _copy_out(self, fragment, snapshot):
        """Copy a slice of the local parameters to the host. On a GPU the copy has a stream of its
        own; what is queued behind waits for it there, and this thread does not."""
        if self.stream is None:
            fragment.flat.read(0, snapshot)
            return
        training = torch.cuda.current_stream(fragment.flat.device)
        self.stream.wait_stream(training)
        with torch.cuda.stream(self.stream):
            fragment.flat.read(0, snapshot, non_blocking=True)
        training.wait_stream(self.stream)

    def _launch(self, fragment):
        flight = fragment.flight
        if self.delay or flight.fields["closing"]:
            self.pool.submit(lambda: self._fly(fragment, flight))
        else:
            self._fly(fragment, flight)

    @torch.no_grad()
    def _fly(self, fragment, flight):
        """A push from encoding to the new anchor; everything but the local parameters, which belong
        to the training thread. Never raises: see `flight.error`."""
        began = time.monotonic()
        try:
            if self.stream is not None:
                self.stream.synchronize()
            if flight.steps:
                fragment.encode(flight)
            what = f"server {self.server}"
            reply, whole = retry(
                lambda: self._exchange(fragment, flight), self.reconnect_timeout, what, self.closed
            )
            if not reply.fields.get("refused"):
                fragment.commit_residual(flight)
            fragment.keep_prediction(flight)
            with self.anchor_lock:
                equal = fragment.advance(reply, whole)
            if not equal:
                self._fetch(fragment)
            flight.reply = reply
        except BaseException as error:
            flight.error = error
        flight.seconds += time.monotonic() - began
        flight.done.set()

    def _exchange(self, fragment, flight):
        """Send a push and read its reply: (message, the slice in full or None)."""
        conn = self.data.pop() if self.data else self._connect()
        self.used.add(conn)
        if self.closed.is_set():
            conn.close()
        before = conn.bytes_out, conn.bytes_in
        try:
            push = fragment.push
            specs, payload = (push.specs, [push.raw]) if flight.steps else ([], [])
            reply = conn.request("push", flight.fields, specs, payload)
            whole = self._read_update(conn, fragment, reply)
        except BaseException:
            conn.close()
            raise
        finally:
            self.used.discard(conn)
        self.last_send, self.last_recv = conn.bytes_out - before[0], conn.bytes_in - before[1]
        self.data.append(conn)
        return reply, whole

    def _read_update(self, conn, fragment, reply):
        full = [TensorSpec("slice", torch.float32, (fragment.size,)), Checksum.SPEC]
        whole, update = None, fragment.update
        if reply.specs == full:
            whole = torch.empty(fragment.size)
            conn.read(whole)
        elif reply.specs != [Checksum.SPEC]:
            reply.expect(update.specs)
            conn.read(update.raw)
            return None
        conn.read(update.tensors["checksum"])
        return whole

    def _fetch(self, fragment):
        """The anchor is not what the server holds: take the slice in full, and count it."""
        self.mismatches += 1
        log(f"WARNING: checksum mismatch at {fragment.version}; fetching the parameters")
        with contextlib.closing(self._connect()) as conn:
            reply = conn.request("fetch", {"fragment": self.fragments.index(fragment)})
            whole = self._read_update(conn, fragment, reply)
        with self.anchor_lock:
            fragment.advance(reply, whole)

    def _adopt(self, fragment):
        """Wait for the reply to a fragment's push, and move the local parameters with the anchor."""
        flight, began = fragment.flight, time.monotonic()
        while fragment.flight is flight:
            flight.done.wait()
            if flight.error and not self._must_join(flight):
                raise flight.error
            if flight.error:
                self._rejoin()
                continue
            if refused := flight.reply.field("refused", str, ""):
                self._drop(refused)
            else:
                self.refusals = 0
                with uninterrupted():
                    fragment.move(fragment.anchor, flight.snapshot, self.alpha)
                    self._settle(fragment)
            self.run_step = max(self.run_step, flight.reply.field("step", int))
            self._take_share(flight.reply)
        in_pool = self.delay or flight.fields["closing"]
        self.stall_time += time.monotonic() - began if in_pool else flight.seconds
        self.last_sync_time = flight.seconds
        self.total_sync_time += flight.seconds

    @staticmethod
    def _must_join(flight):
        return isinstance(flight.error, Refused) and flight.error.code == "rejoin"

    def _settle(self, fragment):
        """The steps of a fragment's push are in the global model."""
        fragment.mark = fragment.flight.mark
        fragment.closed = fragment.flight.fields["closing"]
        self.fragment_syncs += 1
        self._release(fragment)

    def _release(self, fragment):
        if fragment.flight.snapshot is not None:
            self.snapshots.append(fragment.flight.snapshot)
        fragment.flight = None

    def _rejoin(self):
        """Join again: the server was restarted, or had given this worker up."""
        for fragment in self.fragments:
            if fragment.flight:
                fragment.flight.done.wait()
                if not fragment.flight.error:
                    self._adopt(fragment)
        due = retry(self._join, self.reconnect_timeout, f"server {self.server}", self.closed)
        self._align(due)

    def _drop(self, why):
        """A push was refused. All that is local goes, in all fragments: what is not finite in one
        would be in the others after the next step."""
        dropped = self.steps
        self.dropped_steps += dropped
        self.refusals += 1
        for fragment in self.fragments:
            flight = fragment.flight
            if flight:
                flight.done.wait()
            fragment.move(fragment.anchor)
            if flight and not flight.error:
                self._settle(fragment)
            elif flight and flight.snapshot is not None:
                fragment.flat.read(0, flight.snapshot[: fragment.size])
                flight.predicted = False
            fragment.mark = (self.local_step, self.tokens)
        self.optimizer.state.clear()
        log(f"WARNING: {why}: dropped {dropped} steps, took the global model, and cleared the "
            "optimizer's state")  # fmt: skip
        if self.refusals >= MAX_REFUSALS:
            raise FloatingPointError(
                f"{why}, {self.refusals} times running: training diverges on {self.worker_id}; "
                "lower the learning rate, clip gradients, or check its data and hardware"
            )

    # --- Heartbeats, leaving ---

    def _heartbeat_loop(self):
        while not self.closed.wait(self.heartbeat_seconds):
            with self.control_lock:
                if self.closed.is_set():
                    return
                try:
                    self._heartbeat()
                except (OSError, ProtocolError):
                    self.control.close()
                except Refused:
                    continue  # the training thread joins again with its next push

    def _heartbeat(self):
        if self.control.sock.fileno() < 0:
            self.control = self._connect()
        fields = {
            "step": self.step,
            "position": self.position,
            "steps_per_second": self.steps_per_second,
            "loss": self._sane_loss(),
        }
        reply = self.control.request("heartbeat", fields)
        self._take_share(reply)
        self.stop_ordered |= "stop" in reply.field("orders", list)

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
        atexit.unregister(self.close)
        if self.hook:
            self.hook.remove()
        with self.control_lock:
            if self.control:
                with contextlib.suppress(OSError, ProtocolError, Refused):
                    self.control.stall = 5.0
                    self.control.request("leave", {"reason": reason[:200]})
                self.control.close()
        for conn in [*self.data, *self.used]:
            conn.close()
        self.pool.close(seconds=5.0)
        with torch.no_grad(), uninterrupted():  # leave the local values as training made them
            for fragment in self.fragments:
                if fragment.flight and fragment.flight.reply:
                    fragment.move(fragment.anchor, fragment.flight.snapshot, self.alpha)
                    self._settle(fragment)
                elif fragment.flight:
                    fragment.undo_prediction(fragment.flight)
        if self.heart:
            self.heart.join(5.0)

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
        """Whether to stop: the server says so, or another worker has reached the run's length."""
        return self.stop_ordered or 0 < max_steps <= self.run_step

    @contextlib.contextmanager
    @torch.no_grad()
    def global_model(self):
        """Within the block the model's parameters are the global ones, as far as this worker has
        adopted them; afterwards its own again, to the bit. For evaluation."""
        local = [parameter.detach().clone() for parameter in self.named.values()]
        with self.anchor_lock:
            for fragment in self.fragments:
                fragment.move(fragment.anchor)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, values in zip(self.named.values(), local, strict=True):
                    parameter.copy_(values)

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

    def state_dict(self):
        """Sync progress as JSON-able values, never parameters. With the model's parameters of the
        same moment it lets another process go on with local work that had not been sent."""
        return {
            "worker_id": self.worker_id,
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


def _trainable(model):
    """{name: parameter} of what is trained, under the names that it has before it is compiled or
    wrapped for data parallelism."""
    named = {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): parameter for name, parameter in named.items()}
    return named


def _config_of(model):
    """config.json of a Hugging Face model, as {name: text}."""
    to_json = getattr(getattr(model, "config", None), "to_json_string", None)
    return {"config.json": to_json()} if to_json else {}


class DiLoCoCallback:
    """DiLoCoWorker behind the hooks that trainers call. Arguments as there; all are optional.

    Without a server every hook does nothing. Unknown `on_...` hooks do nothing either.
    """

    def __init__(self, server=None, sync_every=None, worker_id=None, **options):
        self.server = server or os.environ.get("DILOCO_SERVER")
        self.options = {"sync_every": sync_every, "worker_id": worker_id, **options}
        self.worker = None
        self.saved = {}
        self.warned = False

    def __getattr__(self, name):
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Join the run."""
        if not self.server:
            if not self.warned:
                log("no server given and DILOCO_SERVER is not set: training standalone")
            self.warned = True
            return
        self.worker = DiLoCoWorker(model, optimizer, self.server, state=self.saved, **self.options)
        self.worker.start()

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
        if self.worker is not None and logs is not None:
            if isinstance(logs.get("loss"), int | float):
                self.worker.loss = float(logs["loss"])
            logs.update(self.worker.metrics())

    def on_train_end(self, args, state, control, **kwargs):
        """Close the run, unless the trainer has put its best checkpoint in the model's place."""
        if self.worker is not None:
            try:
                if not getattr(args, "load_best_model_at_end", False):
                    self.worker.flush()
            finally:
                self.close()

    def close(self, reason="done"):
        """Leave the run; what has not been sent is not sent."""
        if self.worker is not None:
            self.worker.close(reason)

    def state_dict(self):
        """Sync progress, to be saved beside the model's parameters; see DiLoCoWorker."""
        return self.worker.state_dict() if self.worker else dict(self.saved)

    def load_state_dict(self, state):
        """Progress from `state_dict`, before training begins."""
        self.saved = dict(state)
