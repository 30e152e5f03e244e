"""status.py as its users run it: what it draws, from data made by hand, and in a real terminal.

python -m pytest tests/test_status.py
"""

import json
import os
import re
import signal
import socket
import sys

import pytest
from conftest import ROOT, ending, until
from conftest import status as ask
from terminals import Terminal
from wcwidth import wcswidth

import status as status_program
from status import STYLE, Feed, clock, columns, cut, duration, figure, render, sparkline, table

HOSTILE = ["\x1b[2J\x1b[31mred", "漢字の作業者" * 9, "w" * 64, "e\u0301" * 40, "<b onclick='x'>; \\", "tab\there\nand there", "\u202eright"]  # fmt: skip


def run(start, *args, **options):
    process = start(os.path.join(ROOT, "status.py"), *args, **options)
    return process.wait(), process.output


def made(workers=4, rounds=300, slices=1):
    """(status, history) of a run as a server tells them. Worker 1 holds up the others, worker 2 is
    away, and all but the first have not heard of any evaluation."""
    ids, now = [f"node-{k:02d}" for k in range(workers)], 1_764_000_000.0
    lines = [
        {
            "n": n, "round": n, "fragment": n % slices, "time": now - 30 * (rounds - n), "step": 100 * n,
            "loss": 2 + 8 / n, "losses": dict.fromkeys(ids, 2 + 8 / n), "norm": 1.0, "faults": 0,
            "evaluation": 2.1 + 8 / n if n % 50 == 0 else None, "evaluations": {}, "share": 1.0,
            "bytes_up": workers * 12_345_678, "bytes_down": workers * 12_345_678, "members": workers,
            "seconds": 300.0 if n == rounds - 60 else 30.0, "seconds_waiting": 1.5,
            "seconds_folding": 0.25, "joined": [], "left": [], "reasons": {},
            "pushed": {id: {"trained": 28.0, "waited": 1.5, "transferred": 0.5, "steps": 100,
                            "weight": 1.0, "late": 0} for id in ids},
        }
        for n in range(1, rounds + 1)
    ]  # fmt: skip
    members = [
        {
            "id": id, "index": k, "step": 100 * rounds + k, "position": k, "sync_every": 100, "lag": 0,
            "loss": 2 + k / 100, "host": f"{id}.example", "ranks": 1, "weight": 1.0, "pace": 100,
            "waiting": 0.05, "training": 0.93, "address": "10.0.0.1", "steps_per_second": 3.25,
            "heard_seconds_ago": 200.0 if k == 2 else 0.5, "max_steps": 100_000, "evaluation": None,
            "state": {1: "training", 2: "away"}.get(k, "waiting"), "joined_seconds_ago": 9000.0,
            "waits_for": [] if k in (1, 2) else ["node-01"],
        }
        for k, id in enumerate(ids)
    ]  # fmt: skip
    status = {
        "schema": 1, "time": now, "rate": 3.2, "max_steps": 100_000, "ends_in_seconds": 7500.0,
        "loss": 2.02, "evaluation": {"step": 30_000, "loss": 2.11}, "workers": members, "gone": [],
        "totals": {"rounds": rounds, "steps": 100 * rounds * workers, "tokens": 10**9, "bytes_up": 10**11,
                   "bytes_down": 10**11, "seconds_waiting": 450.0, "seconds_folding": 75.0,
                   "refused": 1, "faults": 2, "joins": workers, "departures": 0},
        "mode": "streaming" if slices > 1 else "sync", "state": "running", "min_workers": 1,
        "round": rounds, "step": 100 * rounds, "uptime_seconds": 9000.0, "parameters": 124_439_808,
        "workers_wanted": workers, "expected": [], "joining": [], "awaited": ["node-01", "node-02"][: max(0, workers - 1)],
        "stalls": [], "waiting_costs": [], "sync": None, "source": "text", "shares": 64, "strangers": 1,
        "settings": {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True, "momentum_warmup": True},
        "upload_codec": "bf16", "download_codec": "bf16", "forced_rounds": 0, "save_error": "",
        "fragments": [{"version": rounds // slices, "pushes": 0} for _ in range(slices)],
        "last_round": lines[-1] | {"quorum": None, "grace": 0.0, "weights": {}, "norms": {}},
        "output": "/runs/model", "faults": [], "session": "abc",
    }  # fmt: skip
    history = {
        "span": 1,
        "count": rounds,
        "session": "abc",
        "points": lines,
        "recent": lines[-120:],
    }
    return status, history


def plain(*args, **options):
    """The screen without colours."""
    return [STYLE.sub("", line) for line in render(*args, **options)]


def test_no_server_is_one_line_and_exit_code_1(start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        code, output = run(start, "--server", address, fresh=True)
    assert code == 1
    assert len(output.splitlines()) == 1 and "no DiLoCo server answers at 127.0.0.1:" in output


def test_a_peer_that_speaks_something_else_is_one_line_and_exit_code_1(start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = start(
            os.path.join(ROOT, "status.py"), "--server", f"127.0.0.1:{listener.getsockname()[1]}"
        )
        conn, _ = listener.accept()
        with conn:
            conn.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert process.wait() == 1
    assert len(process.lines) == 1 and "no DiLoCo server answers" in process.output


def test_a_server_that_hangs_is_not_waited_for_longer_than_said(monkeypatch):
    monkeypatch.setattr(status_program, "ANSWER_SECONDS", 0.5)
    silent = pytest.raises(OSError, match="sent no byte for 1 s")
    with socket.create_server(("127.0.0.1", 0)) as hung, silent:  # the system takes connections
        status_program.ask(f"127.0.0.1:{hung.getsockname()[1]}")


def test_waiting_running_and_stopped(start, serve, toy):
    server = serve("-n", 2)
    code, output = run(start, "--server", server.address)
    assert code == 0 and "waiting for workers" in output and "no workers" in output

    first = toy(server, "ada", steps=100000, sync_every=7, pause=0.001, source="noise")
    until(lambda: ask(server)["joining"] == ["ada"], "ada waits")
    code, output = run(start, "--server", server.address)
    assert "the run starts with 2 workers; there: ada" in output

    second = toy(server, "bob", steps=100000, sync_every=7, pause=0.001, source="noise")
    until(lambda: ask(server)["round"] >= 2, "two rounds")
    until(lambda: all(w["steps_per_second"] for w in ask(server)["workers"]), "heartbeats")
    code, output = run(start, "--server", server.address)
    assert code == 0
    for text in ("DiLoCo sync, running: round", "58 parameters", "ada", "bob", "data: noise",
                 "waited  folded", "lr 0.7, momentum 0.9 (warmed up), up bf16, down bf16"):  # fmt: skip
        assert text in output, output

    code, output = run(start, "--server", server.address, "--json")
    said = json.loads(output)
    assert code == 0
    assert [w["id"] for w in said["workers"]] == ["ada", "bob"]
    assert said["sync"]["seconds"] >= 0 and said["sync"]["mbit_up"] > 0
    assert server.wait_for(r"a sync keeps training waiting for .* s a round, .*%; .")
    assert all(w["sync_every"] == 7 and w["loss"] > 0 for w in said["workers"])
    assert said["last_round"]["bytes_up"] == 2 * 58 * 2

    said["workers"][0] |= {"id": "n" * 120 + " é", "host": "h" * 200 + " x"}
    said["last_round"] |= {"norms": {"bob": 0.125}, "reasons": {"a b": "too \x1blarge"}}
    screen = plain(said, said["history"])
    assert not any("n" * 81 in line or "h" * 81 in line for line in screen)
    assert "Last round norms of its pushes: bob 0.125" in screen
    assert "WARNING: 'a b': 'too \\x1blarge'" in screen

    assert run(start, "--server", server.address, "--save")[0] == 0
    server.wait_for(r"saved .*checkpoint-\d+")
    assert run(start, "--server", server.address, "--stop")[0] == 0
    assert first.wait() == 0 and second.wait() == 0
    server.wait_for("the model of round")


def test_it_says_who_is_waited_for(start, serve, toy):
    server = serve("-n", 2)
    toy(server, "ada", steps=1000, sync_every=5)
    toy(server, "bob", steps=1000, sync_every=5, pause=1000)
    until(lambda: ask(server)["awaited"] == ["bob"], "ada has pushed")
    assert "the round waits for: bob" in run(start, "--server", server.address)[1]


# --- What is drawn ----------------------------------------------------------------------------


def test_texts():
    assert [duration(s) for s in (4.9, 200, 7500, 180_000)] == ["4s", "3m 20s", "2h 05m", "2d 02h"]
    assert [figure(x) for x in (None, 0, 2.5, 1e-9, 1e9)] == [
        "-",
        "0.0000",
        "2.5000",
        "1e-09",
        "1e+09",
    ]
    assert clock(1e300) == clock(1e30) and clock(-1e300) == clock(0)  # as damaged files have them
    assert [columns(t) for t in ("abc", "漢字", "e\u0301", "\x1b[31mred\x1b[m")] == [3, 4, 1, 3]
    assert cut("abcdef", 6) == "abcdef" and cut("abcdefg", 6) == "abcde…"
    assert cut("漢字漢字", 6) == "漢字…" and cut("\x1b[31mabcdefg\x1b[m", 4) == "\x1b[31mabc…\x1b[m"


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, high=7) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7, 3, 3], 3, high=7) == "▁█▄"
    assert sparkline([], 9) == "" and sparkline([None, None], 9) == ""
    assert sparkline([None, 1.0, None, 2.0], 4, high=2.0) == "▁▁█"
    assert sparkline([3.0] * 5, 5) == "▁" * 5 and sparkline([3.0] * 5, 5, low=0, high=6) == "▅" * 5
    assert (
        sparkline([1.0, 2.0] * 50 + [1000.0], 200)[-3:] == "▁██"
    )  # it does not flatten the others
    assert len(sparkline(list(range(512)), 40)) == 40
    hostile = [1.0, float("nan"), 1e308, -1e308, 2.0]
    assert sparkline(hostile, 5, low=1.0, high=2.0) == "▁▁▁▁█"


def test_a_table_gives_up_its_last_columns():
    rows = ["id\tstate\tn\thost", "ada\taway\t7\tfar away", "b\tup\t12\there"]
    assert [STYLE.sub("", line) for line in table(rows, 99)] == [
        "  id   state   n  host    ", "  ada  away    7  far away", "  b    up     12  here    "]  # fmt: skip
    assert [STYLE.sub("", line) for line in table(rows, 18)] == [
        "  id   state   n", "  ada  away    7", "  b    up     12"]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1, 4, 50])
