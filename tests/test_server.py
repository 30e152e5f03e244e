"""Tests of server.py: the outer step, rounds, membership, checkpoints, and what peers can do wrong.

python -m pytest tests/test_server.py

Most talk to a real server process through `Peer`, a worker by hand; whole runs are made of the
processes of toy_worker.py and compared with `simulate`, the same run without sockets.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import resource
import secrets
import signal
import socket
import threading
import time
import types

import pytest
import safetensors
import safetensors.torch
import torch
import toy_worker
from conftest import DEADLINE, ROOT, Outer, flat, put, result, rounded, simulate, status, until

import protocol
import server
from diloco_callback import DiLoCoWorker
from protocol import CHUNK, CODECS, Buffer, Refused

MANIFEST = [["w", "F32", [3, 4]], ["b", "BF16", [5]]]
P = 17


def numbers(seed, count=P, scale=0.1):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def background(call):
    """Call in a thread that cannot keep the tests from ending; gives a Future."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def together(*calls):
    """Call all at the same time; their results in order."""
    return [future.result(DEADLINE) for future in [background(call) for call in calls]]


class Peer:
    """A worker by hand: what it sends is up to the test. `params` is its copy of the model."""

    def __init__(self, server, worker, params=None, manifest=None, files=None, session=None):
        self.server, self.files = server.address, files or {}
        self.session = {"worker": worker, "session": session or secrets.token_hex(4)}
        self.manifest = protocol.manifest_from_json(manifest or MANIFEST)
        self.params = numbers(0) if params is None else params
        self.control = self.data = None
        self.seq, self.uploaded = 0, False

    def join(self, on_wait=None, **fields):
        listed = protocol.manifest_to_json(self.manifest)
        fields = {"manifest": listed, "sync_every": 5, "num_fragments": 1, "host": "h", **fields}
        self.control, _ = protocol.connect(self.server, self.session)
        reply = self.control.request("join", fields, on_wait=on_wait)
        if reply.type == "init":
            reply, self.uploaded = self.upload(), True
        self.params = torch.empty(protocol.payload_bytes(reply.specs) // 4)
        self.control.read(self.params)
        self.reply, self.version = reply.fields, reply.fields["versions"][0]
        self.seq = reply.fields["seqs"][0]
        return self

    def upload(self):
        parts = self.params.split([spec.numel for spec in self.manifest])
        parts = [p.to(spec.dtype) for p, spec in zip(parts, self.manifest, strict=True)]
        raw = {f"file:{n}": torch.frombuffer(bytearray(t), dtype=torch.uint8)
               for n, t in self.files.items()}  # fmt: skip
        return self.control.request(
            "init",
            {"files": {name: len(text) for name, text in self.files.items()}},
            self.manifest + protocol.specs_of(raw.items()),
            [*parts, *raw.values()],
        )

    def push(self, values=None, codec="bf16", **fields):
        """Push numbers (None: an empty push) and adopt the reply, whose fields are returned."""
        self.seq += 1
        fields = {"fragment": 0, "seq": self.seq, "base": self.version, "step": 5 * self.seq,
                  "ticket": self.reply["ticket"], "steps": 5 * (values is not None), **fields}  # fmt: skip
        if self.data is None:
            self.data, _ = protocol.connect(self.server, self.session)
        tensors = {} if values is None else {"values": values.to(CODECS[codec].dtype)}
        specs = protocol.specs_of(tensors.items())
        reply = self.data.request("push", fields, specs, tensors.values())
        got = Buffer(reply.specs)
        self.data.read(got.raw)
        if "values" in got.tensors:
            self.params += got.tensors["values"].float()
        elif "slice" in got.tensors:
            self.params = got.tensors["slice"].clone()
        assert same_bits(protocol.checksum_of(self.params), got.tensors["checksum"])
        self.version = reply.fields["version"]
        return reply.fields

    def leave(self):
        self.control.request("leave", {"reason": "done"})
        self.close()

    def close(self):
        for conn in (self.control, self.data):
            if conn:
                conn.close()


def join_all(*peers):
    together(*[peer.join for peer in peers])
    return peers


def ask(server, request):
    conn, _ = protocol.connect(server.address, {})
    with contextlib.closing(conn):
        return conn.request(request).fields


def rounds(folder, count):
    """The lines of rounds.jsonl, once there are `count`."""

    def read():
        path = folder / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines] if len(lines) >= count else None

    return until(read, f"{count} lines in rounds.jsonl")


def read_flat(path):
    """The tensors of a safetensors file, end to end in the order of their bytes, as float32."""
    with safetensors.safe_open(path, "pt") as file:
        return torch.cat([file.get_tensor(n).float().reshape(-1) for n in file.offset_keys()])


# --- The outer optimizer ---------------------------------------------------------------------


