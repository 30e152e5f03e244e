"""Simulates whole runs under faults: no thread, no socket, no clock, thousands of runs a minute.

python tests/simulator.py --seeds 3000
python tests/simulator.py --seeds 1 --first 1234 --trace

A world grows from a seed. In it the product's own Run, Schedule and Outbox exchange the messages of
the protocol over lines that lose, repeat, delay and reorder them; processes freeze, die and come
back, as does the server. Each local step has a name, and the numbers of a slice say which names
they contain, so that a step which counts twice, or never, is seen.

What must hold: no name is in a slice twice; replicas at one version are equal; what was refused is
not in; everything ends; a step, a sequence number and a norm that are true are never doubted, and
one that is not never counts; each step of a process that lived to its end is in every slice or counted
as dropped, unless it was in a version that only this process held when the run reopened without it;
nothing was forced where all are awaited; a round closes neither before its quorum and grace nor long
after them; a round's share of an outer step is what its pushes weigh, and all of it where all are in.
`needless` counts the seconds in which a round is open
though none of those that it waits for will come to it before they go past it.
"""

import argparse
import pathlib
import random
import sys
import time
from collections import Counter

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from diloco_callback import Outbox, Schedule
from protocol import FRESH, NONE, Refused
from server import LEAST_NORMS, Member, Push, Reading, Rules, Run, newest

STEPS = 40
TIMEOUT = 40.0  # seconds, as Rules.worker_timeout; a tick of the world is a second
LIMIT = 2500  # ticks within which everything has ended

# Kinds of faults, each of which can be left out of a world. The number is the chance of it, of a
# message (lost, repeated), of a process and tick, of a push, or of a world.
FAULTS = {
    "lost": 0.06,
    "repeated": 0.12,
    "slow": 0.5,
    "cut": 0.004,
    "frozen": 0.004,
    "killed": 0.003,
    "gone": 0.25,
    "doubled": 0.002,
    "saved": 0.05,
    "parting": 0.0007,
    "crash": 0.6,
    "down": 0.5,
    "apart": 0.008,
    "clock": 0.3,
    "unsound": 0.02,
    "empty": 0.02,
    "outsized": 0.01,
    "lying": 0.3,
    "dropped": 0.004,
    "stale": 0.4,
    "quorum": 0.3,
    "least": 0.25,
    "stop": 0.3,
    "drop": 0.001,
    "late": 0.4,
    "unequal": 0.5,
    "change": 0.3,
    "folds": 0.6,
    "auto": 0.3,
    "part": 0.5,
    "weights": 0.3,
    "staleness": 0.3,
    "pace": 0.3,
}
# Faults after which workers may be out of step for a cycle, as they are where one has trained on in
# an outage. Worlds without these never wait needlessly.
ROUGH = {"quorum", "apart", "frozen", "killed", "doubled", "repeated", "cut", "parting"}


class Call:
    """A request on its way, and its answer."""

    __slots__ = ("answer", "broken_at", "kind", "member", "mute", "process", "server", "what")

    def __init__(self, process, kind, what, server, mute=False):
        self.process, self.kind, self.what, self.server = process, kind, what, server
        self.answer = self.member = self.broken_at = None  # tick when its process sees a dead line
        self.mute = mute  # whether the answer gets lost


class Crash(Exception):
    """The server's process ends here."""


