"""The wire: frames, files, connections, tensor codecs, and a model as one flat vector.

Notable:
- A message is exactly a safetensors file: an 8-byte little-endian header length, a JSON header,
  the raw bytes. Its own fields are one JSON string under `__metadata__["diloco"]`. Checkpoints are
  written and read by the same code, and nothing is ever pickled.
- Tensor bytes go from a tensor's memory to the socket, and from the socket into a tensor's memory.
- A header is checked before one byte of payload is read, and nothing is allocated for a payload
  that has not been checked.
- A stall is a lack of progress in bytes, never a total time: a slow transfer that moves is fine.

A malformed message is answered with an `error` message that names the broken rule, and then the
connection ends. The rules stand in `parse_header` and `Message.field`, one line each.

The requests of version 3, in which a Version travels as [life, number] and a Fate as a list too:

    request    carries                                     reply
    hello      protocol version, worker id, session        hello: protocol version, session
    join       manifest, settings, host; by slice the      join: place in the run, settings, heads,
               version held and what is folded in it       slice to push first and in how many steps;
                                                           or bring: slices that it shall upload
    bring      those slices in full, descriptive files     as join
    push       slice, seq, base, steps, closing; the       push: taken, or listed already
               encoded pseudo-gradient or nothing
    pull       slice, version held, seq of the push that   entry (each with its checksum, all but the
               is waited for, or 0 to catch up             last with `more`), slice, again or current
    fetch      names of frozen tensors, or `files`         fetch: those
    heartbeat  step, position, speed, loss, the push       heartbeat: round, rank, world, members,
               that training waits for                     orders
    leave, status, save, stop                              an answer of the same name

While a join or pull has to wait, the server sends `wait` messages that say for whom. A push, pull,
heartbeat or leave of somebody who is not a member is answered with the error code `rejoin`.

Needs torch and nothing else, so that it can be copied into other projects.
"""

import bisect
import contextlib
import ctypes
import fcntl
import glob
import hashlib
import ipaddress
import itertools
import json
import math
import os
import pickle
import re
import secrets
import select
import shutil
import socket
import struct
import termios
import threading
import time
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

import torch

PROTOCOL_VERSION = 3
PORT = 8512
MAX_HEADER_BYTES = 16 << 20  # a manifest of 100,000 tensors takes about 10 MiB
MAX_HELLO_BYTES = 64 << 10  # longest header that is read from a peer before its hello
MAX_FILES_BYTES = 64 << 20  # all descriptive files together; the largest tokenizers are near 35 MB
MAX_DISCARD_BYTES = 64 << 20  # most that is read after an error, so that the sender sees the reason
HELLO_SECONDS = 10.0  # time that a peer has for its hello after connecting
STALL_SECONDS = 60.0  # time without a byte after which the peer or the line counts as gone
# A peer that lost its power says nothing. After 30 s without a byte the system asks it every 10 s,
# and after three questions without an answer, or a minute in which it took no byte, the line is
# dead.
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
WAIT_SECONDS = 5.0  # how often the server says that it is still waiting for others
# Elements that are worked on at once: 2 MiB of float32. Smaller chunks would fit in a nearer cache,
# but the threads of a process hand Python's lock to each other with every operation on a chunk.
CHUNK = 1 << 19
BLOCK = 64  # numbers that share a scale in int8 and int4: chosen with tests/bench_codecs.py
MAX_ABS = 1e30  # larger numbers count as not finite: the sum of a million numbers is finite, too
MAX_FATES = 2000  # workers whose newest push one slice remembers

# The descriptive files that may travel with a model. Nothing else is ever written by name.
FILE_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ProtocolError(Exception):
    """A message or file breaks a rule of the format; the text says which."""


class Refused(Exception):
    """A request was rejected for good: sending it again cannot succeed.

    `code` is one word for programs: address, busy, version, id, setting, model, size, stopping,
    rejoin, protocol.
    """

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def is_audited():
    """Whether somebody wants to read what `audit` writes."""
    return bool(os.environ.get("DILOCO_AUDIT"))


def audit(event, **facts):
    """Append a line of JSON to the file that DILOCO_AUDIT names, if any. From these lines a test
    tells afterwards that no push was lost or counted twice (tests/chaos.py)."""
    if path := os.environ.get("DILOCO_AUDIT"):
        line = json.dumps({"time": time.time(), "pid": os.getpid(), "event": event, **facts})
        with contextlib.suppress(OSError):  # a full disk ends no thread
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line.encode() + b"\n")
            finally:
                os.close(handle)


# --- Positions in the log ---------------------------------------------------------------------
#
# The global model is a log: entry v of a slice's log is the update that led from version v - 1 to
# version v. A replica is a position in the log, and the fate of a push is what an entry says of it.


class Version(NamedTuple):
    """A position in the log of a slice. Versions sort: no numbers at all come before a worker's own
    start, that before the weights of `-m`, those before whatever a run has made. Lives sort by the
    time they began."""

    life: str  # names the opening of a run in which the entry was made
    number: int  # entries that led there


NONE, FRESH, WEIGHTS = Version("", -1), Version("", 0), Version("", 1)


class Fate(NamedTuple):
    """How the newest push of a worker that an entry lists came out."""

    seq: int  # sequence number of that push
    refused: str  # why its numbers were left out, or "" where they were folded
    round: int  # number of the version that the entry led to


def version_of(value):
    """A Version from untrusted JSON, [life, number]. Raises ProtocolError."""
    match value:
        case [str(life), int(number)] if type(number) is int and -1 <= number < 1 << 53:
            if re.fullmatch("[0-9a-f]{20}", life) or (life == "" and number <= WEIGHTS.number):
                return Version(life, number)
    raise ProtocolError(f"{str(value)[:80]} is not a version")


