"""Machines that are not alike: weights, shares of an outer step, quorum and grace, own paces.

python -m pytest tests/test_unequal.py
"""

import json
import time

import pytest
import torch
from conftest import digest_of, result, until
from conftest import status as ask
from peers import Peer, join_all, same_bits
from test_global_model import closed, made, numbers, state_of
from test_global_model import push as push_of
from test_rules import fold, join, opened, push, start
from test_rules import member as member_of

from diloco_callback import Schedule, Slice
from protocol import CODECS, FlatModel, Version
from server import Outer, Reading, Rules, Run, Server, Store, parse_args, rules_of

FP32 = ["--upload-codec", "fp32", "--download-codec", "fp32"]
SGD = ["--outer-lr", 1, "--outer-momentum", 0]


# --- Weights and shares ---------------------------------------------------------------------


def weights_of(round):
    return {push.worker: push.weight for push in round.pushes}


def lateness_of(round):
    return {push.worker: push.late for push in round.pushes if push.late}


def test_a_round_with_half_of_the_members_is_half_an_outer_step():
    run = opened("ada", "bob", "cai", "dan", count=1, quorum=2, outer="fractional")
    push(run, "ada")
    push(run, "bob")
    assert run.over(0) == [0]
    round = fold(run)
    assert (round.share, round.part, round.quorum) == (0.5, 0.5, 2)
    assert run.slices[0].made == 0.5 and run.slices[0].version.number == 1
    for id in ("cai", "dan"):
        push(run, id)
    round = fold(run)
    assert (round.before, round.part, run.slices[0].made) == (0.5, 0.5, 1.0)


def test_a_whole_outer_step_is_one_whoever_is_in_it():
    run = opened("ada", "bob", count=1, quorum=1)
    push(run, "ada")
    round = fold(run)
    assert (round.share, round.part, run.slices[0].made) == (0.5, 1.0, 1.0)


def test_who_is_missing_is_expected_to_weigh_what_it_weighed_last():
    run = opened("ada", "bob", "cai", count=1, weights="steps", outer="fractional", quorum=2)
    for member in run.members.values():
        member.pace, member.cycle = 100, 20
    for id, steps in (("ada", 20), ("bob", 16), ("cai", 4)):
        push(run, id, steps=steps)
    round = fold(run)
    assert weights_of(round) == {"ada": 20, "bob": 16, "cai": 4} and round.share == 1
    push(run, "ada", seq=2, steps=20)
    push(run, "bob", seq=2, steps=16)
    assert fold(run).share == 36 / 40
    push(run, "cai", seq=2, steps=60)  # what it has caught up with is not what it does each time
    push(run, "ada", seq=3, steps=20)
    push(run, "bob", seq=3, steps=16)
    fold(run)
    push(run, "ada", seq=4, steps=20)
    push(run, "bob", seq=4, steps=16)
    assert fold(run).share == 36 / 56


def test_who_has_never_pushed_is_expected_to_weigh_as_much_as_the_others():
    run = opened("ada", "bob", "cai", count=1, weights="steps", outer="fractional", quorum=2)
    for id, steps in (("ada", 1), ("bob", 1)):
        push(run, id, steps=steps)
    assert fold(run).share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        ((200, 100), {"ada": 200, "bob": 100}),
        ((200, 0), {"ada": 2, "bob": 1}),  # bob does not say: by steps
        ((10**9, 100), {"ada": 2000, "bob": 100}),  # a step has ten times bob's tokens at most
    ],
)
def test_tokens_weigh_where_all_say_them_and_nobody_says_too_many(tokens, weights):
    run = opened("ada", "bob", count=1, weights="tokens")
    for member in run.members.values():
        member.pace = 100
    push(run, "ada", steps=2, tokens=tokens[0])
    push(run, "bob", steps=1, tokens=tokens[1])
    assert weights_of(fold(run)) == weights


