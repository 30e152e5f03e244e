"""The history of a run: its rules by hand-worked numbers, its file, and what a real server tells.

python -m pytest tests/test_history.py
"""

import json
import os
import signal
import threading
import time
import types

import pytest
import torch
import toy_worker
from conftest import status, until
from peers import Peer, ask, background, numbers, rounds

import protocol
from diloco_callback import DiLoCoCallback, DiLoCoWorker, LightningHooks, Standalone
from protocol import ProtocolError, Refused
from server import MOST_GONE, MOST_NAMES, POINTS, RECENT, Handouts, History, Journal, row_of


def row(number, k=0, **fields):
    """The row of a round in which only these fields are not zero."""
    fields = {"step": 10 * number, "seconds": 0.0, **fields}
    return row_of({"round": number, "fragment": k, **fields})


def filled(*rows):
    """A History with these rows."""
    history = History()
    for each in rows:
        history.add(each)
    return history


def told(history, after=0, span=0):
    """(points, recent rounds) as a reply has them."""
    found = history.later(after, span)
    return [p.told for p in found["points"]], [p.told | more for p, more in found["recent"]]


# --- Points --------------------------------------------------------------------------------------


def test_a_round_is_a_point_and_its_losses_have_five_digits():
    history = filled(
        row(
            1,
            time=100.5,
            losses={"ada": 1.2345678, "bob": 2.0},
            norm=3.0,
            bytes_up=7,
            members=["ada"],
        )
    )
    [point], [last] = told(history)
    assert point == {
        "n": 1, "round": 1, "fragment": 0, "time": 100.5, "step": 10, "members": 1,
        "loss": 1.6173, "losses": {"ada": 1.2346, "bob": 2.0}, "evaluation": None, "evaluations": {},
        "norm": 3.0, "share": 1.0, "bytes_up": 7, "bytes_down": 0, "seconds": 0.0,
        "seconds_waiting": 0.0, "seconds_folding": 0.0, "faults": 0,
    }  # fmt: skip
    assert last == point | {"pushed": {}, "reasons": {}, "joined": [], "left": []}


def test_two_points_become_one_with_means_sums_and_what_was_last():
    first = row(
        1, time=1.0, losses={"ada": 1.0, "bob": 3.0}, norm=2.0, bytes_up=5, seconds=1.5, faults=1
    )
    second = row(2, time=2.0, losses={"ada": 2.0}, norm=4.0, share=0.5, bytes_up=6, seconds=2.5)
    first |= {"evaluations": {"ada": 9.0, "bob": 7.0}, "evaluation": 9.0}
    second |= {"evaluations": {"ada": 5.0}, "evaluation": 5.0}
    a, b = filled(first, second).points
    both = a.with_next(b).told
    assert both["n"] == 2 and both["time"] == 2.0 and both["step"] == 20
    assert both["losses"] == {"ada": 1.5, "bob": 3.0} and both["loss"] == 2.0
    assert both["evaluation"] == 7.0 and both["evaluations"] == {"ada": 5.0, "bob": 7.0}
    assert both["norm"] == 3.0 and both["share"] == 0.75
    assert both["bytes_up"] == 11 and both["seconds"] == 4.0 and both["faults"] == 1


def test_a_mean_of_means_weighs_every_round_alike():
    rows = [row(n, losses={"ada": float(n)} if n < 4 else {}) for n in (1, 2, 3, 4)]
    a, b, c, d = filled(*rows).points
    point = a.with_next(b).with_next(c.with_next(d))
    assert point.rounds == 4 and point.told["losses"] == {"ada": 2.0}


def test_points_are_thinned_by_powers_of_two_and_the_last_one_is_not_full_yet():
    history = filled(*(row(n, seconds=1.0) for n in range(1, POINTS + 1)))
    assert history.span == 1 and len(history.points) == POINTS
    history.add(row(POINTS + 1, seconds=1.0))
    assert history.span == 2 and len(history.points) == POINTS // 2 + 1
    assert [point.rounds for point in history.points][-2:] == [2, 1]
    history.add(row(POINTS + 2, seconds=1.0))
    assert [point.n for point in history.points][-2:] == [POINTS, POINTS + 2]
    for n in range(POINTS + 3, 2000):
        history.add(row(n, seconds=1.0))
    assert history.span == 4 and history.count == 1999
    assert [p.n for p in history.points] == [*range(4, 1999, 4), 1999]
    assert sum(p.sums["seconds"] for p in history.points) == 1999
    assert [p.n for p, _ in history.recent] == list(range(2000 - RECENT, 2000))


