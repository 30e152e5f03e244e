"""A run under faults: processes are killed and frozen, connections cut, and every step is accounted for.

    python tests/chaos.py --seed 1 --minutes 2                   # full or streaming, as the seed says
    python tests/chaos.py --seed 1 --minutes 2 --mode streaming --keep /tmp/run
    python tests/chaos.py --seed 1 --minutes 2 --only cut,lose-reply
    python tests/trail.py /tmp/run                               # judge a kept folder once more

Notable:
- One server, three or four workers, and a TCP proxy between them. What happens when, and to whom, is
  drawn from the seed alone; the processes run as fast as they run.
- Every step subtracts exactly STEP from each number of the model, so the final model tells how many
  steps are in it, and the arithmetic is exact in float32.
- Near the end the faults cease; all must come back, finish when told to, and end by themselves.
- trail.py judges: each step counts exactly once, none is missing, all bits agree.
- Exit code 0 if all of it holds, else 1 with a list of what does not.
"""

import argparse
import collections
import contextlib
import ctypes
import glob
import heapq
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from trail import STEP, checksums_of, digest_of, flat, initial, tail, verdict

import protocol
from diloco_callback import DiLoCoWorker

ROOT = os.path.dirname(os.path.abspath(protocol.__file__))
WORKER_TIMEOUT = 3.0  # of the server
RECONNECT_SECONDS = 3.0  # of the workers, which then train on
LONGEST_GRACE = 4.0
LONGEST_STALL, LONGEST_OUTAGE, LONGEST_FREEZE, LONGEST_DOWN = 8.0, 7.0, 5.0, 5.0
START_SECONDS = 20.0  # importing torch on a machine that has much else to do
CALM_START, CALM_END = 2.0, 12.0  # seconds without faults; at most a quarter at the end
GAP_SECONDS = 0.7  # between two faults, on average
# A worker waits for the slowest fault that may hold up a round, while another one begins.
HANG_SECONDS = 2 * (WORKER_TIMEOUT + LONGEST_GRACE + RECONNECT_SECONDS) + sum(
    (LONGEST_STALL, LONGEST_FREEZE, LONGEST_DOWN, START_SECONDS)
)
MAX_GROWTH_MB, MAX_THREADS = 32, 100  # of the server, within one life, from 10 s after it listens
NOT_JOINED, NOT_FLUSHED = 3, 4  # exit codes of the worker role

FAULTS = {  # kind -> weight
    "cut": 3,  # close both sides of a connection
    "reset": 3,  # the same with an RST
    "stall": 3,  # pass nothing on for a while, then go on, or cut
    "cut-push": 3,  # in the middle of a push
    "lose-reply": 5,  # to a push or a pull: the server has it, or has folded it, unknown to its sender
    "half-reply": 2,
    "outage": 2.5,  # no new connections for a while; half the time all old ones are cut
    "kill-worker": 3,
    "freeze-worker": 2.5,
    "leave": 1,  # SIGTERM; the same id comes back later
    "kill-server": 1,
    "kill-saving": 1.5,  # while a checkpoint is being written
}


@dataclass(order=True)
class Fault:
    """One line of the schedule; `who`, `length`, `coin` are drawn from [0, 1)."""

    time: float
    kind: str
    who: float
    length: float
    coin: float


def schedule(seed, seconds):
    """(settings of the run, faults in their order), from the seed alone."""
    rng = random.Random(seed)
    draw = {
        "mode": rng.choice(["full", "streaming"]),
        "quorum": rng.choice([0, 0, 1, 2]),
        "grace": rng.choice(["auto", "0", "4"]),
        "outer": rng.choice(["whole", "fractional", "delayed"]),
        "own_pace": rng.random() < 0.3,
        "extra": rng.random() < 0.7,  # a fourth worker, which comes late
        "extra_at": rng.random(),
        "fragments": rng.choice([2, 3, 4]),
        "cycle": rng.choice([12, 20, 40]),
        "delay": rng.choice(["default", "default", "none", "one", "cycle"]),
        "workers": [
            {
                "pause": rng.choice([0.002, 0.005, 0.01, 0.02]),
                "sync_every": rng.choice([5, 10, 15, 25]),
                "save_every": rng.choice([7, 20, 60]),
            }
            for _ in range(4)
        ],
    }
    faults, now, end = [], CALM_START, seconds - min(CALM_END, seconds / 4)
    while (now := now + rng.expovariate(1 / GAP_SECONDS)) < end:
        kind = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
        faults.append(Fault(now, kind, rng.random(), rng.random(), rng.random()))
    return draw, faults


