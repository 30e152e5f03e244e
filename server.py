r"""The DiLoCo server: holds the global model, averages what workers send, steps the outer optimizer.

    python server.py -m model -n 2                          # on any machine, no GPU needed
    python server.py -m model -n 2 --spawn default.yaml     # and both workers on this machine
    python server.py -m path/to/hf_model -n 4               # from pretrained weights
    python server.py -m model -n 2 --until-done             # ends when the last worker has left

Notable:
- The global model is a log: entry v of a slice's log is the update from version v - 1 to version v.
  The server appends entries, every worker adds them, so all replicas at one version are equal.
- `Run` has the rules and nothing else: who takes part, who is awaited, when a round closes, what
  becomes of a push. It knows no socket, thread, file or tensor.
- `GlobalModel` has the numbers, as one flat float32 vector; it knows no architecture. A fold goes
  through a slice once, and its entry is sent while it is still being made.
- `Store` has the disk. `Server`, `Gate` and `Rounds` are the shell: threads, connections, one lock.
- `Door` lets connections in: it keeps strangers out, and those that it cannot keep out few.
- Workers come and go: a silent one is given up, one that comes back sends its pushes again.
- The same command after a crash goes on from the newest whole checkpoint, and from whatever newer
  slices the workers still hold.

The life of a push:

    worker   steps --make--> OUTBOX --an entry lists it--> FOLDED    later steps stay on top
                                    \--an entry lists it as refused--> DROPPED  counted, logged
    server   read whole, checked --push()--> in the open round --fold--> listed in an entry of the log
"""

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import ipaddress
import itertools
import json
import math
import os
import resource
import secrets
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

import protocol
from protocol import FRESH, NONE, WEIGHTS, Fate, ProtocolError, Refused, Version, last_fates, recent

HEARTBEAT_SECONDS = 2.0  # how often workers are asked to say that they live
TICK_SECONDS = 0.25  # how often the server looks for rounds and workers whose time has come
QUORUM_TICK_SECONDS = 0.05  # the same where rounds close by time
LEAST_SHARES = 8  # shares of the text: so many workers can join before none is left to read
FOLDING_THREADS = min(4, os.cpu_count() or 1)  # more threads would only wait for memory
MAX_CONNECTIONS = 1024  # of members: some 50 with a dozen connections each, and a reserve
MAX_STRANGERS = 256  # connections of others at each stage, from the first byte to a request
MAX_PER_ADDRESS = 32  # hellos that are read at once from one address
HELLOS = 300, 200  # most that are read in a second, and at once after a quiet time
QUESTIONS = 100, 50  # as many requests of peers that are no members are answered
STRANGER_SECONDS = 60.0  # time that a peer which is no member has for its next request
COMPLAINT_SECONDS = 10.0  # how often the door says at most that it cannot let anybody in
PLACE_SECONDS = 0.02  # how often the door looks for a place for those that wait for one
LEAVE_SECONDS = 15.0  # time that spawned workers get to end by themselves
FAREWELL_SECONDS = 3.0  # time that a server which ends waits to tell its workers so
KNOWN_WORKERS = 1000  # ids whose index is remembered after they have gone
STALLED_SECONDS = 60.0  # wait for a push that is said where no round has been closed yet
LEAST_STALL_SECONDS = 10.0  # a shorter wait is never said
SAY_SECONDS = 60.0  # how often a wait that lasts is said
STATUS_SECONDS = 0.05  # time between two statuses, or two histories, that are made
POINTS = 512  # of a history, at most: a power of two
RECENT = 120  # rounds that a history has one by one
MOST_NAMES = 100  # workers whose numbers a round of a history has
MOST_GONE = 50  # workers of which a status says when and why they went
RATE_ROUNDS = 20  # last rounds from which the run's speed is known
ROTATE_BYTES = 50_000_000  # size of rounds.jsonl from which on a new one is begun
MAX_PUSHES = 8  # that processes of one worker, one after the other, may have in an open round
SEQ_AHEAD = 1000  # that a sequence number may lie above the last one that was counted
PACES = 10  # steps of a cycle that count at most, over those of the workers that opened the run
LEAD = 3  # cycles that a worker may have made since the last round that it was in
MOST_STEPS = 10**9  # of one push
MOST_ROUNDS = 1 << 40  # highest version number that a worker may bring
LAST_LIFE = "7" + "f" * 19  # last life of a version that a worker may bring
NORMS = 10  # closed rounds whose norms a push is compared with
LEAST_NORMS = 3  # closed rounds below which there is nothing to compare with
MOST_PARTS = 1000  # rounds whose parts of an outer step are known, to tell how late a push is
MANY_ROUNDS = 5  # after which it can be told who holds up the others
MUCH_WAITING = 0.1  # share of its time from which on it is said that a worker waits
HIDDEN = 0.05  # share of a round up to which a sync counts as hidden
MAX_UNWRITTEN = 1000  # lines of rounds.jsonl that wait for the disk
MAX_ENTRIES = 100  # entries of one slice's log that are kept, however small they are
NAMES = "members.json"  # file in the output folder with the names of who takes part
ROUNDS = "rounds-old.jsonl", "rounds.jsonl"  # files there with a line for every closed round
KEPT = "frozen.safetensors"  # file in a checkpoint with frozen tensors that were trained before
DEFAULTS = {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True, "momentum_warmup": True}
now = time.monotonic


log, shown = protocol.Log("stdout", "server: ", clock=True), protocol.shown


# --- The rules of a run -----------------------------------------------------------------------
#
# Everything that decides who takes part, who is awaited, when a round closes and what becomes of a
# push stands in `Run`. It knows no socket, thread, file or tensor: events come in as method calls,
# decisions go out as return values, and the time is an argument. Calls are serialized by the
# caller's one lock. tests/simulator.py runs whole clusters of it under faults.
#
# A slice's log has entries; its head is the version that the newest entry led to. Contributions to
# the next entry gather in the *open round*. All pushes have one order, the *turn* of the round in
# which they land: version number * slices + slice. A member is awaited in a round if it belonged to
# the run before the round's first contribution, has not contributed to the round, has not closed
# the slice, and has not contributed to a later turn. The last condition makes circles impossible:
# of the members that are missing anywhere, the one that is missing at the lowest open turn waits,
# if it waits at all, for a round at a lower turn still, and there is none. The other conditions
# keep rounds from waiting needlessly.
#
# A worker that trains other tensors from now on closes all slices and joins *anew*. From then on it
# is expected back, as members are after a crash, and it waits until the others have done the same:
# with the last one the run closes, and opens again with the new tensors. So a run that opens has the
# tensors that it had as long as one of those that it expects comes back with these. Who has gone on
# for a cycle beyond the step of the change makes no such change: the worker that waits is refused.
# Until then nobody new comes in, who would know nothing of it. Before a change the model is saved.


@dataclass(kw_only=True)
class Rules:
    """The settings of a run that the rules need, as the command line gives them."""

    workers: int = 1  # workers that a new run starts with
    quorum: int = 0  # contributions that close a round after `grace`; 0: those of all awaited
    grace: float | None = 0.0  # seconds that a quorum waits; None: see Slice.grace_ends
    outer: str = "whole"  # outer step of a part of the members: whole, fractional or delayed
    weights: str = "equal"  # by which pushes count: equal, steps or tokens
    stale_weight: float = 0.0  # a push s outer steps late weighs (1 + s) ** -stale_weight
    own_pace: bool = False  # whether workers have rounds of as many steps as they can make
    min_workers: int = 1  # workers below which no round closes
    max_staleness: int = 10  # versions that a counted push may be behind
    max_push_ratio: float = 100.0  # most that a push's norm may be, over the median; 0: anything
    worker_timeout: float = 30.0  # seconds of silence after which a worker is given up
    drop_stuck: float = 0.0  # seconds after which who keeps a round open is given up; 0: never

    @property
    def heartbeat_seconds(self):
        """How often workers are asked to say that they live."""
        return min(HEARTBEAT_SECONDS, self.worker_timeout / 4)


@dataclass(eq=False, kw_only=True)
class Push:
    """A contribution of a worker, which is sent again as it was. The server finds `refused` to `norm`."""

    worker: str
    session: str  # names the worker's process
    k: int  # slice
    seq: int  # counts the worker's pushes of the slice
    base: Version  # version that its oldest step started from
    steps: int = 0  # optimizer steps that it carries
    closing: bool = False  # whether it is the worker's last push of the slice
    refused: str = ""  # why it counts as an empty contribution
    arrived: float = 0.0  # seconds, when it was here whole for the first time
    step: int = 0  # step of the run that its worker had reached, as far as that can be
    counted: int = 0  # of its steps, as many as its worker can have made
    norm: float | None = None  # of its numbers; None where there are none to be judged
    tokens: int = 0
    adopts: float = 0.0  # seconds when its training is about to wait for it; 0: at once
    late: int = 0  # versions that it is behind the head
    stale: float = 0.0  # outer steps made in these
    weight: float = 1.0  # of its numbers in the mean of its round
    loss: float | None = None
    spent: object = None  # Reading of its worker since the last push, where that is known
    payload: object = None  # its numbers, which the rules do not look at
    nbytes: int = 0  # size of the payload


@dataclass(eq=False, kw_only=True)
class Round:
    """A closed round: what the next entry of a slice's log is made of."""

    k: int
    base: Version  # version that it leads on from
    version: Version  # version that it leads to
    pushes: list  # contributions in the order of (worker index, sequence number)
    members: list  # ids of those that push the slice
    plain: bool  # whether it has closing contributions only: a plain mean, no momentum
    share: float = 1.0  # weight of what it folds, over that with those who are not in it
    mode: str = "whole"  # as Rules.outer
    before: float = 0.0  # outer steps that the slice has made before
    quorum: int = 0  # contributions that counted for the quorum
    grace: float = 0.0  # seconds that it stayed open after the quorum was there
    outsized: list = field(default_factory=list)  # pushes that were refused when it closed
    opened: float  # seconds, when its first contribution came
    closed: float  # seconds

    @property
    def fates(self):
        """worker -> Fate, as the entry lists the pushes."""
        ordered = sorted(self.pushes, key=lambda push: push.seq)
        return {p.worker: Fate(p.seq, p.refused, self.version.number) for p in ordered}

    @property
    def part(self):
        """The part of an outer step that it makes."""
        return 1.0 if self.mode == "whole" else self.share

    @property
    def completes(self):
        """Whether the outer steps that the slice has made come to a whole number with it, or pass one:
        the parts are sums of rounded numbers."""
        return int(self.before + self.part + 1e-6) > int(self.before + 1e-6)

    def weigh(self, members, rules):
        """Give the pushes their weights, and the round its share: a member that is missing counts
        with its last push, or as the mean of the others where it has made none."""
        counted = [p for p in self.pushes if (p.steps or p.nbytes) and not p.refused]
        there = {push.worker for push in self.pushes}
        absent = [members[id].last for id in self.members if id in members and id not in there]
        full = weights([*counted, *filter(None, absent)], rules.weights)
        for push in counted:
            push.weight = full[push] * (1 + push.stale) ** -rules.stale_weight
            if member := members.get(push.worker):  # of a cycle, whatever it caught up
                once = min(push.counted, member.cycle)
                member.last = replace(push, payload=None, counted=once)
        whole = sum(full.values())
        whole += absent.count(None) * whole / max(1, len(full))
        self.share = sum(push.weight for push in counted) / whole if counted else 0.0


def weights(pushes, by):
    """{push: weight} of the pushes of a round: 1, or the optimizer steps that it carries, or their
    tokens where every worker says how many. The tokens of a step are what a worker says, up to PACES
    times those of the others."""
    steps = {push: max(1, push.counted) for push in pushes}
    if by == "equal":
        return dict.fromkeys(pushes, 1.0)
    if by == "steps" or not all(push.tokens for push in pushes):
        return steps
    rates = {push: push.tokens / max(1, push.steps) for push in pushes}
    most = PACES * statistics.median_low(rates.values()) if rates else 0
    return {push: steps[push] * min(rate, most) for push, rate in rates.items()}


def outsized(pushes, norms, ratio):
    """{push: why it is refused} of the pushes of a round that are too large for it: whose norm is
    larger than usual, and over `ratio` times as large for its steps. norms: [(norm per step, norm)],
    the medians of the last closed rounds."""
    if not ratio or len(norms) < LEAST_NORMS:
        return {}
    usual, whole = (statistics.median(each) for each in zip(*norms, strict=True))
    per_step = {push: push.norm / max(1, push.counted) for push in pushes if push.norm}
    return {
        push: f"a norm of {norm:.3g} a step is over --max-push-ratio {ratio:g} times {usual:.3g}, the "
        "median of the last rounds"
        for push, norm in per_step.items()
        if not push.refused and norm > ratio * usual and push.norm > whole
    }


def medians(pushes):
    """(norm per step, norm) of the pushes that count, or None without any: the medians. A push of
    zeros tells nothing."""
    found = [push for push in pushes if push.norm and not push.refused]
    if not found:
        return None
    per_step = statistics.median(push.norm / max(1, push.counted) for push in found)
    return per_step, statistics.median(push.norm for push in found)


def twins(pushes):
    """Two pushes of a round, by different workers, whose numbers are equal to the bit, or None. Only
    those whose norms are equal are compared, so that other rounds pay nothing. Needs the payloads."""
    seen = {}  # norm -> push
    for push in pushes:
        if push.norm:
            other = seen.setdefault(push.norm, push)
            if other.worker != push.worker and torch.equal(other.payload.raw, push.payload.raw):
                return other, push
    return None


def believed(versions, life):
    """The versions that a worker says it holds, with FRESH in the place of those that it cannot
    hold: of a life after `life`, or after more rounds than there can have been."""
    return [v if v.life <= life and v.number <= MOST_ROUNDS else min(v, FRESH) for v in versions]


def free_index(id, indices, members):
    """An id's own index where that is free, else the lowest free one."""
    taken = {member.index for member in members.values() if member.id != id}
    own = indices.get(id, -1)
    free = min(set(range(len(taken) + 1)) - taken)
    return own if own >= 0 and own not in taken else free


@dataclass(eq=False)
class Slice:
    """The head of a slice's log, and the open round."""

    version: Version = NONE
    folded: dict = field(default_factory=dict)  # worker -> Fate of its newest listed push
    norms: list = field(default_factory=list)  # (norm per step, norm) of the last closed rounds
    pushes: dict = field(default_factory=dict)  # (worker, seq) -> Push of the open round
    folding: Round | None = None  # closed round whose entry is being made
    closed_at: float = 0.0  # seconds, when the last round was closed
    took: float = 0.0  # seconds that the last round was open
    missed: float = 0.0  # outer steps that rounds with a part of the members have left out
    parts: deque = field(default_factory=lambda: deque(maxlen=MOST_PARTS))  # of the last rounds

    @property
    def made(self):
        """The outer steps that have been made: one a round, or less."""
        return max(0.0, self.version.number - self.missed)

    @property
    def pushers(self):
        """Ids of the workers that have contributed to the open round."""
        return {worker for worker, _ in self.pushes}

    @property
    def present(self):
        """The pushes in the open round and those that are being folded."""
        return [*self.pushes.values(), *(self.folding.pushes if self.folding else ())]

    def known(self, id):
        """The highest sequence number of a worker's pushes that are listed or present."""
        listed = [self.folded[id].seq] if id in self.folded else []
        return max([0, *listed, *(push.seq for push in self.present if push.worker == id)])

    def most_seq(self, id):
        """The highest sequence number that a worker's next push can have. One that has made none,
        or whose last one is forgotten, has made no more than there were rounds."""
        return (self.known(id) or max(0, self.version.number)) + SEQ_AHEAD

    def most_steps(self, member, rules):
        """The steps of a worker's next push that count at most: those of a cycle, which at an own pace
        may be longer (Paces.ahead), for each round since its last push was listed, or since it became
        a member. In more rounds than --max-staleness a push would have become too old."""
        fate = self.folded.get(member.id)
        cycles = self.version.number - (fate.round if fate else member.begun[1] - 1)
        cycles = max(1, min(cycles, rules.max_staleness + 1))
        return member.pace * (1 + rules.own_pace) * cycles

    def staleness(self, late):
        """The outer steps that the last `late` rounds have made; of rounds before a crash whole ones."""
        parts = list(self.parts)[-late:] if late else []
        return sum(parts) + late - len(parts)

    def counting(self, rules):
        """When the workers' contributions came that count for a quorum: late ones do where the outer
        step knows how much of a round it folds."""
        came = {}  # worker -> seconds; a new process of a worker is no other worker
        for push in self.pushes.values():
            if rules.outer != "whole" or not push.late:
                came[push.worker] = min(push.arrived, came.get(push.worker, math.inf))
        return sorted(came.values())

    def grace_ends(self, since, rules):
        """When a quorum that is there since then has waited long enough: with a grace of None when the
        first contributor is about to adopt, or after a tenth of a round, the last one or this one,
        where they wait at once."""
        if rules.grace is not None:
            return since + rules.grace
        adopts = min(push.adopts for push in self.pushes.values())
        return max(since, adopts) if adopts else since + max(self.took, since - self.closed_at) / 10

    def is_over_without(self, now, rules):
        """Whether the open round is over without those that are missing. One that has late contributions
        only waits for the others' next round, but not for ever."""
        counting = self.counting(rules)
        if 0 < rules.quorum <= len(counting):
            return now >= self.grace_ends(counting[rules.quorum - 1], rules)
        ends = self.grace_ends(self.closed_at + self.took, rules)
        return rules.quorum > 0 and not counting and now >= ends

    def close(self, life, indices, pushing, now, rules):
        """Make a Round of what has been contributed; pushes that are too large for it are refused.
        `pushing`: the ids of the workers that push the slice."""
        pushes = sorted(self.pushes.values(), key=lambda p: (indices.get(p.worker, 0), p.seq))
        judged = outsized(pushes, self.norms, rules.max_push_ratio)
        for push, why in judged.items():
            push.refused = why
        self.norms = [*self.norms, *filter(None, [medians(pushes)])][-NORMS:]
        counting = self.counting(rules)
        is_quorum = 0 < rules.quorum <= len(counting)
        self.folding = Round(
            k=pushes[0].k,
            base=self.version,
            version=Version(life, self.version.number + 1),
            pushes=pushes,
            members=sorted(pushing),
            plain=all(push.closing for push in pushes),
            mode=rules.outer,
            before=self.made,
            quorum=len(counting),
            grace=now - counting[rules.quorum - 1] if is_quorum else 0.0,
            outsized=list(judged),
            opened=min(push.arrived for push in pushes),
            closed=now,
        )
        self.pushes, self.took, self.closed_at = {}, now - self.closed_at, now
        return self.folding


@dataclass(eq=False, kw_only=True)
class Member:
    """A worker that takes part, or waits to."""

    id: str
    session: str  # names the worker's process
    versions: list  # versions that it can bring, by slice; FRESH for a model of its own
    resumes: list = field(default_factory=list)  # by slice: version that a checkpoint goes on from
    folded: list = field(default_factory=list)  # by slice held: as Slice.folded
    asked: list = field(default_factory=list)  # slices that it was asked to bring
    closed: set = field(default_factory=set)  # slices that it will push no more
    facts: object = None  # what the server's shell knows of it
    layout: object = None  # its tensors, to be compared; None: those that all have
    sync_every: int = 1
    fragments: int = 1  # slices that have a step of their own in its cycle
    heard: float = 0.0  # seconds, when the worker last spoke
    has_ended: bool = False  # whether its process is known to have ended
    index: int = -1
    since: list = field(default_factory=list)  # by slice: number of the first version awaiting it
    passed: int = -1  # highest turn that it has contributed to
    pace: int = 1  # steps by which a cycle brings it forward at most
    cycle: int = 0  # steps of its cycle as it is now
    readings: object = None  # deque of its newest Readings at pushes, or of where they began
    reading: object = None  # its newest Reading
    last: Push | None = None  # its last push that counted, without the numbers
    lag: int = 0  # versions that its last push was behind
    begun: tuple = (0, 0)  # (step of the run, number of the newest version) when it became a member
    blocked: tuple = ()  # (slice, sequence number) of its own push that its training waits for
    step: int = 0  # step of the run that it has reached
    position: int = 0  # steps since its cycle began
    speed: float = 0.0  # steps per second
    loss: float | None = None
    joined: float = 0.0  # seconds, when it became a member
    max_steps: int = 0  # length of the run, as it says; 0: unknown
    evaluation: tuple | None = None  # (step, loss, whether of the global model) of its newest one
    pushed: object = None  # its Reading at its last push, where that is known
    sync: object = None  # the Reading of the time with its last sync in it, where that is known
    arrived: float = 0.0  # seconds in which its pushes have come in
    delay: float = 0.0  # seconds of training from its last push to its adoption

    @property
    def was_in(self):
        """Whether it says that it has been a member before."""
        return any(version > WEIGHTS for version in self.versions)

    def reach(self, step, number):
        """Note the step that it says it has reached, as far as it can have: a cycle for each round
        since it became a member, `number` being that of the newest version."""
        rounds = max(0, number - self.begun[1])
        self.step = min(step, self.begun[0] + self.pace * (rounds + LEAD))
        return self.step

    def begin(self, old, furthest, number):
        """Become a member, perhaps in the place of `old`, when a run has come to the step `furthest`
        and the version `number`."""
        self.begun = (min(self.step, furthest) if self.was_in else furthest), number
        if old is not None and old.session == self.session:
            self.closed |= old.closed
            self.passed, self.begun = old.passed, old.begun
        self.reach(self.step if self.was_in else self.begun[0], number)

    def is_stuck(self, slices):
        """Whether its training waits for a push of its own in an open round."""
        k, seq = self.blocked or (len(slices), 0)
        return k < len(slices) and (self.id, seq) in slices[k].pushes

    def to_go(self, k, now, rules):
        """Steps until the worker pushes slice k, as a part of its cycle. Where all are awaited, it
        comes no further than to that push."""
        due = min(k + 1, self.fragments) * self.cycle // self.fragments
        steps = (due - self.position - 1) % self.cycle + 1
        left = steps - self.speed * (now - self.heard)
        return (left % self.cycle if rules.quorum else max(0.0, left)) / self.cycle


def of_process(workers, id, session):
    """The Member of an id among {id: Member} where it is this process of the worker, else None."""
    member = workers.get(id)
    return member if member is not None and member.session == session else None


def unfit(push, life, rules):
    """Why a push cannot count in a run that has come to this life, or ""."""
    if push.base.life > life:
        return "it starts from a version that this run has not made"
    is_old = push.steps and push.late > rules.max_staleness
    return f"a push {push.late} rounds old is over --max-staleness" if is_old else ""


def is_begun(slices):
    """Whether a slice holds a version that a run has made."""
    return any(slice.version.life for slice in slices)


def newest(slices):
    """The number of the newest version, -1 where there is none."""
    return max((slice.version.number for slice in slices), default=-1)


def opened_at(run):
    """(pace, step) of a run that those who wait open. Who was in it may have made a cycle more than
    is on disk for each round that is not."""
    paces = [member.sync_every for member in run.waiting.values()]
    pace = min(statistics.median_low(paces), PACES * (run.pace or max(paces)))
    cycles = max(0, newest(run.slices) - run.kept) + LEAD
    steps = [
        min(member.step, run.step + min(member.sync_every, PACES * pace) * cycles)
        for member in run.waiting.values()
        if member.was_in
    ]
    return pace, max([run.step, *steps])