def test_late_work_weighs_less_the_later_it_is():
    run = opened("ada", "bob", count=1, quorum=1, outer="fractional", stale_weight=0.5)
    base = run.slices[0].version
    for seq in (1, 2, 3):
        push(run, "ada", seq=seq)
        fold(run)
    push(run, "bob", base=base)
    round = fold(run)
    assert lateness_of(round) == {"bob": 3}
    weight = (1 + 3 * 0.5) ** -0.5  # three halves of an outer step
    assert weights_of(round) == {"bob": weight}
    assert round.share == weight / 2  # of what ada and bob weigh when they are not late
    assert run.members["bob"].lag == 3


def test_a_refused_push_is_neither_weighed_nor_missed():
    run = opened("ada", "bob", "cai", count=1, outer="fractional", quorum=2)
    push(run, "ada")
    push(run, "bob", refused="not finite")
    assert fold(run).share == 0.5  # ada of ada and cai
    push(run, "bob", seq=2, refused="not finite")
    round = fold(run)
    assert (round.share, run.slices[0].made) == (0, 0.5)  # nothing is folded


def test_the_outer_steps_left_out_come_through_a_crash(tmp_path):
    model = made(5, 1, "bf16", "bf16")
    state = state_of([2]) | {"missed": [0.75]}
    Store(str(tmp_path / "model")).save(state, model, model.freeze())
    found, _ = Store(str(tmp_path / "model")).open("bf16", "bf16", True)
    assert found["missed"] == [0.75]


# --- Quorum and grace -----------------------------------------------------------------------


def test_late_ones_count_for_a_quorum_only_with_a_part_of_an_outer_step():
    for outer, found in (("whole", []), ("fractional", [0])):
        run = opened("ada", "bob", "cai", count=1, quorum=1, outer=outer)
        base = run.slices[0].version
        push(run, "ada", now=10)
        fold(run, now=10)
        push(run, "bob", base=base, now=11)
        assert run.over(11) == found
        assert run.over(30) == [0]  # not for ever: the last round was open for ten seconds


def test_three_equal_workers_that_a_stall_put_out_of_step_are_in_step_after_a_round():
    run = opened("ada", "bob", "cai", count=1, quorum=2, grace=3.0)
    base, seqs = run.slices[0].version, dict.fromkeys(("ada", "bob", "cai"), 0)

    def come(now, *ids, base=None):
        for id in ids:
            seqs[id] += 1
            push(run, id, seq=seqs[id], now=now, base=base)

    come(10, "ada", "bob")  # cai stalls for twenty seconds
    assert run.over(12.9) == [] and run.over(13) == [0]
    fold(run, now=13)
    come(23, "ada", "bob")
    fold(run, now=26)
    come(30, "cai", base=base)  # late: it starts with the next two
    assert run.over(35) == []
    come(36, "ada", "bob")
    assert run.over(36) == [0]
    fold(run, now=36)
    come(46, "ada", "bob", "cai")
    round = fold(run, now=46)
    assert not lateness_of(round) and len(round.pushes) == 3


def test_an_automatic_grace_is_a_tenth_of_a_round_where_they_wait():
    run = opened("ada", "bob", count=1, quorum=1, grace=None)
    push(run, "ada", now=40)
    push(run, "bob", now=50)
    fold(run, now=50)
    push(run, "ada", seq=2, now=90)
    assert run.over(94.9) == [] and run.over(95) == [0]
    round = run.take(0, 95.5)
    assert round.grace == 5.5


def test_an_automatic_grace_ends_before_the_first_one_adopts():
    run = opened("ada", "bob", "cai", count=1, quorum=2, grace=None)
    push(run, "ada", now=40, adopts=58.0)
    assert run.over(60) == []
    push(run, "bob", now=50, adopts=55.0)
    assert run.over(54.9) == [] and run.over(55) == [0]