# --- The worker role -------------------------------------------------------------------------------


def build():
    """A model whose every step of SGD subtracts STEP from each of its numbers."""
    model = torch.nn.Module()
    for name, values in initial().items():
        setattr(model, name, torch.nn.Parameter(values))
        getattr(model, name).grad = torch.ones_like(values)
    return model


def work(args):
    """Train until told to stop; with checkpoints, and from one with `--resume`."""
    torch.set_num_threads(1)
    _end_with_parent()
    leaving = []
    signal.signal(signal.SIGTERM, lambda *_: leaving.append(True))
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=STEP)
    saved = torch.load(args.checkpoint) if args.resume else {}
    if saved:
        model.load_state_dict(saved["model"])
    worker = DiLoCoWorker(
        model,
        optimizer,
        args.server,
        args.sync_every,
        args.worker,
        num_fragments=args.num_fragments,
        fragment_sync_delay=args.delay,
        fragment_update="rebase",
        reconnect_timeout=RECONNECT_SECONDS,
        state=saved.get("worker"),
    )
    try:
        worker.start()
    except (ConnectionError, protocol.Refused) as error:
        print(f"could not join: {error}", flush=True)
        sys.exit(NOT_JOINED)
    note_resumed(worker, saved)
    progress = os.open(args.progress, os.O_WRONLY | os.O_CREAT, 0o644)
    while not leaving and not worker.run_is_over(0):
        time.sleep(args.pause)
        optimizer.step()
        os.pwrite(progress, struct.pack("<qq", os.getpid(), worker.local_step), 0)
        if worker.local_step % args.save_every == 0:
            save(args.checkpoint, worker, model=model)
    try:
        worker.flush()
    except ConnectionError as error:
        print(f"leaves without its last push: {error}", flush=True)
        worker.close("no server")
        sys.exit(NOT_FLUSHED)
    worker.close()
    print(json.dumps({**note_end(worker, model), "metrics": worker.metrics()}), flush=True)


def save(path, worker, **parts):
    """Write a checkpoint of a worker and of further parts by name, whole or not at all."""
    state = {name: part.state_dict() for name, part in {**parts, "worker": worker}.items()}
    state |= {"session": worker.link.session, "local_step": worker.local_step}
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)


def note_resumed(worker, saved):
    """Write into the trail which process a worker goes on from, if it has a checkpoint of one."""
    if saved:
        origin = {"from_session": saved["session"], "local_step": saved["local_step"]}
        facts = {"worker": worker.worker_id, "session": worker.link.session}
        protocol.audit("resumed", **facts, **origin, kept=worker.kept_local)


def note_end(worker, model):
    """Write into the trail how many steps a worker has made, and what it ends with; return that."""
    final = flat(model.parameters())
    end = {
        "steps": worker.local_step,
        "digest": digest_of(final),
        "checksums": checksums_of(final, worker.num_fragments),
    }
    protocol.audit("end", worker=worker.worker_id, session=worker.link.session, **end)
    return end


def ask(port, request, seconds):
    """What the server at a port of this machine replies, if it says something for so many seconds."""
    sock = socket.create_connection(("127.0.0.1", port), seconds)
    with contextlib.closing(protocol.Connection(sock, "server", stall=seconds)) as conn:
        conn.request("hello", {"protocol": protocol.PROTOCOL_VERSION})
        return conn.request(request).fields


def _end_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# --- The network -----------------------------------------------------------------------------------


def frames(buffer):
    """Take whole frames off a bytearray: (fields, bytes, where the payload begins) of each."""
    while len(buffer) >= 8:
        begin = 8 + struct.unpack("<Q", buffer[:8])[0]
        if len(buffer) < begin:
            return
        fields, specs = protocol.parse_header(bytes(buffer[8:begin]))
        end = begin + protocol.payload_bytes(specs)
        if len(buffer) < end:
            return
        yield fields, bytes(buffer[:end]), begin
        del buffer[:end]