@pytest.mark.parametrize("size", [(80, 24), (200, 50), (40, 10), (20, 3)])
def test_the_screen_fits(workers, size):
    status, history = made(workers, slices=4)
    status["stalls"] = [{"slice": k, "seconds": 100.0, "missing": ["node-01"]} for k in range(4)]
    status["waiting_costs"] = [[f"node-{k:02d}", 0.4, "node-01"] for k in range(workers)]
    status["gone"] = [{"id": f"g{k}", "seconds_ago": 60.0 * k, "why": "it left"} for k in range(50)]
    assert len(plain(status, history, *size)) <= size[1]
    if size[1] < 24:
        return
    text = "\n".join(plain(status, history, *size))
    order = [
        "running",
        "WARNING",
        "Learning",
        "Workers",
        "Lately",
        "Rounds",
        "ends in about 2h 05m",
    ]
    places = [text.index(word) for word in [*order, "faults: 2"]]
    assert places == sorted(places)
    if workers == 50:
        rows = re.findall(r"^  (node-\d+)", text, re.MULTILINE)
        assert rows[:2] == ["node-02", "node-01"] and "Workers    50: " in text
        assert len(rows) >= (5 if size[1] == 24 else 20)
        assert f"  and {50 - len(rows)} more" in text


def test_what_people_ask_is_on_80_by_24():
    status, history = made()
    lines = [cut(line, 79) for line in plain(status, history, 79, 24)]
    assert len(lines) <= 24 and all(columns(line) < 80 for line in lines)
    text = "\n".join(lines)
    for words in ("DiLoCo sync, running: round 300, step 30,000 of 100,000, up 2h 30m",
                  "loss           2.0200  █", "global model   2.1100  █", "from 10.0000", "step 30,000",
                  "Workers    4: 2 waiting, 1 training, 1 away", "waits for node-01",
                  "away for 3m 20s", "3.25     93%  2.0100", "the round waits for: node-01, node-02",
                  "seconds         30.00  ", "1.50 waiting, 0.25 folding", "MB up  MB down", "49.38",
                  "; 70,000 steps to go, 3.20 steps/s", "faults: 2, refused: 1"):  # fmt: skip
        assert words in text, text
    [curve] = re.findall("seconds  .*?([▁-█]+)", text)
    assert curve.count("█") == 1 and set(curve) <= set("▄▅█")  # one round took ten times as long