def test_round_timeout_is_a_quorum_of_one_and_its_grace(capsys):
    rules = rules_of(parse_args(["-m", "x", "--round-timeout", "2.5"]))
    assert (rules.quorum, rules.grace, rules.outer, rules.weights) == (
        1,
        2.5,
        "fractional",
        "tokens",
    )
    rules = rules_of(parse_args(["-m", "x", "--quorum", "2", "--outer", "delayed"]))
    assert (rules.quorum, rules.grace, rules.outer, rules.stale_weight) == (2, None, "delayed", 1.0)
    rules = rules_of(parse_args(["-m", "x", "--quorum", "all"]))
    assert (rules.quorum, rules.outer, rules.weights, rules.stale_weight) == (
        0,
        "whole",
        "equal",
        0,
    )
    assert rules_of(parse_args(["-m", "x", "--dylu"])).weights == "tokens"
    for wrong in (
        ["--quorum", "0"],
        ["--grace", "-1"],
        ["--quorum", "2", "--round-timeout", "3"],
        ["--grace", "3"],
    ):
        with pytest.raises(SystemExit):
            parse_args(["-m", "x", *wrong])
    assert "give these or that" in capsys.readouterr().err


def test_a_slow_one_among_many_is_not_too_late_where_each_push_closes_a_round():
    rules = rules_of(parse_args(["-m", "x", "-n", "8", "--quorum", "1", "--grace", "0"]))
    run = opened(*"abcdefgh", count=1, **vars(rules))
    base = run.slices[0].version
    for seq in range(1, 5):
        for id in "abcdefg":
            push(run, id, seq=seq)
            fold(run)
    push(run, "h", base=base)  # at a quarter of the others' speed
    assert run.slices[0].version.number == 28 and not fold(run).pushes[0].refused
    assert rules_of(parse_args(["-m", "x", "-n", "8"])).max_staleness == 10


# --- Own paces ------------------------------------------------------------------------------


def at_speeds(speeds, fragments=1, pace=20):
    """A run whose members have made two hundred seconds of training, at these steps a second."""
    run = opened(*speeds, count=fragments, own_pace=True)
    run.pace = pace
    for member in run.members.values():
        member.fragments, member.pace, member.cycle = fragments, pace, pace
        run.paces.told[member.id] = pace
        run.paces.note(member, Reading(0, 0.0, 0.0), is_push=True)
    faster(run, **speeds)
    return run


def faster(run, **speeds):
    for id, speed in speeds.items():
        member = run.members[id]
        before = member.reading
        for _ in range(5):
            before = Reading(
                before.steps + int(200 * speed), before.trained + 200, before.waited + 9
            )
            run.paces.note(member, before, is_push=True)


def paces(run, now=0.0):
    return [run.paces.of(member, now) for member in run.members.values()]


def test_each_takes_the_steps_that_it_makes_while_the_fastest_makes_those_of_the_run():
    run = at_speeds({"ada": 1.0, "bob": 0.8, "cai": 0.5, "dan": 0.25})
    assert paces(run) == [20, 16, 10, 5]


def test_small_changes_of_speed_change_no_pace():
    run = at_speeds({"ada": 1.0, "bob": 0.5})
    assert paces(run) == [20, 10]
    faster(run, bob=0.54)
    assert paces(run) == [20, 10]
    faster(run, bob=0.6)
    assert paces(run) == [20, 12]


@pytest.mark.parametrize(
    ("position", "steps"), [(0, 20), (1, 20), (5, 25), (9, 29), (15, 15), (19, 20)]
)
def test_who_is_out_of_step_has_one_cycle_of_another_length(position, steps):
    """Ada's cycle has just begun; bob's began so many steps before, and both make one a second."""
    run = at_speeds({"ada": 1.0, "bob": 1.0})
    run.rules.quorum = 1
    for member in run.members.values():
        member.heard, member.speed = 100.0, 1.0
    run.members["bob"].position = position
    found = [run.paces.of(member, 100.0) for member in run.members.values()]
    assert found == [20, steps]
    assert run.paces.of(run.members["bob"], 200.0) == 20  # nobody has been heard of for a while
    run.rules.quorum = 0
    assert run.paces.of(run.members["bob"], 100.0) == 20  # who comes first waits


