"""What a DiLoCo run is doing: one screen, a line for each round, or JSON.

    python status.py                              # --server localhost:8512
    python status.py --server host:8512 --watch   # drawn again every two seconds (--watch 10: ten)
    python status.py --follow                     # a line for each round that closes, for logs
    python status.py --web                        # a page at http://localhost:8513/, and metrics
    python status.py --json                       # for programs; with --watch one object per line
    python status.py --save                       # have a checkpoint written
    python status.py --drop WORKER                # have the run go on without a worker
    python status.py --stop                       # have the workers finish, send and leave

Exit codes: 0 all is well; 1 no server answers, or it refuses, and one line says why; 2 wrong usage;
3 the server answers, but a round has stalled (one look, with or without --json); 130 and 143 after
Ctrl-C and SIGTERM; 141 nobody reads the output any more. --watch and --follow go on while a server
that has answered once is away.
"""

import argparse
import contextlib
import hmac
import http.client
import http.server
import io
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


def merged(old, new, count):
    """Points or rounds by their number, up to `count`. Of two with one number the new one counts."""
    by_number = {each["n"]: each for each in old + new}
    return [by_number[n] for n in sorted(by_number) if n <= count]


class Feed:
    """The status and the history of a run, asked for again and again."""

    def __init__(self, server, access):
        self.server, self.access = server, access
        self.history = {"session": None, "span": 1, "points": [], "recent": []}

    def look(self):
        """(status, history) of now. Of the history only what is new is sent."""
        old = self.history
        points = [
            point for point in old["points"] if point["n"] % old["span"] == 0
        ]  # the full ones
        known = {"after": points[-1]["n"] if points else 0, "span": old["span"]}
        new = ask(self.server, "history", self.access, known)
        if points and new["session"] != old["session"]:  # another process may count otherwise
            new = ask(self.server, "history", self.access)
        else:
            points = points if new["span"] == old["span"] else []
            new["points"] = merged(points, new["points"], new["count"])
            new["recent"] = merged(old["recent"], new["recent"], new["count"])[-RECENT:]
        self.history = new
        return ask(self.server, access=self.access), new

    def looks(self, seconds):
        """(status, history, "") every so many seconds. While the server is away, the newest that are
        known come with a text on that. Raises what the first look raises, and Refused."""
        (status, history), trouble, since = self.look(), "", None
        while True:
            yield status, history, trouble
            time.sleep(seconds)
            try:
                (status, history), trouble, since = self.look(), "", None
            except (OSError, protocol.ProtocolError) as error:
                since = since or time.time()
                lasts = duration(time.time() - since)
                trouble = f"no answer since {clock(since)}, for {lasts}: {printable(error)}"


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
    minutes, hours, days = (int(seconds) // size for size in (60, 3600, 86400))
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {int(seconds) % 60:02d}s" if minutes else f"{int(seconds)}s"


def figure(value, digits=4):
    """A number as people read it, or a dash for none."""
    if value is None:
        return "-"
    is_usual = value == 0 or 1e-4 <= abs(value) < 1e5
    return f"{value:.{digits}f}" if is_usual else f"{value:.2g}"


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
    is short. The first row has the names: below one that begins with a space stand numbers."""
    is_number = [name[0] == " " for name in rows[0].split("\t")]
    rows = [row.split("\t") for row in [rows[0].replace("\t ", "\t").strip(), *rows[1:]]]
    sizes = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    while sum(sizes) + 2 * len(sizes) > width:
        sizes.pop()
    lines = [""] * len(rows)
    for k, size in enumerate(sizes):
        for n, row in enumerate(rows):
            room = " " * (size - columns(row[k]))
            lines[n] += "  " + (room + row[k] if is_number[k] else row[k] + room)
    return [styled(DIM, lines[0]), *lines[1:]]


def titled(title, lines):
    """Lines beside a title."""
    return [styled(BOLD, f"{title:11}") + lines[0], *(" " * 11 + line for line in lines[1:])]


def stacked(parts, height):
    """Parts of a screen as its lines: all of them, or as many as fit, with more of the workers first.
    parts: (lines, how many of them stay in any case, what those are that do not)."""
    if sum(len(lines) for lines, _, _ in parts) <= height:
        return [line for lines, _, _ in parts for line in lines]
    parts = [([line for line in lines if line], least, what) for lines, least, what in parts]
    sizes = [min(len(lines), least) for lines, least, _ in parts]
    for k in sorted(range(len(parts)), key=lambda k: parts[k][2] != "workers"):
        sizes[k] += max(0, min(len(parts[k][0]) - sizes[k], height - sum(sizes)))
    kept = []
    for (lines, _, what), size in zip(parts, sizes, strict=True):
        is_told = what and size < len(lines)
        rest = [f"  and {len(lines) - size + 1} more {what}"] if is_told else []
        kept += lines[: size - len(rest)] + rest
    return kept[:height]


# --- The screen -------------------------------------------------------------------------------


def warnings_in(status):
    """The lines about what is not as it should be, the gravest first."""
    texts = []
    for stall in status["stalls"]:
        whom = listed(stall["missing"]) or f"more workers (--min-workers {status['min_workers']})"
        waited = duration(stall["seconds"])
        texts.append(f"the round of slice {stall['slice']} has waited {waited} for {whom}")
    if status["save_error"]:
        texts.append(printable(status["save_error"]))
    if status["forced_rounds"]:
        texts.append(f"{status['forced_rounds']} rounds were closed because all waited")
    if last := status["last_round"]:
        texts += [f"{shown(worker)}: {shown(why)}" for worker, why in last["reasons"].items()]
    texts += map(printable, status["faults"][:-4:-1])
    return [styled(RED, f"WARNING: {text}") for text in texts]


def waits_in(status):
    """The lines about what a run waits for, if it waits."""
    lines, there = [], listed(status["joining"]) or "none"
    if status["expected"]:
        whom = listed(status["expected"])
        lines = [
            f"the run goes on with {whom}, as soon as they are back or given up; there: {there}"
        ]
    elif status["state"] == "waiting for workers":
        lines = [f"the run starts with {status['workers_wanted']} workers; there: {there}"]
    elif status["joining"]:
        lines = [f"about to join: {there}"]
    if status["state"] == "too few workers":
        lines.append(f"rounds wait until there are {status['min_workers']} workers (--min-workers)")
    if status["awaited"]:
        lines.append(f"the round waits for: {listed(status['awaited'])}")
    for waiting, share, slowest in status["waiting_costs"]:
        share = f"{100 * share:.0f}%"
        text = f"waits {share} of its time for {shown(slowest)}; --own-pace would end that"
        lines.append(f"{shown(waiting)} {text}")
    return lines


def curve(name, newest, past, note, width, **scale):
    """A line with a number, its past and a note."""
    room = max(8, min(RECENT, width - 62))
    return f"{name:12} {newest:>8}  {sparkline(past, room, **scale)}  {note}"


def learning_in(status, points, width):
    """The lines about the losses: the newest ones, and the past of the whole run."""
    lines, evaluation = [], status["evaluation"] or {"loss": None, "step": 0}
    for name, key, newest, note in (
        ("loss", "loss", status["loss"], ""),
        ("global model", "evaluation", evaluation["loss"], f"; step {evaluation['step']:,}"),
    ):
        past = [point[key] for point in points]
        first = next((loss for loss in past if loss is not None), newest)
        if first is not None:
            note = f"from {figure(first)}{note}"
            lines.append(curve(name, figure(newest), past, note, width))
    return titled("Learning", lines or ["no loss is known yet"])


def workers_in(status, width, height):
    """The lines about the workers; of many, those that are away and those that others wait for come
    first."""
    workers, awaited, most = status["workers"], status["awaited"], max(16, width // 5)
    if not workers:
        return titled("Workers", ["no workers"])
    rows = ["# ,worker,state, steps/s, trains, loss, late, step, a round, waits, heard,host"]
    rows = [rows[0].replace(",", "\t")]
    if len(workers) > height // 3:
        workers = sorted(workers, key=lambda w: (w["state"] != "away", w["id"] not in awaited))
    for w in workers:
        state, style = w["state"], YELLOW if w["id"] in awaited else 0
        if state == "away":
            state, style = f"away for {duration(w['heard_seconds_ago'])}", RED
        elif state == "waiting" and w["waits_for"]:
            state = f"waits for {listed(w['waits_for'], 1)}"
        trains = "-" if w["training"] is None else f"{100 * w['training']:.0f}%"
        ranks = f", {w['ranks']} ranks" if w["ranks"] > 1 else ""
        rows.append(
            f"{w['index']}\t{cut(shown(w['id']), most)}\t{styled(style, cut(state, most + 4))}\t"
            f"{figure(w['steps_per_second'], 2)}\t{trains}\t{figure(w['loss'])}\t{w['lag'] or '-'}\t"
            f"{w['step']}\t{w['pace']} steps\t{100 * w['waiting']:.0f}%\t"
            f"{w['heard_seconds_ago']:.0f}s ago\t{shown(w['host'])}{ranks}"
        )
    states = Counter(worker["state"] for worker in workers).most_common()
    summary = ", ".join(f"{count} {state}" for state, count in states)
    return [*titled("Workers", [f"{len(workers)}: {summary}"]), *table(rows, width)]


def events_in(line):
    """What happened in a round beside its arithmetic, in words."""
    late = [(worker, push["late"]) for worker, push in line["pushed"].items() if push["late"]]
    refused = [(worker, printable(why)) for worker, why in line["reasons"].items()]
    left = [(worker, printable(why)) for worker, why in line["left"]]
    texts = {
        "late": paired(late, "{} by {}"),
        "refused": paired(refused, "{} ({})"),
        "joined": listed(line["joined"]),
        "left": paired(left, "{} ({})"),
    }
    return "; ".join(f"{name}: {text}" for name, text in texts.items() if text)


def rounds_in(recent, width, most, slices):
    """The lines about what a sync costs: the last rounds together, and the newest one by one."""
    if not recent:
        return titled("Rounds", ["no round has closed yet"])
    kinds = ("seconds", "seconds_waiting", "seconds_folding")
    spent = {kind: [line[kind] for line in recent] for kind in kinds}
    usual, waiting, folding = (statistics.median(spent[kind]) for kind in kinds)
    place = "slice, " if slices > 1 else ""
    names = f"at, round, {place}loss, seconds, waited, folded, MB up, MB down, step, share"
    rows, newest = [names.replace(",", "\t")], recent[: -most - 1 : -1]
    for line in newest:
        seconds = "\t".join(figure(line[kind], 2) for kind in kinds)
        sizes = "\t".join(figure(line[kind] / 1e6, 2) for kind in ("bytes_up", "bytes_down"))
        place = f"{line['fragment']}\t" if slices > 1 else ""
        rows.append(
            f"{clock(line['time'])}\t{line['round']}\t{place}{figure(line['loss'])}\t{seconds}\t"
            f"{sizes}\t{line['step']}\t{100 * line['share']:.0f}%"
        )
    events = ["", *map(events_in, newest)]
    room = width - 12 * any(events)
    lines = [f"{row}  {text}" for row, text in zip(table(rows, room), events, strict=True)]
    note = f"{figure(waiting, 2)} waiting, {figure(folding, 2)} folding"
    text = curve("seconds", figure(usual, 2), spent["seconds"], note, width, low=0, high=2 * usual)
    return [*titled("Rounds", [text]), *lines]


def last_round_in(last):
    """The lines about the weights and norms of the last round."""
    lines = []
    if last["share"] < 1 or last["quorum"] is not None:
        counted = "" if last["quorum"] is None else f" of {last['quorum']} pushes that counted"
        lines.append(
            f"it was {100 * last['share']:.0f}% of an outer step{counted}, after a grace of "
            f"{last['grace']:.2f} s; weights: {paired(last['weights'].items(), '{} {:.4g}') or 'none'}"
        )
    if last["norms"]:
        lines.append(f"norms of its pushes: {paired(last['norms'].items(), '{} {:.3g}')}")
    return titled("Last round", lines) if lines else []


def end_of(status):
    """When the run will end, in words."""
    pace, left = f"{figure(status['rate'], 2)} steps/s", status["max_steps"] - status["step"]
    if status["ends_in_seconds"] is None:
        return f"not known yet; {pace}"
    end = status["time"] + status["ends_in_seconds"]
    is_today = clock(end, "%F") == clock(status["time"], "%F")
    at = clock(end, "at %H:%M" if is_today else "on %a %d %b at %H:%M")
    return (
        f"ends in about {duration(status['ends_in_seconds'])}, {at}; {left:,} steps to go, {pace}"
    )


def about(status):
    """The lines about the run so far, its slices, its model and its settings."""
    total, outer, fragments = status["totals"], status["settings"], status["fragments"]
    past = [
        f"faults: {total['faults']}, refused: {total['refused']}, joined: {total['joins']}, left: "
        f"{total['departures']}",
        f"{total['rounds']:,} rounds, {total['steps']:,} steps, {total['tokens']:,} tokens; up "
        f"{total['bytes_up'] / 1e9:.2f} GB, down {total['bytes_down'] / 1e9:.2f} GB",
    ]
    if len(fragments) > 1:
        members, versions = len(status["workers"]), " ".join(str(f["version"]) for f in fragments)
        flying = [
            f"{k} ({f['pushes']} of {members})" for k, f in enumerate(fragments) if f["pushes"]
        ]
        past.append(f"fragments: versions {versions}; in flight: {', '.join(flying) or 'none'}")
    warmup = " (warmed up)" if outer["momentum_warmup"] else ""
    model = [
        f"{status['parameters']:,} parameters, data: {printable(status['source'] or 'none yet')}",
        f"lr {outer['outer_lr']:g}, momentum {outer['outer_momentum']:g}{warmup}, up "
        f"{status['upload_codec']}, down {status['download_codec']}",
        f"output {printable(status['output'])}",
    ]
    if status["strangers"] > 1:  # one is who asks
        model.append(f"connections that belong to no member: {status['strangers']}")
    return titled("So far", past) + titled("Model", model)


def render(status, history, width=WIDE, height=WIDE, trouble=""):
    """The screen as styled lines, in the order in which people ask: is it running, is it learning,
    who holds it up, what does a sync cost, when will it end. trouble: why it is an old one."""
    total = f" of {status['max_steps']:,}" if status["max_steps"] else ""
    state = styled(GREEN if status["state"] == "running" else YELLOW, status["state"])
    head = (
        f"DiLoCo {status['mode']}, {state}: round {status['round']}, step {status['step']:,}{total}, "
        f"up {duration(status['uptime_seconds'])}  {styled(DIM, clock(status['time']))}"
    )
    gone = [
        f"{shown(one['id'])} {duration(one['seconds_ago'])} ago ({printable(one['why'])})"
        for one in status["gone"][:5]
    ]
    gone += [f"and {len(status['gone']) - 5} more"] if len(status["gone"]) > 5 else []
    parts = [
        ([head, *([styled(RED, trouble)] if trouble else [])], 2, ""),
        (warnings_in(status), 3, "warnings"),
        (waits_in(status), 2, "that wait"),
        (["", *learning_in(status, history["points"], width)], 2, ""),
        (["", *workers_in(status, width, height)], 4, "workers"),
        (titled("Gone", [", ".join(gone)]) if gone else [], 1, ""),
        (last_round_in(status["last_round"]) if status["last_round"] else [], 0, ""),
        (["", *titled("End", [end_of(status)])], 1, ""),
        (about(status), 1, ""),
    ]
    most = max(3, min(12, height - 3 - sum(len(lines) for lines, _, _ in parts)))
    rounds = rounds_in(history["recent"], width, most, len(status["fragments"]))
    parts.insert(6, (["", *rounds], 5, ""))
    return stacked(parts, height)


# --- Ways to look -----------------------------------------------------------------------------


def has_cursor():
    """Whether stdout is a terminal whose cursor can be moved."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def drawn(status, history, trouble="", is_whole=False):
    """The screen as stdout can show it. is_whole: no higher than the terminal."""
    width, height, encoding = WIDE, WIDE, sys.stdout.encoding or "utf-8"
    if sys.stdout.isatty():
        size = os.get_terminal_size(sys.stdout.fileno())
        width = (size.columns or 80) - 1  # terminals differ in what happens behind the last column
        height = (size.lines or 24) if is_whole else WIDE
    text = "\n".join(render(status, history, width, height, trouble))
    if os.environ.get("NO_COLOR") or not has_cursor():
        text = STYLE.sub("", text)
    is_poor = "?" in BARS.encode(encoding, "replace").decode(encoding)
    text = text.translate(ASCII) if is_poor else text
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    lines = [cut(line.rstrip(), width) for line in text.split("\n")]
    return [line.translate(ASCII) for line in lines] if is_poor else lines


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
    data = text.encode(sys.stdout.encoding)
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


def watch(looks):
    """Draw what each look finds on a terminal in place of what the one before found. In whatever way
    this ends, the terminal is as it was."""
    newest = None

    def draw(*_):
        if newest:
            lines = [f"{line}\x1b[K" for line in drawn(*newest, is_whole=True)]
            put("\x1b[H" + "\r\n".join(lines) + "\x1b[J")

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
        for newest in looks:  # noqa: B007 (draw uses it)
            draw()
    finally:
        with contextlib.suppress(OSError):  # the terminal has gone
            put(LEAVE)


def round_line(line):
    """A round in one line of a log."""
    seconds = [line[kind] for kind in ("seconds", "seconds_waiting", "seconds_folding")]
    texts = [
        f"{clock(line['time'], '%F %T')} round {line['round']}, slice {line['fragment']}, step "
        f"{line['step']}",
        f"loss {figure(line['loss'])}, global model {figure(line['evaluation'])}",
        "{:.2f} s, waited {:.2f} s, folded {:.2f} s".format(*seconds),
        f"up {line['bytes_up'] / 1e6:.2f} MB, down {line['bytes_down'] / 1e6:.2f} MB",
        events_in(line),
    ]
    return " | ".join(filter(None, texts))


def follow(looks, as_json):
    """Print a line for each round: first for those that the server still has, then as they close."""
    session, last, at, was_away = None, 0, 0.0, False
    for _, history, trouble in looks:
        if bool(trouble) != was_away:
            print(trouble or "the server answers again", file=sys.stderr, flush=True)
            was_away = bool(trouble)
        is_same, session = history["session"] == session, history["session"]
        for line in history["recent"]:
            n, closed = line["n"], line["time"]
            # After a restart the count may be lower than it was, but what is new is later.
            if not ((is_same and n > last) or (closed, n) > (at, last)):
                continue
            if n > last + 1:
                missed = f"{n - last - 1} rounds before this one are not known any more"
                print(missed, file=sys.stderr, flush=True)
            say(json.dumps(line) if as_json else round_line(line))
            last, at = n, closed


def look(feed, args):
    """Show what the options ask for; return the exit code."""
    looks = feed.looks(args.watch or 2.0)
    if args.follow:
        follow(looks, args.json)
    elif args.watch and has_cursor() and not args.json:
        watch(looks)
    for status, history, trouble in looks:
        if not args.json:
            say("\n".join(drawn(status, history, trouble)) + "\n" * bool(args.watch))
        elif not trouble:
            say(json.dumps({**status, "history": history}))
        if not args.watch:
            return 3 if status["stalls"] else 0


# --- The page ---
#
# `--web` serves one page, the JSON behind it, and metrics for Prometheus to any number of readers. A
# `Cache` asks the server for all of them, so that they cost the run next to nothing. Other sites must not
# get at it through a reader's browser: `Host` and `Origin` are checked. What workers have said enters the
# page as text only. The page's structure, style and script are the text PAGE.

CACHE_SECONDS = 1.0  # pause between two looks at the server
LATE_SECONDS = 5.0  # age of a status from which on the server counts as away
READER_SECONDS = 30.0  # time that a connection has for its request and the reply
MAX_READERS, MAX_PER_ADDRESS = 256, 128  # connections at once: in all, and of one address
MAX_HEAD_BYTES, MAX_BODY_BYTES = 1 << 14, 1 << 12  # length of a request's head, of its body
MAX_SESSIONS = 64  # readers who have logged in; one more ends the oldest session
WRONG_TOKEN_SECONDS = 1.0  # time that a wrong token takes
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
worker_waiting_ratio waiting Share of its time that the worker waits for rounds.
worker_lag_versions lag Versions of the model that the worker is behind.
worker_silence_seconds heard_seconds_ago Time since the worker was heard of.
"""


def metrics(status):
    """What Prometheus reads of a status with `watch`, as of Cache.watched: of a server that does not
    answer, only that."""
    run, workers = {"up": not status["watch"]["error"]}, []
    if run["up"]:
        run |= status | {
            "running": status["state"] == "running",
            "members": len(status["workers"]),
            "stalled": max((stall["seconds"] for stall in status["stalls"]), default=0),
            "save_error": bool(status["save_error"]),
        }
        workers = [worker | {"up": worker["state"] != "away"} for worker in status["workers"]]
    lines = []
    for name, path, meaning in (line.split(maxsplit=2) for line in METRICS.splitlines()):
        lines.append(f"# HELP diloco_{name} {meaning}")
        lines.append(f"# TYPE diloco_{name} {'counter' if name.endswith('_total') else 'gauge'}")
        for value in workers if name.startswith("worker_") else [run]:
            id = value.get("id", "").replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
            for key in path.split("."):
                value = (value or {}).get(key)
            if value is not None:
                label = f'{{worker="{id}"}}' if name.startswith("worker_") else ""
                lines.append(f"diloco_{name}{label} {value + 0}")  # True is 1
    return "\n".join(lines) + "\n"


class Cache:
    """Status and history of a run for any number of readers. While they read, it looks at the server
    once a second; while the server is away, they get what it said last."""

    def __init__(self, server, access):
        self.feed, self.error = Feed(server, access), ""  # why the server does not answer
        self.status, self.history = {}, self.feed.history
        self.heard = None  # time.monotonic() when the status came
        self.wanted, self.news = threading.Event(), threading.Condition()
        self.looked = -math.inf  # time of the last look, in vain or not
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        """Look at the server when readers want news, for ever."""
        while self.wanted.wait():
            self.wanted.clear()
            try:
                self.status, self.history = self.feed.look()
                self.heard, self.error = time.monotonic(), ""
            except Exception as error:  # readers see it, and the next look tries again
                self.error = str(error) or protocol.reason_of(error)
            with self.news:
                self.looked = time.monotonic()
                self.news.notify_all()
            time.sleep(CACHE_SECONDS)

    def fresh(self):
        """This, once the server was looked at within a moment, or after a while."""
        since = time.monotonic() - 2 * CACHE_SECONDS
        self.wanted.set()
        with self.news:
            self.news.wait_for(lambda: self.looked > since, timeout=2.0)
        return self

    def watched(self):
        """The status, and beside it how old that is, and why the server does not answer, or ""."""
        ago = None if self.heard is None else round(time.monotonic() - self.heard, 1)
        error = self.error or (
            "" if self.heard and ago < LATE_SECONDS else "it takes long to answer"
        )
        watch = {"server": self.feed.server, "heard_seconds_ago": ago, "error": error}
        return self.status | {"watch": watch}

    def rounds(self, /, after=0, span=0, **_):
        """The history, or what comes after a round in it: see the server's request `history`."""
        known = self.history
        is_more = int(span) == known["span"] and int(after) <= known.get("count", 0)
        after = int(after) if is_more else 0
        new = {name: [p for p in known[name] if p["n"] > after] for name in ("points", "recent")}
        return known | new


class Site(socketserver.ThreadingTCPServer):
    """Lets readers in, at (host, port). At a loopback address they need no token."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = MAX_READERS

    def __init__(self, address, cache):
        family, *_, found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        is_loopback = ipaddress.ip_address(found[0].partition("%")[0]).is_loopback
        self.token = (
            b"" if is_loopback else cache.feed.access.token.encode(errors="surrogateescape")
        )
        if not is_loopback and not self.token:
            raise ValueError(
                f"whoever reaches {address[0]} could stop the run: --web needs its token there "
                "(--token-file); at a loopback address, which ssh -L leads to, it needs none"
            )
        name = socket.gethostname().lower()
        self.names = {"localhost", name, name.partition(".")[0] + ".local", address[0].lower()}
        self.cache, self.sessions, self.lock = cache, {}, threading.Lock()
        self.open = {}  # socket of a reader -> (its address, time when it came)
        self.address_family = family
        super().__init__(found, Reader)

    def serve(self):
        """Serve readers until the process ends."""
        host, port = self.server_address[:2]
        token = (
            "; it asks for the token, and without TLS the network can read along"
            if self.token
            else ""
        )
        print(f"the page: http://{f'[{host}]' if ':' in host else host}:{port}/{token}", flush=True)
        self.serve_forever()

    def is_named(self, host):
        """Whether a Host header names this machine: a name of another site may lead here, too."""
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name in self.names or bool(re.fullmatch(r"[\d.]+|.*:.*", name))

    def verify_request(self, request, address):
        """Whether a connection is served: neither all of them nor those of one address are many."""
        with self.lock:
            same = sum(address[0] == other for other, _ in self.open.values())
            is_served = len(self.open) < MAX_READERS and same < MAX_PER_ADDRESS
            if is_served:
                self.open[request] = address[0], time.monotonic()
        return is_served

    def service_actions(self):
        """Called twice a second: end connections that take too long, by bytes that trickle in."""
        with self.lock:
            late = [
                s
                for s, (_, since) in self.open.items()
                if time.monotonic() - since > READER_SECONDS
            ]
        for request in late:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request):
        with self.lock:
            self.open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, address):
        """Say nothing of readers that hang up or that send nonsense."""
        if not isinstance(sys.exception(), OSError | http.client.HTTPException):
            super().handle_error(request, address)


class Head(io.BufferedReader):
    """What a reader sends. The lines before the body have a limit together."""

    left = MAX_HEAD_BYTES

    def readline(self, size=-1):
        line = super().readline(size)
        self.left -= len(line)
        if self.left < 0:
            raise http.client.LineTooLong("the head of the request")
        return line


class Reader(http.server.BaseHTTPRequestHandler):
    """One connection of a reader: a request and its reply."""

    timeout, server_version, sys_version = READER_SECONDS, "DiLoCo", ""
    cookie = ""  # session that the reply hands out

    def setup(self):
        super().setup()
        self.rfile = Head(self.connection.makefile("rb", buffering=0))

    def do_GET(self):
        """Answer a request, whatever its method."""
        try:
            self.answer(200, self.reply())
        except protocol.Refused as refusal:
            self.answer(refusal.code, {"error": str(refusal)})
        except (ValueError, protocol.ProtocolError) as error:
            self.answer(400, {"error": str(error)})

    do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = do_GET

    def send_error(self, code, message=None, explain=None):
        """Answer what is no request, or has a method that HTTP does not know."""
        self.answer(405 if code == 501 else code, {"error": message or "this is no request"})

    def log_message(self, *_):
        """Say nothing: a page asks twice a second."""

    def reply(self):
        """The page, the metrics, or fields. Raises Refused with a code of HTTP, ValueError,
        ProtocolError."""
        cache, (path, _, query) = self.server.cache, self.path.partition("?")
        reads = {
            "/": lambda: PAGE,
            "/status.json": lambda: cache.fresh().watched(),
            "/rounds.json": lambda: cache.fresh().rounds(**dict(urllib.parse.parse_qsl(query))),
            "/metrics": lambda: metrics(cache.fresh().watched()),
        }
        acts = {"/login": self.log_in, "/do": self.act}
        host = self.headers.get("Host", "")
        if path not in reads | acts:
            raise protocol.Refused(404, "there is nothing here")
        if self.command != ("GET" if path in reads else "POST"):
            raise protocol.Refused(405, "this path has another method")
        if not self.server.is_named(host):
            raise protocol.Refused(
                403, f"{shown(host)} is another site; --web HOST:PORT would allow it"
            )
        if path in acts and self.headers.get("Origin") not in (f"http://{host}", f"https://{host}"):
            raise protocol.Refused(403, "this was not sent by the page")
        if path not in ("/", "/login") and not self.is_known():
            raise protocol.Refused(401, "this needs the token of the run")
        if path in reads:
            return reads[path]()
        length = int(self.headers.get("Content-Length", -1))
        if not 0 <= length <= MAX_BODY_BYTES:
            raise protocol.Refused(413, f"a body has at most {MAX_BODY_BYTES} bytes")
        return acts[path](protocol.parse_json(self.rfile.read(length), "the body"))

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
        if self.cookie:
            self.send_header("Set-Cookie", f"{self.cookie}; HttpOnly; SameSite=Strict; Path=/")
        self.end_headers()
        self.wfile.write(content.encode(errors="backslashreplace"))

    def is_known(self):
        """Whether the reader may look at the run and change it: with a session, or the token."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if not self.server.token or (kind == "Bearer" and self.knows(token.encode("latin-1"))):
            return True
        cookies = map(str.strip, self.headers.get("Cookie", "").split(";"))
        known = [*self.server.sessions]
        return any(protocol.is_same(cookie, session) for cookie in cookies for session in known)

    def knows(self, token):
        """Whether bytes are the token of the run. Who guesses waits for every no."""
        if hmac.compare_digest(token, self.server.token):
            return True
        time.sleep(WRONG_TOKEN_SECONDS)
        return False

    def log_in(self, body):
        """Open a session for a reader who knows the token."""
        if not self.knows(str(body.get("token")).encode(errors="replace")):
            raise protocol.Refused(401, "this is not the token of the run")
        self.cookie = f"diloco-{self.server.server_address[1]}={secrets.token_urlsafe(32)}"
        with self.server.lock:
            self.server.sessions[self.cookie] = True
            if len(self.server.sessions) > MAX_SESSIONS:
                del self.server.sessions[next(iter(self.server.sessions))]
        return {}

    def act(self, body):
        """Have the server do what a button says."""
        action, feed = body.get("action"), self.server.cache.feed
        if action not in ("save", "stop", "drop"):
            raise protocol.Refused(400, "the action is save, stop or drop")
        fields = {"worker": body.get("worker")} if action == "drop" else {}
        try:
            return ask(feed.server, action, feed.access, fields)
        except protocol.Refused as refusal:
            raise protocol.Refused(409, str(refusal)) from None
        except (OSError, protocol.ProtocolError) as error:
            raise protocol.Refused(502, str(error)) from None


def web_address(text):
    """(host, port) of a text [HOST:]PORT."""
    host, _, port = text.rpartition(":")
    if not (port.isdecimal() and int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"[HOST:]PORT, with a port below 65536, not {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>DiLoCo</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='none'
  stroke='%230a84c6' stroke-width='2'%3E%3Cpath d='M2 2l6 6 6-6M8 8v7'/%3E%3C/svg%3E">
<style nonce="NONCE">
:root { color-scheme: light dark; --page: #fbfaf8; --ink: #1d1f21; --soft: #666b71; --line: #e6e3dd; --quiet: #b4b1aa;
  --good: #00815f; --bad: #b3261e; --wait: #d3cfc6; --c0: #0072b2; --c1: #c65a00; --c2: #00815f; --c3: #b0578f;
  --c4: #3a9bd0; --c5: #9c7400; --c6: #6b4fb3; --c7: #7a7a7a }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e6e4df; --soft: #9aa0a6; --line: #2b2f35;
  --quiet: #565c64; --good: #35b58c; --bad: #ff8a7a; --wait: #41464d; --c0: #57a8e0; --c1: #ef8b3e; --c2: #35b58c;
  --c3: #de8fc0; --c4: #a5d8f3; --c5: #d9b544; --c6: #a893ea; --c7: #a0a0a0 } }
* { box-sizing: border-box; margin: 0 }
body { font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; max-width: 1160px;
  margin: auto; padding: 28px 20px 64px; background: var(--page); color: var(--ink) }
h1, h2 { font-size: 20px; font-weight: 600 } h2 { font-size: 16px } section { margin-top: 44px }
h1::before { content: "●"; color: var(--good); margin-right: 10px } h1.bad::before, .bad { color: var(--bad) }
.row { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; justify-content: space-between }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 40px }
.soft, .legend, dt, th, small { color: var(--soft); font-size: 13px; font-weight: 400 }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 14px 24px; margin: 20px 0 14px }
dd { font-size: 22px; line-height: 1.3 } small { display: block }
progress { width: 100%; height: 4px; appearance: none; border: 0; background: var(--line) }
progress::-webkit-progress-bar { background: var(--line) } progress::-webkit-progress-value { background: var(--c0) }
progress::-moz-progress-bar { background: var(--c0) }
ul { list-style: none; padding: 0 } main li { padding: 6px 0; border-bottom: 1px solid var(--line) }
#waits li { padding: 2px 0; border: 0 } #warnings li { padding: 8px 12px; margin-top: 8px; border: 0; border-left: 3px solid var(--bad); background: var(--line) }
button, input { font: inherit; color: inherit; background: none; border: 1px solid var(--quiet); border-radius: 6px;
  min-height: 32px; padding: 0 12px }
button { cursor: pointer } button:hover, [aria-pressed=true] { background: var(--line) }
td button { min-height: 24px; padding: 0 8px; font-size: 13px }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px }
dialog { margin: auto; max-width: min(420px, 92vw); padding: 24px; border: 1px solid var(--quiet); border-radius: 10px;
  background: var(--page); color: var(--ink) }
