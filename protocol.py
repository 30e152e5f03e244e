"""The wire: frames, files, connections, tensor codecs, and a model as one flat vector.

Notable:
- A message is exactly a safetensors file: an 8-byte little-endian header length, a JSON header,
  the raw bytes. Its own fields are one JSON string under `__metadata__["diloco"]`. Checkpoints are
  written and read by the same code, and nothing is ever pickled.
- Tensor bytes go from a tensor's memory to the socket, and from the socket into a tensor's memory.
- A header is checked before one byte of payload is read, and nothing is allocated for a payload
  that has not been checked.
- A stall is a lack of progress in bytes, never a total time: a slow transfer that moves is fine, as
  long as it keeps a least rate, below which a peer only pretends to send or to read.

A malformed message is answered with an `error` message that names the broken rule, and then the
connection ends. The rules stand in `parse_header` and `Message.field`, one line each.

The requests of version 5, in which a Version travels as [life, number] and a Fate as a list too:

    request    carries                                     reply
    hello      protocol version, worker id, session,       hello: protocol version, session; or
               nonce                                       challenge: nonce
    proof      that the client knows the token             hello, with the server's proof
    join       manifest, settings, host; by slice the      join: place in the run, settings, heads,
               version held and what is folded in it       turns by slice, and steps to the first push;
                                                           or bring: slices that it shall upload
    bring      those slices in full, descriptive files     as join
    push       slice, seq, base, steps, tokens, closing,   push: taken, or listed already
               when it adopts; the pseudo-gradient, if any
    pull       slice, version held, seq of the push that   entry (with checksum, part of a step, all
               is waited for, or 0 to catch up             but the last with `more`), slice, again, current
    fetch      names of frozen tensors, or `files`         fetch: those
    heartbeat  step, place in the cycle, loss, what it     heartbeat: round, rank, world, members,
               has made and waited, the push it waits for  orders, steps of the next cycle
    leave, status, save, stop                              an answer of the same name

While a join or pull has to wait, the server sends `wait` messages that say for whom. A push, pull,
heartbeat or leave of somebody who is not a member is answered with the error code `rejoin`.

Needs torch and nothing else, so that it can be copied into other projects.
"""

import bisect
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import functools
import glob
import hashlib
import hmac
import ipaddress
import itertools
import json
import math
import mmap
import os
import re
import secrets
import select
import shutil
import socket
import ssl
import struct
import sys
import termios
import threading
import time
import traceback
import zipfile
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

PROTOCOL_VERSION = 6
PORT = 8512
MAX_HEADER_BYTES = 16 << 20  # a manifest of 100,000 tensors takes about 10 MiB
MAX_HELLO_BYTES = 1 << 10  # longest header that is read from a peer that is no worker
MAX_FILES_BYTES = 64 << 20  # all descriptive files together; the largest tokenizers are near 35 MB
MAX_DISCARD_BYTES = 64 << 20  # most that is read after an error, so that the sender sees the reason
CONNECT_SECONDS = 10.0  # time that a server has to take a connection
HELLO_SECONDS = 10.0  # time that a peer has for TLS and hello in all
REFUSED_SECONDS = 2.0  # time in all that a refused peer gets to read the reason
WRONG_TOKEN_SECONDS = 1.0  # pause before a wrong token is refused, so that guessing takes long
SHORT_TOKEN = 16  # characters; shorter tokens can be guessed from one recorded hello
TLS_PIECE = 16 << 10  # bytes handed to TLS at once: one record, so that a slow line shows progress
STALL_SECONDS = 60.0  # time without a byte after which the peer or the line counts as gone
LEAST_RATE = 1024.0  # bytes a second that a transfer moves at least
RATE_SECONDS = 60.0  # time over which that is judged
LARGE_BYTES = 64 << 10  # headers over this size are read and parsed a few at a time
WRONG_SECONDS = 0.5  # pause behind such a header that is not right
LARGE_SECONDS = 60.0  # time that such a header waits for its turn, and then has to arrive
# Most brackets, quotes and commas in a header: 100,000 tensors have half as many, and each costs
# many times its byte in memory once it is parsed.
MAX_PARTS = {b"[": 450_000, b"{": 110_000, b'"': 1_300_000, b",": 2_000_000}
# A peer that lost its power says nothing. After 30 s without a byte the system asks it every 10 s,
# and after three questions without an answer, or a minute in which it took no byte, the line is
# dead.
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
WAIT_SECONDS = 5.0  # how often the server says that it is still waiting for others
CHUNK = 1 << 19  # elements that are sent, received and summed up at once: 2 MiB of float32
# Elements that a codec whose numbers stand alone works on at once: so the few vectors of a step fit
# in a core's own cache. Much smaller tiles would take longer in Python than in the arithmetic.
TILE = 1 << 17
STRIPE = 256  # numbers in a row of the same slice: fewer take longer (tests/bench_link.py)
BLOCK = 64  # numbers that share a scale in int8 and int4: chosen with tests/bench_codecs.py
MAX_ABS = 1e30  # larger numbers count as not finite: the sum of a million numbers is finite, too
MAX_FATES = 2000  # workers whose newest push one slice remembers
KEPT_FATES = 100  # newest ones of these, which are remembered however many rounds ago they were

MAX_SHOWN = 80  # characters of a peer's text that are shown
LINES_PER_SECOND = 10  # lines of a log that strangers can cause
LOOK_SECONDS = 0.25  # how often the live line is drawn
SHOW_SECONDS = 2.0  # time from which on people hear how far something has come
MOST_SECONDS = 60.0  # longest time from then on between two lines of a log on that
CLEAR = "\r\033[K"  # wipes the line of a terminal in which the cursor is

