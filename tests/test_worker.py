"""Tests of worker.py: settings, stories, data, downloads, schedule, models, resume, commands.

python -m pytest tests/test_worker.py
"""

import functools
import hashlib
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from conftest import DEADLINE, until

import model as models
import worker

ROOT = Path(__file__).resolve().parent.parent
STORIES = f"Once there was a cat.{worker.SEPARATOR}\nThe end.\n{worker.SEPARATOR}\n".encode() * 400
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("DILOCO_")}
CLEAN["OMP_NUM_THREADS"] = "1"
TINY = {
    "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "data": {"source": "builtin"},
    "train": {"max_steps": 12, "context": 32, "batch_size": 4, "threads": 1, "warmup_steps": 4},
    "output": {"log_every": 4, "eval_every": 8, "eval_tokens": 512, "save_every": 4},
}


def config_file(folder, **blocks):
    """A YAML file of TINY, with the values of `blocks` over it."""
    path = Path(folder) / "config.yaml"
    merged = {name: TINY.get(name, {}) | blocks.get(name, {}) for name in {**TINY, **blocks}}
    path.write_text(yaml.safe_dump(merged))
    return path


def run_worker(*arguments, cwd, **environment):
    """Run worker.py as a process to its end: CompletedProcess with text."""
    command = [sys.executable, ROOT / "worker.py", *map(str, arguments)]
    everything = CLEAN | environment
    return subprocess.run(command, cwd=cwd, env=everything, capture_output=True, text=True)


def load(folder, overrides=(), environment=None, **blocks):
    return worker.load_settings(config_file(folder, **blocks), overrides, environment)


@pytest.fixture
def main(tmp_path, monkeypatch):
    """worker.main in `tmp_path`, with the signal handlers of the tests put back afterwards."""
    monkeypatch.chdir(tmp_path)
    for name in ("DILOCO_SERVER", "DILOCO_SYNC_EVERY", "DILOCO_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda *arguments: worker.main([str(argument) for argument in arguments])
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- Settings -------------------------------------------------------------------------------


def test_the_yaml_files_hold_every_setting_that_is_not_a_detail():
    settings = worker.load_settings(ROOT / "default.yaml")
    assert settings.diloco.sync_every == 100 and settings.train.max_steps == 2000
    with torch.device("meta"):
        model = worker.build_model(settings, {})[0]
    assert 700_000 < sum(p.numel() for p in model.parameters()) < 1_000_000
    files = ("default.yaml", "streaming.yaml")
    named = {name for file in files for name, _ in worker.read_yaml(ROOT / file)}
    missing = {
        f"{block}.{key}" for block, values in vars(settings).items() for key in vars(values)
    } - named
    assert missing == {"data.url"}


def test_an_empty_file_gives_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("train:\n")
    assert worker.load_settings(tmp_path / "empty.yaml") == worker.Settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.max_step", 5, "unknown setting train.max_step: did you mean train.max_steps?"),
        ("trian.max_steps", 5, "unknown setting trian.max_steps: did you mean train.max_steps?"),
        ("train.max_steps", 0, "train.max_steps must be at least 1, and is 0"),
        ("train.max_steps", True, "train.max_steps must be a whole number, and is True"),
        ("train.max_steps", 1.5, "train.max_steps must be a whole number, and is 1.5"),
        ("train.max_steps", None, "train.max_steps must be a whole number, and is None"),
        ("train.learning_rate", 0, "train.learning_rate must be above 0, and is 0.0"),
        ("train.learning_rate", True, "train.learning_rate must be a number, and is True"),
        ("train.learning_rate", "fast", "train.learning_rate must be a number, and is 'fast'"),
        ("train.learning_rate", "nan", "train.learning_rate must be finite, and is nan"),
        ("train.beta2", 1, "train.beta2 must be at most 0.99999, and is 1.0"),
        ("train.precision", "fp8", "train.precision must be one of auto, fp32, bf16"),
        (
            "model.tie_word_embeddings",
            1,
            "model.tie_word_embeddings must be true or false, and is 1",
        ),
        ("diloco.sync_every", -3, "diloco.sync_every must be at least 1, and is -3"),
        ("data.source", [], "data.source must be a name or a list of paths, and is []"),
        ("data.source", [3], "data.source must be a name or a list of paths, and is [3]"),
        ("output.dir", "", "output.dir must be more than nothing"),
    ],
)
def test_a_bad_value_is_refused_by_name(tmp_path, name, value, message):
    block, key = name.split(".")
    for source in ({"overrides": [(name, value)]}, {block: {key: value}}):
        with pytest.raises(worker.SettingsError, match=re.escape(message)):
            load(tmp_path, **source)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {learning_rate: 1e-3, min_learning_rate: 1e-4, grad_clip: 2}\n")
    train = worker.load_settings(path).train
    assert (train.learning_rate, train.min_learning_rate) == (0.001, 0.0001)
    assert type(train.grad_clip) is float


