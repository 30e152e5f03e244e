"""What a DiLoCo run is doing: one screen, a line for each round, or JSON.

    python status.py                              # --server localhost:8512
    python status.py --server host:8512 --watch   # drawn again every two seconds (--watch 10: ten)
    python status.py --follow                     # a line for each round that closes, for logs
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
import json
import os
import re
import signal
import statistics
import sys
import time
import unicodedata
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
    conn, _ = protocol.connect(server, {}, access=access)
    with contextlib.closing(conn):
        conn.stall = ANSWER_SECONDS
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
    return time.strftime(form, time.localtime(seconds))


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
    protocol.Access.add_options(parser)
    args = parser.parse_args(argv)
    if args.watch is not None and not 0 < args.watch <= 86400:
        parser.error("--watch takes seconds: more than 0, and at most a day's")
    server = args.server or os.environ.get("DILOCO_SERVER") or f"localhost:{protocol.PORT}"
    try:
        access = protocol.Access.of_options(args)
    except (OSError, ValueError) as error:
        print(f"status.py: {error}", file=sys.stderr)
        return 2
    try:
        orders = [name for name in ("save", "drop", "stop") if getattr(args, name)]
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
