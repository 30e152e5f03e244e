"""What is trained changes in the midst of a run: layers are unfrozen, frozen, replaced.

python -m pytest tests/test_manifest.py

The rules come first, without any process. Then the server is a real process, and workers train in
threads of the test's own process, in step where a test wants that.
"""

import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import toy_worker
from conftest import DEADLINE, ROOT, Outer, flat, put, status, until
from peers import Peer, background, encode, join_all, numbers, rounds, together
from safetensors.torch import load_file, save_file
from test_rules import fold, join, life, member, push, refusal

from diloco_callback import DiLoCoWorker, Refused
from protocol import FRESH, Message, Version, encode_header, manifest_from_json, memory
from server import GlobalModel, Rules, Run, Store

FP32 = ["--upload-codec", "fp32", "--download-codec", "fp32"]
MEAN = [*FP32, "--outer-momentum", 0, "--no-nesterov", "--outer-lr", 1]
MOMENTUM = [*FP32, "--outer-momentum", 0.9, "--no-momentum-warmup", "--outer-lr", 0.7]


pytestmark = pytest.mark.usefixtures("clean")


# --- The rules ---------------------------------------------------------------------------------


def changing(*ids, step=4, **rules):
    """A run of some workers with the tensors "old", all of which are at a step."""
    run = Run(Rules(**{"workers": len(ids), **rules}), 0.0)
    run.anew.layout = "old"
    for id in ids:
        run.ask(member(id, layout="old", sync_every=2), 0.0)
    for k in run.lacking(ids[0], 0.0):
        run.bring(ids[0], k)
    run.enter(ids[0], 0.0, life)
    for id in ids:
        run.members[id].step = step
    return run


def leave(run, id, layout="new", now=1.0, step=4, count=2):
    """A member closes its part, and asks to join with other tensors, in `count` slices."""
    versions = [min(slice.version for slice in run.slices)] * count
    if id in run.members:
        run.anew.expect(id, now)
    run.ask(member(id, layout=layout, sync_every=2, step=step, versions=versions), now)


def test_a_run_whose_members_all_come_back_with_other_tensors_opens_with_these():
    run = changing("ada", "bob")
    push(run, "ada", seq=3), push(run, "bob", seq=2)
    fold(run)
    before = max(slice.version for slice in run.slices)
    leave(run, "ada", count=3)
    assert run.is_open and not run.may_enter("ada", 1) and not run.anew.is_left_behind("ada")
    assert run.names()["members"] == ["ada", "bob"]
    leave(run, "bob", count=3)
    assert not run.is_open and not run.may_enter("ada", 1) and run.lacking("ada", 1) == []
    assert run.anew.lays_out("ada", 1) and not run.anew.lays_out("bob", 1)
    run.anew.lay_out("new", 3, is_whole=True)
    assert not run.anew.lays_out("ada", 1) and run.may_enter("bob", 1)
    assert run.enter("bob", 1, life) == ["ada", "bob"]
    assert {slice.version for slice in run.slices} == {Version(life(before.life), before.number)}
    assert run.known("ada") == [3, 3, 3] and run.known("bob") == [2, 2, 2]  # no push counts twice
    assert not run.expected and run.anew.before is None and run.members["ada"].step == 4


def test_what_the_server_lacks_is_brought_by_the_first_and_numbers_go_on():
    run = changing("ada", "bob")
    push(run, "ada"), push(run, "bob")
    fold(run)
    leave(run, "bob"), leave(run, "ada")
    run.anew.lay_out("new", 2, is_whole=False)
    assert run.lacking("ada", 1) == [0, 1] and not run.lacking("bob", 1)
    assert not run.may_enter("bob", 1)
    for k in (0, 1):
        run.bring("ada", k)
    run.enter("bob", 1, life)
    assert [slice.version.number for slice in run.slices] == [1, 1]


def test_who_changes_alone_waits_until_another_has_gone_on_for_a_cycle():
    run = changing("ada", "bob", min_workers=2)
    leave(run, "ada", step=1 << 40)  # which is not believed
    push(run, "bob")
    assert run.over(1) == [0]  # who waits to come back counts for --min-workers
    run.members["bob"].step = 5
    assert not run.anew.is_left_behind("ada")
    run.members["bob"].step = 6
    assert run.anew.is_left_behind("ada")
    run.anew.turn_away("ada")
    assert not run.expected and run.is_open and run.over(1) == []


def test_a_run_that_a_crash_closed_amid_a_change_opens_with_the_tensors_of_before():
    run = changing("ada", "bob")
    run.reopen(run.names(), [(s.version, s.folded) for s in run.slices], 2.0)
    run.is_open, run.members = False, {}
    leave(run, "ada", "new", 2.0)
    leave(run, "bob", "old", 2.0)
    assert not run.anew.lays_out("ada", 2) and run.may_enter("bob", 2)
    assert not run.may_enter("ada", 2)
    assert run.enter("bob", 2, life) == ["bob"] and run.expected.keys() == {"ada"}
    leave(run, "bob")
    assert run.anew.lays_out("ada", 2)