def test_who_comes_back_in_step_within_a_longer_cycle_keeps_its_pace_afterwards():
    """Both have fifteen steps to go, bob in a cycle of thirty that brings him back."""
    run = at_speeds({"ada": 1.0, "bob": 1.0})
    run.rules.quorum = 1
    for id, position, cycle in (("ada", 5, 20), ("bob", 15, 30)):
        member = run.members[id]
        member.heard, member.speed, member.position, member.cycle = 100.0, 1.0, position, cycle
    assert paces(run, 100.0) == [20, 20]


def test_a_pace_has_a_step_for_every_fragment_and_one_at_least():
    assert paces(at_speeds({"ada": 1.0, "bob": 0.15}, fragments=4)) == [20, 4]
    assert paces(at_speeds({"ada": 1.0, "bob": 0.15}, pace=2)) == [2, 1]


def test_nobody_makes_the_others_idle_by_what_it_says():
    assert paces(at_speeds({"ada": 1000.0, "bob": 1.0, "cai": 1.0})) == [20, 2, 2]


def test_without_the_option_nobody_is_told_a_pace():
    run = opened("ada", count=1)
    assert run.paces.of(run.members["ada"], 0.0) is None


def test_who_comes_back_goes_on_at_its_pace():
    run = at_speeds({"ada": 1.0, "bob": 0.25})
    assert paces(run) == [20, 5]
    run.remove("bob", ends=False)
    join(run, "bob", session="bob2", sync_every=20)
    assert run.members["bob"].cycle == 5 and run.paces.of(run.members["bob"], 0.0) == 5


def test_who_comes_back_to_another_server_goes_on_at_its_pace():
    run = Run(Rules(workers=2, own_pace=True), 0.0)
    for id, cycle in (("ada", 20), ("bob", 5)):
        run.ask(member_of(id, 1, sync_every=20, cycle=cycle), 0.0)
    start(run, "ada", 0.0)
    assert paces(run) == [20, 5]


def test_a_push_that_is_sent_again_is_no_news_of_a_speed():
    run = opened("ada", count=1)
    ada = run.members["ada"]
    run.paces.note(ada, Reading(10, 5.0, 0.0), is_push=True)
    run.paces.note(ada, Reading(5, 2.5, 0.0), is_push=True)
    assert run.paces.speeds() == {"ada": 2.0}


def test_what_waiting_costs_is_known_after_some_rounds():
    run = opened("ada", "bob", count=1)
    for seq in range(1, 6):
        assert run.paces.costs() == []
        push(run, "ada", seq=seq, now=10 * seq)
        push(run, "bob", seq=seq, now=10 * seq + 5)
        for id, waited in (("ada", 5.0), ("bob", 0.0)):
            reading = Reading(5 * seq, seq * (10 - waited), seq * waited)
            run.paces.note(run.members[id], reading, is_push=True)
        fold(run, now=10 * seq + 5)
    assert run.paces.costs() == [("ada", 0.5, "bob")]


def test_a_pace_begins_with_a_cycle_and_all_slices_keep_their_place_in_it():
    schedule = Schedule(8, 4)
    assert [schedule.tick() for _ in range(2)] == [[], [0]]
    schedule.pace = 4
    assert [schedule.tick() for _ in range(6)] == [[], [1], [], [2], [], [3]]
    assert schedule.every == 4
    assert [schedule.tick() for _ in range(4)] == [[0], [1], [2], [3]]
    schedule.pace = 2  # less than there are slices
    assert [schedule.tick() for _ in range(8)] == 2 * [[0], [1], [2], [3]]


def test_a_schedule_goes_on_within_a_cycle_of_another_length():
    schedule = Schedule(8, 1)
    schedule.resume(10, 12)
    assert [schedule.tick() for _ in range(2)] == [[], [0]]
    assert [schedule.tick() for _ in range(8)] == 7 * [[]] + [[0]]


# --- The outer step -------------------------------------------------------------------------


