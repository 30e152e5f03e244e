"""A DiLoCo worker: one training run, alone or together with others.

    python worker.py default.yaml                           # standalone: no server needed
    python worker.py --server host:8512 default.yaml        # on each machine that trains
    python worker.py default.yaml --set train.max_steps=100 --set data.source=builtin
    python worker.py default.yaml --resume                  # go on from the newest checkpoint
    python worker.py default.yaml --go-on                   # the same if there is one, else start
    python worker.py default.yaml --dry-run                 # show the settings, do nothing
    torchrun --nproc_per_node=2 worker.py --server host:8512 default.yaml     # several GPUs a machine
    python worker.py --server host:8512 --sync-every 500 -- python train.py --their flags

Notable:
- Every setting has its default below; the YAML file overrides it, then `--set`, then the flags.
- The run's step, not this worker's, sets the learning rate and ends the run.
- Each worker reads its own shares of the data. They are looked up at each step, because workers may
  come and go at any time. The held-out text is in no share and is the same for all workers.
- The built-in stories never end, and they are the same on every machine.
- A checkpoint holds all state: standalone, `--resume` goes on to the same bits.
- Under torchrun all ranks together are one worker, with DistributedDataParallel: in each step every
  rank trains on `batch_size` sequences; rank 0 alone talks to the server, writes and evaluates.
- After `--` comes any command with the callback in it. The command gets the DILOCO_ variables and
  replaces this process, so that signals reach the command and its exit status counts.

Exit status: 0 finished, 1 failed, 2 bad usage or settings, 130 or 143 stopped by a signal. With a
command after `--`: the command's own, or 126 if it cannot be executed and 127 if it is not found.
"""

import argparse
import collections
import contextlib
import difflib
import functools
import hashlib
import http.client
import itertools
import math
import operator
import os
import random
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
import typing
import urllib.request
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

import model as models
import protocol
from diloco_callback import DiLoCoCallback, Ranks, pauses
from protocol import ProtocolError, Refused


class SettingsError(Exception):
    """A setting is wrong; the message names it."""


class RunError(Exception):
    """The run cannot go on; the message says what to do next."""


# --- Settings -------------------------------------------------------------------------------
# Each block of the YAML file is a dataclass, each key one of its fields, with a default and limits.
# A value comes from the command line, else from the file; four keys of the `diloco` block are then
# looked up in the environment if neither has set them. Every value is checked as soon as it is read,
# so that an error names the setting and costs no training time.


def setting(default, **limits):
    """A dataclass field with its limits: least, above, most, choices."""
    return field(default=default, metadata=limits)


@dataclass
class ModelSettings:
    hidden_size: int = setting(128, least=2)
    intermediate_size: int = setting(344, least=1)
    num_hidden_layers: int = setting(4, least=1)
    num_attention_heads: int = setting(4, least=1)
    num_key_value_heads: int | None = setting(None, least=1)  # default: num_attention_heads
    tie_word_embeddings: bool = setting(True)


TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"


@dataclass
class DataSettings:
    source: str | list = field(default="auto")  # auto, tinystories, builtin, or paths of texts
    seed: int = setting(1, least=0)  # seed of the built-in stories, the same for all workers
    cache_dir: str = setting("~/.cache/diloco")  # folder for the downloaded TinyStories
    url: str = setting(TINYSTORIES + "TinyStoriesV2-GPT4-valid.txt")  # address of TinyStories


@dataclass
class TrainSettings:
    max_steps: int = setting(2000, least=1)  # step of the run at which all workers stop
    batch_size: int = setting(2, least=1)  # sequences in a forward pass
    context: int = setting(256, least=2)  # tokens in a sequence
    grad_accumulation: int = setting(1, least=1)  # forward passes in a step
    learning_rate: float = setting(1e-3, above=0)  # highest learning rate, after the warmup
    min_learning_rate: float = setting(1e-4, least=0)  # learning rate at the end of the cosine
    optimizer: str = setting("adamw", choices=("adamw", "muon"))  # see models.make_optimizers
    warmup_steps: int = setting(100, least=0)
    weight_decay: float = setting(0.1, least=0)
    beta1: float = setting(0.9, least=0, most=0.9999)
    beta2: float = setting(0.99, least=0, most=0.99999)
    grad_clip: float = setting(1.0, least=0)  # largest norm of a gradient; 0: no clipping
    precision: str = setting("auto", choices=("auto", "fp32", "bf16"))
    device: str = setting("auto")  # auto, cpu, cuda, cuda:1, mps
    threads: int | None = setting(None, least=1)  # torch's CPU threads; default: torch's choice
    seed: int = setting(1, least=0, most=2**31)  # seed of the first weights and of random windows


@dataclass
class DilocoSettings:
    server: str | None = setting(None)  # host:port; else DILOCO_SERVER; else standalone
    sync_every: int | None = setting(None, least=1)  # steps; else DILOCO_SYNC_EVERY; else 500
    worker_id: str | None = setting(None)  # else DILOCO_WORKER_ID; else host name and process id
    num_fragments: int | None = setting(None, least=1)  # else DILOCO_NUM_FRAGMENTS; else 1
    fragment_sync_delay: int | None = setting(None, least=0)  # steps; else up to the next push
    fragment_update: str = setting("predict", choices=("predict", "rebase", "mix"))
    fragment_update_alpha: float = setting(0.5, least=0, most=1)  # the local share of a mix
    reconnect_timeout: float = setting(600.0, least=0)  # seconds a sync waits for a lost server


@dataclass
class OutputSettings:
    dir: str = setting("worker-out/{worker_id}")  # folder of checkpoints and of the final model
    log_every: int = setting(50, least=1)  # steps between log lines
    eval_every: int = setting(500, least=1)  # least number of steps between evaluations
    eval_tokens: int = setting(16384, least=1)  # tokens of the held-out text in an evaluation
    save_every: int = setting(1000, least=0)  # steps between checkpoints; 0: only at the end
    save_total_limit: int = setting(2, least=1)  # checkpoints that are kept


@dataclass
class Settings:
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    diloco: DilocoSettings = field(default_factory=DilocoSettings)
    output: OutputSettings = field(default_factory=OutputSettings)


# Environment variables that the callback reads too, with the keys of DilocoSettings they set.
ENVIRONMENT = {
    f"DILOCO_{key.upper()}": key for key in ("server", "sync_every", "worker_id", "num_fragments")
}
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    type(None): "null",
}
LIMITS = (
    ("least", "at least", operator.ge),
    ("above", "above", operator.gt),
    ("most", "at most", operator.le),
)


def converted(value, kinds):
    """`value` as one of `kinds`, if it is written in another way; else `value` as it is."""
    if float in kinds and type(value) in (int, str):  # YAML reads 1e-3 as text
        with contextlib.suppress(ValueError):
            return float(value)
    elif int in kinds and type(value) is str and re.fullmatch(r"-?\d+", value):
        return int(value)  # flags and the environment hold text
    elif str in kinds and type(value) in (int, float):  # YAML reads the name 7 as a number
        return str(value)
    return value