class Run:
    """The rules of a run. Each public method is an event or a question; see the theory above.

    slices: [Slice]; members: {id: Member} of those that take part; waiting: {id: Member} of those
    that have asked to; expected: {id: seconds when heard of} of members from before a crash, or a
    change of tensors, that the run waits for; indices: {id: index} that ids have had, in the order of
    last use; sessions: {id: session} of the process that had the id last; away: ids that were given up
    and may come back; stopping: ids that are to finish and have not yet; dropped: {id: session of the
    process that is to finish, alone}; anew: Anew; paces: Paces.
    """

    def __init__(self, rules, now, count=0):
        self.rules, self.began = rules, now
        self.life = ""  # named when the run opens
        self.slices = [Slice() for _ in range(count)]
        self.members, self.waiting, self.expected = {}, {}, {}
        self.indices, self.sessions = {}, {}
        self.away, self.stopping, self.dropped = set(), set(), {}
        self.is_open, self.anew, self.paces = False, Anew(self), Paces(self)
        self.step = 0  # step of the worker that is furthest
        self.pace = 0  # steps of a cycle, of the workers that opened the run
        self.kept = -1  # number of the newest version that was on disk
        self.forced = 0  # rounds that were closed because nothing else could move

    # --- Who takes part ---

    @property
    def is_stopping(self):
        """Whether members have been told to finish."""
        return not self.stopping.isdisjoint(self.members)

    def is_to_finish(self, member):
        """Whether a member has been told to finish."""
        return self.is_stopping or self.dropped.get(member.id) == member.session

    @property
    def versions(self):
        """The versions of the slices."""
        return [slice.version for slice in self.slices]

    @property
    def is_whole(self):
        """Whether every slice has a version."""
        return bool(self.slices) and min(self.versions) > NONE

    def holder(self, id, session, now):
        """The other process that holds a worker id, whatever has become of its connection, or None."""
        for other in filter(None, (self.members.get(id), self.waiting.get(id))):
            is_silent = now - other.heard > self.rules.worker_timeout
            if other.session != session and not (other.has_ended or is_silent):
                return other

    def ask(self, member, now):
        """A worker asks to take part. Raises Refused where it cannot."""
        if other := self.holder(member.id, member.session, now):
            raise Refused("id", f"worker id {other.id!r} is held by a live process")
        if member.was_in and self.sessions.get(member.id, member.session) != member.session:
            raise Refused("id", f"another process has taken over worker id {member.id!r}")
        known = member.id in self.indices or member.id in self.stopping
        if self.is_stopping and not known:
            raise Refused("stopping", "this run is being stopped")
        has_past = is_begun(self.slices) or self.indices or self.expected
        is_stranger = has_past and not known and member.id not in self.expected
        life = "" if is_stranger else self.life or LAST_LIFE  # whose versions replace nothing
        member.versions = self.anew.at_most(believed(member.versions, life))
        self.slices = self.slices or [Slice() for _ in member.versions]
        self.waiting[member.id] = member
        self.here(member.id, member.session, now)

    def here(self, id, session, now):
        """A worker that waits to enter is alive. False where it is waited for no more."""
        if member := of_process(self.waiting, id, session):
            member.heard = now
            self.anew.heard(id, now)
        return member is not None

    def may_enter(self, id, now):
        """Whether a waiting worker can become a member now."""
        if id not in self.waiting or any(slice.folding for slice in self.slices):
            return False
        if self.is_open:
            is_free = not (self.is_stopping or self.expected) or id in self.stopping
            return (is_free or id in self.indices) and self.anew.fits(self.waiting[id])
        ready = id in self._opening() and self.is_ready(now) and not self.anew.is_due
        return ready and self.is_whole and not any(self.lacking(w, now) for w in self.waiting)

    def _opening(self):
        """The ids that open the run: all that wait with its tensors; to stop it, those it knows."""
        is_free = self.stopping.isdisjoint(self.waiting)
        known = self.waiting if is_free else self.stopping | self.expected.keys()
        return {id for id, m in self.waiting.items() if id in known and self.anew.fits(m)}

    def is_ready(self, now):
        """Whether all are there that the run starts with: after a crash its members of before whose
        last sign is no older than the worker timeout; else as many as a new run needs, one who
        comes back to stop, or, where no names were left, one who holds a version, after a while."""
        limit = self.rules.worker_timeout
        if self.expected:
            left = [seen for w, seen in self.expected.items() if w not in self.waiting]
            return bool(self.waiting) and all(now - seen > limit for seen in left)
        holds = any(v > WEIGHTS for m in self.waiting.values() for v in m.versions)
        stops = not self.stopping.isdisjoint(self.waiting)
        is_enough = stops or len(self.waiting) >= self.rules.workers
        return is_enough or (holds and now - self.began > limit)

    def lacking(self, id, now):
        """The slices that a waiting worker is to bring: it is the first, by id, of those that hold
        the newest version, and the server holds an older one."""
        if self.is_open or self.anew.is_due or not self.is_ready(now):
            return []
        holders = [self.waiting[w] for w in sorted(self._opening())]
        found = []
        for k, slice in enumerate(self.slices):
            newest = max(holders, key=lambda m, k=k: (m.versions[k], k in m.asked))
            if newest.id == id and newest.versions[k] > slice.version:
                found.append(k)
        return found

    def bring(self, id, k):
        """A waiting worker has brought its version of slice k."""
        member, slice = self.waiting[id], self.slices[k]
        slice.version = member.versions[k]
        slice.folded = dict(member.folded[k]) if member.folded else {}

    def enter(self, id, now, life):
        """Make a waiting worker a member. The run opens with the first one: all that wait become
        members in one event, before any of them is answered. `life(after)` names a life that
        sorts after `after`. Returns the ids of the new members."""
        entering = [id]
        if not self.is_open:
            entering = sorted(self._opening(), key=lambda w: (self.indices.get(w, 1 << 53), w))
            self._open(now, life)
        for worker in entering:
            self._enter(self.waiting.pop(worker), now)
        return entering

    def _open(self, now, life):
        brought = [v.life for m in self.waiting.values() for v in m.versions]
        self.life = life(max([self.life, *(s.version.life for s in self.slices), *brought]))
        for slice in self.slices:
            slice.closed_at, slice.version = now, self.anew.first(slice.version)
        if self.stopping.isdisjoint(self.waiting) and not self.expected:
            self.stopping.clear()
        self.pace, self.step = opened_at(self)
        self.expected, self.is_open = self.anew.left(), True

    def _enter(self, member, now):
        old = self.members.get(member.id)
        for k, slice in enumerate(self.slices):
            is_resumed = bool(member.resumes) and member.resumes[k] == slice.version
            for name, push in list(slice.pushes.items()):
                if push.worker == member.id and push.session != member.session and is_resumed:
                    del slice.pushes[name]  # the resumed process makes those steps again
            stays = old is not None and (is_resumed or old.session == member.session)
            # Steps from the version that the open round starts from are awaited in it.
            first = slice.version.number + (bool(slice.pushes) and not is_resumed)
            member.since.append(old.since[k] if stays else first)
        furthest = max([self.step, *(other.step for other in self.members.values())])
        self.paces.begin(member)
        member.begin(old, furthest, newest(self.slices))
        member.index = free_index(member.id, self.indices, self.members)
        member.heard = member.joined = now
        self.expected.pop(member.id, None)
        self.indices.pop(member.id, None)
        self.indices[member.id], self.sessions[member.id] = member.index, member.session
        self.members[member.id] = member
        self.away.discard(member.id)
        gone = [w for w in self.indices if w not in self.members and w not in self.stopping]
        for worker in gone[: max(0, len(self.indices) - KNOWN_WORKERS)]:
            for known in (self.indices, self.sessions, self.dropped, self.paces.told):
                known.pop(worker, None)

    def known(self, id):
        """By slice, the highest sequence number of a worker's pushes that are listed, in the open
        round or being folded. A process without a push in its outbox counts on from there."""
        return [slice.known(id) for slice in self.slices]

    def place(self, id, now):
        """Where a worker begins: (by slice, the turn that its next push is for; steps until its push
        of the lowest one, None for a whole interval). A round that has its push or does not wait for
        it is over for it. The steps are those of the member that comes to the slice next."""
        turns = [self.turn(k) for k in range(len(self.slices))]
        for k, slice in enumerate(self.slices):
            if slice.pushes and id not in self.missing(k):
                turns[k] += len(self.slices)
        me, k = self.members[id], turns.index(min(turns))
        left = [m.to_go(k, now, self.rules) for m in self.paces.heard(now) if m is not me]
        return turns, max(1, round(min(left) * me.cycle)) if left else None

    def hear(self, id, session, now):
        """A member speaks; returns the Member. Raises Refused where its worker must join (again)."""
        member = of_process(self.members, id, session)
        if member is None:
            self.anew.heard(id, now)  # alive, and about to join again
            raise Refused("rejoin", f"worker {id!r} is not a member of the run; join again")
        member.heard, member.has_ended = now, False
        return member

    def free(self, id, session):
        """A worker's process has ended, as whoever knows it says: another one may have its id."""
        for workers in (self.members, self.waiting):
            if member := of_process(workers, id, session):
                member.has_ended = True

    def forget(self, id, session):
        """A worker that waits to enter has gone, or does not bring what it was asked for."""
        if of_process(self.waiting, id, session):
            del self.waiting[id]

    def remove(self, id, ends, drops=False):
        """Remove a member; rounds go on without it. The run ends when the last member leaves on
        purpose (`ends`). One that is only lost may come back, also to hear that it is to stop, as
        with `drops` its process is, alone."""
        was_stopping, session = self.is_stopping, self.members.pop(id).session
        if ends:
            self.stopping.discard(id)
            self.dropped = {w: s for w, s in self.dropped.items() if s != session}
            self.forget(id, session)  # a join that was sent twice
        else:
            self.away.add(id)
            self.dropped |= {id: session} if drops else {}
        if not self.members and (ends or was_stopping or self.expected):
            self.is_open = False
            self.away &= self.stopping

    def stop(self):
        """Everybody is to finish: members, and whoever is away and comes back."""
        self.stopping = self.members.keys() | self.away | self.expected.keys()

    def silent(self, workers, now):
        """The members, or those that wait, that were not heard of for the worker timeout."""
        return [m for m in workers.values() if now - m.heard > self.rules.worker_timeout]

    # --- Rounds ---

    def push(self, push, now):
        """Take a contribution into the open round of its slice. False where an entry lists it
        already. One that is too old counts as an empty contribution, so that nobody waits for it
        in vain. Raises Refused where its worker must join again, and where its sequence number is
        no next one. The caller has waited for the end of a fold of the slice."""
        member, slice = self.hear(push.worker, push.session, now), self.slices[push.k]
        if slice.folding:
            raise RuntimeError("a push came into a slice that is being folded")
        if push.seq > (most := slice.most_seq(push.worker)):
            raise Refused("protocol", f"push: the sequence number {push.seq} is over {most}")
        push.step = member.reach(push.step, newest(self.slices))
        push.late = member.lag = max(0, slice.version.number - push.base.number)
        push.stale = slice.staleness(push.late)
        push.counted = min(push.steps, slice.most_steps(member, self.rules))
        if push.closing:
            member.closed.add(push.k)
        if push.worker in slice.folded and push.seq <= slice.folded[push.worker].seq:
            return False
        push.refused = push.refused or unfit(push, self.life, self.rules)
        first = slice.pushes.get((push.worker, push.seq))
        push.arrived = first.arrived if first else now
        slice.pushes[push.worker, push.seq] = push
        member.passed = max(member.passed, self.turn(push.k))
        return True

    def is_there(self, k, id, seq):
        """Whether a push is in the open round of slice k, or being folded."""
        return any((push.worker, push.seq) == (id, seq) for push in self.slices[k].present)

    def turn(self, k):
        """The place of slice k's open round in the one order of all pushes."""
        return self.slices[k].version.number * len(self.slices) + k

    def pushing(self, k):
        """The ids of the members that push slice k: those that have not closed it."""
        return {member.id for member in self.members.values() if k not in member.closed}

    def missing(self, k):
        """The ids of the members that the open round of slice k waits for."""
        slice, turn = self.slices[k], self.turn(k)
        return {
            id
            for id in self.pushing(k) - slice.pushers
            if self.members[id].since[k] <= slice.version.number and self.members[id].passed < turn
        }

    def is_over(self, k, now):
        """Whether the open round of slice k is over. Full sync, stragglers, quorum and asynchronous
        training differ in `quorum` and `grace` and in nothing else."""
        slice = self.slices[k]
        if not slice.pushes or slice.folding or not self.has_enough(k):
            return False
        return not self.missing(k) or slice.is_over_without(now, self.rules)

    def has_enough(self, k):
        """Whether --min-workers is met, which does not bind workers that end their part."""
        is_ending = self.is_stopping or all(member.closed for member in self.members.values())
        there = len(self.slices[k].pushers | self.members.keys() | self.anew.back.keys())
        return there >= (1 if is_ending else self.rules.min_workers)

    def over(self, now):
        """The slices whose round is over. Where none is, none is being folded, and all members wait for
        pushes of their own in open rounds, nobody can come: then the oldest of these rounds is."""
        found = [k for k in range(len(self.slices)) if self.is_over(k, now)]
        if found or not self.members or any(slice.folding for slice in self.slices):
            return found
        if all(member.is_stuck(self.slices) for member in self.members.values()):
            k = min((member.blocked[0] for member in self.members.values()), key=self.turn)
            if self.has_enough(k):
                self.forced += 1
                return [k]
        return []

    def take(self, k, now):
        """Close the open round of slice k; returns the Round, which `publish` ends."""
        slice = self.slices[k]
        self.paces.note_last(slice.pushes.values())
        pushing = self.pushing(k) | slice.pushers
        closed = slice.close(self.life, self.indices, pushing, now, self.rules)
        closed.weigh(self.members, self.rules)
        return closed

    def publish(self, k):
        """The log of slice k has its new entry. Ids that are gone and whose last push is too far
        back to be sent again are forgotten, but for the last ones."""
        slice, most = self.slices[k], self.rules.max_staleness
        closed, slice.folding = slice.folding, None
        slice.version = closed.version
        slice.missed += 1 - closed.part
        slice.parts.append(closed.part)
        self.step = max([self.step, *(push.step for push in closed.pushes)])
        here = self.members.keys() | self.waiting.keys() | self.expected.keys()
        slice.folded = recent(slice.folded | closed.fates, closed.version, most, here)

    # --- Crashes ---

    def names(self):
        """The names to be on disk at every join and leave, as JSON has them."""
        return {
            "members": sorted(self.members.keys() | self.expected.keys()),
            "stopping": sorted(self.stopping),
            **{name: dict(getattr(self, name)) for name in ("indices", "sessions", "dropped")},
            "life": self.life,
            "pace": self.pace,
        }

    def reopen(self, names, heads, now):
        """Go on after a crash: with the names that were on disk, and [(version, folded)] of the
        slices in the checkpoint, if there is one."""
        self.expected = dict.fromkeys(names["members"], now)
        self.stopping, self.indices = set(names["stopping"]), dict(names["indices"])
        self.sessions, self.dropped = (dict(names.get(n, {})) for n in ("sessions", "dropped"))
        self.life, self.pace = names.get("life", ""), names.get("pace", 0)
        self.slices = [Slice(version, dict(folded)) for version, folded in heads]
        self.kept = newest(self.slices)


class Anew:
    """Which tensors a run has where its workers change what they train; see the theory above.

    layout: the tensors of the run, as Member.layout; before, held: newest and oldest version of a slice
    before the run got them, until it opens with them, else None; gone: {id: Member} of those that have
    left to come back with other tensors, as they were.
    """

    def __init__(self, run):
        self.run, self.layout, self.before, self.held, self.gone = run, None, None, None, {}

    def fits(self, member):
        """Whether a worker has the tensors of the run."""
        return member.layout == self.layout

    def expect(self, id, now):
        """A member has closed all slices and comes back with other tensors. With the last one the run
        closes, until all are back."""
        run = self.run
        self.gone[id] = run.members.pop(id)
        run.expected[id] = now
        run.is_open = bool(run.members)

    def heard(self, id, now):
        """A worker shows that it is alive, which may be expected."""
        if id in self.run.expected:
            self.run.expected[id] = now

    def at_most(self, versions):
        """The versions that a worker says it holds: none is newer than those of the server, where it has
        led the run up to the change."""
        newest = self.held or min(self.run.versions, default=NONE)
        return [min(version, newest) for version in versions] if self.gone else versions

    def is_stale(self, member):
        """Whether a worker's join is from before it left to come back with other tensors."""
        old = self.gone.get(member.id)
        return bool(old) and (member.session, member.layout) == (old.session, old.layout)

    def awaits_any(self, now):
        """Whether somebody is expected who waits, or was heard of within the worker timeout."""
        run, limit = self.run, self.run.rules.worker_timeout
        return bool(self.back) or any(now - heard <= limit for heard in run.expected.values())

    @property
    def back(self):
        """{id: Member} of the waiting workers that the run expects."""
        run = self.run
        return {id: run.waiting[id] for id in sorted(run.expected.keys() & run.waiting.keys())}

    @property
    def is_due(self):
        """Whether workers that are expected are back, and none of them with the tensors of the run."""
        back = self.back.values()
        return bool(back) and not any(self.fits(member) for member in back)

    def lays_out(self, id, now):
        """Whether the run, which is about to open, gets the tensors of this waiting worker: those that
        most have come back with. What was contributed before is in an entry by then."""
        run = self.run
        if run.is_open or not (self.is_due and run.is_ready(now)):
            return False
        alike = collections.Counter(member.layout for member in self.back.values())
        is_still = not any(slice.pushes or slice.folding for slice in run.slices)
        return is_still and id == min(self.back, key=lambda w: (-alike[self.back[w].layout], w))

    def lay_out(self, layout, count, is_whole):
        """The run has other tensors from now on, in `count` slices; `is_whole`: the server has all of
        them. Pushes of before are known by their numbers still."""
        run = self.run
        if self.before is None:
            self.held, self.before = min(run.versions), max(run.versions)
        fates = last_fates(slice.folded for slice in run.slices)
        self.layout, version = layout, self.held if is_whole else NONE
        missed = max(slice.missed for slice in run.slices)
        run.slices = [Slice(version, dict(fates), missed=missed) for _ in range(count)]

    def first(self, version):
        """The version of a slice when the run opens. One that was cut anew gets a name of its own, also
        where it was brought; a worker's own start, or the weights of -m, are the run's first."""
        if self.before is None:
            return version if version.life else Version(self.run.life, 0)
        newer = version if version > self.before else self.before
        return Version(self.run.life, max(0, newer.number))

    def left(self):
        """{id: seconds when heard of} of those that the run, which has just opened, still expects."""
        self.before = self.held = None
        left = {id: member.heard for id, member in self.back.items() if not self.fits(member)}
        self.gone = {id: member for id, member in self.gone.items() if id in left}
        return left

    def is_left_behind(self, id):
        """Whether a waiting worker has other tensors than the run, which will not get them: the worker
        is not expected, or a member has gone on for a cycle without the change."""
        run, mine = self.run, self.run.waiting[id]
        if self.fits(mine) or not (run.is_open or self.before):
            return False
        old = self.gone.get(id, mine)  # whose step and pace are not what it says now
        limit = old.step + old.pace
        return id not in run.expected or any(m.step >= limit for m in run.members.values())

    def turn_away(self, id):
        """A waiting worker is refused for good."""
        for known in (self.run.waiting, self.run.expected, self.gone):
            known.pop(id, None)

    def drop(self, id):
        """Expect somebody no more: its process, which may be back, is to finish, alone. Returns whether it
        is not back."""
        run, back = self.run, self.run.waiting.get(id)
        run.dropped[id] = back.session if back else run.sessions.get(id, "")
        if not back:
            self.turn_away(id)
            run.away.add(id)
        return not back

    def give_up_absent(self, now):
        """While the run is open, expect nobody any more who is silent for the worker timeout."""
        run = self.run
        for id in [*run.expected] if run.is_open else ():
            if id not in run.waiting and now - run.expected[id] > run.rules.worker_timeout:
                del run.expected[id]
                run.away.add(id)
        self.gone = {id: member for id, member in self.gone.items() if id in run.expected}


class Reading(NamedTuple):
    """What a worker's process says that it has done since it joined."""

    steps: int
    trained: float  # seconds in which it has trained
    waited: float  # seconds in which its training has waited for rounds
    transferred: float = 0.0  # seconds in which its pushes and pulls have moved
    arrived: float = 0.0  # of these, as the server has measured those of pushes

    def since(self, before):
        """The Reading of what was done since another one: what a liar says may go back."""
        return Reading(*(max(0, b - a) for a, b in zip(before, self, strict=True)))


class Paces:
    """How many steps each member takes in a cycle where machines are not alike (--own-pace), so that
    all come to its end at the same time; and without that, what waiting for the slowest costs.

    told: {id: steps of a cycle}; last: ids of those whose contribution came last, in the last rounds.
    """

    def __init__(self, run):
        self.run, self.told = run, {}
        self.last = deque(maxlen=20)

    def begin(self, member):
        """A worker has become a member, in a cycle of its own sync_every, or of what it was told: by a
        server before this one, where it says so."""
        run, member.reading = self.run, Reading(0, 0.0, 0.0)
        member.pushed = None if member.was_in else member.reading
        member.readings = deque([] if member.was_in else [member.reading], maxlen=5)
        member.cycle = member.cycle or member.sync_every
        member.pace = min(member.sync_every, PACES * run.pace)
        if run.rules.own_pace:
            member.cycle = self.told.setdefault(member.id, min(member.cycle, run.pace))
            member.pace = run.pace  # a slower one goes on from the step of the furthest

    def note(self, member, reading, is_push):
        """A worker has said how far it is, in a push or between two."""
        if reading.steps < member.reading.steps:
            return  # a push that was sent again
        member.reading, before = reading, member.pushed
        is_over = is_push or not (member.delay or member.blocked)  # the sync behind the last push
        if before and is_over and 0 < before.steps < reading.steps:
            member.sync = reading.since(before)
        if not member.readings or (is_push and member.readings[-1].steps < reading.steps):
            member.readings.append(reading)

    @staticmethod
    def spent(member, arrived=0.0, delay=0.0):
        """The Reading of what a member, which has just pushed, has done since its last push; None
        where that is not known. The push came in `arrived` seconds, and is adopted in `delay`."""
        before, member.pushed = member.pushed, member.reading
        member.arrived, member.delay = member.arrived + arrived, delay
        return member.reading.since(before) if before else None

    def note_last(self, pushes):
        """A round closes with these pushes."""
        if len(pushes) > 1:
            self.last.append(max(pushes, key=lambda push: push.arrived).worker)

    @staticmethod
    def since(member):
        """The Reading of what a member has done over its last cycles."""
        return member.reading.since(next(iter(member.readings), member.reading))

    def speeds(self):
        """{id: steps per second of training, without waiting} of the members of which it is known: at
        most PACES times the median, so that nobody's word makes all others idle."""
        done = {id: self.since(member) for id, member in self.run.members.items()}
        known = {id: d.steps / d.trained for id, d in done.items() if d.steps > 0 and d.trained > 0}
        most = PACES * statistics.median_low(known.values()) if known else 0
        return {id: min(speed, most) for id, speed in known.items()}

    def of(self, member, now):
        """The steps that a member's next cycle has; None where each keeps its own sync_every. The
        fastest one's are those of the run. Small changes of speed change nothing."""
        if not self.run.rules.own_pace:
            return None
        speeds, before = self.speeds(), self.told[member.id]
        if member.id in speeds:
            steps = self.run.pace * speeds[member.id] / max(speeds.values())
            if abs(steps - before) > before / 10:
                self.told[member.id] = max(1, member.fragments, round(steps))
        steps = round(self.told[member.id] * (1 + self.ahead(member, now)))
        return max(1, member.fragments, steps)

    def heard(self, now):
        """The members that have said of late how fast they train."""
        recently = 2 * self.run.rules.heartbeat_seconds
        return [m for m in self.run.members.values() if m.speed and now - m.heard <= recently]

    def ahead(self, member, now):
        """The part of a cycle of the first member, up to a half, by which a member comes to the end
        of its own before that one does, or less than 0 by which it comes behind: where rounds close
        without waiting for it, nothing else would bring it back in step. A tenth does no harm."""
        rules, heard = self.run.rules, self.heard(now)
        if not rules.quorum or member not in heard:
            return 0.0
        first = min(heard, key=lambda other: other.index)
        seconds = [m.to_go(0, now, rules) * m.cycle / m.speed for m in (first, member)]
        ahead = ((seconds[0] - seconds[1]) * first.speed / first.cycle + 0.5) % 1 - 0.5
        return ahead if abs(ahead) > 0.1 else 0.0

    def waiting(self, member):
        """The share of its time in which a member's training has waited, over its last cycles; None
        where it has said nothing."""
        done = self.since(member)
        return done.waited / whole if (whole := done.trained + done.waited) > 0 else None

    def report(self):
        """By member, the steps of its cycle and the share of its time that it waits."""
        members = self.run.members.items()
        return {
            "paces": {id: member.cycle for id, member in members},
            "waiting": {id: round(self.waiting(member) or 0.0, 4) for id, member in members},
        }

    def costs(self):
        """[(id, share of its time that it waits, id of whom it mostly waits for)] of the members that
        wait much for one that is slow, where all are awaited."""
        if self.run.rules.own_pace or self.run.rules.quorum or len(self.last) < MANY_ROUNDS:
            return []
        [(slowest, times)] = collections.Counter(self.last).most_common(1)
        if times < 0.8 * len(self.last) or slowest not in self.run.members:
            return []
        found = [(m.id, self.waiting(m) or 0.0, slowest) for m in self.run.members.values()]
        return sorted(each for each in found if each[0] != slowest and each[1] >= MUCH_WAITING)

    def sync(self, slices):
        """The Sync of a round of a model's slices, or None where none is over yet. Who waits least
        waits for nobody: that is what a sync costs. The longest transfers tell what the link is."""
        known = [member for member in self.run.members.values() if member.sync]
        if not known:
            return None
        slowest = max((member.sync for member in known), key=lambda sync: sync.transferred)
        cycles = [(member.cycle, self.since(member)) for member in known]
        return Sync(
            seconds=slices * min(member.sync.waited for member in known),
            training=max(cycle * done.trained / max(1, done.steps) for cycle, done in cycles),
            up=slices * slowest.arrived,
            down=slices * max(0.0, slowest.transferred - slowest.arrived),
            delay=min(member.delay for member in known),
        )


class Stalls:
    """Which open rounds wait for too long, and for whom: a worker that is alive need not be working.

    A round waits from its first contribution on. Too long is ten times the median length of the last
    rounds, or --round-timeout. Of several such rounds only the one at the lowest turn tells who is
    stuck: who is missing in the others may be waiting for that one.
    """

    def __init__(self, run):
        self.run = run
        self.lengths = deque(maxlen=20)  # seconds, of the rounds that were closed last
        self.oldest = None, 0.0  # (slice, version) of the open round at the lowest turn, since when

    @property
    def limit(self):
        """Seconds after which a wait is too long."""
        rules = self.run.rules
        if rules.quorum and rules.grace is not None:
            return max(LEAST_STALL_SECONDS, rules.grace)
        if not self.lengths:
            return STALLED_SECONDS
        return max(LEAST_STALL_SECONDS, 10 * statistics.median(self.lengths))

    def closed(self, k):
        """The round of slice k has been closed."""
        self.lengths.append(self.run.slices[k].took)

    def waiting(self):
        """[(slice, seconds when its open round got the first contribution)] in the order of turns."""
        slices = self.run.slices
        found = [k for k, slice in enumerate(slices) if slice.pushes and not slice.folding]
        found.sort(key=self.run.turn)
        return [(k, min(p.arrived for p in slices[k].pushes.values())) for k in found]

    def found(self, now):
        """[{slice, seconds, missing}] of the rounds that wait for too long, in the order of turns."""
        return [
            {"slice": k, "seconds": round(now - since, 1), "missing": sorted(self.run.missing(k))}
            for k, since in self.waiting()
            if now - since > self.limit
        ]

    def stuck(self, now):
        """The ids of members to be given up: those for which the open round at the lowest turn has
        waited longer than --drop-stuck, since it is that. Called several times a second."""
        waiting, oldest = self.waiting(), None
        if waiting and not any(slice.folding for slice in self.run.slices):
            k = waiting[0][0]
            oldest = k, self.run.slices[k].version
        if oldest is None or oldest != self.oldest[0]:
            self.oldest = oldest, now
            return []
        is_stuck = 0 < self.run.rules.drop_stuck < now - self.oldest[1]
        return sorted(self.run.missing(oldest[0])) if is_stuck else []