dialog::backdrop { background: #0009 } dialog p, dialog input { margin: 8px 0 20px; width: 100% }
figure { position: relative; margin-top: 10px }
figure > svg { display: block; width: 100%; overflow: visible; touch-action: pan-y }
svg * { pointer-events: none } svg text { fill: var(--soft); font-size: 11px }
.legend { display: flex; flex-wrap: wrap; gap: 0 16px }
i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle }
.tip { position: absolute; top: 30px; padding: 6px 10px; font-size: 13px; border-radius: 6px; pointer-events: none;
  background: var(--page); border: 1px solid var(--quiet); max-width: 240px }
table { width: 100%; border-collapse: collapse; margin-top: 12px }
th, td { text-align: right; max-width: 30ch; padding: 5px 0 5px 12px; border-bottom: 1px solid var(--line) }
th, td:nth-child(n+4) { white-space: nowrap } :is(th, td):nth-child(-n+3) { text-align: left }
:is(th, td):first-child { padding-left: 0 }
@media (max-width: 760px) { .wide { display: none } body { padding: 16px 14px 48px } dd { font-size: 18px }
  dl { grid-template-columns: repeat(auto-fit, minmax(96px, 1fr)); gap: 12px } table { font-size: 12px } th, td { padding-left: 4px } td { max-width: 13ch } td:nth-child(-n+2) { min-width: 7ch }
  td button { padding: 0 5px } }
