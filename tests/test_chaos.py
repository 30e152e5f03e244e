"""A minute of faults with fixed seeds; tests/chaos.py says what happens and what must hold.

python -m pytest tests/test_chaos.py
"""

import os

import pytest
from conftest import ROOT

SECONDS = 30.0


@pytest.mark.parametrize(("mode", "seed"), [("full", 18), ("streaming", 23)])
def test_every_step_counts_once_under_faults(start, tmp_path, mode, seed):
    chaos = start(
        os.path.join(ROOT, "tests", "chaos.py"),
        *("--seed", seed, "--minutes", SECONDS / 60, "--mode", mode, "--keep", tmp_path / "run"),
    )
    assert chaos.wait(SECONDS + 180) == 0, chaos.output