def step_once(params, momentum, residual, pushes, codec, mu, nesterov=True, plain=False):
    """server.outer_step on copies: (params, momentum, residual, update, norm)."""
    count = params.numel()
    params, momentum = params.clone(), momentum.clone()
    residual = residual.clone() if CODECS[codec].lossy else None
    encoded = [Buffer(CODECS[codec].layout(count)).tensors for _ in pushes]
    for push, tensors in zip(pushes, encoded, strict=True):
        for start, stop in protocol.chunks(count):
            CODECS[codec].encode(push[start:stop].float(), tensors, start)
    update, decoded = Buffer(CODECS[codec].layout(count)).tensors, torch.empty(count)
    checksum, norm = server.outer_step(
        params, momentum, residual, encoded, CODECS[codec], CODECS[codec], update,
        0.7, mu, nesterov, plain,
    )  # fmt: skip
    assert same_bits(checksum, protocol.checksum_of(params))
    for start, stop in protocol.chunks(count):
        CODECS[codec].decode(update, start, decoded[start:stop])
    return params, momentum, residual, decoded, norm


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize(("mu", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_outer_step_is_sgd_of_torch_to_the_last_bit(count, mu, nesterov):
    theirs = torch.nn.Parameter(numbers(0, count, 1.0))
    optimizer = torch.optim.SGD([theirs], lr=0.7, momentum=mu, nesterov=nesterov)
    momentum = torch.zeros(count)
    for round, workers in enumerate((2, 1, 3, 2)):
        pushes = [numbers(10 * round + k, count) for k in range(workers)]
        theirs.grad = sum(pushes[1:], pushes[0]) / workers
        before = theirs.detach().clone()
        params, momentum, _, update, norm = step_once(
            before, momentum, None, pushes, "fp32", mu, nesterov
        )
        optimizer.step()
        if mu:
            assert same_bits(momentum, optimizer.state[theirs]["momentum_buffer"])
        size = torch.stack([before, params, update]).abs().amax(0)
        last_bit = torch.nextafter(size, torch.tensor(torch.inf)) - size
        assert ((params - theirs).abs() <= last_bit).all()
        assert norm == pytest.approx(theirs.grad.double().norm().item(), rel=1e-4)


@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("codec", CODECS)
def test_outer_step_with_codecs_is_the_whole_tensor_computation(count, codec):
    params, momentum, residual = numbers(0, count, 1.0), torch.zeros(count), torch.zeros(count)
    outer = Outer(params, codec)
    for round in range(6):
        plain = round in (3, 5)
        pushes = [numbers(10 * round + k, count) for k in range(3)]
        held = momentum.clone()
        mu = server.momentum_at(round, 0.9, True)
        params, momentum, residual, update, _ = step_once(
            params, momentum, residual, pushes, codec, mu, True, plain
        )
        outer.step([rounded(push, codec) for push in pushes], closing=plain)
        assert same_bits(params, outer.params)
        assert same_bits(momentum, outer.velocity)
        assert residual is None or same_bits(residual, outer.residual)
        if plain:
            assert same_bits(momentum, held)
            if codec == "fp32":
                assert torch.allclose(update, -torch.stack(pushes).mean(0), atol=1e-7)


def test_momentum_and_the_rule_that_closes_a_round():
    ramp = [0, 1 / 4, 2 / 5, 3 / 6]
    assert [server.momentum_at(r, 0.9, True) for r in range(4)] == ramp
    assert server.momentum_at(27, 0.9, True) == server.momentum_at(10**6, 0.9, True) == 0.9
    assert server.momentum_at(0, 0.9, False) == 0.9

    def closes(members, pushed, *rest, closing=False):
        push = types.SimpleNamespace(closing=closing)
        return server.round_closes(dict.fromkeys(members), dict.fromkeys(pushed, push), *rest)

    assert closes("ab", "ab") and closes("a", "ax")  # x has pushed and is gone
    assert not closes("ab", "a") and not closes("a", "")
    assert closes("abc", "ab", 2, True) and not closes("abc", "a", 2, True)
    assert not closes("", "", 1, True)
    assert not closes("a", "a", 2) and closes("a", "ax", 2)
    assert closes("a", "a", 2, closing=True) and not closes("ab", "a", 2, closing=True)


# --- Whole runs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "dtype", "slow"),
    [("fp32", "float32", 0), ("bf16", "float32", 0), ("bf16", "float32", 1), ("bf16", "bfloat16", 0),
     ("int4", "float32", 1), ("int4", "bfloat16", 0)],
)  # fmt: skip
def test_two_workers_end_as_one_process_would_whatever_the_timing(
    serve, toy, tmp_path, codec, dtype, slow
):
    sizes = (300, 450, 450, 450, 2)  # more than one chunk
    host = serve("-n", 2, "--until-done", "--upload-codec", codec, "--download-codec", codec)
    options = {"steps": 13, "sync_every": 5, "sizes": "300,450,450,450,2", "dtype": dtype}
    pauses = [0.0, 0.0]
    pauses[slow] = 0.05
    workers = [toy(host, f"w{k}", seed=k + 1, pause=pauses[k], **options) for k in (0, 1)]
    ends = [result(worker) for worker in workers]
    assert host.wait() == 0
    outer, model = simulate((1, 2), 13, 5, codec, dtype, sizes)
    assert [end["digest"] for end in ends] == [toy_worker.digest(model)] * 2
    assert [end["version"][1] for end in ends] == [3, 3]
    assert [end["metrics"]["diloco/mismatches"] for end in ends] == [0, 0]
    assert same_bits(read_flat(tmp_path / "model" / "model.safetensors"), flat(model))
    checkpoint = tmp_path / "model" / "checkpoint-3"
    assert same_bits(read_flat(checkpoint / "model.safetensors"), outer.params)
    saved = safetensors.torch.load_file(checkpoint / "outer.safetensors")
    assert same_bits(saved["momentum"], outer.velocity)


def test_the_run_starts_when_n_wait_and_the_lowest_id_brings_the_model(serve):
    host = serve("-n", 3)
    c, gone, a, b, d = (Peer(host, name, params=numbers(k)) for k, name in enumerate("cgabd"))
    waits = []
    first = background(lambda: c.join(waits.append))
    until(lambda: status(host)["joining"] == ["c"], "c waits")
    background(gone.join)
    until(lambda: "g on h" in host.output, "another asks to join")
    gone.control.close()  # and ends while it waits: it does not count
    until(lambda: waits, "the server says who is awaited")
    until(lambda: status(host)["joining"] == ["c"], "the other is forgotten")
    shown = status(host)
    assert (shown["state"], shown["workers"]) == ("waiting for workers", [])
    assert "more worker" in waits[0]["awaited"] and not first.done()
    together(b.join, a.join)
    first.result(DEADLINE)
    assert a.uploaded and not c.uploaded
    assert [peer.reply["index"] for peer in (a, b, c)] == [0, 1, 2]
    begin = {"open": [], "next": 0, "steps": None}
    assert all(peer.reply["due"] == begin and peer.reply["step"] == 0 for peer in (a, b, c))
    expected = numbers(2)
    expected[12:] = expected[12:].bfloat16().float()
    assert same_bits(a.params, expected) and same_bits(c.params, expected)
    d.join()  # a late one is let in at once, with the lowest free index
    assert (d.reply["index"], d.reply["rank"], d.reply["world"]) == (3, 3, 4)
    c.close()
    again = Peer(host, "c").join()  # comes back: has its own
    assert again.reply["index"] == 2


def test_an_uploader_that_ends_is_replaced(serve):
    host = serve("-n", 2)
    a, b, c = (Peer(host, name, params=numbers(k)) for k, name in enumerate("abc"))
    a.upload = a.close  # asked for the model, it hangs up
    waits = [background(peer.join) for peer in (a, b)]
    assert waits[0].exception(DEADLINE)
    c.join()
    waits[1].result(DEADLINE)
    assert b.uploaded and not c.uploaded and same_bits(b.params, c.params)
    assert [b.reply["index"], c.reply["index"]] == [0, 1]


def test_late_joiners_step_in_and_all_end_with_the_same_bits(serve, toy):
    host = serve("-n", 2, "--until-done")
    w0 = toy(host, "w0", seed=1, steps=10)
    w1 = toy(host, "w1", seed=2, steps=10, pause=0.3)
    w1.wait_for("joined at step 0")
    w1.signal(signal.SIGSTOP)
    until(lambda: status(host)["fragments"][0]["pushes"] == 1, "w0 has pushed")
    w2 = toy(host, "w2", seed=3, steps=10)  # the round is open: its push is an empty one
    until(lambda: status(host)["fragments"][0]["pushes"] == 2, "w2 has pushed")
    shown = status(host)
    assert shown["awaited"] == ["w1"]
    assert [w["index"] for w in shown["workers"]] == [0, 1, 2]
    w1.signal(signal.SIGCONT)
    ends = [result(worker) for worker in (w0, w1, w2)]
    assert len({end["digest"] for end in ends}) == 1, [end["version"] for end in ends]
    assert {end["version"][1] for end in ends} == {3}
    assert host.wait() == 0


def test_a_worker_that_has_closed_a_fragment_is_not_awaited_in_it(serve):
    """It waits for the other's push of fragment 1, which comes after another one of fragment 0."""
    host = serve("-n", 2)
    model = torch.nn.ParameterDict({"w": torch.zeros(3, 4), "b": torch.zeros(5).bfloat16()})
    options = {"sync_every": 5, "num_fragments": 2, "worker_id": "b"}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    b = DiLoCoWorker(model, optimizer, host.address, **options)
    b_joins = background(b.start)
    a = Peer(host, "a").join(num_fragments=2)
    b_joins.result(DEADLINE)
    versions = a.reply["versions"]

    def push(fragment):
        a.seq += 1
        fields = {"fragment": fragment, "seq": a.seq, "base": versions[fragment], "step": 1,
                  "steps": 0, "ticket": a.reply["ticket"]}  # fmt: skip
        conn, _ = protocol.connect(host.address, a.session)
        with contextlib.closing(conn):
            conn.stall = DEADLINE
            reply = background(lambda: conn.request("push", fields)).result(DEADLINE)
        versions[fragment] = reply.fields["version"]

    ends = background(b.flush)
    for fragment in (0, 0, 1):
        push(fragment)
    ends.result(DEADLINE)
    b.close()


def test_a_joiner_between_rounds_is_told_when_the_next_is_due(serve):
    host = serve("-n", 1, "--outer-lr", 1)
    a = Peer(host, "a").join()
    a.push(numbers(1))
    a.control.request("heartbeat", {"step": 8, "position": 3})
    b = Peer(host, "b").join()
    assert b.reply["due"] == {"open": [], "next": 0, "steps": 2}
    assert (b.reply["step"], b.reply["index"]) == (8, 1)
    together(lambda: a.push(numbers(2)), lambda: b.push(numbers(3)))
    assert same_bits(a.params, b.params) and a.version[1] == 2


def test_a_killed_worker_is_given_up_and_the_other_goes_on(serve, toy, tmp_path):
    host = serve("-n", 2, "--until-done", "--worker-timeout", 2)
    w0 = toy(host, "w0", seed=1, steps=200, pause=0.005)
    w1 = toy(host, "w1", seed=2, steps=10000, pause=0.005)
    w1.wait_for("synced 1 ")
    w1.kill()
    end = result(w0)
    host.wait_for("w1 is gone")
    assert host.wait() == 0
    final = read_flat(tmp_path / "model" / "model.safetensors")
    assert toy_worker.digest(put(toy_worker.build((5, 7, 2)), final)) == end["digest"]


# --- Refusals --------------------------------------------------------------------------------


def test_misfits_are_refused_by_name_and_the_run_goes_on(serve):
    host = serve("-n", 1)
    a = Peer(host, "a").join(source="tales")

    def refusal(worker="b", manifest=None, **fields):
        peer = Peer(host, worker, manifest=manifest)
        with pytest.raises(Refused) as caught:
            peer.join(**{"source": "tales", **fields})
        return str(caught.value)

    text = refusal(manifest=[["w", "F32", [4, 3]], MANIFEST[1]])
    assert "'w'" in text and "[3, 4]" in text and "[4, 3]" in text
    assert "'b' [5] of the server is missing" in refusal(manifest=MANIFEST[:1])
    text = refusal(manifest=[*MANIFEST, ["extra", "F32", [7]]])
    assert "'extra' [7] is not in the server's model" in text
    text = refusal(source="poems")
    assert "'tales'" in text and "'poems'" in text
    assert "num_fragments" in refusal(num_fragments=4)
    assert "--worker-id" in refusal(worker="a")
    assert "--max-model-gb" in refusal(manifest=[["w", "F32", [1 << 40]]])
    conn = protocol.Connection(socket.create_connection(("127.0.0.1", host.port)), "server")
    with pytest.raises(Refused, match=r"version 2 .* you 99"), contextlib.closing(conn):
        conn.request("hello", {"protocol": 99})
    assert [w["id"] for w in status(host)["workers"]] == ["a"]
    a.push(numbers(1))
    assert a.version[1] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e31])
