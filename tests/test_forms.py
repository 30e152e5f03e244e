"""What a user picks up: `attach` for scripts, the importable callbacks, SIGTERM, the folder that the
server leaves, and the recipes of the README for jobs, containers, trl and sentence-transformers.

Run:  python -m pytest tests/test_forms.py
"""

import configparser
import contextlib
import copy
import json
import os
import pathlib
import pickle
import re
import shlex
import signal
import subprocess
import sys
import threading

import conftest
import pytest
import torch
import toy_worker
from conftest import ROOT, TRAINER
from peers import same_bits
from safetensors.torch import load_file
from test_anywhere import readme_snippets

import diloco_callback
import server
import worker as worker_program
from diloco_callback import DiLoCoWorker, SigtermNotice, load_weights


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DILOCO_")]:
        monkeypatch.delenv(name)


def made(sizes=(5, 7, 2)):
    model = toy_worker.build(sizes)
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def rounds(folder):
    with open(folder / "model" / "rounds.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- Scripts -------------------------------------------------------------------------------------


def test_without_a_server_attach_does_nothing_and_counts_steps(capsys):
    model, optimizer = made()
    diloco = DiLoCoWorker.attach(model, [made()[1], optimizer], sync_every=2)
    assert "training standalone" in capsys.readouterr().err
    losses = list(toy_worker.train(model, optimizer, 5, 0))
    twin = made()
    assert losses == list(toy_worker.train(*twin, 5, 0))
    assert all(map(same_bits, model.parameters(), twin[0].parameters()))
    assert (diloco.index, diloco.rank, diloco.world, diloco.step, diloco.local_step) == (
        0,
        0,
        1,
        5,
        5,
    )
    assert not diloco.run_is_over(5) and diloco.metrics() == {} and diloco.residual() == {}
    diloco.loss = 1.0
    with diloco.global_model():
        diloco.flush()
    again = DiLoCoWorker.attach(model, optimizer, state=diloco.state_dict())
    diloco.close()
    list(toy_worker.train(model, optimizer, 1, 0))
    assert (diloco.step, again.step, again.local_step) == (5, 6, 1)
    with pytest.raises(TypeError, match="is not a torch"):
        DiLoCoWorker.attach(model, None)


def test_what_the_readme_says_of_attach_is_there_with_and_without_a_server():
    (section,) = re.findall(r"Four lines make.*?Start the server", README, re.DOTALL)
    names = set(re.findall(r"`(?:with )?diloco\.(\w+)", section))
    assert names >= {"index", "step", "run_is_over", "flush", "close", "metrics", "state_dict"}
    model, optimizer = made()
    worker = DiLoCoWorker(model, optimizer, "host:1")
    assert all(hasattr(each, name) for name in names
               for each in (worker, DiLoCoWorker.attach(model, optimizer)))  # fmt: skip


def test_a_worker_that_attach_has_started_may_be_used_in_a_with_block(serve):
    model, optimizer = made()
    with DiLoCoWorker.attach(model, optimizer, serve().address, 2) as diloco:
        list(toy_worker.train(model, optimizer, 5, 0))
        assert (diloco.local_step, diloco.sync_count, diloco.joins) == (5, 2, 1)
    with pytest.raises(RuntimeError, match="has left the run"):
        diloco.start()


SCRIPT = """
import os, sys
sys.path.insert(0, os.environ["OWN"])
import toy_worker, torch
from diloco_callback import DiLoCoWorker

def main():
    torch.manual_seed(0)
    model = toy_worker.build((5, 7, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    diloco = DiLoCoWorker.attach(model, optimizer, sync_every=5)
    for _ in toy_worker.train(model, optimizer, 12, diloco.index):
        pass
    {end}

main()
"""


@pytest.mark.parametrize(
    ("end", "reason", "steps", "code"),
    [
        ("", "done", 12, 0),
        ("diloco.flush(); sys.exit(3)", "done", 12, 3),
        (
            "raise RuntimeError('no sample')",
            "the process ended after RuntimeError: no sample",
            10,
            1,
        ),
    ],
    ids=["nothing", "flush", "exception"],
)
def test_a_script_that_ends_has_sent_its_steps_unless_it_failed(
    serve, start, tmp_path, end, reason, steps, code
):
    host = serve()
    env = {"DILOCO_SERVER": host.address, "DILOCO_WORKER_ID": "ada", "OWN": TESTS}
    assert start("-c", SCRIPT.format(end=end), env=env).wait() == code
    host.wait_for(f"ada leaves: '?{reason}")
    host.wait_for("the model of round .* is in")
    assert sum(line["steps"] for line in rounds(tmp_path)) == steps


README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()  # noqa: SIM115
TESTS = os.path.join(ROOT, "tests")
(RESUME,) = (snippet for snippet in readme_snippets() if "last.pt" in snippet)
BEFORE = """
import os, sys, threading
sys.path.insert(0, os.environ["OWN"])
import toy_worker, torch
from safetensors.torch import save_file

max_steps, hold = map(int, sys.argv[1:])

def batch_of(step, index):
    print("batch", step, flush=True)
    if step == hold:
        print("holding", flush=True)
        threading.Event().wait()
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1000 * step + index))
"""
PLAIN = """
model = toy_worker.build((5, 7, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

def train_step(batch):
    loss = (model(batch) - batch[:, :2]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
# What nanoGPT's train.py has: a compiled model with a tied head, groups with and without decay, a
# scaler, parts of a batch, clipped gradients.
NANOGPT = """
class GPT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(11, 8), torch.nn.Embedding(5, 8)
        self.norm, self.qkv = torch.nn.LayerNorm(8, bias=False), torch.nn.Linear(8, 24)
        self.lm_head = torch.nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens[:, :-1]) + self.wpe.weight[: tokens.shape[1] - 1]
        qkv = self.qkv(self.norm(x)).chunk(3, 2)
        x = x + torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
        logits = self.lm_head(x)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

