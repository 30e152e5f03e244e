"""What a person sees of a worker: the live line of its terminal, progress, and a line on each round.

python -m pytest tests/test_live.py
"""

import http.server
import os
import re
import signal
import sys
import threading
import time

import pytest
import test_trainers
import torch
import yaml
from conftest import DEADLINE, ROOT, ending, until
from peers import Counter, Gate
from terminals import Terminal

import diloco_callback
import protocol
from protocol import Log, Progress, short, span

SMALL = {
    "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    "data": {"source": "builtin"},
    "train": {"max_steps": 100000, "context": 32, "batch_size": 2, "threads": 1},
    "diloco": {"sync_every": 10},
    "output": {"log_every": 50, "eval_every": 100000, "eval_tokens": 64},
}
# A whole line of a worker's log, from its beginning to its end.
WHOLE = re.compile(
    r"step \d+/\d+  loss \S+  lr \S+  \S+ tokens/s|diloco: ada is worker 0, .*version \d+"
    r"|diloco: ada: round \d+, step \d+( \| loss \S+)? \| synced in \S+ s( \| waited \S+ s for bob)?"
    r" \| up \S+ MB, down \S+ MB|diloco: and \d+ more rounds|worker 0 of 2: .*|stopping after .*|saved .*|diloco: ada waits for .*"
)


@pytest.fixture
def terminal():
    """terminal(*command, columns=80): a Terminal, which is ended with the test."""
    with ending(Terminal, Terminal.close) as run:
        yield run


def config(folder, **blocks):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({n: v | blocks.get(n, {}) for n, v in SMALL.items()}))
    return path


@pytest.fixture
def script():
    """script(host, name, path): the arguments of a worker.py."""

    def arguments(host, name, path):
        common = ["--server", host.address, "--worker-id", name, "--output-dir", path.parent / name]
        return [os.path.join(ROOT, "worker.py"), *common, path]

    return arguments


# --- The live line --------------------------------------------------------------------------------


def test_the_live_line_of_a_worker(serve, start, terminal, script, tmp_path):
    host, path = serve("-n", 2), config(tmp_path)
    ada = terminal(*script(host, "ada", path), columns=100)
    ada.wait_for(r"^step 0/100000  waiting for 1 more worker\(s\) to join$")
    bob = start(*script(host, "bob", path))
    training = (
        r"^step \d+/100000  [\d.,]+ steps/s  loss \d\.\d{4}  next sync in \d+ steps  ends in \d+"
    )
    ada.wait_for(training)
    bob.signal(signal.SIGSTOP)
    ada.wait_for(r"  waiting for bob, [\d.]+ s  ends in ")
    bob.signal(signal.SIGCONT)
    ada.wait_for(training)
    lines, _ = ada.drawn()
    assert any(re.search(r"\| waited \d+\.\d\d s for bob \|", line) for line in lines)

    before = len(ada.drawn()[1])
    ada.resize(40, 24)
    until(lambda: len(ada.drawn()[1]) > before + 20, "drawings in 40 columns")
    os.kill(ada.pid, signal.SIGTERM)
    ada.wait()
    lines, drawn = ada.drawn()
    assert ada.foot == "" and not ada.raw.endswith(drawn[-1].encode())  # nothing is left of it
    broken = [line for line in lines if not WHOLE.fullmatch(line)]
    assert not broken, broken
    assert max(map(len, drawn)) < 100 and max(map(len, drawn[before + 10 :])) < 40

    bob.signal(signal.SIGTERM)
    assert bob.wait() == 143
    raw = "\n".join(bob.lines)
    assert "\r" not in raw and "\033" not in raw and "steps/s" not in raw


