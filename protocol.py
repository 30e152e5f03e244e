"""The wire: frames, connections, tensor codecs, and a model as one flat vector.

Notable:
- A message is exactly a safetensors file: an 8-byte little-endian header length, a JSON header,
  the raw bytes. Its own fields are one JSON string under `__metadata__["diloco"]`. Checkpoints are
  written and read by the same code, and nothing is ever pickled.
- Tensor bytes go from the tensor's memory to the socket and back without a copy on the way.
- A header is checked before one byte of payload is read, and nothing is allocated for a payload
  that has not been checked.
- A stall is a lack of progress in bytes, never a total time: a slow transfer that moves is fine.

What a malformed message gets: an `error` message that names the broken rule, then the end of the
connection. The rules stand in `parse_header` and `Message.field`, one line each.

Needs torch and nothing else, so that it can be copied into other projects.
"""

import bisect
import contextlib
import ctypes
import fcntl
import hashlib
import ipaddress
import itertools
import json
import math
import os
import re
import select
import socket
import struct
import termios
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

PROTOCOL_VERSION = 2
PORT = 8512
MAX_HEADER_BYTES = 16 << 20  # a manifest of 100,000 tensors takes about 10 MiB
MAX_HELLO_BYTES = 64 << 10  # a peer that has not said hello gets no more than this read
MAX_FILES_BYTES = 64 << 20  # descriptive files, all together; the largest tokenizers are near 35 MB
MAX_DISCARD_BYTES = 64 << 20  # read on after an error, so that the sender gets to see why
HELLO_SECONDS = 10.0  # a peer that connects says hello at once
STALL_SECONDS = 60.0  # no byte for so long means that the peer or the line is gone
# A peer that lost its power says nothing. After 30 s without a byte it is asked every 10 s, and
# after three questions without an answer, or a minute in which it took no byte, the line is dead.
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
WAIT_SECONDS = 5.0  # how often the server says that it is still waiting for others
CHUNK = (
    1 << 19
)  # elements worked on at once: 2 MiB of float32. Smaller ones would fit in a nearer cache,
# but the threads of a process hand Python's lock to each other with each operation on one
BLOCK = 64  # numbers that share a scale in int8 and int4: chosen with tests/bench_codecs.py
MAX_ABS = 1e30  # larger numbers count as not finite: a sum of a million of them still is