def test_who_has_the_points_of_before_gets_the_newer_ones():
    history = filled(*(row(n) for n in range(1, POINTS + 2)))  # a point stands for two
    points, last = told(history, after=POINTS, span=2)
    assert [p["n"] for p in points] == [POINTS + 1] == [p["n"] for p in last]
    history.add(row(POINTS + 2))
    points, last = told(history, after=POINTS + 1, span=2)
    assert [p["n"] for p in points] == [POINTS + 2] == [p["n"] for p in last]
    points, last = told(history, after=POINTS + 1, span=1)  # of before they were thinned
    assert len(points) == POINTS // 2 + 1 and len(last) == 1
    points, last = told(history, after=9999, span=2)  # of rounds that are made again
    assert len(points) == POINTS // 2 + 1 and len(last) == RECENT


def test_only_so_many_workers_are_told_of_and_those_that_were_there_first():
    names = [f"w{n:03}" for n in range(2 * MOST_NAMES)]
    history = filled(row(1, losses=dict.fromkeys(names, 1.0)))
    history.add(row(2, losses=dict.fromkeys(reversed(names), 2.0)))
    a, b = history.points
    assert [*a.losses] == names[:MOST_NAMES] == [*a.with_next(b).losses]


def test_ten_thousand_rounds_of_fifty_workers_stay_small():
    ids = [f"worker-{n}" for n in range(50)]
    pushed = {"trained": 12.345, "waited": 1.234, "transferred": 0.123, "steps": 100, "weight": 1.0}
    history, longest = History(), 0.0
    for n in range(1, 10_001):
        fields = row(n, time=1.76e9 + n, losses={id: 1 + 1 / (n + len(id)) for id in ids})
        fields["evaluations"] = {ids[n % 50]: 1.5}
        fields["pushed"] = dict.fromkeys(ids, pushed | {"late": 0})
        began = time.thread_time()
        history.add(fields)
        longest = max(longest, time.thread_time() - began)
    points, last = told(history)
    size = len(protocol.encode_header({"points": points, "recent": last}, ()))
    newest = told(history, 9999, history.span)
    assert len(points) == 313 and len(last) == 120
    print(f"{size / 1e6:.2f} MB in all, longest {1000 * longest:.1f} ms")
    assert size < 2_000_000
    assert len(protocol.encode_header({"points": newest[0], "recent": newest[1]}, ())) < 20_000
    assert longest < 0.5  # under the server's lock


# --- Rates, totals, who has gone ------------------------------------------------------------------


def test_the_rate_is_that_of_the_last_rounds_with_their_waiting():
    assert History().rate() == 0.0
    assert filled(row(1, seconds=4.0)).rate() == 2.5  # ten steps
    assert filled(row(1, seconds=4.0), row(2, seconds=6.0)).rate() == 2.0
    history = filled(row(1, seconds=1e6), *(row(n, seconds=5.0) for n in range(2, 40)))
    assert history.rate() == 2.0  # the first one is long ago
    assert filled(row(1)).rate() == 0.0  # in no time


def test_a_round_covers_the_time_since_the_last_one_or_the_opening():
    history, line = History(), row(1)
    history.opens(100.0)
    history.close(line, 103.0)
    assert line["seconds"] == 3.0
    history.close(line := row(2), 110.5)
    assert line["seconds"] == 7.5
    history.close(line := row(2, k=1), 110.0)  # its fold took longer
    assert line["seconds"] == 0.0
    history.opens(1000.0)  # a night later
    history.close(line := row(3), 1001.0)
    assert line["seconds"] == 1.0


