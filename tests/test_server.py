"""Tests of server.py as a process: whole runs, options, refusals, crashes, and what it writes.

python -m pytest tests/test_server.py

Most talk to a real server process through `Peer`, a worker by hand; whole runs are made of the
processes of toy_worker.py and compared with `simulate`, the same run without sockets. The rules of
a run, the global model and the store have tests of their own: here each option has one that it gets
there.
"""

import contextlib
import json
import os
import re
import resource
import secrets
import signal
import socket
import time

import pytest
import safetensors
import safetensors.torch
import torch
import toy_worker
from conftest import DEADLINE, ROOT, Outer, flat, put, result, rounded, simulate, status, until
from peers import (
    MANIFEST,
    P,
    Peer,
    ask,
    background,
    encode,
    join_all,
    numbers,
    rounds,
    same_bits,
    together,
)

import protocol
import server
from protocol import CODECS, FRESH, Refused, TensorSpec


def read_flat(path):
    """The tensors of a safetensors file, end to end in the order of their bytes, as float32."""
    with safetensors.safe_open(path, "pt") as file:
        return torch.cat([file.get_tensor(n).float().reshape(-1) for n in file.offset_keys()])


# --- Whole runs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "dtype", "slow"),
    [("fp32", "float32", 0), ("bf16", "bfloat16", 1), ("int4", "float32", 1)],
)
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
    assert a.brought == [0] and not c.brought
    assert [peer.reply["index"] for peer in (a, b, c)] == [0, 1, 2]
    assert [(p.reply["turns"], p.reply["steps"], p.reply["step"]) for p in (a, b, c)] == [
        ([0], None, 0)
    ] * 3
    expected = numbers(2)
    expected[12:] = expected[12:].bfloat16().float()
    assert same_bits(a.params, expected) and same_bits(c.params, expected)
    d.join()  # a late one is let in at once, with the lowest free index
    assert (d.reply["index"], d.reply["rank"], d.reply["world"]) == (3, 3, 4)
    c.leave()
    again = Peer(host, "c").join()  # comes back: has its own
    assert again.reply["index"] == 2


def test_an_uploader_that_ends_is_replaced(serve):
    host = serve("-n", 2)
    a, b, c = (Peer(host, name, params=numbers(k)) for k, name in enumerate("abc"))
    a.bring = lambda *_: a.control.close()  # asked for the model, it hangs up
    waits = [background(peer.join) for peer in (a, b)]
    assert waits[0].exception(DEADLINE)
    c.join()
    waits[1].result(DEADLINE)
    assert b.brought == [0] and not c.brought and same_bits(b.params, c.params)
    assert [b.reply["index"], c.reply["index"]] == [0, 1]


def test_late_joiners_step_in_and_all_end_with_the_same_bits(serve, toy):
    host = serve("-n", 2, "--until-done")
    w0 = toy(host, "w0", seed=1, steps=10)
    w1 = toy(host, "w1", seed=2, steps=10, pause=0.3)
    w1.wait_for("joined at step 0")
    w1.signal(signal.SIGSTOP)
    until(lambda: status(host)["fragments"][0]["pushes"] == 1, "w0 has pushed")
    w2 = toy(host, "w2", seed=3, steps=10)  # the round is open: its push may come in time
    until(lambda: status(host)["fragments"][0]["pushes"] == 2, "w2 has pushed")
    shown = status(host)
    assert shown["awaited"] == ["w1"]
    assert [w["index"] for w in shown["workers"]] == [0, 1, 2]
    w1.signal(signal.SIGCONT)
    ends = [result(worker) for worker in (w0, w1, w2)]
    assert len({end["digest"] for end in ends}) == 1, [end["version"] for end in ends]
    assert len({end["version"][1] for end in ends}) == 1
    assert host.wait() == 0