def test_what_a_sync_costs_is_said_with_what_would_hide_it():
    status, history = made(4)
    status["sync"] = {
        "seconds": 1.396,
        "share": 0.317,
        "mbit_up": 91.0,
        "mbit_down": 92.5,
        "advice": "",
    }
    lines = [line.strip() for line in plain(status, history, 80, 60)]
    assert "a sync keeps training waiting for 1.40 s a round, 32%" in lines
    status["sync"]["advice"] = advice = "--upload-codec int2 --download-codec int2 would hide it"
    lines = [line.strip() for line in plain(status, history, 80, 60)]
    assert lines[lines.index(advice) - 1] == "a sync keeps training waiting for 1.40 s a round, 32%"
    assert (
        advice in status_program.page_status({**status, "watch": {"error": ""}})["watch"]["waits"]
    )


def test_an_end_on_another_day_says_which():
    status, history = made()
    status["ends_in_seconds"] = 3 * 86400.0
    assert any(
        re.search(r"ends in about 3d 00h, on \w+ \d+ \w+ at \d+:\d+;", line)
        for line in plain(status, history)
    )
    status["ends_in_seconds"] = None
    assert any("End        not known yet; 3.20 steps/s" in line for line in plain(status, history))


def test_what_happened_in_a_round_is_said():
    status, history = made()
    history["recent"][-1] |= {"joined": ["eve"], "left": [["dan", "it was\x1b dropped"]]}
    history["recent"][-1]["pushed"]["node-00"]["late"] = 2
    history["recent"][-2]["reasons"] = {"mallory": "too large"}
    text = "\n".join(plain(status, history))
    assert "round 300: late: node-00 by 2; joined: eve; left: dan ('it was\\x1b dropped')" in text
    assert "round 299: refused: mallory ('too large')" in text


