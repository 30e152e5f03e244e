"""A DiLoCo worker: one training run, alone or together with others.

    python worker.py default.yaml                           # standalone: no server needed
    python worker.py --server host:8512 default.yaml        # on each machine that trains
    python worker.py default.yaml --set train.max_steps=100 --set data.source=builtin
    python worker.py default.yaml --resume                  # go on from the newest checkpoint
    python worker.py default.yaml --dry-run                 # show the settings, do nothing
    torchrun --nproc_per_node=2 worker.py --server host:8512 default.yaml     # several GPUs a machine
    python worker.py --server host:8512 --sync-every 500 -- python train.py --their flags

Notable:
- Every setting has its default below; the YAML file overrides it, then `--set`, then the flags.
- The run's step, not this worker's, drives the learning rate and ends the run.
- Workers read disjoint shares of the data, looked up before each batch, because the number of
  workers may change at any time. The held-out text is the same for all and in no share.
- The built-in stories are endless, and the same on every machine.
- A checkpoint holds all state: standalone, `--resume` goes on to the same bits.
- Under torchrun the ranks are one worker, with DistributedDataParallel: a step takes `batch_size`
  sequences of each, rank 0 alone speaks, writes and evaluates.
- After `--` comes any command with the callback in it. It gets the DILOCO_ variables and takes this
  process's place, so that signals reach it and its exit status is its own.

Exit status: 0 finished, 1 failed, 2 bad usage or settings, 130 or 143 stopped by a signal; of a
command its own, or 126 where it cannot be executed and 127 where it is not found.
"""

import argparse
import contextlib
import difflib
import hashlib
import http.client
import itertools
import json
import math
import operator
import os
import pickle
import random
import re
import shlex
import shutil
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
from diloco_callback import DiLoCoCallback, Ranks, Refused, describe

SEPARATOR = "<|endoftext|>"  # stands between the documents of a text file
DOWNLOAD_TIMEOUT_SECONDS = 10  # for each wait on the network, not for the whole file
DOWNLOAD_CHUNK_BYTES = 1 << 18
ENCODE_CHUNK_CHARS = 1 << 20  # a document is encoded in pieces: lists of ids are large
HELD_OUT_PART = 20  # the last 1/20 of a text is for evaluation ...
HELD_OUT_MIN_TOKENS, HELD_OUT_MAX_TOKENS = 4096, 1 << 20  # ... within these bounds
SAME_SIGNAL_SECONDS = 1.0  # torchrun sends on a Ctrl-C that its ranks have had from the terminal
PROGRESS_SECONDS = 0.2  # between two drawings of the live line


class SettingsError(Exception):
    """A setting is wrong; the message names it."""


class RunError(Exception):
    """The run cannot go on; the message says what to do next."""


# --- Settings -------------------------------------------------------------------------------


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
    seed: int = setting(1, least=0)  # of the built-in stories: the same for all workers
    cache_dir: str = setting("~/.cache/diloco")
    url: str = setting(TINYSTORIES + "TinyStoriesV2-GPT4-valid.txt")


@dataclass
class TrainSettings:
    max_steps: int = setting(2000, least=1)  # of the run, not of this worker
    batch_size: int = setting(2, least=1)  # sequences in a forward pass
    context: int = setting(256, least=2)  # tokens in a sequence
    grad_accumulation: int = setting(1, least=1)  # forward passes in a step
    learning_rate: float = setting(1e-3, above=0)
    min_learning_rate: float = setting(1e-4, least=0)  # at the end of the cosine
    warmup_steps: int = setting(100, least=0)
    weight_decay: float = setting(0.1, least=0)
    beta1: float = setting(0.9, least=0, most=0.9999)
    beta2: float = setting(0.99, least=0, most=0.99999)
    grad_clip: float = setting(1.0, least=0)  # 0: no clipping
    precision: str = setting("auto", choices=("auto", "fp32", "bf16"))
    device: str = setting("auto")  # auto, cpu, cuda, cuda:1, mps
    threads: int | None = setting(None, least=1)  # of torch on the CPU; default: torch's choice
    seed: int = setting(1, least=0, most=2**31)


@dataclass
class DilocoSettings:
    server: str | None = setting(None)  # host:port; else DILOCO_SERVER; else standalone
    sync_every: int | None = setting(None, least=1)  # else DILOCO_SYNC_EVERY; else 500
    worker_id: str | None = setting(None)  # else DILOCO_WORKER_ID; else host name and process id
    num_fragments: int | None = setting(None, least=1)  # else DILOCO_NUM_FRAGMENTS; else 1
    fragment_sync_delay: int | None = setting(None, least=0)  # steps; else to the next push
    fragment_update: str = setting("predict", choices=("predict", "rebase", "mix"))
    fragment_update_alpha: float = setting(0.5, least=0, most=1)  # the local share of a mix
    reconnect_timeout: float = setting(
        600.0, least=0
    )  # seconds that a sync waits for a lost server


@dataclass
class OutputSettings:
    dir: str = setting("worker-out/{worker_id}")
    log_every: int = setting(50, least=1)  # steps
    eval_every: int = setting(500, least=1)  # steps, at the least
    eval_tokens: int = setting(16384, least=1)  # of the held-out text
    save_every: int = setting(1000, least=0)  # steps; 0: only at the end
    save_total_limit: int = setting(2, least=1)  # checkpoints kept


@dataclass
class Settings:
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    diloco: DilocoSettings = field(default_factory=DilocoSettings)
    output: OutputSettings = field(default_factory=OutputSettings)


