"""Tests of diloco_callback.py: hooks, settings, resume, lost replies, mismatches, leaving.

python -m pytest tests/test_diloco_callback.py

The server is a real process; workers run in the test's own process, so that the tests can look at
them and hurt them. What a run should come to is worked out by `Outer` in conftest.py.
"""

import copy
import json
import os
import signal
import socket
import types

import pytest
import torch
import toy_worker
from conftest import DEADLINE, ROOT, ROUNDING, Outer, flat, put, result, rounded, status, until
from peers import Gate, background, numbers, same_bits, together
from safetensors.torch import load_file

import protocol
from diloco_callback import DiLoCoCallback, DiLoCoWorker, NotFinite, Slice
from protocol import CODECS, ProtocolError, Refused

METRICS = {"sync_count", "local_step", "last_sync_time", "total_sync_time", "last_send_mb",
           "last_recv_mb", "steps_per_second", "sync_every"}  # fmt: skip


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("DILOCO_SERVER", "DILOCO_SYNC_EVERY", "DILOCO_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr)


def joined(server, worker_id="a", sync_every=5, model=None, **options):
    """A model and a worker that has joined with it."""
    model = toy_worker.build((5, 7, 2)) if model is None else model
    worker = DiLoCoWorker(model, sgd(model), server.address, sync_every, worker_id, **options)
    return model, worker.start()


def train(model, optimizer, steps, seed=0, skip=0):
    for _ in toy_worker.train(model, optimizer, steps, seed, skip=skip):
        pass


def global_model(server):
    """The server's parameters, as a worker that joins gets them; and their version."""
    model, worker = joined(server, "onlooker")
    worker.close()
    return flat(model), worker.version


def expected(steps, sync_every=5, codec="bf16", seed=0):
    """A model after the run of one toy worker with plain SGD that was never disturbed."""
    model = toy_worker.build((5, 7, 2))
    outer, residual = Outer(flat(model), codec), torch.zeros(flat(model).numel())
    run = toy_worker.train(model, sgd(model), steps, seed)
    for count in [sync_every] * (steps // sync_every) + [steps % sync_every]:
        for _ in range(count):
            next(run)
        delta = outer.params - flat(model)
        if codec not in ROUNDING:
            delta = delta + residual
            residual = delta - rounded(delta, codec)
        delta = rounded(delta, codec)
        outer.step([delta] if count else [], closing=count < sync_every)
        put(model, outer.params)
    return outer.params


# --- Hooks and settings ------------------------------------------------------------------------


class Trainer:
    """The order in which trainers of this ecosystem call their callbacks."""

    def __init__(self, callback, max_steps, lr=0.05, says_stop=True, load_best=False, model=None):
        self.callback, self.says_stop = callback, says_stop
        self.model = model or toy_worker.build((5, 7, 2))
        self.optimizer = sgd(self.model, lr)
        self.args = types.SimpleNamespace(load_best_model_at_end=load_best)
        self.state = types.SimpleNamespace(max_steps=max_steps, global_step=0)
        self.control = types.SimpleNamespace(should_training_stop=False)
        self.logs = []

    def call(self, hook, **kwargs):
        hook = getattr(self.callback, hook)
        hook(
            self.args,
            self.state,
            self.control,
            model=self.model,
            optimizer=self.optimizer,
            **kwargs,
        )

    def train(self):
        self.call("on_train_begin")
        best = copy.deepcopy(self.model.state_dict())
        for loss in toy_worker.train(self.model, self.optimizer, self.state.max_steps, 0):
            self.state.global_step += 1
            if self.state.global_step == self.state.max_steps and self.says_stop:
                self.control.should_training_stop = True
            self.call("on_step_end")
            self.logs.append({"loss": loss})
            self.call("on_log", logs=self.logs[-1])
            if self.control.should_training_stop:
                break
        if self.args.load_best_model_at_end:
            self.model.load_state_dict(best)
            self.best = flat(self.model)
        self.call("on_train_end")
        return self


def test_standalone_does_nothing_and_says_so_once(capsys):
    callback = DiLoCoCallback()
    trainer = Trainer(callback, 7).train()
    Trainer(callback, 1).train()
    assert capsys.readouterr().err.count("standalone") == 1
    plain = toy_worker.build((5, 7, 2))
    train(plain, sgd(plain), 7)
    assert same_bits(flat(trainer.model), flat(plain))
    assert trainer.logs[0].keys() == {"loss"}
    assert callback.state_dict() == {} and callback.on_whatever_comes(1, two=3) is None
    with pytest.raises(AttributeError):
        _ = callback.whatever
    with pytest.raises(ValueError, match="DILOCO_SERVER"):
        DiLoCoWorker(plain, sgd(plain))


def test_arguments_beat_the_environment_beats_defaults(monkeypatch):
    model = toy_worker.build((5, 7, 2))
    worker = DiLoCoWorker(model, sgd(model), "host:1")
    assert worker.sync_every == 500 and worker.worker_id.startswith(socket.gethostname())
    for name, value in {"SERVER": "env:2", "SYNC_EVERY": "7", "WORKER_ID": "env"}.items():
        monkeypatch.setenv(f"DILOCO_{name}", value)
    worker = DiLoCoWorker(model, sgd(model))
    assert (worker.server, worker.sync_every, worker.worker_id) == ("env:2", 7, "env")
    worker = DiLoCoWorker(model, sgd(model), "arg:3", 9, "arg")
    assert (worker.server, worker.sync_every, worker.worker_id) == ("arg:3", 9, "arg")
    assert DiLoCoCallback().server == "env:2" and DiLoCoCallback("arg:3").server == "arg:3"
    with pytest.raises(ValueError, match="sync_every"):
        DiLoCoWorker(model, sgd(model), sync_every=-1)


@pytest.mark.parametrize("says_stop", [True, False])
def test_a_trainer_ends_with_the_global_model(serve, says_stop):
    host = serve("--until-done")
    callback = DiLoCoCallback(host.address, 5, "a")
    trainer = Trainer(callback, 13, says_stop=says_stop).train()
    assert host.wait() == 0
    assert same_bits(flat(trainer.model), expected(13))
    assert callback.worker.sync_count == 3 and callback.worker.version[1] == 3
    assert {f"diloco/{name}" for name in METRICS} <= trainer.logs[0].keys()  # later: the changed
    assert trainer.logs[-1]["diloco/local_step"] == 13
    assert all(isinstance(value, int | float) for value in trainer.logs[-1].values())
    state = json.loads(json.dumps(callback.state_dict()))
    assert state["step"] == 13
    again = DiLoCoCallback()
    again.load_state_dict(state)
    assert again.state_dict() == state


@pytest.mark.parametrize("says_stop", [True, False])
def test_the_best_checkpoint_is_not_overwritten(serve, says_stop):
    host = serve()
    trainer = Trainer(DiLoCoCallback(host.address, 5), 13, says_stop=says_stop, load_best=True)
    trainer.train()
    assert same_bits(flat(trainer.model), trainer.best)
    params, version = global_model(host)
    assert version[1] == (3 if says_stop else 2)
    assert same_bits(params, expected(13 if says_stop else 10))


# --- What is synchronized ----------------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.frozen = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)


class Clash(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module, self.weight = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(3))


def test_names_ties_and_wrappers(serve):
    host = serve()
    model = Tied()
    wrapped = types.SimpleNamespace(optimizer=types.SimpleNamespace(optimizer=sgd(model)))
    with DiLoCoWorker(model, wrapped, host.address, 1, "a") as worker:
        assert worker.trained.optimizers[-1] is wrapped.optimizer.optimizer
        assert status(host)["parameters"] == 24
        compiled = torch.compile(copy.deepcopy(model))
        for other in (compiled, torch.nn.ModuleDict({"module": compiled})):
            with pytest.raises(Refused, match="worker id"):  # its names fit: only the id does not
                DiLoCoWorker(other, sgd(other), host.address, 1, "a").start()
        before = model.embed.weight.detach().clone()
        model.embed.weight.grad = torch.ones_like(model.embed.weight)
        wrapped.optimizer.optimizer.step()
        assert worker.sync_count == 1 and not torch.equal(model.embed.weight, before)
        assert model.head.weight is model.embed.weight
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        DiLoCoWorker(frozen, sgd(frozen), "host:1")


def test_no_parameter_is_lost_to_a_clash_of_names():
    model = Clash()
    assert len(DiLoCoWorker(model, sgd(model), "host:1").trained.named) == 3


def test_no_training_in_bfloat16_is_a_difference_of_zero(serve, tmp_path):
    host = serve("--upload-codec", "fp32", "--download-codec", "fp32")
    model, worker = joined(host, model=toy_worker.build((5, 7, 2), "bfloat16"), sync_every=3)
    train(model, worker.trained.optimizers[-1], 6)
    worker.trained.optimizers[-1].param_groups[0]["lr"] = 0.0
    train(model, worker.trained.optimizers[-1], 3)
    assert worker.sync_count == 3
    rounding = worker.slices[0].anchor - worker.slices[0].anchor.bfloat16().float()
    worker.close()
    assert rounding.abs().max() > 0  # the anchor is finer than the parameters
    path = tmp_path / "model" / "rounds.jsonl"
    lines = until(lambda: len(path.read_text().splitlines()) == 3 and path.read_text(), "3 lines")
    norms = [json.loads(line)["norm"] for line in lines.splitlines()]
    assert norms[0] > 0 and norms[2] == 0.0


# --- Faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["no reply", "half a reply"])
def test_a_push_whose_reply_is_lost_counts_once(serve, tmp_path, fault):
    """Of the push, or of the pull after it."""
    ends = []
    for faults in (0, 3):
        host = serve("-m", tmp_path / f"model{faults}")
        gate = Gate(host)
        model, worker = joined(gate)
        for seed in range(5):
            if faults and seed in (1, 2, 4):
                (gate.pushes if fault == "no reply" else gate.pulls).append(fault)
            train(model, worker.trained.optimizers[-1], 5, seed)
        assert gate.met == [fault] * faults
        worker.flush()
        worker.close()
        ends.append((toy_worker.digest(model), worker.version[1], worker.replica.mismatches))
    assert ends[0] == ends[1] == (ends[0][0], 6, 0)


def test_a_replica_that_differs_is_fetched_in_full_and_counted(serve):
    host = serve()
    model, worker = joined(host)
    train(model, worker.trained.optimizers[-1], 5)
    worker.slices[0].anchor[3] += 1
    train(model, worker.trained.optimizers[-1], 5)
    assert worker.replica.mismatches == worker.metrics()["diloco/mismatches"] == 1
    train(model, worker.trained.optimizers[-1], 5)
    assert worker.replica.mismatches == 1
    params, version = global_model(host)
    assert same_bits(flat(model), params) and version == worker.version
    worker.close()


def test_a_sync_that_fails_leaves_everything_as_it_was(serve, capsys):
    """The step that cannot sync waits for reconnect_timeout, then goes on; so do later ones, which
    wait no more, and the end says what has not been sent."""
    host = serve()
    model, worker = joined(host, reconnect_timeout=1.0)
    train(model, worker.trained.optimizers[-1], 5)
    train(model, worker.trained.optimizers[-1], 4)
    anchor = worker.slices[0].anchor.clone()
    host.kill()
    twin = copy.deepcopy(model)
    optimizer = sgd(twin)
    optimizer.load_state_dict(worker.trained.optimizers[-1].state_dict())
    train(model, worker.trained.optimizers[-1], 1)
    train(twin, optimizer, 1)
    assert "trains on without the server" in capsys.readouterr().err
    assert same_bits(flat(model), flat(twin))
    assert same_bits(worker.slices[0].anchor, anchor)
    assert worker.version[1] == 1
    train(model, worker.trained.optimizers[-1], 7)
    train(twin, optimizer, 7)
    assert same_bits(flat(model), flat(twin))
    assert "trains on" not in capsys.readouterr().err
    with pytest.raises(ConnectionError, match="12 steps of a have not been sent"):
        worker.flush()
    worker.close()


def test_an_exit_that_cannot_flush_still_closes_the_worker(serve):
    host = serve()
    model, worker = joined(host, reconnect_timeout=0.5)
    worker.close()
    worker = DiLoCoWorker(model, sgd(model), host.address, 5, "a", reconnect_timeout=0.5)
    with pytest.raises(ConnectionError), worker:
        host.kill()
    assert worker.closed.is_set()


def test_an_exception_leaves_at_once_without_a_flush(serve):
    host = serve()
    model = toy_worker.build((5, 7, 2))
    with (
        pytest.raises(KeyError),
        DiLoCoWorker(model, sgd(model), host.address, 5, "a") as worker,
    ):
        train(model, worker.trained.optimizers[-1], 8)
        local = flat(model)
        raise KeyError("oops")
    host.wait_for("a leaves: .KeyError.*oops")
    assert worker.version[1] == 1 and status(host)["round"] == 1 and not status(host)["workers"]
    assert same_bits(flat(model), local)
    train(model, worker.trained.optimizers[-1], 5)  # the optimizer is no longer hooked
    assert worker.sync_count == 1


def test_a_process_that_ends_has_left(serve, start):
    host = serve("--until-done")
    code = f"""
import sys; sys.path.insert(0, {os.path.join(ROOT, "tests")!r})
import toy_worker, torch
from diloco_callback import DiLoCoWorker
model = toy_worker.build((5, 7, 2))
DiLoCoWorker(model, torch.optim.SGD(model.parameters(), lr=0.1), {host.address!r}, 5, "a").start()
"""
    assert start("-c", code).wait() == 0
    host.wait_for("a leaves: 'the process ended")
    assert host.wait() == 0


def test_a_loss_or_gradient_that_is_not_finite_costs_one_round_and_three_are_an_error(serve, toy):
    host = serve("-n", 2, "--until-done")
    w0 = toy(host, "w0", seed=1, steps=25)
    w1 = toy(host, "w1", seed=2, steps=25, nan_at="4,9,14")  # the last step of three rounds
    assert w1.wait() == 1 and "FloatingPointError" in w1.output and "3 times" in w1.output
    assert result(w0)["version"][1] == 6
    assert host.wait() == 0


def test_training_goes_on_after_one_round_whose_loss_is_not_a_number(serve, toy):
    host = serve("-n", 2, "--until-done")
    w0 = toy(host, "w0", seed=1, steps=20)
    w1 = toy(host, "w1", seed=2, steps=20, nan_at="6")  # the losses of steps 7 to 9 are NaN
    ends = [result(w1), result(w0)]
    assert ends[0]["metrics"]["diloco/dropped_steps"] == 5
    assert ends[0]["digest"] == ends[1]["digest"]
    assert host.wait() == 0


# --- Resume --------------------------------------------------------------------------------------


def test_a_worker_that_comes_back_keeps_its_steps_while_the_round_is_the_same(serve):
    codec = ("--upload-codec", "fp32", "--download-codec", "fp32")
    host = serve(*codec)
    model, worker = joined(host)
    train(model, worker.trained.optimizers[-1], 7)
    state = json.loads(json.dumps(worker.state_dict()))
    saved = copy.deepcopy(model.state_dict())
    worker.close("crashed")

    back = toy_worker.build((5, 7, 2))
    back.load_state_dict(saved)
    _, worker = joined(host, None, model=back, state=state)
    assert worker.kept_local and same_bits(flat(back), flat(model))
    assert (worker.worker_id, worker.step, worker.steps, worker.schedule.position) == ("a", 7, 2, 2)
    train(back, worker.trained.optimizers[-1], 6, skip=7)
    worker.flush()
    worker.close()
    assert same_bits(flat(back), expected(13, codec="fp32"))

    late = toy_worker.build((5, 7, 2))  # the server has moved on since `state`
    late.load_state_dict(saved)
    _, worker = joined(host, None, model=late, state=state)
    assert not worker.kept_local and same_bits(flat(late), flat(back))
    assert worker.steps == 0
    worker.close()


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_what_rounding_lost_survives_a_checkpoint(serve, tmp_path, capsys, codec):
    host = serve("--upload-codec", codec, "--download-codec", codec)
    model, worker = joined(host)
    train(model, worker.trained.optimizers[-1], 7)
    state, path = json.loads(json.dumps(worker.state_dict())), tmp_path / "residual.safetensors"
    worker.save_residual(path)
    assert same_bits(load_file(path)["residual.0"], worker.residual()["residual.0"])
    saved = copy.deepcopy(model.state_dict())
    worker.close("crashed")

    back = toy_worker.build((5, 7, 2))
    back.load_state_dict(saved)
    _, worker = joined(host, None, model=back, state=state, residual=str(path))
    assert "no residual" not in capsys.readouterr().err
    train(back, worker.trained.optimizers[-1], 6, skip=7)
    worker.flush()
    worker.close()
    assert same_bits(flat(back), expected(13, codec=codec))

    late = toy_worker.build((5, 7, 2))
    _, worker = joined(host, None, model=late, state=state, residual=str(tmp_path / "none"))
    worker.close()
    assert "no residual beside the checkpoint" in capsys.readouterr().err


def test_a_trainers_checkpoint_gets_the_residual(serve, tmp_path):
    host = serve("--upload-codec", "int8")
    model = toy_worker.build((5, 7, 2))
    callback = DiLoCoCallback(host.address, 5, "a")
    args = types.SimpleNamespace(output_dir=str(tmp_path))
    state = types.SimpleNamespace(global_step=0, max_steps=0)
    callback.on_train_begin(args, state, None, model=model, optimizer=sgd(model))
    train(model, callback.worker.trained.optimizers[-1], 7)
    state.global_step = 7
    (tmp_path / "checkpoint-7").mkdir()
    callback.on_save(args, state, None)
    (held,) = callback.worker.residual().values()
    again = DiLoCoCallback(host.address, 5)
    again.load_state_dict(callback.state_dict())
    callback.close()
    back = toy_worker.build((5, 7, 2))
    again.on_train_begin(args, state, None, model=back, optimizer=sgd(back))
    assert held.any() and same_bits(again.worker.residual()["residual.0"], held)
    again.close()


def test_a_worker_that_was_given_up_joins_again_with_its_work(serve):
    host = serve("--worker-timeout", 1)
    gate = Gate(host)
    model, worker = joined(gate)
    gate.close()  # no heartbeat gets out
    train(model, worker.trained.optimizers[-1], 3)
    host.wait_for("a is gone")
    gate.open = True
    train(model, worker.trained.optimizers[-1], 2, seed=1)
    assert worker.version[1] == 1 and worker.sync_count == 1 and worker.joins == 2
    twin = toy_worker.build((5, 7, 2))
    outer, optimizer = Outer(flat(twin)), sgd(twin)
    train(twin, optimizer, 3)
    train(twin, optimizer, 2, seed=1)
    outer.step([(outer.params - flat(twin)).bfloat16()])
    assert same_bits(flat(model), outer.params)
    worker.close()


# --- Faults in the middle of something -----------------------------------------------------------


def test_a_push_that_is_not_finite_halfway_leaves_the_residual_also_after_a_prediction():
    local = torch.randn(protocol.CHUNK + 4)
    codecs = CODECS["bf16"], CODECS["bf16"]
    slice = Slice(protocol.FlatModel([local]), *codecs, has_residual=True, predicts=True)
    slice.outer = 0.7, 0.9, True, 1.0
    slice.residual.copy_(torch.randn(len(local)) / 1000)
    before = slice.residual.clone()
    local[-1] = float("nan")
    slice.begin(has_numbers=True, goes_on=True)
    with pytest.raises(NotFinite):
        list(slice.pieces())
    assert slice.is_empty and (slice.residual - before).abs().max() < 1e-5


def test_the_size_of_the_pieces_that_training_works_on_changes_no_bit(monkeypatch):
    """Training predicts in small pieces, and the thread that sends does it again in large ones."""
    found = []
    for tile in (protocol.CHUNK, 64):
        monkeypatch.setattr(protocol, "TILE", tile)
        local, other = numbers(0, 5000), numbers(1, 3000).bfloat16()
        codecs = CODECS["bf16"], CODECS["bf16"]
        slice = Slice(protocol.FlatModel([local, other], 1, 2), *codecs, predicts=True)
        assert (len([*slice.tiles()]) > 1) == (tile == 64)
        slice.outer = 0.7, 0.9, True, 1.0
        slice.anchor.copy_(numbers(2, slice.size))
        slice.velocity.copy_(numbers(3, slice.size))
        slice.begin(has_numbers=True, goes_on=True)
        slice.finish_encoding()
        ahead, mark = torch.empty(2, slice.size)
        slice.flat.read(0, ahead)
        assert same_bits(slice.mark, ahead)  # training goes on from the mark
        mark.copy_(slice.mark)
        local.add_(0.1)
        slice.anchor.add_(numbers(4, slice.size))
        assert slice.adopt()
        found.append([ahead, mark, local, other.float(), slice.payload.raw])
    assert all(same_bits(*pair) for pair in zip(*found, strict=True))


def test_an_encoding_that_fails_within_a_chunk_goes_on_where_it_was(monkeypatch):
    local, residual = torch.randn(protocol.TILE * 2 + 4), torch.randn(protocol.TILE * 2 + 4) / 1000
    codec, failing = CODECS["bf16"], []

    def encode(self, numbers, tensors, start):
        if start == protocol.TILE and not failing:
            failing.append(start)
            raise MemoryError
        tensors["values"][start : start + len(numbers)].copy_(numbers)

    monkeypatch.setattr(protocol.Cast, "encode", encode)
    slice = Slice(protocol.FlatModel([local]), codec, codec, has_residual=True)
    slice.residual.copy_(residual)
    slice.begin(has_numbers=True, goes_on=False)
    with pytest.raises(MemoryError):
        list(slice.pieces())
    assert len(list(slice.pieces())) == 1
    sent = (residual - local).bfloat16()
    assert same_bits(slice.payload.tensors["values"], sent)
    assert same_bits(slice.residual, (residual - local) - sent.float())


def test_numbers_of_an_entry_that_are_not_finite_are_not_added():
    local = torch.randn(protocol.TILE + 4)
    slice = Slice(protocol.FlatModel([local]), CODECS["bf16"], CODECS["bf16"])
    slice.update.tensors["values"][protocol.TILE] = torch.nan
    with pytest.raises(ProtocolError, match="not finite"):
        slice.take(moves=True)
    assert not slice.anchor.any() and local.isfinite().all()


def test_steps_that_are_not_finite_are_counted_once_in_every_slice(serve):
    model, worker = joined(serve(), num_fragments=2, sync_every=2, fragment_sync_delay=2)
    worker.replica.kick = lambda: None  # nothing is sent, and so nothing is encoded
    for _ in range(2):
        put(model, torch.full_like(flat(model), float("nan")))
        worker.optimizer.step()
    first, second = (place.pending for place in worker.outbox.places)
    assert (first.steps, second.steps) == (1, 2)
    given_up = []
    worker.replica.audit = lambda event, **facts: given_up.append(
        (event, facts["fragment"], facts["last"] - facts["first"])
    )
    worker.replica.slices[0].finish_encoding()
    worker.replica.broken += [first, second]
    worker.leader.heed_replica()
    assert sorted(given_up) == [("dropped", 0, 1), ("dropped", 0, 1), ("dropped", 1, 2)]
    assert worker.dropped_steps == 2 and worker.leader.refusals == 1
    worker.close()


def test_a_catching_up_that_fails_leaves_no_mark_for_the_next_push(serve, monkeypatch):
    model, worker = joined(serve())
    train(model, worker.optimizer, 3)
    before = flat(model)

    def fail(*args):
        raise ConnectionError("cut")

    monkeypatch.setattr(worker.replica, "pull", fail)
    with pytest.raises(ConnectionError):
        worker.replica.catch_up(None, 0)
    assert worker.slices[0].mark is None and same_bits(flat(model), before)
    worker.close()


def test_a_worker_that_waits_for_its_push_goes_on_where_the_server_has_another_run(serve, tmp_path):
    other = serve("-m", tmp_path / "other")
    _, worker = joined(other, "b")
    worker.__exit__(None, None, None)
    other.signal(signal.SIGTERM)
    other.wait()
    host = serve("-n", 2)
    model, peer = toy_worker.build((5, 7, 2)), toy_worker.build((5, 7, 2))
    workers = [
        DiLoCoWorker(m, sgd(m), host.address, 1, name) for m, name in ((model, "a"), (peer, "c"))
    ]
    together(*(each.start for each in workers))
    step = background(lambda: train(model, workers[0].optimizer, 1))  # waits for the other
    until(lambda: status(host)["fragments"][0]["pushes"] == 1, "a push")
    host.kill()
    serve("-m", tmp_path / "other", "--port", host.port)
    step.result(DEADLINE)
    assert workers[0].dropped_steps == 1
    workers[0].__exit__(None, None, None)
    workers[1].close()


def test_patience_of_zero_is_for_outages_only(serve):
    model, worker = joined(serve(), sync_every=1, reconnect_timeout=0)
    train(model, worker.optimizer, 3)
    assert worker.version.number == 3 and not worker.outbox.queue
    worker.close()


def test_a_join_that_may_have_got_through_is_made_again(serve, monkeypatch):
    _, worker = joined(serve(), sync_every=5)
    take = worker.leader.admission.take

    def fail(reply):
        raise ConnectionError("cut")

    monkeypatch.setattr(worker.leader.admission, "take", fail)
    worker.reconnect_timeout = 0
    assert not worker.leader.rejoin()
    monkeypatch.setattr(worker.leader.admission, "take", take)
    until(worker.link.lost.is_set, "an order to join again")
    assert worker.leader.rejoin() and not worker.link.must_join
    worker.close()


def test_a_model_is_uploaded_in_the_order_of_the_worker_that_was_there_first(serve):
    host = serve("-n", 2)

    def model(*names):
        made = torch.nn.ParameterDict()
        for name in names:
            made[name] = torch.nn.Parameter(torch.full((3,), float(ord(name))))
        return made

    late, early = model("y", "x"), model("x", "y")
    workers = [
        DiLoCoWorker(m, sgd(m), host.address, 5, name)
        for name, m in (("b", early), ("a", late))  # the first id uploads
    ]
    first = background(workers[0].start)
    until(lambda: status(host)["joining"] == ["b"], "b")
    with torch.no_grad():
        late["x"].add_(7)
    workers[1].start()
    first.result(DEADLINE)
    for m in (late, early):
        assert (m["x"][0].item(), m["y"][0].item()) == (ord("x") + 7, ord("y"))
    for worker in workers:
        worker.close()
