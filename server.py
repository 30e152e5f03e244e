"""The DiLoCo server: holds the global model, averages what workers send, steps the outer optimizer.

    python server.py -m model -n 2                          # on any machine, no GPU needed
    python server.py -m model -n 2 --spawn default.yaml     # and both workers on this machine
    python server.py -m path/to/hf_model -n 4               # from pretrained weights
    python server.py -m model -n 2 --until-done             # ends when the last worker has left

Notable:
- It knows no architecture: a model is names, shapes and numbers, one flat float32 vector.
- One thread a connection. The one lock is held for bookkeeping only; arithmetic, disk and network
  happen outside it, on slices that are marked busy.
- `round_closes` is the only place that says when a round is over.
- A push is checked while it arrives. The outer step goes through the slice once, in threads of its
  own, and what it has done is sent while it goes on.
- Workers come and go: one that is silent is given up, one that comes back learns what became of its
  pushes, one that is late counts in the round that is open then.
- The same command after a crash goes on from the newest whole checkpoint, and from whatever newer
  slices the workers still hold.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import glob
import itertools
import json
import os
import pickle
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
import zipfile
from dataclasses import dataclass, field

import torch

import protocol
from protocol import CHUNK, CODECS, Buffer, Checksum, ProtocolError, Refused, TensorSpec

HEARTBEAT_SECONDS = 2.0  # how often workers are asked to say that they live
LEAST_SHARES = 8  # of the text: so many workers can join before there is none left to read
FOLDING_THREADS = min(4, os.cpu_count() or 1)  # more would wait for memory
MAX_CONNECTIONS = 1024  # some 50 workers with a dozen connections each, and room for mishaps
LEAVE_SECONDS = 15.0  # how long spawned workers get to end by themselves
FAREWELL_SECONDS = (
    3.0  # how long a server that ends waits for its workers' heartbeats, to tell them
)
KNOWN_WORKERS = 1000  # ids whose index and last push are remembered after they have gone
DEFAULTS = {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True, "momentum_warmup": True}


def log(text):
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} server: {text}\n")  # one write: no mixed lines
    sys.stdout.flush()


# --- State: all of it is guarded by Server.lock, but for the numbers of a busy fragment ------


@dataclass(eq=False)
class Member:
    """A worker that has joined, or waits to."""

    id: str
    session: str
    host: str
    conn: protocol.Connection  # its control connection
    manifest: list  # its tensors, in its own order
    sync_every: int
    num_fragments: int
    source: str
    step: int = 0
    run: str = ""  # that its local work belongs to
    labels: list = field(default_factory=list)  # versions that its local work started from, or None
    folded: list = field(default_factory=list)  # as Fragment.folded, of slices that it can upload
    asked: list = field(default_factory=list)  # fragments that it is to upload
    index: int = -1
    position: int = 0  # steps since its cycle began
    ranks: int = 1  # processes that it consists of
    buffers: list = field(default_factory=list)  # its persistent buffers, as the manifest
    frozen: dict = field(default_factory=dict)  # name -> (spec, fingerprint) of what is not trained
    differs: list = field(default_factory=list)  # frozen tensors that are not those of -m
    wanted: list = field(default_factory=list)  # tensors of the model that it is to upload
    steps_per_second: float = 0.0
    loss: float | None = None
    heard: float = field(default_factory=time.monotonic)
    room: dict = field(default_factory=dict)  # fragment -> Buffer kept for its next push
    shares: set = field(default_factory=set)  # of the text, that it may be reading
    told: bool = False  # that the server ends
    reading: bool = False  # what it cannot send a heartbeat beside: the reply to a join or fetch
    ending: bool = False  # it has made its last step
    closed: set = field(default_factory=set)  # fragments that its last push is in
    # Names this membership. A push that was made before its worker joined again carries another
    # ticket, and is refused however late it comes: the join has settled what became of it.
    ticket: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(eq=False)
class Push:
    """One push of the open round. An empty one has no buffer; a refused one counts as empty."""

    worker: str
    session: str
    index: int
    ticket: str  # of the membership that it was made in
    seq: int
    base: list  # the version, as [origin, number], that it started from
    staleness: int  # rounds of the fragment that closed after that
    step: int
    position: int
    steps: int
    tokens: int
    loss: float | None
    closing: bool
    nbytes: int
    buffer: Buffer | None
    buffers: dict = field(default_factory=dict)  # of the model, changed: name -> tensor
    refused: str = ""
    stale: bool = False  # refused for its age
    arrived: float = 0.0  # when it was there whole
    waiting: bool = True  # a connection waits for the reply
    update: object = None  # the Update that came of its round


@dataclass(eq=False)
class Update:
    """The latest update of a fragment, as it is sent, which begins while it is still being made."""

    base: list  # the version, as [origin, number], that it leads on from
    buffer: Buffer | None  # None: no numbers, the slice did not change
    fields: dict
    unanswered: list  # pushes whose connections wait for this
    buffers: dict  # of the model, changed: name -> tensor
    checksum: torch.Tensor | None = None  # of the slice after adding, when that is done
    line: dict | None = None  # of rounds.jsonl, written when the last reply has gone out
    made: float = 0.0  # when it was done
    bytes_down: int = 0
    readers: int = 0  # replies being sent from `buffer`
    ready: int = 0  # elements that `buffer` holds so far; guarded by `progress`
    progress: threading.Condition = field(default_factory=threading.Condition)

    def advance(self, stop):
        """Elements up to `stop` can be sent."""
        with self.progress:
            self.ready = stop
            self.progress.notify_all()

    def pieces(self, codec, count):
        """The payload in pieces, each as soon as it is there; the checksum comes last."""
        first = 0
        while first < count:
            with self.progress:
                self.progress.wait_for(lambda first=first: self.ready > first)
                stop = self.ready
            span = (protocol.payload_bytes(codec.layout(n)) for n in (first, stop))
            yield self.buffer.raw[slice(*span)]
            first = stop
        with self.progress:
            self.progress.wait_for(lambda: self.checksum is not None)
        yield self.checksum


@dataclass(eq=False)
class Fragment:
    """A slice of the flat vector (protocol.fragment_of) with a version and a round of its own."""

    index: int
    version: int = 0
    origin: str = ""  # the incarnation that made this version
    folded: dict = field(default_factory=dict)  # worker id -> highest sequence number folded
    pushes: dict = field(default_factory=dict)  # worker id -> Push of the open round
    update: Update | None = None
    spare: Buffer | None = None  # for the first update
    busy: bool = False  # being stepped: nobody else may touch its numbers
    readers: int = 0  # those that copy its numbers: nobody may step it

    @property
    def label(self):
        """The version as it is named on the wire: a number means nothing without its origin."""
        return [self.origin, self.version]


class Picture:
    """Flat vectors as they were when a checkpoint began, while steps on them go on. The writer takes
    them piece by piece; a step that comes to a chunk before the writer leaves it a copy.

    A piece is the same chunk of every fragment, which is a run of the flat vectors.
    """

    def __init__(self, vectors, num_fragments):
        self.vectors, self.count = vectors, num_fragments
        self.lock = threading.Lock()  # of the two below
        self.taken = 0  # elements of each fragment that the writer has, or does not want any more
        self.kept = {}  # (fragment, start) -> copies of that chunk of each vector

    def keep(self, k, start, stop):
        """Elements start to stop of fragment k, a chunk, are about to change."""
        with self.lock:
            if start >= self.taken and (k, start) not in self.kept:
                parts = (protocol.fragment_of(v, k, self.count)[start:stop] for v in self.vectors)
                self.kept[k, start] = [part.clone() for part in parts]

    def pieces(self):
        """(start in the flat vectors, [piece of each vector]), in their order."""
        for first in range(0, self.vectors[0].numel(), CHUNK * self.count):
            start = first // self.count
            with self.lock:
                pieces = [v[first : first + CHUNK * self.count].clone() for v in self.vectors]
                for k in range(self.count):
                    for n, part in enumerate(self.kept.pop((k, start), ())):
                        protocol.fragment_of(pieces[n], k, self.count).copy_(part)
                self.taken = start + CHUNK
            yield first, pieces

    def close(self):
        """Nothing more is wanted."""
        with self.lock:
            self.taken, self.kept = self.vectors[0].numel(), {}


@dataclass
class Snapshot:
    """A copy of the parameters at some versions, shared by all who join at those."""

    params: torch.Tensor
    versions: list


def round_closes(members, pushes, min_workers=1, overdue=False):
    """Whether the open round of a fragment is over: every member has pushed, or enough have and
    the others are overdue. Workers that end their run do not wait for more workers to come."""
    ending = all(push.closing for push in pushes.values())
    enough = len(pushes) >= (1 if ending else min_workers)
    return bool(pushes) and enough and (overdue or all(worker in pushes for worker in members))


def mean_of_buffers(now, pushes):
    """The buffers that some workers have changed, {name: CPU tensor as it travels}. `now`: the
    global ones; `pushes`: dicts of those that differ from them, in the order of worker index.

    Floating-point ones become the mean of all, in float64; others are as the first worker has them.
    """
    changed = {}
    for name, old in now.items():
        if any(name in push for push in pushes):
            values = [push.get(name, old) for push in pushes]
            if old.is_floating_point():
                total = sum(value.double() for value in values)
                changed[name] = (total / len(values)).to(old.dtype)
            else:
                changed[name] = values[0]
    return changed


def new_life(after=""):
    """An id for one life of the server. Ids sort by the time that they begin with, past `after`,
    so that of two versions the one from the later life is the newer."""
    begun = max(time.time_ns() // 1_000_000, int(after[:12] or "0", 16) + 1)
    return f"{begun:012x}{secrets.token_hex(4)}"


def label_of(value):
    """A version from outside, [origin, number]. Raises ProtocolError if it is not one."""
    match value:
        case [str(origin), int(number)] if re.fullmatch("[0-9a-f]{20}", origin):
            if 0 <= number < 1 << 53 and type(number) is int:
                return [origin, number]
    raise ProtocolError(f"{str(value)[:80]} is not a version")


def frozen_of(value):
    """What a worker says of its frozen tensors, as {name: (spec, fingerprint)}."""
    for entry in value:
        mark = str(entry[3]) if type(entry) is list and len(entry) == 4 else ""
        if not re.fullmatch("[0-9a-f]{32}", mark):
            raise ProtocolError("a frozen tensor is not [name, dtype, shape, fingerprint]")
    specs = protocol.manifest_from_json([entry[:3] for entry in value], trained=False)
    return {spec.name: (spec, entry[3]) for spec, entry in zip(specs, value, strict=True)}


def folded_of(value):
    """A list of folded pushes from outside, {worker id: highest sequence number}."""
    if type(value) is not dict or len(value) > 2 * KNOWN_WORKERS:
        raise ProtocolError("a list of folded pushes is not one")
    if not all(len(w) <= 256 and type(n) is int and 0 <= n < 1 << 53 for w, n in value.items()):
        raise ProtocolError("a list of folded pushes has an entry that is not worker: number")
    return value


# --- The outer optimizer ----------------------------------------------------------------------


def momentum_at(round, momentum, warmup):
    """The momentum of round r = 0, 1, ...: min(momentum, r / (r + 3)) while it warms up."""
    return min(momentum, round / (round + 3)) if warmup else momentum


def outer_step(
    params, momentum, residual, pushes, up, down, update, lr, mu, nesterov, plain,
    before=lambda start, stop: None, progress=lambda stop: None, run=map,
):  # fmt: skip
    """Fold encoded pushes in their order, step `params` in place and encode the update.

    `params`, `momentum`, `residual`: float32 slices of one length (`residual` is None without error
    feedback). `pushes`: lists of tensors encoded with `up`. `update`: tensors of `down`, which are
    filled. SGD with Nesterov momentum as torch.optim.SGD defines it, the pseudo-gradient in the
    gradient's place:

        v = mu * v + g;  d = g + mu * v if nesterov else v;  update = -lr * d

    `plain` takes the mean as it is (lr 1, momentum untouched). What the codec rounds off is kept
    in `residual` and added next time. `run` is `map`, or that of a pool of threads: parts of the
    slice are independent of each other. `before(start, stop)` is called before a chunk changes, and
    `progress(stop)`, in order, when the elements up to there are done. Returns (checksum tensor, norm of the mean).
    """

    def fold(chunk):
        start, stop = chunk
        before(start, stop)
        part = params[start:stop]
        mean = protocol.room("mean", params, stop - start)
        up.decode(pushes[0], start, mean)
        for push in pushes[1:]:
            up.add(push, start, mean)
        mean.div_(len(pushes))
        square = mean.dot(mean).item()
        if plain:
            delta = mean.neg_()
        else:
            velocity = momentum[start:stop].mul_(mu).add_(mean)
            delta = mean.add_(velocity, alpha=mu) if nesterov else mean.copy_(velocity)
            delta.mul_(-lr)
        if residual is not None:
            delta.add_(residual[start:stop])
        down.encode(delta, update, start)
        if residual is not None:
            down.subtract(delta, update, start, residual[start:stop])
        down.add(update, start, part)
        return Checksum.sum_of(part.contiguous()), square, stop

    checksum, squares = Checksum(), 0.0
    for total, square, stop in run(fold, protocol.chunks(params.numel())):
        checksum.sums.append(total)
        squares += square
        progress(stop)
    return checksum.digest(), squares**0.5


# --- Where the model comes from, and where it goes --------------------------------------------


def is_ours(path):
    """Whether this program wrote the safetensors file at `path`, all of which may not be there."""
    try:
        with open(path, "rb") as file:
            return protocol.read_file_header(file, whole=False)[0].get("program") == "diloco"
    except (OSError, ProtocolError):
        return False


def checkpoints(folder):
    """[(round, path)] of this program's checkpoints in a folder, newest first."""
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), "checkpoint-*")):
        number = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(path))
        if number and is_ours(os.path.join(path, "outer.safetensors")):
            found.append((int(number[1]), path))
    return sorted(found, reverse=True)


