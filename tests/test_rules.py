"""The rules of a run by themselves: events in, decisions out, no process."""

import mutate
import pytest
import simulator

from diloco_callback import Outbox, Schedule
from protocol import FRESH, KEPT_FATES, NONE, WEIGHTS, Fate, Refused, Version
from server import KNOWN_WORKERS, Member, Push, Rules, Run, outsized


def life(after):
    """A name for a life that sorts after another one."""
    return f"{int(after or '0', 16) + 1:020x}"


def member(id, count=2, session="", versions=None, **facts):
    versions = versions or [FRESH] * count
    return Member(id=id, session=session or id + "1", versions=versions, **facts)


def opened(*ids, count=2, now=0.0, **rules):
    """A run that has just been opened by some workers."""
    run = Run(Rules(**{"workers": len(ids), **rules}), now)
    for id in ids:
        run.ask(member(id, count), now)
    start(run, ids[0], now)
    return run


def start(run, id, now):
    """All bring what they are asked for; then the worker enters. Returns who became a member."""
    for other in list(run.waiting):
        for k in run.lacking(other, now):
            run.bring(other, k)
    assert run.may_enter(id, now)
    return run.enter(id, now, life)


def join(run, id, now=0.0, **facts):
    run.ask(member(id, len(run.slices), **facts), now)
    return run.enter(id, now, life)


def push(run, id, k=0, seq=1, now=0.0, session="", base=None, steps=1, **facts):
    """A worker's push comes in; True where it is taken."""
    base = run.slices[k].version if base is None else base
    facts = {"session": session or id + "1", "base": base, "steps": steps, **facts}
    return run.push(Push(worker=id, k=k, seq=seq, **facts), now)


def fold(run, k=0, now=0.0):
    round = run.take(k, now)
    run.publish(k)
    return round


def refusal(action):
    with pytest.raises(Refused) as caught:
        action()
    return caught.value.code


# --- Rounds ---------------------------------------------------------------------------------


def test_a_round_closes_when_all_that_are_awaited_have_contributed():
    run = opened("ada", "bob")
    assert run.over(0) == []  # nothing is there to be folded
    push(run, "bob", now=1)
    assert run.missing(0) == {"ada"} and run.over(1000) == []
    push(run, "ada", now=2)
    assert run.over(2) == [0] and run.missing(1) == {"ada", "bob"}


def test_contributions_are_folded_in_the_order_of_index_and_sequence_number():
    run = opened("ada", "bob", "cai")
    for id, seq in (("cai", 1), ("bob", 2), ("bob", 1), ("ada", 1)):
        push(run, id, seq=seq)
    round = fold(run)
    names = [(each.worker, each.seq) for each in round.pushes]
    assert names == [("ada", 1), ("bob", 1), ("bob", 2), ("cai", 1)]
    assert round.fates["bob"] == Fate(2, "", 1)
    assert run.slices[0].version == round.version == Version(run.life, 1)


def test_a_worker_that_closed_a_slice_is_not_awaited_in_it():
    run = opened("ada", "bob")
    push(run, "ada", closing=True)
    assert run.missing(0) == {"bob"} and run.missing(1) == {"ada", "bob"}
    push(run, "bob")
    fold(run)
    assert run.missing(0) == {"bob"}


def test_a_worker_that_contributed_to_a_later_turn_is_not_awaited():
    run = opened("ada", "bob")
    push(run, "ada", k=1)
    assert run.turn(1) > run.turn(0)
    push(run, "bob", k=0)
    assert run.missing(0) == set() and run.over(0) == [0]


def test_a_joiner_is_not_awaited_in_a_round_that_had_begun():
    run = opened("ada", "bob")
    push(run, "ada")
    join(run, "cai")
    assert run.missing(0) == {"bob"} and run.missing(1) == {"ada", "bob", "cai"}
    push(run, "bob")
    fold(run)
    assert run.missing(0) == {"ada", "bob", "cai"}


def test_a_push_that_an_entry_lists_is_not_taken_again():
    run = opened("ada")
    assert push(run, "ada") and push(run, "ada")  # sent again, still in the open round
    assert len(run.slices[0].pushes) == 1
    fold(run)
    assert not push(run, "ada") and not run.slices[0].pushes


def test_a_push_that_is_sent_again_keeps_its_time():
    run = opened("ada", "bob", quorum=1, grace=10)
    push(run, "ada", now=1)
    push(run, "ada", now=9)
    assert run.over(10.9) == [] and run.over(11) == [0]


