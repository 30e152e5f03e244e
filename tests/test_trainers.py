"""diloco_callback.py in other people's trainers: the recipes of the README, run as they stand there.

Run:  pip install -r requirements.txt -r tests/requirements.txt && pytest tests/test_trainers.py
"""

import contextlib
import csv
import json
import os
import re
import runpy
import socket
import subprocess
import sys

import pytest
import torch
from conftest import DEADLINE, ROOT, TRAINER, result, status, until
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback

import protocol
from diloco_callback import DiLoCoCallback, DiLoCoWorker, TransformersCallback

SCRIPT = os.path.join(ROOT, "tests", "hf_worker.py")
HF = runpy.run_path(SCRIPT)  # what the workers are made of
NAMES = ("w0", "w1")
STEPS, EVERY = 12, 5  # two rounds and a closing one of two steps
METRICS = {"diloco/sync_count", "diloco/local_step", "diloco/total_sync_time"}


@pytest.fixture
def run(start, serve, tmp_path):
    """run(*options, fragments=1, **TrainingArguments): the ends of two workers that have trained
    with their server, as they print them."""

    def go(*options, **settings):
        host = serve("-n", 2, "--until-done")
        workers = [launch(start, host, tmp_path, name, *options, **settings) for name in NAMES]
        ends = [result(worker) for worker in workers]
        assert host.wait() == 0
        return ends

    return go


def launch(start, host, folder, name, *options, fragments=1, **settings):
    chosen = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    env = {"DILOCO_SERVER": host.address, "DILOCO_WORKER_ID": name, "DILOCO_SYNC_EVERY": str(EVERY)}
    env["DILOCO_NUM_FRAGMENTS"] = str(fragments)
    more = ("--seed", NAMES.index(name), *options, "--set", f"max_steps={STEPS}", *chosen)
    return start(SCRIPT, folder / name, *more, env=env, imports=TRAINER)


