"""What a program does beside the worker, and would give wrong results of which nobody is told.

python -m pytest tests/test_silent.py

The server is a real process; workers run in the test's own process. Where a test is about the numbers
that two workers come to, both train here, in turn.
"""

import copy
import gc
import re
import threading
import types

import pytest
import schedulefree
import torch
import toy_worker
from conftest import flat
from peers import together

import protocol
from diloco_callback import (
    DiLoCoCallback,
    DiLoCoWorker,
    Refused,
    Slice,
    Trained,
    Watch,
    own_modes,
    plain_names,
)

pytestmark = pytest.mark.usefixtures("clean")


class Said(list):
    """A log that is a list of its lines, but for those on rounds."""

    __call__ = list.append

    def seldom(self, kind, text):
        assert kind == "rounds"


@pytest.fixture
def said(monkeypatch):
    """The lines that are logged."""
    lines = Said()
    monkeypatch.setattr("diloco_callback.log", lines)
    return lines


def sgd(*modules, lr=0.05):
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=lr)


def step(model, *optimizers, seed=0):
    """One step of regression on noise."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    (model(x) - 1).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def begun(server, model, optimizer, name="a", sync_every=2, **options):
    return DiLoCoWorker(model, optimizer, server.address, sync_every, name, **options).start()


# --- Which data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_workers_that_train_on_the_same_data_are_told_of_once(serve, own):
    server = serve("-n", 2, "--until-done")

    def train(name):
        model = toy_worker.build((5, 7, 2))
        optimizer = sgd(model)
        with begun(server, model, optimizer, name) as worker:
            for i in range(6):
                step(model, optimizer, seed=i + 100 * worker.index * own)

    together(lambda: train("a"), lambda: train("b"))
    assert server.wait() == 0
    told = [line for line in server.lines if "are identical" in line]
    assert len(told) == (not own)
    assert all("the pushes of a and b" in line for line in told)


# --- What is trained ---------------------------------------------------------------------------


def unfreeze(model):
    model[1].requires_grad_(True)


def replace(model):
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone())


def resize(model):
    model[0].weight.data = torch.zeros(7, 6)


def add(model):
    model.add_module("2", torch.nn.Linear(2, 2))


def remove(model):
    model[0].bias = None


@pytest.mark.parametrize(
    "change, text",
    [
        (unfreeze, "parameter '1.weight' was frozen and is trained now"),
        (replace, "parameter '0.weight' has been replaced"),
        (resize, r"parameter '0.weight' was \[7, 5\] and is \[7, 6\]"),
        (add, "parameter '2.weight' is new"),
        (remove, "parameter '0.bias' is not in the model any more"),
        (torch.nn.Module.double, "parameter '0.weight' is float64 now"),
    ],
)
def test_a_change_of_what_is_trained_names_the_tensor(change, text):
    model = toy_worker.build((5, 7, 2))
    model[1].requires_grad_(False)
    worker = DiLoCoWorker(model, sgd(model[0]), "host:1", 2, "a")
    worker.watch.check()
    change(model)
    with pytest.raises(RuntimeError, match=text):
        worker.watch.check()


def test_a_change_that_no_step_follows_is_an_error_and_nothing_is_overwritten(serve):
    model = toy_worker.build((5, 7, 2))
    model[1].requires_grad_(False)
    optimizer = sgd(model[0])
    worker = begun(serve("-n", 1), model, optimizer)
    step(model, optimizer)
    unfreeze(model)
    moved = flat(model)
    with pytest.raises(
        RuntimeError, match=r"'1.weight' was frozen.*step after.*trained=.*patterns"
    ):
        worker.flush()
    assert torch.equal(flat(model), moved)


def test_a_worker_of_several_ranks_does_not_join_anew(serve):
    model = toy_worker.build((5, 7, 2))
    model[1].requires_grad_(False)
    optimizer = sgd(model[0])
    worker = begun(serve("-n", 1), model, optimizer)
    worker.ranks.is_sharded = True  # as a model that fully_shard has cut
    unfreeze(model)
    worker.watch.about(optimizer)
    with pytest.raises(RuntimeError, match=r"'1.weight' was frozen.*a worker of one process"):
        worker.watch.check()
    worker.ranks.is_sharded = False


def test_a_layer_that_is_frozen_at_first_may_be_named(serve, said):
    server = serve("-n", 2)
    models = [toy_worker.build((5, 7, 2)) for _ in "ab"]

    def train(model, name):
        model[1].requires_grad_(False)
        optimizer = sgd(model[0])
        with DiLoCoWorker(model, optimizer, server.address, 2, name, trained="1.*"):
            for i in range(6):
                if i == 3:
                    model[1].requires_grad_(True)
                    optimizer.add_param_group({"params": model[1].parameters()})
                step(model, optimizer, seed=ord(name) + i)

    start = flat(models[0][1])
    together(lambda: train(models[0], "a"), lambda: train(models[1], "b"))
    assert torch.equal(flat(models[0]), flat(models[1]))
    assert not torch.equal(flat(models[0][1]), start)
    assert not any("WARNING" in line for line in said)


def test_a_layer_that_is_frozen_later_stays_synchronized_and_that_is_said(said):
    model = toy_worker.build((5, 7, 2))
    worker = DiLoCoWorker(model, sgd(model), "host:1", 2, "a")
    model[0].requires_grad_(False)
    for _ in range(2):
        worker.watch.check()
    [line] = [line for line in said if "requires_grad=False" in line]
    assert "'0.weight'" in line


def test_a_finetuning_callback_of_lightning_has_the_whole_model_synchronized():
    class BackboneFinetuning(type("BaseFinetuning", (), {})):
        pass

    model = toy_worker.build((5, 7, 2))
    model[1].requires_grad_(False)
    assert list(Trained(model, sgd(model[0])).named) == ["0.weight", "0.bias"]
    model._trainer = types.SimpleNamespace(callbacks=[BackboneFinetuning()])
    assert len(Trained(model, sgd(model[0])).named) == 4


def test_backbone_finetuning_of_lightning(serve, tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import BackboneFinetuning
    from safetensors.torch import load_file

    class DiLoCo(DiLoCoCallback, lightning.Callback):
        def on_train_start(self, trainer, module):
            self.on_train_begin(None, None, None, module, trainer.optimizers)

        def on_train_end(self, trainer, module):
            super().on_train_end(None, None, None)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = torch.nn.Linear(5, 4), torch.nn.Linear(4, 2)

        def training_step(self, batch, index):
            return (self.head(torch.tanh(self.backbone(batch))) - 1).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)

    host, module = serve("-n", 1, "--until-done"), Module()
    before = module.backbone.weight.detach().clone()
    names = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[DiLoCo(host.address, 3), BackboneFinetuning(2)],
        **dict.fromkeys(names, False),
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 5), batch_size=4))
    assert host.wait() == 0
    served = load_file(tmp_path / "model" / "model.safetensors")
    assert served.keys() == dict(module.named_parameters()).keys()
    assert all(torch.equal(served[name], p) for name, p in module.named_parameters())
    assert not torch.equal(module.backbone.weight, before)


# --- The optimizer that steps ------------------------------------------------------------------


def test_every_trained_parameter_is_in_one_of_the_optimizers(said):
    model = toy_worker.build((5, 7, 2))
    with pytest.raises(ValueError, match=r"'1.weight' requires grad, but is in no group"):
        Trained(model, sgd(model[0]))
    Trained(model, [sgd(model[0]), sgd(model[1])])
    Trained(model, sgd(model[0]), local=["1.*"])
    assert not said
    worker = DiLoCoWorker(model[0], optimizer := sgd(model), "host:1", worker_id="a")
    assert "2 parameters of the optimizer are not in the model" in said[0]
    worker.watch.check()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(9))]})
    worker.watch.check()
    assert len(said) == 2 and "such as one of shape [9]" in said[1]


@pytest.mark.parametrize("counted", [0, 2])
def test_steps_of_another_optimizer_are_an_error_and_nothing_is_overwritten(serve, counted):
    model = toy_worker.build((5, 7, 2))
    optimizer, other = sgd(model), torch.optim.AdamW(model.parameters())
    worker = begun(serve("-n", 1), model, optimizer)
    for _ in range(counted):
        step(model, optimizer)
    for _ in range(3):
        step(model, other)
    moved = flat(model)
    with pytest.raises(RuntimeError, match=r"AdamW.*not given.*'0.weight' 3 times"):
        worker.flush()
    step(model, optimizer)
    with pytest.raises(RuntimeError, match=r"AdamW"):
        step(model, optimizer)
    worker.close()
    assert not torch.equal(flat(model), moved)


@pytest.mark.parametrize("counted", [0, 4])
def test_a_copy_that_is_trained_in_the_models_place_is_told_of(serve, said, counted):
    model = toy_worker.build((5, 7, 2))
    optimizer = sgd(model)
    worker = begun(serve("-n", 1), model, optimizer, sync_every=3)
    for _ in range(counted):
        step(model, optimizer)
    copied = copy.deepcopy(model)
    other = torch.optim.AdamW(copied.parameters())
    for _ in range(9):
        step(copied, other)
    assert "AdamW" in worker.watch.last_words() and "last 9 steps" in worker.watch.last_words()
    assert not any("copy.deepcopy" in line for line in said)
    for _ in range(150):
        step(copied, other)
    worker.flush()
    worker.close()
    (line,) = [line for line in said if "copy.deepcopy" in line]
    assert "the last 100 steps are those of AdamW" in line


def test_a_copy_that_is_trained_for_a_while_is_told_of_at_the_end(serve, said):
    model = toy_worker.build((5, 7, 2))
    optimizer = sgd(model)
    worker = begun(serve("-n", 1), model, optimizer)
    step(model, optimizer)
    for _ in range(3):  # an optimizer anew for each step
        step(model[:], sgd(copied := copy.deepcopy(model)))
        step(copied, sgd(copied))
    worker.flush()
    assert any("the last 6 steps are those of SGD, which" in line for line in said)
    step(copied, sgd(copied))  # behind the flush it may be
    assert not worker.watch.last_words()


def test_models_that_are_trained_beside_are_no_copies(serve, said):
    """A discriminator, a twin of the same shapes that steps more often, and an average."""
    model, twin = toy_worker.build((5, 7, 2)), toy_worker.build((5, 7, 2))
    discriminator = torch.nn.Sequential(torch.nn.Linear(2, 7), torch.nn.Linear(7, 1))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer, its, judging = sgd(model), sgd(twin), sgd(discriminator)
    worker = begun(serve("-n", 1), model, optimizer)
    for _ in range(250):
        judging.step()
    for _ in range(30):
        step(model, optimizer)
        for _ in range(5):
            step(twin, its)
        average.update_parameters(model)
    assert its in worker.watch.beside.alike and judging in worker.watch.harmless
    worker.flush()
    assert not any("copy.deepcopy" in line for line in said)


def test_another_worker_of_this_process_trains_no_copy(serve, said):
    models = [toy_worker.build((5, 7, 2)) for _ in range(2)]
    optimizers = [*map(sgd, models)]
    host = serve("-n", 1)
    first = begun(host, models[0], optimizers[0], sync_every=200)
    second = begun(host, models[1], optimizers[1], "b", sync_every=200)
    for _ in range(150):
        step(models[1], optimizers[1])
    assert not first.watch.beside.alike and not first.watch.last_words()
    first.close()
    second.close()
    assert not any("copy.deepcopy" in line for line in said)


def test_parameters_that_move_without_any_step_are_an_error(serve):
    model = toy_worker.build((5, 7, 2))
    worker = begun(serve("-n", 1), model, sgd(model))
    with torch.no_grad():
        model[0].weight += 1
    moved = flat(model)
    assert "no step of the SGD" in worker.watch.last_words()
    with pytest.raises(RuntimeError, match=r"no step of the SGD"):
        worker.flush()
    assert torch.equal(flat(model), moved)


STRAYED = """
import sys, torch
from diloco_callback import DiLoCoWorker
model = torch.nn.Linear(2, 2)
optimizer, other = torch.optim.SGD(model.parameters()), torch.optim.AdamW(model.parameters())
if sys.argv[2] == "attach":
    worker = DiLoCoWorker.attach(model, optimizer, sys.argv[1], 2)
