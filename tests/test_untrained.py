"""What a model has beside the parameters that are trained: buffers and frozen weights.

python -m pytest tests/test_untrained.py
"""

import hashlib
import os
import struct
import time

import pytest
import torch
from conftest import DEADLINE, ROOT, result, status, until
from peers import Gate, Peer, rounds, together
from safetensors.torch import load_file, save_file

import protocol
import server
from diloco_callback import DiLoCoWorker
from protocol import Refused, matched

SCRIPT = os.path.join(ROOT, "tests", "resnet_worker.py")
PLAIN = ["--upload-codec", "fp32", "--download-codec", "fp32", "--outer-momentum", 0]


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# --- Buffers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragments", [1, 4])
def test_batchnorm_evaluates_alike_on_all_workers(serve, start, tmp_path, fragments):
    host = serve("-n", 2, "--until-done")
    workers = [
        start(SCRIPT, "--server", host.address, "--worker-id", f"w{seed}", "--seed", seed,
              "--num-fragments", fragments, "--out", tmp_path / f"w{seed}")
        for seed in range(2)
    ]  # fmt: skip
    ends = [result(worker) for worker in workers]
    assert host.wait() == 0
    served = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("w0", "w1"):
        own = load_file(tmp_path / name)
        assert same({n: tensor for n, tensor in own.items() if n in served}, served)
        left = own.keys() - served.keys()  # whole numbers are each worker's own
        assert len(left) == 6 and all(n.endswith("num_batches_tracked") for n in left)
        assert all(own[n].item() == 42 for n in left)
    assert ends[0]["logits"] == ends[1]["logits"]
    assert min(end["right"] for end in ends) > 0.8
    assert [end["local"] for end in ends] == [42 * 32 + 256] * 2  # not persistent: each its own


