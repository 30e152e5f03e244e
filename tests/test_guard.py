"""Who may speak: tokens, TLS, addresses, and what strangers cost.

python -m pytest tests/test_guard.py
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import DEADLINE, ROOT, result, until
from peers import background

import protocol
import server
import status
import worker
from diloco_callback import DiLoCoCallback
from protocol import Access, Connection, Guard, Refused, proof_of

TOKEN = "correct horse battery staple"
OPEN = Guard()
WHO = {"worker": "ada", "session": "s1"}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("DILOCO_TOKEN", "DILOCO_TLS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Paths of two self-made certificates for 127.0.0.1, each with its key in the same file."""
    folder, paths = tmp_path_factory.mktemp("certificates"), []
    for name in ("one", "other"):
        path = str(folder / f"{name}.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-keyout", path, "-out", path + ".crt", "-subj", "/CN=diloco",
             "-addext", "subjectAltName=IP:127.0.0.1"],
            check=True, capture_output=True,
        )  # fmt: skip
        with open(path, "a") as file, open(path + ".crt") as certificate:
            file.write(certificate.read())
        paths.append(path)
    return paths


class Raw:
    """A peer that writes and reads the frames of a conversation by hand."""

    def __init__(self, address, source="127.0.0.1"):
        self.sock = socket.create_connection(address, DEADLINE, source_address=(source, 0))
        self.sock.settimeout(DEADLINE)

    def send(self, type, **fields):
        self.sock.sendall(protocol.encode_header({"type": type, **fields}, []))

    def hear(self):
        """The fields of the next message, or {} at the end of the connection."""
        raw = b""
        while len(raw) < 8 or len(raw) < 8 + int.from_bytes(raw[:8], "little"):
            wanted = 8 - len(raw) if len(raw) < 8 else 8 + int.from_bytes(raw[:8], "little")
            try:
                part = self.sock.recv(wanted - len(raw) if len(raw) >= 8 else wanted)
            except ConnectionError:
                part = b""
            if not part:
                return {}
            raw += part
        return protocol.parse_header(raw[8:])[0]

    def hello(self, nonce="0" * 32, who=WHO):
        """Say hello; returns what the server answers."""
        self.send("hello", protocol=protocol.PROTOCOL_VERSION, nonce=nonce, **who)
        return self.hear()

    def close(self):
        self.sock.close()


@contextlib.contextmanager
def door(monkeypatch, guard=OPEN, **rooms):
    """A server.Door on a free port, without a server around it: (door, its address)."""
    monkeypatch.setattr(protocol.Log, "__call__", lambda log, text: said.append(text))
    said, ended = [], threading.Event()
    shell = SimpleNamespace(
        ended=ended, args=SimpleNamespace(n=1, tls_cert=None), lock=threading.Condition(), session="x",
        run=SimpleNamespace(members={}, waiting={}), gate=None, rounds=None, handouts=None, hang_up=lambda conn: None,
        on_echo=lambda conn, message: conn.send("echo"), **rooms,
    )  # fmt: skip
    made = server.Door(shell, guard)
    made.said_lines = said
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        thread = threading.Thread(target=made.stand, args=[listener], daemon=True)
        thread.start()
        try:
            yield made, listener.getsockname()
            assert thread.is_alive()
        finally:
            ended.set()
            thread.join(DEADLINE)


def connected(address, who=WHO, **access):
    """A Connection that has said hello, by the program's own code."""
    return protocol.connect(f"127.0.0.1:{address[1]}", who, access=Access(**access))[0]


# --- Addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, is_private",
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("10.0.0.1", True),
        ("10.255.255.255", True), ("11.0.0.0", False), ("9.255.255.255", False),
        ("172.15.255.255", False), ("172.16.0.0", True), ("172.31.255.255", True),
        ("172.32.0.0", False), ("192.168.0.0", True), ("192.169.0.0", False),
        ("169.254.1.1", True), ("169.253.1.1", False), ("100.63.255.255", False),
        ("100.64.0.7", True), ("100.127.255.255", True), ("100.128.0.0", False),
        ("fbff::1", False), ("fc00::1", True), ("fdff::1", True), ("fe00::1", False),
        ("fe80::1%eth0", True), ("febf::1", True), ("fec0::1", False), ("2001:db8::1", False),
        ("8.8.8.8", False), ("0.0.0.0", False), ("192.0.0.1", False), ("192.0.2.1", False),
        ("198.18.0.1", False), ("203.0.113.9", False), ("240.0.0.1", False), ("224.0.0.1", False),
        ("255.255.255.255", False), ("::", False), ("ff02::1", False), ("64:ff9b::a00:1", False),
        ("::ffff:10.1.2.3", True), ("::ffff:8.8.8.8", False), ("::ffff:100.64.0.1", True),
    ],
)  # fmt: skip
def test_who_may_speak_by_address(address, is_private, certificates):
    def passes(**guard):
        with contextlib.suppress(Refused):
            Guard(**guard).check(address)
            return True
        return False

    context = protocol.server_context(certificates[0])
    assert passes() == is_private
    assert passes(token=TOKEN) == passes(context=context) == is_private  # both or neither
    assert passes(token=TOKEN, context=context)


def test_allow_adds_networks():
    args = ["-m", "x", "--allow", "203.0.113.7/24", "--allow", "2001:db8::/32"]
    allow = tuple(server.parse_args(args).allow)
    for address in ("203.0.113.200", "::ffff:203.0.113.1", "2001:db8::9", "10.0.0.1"):
        Guard(allow=allow).check(address)
    with pytest.raises(Refused, match=r"203\.0\.114\.1 is neither a loopback") as refusal:
        Guard(allow=allow).check("203.0.114.1")
    assert refusal.value.code == "address"
    with pytest.raises(SystemExit):
        server.parse_args(["-m", "x", "--allow", "home"])


# --- Tokens --------------------------------------------------------------------------------------


def test_where_a_token_comes_from(tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_bytes(b" from file \n\n")
    assert protocol.read_token() == ""
    monkeypatch.setenv("DILOCO_TOKEN", "from environment")
    assert protocol.read_token() == "from environment"
    assert protocol.read_token(None, path) == " from file \n"  # one newline is the editor's
    assert protocol.read_token("x", path) == "x"
    path.write_bytes(b"\r\n")
    for given in (("", None), (None, path)):
        with pytest.raises(ValueError, match="is empty"):
            protocol.read_token(*given)
    monkeypatch.setenv("DILOCO_TOKEN", "")  # as from a file that is not there
    with pytest.raises(ValueError, match="DILOCO_TOKEN is empty"):
        protocol.read_token()
    assert TOKEN not in repr(Access(TOKEN)) + repr(Guard(TOKEN))


def test_a_proof_depends_on_everything_it_names():
    usual = ["secret", "client", ("a", "b"), "w", "s"]
    others = [
        ["Secret", "client", ("a", "b"), "w", "s"], ["secret", "server", ("a", "b"), "w", "s"],
        ["secret", "client", ("b", "a"), "w", "s"], ["secret", "client", ("ab", ""), "w", "s"],
        ["secret", "client", ("a", "b"), "ws", ""], ["secret", "client", ("a", 'b","w'), "", "s"],
    ]  # fmt: skip
    assert len({proof_of(*each) for each in [usual, *others]}) == 7


def test_the_token_is_proven_both_ways_and_nothing_can_be_sent_again(monkeypatch):
    monkeypatch.setattr(protocol, "WRONG_TOKEN_SECONDS", 0.05)
    with door(monkeypatch, Guard(TOKEN)) as (_, address):

        def proven(proof, nonce="0" * 32, who=WHO):
            """What the server answers to proof(its nonce)."""
            peer = Raw(address)
            challenge = peer.hello(nonce, who)
            assert set(challenge) == {"type", "nonce"} and challenge["type"] == "challenge"
            peer.send("proof", proof=proof(challenge["nonce"]))
            answer = peer.hear()
            peer.close()
            return answer, challenge["nonce"]

        def right(role="client", who=WHO):
            names = who.get("worker", ""), who.get("session", "")
            return lambda theirs: proof_of(TOKEN, role, ("0" * 32, theirs), *names)

        answer, first = proven(right())
        assert answer["type"] == "hello" and answer["session"] == "x"
        server_proof = proof_of(TOKEN, "server", ("0" * 32, first), "ada", "s1")
        assert answer["proof"] == server_proof
        recorded = right()(first)
        for wrong in (
            lambda theirs: recorded,  # a replay
            lambda theirs: server_proof,
            right("server"),  # what the server itself would answer: a reflection
            right(who={"worker": "bob", "session": "s1"}),  # in somebody else's name
            lambda theirs: proof_of("wrong", "client", ("0" * 32, theirs), "ada", "s1"),
            lambda theirs: "",
            lambda theirs: "é" * 64,
        ):
            answer, _ = proven(wrong)
            assert (answer["type"], answer["code"]) == ("error", "token"), answer
            assert "the token is wrong" in answer["message"]
        assert len({proven(right())[1] for _ in range(3)}) == 3  # nonces are fresh
        # Nothing else gets an answer in place of the proof, whatever has been said before.
        for request in ("status", "stop", "save", "join", "echo", "hello"):
            peer = Raw(address)
            peer.hello()
            peer.send(request, protocol=protocol.PROTOCOL_VERSION)
            answer = peer.hear()
            assert answer["type"] == "error" and "not 'proof'" in answer["message"]
            peer.close()
        peer = Raw(address)  # a hello without a nonce
        peer.send("hello", protocol=protocol.PROTOCOL_VERSION)
        assert "nonce" in peer.hear()["message"]
        peer.close()


def test_a_client_goes_on_only_with_a_server_that_knows_its_token(monkeypatch):
    monkeypatch.setattr(protocol, "WRONG_TOKEN_SECONDS", 0.3)
    with door(monkeypatch, Guard(TOKEN)) as (_, address):
        assert connected(address, token=TOKEN).request("echo").type == "echo"
        with pytest.raises(Refused, match="asks for the token of its run") as missing:
            connected(address)
        began = time.monotonic()
        with pytest.raises(Refused, match="the token is wrong") as wrong:
            connected(address, token="something else")
        assert time.monotonic() - began >= 0.3  # a guess has its price
        assert missing.value.code == wrong.value.code == "token"
    with door(monkeypatch) as (_, address), pytest.raises(Refused, match="asks for no token"):
        connected(address, token=TOKEN)

    def false_server(listener, reflects):
        conn = Connection(listener.accept()[0], "127.0.0.1")
        hello = conn.receive(DEADLINE)
        conn.send("challenge", {"nonce": hello.fields["nonce"] if reflects else "1" * 32})
        proof = conn.receive(DEADLINE).fields["proof"]
        conn.send("hello", {"protocol": protocol.PROTOCOL_VERSION, "proof": proof})
        with contextlib.suppress(ConnectionError):
            conn.receive(DEADLINE)
        conn.close()

    for reflects in (False, True):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            done = background(lambda at=listener, reflects=reflects: false_server(at, reflects))
            with pytest.raises(Refused, match="does not know the token"):
                connected(listener.getsockname(), token=TOKEN)
            done.result(DEADLINE)


def relay(address):
    """A listener that passes connections on, and all the bytes that have gone through it."""
    listener, moved = socket.create_server(("127.0.0.1", 0)), bytearray()

    def pass_on(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                moved.extend(data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.create_connection(address)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pass_on, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener, moved


def test_a_run_with_a_token(serve, start, tmp_path, capsys, monkeypatch):
    """Who knows the token trains; who does not gets nothing; it stands in no byte, line or file."""
    path, audit = tmp_path / "token", tmp_path / "audit.jsonl"
    path.write_text(TOKEN + "\n")
    host = serve("-n", 1, "--token-file", path, env={"DILOCO_AUDIT": str(audit)})
    assert "who has the token can join" in host.output
    listener, moved = relay(("127.0.0.1", host.port))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    toy = [os.path.join(ROOT, "tests", "toy_worker.py"), "--server", address, "--worker-id", "ada"]
    wrong = start(*toy, env={"DILOCO_TOKEN": "correct horse"})
    right = start(*toy, "--steps=10", "--sync-every=5", env={"DILOCO_TOKEN": TOKEN})
    result(right)
    assert wrong.wait()
    assert "the token is wrong" in wrong.lines[-1] and "trying again" not in wrong.output
    for request in ("status", "stop", "save"):
        peer = Raw(("127.0.0.1", host.port))
        peer.send(request)
        assert peer.hear()["type"] == "error"
        peer.close()
        flags = [] if request == "status" else [f"--{request}"]
        assert status.main(["--server", host.address, *flags]) == 1
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and "--token-file or DILOCO_TOKEN" in said.err
    assert status.main(["--server", host.address, "--token-file", str(path)]) == 0
    assert "step 10" in capsys.readouterr().out and "to stop" not in host.output
    alone = ["--server", host.address, os.path.join(ROOT, "default.yaml"), "--output-dir", "out"]
    monkeypatch.chdir(tmp_path)
    assert worker.main([*alone, "--token", "no"]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "the token is wrong" in said.err
    listener.close()
    for where in (bytes(moved), host.output.encode(), audit.read_bytes(), right.output.encode()):
        assert len(where) and TOKEN.encode() not in where
    for file in (tmp_path / "model").rglob("*"):
        assert file.is_dir() or TOKEN.encode() not in file.read_bytes()


def test_no_token_and_a_short_one_are_said(monkeypatch):
    def lines(token, context=None, allow=()):
        args = SimpleNamespace(n=1, tls_cert=None)
        shell = SimpleNamespace(args=args, ended=threading.Event())
        return list(server.Door(shell, Guard(token, context, allow)).notices())

    [line] = lines("")
    assert "anybody at a loopback or private address can join, read" in line
    assert "8.0.0.0/8" in lines("", allow=("8.0.0.0/8",))[0]
    assert "without TLS" in lines("x" * 16)[0] and len(lines("x" * 16)) == 1
    assert "WARNING: the token has fewer than 16" in lines("x" * 15)[1]


def test_a_checkpoint_of_a_trainer_has_no_token():
    callback = DiLoCoCallback("host:1", token=TOKEN, tls=False)
    try:
        state = json.dumps(callback.state())
        assert TOKEN not in state and "host:1" in state
        again = DiLoCoCallback(**callback.state()["args"])  # what the Trainer does to go on
        assert again.options["token"] == TOKEN and TOKEN not in json.dumps(again.state())
    finally:
        DiLoCoCallback._tokens.clear()


# --- TLS -----------------------------------------------------------------------------------------


def test_a_server_is_known_by_its_fingerprint_or_authority(monkeypatch, certificates):
    one, other = certificates
    marks = [protocol.certificate_fingerprint(path) for path in certificates]
    with open(one + ".crt") as file:
        der = protocol.ssl.PEM_cert_to_DER_cert(file.read())
    assert marks[0] == hashlib.sha256(der).hexdigest()
    with door(monkeypatch, Guard("", protocol.server_context(one))) as (_, address):
        for tls in (marks[0], one + ".crt"):
            conn = connected(address, tls=tls)
            assert conn.request("echo").type == "echo" and conn.sock.version() == "TLSv1.3"
            conn.close()
        with pytest.raises(Refused, match=f"fingerprint {marks[0]}, not {marks[1]}") as refusal:
            connected(address, tls=marks[1])
        assert refusal.value.code == "tls"
        for tls in (other + ".crt", "1"):
            with pytest.raises(Refused, match="its certificate is not to be trusted"):
                connected(address, tls=tls)
        with pytest.raises(Refused, match="this server speaks TLS: use --tls-fingerprint"):
            connected(address)
        with pytest.raises(Refused, match=r"not to be trusted: .*localhost"):
            protocol.connect(f"localhost:{address[1]}", {}, access=Access("", one + ".crt"))
    with (
        door(monkeypatch) as (_, address),
        pytest.raises(Refused, match="speaks no TLS: start it with --tls-cert"),
    ):
        connected(address, tls=marks[0])


def test_access_from_arguments_and_environment(monkeypatch, certificates):
    mark = "ab" * 32
    assert Access.of().tls == Access.of(tls=False).tls == ""
    monkeypatch.setenv("DILOCO_TLS", ":".join(["AB"] * 32))
    assert Access.of().tls == Access.of(tls=mark.upper()).tls == mark
    assert Access.of(tls=False).tls == "" and Access.of(tls=True).tls == "1"
    monkeypatch.setenv("DILOCO_TLS", certificates[0] + ".crt")
    assert Access.of().tls == certificates[0] + ".crt"
    for wrong in ("ab" * 31, "no-such-file", __file__):
        with pytest.raises(ValueError, match=r"fingerprint|authority"):
            Access.of(tls=wrong)


def test_files_that_cannot_be_used_are_named(certificates, tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("")
    for flags, words in [
        (["--tls-cert", tmp_path / "none"], "No such file.*none"),
        (["--tls-cert", empty], "does not hold the key"),
        (["--tls-cert", certificates[0], "--tls-key", certificates[1]], "does not hold the key"),
        (["--tls-key", certificates[0]], "needs --tls-cert"),
        (["--token-file", tmp_path / "none"], "No such file.*none"),
        (["--token-file", empty], "is empty"),
    ]:
        with pytest.raises(SystemExit, match=words):
            server.guard_of(server.parse_args(["-m", "x", *map(str, flags)]))


def test_a_run_over_tls(serve, start, certificates, tmp_path):
    """Two workers train to the same bits through TLS, one with a fingerprint, one with a CA."""
    host = serve(
        "-n", 2, "--tls-cert", certificates[0], "--until-done", env={"DILOCO_TOKEN": TOKEN}
    )
    mark = host.wait_for("--tls-fingerprint ([0-9a-f]{64})")[1]
    toys = [
        start(os.path.join(ROOT, "tests", "toy_worker.py"), "--server", host.address,
              "--worker-id", name, "--steps=10", "--sync-every=5", "--sizes=64,256,64",
              env={"DILOCO_TOKEN": TOKEN, "DILOCO_TLS": tls})
        for name, tls in (("ada", mark), ("bob", certificates[0] + ".crt"))
    ]  # fmt: skip
    with socket.create_connection(("127.0.0.1", host.port)) as idle:
        first, second = map(result, toys)
        assert first["digest"] == second["digest"]
        assert host.wait() == 0 and idle.fileno() > 0
    assert "Traceback" not in host.output


def test_a_connection_over_tls_is_like_any_other(monkeypatch, certificates):
    """Large tensors, a silent peer, a hang-up from another thread, and the end of a peer."""
    import torch

    sent = torch.arange(1 << 18, dtype=torch.float32)
    specs, got = protocol.specs_of([("x", sent)]), torch.empty(1 << 18)

    def mirror(conn, message):
        conn.read(got)
        conn.send("mirror", {}, message.specs, [got])

    seen, asked = [], threading.Event()

    def wait(conn, message):
        seen.append(conn)
        asked.set()

    rooms = {"on_push": mirror, "on_wait": wait}  # a request that may carry tensors
    with door(monkeypatch, Guard("", protocol.server_context(certificates[0])), **rooms) as (
        _,
        address,
    ):
        mark = protocol.certificate_fingerprint(certificates[0])
        conn = connected(address, tls=mark)
        back = torch.empty(1 << 18)
        assert conn.request("push", {}, specs, [sent]).specs == specs
        conn.read(back)
        assert torch.equal(back, sent) and conn.bytes_out > sent.nbytes
        conn.send("wait")
        assert asked.wait(DEADLINE) and not seen[0].closed_by_peer() and not conn.closed_by_peer()
        conn.stall = 0.1
        with pytest.raises(ConnectionError, match="sent no byte for 0 s"):
            conn.receive(0.1)
        reading = background(lambda: conn.receive(DEADLINE))
        time.sleep(0.05)
        conn.hang_up()
        with pytest.raises(ConnectionError):
            reading.result(DEADLINE)
        until(seen[0].closed_by_peer, "the server sees the end")
        conn.close()


# --- The door ------------------------------------------------------------------------------------


def test_a_run_of_many_workers_reads_no_more_hellos_at_once():
    shell = SimpleNamespace(ended=None, args=SimpleNamespace(n=100))
    made = server.Door(shell, OPEN)
    assert made.reading.limit == 256 and made.ready.limit == 400  # the others wait unread


def test_the_largest_group_of_a_crowd_loses_its_oldest():
    crowd = server.Crowd(3)
    assert [crowd.add(one, one[0]) for one in ("a1", "b1", "b2")] == [None] * 3
    assert crowd.add("c1", "c") == "b1" and crowd.count == 3
    crowd.remove("a1", "a")
    assert crowd.count == 2 and sorted(crowd) == ["b2", "c1"]
    assert crowd.add("c2", "c") is None and crowd.add("d1", "d") == "c1"
    assert sorted(crowd) == ["b2", "c2", "d1"] and sorted(crowd.groups) == ["b", "c", "d"]


def test_a_pace_lets_a_burst_through_and_then_so_many_a_second(monkeypatch):
    clock = [50.0]
    monkeypatch.setattr(server, "now", lambda: clock[0])
    pace = server.Pace(rate=2, burst=3)
    assert [pace.count() for _ in range(6)] == [0, 0, 0, 0, 0.5, 1.0]
    assert pace.left() == 1.5  # until a seventh may come
    clock[0] += 1.5
    assert pace.left() == 0 and pace.count() == 0
    clock[0] += 60
    assert [pace.count() for _ in range(6)] == [0, 0, 0, 0, 0.5, 1.0]


def test_hellos_and_requests_of_strangers_keep_to_their_pace(monkeypatch):
    with door(monkeypatch) as (made, address):
        made.questions = server.Pace(0.001, 1)  # two pass, the third waits for 1,000 seconds
        with contextlib.closing(connected(address)) as conn:
            assert [conn.request("echo").type for _ in range(2)] == ["echo", "echo"]
            conn.send("echo")
            with pytest.raises(ConnectionError, match="sent no byte"):
                conn.receive(idle=0.5)
        made.hellos = server.Pace(0.001, 1)
        for _ in range(2):
            connected(address).close()
        with socket.create_connection(address) as sock:
            sock.sendall(b"x")
            until(lambda: made.ready.count == 1, "a visitor that is ready, and stays so")
            assert made.hellos.left() > 900


def test_a_trickled_hello_has_a_total_time(monkeypatch, certificates):
    monkeypatch.setattr(protocol, "HELLO_SECONDS", 0.6)

    def trickle(address, text):
        """Seconds until the server has had enough of a byte every 0.05 s."""
        with socket.create_connection(address) as sock:
            began = time.monotonic()
            sock.settimeout(0.05)
            for byte in text:
                try:
                    sock.sendall(bytes([byte]))
                    if not sock.recv(100):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
            return time.monotonic() - began

    hello = protocol.encode_header({"type": "hello", "x": "y" * 800}, [])
    guards = Guard(), Guard(TOKEN), Guard("", protocol.server_context(certificates[0]))
    for guard in guards:
        with door(monkeypatch, guard) as (made, address):
            text = hello if guard.context is None else b"\x16\x03\x01\x02\x00\x01" + bytes(300)
            assert trickle(address, text) < 10
            until(lambda made=made: made.strangers == 0, "all places are free")
    with door(monkeypatch, Guard(TOKEN)) as (_, address):  # the second half is in the same time
        peer = Raw(address)
        peer.hello()
        assert peer.hear() == {}
        peer.close()
    with door(monkeypatch) as (_, address), socket.create_connection(address) as silent:
        silent.settimeout(DEADLINE)
        assert silent.recv(1) == b""


def test_before_hello_a_kilobyte_is_read_and_no_payload(monkeypatch):
    with door(monkeypatch) as (_, address):
        for fields in ({"type": "hello", "x": "y" * 2048}, {"type": "hello", "worker": "w" * 2048}):
            peer = Raw(address)
            peer.sock.sendall(
                protocol.encode_header(fields, [])[:16]
            )  # what follows is not awaited
            assert "before the peer has said hello" in peer.hear()["message"]
            peer.close()
        peer = Raw(address)
        spec = protocol.TensorSpec("x", protocol.torch.uint8, (1 << 40,))
        fields = {"type": "hello", "protocol": protocol.PROTOCOL_VERSION}
        peer.sock.sendall(protocol.encode_header(fields, [spec]))
        assert "expected nothing" in peer.hear()["message"]
        peer.close()
        peer = Raw(address)  # who only looks gets no more room after hello
        peer.hello(who={})
        peer.sock.sendall((2048).to_bytes(8, "little"))
        assert peer.hear()["type"] == "error"
        peer.close()
        with pytest.raises(Refused, match="too long for a hello"):
            connected(address, {"worker": "名" * 250, "session": "s"})


def test_a_refused_peer_is_read_on_for_a_total_time(monkeypatch):
    monkeypatch.setattr(protocol, "REFUSED_SECONDS", 0.4)
    with door(monkeypatch) as (made, address), socket.create_connection(address) as sock:
        sock.sendall(b"\xff" * 8)

        def is_over():
            with contextlib.suppress(OSError):
                sock.sendall(b"x")
            time.sleep(0.05)
            return made.strangers == 0

        until(is_over, "the trickling peer is given up", 20)


def test_places_are_few_and_the_newest_of_a_crowd_comes_first(monkeypatch):
    with door(monkeypatch) as (made, address):
        slow = [Raw(address) for _ in range(100)]
        for peer in slow:
            peer.sock.sendall(b"\x40")
        until(lambda: made.reading.count == 32 and made.ready.count == 68, "the places are taken")
        elsewhere = Raw(address, source="127.0.0.2")  # another address has places of its own
        assert elsewhere.hello()["type"] == "hello"
        late = Raw(address)
        late.send("hello", protocol=protocol.PROTOCOL_VERSION)
        until(lambda: made.ready.count == 69, "one more is ready")
        [holder, *_] = made.reading
        port = holder.sock.getpeername()[1]
        next(peer for peer in slow if peer.sock.getsockname()[1] == port).close()
        assert late.hear()["type"] == "hello" and made.reading.count <= 32
        for peer in (*slow, elsewhere, late):
            peer.close()
        until(lambda: made.strangers == 0, "all have gone")
        assert not made.selector.get_map() or len(made.selector.get_map()) == 1


def test_fifty_at_once_from_one_address_all_get_in(monkeypatch):
    with door(monkeypatch, Guard(TOKEN)) as (_, address):

        def enter(k):
            conn = connected(address, {"worker": f"w{k}", "session": "s"}, token=TOKEN)
            assert conn.request("echo").type == "echo"
            return conn

        conns = [
            each.result(DEADLINE) for each in [background(lambda k=k: enter(k)) for k in range(50)]
        ]
        for conn in conns:
            conn.close()


def test_strangers_that_idle_make_room_for_others_and_never_for_a_member(monkeypatch):
    monkeypatch.setattr(server, "MAX_STRANGERS", 20)
    with door(monkeypatch) as (made, address):
        made.server.run.members["ada"] = SimpleNamespace(session="s1")
        member = connected(address)
        idle = [connected(address, {}) for _ in range(60)]
        until(lambda: made.idle.count == 20, "the first ones have gone")
        assert made.members.count == 1 and member.request("echo").type == "echo"
        assert idle[-1].request("echo").type == "echo"
        with pytest.raises(ConnectionError):
            idle[0].request("echo")
        false = connected(address, {"worker": "ada", "session": "another"})
        assert made.members.count == 1  # a name alone makes no member
        del made.server.run.members["ada"]
        assert member.request("echo").type == "echo"
        until(lambda: made.members.count == 0, "a former member is a stranger")
        monkeypatch.setattr(server, "STRANGER_SECONDS", 0.2)
        last = connected(address, {})
        with pytest.raises(ConnectionError):
            last.receive(DEADLINE)
        slow = Raw(address)  # half a request is none
        slow.hello(who={})
        slow.sock.sendall(b"\x40")
        assert slow.hear() == {}
        slow.close()
        for conn in (member, false, *idle):
            conn.close()


def test_the_door_survives_what_goes_wrong(monkeypatch):
    real, broken, tries = threading.Thread.start, threading.Event(), itertools.count()

    def start(thread):
        if broken.is_set() and thread._target.__name__ == "serve":
            raise RuntimeError(f"can't start new thread, {next(tries)}")  # another text each time
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with door(monkeypatch) as (made, address):
        broken.set()
        for _ in range(3):
            peer = Raw(address)
            assert peer.hello() == {}  # closed
            peer.close()
        broken.clear()
        conn = connected(address)
        assert conn.request("echo").type == "echo"
        conn.close()
        lines = [line for line in made.said_lines if "cannot be accepted" in line]
        assert len(lines) == 1 and "can't start new thread" in lines[0]


@pytest.mark.parametrize("asks", ["nothing", "token", "tls", "both"])
def test_garbage_before_hello_ends_no_thread_with_an_exception(monkeypatch, certificates, asks):
    context = protocol.server_context(certificates[0]) if asks in ("tls", "both") else None
    token = TOKEN if asks in ("token", "both") else ""
    faults, seed = [], random.Random(asks)
    monkeypatch.setattr(threading, "excepthook", faults.append)
    monkeypatch.setattr(protocol, "HELLO_SECONDS", 1.0)
    monkeypatch.setattr(protocol, "REFUSED_SECONDS", 0.2)
    hello = {"type": "hello", "protocol": protocol.PROTOCOL_VERSION, "nonce": "0" * 32}
    whole = protocol.encode_header(hello, [])
    odd = [{"nonce": 5}, {"nonce": "\n"}, {"nonce": "x" * 300}, {"worker": 7}, {"worker": "w"},
           {"worker": "w", "session": []}, {"protocol": "4"}, {"protocol": 1e9}, {"type": 4},
           {"worker": "w\0", "session": "s"}, {"type": "proof"}]  # fmt: skip
    starts = [
        whole,
        whole[:20],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x16",
        b"GET / HTTP/1.1",
    ]
    starts += [protocol.encode_header({**hello, **fields}, []) for fields in odd]
    with door(monkeypatch, Guard(token, context)) as (made, address):
        for k in range(150):
            with socket.create_connection(address) as sock, contextlib.suppress(OSError):
                sock.sendall(
                    starts[k % len(starts)] + seed.randbytes(seed.choice([0, 3, 40, 2000]))
                )
                if seed.random() < 0.3:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif seed.random() < 0.5:
                    sock.shutdown(socket.SHUT_WR)
        until(lambda: made.strangers == 0, "all have gone")
        mark = protocol.certificate_fingerprint(certificates[0]) if context else ""
        conn = connected(address, token=token, tls=mark)
        assert conn.request("echo").type == "echo"
        conn.close()
        until(lambda: made.strangers == 0, "nobody is left")
    assert not faults and not any("cannot be accepted" in line for line in made.said_lines)


def test_a_worker_joins_and_trains_among_three_hundred_idle_strangers(serve, toy):
    host = serve("-n", 1)
    address = "127.0.0.1", host.port
    strangers = [Raw(address) for _ in range(300)]
    for peer in strangers[:150]:
        peer.send("hello", protocol=protocol.PROTOCOL_VERSION)
    assert result(toy(host, "ada", steps=10, sync_every=5))["digest"]
    until(lambda: protocol.connect(host.address, {})[0].request("status").fields["strangers"] > 9,
          "status counts the strangers")  # fmt: skip
    for peer in strangers:
        peer.close()


def test_a_command_gets_the_token_and_a_dry_run_does_not_show_it(capsys, monkeypatch):
    got, mark = {}, "ab" * 32
    monkeypatch.setattr(worker.os, "execvpe", lambda file, command, env: got.update(env))
    flags = ["--server", "h:1", "--token", TOKEN, "--tls-fingerprint", mark]
    worker.main([*flags, "--dry-run", "--", "train"])
    assert capsys.readouterr().out == f"DILOCO_SERVER=h:1 DILOCO_TLS={mark} train\n"
    with monkeypatch.context() as patch:
        patch.setattr(worker.signal, "signal", lambda *args: None)
        worker.main([*flags, "--", "train"])
    assert (got["DILOCO_TOKEN"], got["DILOCO_TLS"]) == (TOKEN, mark)
    assert worker.main(["--tls-fingerprint", "abc", "--", "train"]) == 2
    assert status.main(["--tls-fingerprint", "abc"]) == 2
    assert capsys.readouterr().err.count("--tls-fingerprint is not a SHA-256") == 2