else:
    worker = DiLoCoWorker(model, optimizer, sys.argv[1], 2).start()
for _ in range(3):
    model(torch.ones(2)).sum().backward()
    other.step()
"""


@pytest.mark.parametrize(
    "way, said",
    [("start", "ERROR: .*no step of the SGD"), ("attach", "steps are not sent: .*AdamW, an opt")],
)
def test_a_process_that_ends_tells_of_the_steps_of_another_optimizer(serve, start, way, said):
    process = start("-c", STRAYED, serve("-n", 1).address, way)
    assert process.wait() == 0
    assert re.search(said, process.output)


def test_what_moves_behind_the_last_step_is_sent(serve, said):
    model = toy_worker.build((5, 7, 2))
    optimizer = sgd(model)
    worker = begun(serve("-n", 1), model, optimizer)
    for _ in range(2):
        step(model, optimizer)
        with torch.no_grad():
            model[0].weight.clamp_(-0.1, 0.1)
    clamped = flat(model)
    worker.flush()
    assert torch.allclose(flat(model), clamped, atol=1e-3)
    assert any("that is sent too, as one step" in line for line in said)


class Lookahead(torch.optim.Optimizer):
    """An optimizer around another one."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()


@pytest.mark.parametrize("given", ["inner", "outer"])
def test_an_optimizer_within_another_one_is_no_stranger(serve, given):
    model = toy_worker.build((5, 7, 2))
    inner = sgd(model)
    outer = Lookahead(inner)
    worker = begun(serve("-n", 1), model, inner if given == "inner" else outer)
    others = torch.nn.Linear(5, 5)
    for _ in range(4):
        step(model, outer)
        step(others, sgd(others))
    worker.flush()
    assert worker.local_step == 4


