"""The main job as a user runs it: one command that starts a server and its workers.

python -m pytest tests/test_run.py
"""

import json
import os
import re
import signal

import pytest
import torch
import yaml
from conftest import ROOT, until
from safetensors.torch import load_file

SMALL = [
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2",
    "data.source=builtin", "train.context=64", "train.batch_size=4", "train.warmup_steps=10",
    "output.log_every=20", "output.eval_every=40", "output.eval_tokens=2048",
]  # fmt: skip


@pytest.fixture
def spawn(start, tmp_path):
    """spawn(config, *options, **settings): `server.py --spawn` in the test's folder, with one of
    the project's config files made small."""

    def run(config, *options, **settings):
        with open(os.path.join(ROOT, config), encoding="utf-8") as file:
            blocks = yaml.safe_load(file)
        pairs = [pair.split("=") for pair in SMALL]
        for name, value in [*pairs, *((k.replace("__", "."), v) for k, v in settings.items())]:
            block, key = name.split(".")
            blocks[block][key] = yaml.safe_load(value) if isinstance(value, str) else value
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(blocks))
        command = [os.path.join(ROOT, "server.py"), "-m", "model", "-n", 2, "--port", 0]
        return start(*command, "--spawn", "small.yaml", *options, cwd=tmp_path, fresh=True)

    return run


@pytest.mark.parametrize("config", ["default.yaml", "streaming.yaml"])
def test_the_one_command_run(spawn, start, tmp_path, config):
    run = spawn(config, train__max_steps=130, diloco__sync_every=20)
    assert run.wait(240) == 0, run.output
    losses = [
        float(loss) for loss in re.findall(r"worker-0: step \d+/130  loss ([\d.]+)", run.output)
    ]
    assert losses[-1] < 0.7 * losses[0], losses
    assert re.search(r"worker-0: final validation loss [\d.]+", run.output)
    assert "ends training" not in run.output  # none ends before its time

    synced = re.findall(
        r"^worker-0: round \d+, .*\| up ([\d.]+) MB, down ([\d.]+) MB$",
        run.output,
        re.MULTILINE,
    )
    assert len(synced) == 7, run.output  # a line on each round
    assert all(float(up) and float(down) for up, down in synced[:-1]), (
        synced
    )  # the last may be empty

    final = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("worker-0", "worker-1"):
        replica = load_file(tmp_path / "worker-out" / name / "model.safetensors")
        assert replica.keys() == final.keys()
        assert all(torch.equal(replica[key], final[key]) for key in final), name

    lines = [json.loads(t) for t in (tmp_path / "model" / "rounds.jsonl").read_text().splitlines()]
    assert sum(line["tokens"] for line in lines if line["fragment"] == 0) == 2 * 130 * 4 * 64
    assert all(line["members"] == ["worker-0", "worker-1"] for line in lines[:6])
    # worker-0 has evaluated the global model on the way, and said so.
    said = re.findall(r"worker-0: validation loss ([\d.]+)", run.output)
    heard = {f"{line['evaluation']:.4f}" for line in lines if line["evaluation"] is not None}
    assert said and {*said} & heard, (said, heard)

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(model.state_dict()[key], final[key]) for key in final)
    story = start(os.path.join(ROOT, "model.py"), "model", "Once upon a time", cwd=tmp_path)
    assert story.wait() == 0 and story.output.startswith("Once upon a time")


def test_the_same_command_again_goes_on(spawn, tmp_path):
    first = spawn("default.yaml", "--until-done", train__max_steps=40, diloco__sync_every=20)
    assert first.wait(120) == 0, first.output  # the workers end by themselves
    again = spawn("default.yaml", train__max_steps=60, diloco__sync_every=20)
    assert again.wait(120) == 0, again.output
    assert "continuing from" in again.output and "steps 40 to 60" in again.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all(spawn, tmp_path, number):
    run = spawn("default.yaml", train__max_steps=100000, diloco__sync_every=10)
    run.wait_for(r"round 2 \|")
    pids = [int(pid) for pid in children(run.process.pid)]
    assert len(pids) == 2
    run.signal(number)
    assert run.wait(60) == 128 + number, run.output
    assert "ends; the newest checkpoint is" in run.output
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the workers are gone")


def test_a_killed_worker_fails_the_command_but_not_the_run(spawn, tmp_path):
    run = spawn(
        "default.yaml",
        "--worker-timeout",
        600,
        train__max_steps=200,
        diloco__sync_every=20,
        output__eval_tokens=200000,
    )
    run.wait_for(r"round 2 \|")
    os.kill(int(children(run.process.pid)[1]), signal.SIGKILL)
    assert run.wait(120) == 1, run.output
    # The user need not wait for --worker-timeout to hear of it, nor does the other worker.
    ended, gone = (
        run.output.index(f"worker-1 {what}") for what in ("ended with exit code -9", "is gone: its")
    )
    assert ended < gone and "not heard of" not in run.output
    # The other one has left the run while it saves its model, and must be let finish.
    assert "worker-0 ended with exit code" not in run.output
    assert "worker-0: the model is in" in run.output
    final = load_file(tmp_path / "model" / "model.safetensors")
    replica = load_file(tmp_path / "worker-out" / "worker-0" / "model.safetensors")
    assert all(torch.equal(replica[key], final[key]) for key in final)


def test_killed_with_9_and_started_again(spawn, tmp_path):
    """The workers end with their server, so the same command can start anew at once."""
    run = spawn("default.yaml", "--save-every", 1, train__max_steps=200, diloco__sync_every=20)
    run.wait_for("saved .*checkpoint-3")
    pids = [int(pid) for pid in children(run.process.pid)]
    run.kill()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the workers are gone")
    again = spawn("default.yaml", train__max_steps=200, diloco__sync_every=20)
    assert again.wait(120) == 0, again.output
    assert re.search(r"continuing from .*checkpoint-([3-9]|10)\b", again.output)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return file.read().split()


def test_the_two_config_files_differ_in_the_fragments_only():
    def read(name):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            return yaml.safe_load(file)

    full, streaming = read("default.yaml"), read("streaming.yaml")
    extra = {
        k: streaming["diloco"].pop(k) for k in list(streaming["diloco"]) if k not in full["diloco"]
    }
    assert full == streaming
    assert extra["num_fragments"] == 4