def test_the_command_line_beats_the_file_beats_the_environment(tmp_path):
    environment = {"DILOCO_SERVER": "env:1", "DILOCO_SYNC_EVERY": "7", "DILOCO_WORKER_ID": "e"}
    diloco = {"server": "file:1", "sync_every": 5}

    def read(*arguments, **blocks):
        options = worker.parse_arguments([str(config_file(tmp_path, **blocks)), *arguments])
        got = worker.load_settings(options.config, worker.overrides(options), environment)
        return got.diloco.server, got.diloco.sync_every, got.diloco.worker_id

    assert read() == ("env:1", 7, "e")
    assert read(diloco=diloco) == ("file:1", 5, "e")
    assert read("--set", "diloco.sync_every=4", diloco=diloco) == ("file:1", 4, "e")
    flags = ["--server", "flag:1", "--sync-every", "3", "--worker-id", "7"]
    assert read(*flags, "--set", "diloco.sync_every=4", diloco=diloco) == ("flag:1", 3, "7")
    long = ["--diloco-server", "long:1", "--diloco-sync-every", "2"]
    assert read(*long, diloco=diloco) == ("long:1", 2, "e")


def test_a_bad_environment_is_named(tmp_path):
    with pytest.raises(worker.SettingsError, match=r"DILOCO_SYNC_EVERY must be .*'often'"):
        load(tmp_path, environment={"DILOCO_SYNC_EVERY": "often"})