torch.manual_seed(1337)
model = GPT()
kinds = [[p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (True, False)]
groups = [{"params": p, "weight_decay": w} for p, w in zip(kinds, (0.1, 0.0))]
optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
model = torch.compile(model, backend="eager")

def train_step(batch):
    tokens = (batch.abs() * 5).long().clamp(max=10)
    for part in tokens.chunk(2):
        scaler.scale(model(part) / 2).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
"""
AFTER = """
save_file(dict(getattr(model, "_orig_mod", model).named_parameters()), "out.safetensors")
print("made", diloco.local_step)
"""


@pytest.fixture
def resuming(start, tmp_path):
    """resuming(host, name, steps, hold): the README's loop that resumes, in a folder of its own;
    kind: the code for its model and a step."""

    def run(host, name, steps, hold=-1, kind=PLAIN):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        snippet = RESUME.replace("host:8512", host.address).replace("% 100", "% 4")
        code = BEFORE + kind + snippet.replace(", 500,", ", 5,") + AFTER
        env = {"DILOCO_WORKER_ID": name, "OWN": TESTS}
        return start("-c", code, steps, hold, env=env, cwd=folder)

    return run


@pytest.mark.parametrize(
    ("model", "names"), [(PLAIN, ["ada", "bob"]), (NANOGPT, ["ada"])], ids=["plain", "nanogpt"]
)
def test_the_readmes_loop_goes_on_after_kill_9_and_ends_with_the_run(
    serve, resuming, tmp_path, model, names
):
    """At step 9 the checkpoint of step 8 has three steps that no round has, and rounding's losses."""
    assert len(RESUME.split("diloco.flush")[0].splitlines()) <= 20
    finals = []
    for kind in ("whole", "cut"):
        folder = tmp_path / kind / "model"
        folder.parent.mkdir()
        host = serve("-m", folder, "-n", len(names), "--until-done")
        hold = 9 if kind == "cut" else -1
        workers = [resuming(host, f"{name}-{kind}", 14, hold, model) for name in names]
        for k, worker in enumerate(workers if kind == "cut" else ()):
            worker.wait_for("holding")
            worker.kill()
            workers[k] = resuming(host, f"{names[k]}-{kind}", 14, kind=model)
        assert all(worker.wait() == 0 for worker in workers) and host.wait() == 0
        made = 6 if kind == "cut" else 14
        assert [worker.lines[-1] for worker in workers] == [f"made {made}"] * len(names)
        finals.append(load_file(folder / "model.safetensors"))
        for name in names:
            own = load_file(tmp_path / f"{name}-{kind}" / "out.safetensors")
            assert all(same_bits(own[tensor], values) for tensor, values in finals[-1].items())
    assert all(same_bits(finals[0][name], finals[1][name]) for name in finals[0])


def test_the_readmes_loop_leaves_at_sigterm_and_waits_for_nobody(serve, resuming, tmp_path):
    """The other worker makes no step, so that no round ends."""
    host = serve("-n", 2, "--worker-timeout", 2)
    ada, bob = resuming(host, "ada", 10**6), resuming(host, "bob", 10**6, hold=0)
    bob.wait_for("holding")
    ada.wait_for("batch 4")  # after this step it waits for bob
    ada.signal(signal.SIGTERM)
    assert ada.wait() == 0
    assert ada.lines[-1] == "made 5"
    host.wait_for("ada leaves: done")
    bob.kill()
    host.wait_for(r"round 1 .*\| 1 push \|")


# --- SIGTERM -------------------------------------------------------------------------------------


class Told:
    """As much of a worker as a SigtermNotice needs."""

    stop_ordered, parts = False, 0

    def part(self):
        self.parts += 1


def test_sigterm_is_taken_once_and_a_handler_of_the_programs_own_decides():
    heard, before = [], signal.getsignal(signal.SIGTERM)
    try:
        for own in (signal.SIG_DFL, lambda *args: heard.append(args), signal.SIG_IGN):
            signal.signal(signal.SIGTERM, own)
            told = Told()
            notice = SigtermNotice(told)
            if own == signal.SIG_IGN:  # somebody wants it so
                assert signal.getsignal(signal.SIGTERM) == own
                continue
            signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == own
            assert told.parts == 1 and notice.came == told.stop_ordered == (own == signal.SIG_DFL)
        assert len(heard) == 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        first, second = SigtermNotice(Told()), SigtermNotice(Told())
        first.end()  # not the last to come: the other one stays
        assert signal.getsignal(signal.SIGTERM) == second.handle
        second.end()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_trainer_sends_saves_and_leaves_at_sigterm(serve, start, tmp_path):
    host = serve()
    env = {"DILOCO_SERVER": host.address, "DILOCO_WORKER_ID": "ada", "DILOCO_SYNC_EVERY": "5"}
    chosen = ["max_steps=1000000", "save_strategy=steps", "save_steps=1000000"]
    script = os.path.join(ROOT, "tests", "hf_worker.py")
    ada = start(script, tmp_path / "ada", "--set", *chosen, env=env, imports=TRAINER)
    host.wait_for("round 1 ")
    ada.signal(signal.SIGTERM)
    assert ada.wait() == 128 + signal.SIGTERM
    host.wait_for("ada leaves: done")
    host.wait_for("the model of round .* is in")
    (checkpoint,) = (tmp_path / "ada").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert sum(line["steps"] for line in rounds(tmp_path)) == state["global_step"]
    saved = state["stateful_callbacks"]["TransformersCallback"]["attributes"]["saved"]
    assert saved["step"] == state["global_step"]


# --- The importable callbacks --------------------------------------------------------------------


def test_the_callback_of_transformers_is_one_class_that_can_be_pickled_and_copied():
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    made = diloco_callback.TransformersCallback
    assert made is diloco_callback.TransformersCallback and made.__doc__
    assert issubclass(made, diloco_callback.DiLoCoCallback | TrainerCallback | ExportableState)
    callback = made("host:1", 7, "ada")
    callback.load_state_dict({"step": 3, "fragments": []})
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(other) is made and other.worker is None
        assert (other.options, other.saved) == (callback.options, callback.saved)
    with pytest.raises(AttributeError, match="has no attribute 'KerasCallback'"):
        diloco_callback.KerasCallback  # noqa: B018


def test_only_what_has_changed_is_logged_and_nothing_in_an_evaluation(serve):
    host = serve()
    model, optimizer = made()
    callback = diloco_callback.DiLoCoCallback(host.address, 5, "ada")
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    lines = [{"loss": 2.0}, {"loss": 1.0}, {"eval_loss": 3.0, "epoch": 1}, {"test_runtime": 3.0}]
    before = copy.deepcopy(lines)
    for line, _ in zip(lines, toy_worker.train(model, optimizer, 4, 0), strict=True):
        callback.on_log(None, None, None, logs=line)
    assert "diloco/sync_every" in lines[0] and "diloco/sync_every" not in lines[1]
    assert lines[1]["diloco/local_step"] == 2 and "diloco/sync_count" not in lines[1]
    assert lines[2:] == before[2:] and callback.worker.loss == 1.0
    summary = {"train_runtime": 3.0}
    callback.on_log(None, None, None, logs=summary)
    assert summary.keys() > callback.worker.metrics().keys()
    callback.close()


# --- The result opens ----------------------------------------------------------------------------


def gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 31}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