def test_a_push_that_is_not_finite_is_refused_and_the_round_goes_on(serve, tmp_path, bad):
    host = serve("-n", 2)
    a, b = join_all(Peer(host, "a"), Peer(host, "b"))
    outer = Outer(a.params)
    poison = numbers(1)
    poison[3] = bad
    refused, taken = together(lambda: a.push(poison), lambda: b.push(numbers(2)))
    assert "not finite" in refused["refused"] and not taken["refused"]
    outer.step([numbers(2).bfloat16()])
    assert same_bits(a.params, outer.params) and same_bits(b.params, outer.params)
    together(lambda: a.push(poison), lambda: b.push(poison))  # nothing to fold: nothing changes
    assert same_bits(a.params, outer.params) and a.version[1] == 2
    lines = rounds(tmp_path / "model", 2)
    assert [line["refused"] for line in lines] == [["a"], ["a", "b"]]
    assert [line["steps"] for line in lines] == [5, 0]


def test_garbage_leaves_no_trace(serve, tmp_path):
    host = serve("-n", 2, "--until-done")
    a, b = join_all(Peer(host, "a"), Peer(host, "b"))
    outer = Outer(a.params)
    tasks = f"/proc/{host.process.pid}/task"

    def push_round():
        together(lambda: a.push(numbers(a.seq)), lambda: b.push(numbers(b.seq + 50)))
        outer.step([numbers(a.seq - 1).bfloat16(), numbers(b.seq + 49).bfloat16()])
        assert same_bits(a.params, outer.params) and same_bits(b.params, outer.params)

    push_round()
    threads = len(os.listdir(tasks))
    specs = CODECS["bf16"].layout(P)
    fields = {"type": "push", "fragment": 0, "seq": 90, "base": a.version, "step": 1, "steps": 1}
    header = protocol.encode_header(fields, specs)
    hello = {"type": "hello", "protocol": protocol.PROTOCOL_VERSION}
    hello_a = protocol.encode_header({**hello, **a.session}, [])
    wrong = [
        [protocol.TensorSpec("values", torch.float32, (P,))],
        [protocol.TensorSpec("values", torch.bfloat16, (P + 1,))],
        [protocol.TensorSpec("other", torch.bfloat16, (P,))],
        [protocol.TensorSpec("values", torch.bfloat16, (1 << 40,))],
    ]
    fields_wrong = [{"fragment": 1}, {"fragment": -1}, {"seq": 0}, {"seq": "1"}, {"base": 7},
                    {"steps": 1.5}, {"loss": "x"}, {"loss": 1e31}]  # fmt: skip
    manifests = [[], [1], [["w"]], [["w", "F32", "12"]], [["w", "F32", [-1]]], [[[], "F32", [1]]],
                 [["w", "I8", [1]]], [["w", "F32", [1.0]]], MANIFEST + MANIFEST[:1]]  # fmt: skip
    join = {"type": "join", "sync_every": 5, "num_fragments": 1, "host": "h"}
    messages = [
        secrets.token_bytes(500),
        b"GET / HTTP/1.1\r\nHost: server\r\n\r\n",
        b"\xff" * 8,
        (1 << 24).to_bytes(8, "little") + b"{",
        (40).to_bytes(8, "little") + b"{" * 40,
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        b"",
        protocol.encode_header(hello, []) + secrets.token_bytes(500),
        protocol.encode_header({"type": "join"}, []),
        protocol.encode_header({**hello, "protocol": "one"}, []),
        protocol.encode_header(hello, []) + protocol.encode_header({"type": "__init__"}, []),
        protocol.encode_header(hello, []) + protocol.encode_header({"type": "push"}, []),
        hello_a + header + b"\0" * 9,  # half a push
        hello_a + protocol.encode_header({"type": "init"}, []),
        *[hello_a + protocol.encode_header(fields, s) for s in wrong],
        *[hello_a + protocol.encode_header({**fields, **f}, specs) for f in fields_wrong],
        *[hello_a + protocol.encode_header({**join, "manifest": m}, []) for m in manifests],
    ]
    while len(messages) < 50:
        messages.append(hello_a + secrets.token_bytes(len(messages)))
    for message in messages:
        with socket.create_connection(("127.0.0.1", host.port)) as sock:
            sock.sendall(message)
            if len(message) % 2:  # some hang up at once, some wait for what the server says
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(30)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(1 << 16):
                        pass
    until(lambda: len(os.listdir(tasks)) <= threads, "the threads of all those have ended")
    assert "Traceback" not in host.output
    push_round()
    a.leave(), b.leave()
    assert host.wait() == 0
    assert [line["steps"] for line in rounds(tmp_path / "model", 2)] == [10, 10]