def test_two_halves_of_an_outer_step_worked_out_by_hand():
    outer = Outer(lr=1.0, momentum=0.81, warmup=False)  # the root of the momentum is 0.9
    velocity, first, second = torch.zeros(1), torch.ones(1), torch.ones(1)
    outer.step(first, velocity, 7.0, 0.5)
    assert velocity.item() == pytest.approx(0.5) and first.item() == pytest.approx(-0.725)
    outer.step(second, velocity, 7.5, 0.5)
    assert velocity.item() == pytest.approx(0.95) and second.item() == pytest.approx(-0.9275)


def test_momentum_rises_with_the_outer_steps_that_were_made():
    outer = Outer(lr=1.0, momentum=0.9)
    velocity, update = torch.ones(1), torch.zeros(1)
    outer.step(update, velocity, 1.5, 1.0)  # 1.5 / (1.5 + 3)
    assert velocity.item() == pytest.approx(1 / 3) and update.item() == pytest.approx(-1 / 9)


def test_delayed_momentum_worked_out_by_hand():
    outer = Outer(lr=1.0, momentum=0.5, warmup=False)
    velocity, gathered = torch.full((1,), 2.0), torch.zeros(1)
    first, second = torch.ones(1), torch.full((1,), 3.0)
    outer.delayed(first, velocity, gathered, 0.0, 0.5, completes=False)
    assert (first.item(), velocity.item(), gathered.item()) == (-0.5, 2.0, 0.5)
    outer.delayed(second, velocity, gathered, 0.5, 0.5, completes=True)
    # v = 0.5 * 2 + (0.5 + 1.5) = 3, and the update -1.5 - 0.5 * 3
    assert (second.item(), velocity.item(), gathered.item()) == (-3.0, 3.0, 0.0)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("how", ["step", "delayed"])
def test_a_whole_step_is_that_of_torch(how, nesterov):
    theirs = torch.nn.Parameter(numbers(1))
    optimizer = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=nesterov)
    ours, velocity, gathered = theirs.detach().clone(), torch.zeros(len(theirs)), None
    gathered = torch.zeros(len(theirs))
    outer = Outer(lr=0.7, momentum=0.9, nesterov=nesterov, warmup=False)
    for seed in range(5):
        theirs.grad, mean = numbers(seed), numbers(seed)
        optimizer.step()
        if how == "step":
            outer.step(mean, velocity, float(seed), 1.0)
        else:
            outer.delayed(mean, velocity, gathered, float(seed), 1.0, completes=True)
        ours += mean
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_round_completes_an_outer_step_where_the_shares_come_to_a_whole_number():
    run = opened("ada", "bob", "cai", count=1, quorum=1, outer="delayed")
    found = []
    for _ in range(2):
        for id in ("ada", "bob", "cai"):
            push(run, id, seq=run.slices[0].known(id) + 1)
            found.append(fold(run).completes)
    assert found == [False, False, True, False, False, True]


def folded(model, number, pushes, mode="fractional", share=1.0, outer=None, plain=False):
    """Fold pushes, [(values, weight)], into slice 0 of a model."""
    given = [push_of(model, 0, f"w{n}", values) for n, (values, _) in enumerate(pushes)]
    for each, (_, weight) in zip(given, pushes, strict=True):
        each.weight = weight
    round = closed(0, number, given, plain, share)
    round.mode, round.before = mode, (number - 1) * share
    entry = model.announce(round, step=number)
    model.fold(round, entry, outer or Outer(lr=1.0, momentum=0.0, warmup=False))
    entry.finish()
    return entry


def test_the_mean_of_a_round_is_weighted():
    model = made(3, 1, "fp32", "fp32")
    before = model.params.clone()
    folded(model, 1, [(torch.full((3,), 4.0), 30.0), (torch.full((3,), 8.0), 10.0)])
    assert torch.equal(model.params, before - 5.0)  # (3 * 4 + 1 * 8) / 4


@pytest.mark.parametrize("mode", ["fractional", "delayed"])
def test_a_part_of_an_outer_step_moves_by_its_share(mode):
    model = made(3, 1, "fp32", "fp32")
    before = model.params.clone()
    entry = folded(model, 1, [(torch.full((3,), 8.0), 1.0)], mode, share=0.25)
    assert torch.equal(model.params, before - 2.0)
    assert (entry.part, entry.made) == (0.25, 0.25)