class Sharpness(torch.optim.Optimizer):
    """As SAM: a step has two halves, and only the second steps the optimizer within."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.05)

    @torch.no_grad()
    def first(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=0.1)

    @torch.no_grad()
    def second(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data = self.state[parameter]["old"]
        self.base.step()

    def step(self, closure):
        self.first()
        closure()
        self.second()


@pytest.mark.parametrize("whole", [False, True])
def test_the_steps_of_an_optimizer_within_count_where_the_outer_one_makes_none(serve, whole):
    model = toy_worker.build((5, 7, 2))
    optimizer = Sharpness(model.parameters())
    worker = begun(serve("-n", 1), model, optimizer, sync_every=2)
    for i in range(5):
        step(model, seed=i)
        if whole:
            optimizer.step(lambda: step(model))
        else:
            optimizer.first()
            step(model)
            optimizer.second()
    assert worker.local_step == 5 and worker.sync_count == 2
    worker.flush()
    worker.close()


def test_optimizers_are_given_in_the_order_in_which_they_step(serve):
    model = toy_worker.build((5, 7, 2))
    first, second = sgd(model[0]), torch.optim.AdamW(model[1].parameters())
    server = serve("-n", 1)
    worker = begun(server, model, [first, second])
    for _ in range(4):
        step(model, first, second)
    worker.close()
    begun(server, model, [second, first], "b")
    step(model, first, second)
    with pytest.raises(RuntimeError, match=r"AdamW steps after SGD.*order"):
        step(model, first, second)


def test_an_optimizer_within_the_backward_pass_is_refused():
    model = toy_worker.build((5, 7, 2))
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(ValueError, match=r"'0.weight' has an optimizer that steps within the back"):
        Trained(model, sgd(model))


def test_steps_that_a_scaler_leaves_to_the_optimizer_to_skip_do_not_count(serve):
    model = toy_worker.build((5, 7, 2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    worker = begun(serve("-n", 1), model, optimizer, sync_every=3)
    syncs = []
    for i in range(8):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 5)).square().mean()).backward()
        if i in (2, 5):
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        syncs.append(worker.sync_count)
    assert worker.local_step == worker.step == 6 and worker.skipped == 2
    assert syncs == [0, 0, 0, 1, 1, 1, 1, 2]


def test_skipped_steps_are_taken_back_at_the_boundary_where_a_gpu_knows_them(serve, monkeypatch):
    model = toy_worker.build((5, 7, 2))
    optimizer = sgd(model)
    worker = begun(serve("-n", 1), model, optimizer, sync_every=3)
    for i in range(5):  # two of which are none
        worker.watch.doubtful.append(torch.tensor(float(i in (1, 2))))
        step(model, optimizer)
    assert worker.local_step == 3 and worker.sync_count == 1 and worker.schedule.left == 3


# --- A second copy of the weights ----------------------------------------------------------------


class Masters(torch.optim.Optimizer):
    """SGD on float32 copies, which are kept in the state or `hidden`, or on none."""

    def __init__(self, parameters, lr, place="state"):
        super().__init__(parameters, {"lr": lr})
        self.place, self.hidden = place, {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p] if self.place == "state" else self.hidden.setdefault(p, {})
                master = kept.setdefault("master", p.float().clone())
                self.state[p].setdefault("moment", torch.zeros_like(p)).add_(p.grad)
                p.copy_(master.sub_(p.grad.float(), alpha=group["lr"]))


def pull_towards(model, optimizer, goal):
    optimizer.zero_grad()
    sum((p.float() - goal).square().sum() for p in model.parameters()).backward()
    optimizer.step()


def duel(server, place, rounds, start=1.0, dtype=torch.bfloat16, kind=Masters, **options):
    """Two workers that are drawn to 0 and 4. Returns what each has right before each boundary."""

    def train(name, goal):
        model = torch.nn.Linear(3, 2, bias=False, dtype=dtype)
        torch.nn.init.constant_(model.weight, start)
        optimizer = kind(model.parameters(), 0.02, place)
        seen = []
        with DiLoCoWorker(model, optimizer, server.address, 10, name, **options):
            for i in range(10 * rounds):
                pull_towards(model, optimizer, goal)
                seen += [model.weight.float().mean().item()] if i % 10 == 8 else []
        return seen, optimizer

    return together(lambda: train("a", 0.0), lambda: train("b", 4.0))


PLAIN_MEAN = ["--outer-momentum", 0, "--no-nesterov", "--outer-lr", 1]


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_masters_in_the_optimizers_state_move_with_the_parameters(serve, said, first):
    (low, optimizer), (high, _) = duel(serve("-n", 2, *PLAIN_MEAN), "state", 12, first)
    assert 1 < low[-1] < 2 < high[-1] < 3  # drawn apart from the mean by nine steps
    assert sum("'master' in the optimizer's state is a copy" in line for line in said) == 2
    [state] = optimizer.state.values()
    assert state["master"].dtype == torch.float32
    assert not any("'moment'" in line for line in said)


@pytest.mark.parametrize("count", [1, 2])
def test_masters_that_are_hidden_are_found_out(serve, count):
    with pytest.raises(RuntimeError, match=r"keeps a second copy of the weights"):
        duel(serve("-n", 2, *PLAIN_MEAN), "hidden", 6, num_fragments=count)


def test_a_look_for_hidden_masters_is_had_at_one_boundary_of_a_round_each_time_another(serve):
    model = toy_worker.build((5, 7, 2))
    options = dict(sync_every=8, num_fragments=4)
    jumps = begun(serve("-n", 1), model, sgd(model), **options).watch.jumps
    looks = []
    for turn in range(4 * 33):
        jumps.begin()
        looks += [divmod(turn, 4)] if jumps.before else []
    first = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 0), (5, 1), (6, 2), (7, 3)]
    assert looks == [*first, (8, 1), (16, 2), (24, 3), (32, 0)]


def test_a_slice_that_is_moved_twice_is_not_judged_by_its_first_move(serve):
    model = toy_worker.build((5, 7, 2))
    jumps = begun(serve("-n", 1), model, sgd(model)).watch.jumps

    def move(by):
        jumps.judge()
        jumps.begin()
        with torch.no_grad():
            [p.add_(by) for p in model.parameters()]
        jumps.end()

    def steps(*moves):
        for by in moves:
            with torch.no_grad():
                [p.add_(by) for p in model.parameters()]
            jumps.follow()

    for _ in range(3):  # adopted, stepped back, and then moved by another adoption
        move(-1.0)
        steps(1.0)
        move(-0.5)
        steps(0.5)
        move(-1.0)
    assert not any(jumps.counts.values())
    jumps.turns = 15  # from here on it looks at one round in eight
    for _ in range(10):
        move(-1.0)
        steps(1.0, 0.01)
    assert jumps.counts == {0: 1}
    with pytest.raises(RuntimeError, match=r"keeps a second copy.*twice running"):
        jumps.judge()


def test_a_model_of_two_numbers_may_be_cut_in_five_fragments(serve):
    model = torch.nn.Linear(1, 1)
    optimizer = sgd(model)
    with begun(serve("-n", 1), model, optimizer, sync_every=5, num_fragments=5):
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.ones(1, 1)).square().sum().backward()
            optimizer.step()


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_schedule_frees_z_moves_as_the_parameters_do(serve, name):
    model = toy_worker.build((5, 7, 2))
    optimizer = getattr(schedulefree, name)(model.parameters(), lr=0.1)
    optimizer.train()
    begun(serve("-n", 1, *PLAIN_MEAN[:-1], 0.5), model, optimizer, sync_every=8)
    weight, apart, before = model[0].weight, [], []

    def note(*_):  # this hook is called first, and ours then adopts
        apart.append(weight - optimizer.state[weight]["z"])
        before.append(weight.detach().clone())

    for i in range(7):
        step(model, optimizer, seed=i)
    optimizer.register_step_post_hook(note)
    step(model, optimizer, seed=7)
    assert not torch.equal(weight, before[0])  # the global model is half way
    assert torch.allclose(weight - optimizer.state[weight]["z"], apart[0], atol=1e-6)
    assert apart[0].abs().sum() > 0


class Following(Lookahead):
    """With weights that follow slowly, and to which the others go back at each third step."""

    def __init__(self, inner):
        super().__init__(inner)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.steps += 1
        for parameter in self.param_groups[0]["params"]:
            slow = self.state[parameter].setdefault("slow", parameter.clone())
            self.state[parameter]["exp_avg_slow"] = parameter.grad.clone()
            if self.steps % 3 == 0:
                parameter.copy_(slow.lerp_(parameter, 0.5))


@pytest.mark.parametrize("given", ["inner", "outer"])
def test_weights_that_follow_slowly_move_as_the_parameters_do(serve, said, given):
    model = toy_worker.build((5, 7, 2))
    inner = sgd(model)
    outer = Following(inner)
    server = serve("-n", 1, *PLAIN_MEAN[:-1], 0.5)
    worker = begun(server, model, inner if given == "inner" else outer, sync_every=8)
    weight, moves, work = model[0].weight, [], worker.leader.work

    def note():  # before the push, from which on a thread may move the weights
        before = weight.clone(), outer.state[weight]["slow"].clone()
        work()
        moves.append((before, weight.clone()))

    worker.leader.work = note
    for i in range(8):
        step(model, outer, seed=i)
    [((fast, slow), moved)] = moves
    assert not torch.equal(fast, slow) and not torch.equal(fast, moved)
    assert torch.allclose(outer.state[weight]["slow"] - slow, moved - fast, atol=1e-6)
    assert sum("is a copy of the weights" in line for line in said) == 1


def test_deepspeed_is_refused_by_name():
    model = toy_worker.build((5, 7, 2))
    zero = type(
        "DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"}
    )()
    zero.optimizer = sgd(model)
    for optimizer in (zero, types.SimpleNamespace(optimizer=zero)):
        with pytest.raises(ValueError, match=r"DeepSpeed \(DeepSpeedZeroOptimizer\) cannot"):
            Trained(model, optimizer)
    engine = type("DeepSpeedEngine", (torch.nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(ValueError, match=r"DeepSpeed \(DeepSpeedEngine\) cannot"):
        Trained(engine(), sgd(model))
    model[0].weight.ds_id = 0
    with pytest.raises(ValueError, match=r"DeepSpeed \(ZeRO-3\) cannot"):
        Trained(model, sgd(model))


class Student(torch.nn.Module):
    """A network with an average of itself, which changes without an optimizer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.teacher = torch.nn.Linear(5, 2), torch.nn.Linear(5, 2).requires_grad_(False)
        self.fixed = torch.nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.net(x)

    @torch.no_grad()
    def average(self):
        self.teacher.weight.data.lerp_(self.net.weight, 0.5)


