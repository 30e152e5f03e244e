"""Wrong inputs by the million: what a peer, a disk or a server may say, changed at random places.

    python tests/fuzz.py                                   # a million inputs
    python tests/fuzz.py --inputs 20000 --first 7 --only files

Notable:
- An input is something valid of which a few bits, bytes or JSON values have been changed. A seed
  makes one input: a fault prints its seed, and `--inputs 1 --first SEED --only KIND` repeats it.
- `headers`, `fields`, `replies` and `files` call what reads them, and nothing but the error that is
  promised may come out.
- `folders` breaks checkpoint folders: the server loads a state whose numbers are all finite, or says
  in one line what is wrong.
- `talks` has strangers and members speak to a real server in the midst of a run. Two honest workers
  train on it: afterwards they still do, and neither memory, threads nor the log have grown.
- `servers` lies to a real DiLoCoWorker, from whose steps only the promised errors may come.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import diloco_callback
import protocol
import server
from protocol import FRESH, ProtocolError, Refused, Version

ROOT = os.path.dirname(os.path.abspath(protocol.__file__))
LIFE = "0123456789ab" + "cdef0123"
ODD = [
    None, True, False, 0, 1, -1, 7, 1 << 31, 1 << 53, (1 << 53) - 1, 1 << 64, -(1 << 63), 0.5, -0.0,
    1e-320, 1e30, 1e308, "", "a", "A" * 300, "\n", "\x00", "\x1b[2J", "é", "../../x", "w" * 70_000,
    [], [[]], {}, {"": None}, [0, 0], ["", 0], [LIFE, 1 << 53], [LIFE, -1], ["f" * 20, 5],
]  # fmt: skip


def changed_value(value, rng):
    """A JSON value of which one place, at any depth, has been replaced, removed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        fresh = dict(value)
        act = rng.random()
        if act < 0.1:
            del fresh[key]
        elif act < 0.15:
            fresh[rng.choice(["", "x", key * 2])] = fresh[key]
        else:
            fresh[key] = changed_value(fresh[key], rng)
        return fresh
    if isinstance(value, list | tuple) and value and rng.random() < 0.7:
        fresh, place = list(value), rng.randrange(len(value))
        act = rng.random()
        if act < 0.1:
            del fresh[place]
        elif act < 0.2:
            fresh *= rng.choice([2, 3, 50])
        else:
            fresh[place] = changed_value(fresh[place], rng)
        return fresh
    if type(value) is int and rng.random() < 0.3:
        return value + rng.choice([-1, 1, 1000, -1000])
    return rng.choice(ODD)