def test_a_joiner_between_rounds_is_told_when_the_next_is_due(serve):
    host = serve("-n", 1, "--outer-lr", 1)
    a = Peer(host, "a").join()
    a.push(numbers(1))
    a.heartbeat(step=8, position=3, steps_per_second=0.001)
    b = Peer(host, "b").join()
    assert (b.reply["turns"], b.reply["steps"]) == ([1], 2)
    assert (b.reply["step"], b.reply["index"]) == (8, 1)
    assert same_bits(a.params, b.params)
    together(lambda: a.push(numbers(2)), lambda: b.push(numbers(3)))
    assert same_bits(a.params, b.params) and a.version.number == 2


def test_who_was_away_follows_the_log_or_takes_the_slice_in_full(serve):
    """The log reaches back as far as its entries are smaller than the slice: three as int8."""
    host, manifest = serve("--download-codec", "int8"), [["w", "F32", [4096]]]
    a, b = (Peer(host, name, torch.zeros(4096), manifest).join() for name in "ab")
    for late in (1, 3, 4):
        b.leave()
        for seed in range(late):
            a.push(numbers(seed, 4096))
        b.took.clear()
        b.join()
        assert b.took == (["slice"] if late == 4 else ["entry"] * late)
        assert b.version == a.version and same_bits(b.params, a.params)
    assert b.pull(0, 0) == "current"
    assert b.pull(0, 5) == "again"  # a push that is not there


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

    def refusal(worker="b", manifest=None, fragments=1, **fields):
        peer = Peer(host, worker, manifest=manifest, fragments=fragments)
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
    assert "num_fragments" in refusal(fragments=4)
    assert "--max-model-gb" in refusal(manifest=[["w", "F32", [1 << 40]]])
    conn = protocol.Connection(socket.create_connection(("127.0.0.1", host.port)), "server")
    with pytest.raises(Refused, match=r"version 6 .* you 99"), contextlib.closing(conn):
        conn.request("hello", {"protocol": 99})
    assert [w["id"] for w in status(host)["workers"]] == ["a"]
    a.push(numbers(1))
    assert a.version.number == 1


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e31])
def test_a_push_that_is_not_finite_is_refused_and_the_round_goes_on(serve, tmp_path, bad):
    host = serve("-n", 2)
    a, b = join_all(Peer(host, "a"), Peer(host, "b"))
    outer = Outer(a.params)
    poison = numbers(1)
    poison[3] = bad
    refused, taken = together(lambda: a.push(poison), lambda: b.push(numbers(2)))
    assert "not finite" in refused.refused and not taken.refused
    outer.step([numbers(2).bfloat16()])
    assert same_bits(a.params, outer.params) and same_bits(b.params, outer.params)
    together(lambda: a.push(poison), lambda: b.push(poison))  # nothing to fold: nothing changes
    assert same_bits(a.params, outer.params) and a.version.number == 2
    lines = rounds(tmp_path / "model", 2)
    assert [line["refused"] for line in lines] == [["a"], ["a", "b"]]
    assert [line["steps"] for line in lines] == [5, 0]


HELLO = {"type": "hello", "protocol": protocol.PROTOCOL_VERSION}


