"""The store: checkpoints that are whole, checked and in their order, on disks as they are."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import DEADLINE, ENV, ROOT, until
from peers import Peer, ask, background

import model as models
import protocol
import server
import worker
from protocol import Fate, ProtocolError, Refused, TensorSpec, Version
from server import GlobalModel, Store

OLD, NEW = Version("0" * 19 + "1", 7), Version("0" * 19 + "2", 3)
W = TensorSpec("w", torch.float32, (3, 4))
INT8 = "int8", "int8", True


def trained(seed=0, fragments=1):
    model = GlobalModel([W], [], fragments, *INT8)
    for k, vector in enumerate((model.params, model.outer["momentum"], model.outer["residual"])):
        vector.copy_(torch.randn(12, generator=torch.Generator().manual_seed(10 * seed + k)))
    return model


def state_of(version, count=1, **more):
    return {
        "run": OLD.life,
        "life": version.life,
        "step": 5,
        "shares": 8,
        "settings": dict(server.DEFAULTS),
        "heads": [(version, {"ada": Fate(4, "", version.number)})] * count,
        "members": ["ada"],
        "stopping": [],
        "indices": {"ada": 0},
        "sessions": {"ada": "one"},
        **more,
    }


def save(folder, version, seed=0, limit=3, **more):
    """Save a checkpoint; returns (the Store, its path)."""
    store, model = Store(str(folder), None, limit), trained(seed)
    store.save(state_of(version, **more), model, model.freeze())
    return store, folder / f"checkpoint-{version.number}"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rewrite(path, change, sums=False):
    """Change (fields, tensors) of a checkpoint's outer.safetensors, with or without its sums."""
    fields, tensors = protocol.load_file(path / "outer.safetensors")
    fields, tensors = change(fields, {name: t.clone() for name, t in tensors.items()})
    protocol.save_file(path / "outer.safetensors", tensors, fields)
    if sums:
        found = protocol.parse_json((path / protocol.SUMS).read_bytes(), "sums")
        found["outer.safetensors"] = protocol.sum_of_file(path / "outer.safetensors")
        (path / protocol.SUMS).write_text(json.dumps(found))


# --- Saving ---


def test_a_checkpoint_is_checked_against_its_sums(tmp_path):
    store, path = save(tmp_path / "m", OLD)
    assert not store.save_error
    state, model = server.load_checkpoint(str(path), *INT8)
    assert state["heads"] == [(OLD, {"ada": Fate(4, "", 7)})] and state["sessions"] == {
        "ada": "one"
    }
    assert torch.equal(model.outer["residual"], trained().outer["residual"])
    raw = (path / "model.safetensors").read_bytes()
    for place in (len(raw) - 1, len(raw) // 2, 9):
        flipped = bytearray(raw)
        flipped[place] ^= 1
        (path / "model.safetensors").write_bytes(flipped)
        with pytest.raises(ProtocolError, match=r"not as it was|tensor 'w'|not JSON"):
            server.load_checkpoint(str(path), *INT8)
    (path / "model.safetensors").write_bytes(raw)
    (path / protocol.SUMS).unlink()  # as an older version of the program wrote it
    assert server.load_checkpoint(str(path), *INT8)[0]["step"] == 5


@pytest.mark.parametrize("size", [0, 1, 8, 4 * protocol.CHUNK, 4 * protocol.CHUNK + 3])
def test_the_sum_of_a_file_tells_its_bytes_and_its_size(tmp_path, size):
    raw = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(raw[:size])
    (tmp_path / "b").write_bytes(raw[:size] + b"\0")
    assert protocol.sum_of_file(tmp_path / "a") == protocol.sum_of_file(tmp_path / "a")
    assert protocol.sum_of_file(tmp_path / "a") != protocol.sum_of_file(tmp_path / "b")
    assert protocol.sum_of_file(tmp_path / "a")[0] == size


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS])
def test_a_disk_that_cannot_sync_folders_is_no_failure(tmp_path, monkeypatch, number):
    def fsync(handle, real=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    store, path = save(tmp_path / "m", OLD)
    assert not store.save_error and server.load_checkpoint(str(path), *INT8)


def test_a_disk_that_fails_to_sync_is_a_failure(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    store, _ = save(tmp_path / "m", OLD)
    assert "Input/output error" in store.save_error and names(tmp_path / "m") == []


@pytest.mark.parametrize("at", ["write_vectors", "fsync", "rename"])
def test_what_was_there_stays_until_the_new_one_is_in_place(tmp_path, monkeypatch, at):
    store, path = save(tmp_path / "m", OLD)
    before, failed = (path / "model.safetensors").read_bytes(), []

    def fail(*args, **kwargs):
        failed.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    def rename(one, other, real=os.rename):
        return fail() if one.endswith(protocol.BESIDE) else real(one, other)

    place = server if at == "write_vectors" else os
    with monkeypatch.context() as patch:
        patch.setattr(place, at, rename if at == "rename" else fail)
        model = trained(1)
        later = state_of(Version(OLD.life, 7), heads=[(OLD, {}), (Version(OLD.life, 8), {})])
        store.save(later, model, model.freeze())
    assert failed and "No space" in store.save_error and names(tmp_path / "m") == [path.name]
    assert (path / "model.safetensors").read_bytes() == before
    store.save(later, model, model.freeze())  # the next save tries again
    assert not store.save_error and (path / "model.safetensors").read_bytes() != before


def test_after_a_crash_between_two_renames_the_old_one_is_found(tmp_path):
    _, path = save(tmp_path / "m", OLD)
    path.rename(tmp_path / "m" / ".checkpoint-7.old")
    [(age, found)] = protocol.checkpoints(str(tmp_path / "m"))
    assert age == (OLD.life, 7) and server.load_checkpoint(found, *INT8)
    save(tmp_path / "m", OLD)
    assert [path for _, path in protocol.checkpoints(str(tmp_path / "m"))] == [str(path)]


def test_numbers_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    store, _ = save(tmp_path / "m", OLD, limit=1)
    model = trained()
    model.outer["momentum"][3] = float("nan")
    store.save(state_of(Version(OLD.life, 8)), model, model.freeze())
    assert "not all finite" in store.save_error and names(tmp_path / "m") == ["checkpoint-7"]


def test_links_are_replaced_and_never_followed(tmp_path):
    folder, far = tmp_path / "m", tmp_path / "far"
    _, path = save(folder, OLD)
    shutil.move(path, far / "c")
    path.symlink_to(far / "c")
    (folder / protocol.BESIDE).symlink_to(far)
    (folder / f"model.safetensors.tmp-{os.getpid()}").symlink_to(far / "new")
    store, _ = save(folder, Version(OLD.life, 8), limit=1)  # prunes the linked one
    model = trained()
    store.save_final([OLD], model, model.freeze())
    assert not store.save_error and names(far) == ["c"] and len(names(far / "c")) == 3
    assert names(folder) == ["checkpoint-8", "model.safetensors"]


# --- Loading ---


BROKEN = {
    "momentum": lambda f, t: (f, {**t, "momentum": torch.zeros(5)}),
    "kind of momentum": lambda f, t: (f, {**t, "momentum": torch.zeros(12).double()}),
    "no momentum": lambda f, t: (f, {"residual": t["residual"]}),
    "not finite": lambda f, t: (f, {**t, "momentum": torch.full((12,), float("inf"))}),
    "residual": lambda f, t: (f, {**t, "residual": torch.zeros(13)}),
    "settings": lambda f, t: ({**f, "settings": []}, t),
    "a setting": lambda f, t: ({**f, "settings": {**f["settings"], "outer_lr": "high"}}, t),
    "momentum of 2": lambda f, t: ({**f, "settings": {**f["settings"], "outer_momentum": 2}}, t),
    "label": lambda f, t: ({**f, "fragments": [{"label": ["zz", 1], "folded": {}}]}, t),
    "folded": lambda f, t: ({**f, "fragments": [{**f["fragments"][0], "folded": 7}]}, t),
    "heads": lambda f, t: ({**f, "fragments": f["fragments"] * 3}, t),
    "no heads": lambda f, t: ({**f, "fragments": []}, t),
    "fragments": lambda f, t: ({**f, "num_fragments": "one"}, t),
    "indices": lambda f, t: ({**f, "indices": [], "members": 5}, t),
    "an index": lambda f, t: ({**f, "indices": {"ada": "first"}}, t),
    "step": lambda f, t: ({**f, "step": "many"}, t),
    "steps": lambda f, t: ({**f, "step": -1}, t),
    "shares": lambda f, t: ({**f, "shares": 0}, t),
    "life": lambda f, t: ({k: v for k, v in f.items() if k != "life"}, t),
    "early life": lambda f, t: ({**f, "life": "0" * 20}, t),
    "dtypes": lambda f, t: ({**f, "dtypes": {"w": "F99"}}, t),
    "names": lambda f, t: ({**f, "dtypes": {"v": "F32"}}, t),
    "buffers": lambda f, t: ({**f, "buffers": 9}, t),
    "frozen": lambda f, t: ({**f, "frozen": {"w": 5}}, t),
}


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_is_wrong_with_a_checkpoint_the_one_before_is_taken(tmp_path, capsys, name):
    save(tmp_path / "m", OLD)
    _, path = save(tmp_path / "m", Version(OLD.life, 9), seed=1)
    rewrite(path, BROKEN[name], sums=True)
    store = Store(str(tmp_path / "m"))
    state, model = store.open(*INT8)
    assert state["heads"][0][0] == OLD and torch.equal(model.params, trained().params)
    assert f"{path} is not usable, trying the one before" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["model.safetensors", "outer.safetensors", protocol.SUMS])
@pytest.mark.parametrize("size", [0, 5, 100, None])
def test_a_file_that_cannot_be_read_is_broken_and_not_foreign(tmp_path, capsys, file, size):
    folder = tmp_path / "m"
    _, path = save(folder, OLD)
    save(folder, Version(OLD.life, 9))
    broken = folder / "checkpoint-9"
    os.unlink(broken / file) if size is None else os.truncate(broken / file, size)
    assert protocol.foreign_weights(str(folder)) == []
    state, _ = Store(str(folder)).open(*INT8)
    was_lost = (file, size) == (protocol.SUMS, None)  # as if an older version had written it
    assert state["path"] == str(broken if was_lost else path)


def test_where_all_are_broken_that_is_an_error_and_no_fresh_start(tmp_path):
    folder = tmp_path / "m"
    for number in (7, 9):
        save(folder, Version(OLD.life, number))
        os.truncate(folder / f"checkpoint-{number}" / "outer.safetensors", 3)
    with pytest.raises(
        SystemExit, match=r"(?s)no checkpoint.*checkpoint-9.*checkpoint-7.*move them"
    ):
        Store(str(folder)).open(*INT8)
    assert len(names(folder)) == 2


def test_a_damaged_final_model_costs_nothing_while_there_are_checkpoints(tmp_path, capsys):
    store, path = save(tmp_path / "m", OLD)
    model = trained()
    store.save_final([OLD], model, model.freeze())
    os.truncate(tmp_path / "m" / "model.safetensors", 20)
    again = Store(str(tmp_path / "m"))
    assert again.output == str(tmp_path / "m") and again.open(*INT8)[0]["path"] == str(path)
    assert "going on with the checkpoints" in capsys.readouterr().out


def test_the_order_is_life_then_round_and_the_new_one_stays(tmp_path, capsys):
    folder = tmp_path / "m"
    for number in (45, 50, 55):
        save(folder, Version(OLD.life, number))
        os.truncate(folder / f"checkpoint-{number}" / "model.safetensors", 60)
    (folder / "checkpoint-99").mkdir()
    (folder / "checkpoint-99" / "outer.safetensors").write_bytes(b"")
    save(folder, NEW)
    assert protocol.checkpoints(str(folder))[0][0] == (NEW.life, 3)
    store, _ = save(folder, Version(NEW.life, 6), limit=1)
    assert not store.save_error and names(folder) == ["checkpoint-6"]


def test_a_life_sorts_after_all_that_it_has_heard_of(monkeypatch, tmp_path):
    monkeypatch.setattr(time, "time_ns", lambda: 0)  # the clock has gone back
    lives = ["0" * 20, "f" * 19 + "0", "0197" + "f" * 16]
    for life in lives:
        later = protocol.new_life(life)
        assert later > life and protocol.version_of([later, 2])
    folder = tmp_path / "m"
    save(folder, OLD)
    late = Version("0197" + "f" * 16, 2)
    _, path = save(folder, late)
    os.truncate(path / "model.safetensors", 60)  # of a life that only a damaged one tells of
    store = Store(str(folder))
    assert store.open(*INT8)[0]["life"] == OLD.life and store.latest_life == late.life


# --- Two servers, and disks that hang ---


def args(folder, *more):
    return server.parse_args(["-m", str(folder), *more])


def test_a_second_server_is_kept_off_the_folder(tmp_path):
    first = server.Server(args(tmp_path / "m"))
    with pytest.raises(SystemExit) as error:
        server.Server(args(tmp_path / "m"))
    host, pid = socket.gethostname(), os.getpid()
    assert f"in use by a server on host {host}, process {pid}" in str(error.value)
    first.store.guard.close()
    server.Server(args(tmp_path / "m")).store.guard.close()


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(protocol.fcntl, "flock", flock)
    server.Server(args(tmp_path / "m"))
    assert "cannot be locked against a second server" in capsys.readouterr().out


def test_a_disk_that_hangs_stops_no_tick_and_a_join_waits_for_the_names(tmp_path):
    running, hangs, free = server.Server(args(tmp_path / "m")), threading.Event(), threading.Event()

    def save_names(names):
        hangs.set()
        assert free.wait(DEADLINE)

    running.store.save_names = save_names
    with running.lock:
        running.run.stopping = {"ada"}
    job = running.clerk.write()
    assert hangs.wait(DEADLINE) and not job.done()
    for _ in range(3):
        running.look_after()
    running.clerk.settle(0.01)
    free.set()
    with running.lock:
        assert running.lock.wait_for(job.done, DEADLINE)


def test_a_line_about_a_round_is_whole_and_comes_later_where_the_disk_is_full(tmp_path):
    store, path = Store(str(tmp_path)), tmp_path / "rounds.jsonl"
    store.append_rounds([{"round": 1}])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        store.append_rounds([{"round": 2}])
        store.append_rounds([{"round": 3}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and "room for 5 bytes" in store.save_error
    store.append_rounds([{"round": 4}])
    lines = path.read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]
    assert not store.save_error and not store.journal.unwritten


def test_the_line_about_a_round_is_there_before_the_next_round_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "die", pytest.fail)
    running, seen = server.Server(args(tmp_path / "m")), []
    running.model, running.run.slices = trained(), [server.Slice(Version(OLD.life, 0))]
    running.clerk.write = lambda: None  # so that its lines stay
    push = server.Push(worker="ada", session="x", k=0, seq=1, base=Version(OLD.life, 0), steps=1)
    running.run.slices[0].pushes["ada", 1] = push
    closed = running.run.take(0, 1.0)
    running.rounds.turn = lambda: seen.extend(line["round"] for line in running.clerk.lines)
    running.rounds.fold(closed, running.model.announce(closed, 1))
    assert seen == [1] and running.run.slices[0].version.number == 1


def test_a_round_whose_thread_cannot_be_started_is_folded_later(tmp_path, monkeypatch):
    running, started = server.Server(args(tmp_path / "m")), []

    class Thread:
        fails = True

        def __init__(self, target, args, daemon):
            self.args = args

        def start(self):
            if Thread.fails:
                raise RuntimeError("can't start new thread")
            started.append(self.args)

    monkeypatch.setattr(server.threading, "Thread", Thread)
    running.rounds.unfolded.append(("round", "entry"))
    running.rounds.start_folds()
    assert not started and "can't start new thread" in running.status()["faults"][-1]
    Thread.fails = False
    running.look_after()
    assert started == [("round", "entry")]


# --- Workers ---


def output(folder):
    return worker.Output(folder)


def save_worker(folder, step, limit=2, more=lambda folder: None):
    config = models.Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=2)  # fmt: skip
    state = {"step": step, "source": "s", "data": {}, "optimizer": {}, "rng": torch.zeros(1),
             "cuda_rng": [], "callback": {}}  # fmt: skip
    out = output(folder)
    out.save_checkpoint(
        step, limit, models.Llama(config), models.descriptive_files(config), state, more
    )


def test_a_full_disk_under_a_worker_is_a_warning_and_the_last_checkpoint_stays(tmp_path, capsys):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_worker(tmp_path, 4)
    save_worker(tmp_path, 8, more=full)
    assert names(tmp_path) == ["step-4"] and "No space left" in capsys.readouterr().err
    save_worker(tmp_path, 4, more=full)  # the same step again
    assert worker.load_checkpoint(tmp_path / "step-4")["step"] == 4
    save_worker(tmp_path, 8)
    assert names(tmp_path) == ["step-4", "step-8"]
    taken = tmp_path / "file"
    taken.write_text("")
    out = worker.Output(tmp_path)
    out.folder = taken
    with pytest.raises(worker.RunError, match="cannot write the final model"):
        out.save_final(models.Llama(models.Config(vocab_size=16, hidden_size=8, intermediate_size=8,
                       num_hidden_layers=1, num_attention_heads=2)), {})  # fmt: skip


def test_a_worker_resumes_from_the_newest_sound_checkpoint(tmp_path, capsys):
    save_worker(tmp_path, 4)
    save_worker(tmp_path, 8)
    found = worker.checkpoints(tmp_path)
    with open(tmp_path / "step-8" / "trainer.pt", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    folder, state = worker.newest_checkpoint(found)
    assert folder.name == "step-4" and state["step"] == 4
    assert "step-8 is damaged" in capsys.readouterr().err
    (tmp_path / "step-4" / "model.safetensors").write_bytes(b"")
    with pytest.raises(worker.RunError, match=r"step-8 is damaged.*step-4 is damaged"):
        worker.newest_checkpoint(found)


# --- Ids ---


def test_a_process_that_has_ended_is_known_by_its_id_and_start():
    machine, pid, start = protocol.identity()
    assert machine and pid == os.getpid() and not protocol.has_ended(pid, start)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = protocol.started(child.pid)
    assert not protocol.has_ended(child.pid, start)
    assert protocol.has_ended(child.pid, start + 1)  # another one has its number
    child.kill()
    until(lambda: protocol.has_ended(child.pid, start), "a zombie counts as ended")
    child.communicate()
    assert protocol.has_ended(child.pid, start)


def joining(server, session, process, **fields):
    """A Peer "ada" that asks to join; (future of the reply, the `wait` messages so far)."""
    peer, heard = Peer(server, "ada", session=session), []
    return (
        peer,
        background(lambda: peer.join(on_wait=heard.append, process=process, **fields)),
        heard,
    )


def test_an_id_waits_for_its_process_and_is_refused_while_that_lives(serve):
    running = serve("-n", 1, "--worker-timeout", 1)
    first = Peer(running, "ada", session="one")
    first.join(process=["here", 1, 1])
    _, reply, heard = joining(running, "two", ["there", 2, 2])
    until(lambda: heard, "the newcomer is told to wait")
    assert "holds it until 1 s have passed" in heard[0]["awaited"] and "holder" not in heard[0]
    while not reply.done():
        first.heartbeat()
        time.sleep(0.1)
    with pytest.raises(Refused, match="'ada' is held by a live process"):
        reply.result()
    first.close()  # a cut line alone frees nothing, the timeout does
    _, reply, heard = joining(running, "three", ["there", 2, 2])
    until(lambda: heard, "the newcomer is told to wait")
    reply.result(DEADLINE)
    assert ask(running, "status")["workers"][0]["id"] == "ada"


def test_the_same_machine_frees_the_id_of_a_process_that_has_ended(serve):
    running = serve("-n", 1, "--worker-timeout", 60)
    first = Peer(running, "ada", session="one")
    first.join(process=["here", 1, 1])
    _, held, heard = joining(running, "two", ["here", 2, 2], ended=[1, 1])
    until(lambda: heard, "while the old line is there, a word is not enough")
    assert heard[0]["holder"] == [1, 1] and not held.done()
    first.close()
    held.result(DEADLINE)


def test_a_restarted_worker_has_its_id_back_at_once(serve):
    running = serve("-n", 1, "--worker-timeout", 120)
    command = [sys.executable, os.path.join(ROOT, "tests", "toy_worker.py")]
    command += ["--server", running.address, "--worker-id", "ada", "--steps=100000", "--pause=0.02"]
    for session in range(2):
        child = subprocess.Popen(
            command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        since = session
        until(lambda n=since: running.output.count("asks to join") > n, "it asks to join")
        until(lambda: ask(running, "status")["workers"], "it is a member")
        child.kill()
        child.wait()
    running.wait_for("the old process of ada has ended")


# --- A disk, or a processor, that takes its time --------------------------------------------------

SLOW = """
import os, sys, time
import server

def slowly(place, seconds):
    owner, name = place.split(".")
    owner = getattr(server, owner)
    real = getattr(owner, name)
    def slow(*given, **named):
        print(f"{name} begins", flush=True)
        time.sleep(seconds)
        return real(*given, **named)
    setattr(owner, name, slow)

for each in sys.argv.pop(1).split():
    place, _, seconds = each.partition("=")
    slowly(place, float(seconds))
os._exit(server.Server(server.parse_args()).serve())
"""


@pytest.fixture
def slow(start, tmp_path):
    """slow("Store.save=2", *args): a server of which some methods begin so many seconds later."""

    def run(methods, *args):
        options = ["-m", tmp_path / "model", "--port", 0, "--host", "127.0.0.1", "-n", 1, *args]
        made = start("-c", SLOW, methods, *options, cwd=ROOT)
        made.address = f"127.0.0.1:{made.wait_for(r'listening on port (.+);')[1]}"
        return made

    return run


def test_the_last_worker_may_leave_while_a_server_that_ends_is_saving(slow, tmp_path):
    host = slow("Store.save=2", "--save-every", 0)
    ada = Peer(host, "ada", torch.zeros(4), [["w", "F32", [4]]]).join()
    ada.push(torch.ones(4), closing=True)
    ask(host, "save")
    host.wait_for("save begins")
    host.signal(signal.SIGTERM)
    host.wait_for("stopping")
    ada.leave()
    assert host.wait() == 0, host.output
    assert (tmp_path / "model" / "model.safetensors").exists(), host.output


def test_who_has_uploaded_is_not_silent_while_the_server_takes_that_in(slow):
    host = slow("GlobalModel.take=3 Gate.admit=2.5", "--worker-timeout", 4)
    ada = Peer(host, "ada", torch.ones(4), [["w", "F32", [4]]]).join()
    assert ada.version.number == 0
    ada.leave()
    assert "waits to join no more" not in host.output