def test_settings_that_do_not_fit_each_other(tmp_path):
    with pytest.raises(worker.SettingsError, match="min_learning_rate must be at most"):
        load(tmp_path, train={"learning_rate": 1e-5})
    settings = load(tmp_path, model={"num_attention_heads": 3})
    with pytest.raises(worker.SettingsError, match="num_attention_heads 3"):
        worker.build_model(settings, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "must hold blocks"),
        ("train: [1\n", "is not YAML"),
        ("train: 5\n", "unknown setting train"),
        ("typo:\n", "unknown setting typo"),
        ("\xff", "is not UTF-8"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(worker.SettingsError, match=message) as error:
        worker.load_settings(path)
    assert "\n" not in str(error.value)


def test_usage_errors_as_a_user_sees_them(tmp_path):
    result = run_worker(cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    told = "worker.py: name a config file, for example: python worker.py default.yaml\n"
    assert result.stderr == told


def test_wrong_settings_are_one_line_and_status_2(tmp_path, main, capsys):
    for arguments, message in [
        (["no.yaml"], "cannot read the config file no.yaml: No such file"),
        ([config_file(tmp_path), "--set", "train.max_step=3"], "did you mean train.max_steps?"),
        ([config_file(tmp_path), "--set", "train.max_steps"], "write it as block.key=value"),
        ([config_file(tmp_path), "--max-steps", "few"], "train.max_steps must be a whole number"),
    ]:
        assert main(*arguments) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1


# --- The built-in stories -------------------------------------------------------------------


def test_stories_are_pure_functions_of_seed_and_number():
    text = "".join(worker.story(1, number) for number in range(50))
    assert text == "".join(worker.story(1, number) for number in range(50))
    assert text != "".join(worker.story(2, number) for number in range(50))
    # The same on every machine: a change of this digest is a change of every run's data.
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "c09eaea3e6f2"


def test_stories_are_different_and_not_shorter_than_assumed():
    texts = [worker.story(1, number) for number in range(100_000)]
    assert len(set(texts)) == 100_000
    assert min(text.count(" ") + 1 for text in texts) >= worker.SHORTEST_STORY_TOKENS


def test_stories_are_clean_text():
    for number in range(2000):
        text = worker.story(1, number)
        assert not re.search(r"[{}|\n]|  |\b[Aa] [aeiou]", text), text
        assert re.fullmatch(r"[A-Z].*[.!?]\"?", text), text


def test_every_choice_of_the_grammar_is_told():
    texts = "\n".join(worker.story(1, number) for number in range(3000))
    for rule, choices in worker.RULES.items():
        if rule not in ("story", "hero"):
            for choice in choices:
                plain = max(
                    re.split(r"\{\w+\}", choice), key=len
                )  # its longest part without a slot
                assert plain in texts, choice


def test_names_and_pronouns_agree():
    girls, boys = (set(worker.RULES[rule]) for rule in ("girl", "boy"))
    names = re.compile(rf"\b({'|'.join(girls | boys)})\b")
    for number in range(2000):
        text = worker.story(1, number)
        (name,) = set(names.findall(text))
        wrong = r"\b(he|his|boy)\b" if name in girls else r"\b(she|her|girl)\b"
        assert not re.search(wrong, text, re.IGNORECASE), text


# --- Sources --------------------------------------------------------------------------------


def story_source(tokens_per_step=66):
    tokenizer = models.ByteTokenizer()
    return worker.StorySource(1, tokenizer.encode, tokenizer.eos_id, tokens_per_step)


def stories_read(source, batches, rows=4, context=256):
    """The whole stories in the next batches, which are one stream of tokens."""
    stream = torch.cat([source.batch(rows, context).flatten() for _ in range(batches)])
    return models.ByteTokenizer().decode(stream.tolist()).split(worker.SEPARATOR)[:-1]


def test_story_shares_do_not_overlap_and_leave_nothing_out():
    read = []
    for rank in range(3):
        source = story_source()
        source.set_shares(tuple(range(rank, 8, 3)), 8, step=0)
        read.append(stories_read(source, 20))
    everything = list(itertools.chain(*read))
    assert len(everything) == len(set(everything)) > 60
    first = {worker.story(1, number) for number in range(40)}
    assert first <= set(everything)


def test_held_out_stories_are_the_same_for_all_and_in_no_share():
    first, second = story_source(), story_source()
    second.set_shares(tuple(range(1, 8, 2)), 8, step=0)
    held = first.held_out(20_000)
    assert torch.equal(held, second.held_out(20_000)) and len(held) == 20_000
    texts = set(models.ByteTokenizer().decode(held.tolist()).split(worker.SEPARATOR))
    assert not texts & set(stories_read(second, 20))
    assert not texts & {worker.story(1, number) for number in range(10_000)}


def test_workers_divide_all_shares_among_them():
    for world in (1, 2, 3, 8):
        own = [worker.own_shares(rank, world, 8) for rank in range(world)]
        assert sorted(itertools.chain(*own)) == list(range(8))
    assert worker.own_shares(1, 3, 8) == (1, 4, 7)
    # With more workers than shares every worker still has one.
    assert [worker.own_shares(rank, 5, 2) for rank in range(5)] == [(0,), (1,), (0,), (1,), (0,)]


def test_new_shares_start_behind_what_others_have_read():
    """A worker reads all shares for 30 steps, then half of them go to a late joiner."""
    tokens = 4 * 257
    old, late = story_source(tokens), story_source(tokens)
    old.set_shares(tuple(range(0, 8, 1)), 8, step=0)
    before = stories_read(old, 30)
    old.set_shares(tuple(range(0, 8, 2)), 8, step=30)
    late.set_shares(tuple(range(1, 8, 2)), 8, step=30)
    after = stories_read(old, 10) + stories_read(late, 10)
    assert not set(before) & set(after[1:]) and len(after) == len(set(after))
    old.set_shares(tuple(range(0, 8, 1)), 8, step=40)  # the late one leaves: its shares come back
    assert not (set(before) | set(after)) & set(stories_read(old, 10)[1:])


@pytest.mark.parametrize("kind", ["stories", "text"])
def test_a_source_goes_on_from_its_state(kind):
    def make():
        if kind == "stories":
            return story_source()
        return worker.TextSource("text:x", torch.arange(20_000).numpy(), 1, 32)

    source, again = make(), make()
    source.set_shares(tuple(range(1, 8, 3)), 8, step=5)
    source.batch(4, 32)
    again.load_state_dict(source.state_dict())
    again.set_shares(tuple(range(1, 8, 3)), 8, step=9)
    for _ in range(5):
        assert torch.equal(source.batch(4, 32), again.batch(4, 32))


def text_source(count=30_000, context=16, seed=1):
    return worker.TextSource("text:x", torch.arange(count).numpy(), seed, context)


def test_text_shares_are_disjoint_and_held_out_is_apart():
    seen = []
    for rank in range(3):
        source = text_source()
        source.set_shares(tuple(range(rank, 8, 3)), 8, step=0)
        batch = torch.cat([source.batch(64, 16) for _ in range(40)])
        assert batch.dtype == torch.int64 and batch.shape == (2560, 17)
        assert ((batch[:, 1:] - batch[:, :-1]) == 1).all()  # windows are whole
        seen.append(set(batch.flatten().tolist()))
    held = set(text_source().held_out(10**9).tolist())
    assert len(held) == worker.HELD_OUT_MIN_TOKENS
    for one, other in itertools.combinations([*seen, held], 2):
        assert not one & other
    assert len(set().union(*seen, held)) > 0.99 * 30_000


def test_text_windows_depend_on_seed_share_and_step():
    def first(seed, share, step):
        source = text_source(seed=seed)
        source.set_shares((share,), 2, step)
        return source.batch(8, 16).tolist()

    draws = [first(1, 0, 0), first(2, 0, 0), first(1, 1, 0), first(1, 0, 100)]
    assert first(1, 0, 0) == draws[0]
    assert all(one != other for one, other in itertools.combinations(draws, 2))


def test_too_small_a_text_is_refused():
    with pytest.raises(worker.RunError, match=r"5000 tokens.*name more text"):
        text_source(5000)
    source = text_source(9000, context=700)
    with pytest.raises(worker.RunError, match="8 shares of more than 700"):
        source.set_shares(tuple(range(0, 8, 2)), 8, step=0)
    source.set_shares(tuple(range(0, 1, 1)), 1, step=0)


def test_text_files_give_documents_and_an_identity_of_their_contents(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(STORIES)
    settings = load(tmp_path, data={"source": [str(tmp_path / "a.txt")]})
    output = worker.Output(tmp_path)
    tokenizer = models.ByteTokenizer()
    one = worker.open_source(settings, None, tokenizer, 257, output)
    settings.data.source = str(tmp_path / "b.txt")
    other = worker.open_source(settings, None, tokenizer, 257, output)
    digest = hashlib.sha256(STORIES).hexdigest()[:12]
    assert one.identity == other.identity == f"text:{digest}"
    text = tokenizer.decode(one.tokens[:60].tolist())
    assert text.startswith(
        f"Once there was a cat.{worker.SEPARATOR}The end.{worker.SEPARATOR}Once there"
    )
    settings.data.source = "tinystory"
    with pytest.raises(worker.RunError, match=r"cannot read tinystory: No such file.*builtin"):
        worker.open_source(settings, None, tokenizer, 257, output)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    settings = load(tmp_path)
    source = worker.open_source(settings, None, models.ByteTokenizer(), 100, None)
    with pytest.raises(worker.RunError, match=r"id 1\d\d, and the model's vocab_size is 100"):
        source.held_out(100)


def test_auto_follows_the_run(tmp_path):
    settings = load(tmp_path, data={"source": "auto", "url": "http://127.0.0.1:1/x.txt"})
    settings.data.cache_dir = str(tmp_path)
    tokenizer, output = models.ByteTokenizer(), worker.Output(tmp_path)

    def follow(wanted):
        return worker.open_source(settings, wanted, tokenizer, 257, output).identity

    assert follow("builtin:seed7") == "builtin:seed7"
    with pytest.raises(worker.RunError, match="the run reads text:abc: name the same text"):
        follow("text:abc")
    with pytest.raises(worker.RunError, match="cannot download"):
        follow("tinystories:abc")


# --- Downloads ------------------------------------------------------------------------------


class Site(http.server.BaseHTTPRequestHandler):
    """A small site: /good.txt, /short.txt (cut off), /page.txt (HTML); all else is missing."""

    def do_GET(self):
        self.server.requests += 1
        pages = {"/good.txt": STORIES, "/short.txt": STORIES, "/page.txt": b"<html>log in</html>"}
        body = pages.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:5000] if self.path == "/short.txt" else body)

    def log_message(self, *_):
        """Keep the test's output readable."""


@pytest.fixture
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.requests = 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def open_tinystories(folder, url, source="tinystories"):
    settings = load(folder, data={"source": source, "url": url, "cache_dir": str(folder / "c")})
    tokenizer, output = models.ByteTokenizer(), worker.Output(folder)
    return worker.open_source(settings, None, tokenizer, 257, output)


def test_a_download_happens_once_and_leaves_one_file(tmp_path, site):
    first = open_tinystories(tmp_path, site.url + "/good.txt")
    second = open_tinystories(tmp_path, site.url + "/good.txt", "auto")
    digest = hashlib.sha256(STORIES).hexdigest()[:12]
    assert first.identity == second.identity == f"tinystories:{digest}"
    assert site.requests == 1
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["good.txt"]
    assert (tmp_path / "c" / "good.txt").read_bytes() == STORIES


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("/short.txt", f"only 5000 of {len(STORIES)} bytes"),
        ("/missing.txt", "404"),
        ("/page.txt", "the page is not a text of stories"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_why(tmp_path, site, page, message, capsys):
    with pytest.raises(worker.RunError, match=message):
        open_tinystories(tmp_path, site.url + page)
    assert list((tmp_path / "c").iterdir()) == []
    source = open_tinystories(tmp_path, site.url + page, "auto")
    assert source.identity == "builtin:seed1"
    warning = capsys.readouterr().err
    assert "WARNING" in warning and "BUILT-IN STORIES" in warning and message in warning


def test_two_workers_download_at_the_same_moment(tmp_path, site):
    open_one = functools.partial(open_tinystories, tmp_path, site.url + "/good.txt")
    found, barrier = [], threading.Barrier(2)

    def download():
        barrier.wait()
        worker.download(site.url + "/good.txt", tmp_path / "c" / "good.txt", None)
        found.append((tmp_path / "c" / "good.txt").read_bytes())

    threads = [threading.Thread(target=download) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [STORIES, STORIES] and site.requests == 2
    assert open_one().identity.startswith("tinystories:") and site.requests == 2


# --- Model and optimizer --------------------------------------------------------------------


def test_learning_rate_by_hand():
    train = worker.TrainSettings(
        max_steps=110, warmup_steps=10, learning_rate=0.01, min_learning_rate=0.002
    )
    rates = {0: 0.001, 4: 0.005, 9: 0.01, 10: 0.01, 35: 0.0088284271, 60: 0.006, 110: 0.002}
    for step, rate in rates.items():
        assert worker.learning_rate(step, train) == pytest.approx(rate, rel=1e-8)
    assert worker.learning_rate(500, train) == 0.002
    flat = worker.TrainSettings(max_steps=5, warmup_steps=5, learning_rate=1.0)
    assert [worker.learning_rate(step, flat) for step in (0, 4)] == [0.2, 1.0]


def test_only_matrices_decay(tmp_path):
    model = worker.build_model(load(tmp_path), {})[0]
    (adamw,) = models.make_optimizers(model, worker.TrainSettings()).values()
    decayed, others = adamw.param_groups
    assert {p.dim() for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.1
    assert {p.dim() for p in others["params"]} == {1} and others["weight_decay"] == 0
    count = len(decayed["params"]) + len(others["params"])
    assert count == len(list(model.parameters()))


def muon_names(model):
    """Names of the parameters that Muon has of a model, and those that AdamW has."""
    found = models.make_optimizers(model, worker.TrainSettings(optimizer="muon"))
    assert list(found) == ["muon", "adamw"]  # the last one's steps count as the worker's
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        [p for group in each.param_groups for p in group["params"]] for each in found.values()
    ]
    return [{names[id(parameter)] for parameter in group} for group in groups]


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_matrices_within_the_model_and_adamw_the_rest(tmp_path, tied):
    model = worker.build_model(load(tmp_path, model={"tie_word_embeddings": tied}), {})[0]
    muon, adamw = muon_names(model)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in muon} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert muon | adamw == dict(model.named_parameters()).keys() and not muon & adamw
    assert ("lm_head.weight" in adamw) is not tied and "model.embed_tokens.weight" in adamw


def test_of_a_model_of_transformers_muon_has_no_embeddings_either():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    muon, adamw = muon_names(transformers.GPT2LMHeadModel(config))
    assert {name.removeprefix("transformer.h.0.") for name in muon} == {
        *("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    }
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= adamw


def test_a_model_that_is_not_ours_comes_from_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0
    )
    files = {"config.json": json.dumps(config.to_dict())}
    settings = load(tmp_path)
    torch.manual_seed(1)
    model, tokenizer, kept = worker.build_model(settings, files)
    assert type(model).__name__ == "GPT2LMHeadModel" and kept == files
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a cat.")])
    want = model.eval()(input_ids=ids, labels=ids).loss
    assert torch.allclose(worker.loss_of(model, ids[:, :-1], ids[:, 1:]), want, atol=1e-6)
    worker.check_fit(model.config, tokenizer, 64)
    with pytest.raises(worker.RunError, match="takes 64 tokens at most"):
        worker.check_fit(model.config, tokenizer, 65)
    model.config.vocab_size = 256
    with pytest.raises(worker.RunError, match="end-of-text token is 256"):
        worker.check_fit(model.config, tokenizer, 64)


def test_a_model_from_the_server_trains_and_resumes(tmp_path):
    """GPT-2 with dropout and the byte tokenizer's files: a resume restores its random numbers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=256
    )
    files = {"config.json": json.dumps(config.to_dict())} | models.tokenizer_files()
    first, second = tmp_path / "first", tmp_path / "second"
    step = first / "step-4"
    torch.manual_seed(1)
    settings = load(tmp_path, train={"max_steps": 8})
    model = worker.build_model(settings, files)[0]
    for folder, checkpoint in ((first, None), (second, step)):
        run = worker.Run(settings, worker.Output(folder), [*filter(None, [checkpoint])])
        if checkpoint is None:  # as if a server had described this model
            run.model, run.files = model.train(), files
            run.optimizers = models.make_optimizers(model, settings.train)
        run.begin()
        run.loop()
        run.finish()
    names = ("model.safetensors", "config.json", "tokenizer.json")
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert models.load(second)[0].config.n_embd == 32


def test_a_bad_config_from_the_server_is_one_clear_line(tmp_path):
    settings = load(tmp_path)
    for text in ("{", "[]", '{"model_type": "no-such-model"}', '{"model_type": "llama"}'):
        with pytest.raises(worker.RunError, match="cannot build the model") as error:
            worker.build_model(settings, {"config.json": text})
        assert "\n" not in str(error.value)


def test_the_same_seed_gives_the_same_first_weights(tmp_path):
    states = []
    for seed in (1, 1, 2):
        settings = load(tmp_path, train={"seed": seed})
        run = worker.Run(settings, worker.Output(tmp_path))
        states.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def same(one, other):
    """Whether two nests of dicts, lists, tensors and values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other and type(one) is type(other)


# --- Runs -----------------------------------------------------------------------------------


def test_a_standalone_run_learns_and_leaves_a_model(tmp_path):
    config = config_file(tmp_path, train={"max_steps": 60, "learning_rate": 1e-2})
    result = run_worker(config, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"step .*  loss (\S+)", result.stdout)]
    final = float(re.search(r"final validation loss (\S+) \(512 tokens\)", result.stdout)[1])
    assert len(losses) == 15 and losses[0] > 5 and losses[-1] < 3.5 and final < 3.5
    folder = tmp_path / "worker-out" / "standalone"
    assert sorted(path.name for path in folder.glob("*step*")) == ["step-56", "step-60"]
    model, tokenizer = models.load(folder)
    ids = torch.tensor([tokenizer.encode(worker.story(1, 0))[:33]])
    assert model(ids[:, :-1], ids[:, 1:]) < 3.5


def test_the_evaluation_touches_neither_data_nor_random_numbers(tmp_path):
    finals = []
    for every in (1, 1000):
        settings = load(tmp_path, output={"eval_every": every, "save_every": 0})
        run = worker.Run(settings, worker.Output(tmp_path / str(every)))
        run.begin()
        run.loop()
        run.finish()
        finals.append((tmp_path / str(every) / "model.safetensors").read_bytes())
    assert finals[0] == finals[1]


def test_a_checkpoint_has_the_random_numbers_of_its_own_gpu_only(monkeypatch):
    """The next machine may have fewer GPUs, and a rank has no business on those of others."""
    saved, taken = {}, []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index]))
    monkeypatch.setattr(
        torch.cuda,
        "set_rng_state",
        lambda state, device: taken.append((*state.tolist(), device.index)),
    )
    monkeypatch.setattr(worker.models, "load", mock.MagicMock())
    run = mock.MagicMock(device=torch.device("cuda", 3), optimizers={})
    run.output.save_checkpoint = lambda *given: saved.update(given[4])
    worker.Run.save(run)
    run.device = torch.device("cuda", 0)
    worker.Run.restore(run, "step-1", saved)
    assert taken == [(3, 0)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_goes_on_to_the_same_bits(tmp_path, start, optimizer):
    config = config_file(tmp_path, train={"grad_accumulation": 2, "optimizer": optimizer})
    whole = start(ROOT / "worker.py", config, "--output-dir", "whole", cwd=tmp_path)
    assert whole.wait() == 0, whole.output
    (tmp_path / "cut").mkdir()
    os.rename(tmp_path / "whole" / "step-8", tmp_path / "cut" / "step-8")
    rest = start(ROOT / "worker.py", config, "--output-dir", "cut", "--resume", cwd=tmp_path)
    assert rest.wait() == 0, rest.output
    assert "resumed from cut/step-8" in rest.output and "step 4/12" not in rest.output
    assert_same_end(tmp_path)
    last = re.compile(r"step 12/12  loss \S+|final.*")
    assert last.findall(rest.output) == last.findall(whole.output)


def test_resume_on_a_text_goes_on_to_the_same_bits(tmp_path, main):
    (tmp_path / "text.txt").write_bytes(STORIES)
    config = config_file(tmp_path, data={"source": "text.txt"})
    assert main(config, "--output-dir", "whole") == 0
    (tmp_path / "cut").mkdir()
    os.rename(tmp_path / "whole" / "step-8", tmp_path / "cut" / "step-8")
    assert main(config, "--output-dir", "cut", "--resume") == 0
    assert_same_end(tmp_path)


def test_a_checkpoint_from_when_adamw_was_the_only_optimizer_is_read(tmp_path, main, capsys):
    config = config_file(tmp_path, train={"max_steps": 4})
    assert main(config) == 0
    path = tmp_path / "worker-out" / "standalone" / "step-4" / "trainer.pt"
    state = torch.load(path)
    torch.save(state | {"optimizer": state["optimizer"]["adamw"]}, path)
    (path.parent / "checksums.json").unlink()
    assert main(config, "--resume", "--max-steps", 6) == 0, capsys.readouterr().err
    assert "steps 4 to 6" in capsys.readouterr().out


def assert_same_end(folder):
    cut, full = folder / "cut", folder / "whole"
    for name in ("model.safetensors", "step-12/model.safetensors"):
        assert (cut / name).read_bytes() == (full / name).read_bytes()
    assert same(*(worker.load_checkpoint(folder / "step-12") for folder in (cut, full)))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    tmp_path, start, main, capsys, number, status
):
    config = config_file(tmp_path, train={"max_steps": 100_000}, output={"save_every": 0})
    process = start(ROOT / "worker.py", config, cwd=tmp_path)
    process.wait_for("^step 8/")
    process.signal(number)
    assert process.wait() == status and "Traceback" not in process.output
    step = int(re.search(r"saved worker-out/standalone/step-(\d+)", process.output)[1])
    assert step >= 8 and "final" not in process.output
    assert main(config, "--resume", "--max-steps", step + 2) == 0
    assert f"steps {step} to {step + 2}" in capsys.readouterr().out