# --- What a sync costs ------------------------------------------------------------------------
#
# A plain model of a worker's link, by which the server tells which codecs suit a run, and
# tests/plan.py which suit one that is still to be made. Bytes that go one way move one after the
# other, and the way down begins when the way up has ended. A sync is hidden where training stands
# still for it for at most HIDDEN of a round: with full sync that is the time of the transfers, with
# streaming what of them does not fit between a push and its adoption.

# Codecs of the ways up and down that are worth taking, the least lossy first. With "fp32" nothing is
# learned better than with "bf16", and "top16" loses more than "int2" with fewer syncs (tests/levers.py).
PAIRS = tuple((codec, codec) for codec in ("bf16", "int8", "int4", "int2"))


class Sync(NamedTuple):
    """What the transfers of a round take and cost, in seconds."""

    seconds: float  # in which training stands still
    training: float  # that the steps of a round take
    up: float  # in which the whole model moves up, of the worker whose transfers take longest
    down: float  # the same for the way down
    delay: float  # of training from the push of a slice to its adoption

    @property
    def share(self):
        """The share of a round in which training stands still."""
        return self.seconds / max(self.seconds + self.training, 1e-9)


def priced(up, down, training, slices=1, delay=0.0, rest=0.0):
    """The Sync of a round's transfers that take so many seconds up and down, and `rest` for all
    that is not the line. Where the delay is longer than the time between two pushes, several
    slices are under way at a time."""
    interval, trip = max(training / slices, 1e-9), (up + down + rest) / slices
    late = max(0.0, (trip - delay) / max(1.0, delay / interval), max(up, down) / slices - interval)
    return Sync(slices * late, training, up, down, delay)


def fitting(sizes, rates, training, slices=1, delay=0.0, rest=0.0):
    """The first of PAIRS that hides the sync, or None. sizes: {codec: bytes of the whole model};
    rates: bytes per second (up, down) of the worker whose transfers take longest; the others as in
    `priced`."""
    for pair in PAIRS:
        up, down = (sizes[codec] / rate for codec, rate in zip(pair, rates, strict=True))
        if priced(up, down, training, slices, delay, rest).share <= HIDDEN:
            return pair
    return None


# --- The history of a run ---------------------------------------------------------------------
#
# What the run has been like, for people: a *row* for each closed round, which is also its line of
# rounds.jsonl, from which the history is made again at a restart. Rows are merged into *points*: each
# stands for `span` rounds, which is doubled where there would be more points than POINTS, and two
# neighbours become one. So a run of any length takes the same memory, and a curve of it the same time.
#
# A run that goes on from an older checkpoint makes rounds again: the first row of such a round takes
# the place of all from there on. The totals count both, as both have cost what they have cost.

SUMS = "bytes_up", "bytes_down", "seconds", "seconds_waiting", "seconds_folding", "faults"
TOTALS = "steps", "tokens", "bytes_up", "bytes_down", "seconds_waiting", "seconds_folding"
LATEST = "round", "fragment", "time", "step"
PUSHED = "trained", "waited", "transferred", "steps", "weight", "late"  # of a worker's push


def rounded(number):
    """A loss to as many digits as a curve shows; None stays None."""
    return None if number is None else float(f"{number:.5g}")


def mean_of(pairs):
    """The mean of some (sum, count), or None without any."""
    pairs = [*pairs]
    count = sum(count for _, count in pairs)
    return sum(total for total, _ in pairs) / count if count else None


def first_of(table):
    """The first MOST_NAMES entries of a dict."""
    return dict(itertools.islice(table.items(), MOST_NAMES))


def renew(table, key, value, most):
    """Make an entry of a dict its newest one; at most so many are kept."""
    table.pop(key, None)
    table[key] = value
    while len(table) > most:
        del table[next(iter(table))]


@dataclass(eq=False, kw_only=True)
class Point:
    """Closed rounds of a history, one or several in a row. It never changes."""

    n: int  # number of its last round, of all slices
    rounds: int = 1
    latest: dict  # of its last round: those of LATEST, and the number of members
    sums: dict  # those of SUMS, the norm and the share
    losses: dict  # id -> (sum, count) of the losses in its pushes
    evaluations: dict  # id -> newest evaluation loss that it has reported, of whatever model
    tested: tuple  # (sum, count) of the evaluation losses of the global model

    @classmethod
    def of(cls, n, row, step):
        """The point of one closed round."""
        losses = {id: (loss, 1) for id, loss in row["losses"].items() if loss is not None}
        tested = row["evaluation"]
        latest = {name: row[name] for name in LATEST} | {"step": step}
        return cls(
            n=n,
            latest=latest | {"members": len(row["members"])},
            sums={name: row[name] for name in (*SUMS, "norm", "share")},
            losses=first_of(losses),
            evaluations=first_of(row["evaluations"]),
            tested=(0.0, 0) if tested is None else (tested, 1),
        )

    def with_next(self, other):
        """The point of these rounds and of those of another one, which follow."""
        losses = {**self.losses}
        for id, (total, count) in other.losses.items():
            before = losses.get(id, (0.0, 0))
            losses[id] = before[0] + total, before[1] + count
        return Point(
            n=other.n,
            rounds=self.rounds + other.rounds,
            latest=other.latest,
            sums={name: number + other.sums[name] for name, number in self.sums.items()},
            losses=first_of(losses),
            evaluations=first_of(self.evaluations | other.evaluations),
            tested=(self.tested[0] + other.tested[0], self.tested[1] + other.tested[1]),
        )

    @functools.cached_property
    def told(self):
        """Its fields in the reply to a request for the history."""
        sums = {name: round(self.sums[name], 4) for name in SUMS}
        return {
            "n": self.n,
            **self.latest,
            "loss": rounded(mean_of(self.losses.values())),
            "losses": {id: rounded(mean_of([pair])) for id, pair in self.losses.items()},
            "evaluation": rounded(mean_of([self.tested])),
            "evaluations": {id: rounded(loss) for id, loss in self.evaluations.items()},
            "norm": rounded(self.sums["norm"] / self.rounds),
            "share": round(self.sums["share"] / self.rounds, 4),
            **sums,
        }


class History:
    """The rounds of a run, and who has come and gone. It knows no socket, lock or file, and all
    times are arguments: those of `left` and of rows in Unix seconds, the others as of any one clock.

    points: [Point]; span: rounds that one stands for, but the last, which may be filled yet; recent: the
    last rounds, (Point, further fields) each; count: rounds in all; totals: {name: number}; gone: {id:
    (Unix seconds, why)} of those that have left, oldest first; evaluation: (step, loss) of the global
    model, newest, or None; evaluated: {id: (step, loss)} of the newest evaluations.
    """

    def __init__(self):
        self.points, self.span, self.count = [], 1, 0
        self.recent = deque(maxlen=RECENT)
        counts = "refused", "faults", "joins", "departures"  # the last three as they happen
        self.totals = dict.fromkeys(("rounds", *TOTALS, *counts), 0)
        self.gone, self.evaluation, self.evaluated = {}, None, {}
        self.rounds = {}  # slice -> its newest round
        self.since = None  # seconds when the last round was closed, or the run opened
        self.begin()

    # --- What happens between two rounds ---

    def begin(self):
        """Gather for the next row."""
        self.joined, self.left, self.faults = deque(maxlen=MOST_NAMES), deque(maxlen=MOST_NAMES), 0
        self.tests, self.tested = {}, []  # {id: evaluation loss}; those of the global model

    def opens(self, now):
        """The run opens: its first round begins."""
        self.since = now

    def join(self, ids):
        """Workers have become members that were none."""
        self.totals["joins"] += len(ids)
        for id in ids:
            self.gone.pop(id, None)
            self.joined.append(id)

    def leave(self, id, why, when):
        """A member has left, or was given up."""
        self.totals["departures"] += 1
        self.left.append([id, why])
        renew(self.gone, id, (when, why), MOST_GONE)

    def fault(self, count):
        """So many things have gone wrong and were survived."""
        self.totals["faults"] += count
        self.faults += count

    def evaluate(self, id, step, loss, is_global):
        """A worker says its newest evaluation loss, which it says again until it has another one."""
        before = self.evaluated.get(id, (-1, None))
        renew(self.evaluated, id, (max(step, before[0]), loss), KNOWN_WORKERS)
        if step <= before[0] and loss == before[1]:
            return
        self.tests[id] = loss
        if is_global:
            self.tested.append(loss)
            if self.evaluation is None or step >= self.evaluation[0]:
                self.evaluation = step, loss

    # --- Rounds ---

    def close(self, row, now):
        """A round is closed: complete its row, and add it."""
        since = now if self.since is None else self.since
        row |= {
            "seconds": round(max(0.0, now - since), 4),
            "joined": [*self.joined],
            "left": [*self.left],
            "faults": self.faults,
            "evaluations": self.tests,
            "evaluation": mean_of((loss, 1) for loss in self.tested),
        }
        self.begin()
        self.since = max(since, now)  # folds of several slices may end in another order
        self.add(row)
        row["totals"] = {**self.totals}

    def restore(self, row):
        """Add a row of before a restart, as `row_of` gives it; those before it are there."""
        if row["seconds"] is None:
            before = self.points[-1].latest["time"] if self.points else row["time"]
            row["seconds"] = max(0.0, row["time"] - before)
        self.add(row)
        for name in self.totals:  # older rows may be in no file any more
            self.totals[name] = max(self.totals[name], row["totals"].get(name, 0))
        for id in row["joined"]:
            self.gone.pop(id, None)
        for id, why in row["left"]:
            renew(self.gone, id, (row["time"], why), MOST_GONE)
        for id, loss in row["evaluations"].items():
            renew(self.evaluated, id, (row["step"] or 0, loss), KNOWN_WORKERS)
        if row["evaluation"] is not None:
            self.evaluation = row["step"] or 0, row["evaluation"]

    def add(self, row):
        """Add the row of a closed round."""
        k, number = row["fragment"], row["round"]
        if number <= self.rounds.get(k, -1):
            self._cut(k, number)
        self.rounds[k] = number
        step = row["step"]
        if step is None:  # as earlier versions wrote it
            before = self.points[-1].latest["step"] if self.points else 0
            step = before + (k == 0) * round(row["steps"] / max(1, len(row["weights"])))
        self.count += 1
        point = Point.of(self.count, row, step)
        more = {name: first_of(row[name]) for name in ("pushed", "reasons")}
        self.recent.append((point, more | {name: row[name] for name in ("joined", "left")}))
        self._merge(point)
        self.totals["rounds"] += 1
        self.totals["refused"] += len(row["refused"])
        for name in TOTALS:
            self.totals[name] += row[name]

    def _merge(self, point):
        if self.points and self.points[-1].rounds < self.span:
            self.points[-1] = self.points[-1].with_next(point)
            return
        if len(self.points) == POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points, self.span = [a.with_next(b) for a, b in pairs], 2 * self.span
        self.points.append(point)

    def _cut(self, k, number):
        """Forget the rounds from round `number` of slice k on, which are made again. Where that is
        further back than the last rounds, the whole points in which they are."""
        there = [
            p.n for p, _ in self.recent if (p.latest["fragment"], p.latest["round"]) == (k, number)
        ]
        earlier = [point.n for point in self.points if point.latest["round"] < number]
        self.count = there[0] - 1 if there else max(earlier, default=0)
        self.points = [point for point in self.points if point.n <= self.count]
        kept = [(point, more) for point, more in self.recent if point.n <= self.count]
        self.recent = deque(kept, maxlen=RECENT)
        last = self.points[-1].n if self.points else 0
        for point, _ in self.recent:
            if point.n > last:
                self._merge(point)
        self.rounds = {j: min(newest, number - 1) for j, newest in self.rounds.items()}
        step = self.points[-1].latest["step"] if self.points else 0
        if self.evaluation and self.evaluation[0] > step:
            tested = [(p.latest["step"], p.tested) for p in self.points if p.tested[1]]
            self.evaluation = (tested[-1][0], mean_of([tested[-1][1]])) if tested else None

    # --- What people ask ---

    def rate(self):
        """Steps of the run per second over the last rounds, 0 where that is not known."""
        last = [point for point, _ in self.recent][-RATE_ROUNDS - 1 :]
        if not last:
            return 0.0
        begin = 0 if last[0].n == 1 else last.pop(0).latest["step"]
        seconds = sum(point.sums["seconds"] for point in last)
        return max(0, last[-1].latest["step"] - begin) / seconds if seconds > 0 else 0.0

    def later(self, after, span):
        """What a reply to a request for the history is made of, without any work: the whole, or what
        came after round `after` for who has the points of before with the same span."""
        after = after if after <= self.count else 0
        is_more = span == self.span
        return {
            "span": self.span,
            "count": self.count,
            "points": [p for p in self.points if p.n > after or not is_more],
            "recent": [(p, more) for p, more in self.recent if p.n > after],
        }


# --- The global model -------------------------------------------------------------------------
#
# The numbers of a run: the parameters as one float32 vector, the outer optimizer's momentum beside
# it, and the residual that a download codec of few bits has left. A fold goes through a slice once, chunk
# by chunk in a few threads: decode the pushes, take their mean, take the outer step, encode the
# update, keep what its rounding lost, and add the decoded update, the very bytes that are sent, to
# the parameters. So every replica that adds the same bytes has the same bits.
#
# Two kinds of readers follow a fold. The replies that carry its entry send each part of it as soon
# as it is made. A snapshot shows a slice as it was when the snapshot was taken: a fold that comes
# to a chunk before the reader leaves a copy of the chunk for it.
#
# Methods that say "with the lock" are called with the server's lock, the others without. A slice is
# folded by one caller at a time. The model's own lock is held for a few list operations only.


@dataclass(kw_only=True)
class Outer:
    """The settings of the outer step: SGD with Nesterov momentum, as torch.optim.SGD has it."""

    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    warmup: bool = True  # whether the momentum rises over the first rounds

    def step(self, mean, velocity, made, part=1.0):
        """Turn the mean of the pseudo-gradients, a chunk, into an update in place, with the
        pseudo-gradient g in the gradient's place, after `made` outer steps:

        v = mu * v + g;  d = g + mu * v if nesterov else v;  update = -lr * d

        A `part` f of a step has mu^f in mu's place, f * g in g's in the first line, and f * lr in lr's:
        so the parts of a step come to about the same as the whole.
        """
        mu = protocol.momentum_at(made, self.momentum, self.warmup) ** part
        velocity.mul_(mu).add_(mean, alpha=part)
        delta = mean.add_(velocity, alpha=mu) if self.nesterov else mean.copy_(velocity)
        delta.mul_(-self.lr * part)

    def delayed(self, mean, velocity, gathered, made, part, completes):
        """As `step`, with momentum only where the parts since the last time come to a whole step
        (`completes`); `gathered` is their sum. Delayed Nesterov of arXiv 2401.09135, with c = 0 and the
        number of workers 1 / part:

        d = d + f * g;  update = -lr * f * g;  then, with a whole step,
        u = mu * v + d;  update = update - lr * mu * (u if nesterov else v);  v = u;  d = 0
        """
        gathered.add_(mean, alpha=part)
        mean.mul_(-self.lr * part)
        if completes:
            mu = protocol.momentum_at(made, self.momentum, self.warmup)
            if not self.nesterov:
                mean.add_(velocity, alpha=-self.lr * mu)
            velocity.mul_(mu).add_(gathered)
            if self.nesterov:
                mean.add_(velocity, alpha=-self.lr * mu)
            gathered.zero_()


@dataclass(eq=False, kw_only=True)
class Entry:
    """An entry of a slice's log: the update from one version to the next, as it is sent. Sending
    begins while the fold still makes it."""

    k: int  # slice
    base: Version  # version that the update applies to
    version: Version  # version that it leads to
    fates: dict  # worker -> Fate of the push that the entry lists
    plain: bool  # whether the outer step was a plain mean
    part: float  # of an outer step that it makes
    made: float  # outer steps that the slice has made with it
    step: int  # step of the run
    codec: protocol.Codec  # codec of the update
    count: int  # elements of the update; 0 where no numbers changed
    payload: protocol.Payload | None = None  # the encoded update, once its memory is there
    readers: int = 0  # replies that are being sent from `payload`; changed with the lock
    ready: int = 0  # elements that can be sent; with the checksum one more
    checksum: torch.Tensor | None = None  # checksum of the slice after adding
    progress: threading.Condition = field(default_factory=threading.Condition)

    @property
    def specs(self):
        """The tensors that a message with this entry carries."""
        return [*(self.codec.layout(self.count) if self.count else ()), protocol.Checksum.SPEC]

    @property
    def nbytes(self):
        """Size of the tensors that a message with this entry carries."""
        return protocol.payload_bytes(self.specs)

    def advance(self, stop):
        """Let elements up to `stop` be sent."""
        with self.progress:
            self.ready = stop
            self.progress.notify_all()

    def finish(self):
        """Let the checksum be sent, and with it the end of the entry. Called once the new version
        is known to all who ask for it."""
        self.advance(self.count + 1)

    def pieces(self):
        """The bytes of the tensors in pieces, each as soon as it is there; the checksum is last."""
        start = 0
        while start < self.count:
            with self.progress:
                self.progress.wait_for(lambda start=start: self.ready > start)
                stop = min(self.ready, self.count)
            first, last = (protocol.payload_bytes(self.codec.layout(n)) for n in (start, stop))
            yield self.payload.raw[first:last]
            start = stop
        with self.progress:
            self.progress.wait_for(lambda: self.ready > self.count)
        yield self.checksum


class Snapshot:
    """Vectors of one slice as they were when the snapshot was taken, for readers at their own pace,
    while folds of the slice go on. A fold that comes to a chunk before a reader leaves a copy of it,
    one for all: a slow reader costs a slice at most, and the same as many slow ones.

    version: of the slice, where all who ask before the next fold share the snapshot; None: it has one
    reader from the start, None.
    """

    def __init__(self, vectors, version=None):
        self.vectors, self.version = vectors, version  # the vectors are views of one length
        self.count = vectors[0].numel()
        self.places = {None: 0} if version is None else {}  # reader -> elements that it has taken
        self.kept = {}  # start -> copies of that chunk of each vector
        self.lock = threading.Lock()  # guards `places` and `kept`

    @property
    def taken(self):
        """Elements that all readers have taken; more than there are where nobody reads."""
        return min(self.places.values(), default=self.count + 1)

    def _copy(self, start, stop):
        return [v[start:stop].clone(memory_format=torch.contiguous_format) for v in self.vectors]

    def keep(self, start, stop):
        """Elements start to stop, a chunk, are about to change."""
        with self.lock:
            if start >= self.taken and start not in self.kept:
                self.kept[start] = self._copy(start, stop)

    def chunks(self, reader=None):
        """Yields [chunk of each vector], chunk after chunk."""
        for start, stop in protocol.chunks(self.count):
            with self.lock:
                if self.places.get(reader) != start:
                    raise RuntimeError("a snapshot was read twice, or after it was closed")
                parts = self.kept.get(start) or self._copy(start, stop)
                self.places[reader] = stop
                if self.taken > start:
                    self.kept.pop(start, None)
            yield parts

    def pieces(self, reader=None):
        """Yields the chunks of the first vector."""
        return (parts[0] for parts in self.chunks(reader))

    def close(self, reader=None):
        """Stop keeping copies for a reader."""
        with self.lock:
            self.places.pop(reader, None)
            taken = self.taken
            self.kept = {start: parts for start, parts in self.kept.items() if start >= taken}

    @contextlib.contextmanager
    def reading(self):
        """For one more reader: yields what gives it the chunks, then their Checksum. Begun while the
        slice is not being folded."""
        reader, sums = object(), protocol.Checksum()
        with self.lock:
            self.places[reader] = 0

        def pieces():
            for part in self.pieces(reader):
                sums.add(part)
                yield part
            yield sums.digest()

        try:
            yield pieces()
        finally:
            self.close(reader)


def overlaps(values, first, vectors, stripe):
    """Yields (FlatModel, place, part of a vector) for each fragment's vector: of a float32 tensor, whose
    place in the flat vector is `first`, what lies from that place of the fragment on is the part's."""
    for k, vector in enumerate(vectors):
        flat = protocol.FlatModel([values], k, len(vectors), stripe, first)
        _, low, high, _ = flat.parts[0]
        yield flat, low, vector[low:high]


def interleaved(snapshots, stripe):
    """Yields [run of each flat vector], run after run, from the snapshots of all fragments: the
    same chunk of every fragment makes a run of the flat vectors."""
    for chunks in itertools.zip_longest(*(snapshot.chunks() for snapshot in snapshots)):
        runs = []
        for parts in zip(*(chunk for chunk in chunks if chunk), strict=True):
            parts += (torch.empty(0),) * (len(snapshots) - len(parts))
            runs.append(torch.empty(sum(map(len, parts))))
            for flat, start, part in overlaps(runs[-1], 0, parts, stripe):
                flat.write(start, part)
        yield runs