def test_a_push_sent_again_while_its_first_copy_is_being_folded_counts_once(serve):
    count = 1 << 22  # large enough for the second copy to arrive during the fold
    host = serve("-n", 1)
    a = Peer(host, "a", torch.zeros(count), manifest=[["w", "F32", [count]]]).join()
    values = numbers(1, count).bfloat16()
    specs = protocol.specs_of([("values", values)])
    payload = memoryview(protocol.memory(values))
    for milliseconds in range(0, 40, 2):
        a.seq += 1
        fields = {"type": "push", "fragment": 0, "seq": a.seq, "base": a.version, "step": 1,
                  "steps": 1, "ticket": a.reply["ticket"]}  # fmt: skip
        first, second = (protocol.connect(host.address, a.session)[0] for _ in range(2))
        for conn in (second, first):
            conn.sock.sendall(protocol.encode_header(fields, specs))
            conn.sock.sendall(payload[:-2])
        first.sock.sendall(payload[-2:])
        time.sleep(milliseconds / 1e3)  # any delay must do; some of these fall into the fold
        second.sock.sendall(payload[-2:])
        versions = []
        for conn in (first, second):
            reply = conn.receive(idle=DEADLINE)
            conn.discard()
            conn.close()
            versions.append(reply.fields["version"])
        assert versions[0] == versions[1] and versions[0][1] == a.seq
        a.version = versions[0]
        assert status(host)["fragments"] == [{"version": a.seq, "pushes": 0}], milliseconds