def test_a_resume_that_cannot_be_is_refused(tmp_path, main, capsys):
    config = config_file(tmp_path, train={"max_steps": 4})
    assert main(config, "--resume") == 1
    assert "nothing to resume in worker-out/standalone" in capsys.readouterr().err
    assert main(config) == 0
    assert main(config, "--resume", "--set", "data.seed=2") == 1
    told = capsys.readouterr().err
    assert "was trained on builtin:seed1, and data.source gives builtin:seed2" in told
    assert main(config, "--resume", "--set", "train.optimizer=muon") == 1
    assert "step-4 does not fit: its optimizers are 'adamw'" in capsys.readouterr().err
    (tmp_path / "worker-out" / "standalone" / "step-4" / "trainer.pt").write_bytes(b"PK\3\4 torn")
    assert main(config, "--resume") == 1
    assert "step-4 is damaged" in capsys.readouterr().err


def test_a_new_run_in_an_old_folder_resumes_as_itself(tmp_path):
    output = worker.Output(tmp_path)
    for steps in (12, 4):  # the second is shorter: its step-4 is the newest checkpoint
        run = worker.Run(load(tmp_path, train={"max_steps": steps}), output)
        run.begin()
        run.loop()
        run.finish()
    assert worker.checkpoints(tmp_path)[-1].name == "step-4"


