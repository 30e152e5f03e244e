"""Judges what a run under faults (tests/chaos.py) has left: its audit trail, model and logs.

    python tests/trail.py /tmp/run                  # a folder that chaos.py kept with --keep

Server and workers write what they do to one file (DILOCO_AUDIT), line by line, before anybody can
act on it. What must hold:
1. Each final version leads back to version 0, fold by fold, and the newest checkpoint holds it.
2. On that way each push, and each step, counts exactly once, also after going on from a checkpoint.
3. No step of a worker that lived to its end is missing, but for those that it gave up, as those of a
   push that an entry lists as refused, and those of a version that died with the server while nobody
   who held it came to the next opening.
4. A run opens with the newest version that its members hold.
5. The model's numbers are what the pushes' names say.
6. Whoever is at a version has the same bits; so has the final model.
7. All checkpoints can be loaded, and no log has a traceback or a half-written file in it.
"""

import bisect
import collections
import contextlib
import glob
import hashlib
import itertools
import json
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import protocol

STEP = 12.0  # what a step subtracts: means over one to four workers are whole numbers
SIZES = {"first": 3001, "second": 1000}


def initial():
    """The tensors that a run starts from: whole numbers, each another than its neighbours."""
    return {name: (torch.arange(size) * 7 % 97).float() for name, size in SIZES.items()}


def flat(tensors):
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])