def garbage(member):
    """Fifty messages that break a rule each, some of them in the name of a member."""

    def message(type, fields=(), specs=(), **more):
        return protocol.encode_header({"type": type, **dict(fields), **more}, specs)

    hello, named = message(**HELLO), message(**HELLO, **member.session)
    values = CODECS["bf16"].layout(P)
    push = {"slice": 0, "seq": 90, "base": member.version, "step": 1, "position": 0, "steps": 1,
            "tokens": 0, "loss": None, "closing": False}  # fmt: skip
    join = {"manifest": MANIFEST, "buffers": [], "frozen": [], "sync_every": 5, "num_fragments": 1,
            "source": "", "host": "h", "ranks": 1, "step": 0, "position": 0, "run": "",
            "versions": [FRESH], "folded": [], "closed": [], "resumes": []}  # fmt: skip
    wrong_specs = [
        [TensorSpec("values", torch.float32, (P,))],
        [TensorSpec("values", torch.bfloat16, (P + 1,))],
        [TensorSpec("other", torch.bfloat16, (P,))],
        [TensorSpec("values", torch.bfloat16, (1 << 40,))],
    ]
    wrong_pushes = [
        {"slice": 1}, {"slice": -1}, {"seq": 0}, {"seq": "1"}, {"base": 7}, {"steps": 1.5},
        {"loss": "x"}, {"loss": 1e31},
    ]  # fmt: skip
    manifests = [[], [1], [["w"]], [["w", "F32", "12"]], [["w", "F32", [-1]]], [[[], "F32", [1]]],
                 [["w", "I8", [1]]], [["w", "F32", [1.0]]], MANIFEST + MANIFEST[:1]]  # fmt: skip
    wrong_joins = [
        {"versions": [["x", 1]]}, {"versions": []}, {"versions": 5}, {"closed": [7]},
        {"folded": [{"a": [1, "", -1]}]}, {"resumes": [[1, 2]]}, {"num_fragments": 0},
        *[{"manifest": manifest} for manifest in manifests],
    ]  # fmt: skip
    pulls = [{"slice": 4}, {"slice": None}, {"seq": -1}, {"version": "0"}]
    return [
        secrets.token_bytes(500),
        b"GET / HTTP/1.1\r\nHost: server\r\n\r\n",
        b"\xff" * 8,
        (1 << 24).to_bytes(8, "little") + b"{",
        (40).to_bytes(8, "little") + b"{" * 40,
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        b"",
        hello + secrets.token_bytes(500),
        message("join"),
        message("hello", protocol="one"),
        hello + message("__init__"),
        hello + message("push"),
        named + message("push", push, values) + b"\0" * 9,  # half a push
        named + message("bring", slices=[0], files={}),
        *[named + message("push", push, specs) for specs in wrong_specs],
        *[named + message("push", {**push, **fields}, values) for fields in wrong_pushes],
        *[named + message("join", {**join, **fields}) for fields in wrong_joins],
        *[named + message("pull", {"slice": 0, "version": FRESH, "seq": 0, **f}) for f in pulls],
        *[named + secrets.token_bytes(size) for size in (47, 48)],
    ]


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
    for number, message in enumerate(garbage(a)):
        with socket.create_connection(("127.0.0.1", host.port)) as sock:
            sock.sendall(message)
            if number % 2:  # some hang up at once, some wait for what the server says
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(DEADLINE)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(1 << 16):
                        pass
    until(lambda: len(os.listdir(tasks)) <= threads, "the threads of all those have ended")
    assert "Traceback" not in host.output
    push_round()
    a.leave(), b.leave()
    assert host.wait() == 0
    assert [line["steps"] for line in rounds(tmp_path / "model", 2)] == [10, 10]


def test_a_push_sent_again_counts_once_also_while_its_first_copy_is_being_folded(serve):
    count = 1 << 22  # large enough for the second copy to arrive during the fold
    host = serve("-n", 1, "--upload-codec", "bf16")
    a = Peer(host, "a", torch.zeros(count), manifest=[["w", "F32", [count]]]).join()
    values = numbers(1, count)
    payload = encode(values, "bf16")
    for milliseconds in range(0, 40, 4):
        taken, first = a.send(values), a.data
        assert taken
        a.data, fields = a.connect(), {"step": 1, "position": 0, "steps": 5, "tokens": 0}
        fields |= {"slice": 0, "seq": a.seq, "base": a.version, "loss": None, "closing": False}
        a.data.sock.sendall(protocol.encode_header({"type": "push", **fields}, payload.specs))
        time.sleep(milliseconds / 1e3)  # any delay must do; some of these fall into the fold
        a.data.sock.sendall(protocol.memory(payload.raw))
        assert a.receive(a.data).fields["taken"] is False
        first.close()
        assert a.pull() == "entry" and a.version.number == a.seq
        assert status(host)["fragments"] == [{"version": a.seq, "pushes": 0}], milliseconds