</style>
<header class="row"><h1 id="state">DiLoCo</h1><span><button id="save">Save</button> <button id="stop">Stop</button></span></header>
<dl id="figures"></dl><progress id="progress" aria-label="share of the steps" hidden></progress>
<ul id="warnings" role="status"></ul>
<main>
<section><div class="row"><h2>Is it learning?</h2><span><button id="step" aria-pressed="true">steps</button>
  <button id="time" aria-pressed="false">time</button></span></div><figure id="loss"></figure></section>
<section><h2>Who holds it up?</h2><ul class="soft" id="waits"></ul><figure id="timeline"></figure></section>
<section><h2>What does a sync cost?</h2><div class="pair"><figure id="seconds"></figure><figure id="bytes"></figure></div></section>
<section><h2>Who takes part?</h2><figure id="members"></figure><table id="workers"></table></section>
<section><h2>What went wrong?</h2><ul id="faults"></ul></section>
</main>
<dialog id="dialog" aria-labelledby="question"><form><h2 id="question"></h2><p id="meaning"></p>
  <input id="token" type="password" aria-label="token of the run" autocomplete="current-password">
  <div class="row"><button type="button" id="cancel">Cancel</button><button id="confirm"></button></div></form></dialog>
<script nonce="NONCE">
"use strict";
const $ = id => document.getElementById(id);
const digits = (n, most = 4) => n == null ? "-" : n.toLocaleString("en", {maximumSignificantDigits: most});
const whole = n => n.toLocaleString("en");
const fixed = n => n == null ? "-" : n && Math.abs(n) < 1e-3 ? n.toExponential(2) : n.toPrecision(4);
const bytes = n => n < 1000 ? `${digits(n)} B` : `${short(n)}B`;
function short(n) {
  const [size, unit] = [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]].find(([size]) => Math.abs(n) >= size) ?? [1, ""];
  return digits(n / size) + unit;
}
function duration(s) {
  if (s < 60) return `${digits(s, 3)} s`;
  const [d, h, m] = [s / 86400, s % 86400 / 3600, s % 3600 / 60].map(Math.floor);
  return d ? `${d}d ${h}h` : h ? `${h}h ${m}m` : `${m}m ${Math.floor(s % 60)}s`;
}
function clock(s, step = 60) {
  const date = new Date(s * 1000), seconds = step < 60 ? {second: "2-digit"} : {};
  return step < 86400 ? date.toLocaleTimeString("en-GB", {hour: "2-digit", minute: "2-digit", ...seconds})
    : date.toLocaleDateString("en", {day: "numeric", month: "short"});
}
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
function key(color) {
  const node = make("i", {ariaHidden: true});
  node.style.background = color;
  return node;
}
function write(node, text) { if (node.textContent !== text) node.textContent = text; }
function list(id, texts) {
  if (JSON.stringify(texts) === $(id).dataset.texts) return;
  $(id).dataset.texts = JSON.stringify(texts);
  $(id).replaceChildren(...texts.map(textContent => make("li", {textContent})));
}