class Net(torch.nn.Module):
    """One parameter that stays zero, and buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("narrow", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("mask", torch.full((2, 2), float("-inf")))  # never changes
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


class Site:
    """A worker in a thread of the test: `step` makes a step, whose push carries numbers."""

    def __init__(self, server, name, **options):
        self.net, self.name = Net(), name
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1.0)
        options = {"sync_every": 1, "reconnect_timeout": DEADLINE, **options}
        self.worker = DiLoCoWorker(
            self.net, self.optimizer, server.address, worker_id=name, **options
        )

    def step(self, **buffers):
        with torch.no_grad():
            for name, values in buffers.items():
                getattr(self.net, name).copy_(torch.as_tensor(values))
        self.net.weight.grad = torch.ones(4)
        self.optimizer.step()

    def values(self, *names):
        return [getattr(self.net, name).float().tolist() for name in names]


@pytest.fixture
def sites(serve):
    """sites(server, *names, **options): Sites that have joined, left by the end of the test."""
    made = []

    def join(server, *names, **options):
        new = [Site(server, name, **options) for name in names]
        made.extend(new)
        together(*(site.worker.start for site in new))
        return new

    yield join
    for site in made:
        site.worker.close()


def buffers_line(folder, number):
    """The line of a round of the buffers, the last slice of a model without fragments."""
    return rounds(folder / "model", number, fragment=1)[number - 1]


def test_floating_point_buffers_are_averaged_and_others_are_each_workers_own(
    serve, sites, tmp_path
):
    host = serve(*PLAIN, "-n", 3)
    a, b, c = sites(host, "a", "b", "c")
    together(
        lambda: a.step(mean=[1.0, 2.0, 0.0], count=7, flags=[True, False], scratch=[5.0]),
        lambda: b.step(mean=[4.0, 2.0, 3.0], count=9, narrow=[3.0, 0.75]),
        lambda: c.step(mean=[4.0, 2.0, 0.0]),
    )
    for site in (a, b, c):
        # The mean is rounded to the buffer's dtype at the end.
        assert site.values("mean", "narrow") == [[3.0, 2.0, 1.0], [1.0, 0.25]]
        assert site.net.narrow.dtype == torch.bfloat16
        assert site.values("mask") == [[[float("-inf")] * 2] * 2]
    assert [site.net.count.item() for site in (a, b, c)] == [7, 9, 0]
    assert [site.net.scratch.item() for site in (a, b, c)] == [5.0, 0.0, 0.0]
    assert [site.values("flags") for site in (a, b, c)] == [[[1, 0]], [[0, 0]], [[0, 0]]]
    assert buffers_line(tmp_path, 1)["bytes_up"] == 3 * 5 * 4  # narrow travels as float32

    together(lambda: a.step(mean=[5.0] * 3), b.step, c.step)  # who changes nothing does not count
    assert a.values("mean") == b.values("mean") == c.values("mean") == [[5.0] * 3]
    assert buffers_line(tmp_path, 2)["bytes_up"] == 5 * 4
    together(*(site.step for site in (a, b, c)))
    assert buffers_line(tmp_path, 3)["bytes_up"] == 0  # nothing travels that has not changed
    assert a.values("mean") == [[5.0] * 3]


def test_a_late_joiner_a_restarted_server_and_its_disk_have_the_buffers(serve, sites, tmp_path):
    host = serve(*PLAIN, "--worker-timeout", 2)
    (a,) = sites(host, "a")
    a.step(mean=[1.0, 2.0, 3.0], count=3, narrow=[0.5, 0.5])
    (b,) = sites(host, "b")
    assert b.values("mean", "narrow", "count") == [[1.0, 2.0, 3.0], [0.5, 0.5], 0.0]
    together(lambda: a.step(mean=[2.0, 2.0, 2.0]), lambda: b.step(mean=[4.0, 4.0, 4.0]))
    assert a.values("mean") == [[3.0] * 3]

    host.kill()  # its disk has the buffers of the start alone; the workers have the newer ones
    again = serve(*PLAIN, "--port", host.port, "--worker-timeout", 2)
    together(a.step, b.step)
    again.wait_for("version 2 comes from")
    (c,) = sites(again, "c")
    assert c.values("mean", "narrow") == [[3.0] * 3, [0.5, 0.5]]
    together(*(site.worker.flush for site in (a, b, c)))
    for site in (a, b, c):
        site.worker.close()
    again.wait_for("the model of round")
    served = load_file(tmp_path / "model" / "model.safetensors")
    assert served["narrow"].dtype == torch.bfloat16
    assert served["mean"].tolist() == [3.0] * 3 and "scratch" not in served
    again.kill()

    more = serve(*PLAIN, "--port", host.port, "-n", 1)  # all have left: a new start with that
    (d,) = sites(more, "d")
    assert d.values("mean", "narrow") == [[3.0] * 3, [0.5, 0.5]]


def test_a_buffer_that_is_not_finite_does_not_count_and_its_worker_has_the_global_ones(
    serve, sites
):
    host = serve(*PLAIN, "-n", 2)
    a, b = sites(host, "a", "b")
    nan = float("nan")
    together(lambda: a.step(mean=[1.0, 1.0, 1.0]), lambda: b.step(mean=[nan, 5.0, 5.0]))
    assert a.values("mean") == b.values("mean") == [[1.0] * 3]
    assert torch.equal(a.net.weight, b.net.weight)
    together(lambda: a.step(mean=[1.0] * 3), lambda: b.step(mean=[2.0, 3.0, 4.0]))
    assert a.values("mean") == b.values("mean") == [[2.0, 3.0, 4.0]]


def test_buffers_go_with_the_last_fragment_of_a_cycle(serve, sites):
    host = serve(*PLAIN, "-n", 2)
    a, b = sites(host, "a", "b", sync_every=4, num_fragments=2, fragment_sync_delay=0)
    for step in range(1, 4):
        together(lambda step=step: a.step(mean=[float(step)] * 3), b.step)
        assert (a.values("mean"), b.values("mean")) == ([[step] * 3], [[0] * 3])
    together(a.step, b.step)
    assert a.values("mean") == b.values("mean") == [[3.0] * 3]


def test_the_global_model_has_the_global_buffers(serve, sites):
    host = serve(*PLAIN, "-n", 2)
    a, b = sites(host, "a", "b", sync_every=2)
    together(*[lambda site=site: [site.step(), site.step(mean=[2.0] * 3)] for site in (a, b)])
    a.step(mean=[8.0] * 3)
    with a.worker.global_model():
        assert a.values("mean") == [[2.0] * 3]
    assert a.values("mean") == [[8.0] * 3]


def test_local_buffers_outlive_a_join_in_between(serve, sites):
    host = serve(*PLAIN, "--worker-timeout", 2)
    (a,) = sites(host, "a", sync_every=3)
    a.step(mean=[5.0] * 3)
    host.kill()
    serve(*PLAIN, "--port", host.port, "--worker-timeout", 2)
    time.sleep(2)  # it hears of the new one at its next heartbeat
    a.step()
    assert a.values("mean") == [[5.0] * 3]
    a.step()
    assert a.worker.joins == 2
    with a.worker.global_model():
        assert a.values("mean") == [[5.0] * 3]


def test_other_buffers_are_refused_by_name(serve, sites):
    host = serve(*PLAIN)
    sites(host, "a")
    other = Site(host, "b")
    other.net.register_buffer("more", torch.zeros(2))
    with pytest.raises(Refused, match=r"tensor 'more' \[2\] is not in the server's model"):
        DiLoCoWorker(other.net, other.optimizer, host.address, worker_id="b").start()


def test_a_buffer_that_gets_another_shape_stays_local(serve, sites):
    host = serve(*PLAIN, "-n", 2)
    a, b = sites(host, "a", "b")
    a.net.mean, a.net.flags = torch.ones(7), None
    together(a.step, lambda: b.step(mean=[1.0, 2.0, 3.0], narrow=[0.5, 0.25]))
    assert a.values("mean", "narrow") == [[1.0] * 7, [0.5, 0.25]]
    assert b.values("mean", "narrow") == [[1.0, 2.0, 3.0], [0.5, 0.25]]
    together(a.worker.close, b.step)


def test_an_expanded_buffer_and_wide_unsigned_numbers_are_no_obstacle(serve, sites):
    host = serve(*PLAIN, "-n", 2)
    a, b = (Site(host, name) for name in "ab")
    for site in (a, b):
        site.net.register_buffer("wide", torch.tensor([2**63, 1], dtype=torch.uint64))
        site.net.register_buffer("grid", torch.arange(3.0).expand(2, 3))
        site.worker = DiLoCoWorker(site.net, site.optimizer, host.address, 1, worker_id=site.name)
    together(a.worker.start, b.worker.start)
    together(lambda: a.step(mean=[2.0] * 3), b.step)
    for site in (a, b):
        assert site.values("mean") == [[2.0] * 3]
        assert site.net.wide.tolist() == [2**63, 1]
        with site.worker.global_model():
            assert site.net.grid.tolist() == [[0, 1, 2]] * 2
        site.worker.close()


def test_a_mean_that_was_rounded_to_a_narrow_buffer_is_no_change(serve, sites, tmp_path):
    host = serve(*PLAIN, "-n", 3)
    a, b, c = sites(host, "a", "b", "c")
    together(*(lambda s=s: s.step(mean=[1.0] * 3) for s in (a, b)),
             lambda: c.step(narrow=[1.0, 2.0]))  # fmt: skip
    assert a.net.narrow.tolist() == torch.tensor([1 / 3, 2 / 3]).bfloat16().tolist()
    together(a.step, b.step, c.step)
    assert buffers_line(tmp_path, 2)["bytes_up"] == 0


def test_a_name_that_stands_for_two_tensors_is_refused(serve):
    host = serve()
    for more in ({"buffers": [["w", "F32", [4]]]}, {"frozen": [["w", "F32", [4], "0" * 32]]}):
        with pytest.raises(Refused, match="stands for two tensors"):
            Peer(host, "a").ask(**more)


@pytest.mark.parametrize("mean", [2.0, float("nan")])
def test_buffers_of_a_last_push_of_which_a_later_join_tells(serve, sites, mean):
    host = serve(*PLAIN, "-n", 2, "--worker-timeout", 1)
    gate = Gate(host, slice=1)
    gate.pulls.append("gone")
    (a, b) = (Site(place, name, sync_every=9) for place, name in ((gate, "a"), (host, "b")))
    together(a.worker.start, b.worker.start)
    a.step(mean=[mean] * 3)
    b.step(mean=[4.0] * 3)

    def end_b():
        b.worker.flush()
        until(lambda: len(status(host)["workers"]) == 1, "a is given up")
        gate.open = True

    together(a.worker.flush, end_b)
    assert a.worker.joins == 2 and torch.equal(a.net.weight, b.net.weight)
    assert a.values("mean") == b.values("mean") == ([[3.0] * 3] if mean == 2 else [[4.0] * 3])
    a.worker.close()
    b.worker.close()


# --- Frozen weights and adapters -----------------------------------------------------------------


class Adapted(torch.nn.Module):
    """A frozen layer, and what is trained on top of it."""

    def __init__(self, seed, size=4, head=True):
        super().__init__()
        torch.manual_seed(seed)
        self.base = torch.nn.Linear(size, size).requires_grad_(False)
        self.head = torch.nn.Linear(4, 2) if head else None


def adapted(server, name, seed, dtype=torch.float32, **options):
    """A worker with an Adapted, not yet started."""
    net = Adapted(seed, **options).to(dtype)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    return DiLoCoWorker(net, optimizer, server.address, worker_id=name, sync_every=1), net


def base_of(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items() if "base" in name}


def test_the_first_adapter_is_uploaded_and_frozen_weights_come_from_m_where_they_differ(
    serve, tmp_path
):
    folder = tmp_path / "pretrained"
    folder.mkdir()
    right = Adapted(1)
    save_file(base_of(right), folder / "model.safetensors")
    host = serve("-m", folder, "-n", 2, "--until-done")
    (a, first), (b, second) = adapted(host, "a", 1), adapted(host, "b", 2)
    expected = {name: tensor.clone() for name, tensor in first.head.state_dict().items()}
    together(a.start, b.start)
    assert not a.fetched and len(b.fetched) == 2  # the frozen weight and bias
    assert same(base_of(second), base_of(right))
    assert same(dict(first.head.state_dict()), expected)
    assert same(dict(second.head.state_dict()), expected)  # a's, as it is the first
    narrow, third = adapted(host, "c", 1, torch.bfloat16)
    other, fourth = adapted(host, "d", 2, torch.bfloat16)
    together(narrow.start, other.start)  # what is rounded alike does not differ
    assert not narrow.fetched and len(other.fetched) == 2
    assert same(base_of(fourth), base_of(third)) and fourth.base.weight.dtype == torch.bfloat16
    for worker in (a, b, narrow, other):
        worker.close()
    assert host.wait() == 0
    # What -m has and the workers have frozen is in the model that the run ends with.
    written = load_file(tmp_path / "pretrained-diloco" / "model.safetensors")
    assert same({n: written[n] for n in base_of(right)}, base_of(right))
    assert same({n: t for n, t in written.items() if "head" in n},
                {f"head.{n}": t for n, t in expected.items()})  # fmt: skip
    assert same(load_file(folder / "model.safetensors"), base_of(right))


def test_a_run_that_goes_on_from_its_own_output_keeps_the_frozen_weights(serve, tmp_path):
    folder = tmp_path / "pretrained"
    folder.mkdir()
    save_file(base_of(Adapted(1)), folder / "model.safetensors")
    for m, seed in ((folder, 1), (tmp_path / "pretrained-diloco", 2)):
        host = serve("-m", m, "--until-done")
        worker, net = adapted(host, "a", seed)
        worker.start()
        net.head.weight.grad = torch.ones(2, 4)
        worker.trained.optimizers[-1].step()
        worker.flush()
        worker.close()
        assert host.wait() == 0 and same(base_of(net), base_of(Adapted(1)))
        written = load_file(tmp_path / "pretrained-diloco" / "model.safetensors")
        assert same(written, net.state_dict())


def test_frozen_weights_that_nobody_can_give_are_refused_by_name(serve, tmp_path):
    host = serve()
    (a, _), (b, _) = adapted(host, "a", 1), adapted(host, "b", 2)
    a.start()
    says = r"frozen tensor 'base.weight' has other numbers than that of a on .*-m that holds them"
    with pytest.raises(Refused, match=says):
        b.start()
    host.kill()  # the checkpoint knows too
    again = serve("--port", host.port, "--worker-timeout", 1)
    a.close()
    with pytest.raises(Refused, match=says):
        adapted(again, "b", 2)[0].start()
    c, _ = adapted(again, "c", 1)
    c.start()
    c.close()


def test_wrong_weights_are_refused_although_an_adapter_may_be_missing(serve, tmp_path):
    for name, tensors, says in [
        ("other", {"base.weight": torch.zeros(4, 4), "base.x": torch.zeros(4)}, "'head.weight'"),
        ("shape", {"base.weight": torch.zeros(3, 3), "base.bias": torch.zeros(4)},
         r"frozen tensor 'base.weight' is \[3, 3\] in -m and \[4, 4\] here"),
    ]:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        host = serve("-m", folder)
        worker, _ = adapted(host, "a", 1)
        with pytest.raises(Refused, match=says):
            worker.start()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "model._orig_mod."])
def test_weights_that_were_saved_from_a_wrapped_model_lose_its_prefix(serve, tmp_path, prefix):
    right = Adapted(1)
    for tensors, folder in ((right.state_dict(), "whole"), (base_of(right), "base")):
        (tmp_path / folder).mkdir()
        wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
        save_file(wrapped, tmp_path / folder / "model.safetensors")
        for run in range(2):  # the second goes on from the first one's checkpoint
            host = serve("-m", tmp_path / folder, "--until-done")
            worker, net = adapted(host, "a", 2 + run)
            worker.start()
            assert same(base_of(net), base_of(right))
            assert run or folder == "base" or same(net.state_dict(), right.state_dict())
            net.head.weight.grad = torch.ones(2, 4)
            worker.trained.optimizers[-1].step()
            worker.flush()
            worker.close()
            assert host.wait() == 0
            written = load_file(tmp_path / f"{folder}-diloco" / "model.safetensors")
            assert same(written, net.state_dict())


def test_a_prefix_of_all_names_is_named_where_they_do_not_fit_without_it(tmp_path):
    head = protocol.TensorSpec("head", torch.float32, (2,))
    for names, is_told in ((["module.x", "module.y"], True), (["module.x", "y"], False)):
        save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
        store = server.Store(str(tmp_path))
        store.open("bf16", "bf16", True)
        server.unwrap(store, ["head"])
        with pytest.raises(Refused, match="'head'") as error:
            store.fit([head], [], {})
        assert ("all names in -m begin with 'module.'" in str(error.value)) == is_told
    # Once they fit a worker, the names stay as they are for all others.
    save_file({"model.x": torch.ones(2)}, tmp_path / "model.safetensors")
    for first, then in ((["model.x"], ["x"]), (["x"], ["model.x"])):
        store = server.Store(str(tmp_path))
        store.open("bf16", "bf16", True)
        server.unwrap(store, first)
        server.unwrap(store, then)
        assert [*store.weights] == first


def test_names_are_matched_without_the_wrappers_of_adapters_and_of_bare_models():
    one, two, three = (torch.zeros(k) for k in (1, 2, 3))
    file = {"transformer.h.0.weight": one, "h.1.weight": two, "lm_head.weight": three}
    names = {
        "base_model.model.transformer.h.0.base_layer.weight": one,
        "transformer.h.1.weight": two,
        "base_model.model.lm_head.weight": three,
        "base_model.model.transformer.h.0.lora_A.default.weight": None,
    }
    found = matched(file, names)
    assert {name: found.get(name) for name in names} == names
    # A file of parts is not the file of a bare model.
    assert matched({"embed.weight": one}, ["encoder.embed.weight", "decoder.embed.weight"]) == {}


def test_a_fingerprint_tells_the_bits_of_a_tensor(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    raw = struct.pack("<6f", *range(6))
    assert protocol.fingerprint(values) == hashlib.blake2b(raw, digest_size=16).hexdigest()
    columns = torch.arange(6.0).reshape(3, 2).t().contiguous().t()  # in memory column by column
    assert protocol.fingerprint(columns) == protocol.fingerprint(torch.arange(6.0))
    large = torch.randn(protocol.CHUNK + 7)
    expected = hashlib.blake2b(large.numpy().tobytes(), digest_size=16).hexdigest()
    assert protocol.fingerprint(large) == expected


class Copied(torch.nn.Module):
    """As peft's `modules_to_save` wraps a layer of which it trains a copy."""

    def __init__(self, seed):
        super().__init__()
        self.base = Adapted(1, head=False).base
        torch.manual_seed(seed)
        self.head = torch.nn.Module()
        self.head.original_module = torch.nn.Linear(4, 2).requires_grad_(False)
        self.head.modules_to_save = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2)})


def test_a_layer_of_which_an_adapter_trains_a_copy_is_no_frozen_one(serve, tmp_path):
    folder = tmp_path / "pretrained"
    folder.mkdir()
    save_file(base_of(Adapted(1)), folder / "model.safetensors")  # and no head, which is new
    host = serve("-m", folder)
    first, second = Copied(2), Copied(3)
    before = second.head.original_module.weight.clone()
    for name, net in (("a", first), ("b", second)):
        optimizer = torch.optim.SGD(net.head.modules_to_save.parameters(), lr=0.1)
        with_it = DiLoCoWorker(net, optimizer, host.address, 1, worker_id=name)
        with_it.start()
        with_it.close()
    assert same(first.head.modules_to_save.state_dict(), second.head.modules_to_save.state_dict())
    assert torch.equal(second.head.original_module.weight, before)


class FetchGate(Gate):
    """A relay that cuts the first reply which brings frozen weights."""

    cut_once = False

    def frame(self, stream):
        fields, raw, size = Gate.frame(self, stream)
        if fields["type"] == "fetch" and size and not self.cut_once:
            self.cut_once = True
            raise ConnectionError
        return fields, raw, size


def test_frozen_weights_that_do_not_come_at_once_are_asked_for_again(serve, tmp_path, capfd):
    folder = tmp_path / "pretrained"
    folder.mkdir()
    save_file(base_of(Adapted(1)), folder / "model.safetensors")
    gate = FetchGate(serve("-m", folder, "--worker-timeout", 1))
    worker, net = adapted(gate, "a", 2)
    worker.start()
    worker.close()
    assert gate.cut_once and same(base_of(net), base_of(Adapted(1)))
    assert "WARNING" not in capfd.readouterr().err  # nothing was dropped
