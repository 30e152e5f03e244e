"""What do inner optimizers, codecs and outer steps bring? Final validation losses, in one process.

    python tests/levers.py optimizer=adamw,muon rate=.002,.004,.008 workers=1,2,4,8
    python tests/levers.py optimizer=adamw,muon up=fp32,bf16,int4,int2 every=20,40 --seeds 5 --jobs 2
    python tests/levers.py up=bf16,int2 every=20,40,200 + up=top16 down=int4 --picture tests/levers.png

Each argument names a field of `Row` and its values; every combination of them is a row of the table, and
behind a plus begin others. The picture needs chromium.
Workers train a model of 0.2 million parameters on one text and sync every `every` steps, with the codecs
of protocol.py and with error feedback; the outer step is written out here, independently of server.py.
No process, no network: a row's loss is the same on every machine of one kind, however busy it is. Rows
are written to a file as they end; one that is there already is not made again. "MB" is what one
worker sends and receives in the whole run, for a model of a million parameters.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from types import SimpleNamespace

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as models
import protocol

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = os.path.join(ROOT, "..", "shared", "data", "tinyshakespeare.txt")
SIZE = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4}
BATCH, CONTEXT = 8, 64
WARMUP = 40  # steps
LAST = 0.1  # last learning rate, of the highest


@dataclass(frozen=True)
class Row:
    """What is measured: one run, but for its seed."""

    optimizer: str = "adamw"
    rate: float = 0.0  # highest inner learning rate; 0: what suits the optimizer here
    workers: int = 2
    every: int = 40  # steps between syncs
    steps: int = 1200  # in all
    up: str = "fp32"  # codec of the pushes
    down: str = ""  # codec of the updates; empty: that of the pushes
    feedback: int = -1  # 0: what a codec loses is lost; 1: it is kept; -1: as the codec has it
    kept: float = 1.0  # share of what a push has lost that the next one carries
    outer_rate: float = 0.7
    momentum: float = -1.0  # of the outer step; -1: what suits the inner optimizer here

    @property
    def rounds(self):
        return self.steps // self.every

    def settled(self):
        """This row with the numbers that suit its optimizer."""
        rate, momentum = {"adamw": (0.004, 0.9), "muon": (0.006, 0.6)}[self.optimizer]
        momentum = self.momentum if self.momentum >= 0 else momentum
        return replace(self, rate=self.rate or rate, momentum=momentum)


def megabytes(row):
    """MB that a worker sends and receives in a run, for a million parameters."""
    sides = [protocol.CODECS[row.up], protocol.CODECS[row.down or row.up]]
    return row.rounds * sum(protocol.payload_bytes(codec.layout(10**6)) for codec in sides) / 1e6


class Text:
    """A text as token ids (characters), of which the last tenth is held out."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
        places = {c: i for i, c in enumerate(sorted(set(text)))}
        self.vocabulary = len(places)
        ids = torch.tensor([places[c] for c in text])
        self.train, self.held = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]

    @staticmethod
    def batch(ids, generator, size=BATCH):
        starts = torch.randint(len(ids) - CONTEXT - 1, (size,), generator=generator)
        return torch.stack([ids[start : start + CONTEXT + 1] for start in starts])


class StackedMuon:
    """The steps of several torch.optim.Muon at once, for matrices of one shape together: small matrices one by
    one take longer than all else in a step. Newton-Schulz's sums are in float32 and not in bfloat16."""

    def __init__(self, optimizers):
        self.defaults = optimizers[0].defaults
        self.stacks = defaultdict(list)
        for optimizer in optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                self.stacks[parameter.shape].append(parameter)
        self.momenta = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.stacks.items()}

    @torch.no_grad()
    def step(self, rate):
        given = self.defaults
        a, b, c = given["ns_coefficients"]
        for shape, parameters in self.stacks.items():
            gradients = torch.stack([p.grad for p in parameters])
            momentum = self.momenta[shape].lerp_(gradients, 1 - given["momentum"])
            x = gradients.lerp_(momentum, given["momentum"]) if given["nesterov"] else momentum
            is_tall = shape[0] > shape[1]
            x = x.mT if is_tall else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(given["eps"])
            for _ in range(given["ns_steps"]):
                square = x @ x.mT
                x = a * x + (b * square + c * square @ square) @ x
            x = x.mT if is_tall else x
            scale = 0.2 * math.sqrt(max(shape))
            for parameter, direction in zip(parameters, x, strict=True):
                parameter.mul_(1 - rate * given["weight_decay"]).sub_(direction, alpha=rate * scale)