def test_a_push_before_the_join_is_sent_again_after_it_and_counts_once(serve):
    """Its line was cut in the middle; the join is of the same process."""
    host = serve("-n", 2)
    a, b = join_all(Peer(host, "a"), Peer(host, "b"))
    outer = Outer(a.params)
    assert a.send(numbers(1))
    a.close()
    a.join()
    assert a.seq == 1 and a.pull(0, 0) == "current"
    a.send(numbers(1), seq=1)
    together(a.pull, lambda: b.push(numbers(2)))
    outer.step([numbers(1).bfloat16(), numbers(2).bfloat16()])
    assert same_bits(a.params, outer.params) and same_bits(b.params, outer.params)
    assert a.send(numbers(1), seq=1) is False  # and once more: an entry lists it


def test_who_is_no_member_is_told_to_join_again(serve):
    host = serve()
    a = Peer(host, "a").join()
    stranger = Peer(host, "b")
    stranger.reply = a.reply
    for request in (lambda: stranger.send(numbers(1)), lambda: stranger.pull(0, 1)):
        with pytest.raises(Refused) as caught:
            request()
        assert caught.value.code == "rejoin"
        stranger.close()


# --- Options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--outer-lr", 0.5, "--outer-momentum", 0.5], {"lr": 0.5, "momentum": 0.5}),
        (["--no-nesterov", "--no-momentum-warmup"], {"nesterov": False, "warmup": False}),
        (["--upload-codec", "int8", "--download-codec", "fp32"], {"codec": "fp32"}),
    ],
)
def test_the_settings_of_the_outer_optimizer_and_of_codecs_get_there(serve, options, expected):
    host = serve(*options)
    a = Peer(host, "a").join()
    up = a.reply["upload_codec"]
    assert up == ("int8" if "int8" in options else "bf16")
    outer = Outer(a.params, **expected)
    for seed in (1, 2, 3):
        a.push(numbers(seed))
        outer.step([rounded(numbers(seed), up)])
    assert torch.allclose(a.params, outer.params, atol=1e-6)
    assert a.reply["settings"]["outer_lr"] == expected.get("lr", 0.7)


def test_without_error_feedback_nothing_is_kept(serve, tmp_path):
    host = serve("--no-error-feedback", "--save-every", 1)
    a = Peer(host, "a").join()
    assert a.reply["error_feedback"] is False
    a.push(numbers(1))
    host.wait_for("saved .*checkpoint-1")
    path = tmp_path / "model" / "checkpoint-1" / "outer.safetensors"
    assert safetensors.torch.load_file(path).keys() == {"momentum"}


def test_a_round_timeout_and_max_staleness_get_there(serve, tmp_path):
    """b's first push is one version late and counts; its second is two, which is too many."""
    host = serve("-n", 2, "--round-timeout", 0.3, "--max-staleness", 1)
    a, b = join_all(Peer(host, "a"), Peer(host, "b"))
    assert b.reply["max_staleness"] == 1
    for seed in (1, 2):
        a.push(numbers(seed))
    b.send(numbers(3), base=(a.version.life, 1))
    assert a.push(numbers(4)).refused == ""
    assert b.pull() in ("entry", "slice") and b.folded[0]["b"].refused == ""
    b.send(numbers(5), base=(a.version.life, 1))
    a.push(numbers(6))
    b.pull()
    assert "over --max-staleness" in b.folded[0]["b"].refused
    lines = rounds(tmp_path / "model", 4)
    assert [line["staleness"] for line in lines[:3]] == [{}, {}, {"b": 1}]
    assert [line["refused"] for line in lines] == [[], [], [], ["b"]]
    assert [line["steps"] for line in lines] == [5, 5, 10, 5]


def test_below_min_workers_rounds_wait_and_status_says_so(serve, start):
    host = serve("--min-workers", 2)
    a = Peer(host, "a").join()
    a.send(numbers(1))
    shown = start("status.py", "--server", host.address)
    assert shown.wait() == 0 and "too few workers" in shown.output
    said = status(host)
    assert (said["state"], said["fragments"]) == ("too few workers", [{"version": 0, "pushes": 1}])
    b = Peer(host, "b").join()
    a.pull()
    together(lambda: a.push(numbers(2)), b.push)
    assert status(host)["state"] == "running" and same_bits(a.params, b.params)