class Around(torch.nn.Module):
    """A model of transformers as a part of another, as in SentenceTransformer."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head, self.config = inner, torch.nn.Linear(8, 2), inner.config


def trained(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return DiLoCoWorker(model, torch.optim.SGD(parameters, lr=0.1), "host:1").trained


def test_a_config_that_does_not_fit_the_names_is_not_sent():
    import loop_worker

    config = {"config.json": gpt2().config.to_json_string()}
    for whole in (gpt2(), loop_worker.Wrapper(gpt2()), torch.compile(loop_worker.Wrapper(gpt2()))):
        assert trained(whole).files == config
    frozen = gpt2()
    frozen.transformer.wte.requires_grad_(False)
    assert trained(frozen).files == config
    half = gpt2()
    half.transformer.wte.weight = torch.nn.Parameter(torch.ones(31, 8, dtype=torch.uint8), False)
    assert trained(half).files == trained(Around(gpt2())).files == {}
    with_adapter = gpt2()
    import peft

    with_adapter.add_adapter(peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert trained(with_adapter).files == {}
    normed, more, resized, untied = (gpt2() for _ in range(4))
    torch.nn.utils.parametrizations.weight_norm(normed.transformer.ln_f, dim=None)
    more.transformer.more = torch.nn.Linear(8, 8)
    assert trained(normed).files == trained(more).files == {}
    demanding = gpt2()  # of a class that cannot be made from a config alone
    demanding.__class__ = type("Own", (type(demanding),), {"__init__": lambda self, one, two: None})
    assert trained(demanding).files == {}
    resized.resize_token_embeddings(40)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    rng = torch.get_rng_state()
    assert '"vocab_size": 40' in trained(resized).files["config.json"]
    assert trained(untied).files == config and torch.equal(rng, torch.get_rng_state())


def test_adapters_that_peft_would_not_open_are_named(capsys):
    import peft

    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    plain = peft.get_peft_model(gpt2(), lora)
    files = trained(torch.compile(plain)).files
    names = json.loads(files["adapter_names.json"])
    assert names.keys() == trained(plain).named.keys()
    assert {*names.values()} == peft.get_peft_model_state_dict(plain).keys()
    assert json.loads(files["adapter_config.json"])["r"] == 2 and not capsys.readouterr().err
    half = peft.get_peft_model(gpt2(), lora)
    for name, parameter in half.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    more = peft.get_peft_model(gpt2(), lora)
    more.base_model.model.transformer.ln_f.requires_grad_(True)
    two = peft.get_peft_model(gpt2(), lora)
    two.add_adapter("second", lora)
    for model, name in ((half, "lora_A"), (more, "ln_f"), (two, "'second'")):
        assert trained(model).files == {}
        assert name in capsys.readouterr().err


def gpt2_that_peft_prompts():
    """Prompts, unlike adapters within layers, need to know the model's class and have room to grow."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=32, n_embd=8, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    "kind, settings, opens",
    [
        ("PromptTuningConfig", {}, True),
        ("PrefixTuningConfig", {}, True),
        ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 8}, False),
        ("PromptEncoderConfig", {"encoder_hidden_size": 8}, False),
    ],
)
def test_prompts_open_where_peft_saves_them_as_they_are(
    serve, tmp_path, capsys, kind, settings, opens
):
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)
    model = peft.get_peft_model(gpt2_that_peft_prompts(), config)
    train_one(model, serve("--until-done"))
    folder = tmp_path / "model"
    is_said = "PeftModel.from_pretrained cannot open" in capsys.readouterr().err
    assert is_said != opens and (folder / "adapter_config.json").exists() == opens
    if opens:
        opened = peft.PeftModel.from_pretrained(gpt2_that_peft_prompts(), folder)
        names = dict(opened.named_parameters())
        assert all(same_bits(names[n], p) for n, p in model.named_parameters())
    else:
        fresh = peft.get_peft_model(gpt2_that_peft_prompts(), config)
        load_weights(fresh, folder)
        assert all(map(same_bits, fresh.parameters(), model.parameters()))


