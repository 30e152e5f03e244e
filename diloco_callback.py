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
- Nothing local is overwritten before its difference has been accepted. A push whose reply is lost
  is sent again under the same name, so that it counts exactly once.
- Without a server (no argument, no DILOCO_SERVER) the callback does nothing.

Environment, where no argument is given: DILOCO_SERVER, DILOCO_SYNC_EVERY, DILOCO_WORKER_ID.
"""

import atexit
import contextlib
import itertools
import os
import secrets
import socket
import sys
import threading
import time

import torch

try:
    from . import protocol
    from .protocol import CHUNK, CODECS, Buffer, Checksum, ProtocolError, Refused
except ImportError:
    import protocol
    from protocol import CHUNK, CODECS, Buffer, Checksum, ProtocolError, Refused

SYNC_EVERY = 500  # steps of a round, where nobody says otherwise
RECONNECT_SECONDS = 600.0
HEARTBEAT_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 10.0  # between two attempts to connect
MAX_REFUSALS = 3  # pushes in a row that are not finite, after which training is broken


def log(text):
    print(f"diloco: {text}", file=sys.stderr, flush=True)


def retry(action, seconds, what):
    """Call `action` until it works, with growing pauses, for at most `seconds`. Raises
    ConnectionError then; Refused at once, as a retry cannot mend that."""
    began, pause = time.monotonic(), 0.2
    while True:
        try:
            return action()
        except (OSError, ProtocolError) as error:
            waited = time.monotonic() - began
            if waited > seconds:
                raise ConnectionError(
                    f"{what}: {error}, for {waited:.0f} s. Is the server running there, and does a "
                    "firewall let you through?"
                ) from error
            if pause == 0.2:
                log(f"{what}: {error}; trying again for up to {seconds:.0f} s")
        time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        pause *= 1.5


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


class DiLoCoWorker:
    """One worker of a run: synchronizes `model` through `optimizer`'s step hook.

    model: torch.nn.Module whose trainable parameters (float) are synchronized.
    optimizer: torch.optim.Optimizer; each of its steps counts as one local step.
    server: "host:port". sync_every: steps a round. worker_id: names this worker, unique in the run.
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
        if self.sync_every < 1:
            raise ValueError(f"sync_every must be 1 or more, not {self.sync_every}")
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
        self.named = {
            name.replace("_orig_mod.", "").removeprefix("module."): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        if not self.named:
            raise ValueError("the model has no parameter that requires grad: nothing to train")

        self.control = self.data = None  # Connections
        self.control_lock = threading.Lock()
        self.closed = threading.Event()
        self.hook = None
        self.flat = self.anchor = self.residual = None
        self.version = None  # [origin, number] of the anchor
        self.push_buffer = self.update_buffer = None

        self.index, self.rank, self.world, self.shares = 0, 0, 1, 1
        self.step = self.run_step = 0  # mine, and that of the worker that was furthest
        self.local_step = 0  # optimizer steps of this process
        self.position = 0  # steps since the cycle began
        self.steps = 0  # steps that have not been pushed
        self.seq = 0  # of the last push
        self.seq_folded = 0  # of the last push that the global model held when this one joined
        self.tokens = self.tokens_pushed = 0
        self.loss = None
        self.kept_local = self.flushed = self.stop_ordered = False
        self.sync_count = self.dropped_steps = self.mismatches = self.refusals = 0
        self.last_sync_time = self.total_sync_time = 0.0
        self.last_send = self.last_recv = 0
        self.started = time.monotonic()

    # --- Joining ---

    def start(self):
        """Join the run (waits until it starts), take its parameters and hook into the optimizer."""
        retry(self._join, self.reconnect_timeout, f"server {self.server}")
        self.started = time.monotonic()
        self.hook = self.optimizer.register_step_post_hook(lambda *_: self._after_step())
        threading.Thread(target=self._heartbeat_loop, daemon=True).start()
        atexit.register(self.close, "the process ended")
        if self.position >= self.sync_every:
            self._sync()  # the round is already open: an empty push, to start with the others
        return self

    __enter__ = start

    def __exit__(self, kind, error, _):
        if kind is None:
            self.flush()
        self.close(f"{kind.__name__}: {error}" if kind else "done")

    def _session(self):
        return {"worker": self.worker_id, "session": self.session}

    def _join(self):
        """Join or join again, and lay what is not yet in the global model on top of it."""
        manifest = protocol.specs_of(self.named.items())
        with self.control_lock:
            if self.control:
                self.control.close()
            conn = self.control = protocol.connect(self.server, self._session())[0]
            fields = {
                "manifest": protocol.manifest_to_json(manifest),
                "sync_every": self.sync_every,
                "num_fragments": 1,
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
        with torch.no_grad():
            if self.anchor is None:
                self._enter(reply, params)
            else:
                self._reenter(reply, params)

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
        if self.anchor is None:
            log(f"{self.worker_id} waits for {fields.get('awaited')}")

    def _enter(self, reply, params):
        """The first join of this process: set up, and take the parameters or keep one's own."""
        self.flat = protocol.FlatModel([self.named[spec.name] for spec in reply.specs])
        self.up = CODECS[reply.field("upload_codec", str)]
        self.down = CODECS[reply.field("download_codec", str)]
        self.push_buffer = Buffer(self.up.layout(params.numel()))
        self.update_buffer = Buffer([*self.down.layout(params.numel()), Checksum.SPEC])
        self.residual = torch.zeros_like(params) if self.up.lossy else None
        self.anchor = params
        self._take_place(reply)
        due = reply.fields.get("due")
        self.step = self.run_step
        self.position = self.sync_every - due if type(due) is int else 0
        self.kept_local = self.saved.get("version") == self.version
        if self.kept_local:
            self.step, self.steps = self.saved["step"], self.saved["steps"]
            self.position = self.saved["position"]
        else:
            self.flat.write(0, params)
            if self.saved:
                log("the server has moved on since the checkpoint: took the global model")
        log(
            f"{self.worker_id} is worker {self.index} of {self.world}, at step {self.step}, "
            f"version {self.version[1]}"
        )

    def _take_place(self, reply):
        self.version = reply.field("versions", list)[0]
        self.seq_folded = reply.field("seqs", list)[0]
        self.seq = max(self.seq, self.seq_folded)
        self.index = reply.field("index", int)
        self.shares = reply.field("shares", int, low=1)
        self.run_step = reply.field("step", int)
        self._take_share(reply)

    def _reenter(self, reply, params):
        """A later join: the server was restarted, or had given this worker up. Local work stays,
        on top of the new global parameters, unless they hold it already."""
        folded = reply.field("seqs", list)[0] >= self.seq
        for start, stop in protocol.chunks(params.numel()):
            new, local = params[start:stop], torch.empty(stop - start)
            if folded:
                self._commit_residual(start, stop)
                self.flat.write(start, new)
            elif reply.fields.get("versions") != [self.version]:
                self.flat.read(start, local)
                local.sub_(self.flat.rounded(start, self.anchor[start:stop]))
                self.flat.write(start, local.add_(new))
        if folded:
            self._count_pushed()
        self.anchor.copy_(params)
        self._take_place(reply)
        log(f"{self.worker_id} has joined again, at version {self.version[1]}")

    def _take_share(self, reply):
        self.rank = reply.field("rank", int, self.rank)
        self.world = reply.field("world", int, self.world, low=1)

    # --- Rounds ---

    def _after_step(self):
        """The optimizer's hook: count the step and synchronize when a round is due."""
        self.step += 1
        self.local_step += 1
        self.position += 1
        self.steps += 1
        if self.position >= self.sync_every:
            self._sync()

    def flush(self):
        """Send the steps since the last sync as the closing round, and take the final global
        model. Once; later calls do nothing."""
        if not self.flushed:
            self.flushed = True
            self._sync(closing=True)

    @torch.no_grad()
    def _sync(self, closing=False):
        """One round: push the difference, wait for the others, adopt the update."""
        began = time.monotonic()
        reply = None
        while reply is None:
            self.seq += 1
            if self.steps:
                self._encode()
            fields = {
                "fragment": 0,
                "seq": self.seq,
                "base": self.version,
                "step": self.step,
                "steps": self.steps,
                "tokens": self.tokens - self.tokens_pushed,
                "loss": self.loss,
                "closing": closing,
            }
            reply = self._push(fields, [self.push_buffer.raw] if self.steps else [])
            if reply is None and self.seq_folded >= self.seq:
                break  # joining again told that it had been folded, and brought the model
        if reply:
            self._adopt(reply)
        self.position = 0
        self.sync_count += 1
        self.last_sync_time = time.monotonic() - began
        self.total_sync_time += self.last_sync_time

    def _encode(self):
        """Encode anchor minus local, plus what rounding lost before, chunk by chunk."""
        scratch = torch.empty(CHUNK)
        for start, stop in protocol.chunks(self.flat.numel):
            delta = self._difference(start, scratch[: stop - start])
            self.up.encode(delta, self.push_buffer.tensors, start)

    def _difference(self, start, out):
        self.flat.read(start, out)
        stop = start + out.numel()
        torch.sub(self.flat.rounded(start, self.anchor[start:stop]), out, out=out)
        return out if self.residual is None else out.add_(self.residual[start:stop])

    def _commit_residual(self, start, stop):
        """Keep what rounding took from a push that was accepted. The difference is worked out once
        more, which costs less than keeping it: neither side of it has changed since the push."""
        if self.residual is not None and self.steps:
            delta = self._difference(start, torch.empty(stop - start))
            sent = torch.empty(stop - start)
            self.up.decode(self.push_buffer.tensors, start, sent)
            torch.sub(delta, sent, out=self.residual[start:stop])

    def _push(self, fields, payload):
        """Exchange a push for its reply, whose payload is then in `update_buffer` or in
        `reply.slice`. After an outage the same push is sent again. None if the worker had to join
        again instead: then the parameters have changed, and what is left is to be pushed anew."""

        def exchange():
            if self.data is None:
                self.data, _ = protocol.connect(self.server, self._session())
            conn, before = self.data, (self.data.bytes_out, self.data.bytes_in)
            try:
                specs = self.push_buffer.specs if payload else []
                reply = conn.request("push", fields, specs, payload)
                self._read_update(conn, reply)
            except BaseException:
                self.data.close()
                self.data = None
                raise
            self.last_send, self.last_recv = conn.bytes_out - before[0], conn.bytes_in - before[1]
            return reply

        def exchange_or_join():
            try:
                return exchange()
            except Refused as refusal:
                if refusal.code != "rejoin":
                    raise
                self._join()
                return None

        return retry(exchange_or_join, self.reconnect_timeout, f"server {self.server}")

    def _read_update(self, conn, reply):
        whole = protocol.TensorSpec("slice", torch.float32, (self.flat.numel,))
        reply.slice = None
        if reply.specs == [Checksum.SPEC]:
            conn.read(self.update_buffer.tensors["checksum"])
        elif reply.specs == [whole, Checksum.SPEC]:
            reply.slice = torch.empty(self.flat.numel)
            conn.read(reply.slice)
            conn.read(self.update_buffer.tensors["checksum"])
        else:
            reply.expect(self.update_buffer.specs)
            conn.read(self.update_buffer.raw)

    def _adopt(self, reply):
        """Move the anchor to the new version and the local parameters with it."""
        refused = reply.field("refused", str, "")
        accepted = self.steps and not refused
        changed = reply.specs == self.update_buffer.specs
        checksum, other = Checksum(), torch.empty(CHUNK)
        for start, stop in protocol.chunks(self.flat.numel):
            anchor, part = self.anchor[start:stop], other[: stop - start]
            if accepted:
                self._commit_residual(start, stop)
            if changed:
                self.down.decode(self.update_buffer.tensors, start, part)
                anchor.add_(part)
            elif reply.slice is not None:
                anchor.copy_(reply.slice[start:stop])
            checksum.add(anchor)
            self.flat.write(start, anchor)
        self.version = reply.field("version", list)
        if not torch.equal(checksum.digest(), self.update_buffer.tensors["checksum"]):
            self._fetch()
        self.run_step = max(self.run_step, reply.field("step", int))
        self._take_share(reply)
        if refused:
            self._drop(refused)
        else:
            self.refusals = 0
        self._count_pushed()

    def _count_pushed(self):
        self.steps, self.tokens_pushed = 0, self.tokens

    def _fetch(self):
        """The anchor is not what the server holds: take the slice in full, and count it."""
        self.mismatches += 1
        log(f"WARNING: checksum mismatch at version {self.version}; fetching the parameters")
        reply = self.data.request("fetch", {"fragment": 0})
        self._read_update(self.data, reply)
        self.anchor.copy_(reply.slice)
        self.flat.write(0, self.anchor)
        self.version = reply.field("version", list)

    def _drop(self, why):
        """The push was refused: the global model has replaced the local one."""
        self.dropped_steps += self.steps
        self.refusals += 1
        self.optimizer.state.clear()
        log(f"WARNING: {why}: dropped {self.steps} steps, took the global model, and cleared the "
            "optimizer's state")  # fmt: skip
        if self.refusals >= MAX_REFUSALS:
            raise FloatingPointError(
                f"{why}, {self.refusals} times running: training diverges on {self.worker_id}; "
                "lower the learning rate, clip gradients, or check its data and hardware"
            )

    # --- Heartbeats, leaving ---

    def _heartbeat_loop(self):
        while not self.closed.wait(HEARTBEAT_SECONDS):
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
            self.control, _ = protocol.connect(self.server, self._session())
        fields = {
            "step": self.step,
            "position": self.position,
            "steps_per_second": self.steps_per_second,
            "loss": self.loss,
        }
        reply = self.control.request("heartbeat", fields)
        self._take_share(reply)
        self.stop_ordered |= "stop" in reply.field("orders", list)

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
        if self.data:
            self.data.close()

    # --- What others want to know ---

    def run_is_over(self, max_steps):
        """Whether to stop: the server says so, or another worker has reached the run's length."""
        return self.stop_ordered or 0 < max_steps <= self.run_step

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
            "diloco/dropped_steps": self.dropped_steps,
            "diloco/mismatches": self.mismatches,
        }

    def state_dict(self):
        """Sync progress as JSON-able values, never parameters. With the model's parameters of the
        same moment it lets another process go on with local work that had not been sent."""
        return {
            "worker_id": self.worker_id,
            "version": self.version,
            "seq": self.seq,
            "step": self.step,
            "steps": self.steps,
            "position": self.position,
        }


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
            if not getattr(args, "load_best_model_at_end", False):
                self.worker.flush()
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