def test_a_stranger_with_the_tensors_of_before_does_not_open_the_run():
    run = changing("ada")
    leave(run, "ada")
    run.ask(member("cai", layout="old"), 1.0)
    assert not run.may_enter("cai", 1) and run.anew.lays_out("ada", 1)
    run.anew.lay_out("new", 2, is_whole=True)
    assert run.anew.is_left_behind("cai") and run.may_enter("ada", 1)
    run.enter("ada", 1, life)
    assert run.anew.is_left_behind("cai")


def test_who_is_lost_or_ends_instead_of_making_a_change_holds_nobody_up():
    for ends in (False, True):
        run = changing("ada", "bob", worker_timeout=5)
        leave(run, "ada")
        run.remove("bob", ends)
        assert not run.is_open and run.anew.lays_out("ada", 2)
    run = changing("ada", "bob", worker_timeout=5)
    leave(run, "ada")
    run.forget("ada", "ada1")
    run.anew.give_up_absent(5)
    assert run.expected
    run.anew.give_up_absent(7)
    assert not run.expected and run.away == {"ada"}
    join(run, "ada", 7, layout="old")


def test_nobody_new_comes_in_while_members_change_what_they_train():
    run = changing("ada", "bob")
    leave(run, "ada")
    run.ask(member("cai", layout="old"), 1.0)
    run.remove("bob", ends=False)
    assert not run.may_enter("cai", 1)
    run = changing("ada", "bob", "cai")
    leave(run, "ada")
    run.ask(member("dan", layout="old"), 1.0)
    run.ask(member("cai", layout="old", session="cai2"), 99.0)  # whose process was replaced
    assert not run.may_enter("dan", 99) and run.may_enter("cai", 99)
    run.anew.turn_away("ada")
    assert run.may_enter("dan", 99)


def test_a_member_that_left_to_come_back_is_told_to_join():
    run = changing("ada", "bob")
    run.anew.expect("ada", 1)
    assert refusal(lambda: push(run, "ada", base=FRESH, now=3)) == "rejoin"
    assert run.expected == {"ada": 3}


def test_a_round_from_before_a_change_is_folded_before_the_tensors_change():
    run = changing("ada", "bob")
    leave(run, "ada")
    push(run, "bob", seq=1)
    run.anew.expect("bob", 1.0)
    run.ask(member("bob", layout="new", sync_every=2, versions=[run.slices[0].version]), 1.0)
    assert not run.anew.lays_out("ada", 1)
    run.take(0, 1.0)
    assert not run.anew.lays_out("ada", 1)
    run.publish(0)
    assert run.anew.lays_out("ada", 1)


def test_nobody_brings_a_newer_version_than_the_server_has_led_the_run_to():
    run = changing("ada", "bob")
    push(run, "ada"), push(run, "bob")
    fold(run)
    leave(run, "bob")
    lie = [Version(run.life, 1 << 40)] * 2
    run.anew.expect("ada", 1.0)
    run.ask(member("ada", layout="new", sync_every=2, versions=lie), 1.0)
    assert run.waiting["ada"].versions == run.waiting["bob"].versions
    run.anew.lay_out("new", 2, is_whole=False)
    run.ask(member("ada", layout="new", sync_every=2, versions=lie), 1.0)
    for k in run.lacking("ada", 1):
        run.bring("ada", k)
    run.enter("ada", 1, life)
    assert [slice.version.number for slice in run.slices] == [1, 1]


def test_the_run_gets_the_tensors_that_most_come_back_with():
    run = changing("ada", "bob", "cai")
    leave(run, "ada", "hers"), leave(run, "bob"), leave(run, "cai")
    assert not run.anew.lays_out("ada", 1) and run.anew.lays_out("bob", 1)


def test_who_comes_back_with_the_tensors_of_before_is_expected_no_more():
    run = changing("ada", "bob")
    leave(run, "ada")
    run.forget("ada", "ada1")
    run.ask(member("ada", layout="old", session="ada2", sync_every=2, step=2), 2.0)
    run.enter("ada", 2.0, life)
    assert run.members.keys() == {"ada", "bob"} and not run.expected
    run.ask(member("cai", layout="old"), 2.0)
    assert run.may_enter("cai", 2.0)
    run.anew.give_up_absent(99.0)
    assert not run.away


# --- Workers -----------------------------------------------------------------------------------


class Trainee:
    """A worker that trains a network, of which all layers but the first are frozen at first."""

    def __init__(
        self, server, name, sync_every=2, frozen=None, dtype="float32", sizes=(5, 7, 2), **options
    ):
        self.model, self.name = toy_worker.build(sizes, dtype), name
        frozen = range(1, len(self.model)) if frozen is None else frozen
        for layer in frozen:
            self.model[layer].requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.05)
        arguments = (server.address, sync_every, name)
        self.worker = DiLoCoWorker(self.model, self.optimizer, *arguments, **options)
        self.noise = torch.Generator().manual_seed(ord(name[0]))

    def backward(self):
        self.optimizer.zero_grad()
        x = torch.randn(8, 5, generator=self.noise).to(self.model[0].weight.dtype)
        (self.model(x) - 1).square().mean().backward()

    def steps(self, count):
        for _ in range(count):
            self.backward()
            self.optimizer.step()

    def unfreeze(self, layer=1):
        self.model[layer].requires_grad_(True)
        self.optimizer.add_param_group({"params": self.model[layer].parameters()})

    def flush(self):
        self.worker.flush()
        self.worker.close()