def test_totals_only_grow_and_events_go_with_the_next_round():
    history = History()
    history.join(["ada", "bob"])
    history.fault(2)
    history.leave("bob", "is gone", 50.0)
    assert history.totals["joins"] == 2 and history.totals["departures"] == 1
    line = row(1, steps=20, tokens=7, bytes_up=3, refused=["ada"], seconds_waiting=1.5)
    history.close(line, 10.0)
    assert (line["joined"], line["left"], line["faults"]) == (
        ["ada", "bob"],
        [["bob", "is gone"]],
        2,
    )
    history.close(line := row(2, steps=20), 11.0)
    assert (line["joined"], line["left"], line["faults"]) == ([], [], 0)
    assert line["totals"] == history.totals == {
        "rounds": 2, "steps": 40, "tokens": 7, "bytes_up": 3, "bytes_down": 0, "seconds_waiting": 1.5,
        "seconds_folding": 0, "refused": 1, "faults": 2, "joins": 2, "departures": 1,
    }  # fmt: skip


def test_who_has_gone_is_known_until_he_is_back_and_the_last_fifty_are():
    history = History()
    for n in range(2 * MOST_GONE):
        history.leave(f"w{n}", "leaves: done", float(n))
    assert [*history.gone] == [f"w{n}" for n in range(MOST_GONE, 2 * MOST_GONE)]
    history.join(["w99"])
    assert "w99" not in history.gone and len(history.gone) == MOST_GONE - 1


def test_an_evaluation_counts_once_however_often_it_is_said():
    history = History()
    for _ in range(3):
        history.evaluate("ada", 100, 2.0, True)
    history.evaluate("bob", 100, 4.0, True)
    history.evaluate("cai", 100, 9.0, False)
    assert history.evaluation == (100, 4.0)
    history.close(line := row(1), 1.0)
    assert line["evaluations"] == {"ada": 2.0, "bob": 4.0, "cai": 9.0} and line["evaluation"] == 3.0
    history.evaluate("ada", 100, 2.0, True)  # in the next heartbeat again
    history.evaluate("bob", 200, 4.0, True)  # the same loss at a later step
    history.close(line := row(2), 2.0)
    assert line["evaluations"] == {"bob": 4.0} and line["evaluation"] == 4.0
    history.evaluate("ada", 150, 1.0, True)
    assert history.evaluation == (200, 4.0)


# --- A restart ------------------------------------------------------------------------------------


def test_rounds_that_are_made_again_take_the_place_of_the_old_ones():
    history = filled(*(row(n, time=1.0, steps=5) for n in range(1, 11)))
    history.add(row(6, time=2.0, steps=5))
    points, last = told(history)
    assert [p["round"] for p in points] == [1, 2, 3, 4, 5, 6] == [p["round"] for p in last]
    assert points[-1]["time"] == 2.0 and history.count == points[-1]["n"] == 6
    assert history.totals["rounds"] == 11 and history.totals["steps"] == 55


def test_rounds_of_several_slices_are_made_again_together():
    history = filled(*(row(n, k, time=1.0) for n in range(1, 6) for k in range(3)))
    for n in (3, 4):
        for k in range(3):
            history.add(row(n, k, time=2.0))
    points, _ = told(history)
    assert [(p["round"], p["fragment"]) for p in points] == [
        (n, k) for n in range(1, 5) for k in range(3)
    ]
    assert [p["time"] for p in points] == [1.0] * 6 + [2.0] * 6


def test_a_point_in_which_rounds_are_made_again_is_made_anew_from_the_last_rounds():
    history = filled(*(row(n, losses={"ada": 1.0}) for n in range(1, 2001)))  # four in a point
    history.add(row(1991, losses={"ada": 3.0}))
    assert [p.n for p in history.points[-2:]] == [1988, 1991]
    assert history.points[-1].rounds == 3
    assert history.points[-1].told["losses"] == {"ada": pytest.approx(5 / 3, rel=1e-4)}
    history.add(row(500))  # further back than the last rounds: whole points go
    assert [p.n for p in history.points[-2:]] == [496, 497] and history.count == 497
    assert len(history.recent) == 1


def test_the_newest_evaluation_of_the_rounds_that_are_left_is_the_newest():
    history = History()
    for n in range(1, 6):
        history.evaluate("ada", 10 * n, 10.0 - n, True)
        history.close(row(n), float(n))
    assert history.evaluation == (50, 5.0)
    history.add(row(3))
    assert history.evaluation == (20, 8.0)