# --- Crashes and resumption ------------------------------------------------------------------


def test_a_killed_server_goes_on_and_the_workers_find_it(serve, toy, tmp_path):
    arguments = ("-n", 2, "--until-done", "--save-every", 1)
    host = serve(*arguments)
    workers = [toy(host, f"w{k}", seed=k, steps=60, pause=0.03) for k in (0, 1)]
    host.wait_for("saved .*checkpoint-3")
    host.kill()
    again = serve(*arguments, "--port", host.port)
    again.wait_for(r"continuing from .*checkpoint-\d+")
    ends = [result(worker) for worker in workers]
    assert again.wait() == 0
    assert all("has joined again" in worker.output for worker in workers)
    assert ends[0]["digest"] == ends[1]["digest"], (ends, again.output)
    final = read_flat(tmp_path / "model" / "model.safetensors")
    assert toy_worker.digest(put(toy_worker.build((5, 7, 2)), final)) == ends[0]["digest"]


@pytest.mark.parametrize("cut", ["model.safetensors", "outer.safetensors"])
def test_a_checkpoint_that_is_not_whole_is_skipped(serve, tmp_path, cut):
    folder = tmp_path / "model"
    host = serve("--save-every", 1)
    a = Peer(host, "a").join()
    for seed in (1, 2, 3):
        a.push(numbers(seed))
        until(lambda s=seed: (folder / f"checkpoint-{s}").exists(), f"checkpoint-{seed}")
    host.kill()
    before = read_flat(folder / "checkpoint-2" / "model.safetensors")
    broken = folder / "checkpoint-3" / cut
    broken.write_bytes(broken.read_bytes()[:-10])
    (folder / ".tmp-checkpoint").mkdir()
    (folder / ".tmp-checkpoint" / "model.safetensors").write_bytes(b"half")
    again = serve("--save-every", 1)
    again.wait_for("continuing from .*checkpoint-2")
    assert re.search("WARNING.*checkpoint-3", again.output), again.output
    b = Peer(again, "a").join()
    assert b.version[1] == 2 and same_bits(b.params, before)
    b.push(numbers(4))
    again.wait_for("saved .*checkpoint-3")
    assert not (tmp_path / "model-diloco").exists()


def test_a_checkpoint_that_is_being_removed_is_none_any_more(start, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "outer.safetensors").write_bytes(b"x")
    killed = "import os, shutil, server; shutil.rmtree = lambda *_, **__: os._exit(9); "
    assert start("-c", f"{killed}server.discard({str(checkpoint)!r})").wait() == 9
    assert not list(tmp_path.glob("checkpoint-*")) and len(list(tmp_path.iterdir())) == 1