class GlobalModel:
    """The numbers of a run, its slices' logs, and the memory of what is sent and received.

    manifest: specs of the parameters; buffers: specs of the floating-point buffers, which are the
    last slice where there are any; total: number of parameters; count: of slices; sizes: elements by
    slice; logs: by slice, the kept entries, oldest first. outer: {name: vector} of what the outer step
    keeps: the momentum, what the download codec has lost (residual), and the parts of the step under
    way where momentum waits for its end (gathered). In these and in `params` one slice lies behind the other.
    """

    def __init__(self, manifest, buffers, num_fragments, up, down, error_feedback):
        self.manifest, self.buffers = list(manifest), list(buffers)
        self.num_fragments = num_fragments
        self.up, self.down = protocol.CODECS[up], protocol.CODECS[down]
        self.total = sum(spec.numel for spec in self.manifest)
        whole = [torch.empty(self.total, device="meta")]
        flats = [protocol.FlatModel(whole, k, num_fragments) for k in range(num_fragments)]
        self.sizes, self.stripe = [flat.numel for flat in flats], flats[0].stripe
        aligned = (-(-size // protocol.BLOCK) * protocol.BLOCK for size in self.sizes[:-1])
        self.starts = [0, *itertools.accumulate(aligned)]  # of the fragments in `params`
        self.params = torch.zeros(self.starts[-1] + self.sizes[-1])
        self.outer = {"momentum": torch.zeros_like(self.params)}
        if self.down.feedback and error_feedback:
            self.outer["residual"] = torch.zeros_like(self.params)
        self.values = torch.zeros(sum(spec.numel for spec in self.buffers))  # of the buffers
        self.count = num_fragments + bool(self.buffers)
        self.sizes += [self.values.numel()] * bool(self.buffers)
        self.logs = [deque() for _ in range(self.count)]
        self.idle = [[] for _ in range(self.count)]  # by slice, payloads for the next pushes
        self.payloads = [weakref.WeakSet() for _ in range(self.count)]  # those, and the ones in use
        self.spares = [None] * self.count  # by slice, a payload for the next entry
        self.snapshots = [weakref.WeakSet() for _ in range(self.count)]
        self.past = None  # (GlobalModel, {name: tensor}) that `inherit` takes from
        self.lock = threading.Lock()  # guards `idle`, `payloads`, `spares` and `snapshots`
        self.warming = threading.Lock()  # held while memory is got for the first rounds
        # Several chunks are worked on at a time: more threads for one chunk would only wait.
        torch.set_num_threads(1)
        self.threads = concurrent.futures.ThreadPoolExecutor(
            FOLDING_THREADS, initializer=torch.set_num_threads, initargs=[1]
        )

    # --- Slices ---

    def codec(self, k):
        """(codec of pushes, codec of updates) of slice k."""
        is_buffers = k == self.num_fragments
        return (protocol.CODECS["fp32"],) * 2 if is_buffers else (self.up, self.down)

    def vectors(self, k):
        """[parameters, and those of `outer`] of slice k, as views. The slice of the buffers has its
        values only."""
        if k == self.num_fragments:
            return [self.values]
        return [self.parts(vector)[k] for vector in (self.params, *self.outer.values())]

    def parts(self, vector):
        """The parts of `params`, or of a vector of `outer`, that are the fragments'."""
        places = zip(self.starts, self.sizes, strict=False)
        return [vector[start : start + size] for start, size in places]

    def check(self, manifest, buffers):
        """Raise Refused where a worker's parameters and buffers are not those of the model."""
        ours, theirs = self.manifest + self.buffers, [*manifest, *buffers]
        if fault := protocol.explain_mismatch(ours, theirs):
            raise Refused("model", f"this worker's model is not the one of the run: {fault}")

    # --- Memory ---

    def payload(self, k):
        """A Payload for a push of slice k: one that was given back, or a new one."""
        with self.lock:
            if self.idle[k]:
                return self.idle[k].pop()
        payload = protocol.Payload(self.codec(k)[0].layout(self.sizes[k]))
        with self.lock:
            self.payloads[k].add(payload)
        return payload

    def give_back(self, k, payload):
        """Keep the Payload of a push of slice k, which nobody reads any more, for another push."""
        with self.lock:
            if payload not in self.idle[k]:
                self.idle[k].append(payload)

    def warm(self, k, count=1):
        """Get the memory for `count` pushes of slice k, and for its first entry, before it is
        needed: touching fresh memory takes longer than filling it."""
        up, down = (codec.layout(self.sizes[k]) for codec in self.codec(k))
        with self.warming:  # joins come together, and each asks for the memory of all
            fresh = [protocol.Payload(up) for _ in range(count - len(self.payloads[k]))]
            is_first = not self.logs[k] and self.spares[k] is None
            spare = protocol.Payload(down) if is_first else None
            with self.lock:
                self.idle[k] += fresh
                self.payloads[k].update(fresh)
                self.spares[k] = self.spares[k] or spare

    # --- Rounds ---

    def counted(self, round):
        """The pushes of a round whose numbers count. Late values of buffers do not."""
        pushes = [push for push in round.pushes if push.payload is not None and not push.refused]
        return [push for push in pushes if not push.late or round.k < self.num_fragments]

    def announce(self, round, step):
        """Append the entry of a closed round to its slice's log, still without numbers, and drop
        old entries: together the kept ones are smaller than the slice, or one. Needs the lock."""
        k = round.k
        if round.mode == "delayed" and "gathered" not in self.outer:
            self.outer["gathered"] = torch.zeros_like(self.params)
        entry = Entry(
            k=k,
            base=round.base,
            version=round.version,
            fates=round.fates,
            plain=round.plain,
            part=round.part,
            made=round.before + round.part,
            step=step,
            codec=self.codec(k)[1],
            count=self.sizes[k] if self.counted(round) else 0,
        )
        log = self.logs[k]
        log.append(entry)
        total = sum(kept.nbytes for kept in log)
        while len(log) > 1 and (total >= 4 * self.sizes[k] or len(log) > MAX_ENTRIES):
            old = log.popleft()
            total -= old.nbytes
            with self.lock:
                if old.payload is not None and not old.readers:
                    self.spares[k] = old.payload
        with self.lock:
            del self.idle[k][len(round.pushes) :]  # workers that have gone need no memory
        return entry

    def entries(self, k, held, upto=None):
        """The entries of slice k that lead from version `held` on, to version `upto` or as far as
        there are any, also one being made. None where the log does not lead there. Needs the lock."""
        log = list(self.logs[k])
        versions = [log[0].base, *(entry.version for entry in log)] if log else []
        if held == upto or held not in versions or upto not in (None, *versions):
            return [] if held == upto else None
        first = versions.index(held)
        last = len(log) if upto is None else versions.index(upto)
        return log[first:last] if first <= last else None

    def fold(self, round, entry, outer):
        """Fold a closed round into its slice: fill its entry, whose numbers are sent on the way,
        and add them to the slice. Returns (norm of the mean, pushes that count). `entry.finish()`
        then lets the end of the entry be sent, once the new version is known."""
        counted, k = self.counted(round), round.k
        if not counted:
            entry.checksum = protocol.checksum_of(self.vectors(k)[0])
            return 0.0, []
        with self.lock:
            entry.payload, self.spares[k] = self.spares[k], None
        entry.payload = entry.payload or protocol.Payload(entry.codec.layout(entry.count))
        work = self._fold_values if k == self.num_fragments else self._fold_chunk
        largest = max(push.weight for push in counted)
        pushes = [(push.payload.tensors, push.weight / largest) for push in counted]
        work = functools.partial(work, round, entry, outer, pushes)

        size = max(codec.size for codec in self.codec(k))

        def fold(chunk):
            self._keep(k, *chunk)
            checksum, squares = protocol.Checksum(), 0.0
            for tile in protocol.chunks(chunk[1], size, chunk[0]):
                part, square = work(*tile)
                checksum.add(part.contiguous())
                squares += square
            return checksum.sums, squares, chunk[1]

        checksum, squares = protocol.Checksum(), 0.0
        for sums, square, stop in self.threads.map(fold, protocol.chunks(entry.count)):
            checksum.sums += sums
            squares += square
            entry.advance(stop)
        entry.checksum = checksum.digest()
        return squares**0.5, counted

    def _fold_chunk(self, round, entry, outer, pushes, start, stop):
        """Fold a chunk of the parameters; returns (the new chunk, square of the mean's norm)."""
        part, *others = (v[start:stop] for v in self.vectors(round.k))
        kept = dict(zip(self.outer, others, strict=True))
        velocity, residual, gathered = (kept.get(n) for n in ("momentum", "residual", "gathered"))
        delta = protocol.scratch("mean", part, stop - start)
        (first, weight), *more = pushes
        self.up.decode(first, start, delta)
        if weight != 1:
            delta.mul_(weight)
        for push, weight in more:
            delta.add_(self.up.decoded(push, start, delta), alpha=weight)
        delta.div_(sum(weight for _, weight in pushes))
        square = protocol.square_of(delta)
        if round.plain:
            delta.mul_(-round.share)
            if gathered is not None and round.completes:  # they are no parts of the next step
                velocity.add_(gathered)
                gathered.zero_()
        elif gathered is not None:
            completes = round.completes
            outer.delayed(delta, velocity, gathered, round.before, round.part, completes)
        else:
            outer.step(delta, velocity, round.before, round.part)
        if residual is not None:
            delta.add_(residual)
        update = entry.payload.tensors
        numbers = self.down.sent(delta, update, start)
        if self.down.square(numbers, update, start) == math.inf:  # a huge --outer-lr, for one
            for vector in (delta, *others):
                vector.zero_()
            numbers = self.down.sent(delta, update, start)
        if residual is not None:
            torch.sub(delta, numbers, out=residual)
        part.add_(numbers)
        return part, square

    def _fold_values(self, round, entry, outer, pushes, start, stop):
        """Move a chunk of the buffers to the mean of the pushed values, taken in float64 and then
        rounded; returns (the new chunk, the square of the move's norm)."""
        part = self.values[start:stop]
        delta = protocol.scratch("mean", part, stop - start)
        total = torch.zeros(stop - start, dtype=torch.float64)
        for push, _ in pushes:
            total += entry.codec.decoded(push, start, delta)
        delta.copy_(total.div_(len(pushes))).sub_(part)
        entry.codec.encode(delta, entry.payload.tensors, start)
        part.add_(delta)
        return part, protocol.square_of(delta)

    # --- Reading and writing whole slices ---

    def freeze(self):
        """Snapshots of everything by slice, for a checkpoint: [parameters, momentum, residual] of
        each fragment, and the buffers. Called with the lock while nothing is being folded."""
        return [self.snapshot(k, whole=True) for k in range(self.count)]

    def snapshot(self, k, whole=False, version=None):
        """A Snapshot of slice k's parameters, and if `whole` of its other vectors too. Called with
        the lock while slice k is not being folded; the caller closes the snapshot after use."""
        snapshot = Snapshot(self.vectors(k) if whole else self.vectors(k)[:1], version)
        with self.lock:
            self.snapshots[k].add(snapshot)
        return snapshot

    def shared(self, k, version):
        """The Snapshot of slice k's parameters, which are at `version`: the same for all who ask before
        the next fold. Called with the lock while slice k is not being folded."""
        with self.lock:
            found = [each for each in self.snapshots[k] if each.version == version]
        return found[0] if found else self.snapshot(k, version=version)

    def _keep(self, k, start, stop):
        with self.lock:
            snapshots = list(self.snapshots[k])
        for snapshot in snapshots:
            snapshot.keep(start, stop)

    def take(self, k, values):
        """Write all of slice k as a worker has brought it, before the run opens. The values contain
        the residual, and the log does not lead to them. Where the values are not all finite,
        nothing is written: raises Refused."""
        if not all(protocol.within(part) for part in values.split(protocol.CHUNK)):
            raise Refused("model", "the parameters to start from are not all finite")
        for chunk in protocol.chunks(self.sizes[k]):
            self._keep(k, *chunk)
        self.logs[k].clear()
        part, *others = self.vectors(k)
        part.copy_(values)
        for vector in others[1:]:  # those behind the momentum
            vector.zero_()

    def put(self, found):
        """Set the parameters and buffers among {name: tensor}, as the weights of -m have them.
        Raises Refused where they are not finite."""
        for k, size in enumerate(self.sizes):
            for chunk in protocol.chunks(size):
                self._keep(k, *chunk)
        fragments = self.parts(self.params)
        for vectors, specs in ((fragments, self.manifest), ([self.values], self.buffers)):
            for spec, first, _ in protocol.ranges(specs):
                flat = found[spec.name].detach().reshape(-1) if spec.name in found else ()
                for start, stop in protocol.chunks(len(flat)):
                    part = flat[start:stop].float()
                    if not protocol.within(part):
                        raise Refused("model", "the parameters to start from are not all finite")
                    for view, place, own in overlaps(part, first + start, vectors, self.stripe):
                        view.read(place, own)

    def inherit(self):
        """Take from `past`: weights by name, then the numbers, momentum and residual of the tensors
        that a model with other tensors has too, whose names and shapes are the same."""
        old, found = self.past
        self.put(found)
        for name in old.outer:
            self.outer.setdefault(name, torch.zeros_like(self.params))
        mine = self.manifest, *map(self.parts, (self.params, *(self.outer[n] for n in old.outer)))
        its = old.manifest, *map(old.parts, (old.params, *old.outer.values()))
        values = (self.buffers, [self.values]), (old.buffers, [old.values])
        for own, other in ((mine, its), values):
            places = {(s.name, s.shape): first for s, first, _ in protocol.ranges(other[0])}
            for spec, first, _ in protocol.ranges(own[0]):
                place = places.get((spec.name, spec.shape))
                if place is None:
                    continue
                part = torch.empty(spec.numel)
                for vectors, before in zip(own[1:], other[1:], strict=True):
                    for flat, start, numbers in overlaps(part, place, before, old.stripe):
                        flat.write(start, numbers)
                    for flat, start, numbers in overlaps(part, first, vectors, self.stripe):
                        flat.read(start, numbers)

    def tensors(self, snapshots):
        """Yields (spec, tensor of its dtype) of all that is in the snapshots of every slice."""
        runs = (run[0] for run in interleaved(snapshots[: self.num_fragments], self.stripe))
        values = itertools.chain(
            *(snapshot.pieces() for snapshot in snapshots[self.num_fragments :])
        )
        for specs, pieces in ((self.manifest, runs), (self.buffers, values)):
            piece = torch.empty(0)  # what is left of the run that was read last
            for spec in specs:
                flat = torch.empty(spec.numel, dtype=spec.dtype)
                done = 0
                while done < spec.numel:
                    piece = piece if piece.numel() else next(pieces)
                    count = min(piece.numel(), spec.numel - done)
                    flat[done : done + count].copy_(piece[:count])
                    piece, done = piece[count:], done + count
                yield spec, flat.view(spec.shape)


# --- The store: weights, checkpoints, the final model -----------------------------------------
#
# A checkpoint is a folder `checkpoint-ROUND` with safetensors files: the parameters and buffers
# in float32 under their names, and the outer optimizer's vectors, whose header has the state of the
# run as JSON. A third has the tensors that were trained before and are frozen now, if there are any.
# It is written beside, synced and renamed, so that a folder with the name is whole;
# one that cannot be read all the same is passed over for the one before it. `members.json` has the
# names of who takes part since the newest checkpoint.
#
# The header's field `program` tells this program's files from others', which it never replaces. A
# disk that is full stops no training: the error is logged and shown in the status, and the next
# save tries again.


def choose_output(model, output_dir):
    """(output folder, folder or file with weights or None) for `-m` and `--output-dir`."""
    foreign = os.path.isfile(model) or protocol.foreign_weights(model)
    beside = os.path.splitext(model)[0] if os.path.isfile(model) else os.path.abspath(model)
    output = output_dir or (beside + "-diloco" if foreign else model)
    if protocol.foreign_weights(output):
        raise SystemExit(
            f"{output} holds weights that this program did not write, and it will not write there; "
            "name another folder with --output-dir"
        )
    own = os.path.isfile(os.path.join(model, "model.safetensors"))
    return output, model if foreign or own else None


def heads_of(fields):
    """[(Version, {worker: Fate})] by slice, from the header of a checkpoint. That of protocol
    version 2 has plain sequence numbers. Raises ProtocolError."""
    heads = []
    for saved in fields["fragments"]:
        version, folded = protocol.version_of(saved["label"]), saved["folded"]
        if type(folded) is dict:
            plain = {w: [fate, "", max(0, version.number)] for w, fate in folded.items()}
            folded = {w: plain[w] if type(fate) is int else fate for w, fate in folded.items()}
        heads.append((version, protocol.fates_of(folded)))
    return heads


def names_of(fields):
    """What `Run.names` gave, from JSON that may be damaged. Raises ProtocolError."""
    check = protocol.Message("names", fields, []).field
    names = {name: check(name, list, []) for name in ("members", "stopping")}
    names |= {name: check(name, dict, {}) for name in ("indices", "sessions", "dropped")}
    for name, found in names.items():
        values = found if type(found) is list else found.values()
        kind = int if name == "indices" else str
        if not all(type(value) is kind for value in values):
            raise ProtocolError(f"a value of {name} is not of the type {kind.__name__}")
    if min(names["indices"].values(), default=0) < 0:
        raise ProtocolError("a worker's index is negative")
    life = protocol.version_of([check("life", str, ""), 0]).life
    return names | {"life": life, "pace": check("pace", int, 0)}


def is_text(value):
    """Whether a value from JSON is a text that can be sent and shown."""
    return type(value) is str and len(value) <= 512 and value.isprintable()


def numbers_of(table):
    """The entries of a table from JSON, of which some may be damaged, that are a number of sound size."""
    table, limit = table if type(table) is dict else {}, protocol.MAX_ABS
    sound = (each for each in table.items() if type(each[1]) in (int, float))
    return {name: n for name, n in sound if is_text(name) and -limit <= n <= limit}


def row_of(line):
    """The row of a round (see History) from a line of rounds.jsonl, of which some may be damaged, or
    missing as an earlier version wrote it. Raises ProtocolError."""
    check = protocol.Message("a line", line, []).field
    count = functools.partial(check, kind=int, default=0)
    real = functools.partial(check, kind=float, default=0.0, high=protocol.MAX_ABS)
    listed = functools.partial(check, kind=list, default=[])
    tables = "losses", "evaluations", "weights"
    pushed = {id: numbers_of(each) for id, each in check("pushed", dict, {}).items() if is_text(id)}
    pairs = [pair for pair in listed("left") if type(pair) is list and len(pair) == 2]
    return {
        **{name: check(name, int) for name in ("round", "fragment")},
        **{name: count(name) for name in ("steps", "tokens", "faults", "bytes_up", "bytes_down")},
        **{name: real(name) for name in ("time", "norm", "seconds_waiting", "seconds_folding")},
        **{name: numbers_of(line.get(name)) for name in tables},
        **{name: [*filter(is_text, listed(name))] for name in ("members", "refused", "joined")},
        "share": real("share", default=1.0),
        "step": count("step", default=None),
        "seconds": real("seconds", default=None),
        "evaluation": check("evaluation", float, None, -protocol.MAX_ABS, protocol.MAX_ABS),
        "pushed": {id: {n: each.get(n, 0) for n in PUSHED} for id, each in pushed.items()},
        "left": [pair for pair in pairs if all(map(is_text, pair))],
        "reasons": {
            w: t for w, t in check("reasons", dict, {}).items() if is_text(w) and is_text(t)
        },
        "totals": {n: t for n, t in numbers_of(line.get("totals")).items() if t >= 0},
    }


def norms_of(value, count):
    """By slice, the norms of the last rounds as a checkpoint has them; none where it has none."""
    kept = [[] for _ in range(count)]
    for norms, pairs in zip(kept, value if type(value) is list else (), strict=False):
        for pair in pairs if type(pairs) is list else ():
            match pair:
                case [float(each), float(whole)] if 0 < each < math.inf and 0 < whole < math.inf:
                    norms.append((each, whole))
        del norms[:-NORMS]
    return kept


def missed_of(value, heads):
    """By slice, the outer steps that were left out as a checkpoint has them; 0 where it has none."""
    check = protocol.Message("checkpoint", dict(enumerate(value or [])), []).field
    return [check(k, float, 0.0, high=max(0, v.number)) for k, (v, _) in enumerate(heads)]


def state_of(fields):
    """The state of a run, checked, from the header of a checkpoint. Raises ProtocolError."""
    check = protocol.Message("checkpoint", fields, []).field
    state = {"heads": heads_of(fields), **names_of(fields)}
    state["run"], state["life"] = check("run", str), check("life", str)
    state["step"], state["shares"] = check("step", int), check("shares", int, low=1)
    state["settings"] = settings = check("settings", dict)
    check = protocol.Message("checkpoint's settings", settings, []).field
    for name in settings:
        if name not in DEFAULTS:
            raise ProtocolError(f"there is no setting {protocol.quoted(name)}")
        check(name, type(DEFAULTS[name]), None, high=1 if name == "outer_momentum" else 1e6)
    state["frozen"] = frozen = fields.get("frozen", {})
    if not all([type(text) for text in entry] == [str] * 3 for entry in frozen.values()):
        raise ProtocolError("a frozen tensor is not [dtype, fingerprint, whose]")
    for life in (state["run"], state["life"]):
        protocol.version_of([life, 2])
    if max(version for version, _ in state["heads"]).life > state["life"]:
        raise ProtocolError("it has a version of a life that had not begun")
    return state


def load_checkpoint(path, up, down, error_feedback):
    """(state, GlobalModel) of a checkpoint folder, also of one by protocol version 2: that has no
    slice of buffers, and buffers of any dtype. All is checked before the first of it is used.
    Raises ProtocolError, whatever is wrong with it."""
    try:
        protocol.check_folder(path)
        return read_checkpoint(path, up, down, error_feedback)
    except MemoryError:  # no fault of the checkpoint
        raise
    except Exception as error:
        raise ProtocolError(protocol.reason_of(error)) from error


def read_checkpoint(path, up, down, error_feedback):
    """As load_checkpoint, but raises anything."""
    _, tensors = protocol.load_file(os.path.join(path, "model.safetensors"))
    fields, outer = protocol.load_file(os.path.join(path, "outer.safetensors"))
    state = state_of(fields) | {"files": protocol.read_descriptive_files(path), "path": path}
    kept = os.path.join(path, KEPT)
    state["kept"] = protocol.load_file(kept)[1] if os.path.exists(kept) else {}
    heads, dtypes = state["heads"], fields["dtypes"]
    if dtypes.keys() != tensors.keys():
        raise ProtocolError("the two files are of different models")
    specs = [
        protocol.TensorSpec(n, protocol.DTYPES[dtypes[n]], tuple(t.shape))
        for n, t in tensors.items()
    ]
    count = len(specs) - fields.get("buffers", 0)  # the buffers come last
    buffers = [spec for spec in specs[count:] if spec.dtype.is_floating_point]
    num_fragments = fields.get("num_fragments", len(heads))
    if len(heads) < num_fragments + bool(buffers):
        heads.append((heads[-1][0], {}))
    state["norms"] = norms_of(fields.get("norms"), len(heads))
    state["missed"] = missed_of(fields.get("missed"), heads)
    if not 0 < count <= len(specs) or not 1 <= num_fragments <= 1000:
        raise ProtocolError(f"{count} parameters in {num_fragments} slices")
    dtypes = {tensors[spec.name].dtype for spec in specs[:count]}
    if dtypes != {torch.float32} or len(heads) != num_fragments + bool(buffers):
        raise ProtocolError(f"{dtypes} parameters, and {len(heads)} versions of slices")
    model = GlobalModel(specs[:count], buffers, num_fragments, up, down, error_feedback)
    model.put(tensors)
    if "gathered" in outer:
        model.outer["gathered"] = torch.zeros_like(model.params)
    for name, vector in model.outer.items():
        if name == "momentum" or name in outer:
            if outer[name].dtype != torch.float32 or outer[name].shape != (model.total,):
                raise ProtocolError(f"the {name} is not of the size of the parameters")
            for flat, start, part in overlaps(outer[name], 0, model.parts(vector), model.stripe):
                flat.read(start, part)
            if not all(protocol.within(part) for part in vector.split(protocol.CHUNK)):
                raise ProtocolError("its numbers are not all finite")
    return state, model


def write_vectors(folder, state, model, snapshots):
    """Write both safetensors files of a checkpoint: parameters and buffers in one, momentum,
    residual and state in the other, all of them side by side. Raises FloatingPointError."""
    vectors = list(model.outer)[: len(snapshots[0].vectors) - 1]  # of when they were taken
    specs = [protocol.TensorSpec(name, torch.float32, (model.total,)) for name in vectors]
    with (
        open(os.path.join(folder, "model.safetensors"), "wb") as params,
        open(os.path.join(folder, "outer.safetensors"), "wb") as outer,
    ):
        program = {"program": "diloco"}
        flat = [s._replace(dtype=torch.float32) for s in model.manifest + model.buffers]
        params.write(protocol.encode_header(program, flat, format="pt"))
        outer.write(protocol.encode_header(state | program, specs, format="pt"))
        begin, done = outer.tell(), 0
        for run, *others in interleaved(snapshots[: model.num_fragments], model.stripe):
            if not all(protocol.within(part) for part in (run, *others)):
                raise FloatingPointError("the model's numbers are not all finite")
            params.write(protocol.memory(run))
            for place, other in enumerate(others):
                outer.seek(begin + 4 * (place * model.total + done))
                outer.write(protocol.memory(other))
            done += run.numel()
        for snapshot in snapshots[model.num_fragments :]:
            for piece in snapshot.pieces():
                params.write(protocol.memory(piece))


ADAPTER_FILES = "adapter_config.json", "adapter_names.json"  # descriptive files of peft's adapters
PARTIAL = b"""The model.safetensors beside this file has only a part of the model: what is frozen is not
in it. Build the model, with its frozen part, then diloco_callback.load_weights(model, folder). The
model's own config.json is in config.json.incomplete.
"""


def write_adapter(folder, names):
    """Write the tensors of a folder's model.safetensors into adapter_model.safetensors, under the
    names that peft reads; `names`: {tensor: name there} as a worker has sent it, in JSON. Tensors
    without a proper name are left out."""
    try:
        names = protocol.parse_json(names, "adapter_names.json")
    except ProtocolError as error:
        return log(f"WARNING: no adapter_model.safetensors: {error}")
    _, tensors = protocol.load_file(os.path.join(folder, "model.safetensors"))
    told = {name: names.get(name) for name in tensors if type(names) is dict}
    proper = {n for n in told.values() if type(n) is str and n.isprintable() and n[:1] not in "_"}
    named = {told[name]: tensor for name, tensor in tensors.items() if told.get(name) in proper}
    path = os.path.join(folder, "adapter_model.safetensors")
    protocol.save_file(path, named, {"program": "diloco"})


def lacked(weights, frozen, whose):
    """{name: [dtype, fingerprint, whose]} of a worker's frozen tensors that some weights lack."""
    found = protocol.matched(weights, frozen)
    left = {name: known for name, known in frozen.items() if name not in found}
    return {n: [protocol.DTYPE_NAMES[spec.dtype], mark, whose] for n, (spec, mark) in left.items()}


class Journal:
    """A run's rounds.jsonl, with a line for each closed round. Where it is over `most` bytes, it becomes
    rounds-old.jsonl, in the place of the one before."""

    def __init__(self, folder, most=ROTATE_BYTES):
        self.folder, self.most = folder, most
        self.old, self.path = (os.path.join(folder, name) for name in ROUNDS)
        self.unwritten = []  # lines that the disk has not taken yet
        self.is_torn = False  # whether the last line in the file has no end

    def append(self, lines):
        """Append lines, dicts: all of them or, with an OSError, none."""
        self.unwritten = [*self.unwritten, *lines][-MAX_UNWRITTEN:]
        raw = "".join(json.dumps(line) + "\n" for line in self.unwritten).encode()
        os.makedirs(self.folder, exist_ok=True)
        if os.path.exists(self.path) and os.path.getsize(self.path) > self.most:
            os.replace(self.path, self.old)
            self.is_torn = False
        protocol.append_whole(self.path, b"\n" * self.is_torn + raw)
        self.unwritten, self.is_torn = [], False

    def rows(self):
        """Yields the rows of all rounds, oldest first, one at a time. Lines that cannot be read are
        passed over."""
        for path in (self.old, self.path):
            fault, damaged = None, 0
            try:
                with open(path, "rb") as file:
                    while raw := file.readline(protocol.MAX_HEADER_BYTES):
                        self.is_torn = not raw.endswith(b"\n")
                        try:
                            yield row_of(json.loads(raw))
                        except (ValueError, RecursionError, AttributeError, ProtocolError):
                            damaged += 1
            except FileNotFoundError:
                continue
            except OSError as error:
                fault = str(error)
            if fault or damaged:
                log(
                    f"WARNING: the history lacks {fault or f'{damaged} lines of {path}'}, not readable"
                )


class Store:
    """The disk of a run: the folder that it writes to, and the weights of -m.

    output: folder of checkpoints and the final model; weights: {name: tensor} of -m, mapped; files:
    {name: bytes} of the descriptive files; frozen: {name: [dtype, fingerprint, whose]} of the
    frozen tensors that -m lacks; kept: {name: tensor} of those that the run has trained before;
    names: as `Run.names`, from before a crash, or None; is_partial:
    whether a checkpoint has only a part of what config.json describes, and whether the final model
    has.
    """

    def __init__(self, model, output_dir=None, save_total_limit=3):
        self.model, self.limit = model, save_total_limit
        self.output, self.source = choose_output(model, output_dir)
        self.weights, self.files, self.frozen, self.kept = {}, {}, {}, {}
        self.passing = set()  # names of `weights` that are there for as long as they are kept
        self.untrained = []  # names of frozen tensors of -m that the final model has too
        self.is_partial = False, False
        self.is_unwrapped = False  # whether the names in `weights` are known to be a worker's
        self.names = None
        self.saved = self.final = None  # state of the run in the newest checkpoint and final model
        self.journal = Journal(self.output)
        self.faults = {}  # what could not be saved -> why
        self.latest_life = ""  # latest life of a checkpoint in the folder, also of a damaged one
        self.guard = None  # open file that keeps a second server off the folder
        self.marks = {}  # (id of a tensor of -m, dtype) -> future of its fingerprint
        self.lock = threading.Lock()  # guards `marks`
        # Hashing has threads of its own: a fold must not wait for gigabytes of frozen weights.
        self.hashers = concurrent.futures.ThreadPoolExecutor(FOLDING_THREADS)

    @property
    def save_error(self):
        """A text that says what could not be saved and why, or ""."""
        return next(iter(self.faults.values()), "")

    # --- Opening ---

    def hold(self):
        """Keep other servers off the output folder. Raises SystemExit where one is there; where the
        folder cannot be locked, as on some network disks, that is logged only."""
        try:
            self.guard = protocol.lock_folder(self.output, "a server")
        except BlockingIOError as error:
            raise SystemExit(f"{error}; end that one first, or name another --output-dir") from None
        except OSError as error:
            log(f"WARNING: {self.output} cannot be locked against a second server: {error}")

    def open(self, up, down, error_feedback):
        """(state, GlobalModel) of the newest checkpoint that is sound, or (None, None). The state is
        what `save` was given, with the `path`. Reads weights, files and names too. Raises SystemExit
        where none of the checkpoints that are there can be used."""
        found = protocol.checkpoints(self.output) or protocol.checkpoints(self.model)
        if self.source:
            self._read_source(bool(found))
        self.names = self._read_names(self.output)
        broken = []
        self.latest_life = found[0][0][0] if found else ""
        # Those whose header cannot be read come first, so that the log names them all.
        for _, path in sorted(found, key=lambda each: each[0] > ("", -1)):
            try:
                state, model = load_checkpoint(path, up, down, error_feedback)
            except ProtocolError as error:
                log(f"WARNING: {path} is not usable, trying the one before: {error}")
                broken.append(f"{path}: {error}")
                continue
            self._go_on_from(state)
            return state, model
        if broken:
            raise SystemExit(
                f"no checkpoint in {os.path.dirname(found[0][1])} can be used: {'; '.join(broken)}. "
                "Bring them back from a copy, or move them away: the run then goes on with what "
                "its workers hold, or starts anew"
            )
        where = os.path.abspath(self.output)
        if self.source:
            log(f"starting from the weights in {self.source}; output goes to {where}")
        else:
            log(f"*** NO WEIGHTS in {where}: the first worker will upload a new model. ***")
            log("*** If you meant to continue or to fine-tune one, check the path of -m. ***")
        return None, None

    def _read_source(self, has_checkpoints):
        """Read the weights and files of -m. Where they are this program's own, a damaged file costs
        nothing as long as there are checkpoints."""
        is_folder = os.path.isdir(self.source)
        folder = self.source if is_folder else os.path.dirname(self.source)
        try:
            self.weights = protocol.load_folder(self.source)
            self.files = protocol.read_descriptive_files(folder)
        except (OSError, ProtocolError) as error:
            if not (has_checkpoints and self.source == self.output):
                raise SystemExit(str(error)) from None
            log(f"WARNING: {error}; going on with the checkpoints")

    def _go_on_from(self, state):
        """Take over the state of a checkpoint."""
        path, versions = state["path"], [version for version, _ in state["heads"]]
        self.names = self.names or self._read_names(os.path.dirname(path)) or names_of(state)
        self.files, self.frozen = state.pop("files"), state["frozen"]
        self.kept = state.pop("kept")
        self.weights = {**self.weights, **self.kept}
        hidden = os.path.exists(os.path.join(path, "config.json" + protocol.INCOMPLETE))
        self.is_partial = hidden, hidden  # until a worker says what is frozen
        self.saved = versions, bool(state["members"])
        text = f"round {min(v.number for v in versions)}, step {state['step']}"
        log(f"continuing from {os.path.abspath(path)} ({text})")

    def _read_names(self, folder):
        path = os.path.join(folder, NAMES)
        try:
            with open(path, "rb") as file:
                return names_of(protocol.parse_json(file.read(), path))
        except FileNotFoundError:
            return None
        except (OSError, ProtocolError) as error:
            log(f"WARNING: {path} is not usable: {error}")
            return None

    # --- Saving ---

    @contextlib.contextmanager
    def _surviving(self, what, snapshots=()):
        """Log an error within and survive it, as training goes on; the snapshots are closed."""
        try:
            yield
            self.faults.pop(what, None)
        except Exception as error:
            self.faults[what] = f"saving to {os.path.abspath(self.output)} failed: {error!r}"
            log(f"WARNING: {self.faults[what]}; the last good checkpoint is kept")
        finally:
            for snapshot in snapshots:
                snapshot.close()

    def save_names(self, names):
        """Write the names of who takes part (Run.names), or remove the file where `names` is None.
        Calls come one at a time."""
        path = os.path.join(self.output, NAMES)
        with self._surviving("names"):
            if names is not None:
                os.makedirs(self.output, exist_ok=True)
                raw = json.dumps(names).encode()
                protocol.write_beside(path, lambda file: file.write(raw))
            elif os.path.exists(path):
                os.unlink(path)
                protocol.sync_folder(self.output)

    def append_rounds(self, lines):
        """Append lines about rounds, dicts, to rounds.jsonl. What the disk does not take is written with
        the next ones. Calls come one at a time."""
        with self._surviving("rounds.jsonl"):
            self.journal.append(lines)

    def save(self, state, model, snapshots):
        """Write a checkpoint, unless the newest one has the same versions. `state`: `heads`, which
        is [(Version, {worker: Fate})] by slice, `members`, `indices`, `step`, and whatever else
        JSON can have; `snapshots`: model.freeze(), of the same moment, closed here."""
        state = {**state}
        heads = state.pop("heads")
        versions = [version for version, _ in heads]
        specs = model.manifest + model.buffers
        state["dtypes"] = {spec.name: protocol.DTYPE_NAMES[spec.dtype] for spec in specs}
        state["buffers"], state["num_fragments"] = len(model.buffers), model.num_fragments
        state["fragments"] = [{"label": version, "folded": fates} for version, fates in heads]
        state["frozen"] = self.frozen
        what = versions, bool(state["members"])
        with self._surviving("checkpoint", snapshots):
            if self.saved != what:
                os.makedirs(self.output, exist_ok=True)
                number = min(version.number for version in versions)
                self._write_checkpoint(f"checkpoint-{number}", state, model, snapshots)
                self.saved = what

    def _write_checkpoint(self, name, state, model, snapshots):
        path, kept = os.path.join(self.output, name), self.kept

        def fill(folder):
            write_vectors(folder, state, model, snapshots)
            if kept:
                protocol.save_file(os.path.join(folder, KEPT), kept, {"program": "diloco"})
            self._write_files(folder, self.is_partial[0])

        own = [other for _, other in protocol.checkpoints(self.output)]
        if os.path.lexists(path) and path not in own:
            raise FileExistsError(f"{path} is not this program's")
        protocol.save_folder(path, fill, log)
        log(f"saved {os.path.abspath(path)}")
        with self._surviving("removing old checkpoints"):
            for _, old in protocol.checkpoints(self.output)[self.limit :]:
                if old != path:
                    protocol.discard(old)

    def _write_files(self, folder, is_partial):
        """Write the descriptive files beside the weights in a folder. A config.json that describes
        more than these weights gets another name, and a text in its place which says so: whoever
        opens the folder would get random tensors, without one even those of a default size."""
        files, hidden = {**self.files}, "config.json" + protocol.INCOMPLETE
        if is_partial and "config.json" in files:
            files[hidden] = files.pop("config.json")
            if "adapter_config.json" not in files:  # it leads to the base model
                files["config.json"] = PARTIAL
        for name in {"config.json", hidden, *ADAPTER_FILES} - files.keys():
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))
        for name, text in files.items():
            protocol.write_beside(os.path.join(folder, name), lambda file, t=text: file.write(t))
        if "adapter_names.json" in files:
            write_adapter(folder, files["adapter_names.json"])

    def save_final(self, versions, model, snapshots):
        """Write the model of some versions in its first worker's dtypes, with the frozen tensors of
        -m and the descriptive files. `snapshots`: one of every slice, closed here."""
        frozen = {name: self.weights[name] for name in self.untrained}
        specs = model.manifest + model.buffers + protocol.specs_of(frozen.items())
        parts = itertools.chain(
            (tensor for _, tensor in model.tensors(snapshots)),
            (tensor.contiguous() for tensor in frozen.values()),
        )

        def write(file):
            protocol.write_frame(file, {"program": "diloco"}, specs, parts, format="pt")

        with self._surviving("final", snapshots):
            if self.final != versions:
                os.makedirs(self.output, exist_ok=True)
                protocol.write_beside(os.path.join(self.output, "model.safetensors"), write)
                self._write_files(self.output, self.is_partial[1])
                self.final = versions
                number = min(version.number for version in versions)
                log(f"the model of round {number} is in {os.path.abspath(self.output)}")

    def needs_files(self, facts):
        """Whether the files of a worker, known by its Facts, would say more of the model."""
        return not self.files or (facts.adapter and "adapter_config.json" not in self.files)

    def take_files(self, texts):
        """Keep the files that a worker has brought, {name: bytes}: all, or if there are some
        already, those of its adapter."""
        has_some = bool(self.files)
        texts = {n: text for n, text in texts.items() if not has_some or n in ADAPTER_FILES}
        self.files = {**texts, **self.files}

    # --- Weights of -m, and frozen tensors ---
    #
    # A worker's frozen tensors come as `frozen`: {name: (spec, fingerprint)}.

    def fit(self, manifest, buffers, frozen):
        """{name: tensor} of a worker's trained tensors and buffers that -m holds. Raises Refused
        where a shape differs, and where -m lacks a trained tensor, unless that is an adapter's, so
        that all that is frozen is there."""
        if not self.weights:
            return {}
        every = [*manifest, *buffers]
        found = protocol.matched(self.weights, [*(spec.name for spec in every), *frozen])
        alien = [name for name in frozen if name not in found]
        is_base = bool(frozen) and not alien
        have = [s._replace(shape=tuple(found[s.name].shape)) for s in every if s.name in found]
        needed = [s for s in every if s.name in found or (s in manifest and not is_base)]
        if fault := protocol.explain_mismatch(have, needed):
            prefix = protocol.prefix_of(self.weights)
            raise Refused(
                "model",
                f"the weights in -m do not fit this worker's model: {fault}"
                + (f" (nor is what is frozen, as {alien[0]!r})" if alien else "")
                + (f"; all names in -m begin with {prefix!r}" if prefix else "")
                + "; name a model that does, or with -m a new folder, into which the first worker "
                "uploads its own",
            )
        return {spec.name: found[spec.name] for spec in have}

    def compare(self, frozen):
        """{name: future of the fingerprint in -m, in the worker's dtypes} of the frozen tensors that
        -m has. Hashing takes a second a gigabyte. Raises Refused where a shape differs."""
        jobs = {}
        for name, tensor in protocol.matched(self.weights, frozen).items():
            spec = frozen[name][0]
            if tuple(tensor.shape) != spec.shape:
                sizes = f"{list(tensor.shape)} in -m and {list(spec.shape)} here"
                raise Refused("model", f"frozen tensor {name!r} is {sizes}")
            key = id(tensor), spec.dtype
            with self.lock:
                if key not in self.marks:
                    work = (lambda t, d: protocol.fingerprint(t.to(d)), tensor, spec.dtype)
                    self.marks[key] = self.hashers.submit(*work)
                jobs[name] = self.marks[key]
        return jobs

    def check_frozen(self, frozen, others):
        """Raise Refused where a frozen tensor that -m lacks differs from that of the first worker, or of
        one that waits to enter. others: {whose: frozen tensors}."""
        noted = self.frozen
        for whose, theirs in others.items():
            noted = lacked(self.weights, theirs, whose) | noted
        for name, (spec, mark) in frozen.items():
            dtype, other, whose = noted.get(name, ("", "", ""))
            if dtype == protocol.DTYPE_NAMES[spec.dtype] and mark != other:
                raise Refused(
                    "model",
                    "this worker's model is not the one of the run: "
                    f"its frozen tensor {name!r} has other numbers than that of {whose}; load the "
                    "same weights on all workers, or start the server with a -m that holds them; where "
                    "it changes in training, as a teacher's does, name it in the worker's local=[...]",
                )

    def note_frozen(self, frozen, whose):
        """Note the frozen tensors of a member, which all others must have too. `whose`: the member
        in words. Called when the run opens."""
        gone = self.passing - self.kept.keys()
        self.passing = self.passing & self.kept.keys()
        if gone:
            self.weights = {name: t for name, t in self.weights.items() if name not in gone}
            with self.lock:
                self.marks = {}
        self.untrained = [name for name in frozen if name in self.weights]
        self.is_partial = bool(frozen), len(self.untrained) < len(frozen)
        self.frozen = lacked(self.weights, frozen, whose) | self.frozen

    def keep(self, model, frozen):
        """Keep the tensors of a model which are frozen from now on, as the workers have them. The files
        of an adapter are of the tensors that were trained before."""
        snapshots = [model.snapshot(k) for k in range(model.count)]
        now_frozen = {s.name: tensor for s, tensor in model.tensors(snapshots) if s.name in frozen}
        for snapshot in snapshots:
            snapshot.close()
        self.kept = {name: t for name, t in self.kept.items() if name in frozen} | now_frozen
        self.weights = {**self.weights, **now_frozen}
        self.files = {n: text for n, text in self.files.items() if n not in ADAPTER_FILES}
        self.passing = self.passing | now_frozen.keys()
        self.frozen = {name: noted for name, noted in self.frozen.items() if name in frozen}
        with self.lock:
            self.marks = {}

    def frozen_tensors(self, frozen, names):
        """(specs, generator of tensors) of frozen tensors of -m by name, in the order of the names
        and in the worker's dtypes."""
        found = protocol.matched(self.weights, frozen)
        specs = [frozen[name][0] for name in names if name in found]
        return specs, (found[spec.name].to(spec.dtype).contiguous() for spec in specs)