def test_only_leave_removes_at_once_and_silence_after_the_worker_timeout(serve):
    host = serve("-n", 3, "--worker-timeout", 2)
    a, b, c = join_all(*(Peer(host, name) for name in "abc"))
    assert a.reply["heartbeat_seconds"] <= 0.5
    b.leave()
    assert [w["id"] for w in status(host)["workers"]] == ["a", "c"]
    a.close()  # which starts the clock, and no more
    time.sleep(0.2)
    assert [w["id"] for w in status(host)["workers"]] == ["a", "c"]
    while "a is gone" not in host.output:
        c.heartbeat()
        time.sleep(0.1)
    host.wait_for("a is gone: not heard of for 2 s")
    assert [w["id"] for w in status(host)["workers"]] == ["c"]


# --- Crashes and resumption ------------------------------------------------------------------


def test_a_run_whose_server_is_killed_ends_with_the_bits_of_one_that_was_not(serve, toy, tmp_path):
    """All that a crash costs is outer momentum, of which there is none."""
    plain = ["--upload-codec", "fp32", "--download-codec", "fp32", "--outer-momentum", 0]
    arguments = ("-n", 2, "--until-done", "--save-every", 4, *plain)
    host = serve(*arguments)
    workers = [toy(host, f"w{k}", seed=k, steps=62, pause=0.02) for k in (0, 1)]
    host.wait_for(r"round 6 \|")
    host.kill()
    again = serve(*arguments, "--port", host.port)
    again.wait_for(r"continuing from .*checkpoint-4")
    ends = [result(worker) for worker in workers]
    assert again.wait() == 0
    assert all("has joined again" in worker.output for worker in workers)
    _, model = simulate((0, 1), 62, 5, "fp32", momentum=0.0)
    assert [end["digest"] for end in ends] == [toy_worker.digest(model)] * 2
    final = read_flat(tmp_path / "model" / "model.safetensors")
    assert same_bits(final, flat(model))


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
    assert b.version.number == 2 and same_bits(b.params, before)
    b.push(numbers(4))
    again.wait_for("saved .*checkpoint-3")
    assert not (tmp_path / "model-diloco").exists()


def test_a_checkpoint_that_is_being_removed_is_none_any_more(start, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "outer.safetensors").write_bytes(b"x")
    killed = "import os, shutil, server; shutil.rmtree = lambda *_, **__: os._exit(9); "
    assert start("-c", f"{killed}server.protocol.discard({str(checkpoint)!r})").wait() == 9
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
    assert a.version.number == 3 and same_bits(a.params, outer.params)
    assert (a.reply["step"], a.seq) == (15, 3)
    a.push(numbers(3))
    outer.lr = 0.5
    outer.step([numbers(3).bfloat16()])
    assert same_bits(a.params, outer.params) and a.version.number == 4
    a.leave()
    assert again.wait() == 0
    assert [line["round"] for line in rounds(tmp_path / "model", 4)] == [1, 2, 3, 4]


SLOW_DISK = """
import os, sys, time
sys.path.insert(0, {root!r})
import server

def write_vectors(*args, at_once=server.write_vectors):
    while not os.path.exists({gate!r}):
        time.sleep(0.01)
    at_once(*args)

server.write_vectors = write_vectors
server.Server(server.parse_args()).serve()
"""


def test_a_checkpoint_that_takes_long_to_write_delays_nobody_and_is_of_its_moment(start, tmp_path):
    folder, gate = tmp_path / "model", tmp_path / "gate"
    script = SLOW_DISK.format(root=ROOT, gate=str(gate))
    host = start("-c", script, "-m", folder, "--port", 0, "--save-every", 1)
    host.address = f"127.0.0.1:{host.wait_for('port ([0-9]+)')[1]}"
    a = Peer(host, "a").join()
    before = a.params.clone()
    until((folder / ".tmp-checkpoint").exists, "a checkpoint is begun")
    for seed in (1, 2, 3):
        a.push(numbers(seed))
    assert not list(folder.glob("checkpoint-*"))
    gate.touch()
    host.wait_for("saved .*checkpoint-3")
    host.kill()
    assert same_bits(read_flat(folder / "checkpoint-0" / "model.safetensors"), before)
    first = safetensors.torch.load_file(folder / "checkpoint-0" / "outer.safetensors")
    assert first.keys() == {"momentum"} and not first["momentum"].any()
    assert same_bits(read_flat(folder / "checkpoint-3" / "model.safetensors"), a.params)