class Worker:
    """A replica, its optimizers and its own random batches."""

    def __init__(self, row, seed, number, text):
        torch.manual_seed(seed)
        config = models.Config(
            vocab_size=text.vocabulary,
            max_position_embeddings=CONTEXT,
            num_attention_heads=4,
            **SIZE,
        )
        self.model = models.Llama(config)
        train = SimpleNamespace(
            optimizer=row.optimizer, learning_rate=row.rate, weight_decay=0.1, beta1=0.9, beta2=0.95
        )
        self.optimizers = models.make_optimizers(self.model, train)
        self.generator = torch.Generator().manual_seed(1000 * seed + number)
        self.residual = None

    def backward(self, text):
        batch = text.batch(text.train, self.generator)
        self.model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    @torch.no_grad()
    def flat(self):
        return torch.cat([p.reshape(-1) for p in self.model.parameters()])

    @torch.no_grad()
    def adopt(self, numbers):
        pieces = numbers.split([p.numel() for p in self.model.parameters()])
        for parameter, piece in zip(self.model.parameters(), pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))


def sent(name, numbers):
    """Float32 numbers as they arrive by a codec."""
    codec, out = protocol.CODECS[name], torch.empty_like(numbers)
    payload = protocol.Payload(codec.layout(len(numbers)))
    for start, stop in protocol.chunks(len(numbers)):
        codec.encode(numbers[start:stop], payload.tensors, start)
        codec.decode(payload.tensors, start, out[start:stop])
    return out


def keeps(row, name):
    """Whether what this codec loses goes into the next message."""
    return protocol.CODECS[name].feedback if row.feedback < 0 else row.feedback


def train_round(row, workers, muon, text, number):
    """`every` steps of each worker."""
    length = row.every * row.rounds
    for step in range(number * row.every, (number + 1) * row.every):
        course = LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * step / length))
        rate = row.rate * course * min(1, (step + 1) / WARMUP)
        for worker in workers:
            worker.backward(text)
            for group in worker.optimizers["adamw"].param_groups:
                group["lr"] = rate
            worker.optimizers["adamw"].step()
        if muon:
            muon.step(rate)
        for worker in workers:
            worker.model.zero_grad()


def outer_step(row, gradient, velocity, number):
    """The update of round `number` by the formulas of the README: Nesterov with a momentum that
    rises, and a plain mean in the last round. `velocity` changes in place."""
    if number == row.rounds - 1:
        return -gradient
    momentum = min(row.momentum, number / (number + 3))
    velocity.mul_(momentum).add_(gradient)
    return -row.outer_rate * (gradient + momentum * velocity)


def run(row, seed, path):
    """The final validation loss of the global model."""
    torch.set_num_threads(1)
    text = Text(path)
    workers = [Worker(row, seed, number, text) for number in range(row.workers)]
    muons = [w.optimizers["muon"] for w in workers if "muon" in w.optimizers]
    muon = StackedMuon(muons) if muons else None
    anchor = workers[0].flat()
    velocity, behind = torch.zeros_like(anchor), torch.zeros_like(anchor)
    for number in range(row.rounds):
        train_round(row, workers, muon, text, number)
        gradient = torch.zeros_like(anchor)
        for worker in workers:
            push = anchor - worker.flat()
            if worker.residual is not None:
                push.add_(worker.residual, alpha=row.kept)
            arrived = sent(row.up, push)
            worker.residual = push - arrived if keeps(row, row.up) else None
            gradient += arrived / row.workers
        update = outer_step(row, gradient, velocity, number) + behind
        arrived = sent(row.down or row.up, update)
        behind = update - arrived if keeps(row, row.down or row.up) else behind
        anchor = anchor + arrived
        for worker in workers:
            worker.adopt(anchor)
    return evaluate(workers[0].model, text)


@torch.no_grad()
def evaluate(model, text, batches=16):
    generator = torch.Generator().manual_seed(7)
    given = [text.batch(text.held, generator, 32) for _ in range(batches)]
    return statistics.mean(model(b[:, :-1], b[:, 1:]).item() for b in given)


def read(path):
    """{row: {seed: loss}} of a file of results."""
    found = defaultdict(dict)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in map(json.loads, file):
                found[Row(**line["row"])][line["seed"]] = line["loss"]
    return found


def rows_of(arguments):
    """The rows that the command line asks for."""
    kinds = {field.name: field.type for field in fields(Row)}
    if "+" in arguments:
        place = arguments.index("+")
        return rows_of(arguments[:place]) + rows_of(arguments[place + 1 :])
    values = [(name, given.split(",")) for name, _, given in (a.partition("=") for a in arguments)]
    for name, _ in values:
        if name not in kinds:
            sys.exit(f"{name} is no field of a row; fields: {', '.join(kinds)}")
    rows = []
    for chosen in itertools.product(*(given for _, given in values)):
        pairs = zip(values, chosen, strict=True)
        rows.append(Row(**{name: kinds[name](value) for (name, _), value in pairs}).settled())
    return rows