def changed_bytes(raw, rng):
    """Some bytes with a few of them flipped, cut out, repeated or replaced."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        place = rng.randrange(len(raw) + 1)
        act = rng.random()
        if act < 0.5 and place < len(raw):
            raw[place] ^= 1 << rng.randrange(8)
        elif act < 0.65:
            del raw[place : place + rng.choice([1, 8, 100])]
        elif act < 0.8:
            raw[place:place] = rng.randbytes(rng.choice([1, 8, 100]))
        elif act < 0.9:
            raw[place:place] = raw[: rng.choice([1, 8, 100])]
        else:
            del raw[place:]
    return bytes(raw)


# --- What is valid -----------------------------------------------------------------------------

MANIFEST = [["w", "F32", [3, 4]], ["b", "BF16", [5]]]
BUFFERS = [["mean", "F32", [2]]]
FATES = {"ada": [3, "", 2], "bob": [1, "not finite", 1]}
READING = {
    **{
        "cycle": 5,
        "made": 12,
        "trained": 3.5,
        "waited": 0.25,
        "transferred": 0.5,
        "max_steps": 100,
    },
    "evaluation": {"step": 10, "loss": 2.5, "is_global": True},
}
LINE = {  # of rounds.jsonl
    **{
        "round": 3,
        "fragment": 0,
        "time": 1.7e9,
        "step": 15,
        "steps": 10,
        "tokens": 5,
        "share": 1.0,
    },
    **{
        "members": ["ada"],
        "losses": {"ada": 2.5, "bob": None},
        "weights": {"ada": 1.0},
        "norm": 0.5,
    },
    "pushed": {
        "ada": {"trained": 3.5, "waited": 0.5, "transferred": 0.5, "steps": 5, "weight": 1.0}
    },
    **{
        "reasons": {"bob": "too old"},
        "refused": ["bob"],
        "joined": ["ada"],
        "left": [["bob", "done"]],
    },
    **{"evaluations": {"ada": 2.5}, "evaluation": 2.5, "faults": 1, "seconds": 2.5, "bytes_up": 5},
    **{"seconds_waiting": 0.5, "totals": {"rounds": 3, "steps": 30}},
}
REQUESTS = {
    "join": {
        "manifest": MANIFEST,
        "buffers": BUFFERS,
        "frozen": [["f", "F32", [2], "0" * 32]],
        "sync_every": 5,
        "num_fragments": 1,
        "source": "",
        "host": "h",
        "ranks": 1,
        "step": 10,
        "position": 0,
        "run": LIFE,
        "versions": [[LIFE, 2], [LIFE, 2]],
        "folded": [FATES, FATES],
        "closed": [],
        "resumes": [],
        "again": False,
    },
    "bring": {"slices": [0], "files": {"config.json": 3}},
    "push": {
        "slice": 0,
        "seq": 4,
        "base": [LIFE, 2],
        "steps": 5,
        "closing": False,
        "step": 15,
        "position": 0,
        "tokens": 100,
        "loss": 2.5,
        **READING,
        "adopts_in": 0.5,
    },
    "pull": {"slice": 0, "version": [LIFE, 2], "seq": 4},
    "fetch": {"frozen": ["f"], "files": False},
    "heartbeat": {
        "step": 12,
        "position": 2,
        "steps_per_second": 3.5,
        "loss": 2.5,
        "blocked": [0, 4],
        **READING,
    },
    "leave": {"reason": "done"},
    "status": {},
    "history": {"after": 2, "span": 1},
    "drop": {"worker": "nobody"},
}
REPLIES = {
    "entry": {
        "slice": 0,
        "base": [LIFE, 2],
        "version": [LIFE, 3],
        "folded": FATES,
        "plain": False,
        "part": 1.0,
        "made": 3.0,
        "step": 15,
        "more": False,
    },
    "slice": {
        "slice": 0,
        "version": [LIFE, 3],
        "folded": FATES,
        "step": 15,
        "made": 3.0,
        "more": False,
    },
}


BEAT = {
    "round": 1,
    "rank": 0,
    "world": 1,
    "members": ["eve"],
    "orders": [],
    "stalls": [],
    "pace": 5,
}
JOINED = {
    "run": LIFE,
    "index": 0,
    "rank": 0,
    "world": 1,
    "num_shares": 8,
    "heartbeat_seconds": 1.0,
    "upload_codec": "bf16",
    "download_codec": "bf16",
    "error_feedback": True,
    "max_staleness": 10,
    "settings": {
        "outer_lr": 0.7,
        "outer_momentum": 0.9,
        "nesterov": True,
        "momentum_warmup": True,
    },
    "step": 0,
    "turns": [0],
    "steps": 2,
    "known": [0],
    "versions": [[LIFE, 1]],
    "frozen": [],
    "manifest": MANIFEST,
    "buffers": [],
}


def frame(type, fields, specs=()):
    """The bytes of a message without its payload."""
    return protocol.encode_header({"type": type, **fields}, specs)


def changed_frame(raw, rng):
    """A message of which the JSON or some bytes have been changed."""
    if rng.random() < 0.4:
        return changed_bytes(raw, rng)
    header = json.loads(raw[8:])
    fields = json.loads(header["__metadata__"]["diloco"])
    if rng.random() < 0.8:
        header["__metadata__"]["diloco"] = json.dumps(changed_value(fields, rng))
    else:
        header = changed_value(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


# --- Kinds that call what reads an input ---------------------------------------------------------


class Kind:
    """A kind of input. `one(rng)` makes one, gives it to the product, and returns the name of what
    came of it; any exception out of it is a fault."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def quiet(self):
        """What the product logs within goes nowhere."""
        nowhere = contextlib.ExitStack()
        nowhere.enter_context(contextlib.redirect_stdout(io.StringIO()))
        nowhere.enter_context(contextlib.redirect_stderr(io.StringIO()))
        return nowhere