// --- Charts: lines over x, or bars in rows, with a legend, and values under the pointer or the arrow keys ---

const TIMES = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800, 2592000];
function ticks(low, high, most, isTime) {  // [numbers between low and high that people like, their step]
  const rough = (high - low || 1) / most, power = 10 ** Math.floor(Math.log10(rough)), found = [];
  const steps = isTime ? TIMES : [1, 2, 5, 10].map(n => n * power), step = steps.find(step => step >= rough) ?? rough;
  const shift = isTime ? new Date(low * 1000).getTimezoneOffset() * 60 : 0;
  for (let n = Math.ceil((low - shift) / step); n * step + shift <= high && found.length < 100; n++) found.push(n * step + shift);
  return [found, step];
}

// What a chart shows: {about, points, x: {title, of: point -> x, low, isTime}, y: {title, text: y -> text, tick: the same on the axis, low, high, isClipped}, marks},
// and for bars {rows: names instead of y, read: (point, row) -> texts}. A mark: {name, color, width, of: point -> y or null,
// gap: points without a value that its line bridges, isStep, isQuiet: one of many} or {name, color, bars: [[row, from, to], ...]}.
class Chart {
  constructor(id, height) {
    this.box = $(id); this.height = height; this.at = null; this.row = 0;
    this.svg = shape("svg", {tabindex: 0, role: "img"}); this.rule = shape("path", {stroke: "var(--soft)"});
    this.legend = make("div", {className: "legend"}); this.tip = make("div", {className: "tip", role: "status", hidden: true});
    this.box.append(this.legend, this.svg, this.tip);
    this.svg.onpointermove = event => this.point(this.nearest(event.offsetX), Math.floor((event.offsetY - 20) / this.pitch));
    this.svg.onpointerleave = this.svg.onblur = () => this.point(null, 0);
    this.svg.onkeydown = event => {
      const last = this.what.points.length - 1, at = this.at ?? last + 1;
      const to = {Home: 0, End: last, ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at, ArrowDown: at, Escape: NaN}[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const down = {ArrowUp: -1, ArrowDown: 1}[event.key] ?? 0;
      this.point(Math.max(0, Math.min(last, to)), this.row + down);
    };
    new ResizeObserver(() => this.what && this.draw()).observe(this.box.parentElement);
  }
  show(what) { this.what = what; this.draw(); }
  nearest(x) {
    const away = this.what.points.map(point => Math.abs(this.sx(this.what.x.of(point)) - x));
    return away.indexOf(Math.min(...away));
  }
  draw() {
    const {about, points, x, y, rows, marks} = this.what, nodes = [];
    if ((this.box.hidden = !points.length) || this.box.clientWidth < 200) return;
    this.pitch = rows?.length > 16 ? 12 : 20;
    const width = this.box.clientWidth, left = rows ? Math.min(110, width / 4) : 48, right = width - 12, top = 20;
    const bottom = rows ? top + rows.length * this.pitch : this.height - 20;
    const xs = points.map(x.of), x0 = x.low ?? xs[0], x1 = xs.at(-1);
    this.sx = v => left + (v - x0) / (x1 - x0 || 1) * (right - left);
    let sy = row => top + (row + 0.5) * this.pitch;
    const text = (x, y, anchor, words) => nodes.push(shape("text", {x, y, "text-anchor": anchor}, words));
    rows?.forEach((name, row) => text(left - 8, sy(row) + 4, "end", name.length > left / 7 ? name.slice(0, left / 7 - 1) + "…" : name));
    if (!rows) {
      for (const mark of marks) mark.ys = points.map(mark.of);
      const begin = y.isClipped && points.length > 30 ? Math.floor(points.length / 12) : 0;  // the first fall hides the rest
      const known = from => marks.flatMap(mark => mark.ys.slice(from)).filter(v => v != null);
      const ys = [known(begin), known(0), [0]].find(ys => ys.length);  // a run may report no loss
      const low = y.low ?? ys.reduce((a, b) => Math.min(a, b), Infinity), most = ys.reduce((a, b) => Math.max(a, b), y.high ?? -Infinity);
      const high = most > low ? most : low + (Math.abs(low) || 1);
      sy = v => top + (high - v) / (high - low) * (bottom - top);
      for (const v of ticks(low, high, 5)[0]) {
        nodes.push(shape("path", {d: `M${left} ${sy(v)}H${right}`, stroke: "var(--line)"}));
        text(left - 8, sy(v) + 4, "end", (y.tick ?? y.text)(v));
      }
      text(0, 10, "start", y.title);
    }
    const [stops, step] = ticks(x0, x1, (right - left) / (x.isTime ? 80 : 55), x.isTime);
    for (const v of stops) text(this.sx(v), bottom + 16, "middle", x.isTime ? clock(v, step > 7200 && !new Date(v * 1000).getHours() ? 86400 : step) : short(v));
    text(right, 10, "end", x.title);
    const inside = [left - 2, top - 2, right - left + 4, bottom - top + 4];  // a line that leaves it is cut
    const plot = shape("svg", {x: inside[0], y: inside[1], width: inside[2], height: inside[3], viewBox: inside.join(" ")});
    for (const mark of marks) {
      const d = rows ? mark.bars.map(([row, from, to]) => `M${this.sx(from)} ${sy(row)}H${this.sx(to)}`) : [];
      let last = null;
      mark.ys?.forEach((v, i) => {
        if (v == null) return;
        const [px, py] = [this.sx(xs[i]).toFixed(1), sy(v).toFixed(1)], isNext = last !== null && i - last <= mark.gap;
        d.push(!isNext ? `M${px} ${py}h0` : mark.isStep ? `H${px}V${py}` : `L${px} ${py}`);
        last = i;
      });
      plot.append(shape("path", {d: d.join(""), fill: "none", stroke: mark.color, "stroke-linejoin": "round",
        "stroke-linecap": rows ? "butt" : "round", "stroke-width": rows ? this.pitch * 0.6 : mark.width}));
    }
    nodes.push(plot);
    this.svg.setAttribute("height", bottom + 22);
    this.svg.setAttribute("aria-label", `${about}. The arrow keys read values.`);
    this.svg.replaceChildren(...nodes, this.rule);
    const quiet = marks.filter(mark => mark.isQuiet), legend = marks.filter(mark => !mark.isQuiet);
    if (quiet.length) legend.push({name: `${quiet.length} workers`, color: quiet[0].color});
    this.legend.replaceChildren(...legend.map(({name, color}) => make("span", {}, key(color), name)));
    this.point(this.at, this.row);
  }
  point(at, row) {  // Show the values at a point, and in a row; of no point: none.
    const {points, x, y, rows, marks, read} = this.what, point = points[at];
    this.at = point ? at : null;
    this.row = Math.max(0, Math.min((rows?.length ?? 1) - 1, row || 0));
    this.rule.setAttribute("visibility", point ? "visible" : "hidden");
    if (this.tip.hidden = !point) return;
    const px = this.sx(x.of(point)), line = (...children) => make("div", {}, ...children);
    const from = 20 + (rows ? this.row * this.pitch : 0), to = rows ? from + this.pitch : this.height - 20;
    this.rule.setAttribute("d", `M${px} ${from}V${to}`);
    const lines = rows ? read(point, this.row).map(text => line(text))
      : [line(x.isTime ? clock(x.of(point), 1) : `${x.title} ${whole(x.of(point))}`)];
    const known = (rows ? [] : marks).filter(mark => mark.ys[at] != null);
    const quiet = known.filter(mark => mark.isQuiet).sort((a, b) => a.ys[at] - b.ys[at]);
    for (const mark of [...known.filter(mark => !mark.isQuiet), ...quiet.length > 2 ? [quiet[0], quiet.at(-1)] : quiet])
      lines.push(line(key(mark.color), `${mark.name} ${y.text(mark.ys[at])}`));
    this.tip.replaceChildren(...lines);
    const room = this.box.clientWidth - this.tip.offsetWidth, isLeft = px < this.box.clientWidth / 2;
    this.tip.style.left = `${Math.max(0, Math.min(room, isLeft ? px + 14 : px - this.tip.offsetWidth - 14))}px`;
  }
}

// --- The run ---

const KINDS = [["trains", "var(--c0)", "trained"], ["sends and receives", "var(--c1)", "transferred"], ["waits", "var(--wait)", "waited"]];
const own = (values, id) => Object.hasOwn(values, id) ? values[id] : null;  // an id may be "constructor"
const charts = {loss: new Chart("loss", 300), timeline: new Chart("timeline"), seconds: new Chart("seconds", 200),
  bytes: new Chart("bytes", 200), members: new Chart("members", 120)};
const rows = new Map();  // worker id -> its row in the table
let run = {}, rounds = {points: [], recent: [], count: 0, span: 0}, over = "step", lost = null;

function showRounds() {
  const points = rounds.points, ids = [...new Set(points.slice().reverse().flatMap(p => Object.keys(p.losses)))].slice(0, 64).sort();
  const isFew = ids.length <= 8, step = {title: "step", of: p => p.step}, time = {title: "time", of: p => p.time, isTime: true};
  const round = {title: "round", of: p => p.n}, per = name => p => p[name] / p.rounds;
  points.forEach((p, k) => p.rounds = p.n - (points[k - 1]?.n ?? 0));
  const line = (name, color, of, width = 1.5) => ({name, color, of, width, gap: Infinity});
  charts.loss.show({about: "Loss of each worker and of the global model", points, x: over === "step" ? step : time,
    y: {title: "loss", text: fixed, tick: n => n && !(Math.abs(n) >= 1e-3 && Math.abs(n) < 1e5) ? (+n.toPrecision(3)).toExponential() : digits(n), isClipped: true}, marks: [...ids.map((id, k) => ({name: id, color: isFew ? `var(--c${k})` : "var(--quiet)",
      width: isFew ? 1.5 : 0.7, isQuiet: !isFew, gap: 8, of: p => own(p.losses, id)})),
      line("global model, evaluated", "var(--ink)", p => p.evaluation, 2.5)]});
  charts.seconds.show({about: "Seconds per round", points, x: round, y: {title: "seconds per round", text: n => digits(n), low: 0},
    marks: [line("whole round", "var(--ink)", per("seconds")), line("waiting for pushes", "var(--c1)", per("seconds_waiting")),
      line("folding", "var(--c0)", per("seconds_folding"))]});
  charts.bytes.show({about: "Bytes per round", points, x: round, y: {title: "bytes per round", text: bytes, low: 0},
    marks: [line("up", "var(--c0)", per("bytes_up"), 4), line("down", "var(--c1)", per("bytes_down"))]});
  charts.members.show({about: "Members over time", points, x: time, y: {title: "members", text: whole, low: 0, high: 2},
    marks: [{...line("members", "var(--c2)", p => p.members), isStep: true}]});
  showTimeline();
}

function showTimeline() {
  const many = Math.max(6, Math.floor($("timeline").parentElement.clientWidth / 32)), shown = rounds.recent.slice(-many - 1);
  const names = [...new Set(shown.flatMap(round => Object.keys(round.pushed)))].sort(), bars = KINDS.map(() => []);
  names.forEach((id, row) => {
    const mine = shown.filter(round => own(round.pushed, id));
    for (let k = 1; k < mine.length; k++) {  // a push tells of the time since the one before
      const {trained, transferred} = own(mine[k].pushed, id), [from, to] = [mine[k - 1].time, mine[k].time];
      const scale = Math.min(1, (to - from) / (trained + transferred || 1)), [a, b] = [trained, trained + transferred].map(s => s * scale);
      [[0, a], [a, b], [b, to - from]].forEach(([a, b], kind) => b > a && bars[kind].push([row, from + a, from + b]));
    }
  });
  charts.timeline.show({about: "What each worker did in the last rounds", points: shown.slice(1), rows: names,
    x: {title: "time", of: round => round.time, low: shown[0]?.time, isTime: true},
    marks: KINDS.map(([name, color], kind) => ({name, color, bars: bars[kind]})),
    read: (round, row) => {
      const push = own(round.pushed, names[row]), parts = KINDS.map(([name,, field]) => push && `${name} ${duration(push[field])}`);
      return [`${names[row]}, round ${whole(round.round)}`, ...push ? parts : ["no push"]];
    }});
}

const COLUMNS = [["worker", "", w => w.id], ["is", "", w => w.state + (w.waits_for?.length ? ` for ${w.waits_for.join(", ")}` : "")],
  ["host", "wide", w => w.host], ["step", "wide", w => whole(w.step)], ["steps/s", "", w => digits(w.steps_per_second, 3)],
  ["loss", "", w => fixed(w.loss)], ["trains", "", w => w.training == null ? "-" : `${Math.round(100 * w.training)}%`],
  ["behind", "wide", w => w.lag ? `${w.lag} rounds` : "-"], ["heard", "wide", w => `${duration(Math.round(w.heard_seconds_ago))} ago`]];

function showWorkers() {
  const table = $("workers"), ids = new Set(run.workers.map(worker => worker.id));
  if (!table.rows.length) table.append(make("tr", {}, ...COLUMNS.map(([name, className]) => make("th", {className, scope: "col"}, name)), make("td")));
  for (const [id, row] of rows) if (!ids.has(id)) { row.remove(); rows.delete(id); }
  for (const worker of run.workers) {
    if (!rows.has(worker.id)) {
      const drop = make("button", {onclick: () => confirm("drop", worker.id), ariaLabel: `Drop ${worker.id}`}, "Drop");
      rows.set(worker.id, make("tr", {}, ...COLUMNS.map(([, className]) => make("td", {className})), make("td", {}, drop)));
      table.append(rows.get(worker.id));
    }
    const row = rows.get(worker.id);
    row.className = worker.state === "away" ? "bad" : "";
    COLUMNS.forEach(([,, text], k) => write(row.cells[k], text(worker)));
  }
}

function warnings() {
  const {watch, stalls = [], last_round, save_error} = run, found = [], heard = watch?.heard_seconds_ago;
  if (lost) found.push(`status.py has not answered since ${clock(lost.since, 1)}: ${lost.why}`);
  else if (watch?.error && heard == null) found.push(`The server at ${watch.server} does not answer: ${watch.error}`);
  else if (watch?.error) found.push(`The server at ${watch.server} has not answered since ${clock(Date.now() / 1000 - heard, 1)} (${
    duration(Math.round(heard))}). This is what it said then. ${watch.error}`);
  for (const {slice, seconds, missing} of stalls)
    found.push(`The round of slice ${slice} has waited ${duration(seconds)} for ${missing.join(", ") || "more workers (--min-workers)"}.`);
  for (const [id, why] of Object.entries(last_round?.reasons ?? {})) found.push(`The last push of ${id} was refused: ${why}`);
  return save_error ? [...found, save_error] : found;
}

function showStatus() {
  list("warnings", warnings());
  if (!run.state) return;
  const {step, max_steps, evaluation, loss, rate, ends_in_seconds: left, awaited, joining, watch} = run;
  const isHeard = !lost && !watch.error, isGood = isHeard && run.state === "running";
  $("state").className = isGood ? "" : "bad";
  write($("state"), `DiLoCo is ${isHeard ? run.state : "not heard"}`);
  document.title = `${isGood ? "" : "! "}${whole(step)} · DiLoCo`;
  const figures = [["step", whole(step), max_steps ? `of ${whole(max_steps)}` : ""], ["round", whole(run.round), run.mode],
    ["steps/s", rate ? digits(rate, 3) : "-", "of the run"],
    evaluation ? ["loss", fixed(evaluation.loss), `global, step ${whole(evaluation.step)}`] : ["loss", fixed(loss), "mean of the workers"],
    ["members", whole(run.workers.length), joining.length ? `${joining.length} joining` : ""],
    ["ends in", left == null ? "-" : duration(Math.round(left)), left == null ? "" : `at ${clock(Date.now() / 1000 + left, left > 86400 ? 86400 : 60)}`]];
  if (!$("figures").childElementCount) $("figures").append(...figures.map(() => make("div", {}, make("dt"), make("dd"), make("small"))));
  figures.forEach((texts, k) => texts.forEach((text, j) => write($("figures").children[k].children[j], text)));
  $("progress").hidden = !max_steps;
  if (max_steps) Object.assign($("progress"), {max: max_steps, value: step});
  const costs = run.waiting_costs.map(([who, share, slowest]) => `${who} waits ${Math.round(100 * share)}% of its time for ${slowest}`);
  const waits = [awaited.length && `the round waits for ${awaited.join(", ")}`, joining.length && `there: ${joining.join(", ")}`,
    costs.length && `${costs.join("; ")}: --own-pace would end that`];
  list("waits", waits.filter(Boolean));
  showWorkers();
  const gone = run.gone.map(({id, seconds_ago, why}) => `${id} left at ${clock(run.time - seconds_ago)}: ${why}`);
  const faults = [...run.faults.slice().reverse(), ...gone];
  list("faults", faults.length ? faults : ["Nothing so far."]);
}

function show(said, more) {
  run = said;
  if (more.session === rounds.session && more.span === rounds.span && more.count >= rounds.count) {
    const newest = (name, of) => [...new Map([...rounds[name], ...more[name]].map(p => [of(p), p])).values()];
    more.points = newest("points", p => Math.ceil(p.n / more.span));  // the last one may have grown
    more.recent = newest("recent", p => p.n).slice(-120);
  }
  rounds = more;
  showStatus();
  showRounds();
}

// --- Asking ---

async function ask(path, body) {
  const post = body && {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)};
  const reply = await fetch(path, {...post, signal: AbortSignal.timeout(20000)}), said = await reply.json();
  if (reply.status === 401 && path !== "login" && !$("dialog").open) confirm("login");
  if (!reply.ok) throw Error(said.error);
  return said;
}

