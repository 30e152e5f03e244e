"""The optimizer that tests/levers.py steps with is torch's.

python -m pytest tests/test_levers.py
"""

import levers
import pytest
import torch


def test_stacked_matrices_make_the_steps_of_torchs_muon():
    shapes = (8, 8), (12, 8), (8, 8), (8, 20)
    weights = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    stacked = levers.StackedMuon([torch.optim.Muon(ours, lr=0.01, weight_decay=0.1)])
    muon = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        stacked.step(0.01)
        muon.step()
    for weight, one, other in zip(weights, ours, theirs, strict=True):
        step = (other - weight).abs().max().item()
        assert (one - other).abs().max().item() < 0.05 * step  # torch's sums are bfloat16's


def test_a_row_is_named_by_its_fields():
    rows = levers.rows_of(["up=int4,int2", "every=20", "momentum=.8", "+", "optimizer=muon"])
    assert [row.up for row in rows] == ["int4", "int2", "fp32"]
    assert [(row.rounds, row.momentum, row.rate) for row in rows] == [
        (60, 0.8, 0.004), (60, 0.8, 0.004), (30, 0.6, 0.006),
    ]  # fmt: skip
    # 32 + 2 bytes for 64 numbers, both ways, in 60 rounds
    assert levers.megabytes(rows[0]) == pytest.approx(60 * 2 * 34 / 64, rel=1e-3)
    with pytest.raises(SystemExit, match="rounds is no field"):
        levers.rows_of(["rounds=4"])


def test_what_a_codec_loses_is_kept_as_the_codec_has_it():
    row, always, never = (levers.Row(feedback=feedback) for feedback in (-1, 1, 0))
    assert [levers.keeps(row, name) for name in ("bf16", "int4")] == [False, True]
    assert levers.keeps(always, "bf16") and not levers.keeps(never, "int4")