class Headers(Kind):
    """Headers of messages and files."""

    def __enter__(self):
        spec = protocol.specs_of({"x": torch.zeros(3, 4), "y": torch.zeros(5)}.items())
        self.valid = [
            frame(name, fields, spec[: len(name) % 3]) for name, fields in REQUESTS.items()
        ]
        return self

    def one(self, rng):
        raw = changed_frame(rng.choice(self.valid), rng)
        try:
            if len(raw) < 8:
                return "short"
            length = protocol.header_length(raw[:8])
            protocol.parse_header(raw[8 : 8 + length])
        except ProtocolError:
            return "refused"
        return "taken"


class Fields(Kind):
    """The fields of requests, as the server's checks read them."""

    def one(self, rng):
        type = rng.choice(["join", "push", "heartbeat", "bring", "line"])
        fields = changed_value(LINE if type == "line" else REQUESTS[type], rng)
        fields = fields if isinstance(fields, dict) else {}
        message = protocol.Message(type, fields, [])
        conn = argparse.Namespace(worker=("ada", "s"))
        try:
            if type == "join":
                server.facts_of(conn, message)
                [protocol.version_of(v) for v in message.field("versions", list)]
                [protocol.fates_of(f) for f in message.field("folded", list, [])]
            elif type == "push":
                protocol.version_of(message.field("base", list))
                for name in ("slice", "seq", "steps", "step", "tokens"):
                    message.field(name, int)
                message.field("loss", float, None, low=-1e30, high=1e30)
            elif type == "heartbeat":
                server.blocked_of(message, 3)
                server.evaluation_of(message)
                message.field("steps_per_second", float, 0.0)
            elif type == "line":
                history = server.History()
                for row in (server.row_of(LINE | {"round": 1}), server.row_of(fields)):
                    history.restore(row)
                protocol.encode_header({"points": [p.told for p in history.points]}, ())
                protocol.encode_header({"recent": [more for _, more in history.recent]}, ())
            else:
                protocol.file_sizes_of(message.field("files", dict, {}))
        except ProtocolError:
            return "refused"
        return "taken"


class Replies(Kind):
    """The fields of a server's replies, as the worker's checks read them."""

    def one(self, rng):
        type = rng.choice(["join", "entry", "slice", "heartbeat", "bring"])
        if type == "join":
            valid, read = JOINED, lambda reply: diloco_callback.joined_of(reply, 1)
        elif type == "heartbeat":
            valid, read = BEAT, diloco_callback.beat_of
        elif type == "bring":
            valid, read = REQUESTS["bring"], lambda reply: diloco_callback.wanted_of(reply, 2)
        else:
            valid, read = REPLIES[type], lambda reply: diloco_callback.news_of(reply, 0)
        fields = changed_value(valid, rng)
        try:
            read(protocol.Message(type, fields if isinstance(fields, dict) else {}, []))
        except ProtocolError:
            return "refused"
        return "taken"


class Files(Kind):
    """Safetensors files."""

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="fuzz-")
        self.path = os.path.join(self.folder, "model.safetensors")
        protocol.save_file(self.path, {"w": torch.ones(3, 4), "b": torch.zeros(5).bfloat16()})
        with open(self.path, "rb") as file:
            self.valid = file.read()
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder)

    def one(self, rng):
        raw = changed_bytes(self.valid, rng)
        with open(self.path, "wb") as file:
            file.write(raw)
        try:
            for tensor in protocol.load_file(self.path)[1].values():
                tensor.float().sum()
        except (ProtocolError, OSError):
            return "refused"
        return "taken"