const QUESTIONS = {
  save: () => ["Save a checkpoint?", "The server writes the global model to its disk. Training goes on.", "Save"],
  stop: () => ["Stop the run?", "Every worker sends its last steps, takes the final model and leaves. The run ends.", "Stop the run"],
  drop: id => [`Drop ${id}?`, "The run waits for it no more. If it is alive, it is told to finish and leaves.", "Drop"],
  login: () => ["Log in", "This page asks for the token of the run.", "Log in"],
};
function confirm(action, worker) {
  const [question, meaning, yes] = QUESTIONS[action](worker);
  write($("question"), question);
  write($("meaning"), meaning);
  write($("confirm"), yes);
  $("token").hidden = !($("cancel").hidden = action === "login");
  $("dialog").onsubmit = async event => {
    event.preventDefault();
    try {
      await (action === "login" ? ask("login", {token: $("token").value}) : ask("do", {action, worker}));
      $("token").value = "";
      $("dialog").close();
    } catch (error) { write($("meaning"), error.message); }
  };
  $("dialog").showModal();
}
$("cancel").onclick = () => $("dialog").close();
for (const action of ["save", "stop"]) $(action).onclick = () => confirm(action);
for (const way of ["step", "time"]) $(way).onclick = () => {
  over = way;
  for (const id of ["step", "time"]) $(id).setAttribute("aria-pressed", id === way);
  showRounds();
};

async function poll() {
  try {
    if (!document.hidden) {
      const said = await ask("status.json"), full = rounds.points.findLast(p => p.n % rounds.span === 0);
      const more = await ask(`rounds.json?after=${full?.n ?? 0}&span=${rounds.span}`);
      lost = null;
      show(said, more);
    }
  } catch (error) {
    lost = {since: lost?.since ?? Date.now() / 1000, why: error.message};
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
    server = args.server or os.environ.get("DILOCO_SERVER") or f"localhost:{protocol.PORT}"
    try:
        access = protocol.Access.of_options(args)
        site = Site(args.web, Cache(server, access)) if args.web else None
    except (OSError, ValueError) as error:
        print(f"status.py: {error}", file=sys.stderr)
        return 2
    try:
        if site:
            site.serve()
        orders = [o for o in ("save", "drop", "stop") if getattr(args, o) not in (None, False)]
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
