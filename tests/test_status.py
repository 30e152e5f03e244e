"""status.py as its users run it.

python -m pytest tests/test_status.py
"""

import json
import os
import socket

from conftest import ROOT, until
from conftest import status as ask

import status as status_program


def run(start, *args, **options):
    process = start(os.path.join(ROOT, "status.py"), *args, **options)
    return process.wait(), process.output


def test_no_server_is_one_line_and_exit_code_1(start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        code, output = run(start, "--server", address, fresh=True)
    assert code == 1
    assert len(output.splitlines()) == 1 and "no DiLoCo server answers at 127.0.0.1:" in output


def test_a_peer_that_speaks_something_else_is_one_line_and_exit_code_1(start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = start(
            os.path.join(ROOT, "status.py"), "--server", f"127.0.0.1:{listener.getsockname()[1]}"
        )
        conn, _ = listener.accept()
        with conn:
            conn.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert process.wait() == 1
    assert len(process.lines) == 1 and "no DiLoCo server answers" in process.output


def test_waiting_running_and_stopped(start, serve, toy):
    server = serve("-n", 2)
    code, output = run(start, "--server", server.address)
    assert code == 0 and "waiting for workers" in output and "no workers" in output

    first = toy(server, "ada", steps=100000, sync_every=7, pause=0.001, source="noise")
    until(lambda: ask(server)["joining"] == ["ada"], "ada waits")
    code, output = run(start, "--server", server.address)
    assert "the run starts with 2 workers; there: ada" in output

    second = toy(server, "bob", steps=100000, sync_every=7, pause=0.001, source="noise")
    until(lambda: ask(server)["round"] >= 2, "two rounds")
    until(lambda: all(w["steps_per_second"] for w in ask(server)["workers"]), "heartbeats")
    code, output = run(start, "--server", server.address)
    assert code == 0
    for text in ("DiLoCo sync, running: round", "58 parameters", "ada", "bob", "data: noise",
                 "last round: waited", "lr 0.7, momentum 0.9 (warmed up), up bf16, down bf16"):  # fmt: skip
        assert text in output, output

    code, output = run(start, "--server", server.address, "--json")
    said = json.loads(output)
    assert code == 0
    assert [w["id"] for w in said["workers"]] == ["ada", "bob"]
    assert all(w["sync_every"] == 7 and w["loss"] > 0 for w in said["workers"])
    assert said["last_round"]["bytes_up"] == 2 * 58 * 2

    said["workers"][0] |= {"id": "n" * 120 + " é", "host": "h" * 200 + " x"}
    said["last_round"] |= {"norms": {"bob": 0.125}, "reasons": {"a b": "too \x1blarge"}}
    screen = status_program.render(said)
    assert not any("n" * 81 in line or "h" * 81 in line for line in screen)
    assert "norms of its pushes: bob 0.125" in screen
    assert "WARNING: 'a b': 'too \\x1blarge'" in screen

    assert run(start, "--server", server.address, "--save")[0] == 0
    server.wait_for(r"saved .*checkpoint-\d+")
    assert run(start, "--server", server.address, "--stop")[0] == 0
    assert first.wait() == 0 and second.wait() == 0
    server.wait_for("the model of round")


def test_it_says_who_is_waited_for(start, serve, toy):
    server = serve("-n", 2)
    toy(server, "ada", steps=1000, sync_every=5)
    toy(server, "bob", steps=1000, sync_every=5, pause=1000)
    until(lambda: ask(server)["awaited"] == ["bob"], "ada has pushed")
    assert "the round waits for: bob" in run(start, "--server", server.address)[1]
