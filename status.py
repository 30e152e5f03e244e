"""What a DiLoCo run is doing, on one screen.

    python status.py                              # --server localhost:8512
    python status.py --server host:8512 --watch   # again every two seconds
    python status.py --json                       # for programs
    python status.py --save                       # have a checkpoint written
    python status.py --stop                       # have the workers finish, send and leave

If no server answers, the exit code is 1 and one line says why.
"""

import argparse
import contextlib
import json
import os
import sys
import time

import protocol
from protocol import shown


def ask(server, request="status", access=protocol.PLAIN):
    """The fields of the server's reply to a request. Raises OSError, protocol.Refused,
    protocol.ProtocolError."""
    conn, _ = protocol.connect(server, {}, access=access)
    with contextlib.closing(conn):
        return conn.request(request).fields


def duration(seconds):
    """Seconds as 4s, 3m 20s or 2h 05m."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"


def listed(names):
    """Names of workers in one line."""
    return ", ".join(map(shown, names))


def table(rows):
    """Rows of texts as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def workers_in(status):
    """The lines about the workers of a run."""
    if not status["workers"]:
        return ["  no workers"]
    rows = [("#", "worker", "host", "step", "steps/s", "loss", "a round", "waits", "late", "heard")]
    for worker in status["workers"]:
        ranks = f", {worker['ranks']} ranks" if worker["ranks"] > 1 else ""
        rows.append(
            (
                str(worker["index"]),
                shown(worker["id"]),
                shown(worker["host"]) + ranks,
                str(worker["step"]),
                f"{worker['steps_per_second']:.2f}",
                "-" if worker["loss"] is None else f"{worker['loss']:.4f}",
                f"{worker['pace']} steps",
                f"{100 * worker['waiting']:.0f}%",
                str(worker["lag"]) if worker["lag"] else "-",
                f"{worker['heard_seconds_ago']:.0f}s ago",
            )
        )
    return table(rows)


def waits_in(status):
    """The lines about what a run waits for, if it waits."""
    lines = []
    there = listed(status["joining"]) or "none"
    if status["expected"]:
        expected = listed(status["expected"])
        lines.append(
            f"the run goes on with {expected}, as soon as they are back or given up; there: {there}"
        )
    elif status["state"] == "waiting for workers":
        lines.append(f"the run starts with {status['workers_wanted']} workers; there: {there}")
    elif status["state"] == "too few workers":
        lines.append(f"rounds wait until there are {status['min_workers']} workers (--min-workers)")
    if status["awaited"]:
        lines.append(f"the round waits for: {listed(status['awaited'])}")
    for stall in status["stalls"]:
        whom = listed(stall["missing"]) or f"more workers (--min-workers {status['min_workers']})"
        lines.append(
            f"WARNING: the round of slice {stall['slice']} has waited "
            f"{duration(stall['seconds'])} for {whom}"
        )
    for waiting, share, slowest in status["waiting_costs"]:
        lines.append(
            f"{shown(waiting)} waits {100 * share:.0f}% of its time for {shown(slowest)}; --own-pace "
            "would end that"
        )
    if status["forced_rounds"]:
        lines.append(f"WARNING: {status['forced_rounds']} rounds were closed because all waited")
    return lines


def rounds_in(status):
    """The lines about the fragments that are on their way, and about the last round."""
    lines = []
    if len(status["fragments"]) > 1:
        versions = " ".join(str(fragment["version"]) for fragment in status["fragments"])
        flying = [
            f"{k} ({fragment['pushes']} of {len(status['workers'])})"
            for k, fragment in enumerate(status["fragments"])
            if fragment["pushes"]
        ]
        lines.append(f"fragments: versions {versions}; in flight: {', '.join(flying) or 'none'}")
    if last := status["last_round"]:
        late = ", ".join(
            f"{shown(worker)} by {rounds}" for worker, rounds in last["staleness"].items()
        )
        lines.append(
            f"last round: waited {last['seconds_waiting']:.2f} s, folded "
            f"{last['seconds_folding']:.2f} s; up {last['bytes_up'] / 1e6:.2f} MB, down {last['bytes_down'] / 1e6:.2f} MB; "
            f"{last['steps']} steps, {last['tokens']:,} tokens"
            f"{'; late: ' + late if late else ''}"
        )
        if last["share"] < 1 or last["quorum"] is not None:
            counted = "" if last["quorum"] is None else f" of {last['quorum']} pushes that counted"
            weights = ", ".join(f"{shown(w)} {n:.4g}" for w, n in last["weights"].items())
            lines.append(
                f"it was {100 * last['share']:.0f}% of an outer step{counted}, after a grace of "
                f"{last['grace']:.2f} s; weights: {weights or 'none'}"
            )
        norms = ", ".join(f"{shown(worker)} {norm:.3g}" for worker, norm in last["norms"].items())
        lines += [f"norms of its pushes: {norms}"] if norms else []
        lines += [f"WARNING: {shown(id)}: {shown(why)}" for id, why in last["reasons"].items()]
    return lines


def render(status):
    """The screen for a server's status, as a list of lines."""
    outer = status["settings"]
    warmup = " (warmed up)" if outer["momentum_warmup"] else ""
    lines = [
        f"DiLoCo {status['mode']}, {status['state']}: round {status['round']}, step "
        f"{status['step']}, up {duration(status['uptime_seconds'])}",
        f"model: {status['parameters']:,} parameters, output {status['output']}",
        f"outer: lr {outer['outer_lr']:g}, momentum {outer['outer_momentum']:g}{warmup}, up "
        f"{status['upload_codec']}, down {status['download_codec']}; data: "
        f"{status['source'] or 'none yet'}",
        "",
        *workers_in(status),
        "",
        *waits_in(status),
        *rounds_in(status),
    ]
    if status["strangers"] > 1:  # one is who asks
        lines.append(f"connections that belong to no member: {status['strangers']}")
    if status["save_error"]:
        lines.append(f"WARNING: {status['save_error']}")
    lines += [f"WARNING: {fault}" for fault in status.get("faults", [])[-3:]]
    return lines


def main(argv=None):
    """Print the status once, or again and again until Ctrl-C; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", help=f"host:port (DILOCO_SERVER or localhost:{protocol.PORT})")
    parser.add_argument("--json", action="store_true", help="all that the server says, as JSON")
    parser.add_argument("--watch", action="store_true", help="again every two seconds")
    parser.add_argument("--save", action="store_true", help="have the server write a checkpoint")
    parser.add_argument("--stop", action="store_true", help="have the workers finish and leave")
    protocol.Access.add_options(parser)
    args = parser.parse_args(argv)
    server = args.server or os.environ.get("DILOCO_SERVER") or f"localhost:{protocol.PORT}"
    try:
        access = protocol.Access.of_options(args)
    except (OSError, ValueError) as error:
        print(f"status.py: {error}", file=sys.stderr)
        return 2
    try:
        for request in ("save", "stop"):
            if getattr(args, request):
                ask(server, request, access)
                print(f"{server}: {request} is under way")
        while not (args.save or args.stop):
            status = ask(server, access=access)
            clear = "\x1b[H\x1b[J" if args.watch and sys.stdout.isatty() else ""
            text = json.dumps(status) if args.json else "\n".join(render(status))
            encoding = sys.stdout.encoding or "utf-8"
            text = text.encode(encoding, "backslashreplace").decode(encoding)
            print(clear + text, flush=True)
            if not args.watch:
                break
            time.sleep(2.0)
    except protocol.Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1
    except (OSError, ValueError, protocol.ProtocolError) as error:
        print(f"no DiLoCo server answers at {server}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