# The descriptive files that may travel with a model. Nothing else is ever written by name. The names
# that tensors have in adapter_model.safetensors are in adapter_names.json.
FILE_NAMES = (
    "config.json", "adapter_config.json", "adapter_names.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip

# What torch.compile, DistributedDataParallel and a LightningModule put before a model's names.
WRAPPED = ("_orig_mod.", "module.", "model.")

# Ending of the name of a config.json beside weights that are only a part of what it describes:
# `from_pretrained` would make up the other tensors, at random.
INCOMPLETE = ".incomplete"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "C64": torch.complex64, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ProtocolError(Exception):
    """A message or file breaks a rule of the format; the text says which."""


class Refused(Exception):
    """A request was rejected for good: sending it again cannot succeed.

    `code` is one word for programs: address, token, tls, version, id, setting, model, size,
    stopping, drop, rejoin, protocol.
    """

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class TooSlow(ConnectionError):
    """A transfer has stopped under way, or moves at less than the least rate."""


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


# --- Reporting --------------------------------------------------------------------------------
#
# What is said to people must never break what it is about. Nothing here raises or waits, whatever
# has become of the output: a full disk, a pipe without a reader or with one that has stopped, a
# terminal that has gone, a file descriptor that was closed, an encoding that lacks the characters.


def shown(text):
    """A peer's text, as people may see it: a plain word as it is, all else as its `repr`, cut to
    MAX_SHOWN characters."""
    text = str(text)
    if re.fullmatch(r"[\w.:@+-]{1,80}", text, re.ASCII):
        return text
    return quoted(text)


def printable(text):
    """A peer's sentence as people may see it: of printable characters, and at most 1000 of them."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:1000])


def quoted(value):
    """A peer's value in an error: its `repr`, cut to MAX_SHOWN characters."""
    whole = repr(value[: MAX_SHOWN + 1] if isinstance(value, str | list) else value)
    return whole if len(whole) <= MAX_SHOWN else whole[: MAX_SHOWN - 4] + "..." + whole[0]


def reason_of(error):
    """An exception in one line."""
    return ": ".join([type(error).__name__, *filter(None, [" ".join(str(error).split())])])


class Log:
    """Lines for people. stream: "stdout" or "stderr", looked up at each line; prefix: text before
    each line; clock: whether the time stands before that."""

    def __init__(self, stream, prefix="", clock=False):
        self.stream, self.prefix, self.clock = stream, prefix, clock
        self.lost, self.why = 0, ""  # lines that could not be written, and why
        self.seldom_lines = {}  # kind -> [second, lines of the kind in it]
        self.lock = threading.RLock()  # a signal's handler may log, too

    def __call__(self, text):
        """Write a line, in one write, so that threads never mix their lines."""
        begun = f"{time.strftime('%H:%M:%S')} " if self.clock else ""
        self.write(f"{begun}{self.prefix}{text}\n")

    def write(self, text):
        """Write a text. Where that fails, it is counted, and said once the output works again."""
        if not self.lock.acquire(timeout=1.0):  # its thread hangs, or was lost in a fork
            self.lost += 1
            return
        try:
            if self.lost:
                self._put(f"{self.prefix}{self.lost} lines before this were lost: {self.why}\n")
                self.lost = 0
            self._put(text)
        except Exception as error:
            self.lost, self.why = self.lost + 1, reason_of(error)
        finally:
            self.lock.release()

    def _put(self, text):
        stream = getattr(sys, self.stream)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if not is_writable(stream, 0.0 if self.lost else 1.0):
            raise TimeoutError("whoever reads this has stopped reading")
        with live.aside(stream) as (before, after):
            stream.write(f"{before}{text}{after}")
            stream.flush()

    def trace(self, text):
        """Log a text, and the traceback of the exception that is being handled."""
        self(f"{text}\n{traceback.format_exc().rstrip()}")

    def seldom(self, kind, text):
        """Log a line that peers can cause: at most LINES_PER_SECOND; the rest are counted."""
        with self.lock:
            self.settle()
            entry = self.seldom_lines.setdefault(kind, [int(time.monotonic()), 0])
            entry[1] += 1
            is_few = entry[1] <= LINES_PER_SECOND
        if is_few:
            self(text[:400])

    def settle(self):
        """Say how many lines of each kind were not logged in the seconds before this one."""
        with self.lock:
            now = int(time.monotonic())
            over = [kind for kind, (second, _) in self.seldom_lines.items() if second != now]
            counts = {kind: self.seldom_lines.pop(kind)[1] for kind in over}
        for kind, count in counts.items():
            if count > LINES_PER_SECOND:
                self(f"and {count - LINES_PER_SECOND} more {kind}")


def is_writable(stream, seconds):
    """Whether a line can be written without waiting longer than so many seconds for a reader."""
    try:
        handle = stream.fileno()
    except (OSError, ValueError, AttributeError):  # no file: a notebook's, or a test's
        return True
    poller = select.poll()
    poller.register(handle, select.POLLOUT)
    return bool(poller.poll(seconds * 1000))


def is_terminal(stream):
    """Whether a stream is a terminal in which a line can be drawn anew."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (OSError, ValueError, AttributeError):
        return False


class Live:
    """The line at the foot of a program's terminal that is drawn anew in place, which log lines keep
    clear of, and the thread that draws it. It is for programs that write by `Log` alone: the terminal
    of a script belongs to the script, which gets log lines only.

    status: function that gives the text of the line; None: there is no line. under_way: {Progress:
    None} in the order in which they began. drawn: what stands at the foot now.
    """

    def __init__(self):
        self.status, self.under_way, self.drawn = None, {}, ""
        self.lock = threading.RLock()  # held while something is written, which may hang
        self.thread, self.guard = None, threading.RLock()  # guard: of the thread's begin and end

    def open(self, status=str):
        """From now on draw the text that `status()` gives, where stdout is a terminal, behind what is
        under way. It is called in a thread of its own. By default it is ""."""
        if is_terminal(sys.stdout):
            self.status = status
            self.start()

    def close(self):
        """Wipe the line, for good."""
        self.status = None
        self.draw("")

    def start(self):
        """Have a thread look at what is under way until nothing is."""
        with self.guard:
            if self.thread is None:
                thread = threading.Thread(target=self.look, name="live line", daemon=True)
                thread.start()
                self.thread = thread

    def look(self):
        """What the thread does."""
        while True:
            time.sleep(LOOK_SECONDS)
            with contextlib.suppress(Exception):  # of those it looks at, which change meanwhile
                texts = [progress.look(self.status is not None) for progress in [*self.under_way]]
                if self.status is not None:
                    self.draw("  ".join(filter(None, [*texts, self.status()])))
            with self.guard:
                if self.status is None and not self.under_way:
                    self.thread = None
                    return

    def draw(self, text):
        """Draw a text, cut to the terminal's width, if it is another than the one that stands there."""
        if not self.lock.acquire(timeout=1.0):
            return
        try:
            stream, shown = sys.stdout, "" if self.status is None else text
            columns = os.get_terminal_size(stream.fileno()).columns if shown else 0
            shown = shown.encode("ascii", "backslashreplace").decode()[: (columns or 80) - 1]
            if shown != self.drawn and is_writable(stream, 0.0):
                stream.write(CLEAR + shown)
                stream.flush()
                self.drawn = shown
        except (OSError, ValueError):  # the terminal has gone
            self.drawn = ""
        finally:
            self.lock.release()

    @contextlib.contextmanager
    def aside(self, stream):
        """Yield what is to be written before and after a line of a log, so that this line stays below
        it; nothing moves meanwhile."""
        has_lock = self.lock.acquire(timeout=1.0)  # its thread may hang
        try:
            may_draw = self.drawn or "tqdm" in sys.modules  # whose bar draws itself anew
            yield (CLEAR, self.drawn) if may_draw and is_terminal(stream) else ("", "")
        finally:
            if has_lock:
                self.lock.release()


live = Live()
os.register_at_fork(after_in_child=live.__init__)  # the thread is not in the child


class Progress:
    """Tells how far a block has come, if it takes over two seconds: in the live line where there is
    one, else in lines of the log, more and more seldom. A thread looks: the block counts nothing.

    log: Log, or None for the live line only. total: bytes in all, 0 where nobody knows. done: function
    that gives the bytes by now. closes: whether the log gets a line at the end, too.
    """

    def __init__(self, log, what, total, done, closes=True):
        self.log, self.what, self.total, self.done = log, what, total, done
        self.closes, self.is_long = closes, False
        self.began, self.next = 0.0, SHOW_SECONDS  # seconds: of the begin; of the log's next line

    def __enter__(self):
        self.began = time.monotonic()
        live.under_way[self] = None
        with contextlib.suppress(RuntimeError):  # the system has no thread left
            live.start()
        return self

    def __exit__(self, kind, *_):
        live.under_way.pop(self, None)
        if self.is_long and self.log and (kind or self.closes):
            words = "broke off after" if kind else "took"
            self.log(f"{self.what} {words} {span(self.seconds)}: {self.amount()}")

    def over(self, tensors):
        """Yield the tensors of a message: the block ends when the last one has been sent."""
        with self:
            yield from tensors

    @property
    def seconds(self):
        return time.monotonic() - self.began

    def moved(self):
        """The bytes by now; 0 where nobody can say."""
        with contextlib.suppress(Exception):
            return self.done()
        return 0

    def amount(self):
        """How much has been done, and how fast."""
        done = self.moved()
        of = f" of {short(self.total / 1e6)}" if done < self.total else ""
        return f"{short(done / 1e6)}{of} MB, {short(done / self.seconds / 1e6)} MB/s"

    def look(self, has_line):
        """The text for the live line; "" while it has not taken long. Without such a line it goes into
        the log at times."""
        if self.seconds < SHOW_SECONDS:
            return ""
        self.is_long, text, done = True, f"{self.what}: {self.amount()}", self.moved()
        if 0 < done < self.total:
            text += f", {span((self.total - done) / done * self.seconds)} left"
        if self.log and not has_line and self.seconds >= self.next:
            self.next = self.seconds + min(5 * self.next, MOST_SECONDS)  # at 2 s, 12 s, 72 s
            self.log(text)
        return text


def short(number):
    """A number in three digits, or as a whole one."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def span(seconds):
    """A time in a word or two, from 0.5 s to 12 days."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for size, most, word in ((1, 100, "s"), (60, 100, "min"), (3600, 48, "hours")):
        if seconds < size * most:
            return f"{seconds / size:.0f} {word}"
    return f"{seconds / 86400:.0f} days"


class Faults(list):
    """Texts on what went wrong and was survived, newest last; at most 20 are kept. total: how many
    there have been."""

    total = 0

    @contextlib.contextmanager
    def survive(self, log, what):
        """Go on after any exception within, but log and note it. what: what was being done."""
        try:
            yield
        except Exception as error:
            if self.note(f"{what}: {reason_of(error)[:300]}"):
                log.trace(f"WARNING: {what} failed, and is tried again")

    def note(self, text):
        """Note a fault. Returns whether it is another one than the last."""
        self.total += 1
        is_new = not (self and self[-1].endswith(text))
        if not is_new:
            self.pop()
        self.append(f"{time.strftime('%H:%M:%S')} {text}")
        del self[:-20]
        return is_new


def flush_output():
    """Write out what stdout and stderr still hold, and throw away what cannot be written: the exit
    status of a process shall tell of its work, and not of its log."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def identity():
    """[machine, process id, when it started] of this process, as others on the machine can see it."""
    pid = os.getpid()
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return [f"{boot}/{os.readlink('/proc/self/ns/pid')}", pid, started(pid)]
    except (OSError, ValueError):  # not Linux
        return [socket.gethostname(), pid, 0]


def started(pid):
    """When a process of this machine was started, in ticks; -1 for one that has ended and waits for
    its parent, 0 where nothing tells."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *rest = file.read().rpartition(")")[2].split()
        return -1 if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return 0


def has_ended(pid, start):
    """Whether the process of this machine that `identity` named so has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's
        pass
    found = started(pid)
    return found == -1 or bool(found and start and found != start)


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
    raise ProtocolError(f"{quoted(value)} is not a version")


def new_life(after=""):
    """An id for one opening of a run. Ids sort by the time that they begin with, past `after`, so
    that of two versions the one from the later life is the newer, whatever the clock says."""
    now = time.time_ns() // 1_000_000 << 32
    begun = max(now, int(after or "0", 16) + 1) + secrets.randbits(32)
    return f"{min(begun, (1 << 80) - 1):020x}"


def fates_of(value):
    """{worker id: Fate} from untrusted JSON. Raises ProtocolError."""
    if type(value) is not dict or len(value) > MAX_FATES:
        raise ProtocolError(f"a list of pushes is not an object of at most {MAX_FATES} entries")
    fates = {}
    for worker, fate in value.items():
        match fate:
            case [int(seq), str(refused), int(round)] if _is_count(seq) and _is_count(round):
                texts = worker, refused
                if all(len(text) <= 256 and text.isprintable() for text in texts):
                    fates[worker] = Fate(seq, refused, round)
        if worker not in fates:
            raise ProtocolError(f"{quoted(fate)} is not [sequence number, refusal, round]")
    return fates


def last_fates(folded):
    """{worker id: its last Fate} of several slices' fates, where new slices take their place."""
    found = {}
    for fates in folded:
        for worker, fate in fates.items():
            found[worker] = max(fate, found.get(worker, fate))
    return found


def recent(fates, version, max_staleness, keep):
    """The fates that a push can ask for which is not too old, those of the ids in `keep`, and the
    newest ones, so that a worker which was away for long is told what became of its push."""
    rounds = sorted((fate.round for fate in fates.values()), reverse=True)
    oldest = min([version.number - max_staleness, *rounds[:KEPT_FATES][-1:]])
    return {w: fate for w, fate in fates.items() if fate.round >= oldest or w in keep}


def momentum_at(made, momentum, warmup):
    """The outer momentum of the step that follows r = `made` outer steps: min(momentum, r / (r + 3))
    while it warms up."""
    return min(momentum, made / (made + 3)) if warmup else momentum


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


def byte_ranges(specs, start=0):
    """The (spec, start, stop) of each tensor's bytes, which lie end to end from `start` on."""
    for spec in specs:
        stop = start + spec.nbytes
        yield spec, start, stop
        start = stop


def payload_bytes(specs):
    """The bytes that follow a header with these tensors."""
    return sum(spec.nbytes for spec in specs)


