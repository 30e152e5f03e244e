"""What do faults cost? Workers on "spot machines" that come and go, and how much of their time counts.

    python tests/goodput.py                                  # some 20 minutes: all modes
    python tests/goodput.py --minutes 2 --only full,lockstep
    python tests/goodput.py --only elastic --options "--quorum 1 --grace 0" --delay 20
    python tests/goodput.py --seed 2 --fresh --keep /tmp/runs

One server and eight workers, real processes. Each worker is gone a third of the time: it is ended with
kill -9 and started again later, under the same id and from its own checkpoint (`--fresh`: without), with
a minute at least between two of its faults. Who is gone when comes from the seed alone, the same in
each mode:

- elastic: this program, with the options at the top of this file (or `--options`)
- full: this program as it is by default, where each round waits for all
- lockstep: data-parallel training that needs all machines; when one is lost all stop, and go on from
  the last checkpoint when all are up again. Computed from the same faults and the measured times.
- regroup: the same, but those that are up go on without the others: they start anew from the last
  checkpoint whenever somebody is lost or comes back. Computed too.

Words:
- A step takes PAUSE seconds, most of it asleep, so that eight workers fit on two cores. Time that a
  worker spends in the optimizer's step, where it synchronizes, comes on top and is never made up for.
- A worker is *up* from a process's first step until it is killed.
- The *unhindered rate* is one over the median time from one step to the next.
- A *useful step* is folded into the global model, as tests/trail.py counts it from the audit trail.
- Goodput: useful steps over the steps that up machines make at the unhindered rate.
- The loss is that of the final global model on held-out text, and beside it how it compares with that
  of a run without faults: of as many useful steps, in full sync, by as many workers as were up on
  average (more of them would each make fewer steps, and end with a worse model).

Below each mode stands where the other steps went: those that a worker did not make because it waited
(put down to a fault or a join at that time, by the clock alone), and those that were made and lost, most
of them since the last push of a process that was killed.

Exit code 0 if each step that was folded counts exactly once, no bits differ, and nobody ended by
itself; goodput is reported, not judged.
"""

import argparse
import bisect
import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, fields, replace

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import chaos
from trail import Trail, check_logs, tail

import protocol
from diloco_callback import DiLoCoWorker


@dataclass(frozen=True)
class Mode:
    """The server's options, and the workers' schedule."""

    options: str = ""
    sync_every: int = 20
    delay: int = 0  # fragment_sync_delay
    fragments: int = 1
    update: str = "predict"  # fragment_update


MODES = {
    "elastic": Mode("--quorum 4 --grace auto --own-pace", delay=10),
    "full": Mode(),
}
COMPUTED = ("lockstep", "regroup")
PAUSE = 0.1  # seconds that a step takes
SAVE_EVERY = 10  # steps between two checkpoints of a worker, and of lockstep training
WORKER_TIMEOUT = 3.0  # of the server
AWAY = 1 / 3  # of the time that a worker is gone
LEAST_GAP = 60.0  # seconds between two faults of one worker
MORE_GAP = 30.0  # further seconds, on average
START_SECONDS = 90.0  # importing torch eight times on a machine that has much else to do
END_SECONDS = 60.0  # for the last pushes and the final model
LITTLE = "a little in each step, and by the machine's other work"
SHORT = 3  # steps of a push of which there is a word, as it counts like any other
NEAR = 1.5  # seconds around a join in which a wait is put down to it
RECORD = struct.Struct(
    "<dd"
)  # of each step: its time, and seconds in the optimizer's step before it
ROOT = os.path.dirname(os.path.abspath(protocol.__file__))
TEXT = os.path.join(ROOT, "..", "shared", "data", "tinyshakespeare.txt")
CONTEXT, WIDTH, BATCH = 8, 128, 16


# --- Faults ------------------------------------------------------------------------------------------