def both(a, b, act):
    """Have two workers act at the same time."""
    return together(lambda: act(a), lambda: act(b))


def begun(server, *names, **options):
    """Workers that have joined, in threads of which each needs the others."""
    made = [Trainee(server, name, **options) for name in names]
    together(*(trainee.worker.start for trainee in made))
    return made


def assert_global(tmp_path, *trainees):
    """All have the same bits, which are those of the server's file."""
    served = load_file(tmp_path / "model" / "model.safetensors")
    for trainee in trainees:
        own = dict(trainee.model.named_parameters())
        assert served.keys() == own.keys()
        assert all(torch.equal(served[name], parameter) for name, parameter in own.items())


@pytest.mark.parametrize("at", [4, 5])
def test_a_layer_that_all_unfreeze_at_a_step_is_trained_by_all(serve, tmp_path, at):
    server = serve("-n", 2, "--until-done", *MEAN)
    a, b = begun(server, "ada", "bob")
    alone = [Trainee(server, name) for name in ("ada", "bob")]  # what it should come to, by hand
    for each in alone:
        each.worker.close()

    def mean():
        values = torch.stack([flat(each.model) for each in alone]).mean(0)
        for each in alone:
            put(each.model, values)

    for step in range(10):
        for each in alone:
            if step == at:
                each.unfreeze()
            each.backward()
        if step == at:
            mean()  # the gradients are older, as where the change is seen
        for each in alone:
            each.optimizer.step()
        if step % 2:
            mean()

    def train(each):
        each.steps(at)
        each.unfreeze()
        each.steps(10 - at)
        each.flush()

    both(a, b, train)
    assert torch.equal(flat(a.model), flat(b.model))
    assert torch.allclose(flat(a.model), flat(alone[0].model), atol=1e-6)
    assert a.worker.step == a.worker.local_step == 10 and a.worker.dropped_steps == 0
    assert server.wait() == 0, server.output
    assert server.output.count("the run starts at round") == 2
    assert server.output.count("the model of round") == 1  # nothing ends in between
    assert_global(tmp_path, a, b)
    numbers = [line["round"] for line in rounds(tmp_path / "model")]
    assert numbers == [*range(1, len(numbers) + 1)]
    assert sum(line["steps"] for line in rounds(tmp_path / "model")) == 20


def constant(trainee, count):
    """Steps that move each trained parameter by 0.05."""
    for _ in range(count):
        for parameter in trainee.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        trainee.optimizer.step()


def test_what_was_trained_before_keeps_its_momentum_and_what_is_new_has_none(serve, tmp_path):
    server = serve("-n", 1, "--until-done", *MOMENTUM)
    (a,) = begun(server, "ada")
    old, new = (Outer(flat(layer), "fp32", warmup=False) for layer in a.model)
    two = torch.full((1,), 0.1)  # what two steps are
    constant(a, 4)
    a.unfreeze()
    constant(a, 4)
    a.flush()
    for _ in range(4):
        old.step([two])
    for _ in range(2):
        new.step([two])
    assert torch.allclose(flat(a.model[0]), old.params, atol=1e-6)
    assert torch.allclose(flat(a.model[1]), new.params, atol=1e-6)
    assert server.wait() == 0
    assert_global(tmp_path, a)


def test_a_layer_that_is_frozen_is_not_moved_any_more(serve, tmp_path):
    server = serve("-n", 2, "--until-done", *MOMENTUM)
    a, b = begun(server, "ada", "bob", frozen=())
    still, moving = (Outer(flat(layer), "fp32", warmup=False) for layer in a.model)
    one, two = torch.full((1,), 0.05), torch.full((1,), 0.1)

    def train(each):
        constant(each, 4)
        each.model[0].requires_grad_(False)
        constant(each, 6)
        assert each.worker.trained.named.keys() == {"1.weight", "1.bias"}
        each.flush()

    both(a, b, train)
    still.step([two]).step([two])
    moving.step([two]).step([two]).step([one], closing=True).step([one]).step([two]).step([two])
    assert torch.allclose(flat(a.model[0]), still.params, atol=1e-6)
    assert torch.allclose(flat(a.model[1]), moving.params, atol=1e-6)
    assert server.wait() == 0
    assert_global(tmp_path, a, b)  # the frozen layer is in the file too


