"""What can be known without a GPU of how the callback uses one, and that tests/gpu.py itself works.

python -m pytest tests/test_gpu.py
"""

import contextlib
import types

import gpu
import pytest
import torch
from peers import numbers, same_bits

import protocol
from diloco_callback import Slice
from protocol import CODECS, FlatModel

pytestmark = pytest.mark.usefixtures("clean")


def test_checks_run_and_say_what_came_of_them(serve, monkeypatch, capsys):
    @contextlib.contextmanager
    def serving(*options):
        yield serve(*options).address

    def broken(device):
        assert device.type == "cuda", "it is no GPU"

    monkeypatch.setattr(gpu, "serving", serving)
    monkeypatch.setitem(gpu.CHECKS, "broken", broken)
    assert gpu.run(["drops", "pinned", "broken"], torch.device("cpu")) == 1
    said = capsys.readouterr().out
    for line in ("drops .* s  ok", "pinned .* s  not here: needs a GPU", "broken .* s  FAILED"):
        assert gpu.re.search(line, said), said
    assert "it is no GPU" in said


@pytest.mark.parametrize("is_there", [False, True])
def test_a_machine_without_cuda_is_told_apart_from_one_where_a_check_fails(
    monkeypatch, capsys, is_there
):
    monkeypatch.setattr(gpu.sys, "argv", ["gpu.py", "--only", "drops"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(gpu, "run", lambda names, device: 1)
    assert gpu.main() == (1 if is_there else 2)
    assert ("a GPU" if is_there else "no CUDA") in capsys.readouterr().out


@pytest.mark.parametrize("name", [*CODECS])
def test_numbers_that_go_by_way_of_a_stage_are_the_same(monkeypatch, name):
    """As on a GPU, where a codec works on one chunk beside the parameters and not in the message."""
    monkeypatch.setattr(protocol, "CHUNK", 4096)
    monkeypatch.setattr(CODECS[name], "size", 4096)
    found = []
    for is_staged in (False, True):
        model = FlatModel([numbers(1, 9001), numbers(2, 1000).bfloat16()])
        slice = Slice(model, CODECS[name], CODECS[name], CODECS[name].feedback, True)
        slice.anchor.copy_(numbers(3, 10_001))
        if is_staged:
            slice.device = types.SimpleNamespace(type="elsewhere")
            for count in (4096, 10_001 - 2 * 4096):
                stage = protocol.Payload(CODECS[name].layout(count))
                slice.stages[CODECS[name], count] = stage
        slice.outer = (0.7, 0.9, True, 1.0)
        slice.begin(True, True)
        slice.finish_encoding()
        pushed = slice.payload.raw.clone()
        slice.update.raw[: len(pushed)].copy_(pushed)
        slice.take(False, learns=True)
        slice.adopt()
        vectors = [pushed, slice.anchor, slice.velocity, *(part[0] for part in model.parts)]
        found.append([*vectors, *([] if slice.residual is None else [slice.residual])])
    assert len(found[0]) == len(found[1]) > 4
    assert all(same_bits(*pair) for pair in zip(*found, strict=True))
    assert found[0][0].any() and found[0][2].any()