def unwrap(store, names):
    """Take a wrapper's prefix off the names in -m, of which all have it, where a worker's `names`
    fit better then. Once: what fits the first worker stays."""
    choices = [{n: t for n, t in store.weights.items() if n not in store.kept}]
    while prefix := protocol.prefix_of(choices[-1]):
        choices.append({n.removeprefix(prefix): t for n, t in choices[-1].items()})
    found = [len(protocol.matched(choice, names)) for choice in choices]
    if not store.is_unwrapped and (best := found.index(max(found))):
        log(f"took {protocol.prefix_of(choices[0])!r} off the names in -m, all of which have it")
        store.weights = {**choices[best], **store.kept}
    store.is_unwrapped |= max(found) > 0


# --- The server -------------------------------------------------------------------------------
#
# One thread serves a connection: its handler reads a request, asks `Run`, does what was decided, and
# answers. The one lock guards `Run`, the log's bookkeeping and the fields below; arithmetic, disk and
# network stay outside of it. `turn` closes the rounds that are over, after each event and several
# times a second; a thread of its own folds each. Whoever waits is told every few seconds for whom.


@dataclass(eq=False, kw_only=True)
class Facts:
    """The facts that a worker has told of itself, beside those that the rules need."""

    host: str
    conn: protocol.Connection  # connection of its join, then of its heartbeats
    manifest: list  # specs of the trained tensors, in the worker's order
    buffers: list  # specs of the floating-point buffers
    frozen: dict  # name -> (spec, fingerprint) of the tensors that are not trained
    source: str  # name of its training data
    ranks: int  # processes of the worker
    run: str  # id of the run that the worker was in before, or ""
    process: list  # [machine, process id, when the process started]; ["", 0, 0] if unknown
    adapter: bool = False  # whether it can bring the files that describe an adapter
    again: bool = False  # whether its process was in the run with other tensors
    compared: object = None  # weights that `differs` was found with
    differs: list = field(default_factory=list)  # frozen tensors that are not those of -m
    was_asked: bool = False  # whether the worker was asked to bring slices or files
    is_told: bool = False  # whether the worker has heard that the server ends


def facts_of(conn, message):
    """The Facts that a join tells. Raises ProtocolError where they are malformed."""
    if not conn.worker[0]:
        raise ProtocolError("join: hello named no worker")
    facts = Facts(
        host=message.field("host", str),
        conn=conn,
        manifest=protocol.manifest_from_json(message.field("manifest", list)),
        buffers=protocol.manifest_from_json(message.field("buffers", list, []), trained=False),
        frozen=protocol.frozen_of(message.field("frozen", list, [])),
        source=message.field("source", str, ""),
        ranks=message.field("ranks", int, 1, low=1, high=1 << 20),
        run=message.field("run", str, ""),
        process=message.field("process", list, ["", 0, 0]),
        adapter=message.field("adapter", bool, False),
        again=message.field("again", bool, False),
    )
    if [type(part) for part in facts.process] != [str, int, int] or len(facts.process[0]) > 256:
        raise ProtocolError("join: process is not [machine, process id, when it started]")
    named = [spec.name for spec in facts.manifest + facts.buffers] + [*facts.frozen]
    if len(set(named)) != len(named):  # tensors of one name would share a place in a file
        raise ProtocolError("join: a name stands for two tensors of the model")
    return facts


def layout_of(*kinds):
    """What tells the tensors of a model, its parameters and buffers, from others: names and shapes."""
    return hash(tuple(frozenset((spec.name, spec.shape) for spec in specs) for specs in kinds))


def blocked_of(message, count):
    """(slice, sequence number) of the push that a worker's training waits for, or (), of a run with
    `count` slices. Raises ProtocolError."""
    blocked = message.numbers("blocked", None)
    if len(blocked) not in (0, 2) or (blocked and blocked[0] >= count):
        raise ProtocolError("heartbeat: blocked is not [slice, sequence number]")
    return tuple(blocked)


def held_of(message, count):
    """(versions, resumes, folded) of a join, by slice. Raises ProtocolError where these are not one
    a slice, or name pushes that cannot be in the versions held."""
    held = [protocol.version_of(version) for version in message.field("versions", list)]
    resumes = [protocol.version_of(version) for version in message.field("resumes", list, [])]
    listed = message.field("folded", list, [])
    if len(held) != count or any(len(each) not in (0, count) for each in (resumes, listed)):
        raise ProtocolError("join: the lists of versions and pushes are not one a slice")
    folded = [protocol.fates_of(fates) for fates in listed]
    if not folded and max(held) > WEIGHTS:
        raise ProtocolError("join: a version of a run without the pushes folded in it")
    for version, fates in zip(held, folded, strict=bool(folded)):
        most = max(0, version.number)
        if any(fate.round > most or fate.seq > most + SEQ_AHEAD for fate in fates.values()):
            raise ProtocolError(f"join: a push that cannot be in version {version.number}")
    return held, resumes, folded


def rank_of(member, members):
    """The place of a member among the live ones, and their number."""
    live = sorted(other.index for other in members.values())
    return {"rank": live.index(member.index), "world": len(live)}


def settings_of(member):
    """{name: value} of the settings of a worker that others may need alike."""
    return {
        "num_fragments": member.fragments,
        "source": member.facts.source,
        "sync_every": member.sync_every,
    }


def outer_settings(args, saved):
    """{name: value} of the settings of the outer optimizer: those of the command line, else those
    that the run had (`saved`), else the defaults."""
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    for name, value in given.items():
        if value != saved.get(name, value):
            log(f"{name} {value} from the command line replaces {saved[name]} of the run")
    return {**DEFAULTS, **saved, **given}


def evaluation_of(message):
    """(step, loss, whether it is of the global model) of the evaluation that a worker reports, or None."""
    if (found := message.field("evaluation", dict, None)) is None:
        return None
    check, limit = protocol.Message(message.type, found, []).field, protocol.MAX_ABS
    loss = check("loss", float, low=-limit, high=limit)
    return check("step", int), loss, check("is_global", bool)


def note_evaluation(server, member, message):
    """Note what a message says of a member's newest evaluation, if anything. Needs the lock."""
    if found := evaluation_of(message):
        step, loss, is_global = found
        member.evaluation = min(step, member.step), loss, is_global
        server.history.evaluate(member.id, *member.evaluation)


def doing(member, run, moving):
    """(what a member does, the ids that it waits for). moving: as Transfers.moving."""
    moves = {(kind, k) for id, kind, k in moving if id == member.id}
    pushes = {
        (k, p) for k, s in enumerate(run.slices) for p in s.pushes.values() if p.worker == member.id
    }
    mine = {k for k, _ in pushes}
    waits = {k for k, push in pushes if push.adopts <= now()} or mine.intersection(
        member.blocked[:1]
    )
    if now() - member.heard > 3 * run.rules.heartbeat_seconds:
        return "away", []
    if any(kind == "push" for kind, _ in moves):
        return "pushing", []
    if waits:
        return "waiting", sorted({id for k in waits for id in run.missing(k)})
    is_pulling = any(kind == "pull" and k not in mine for kind, k in moves)
    return "pulling" if is_pulling else "training", []


def status_of(member, run, moving):
    """The fields about one member that status.py shows."""
    own = ("id", "index", "step", "position", "sync_every", "loss", "lag", "max_steps")
    waiting, found = run.paces.waiting(member), member.evaluation
    state, waits_for = doing(member, run, moving)
    return {name: getattr(member, name) for name in own} | {
        "host": member.facts.host,
        "ranks": member.facts.ranks,
        "state": state,
        "waits_for": waits_for,
        "weight": member.last.weight if member.last else 0.0,
        "pace": member.cycle,
        "waiting": round(waiting or 0.0, 4),
        "training": None if waiting is None else round(1 - waiting, 4),
        "evaluation": {"step": found[0], "loss": found[1]} if found else None,
        "address": member.facts.conn.peer,
        "steps_per_second": round(member.speed, 3),
        "heard_seconds_ago": round(now() - member.heard, 1),
        "joined_seconds_ago": round(now() - member.joined, 1),
    }


def die(why):
    """End the process at once, with the traceback of the exception that is being handled: what cannot
    go on must not look as if it did."""
    try:
        log.trace(f"FATAL: {why}; the same command goes on from the newest checkpoint")
    finally:
        os._exit(1)


class Errand:
    """Something that a thread of its own does, once for all who ask for the same before it begins: each
    gets what was done after all of them have asked. seconds: time between two beginnings; then:
    function that is called, with the Future, when it is done."""

    def __init__(self, do, seconds=0.0, then=lambda job: None):
        self.do, self.seconds, self.then = do, seconds, then
        self.begun, self.coming = -math.inf, {}  # seconds; {what: Future that has not begun}
        self.lock = threading.Lock()  # guards `coming`
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.thread.submit(int)  # starts the thread: later the system may have none left

    def __call__(self, *what):
        """Ask for it; returns its Future."""
        with self.lock:
            if not (job := self.coming.get(what)):
                job = self.coming[what] = self.thread.submit(self.work, what)
                job.add_done_callback(self.then)
            return job

    def work(self, what):
        """Do it; who asks from now on gets the next one."""
        time.sleep(max(0.0, self.begun + self.seconds - now()))
        self.begun = now()
        with self.lock:
            del self.coming[what]
        return self.do(*what)


class Clerk:
    """The small files of a run, the members' names and rounds.jsonl, which a thread of its own writes:
    a disk that hangs stops no round."""

    def __init__(self, server):
        self.server, self.store, self.lock = server, server.store, server.lock
        self.named = None  # names of the members as they are on disk
        self.lines = deque(maxlen=MAX_UNWRITTEN)  # of rounds.jsonl, to be written
        self.write = Errand(self.work, then=server.wake)

    def settle(self, seconds):
        """Have all written, and wait for that for at most so many seconds."""
        concurrent.futures.wait([self.write()], seconds)

    def append(self, line):
        """Have a line about a round, a dict, written. Needs the lock."""
        self.lines.append(line)
        self.write()

    def work(self):
        """Write what is there to be written."""
        with self.lock:
            names, lines = self.server.run.names(), [*self.lines]
            self.lines.clear()
        with self.server.faults.survive(log, "writing the members' names and rounds"):
            if lines:
                self.store.append_rounds(lines)
            if names != self.named:
                left = names["members"] or names["stopping"]
                self.store.save_names(names if left else None)
                self.named = names


class Ids:
    """Who holds a worker id: the process that joined with it, whatever becomes of its connection,
    until the worker timeout has passed without a word from it, or until it is known to have ended.
    --spawn knows that of its workers. A joining process that says so is believed where it comes from
    the holder's machine and address, and the holder's connection has ended as well: a stranger there
    gains nothing by it."""

    def __init__(self, server):
        self.server, self.run = server, server.run

    def wait(self, conn, member, ended):
        """Wait until a joining worker can have its id, or its holder has shown life since. ended:
        [process id, start] of the holder, where the worker has seen that it is gone."""
        began, limit = now(), self.run.rules.worker_timeout

        def is_decided():
            other = self.run.holder(member.id, member.session, now())
            is_named = other and self.are_near(member, other) and ended == other.facts.process[1:]
            if is_named and other.facts.conn.closed_by_peer():
                log(f"the old process of {shown(member.id)} has ended, as the new one says")
                self.run.free(other.id, other.session)
                return True
            return other is None or now() - began > limit

        self.server.wait(conn, is_decided, lambda: self.explain(member))
        if conn.closed_by_peer():  # the worker has asked again, over another connection
            raise ConnectionError(f"{conn.peer} closed the connection")

    def are_near(self, member, other):
        """Whether two processes say that they run on one machine, and come from one address."""
        mine, its = member.facts, other.facts
        is_one_machine = mine.process[0] == its.process[0] != ""
        return is_one_machine and mine.conn.peer == its.conn.peer

    def explain(self, member):
        """The fields of a `wait` message to a worker whose id is held. A worker on the holder's own
        machine is told the holder's process, to look for it. Needs the lock."""
        other = self.run.holder(member.id, member.session, now())
        if other is None:
            return {"awaited": "its turn"}
        silent, limit = now() - other.heard, self.run.rules.worker_timeout
        text = f"its id: another process on {shown(other.facts.host)}, silent for {silent:.0f} s, "
        text += f"holds it until {limit:g} s have passed without a word from it"
        fields = {"awaited": text}
        if self.are_near(member, other):
            fields["holder"] = other.facts.process[1:]
        return fields


