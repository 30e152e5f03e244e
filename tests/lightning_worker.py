"""A user's script that trains a small module with lightning.Trainer, made one of a run by the
README's recipe as it stands there. Several runs in turn, as it takes long to import Lightning.

    python tests/lightning_worker.py out w0 plain=127.0.0.1:8512 cut=127.0.0.1:8513

Writes the parameters that each run ended with into out/RUN/w0.safetensors, and prints at the end, as
JSON, what each came to.
"""

import argparse
import copy
import json
import os
import pickle
import re
import signal
import sys
import time

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch.utils.data import DataLoader

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# Most are 12 steps; an epoch has four batches.
RUNS = {
    "plain": {"max_steps": 12},
    "accumulated": {  # with a class as people have pasted it
        "max_epochs": 6,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "precision": "bf16-mixed",
    },
    "several": {"max_steps": 24},  # of two optimizers, and in fragments
    "cut": {"max_steps": 12},
    "stopped": {"max_epochs": -1, "limit_val_batches": 0},
    "preempted": {"max_epochs": -1, "limit_val_batches": 0},  # by SIGTERM
    "paced": {"max_steps": 60, "max_epochs": -1},  # in which w1 is a slow machine
    "ddp": {"max_steps": 12, "devices": 2, "strategy": "ddp"},  # in which w0 and w1 are one worker
}


# What the README said before the callback could be imported; it stands in people's scripts.
PASTED = """
import lightning
from diloco_callback import DiLoCoCallback, reason_of


class DiLoCo(DiLoCoCallback, lightning.Callback):
    def on_train_start(self, trainer, module):
        self.on_train_begin(None, None, None, module, trainer.optimizers)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.worker is None:  # no server
            return
        if self.worker.run_is_over(trainer.max_steps):
            trainer.should_stop = True
        last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        last = last or 0 < trainer.max_steps <= trainer.global_step
        if last:
            self.worker.flush()  # before the last validation and checkpoint
        if last or trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            if "loss" in (outputs or {}):
                self.worker.loss = outputs["loss"].item() * trainer.accumulate_grad_batches
            module.log_dict(self.worker.metrics())

    def on_train_end(self, trainer, module):
        super().on_train_end(None, None, None)

    def on_exception(self, trainer, module, exception):
        self.close(reason_of(exception))

    def state_dict(self):
        residual = {"residual": self.worker.residual()} if self.worker else {}
        return super().state_dict() | residual


trainer = lightning.Trainer(callbacks=[DiLoCo()], **settings)
"""


def recipe():
    """The README's code for Lightning."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"```python\n(.*?)```", file.read(), flags=re.DOTALL)
    (block,) = (block for block in blocks if "import lightning" in block)
    return block


class Module(lightning.LightningModule):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(99)  # what is frozen is the same in every worker
        self.frozen = torch.nn.Linear(8, 8).requires_grad_(False)
        torch.manual_seed(seed)
        self.hidden, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
        self.losses = []

    def loss(self, batch):
        out = self.head(self.frozen(torch.tanh(self.hidden(batch))))
        return (out.float() - batch[:, :3]).square().mean()

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Several(Module):
    """Two optimizers, stepped by hand."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.hidden, self.head)]

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class Breaks(lightning.Callback):
    """What a user's own code may do in the third epoch."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 8:
            raise RuntimeError("no sample\nof that name")


class Preempts(lightning.Callback):
    """The notice that a machine gets before it is taken away, in the third epoch."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 8:
            signal.raise_signal(signal.SIGTERM)


class Slow(lightning.Callback):
    """A machine that takes its time for a step."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_batch_start(self, trainer, *_):
        time.sleep(self.seconds)


def loader(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(torch.randn(count, 4, generator=generator), batch_size=8)


def train(run, folder, seed, ckpt_path=None, breaks=False):
    """The trainer and the module of one call of fit."""
    settings = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": CSVLogger(folder, name="", version="resumed" if ckpt_path else "logs"),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **RUNS[run],
    }
    names = {"settings": settings}
    exec(PASTED if run == "accumulated" else recipe(), names)
    trainer = names["trainer"]
    if breaks:
        trainer.callbacks.append(Breaks())
    if run == "paced":
        trainer.callbacks.append(Slow(0.1 if seed else 0.02))
    if run == "preempted":
        trainer.callbacks.append(Preempts())
        trainer.callbacks.append(ModelCheckpoint(folder, "last", save_on_exception=True))
    module = (Several if run == "several" else Module)(seed)
    trainer.fit(module, loader(32, seed), loader(16, 99), ckpt_path=ckpt_path)
    return trainer, module


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("name", help="of the worker; its last digit is the seed")
    parser.add_argument("runs", nargs="+", metavar="run=host:port")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed, told = int(args.name[-1]), {}
    os.environ |= {"DILOCO_WORKER_ID": args.name, "DILOCO_SYNC_EVERY": "5"}
    for run, address in (text.split("=") for text in args.runs):
        os.environ["DILOCO_SERVER"] = address
        os.environ["DILOCO_NUM_FRAGMENTS"] = "4" if run == "several" else "1"
        folder, ckpt_path = os.path.join(args.out, run, args.name), None
        if run == "ddp":  # as torchrun would start both; the test says where the first one listens
            os.environ |= {"RANK": str(seed), "LOCAL_RANK": str(seed), "WORLD_SIZE": "2"}
            os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        if run == "cut":
            try:
                train(run, folder, seed, breaks=True)
            except RuntimeError as error:
                print(f"{args.name} has caught {error!r}", flush=True)
            (name,) = os.listdir(os.path.join(folder, "logs", "checkpoints"))
            ckpt_path = os.path.join(folder, "logs", "checkpoints", name)
        if run == "preempted":
            try:
                train(run, folder, seed)
            except SystemExit as error:
                told[run] = {"error": type(error).__name__, "files": sorted(os.listdir(folder))}
            continue
        trainer, module = train(run, folder, seed, ckpt_path)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        save_file(trained, f"{folder}.safetensors")
        told[run] = {
            "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
            "losses": module.losses[:20],
            "step": trainer.global_step,
            "checkpoint": trainer.checkpoint_callback.best_model_path,
        }
    from diloco_callback import LightningCallback

    made = LightningCallback("host:1", 7, "ada")
    again = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    assert type(again) is LightningCallback and again.options == made.options
    assert isinstance(made, lightning.Callback) and made.state_key == "LightningCallback"
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