def test_a_log_of_several_threads_keeps_clear_of_the_line(terminal, tmp_path):
    (tmp_path / "many.py").write_text(
        "import threading, protocol\n"
        "protocol.LOOK_SECONDS, counts = 0.001, [0]\n"
        "def status():\n"
        "    counts[0] += 1\n"
        "    return f'{counts[0]} ' + '\\u5de5' * 40\n"
        "protocol.live.open(status)\n"
        "def write(stream):\n"
        "    log = protocol.Log(stream, 'a log: ')\n"
        "    for k in range(300): log(f'line {k} <')\n"
        "threads = [threading.Thread(target=write, args=[s]) for s in ('stdout', 'stderr') * 2]\n"
        "for each in threads: each.start()\n"
        "for each in threads: each.join()\n"
        "while counts[0] < 50: pass\n"
        "protocol.live.close()\n"
        "print('the end')\n"
    )
    found = terminal(tmp_path / "many.py", columns=30)
    found.wait()
    lines, drawn = found.drawn()
    assert lines[-1] == "the end" and len(lines) == 1201
    assert sorted(lines[:-1]) == sorted([f"a log: line {k} <" for k in range(300)] * 4)
    assert {len(text) for text in drawn} <= {0, 29}


def test_no_line_where_there_is_no_terminal(start, tmp_path):
    (tmp_path / "plain.py").write_text(
        "import protocol\n"
        "protocol.live.open(lambda: 'never')\n"
        "assert protocol.live.status is None and protocol.live.thread is None\n"
        "protocol.Log('stdout')('a line')\n"
        "protocol.live.close()\n"
    )
    plain = start(tmp_path / "plain.py", fresh=True)
    assert plain.wait() == 0 and plain.output == "a line"


# --- Progress -------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch):
    """Progress is told of after a fifth of a second."""
    monkeypatch.setattr(protocol, "SHOW_SECONDS", 0.2)
    monkeypatch.setattr(protocol, "LOOK_SECONDS", 0.02)


def told(capfd, pattern, seen):
    """The match of a pattern with what was written to stderr by now."""
    seen.append(capfd.readouterr().err)
    return re.search(pattern, "".join(seen), re.MULTILINE)


def test_what_takes_long_is_told_at_first_seldom_and_at_its_end(capfd, monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(protocol.live, "start", lambda: None)  # the test looks itself
    monkeypatch.setattr(protocol.time, "monotonic", lambda: seconds[0])
    log, done = Log("stderr"), [0]
    with Progress(log, "uploading", 1_200_000_000, lambda: done[0]) as progress:
        for _ in range(1499):
            seconds[0] += 0.1
            done[0] += 800_000
            progress.look(False)
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"uploading: 1\d(\.\d)? of 1,200 MB, 8 MB/s, 2 min left", lines[0])
    assert re.fullmatch(r"uploading: 9\d(\.\d)? of 1,200 MB, 8 MB/s, 2 min left", lines[1])
    assert lines[-1] == "uploading took 2 min: 1,199 of 1,200 MB, 8 MB/s"
    assert len(lines) == 5 and not protocol.live.under_way


def test_what_is_quick_is_not_told(capfd):
    with Progress(Log("stderr"), "saving", 10, lambda: 5):
        pass
    assert capfd.readouterr().err == "" and protocol.live.under_way == {}


def test_a_progress_breaks_nothing(soon, capfd, monkeypatch):
    """Neither where nobody can say how far it is, nor where there is no thread for it; and what
    breaks within is raised."""
    log, seen = Log("stderr"), []
    with Progress(log, "one", 10, lambda: 1 / 0), Progress(log, "two", 0, lambda: 5e6):
        until(lambda: protocol.live.thread, "a thread looks")
        until(lambda: told(capfd, r"^two: 5 MB, [\d.]+ MB/s$", seen), "the other one is told")
    assert told(capfd, r"^two took .* s: 5 MB", seen)
    with pytest.raises(KeyError), Progress(log, "three", 10, lambda: 4):
        until(lambda: told(capfd, "^three: 4e-06 of 1e-05 MB", seen), "it has been told")
        raise KeyError
    assert told(capfd, "^three broke off after", seen)
    until(lambda: protocol.live.thread is None, "the thread has ended")

    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with Progress(log, "four", 10, lambda: 4):
        pass