def faults(seed, workers, seconds):
    """By worker, [(seconds when it goes, seconds when it is back)]. The first time that it goes may lie
    before 0, so that a third of them are gone at any time, also at the beginning."""
    rng = random.Random(seed)
    found = []
    for _ in range(workers):
        outages, begin = [], None
        while begin is None or begin < seconds:
            gap = LEAST_GAP + rng.expovariate(1 / MORE_GAP)
            begin = -rng.random() * gap if begin is None else begin  # somewhere within a first gap
            away = gap * rng.uniform(AWAY - 0.1, AWAY + 0.1)
            outages.append((begin, begin + away))
            begin += gap
        found.append([(a, b) for a, b in outages if b > 0])
    return found


def uptimes(outages, seconds, start=0.0):
    """[(from, to)] when a machine with these outages is up within a run: after one it takes `start`
    seconds until the first step."""
    found, begin = [], 0.0
    for gone, back in [*outages, (seconds, seconds)]:
        if begin < min(gone, seconds):
            found.append((begin, min(gone, seconds)))
        begin = max(0.0, back) + start
    return found


def overlaps(spans, a, b):
    """Seconds of [(from, to)] within a and b."""
    return sum(max(0.0, min(b, to) - max(a, since)) for since, to in spans)


def lockstep(outages, seconds, rate, start, regroup):
    """(up seconds, useful steps) of data-parallel training under these faults: its steps need all
    machines, or with `regroup` those that are up after each change. A restart takes `start` seconds,
    and goes back to the last checkpoint. A step of n machines counts n times."""
    ups = [uptimes(spans, seconds) for spans in outages]
    changes = sorted({0.0, seconds, *(t for spans in ups for span in spans for t in span)})
    useful = 0
    for at, until in itertools.pairwise(changes):
        there = sum(overlaps(spans, at, until) > 0.5 * (until - at) for spans in ups)
        if there == len(outages) or regroup:
            # Those that stood still start anew together with a machine that is back.
            made = int(max(0.0, until - at - (start if at else 0.0)) * rate)
            useful += there * (made if until == seconds else made - made % SAVE_EVERY)
    ups = [uptimes(spans, seconds, start) for spans in outages]
    return sum(b - a for spans in ups for a, b in spans), useful


# --- Training ----------------------------------------------------------------------------------------


def corpus():
    """(text to train on, text to be judged by, size of the alphabet): of this repository if there is
    no better one."""
    path = TEXT if os.path.isfile(TEXT) else os.path.join(ROOT, "diloco_callback.py")
    with open(path, "rb") as file:
        raw = file.read()
    alphabet = sorted(set(raw))
    table = torch.zeros(256, dtype=torch.long)
    table[alphabet] = torch.arange(len(alphabet))
    text = table[torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()]
    held_out = len(text) // 10
    return text[:-held_out], text[-held_out:], len(alphabet)


