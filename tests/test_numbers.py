"""What numbers mean: no number of a worker ends the run of others or stays wrong, and no number of
a server is believed unseen. Liars are Peers, or a server by hand that changes its replies."""

import contextlib
import json
import math
import socket
import threading

import pytest
import torch
from conftest import DEADLINE, rounded, status, until
from peers import Numbers, P, Peer, encode, join_all, numbers, rounds

import protocol
import worker as workers
from diloco_callback import DiLoCoWorker
from protocol import CHUNK, CODECS, MAX_ABS, ProtocolError, Refused

LIFE = "0" * 20


def refusal(action):
    with pytest.raises(Refused) as caught:
        action()
    return str(caught.value)


# --- What workers say -----------------------------------------------------------------------


def test_a_claimed_step_ends_the_run_for_nobody_and_stays_in_no_checkpoint(serve, tmp_path):
    server = serve("-n", 1, "--save-every", 1)
    a = Peer(server, "a").join()
    evil = Peer(server, "evil").join(step=1 << 52)
    evil.heartbeat(step=1 << 52)
    evil.send(numbers(1), step=1 << 52, steps=10**9)
    a.push(numbers(2), steps=5, step=5)
    assert evil.pull() == "entry"
    assert Peer(server, "late").join().reply["step"] <= 100
    assert status(server)["step"] <= 100
    assert all(each["step"] <= 100 for each in status(server)["workers"])
    path = tmp_path / "model" / "checkpoint-1" / "outer.safetensors"
    until(path.exists, "a checkpoint")
    assert protocol.load_file(path)[0]["step"] <= 100


def test_a_joiner_with_huge_cycles_moves_the_run_no_faster(serve):
    server = serve("-n", 1)
    a = Peer(server, "a").join()
    evil = Peer(server, "evil").join(sync_every=1 << 30)
    evil.send(numbers(1), step=1 << 40, steps=10**9)
    a.push(numbers(2), steps=5, step=5)
    assert status(server)["step"] <= 10 * 5 * 10


def test_a_sequence_number_lies_at_most_a_thousand_above_the_last(serve):
    server = serve("-n", 1)
    bob = Peer(server, "bob").join()
    for seq in (1 << 52, 1001):
        assert "sequence number" in refusal(lambda seq=seq: bob.send(None, seq=seq, step=5))
        bob.data = None
    bob.push(numbers(1))
    assert bob.send(numbers(1), seq=1001)
    assert bob.pull(seq=1001) == "entry"
    bob.leave()
    again = Peer(server, "bob").join()
    assert again.seq == 1001 and again.push(numbers(2)).seq == 1002


@pytest.mark.parametrize(
    "fields",
    [
        {"closed": [7]},
        {"closed": ["0"]},
        {"sync_every": 0},
        {"ranks": 1 << 40},
        {"versions": [[LIFE, 3]], "folded": [{"bob": [1 << 52, "", 3]}]},
        {"versions": [[LIFE, 3]], "folded": [{"bob": [1, "", 9]}]},
        {"versions": [[LIFE, 3]], "folded": [{"b\n": [1, "", 3]}]},
        {"manifest": [["w", "F32", [1 << 52]]]},
        {"manifest": [["__metadata__", "F32", [1]]]},
        {"manifest": [["w", "F32", [1 << 30, 1 << 30]]]},
    ],
)
def test_a_join_that_cannot_be_is_refused(serve, fields):
    server = serve("-n", 1)
    refusal(lambda: Peer(server, "a").ask(**fields))
    assert "Traceback" not in server.output
    Peer(server, "a").join()


def test_heartbeats_and_brings_keep_to_the_slices(serve):
    server = serve("-n", 2)
    a, evil = join_all(Peer(server, "a"), Peer(server, "evil"))
    refusal(lambda: evil.heartbeat(blocked=[1, 1]))
    evil = Peer(
        server, "evil", files={"config.json": b"{}"}, session=evil.session["session"]
    ).join()
    refusal(lambda: evil.bring([]))  # it was not asked for files
    a.heartbeat(blocked=[0, 1])


def test_a_stranger_replaces_nothing_after_a_crash(serve, tmp_path):
    server = serve("-n", 1, "--save-every", 1)
    a = Peer(server, "a").join()
    a.push(numbers(1))
    until((tmp_path / "model" / "checkpoint-1").exists, "a checkpoint")
    server.kill()
    again = serve("-n", 1, "--save-every", 1, "--worker-timeout", 1)
    evil = Peer(again, "evil", params=numbers(9))
    evil.versions, evil.reply = [protocol.Version("f" * 20, 1 << 50)], {"run": a.reply["run"]}
    evil.join()
    assert not evil.brought and torch.equal(evil.params, a.params)
    assert evil.version.number == 1


