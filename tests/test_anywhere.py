"""Tests of the callback in other people's training loops: copied files, several optimizers, mixed
precision, and models and optimizers of many kinds.

    python -m pytest tests/test_anywhere.py

Server and workers are real processes: tests/loop_worker.py, or a project made of README.md. All
must end with the parameters that the server has written, to the bit.
"""

import os
import re
import shutil
import socket
import sys
import textwrap
import types

import loop_worker
import pytest
import torch
import toy_worker
from conftest import ROOT, Outer, flat, put, result
from peers import same_bits
from safetensors.torch import load_file

from diloco_callback import DiLoCoCallback, DiLoCoWorker


def assert_global(out, tmp_path, frozen=()):
    """The parameters of a worker that has ended are those of the server, in its own dtype."""
    local, written = load_file(out), load_file(tmp_path / "model" / "model.safetensors")
    assert local.keys() - set(frozen) == written.keys()
    for name, values in written.items():
        assert same_bits(values.to(local[name].dtype), local[name]), name


# --- Somebody's project --------------------------------------------------------------------------


def readme_snippets(language="python"):
    """The snippets of "In your own project" that are of some language."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        section = file.read().split("\n## In your own project\n")[1].split("\n## ")[0]
    return [code for name, code in re.findall(r"```(\w*)\n(.*?)```", section, re.DOTALL)
            if name == language]  # fmt: skip


def without_numbers(text):
    return re.sub(r"\d[\d.:e-]*", "#", text)


PLAIN = [snippet for snippet in readme_snippets() if "next_batch()" in snippet]
MUON = "[muon, adamw]"
KNOWN = (
    "next_batch()",
    MUON,
    "Trainer(",
    "last.pt",
    "load_weights(",
)  # test_trainers.py, test_forms.py
BEFORE = """
import sys
import torch
from safetensors.torch import save_file

class Model(torch.nn.Linear):
    def forward(self, batch):
        noise = torch.randn(8, 3)  # without it, both come to the same numbers whatever their data
        return (super().forward(batch) - batch[:, :3] - noise).square().mean()