def received(conn, spec):
    """The next tensor of an upload."""
    values = torch.empty(spec.shape, dtype=spec.dtype)
    conn.read(values)
    return values


def share(facts, server):
    """Let the Facts of a worker that waits or takes part have the objects of the model, and of the
    Facts of others, where they are equal: a large manifest is there once. Needs the lock."""
    for name in ("manifest", "buffers"):
        value = getattr(server.model, name)
        if getattr(facts, name) == value:
            setattr(facts, name, value)
    for other in (*server.run.members.values(), *server.run.waiting.values()):
        if other.facts.frozen == facts.frozen:
            facts.frozen = other.facts.frozen


def read_join(server, conn, message):
    """The Member that a join describes. A large description goes no further than this where the model
    is not that of the run, and nothing is kept twice while the worker waits."""
    try:
        member = server.gate.introduced(conn, message)
        message.fields.clear()
        with server.lock:
            if server.run.life and server.model and conn.large and not member.facts.again:
                server.model.check(member.facts.manifest, member.facts.buffers)
                share(member.facts, server)
    finally:
        conn.taken_in()
    return member


def say_brought(server, member, k):
    """Log that a worker has brought its version of a slice."""
    run, version = server.run, server.run.slices[k].version
    protocol.audit("take", life=run.life, fragment=k, label=version, worker=member.id)
    if version > WEIGHTS:
        log(f"slice {k}: version {version.number} comes from {shown(member.id)}")
    elif k == 0:
        counts = [spec.numel for spec in server.model.manifest]
        log(f"{sum(counts):,} parameters in {len(counts)} tensors come from {shown(member.id)}")


class Transfers:
    """The transfers of workers: of each kind (of a slice) a worker has one under way, of which the
    newest is the one that counts. A worker whose transfer stops, or moves at less than --min-rate,
    is given up like a silent one, whatever its heartbeats say."""

    def __init__(self, server):
        self.server, self.run, self.lock = server, server.run, server.lock
        self.newest = {}  # (worker id, kind, slice or None) -> Connection that has asked last
        self.moving = {}  # the same -> Connection that is served

    @contextlib.contextmanager
    def only(self, conn, kind, k=None):
        """A block that serves a connection, once the one that was served before for the same has
        been ended and has given its memory back. Raises ConnectionError where a newer one comes."""
        name, what = (conn.worker[0], kind, k), kind if k is None else f"{kind} of slice {k}"
        with self.lock:
            self.newest[name] = conn
            while name in self.moving and self.newest.get(name) is conn:
                self.moving[name].hang_up()
                self.lock.wait(0.5)
            if self.newest.get(name) is not conn:
                raise ConnectionError(f"a newer {what} of {conn.worker[0]} has taken its place")
            self.moving[name] = conn
        try:
            with self.patient(conn, what, lambda: self.newest.get(name) is conn):
                yield
        finally:
            self.release(conn, kind, k)

    def release(self, conn, kind, k):
        """A connection's transfer is over, or all but its last bytes: a newer one does not end it."""
        name = conn.worker[0], kind, k
        with self.lock:
            for found in (self.newest, self.moving):
                if found.get(name) is conn:
                    del found[name]
            if name in self.newest:  # a newer one waits; who waits for a round has nothing to see
                self.lock.notify_all()

    @contextlib.contextmanager
    def patient(self, conn, kind, counts=None):
        """A block that serves a connection. Where its transfer stops or is too slow, the worker is
        given up, unless another connection has taken over: `counts()` says whether this one is still
        the one that counts; without it, that is the one of the join, then of the heartbeats."""
        try:
            yield
        except protocol.TooSlow as error:
            self.give_up(conn, f"its {kind} stopped or was slower than --min-rate: {error}", counts)
            raise

    def give_up(self, conn, why, counts):
        id, session = conn.worker
        with self.lock:
            for found in (self.run.members, self.run.waiting):
                member = of_process(found, id, session)
                if member and (counts() if counts else member.facts.conn is conn):
                    self.server.gate.give_up(member, why)
        self.server.rounds.turn()


class Watch:
    """Says who keeps rounds open, every minute, and gives them up where --drop-stuck wants that;
    says once what waiting costs, and what a sync does."""

    def __init__(self, server):
        self.server, self.stalls = server, Stalls(server.run)
        self.found = []  # as Stalls.found, of a moment ago
        self.said = {}  # slice -> seconds when its wait was last said
        self.has_costs = False  # whether the log has said what waiting costs
        self.has_advice = not server.args.advises  # whether it has said which codecs suit the links

    def look(self):
        """Called several times a second. Needs the lock."""
        server, limit = self.server, self.server.args.drop_stuck
        if server.closed:
            return
        self.found = self.stalls.found(now())
        self.said = {s["slice"]: self.said.get(s["slice"], -math.inf) for s in self.found}
        for stall in self.found:
            k = stall["slice"]
            if now() - self.said[k] >= SAY_SECONDS:
                self.said[k] = now()
                whom = ", ".join(map(shown, stall["missing"][:20]))
                whom = whom or "more workers (--min-workers)"
                log(
                    f"WARNING: the round of slice {k} has waited {stall['seconds']:.0f} s for {whom}: "
                    "alive, but nothing has come; look there, or give such workers up with --drop-stuck"
                )
        for id, share, slowest in () if self.has_costs else self.server.run.paces.costs():
            self.has_costs = True  # said once, of one worker: the status has all
            log(
                f"{shown(id)} waits {100 * share:.0f}% of its time for {shown(slowest)}; --own-pace would "
                "end that"
            )
            break
        if not self.has_advice and server.round:
            self.advise(server.run.members.values())
        for id in self.stalls.stuck(now()):
            why = f"is given up: it is alive, but a round has waited {limit:g} s for it (--drop-stuck)"
            server.gate.remove(id, why, ends=False)

    def advise(self, members):
        """Say once, as soon as a sync of all members is over, which codecs would hide it."""
        if (sync := told_sync(self.server)) and all(member.sync for member in members):
            self.has_advice = True
            told = f"{sync['seconds']:.2f} s a round, {100 * sync['share']:.1f}%"
            told += f"; {sync['advice'] or 'these codecs hide it'}"
            log(f"a sync keeps training waiting for {told}")


def told_sync(server):
    """What a sync costs, and what would hide it, as a status has it; None where that is not known.
    Needs the lock."""
    model, present = server.model, (server.args.upload_codec, server.args.download_codec)
    sync = server.run.paces.sync(model.num_fragments) if model else None
    if sync is None:
        return None
    count, codecs = model.total, protocol.CODECS.items()
    sizes = {name: protocol.payload_bytes(codec.layout(count)) for name, codec in codecs}
    seconds = zip(present, (sync.up, sync.down), strict=True)
    rates = [sizes[codec] / max(took, 1e-6) for codec, took in seconds]
    others = sync.training, model.num_fragments, sync.delay
    rest = max(0.0, sync.seconds - priced(sync.up, sync.down, *others).seconds)
    advice = "no codec would hide it, but a larger sync_every would"
    if found := fitting(sizes, rates, *others, rest):
        advice = "--upload-codec {} --download-codec {} would hide it".format(*found)
    return {
        "seconds": round(sync.seconds, 3),
        "share": round(sync.share, 4),
        "mbit_up": round(rates[0] * 8e-6, 2),
        "mbit_down": round(rates[1] * 8e-6, 2),
        "advice": advice if sync.share > HIDDEN else "",
    }


def outlook(server):
    """Where the run is and when it ends, as far as that is known. Needs the lock."""
    members, history = server.run.members.values(), server.history
    losses = [member.loss for member in members if member.loss is not None]
    max_steps = max((member.max_steps for member in members), default=0)
    rate, found = history.rate(), history.evaluation
    left = max(0, max_steps - max([server.run.step, *(member.step for member in members)]))
    server.note_faults()
    return {
        "schema": 1,
        "time": round(time.time(), 3),
        "rate": round(rate, 4),
        "max_steps": max_steps,
        "ends_in_seconds": round(left / rate, 1) if rate and max_steps else None,
        "loss": statistics.fmean(losses) if losses else None,
        "evaluation": {"step": found[0], "loss": found[1]} if found else None,
        "totals": {name: round(total, 3) for name, total in history.totals.items()},
        "gone": [
            {"id": id, "seconds_ago": round(max(0.0, time.time() - since), 1), "why": why}
            for id, (since, why) in reversed(history.gone.items())
            if id not in server.run.members
        ],
    }


def without_names(point):
    """A point of a history as it is told, but without what it says by worker."""
    return {n: type(v)() if isinstance(v, dict | list) else v for n, v in point.items()}


class Handouts:
    """What anybody may ask for, made once for all who ask, however many read it or do not."""

    def __init__(self, server):
        self.server, self.lock = server, threading.Lock()
        self.status = Errand(self.make_status, STATUS_SECONDS)
        self.history = Errand(self.make_history, STATUS_SECONDS)
        self.source, self.packed = None, {}  # files as the store has them, and as tensors

    def make_status(self):
        """The bytes of a reply to a status request."""
        with self.server.lock:
            fields = self.server.status()
        return protocol.encode_header({"type": "status", **fields}, ())

    def make_history(self, after, span):
        """The bytes of a reply to a history request. Where names are so long that it would be too large,
        it comes without what is told by worker."""
        with self.server.lock:
            found = self.server.history.later(after, span)
        told = {
            "points": [point.told for point in found["points"]],
            "recent": [point.told | more for point, more in found["recent"]],
        }
        reply = {"type": "history", **found, "session": self.server.session}
        try:
            return protocol.encode_header(reply | told, ())
        except ProtocolError:
            bare = {name: [*map(without_names, each)] for name, each in told.items()}
            return protocol.encode_header(reply | bare, ())

    def files(self):
        """{name: uint8 tensor} of the model's descriptive files that are not empty."""
        with self.lock:
            if self.source is not self.server.store.files:
                self.source = self.server.store.files
                texts = {name: bytearray(text) for name, text in self.source.items() if text}
                pack = functools.partial(torch.frombuffer, dtype=torch.uint8)
                self.packed = {name: pack(text) for name, text in texts.items()}
            return self.packed

    def on_status(self, conn, message):
        """Answer with everything that status.py shows."""
        conn.send_raw(self.status().result())

    def on_history(self, conn, message):
        """Answer with what the run has been like: see History.later."""
        after, span = message.field("after", int, 0), message.field("span", int, 0)
        conn.send_raw(self.history(after, span).result())


class Layouts:
    """Which tensors the global model has: those of the first worker that joins, and where workers
    change what they train, those that they come back with. Its methods need the lock."""

    def __init__(self, server):
        self.server, self.run, self.store = server, server.run, server.store

    def check(self, member):
        """Raise Refused where a joining worker's tensors are not those of the run; the first worker's
        become those. A worker that comes back with others leaves the run until all do."""
        run, facts = self.run, member.facts
        others = [other for id, other in run.waiting.items() if id != member.id]
        unwrap(self.store, [*(s.name for s in facts.manifest + facts.buffers), *facts.frozen])
        is_new = not (is_begun(run.slices) or run.members or others or run.anew.before)
        if self.server.model is None or is_new:
            self.lay_out(member)
        is_known = member.id in run.members or member.id in run.expected
        if run.anew.is_stale(member):
            raise Refused("rejoin", "this worker has asked to join with other tensors since")
        is_change = facts.again and is_known and not run.anew.fits(member)
        if not is_change:
            self.server.model.check(facts.manifest, facts.buffers)
        trained = {spec.name for spec in self.server.model.manifest}  # which may differ until then
        own = {name: known for name, known in facts.frozen.items() if name not in trained}
        alike = [m for m in others if m.layout == member.layout and m.facts.frozen != facts.frozen]
        self.store.check_frozen(own, {shown(other.id): other.facts.frozen for other in alike})
        if is_change and member.id in run.members:
            run.anew.expect(member.id, now())
            why = self.difference(member)
            log(f"{shown(member.id)} trains other tensors from step {member.step} on: {why}")

    def difference(self, member):
        """How a worker's tensors differ from those of the run, in words."""
        model, facts = self.server.model, member.facts
        return protocol.explain_mismatch(
            model.manifest + model.buffers, facts.manifest + facts.buffers
        )

    def empty_model(self, member):
        """A new GlobalModel with the tensors of a worker."""
        facts, args = member.facts, self.server.args
        codecs = args.upload_codec, args.download_codec, args.error_feedback
        return GlobalModel(facts.manifest, facts.buffers, member.fragments, *codecs)

    def lay_out(self, member):
        """Set up the global model in the layout of the first worker that joins, with the weights of
        -m as far as it has them."""
        facts = member.facts
        found = self.store.fit(facts.manifest, facts.buffers, facts.frozen)
        self.server.model = model = self.empty_model(member)
        model.put(found)
        is_whole = found and len(found) == len(facts.manifest + facts.buffers)
        self.run.slices = [Slice(WEIGHTS if is_whole else NONE) for _ in range(model.count)]
        self.run.anew.layout = member.layout

    def lay_out_anew(self, member):
        """Give the global model the tensors of a worker that has come back with others. What it, or
        -m, has of them keeps its numbers, and the outer momentum of what was trained before; what is
        trained no more is kept as frozen. The workers bring the rest."""
        facts, old = member.facts, self.server.model
        old = old.past[0] if old.past else old  # as where who was to bring the rest has gone
        log(f"the run goes on with the tensors of {shown(member.id)}: {self.difference(member)}")
        self.store.keep(old, facts.frozen)
        specs = facts.manifest + facts.buffers
        names = [*(spec.name for spec in specs), *facts.frozen]
        shapes = {spec.name: spec.shape for spec in specs}
        found = protocol.matched(self.store.weights, names)
        found = {n: t for n, t in found.items() if shapes.get(n) == tuple(t.shape)}
        held = {s.name for s in old.manifest + old.buffers if shapes.get(s.name) == s.shape}
        model = self.empty_model(member)
        model.past = old, found
        model.inherit()
        self.server.model = model
        self.run.anew.lay_out(member.layout, model.count, shapes.keys() <= found.keys() | held)

    def left_behind(self, member):
        """The Refused of a worker that waits with tensors which the run will not get."""
        why, step = "this worker's model is not the one of the run", member.step
        if member.id in self.run.expected:
            others = ", ".join(sorted(self.run.members))
            why = (
                f"this worker trains other tensors from step {step} of the run on, and {others} did not "
                "make that change: all workers must make it at the same step"
            )
        self.run.anew.turn_away(member.id)
        return Refused("model", f"{why}: {self.difference(member)}")


class Gate:
    """The requests of workers that come and go: to join, to bring slices, to stay and to leave."""

    def __init__(self, server):
        self.server, self.run, self.lock = server, server.run, server.lock
        self.store, self.args = server.store, server.args
        self.ids, self.layouts = Ids(server), Layouts(server)

    def on_join(self, conn, message):
        """Let a worker take part: the worker brings what the server lacks, then gets its place."""
        with self.server.transfers.patient(conn, "join"):
            self.take_join(conn, message)

    def take_join(self, conn, message):
        if self.server.ended.is_set():
            raise ConnectionError("the server ends")
        ended = message.field("ended", list, [])
        member = read_join(self.server, conn, message)
        facts = member.facts
        if not facts.again:  # else those of -m may be old
            self.compare(conn, facts)
        self.ids.wait(conn, member, ended)
        with self.lock:
            self.check(member)
            share(facts, self.server)
            self.run.ask(member, now())
            self.lock.notify_all()
        who = f"{shown(member.id)} on {shown(facts.host)}"
        log.seldom("requests to join", f"{who} ({conn.peer}) asks to join")
        self.admit(conn, member)

    def compare(self, conn, facts):
        """Find which of a worker's frozen tensors are not those that the server has."""
        facts.compared = self.store.weights
        jobs = self.store.compare(facts.frozen)
        hashing = "the server, which compares the frozen weights with those of -m"
        self.server.wait(conn, lambda: all(j.done() for j in jobs.values()), lambda: hashing)
        facts.differs = [n for n, job in jobs.items() if job.result() != facts.frozen[n][1]]

    def introduced(self, conn, message):
        """The Member that a join describes. Raises ProtocolError where the description is malformed,
        Refused where the model is too large."""
        facts, field, run_id = facts_of(conn, message), message.field, self.server.run_id
        fragments = field("num_fragments", int, low=1, high=1000)
        count = fragments + bool(facts.buffers)
        held, resumes, folded = held_of(message, count)
        if run_id and facts.run != run_id:  # what it holds belongs to another run
            held, folded, resumes = [min(version, FRESH) for version in held], [], []
        size = 4 * sum(spec.numel for spec in facts.manifest + facts.buffers) / 1e9
        if size > self.args.max_model_gb:
            raise Refused(
                "size",
                f"the model takes {size:.2f} GB as float32, over --max-model-gb "
                f"{self.args.max_model_gb:g}; raise it if the server has three times that in memory",
            )
        return Member(
            id=conn.worker[0],
            session=conn.worker[1],
            versions=held,
            folded=folded,
            resumes=resumes,
            closed=set(message.numbers("closed", None, high=count - 1)),
            facts=facts,
            layout=layout_of(facts.manifest, facts.buffers),
            sync_every=field("sync_every", int, low=1, high=1 << 31),
            fragments=fragments,
            step=field("step", int, 0),
            position=field("position", int, 0),
            cycle=field("cycle", int, 0, high=MOST_STEPS),
        )

    def check(self, member):
        """Raise Refused where a worker cannot take part in this run. Needs the lock."""
        id = member.id
        if other := self.run.holder(id, member.session, now()):
            raise Refused(
                "id",
                f"worker id {protocol.quoted(id)} is held by a live process on "
                f"{shown(other.facts.host)} ({other.facts.conn.peer}); give this one another "
                "--worker-id, or end that one",
            )
        self.check_settings(member)
        self.layouts.check(member)

    def check_settings(self, member):
        """Raise Refused where a setting differs that all workers need alike. Needs the lock."""
        others = [*self.run.members.values(), *self.run.waiting.values()]
        others = [other for other in others if other.id != member.id]
        if member.facts.source and len({other.id for other in others}) >= self.server.shares:
            raise Refused(
                "setting",
                f"the run's text is cut into {self.server.shares} shares, and as many workers read "
                "them; start the server with more --shares",
            )
        names = ["num_fragments", "source"] + ["sync_every"] * (member.fragments > 1)
        mine = settings_of(member)
        run = [(n, settings_of(o)[n], f"{o.id!r} on {o.facts.host}") for o in others for n in names]
        if is_begun(self.run.slices) or self.run.is_whole:
            run.append(("num_fragments", self.server.model.num_fragments, "the run so far"))
        for name, value, whose in run:
            if value != mine[name]:
                raise Refused(
                    "setting",
                    f"{name} is {mine[name]!r} here and {value!r} in {whose}; all workers of a run "
                    "need the same",
                )

    def admit(self, conn, member):
        """Answer a join, once the worker may enter or is to bring what the server lacks."""
        kind, fields = "compare", {}
        while kind == "compare":
            decide = functools.partial(self.decide, member)
            kind, fields = self.server.wait(conn, decide, self.awaited_to_start)
            if kind == "compare":
                self.compare(conn, member.facts)
        if kind == "bring":
            conn.stall = min(conn.stall, self.args.worker_timeout)
            return conn.send("bring", fields)
        conn.stall = protocol.STALL_SECONDS
        written = self.server.clerk.write()
        self.server.wait(conn, written.done, lambda: "the server's disk")  # a crash forgets nobody
        conn.send("join", fields)
        for k in range(self.server.model.count):
            self.server.model.warm(k, len(self.run.members))

    def decide(self, member):
        """Do for a worker that has asked to join what can be done now. Returns (type, fields) of the
        answer, ("compare", {}) where its frozen tensors are to be compared first, or None where it
        has to wait. Raises Refused where it cannot enter. Needs the lock."""
        run, id, anew = self.run, member.id, self.run.anew
        is_waiting = run.waiting.get(id) is member
        if not is_waiting and run.members.get(id) is not member:
            raise Refused("id", "another connection of this worker has taken its place")
        if is_waiting:
            run.here(id, member.session, now())
            if anew.is_left_behind(id):
                raise self.layouts.left_behind(member)
            if anew.lays_out(id, now()) and self.server.has_saved():
                self.layouts.lay_out_anew(member)
                self.lock.notify_all()
            if not (run.lacking(id, now()) or run.may_enter(id, now())):
                return None
        if member.facts.compared is not self.store.weights:
            return "compare", {}
        if is_waiting and self.ask_to_bring(member):
            files = self.store.needs_files(member.facts)
            return "bring", {"slices": member.asked, "files": files, **self.layout()}
        if is_waiting:
            self.enter(id)
        return "join", self.place(member)

    def ask_to_bring(self, member):
        """Whether a waiting worker is to bring something: slices that the server lacks, or at the
        start of a run the model's descriptive files. Needs the lock."""
        member.asked = self.run.lacking(member.id, now())
        is_first = not self.run.is_open and member.id == min(self.run.waiting)
        is_first = is_first and not member.facts.was_asked
        is_asked = bool(member.asked) or (is_first and self.store.needs_files(member.facts))
        member.facts.was_asked |= is_asked
        return is_asked

    def enter(self, id):
        """Make a member of a waiting worker, or open the run with all that wait. Needs the lock."""
        run, was_open, past = self.run, self.run.is_open, self.server.model.past
        before = run.members.keys() | run.expected.keys()
        entered = run.enter(id, now(), protocol.new_life)
        self.server.history.join([each for each in entered if each not in before])
        if was_open:
            log(f"{shown(id)} joins the run as worker {run.members[id].index}")
        else:
            facts = run.members[id].facts
            self.server.history.opens(now())
            self.server.run_id = self.server.run_id or run.life
            for absent in sorted(before - run.members.keys() - run.expected.keys()):
                self.server.note_left(absent, "has not come back")
            self.store.note_frozen(facts.frozen, f"{shown(id)} on {shown(facts.host)}")
            log(
                f"the run starts at round {self.server.round} with {', '.join(map(shown, entered))}"
            )
            protocol.audit("open", life=run.life, labels=run.versions, members=entered)
            self.server.model.past = None
            if self.args.save_every and (past or not self.store.saved):
                self.server.want_save()  # a crash in round 0 costs nothing
        self.lock.notify_all()

    def place(self, member):
        """The fields of the reply to a join. Needs the lock."""
        run = self.run
        turns, steps = run.place(member.id, now())
        told = "upload_codec", "download_codec", "error_feedback", "max_staleness"
        return {
            "run": self.server.run_id,
            "index": member.index,
            **rank_of(member, self.run.members),
            "num_shares": self.server.shares,
            "heartbeat_seconds": run.rules.heartbeat_seconds,
            **{name: getattr(self.args, name) for name in told},
            "settings": {**self.server.settings, "outer": run.rules.outer},
            "step": member.step,
            "pace": run.paces.of(member, now()),
            "turns": turns,
            "steps": steps,
            "known": run.known(member.id),
            "versions": run.versions,
            "frozen": member.facts.differs,
            **self.layout(),
        }

    def layout(self):
        """The tensors in the order in which the slices have them."""
        return {
            "manifest": protocol.manifest_to_json(self.server.model.manifest),
            "buffers": protocol.manifest_to_json(self.server.model.buffers),
        }

    def awaited_to_start(self):
        """Whom a worker that waits to enter waits for, in words."""
        run = self.run
        if run.expected and run.is_open:
            return f"{', '.join(sorted(run.members))} to train the same tensors"
        if absent := sorted(run.expected.keys() - run.waiting.keys()):
            return f"{', '.join(absent)} to come back"
        if (missing := self.args.n - len(run.waiting)) > 0 and not (run.is_open or run.expected):
            return f"{missing} more worker(s) to join"
        bringing = [id for id in sorted(run.waiting) if run.lacking(id, now())]
        return f"{', '.join(bringing)}'s upload" if bringing else "a round, or the server's disk"

    def on_bring(self, conn, message):
        """Take the slices and files that a joining worker was asked for, then admit the worker."""
        with self.server.transfers.only(conn, "upload"):
            member = self.take_upload(conn, message)
        with self.server.transfers.patient(conn, "join"):
            self.admit(conn, member)

    def take_upload(self, conn, message):
        """Take what a worker brings; returns its Member. The memory of the upload is free then."""
        id, session = conn.worker
        with self.lock:
            member = self.run.waiting.get(id) or self.run.members.get(id)  # the run may have opened
            slices = message.field("slices", list)
            if member is None or member.session != session:
                raise Refused("rejoin", "this worker was waited for no more; join again")
            if slices != member.asked or not member.facts.was_asked:
                raise ProtocolError("bring: this worker was not asked for these slices")
            model = self.server.model
        sizes = protocol.file_sizes_of(message.field("files", dict, {}))
        specs = [
            protocol.TensorSpec(f"slice:{k}", torch.float32, (model.sizes[k],)) for k in slices
        ]
        files = [
            protocol.TensorSpec(f"file:{name}", torch.uint8, (size,))
            for name, size in sizes.items()
        ]
        message.expect(specs + files)
        conn.taken_in()
        size, what = protocol.payload_bytes(message.specs), f"{shown(id)} uploads the model"
        with protocol.Progress(log, what, size, conn.moved_since()):
            values = {k: received(conn, spec) for k, spec in zip(slices, specs, strict=True)}
        raw = [received(conn, spec) for spec in files]
        texts = dict(zip(sizes, map(bytes, map(protocol.memory, raw)), strict=True))
        with self.lock:
            is_asked = self.run.waiting.get(id) is member and self.server.model is model
            if slices and not is_asked:
                raise Refused("rejoin", "this worker was waited for no more; join again")
            for k in slices:
                model.take(k, values[k])
                self.run.bring(id, k)
                say_brought(self.server, member, k)
            newest = max((member.versions[k] for k in slices), default=NONE)
            if NONE < newest <= WEIGHTS:  # a new model: -m may have a part of it
                facts = member.facts
                self.server.model.put(self.store.fit(facts.manifest, facts.buffers, facts.frozen))
            elif model.past and newest <= self.run.anew.held:  # what the server has is as new
                model.inherit()
            self.server.run_id = self.server.run_id or member.facts.run
            self.store.take_files(texts)
            if newest > WEIGHTS:  # work that is on no disk
                self.server.want_save()
            self.run.here(id, session, now())
            self.lock.notify_all()
        return member

    def on_heartbeat(self, conn, message):
        """Note that a member lives and how far it is; tell it of the others, and of orders."""
        with self.lock:
            member = self.run.hear(*conn.worker, now())
            member.facts.conn = conn
            member.blocked = blocked_of(message, len(self.run.slices))
            self.note_progress(member, message, is_push=False)
            member.speed = message.field("steps_per_second", float, 0.0)
            is_to_stop = self.run.is_to_finish(member)
            fields = {
                "round": self.server.round,
                **rank_of(member, self.run.members),
                "members": sorted(self.run.members),
                "orders": ["stop"] * is_to_stop + ["away"] * self.server.closed,
                "stalls": self.server.watch.found[:1],
                "pace": self.run.paces.of(member, now()),
            }
        conn.send("heartbeat", fields)
        if self.server.closed:
            with self.lock:
                member.facts.is_told = True
                self.lock.notify_all()
        self.server.rounds.turn()

    def note_progress(self, member, message, is_push):
        """Note what a message says of a member's progress. Needs the lock."""
        limit, seconds = protocol.MAX_ABS, functools.partial(message.field, kind=float, default=0.0)
        member.reach(message.field("step", int), newest(self.run.slices))
        member.position = message.field("position", int, 0)
        member.cycle = message.field("cycle", int, member.cycle, low=1, high=MOST_STEPS)
        spent = map(seconds, ("trained", "waited", "transferred"))
        reading = Reading(message.field("made", int, 0), *spent, member.arrived)
        self.run.paces.note(member, reading, is_push)
        member.loss = message.field("loss", float, None, low=-limit, high=limit)
        member.max_steps = message.field("max_steps", int, member.max_steps)
        note_evaluation(self.server, member, message)

    def on_leave(self, conn, message):
        """End a member's part of the run."""
        with self.lock:
            member = self.run.hear(*conn.worker, now())
            reason = shown(message.field("reason", str, "done"))
            note_evaluation(self.server, member, message)
            self.remove(member.id, f"leaves: {reason}", ends=True)
        self.server.clerk.settle(FAREWELL_SECONDS)
        conn.send("leave")
        self.server.rounds.turn()

    def remove(self, id, why, ends, drops=False):
        """Remove a member, and have the names written without it. Needs the lock."""
        self.run.remove(id, ends, drops)
        self.server.note_left(id, why)
        if not self.run.members:
            self.server.want_save(final=True)
        self.server.clerk.write()

    def give_up(self, member, why):
        """Wait no longer for a worker that takes part, or has asked to. Needs the lock."""
        if self.run.members.get(member.id) is member:
            return self.remove(member.id, f"is gone: {why}", ends=False)
        log(f"{shown(member.id)} waits to join no more: {why}")
        self.run.forget(member.id, member.session)
        member.facts.conn.hang_up()
        self.lock.notify_all()