def test_quiet_output_is_warnings_only(tmp_path, capsys):
    output = worker.Output(tmp_path / "out", quiet=True)
    output.line("a line")
    output.save_checkpoint(1, 2, None, {}, {}, None)
    output.save_final(None, {})
    output.warn("a warning")
    told = capsys.readouterr()
    assert told.out == "" and told.err == "WARNING: a warning\n"
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_server_is_refused(tmp_path):
    (tmp_path / "rounds.jsonl").touch()
    settings = load(tmp_path, output={"dir": str(tmp_path)})
    with pytest.raises(worker.RunError, match="is the folder of a server"):
        worker.output_folder(settings, resume=False)


def test_workers_on_one_machine_do_not_share_a_folder(tmp_path):
    folders = set()
    for name in ("a", "b", "..", None):
        settings = load(tmp_path, output={"dir": str(tmp_path / "{worker_id}")})
        settings.diloco.server, settings.diloco.worker_id = "localhost", name
        folders.add(worker.output_folder(settings, resume=False)[0])
        assert settings.diloco.worker_id
    assert len(folders) == 4 and {folder.parent for folder in folders} == {tmp_path}


def test_a_loss_that_is_not_finite_is_said(tmp_path, capsys):
    run = worker.Run(load(tmp_path, train={"max_steps": 4}), worker.Output(tmp_path))
    run.begin()
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("inf"))
    run.loop()
    assert "WARNING: the loss is nan: lower train.learning_rate" in capsys.readouterr().err