def new_life(after=""):
    """An id for one opening of a run. Ids sort by the time that they begin with, past `after`, so
    that of two versions the one from the later life is the newer."""
    begun = max(time.time_ns() // 1_000_000, int(after[:12] or "0", 16) + 1)
    return f"{begun:012x}{secrets.token_hex(4)}"


def fates_of(value):
    """{worker id: Fate} from untrusted JSON. Raises ProtocolError."""
    if type(value) is not dict or len(value) > MAX_FATES:
        raise ProtocolError(f"a list of pushes is not an object of at most {MAX_FATES} entries")
    fates = {}
    for worker, fate in value.items():
        match fate:
            case [int(seq), str(refused), int(round)] if _is_count(seq) and _is_count(round):
                if len(worker) <= 256 and len(refused) <= 256 and refused.isprintable():
                    fates[worker] = Fate(seq, refused, round)
        if worker not in fates:
            raise ProtocolError(f"{str(fate)[:80]} is not [sequence number, refusal, round]")
    return fates


def recent(fates, version, max_staleness, keep=()):
    """The fates that a push which is not too old can still ask for, and those of the ids in
    `keep`."""
    oldest = version.number - max_staleness
    return {w: fate for w, fate in fates.items() if fate.round >= oldest or w in keep}


def momentum_at(number, momentum, warmup):
    """The outer momentum of the step that follows version `number`: min(momentum, r / (r + 3)) in
    round r = 0, 1, ... while it warms up."""
    return min(momentum, number / (number + 3)) if warmup else momentum


# --- Frames ---------------------------------------------------------------------------------
#
# A frame is the length of a JSON header, the header, and the bytes of the tensors that the header
# names, one after the other: a safetensors file. `encode_header` writes every header, on the wire
# and on the disk, and `parse_header` reads every header. A header from outside is untrusted: each
# value is checked before anything is worked out from it, allocated or read.


class TensorSpec(NamedTuple):
    """The name, dtype and shape of one tensor, as a header has them."""

    name: str
    dtype: torch.dtype
    shape: tuple

    @property
    def numel(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.numel * self.dtype.itemsize


def payload_bytes(specs):
    """The bytes that follow a header with these tensors."""
    return sum(spec.nbytes for spec in specs)


def encode_header(fields, specs, **metadata):
    """The length and the JSON header of a frame, padded to a multiple of 8 bytes.

    `fields` is any JSON object; `metadata` are further strings for `__metadata__`. Raises
    ProtocolError when the header would be longer than MAX_HEADER_BYTES.
    """
    header = {"__metadata__": {"diloco": json.dumps(fields, allow_nan=False), **metadata}}
    start = 0
    for spec in specs:
        end = start + spec.nbytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(raw):,} bytes is over {MAX_HEADER_BYTES:,}")
    return struct.pack("<Q", len(raw)) + raw


def _unique(pairs):
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name stands twice in one object")
    # A text with half of a surrogate pair is not UTF-8: encoding it raises a ValueError.
    "".join([*keys, *(v for v in keys.values() if isinstance(v, str))]).encode()
    return keys


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def parse_json(raw, what):
    """A JSON object from untrusted bytes or text. Raises ProtocolError."""
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes | bytearray) else raw
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is not a JSON object")
    return value


def _is_count(value):
    return type(value) is int and 0 <= value < 1 << 53


def parse_entry(name, entry):
    """(first byte, last byte, spec) of a tensor from its entry in a header. Raises
    ProtocolError."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ProtocolError(f"tensor {name!r}: needs dtype, shape and data_offsets, no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ProtocolError(f"tensor {name!r}: dtype {dtype!r} is not one of {list(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_count, shape)):
        raise ProtocolError(f"tensor {name!r}: the shape is not a list of up to 32 counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ProtocolError(f"tensor {name!r}: data_offsets is not a pair of counts")
    spec = TensorSpec(name, DTYPES[dtype], tuple(shape))
    if spec.nbytes != offsets[1] - offsets[0]:
        raise ProtocolError(
            f"tensor {name!r}: {dtype} {shape} takes {spec.nbytes} bytes, but data_offsets "
            f"spans {offsets[1] - offsets[0]}"
        )
    # torch computes the product of the sizes even where one of them is 0, and must not overflow.
    if math.prod(filter(None, shape)) >= 1 << 53:
        raise ProtocolError(f"tensor {name!r}: the counts of shape {shape} are too large")
    return offsets[0], offsets[1], spec


def check_ranges(entries):
    """Check that tensors, as (first byte, last byte, spec), fill a payload in their order. Raises
    ProtocolError."""
    end = 0
    for first, last, spec in entries:
        if first != end:
            raise ProtocolError(
                f"tensor {spec.name!r}: its bytes begin at {first}, not where the one before "
                f"ends, at {end}: ranges must be in order, without overlap or gap"
            )
        end = last


def parse_header(raw, in_order=True):
    """Check a header and return (fields, specs), the specs in the order of their bytes.

    With `in_order` (the wire) the header must name the tensors in that order; files by other
    programs may name them in any. Raises ProtocolError, whose text names the broken rule.
    """
    if raw[:1] != b"{":
        raise ProtocolError("the header does not begin with '{'")
    header = parse_json(raw, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ProtocolError("__metadata__ is not an object of strings")
    fields = parse_json(metadata.get("diloco", "{}"), "the diloco field")
    entries = [parse_entry(name, entry) for name, entry in header.items()]
    if not in_order:
        entries.sort(key=lambda entry: entry[:2])
    check_ranges(entries)
    return fields, [spec for _, _, spec in entries]


def header_length(raw):
    """The length of the header that follows these 8 bytes. Raises ProtocolError if it is out of
    range."""
    (length,) = struct.unpack("<Q", raw)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ProtocolError(
            f"a header of {length:,} bytes (allowed: 2 to {MAX_HEADER_BYTES:,}); "
            "is this peer speaking DiLoCo?"
        )
    return length


def memory(tensor):
    """The bytes of a contiguous CPU tensor: a writable memoryview of its own memory, no copy."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("only a contiguous tensor on the CPU has its bytes in one place")
    if tensor.numel() == 0:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # the view must not outlive the memory
    return memoryview(array).cast("B")


class Payload:
    """Memory for the payload of one frame: `raw` holds its bytes, `tensors` views them by name.

    `pinned` memory is copied fast to and from a GPU. A payload on another `device` than the CPU
    cannot be sent or received.
    """

    def __init__(self, specs, device="cpu", pinned=False):
        self.specs = list(specs)
        size = payload_bytes(self.specs)
        # Zeros make the system hand out the memory now and not in the midst of a round.
        self.raw = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.tensors = {}
        start = 0
        for spec in self.specs:
            part = self.raw[start : start + spec.nbytes]
            self.tensors[spec.name] = part.view(spec.dtype).view(spec.shape)
            start += spec.nbytes


# --- Files ----------------------------------------------------------------------------------
#
# A file is written whole or not at all: beside its place, synced, then renamed. It is read by
# mapping, so that weights of many gigabytes cost memory only where they are used. A header that
# announces more or fewer bytes than the file has tells of a write that a crash has cut.


def write_frame(file, fields, specs, tensors, **metadata):
    """Write one frame to an open binary file. `tensors`: CPU tensors whose bytes, one after the
    other, are the payload that `specs` announces; the tensors are taken one at a time."""
    file.write(encode_header(fields, specs, **metadata))
    left = payload_bytes(specs)
    for tensor in tensors:
        left -= file.write(memory(tensor))
    if left:
        raise ValueError(f"the tensors differ from their specs by {left} bytes")


def read_file_header(file, in_order=False, whole=True):
    """(fields, specs) of the frame in an open binary file, which then stands at its payload.

    Raises ProtocolError also where the file is shorter or longer than its header says, unless
    `whole` is False.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise ProtocolError(f"{file.name}: too short to be a safetensors file")
    length = header_length(start)
    if 8 + length > size:
        raise ProtocolError(f"{file.name}: ends within its header")
    fields, specs = parse_header(file.read(length), in_order)
    if whole and 8 + length + payload_bytes(specs) != size:
        raise ProtocolError(
            f"{file.name}: {size:,} bytes, but its header announces "
            f"{8 + length + payload_bytes(specs):,}: the file is not whole"
        )
    return fields, specs


def sync_folder(folder):
    """Make renames within a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_beside(path, write):
    """Write a file as a whole or not at all: `write(file)` fills a file beside it, which is
    synced, then renamed. On an error the file beside is removed and `path` is as it was."""
    beside = f"{path}.tmp-{os.getpid()}"
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.unlink(beside)
        raise
    sync_folder(os.path.dirname(os.path.abspath(path)))


def save_file(path, tensors, fields=None):
    """Write named tensors (on any device) as a safetensors file, whole or not at all."""
    specs = specs_of(tensors.items())
    cpu = (tensor.detach().cpu().contiguous() for tensor in tensors.values())
    write_beside(path, lambda file: write_frame(file, fields or {}, specs, cpu, format="pt"))


def load_file(path):
    """(fields, {name: CPU tensor}) of a safetensors file. Raises ProtocolError, OSError.

    The tensors are views of the mapped file, private to this process: a tensor costs memory and
    time when it is read, not before.
    """
    with open(path, "rb") as file:
        fields, specs = read_file_header(file)
        start = file.tell()
    size = start + payload_bytes(specs)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for spec in specs:
        raw = mapped[start : start + spec.nbytes]
        if start % spec.dtype.itemsize:  # other programs may lay tensors at any byte
            raw = raw.clone()
        tensors[spec.name] = raw.view(spec.dtype).view(spec.shape)
        start += spec.nbytes
    return fields, tensors


def load_folder(path):
    """{name: CPU tensor} of a weights file, or of a folder in the Hugging Face layout: one
    safetensors file, shards with an index, or `pytorch_model.bin` (plain tensors only). Files are
    mapped, not read. Raises ProtocolError or OSError with one line where they cannot be used."""
    weights = {}
    for file in weight_files(path):
        try:
            if file.endswith(".bin"):
                mapped = zipfile.is_zipfile(file)  # torch before 1.6 wrote files of another kind
                weights |= torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            else:
                weights |= load_file(file)[1]
        except (OSError, ProtocolError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            text = " ".join(str(error).split())
            raise ProtocolError(f"cannot use the weights in {file}: {text}") from None
    return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}


def weight_files(path):
    """The paths of the files that hold the weights of a file or folder. Raises ProtocolError."""
    if os.path.isfile(path):
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = os.path.join(path, name)
        if os.path.isfile(file + ".index.json"):
            try:
                with open(file + ".index.json", encoding="utf-8") as index:
                    shards = sorted(set(json.load(index)["weight_map"].values()))
                if any(os.path.basename(shard) != shard or shard in ("", "..") for shard in shards):
                    raise ValueError("it names files outside its folder")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ProtocolError(f"cannot use {file}.index.json: {error!r}") from None
            return [os.path.join(path, shard) for shard in shards]
        if os.path.isfile(file):
            return [file]
    found = sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
    if not found:
        others = foreign_weights(path)
        hint = f"; name one of {others}" if others else ""
        raise ProtocolError(f"{path} has no weights of its own{hint}")
    return found


def is_ours(path):
    """Whether this program wrote the safetensors file at `path`. The file may be incomplete."""
    try:
        with open(path, "rb") as file:
            return read_file_header(file, whole=False)[0].get("program") == "diloco"
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
    """Remove a checkpoint. It is renamed first, so that a crash never leaves half a checkpoint
    under its name."""
    old = os.path.join(os.path.dirname(checkpoint), ".tmp-checkpoint-old")
    os.rename(checkpoint, old)
    shutil.rmtree(old, ignore_errors=True)