BUFFER = "buffer:"  # before the name of a buffer, among the tensors of a message

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
    """One side says no, the other hears it: the same request, tried again, fares no better.

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
    """Append a line of JSON to the file that DILOCO_AUDIT names, if any: what a test needs to tell
    afterwards that no push was lost or counted twice (tests/chaos.py)."""
    if path := os.environ.get("DILOCO_AUDIT"):
        line = json.dumps({"time": time.time(), "pid": os.getpid(), "event": event, **facts})
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode() + b"\n")
        finally:
            os.close(handle)


# --- Frames ---------------------------------------------------------------------------------


class TensorSpec(NamedTuple):
    """What a header says of one tensor."""

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
    "".join([*keys, *(v for v in keys.values() if isinstance(v, str))]).encode()  # no surrogates
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

    entries = []
    for name, entry in header.items():
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
        if math.prod(filter(None, shape)) >= 1 << 53:  # torch multiplies before it meets a zero
            raise ProtocolError(f"tensor {name!r}: the counts of shape {shape} are too large")
        entries.append((offsets[0], offsets[1], spec))
    if not in_order:
        entries.sort(key=lambda entry: entry[:2])
    end = 0
    for first, last, spec in entries:
        if first != end:
            raise ProtocolError(
                f"tensor {spec.name!r}: its bytes begin at {first}, not where the one before "
                f"ends, at {end}: ranges must be in order, without overlap or gap"
            )
        end = last
    return fields, [spec for _, _, spec in entries]


def header_length(raw):
    """The length that the first 8 bytes name. Raises ProtocolError if it is out of range."""
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


class Buffer:
    """Memory for the payload of one frame: `raw` holds its bytes, `tensors` views them by name.
    `pinned`: for fast copies to and from a GPU; `device`: not for the wire."""

    def __init__(self, specs, device="cpu", pinned=False):
        self.specs, size = list(specs), payload_bytes(specs)
        # Filled, so that the system hands out its memory now and not in the midst of a round.
        self.raw = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.tensors, start = {}, 0
        for spec in self.specs:
            part = self.raw[start : start + spec.nbytes]
            self.tensors[spec.name] = part.view(spec.dtype).view(spec.shape)
            start += spec.nbytes


# --- Files ----------------------------------------------------------------------------------


def write_frame(file, fields, specs, tensors, **metadata):
    """Write one frame to an open binary file. `tensors`: CPU tensors whose bytes, one after the
    other, are the payload that `specs` announces; they are taken one at a time."""
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

    The tensors are views of the mapped file, private to this process: they cost memory and time
    when they are read, not before.
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


# --- Connections ----------------------------------------------------------------------------

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

    def split_buffers(self):
        """Take off, and give, the specs of a model's buffers, which come last."""
        buffers = [spec for spec in self.specs if spec.name.startswith(BUFFER)]
        self.specs = self.specs[: len(self.specs) - len(buffers)]
        return buffers

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
        other, as `specs` announces them. They are taken one at a time, so may be made on the way."""
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
        # Not socket.sendall: its timeout is for the whole, and a slow transfer is no stall.
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
                if unsent < before:  # what was sent last still moves, on a slow line
                    continue
                seconds = self.sock.gettimeout() or 0  # 0: the keep-alive noticed
                raise ConnectionError(f"{self.peer} sent no byte for {seconds:.0f} s") from None
            if not count:
                raise ConnectionError(f"{self.peer} closed the connection")
            if self.sock.gettimeout() != self.stall:  # a system call, where it changes nothing too
                self.sock.settimeout(self.stall)
            self.bytes_in += count
            view = view[count:]

    def _unsent(self):
        """Bytes that were sent, and that the peer's system has not acknowledged."""
        try:
            return struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))[0]
        except OSError:  # not on this system
            return 0

    def discard(self):
        """Read the payload of the last message and throw it away."""
        scratch = torch.empty(1 << 16, dtype=torch.uint8)
        while self.unread:
            self.read(scratch[: min(self.unread, scratch.numel())])

    def request(self, type, fields=None, specs=(), tensors=(), on_wait=None):
        """Send a request and return the reply, past any `wait` messages (each is passed to
        `on_wait`). Raises Refused when the reply is an `error`."""
        try:
            self.send(type, fields, specs, tensors)
        except ConnectionError:
            self._raise_last_words()
            raise
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
        """Tell the peer why, then read on for a while: a reset would overtake the message."""
        with contextlib.suppress(OSError, ProtocolError):
            self.stall = 2.0
            self.send("error", {"message": str(error), "code": getattr(error, "code", "protocol")})
            self.sock.shutdown(socket.SHUT_WR)
            self.unread = MAX_DISCARD_BYTES
            self.discard()

    def close(self):
        with contextlib.suppress(OSError):  # the peer may have been faster
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def closed_by_peer(self):
        """Whether the peer has hung up, as far as this side knows; moves no byte."""
        try:
            poller = select.poll()  # recv alone would wait, whatever its flags
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


def specs_of(named_tensors):
    """The manifest of (name, tensor) pairs, in their order."""
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in named_tensors]


def manifest_to_json(specs):
    """The manifest as [[name, dtype, shape], ...]."""
    return [[spec.name, DTYPE_NAMES[spec.dtype], list(spec.shape)] for spec in specs]


def manifest_from_json(listed, trained=True):
    """The specs of an untrusted manifest. Raises ProtocolError where a name stands twice, and, of
    what is `trained`, unless it has at least one tensor and all are floating-point."""
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


def explain_mismatch(server, worker):
    """What keeps a worker's tensors from being the server's, in words, or "" if nothing does."""
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


def buffer_specs(specs):
    """A model's buffers as they travel, under names of their own: floating-point ones as float32,
    never through a lossy codec, in which a variance might become negative."""
    return [
        TensorSpec(
            BUFFER + spec.name,
            torch.float32 if spec.dtype.is_floating_point else spec.dtype,
            spec.shape,
        )
        for spec in specs
    ]


def specs_of_buffers(buffers):
    """The same of {name: CPU tensor as it travels}."""
    return buffer_specs(specs_of(buffers.items()))


def fingerprint(tensor):
    """32 hexadecimal digits that tell a tensor's bits from others': BLAKE2b over its elements, row
    by row. At about 1 GB/s a thread; other threads run meanwhile."""
    return fingerprint_of_pieces(tensor.detach().reshape(-1).split(CHUNK))