def test_what_is_frozen_and_trained_in_turn_stays_synchronized_after_the_first_time(serve):
    (a,) = begun(serve("-n", 1), "ada", frozen=())
    for i in range(12):
        a.model[0].requires_grad_(i % 2 == 0)
        a.steps(1)
    assert a.worker.leader.anew.count == 2
    assert len(a.worker.trained.named) == 4


def replace(trainee, width):
    """Put a new head in the place of the old one, another in each worker."""
    torch.manual_seed(ord(trainee.name[0]))
    trainee.model[1] = torch.nn.Linear(7, width)
    trainee.optimizer.param_groups[0]["params"] = [*trainee.model.parameters()]


def test_a_layer_of_another_size_takes_the_place_of_one(serve, tmp_path):
    server = serve("-n", 2, "--until-done", *MEAN)
    a, b = begun(server, "ada", "bob", frozen=())
    heads = []

    def train(each):
        each.steps(4)
        replace(each, 3)
        heads.append((each.name, flat(each.model[1])))
        for parameter in each.model[1].parameters():
            parameter.grad = torch.zeros_like(parameter)
        each.optimizer.step()
        heads.append((each.name, flat(each.model[1])))
        each.steps(5)
        each.flush()

    both(a, b, train)
    first = next(head for name, head in heads if name == "ada")
    assert all(torch.equal(head, first) for _, head in heads[-2:])  # all have the first worker's
    assert server.wait() == 0, server.output
    assert_global(tmp_path, a, b)
    assert a.model[1].weight.shape == (3, 7)


def test_a_tensor_of_the_same_size_is_synchronized_in_the_place_of_the_old_one(serve, tmp_path):
    server = serve("-n", 2, "--until-done", *MEAN)
    a, b = begun(server, "ada", "bob", frozen=())

    def train(each):
        each.steps(3)
        if each is a:
            replace(each, 2)
        each.steps(3)
        each.flush()

    both(a, b, train)
    assert a.worker.leader.anew.count == 0
    assert server.wait() == 0
    assert_global(tmp_path, a, b)


def test_a_parameter_that_is_resized_in_its_own_place_is_an_error(serve):
    (a,) = begun(serve("-n", 1), "ada", frozen=())
    a.model[0].weight.data = torch.zeros(7, 6)
    with pytest.raises(
        RuntimeError, match=r"'0.weight' was \[7, 5\] and is \[7, 6\].*new torch.nn"
    ):
        constant(a, 2)


@pytest.mark.parametrize("at", [8, 9, 11])
def test_streaming_workers_unfreeze_a_layer_with_pushes_under_way(serve, tmp_path, at):
    server = serve("-n", 2, "--until-done")
    a, b = begun(server, "ada", "bob", sync_every=4, num_fragments=2)

    def train(each):
        each.steps(at)
        each.unfreeze()
        each.steps(24 - at)
        each.flush()

    both(a, b, train)
    assert a.worker.leader.anew.count == 1 and a.worker.dropped_steps == 0
    assert a.worker.replica.mismatches == b.worker.replica.mismatches == 0
    assert server.wait() == 0, server.output
    assert_global(tmp_path, a, b)
    for k in (0, 1):
        assert sum(line["steps"] for line in rounds(tmp_path / "model", fragment=k)) == 48


@pytest.mark.parametrize("least", [1, 2])
def test_who_changes_alone_is_told_and_the_other_trains_on(serve, tmp_path, least):
    server = serve("-n", 2, "--until-done", "--min-workers", least, *MEAN)
    a, b = begun(server, "ada", "bob")

    is_told = threading.Event()

    def change():
        a.steps(4)
        a.unfreeze()
        with pytest.raises(Refused, match=r"bob did not make that change.*same step.*'1.weight'"):
            a.steps(1)
        a.worker.close()
        is_told.set()

    def go_on():
        b.steps(12 if least == 1 else 7)  # below --min-workers no round closes for bob alone
        is_told.wait(DEADLINE)
        b.flush()

    together(change, go_on)
    assert b.worker.local_step == (12 if least == 1 else 7) and b.worker.dropped_steps == 0
    assert server.wait() == 0, server.output
    served = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(served["0.weight"], b.model[0].weight) and "1.weight" not in served


@pytest.mark.parametrize("in_optimizer", [False, True])
def test_who_has_changed_alone_and_takes_it_back_trains_on(serve, tmp_path, in_optimizer):
    server = serve("-n", 2, "--until-done", *MEAN)
    a, b = begun(server, "ada", "bob", sync_every=3)
    is_told = threading.Event()
    if in_optimizer:  # from the beginning, so that nothing else shows the change
        for each in (a, b):
            each.optimizer.add_param_group({"params": each.model[1].parameters()})

    def change():
        a.steps(4)
        a.model[1].requires_grad_(True)
        if not in_optimizer:
            a.optimizer.add_param_group({"params": a.model[1].parameters()})
        with pytest.raises(Refused, match="bob did not make that change"):
            a.steps(1)
        is_told.set()
        for _ in range(2):
            with pytest.raises(Refused, match=r"not the one of the run.*'1.weight'"):
                a.steps(1)
        a.model[1].requires_grad_(False)
        a.optimizer.zero_grad()
        a.steps(4)
        a.flush()

    def go_on():
        b.steps(12)
        is_told.wait(DEADLINE)
        until(lambda: len(status(server)["workers"]) == 2, "ada is back")
        b.steps(6)
        b.flush()

    together(change, go_on)
    assert a.worker.local_step == 8 and a.worker.dropped_steps == 0
    assert server.wait() == 0, server.output
    assert sum(line["steps"] for line in rounds(tmp_path / "model")) == 18 + 8
    served = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(served["0.weight"], b.model[0].weight)


