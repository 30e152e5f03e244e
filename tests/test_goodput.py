"""The faults and the accounts of tests/goodput.py, without processes.

python -m pytest tests/test_goodput.py
"""

import itertools
import types

import goodput
import pytest
from goodput import LEAST_GAP, account, faults, lockstep, overlaps, uptimes


def trail_of(*pushes, dropped=0):
    """A trail with one fold of pushes (steps, versions behind)."""
    listed = [["ada", "session", seq, *push] for seq, push in enumerate(pushes, 1)]
    counts = {"dropped steps (sum over fragments)": dropped}
    return types.SimpleNamespace(
        chains=[["v1"]], folds={"v1": {"pushes": listed}}, count=1, counts=counts
    )


def ticks(first, count, held=0.0):
    """Steps of 0.1 s, the first one after `held` seconds in the optimizer's step before."""
    return [(first + 0.1 * i, 0.0 if i else held) for i in range(count)]


def test_each_worker_is_gone_a_third_of_the_time():
    found = faults(1, 40, 3000.0)
    gone = sum(overlaps(spans, 0.0, 3000.0) for spans in found)
    assert gone / (40 * 3000.0) == pytest.approx(1 / 3, abs=0.02)
    at_once = sum(any(a <= 0.0 < b for a, b in spans) for spans in faults(2, 600, 1.0))
    assert at_once / 600 == pytest.approx(1 / 3, abs=0.06)


@pytest.mark.parametrize("seed", range(5))
def test_a_minute_at_least_lies_between_two_faults_of_a_worker(seed):
    for spans in faults(seed, 8, 1200.0):
        assert spans[0][1] > 0.0 and spans[-1][0] < 1200.0
        for (gone, back), (again, _) in itertools.pairwise(spans):
            assert gone < back < again and again - gone >= LEAST_GAP


def test_the_faults_come_from_the_seed_alone():
    assert faults(3, 8, 300.0) == faults(3, 8, 300.0) != faults(4, 8, 300.0)


def test_a_machine_is_up_from_its_first_step_until_it_goes():
    outages = [(-5.0, 4.0), (20.0, 30.0), (90.0, 95.0)]
    assert uptimes(outages, 50.0, start=2.0) == [(6.0, 20.0), (32.0, 50.0)]
    assert uptimes([], 50.0) == [(0.0, 50.0)]


def test_lockstep_training_moves_only_while_all_are_up():
    # Both are up until 10 s, and start anew at 20 s, which takes 3 s.
    outages = [[(10.0, 20.0)], []]
    up, useful = lockstep(outages, 40.0, rate=10.0, start=3.0, regroup=False)
    assert up == pytest.approx(10.0 + 17.0 + 40.0)
    assert useful == 2 * 100 + 2 * 170
    # The other one goes on alone from 13 s to 20 s.
    assert lockstep(outages, 40.0, 10.0, 3.0, regroup=True)[1] == 2 * 100 + 70 + 2 * 170


def test_lockstep_training_loses_what_no_checkpoint_has():
    assert lockstep([[(10.55, 60.0)]], 60.0, rate=10.0, start=1.0, regroup=False)[1] == 100


def test_steps_of_unhindered_workers_all_count():
    lives = [(0.0, ticks(5.0, 100), 0), (0.0, ticks(7.0, 50), 12.0)]
    found = account(lives, [], trail_of((100, 0), (50, 2)))
    assert found.up == pytest.approx(15.0) and found.rate == pytest.approx(10.0)
    assert found.goodput == pytest.approx(1.0) and (found.made, found.late) == (150, 50)
    assert found.start == pytest.approx(6.0)


def test_waits_and_lost_steps_are_told_apart():
    waiting = [*ticks(0.0, 50), *ticks(8.0, 50, held=3.0), *ticks(30.0, 50, held=17.0)]
    killed = ticks(0.0, 45)
    joins = [{"event": "joined", "time": 31.0}]
    found = account([(0.0, waiting, 0), (0.0, killed, 4.5)], joins, trail_of((150, 0), (40, 0)))
    assert found.waits["waited after a fault"] == pytest.approx(3.0)
    assert found.waits["waited for a join"] == pytest.approx(17.0)
    assert found.made - found.useful == 5
    rest = sum(found.waits.values()) * found.rate + found.made - found.useful
    assert found.possible - found.useful == pytest.approx(rest)


def test_a_process_that_made_no_step_was_never_up():
    found = account([(0.0, [], 30.0)], [], trail_of())
    assert (found.up, found.made, found.goodput) == (0.0, 0, 0.0)


def test_a_wait_is_put_down_to_a_fault_before_a_join_before_a_round():
    assert goodput.cause_of(10.0, 13.0, [9.0], [12.0]) == "waited after a fault"
    assert goodput.cause_of(10.0, 13.0, [1.0], [12.0]) == "waited for a join"
    assert goodput.cause_of(10.0, 13.0, [1.0, 20.0], [5.0]) == "waited for a round"
