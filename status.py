"""What a DiLoCo run is doing: one screen, a line for each round, JSON, a page, or metrics.

    python status.py                              # --server localhost:8512
    python status.py --server host:8512 --watch   # drawn again every two seconds (--watch 10: ten)
    python status.py --follow                     # a line for each round that closes, for logs
    python status.py --web                        # a page at http://localhost:8513/, and metrics
    python status.py --json                       # for programs; with --watch one object per line
    python status.py --save                       # have a checkpoint written
    python status.py --drop WORKER                # have the run go on without a worker
    python status.py --stop                       # have the workers finish, send and leave

Exit codes: 0 all is well; 1 no server answers, or it refuses; 2 wrong usage; 3 a round has stalled;
130, 143 Ctrl-C, SIGTERM; 141 nobody reads the output. "Watching a run" in the README has more.
"""

import argparse
import contextlib
import hmac
import http.server
import ipaddress
import json
import math
import os
import re
import secrets
import signal
import socket
import socketserver
import statistics
import sys
import threading
import time
import unicodedata
import urllib.parse
from collections import Counter

import protocol
from protocol import printable, shown

ANSWER_SECONDS = 15.0  # time without a byte after which a server counts as away
LATE_SECONDS = 5.0  # time that a reader of the page waits for a look at the server
PAUSE_SECONDS = 1.0  # between two looks for readers of the page
RECENT = 120  # rounds that are kept one by one
WIDE = 100_000  # columns and lines of what has no size: a file, a pipe
BARS = "▁▂▃▄▅▆▇█"
ASCII = str.maketrans(BARS + "…", ".:-=+*#@~")  # for outputs that lack these characters
BOLD, DIM, RED, GREEN, YELLOW = 1, 2, 31, 32, 33
STYLE = re.compile(r"\x1b\[\d*m")  # shown and printable leave no other escape character in a text
ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # a screen of its own, without a cursor, where no line wraps
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"


def ask(server, request="status", access=protocol.PLAIN, fields=None):
    """The fields of the server's reply to a request. Raises OSError, protocol.Refused,
    protocol.ProtocolError."""
    conn, _ = protocol.connect(server, {}, access, stall=ANSWER_SECONDS)
    with contextlib.closing(conn):
        return conn.request(request, fields).fields


class Feed:
    """Status and history of a run for whoever looks; while the server is away, what it said last.

    error: what the newest look has met, or None; heard: time.time() of the newest answer, or None;
    looked: time.monotonic() of the newest look.
    """

    def __init__(self, server, access):
        self.server, self.access, self.status = server, access, {}
        self.history = {"session": None, "span": 1, "count": 0, "points": [], "recent": []}
        self.heard, self.looked, self.error = None, -math.inf, None
        self.lock, self.looker = threading.Lock(), threading.Thread()

    def look(self):
        """Ask the server."""
        try:
            self.history = self.longer(self.history)
            self.status = ask(self.server, access=self.access)
            self.heard, self.error = time.time(), None
        except Exception as error:  # readers see it, and the next look tries again
            self.error = error
        self.looked = time.monotonic()

    def longer(self, old):
        """The history of now. Only what is new in it is sent."""
        after = old["count"] - old["count"] % old["span"]  # the last point may be not full yet
        new = ask(self.server, "history", self.access, {"after": after, "span": old["span"]})
        is_same = all(new[name] == old[name] for name in ("session", "span"))
        if after and not (is_same and new["count"] >= old["count"]):
            return ask(self.server, "history", self.access)
        for name in ("points", "recent"):
            new[name] = [each for each in old[name] if each["n"] <= after] + new[name]
        new["recent"] = new["recent"][-RECENT:]
        return new

    def told(self, is_late=False):
        """The status, and in its `watch` how old that is and why the server does not answer, or ""."""
        late = "it takes long to answer" if is_late else ""
        error = protocol.reason_of(self.error) if self.error else late
        ago = None if self.heard is None else round(time.time() - self.heard, 1)
        watch = {"server": self.server, "heard_seconds_ago": ago, "error": error}
        return self.status | {"watch": watch}

    def looks(self, seconds):
        """This, after a look every so many seconds. Raises what the first look meets."""
        while True:
            self.look()
            if self.heard is None:
                raise self.error
            yield self
            time.sleep(seconds)

    def fresh(self):
        """What is told after a look of this moment, whoever else wants one, too."""
        with self.lock:
            if not self.looker.is_alive() and time.monotonic() > self.looked + PAUSE_SECONDS:
                self.looker = threading.Thread(target=self.look, daemon=True)
                self.looker.start()
            looker = self.looker
        looker.join(LATE_SECONDS)
        return self.told(is_late=looker.is_alive())

    def later(self, /, after="0", span="0", session="", **_):
        """The history, for who has that of a session up to a round: what comes after it."""
        self.fresh()
        known, after = self.history, int(after)
        is_known = session in ("", known["session"]) and int(span) == known["span"]
        after = after if is_known and after <= known["count"] else 0
        new = {name: [p for p in known[name] if p["n"] > after] for name in ("points", "recent")}
        return known | new | {"after": after}


# --- Texts ------------------------------------------------------------------------------------


def styled(style, text):
    """A text in a colour or weight of the terminal (0: as it is)."""
    return f"\x1b[{style}m{text}\x1b[m" if style else text


def columns(text):
    """How many columns of a terminal a text takes."""
    seen = [c for c in STYLE.sub("", text) if unicodedata.category(c)[0] != "M"]
    return len(seen) + sum(unicodedata.east_asian_width(c) in "WF" for c in seen)


def cut(text, width):
    """A text, or as much of it as so many columns hold."""
    if columns(text) <= width:
        return text
    kept, used = "", 1
    for piece in re.findall(rf"{STYLE.pattern}|.", text):
        used += columns(piece)
        if used > width:
            break
        kept += piece
    return kept + ("…\x1b[m" if "\x1b" in kept else "…")


def clock(seconds, form="%H:%M:%S"):
    """A time in unix seconds as clocks here show it."""
    return time.strftime(form, time.localtime(max(0, min(seconds, 250e9))))  # to the year 9892


def duration(seconds):
    """Seconds as 4s, 3m 20s, 2h 05m or 3d 02h."""
    for size, part, units in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            return f"{whole}{units[0]} {rest // part:02d}{units[1]}"
    return f"{int(seconds)}s"


def figure(value, digits=4):
    """A number as people read it, or a dash for none."""
    if value is None:
        return "-"
    is_usual = value == 0 or 1e-4 <= abs(value) < 1e5
    return f"{value:.{digits}f}" if is_usual else f"{value:.2g}"


def percent(share):
    """A share as percents, or a dash for none."""
    return "-" if share is None else f"{100 * share:.0f}%"


def listed(names, most=1000):
    """Names of workers in one line, or how many there are if they are more than `most`."""
    return ", ".join(map(shown, names)) if len(names) <= most else f"{len(names)} workers"


def paired(pairs, form):
    """Names of workers in one line, each with what belongs to it."""
    return ", ".join(form.format(shown(worker), value) for worker, value in pairs)