def test_who_has_changed_alone_can_end_with_a_flush(serve):
    server = serve("-n", 2, "--until-done", *MEAN)
    a, b = begun(server, "ada", "bob")
    is_told = threading.Event()

    def change():
        a.steps(4)
        a.unfreeze()
        with pytest.raises(Refused, match="bob did not make that change"):
            a.steps(1)
        is_told.set()
        a.flush()

    together(change, lambda: (b.steps(8), is_told.wait(DEADLINE), b.flush()))
    assert server.wait() == 0, server.output


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_server_that_is_killed_after_a_change_goes_on(serve, tmp_path, is_lost):
    server = serve("-n", 2, "--save-every", 1, *MOMENTUM)
    a, b = begun(server, "ada", "bob", frozen=(1,))
    both(a, b, lambda each: each.steps(4))
    until(
        lambda: (tmp_path / "model" / "checkpoint-2").exists(), "the checkpoint before the change"
    )
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "model" / "checkpoint-2", kept)

    def change(each):
        each.model[0].requires_grad_(False)
        each.unfreeze()
        each.steps(3)

    both(a, b, change)
    until(lambda: (tmp_path / "model" / "checkpoint-4").exists(), "the checkpoint after the change")
    server.signal(signal.SIGKILL)
    server.wait()
    if is_lost:  # the server has no more than what it had before the change
        for folder in (tmp_path / "model").glob("checkpoint-*"):
            shutil.rmtree(folder)
        shutil.move(kept, tmp_path / "model" / "checkpoint-2")
    frozen = flat(a.model[0]).clone()
    again = serve("-n", 2, "--until-done", "--port", server.port, "--save-every", 1, *MOMENTUM)

    def go_on(each):
        each.steps(6)
        each.flush()

    both(a, b, go_on)
    assert again.wait() == 0, again.output
    assert torch.equal(flat(a.model), flat(b.model))
    if not is_lost:
        assert torch.equal(flat(a.model[0]), frozen)
    assert_global(tmp_path, a, b)
    numbers = [line["round"] for line in rounds(tmp_path / "model")]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_numbers_of_m_are_taken_where_they_are_the_newest_and_only_there(
    serve, tmp_path, dtype
):
    source = tmp_path / "base.safetensors"
    base = toy_worker.build((5, 7, 2), dtype, seed=7)
    save_file(base.state_dict(), source)
    server = serve("-m", source, "-n", 2, "--until-done")
    a, b = begun(server, "ada", "bob", dtype=dtype)
    assert torch.equal(flat(a.model), flat(base))  # the second layer is frozen, and fetched

    def train(each):
        each.steps(5)
        each.model[0].requires_grad_(False)  # which -m has as it was at first
        each.unfreeze()
        each.steps(1)
        frozen = flat(each.model[0])
        each.steps(6)
        each.flush()
        return frozen

    first, second = both(a, b, train)
    assert "tensors come from" not in server.output  # nothing had to be uploaded
    assert torch.equal(first, second) and torch.equal(first, flat(b.model[0]))
    assert not torch.equal(first, flat(base[0]))
    assert server.wait() == 0, server.output
    served = load_file(tmp_path / "base-diloco" / "model.safetensors")
    for name, parameter in a.model.named_parameters():
        assert torch.equal(served[name], parameter) and served[name].dtype == parameter.dtype
        assert torch.equal(dict(b.model.named_parameters())[name], parameter)
    assert not torch.equal(flat(a.model[1]), flat(base[1]))


def test_who_is_told_to_leave_while_it_waits_for_the_others_has_sent_its_steps(serve, tmp_path):
    patience = ["--round-timeout", 0.2, "--worker-timeout", 3]  # so that no round waits for bob
    server = serve("-n", 2, "--until-done", *patience, *MEAN)
    a, b = begun(server, "ada", "bob")
    both(a, b, lambda each: each.steps(4))
    a.unfreeze()
    leaver = background(lambda: (a.steps(3), a.flush()))
    until(lambda: "ada" in status(server)["joining"], "ada waits for bob's change")
    a.worker.part()
    leaver.result(DEADLINE)
    assert a.worker.local_step == 7 and a.worker.flushed
    b.steps(2)
    b.flush()
    assert server.wait() == 0, server.output
    assert sum(line["steps"] for line in rounds(tmp_path / "model")) == 4 + 6


def test_an_entry_that_comes_behind_the_last_wait_is_of_the_tensors_before(serve):
    """`part` ends the wait for closing pushes that have arrived; their entries come all the same, and are
    of no slice that the worker has after the change."""
    (ada,) = begun(serve("-n", 1), "ada")
    ada.steps(3)
    leader, listed, joins = ada.worker.leader, ada.worker.replica.listed, []
    close, join = leader.close_slices, leader.join

    def close_slices():
        close()
        listed[0] = SimpleNamespace(late=False, adopt_at=0), "", 0

    def join_anew(seconds):
        joins.append(dict(listed))
        join(seconds)

    leader.close_slices, leader.join = close_slices, join_anew
    ada.unfreeze()
    ada.steps(1)
    leader.close_slices = close
    assert joins == [{}]
    ada.flush()


def test_a_worker_that_is_slower_is_waited_for(serve, tmp_path):
    server = serve("-n", 2, "--until-done", "--round-timeout", 0.1, *MEAN)
    a, b = begun(server, "ada", "bob")

    def train(each):
        each.unfreeze()
        each.steps(4)
        each.flush()

    a.steps(6)  # rounds of its own
    quicker = background(lambda: train(a))
    until(lambda: "ada" in status(server)["joining"], "ada waits for bob's change")
    b.steps(6)
    train(b)
    quicker.result(DEADLINE)
    assert torch.equal(flat(a.model), flat(b.model))
    assert server.wait() == 0, server.output
    assert_global(tmp_path, a, b)


@pytest.mark.parametrize("fragments", [1, 2])
def test_layers_are_unfrozen_one_after_the_other(serve, tmp_path, fragments):
    server = serve("-n", 2, "--until-done", "--upload-codec", "int4")
    a, b = begun(server, "ada", "bob", sync_every=4, num_fragments=fragments, sizes=(5, 6, 4, 2))

    def train(each):
        for layer in (1, 2):
            each.steps(6)
            each.unfreeze(layer)
        each.steps(6)
        each.model[0].requires_grad_(False)
        each.steps(6)
        each.flush()

    both(a, b, train)
    assert a.worker.leader.anew.count == 3 and a.worker.replica.mismatches == 0
    assert server.wait() == 0, server.output
    assert_global(tmp_path, a, b)


def test_two_that_begin_a_run_with_other_frozen_numbers_are_told(serve):
    server = serve("-n", 2)
    a, b = (Trainee(server, name) for name in ("ada", "bob"))
    with torch.no_grad():
        b.model[1].weight += 1
    first = background(a.worker.start)
    until(lambda: "ada" in status(server)["joining"], "ada waits for bob")
    with pytest.raises(
        Refused, match=r"frozen tensor '1.weight' has other numbers than that of ada"
    ):
        b.worker.start()
    with torch.no_grad():
        b.model[1].weight -= 1
    together(Trainee(server, "bob").worker.start, lambda: first.result(DEADLINE))


def test_frozen_modules_that_come_with_a_change_must_be_alike(serve):
    server = serve("-n", 2, *MEAN)
    a, b = begun(server, "ada", "bob")

    both(a, b, lambda each: each.steps(4))

    def change(each, seed):
        torch.manual_seed(seed)
        each.model.add_module("2", torch.nn.Linear(2, 2).requires_grad_(False))
        each.unfreeze()
        each.steps(1)

    asked = {each: background(lambda e=each, i=i: change(e, i)) for i, each in enumerate((a, b))}
    until(lambda: any(future.done() for future in asked.values()), "one of them is told")
    told, other = sorted((a, b), key=lambda each: not asked[each].done())
    says = rf"frozen tensor '2.weight' has other numbers than that of {other.name}"
    with pytest.raises(Refused, match=says):
        asked[told].result()
    told.model[2].load_state_dict(other.model[2].state_dict())
    told.steps(1)
    asked[other].result(DEADLINE)
    both(a, b, lambda each: each.steps(3))
    assert torch.equal(flat(a.model), flat(b.model))


def test_a_slice_that_was_not_taken_yet_is_brought_as_the_worker_has_it(serve):
    (a,) = begun(serve("-n", 1), "ada", num_fragments=2)
    a.steps(1)
    for slice, is_blank in zip(a.worker.slices, (False, True), strict=True):
        slice.anchor.fill_(7)
        slice.is_blank = is_blank  # as where the server dies amid the join

    class Line:
        def moved_since(self):
            return lambda: 0

        def request(self, type, fields, specs, parts, on_wait):
            return [*parts]

    wanted = Message("bring", {"slices": [0, 1], "files": False}, [])
    parts = a.worker.leader.admission.bring(Line(), wanted)
    assert set(parts[0].tolist()) == {7} and torch.equal(parts[1], flat(a.model[0])[1::2])