def test_a_part_of_an_outer_step_is_said_with_its_weights():
    status, history = made()
    status["last_round"] |= {"share": 0.5, "quorum": 2, "grace": 0.25, "weights": {"node-01": 0.75}}
    assert (
        "Last round it was 50% of an outer step of 2 pushes that counted, after a grace of 0.25 s; "
        "weights: node-01 0.75" in plain(status, history)
    )
    status["strangers"] = 3
    assert any("connections that belong to no member: 3" in line for line in plain(status, history))


@pytest.mark.parametrize("size", [(80, 24), (200, 50), (40, 12)])
def test_hostile_texts_break_no_line(size, monkeypatch):
    status, history = made(len(HOSTILE))
    for worker, id in zip(status["workers"], HOSTILE, strict=True):
        worker |= {"id": id, "host": id, "waits_for": HOSTILE[:1]}
    status |= {
        "awaited": HOSTILE,
        "source": HOSTILE[0],
        "output": "\x1b]0;title\x07",
        "joining": HOSTILE,
    }
    status |= {
        "faults": HOSTILE,
        "save_error": HOSTILE[4],
        "gone": [{"id": HOSTILE[0], "why": HOSTILE[0], "seconds_ago": 1}],
    }
    status["last_round"] |= {
        "norms": dict.fromkeys(HOSTILE, 1e300),
        "reasons": dict(zip(HOSTILE, HOSTILE, strict=True)),
    }
    history["recent"][-1]["reasons"] = dict(zip(HOSTILE, HOSTILE, strict=True))
    for line in render(status, history, *size):
        line = STYLE.sub("", cut(line, size[0]))
        assert line.isprintable() and 0 <= wcswidth(line) <= size[0]