def test_a_refused_push_counts_for_who_is_awaited_and_is_listed_as_refused():
    run = opened("ada", "bob")
    push(run, "bob", refused="not finite", closing=True)
    push(run, "ada")
    assert run.over(0) == [0] and run.members["bob"].closed == {0}
    assert fold(run).fates["bob"] == Fate(1, "not finite", 1)


def test_a_push_over_max_staleness_is_refused_unless_it_carries_no_steps():
    run = opened("ada", "bob", max_staleness=1)
    base = run.slices[0].version
    for seq in (1, 2):
        push(run, "ada", seq=seq)
        fold(run)
    push(run, "bob", base=base)
    push(run, "ada", seq=3, base=base, steps=0)
    fates = fold(run).fates
    assert "2 rounds old" in fates["bob"].refused and fates["ada"].refused == ""


def test_a_late_push_counts_in_the_open_round():
    run = opened("ada", "bob")
    base = run.slices[0].version
    push(run, "ada")
    fold(run)
    push(run, "bob", base=base)
    push(run, "ada", seq=2)
    assert run.over(0) == [0]
    assert [(push.worker, push.late) for push in fold(run).pushes if push.late] == [("bob", 1)]


def test_a_quorum_waits_for_the_grace_from_its_last_push_that_is_not_late():
    run = opened("ada", "bob", "cai", quorum=2, grace=5)
    base = run.slices[0].version
    for id in ("ada", "bob", "cai"):
        push(run, id)
    fold(run, now=1)
    push(run, "ada", seq=2, base=base, now=2)  # late
    push(run, "bob", seq=2, now=3)
    assert run.over(100) == []
    push(run, "ada", seq=3, now=104)
    assert run.missing(0) == {"cai"}
    assert run.over(108.9) == [] and run.over(109) == [0]


def test_with_a_quorum_late_pushes_alone_wait_for_the_length_of_a_round_too():
    run = opened("ada", "bob", quorum=1, grace=5)
    base = run.slices[0].version
    push(run, "ada", now=10)
    fold(run, now=20)  # open for 20 s since the run opened
    push(run, "bob", base=base, now=21)
    assert run.over(44) == [] and run.over(45) == [0]


def test_one_push_closes_a_round_at_once_with_a_quorum_of_one_and_no_grace():
    run = opened("ada", "bob", quorum=1, grace=0)
    push(run, "bob", now=3)
    assert run.over(3) == [0]


def test_when_all_are_blocked_the_oldest_round_is_forced_and_counted():
    run = opened("ada", "bob")
    push(run, "ada", k=0)
    push(run, "bob", k=1)
    run.members["ada"].passed = run.members["bob"].passed = -1  # as if it had been forgotten
    run.members["ada"].blocked = (0, 1)
    assert run.over(0) == [] and run.forced == 0  # bob may come
    run.members["bob"].blocked = (1, 1)
    assert run.over(0) == [0] and run.forced == 1


def test_nothing_is_forced_while_a_slice_is_being_folded_or_below_min_workers():
    run = opened("ada", "bob", min_workers=2)
    push(run, "ada", k=1)
    push(run, "bob", k=1)
    run.take(1, 0)
    push(run, "ada", k=0)
    for id in ("ada", "bob"):
        run.members[id].blocked, run.members[id].passed = (0, 1), -1
    assert run.over(0) == []


def test_a_round_of_closing_pushes_only_is_plain_and_knows_its_share():
    run = opened("ada", "bob", "cai", quorum=1)
    push(run, "ada", closing=True)
    round = fold(run)
    assert round.plain and round.share == pytest.approx(1 / 3)
    push(run, "bob", closing=True)
    push(run, "cai")
    round = fold(run)
    assert not round.plain and round.members == ["bob", "cai"]


def test_min_workers_binds_until_all_are_about_to_end():
    run = opened("ada", "bob", min_workers=2)
    push(run, "ada")
    run.remove("bob", ends=False)
    assert run.over(0) == []
    push(run, "ada", k=1, closing=True)
    assert run.over(0) == [0, 1]


def test_a_push_may_not_come_into_a_slice_that_is_being_folded():
    run = opened("ada")
    push(run, "ada")
    run.take(0, 0)
    assert run.is_there(0, "ada", 1)
    with pytest.raises(RuntimeError):
        push(run, "ada", seq=2)
    run.publish(0)
    assert not run.is_there(0, "ada", 1)


def test_a_closing_push_that_is_listed_already_closes_its_slice_too():
    run = opened("ada")
    run.slices[0].folded["ada"] = Fate(1, "", 0)  # before a crash, say
    assert not push(run, "ada", closing=True)
    assert run.members["ada"].closed == {0}