# --- With a server --------------------------------------------------------------------------


def test_a_server_that_does_not_answer_is_asked_again_and_then_named(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ConnectionError, match=f"{address}: .*Is the server running there"):
            worker.describe(address, timeout=0.5)
    assert 0.5 < time.monotonic() - began < 5
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"server {address}: " in told and "trying again" in told


def test_a_server_that_refuses_is_not_asked_again(monkeypatch):
    asked = []

    def refuse(server, fields, access):
        asked.append(server)
        raise worker.Refused("version", "another protocol")

    monkeypatch.setattr(worker.protocol, "connect", refuse)
    with pytest.raises(worker.Refused, match="another protocol"):
        worker.describe("host:1")
    assert asked == ["host:1"]


def test_a_run_is_described_before_anybody_has_joined_and_afterwards(tmp_path, serve, toy):
    server = serve("-n", 1)
    assert worker.describe(server.address) == {"files": {}, "source": None}
    toy(server, "ada", steps=100_000, sync_every=5, pause=0.001, source="noise")
    until(lambda: worker.describe(server.address)["source"] == "noise", "ada has joined")


@pytest.fixture
def train(start, tmp_path):
    """train(config, server, worker_id, *options): worker.py as a process of a run."""

    def run(config, server, name, *options):
        place = ["--server", server.address, "--worker-id", name]
        return start(ROOT / "worker.py", config, *place, *options, cwd=tmp_path)

    return run


