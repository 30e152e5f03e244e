"""Breaks one rule at a time and says after how many seeds the simulator notices.

python tests/mutate.py [--seeds 3000] [words of a name]
"""

import argparse
import importlib
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# name -> (file, what stands there once, what stands there instead)
MUTATIONS = {
    "a folded push counts again": (
        "server",
        "if push.worker in slice.folded and push.seq <= slice.folded[push.worker].seq:",
        "if False:",
    ),
    "a later turn does not excuse (passed)": (
        "server",
        " and self.members[id].passed < turn",
        "",
    ),
    "a refused push leaves no trace": (
        "server",
        "        first = slice.pushes.get((push.worker, push.seq))\n",
        "        if push.refused:\n            return True\n"
        "        first = slice.pushes.get((push.worker, push.seq))\n",
    ),
    "a joiner is awaited in rounds that had begun": (
        "server",
        "first = slice.version.number + (bool(slice.pushes) and not is_resumed)",
        "first = slice.version.number",
    ),
    "closing does not close": ("server", "member.closed.add(push.k)", "pass"),
    "a push that is too old counts": ("server", "push.late > rules.max_staleness", "False"),
    "a predecessor's push stays beside the resumed one": (
        "server",
        "del slice.pushes[name]",
        "pass",
    ),
    "an old session is let in": (
        "server",
        "member = of_process(self.members, id, session)",
        "member = self.members.get(id)",
    ),
    "a process comes back under an id that was taken over": (
        "server",
        "if member.was_in and self.sessions",
        "if False and self.sessions",
    ),
    "a join again forgets what was closed": ("server", "self.closed |= old.closed", "pass"),
    "a join again forgets the turn": (
        "server",
        "self.passed, self.begun = old.passed, old.begun",
        "self.begun = old.begun",
    ),
    "an upload comes without what is folded in it": (
        "server",
        "dict(member.folded[k]) if member.folded else {}",
        "{}",
    ),
    "the oldest holder uploads": ("server", "newest = max(holders", "newest = min(holders"),
    "places are not told": (
        "server",
        "turns = [self.turn(k) for k in range(len(self.slices))]",
        "turns = list(range(len(self.slices)))",
    ),
    "a run that goes on waits for -n": ("server", " or (holds and now - self.began > limit)", ""),
    "members from before a crash are not waited for": (
        "server",
        'self.expected = dict.fromkeys(names["members"], now)',
        "pass",
    ),
    "a run is laid out anew though one comes back with the tensors of before": (
        "server",
        "return bool(back) and not any(self.fits(member) for member in back)",
        "return bool(back) and not all(self.fits(member) for member in back)",
    ),
    "pushes from before a change are forgotten": (
        "server",
        "run.slices = [Slice(version, dict(fates), missed=missed) for _ in range(count)]",
        "run.slices = [Slice(version, missed=missed) for _ in range(count)]",
    ),
    "slices that are cut anew keep their version": (
        "server",
        "        if self.before is None:\n            return version",
        "        if True:\n            return version",
    ),
    "a join from before a change is let in": (
        "server",
        "return bool(old) and (member.session, member.layout) == (old.session, old.layout)",
        "return False",
    ),
    "those who are expected are waited for for ever": (
        "server",
        "all(now - seen > limit for seen in left)",
        "not left",
    ),
    "sequence numbers begin anew": (
        "server",
        "return max([0, *listed,",
        "return min([0, *listed,",
    ),
    "the silent are not given up": (
        "server",
        "m for m in workers.values() if now - m.heard > self.rules.worker_timeout",
        "m for m in workers.values() if workers is not self.members and now - m.heard > 40",
    ),
    "the silent that wait are not given up": (
        "server",
        "m for m in workers.values() if now - m.heard > self.rules.worker_timeout",
        "m for m in workers.values() if workers is not self.waiting and now - m.heard > 40",
    ),
    "nothing closes a stuck round, and passed is left out": (
        "server",
        "if all(member.is_stuck(self.slices) for member in self.members.values()):",
        "if False:",
        " and self.members[id].passed < turn",
        "",
    ),
    "pushes of one worker overwrite each other": (
        "server",
        "slice.pushes[push.worker, push.seq] = push",
        "slice.pushes = {n: p for n, p in slice.pushes.items() if n[0] != push.worker}\n"
        "        slice.pushes[push.worker, push.seq] = push",
    ),
    "a dropped worker is not told": (
        "server",
        " or self.dropped.get(member.id) == member.session",
        "",
    ),
    "a drop is that of all": (
        "server",
        "self.dropped |= {id: session} if drops else {}",
        "self.stopping |= {id} if drops else set()",
    ),
    "stop turns away who was cut off": (
        "server",
        "known = member.id in self.indices or member.id in self.stopping",
        "known = False",
    ),
    "a life is not above those brought": (
        "server",
        "life(max([self.life, *(s.version.life for s in self.slices), *brought]))",
        'life("")',
    ),
    "joins do not wait for a fold": (
        "server",
        "id not in self.waiting or any(slice.folding for slice in self.slices)",
        "id not in self.waiting",
    ),
    "a push that is being folded is not there": (
        "server",
        "*(self.folding.pushes if self.folding else ())",
        "",
    ),
    "a step is believed": (
        "server",
        "self.step = min(step, self.begun[0] + self.pace * (rounds + LEAD))",
        "self.step = step",
    ),
    "the steps of a worker are counted by its first round": ("server", "(rounds + LEAD))", "LEAD)"),
    "a push of any size counts": (
        "server",
        "        for push, why in judged.items():\n            push.refused = why\n",
        "",
    ),
    "a sequence number follows the last one": (
        "server",
        "(self.known(id) or max(0, self.version.number)) + SEQ_AHEAD",
        "self.known(id) + 1",
    ),
    "a life is forgotten in a crash": (
        "server",
        'self.life, self.pace = names.get("life", ""), names.get("pace", 0)',
        'self.life, self.pace = "0" * 20, names.get("pace", 0)',
    ),
    "late ones alone close a round at once": (
        "server",
        "rules.quorum > 0 and not counting and now >= ends",
        "rules.quorum > 0",
    ),
    "a refused push has a weight": (
        "server",
        "[p for p in self.pushes if (p.steps or p.nbytes) and not p.refused]",
        "[p for p in self.pushes if p.steps or p.nbytes]",
    ),
    "late work weighs as much": ("server", "* (1 + push.stale) ** -rules.stale_weight", ""),
    "a part of an outer step counts as a whole one": ("server", "1 - closed.part", "0"),
    "a pace changes within a cycle": (
        "diloco_callback",
        "            if self.next == 0:\n                self.every",
        "            if True:\n                self.every",
    ),
    "an outbox place is cleared too early": (
        "diloco_callback",
        "if push is None or fate is None or fate.seq < push.seq:",
        "if push is None or fate is None:",
    ),
    "places are not aligned": (
        "diloco_callback",
        "if (k, steps) != (self.next, None):",
        "if False:",
    ),
    "a push that is sent anew is not counted as the turn's": (
        "diloco_callback",
        "turn + self.count * (turn <= passed)",
        "turn",
    ),
    "nothing is sent again": ("diloco_callback", "each.answered = False", "pass"),
    "the numbers that the server knows are not heeded": (
        "diloco_callback",
        "max(place.seq, seq) if place.pending is None else place.seq",
        "place.seq",
    ),
    "a push is made though the place is taken": (
        "diloco_callback",
        "        if place.pending:\n            return None\n",
        "",
    ),
    "closing pushes do not wait for a taken place": (
        "diloco_callback",
        "                break\n            if not place.is_closed",
        "                continue\n            if not place.is_closed",
    ),
    "closing pushes are made from the first slice on": (
        "diloco_callback",
        "[(self.next + i) % self.count for i in range(self.count)]",
        "list(range(self.count))",
    ),
    "steps of a checkpoint are left out": (
        "diloco_callback",
        "(place.mark[0] - steps, place.mark[1])",
        "place.mark",
    ),
    "a slice in full leaves old fates": (
        "diloco_callback",
        "known = fates if whole else {**place.folded, **fates}",
        "known = {**place.folded, **fates}",
    ),
    "a step is believed whatever it is": (
        "server",
        "self.step = min(step, self.begun[0] + self.pace * (rounds + LEAD))",
        "self.step = step",
    ),
    "steps of honest workers are not believed": (
        "server",
        "self.begun[0] + self.pace * (rounds + LEAD)",
        "self.begun[0] + self.pace * rounds",
    ),
    "a quorum does not wait for its grace": (
        "server",
        "return since + rules.grace\n",
        "return since\n",
    ),
    "a grace never ends": (
        "server",
        "return since + rules.grace\n",
        "return since + rules.grace + 1e9\n",
    ),
    "late ones count for a quorum of whole steps": (
        "server",
        'if rules.outer != "whole" or not push.late:',
        "if True:",
    ),
    "two processes of a worker are two of a quorum": (
        "server",
        "came[push.worker] = min(push.arrived, came.get(push.worker, math.inf))",
        "came[push.worker, push.seq] = push.arrived",
    ),
    "late ones alone are never over": (
        "server",
        "return rules.quorum > 0 and not counting and now >= ends",
        "return False",
    ),
    "who is missing has no share of a round": (
        "server",
        "if id in members and id not in there]",
        "if False]",
    ),
    "who has made no push has no share of a round": (
        "server",
        "whole += absent.count(None) * whole / max(1, len(full))",
        "pass",
    ),
    "steps at an own pace are not believed": (
        "server",
        "member.pace = run.pace ",
        "member.pace = run.pace // 2 ",
    ),
    "pushes are not judged by their norm": (
        "server",
        "if not push.refused and norm > ratio * usual and push.norm > whole",
        "if False",
    ),
}