@pytest.mark.parametrize(
    "stalls, code", [([], 0), ([{"slice": 0, "seconds": 90.0, "missing": ["a"]}], 3)]
)
@pytest.mark.parametrize("option", ["--json", None])
def test_a_stalled_run_has_an_exit_code(stalls, code, option, monkeypatch, capsys):
    status, history = made()
    replies = {"status": status | {"stalls": stalls}, "history": history}
    monkeypatch.setattr(
        status_program, "ask", lambda _, request="status", *a, **k: replies[request]
    )
    assert status_program.main([option] if option else []) == code
    assert "node-01" in capsys.readouterr().out


WRONG = [("--watch", text) for text in ("0", "-1", "nan", "inf", "soon")]


@pytest.mark.parametrize(
    "usage", [*WRONG, ("--web", "--save"), ("--web", "65536"), ("--web", "host:"), ("--web", "x")]
)
def test_wrong_usage_has_exit_code_2(usage, capsys):
    with pytest.raises(SystemExit) as ended:
        status_program.main([*usage])
    assert ended.value.code == 2 and usage[0] in capsys.readouterr().err


# --- In a terminal ----------------------------------------------------------------------------


@pytest.fixture
def terminal():
    """terminal(server, *options, columns, lines): status.py in a Terminal."""

    def make(server, *options, **size):
        script = os.path.join(ROOT, "status.py")
        return Terminal(script, "--server", server.address, *options, **size)

    with ending(make, Terminal.close) as run:
        yield run


@pytest.fixture
def hostile_run(serve, toy):
    """The server of a run of toy workers with hostile names."""
    names = [id for id in HOSTILE if id.isprintable()]  # the server refuses the others
    server = serve("-n", len(names))
    for seed, id in enumerate(names):
        toy(server, id, steps=10**6, sync_every=20, pause=0.005, seed=seed)
    until(lambda: ask(server)["round"] >= 3, "rounds")
    return server


def frames(raw, size):
    """The pictures that were drawn, as lists of lines; each came without clearing the screen, and
    each of its lines is shorter than the terminal is wide."""
    begin, *drawn = raw.replace(b"\r\r\n", b"\r\n").split(b"\x1b[H")
    assert begin.endswith(status_program.ENTER.encode())
    pictures = []
    for frame in drawn[:-1]:  # the last one may have been interrupted
        frame = frame.decode()
        assert frame.count("\x1b[J") == 1 and "\x1b[2J" not in frame
        lines = frame.split("\x1b[J")[0].split("\r\n")
        assert len(lines) <= size[1] and all(line.endswith("\x1b[K") for line in lines)
        pictures.append([STYLE.sub("", line.removesuffix("\x1b[K")) for line in lines])
        assert all(0 <= wcswidth(line) < size[0] for line in pictures[-1])
    return pictures


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
def test_watching_in_a_terminal(hostile_run, terminal, size):
    shown = terminal(hostile_run, "--watch", "0.2", columns=size[0], lines=size[1])
    first = int(shown.see(r"running: round (\d+)")[1])
    until(lambda: int(shown.see(r"running: round (\d+)")[1]) > first + 9, "it goes on")
    with shown.telling():
        for words in ("Learning   loss", "Workers    4: ", "w" * 15, "Rounds     seconds", "End  "):
            assert words in shown.text
        assert shown.display.cursor.hidden and b"\x1b[31m" not in shown.raw  # nothing is wrong
    os.write(shown.fd, b"\x03")
    assert shown.wait() == 130
    assert shown.raw.endswith(status_program.LEAVE.encode()) and not shown.display.scrolled
    assert not shown.display.cursor.hidden and len(frames(shown.raw, size)) > 1