def test_two_workers_end_with_the_same_model(tmp_path, serve, train):
    config = config_file(tmp_path, diloco={"sync_every": 4})
    host = serve("-n", 2)
    workers = [train(config, host, name) for name in ("a", "b")]
    codes, told = [worker.wait() for worker in workers], [worker.output for worker in workers]
    assert codes == [0, 0], told
    host.wait_for("the model of round .* is in")
    weights = [tmp_path / "worker-out" / name / "model.safetensors" for name in ("a", "b")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    both = models.load(tmp_path / "worker-out" / "a")[0].state_dict()
    assert same(dict(both), dict(models.load(tmp_path / "model")[0].state_dict()))
    assert "final validation loss" in told[0] and "validation loss" not in told[1]


def test_a_resumed_worker_keeps_local_work_or_takes_the_model(tmp_path, serve, train):
    steps = {"max_steps": 100_000}
    config = config_file(tmp_path, train=steps, diloco={"sync_every": 90_000})
    host = serve("-n", 1)
    process = train(config, host, "a")
    process.wait_for("^saved .*step-8$")
    process.kill()  # within the first round: nothing was pushed
    folder = tmp_path / "worker-out" / "a"
    step = worker.load_checkpoint(worker.checkpoints(folder)[-1])["step"]

    def resume(last):
        process = train(config, host, "a", "--resume", "--max-steps", last)
        assert process.wait() == 0, process.output
        return process.output

    told = resume(step + 4)  # the server is still in that round
    assert f"steps {step} to {step + 4}" in told and "moved on" not in told
    shutil.rmtree(folder / f"step-{step + 4}")  # so the next one starts from an old checkpoint
    assert f"the run has moved on: taking its model at step {step + 4}" in resume(step + 8)


# --- Somebody else's script -----------------------------------------------------------------

LOOP = """
import sys, torch
from diloco_callback import DiLoCoWorker
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with DiLoCoWorker(model, optimizer) as worker:
    for _ in range(8):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
print("done", worker.sync_count, worker.num_fragments, sys.argv[1:], flush=True)
sys.exit(7)
"""
TRAINER = """
import sys, types, torch
from diloco_callback import DiLoCoCallback
callback, given = DiLoCoCallback(), [types.SimpleNamespace() for _ in range(3)]
callback.on_train_begin(*given, model=torch.nn.Linear(3, 2))
print("standalone" if callback.worker is None else "joined", flush=True)
"""
LISTENER = """
import signal, sys
heard = []
def note(number, frame):
    heard.append(number)
    print("heard", number, flush=True)
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, note)
print("listening", flush=True)
while signal.SIGTERM not in heard:
    signal.pause()
print("all", *sorted(heard), flush=True)
"""
# A process group of its own, as a shell gives to each command; the process id stays.
IN_A_GROUP = "import os, sys; os.setpgid(0, 0); os.execv(sys.argv[1], sys.argv[1:])"
SHOW = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def test_a_command_joins_and_keeps_its_exit_status(serve, start, script):
    server = serve("-n", 1)
    flags = ["--server", server.address, "--sync-every", 4, "--worker-id", "ada"]
    flags += ["--num-fragments", 2]
    rest = ["--server", "is mine", "--", "--set"]
    command = start("worker.py", *flags, "--", sys.executable, script(LOOP), *rest)
    assert command.wait() == 7, command.output
    assert f"done 3 2 {rest}" in command.lines  # the third sync is the closing one
    server.wait_for(r"ada leaves: done")


def test_the_config_and_the_environment_count_for_a_command(tmp_path):
    config = config_file(tmp_path, diloco={"sync_every": 5, "worker_id": "file"})
    environment = {"DILOCO_SERVER": "env:1", "DILOCO_SYNC_EVERY": "7", "KEPT": "as it is"}
    result = run_worker(config, "--worker-id", "flag", "--", *SHOW, cwd=tmp_path, **environment)
    given = json.loads(result.stdout)
    assert result.stderr == "" and given["KEPT"] == "as it is"
    assert {name: value for name, value in given.items() if name.startswith("DILOCO_")} == {
        "DILOCO_SERVER": "env:1",
        "DILOCO_SYNC_EVERY": "5",
        "DILOCO_WORKER_ID": "flag",
    }


def test_a_command_without_a_server_trains_standalone(tmp_path, script):
    result = run_worker("--", sys.executable, script(TRAINER), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout) == (0, "standalone\n"), result.stderr
    assert "no --server: the command will train standalone" in result.stderr


def test_what_a_dry_run_prints_does_the_same_in_a_shell(tmp_path):
    flags = ["--server", "[::1]:8512", "--sync-every", 5, "--worker-id", "it's $HOME; `a` *"]
    program = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ)]))"
    command = ["--", sys.executable, "-c", program, "two words", "", "$HOME", "--", "a'b"]
    dry = run_worker(*flags, "--dry-run", *command, cwd=tmp_path)
    assert dry.returncode == 0 and dry.stderr == "" and dry.stdout.count("\n") == 1
    pasted = subprocess.run(["sh", "-c", dry.stdout], env=CLEAN, capture_output=True, text=True)
    real = run_worker(*flags, *command, cwd=tmp_path)
    (arguments, given), (wanted, really) = map(json.loads, (pasted.stdout, real.stdout))
    assert arguments == wanted == ["-c", *command[4:]]
    names = {"DILOCO_SERVER", "DILOCO_SYNC_EVERY", "DILOCO_WORKER_ID"}
    assert names == {name for name in really if name.startswith("DILOCO_")}
    assert {name: given.get(name) for name in names} == {name: really[name] for name in names}