def test_fates_of_ids_that_are_gone_stay_known_for_max_staleness_rounds_and_the_last_for_long():
    run = opened("ada", max_staleness=2)
    gone = [f"bob{number}" for number in range(KEPT_FATES + 10)]
    for number, id in enumerate(gone, 1):
        join(run, id)
        push(run, id)
        push(run, "ada", seq=number)
        fold(run)
        run.remove(id, ends=True)
    known = run.slices[0].folded.keys() - {"ada"}
    assert known <= set(gone[-KEPT_FATES:]) and gone[-KEPT_FATES + 1] in known


def test_a_push_sent_again_after_many_rounds_is_known_to_be_folded():
    run = opened("ada", "bob", max_staleness=2)
    push(run, "bob")
    push(run, "ada")
    fold(run)
    run.remove("bob", ends=False)
    for seq in range(2, 30):
        push(run, "ada", seq=seq)
        fold(run)
    join(run, "bob")
    assert not push(run, "bob")  # listed, and not counted as too old


def test_a_push_after_many_rounds_counts_no_more_steps_than_one_that_is_not_too_old_can_have():
    run = opened("ada", "bob", max_staleness=2)
    push(run, "bob")
    for seq in range(1, 30):
        push(run, "ada", seq=seq)
        fold(run)
    assert run.slices[0].most_steps(run.members["bob"], run.rules) == 3


# --- Membership -----------------------------------------------------------------------------


def test_a_run_opens_when_as_many_wait_as_it_needs_and_all_become_members_at_once():
    run = Run(Rules(workers=2), 0)
    run.ask(member("bob"), 0)
    assert not run.may_enter("bob", 1000)
    run.ask(member("ada"), 1)
    assert start(run, "bob", 1) == ["ada", "bob"]
    assert [run.members[id].index for id in ("ada", "bob")] == [0, 1]


def test_the_first_by_id_of_the_newest_holders_brings_and_its_fates_with_it():
    run = Run(Rules(workers=3), 0)
    newest = Version("1" * 20, 4)
    run.ask(member("ada"), 0)
    run.ask(member("cai", versions=[newest, FRESH], folded=[{"bob": Fate(3, "", 4)}, {}]), 0)
    run.ask(member("bob", versions=[newest, FRESH], folded=[{"bob": Fate(3, "", 4)}, {}]), 0)
    assert [run.lacking(id, 0) for id in ("ada", "bob", "cai")] == [[1], [0], []]
    assert not run.may_enter("ada", 0)
    start(run, "cai", 0)
    assert run.slices[0].version == newest and run.known("bob") == [3, 0]
    assert run.slices[1].version == Version(run.life, 0) and run.life > newest.life


def test_versions_sort():
    assert (
        NONE < FRESH < WEIGHTS < Version("0" * 20, 0) < Version("0" * 20, 7) < Version("a" * 20, 0)
    )


def test_a_holder_that_falls_silent_is_forgotten_and_the_next_one_is_asked():
    run = Run(Rules(workers=2, worker_timeout=30), 0)
    run.ask(member("ada"), 0)
    run.ask(member("bob"), 20)
    assert run.lacking("ada", 20) == [0, 1] and run.lacking("bob", 20) == []
    assert [m.id for m in run.silent(run.waiting, 31)] == ["ada"]
    run.forget("ada", "ada1")
    run.ask(member("cai"), 31)
    assert run.lacking("bob", 31) == [0, 1]


def test_an_id_that_a_live_process_holds_is_refused_to_another():
    run = opened("ada", worker_timeout=30)
    other = member("ada", session="ada2")
    assert refusal(lambda: run.ask(other, 10)) == "id"
    run.ask(other, 31)  # the first one is silent


def test_an_id_belongs_to_its_process_until_the_timeout_or_until_that_has_ended():
    run = opened("ada", worker_timeout=30)
    assert run.holder("ada", "ada2", 30).session == "ada1"
    assert run.holder("ada", "ada1", 30) is None and run.holder("ada", "ada2", 30.1) is None
    run.free("ada", "ada9")  # says a process that never had it
    assert run.holder("ada", "ada2", 10)
    run.free("ada", "ada1")
    assert run.holder("ada", "ada2", 10) is None
    run.hear("ada", "ada1", 11)  # it lives after all
    assert run.holder("ada", "ada2", 20).session == "ada1"