# --- Where the model comes from --------------------------------------------------------------


WEIGHTS = {"w": numbers(7, 12).view(3, 4), "b": numbers(8, 5).bfloat16()}


def lay_out(folder, is_sharded=False):
    """Weights by other programs, as they are found; the path for -m."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "toy"}')
    if not is_sharded:
        safetensors.torch.save_file(WEIGHTS, folder / "model.safetensors")
        return folder
    for name, tensor in WEIGHTS.items():
        safetensors.torch.save_file({name: tensor}, folder / f"model-{name}.safetensors")
    index = {"weight_map": {name: f"model-{name}.safetensors" for name in WEIGHTS}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_parameters_that_are_not_finite_start_no_run(serve, tmp_path):
    """Neither a worker's nor those of -m."""
    broken = numbers(0)
    broken[3] = float("nan")
    host = serve()
    with pytest.raises(Refused, match="to start from are not all finite"):
        Peer(host, "a", params=broken).join()
    assert same_bits(Peer(host, "b").join().params[:12], numbers(0)[:12])
    weights = {"w": broken[:12].view(3, 4).clone(), "b": WEIGHTS["b"]}
    path = lay_out(tmp_path / "hf")
    safetensors.torch.save_file(weights, path / "model.safetensors")
    host = serve("-m", path)
    with pytest.raises(Refused, match="to start from are not all finite"):
        Peer(host, "a").join()


def test_folders_of_other_programs_are_never_written_to(serve, tmp_path):
    path = lay_out(tmp_path / "hf", is_sharded=True)
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "pytorch_model.bin").write_bytes(b"theirs")
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in path.rglob("*") if f.is_file()}
    arguments = ("-m", path, "--until-done", "--save-every", 1, "--save-total-limit", 1)
    host = serve(*arguments)
    assert f"output goes to {path}-diloco" in host.output
    a = Peer(host, "a", manifest=MANIFEST[::-1]).join()  # its own order of tensors
    start = torch.cat([WEIGHTS["b"].float(), WEIGHTS["w"].reshape(-1)])
    assert not a.brought and same_bits(a.params, start)
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
    assert not b.brought and same_bits(b.params, a.params), again.output


# --- What is written -------------------------------------------------------------------------


def test_checkpoints_final_model_and_rounds(serve, tmp_path):
    folder = tmp_path / "model"
    files = {"config.json": b'{"model_type": "toy"}', "tokenizer.json": b"{}"}
    options = "--until-done", "--download-codec", "int8"
    host = serve("-n", 2, "--save-every", 1, "--save-total-limit", 2, *options)
    assert "NO WEIGHTS" in host.output
    a, b = join_all(Peer(host, "a", files=files), Peer(host, "b"))
    outer = Outer(a.params, "int8")
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
        "checkpoint-5", "checkpoint-6", "model.safetensors", "rounds.jsonl", ".diloco-lock", *files,
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
        assert line["bytes_up"] >= 2 * 2 * P
        assert {"time", "seconds_waiting", "seconds_folding"} <= line.keys()
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
    assert a.version.number == 5


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


@pytest.mark.parametrize("blocked", [[[0], 1], ["0", 1], [-1, 1], [0], [True, 1]])
def test_a_heartbeat_that_makes_no_sense_stops_no_clock(serve, blocked):
    host = serve("--worker-timeout", 1)
    a = Peer(host, "a").join()
    with pytest.raises((Refused, ConnectionError)):
        a.heartbeat(blocked=blocked)
    until(lambda: not status(host)["workers"], "the end of a silent worker")