def test_the_parts_of_a_delayed_step_come_through_a_checkpoint(tmp_path):
    model = made(3, 1, "fp32", "fp32")
    folded(model, 1, [(torch.full((3,), 8.0), 1.0)], "delayed", share=0.25)
    Store(str(tmp_path / "model")).save(state_of([1]), model, model.freeze())
    _, opened_again = Store(str(tmp_path / "model")).open("fp32", "fp32", True)
    assert opened_again.outer["gathered"].tolist() == [2.0, 2.0, 2.0]
    for each in (model, opened_again):
        folded(each, 2, [(torch.ones(3), 1.0)], "delayed", share=0.25)
    assert same_bits(model.params, opened_again.params)


def test_a_closing_round_that_completes_a_delayed_step_leaves_none_of_its_parts():
    model = made(3, 1, "fp32", "fp32")
    folded(model, 1, [(torch.full((3,), 8.0), 1.0)], "delayed", share=0.25)
    before = model.params.clone()
    folded(model, 2, [(torch.full((3,), 4.0), 1.0)], "delayed", share=0.25, plain=True)
    assert torch.equal(model.params, before - 1.0)
    assert model.outer["gathered"].tolist() == [2.0, 2.0, 2.0]  # half of the step is to come
    folded(model, 2, [(torch.ones(3), 1.0)], "delayed", share=0.5, plain=True)
    assert torch.equal(model.params, before - 1.5)
    assert not model.outer["gathered"].any()
    assert model.outer["momentum"].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("outer", ["delayed", "fractional"])
def test_the_parts_of_a_delayed_step_are_momentum_for_another_outer_step(tmp_path, outer):
    model, path = made(3, 1, "fp32", "fp32"), str(tmp_path / "model")
    folded(model, 1, [(torch.full((3,), 8.0), 1.0)], "delayed", share=0.25)
    Store(path).save(state_of([1]), model, model.freeze())
    found = Server(parse_args(["-m", path, "--outer", outer, *FP32])).model.outer
    left = {name: vector.tolist() for name, vector in found.items()}
    parts, none = [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]
    assert left == (
        {"momentum": none, "gathered": parts} if outer == "delayed" else {"momentum": parts}
    )


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_worker_learns_the_velocity_of_parts_and_predicts_the_next(nesterov):
    """Where all push the same, the prediction is what the server makes of it."""
    parameter = torch.nn.Parameter(torch.zeros(6))
    flat = FlatModel([parameter], 0, 1)
    slice = Slice(flat, CODECS["fp32"], CODECS["fp32"], predicts=True)
    outer = Outer(lr=0.7, momentum=0.9, nesterov=nesterov, warmup=False)
    velocity = torch.zeros(6)
    for seed, part in enumerate((0.5, 0.25, 1.0)):
        update = numbers(seed)[:6].clone()
        outer.step(update, velocity, 3.0, part)
        slice.outer = 0.7, 0.9**part, nesterov, part
        slice._learn_velocity(0, 6, update)
        torch.testing.assert_close(slice.velocity, velocity, rtol=1e-5, atol=1e-6)
    own = numbers(9)[:6].clone()
    slice.mark, slice.outer = -own, (0.7, 0.9**0.5, nesterov, 0.5)
    outer.step(own, velocity, 3.0, 0.5)
    torch.testing.assert_close(slice._predict(0, torch.empty(6)), own, rtol=1e-5, atol=1e-6)