def test_a_process_stays_out_once_another_one_has_taken_over_its_id():
    run = opened("ada", "bob")
    held = [slice.version for slice in run.slices]
    join(run, "ada", now=100, session="ada2")
    run.remove("ada", ends=True)
    assert refusal(lambda: run.ask(member("ada", versions=held), 100)) == "id"
    run.ask(member("ada", versions=held, session="ada2"), 100)
    run.ask(member("ada", session="ada3"), 200)  # a new process


def test_who_is_no_member_is_told_to_join_again():
    run = opened("ada", "bob")
    assert refusal(lambda: run.hear("ada", "ada2", 0)) == "rejoin"
    run.remove("bob", ends=False)
    assert refusal(lambda: push(run, "bob")) == "rejoin"


def test_a_new_worker_is_refused_while_stopping_and_one_who_was_cut_off_is_not():
    run = opened("ada", "bob")
    run.remove("bob", ends=False)
    run.stop()
    assert run.stopping == {"ada", "bob"}
    assert refusal(lambda: run.ask(member("cai"), 0)) == "stopping"
    join(run, "bob")
    assert "bob" in run.members


def test_one_who_was_away_comes_back_after_a_stopped_run_has_ended_and_stops_too():
    run = opened("ada", "bob")
    held = [slice.version for slice in run.slices]
    run.remove("bob", ends=False)
    run.stop()
    run.remove("ada", ends=True)
    assert not run.is_open
    run.ask(member("bob", versions=held), 50)
    assert start(run, "bob", 50) == ["bob"] and run.is_stopping
    run.remove("bob", ends=True)
    assert not run.is_open and not run.stopping


def test_who_is_dropped_is_awaited_no_more_and_is_told_to_finish_alone():
    run = opened("ada", "bob")
    push(run, "ada")
    assert run.missing(0) == {"bob"} and not run.over(0)
    run.remove("bob", ends=False, drops=True)
    assert not run.missing(0) and run.over(0) == [0]
    assert refusal(lambda: run.hear("bob", "bob1", 0)) == "rejoin"
    fold(run)
    join(run, "bob", session="bob1", step=9)
    assert run.is_to_finish(run.members["bob"]) and not run.is_to_finish(run.members["ada"])
    assert not run.is_stopping
    join(run, "cai")  # nobody else is kept out
    run.remove("bob", ends=True)
    assert not run.dropped and run.is_open


def test_another_process_of_a_worker_that_was_dropped_takes_part():
    run = opened("ada", "bob")
    run.remove("bob", ends=False, drops=True)
    join(run, "bob", session="bob2")
    assert not run.is_to_finish(run.members["bob"])


def test_a_drop_outlives_a_crash_and_keeps_no_run_from_opening():
    before = opened("ada", "bob")
    held = [slice.version for slice in before.slices]
    before.remove("bob", ends=False, drops=True)
    run = Run(Rules(workers=2), 0)
    run.reopen(before.names(), [], 0)
    assert not run.expected.keys() - {"ada"} and run.dropped == {"bob": "bob1"}
    run.ask(member("bob", session="bob1", versions=held), 50)
    run.ask(member("ada", versions=held), 50)
    assert start(run, "ada", 50) == ["ada", "bob"] and not run.is_stopping
    assert [m.id for m in run.members.values() if run.is_to_finish(m)] == ["bob"]


def test_a_run_ends_when_the_last_member_leaves_and_not_when_it_is_lost():
    run = opened("ada")
    run.remove("ada", ends=False)
    assert run.is_open
    join(run, "ada")
    run.remove("ada", ends=True)
    assert not run.is_open


def test_who_leaves_does_not_wait_to_enter_either():
    run = opened("ada", "bob")
    run.ask(member("ada"), 0)  # its join was sent twice
    run.remove("ada", ends=True)
    assert not run.waiting


def test_a_run_that_is_to_stop_opens_with_the_newest_version_that_anybody_who_waits_holds():
    run = opened("ada", "bob", "cai")
    older = [slice.version for slice in run.slices]
    newest = [Version(version.life, 1) for version in older]
    run.stop()
    for id in ("ada", "bob"):
        run.remove(id, ends=id == "ada")
    run = reopened(run)
    run.ask(member("bob", versions=older), 101)
    assert not run.may_enter("bob", 101)  # cai is expected, and holds the newest
    run.ask(member("cai", versions=newest), 102)
    assert run.lacking("bob", 102) == [] and run.lacking("cai", 102) == [0, 1]
    start(run, "bob", 102)
    assert [slice.version for slice in run.slices] == newest and run.is_stopping