def test_a_teacher_comes_back_with_a_resumed_worker(serve):
    server = serve("-n", 1)
    model = Student()
    optimizer = sgd(model.net)
    worker = begun(server, model, optimizer)
    assert worker.state_dict()["local"] == []
    step(model, optimizer)
    model.average()
    state, weights = worker.state_dict(), {n: p.clone() for n, p in model.state_dict().items()}
    worker.close()
    assert state["local"] == ["teacher.weight"]
    with pytest.raises(Refused, match=r"teacher.weight.*local="):
        begun(server, model, optimizer)
    resumed = Student()
    resumed.load_state_dict(weights)
    worker = begun(server, resumed, sgd(resumed.net), state=state)
    assert torch.equal(resumed.teacher.weight, weights["teacher.weight"])
    assert worker.state_dict()["local"] == ["teacher.weight"]
    worker.close()
    worker = begun(server, resumed, sgd(resumed.net), local=["teacher.*"])
    assert list(worker.trained.frozen) == ["fixed.weight", "fixed.bias"]


# --- Settings of the program ---------------------------------------------------------------------


@pytest.fixture
def settings():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", ["dtype", "device", "deterministic"])
def test_settings_of_the_program_do_not_matter(serve, settings, setting):
    codecs = ["--upload-codec", "int4", "--download-codec", "int8"]
    model = toy_worker.build((5, 7, 2))
    model.register_buffer("mean", torch.ones(3))
    optimizer, server = sgd(model), serve("-n", 1, *codecs)
    with begun(server, model, optimizer, num_fragments=2):
        for i in range(5):
            x = torch.randn(8, 5, dtype=torch.float32, device="cpu")
            if setting == "dtype":
                torch.set_default_dtype((torch.bfloat16, torch.float64)[i % 2])
            elif setting == "device":
                torch.set_default_device("meta")
            else:
                torch.use_deterministic_algorithms(True)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    other = DiLoCoWorker(model, optimizer, server.address, 2, "b", num_fragments=2)
    with other.start().global_model():
        assert all(p.device.type == "cpu" for p in model.parameters())
    assert other.replica.mismatches == 0
    assert all(slice.anchor.dtype == torch.float32 for slice in other.slices)