def test_a_log_that_hangs_stops_no_block_and_no_other_log(capfd):
    """As where a terminal was stopped in the middle of a line."""
    holds, ends = threading.Event(), threading.Event()

    def hang():
        with protocol.live.aside(sys.stdout):
            holds.set()
            ends.wait(DEADLINE)

    thread = threading.Thread(target=hang)
    thread.start()
    holds.wait(DEADLINE)
    with Progress(None, "quick", 10, lambda: 4):
        Log("stderr")("a line")
        protocol.live.close()
    assert thread.is_alive() and capfd.readouterr().err == "a line\n"
    ends.set()
    thread.join(DEADLINE)


def test_numbers_and_times_are_short():
    assert [short(n) for n in (0, 0.0123, 1.5, 99.96, 1234.5)] == [
        "0",
        "0.0123",
        "1.5",
        "100",
        "1,234",
    ]
    assert [span(n) for n in (0.26, 9.99, 73, 600, 7200, 1e6)] == [
        "0.3 s", "10.0 s", "73 s", "10 min", "2 hours", "12 days"]  # fmt: skip


@pytest.mark.parametrize(("way", "size"), [("up", 3_000_000), ("down", 500_000)])
def test_a_sync_on_a_slow_link(serve, soon, capfd, way, size):
    """An upload is larger, as the system takes the first megabytes at once."""
    host = serve()
    gate = Gate(host)
    (gate.pushes if way == "up" else gate.pulls).append("slow")
    ada, seen, mb = Counter(gate, "ada", size=size, sync_every=1), [], size * 2e-6
    ada.step(1).stepped()
    ada.finish(0).result()
    assert told(capfd, rf"^diloco: sync, {way}: [\d.]+ of {mb:g} MB, \S+ MB/s, \S+ s left$", seen)
    line = rf"^diloco: ada: round 1, step 1 \| synced in .* up {mb:.2f} MB, down {mb:.2f} MB$"
    assert told(capfd, line, seen)


def test_a_model_that_goes_up_and_comes_down_a_slow_link(serve, soon, capfd):
    host = serve()
    gate, seen = Gate(host), []
    gate.is_narrow = True
    ada = Counter(gate, "ada", size=1_500_000, sync_every=1)
    until(ada.joined.is_set, "ada has joined")
    host.wait_for(r"^\S+ server: ada uploads the model: [\d.]+ of 6 MB, \S+ MB/s, \S+ s left$")
    host.wait_for(r"ada uploads the model took \S+ s: 6 MB, \S+ MB/s$")
    assert told(capfd, r"^diloco: uploading the model: [\d.]+ of 6 MB, \S+ MB/s, \S+ s left$", seen)
    assert told(capfd, r"^diloco: uploading the model took \S+ s: 6 MB, \S+ MB/s$", seen)
    assert told(capfd, r"^diloco: downloading the model: [\d.]+ of 6 MB", seen)
    ada.finish(0).result()


def test_streaming_transfers_that_nobody_waits_for_are_in_no_log(serve, soon, capfd):
    host = serve()
    gate, seen = Gate(host), []
    gate.pushes.append("slow")
    ada = Counter(gate, "ada", size=500_000, sync_every=4, num_fragments=2)
    ada.step(8).stepped()
    ada.finish(0).result()
    assert told(capfd, "^diloco: ada: round 1, step", seen)
    assert not told(capfd, "sync of slice", seen)


class Slowly(http.server.BaseHTTPRequestHandler):
    """A page of stories that comes in pieces, one each time that the test lets it."""

    def do_GET(self):
        body = f"Once there was a cat.{'<|endoftext|>'}\n".encode() * 3000
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:50000])
        self.server.may_go_on.wait(DEADLINE)
        self.wfile.write(body[50000:])

    def log_message(self, *_):
        """Keep the test's output readable."""


@pytest.fixture
def slow_site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slowly) as server:
        server.may_go_on = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.may_go_on.set()
        server.shutdown()