def test_joins_wait_for_a_fold():
    run = opened("ada")
    push(run, "ada")
    run.ask(member("bob"), 0)
    run.take(0, 0)
    assert not run.may_enter("bob", 0)
    run.publish(0)
    assert run.may_enter("bob", 0)


def test_a_returning_id_keeps_its_index_and_a_new_one_gets_the_lowest_that_is_free():
    run = opened("ada", "bob", "cai")
    run.remove("ada", ends=True)
    join(run, "dan")
    assert run.members["dan"].index == 0
    run.remove("bob", ends=False)
    join(run, "bob", session="bob2")
    assert run.members["bob"].index == 1
    join(run, "ada", session="ada2")
    assert run.members["ada"].index == 3  # its own has been given away


def test_old_ids_are_forgotten_by_the_thousand():
    run = opened("ada", count=1)
    for number in range(KNOWN_WORKERS + 5):
        join(run, f"w{number}")
        run.remove(f"w{number}", ends=True)
    assert len(run.indices) == len(run.sessions) <= KNOWN_WORKERS + 1 and "ada" in run.indices


def test_a_process_resumed_at_the_very_version_replaces_its_predecessors_push():
    run = opened("ada", "bob")
    version = run.slices[0].version
    push(run, "ada", k=0)
    push(run, "ada", k=1)
    run.remove("ada", ends=False)
    join(run, "ada", session="ada2", resumes=[version, NONE])
    assert run.known("ada") == [0, 1]  # of slice 1 it holds other steps: both count


def test_a_process_resumed_at_the_very_version_is_awaited_in_the_round_that_had_begun():
    run = opened("ada", "bob", count=1, min_workers=2)
    run.remove("bob", ends=True)
    push(run, "ada")
    assert run.over(0) == []  # one is too few
    join(run, "bob", session="bob2", resumes=[run.slices[0].version])
    assert run.missing(0) == {"bob"} and run.over(0) == []  # else its steps came too late
    assert run.place("bob", 0)[0] == [0]
    push(run, "bob", session="bob2", seq=2)
    assert run.over(0) == [0]


def test_a_join_again_keeps_what_is_known_of_the_process():
    run = opened("ada", "bob")
    push(run, "ada", k=1, closing=True)
    push(run, "bob", k=0)
    run.ask(member("ada"), 5)
    run.enter("ada", 5, life)
    assert run.members["ada"].closed == {1} and run.over(5) == [0]


def test_a_join_that_is_sent_again_begins_at_the_same_step_of_the_run():
    run = opened("ada", "bob")
    join(run, "cai", sync_every=4)
    began = run.members["cai"].begun
    run.members["ada"].sync_every = run.members["ada"].pace = 100
    push(run, "ada", step=100)
    join(run, "cai", sync_every=4)
    cai = run.members["cai"]
    assert (cai.begun, cai.step) == (began, began[0])
    assert cai.reach(cai.step + 1, 0) == began[0] + 1


def test_a_joiner_begins_with_the_first_slice_that_nobody_has_pushed():
    run = opened("ada", "bob", count=3)
    push(run, "ada", k=0)
    join(run, "cai")
    assert run.place("cai", 0) == ([3, 1, 2], None)
    run.members["ada"].cycle, run.members["ada"].fragments = 9, 3
    run.members["ada"].position, run.members["ada"].speed = 4, 1.0
    run.members["cai"].cycle = 18
    assert run.place("cai", 0) == ([3, 1, 2], 4)  # after 2 of 9 steps, and so after 4 of 18
    assert run.place("bob", 0)[0] == [0, 1, 2]  # waited for, it begins where the run waits
    push(run, "bob", k=0)
    assert run.place("bob", 0)[0] == [3, 1, 2]  # its push is there already


def test_sequence_numbers_are_known_from_entries_folds_and_open_rounds():
    run = opened("ada")
    push(run, "ada", seq=4)
    assert run.known("ada") == [4, 0]
    run.take(0, 0)
    assert run.known("ada") == [4, 0]
    run.publish(0)
    assert run.known("ada") == [4, 0] and run.known("bob") == [0, 0]


def test_a_push_of_a_predecessor_and_one_of_its_successor_both_count():
    run = opened("ada", "bob")
    push(run, "ada", seq=1)
    join(run, "ada", now=100, session="ada2")
    push(run, "ada", seq=2, session="ada2", now=100)
    assert [p.seq for p in run.take(0, 100).pushes] == [1, 2]


# --- Crashes --------------------------------------------------------------------------------