def test_inference_mode_around_a_call_does_no_harm(serve):
    model = toy_worker.build((5, 7, 2))
    model.register_buffer("mean", torch.ones(3))
    optimizer, server = sgd(model), serve("-n", 1)
    with torch.inference_mode():
        worker = begun(server, model, optimizer)
    vars(protocol.SCRATCH).clear()
    for _ in range(3):
        with torch.inference_mode(), worker.global_model():
            model(torch.zeros(1, 5))
        step(model, optimizer)
    with torch.inference_mode():
        worker.flush()
    assert not any(slice.anchor.is_inference() for slice in worker.slices)
    assert worker.sync_count >= 1 and worker.replica.mismatches == 0
    with own_modes():
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("delay", [0, 1])
def test_only_the_threads_of_the_link_wait_for_the_streams(serve, monkeypatch, delay):
    """With streams that are no GPU's. A thread that uploads has one of its own."""
    done, training = [], threading.get_ident()

    def note(what):
        done.append((threading.get_ident() == training, what))

    class Stream:
        def record_event(self):
            note("recorded")
            return self

        def synchronize(self):
            note("awaited")

    def encode(slice, start, stop, before=Slice._encode):
        note("read")
        before(slice, start, stop)

    monkeypatch.setattr(protocol.FlatModel, "streams", lambda _: [Stream()])
    monkeypatch.setattr(torch.cuda, "set_stream", note)
    monkeypatch.setattr(Slice, "_encode", encode)
    model = toy_worker.build((5, 7, 2))
    optimizer = sgd(model)
    with begun(serve("-n", 1), model, optimizer, fragment_sync_delay=delay) as worker:
        done.clear()
        worker.replica.stream = "own"
        for _ in range(3):
            step(model, optimizer)
        assert worker.sync_count == 1
    first = [(True, "recorded"), (False, "own"), (False, "awaited"), (False, "read")]
    assert done[:4] == first
    assert (True, "awaited") not in done and (True, "own") not in done