def test_a_version_of_a_life_that_never_was_is_not_believed(serve, tmp_path):
    server = serve("-n", 1, "--save-every", 1)
    a = Peer(server, "a").join()
    a.push(numbers(1))
    until((tmp_path / "model" / "checkpoint-1").exists, "a checkpoint")
    server.kill()
    again = serve("-n", 1, "--save-every", 1)
    a.server, a.data, a.versions = again.address, None, [protocol.Version("f" * 20, 7)]
    a.folded, a.control, a.brought = [{}], None, []
    a.join()
    assert not a.brought and a.version.number == 1
    assert a.push(numbers(2)).refused == ""


def test_a_push_to_a_server_without_a_model_is_told_to_join_again(serve):
    server = serve("-n", 1)
    a = Peer(server, "a")
    a.seqs = [3]
    for action in (
        lambda: a.send(None),
        lambda: a.pull(seq=1),
        lambda: a.bring([0]),
        lambda: a.heartbeat(),
    ):
        a.data, a.control = None, a.connect()
        with pytest.raises(Refused) as caught:
            action()
        assert caught.value.code == "rejoin"


# --- Norms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_the_norm_of_a_push_is_that_of_its_numbers(codec):
    values = numbers(3, CHUNK + 70)
    payload, norm = encode(values, codec), rounded(values, codec).norm().item()
    codec = CODECS[codec]

    def squares():
        parts = protocol.chunks(values.numel())
        sent = payload.tensors
        like = torch.empty(CHUNK)
        decoded = ((codec.decoded(sent, a, like[: b - a]), a) for a, b in parts)
        return sum(codec.square(numbers, sent, start) for numbers, start in decoded)

    assert squares() ** 0.5 == pytest.approx(norm, rel=1e-4)
    for bad in (MAX_ABS * 2, math.inf, math.nan):
        raw = payload.tensors["values"]
        if codec in (CODECS["fp32"], CODECS["bf16"]):
            raw[5] = bad
            assert squares() == math.inf
        else:
            raw[:2].view(torch.bfloat16)[0] = bad
            assert squares() == math.inf
    if codec in (CODECS["fp32"], CODECS["bf16"]):
        raw[5] = 1e29
        assert squares() ** 0.5 == pytest.approx(1e29, rel=0.01)


def test_a_push_that_is_far_too_large_is_refused_when_its_round_closes(serve, tmp_path):
    server = serve("-n", 2, "--save-every", 1, "--upload-codec", "fp32")
    a, b = join_all(Peer(server, "a"), Peer(server, "evil"))
    for seed in range(3):
        a.send(numbers(seed))
        b.push(numbers(seed + 10))
        a.pull()
    b.send(torch.full((P,), 1e29))  # it comes first, and is judged with the others all the same
    assert a.push(numbers(5)).refused == ""
    assert b.pull() == "entry"
    fate = b.folded[0]["evil"]
    assert "--max-push-ratio 100 times" in fate.refused and "e+2" in fate.refused
    line = rounds(tmp_path / "model", 4)[-1]
    assert line["refused"] == ["evil"] and line["reasons"] == {"evil": fate.refused}
    assert line["norms"]["evil"] > 1e29 and line["norms"]["a"] < 1 and line["norm"] < 1
    assert line["steps"] == 5 and status(server)["last_round"]["norms"] == line["norms"]
    server.wait_for("WARNING: evil: a norm of")
    until((tmp_path / "model" / "checkpoint-4").exists, "a checkpoint")
    server.kill()  # what the rounds before a crash were like is known after it
    again = serve("-n", 2, "--upload-codec", "fp32")
    for peer in (a, b):
        peer.server, peer.control, peer.data = again.address, None, None
    join_all(a, b)
    a.send(numbers(6))
    assert "--max-push-ratio" in b.push(torch.full((P,), 1e6)).refused
    a.pull()


def test_many_steps_excuse_no_norm(serve):
    server = serve("-n", 1, "--upload-codec", "fp32")
    a = Peer(server, "a").join()
    for seed in range(3):
        a.push(numbers(seed))
    assert "--max-push-ratio" in a.push(numbers(4) * 1000, steps=10**9).refused
    assert a.push(numbers(4) * 10).refused == ""


def test_a_ratio_of_zero_lets_every_finite_push_count(serve, tmp_path):
    server = serve("-n", 1, "--upload-codec", "fp32", "--max-push-ratio", 0)
    a = Peer(server, "a").join()
    for seed in range(3):
        a.push(numbers(seed))
    assert a.push(torch.full((P,), 1e29)).refused == ""
    assert status(server)["last_round"]["norm"] > 1e29  # a number that JSON has
    assert a.push(torch.full((P,), math.nan)).refused == "the pseudo-gradient is not finite"


def test_an_update_is_finite_before_it_is_sent(serve):
    server = serve("-n", 1, "--upload-codec", "fp32", "--outer-lr", "1e30", "--max-push-ratio", 0)
    a = Peer(server, "a").join()
    a.push(torch.full((P,), 1e25))
    assert a.params.isfinite().all()
    assert Peer(server, "b").join().params.isfinite().all()


# --- What a server says ---------------------------------------------------------------------


class Liar:
    """A server by hand, whose replies a test changes. `lies`: {type of a reply: its fields that
    differ}, or a function of (fields, specs, tensors) that returns those."""

    def __init__(self, size=8):
        self.size, self.lies, self.version, self.asked = size, {}, 0, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.params, self.seq = torch.zeros(size), 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, address = self.listener.accept()
                threading.Thread(target=self.serve, args=[sock, address[0]], daemon=True).start()

    def serve(self, sock, address):
        conn = protocol.Connection(sock, address, stall=DEADLINE)
        with contextlib.suppress(OSError, ProtocolError):
            protocol.greet(conn, {"session": "s"})
            while True:
                message = conn.receive(idle=None)
                conn.discard()
                self.asked.append(message.type)
                self.answer(conn, getattr(self, f"on_{message.type}")(message))

    def answer(self, conn, reply):
        kind, fields, specs, tensors = reply
        lie = self.lies.get(kind, {})
        if callable(lie):
            fields, specs, tensors = lie(fields, specs, tensors)
        else:
            fields = {**fields, **lie}
        conn.send(kind, {n: v for n, v in fields.items() if v is not ...}, specs, tensors)

    def on_join(self, message):
        fields = {
            "run": LIFE, "index": 0, "rank": 0, "world": 1, "num_shares": 8,
            "heartbeat_seconds": 0.05, "upload_codec": "fp32", "download_codec": "fp32",
            "error_feedback": True, "max_staleness": 10, "step": 0, "turns": [0], "steps": None,
            "settings": {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True,
                         "momentum_warmup": True},
            "known": [0], "versions": [[LIFE, 0]], "frozen": [],
            "manifest": message.fields["manifest"], "buffers": [],
        }  # fmt: skip
        return "join", fields, [], []

    def on_heartbeat(self, message):
        fields = {"round": 0, "rank": 0, "world": 1, "members": ["w"], "orders": []}
        return "heartbeat", fields, [], []

    def on_push(self, message):
        self.seq = message.fields["seq"]
        return "push", {"taken": True}, [], []

    def on_leave(self, message):
        return "leave", {}, [], []

    def on_pull(self, message):
        held = protocol.version_of(message.fields["version"])
        k, seq = 0, message.fields["seq"]
        if seq == 0 and held == (LIFE, self.version):
            return "current", {"slice": k, "version": held}, [], []
        self.version += seq > 0
        fates = {"w": [self.seq, "", self.version]} if self.seq else {}
        fields = {
            "slice": k,
            "version": [LIFE, self.version],
            "folded": fates,
            "step": 5,
            "made": 1.0,
        }
        if held == (LIFE, self.version - 1) and seq:
            fields |= {"base": held, "plain": False, "more": False}
            update = torch.ones(self.size)
            self.params += update
            specs = [*CODECS["fp32"].layout(self.size), protocol.Checksum.SPEC]
            return "entry", fields, specs, [update, protocol.checksum_of(self.params)]
        specs = [protocol.TensorSpec("slice", torch.float32, (self.size,)), protocol.Checksum.SPEC]
        fields["more"] = False
        return "slice", fields, specs, [self.params, protocol.checksum_of(self.params)]


@pytest.fixture
def liar():
    server = Liar()
    yield server
    server.listener.close()


