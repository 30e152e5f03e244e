"""What a sync costs and which codecs would hide it: the server's rule, and tests/plan.py.

python -m pytest tests/test_plan.py
"""

import types

import bench_link
import plan
import pytest
from test_rules import opened

import server
from protocol import CODECS, payload_bytes
from server import Reading, fitting, parse_args, priced

SIZES = {"fp32": 400, "bf16": 200, "int8": 103, "int4": 53, "int2": 28, "top16": 6.5, "top32": 3.2}


@pytest.mark.parametrize(
    ("up", "down", "training", "slices", "delay", "seconds"),
    [
        (3.0, 1.0, 16.0, 1, 0.0, 4.0),  # full sync waits for every byte
        (3.0, 1.0, 16.0, 1, 3.0, 1.0),  # or for what is longer than the delay
        (3.0, 1.0, 16.0, 4, 4.0, 0.0),  # a trip of 1 s fits into 4 s
        (12.0, 12.0, 16.0, 4, 4.0, 8.0),  # one of 6 s does not: 2 s for each of four slices
        (12.0, 12.0, 16.0, 4, 1.0, 20.0),
        (12.0, 12.0, 16.0, 4, 8.0, 0.0),  # two are under way at a time
        (20.0, 4.0, 16.0, 4, 8.0, 4.0),  # but the way up takes 5 s for each
        (24.0, 12.0, 16.0, 4, 8.0, 8.0),
        (1.0, 1.0, 0.0, 1, 0.0, 2.0),
    ],
)
def test_what_a_sync_costs(up, down, training, slices, delay, seconds):
    sync = priced(up, down, training, slices, delay)
    assert sync.seconds == pytest.approx(seconds)
    assert sync.share == pytest.approx(seconds / (seconds + training))


def test_what_is_not_the_line_stays_whatever_the_codec():
    assert priced(3.0, 1.0, 16.0, rest=2.0).seconds == 6.0
    assert priced(3.0, 1.0, 16.0, 4, 4.0, rest=12.0).seconds == 0.0
    assert priced(3.0, 1.0, 16.0, 4, 4.0, rest=16.0).seconds == 4.0
    assert fitting(SIZES, (100, 100), 77.0) == ("bf16", "bf16")
    assert fitting(SIZES, (100, 100), 77.0, rest=1.0) == ("int8", "int8")
    assert fitting(SIZES, (100, 100), 77.0, rest=5.0) is None


@pytest.mark.parametrize(
    ("rates", "training", "slices", "delay", "pair"),
    [
        ((100, 100), 77.0, 1, 0.0, ("bf16", "bf16")),  # 4 of 81 s
        ((100, 100), 75.0, 1, 0.0, ("int8", "int8")),  # 4 of 79 s would be over 5%
        ((100, 100), 30.0, 1, 0.0, ("int4", "int4")),
        ((100, 100), 12.0, 1, 0.0, ("int2", "int2")),
        ((10, 100), 59.0, 1, 0.0, ("int2", "int2")),  # 2.8 + 0.28 s of 62.1
        ((10, 100), 58.0, 1, 0.0, None),
        ((100, 100), 10.0, 1, 0.0, None),
        ((100, 100), 5.0, 4, 1.25, ("bf16", "bf16")),  # streaming: 1 s fits into 1.25 s
        ((100, 100), 2.5, 4, 0.625, ("int8", "int8")),
        ((100, 100), 0.2, 4, 0.05, None),
    ],
)
def test_the_least_lossy_codecs_that_hide_the_sync(rates, training, slices, delay, pair):
    assert fitting(SIZES, rates, training, slices, delay) == pair


def test_a_sync_is_known_when_training_has_gone_on_behind_it():
    run = opened("ada", "bob", count=1)
    paces, ada, bob = run.paces, run.members["ada"], run.members["bob"]
    ada.cycle = bob.cycle = 10
    paces.note(ada, Reading(10, 5.0, 0.0, 30.0), is_push=True)  # it has downloaded the model
    assert paces.spent(ada, 0.6) == (10, 5.0, 0.0, 30.0, 0.0)
    ada.blocked = 0, 1
    paces.note(ada, Reading(10, 5.0, 0.5, 30.6, 0.6), is_push=False)
    assert paces.sync(1) is None
    ada.blocked = ()
    paces.note(ada, Reading(12, 6.0, 2.0, 31.0, 0.6), is_push=False)
    assert paces.sync(1) == (2.0, 5.0, 0.6, pytest.approx(0.4), 0.0)
    paces.note(bob, Reading(10, 8.0, 0.0, 0.0), is_push=True)  # slower, and so the last to come
    paces.spent(bob, 0.1)
    paces.note(bob, Reading(20, 16.0, 1.0, 0.3, 0.1), is_push=True)
    assert paces.sync(1) == (1.0, 8.0, 0.6, pytest.approx(0.4), 0.0)
    ada.blocked = 0, 2  # in its next sync: what that has taken so far does not count yet
    paces.note(ada, Reading(20, 10.0, 9.0, 31.0, 0.6), is_push=False)
    assert paces.sync(1).seconds == 1.0


def test_of_a_slice_under_way_only_a_whole_interval_counts():
    run = opened("ada", count=4)
    paces, ada = run.paces, run.members["ada"]
    ada.cycle = 20
    paces.note(ada, Reading(5, 10.0, 0.0, 0.0), is_push=True)
    paces.spent(ada, 0.5, delay=10.0)
    paces.note(ada, Reading(8, 16.0, 0.0, 0.5, 0.5), is_push=False)
    assert paces.sync(4) is None
    paces.note(ada, Reading(10, 20.0, 0.25, 1.5, 0.5), is_push=True)
    assert paces.sync(4) == (1.0, 40.0, 2.0, 4.0, 10.0)