class Rounds:
    """The contributions of members, and the entries that they get: pushes, folds and pulls."""

    def __init__(self, server):
        self.server, self.run, self.lock, self.args = server, server.run, server.lock, server.args
        self.unfolded = deque()  # (Round, Entry) whose thread is still to be started
        self.last = None  # line of rounds.jsonl of the round that was closed last
        self.has_twins = False  # whether two workers were seen to train on the same data

    @property
    def model(self):
        """The GlobalModel; None before the first join."""
        return self.server.model

    def slice_of(self, message):
        """The number of the slice that a request is about."""
        return message.field("slice", int, high=len(self.run.slices) - 1)

    def on_push(self, conn, message):
        """Read a contribution whole, let the rules count it, and say so."""
        with self.lock:
            self.run.hear(*conn.worker, now())
            k = self.slice_of(message)
        with self.server.transfers.only(conn, "push", k):
            is_taken = self.take_push(conn, message)
        self.turn()
        conn.send("push", {"taken": is_taken})

    def take_push(self, conn, message):
        """Read a contribution, and count it or give its memory back; returns whether it counts."""
        with self.lock:
            member = self.run.hear(*conn.worker, now())
            push, model = self.announced(member, message), self.model
            self.check_room(push)
            if message.specs:
                push.payload = model.payload(push.k)
        unused, began = push.payload, now()
        try:
            self.read_push(conn, push)
            delay, took = push.adopts, now() - began
            if push.adopts:  # the reply will take about as long as this
                push.adopts += began - took - 2 * QUORUM_TICK_SECONDS
            with self.lock:
                if self.model is not model:
                    raise Refused("rejoin", "the run has other tensors since; join again")
                slice = self.run.slices[push.k]
                self.lock.wait_for(lambda: not slice.folding)
                self.check_room(push)
                before = slice.pushes.get((push.worker, push.seq))
                if is_taken := self.run.push(push, now()):
                    unused = before.payload if before else None
                    self.server.gate.note_progress(member, message, is_push=True)
                    paces = self.run.paces
                    push.spent = before.spent if before else paces.spent(member, took, delay)
                    if push.refused:
                        who = shown(push.worker)
                        log(f"WARNING: {who}: {push.refused}; the round goes on without it")
        finally:
            if unused is not None:
                model.give_back(push.k, unused)
        return is_taken

    def check_room(self, push):
        """Raise ProtocolError where a worker's earlier push of the slice is still in the open round:
        a process has one at a time. Needs the lock."""
        mine = [p for p in self.run.slices[push.k].pushes.values() if p.worker == push.worker]
        others = [p for p in mine if p.seq != push.seq]
        if len(others) >= MAX_PUSHES or any(p.session == push.session for p in others):
            raise ProtocolError(
                f"push {push.seq} of slice {push.k} comes before an entry lists push {others[0].seq}"
            )

    def announced(self, member, message):
        """The Push that a message announces, still without its numbers. Needs the lock."""
        k, limit = self.slice_of(message), protocol.MAX_ABS
        if message.specs:
            message.expect(self.model.codec(k)[0].layout(self.model.sizes[k]))
        return Push(
            worker=member.id,
            session=member.session,
            k=k,
            seq=message.field("seq", int, low=1),
            base=protocol.version_of(message.field("base", list)),
            steps=message.field("steps", int, high=MOST_STEPS),
            closing=message.field("closing", bool, False),
            step=message.field("step", int),
            tokens=message.field("tokens", int, 0),
            loss=message.field("loss", float, None, low=-limit, high=limit),
            adopts=message.field("adopts_in", float, 0.0),
            nbytes=protocol.payload_bytes(message.specs),
        )

    def read_push(self, conn, push):
        """Read a push's numbers, and take the norm of each chunk while it is in the cache and later
        ones are still arriving. The values of buffers have none that could be judged."""
        if push.payload is None:
            return
        codec, size, squares = self.model.codec(push.k)[0], self.model.sizes[push.k], 0.0
        for start, stop, first, last in protocol.chunk_bytes(codec, size):
            conn.read(push.payload.raw[first:last])
            for a, b in protocol.chunks(stop, codec.size, start) if squares < math.inf else ():
                numbers = codec.decoded(push.payload.tensors, a, torch.empty(b - a))
                squares += codec.square(numbers, push.payload.tensors, a)
        if squares == math.inf:
            push.refused = "the pseudo-gradient is not finite"
        elif push.k < self.model.num_fragments:
            push.norm = squares**0.5

    def turn(self):
        """Close every round that is over. Called after each event, and several times a second."""
        with self.lock:
            forced = self.run.forced
            for k in [] if self.server.closed else self.run.over(now()):
                closed = self.run.take(k, now())
                self.server.watch.stalls.closed(k)
                for push in closed.outsized:
                    who = shown(push.worker)
                    log(f"WARNING: {who}: {push.refused}; its {push.steps} steps do not count")
                try:
                    step = max([self.run.step, *(push.step for push in closed.pushes)])
                    self.unfolded.append((closed, self.model.announce(closed, step)))
                except Exception:  # the slice would be taken for one that is being folded
                    die("a round could not be closed")
                self.lock.notify_all()
            self.start_folds()
            if self.run.forced > forced:
                log("WARNING: all workers wait for each other: the oldest round is closed as it is")

    def start_folds(self):
        """Start the threads that fold closed rounds. Where the system has no thread left, the next
        call tries again. Needs the lock."""
        while self.unfolded:
            try:
                threading.Thread(target=self.fold, args=self.unfolded[0], daemon=True).start()
            except RuntimeError as error:
                return self.server.faults.note(f"a round waits for a thread: {error}")
            self.unfolded.popleft()

    def fold(self, closed, entry):
        """Fold a closed round, in a thread of its own, while its entry is being sent."""
        model = self.model
        try:
            norm, counted = model.fold(closed, entry, self.server.outer)
            line = self.round_line(closed, entry, counted, norm)
            self.warn_of_twins(closed)
            with self.lock:
                before = self.server.round
                line |= self.run.paces.report()
                self.server.note_faults()
                self.server.history.close(line, closed.closed)
                self.audit_fold(closed, counted, entry)
                self.run.publish(closed.k)
                self.server.clerk.append(line)  # before the next round can be closed
                self.last, every = line, self.args.save_every
                if every and self.server.round // every > before // every:
                    self.server.want_save()
                self.lock.notify_all()
            entry.finish()
            for push in closed.pushes:
                if push.payload:
                    model.give_back(closed.k, push.payload)
            self.turn()
            self.say(line)
        except BaseException:  # half of the slice is of one version, half of another
            die("an outer step failed")

    def warn_of_twins(self, closed):
        """Say once that the pushes of two workers are equal to the bit."""
        found = None if self.has_twins else twins(closed.pushes)
        if found:
            self.has_twins = True
            first, second = (shown(push.worker) for push in found)
            log(
                f"WARNING: the pushes of {first} and {second} are identical: they train on the same "
                "data in the same order, so that the second one adds nothing. Give each worker data "
                "of its own: seed its data loader with 1337 + the worker's index, for example"
            )

    def audit_fold(self, closed, counted, entry):
        """Write down what a fold has counted, for tests/trail.py. Needs the lock."""

        def named(push):
            return [push.worker, push.session, push.seq, push.steps, push.late, push.weight]

        protocol.audit(
            "fold",
            life=self.run.life,
            fragment=closed.k,
            base=closed.base,
            label=closed.version,
            pushes=[named(push) for push in counted],
            others=[named(push) for push in closed.pushes if push not in counted],
            plain=closed.plain,
            share=closed.share if closed.plain else closed.part,
            checksum=bytes(entry.checksum.tolist()).hex(),
        )

    def round_line(self, closed, entry, counted, norm):
        """The line of rounds.jsonl, which status.py shows too, of a round. The History adds to it."""

        def pushed(push):
            spent = push.spent or Reading(0, 0.0, 0.0)
            weight = round(push.weight, 4) if push in counted else 0.0
            seconds = {name: round(float(getattr(spent, name)), 3) for name in PUSHED[:3]}
            return seconds | {"steps": push.steps, "weight": weight, "late": push.late}

        return {
            "time": round(time.time(), 3),
            "round": closed.version.number,
            "fragment": closed.k,
            "step": entry.step,
            "members": closed.members,
            "pushed": {push.worker: pushed(push) for push in closed.pushes},
            "staleness": {push.worker: push.late for push in counted if push.late},
            "steps": sum(push.steps for push in counted),
            "tokens": sum(push.tokens for push in counted),
            "losses": {push.worker: push.loss for push in closed.pushes},
            "refused": [push.worker for push in closed.pushes if push.refused],
            "closing": closed.plain,
            "share": round(closed.share, 4),
            "quorum": closed.quorum if self.run.rules.quorum else None,
            "grace": round(closed.grace, 4),
            "weights": {push.worker: round(push.weight, 4) for push in counted},
            "norm": norm,
            "norms": {p.worker: p.norm for p in closed.pushes if p.norm is not None},
            "reasons": {p.worker: p.refused for p in closed.pushes if p.refused},
            "bytes_up": sum(push.nbytes for push in closed.pushes),
            "bytes_down": entry.nbytes * len({push.worker for push in closed.pushes}),
            "seconds_waiting": round(closed.closed - closed.opened, 4),
            "seconds_folding": round(now() - closed.closed, 4),
        }

    def say(self, line):
        """Log a closed round."""
        losses = [loss for loss in line["losses"].values() if loss is not None]
        mean = f"loss {sum(losses) / len(losses):.4f} | " if losses else ""
        place = f", fragment {line['fragment']}" if len(self.run.slices) > 1 else ""
        count = len(line["losses"])
        log(
            f"round {line['round']}{place} | {count} push{'es' * (count != 1)} | {mean}"
            f"norm {line['norm']:.4g} | waited {line['seconds_waiting']:.2f} s, "
            f"folded {line['seconds_folding']:.2f} s | up {line['bytes_up'] / 1e6:.2f} MB, "
            f"down {line['bytes_down'] / 1e6:.2f} MB"
        )

    def on_pull(self, conn, message):
        """Send the entries of a slice's log that a worker lacks: up to the entry that lists the
        push it waits for, or with sequence number 0 up to the head. Where the log does not reach
        back far enough, send the slice in full."""
        with self.lock:
            member, k = self.run.hear(*conn.worker, now()), self.slice_of(message)
        with self.server.transfers.only(conn, "pull", k):
            self.send_log(conn, message, member, k)

    def send_log(self, conn, message, member, k):
        """Answer a pull of slice k, after the push that it waits for."""
        held = protocol.version_of(message.field("version", list))
        seq, slice = message.field("seq", int), self.run.slices[k]

        def awaited():
            names = ", ".join(map(shown, sorted(self.run.missing(k))))
            more = self.args.min_workers - len(self.run.members.keys() | slice.pushers)
            return names if more <= 0 else f"{names or 'nobody'}, and {more} more (--min-workers)"

        self.server.wait(conn, lambda: (member.id, seq) not in slice.pushes, awaited)
        with self.lock:
            fate = slice.folded.get(member.id)
            is_listed = seq == 0 or (fate is not None and fate.seq >= seq)
            if not is_listed and not self.run.is_there(k, member.id, seq):
                return conn.send("again", {"slice": k})
            if seq == 0 and held == slice.version:
                return conn.send("current", {"slice": k, "version": held})
            entries = self.model.entries(k, held, self.lists(k, member.id, seq))
            for entry in entries or ():
                entry.readers += 1
        if entries:
            self.send_entries(conn, entries)
        else:
            self.send_slice(conn, k)

    def lists(self, k, id, seq):
        """The version of slice k whose entry lists a push, the head for seq 0. Needs the lock."""
        if seq == 0:
            return self.run.slices[k].version
        listing = [e for e in self.model.logs[k] if id in e.fates and e.fates[id].seq >= seq]
        return listing[0].version if listing else NONE

    def send_entries(self, conn, entries):
        """Send entries of a log, the last of which may still be in the making."""
        try:
            for entry in entries:
                fields = {
                    "slice": entry.k,
                    "base": entry.base,
                    "version": entry.version,
                    "folded": entry.fates,
                    "plain": entry.plain,
                    "part": entry.part,
                    "made": entry.made,
                    "step": entry.step,
                    "more": entry is not entries[-1],
                }
                pieces = entry.pieces()
                if not fields["more"]:
                    pieces = self.releasing(conn, entry.k, pieces)
                conn.send("entry", fields, entry.specs, pieces)
        finally:
            with self.lock:
                for entry in entries:
                    entry.readers -= 1

    def releasing(self, conn, k, pieces):
        """The pieces of a slice, or of an entry, of which the checksum is the last: after that the
        worker may pull again, on another connection."""
        for piece in pieces:
            if piece.nbytes == protocol.Checksum.SPEC.nbytes:
                self.server.transfers.release(conn, "pull", k)
            yield piece

    def send_slice(self, conn, k):
        """Send a slice in full, with what is folded in it: after a fold, also one that is due."""
        slice = self.run.slices[k]

        def is_still():
            return not slice.folding and (self.server.closed or not self.run.is_over(k, now()))

        with contextlib.ExitStack() as stack:
            with self.lock:
                self.lock.wait_for(is_still)
                pieces = stack.enter_context(self.model.shared(k, slice.version).reading())
                fields = {"slice": k, "version": slice.version, "folded": dict(slice.folded)}
                fields |= {"step": self.run.step, "made": slice.made, "more": False}
            values = protocol.TensorSpec("slice", torch.float32, (self.model.sizes[k],))
            what = f"{shown(conn.worker[0])} downloads the model"  # whose own log tells of it, too
            progress = protocol.Progress(None, what, values.nbytes, conn.moved_since())
            parts = progress.over(self.releasing(conn, k, pieces))
            conn.send("slice", fields, [values, protocol.Checksum.SPEC], parts)


class Crowd:
    """Connections of one kind in groups, at most `limit`. One more costs the largest group its
    oldest connection, so that whoever brings many loses one of its own."""

    def __init__(self, limit):
        self.limit, self.groups, self.count = limit, {}, 0

    def add(self, one, group):
        """Add a connection. Returns the one that has to go for it, or None."""
        self.groups.setdefault(group, {})[one] = None
        self.count += 1
        if self.count <= self.limit:
            return None
        largest = max(self.groups, key=lambda group: len(self.groups[group]))
        oldest = next(iter(self.groups[largest]))
        self.remove(oldest, largest)
        return oldest

    def remove(self, one, group):
        """Remove a connection."""
        del self.groups[group][one]
        self.count -= 1
        if not self.groups[group]:
            del self.groups[group]

    def __iter__(self):
        return (one for members in self.groups.values() for one in members)


class Pace:
    """Holds events down to `rate` a second, of which `burst` may come at once after a quiet time."""

    def __init__(self, rate, burst):
        self.rate, self.lead = rate, burst / rate
        self.paid = 0.0  # seconds (`now`) up to which the events so far take the rate

    def left(self):
        """Seconds until the next event may come."""
        return max(0.0, self.paid - self.lead - now())

    def count(self):
        """Count an event. Returns the seconds that it has to wait."""
        left = self.left()
        self.paid = max(self.paid, now()) + 1 / self.rate
        return left


class Visitor:
    """One connection, from accept to its end. `crowd`: the Crowd that it stands in, under `group`."""

    def __init__(self, sock, address):
        self.sock, self.address, self.since = sock, address, now()
        found = ipaddress.ip_address(address.partition("%")[0])
        found = getattr(found, "ipv4_mapped", None) or found
        # A machine may have all the addresses of an IPv6 network of 64 bits.
        self.network = str(found if found.version == 4 else int(found) >> 64)
        self.seconds = protocol.HELLO_SECONDS  # time that is left for its hello, without queuing
        self.conn = self.crowd = self.group = None


# A visitor goes through stages, and each has a limit of its own, so that no stage is filled by those
# who do not get any further: *silent* until it has sent a byte, then *ready* until there is a place,
# *reading* while a thread reads its hello, then *idle* or *asking* as long as it belongs to no
# member, and *members* from then on. The door's own thread looks after the first two, in which a
# visitor costs a file and nothing else; of those that are ready the newest of the network with the
# fewest places comes first, so that it does not stand behind a crowd that takes its time. Hellos, and
# requests of those that belong to no member, have a pace: a crowd costs so much of the time of the
# rounds and no more.


class Door:
    """Lets connections in, and has each served by a thread of its own. Nothing that strangers do
    ends its thread or takes a place from a member."""

    def __init__(self, server, guard):
        self.server, self.guard, self.ended = server, guard, server.ended
        self.lock = threading.Lock()
        strangers = max(MAX_STRANGERS, 4 * server.args.n)
        self.silent, self.ready, self.idle, self.asking = (Crowd(strangers) for _ in range(4))
        self.reading = Crowd(MAX_STRANGERS)
        self.members = Crowd(max(MAX_CONNECTIONS, 16 * server.args.n))
        self.hellos, self.questions = Pace(*HELLOS), Pace(*QUESTIONS)
        self.selector = selectors.DefaultSelector()
        self.said = -COMPLAINT_SECONDS  # seconds when the door last said that it can let nobody in

    @property
    def strangers(self):
        """The number of connections that belong to no member."""
        crowds = self.silent, self.ready, self.reading, self.idle, self.asking
        return sum(crowd.count for crowd in crowds)

    def notices(self):
        """Lines that say at start who can join, and what that means."""
        guard = self.guard
        allowed = "".join(f", {network}" for network in guard.allow)
        if guard.token:
            where = "" if guard.admits_all else f" from loopback and private addresses{allowed}"
            line = f"who has the token can join{where}; nobody else can read or stop the run"
            yield line if guard.context else f"{line}, but without TLS the network can read along"
        else:
            yield (
                f"no token: anybody at a loopback or private address{allowed} can join, read the "
                "model, change it and stop the run; --token-file keeps others out"
            )
        if guard.context:
            yield f"TLS; the others need --tls-fingerprint {self.access().tls}"
        if 0 < len(guard.token) < protocol.SHORT_TOKEN:
            yield (
                f"WARNING: the token has fewer than {protocol.SHORT_TOKEN} characters: others can "
                "find it by trying"
            )

    def access(self):
        """The protocol.Access by which a worker gets in."""
        cert = self.server.args.tls_cert
        mark = protocol.certificate_fingerprint(cert) if cert else ""
        return protocol.Access(self.guard.token, mark)

    # --- The door's own thread ---

    def stand(self, listener):
        """Let visitors in until the process ends, whatever happens."""
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ)
        while not self.ended.is_set():
            try:
                # Whoever is ready waits for a place, or for the pace.
                pause = PLACE_SECONDS if self.ready.count else 1.0
                for key, _ in self.selector.select(timeout=pause):
                    if key.fileobj is listener:
                        self.accept(listener)
                    else:
                        self.note_ready(key.data)
                self.end_silent()
                self.admit()
            except Exception as error:
                if now() - self.said > COMPLAINT_SECONDS:
                    self.said, text = now(), f"a connection cannot be accepted: {error!r}"
                    log(f"WARNING: {text}; is the limit of open files or threads too low?")
                self.ended.wait(0.1)  # most such things pass

    def accept(self, listener):
        """Take visitors in, unread. Where the files are used up, each costs a stranger its place."""
        for _ in range(64):  # then it is the turn of others
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionError):  # none left, or gone already
                return
            except OSError:
                self.make_room()
                raise
            visitor = Visitor(sock, address[0])
            sock.setblocking(False)
            self.selector.register(sock, selectors.EVENT_READ, visitor)
            with self.lock:
                gone = self.place(visitor, self.silent, visitor.network)
            self.forget(gone)

    def make_room(self):
        """The files are used up: end the connection of a stranger, of those who are least far."""
        for visitor in itertools.chain(self.silent, self.ready):
            return self.forget(visitor)
        with self.lock:
            oldest = next(iter(self.idle), None)
        if oldest is not None:
            oldest.conn.hang_up()

    def note_ready(self, visitor):
        """A visitor has sent something, or has gone."""
        if visitor.crowd is not self.silent:  # it has just lost its place
            return
        try:
            is_gone = not visitor.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            is_gone = True
        if is_gone:
            return self.forget(visitor)
        self.selector.unregister(visitor.sock)
        visitor.seconds -= now() - visitor.since
        with self.lock:
            gone = self.place(visitor, self.ready, visitor.network)
        self.forget(gone)

    def end_silent(self):
        """Send those away who have said nothing for long."""
        for visitor in [*self.silent]:
            if now() - visitor.since >= protocol.HELLO_SECONDS:
                self.forget(visitor)

    def forget(self, visitor):
        """Close a visitor that no thread serves, if there is one."""
        if visitor is None:
            return
        with self.lock:
            self.place(visitor, None)
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(visitor.sock)
        visitor.sock.close()

    def admit(self):
        """Give a thread to those that are ready, as far as there are places and the pace allows."""
        while not self.hellos.left() and (visitor := self.next()) is not None:
            self.hellos.count()
            try:
                threading.Thread(target=self.serve, args=[visitor], daemon=True).start()
            except Exception:
                self.forget(visitor)
                raise

    def next(self):
        """A visitor that has just got a place, or None."""
        with self.lock:
            taken = {network: len(at) for network, at in self.reading.groups.items()}
            network = min(self.ready.groups, key=lambda name: taken.get(name, 0), default=None)
            free = self.reading.count < self.reading.limit
            if network is None or not free or taken.get(network, 0) >= MAX_PER_ADDRESS:
                return None
            visitor = next(reversed(self.ready.groups[network]))
            self.place(visitor, self.reading, network)
            return visitor

    # --- The threads of visitors ---

    def place(self, visitor, crowd, group=None):
        """Move a visitor to another crowd, or out of all with None. Returns a visitor that has to
        go for it, or None. Needs the lock."""
        if visitor.crowd is not None:
            visitor.crowd.remove(visitor, visitor.group)
        visitor.crowd, visitor.group = crowd, group
        gone = crowd.add(visitor, group) if crowd is not None else None
        if gone is not None:
            gone.crowd = None
        return gone

    def settle(self, visitor, asks):
        """Note whether a visitor, whose hello is through, asks for something now or is idle. Returns
        the seconds that it may be idle, or None if it is of a worker of the run."""
        run = self.server.run

        def is_of(visitor, workers):
            return of_process(workers, *visitor.conn.worker) is not None

        is_member = is_waiting = False
        if visitor.conn.worker[0]:
            with self.server.lock:
                is_member, is_waiting = is_of(visitor, run.members), is_of(visitor, run.waiting)
        with self.lock:
            if is_member:
                crowd, group = self.members, visitor.conn.worker[0]
            else:
                crowd, group = self.asking if asks else self.idle, visitor.network
            is_new = visitor.crowd is not crowd or crowd is self.idle
            gone = self.place(visitor, crowd, group) if is_new else None
            if gone is not None and is_of(gone, run.members):  # its join has gone through
                gone = self.place(gone, self.members, gone.conn.worker[0])
        if gone is not None:
            gone.conn.hang_up()
        return None if is_member or is_waiting else STRANGER_SECONDS

    def serve(self, visitor):
        """Serve one connection, from its hello to its end."""
        conn = None
        try:
            visitor.sock.setblocking(True)
            conn = visitor.conn = protocol.Connection(visitor.sock, visitor.address)
            self.converse(visitor, conn)
        except OSError as error:
            member = self.server.run.members.get(conn.worker[0]) if conn else None
            if member and member.facts.conn is conn:  # its others mostly end with this one
                who = shown(member.id)
                log.seldom("lost connections", f"the connection to {who} ended: {error}")
        finally:
            with self.lock:
                self.place(visitor, None)
            if conn and conn.worker[0]:  # others concern nobody, and take no lock from members
                with self.server.lock:
                    self.server.hang_up(conn)
            if conn:
                conn.close()
            visitor.sock.close()

    def converse(self, visitor, conn):
        """Read the hello, then answer requests. Raises OSError at the end of the connection."""
        server = self.server
        try:
            protocol.greet(conn, {"session": server.session}, self.guard, visitor.seconds)
            patience = self.settle(visitor, asks=False)
            while True:
                if patience and not conn.worker[0]:  # whoever only looks has small requests
                    conn.deadline = now() + patience
                message = conn.receive(idle=patience)
                conn.deadline = None
                name = f"on_{message.type}"
                rooms = (server.gate, server.rounds, server.handouts, server)
                handler = next((getattr(r, name) for r in rooms if hasattr(r, name)), None)
                if handler is None:
                    raise ProtocolError(f"no request is called {message.type!r}")
                if self.settle(visitor, asks=True):
                    with self.lock:
                        pause = self.questions.count()
                    time.sleep(pause)
                if message.type not in ("push", "bring"):  # the others carry no tensors
                    message.expect([])
                handler(conn, message)
                patience = self.settle(visitor, asks=False)
        except (Refused, ProtocolError) as error:
            if getattr(error, "code", "") != "rejoin":  # a worker hears that until its step ends
                who = shown(conn.worker[0] or conn.peer)
                log.seldom("refusals", f"{who} is refused: {error}")
            conn.refuse(error)


