"""TransformersCallback in trainers that build on transformers' own: trl and sentence-transformers.

python -m pytest tests/test_recipes.py
"""

import json

import pytest
import torch
from peers import same_bits
from safetensors.torch import load_file
from test_forms import gpt2, rounds
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast, TrainerCallback

from diloco_callback import TransformersCallback, load_weights

STEPS = 12
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_steps": 4,
    "disable_tqdm": True,
}


def tokenizer():
    """Words 0 to 30."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({str(i): i for i in range(31)}, "0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), "0")
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=16, **names)


class Crash(TrainerCallback):
    """Ends training at a step, with the checkpoint of the one before saved."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 9:
            raise RuntimeError("no sample of that name")


@pytest.fixture
def ended(serve, tmp_path):
    """ended(make): train make(folder, callback) with a server, in one go and with a crash; returns
    the trainer of the second, whose end is the same to the bit."""

    def run(make):
        finals = []
        for kind in ("whole", "cut"):
            (tmp_path / kind).mkdir()
            host = serve("-m", tmp_path / kind / "model", "--upload-codec", "int8")
            callback = TransformersCallback(host.address, 5, "ada")
            trainer = make(tmp_path / kind / "out", callback)
            if kind == "cut":
                trainer.add_callback(Crash())
                with pytest.raises(RuntimeError, match="no sample"):
                    trainer.train()
                callback.close()
                callback = TransformersCallback(host.address, 5, "ada")
                trainer = make(tmp_path / kind / "out", callback)
            trainer.train(resume_from_checkpoint=kind == "cut" or None)
            host.wait_for("the model of round 3 is in")
            finals.append(load_file(tmp_path / kind / "model" / "model.safetensors"))
            assert [line["steps"] for line in rounds(tmp_path / kind)] == [5, 5, 2]
        own = dict(trainer.model.named_parameters())
        for name, values in finals[0].items():
            assert same_bits(values, finals[1][name]) and same_bits(values, own[name].detach()), (
                name
            )
        log = trainer.state.log_history
        assert log[-1]["diloco/sync_count"] == 2 and "diloco/local_step" in log[-2]
        return trainer

    return run


def test_trl_trains_an_adapter_with_sft_that_peft_opens(ended, tmp_path):
    import datasets
    import peft
    import trl

    rows = [{"input_ids": [(i + 3 * j) % 31 for j in range(12)]} for i in range(32)]
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)

    def make(folder, callback):
        torch.manual_seed(0)
        return trl.SFTTrainer(
            model=gpt2(),
            args=trl.SFTConfig(str(folder), **SETTINGS),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=lora,
            callbacks=[callback],
        )

    trainer = ended(make)
    folder = tmp_path / "cut" / "model"
    assert not (folder / "config.json").exists()
    opened = dict(peft.PeftModel.from_pretrained(gpt2(), folder).named_parameters())
    assert all(
        same_bits(opened[n].detach(), p.detach()) for n, p in trainer.model.named_parameters()
    )


def test_sentence_transformers(ended, tmp_path):
    import datasets
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=31, intermediate_size=16, max_position_embeddings=16, **sizes)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    text = [" ".join(str((i + j) % 31) for j in range(6)) for i in range(32)]
    data = datasets.Dataset.from_dict({"anchor": text, "positive": text[1:] + text[:1]})

    def make(folder, callback):
        torch.manual_seed(0)
        model = st.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
        return st.SentenceTransformerTrainer(
            model=model,
            args=st.SentenceTransformerTrainingArguments(str(folder), **SETTINGS),
            train_dataset=data,
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[callback],
        )

    trainer = ended(make)
    folder = tmp_path / "cut" / "model"
    with pytest.raises((OSError, ValueError), match="config"):
        AutoModel.from_pretrained(folder)
    fresh = st.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    load_weights(fresh, folder)
    assert (fresh.encode(text[:3]) == trainer.model.eval().encode(text[:3])).all()
    assert json.loads((tmp_path / "bert" / "config.json").read_text())["hidden_size"] == 8