def test_whose_units_differ_or_who_boasts_leaves_the_others_their_share():
    run = opened("ada", "bob", count=1, quorum=1, outer="fractional", weights="tokens")
    for member in run.members.values():
        member.pace, member.cycle = 100, 20
    push(run, "ada", steps=20, tokens=2000)
    assert fold(run).share == 0.5
    push(run, "bob", steps=20)  # says no tokens: then steps count, hers too
    assert fold(run).share == 0.5
    push(run, "bob", seq=2, steps=20, tokens=2000)
    assert fold(run).share == 0.5
    push(run, "ada", seq=2, steps=20, tokens=1 << 50)
    assert fold(run).share == pytest.approx(10 / 11)
    push(run, "bob", seq=3, steps=20, tokens=2000)
    assert fold(run).share == pytest.approx(1 / 11)


def test_two_processes_of_a_worker_are_one_of_a_quorum():
    run = opened("ada", "bob", "cai", count=1, quorum=2, outer="fractional")
    push(run, "ada")
    run.remove("ada", ends=False)  # its machine is gone, and starts anew
    join(run, "ada", session="ada2")
    push(run, "ada", session="ada2", seq=2, now=1.0)
    assert run.over(1) == []
    push(run, "bob", now=2.0)
    assert run.over(2) == [0]


def test_the_first_round_has_an_automatic_grace_too():
    run = opened("ada", "bob", count=1, quorum=1, grace=None)
    push(run, "ada", now=40.0)
    assert run.over(43.9) == [] and run.over(44) == [0]


def test_an_empty_push_does_not_end_the_grace(serve):
    """The times of its message are worked out as those of a push with numbers."""
    server = serve("-n", 3, "--quorum", 2, "--outer", "fractional")
    a, b, c = join_all(*(Peer(server, name) for name in "abc"))
    for peer in (a, b):
        peer.send(None, adopts_in=30.0)
    time.sleep(0.5)
    assert ask(server)["round"] == 0  # until one of them is about to adopt
    c.send(None)
    until(lambda: ask(server)["round"] == 1, "all are in")


def test_a_worker_whose_times_go_back_breaks_nothing():
    run = opened("ada", "bob", count=1)
    ada = run.members["ada"]
    run.paces.note(ada, Reading(1, 10.0, 0.0), is_push=True)
    ada.readings.popleft()
    run.paces.note(ada, Reading(2, 5.0, 5.0), is_push=True)
    assert run.paces.waiting(ada) == 1.0 and run.paces.speeds() == {}


def test_the_outer_steps_left_out_stay_where_the_tensors_change():
    run = opened("ada", "bob", count=1, quorum=1, outer="fractional")
    for seq in (1, 2, 3):
        push(run, "ada", seq=seq)
        fold(run)
    run.anew.lay_out("others", 2, is_whole=True)
    assert [slice.made for slice in run.slices] == [1.5, 1.5]


# --- With processes -------------------------------------------------------------------------