class Link(threading.Thread):
    """One connection through the proxy. Frames are passed on whole, unless a fault cuts one."""

    def __init__(self, proxy, near, far):
        super().__init__(daemon=True)
        self.proxy, self.near, self.far = proxy, near, far
        self.worker = self.session = ""
        self.order = None  # "cut" or "reset"
        self.stalled_until = 0.0
        self.asked = ""  # type of the last request

    def run(self):
        buffers = {self.near: bytearray(), self.far: bytearray()}
        other = {self.near: self.far, self.far: self.near}
        with contextlib.suppress(OSError, ValueError, protocol.ProtocolError):
            while not self.order:
                if time.monotonic() < self.stalled_until:
                    time.sleep(0.02)
                    continue
                for sock in select.select([self.near, self.far], [], [], 0.05)[0]:
                    data = sock.recv(1 << 16)
                    buffers[sock] += data
                    for frame in frames(buffers[sock]):
                        if not self.pass_on(frame, other[sock]):
                            return self.close()
                    if not data:
                        other[sock].sendall(buffers[sock])  # what a killed process got out
                        return self.close()
        self.close()

    def pass_on(self, frame, target):
        """Send a frame, or where a trap is set for it, less of it; then False."""
        fields, raw, payload = frame
        kind, sent = fields.get("type"), len(raw)
        if target is self.far:
            self.asked = kind
            if kind == "hello":
                self.worker, self.session = fields.get("worker", ""), fields.get("session", "")
            if kind == "push":
                name = self.worker, self.session, fields["slice"], fields["seq"]
                with self.proxy.lock:
                    self.proxy.pushes[name] += 1
                if len(raw) > payload and self.proxy.spring("cut-push", self.worker):
                    sent = (payload + len(raw)) // 2
        elif self.asked in ("push", "pull") and kind in ("push", "entry", "slice"):
            if self.proxy.spring("lose-reply", self.worker):
                sent = 0
            elif self.proxy.spring("half-reply", self.worker):
                sent = len(raw) // 2
        target.sendall(raw[:sent])
        return sent == len(raw)

    def close(self):
        for sock in (self.near, self.far):
            with contextlib.suppress(OSError):
                if self.order == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        with self.proxy.lock:
            self.proxy.links.remove(self)


class Proxy(threading.Thread):
    """Stands between the workers and the server's port, whichever life the server is in."""

    def __init__(self, port, say):
        super().__init__(daemon=True)
        self.target, self.say = port, say
        self.lock = threading.RLock()
        self.links, self.traps = [], []
        self.pushes = collections.Counter()  # name of a push -> times it came by
        self.closed_until = 0.0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self):
        while True:
            near, far = self.listener.accept()[0], None
            with contextlib.suppress(OSError):
                if time.monotonic() >= self.closed_until:
                    far = socket.create_connection(("127.0.0.1", self.target), 5)
                    far.settimeout(None)
            if far is None:
                near.close()
                continue
            link = Link(self, near, far)
            with self.lock:
                self.links.append(link)
            link.start()

    def spring(self, kind, worker):
        """Whether a trap of this kind is set; it is used up."""
        with self.lock:
            if kind not in self.traps:
                return False
            self.traps.remove(kind)
        self.say(kind, worker)
        return True

    def choose(self, who):
        with self.lock:
            return self.links[int(who * len(self.links))] if self.links else None

    def cut_all(self):
        with self.lock:
            for link in self.links:
                link.order = "cut"

    def heal(self):
        with self.lock:
            self.traps.clear()
            self.closed_until = 0.0
            for link in self.links:
                link.stalled_until = 0.0


# --- The processes and their fate ------------------------------------------------------------------


@dataclass(eq=False)
class Actor:
    """The server or a worker, over all its lives."""

    name: str
    command: list
    process: subprocess.Popen = None
    lives: int = 0
    fate: str = ""  # what is about to end it on purpose: kill, leave, stop
    frozen: bool = False
    log: str = ""
    serves: float = 0.0  # when a server was first seen to listen in this life
    moved: float = 0.0  # when it last made a step
    steps: dict = field(default_factory=dict)  # pid -> steps made
    memory: list = field(default_factory=list)  # MB of a server in this life, from 10 s after that

    @property
    def alive(self):
        return self.process is not None and self.process.poll() is None