def foreign_weights(folder):
    """The weight files in a folder, or in its checkpoint folders, by another program than this."""
    patterns = ("*.safetensors", "*.bin", "checkpoint-*/*.safetensors", "checkpoint-*/*.bin")
    paths = [p for g in patterns for p in glob.glob(os.path.join(glob.escape(folder), g))]
    return [path for path in paths if not is_ours(path)]


def read_descriptive_files(folder):
    """{name: bytes} of the descriptive files (FILE_NAMES) in a folder. Raises ProtocolError where
    they are too large."""
    files = {}
    for name in FILE_NAMES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                files[name] = file.read(MAX_FILES_BYTES + 1)
    if sum(map(len, files.values())) > MAX_FILES_BYTES:
        raise ProtocolError(f"{folder}: its descriptive files are over {MAX_FILES_BYTES:,} B")
    return files


def matched(weights, names):
    """{name: tensor} of those of a worker's tensors that some weights hold: under the same name;
    under the name without an adapter's wrappers (peft puts `base_model.model.` before the name and
    `.base_layer` into it); or without the first part of the name, as in the file of a bare Hugging
    Face model, if all unmatched names share that first part."""
    found, bare = {}, {}
    for name in names:
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        first, _, rest = plain.partition(".")
        if name in weights or plain in weights:
            found[name] = weights[name if name in weights else plain]
        elif rest in weights:
            bare.setdefault(first, {})[name] = weights[rest]
    return found | (next(iter(bare.values())) if len(bare) == 1 else {})


def file_sizes_of(sizes):
    """{name: size in bytes} of the descriptive files that a worker uploads. Raises ProtocolError."""
    for name, size in sizes.items():
        if name not in FILE_NAMES or type(size) is not int or size < 0:
            raise ProtocolError(f"bring: file {name!r} is not one of {FILE_NAMES}")
    if sum(sizes.values()) > MAX_FILES_BYTES:
        raise ProtocolError(f"bring: the files are over {MAX_FILES_BYTES:,} bytes")
    return sizes


# --- Connections ----------------------------------------------------------------------------
#
# A connection carries requests and replies by turns and belongs to one thread at a time. A peer
# proves that it is alive by moving bytes, however slowly; while the server waits for others it
# sends `wait` messages instead of the reply. Until a peer has said hello, hardly anything is read
# from it, and a peer that breaks a rule hears which rule before its connection ends.

REQUIRED = object()


@dataclass
class Message:
    """A received header. Its payload, if any, waits in the connection to be read."""

    type: str
    fields: dict
    specs: list

    def field(self, name, kind, default=REQUIRED, low=0, high=1 << 53):
        """A checked field: `kind` is int, float, str, bool, list or dict; numbers lie within
        `low` and `high`, texts are of at most 256 printable characters. Raises ProtocolError."""
        value = self.fields.get(name)
        if value is None and default is not REQUIRED:
            return default
        if kind is float and type(value) is int and abs(value) <= 1 << 53:
            value = float(value)
        good = type(value) is kind
        if good and kind in (int, float):
            good = low <= value <= high
        if good and kind is str:
            good = len(value) <= 256 and (value.isprintable())
        if not good:
            shown = repr(value)[:80]
            raise ProtocolError(
                f"{self.type}: field {name!r} is {shown}, not a valid {kind.__name__}"
            )
        return value

    def expect(self, specs):
        """Raise ProtocolError unless the payload is announced as exactly these tensors."""
        specs = list(specs)
        if self.specs != specs:
            shown = ", ".join(describe(spec) for spec in self.specs[:4]) or "nothing"
            wanted = ", ".join(describe(spec) for spec in specs) or "nothing"
            raise ProtocolError(f"{self.type}: carries {shown}; expected {wanted}")


def describe(spec):
    """A tensor in words, as `name F32[3, 4]`."""
    return f"{spec.name} {DTYPE_NAMES[spec.dtype]}{list(spec.shape)}"