class Folders(Kind):
    """The output folder of a run with two checkpoints, in whose newest one file is changed."""

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="fuzz-")
        self.run = os.path.join(self.folder, "run")
        store = server.Store(self.run)
        manifest, buffers = (
            protocol.manifest_from_json(m, t) for m, t in ((MANIFEST, True), (BUFFERS, False))
        )
        model = server.GlobalModel(manifest, buffers, 2, "bf16", "bf16", True)
        state = {
            "run": LIFE,
            "life": LIFE,
            "step": 10,
            "shares": 8,
            "settings": dict(server.DEFAULTS),
            "members": ["ada"],
            "stopping": [],
            "indices": {"ada": 0},
            "sessions": {"ada": "s"},
            "dropped": {"bob": "t"},
        }
        for number in (2, 3):
            fates = {"ada": [3, "", number]}
            heads = [(Version(LIFE, number), fates)] * 3
            store.save({**state, "heads": heads}, model, model.freeze())
        named = "members", "stopping", "indices", "sessions", "dropped"
        store.save_names({name: state[name] for name in named})
        newest = os.path.join(self.run, "checkpoint-3")
        self.valid = {}
        for path in (os.path.join(newest, n) for n in sorted(os.listdir(newest))):
            with open(path, "rb") as file:
                self.valid[path] = file.read()
        with open(os.path.join(self.run, "members.json"), "rb") as file:
            self.valid[os.path.join(self.run, "members.json")] = file.read()
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder)

    def one(self, rng):
        path = rng.choice(list(self.valid))
        raw = self.valid[path]
        if path.endswith("outer.safetensors") and rng.random() < 0.5:
            length = 8 + int.from_bytes(raw[:8], "little")
            raw = changed_frame(raw[:length], rng) + raw[length:]
        else:
            raw = changed_bytes(raw, rng)
        with open(path, "wb") as file:
            file.write(raw)
        try:
            with self.quiet():
                state, model = server.Store(self.run).open("bf16", "bf16", True)
        except SystemExit as error:
            raise AssertionError(
                f"refused, though an older checkpoint is whole: {error}"
            ) from error
        finally:
            with open(path, "wb") as file:
                file.write(self.valid[path])
        assert state is not None, "nothing is loaded, though an older checkpoint is whole"
        for vector in (model.params, *model.outer.values(), model.values):
            assert vector is None or vector.isfinite().all(), (
                "numbers that are not finite are loaded"
            )
        return f"round {min(version.number for version, _ in state['heads'])}"


# --- Kinds that speak to processes ----------------------------------------------------------------