torch.manual_seed(0)
model = Model(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
max_steps = 1003

def next_batch():
    return torch.randn(8, 4)
"""
AFTER = """
save_file(dict(model.named_parameters()), sys.argv[1])
print(*(module.__file__ for name, module in sys.modules.items() if "protocol" in name
        or "diloco" in name), sep="\\n")
"""


def project(folder, package=None, files=("diloco_callback.py", "protocol.py")):
    """A folder with our files copied into it, or into a package in it."""
    inside = folder / package if package else folder
    inside.mkdir(parents=True)
    if package:
        (inside / "__init__.py").touch()
    for file in files:
        shutil.copy(os.path.join(ROOT, file), inside)
    return folder


def elsewhere(start, folder, *command, **env):
    """A process in a folder that finds no other file of ours."""
    return start(*command, cwd=folder, env={"PYTHONPATH": "", **env}, fresh=True)


def test_the_readme_has_plain_loops_and_nothing_that_no_test_knows():
    script, block = PLAIN
    assert "DiLoCoWorker.attach(" in script and "with DiLoCoWorker(" in block
    assert all(any(known in snippet for known in KNOWN) for snippet in readme_snippets())


def test_the_readmes_loops_run_where_the_two_files_are_copied_to(serve, start, tmp_path):
    """One worker has them beside its script, the other in a package, and a foreign `protocol`."""
    host = serve("-n", 2, "--until-done")
    assert all("host:8512" in s and "from diloco_callback import" in s for s in PLAIN)
    script, block = (snippet.replace("host:8512", host.address) for snippet in PLAIN)
    bare, packed = project(tmp_path / "flat"), project(tmp_path / "packed", "mypkg")
    (bare / "train.py").write_text(BEFORE + script + AFTER)
    block = block.replace("from diloco_callback", "from mypkg.diloco_callback")
    (packed / "train.py").write_text(BEFORE + block + AFTER)
    (packed / "protocol.py").write_text("raise RuntimeError('not the protocol of mypkg')")
    workers = [
        elsewhere(start, folder, "train.py", folder / "out", DILOCO_WORKER_ID=folder.name)
        for folder in (bare, packed)
    ]
    for worker, inside in zip(workers, [bare, packed / "mypkg"], strict=True):
        assert worker.wait() == 0, worker.output
        ours = [
            line for line in worker.lines if line.endswith(("/diloco_callback.py", "/protocol.py"))
        ]
        assert sorted(ours) == [f"{inside}/diloco_callback.py", f"{inside}/protocol.py"]
        told = worker.output.replace(sys.prefix + os.sep, "")  # a venv may lie within this folder
        assert ROOT not in told
    assert host.wait() == 0
    assert "are identical" not in host.output  # so each has data of its own
    said = {without_numbers(line) for line in host.lines + workers[0].lines}
    (log,) = readme_snippets("")
    log = log.replace("anode", socket.gethostname()).replace("ada", "flat").replace("bob", "packed")
    assert {without_numbers(line) for line in log.splitlines() if line} <= said
    torch.manual_seed(0)
    initial, goal = torch.nn.Linear(4, 3).weight, torch.eye(3, 4)
    for folder in (bare, packed):
        assert_global(folder / "out", tmp_path)
        final = load_file(folder / "out")["weight"]
        assert (final - goal).norm() < 0.5 * (initial - goal).norm()


@pytest.mark.parametrize("own", [None, "import a_module_that_is_not_there"])
def test_a_package_never_takes_a_protocol_that_is_not_its_own(start, tmp_path, own):
    """Another project's module of that name would be found, even one that fits."""
    folder = project(tmp_path / "theirs", "mypkg", ["diloco_callback.py"])
    shutil.copy(os.path.join(ROOT, "protocol.py"), folder)
    if own:
        (folder / "mypkg" / "protocol.py").write_text(own)
    process = elsewhere(start, folder, "-c", "import mypkg.diloco_callback")
    assert process.wait() == 1
    assert ("a_module_that_is_not_there" if own else "mypkg") in process.lines[-1]


# --- Loops of many kinds -------------------------------------------------------------------------


@pytest.fixture
def loops(serve, start, tmp_path):
    """loops((kind, options), ...): tests/loop_worker.py of these kinds in one run; what they say
    of themselves when all have ended with the server's parameters."""

    def run(*kinds):
        host = serve("-n", len(kinds), "--until-done")
        script, workers = os.path.join(ROOT, "tests", "loop_worker.py"), []
        for k, (kind, options) in enumerate(kinds):
            more = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
            place = ["--server", host.address, "--worker-id", f"w{k}", "--seed", k]
            out = tmp_path / f"w{k}.safetensors"
            workers.append((start(script, kind, *place, "--out", out, *more), out, options))
        ends = [result(worker) for worker, _, _ in workers]
        assert host.wait() == 0
        for _, out, options in workers:
            check(out, loop_worker.build(options.get("dtype", "float32")))
        for end in ends:
            assert sum(end["losses"][-5:]) < 0.9 * sum(end["losses"][:5])
        return ends

    def check(out, initial):
        final = load_file(out)
        assert_global(out, tmp_path, ["frozen.weight", "frozen.bias"])
        for name, before in initial.named_parameters():
            assert torch.equal(final[name], before) == name.startswith("frozen"), name

    return run


def test_loops_of_many_kinds_end_with_the_global_model(loops):
    """Steps that a scaler skips are none, so that one worker is two steps behind in the end."""
    ends = loops(("several", {}), ("scheduled", {}), ("closure", {}), ("amp", {"inf_at": "4,9"}))
    assert [end["steps"] for end in ends] == [23, 23, 23, 21]
    assert [end["syncs"] for end in ends] == [5] * 4


def test_a_compiled_a_wrapped_and_a_plain_model_are_one(loops):
    ends = loops(("compiled", {}), ("wrapped", {}), ("plain", {}))
    assert [end["syncs"] for end in ends] == [5] * 3


def test_bfloat16_in_fragments(loops):
    options = {"dtype": "bfloat16", "num_fragments": 2}
    ends = loops(("plain", options), ("plain", options))
    assert [end["steps"] for end in ends] == [23] * 2


# --- Optimizers ----------------------------------------------------------------------------------


def weights_and_biases(model):
    named = model.named_parameters()
    parts = {"weight": [], "bias": []}
    for name, parameter in named:
        parts[name.rpartition(".")[2]].append(parameter)
    return [torch.optim.SGD(part, lr=0.05, momentum=0.9) for part in parts.values()]


class InTurn:
    """Several optimizers, stepped one after the other."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def test_a_push_carries_what_all_optimizers_did_before_it(serve):
    host = serve("--upload-codec", "fp32", "--download-codec", "fp32")
    model, twin = toy_worker.build((5, 7, 2)), toy_worker.build((5, 7, 2))
    optimizers, expected = weights_and_biases(model), InTurn(weights_and_biases(twin))
    callback = DiLoCoCallback(host.address, 1)
    state = types.SimpleNamespace(max_steps=0, global_step=0)
    callback.on_train_begin(None, state, None, model=model, optimizer=tuple(optimizers))
    outer = Outer(flat(twin), "fp32")
    steps = toy_worker.train(model, InTurn(optimizers), 3, 0)
    for _ in toy_worker.train(twin, expected, 3, 0):
        next(steps)
        outer.step([outer.params - flat(twin)])
        put(twin, outer.params)
        assert same_bits(flat(model), outer.params)
    assert callback.worker.local_step == callback.worker.sync_count == 3
    callback.close()


def test_the_readmes_two_optimizers_make_one_step_together(serve):
    (code,) = [textwrap.dedent(snippet) for snippet in readme_snippets() if MUON in snippet]
    code = code.replace("host:8512", serve().address).replace("=500", "=2")
    model = toy_worker.build((5, 7, 2))
    given = {"torch": torch, "DiLoCoWorker": DiLoCoWorker, "model": model}
    given["matrices"] = [p for p in model.parameters() if p.dim() == 2]
    given["rest"] = [p for p in model.parameters() if p.dim() == 1]
    exec(code, given)
    diloco, before = given["diloco"], flat(model)
    for _ in toy_worker.train(model, InTurn([given["muon"], given["adamw"]]), 5, 0):
        pass
    assert (diloco.local_step, diloco.sync_count, diloco.steps) == (5, 2, 1)
    diloco.flush()
    assert diloco.steps == 0 and (flat(model) != before).all()


def test_all_optimizers_forget_what_led_to_a_push_that_was_refused(serve):
    host = serve()
    model = toy_worker.build((5, 7, 2))
    optimizers = weights_and_biases(model)
    with DiLoCoWorker(model, optimizers, host.address, 2) as worker:
        for _ in toy_worker.train(model, InTurn(optimizers), 1, 0):
            assert all(optimizer.state for optimizer in optimizers)
        model[0].weight.grad[0, 0] = float("nan")
        InTurn(optimizers).step()
        assert worker.dropped_steps == 2
        assert not any(optimizer.state for optimizer in optimizers)


class Own(torch.optim.SGD):
    """An optimizer with a step and an `optimizer` of its own."""

    optimizer, fails = "sgd", False

    def step(self, closure=None):
        super().step(closure)
        if self.fails:
            raise MemoryError


def test_a_subclass_that_calls_its_parents_step_makes_one_step(serve):
    host = serve()
    model = toy_worker.build((5, 7, 2))
    torch.optim.SGD(model.parameters())  # from now on the parent's step runs hooks, too
    optimizer = Own(model.parameters(), lr=0.05)
    with DiLoCoWorker(model, optimizer, host.address, 2) as worker:
        for count, _ in enumerate(toy_worker.train(model, optimizer, 5, 0), 1):
            assert (worker.local_step, worker.sync_count) == (count, count // 2)
        optimizer.fails = True
        with pytest.raises(MemoryError):
            optimizer.step()
        optimizer.fails = False
        optimizer.step()
        assert worker.local_step == 6


def test_a_step_that_is_compiled_leaves_the_synchronization_alone(serve):
    """Compiled, its arithmetic might be fused, and round otherwise than the server's."""
    host = serve()
    model, seen = toy_worker.build((5, 7, 2)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = torch.compile(optimizer.step, backend=lambda graph, _: seen.append(graph) or graph)
    compiled = types.SimpleNamespace(step=step, zero_grad=optimizer.zero_grad)
    with DiLoCoWorker(model, optimizer, host.address, 2) as worker:
        for _ in toy_worker.train(model, compiled, 5, 0):
            graphs = len(seen)
        assert (worker.local_step, worker.sync_count) == (5, 2)
    assert graphs == 1


def test_the_optimizer_is_found_in_its_wrappers():
    model = toy_worker.build((5, 7, 2))
    own = Own(model.parameters(), lr=0.05)
    in_it = types.SimpleNamespace(optimizer=own)
    in_it.optimizer_of_mine = in_it
    for given in (own, in_it, [in_it], [torch.optim.SGD(model.parameters()), in_it]):
        assert DiLoCoWorker(model, given, "host:1").trained.optimizers[-1] is own
    circle = types.SimpleNamespace()
    circle.optimizer = circle
    for given in (circle, None, [None], object()):
        with pytest.raises(TypeError, match=r"is not a torch\.optim\.Optimizer"):
            DiLoCoWorker(model, given, "host:1")
    with pytest.raises(ValueError, match="empty list"):
        DiLoCoWorker(model, [], "host:1")


def test_an_optimizer_that_accelerate_has_prepared(serve):
    accelerate = pytest.importorskip("accelerate")
    host = serve()
    model = toy_worker.build((5, 7, 2))
    optimizer = Own(model.parameters(), lr=0.05)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    with DiLoCoWorker(model, prepared, host.address, 2) as worker:
        for _ in toy_worker.train(model, prepared, 4, 0):
            pass
        assert (worker.trained.optimizers[-1], worker.local_step, worker.sync_count) == (
            optimizer,
            4,
            2,
        )


# --- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        (torch.nn.Parameter(torch.ones(3, device="meta")), "'odd' is on the meta device"),
        (torch.nn.UninitializedParameter(), "'odd' has no shape yet"),
        (torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)), "'odd' is torch.complex64"),
    ],
)
def test_a_parameter_that_cannot_be_synchronized_is_named_at_once(parameter, text):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.odd = parameter
    with pytest.raises(ValueError, match=text):
        DiLoCoWorker(model, optimizer, "host:1")
    if not isinstance(parameter, torch.nn.UninitializedParameter):
        model.odd.requires_grad_(False)
        assert len(DiLoCoWorker(model, optimizer, "host:1").trained.named) == 2