def same(one, other):
    """Whether two state dicts hold the same bits under the same names."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


def carried(log, name):
    """The values of a metric by the line, of which those that have not changed are left out."""
    values = [None]
    for line in log:
        values.append(line.get(name, values[-1]))
    return values[1:]


def parameters(folder, when="end"):
    return [load_file(folder / f"{name}-{when}.safetensors") for name in NAMES]


def rounds(folder):
    with open(folder / "model" / "rounds.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def closed_once(folder, steps=STEPS):
    """All that happened: whole rounds, one closing round, and every step of both in one of them."""
    lines = rounds(folder)
    whole, left = [2 * EVERY] * (steps // EVERY), 2 * (steps % EVERY)
    assert [line["steps"] for line in lines] == [*whole, left]
    assert [line["closing"] for line in lines] == [False] * (steps // EVERY) + [True]


def closed_once_in_fragments(folder, fragments, steps=STEPS):
    """Every step of both workers is in one round of each fragment, the last of which closes it."""
    for k in range(fragments):
        lines = [line for line in rounds(folder) if line["fragment"] == k]
        assert sum(line["steps"] for line in lines) == 2 * steps
        assert [line["closing"] for line in lines] == [False] * (len(lines) - 1) + [True]
        assert len(lines) > steps // EVERY


# --- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "pasted": True},
        {"gradient_checkpointing": True, "bf16": True, "fragments": 4},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_two_trainers_end_with_the_servers_model(run, tmp_path, settings):
    pasted = ["--pasted"] if settings.pop("pasted", False) else []
    ends = run(*pasted, **settings)
    served = load_file(tmp_path / "model" / "model.safetensors")
    first, second = parameters(tmp_path)
    assert same(first, served) and same(second, served)
    before = parameters(tmp_path, "start")
    assert not same(*before) and not same(before[0], served)
    fragments = settings.get("fragments", 1)
    if fragments == 1:
        closed_once(tmp_path)
    else:
        closed_once_in_fragments(tmp_path, fragments)

    assert "lm_head.weight" not in served  # it is tied, and travels once
    model, info = GPT2LMHeadModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert same(dict(model.named_parameters()), served)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) is GPT2LMHeadModel

    for end in ends:
        steps = [entry["diloco/local_step"] for entry in end["log"]]
        assert steps == [*range(1, STEPS + 1), STEPS]  # optimizer steps, and the summary
        assert end["log"][-1].keys() >= METRICS and "train_loss" in end["log"][-1]
        assert end["metrics"].keys() >= METRICS
        # In fragments the last of a cycle is adopted a step later.
        first = 4 if fragments == 1 else 5
        counts = [*[0] * first, *[1] * 5, *[2] * (STEPS - 1 - first - 5), 3, 3]
        assert carried(end["log"], "diloco/sync_count") == counts
        written = sum("diloco/sync_count" in entry for entry in end["log"])
        assert written == len({*counts}) + 1  # and the summary
        # A reporter has the metrics where it stands behind the callback, and only there.
        assert len(end["first"]) == len(end["behind"]) == len(end["log"])
        assert all("diloco/local_step" in names for names in end["behind"])
        assert not any(METRICS & set(names) for names in end["first"])
        losses = [entry["loss"] for entry in end["log"][:-1]]
        assert losses[-1] < losses[0] - 0.2


def test_killed_trainers_go_on_from_their_checkpoints(start, serve, tmp_path):
    """As if nothing had happened: with what had not been sent, in its place, to the bit. Whether
    the Trainer hands the callback its state or not."""
    settings = {"save_strategy": "steps", "save_steps": 4}

    def begin(folder, *options):
        folder.mkdir()
        host = serve("-n", 2, "--until-done", "-m", folder / "model")
        return host, [launch(start, host, folder, name, *options, **settings) for name in NAMES]

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    host, workers = begin(cut, "--hold-at", 8)
    for worker in workers:
        worker.wait_for("saved 8")
    for k, name in enumerate(NAMES):
        workers[k].kill()
        more = {**settings, "restore_callback_states_from_checkpoint": name == "w1"}
        workers[k] = launch(start, host, cut, name, "--resume", **more)
        workers[k].wait_for(f"{name} is worker {k}, 2 in all, at step 8, version 1")
    ends = [result(worker) for worker in workers]
    assert host.wait() == 0
    for worker, end in zip(workers, ends, strict=True):
        assert "no residual" not in worker.output
        assert end["log"][-1]["diloco/local_step"] == STEPS - 8

    with open(cut / "w0" / "checkpoint-8" / "trainer_state.json", encoding="utf-8") as file:
        state = json.load(file)["stateful_callbacks"]["TransformersCallback"]
    assert state["args"] == {}  # the environment may name another server next time
    saved = state["attributes"]["saved"]
    assert (saved["worker_id"], saved["step"], saved["position"]) == ("w0", 8, 3)
    assert [(f["version"][1], f["steps"]) for f in saved["fragments"]] == [(1, 3)]

    host, workers = begin(whole)
    assert all(result(worker) for worker in workers) and host.wait() == 0
    closed_once(cut)
    served = load_file(cut / "model" / "model.safetensors")
    assert same(served, load_file(whole / "model" / "model.safetensors"))
    assert all(same(model, served) for model in parameters(cut))


def test_the_best_checkpoint_stays_and_the_server_has_the_last_steps(run, tmp_path):
    """The highest loss counts as the best here, which is an early one."""
    ends = run(
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        logging_steps=100,  # no step's log comes between its hook and the evaluation
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=4,
        save_steps=4,
    )
    closed_once(tmp_path)
    served = load_file(tmp_path / "model" / "model.safetensors")
    evaluations = []
    for name, end, model in zip(NAMES, ends, parameters(tmp_path), strict=True):
        assert end["best"].endswith(f"{name}/checkpoint-4")
        best, last = (
            load_file(tmp_path / name / f"checkpoint-{step}" / "model.safetensors")
            for step in (4, STEPS)
        )
        assert same(model, best) and same(last, served) and not same(best, served)
        losses = [entry["eval_loss"] for entry in end["log"] if "eval_loss" in entry]
        assert losses == sorted(losses, reverse=True) and len(losses) == 3
        evaluations.append(losses)
        *lines, summary = end["log"]
        assert summary.keys() >= METRICS
        assert not any(METRICS & entry.keys() for entry in lines)  # evaluations
    # The last is of the global model.
    assert [a == b for a, b in zip(*evaluations, strict=True)] == [False, False, True]
    told = [list(line["evaluations"].values()) for line in rounds(tmp_path)[:2]]
    assert [sorted(each) for each in told] == [
        sorted(pair) for pair in [*zip(*evaluations, strict=True)][:2]
    ]
    assert rounds(tmp_path)[0]["evaluation"] is None  # neither is of the global model


def test_a_trainer_that_stops_early_closes_before_it_loads_the_best(run, tmp_path):
    """Early stopping decides after the hooks of the last step and of the epoch."""
    ends = run(
        "--early-stopping",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        per_device_train_batch_size=16,  # an epoch has four steps
    )
    closed_once(tmp_path, 8)
    served = load_file(tmp_path / "model" / "model.safetensors")
    for end, model in zip(ends, parameters(tmp_path), strict=True):
        assert end["step"] == 8 and end["best"].endswith("checkpoint-4")
        best = load_file(os.path.join(end["best"], "model.safetensors"))
        assert same(model, best) and not same(model, served)
        assert end["log"][-1]["diloco/sync_count"] == 2


def trainer(**settings):
    """The README's Trainer, in this process."""
    args = HF["TrainingArguments"](**{**HF["DEFAULTS"], **settings})
    data = {"train": HF["sentences"](64, 0), "test": None}
    names = {"model": HF["build"](0, False), "args": args, **data}
    exec(HF["recipe"](), names)
    return names["trainer"]


