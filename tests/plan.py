"""Which codec and sync_every suit a network? The share of the time that would be training.

    python tests/plan.py --parameters 1e9 --workers 8 --mbit 100 --step-seconds 1
    python tests/plan.py --parameters 7e9 --workers 50 --mbit 1e3 --server-mbit 1e4 --sync-every 500
    python tests/plan.py --table              # the README's
    python tests/plan.py --check              # against tests/bench_link.py: root, Linux, 6 minutes

The model is plain, and `server.py` advises by the same one (`priced`): the whole of a codec's bytes
goes up, then the whole comes down, with TCP/IP headers, over a worker's link or over its part of
the server's, whichever is slower. Arithmetic goes on meanwhile, and counts where it takes longer
than the line: encoding and adding on a core of the worker, and the fold on the server. With
streaming a fragment is adopted when the next one is pushed, as in streaming.yaml. Latency, other
traffic and workers that wait for slower ones are not in it.
"""

import argparse
import itertools
import os
import signal
import sys
import tempfile
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import bench_link

from protocol import CODECS, payload_bytes
from server import HIDDEN, PAIRS, priced

ALL = (("fp32", "fp32"), *PAIRS, ("top16", "int4"))  # (up, down)
EVERY = 20, 50, 100, 200, 500, 1000, 2000  # sync_every that are looked at
USUAL = 500  # sync_every that is exceeded only where nothing else helps
# Seconds of one core for a number, of a push or an update in a lossy codec, measured in the process
# of tests/bench_sync.py. The server's threads share the last two.
ENCODE, ADD = 5e-9, 2.5e-9  # on a worker: difference and encoding; decoding and adding
FOLD, STEP = 1.5e-9, 7e-9  # on the server: of each worker's push; the outer step and encoding


@dataclass
class Case:
    """A run that is planned. mbit, server_mbit: 10**6 bits a second of a worker's link and of the
    server's, each way."""

    parameters: int
    workers: int
    mbit: float
    server_mbit: float
    step_seconds: float = 1.0
    threads: int = 4  # of the server, that fold

    def bytes(self, codec):
        """The bytes of the whole model in a codec."""
        return payload_bytes(CODECS[codec].layout(self.parameters))

    def line(self, codec):
        """Seconds in which the whole model moves one way, for every worker at once."""
        mbit = min(self.mbit, self.server_mbit / self.workers)
        return self.bytes(codec) * bench_link.WITH_HEADERS * 8e-6 / mbit

    def ways(self, up, down):
        """(seconds up, seconds down) of a round's transfers."""
        fold = (FOLD * self.workers + STEP) * self.parameters / self.threads
        work = ENCODE * self.parameters, ADD * self.parameters
        return max(self.line(up), work[0]), max(self.line(down), work[1], fold)

    def sync(self, pair, every, slices=1):
        """The server's Sync: what a round of so many steps costs, with full sync or in slices."""
        training = every * self.step_seconds
        delay = training / slices if slices > 1 else 0.0
        return priced(*self.ways(*pair), training, slices, delay)

    def choice(self, sync_every, slices):
        """(pair of codecs, sync_every, slices) that hide the sync, or None: codecs that hardly lose
        before the others, full sync before streaming, then the least lossy codecs and the most
        frequent rounds."""
        for usual, pairs in itertools.product((True, False), (PAIRS[:3], PAIRS[3:])):
            every = [n for n in sync_every if (n <= USUAL) == usual]
            for k, pair, n in itertools.product((1, slices), pairs, every):
                if self.sync(pair, n, k).share <= HIDDEN:
                    return pair, n, k
        return None


def advice(case, sync_every, slices):
    """Which codecs and sync_every to take, in a sentence."""
    found = case.choice(sync_every, slices)
    if found is None:
        pair, every, k = min(
            ((p, n, k) for k in (1, slices) for p in PAIRS for n in sync_every),
            key=lambda each: case.sync(*each).share,
        )
        begin = "Nothing here hides the sync; the nearest is"
    else:
        (pair, every, k), begin = found, "Take"
    mode = "full sync" if k == 1 else f"streaming in {k} fragments"
    trains = 1 - case.sync(pair, every, k).share
    return (
        f"{begin} {mode}, --upload-codec {pair[0]} --download-codec {pair[1]} and sync_every "
        f"{every}: {trains:.0%} of the time is training."
    )


def show(case, sync_every, slices):
    """Print the shares of training, full sync and streaming, by codec and sync_every."""
    print(
        f"{case.parameters:,} parameters, {case.workers} workers with {case.mbit:g} Mbit/s each, a "
        f"server with {case.server_mbit:g}, steps of {case.step_seconds:g} s\nShare of the time "
        f"that is training: full sync, then streaming in {slices} fragments\n"
    )
    head = "   up   down      MB up    MB down   sync_every"
    print(head + "".join(f"{n:>13}" for n in sync_every))
    for pair in ALL:
        sizes = "".join(f"{case.bytes(codec) / 1e6:>11,.1f}" for codec in pair)
        row = f"{pair[0]:>5}{pair[1]:>7}{sizes}             "
        for every in sync_every:
            full, streaming = (1 - case.sync(pair, every, k).share for k in (1, slices))
            row += f"{full:>7.0%}{streaming:>6.0%}"
        print(row)
    print(f"\n{advice(case, sync_every, slices)}")


# --- The README's table -----------------------------------------------------------------------

TABLE = ("bf16", "bf16"), ("int4", "int4"), ("int2", "int2")
LINKS = {"100 Mbit/s": 100.0, "1 Gbit/s": 1e3, "10 Gbit/s": 1e4}


def lasting(seconds):
    """A time as people read it, to two digits."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size or size == 1:
            return f"{float(f'{seconds / size:.2g}'):,g} {unit}"


def needed(case, pair):
    """Seconds of training in a round from which on full sync is hidden."""
    return sum(case.ways(*pair)) * (1 - HIDDEN) / HIDDEN


def table():
    """The lines of the README's table."""
    lines = [f"| parameters | workers | {' | '.join(LINKS)} |", "|---" * (2 + len(LINKS)) + "|"]
    for parameters, name in (10**8, "100 million"), (10**9, "1 billion"), (7 * 10**9, "7 billion"):
        for workers in (2, 8, 50):
            cells = []
            for mbit in LINKS.values():
                case = Case(parameters, workers, mbit, mbit)
                cells.append(", ".join(lasting(needed(case, pair)) for pair in TABLE))
            lines.append(f"| {name} | {workers} | {' | '.join(cells)} |")
    return lines


# --- Against real links -----------------------------------------------------------------------


def check():
    """Compare with what tests/bench_link.py measures, at two rates, with two codecs, full sync and
    streaming. The steps take what they took there: busy cores are no matter of the link."""
    print(
        "Mbit/s  codec       mode  s a cycle: steps  plan  measured  off by  waits: plan  measured"
    )
    for mbit, codec in itertools.product((5.0, 25.0), ("bf16", "int4")):
        args = argparse.Namespace(
            mbit=mbit, parameters=1_000_000, step_ms=30.0, sync_every=100, rounds=6, fragments=4,
            upload_codec=codec, download_codec=codec,
        )  # fmt: skip
        for mode, slices in (("full", 1), ("streaming", args.fragments)):
            for number in (signal.SIGINT, signal.SIGTERM):  # which a Lab that ends ignores
                signal.signal(number, lambda *_: sys.exit("ended by a signal"))
            with tempfile.TemporaryDirectory() as folder, bench_link.Lab(mbit) as lab:
                row = bench_link.measure(lab, folder, mode, args)
            steps = row["step"] * (1 - row["hook"])
            case = Case(args.parameters, 2, mbit, 1e9, steps)
            sync = case.sync((codec, codec), args.sync_every, slices)
            seconds, measured = sync.training + sync.seconds, row["step"] * args.sync_every
            waited = row["waits"] * measured
            print(
                f"{mbit:6g}  {codec:5}{mode:>11}{sync.training:>18.3f}{seconds:>6.2f}"
                f"{measured:>10.2f}{seconds / measured - 1:>8.1%}{sync.seconds:>13.3f}"
                f"{waited:>10.3f}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--parameters", type=float, default=1e9, help="(1e9)")
    add("--workers", type=int, default=8, help="(%(default)s)")
    add("--mbit", type=float, default=100.0, help="of a worker's link, each way (%(default)g)")
    add("--server-mbit", type=float, help="of the server's link, for all workers (as --mbit)")
    add("--step-seconds", type=float, default=1.0, help="what a step takes (%(default)g)")
    add("--sync-every", type=int, nargs="+", help=f"({', '.join(map(str, EVERY))})")
    add("--fragments", type=int, default=4, help="of streaming (%(default)s)")
    add("--table", action="store_true", help="print the README's table")
    add("--check", action="store_true", help="compare with tests/bench_link.py, as root")
    args = parser.parse_args()
    sync_every = args.sync_every or EVERY
    numbers = (args.parameters, args.workers, args.mbit, args.step_seconds, *sync_every)
    if min(numbers) <= 0 or args.fragments < 2 or (args.server_mbit or 1) <= 0:
        parser.error("all numbers must be above 0, and --fragments 2 or more")
    if args.table:
        print("\n".join(table()))
    elif args.check:
        check()
    else:
        server_mbit = args.server_mbit or args.mbit
        case = Case(int(args.parameters), args.workers, args.mbit, server_mbit, args.step_seconds)
        show(case, sync_every, args.fragments)


if __name__ == "__main__":
    main()