def test_who_is_resumed_from_before_a_change_is_told_and_from_after_it_goes_on(serve, tmp_path):
    server = serve("-n", 1, *MEAN)
    (a,) = begun(server, "ada")
    a.steps(2)
    before = a.worker.state_dict()
    a.unfreeze()
    a.steps(3)
    after, weights = a.worker.state_dict(), {n: p.clone() for n, p in a.model.state_dict().items()}
    a.worker.close()
    old = Trainee(server, "ada", state=before)
    with pytest.raises(Refused, match=r"not the one of the run.*'1.weight'.*missing here"):
        old.worker.start()
    new = Trainee(server, "ada", frozen=(), state=after)
    new.model.load_state_dict(weights)
    with new.worker:
        assert new.worker.kept_local and new.worker.step == 5
        new.steps(3)
    assert status(server)["parameters"] == 7 * 5 + 7 + 2 * 7 + 2


def test_a_buffer_that_comes_with_a_new_layer_travels_too(serve, tmp_path):
    server = serve("-n", 2, "--until-done", *MEAN)
    a, b = begun(server, "ada", "bob", frozen=())

    def train(each):
        each.steps(3)
        each.model.add_module("2", torch.nn.BatchNorm1d(2))
        each.optimizer.add_param_group({"params": each.model[2].parameters()})
        each.steps(5)
        each.flush()

    both(a, b, train)
    assert server.wait() == 0, server.output
    served = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in served.items():
        assert torch.equal(a.model.state_dict()[name], tensor), name
        assert torch.equal(b.model.state_dict()[name], tensor), name
    assert "2.running_mean" in served and "2.weight" in served


def test_a_buffer_that_all_make_a_parameter_is_trained_from_then_on(serve, tmp_path):
    server = serve("-n", 2, "--until-done", *MEAN)
    a, b = (Trainee(server, name, frozen=()) for name in ("ada", "bob"))
    for each in (a, b):
        each.worker.close()  # which was not started
        each.model.register_buffer("scale", torch.ones(2))
        arguments = (each.model, each.optimizer, server.address, 2, each.name)
        each.worker = DiLoCoWorker(*arguments)

    def train(each):
        each.worker.start()
        each.steps(3)
        del each.model.scale
        each.model.scale = torch.nn.Parameter(torch.ones(2))
        each.optimizer.add_param_group({"params": [each.model.scale]})
        each.steps(3)
        each.flush()

    both(a, b, train)
    assert a.worker.leader.anew.count == 1 and server.wait() == 0, server.output
    assert_global(tmp_path, a, b)


# --- Members that are broken or hostile --------------------------------------------------------


def enter_anew(peer, manifest, **fields):
    """Join with other tensors, of zeros."""
    peer.manifest = manifest_from_json(manifest)
    peer.params = torch.zeros(sum(spec.numel for spec in peer.manifest))
    reply = peer.ask(again=True, **fields)
    while reply.type == "bring":
        reply = peer.bring(reply.fields["slices"], reply.fields["files"])
    return peer.enter(reply)


def test_what_was_trained_and_is_gone_stays_in_no_memory(tmp_path):
    store = Store(str(tmp_path / "model"))
    for i in range(3):
        specs = manifest_from_json([[f"x{i}", "F32", [2]]])
        frozen = {f"x{i}": (specs[0], "0" * 32)}
        store.keep(GlobalModel(specs, [], 1, "fp32", "fp32", False), frozen)
        store.note_frozen(frozen, "ada")
        assert store.weights.keys() == store.kept.keys() == {f"x{i}"}


WIDER = [["w", "F32", [3, 4]], ["x", "F32", [7]]]


def amid_a_change(server, rounds=3):
    """A worker that has made some rounds, and is asked to bring tensors of which the server lacks one;
    gives it with the numbers and the version of before."""
    a = Peer(server, "ada", torch.zeros(12), WIDER[:1]).join()
    for i in range(rounds):
        a.push(numbers(1, 12), closing=i == rounds - 1)
    before, version = a.params.clone(), a.version
    a.manifest = manifest_from_json(WIDER)
    assert a.ask(again=True).type == "bring"
    return a, before, version


def test_a_server_that_is_stopped_while_new_tensors_are_brought_has_saved_the_rounds(
    serve, tmp_path
):
    server = serve("-n", 1, "--save-every", 100, *FP32)
    _, before, _ = amid_a_change(server)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    saved = load_file(tmp_path / "model" / "checkpoint-3" / "model.safetensors")
    assert torch.equal(saved["w"].flatten(), before)


@pytest.mark.parametrize("every", [0, 100])
@pytest.mark.parametrize("is_new", [False, True])
def test_a_server_that_is_killed_while_new_tensors_are_brought_has_saved_the_rounds(
    serve, is_new, every
):
    server = serve("-n", 1, "--save-every", every, *MOMENTUM)
    a, before, version = amid_a_change(server)
    server.signal(signal.SIGKILL)
    server.wait()
    a.close()
    again = serve("-n", 1, "--port", server.port, "--save-every", every, *MOMENTUM)
    a.manifest = manifest_from_json(WIDER[:1])
    if is_new:
        enter_anew(a, WIDER)
    else:
        a.join(again=True)
    assert torch.equal(a.params[:12], before) and a.version.number == version.number
    a.push(torch.zeros(a.params.numel()))
    outer = Outer(torch.zeros(12), "fp32", warmup=False)
    for i in range(3):
        outer.step([numbers(1, 12)], closing=i == 2)
    outer.step([torch.zeros(12)])
    assert torch.allclose(a.params[:12], outer.params, atol=1e-6)  # the momentum goes on
    assert status(again)["expected"] == []