class Server:
    """One process of the server: what its shell does around Run, without numbers and sockets."""

    def __init__(self, world):
        self.world, self.calls, self.folds, self.snapshot = world, [], [], None
        names, heads = world.names, world.heads
        self.run = Run(world.rules, world.now)
        self.run.anew.layout = world.layout
        self.expected = set(names["members"]) if names else set()
        if names:
            self.run.reopen(names, [head[:2] for head in heads], world.now)
            self.run.step = world.step
        self.numbers = [Counter(head[2]) for head in heads] or [Counter() for _ in world.slices]
        self.log = [[] for _ in world.slices]  # by slice: (base, version, names, fates, step)
        self.taken = [set() for _ in world.slices]  # by slice: (session, seq) in the open round
        self.known = [set() for _ in world.slices]  # by slice: (session, seq) ever taken
        self.turns = {}  # session -> latest turn that it has contributed to
        self.forced = 0  # rounds that were forced, as Run counts them
        self.parts = [[] for _ in world.slices]  # by slice: parts of an outer step of the rounds

    def point(self):
        """A place at which the server may crash."""
        self.world.points -= 1
        if self.world.points == 0 and self.world.is_chaos:
            raise Crash

    def save_names(self):
        self.point()
        self.world.names = self.run.names()
        self.point()

    def tick(self):
        run, now = self.run, self.world.now
        for member in run.silent(run.members, now):
            self.world.note("given up", member.id)
            self.turns.pop(member.session, None)
            run.remove(member.id, ends=False)
            self.save_names()
        for member in run.silent(run.waiting, now):
            run.forget(member.id, member.session)
        calls, self.calls = self.calls, []
        for call in calls:
            self.receive(call)
        for k in run.over(now):
            norms = run.slices[k].norms
            is_known = len(norms) >= LEAST_NORMS and max(each for each, _ in norms) < 10
            self.check_closing(k)
            round = run.take(k, now)
            self.check_share(round)
            for push in round.pushes:
                is_outsized = bool(push.norm) and push.norm > 1e5
                is_refused = "max-push-ratio" in push.refused
                assert is_outsized or not is_refused, f"slice {k}: {push.refused}"
                assert not is_outsized or push.refused or not is_known, f"slice {k}: outsized"
            self.world.note("closed", k, [(p.worker, p.seq) for p in round.pushes])
            lost = self.taken[k] - {(p.session, p.seq) for p in round.pushes}
            assert not lost, f"slice {k}: {lost} taken, but not in the round"
            self.taken[k].clear()
            self.folds.append((now + self.world.some("folds", (0, 0, 1, 5)), k))
            self.point()
        for fold in [fold for fold in self.folds if fold[0] <= now]:
            self.folds.remove(fold)
            self.publish(fold[1])
            self.point()
        self.checkpoint()

    def counting(self, k):
        """When the workers' contributions came that count for the quorum of slice k."""
        slice, is_whole = self.run.slices[k], self.world.rules.outer == "whole"
        head = slice.version.number
        pushes = [p for p in slice.pushes.values() if not is_whole or p.base.number >= head]
        workers = {push.worker for push in pushes}
        return sorted(min(p.arrived for p in pushes if p.worker == w) for w in workers)

    def check_closing(self, k):
        """The open round of slice k is about to close."""
        slice, rules, now = self.run.slices[k], self.world.rules, self.world.now
        if not self.run.missing(k) or self.run.forced > self.forced:
            self.forced = self.run.forced
            return
        counting = self.counting(k)
        assert rules.quorum, f"slice {k}: closed without {self.run.missing(k)}"
        if len(counting) >= rules.quorum:
            since = now - counting[rules.quorum - 1]
            assert since >= (rules.grace or 0), f"slice {k}: closed {since} s after the quorum"
        else:
            assert not counting, f"slice {k}: closed with {len(counting)} of {rules.quorum}"
            least = slice.closed_at + slice.took + (rules.grace or 0)
            assert now >= least, f"slice {k}: late ones alone closed it too early"

    def check_share(self, round):
        """A round's share of an outer step."""
        counted = [push for push in round.pushes if push.steps and not push.refused]
        is_late = self.world.rules.stale_weight and any(push.late for push in round.pushes)
        for push in counted if self.world.rules.weights == "equal" else ():
            late = max(0, round.base.number - push.base.number)
            # Of rounds before a crash whole ones.
            known = self.parts[round.k][-late:] if late else []
            weight = (1 + sum(known) + late - len(known)) ** -self.world.rules.stale_weight
            assert abs(push.weight - weight) < 1e-6, f"a push weighs {push.weight}, not {weight}"
        absent = set(round.members) - {push.worker for push in round.pushes}
        assert all(push.weight > 0 for push in counted), "a push that counts has no weight"
        if counted and not absent and not is_late:
            assert abs(round.share - 1) < 1e-9, f"a share of {round.share}, and all are in"
        elif counted:
            assert 0 < round.share < 1 or not absent & self.run.members.keys(), round.share
        if counted and self.world.rules.weights == "equal" and not is_late:
            there = len(counted) + len(absent & self.run.members.keys())
            assert abs(round.share - len(counted) / there) < 1e-9, f"a share of {round.share}"
        made = self.run.slices[round.k].made
        assert 0 <= made <= round.base.number or round.base.number < 0, f"{made} outer steps"

    def publish(self, k):
        round, numbers = self.run.slices[k].folding, self.numbers[k]
        names = [name for push in round.pushes if not push.refused for name in push.payload]
        numbers.update(names)
        for push in round.pushes:
            if push.refused:
                self.world.refused[k].update(push.payload)
            elif push.steps:
                late = round.base.number - push.base.number
                assert late <= self.world.rules.max_staleness, f"{late} rounds late, and counted"
        twice = [name for name in names if numbers[name] > 1]
        assert not twice, f"slice {k}: {twice} counted twice"
        made, part = (
            self.run.slices[k].made,
            1 if self.world.rules.outer == "whole" else round.share,
        )
        self.run.publish(k)
        made += part
        self.parts[k].append(part)
        assert abs(self.run.slices[k].made - made) < 1e-6, f"slice {k}: not {made} outer steps"
        self.log[k].append((round.base, round.version, names, round.fates, self.run.step))
        del self.log[k][: -self.world.kept]
        self.world.agree(k, round.version, numbers)
        self.world.fates[k, round.version] = dict(self.run.slices[k].folded)

    def checkpoint(self):
        """Copy slices, each while it is not being folded; the checkpoint counts once all are there."""
        if self.snapshot is None:
            if not self.run.is_open or self.world.random() > self.world.saves:
                return
            self.snapshot = {}
        for k, slice in enumerate(self.run.slices):
            if k not in self.snapshot and not slice.folding:
                self.snapshot[k] = slice.version, dict(slice.folded), Counter(self.numbers[k])
                self.point()
        if len(self.snapshot) == len(self.run.slices):
            self.keep([self.snapshot[k] for k in range(len(self.snapshot))])
            self.snapshot = None

    def keep(self, heads):
        """A checkpoint is whole."""
        self.world.heads, self.world.step = heads, self.run.step
        self.world.layout = self.run.anew.layout

    def receive(self, call):
        """Answer a request, or keep it until that is possible."""
        if call.kind == "join" and call.mute and (call.process.fate or call.process.is_finished()):
            return  # sent before its process left, over a line that is closed
        try:
            answer = getattr(self, "on_" + call.kind)(call, call.process)
        except Refused as no:
            answer = ("refused", no.code)
        if answer is None:
            if call.broken_at is None or self.world.now < call.broken_at + 5:
                self.calls.append(call)
                call.process.reached = self.world.now
            elif call.member:
                self.run.forget(call.process.id, call.process.session)
            return
        self.point()
        if not call.mute:
            self.world.post(self.world.latency(), self.world.reply, (call, answer))

    def on_join(self, call, process):
        run, now, id = self.run, self.world.now, process.id
        if call.member is None:
            what = {name: value for name, value in call.what.items() if name != "again"}
            call.member = Member(id=id, session=process.session, **what)
            self.check_layout(call.member, call.what["again"])
            run.ask(call.member, now)
        if run.waiting.get(id) is not call.member:
            if id in run.members and run.members[id].session == process.session:
                return self.joined(id)
            return ("again",)
        if not call.mute and call.broken_at is None:
            run.here(id, process.session, now)
        if run.anew.is_left_behind(id):
            run.anew.turn_away(id)
            raise Refused("model", "other tensors than the run's")
        if run.anew.lays_out(id, now):
            self.lay_out(call.member)
        if asked := run.lacking(id, now):
            return "bring", asked
        if not run.may_enter(id, now):
            return None
        was_open = run.is_open
        entered = run.enter(id, now, self.world.life)
        for new in entered:
            self.world.entered.setdefault(run.members[new].session, now)
            self.recall(run.members[new])
        self.world.note("entered", entered, [tuple(slice.version) for slice in run.slices])
        if not was_open:
            self.world.opened(self, entered)
        self.save_names()
        return self.joined(id)

    def check_layout(self, member, again):
        """A worker that comes back with other tensors leaves the run until all do."""
        run, id = self.run, member.id
        if run.anew.is_stale(member):
            raise Refused("rejoin", "an older join")
        if run.holder(id, member.session, self.world.now) or run.anew.fits(member):
            return
        if not (again and (id in run.members or id in run.expected)):
            raise Refused("model", "other tensors than the run's")
        if id in run.members:
            run.anew.expect(id, self.world.now)
            self.world.note("changes", id)
            self.world.changes += 1
            self.save_names()

    def lay_out(self, member):
        """The run goes on with other tensors, which have the numbers of before."""
        run, world = self.run, self.world
        assert not any(slice.folding for slice in run.slices), "laid out anew amid a fold"
        run.anew.lay_out(member.layout, len(run.slices), world.has_all)
        world.note("lays out anew", member.id, tuple(run.anew.before))
        self.log, self.snapshot = [[] for _ in world.slices], None
        self.parts = [[] for _ in world.slices]
        self.taken = [set() for _ in world.slices]

    def recall(self, member):
        """The open push of the predecessor of a process that is resumed is not missed."""
        for k, slice in enumerate(self.run.slices):
            if member.resumes[k] == slice.version:
                taken = self.taken[k]
                own = {name for name in taken if name[0][0] == member.id}
                taken -= {name for name in own if name[0] != member.session}

    def joined(self, id):
        run = self.run
        versions = [slice.version for slice in run.slices]
        member = run.members[id]
        place = run.place(id, self.world.now), run.known(id), versions
        return "join", *place, member.step, run.paces.of(member, self.world.now)

    def on_bring(self, call, process):
        run, now, id = self.run, self.world.now, process.id
        if call.member is None:
            if not run.here(id, process.session, now):
                return ("again",)
            call.member = run.waiting[id]
            for k, (version, numbers) in call.what.items():
                if k in run.lacking(id, now) and run.waiting[id].versions[k] == version:
                    if version > (run.anew.held or NONE):  # else the server's are as new
                        self.numbers[k] = Counter(numbers)
                    run.bring(id, k)
                    self.point()
        return self.on_join(call, process)

    def on_push(self, call, process):
        push, payload, is_sound, facts = call.what
        self.run.hear(process.id, process.session, self.world.now)
        if self.run.slices[push["k"]].folding:
            return None
        push = Push(worker=process.id, session=process.session, payload=payload, **push)
        push.refused = "" if is_sound else "the pseudo-gradient is not finite"
        self.world.pushes += 1
        claimed = push.step
        member, turn = self.run.members[process.id], self.run.turn(push.k)
        process.is_ahead |= member.since[push.k] > self.run.slices[push.k].version.number
        is_taken = self.run.push(push, self.world.now)
        self.check_step(member, claimed)
        self.note(member, facts, is_push=True)
        if is_taken:
            self.turns[push.session] = max(turn, self.turns.get(push.session, 0))
            self.taken[push.k].add((push.session, push.seq))
            self.known[push.k].add((push.session, push.seq))
        return "push", is_taken

    def on_pull(self, call, process):
        k, held, seq = call.what
        if call.member is None:
            call.member = self.run.hear(process.id, process.session, self.world.now)
        elif self.run.members.get(process.id) is not call.member:
            raise Refused("rejoin", "no member any more")
        slice = self.run.slices[k]
        fate = slice.folded.get(process.id)
        if seq and (fate is None or fate.seq < seq):
            if self.run.is_there(k, process.id, seq):
                return None
            assert (process.session, seq) not in self.known[k], "asked for a push that is here"
            return ("again",)
        found = []
        for base, version, names, fates, step in self.log[k]:
            if base == held:
                found.append((base, version, names, fates, step))
                held = version
                if seq and process.id in fates and fates[process.id].seq >= seq:
                    break
        if found and (seq or held == slice.version):
            return "entries", found
        return "slice", (slice.version, dict(slice.folded), Counter(self.numbers[k]))

    def on_heartbeat(self, call, process):
        member = self.run.hear(process.id, process.session, self.world.now)
        for name in ("blocked", "step", "position", "speed"):
            setattr(member, name, call.what[name])
        self.note(member, call.what["facts"], is_push=False)
        member.reach(call.what["step"], newest(self.run.slices))
        self.check_step(member, call.what["step"])
        is_told, world = self.run.is_to_finish(member), self.world
        assert is_told or process.session not in world.dropped, f"{process.session} is not told"
        is_meant = 0 < world.stop_at <= world.now or process.session in world.dropping
        assert is_meant or not is_told, f"{process.session} is told to finish"
        return ("heartbeat", is_told, self.run.paces.of(member, world.now))

    def note(self, member, facts, is_push):
        """What a message says of a process's speed."""
        member.cycle, *reading = facts
        self.run.paces.note(member, Reading(*reading), is_push)

    def check_step(self, member, claimed):
        """Steps of honest workers are believed, unless they have trained on without the server."""
        honest = [process.furthest for process in self.world.processes if not process.lies]
        openings = 1 + self.world.crashes + self.world.kills + self.world.changes
        openings += len(self.world.dropping)
        most = max(honest, default=0) + 100 * openings  # who comes in has a lead
        assert self.run.step <= most, f"the run is at {self.run.step}, over {most}"
        may_skip = member.sync_every < self.world.delay  # which no DiLoCoWorker allows
        # Who goes on from the furthest one's step goes on from a liar's, which is as high as can be.
        may_skip |= self.world.rules.own_pace and self.world.has_liar
        if self.world.is_even and claimed < 1 << 50 and not may_skip:
            assert member.step == claimed, f"{member.id} is at {claimed}, not {member.step}"

    def on_leave(self, call, process):
        self.run.hear(process.id, process.session, self.world.now)
        self.run.remove(process.id, ends=True)
        self.world.note("left", process.id)
        self.world.dropped.discard(process.session)  # it has finished, whatever comes late of it
        if not self.run.is_open and not any(slice.folding for slice in self.run.slices):
            slices = zip(self.run.slices, self.numbers, strict=True)
            self.keep([(s.version, dict(s.folded), Counter(n)) for s, n in slices])
        self.save_names()
        return ("leave",)