class Connection:
    """One TCP connection that carries frames, for one thread at a time.

    Every method raises ConnectionError when the peer is gone or no byte has moved for `stall`
    seconds, and ProtocolError when the peer breaks a rule.
    """

    def __init__(self, sock, peer, stall=STALL_SECONDS):
        self.sock, self.peer, self.stall = sock, peer.removeprefix("::ffff:"), stall
        self.worker = "", ""  # (worker id, session) that the peer has said hello with
        self.max_header = MAX_HEADER_BYTES
        self.unread = 0  # payload bytes of the last message that are still in the socket
        self.bytes_in = self.bytes_out = 0
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, type, fields=None, specs=(), tensors=()):
        """Send a message whose payload is the bytes of `tensors` (CPU, contiguous), one after the
        other, as `specs` announces them. The tensors are taken one at a time, so a generator may
        make them on the way."""
        header = encode_header({"type": type, **(fields or {})}, specs)
        left = payload_bytes(specs)
        views = [memoryview(header)]
        for tensor in tensors:
            left -= tensor.nbytes
            views.append(memory(tensor))
            self._send_all(views)
            views = []
        self._send_all(views)
        if left:
            raise ValueError(f"the tensors differ from their specs by {left} bytes")

    def _send_all(self, views):
        # socket.sendall has a timeout for the whole, but a slow transfer is not a stall.
        self.sock.settimeout(self.stall)
        while views:
            try:
                sent = self.sock.sendmsg(views)
            except TimeoutError:
                raise ConnectionError(f"{self.peer} took no byte for {self.stall:.0f} s") from None
            self.bytes_out += sent
            while views and sent >= views[0].nbytes:
                sent -= views.pop(0).nbytes
            if views:
                views[0] = views[0][sent:]

    def receive(self, idle):
        """The next message's header. `idle`: seconds to wait for its first byte, None for ever."""
        if self.unread:
            raise RuntimeError(f"{self.unread} bytes of the last message have not been read")
        start = bytearray(8)
        self._receive_into(memoryview(start), idle)
        length = header_length(start)
        if length > self.max_header:
            raise ProtocolError(f"a header of {length:,} bytes before the peer has said hello")
        raw = bytearray()
        while len(raw) < length:  # grows with what arrives, not with what was announced
            part = bytearray(min(length - len(raw), 1 << 16))
            self._receive_into(memoryview(part), self.stall)
            raw += part
        fields, specs = parse_header(bytes(raw))
        self.unread = payload_bytes(specs)
        type = fields.pop("type", None)
        if not isinstance(type, str) or len(type) > 32:
            raise ProtocolError("a message without a type")
        return Message(type, fields, specs)

    def read(self, tensor):
        """Fill a contiguous CPU tensor from the payload of the last message."""
        if tensor.nbytes > self.unread:
            raise RuntimeError(f"{tensor.nbytes} bytes wanted, {self.unread} are left")
        self._receive_into(memory(tensor), self.stall)
        self.unread -= tensor.nbytes

    def _receive_into(self, view, idle):
        self.sock.settimeout(idle)
        unsent = self._unsent()
        while view.nbytes:
            try:
                count = self.sock.recv_into(view)
            except TimeoutError:
                before, unsent = unsent, self._unsent()
                if unsent < before:  # on a slow line our own last message is still on its way
                    continue
                seconds = self.sock.gettimeout() or 0  # 0: the keep-alive noticed
                raise ConnectionError(f"{self.peer} sent no byte for {seconds:.0f} s") from None
            if not count:
                raise ConnectionError(f"{self.peer} closed the connection")
            if self.sock.gettimeout() != self.stall:  # settimeout is a system call every time
                self.sock.settimeout(self.stall)
            self.bytes_in += count
            view = view[count:]

    def _unsent(self):
        """The number of bytes sent that the peer's system has not acknowledged."""
        try:
            return struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))[0]
        except OSError:  # this system does not tell
            return 0

    def discard(self):
        """Read the payload of the last message and throw it away."""
        sink = torch.empty(1 << 16, dtype=torch.uint8)
        while self.unread:
            self.read(sink[: min(self.unread, sink.numel())])

    def request(self, type, fields=None, specs=(), tensors=(), on_wait=None):
        """Send a request and return the first message of its reply, as `reply` does."""
        try:
            self.send(type, fields, specs, tensors)
        except ConnectionError:
            self._raise_last_words()
            raise
        return self.reply(on_wait)

    def reply(self, on_wait=None):
        """The next message of a reply, past any `wait` messages (the fields of each are passed to
        `on_wait`). Raises Refused when the reply is an `error`."""
        while True:
            reply = self.receive(self.stall)
            if reply.type == "wait":
                if on_wait:
                    on_wait(reply.fields)
            elif reply.type == "error":
                self._raise_refused(reply)
            else:
                return reply

    def _raise_refused(self, reply):
        text = reply.fields.get("message", "refused without a reason")
        raise Refused(reply.fields.get("code", ""), f"server {self.peer}: {text}")

    def _raise_last_words(self):
        # A server that refuses in the middle of our payload says why before it hangs up.
        try:
            reply = self.receive(idle=1.0)
        except (OSError, ProtocolError):
            return
        if reply.type == "error":
            self._raise_refused(reply)

    def greet(self, fields):
        """The server's side of hello: check who is there, note (worker id, session) as `worker`,
        both empty for a peer that only looks, and answer with `fields`."""
        address = ipaddress.ip_address(self.peer.partition("%")[0])
        if not (address.is_loopback or address.is_private):
            raise Refused(
                "address",
                f"{address} is neither a loopback nor a private address, and this server cannot "
                "yet tell friend from stranger; connect through a VPN or an ssh tunnel",
            )
        self.max_header = MAX_HELLO_BYTES
        hello = self.receive(idle=HELLO_SECONDS)
        if hello.type != "hello":
            raise ProtocolError(f"the first message is {hello.type!r}, not 'hello'")
        hello.expect([])
        version = hello.field("protocol", int)
        if version != PROTOCOL_VERSION:
            raise Refused(
                "version",
                f"this server speaks version {PROTOCOL_VERSION} of the protocol, you {version}; "
                "take the same version of the files on both machines",
            )
        if name := hello.field("worker", str, ""):
            self.worker = name, hello.field("session", str)
            self.max_header = MAX_HEADER_BYTES
        self.send("hello", {"protocol": PROTOCOL_VERSION, **fields})

    def refuse(self, error):
        """Tell the peer why, then read on for a while: otherwise TCP's reset may discard the
        message before the peer reads it."""
        with contextlib.suppress(OSError, ProtocolError):
            self.stall = 2.0
            self.send("error", {"message": str(error), "code": getattr(error, "code", "protocol")})
            self.sock.shutdown(socket.SHUT_WR)
            self.unread = MAX_DISCARD_BYTES
            self.discard()

    def hang_up(self):
        """End the conversation, also from another thread than the one that uses the connection, which
        meets a ConnectionError."""
        with contextlib.suppress(OSError):  # the peer may have closed it already
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        """End the conversation and close the socket."""
        self.hang_up()
        self.sock.close()

    def closed_by_peer(self):
        """Whether the peer has hung up, as far as this side knows; moves no byte."""
        try:
            poller = select.poll()  # recv alone would wait in spite of its flags
            poller.register(self.sock, select.POLLIN)
            return bool(poller.poll(0)) and self.sock.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):  # a closed socket has no number to register
            return True