ENVIRONMENT = {  # variables that the callback reads, and the keys of DilocoSettings they stand for
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


def checked(name, value, spec):
    """`value` in the type of the dataclass field `spec`, within its limits. SettingsError."""
    kinds = typing.get_args(spec.type) or (spec.type,)
    if float in kinds and type(value) in (int, str):  # YAML reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    elif int in kinds and type(value) is str and re.fullmatch(r"-?\d+", value):
        value = int(value)  # a flag, or the environment
    elif str in kinds and type(value) in (int, float):  # a name such as 7
        value = str(value)
    limits, wrong = spec.metadata, ""
    if type(value) not in kinds:
        wrong = " or ".join(KINDS[kind] for kind in kinds)
    elif value in ("", []) or (type(value) is list and {type(item) for item in value} != {str}):
        wrong = "a name or a list of paths" if list in kinds else "more than nothing"
    elif type(value) is float and not math.isfinite(value):
        wrong = "finite"
    elif "choices" in limits and value not in limits["choices"]:
        wrong = "one of " + ", ".join(limits["choices"])
    elif type(value) in (int, float):
        for limit, words, fits in LIMITS:
            if limit in limits and not fits(value, limits[limit]):
                wrong = f"{words} {limits[limit]}"
    if wrong:
        raise SettingsError(f"{name} must be {wrong}, and is {value!r}")
    return value


def assign(settings, name, value):
    """Set `block.key`; for an unknown name, SettingsError with the nearest valid one."""
    specs = {f"{b.name}.{spec.name}": spec for b in fields(Settings) for spec in fields(b.type)}
    if name not in specs:
        nearest = difflib.get_close_matches(name, specs, n=1, cutoff=0)[0]
        raise SettingsError(f"unknown setting {name}: did you mean {nearest}?")
    block, key = name.split(".")
    setattr(getattr(settings, block), key, checked(name, value, specs[name]))


def read_yaml(path):
    """(name, value) pairs of a settings file."""
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
    """Settings from the YAML file at `path`, if any, then the (name, value) pairs of the command
    line, then the environment for what neither says. SettingsError names whatever is wrong."""
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


# --- The built-in stories -------------------------------------------------------------------
# A story is one choice from each table of LEADING and from PLOTS, told by templates: {slot} is
# filled in and [one|of|these] is drawn. What is chosen from LEADING is said in the story, and the
# words of LEADING stand nowhere else: so stories with different choices are different texts.


def phrases(text):
    return [" ".join(phrase.split()) for phrase in text.split("|")]


LEADING = {  # the first half of the names are girls
    "name": phrases("""Mia|Lily|Anna|Ruby|Nora|Zoe|Ella|Rosa|Clara|Ivy|Maya|Lucy|Emma|Tara|Nina
|Molly|Hazel|Daisy|Sara|Amy|Greta|Olive|Wendy|Juna|Tom|Ben|Max|Leo|Sam|Finn|Jack|Theo|Omar|Hugo
|Paul|Otto|Ravi|Nico|Carl|Emil|Luke|Oscar|Peter|Adam|Felix|Kofi|Milo|Yusuf"""),
    "friend": phrases("""rabbit|fox|owl|bear|mouse|duck|frog|hedgehog|squirrel|turtle|goat|pony
|kitten|puppy|lamb|deer|badger|beaver|sparrow|crow|hen|goose|snail|otter"""),
    "thing": phrases("""ball|kite|drum|lamp|doll|whistle|bell|hat|scarf|flute|wagon|blanket|cup
|mirror|lantern|puppet|map|necklace|umbrella|teapot|ribbon|spoon|bucket|marble|clock|pillow|ring
|brush|crown|shovel|basket|mask"""),
    "place": phrases("""forest|river|lake|castle|farm|meadow|harbor|mountain|village|market|garden
|bridge|mill|orchard|valley|beach|school|church|station|tower|pond|island|park|windmill"""),
    "wish": phrases("""sing on a stage|sail around the world|bake the best bread|learn to dance
|paint the sunset|count all the stars|touch a rainbow|grow the tallest flower|tell the funniest
jokes|run as fast as the wind|swim like a fish|fly above the clouds"""),
}
WORDS = {
    "kind": phrases("""kind|brave|quiet|clever|cheerful|curious|gentle|polite|loyal|patient"""),
    "mood": phrases("""friendly|shy|old|tiny|hungry|sleepy|funny|grumpy|wise|lonely|young
|fat"""),
    "colour": phrases("""red|blue|green|yellow|purple|golden|silver|pink|orange|black|white
|brown"""),
    "paint": phrases("""red|blue|green|yellow|white|brown"""),
    "weather": phrases("""sunny|rainy|windy|cold|warm|foggy|snowy|stormy|cloudy|hot"""),
    "near": phrases("""near|behind|not far from|on the way to|next to"""),
    "parent": phrases("""mother|father|grandmother|grandfather|aunt|uncle|big sister"""),
    "food": phrases("""a piece of cake|warm soup|bread and butter|a sweet pie|hot milk
|cheese"""),
    "food2": phrases("""soup|dinner|noodles|pancakes|rice|potatoes"""),
    "fruit": phrases("""apples|pears|plums|cherries|nuts|berries|cookies|lemons"""),
    "stuff": phrases("""wood|paper|string|glue|cloth|clay|straw|wire|leaves|wool"""),
    "spot": phrases("""under the bed|behind the door|in the tall grass|under a big tree|on the roof
|in a deep hole|near the gate|behind a rock|in the kitchen|at the end of the road|under a bush
|beside the well|on top of the wall|in the old barn|between two stones|in a dark corner"""),
    "lesson": phrases("""sharing makes everything better|a friend is worth more than gold|it is
good to ask for help|you must never give up|telling the truth is always best|being kind costs
nothing|small friends can do big things|it is fine to be afraid"""),
}
OPENINGS = [
    """Once upon a time, there was a {kind} {child} named {name}. {He} lived {near} the {place} with
    {his} {parent}.""",
    "{name} was a {kind} {child} who lived in a {paint} house {near} the {place}.",
    """One {weather} morning, a {kind} {child} [was walking|went for a walk] {near} the {place}.
    {His} name was {name}.""",
    """[Long ago|Many years ago], {near} the {place}, there lived a {child} named {name}. Everyone
    said that {he} was very {kind}.""",
    """In a {paint} house {near} the {place} lived {name} and {his} {parent}. {name} was a {kind}
    {child}.""",
    "There once was a {child} called {name}, who was {kind} and loved the {place}.",
]
DREAMS = [
    "More than anything, {he} wanted to {wish}.",
    '"[One day|When I am big], I will {wish}," {he} [often said|told {his} {parent}].',
    """{His} {parent} asked, "What do you want to do when you are big?" "I want to {wish}!" said
    {name}.""",
    "Every [night|evening], {he} dreamed that {he} could {wish}.",
    "{He} [liked|loved] {food}, but {he} did not know how to {wish}.",
]
ASIDES = [
    "The day was {weather}, [and the birds were singing|and nobody was in a hurry].",
    "{name} had {five} {fruit}. {He} ate {two} of them, so {three} were left.",
    "{He} had {two} {fruit} in one hand and {three} in the other. That made {five}.",
    '{His} {parent} gave {him} {food} [to eat|for the way] and said, "[Be good|Come home soon]."',
    "{He} wore {paint} shoes, and {his} socks were {paint} too.",
    "When it is {weather}, [some children stay inside|it is nice to be outside], but not {name}.",
    "",
]
PLOTS = [
    """{name} had a {colour} {thing}. [It was a gift from {his} {parent}.|{He} took it
    everywhere.|{He} liked it more than all {his} other toys.] But one day the {colour} {thing} was
    gone! {name} looked {spot} and {spot2}, but it was not there. {He} [sat down and cried|began to
    cry|felt very sad]. A {mood} {friend} [heard {him}|came by|saw {him}] and asked, "[Why are you
    sad|What is wrong|Why do you cry], {name}?" "I lost my {thing}," said {name}. "[Do not worry|Do
    not cry]," said the {friend}. "[We can|Let us] look for it together." They looked {spot3}, and
    there [they saw|the {friend} saw|{name} saw|both of them saw] something {colour}. It was the
    {thing}! {name} [hugged|thanked|kissed] the {friend} and [laughed|smiled|jumped for joy].""",
    """{name} [was playing|played] with a {colour} {thing} when a {mood} {friend} came. "[Can I play
    too|May I play with it|Can I try it], please?" asked the {friend}. "No! The {thing} is mine,"
    said {name}. [The {friend} went away with a tear in its eye.|The {friend} looked at the ground
    and went away.] Soon {name} was [bored|lonely|sad], because playing alone was no fun. {He} found
    the {friend} {spot}. "I am sorry," {he} said. "[Let us share the {thing}|We can take turns|You
    can have it first]." The {friend} [smiled|laughed|was not sad any more], and they played [until
    it was dark|all day|until dinner].""",
    """One {weather} night, {name} could not sleep. [Something went bump {spot}.|There was a strange
    sound {spot}.] {He} was [afraid|scared], so {he} held {his} {colour} {thing} very tight. "Who is
    there?" {he} [whispered|asked]. [Nobody answered|There was no answer|It was quiet again]. {name}
    [took a deep breath|was brave] and looked. It was only a {mood} {friend}! "I am
    [cold|lost|hungry]," said the {friend}. "[Come in|You can stay here]," said {name}, and {he}
    gave it {food} and let it sleep beside the {thing}. [Neither of them|Neither {name} nor the
    {friend}] was afraid any more.""",
    """{name} wanted to make a {thing}. {He} [took|got] some {stuff} and worked [all morning|for a
    long time]. But the {thing} [broke|fell apart] at once. "I [can not do it|will never do it]!"
    {he} [shouted|cried]. A {mood} {friend} [was watching|had seen it all]. "Try again," said the
    {friend}, "but [go slowly|use more {stuff}|start with the small parts]. I will help you." So
    they tried again, and then [once more|a third time]. In the evening there was a {colour} {thing}
    [on the table|in front of them], and it did not break. "We did it!" [shouted|said] {name}.""",
    """One {weather} day, {name} heard a small voice {spot}. "Help! Help!" It was a {friend}. It was
    stuck and could not [get out|move]. "[Stay calm|Do not be afraid]," said {name}. {He} pulled,
    but {he} was not strong enough. Then {he} had an idea. {He} ran home and [brought|came back
    with] {his} {colour} {thing}. {name} pushed with the {thing}, [and pushed again|as hard as {he}
    could], until the {friend} was free. "Thank you!" said the {mood} {friend}. "[You saved me|You
    are my hero]. Now I will [always help you|be your friend] too.\"""",
    """{name} saw a {colour} {thing} in a shop. It cost {five} coins, but {he} had only {two}. "[I
    need|I must find] {three} more," {he} said. On the way home {he} met a {mood} {friend} who was
    carrying [heavy bags|a lot of {stuff}]. "[May I help you|Let me help you]," said {name}, and
    they carried everything together. The {friend} gave {him} {three} coins. Now {name} had {five}
    coins! {He} [ran|hurried] back to the shop and [bought|got] the {thing}. [The {friend}|Even the
    {friend}] came to see it.""",
    """A {mood} {friend} had a {colour} {thing}, and {name} was allowed to hold it. "Be careful,"
    said the {friend}. But {name} [fell|slipped] {spot}, and the {thing} broke. {He} hid the pieces
    {spot2}. That night {he} felt [bad|terrible] and could not eat {his} {food2}. "What is wrong?"
    asked {his} {parent}. {name} told the truth. "[Then say that you are sorry|You know what to
    do]," said {his} {parent}. So {name} went to the {friend}. "I broke your {thing}. I am sorry."
    The {friend} was [quiet|sad] for a while. Then it said, "[Thank you for telling me|I am glad
    that you told me]. We can mend it with {stuff}." And they did.""",
    """It was the birthday of a {mood} {friend}. {name} wanted to give it [something|a present] that
    was {colour}. {He} had {five} ideas, but {three} of them were silly, so {two} were left. In the
    end {he} chose a {colour} {thing}. {He} [hid|put] it {spot} and [waited|counted to ten].
    "[Surprise|Happy birthday]!" {he} shouted when the {friend} came. The {friend} looked {spot2}.
    Nothing! It looked {spot3}. Nothing! Then it looked {spot}, and there was the {thing}. "It is
    {colour}, [just as I like it|like my house]!" said the {friend}. They ate {food} [together|and
    sang a song].""",
]
ENDINGS = [
    "From that day on, {name} and the {friend} were [best|good] friends.",
    """"[You were very {kind} today|I am proud of you]," said {his} {parent} when {name} [came
    home|told the story].""",
    "That night {name} [slept well|fell asleep with a smile] and dreamed of the {colour} {thing}.",
    "{name} learned that {lesson}.",
    '"[See you tomorrow|Good night], {name}," said the {friend}. "[See you tomorrow|Good night]!"',
    "And perhaps one day {he} will {wish} with the {friend}. [Who knows?|Why not?|The end.]",
]
NUMBERS = phrases("zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve")
PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "his", "him")}
STORY_COUNT = math.prod(map(len, LEADING.values())) * len(PLOTS)  # 85 million
HELD_OUT_STORIES = 100_000  # the last numbers: for evaluation, never for training
SHORTEST_STORY_TOKENS = 60  # no story has fewer words, and no tokenizer fewer tokens than words