def reopened(run, now=100.0, heads=None, **rules):
    new = Run(Rules(**{"workers": 5, **rules}), now)
    if heads is None:
        heads = [(slice.version, slice.folded) for slice in run.slices]
    new.reopen(run.names(), heads, now)
    return new


def test_after_a_crash_the_members_are_waited_for_as_long_as_they_are_heard_of():
    run = reopened(opened("ada", "bob"), worker_timeout=30)
    run.ask(member("ada"), 101)
    assert not run.may_enter("ada", 130)
    assert refusal(lambda: run.hear("bob", "bob1", 120)) == "rejoin"  # alive, and about to join
    assert not run.may_enter("ada", 150) and run.may_enter("ada", 151)


def test_after_a_crash_all_that_wait_enter_in_the_order_of_their_indices():
    before = opened("ada", "bob")
    before.indices = {"ada": 1, "bob": 0}
    run = reopened(before)
    for id in ("ada", "bob", "aaa"):
        run.ask(member(id), 101)
    assert start(run, "ada", 101) == ["bob", "ada", "aaa"]
    assert [run.members[id].index for id in ("bob", "ada", "aaa")] == [0, 1, 2]


def test_a_run_goes_on_under_a_new_life_from_the_version_that_it_had():
    before = opened("ada")
    push(before, "ada")
    fold(before)
    run = reopened(before)
    run.ask(member("ada"), 101)
    start(run, "ada", 101)
    assert run.slices[0].version == Version(before.life, 1) and run.life > before.life
    push(run, "ada", seq=2)
    assert fold(run).version == Version(run.life, 2)


def test_a_crash_before_the_first_checkpoint_needs_no_n_workers_but_patience():
    run = Run(Rules(workers=5, worker_timeout=30), 0)
    run.ask(member("ada", versions=[Version("1" * 20, 2)] * 2), 1)
    assert not run.is_ready(30) and run.is_ready(31)
    run.ask(member("ada"), 2)
    assert not run.is_ready(1000)  # a model of its own is no reason to begin without the others


def test_a_stop_order_outlives_a_crash():
    before = opened("ada", "bob")
    before.stop()
    run = reopened(before)
    assert run.stopping == {"ada", "bob"}
    assert run.names()["members"] == ["ada", "bob"]


def test_a_sequence_number_is_the_next_or_little_more():
    run = opened("ada")
    assert refusal(lambda: push(run, "ada", seq=1001)) == "protocol"
    push(run, "ada")
    fold(run)
    assert refusal(lambda: push(run, "ada", seq=1002)) == "protocol"
    assert push(run, "ada", seq=1001)


def test_a_worker_whose_pushes_are_forgotten_has_made_no_more_than_there_were_rounds():
    run = opened("ada")
    run.slices[0].version = Version(run.life, 5000)
    assert refusal(lambda: push(run, "ada", seq=6001)) == "protocol"
    assert push(run, "ada", seq=6000)


def test_a_step_is_believed_as_far_as_the_rounds_allow():
    run = opened("ada", "bob")
    for seq in range(1, 9):
        push(run, "bob", seq=seq, step=1 << 50)
        assert push(run, "ada", seq=seq, step=seq)
        fold(run)
        assert run.step <= seq + 3  # each has cycles of one step
    join(run, "cai", sync_every=1 << 30)
    push(run, "cai", step=1 << 50)
    assert run.members["cai"].step <= run.step + 10 * 3


def test_a_base_of_a_life_that_is_not_known_makes_an_empty_push():
    run = opened("ada")
    push(run, "ada", base=Version("f" * 20, 3))
    assert "has not made" in fold(run).fates["ada"].refused


def test_strangers_and_lives_that_never_were_are_not_believed():
    old = opened("ada", count=1)
    push(old, "ada")
    fold(old)
    heads = [(old.slices[0].version, old.slices[0].folded)]
    run = reopened(old, heads=heads)
    newer = Version(old.life, 50)
    run.ask(member("eve", 1, versions=[newer], folded=[{}]), 100)
    assert run.waiting["eve"].versions == [FRESH]
    run.ask(member("ada", 1, versions=[Version("f" * 20, 2)], folded=[{}]), 100)
    assert run.waiting["ada"].versions == [FRESH]
    run.ask(member("ada", 1, versions=[newer], folded=[{}]), 100)
    assert run.lacking("ada", 100) == [0]


