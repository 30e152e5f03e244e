"""What does the loss pay for fewer syncs? A table of final validation losses, real processes all.

    python tests/parity.py                                   # three seeds, some 15 minutes
    python tests/parity.py --seeds 1 --only full,stream-4    # a part of it
    python tests/parity.py --against full-fp32 --only full-fp32,full,full-int8,full-int4
    python tests/parity.py --text my.txt --rounds 30 --sync-every 40
    python tests/parity.py --unequal                         # machines that are not alike
    python tests/parity.py --simulate --seeds 2              # the same in simulated time, and more

Trains a small model on one text: alone, alone with twice the batch (what two data-parallel workers
would do), with DiLoCo at two workers, and with streaming DiLoCo in 2 or 4 fragments, with a delay of one
interval (or, "tenth", of a tenth of the cycle) and each `fragment_update`; and the full model in each
codec both ways ("full" is bf16; "plain": without error feedback; "top": up, with int4 down), and with Muon
as the inner optimizer. `--rate` is the learning rate of all. Every run takes the same number of
steps and is judged by the loss of the global model on the same held-out text. The percentages are
against one variant (full-model DiLoCo, or `--against`) of the same seed, averaged.

With `--unequal` four workers of speed 1, 0.8, 0.5 and 0.25 train for the time in which the fastest makes
`--steps` steps, if it never waits: the rows differ in who waits for whom, in what a fold of a part of a
round does, and in the paces. With `--simulate` the same machines live in one process and in simulated
time, with a smaller model; the outer steps are written out here, independently of server.py, and there
are more rules for late work than the server has.
"""

import argparse
import contextlib
import copy
import heapq
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as models
import status
import worker

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = os.path.join(ROOT, "..", "shared", "data", "tinyshakespeare.txt")
SMALL = {  # 0.2 million parameters, a few milliseconds a step
    "model.hidden_size": 64,
    "model.intermediate_size": 172,
    "model.num_hidden_layers": 4,
    "model.num_attention_heads": 4,
    "train.batch_size": 8,
    "train.context": 64,
    "train.learning_rate": 0.002,
    "train.min_learning_rate": 0.0002,
    "train.warmup_steps": 40,
    "train.threads": 1,
    "output.eval_tokens": 32768,
    "output.save_every": 0,
    "output.log_every": 200,
}