def test_who_gives_up_or_goes_on_has_written_all_before_another_stream_looks(monkeypatch):
    model, moments = torch.nn.Linear(2, 1), []
    codecs = protocol.CODECS["int8"], protocol.CODECS["bf16"]
    slice = Slice(protocol.FlatModel([model.weight]), *codecs, True, True)
    monkeypatch.setattr(slice, "settle", lambda: moments.append(slice.encoded))
    slice.begin(True, True)
    assert moments == []
    slice.finish_encoding()
    assert moments == [2]  # the mark has become the prediction
    slice.drop()
    assert moments == [2, 2]
    slice.unmark()
    slice.begin(True, False)
    model.weight.data[:] = torch.nan
    slice.finish_encoding()
    assert slice.is_broken and moments == [2, 2, 0]  # the residual is what it was
    slice.take(True)
    assert moments == [2, 2, 0, 0]


def test_float64_is_refused_by_name():
    model = toy_worker.build((5, 7, 2), "float64")
    with pytest.raises(ValueError, match=r"'0.weight' is float64"):
        Trained(model, sgd(model))


# --- Beginning and ending ------------------------------------------------------------------------

FORGOTTEN = """
import torch
from diloco_callback import DiLoCoWorker
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters())
worker = DiLoCoWorker(model, optimizer, "127.0.0.1:9", worker_id="ada")
model(torch.ones(2)).sum().backward()
"""