def test_a_checkpoint_that_was_made_alone_goes_on_in_a_run(start, serve, tmp_path):
    """The server, which has no weights, takes the model of such a checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 4}
    alone = trainer(output_dir=tmp_path / "w0", max_steps=4, **settings)
    alone.remove_callback(DiLoCoCallback)
    alone.train()

    host = serve("--until-done")
    worker = launch(start, host, tmp_path, "w0", "--resume", **settings)
    end = result(worker)
    assert host.wait() == 0
    assert end["log"][-1]["diloco/local_step"] == STEPS - 4
    path = tmp_path / "w0" / f"checkpoint-{STEPS}" / "trainer_state.json"
    state = json.loads(path.read_text())["stateful_callbacks"]["TransformersCallback"]
    assert state["attributes"]["saved"]["step"] == STEPS - 4
    served = load_file(tmp_path / "model" / "model.safetensors")
    assert same(load_file(tmp_path / "w0-end.safetensors"), served)


class OutOfMemory(TrainerCallback):
    """What a batch that is too large comes to, once."""

    raised = False

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7 and not self.raised:
            self.raised = True
            raise RuntimeError("CUDA out of memory.")


def test_a_trainer_that_looks_for_its_batch_size_joins_again(serve, tmp_path, monkeypatch):
    host = serve()
    env = {"SERVER": host.address, "WORKER_ID": "w0", "SYNC_EVERY": str(EVERY)}
    for name, value in env.items():
        monkeypatch.setenv(f"DILOCO_{name}", value)
    seeker = trainer(output_dir=tmp_path / "w0", max_steps=STEPS, auto_find_batch_size=True)
    seeker.add_callback(OutOfMemory())
    seeker.train()
    host.wait_for("w0 leaves: 'training begins anew")
    host.wait_for("w0 leaves: done")
    host.wait_for("the model of round 4 is in")
    served = load_file(tmp_path / "model" / "model.safetensors")
    assert same(dict(seeker.model.named_parameters()), served)


def test_the_state_makes_the_same_callback_again():
    made = TransformersCallback("host:1", 7, "ada", num_fragments=2)
    made.load_state_dict({"step": 3, "fragments": []})
    again = TransformersCallback.from_state(json.loads(json.dumps(made.state())))
    assert (again.server, again.options, again.saved) == (made.server, made.options, made.saved)


def test_the_callback_needs_torch_alone():
    code = "import sys, diloco_callback; print([m for m in sys.modules if 'transformers' in m])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert output.stdout.strip() == "[]", output.stderr


UNFREEZING = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import hf_worker, torch, transformers
from safetensors.torch import save_file
from diloco_callback import TransformersCallback

address, name, groups, path = sys.argv[1:]
torch.set_num_threads(1)
model = hf_worker.build(0, False)
layer = model.transformer.h[0].requires_grad_(False)


class Unfreeze(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer=None, **more):
        if state.global_step == 6:
            layer.requires_grad_(True)
            if groups == "added":
                optimizer.add_param_group({{"params": layer.parameters(), "initial_lr": 0.01}})


held = [p for p in model.parameters() if p.requires_grad or groups == "all"]
optimizer = torch.optim.AdamW(held, lr=0.01)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 12)
diloco = TransformersCallback(address, 5, name)
args = transformers.TrainingArguments(path, **{{**hf_worker.DEFAULTS, "report_to": "none"}}, max_steps=12)
trainer = transformers.Trainer(
    model,
    args,
    train_dataset=hf_worker.sentences(64, ord(name[0])),
    callbacks=[diloco, Unfreeze()] if groups == "all" else [Unfreeze(), diloco],
    optimizers=(optimizer, scheduler),
)
before = layer.attn.c_attn.weight.detach().clone()
trainer.train()
assert not torch.equal(before, layer.attn.c_attn.weight)
assert diloco.worker.leader.anew.count == 1 and diloco.worker.local_step == 12
save_file(dict(model.named_parameters()), path + ".safetensors")
"""