def test_a_disk_that_takes_no_checkpoint_does_not_hold_a_change_up(serve, tmp_path):
    server = serve("-n", 1, "--save-every", 100, *FP32)
    (tmp_path / "model" / "checkpoint-3").mkdir(parents=True)  # which is not the server's
    amid_a_change(server)
    assert "checkpoint-3 is not this program's" in server.output


def test_the_final_model_that_is_due_is_written_before_the_tensors_change(serve, tmp_path):
    server = serve("-n", 2, "--until-done", "--save-every", 1, "--worker-timeout", 1, *FP32)
    a, b = (Peer(server, name, torch.zeros(12), WIDER[:1]) for name in ("ada", "bob"))
    join_all(a, b)
    together(*(lambda p=p: p.push(numbers(1, 12), closing=True) for p in (a, b)))
    before = a.params.clone()
    a.manifest = manifest_from_json(WIDER)
    asked = background(lambda: a.ask(again=True))
    until(lambda: "ada" in status(server)["joining"], "ada waits for bob's change")
    b.leave()
    assert asked.result(DEADLINE).type == "bring"
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(saved["w"].flatten(), before)
    a.close()
    assert server.wait() == 0


def test_a_server_that_saves_at_the_end_only_still_has_what_a_change_has_frozen(serve, tmp_path):
    server = serve("-n", 1, "--save-every", 0, *MOMENTUM)
    (a,) = begun(server, "ada", frozen=(1,))
    a.steps(4)
    a.model[0].requires_grad_(False)
    a.unfreeze()
    a.steps(3)
    server.signal(signal.SIGKILL)
    server.wait()
    again = serve("-n", 1, "--until-done", "--port", server.port, "--save-every", 0, *MOMENTUM)
    a.steps(6)
    a.flush()
    a.worker.close()
    assert again.wait() == 0, again.output
    assert_global(tmp_path, a)


def test_a_push_that_began_before_a_change_does_not_count_after_it(serve):
    server = serve("-n", 1, *FP32)
    small = [["w", "F32", [3, 4]]]
    a = Peer(server, "ada", torch.zeros(12), small).join()
    payload, line = encode(numbers(1, 12), "fp32"), a.connect()
    fields = {"slice": 0, "seq": 1, "base": a.version, "step": 5, "steps": 5}
    line.send_raw(encode_header({"type": "push", **fields}, payload.specs))
    time.sleep(0.3)  # the server reads the push
    enter_anew(a, [*small, ["x", "F32", [7]]])
    for tensor in payload.tensors.values():
        line.send_raw(bytes(memory(tensor)))
    with pytest.raises(Refused, match="join again"):
        Peer.receive(line)
    a.push(numbers(2, 19))
    assert server.process.poll() is None and a.version.number == 1


LIGHTNING = """
import sys, lightning, torch
from lightning.pytorch.callbacks import BackboneFinetuning
sys.path.insert(0, {root!r})
import diloco_callback
diloco_callback.thawed_later = lambda model: []  # or all would be synchronized from the beginning
torch.set_num_threads(1)
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = torch.nn.Linear(5, 4), torch.nn.Linear(4, 2)
    def training_step(self, batch, index):
        return (self.head(torch.tanh(self.backbone(batch))) - 1).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)
module, name = Module(), sys.argv[1]
callbacks = [diloco_callback.LightningCallback({address!r}, 3, name), BackboneFinetuning(2)]
off = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
trainer = lightning.Trainer(
    accelerator="cpu", max_epochs=4, callbacks=callbacks, log_every_n_steps=1,
    **dict.fromkeys(off, False),
)
torch.manual_seed(ord(name[0]))
trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 5), batch_size=4))
assert callbacks[0].worker.leader.anew.count == 1
from safetensors.torch import save_file
save_file(module.state_dict(), sys.argv[2])
"""


def test_backbone_finetuning_of_lightning_joins_anew(serve, start, tmp_path):
    pytest.importorskip("lightning")
    server = serve("-n", 2, "--until-done")
    script = tmp_path / "train.py"
    script.write_text(LIGHTNING.format(root=ROOT, address=server.address))
    workers = [
        start(script, name, tmp_path / f"{name}.safetensors", env={"DILOCO_SERVER": ""})
        for name in ("ada", "bob")
    ]
    for worker in workers:
        assert worker.wait(180) == 0, worker.output
    assert server.wait() == 0, server.output
    served = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("ada", "bob"):
        own = load_file(tmp_path / f"{name}.safetensors")
        assert own.keys() == served.keys()
        assert all(torch.equal(own[n], tensor) for n, tensor in served.items())