def test_a_run_that_ended_goes_on_with_its_momentum_and_the_new_rate(serve, tmp_path):
    host = serve("--until-done")
    a = Peer(host, "a").join()
    outer = Outer(a.params)
    for seed in (1, 2):
        a.push(numbers(seed))
        outer.step([numbers(seed).bfloat16()])
    a.push(closing=True)
    outer.step([])
    a.leave()
    assert host.wait() == 0
    path = tmp_path / "model" / "checkpoint-3" / "outer.safetensors"
    assert same_bits(safetensors.torch.load_file(path)["momentum"], outer.velocity)
    again = serve("--until-done", "--outer-lr", 0.5)
    assert re.search(r"outer_lr 0\.5 .*0\.7", again.output)
    a = Peer(again, "a").join()
    assert a.version[1] == 3 and same_bits(a.params, outer.params)
    assert (a.reply["step"], a.seq) == (15, 3)
    a.push(numbers(3))
    outer.lr = 0.5
    outer.step([numbers(3).bfloat16()])
    assert same_bits(a.params, outer.params) and a.version[1] == 4
    a.leave()
    assert again.wait() == 0
    assert [line["round"] for line in rounds(tmp_path / "model", 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [5, 3 * CHUNK, 6 * CHUNK + 5])
@pytest.mark.parametrize("fragments", [1, 3])
def test_a_checkpoint_is_of_one_moment_while_all_changes_around_it(count, fragments):
    vectors = [numbers(k, count) for k in range(3)]
    before = [vector.clone() for vector in vectors]
    picture, written = server.Picture(vectors, fragments), [torch.empty(count) for _ in vectors]
    for n, (start, pieces) in enumerate(picture.pieces()):
        for k in range(fragments):  # the steps overtake the writer, and step again
            for _ in range(2):
                for a, b in protocol.chunks(protocol.fragment_of(vectors[0], k, fragments).numel()):
                    picture.keep(k, a, b)
                    for vector in vectors:
                        protocol.fragment_of(vector, k, fragments)[a:b] += n + 1
        for vector, piece in zip(written, pieces, strict=True):
            vector[start : start + piece.numel()] = piece
    assert all(same_bits(*pair) for pair in zip(written, before, strict=True))
    assert not picture.kept  # the memory is given back


SLOW_DISK = """
import os, sys, time
sys.path.insert(0, {root!r})
import server

def pieces(picture, at_once=server.Picture.pieces):
    while not os.path.exists({gate!r}):
        time.sleep(0.01)
    yield from at_once(picture)

server.Picture.pieces = pieces
server.Server(server.parse_args()).run()
"""


def test_a_checkpoint_that_takes_long_to_write_delays_no_reply(start, serve, tmp_path):
    folder, gate = tmp_path / "model", tmp_path / "gate"
    script = SLOW_DISK.format(root=ROOT, gate=str(gate))
    host = start("-c", script, "-m", folder, "--port", 0, "--save-every", 1)
    host.address = f"127.0.0.1:{host.wait_for('port ([0-9]+)')[1]}"
    a = Peer(host, "a").join()
    before = a.params.clone()
    until((folder / ".tmp-checkpoint" / "outer.safetensors").exists, "a checkpoint is begun")
    for seed in (1, 2, 3):
        a.push(numbers(seed))
    assert not list(folder.glob("checkpoint-*"))
    gate.touch()
    host.wait_for("saved .*checkpoint-3")
    host.kill()
    assert same_bits(read_flat(folder / "checkpoint-0" / "model.safetensors"), before)
    first = safetensors.torch.load_file(folder / "checkpoint-0" / "outer.safetensors")
    assert not first["momentum"].any() and not first["residual"].any()
    assert same_bits(read_flat(folder / "checkpoint-3" / "model.safetensors"), a.params)


# --- Where the model comes from --------------------------------------------------------------


WEIGHTS = {"w": numbers(7, 12).view(3, 4), "b": numbers(8, 5).bfloat16()}


def lay_out(folder, kind):
    """Weights by other programs, as they are found; the path for -m."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "toy"}')
    if kind == "one":
        safetensors.torch.save_file(WEIGHTS, folder / "model.safetensors")
    elif kind == "sharded":
        for name, tensor in WEIGHTS.items():
            safetensors.torch.save_file({name: tensor}, folder / f"model-{name}.safetensors")
        index = {"weight_map": {name: f"model-{name}.safetensors" for name in WEIGHTS}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "bin":
        torch.save(WEIGHTS, folder / "pytorch_model.bin")
    elif kind == "old bin":  # what torch.save wrote before version 1.6
        path = folder / "pytorch_model.bin"
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    elif kind == "file":
        safetensors.torch.save_file(WEIGHTS, folder / "some.safetensors")
        return folder / "some.safetensors"
    return folder


@pytest.mark.parametrize("kind", ["one", "sharded", "bin", "old bin", "file"])
def test_weights_are_read_in_every_layout(tmp_path, kind):
    path = lay_out(tmp_path / "hf", kind)
    weights = server.load_weights(str(path))
    assert weights.keys() == WEIGHTS.keys()
    assert all(same_bits(weights[name], WEIGHTS[name]) for name in WEIGHTS)
    expected = tmp_path / ("hf/some-diloco" if kind == "file" else "hf-diloco")
    assert server.choose_output(str(path), None) == (str(expected), str(path))


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize(
    "shards",
    [{"w": "../x"}, {"w": "/etc/x"}, {"w": ".."}, {"w": "missing.safetensors"}, {"w": 1}, 5, None],
)
def test_bad_weights_end_in_one_line(tmp_path, monkeypatch, shards):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hf"
    folder.mkdir()
    if shards is None:
        torch.save({"w": Evil()}, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(WEIGHTS, tmp_path / "x")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(SystemExit, match="hf"):
        server.load_weights(str(folder))
    assert not (tmp_path / "evil").exists()


def test_parameters_that_are_not_finite_start_no_run(serve, tmp_path):
    """Neither a worker's nor those of -m."""
    broken = numbers(0)
    broken[3] = float("nan")
    host = serve()
    with pytest.raises(Refused, match="to start from are not all finite"):
        Peer(host, "a", params=broken).join()
    assert same_bits(Peer(host, "b").join().params[:12], numbers(0)[:12])
    weights = {"w": broken[:12].view(3, 4).clone(), "b": WEIGHTS["b"]}
    path = lay_out(tmp_path / "hf", "one")
    safetensors.torch.save_file(weights, path / "model.safetensors")
    host = serve("-m", path)
    with pytest.raises(Refused, match="to start from are not all finite"):
        Peer(host, "a").join()


def test_folders_of_other_programs_are_never_written_to(serve, tmp_path):
    path = lay_out(tmp_path / "hf", "sharded")
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "pytorch_model.bin").write_bytes(b"theirs")
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in path.rglob("*") if f.is_file()}
    arguments = ("-m", path, "--until-done", "--save-every", 1, "--save-total-limit", 1)
    host = serve(*arguments)
    assert f"output goes to {path}-diloco" in host.output
    a = Peer(host, "a", manifest=MANIFEST[::-1]).join()  # its own order of tensors
    start = torch.cat([WEIGHTS["b"].float(), WEIGHTS["w"].reshape(-1)])
    assert not a.uploaded and same_bits(a.params, start)
    for seed in (1, 2):
        a.push(numbers(seed))
    a.leave()
    assert host.wait() == 0
    after = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in path.rglob("*") if f.is_file()}
    assert after == before
    output = tmp_path / "hf-diloco"
    assert (output / "config.json").read_text() == '{"model_type": "toy"}'
    assert same_bits(read_flat(output / "checkpoint-2" / "model.safetensors"), a.params)
    again = serve(*arguments)  # the same command goes on with its own
    again.wait_for("continuing from .*hf-diloco/checkpoint-2")
    with pytest.raises(SystemExit, match="did not write"):
        server.choose_output(str(tmp_path / "new"), str(path))