def parse_address(text, port=PORT):
    """("host", port) from "host", "host:port", "[v6]:port" or a bare IPv6 address."""
    bracketed, named = r"\[([\w:.%-]+)\](?::(\d+))?", r"([\w.-]+)(?::(\d+))?"
    match = re.fullmatch(rf"{bracketed}|{named}|((?:[\w.%]*:){{2,}}[\w.%-]*)", text)
    host = match and (match[1] or match[3] or match[5])
    number = int(match[2] or match[4] or port) if match else 0
    if not 0 < number < 65536:
        raise ValueError(f"{text!r} is not an address; write host:port, for example host:{PORT}")
    return host, number


def connect(server, session_fields, timeout=10.0):
    """Connect to "host:port", say hello and return (Connection, the server's hello fields).

    `session_fields`: worker id and session, or {} for a peer that only looks. Raises OSError
    when there is nobody, Refused when the server says no.
    """
    host, port = parse_address(server)
    conn = Connection(socket.create_connection((host, port), timeout), server)
    try:
        reply = conn.request("hello", {"protocol": PROTOCOL_VERSION, **session_fields})
    except BaseException:
        conn.close()
        raise
    return conn, reply.fields


# --- The model as one flat vector -----------------------------------------------------------
#
# The tensors of the manifest, laid end to end, are one float32 vector, and every N-th element of it
# is a fragment. Server and workers work on fragments chunk by chunk, whatever the tensors' shapes,
# dtypes and devices; FlatModel translates between a chunk and the parameters that it overlaps.


def specs_of(named_tensors):
    """The manifest of (name, tensor) pairs, in their order."""
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in named_tensors]


def manifest_to_json(specs):
    """The manifest as [[name, dtype, shape], ...]."""
    return [[spec.name, DTYPE_NAMES[spec.dtype], list(spec.shape)] for spec in specs]


def manifest_from_json(listed, trained=True):
    """The specs of an untrusted manifest. Raises ProtocolError where a name stands twice. A
    manifest of what is `trained` must have at least one tensor, and only floating-point ones."""
    try:
        for name, _, shape in listed:  # before anything is multiplied
            if not isinstance(name, str) or len(shape) > 32 or not all(map(_is_count, shape)):
                raise ValueError("a tensor needs a name and a shape of up to 32 counts")
        specs = [TensorSpec(name, DTYPES[dtype], tuple(shape)) for name, dtype, shape in listed]
        parse_header(encode_header({}, specs)[8:])
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ProtocolError(f"the manifest is malformed: {error!r}") from None
    if (trained and not specs) or len({spec.name for spec in specs}) != len(specs):
        raise ProtocolError("the manifest is empty or names a tensor twice")
    for spec in specs:
        if trained and not spec.dtype.is_floating_point:
            raise ProtocolError(f"the manifest has {describe(spec)}, which is not floating-point")
    return specs


def frozen_of(listed):
    """{name: (spec, fingerprint)} of what a worker says of its frozen tensors. Raises
    ProtocolError."""
    for entry in listed:
        mark = str(entry[3]) if type(entry) is list and len(entry) == 4 else ""
        if not re.fullmatch("[0-9a-f]{32}", mark):
            raise ProtocolError("a frozen tensor is not [name, dtype, shape, fingerprint]")
    specs = manifest_from_json([entry[:3] for entry in listed], trained=False)
    return {spec.name: (spec, entry[3]) for spec, entry in zip(specs, listed, strict=True)}


def explain_mismatch(server, worker):
    """A text that says how a worker's tensors differ from the server's in name or shape, or ""."""
    ours = {spec.name: spec for spec in server}
    theirs = {spec.name: spec for spec in worker}
    faults = [
        f"tensor {name!r} is {list(ours[name].shape)} on the server and {list(spec.shape)} here"
        for name, spec in theirs.items()
        if name in ours and spec.shape != ours[name].shape
    ]
    faults += [
        f"tensor {n!r} {list(s.shape)} of the server is missing here"
        for n, s in ours.items()
        if n not in theirs
    ]
    faults += [
        f"tensor {n!r} {list(s.shape)} is not in the server's model"
        for n, s in theirs.items()
        if n not in ours
    ]
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more