def variants(sync_every):
    """{name: (workers, settings, server options)}; 0 workers: one, standalone."""

    def streaming(fragments, update, alpha=0.5, delay=None):
        return {
            "diloco.num_fragments": fragments,
            "diloco.fragment_update": update,
            "diloco.fragment_update_alpha": alpha,
            "diloco.fragment_sync_delay": "null" if delay is None else delay,
        }

    def codec(up, *more, down="", **settings):
        return 2, settings, ["--upload-codec", up, "--download-codec", down or up, *more]

    muon = {"train.optimizer": "muon"}
    tenth = max(1, sync_every // 10)
    return {
        "one": (0, {}, []),
        "twice-batch": (0, {"train.batch_size": 2 * SMALL["train.batch_size"]}, []),
        "full": (2, {}, []),
        "full-fp32": codec("fp32"),
        "full-int8": codec("int8"),
        "full-int4": codec("int4"),
        "full-int4-plain": codec("int4", "--no-error-feedback"),
        "full-int2": codec("int2"),
        "full-top16": codec("top16", down="int4"),
        "full-top32": codec("top32", down="int4"),
        "full-muon": (2, muon, []),
        "full-muon-int4": codec("int4", **muon),
        "full-muon-int2": codec("int2", **muon),
        "full-muon-top16": codec("top16", down="int4", **muon),
        "full-paper": (2, {}, ["--no-momentum-warmup"]),
        "stream-2": (2, streaming(2, "predict"), []),
        "stream-2-rebase": (2, streaming(2, "rebase"), []),
        "stream-2-mix": (2, streaming(2, "mix"), []),
        "stream-4": (2, streaming(4, "predict"), []),
        "stream-4-rebase": (2, streaming(4, "rebase"), []),
        "stream-4-mix": (2, streaming(4, "mix"), []),
        "stream-4-tenth": (2, streaming(4, "predict", delay=tenth), []),
        "stream-4-tenth-rebase": (2, streaming(4, "rebase", delay=tenth), []),
    }


def write_config(folder, source, seed, steps, sync_every, settings):
    """Write a worker's settings into a file of the folder; its path."""
    config = os.path.join(folder, "small.yaml")
    with open(config, "w", encoding="utf-8") as file:
        blocks = {}
        values = {**SMALL, "train.seed": seed, "train.max_steps": steps, "data.source": source}
        values |= {"diloco.sync_every": sync_every, "output.eval_every": steps, **settings}
        for name, value in values.items():
            block, key = name.split(".")
            blocks.setdefault(block, []).append(f"  {key}: {value}\n")
        file.writelines(line for block, keys in blocks.items() for line in (f"{block}:\n", *keys))
    return config


def surroundings():
    """The environment of a process of ours: no settings of the caller's, one thread."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")}
    return {**env, "OMP_NUM_THREADS": "1"}


def train(folder, source, seed, steps, sync_every, workers, settings, options):
    """One run in an empty folder: (final validation loss, seconds)."""
    config = write_config(folder, source, seed, steps, sync_every, settings)
    command = [os.path.join(ROOT, "worker.py"), config]
    if workers:
        command = [os.path.join(ROOT, "server.py"), "-m", "model", "-n", str(workers)]
        command += ["--port", "0", "--save-every", "0", "--spawn", config, *options]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=surroundings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = re.search(r"final validation loss ([\d.]+)", done.stdout)
    if done.returncode or not found:
        sys.exit(f"a run failed with exit code {done.returncode}:\n{done.stdout}")
    return float(found[1]), time.monotonic() - began


def compare(chosen, args, source):
    """Run the variants and print their table."""
    steps = args.rounds * args.sync_every
    losses = {name: [] for name in chosen}
    print(f"{steps} steps, sync_every {args.sync_every}, {os.path.basename(source)}", flush=True)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, (workers, settings, options) in chosen.items():
            with tempfile.TemporaryDirectory() as folder:
                loss, seconds = train(
                    folder, source, seed, steps, args.sync_every, workers, settings, options
                )
            losses[name].append(loss)
            print(f"seed {seed}  {name:20} {loss:.4f}  {seconds:.0f} s", flush=True)

    print(f"\n{'variant':20} {'mean':>7} {'spread':>7}  against {args.against}")
    for name, values in losses.items():
        spread = max(values) - min(values)
        against = ""
        if args.against in losses:
            ratios = [a / b for a, b in zip(values, losses[args.against], strict=True)]
            against = f"{100 * (statistics.mean(ratios) - 1):+.2f}%"
        print(f"{name:20} {statistics.mean(values):7.4f} {spread:7.4f}  {against:>8}")


# --- Machines that are not alike ------------------------------------------------------------
#
# Every row gets the same wall clock: from the moment in which all four workers make their first step
# to the one in which the fastest, if it never waited, would have made `--steps` steps. Then nobody
# begins another step, and the run is stopped as a user would stop it, so what a worker has beyond its
# last push still goes in, as a plain mean. Since no row knows how many steps it will make, the
# learning rate is constant after the warmup. A row says how many seconds its workers were behind at
# the end: if they are many, this machine was too busy for such short steps, and the row is worth
# nothing.

SPEEDS = {"ada": 1.0, "bob": 0.8, "cleo": 0.5, "dan": 0.25}  # each machine's, of the fastest's
PACE = 20  # steps of the fastest machine between two syncs
CONSTANT = {"train.min_learning_rate": SMALL["train.learning_rate"]}
ENDLESS = 10**6  # steps that no row makes
LAST_SECONDS = 120  # that a process has to start, or to end once it is told to


@dataclass
class Outcome:
    """What a row has come to with one seed."""

    loss: float
    steps: list  # that each machine has made
    rounds: int
    share: float | None  # mean share of a round that a fold had; None where nobody says
    note: str = ""

    def __str__(self):
        share = "    -" if self.share is None else f"{self.share:5.2f}"
        steps = " ".join(f"{steps:4.0f}" for steps in self.steps)
        return f"{steps:20} {self.rounds:6.0f} {share} {self.loss:8.4f}"


def unequal_rows(step_seconds):
    """{name: (workers' settings, server options)} in the order of the table."""
    grace = f"{PACE * step_seconds / 4:g}"

    def quorum(count, *more):
        return {}, ["--quorum", str(count), "--grace", "0", *more]

    return {
        "full": ({}, []),
        "round-timeout": ({}, ["--round-timeout", grace]),
        "own-equal": ({}, ["--own-pace", "--weights", "equal"]),
        "own-steps": ({}, ["--own-pace", "--weights", "steps"]),
        "own": ({}, ["--own-pace"]),
        "quorum-1-whole": quorum(1, "--outer", "whole"),
        "quorum-1-delayed": quorum(1, "--outer", "delayed"),
        "quorum-1": quorum(1, "--outer", "fractional"),
        "quorum-2": quorum(2, "--outer", "fractional"),
        "own-quorum-2": ({}, ["--own-pace", "--quorum", "2", "--grace", grace]),
        "quorum-2-whole": quorum(2, "--outer", "whole"),
        "no-waiting": ({"diloco.fragment_sync_delay": PACE // 4}, quorum(1)[1]),
    }


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


@contextlib.contextmanager
def process(log, *command):
    """A Python process in the folder of `log`, the file that gets its output. It ends with the
    block at the latest."""
    with open(log, "w", encoding="utf-8") as file:
        running = subprocess.Popen(
            [sys.executable, *command],
            cwd=os.path.dirname(log),
            env=surroundings(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield running
    finally:
        if running.poll() is None:
            running.kill()
        running.wait()


def await_text(log, pattern, running):
    """The match of a pattern in a process's output, once it is there; else the end of this script."""
    ends = time.monotonic() + LAST_SECONDS
    while True:
        over = running.poll() is not None or time.monotonic() > ends
        if found := re.search(pattern, read(log)):
            return found
        if over:
            sys.exit(f"{log} has no {pattern!r}:\n{read(log)}")
        time.sleep(0.05)


def train_unequal(folder, source, seed, args, settings, options):
    """One run of throttled workers in an empty folder: its Outcome."""
    size = TINY if args.tiny else SMALL
    config = write_config(folder, source, seed, ENDLESS, PACE, {**size, **CONSTANT, **settings})
    step = args.step_ms / 1000
    seconds = args.steps * step
    logs = {name: os.path.join(folder, f"{name}.log") for name in ("server", *SPEEDS)}
    with contextlib.ExitStack() as stack:
        command = [os.path.join(ROOT, "server.py"), "-m", "model", "-n", str(len(SPEEDS))]
        command += ["--host", "127.0.0.1", "--port", "0", "--save-every", "0", "--until-done"]
        server = stack.enter_context(process(logs["server"], *command, *options))
        port = await_text(logs["server"], r"listening on port (\d+)", server)[1]
        workers = {}
        for name, speed in SPEEDS.items():
            command = [os.path.join(ROOT, "tests", "throttled_worker.py")]
            command += [
                str(step / speed),
                str(seconds),
                config,
                "--server",
                f"127.0.0.1:{port}",
                "--worker-id",
                name,
            ]
            workers[name] = stack.enter_context(process(logs[name], *command))
        for name, running in workers.items():
            await_text(logs[name], r"first step", running)
        time.sleep(seconds)
        status.ask(f"127.0.0.1:{port}", "stop")
        made, behind = [], []
        for name, running in workers.items():
            found = await_text(logs[name], r"made (\d+) steps, ([\d.]+) s behind", running)
            made.append(int(found[1]))
            behind.append(f"{float(found[2]):.1f}")
        for name, running in {**workers, "server": server}.items():
            if running.wait(LAST_SECONDS):
                sys.exit(f"{name} failed with exit code {running.returncode}:\n{read(logs[name])}")
    lines = read(os.path.join(folder, "model", "rounds.jsonl")).splitlines()
    rounds = [line for line in map(json.loads, lines) if not line["closing"]]
    shares = [line["share"] for line in rounds if line.get("share") is not None]
    refused = sum(len(line["refused"]) for line in rounds)
    note = f"{refused} refused, seconds behind {' '.join(behind)}"
    share = statistics.mean(shares) if shares else None
    return Outcome(final_loss(folder, config), made, len(rounds), share, note)


def final_loss(folder, config):
    """The loss of the server's final model on the text that the workers hold out."""
    settings = worker.load_settings(config)
    model, tokenizer = models.load(os.path.join(folder, "model"))
    vocab_size = model.config.vocab_size
    source = worker.open_source(settings, None, tokenizer, vocab_size, None)
    return loss_on(model, source.held_out(settings.output.eval_tokens + 1), settings.train.context)


@torch.no_grad()
def loss_on(model, tokens, context):
    """The mean loss of a model on tokens, in sequences of `context`."""
    rows = (len(tokens) - 1) // context
    tokens = tokens[: rows * context + 1]
    parts = tokens[:-1].view(rows, -1).split(64), tokens[1:].view(rows, -1).split(64)
    total = sum(model(ids, targets).item() * len(ids) for ids, targets in zip(*parts, strict=True))
    return total / rows


def print_table(title, outcomes):
    """The means and spreads of rows' Outcomes: {name: one for each seed}."""
    print(f"\n{title:28} {'steps made':20} rounds share     loss  spread")
    for name, found in outcomes.items():
        losses = [outcome.loss for outcome in found]
        shares = [outcome.share for outcome in found if outcome.share is not None]
        mean = Outcome(
            statistics.mean(losses),
            [statistics.mean(steps) for steps in zip(*(o.steps for o in found), strict=True)],
            statistics.mean(outcome.rounds for outcome in found),
            statistics.mean(shares) if shares else None,
        )
        print(f"{name:28} {mean} {max(losses) - min(losses):7.4f}", flush=True)


def run_rows(title, rows, args, run):
    """Call `run(seed, row)` for every seed and row, say each Outcome, and print their table."""
    outcomes = {name: [] for name in rows}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, row in rows.items():
            began = time.monotonic()
            outcome = run(seed, row)
            outcomes[name].append(outcome)
            seconds = time.monotonic() - began
            print(f"seed {seed} {name:28} {outcome}  {seconds:.0f} s  {outcome.note}", flush=True)
    print_table(title, outcomes)


def run_unequal(seed, row, args, source):
    """One row of `--unequal` with one seed: its Outcome."""
    with tempfile.TemporaryDirectory() as folder:
        return train_unequal(folder, source, seed, args, *row)


# --- The same in simulated time -------------------------------------------------------------
#
# One process, no sockets. Time counts in steps of the fastest machine; messages take none. A machine
# trains when its next event comes, with the parameters that it had at the one before: nothing reaches
# it in between. What is not pushed when the time is over is lost.

TINY = {  # 0.07 million parameters
    **SMALL,
    "model.hidden_size": 48,
    "model.intermediate_size": 128,
    "model.num_hidden_layers": 2,
    "train.context": 32,
}
LR, MOMENTUM = 0.7, 0.9  # of the outer step
EPSILON = 1e-9  # shares and times are sums of floats
STALL = 3 * PACE  # how long a machine stands still, in scenes with stalls
STALLS = 0.15  # how often it does so, of its rounds

# What a push weighs that is s versions late; in between shares of S rounds in all were folded.
LATE = {
    "same": lambda s, S: 1.0,
    "inverse": lambda s, S: 1 / (1 + s),
    "sqrt": lambda s, S: (1 + s) ** -0.5,
    "inverse-shares": lambda s, S: 1 / (1 + S),
    "drop": lambda s, S: float(s == 0),
    "drop-over-4": lambda s, S: float(s <= 4),
}


@dataclass(frozen=True)
class Rule:
    """A row of the simulation: when its rounds close, what a fold does, what a late push weighs."""

    quorum: int = len(SPEEDS)
    grace: float = 0.0
    late_counts: bool = True  # whether late pushes count for the quorum
    own_pace: bool = False
    outer: str = "fractional"  # whole, fractional, delayed, buffer, halos
    weights: str = "equal"
    late: str = "same"
    scaled: bool = False  # whether lateness shrinks the push itself, not its share and weight
    delay: int = 0  # steps from push to adoption
    stalls: bool = False  # whether machines stand still at times


def simulated_rows():
    """{name: Rule} in the order of the issue's table, then the rules for late work."""
    quarter = PACE / 4
    rows = {
        "full": Rule(outer="whole"),
        "own-equal": Rule(own_pace=True, outer="whole"),
        "own-steps": Rule(own_pace=True, outer="whole", weights="steps"),
        "quorum-1-every-whole": Rule(quorum=1, outer="whole"),
        "quorum-1-whole": Rule(quorum=1, outer="whole", late_counts=False),
        "quorum-1-delayed": Rule(quorum=1, outer="delayed"),
        "quorum-1": Rule(quorum=1),
        "quorum-2": Rule(quorum=2),
        "own-quorum-2": Rule(quorum=2, own_pace=True, grace=quarter),
        "quorum-2-whole": Rule(quorum=2, outer="whole", late_counts=False),
        "quorum-2-every-whole": Rule(quorum=2, outer="whole"),
        "no-waiting": Rule(quorum=1, delay=PACE // 4),
    }
    stalled = {"own_pace": True, "weights": "steps", "stalls": True}
    scenes = {
        "quorum-1": {"quorum": 1},
        "quorum-1-delayed": {"quorum": 1, "outer": "delayed"},
        "no-waiting": {"quorum": 1, "delay": PACE // 4},
        "quorum-2": {"quorum": 2},
        "stalls": {"quorum": 2, "grace": quarter, **stalled},
    }
    rows["stalls:full"] = Rule(outer="whole", **stalled)
    for scene, settings in scenes.items():
        rows |= {f"{scene}:{late}": Rule(late=late, **settings) for late in LATE}
    rows["quorum-1:sqrt-scaled"] = Rule(quorum=1, late="sqrt", scaled=True)
    # Async Local-SGD (arXiv 2401.09135), as its abstract and our knowledge of it have it: each push is
    # 1/N of a plain step at once, momentum follows every N pushes; beside it the paper tries a
    # late push times (1 + s)**-0.5, and N pushes gathered for one whole step.
    published = {"quorum": 1, "late": "sqrt", "scaled": True}
    rows["quorum-1:async-delayed-sqrt"] = Rule(outer="delayed", **published)
    rows["quorum-1:async-buffer"] = Rule(quorum=1, outer="buffer")
    rows["quorum-1:async-buffer-sqrt"] = Rule(outer="buffer", **published)
    # HALoS (arXiv 2506.04531): see Halos.
    rows["quorum-1:halos"] = Rule(quorum=1, outer="halos")
    return rows


class Outer:
    """The global model and its outer step, by the issue's formulas. For a fold of the share f, with
    the mean g of its pushes:

    whole:       v' = mu v + g;      update = -lr (g + mu v')
    fractional:  v' = mu^f v + f g;  update = -lr f (g + mu^f v')
    delayed:     d' = d + f g;       update = -lr f g; as often as the shares pass a whole number
                 v' = mu v + d', d' = 0, update further by -lr mu v'
    buffer:      d' = d + f g; as often as the shares pass a whole number a whole step of d'
    """

    def __init__(self, model, kind):
        self.model = model.clone()
        self.kind = kind
        self.velocity = torch.zeros_like(model)
        self.gathered = torch.zeros_like(model)
        self.shares = 0.0  # of all folds
        self.version = 0

    def anchor(self, number):
        """The parameters from which machine `number` goes on."""
        return self.model

    def nesterov(self, g, mu, share=1.0):
        """A Nesterov step that counts as a share of one."""
        self.velocity.mul_(mu).add_(g, alpha=share)
        self.model.add_(g + mu * self.velocity, alpha=-LR * share)

    def fold(self, g, share, number):
        """A fold of the mean g; `number` is the machine of its first push."""
        mu = min(MOMENTUM, self.shares / (self.shares + 3))
        passed = math.floor(self.shares + share + EPSILON) > math.floor(self.shares + EPSILON)
        if self.kind == "whole":
            self.nesterov(g, mu)
        elif self.kind == "fractional":
            self.nesterov(g, mu**share, share)
        else:
            self.gathered.add_(g, alpha=share)
            if self.kind == "delayed":
                self.model.add_(g, alpha=-LR * share)
            if passed and self.kind == "delayed":
                self.velocity.mul_(mu).add_(self.gathered)
                self.model.add_(self.velocity, alpha=-LR * mu)
            elif passed:
                self.nesterov(self.gathered, mu)
            if passed:
                self.gathered.zero_()
        self.shares += share
        self.version += 1


class Halos(Outer):
    """HALoS as its abstract and our knowledge of it have it, in numbers that fit four machines: two
    regions, the two fast machines and the two slow ones, have a server each, which steps by Delayed
    Nesterov over the pushes of its two. After two pushes it sends the way that its model has gone,
    gathered, to the global server, which adds a half of it with Nesterov momentum of 0.5; a part of
    the global model is then merged into the region's."""

    MOMENTUM, MERGED, SIZE = 0.5, 0.5, 2

    def __init__(self, model, kind):
        super().__init__(model, kind)
        self.regions = [Outer(model, "delayed") for _ in range(len(SPEEDS) // self.SIZE)]
        self.sent = [model.clone() for _ in self.regions]

    def anchor(self, number):
        return self.regions[number // self.SIZE].model

    def fold(self, g, share, number):
        region, sent = self.regions[number // self.SIZE], self.sent[number // self.SIZE]
        region.fold(g, 1 / self.SIZE, number)
        if region.version % self.SIZE == 0:
            way = (sent - region.model) / len(self.regions)
            self.velocity.mul_(self.MOMENTUM).add_(way)
            self.model.sub_(way + self.MOMENTUM * self.velocity)
            region.model.lerp_(self.model, self.MERGED)
            sent.copy_(region.model)
        self.shares += share
        self.version += 1


def flattened(model):
    """A model's parameters as one vector, of which they become views, and their gradients too."""
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.zeros_like(flat)
    place = 0
    for parameter in model.parameters():
        part = slice(place, place + parameter.numel())
        parameter.data = flat.data[part].view_as(parameter)
        parameter.grad = flat.grad[part].view_as(parameter)
        place = part.stop
    return flat


@dataclass(eq=False)
class Push:
    """The pseudo-gradient of one machine's round."""

    machine: object
    gradient: torch.Tensor
    steps: int
    version: int  # that it is based on
    shares: float  # that had been folded at that version
    time: float


@dataclass(eq=False)
class Machine:
    """A machine of the simulation, with its own model, optimizer and part of the data."""

    number: int
    speed: float
    pace: int  # steps between two syncs
    settings: object
    source: object
    random: random.Random
    steps: int = 0  # made
    blocked: bool = False  # waits for a fold
    push: Push | None = None  # that is not folded
    anchor: torch.Tensor = None  # parameters that it has adopted
    mark: torch.Tensor = None  # its own at the push
    adopted: tuple = (0, 0.0)  # version and sum of shares of the anchor
    model: torch.nn.Module = field(init=False)

    def __post_init__(self):
        torch.manual_seed(self.settings.train.seed)  # the same first weights for all
        self.model = worker.build_model(self.settings, {})[0]
        self.flat = flattened(self.model)
        self.anchor = self.flat.detach().clone()
        train = self.settings.train
        betas, decay = (train.beta1, train.beta2), train.weight_decay
        self.optimizer = torch.optim.AdamW([self.flat], betas=betas, weight_decay=decay, fused=True)
        count = 2 * len(SPEEDS)
        self.source = copy.copy(self.source)
        self.source.set_shares(worker.own_shares(self.number, len(SPEEDS), count), count, 0)

    def train(self, steps, ends):
        """Make steps, the last of which ends at a time."""
        train = self.settings.train
        for left in reversed(range(steps)):
            step = int(ends - (left + 1) / self.speed + EPSILON)
            self.optimizer.param_groups[0]["lr"] = worker.learning_rate(step, train)
            batch = self.source.batch(train.batch_size, train.context)
            self.model(batch[:, :-1], batch[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_([self.flat], train.grad_clip)
            self.optimizer.step()
            self.flat.grad.zero_()
        self.steps += steps


class Simulation:
    """Machines that train by a Rule for so long as the fastest takes for `steps` steps."""

    def __init__(self, rule, steps, settings, source):
        self.rule, self.steps = rule, steps
        self.settings, self.source = settings, source
        self.machines = []
        for number, speed in enumerate(SPEEDS.values()):
            pace = max(1, round(PACE * speed)) if rule.own_pace else PACE
            chance = random.Random(f"{settings.train.seed} {number}")
            self.machines.append(Machine(number, speed, pace, settings, source, chance))
        kind = Halos if rule.outer == "halos" else Outer
        self.outer = kind(self.machines[0].anchor, rule.outer)
        self.events = []  # heap of (time, number, function, arguments)
        self.count = itertools.count()
        self.open = []  # pushes of the round that is open
        self.closed_at = self.took = 0.0  # when the last round was closed, and its length
        self.shares, self.lateness = [], []  # of all folds, of all pushes

    def at(self, when, function, *arguments):
        heapq.heappush(self.events, (when, next(self.count), function, arguments))

    def run(self):
        """The Outcome."""
        for machine in self.machines:
            self.go_on(0.0, machine, machine.pace)
        while self.events[0][0] <= self.steps + EPSILON:
            when, _, function, arguments = heapq.heappop(self.events)
            function(when, *arguments)
        machine = self.machines[0]
        machine.flat.data.copy_(self.outer.model)
        held = self.source.held_out(self.settings.output.eval_tokens + 1)
        loss = loss_on(machine.model, held, self.settings.train.context)
        note = f"late by {statistics.mean(self.lateness):.2f}"
        steps = [machine.steps for machine in self.machines]
        share = statistics.mean(self.shares) if self.shares else None
        return Outcome(loss, steps, self.outer.version, share, note)

    def go_on(self, now, machine, steps):
        """Let a machine train up to its next boundary, with a stall if there is one."""
        stall = STALL if self.rule.stalls and machine.random.random() < STALLS else 0.0
        self.at(now + stall + steps / machine.speed, self.boundary, machine, steps)

    def boundary(self, now, machine, steps):
        """A machine has come to its boundary: it pushes, and waits or trains on."""
        machine.train(steps, now)
        gradient = machine.anchor - machine.flat.detach()
        machine.push = Push(machine, gradient, machine.pace, *machine.adopted, now)
        machine.mark = machine.flat.detach().clone()
        self.open.append(machine.push)
        if self.rule.delay:
            self.at(now + self.rule.delay / machine.speed, self.due, machine)
        else:
            machine.blocked = True
        self.check(now)

    def due(self, now, machine):
        """A machine that has trained on is to adopt its push now."""
        machine.train(self.rule.delay, now)
        machine.blocked = True
        if machine.push is None:
            self.adopt(now, machine)

    def adopt(self, now, machine):
        """A machine goes on from the global model, with what it has trained since its push."""
        machine.blocked = False
        since = machine.flat.detach() - machine.mark
        machine.anchor = self.outer.anchor(machine.number).clone()
        machine.flat.data.copy_(machine.anchor + since)
        machine.adopted = self.outer.version, self.outer.shares
        self.go_on(now, machine, machine.pace - self.rule.delay)

    def check(self, now):
        """Close the open round if its time has come. Where late pushes do not count for the quorum, as
        with the server's whole outer step, a round that has no others gets the last round's length."""
        rule = self.rule
        here = [p for p in self.open if rule.late_counts or p.version == self.outer.version]
        closes = math.inf
        if len(self.open) == len(self.machines):
            closes = now
        elif rule.quorum <= len(here):
            closes = here[rule.quorum - 1].time + rule.grace
        elif self.open and not here and rule.quorum < len(self.machines):
            closes = self.closed_at + self.took + rule.grace
        if closes <= now + EPSILON:
            self.close(now)
        elif closes < math.inf:
            self.at(closes, self.check)

    def weigh(self, push):
        """(usual weight, what its lateness leaves of it) of a push."""
        late = self.outer.version - push.version, self.outer.shares - push.shares
        self.lateness.append(late[0])
        usual = push.steps if self.rule.weights == "steps" else 1
        return usual, LATE[self.rule.late](*late)

    def close(self, now):
        """Fold the pushes of the open round, and let their machines go on that wait for it."""
        pushes, self.open = sorted(self.open, key=lambda push: push.machine.number), []
        weighed = [self.weigh(push) for push in pushes]
        there = [usual * (1 if self.rule.scaled else left) for usual, left in weighed]
        inside = {push.machine for push in pushes}
        by_steps = self.rule.weights == "steps"
        missing = sum(m.pace if by_steps else 1 for m in self.machines if m not in inside)
        if sum(there):
            parts = [
                usual * left * p.gradient for (usual, left), p in zip(weighed, pushes, strict=True)
            ]
            share = sum(there) / (sum(there) + missing)
            self.outer.fold(sum(parts) / sum(there), share, pushes[0].machine.number)
            self.shares.append(share)
        self.took, self.closed_at = now - self.closed_at, now
        for push in pushes:
            push.machine.push = None
            if push.machine.blocked:
                self.adopt(now, push.machine)


def simulate(seed, rule, args, source):
    """One row of `--simulate` with one seed: its Outcome."""
    torch.set_num_threads(1)
    values = {**TINY, **CONSTANT, "train.seed": seed, "data.source": source}
    settings = worker.load_settings(None, values.items())
    tokenizer = models.ByteTokenizer()
    source = worker.open_source(settings, None, tokenizer, tokenizer.vocab_size, None)
    return Simulation(rule, args.steps, settings, source).run()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="a text file (tiny Shakespeare if there, else built-in)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sync-every", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.002, help="learning rate (%(default)s)")
    parser.add_argument("--only", help="names of variants or rows, separated by commas")
    parser.add_argument("--against", default="full", help="the variant that others are held to")
    parser.add_argument("--unequal", action="store_true", help="machines that are not alike")
    parser.add_argument("--simulate", action="store_true", help="the same in simulated time")
    parser.add_argument("--steps", type=int, default=800, help="of the fastest one (%(default)s)")
    parser.add_argument("--step-ms", type=float, default=60, help="of its steps (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="--unequal with --simulate's model")
    args = parser.parse_args()
    SMALL.update({"train.learning_rate": args.rate, "train.min_learning_rate": args.rate / 10})
    # Leave by way of what ends our processes and removes our files.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    source = args.text or (TEXT if os.path.isfile(TEXT) else "builtin")
    source = source if source == "builtin" else os.path.abspath(source)
    if args.simulate:
        chosen = simulated_rows()
    else:
        chosen = unequal_rows(args.step_ms / 1000) if args.unequal else variants(args.sync_every)
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(",")}
    if args.simulate:
        title = f"simulated, {args.seeds} seeds"
        run_rows(title, chosen, args, lambda seed, row: simulate(seed, row, args, source))
    elif args.unequal:
        title = f"{args.step_ms:g} ms a step, {args.seeds} seeds"
        run_rows(title, chosen, args, lambda seed, row: run_unequal(seed, row, args, source))
    else:
        compare(chosen, args, source)


if __name__ == "__main__":
    main()