def texts(changes):
    """name -> text of the product's files, with the rules changed."""
    found = {name: (ROOT / f"{name}.py").read_text() for name in ("server", "diloco_callback")}
    name, *pairs = changes
    for right, wrong in zip(pairs[::2], pairs[1::2], strict=True):
        assert found[name].count(right) == 1, f"not there once: {right}"
        found[name] = found[name].replace(right, wrong)
    return found


def broken(changes):
    """The simulator, with rules of the product changed."""
    for name, text in texts(changes).items():
        sys.modules[name] = types.ModuleType(name)
        exec(compile(text, f"{name}.py", "exec"), sys.modules[name].__dict__)
    sys.modules.pop("simulator", None)
    return importlib.import_module("simulator")


def seeds_until_found(changes, seeds):
    """After how many seeds a mutation is found, and as what; None where it is not."""
    simulator = broken(changes)
    for seed in range(seeds):
        try:
            fault, _ = simulator.fault_of(seed)
        except Exception as error:
            fault = repr(error)
        if fault:
            return seed + 1, fault
    return None, ""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3000)
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    missed = 0
    for name, changes in MUTATIONS.items():
        if " ".join(args.words) in name:
            count, fault = seeds_until_found(changes, args.seeds)
            missed += count is None
            print(f"{name:56} {count or 'NOT FOUND':>9}  {fault[:60]}", flush=True)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