def discard(checkpoint):
    """Remove a checkpoint. It loses its name first: one that a kill leaves half removed is none."""
    old = os.path.join(os.path.dirname(checkpoint), ".tmp-checkpoint-old")
    os.rename(checkpoint, old)
    shutil.rmtree(old, ignore_errors=True)


def foreign_weights(folder):
    """Weight files in a folder, or in its checkpoint folders, that this program did not write."""
    patterns = ("*.safetensors", "*.bin", "checkpoint-*/*.safetensors", "checkpoint-*/*.bin")
    paths = [p for g in patterns for p in glob.glob(os.path.join(glob.escape(folder), g))]
    return [path for path in paths if not is_ours(path)]


def read_descriptive_files(folder):
    """{name: bytes} of the descriptive files (protocol.FILE_NAMES) in a folder."""
    files = {}
    for name in protocol.FILE_NAMES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                files[name] = file.read(protocol.MAX_FILES_BYTES + 1)
    if sum(map(len, files.values())) > protocol.MAX_FILES_BYTES:
        raise SystemExit(f"{folder}: its descriptive files are over {protocol.MAX_FILES_BYTES:,} B")
    return files


def load_weights(path):
    """{name: tensor} of a file, or of a folder in the Hugging Face layout: one safetensors file,
    shards with an index, or `pytorch_model.bin` (plain tensors only). Files are mapped, not read.

    Raises SystemExit with one line where they cannot be used.
    """
    paths = [path] if os.path.isfile(path) else []
    for name in () if paths else ("model.safetensors", "pytorch_model.bin"):
        file = os.path.join(path, name)
        if os.path.isfile(file + ".index.json"):
            try:
                with open(file + ".index.json", encoding="utf-8") as index:
                    shards = sorted(set(json.load(index)["weight_map"].values()))
                if any(os.path.basename(s) != s or s in ("", "..") for s in shards):
                    raise ValueError("it names files outside its folder")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise SystemExit(f"cannot use {file}.index.json: {error!r}") from None
            paths = [os.path.join(path, shard) for shard in shards]
        elif os.path.isfile(file):
            paths = [file]
        if paths:
            break
    paths = paths or sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
    if not paths:
        raise SystemExit(f"{path} has no weights of its own; name one of {foreign_weights(path)}")
    weights = {}
    for file in paths:
        try:
            if file.endswith(".bin"):
                mapped = zipfile.is_zipfile(file)  # files by a torch before 1.6 are not
                weights |= torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            else:
                weights |= protocol.load_file(file)[1]
        except (OSError, ProtocolError, RuntimeError, pickle.UnpicklingError) as error:
            raise SystemExit(f"cannot use the weights in {file}: {error}") from None
    return {name: t for name, t in weights.items() if isinstance(t, torch.Tensor)}


def matched(weights, names):
    """{name: tensor} of those of a worker's tensors that are among some weights: under the same
    name; under that which an adapter's wrappers leave it (peft puts `base_model.model.` before it
    and `.base_layer` into it); or without its first part, as in the file of a bare Hugging Face
    model, where that part is one and the same."""
    found, bare = {}, {}
    for name in names:
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        first, _, rest = plain.partition(".")
        if name in weights or plain in weights:
            found[name] = weights[name if name in weights else plain]
        elif rest in weights:
            bare.setdefault(first, {})[name] = weights[rest]
    return found | (next(iter(bare.values())) if len(bare) == 1 else {})


def choose_output(model, output_dir):
    """(output folder, folder or file with weights or None) for `-m` and `--output-dir`."""
    foreign = os.path.isfile(model) or foreign_weights(model)
    beside = os.path.splitext(model)[0] if os.path.isfile(model) else os.path.abspath(model)
    output = output_dir or (beside + "-diloco" if foreign else model)
    if foreign_weights(output):
        raise SystemExit(
            f"{output} holds weights that this program did not write, and it will not write there; "
            "name another folder with --output-dir"
        )
    own = os.path.isfile(os.path.join(model, "model.safetensors"))
    return output, model if foreign or own else None


# --- The server -------------------------------------------------------------------------------