def fingerprint(tensor):
    """32 hexadecimal digits that tell a tensor's bits from others': BLAKE2b over its elements, row
    by row. A thread hashes about 1 GB/s, and other threads run meanwhile."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in tensor.detach().reshape(-1).split(CHUNK):
        digest.update(memory(piece.cpu()))
    return digest.hexdigest()


def fragment_of(vector, k, count):
    """Fragment k of `count`: a view of every count-th element of a flat vector, from the k-th on.

    All have the same size, to an element, and each has its part of every tensor. Cut into runs
    instead, the model learns less well: 0.5% of the loss with four fragments (tests/parity.py).
    """
    return vector[k::count]


def ranges(specs):
    """The (spec, start, stop) of each tensor in the flat vector, in elements."""
    start = 0
    for spec in specs:
        yield spec, start, start + spec.numel
        start += spec.numel


def fill(tensor, inside, values):
    """Set the elements of a tensor that a slice of them in row order names, whatever the tensor's
    dtype, device and memory layout."""
    if tensor.is_contiguous():
        tensor.view(-1)[inside].copy_(values)
    else:
        flat = tensor.reshape(-1)  # a copy in row order
        flat[inside].copy_(values)
        tensor.copy_(flat.view(tensor.shape))


class FlatModel:
    """Parameters, wherever they live and whatever their dtype, seen as one flat float32 vector, or
    as a fragment of that: every `stride`-th element, from the `first` on.

    `parameters`: tensors in the order of the manifest. Elements are addressed as in the manifest,
    row by row, even where a tensor's memory is laid out in another order.
    """

    def __init__(self, parameters, first=0, stride=1):
        self.parts = []  # (parameter, first place in the vector, last, first element)
        self.stride = stride
        self.writes = 0  # calls of `write`
        start = -first
        for parameter in parameters:
            low = -(-max(start, 0) // stride)
            high = -(-max(start + parameter.numel(), 0) // stride)
            self.parts.append((parameter, low, high, low * stride - start))
            start += parameter.numel()
        self.numel = high

    def spans(self, start, stop):
        """(parameter, slice of its elements, slice of [start, stop)) of all that overlap."""
        first = bisect.bisect_right(self.parts, start, key=lambda part: part[2])
        for parameter, low, high, offset in itertools.islice(self.parts, first, None):
            if low >= stop:
                return
            a, b = max(low, start), min(high, stop)
            if a < b:
                begin = offset + (a - low) * self.stride
                inside = slice(begin, begin + (b - a - 1) * self.stride + 1, self.stride)
                yield parameter, inside, slice(a - start, b - start)

    @property
    def device(self):
        """Where the first parameter lives."""
        return self.parts[0][0].device

    def streams(self):
        """The current stream of each GPU that has a parameter: a model may be spread over
        several."""
        devices = {part[0].device for part in self.parts if part[0].is_cuda}
        return [torch.cuda.current_stream(device) for device in devices]

    def read(self, start, out):
        """Copy elements from `start` on into the float32 tensor `out`."""
        for parameter, inside, outside in self.spans(start, start + out.numel()):
            out[outside].copy_(parameter.detach().reshape(-1)[inside])

    def subtract_from(self, start, numbers, out):
        """`numbers`, rounded to the parameters' dtypes, minus the elements from `start` on, into
        `out`; both are float32 chunks."""
        numbers = self.rounded(start, numbers)
        for parameter, inside, outside in self.spans(start, start + out.numel()):
            local = parameter.detach().reshape(-1)[inside]
            torch.sub(numbers[outside], local.to(out.device, out.dtype), out=out[outside])

    def write(self, start, values):
        """Set elements from `start` on, rounded to each parameter's dtype."""
        self.writes += 1
        for parameter, inside, outside in self.spans(start, start + values.numel()):
            fill(parameter.detach(), inside, values[outside])

    def rounded(self, start, values):
        """`values`, for elements from `start` on, rounded to the parameters' dtypes, as float32."""
        if all(part[0].dtype == torch.float32 for part in self.parts):
            return values
        rounded = values.clone()
        for parameter, _, outside in self.spans(start, start + values.numel()):
            rounded[outside].copy_(values[outside].to(parameter.dtype))
        return rounded


def chunks(count):
    """The (start, stop) of each chunk of a slice of `count` elements."""
    return ((a, min(a + CHUNK, count)) for a in range(0, count, CHUNK))


class Checksum:
    """A checksum of float32 bits at the speed of memory.

    The bits of each chunk of CHUNK elements are added up, two elements as one integer of 64 bits
    (modulo 2 to the 64th, so in any order), and the list of sums is hashed. This guards against
    faults, not against forgery.
    """

    SPEC = TensorSpec("checksum", torch.uint8, (16,))

    def __init__(self):
        self.sums = []

    @staticmethod
    def sum_of(chunk):
        """The sum of a chunk, float32 and contiguous."""
        even = chunk.numel() & ~1
        total = chunk[:even].view(torch.int64).sum().item() if even else 0
        if even < chunk.numel():
            total += chunk[even:].view(torch.int32).item() & 0xFFFFFFFF
        return total & 0xFFFFFFFFFFFFFFFF

    def add(self, chunk):
        """Add the next chunk."""
        self.sums.append(self.sum_of(chunk))

    def digest(self):
        """16 bytes, as a uint8 tensor."""
        raw = struct.pack(f"<{len(self.sums)}Q", *self.sums)
        return torch.frombuffer(
            bytearray(hashlib.blake2b(raw, digest_size=16).digest()), dtype=torch.uint8
        )


def checksum_of(numbers):
    """The Checksum of a whole float32 slice."""
    checksum = Checksum()
    for start, stop in chunks(numbers.numel()):
        checksum.add(numbers[start:stop].contiguous())
    return checksum.digest()


# --- Codecs ---------------------------------------------------------------------------------
#
# Pseudo-gradients and updates travel in fewer bytes than float32 has. A codec works chunk by chunk,
# in memory that exists already, so that a message is made, sent, received and added while other
# chunks are still on their way. What a lossy codec rounds off is not lost: the sender keeps it as
# its residual and adds it to the next message.


class Scratch(threading.local):
    """Memory that a thread works in, chunk after chunk: asking the system for fresh memory each
    time would take longer than the work."""

    def __init__(self):
        self.kept = {}


SCRATCH = Scratch()


def scratch(use, like, count):
    """An uninitialized tensor that belongs to this thread: `count` elements of the dtype and on the
    device of `like`. The next call with the same `use` may give the same memory."""
    key = use, like.dtype, like.device
    if key not in SCRATCH.kept or SCRATCH.kept[key].numel() < count:
        SCRATCH.kept[key] = torch.empty(max(count, CHUNK), dtype=like.dtype, device=like.device)
    return SCRATCH.kept[key][:count]


class Codec:
    """How float32 numbers travel: encoded into the tensors of a message, chunk by chunk. A chunk
    begins at a multiple of CHUNK; chunks have their bytes one after the other, so that a message
    can be made, sent and taken apart chunk by chunk. A subclass defines `layout`, `encode`,
    `decode` and `finite`; `lossy` tells whether rounding loses anything."""

    lossy = True

    def layout(self, count):
        """The tensors that `count` float32 numbers become."""
        raise NotImplementedError

    def encode(self, numbers, tensors, start):
        """Encode a float32 chunk into the message's tensors, at element `start`."""
        raise NotImplementedError

    def decode(self, tensors, start, out):
        """Decode elements from `start` on into the float32 chunk `out`."""
        raise NotImplementedError

    def finite(self, tensors, start, stop):
        """Whether all numbers of an encoded chunk are finite and at most MAX_ABS in size."""
        raise NotImplementedError

    def decoded(self, tensors, start, like):
        """The decoded elements from `start` on, as many as `like` has. They may stand in scratch
        memory: use them before the next call."""
        numbers = scratch("decoded", like, like.numel())
        self.decode(tensors, start, numbers)
        return numbers

    def add(self, tensors, start, out):
        """Decode elements from `start` on and add them to the float32 chunk `out`."""
        out.add_(self.decoded(tensors, start, out))

    def subtract(self, numbers, tensors, start, out):
        """The float32 chunk `numbers` minus the decoded elements from `start` on, into `out`."""
        torch.sub(numbers, self.decoded(tensors, start, numbers), out=out)