def build(size):
    """A small model that tells the next of some letters: the same for all."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(size, 24),
        torch.nn.Flatten(),
        torch.nn.Linear(24 * CONTEXT, WIDTH),
        torch.nn.GELU(),
        torch.nn.Linear(WIDTH, WIDTH),
        torch.nn.GELU(),
        torch.nn.Linear(WIDTH, size),
    )


def loss_of(model, text, places):
    """The mean loss for what stands behind the CONTEXT letters from each of some places on."""
    letters = text[places[:, None] + torch.arange(CONTEXT + 1)]
    return torch.nn.functional.cross_entropy(model(letters[:, :-1]), letters[:, -1])


def judge(path):
    """The loss of a final model on the held-out text."""
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    _, text, size = corpus()
    model = build(size)
    model.load_state_dict(load_file(path))
    with torch.no_grad():
        return loss_of(model, text, torch.arange(0, len(text) - CONTEXT - 1)).item()


def join(args, model, optimizer):
    """(DiLoCoWorker that has joined, what its checkpoint says): from that, if there is one."""
    saved = torch.load(args.checkpoint) if os.path.exists(args.checkpoint) else {}
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    worker = DiLoCoWorker(
        model,
        optimizer,
        args.server,
        args.sync_every,
        args.worker,
        num_fragments=args.fragments,
        fragment_sync_delay=args.delay,
        fragment_update=args.update,
        state=saved.get("worker"),
    )
    worker.start()
    chaos.note_resumed(worker, saved)
    return worker


def work(args):
    """The worker role: train until told to stop, or for `--steps` steps."""
    torch.set_num_threads(1)
    text, _, size = corpus()
    model = build(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    random_places = torch.Generator().manual_seed(args.data_seed)
    worker = join(args, model, optimizer)
    records = os.open(args.records, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    due, held = time.monotonic(), 0.0
    while not worker.run_is_over(args.steps):
        places = torch.randint(len(text) - CONTEXT - 1, [BATCH], generator=random_places)
        loss = loss_of(model, text, places)
        optimizer.zero_grad()
        loss.backward()
        worker.loss = loss.item()
        due += args.pause
        time.sleep(max(0.0, due - time.monotonic()))
        began = time.monotonic()
        os.write(records, RECORD.pack(time.time(), held))
        optimizer.step()
        held = time.monotonic() - began  # it also pushes, and waits for others
        due += held
        if args.save_every and worker.local_step % args.save_every == 0:
            chaos.save(args.checkpoint, worker, model=model, optimizer=optimizer)
    worker.flush()
    worker.close()
    chaos.note_end(worker, model)


# --- A run -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Life:
    """One process of a worker."""

    worker: str
    process: subprocess.Popen
    records: str  # path
    log: str
    started: float = field(default_factory=time.time)
    killed: float = 0.0  # when, or 0

    @property
    def steps(self):
        """[(when, seconds in the optimizer's step before)] of its steps."""
        with contextlib.suppress(OSError), open(self.records, "rb") as file:
            raw = file.read()
            return [*RECORD.iter_unpack(raw[: len(raw) // RECORD.size * RECORD.size])]
        return []


class Fleet:
    """A server and its workers in a folder, from start to end."""

    def __init__(self, folder, mode, args, outages, steps=0):
        self.folder, self.mode, self.args = folder, mode, args
        self.outages, self.steps = outages, steps
        self.lives, self.current, self.violations = [], {}, []
        self.kills = 0
        os.makedirs(folder)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.model = os.path.join(folder, "model")
        self.server = None

    def launch(self, name, command):
        """(process, path of its log)."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")}
        environment |= {"DILOCO_AUDIT": os.path.join(self.folder, "audit.jsonl")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        path = os.path.join(self.folder, f"{name}.log")
        with open(path, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=chaos._end_with_parent,
            )
        return process, path

    # fmt: off
    def start_server(self, workers):
        command = [
            os.path.join(ROOT, "server.py"), "-m", self.model, "-n", str(workers),
            "--port", str(self.port), "--worker-timeout", f"{WORKER_TIMEOUT:g}", "--save-every", "0",
            "--until-done", *self.mode.options.split(),
        ]
        self.server, self.server_log = self.launch("server", command)

    def start(self, i):
        name, life = f"w{i}", len(self.lives)
        checkpoint = f"{name}-{life}.pt" if self.args.fresh else f"{name}.pt"
        records = os.path.join(self.folder, f"{name}-{life}.steps")
        command = [
            os.path.abspath(__file__), "--role", "worker", "--worker", name, "--records", records,
            "--server", f"127.0.0.1:{self.port}", "--sync-every", str(self.mode.sync_every),
            "--delay", str(self.mode.delay), "--fragments", str(self.mode.fragments),
            "--update", self.mode.update, "--steps", str(self.steps),
            "--checkpoint", os.path.join(self.folder, checkpoint),
            "--pause", "0" if self.steps else str(PAUSE), "--data-seed", str(1000 * i + life),
            "--save-every", "0" if self.steps else str(SAVE_EVERY),
        ]
        process, log = self.launch(f"{name}-{life}", command)
        self.current[i] = Life(name, process, records, log)
        self.lives.append(self.current[i])
    # fmt: on

    def kill(self, i):
        life = self.current.pop(i)
        if life.process.poll() is not None:
            self.violations.append(f"{life.worker} ended by itself:\n{tail(life.log)}")
        life.process.send_signal(signal.SIGKILL)
        life.killed = time.time()
        life.process.wait()
        self.kills += bool(life.steps)

    def run(self):
        """All of it; what did not go well is in `violations`."""
        try:
            there = [i for i, spans in enumerate(self.outages) if not spans or spans[0][0] > 0]
            self.start_server(len(there))
            for i in there:
                self.start(i)
            limit = START_SECONDS
            is_begun = self.until(lambda: all(self.current[i].steps for i in there), limit, "begun")
            if is_begun and not self.steps:
                self.storm()
            if is_begun:
                self.finish(self.steps * len(there) * 0.02)
        finally:
            for process in [*(life.process for life in self.lives), self.server]:
                if process and process.poll() is None:
                    process.kill()
                    process.wait()

    def storm(self):
        """Let workers go and come as the faults say."""
        began, seconds = time.monotonic(), 60 * self.args.minutes
        events = [
            (at, action, i)
            for i, spans in enumerate(self.outages)
            for span in spans
            for at, action in zip(span, (self.kill, self.start), strict=True)
            if 0 < at < seconds
        ]
        for at, action, i in sorted(events, key=lambda event: event[0]):
            time.sleep(max(0.0, began + at - time.monotonic()))
            action(i)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        self.until(lambda: all(life.steps for life in self.current.values()), START_SECONDS, "back")
        chaos.ask(self.port, "stop", 5.0)

    def finish(self, longer):
        """Wait for all to end by themselves."""
        everybody = [(life.worker, life.process, life.log) for life in self.current.values()]
        everybody.append(("the server", self.server, self.server_log))
        is_over = lambda: all(process.poll() is not None for _, process, _ in everybody)  # noqa: E731
        self.until(is_over, END_SECONDS + longer, "at an end")
        for name, process, log in everybody:
            if process.poll() != 0:
                code = process.poll()
                self.violations.append(f"{name} ended with {code}:\n{tail(log)}")

    def until(self, condition, seconds, what):
        """Wait for a condition; that it never holds is a violation."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.violations.append(f"after {seconds:.0f} s not all are {what}")
                return False
            time.sleep(0.1)
        return True

    def events(self):
        """The audit trail."""
        path = os.path.join(self.folder, "audit.jsonl")
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
        return []

    def judged(self):
        """(audit trail, Trail): its faults, and those of the logs, are in `violations` then."""
        events = self.events()
        trail = Trail(events, self.mode.fragments)
        trail.check()
        check_logs(self.folder, trail)
        self.violations += trail.violations
        return events, trail

    def loss(self):
        """The loss of the final model, or NaN where there is none."""
        path = os.path.join(self.model, "model.safetensors")
        return judge(path) if os.path.exists(path) else float("nan")


# --- The accounts ------------------------------------------------------------------------------------


@dataclass
class Account:
    """Where the steps of a run have gone."""

    up: float = 0.0  # seconds
    rate: float = 0.0  # steps per second of an unhindered worker
    made: int = 0  # steps
    useful: float = 0.0  # steps in the final model
    late: float = 0.0  # of these, in pushes that were late
    dropped: float = 0.0  # steps that their worker gave up, or the server refused
    start: float = 0.0  # median seconds from a process's start to its first step
    waits: collections.Counter = field(default_factory=collections.Counter)  # cause -> seconds

    @property
    def possible(self):
        """Steps of machines that make all steps they can while they are up."""
        return self.up * self.rate

    @property
    def goodput(self):
        return self.useful / self.possible if self.possible else 0.0


def cause_of(begin, end, kills, joins):
    """What a worker waited for from `begin` to `end`: somebody who was killed, and whom the server took
    for alive, or somebody who joined, or else its round. kills, joins: seconds, sorted."""
    at = bisect.bisect_left(kills, begin - WORKER_TIMEOUT - NEAR)
    if at < len(kills) and kills[at] < end:
        return "waited after a fault"
    at = bisect.bisect_left(joins, begin - NEAR)
    is_near = at < len(joins) and joins[at] < end + NEAR
    return "waited for a join" if is_near else "waited for a round"


def account(lives, events, trail):
    """The Account of lives, [(when started, as Life.steps, when killed or 0)], and of what the audit
    trail says."""
    lives = [life for life in lives if life[1]]
    pairs = [pair for _, steps, _ in lives for pair in itertools.pairwise(steps)]
    usual = statistics.median(b[0] - a[0] for a, b in pairs) if pairs else PAUSE
    short = (
        statistics.median(b[1] for _, b in pairs) if pairs else 0.0
    )  # where nobody is waited for
    found = Account(rate=1 / usual, made=sum(len(steps) for _, steps, _ in lives))
    if lives:
        found.start = statistics.median(steps[0][0] - started for started, steps, _ in lives)
    kills = sorted(killed for *_, killed in lives if killed)
    joins = sorted(event["time"] for event in events if event["event"] == "joined")
    for _, steps, killed in lives:
        begin, last = steps[0][0], steps[-1][0]
        # The last step of a process that was not killed takes its time too.
        end = killed or last + usual
        found.up += end - begin
        rest = end - begin - len(steps) * usual
        others = [kill for kill in kills if kill != killed]
        holds = [(a[0], b[1] - short) for a, b in itertools.pairwise(steps)]
        for at, seconds in [*holds, (last, max(0.0, end - last - usual))]:
            if seconds > usual / 2:
                found.waits[cause_of(at, at + seconds, others, joins)] += seconds
                rest -= seconds
        found.waits[LITTLE] += rest
    for chain in trail.chains:
        for push in (push for key in chain for push in trail.folds[key]["pushes"]):
            found.useful += push[3] / trail.count
            found.late += push[3] / trail.count if push[4] else 0
    found.dropped = trail.counts["dropped steps (sum over fragments)"] / trail.count
    return found


def report(name, kills, sums, loss, more=""):
    """A line of the table."""
    print(
        f"{name:10} | {sums.up:10,.0f} | {sums.useful:12,.0f} | {sums.goodput:7.1%} | {kills:6} | "
        f"{loss} {more}",
        flush=True,
    )


def explain(name, sums, trail, violations):
    """Where the other steps went."""
    total = max(1.0, sums.possible)
    print(
        f"\n{name}: {sums.rate:.3f} steps a second unhindered; {sums.start:.1f} s from a start to the "
        f"first step; {trail.counts['rounds closed']} rounds; "
        f"{sums.late / max(1.0, sums.useful):.1%} of the useful steps were late"
    )
    for cause, seconds in sums.waits.most_common():
        print(f"  {seconds * sums.rate / total:6.2%}  not made: {cause} ({seconds:.1f} s)")
    lost = sums.made - sums.useful
    print(f"  {lost / total:6.2%}  made, not folded: {lost:.0f} steps", end="")
    print(f", {sums.dropped:.0f} of them refused or given up by who lived on")
    folds = [trail.folds[key] for chain in trail.chains for key in chain]
    few, alone = (sum(fold["share"] <= share for fold in folds) for share in (0.5, 1 / 3))
    short = sum(push[3] <= SHORT for fold in folds for push in fold["pushes"])
    print(
        f"  {few} of {len(folds)} rounds folded half of the members or fewer, {alone} a third; "
        f"{short} pushes had {SHORT} steps or fewer"
    )
    for text in violations:
        print(f"VIOLATION: {text}")
    if not violations:
        print("  each step that was folded counts once, and all replicas have the same bits")
    sys.stdout.flush()


def measure(name, mode, args, folder):
    """One mode: (name, faults, Account, losses, Trail, violations)."""
    outages = faults(args.seed, args.workers, 60 * args.minutes)
    fleet = Fleet(os.path.join(folder, name), mode, args, outages)
    print(f"{name}: {mode}", flush=True)
    fleet.run()
    events, trail = fleet.judged()
    lives = [(life.started, life.steps, life.killed) for life in fleet.lives]
    sums = account(lives, events, trail)
    losses = [fleet.loss()]
    if not args.no_quiet and sums.useful:
        losses.append(quiet(name, args, folder, sums, fleet.violations))
    explain(name, sums, trail, fleet.violations)
    return name, fleet.kills, sums, losses, fleet.violations


def quiet(name, args, folder, sums, violations):
    """The loss of a run of as many useful steps without faults, in full sync, and not throttled."""
    workers = max(1, round(sums.up / (60 * args.minutes)))
    steps = max(1, round(sums.useful / workers))
    where = os.path.join(folder, f"{name}-quiet")
    print(f"{name}: quiet run of {workers} workers, {steps} steps each", flush=True)
    fleet = Fleet(where, MODES["full"], args, [[]] * workers, steps)
    fleet.run()
    fleet.judged()
    violations += [f"quiet run: {text}" for text in fleet.violations]
    return fleet.loss()


def computed(name, args, sums):
    """The Account of training that this program does not do, under the same faults."""
    outages, seconds = faults(args.seed, args.workers, 60 * args.minutes), 60 * args.minutes
    start = sums.start if sums else 5.0
    rate = sums.rate if sums else 1 / PAUSE
    up, useful = lockstep(outages, seconds, rate, start, name == "regroup")
    return Account(up=up, rate=rate, useful=useful, start=start)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seed", type=int, default=1)
    add("--minutes", type=float, default=5.0)
    add("--workers", type=int, default=8)
    add("--only", help=f"of {', '.join([*MODES, *COMPUTED])}, separated by commas")
    add("--options", help=f"the server's in elastic mode ({MODES['elastic'].options})")
    for name in ("sync-every", "delay", "fragments"):
        add(f"--{name}", type=int, help="of the workers in elastic mode")
    add("--update", help="predict, rebase or mix, of the workers in elastic mode")
    add("--fresh", action="store_true", help="workers start again without their checkpoint")
    add("--no-quiet", action="store_true", help="no runs without faults to compare the loss with")
    add("--keep", metavar="DIR", help="a new folder for all files of the runs, which stays")
    for name in ("role", "worker", "server", "checkpoint", "records"):
        add(f"--{name}", help=argparse.SUPPRESS)
    for name in ("steps", "data-seed", "save-every"):
        add(f"--{name}", type=int, help=argparse.SUPPRESS)
    add("--pause", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.role == "worker":
        return work(args)
    given = {each.name: getattr(args, each.name) for each in fields(Mode)}
    given = {name: value for name, value in given.items() if value is not None}
    modes = MODES | {"elastic": replace(MODES["elastic"], **given)}
    chosen = args.only.split(",") if args.only else [*MODES, *COMPUTED]
    folder = args.keep or tempfile.mkdtemp(prefix="goodput-")
    os.makedirs(folder, exist_ok=not args.keep)
    try:
        found = [measure(name, modes[name], args, folder) for name in chosen if name in modes]
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    print(f"\n{'mode':10} | up seconds | useful steps | goodput | faults | loss (to a quiet run's)")
    for name, kills, sums, (loss, *calm), _ in found:
        more = [f"({loss / other:.4f} times {other:.4f})" for other in calm]
        report(name, kills, sums, f"{loss:.4f}", *more)
    measured = found[-1][2] if found else None
    outages = faults(args.seed, args.workers, 60 * args.minutes)
    kills = sum(0 < a < 60 * args.minutes for spans in outages for a, _ in spans)
    for name in (name for name in chosen if name in COMPUTED):
        report(name, kills, computed(name, args, measured), "as in one run", "(computed)")
    return 1 if any(violations for *_, violations in found) else 0


if __name__ == "__main__":
    sys.exit(main())