class Server:
    """The shell around the rules of one run and its global model: threads, connections, the lock.

    args: the parsed command line. `serve` returns when the run or the process is told to end.
    """

    def __init__(self, args):
        self.args, self.session = args, secrets.token_hex(8)
        self.lock = threading.Condition()
        self.ended = threading.Event()  # set when the process is to end
        self.closed = False  # whether the process ends: no round closes any more
        self.saver = Errand(self.try_save, then=self.wake)
        # Futures of the newest saving, and of the newest one with the final model
        self.saving = self.ending = None
        self.tried = None  # versions that `has_saved` has asked to have saved
        self.door = Door(self, guard_of(args))
        self.faults = protocol.Faults()  # what went wrong and was survived
        self.seen_faults = 0  # of these, as many as the history has counted
        self.run, self.history = Run(rules_of(args), now()), History()
        self.run_id = ""  # life in which the run began
        self.store = Store(args.model, args.output_dir, args.save_total_limit)
        self.store.hold()
        self.model = self.reopen()  # GlobalModel; None before the first join
        lr, momentum, nesterov, warmup = self.settings.values()
        self.outer = Outer(lr=lr, momentum=momentum, nesterov=nesterov, warmup=warmup)
        if self.shares < args.n:
            raise SystemExit(
                f"{self.shares} --shares for {args.n} workers: some would have no text"
            )
        self.transfers, self.watch = Transfers(self), Watch(self)
        self.handouts, self.clerk = Handouts(self), Clerk(self)
        self.gate, self.rounds = Gate(self), Rounds(self)

    # --- The life of the process ---

    def reopen(self):
        """Go on from the newest checkpoint and the members' names, as far as there are any. Returns
        the GlobalModel or None."""
        args = self.args
        state, model = self.store.open(args.upload_codec, args.download_codec, args.error_feedback)
        if self.store.names:
            self.run.reopen(self.store.names, state["heads"] if state else [], now())
        for row in self.store.journal.rows():
            self.history.restore(row)
        saved = state or {"settings": {}, "shares": 0}
        self.settings = outer_settings(args, saved["settings"])
        self.shares = args.shares or saved["shares"] or max(args.n, LEAST_SHARES)
        if state is None:
            return None
        if args.outer != "delayed" and "gathered" in model.outer:
            model.outer["momentum"].add_(model.outer.pop("gathered"))  # which end here
        self.run_id, self.run.step = state["run"], state["step"]
        self.run.life = max(self.run.life, state["life"], self.store.latest_life)
        for k, slice in enumerate(self.run.slices):
            slice.norms, slice.missed = state["norms"][k], state["missed"][k]
        self.run.anew.layout = layout_of(model.manifest, model.buffers)
        protocol.audit("load", life=self.run.life, path=state["path"], labels=self.run.versions)
        return model

    def serve(self):
        """Serve until `--until-done` is met, the spawned workers are done, or a signal comes.
        Returns the exit code."""
        raise_file_limit()
        listener, signals = self.listen(), []
        window = min(protocol.RATE_SECONDS, 2 * self.args.worker_timeout)
        protocol.Connection.least = 1024 * self.args.min_rate, window
        self.port = listener.getsockname()[1]

        def on_signal(number, _):
            if signals:
                os._exit(128 + number)
            signals.append(number)
            self.ended.set()

        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)
        threading.Thread(target=self.door.stand, args=[listener], daemon=True).start()
        threading.Thread(target=self.tick, daemon=True).start()
        who = f"{self.args.n} worker(s)"
        if self.run.expected:
            who = ", ".join(map(shown, sorted(self.run.expected)))
            who += f", or after {self.args.worker_timeout:g} s"
        for line in self.door.notices():
            log(line)
        log(f"listening on port {self.port}; the run starts with {who}")
        code = Spawn(self).wait() if self.args.spawn else 0
        self.ended.wait()
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        if signals:
            log("stopping: saving, and telling the workers; once more leaves at once")
        self.saver(not self.run.members).result()
        self.clerk.settle(FAREWELL_SECONDS)
        with self.lock:
            left = [member.facts for member in self.run.members.values()]
            self.lock.wait_for(lambda: all(facts.is_told for facts in left), FAREWELL_SECONDS)
        listener.close()
        if self.ending:  # the last worker may have left meanwhile
            self.ending.result()
        for _, newest in protocol.checkpoints(self.store.output)[:1]:
            log(f"ends; the newest checkpoint is {os.path.abspath(newest)}")
        return 128 + signals[0] if signals and self.args.spawn else code

    def listen(self):
        """The listening socket."""
        host = self.args.host
        six = ":" in host or (not host and socket.has_dualstack_ipv6())
        family = socket.AF_INET6 if six else socket.AF_INET
        try:
            return socket.create_server(
                (host, self.args.port), family=family, backlog=256, dualstack_ipv6=six and not host
            )
        except OSError as error:
            raise SystemExit(
                f"cannot listen on {host or 'port'} {self.args.port}: {error.strerror or error}; "
                "is another server running? Try another --port"
            ) from None

    def hang_up(self, conn):
        """A connection has ended. Needs the lock."""
        waiting = self.run.waiting.get(conn.worker[0])
        if waiting and waiting.facts.conn is conn:
            self.run.forget(*conn.worker)
        self.lock.notify_all()

    def tick(self):
        """Give up who is silent, and close the rounds whose time has come."""
        seconds = QUORUM_TICK_SECONDS if self.args.quorum else TICK_SECONDS
        while not self.ended.wait(min(seconds, self.args.worker_timeout / 4)):
            with self.faults.survive(log, "looking after workers and rounds"):
                self.look_after()
            log.settle()

    def look_after(self):
        """Do what the time demands, once."""
        limit = self.args.worker_timeout
        with self.lock:
            for member in self.run.waiting.values():
                if (member.id, "upload", None) in self.transfers.moving:  # so it is alive
                    self.run.here(member.id, member.session, now())
            self.watch.look()
            self.run.anew.give_up_absent(now())
            for workers in (self.run.members, self.run.waiting):
                for member in self.run.silent(workers, now()):
                    self.gate.give_up(member, f"not heard of for {limit:g} s")
            if self.is_over and self.args.until_done and not self.args.spawn:
                self.ended.set()  # else with the last of the workers, which have yet to save
        self.clerk.write()
        self.rounds.turn()

    def wake(self, job=None):
        """Wake all who wait for something, such as a job that is done."""
        with self.lock:
            self.lock.notify_all()

    def wait(self, conn, condition, awaited):
        """Wait for `condition()`, called with the lock held, and return what it gave. The peer gets a
        `wait` message with `awaited()` soon, and every WAIT_SECONDS. Raises ConnectionError when the
        peer hangs up, or the server ends."""
        said = -protocol.WAIT_SECONDS
        while True:
            with self.lock:
                found = self.lock.wait_for(lambda: condition() or (self.closed and "closed"), 0.5)
                if found == "closed":
                    break
                if found:
                    return found
                text = awaited()
                fields = text if type(text) is dict else {"awaited": text}
            if conn.closed_by_peer():
                raise ConnectionError(f"{conn.peer} closed the connection")
            if now() - said >= protocol.WAIT_SECONDS:
                conn.send("wait", fields)
                said = now()
        conn.send("wait", {"awaited": "the server, which was stopped"})
        raise ConnectionError("the server ends")

    # --- Orders, and what a joining worker asks ---

    def on_fetch(self, conn, message):
        """The model's descriptive files (`files`: true), or frozen tensors of -m by name, in the
        dtypes that the worker has them in (`frozen`: names)."""
        if message.field("files", bool, False):
            raw = self.handouts.files()
            return conn.send("fetch", {}, protocol.specs_of(raw.items()), raw.values())
        with self.lock:
            facts = self.run.hear(*conn.worker, now()).facts
        wanted = set(map(str, message.field("frozen", list)))
        names = [name for name in facts.differs if name in wanted]
        specs, tensors = self.store.frozen_tensors(facts.frozen, names)
        with self.transfers.only(conn, "fetch"):
            conn.send("fetch", {}, specs, tensors)

    def on_save(self, conn, message):
        """Write a checkpoint soon."""
        with self.lock:
            self.want_save()
        conn.send("save")

    def on_stop(self, conn, message):
        """Tell all workers to finish: each sends what it has, takes the final model and leaves."""
        with self.lock:
            self.run.stop()
        self.clerk.settle(FAREWELL_SECONDS)
        log.seldom("orders", f"{conn.peer} asks to stop: the workers are told to finish")
        conn.send("stop")

    def on_drop(self, conn, message):
        """Wait no longer for a member, and tell its process to finish, if that lives."""
        id = message.field("worker", str)
        why, run = f"is dropped, as {conn.peer} asks", self.run
        with self.lock:
            if id in run.members:
                self.gate.remove(id, why, ends=False, drops=True)
            elif id in run.expected:
                if run.anew.drop(id):
                    self.note_left(id, why)
            else:
                members = ", ".join(map(shown, sorted(run.members | run.expected))) or "none"
                raise Refused("drop", f"no member is called {shown(id)}; the members: {members}")
        self.clerk.settle(FAREWELL_SECONDS)
        self.rounds.turn()
        conn.send("drop")

    # --- What the status tells ---

    def note_left(self, id, why):
        """Say that a worker is no member any more. Needs the lock."""
        log(f"{shown(id)} {why}")
        self.history.leave(id, why, time.time())

    def note_faults(self):
        """Have the history count the faults since the last time. Needs the lock."""
        found, self.seen_faults = self.faults.total - self.seen_faults, self.faults.total
        self.history.fault(found)

    def status(self):
        """The fields of the reply to status. Needs the lock."""
        run, model, args = self.run, self.model, self.args
        everyone = [*run.members.values(), *run.waiting.values()]
        fragments = run.slices[: model.num_fragments] if model else []
        awaited = {id for k, s in enumerate(run.slices) if s.pushes for id in run.missing(k)}
        moving = [*self.transfers.moving]
        return outlook(self) | {
            "mode": "streaming" if len(fragments) > 1 else "sync",
            "state": self.state(),
            "min_workers": args.min_workers,
            "round": self.round,
            "step": run.step,
            "uptime_seconds": round(now() - run.began, 1),
            "parameters": model.total if model else 0,
            "workers_wanted": args.n,
            "expected": sorted(run.expected.keys() - run.waiting.keys()),
            "workers": [
                status_of(m, run, moving)
                for m in sorted(run.members.values(), key=lambda m: m.index)
            ],
            "joining": sorted(run.waiting),
            "awaited": sorted(awaited),
            "stalls": self.watch.found,
            "waiting_costs": run.paces.costs(),
            "sync": told_sync(self),
            "source": min((member.facts.source for member in everyone), default=None),
            "shares": self.shares,
            "settings": self.settings,
            "upload_codec": args.upload_codec,
            "download_codec": args.download_codec,
            "fragments": [
                {"version": max(0, slice.version.number), "pushes": len(slice.pushes)}
                for slice in fragments
            ],
            "last_round": self.rounds.last,
            "forced_rounds": run.forced,
            "output": os.path.abspath(self.store.output),
            "save_error": self.store.save_error,
            "strangers": self.door.strangers,
            "faults": list(self.faults),
            "session": self.session,
        }

    def state(self):
        """What the run is doing, in words."""
        if not self.run.is_open:
            return "waiting for workers" + " to come back" * bool(self.run.expected)
        return "running" if len(self.run.members) >= self.args.min_workers else "too few workers"

    # --- Saving ---

    def want_save(self, final=False):
        """Have a checkpoint written soon, and if `final` the final model too. Needs the lock."""
        self.saving = self.saver(final)
        self.ending = self.saving if final else self.ending

    def try_save(self, final):
        """What the saver's thread does."""
        with self.faults.survive(log, "saving"):
            self.save(final)

    def has_saved(self):
        """Whether the disk has the model, or has just failed to take it, before it gets other tensors:
        until the run opens with these there is nothing to save. Asks for it. Needs the lock."""
        if self.run.anew.before is None and self.tried != self.run.versions:
            self.tried = self.run.versions
            self.want_save()
        return self.saving is None or self.saving.done()

    @property
    def is_over(self):
        """Whether all have left, the final model is written, and nobody is expected back."""
        is_left = self.ending is not None and self.ending.done() and not self.run.is_open
        return is_left and not self.run.anew.awaits_any(now())

    def save(self, final):
        """Write a checkpoint where there is something new, and if `final` the final model too."""
        with self.lock:
            if not self.run.is_whole or self.run.anew.before:
                return  # the model is only half laid out
            while any(slice.folding for slice in self.run.slices):
                self.rounds.start_folds()  # near the end nobody else does
                self.lock.wait(0.5)
            state, model = self.state_to_save(), self.model
            snapshots, others = model.freeze(), model.freeze() if final else []
        self.store.save(state, model, snapshots)
        if "names" in self.store.faults and "checkpoint" not in self.store.faults:
            self.clerk.named = None  # the disk is there again: the next tick writes the names
        if final:
            self.store.save_final([version for version, _ in state["heads"]], model, others)

    def state_to_save(self):
        """The state of the run that a checkpoint stores. Needs the lock."""
        run = self.run
        return {
            "run": self.run_id,
            "life": run.life,
            "step": run.step,
            "shares": self.shares,
            "settings": self.settings,
            "heads": [(slice.version, dict(slice.folded)) for slice in run.slices],
            "norms": [list(slice.norms) for slice in run.slices],
            "missed": [slice.missed for slice in run.slices],
            **run.names(),
        }

    @property
    def round(self):
        """Rounds that every slice has closed."""
        return max(0, min((slice.version.number for slice in self.run.slices), default=0))


# --- The command line ----------------------------------------------------------------------------


def worker_environment(count):
    """The environment of one of `count` workers on this machine, which share its cores."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    return {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **os.environ}


class Spawn:
    """The workers that `--spawn` starts on this machine, whose output is passed on."""

    def __init__(self, server):
        self.server = server
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
        host = server.args.host or "127.0.0.1"
        address = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
        self.workers, self.readers = {}, []  # {name: process} of those that live; their outputs
        self.codes = []  # exit codes of those that have ended
        access = server.door.access().variables()  # a command line could be read by others here
        environment = {**worker_environment(server.args.n), "DILOCO_TLS": "", **access}
        for name in (f"worker-{number}" for number in range(server.args.n)):
            command = [sys.executable, script, "--server", address, "--worker-id", name]
            process = self.workers[name] = subprocess.Popen(
                [*command, server.args.spawn],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C here is passed on once, not twice
                preexec_fn=_end_with_parent,
            )
            reader = threading.Thread(target=self._pass_on, args=[name, process], daemon=True)
            reader.start()
            self.readers.append(reader)

    def _pass_on(self, name, process):
        for line in process.stdout:
            line = line.decode(errors="replace").rstrip()
            log.write(f"{name}: {line.removeprefix(f'diloco: {name}: ')}\n")

    def _reap(self):
        """Note which workers have ended: their ids are free, and nobody waits for them."""
        for name, process in [*self.workers.items()]:
            if process.poll() is not None:
                self.codes.append(process.returncode)
                del self.workers[name]
                if process.returncode:
                    log(f"{name} ended with exit code {process.returncode}")
                run = self.server.run
                with self.server.lock:
                    if member := run.members.get(name) or run.waiting.get(name):
                        self.server.gate.give_up(member, "its process has ended")
                self.server.rounds.turn()

    def wait(self):
        """Wait until all have ended, or the server is told to end; 0 if all went well."""
        ended = self.server.ended
        while self.workers:
            with self.server.faults.survive(log, "looking after the spawned workers"):
                self._reap()
            begun = self.server.run.is_open or self.server.rounds.last
            if any(self.codes) and not begun:
                ended.set()  # it failed before the start: the others would wait for it for ever
            if ended.wait(0.2):
                self._stop()
        for reader in self.readers:  # a process that a worker has left behind may hold its output
            reader.join(LEAVE_SECONDS)
        ended.set()
        return int(any(self.codes))

    def _stop(self):
        for number in (signal.SIGINT, signal.SIGKILL):
            left = [process for process in self.workers.values() if process.poll() is None]
            for process in left:
                process.send_signal(number)
            deadline = time.monotonic() + LEAVE_SECONDS
            for process in left:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))


def _end_with_parent():
    """Make a spawned worker end when the server is killed, so that its command can start anew."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def number(kind, low, high=float("inf")):
    """An argparse type: a finite number within bounds."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value < float("inf")):
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def guard_of(args):
    """The Guard that a command line gives. Raises SystemExit where a file cannot be used."""
    try:
        if args.tls_key and not args.tls_cert:
            raise ValueError("--tls-key needs --tls-cert")
        context = protocol.server_context(args.tls_cert, args.tls_key) if args.tls_cert else None
        token = protocol.read_token(args.token, args.token_file)
    except (OSError, ValueError) as error:
        raise SystemExit(f"server.py: {error}") from None
    return protocol.Guard(token, context, tuple(args.allow))


def raise_file_limit():
    """Let this process open as many files as the system permits: each connection is one."""
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def quorum(text):
    """An argparse type: a number of contributions, 0 for `all`."""
    return 0 if text == "all" else number(int, 1)(text)


def grace(text):
    """An argparse type: seconds, None for `auto`."""
    return None if text == "auto" else number(float, 0)(text)


def network(text):
    """An argparse type: a network as address/bits."""
    return ipaddress.ip_network(text, strict=False)


def rules_of(args):
    """The Rules that a command line gives."""
    same = Rules.__dataclass_fields__.keys() - {"workers"}
    return Rules(workers=args.n, **{name: getattr(args, name) for name in same})


# fmt: off
def add_guard_options(parser):
    """Options that say who may speak to the server."""
    add = parser.add_argument
    protocol.add_token_options(parser)
    add("--tls-cert", metavar="FILE", help="speak TLS, with this certificate (PEM)")
    add("--tls-key", metavar="FILE", help="its key, if that is not in the same file")
    add("--allow", type=network, action="append", default=[], metavar="CIDR",
        help="let this network in besides private ones, for example 203.0.113.0/24; repeatable")


def add_round_options(parser):
    """Options that say when a round closes and what becomes of a push."""
    add, count, real = parser.add_argument, number(int, 0), number(float, 0)
    add("--worker-timeout", type=number(float, 1), default=30.0, metavar="SECONDS",
        help="a worker not heard of for so long is no longer waited for (%(default)s)")
    add("--quorum", type=quorum, default=0, metavar="K|all",
        help="close a round when so many have pushed and the grace is over, without the others (all)")
    add("--grace", type=grace, metavar="SECONDS|auto",
        help="time that a quorum waits for the others (auto: as long as it keeps none from training)")
    add("--round-timeout", type=real, default=0.0, metavar="SECONDS",
        help="the same as --quorum 1 --grace SECONDS (0: as without)")
    add("--own-pace", "--dylu", action="store_true",
        help="let each worker make as many steps a round as it can, so that nobody waits")
    add("--weights", choices=["equal", "steps", "tokens"],
        help="by which a push counts (equal; with --own-pace or a quorum tokens, or steps without any)")
    add("--outer", choices=["whole", "fractional", "delayed"],
        help="outer step of a round that only a part of the workers is in (whole; with a quorum "
        "fractional)")
    add("--stale-weight", type=number(float, 0, 10), metavar="A",
        help="a push S outer steps late weighs (1 + S) to the power of -A as much (0; with a quorum 1)")
    add("--drop-stuck", type=real, default=0.0, metavar="SECONDS",
        help="give up a worker that lives but for which a round has waited so long (0: never)")
    add("--min-rate", type=real, default=protocol.LEAST_RATE / 1024, metavar="KIB",
        help="give up a worker that sends or reads less than so much a second, over a minute or twice "
        "the worker timeout (%(default)g; 0: never)")
    add("--min-workers", type=number(int, 1), default=1,
        help="rounds wait for more workers below so many (%(default)s)")
    add("--max-staleness", type=count, metavar="ROUNDS",
        help="a push so late still counts; one that is later is dropped (10; with a quorum 10 for each "
        "of the -n workers, which may each close a round)")
    add("--max-push-ratio", type=real, default=100.0, metavar="RATIO",
        help="a push counts up to so many times the median norm a step of the last rounds "
        "(%(default)s; 0: whatever its norm)")


def settle(args, parser):
    """Work out the settings that follow from others, where they are not given."""
    if args.round_timeout and (args.quorum or args.grace is not None):
        parser.error("--round-timeout is --quorum 1 with that --grace: give these or that")
    if args.grace is not None and not args.quorum:
        parser.error("--grace is the time that a --quorum waits: give that too")
    if args.round_timeout:
        args.quorum, args.grace = 1, args.round_timeout
    is_part = args.quorum > 0
    own = {
        "outer": "fractional" if is_part else "whole",
        "weights": "tokens" if is_part or args.own_pace else "equal",
        "max_staleness": 10 * (args.n if is_part else 1),
        "stale_weight": 1.0 if is_part else 0.0,
    }
    for name, value in own.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def parse_args(argv=None):
    """The command line; every option has a word on what it does."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, count, real = parser.add_argument, number(int, 0), number(float, 0)
    add("-m", "--model", required=True, metavar="DIR",
        help="the run's folder, a pretrained model (folder or file), or a new folder")
    add("-n", type=number(int, 1), default=1, help="workers that a new run starts with")
    add("--spawn", metavar="CONFIG", help="start the -n workers here too, and end with them")
    add("--host", default="", help="address to listen on (all interfaces)")
    add("--port", type=number(int, 0, 65535), default=protocol.PORT, help="(%(default)s)")
    add_guard_options(parser)
    add("--output-dir", metavar="DIR", help="where checkpoints go (-m itself, or DIR-diloco where "
        "-m holds weights that this program did not write)")
    add("--outer-lr", type=real, help="(0.7, or the resumed run's)")
    add("--outer-momentum", type=number(float, 0, 0.9999), help="(0.9, or the resumed run's)")
    add("--no-nesterov", dest="nesterov", action="store_false", default=None, help="plain momentum")
    add("--no-momentum-warmup", dest="momentum_warmup", action="store_false", default=None,
        help="full momentum from the first round on, as in the paper")
    add("--upload-codec", choices=["auto", *protocol.CODECS], default="auto",
        help="of pseudo-gradients (auto: bf16, and the log says after the first round which codecs "
        "suit the network)")
    add("--download-codec", choices=protocol.CODECS, default="bf16",
        help="of updates (%(default)s)")
    add("--no-error-feedback", dest="error_feedback", action="store_false",
        help="do not add what rounding lost to the next message (to measure what that is worth)")
    add("--max-model-gb", type=real, default=16.0, help="largest model, as float32 (%(default)s)")
    add("--save-every", type=count, default=10, metavar="ROUNDS", help="(10) 0: only where it must be")
    add("--save-total-limit", type=number(int, 1), default=3, help="checkpoints kept (%(default)s)")
    add("--shares", type=number(int, 1), help="parts that the text is cut into (n, at least 8)")
    add_round_options(parser)
    add("--until-done", action="store_true", help="end when the last worker has left")
    args = parser.parse_args(argv)
    args.advises = args.upload_codec == "auto"
    args.upload_codec = "bf16" if args.advises else args.upload_codec
    settle(args, parser)
    if args.spawn and not os.path.isfile(args.spawn):
        parser.error(f"--spawn: there is no file {args.spawn}")
    return args
# fmt: on


if __name__ == "__main__":
    args = parse_args()
    protocol.live.open()
    code = Server(args).serve()
    protocol.live.close()
    protocol.flush_output()
    os._exit(code)  # all is saved; threads that still serve peers must not meet a dying interpreter