def test_a_worker_that_is_never_started_says_so_at_exit(start, said):
    process = start("-c", FORGOTTEN + "optimizer.step()")
    assert process.wait() == 0
    assert "'ada' was made but never started" in process.output
    model = torch.nn.Linear(5, 2)
    for trains, closes in [(True, False), (False, False), (True, True)]:
        said.clear()
        worker = DiLoCoWorker(model, optimizer := sgd(model), "host:1", worker_id="bob")
        if trains:
            step(model, optimizer)
        if closes:
            worker.close()
        del worker
        gc.collect()
        told = any("'bob' was made but never started" in line for line in said)
        assert told == (trains and not closes)


def test_a_training_against_a_run_that_is_over_says_so(serve, said):
    server = serve("-n", 1)
    for attempt in range(2):
        model, callback = toy_worker.build((5, 7, 2)), DiLoCoCallback(server.address, 2, "a")
        optimizer, control = sgd(model), types.SimpleNamespace(should_training_stop=False)
        state = types.SimpleNamespace(max_steps=4, global_step=0)
        callback.on_train_begin(None, state, control, model, optimizer)
        for _ in range(4):
            step(model, optimizer)
            callback.on_step_end(None, state, control)
            if control.should_training_stop:
                break
        callback.on_train_end(None, state, control)
        told = [line for line in said if "the run was at step 4 already" in line]
        assert len(told) == attempt
    assert "training ends after 1 steps" in told[0]