def fingerprint_of_pieces(pieces):
    """The same of a tensor that comes in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(memory(piece.cpu()))
    return digest.hexdigest()


def fragment_of(vector, k, count):
    """Fragment k of `count`: a view of every count-th element of a flat vector, from the k-th on.

    All have the same size, to an element, and each has its part of every tensor. Cut into runs
    instead, the model learns less well: 0.5% of the loss with four fragments (tests/parity.py).
    """
    return vector[k::count]


def ranges(specs):
    """(spec, start, stop) of each tensor in the flat vector, in elements."""
    start = 0
    for spec in specs:
        yield spec, start, start + spec.numel
        start += spec.numel


def fill(tensor, inside, values):
    """Set elements of a tensor, by a slice of them in row order, whatever its dtype, device and
    memory layout."""
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
    row by row, also where a tensor's memory is laid out in another order.
    """

    def __init__(self, parameters, first=0, stride=1):
        self.parts, self.stride, start = [], stride, -first
        self.writes = 0  # changes made here
        for parameter in parameters:  # those from low to high in the vector are its elements
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
        """The current stream of each GPU that has a parameter: one model may be spread over some."""
        devices = {part[0].device for part in self.parts if part[0].is_cuda}
        return [torch.cuda.current_stream(device) for device in devices]

    def read(self, start, out, non_blocking=False):
        """Copy elements from `start` on into the float32 tensor `out`."""
        for parameter, inside, outside in self.spans(start, start + out.numel()):
            local = parameter.detach().reshape(-1)[inside]
            out[outside].copy_(local, non_blocking=non_blocking)

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
    """(start, stop) of the pieces in which a slice of `count` elements is worked on."""
    return ((a, min(a + CHUNK, count)) for a in range(0, count, CHUNK))


class Checksum:
    """A checksum of float32 bits at the speed of memory.

    The bits of each chunk of CHUNK elements are added up, two elements as one integer of 64 bits
    (modulo 2 to the 64th, so in any order), and the list of sums is hashed. Guards against faults,
    not against forgery.
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


class Rooms(threading.local):
    """Memory that a thread works in, chunk after chunk: to ask the system for it each time would
    take longer than the work."""

    def __init__(self):
        self.kept = {}


ROOMS = Rooms()


def room(use, like, count):
    """An uninitialized tensor of this thread's: `count` elements of the dtype and on the device of
    `like`. The next call with the same `use` may give the same memory."""
    key = use, like.dtype, like.device
    if key not in ROOMS.kept or ROOMS.kept[key].numel() < count:
        ROOMS.kept[key] = torch.empty(max(count, CHUNK), dtype=like.dtype, device=like.device)
    return ROOMS.kept[key][:count]


class Codec:
    """How float32 numbers travel: encoded into the tensors of a message, chunk by chunk. A chunk
    begins at a multiple of CHUNK; chunks have their bytes one after the other, so that a message can
    be made, sent and taken apart chunk by chunk. A codec says `layout`, `encode`, `decode` and
    `finite`; `lossy` tells whether rounding loses anything."""

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
        """Whether all of a chunk is finite and at most MAX_ABS in size."""
        raise NotImplementedError

    def decoded(self, tensors, start, like):
        """Decoded elements from `start` on, as many as `like` has, to be read at once."""
        numbers = room("decoded", like, like.numel())
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

    TINY = 1e-30  # a block with nothing larger is sent as zeros: the reciprocal would overflow

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
        blocks, work = numbers.view(-1, BLOCK), room("quotients", numbers, size).view(-1, BLOCK)
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
            half = room("halves", integers, len(integers))
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
    """(start, stop, first byte, last byte) of the chunks of a slice of `count` elements."""
    for start, stop in chunks(count):
        yield start, stop, *(payload_bytes(codec.layout(n)) for n in (start, stop))


def within(numbers, limit=MAX_ABS):
    """Whether all of some floating-point numbers are finite and at most `limit` in size: without
    their signs they have the order of their bits as integers, in which NaN comes last."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.dtype.itemsize]
    largest = torch.tensor(limit, dtype=numbers.dtype).view(bits).item()
    signed = numbers.view(bits)
    unsigned = room("unsigned", signed, signed.numel())
    torch.bitwise_and(signed, torch.iinfo(bits).max, out=unsigned)
    return signed.numel() == 0 or unsigned.amax().item() <= largest


def same_bits(one, other):
    """Whether two CPU tensors of one dtype and shape are equal, NaN to NaN too."""
    return memory(one) == memory(other)


def all_finite(codec, tensors, count):
    """The same of an encoded slice of `count` elements."""
    return all(codec.finite(tensors, start, stop) for start, stop in chunks(count))