class Cast(Codec):
    """A codec that stores each number in another float dtype, rounded to nearest even."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.lossy = dtype != torch.float32

    def layout(self, count):
        return [TensorSpec("values", self.dtype, (count,))]

    def encode(self, numbers, tensors, start):
        tensors["values"][start : start + numbers.numel()].copy_(numbers)

    def decode(self, tensors, start, out):
        out.copy_(tensors["values"][start : start + out.numel()])

    def decoded(self, tensors, start, like):
        if self.lossy:
            return super().decoded(tensors, start, like)
        return tensors["values"][start : start + like.numel()]

    def finite(self, tensors, start, stop):
        return within(tensors["values"][start:stop])


class Blocks(Codec):
    """A codec that stores BLOCK numbers as integers of `bits` (8 or 4) and one scale.

    A scale is the largest absolute value of its block over the largest integer, as bfloat16 rounded
    up: with float16 the small updates of a late round would underflow. Each chunk has its scales
    first, then its integers; of 4 bits, the first half of the chunk's numbers is in the low halves
    of the bytes, the second in the high ones. A last block that is not full is filled with zeros.
    """

    TINY = 1e-30  # a block of smaller numbers is sent as zeros: the reciprocal would overflow

    def __init__(self, bits):
        self.bits, self.top = bits, (1 << (bits - 1)) - 1

    def layout(self, count):
        blocks = -(-count // BLOCK)
        return [TensorSpec("values", torch.uint8, (blocks * (2 + BLOCK * self.bits // 8),))]

    def _parts(self, tensors, start, count):
        """(scales bfloat16 [blocks], integers uint8) of the chunk at `start`."""
        begin, end = (payload_bytes(self.layout(n)) for n in (start, start + count))
        scales = 2 * -(-count // BLOCK)
        raw = tensors["values"][begin:end]
        return raw[:scales].view(torch.bfloat16), raw[scales:]

    def encode(self, numbers, tensors, start):
        scales, integers = self._parts(tensors, start, numbers.numel())
        size = len(scales) * BLOCK
        if numbers.numel() < size:
            numbers = torch.nn.functional.pad(numbers, (0, size - numbers.numel()))
        blocks, work = numbers.view(-1, BLOCK), scratch("quotients", numbers, size).view(-1, BLOCK)
        largest = torch.abs(blocks, out=work).amax(1).div_(self.top)
        # The upper half of a float32 is a bfloat16; adding just less than one to it rounds it up.
        # So no quotient rounds to more than the largest integer.
        largest.view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000)
        scales.copy_(largest)
        inverse = torch.where(largest > self.TINY, largest.reciprocal(), 0)
        torch.mul(blocks, inverse.unsqueeze(1), out=work).round_()
        if self.bits == 8:
            integers.view(torch.int8).copy_(work.view(-1))
        else:
            low, high = work.view(2, -1)
            integers.copy_(low.add_(high, alpha=16).add_(8 + 16 * 8))

    def decode(self, tensors, start, out):
        scales, integers = self._parts(tensors, start, out.numel())
        size = len(scales) * BLOCK
        blocks = out if out.numel() == size else out.new_empty(size)
        if self.bits == 8:
            blocks.copy_(integers.view(torch.int8))
        else:
            low, high = blocks.view(2, -1)
            half = scratch("halves", integers, len(integers))
            low.copy_(torch.bitwise_and(integers, 15, out=half).sub_(8).view(torch.int8))
            torch.bitwise_right_shift(integers, 4, out=half)
            high.copy_(half.sub_(8).view(torch.int8))
        blocks.view(-1, BLOCK).mul_(scales.float().unsqueeze(1))
        if blocks is not out:
            out.copy_(blocks[: out.numel()])

    def finite(self, tensors, start, stop):
        return within(self._parts(tensors, start, stop - start)[0], MAX_ABS / (self.top + 1))


CODECS = {
    "fp32": Cast(torch.float32),
    "bf16": Cast(torch.bfloat16),
    "int8": Blocks(8),
    "int4": Blocks(4),
}


def chunk_bytes(codec, count):
    """The (start, stop, first byte, last byte) of each encoded chunk of `count` elements."""
    for start, stop in chunks(count):
        yield start, stop, *(payload_bytes(codec.layout(n)) for n in (start, stop))


def within(numbers, limit=MAX_ABS):
    """Whether floating-point numbers are all finite and at most `limit` in size. Without their
    signs they have the order of their bits as integers, in which NaN comes last."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.dtype.itemsize]
    largest = torch.tensor(limit, dtype=numbers.dtype).view(bits).item()
    signed = numbers.view(bits)
    unsigned = scratch("unsigned", signed, signed.numel())
    torch.bitwise_and(signed, torch.iinfo(bits).max, out=unsigned)
    return signed.numel() == 0 or unsigned.amax().item() <= largest


def same_bits(one, other):
    """Whether two CPU tensors of one dtype and shape are equal to the bit, NaN included."""
    return memory(one) == memory(other)


def all_finite(codec, tensors, count):
    """Whether all numbers of an encoded slice of `count` elements are finite and at most
    MAX_ABS."""
    return all(codec.finite(tensors, start, stop) for start, stop in chunks(count))
