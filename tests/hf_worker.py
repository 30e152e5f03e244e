"""A user's script that trains a small GPT-2 with the Trainer of transformers, made one of a run by
the README's recipe as it stands there. DILOCO_SERVER, DILOCO_WORKER_ID and DILOCO_SYNC_EVERY serve.

    DILOCO_SERVER=127.0.0.1:8512 python tests/hf_worker.py out --set max_steps=12 save_steps=4

Writes the parameters that it started and ended with into the output folder, and prints at the end,
as JSON, the log, what train() returned, the best checkpoint and what reporters were given.
"""

import argparse
import json
import os
import re
import sys
import threading

import torch
from safetensors.torch import save_file
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
VOCABULARY, LENGTH = 61, 16
DEFAULTS = {
    "use_cpu": True,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "first",
    "disable_tqdm": True,
}


# What the README said before the callback could be imported; it stands in people's scripts.
PASTED = """
from diloco_callback import DiLoCoCallback
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState


class DiLoCo(DiLoCoCallback, TrainerCallback, ExportableState):
    pass


trainer = Trainer(model, args, train_dataset=train, eval_dataset=test, callbacks=[DiLoCo()])
"""


def recipe():
    """The README's code for the Trainer."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"```python\n(.*?)```", file.read(), flags=re.DOTALL)
    (block,) = (block for block in blocks if "transformers import Trainer" in block)
    return block


def sentences(count, seed):
    """Sequences in which every token follows from the one before, so that there is something to
    learn, from a start and with a stride of their own."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(VOCABULARY, (count, 1), generator=generator)
    strides = torch.randint(1, 4, (count, 1), generator=generator)
    tokens = (starts + strides * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def build(seed, lora):
    set_seed(seed)
    sizes = {"n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **special))
    if lora:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1))
    return model


class Hold(TrainerCallback):
    """Waits to be killed when the checkpoint of a step is complete."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            print(f"saved {self.step}", flush=True)
            threading.Event().wait()


class Reporter(TrainerCallback):
    """Notes the names in the logs that it gets, as they are then."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(sorted(logs))


class First(Reporter):
    """One that `report_to` names."""


INTEGRATION_TO_CALLBACK["first"] = First


def value_of(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=0, help="of the data, and of a whole model")
    parser.add_argument("--set", nargs="*", default=[], help="TrainingArguments, as name=value")
    parser.add_argument("--lora", action="store_true", help="an adapter on a model of --base")
    parser.add_argument("--base", type=int, default=0, help="the seed of what is adapted")
    parser.add_argument("--pasted", action="store_true", help="with a class as people have it")
    parser.add_argument("--early-stopping", action="store_true")
    parser.add_argument("--hold-at", type=int, default=0, help="the step of a checkpoint")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)

    chosen = {name: value_of(text) for name, text in (pair.split("=") for pair in options.set)}
    args = TrainingArguments(options.out, **{**DEFAULTS, **chosen})
    model = build(options.base if options.lora else options.seed, options.lora)
    rank = os.environ.get("RANK", "0")  # under torchrun
    kept = options.out if rank == "0" else f"{options.out}-rank{rank}"
    save_file(dict(model.named_parameters()), f"{kept}-start.safetensors")

    train, test = sentences(64, options.seed), sentences(16, 99)
    names = {"model": model, "args": args, "train": train, "test": test}
    exec(PASTED if options.pasted else recipe(), names)
    trainer = names["trainer"]
    reporter = Reporter()
    trainer.add_callback(reporter)  # behind the callback, as the last of `callbacks` would be
    if options.early_stopping:
        trainer.add_callback(EarlyStoppingCallback())
    if options.hold_at:
        trainer.add_callback(Hold(options.hold_at))
    output = trainer.train(resume_from_checkpoint=options.resume or None)

    save_file(dict(model.named_parameters()), f"{kept}-end.safetensors")
    told = {"log": trainer.state.log_history, "metrics": output.metrics, "step": output.global_step}
    (first,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, First))
    told |= {"best": trainer.state.best_model_checkpoint, "behind": reporter.seen}
    print(json.dumps({**told, "first": first.seen}), flush=True)


if __name__ == "__main__":
    main()