def test_a_terminal_that_changes_its_size_and_sigterm(hostile_run, terminal):
    shown = terminal(hostile_run, "--watch", "1000")
    shown.see("Workers    4: ")
    assert "host" not in shown.text
    shown.resize(200, 50)
    shown.see("heard  host")
    shown.resize(40, 10)
    until(lambda: shown.text.count("\n") == 9 and "Workers    4: " in shown.text, "it is small")
    assert not shown.display.scrolled
    os.kill(shown.pid, signal.SIGTERM)
    assert shown.wait() == 128 + signal.SIGTERM
    assert shown.raw.endswith(status_program.LEAVE.encode()) and not shown.display.cursor.hidden


def test_watching_goes_on_while_the_server_is_away(serve, toy, terminal, tmp_path):
    server = serve()
    toy(server, "ada", steps=10**6, sync_every=20, pause=0.003)
    shown = terminal(server, "--watch", "0.1")
    shown.see("running: round [1-9]")
    server.kill()
    shown.see(r"has not answered since \d\d:\d\d:\d\d \w+: Connection")
    shown.see("  ada  ")
    serve("--port", server.port)
    until(lambda: "has not answered" not in shown.text and "ada" in shown.text, "it is back")
    os.kill(shown.pid, signal.SIGTSTP)  # as Ctrl-Z does
    assert os.WIFSTOPPED(os.waitpid(shown.pid, os.WUNTRACED)[1])
    until(lambda: shown.raw.endswith(status_program.LEAVE.encode()), "the shell has the terminal")
    os.kill(shown.pid, signal.SIGCONT)
    until(lambda: b"running" in shown.raw.rsplit(status_program.ENTER.encode())[-1], "it is drawn")


def test_where_no_server_answers_the_terminal_is_as_it_was(serve, terminal):
    server = serve()
    server.kill()
    shown = terminal(server, "--watch")
    assert shown.wait() == 1
    assert "no DiLoCo server answers" in shown.text and not shown.display.cursor.hidden


def test_colours_only_where_they_are_wanted(hostile_run, terminal, start):
    shown = [
        terminal(hostile_run, columns=200, lines=50, **env)
        for env in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"})
    ]
    assert [one.wait() for one in shown] == [0, 0, 0]
    assert [bool(re.search(rb"\x1b\[\d+m", one.raw)) for one in shown] == [True, False, False]
    assert b"\x1b" not in shown[2].raw
    code, output = run(start, "--server", hostile_run.address)
    assert code == 0 and "\x1b" not in output and "heard  host" in output


def test_an_output_of_ascii(hostile_run, start):
    code, output = run(
        start, "--server", hostile_run.address, env={"PYTHONIOENCODING": "ascii"}, fresh=True
    )
    assert code == 0 and output.isascii() and re.search(r"seconds  .*  [.:=+*#@-]{3,}  ", output)


# --- For programs and logs --------------------------------------------------------------------