def judged(*norms, ratio=100.0, history=((1.0, 5.0),) * 3, steps=5):
    """Which of the pushes with these norms, of five steps each, are refused."""
    pushes = [
        Push(worker=str(i), session="", k=0, seq=1, base=FRESH, counted=steps, norm=norm)
        for i, norm in enumerate(norms)
    ]
    return [int(push.worker) for push in outsized(pushes, history, ratio)]


def test_a_push_is_judged_by_the_norm_per_step_of_the_rounds_before():
    assert judged(5.0, 499.0, 501.0) == [2]
    assert judged(5.0, 1e29, ratio=0) == [] == judged(1e29, history=((1.0, 5.0),) * 2)
    assert judged(4.9, steps=0) == []  # no larger than others are, whatever its steps
    assert judged(None, 0.0) == []


def test_refused_norms_are_in_no_history_and_claimed_steps_excuse_nothing():
    run = opened("ada", "bob", count=1)
    for seq in range(1, 14):
        push(run, "ada", seq=seq, norm=1.0)
        push(run, "bob", seq=seq, norm=1e9 if seq > 3 else 1.0, steps=1 << 29 if seq > 3 else 1)
        round = fold(run)
        assert bool(round.fates["bob"].refused) == (seq > 3) and not round.fates["ada"].refused
        assert round.outsized == [p for p in round.pushes if p.refused]
    assert run.slices[0].norms == [(1.0, 1.0)] * 10


# --- Schedule -------------------------------------------------------------------------------


def test_each_slice_is_pushed_once_in_a_cycle():
    schedule = Schedule(7, 3)
    assert [schedule.tick() for _ in range(9)] == [[], [0], [], [1], [], [], [2], [], [0]]


def test_buffers_are_pushed_with_the_last_fragment():
    schedule = Schedule(4, 2, 3)
    assert [schedule.tick() for _ in range(4)] == [[], [0], [], [1, 2]]
    assert schedule.order() == [0, 1, 2] and schedule.position == 0


def test_a_place_is_kept_where_the_slice_is_next_already():
    schedule = Schedule(6, 2)
    schedule.tick()
    schedule.align([0, 1])
    assert schedule.left == 2
    schedule.align([2, 3], 3)
    assert schedule.left == 3
    schedule.align([2, 1])
    assert (schedule.next, schedule.left) == (1, 3)
    schedule.align([2, 3], 100)
    assert (schedule.next, schedule.left) == (0, 3)  # never more than its interval


def test_a_worker_goes_on_behind_the_pushes_that_it_sends_anew():
    schedule = Schedule(6, 3)
    schedule.tick()
    schedule.tick()
    schedule.tick()  # slice 0 has been pushed; 1 is next, in a step
    schedule.align([0, 1, 2], None, out=[0])
    assert (schedule.next, schedule.left) == (1, 1)
    schedule.align([0, 1, 2], 1, out=[0, 1])
    assert (schedule.next, schedule.left) == (2, 2)  # the step was for slice 0
    schedule.align([0, 1, 2], 1, out=[0, 1, 2])
    assert (schedule.next, schedule.left) == (0, 1)


def test_a_worker_goes_on_with_the_next_turn_after_a_crash_that_left_uneven_versions():
    schedule = Schedule(6, 3)
    schedule.align([9, 7, 11], None, out=[1])  # version 2 of slice 1, 3 of the others
    assert schedule.next == 0  # and not slice 2, which is next in the cycle
    schedule.align([9, 7, 5], None, out=[2])
    assert schedule.next == 1
    schedule = Schedule(8, 4)
    schedule.align([8, 5, 6, 7], None, out=[2])
    assert schedule.next == 3  # with the push of turn 6, no round of turn 5 waits for it


def test_a_schedule_goes_on_from_a_saved_position():
    for position in range(6):
        schedule = Schedule(6, 3)
        schedule.resume(position, 6)
        assert schedule.position == position and 0 < schedule.left <= 2


# --- Outbox ---------------------------------------------------------------------------------


def test_steps_go_with_the_next_push_where_the_place_is_taken():
    outbox = Outbox("ada", 1)
    first = outbox.make(0, 4, 40)
    assert (first.seq, first.steps, first.tokens) == (1, 4, 40)
    assert outbox.make(0, 8, 80) is None and outbox.places[0].mark == (4, 40)
    assert outbox.take(0, Version("1", 1), {"ada": Fate(1, "", 1)}, False, 8) == (first, "")
    second = outbox.make(0, 9, 90)
    assert (second.seq, second.steps, second.tokens) == (2, 5, 50)
    assert second.base == Version("1", 1)