def places(total, k, count):
    """The places of slice k's elements in a flat vector: int64."""
    place = torch.arange(total)
    return place[place // protocol.stripe_of(total, count) % count == k]


def digest_of(vector):
    return hashlib.sha256(bytes(protocol.memory(vector.contiguous()))).hexdigest()


def checksums_of(vector, count):
    """The checksum of each fragment, in hex."""
    slices = (vector[places(len(vector), k, count)] for k in range(count))
    return [bytes(protocol.checksum_of(part).tolist()).hex() for part in slices]


def tail(path, lines=25):
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return "".join(file.readlines()[-lines:])
    return ""


class Trail:
    """The audit trail of a run, read as a whole. A push's name is (fragment, worker, session, seq),
    a version's key (fragment, origin, number); steps a+1..b are the range (a, b)."""

    def __init__(self, events, count):
        self.events, self.count = events, count
        self.violations, self.counts = [], collections.Counter()
        self.folds, self.fold_at, self.pushes = {}, {}, {}
        self.folded_in = collections.defaultdict(list)  # name of a push -> versions, forks too
        self.listed = set()  # names of pushes that some version lists as empty or refused
        self.dropped = collections.defaultdict(list)  # (fragment, session) -> ranges
        self.settled, self.resumed, self.ends = {}, {}, []
        self.adopts = collections.defaultdict(list)  # (fragment, session) -> [(at, key, checksum)]
        self.joins = collections.defaultdict(list)  # worker -> [(at, session)]
        self.opens = []
        self.final = [None] * count
        for at, event in enumerate(events):
            getattr(self, f"on_{event['event']}", lambda *_: None)(at, event)
        self.chains = [self.chain(k) for k in range(count)]

    def fault(self, text):
        self.violations.append(text)

    # --- Reading ---

    @staticmethod
    def key(k, label):
        return k, label[0], label[1]

    def on_fold(self, at, e):
        key = self.key(e["fragment"], e["label"])
        if key in self.folds:
            self.fault(f"version {key} was made twice")
        self.folds[key], self.fold_at[key] = e, at
        self.final[e["fragment"]] = key
        for worker, session, seq, *_ in e["pushes"]:
            self.folded_in[e["fragment"], worker, session, seq].append(key)
        for worker, session, seq, *_ in e["others"]:
            self.listed.add((e["fragment"], worker, session, seq))
        self.counts["rounds closed"] += 1

    def on_open(self, at, e):
        self.opens.append((at, e))
        self.final = [self.key(k, label) for k, label in enumerate(e["labels"])]
        self.counts["runs opened"] += 1

    def on_take(self, at, e):
        self.counts["slices recovered"] += 1

    def on_push(self, at, e):
        name = e["fragment"], e["worker"], e["session"], e["seq"]
        if self.pushes.setdefault(name, (e["first"], e["last"])) != (e["first"], e["last"]):
            self.fault(f"two pushes are named {name}")
        self.counts["pushes made"] += 1

    def on_settled(self, at, e):
        self.settled[e["fragment"], e["worker"], e["session"], e["seq"]] = at

    def on_dropped(self, at, e):
        self.dropped[e["fragment"], e["session"]].append((e["first"], e["last"]))
        self.counts["dropped steps (sum over fragments)"] += e["last"] - e["first"]

    def on_adopt(self, at, e):
        found = at, self.key(e["fragment"], e["label"]), e["checksum"]
        self.adopts[e["fragment"], e["session"]].append(found)

    def on_joined(self, at, e):
        self.joins[e["worker"]].append((at, e["session"]))
        self.counts["rejoins"] += bool(e["again"])

    def on_resumed(self, at, e):
        self.resumed[e["session"]] = e["from_session"], e["local_step"]
        self.counts["resumed with local work"] += bool(e.get("kept"))

    def on_end(self, at, e):
        self.ends.append((at, e))

    # --- Checking ---

    def base(self, key):
        """The version that one was made from, or None for a first one."""
        return self.key(key[0], self.folds[key]["base"]) if key in self.folds else None

    def chain(self, k):
        """The folds that lead to the final version, first to last."""
        found, key = [], self.final[k]
        while key in self.folds:
            found.append(key)
            key = self.base(key)
        if key is None or key[2] != 0:
            self.fault(f"fragment {k}: the line to the final version breaks off at {key}")
        self.counts["rounds lost by restarts"] -= len(found)
        return found[::-1]

    def descends(self, key, ancestor):
        while key is not None and key != ancestor:
            key = self.base(key)
        return key is not None

    def counted(self, key):
        """(name, range) of the pushes that count in a fold."""
        for worker, session, seq, steps, *_ in self.folds[key]["pushes"]:
            name = key[0], worker, session, seq
            span = self.pushes.get(name)
            if span is None or span[1] - span[0] != steps:
                self.fault(f"{key} counts {name} with {steps} steps; its worker says {span}")
            yield name, span or (0, steps)

    def origin(self, session, span):
        """A range cut at the checkpoints it goes back over: (session that made the steps, range)."""
        first, last = span
        if first < 0 and session in self.resumed:
            before, offset = self.resumed[session]
            yield from self.origin(before, (first + offset, min(last, 0) + offset))
            first = 0
        if first < last:
            yield session, (first, last)

    def check(self):
        self.counts["rounds lost by restarts"] += self.counts["rounds closed"]
        self.in_model = collections.defaultdict(list)  # (fragment, session that pushed) -> ranges
        for k, chain in enumerate(self.chains):
            names, made = set(), collections.defaultdict(list)
            for key in chain:
                for name, span in self.counted(key):
                    if name in names:
                        self.fault(f"push {name} counts twice")
                    names.add(name)
                    self.in_model[k, name[2]].append(span)
                    for session, part in self.origin(name[2], span):
                        made[session].append((part, name, key))
                    self.counts["pushes folded"] += 1
                    self.counts["steps folded"] += span[1] - span[0]
            for parts in made.values():
                for (a, one, at), (b, two, then) in itertools.pairwise(sorted(parts)):
                    if b[0] < a[1]:
                        self.fault(f"steps {b[0] + 1}..{min(a[1], b[1])} count twice: in {one} "
                                   f"({a}, folded in {at}) and {two} ({b}, in {then})")  # fmt: skip
        for _, end in self.ends:
            self.check_steps(end)
        for name in self.settled.keys() & self.pushes.keys():
            first, last = self.pushes[name]
            if first < last and not self.folded_in[name] and name not in self.listed:
                self.fault(f"{name} is settled for its worker, and in no version that was made")
        for name in self.listed & self.pushes.keys():
            self.counts["pushes refused"] += self.pushes[name][0] < self.pushes[name][1]
        self.check_checksums()
        for opening in self.opens:
            self.check_opening(*opening)

    def check_steps(self, end):
        """All steps of a worker that lived to its end are in the final model, or given up."""
        session, worker = end["session"], end["worker"]
        for k in range(self.count):
            mine = [span for name, span in self.pushes.items() if name[::2] == (k, session)]
            low = min([0, *(span[0] for span in mine)])
            inside, dropped = self.in_model[k, session], self.dropped[k, session]
            for a, b in itertools.product(inside, dropped):
                if max(a[0], b[0]) < min(a[1], b[1]):
                    self.fault(f"{worker} {session}, fragment {k}: dropped {b}, but {a} is folded")
            for gap in gaps([*inside, *dropped], low, end["steps"]):
                self.judge_gap(worker, session, k, gap)

    def judge_gap(self, worker, session, k, gap):
        """Steps may be missing only where the version that held them was lost with the server, and
        none that held it was there when the run opened again."""
        where = f"{worker} {session}, fragment {k}"
        text = f"{where}: steps {gap[0] + 1}..{gap[1]} are not in the model"
        left = [gap]
        for name, span in self.pushes.items():
            relevant = name in self.settled and gaps([span], *gap) != [gap]
            for key in self.folded_in[name] if relevant and name[::2] == (k, session) else []:
                if why := self.needless(key):
                    text += f"; they were in {key}, and {why}"
                else:
                    left = [g for part in left for g in gaps([span], *part)]
        if left:
            self.fault(text)
        self.counts["steps lost with the server, as allowed"] += (
            gap[1] - gap[0] - sum(b - a for a, b in left)
        )

    def needless(self, key):
        """Why a version that is not in the final model should be, or "" if nobody could help it."""
        for at, opening in self.opens:
            opened = self.key(key[0], opening["labels"][key[0]])
            if at < self.fold_at[key] or self.descends(opened, key):
                continue
            holders = [worker for worker, held in self.held(at, opening, key[0])
                       if self.descends(held, key)]  # fmt: skip
            return f"{holders} held it when the run opened with {opened}" if holders else ""
        return "no opening lost it"

    def held(self, at, opening, k):
        """(worker, version of the fragment that it held) of the members of an opening."""
        for worker in opening["members"]:
            joins = self.joins[worker]
            place = bisect.bisect_left(joins, (at, ""))
            if place < len(joins):
                before = [key for when, key, _ in self.adopts[k, joins[place][1]] if when < at]
                if before:
                    yield worker, before[-1]

    def check_opening(self, at, opening):
        for k, label in enumerate(opening["labels"]):
            opened = self.key(k, label)
            for worker, held in self.held(at, opening, k):
                if held != opened and self.descends(held, opened):
                    self.fault(f"the run opened with {opened}, though {worker} held {held}")

    def check_checksums(self):
        first = {}
        for (_, session), adopted in self.adopts.items():
            for _, key, checksum in adopted:
                expected = self.folds[key]["checksum"] if key in self.folds else None
                if expected is None and key[2] != 0:
                    self.fault(f"{session} adopted {key}, which nobody made")
                if checksum != (expected or first.setdefault(key, checksum)):
                    self.fault(f"{session} has other bits than the server at {key}")
        for at, end in self.ends:
            for k, checksum in enumerate(end["checksums"]):
                adopted = [a for a in self.adopts[k, end["session"]] if a[0] < at]
                if not adopted or adopted[-1][2] != checksum:
                    self.fault(f"{end['worker']} {end['session']}: fragment {k} ended as something "
                               "else than the global slice that it adopted last")  # fmt: skip

    def replay(self):
        """The final model, worked out from the pushes' names alone, in float64."""
        expected = flat(initial().values()).double()
        for k, chain in enumerate(self.chains):
            moved = 0.0
            for key in chain:
                weights = [push[5] for push in self.folds[key]["pushes"]]
                steps = [span[1] - span[0] for _, span in self.counted(key)]
                if steps:
                    weighed = sum(w * n for w, n in zip(weights, steps, strict=True))
                    moved += self.folds[key]["share"] * STEP * weighed / sum(weights)
            expected[places(len(expected), k, self.count)] -= moved
        return expected

    def rounding(self, largest):
        """By how much float32 numbers up to `largest` may be off after the folds of a slice: half a unit
        in the last place each time, which add up like steps of a random walk. The moves of whole rounds
        are whole numbers, which lose nothing."""
        parts = max(sum(self.folds[key]["share"] < 1 for key in chain) for chain in self.chains)
        return 4 * parts**0.5 * largest * 2**-24


def gaps(ranges, low, high):
    """What of (low, high) no range covers."""
    found = []
    for first, last in sorted(ranges):
        if first > low and low < high:
            found.append((low, min(first, high)))
        low = max(low, last)
    return [*found, (low, high)] if low < high else found


def check_model(folder, trail):
    """The files that the server left: checkpoints, the final model, and what it says is in them."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    paths = glob.glob(os.path.join(glob.escape(folder), "checkpoint-*"))
    paths.sort(key=lambda path: int(path.rsplit("-", 1)[1]))
    for path in paths:
        for name in ("model.safetensors", "outer.safetensors"):
            try:
                load_file(os.path.join(path, name))
            except Exception as error:
                trail.fault(f"{path}/{name} cannot be loaded: {error!r}")
    if not paths:
        return trail.fault("there is no checkpoint")
    with safe_open(os.path.join(paths[-1], "outer.safetensors"), "pt") as file:
        state = json.loads(file.metadata()["diloco"])
    labels = [trail.key(k, saved["label"]) for k, saved in enumerate(state["fragments"])]
    if labels != trail.final:
        trail.fault(f"the newest checkpoint holds {labels}, the last rounds made {trail.final}")
    final = os.path.join(folder, "model.safetensors")
    if not os.path.exists(final):
        return trail.fault("there is no final model")
    tensors = load_file(final)
    final = flat(tensors[name] for name in SIZES)
    error = float((final.double() - trail.replay()).abs().max()) / STEP
    trail.counts["steps that the content is off"] = error
    if error > 1e-3 + trail.rounding(float(final.abs().max())) / STEP:
        trail.fault(f"the model's content is off by up to {error} steps from what its pushes name")
    if (
        trail.final
        and None not in trail.final
        and checksums_of(final, trail.count)
        != [trail.folds[key]["checksum"] if key in trail.folds else "" for key in trail.final]
    ):
        trail.fault("the final model has other bits than the last folds")
    check_ends(trail, digest_of(final))


def check_ends(trail, digest):
    """Who ended at the final version has the final model; somebody has."""
    for at, end in trail.ends:
        last = [
            [a for a in trail.adopts[k, end["session"]] if a[0] < at] for k in range(trail.count)
        ]
        if all(last) and [found[-1][1] for found in last] == trail.final:
            trail.counts["workers that ended with the final version"] += 1
            if end["digest"] != digest:
                trail.fault(f"{end['worker']} ended with other bits than the final model")
    if not trail.counts["workers that ended with the final version"]:
        trail.fault("no worker ended with the final version")


def check_logs(folder, trail):
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.log"))):
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        for bad in ("Traceback", "is not usable", "checksum mismatch"):
            if bad in text:
                trail.fault(
                    f"{os.path.basename(path)} says {bad!r}, and at its end:\n{tail(path, 3)}"
                )


def verdict(folder, counts, violations):
    """Judge what a run has left in its folder; print the summary. True if all is well."""
    with open(os.path.join(folder, "run.json"), encoding="utf-8") as file:
        count = json.load(file)["fragments"]
    with open(os.path.join(folder, "audit.jsonl"), encoding="utf-8") as file:
        trail = Trail([json.loads(line) for line in file], count)
    trail.check()
    if trail.ends and None not in trail.final:
        check_model(os.path.join(folder, "model"), trail)
    else:
        trail.fault("the run never opened, or no worker came to its end: no model to judge")
    check_logs(folder, trail)
    violations = list(dict.fromkeys([*violations, *trail.violations]))
    print("\nsummary:")
    for name, number in [*counts.items(), *trail.counts.items()]:
        print(f"  {name.strip():<42} {number:,}")
    for text in violations[:40]:
        print(f"VIOLATION: {text}")
    print(f"{'FAILED' if violations else 'passed'}: {len(violations)} violations", flush=True)
    return not violations


if __name__ == "__main__":
    sys.exit(0 if verdict(sys.argv[1], {}, []) else 1)