def train_one(model, host, change=None):
    """Train a model of transformers by itself until the server has written it; `change`: a function
    of the model and its optimizer that is called in the midst of it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, tokens = torch.optim.SGD(trained, lr=0.1), torch.arange(12)[None]
    with DiLoCoWorker(model, optimizer, host.address, 2, "a"):
        for i in range(6):
            if change and i == 3:
                change(model, optimizer)
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    assert host.wait() == 0


@pytest.mark.parametrize("stays", [True, False])
def test_an_adapter_that_comes_later_is_described_anew(serve, tmp_path, capsys, stays):
    import peft

    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    larger = peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)

    def change(model, optimizer):
        model.add_adapter("two", larger)
        model.set_adapter("two")
        if not stays:
            model.delete_adapter("default")
        added = [p for n, p in model.named_parameters() if ".two." in n]
        optimizer.add_param_group({"params": added})

    model = peft.get_peft_model(gpt2(), lora)
    train_one(model, serve("--until-done", "--save-every", 1), change)
    folder = tmp_path / "model"
    is_said = "'two' is not" in capsys.readouterr().err
    assert is_said == stays and (folder / "adapter_config.json").exists() != stays
    if not stays:
        opened = dict(peft.PeftModel.from_pretrained(gpt2(), folder, "two").named_parameters())
        assert all(same_bits(opened[n], p) for n, p in model.named_parameters())


def test_an_adapter_of_which_a_part_is_frozen_later_opens(serve, tmp_path, capsys):
    import peft

    def change(model, optimizer):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)

    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2(), lora)
    train_one(model, serve("--until-done"), change)
    opened = dict(peft.PeftModel.from_pretrained(gpt2(), tmp_path / "model").named_parameters())
    assert all(same_bits(opened[n], p) for n, p in model.named_parameters())
    assert "WARNING" not in capsys.readouterr().err


def test_a_folder_without_the_frozen_part_is_opened_by_nobody_unawares(serve, tmp_path):
    from transformers import AutoModel, GPT2LMHeadModel

    host = serve("--save-every", 1)
    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = torch.arange(12)[None]
    diloco = DiLoCoWorker.attach(model, optimizer, host.address, 1)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    diloco.flush()
    diloco.close()
    host.wait_for("the model of round .* is in")
    for folder in (tmp_path / "model", tmp_path / "model" / "checkpoint-0"):
        assert "n_embd" in (folder / "config.json.incomplete").read_text()
        with pytest.raises(OSError, match=r"config\.json"):
            GPT2LMHeadModel.from_pretrained(folder)
        with pytest.raises(OSError, match=r"config\.json"):
            AutoModel.from_pretrained(folder)
    store = server.Store(str(tmp_path / "model"))
    store.open("bf16", "bf16", True)
    assert "config.json" in store.files and store.is_partial == (True, True)

    fresh = gpt2()
    with pytest.raises(ValueError, match=r"lacks 'transformer\.h\.0\."):
        load_weights(fresh, tmp_path / "model")
    fresh.transformer.h[0].requires_grad_(False)
    load_weights(fresh, tmp_path / "model")
    assert all(map(same_bits, fresh.parameters(), model.parameters()))


def test_the_readmes_line_fills_a_plain_model_with_tied_weights(tmp_path):
    import loop_worker

    (snippet,) = (snippet for snippet in readme_snippets() if "load_weights(" in snippet)
    ended, fresh = loop_worker.build(), loop_worker.build()
    for parameter in ended.parameters():
        parameter.data.add_(1.0)
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "model.safetensors"
    diloco_callback.protocol.save_file(path, dict(ended.named_parameters()))
    assert "head.weight" not in load_file(path)
    with contextlib.chdir(tmp_path):
        exec(snippet, {"model": loop_worker.Wrapper(torch.compile(fresh, backend="eager"))})
    assert all(map(same_bits, fresh.parameters(), ended.parameters()))
    assert fresh.head.weight is fresh.embed.weight
    del ended.seldom
    for model, text in (
        (ended, "lacks 'seldom"),
        (toy_worker.build((5, 7, 2)), "lacks '0.weight'"),
    ):
        with pytest.raises(ValueError, match=text):
            load_weights(model, path)
    fresh.hidden = torch.nn.Linear(8, 1)
    with pytest.raises(ValueError, match=r"'hidden\.weight' of this shape"):
        load_weights(fresh, path)


def test_the_readmes_way_opens_an_adapter(serve, tmp_path):
    """The server's -m holds the base, whose config.json would not fit the adapter."""
    import peft
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    host = serve("-m", tmp_path / "base", "--save-every", 1)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), lora)
    optimizer, tokens = torch.optim.SGD(model.parameters(), lr=0.1), torch.arange(12)[None]
    diloco = DiLoCoWorker.attach(model, optimizer, host.address, 1)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    diloco.flush()
    diloco.close()
    host.wait_for("the model of round .* is in")
    for folder in (tmp_path / "base-diloco", max((tmp_path / "base-diloco").glob("checkpoint-*"))):
        assert not (folder / "config.json").exists()
        opened = peft.PeftModel.from_pretrained(gpt2(), folder)
        names = dict(opened.named_parameters())
        if folder.name == "base-diloco":
            assert all(same_bits(names[n], p) for n, p in model.named_parameters())
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "base-diloco").eval()
    assert torch.equal(adapted(tokens).logits, model.eval()(tokens).logits)


