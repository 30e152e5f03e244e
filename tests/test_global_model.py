"""The global model and its store by themselves: folds, logs, snapshots, checkpoints. No processes.

python -m pytest tests/test_global_model.py
"""

import concurrent.futures
import json
import os
import threading
import time

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from conftest import DEADLINE, ROUNDING, rounded
from conftest import Outer as WrittenOut
from trail import places

import protocol
import server
from protocol import CHUNK, CODECS, Fate, ProtocolError, Refused, TensorSpec, Version, matched
from server import GlobalModel, Outer, Push, Round, Store, choose_output

LIFE = "0123456789abcdef0123"
W = TensorSpec("w", torch.float32, (3, 4))
B = TensorSpec("b", torch.bfloat16, (5,))
MEAN = TensorSpec("mean", torch.float32, (3,))
PLAIN = {"lr": 1.0, "momentum": 0.0, "nesterov": False, "warmup": False}


def numbers(seed, count=17, scale=0.1):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale


def same_bits(a, b):
    a, b = a.contiguous().view(-1), b.contiguous().view(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def made(count=17, fragments=1, up="fp32", down="fp32", buffers=(), feedback=True):
    """A model of `count` random parameters."""
    specs = [TensorSpec("p", torch.float32, (count,))]
    model = GlobalModel(specs, buffers, fragments, up, down, feedback)
    model.put({"p": numbers(0, count, 1.0)})
    return model


def push(model, k, worker, values, **facts):
    """A push of float32 values (None: an empty push), encoded as a worker does."""
    payload = None
    if values is not None:
        payload, codec = model.payload(k), model.codec(k)[0]
        for start, stop in protocol.chunks(values.numel()):
            codec.encode(values[start:stop].contiguous(), payload.tensors, start)
    base = Version(LIFE, 0)
    return Push(worker=worker, session="s", k=k, seq=1, base=base, payload=payload, **facts)


def vectors_of(model):
    """All flat vectors of a model, the buffers' values last."""
    return [model.params, *model.outer.values(), model.values]


def flat_of(model, name=None):
    """The parameters, or what the outer step keeps of that name, in the order of the manifest."""
    flat = torch.full((sum(spec.numel for spec in model.manifest),), torch.nan)
    for k, part in enumerate(model.parts(model.outer[name] if name else model.params)):
        flat[places(len(flat), k, model.num_fragments)] = part
    return flat


def closed(k, number, pushes, plain=False, share=1.0):
    """The Round that leads to version `number`."""
    base, version = Version(LIFE, number - 1), Version(LIFE, number)
    return Round(
        k=k, base=base, version=version, pushes=pushes, members=[],
        plain=plain, share=share, before=max(0, number - 1), opened=0.0, closed=0.0,
    )  # fmt: skip


def fold(model, k, number, values, outer=None, **facts):
    """Fold pushes of these values; returns (Entry, norm)."""
    pushes = [push(model, k, f"w{n}", value) for n, value in enumerate(values)]
    round = closed(k, number, pushes, **facts)
    entry = model.announce(round, step=number)
    norm, counted = model.fold(round, entry, outer or Outer())
    entry.finish()
    for each in pushes:
        if each.payload is not None:
            model.give_back(k, each.payload)
    assert [p.worker for p in counted] == [p.worker for p in pushes if p.payload is not None]
    return entry, norm


def replay(entry, values):
    """Add an entry, as it is sent, to a replica; compares the checksum."""
    raw = torch.cat([piece.clone() for piece in entry.pieces()])
    payload = protocol.Payload(entry.specs)
    payload.raw.copy_(raw)
    for start, stop in protocol.chunks(entry.count):
        part = values[start:stop]
        part.add_(entry.codec.decoded(payload.tensors, start, part))
    assert same_bits(protocol.checksum_of(values), payload.tensors["checksum"])
    return values


# --- The fold --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize(("mu", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_the_outer_step_is_sgd_of_torch_to_the_last_bit(count, mu, nesterov):
    model = made(count)
    theirs = torch.nn.Parameter(model.params.clone())
    optimizer = torch.optim.SGD([theirs], lr=0.7, momentum=mu, nesterov=nesterov)
    outer = Outer(momentum=mu, nesterov=nesterov, warmup=False)
    for number, workers in enumerate((2, 1, 3, 2)):
        pushes = [numbers(10 * number + k, count) for k in range(workers)]
        theirs.grad = sum(pushes[1:], pushes[0]) / workers
        before = model.params.clone()
        entry, norm = fold(model, 0, number + 1, pushes, outer)
        optimizer.step()
        if mu:
            assert same_bits(model.outer["momentum"], optimizer.state[theirs]["momentum_buffer"])
        update = entry.payload.tensors["values"]
        size = torch.stack([before, model.params, update]).abs().amax(0)
        last_bit = torch.nextafter(size, torch.tensor(torch.inf)) - size
        assert ((model.params - theirs).abs() <= last_bit).all()
        assert norm == pytest.approx(theirs.grad.double().norm().item(), rel=1e-4)
        with torch.no_grad():
            theirs.copy_(model.params)


def test_values_worked_out_by_hand():
    model = made(3)
    model.put({"p": torch.tensor([1.0, 2.0, 3.0])})
    outer = Outer(lr=0.5, momentum=0.5, warmup=False)
    entry, norm = fold(model, 0, 1, [torch.tensor([1.0, 0, 2]), torch.tensor([3.0, 0, 4])], outer)
    assert norm == pytest.approx(13**0.5)  # the mean is 2, 0, 3; v = g; d = g + v / 2
    assert entry.payload.tensors["values"].tolist() == [-1.5, 0, -2.25]
    assert model.params.tolist() == [-0.5, 2, 0.75] and model.outer["momentum"].tolist() == [
        2,
        0,
        3,
    ]
    fold(model, 0, 2, [torch.tensor([1.0, 1, 0])], outer)  # v = v / 2 + g = 2, 1, 1.5
    assert model.outer["momentum"].tolist() == [2, 1, 1.5]
    assert model.params.tolist() == [-1.5, 1.25, 0.375]
    entry, _ = fold(model, 0, 3, [torch.tensor([2.0, 0, 1])], outer, plain=True, share=0.5)
    assert entry.payload.tensors["values"].tolist() == [-1, 0, -0.5] and entry.plain
    assert model.params.tolist() == [-2.5, 1.25, -0.125] and model.outer["momentum"].tolist() == [
        2,
        1,
        1.5,
    ]


@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("codec", CODECS)
def test_a_fold_with_codecs_is_the_whole_tensor_computation(count, codec):
    model = made(count, up=codec, down=codec)
    outer, replica = WrittenOut(model.params, codec), model.params.clone()
    for number in range(6):
        pushes = [numbers(10 * number + k, count) for k in range(3)]
        entry, _ = fold(model, 0, number + 1, pushes, plain=number in (3, 5))
        outer.step([rounded(values, codec) for values in pushes], closing=number in (3, 5))
        assert same_bits(model.params, outer.params)
        assert same_bits(model.outer["momentum"], outer.velocity)
        assert "residual" not in model.outer or same_bits(model.outer["residual"], outer.residual)
        assert same_bits(replay(entry, replica), model.params)
    assert ("residual" not in model.outer) == (codec in ROUNDING)


def test_without_error_feedback_there_is_no_residual():
    model = made(up="int8", down="int8", feedback=False)
    assert "residual" not in model.outer and len(model.vectors(0)) == 2
    before = model.params.clone()
    fold(model, 0, 1, [numbers(1)], plain=True)
    assert same_bits(model.params, before - rounded(numbers(1), "int8"))


@pytest.mark.parametrize("fragments", [2, 3])
def test_a_fragment_changes_its_elements_only(fragments):
    count = fragments * CHUNK + 1
    model = made(count, fragments, "bf16", "bf16")
    whole = flat_of(model)
    for k in range(fragments):
        mine = places(count, k, fragments)
        part = whole[mine]
        values = numbers(k, len(part))
        outer = WrittenOut(part, "bf16").step([rounded(values, "bf16")])
        entry, _ = fold(model, k, 1, [values])
        whole[mine] = outer.params
        assert same_bits(flat_of(model), whole)
        assert same_bits(replay(entry, part), model.vectors(k)[0])


def test_empty_and_refused_pushes_do_not_count():
    model = made()
    before = model.params.clone()
    entry, norm = fold(model, 0, 1, [None, None])
    assert (entry.payload, entry.count, norm) == (None, 0, 0.0)
    assert same_bits(model.params, before) and not model.outer["momentum"].any()
    assert same_bits(replay(entry, before), model.params)
    refused = push(model, 0, "b", torch.full((17,), torch.inf), refused="not finite")
    pushes = [push(model, 0, "a", numbers(1)), refused, push(model, 0, "c", None)]
    round = closed(0, 2, pushes)
    entry = model.announce(round, 2)
    _, counted = model.fold(round, entry, Outer(**PLAIN))
    assert [p.worker for p in counted] == ["a"]
    assert same_bits(model.params, before - numbers(1))
    assert entry.fates["b"] == Fate(1, "not finite", 2) and entry.fates["c"] == Fate(1, "", 2)


def test_the_buffers_are_the_mean_of_the_values_pushed_on_time():
    count = CHUNK + 3
    model = made(buffers=[TensorSpec("x", torch.float32, (count,))], up="int8", down="int8")
    assert (model.count, model.sizes) == (2, [17, count])
    model.put({"x": numbers(9, count)})
    replica = model.values.clone()
    scale = [numbers(k, count, 10.0**k) for k in range(5)]
    entry, _ = fold(model, 1, 1, scale)
    exact = np.mean([values.numpy().astype(np.float64) for values in scale], axis=0)
    moved = torch.from_numpy(exact.astype(np.float32)) - replica
    assert same_bits(entry.payload.tensors["values"], moved)
    assert same_bits(model.values, replica + moved)
    assert same_bits(replay(entry, replica), model.values)
    late = push(model, 1, "late", numbers(7, count))
    late.late = 1
    round = closed(1, 2, [push(model, 1, "a", scale[0]), late])
    entry = model.announce(round, 2)
    _, counted = model.fold(round, entry, Outer())
    assert [p.worker for p in counted] == ["a"]
    torch.testing.assert_close(model.values, scale[0], rtol=0, atol=1e-3)
    entry, _ = fold(model, 1, 3, [None])
    assert entry.count == 0


# --- The log ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "kept"), [("fp32", 1), ("bf16", 1), ("int8", 3), ("int4", 7)])
def test_the_log_keeps_what_is_smaller_than_the_slice(codec, kept):
    count = 64 * 1000
    model = made(count, up=codec, down=codec)
    replicas = {}
    for number in range(1, 11):
        replicas[number - 1] = model.params.clone()
        fold(model, 0, number, [numbers(number, count)])
    assert [entry.version.number for entry in model.logs[0]] == list(range(11 - kept, 11))
    assert sum(entry.nbytes for entry in model.logs[0]) < 4 * count or kept == 1
    held, head = Version(LIFE, 10 - kept), Version(LIFE, 10)
    for upto in (None, head):
        entries = model.entries(0, held, upto)
        assert [entry.base.number for entry in entries] == list(range(10 - kept, 10))
    for entry in entries:
        replay(entry, replicas[10 - kept])
    assert same_bits(replicas[10 - kept], model.params)
    assert model.entries(0, Version(LIFE, 9 - kept)) is None
    assert model.entries(0, Version("f" * 20, 9)) is None
    assert model.entries(0, head) == model.entries(0, head, head) == []
    assert model.entries(0, head, held) is None
    assert made().entries(0, held) is None and made().entries(0, held, held) == []


def test_an_entrys_memory_is_used_again_when_nobody_reads_it():
    model = made(up="bf16", down="bf16")
    for _ in range(2):  # asked for twice, the memory is there once
        model.warm(0)
    assert len(model.idle[0]) == 1
    warmed = model.spares[0]
    first, _ = fold(model, 0, 1, [numbers(1)])
    assert first.payload is warmed and len(model.idle[0]) == 1
    second, _ = fold(model, 0, 2, [numbers(1)])
    assert second.payload is warmed
    second.readers = 1
    third, _ = fold(model, 0, 3, [numbers(1)])
    assert third.payload is not warmed and model.spares[0] is None
    assert len(model.logs[0]) == 1


def test_payloads_of_pushes_are_used_again_and_go_with_their_workers():
    model = made()
    held = [model.payload(0) for _ in range(5)]
    for payload in [*held, held[0]]:  # given back twice, it is there once
        model.give_back(0, payload)
    assert len(model.idle[0]) == 5 and model.payload(0) is held[4]
    model.announce(closed(0, 1, [push(model, 0, "a", None)]), 1)
    assert len(model.idle[0]) == 1


def test_an_entry_is_sent_while_it_is_made(monkeypatch):
    count = 6 * CHUNK + 5
    model, gate, started = made(count, up="bf16", down="bf16"), threading.Event(), []
    replica, work = model.params.clone(), model._fold_chunk

    def slow(*arguments):
        start = arguments[-2]
        started.append(start)
        if start >= 3 * CHUNK:
            assert gate.wait(DEADLINE)
        return work(*arguments)

    monkeypatch.setattr(model, "_fold_chunk", slow)
    round = closed(0, 1, [push(model, 0, "a", numbers(1, count))])
    entry = model.announce(round, 1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        folding = pool.submit(model.fold, round, entry, Outer())
        received, pieces = [], entry.pieces()
        while sum(map(len, received)) < 2 * 3 * CHUNK:
            received.append(next(pieces).clone())
        assert not folding.done() and sum(map(len, received)) == 2 * 3 * CHUNK
        gate.set()
        folding.result(DEADLINE)
        rest = pool.submit(lambda: [piece.clone() for piece in pieces])
        time.sleep(0.05)
        assert not rest.done()  # the checksum waits until the version is known
        entry.finish()
        received += rest.result(DEADLINE)
    assert same_bits(torch.cat(received), torch.cat([p.clone() for p in entry.pieces()]))
    assert same_bits(replay(entry, replica), model.params)


# --- Snapshots -------------------------------------------------------------------------------


def overtake(model, number):
    """Fold a version of every slice that adds 1 to every number."""
    for k, size in enumerate(model.sizes):
        values = torch.full((size,), -1.0)
        if k == model.num_fragments:
            values = model.values + 1
        fold(model, k, number, [values], Outer(**PLAIN))


@pytest.mark.parametrize("count", [5, 3 * CHUNK, 6 * CHUNK + 5])
@pytest.mark.parametrize("fragments", [1, 3])
def test_a_checkpoint_is_of_one_moment_while_all_changes_around_it(count, fragments):
    model = made(count, fragments, up="int8", down="int8", buffers=[MEAN])
    overtake(model, 1)
    before = [flat_of(model, name) for name in (None, "momentum", "residual")]
    values, frozen = model.values.clone(), model.freeze()
    written = [[], [], []]
    for n, runs in enumerate(server.interleaved(frozen[:fragments], model.stripe)):
        if n < 3:
            for twice in range(2):  # the folds overtake the reader, and come again
                overtake(model, 2 + 2 * n + twice)
        for parts, run in zip(written, runs, strict=True):
            parts.append(run)
    assert all(same_bits(torch.cat(w), b) for w, b in zip(written, before, strict=True))
    assert same_bits(torch.cat(list(frozen[-1].pieces())), values)
    assert not any(snapshot.kept for snapshot in frozen)  # the memory is given back
    assert not same_bits(model.params, before[0]) and not same_bits(model.values, values)


def test_many_slow_readers_each_see_numbers_of_one_version():
    count = 6 * CHUNK + 7
    model, lock, folding = made(count), threading.Condition(), False
    model.put({"p": torch.zeros(count)})
    stop, version = threading.Event(), 0

    def read(seed):
        pause = 0.001 * (seed % 5)
        with lock:
            lock.wait_for(lambda: not folding)
            snapshot, expected = model.snapshot(0), float(version)
        parts = []
        for part in snapshot.pieces():
            assert part.min() == part.max() == expected, (seed, part.unique(), expected)
            parts.append(part)
            time.sleep(pause)
        assert sum(part.numel() for part in parts) == count
        snapshot.close()
        return snapshot

    def run():
        nonlocal folding, version
        while not stop.is_set():
            with lock:
                folding = True
            overtake(model, version + 1)
            with lock:
                version, folding = version + 1, False
                lock.notify_all()
            time.sleep(0.001)

    folder = threading.Thread(target=run)
    folder.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            snapshots = list(pool.map(read, range(40)))
    finally:
        stop.set()
        folder.join()
    assert version > 5 and not any(snapshot.kept for snapshot in snapshots)
    del snapshots
    assert len(model.snapshots[0]) == 0  # nobody is kept who has gone


def test_a_closed_snapshot_keeps_nothing_and_a_second_reading_is_an_error():
    model = made(3 * CHUNK)
    snapshot, other = model.snapshot(0), model.snapshot(0)
    overtake(model, 1)
    assert len(snapshot.kept) == 3
    snapshot.close()
    overtake(model, 2)
    assert not snapshot.kept and len(other.kept) == 3
    with pytest.raises(RuntimeError, match="closed"):
        list(snapshot.pieces())
    list(other.pieces())
    with pytest.raises(RuntimeError, match="twice"):
        list(other.pieces())


# --- Slices and weights that come from outside -----------------------------------------------


def test_slices_that_a_worker_brings_replace_the_old_ones_and_their_residual():
    model = made(2 * CHUNK + 10, fragments=2, up="int8", down="int8")
    for k in (0, 1):
        fold(model, k, 1, [numbers(1, model.sizes[k])])
    snapshot, before = model.snapshot(1), model.vectors(1)[0].clone()
    values, momentum = numbers(5, model.sizes[1]), model.outer["momentum"].clone()
    model.take(1, values)
    assert same_bits(model.vectors(1)[0], values) and same_bits(model.outer["momentum"], momentum)
    assert not model.vectors(1)[2].any() and model.vectors(0)[2].any()
    assert not model.logs[1] and model.logs[0]
    assert same_bits(torch.cat(list(snapshot.pieces())), before)
    for bad in (torch.nan, torch.inf):
        broken = values.clone()
        broken[-1] = bad
        with pytest.raises(Refused, match="are not all finite"):
            model.take(1, broken)
    assert same_bits(model.vectors(1)[0], values)  # all of it or nothing


def test_weights_of_m_overwrite_what_a_worker_has_brought():
    model = GlobalModel([W, B], [MEAN], 2, "int8", "int8", True)
    model.take(0, torch.arange(9.0))
    model.take(1, torch.arange(8.0))
    model.take(2, torch.arange(3.0))
    found = {"b": numbers(8, 5).bfloat16(), "mean": torch.ones(3, dtype=torch.float64)}
    model.put({**found, "other": torch.ones(1)})
    assert flat_of(model)[:12].tolist() == [k // 2 for k in range(12)]
    assert same_bits(flat_of(model)[12:], found["b"].float()) and model.values.tolist() == [1, 1, 1]
    with pytest.raises(Refused, match="are not all finite"):
        model.put({"b": torch.full((5,), torch.nan)})
    long = made(2 * CHUNK + 1)
    snapshot, before = long.snapshot(0), long.params.clone()
    long.put({"p": torch.ones(2 * CHUNK + 1)})
    assert (long.params == 1).all() and same_bits(torch.cat(list(snapshot.pieces())), before)


def test_another_model_is_refused_by_name():
    model = GlobalModel([W, B], [MEAN], 1, "int8", "int8", True)
    model.check([B, W], [MEAN])
    with pytest.raises(Refused, match=r"not the one of the run: .*'b' \[5\] of the server is miss"):
        model.check([W], [MEAN])
    with pytest.raises(Refused, match=r"'mean' is \[3\] on the server and \[4\] here"):
        model.check([W, B], [MEAN._replace(shape=(4,))])


# --- Checkpoints -----------------------------------------------------------------------------


def state_of(numbers, members=("a",), **more):
    heads = [(Version(LIFE, n), {"a": Fate(n, "", n), "b": Fate(3, "too old", 1)}) for n in numbers]
    return {
        "heads": heads, "members": list(members), "indices": {"a": 0, "b": 1}, "step": 30,
        "shares": 8, "settings": {"outer_lr": 0.7}, "run": LIFE, "life": LIFE, **more,
    }  # fmt: skip


def trained(fragments=2):
    model = GlobalModel([W, B], [MEAN], fragments, "int8", "int8", True)
    model.put({"w": numbers(1, 12).view(3, 4), "b": numbers(2, 5), "mean": numbers(3, 3)})
    for k, size in enumerate(model.sizes):
        fold(model, k, 1, [numbers(k, size)])
    return model


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_checkpoint_is_what_the_library_reads_and_is_opened_again(tmp_path, fragments):
    model, store = trained(fragments), Store(str(tmp_path / "model"))
    assert store.open("int8", "int8", True) == (None, None)
    store.files = {"config.json": b"{}"}
    heads = [2] * fragments + [1]
    store.save(state_of(heads), model, model.freeze())
    folder = tmp_path / "model" / "checkpoint-1"
    assert not store.save_error
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "outer.safetensors", "config.json", "checksums.json",
    }  # fmt: skip
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in saved.items()} == {
        name: (torch.float32, shape) for name, _, shape in (W, B, MEAN)
    }
    flat = torch.cat([saved["w"].view(-1), saved["b"]])
    assert same_bits(flat, flat_of(model)) and same_bits(saved["mean"], model.values)
    vectors = safetensors.torch.load_file(folder / "outer.safetensors")
    assert same_bits(vectors["momentum"], flat_of(model, "momentum"))
    assert same_bits(vectors["residual"], flat_of(model, "residual"))
    with safetensors.safe_open(folder / "outer.safetensors", "pt") as file:
        state = json.loads(file.metadata()["diloco"])
    assert (state["program"], state["step"], state["buffers"]) == ("diloco", 30, 1)
    assert state["dtypes"] == {"w": "F32", "b": "BF16", "mean": "F32"}
    assert state["fragments"][-1]["label"] == [LIFE, 1]

    again = Store(str(tmp_path / "model"))
    state, opened = again.open("int8", "int8", True)
    assert state["heads"] == state_of(heads)["heads"]
    assert isinstance(state["heads"][0][0], Version)
    assert isinstance(state["heads"][0][1]["a"], Fate)
    assert (state["settings"], state["shares"], state["path"]) == (
        {"outer_lr": 0.7},
        8,
        str(folder),
    )
    assert again.names == {
        "members": ["a"],
        "stopping": [],
        "indices": {"a": 0, "b": 1},
        "sessions": {},
        "dropped": {},
        "life": LIFE,
        "pace": 0,
    }
    assert (opened.manifest, opened.buffers, opened.count) == ([W, B], [MEAN], fragments + 1)
    assert list(opened.outer) == list(model.outer) == ["momentum", "residual"]
    for before, after in zip(vectors_of(model), vectors_of(opened), strict=True):
        assert same_bits(after, before)
    assert again.files == {"config.json": b"{}"}
    opened.params.fill_(7)  # the file is not written through
    fold(opened, 0, 3, [numbers(0, opened.sizes[0])])
    assert same_bits(safetensors.torch.load_file(folder / "model.safetensors")["b"], saved["b"])


@pytest.mark.parametrize("fragments", [1, 3])
def test_a_checkpoint_of_many_chunks_has_each_number_in_its_place(tmp_path, fragments):
    model = made(4 * CHUNK + 2, fragments, "bf16", "bf16")
    overtake(model, 1)
    for k, size in enumerate(model.sizes):
        fold(model, k, 2, [numbers(k, size)])
    store = Store(str(tmp_path / "model"))
    store.save(state_of([2] * fragments), model, model.freeze())
    _, opened = Store(str(tmp_path / "model")).open("bf16", "bf16", True)
    for before, after in zip(vectors_of(model)[:-1], vectors_of(opened)[:-1], strict=True):
        assert before.any() and same_bits(after, before)


def test_checkpoints_are_replaced_pruned_and_skipped_where_nothing_is_new(tmp_path, capsys):
    model, store = trained(1), Store(str(tmp_path / "model"), None, 2)
    for n in range(1, 5):
        for _ in range(2):
            snapshots = model.freeze()
            store.save(state_of([n, n]), model, snapshots)
            assert all(snapshot.taken > snapshot.count for snapshot in snapshots)  # closed
    assert capsys.readouterr().out.count("saved") == 4
    store.save(state_of([4, 5]), model, model.freeze())  # the same round, not the same versions
    store.save(state_of([4, 5], members=()), model, model.freeze())
    assert capsys.readouterr().out.count("saved") == 2
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    state, _ = Store(str(tmp_path / "model")).open("fp32", "fp32", True)
    assert [v.number for v, _ in state["heads"]] == [4, 5] and state["members"] == []


def test_a_checkpoint_of_before_is_opened(tmp_path):
    """Protocol version 2: plain sequence numbers, integer buffers among the tensors."""
    folder = tmp_path / "model" / "checkpoint-4"
    folder.mkdir(parents=True)
    tensors = {
        "w": numbers(1, 12).view(3, 4), "b": numbers(2, 5),
        "count": torch.tensor(7), "mean": numbers(3, 3),
    }  # fmt: skip
    state = {
        "program": "diloco", "run": LIFE, "life": LIFE, "step": 20, "shares": 8,
        "settings": {"outer_lr": 0.5}, "indices": {"a": 0}, "members": ["a"], "buffers": 2,
        "dtypes": {"w": "F32", "b": "BF16", "count": "I64", "mean": "F32"},
        "fragments": [
            {"label": [LIFE, 5], "folded": {"a": 9}}, {"label": [LIFE, 4], "folded": {"a": 8}},
        ],
    }  # fmt: skip
    protocol.save_file(folder / "model.safetensors", tensors, {"program": "diloco"})
    vectors = {"momentum": numbers(4), "residual": numbers(5)}
    protocol.save_file(folder / "outer.safetensors", vectors, state)
    state, model = Store(str(tmp_path / "model")).open("int8", "int8", True)
    assert state["heads"] == [
        (Version(LIFE, 5), {"a": Fate(9, "", 5)}),
        (Version(LIFE, 4), {"a": Fate(8, "", 4)}),
        (Version(LIFE, 4), {}),
    ]
    assert (model.buffers, model.count) == ([MEAN], 3)
    assert same_bits(model.values, tensors["mean"])
    assert same_bits(flat_of(model, "momentum"), numbers(4))
    assert same_bits(flat_of(model, "residual"), numbers(5))
    assert same_bits(flat_of(model), torch.cat([tensors["w"].view(-1), tensors["b"]]))


@pytest.mark.parametrize("cut", ["model.safetensors", "outer.safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, capsys, cut):
    model, store = trained(1), Store(str(tmp_path / "model"))
    for n in (1, 2):
        store.save(state_of([n, n]), model, model.freeze())
    broken = tmp_path / "model" / "checkpoint-2" / cut
    broken.write_bytes(broken.read_bytes()[:-10])
    state, _ = Store(str(tmp_path / "model")).open("bf16", "bf16", True)
    assert state["heads"][0][0].number == 1
    assert "WARNING" in capsys.readouterr().out


def test_a_checkpoint_of_another_program_is_not_replaced(tmp_path, capsys):
    theirs = tmp_path / "model" / "checkpoint-1" / "rank0.pt"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    model, store = trained(1), Store(str(tmp_path / "model"))
    store.save(state_of([1, 1]), model, model.freeze())
    assert theirs.exists() and "is not this program's" in store.save_error
    assert os.listdir(tmp_path / "model") == ["checkpoint-1"]
    store.save(state_of([2, 2]), model, model.freeze())
    assert not store.save_error and "WARNING" in capsys.readouterr().out


def test_a_full_disk_is_survived(tmp_path, monkeypatch):
    model, store = trained(1), Store(str(tmp_path / "model"))
    store.save(state_of([1, 1]), model, model.freeze())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(server.os, "fsync", full)
        snapshots = model.freeze()
        store.save(state_of([2, 2]), model, snapshots)
        assert "No space left" in store.save_error
        assert all(snapshot.taken > snapshot.count for snapshot in snapshots)
        store.save_final([Version(LIFE, 2)] * 2, model, [model.snapshot(k) for k in (0, 1)])
        store.save_names({"members": [], "stopping": [], "indices": {}, "sessions": {}})
    assert os.listdir(tmp_path / "model") == ["checkpoint-1"]
    store.save(state_of([2, 2]), model, model.freeze())
    store.save_final([Version(LIFE, 2)] * 2, model, [model.snapshot(k) for k in (0, 1)])
    store.save_names({"members": [], "stopping": [], "indices": {}, "sessions": {}})
    assert not store.save_error
    names = {"checkpoint-1", "checkpoint-2", "model.safetensors", "members.json"}
    assert set(os.listdir(tmp_path / "model")) == names


def test_names_on_disk_win_over_those_of_the_checkpoint(tmp_path, capsys):
    model, store = trained(1), Store(str(tmp_path / "model"))
    store.save(state_of([1, 1]), model, model.freeze())
    names = {
        "members": ["b", "c"],
        "stopping": ["b"],
        "indices": {"b": 1, "c": 2},
        "sessions": {"b": "s"},
    }
    store.save_names(names)
    again = Store(str(tmp_path / "model"))
    again.open("bf16", "bf16", True)
    assert again.names == {**names, "dropped": {}, "life": "", "pace": 0}
    (tmp_path / "model" / "members.json").write_bytes(b'{"members": 3}')
    again = Store(str(tmp_path / "model"))
    again.open("bf16", "bf16", True)
    assert again.names["members"] == ["a"] and "members.json" in capsys.readouterr().out
    store.save_names(None)
    store.save_names(None)
    assert os.listdir(tmp_path / "model") == ["checkpoint-1"]
    fresh = Store(str(tmp_path / "new"))
    fresh.save_names(names)  # a crash before the first checkpoint
    fresh = Store(str(tmp_path / "new"))
    assert fresh.open("bf16", "bf16", True) == (None, None)
    assert fresh.names == {**names, "dropped": {}, "life": "", "pace": 0}


# --- Weights of -m, frozen tensors, the final model ------------------------------------------


def pretrained(folder, tensors):
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return str(folder)


def described(tensors):
    return {
        name: (TensorSpec(name, t.dtype, tuple(t.shape)), protocol.fingerprint(t))
        for name, t in tensors.items()
    }


def test_the_final_model_has_first_dtypes_buffers_and_frozen_tensors_of_m(tmp_path):
    base = {"base": numbers(5, 6), "w": numbers(1, 12).view(3, 4)}
    store = Store(pretrained(tmp_path / "hf", base))
    assert store.open("bf16", "bf16", True) == (None, None)
    assert store.output == str(tmp_path / "hf-diloco") and store.files == {"config.json": b"{}"}
    model, long = trained(2), made(2 * CHUNK + 1, 3)
    store.note_frozen(described({"base": base["base"]}), "a on host")
    assert store.untrained == ["base"] and store.frozen == {}
    snapshots = [model.snapshot(k) for k in range(3)]
    expected = {"w": flat_of(model)[:12].view(3, 4), "b": flat_of(model)[12:].bfloat16(),
                "mean": model.values.clone(), "base": base["base"]}  # fmt: skip
    overtake(model, 2)
    versions = [Version(LIFE, 1)] * 3
    store.save_final(versions, model, snapshots)
    path = tmp_path / "hf-diloco" / "model.safetensors"
    written = safetensors.torch.load_file(path)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype and same_bits(written[name], tensor), name
    assert (tmp_path / "hf-diloco" / "config.json").read_text() == "{}"
    before = path.stat().st_mtime_ns
    store.save_final(versions, model, [model.snapshot(k) for k in range(3)])
    assert path.stat().st_mtime_ns == before
    ((_, tensor),) = long.tensors([long.snapshot(k) for k in range(3)])
    assert same_bits(tensor, flat_of(long))


def test_frozen_tensors_are_compared_with_m_by_fingerprint(tmp_path):
    base = {"base": numbers(5, 6), "rest": numbers(6, 3)}
    store = Store(pretrained(tmp_path / "hf", base))
    store.open("bf16", "bf16", True)
    same = described(base)
    narrow = described({name: t.bfloat16() for name, t in base.items()})
    other = described({"base": base["base"], "rest": torch.zeros(3), "new": torch.zeros(1)})
    for frozen, differ in ((same, []), (narrow, []), (other, ["rest"])):
        jobs = store.compare(frozen)
        assert [n for n, job in jobs.items() if job.result() != frozen[n][1]] == differ
    assert store.compare(same)["base"] is store.compare(same)["base"]  # hashed once
    specs, tensors = store.frozen_tensors(narrow, ["rest", "absent"])
    assert specs == [narrow["rest"][0]] and same_bits(next(tensors), base["rest"].bfloat16())
    wrong = described({"base": torch.zeros(2, 3)})
    with pytest.raises(Refused, match=r"frozen tensor 'base' is \[6\] in -m and \[2, 3\] here"):
        store.compare(wrong)


def test_frozen_tensors_that_m_lacks_are_compared_with_those_of_the_first_worker(tmp_path):
    store = Store(str(tmp_path / "model"))
    store.check_frozen(described({"base": torch.ones(2)}), {})
    store.note_frozen(described({"base": torch.ones(2)}), "a on host")
    store.note_frozen(described({"base": torch.zeros(2)}), "b on host")
    store.check_frozen(described({"base": torch.ones(2)}), {})
    store.check_frozen(described({"base": torch.zeros(2).bfloat16(), "new": torch.ones(1)}), {})
    with pytest.raises(Refused, match="frozen tensor 'base' has other numbers than that of a on h"):
        store.check_frozen(described({"base": torch.zeros(2)}), {})
    store.note_frozen(described({"new": torch.ones(1)}), "c on host")  # as with a change
    with pytest.raises(
        Refused, match="frozen tensor 'new' has other numbers than that of c on host"
    ):
        store.check_frozen(described({"new": torch.zeros(1)}), {})
    model = trained(1)
    store.save(state_of([1, 1]), model, model.freeze())
    again = Store(str(tmp_path / "model"))
    again.open("bf16", "bf16", True)
    assert again.frozen == store.frozen != {}


def test_weights_are_fitted_to_a_worker(tmp_path):
    weights = {"w": numbers(1, 12).view(3, 4), "b": numbers(2, 5), "base": numbers(3, 2)}
    store = Store(pretrained(tmp_path / "hf", weights))
    store.open("bf16", "bf16", True)
    found = store.fit([W, B], [MEAN], {})
    assert found.keys() == {"w", "b"} and same_bits(found["w"], weights["w"])
    head = TensorSpec("head", torch.float32, (2,))
    assert store.fit([head], [], described({"base": weights["base"]})) == {}  # an adapter
    with pytest.raises(Refused, match="'head'"):
        store.fit([W, head], [], {})
    with pytest.raises(Refused, match="nor is what is frozen, as 'alien'"):
        store.fit([W, head], [], described({"alien": torch.ones(1)}))
    with pytest.raises(Refused, match=r"'w' is \[3, 4\] .* \[4, 3\]"):
        store.fit([W._replace(shape=(4, 3))], [], {})
    assert Store(str(tmp_path / "model")).fit([W], [], {}) == {}


def test_outputs_and_weights_of_others(tmp_path, monkeypatch):
    folder = pretrained(tmp_path / "hf", {"w": torch.ones(2)})
    file = os.path.join(folder, "model.safetensors")
    assert choose_output(folder, None) == (folder + "-diloco", folder)
    assert choose_output(file, None) == (file.removesuffix(".safetensors") + "-diloco", file)
    assert choose_output(str(tmp_path / "new"), None) == (str(tmp_path / "new"), None)
    monkeypatch.chdir(folder)
    assert os.path.abspath(choose_output(".", None)[0]) == folder + "-diloco"
    with pytest.raises(SystemExit, match="did not write"):
        choose_output(str(tmp_path / "new"), folder)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(SystemExit, match=r"cannot use the weights in .*model\.safetensors"):
        Store(folder).open("bf16", "bf16", True)
    with pytest.raises(ProtocolError, match="no weights of its own"):
        protocol.load_folder(str(tmp_path))
    one = {"h.weight": torch.ones(1)}
    assert matched(one, ["base_model.model.h.base_layer.weight"]).keys() == {
        "base_model.model.h.base_layer.weight"
    }