def mix(*numbers):
    """A hash of integers in 63 bits, the same on every machine (splitmix64)."""
    value = 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    return value >> 1


def leading_choices(seed, number):
    """The leading choices of a story: {table: choice}. No two numbers below STORY_COUNT have the
    same, since a Feistel network only permutes them."""
    size = len(LEADING["name"]) * len(LEADING["friend"]) * len(PLOTS)
    high, low = divmod(number, size)
    for turn in range(2):
        low = (low + mix(seed, turn, high)) % size
        high = (high + mix(seed, turn, low)) % (STORY_COUNT // size)
    rest, choices = high * size + low, {}
    for table, options in {"plot": PLOTS, **LEADING}.items():
        rest, index = divmod(rest, len(options))
        choices[table] = options[index]
    return choices


def story(seed, number):
    """Story `number` of the book `seed`: a pure function, some 500 to 900 characters. Only
    `Random.random` is used, whose numbers Python promises never to change."""
    rng = random.Random(mix(seed, number))

    def pick(options):
        return options[int(rng.random() * len(options))]

    slots = {table: pick(options) for table, options in WORDS.items()}
    slots |= leading_choices(seed, number)
    girl = LEADING["name"].index(slots["name"]) < len(LEADING["name"]) // 2
    slots["child"] = "girl" if girl else "boy"
    slots |= zip(("he", "his", "him"), PRONOUNS[slots["child"]], strict=True)
    slots |= {"He": slots["he"].capitalize(), "His": slots["his"].capitalize()}
    spots = sorted(WORDS["spot"], key=lambda _: rng.random())
    slots |= {"spot": spots[0], "spot2": spots[1], "spot3": spots[2]}
    two, three = pick(range(2, 7)), pick(range(2, 7))
    slots |= {"two": NUMBERS[two], "three": NUMBERS[three], "five": NUMBERS[two + three]}
    parts = [pick(OPENINGS), pick(DREAMS), pick(ASIDES), slots["plot"], pick(ENDINGS)]
    text = " ".join(" ".join(parts).split())
    while "[" in text or "{" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda match: pick(match[1].split("|")), text)
        text = re.sub(r"\{(\w+)\}", lambda match: slots[match[1]], text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


# --- Data -----------------------------------------------------------------------------------
# A source has an `identity`, on which all workers of a run must agree, and a `division` of the
# data, (own, count): the numbers of the shares that this worker reads, of so many in all.


class StorySource:
    """The built-in stories; share s of M has the numbers s, s + M, s + 2M, ..."""

    def __init__(self, seed, encode, end, tokens_per_step):
        self.identity = f"builtin:seed{seed}"
        self.seed, self.encode, self.end = seed, encode, end
        self.stories_per_step = -(-tokens_per_step // SHORTEST_STORY_TOKENS)  # at the most
        self.division = None
        self.cursors = {}  # own share -> how many of its stories have been read
        self.rest = []  # tokens of the last story that no batch has taken

    def held_out(self, count):
        """The same `count` tokens for all workers: int64 [count]."""
        tokens, number = [], STORY_COUNT - HELD_OUT_STORIES
        while len(tokens) < count and number < STORY_COUNT:
            tokens += [*self.encode(story(self.seed, number)), self.end]
            number += 1
        return torch.tensor(tokens[:count])

    def set_shares(self, own, count, step):
        """Look up the own shares. One that is new here starts behind all that another worker can
        have read of it in `step` steps."""
        if (own, count) != self.division:
            self.division, behind = (own, count), step * self.stories_per_step
            self.cursors = {share: self.cursors.get(share, behind) for share in own}

    def batch(self, rows, context):
        """The next tokens of the own shares: int64 [rows, context + 1]."""
        shares, count = self.division[1], rows * (context + 1)
        while len(self.rest) < count:
            share = min(self.cursors, key=self.cursors.get)  # the least read
            number = (self.cursors[share] * shares + share) % (STORY_COUNT - HELD_OUT_STORIES)
            self.cursors[share] += 1
            self.rest += [*self.encode(story(self.seed, number)), self.end]
        taken, self.rest = self.rest[:count], self.rest[count:]
        return torch.tensor(taken).view(rows, context + 1)

    def state_dict(self):
        return {"division": self.division, "cursors": dict(self.cursors), "rest": list(self.rest)}

    def load_state_dict(self, state):
        self.division = state["division"]
        self.cursors, self.rest = dict(state["cursors"]), list(state["rest"])


class TextSource:
    """Random windows of a text, which is cut into equal shares before its held-out end.

    `tokens` is an integer array; windows are drawn from (seed, first own share at the start)."""

    def __init__(self, identity, tokens, seed, context):
        self.identity, self.seed, self.context = identity, seed, context
        held = min(max(len(tokens) // HELD_OUT_PART, HELD_OUT_MIN_TOKENS), HELD_OUT_MAX_TOKENS)
        held = max(held, context + 1)
        if len(tokens) < 2 * held:
            raise RunError(
                f"the text has {len(tokens)} tokens, and {held} are needed for evaluation alone: "
                "name more text in data.source, or set a smaller train.context"
            )
        self.tokens, self.held = tokens[:-held], tokens[-held:]
        self.division = self.generator = None

    def held_out(self, count):
        return torch.from_numpy(self.held[:count].astype(np.int64))

    def set_shares(self, own, count, step):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(mix(self.seed, own[0], step))
        if (own, count) != self.division:
            self.division, self.share_tokens = (own, count), len(self.tokens) // count
            self.windows = self.share_tokens - self.context  # in a share, of context + 1 tokens
            if self.windows < 1:
                raise RunError(
                    f"the text is too small: {len(self.tokens)} tokens do not make {count} shares "
                    f"of more than {self.context}; name more text in data.source, or start the "
                    "server with fewer --shares"
                )

    def batch(self, rows, context):
        shares, windows = self.division[0], []
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


def download(url, path, progress):
    """Fetch a text of documents: written beside `path`, checked, then renamed, so that others may
    do the same at the same time. RunError if it cannot be had whole."""
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with (
            open(handle, "wb") as file,
            urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as reply,
        ):
            size, done = int(reply.headers.get("Content-Length") or 0), 0
            while chunk := reply.read(DOWNLOAD_CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                progress(f"{path.name}: {done / 1e6:.1f} of {size / 1e6:.1f} MB")
        if size and done != size:
            raise ValueError(f"only {done} of {size} bytes came; try again")
        if SEPARATOR.encode() not in Path(beside).read_bytes():
            raise ValueError(f"it is no text of stories, which {SEPARATOR} would separate")
        sync(beside)
        os.replace(beside, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
        raise RunError(f"cannot download {url}: {reason}") from None
    finally:
        if beside:
            Path(beside).unlink(missing_ok=True)


def tinystories(settings, output):
    """The path of TinyStories in the cache, where the first run that needs it puts it."""
    name = settings.url.partition("?")[0].rsplit("/", 1)[-1] or "tinystories.txt"
    path = Path(settings.cache_dir).expanduser() / name
    if not path.is_file():
        output.line(f"downloading {settings.url} to {path}")
        download(settings.url, path, output.progress)
    return path


def read_text(paths, encode, end, dtype):
    """(digest, tokens): the documents of text files, each followed by the token `end`. The digest
    is of the contents, since the same text has another path on another machine."""
    digest, pieces = hashlib.sha256(), [np.empty(0, dtype)]
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
    """The source that data.source names, for so many ranks. `wanted` is the identity of the run's source, if there is
    a run already: `auto` follows it. RunError if it cannot be had."""
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


# --- Model and optimizer --------------------------------------------------------------------


def build_model(settings, files):
    """(model, tokenizer, files): of a run's descriptive files {name: text}, or where there is no
    config.json, of the settings. Weights are random, in float32. RunError, SettingsError."""
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
            description = json.loads(files["config.json"])
            if models.supports(description):
                model = models.Llama(models.Config.from_json(files["config.json"]))
            else:
                kind = f"the run's model, a {description.get('model_type')!r},"
                auto = models.transformers_for(kind)
                config = auto.AutoConfig.from_pretrained(folder, trust_remote_code=False)
                model = auto.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            named = {"tokenizer.json", "vocab.json", "vocab.txt"} & set(files)
            tokenizer = models.find_tokenizer(folder) if named else models.ByteTokenizer()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"cannot build the model that the server describes: {reason}") from None
    return model.float(), tokenizer, files


def check_fit(config, tokenizer, context):
    """RunError if the tokenizer or the context is too large for the model."""
    most = getattr(config, "max_position_embeddings", None)
    if most and context > most:
        raise RunError(f"train.context is {context}, and the model takes {most} tokens at most")
    if tokenizer.eos_id is None or tokenizer.eos_id >= config.vocab_size:
        raise RunError(
            f"the id of the tokenizer's end-of-text token is {tokenizer.eos_id}, and the model's "
            f"vocab_size is {config.vocab_size}: the server's model needs a tokenizer that fits it"
        )


def loss_of(model, ids, targets):
    """Mean cross-entropy (float32 scalar) of the next tokens; ids and targets int64 [B, T]."""
    if isinstance(getattr(model, "module", model), models.Llama):
        return model(ids, targets)
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make_optimizer(model, train):
    """AdamW that decays matrices only: to shrink a gain or a bias regularizes nothing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, fused=True)


def learning_rate(step, train):
    """Of the step after `step` steps of the run: a linear warmup, then a cosine to the end."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    span = train.learning_rate - train.min_learning_rate
    return train.min_learning_rate + span * (1 + math.cos(math.pi * min(1.0, done))) / 2


def choose_device(name):
    """The device of a setting; of several GPUs, under torchrun, this rank's."""
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


def use_bf16(precision, device):
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return auto if precision == "auto" else precision == "bf16"


# --- Output: all that is seen or written ----------------------------------------------------


def sync(path):
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checkpoints(folder):
    """The whole checkpoints in a folder, in the order in which they were written: what a run that
    was started anew there has written comes after what an older one left."""
    whole = [path for path in folder.glob("step-*") if (path / "trainer.pt").is_file()]
    return sorted(whole, key=lambda path: (path / "trainer.pt").stat().st_mtime_ns)


class Output:
    """Log lines, the live line and files: the effects that one process of a worker has."""

    def __init__(self, folder):
        self.folder, self.drawn = folder, 0.0
        self.clear = "\r\033[K" if sys.stdout.isatty() else ""  # of the live line

    def line(self, text):
        print(self.clear + text, flush=True)

    def warn(self, text):
        print(f"{self.clear}WARNING: {text}", file=sys.stderr, flush=True)

    def progress(self, text):
        if self.clear and time.monotonic() > self.drawn + PROGRESS_SECONDS:
            self.drawn = time.monotonic()
            print(self.clear + text, end="", flush=True)

    def save_checkpoint(self, step, limit, model, files, state, save_more):
        """Write step-N beside, sync it, rename it, and remove all but the newest `limit`.
        `save_more(folder)` puts further files into it."""
        target, beside = self.folder / f"step-{step}", self.folder / ".step-unfinished"
        for path in (beside, target):  # what a crash, or an older run, left there
            shutil.rmtree(path, ignore_errors=True)
        models.save(model, beside, files)
        torch.save(state, beside / "trainer.pt")
        save_more(beside)
        for path in (*beside.iterdir(), beside):
            sync(path)
        os.replace(beside, target)
        sync(self.folder)
        for old in checkpoints(self.folder)[:-limit]:
            shutil.rmtree(old)
        self.line(f"saved {target}")

    def save_final(self, model, files):
        models.save(model, self.folder, files)
        self.line(f"the model is in {self.folder}: python model.py {self.folder}")


class NoOutput(Output):
    """That of the ranks above 0: warnings."""

    def line(self, text):
        """Nothing."""

    def progress(self, text):
        """Nothing."""

    def save_checkpoint(self, *args):
        """Nothing."""

    def save_final(self, *args):
        """Nothing."""


def load_checkpoint(folder):
    """The state in a checkpoint, with the model's descriptive files as "files". RunError."""
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        texts = [path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".jinja")]
        return state | {"files": {path.name: path.read_text("utf-8") for path in texts}}
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(
            f"{folder} is damaged ({reason}): remove it to resume from the one before it"
        ) from None


def output_folder(settings, resume, make=True):
    """(folder of this worker's output, the checkpoint in it to resume from or None). RunError."""
    diloco = settings.diloco
    if diloco.server and not diloco.worker_id:
        diloco.worker_id = f"{socket.gethostname()}-{os.getpid()}"
    name = re.sub(r"[^\w.-]", "_", diloco.worker_id or "standalone").strip(".") or "_"
    folder = Path(settings.output.dir.replace("{worker_id}", name)).expanduser()
    if (folder / "rounds.jsonl").exists() or any(folder.glob("checkpoint-*")):
        raise RunError(f"{folder} is the folder of a server: give another --output-dir")
    found = checkpoints(folder)
    if resume and not found:
        raise RunError(
            f"nothing to resume in {folder}: name the run's --worker-id or --output-dir, or leave "
            "--resume out to start anew"
        )
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}") from None
    return folder, found[-1] if resume else None


# --- The run --------------------------------------------------------------------------------


class Run:
    """One worker's training, from its settings to its end."""

    def __init__(self, settings, output, checkpoint=None):
        """`checkpoint` is the folder to resume from. RunError, ConnectionError, Refused."""
        self.settings, self.output, self.resumed = settings, output, bool(checkpoint)
        self.ranks = Ranks()
        train, diloco = settings.train, settings.diloco
        if train.threads:
            torch.set_num_threads(train.threads)
        self.device = choose_device(train.device)
        sequences = train.batch_size * self.ranks.count * train.grad_accumulation
        self.step_tokens = sequences * train.context
        self.step = 0  # of the run
        self.stop = False  # set by a signal: stop after this step
        self.interrupted = False  # the loop has done so
        self.evaluated = self.syncs = 0  # the step of the last evaluation, adoptions seen by then
        self.losses, self.logged = [], time.monotonic()  # since the last log line

        saved = load_checkpoint(checkpoint) if checkpoint else {}
        running = (describe(diloco.server) if diloco.server else None) or {}
        torch.manual_seed(train.seed)  # the same first weights for all workers
        files = running.get("files") or saved.get("files") or {}
        model, tokenizer, self.files = build_model(settings, files)
        check_fit(model.config, tokenizer, train.context)
        wanted = running.get("source") or saved.get("source")
        vocab_size = model.config.vocab_size
        self.source = open_source(settings, wanted, tokenizer, vocab_size, output, self.ranks.count)
        self.held_out = self.source.held_out(max(settings.output.eval_tokens, train.context) + 1)
        self.model = model.to(self.device).train()
        self.optimizer = make_optimizer(self.model, train)
        bf16 = use_bf16(train.precision, self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        described = {"files": self.files, "source": self.source.identity}
        self.callback = DiLoCoCallback(**vars(diloco), **described)
        self.args = SimpleNamespace(max_steps=train.max_steps, output_dir=str(output.folder))
        self.state = SimpleNamespace(global_step=0, max_steps=train.max_steps)
        self.control = SimpleNamespace(should_training_stop=False)
        if saved:
            self.restore(checkpoint, saved)

    def restore(self, folder, saved):
        if saved["source"] != self.source.identity:
            raise RunError(
                f"{folder} was trained on {saved['source']}, and data.source gives "
                f"{self.source.identity}: name the same data"
            )
        try:
            self.model.load_state_dict(models.load(folder)[0].state_dict())
            self.optimizer.load_state_dict(saved["optimizer"])
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(f"{folder} does not fit: {' '.join(str(error).split())}") from None
        self.step = saved["step"]
        self.source.load_state_dict(saved["data"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        self.callback.load_state_dict(saved["callback"], folder)
        self.output.line(f"resumed from {folder}")

    def save(self):
        """Write a checkpoint: all that the next step depends on."""
        cuda = self.device.type == "cuda"
        state = {
            "step": self.step,
            "source": self.source.identity,
            "data": self.source.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if cuda else [],
            "callback": self.callback.state_dict(),
        }
        limit = self.settings.output.save_total_limit
        more = self.callback.save_residual
        self.output.save_checkpoint(self.step, limit, self.model, self.files, state, more)

    @property
    def rank(self):
        return self.callback.worker.rank if self.callback.worker else 0

    def take_shares(self):
        worker = self.callback.worker
        own, count = (worker.shares, worker.num_shares) if worker else ((0,), 1)
        if worker and worker.ranks.last:  # what all ranks know, and so draw the same
            own = tuple(worker.ranks.last["shares"])
        if own:  # none, where the server went as it was about to say
            self.source.set_shares(own, count, self.step)

    def begin(self):
        """Join the run, if there is one, and take its parameters and its step."""
        self.trained = self.model
        if self.ranks.count > 1:  # what averages its gradients over them
            self.trained = torch.nn.parallel.DistributedDataParallel(self.model)
        hooked = {"model": self.model, "optimizer": self.optimizer}
        self.callback.on_train_begin(self.args, self.state, self.control, **hooked)
        worker = self.callback.worker
        if worker:
            self.step, self.syncs = worker.step, worker.sync_count
            if self.resumed and not worker.kept_local:
                self.optimizer.state.clear()  # its moments belong to parameters that are gone
                self.output.line(f"the run has moved on: taking its model at step {self.step}")
        if not self.resumed or self.ranks.count > 1:
            place = [self.rank] + [self.ranks.rank, self.step] * (self.ranks.count > 1)
            torch.manual_seed(mix(self.settings.train.seed, *place))  # for dropout
        self.state.global_step = self.step
        self.take_shares()
        count = sum(p.numel() for p in self.model.parameters())
        place = f"worker {self.rank} of {worker.world}" if worker else "standalone"
        self.output.line(
            f"{place}: {count:,} parameters on {self.device}, data {self.source.identity}, "
            f"steps {self.step} to {self.settings.train.max_steps}"
        )

    def next_batch(self):
        """This rank's part of the worker's batch: all draw the same, so that all know what is drawn."""
        train, ranks = self.settings.train, self.ranks
        batch = self.source.batch(train.batch_size * ranks.count, train.context)
        return batch[ranks.rank * train.batch_size :][: train.batch_size]

    def train_step(self):
        """One optimizer step, at whose end the callback may put new global parameters in place."""
        train, total = self.settings.train, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, train)
        for _ in range(train.grad_accumulation):
            self.take_shares()  # members come and go
            batch = self.next_batch().to(self.device)
            with self.autocast:
                loss = loss_of(self.trained, batch[:, :-1], batch[:, 1:]) / train.grad_accumulation
            loss.backward()
            total += loss.detach()
        if train.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip)
        if self.callback.worker:
            self.callback.worker.tokens += self.step_tokens
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        self.step += 1
        self.state.global_step = self.step

    def loop(self):
        """Train to the end of the run, or until a signal or the server says stop."""
        last, output, control = self.settings.train.max_steps, self.settings.output, self.control
        while not control.should_training_stop:
            if self.step < last:
                self.train_step()
            if self.ranks.share({"stop": self.stop})["stop"] and self.step < last:
                self.interrupted = True
                self.save()  # before the closing push, so that --resume can go on from here
            control.should_training_stop = self.interrupted or self.step >= last
            self.callback.on_step_end(self.args, self.state, control)
            if self.losses and (self.step % output.log_every == 0 or control.should_training_stop):
                self.log()
            if not control.should_training_stop:
                if self.evaluation_due():
                    self.report_evaluation("validation loss")
                if output.save_every and self.step % output.save_every == 0:
                    self.save()
            self.output.progress(f"step {self.step}/{last}")

    def finish(self):
        """Leave the run with its final global model, evaluate that, and keep it."""
        rank = self.rank
        self.callback.on_train_end(self.args, self.state, self.control)
        if self.interrupted:
            return
        if rank == 0 and self.ranks.leads:
            self.report_evaluation("final validation loss")
        self.save()
        self.output.save_final(self.model, self.files)

    def log(self):
        """One line on the steps since the last one; the callback adds its metrics."""
        loss, seconds = float(sum(self.losses)) / len(self.losses), time.monotonic() - self.logged
        rate = learning_rate(self.step - 1, self.settings.train)
        speed = len(self.losses) * self.step_tokens / seconds
        logs = {"loss": loss, "learning_rate": rate, "tokens_per_second": speed}
        self.callback.on_log(self.args, self.state, self.control, logs=logs)
        text = f"step {self.step}/{self.settings.train.max_steps}  loss {loss:.4f}  "
        text += f"lr {rate:.2e}  {speed:,.0f} tokens/s"
        if "diloco/sync_count" in logs:
            names = ("sync_count", "last_sync_time", "last_send_mb", "last_recv_mb")
            values = [logs.get(f"diloco/{name}") or 0 for name in names]
            text += "  syncs {:.0f}, last {:.2f} s, {:.2f} MB up, {:.2f} MB down".format(*values)
        self.output.line(text)
        if not math.isfinite(loss):
            self.output.warn(
                f"the loss is {loss}: lower train.learning_rate, or --resume from a checkpoint "
                "before it"
            )
        self.losses, self.logged = [], time.monotonic()

    def evaluation_due(self):
        """Standalone each eval_every steps; in a run after a sync, and then at one worker only."""
        every, worker = self.settings.output.eval_every, self.callback.worker
        if not self.ranks.leads:
            return False
        if worker is None:
            return self.step % every == 0
        fresh, self.syncs = worker.sync_count != self.syncs, worker.sync_count
        return fresh and worker.rank == 0 and self.step >= self.evaluated + every

    def report_evaluation(self, name):
        """Say the loss of the global model, which where fragments travel is not the local one."""
        worker = self.callback.worker
        with worker.global_model() if worker else contextlib.nullcontext():
            loss, tokens = self.evaluate()
        self.evaluated = self.step
        self.output.line(f"{name} {loss:.4f} ({tokens} tokens)")

    @torch.no_grad()
    def evaluate(self):
        """(mean loss, tokens) on the held-out text. Draws no random number and moves no data."""
        train = self.settings.train
        rows, total = (len(self.held_out) - 1) // train.context, 0.0
        tokens = self.held_out[: rows * train.context + 1].to(self.device)
        ids, targets = tokens[:-1].view(rows, -1), tokens[1:].view(rows, -1)
        self.model.eval()
        for part in torch.arange(rows).split(train.batch_size):
            with self.autocast:
                total += loss_of(self.model, ids[part], targets[part]).item() * len(part)
        self.model.train()
        return total / rows, rows * train.context


def join_ranks(device):
    """Make this process one of the ranks that torchrun has started; returns their number, 1 without
    torchrun."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        on_gpu = choose_device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(choose_device(device))
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return count


def run_worker(settings, resume):
    """Run a worker to its end; returns the exit status. Raises SettingsError, and what is
    EXPECTED."""
    ranks = join_ranks(settings.train.device)
    leads = ranks == 1 or dist.get_rank() == 0
    folder, checkpoint = output_folder(settings, resume, leads)
    output = (Output if leads else NoOutput)(folder)
    run, stopped, looping, reason, since = None, 0, False, "finished", 0.0

    def on_signal(number, frame):
        nonlocal stopped, since
        again, stopped = stopped, number
        if again and ranks > 1 and time.monotonic() - since < SAME_SIGNAL_SECONDS:
            return
        since = time.monotonic()
        if again or not looping:
            raise KeyboardInterrupt
        run.stop = True
        if run.callback.worker:
            run.callback.worker.part()
        output.line("stopping after this step; once more stops at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        run = Run(settings, output, checkpoint)
        run.begin()
        looping = True
        run.loop()
        run.finish()
    except KeyboardInterrupt:
        reason = "interrupted"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        if run:
            run.callback.close(reason)
        if ranks > 1:
            dist.destroy_process_group()
    return 128 + stopped if stopped else 0


# --- Somebody else's script -----------------------------------------------------------------

OUR_TRAINING = {  # flags of which a command would not hear, and where their values are kept
    "--set": "set",
    "--resume": "resume",
    "--output-dir": "output.dir",
    "--max-steps": "train.max_steps",
    "--device": "train.device",
}


def variables_for_command(options, settings):
    """{name: text} of the environment that tells a callback what `settings` say. SettingsError
    where something is asked for that it does not read there."""
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


def shell_line(variables, command):
    """What does the same in a shell."""
    given = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*given, shlex.join(command)])


def become(command, variables):
    """Run the command in place of this process, so that nobody stands between it and its signals;
    returns, with an exit status as a shell gives it, only where that cannot be."""
    if "DILOCO_SERVER" not in variables:
        print("worker.py: no --server: the command will train standalone", file=sys.stderr)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and that is inherited
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, {**os.environ, **variables})
    except OSError as error:
        print(f"worker.py: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError | NotADirectoryError) else 126


def run_command(options, settings):
    """What to do with a command; returns the exit status, unless the command takes over."""
    variables = variables_for_command(options, settings)
    if options.dry_run:
        print(shell_line(variables, options.command))
        return 0
    return become(options.command, variables)


# --- The command line -----------------------------------------------------------------------


def parse_arguments(arguments):
    """The command line; what is stored under a dotted name is a setting, and as `command` what
    comes after the first bare `--`, or None."""
    own = list(itertools.takewhile(lambda argument: argument != "--", arguments))
    parser = argparse.ArgumentParser(
        prog="worker.py",
        usage="worker.py [options] config.yaml\n       worker.py [options] [config.yaml] -- command",
        description=__doc__.split("\n")[0],
        epilog="Every setting is explained in default.yaml. After -- comes the command line of a "
        "script with the callback in it, which gets server, sync-every, num-fragments and worker-id "
        "in its environment.",
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
    parser.add_argument("--set", action="append", default=[], metavar="BLOCK.KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and end")
    command = arguments[len(own) + 1 :] if len(own) < len(arguments) else None
    return parser.parse_args(own, argparse.Namespace(command=command))


def overrides(options):
    """(name, value) pairs of `--set` and then of the flags, which count more."""
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


EXPECTED = (RunError, Refused, ConnectionError, ImportError, FloatingPointError)  # one line each


def main(arguments=None):
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.command is not None and options.command[:1] in ([], [""]):
            raise SettingsError("name a command after --, for example: -- python train.py")
        if options.config is None and not options.command:
            raise SettingsError("name a config file, for example: python worker.py default.yaml")
        settings = load_settings(options.config, overrides(options), os.environ)
        if options.command:
            return run_command(options, settings)
        if options.dry_run:
            print(yaml.safe_dump(asdict(settings), sort_keys=False), end="")
            return 0
        return run_worker(settings, options.resume)
    except (SettingsError, *EXPECTED) as error:
        print(f"worker.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    sys.exit(main())