class Chaos:
    """One run, from its start to its verdict."""

    def __init__(self, seed, seconds, mode, folder):
        self.folder, self.seconds = folder, seconds
        self.draw, self.faults = schedule(seed, seconds)
        self.mode = mode or self.draw["mode"]
        self.count = self.draw["fragments"] if self.mode == "streaming" else 1
        self.began = time.monotonic()
        self.counts, self.violations = collections.Counter(), []
        self.todo, self.ticket, self.lock = [], itertools.count(), threading.RLock()
        self.quiet = self.stopped = False  # no more faults; the workers are told to finish
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.proxy = Proxy(self.port, self.say)
        self.model = os.path.join(folder, "model")
        self.server = Actor("server", self.server_command())
        self.workers = [Actor(f"w{i}", self.worker_command(i)) for i in range(4)]
        facts = {"seed": seed, "seconds": seconds, "mode": self.mode, "fragments": self.count}
        with open(os.path.join(folder, "run.json"), "w", encoding="utf-8") as file:
            json.dump({**facts, "draw": self.draw}, file)
        print(f"chaos: {facts}, {len(self.faults)} faults to come", flush=True)

    # fmt: off
    def server_command(self):
        command = [
            os.path.join(ROOT, "server.py"), "-m", self.model, "-n", "3", "--port", str(self.port),
            "--worker-timeout", f"{WORKER_TIMEOUT:g}", "--save-every", "2", "--until-done",
            "--upload-codec", "fp32", "--download-codec", "fp32", "--no-momentum-warmup",
            "--outer-lr", "1", "--outer-momentum", "0",
        ]
        draw = self.draw
        if quorum := draw["quorum"]:
            command += ["--quorum", str(quorum), "--grace", draw["grace"], "--outer", draw["outer"]]
        return command + ["--own-pace"] * draw["own_pace"]

    def worker_command(self, i):
        options, streaming = self.draw["workers"][i], self.mode == "streaming"
        cycle = self.draw["cycle"]
        command = [
            os.path.abspath(__file__), "--role", "worker", "--worker", f"w{i}",
            "--server", self.proxy.address, "--num-fragments", str(self.count),
            "--sync-every", str(cycle if streaming else options["sync_every"]),
            "--pause", str(options["pause"]), "--save-every", str(options["save_every"]),
            "--checkpoint", os.path.join(self.folder, f"w{i}.pt"),
            "--progress", os.path.join(self.folder, f"w{i}.steps"),
        ]
        delay = {"none": 0, "one": 1, "cycle": cycle}.get(self.draw["delay"])
        if streaming and delay is not None:
            command += ["--delay", str(delay)]
        return command
    # fmt: on

    # --- What happens when ---

    def say(self, kind, whom, more=""):
        with self.lock:
            self.counts[kind] += 1
            now = time.monotonic() - self.began
            print(f"{now:7.2f}  {kind:<14} {whom}{'  ' + more if more else ''}", flush=True)

    def later(self, seconds, action, *arguments):
        with self.lock:
            entry = (time.monotonic() + seconds, next(self.ticket), action, arguments)
            heapq.heappush(self.todo, entry)

    def start(self, actor, resume=False):
        if actor.alive:
            return
        self.read_progress(actor)
        actor.lives, actor.fate, actor.frozen = actor.lives + 1, "", False
        actor.moved, actor.serves, actor.memory = time.monotonic(), 0.0, []
        actor.log = os.path.join(self.folder, f"{actor.name}-{actor.lives:03}.log")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")}
        environment |= {
            "DILOCO_AUDIT": os.path.join(self.folder, "audit.jsonl"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        from_checkpoint = resume and os.path.exists(os.path.join(self.folder, f"{actor.name}.pt"))
        with open(actor.log, "wb") as log:
            actor.process = subprocess.Popen(
                [sys.executable, *actor.command, *["--resume"] * from_checkpoint],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=_end_with_parent if actor is self.server else None,
            )
        if actor.lives > 1 or actor is self.workers[3]:
            self.say("  started", actor.name, "from its checkpoint" if from_checkpoint else "")

    def kill(self, actor):
        actor.fate = "kill"
        actor.process.kill()
        actor.process.wait()
        actor.frozen = False

    def thaw(self, worker, pid):
        if worker.alive and worker.process.pid == pid:
            worker.process.send_signal(signal.SIGCONT)
            worker.frozen, worker.moved = False, time.monotonic()

    def strike(self, fault):
        """Carry out one line of the schedule, if there is somebody to be struck."""
        link = self.proxy.choose(fault.who)
        workers = [w for w in self.workers if w.alive and not w.fate and not w.frozen]
        worker = workers[int(fault.who * len(workers))] if workers else None
        if fault.kind in ("cut", "reset", "stall"):
            if link:
                self.strike_link(fault, link)
        elif fault.kind in ("cut-push", "lose-reply", "half-reply"):
            with self.proxy.lock:
                self.proxy.traps.append(fault.kind)
        elif fault.kind == "outage":
            seconds = 0.5 + fault.length * (LONGEST_OUTAGE - 0.5)
            self.proxy.closed_until = time.monotonic() + seconds
            if fault.coin < 0.5:
                self.proxy.cut_all()
            which = "all connections cut" if fault.coin < 0.5 else "no new connections"
            self.say("outage", "network", f"{which} for {seconds:.1f} s")
        elif fault.kind in ("kill-server", "kill-saving"):
            self.strike_server(fault)
        elif worker:
            self.strike_worker(fault, worker)

    def strike_link(self, fault, link):
        whom = link.worker or "a connection"
        if fault.kind == "stall":
            seconds = 0.5 + fault.length * (LONGEST_STALL - 0.5)
            link.stalled_until = time.monotonic() + seconds
            cut = fault.coin < 0.5
            if cut:
                self.later(seconds, setattr, link, "order", "cut")
            self.say("stall", whom, f"{seconds:.1f} s, {'then cut' if cut else 'then on'}")
        else:
            link.order = fault.kind
            self.say(fault.kind, whom)

    def strike_worker(self, fault, worker):
        if fault.kind == "kill-worker":
            self.kill(worker)
            self.say("kill-worker", worker.name, f"back in {fault.length * 4:.1f} s")
            self.later(fault.length * 4, self.start, worker, fault.coin < 0.6)
        elif fault.kind == "freeze-worker":
            seconds = 0.3 + fault.length * (LONGEST_FREEZE - 0.3)
            worker.frozen = True
            worker.process.send_signal(signal.SIGSTOP)
            self.later(seconds, self.thaw, worker, worker.process.pid)
            self.say("freeze-worker", worker.name, f"{seconds:.1f} s")
        elif fault.kind == "leave":
            worker.fate = "leave"
            worker.process.send_signal(signal.SIGTERM)
            self.say("leave", worker.name)

    def strike_server(self, fault):
        if not self.server.alive:
            return
        # Before the first checkpoint there is nothing to go on from.
        if not glob.glob(os.path.join(glob.escape(self.model), "checkpoint-*")):
            return
        if fault.kind == "kill-server":
            self.kill_server(fault)
        else:
            arguments = fault, self.server.lives
            threading.Thread(target=self.kill_saving, args=arguments, daemon=True).start()

    def kill_server(self, fault):
        self.kill(self.server)
        self.say(fault.kind, "server", f"back in {fault.length * LONGEST_DOWN:.1f} s")
        self.later(fault.length * LONGEST_DOWN, self.start, self.server)

    def kill_saving(self, fault, life):
        """Wait for a checkpoint to be under way, and for some milliseconds more."""
        pattern = os.path.join(glob.escape(self.model), ".tmp-checkpoint*")
        deadline = time.monotonic() + 8.0
        while not glob.glob(pattern):
            if time.monotonic() > deadline or self.quiet or self.server.lives != life:
                return
            time.sleep(0.0005)
        time.sleep(fault.coin**2 * 0.02)
        with self.lock:
            if self.server.alive and self.server.lives == life and not self.quiet:
                self.kill_server(fault)

    # --- Watching ---

    def watch(self):
        """Look after all processes: what they use, whether they move, and why they ended."""
        if self.server.alive:
            self.sample_memory()
        elif self.server.process and not self.server.fate:
            code = self.server.process.returncode
            if code or self.stopped:
                self.violations.append(f"the server ended with code {code}")
            else:
                self.say("  server ended", "server", "by itself, as it has no members left")
            self.later(1.0, self.start, self.server)
            self.server.fate = "ended"
        for worker in self.workers:
            self.read_progress(worker)
            if worker.alive and not worker.frozen:
                if time.monotonic() - worker.moved > HANG_SECONDS:
                    self.violations.append(f"{worker.name} made no step for {HANG_SECONDS:.0f} s")
                    self.explain(worker, self.server)
                    worker.moved = time.monotonic()
            elif worker.process and not worker.alive and worker.fate not in ("kill", "ended"):
                self.worker_ended(worker)

    def worker_ended(self, worker):
        code, leaving = worker.process.returncode, worker.fate == "leave"
        worker.fate = "ended"
        if code == NOT_JOINED:
            self.counts["  not joined"] += 1
        elif leaving and code == -signal.SIGTERM:
            self.say("  left early", worker.name, "before it could catch the signal")
        elif leaving and code == NOT_FLUSHED:
            self.say("  left unheard", worker.name, "its last push found no server")
        elif code or not leaving:
            self.violations.append(f"{worker.name} ended with code {code}:\n{tail(worker.log, 6)}")
        # Going on from the checkpoint of one that has left cleanly must not count its steps again.
        self.later(1.0 if code else 3.0, self.start, worker, bool(code) or worker.lives % 2 == 0)

    def read_progress(self, worker):
        with contextlib.suppress(OSError, struct.error):
            with open(os.path.join(self.folder, f"{worker.name}.steps"), "rb") as file:
                pid, step = struct.unpack("<qq", file.read())
            if worker.steps.get(pid) != step:
                worker.steps[pid], worker.moved = step, time.monotonic()

    def sample_memory(self):
        with contextlib.suppress(OSError, TypeError):
            with open(f"/proc/{self.server.process.pid}/status", encoding="ascii") as file:
                text = file.read()
            memory, threads = (
                int(re.search(rf"{name}:\s*(\d+)", text)[1]) for name in ("VmRSS", "Threads")
            )
            # Until it listens it imports, which grows it and takes long on a busy machine.
            if not self.server.serves and "listening on port" in tail(self.server.log, 1000):
                self.server.serves = time.monotonic()
            if self.server.serves and time.monotonic() - self.server.serves > 10:
                self.server.memory.append(memory / 1024)
                growth = round(max(self.server.memory) - self.server.memory[0], 1)
                self.counts["rss growth MB"] = max(self.counts["rss growth MB"], growth)
            self.counts["server threads"] = max(self.counts["server threads"], threads)

    def explain(self, *actors):
        """Where processes stand that should have moved on."""
        spy = os.path.join(os.path.dirname(sys.executable), "py-spy")
        for actor in actors:
            print(f"--- {actor.name}, life {actor.lives}:\n{tail(actor.log)}", flush=True)
            if actor.alive and os.path.exists(spy):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    subprocess.run([spy, "dump", "--pid", str(actor.process.pid)], timeout=20)

    def tick(self):
        """Do what is due; once in a while look around."""
        with self.lock:
            while self.todo and self.todo[0][0] <= time.monotonic():
                _, _, action, arguments = heapq.heappop(self.todo)
                action(*arguments)
            if time.monotonic() >= self.next_look:
                self.next_look = time.monotonic() + 0.5
                self.watch()
        time.sleep(0.01)

    def until(self, condition, what, seconds):
        """Tick until a condition holds; if it never does, that is a violation."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.violations.append(f"HANG: not within {seconds:.0f} s: {what}")
                self.explain(self.server, *self.workers)
                return False
            self.tick()
        return True

    def ask(self, request):
        """What the server replies; unlike a worker, this does not wait for one that stands still."""
        return ask(self.port, request, 3.0)

    def members(self):
        try:
            return {worker["id"] for worker in self.ask("status")["workers"]}
        except (OSError, protocol.ProtocolError, protocol.Refused):
            return set()

    def all_there(self):
        time.sleep(0.1)
        there = {worker.name for worker in self.workers if worker.process}
        healthy = all(worker.alive and not worker.fate for worker in self.workers if worker.process)
        return healthy and self.server.alive and self.members() >= there

    # --- The run ---

    def run(self):
        self.next_look = 0.0
        self.start(self.server)
        for worker in self.workers[:3]:
            self.start(worker)
        try:
            if self.until(self.all_there, "all workers joined", START_SECONDS + 20):
                self.began = time.monotonic()
                self.storm()
                self.calm()
        finally:
            for actor in (*self.workers, self.server):
                if actor.alive:
                    self.kill(actor)

    def storm(self):
        extra_at = self.draw["extra_at"] * self.seconds / 2
        if self.draw["extra"]:
            self.later(extra_at, self.start, self.workers[3])
        for fault in self.faults:
            while time.monotonic() < self.began + fault.time:
                self.tick()
            with self.lock:
                self.strike(fault)

    def calm(self):
        """No more faults: all come back, go on for a while, and finish together."""
        self.proxy.heal()
        with self.lock:
            self.quiet = True
            todo, self.todo = self.todo, []
            for _, _, action, arguments in sorted(todo):
                action(*arguments)
        limit = START_SECONDS + RECONNECT_SECONDS + 3 * WORKER_TIMEOUT + LONGEST_GRACE + 20
        if not self.until(self.all_there, "all are members again after the faults", limit):
            return
        end = max(self.began + self.seconds, time.monotonic() + 2.0)
        while time.monotonic() < end:
            self.tick()
        self.stopped = True
        self.ask("stop")
        self.finish(RECONNECT_SECONDS + 2 * WORKER_TIMEOUT + LONGEST_GRACE + 20)

    def finish(self, limit):
        actors = [actor for actor in (*self.workers, self.server) if actor.process]
        deadline = time.monotonic() + limit
        while any(actor.alive for actor in actors) and time.monotonic() < deadline:
            time.sleep(0.05)
        for actor in actors:
            self.read_progress(actor)
            code = actor.process.poll()
            if code is None:
                self.violations.append(f"HANG: {actor.name} has not ended {limit:.0f} s after stop")
                self.explain(actor)
            elif code:
                self.violations.append(f"{actor.name} ended with {code}:\n{tail(actor.log)}")

    def judge(self):
        """All checks on what is left; prints the summary. True if all is well."""
        with self.proxy.lock:
            sent = self.proxy.pushes.values()
            self.counts["pushes sent again"] = sum(sent) - len(sent)
        self.counts["steps made"] = sum(sum(w.steps.values()) for w in self.workers)
        if self.counts["rss growth MB"] > MAX_GROWTH_MB:
            self.violations.append(f"the server grew by {self.counts['rss growth MB']} MB")
        if self.counts["server threads"] > MAX_THREADS:
            self.violations.append(f"the server had {self.counts['server threads']} threads")
        return verdict(self.folder, self.counts, self.violations)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seed", type=int, default=1)
    add("--minutes", type=float, default=1.0)
    add("--mode", choices=["full", "streaming"], help="(as the seed says)")
    add("--keep", metavar="DIR", help="a new folder for all files of the run, which stays")
    add("--only", metavar="KINDS", help="of all faults these only, as cut,lose-reply; or none")
    hidden = ("role", "worker", "server", "checkpoint", "progress")
    for name in hidden:
        add(f"--{name}", help=argparse.SUPPRESS)
    for name in ("sync-every", "num-fragments", "delay", "save-every"):
        add(f"--{name}", type=int, help=argparse.SUPPRESS)
    add("--pause", type=float, help=argparse.SUPPRESS)
    add("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "worker":
        return work(args)
    folder = args.keep or tempfile.mkdtemp(prefix="chaos-")
    os.makedirs(folder, exist_ok=not args.keep)
    chaos = Chaos(args.seed, 60 * args.minutes, args.mode, folder)
    if args.only:
        chaos.faults = [fault for fault in chaos.faults if fault.kind in args.only.split(",")]
    well = False
    try:
        chaos.run()
        well = chaos.judge()
    finally:
        if not args.keep and well:
            shutil.rmtree(folder)
        elif not well:
            print(f"all files of the run are in {folder}", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