def usage(pid):
    """(bytes of memory, threads, open files) of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return int(lines["VmRSS"].split()[0]) << 10, int(lines["Threads"]), files


class Talks(Kind):
    """What strangers and members say to a server, while two honest workers train on it."""

    TOKEN = "only for the fuzzer's members"

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="fuzz-")
        env = {k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")}
        env |= {"OMP_NUM_THREADS": "1", "DILOCO_TOKEN": self.TOKEN, "PYTHONUNBUFFERED": "1"}
        self.log = os.path.join(self.folder, "log")
        self.output = open(self.log, "wb")  # closed in __exit__
        start = {"env": env, "stdout": self.output, "stderr": subprocess.STDOUT}
        options = ["--port", "0", "-n", "2", "--worker-timeout", "5", "--save-every", "100"]
        options += ["--outer-lr", "0.3", "--outer-momentum", "0"]  # training is to go on for long
        script = [sys.executable, os.path.join(ROOT, "server.py"), "-m"]
        self.server = subprocess.Popen(
            [*script, os.path.join(self.folder, "run"), *options], **start
        )
        port = self.await_line(r"listening on port (\d+)")[1]
        self.address = f"127.0.0.1:{port}"
        toy = [
            sys.executable,
            os.path.join(ROOT, "tests", "toy_worker.py"),
            "--server",
            self.address,
        ]
        toy += ["--steps", "1000000000", "--pause", "0.01", "--worker-id"]
        self.workers = [subprocess.Popen([*toy, id], **start) for id in ("ada", "bob")]
        self.await_line(r"round 3 \|")
        self.status = self.ask()
        self.before = usage(self.server.pid)
        return self

    def await_line(self, pattern):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with open(self.log, encoding="utf-8", errors="replace") as file:
                if match := re.search(pattern, file.read()):
                    return match
            time.sleep(0.1)
        raise AssertionError(f"the log has no {pattern}")

    def connect(self, id=""):
        fields = {"worker": id, "session": "fuzz"} if id else {}
        return protocol.connect(self.address, fields, access=protocol.Access(self.TOKEN))[0]

    def ask(self):
        with contextlib.closing(self.connect()) as conn:
            return conn.request("status").fields

    def one(self, rng):
        if rng.random() < 0.3:
            return self.stranger(rng)
        id = rng.choice(["", "eve", f"eve-{rng.randrange(5)}"])
        with contextlib.closing(self.connect(id)) as conn:
            conn.stall = 0.2
            try:
                return self.member(conn, id, rng)
            except (ProtocolError, Refused):
                return "refused"
            except OSError:
                return "cut"

    def stranger(self, rng):
        """Somebody without the token says anything."""
        host, port = protocol.parse_address(self.address)
        name = rng.choice([*REQUESTS, "hello", "save", "stop", "proof", "on_join", "x"])
        hello = {"protocol": protocol.PROTOCOL_VERSION, "worker": "ada", "session": "s"}
        raw = frame(name, REQUESTS.get(name, hello))
        with contextlib.closing(socket.create_connection((host, port), 5)) as sock:
            sock.settimeout(0.05)
            try:
                sock.sendall(raw if rng.random() < 0.2 else changed_frame(raw, rng))
                sock.recv(4096)
            except OSError:
                return "cut"
        return "stranger"

    def member(self, conn, id, rng):
        """Somebody with the token: an honest join now and then, then changed requests."""
        life = self.status.get("life", LIFE)
        if id and rng.random() < 0.5:
            conn.send("join", {**REQUESTS["join"], **self.joining()})
            conn.stall = 3.0
            reply = conn.reply()
            conn.stall = 0.2
            life = reply.fields.get("versions", [[LIFE, 0]])[0][0]
        for _ in range(3):
            name = rng.choice(list(REQUESTS))
            text = json.dumps(REQUESTS[name]).replace(LIFE, life)
            codec = protocol.CODECS["bf16"].layout(self.status["parameters"])
            specs = codec if name == "push" and rng.random() < 0.8 else []
            raw = frame(name, json.loads(text), specs)
            conn._send_all([memoryview(raw if rng.random() < 0.1 else changed_frame(raw, rng))])
            if specs:
                payload = rng.randbytes(protocol.payload_bytes(specs))
                conn._send_all([memoryview(payload)])
            reply = conn.reply()
            conn.discard()
        return reply.type

    def joining(self):
        """Fields with which the honest workers' model is joined."""
        model = [["0.weight", "F32", [7, 5]], ["0.bias", "F32", [7]]]
        model += [["1.weight", "F32", [2, 7]], ["1.bias", "F32", [2]]]
        return {
            "manifest": model,
            "buffers": [],
            "frozen": [],
            "versions": [FRESH],
            "folded": [],
            "run": "",
            "step": 0,
        }

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.check()
        finally:
            for process in (*self.workers, self.server):
                process.kill()
                process.wait()
            self.output.close()
            shutil.rmtree(self.folder)

    def check(self):
        """The honest workers train on, and nothing has grown."""
        assert self.server.poll() is None, "the server has ended"
        assert [w.poll() for w in self.workers] == [None, None], "an honest worker has ended"
        time.sleep(7)  # longer than --worker-timeout: whoever has gone is given up
        first = self.ask()
        time.sleep(3)
        second = self.ask()
        assert second["round"] > first["round"], f"no round has closed for three seconds: {second}"
        names = {worker["id"] for worker in second["workers"]}
        assert names == {"ada", "bob"}, f"members are {names}"
        memory, threads, files = (
            b - a for a, b in zip(self.before, usage(self.server.pid), strict=True)
        )
        print(f"talks: the server grew by {memory / 1e6:.0f} MB, {threads} threads, {files} files")
        assert memory < 100e6 and threads <= 8 and files <= 8, (memory, threads, files)
        with open(self.log, encoding="utf-8", errors="replace") as file:
            text = file.read()
        assert "Traceback" not in text, text[text.index("Traceback") :][:2000]