class Server:
    """The global model of one run, its members and its rounds.

    `args`: the parsed command line. `run` serves until the run or the process is told to end.
    """

    def __init__(self, args):
        self.args = args
        self.incarnation = new_life()
        self.run_id = ""  # the life that the run began in
        self.lock = threading.Condition()
        self.members = {}  # worker id -> Member whose pushes are awaited
        self.joining = {}  # worker id -> Member that waits for the run to start
        self.indices = {}  # worker id -> the index it last had, in the order of last use
        self.expected = {}  # worker id -> when it was heard of: members of the life before
        self.reopening = False  # a run of a life before goes on: its workers bring what they hold
        self.uploader = None  # id of the joining worker that was asked for the model
        self.running = False  # from the start of the run until the last member has left
        self.stopping = False  # workers are told to finish
        self.ended = threading.Event()  # the process is to end
        self.closed = False  # no round closes any more: the last checkpoint is the last word
        self.save_wanted = set()  # of "checkpoint", "final"
        self.saved = self.final = None  # versions in the newest checkpoint and the final model
        self.save_error = ""
        self.started = time.monotonic()
        self.last_round = None
        self.step = 0  # of the run: that of the worker which is furthest
        self.connections = 0
        self.manifest = None  # specs, with the dtypes of the final model
        self.params = self.momentum = self.residual = None
        self.fragments = []
        self.files = {}  # descriptive files: name -> bytes
        self.weights = {}  # of -m, mapped: name -> tensor. What is trained begins with them
        self.buffers, self.buffer_specs = {}, []  # global, as they travel; of the final model
        self.frozen = {}  # name -> [dtype, fingerprint, who says so], where -m does not have it
        self.marks = {}  # (id of a tensor of -m, dtype) -> future of its fingerprint
        self.untrained = []  # names in -m of what the workers have frozen
        self.snapshot = lambda: None  # weak: joiners at one version share a copy
        # Several chunks at a time; more threads at one would spend their time waiting.
        torch.set_num_threads(1)
        self.folders = concurrent.futures.ThreadPoolExecutor(
            FOLDING_THREADS, initializer=torch.set_num_threads, initargs=[1]
        )
        # Threads apart from those that fold, which must not wait for gigabytes of frozen weights.
        self.hashers = concurrent.futures.ThreadPoolExecutor(FOLDING_THREADS)
        self.copying = threading.Lock()  # so that they do not make two at the same time
        self.picture = None  # of the checkpoint being written, or of the last one
        self.settings = {key: getattr(args, key) for key in DEFAULTS}
        self.shares = args.shares
        self.output, source = choose_output(args.model, args.output_dir)
        self._open(source)
        for key, value in DEFAULTS.items():
            if self.settings[key] is None:
                self.settings[key] = value
        self.shares = self.shares or max(args.n, LEAST_SHARES)
        if self.shares < args.n:
            raise SystemExit(
                f"{self.shares} --shares for {args.n} workers: some would have no text"
            )

    # --- Opening and saving ---

    def _open(self, source):
        where = os.path.abspath(self.output)
        for _, path in checkpoints(self.output) or checkpoints(self.args.model):
            try:
                self._load(path)
            except (OSError, ProtocolError, KeyError, TypeError, ValueError) as error:
                log(f"WARNING: {path} is not usable, trying the one before: {error!r}")
                continue
            log(f"continuing from {os.path.abspath(path)} (round {self.round}, step {self.step})")
            protocol.audit("load", life=self.incarnation, path=path, labels=self._labels())
            if source:  # for what is frozen, also where -m is where the run has ended before
                self.weights = load_weights(source)
            return
        if source:
            self.weights = load_weights(source)
            self.files = read_descriptive_files(
                source if os.path.isdir(source) else os.path.dirname(source)
            )
            log(f"starting from the weights in {source}; output goes to {where}")
            return
        log(f"*** NO WEIGHTS in {where}: the first worker will upload a new model. ***")
        log("*** If you meant to continue or to fine-tune one, check the path of -m. ***")

    def _load(self, path):
        """Take model, outer optimizer and rounds from a checkpoint folder."""
        _, tensors = protocol.load_file(os.path.join(path, "model.safetensors"))
        state, outer = protocol.load_file(os.path.join(path, "outer.safetensors"))
        specs = [
            TensorSpec(name, protocol.DTYPES[state["dtypes"][name]], tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]
        count = len(specs) - state.get("buffers", 0)  # these come last
        params = torch.cat([tensors[spec.name].reshape(-1) for spec in specs[:count]])
        self._allocate(specs[:count], len(state["fragments"]), params)
        self.buffer_specs, self.frozen = specs[count:], state.get("frozen", {})
        self.buffers = {spec.name: tensors[spec.name].clone() for spec in self.buffer_specs}
        self.momentum.copy_(outer["momentum"])
        if self.residual is not None and "residual" in outer:
            self.residual.copy_(outer["residual"])
        for fragment, saved in zip(self.fragments, state["fragments"], strict=True):
            fragment.origin, fragment.version = saved["label"]
            fragment.folded = saved["folded"]
        self.step, self.indices = state["step"], state["indices"]
        self.expected = dict.fromkeys(state["members"], time.monotonic())
        self.reopening, self.run_id = bool(self.expected), state["run"]
        self.incarnation = new_life(max(state["life"], *(f.origin for f in self.fragments)))
        self.shares = self.shares or state["shares"]
        self.files, self.saved = read_descriptive_files(path), (self._labels(), self.reopening)
        for key, saved in state["settings"].items():
            if self.settings[key] is None:
                self.settings[key] = saved
            elif self.settings[key] != saved:
                log(f"{key} {self.settings[key]} from the command line replaces {saved} of the run")

    def _allocate(self, manifest, num_fragments, params=None):
        """Set up the flat vectors, 12 bytes a parameter, around `params`, which are one of them.
        Without those the fragments have no version yet."""
        version, origin = (0, self.incarnation) if params is not None else (-1, "")
        if params is None:
            params = torch.empty(sum(spec.numel for spec in manifest))
        self.params, self.momentum = params, torch.zeros_like(params)
        feedback = CODECS[self.args.download_codec].lossy and self.args.error_feedback
        self.residual = torch.zeros_like(params) if feedback else None
        self.fragments = [Fragment(k, version, origin) for k in range(num_fragments)]
        self.manifest = manifest

    @property
    def is_whole(self):
        """Whether every fragment has a version."""
        return bool(self.fragments) and all(f.version >= 0 for f in self.fragments)

    def _slice(self, fragment, vector):
        """A fragment's view of a flat vector (or of None)."""
        if vector is None:
            return None
        return protocol.fragment_of(vector, fragment.index, len(self.fragments))

    def _labels(self):
        return [fragment.label for fragment in self.fragments]

    @property
    def round(self):
        """Rounds that every fragment has closed."""
        return min((fragment.version for fragment in self.fragments), default=0)

    def _save_loop(self):
        while not self.ended.is_set():
            with self.lock:
                self.lock.wait_for(lambda: self.save_wanted or self.ended.is_set())
                wanted, self.save_wanted = self.save_wanted, set()
            self.save("final" in wanted)
            if "final" in wanted and self.args.until_done and not self.running:
                self.ended.set()

    def save(self, final):
        """Write a checkpoint where there is something new, and the final model too if `final`.
        A full disk is said, and survived."""
        if not self.is_whole:
            return
        self.save_error = ""
        for write in [self._write_checkpoint] + [self._write_final] * final:
            try:
                os.makedirs(self.output, exist_ok=True)
                write()
            except Exception as error:  # whatever it is, training goes on, and saving too
                self.save_error = f"saving to {os.path.abspath(self.output)} failed: {error!r}"
                log(f"WARNING: {self.save_error}; the last good checkpoint is kept")

    def _write_checkpoint(self):
        """Write `checkpoint-ROUND/` beside, sync it, rename it, and remove the oldest ones."""
        if self.saved == (self._labels(), self.running):
            return
        beside = os.path.join(self.output, ".tmp-checkpoint")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(beside + "-old", ignore_errors=True)
        os.mkdir(beside)
        try:
            with contextlib.ExitStack() as files:
                model, outer = (
                    files.enter_context(open(os.path.join(beside, name), "wb"))
                    for name in ("model.safetensors", "outer.safetensors")
                )
                with self.lock:
                    self.lock.wait_for(lambda: not any(f.busy for f in self.fragments))
                    path = os.path.join(self.output, f"checkpoint-{self.round}")
                    saved, state = (self._labels(), self.running), self._state_to_save()
                    vectors = [self.params, self.momentum, self.residual]
                    vectors = [vector for vector in vectors if vector is not None]
                    picture = self.picture = Picture(vectors, len(self.fragments))
                    buffers = dict(self.buffers)
                try:
                    self._write_vectors(model, outer, state, picture, buffers)
                finally:
                    picture.close()
                for file in (model, outer):
                    file.flush()
                    os.fsync(file.fileno())
            self._write_files(beside)
            if os.path.exists(path):  # of the same round, but not of the same versions
                if not is_ours(os.path.join(path, "outer.safetensors")):
                    raise FileExistsError(f"{path} is not this program's")
                discard(path)
            os.rename(beside, path)
            protocol.sync_folder(self.output)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        self.saved = saved
        log(f"saved {os.path.abspath(path)}")
        for _, old in checkpoints(self.output)[self.args.save_total_limit :]:
            discard(old)

    def _state_to_save(self):
        """What a checkpoint says of the run. Needs the lock."""
        return {
            "program": "diloco",
            "run": self.run_id,
            "life": self.incarnation,
            "step": self.step,
            "shares": self.shares,
            "settings": self.settings,
            "indices": dict(self.indices),
            "members": sorted(self.members.keys() | self.expected.keys()),
            "dtypes": {
                s.name: protocol.DTYPE_NAMES[s.dtype] for s in self.manifest + self.buffer_specs
            },
            "buffers": len(self.buffer_specs),
            "frozen": self.frozen,
            "fragments": [{"label": f.label, "folded": dict(f.folded)} for f in self.fragments],
        }

    def _write_vectors(self, model, outer, state, picture, buffers):
        """Write both safetensors files of a checkpoint: parameters and buffers in one, the rest in
        the other, all of them side by side."""
        names = ("momentum", "residual")[: len(picture.vectors) - 1]
        specs = protocol.specs_of(zip(names, picture.vectors[1:], strict=True))
        program = {"program": "diloco"}
        kept = protocol.specs_of(buffers.items())
        model.write(protocol.encode_header(program, self._flat_specs() + kept, format="pt"))
        outer.write(protocol.encode_header(state, specs, format="pt"))
        begin = outer.tell()
        for start, (params, *others) in picture.pieces():
            model.write(protocol.memory(params))
            for place, piece in enumerate(others):
                outer.seek(begin + place * picture.vectors[0].nbytes + 4 * start)
                outer.write(protocol.memory(piece))
        for buffer in buffers.values():
            model.write(protocol.memory(buffer))

    def _flat_specs(self):
        """The manifest as the flat vector holds it, in float32."""
        return [TensorSpec(spec.name, torch.float32, spec.shape) for spec in self.manifest]

    def _write_files(self, folder):
        for name, text in self.files.items():
            protocol.write_beside(os.path.join(folder, name), lambda file, t=text: file.write(t))

    def _write_final(self):
        """Write the model in its first worker's dtypes, with what -m has of it that is frozen, and
        its files into the output folder."""
        if self.final == self._labels():
            return
        frozen = {name: self.weights[name] for name in self.untrained}
        specs = self.manifest + self.buffer_specs + protocol.specs_of(frozen.items())

        def write(file):
            parts = itertools.chain(
                (self.params[a:b].to(spec.dtype) for spec, a, b in protocol.ranges(self.manifest)),
                (self.buffers[spec.name].to(spec.dtype) for spec in self.buffer_specs),
                (tensor.contiguous() for tensor in frozen.values()),
            )
            protocol.write_frame(file, {"program": "diloco"}, specs, parts, format="pt")

        self._write_files(self.output)
        with self.hold(*self.fragments):
            labels = self._labels()
            protocol.write_beside(os.path.join(self.output, "model.safetensors"), write)
        self.final = labels
        log(f"the model of round {self.round} is in {os.path.abspath(self.output)}")

    def _keeper(self, fragment):
        """What is to be called before a chunk of a fragment's vectors changes; the fragment is
        busy, so no checkpoint begins meanwhile."""
        picture = self.picture
        return lambda start, stop: picture and picture.keep(fragment.index, start, stop)

    @contextlib.contextmanager
    def hold(self, *fragments, alone=False):
        """Keep the numbers of some fragments from being stepped, while they are copied; `alone`:
        from being copied too, while they are replaced."""
        with self.lock:
            self.lock.wait_for(lambda: not any(f.busy or (alone and f.readers) for f in fragments))
            for fragment in fragments:
                fragment.readers += 1
                fragment.busy = alone
        try:
            yield
        finally:
            with self.lock:
                for fragment in fragments:
                    fragment.readers -= 1
                    fragment.busy = False
                self.lock.notify_all()

    # --- Connections ---

    def run(self):
        """Serve until `--until-done` is met, the spawned workers are done, or a signal comes.
        Returns the exit code."""
        host, signals = self.args.host, []
        six = ":" in host or (not host and socket.has_dualstack_ipv6())
        family = socket.AF_INET6 if six else socket.AF_INET
        try:
            listener = socket.create_server(
                (host, self.args.port), family=family, backlog=256, dualstack_ipv6=six and not host
            )
        except OSError as error:
            raise SystemExit(
                f"cannot listen on {host or 'port'} {self.args.port}: {error.strerror or error}; "
                "is another server running? Try another --port"
            ) from None
        self.port = listener.getsockname()[1]

        def on_signal(number, _):
            if signals:
                os._exit(128 + number)
            signals.append(number)
            self.ended.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        for target, argument in ((self._accept_loop, [listener]), (self._reap_loop, [])):
            threading.Thread(target=target, args=argument, daemon=True).start()
        saver = threading.Thread(target=self._save_loop, daemon=True)
        saver.start()
        who = f"{self.args.n} worker(s)"
        if self.reopening:
            who = f"{', '.join(sorted(self.expected))}, or after {self.args.worker_timeout:g} s"
        log(f"listening on port {self.port}; the run starts with {who}")
        code = Spawn(self).wait() if self.args.spawn else 0
        self.ended.wait()
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        if signals:
            log("stopping: saving, and telling the workers; once more leaves at once")
        saver.join()
        self.save(final=not self.members)
        with self.lock:
            left = self.members.values()
            self.lock.wait_for(lambda: all(member.told for member in left), FAREWELL_SECONDS)
        listener.close()
        for _, newest in checkpoints(self.output)[:1]:
            log(f"ends; the newest checkpoint is {os.path.abspath(newest)}")
        return 128 + signals[0] if signals and self.args.spawn else code

    def _accept_loop(self, listener):
        while not self.ended.is_set():
            try:
                sock, address = listener.accept()
            except OSError as error:  # too many open files, for one, which passes
                if not self.ended.wait(0.1):
                    log(f"WARNING: accept failed: {error}")
                continue
            threading.Thread(target=self._serve, args=[sock, address[0]], daemon=True).start()

    def _serve(self, sock, address):
        """One connection, from hello to its end."""
        conn = protocol.Connection(sock, address)
        with self.lock:
            self.connections += 1
        try:
            if self.connections > MAX_CONNECTIONS:
                raise Refused("busy", f"the server has {MAX_CONNECTIONS} connections, its limit")
            conn.greet({"incarnation": self.incarnation})
            while True:
                message = conn.receive(idle=None)
                handler = getattr(self, f"on_{message.type}", None)
                if handler is None:
                    raise ProtocolError(f"no request is called {message.type!r}")
                handler(conn, message)
        except (Refused, ProtocolError) as error:
            if getattr(error, "code", "") != "rejoin":  # heard at each heartbeat until a step ends
                log(f"{conn.worker[0] or conn.peer} is refused: {error}")
            conn.refuse(error)
        except OSError as error:
            if conn.worker[0] in self.members:
                log(f"a connection to {conn.worker[0]} ended: {error}")
        finally:
            with self.lock:
                self.connections -= 1
                for worker, member in list(self.joining.items()):
                    if member.conn is conn:
                        self._forget_joining(worker)
            conn.close()

    def _member(self, conn):
        """The member that speaks on this connection. Raises Refused if it is none."""
        worker, session = conn.worker
        member = self.members.get(worker)
        if member is None or member.session != session:
            if worker in self.expected:
                self.expected[worker] = time.monotonic()  # it lives, and will come
            raise Refused("rejoin", f"worker {worker!r} is not a member of the run; join again")
        member.heard = time.monotonic()
        return member

    def _fragment(self, message):
        return self.fragments[message.field("fragment", int, high=len(self.fragments) - 1)]

    def _wait(self, conn, condition, awaited):
        """Wait for `condition()`, called with the lock held. Every WAIT_SECONDS the peer gets a
        `wait` message with `awaited()`, the first one soon: it says that the request is here whole.
        Raises ConnectionError when the peer hangs up, or the server ends."""
        said = -protocol.WAIT_SECONDS
        while True:
            with self.lock:
                if self.lock.wait_for(lambda: condition() or self.closed, timeout=0.5):
                    if condition():
                        return
                    break
                text = awaited()
            if conn.closed_by_peer():
                raise ConnectionError(f"{conn.peer} closed the connection")
            if time.monotonic() - said >= protocol.WAIT_SECONDS:
                conn.send("wait", {"awaited": text})
                said = time.monotonic()
        conn.send("wait", {"awaited": "the server, which was stopped"})
        raise ConnectionError("the server ends")

    # --- Joining and leaving ---

    def on_join(self, conn, message):
        """Admit a worker: at once to a running run, else when all are there that it starts with."""
        message.expect([])
        if not conn.worker[0]:
            raise ProtocolError("join: hello named no worker")
        if self.ended.is_set():
            raise ConnectionError("the server ends")
        member = Member(
            *conn.worker,
            message.field("host", str),
            conn,
            protocol.manifest_from_json(message.field("manifest", list)),
            message.field("sync_every", int, low=1),
            message.field("num_fragments", int, low=1, high=1000),
            message.field("source", str, ""),
            message.field("step", int, 0),
            message.field("run", str, ""),
            [label and label_of(label) for label in message.field("versions", list, [])],
            [folded_of(folded) for folded in message.field("folded", list, [])],
            position=message.field("position", int, 0),
            ranks=message.field("ranks", int, 1, low=1),
            buffers=protocol.manifest_from_json(message.field("buffers", list, []), trained=False),
            frozen=frozen_of(message.field("frozen", list, [])),
        )
        for held in (member.labels, member.folded):
            if len(held) not in (0, member.num_fragments):
                raise ProtocolError("join: versions and folded lists are not one a fragment")
        if member.folded and None in member.labels:
            raise ProtocolError("join: a folded list without its version")
        names = [spec.name for spec in member.manifest + member.buffers] + [*member.frozen]
        if len(set(names)) != len(names):  # they may share a file
            raise ProtocolError("join: a name stands for two tensors of the model")
        if self.run_id and member.run != self.run_id:
            member.labels, member.folded = [], []
        if self.stopping and not member.folded:
            raise Refused("stopping", "this run is being stopped")
        size = protocol.payload_bytes(protocol.buffer_specs(member.manifest + member.buffers))
        if size > self.args.max_model_gb * 1e9:
            raise Refused(
                "size",
                f"the model takes {size / 1e9:.2f} GB as float32, over --max-model-gb "
                f"{self.args.max_model_gb:g}; raise it if the server has three times that in memory",
            )
        self._wait(conn, lambda: not self._is_doubtful(member), lambda: f"the old {member.id}")
        self._compare_frozen(conn, member)
        with self.lock:
            self._check_id(member)
            self._check_settings(member)
            self._check_model(member)
            self.joining[member.id] = member
            self.lock.notify_all()
        log(f"{member.id} on {member.host} ({conn.peer}) asks to join")
        self._admit(conn, member)

    @property
    def heartbeat_seconds(self):
        """How often workers are asked to say that they live."""
        return min(HEARTBEAT_SECONDS, self.args.worker_timeout / 4)

    def _is_doubtful(self, member):
        """Whether another process that has this id has lost its connection so lately that it may
        be about to connect again: a cut line is not the end of a worker."""
        other, grace = self.members.get(member.id), 1.5 * self.heartbeat_seconds + 0.5
        cut = other and other.session != member.session and other.conn.closed_by_peer()
        return cut and time.monotonic() - other.heard < grace

    def _check_id(self, member):
        for other in (self.members.get(member.id), self.joining.get(member.id)):
            if other and other.session != member.session and not other.conn.closed_by_peer():
                silent = time.monotonic() - other.heard
                raise Refused(
                    "id",
                    f"worker id {member.id!r} is held by a live process on {other.host} "
                    f"({other.conn.peer}); give this one another --worker-id, or if that machine is "
                    f"dead, try again in {max(0.0, self.args.worker_timeout - silent):.0f} s",
                )

    def _check_settings(self, member):
        """What all workers of a run must have alike."""
        names = ["num_fragments", "source"] + ["sync_every"] * (member.num_fragments > 1)
        others = [*self.members.values(), *self.joining.values()]
        run = [(name, getattr(o, name), f"{o.id!r} on {o.host}") for o in others for name in names
               if o.id != member.id]  # fmt: skip
        if self.fragments:
            run.append(("num_fragments", len(self.fragments), "the run so far"))
        if member.source and len({o.id for o in others} - {member.id}) >= self.shares:
            raise Refused(
                "setting",
                f"the run's text is cut into {self.shares} shares, and as many workers read them; "
                "start the server with more --shares",
            )
        for name, value, whose in run:
            if value != getattr(member, name):
                raise Refused(
                    "setting",
                    f"{name} is {getattr(member, name)!r} here and {value!r} in {whose}; all "
                    "workers of a run need the same",
                )

    def _misfit(self, member):
        """What keeps a worker's model from being the one of the run, in words, or ""."""
        if not self.manifest:
            return ""
        ours, theirs = self.manifest + self.buffer_specs, member.manifest + member.buffers
        fault = protocol.explain_mismatch(ours, theirs)
        known = {spec.name: spec for spec in protocol.buffer_specs(self.buffer_specs)}
        for spec in [] if fault else protocol.buffer_specs(member.buffers):
            if spec != known.get(spec.name):
                fault = f"{protocol.describe(spec)} has another dtype on the server"
        for name, (spec, mark) in {} if fault else member.frozen.items():
            dtype, other, whose = self.frozen.get(name, ("", "", ""))
            if not fault and dtype == protocol.DTYPE_NAMES[spec.dtype] and mark != other:
                fault = (
                    f"its frozen tensor {name!r} has other numbers than that of {whose}; load the "
                    "same weights on all workers, or start the server with a -m that holds them"
                )
        return fault

    def _check_model(self, member):
        if fault := self._misfit(member):
            raise Refused("model", f"this worker's model is not the one of the run: {fault}")

    def _compare_frozen(self, conn, member):
        """Note which frozen tensors of a worker are not those of -m. Takes a second a gigabyte, the
        first time. Raises Refused where one has another shape."""
        found = matched(self.weights, member.frozen)
        jobs = {}
        for name, tensor in found.items():
            shape, dtype = member.frozen[name][0].shape, member.frozen[name][0].dtype
            if tuple(tensor.shape) != shape:
                fault = (
                    f"frozen tensor {name!r} is {list(tensor.shape)} in -m and {list(shape)} here"
                )
                raise Refused("model", fault)
            with self.lock:
                if (id(tensor), dtype) not in self.marks:
                    work = self.hashers.submit(
                        lambda t, d: protocol.fingerprint(t.to(d)), tensor, dtype
                    )
                    self.marks[id(tensor), dtype] = work
                jobs[name] = self.marks[id(tensor), dtype]
        self._wait(
            conn,
            lambda: all(job.done() for job in jobs.values()),
            lambda: "the server, which compares the frozen weights with those of -m",
        )
        member.differs = [n for n, job in jobs.items() if job.result() != member.frozen[n][1]]

    def _admit(self, conn, member):
        """Wait until the run starts, then answer a join with the parameters, or with `init` where
        this worker is to bring them, or newer slices of them than the server has."""
        while True:
            self._wait(conn, lambda: self._task(member), self._awaited_to_start)
            with self.lock:
                self._check_model(member)
                if member not in (self.joining.get(member.id), self.members.get(member.id)):
                    raise Refused("id", "another connection of this worker has taken its place")
                task = self._task(member)
                member.asked = []
                if task in ("slices", "model"):
                    self.uploader = member.id
                elif task == "enter" and not self.running and not self._start():
                    continue
            if task == "enter":
                with self._reading(member):
                    return self._send_model(conn, member)
            if task == "slices":
                with self.lock:
                    if not self.fragments:  # it died before its first checkpoint
                        self._allocate(member.manifest, member.num_fragments)
                        self.buffer_specs = member.buffers
                    member.asked = self._newest_of(member)
                last = len(self.fragments) - 1 in member.asked
                member.wanted = [spec.name for spec in member.buffers if last]
                fields = {"fragments": member.asked, "tensors": member.wanted}
                return conn.send("init", fields)
            if task == "model":
                found = self._fit_weights(member)
                every = member.manifest + member.buffers
                member.wanted = [spec.name for spec in every if spec.name not in found]
                if member.wanted or not self.files:
                    return conn.send("init", {"tensors": member.wanted})
                params, buffers = self._lay_out(member, found), self._collect_buffers(member, found)
                self._check_finite(params)
                self._take_model(member, params, buffers, self.files)

    def _task(self, member):
        """What a worker that joins has to do now: "enter" the run (or hear that another connection
        has taken its place), upload the "model", or newer "slices" of it; None: wait."""
        if self.running or self.joining.get(member.id) is not member:
            return "enter"
        if self.uploader or not self._is_ready():
            return None
        if self._newest_of(member):
            return "slices"
        if any(self._newest_of(other) for other in self.joining.values()):
            return None
        if not self.is_whole:
            return "model" if member.id == min(self.joining) else None
        return "enter"

    def _is_ready(self):
        """Whether all are there that the run starts with: `-n` workers, or after a crash its
        members of then, as far as they have been heard of within --worker-timeout."""
        now = time.monotonic()
        if self.reopening:
            left = self.expected.keys() - self.joining.keys()
            return all(self._is_late(self.expected[worker], now) for worker in left)
        # A crash before the first checkpoint leaves no names.
        again = any(member.folded for member in self.joining.values())
        return len(self.joining) >= self.args.n or (again and self._is_late(self.started, now))

    def _is_late(self, heard, now):
        return now - heard > self.args.worker_timeout

    def _newest_of(self, member):
        """The fragments of which, of all that wait, this worker holds the newest version, which is
        newer than the server's."""
        offers = [other for other in self.joining.values() if other.folded]
        current = self._labels() or [["", -1]] * member.num_fragments  # less than any version
        return [
            k
            for k, label in enumerate(current)
            if member in offers
            and member.labels[k] > label
            and max(offers, key=lambda other: (other.labels[k], other.id)) is member
        ]

    def _awaited_to_start(self):
        missing = self.args.n - len(self.joining)
        if self.reopening:
            return f"{', '.join(sorted(self.expected.keys() - self.joining.keys()))} to come back"
        return f"{missing} more worker(s) to join" if missing > 0 else f"{self.uploader}'s upload"

    def _start(self):
        """Make members of all that wait. Needs the lock; False if too few are left."""
        for worker, member in list(self.joining.items()):
            if self._misfit(member) or member.conn.closed_by_peer():
                self._forget_joining(worker)
        if not self.joining or not self._is_ready():
            return False
        self.step = max([self.step, *(m.step for m in self.joining.values() if m.folded)])
        for worker in sorted(self.joining, key=lambda w: (self.indices.get(w, KNOWN_WORKERS), w)):
            member = self.joining[worker]
            member.step = member.step if member.folded else self.step
            self._make_member(member, self._free_index(worker))
        self.untrained = [name for name in member.frozen if name in self.weights]
        if self.args.save_every and self.saved is None:
            self.save_wanted.add("checkpoint")  # so that a crash in round 0 costs nothing either
        self.running, self.reopening, self.expected = True, False, {}
        log(f"the run starts at round {self.round} with {', '.join(self.members)}")
        protocol.audit(
            "open", life=self.incarnation, labels=self._labels(), members=[*self.members]
        )
        self.lock.notify_all()
        return True

    def _make_member(self, member, index):
        self.indices.pop(member.id, None)
        member.index = self.indices[member.id] = index
        member.heard = time.monotonic()
        self.joining.pop(member.id, None)
        self.members[member.id] = member
        for worker in list(self.indices)[:-KNOWN_WORKERS]:
            if worker not in self.members:
                del self.indices[worker]
                for fragment in self.fragments:
                    fragment.folded.pop(worker, None)

    def _forget_joining(self, worker):
        self.joining.pop(worker, None)
        if self.uploader == worker:
            self.uploader = None
        self.lock.notify_all()

    def _free_index(self, worker):
        """Its own index for an id that comes back, else the lowest that is free."""
        taken = {member.index for member in self.members.values() if member.id != worker}
        own = self.indices.get(worker)
        return (
            own if own is not None and own not in taken else min(set(range(len(taken) + 1)) - taken)
        )

    def _send_model(self, conn, member):
        """The reply to join: a place in the run, what became of the worker's pushes, and the
        parameters in full. `seqs` are final: no push of before can be folded any more, but for one
        that a process of the same name has left, and to which this one adds nothing."""
        with self.hold(*self.fragments):
            with self.lock:
                if member not in (self.joining.get(member.id), self.members.get(member.id)):
                    raise Refused("id", "another connection of this worker has taken its place")
                self._supersede(member)
                due, starts = self._next_pushes(member), self.members.get(member.id) is member
                if self.members.get(member.id) is not member:
                    if not member.folded:
                        member.step = max([self.step, *(m.step for m in self.members.values())])
                    self._make_member(member, self._free_index(member.id))
                    log(f"{member.id} joins the run as worker {member.index}")
                fields = {
                    "run": self.run_id,
                    "ticket": member.ticket,
                    "index": member.index,
                    **self._share(member),
                    "num_shares": self.shares,
                    "heartbeat_seconds": self.heartbeat_seconds,
                    "upload_codec": self.args.upload_codec,
                    "download_codec": self.args.download_codec,
                    "error_feedback": self.args.error_feedback,
                    "step": member.step,
                    "due": due,
                    "versions": self._labels(),
                    "folded": [dict(f.folded) for f in self.fragments],
                    "seqs": [self._last_seq(f, member.id) for f in self.fragments],
                    "staleness": [
                        max(0, f.version - label[1]) if label else 0
                        for f, label in itertools.zip_longest(self.fragments, member.labels)
                    ],
                    "max_staleness": self.args.max_staleness,
                    "outer": [self._outer(f.version) for f in self.fragments],
                    "frozen": member.differs,
                }
                buffers = dict(self.buffers)
            specs = self._flat_specs() + protocol.specs_of_buffers(buffers)
            if starts:  # with the others: no round closes before all have the parameters
                conn.send("join", fields, specs, [self.params, *buffers.values()])
            else:
                with self.copying:
                    snapshot = self.snapshot()
                    if snapshot is None or snapshot.versions != fields["versions"]:
                        snapshot = Snapshot(self.params.clone(), fields["versions"])
                        self.snapshot = weakref.ref(snapshot)
        if not starts:
            conn.send("join", fields, specs, [snapshot.params, *buffers.values()])
        self._make_room(member)

    def _make_room(self, member):
        """Have the memory for its pushes, and for the first update, while it trains: the system
        takes longer to hand it out than to fill it."""
        codecs = [CODECS[name] for name in (self.args.upload_codec, self.args.download_codec)]
        for fragment in self.fragments:
            size = self._slice(fragment, self.params).numel()
            up, down = (codec.layout(size) for codec in codecs)
            if fragment.index not in member.room:
                buffer = Buffer(up)
                with self.lock:
                    member.room.setdefault(fragment.index, buffer)
            with self.copying:
                if fragment.update is None and fragment.spare is None:
                    fragment.spare = Buffer([*down, Checksum.SPEC])

    def _supersede(self, member):
        """Take back those pushes of open rounds that a worker which joins again will send again:
        its own, and those that a process made after the checkpoint that it goes on from. Needs
        the lock, while no fragment is busy."""
        old = self.members.get(member.id)
        for fragment, label in itertools.zip_longest(self.fragments, member.labels):
            push = fragment.pushes.get(member.id)
            if push and (push.session == member.session or label == fragment.label):
                del fragment.pushes[member.id]
        if old and old is not member:
            member.shares = old.shares if old.session == member.session else set()

    @staticmethod
    def _last_seq(fragment, worker):
        """The highest sequence number of a worker's pushes that count, or will."""
        push = fragment.pushes.get(worker)
        return push.seq if push else fragment.folded.get(worker, 0)

    def _next_pushes(self, member):
        """Where a worker that joins is to begin: `open`, the fragments whose round waits for it,
        in the order of the cycle, and `next`, the first one that nobody has pushed yet, due in
        `steps` of its own (None: a whole interval). Derived from the versions, and from what the
        members last said of their place in the cycle."""
        count = len(self.fragments)
        if self.members.get(member.id) is member:  # the run starts, and all begin at one place,
            first = min(self.fragments, key=lambda f: f.version * count + f.index)
            return {"open": [], "next": first.index, "steps": None}  # however fast the others are
        waiting = [f for f in self.fragments if f.pushes and member.id not in f.pushes]
        waiting.sort(key=lambda f: f.version * count + f.index)
        nxt = min(self.fragments, key=lambda f: (f.version + bool(f.pushes)) * count + f.index)

        def due(sync_every):
            return (nxt.index + 1) * sync_every // count

        left, now = [], time.monotonic()
        for other in self.members.values():
            if other.id != member.id:
                steps = (due(other.sync_every) - other.position - 1) % other.sync_every + 1
                steps -= other.steps_per_second * (now - other.heard)
                left.append(max(0.0, steps) / other.sync_every)
        steps = max(1, round(min(left) * member.sync_every)) if left else None
        return {"open": [f.index for f in waiting], "next": nxt.index, "steps": steps}

    def _share(self, member):
        """Its place among the live members, their number, and the shares of the text that it may
        read from now on: every world-th from its rank on, but for those that another member has
        not said to have let go of. Needs the lock."""
        live = sorted(other.index for other in self.members.values())
        rank, world = live.index(member.index), len(live)
        others = [other.shares for other in self.members.values() if other is not member]
        due = set(range(rank % self.shares, self.shares, world))
        told = due.difference(*others) or member.shares.difference(*others)
        member.shares |= told
        return {"rank": rank, "world": world, "shares": sorted(told)}

    def _fit_weights(self, member):
        """{name: tensor} of the trained tensors and buffers of a worker that -m holds. Raises Refused
        where one has another shape, and where -m lacks one that is trained; unless that is an
        adapter's, so that all that is frozen is there."""
        if not self.weights:
            return {}
        every = member.manifest + member.buffers
        found = matched(self.weights, [*(spec.name for spec in every), *member.frozen])
        alien = [name for name in member.frozen if name not in found]
        is_base = bool(member.frozen) and not alien
        have = [spec._replace(shape=tuple(found[spec.name].shape))
                for spec in every if spec.name in found]  # fmt: skip
        needed = [s for s in every if s.name in found or (s in member.manifest and not is_base)]
        if fault := protocol.explain_mismatch(have, needed):
            raise Refused(
                "model",
                f"the weights in -m do not fit this worker's model: {fault}"
                + (f" (nor is what is frozen, as {alien[0]!r})" if alien else "")
                + "; name a model that does, or with -m a new folder, into which the first worker "
                "uploads its own",
            )
        return {spec.name: found[spec.name] for spec in have}

    def on_init(self, conn, message):
        """The upload of the model by the worker that was asked for it: the tensors of its
        manifest, or slices that are newer than the server's, then the descriptive files."""
        with self.lock:
            member = self.joining.get(conn.worker[0])
            if member is None or member.conn is not conn or self.uploader != member.id:
                raise ProtocolError("init: this worker was not asked for it")
        sizes = message.field("files", dict, {})
        for name, size in sizes.items():
            if name not in protocol.FILE_NAMES or type(size) is not int or size < 0:
                raise ProtocolError(f"init: file {name!r} is not one of {protocol.FILE_NAMES}")
        if sum(sizes.values()) > protocol.MAX_FILES_BYTES:
            raise ProtocolError(f"init: the files are over {protocol.MAX_FILES_BYTES:,} bytes")
        file_specs = [TensorSpec(f"file:{n}", torch.uint8, (s,)) for n, s in sizes.items()]
        parts = {k: self._slice(self.fragments[k], self.params).numel() for k in member.asked}
        specs = [TensorSpec(f"slice:{k}", torch.float32, (size,)) for k, size in parts.items()]
        specs = specs or [spec for spec in member.manifest if spec.name in member.wanted]
        buffers = [spec for spec in member.buffers if spec.name in member.wanted]
        message.expect(specs + protocol.buffer_specs(buffers) + file_specs)
        found = {} if parts else self._fit_weights(member)
        if parts:
            params = torch.empty(sum(parts.values()))
            conn.read(params)
        else:
            params = self._lay_out(member, found, conn.read)
        buffers, files = self._collect_buffers(member, found, conn.read), {}
        for name, size in sizes.items():
            raw = torch.empty(size, dtype=torch.uint8)
            conn.read(raw)
            files[name] = bytes(protocol.memory(raw))
        self._check_finite(params)
        if parts:
            slices = dict(zip(parts, params.split([*parts.values()]), strict=True))
            self._take_slices(member, slices, buffers, files)
        else:
            self._take_model(member, params, buffers, self.files or files)
        self._admit(conn, member)

    @staticmethod
    def _check_finite(params):
        if not all(protocol.within(part) for part in params.split(CHUNK)):
            raise Refused("model", "the parameters to start from are not all finite")

    @staticmethod
    def _lay_out(member, found, read=None):
        """The flat vector that a run starts with, in the layout of a worker: from the tensors of -m
        in `found`, and the rest as `read(tensor)` brings it."""
        params = torch.empty(sum(spec.numel for spec in member.manifest))
        for spec, start, stop in protocol.ranges(member.manifest):
            part = params[start:stop]
            if spec.name in found:
                part.copy_(found[spec.name].reshape(-1))
            elif spec.dtype == torch.float32:
                read(part)
            else:
                raw = torch.empty_like(part, dtype=spec.dtype)
                read(raw)
                part.copy_(raw)
        return params

    @staticmethod
    def _collect_buffers(member, found, read=None):
        """The buffers, {name: CPU tensor as it travels}, that `found` or the worker has."""
        buffers = {}
        for spec, wire in zip(member.buffers, protocol.buffer_specs(member.buffers), strict=True):
            if spec.name in found:
                buffers[spec.name] = found[spec.name].to(wire.dtype, copy=True).contiguous()
            elif spec.name in member.wanted:
                buffers[spec.name] = torch.empty(wire.shape, dtype=wire.dtype)
                read(buffers[spec.name])
        return buffers

    def _take_slices(self, member, slices, buffers, files):
        """Newer slices than the checkpoint had, with the pushes folded into them. The momentum
        stays that of the checkpoint; what its rounding had left over has been sent since."""
        for k, values in slices.items():
            fragment = self.fragments[k]
            with self.hold(fragment, alone=True):
                for chunk in protocol.chunks(values.numel()):
                    self._keeper(fragment)(*chunk)
                self._slice(fragment, self.params).copy_(values)
                if self.residual is not None:
                    self._slice(fragment, self.residual).zero_()
                with self.lock:
                    fragment.origin, fragment.version = member.labels[k]
                    fragment.folded = dict(member.folded[k])
            protocol.audit(
                "take", life=self.incarnation, fragment=k, label=fragment.label, worker=member.id
            )
            log(f"fragment {k}: version {fragment.version} comes from {member.id}")
        with self.lock:
            self.files = self.files or files
            self.uploader = None
            self.save_wanted.add("checkpoint")
            self._take_untrained(member, buffers)
            if self.is_whole:
                self.run_id = self.run_id or member.run
            self.lock.notify_all()

    def _take_untrained(self, member, buffers):
        """What a model has beside the flat vector: buffers, and what is known of frozen tensors.
        Needs the lock."""
        if buffers or not self.buffer_specs:
            self.buffers, self.buffer_specs = buffers, member.buffers
        found = matched(self.weights, member.frozen)
        self.frozen = self.frozen or {
            name: [protocol.DTYPE_NAMES[spec.dtype], mark, f"{member.id} on {member.host}"]
            for name, (spec, mark) in member.frozen.items()
            if name not in found
        }

    def _take_model(self, member, params, buffers, files):
        """The first parameters of a run, from a worker or from the disk."""
        with self.lock:
            self._allocate(member.manifest, member.num_fragments, params)
            self.run_id = self.incarnation
            self._take_untrained(member, buffers)
            self.files = files
            self.uploader = None
            self.lock.notify_all()
        log(f"{params.numel():,} parameters in {len(member.manifest)} tensors, as {member.id} has")

    def on_heartbeat(self, conn, message):
        message.expect([])
        with self.lock:
            member = self._member(conn)
            member.conn = conn
            member.shares &= {s for s in message.field("shares", list, []) if type(s) is int}
            member.step, member.ending = (
                message.field("step", int),
                message.field("ending", bool, False),
            )
            member.position = message.field("position", int, 0)
            member.closed |= {k for k in message.field("closed", list, []) if type(k) is int}
            member.steps_per_second = message.field("steps_per_second", float, 0.0)
            member.loss = message.field(
                "loss", float, None, low=-protocol.MAX_ABS, high=protocol.MAX_ABS
            )
            fields = {
                "round": self.round,
                **self._share(member),
                "members": sorted(self.members),
                "orders": ["stop"] * self.stopping + ["away"] * self.closed,
            }
            self.lock.notify_all()  # rounds may be over for what it says
        conn.send("heartbeat", fields)
        if "away" in fields["orders"]:
            with self.lock:
                member.told = True
                self.lock.notify_all()

    def on_leave(self, conn, message):
        message.expect([])
        with self.lock:
            member, why = self._member(conn), message.field("reason", str, "done")
            self._remove(member, f"leaves: {why}", ends=True)
        self.advance()
        conn.send("leave")

    def _remove(self, member, why, ends):
        """Drop a member; the rounds it was awaited in go on without it. The run ends when the last
        one `ends` its part; one that was only lost may come back to it. Needs the lock."""
        del self.members[member.id]
        log(f"{member.id} {why}")
        if not self.members:
            self.running = not (ends or self.stopping)
            self.stopping = False
            self.save_wanted.add("final")
        self.lock.notify_all()

    def give_up(self, worker):
        """Wait no longer for a worker whose process is known to have ended."""
        with self.lock:
            if member := self.members.get(worker):
                self._remove(member, "is gone: its process has ended", ends=False)
        self.advance()

    def _reap_loop(self):
        """Drop members that have not been heard of for --worker-timeout, and close the rounds of
        which nobody waits for the reply."""
        limit = self.args.worker_timeout
        while not self.ended.wait(min(1.0, limit / 4)):
            with self.lock:
                now = time.monotonic()
                for member in list(self.members.values()):
                    if self._is_late(member.heard, now) and not member.reading:
                        why = f"is gone: not heard of for {limit:g} s"
                        self._remove(member, why, ends=False)
            self.advance()

    # --- Rounds ---

    def on_push(self, conn, message):
        """Take a push, wait until its round is over, and answer with the update."""
        with self.lock:
            fragment = self._fragment(message)
            push, payload, buffers = self._announced(self._member(conn), fragment, message)
        if payload:
            push.buffer = push.buffer or Buffer(payload)
            self._read_push(conn, push, buffers, self._slice(fragment, self.params).numel())
        with self.lock:
            new, target = self._enter_round(self._member(conn), fragment, push), fragment.label
        try:
            while new and not self._is_answered(fragment, target):
                self._wait(
                    conn,
                    lambda: self._is_answered(fragment, target) or self._closable(fragment),
                    lambda: self._awaited(fragment),
                )
                self.advance()
            self._answer_push(conn, fragment, push)
        finally:
            self._end_push(push)

    def _announced(self, member, fragment, message):
        """The Push that a message announces, the specs of its payload, and those of the model's
        buffers that come with it. Needs the lock."""
        layout = CODECS[self.args.upload_codec].layout(self._slice(fragment, self.params).numel())
        buffers, payload = message.split_buffers(), message.specs
        if payload or buffers:
            message.expect(layout)
        known = {spec.name: spec for spec in protocol.buffer_specs(self.buffer_specs)}
        if any(spec != known.get(spec.name) for spec in buffers):
            raise ProtocolError("push: carries a buffer that is none of this model's")
        push = Push(
            member.id,
            member.session,
            member.index,
            message.field("ticket", str),
            message.field("seq", int, low=1),
            label_of(message.field("base", list)),
            message.field("staleness", int, 0),
            message.field("step", int),
            message.field("position", int, 0),
            message.field("steps", int),
            message.field("tokens", int, 0),
            message.field("loss", float, None, low=-protocol.MAX_ABS, high=protocol.MAX_ABS),
            message.field("closing", bool, False),
            protocol.payload_bytes(payload + buffers),
            member.room.pop(fragment.index, None) if payload else None,
        )
        return push, payload, buffers

    def _read_push(self, conn, push, buffers, size):
        """Read a push's payload, whose numbers are looked at while they are in the cache, and more
        are on their way. Where they are not finite it is refused."""
        codec, broken = CODECS[self.args.upload_codec], []
        for start, stop, first, last in protocol.chunk_bytes(codec, size):
            conn.read(push.buffer.raw[first:last])
            if not broken and not codec.finite(push.buffer.tensors, start, stop):
                broken.append("pseudo-gradient")
        for spec in buffers:
            name = spec.name.removeprefix(protocol.BUFFER)
            values = push.buffers[name] = torch.empty(spec.shape, dtype=spec.dtype)
            conn.read(values)
            if values.is_floating_point() and not protocol.within(values.reshape(-1)):
                broken.append(f"buffer {name!r}")
        if broken:
            push.refused = f"the {broken[0]} is not finite"
            log(f"WARNING: {push.worker}: {push.refused}; the round goes on without it")

    def _enter_round(self, member, fragment, push):
        """Count a push in the open round of its fragment. False where it is not to be waited for: it
        has been folded already, or is too old. Raises Refused where its worker has to join again.
        Needs the lock."""
        # While a round is being folded, its pushes are in neither `pushes` nor `folded`.
        self.lock.wait_for(lambda: not fragment.busy)
        if member.ticket != push.ticket or self.members.get(member.id) is not member:
            raise Refused("rejoin", "this push is from before its worker joined again")
        member.step, member.position, member.loss = push.step, push.position, push.loss
        base, target = push.base, fragment.label
        push.staleness += target[1] - base[1]
        if push.seq <= fragment.folded.get(push.worker, 0):
            return False
        if base[1] > target[1] or (base[1] == target[1] and base != target):
            raise Refused("rejoin", f"version {base} of the slice is none of this server's")
        if push.steps and push.staleness > self.args.max_staleness:
            push.stale = True
            push.refused = f"a push {push.staleness} rounds old is over --max-staleness"
            log(f"WARNING: {push.worker}: {push.refused}; its {push.steps} steps are dropped")
            return False
        push.arrived = time.monotonic()
        fragment.pushes[push.worker] = push
        self.lock.notify_all()
        return True

    @staticmethod
    def _is_answered(fragment, target):
        """Whether an update that leads on from version `target` is there, or being made."""
        update = fragment.update
        return fragment.label != target or (update is not None and update.base == target)

    def _pushers(self, fragment):
        """The members that push a fragment, by id. One that has made its last push of it, and waits
        for the end of another fragment's round, does not: the others may be waiting here for that."""
        return {m.id for m in self.members.values() if fragment.index not in m.closed}

    def _awaited(self, fragment):
        """Who is missing in the open round of a fragment, in words. Needs the lock."""
        names = ", ".join(sorted(self._pushers(fragment) - fragment.pushes.keys()))
        more = self.args.min_workers - len(self.members.keys() | fragment.pushes)
        return names if more <= 0 else f"{names or 'nobody'}, and {more} more (--min-workers)"

    def _closable(self, fragment):
        if fragment.busy or fragment.readers or self.closed:
            return False
        limit = self.args.round_timeout
        begun = min((p.arrived for p in fragment.pushes.values() if not p.staleness), default=None)
        overdue = limit and begun is not None and time.monotonic() - begun > limit
        ending = self.stopping or all(member.ending for member in self.members.values())
        least = 1 if ending else self.args.min_workers
        return round_closes(self._pushers(fragment), fragment.pushes, least, overdue)

    def advance(self):
        """Have the outer step taken of every fragment whose round is over."""
        while True:
            with self.lock:
                fragment = next(filter(self._closable, self.fragments), None)
                if fragment is None:
                    return
                fragment.busy = True
                pushes, fragment.pushes = fragment.pushes, {}
            pushes = sorted(pushes.values(), key=lambda push: push.index)
            threading.Thread(target=self._fold, args=[fragment, pushes], daemon=True).start()

    def _fold(self, fragment, pushes):
        """Close a round, in a thread of its own: those that wait send what it has got so far."""
        try:
            self._close_round(fragment, pushes)
        except BaseException:  # half of the slice is of one version, half of another
            traceback.print_exc()
            log("FATAL: an outer step failed; the same command goes on from the newest checkpoint")
            os._exit(1)

    def _close_round(self, fragment, pushes):
        """Fold the pushes, step the slice, publish the update. The fragment is busy throughout."""
        began = time.monotonic()
        params, down = self._slice(fragment, self.params), CODECS[self.args.download_codec]
        counted = [push for push in pushes if push.buffer and not push.refused]
        plain, norm = all(push.closing for push in pushes), 0.0
        changed = mean_of_buffers(self.buffers, [push.buffers for push in counted])
        with self.lock:
            old, outer = fragment.update, self._outer(fragment.version)
            buffer = old.buffer if old and not old.readers else fragment.spare
            fragment.spare = None
            if counted:
                buffer = buffer or Buffer([*down.layout(params.numel()), Checksum.SPEC])
            update = self._announce(fragment, pushes, buffer if counted else None, changed, plain)
        if counted:
            checksum, norm = outer_step(
                params,
                self._slice(fragment, self.momentum),
                self._slice(fragment, self.residual),
                [push.buffer.tensors for push in counted],
                CODECS[self.args.upload_codec],
                down,
                buffer.tensors,
                outer["lr"],
                outer["momentum"],
                outer["nesterov"],
                plain,
                self._keeper(fragment),
                update.advance,
                self.folders.map,
            )
        else:
            checksum = protocol.checksum_of(params)
        with self.lock:
            update.made, update.line = time.monotonic(), self._round_line(fragment, pushes, counted, began, norm)  # fmt: skip
            self._audit_fold(fragment, update.fields["version"], pushes, checksum, plain)
            self._publish(fragment, pushes, update)
            answered = not update.unanswered
        update.checksum = checksum
        update.advance(params.numel())
        if answered:
            self._write_line(update.line)

    def _outer(self, version):
        """The outer step on a version of a fragment, unless it closes the run."""
        lr, momentum, warmup = (
            self.settings[name] for name in ("outer_lr", "outer_momentum", "momentum_warmup")
        )
        return {
            "lr": lr,
            "momentum": momentum_at(version, momentum, warmup),
            "nesterov": self.settings["nesterov"],
        }

    def _announce(self, fragment, pushes, buffer, changed, plain):
        """Let those that wait begin to send the update that is about to be made. Needs the lock."""
        self.step = max([self.step, *(push.step for push in pushes)])
        fields = {
            "fragment": fragment.index,
            "version": [self.incarnation, fragment.version + 1],
            "folded": {push.worker: push.seq for push in pushes},
            "plain": plain,
            "outer": self._outer(fragment.version + 1),
            "step": self.step,
        }
        waiting = [push for push in pushes if push.waiting]
        fragment.update = Update(fragment.label, buffer, fields, waiting, changed)
        for push in pushes:
            push.update = fragment.update
        self.lock.notify_all()
        return fragment.update

    def _publish(self, fragment, pushes, update):
        """Make a new version of a slice known. Needs the lock."""
        before = self.round
        fragment.origin, fragment.version = update.fields["version"]
        self.buffers = {**self.buffers, **update.buffers}
        for push in pushes:
            fragment.folded[push.worker] = push.seq
            member = self.members.get(push.worker)
            if push.closing and member and member.ticket == push.ticket:
                member.closed.add(fragment.index)  # it hears late, where it waits for another
            if push.buffer and push.worker in self.members:
                self.members[push.worker].room[fragment.index] = push.buffer
        fragment.busy = False
        self.last_round = update.line
        every = self.args.save_every
        if every and self.round // every > before // every:
            self.save_wanted.add("checkpoint")
        self.lock.notify_all()

    def _audit_fold(self, fragment, label, pushes, checksum, plain):
        named = [[p.worker, p.session, p.seq, p.steps, p.staleness] for p in pushes]
        counts = [bool(push.buffer and not push.refused) for push in pushes]
        protocol.audit(
            "fold",
            life=self.incarnation,
            fragment=fragment.index,
            base=fragment.label,
            label=label,
            pushes=list(itertools.compress(named, counts)),
            others=list(itertools.compress(named, [not count for count in counts])),
            plain=plain,
            checksum=bytes(checksum.tolist()).hex(),
        )

    def _round_line(self, fragment, pushes, counted, began, norm):
        """What rounds.jsonl and the status say of a round; the sending is added as it is done."""
        return {
            "time": round(time.time(), 3),
            "round": fragment.version + 1,
            "fragment": fragment.index,
            "members": sorted(self._pushers(fragment)),
            "staleness": {p.worker: p.staleness for p in counted if p.staleness},
            "steps": sum(push.steps for push in counted),
            "tokens": sum(push.tokens for push in counted),
            "losses": {push.worker: push.loss for push in pushes},
            "refused": [push.worker for push in pushes if push.refused],
            "closing": all(push.closing for push in pushes),
            "norm": norm,
            "bytes_up": sum(push.nbytes for push in pushes),
            "bytes_down": 0,
            "seconds_waiting": round(began - min(push.arrived for push in pushes), 4),
            "seconds_folding": round(time.monotonic() - began, 4),
            "seconds_sending": 0.0,
        }

    def _write_line(self, line):
        """Say a finished round, and append it to rounds.jsonl."""
        losses = [loss for loss in line["losses"].values() if loss is not None]
        mean = f"loss {sum(losses) / len(losses):.4f} | " if losses else ""
        place = f", fragment {line['fragment']}" if len(self.fragments) > 1 else ""
        log(
            f"round {line['round']}{place} | {len(line['losses'])} pushes | {mean}norm {line['norm']:.4g} "
            f"| waited {line['seconds_waiting']:.2f} s, folded {line['seconds_folding']:.2f} s, "
            f"sent {line['seconds_sending']:.2f} s | up {line['bytes_up'] / 1e6:.2f} MB, "
            f"down {line['bytes_down'] / 1e6:.2f} MB"
        )
        try:
            os.makedirs(self.output, exist_ok=True)
            with open(os.path.join(self.output, "rounds.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log(f"WARNING: cannot write rounds.jsonl: {error}")

    def _answer_push(self, conn, fragment, push):
        """Send the update that leads on from the pusher's version, or the slice in full."""
        with self.lock:
            update = fragment.update
            fields = {"refused": push.refused, "stale": push.stale, "staleness": push.staleness}
            if update and update.base == push.base:
                update.readers += 1
            else:
                update = None
        if update is None:
            return self._send_slice(conn, "push", fragment, fields)
        fields, before = {**update.fields, **fields}, conn.bytes_out
        specs, count = [Checksum.SPEC], 0
        if update.buffer is not None:
            specs, count = update.buffer.specs, self._slice(fragment, self.params).numel()
        try:
            pieces = update.pieces(CODECS[self.args.download_codec], count)
            specs = specs + protocol.specs_of_buffers(update.buffers)
            conn.send("push", fields, specs, itertools.chain(pieces, update.buffers.values()))
        finally:
            with self.lock:
                update.readers -= 1
                update.bytes_down += conn.bytes_out - before

    def _end_push(self, push):
        """A push has been answered, or its connection is gone: with the last one the round's line
        is complete."""
        with self.lock:
            push.waiting, update = False, push.update
            if update is None or push not in update.unanswered:
                return
            update.unanswered.remove(push)
            if line := update.line:
                line["bytes_down"] = update.bytes_down
                line["seconds_sending"] = round(time.monotonic() - update.made, 4)
            last = line and not update.unanswered
        if last:
            self._write_line(line)

    def _send_slice(self, conn, type, fragment, fields):
        """Reply with a slice in full and its checksum."""
        with self.hold(fragment):
            copy, label = self._slice(fragment, self.params).clone(), fragment.label
            folded = dict(fragment.folded)
            buffers = self.buffers if fragment is self.fragments[-1] else {}
        specs = [TensorSpec("slice", torch.float32, tuple(copy.shape)), Checksum.SPEC]
        fields = {**fields, "fragment": fragment.index, "version": label, "step": self.step}
        fields |= {"outer": self._outer(label[1]), "folded": folded}
        tensors = [copy, protocol.checksum_of(copy), *buffers.values()]
        conn.send(type, fields, specs + protocol.specs_of_buffers(buffers), tensors)

    def on_fetch(self, conn, message):
        """A slice in full, or the model's descriptive files (`"files": true`), or frozen tensors
        that are not those of -m (`"frozen": [names]`)."""
        message.expect([])
        if message.field("files", bool, False):
            raw = {
                name: torch.frombuffer(bytearray(text), dtype=torch.uint8)
                for name, text in self.files.items()
                if text
            }
            return conn.send("fetch", {}, protocol.specs_of(raw.items()), raw.values())
        if names := message.field("frozen", list, []):
            return self._send_frozen(conn, names)
        with self.lock:
            self._member(conn)
            fragment = self._fragment(message)
        self._send_slice(conn, "fetch", fragment, {})

    def _send_frozen(self, conn, names):
        """Tensors of -m that are not trained, in the dtypes that the worker has them in."""
        with self.lock:
            member = self._member(conn)
        found = matched(self.weights, member.frozen)
        wanted = set(map(str, names))
        specs = [member.frozen[name][0] for name in member.differs if name in wanted]
        with self._reading(member):
            conn.send("fetch", {}, specs, (found[s.name].to(s.dtype).contiguous() for s in specs))

    @contextlib.contextmanager
    def _reading(self, member):
        """Meanwhile a member may be silent; one that does not read ends the connection."""
        member.reading = True
        try:
            yield
        finally:
            member.heard, member.reading = time.monotonic(), False

    # --- What people ask ---

    def on_status(self, conn, message):
        """Everything that status.py shows."""
        message.expect([])
        now, shown = (
            time.monotonic(),
            ("id", "index", "host", "ranks", "step", "position", "sync_every", "loss"),
        )
        with self.lock:
            workers = [
                {
                    **{name: getattr(member, name) for name in shown},
                    "address": member.conn.peer,
                    "steps_per_second": round(member.steps_per_second, 3),
                    "heard_seconds_ago": round(now - member.heard, 1),
                }
                for member in sorted(self.members.values(), key=lambda member: member.index)
            ]
            everyone = [*self.members.values(), *self.joining.values()]
            awaited = {
                w for f in self.fragments if f.pushes for w in self._pushers(f) - f.pushes.keys()
            }
            fields = {
                "mode": "streaming" if len(self.fragments) > 1 else "sync",
                "state": self._state(),
                "min_workers": self.args.min_workers,
                "round": self.round,
                "step": self.step,
                "uptime_seconds": round(now - self.started, 1),
                "parameters": 0 if self.params is None else self.params.numel(),
                "workers_wanted": self.args.n,
                "expected": sorted(self.expected.keys() - self.joining.keys()),
                "workers": workers,
                "joining": sorted(self.joining),
                "awaited": sorted(awaited),
                "source": min((member.source for member in everyone), default=None),
                "shares": self.shares,
                "settings": self.settings,
                "upload_codec": self.args.upload_codec,
                "download_codec": self.args.download_codec,
                "fragments": [
                    {"version": f.version, "pushes": len(f.pushes)} for f in self.fragments
                ],
                "last_round": self.last_round,
                "output": os.path.abspath(self.output),
                "save_error": self.save_error,
                "incarnation": self.incarnation,
            }
        conn.send("status", fields)

    def _state(self):
        if self.reopening:
            return "waiting for workers to come back"
        if not self.running:
            return "waiting for workers"
        return "running" if len(self.members) >= self.args.min_workers else "too few workers"

    def on_save(self, conn, message):
        """Write a checkpoint soon."""
        message.expect([])
        with self.lock:
            self.save_wanted.add("checkpoint")
            self.lock.notify_all()
        conn.send("save")

    def on_stop(self, conn, message):
        """Tell all workers to finish: each sends what it has, takes the final model and leaves."""
        message.expect([])
        with self.lock:
            self.stopping = bool(self.members)
        log(f"{conn.peer} asks to stop: the workers are told to finish")
        conn.send("stop")


# --- The command line ----------------------------------------------------------------------------


def worker_environment(count):
    """The environment of one of `count` workers on this machine, which share its cores."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    return {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **os.environ}


class Spawn:
    """The workers that `--spawn` starts on this machine, and their output."""

    def __init__(self, server):
        self.server = server
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
        host = server.args.host or "127.0.0.1"
        address = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
        self.workers, self.readers = {}, []
        for name in (f"worker-{number}" for number in range(server.args.n)):
            command = [sys.executable, script, "--server", address, "--worker-id", name]
            process = self.workers[name] = subprocess.Popen(
                [*command, server.args.spawn],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=worker_environment(server.args.n),
                start_new_session=True,  # a Ctrl-C here is passed on once, not twice
                preexec_fn=_end_with_parent,
            )
            reader = threading.Thread(target=self._pass_on, args=[name, process])
            reader.start()
            self.readers.append(reader)

    def _pass_on(self, name, process):
        for line in process.stdout:
            print(f"{name}: {line.decode(errors='replace').rstrip()}", flush=True)
        if code := process.wait():
            log(f"{name} ended with exit code {code}")
            self.server.give_up(name)

    def wait(self):
        """Wait until all have ended, or the server is told to end; 0 if all went well."""
        ended, processes = self.server.ended, self.workers.values()
        while any(process.poll() is None for process in processes):
            begun = self.server.running or self.server.last_round
            if any(process.poll() for process in processes) and not begun:
                ended.set()  # it failed before the start: the others would wait for it for ever
            if ended.wait(0.2):
                self._stop()
        for reader in self.readers:
            reader.join()
        ended.set()
        return int(any(process.returncode for process in processes))

    def _stop(self):
        for number in (signal.SIGINT, signal.SIGKILL):
            left = [process for process in self.workers.values() if process.poll() is None]
            for process in left:
                process.send_signal(number)
            deadline = time.monotonic() + LEAVE_SECONDS
            for process in left:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))


def _end_with_parent():
    """In a spawned worker: end when the server is killed, so that its command can start anew."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def number(kind, low, high=float("inf")):
    """An argparse type: a finite number within bounds."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value < float("inf")):
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


# fmt: off
def parse_args(argv=None):
    """The command line; every option has a word on what it does."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, count, real = parser.add_argument, number(int, 0), number(float, 0)
    add("-m", "--model", required=True, metavar="DIR",
        help="the run's folder, a pretrained model (folder or file), or a new folder")
    add("-n", type=number(int, 1), default=1, help="workers that a new run starts with")
    add("--spawn", metavar="CONFIG", help="start the -n workers here too, and end with them")
    add("--host", default="", help="address to listen on (all interfaces)")
    add("--port", type=number(int, 0, 65535), default=protocol.PORT, help="(%(default)s)")
    add("--output-dir", metavar="DIR", help="where checkpoints go (-m itself, or DIR-diloco where "
        "-m holds weights that this program did not write)")
    add("--outer-lr", type=real, help="(0.7, or the resumed run's)")
    add("--outer-momentum", type=number(float, 0, 0.9999), help="(0.9, or the resumed run's)")
    add("--no-nesterov", dest="nesterov", action="store_false", default=None, help="plain momentum")
    add("--no-momentum-warmup", dest="momentum_warmup", action="store_false", default=None,
        help="full momentum from the first round on, as in the paper")
    add("--upload-codec", choices=CODECS, default="bf16", help="of pseudo-gradients (%(default)s)")
    add("--download-codec", choices=CODECS, default="bf16", help="of updates (%(default)s)")
    add("--no-error-feedback", dest="error_feedback", action="store_false",
        help="do not add what rounding lost to the next message (to measure what that is worth)")
    add("--max-model-gb", type=real, default=16.0, help="largest model, as float32 (%(default)s)")
    add("--save-every", type=count, default=10, metavar="ROUNDS", help="(10) 0: only at the end")
    add("--save-total-limit", type=number(int, 1), default=3, help="checkpoints kept (%(default)s)")
    add("--shares", type=number(int, 1), help="parts that the text is cut into (n, at least 8)")
    add("--worker-timeout", type=number(float, 1), default=30.0, metavar="SECONDS",
        help="a worker not heard of for so long is no longer waited for (%(default)s)")
    add("--round-timeout", type=real, default=0.0, metavar="SECONDS",
        help="close a round so long after its first push without those that are late (0: never)")
    add("--min-workers", type=number(int, 1), default=1,
        help="rounds wait for more workers below so many (%(default)s)")
    add("--max-staleness", type=count, default=10, metavar="ROUNDS",
        help="a push so late still counts; one that is later is dropped (%(default)s)")
    add("--until-done", action="store_true", help="end when the last worker has left")
    args = parser.parse_args(argv)
    if args.spawn and not os.path.isfile(args.spawn):
        parser.error(f"--spawn: there is no file {args.spawn}")
    return args
# fmt: on


if __name__ == "__main__":
    code = Server(parse_args()).run()
    sys.stdout.flush()
    os._exit(code)  # all is saved; threads that still serve peers must not meet a dying interpreter