def sparkline(values, width, low=None, high=None):
    """Numbers as at most `width` blocks, each for the mean of its part of them (None: none is known,
    and the one before stays). low, high: values of the lowest and the highest block. By default the
    largest few reach beyond the highest, so that they do not flatten the others."""
    means = []
    for k in range(count := min(width, len(values))):
        part = values[k * len(values) // count : (k + 1) * len(values) // count]
        part = [value for value in part if value is not None and abs(value) < protocol.MAX_ABS]
        means += [sum(part) / len(part)] if part else means[-1:]
    ordered = sorted(means) or [0.0]
    low = ordered[0] if low is None else low
    high = ordered[-1 - (len(ordered) - 1) // 20] if high is None else high
    scale = 7 / (high - low) if high > low else 0
    return "".join(BARS[max(0, min(7, round((mean - low) * scale)))] for mean in means)


def table(rows, width):
    """Rows of texts between tabs as lines with aligned columns, without the last columns where `width`
    is short. Numbers stand at the right: all columns but the first two and the last."""
    rows = [[cut(cell, max(20, width // 5)) for cell in row.split("\t")] for row in rows]
    sizes = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    most = len(sizes)
    while sum(sizes) + 2 * len(sizes) > width:
        sizes.pop()
    lines = [""] * len(rows)
    for k, size in enumerate(sizes):
        for n, row in enumerate(rows):
            room = " " * (size - columns(row[k]))
            lines[n] += f"  {room}{row[k]}" if 1 < k < most - 1 else f"  {row[k]}{room}"
    return [styled(DIM, lines[0]), *lines[1:]]


def titled(title, lines):
    """Lines beside a title, if there are any."""
    titles = [styled(BOLD, f"{title:11}"), *[" " * 11] * len(lines)]
    return [title + line for title, line in zip(titles, lines, strict=False)]


def stacked(parts, height):
    """The lines of parts (lines, share), one part below the other. Where they are more than so many,
    the part that is longest for its share loses its last line, until they fit. One with a large share
    ends with the number of lines that it has lost."""
    whole = [len(lines) for lines, _ in parts]
    while sum(len(lines) for lines, _ in parts) > height:
        max(parts, key=lambda part: len(part[0]) / part[1])[0].pop()
    for (lines, share), count in zip(parts, whole, strict=True):
        if share > 2 and 1 < len(lines) < count:
            lines[-1] = styled(DIM, f"  and {count - len(lines) + 1} more")
    return [line for lines, _ in parts for line in lines]


# --- What a status says, for the screen and for the page ----------------------------------------


def warnings_in(status):
    """Texts about what is not as it should be, the gravest first."""
    watch, texts = status.get("watch"), []
    if watch and watch["error"]:
        ago, why = watch["heard_seconds_ago"], printable(watch["error"])
        since = "" if ago is None else f" since {clock(time.time() - ago, '%H:%M:%S %Z')}"
        texts.append(f"{watch['server']} has not answered{since}: {why}")
    if "state" not in status:
        return texts
    for stall in status["stalls"]:
        whom = listed(stall["missing"]) or f"more workers (--min-workers {status['min_workers']})"
        waited = duration(stall["seconds"])
        texts.append(f"the round of slice {stall['slice']} has waited {waited} for {whom}")
    if status["save_error"]:
        texts.append(printable(status["save_error"]))
    if status["forced_rounds"]:
        texts.append(f"{status['forced_rounds']} rounds were closed because all waited")
    reasons = status["last_round"]["reasons"] if status["last_round"] else {}
    return texts + [f"{shown(worker)}: {shown(why)}" for worker, why in reasons.items()]


def sync_in(status):
    """Texts about what a sync costs, if that is known, and what would hide it, if it is much."""
    sync = status.get("sync")  # an older server does not say it
    if not sync:
        return []
    cost = f"{sync['seconds']:.2f} s a round, {percent(sync['share'])}"
    advice = [printable(sync["advice"])] if sync["advice"] else []
    return [f"a sync keeps training waiting for {cost}", *advice]


def waits_in(status):
    """Texts about what a run waits for, if it waits."""
    expected, joining, awaited = status["expected"], status["joining"], status["awaited"]
    is_new = status["state"] == "waiting for workers" and not expected
    is_short = status["state"] == "too few workers"
    there, least = listed(joining) or "none", status["min_workers"]
    told = {
        f"the run goes on as soon as these are back or given up: {listed(expected)}": expected,
        f"the run starts with {status['workers_wanted']} workers; there: {there}": is_new,
        f"about to join: {there}": joining and not is_new,
        f"rounds wait until there are {least} workers (--min-workers)": is_short,
        f"the round waits for: {listed(awaited)}": awaited,
    }
    return [text for text, is_so in told.items() if is_so] + [
        f"{shown(who)} waits {percent(share)} of its time for {shown(slowest)}; --own-pace would end that"
        for who, share, slowest in status["waiting_costs"]
    ]


def troubles_in(status):
    """Texts about who has left and what has gone wrong, the newest first."""
    gone = [
        f"{shown(one['id'])} left {duration(one['seconds_ago'])} ago: {printable(one['why'])}"
        for one in status["gone"]
    ]
    return [*map(printable, status["faults"][::-1]), *gone]


WORKER = "worker\tstate\tsteps/s\ttrains\tloss\tlate\tstep\ta round\theard\thost"


def row_of(worker):
    """What the table of workers says of one, between tabs, in the order of WORKER."""
    state = worker["state"]
    if state == "away":
        state = f"away for {duration(worker['heard_seconds_ago'])}"
    elif state == "waiting" and worker["waits_for"]:
        state = f"waits for {listed(worker['waits_for'], 1)}"
    ranks = f", {worker['ranks']} ranks" if worker["ranks"] > 1 else ""
    return (
        f"{shown(worker['id'])}\t{state}\t{figure(worker['steps_per_second'], 2)}\t"
        f"{percent(worker['training'])}\t{figure(worker['loss'])}\t{worker['lag'] or '-'}\t"
        f"{worker['step']:,}\t{worker['pace']} steps\t{duration(worker['heard_seconds_ago'])} ago\t"
        f"{shown(worker['host'])}{ranks}"
    )


def end_of(status):
    """When the run will end, in words."""
    pace, left = f"{figure(status['rate'], 2)} steps/s", status["max_steps"] - status["step"]
    if status["ends_in_seconds"] is None:
        return f"not known yet; {pace}"
    lasts, end = duration(status["ends_in_seconds"]), status["time"] + status["ends_in_seconds"]
    at = clock(end, "on %a %d %b at %H:%M").removeprefix(clock(status["time"], "on %a %d %b "))
    return f"ends in about {lasts}, {at}; {left:,} steps to go, {pace}"


ROUND = "round\tat\tloss\tseconds\twaited\tfolded\tMB up\tMB down\tstep\tglobal\tslice\tshare"


def row_of_round(line, form="%H:%M:%S"):
    """What the table of rounds and the log say of one, between tabs, in the order of ROUND."""
    seconds = (line[kind] for kind in ("seconds", "seconds_waiting", "seconds_folding"))
    sizes = (line[kind] / 1e6 for kind in ("bytes_up", "bytes_down"))
    numbers = "\t".join(figure(number, 2) for number in (*seconds, *sizes))
    return (
        f"{line['round']}\t{clock(line['time'], form)}\t{figure(line['loss'])}\t{numbers}\t"
        f"{line['step']:,}\t{figure(line['evaluation'])}\t{line['fragment']}\t{percent(line['share'])}"
    )


def events_in(line):
    """What happened in a round beside its arithmetic, in words."""
    late = [(worker, push["late"]) for worker, push in line["pushed"].items() if push["late"]]
    texts = {
        "late": paired(late, "{} by {}"),
        "refused": paired(line["reasons"].items(), "{} ({!r})"),
        "joined": listed(line["joined"]),
        "left": paired(line["left"], "{} ({!r})"),
    }
    return "; ".join(f"{name}: {text}" for name, text in texts.items() if text)


# --- The screen -------------------------------------------------------------------------------


def curve(name, newest, past, note, width, **scale):
    """A line with a number, its past and a note."""
    room = max(8, min(RECENT, width - 62))
    return f"{name:12} {newest:>8}  {sparkline(past, room, **scale)}  {note}"


def learning_in(status, points, width):
    """The lines about the losses: the newest ones, and the past of the whole run."""

    def line(name, key, newest, note=""):
        past = [point[key] for point in points]
        first = next((loss for loss in past if loss is not None), newest)
        text = curve(name, figure(newest), past, f"from {figure(first)}{note}", width)
        return [] if first is None else [text]

    tested = status["evaluation"] or {"loss": None, "step": 0}
    lines = line("loss", "loss", status["loss"])
    lines += line("global model", "evaluation", tested["loss"], f"; step {tested['step']:,}")
    return titled("Learning", lines or ["no loss is known yet"])


def workers_in(status, width, height):
    """The lines about the workers; of many, those that are away and those that others wait for come
    first."""
    workers, awaited = status["workers"], status["awaited"]
    styles = dict.fromkeys(awaited, YELLOW) | {
        w["id"]: RED for w in workers if w["state"] == "away"
    }
    if len(workers) > height // 3:
        workers = sorted(workers, key=lambda w: [RED, YELLOW, None].index(styles.get(w["id"])))
    states = Counter(worker["state"] for worker in workers).most_common()
    summary = ", ".join(f"{count} {state}" for state, count in states) or "no workers"
    names, *lines = table([WORKER, *map(row_of, workers)], width)
    lines = [styled(styles.get(w["id"]), line) for w, line in zip(workers, lines, strict=True)]
    return [*titled("Workers", [f"{len(workers)}: {summary}"]), names, *lines]


def rounds_in(status, recent, width):
    """The lines about what a sync costs: the last rounds together, and the newest one by one."""
    if not recent:
        return titled("Rounds", ["no round has closed yet"])
    kinds = ("seconds", "seconds_waiting", "seconds_folding")
    usual, waiting, folding = (statistics.median(line[kind] for line in recent) for kind in kinds)
    past, note = (
        [line["seconds"] for line in recent],
        f"{waiting:.2f} waiting, {folding:.2f} folding",
    )
    text = curve("seconds", figure(usual, 2), past, note, width, low=0, high=2 * usual)
    rows = table([ROUND, *map(row_of_round, recent[:-13:-1])], width)
    return [*titled("Rounds", [text, *sync_in(status)]), *rows]


def pushes_in(last):
    """Texts about the weights and the norms of the last round's pushes."""
    texts = []
    if last and (last["share"] < 1 or last["quorum"] is not None):
        weights = paired(last["weights"].items(), "{} {:.4g}") or "none"
        needed = "" if last["quorum"] is None else f" of {last['quorum']} pushes that counted"
        texts.append(
            f"it was {percent(last['share'])} of an outer step{needed}, after a grace of "
            f"{last['grace']:.2f} s; weights: {weights}"
        )
    norms = paired(last["norms"].items(), "{} {:.3g}") if last else ""
    return texts + [f"norms of its pushes: {norms}"] * bool(norms)


def about(status):
    """The lines about the run so far, its slices, its model and its settings."""
    total, outer, fragments = status["totals"], status["settings"], status["fragments"]
    slices = ", ".join(f"{one['version']} ({one['pushes']} pushes)" for one in fragments)
    warmup = " (warmed up)" if outer["momentum_warmup"] else ""
    past = [
        "faults: {faults}, refused: {refused}, joined: {joins}, left: {departures}".format(**total),
        "{rounds:,} rounds, {steps:,} steps, {tokens:,} tokens; ".format(**total)
        + f"up {total['bytes_up'] / 1e9:.2f} GB, down {total['bytes_down'] / 1e9:.2f} GB",
        f"fragments, by their versions: {slices or 'none yet'}",
    ]
    if status["strangers"] > 1:  # one is who asks
        past.append(f"connections that belong to no member: {status['strangers']}")
    model = [
        f"{status['parameters']:,} parameters, data: {printable(status['source'] or 'none yet')}",
        f"lr {outer['outer_lr']:g}, momentum {outer['outer_momentum']:g}{warmup}, up "
        f"{status['upload_codec']}, down {status['download_codec']}",
        f"output {printable(status['output'])}",
    ]
    return titled("So far", past) + titled("Model", model)


def render(status, history, width=WIDE, height=WIDE):
    """The screen as styled lines, in the order in which people ask: is it running, is it learning,
    who holds it up, what does a sync cost, when will it end."""
    total = f" of {status['max_steps']:,}" if status["max_steps"] else ""
    state = styled(GREEN if status["state"] == "running" else YELLOW, status["state"])
    head = (
        f"DiLoCo {status['mode']}, {state}: round {status['round']}, step {status['step']:,}{total}, "
        f"up {duration(status['uptime_seconds'])}  {styled(DIM, clock(status['time']))}"
    )
    recent = history["recent"]
    events = [f"round {line['round']}: {text}" for line in recent if (text := events_in(line))]
    blank = [""], 0.2  # all of them go at once
    parts = [
        ([head], 99),
        ([styled(RED, f"WARNING: {text}") for text in warnings_in(status)], 1),
        (waits_in(status), 1),
        blank,
        (learning_in(status, history["points"], width), 1),
        blank,
        (workers_in(status, width, height), 5),
        (titled("Lately", troubles_in(status)[:4] + events[:-5:-1]), 1),
        blank,
        (rounds_in(status, recent, width), 1.5),
        (titled("Last round", pushes_in(status["last_round"])), 0.5),
        blank,
        (titled("End", [end_of(status)]), 99),
        (about(status), 0.5),
    ]
    return stacked(parts, height)


# --- Ways to look -----------------------------------------------------------------------------


def has_cursor():
    """Whether stdout is a terminal whose cursor can be moved."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def drawn(feed, is_whole=False):
    """The lines of the screen as stdout can show them. is_whole: no more than the terminal has."""
    width = height = WIDE
    if sys.stdout.isatty():
        size = os.get_terminal_size(sys.stdout.fileno())
        width = (size.columns or 80) - 1  # terminals differ in what happens behind the last column
        height = (size.lines or 24) if is_whole else WIDE
    lines = [cut(line.rstrip(), width) for line in render(feed.told(), feed.history, width, height)]
    try:
        BARS.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        lines = [line.translate(ASCII) for line in lines]
    has_colours = has_cursor() and not os.environ.get("NO_COLOR")
    return lines if has_colours else [STYLE.sub("", line) for line in lines]


def say(text):
    """Print a text. The program ends where nobody reads it, or nothing takes it."""
    try:
        print(text, flush=True)
    except OSError as error:
        protocol.flush_output()
        is_left = isinstance(error, BrokenPipeError)
        sys.exit(141 if is_left else f"status.py: the output cannot be written: {error}")


def put(text):
    """Write a text to the terminal at once, also in the handler of a signal."""
    data = text.encode(sys.stdout.encoding, "backslashreplace")
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


def watch(feed, seconds):
    """Draw what each look finds on a terminal in place of what the one before found. In whatever way
    this ends, the terminal is as it was."""

    def draw(*_):
        # A new size is drawn behind the picture of the old one, and not amid it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
        if feed.status:
            lines = [f"{line}\x1b[K" for line in drawn(feed, is_whole=True)]
            put("\x1b[H" + "\r\n".join(lines) + "\x1b[J")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGWINCH})

    def pause(*_):  # Ctrl-Z
        put(LEAVE)
        os.kill(os.getpid(), signal.SIGSTOP)
        put(ENTER)
        draw()

    signal.signal(signal.SIGWINCH, draw)
    signal.signal(signal.SIGTSTP, pause)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        put(ENTER)
        for _ in feed.looks(seconds):
            draw()
    finally:
        with contextlib.suppress(OSError):  # the terminal has gone
            put(LEAVE)


def follow(looks, as_json):
    """Print a line for each round: first for those that the server still has, then as they close."""
    session, last, at, error = None, 0, 0.0, None
    for feed in looks:
        if (feed.error is None) != (error is None):
            texts = warnings_in(feed.told()) if feed.error else ["the server answers again"]
            print(texts[0], file=sys.stderr, flush=True)
        error, is_same = feed.error, feed.history["session"] == session
        session = feed.history["session"]
        for line in feed.history["recent"]:
            # After a restart the count may be lower than it was, but what is new is later.
            if (line["n"] > last) if is_same else (line["time"] > at):
                if is_same and line["n"] > last + 1:
                    missed = f"{line['n'] - last - 1} rounds before this one were missed"
                    print(missed, file=sys.stderr, flush=True)
                names, cells = ROUND.split("\t"), row_of_round(line, "%F %T").split("\t")
                texts = [f"{name} {cell}" for name, cell in zip(names, cells, strict=True)]
                texts += [events_in(line)] if events_in(line) else []
                say(json.dumps(line) if as_json else ", ".join(texts))
                last, at = line["n"], line["time"]


def look(feed, args):
    """Show what the options ask for; return the exit code."""
    seconds = args.watch or 2.0
    if args.watch and has_cursor() and not args.json and not args.follow:
        watch(feed, seconds)
    if args.follow:
        follow(feed.looks(seconds), args.json)
    for _ in feed.looks(seconds):
        if not args.json:
            say("\n".join(drawn(feed)) + "\n" * bool(args.watch))
        elif not feed.error:
            say(json.dumps({**feed.status, "history": feed.history}))
        if not args.watch:
            return 3 if feed.status["stalls"] else 0


# --- The page ---------------------------------------------------------------------------------
#
# `--web` serves one page, the JSON behind it, and metrics for Prometheus to any number of readers; one
# Feed asks the server for all of them. Other sites must not get at it through a reader's browser: `Host`
# and `Origin` are checked. What workers have said enters the page as text only.

MAX_READERS = 256  # connections at once; one more ends the oldest
MAX_BODY_BYTES = 1 << 12
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'nonce-NONCE'; style-src 'nonce-NONCE'; "
    "connect-src 'self'; img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# The metrics: name, field of the status (or of a worker in it), and meaning.
METRICS = """\
up up Whether the server answers.
running running Whether the run goes on, with enough workers.
uptime_seconds uptime_seconds Time since the server was started.
round round Newest round.
step step Steps that the run has come to.
max_steps max_steps Steps after which the run ends.
steps_per_second rate Steps of the run in a second, waiting included.
ends_in_seconds ends_in_seconds Estimated time until the end.
loss loss Mean of the workers' newest training losses.
evaluation_loss evaluation.loss Newest evaluation loss of the global model.
members members Workers that take part.
stall_seconds stalled Longest that a round has waited, where that is unusually long.
save_failing save_error Whether the last checkpoint could not be written.
rounds_total totals.rounds Rounds that have closed.
steps_total totals.steps Steps of all workers that were counted.
tokens_total totals.tokens Tokens in these steps.
received_bytes_total totals.bytes_up Bytes of pushes.
sent_bytes_total totals.bytes_down Bytes of updates.
waiting_seconds_total totals.seconds_waiting Time in which rounds waited for pushes.
folding_seconds_total totals.seconds_folding Time in which pushes were folded into the model.
refused_pushes_total totals.refused Pushes that were refused.
faults_total totals.faults Failures that the server has survived.
joins_total totals.joins Times that a worker has joined.
departures_total totals.departures Times that a worker has left or was given up.
worker_up up Whether the worker was heard of lately.
worker_step step Steps of the run that the worker has come to.
worker_steps_per_second steps_per_second Steps of the worker in a second.
worker_loss loss Newest training loss.
worker_training_ratio training Share of its time that the worker trains.
worker_lag_versions lag Versions of the model that the worker is behind.
worker_silence_seconds heard_seconds_ago Time since the worker was heard of.
"""


def metrics(status):
    """What Prometheus reads of what a Feed tells: of a server that does not answer, only that."""
    run, workers = {"up": not status["watch"]["error"]}, []
    if run["up"]:
        run |= status | {
            "running": status["state"] == "running",
            "members": len(status["workers"]),
            "stalled": max((stall["seconds"] for stall in status["stalls"]), default=0),
            "save_error": bool(status["save_error"]),
        }
        workers = [worker | {"up": worker["state"] != "away"} for worker in status["workers"]]
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    lines = []
    for name, path, meaning in (line.split(maxsplit=2) for line in METRICS.splitlines()):
        lines.append(f"# HELP diloco_{name} {meaning}")
        lines.append(f"# TYPE diloco_{name} {'counter' if name.endswith('_total') else 'gauge'}")
        is_own = name.startswith("worker_")
        for value in workers if is_own else [run]:
            label = f'{{worker="{value["id"].translate(escapes)}"}}' if is_own else ""
            for key in path.split("."):
                value = (value or {}).get(key)
            if value is not None:
                lines.append(f"diloco_{name}{label} {value + 0}")  # True is 1
    return "\n".join(lines) + "\n"


def page_status(told):
    """What the page reads: what a Feed tells, and in `watch` what that says in words."""
    watch = told["watch"] | {"warnings": warnings_in(told)}
    if "state" in told:
        watch |= {"waits": waits_in(told) + sync_in(told), "end": end_of(told)}
        watch["troubles"] = troubles_in(told)
        watch["workers"] = [WORKER, *map(row_of, told["workers"])]
    return told | {"watch": watch}


class Site(socketserver.ThreadingTCPServer):
    """Serves readers at (host, port). At a loopback address they need no token."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = MAX_READERS

    def __init__(self, address, feed):
        self.address_family, *_, found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        token = feed.access.token.encode(errors="surrogateescape")
        self.is_open = ipaddress.ip_address(found[0].partition("%")[0]).is_loopback
        if not self.is_open and not token:
            raise ValueError(
                f"whoever reaches {address[0]} could stop the run: --web needs its token there "
                "(--token-file); at a loopback address, which ssh -L leads to, it needs none"
            )
        self.feed, self.token, self.readers = feed, token, {}
        self.names = {"localhost", socket.gethostname().lower(), address[0].lower()}
        super().__init__(found, Reader)
        host, port = self.server_address[:2]
        self.cookie = f"diloco-{port}={secrets.token_urlsafe(32)}"  # of all who know the token
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def is_named(self, host):
        """Whether a Host header names this machine: a name of another site may lead here, too."""
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name in self.names or bool(re.fullmatch(r"[\d.]+|.*:.*", name))

    def verify_request(self, request, address):
        """Let a reader in. Where there are many, the one that has been here longest leaves."""
        self.readers[request] = True
        if len(self.readers) > MAX_READERS:
            with contextlib.suppress(OSError):  # it has left meanwhile
                next(iter([*self.readers])).shutdown(socket.SHUT_RDWR)
        return True

    def shutdown_request(self, request):
        self.readers.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, address):
        """Say nothing of readers that hang up."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, address)


class Reader(http.server.BaseHTTPRequestHandler):
    """One connection of a reader: a request and its reply."""

    timeout, server_version, sys_version = 30.0, "DiLoCo", ""

    def do_GET(self):
        """Answer a request of either method."""
        try:
            self.answer(200, self.reply())
        except protocol.Refused as refusal:  # by this page with a code of HTTP, or by the server
            code = refusal.code if isinstance(refusal.code, int) else 409
            self.answer(code, {"error": str(refusal)})
        except OSError as error:
            self.answer(502, {"error": str(error)})
        except (ValueError, protocol.ProtocolError) as error:
            self.answer(400, {"error": str(error)})

    do_POST = do_GET

    def log_message(self, *_):
        """Say nothing: a page asks twice a second."""

    def reply(self):
        """The page, the metrics, or fields. Raises Refused with a code of HTTP, ValueError,
        ProtocolError, OSError."""
        feed, (path, _, query) = self.server.feed, self.path.partition("?")
        reads = {
            "/": lambda: PAGE,
            "/status.json": lambda: page_status(feed.fresh()),
            "/rounds.json": lambda: feed.later(**dict(urllib.parse.parse_qsl(query))),
            "/metrics": lambda: metrics(feed.fresh()),
        }
        method = "GET" if path in reads else "POST"
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin", "")
        is_own = origin in (f"http://{host}", f"https://{host}")
        length = int(self.headers.get("Content-Length", -1))
        require(path in [*reads, "/login", "/do"], 404, "there is nothing here")
        require(self.command == method, 405, f"this path has the method {method}")
        require(self.server.is_named(host), 403, f"{shown(host)} is another site: --web HOST:PORT")
        require(path in reads or is_own, 403, "this was not sent by the page")
        require(path == "/" or self.is_known(), 401, "this is not the token of the run")
        if path in reads:
            return reads[path]()
        require(0 <= length <= MAX_BODY_BYTES, 413, f"a body has at most {MAX_BODY_BYTES} bytes")
        body = protocol.parse_json(self.rfile.read(length), "the body")
        if path == "/login":  # which brings a cookie
            return {}
        action = body.get("action")
        require(action in ("save", "stop", "drop"), 400, "the action is save, stop or drop")
        fields = {"worker": body.get("worker")} if action == "drop" else {}
        return ask(feed.server, action, feed.access, fields)

    def is_known(self):
        """Whether the reader may look at the run and change it: by the token, or by the cookie."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        has_token = hmac.compare_digest(token.encode("latin-1"), self.server.token)
        cookies = map(str.strip, self.headers.get("Cookie", "").split(";"))
        has_cookie = any(protocol.is_same(cookie, self.server.cookie) for cookie in cookies)
        if self.server.is_open or (kind == "Bearer" and has_token) or has_cookie:
            return True
        if token:
            time.sleep(protocol.WRONG_TOKEN_SECONDS)
        return False

    def answer(self, code, content):
        """Send a page or metrics as text, or fields as JSON."""
        nonce, kind = secrets.token_urlsafe(16), "application/json"
        if content is PAGE:
            kind, content = "text/html; charset=utf-8", content.replace("NONCE", nonce)
        elif isinstance(content, str):
            kind = "text/plain; version=0.0.4; charset=utf-8"
        else:
            content = json.dumps(content)
        self.send_response(code)
        for name, value in ({"Content-Type": kind} | HEADERS).items():
            self.send_header(name, value.replace("NONCE", nonce))
        if code == 200 and self.path == "/login":
            cookie = f"{self.server.cookie}; HttpOnly; SameSite=Strict; Path=/"
            self.send_header("Set-Cookie", cookie)
        self.end_headers()
        self.wfile.write(content.encode(errors="backslashreplace"))


def require(is_so, code, why):
    """Refuse a request with a code of HTTP, unless it is as it should be."""
    if not is_so:
        raise protocol.Refused(code, why)


def web_address(text):
    """(host, port) of a text [HOST:]PORT."""
    host, _, port = text.rpartition(":")
    if not (port.isdecimal() and int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"[HOST:]PORT, with a port below 65536, not {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>DiLoCo</title>
<link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --page: light-dark(#fbfaf8, #15171a); --ink: light-dark(#1d1f21, #e6e4df);
  --soft: light-dark(#666b71, #9aa0a6); --line: light-dark(#e6e3dd, #2b2f35); --quiet: light-dark(#b4b1aa, #565c64);
  --bad: light-dark(#b3261e, #ff8a7a); --wait: light-dark(#d3cfc6, #41464d); --c0: light-dark(#0072b2, #57a8e0);
  --c1: light-dark(#c65a00, #ef8b3e); --c2: light-dark(#00815f, #35b58c); --c3: light-dark(#b0578f, #de8fc0);
  --c4: light-dark(#3a9bd0, #a5d8f3); --c5: light-dark(#9c7400, #d9b544); --c6: light-dark(#6b4fb3, #a893ea);
  --c7: light-dark(#7a7a7a, #a0a0a0) }
* { box-sizing: border-box; margin: 0 } [hidden] { display: none !important }
body { font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
  max-width: 1160px; margin: auto; padding: 24px 18px 64px; background: var(--page); color: var(--ink) }
h1, h2 { font-size: 20px; font-weight: 600 } h2 { font-size: 16px } section { margin-top: 40px }
h1::before { content: "●"; color: var(--c2); margin-right: 10px } h1.bad::before, .bad { color: var(--bad) }
.row, .legend { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center }
.row { justify-content: space-between }
.soft, .legend, dt, th, small { color: var(--soft); font-size: 13px; font-weight: 400 }
dl, .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 40px }
dl { grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); gap: 14px 24px; margin: 20px 0 14px }
dd { font-size: 22px; line-height: 1.3 } progress { width: 100%; accent-color: var(--c0) }
ul { list-style: none; padding: 0 } li { padding: 3px 0 }
#warnings li { padding: 8px 12px; margin-top: 8px; border-left: 3px solid var(--bad); background: var(--line) }
button, input, select { font: inherit; color: inherit; background: none; border: 1px solid var(--quiet);
  border-radius: 6px; min-height: 30px; padding: 0 10px }
button:hover { background: var(--line) }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px }
figure { position: relative; margin-top: 10px } figure > svg { display: block; width: 100%; touch-action: pan-y }
svg * { pointer-events: none } svg text { fill: var(--soft); font-size: 11px }
i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle }
.tip { position: absolute; top: 30px; padding: 6px 10px; font-size: 13px; border: 1px solid var(--quiet);
  border-radius: 6px; background: var(--page); pointer-events: none; max-width: 240px }
table { width: 100%; border-collapse: collapse; margin-top: 12px; font-size: 14px }
th, td { text-align: right; max-width: 30ch; padding: 5px 0 5px 10px; border-bottom: 1px solid var(--line) }
:is(th, td):nth-child(-n+2) { text-align: left; padding-left: 0 }
@media (max-width: 760px) { :is(th, td):nth-child(n+6):not(:last-child) { display: none } table { font-size: 12px }
  td { max-width: 13ch } td:nth-child(-n+2) { min-width: 7ch } }
</style>
<header class="row"><h1 id="state">DiLoCo</h1>
  <span><button id="save">Save</button> <button id="stop">Stop</button></span></header>
<form id="login" class="row" hidden>
  <label>token of the run <input id="token" type="password" autocomplete="current-password"></label>
  <button>Log in</button></form>
<ul id="warnings" role="status"></ul>
<dl id="figures"></dl><progress id="progress" aria-label="share of the steps" hidden></progress>
<p class="soft" id="end"></p>
<section><div class="row"><h2>Is it learning?</h2><select id="over" aria-label="over steps or over time">
  <option value="step">over steps</option><option value="time">over time</option></select></div>
  <figure id="loss"></figure></section>
<section><h2>Who holds it up?</h2><ul class="soft" id="waits"></ul><figure id="timeline"></figure></section>
<section><h2>What does a sync cost?</h2>
  <div class="pair"><figure id="seconds"></figure><figure id="bytes"></figure></div></section>
<section><h2>Who takes part?</h2><figure id="members"></figure><table id="workers"></table></section>
<section><h2>What went wrong?</h2><ul id="troubles"></ul></section>
<script nonce="NONCE">
"use strict";
const $ = id => document.getElementById(id);
const digits = n => n == null ? "-" : n && !(Math.abs(n) >= 1e-4 && Math.abs(n) < 1e6)
  ? (+n.toPrecision(3)).toExponential() : n.toLocaleString("en", {maximumSignificantDigits: 4});
const short = n => n.toLocaleString("en", {maximumSignificantDigits: 6, notation: "compact"});
const whole = n => n.toLocaleString("en");
const clock = (s, hasDay) => new Date(s * 1000).toLocaleString("en-GB", hasDay
  ? {day: "numeric", month: "short", hour: "2-digit", minute: "2-digit"} : {timeStyle: "medium"});
const own = (values, id) => Object.hasOwn(values, id) ? values[id] : null;  // an id may be "constructor"
const key = color => make("i", {ariaHidden: true, style: `background: ${color}`});
function make(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}
function shape(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  node.textContent = text;
  return node;
}
function write(node, text) { if (node.textContent !== text) node.textContent = text; }
function list(id, texts) {
  if (JSON.stringify(texts) === $(id).dataset.texts) return;
  $(id).dataset.texts = JSON.stringify(texts);
  $(id).replaceChildren(...texts.map(textContent => make("li", {textContent})));
}

// --- Charts with a legend, and with values under the pointer or by the arrow keys ---

function ticks(low, high, most) {  // numbers between low and high that people like
  const rough = (high - low || 1) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(step => step >= rough), first = Math.ceil(low / step);
  const count = Math.min(99, Math.floor(high / step) - first + 1);
  return Array.from({length: Math.max(0, count)}, (_, k) => (first + k) * step);
}

// What a chart shows: {about, points, x: {title, of: point -> x, isTime}, y: title, low, marks}. A mark is a line:
// {name, color, width, of: point -> y or null, isQuiet: one of many}. With {names} it shows a row for each name
// instead, where every point has a bar, which the marks divide by their values: of: (point, row) -> y or null.
class Chart {
  constructor(id, height) {
    Object.assign(this, {box: $(id), height, at: null, row: 0});
    this.svg = shape("svg", {tabindex: 0, role: "img"});
    this.rule = shape("path", {stroke: "var(--soft)"});
    this.legend = make("div", {className: "legend"});
    this.tip = make("div", {className: "tip", role: "status", hidden: true});
    this.box.append(this.legend, this.svg, this.tip);
    this.svg.onpointerleave = this.svg.onblur = () => this.tell(null, 0);
    this.svg.onpointermove = event => {
      const away = this.what.points.map(point => Math.abs(this.sx(this.what.x.of(point)) - event.offsetX));
      this.tell(away.indexOf(Math.min(...away)), Math.floor((event.offsetY - 20) / 18));
    };
    this.svg.onkeydown = event => {
      const [right, down] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
        Home: [-Infinity, 0], End: [Infinity, 0], Escape: [NaN, 0]}[event.key] ?? [];
      if (right === undefined) return;
      event.preventDefault();
      const last = this.what.points.length - 1;
      this.tell(Math.max(0, Math.min(last, (this.at ?? last) + right)), this.row + down);
    };
  }
  range() {  // [lowest, highest] value; the first fall may leave the plot, so that it does not hide the rest
    const {points, marks, low, names} = this.what;
    if (names) return [names.length - 0.5, -0.5];
    const first = points.length > 30 ? Math.floor(points.length / 12) : 0;
    const known = from => marks.flatMap(mark => points.slice(from).map(mark.of)).filter(y => y != null);
    const values = [known(first), known(0), [0]].find(values => values.length);  // a run may report no loss
    const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const least = low ?? values.reduce((a, b) => Math.min(a, b), most);
    return [least, most > least ? most : least + (Math.abs(least) || 1)];
  }
  show(what) {
    this.what = what;
    const {about, points, x, y, names, marks} = what, nodes = [];
    if ((this.box.hidden = !points.length) || this.box.clientWidth < 200) return;
    const left = names ? Math.min(110, this.box.clientWidth / 4) : 48, right = this.box.clientWidth - 12;
    const top = 20, bottom = this.bottom = names ? top + 18 * names.length : this.height - 20;
    const x0 = x.of(points[0]) - (names ? 1 : 0), x1 = x.of(points.at(-1)), [low, high] = this.range();
    const sx = this.sx = v => left + (v - x0) / (x1 - x0 || 1) * (right - left);
    const sy = v => top + (high - v) / (high - low) * (bottom - top);
    const text = (x, y, anchor, words) => nodes.push(shape("text", {x, y, "text-anchor": anchor}, words));
    const cut = name => name.length > left / 7 ? name.slice(0, left / 7 - 1) + "…" : name;
    const rows = names?.map((name, row) => [row, cut(name)]);
    for (const [v, words] of rows ?? ticks(low, high, 5).map(v => [v, digits(v)])) {
      nodes.push(shape("path", {d: `M${left} ${sy(v)}H${right}`, stroke: "var(--line)"}));
      text(left - 8, sy(v) + 4, "end", words);
    }
    const most = Math.ceil((right - left) / 100), apart = (x1 - x0) / most;
    for (const v of x.isTime ? Array.from({length: most}, (_, k) => x0 + (k + 0.5) * apart) : ticks(x0, x1, most))
      text(sx(v), bottom + 16, "middle", x.isTime ? clock(v, x1 - x0 > 86400) : short(v));
    text(0, 10, "start", y);
    text(right, 10, "end", x.title);
    const size = {x: left - 2, y: top - 2, width: right - left + 4, height: bottom - top + 4};
    const plot = shape("svg", {...size, viewBox: Object.values(size)});  // a line that leaves it is cut
    (names ? this.bars(sx, sy) : this.lines(sx, sy)).forEach((d, k) => plot.append(shape("path", {
      d, fill: "none", stroke: marks[k].color, "stroke-width": names ? 12 : marks[k].width})));
    this.svg.setAttribute("height", bottom + 22);
    this.svg.setAttribute("aria-label", `${about}. The arrow keys read values.`);
    this.svg.replaceChildren(...nodes, plot, this.rule);
    this.legend.replaceChildren(...marks.filter(({isQuiet}, k) => !isQuiet || k === 0).map(
      ({name, color, isQuiet}) => make("span", {}, key(color), isQuiet ? "each worker" : name)));
    this.tell(this.at, this.row);
  }
  lines(sx, sy) {  // the path of each mark
    const {points, x, marks} = this.what;
    return marks.map(({of}) => {
      const known = points.filter(point => of(point) != null);
      const places = known.map(point => `${sx(x.of(point)).toFixed(1)} ${sy(of(point)).toFixed(1)}`);
      return places.length ? `M${places.join("L")}h.1` : "";
    });
  }
  bars(sx, sy) {
    const {points, x, names, marks} = this.what, paths = marks.map(() => "");
    for (const point of points) for (const row of names.keys()) {
      const parts = marks.map(mark => mark.of(point, row) ?? 0), all = parts.reduce((a, b) => a + b);
      parts.reduce((from, part, k) => {
        if (part) paths[k] += `M${sx(from).toFixed(1)} ${sy(row)}H${sx(from + part / all).toFixed(1)}`;
        return from + (part / all || 0);
      }, x.of(point) - 1);
    }
    return paths;
  }
  tell(at, row) {  // Show the values at a point, and in a row; of no point: none.
    const {points, x, names, marks} = this.what, point = points[at];
    this.at = point ? at : null;
    this.row = row = Math.max(0, Math.min((names?.length ?? 1) - 1, row || 0));
    this.rule.setAttribute("visibility", point ? "visible" : "hidden");
    if (this.tip.hidden = !point) return;
    const px = this.sx(x.of(point)), from = names ? 20 + 18 * row : 20;
    this.rule.setAttribute("d", `M${px} ${from}V${names ? from + 18 : this.bottom}`);
    const title = x.isTime ? clock(x.of(point)) : `${x.title} ${whole(x.of(point))}`;
    const known = marks.filter(mark => mark.of(point, row) != null)
      .sort((a, b) => b.of(point, row) - a.of(point, row))
      .filter((mark, k, all) => !mark.isQuiet || k === 0 || k === all.length - 1);
    this.tip.replaceChildren(make("div", {}, names ? `${names[row]}, ${title}` : title), ...known.map(mark =>
      make("div", {}, key(mark.color), `${mark.name} ${digits(mark.of(point, row))}`)));
    const width = this.tip.offsetWidth, room = this.box.clientWidth - width;
    this.tip.style.left = `${Math.max(0, Math.min(room, px < room / 2 ? px + 14 : px - width - 14))}px`;
  }
}

// --- The run ---

const charts = {loss: new Chart("loss", 300), timeline: new Chart("timeline"), seconds: new Chart("seconds", 200),
  bytes: new Chart("bytes", 200), members: new Chart("members", 120)};
let run = {}, rounds = {points: [], recent: [], count: 0, span: 0, session: ""}, lost = null;

function showRounds() {
  const points = rounds.points, every = points.flatMap(p => Object.keys(p.losses));
  const ids = [...new Set(every.reverse())].slice(0, 64).sort();  // the newest ones, if they are many
  const step = {title: "step", of: p => p.step}, time = {title: "time", of: p => p.time, isTime: true};
  const round = {title: "round", of: p => p.n}, over = $("over").value === "step" ? step : time;
  const line = (name, color, of, width = 1.5) => ({name, color, of, width});
  const quiet = {color: "var(--quiet)", width: 0.7, isQuiet: true};
  const losses = ids.map((id, k) => line(id, `var(--c${k})`, p => own(p.losses, id)));
  if (ids.length > 8) losses.forEach(mark => Object.assign(mark, quiet));
  charts.loss.show({about: "Loss of each worker and of the global model", points, x: over, y: "loss",
    marks: [...losses, line("global model, evaluated", "var(--ink)", p => p.evaluation, 2.5)]});
  const sizes = new Map(points.map((p, k) => [p, p.n - (points[k - 1]?.n ?? 0)]));
  const per = (name, unit = 1) => p => p[name] / unit / sizes.get(p);
  charts.seconds.show({about: "Seconds per round", points, x: round, y: "seconds per round", low: 0,
    marks: [line("whole round", "var(--ink)", per("seconds")), line("folding", "var(--c0)", per("seconds_folding")),
      line("waiting for pushes", "var(--c1)", per("seconds_waiting"))]});
  charts.bytes.show({about: "Bytes per round", points, x: round, y: "MB per round", low: 0,
    marks: [line("up", "var(--c0)", per("bytes_up", 1e6), 4), line("down", "var(--c1)", per("bytes_down", 1e6))]});
  charts.members.show({about: "Members over time", points, x: time, y: "members", low: 0,
    marks: [line("members", "var(--c2)", p => p.members)]});
  const shown = rounds.recent.slice(-Math.max(6, Math.floor(document.body.clientWidth / 32)));
  const names = [...new Set(shown.flatMap(round => Object.keys(round.pushed)))].sort();
  const part = field => (round, row) => own(round.pushed, names[row])?.[field];
  charts.timeline.show({about: "What each worker did in the last rounds", points: shown, x: round, y: "seconds",
    names, marks: [line("trains", "var(--c0)", part("trained")),
      line("sends and receives", "var(--c1)", part("transferred")), line("waits", "var(--wait)", part("waited"))]});
}

function showWorkers(rows) {
  const table = $("workers");
  while (table.rows.length > rows.length) table.deleteRow(-1);
  rows.forEach((texts, k) => {
    const {id, state} = run.workers[k - 1] ?? {};
    if (!table.rows[k]) {
      const cells = texts.map(() => make(k ? "td" : "th"));
      table.append(make("tr", {}, ...cells, make("td", {}, ...k ? [make("button", {}, "Drop")] : [])));
    }
    texts.forEach((text, column) => write(table.rows[k].cells[column], text));
    table.rows[k].className = state === "away" ? "bad" : "";
    const drop = table.rows[k].lastChild.firstChild;
    if (drop) Object.assign(drop, {ariaLabel: `Drop ${id}`, onclick: () => act("drop", id)});
  });
}

function showStatus() {
  const {step, max_steps, evaluation, loss, watch} = run;
  list("warnings", [...lost ? [lost] : [], ...watch?.warnings ?? []]);
  if (!run.state) return;
  const isHeard = !lost && !watch.error, isGood = isHeard && run.state === "running";
  $("state").className = isGood ? "" : "bad";
  write($("state"), `DiLoCo is ${isHeard ? run.state : "not heard"}`);
  document.title = `${isGood ? "" : "! "}${whole(step)} · DiLoCo`;
  const figures = [["step", whole(step), max_steps ? `of ${whole(max_steps)}` : ""],
    ["round", whole(run.round), run.mode],
    evaluation ? ["loss", digits(evaluation.loss), `global, step ${whole(evaluation.step)}`]
      : ["loss", digits(loss), "mean of the workers"],
    ["steps/s", digits(run.rate), "of the run"], ["members", whole(run.workers.length), ""]];
  $("figures").replaceChildren(...figures.map(([name, value, note]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value), make("small", {}, note))));
  $("progress").hidden = !max_steps;
  Object.assign($("progress"), {max: max_steps || 1, value: step});
  write($("end"), watch.end);
  list("waits", watch.waits);
  list("troubles", watch.troubles.length ? watch.troubles : ["Nothing so far."]);
  showWorkers(watch.workers.map(row => row.split("\t")));
}

function show(said, more) {
  for (const name of ["points", "recent"]) more[name].unshift(...rounds[name].filter(p => p.n <= more.after));
  more.recent = more.recent.slice(-120);
  [run, rounds] = [said, more];
  showStatus();
  showRounds();
}

// --- Asking ---

async function ask(path, body, headers = {}) {
  const post = body && {method: "POST", headers, body: JSON.stringify(body)};
  const reply = await fetch(path, {...post, signal: AbortSignal.timeout(20000)}), said = await reply.json();
  if (reply.status === 401) $("login").hidden = false;
  if (!reply.ok) throw Error(said.error);
  return said;
}

const QUESTIONS = {save: () => "Save a checkpoint? The server writes the global model to its disk. Training goes on.",
  stop: () => "Stop the run? Every worker sends its last steps, takes the final model and leaves. The run ends.",
  drop: id => `Drop ${id}? The run waits for it no more. If it is alive, it is told to finish and leaves.`};
function act(action, worker) {
  if (confirm(QUESTIONS[action](worker))) ask("do", {action, worker}).catch(error => alert(error.message));
}
for (const action of ["save", "stop"]) $(action).onclick = () => act(action);
$("over").onchange = () => showRounds();
$("login").onsubmit = event => {
  event.preventDefault();
  const proof = {Authorization: `Bearer ${$("token").value}`};
  ask("login", {}, proof).then(() => $("login").hidden = true, error => alert(error.message));
};

async function poll() {
  try {
    if (!document.hidden) {
      const {count, span, session} = rounds, after = span && count - count % span;
      const said = await ask("status.json");
      const more = await ask(`rounds.json?after=${after}&span=${span}&session=${session}`);
      lost = null;
      show(said, more);
    }
  } catch (error) {
    const since = $("login").hidden ? `status.py has not answered since ${clock(Date.now() / 1000)}: ` : "";
    lost ??= since + error.message;
    showStatus();
  }
  setTimeout(poll, 1000);
}
poll();
</script>
</html>
"""


def main(argv=None):
    """Do what the options say; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", help=f"host:port (DILOCO_SERVER or localhost:{protocol.PORT})")
    parser.add_argument("--watch", nargs="?", type=float, const=2.0, metavar="SECONDS",
                        help="again every two or so many seconds")  # fmt: skip
    parser.add_argument("--follow", action="store_true", help="a line for each round that closes")
    parser.add_argument("--json", action="store_true", help="all that the server says, as JSON")
    parser.add_argument("--save", action="store_true", help="have the server write a checkpoint")
    parser.add_argument("--drop", metavar="WORKER", help="have the run go on without this worker")
    parser.add_argument("--stop", action="store_true", help="have the workers finish and leave")
    parser.add_argument("--web", nargs="?", type=web_address, const="8513", metavar="[HOST:]PORT",
                        help="serve a page and metrics (8513, for this machine alone)")  # fmt: skip
    protocol.Access.add_options(parser)
    args = parser.parse_args(argv)
    if args.watch is not None and not 0 < args.watch <= 86400:
        parser.error("--watch takes seconds: more than 0, and at most a day's")
    orders = [o for o in ("save", "drop", "stop") if getattr(args, o) not in (None, False)]
    if orders and args.web:
        parser.error(f"--web serves until it is ended: --{orders[0]} goes by itself")
    sys.stdout.reconfigure(errors="backslashreplace")
    server = args.server or os.environ.get("DILOCO_SERVER") or f"localhost:{protocol.PORT}"
    try:
        access = protocol.Access.of_options(args)
        site = Site(args.web, Feed(server, access)) if args.web else None
    except (OSError, ValueError) as error:
        print(f"status.py: {error}", file=sys.stderr)
        return 2
    try:
        if site:
            print(f"the page: {site.url}", flush=True)
            site.serve_forever()
        for order in orders:
            ask(server, order, access, {"worker": args.drop} if order == "drop" else None)
            print(f"{server}: {order} is under way")
        return 0 if orders else look(Feed(server, access), args)
    except protocol.Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1
    except (OSError, ValueError, protocol.ProtocolError) as error:
        print(f"no DiLoCo server answers at {server}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