class Liar(threading.Thread):
    """A server on a socket that answers a worker's requests with replies that are changed at
    random."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.rng, self.replies = random.Random(0), 0

    def run(self):
        while True:
            sock, address = self.listener.accept()
            threading.Thread(target=self.talk, args=[sock, address[0]], daemon=True).start()

    def talk(self, sock, address):
        conn = protocol.Connection(sock, address)
        with contextlib.suppress(OSError, ProtocolError, Refused, KeyError, RuntimeError):
            while True:
                message = conn.receive(5.0)
                conn.discard()
                for type, fields, tensors in self.answers(message):
                    raw = frame(type, fields, protocol.specs_of(tensors.items()))
                    payload = b"".join(bytes(protocol.memory(t)) for t in tensors.values())
                    if self.rng.random() < 0.1:
                        raw = changed_frame(raw, self.rng)
                    if payload and self.rng.random() < 0.1:
                        payload = changed_bytes(payload, self.rng)
                    conn._send_all([memoryview(raw), memoryview(payload)])
                    self.replies += 1
        conn.close()

    def answers(self, message):
        """(type, fields, {name: tensor}) of honest replies to a request."""
        fields = message.fields
        if message.type == "hello":
            yield "hello", {"protocol": protocol.PROTOCOL_VERSION, "session": "liar"}, {}
        elif message.type == "join":
            size = sum(spec.numel for spec in protocol.manifest_from_json(fields["manifest"]))
            self.model, self.number = torch.zeros(size), 1
            yield "join", {**JOINED, "manifest": fields["manifest"]}, {}
        elif message.type == "push":
            yield "push", {"taken": True}, {}
        elif message.type == "pull" and fields["seq"] == 0:
            told = {**REPLIES["slice"], "version": [LIFE, self.number], "folded": {}}
            yield "slice", told, {"slice": self.model, "checksum": self.checksum()}
        elif message.type == "pull":
            yield self.entry(fields)
        elif message.type == "heartbeat":
            yield "heartbeat", BEAT, {}
        else:
            yield message.type, {}, {}

    def checksum(self):
        return protocol.checksum_of(self.model)

    def entry(self, fields):
        """An outer step of 0.25 on every number, and the entry that has it."""
        codec = protocol.CODECS["bf16"]
        update = protocol.Payload(codec.layout(len(self.model)))
        codec.encode(torch.full_like(self.model, 0.25), update.tensors, 0)
        self.model += 0.25
        self.number += 1
        told = {**REPLIES["entry"], "base": fields["version"], "version": [LIFE, self.number]}
        told["folded"] = {"eve": [fields["seq"], "", self.number]}
        return "entry", told, {**update.tensors, "checksum": self.checksum()}


class Servers(Kind):
    """A DiLoCoWorker that trains on a server that lies."""

    def __enter__(self):
        self.liar = Liar()
        self.liar.start()
        return self

    def one(self, rng):
        self.liar.rng = rng
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        worker = diloco_callback.DiLoCoWorker(
            model,
            optimizer,
            server=self.liar.address,
            sync_every=2,
            worker_id="eve",
            reconnect_timeout=0.0,
        )
        outcome = "trained"
        before = self.liar.replies
        try:
            with self.quiet(), worker:
                for _ in range(6):
                    optimizer.zero_grad()
                    model(torch.ones(1, 3)).sum().backward()
                    optimizer.step()
        except (Refused, FloatingPointError, ConnectionError) as error:
            assert self.liar.address in str(error) or "server" in str(error), error
            outcome = type(error).__name__
        for parameter in model.parameters():
            assert parameter.isfinite().all(), "the model is not finite"
        self.inputs = max(1, self.liar.replies - before)
        return outcome


# --- The command line -----------------------------------------------------------------------------

KINDS = {
    "headers": (Headers, 0.4),
    "fields": (Fields, 0.25),
    "replies": (Replies, 0.2),
    "files": (Files, 0.1),
    "folders": (Folders, 0.02),
    "talks": (Talks, 0.0295),
    "servers": (Servers, 0.0005),
}


def fuzz(name, count, first):
    """Try `count` inputs of a kind; (how often each came of it, faults)."""
    outcomes, faults = collections.Counter(), []
    with KINDS[name][0]() as kind:
        for seed in range(first, first + count):
            try:
                outcomes[kind.one(random.Random(f"{name} {seed}"))] += 1
            except Exception as error:
                if not faults:
                    traceback.print_exc()
                faults.append((seed, repr(error)[:200]))
                if len(faults) > 20:
                    break
    return outcomes, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--only", choices=KINDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    for name, (_, share) in KINDS.items():
        if args.only not in (None, name):
            continue
        count = args.inputs if args.only else max(1, round(args.inputs * share))
        began = time.monotonic()
        outcomes, faults = fuzz(name, count, args.first)
        seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        shown = ", ".join(f"{count:,} {what}" for what, count in outcomes.most_common(8))
        print(
            f"{name}: {sum(outcomes.values()):,} inputs in {seconds:.0f} s: {shown}; peak {peak >> 10} MiB"
        )
        for seed, fault in faults:
            print(f"  seed {seed}: {fault}")
        bad += len(faults)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