def encode_header(fields, specs, **metadata):
    """The length and the JSON header of a frame, padded to a multiple of 8 bytes.

    `fields` is any JSON object; `metadata` are further strings for `__metadata__`. Raises
    ProtocolError when the header would be longer than MAX_HEADER_BYTES.
    """
    header = {"__metadata__": {"diloco": json.dumps(fields, allow_nan=False), **metadata}}
    for spec, *offsets in byte_ranges(specs):
        dtype, shape = DTYPE_NAMES[spec.dtype], list(spec.shape)
        header[spec.name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
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
    for text in itertools.chain(keys, keys.values()):
        if isinstance(text, str) and not text.isascii():
            text.encode()
    return keys


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def parse_json(raw, what):
    """A JSON object from untrusted bytes or text. Raises ProtocolError."""
    try:
        text = raw if isinstance(raw, str) else str(raw, "utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is not a JSON object")
    return value


def _is_count(value):
    return type(value) is int and 0 <= value < 1 << 53


def spec_of(name, dtype, shape):
    """A TensorSpec from untrusted JSON; `name` is a text. Raises ProtocolError."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ProtocolError(
            f"tensor {quoted(name)}: dtype {quoted(dtype)} is not one of {list(DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_count, shape)):
        raise ProtocolError(f"tensor {quoted(name)}: the shape is not a list of up to 32 counts")
    # torch computes the product of the sizes even where one of them is 0, and must not overflow.
    if math.prod(filter(None, shape)) * DTYPES[dtype].itemsize >= 1 << 53:
        raise ProtocolError(
            f"tensor {quoted(name)}: {dtype} {quoted(shape)} takes more than {1 << 53:,} bytes"
        )
    return TensorSpec(name, DTYPES[dtype], tuple(shape))


def parse_entry(name, entry):
    """(first byte, last byte, spec) of a tensor in a header. Raises ProtocolError."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ProtocolError(f"tensor {quoted(name)}: needs dtype, shape and data_offsets, no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    spec = spec_of(name, dtype, shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ProtocolError(f"tensor {quoted(name)}: data_offsets is not a pair of counts")
    if spec.nbytes != offsets[1] - offsets[0]:
        raise ProtocolError(
            f"tensor {quoted(name)}: {dtype} {quoted(shape)} takes {spec.nbytes} bytes, but data_offsets "
            f"spans {offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1], spec


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
    end = 0
    for first, last, spec in entries:
        if first != end:
            raise ProtocolError(
                f"tensor {quoted(spec.name)}: its bytes begin at {first}, not where the one before "
                f"ends, at {end}: ranges must be in order, without overlap or gap"
            )
        end = last
    return fields, [spec for _, _, spec in entries]


def header_length(raw):
    """The length of the header that follows these 8 bytes. Raises ProtocolError."""
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
        self.tensors = {
            spec.name: self.raw[start:stop].view(spec.dtype).view(spec.shape)
            for spec, start, stop in byte_ranges(self.specs)
        }


# --- Files ----------------------------------------------------------------------------------
#
# A file or a checkpoint folder is written whole or not at all: beside its place, checked, synced,
# then renamed, by the server and by workers alike. What stood in its place is there until the new
# one is. A link in its place is replaced, and never written or removed through. It is read by
# mapping, so that weights of many gigabytes cost memory only where they are used. A header that
# announces more or fewer bytes than the file has tells of a write that a crash has cut, and a
# checkpoint's SUMS of anything else that has happened to its files since.

PICKLED = ".bin", ".pt", ".pth", ".ckpt"  # endings of files that torch.save wrote
ALONE = "write a file of the weights alone, torch.save({}, 'model.pt'), and name that"
SUMS = "checksums.json"  # file in a checkpoint: {name: [size, checksum]} of all the others
LOCK = ".diloco-lock"  # file in a server's folder that keeps a second server off
CHECKPOINTS = "checkpoint-*", ".checkpoint-*.old"  # names of a server's, the second while replaced
BESIDE = ".tmp-checkpoint"  # folder that a checkpoint is written into
# What a file system says that cannot sync: others say in this way that they have nothing to sync.
UNSYNCED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}
UNSYNCED |= {errno.EPERM, errno.EBADF, errno.EISDIR, errno.ENOTTY}


def write_frame(file, fields, specs, tensors, **metadata):
    """Write one frame to an open binary file. `tensors`: CPU tensors whose bytes, one after the
    other, are the payload that `specs` announces; the tensors are taken one at a time."""
    file.write(encode_header(fields, specs, **metadata))
    left = payload_bytes(specs)
    for tensor in tensors:
        left -= file.write(memory(tensor))
    if left:
        raise ValueError(f"the tensors differ from their specs by {left} bytes")


def read_file_header(file, whole=True):
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
    fields, specs = parse_header(file.read(length), in_order=False)
    if whole and 8 + length + payload_bytes(specs) != size:
        raise ProtocolError(
            f"{file.name}: {size:,} bytes, but its header announces "
            f"{8 + length + payload_bytes(specs):,}: the file is not whole"
        )
    return fields, specs


def sync(file):
    """Make what was written to a file or folder, open as this descriptor, survive a power cut,
    where its file system can."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise


def append_whole(path, raw):
    """Append bytes to a file: all of them, or with an OSError none."""
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        if (taken := file.write(raw)) < len(raw):
            file.truncate(start)
            raise OSError(f"{path} has room for {taken} bytes of {len(raw)}")


def sync_folder(folder):
    """Make renames within a folder survive a power cut, where its file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        sync(handle)
    finally:
        os.close(handle)


def remove(path):
    """Remove whatever has this name, if anything: of a link only the link."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.unlink(path)


def write_beside(path, write):
    """Write a file as a whole or not at all: `write(file)` fills a file beside it, which is
    synced, then renamed. On an error the file beside is removed and `path` is as it was."""
    beside = f"{path}.tmp-{os.getpid()}"
    remove(beside)
    try:
        with open(beside, "xb") as file:
            write(file)
            file.flush()
            sync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(beside)
        raise
    sync_folder(os.path.dirname(os.path.abspath(path)))


def bytes_in(folder):
    """The bytes of the files that are in a folder by now."""
    with contextlib.suppress(OSError):
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0


def save_folder(path, fill, log=None):
    """Write a checkpoint folder as a whole or not at all: `fill(folder)` writes files into a folder
    beside it, which are synced and checked, then the folder is renamed. On an error the folder
    beside is removed, and `path` is as it was. log: Log that tells of it if it takes long."""
    parent, name = os.path.split(os.path.abspath(path))
    beside, old = os.path.join(parent, BESIDE), os.path.join(parent, f".{name}.old")
    os.makedirs(parent, exist_ok=True)
    remove(beside)
    os.mkdir(beside)
    try:
        with Progress(log, f"saving {name}", 0, lambda: bytes_in(beside)):
            fill(beside)
            sums = {name: sum_of_file(os.path.join(beside, name)) for name in os.listdir(beside)}
        raw = json.dumps(sums, indent=1).encode()
        write_beside(os.path.join(beside, SUMS), lambda file: file.write(raw))
        if os.path.lexists(path):  # until the new one is there, `checkpoints` finds it as the old
            remove(old)
            os.rename(path, old)
        try:
            os.rename(beside, path)
        except OSError:
            if os.path.lexists(old):
                os.rename(old, path)
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            remove(beside)
        raise
    sync_folder(parent)
    with contextlib.suppress(OSError):
        remove(old)


def sum_of_file(path):
    """[size, checksum] of a file as it is on disk, after syncing it. Raises ProtocolError where it
    is a safetensors file that is not whole."""
    with open(path, "rb") as file:
        sync(file.fileno())
        if str(path).endswith(".safetensors"):
            read_file_header(file)
            file.seek(0)
        checksum, buffer = Checksum(), torch.empty(4 * CHUNK, dtype=torch.uint8, device="cpu")
        raw, size = memory(buffer), 0
        while count := file.readinto(raw):
            size += count
            buffer[count:] = 0  # the last chunk counts as if it were full
            checksum.add(buffer.view(torch.float32))
    return [size, bytes(checksum.digest().tolist()).hex()]


def check_folder(path):
    """Check the files of a checkpoint folder against its SUMS; one that an older version of this
    program wrote has none. Raises ProtocolError."""
    try:
        with open(os.path.join(path, SUMS), "rb") as file:
            sums = parse_json(file.read(MAX_HEADER_BYTES), SUMS)
    except FileNotFoundError:
        return
    for name, wanted in sums.items():
        if os.path.basename(name) != name or sum_of_file(os.path.join(path, name)) != wanted:
            raise ProtocolError(f"{quoted(name)} is not as it was written: its checksum differs")


def lock_folder(folder, what):
    """Keep others from writing to a folder for as long as the returned file is open. Raises
    BlockingIOError, with a text that names the process, where another one has it, and OSError where
    the folder cannot be locked at all. what: the holder in words, for that text."""
    os.makedirs(folder, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    file = os.fdopen(os.open(os.path.join(folder, LOCK), flags, 0o644), "r+")
    until = time.monotonic() + 2.0  # a process that is killed needs a moment to let go
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                owner = file.read(300).strip()
                file.close()
                raise BlockingIOError(
                    f"{folder} is in use by {owner or 'another process'}"
                ) from None
        except BaseException:
            file.close()
            raise
        time.sleep(0.1)
    file.truncate()
    file.write(f"{what} on host {socket.gethostname()}, process {os.getpid()}\n")
    file.flush()
    return file


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
        payload = file.tell()
    size = payload + payload_bytes(specs)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for spec, start, stop in byte_ranges(specs, payload):
        raw = mapped[start:stop]
        if start % spec.dtype.itemsize:  # other programs may lay tensors at any byte
            raw = raw.clone()
        tensors[spec.name] = raw.view(spec.dtype).view(spec.shape)
    return fields, tensors


def load_folder(path):
    """{name: CPU tensor} of a weights file, or of a folder in the Hugging Face layout: one
    safetensors file, shards with an index, or `pytorch_model.bin` (plain tensors only). Files are
    mapped, not read. Raises ProtocolError or OSError with one line where they cannot be used."""
    weights = {}
    for file in weight_files(path):
        try:
            found = pickled(file) if file.endswith(PICKLED) else load_file(file)[1]
        except Exception as error:  # whatever is wrong with somebody else's file
            why = error if isinstance(error, ProtocolError) else reason_of(error)
            raise ProtocolError(f"cannot use the weights in {file}: {why}") from None
        if not found:
            raise ProtocolError(f"cannot use the weights in {file}: there are none in it")
        if twice := weights.keys() & found.keys():
            raise ProtocolError(
                f"two files in {path} have {min(twice)!r}: name one, such as {file}"
            )
        weights |= found
    return weights


def pickled(path):
    """{name: CPU tensor} of a state_dict that torch.save wrote. Nothing in the file is executed.
    Raises ProtocolError where the file is of another kind, or the weights are further inside."""
    whole = ALONE.format("model.state_dict()")
    try:
        mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote files of another kind
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whose advice, to execute what is in the file, is not for a server
        why = f"is it a whole module, or TorchScript ({type(error).__name__})?"
        raise ProtocolError(
            f"torch.load finds no weights alone in it: {why} If so, {whole}"
        ) from None
    inner = [n for n, v in tensors_in(found, dict).items() if tensors_in(v)]
    if inner := [name for name in inner if not name.endswith("_extra_state")]:
        taken = f"torch.load(path)[{inner[0]!r}]"
        raise ProtocolError(f"its weights are in a dict under {inner[0]!r}: {ALONE.format(taken)}")
    if not (weights := tensors_in(found)):
        raise ProtocolError(f"there are no tensors in it under their names: {whole}")
    return weights


def tensors_in(value, kind=torch.Tensor):
    """{name: tensor} of those that a dict holds; or of what it holds of another kind."""
    found = value.items() if isinstance(value, dict) else ()
    return {str(name): each for name, each in found if isinstance(each, kind)}


def weight_files(path):
    """The paths of the files that hold the weights of a file or folder. Raises ProtocolError."""
    if os.path.isfile(path):
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = os.path.join(path, name)
        if os.path.isfile(file + ".index.json"):
            return [os.path.join(path, shard) for shard in shards_of(file + ".index.json")]
        if os.path.isfile(file):
            return [file]
    found = sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
    if not found:
        others = foreign_weights(path)
        hint = f"; name one of {others}" if others else ""
        raise ProtocolError(f"{path} has no weights of its own{hint}")
    return found


def shards_of(path):
    """The files that an index of weights lists, all in its own folder. Raises ProtocolError."""
    try:
        with open(path, encoding="utf-8") as index:
            shards = sorted(set(json.load(index)["weight_map"].values()))
        if any(os.path.basename(shard) != shard or shard in ("", "..") for shard in shards):
            raise ValueError("it names files outside its folder")
        return shards
    except Exception as error:  # whatever is wrong with somebody else's file
        raise ProtocolError(f"cannot use {path}: {reason_of(error)}") from None


def header_of(path):
    """The fields in the header of a safetensors file, which may be incomplete, or None where it has
    no header that can be read."""
    try:
        with open(path, "rb") as file:
            return read_file_header(file, whole=False)[0]
    except (OSError, ProtocolError):
        return None


def is_ours(path):
    """Whether this program wrote the safetensors file at `path`. The file may be incomplete."""
    return (header_of(path) or {}).get("program") == "diloco"


def checkpoints(folder):
    """[((life, round), path)] of this program's checkpoints in a folder, newest first. What cannot be
    read comes last, as ("", -1): a new one is never older than that."""
    found = []
    places = (os.path.join(glob.escape(folder), name) for name in CHECKPOINTS)
    for path in itertools.chain(*map(glob.glob, places)):
        name = os.path.basename(path)
        number = re.fullmatch(r"checkpoint-(\d{1,15})|\.checkpoint-(\d{1,15})\.old", name)
        if not number or (number[2] and os.path.lexists(os.path.join(folder, name[1:-4]))):
            continue
        outer, model = (os.path.join(path, f"{n}.safetensors") for n in ("outer", "model"))
        fields = header_of(outer)
        if fields is None:  # damaged, where it is this program's
            is_own = os.path.exists(outer) or is_ours(model)
        else:
            is_own = fields.get("program") == "diloco"
        if is_own or os.path.exists(os.path.join(path, SUMS)):
            found.append((age_of(fields or {}), int(number[1] or number[2]), path))
    return [(age, path) for age, _, path in sorted(found, reverse=True)]


def age_of(fields):
    """(life, round) of the checkpoint whose header has these fields, which may be damaged; ("", -1)
    where they do not tell."""
    try:
        heads = [version_of(saved["label"]) for saved in fields["fragments"]]
        return max(heads).life, min(version.number for version in heads)
    except (ProtocolError, LookupError, TypeError, ValueError):
        return "", -1


def discard(checkpoint):
    """Remove a checkpoint, under another name, so that a crash never leaves half of one."""
    old = os.path.join(os.path.dirname(checkpoint), BESIDE + "-old")
    remove(old)
    os.rename(checkpoint, old)
    remove(old)


def foreign_weights(folder):
    """The weight files in a folder, or in its checkpoint folders, by another program than this. A
    damaged one is this program's where others of its files are beside it."""
    pickled = [f"*{ending}" for ending in PICKLED]
    patterns = ("*.safetensors", *pickled, "checkpoint-*/*.safetensors", "checkpoint-*/*.bin")
    paths = [p for g in patterns for p in glob.glob(os.path.join(glob.escape(folder), g))]
    own = {os.path.realpath(path) for _, path in checkpoints(folder)}
    if own:
        own.add(os.path.realpath(folder))

    def is_damaged(path):
        is_sealed = os.path.exists(os.path.join(os.path.dirname(path), SUMS))
        is_own = os.path.realpath(os.path.dirname(path)) in own
        is_readable = header_of(path) is not None and not is_sealed
        return path.endswith(".safetensors") and is_own and not is_readable

    return [path for path in paths if not is_ours(path) and not is_damaged(path)]


def read_descriptive_files(folder):
    """{name: bytes} of the descriptive files (FILE_NAMES) in a folder; also of those that describe
    more than the folder's weights. Raises ProtocolError where they are too large."""
    files = {}
    for name in FILE_NAMES:
        path = os.path.join(folder, name)
        path = path + INCOMPLETE if os.path.isfile(path + INCOMPLETE) else path
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


def prefix_of(names):
    """The prefix of a wrapper, such as `module.`, that all names begin with, or ""."""
    prefix = next(iter(names), "").partition(".")[0] + "."
    is_common = prefix in WRAPPED and all(name.startswith(prefix) for name in names)
    return prefix if is_common else ""


def file_sizes_of(sizes):
    """{name: size in bytes} of the descriptive files that a worker uploads. Raises ProtocolError."""
    for name, size in sizes.items():
        if name not in FILE_NAMES or type(size) is not int or size < 0:
            raise ProtocolError(f"bring: file {quoted(name)} is not one of {FILE_NAMES}")
    if sum(sizes.values()) > MAX_FILES_BYTES:
        raise ProtocolError(f"bring: the files are over {MAX_FILES_BYTES:,} bytes")
    return sizes


# --- Who may speak ----------------------------------------------------------------------------
#
# A run may have a token, a secret that everybody who takes part knows. It never travels: client and
# server each send a random nonce, and then prove with an HMAC over both nonces that they know the
# token. The HMAC names the role of its sender, so that nobody can send a proof back to where it came
# from, and both nonces, so that nobody can send it again. The client proves first, and goes on only
# with a server that proves the same. With TLS, the client knows the server by its certificate too.
# Without a token only peers with a loopback or private address may speak.

PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in (
        "127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16",
        "169.254.0.0/16", "100.64.0.0/10", "fc00::/7", "fe80::/10",
    )
)  # fmt: skip


def proof_of(token, role, nonces, worker, session):
    """The proof, as hexadecimal text, that the "client" or the "server" knows the token. `nonces`:
    the client's, then the server's; `worker`, `session`: what the client has said hello with."""
    text = json.dumps(["DiLoCo hello", PROTOCOL_VERSION, role, *nonces, worker, session])
    key = token.encode("utf-8", "surrogateescape")
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def is_same(one, other):
    """Whether two texts are equal; how long it takes does not tell where they differ."""
    return hmac.compare_digest(one.encode(), other.encode())


def read_token(token=None, path=None):
    """The token that was given as text, in a file or in DILOCO_TOKEN, in this order; "" where none
    was. Raises ValueError where the token is empty, OSError where the file cannot be read."""
    where, text = "--token", token
    if text is None and path is not None:
        where = path
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            text = file.read().removesuffix("\n").removesuffix("\r")
    elif text is None:
        where, text = "DILOCO_TOKEN", os.environ.get("DILOCO_TOKEN")
    if text == "":
        raise ValueError(f"the token in {where} is empty; give one, or leave {where} out")
    return text or ""


def certificate_fingerprint(path):
    """The SHA-256 of the first certificate in a PEM file, as hexadecimal text. Raises OSError, and
    ValueError where there is none."""
    with open(path, encoding="ascii", errors="replace") as file:
        pattern = "-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----"
        found = re.search(pattern, file.read(), re.DOTALL)
    if not found:
        raise ValueError(f"{path} holds no certificate in PEM")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(found[0])).hexdigest()