@pytest.mark.parametrize("groups", ["all", "added"])
def test_two_trainers_unfreeze_a_layer_at_a_step_and_end_alike(serve, start, tmp_path, groups):
    """The optimizer has all from the beginning, or gets the layer's parameters at that step."""
    server = serve("-n", 2, "--until-done")
    script = tmp_path / "train.py"
    script.write_text(UNFREEZING.format(root=ROOT))
    workers = [
        start(script, server.address, name, groups, tmp_path / name, imports=TRAINER)
        for name in ("ada", "bob")
    ]
    for worker in workers:
        assert worker.wait(180) == 0, worker.output
    assert server.wait() == 0, server.output
    served = load_file(tmp_path / "model" / "model.safetensors")
    assert all(same(load_file(tmp_path / f"{n}.safetensors"), served) for n in ("ada", "bob"))
    assert sum(line["steps"] for line in rounds(tmp_path)) == 2 * STEPS
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) is GPT2LMHeadModel


OWN_PACE = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import hf_worker, torch, transformers
from diloco_callback import TransformersCallback

address, name, pause, path = sys.argv[1:]
torch.set_num_threads(1)


class Slow(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **more):
        time.sleep(float(pause))


diloco = TransformersCallback(address, 20, name)
settings = {{**hf_worker.DEFAULTS, "report_to": "none", "num_train_epochs": 100}}
trainer = transformers.Trainer(
    hf_worker.build(0, False),
    transformers.TrainingArguments(path, **settings, max_steps=100),
    train_dataset=hf_worker.sentences(64, ord(name[0])),
    callbacks=[diloco, Slow()],
)
trainer.train()
print(f"made {{diloco.worker.local_step}} steps, the run is at {{diloco.worker.step}}")
"""


def test_a_slow_trainer_makes_fewer_steps_and_ends_with_the_fast_one(serve, start, tmp_path):
    server = serve("-n", 2, "--own-pace", "--worker-timeout", 4, "--until-done")
    script = tmp_path / "own_pace.py"
    script.write_text(OWN_PACE.format(root=ROOT))
    pauses = {"ada": 0.02, "bob": 0.1}
    runs = [
        start(script, server.address, name, pause, tmp_path / name, imports=TRAINER)
        for name, pause in pauses.items()
    ]
    made = []
    for run in runs:
        assert run.wait(180) == 0, run.output
        found = re.search(r"made (\d+) steps, the run is at (\d+)", run.output)
        made.append((int(found[1]), int(found[2])))
    assert made[0] == (100, 100)
    assert 20 < made[1][0] < 70 and made[1][1] == 100
    assert server.wait() == 0


# --- Lightning -----------------------------------------------------------------------------------


@pytest.fixture
def lightning(start, serve, tmp_path):
    """What two workers have made of all runs of tests/lightning_worker.py, each with a server of
    its own: (ends of the workers, {run: folder}). In two processes, as it takes long to import
    Lightning."""
    runs = ("plain", "accumulated", "several", "cut", "stopped", "preempted", "paced", "ddp")
    folders = {run: tmp_path / run for run in runs}
    hosts = {}
    for run, folder in folders.items():
        folder.mkdir()
        # Workers that have failed come back one after the other, and must not go on alone.
        more = ["--min-workers", 2] if run == "cut" else ["--until-done"]
        more += ["--own-pace"] * (run == "paced")
        hosts[run] = serve("-n", 1 if run == "ddp" else 2, "-m", folder / "model", *more)
    chosen = [f"{run}={host.address}" for run, host in hosts.items()]
    script = os.path.join(ROOT, "tests", "lightning_worker.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    workers = [start(script, tmp_path, name, *chosen, env=env) for name in NAMES]

    for name in NAMES:  # while the process lives on
        hosts["cut"].wait_for(f"{name} leaves: 'RuntimeError: no sample of that name", 4 * DEADLINE)
    until(lambda: status(hosts["stopped"])["round"] >= 2, "two rounds")
    with contextlib.closing(protocol.connect(hosts["stopped"].address, {})[0]) as conn:
        conn.request("stop")
    ends = [result(worker) for worker in workers]
    hosts["cut"].wait_for("the model of round 3 is in")
    assert all(host.wait() == 0 for run, host in hosts.items() if run != "cut")
    assert not any("no residual" in worker.output for worker in workers)
    return ends, folders


def test_lightning(lightning):
    ends, folders = lightning
    # At SIGTERM in step 9 each has sent its eight or nine steps, and has saved.
    assert sum(line["steps"] for line in rounds(folders.pop("preempted"))) in (16, 17, 18)
    for end in ends:
        told = end.pop("preempted")
        assert told["error"] == "SIGTERMException"
        assert any(name.endswith(".ckpt") for name in told["files"]), told
    for run, folder in folders.items():
        served = load_file(folder / "model" / "model.safetensors")
        assert served.keys() == {"hidden.weight", "hidden.bias", "head.weight", "head.bias"}
        assert all(same(load_file(folder / f"{name}.safetensors"), served) for name in NAMES), run
        assert all(end[run]["metrics"].keys() >= METRICS for end in ends)
        if run == "stopped":  # at any step, so after the last checkpoint and validation
            continue
        for end in ends:
            saved = torch.load(end[run]["checkpoint"])["state_dict"]
            assert same({name: saved[name] for name in served}, served), run
        if run == "ddp":  # two ranks are one worker, and validate different batches
            assert [(line["steps"], len(line["norms"])) for line in rounds(folder)] == [
                (5, 1),
                (5, 1),
                (2, 1),
            ]
            continue
        first, second = (end[run]["metrics"]["val_loss"] for end in ends)
        assert first == second
        if run == "paced":  # both end with the run, the slow one after far fewer steps
            made = [end[run]["metrics"]["diloco/local_step"] for end in ends]
            assert made[0] == ends[0][run]["step"] == 60 and 10 < made[1] < 45
            continue
        if run == "several":
            closed_once_in_fragments(folder, 4)
        else:
            closed_once(folder)

    # What had not been sent at step 8, and what rounding had lost, was in the checkpoint.
    cut, plain = (load_file(folders[run] / "w0.safetensors") for run in ("cut", "plain"))
    assert same(cut, plain)

    counted = {"plain": (12, 12), "accumulated": (12, 12), "several": (24, 12), "cut": (12, 4)}
    counted["ddp"] = (12, 12)
    for run, (steps, local) in counted.items():
        assert [end[run]["step"] for end in ends] == [steps] * 2  # as Lightning counts
        assert [end[run]["metrics"]["diloco/local_step"] for end in ends] == [local] * 2
    # Validation is after every fourth step, and the check before training is none.
    assert [{*line["evaluations"]} for line in rounds(folders["plain"])[:2]] == [{*NAMES}] * 2
    # A push has the loss of the batch before its step.
    for run, batch in {"plain": 3, "accumulated": 8}.items():
        losses = {name: end[run]["losses"][batch] for name, end in zip(NAMES, ends, strict=True)}
        assert rounds(folders[run])[0]["losses"] == losses
    for name in NAMES:
        with open(folders["plain"] / name / "logs" / "metrics.csv", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["diloco/local_step"]]
        assert [float(row["diloco/local_step"]) for row in rows] == [*range(1, STEPS + 1)]
        rows = [{name: text for name, text in row.items() if text} for row in rows]
        counts = [float(count) for count in carried(rows, "diloco/sync_count")]
        assert counts == [0] * 4 + [1] * 5 + [2, 2, 3]
        # Within an epoch, of four steps, Lightning repeats what was logged in it.
        assert [k for k, row in enumerate(rows) if "diloco/sync_count" not in row] == [8]


# --- peft ----------------------------------------------------------------------------------------


def test_of_an_adapter_only_the_adapter_travels(run, tmp_path):
    run("--lora", "--pasted")
    served = load_file(tmp_path / "model" / "model.safetensors")
    assert served and all("lora_" in name for name in served)
    elements = sum(tensor.numel() for tensor in served.values())
    assert [line["bytes_up"] for line in rounds(tmp_path)] == [2 * 2 * elements] * 3  # bfloat16
    closed_once(tmp_path)
    for before, after in zip(parameters(tmp_path, "start"), parameters(tmp_path), strict=True):
        base = before.keys() - served.keys()
        assert len(base) == 28 and served.keys() < before.keys()
        assert same({n: after[n] for n in served}, served)
        assert not same({n: before[n] for n in served}, served)
        assert same({n: after[n] for n in base}, {n: before[n] for n in base})
    # The base is that of the workers; of the adapter the folder has all.
    opened = PeftModel.from_pretrained(HF["build"](0, False), tmp_path / "model")
    assert same(dict(opened.named_parameters()), parameters(tmp_path)[0])
    assert not (tmp_path / "model" / "config.json").exists()


def test_an_adapter_of_a_pretrained_model_whose_base_a_worker_lacks(start, serve, tmp_path):
    """-m holds the base alone. The first worker brings the adapter; the second, whose base is
    another one, gets that of -m, and nothing else but the adapter travels in a round."""
    pretrained = HF["build"](0, False)
    pretrained.save_pretrained(tmp_path / "base")
    host = serve("-m", tmp_path / "base", "-n", 2, "--until-done")
    workers = [
        launch(start, host, tmp_path, name, "--lora", "--base", base)
        for base, name in enumerate(NAMES)
    ]
    assert all(result(worker) for worker in workers) and host.wait() == 0
    # The ten matrices; LayerNorm's numbers and the zeros of the others are no different.
    assert "frozen tensors" not in workers[0].output and "w1: 10 frozen" in workers[1].output
    path = tmp_path / "base-diloco" / "model.safetensors"
    served = load_file(path)
    assert served and all("lora_" in name for name in served)
    elements = sum(tensor.numel() for tensor in served.values())
    with open(tmp_path / "base-diloco" / "rounds.jsonl", encoding="utf-8") as file:
        assert {json.loads(line)["bytes_up"] for line in file} == {2 * 2 * elements}
    own = dict(pretrained.named_parameters())
    for before, after in zip(parameters(tmp_path, "start"), parameters(tmp_path), strict=True):
        assert same({name: after[name] for name in served}, served)
        base = {name: after[name] for name in before.keys() - served.keys()}
        assert len(base) == len(own) == 28
        for name, tensor in base.items():
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            assert torch.equal(tensor, own[plain]), name
    adapted = HF["build"](0, True)
    adapted.load_state_dict(load_file(path), strict=False)  # as the README had it
    assert same(dict(adapted.named_parameters()), parameters(tmp_path)[0])
    opened = PeftModel.from_pretrained(HF["build"](0, False), path.parent)  # as it has it
    assert same(dict(opened.named_parameters()), parameters(tmp_path)[0])
    assert {*os.listdir(path.parent)} > {"adapter_config.json", "config.json.incomplete"}


# --- From a pretrained model -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "bare"])
def test_a_worker_starts_from_the_weights_of_m(serve, tmp_path, kind):
    """In `.bin`, and as the hub has GPT-2: without the name of the base model before each tensor."""
    pretrained, own = HF["build"](1, False), HF["build"](2, False)
    if kind == "bin":
        (tmp_path / "hf").mkdir()
        torch.save(pretrained.state_dict(), tmp_path / "hf" / "pytorch_model.bin")  # no config
    else:
        pretrained.transformer.save_pretrained(tmp_path / "hf")
        names = load_file(tmp_path / "hf" / "model.safetensors")
        assert "wte.weight" in names and "transformer.wte.weight" not in names
    host = serve("-m", tmp_path / "hf")
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    with DiLoCoWorker(own, optimizer, host.address):
        assert same(own.state_dict(), pretrained.state_dict())
    host.wait_for("the model of round")
    again, info = GPT2LMHeadModel.from_pretrained(tmp_path / "hf-diloco", output_loading_info=True)
    assert not any(info.values()) and same(again.state_dict(), pretrained.state_dict())


def test_our_worker_trains_a_sharded_pretrained_model(start, serve, tmp_path):
    """Through transformers, whose architecture model.py does not know; its head is tied."""
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 512}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    pretrained = GPT2LMHeadModel(config)
    pretrained.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    host = serve("-m", tmp_path / "hf", "-n", 2, "--until-done")
    chosen = ["train.max_steps=12", "train.context=32", "train.batch_size=4", "data.source=builtin"]
    settings = [word for each in [*chosen, "diloco.sync_every=5"] for word in ("--set", each)]
    workers = [
        start("worker.py", "--server", host.address, "--worker-id", name,
              "--output-dir", tmp_path / name, "default.yaml", *settings)
        for name in NAMES
    ]  # fmt: skip
    for worker in workers:
        assert worker.wait() == 0, worker.output
    assert host.wait() == 0
    model, info = GPT2LMHeadModel.from_pretrained(tmp_path / "hf-diloco", output_loading_info=True)
    assert not any(info.values()) and not same(model.state_dict(), pretrained.state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight
