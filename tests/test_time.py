"""Time and memory: who moves too slowly is given up, who reads slowly costs little, and who is alive
but does not work is named."""

import contextlib
import gc
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import DEADLINE, status, until
from peers import MANIFEST, Counter, P, Peer, background, encode, join_all, numbers, same_bits
from test_rules import fold, join, member, opened, push

import diloco_callback
import protocol
import server as product
import status as screen
from protocol import Connection, ProtocolError, Refused, TensorSpec, TooSlow

BYTES = [TensorSpec("x", torch.uint8, (400,))]
QUICK = "--worker-timeout", 1, "--min-rate", 1000  # a transfer is judged after two seconds
BIG = [["w", "F32", [5_000_000]]]


@pytest.fixture
def pair():
    """pair(near, far): two Connections to each other, with these least rates."""
    with contextlib.ExitStack() as stack:

        def make(near=(0, 60), far=(0, 60), buffers=4096):
            sockets = socket.socketpair()
            listener = socket.create_server(("127.0.0.1", 0))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
            one = socket.create_connection(listener.getsockname())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            other = listener.accept()[0]
            for each in (*sockets, listener, one, other):
                stack.callback(each.close)
            both = (one, near), (other, far)
            conns = [Connection(sock, "127.0.0.1", 10, least=least) for sock, least in both]
            for conn in conns:
                stack.callback(conn.taken_in)
            conns[1].is_server = True
            return conns

        yield make


def trickle(conn, raw, pause=0.02):
    """Send bytes one at a time until the other side hangs up."""

    def run():
        with contextlib.suppress(OSError):
            for byte in raw:
                conn.sock.sendall(bytes([byte]))
                time.sleep(pause)

    return background(run)


# --- The least rate -------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [4, 20, -400], ids=["length", "header", "payload"])
def test_a_sender_below_the_least_rate_is_given_up_in_the_length_the_header_and_the_payload(
    pair, whole
):
    near, far = pair(far=(1000, 0.3))
    raw = protocol.encode_header({"type": "a"}, BYTES) + bytes(400)
    near.sock.sendall(raw[:whole])
    sent = trickle(near, raw[whole:])
    with pytest.raises(TooSlow, match=r"sent .* the least rate of 0.977 KiB"):
        far.receive(idle=10)
        far.discard()
    far.close()
    sent.result(DEADLINE)


def test_a_reader_below_the_least_rate_is_given_up(pair):
    near, far = pair(near=(50_000, 0.3))
    done = threading.Event()

    def read():
        while not done.wait(0.02):
            far.sock.recv(16)

    reads = background(read)
    with pytest.raises(TooSlow, match="took"):
        near.send(
            "a", {}, [TensorSpec("x", torch.uint8, (9_000_000,))], [torch.zeros(9_000_000).byte()]
        )
    done.set()
    reads.result(DEADLINE)


def test_waiting_between_messages_is_no_transfer_and_a_rate_of_zero_is_off(pair):
    near, far = pair(near=(1e6, 0.2), far=(1e6, 0.2))
    for _ in range(3):
        time.sleep(0.3)
        near.send("a")
        assert far.receive(idle=10).type == "a"
    near, far = pair(far=(0, 0.1))
    raw = protocol.encode_header({"type": "a"}, ())
    trickle(near, raw, 0.01)
    assert far.receive(idle=10).type == "a"


def test_time_that_the_maker_of_a_message_takes_counts_against_nobody(pair):
    near, far = pair(near=(1e6, 0.2), far=(100, 1))

    def made():
        for _ in range(4):
            time.sleep(0.15)
            yield torch.zeros(100, dtype=torch.uint8)

    sent = background(lambda: near.send("a", {}, BYTES, made()))
    far.receive(idle=10)
    far.discard()
    sent.result(DEADLINE)


def test_a_deadline_ends_a_wait_that_a_trickle_would_keep_alive(pair):
    near, far = pair()
    raw = protocol.encode_header({"type": "a"}, ())
    trickle(near, raw, 0.05)
    far.deadline = time.monotonic() + 0.3
    with pytest.raises(ConnectionError, match="did not answer in time"):
        far.receive(idle=None)


def test_a_wait_is_heard_only_by_who_asked_for_something_that_may_wait(pair):
    near, far = pair()
    far.send("wait", {"awaited": "bob"})
    with pytest.raises(ProtocolError, match="says `wait`"):
        near.request("heartbeat")
    for _ in range(30):
        far.send("wait", {"awaited": "bob"})
    heard = []
    with pytest.raises(ProtocolError, match="says `wait`"):
        near.reply(heard.append)
    assert 0 < len(heard) < 30


# --- Large headers --------------------------------------------------------------------------


def test_a_manifest_of_a_hundred_thousand_tensors_gets_through(pair):
    near, far = pair(buffers=1 << 20)
    manifest = [[f"model.layers.{k}.self_attn.weight", "F32", [64, 64]] for k in range(100_000)]
    sent = background(lambda: near.send("join", {"manifest": manifest}))
    assert len(far.receive(idle=30).fields["manifest"]) == 100_000
    sent.result(DEADLINE)


@pytest.mark.parametrize("part", ["[],", '"a",', "1,", '{"a":1},'])
def test_a_header_of_very_many_parts_is_refused_before_all_of_it_is_there(pair, part):
    near, far = pair(buffers=1 << 20)
    raw = b"{" + part.encode() * ((12 << 20) // len(part))
    sent = background(lambda: near.sock.sendall(struct.pack("<Q", len(raw)) + raw[: len(raw) // 2]))
    with pytest.raises(ProtocolError, match=r"the header has .* over"):
        far.receive(idle=30)
    far.close()
    sent.exception(DEADLINE)


def test_behind_a_large_header_that_is_wrong_the_next_one_waits(pair):
    near, far = pair(buffers=1 << 20)
    near.sock.sendall(struct.pack("<Q", 1 << 17) + b"[" * (1 << 17))
    with pytest.raises(ProtocolError, match="does not begin with"):
        far.receive(idle=30)
    free_at = protocol.Large.free_at
    assert free_at - time.monotonic() > protocol.WRONG_SECONDS / 2
    near, far = pair(buffers=1 << 20)
    near.sock.sendall(protocol.encode_header({"type": "join", "text": "x" * (1 << 17)}, []))
    assert far.receive(idle=30).type == "join" and time.monotonic() >= free_at


def test_two_large_headers_are_read_at_a_time_and_small_ones_pass_them(pair, monkeypatch):
    monkeypatch.setattr(protocol, "LARGE_SECONDS", 1.0)
    pairs = [pair() for _ in range(4)]
    for near, _ in pairs[:3]:
        near.sock.sendall(struct.pack("<Q", 1 << 20) + b"{")
    pairs[3][0].send("status")
    reads = [background(lambda far=far: far.receive(idle=10)) for _, far in pairs[:3]]
    assert pairs[3][1].receive(idle=10).type == "status"
    errors = sorted(str(read.exception(DEADLINE)) for read in reads)
    assert "did not answer in time" in errors[0] and "did not answer in time" in errors[1]
    assert sum("too many large headers" in error for error in errors) <= 1


# --- Members that are given up --------------------------------------------------------------


@contextlib.contextmanager
def beating(peer):
    """A block in which a Peer says heartbeats, as a worker does whose transfers hang."""
    done = threading.Event()
    conn = peer.connect()
    told = {"step": 0, "position": 0, "steps_per_second": 0.0, "loss": None, "blocked": []}

    def beat():
        with contextlib.suppress(Refused, OSError):
            while not done.wait(0.2):
                conn.send("heartbeat", told)
                peer.receive(conn)

    beats = background(beat)
    try:
        yield
    finally:
        done.set()
        beats.result(DEADLINE)
        conn.close()


def announce(peer, seq=1, values=None):
    """Begin a push of a Peer on a new connection, and send nothing of its payload; gives it."""
    conn = peer.connect()
    payload = encode(numbers(1) if values is None else values, "bf16")
    fields = {"slice": 0, "seq": seq, "base": peer.version, "step": 5, "steps": 5, "loss": None}
    conn.sock.sendall(protocol.encode_header({"type": "push", **fields}, payload.specs))
    return conn


def test_who_trickles_a_push_is_given_up_whatever_its_heartbeats_say_and_may_join_again(serve):
    server = serve("-n", 2, *QUICK)
    ada, bob = join_all(Peer(server, "ada"), Peer(server, "bob"))
    with beating(ada), beating(bob):
        conn = announce(bob)
        sent = trickle(conn, bytes(2 * P - 1), 0.1)
        ada.send(numbers(2))
        server.wait_for("bob is gone: its push of slice 0 stopped or was slower than --min-rate")
        assert ada.pull() == "entry"
        sent.result(DEADLINE)
    with pytest.raises(Refused, match="join again"):
        bob.heartbeat()
    bob.join()
    assert {worker["id"] for worker in status(server)["workers"]} == {"ada", "bob"}


def test_who_reads_a_slice_a_byte_at_a_time_is_given_up(serve):
    server = serve("-n", 2, *QUICK)
    size = BIG[0][2][0]
    peers = [Peer(server, name, torch.zeros(size), BIG) for name in ("ada", "bob")]
    ada, bob = join_all(*peers)
    with beating(ada), beating(bob):
        conn = bob.connect()
        conn.send("pull", {"slice": 0, "version": protocol.NONE, "seq": 0})
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        conn.sock.recv(1)
        ada.send()
        server.wait_for("bob is gone: its pull of slice 0 stopped or was slower")
        assert ada.pull() == "entry"


def test_who_does_not_send_what_it_was_asked_for_is_replaced_by_the_next(serve):
    server = serve("-n", 2, *QUICK)
    ada, bob = Peer(server, "ada"), Peer(server, "bob")
    asked = background(ada.ask)
    joins = background(bob.join)
    assert asked.result(DEADLINE).type == "bring"
    specs = [TensorSpec("slice:0", torch.float32, (P,))]
    raw = protocol.encode_header({"type": "bring", "slices": [0], "files": {}}, specs) + bytes(
        4 * P
    )
    sent = trickle(ada.control, raw[:-1], 0.05)
    server.wait_for("ada waits to join no more: (its upload|not heard of)")
    sent.result(DEADLINE)
    Peer(server, "cai").join()
    joins.result(DEADLINE)
    assert bob.brought == [0]


# --- One push at a time ---------------------------------------------------------------------


def resident(server):
    """The memory of a server's process in bytes."""
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_pushes_that_are_only_announced_cost_the_memory_of_one(serve):
    server = serve("-n", 1, "--worker-timeout", 60)
    size = 5_000_000  # 10 MB a push
    ada = Peer(server, "ada", torch.zeros(size), [["w", "F32", [size]]]).join()
    ada.push(torch.zeros(size))
    before = resident(server)
    held = [announce(ada, 2, torch.zeros(size)) for _ in range(20)]
    for conn in held[:-1]:
        with pytest.raises(ConnectionError):  # the next one has ended it
            conn.receive(DEADLINE)
    stranger = Peer(server, "stranger")
    stranger.versions = ada.versions
    for conn in [announce(stranger, 1, torch.zeros(size)) for _ in range(20)]:
        with pytest.raises(Refused, match="not a member"):
            stranger.receive(conn)
    assert resident(server) - before < 40e6
    assert ada.push(torch.zeros(size)).seq == 2
    for conn in held:
        conn.close()


def test_a_process_has_one_push_of_a_slice_in_the_open_round(serve):
    server = serve("-n", 2)
    ada, bob = join_all(Peer(server, "ada"), Peer(server, "bob"))
    assert ada.send(numbers(1))
    assert ada.send(numbers(1), seq=1)  # sent again
    with pytest.raises(Refused, match="push 2 of slice 0 comes before an entry lists push 1"):
        ada.send(numbers(1))
    bob.push(numbers(2))
    ada.data.close()
    ada.data = None
    assert ada.pull(seq=1) == "entry" and ada.folded[0]["ada"].seq == 1


# --- Readers --------------------------------------------------------------------------------


def model_of(count=3 * protocol.CHUNK):
    return product.GlobalModel(
        [TensorSpec("w", torch.float32, (count,))], [], 1, "bf16", "bf16", True
    )


def change(model, value):
    """What a fold does to a slice, chunk by chunk."""
    for start, stop in protocol.chunks(model.sizes[0]):
        model._keep(0, start, stop)
        model.params[start:stop] = value


def test_readers_of_one_version_share_its_copies_which_go_with_the_last_reader():
    model = model_of()
    shared = model.shared(0, 7)
    assert model.shared(0, 7) is shared and model.shared(0, 8) is not shared
    with shared.reading() as first, shared.reading() as second:
        begun = next(first)
        change(model, 1.0)
        change(model, 2.0)
        assert len(shared.kept) == 3
        assert begun.eq(0).all()
        pieces = list(second)
        assert len(shared.kept) == 2  # the first reader has taken one
        *rest, checksum = first
        assert not shared.kept
        assert all(part.eq(0).all() for part in [*pieces[:-1], *rest])
        expected = protocol.checksum_of(torch.zeros(model.sizes[0]))
        assert same_bits(pieces[-1], expected) and same_bits(checksum, expected)
    change(model, 3.0)
    assert not shared.kept


def test_a_reader_that_goes_leaves_nothing_behind():
    model = model_of()
    shared = model.shared(0, 7)
    with contextlib.suppress(OSError), shared.reading() as pieces:
        next(pieces)
        change(model, 1.0)
        assert len(shared.kept) == 2
        raise OSError
    assert not shared.kept
    with shared.reading():  # not begun
        pass
    assert not shared.places
    del shared, pieces
    gc.collect()
    assert not model.snapshots[0]


def test_a_status_is_made_once_for_all_who_ask_meanwhile_and_never_before_it_was_asked_for():
    made = []

    def fields():
        made.append(time.monotonic())
        return {"number": len(made)}

    board = product.Handouts(SimpleNamespace(lock=threading.Condition(), status=fields))
    asked, frames = [], []

    def ask():
        for _ in range(20):
            asked.append(time.monotonic())
            frames.append((asked[-1], board.status().result()))

    for each in [background(ask) for _ in range(8)]:
        each.result(DEADLINE)
    assert len(made) <= 8 * 20 / 2
    for began, frame in frames:
        number = int(frame.decode(errors="replace").split('number\\": ')[1].split("}")[0])
        assert made[number - 1] >= began


def test_files_are_there_once_for_all_who_ask():
    store = SimpleNamespace(files={"config.json": b"{}", "vocab.txt": b""})
    board = product.Handouts(SimpleNamespace(store=store))
    assert board.files() is board.files() and list(board.files()) == ["config.json"]
    store.files = {"config.json": b"{ }"}
    assert bytes(protocol.memory(board.files()["config.json"])) == b"{ }"


def test_who_waits_to_join_shares_the_models_manifest():
    specs = protocol.manifest_from_json(MANIFEST)
    facts = [
        SimpleNamespace(manifest=list(specs), buffers=[], frozen={"f": (specs[0], "a")})
        for _ in range(2)
    ]
    model = SimpleNamespace(manifest=specs, buffers=[])
    run = SimpleNamespace(members={}, waiting={"ada": SimpleNamespace(facts=facts[0])})
    product.share(facts[1], SimpleNamespace(model=model, run=run))
    assert facts[1].manifest is specs and facts[1].frozen is facts[0].frozen


# --- Alive is not working -------------------------------------------------------------------


def closes(run, stalls, seconds, *ids, now=0.0):
    """A round of slice 0 that is closed after so many seconds; gives the time then."""
    for id in ids:
        push(run, id, seq=run.slices[0].version.number + 1, now=now + seconds)
    fold(run, now=now + seconds)
    stalls.closed(0)
    return now + seconds


def test_a_round_waits_too_long_after_ten_times_the_median_of_the_last_ones():
    run = opened("ada", "bob", count=1)
    stalls = product.Stalls(run)
    assert stalls.limit == 60 and stalls.found(1000) == []  # nobody waits
    now = 0.0
    for seconds in (3, 5, 300, 4, 6):
        now = closes(run, stalls, seconds, "ada", "bob", now=now)
    assert stalls.limit == 50
    push(run, "ada", seq=6, now=now)
    assert stalls.found(now + 49) == []
    assert stalls.found(now + 51) == [{"slice": 0, "seconds": 51, "missing": ["bob"]}]
    push(run, "bob", seq=6, now=now)
    fold(run, now=now)
    assert stalls.found(now + 1000) == []


def test_the_limit_is_the_round_timeout_where_there_is_one_and_never_very_short():
    run = opened("ada", "bob", count=1, quorum=1, grace=30.0)
    stalls = product.Stalls(run)
    closes(run, stalls, 100, "ada", "bob")
    assert stalls.limit == 30
    run.rules.grace = 0.5
    assert stalls.limit == product.LEAST_STALL_SECONDS


def test_who_keeps_a_round_open_is_given_up_but_not_who_waits_for_it():
    """ada waits for bob in slice 0, and so keeps the round of slice 1 open, in which cai waits."""
    run = opened("ada", "bob", "cai", drop_stuck=10.0)
    stalls = product.Stalls(run)
    push(run, "cai", k=0, now=0)
    push(run, "cai", k=1, now=0)
    push(run, "ada", k=0, now=0)
    assert run.missing(0) == {"bob"} and run.missing(1) == {"ada", "bob"}
    assert stalls.stuck(0) == stalls.stuck(9.9) == []
    assert stalls.stuck(10.1) == ["bob"]
    run.remove("bob", ends=False)
    fold(run, now=11)
    assert run.missing(1) == {"ada"}
    assert stalls.stuck(11) == stalls.stuck(20.9) == []  # it could not come before
    assert stalls.stuck(21.1) == ["ada"]
    join(run, "bob", now=22)
    assert stalls.stuck(22) == ["ada"]  # who comes back is not awaited in a round that had begun


def test_nobody_is_given_up_by_default_nor_where_members_are_too_few():
    run = opened("ada", "bob", count=1)
    push(run, "ada")
    stalls = product.Stalls(run)
    assert stalls.stuck(0) == stalls.stuck(1e6) == []
    run = opened("ada", count=1, min_workers=2, drop_stuck=1.0)
    push(run, "ada")
    stalls = product.Stalls(run)
    assert stalls.stuck(0) == stalls.stuck(1e6) == []
    assert stalls.found(1e6)[0]["missing"] == []


def test_a_wait_is_logged_every_minute_with_those_that_are_missing(capsys, monkeypatch):
    run = opened("ada", "bob", count=1)
    push(run, "ada")
    args = SimpleNamespace(drop_stuck=0.0, advises=False)
    watch = product.Watch(SimpleNamespace(run=run, closed=False, args=args))
    for seconds in (1, 61, 90, 119, 122, 150, 183):
        monkeypatch.setattr(product, "now", lambda seconds=seconds: float(seconds))
        watch.look()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("WARNING" in line and "for bob: alive" in line for line in lines)
    assert watch.found == [{"slice": 0, "seconds": 183.0, "missing": ["bob"]}]


def test_who_is_alive_but_stuck_is_given_up_and_joins_again(serve):
    server = serve("-n", 2, "--drop-stuck", 1)
    ada, bob = join_all(Peer(server, "ada"), Peer(server, "bob"))
    with beating(ada), beating(bob):
        ada.push(numbers(1))
        assert "bob is given up: it is alive, but a round has waited 1 s for it" in server.output
    bob.join()
    assert {worker["id"] for worker in status(server)["workers"]} == {"ada", "bob"}
    assert status(server)["stalls"] == []


def test_status_shows_who_is_missing_and_how_long(serve):
    host = serve()
    told = status(host)
    told["stalls"] = [
        {"slice": 3, "seconds": 75.0, "missing": ["bob", "cai"]},
        {"slice": 4, "seconds": 70.0, "missing": []},
    ]
    history = screen.ask(host.address, "history")
    lines = [screen.STYLE.sub("", line) for line in screen.render(told, history)]
    assert "WARNING: the round of slice 3 has waited 1m 15s for bob, cai" in lines
    assert (
        "WARNING: the round of slice 4 has waited 1m 10s for more workers (--min-workers 1)"
        in lines
    )


def test_a_worker_logs_that_all_wait_for_it_once_a_minute(capsys):
    worker = SimpleNamespace(worker_id="bob", step=12)
    leader = SimpleNamespace(worker=worker, said_at=-1000.0)
    say = diloco_callback.Leader.say_stalled
    say(leader, [])
    for _ in range(3):
        say(leader, [{"slice": 0, "seconds": 75.2, "missing": ["bob", "cai"]}])
    [line] = capsys.readouterr().err.splitlines()
    assert (
        "has waited 75 s for bob, cai: all wait for this worker, whose training is at step 12"
        in line
    )
    for bad in ([1], [{"slice": "0"}], [{"slice": 0, "seconds": "1", "missing": []}]):
        leader.said_at = -1000.0
        with pytest.raises(ProtocolError):
            say(leader, bad)


# --- A server that never lets go ------------------------------------------------------------


class Leech:
    """A server by hand that takes a worker in, and then answers `kind` requests in its own way."""

    def __init__(self, kind, answer):
        self.kind, self.answer = kind, answer
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.met, self.done = threading.Event(), threading.Event()
        background(self.accept)

    def accept(self):
        while True:
            sock, address = self.listener.accept()
            background(lambda sock=sock, address=address: self.serve(Connection(sock, address[0])))

    def serve(self, conn):
        with contextlib.closing(conn), contextlib.suppress(OSError, ProtocolError):
            protocol.greet(conn, {"session": "s"})
            while True:
                message = conn.receive(idle=None)
                if message.type == self.kind:
                    self.met.set()
                    self.answer(conn, self.done)
                else:
                    getattr(self, message.type)(conn, message)

    def join(self, conn, message):
        settings = dict(product.DEFAULTS)
        fields = {"run": "0" * 20, "index": 0, "rank": 0, "world": 1, "num_shares": 8}
        fields |= {"heartbeat_seconds": 0.05, "upload_codec": "bf16", "download_codec": "bf16"}
        fields |= {"error_feedback": True, "max_staleness": 10, "settings": settings, "step": 0}
        fields |= {"turns": [0], "steps": None, "known": [0], "versions": [["0" * 20, 0]]}
        conn.send(
            "join", {**fields, "frozen": [], "manifest": message.fields["manifest"], "buffers": []}
        )

    def pull(self, conn, message):
        values = torch.zeros(8)
        fields = {"slice": 0, "version": ["0" * 20, 0], "folded": {}, "step": 0}
        fields |= {"made": 0.0, "more": False}
        specs = [TensorSpec("slice", torch.float32, (8,)), protocol.Checksum.SPEC]
        conn.send("slice", fields, specs, [values, protocol.checksum_of(values)])

    def heartbeat(self, conn, message):
        conn.send("heartbeat", {"round": 0, "rank": 0, "world": 1, "members": [], "orders": []})

    def leave(self, conn, message):
        conn.send("leave")

    def push(self, conn, message):
        conn.unread and conn.discard()
        conn.send("push", {"taken": True})


def silence(conn, done):
    done.wait(DEADLINE)


def waits(conn, done):
    while not done.wait(0.01):
        conn.send("wait", {"awaited": "x" * 100})


def trickles(conn, done):
    conn.sock.sendall(struct.pack("<Q", 4000))
    while not done.wait(0.05):
        conn.sock.sendall(b"{")


@pytest.mark.parametrize("kind", ["heartbeat", "leave", "push", "pull", "join"])
@pytest.mark.parametrize("answer", [silence, waits, trickles])
def test_a_worker_ends_in_bounded_time_whatever_its_server_does(monkeypatch, kind, answer):
    monkeypatch.setattr(diloco_callback, "LEAVE_SECONDS", 0.2)
    leech = Leech(kind, answer)
    counter = Counter(SimpleNamespace(address=leech.address), "ada", sync_every=2)
    if kind not in ("join", "pull"):
        assert counter.joined.wait(DEADLINE)
    counter.step(2)
    if kind != "leave":
        assert leech.met.wait(DEADLINE)
    counter.quit()
    counter.join(15)
    assert not counter.is_alive()
    leech.done.set()
    leech.listener.close()


def test_a_server_that_says_wait_without_end_fills_no_log(capsys):
    log = diloco_callback.Admission.say_awaited
    worker = SimpleNamespace(worker_id="ada", leave_by=None)
    admission = SimpleNamespace(
        worker=worker,
        replica=SimpleNamespace(awaited={}),
        said="",
        said_at=-1000.0,
        ended=[],
        has_gone=lambda holder: False,
    )
    for k in range(1000):
        log(admission, {"awaited": f"{k}" * 1000})
    [line] = capsys.readouterr().err.splitlines()
    assert len(line) < 300 and len(admission.replica.awaited["join"]) == 200


def test_many_workers_of_one_machine_join_push_and_end_with_the_same_numbers(serve):
    server = serve("-n", 50)
    counters = [Counter(server, f"w{k:02}", sync_every=2).finish(4) for k in range(50)]
    for counter in counters:
        counter.join(DEADLINE)
    assert [counter.error for counter in counters if counter.error or counter.is_alive()] == []
    assert len({str(counter.local) for counter in counters}) == 1
    until(lambda: status(server)["workers"] == [], "all have left")
    assert member("ada").id == "ada"