@pytest.mark.parametrize("where", ["a terminal", "a file"])
def test_a_download_of_data(slow_site, start, terminal, tmp_path, where):
    url = f"http://127.0.0.1:{slow_site.server_port}/tales.txt"
    data = {"source": "tinystories", "url": url, "cache_dir": str(tmp_path)}
    path = config(tmp_path, data=data, train={"max_steps": 2})
    command = [os.path.join(ROOT, "worker.py"), path, "--output-dir", tmp_path / "out"]
    text = r"^downloading tales\.txt: 0\.05 of 0\.105 MB, \S+ MB/s, \S+ s left$"
    if where == "a terminal":
        found = terminal(*command)
        found.wait_for(text)
        slow_site.may_go_on.set()
        found.wait()
        lines, _ = found.drawn()
    else:
        found = start(*command, fresh=True)
        found.wait_for(text)
        slow_site.may_go_on.set()
        assert found.wait() == 0
        lines = found.lines
    assert sum(line.startswith("downloading tales.txt took") for line in lines) == 1
    assert sum(bool(re.search(text, line)) for line in lines) == (where == "a file")
    assert lines[-1].startswith("the model is in")


def test_a_checkpoint_that_takes_long(soon, capfd, tmp_path):
    log, seen = Log("stderr"), []

    def fill(folder):
        with open(os.path.join(folder, "a"), "wb") as file:
            file.write(bytes(3_000_000))
        until(lambda: told(capfd, r"^saving step-7: 3 MB, \S+ MB/s$", seen), "it is told")

    protocol.save_folder(str(tmp_path / "step-7"), fill, log)
    assert told(capfd, r"^saving step-7 took \S+ s: ", seen)


# --- A line on each round -------------------------------------------------------------------------


def test_one_line_on_each_round_of_a_plain_loop(serve, capfd):
    host = serve()
    ada = Counter(host, "ada", sync_every=2)
    ada.worker.loss = 1.5
    ada.step(6).stepped()
    ada.finish(1).result()
    lines = [line for line in capfd.readouterr().err.splitlines() if ": round" in line]
    rounds = [
        re.fullmatch(WHOLE, line) and re.search(r"round (\d), step (\d)", line) for line in lines
    ]
    assert [found.groups() for found in rounds] == [("1", "2"), ("2", "4"), ("3", "6"), ("4", "7")]
    assert all("| loss 1.5000 |" in line for line in lines)


def test_one_line_on_each_round_of_all_slices(serve, capfd):
    host = serve()
    ada = Counter(host, "ada", sync_every=4, num_fragments=4, fragment_sync_delay=0)
    ada.step(8).stepped()
    ada.finish(0).result()
    text = capfd.readouterr().err
    assert re.findall(r"ada: round (\d), step (\d)", text)[:2] == [("1", "4"), ("2", "8")]


def test_many_rounds_a_second_are_counted(serve, capfd):
    host = serve()
    ada = Counter(host, "ada", sync_every=1)
    began = time.monotonic()
    ada.step(300).stepped()
    seconds = time.monotonic() - began
    ada.finish(0).result()
    assert capfd.readouterr().err.count(": round") <= 10 * (seconds + 3)


def test_the_trainers_printers_leave_the_metrics_out(start, serve, tmp_path):
    host = serve("--until-done")
    end = test_trainers.launch(start, host, tmp_path, "w0")
    told = test_trainers.result(end)
    printed = [line for line in end.lines[:-1] if line.startswith("{'loss'")]
    assert len(printed) == test_trainers.STEPS and not any("diloco/" in line for line in printed)
    assert all("diloco/local_step" in entry for entry in told["log"])
    assert len([line for line in end.lines if ": round" in line]) == 3


def test_a_text_of_the_server_is_printed_as_text(capfd):
    """What it says about whom it waits for, as every text of a peer."""
    model = torch.nn.Linear(2, 2)
    made = diloco_callback.DiLoCoWorker(
        model, torch.optim.SGD(model.parameters()), "host:1", worker_id="a"
    )
    made.leader.admission.say_awaited({"awaited": "\033[2Jbob" + "x" * 5000})
    made.replica.wait_for(0, {"awaited": ["\r"]})
    assert made.replica.waits_for.isprintable() and made.replica.waits_for.startswith("?[2Jbobx")
    assert "\033" not in capfd.readouterr().err