def test_the_default_output_is_not_a_folder_of_another_program_either(tmp_path):
    lay_out(tmp_path / "hf-diloco", "one")
    with pytest.raises(SystemExit):
        server.choose_output(str(lay_out(tmp_path / "hf", "one")), None)


def test_the_default_output_stands_beside_the_folder_also_where_that_is_named_by_dots(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(lay_out(tmp_path / "hf", "one"))
    output, _ = server.choose_output(".", None)
    assert os.path.abspath(output) == str(tmp_path / "hf-diloco")


def test_a_folder_that_only_has_the_name_of_a_checkpoint_is_not_deleted(serve, tmp_path):
    theirs = tmp_path / "model" / "checkpoint-1" / "shards"
    theirs.mkdir(parents=True)
    (theirs / "rank0.pt").write_bytes(b"theirs")
    host = serve("--save-every", 1, "--until-done")
    a = Peer(host, "a").join()
    a.push(numbers(1))
    a.leave()
    assert host.wait() == 0
    assert (theirs / "rank0.pt").exists(), host.output


def test_checkpoints_of_m_are_continued_into_another_output_folder(serve, tmp_path):
    host = serve("--save-every", 1)
    a = Peer(host, "a").join()
    a.push(numbers(1))
    host.wait_for("saved .*checkpoint-1")
    host.kill()
    again = serve("--output-dir", tmp_path / "other")
    b = Peer(again, "a").join()
    assert not b.uploaded and same_bits(b.params, a.params), again.output


# --- What is written -------------------------------------------------------------------------


def test_checkpoints_final_model_and_rounds(serve, tmp_path):
    folder = tmp_path / "model"
    files = {"config.json": b'{"model_type": "toy"}', "tokenizer.json": b"{}"}
    host = serve("-n", 2, "--save-every", 1, "--save-total-limit", 2, "--until-done")
    assert "NO WEIGHTS" in host.output
    a, b = join_all(Peer(host, "a", files=files), Peer(host, "b"))
    outer = Outer(a.params)
    for seed in range(1, 6):
        one, two = numbers(seed), numbers(seed + 20)
        together(
            lambda p=one: a.push(p, tokens=100, loss=2.0),
            lambda p=two: b.push(p, tokens=50, loss=3.0, steps=4),
        )
        outer.step([one.bfloat16(), two.bfloat16()])
        until(lambda s=seed: (folder / f"checkpoint-{s}").exists(), f"checkpoint-{seed}")
    until(lambda: len(list(folder.glob("checkpoint-*"))) == 2, "the oldest are removed")
    together(lambda: a.push(one, closing=True), lambda: b.push(closing=True))
    outer.step([one.bfloat16()], closing=True)
    a.leave(), b.leave()
    assert host.wait() == 0
    assert {p.name for p in folder.glob("*")} == {
        "checkpoint-5", "checkpoint-6", "model.safetensors", "rounds.jsonl", *files,
    }  # fmt: skip
    saved = safetensors.torch.load_file(folder / "checkpoint-6" / "model.safetensors")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in saved.items()} == {
        "w": (torch.float32, (3, 4)), "b": (torch.float32, (5,)),
    }  # fmt: skip
    assert same_bits(torch.cat([saved["w"].view(-1), saved["b"]]), outer.params)
    assert same_bits(a.params, outer.params) and same_bits(b.params, outer.params)
    vectors = safetensors.torch.load_file(folder / "checkpoint-6" / "outer.safetensors")
    assert same_bits(vectors["momentum"], outer.velocity)
    assert same_bits(vectors["residual"], outer.residual)
    final = safetensors.torch.load_file(folder / "model.safetensors")
    assert same_bits(final["w"], saved["w"]) and same_bits(final["b"], saved["b"].bfloat16())
    for name, text in files.items():
        assert (folder / name).read_bytes() == text
        assert (folder / "checkpoint-6" / name).read_bytes() == text
    lines = rounds(folder, 6)
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines[:5]:
        assert (line["members"], line["steps"], line["tokens"]) == (["a", "b"], 9, 150)
        assert line["losses"] == {"a": 2.0, "b": 3.0}
        assert line["bytes_up"] >= 2 * 2 * P and line["bytes_down"] > 2 * 2 * P
        assert {"time", "seconds_waiting", "seconds_folding", "seconds_sending"} <= line.keys()
    mean = (one.bfloat16().float() + two.bfloat16().float()) / 2
    assert lines[4]["norm"] == pytest.approx(mean.norm().item(), rel=1e-5)
    assert lines[5]["closing"] and lines[5]["steps"] == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_where(serve, tmp_path, number):
    host = serve()
    a = Peer(host, "a").join()
    a.push(numbers(1))
    host.signal(number)
    assert host.wait() == 0
    newest = tmp_path / "model" / "checkpoint-1"
    assert str(newest) in host.lines[-1] and "Traceback" not in host.output
    assert same_bits(read_flat(newest / "model.safetensors"), a.params)


