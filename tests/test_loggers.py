"""The README's recipes for TensorBoard, wandb and CSV, run as they stand there.

python -m pytest tests/test_loggers.py
"""

import csv
import glob
import os
import re

import pytest
import torch
from conftest import ROOT

from diloco_callback import DiLoCoWorker, LightningCallback, TransformersCallback

EVERY, STEPS = 2, 6
ENDS = {"diloco/sync_count": [0, 1, 1, 2, 2, 3], "diloco/sync_every": [EVERY] * STEPS}


def recipe(known):
    """The only one of the README's recipes with this word in it."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        section = file.read().split("\n### TensorBoard, wandb, CSV\n")[1].split("\n## ")[0]
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", section, re.S) if known in code)
    return found


def scalars(folder):
    """{name: values} in the event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in glob.glob(f"{folder}/**/events.*", recursive=True):
        events = EventAccumulator(os.path.dirname(path)).Reload()
        tags = events.Tags()["scalars"]
        found |= {tag: [each.value for each in events.Scalars(tag)] for tag in tags}
    return found


@pytest.fixture(autouse=True)
def here(serve, tmp_path, monkeypatch, clean):
    """A server for a worker of this process, which works in the test's folder."""
    host = serve()
    monkeypatch.chdir(tmp_path)
    settings = {"SERVER": host.address, "WORKER_ID": "ada", "SYNC_EVERY": str(EVERY)}
    for name, value in settings.items():
        monkeypatch.setenv(f"DILOCO_{name}", value)
    return host


def run_loop(known):
    """Run a recipe for a plain loop; returns the losses of its steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []

    def train_step(step):
        loss = model(torch.ones(3)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        return losses[-1]

    with DiLoCoWorker.attach(model, optimizer) as diloco:
        exec(recipe(known), {"diloco": diloco, "max_steps": STEPS, "train_step": train_step})
        assert diloco.flushed
    return losses


def test_a_plain_loop_into_tensorboard():
    losses = run_loop("SummaryWriter")
    found = scalars("runs/ada")
    assert found["loss"] == pytest.approx(losses)
    assert all(found[name] == values for name, values in ENDS.items())


def test_a_plain_loop_into_wandb_without_a_network(monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    run_loop("wandb.init")
    wandb.teardown()
    (path,) = glob.glob("wandb/offline-run-*/*.wandb")
    with open(path, "rb") as file:
        raw = file.read()
    assert all(raw.count(name.encode()) >= STEPS for name in ENDS)


def test_a_plain_loop_into_a_csv_file():
    losses = run_loop("DictWriter")
    with open("ada.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == losses
    for name, values in ENDS.items():
        assert [float(row[name]) for row in rows] == values


def test_the_trainer_into_tensorboard(tmp_path):
    import hf_worker
    from transformers import Trainer

    args = hf_worker.TrainingArguments(
        "out", **{**hf_worker.DEFAULTS, "max_steps": STEPS, "report_to": "none"}
    )
    names = {"model": hf_worker.build(0, False), "args": args, "train": hf_worker.sentences(64, 0)}
    exec(recipe("TensorBoardCallback"), names | {"Trainer": Trainer} | (own := {
        "TransformersCallback": TransformersCallback}), own)  # fmt: skip
    own["trainer"].train()
    found = scalars(tmp_path)
    assert found["train/loss"][0] > found["train/loss"][-1]
    assert [name for name in ENDS if f"train/{name}" in found] == [*ENDS]


def test_lightning_into_csv_and_tensorboard():
    import lightning
    import lightning_worker

    settings = {"accelerator": "cpu", "max_steps": STEPS, "log_every_n_steps": 1}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    names = {"lightning": lightning, "LightningCallback": LightningCallback, "settings": settings}
    exec(recipe("CSVLogger"), names)
    names["trainer"].fit(lightning_worker.Module(0), lightning_worker.loader(32, 0))
    (path,) = glob.glob("logs/**/metrics.csv", recursive=True)
    with open(path, newline="", encoding="utf-8") as file:
        counts = [row["diloco/sync_count"] for row in csv.DictReader(file)]
    assert [float(count) for count in counts if count][-1] == 4  # with the closing round
    assert scalars("logs")["diloco/sync_count"][-1] == 4