def train(server, steps=6):
    """Train with a worker of the liar's; returns the model. Raises what training raises."""
    model = Numbers(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = dict(server=server.address, sync_every=2, worker_id="w", files={})
    try:
        with DiLoCoWorker(model, optimizer, reconnect_timeout=2.0, **options):
            for _ in range(steps):
                model.step(optimizer)
    finally:
        assert model.weight.isfinite().all()
    return model


def test_a_server_that_tells_the_truth_is_believed(liar):
    train(liar)
    assert liar.version >= 3 and {"join", "push", "pull", "leave"} <= set(liar.asked)


BAD = [
    ("join", {"known": ["x"]}),
    ("join", {"known": []}),
    ("join", {"known": [1 << 60]}),
    ("join", {"settings": {}}),
    ("join", {"settings": {"outer_lr": "x"}}),
    ("join", {"upload_codec": "zip"}),
    ("join", {"turns": [0, 1]}),
    ("join", {"turns": ...}),
    ("join", {"steps": "x"}),
    ("join", {"pace": 0}),
    ("join", {"heartbeat_seconds": 1e15}),
    ("join", {"rank": 5}),
    ("join", {"world": 1 << 40}),
    ("join", {"num_shares": 0}),
    ("join", {"frozen": ["x", 5]}),
    ("join", {"frozen": [{}]}),
    ("join", {"manifest": [["w", "F32", [1 << 50]]]}),
    ("join", {"run": 5}),
    ("join", {"max_staleness": -1}),
    ("push", lambda fields, *_: (fields, [protocol.Checksum.SPEC], [torch.zeros(16).byte()])),
    ("entry", {"version": []}),
    ("entry", {"version": [LIFE, -1]}),
    ("entry", {"folded": {"w": [1]}}),
    ("entry", {"folded": []}),
    ("entry", {"step": "x"}),
    ("entry", {"plain": 1}),
    ("entry", {"part": 1.5}),
    ("entry", {"part": "x"}),
    ("entry", {"made": -1.0}),
    ("entry", {"made": ...}),
    ("entry", {"base": [LIFE, 77]}),
    ("slice", {"version": ["x", 0]}),
    ("slice", {"more": True}),
    ("slice", {"slice": 1}),
    ("heartbeat", {"orders": [{}, None]}),
    ("heartbeat", {"orders": ...}),
    ("heartbeat", {"rank": 3}),
    ("heartbeat", {"pace": 0}),
    ("heartbeat", {"pace": 2.5}),
]


@pytest.mark.parametrize(("kind", "lie"), BAD)
def test_nonsense_ends_in_a_clear_error_or_is_passed_over(liar, kind, lie, monkeypatch):
    died = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    liar.lies[kind] = lie
    try:
        train(liar)
    except (Refused, ConnectionError) as error:
        assert liar.address in str(error)
    else:
        assert kind in ("heartbeat", "entry")
    assert not died


def spoiled(value):
    """A lie: the first number of a payload is another one; the checksum is that of the lie."""

    def lie(fields, specs, tensors):
        numbers = tensors[0].clone()
        numbers[0] = value
        return fields, specs, [numbers, protocol.checksum_of(numbers)]

    return lie


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e31])
def test_an_update_that_is_not_finite_is_never_adopted(liar, value):
    liar.lies["entry"] = spoiled(value)
    train(liar)  # the slice in full, which is asked for then, is fine
    liar.lies["slice"] = spoiled(value)
    with pytest.raises(Refused, match="not finite"):
        train(liar)


def test_a_wrong_checksum_is_forgiven_once_in_a_row(liar):
    liar.lies["entry"] = lambda fields, specs, tensors: (
        fields, specs, [tensors[0], torch.zeros(16, dtype=torch.uint8)]
    )  # fmt: skip
    train(liar)
    assert liar.asked.count("pull") > 4
    liar.lies["slice"] = liar.lies["entry"]
    with pytest.raises(Refused, match=f"server {liar.address}: slice 0 .* 2 times running"):
        train(liar)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1 << 40},
        {"num_hidden_layers": 64, "hidden_size": 1 << 20, "intermediate_size": 1 << 22},
        {"vocab_size": 1 << 24, "hidden_size": 1 << 20},
        {"hidden_size": "x"},
        {"model_type": "gpt2", "n_layer": 10**9},
        {"model_type": "gpt2", "hidden_size": 1 << 20, "vocab_size": 1 << 24},
        {"model_type": "\x1b[2J"},
    ],
)
def test_a_model_that_no_machine_holds_is_not_built(changes):
    import model as models

    settings = workers.Settings()
    raw = json.loads(models.Config().to_json()) | changes
    with pytest.raises(workers.RunError, match="cannot build the model"):
        workers.build_model(settings, {"config.json": json.dumps(raw)})