def test_json_has_the_history(serve, toy, start):
    server = serve()
    ada = toy(server, "ada", steps=10**6, sync_every=20, pause=0.002)
    until(lambda: ask(server)["round"] >= 20, "rounds")
    watching = start("status.py", "--server", server.address, "--json", "--watch", "0.1")
    until(lambda: len(watching.lines) >= 5, "five lines")
    counts = []
    for line in map(json.loads, watching.lines[:5]):
        past = line["history"]
        assert line["schema"] == 1 and line["workers"][0]["id"] == "ada", ada.output
        assert [point["n"] for point in past["points"]] == [*range(1, past["count"] + 1)]
        assert [each["n"] for each in past["recent"]] == [*range(1, past["count"] + 1)][-120:]
        counts.append(past["count"])
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_what_is_known_is_not_asked_for_again(serve, toy):
    server = serve()
    ada = toy(server, "ada", steps=10**6, sync_every=1)
    feed = Feed(server.address, status_program.protocol.PLAIN)
    counts = set()

    def is_known():
        feed.look()
        counts.add(feed.history["count"])
        return feed.history["span"] > 1

    until(is_known, "a span of two")
    ada.kill()

    def agrees():
        feed.look()
        return feed.history == status_program.ask(server.address, "history")

    until(agrees, "the same history")
    assert len(counts) > 5


def test_following_misses_no_round(serve, toy, start, tmp_path):
    server = serve()
    ada = toy(server, "ada", steps=10**6, sync_every=20, pause=0.003)
    until(lambda: ask(server)["round"] >= 3, "rounds")
    followed = start("status.py", "--server", server.address, "--follow", "--watch", "0.1")
    followed.wait_for("round 1, at .*, step 20, .*joined: ada")
    server.kill()
    followed.wait_for("has not answered since")
    server = serve("--port", server.port)
    followed.wait_for("the server answers again")
    known = ask(server)["round"]
    followed.wait_for(f"round {known + 5}, ")
    ada.signal(signal.SIGTERM)
    numbers = [int(n) for n in re.findall(r"^round (\d+), at ", followed.output, re.MULTILINE)]
    assert set(range(1, known + 6)) <= set(numbers)
    once = (tmp_path / "model" / "rounds.jsonl").read_text().splitlines()
    assert len(numbers) <= len(once)


def test_a_round_is_a_line(capsys):
    feed = Feed("", status_program.protocol.PLAIN)
    feed.status, feed.history = made()
    status_program.follow([feed, feed], False)
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 120
    assert re.search(
        r"^round 300, at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, loss 2.0267, seconds 30.00, waited 1.50, folded "
        r"0.25, MB up 49.38, MB down 49.38, step 30,000, global 2.1267, slice 0, share 100%$",
        output.out.splitlines()[-1],
    )
    later = Feed("", status_program.protocol.PLAIN)
    later.history = feed.history | {"recent": [feed.history["recent"][-1] | {"n": 310}]}
    status_program.follow([feed, later], False)
    assert capsys.readouterr().err == "9 rounds before this one were missed\n"


def test_dropping_a_worker(serve, toy, start):
    server = serve("-n", 2)
    _, bob = [toy(server, name, steps=10**6, sync_every=20, pause=0.002) for name in ("ada", "bob")]
    until(lambda: ask(server)["round"] >= 1, "a round")
    code, output = run(start, "--server", server.address, "--drop", "bob")
    assert code == 0 and output.endswith("drop is under way")
    assert bob.wait() == 0, bob.output
    until(lambda: [w["id"] for w in ask(server)["workers"]] == ["ada"], "bob is gone")
    code, output = run(start, "--server", server.address)
    assert re.search(r"^Lately +bob left \d+s ago: ", output, re.MULTILINE)
    code, output = run(start, "--server", server.address, "--drop", "eve")
    assert code == 1 and "eve" in output and len(output.splitlines()) == 1
    assert run(start, "--server", server.address, "--drop", "")[0] == 1  # a shell's empty variable


def test_who_reads_no_more_ends_it_quietly(serve, start):
    server = serve()
    script = f"{sys.executable} status.py --server {server.address} --json --watch 0.1 | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    process = start(
        "-c", f"import subprocess; subprocess.run(['bash', '-c', {script!r}], check=True)"
    )
    assert process.wait() == 0 and process.lines == ["141"]
