"""A minute of faults with fixed seeds; tests/chaos.py says what happens and what must hold.

python -m pytest tests/test_chaos.py
"""

import contextlib
import os

import pytest
from conftest import ROOT, Process

SECONDS = 30.0
SEEDS = {"full": 18, "streaming": 23}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of both modes by name, begun at the same time, as they wait more than they work."""
    script, folder = os.path.join(ROOT, "tests", "chaos.py"), tmp_path_factory.mktemp("chaos")
    with contextlib.ExitStack() as stack:
        started = {}
        for mode, seed in SEEDS.items():
            options = ["--seed", seed, "--minutes", SECONDS / 60, "--mode", mode]
            started[mode] = Process(script, *options, "--keep", folder / mode, fresh=True)
            stack.callback(started[mode].kill)
        yield started


@pytest.mark.parametrize("mode", SEEDS)
def test_every_step_counts_once_under_faults(runs, mode):
    chaos = runs[mode]
    assert chaos.wait(SECONDS + 180) == 0, chaos.output