def requirement(value, kinds, limits):
    """The words for what `value` must be and is not, or "" if it is fine."""
    if type(value) not in kinds:
        return " or ".join(KINDS[kind] for kind in kinds)
    if value in ("", []) or (type(value) is list and {type(item) for item in value} != {str}):
        return "a name or a list of paths" if list in kinds else "more than nothing"
    if type(value) is float and not math.isfinite(value):
        return "finite"
    if "choices" in limits and value not in limits["choices"]:
        return "one of " + ", ".join(limits["choices"])
    if type(value) in (int, float):
        for limit, words, fits in LIMITS:
            if limit in limits and not fits(value, limits[limit]):
                return f"{words} {limits[limit]}"
    return ""


def checked(name, value, spec):
    """`value` in the type of the dataclass field `spec`. Raises SettingsError if it is of another
    type or not within the field's limits."""
    kinds = typing.get_args(spec.type) or (spec.type,)
    value = converted(value, kinds)
    if wanted := requirement(value, kinds, spec.metadata):
        raise SettingsError(f"{name} must be {wanted}, and is {value!r}")
    return value


def assign(settings, name, value):
    """Set the value of `name`, which is written block.key. Raises SettingsError; for an unknown
    name, the error suggests the nearest valid one."""
    specs = {f"{b.name}.{spec.name}": spec for b in fields(Settings) for spec in fields(b.type)}
    if name not in specs:
        nearest = difflib.get_close_matches(name, specs, n=1, cutoff=0)[0]
        raise SettingsError(f"unknown setting {name}: did you mean {nearest}?")
    block, key = name.split(".")
    setattr(getattr(settings, block), key, checked(name, value, specs[name]))