def test_a_cell_that_is_run_again_names_its_own_process(serve):
    server = serve("-n", 1)
    model = toy_worker.build((5, 7, 2))
    worker = begun(server, model, sgd(model))
    with pytest.raises(Refused, match=r"this process itself \(pid .*close\(\)"):
        begun(server, model, sgd(model))
    worker.close()
    optimizer = sgd(model)
    begun(server, model, optimizer)
    with pytest.raises(Refused, match=r"the optimizer is held at .* by this process itself"):
        begun(server, model, optimizer, "b")


# --- Names -----------------------------------------------------------------------------------------


def test_wrappers_are_known_by_their_class_not_by_a_name():
    inner = torch.nn.Linear(2, 2)
    compiled = torch.compile(inner, backend="eager")
    own = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2)})  # somebody's own name
    for model in (inner, compiled, torch.nn.DataParallel(compiled), torch.nn.DataParallel(inner)):
        plain = plain_names(model)
        assert [plain(n) for n, _ in model.named_parameters()] == ["weight", "bias"]
    own["module"].compiled = compiled
    names = {"module.weight", "module.bias", "module.compiled.weight", "module.compiled.bias"}
    for model in (own, torch.nn.DataParallel(own), torch.compile(own)):
        plain = plain_names(model)
        assert {plain(name) for name, _ in model.named_parameters()} == names


def test_a_module_of_fabric_has_its_own_names_and_its_buffers():
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    wrapped, optimizer = fabric.setup(model, sgd(model))
    found = Trained(wrapped, optimizer)
    assert [*found.named] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [*found.buffers] == ["1.running_mean", "1.running_var"]


def test_watch_knows_no_parameter_of_others():
    model = toy_worker.build((5, 7, 2))
    watch = Watch(DiLoCoWorker(model, sgd(model), "host:1", worker_id="a"))
    watch.other(sgd(torch.nn.Linear(2, 2)))
    assert not watch.strangers