def test_a_place_is_given_back_by_the_entry_that_lists_the_push_and_by_no_other():
    outbox = Outbox("ada", 1)
    outbox.make(0, 4, 0)
    assert outbox.take(0, Version("1", 1), {"bob": Fate(3, "", 1)}, False, 4) == (None, "")
    assert outbox.places[0].pending and outbox.places[0].version == Version("1", 1)
    push, why = outbox.take(0, Version("1", 2), {"ada": Fate(1, "too large", 2)}, False, 4)
    assert push.seq == 1 and why == "too large" and not outbox.places[0].pending


def test_a_slice_in_full_replaces_what_is_known_of_fates():
    outbox = Outbox("ada", 1)
    outbox.take(0, Version("1", 1), {"bob": Fate(5, "", 1)}, False, 0)
    outbox.take(0, Version("2", 1), {"bob": Fate(4, "", 1)}, True, 0)
    assert outbox.places[0].folded == {"bob": Fate(4, "", 1)}


def test_uploads_take_turns_in_the_order_in_which_they_were_made():
    outbox = Outbox("ada", 3)
    first, second = outbox.make(2, 1, 0), outbox.make(0, 2, 0)
    assert outbox.upload() is first
    first.answered = True
    assert outbox.upload() is second
    second.answered = True
    assert outbox.upload() is None
    outbox.resend()
    assert outbox.upload() is first


def test_training_waits_for_a_push_that_is_due_unless_it_has_gone_on():
    outbox = Outbox("ada", 2)
    push = outbox.make(1, 4, 0, delay=2)
    assert outbox.blocked(5) == () and outbox.blocked(6) == (1, 1)
    push.late = True
    assert outbox.blocked(6) == ()


def test_closing_pushes_wait_for_a_place_that_is_taken_in_the_order_of_turns():
    outbox = Outbox("ada", 3)
    outbox.make(0, 4, 0)
    assert [push.k for push in outbox.close([2, 0, 1], 5, 0)] == [2]
    outbox.take(0, Version("1", 1), {"ada": Fate(1, "", 1)}, False, 5)
    assert [(push.k, push.steps) for push in outbox.close([2, 0, 1], 5, 0)] == [(0, 1), (1, 5)]
    assert outbox.closed == [] and all(push.closing for push in outbox.queue)
    for k in range(3):
        outbox.take(k, Version("1", 2), {"ada": Fate(2, "", 2)}, False, 5)
    assert outbox.is_closed and outbox.close([2, 0, 1], 5, 0) == []


def test_a_new_process_counts_on_from_what_the_server_knows():
    outbox = Outbox("ada", 2)
    outbox.make(1, 1, 0)
    assert outbox.know([7, 0]) == [1]  # slice 1 has a push that the server does not know
    assert outbox.know([7, 1]) == []
    assert outbox.make(0, 1, 0).seq == 8 and outbox.places[1].seq == 1


def test_steps_of_a_checkpoint_go_with_the_first_push():
    outbox = Outbox("ada", 1)
    outbox.take(0, Version("1", 3), {}, True, 0)
    outbox.resume(0, Version("1", 3), 5)
    assert outbox.make(0, 2, 0).steps == 7


def test_steps_that_are_given_up_are_in_no_push():
    outbox = Outbox("ada", 2)
    outbox.make(0, 3, 0)
    assert outbox.drop(5, 0) == [(0, 3, 5), (1, 0, 5)]
    assert outbox.make(1, 6, 0).first == 5


# --- Whole runs -----------------------------------------------------------------------------


def test_runs_under_faults_count_each_step_once_and_end():
    seeds = [*range(300), 664, 832, 110720]  # the last ones have shown faults of the rules
    seeds += [100020, 128306, 129354, 144435, 201524]  # of turns after a crash
    seeds += [130602, 135974]  # and these of the checks
    faults = {seed: fault for seed in seeds if (fault := simulator.fault_of(seed)[0])}
    assert faults == {}


@pytest.mark.parametrize(
    "name",
    [
        "a folded push counts again",
        "a refused push leaves no trace",
        "closing does not close",
    ],
)
def test_the_simulator_notices_a_broken_rule(name, monkeypatch):
    for module in ("server", "diloco_callback", "simulator"):
        monkeypatch.setitem(mutate.sys.modules, module, mutate.sys.modules[module])
    assert mutate.seeds_until_found(mutate.MUTATIONS[name], 100)[0]


def test_every_mutation_still_changes_the_text_that_it_names():
    for changes in mutate.MUTATIONS.values():
        assert mutate.texts(changes)