def lines_of(history, *rows):
    """The lines that these rounds write, each after a join and a leaving."""
    for n, each in enumerate(rows):
        history.join([f"w{n}"])
        history.leave(f"w{n}", "leaves: done", 50.0 + n)
        history.fault(1)
        history.evaluate("ada", each["step"], 1 / (n + 1), n % 2 == 0)
        history.close(each, 3.0 * n)
    return [json.loads(json.dumps(each)) for each in rows]


def test_a_history_that_is_read_back_is_the_one_of_before():
    before, after = History(), History()
    rows = [row(n, time=50.0 + n - 1, steps=5, losses={"ada": 1.0}) for n in range(1, 700)]
    for line in lines_of(before, *rows):
        after.restore(row_of(line))
    assert told(after) == told(before) and after.totals == before.totals
    assert after.gone == before.gone
    after.evaluate("ada", 6980, 1 / 699, True)  # said again to the new server
    assert not after.tests and after.evaluation == before.evaluation


def test_lines_of_earlier_versions_are_read_too():
    old = {
        "time": 5.0, "round": 1, "fragment": 0, "members": ["ada", "bob"], "staleness": {}, "steps": 20,
        "tokens": 0, "losses": {"ada": 1.0, "bob": None}, "refused": [], "closing": False, "share": 1.0,
        "quorum": None, "grace": 0.0, "weights": {"ada": 1.0, "bob": 1.0}, "norm": 2.0, "norms": {},
        "reasons": {}, "bytes_up": 1, "bytes_down": 2, "seconds_waiting": 3.0, "seconds_folding": 4.0,
    }  # fmt: skip
    history = History()
    history.restore(row_of(old))
    history.restore(row_of(old | {"round": 2, "time": 9.0}))
    [first, second], _ = told(history)
    assert (first["step"], second["step"], second["seconds"]) == (10, 20, 4.0)
    assert second["losses"] == {"ada": 1.0} and second["members"] == 2
    assert history.totals["steps"] == 40 and history.totals["seconds_folding"] == 8.0


@pytest.mark.parametrize(
    "damage",
    [{"round": "x"}, {"fragment": -1}, {"time": "now"}, {"steps": 1.5}, {"members": 3}, {"left": {}},
     {"norm": -1.0}, {"share": 1e99}, {"pushed": []}, {"round": True}, {"step": 1 << 60}],
)  # fmt: skip
def test_a_line_with_a_damaged_field_is_no_row(damage):
    with pytest.raises(ProtocolError):
        row_of({"round": 1, "fragment": 0, **damage})


def test_what_is_damaged_within_a_table_is_left_out():
    found = row(
        1, losses={"ada": 1.0, "bob": "x", "\ud800": 1.0, "cai": 1e99, "dan": True}, left=[["ada"], 3],
        joined=["ada", 3, "b\n"], reasons={"ada": 5, "bob": "too old"}, totals={"steps": -1, "rounds": 3},
        pushed={"ada": {"trained": 1.0, "weight": "x"}, "bob": 3},
    )  # fmt: skip
    assert found["losses"] == {"ada": 1.0} and found["left"] == [] and found["joined"] == ["ada"]
    assert found["reasons"] == {"bob": "too old"} and found["totals"] == {"rounds": 3}
    assert found["pushed"]["ada"]["trained"] == 1.0 and found["pushed"]["ada"]["weight"] == 0
    protocol.parse_json(protocol.encode_header(found, ())[8:], "what is told")


# --- The file -------------------------------------------------------------------------------------


def test_lines_that_cannot_be_read_are_passed_over(tmp_path, capsys):
    whole = json.dumps({"round": 1, "fragment": 0}).encode()
    noise = os.urandom(300).replace(b"\n", b"")
    parts = [whole, b"", b"[1, 2]", b"3", b"null", b"{", b"[" * 100_000, noise, whole + b"x", whole]
    (tmp_path / "rounds.jsonl").write_bytes(b"\n".join(parts) + b"\n")
    assert [each["round"] for each in Journal(tmp_path).rows()] == [1, 1]
    assert "8 lines of" in capsys.readouterr().out


def test_files_that_cannot_be_read_keep_no_server_from_starting(tmp_path, capsys):
    (tmp_path / "rounds-old.jsonl").mkdir()
    (tmp_path / "rounds.jsonl").write_text('{"round": 1, "fragment": 0}\n')
    assert len([*Journal(tmp_path).rows()]) == 1
    assert "Is a directory" in capsys.readouterr().out
    assert [*Journal(tmp_path / "none").rows()] == []