def test_half_of_the_workers_make_half_a_step_on_all_replicas(serve, tmp_path):
    server = serve(*FP32, *SGD, "-n", 2, "--quorum", 1, "--grace", 0, "--stale-weight", 1)
    a, b = join_all(*(Peer(server, name) for name in "ab"))
    start = a.slice(0).clone()
    a.push(torch.full((17,), 8.0))
    assert torch.equal(a.slice(0), start - 4.0)  # half of the members
    b.push(torch.full((17,), 8.0))  # half an outer step late: two thirds of the half
    torch.testing.assert_close(b.slice(0), start - 4.0 - 8.0 / 3)
    a.pull(0, 0)
    assert same_bits(a.slice(0), b.slice(0))
    text = (tmp_path / "model" / "rounds.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["share"] for line in lines] == [0.5, 0.3333]
    assert [line["weights"] for line in lines] == [{"a": 5.0}, {"b": 3.3333}]
    assert [line["quorum"] for line in lines] == [1, 1]
    assert lines[1]["paces"] == {"a": 5, "b": 5} and lines[1]["waiting"] == {"a": 0, "b": 0}
    assert lines[1]["staleness"] == {"b": 1}


MODES = {
    "quorum 1": ["--quorum", 1, "--grace", 0],
    "quorum 2": ["--quorum", 2],
    "delayed": ["--quorum", 1, "--grace", 0.02, "--outer", "delayed"],
    "whole": ["--quorum", 2, "--grace", 0.02, "--outer", "whole"],
    "own pace": ["--own-pace"],
    "own pace, quorum": ["--own-pace", "--quorum", 2, "--weights", "steps"],
}


@pytest.mark.parametrize("delay", [0, 2], ids=["full", "streaming"])
@pytest.mark.parametrize("mode", MODES)
def test_all_replicas_end_with_the_same_bits(serve, toy, tmp_path, mode, delay):
    server = serve("-n", 3, "--until-done", *MODES[mode])
    more = {"num_fragments": 2, "fragment_sync_delay": delay} if delay else {}
    workers = [
        toy(server, id, steps=60, sync_every=6, pause=pause, seed=k, **more)
        for k, (id, pause) in enumerate({"ada": 0.005, "bob": 0.01, "cai": 0.02}.items())
    ]
    ends = [result(worker) for worker in workers]
    assert server.wait() == 0
    # Each entry has a checksum, which every replica has compared.
    assert all(end["metrics"]["diloco/mismatches"] == 0 for end in ends)
    if not delay:  # else the last entries of the slices may be those of two workers' closing pushes
        assert digest_of(tmp_path / "model") in {end["digest"] for end in ends}


def test_a_slow_worker_takes_fewer_steps_and_nobody_waits(serve, toy, tmp_path):
    server = serve("-n", 2, "--own-pace", "--worker-timeout", 4)
    fast = toy(server, "ada", steps=400, sync_every=20, pause=0.01)
    slow = toy(server, "bob", steps=400, sync_every=20, pause=0.04, seed=1)
    until(lambda: [w["pace"] for w in ask(server)["workers"]][1:2] in ([4], [5], [6]), "a pace")
    until(lambda: ask(server)["step"] > 200, "half of the run")
    workers = ask(server)["workers"]
    ends = [result(worker) for worker in (fast, slow)]
    assert workers[0]["pace"] == 20 and workers[0]["waiting"] < 0.5
    assert ends[1]["step"] >= 380  # the run's step is that of the furthest worker
    assert ends[1]["metrics"]["diloco/local_step"] < 200
    assert ends[0]["version"] == ends[1]["version"] and ends[0]["digest"] == ends[1]["digest"]


def test_what_waiting_costs_is_said_once(serve, toy):
    server = serve("-n", 2)
    workers = [
        toy(server, id, steps=60, sync_every=5, pause=pause, seed=k)
        for k, (id, pause) in enumerate({"ada": 0.002, "bob": 0.04}.items())
    ]
    text = r"ada waits (\d+)% of its time for bob; --own-pace would end that"
    found = server.wait_for(text)
    assert int(found[1]) >= 10
    for worker in workers:
        result(worker)
    assert sum("--own-pace would" in line for line in server.lines) == 1


def test_with_a_quorum_of_one_nobody_waits_for_one_that_hangs(serve, toy, tmp_path):
    server = serve("-n", 2, "--quorum", 1, "--grace", 0)
    toy(server, "bob", steps=100, sync_every=5, pause=1000)
    ada = toy(server, "ada", steps=100, sync_every=5, fragment_sync_delay=2)
    until(lambda: ask(server)["round"] >= 15, "rounds without bob")
    assert result(ada)["version"][1] >= 20
    lines = map(json.loads, (tmp_path / "model" / "rounds.jsonl").read_text().splitlines())
    assert {line["share"] for line in lines if line["steps"]} == {0.5}  # bob is expected


def test_a_worker_that_lags_takes_entries_while_they_are_shorter(serve):
    server = serve("-n", 2, "--quorum", 1, "--grace", 0, "--download-codec", "int4")
    a, b = join_all(*(Peer(server, name, manifest=[["w", "F32", [1000]]]) for name in "ab"))
    for _ in range(3):
        a.push(torch.ones(1000))
    b.took.clear()
    b.pull(0, 0)
    assert b.took == ["entry", "entry", "entry"] and same_bits(a.slice(0), b.slice(0))
    assert b.versions[0] == Version(b.versions[0].life, 3)
