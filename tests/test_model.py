"""The model against transformers, which is the judge of names, numbers, ids and files.

python -m pytest tests/test_model.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import model as model_module
import protocol
from model import ByteTokenizer, Config, Llama, descriptive_files, load, sample, save, supports

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
CONFIGS = {
    "tied": Config(**SMALL),
    "untied": Config(**SMALL, tie_word_embeddings=False),
    "grouped": Config(**SMALL, num_attention_heads=8, num_key_value_heads=2),
    "one_kv_head": Config(**SMALL, num_key_value_heads=1, tie_word_embeddings=False),
    "long": Config(**SMALL, max_position_embeddings=1024, rope_theta=500.0, rms_norm_eps=1e-3),
}


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(7)


def shaken(config):
    """A model in which every parameter, norms too, matters to the logits."""
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_ids(config, batch=2):
    return torch.randint(config.vocab_size, (batch, config.max_position_embeddings))


def assert_same_logits(ours, theirs, ids):
    """Equal but for the order of float32 sums; a wrong rotation or head order is off by 1."""
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
    assert b.std() > 0.5
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# --- Against transformers -------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save(name, tmp_path):
    ours = shaken(CONFIGS[name])
    save(ours, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert theirs.dtype == torch.float32
    assert_same_logits(ours, theirs, random_ids(ours.config))


@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_what_transformers_saves(name, tmp_path):
    settings = json.loads(CONFIGS[name].to_json())
    theirs = AutoModelForCausalLM.from_config(transformers.LlamaConfig.from_dict(settings))
    for parameter in theirs.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    for file, text in model_module.tokenizer_files().items():
        (tmp_path / file).write_text(text)
    ours, tokenizer = load(tmp_path)
    assert isinstance(ours, Llama) and isinstance(tokenizer, ByteTokenizer)
    assert ours.config == CONFIGS[name]
    assert_same_logits(ours, theirs, random_ids(ours.config))


def test_a_bfloat16_model_keeps_its_dtype_both_ways(tmp_path):
    ours = Llama(Config(**SMALL, dtype="bfloat16"))
    save(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    again, _ = load(tmp_path)
    for name, tensor in theirs.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        if name != "lm_head.weight":  # theirs lists the tied matrix twice
            assert torch.equal(tensor, again.state_dict()[name])
    ids = random_ids(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(again(ids), theirs(ids).logits, rtol=0.05, atol=0.05)
    assert again(ids, ids).dtype == torch.float32


def test_other_models_come_through_transformers(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=24, eos_token_id=256
    )
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    for file, text in model_module.tokenizer_files().items():
        (tmp_path / file).write_text(text)
    loaded, tokenizer = load(tmp_path)
    assert type(loaded) is type(theirs)
    ids = torch.randint(257, (1, 24))
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    text = "".join(sample(loaded, tokenizer, "Once", max_tokens=40, seed=1))  # over the context
    assert len(text) > 5


def test_without_transformers_the_error_is_the_pip_command(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    protocol.save_file(tmp_path / "model.safetensors", {"w": torch.zeros(1)})
    monkeypatch.setitem(sys.modules, "transformers", None)  # what import sees where it is absent
    with pytest.raises(ImportError, match=r"model_type 'gpt2'.*pip install transformers"):
        load(tmp_path)


# --- The model ------------------------------------------------------------------------------


def test_loss_is_the_mean_cross_entropy_of_the_targets_that_count():
    model = shaken(CONFIGS["tied"])
    ids, targets = random_ids(model.config), random_ids(model.config)
    targets[0, 5:90] = -100
    counted = targets != -100
    rows = model(ids).log_softmax(-1)[counted]
    by_hand = -rows[torch.arange(len(rows)), targets[counted]].sum() / counted.sum()
    loss = model(ids, targets)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_transformers(tmp_path):
    ours = shaken(CONFIGS["grouped"])
    save(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, targets = random_ids(ours.config), random_ids(ours.config)
    ours(ids, targets).backward()
    F.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-2, atol=1e-4)


def test_no_position_sees_a_later_one():
    model = shaken(CONFIGS["grouped"])
    ids = random_ids(model.config)
    changed = ids.clone()
    changed[:, 100] = (changed[:, 100] + 1) % 257
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :100], after[:, :100])
    assert (before[:, 100:] - after[:, 100:]).abs().amax(-1).min() > 0


def test_one_seed_gives_the_same_parameters_and_another_gives_others():
    torch.manual_seed(1)
    first = Llama(CONFIGS["untied"]).state_dict()
    torch.manual_seed(1)
    second = Llama(CONFIGS["untied"]).state_dict()
    other = Llama(CONFIGS["untied"]).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_initial_sizes_and_loss():
    model = Llama(Config())
    std = {name: tensor.std().item() for name, tensor in model.state_dict().items()}
    assert std["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.02, rel=0.05)
    for residual in ("self_attn.o_proj", "mlp.down_proj"):
        assert std[f"model.layers.3.{residual}.weight"] == pytest.approx(0.02 / 8**0.5, rel=0.05)
    ids = random_ids(model.config, batch=1)
    assert model(ids, ids.roll(1)).item() == pytest.approx(5.55, abs=0.2)  # ln 257: knows nothing
    assert 700_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_a_tied_matrix_is_one_parameter_and_an_untied_one_is_two():
    tied, untied = Llama(CONFIGS["tied"]), Llama(CONFIGS["untied"])
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"lm_head.weight"}
    for model in (tied, untied):
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def test_a_sequence_over_the_context_is_refused_with_both_numbers():
    model = Llama(CONFIGS["tied"])
    with pytest.raises(ValueError, match=r"257 tokens.*max_position_embeddings is 256"):
        model(torch.zeros(1, 257, dtype=torch.int64))


def test_it_learns_and_autocast_agrees():
    model = Llama(CONFIGS["tied"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([ByteTokenizer().encode("A cat sat on a mat. " * 4)])
    for _ in range(100):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            low = model(ids[:, :-1], ids[:, 1:])
    assert low.dtype == torch.float32
    assert low != loss and low.item() == pytest.approx(loss.item(), rel=0.1)


# --- Configuration --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_round_trip(name):
    text = CONFIGS[name].to_json()
    assert Config.from_json(text) == CONFIGS[name]
    assert supports(json.loads(text))
    theirs = transformers.LlamaConfig.from_dict(json.loads(text))
    assert theirs.rope_parameters["rope_theta"] == CONFIGS[name].rope_theta
    assert json.loads(text)["rope_theta"] == CONFIGS[name].rope_theta  # where version 4 looks


def test_config_of_older_transformers_and_of_absent_fields():
    raw = json.loads(Config().to_json())
    for name in ("rope_parameters", "dtype", "tie_word_embeddings", "eos_token_id", "head_dim"):
        del raw[name]
    raw.update(rope_theta=777.0, torch_dtype="bfloat16", rope_scaling=None)
    config = Config.from_json(json.dumps(raw))
    assert (config.rope_theta, config.dtype) == (777.0, "bfloat16")
    assert (config.tie_word_embeddings, config.eos_token_id) == (False, 2)  # as LlamaConfig has it


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "mistral"),
        ("model_type", None),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("head_dim", 64),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 500000.0}),
        ("rope_parameters", {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_what_is_not_implemented_is_left_to_transformers(field, value):
    raw = json.loads(Config().to_json()) | {field: value}
    assert not supports(raw)
    with pytest.raises(ValueError, match=f"{field} .*use transformers"):
        Config.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("hidden_size", "128", "whole number"),
        ("hidden_size", 130, "num_attention_heads 4"),
        ("hidden_size", 4, "num_attention_heads 4"),
        ("num_attention_heads", 0, "whole number"),
        ("num_key_value_heads", 3, "num_attention_heads 4"),
        ("num_hidden_layers", 10**9, "whole number"),
        ("vocab_size", True, "whole number"),
        ("vocab_size", 10**12, "whole number"),
        ("rms_norm_eps", -1.0, "positive"),
        ("rope_theta", 10**400, "positive"),
        ("tie_word_embeddings", "yes", "boolean"),
        ("dtype", "int8", "bfloat16"),
        ("dtype", ["float32"], "bfloat16"),
    ],
)
def test_bad_values_are_named(field, value, says):
    with pytest.raises(ValueError, match=f"{field} .*{says}"):
        Config(**{field: value})
    raw = json.loads(Config().to_json())
    del raw["head_dim"], raw["rope_parameters"]
    with pytest.raises(ValueError, match=f"{field} .*{says}"):
        Config.from_json(json.dumps(raw | {field: value}))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"model_type": "llama"}'])
def test_a_config_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"config.json (is not valid|has no object|lacks vocab_)"):
        Config.from_json(text)


# --- Tokenizer ------------------------------------------------------------------------------

TEXTS = [
    "Once upon a time, there was a cat.",
    "  leading,\n\n\ttabs \r\n and trailing  ",
    "caf\u00e9 \u4f60\u597d \U0001f600\U0001f469\u200d\U0001f680 e\u0301 \ufb01",
    "".join(map(chr, range(0x180))),
    "one<|endoftext|> two <|endoftext|><|endoftext|>",
    "<|endoftext|>",
    "<|endoftext <|endoftext|",
    "\ufffd\ufeff\x00",
    "it's you're 1234 </s> <s> [INST]",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as a run leaves it."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("run") / "model"
    save(shaken(Config(**SMALL, max_position_embeddings=64)), path)
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_auto_tokenizer_gives_the_same_ids(text, folder):
    ours, theirs = ByteTokenizer(), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert theirs.encode(text) == theirs(text)["input_ids"] == ids
    assert ours.decode(ids) == theirs.decode(ids) == text


def test_token_ids_are_bytes_and_one_end(folder):
    ours, theirs = ByteTokenizer(), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a\u00e9<|endoftext|>b") == [97, 0xC3, 0xA9, 256, 98]
    assert ours.eos_id == theirs.eos_token_id == theirs.bos_token_id == 256
    assert ours.vocab_size == len(theirs) == Config().vocab_size == 257
    for byte in range(256):  # also those that are no UTF-8 by themselves
        assert ours.decode([byte]) == theirs.decode([byte])
    assert ours.encode("a\udcff") == [97, 63]


# --- Save and load --------------------------------------------------------------------------


def test_save_writes_whole_files_and_load_gives_the_same_bits(tmp_path):
    model = shaken(CONFIGS["untied"])
    save(model, tmp_path / "a" / "b")
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert names == {"model.safetensors", *descriptive_files(model.config)}
    with safe_open(tmp_path / "a" / "b" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        for name, tensor in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor)
    again, tokenizer = load(tmp_path / "a" / "b")
    assert isinstance(tokenizer, ByteTokenizer) and again.config == model.config
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    again(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


def test_save_writes_the_given_texts_and_no_other_names(tmp_path):
    model = Llama(CONFIGS["tied"])
    save(model, tmp_path, {"config.json": "{}"})
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    for name in ("../config.json", "model.safetensors", "run.py"):
        with pytest.raises(ValueError, match=r"does not describe|not the name"):
            save(model, tmp_path / "new", {name: "x"})
        assert not (tmp_path / "new").exists()


def test_tensors_that_do_not_fit_are_named_with_both_shapes(tmp_path):
    save(Llama(CONFIGS["tied"]), tmp_path)
    _, tensors = protocol.load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(31)
    tensors["extra"] = torch.ones(2, 3)
    protocol.save_file(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert "extra is [2, 3], expected no such tensor" in str(error.value)
    assert "mlp.up_proj.weight is missing, expected [88, 32]" in str(error.value)
    assert "model.norm.weight is [31], expected [32]" in str(error.value)


def test_a_config_of_a_giant_model_is_refused_before_memory_is_taken(tmp_path):
    save(Llama(CONFIGS["tied"]), tmp_path)
    giant = Config(vocab_size=1 << 24, hidden_size=1 << 20, num_hidden_layers=64)  # 10^15 bytes
    (tmp_path / "config.json").write_text(giant.to_json())
    with pytest.raises(ValueError, match=r"does not fit its config.json.* more$"):
        load(tmp_path)


def test_folders_that_cannot_be_read_are_refused_by_name(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors and no whole checkpoint-N"):
        load(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(protocol.ProtocolError, match=r"model.safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load(tmp_path)


def test_load_takes_the_newest_whole_checkpoint(tmp_path, capsys):
    for number in (9, 10):
        torch.manual_seed(number)
        save(Llama(CONFIGS["tied"]), tmp_path / f"checkpoint-{number}")
    save(Llama(CONFIGS["tied"]), tmp_path / "checkpoint-11")
    (tmp_path / "checkpoint-11" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-12.tmp").mkdir()
    torch.manual_seed(10)
    expected = Llama(CONFIGS["tied"]).state_dict()
    got = load(tmp_path)[0].state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert "checkpoint-10" in capsys.readouterr().err


# --- Sampling -------------------------------------------------------------------------------


def test_sampling_follows_the_seed(folder):
    model, tokenizer = load(folder)

    def story(**options):
        return "".join(sample(model, tokenizer, "Once", max_tokens=80, **options))  # > context

    assert story(seed=1) == story(seed=1) != story(seed=2)
    assert story(temperature=0, seed=1) == story(temperature=0, seed=2)
    assert story(top_k=1, seed=1) == story(temperature=0)
    assert story(temperature=1e-6, seed=1) == story(temperature=0) != story(seed=1)
    assert story(top_k=0, seed=1) != story(top_k=1, seed=1)
    with pytest.raises(ValueError, match=r"temperature"):
        story(temperature=-1.0)


def taught(text):
    """A model that says one text, byte for byte."""
    model, tokenizer = Llama(CONFIGS["tied"]), ByteTokenizer()
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    return model, tokenizer


def test_a_story_ends_at_its_end_and_comes_in_whole_characters():
    text = "A \U0001f600 met \u4f60\u597d and caf\u00e9."
    model, tokenizer = taught(text)
    pieces = list(sample(model, tokenizer, "", max_tokens=200, temperature=0))
    assert pieces == list(text)  # each character, of one to four bytes, is a piece; then the end
    pieces = list(sample(model, tokenizer, "A ", max_tokens=2, temperature=0))
    assert pieces == ["\ufffd"]  # cut within the character: shown, not lost
    assert list(sample(model, tokenizer, "A ", max_tokens=0)) == []


# --- The command line -----------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, str(ROOT / "model.py"), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command, check=False, capture_output=True, encoding="utf-8", env=env, timeout=120
    )


def test_command_line_prints_stories(folder):
    done = run(folder, "Once upon", "--max-tokens", 20, "--num", 2, "--seed", 4, "--top-k", 0)
    model, tokenizer = load(folder)
    stories = [
        "Once upon" + "".join(sample(model, tokenizer, "Once upon", 20, top_k=0, seed=seed))
        for seed in (4, 5)
    ]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ("\n\n".join(stories) + "\n").splitlines()


def test_command_line_reads_a_run_that_still_trains(folder, tmp_path):
    os.symlink(folder, tmp_path / "checkpoint-3")
    done = run(tmp_path, "Once", "--max-tokens", 5)
    assert done.returncode == 0 and done.stdout.startswith("Once")
    assert done.stderr.count("\n") == 1 and "checkpoint-3" in done.stderr


def test_command_line_errors_are_one_line(folder, tmp_path):
    for arguments, says in (
        ([tmp_path / "nowhere"], "no such folder"),
        ([folder, "x", "--temperature", "-1"], "temperature"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr
