"""How a worker's part ends, whatever ends it, and who has no part: forked processes and copies.

python -m pytest tests/test_callback_life.py

The server waits ten minutes for a worker that is silent, so what it hears of a worker's end it has
been told, or has seen from the connection. This file run as a script is somebody's training: see
PROGRAMS. Children that it forks end by themselves, should a test not get to end them.
"""

import contextlib
import copy
import json
import os
import pickle
import signal
import socket
import sys
import threading
import types

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import toy_worker
from conftest import status, until

from diloco_callback import DiLoCoCallback, DiLoCoWorker

SILENCE = ["--worker-timeout", 600]
CHILD_SECONDS = 120  # after which a forked child ends, come what may


# --- Somebody's training ------------------------------------------------------------------------


class Training:
    """A model, its optimizer and endless steps."""

    def __init__(self):
        self.model = toy_worker.build((5, 7, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.run = toy_worker.train(self.model, self.optimizer, 10**6, seed=0)

    def steps(self, count):
        for _ in range(count):
            next(self.run)

    def worker(self, server, name="a", sync_every=2, **options):
        return DiLoCoWorker(self.model, self.optimizer, server, sync_every, name, **options)


def say(*words):
    print(*words, flush=True)


def end(how):
    """What ends a training: an exception, or a signal that comes in the end."""
    if how == "raises":
        raise ValueError("the data\nran out")
    say("goes on")
    while True:
        signal.pause()


def loop(server, how, name="a"):
    """A plain loop."""
    training = Training()
    with training.worker(server, name):
        training.steps(3)
        end(how)


def trainer(server, how):
    """A trainer with the callback, whose train() is left by an exception."""
    training, callback = Training(), DiLoCoCallback(server, 2, "a")
    begin(callback, training)
    training.steps(3)
    end(how)


def lonely(server, name):
    """A loop whose every step waits for others."""
    training = Training()
    with training.worker(server, name, sync_every=1):
        say("trains")
        training.steps(10**6)


def notebook(server):
    """Something that lives on when joining is interrupted."""
    worker = Training().worker(server)  # which a notebook would keep
    with contextlib.suppress(KeyboardInterrupt):
        worker.start()
    end("caught")


class Inodes(torch.utils.data.Dataset):
    """Which of these files the process has open that is asked for an item."""

    def __init__(self, inodes):
        self.inodes = inodes

    def __len__(self):
        return 4

    def __getitem__(self, item):
        return torch.tensor([os.getpid(), len(self.inodes & open_inodes())])


def open_inodes():
    found = set()
    for number in range(256):
        with contextlib.suppress(OSError):
            found.add(os.fstat(number).st_ino)
    return found


def inodes_of(server):
    """Those of this process's connections to a server."""
    found, port = set(), int(server.rpartition(":")[2])
    for number in range(256):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as sock:
            if sock.getpeername()[1] == port:
                found.add(os.fstat(number).st_ino)
    return found


def loader(server):
    """A loop over a DataLoader that forks in each epoch; says how many of the worker's sockets were
    open, in it and in the others."""
    training, pids, seen = Training(), set(), []
    with training.worker(server) as worker:
        training.steps(2)  # from here on there is a connection for data too
        files = Inodes(inodes_of(server))
        own = len(files.inodes & open_inodes())
        for _ in range(2):
            batches = torch.utils.data.DataLoader(
                files, num_workers=1, multiprocessing_context="fork"
            )
            for pid, count in torch.cat(list(batches)).tolist():
                pids.add(pid)
                seen.append(count)
                training.steps(1)
    mine = os.getpid() in pids
    say(json.dumps({"own": own, "seen": seen, "mine": mine, "syncs": worker.sync_count}))


def fork(child):
    """A process that does what `child` does; its id."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_SECONDS)
        child()
    return pid


def forks(server):
    """A loop that forks children, each of which does with the worker what it should not."""
    training = Training()
    with training.worker(server) as worker:
        training.steps(2)
        for child in (
            sys.exit,  # through the block, and atexit
            lambda: training.steps(4),  # which would be two syncs
            lambda: worker.__exit__(None, None, None),
            lambda: worker.close("a child"),
        ):
            pid = fork(lambda child=child: (child(), sys.exit(0)))
            code = os.waitpid(pid, 0)[1]
            training.steps(2)
            say(f"child {code}, {worker.local_step} steps, {worker.sync_count} syncs")


def orphan(server):
    """A loop with a child that outlives it."""
    training = Training()
    with training.worker(server):
        training.steps(2)
        say(f"child {fork(signal.pause)}")
        end("killed")


PROGRAMS = (loop, trainer, lonely, notebook, loader, forks, orphan)


def begin(callback, training):
    state = types.SimpleNamespace(global_step=0, max_steps=0)
    given = {"model": training.model, "optimizer": training.optimizer}
    callback.on_train_begin(types.SimpleNamespace(), state, types.SimpleNamespace(), **given)
    return callback.worker


# --- The end of a training ----------------------------------------------------------------------


@pytest.fixture
def training(start):
    """training(program, server, *arguments): a process of this file."""

    def run(program, server, *arguments):
        return start(__file__, program.__name__, server.address, *arguments)

    return run


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DILOCO_")]:
        monkeypatch.delenv(name)


AT_EXIT = "the process ended after "
both_kinds = pytest.mark.parametrize(("program", "before"), [(loop, ""), (trainer, AT_EXIT)])


@both_kinds
def test_an_exception_ends_a_workers_part(serve, training, program, before):
    server = serve("-n", 1, *SILENCE)
    process = training(program, server, "raises")
    assert process.wait() == 1
    assert process.lines[-2:] == ["ValueError: the data", "ran out"]
    server.wait_for(f"a leaves: '{before}ValueError: the data ran out'$")


@both_kinds
def test_ctrl_c_ends_a_workers_part(serve, training, program, before):
    server = serve("-n", 1, *SILENCE)
    process = training(program, server, "waits")
    process.wait_for("^goes on")
    process.signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT
    server.wait_for(f"a leaves: '?{before}KeyboardInterrupt'?$")


def members(server):
    return [worker["id"] for worker in status(server)["workers"]]


def test_ctrl_c_ends_a_part_that_waits_for_others(serve, training):
    server = serve("-n", 2, *SILENCE)
    a, b = training(lonely, server, "a"), training(loop, server, "waits", "b")
    b.wait_for("^goes on")  # without a second push
    until(lambda: status(server)["awaited"] == ["b"], "a round that waits for b")
    a.signal(signal.SIGINT)
    assert a.wait() == -signal.SIGINT
    server.wait_for("a leaves: KeyboardInterrupt$")
    assert members(server) == ["b"]


def test_ctrl_c_while_a_run_is_waited_for_gives_the_name_back(serve, training):
    """Also where the process lives on, as a notebook does."""
    server = serve("-n", 2, *SILENCE)
    process = training(notebook, server)
    process.wait_for("a waits for")
    process.signal(signal.SIGINT)
    process.wait_for("^goes on")
    with contextlib.ExitStack() as stack:
        b = training(lonely, server, "b")
        worker = Training().worker(server.address).start()  # refused, were the name still taken
        stack.callback(worker.close)
        b.wait_for("^trains")
        assert members(server) == ["a", "b"]
    assert process.process.poll() is None


def test_training_that_begins_again_takes_the_place_of_the_one_that_broke(serve):
    server = serve("-n", 1, *SILENCE)
    callback = DiLoCoCallback(server.address, 2, "a")
    broken = Training()
    first = begin(callback, broken)
    broken.steps(3)
    again = Training()
    second = begin(callback, again)
    server.wait_for("a leaves: 'training begins anew'$")
    assert second is not first and members(server) == ["a"]
    broken.steps(2)  # is nobody's any more
    again.steps(2)
    assert (first.sync_count, second.sync_count) == (1, 1)
    callback.close()


# --- Forked processes ---------------------------------------------------------------------------


def assert_one_part(server, process):
    """One worker, from its only join to its end."""
    server.wait_for("a leaves: done$")
    assert sum("a leaves" in line for line in server.lines) == 1
    assert "joined again" not in process.output and "trying again" not in process.output


def test_a_data_loader_has_no_socket_of_the_worker(serve, training):
    server = serve("-n", 1, *SILENCE)
    process = training(loader, server)
    assert process.wait() == 0, process.output
    told = json.loads(process.lines[-1])
    assert told["own"] >= 2 and told["seen"] == [0] * 8 and not told["mine"]
    assert told["syncs"] == 6  # ten steps, and the closing round
    assert_one_part(server, process)


def test_whatever_a_forked_child_does_the_worker_goes_on(serve, training):
    server = serve("-n", 1, *SILENCE)
    process = training(forks, server)
    assert process.wait() == 0, process.output
    told = [line for line in process.lines if line.startswith("child")]
    assert told == [f"child 0, {4 + 2 * k} steps, {2 + k} syncs" for k in range(4)]
    assert_one_part(server, process)


def test_a_child_that_lives_on_does_not_hide_that_the_worker_died(serve, training):
    server = serve("-n", 1, "--worker-timeout", 30)
    process = training(orphan, server)
    child = int(process.wait_for(r"^child (\d+)")[1])
    try:
        process.wait_for("^goes on")
        process.process.kill()
        process.process.wait()
        worker = Training().worker(server.address).start()  # refused, were the connection open
        os.kill(child, 0)
        assert "is gone" not in server.output
        worker.close()
    finally:
        os.kill(child, signal.SIGKILL)


# --- Copies -------------------------------------------------------------------------------------

COPIES = {
    "pickle": lambda original: pickle.loads(pickle.dumps(original)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}
every_copy = pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)


@every_copy
def test_a_copy_before_training_has_the_options_and_the_progress(make):
    original = DiLoCoCallback("host:1", 7, "a", num_fragments=2, files={"config.json": "{}"})
    original.load_state_dict({"worker_id": "a", "step": 3}, "folder")
    twin = make(original)
    assert vars(twin) == vars(original) and twin.worker is None
    assert twin.state_dict() == {"worker_id": "a", "step": 3}
    assert twin.on_epoch_begin(None, None, None) is None
    assert not hasattr(twin, "no_such_attribute")


@every_copy
def test_a_copy_in_training_has_no_worker_and_can_go_on_later(serve, make):
    server, training = serve("-n", 1, *SILENCE), Training()
    callback = DiLoCoCallback(server.address, 2, "a")
    worker = begin(callback, training)
    training.steps(3)
    threads = {*threading.enumerate()}  # some of which may be about to end
    twin = make(callback)
    assert twin.worker is None and callback.worker is worker
    assert {*threading.enumerate()} <= threads
    assert twin.options == callback.options and twin.server == server.address
    assert twin.state_dict() == callback.state_dict() and twin.state_dict()["step"] == 3
    twin.close()
    assert members(server) == ["a"] and not worker.closed.is_set()
    callback.close()
    resumed = begin(twin, training)  # with the step that no push had carried yet
    assert resumed.kept_local and (resumed.step, resumed.steps) == (3, 1)
    training.steps(1)
    assert resumed.sync_count == 1
    twin.close()


def test_steps_of_a_copied_optimizer_are_not_the_workers(serve):
    server, training = serve("-n", 1, *SILENCE), Training()
    with training.worker(server.address) as worker:
        model, optimizer = copy.deepcopy((training.model, training.optimizer))
        model(torch.ones(5)).sum().backward()
        optimizer.step()
        assert worker.local_step == 0
        training.steps(1)
        assert worker.local_step == 1


# --- Importing ----------------------------------------------------------------------------------

IMPORT = """
import sys, threading, torch
made = []
sys.addaudithook(lambda event, _: made.append(event) if event.startswith("socket") else None)
threading.Thread.start = lambda thread: made.append(thread)
import diloco_callback
callback = diloco_callback.DiLoCoCallback("host:1")
model = torch.nn.Linear(2, 2)
diloco_callback.DiLoCoWorker(model, torch.optim.SGD(model.parameters()), "host:1", worker_id="a")
print(made, threading.active_count())
"""


def test_importing_starts_nothing_and_connects_to_nothing(start):
    process = start("-c", IMPORT, fresh=True)
    assert process.wait() == 0 and process.lines == ["[] 1"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    {program.__name__: program for program in PROGRAMS}[sys.argv[1]](*sys.argv[2:])