def test_a_line_without_an_end_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"round": 1, "fragment": 0}\n{"round": 2, "fra')
    journal = Journal(tmp_path)
    assert len([*journal.rows()]) == 1
    journal.append([{"round": 2, "fragment": 0}])
    journal.append([{"round": 3, "fragment": 0}])
    assert [each["round"] for each in Journal(tmp_path).rows()] == [1, 2, 3]


def test_a_large_file_is_renamed_and_read_back_with_the_new_one(tmp_path):
    line = {"fragment": 0, "text": "x" * 100}
    journal = Journal(tmp_path, most=1000)
    for n in range(1, 31):
        journal.append([{"round": n, **line}])
    sizes = [os.path.getsize(tmp_path / name) for name in ("rounds-old.jsonl", "rounds.jsonl")]
    assert all(0 < size <= 1000 + 200 for size in sizes)
    found = [each["round"] for each in Journal(tmp_path).rows()]
    assert found == list(range(found[0], 31)) and 8 <= len(found) < 20


def test_totals_outlive_the_files_that_had_them(tmp_path):
    before, after, journal = History(), History(), Journal(tmp_path, most=2000)
    for line in lines_of(before, *(row(n, steps=5) for n in range(1, 31))):
        journal.append([line])
    for each in Journal(tmp_path).rows():
        after.restore(each)
    assert after.count < 30 and after.totals == before.totals


# --- A real server --------------------------------------------------------------------------------


def pair(server):
    """Two peers that have joined."""
    ada, bob = Peer(server, "ada"), Peer(server, "bob")
    waits = background(ada.join)
    bob.join()
    waits.result(60)
    return ada, bob


def test_a_server_that_is_killed_and_started_again_has_the_history_of_before(serve, tmp_path):
    server = serve("-n", 1, "--save-every", 1)
    ada = Peer(server, "ada").join()
    for n in range(1, 5):
        told = {"evaluation": {"step": 5 * n, "loss": 1.0 / n, "is_global": True}, "loss": 2.0 / n}
        ada.push(
            numbers(n), trained=2.0 * n, waited=1.0 * n, transferred=0.5 * n, made=5 * n, **told
        )
    rounds(tmp_path / "model", 4)
    until(lambda: (tmp_path / "model" / "checkpoint-4").exists(), "a checkpoint")
    before, totals = ask(server, "history"), status(server)["totals"]
    assert before["count"] == 4 and before["span"] == 1
    assert [p["step"] for p in before["points"]] == [5, 10, 15, 20]
    assert [p["losses"]["ada"] for p in before["points"]] == [2.0, 1.0, 0.66667, 0.5]
    assert [p["evaluation"] for p in before["points"]] == [1.0, 0.5, 0.33333, 0.25]
    assert before["recent"][0]["joined"] == ["ada"]
    assert before["recent"][1]["pushed"]["ada"] == {
        "trained": 2.0, "waited": 1.0, "transferred": 0.5, "steps": 5, "weight": 1.0, "late": 0,
    }  # fmt: skip
    assert status(server)["evaluation"] == {"step": 20, "loss": 0.25}
    server.kill()
    server = serve("-n", 1, "--save-every", 1)
    after = ask(server, "history")
    assert after.pop("session") != before.pop("session") and after == before
    found = status(server)
    assert found["totals"] == totals and found["evaluation"] == {"step": 20, "loss": 0.25}
    ada.server = server.address
    ada.data.close()
    ada.data = None
    ada.join()
    ada.push(numbers(9))
    until(lambda: ask(server, "history")["count"] == 5, "a round more")
    found = status(server)["totals"]
    assert found["rounds"] == 5 and found["joins"] == 1  # it has not been away
    newer = ask(server, "history", after=4, span=1)
    assert [p["n"] for p in newer["points"]] == [5] == [p["n"] for p in newer["recent"]]


def test_the_status_says_what_each_worker_does_and_when_the_run_ends(serve):
    server = serve("-n", 2)
    ada, bob = pair(server)

    def worker(id):
        return next(each for each in status(server)["workers"] if each["id"] == id)

    found = status(server)
    assert found["schema"] == 1 and abs(found["time"] - time.time()) < 5
    assert found["rate"] == 0.0 and found["max_steps"] == 0 and found["ends_in_seconds"] is None
    assert found["loss"] is None and found["evaluation"] is None and found["gone"] == []
    assert [each["state"] for each in found["workers"]] == ["training"] * 2
    assert worker("ada")["training"] is None and worker("ada")["joined_seconds_ago"] < 30
    ada.send(numbers(1), made=5, trained=3.0, waited=1.0, loss=2.0)
    assert worker("ada")["state"] == "waiting" and worker("ada")["waits_for"] == ["bob"]
    assert worker("ada")["training"] == 0.75 and worker("bob")["state"] == "training"
    said = {"step": 4, "loss": 3.5, "is_global": False}
    bob.heartbeat(max_steps=100, loss=4.0, evaluation=said, step=4)
    assert worker("bob")["evaluation"] == {"step": 4, "loss": 3.5}
    assert worker("bob")["max_steps"] == 100 and status(server)["loss"] == 3.0
    bob.push(numbers(2))
    ada.pull()
    found = until(lambda: status(server)["rate"] and status(server), "a rate")
    assert found["max_steps"] == 100
    assert found["ends_in_seconds"] == pytest.approx(95 / found["rate"], rel=0.01)
    assert found["evaluation"] is None  # none of the global model
    bob.leave("has better things to do")
    [gone] = status(server)["gone"]
    assert gone["id"] == "bob" and "better things" in gone["why"] and gone["seconds_ago"] < 30


def test_a_worker_whose_push_is_arriving_is_pushing_and_a_silent_one_is_away(serve):
    server = serve("-n", 2, "--worker-timeout", "4")
    ada, bob = pair(server)
    payload = protocol.Payload(protocol.CODECS["bf16"].layout(bob.slice(0).numel()))
    fields = {"slice": 0, "seq": 1, "base": bob.version, "step": 5, "steps": 5}
    frame = protocol.encode_header({"type": "push", **fields}, payload.specs)
    bob.data = bob.data or bob.connect()
    bob.data.send_raw(frame)  # and no number yet

    def states():
        ada.heartbeat()
        return {each["id"]: each["state"] for each in status(server)["workers"]}

    until(lambda: states() == {"ada": "training", "bob": "pushing"}, "the push is arriving")
    until(lambda: states() == {"ada": "training", "bob": "away"}, "bob says nothing")
    until(lambda: states() == {"ada": "training"}, "bob is given up")
    assert "not heard of" in status(server)["gone"][0]["why"]


@pytest.mark.parametrize(
    "lie",
    [{"evaluation": 3}, {"evaluation": {"step": 1, "loss": "x", "is_global": True}}, {"max_steps": -1},
     {"evaluation": {"step": 1, "loss": 1e31, "is_global": True}}, {"transferred": -1.0},
     {"evaluation": {"step": -1, "loss": 1.0, "is_global": True}}, {"max_steps": 1.5},
     {"evaluation": {"step": 1, "loss": 1.0}}, {"evaluation": {"step": 1, "loss": None, "is_global": 1}}],
)  # fmt: skip
def test_what_is_no_evaluation_or_length_is_refused(serve, lie):
    server = serve("-n", 1)
    ada = Peer(server, "ada").join()
    with pytest.raises(Refused):
        ada.heartbeat(**lie)
    assert status(server)["evaluation"] is None


def test_an_evaluation_is_no_further_than_its_worker(serve):
    server = serve("-n", 1)
    ada = Peer(server, "ada").join()
    ada.heartbeat(step=3, evaluation={"step": 1 << 50, "loss": 1.0, "is_global": True})
    assert status(server)["evaluation"] == {"step": 3, "loss": 1.0}


def test_names_that_are_far_too_long_leave_a_reply_that_can_be_sent():
    history = History()
    for n in range(1, 131):
        losses = {"\U00020000" * 250 + str(i): 1.0 for i in range(MOST_NAMES)}
        history.add(row(n, losses=losses, left=[[id, "gone"] for id in losses]))
    shell = types.SimpleNamespace(lock=threading.Lock(), history=history, session="5e55")
    frame = Handouts(shell).history(0, 0).result()
    fields = protocol.parse_json(protocol.parse_json(frame[8:], "")["__metadata__"]["diloco"], "")
    assert len(fields["points"]) == 130 and fields["recent"][-1]["n"] == 130
    assert fields["points"][0]["loss"] == 1.0 and fields["points"][0]["losses"] == {}
    assert fields["recent"][0]["left"] == []


# --- A worker that is dropped ---------------------------------------------------------------------


def test_a_dropped_worker_that_trains_ends_and_its_steps_count(serve, toy):
    server = serve("-n", 2, "--outer-lr", 0)  # so that it never diverges
    ada = toy(server, "ada", steps=100000, sync_every=5, pause=0.005)
    bob = toy(server, "bob", steps=100000, sync_every=5, pause=0.005)
    until(lambda: status(server)["round"] >= 2, "two rounds")
    with pytest.raises(Refused, match="no member is called"):
        ask(server, "drop", worker="cai")
    assert ask(server, "drop", worker="bob") == {}
    assert bob.wait() == 0
    end = json.loads(bob.lines[-1])
    assert end["metrics"]["diloco/dropped_steps"] == 0
    assert "leaves: done" in server.wait_for("bob (leaves.*)")[1]
    number = status(server)["round"]
    until(lambda: status(server)["round"] > number + 2, "the run goes on")
    assert [each["id"] for each in status(server)["workers"]] == ["ada"]
    again = toy(
        server, "bob", steps=100000, sync_every=5, pause=0.005
    )  # who is started anew may join
    until(lambda: len(status(server)["workers"]) == 2, "bob is back")
    number = status(server)["round"]
    until(lambda: status(server)["round"] > number + 5, "bob takes part")
    assert len(status(server)["workers"]) == 2
    ask(server, "stop")
    assert ada.wait() == 0 and again.wait() == 0


def test_a_stuck_worker_that_is_dropped_is_awaited_no_more(serve, toy):
    server = serve("-n", 2, "--outer-lr", 0)  # so that it never diverges
    toy(server, "ada", steps=100000, sync_every=5, pause=0.005)
    toy(server, "bob", steps=100000, sync_every=5, pause=100000)
    until(lambda: status(server)["awaited"] == ["bob"], "ada waits for bob")
    ask(server, "drop", worker="bob")
    until(lambda: status(server)["round"] >= 3, "rounds without bob")
    found = status(server)
    assert [each["id"] for each in found["workers"]] == ["ada"]
    assert found["gone"][0]["id"] == "bob" and "is dropped" in found["gone"][0]["why"]


def test_who_does_not_come_back_after_a_crash_has_gone_and_can_be_dropped(serve, toy):
    """A member from before a crash that is away holds up the others: --drop ends that, too."""
    server = serve("-n", 3, "--worker-timeout", 8)
    port = server.port
    ada, bob, cleo = [
        toy(server, id, steps=100000, sync_every=5, pause=0.01, lr=0.001) for id in ("ada", "bob", "cleo")
    ]  # fmt: skip
    until(lambda: status(server)["round"] >= 2, "rounds")
    bob.kill()
    cleo.signal(signal.SIGSTOP)
    server.kill()
    server = serve("-n", 3, "--worker-timeout", 8, "--port", port)
    until(lambda: status(server)["expected"] == ["bob", "cleo"], "ada is back")
    with pytest.raises(Refused, match="eve; the members: ada, bob, cleo"):
        ask(server, "drop", worker="eve")
    ask(server, "drop", worker="cleo")
    assert status(server)["expected"] == ["bob"]
    cleo.signal(signal.SIGCONT)
    until(lambda: [w["id"] for w in status(server)["workers"]] == ["ada"], "the run goes on")
    gone = {each["id"]: each["why"] for each in status(server)["gone"]}
    assert gone["bob"] == "has not come back" and gone["cleo"]
    assert cleo.wait() == 0, cleo.output
    assert ada.process.poll() is None


# --- What a worker says ---------------------------------------------------------------------------


def joined(server, **options):
    model = toy_worker.build((5, 7, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return (
        DiLoCoWorker(model, optimizer, server.address, 5, "ada", **options).start(),
        model,
        optimizer,
    )


def steps(model, optimizer, count):
    for _ in toy_worker.train(model, optimizer, count, 0):
        pass


def test_an_evaluation_is_global_where_no_step_was_made_since_the_adoption(serve, clean):
    server = serve("-n", 1)
    worker, model, optimizer = joined(server)
    worker.evaluated(9.0)
    assert worker.evaluation == {"step": 0, "loss": 9.0, "is_global": True}
    steps(model, optimizer, 3)
    worker.evaluated(torch.tensor(8.0))
    assert worker.evaluation == {"step": 3, "loss": 8.0, "is_global": False}
    with worker.global_model():
        worker.evaluated(7.0)
    assert worker.evaluation["is_global"] and not worker.shows_global
    steps(model, optimizer, 2)
    worker.evaluated(6.0)
    assert worker.evaluation == {"step": 5, "loss": 6.0, "is_global": True}
    worker.evaluated(float("nan"))
    assert worker.evaluation["loss"] == 6.0
    assert not worker.run_is_over(1000) and worker.max_steps == 1000
    assert not worker.run_is_over(-1) and worker.max_steps == 0
    assert 0 < worker.replica.transferred < time.monotonic() - worker.started
    worker.run_is_over(1000)
    steps(model, optimizer, 5)
    found = status(server)
    assert found["evaluation"] == {"step": 5, "loss": 6.0} and found["max_steps"] == 1000
    assert until(lambda: found["last_round"], "a round")["pushed"]["ada"]["transferred"] > 0
    worker.evaluated(5.0)
    worker.close()
    assert status(server)["evaluation"] == {"step": 10, "loss": 5.0}  # in its last words


def test_a_slice_that_is_under_way_makes_the_model_no_global_one(serve, clean):
    server = serve("-n", 1)
    worker, model, optimizer = joined(server, num_fragments=2, fragment_sync_delay=1)
    steps(model, optimizer, 7)
    worker.evaluated(1.0)
    assert not worker.evaluation["is_global"]
    with worker.global_model():
        worker.evaluated(1.0)
    assert worker.evaluation["is_global"]


def test_a_standalone_worker_notes_the_same():
    model = toy_worker.build((5, 7, 2))
    alone = Standalone(torch.optim.SGD(model.parameters(), lr=0.05))
    assert alone.evaluation is None and alone.max_steps == 0
    steps(model, alone.optimizer, 2)
    alone.evaluated(torch.tensor(3.0))
    assert alone.evaluation == {"step": 2, "loss": 3.0, "is_global": True}
    assert not alone.run_is_over(10) and alone.max_steps == 10
    assert not alone.run_is_over(-1) and alone.max_steps == 0
    alone.close()


def test_the_hook_of_a_trainer_reports_its_evaluation(serve, clean):
    server = serve("-n", 1)
    model = toy_worker.build((5, 7, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    callback = DiLoCoCallback(server.address, 5, "ada")
    callback.on_evaluate(None, None, None, metrics={"eval_loss": 1.0})  # before there is a worker
    callback.on_train_begin(None, None, None, model, optimizer)
    callback.on_evaluate(None, None, None, metrics={"eval_loss": 2.0, "eval_runtime": 1.0})
    assert callback.worker.evaluation == {"step": 0, "loss": 2.0, "is_global": True}
    callback.on_evaluate(None, None, None, metrics={"eval_accuracy": 1.0})
    callback.on_evaluate(None, None, None)
    assert callback.worker.evaluation["loss"] == 2.0
    callback.close()


def test_the_hook_of_lightning_leaves_out_the_check_before_training(serve, clean):
    server = serve("-n", 1)
    model = toy_worker.build((5, 7, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    metrics = {"val_loss": torch.tensor(3.0)}
    trainer = types.SimpleNamespace(
        optimizers=[optimizer], callback_metrics=metrics, sanity_checking=True
    )
    hooks = LightningHooks(server.address, 5, "ada")
    hooks.on_validation_end(trainer, model)
    hooks.on_train_start(trainer, model)
    hooks.on_validation_end(trainer, model)
    assert hooks.worker.evaluation is None
    trainer.sanity_checking = False
    hooks.on_validation_end(trainer, model)
    assert hooks.worker.evaluation == {"step": 0, "loss": 3.0, "is_global": True}
    metrics.clear()
    hooks.on_validation_end(trainer, model)
    assert hooks.worker.evaluation["loss"] == 3.0
    hooks.close()