class Process:
    """One process of a worker: what the callback does around Schedule and Outbox."""

    def __init__(self, world, id, last, born, saved=None):
        self.world, self.id, self.last, self.wakes = world, id, last, born
        self.session = f"{id}{len(world.processes)}"
        slices = world.slices
        self.every, self.slowness = world.pace[id]
        self.outbox = Outbox(id, len(slices))
        self.schedule = Schedule(self.every, world.fragments, len(slices))
        self.step = self.heartbeat_at = 0
        self.names = [{} for _ in slices]  # by slice: local step -> name
        self.numbers = [Counter() for _ in slices]  # by slice: names in the anchor
        self.must = [set() for _ in slices]  # by slice: names that have to count in the end
        self.dropped = [set() for _ in slices]  # by slice: names that count as dropped
        self.excused = [set() for _ in slices]  # by slice: names lost with a version
        self.resumes = [NONE for _ in slices]
        self.payloads, self.news = {}, [None for _ in slices]
        self.control = self.upload = None  # calls under way
        self.pulls = [None for _ in slices]
        self.behind = set()  # slices to catch up with after a join
        self.skipped = set()  # slices whose place was taken when they were to be pushed
        self.next = ("join",)  # next request on the control connection
        self.ticked, self.ending, self.parting, self.fate = True, False, None, ""
        self.is_ahead = False
        self.layout, self.again, self.is_changing = 0, False, False
        self.ahead = None  # steps of the run that others have made before or beside it
        self.trained = self.waited = 0.0  # seconds
        self.lies = world.has_liar and id == "z"
        self.reached = world.now
        if saved:
            self.saved, position, self.layout = saved[:-2], *saved[-2:]
            self.schedule.resume(*position)
            for k, (version, seq, _) in enumerate(self.saved):
                self.resumes[k], self.outbox.places[k].seq = version, seq

    # --- Messages ---

    def talk(self):
        """Read the answers that have come, and begin the next requests."""
        if call := self.ended("control"):
            self.answered(call)
        if self.control is None and not self.fate:
            self.control = self.request()
        if call := self.ended("upload"):
            push, (kind, *_) = call.what[0], call.answer
            self.note_refusal(call)
            pending = self.outbox.places[push["k"]].pending
            if kind == "push" and pending and pending.seq == push["seq"]:
                pending.answered = True
        for k, call in enumerate(self.pulls):
            if call and (call.answer or self.is_broken(call)):
                self.pulls[k] = None
                if call.answer:
                    self.note_refusal(call)
                    self.pulled(k, call)
        if not self.is_in:
            return
        if self.upload is None and (push := self.outbox.upload()):
            self.upload = self.world.send(self, "push", self.payloads[push])
        for k, place in enumerate(self.outbox.places):
            if self.pulls[k] is None and self.news[k] is None:
                if k in self.behind:
                    self.pulls[k] = self.world.send(self, "pull", (k, place.version, 0))
                elif place.pending and place.pending.answered:
                    what = k, place.version, place.pending.seq
                    self.pulls[k] = self.world.send(self, "pull", what)

    def ended(self, name):
        """The call of a connection if its answer is here; None, too, where the line broke."""
        call = getattr(self, name)
        if call and (call.answer or self.is_broken(call)):
            setattr(self, name, None)
            if call.answer:
                return call
        return None

    def is_broken(self, call):
        return call.broken_at is not None and call.broken_at <= self.world.now

    def note_refusal(self, call):
        if call.answer == ("refused", "rejoin"):
            self.next = ("join",)

    @property
    def furthest(self):
        """The step of the run that it has reached."""
        return self.step + (self.ahead or 0)

    @property
    def claims(self):
        """The step that it says it has reached."""
        return 1 << 50 if self.lies else self.furthest

    @property
    def is_in(self):
        return self.next is None

    def request(self):
        """The next request on the control connection."""
        world, outbox = self.world, self.outbox
        if self.next == ("join",):
            self.interrupt()
            what = {
                "versions": [place.version for place in outbox.places],
                "resumes": list(self.resumes),
                "folded": [dict(place.folded) for place in outbox.places],
                "closed": set(outbox.closed),
                "step": self.claims,
                "sync_every": self.every,
                "fragments": world.fragments,
                "layout": self.layout,
                "again": self.again,
            }
            return world.send(self, "join", what)
        if self.next:
            slices = self.next[1]
            what = {k: (outbox.places[k].version, Counter(self.numbers[k])) for k in slices}
            return world.send(self, "bring", what)
        if self.is_finished():
            return world.send(self, "leave", None)
        if world.now < self.heartbeat_at:
            return None
        self.heartbeat_at = world.now + 3
        what = {
            "blocked": outbox.blocked(self.step),
            "step": self.claims,
            "position": self.schedule.position,
            "speed": 1 - self.slowness,
            "facts": self.facts(),
        }
        return world.send(self, "heartbeat", what)

    def facts(self):
        """What it says of its speed."""
        return self.schedule.every, self.step, self.trained, self.waited

    def interrupt(self):
        """Before a join: adopt what has come, and give up what is under way."""
        for k, news in enumerate(self.news):
            if news:
                self.adopt(k)
        self.upload, self.pulls = None, [None for _ in self.pulls]

    def answered(self, call):
        """An answer on the control connection."""
        kind, *rest = call.answer
        if kind == "refused":
            self.refused(call, *rest)
        elif kind == "again":
            self.next = ("join",)
        elif kind == "bring":
            self.next = call.answer
        elif kind == "join":
            self.joined(*rest)
        elif kind == "heartbeat":
            self.ending |= rest[0]
            self.schedule.pace = rest[1]
        elif kind == "leave":
            self.fate = "parted" if self.parting else "ended"

    def refused(self, call, code):
        if call.kind == "leave":  # it has ended all the same, and does not see what is lost
            for k, numbers in enumerate(self.world.server.numbers if self.world.server else ()):
                self.excused[k] |= self.must[k] - numbers.keys()
            self.fate = "parted" if self.parting else "ended"
        elif code == "rejoin":
            self.next = ("join",)
        elif code == "model":
            is_new = not self.step and not self.is_changing
            assert is_new or self.again or not self.world.is_gentle, f"{self.session} is no misfit"
            self.world.misfits += 1
            self.fate = "turned away"
        elif code == "stopping":
            assert self.step == 0, f"{self.session} was turned away with its steps"
            self.fate = "turned away"
        else:
            self.next = ("join",)  # a dead predecessor holds the id still
            if any(place.version > FRESH for place in self.outbox.places):
                self.fate = "replaced"

    def joined(self, place, known, versions, step, pace):
        self.schedule.pace = pace
        if self.ahead is None:
            self.ahead = step
            if not self.step and not any(version > FRESH for version in self.resumes):
                self.schedule.every = max(pace or self.every, self.schedule.fragments)
        self.world.note(self.session, "joined", place, known)
        self.schedule.align(*place, self.outbox.know(known))
        self.outbox.max_staleness = self.world.rules.max_staleness
        for k, mine in enumerate(self.outbox.places):
            if mine.version != versions[k] and not mine.pending:
                self.behind.add(k)  # the others come up when their push, sent again, is answered
        self.outbox.resend()
        self.next = None

    def pulled(self, k, call):
        kind = call.answer[0]
        pending = self.outbox.places[k].pending
        if kind == "again" and pending and pending.seq == call.what[2]:
            self.outbox.resend(pending)
        elif kind in ("entries", "slice"):
            self.news[k] = call.answer
            if k in self.behind:
                self.adopt(k)

    # --- Training ---

    def train(self):
        """Go on until something has to be waited for, or a step has been made."""
        must_wait = not self.step or self.ending or not self.is_cut_off
        if (self.next or self.behind) and must_wait:  # for a join, but not in an outage
            return
        if self.parting is not None:
            return self.close()
        if self.is_changing:
            return self.change()
        if not self.settle():
            return
        if not self.ticked:
            self.ticked = True
            every, due = self.schedule.every, self.schedule.tick()
            is_end = len(self.names) - 1 in due
            assert is_end or self.schedule.every == every, "a pace changes within a cycle"
            for k in due:
                self.make(k)
            if not self.settle():
                return
        if self.step >= self.last or self.ending:
            self.ending = True
            self.close()
        elif self.is_in and 0 < self.world.change_at <= self.furthest and not self.layout:
            self.is_changing = True
            self.change()
        elif self.makes_step():
            self.step += 1
            self.ticked = False
            for names, must in zip(self.names, self.must, strict=True):
                names[self.step] = f"{self.session}.{self.step}"
                must.add(names[self.step])

    def makes_step(self):
        """Whether a second of training ends a step."""
        self.trained += 1
        return self.world.random() >= self.slowness

    def change(self):
        """Close all slices, then join anew with other tensors, as the product's Anew does."""
        self.close()
        if not self.outbox.is_closed or any(self.news) or self.behind:
            return
        self.outbox = self.outbox.renewed(len(self.outbox.places), self.step, self.step)
        self.layout, self.again, self.is_changing = 1, True, False
        self.skipped.clear()
        self.control, self.next = None, ("join",)

    @property
    def is_cut_off(self):
        return self.world.now - self.reached > self.world.patience

    def settle(self):
        """Adopt what is due. False where that has to be waited for."""
        for k, place in enumerate(self.outbox.places):
            while place.pending and (place.pending.late or self.outbox.is_due(k, self.step)):
                if self.news[k]:
                    self.adopt(k)
                elif place.pending.late:
                    break
                elif self.is_cut_off and not self.ending:
                    place.pending.late = True
                    self.world.is_even = False
                else:
                    self.waited += 1
                    return False
        return True

    def make(self, k, closing=False):
        delay = -(-self.world.delay * self.schedule.every // self.every)
        push = self.outbox.make(k, self.step, self.step, delay, closing)
        if push:
            self.enclose(push)
            self.skipped.discard(k)
        else:
            self.skipped.add(k)

    def enclose(self, push):
        """What travels: a push is encoded once, and is the same however often it is sent."""
        world, k = self.world, push.k
        names = [self.names[k].pop(step) for step in range(push.first + 1, push.last + 1)]
        fields = {
            "k": k,
            "seq": push.seq,
            "base": push.base,
            "steps": push.steps,
            "closing": push.closing,
            "step": self.claims,
            "norm": push.steps * world.rng.choice([0.5, 1.0, 2.0]) or None,
        }
        if push.steps and world.hits("outsized"):
            fields["norm"] *= 1e6
        if world.hits("empty"):  # not finite, and so not encoded
            self.dropped[k].update(names)
            names, fields["steps"], fields["norm"] = [], 0, None
        fields["adopts"] = world.now + 2.0 * push.adopt_at - 2.0 * push.last if world.delay else 0.0
        fields["tokens"] = push.steps * 100
        self.payloads[push] = fields, names, not world.hits("unsound"), self.facts()
        world.note(self.session, "made", k, push.seq, tuple(push.base), names, push.closing)

    def adopt(self, k):
        """The anchor of slice k moves, and local parameters with it."""
        world, (kind, found), self.news[k] = self.world, self.news[k], None
        self.behind.discard(k)
        if kind == "slice":
            version, fates, numbers = found
            self.excused[k] |= self.numbers[k].keys() - numbers.keys()
            self.numbers[k] = numbers
            self.listed(k, version, fates, True)
            if self.resumes[k] != NONE:
                self.resume(k, version)
        else:
            for base, version, names, fates, step in found:
                if self.world.rules.own_pace and self.ahead is not None:
                    self.ahead = max(self.ahead, step - self.step)
                if base != self.outbox.places[k].version:
                    return  # moved on by a join in between
                self.numbers[k].update(names)
                self.listed(k, version, fates, False)
        place = self.outbox.places[k]
        world.agree(k, place.version, self.numbers[k])
        fates = world.fates.get((k, place.version), place.folded)
        others = place.folded.items() - {(self.id, place.folded.get(self.id))}
        wrong = [id for id, fate in others if fates.get(id) != fate]
        assert not wrong, f"slice {k}: wrong fates of {wrong} at {tuple(place.version)}"
        if world.hits("apart"):  # the server crashes, and who holds the newest version is away
            self.wakes, world.points = world.now + world.rng.randrange(30, 150), 1
        if world.hits("dropped"):
            for k, first, last in self.outbox.drop(self.step, self.step):
                gone = [self.names[k].pop(step) for step in range(first + 1, last + 1)]
                self.dropped[k].update(gone)

    def listed(self, k, version, fates, whole):
        push, why = self.outbox.take(k, version, fates, whole, self.step)
        if push:
            _, names, *_ = self.payloads.pop(push)
            self.world.note(self.session, "adopts", k, push.seq, tuple(version), why)
            if why:
                self.dropped[k].update(names)

    def resume(self, k, version):
        """Steps of a checkpoint count on where the slice is at the version they started from."""
        saved, _, names = self.saved[k]
        self.resumes[k] = NONE
        if version == saved:
            self.outbox.resume(k, version, len(names))
            first = self.outbox.places[k].mark[0]
            self.names[k].update({first + 1 + i: name for i, name in enumerate(names)})
            self.must[k].update(names)
            self.world.again[k].update(dict.fromkeys(names, self.session))

    def save(self):
        """Write a checkpoint. A slice whose push is out is resumed from the global slice."""
        saved = []
        for k, place in enumerate(self.outbox.places):
            if place.pending or k in self.behind or self.resumes[k] != NONE:
                saved.append((NONE, place.seq, []))
            else:
                steps = range(place.mark[0] + 1, self.step + 1)
                saved.append((place.version, place.seq, [self.names[k][step] for step in steps]))
        place = self.schedule.position, self.schedule.every
        self.world.saved[self.id] = [*saved, place, self.layout]

    def close(self):
        if self.parting is None:
            made = self.outbox.close(self.schedule.order(), self.step, self.step)
            for push in made:
                self.enclose(push)
            for k, news in enumerate(self.news):
                if news:
                    self.adopt(k)
        elif not self.ending and self.is_in:
            self.ending = True
            for k in self.schedule.order():
                if not self.outbox.places[k].is_closed:
                    self.make(k, closing=True)
            for k, first, last in self.outbox.drop(self.step, self.step):
                gone = [self.names[k].pop(step) for step in range(first + 1, last + 1)]
                self.dropped[k].update(gone)

    def is_finished(self):
        if self.parting is None:
            return self.ending and self.outbox.is_closed
        return self.ending and not self.outbox.upload()

    # --- Faults ---

    def suffer(self):
        """Faults of a tick. True where the process does not act now."""
        world = self.world
        if self.is_in and world.hits("saved") and not (self.ending or self.is_changing):
            self.save()
        if world.hits("frozen"):
            self.wakes = world.now + world.rng.randrange(1, 120)
        if world.hits("cut"):
            for call in [self.control, self.upload, *self.pulls]:
                if call:
                    call.broken_at, call.mute = world.now, True
        if world.hits("killed"):
            self.fate = "killed"
            world.kills += 1
            if world.random() < 0.7:  # its machine says that it has ended
                world.free(self)
            if not world.hits("gone"):
                world.replace(self)
        elif world.hits("doubled"):
            self.wakes = world.now + world.rng.randrange(30, 200)
            world.replace(self)
        elif (
            world.hits("parting")
            and self.step
            and self.is_in
            and not (self.ending or self.is_changing)
        ):
            self.parting = world.now
        return self.fate or world.now < self.wakes

    def act(self):
        if self.fate or (self.world.now < self.wakes and self.world.is_chaos):
            return
        if self.world.is_chaos and self.suffer():
            return
        self.talk()
        if not self.fate:
            self.train()


class World:
    """Everything there is, grown from a seed. `without`: faults that are left out."""

    def __init__(self, seed, without=(), trace=None):
        self.rng = rng = random.Random(seed)
        self.random, self.without, self.trace = rng.random, without, trace
        self.now, self.is_chaos, self.mail = 0.0, True, {}
        self.is_gentle = self.is_even = rng.random() < 0.25
        self.fragments = rng.choice([1, 1, 2, 3, 4])
        self.slices = range(self.fragments + (rng.random() < 0.3))
        every = rng.choice([4, 6, 8])
        self.delay = rng.choice([0, 0, rng.randrange(every + 1)])
        self.calm = rng.randrange(30, 250)
        self.slowest = rng.choice([1, 2, 6]) if self.has("slow") else 0
        self.patience, self.kept = rng.choice([5, 30]), rng.choice([1, 3, 100])
        self.saves, self.lives, self.skew = rng.choice([0, 0.02, 0.2]), 0, 0
        self.crashes = self.kills = self.pushes = self.forced = self.needless = 0
        self.points = rng.choice([20, 200, 1000])
        self.points = rng.randrange(1, self.points) if self.has("crash") else 0
        wanted = rng.choice([1, 2, 3, 4])
        self.rules = Rules(
            workers=wanted,
            quorum=rng.choice([1, 2]) if self.has("quorum") else 0,
            grace=None if self.has("auto") else float(rng.choice([0, 3, 20])),
            outer=rng.choice(["fractional", "delayed"]) if self.has("part") else "whole",
            weights=rng.choice(["steps", "tokens"]) if self.has("weights") else "equal",
            stale_weight=0.5 if self.has("staleness") else 0.0,
            own_pace=self.has("pace"),
            min_workers=2 if self.has("least") and wanted > 1 else 1,
            max_staleness=rng.choice([1, 3]) if self.has("stale") else 1 << 30,
            worker_timeout=TIMEOUT,
        )
        unequal = self.has("unequal")
        self.pace = {
            id: (rng.choice([4, 6, 8]), rng.choice([0, 0.3, 0.8])) if unequal else (every, 0.1)
            for id in "abcdz"
        }
        self.change_at = rng.randrange(1, STEPS) if self.has("change") else 0  # step of the run
        self.has_all = rng.random() < 0.5  # whether the server has all numbers of a change
        self.layout = self.changes = self.misfits = 0
        self.stop_at = rng.randrange(20, 150) if self.has("stop") else 0
        self.dropping, self.dropped = set(), set()  # sessions told to finish, also on disk
        self.has_liar = self.has("lying")
        self.step = 0  # of the run, on disk
        self.names, self.heads, self.saved = None, [], {}  # on disk: the server's, and workers'
        self.truth, self.fates = {}, {}  # (slice, version) -> names in it, fates known by then
        self.refused = [set() for _ in self.slices]  # by slice: names in pushes listed as refused
        self.again = [{} for _ in self.slices]  # by slice: name -> session that resumed with it
        self.processes, self.down_until = [], 0
        self.entered = {}  # session -> tick of its first entry
        self.server = Server(self)
        for id in "abcd"[:wanted]:
            self.start(id, self.last(), 0)
        if self.has("late"):
            self.start("z", rng.randrange(1, STEPS), rng.randrange(1, 100))

    # --- Chance ---

    def has(self, fault):
        """Whether this world knows a fault."""
        known = fault not in self.without and not (self.is_gentle and fault in ROUGH)
        return self.rng.random() < FAULTS[fault] and known

    def hits(self, fault):
        chance = FAULTS[fault] * self.is_chaos * (fault not in self.without)
        return self.random() < chance and not (self.is_gentle and fault in ROUGH)

    def some(self, fault, values):
        return self.rng.choice(values) if self.is_chaos and fault not in self.without else 0

    def last(self):
        return self.rng.choice([STEPS, STEPS, self.rng.randrange(1, STEPS)])

    def latency(self):
        return self.rng.randrange(self.slowest + 1) if self.slowest and self.is_chaos else 0

    def life(self, after):
        """The name of a life; clocks of machines may be behind."""
        clock = self.now - self.rng.choice([0, 50, 500]) * self.has("clock")
        self.lives += 1
        past = int(after[:10], 16) if after else 0
        return f"{max(past + 1, int(clock) + 1000):010x}{self.lives:010x}"

    def note(self, *what):
        if self.trace is not None:
            self.trace.append(f"{self.now:6.0f}  " + " ".join(map(str, what)))

    # --- Messages ---

    def send(self, process, kind, what):
        call, rng = Call(process, kind, what, self.server), self.rng
        if self.server is None:
            call.broken_at = self.now + 1 + rng.randrange(3)
            return call
        delay = self.latency() + (rng.randrange(20) if kind == "bring" and self.is_chaos else 0)
        if self.hits("lost"):
            call.broken_at, call.mute = self.now + 1 + rng.randrange(9), True
            if rng.random() < 0.5:
                return call
        self.post(delay, self.arrive, call)
        if kind != "bring" and kind != "pull" and self.hits("repeated"):
            copy = Call(process, kind, what, self.server, mute=True)
            copy.broken_at = self.now + 100
            self.post(delay + rng.randrange(1, 60), self.arrive, copy)
        return call

    def post(self, delay, action, what):
        if delay:
            self.mail.setdefault(self.now + delay, []).append((action, what))
        else:
            action(what)

    def arrive(self, call):
        if call.server is self.server:
            self.server.calls.append(call)

    def reply(self, what):
        call, answer = what
        call.answer = answer
        call.process.reached = self.now

    def free(self, process):
        if self.server:
            self.server.run.free(process.id, process.session)

    # --- Processes ---

    def start(self, id, last, born, saved=None):
        self.processes.append(Process(self, id, last, born, saved))

    def process(self, session):
        return next(process for process in self.processes if process.session == session)

    def replace(self, process):
        saved = self.saved.get(process.id) if self.random() < 0.6 else None
        born = self.now + self.rng.choice([0, 3, 20, 90])
        self.note(process.session, "is replaced at", born, "resumed" if saved else "fresh")
        self.start(process.id, self.rng.randrange(1, STEPS), born, saved)

    def crash(self):
        self.note("the server crashes")
        self.crashes += 1
        self.forced += self.server.run.forced
        self.server = None
        self.points = self.rng.choice([0, 3, 30, 300, 1500]) and self.rng.randrange(1, 1500)
        self.down_until = self.now + self.some("down", (0, 1, 5, 60))
        for process in self.processes:
            for call in [process.control, process.upload, *process.pulls]:
                if call and call.answer is None:
                    call.broken_at = self.now + self.rng.randrange(5)

    # --- What must hold ---

    def agree(self, k, version, numbers):
        """Two replicas at one version are equal."""
        if version == FRESH:
            return
        first = self.truth.setdefault((k, version), numbers)
        if first is numbers:
            self.truth[k, version] = Counter(numbers)
        assert first == numbers, f"slice {k}: two models of {tuple(version)}"

    def opened(self, server, entered):
        """A run goes on from the newest version that anybody who waits holds. What processes that
        have ended had pushed may be lost with a version that nobody holds any more."""
        run = server.run
        for k, slice in enumerate(run.slices):
            self.agree(k, slice.version, server.numbers[k])
            self.fates.setdefault((k, slice.version), dict(slice.folded))
            for id in entered:
                held = run.members[id].versions[k]
                assert held <= slice.version, f"slice {k}: {id} holds {held}, not {slice.version}"
                assert held.life < run.life, f"slice {k}: {id} holds {held}, not before {run.life}"
        if self.now - run.began <= TIMEOUT:
            gone = server.expected - set(entered) - run.waiting.keys()
            assert not gone, f"opened without {gone}, who may come"
        server.expected = set()
        self.excuse(server)

    def excuse(self, server):
        for process in self.processes:
            if process.fate in ("ended", "parted"):
                for k, numbers in enumerate(server.numbers):
                    process.excused[k] |= process.must[k] - numbers.keys()

    def wait(self):
        """Count the rounds that are open though none of those that they wait for comes to them, or
        that wait for one who came later. With a quorum they wait for the grace only."""
        run = self.server.run
        if self.rules.quorum:
            return self.overdue(run)
        for k, slice in enumerate(run.slices):
            if slice.pushes and not slice.folding and run.has_enough(k):
                missing = run.missing(k)
                for id in missing:
                    session = run.members[id].session
                    outbox = self.process(session).outbox
                    assert not outbox.places[k].is_closed, f"slice {k}: {id} has closed it"
                    is_past = self.server.turns.get(session, -1) > run.turn(k)
                    assert not is_past, f"slice {k}: {id} is past it"
                first = min(push.arrived for push in slice.pushes.values())
                early = [id for id in missing if self.entered[run.members[id].session] > first]
                if early or (missing and not any(self.may_come(run, id, k) for id in missing)):
                    self.needless += 1
                    self.note("needless", k, missing)

    def overdue(self, run):
        """A round that has its quorum closes when the grace is over, and one that has late ones only
        after the length of the last one too."""
        quorum, grace = self.rules.quorum, self.rules.grace
        for k, slice in enumerate(run.slices):
            counting = self.server.counting(k)
            if grace is None or not slice.pushes or slice.folding or not run.has_enough(k):
                continue
            if len(counting) >= quorum:
                since = self.now - counting[quorum - 1] - grace
                assert since <= 1, f"slice {k}: {since} s over the grace"
            elif not counting:
                first = min(push.arrived for push in slice.pushes.values())
                since = min(self.now - slice.closed_at - slice.took - grace, self.now - first)
                assert since <= 1, f"slice {k}: late ones only, {since} s over their time"

    def may_come(self, run, id, k):
        """Whether a member will push slice k before a push of a later turn."""
        process = self.process(run.members[id].session)
        if process.fate == "killed" or self.now < process.wakes or not process.is_in:
            return True
        outbox = process.outbox
        if outbox.upload():
            return True  # a push is on its way still
        if k in process.skipped:
            return True  # those steps go with the next push, as they have to
        if process.is_ahead:
            return True  # a push of it has landed in a round that had begun without it
        for j in process.schedule.order():
            if j == k:
                return not outbox.places[k].is_closed
            is_skipped = outbox.places[j].pending or outbox.places[j].is_closed
            if run.turn(j) > run.turn(k) and not is_skipped:
                return False
        return True

    def check(self):
        for k, numbers in enumerate(self.server.numbers):
            for process in self.processes:
                if process.fate not in ("ended", "parted"):
                    continue
                # A name that another process resumed with, from a checkpoint, is that one's: what
                # became of its predecessor's push was in a version that is lost, or recalled.
                others = {n for n, whose in self.again[k].items() if whose != process.session}
                both = [name for name in process.dropped[k] - others if numbers[name]]
                assert not both, f"slice {k}: {both[:5]} counted though refused"
                lost = process.must[k] - numbers.keys() - process.dropped[k] - process.excused[k]
                if process.fate == "parted":  # it does not hear of it
                    lost -= self.refused[k]
                assert not lost, f"slice {k}: lost {sorted(lost)[:5]} of {process.session}"
        forced = self.forced + self.server.run.forced
        assert self.rules.quorum or not forced, f"{forced} rounds forced"
        assert not self.is_even or not self.needless, f"{self.needless} s of needless waiting"

    # --- Time ---

    def simulate(self):
        for tick in range(LIMIT):
            self.now, self.is_chaos = self.now + 1.0, tick < self.calm
            for action, what in self.mail.pop(self.now, ()):
                action(what)
            order = list(self.processes)
            self.rng.shuffle(order)
            for process in order:
                process.act()
            if self.server is None and (self.now >= self.down_until or not self.is_chaos):
                self.server = Server(self)
            if self.server:
                try:
                    self.serve()
                except Crash:
                    self.crash()
            if self.is_done():
                break
        else:
            self.stuck()
        if not self.server.run.is_open:
            self.excuse(self.server)
        self.check()

    def serve(self):
        if self.now == self.stop_at and self.server.run.members:
            self.note("stop")
            self.server.run.stop()
            self.server.save_names()
        if self.server.run.members and self.hits("drop"):
            id = self.rng.choice(sorted(self.server.run.members))
            session = self.server.run.members[id].session
            self.note("drop", session)
            self.dropping.add(session)
            self.server.run.remove(id, ends=False, drops=True)
            for k in range(len(self.slices)):
                assert id not in self.server.run.missing(k), f"{id} is dropped, and awaited"
            self.server.save_names()
            self.dropped.add(session)
        self.server.tick()
        if self.server.run.is_open:
            self.wait()

    def is_done(self):
        """Whether all have ended but those who wait for more workers, as they were told to."""
        if self.server is None:
            return False
        left = [process for process in self.processes if not process.fate]
        run = self.server.run
        if any(s.folding or run.is_over(k, self.now) for k, s in enumerate(run.slices)):
            return False
        if self.is_chaos or not left:
            return not left and not run.members  # the dead are given up first
        ids = {process.id for process in left}
        if run.is_open:
            return False
        holds = any(v > FRESH for process in left for v in self.versions(process))
        is_ending = run.expected or ids & run.stopping
        return len(ids) < run.rules.workers and not holds and not is_ending

    def versions(self, process):
        return [place.version for place in process.outbox.places]

    def stuck(self):
        left = [process for process in self.processes if not process.fate]
        if len({process.id for process in left}) < self.rules.min_workers:
            for process in left:
                process.fate = "alone"
            # What others had pushed before they parted waits for --min-workers in open rounds.
            for k, slice in enumerate(self.server.run.slices):
                names = {name for push in slice.pushes.values() for name in push.payload}
                for process in self.processes:
                    process.excused[k] |= names
            return
        what = [(p.session, p.step, p.is_in, p.ending, p.outbox.blocked(p.step)) for p in left]
        raise AssertionError(f"stuck: {what}")


def fault_of(seed, without=(), trace=None):
    """What is wrong with a world, or "", and the world."""
    world = World(seed, without, trace)
    try:
        world.simulate()
    except AssertionError as error:
        return str(error)[:300] or "assertion", world
    return "", world


def explain(seed):
    """Print the trace of a seed, with as few kinds of faults as still make it fail."""
    without = set()
    for fault in FAULTS:
        if fault_of(seed, {*without, fault})[0]:
            without.add(fault)
    for left_out in {frozenset(), frozenset(without)}:
        trace = []
        fault, world = fault_of(seed, left_out, trace)
        print(f"--- seed {seed} without {sorted(left_out)}: {fault}", world.rules, sep="\n")
        print(f"{len(world.slices)} slices, delay {world.delay}", *trace[-200:], sep="\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="show the first seed that fails")
    args = parser.parse_args()
    began, total, bad = time.process_time(), Counter(), []
    for seed in range(args.first, args.first + args.seeds):
        fault, world = fault_of(seed)
        if fault:
            bad.append((seed, fault))
            if len(bad) == 1 and args.trace:
                explain(seed)
        for name in ("crashes", "kills", "pushes", "needless", "changes", "misfits"):
            total[name] += getattr(world, name)
        total["forced"] += world.forced + (world.server.run.forced if world.server else 0)
        total["ticks"] += int(world.now)
    seconds = time.process_time() - began
    counts = ", ".join(f"{count} {name}" for name, count in total.items())
    print(*[f"seed {seed}: {fault}" for seed, fault in bad[:10]], sep="\n")
    print(f"{args.seeds} runs, {counts}, {seconds:.1f} s, {len(bad)} bad")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