def test_training_goes_on_where_nothing_can_be_written(serve, tmp_path):
    blocker = tmp_path / "blocker"
    blocker.write_text("a file where a folder is wanted")
    host = serve("-m", blocker / "model", "--save-every", 1)
    a = Peer(host, "a").join()
    for seed in (1, 2, 3):
        a.push(numbers(seed))
    until(lambda: "failed" in status(host)["save_error"], "the status says so")
    a.push(numbers(4))
    blocker.unlink()
    a.push(numbers(5))
    until(lambda: not status(host)["save_error"], "saving works again")
    host.wait_for("saved .*checkpoint-5")
    assert a.version[1] == 5


def test_training_goes_on_with_a_full_disk(serve, tmp_path):
    """A limit on the size of files stands for the full disk: writes come back short."""
    count = 100_000
    host = serve("--save-every", 1)
    a = Peer(host, "a", torch.zeros(count), manifest=[["w", "F32", [count]]]).join()
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(host.process.pid, resource.RLIMIT_FSIZE, (count, resource.RLIM_INFINITY))
    a.push(numbers(1, count))
    until(lambda: "failed" in status(host)["save_error"] or "Traceback" in host.output, "said")
    resource.prlimit(host.process.pid, resource.RLIMIT_FSIZE, unlimited)
    a.push(numbers(2, count))
    host.wait_for("saved .*checkpoint-2")
    assert not list((tmp_path / "model").glob(".tmp*"))


# --- Orders and the command line ---------------------------------------------------------------


def test_save_and_stop(serve, toy, tmp_path):
    host = serve("-n", 2, "--save-every", 0, "--until-done")
    workers = [toy(host, f"w{k}", seed=k, steps=100000, pause=0.01) for k in (0, 1)]
    until(lambda: status(host)["round"] >= 2, "two rounds")
    assert not list((tmp_path / "model").glob("checkpoint-*"))
    ask(host, "save")
    host.wait_for("saved .*checkpoint-")
    ask(host, "stop")
    for worker in workers:
        assert result(worker)["step"] < 100000
    assert host.wait() == 0
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_port_in_use_is_one_clear_line(serve, start, tmp_path):
    host = serve()
    other = start(os.path.join(ROOT, "server.py"), "-m", tmp_path / "other", "--port", host.port)
    assert other.wait() == 1
    assert f"cannot listen on port {host.port}" in other.lines[-1]
    assert "Traceback" not in other.output


def test_spawned_workers_that_fail_at_once_end_the_server(start, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("train: {no_such_setting: 1}\n")
    server = os.path.join(ROOT, "server.py")
    host = start(server, "-m", tmp_path / "model", "-n", 2, "--port", 0, "--spawn", config)
    assert host.wait() not in (0, None)
    assert "worker-0: " in host.output and "no_such_setting" in host.output


@pytest.mark.parametrize("threads", ["", "3"])
def test_spawned_workers_share_the_cores_unless_the_user_says_otherwise(start, threads):
    code = "import server; print(server.worker_environment(2)['OMP_NUM_THREADS'])"
    code = code if threads else f"import os; del os.environ['OMP_NUM_THREADS']; {code}"
    process = start("-c", code, env={"OMP_NUM_THREADS": threads or "1"})
    assert process.wait() == 0
    assert process.output == (threads or str(max(1, os.cpu_count() // 2)))


def test_bad_arguments_are_refused_by_name(capsys):
    for bad in (["-n", "0"], ["--outer-lr", "nan"], ["--outer-momentum", "1"], ["--port", "70000"],
                ["--upload-codec", "zip"], ["--spawn", "nowhere"]):  # fmt: skip
        with pytest.raises(SystemExit):
            server.parse_args(["-m", "model", *bad])
        assert bad[-2].removeprefix("-") in capsys.readouterr().err
    args = server.parse_args(["-m", "model", "-n", "12"])
    assert (args.n, args.port, args.save_every) == (12, 8512, 10)


def test_nobody_reads_the_share_of_another(serve, toy):
    host = serve("-n", 2, "--shares", 2, "--save-every", 1)
    running = [
        toy(host, name, seed=k, source="tales", steps=10**6, pause=0.01)
        for k, name in enumerate("ab")
    ]
    host.wait_for("saved .*checkpoint-1")
    third = toy(host, "c", source="tales")
    assert third.wait() == 3 and "cut into 2 shares" in third.output
    for process in (*running, host):
        process.kill()
    assert status(serve())["shares"] == 2  # their number is the run's


def test_a_worker_that_reads_the_model_slowly_is_not_given_up(serve):
    host, count = serve("--worker-timeout", 1), 30_000_000
    conn, _ = protocol.connect(host.address, {"worker": "a", "session": "s"})
    join = {"host": "h", "sync_every": 5, "num_fragments": 1}
    with contextlib.closing(conn):
        conn.request("join", {**join, "manifest": [["w", "F32", [count]]]})
        params = torch.zeros(count)
        conn.send("init", {}, protocol.specs_of([("w", params)]), [params])
        until(lambda: status(host)["workers"], "the reply begins, of which nobody reads")

        def silent():
            workers = status(host)["workers"]
            return not workers or workers[0]["heard_seconds_ago"] > 2

        until(silent, "it is over the --worker-timeout")
        assert status(host)["workers"]