def test_names_for_an_adapter_that_are_none_leave_tensors_out(tmp_path, capsys):
    """They come from a worker."""
    tensors = {name: torch.ones(2) for name in "abcd"}
    diloco_callback.protocol.save_file(tmp_path / "model.safetensors", tensors)
    for text in (b'{"a": "x", "b": 3, "c": "__metadata__", "d": "\\n"}', b"[]", b"{"):
        server.write_adapter(tmp_path, text)
    assert capsys.readouterr().out.count("WARNING: no adapter_model.safetensors") == 2
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"x"}


# --- Jobs, containers, units ---------------------------------------------------------------------


def block(language):
    (text,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return text


def test_the_readmes_slurm_job_goes_on_where_it_was_when_it_is_run_again(serve, start, tmp_path):
    """With tools of Slurm that only run their command, or write it down."""
    host = serve()
    sizes = "model.hidden_size=16 model.num_hidden_layers=1 model.intermediate_size=16"
    small = (
        f"data.source=builtin train.max_steps=1000000 train.batch_size=1 train.context=8 {sizes}"
    )
    more = f"output.dir={tmp_path}/{{worker_id}} diloco.sync_every=2 output.log_every=1 {small}"
    more = [word for each in more.split() for word in ("--set", each)]
    tools, job = tmp_path / "bin", tmp_path / "job.sh"
    tools.mkdir()
    (tools / "srun").write_text(f'#!/bin/sh\necho $$ > {tmp_path}/pid\nexec "$@"\n')
    (tools / "scontrol").write_text('#!/bin/sh\necho scontrol "$@"\n')
    (tools / "python").write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@" {shlex.join(more)}\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job.write_text(block("sh").replace("host:8512", host.address))
    (command,) = re.findall(r"python (worker.py .*)", job.read_text())
    first = start(
        *command.split(), *more, env={"DILOCO_WORKER_ID": "17-3"}
    )  # nothing to go on from
    first.wait_for("^step 5/")
    first.signal(signal.SIGTERM)
    assert first.wait() == 143
    env = {**conftest.ENV, "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    env["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options["start_new_session"] = True
    with subprocess.Popen(["sh", job], cwd=ROOT, env=env, **options) as second:
        seen, guard = (
            [],
            threading.Timer(conftest.DEADLINE, os.killpg, [second.pid, signal.SIGKILL]),
        )
        guard.start()
        for line in second.stdout:
            seen.append(line)
            if line.startswith("step "):
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
                break
        seen += second.stdout
        guard.cancel()
    assert second.returncode == 143, seen
    assert any(line.startswith("resumed from") for line in seen), seen
    assert seen[-1] == "scontrol requeue 17_3\n"
    host.wait_for("17-3 leaves: .*")


def test_the_readmes_container_and_unit_run_commands_that_there_are(capsys):
    steps = dict(line.split(" ", 1) for line in block("dockerfile").splitlines())
    *sources, _ = steps["COPY"].split()
    copied = [path.name for source in sources for path in pathlib.Path(ROOT).glob(source)]
    assert {"requirements.txt", "worker.py", "protocol.py", "default.yaml"} < {*copied}
    entry = json.loads(steps["ENTRYPOINT"]) + json.loads(steps["CMD"])
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(block("ini"))
    service = unit["Service"]
    assert service["SuccessExitStatus"] == str(128 + signal.SIGTERM)
    python, *command = shlex.split(service["ExecStart"])
    assert entry[0] == "python" and python.endswith("/bin/python") and entry[1:] == command
    assert command[0] == "worker.py" and "--go-on" in command
    with contextlib.chdir(ROOT):
        assert worker_program.main([*command[1:], "--dry-run"]) == 0
    assert "server: host:8512" in capsys.readouterr().out
