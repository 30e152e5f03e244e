"""Reporting never breaks what it reports: the log of server, worker and callback, wherever it goes."""

import io
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import DEADLINE, ENV, until

import protocol
from diloco_callback import Link
from protocol import Faults, Log, quoted, shown


class Stream(io.StringIO):
    """A stdout that fails while `error` is set."""

    error = None

    def write(self, text):
        if self.error:
            raise self.error
        return super().write(text)


def streamed(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), BrokenPipeError(), ValueError("closed file"),
              RuntimeError("reentrant call")],
)  # fmt: skip
def test_a_log_that_fails_is_counted_and_said_when_it_works_again(monkeypatch, error):
    stream = streamed(monkeypatch)
    log = Log("stdout", "server: ")
    stream.error = error
    log("one")
    log("two")
    stream.error = None
    log("three")
    log("four")
    first, *rest = stream.getvalue().splitlines()
    assert first.startswith("server: 2 lines before this were lost: " + type(error).__name__)
    assert rest == ["server: three", "server: four"]


def test_there_may_be_no_output_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    Log("stdout")("a line")
    protocol.flush_output()


def test_what_cannot_be_encoded_is_shown_with_backslashes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Log("stdout")("Zoë-工作 \udc80")
    assert raw.getvalue() == b"Zo\\xeb-\\u5de5\\u4f5c \\udc80\n"


def test_a_reader_that_has_stopped_reading_stops_nobody(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream, os.fdopen(reading, "rb", 0) as reader:
        monkeypatch.setattr(sys, "stdout", stream)
        log = Log("stdout")
        for _ in range(200):
            log("." * 999)
        assert 100 < log.lost < 200
        while log.lost:
            reader.read(1 << 16)
            log("again")


def test_a_process_whose_output_is_a_full_disk_ends_with_its_own_status():
    code = (
        "import sys, protocol\n"
        "for name in ('stdout', 'stderr'):\n"
        "    for _ in range(1000): protocol.Log(name)('a line of some length')\n"
        "protocol.flush_output()\n"
        "sys.exit(7)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], env=ENV, stdout=full, stderr=full, timeout=DEADLINE
        )
    assert done.returncode == 7


def test_a_peers_text_is_a_plain_word_or_a_short_repr():
    assert shown("worker-0") == "worker-0" and shown("10.0.0.1:85") == "10.0.0.1:85"
    assert shown("a b") == "'a b'" and shown("") == "''" and shown("Zoë") == "'Zoë'"
    assert shown("\x1b[2J\nx") == r"'\x1b[2J\nx'"
    for text in ("x" * 81, "\n" * 60, "\U0010fff0" * 1_000_000):
        assert len(shown(text)) <= 80 and len(quoted(text)) <= 80 and shown(text).isprintable()
    assert len(quoted(list(range(1000)))) <= 80


def test_errors_about_long_names_are_short():
    name = "\U0010fff0" * 16000
    entry = {"dtype": name, "shape": [1], "data_offsets": [0, 4]}
    for broken in (5, entry, {**entry, "dtype": "F32", "shape": [9] * 32}):
        with pytest.raises(protocol.ProtocolError) as error:
            protocol.parse_entry(name, broken)
        assert len(str(error.value)) < 500
    spec = protocol.TensorSpec(name, torch.float32, (1,))
    assert len(protocol.explain_mismatch([spec], [])) < 500
    with pytest.raises(protocol.ProtocolError) as error:
        protocol.Message("join", {}, [spec]).expect([])
    assert len(str(error.value)) < 500


def test_ten_lines_a_second_of_what_peers_cause_and_the_rest_are_counted(monkeypatch):
    stream = streamed(monkeypatch)
    seconds = [100.0]
    monkeypatch.setattr(protocol.time, "monotonic", lambda: seconds[0])
    log = Log("stdout")
    for k in range(322):
        log.seldom("refusals", f"{k} is refused" + "." * 5000)
    assert len(stream.getvalue().splitlines()) == 10 and len(stream.getvalue()) < 5000
    log.settle()
    assert len(stream.getvalue().splitlines()) == 10  # the second is not over
    seconds[0] = 101.0
    log.settle()
    log.seldom("refusals", "one more")
    assert stream.getvalue().splitlines()[10:] == ["and 312 more refusals", "one more"]


def test_faults_are_survived_said_once_and_bounded(monkeypatch):
    stream = streamed(monkeypatch)
    faults, log = Faults(), Log("stdout")
    for _ in range(3):
        with faults.survive(log, "saving"):
            raise MemoryError("no room")
    assert len(faults) == 1 and faults[0].endswith("saving: MemoryError: no room")
    assert stream.getvalue().count("Traceback") == 1
    for k in range(50):
        faults.note(f"fault {k}")
    assert len(faults) == 20 and faults[-1].endswith("fault 49")


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch, capsys):
    link, done, start, fails = (
        Link("host:1", "ada", protocol.PLAIN),
        [],
        threading.Thread.start,
        [1, 1, 1],
    )

    def stubborn(thread):
        if fails:
            fails.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", stubborn)
    link.submit(lambda: done.append(1))
    until(lambda: done and not link.busy, "the task is done")
    link.submit(lambda: 1 / 0)
    link.interrupt()  # waits for no task that has failed
    assert not link.busy
    link.close("done", was_member=False)
    told = capsys.readouterr().err
    assert "can't start new thread; trying again" in told and "ZeroDivisionError" in told


def test_a_task_is_done_by_a_thread_that_rests_and_one_alone_stays():
    """Training would wait for a new thread to begin, which takes milliseconds where cores are busy."""
    link, seen, go = Link("host:1", "ada", protocol.PLAIN), [], threading.Event()

    def task():
        seen.append(threading.current_thread())
        go.wait()

    for _ in range(3):  # at the same time
        link.submit(task)
    until(lambda: len(seen) == 3, "three tasks")
    assert len({*seen}) == 3
    go.set()
    until(lambda: not link.busy, "no task is left")
    for k in range(4, 7):  # one after the other
        link.submit(task)
        until(lambda k=k: len(seen) == k and not link.busy, "a task")
    assert len({*seen[3:]}) == 1 and seen[3] in seen[:3]
    assert [thread for thread in {*seen} if thread in link.threads] == [seen[3]]
    link.close("done", was_member=False)
    assert not any(thread.is_alive() for thread in seen)
    link.submit(task)
    assert not link.busy  # a task that nobody does is not waited for


def test_the_heart_survives_any_exception(capsys):
    link, beats = Link("host:1", "ada", protocol.PLAIN), []

    class Control:
        class sock:
            @staticmethod
            def fileno():
                return 3

        @staticmethod
        def close():
            pass

    def beat(control):
        beats.append(1)
        raise ZeroDivisionError("a fault of ours")

    link.control = Control
    link.start_heart(0.01, beat)
    until(lambda: len(beats) > 2, "the heart beats on")
    link.closed.set()
    assert "heartbeat of ada failed" in capsys.readouterr().err