@dataclass(frozen=True)
class Guard:
    """What a server asks of those who connect. `token`: "" for none. `context`: an ssl.SSLContext,
    or None for plain connections. `allow`: networks besides the private ones."""

    token: str = field(default="", repr=False)
    context: ssl.SSLContext | None = None
    allow: tuple = ()

    @property
    def admits_all(self):
        """Whether any address may connect: others cannot read along, and strangers have no token."""
        return bool(self.token and self.context)

    def check(self, address):
        """Raise Refused where a peer with this address may not speak. An IPv4 address that is
        written as an IPv6 one counts as IPv4."""
        if self.admits_all:
            return
        found = ipaddress.ip_address(address.partition("%")[0])
        found = getattr(found, "ipv4_mapped", None) or found
        if not any(found in network for network in (*PRIVATE, *self.allow)):
            raise Refused(
                "address",
                f"{address} is neither a loopback nor a private address: this server needs a token "
                "and TLS to let it in (--token-file, --tls-cert), or --allow for its network; or "
                "connect through a VPN or an ssh tunnel",
            )


def server_context(cert, key=None):
    """The ssl.SSLContext of a server with a certificate and key in PEM files, which may be one.
    Raises OSError or ValueError with a text that says which file is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0  # a ticket that nobody reads can make a peer's last words get lost
    for path in filter(None, (cert, key)):
        open(path, "rb").close()  # ssl does not say which file is missing
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # asks nobody for a password
    except ssl.SSLError as error:
        raise ValueError(
            f"{key or cert} does not hold the key to the certificate in {cert}, in PEM and without "
            f"a password ({error.reason or error})"
        ) from None
    return context


@functools.lru_cache(maxsize=8)
def client_context(tls):
    """The ssl.SSLContext of a client that knows its server as Access.tls says. Raises OSError where
    the file of an authority cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if is_fingerprint(tls):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif tls == "1":
        context.load_default_certs()
    else:
        context.load_verify_locations(tls)
    return context