def read_yaml(path):
    """Yield the (name, value) pairs of a settings file. Raises SettingsError."""
    try:
        blocks = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SettingsError(f"cannot read the config file {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if type(blocks) is not dict:
        raise SettingsError(f"{path} must hold blocks of settings, such as `train:`")
    for block, values in blocks.items():
        if type(values) is dict:
            yield from ((f"{block}.{key}", value) for key, value in values.items())
        elif values is not None or not hasattr(Settings(), str(block)):
            yield str(block), values


def load_settings(path, overrides=(), environment=None):
    """Settings from the YAML file at `path`, if any, then from `overrides`, the (name, value) pairs
    of the command line, then from `environment` where neither sets a value. Raises SettingsError."""
    settings = Settings()
    for name, value in [*(read_yaml(path) if path is not None else ()), *overrides]:
        assign(settings, name, value)
    for variable, key in ENVIRONMENT.items():
        if getattr(settings.diloco, key) is None and (environment or {}).get(variable):
            spec = next(spec for spec in fields(DilocoSettings) if spec.name == key)
            setattr(settings.diloco, key, checked(variable, environment[variable], spec))
    if settings.train.min_learning_rate > settings.train.learning_rate:
        raise SettingsError("train.min_learning_rate must be at most train.learning_rate")
    return settings


# --- Data -----------------------------------------------------------------------------------
# The training data is cut into `num_shares` shares, and a worker reads the ones that are its own:
# every world-th from its rank on. These three numbers follow the members of the run, so for about
# one heartbeat after a change two workers may read the same share, which does no harm. A source has
# an `identity`, a text on which all workers of a run must agree, and held-out tokens for evaluation
# that are in no share.

SEPARATOR = "<|endoftext|>"  # text between the documents of a file
DOWNLOAD_TIMEOUT_SECONDS = 10  # seconds without a byte after which a download fails
DOWNLOAD_CHUNK_BYTES = 1 << 18
ENCODE_CHUNK_CHARS = 1 << 20  # characters encoded at once, because lists of ids are large
# The last 1/20 of a text is held out for evaluation, within these bounds.
HELD_OUT_PART = 20
HELD_OUT_MIN_TOKENS = 4096
HELD_OUT_MAX_TOKENS = 1 << 20


def mix(*numbers):
    """A hash of integers in 63 bits, the same on every machine (splitmix64)."""
    value = 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    return value >> 1


def own_shares(rank, world, num_shares):
    """The numbers (tuple of int) of the shares that worker `rank` of `world` reads. If there are
    more workers than shares, several workers read the same one."""
    return tuple(range(rank, num_shares, world)) or (rank % num_shares,)


class StorySource:
    """The built-in stories. Share s of M consists of the stories s, s + M, s + 2M, and so on."""

    def __init__(self, seed, encode, end, tokens_per_step):
        self.identity = f"builtin:seed{seed}"
        self.seed, self.encode = seed, encode
        self.end = end  # id of the token after each story
        self.stories_per_step = -(-tokens_per_step // SHORTEST_STORY_TOKENS)  # upper bound
        self.division = None  # (own shares, number of all shares)
        self.cursors = {}  # own share -> number of its stories that have been read
        self.rest = []  # tokens of the last story that are in no batch yet

    def held_out(self, count):
        """The first `count` held-out tokens, the same for all workers: int64 [count]. They come from
        another seed, so no training story is one of them."""
        tokens = []
        for number in itertools.count():
            if len(tokens) >= count:
                return torch.tensor(tokens[:count])
            tokens += [*self.encode(story(mix(self.seed), number)), self.end]

    def set_shares(self, own, count, step):
        """Read the shares `own` of `count` from now on. A share that is new to this worker starts
        behind all stories of it that another worker can have read in `step` steps."""
        if (own, count) != self.division:
            self.division = (own, count)
            start = step * self.stories_per_step
            self.cursors = {share: self.cursors.get(share, start) for share in own}

    def batch(self, rows, context):
        """The next tokens of the own shares: int64 [rows, context + 1]."""
        count = rows * (context + 1)
        while len(self.rest) < count:
            share = min(self.cursors, key=self.cursors.get)  # the share read least
            number = self.cursors[share] * self.division[1] + share
            self.cursors[share] += 1
            self.rest += [*self.encode(story(self.seed, number)), self.end]
        taken, self.rest = self.rest[:count], self.rest[count:]
        return torch.tensor(taken).view(rows, context + 1)

    def state_dict(self):
        return {"division": self.division, "cursors": dict(self.cursors), "rest": list(self.rest)}

    def load_state_dict(self, state):
        self.division, self.rest = state["division"], list(state["rest"])
        self.cursors = dict(state["cursors"])


class TextSource:
    """Random windows of a text whose end is held out; the part before it is cut into equal shares.

    `tokens` is an integer array. The windows depend on the seed, and on the first own share and the
    run's step at the start."""

    def __init__(self, identity, tokens, seed, context):
        self.identity, self.seed = identity, seed
        self.context = context  # tokens in a window, less one
        held = min(max(len(tokens) // HELD_OUT_PART, HELD_OUT_MIN_TOKENS), HELD_OUT_MAX_TOKENS)
        held = max(held, context + 1)
        if len(tokens) < 2 * held:
            raise RunError(
                f"the text has {len(tokens)} tokens, and {held} are needed for evaluation alone: "
                "name more text in data.source, or set a smaller train.context"
            )
        self.tokens, self.held = tokens[:-held], tokens[-held:]
        self.division = None  # (own shares, number of all shares)
        self.share_tokens = 0  # tokens in a share
        self.windows = 0  # places in a share where a window can begin
        self.generator = None  # torch.Generator that chooses the windows

    def held_out(self, count):
        """The first `count` held-out tokens, or all if there are fewer: int64 [count]."""
        return torch.from_numpy(self.held[:count].astype(np.int64))

    def set_shares(self, own, count, step):
        """Read the shares `own` of `count` from now on. Raises RunError if a share is too small for
        a window."""
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(mix(self.seed, own[0], step))
        if (own, count) != self.division:
            self.division = (own, count)
            self.share_tokens = len(self.tokens) // count
            self.windows = self.share_tokens - self.context
            if self.windows < 1:
                raise RunError(
                    f"the text is too small: {len(self.tokens)} tokens do not make {count} shares "
                    f"of more than {self.context}; name more text in data.source, or start the "
                    "server with fewer --shares"
                )

    def batch(self, rows, context):
        """Random windows of the own shares: int64 [rows, context + 1]."""
        shares = self.division[0]
        windows = []
        for drawn in torch.randint(len(shares) * self.windows, (rows,), generator=self.generator):
            share, offset = divmod(drawn.item(), self.windows)
            start = shares[share] * self.share_tokens + offset
            windows.append(self.tokens[start : start + context + 1])
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def state_dict(self):
        return {"division": self.division, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator = torch.Generator()
        self.generator.set_state(state["generator"])
        own, count = state["division"]
        self.set_shares(tuple(own), count, step=0)


def download(url, path, log):
    """Fetch a text of documents into the file `path`. The text is written to another file first,
    checked and then renamed, so that several processes may do this at the same time. Raises RunError
    if the text does not come whole."""
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with (
            open(handle, "wb") as file,
            urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as reply,
        ):
            size, done = int(reply.headers.get("Content-Length") or 0), 0
            with protocol.Progress(log, f"downloading {path.name}", size, lambda: done):
                while chunk := reply.read1(DOWNLOAD_CHUNK_BYTES):
                    file.write(chunk)
                    done += len(chunk)
        if size and done != size:
            raise ValueError(f"only {done} of {size} bytes came; try again")
        if SEPARATOR.encode() not in Path(beside).read_bytes():
            raise ValueError(f"the page is not a text of stories separated by {SEPARATOR}")
        with open(beside, "rb") as file:
            protocol.sync(file.fileno())
        os.replace(beside, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
        raise RunError(f"cannot download {url}: {reason}") from None
    finally:
        if beside:
            Path(beside).unlink(missing_ok=True)


def tinystories(settings, output):
    """The path of TinyStories in the cache, downloaded if it is not there yet. Raises RunError."""
    name = settings.url.partition("?")[0].rsplit("/", 1)[-1] or "tinystories.txt"
    path = Path(settings.cache_dir).expanduser() / name
    if not path.is_file():
        output.line(f"downloading {settings.url} to {path}")
        download(settings.url, path, output.log)
    return path


def read_text(paths, encode, end, dtype):
    """(digest, tokens) of text files: their documents, each followed by the token `end`. The digest
    is taken from the contents, because the path of a text differs between machines. Raises
    RunError."""
    digest = hashlib.sha256()
    pieces = [np.empty(0, dtype)]
    for path in paths:
        try:
            raw = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise RunError(
                f"cannot read {path}: {error.strerror}; data.source is auto, tinystories, builtin, "
                "or paths of text files"
            ) from None
        digest.update(raw)
        for document in raw.decode("utf-8", errors="replace").split(SEPARATOR):
            document = document.strip("\n")
            for start in range(0, len(document), ENCODE_CHUNK_CHARS):
                piece = encode(document[start : start + ENCODE_CHUNK_CHARS])
                pieces.append(np.asarray(piece, dtype=dtype))
            if document:
                pieces.append(np.asarray([end], dtype=dtype))
    return digest.hexdigest()[:12], np.concatenate(pieces)


def open_source(settings, wanted, tokenizer, vocab_size, output, ranks=1):
    """The source that data.source names, for a worker with that many ranks. `wanted` is the identity
    of the source that the run reads, or None for a new run; `auto` follows it. Raises RunError."""
    data, train = settings.data, settings.train

    def encode(text):
        ids = tokenizer.encode(text)
        if max(ids, default=0) >= vocab_size:
            raise RunError(
                f"the tokenizer gave the id {max(ids)}, and the model's vocab_size is "
                f"{vocab_size}: the server's model needs the tokenizer that belongs to it"
            )
        return ids

    def stories(seed):
        tokens = train.batch_size * ranks * train.grad_accumulation * (train.context + 1)
        return StorySource(seed, encode, tokenizer.eos_id, tokens)

    def text(paths, kind):
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
        digest, tokens = read_text(paths, encode, tokenizer.eos_id, dtype)
        return TextSource(f"{kind}:{digest}", tokens, train.seed, train.context)

    source = data.source
    if source == "auto" and wanted and not wanted.startswith("tinystories:"):
        if match := re.fullmatch(r"builtin:seed(\d+)", wanted):
            return stories(int(match[1]))
        raise RunError(f"the run reads {wanted}: name the same text in data.source")
    if source == "builtin":
        return stories(data.seed)
    if source not in ("auto", "tinystories"):
        return text([source] if type(source) is str else source, "text")
    try:
        return text([tinystories(data, output)], "tinystories")
    except RunError as error:
        if source == "tinystories" or wanted:
            raise
        output.warn(f"no TinyStories, so this run reads the BUILT-IN STORIES instead ({error})")
        return stories(data.seed)


# The grammar of the built-in stories. A line "rule: choice | choice" is one rule, continued on
# indented lines. For each story one choice of every rule is drawn, and {rule} stands for that choice
# wherever it occurs, so names and things stay the same throughout a story. From `hero`, a story has
# {child} and its pronouns {he}, {his}, {He} and {His}; {name} is a choice of the rule `girl` or `boy`.
GRAMMAR = """
story: {opening} {dream} {plot} {ending}
hero: girl she her She Her | boy he his He His
girl: Mia|Lily|Ruby|Nora|Zoe|Rosa|Clara|Maya|Lucy|Tara|Nina|Molly|Hazel|Daisy|Sara|Greta
boy: Tom|Ben|Max|Leo|Sam|Finn|Jack|Theo|Hugo|Paul|Ravi|Nico|Carl|Luke|Peter|Milo
friend: rabbit|fox|bear|mouse|duck|frog|hedgehog|squirrel|turtle|goat|pony|kitten|puppy|lamb|crow
thing: ball|kite|drum|lamp|doll|bell|hat|scarf|flute|wagon|blanket|cup|mirror|map|spoon|ring|mask
place: forest|river|lake|castle|farm|meadow|harbor|mountain|village|market|garden|bridge|beach
kind: kind|brave|quiet|clever|cheerful|curious|gentle|polite|loyal|patient
mood: friendly|shy|little|hungry|sleepy|funny|grumpy|wise|lonely|young
colour: red|blue|green|yellow|purple|golden|silver|pink|black|white|brown
weather: sunny|rainy|windy|cold|warm|foggy|snowy|stormy
parent: mother|father|grandmother|grandfather|big sister
food: a piece of cake|warm soup|bread and butter|a sweet pie|hot milk|a bowl of berries
stuff: wood|paper|string|glue|cloth|clay|straw|wire|leaves|wool
first: under the bed|behind the door|in the kitchen|on the roof|near the gate|in a box
second: in the tall grass|under a bush|beside the well|behind a rock|in the barn|on the wall
third: between two stones|in a deep hole|in a dark corner|under a big tree|at the end of the road
near: near|behind|not far from|on the way to|next to
wish: sing on a stage|sail around the world|bake bread|paint the sunset|count all the stars
cried: sat down and cried|began to cry|felt very sad|did not know what to do
glad: smiled|laughed|jumped for joy|clapped|began to sing
lesson: a friend is worth more than gold|it is good to ask for help|you must never give up
opening: Once upon a time, there was a {kind} {child} named {name}. {He} lived {near} the {place}
    with {his} {parent}.
    |One {weather} morning, a {kind} {child} went for a walk {near} the {place}. {His} name was
    {name}, and {he} lived there with {his} {parent}.
    |Long ago, {near} the {place}, there lived a {child} named {name}. Everyone said that {he} was
    very {kind}, just like {his} {parent}.
dream: More than anything, {he} wanted to {wish}.
    |"One day I will {wish}," {he} often told {his} {parent}.
    |Every night {he} dreamed that {he} could {wish}.
plot: {name} had a {colour} {thing}. But one {weather} day the {thing} was gone! {name} looked
    {first} and {second}, but it was not there. {He} {cried}. A {mood} {friend} came by and asked,
    "What is wrong, {name}?" "I lost my {colour} {thing}," said {name}. "Do not worry," said the
    {friend}. "Let us look for it together." They looked {third}, and there it was! {name} {glad}
    and gave the {friend} {food}.
    |{name} was playing {first} with a {colour} {thing} when a {mood} {friend} came. "Can I play
    too?" asked the {friend}. "No! The {thing} is mine," said {name}. The {friend} {cried}. Soon
    {name} was lonely, because the {friend} had left. {He} looked for it {second}, and found it
    {third}. "I am sorry," {he} said. "You can have the {thing} first." The {friend} {glad}, and
    they shared {food}.
    |{name} wanted to make a {thing}. {He} found some {stuff} {first} and worked all day, but the
    {thing} broke. {He} {cried}. A {mood} {friend} saw it and said, "Try again, {name}, but use more
    {stuff}. There is some {second}." So they tried again, and in the evening there was a {colour}
    {thing}, and it did not break. The {friend} {glad}, and they ate {food} {third}.
    |One {weather} night, {name} could not sleep. There was a strange sound {first}. {He} held {his}
    {colour} {thing} very tight and looked {second}. Nobody was there. {He} {cried}. Then {he}
    looked {third}. It was only a {mood} {friend}! "I am cold," said the {friend}. {name} gave it
    {food} and let it sleep beside the {thing}. The {friend} {glad}.
ending: From that day on, {name} and the {friend} were best friends.
    |"I am proud of you," said {his} {parent} when {name} told the story.
    |That night {name} dreamed of the {colour} {thing}. | {name} learned that {lesson}.
    |"See you tomorrow, {name}," said the {friend}. And perhaps one day {he} will {wish}.
"""
RULES = {
    rule: [" ".join(choice.split()) for choice in choices.split("|")]
    for rule, choices in re.findall(r"^(\w+):(.*(?:\n +.*)*)", GRAMMAR, re.MULTILINE)
}
SHORTEST_STORY_TOKENS = 100  # fewest words of a story; a tokenizer makes one token or more of each


def story(seed, number):
    """Story `number` of the book `seed`, some 500 to 750 characters; the same text on every machine,
    because Python promises that the numbers of `Random.random` never change."""
    rng = random.Random(mix(seed, number))
    words = {rule: choices[int(rng.random() * len(choices))] for rule, choices in RULES.items()}
    words |= zip(("child", "he", "his", "He", "His"), words["hero"].split(), strict=True)
    words["name"] = words[words["child"]]
    text = words["story"]
    while "{" in text:
        text = text.format_map(words)
    return text


# --- Model and learning rate ----------------------------------------------------------------
# A new run trains our small Llama in the sizes of the settings. If the server's folder describes
# another model, that one is built, by transformers if our own code does not know it. All workers start
# from the same seed, and so from the same weights, until the server's weights replace them.

MAX_PARTS, PARTS = 1024, "layer|block|expert|head|depth|stage"  # of a model, and what names them
# What descriptive files that nobody has checked may lead to.
MALFORMED = OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError
MALFORMED += ArithmeticError, AssertionError, ProtocolError


def build_model(settings, files):
    """(model, tokenizer, files) from a run's descriptive files {name: text}; without a config.json
    among them, from the settings. Weights are random and float32. Raises RunError, SettingsError."""
    if "config.json" not in files:
        context = settings.train.context
        try:
            config = models.Config(max_position_embeddings=context, **vars(settings.model))
        except ValueError as error:
            raise SettingsError(f"model: {error}") from None
        return models.Llama(config), models.ByteTokenizer(), models.descriptive_files(config)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                Path(folder, Path(name).name).write_text(text, encoding="utf-8")
            description = protocol.parse_json(files["config.json"], "config.json")
            check_sizes(description)
            if models.supports(description):
                config = models.Config.from_json(files["config.json"])
                build = functools.partial(models.Llama, config)
            else:
                kind = f"the run's model, a {str(description.get('model_type'))[:80]!r},"
                auto = models.transformers_for(kind)
                config = auto.AutoConfig.from_pretrained(folder, trust_remote_code=False)
                from_config = auto.AutoModelForCausalLM.from_config
                build = functools.partial(from_config, config, trust_remote_code=False)
            with torch.device("meta"):  # without memory
                check_memory(sum(parameter.numel() for parameter in build().parameters()))
            torch.manual_seed(settings.train.seed)
            model = build()
            named = {"tokenizer.json", "vocab.json", "vocab.txt"} & set(files)
            tokenizer = models.find_tokenizer(folder) if named else models.ByteTokenizer()
    except MALFORMED as error:
        reason = protocol.printable(" ".join(str(error).split()))
        raise RunError(f"cannot build the model that the server describes: {reason}") from None
    return model.float(), tokenizer, files


def check_sizes(description):
    """Raise ValueError where a parsed config.json, which a server may have made up, asks for more
    parts than any model has: each takes memory before it has a weight."""
    for name, value in description.items():
        for each in value if type(value) is list else [value]:
            if type(each) is dict:
                check_sizes(each)
            elif type(each) is int:
                most = MAX_PARTS if re.search(PARTS, name) else 1 << 31
                if abs(each) > most:
                    raise ValueError(f"{name[:80]!r} is {each:.3g}, over {most}")


def check_memory(count):
    """Raise ValueError where a model of so many parameters is larger than this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * count > memory:
        needs, has = f"{4 * count / 1e9:.3g} GB as float32", f"{memory / 1e9:.3g} GB of memory"
        raise ValueError(f"its {count:,} parameters take {needs}, and this machine has {has}")


def check_fit(config, tokenizer, context):
    """Raise RunError if the tokenizer or the context is too large for the model."""
    most = getattr(config, "max_position_embeddings", None)
    if most and context > most:
        raise RunError(f"train.context is {context}, and the model takes {most} tokens at most")
    if tokenizer.eos_id is None or tokenizer.eos_id >= config.vocab_size:
        raise RunError(
            f"the id of the tokenizer's end-of-text token is {tokenizer.eos_id}, and the model's "
            f"vocab_size is {config.vocab_size}: the server's model needs a tokenizer that fits it"
        )


def loss_of(model, ids, targets):
    """The mean cross-entropy (float32 scalar) of the next tokens; ids and targets int64 [B, T]."""
    if isinstance(getattr(model, "module", model), models.Llama):
        return model(ids, targets)
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def learning_rate(step, train):
    """The learning rate after `step` steps of the run: a linear warmup, then a cosine to the end."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    span = train.learning_rate - train.min_learning_rate
    return train.min_learning_rate + span * (1 + math.cos(math.pi * min(1.0, done))) / 2


def choose_device(name):
    """The device of the setting `name`; under torchrun with several GPUs, the one of this rank.
    Raises RunError."""
    rank = os.environ.get("LOCAL_RANK")
    if rank and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{rank}"
    elif name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"train.device {name}: {str(error).splitlines()[0]}") from None


# --- Output ---------------------------------------------------------------------------------
# Everything that a worker shows or writes goes through one Output. Checkpoints must survive a crash
# at any moment: `protocol.save_folder` writes each as a whole or not at all. A disk that is full ends
# no training: that is a warning, and the next save tries again. At the end the model stands in the
# output folder itself.

say, complain = protocol.Log("stdout"), protocol.Log("stderr")  # lines that may be lost: see Log


def checkpoints(folder):
    """The paths of the whole checkpoints in a folder, oldest first. Their order is the one in which
    they were written, because a shorter run may have started anew in the folder of a longer one."""
    aside = [p for p in folder.glob(".step-*.old") if not (folder / p.stem[1:]).exists()]
    whole = [p for p in (*folder.glob("step-*"), *aside) if (p / "trainer.pt").is_file()]
    return sorted(whole, key=lambda path: (path / "trainer.pt").stat().st_mtime_ns)


class Output:
    """Log lines and files of one worker. A quiet one shows nothing but warnings and writes no files:
    the ranks above 0 of a torchrun have such a one. Raises RunError."""

    def __init__(self, folder, quiet=False):
        try:
            if not quiet:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write to {folder}: {error.strerror}") from None
        self.folder, self.quiet, self.log = folder, quiet, None if quiet else say

    def line(self, text):
        if not self.quiet:
            say(text)

    def warn(self, text):
        complain(f"WARNING: {text}")

    def save_checkpoint(self, step, limit, model, files, state, save_more):
        """Write the checkpoint step-N and remove all but the newest `limit`. `save_more(folder)` puts
        further files into it. Where that fails, what was there stays, and a warning says so."""
        if self.quiet:
            return
        target = self.folder / f"step-{step}"

        def fill(folder):
            models.save(model, folder, files)
            torch.save(state, os.path.join(folder, "trainer.pt"))
            save_more(folder)

        try:
            protocol.save_folder(target, fill, self.log)
            for old in checkpoints(self.folder)[:-limit]:
                if old != target:
                    protocol.discard(old)
        except Exception as error:
            self.warn(
                f"cannot save {target}: {protocol.reason_of(error)}; the last good checkpoint is "
                "kept, and the next save tries again"
            )
        else:
            self.line(f"saved {target}")

    def save_final(self, model, files):
        """Write the model into the output folder. Raises RunError."""
        if self.quiet:
            return
        try:
            models.save(model, self.folder, files)
        except Exception as error:
            reason = protocol.reason_of(error)
            raise RunError(f"cannot write the final model to {self.folder}: {reason}") from None
        self.line(f"the model is in {self.folder}: python model.py {self.folder}")


def load_checkpoint(folder):
    """The state in a checkpoint, with the model's descriptive files under "files", and under
    "weights" a Llama's tensors. Raises RunError, whatever is wrong with it."""
    try:
        protocol.check_folder(folder)
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        for name, kind in STATE.items():
            if type(state[name]) is not kind:
                raise ProtocolError(f"its {name} is not of the type {kind.__name__}")
        texts = [path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".jinja")]
        files = {path.name: path.read_text("utf-8") for path in texts}
        protocol.load_file(folder / models.WEIGHTS)
        return state | {"files": {n: text for n, text in files.items() if n in protocol.FILE_NAMES}}
    except Exception as error:
        raise RunError(f"{folder} is damaged ({protocol.reason_of(error)})") from None


STATE = {"step": int, "source": str, "data": dict, "optimizer": dict, "rng": torch.Tensor}
STATE |= {"cuda_rng": list, "callback": dict}  # keys of a checkpoint's state, and their types


def newest_checkpoint(found):
    """(folder, state) of the newest of some checkpoints, oldest first, that is sound. Raises RunError
    where none is."""
    faults = []
    for folder in reversed(found):
        try:
            return folder, load_checkpoint(folder)
        except RunError as error:
            faults.append(str(error))
            if folder != found[0]:
                complain(f"WARNING: {error}; trying the one before it")
    raise RunError(f"{'; '.join(faults)}: leave --resume out to start anew")


def output_folder(settings, resume):
    """(folder for this worker's output, checkpoints in it to resume from, oldest first, or none). A
    worker of a run that has no id yet gets one. Raises RunError, also where `resume` is True and there
    is no checkpoint; "may" starts anew then."""
    diloco = settings.diloco
    if diloco.server and not diloco.worker_id:
        diloco.worker_id = f"{socket.gethostname()}-{os.getpid()}"
    name = re.sub(r"[^\w.-]", "_", diloco.worker_id or "standalone").strip(".") or "_"
    folder = Path(settings.output.dir.replace("{worker_id}", name)).expanduser()
    if (folder / "rounds.jsonl").exists() or any(folder.glob("checkpoint-*")):
        raise RunError(f"{folder} is the folder of a server: give another --output-dir")
    found = checkpoints(folder)
    if resume is True and not found:
        raise RunError(
            f"nothing to resume in {folder}: name the run's --worker-id or --output-dir, or leave "
            "--resume out to start anew"
        )
    return folder, found if resume else []


# --- The run --------------------------------------------------------------------------------
# `Run` ties everything together. It asks the server what the run trains, builds model, data and
# optimizer, and lets the callback join; from then on the callback acts after each optimizer step: it
# counts the step, pushes and adopts. Standalone the callback does nothing and `callback.worker` is
# None. Under torchrun every rank has a Run and takes the same steps. Only rank 0 hears from the server,
# so rank 0 decides when to stop and which shares are read, and tells the others (`Ranks.tell`).

PACE_STEPS = 20  # steps over which the live line's speed is taken
SEEN_SECONDS = 1.0  # how often the live line has a new loss, for which a GPU is waited for
SAME_SIGNAL_SECONDS = 1.0  # time in which a second signal to a rank is torchrun's copy of the first


def describe(server, timeout=60.0, access=protocol.PLAIN):
    """What the server at host:port says about its run: {"files": {name: text} that describe its
    model, "source": identity of its data or None}. Tries again with growing pauses.

    Raises ConnectionError if nobody answers within `timeout` seconds, and Refused as soon as the
    server refuses, because trying again would not help."""
    began = time.monotonic()
    for attempt, pause in enumerate(pauses()):
        try:
            conn, _ = protocol.connect(server, {}, access=access)
            with contextlib.closing(conn):
                status = conn.request("status").typed("status")
                status.expect([])
                source = status.field("source", str, None)
                return {"files": fetch_files(conn), "source": source}
        except (OSError, ProtocolError) as error:
            waited = time.monotonic() - began
            if waited > timeout:
                raise ConnectionError(
                    f"server {server}: {error}, for {waited:.0f} s. Is the server running there, "
                    "and does a firewall let you through?"
                ) from error
            if attempt == 0:
                text = f"server {server}: {error}; trying again for up to {timeout:.0f} s"
                complain(f"worker.py: {text}")
        time.sleep(pause)


def fetch_files(conn):
    """{name: text} of the files that describe a server's model. Raises OSError, ProtocolError,
    Refused."""
    reply = conn.request("fetch", {"files": True}).typed("fetch")
    files = {}
    if protocol.payload_bytes(reply.specs) > protocol.MAX_FILES_BYTES:
        raise ProtocolError(f"fetch: the files are over {protocol.MAX_FILES_BYTES:,} bytes")
    for spec in reply.specs:
        is_file = spec.dtype == torch.uint8 and len(spec.shape) == 1
        if spec.name not in protocol.FILE_NAMES or not is_file:
            raise ProtocolError(f"fetch: an unexpected file {protocol.describe(spec)[:80]!r}")
        raw = torch.empty(spec.shape, dtype=torch.uint8)
        conn.read(raw)
        files[spec.name] = bytes(protocol.memory(raw)).decode("utf-8", errors="replace")
    return files


class Run:
    """One worker's training, from its settings to its end."""

    def __init__(self, settings, output, checkpoints=(), access=protocol.PLAIN):
        """Prepare everything but the first step; of the `checkpoints`, oldest first, the newest
        sound one is resumed from. Raises SettingsError, RunError, ConnectionError, Refused."""
        self.settings, self.output, self.ranks = settings, output, Ranks({})
        self.resumed = bool(checkpoints)
        train = settings.train
        if train.threads:
            torch.set_num_threads(train.threads)
        self.device = choose_device(train.device)
        sequences = train.batch_size * self.ranks.count * train.grad_accumulation
        self.step_tokens = sequences * train.context  # tokens that this worker trains on in a step
        self.step = self.before = 0  # step of the run now, and before the last one made here
        self.stop = False  # set by a signal: this step is the last one
        self.interrupted = False  # the loop has ended because of a signal
        self.evaluated = 0  # step of the last evaluation
        self.syncs = 0  # number of adoptions when an evaluation was last considered
        self.losses = []  # loss of each step since the last log line
        self.logged = time.monotonic()  # time of the last log line
        self.first, self.began = 0, self.logged  # step of the run and time when training began here
        self.ends = collections.deque(maxlen=PACE_STEPS)  # times at which the last steps ended
        self.seen, self.loss = 0.0, ""  # when the live line's loss was looked at, and its text

        checkpoint, saved = newest_checkpoint(checkpoints) if checkpoints else (None, {})
        running = describe(settings.diloco.server, access=access) if settings.diloco.server else {}
        files = running.get("files") or saved.get("files") or {}
        tokenizer, vocab_size = self.prepare_model(files)
        wanted = running.get("source") or saved.get("source")
        self.source = open_source(settings, wanted, tokenizer, vocab_size, output, self.ranks.count)
        self.held_out = self.source.held_out(max(settings.output.eval_tokens, train.context) + 1)
        described = {"files": self.files, "source": self.source.identity}
        secret = {"token": access.token or None, "tls": access.tls}
        self.callback = DiLoCoCallback(**vars(settings.diloco), **described, **secret)
        # The three objects that a trainer gives to a callback's hooks.
        self.args = SimpleNamespace(max_steps=train.max_steps, output_dir=str(output.folder))
        self.state = SimpleNamespace(global_step=0, max_steps=train.max_steps)
        self.control = SimpleNamespace(should_training_stop=False)
        if saved:
            self.restore(checkpoint, saved)

    def prepare_model(self, files):
        """Build model and optimizer from descriptive files {name: text}, or if there are none, from
        the settings; return (tokenizer, vocabulary size). Raises RunError, SettingsError."""
        train = self.settings.train
        torch.manual_seed(train.seed)  # the same first weights for all workers
        model, tokenizer, self.files = build_model(self.settings, files)
        check_fit(model.config, tokenizer, train.context)
        self.model = model.to(self.device).train()
        self.optimizers = models.make_optimizers(self.model, train)
        bf16 = train.precision == "bf16"
        if train.precision == "auto":
            bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        return tokenizer, model.config.vocab_size

    def restore(self, folder, saved):
        """Go on from the checkpoint in `folder`, whose state is `saved`. Raises RunError."""
        if saved["source"] != self.source.identity:
            raise RunError(
                f"{folder} was trained on {saved['source']}, and data.source gives "
                f"{self.source.identity}: name the same data"
            )
        try:
            self.model.load_state_dict(models.load(folder)[0].state_dict())
            states = saved["optimizer"]
            if "state" in states:  # as AdamW alone was saved once
                states = {"adamw": states}
            if states.keys() != self.optimizers.keys():
                raise ValueError(f"its optimizers are {' and '.join(map(str, states))[:80]!r}")
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(states[name])
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(f"{folder} does not fit: {' '.join(str(error).split())}") from None
        self.step = saved["step"]
        self.source.load_state_dict(saved["data"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"][0], self.device)
        self.callback.load_state_dict(saved["callback"], folder)
        self.output.line(f"resumed from {folder}")

    def save(self):
        """Write a checkpoint: everything that the next step depends on."""
        cuda = self.device.type == "cuda"
        state = {
            "step": self.step,
            "source": self.source.identity,
            "data": self.source.state_dict(),
            "optimizer": {name: each.state_dict() for name, each in self.optimizers.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(self.device)] if cuda else [],
            "callback": self.callback.state_dict(),
        }
        limit = self.settings.output.save_total_limit
        more = self.callback.save_residual
        self.output.save_checkpoint(self.step, limit, self.model, self.files, state, more)

    @property
    def rank(self):
        """This worker's rank among the members of the run."""
        return self.callback.worker.rank if self.callback.worker else 0

    def take_shares(self):
        """Look up which shares of the data this worker reads. All its ranks must draw from the same
        shares, and a heartbeat may bring news to rank 0 at any moment: so rank 0's view counts."""
        worker = self.callback.worker
        place = [worker.rank, worker.world, worker.num_shares] if worker else [0, 1, 1]
        rank, world, count = self.ranks.tell(place)
        self.source.set_shares(own_shares(rank, world, count), count, self.step)

    def begin(self):
        """Join the run, if there is one, and take its parameters and its step."""
        self.trained = self.model  # module of the forward pass in training
        if self.ranks.count > 1:
            self.trained = torch.nn.parallel.DistributedDataParallel(self.model)
        given = self.args, self.state, self.control, self.model, [*self.optimizers.values()]
        self.callback.on_train_begin(*given)
        worker = self.callback.worker
        if worker:
            self.step = worker.step
            self.syncs = worker.sync_count
            if self.resumed and not worker.kept_local:
                for optimizer in self.optimizers.values():
                    optimizer.state.clear()  # the moments belong to parameters that are gone
                self.output.line(f"the run has moved on: taking its model at step {self.step}")
        if not self.resumed or self.ranks.count > 1:  # a checkpoint has rank 0's generator only
            place = [self.rank]
            if self.ranks.count > 1:
                place += [self.ranks.rank, self.step]
            torch.manual_seed(mix(self.settings.train.seed, *place))  # other dropout everywhere
        self.state.global_step = self.step
        self.first, self.began = self.step, time.monotonic()
        self.take_shares()
        count = sum(p.numel() for p in self.model.parameters())
        place = f"worker {self.rank} of {worker.world}" if worker else "standalone"
        self.output.line(
            f"{place}: {count:,} parameters on {self.device}, data {self.source.identity}, "
            f"steps {self.step} to {self.settings.train.max_steps}"
        )
        if worker and self.step >= self.settings.train.max_steps:
            self.output.line(
                f"the run is over: it is at step {self.step} already, so no step is made here. For a "
                "new run start a server with another folder; to go on raise train.max_steps"
            )

    def next_batch(self):
        """This rank's part of the worker's batch: int64 [batch_size, context + 1]. Every rank draws
        the whole batch from the same source, so all sources stay alike."""
        train, ranks = self.settings.train, self.ranks
        batch = self.source.batch(train.batch_size * ranks.count, train.context)
        return batch[ranks.rank * train.batch_size :][: train.batch_size]

    def train_step(self):
        """Make one optimizer step, after which the callback may put global parameters in place."""
        train, total = self.settings.train, 0.0
        self.take_shares()
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, train)
        for _ in range(train.grad_accumulation):
            batch = self.next_batch().to(self.device)
            with self.autocast:
                loss = loss_of(self.trained, batch[:, :-1], batch[:, 1:]) / train.grad_accumulation
            loss.backward()
            total += loss.detach()
        if train.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip)
        if self.callback.worker:
            self.callback.worker.tokens += self.step_tokens
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        self.ends.append(time.monotonic())
        if protocol.live.status and self.ends[-1] > self.seen + SEEN_SECONDS:
            self.seen, self.loss = self.ends[-1], f"loss {total.item():.4f}"
        joined = self.callback.worker  # which goes on from the step of the furthest one
        self.before, self.step = self.step, max(self.step + 1, joined.step if joined else 0)
        self.state.global_step = self.step

    def live_text(self):
        """The live line: what people ask first. Called in a thread of its own."""
        last, ends, steps = self.settings.train.max_steps, [*self.ends], self.step - self.first
        texts = [f"step {self.step}/{last}"]
        if len(ends) > 1:
            texts.append(f"{protocol.short((len(ends) - 1) / (ends[-1] - ends[0]))} steps/s")
        texts += [self.loss, self.sync_text(self.callback.worker)]
        if steps and self.step < last:
            left = (time.monotonic() - self.began) / steps * (last - self.step)
            texts.append(f"ends in {protocol.span(left)}")
        return "  ".join(filter(None, texts))

    def sync_text(self, worker):
        """How many steps it is to the next sync; or for whom training waits, and how long by now."""
        if worker is None or worker.closed.is_set():
            return ""
        whom, since = worker.replica.waits_for, worker.stalled_since
        text = f"waiting for {whom}" if whom else "syncing"
        if since is not None:
            return f"{text}, {protocol.span(time.monotonic() - since)}"
        is_training = worker.joins and not self.control.should_training_stop
        return f"next sync in {worker.schedule.left} steps" if is_training else text

    def has_passed(self, every):
        """Whether the last step was, or passed, a multiple of `every`."""
        return bool(every) and self.step // every > self.before // every

    def loop(self):
        """Train to the end of the run, or until a signal or the server stops the training."""
        last, output, control = self.settings.train.max_steps, self.settings.output, self.control
        while not control.should_training_stop:
            if self.step < last:
                self.train_step()
            if self.ranks.tell(self.stop) and self.step < last:
                self.interrupted = True
                self.save()  # before the closing push, so that --resume can go on from here
            control.should_training_stop = self.interrupted or self.step >= last
            self.callback.on_step_end(self.args, self.state, control)
            if self.losses and (self.has_passed(output.log_every) or control.should_training_stop):
                self.log()
            if not control.should_training_stop:
                if self.evaluation_due():
                    self.report_evaluation("validation loss")
                if self.has_passed(output.save_every):
                    self.save()

    def finish(self):
        """Evaluate the run's final global model, leave the run, and save the model."""
        if self.rank == 0 and self.ranks.leads and not self.interrupted:
            self.report_evaluation("final validation loss")  # of which the server hears
        self.callback.on_train_end(self.args, self.state, self.control)
        if self.interrupted:
            return
        self.save()
        self.output.save_final(self.model, self.files)

    def log(self):
        """Write a line about the steps since the last one, with the worker's metrics."""
        loss = float(sum(self.losses)) / len(self.losses)
        seconds = time.monotonic() - self.logged
        rate = learning_rate(self.step - 1, self.settings.train)
        speed = len(self.losses) * self.step_tokens / seconds
        logs = {"loss": loss, "learning_rate": rate, "tokens_per_second": speed}
        self.callback.on_log(self.args, self.state, self.control, logs=logs)
        text = f"step {self.step}/{self.settings.train.max_steps}  loss {loss:.4f}  "
        text += f"lr {rate:.2e}  {speed:,.0f} tokens/s"
        self.output.line(text)
        if not math.isfinite(loss):
            self.output.warn(
                f"the loss is {loss}: lower train.learning_rate, or --resume from a checkpoint "
                "before it"
            )
        self.losses, self.logged = [], time.monotonic()

    def evaluation_due(self):
        """Whether to evaluate now: standalone every eval_every steps; in a run at one worker only,
        after the first sync that comes eval_every steps or more after the last evaluation."""
        every, worker = self.settings.output.eval_every, self.callback.worker
        if not self.ranks.leads:
            return False
        if worker is None:
            return self.has_passed(every)
        fresh = worker.sync_count != self.syncs
        self.syncs = worker.sync_count
        return fresh and worker.rank == 0 and self.step >= self.evaluated + every

    def report_evaluation(self, name):
        """Log the loss of the global model. While fragments travel it differs from the local one."""
        worker = self.callback.worker
        with worker.global_model() if worker else contextlib.nullcontext():
            loss, tokens = self.evaluate()
            if worker:
                worker.evaluated(loss)
        self.evaluated = self.step
        self.output.line(f"{name} {loss:.4f} ({tokens} tokens)")

    @torch.no_grad()
    def evaluate(self):
        """(mean loss, number of tokens) on the held-out text. Uses no random number and no training
        data, so an evaluation changes nothing in the training."""
        train = self.settings.train
        total, rows = 0.0, (len(self.held_out) - 1) // train.context
        tokens = self.held_out[: rows * train.context + 1].to(self.device)
        ids, targets = tokens[:-1].view(rows, -1), tokens[1:].view(rows, -1)
        self.model.eval()
        for part in torch.arange(rows).split(train.batch_size):
            with self.autocast:
                total += loss_of(self.model, ids[part], targets[part]).item() * len(part)
        self.model.train()
        return total / rows, rows * train.context


def join_ranks(device):
    """The number of ranks that torchrun has started, after making this process one of them; 1
    without torchrun."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        on_gpu = choose_device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(choose_device(device))
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return count


class Signals:
    """Ctrl-C and SIGTERM: in the loop of a run the first one lets the step end and the worker leave
    in good order; the second one, or any outside the loop, ends the process at once."""

    def __init__(self, output, ranks):
        self.output, self.ranks = output, ranks  # ranks: how many
        self.run = None  # Run whose loop has begun
        self.number = 0  # last signal, 0 before the first one
        self.since = 0.0  # time of the last signal that counted
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        again, self.number = self.number != 0, number
        # A Ctrl-C in a terminal reaches every rank, and torchrun passes it on to them once more.
        if again and self.ranks > 1 and time.monotonic() - self.since < SAME_SIGNAL_SECONDS:
            return
        self.since = time.monotonic()
        if again or self.run is None:
            raise KeyboardInterrupt
        self.run.stop = True
        if self.run.callback.worker:
            self.run.callback.worker.part()
        self.output.line("stopping after this step; once more stops at once")


def run_worker(settings, resume, access):
    """Run a worker to its end and return the exit status. Raises SettingsError, and the errors in
    EXPECTED."""
    ranks = join_ranks(settings.train.device)
    leads = ranks == 1 or dist.get_rank() == 0
    folder, checkpoints = output_folder(settings, resume)
    output = Output(folder, quiet=not leads)
    signals = Signals(output, ranks)
    run, reason = None, "finished"
    if leads:
        protocol.live.open(lambda: run.live_text() if run else "")
    try:
        run = Run(settings, output, checkpoints, access)
        run.begin()
        signals.run = run
        run.loop()
        run.finish()
    except KeyboardInterrupt:
        reason = "interrupted"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        protocol.live.close()
        if run:
            run.callback.close(reason)
        if ranks > 1:
            dist.destroy_process_group()
    return 128 + signals.number if signals.number else 0


# --- A command after -- ---------------------------------------------------------------------
# A script with the callback in it needs nothing from this file but the settings, which the callback
# also reads from the environment. So worker.py sets these variables and becomes the command: no
# process stands in between that would have to pass on signals, output and the exit status.

# Flags that have no effect on a command, with the names under which their values are kept.
OUR_TRAINING = {
    "--set": "set",
    "--resume": "resume",
    "--output-dir": "output.dir",
    "--max-steps": "train.max_steps",
    "--device": "train.device",
}


def variables_for_command(options, settings):
    """{name: text} of the environment variables that tell a callback what `settings` hold. Raises
    SettingsError if a setting was given that no variable can carry."""
    for flag, dest in OUR_TRAINING.items():
        if vars(options)[dest]:
            raise SettingsError(f"{flag} does not reach a command: set it there, after the --")
    usual = vars(DilocoSettings())
    for key, value in vars(settings.diloco).items():
        if key not in ENVIRONMENT.values() and value != usual[key]:
            raise SettingsError(
                f"diloco.{key} does not reach a command: give it to the callback in the script"
            )
    values = {name: getattr(settings.diloco, key) for name, key in ENVIRONMENT.items()}
    return {name: str(value) for name, value in values.items() if value is not None}


def become(command, variables):
    """Run the command in place of this process. Returns only if the command cannot be run, with the
    exit status that a shell would give."""
    if "DILOCO_SERVER" not in variables:
        complain("worker.py: no --server: the command will train standalone")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a child would inherit it
        signal.signal(number, signal.SIG_DFL)
    protocol.flush_output()
    try:
        os.execvpe(command[0], command, {**os.environ, **variables})
    except OSError as error:
        complain(f"worker.py: cannot run {command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError | NotADirectoryError) else 126


def run_command(options, settings, access):
    """Run the command, or in a dry run only show it as a line for a shell, without the token. Returns
    the exit status."""
    variables = {**variables_for_command(options, settings), **access.variables()}
    if options.dry_run:
        variables.pop("DILOCO_TOKEN", None)
        given = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        print(" ".join([*given, shlex.join(options.command)]))
        return 0
    return become(options.command, variables)


# --- The command line -----------------------------------------------------------------------
# A flag for a setting is stored under the setting's dotted name, so `overrides` finds such flags by
# the dot. An expected failure is one line on stderr; only a fault in the program shows a traceback.


def parse_arguments(arguments):
    """The options of the command line. `command` is the list after the first bare `--`, or None."""
    own = list(itertools.takewhile(lambda argument: argument != "--", arguments))
    parser = argparse.ArgumentParser(
        prog="worker.py",
        usage="worker.py [options] config.yaml\n       worker.py [options] [config.yaml] -- command",
        description=__doc__.split("\n")[0],
        epilog="Every setting is explained in default.yaml. After -- comes the command line of a "
        "script with the callback in it, which gets server, sync-every, num-fragments, worker-id, the "
        "token and TLS in its environment.",
        allow_abbrev=False,
    )

    def flag(*names, dest, **options):
        parser.add_argument(*names, dest=dest, help=f"sets {dest}", **options)

    parser.add_argument("config", nargs="?", help="settings, for example default.yaml")
    flag("--server", "--diloco-server", dest="diloco.server", metavar="HOST:PORT")
    flag("--sync-every", "--diloco-sync-every", dest="diloco.sync_every", metavar="STEPS")
    flag("--num-fragments", dest="diloco.num_fragments", metavar="N")
    flag("--worker-id", dest="diloco.worker_id", metavar="NAME")
    flag("--output-dir", dest="output.dir", metavar="DIR")
    flag("--max-steps", dest="train.max_steps", metavar="STEPS")
    flag("--device", dest="train.device", metavar="DEVICE")
    protocol.Access.add_options(parser)
    parser.add_argument("--set", action="append", default=[], metavar="BLOCK.KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    again = "as --resume if there is a checkpoint, else start anew; for jobs that are run again"
    parser.add_argument("--go-on", dest="resume", action="store_const", const="may", help=again)
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and exit")
    command = arguments[len(own) + 1 :] if len(own) < len(arguments) else None
    return parser.parse_args(own, argparse.Namespace(command=command))


def overrides(options):
    """Yield the (name, value) pairs of `--set` and then of the flags, which win because they come
    later. Raises SettingsError."""
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--set {text}: write it as block.key=value")
        try:
            yield name.strip(), yaml.safe_load(value)
        except yaml.YAMLError:
            raise SettingsError(f"--set {text}: the value is not YAML; quote it") from None
    given = vars(options).items()
    yield from ((name, value) for name, value in given if "." in name and value is not None)


def access_of(options):
    """The protocol.Access that the options and the environment give. Raises SettingsError."""
    try:
        return protocol.Access.of_options(options)
    except (OSError, ValueError) as error:
        raise SettingsError(str(error)) from None


# Failures that are no fault of the program: each is reported in one line.
EXPECTED = (RunError, Refused, ConnectionError, ImportError, FloatingPointError)


def main(arguments=None):
    """Do what the command line asks for and return the exit status."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.command is not None and options.command[:1] in ([], [""]):
            raise SettingsError("name a command after --, for example: -- python train.py")
        if options.config is None and not options.command:
            raise SettingsError("name a config file, for example: python worker.py default.yaml")
        settings = load_settings(options.config, overrides(options), os.environ)
        access = access_of(options)
        if options.command:
            return run_command(options, settings, access)
        if options.dry_run:
            print(yaml.safe_dump(asdict(settings), sort_keys=False), end="")
            return 0
        return run_worker(settings, options.resume, access)
    except (SettingsError, *EXPECTED) as error:
        complain(f"worker.py: {error}")
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    status = main()
    protocol.flush_output()
    sys.exit(status)