def test_a_dry_run_prints_settings_that_are_a_config(tmp_path, main, capsys):
    config = config_file(tmp_path, diloco={"sync_every": 3})
    assert main(config, "--max-steps", 5, "--set", "data.source=[a, b]", "--dry-run") == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    shown = worker.load_settings(tmp_path / "shown.yaml")
    assert shown == load(tmp_path, [("train.max_steps", 5), ("data.source", ["a", "b"])],
                         diloco={"sync_every": 3})  # fmt: skip
    assert not (tmp_path / "worker-out").exists()


def test_signals_reach_a_command_once(start, script):
    """Ctrl-C goes to all of a terminal's foreground processes: worker.py must not pass it on to one
    that has had it."""
    wrapped = ["-c", IN_A_GROUP, sys.executable, ROOT / "worker.py"]
    command = start(*wrapped, "--server", "host", "--", sys.executable, script(LISTENER))
    command.wait_for("^listening")
    group = command.process.pid
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.killpg(group, number)
        command.wait_for(f"^heard {number:d}$")
    assert command.wait() == 0
    assert command.lines[-1] == "all 1 2 15"


def test_a_signal_to_worker_py_alone_ends_the_command(start):
    program = "print('here', flush=True); import time; time.sleep(600)"
    command = start("worker.py", "--server", "host", "--", sys.executable, "-c", program)
    command.wait_for("^here")
    command.signal(signal.SIGTERM)
    assert command.wait(DEADLINE) == -signal.SIGTERM


def test_a_command_finds_sigpipe_as_a_shell_leaves_it(start):
    """Python ignores it, which a command would inherit: `yes | head -1` would then complain."""
    command = start("worker.py", "--server", "host", "--", "sh", "-c", "kill -PIPE $$; echo alive")
    assert command.wait() == -signal.SIGPIPE and command.output == ""


def test_a_command_that_cannot_be_run_is_one_line(tmp_path, start):
    (tmp_path / "plain.txt").write_text("text")
    wrong = {
        "no-such-command": (127, "No such file or directory"),
        "./plain.txt": (126, "Permission denied"),
    }
    arguments = [ROOT / "worker.py", "--server", "host", "--"]
    started = [start(*arguments, command, cwd=tmp_path) for command in wrong]
    for process, (command, (code, reason)) in zip(started, wrong.items(), strict=True):
        assert process.wait() == code
        assert process.output == f"worker.py: cannot run {command}: {reason}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", ""], "name a command after --"),
        (["--"], "name a command after --"),
        (["--sync-every", "0", "--", "true"], "diloco.sync_every must be at least 1, and is 0"),
        (["no.yaml", "--", "true"], "cannot read the config file no.yaml"),
        (["--resume", "--", "true"], "--resume does not reach a command"),
        (["--device", "cpu", "--", "true"], "--device does not reach a command"),
        (["--max-steps", "5", "--", "true"], "--max-steps does not reach a command"),
        (["--output-dir", "x", "--", "true"], "--output-dir does not reach a command"),
        (["--set", "train.seed=2", "--", "true"], "--set does not reach a command"),
        (["mix.yaml", "--", "true"], "diloco.fragment_update does not reach a command"),
    ],
)
def test_what_a_command_would_not_hear_of_is_refused(tmp_path, main, capsys, arguments, message):
    (tmp_path / "mix.yaml").write_text("diloco: {fragment_update: mix}\n")
    # A dry run, as a command that is not refused would run in place of the tests.
    assert main("--dry-run", *arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