def table(found):
    """Print a line for each row, in Markdown, with the fields in which rows differ."""
    rows = list(found)
    differ = [f.name for f in fields(Row) if len({getattr(row, f.name) for row in rows}) > 1]
    print(f"| {' | '.join(differ)} | MB | loss | spread | seeds |")
    print(f"|{'---|' * (len(differ) + 4)}")
    for row in rows:
        losses = list(found[row].values())
        cells = [f"{str(getattr(row, name)) or '-'}" for name in differ]
        cells += [f"{megabytes(row):.1f}", f"{statistics.mean(losses):.4f}"]
        cells += [f"{max(losses) - min(losses):.4f}", f"{len(losses)}"]
        print(f"| {' | '.join(cells)} |")


# --- The picture --------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 440, 64, 200, 28, 56
COLORS = ("#3b6ea8", "#c0573f", "#4f8f4a", "#8a5fae", "#b0862a", "#3f8f95", "#77706a", "#a84f78")


def curves(found):
    """{name: [(MB, mean loss)] by MB} of rows that differ in the bytes alone, the picture's lines."""
    lines = defaultdict(list)
    for row, losses in found.items():
        codecs = row.up + (f" up, {row.down} down" if row.down not in ("", row.up) else "")
        name = f"{'Muon' if row.optimizer == 'muon' else 'AdamW'}, {codecs}"
        lines[name].append((megabytes(row), statistics.mean(losses.values())))
    return {name: sorted(points) for name, points in lines.items()}


def svg_of(lines):
    """The loss over the bytes, which have a logarithmic scale, as SVG."""
    points = [point for line in lines.values() for point in line]
    least, most = (pick(x for x, _ in points) for pick in (min, max))
    low, high = (pick(y for _, y in points) for pick in (min, max))
    tick = 10 ** math.floor(math.log10(high - low))
    tick *= next(k for k in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (tick * k) <= 8)

    def x_of(x):
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / least) / math.log(most / least)

    def y_of(y):
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    def text(x, y, words, anchor="middle", color="#333"):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{words}</text>'

    parts = []
    for k in range(math.ceil(low / tick), math.floor(high / tick) + 1):
        y = y_of(k * tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e4e2de"/>')
        parts.append(text(LEFT - 8, y + 4, f"{k * tick:.3g}", "end"))
    for x in (base * 10**k for k in range(-1, 5) for base in (1, 2, 5)):
        if least <= x <= most:
            parts.append(text(x_of(x), HEIGHT - BOTTOM + 20, f"{x:g}"))
    title = "MB that a worker sends and receives in the run, for a million parameters"
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, title))
    parts.append(text(LEFT, TOP - 8, "validation loss", "start"))
    free, colors = TOP, {}  # a colour for each pair of codecs
    for name, line in sorted(lines.items(), key=lambda item: item[1][-1][1], reverse=True):
        codecs = name.partition(", ")[2]
        color = colors.setdefault(codecs, COLORS[len(colors) % len(COLORS)])
        places = [(x_of(x), y_of(y)) for x, y in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dash = "" if name.startswith("AdamW") else ' stroke-dasharray="6 3"'
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in places]
        free += 17
        parts.append(text(WIDTH - RIGHT + 12, free, name, "start", color))
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-size="12" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>{body}</svg>'
    )


def draw(found, path):
    """Write the picture as PNG, by way of a browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
        browser = play.chromium.launch(**options)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_content(f"<style>body {{ margin: 0 }}</style>{svg_of(curves(found))}")
        page.locator("svg").screenshot(path=path)
        browser.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="FIELD=VALUE[,VALUE...]")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (%(default)s)")
    parser.add_argument("--out", default="levers.jsonl", help="file of results (%(default)s)")
    parser.add_argument(
        "--picture", help="a PNG of the loss over the bytes, made of the table's rows"
    )
    args = parser.parse_intermixed_args()
    rows, done = rows_of(args.rows), read(args.out)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    wanted = [(row, seed) for seed in seeds for row in rows if seed not in done[row]]
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool,
        open(args.out, "a", encoding="utf-8") as file,
    ):
        began = time.monotonic()
        running = {pool.submit(run, row, seed, args.text): (row, seed) for row, seed in wanted}
        for future in concurrent.futures.as_completed(running):
            row, seed = running[future]
            loss = future.result()
            file.write(json.dumps({"row": asdict(row), "seed": seed, "loss": loss}) + "\n")
            file.flush()
            done[row][seed] = loss
            shown = " ".join(f"{k}={v}" for k, v in asdict(row).items() if v != getattr(Row, k))
            print(
                f"{time.monotonic() - began:6.0f} s  seed {seed}  {shown}  {loss:.4f}", flush=True
            )
    found = {row: {seed: done[row][seed] for seed in seeds} for row in rows}
    table(found)
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