def is_fingerprint(text):
    """Whether a text is a SHA-256 in hexadecimal, as `Access` has it."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


@dataclass(frozen=True)
class Access:
    """What a client needs to get in, and to know that the server is the right one.

    token: the run's, or "". tls: "" for a plain connection; else how the server's certificate is
    known: "1" for the authorities of this system, the path of a file with an authority in PEM, or
    the SHA-256 of the certificate in hexadecimal, with or without colons.
    """

    token: str = field(default="", repr=False)
    tls: str = ""

    @classmethod
    def of(cls, token=None, tls=None):
        """From arguments, and from DILOCO_TOKEN and DILOCO_TLS for those that are None; `tls` may
        be True or False too. Raises ValueError."""
        tls = os.environ.get("DILOCO_TLS", "") if tls is None else tls
        tls = {True: "1", False: "", "0": ""}.get(tls, tls)
        plain = str(tls).replace(":", "").lower()
        if is_fingerprint(plain):
            tls = plain
        elif tls not in ("", "1") and not os.path.isfile(tls):
            raise ValueError(
                f"{str(tls)[:80]!r} is neither a SHA-256 fingerprint of 64 hexadecimal digits nor "
                "a file with the certificate of an authority"
            )
        elif tls:
            try:
                client_context(str(tls))
            except OSError as error:
                raise ValueError(f"{tls} cannot be used as an authority: {error}") from None
        return cls(read_token(token), str(tls))

    @staticmethod
    def add_options(parser):
        """Add the options by which a command line tells a client how to get in."""
        add_token_options(parser)
        add = parser.add_argument
        add("--tls", action="store_true", help="speak TLS; the system's authorities must vouch")
        add("--tls-ca", metavar="FILE", help="speak TLS; this authority (PEM) must vouch")
        add("--tls-fingerprint", metavar="SHA256", help="speak TLS with this certificate only")

    @classmethod
    def of_options(cls, options):
        """From parsed options, and from the environment for those that are not given. Raises
        ValueError, OSError."""
        if options.tls_fingerprint is not None:
            given = options.tls_fingerprint
            if not is_fingerprint(given.replace(":", "").lower()):
                raise ValueError("--tls-fingerprint is not a SHA-256 of 64 hexadecimal digits")
        else:
            given = options.tls_ca or (options.tls or None)
        return cls.of(read_token(options.token, options.token_file) or None, given)

    def variables(self):
        """{name: text} of the environment variables that say the same."""
        values = {"DILOCO_TOKEN": self.token, "DILOCO_TLS": self.tls}
        return {name: value for name, value in values.items() if value}

    def secured(self, sock, host, server):
        """A connected socket with TLS around it, if this asks for TLS. Raises Refused where the
        server is not the one that `tls` names, or speaks no TLS, and OSError."""
        if not self.tls:
            return sock
        sock.settimeout(STALL_SECONDS)  # a server with many at its door lets a peer wait
        try:
            sock = client_context(self.tls).wrap_socket(sock, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            raise Refused(
                "tls",
                f"server {server}: its certificate is not to be trusted: {error.verify_message}; "
                "give --tls-ca its authority, or --tls-fingerprint what the server prints at start",
            ) from None
        except ssl.SSLError as error:
            if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                raise Refused(
                    "tls",
                    f"server {server} speaks no TLS: start it with --tls-cert, or leave --tls here",
                ) from None
            raise ConnectionError(f"no TLS with {server}: {error.reason or error}") from None
        if is_fingerprint(self.tls):
            shown = hashlib.sha256(sock.getpeercert(binary_form=True) or b"").hexdigest()
            if not is_same(shown, self.tls):
                sock.close()
                raise Refused(
                    "tls",
                    f"server {server} has a certificate with the fingerprint {shown}, not "
                    f"{self.tls}: it is another server, or its certificate is new",
                )
        return sock


PLAIN = Access()  # no token, no TLS


def add_token_options(parser):
    """Add the options by which a command line gives the token of a run."""
    add = parser.add_argument
    add("--token", metavar="TEXT", help="the run's secret; others on this machine can read it here")
    add("--token-file", metavar="FILE", help="file with the run's secret (or DILOCO_TOKEN)")


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
            good = len(value) <= 256 and value.isprintable()
        if not good:
            raise ProtocolError(
                f"{shown(self.type)}: field {name!r} is {quoted(value)}, not a valid {kind.__name__}"
            )
        return value

    def typed(self, *types, what="the reply"):
        """The message itself, where it is of one of these types. Raises ProtocolError elsewhere."""
        if self.type not in types:
            raise ProtocolError(
                f"{what} is {self.type[:32]!r}, not {' or '.join(map(repr, types))}"
            )
        return self

    def numbers(self, name, count, high=1 << 53):
        """A checked field that is a list of `count` numbers from 0 to `high`; of any length where
        `count` is None. Raises ProtocolError."""
        value = self.field(name, list, [] if count is None else REQUIRED)
        good = all(type(number) is int and 0 <= number <= high for number in value)
        if not good or count not in (None, len(value)):
            raise ProtocolError(f"{self.type}: field {name!r} is {repr(value)[:80]}")
        return value

    def expect(self, specs):
        """Raise ProtocolError unless the payload is announced as exactly these tensors."""
        specs = list(specs)
        if self.specs != specs:
            found, wanted = (
                ", ".join(describe(spec) for spec in each[:4]) or "nothing"
                for each in (self.specs, specs)
            )
            raise ProtocolError(f"{shown(self.type)}: carries {found}; expected {wanted}")


class Pace:
    """The least rate of the transfers on a connection: `rate` bytes a second over `window` seconds.
    Only the time that is spent waiting for the peer counts."""

    def __init__(self, rate, window):
        self.rate, self.window = rate, window
        self.begin()

    def begin(self):
        """A transfer begins, or a new window of it."""
        self.moved, self.seconds = 0, 0.0

    def note(self, count, seconds):
        """So many bytes have moved, after a wait of so many seconds. Whether that is fast enough."""
        self.moved += count
        self.seconds += seconds
        if self.seconds >= self.window:
            if self.moved < self.rate * self.window:
                return False
            self.begin()
        return True


class Large:
    """The place of a header over LARGE_BYTES, which belongs to a connection until what the header
    says has been taken in. Two such headers are read at a time, and one is parsed, for at most a
    fifth of a process's time; behind one that is not right there is a pause as well. So a flood of
    them costs little memory, and little of others' time. All are parsed in one thread, as the memory
    that a thread has had comes back to that thread alone. Raises ConnectionError where no place
    becomes free in time."""

    places = threading.BoundedSemaphore(2)
    turn = threading.Lock()
    free_at = 0.0  # seconds (time.monotonic) from which on the next one may be read and parsed
    parser = concurrent.futures.ThreadPoolExecutor(1, "large headers")  # starts at the first one

    def __init__(self):
        self.parts = dict.fromkeys(MAX_PARTS, 0)
        self.began = None  # seconds when it began to be parsed
        self.is_right = False  # whether it could be parsed
        if not self.places.acquire(timeout=LARGE_SECONDS):
            raise ConnectionError(f"too many large headers came at once for {LARGE_SECONDS:g} s")
        self.wait()

    def wait(self):
        """Wait until it may go on."""
        if (pause := Large.free_at - time.monotonic()) > 0:
            time.sleep(pause)

    def count(self, chunk):
        """Count the parts of the header as it comes. Raises ProtocolError where it has too many."""
        for mark, limit in MAX_PARTS.items():
            self.parts[mark] += bytes(chunk).count(mark)
            if (found := self.parts[mark]) > limit:
                raise ProtocolError(f"the header has {found:,} {mark.decode()!r}, over {limit:,}")

    def parse(self, raw):
        """As `parse_header`."""
        self.turn.acquire()
        self.began = time.monotonic()
        self.wait()
        self.began = time.monotonic()
        found = self.parser.submit(parse_header, raw).result()
        self.is_right = True
        return found

    def release(self):
        """Let others have the place. Called once."""
        end = time.monotonic()
        pause = 4 * (end - self.began) if self.began is not None else 0.0
        Large.free_at = end + (pause if self.is_right else max(pause, WRONG_SECONDS))
        if self.began is not None:
            self.turn.release()
        self.places.release()


def describe(spec):
    """A tensor in words, as `name F32[3, 4]`."""
    return f"{shown(spec.name)} {DTYPE_NAMES[spec.dtype]}{quoted(list(spec.shape))}"


class Connection:
    """One TCP connection that carries frames, for one thread at a time.

    Every method raises ConnectionError when the peer is gone, when no byte has moved for `stall`
    seconds, when a message moves at less than the `least` rate (bytes a second, seconds over which
    that is judged), or at the `deadline`; and ProtocolError when the peer breaks a rule.
    """

    least = LEAST_RATE, RATE_SECONDS  # of all connections that are not given another one

    def __init__(self, sock, peer, stall=STALL_SECONDS, *, least=None):
        self.sock, self.peer, self.stall = sock, peer.removeprefix("::ffff:"), stall
        self.pace = Pace(*(least or self.least))
        self.is_server = False  # whether this is the server's end, where large headers take turns
        self.large = []  # the Large of the last message, if that was one and is not taken in yet
        self.deadline = None  # seconds (time.monotonic) when all must have been sent and received
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
        self.pace.begin()
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

    def send_raw(self, header):
        """Send a message without a payload that `encode_header` has made."""
        self.pace.begin()
        self._send_all([memoryview(header)])

    def _send_all(self, views):
        # socket.sendall has a timeout for the whole, but a slow transfer is not a stall.
        self.sock.settimeout(self._within(min(self.stall, self.pace.window)))
        moved = time.monotonic()
        while views:
            began = time.monotonic()
            try:
                if isinstance(self.sock, ssl.SSLSocket):  # it has no sendmsg
                    sent = self.sock.send(views[0][:TLS_PIECE]) if views[0].nbytes else 0
                else:
                    sent = self.sock.sendmsg(views)
            except TimeoutError:
                self._within(self.stall)
                self._note(0, time.monotonic() - began, "took")
                if self.sock.gettimeout() and time.monotonic() - moved < self.stall:
                    continue
                raise TooSlow(f"{self.peer} took no byte for {self.stall:.0f} s") from None
            except (ssl.SSLError, ValueError) as error:  # ValueError: another thread has closed it
                raise ConnectionError(f"TLS with {self.peer}: {error}") from None
            moved = time.monotonic()
            self._note(sent, moved - began, "took")
            self.bytes_out += sent
            while views and sent >= views[0].nbytes:
                sent -= views.pop(0).nbytes
            if views:
                views[0] = views[0][sent:]

    def moved_since(self):
        """A function that gives the bytes which have moved since now, either way, for a Progress."""
        before = self.bytes_in + self.bytes_out
        return lambda: self.bytes_in + self.bytes_out - before

    def _note(self, count, seconds, did):
        if not self.pace.note(count, seconds):
            moved, least = self.pace.moved / self.pace.seconds / 1024, self.pace.rate / 1024
            raise TooSlow(
                f"{self.peer} {did} {moved:.3g} KiB/s over {self.pace.seconds:.3g} s, below the "
                f"least rate of {least:.3g} KiB/s (--min-rate on the server)"
            )

    def _within(self, seconds):
        """`seconds`, None for ever, or what is left until the deadline."""
        if self.deadline is None:
            return seconds
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise ConnectionError(f"{self.peer} did not answer in time")
        return left if seconds is None else min(seconds, left)

    def receive(self, idle):
        """The next message's header. `idle`: seconds to wait for its first byte, None for ever."""
        if self.unread:
            raise RuntimeError(f"{self.unread} bytes of the last message have not been read")
        self.taken_in()
        start = bytearray(8)
        self._receive_into(memoryview(start), idle, begins=True)
        length = header_length(start)
        if length > self.max_header:
            raise ProtocolError(f"a header of {length:,} bytes before the peer has said hello")
        try:
            if length > LARGE_BYTES and self.is_server:
                fields, specs = self._receive_large(length)
            else:
                fields, specs = parse_header(self._header(length))
            type = fields.pop("type", None)
            if not isinstance(type, str) or len(type) > 32:
                raise ProtocolError("a message without a type")
        except BaseException:
            self.taken_in()
            raise
        if type not in ("join", "bring"):
            self.taken_in()
        self.unread = payload_bytes(specs)
        return Message(type, fields, specs)

    def _receive_large(self, length):
        self.large.append(Large())
        before, self.deadline = self.deadline, time.monotonic() + self._within(LARGE_SECONDS)
        raw = self._header(length, self.large[0].count)
        self.deadline = before
        return self.large[0].parse(raw)

    def taken_in(self):
        """What the last header says has been taken in: another large one may be read."""
        with contextlib.suppress(IndexError):
            self.large.pop().release()

    def _header(self, length, check=None):
        """Receive a header, and call `check` with each chunk. A large one has memory straight from
        the system, which gives it as the bytes arrive, and gets it back at once."""
        raw = memoryview(mmap.mmap(-1, length) if length > LARGE_BYTES else bytearray(length))
        for start in range(0, length, LARGE_BYTES):
            chunk = raw[start : start + LARGE_BYTES]
            self._receive_into(chunk, self.stall)
            if check:
                check(chunk)
        return raw

    def read(self, tensor):
        """Fill a contiguous CPU tensor from the payload of the last message."""
        if tensor.nbytes > self.unread:
            raise RuntimeError(f"{tensor.nbytes} bytes wanted, {self.unread} are left")
        self._receive_into(memory(tensor), self.stall)
        self.unread -= tensor.nbytes

    def _receive_into(self, view, idle, begins=False):
        """Fill `view`. With `begins` it is the start of a message: the wait for its first byte is no
        part of a transfer."""
        limit = idle if begins else min(self.stall, self.pace.window)
        self.sock.settimeout(self._within(limit))
        unsent, moved = self._unsent(), time.monotonic()
        while view.nbytes:
            began = time.monotonic()
            try:
                count = self.sock.recv_into(view)
            except TimeoutError:
                self._within(idle)
                if not begins:
                    self._note(0, time.monotonic() - began, "sent")
                before, unsent = unsent, self._unsent()
                if unsent < before:  # on a slow line our own last message is still on its way
                    moved = time.monotonic()
                    continue
                seconds = time.monotonic() - moved
                if limit and seconds < idle and not begins:
                    continue
                kind = ConnectionError if begins else TooSlow
                raise kind(f"{self.peer} sent no byte for {seconds:.0f} s") from None
            except (ssl.SSLError, ValueError) as error:  # ValueError: another thread has closed it
                raise ConnectionError(f"TLS with {self.peer}: {error}") from None
            if not count:
                raise ConnectionError(f"{self.peer} closed the connection")
            moved = time.monotonic()
            if begins:
                self.pace.begin()
                begins, idle, limit = False, self.stall, min(self.stall, self.pace.window)
            else:
                self._note(count, moved - began, "sent")
            within = self._within(limit)
            if self.sock.gettimeout() != within:  # settimeout is a system call every time
                self.sock.settimeout(within)
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
        sink = torch.empty(1 << 16, dtype=torch.uint8, device="cpu")
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
        `on_wait`; without that, nothing may make us wait). Raises Refused when the reply is an
        `error`."""
        began, waits = time.monotonic(), 0
        while True:
            reply = self.receive(self.stall)
            if reply.type == "error":
                self._raise_refused(reply)
            elif reply.type != "wait":
                return reply
            reply.expect([])  # else the bytes would be taken for the next message
            waits += 1
            if on_wait is None or waits > 10 + 10 * (time.monotonic() - began):
                raise ProtocolError(
                    f"server {self.peer} says `wait` where or as often as none does"
                )
            on_wait(reply.fields)

    def _raise_refused(self, reply):
        text = reply.fields.get("message") or "refused without a reason"
        raise Refused(str(reply.fields.get("code"))[:32], f"server {self.peer}: {printable(text)}")

    def _raise_last_words(self):
        # A server that refuses in the middle of our payload says why before it hangs up.
        try:
            reply = self.receive(idle=1.0)
        except (OSError, ProtocolError):
            return
        if reply.type == "error":
            self._raise_refused(reply)

    def refuse(self, error):
        """Tell the peer why, then read on for a while: otherwise TCP's reset may discard the
        message before the peer reads it."""
        with contextlib.suppress(OSError, ProtocolError):
            self.deadline = time.monotonic() + REFUSED_SECONDS
            self.send("error", {"message": str(error), "code": getattr(error, "code", "protocol")})
            socket.socket.shutdown(self.sock, socket.SHUT_WR)
            self.unread = MAX_DISCARD_BYTES
            self.discard()

    def hang_up(self):
        """End the conversation, also from another thread than the one that uses the connection, which
        meets a ConnectionError."""
        with contextlib.suppress(OSError):  # the peer may have closed it already
            # SSLSocket.shutdown would take TLS away from under the thread that uses it.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self):
        """End the conversation and close the socket."""
        self.taken_in()
        self.hang_up()
        self.sock.close()

    def closed_by_peer(self):
        """Whether the peer has hung up, as far as this side knows; moves no byte."""
        try:
            poller = select.poll()  # recv alone would wait in spite of its flags
            poller.register(self.sock, select.POLLIN)
            if not poller.poll(0):
                return False
            return socket.socket.recv(self.sock, 1, socket.MSG_PEEK) == b""  # also below TLS
        except (OSError, ValueError):  # a closed socket has no number to register
            return True


# --- Hello ----------------------------------------------------------------------------------
#
# The first messages of a connection say who is there, and prove it: see "Who may speak".


def introduce(conn, who, token):
    """The client's side of hello. `who`: worker id and session, or {} for a peer that only
    looks. Returns the server's fields. Raises Refused where the server says no, or where only
    one side has a token or knows it."""
    hello = {"protocol": PROTOCOL_VERSION, "nonce": secrets.token_hex(16), **who}
    if len(encode_header({"type": "hello", **hello}, [])) - 8 > MAX_HELLO_BYTES:
        raise Refused("id", f"the worker id {who['worker'][:20]!r}... is too long for a hello")
    reply = conn.request("hello", hello)
    if reply.type == "challenge":
        if not token:
            raise Refused(
                "token",
                f"server {conn.peer} asks for the token of its run, and none is given here: "
                "use --token-file or DILOCO_TOKEN",
            )
        nonces = hello["nonce"], reply.field("nonce", str)
        names = who.get("worker", ""), who.get("session", "")
        reply = conn.request("proof", {"proof": proof_of(token, "client", nonces, *names)})
        theirs = reply.field("proof", str, "")
        if not is_same(theirs, proof_of(token, "server", nonces, *names)):
            raise Refused("token", f"server {conn.peer} does not know the token of the run")
    elif token:
        raise Refused(
            "token",
            f"server {conn.peer} asks for no token, so it may be a false one: start the server "
            "with the token too, or leave the token out here",
        )
    reply.typed("hello").expect([])
    return reply.fields


def greet(conn, fields, guard=Guard(), seconds=HELLO_SECONDS):
    """The server's side of hello: check who is there, note (worker id, session) as `worker`,
    both empty for a peer that only looks, and answer with `fields`. TLS and hello have
    `seconds` together. Raises Refused, ProtocolError and OSError; the peer is to be refused
    or closed then."""
    conn.deadline, conn.max_header = time.monotonic() + seconds, MAX_HELLO_BYTES
    conn.is_server = True
    _secure(conn, guard)
    guard.check(conn.peer)
    hello = conn.receive(idle=None).typed("hello", what="the first message")
    hello.expect([])
    version = hello.field("protocol", int)
    if version != PROTOCOL_VERSION:
        raise Refused(
            "version",
            f"this server speaks version {PROTOCOL_VERSION} of the protocol, you {version}; "
            "take the same version of the files on both machines",
        )
    name = hello.field("worker", str, "")
    session = hello.field("session", str) if name else ""
    proof = _challenge(conn, guard.token, hello, name, session) if guard.token else {}
    if name:
        conn.worker, conn.max_header = (name, session), MAX_HEADER_BYTES
    conn.send("hello", {"protocol": PROTOCOL_VERSION, **proof, **fields})
    conn.deadline = None


def _secure(conn, guard):
    # A peer that speaks no TLS hears so in plain words: a TLS alert would not tell it why.
    if not guard.context:
        return
    conn.sock.settimeout(conn._within(None))
    try:
        first = conn.sock.recv(1, socket.MSG_PEEK)
        if first and first != b"\x16":  # what every TLS conversation begins with
            raise Refused(
                "tls",
                "this server speaks TLS: use --tls-fingerprint with the fingerprint that it "
                "prints at start, or --tls or --tls-ca",
            )
        conn.sock = guard.context.wrap_socket(
            conn.sock, server_side=True, do_handshake_on_connect=False
        )
        conn.sock.settimeout(conn._within(None))
        conn.sock.do_handshake()
    except TimeoutError:
        raise ConnectionError(f"{conn.peer} takes too long") from None
    except ssl.SSLError as error:
        raise ConnectionError(f"no TLS with {conn.peer}: {error.reason or error}") from None


def _challenge(conn, token, hello, name, session):
    # The fields by which this server proves that it knows the token, once the client has.
    nonces = hello.field("nonce", str), secrets.token_hex(16)
    conn.send("challenge", {"nonce": nonces[1]})
    proof = conn.receive(idle=None).typed("proof", what="the answer to a challenge")
    proof.expect([])
    given = proof.field("proof", str)
    if not is_same(given, proof_of(token, "client", nonces, name, session)):
        time.sleep(WRONG_TOKEN_SECONDS)
        raise Refused("token", "the token is wrong: it is not the one of this server's run")
    return {"proof": proof_of(token, "server", nonces, name, session)}


def parse_address(text):
    """("host", port) from "host", "host:port", "[v6]:port" or a bare IPv6 address."""
    bracketed, named = r"\[([\w:.%-]+)\](?::(\d+))?", r"([\w.-]+)(?::(\d+))?"
    match = re.fullmatch(rf"{bracketed}|{named}|((?:[\w.%]*:){{2,}}[\w.%-]*)", text)
    host = match and (match[1] or match[3] or match[5])
    number = int(match[2] or match[4] or PORT) if match else 0
    if not 0 < number < 65536:
        raise ValueError(f"{text!r} is not an address; write host:port, for example host:{PORT}")
    return host, number


def connect(server, session_fields, access=PLAIN, **limits):
    """Connect to "host:port", say hello and return (Connection, the server's hello fields).

    `session_fields`: worker id and session, or {} for a peer that only looks. limits: of the
    Connection, from the greeting on. Raises OSError when there is nobody, Refused when the server
    says no or is not the one that `access` names.
    """
    host, port = parse_address(server)
    sock = socket.create_connection((host, port), CONNECT_SECONDS)
    try:
        sock = access.secured(sock, host, server)
        conn = Connection(sock, server, **limits)
        return conn, introduce(conn, session_fields, access.token)
    except BaseException:
        sock.close()
        raise


# --- The model as one flat vector -----------------------------------------------------------
#
# The tensors of the manifest, laid end to end, are one float32 vector. It is cut into stripes, a
# stripe has STRIPE numbers in a row, and slice k of N has every N-th stripe from the k-th on. Server
# and workers work on slices chunk by chunk, whatever the tensors' shapes, dtypes and devices;
# FlatModel translates between a chunk and the parameters that it overlaps.


def specs_of(named_tensors):
    """The manifest of (name, tensor) pairs, in their order."""
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in named_tensors]


def manifest_to_json(specs):
    """The manifest as [[name, dtype, shape], ...]."""
    return [[spec.name, DTYPE_NAMES[spec.dtype], list(spec.shape)] for spec in specs]


def manifest_from_json(listed, trained=True):
    """The specs of an untrusted manifest. Raises ProtocolError where a name stands twice. A
    manifest of what is `trained` must have at least one tensor, and only floating-point ones."""
    specs = []
    try:
        for name, dtype, shape in listed:
            if not isinstance(name, str) or name == "__metadata__":
                raise ValueError(f"{str(name)[:80]!r} is no name of a tensor")
            name.encode()  # half of a surrogate pair raises a ValueError
            specs.append(spec_of(name, dtype, shape))
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"the manifest is malformed: {error!r}") from None
    if payload_bytes(specs) >= 1 << 53:
        raise ProtocolError("the manifest's sizes are too large")
    if (trained and not specs) or len({spec.name for spec in specs}) != len(specs):
        raise ProtocolError("the manifest is empty or names a tensor twice")
    for spec in specs:
        if trained and not spec.dtype.is_floating_point:
            raise ProtocolError(f"the manifest has {describe(spec)}, which is not floating-point")
    return specs


def frozen_of(listed):
    """{name: (spec, fingerprint)} of a worker's frozen tensors. Raises ProtocolError."""
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
        f"tensor {quoted(name)} is {list(ours[name].shape)} on the server and {list(spec.shape)} here"
        for name, spec in theirs.items()
        if name in ours and spec.shape != ours[name].shape
    ]
    faults += [
        f"tensor {quoted(n)} {list(s.shape)} of the server is missing here"
        for n, s in ours.items()
        if n not in theirs
    ]
    faults += [
        f"tensor {quoted(n)} {list(s.shape)} is not in the server's model"
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


def stripe_of(total, count):
    """Elements of a stripe of a flat vector of `total` elements, which `count` slices share: STRIPE, or
    as a smaller power of two as many as leave each slice 64 stripes. So slices have the same size, to
    a stripe, and each has its part of all but the smallest tensors. Cut into `count` runs instead,
    the model learns less well: 0.5% of the loss with four slices (tests/parity.py)."""
    most = max(1, total // (64 * count))
    return min(STRIPE, 1 << most.bit_length() - 1) if count > 1 else max(1, total)


def ranges(specs):
    """The (spec, start, stop) of each tensor in the flat vector, in elements."""
    start = 0
    for spec in specs:
        yield spec, start, start + spec.numel
        start += spec.numel


class FlatModel:
    """Parameters, wherever they live and whatever their dtype, seen as one flat float32 vector, or
    as slice k of `count` of that. Elements are addressed as in the manifest, row by row, even where a
    tensor's memory is laid out in another order.

    `parameters`: tensors in the order of the manifest. If they are a part of a vector only: `at`,
    the place of the first element in it, and `stripe`, the vector's stripe_of.
    """

    def __init__(self, parameters, k=0, count=1, stripe=None, at=0):
        self.parts = []  # (parameter, its first place in the slice, its last, its place in the vector)
        self.writes = 0  # calls of `write`
        self.stripe = stripe or stripe_of(sum(p.numel() for p in parameters), count)
        self.first, self.step = k * self.stripe, count * self.stripe
        for parameter in parameters:
            end = at + parameter.numel()
            self.parts.append((parameter, self._before(at), self._before(end), at))
            at = end
        self.numel = self._before(at)

    def _before(self, place):
        """Elements of the slice before a place in the vector."""
        row, rest = divmod(place, self.step)
        return row * self.stripe + min(max(0, rest - self.first), self.stripe)

    def replace(self, before, parameter):
        """Have a tensor of the same shape take another one's place."""
        self.parts = [(parameter if p[0] is before else p[0], *p[1:]) for p in self.parts]

    def parts_in(self, start, stop):
        """The parts that have elements in [start, stop)."""
        first = bisect.bisect_right(self.parts, start, key=lambda part: part[2])
        return itertools.takewhile(lambda p: p[1] < stop, itertools.islice(self.parts, first, None))

    def views(self, start, *numbers):
        """The elements of each parameter from `start` on, and those of float32 chunks in their places:
        (parameter, all of its elements row by row, some of these, those of each chunk). Row by row
        they are a copy where the parameter's memory has another order."""
        stop = start + len(numbers[0])
        for parameter, low, high, at in self.parts_in(start, stop):
            parameter = parameter.detach()
            flat, a, b = parameter.reshape(-1), max(low, start), min(high, stop)
            while a < b:  # the end of a stripe, whole ones, the beginning of one
                row, rest = divmod(a, self.stripe)
                width = min(self.stripe - rest, b - a)
                rows = max(1, (b - a) // self.stripe) if rest == 0 else 1
                begin, count = row * self.step + self.first + rest - at, rows * width
                local = flat[begin : begin + (rows - 1) * self.step + width]
                others = [each[a - start : a - start + count] for each in numbers]
                if rows > 1:
                    local = local.unfold(0, width, self.step)
                    others = [each.view(rows, width) for each in others]
                yield parameter, flat, local, *others
                a += count

    @property
    def device(self):
        """Where the first parameter lives."""
        return self.parts[0][0].device

    def streams(self):
        """The current stream of each GPU that has a parameter, as there may be several."""
        devices = {part[0].device for part in self.parts if part[0].is_cuda}
        return [torch.cuda.current_stream(device) for device in devices]

    def read(self, start, out):
        """Copy elements from `start` on into the float32 tensor `out`."""
        for _, _, local, rest in self.views(start, out):
            rest.copy_(local)

    def subtract_from(self, start, numbers, out):
        """`numbers`, rounded to the parameters' dtypes, minus the elements from `start` on, into
        `out`; both are float32 chunks."""
        for _, _, local, own, rest in self.views(start, self.rounded(start, numbers), out):
            torch.sub(own, local.to(out.device, out.dtype), out=rest)

    def write(self, start, values):
        """Set elements from `start` on, rounded to each parameter's dtype."""
        self.writes += 1
        for parameter, flat, local, own in self.views(start, values):
            local.copy_(own)
            if not parameter.is_contiguous():
                parameter.copy_(flat.view(parameter.shape))

    def move(self, start, before, after):
        """Move elements from `start` on as the float32 chunk `after` is from `before`: each becomes what
        it is beyond `before`, on top of `after`. Returns whether all that is beyond it is finite."""
        self.writes += 1
        beyond = scratch("beyond", before, before.numel())
        views = [*self.views(start, beyond, before, after)]
        for _, _, local, rest, old, _ in views:
            torch.sub(local.to(rest.device, rest.dtype), old, out=rest)
        is_finite = math.isfinite(beyond.dot(beyond).item())
        for parameter, flat, local, rest, _, new in views:
            if local.dtype == rest.dtype and local.device == rest.device:
                torch.add(rest, new, out=local)
            else:
                local.copy_(rest.add_(new))
            if not parameter.is_contiguous():
                parameter.copy_(flat.view(parameter.shape))
        return is_finite

    def rounded(self, start, values):
        """`values`, for elements from `start` on, rounded to the parameters' dtypes, as float32."""
        parts = self.parts_in(start, start + values.numel())
        if all(parameter.dtype == torch.float32 for parameter, *_ in parts):
            return values
        rounded = values.clone()
        for _, _, local, own, rest in self.views(start, values, rounded):
            rest.copy_(own.to(local.dtype))
        return rounded


def chunks(count, size=CHUNK, start=0):
    """The (start, stop) of each chunk, of `size` elements, of a slice from `start` to `count`."""
    return ((a, min(a + size, count)) for a in range(start, count, size))


class Checksum:
    """A checksum of float32 bits at the speed of memory.

    The bits of each chunk of CHUNK elements are added up, two elements as one integer of 64 bits
    (modulo 2 to the 64th, so in any order), and the list of sums is hashed. This guards against
    faults, not against forgery.
    """

    SPEC = TensorSpec("checksum", torch.uint8, (16,))

    def __init__(self):
        self.sums, self.count = [], 0

    def add(self, part):
        """Add the next chunk, or the next part of one, float32 and contiguous: an even number of elements,
        but for the last."""
        if self.count % CHUNK == 0:
            self.sums.append(0)
        even = part.numel() & ~1
        total = part[:even].view(torch.int64).sum().item()
        if even < part.numel():
            total += part[even:].view(torch.int32).item() & 0xFFFFFFFF
        self.sums[-1] = (self.sums[-1] + total) & 0xFFFFFFFFFFFFFFFF
        self.count += part.numel()

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
# chunks are still on their way. What a codec of few bits rounds off is not lost: the sender keeps it
# as its residual and adds it to the next message. bfloat16 rounds off a thousandth, which makes no
# difference to the loss (tests/levers.py) and is not worth a residual's memory.


# By thread, the memory that it works in, chunk after chunk: asking the system for fresh memory each
# time would take longer than the work.
SCRATCH = threading.local()


def scratch(use, like, count):
    """An uninitialized tensor that belongs to this thread: `count` elements of the dtype and on the
    device of `like`. The next call with the same `use` may give the same memory."""
    kept, key = vars(SCRATCH), (use, like.dtype, like.device)
    if key not in kept or kept[key].numel() < count:
        with torch.inference_mode(False):  # the program may be in it now and not at the next call
            room = torch.empty(max(count, CHUNK), dtype=like.dtype, device=like.device)
        kept[key] = room
    return kept[key][:count]


class Codec:
    """How float32 numbers travel: encoded into the tensors of a message, chunk by chunk. A chunk
    begins at a multiple of `size`; chunks have their bytes one after the other, so that a message
    can be made, sent and taken apart chunk by chunk. `feedback` tells whether what it rounds off is
    worth being kept. A subclass defines:

    layout(count): the tensors that `count` float32 numbers become;
    encode(numbers, tensors, start): put a float32 chunk into the message's tensors, at element `start`;
    decode(tensors, start, out): decode elements from `start` on into the float32 chunk `out`;
    finite(tensors, start, stop): whether all numbers of an encoded chunk are finite and at most
    MAX_ABS in size.
    """

    feedback, size = True, CHUNK

    def square(self, numbers, tensors, start):
        """The sum of the squares of `numbers`, to which the elements from `start` on decode; infinite
        where not all of them are finite and at most MAX_ABS in size."""
        total = numbers.dot(numbers).item()
        # A finite sum has no number over 2e19. Another one may have, which is no fault yet.
        is_fine = math.isfinite(total) or self.finite(tensors, start, start + numbers.numel())
        return square_of(numbers, total) if is_fine else math.inf

    def decoded(self, tensors, start, like):
        """The decoded elements from `start` on, as many as `like` has. They may stand in scratch
        memory: use them before the next call."""
        numbers = scratch("decoded", like, like.numel())
        self.decode(tensors, start, numbers)
        return numbers

    def sent(self, numbers, tensors, start):
        """Encode a float32 chunk as `encode` does, and return what it decodes to. It may stand in
        scratch memory: use it before the next call."""
        self.encode(numbers, tensors, start)
        return self.decoded(tensors, start, numbers)


class Cast(Codec):
    """A codec that stores each number in another float dtype, rounded to nearest even."""

    feedback, size = False, TILE

    def __init__(self, dtype):
        self.dtype = dtype

    def layout(self, count):
        return [TensorSpec("values", self.dtype, (count,))]

    def encode(self, numbers, tensors, start):
        tensors["values"][start : start + numbers.numel()].copy_(numbers)

    def decode(self, tensors, start, out):
        out.copy_(tensors["values"][start : start + out.numel()])

    def decoded(self, tensors, start, like):
        if self.dtype != torch.float32:
            return super().decoded(tensors, start, like)
        return tensors["values"][start : start + like.numel()]

    def finite(self, tensors, start, stop):
        return within(tensors["values"][start:stop])


class Blocks(Codec):
    """A codec that stores BLOCK numbers as integers of `bits` (8, 4 or 2) and one scale.

    A scale is the largest absolute value of its block over the largest integer, as bfloat16 rounded
    up: with float16 the small updates of a late round would underflow. Each chunk has its scales
    first, then its integers; of 4 bits, the first half of the chunk's numbers is in the low halves
    of the bytes, the second in the high ones, and of 2 bits each quarter has its own two. A last block
    that is not full is filled with zeros.

    With 2 bits the levels are -1.5, -0.5, 0.5 and 1.5 scales, and a scale is two fifths of the largest
    absolute value: so the largest numbers are cut to six tenths of what they are. Of what AdamW's steps
    add up to, this loses less than scales from a block's mean size or its root mean square.
    """

    TINY = 1e-30  # a block of smaller numbers is sent as zeros: the reciprocal would overflow

    def __init__(self, bits):
        self.bits, self.parts = bits, 8 // bits
        self.top = {8: 127, 4: 7, 2: 2.5}[bits]  # scales in the largest number
        self.most = {8: 128, 4: 8, 2: 2.5}[bits]  # scales that no number may be larger than

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
        """Encode a chunk. Returns (its scales, its integers as float32 in scratch memory)."""
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
        torch.mul(blocks, inverse.unsqueeze(1), out=work)
        work = work.floor_().clamp_(-2, 1) if self.bits == 2 else work.round_()
        whole = integers if self.bits == 8 else scratch("whole", integers, size)
        whole.view(torch.int8).copy_(work.view(-1))
        # Bytes wrap around, so a negative integer and its offset, added later, come to what is meant.
        first, *others = whole.view(self.parts, -1)
        for row, part in enumerate(others, 1):
            first.add_(part, alpha=1 << row * self.bits)
        if others:
            torch.add(first, 0x88 if self.bits == 4 else 0xAA, out=integers)
        return scales, work

    def sent(self, numbers, tensors, start):
        scales, blocks = self.encode(numbers, tensors, start)
        # Decoding knows no negative zero, which adding zero makes a positive one.
        blocks.add_(0.5 if self.bits == 2 else 0.0).mul_(scales.float().unsqueeze(1))
        return blocks.view(-1)[: numbers.numel()]

    def decode(self, tensors, start, out):
        scales, integers = self._parts(tensors, start, out.numel())
        size = len(scales) * BLOCK
        blocks = out if out.numel() == size else out.new_empty(size)
        if self.bits == 8:
            blocks.copy_(integers.view(torch.int8))
        for row, part in enumerate(blocks.view(self.parts, -1) if self.bits < 8 else ()):
            bits = scratch("part", integers, len(integers))
            torch.bitwise_right_shift(integers, row * self.bits, out=bits)
            bits.bitwise_and_((1 << self.bits) - 1).sub_(1 << self.bits - 1)
            part.copy_(bits.view(torch.int8))
        if self.bits == 2:
            blocks.add_(0.5)
        blocks.view(-1, BLOCK).mul_(scales.float().unsqueeze(1))
        if blocks is not out:
            out.copy_(blocks[: out.numel()])

    def finite(self, tensors, start, stop):
        return within(self._parts(tensors, start, stop - start)[0], MAX_ABS / self.most)


class Largest(Codec):
    """A codec that stores of `every` numbers (16 or 32) the largest one, in one byte, and zero for the
    others: its place among them in the low bits, above that its sign, and its size in what is left.

    The numbers that compete lie far apart, one in each 16th or 32nd of a chunk, so that most are of other
    tensors' rows. Each chunk has the scales of BLOCK kept numbers first, as in `Blocks`; a size is 0,
    1, 2, ... scales. For the way up, with error feedback: what is not sent now grows until it is, as in
    SparseLoCo (arXiv 2508.15706), which keeps the 64 largest of 4,096 neighbours. For the same bytes
    this keeps more of a pseudo-gradient, and finds it sooner (tests/bench_codecs.py).
    """

    def __init__(self, every):
        self.every = every
        self.most = 128 // every - 1  # scales in the largest number

    def layout(self, count):
        blocks = -(-count // (self.every * BLOCK))
        return [TensorSpec("values", torch.uint8, (blocks * (2 + BLOCK),))]

    def _parts(self, tensors, start, count):
        """(scales bfloat16 [blocks], bytes uint8 [blocks * BLOCK]) of the chunk at `start`."""
        begin, end = (payload_bytes(self.layout(n)) for n in (start, start + count))
        raw = tensors["values"][begin:end]
        scales = 2 * (len(raw) // (2 + BLOCK))
        return raw[:scales].view(torch.bfloat16), raw[scales:]

    def encode(self, numbers, tensors, start):
        scales, raw = self._parts(tensors, start, numbers.numel())
        size = len(raw) * self.every
        if numbers.numel() < size:
            numbers = torch.nn.functional.pad(numbers, (0, size - numbers.numel()))
        rows = numbers.view(self.every, -1)
        # Of floats without their sign, the order is that of their bits. The last bits give way to the
        # place, so that the largest integer tells both.
        work = scratch("bits", rows.view(torch.int32), size).view(rows.shape)
        torch.bitwise_and(rows.view(torch.int32), 0x7FFFFFFF & -self.every, out=work)
        places = torch.arange(self.every, dtype=torch.int32, device=work.device)
        work.bitwise_or_(places.unsqueeze(1))
        best = work.amax(0)
        places = torch.bitwise_and(best, self.every - 1)
        sizes = best.bitwise_and_(-self.every).view(torch.float32).view(-1, BLOCK)
        largest = sizes.amax(1).div_(self.most)
        largest.view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000)
        scales.copy_(largest)
        inverse = torch.where(largest > Blocks.TINY, largest.reciprocal(), 0)
        sizes.mul_(inverse.unsqueeze(1)).round_().clamp_(0, self.most)
        negative = rows.gather(0, places.long().unsqueeze(0)).squeeze(0) < 0
        raw.copy_(sizes.view(-1).mul_(2).add_(negative).mul_(self.every).add_(places))

    def kept(self, tensors, start, count):
        """(places int64, numbers float32, one each of `every`) of the chunk at `start`."""
        scales, raw = self._parts(tensors, start, count)
        places = torch.bitwise_and(raw, self.every - 1).long()
        signed = torch.bitwise_right_shift(raw, self.every.bit_length() - 1)
        numbers = torch.bitwise_right_shift(signed, 1).float()
        numbers.mul_(torch.bitwise_and(signed, 1).float().mul_(-2).add_(1))
        numbers.view(-1, BLOCK).mul_(scales.float().unsqueeze(1))
        return places, numbers

    def decode(self, tensors, start, out):
        places, numbers = self.kept(tensors, start, out.numel())
        size = len(places) * self.every
        rows = out if out.numel() == size else out.new_empty(size)
        rows.zero_().view(self.every, -1).scatter_(0, places.unsqueeze(0), numbers.unsqueeze(0))
        if rows is not out:
            out.copy_(rows[: out.numel()])

    def finite(self, tensors, start, stop):
        return within(self._parts(tensors, start, stop - start)[0], MAX_ABS / self.most)


CODECS = {
    "fp32": Cast(torch.float32),
    "bf16": Cast(torch.bfloat16),
    "int8": Blocks(8),
    "int4": Blocks(4),
    "int2": Blocks(2),
    "top16": Largest(16),
    "top32": Largest(32),
}


def chunk_bytes(codec, count):
    """The (start, stop, first byte, last byte) of each encoded chunk of `count` elements."""
    for start, stop in chunks(count):
        yield start, stop, *(payload_bytes(codec.layout(n)) for n in (start, stop))


def within(numbers, limit=MAX_ABS):
    """Whether floating-point numbers are all finite and at most `limit` in size. Without their
    signs they have the order of their bits as integers, in which NaN comes last."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.dtype.itemsize]
    largest = torch.tensor(limit, dtype=numbers.dtype, device="cpu").view(bits).item()
    signed = numbers.view(bits)
    unsigned = scratch("unsigned", signed, signed.numel())
    torch.bitwise_and(signed, torch.iinfo(bits).max, out=unsigned)
    return signed.numel() == 0 or unsigned.amax().item() <= largest


def square_of(numbers, total=math.inf):
    """The sum of the squares of float32 numbers, which may be too large for a float32; `total`: the
    sum as float32 has it, if that is known."""
    total = numbers.dot(numbers).item() if total == math.inf else total
    return total if math.isfinite(total) else numbers.double().square().sum().item()