def synced(*options, waited, training, count=10**6, rate=1e6):
    """A stand-in for a server whose only worker has sent and received so many bytes a second."""
    args = parse_args(["-m", "x", *options])
    run = opened("ada", count=1)
    sizes = [
        payload_bytes(CODECS[c].layout(count)) for c in (args.upload_codec, args.download_codec)
    ]
    ada = run.members["ada"]
    ada.cycle = 10
    run.paces.note(ada, Reading(10, training, 0.0), is_push=True)
    run.paces.spent(ada, sizes[0] / rate)
    moved = sum(sizes) / rate
    reading = Reading(20, 2 * training, waited, moved, sizes[0] / rate)
    run.paces.note(ada, reading, is_push=True)
    model = types.SimpleNamespace(num_fragments=1, total=count)
    return types.SimpleNamespace(args=args, run=run, model=model, closed=False, round=1)


def told(*options, **facts):
    """What a status says of a sync."""
    return server.told_sync(synced(*options, **facts))


def test_a_status_says_what_a_sync_costs_and_what_would_hide_it():
    assert told(waited=4.0, training=25.0) == {
        "seconds": 4.0,
        "share": 0.1379,
        "mbit_up": 8.0,
        "mbit_down": 8.0,
        "advice": "--upload-codec int4 --download-codec int4 would hide it",
    }
    assert told(waited=4.1, training=80.0)["advice"] == ""
    assert "no codec would" in told(waited=4.1, training=2.0)["advice"]
    assert "int2" in told("--upload-codec", "int4", waited=2.6, training=12.0)["advice"]
    assert "no codec would" in told(waited=5.1, training=20.5)["advice"]  # 1.1 s are not the line's
    # What waits so long with so few bytes waits for something else than these.
    few = "--upload-codec", "int2", "--download-codec", "int2"
    assert "no codec would" in told(*few, waited=9.0, training=20.0)["advice"]


def test_the_log_says_once_what_a_sync_costs_where_no_codec_was_chosen(capsys):
    for options, count in ((), 1), (["--upload-codec", "bf16"], 0):
        shell = synced(*options, waited=4.0, training=25.0)
        watch, ada = server.Watch(shell), shell.run.members["ada"]
        sync, ada.sync = ada.sync, None
        watch.look()
        assert "sync" not in capsys.readouterr().out
        ada.sync = sync
        watch.look()
        watch.look()
        text = "for 4.00 s a round, 13.8%; --upload-codec int4 --download-codec int4 would hide it"
        assert capsys.readouterr().out.count(text) == count


def test_auto_is_bf16_with_advice():
    for options, codec, advises in (
        ([], "bf16", True),
        (["--upload-codec", "auto"], "bf16", True),
        (["--upload-codec", "bf16"], "bf16", False),
        (["--upload-codec", "top16"], "top16", False),
    ):
        args = parse_args(["-m", "x", *options])
        assert (args.upload_codec, args.advises) == (codec, advises)


def test_a_plan_by_hand():
    # 2 bytes a number: 12.8 MB, with headers 13.38 MB, over half of the 4 Mbit/s of the server.
    case = plan.Case(6_400_000, 2, mbit=10.0, server_mbit=4.0, step_seconds=0.5)
    line = 12.8 * 8 / 2 * 1514 / 1448
    assert case.ways("bf16", "bf16") == pytest.approx((line, line))
    full = case.sync(("bf16", "bf16"), 100)
    assert full.seconds == pytest.approx(2 * line)
    assert full.share == pytest.approx(2 * line / (50 + 2 * line))
    assert case.sync(("bf16", "bf16"), 100, 4).seconds == pytest.approx(2 * line - 50)
    assert case.sync(("bf16", "bf16"), 300, 4).seconds == 0
    assert plan.needed(case, ("bf16", "bf16")) == pytest.approx(2 * line * 19)
    # Full sync with int4, of 34 bytes for 64 numbers, takes 28.4 s, over 5% of 250 s. In the 50 s
    # of 100 steps streaming hides with int4, in those of 500 with bf16.
    assert case.bytes("int4") == 3_400_000
    assert case.choice([100, 200, 500], 4) == (("bf16", "bf16"), 500, 4)
    assert case.choice([100], 4) == (("int4", "int4"), 100, 4)
    assert case.choice([2000, 5000], 4) == (("bf16", "bf16"), 5000, 1)  # 107 s of 2500
    assert case.choice([10], 4) is None
    said = plan.advice(case, [10, 100], 4)
    assert said.startswith("Take streaming in 4 fragments, --upload-codec int4 ")
    assert plan.advice(case, [10], 4).startswith("Nothing here hides the sync")


def test_where_the_line_is_fast_arithmetic_counts():
    case = plan.Case(10**9, 50, mbit=1e6, server_mbit=1e6)
    up, down = case.ways("int4", "int4")
    assert up == pytest.approx(10**9 * plan.ENCODE)
    assert down == pytest.approx(10**9 * (50 * plan.FOLD + plan.STEP) / case.threads)


def test_the_table_of_the_readme_is_of_this_model():
    with open(f"{bench_link.ROOT}/README.md", encoding="utf-8") as file:
        text = file.read()
    assert "\n".join(plan.table()) in text
