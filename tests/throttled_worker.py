"""worker.py on a slow machine: each of its steps takes so many seconds at least.

    python tests/throttled_worker.py 0.24 48 --server 127.0.0.1:8512 --worker-id dan small.yaml

The first argument is that time. The second one is how many seconds after its first step the worker
begins no more steps: it waits until the run is stopped. So the steps that it has made do not depend on when
word of the stop arrives (inf: it never stops by itself). All others are worker.py's own. A step sleeps
before its optimizer steps, so that syncs come after the sleep and what is waited in one is no part of a
step. A step that took too long, on a machine that is busy with others, is made up for by shorter ones.
Prints `first step` when the training begins, and at the end `made N steps` and how many seconds behind
their time they still were.
"""

import math
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from torch.optim.optimizer import register_optimizer_step_pre_hook

import protocol
import worker

IDLE_SECONDS = 0.05  # how often a worker that has made its steps looks for the end of the run


class Throttle:
    """Makes the steps of the worker of this process take `seconds` at least, and begins none `last`
    seconds after the first one or later."""

    def __init__(self, seconds, last):
        self.seconds = seconds
        self.ends = math.inf  # when no more steps begin
        self.steps = 0  # that have begun
        self.began = 0.0  # when the step did that is under way
        self.behind = 0.0  # seconds that steps took too long and no later step has made up for
        train_step = worker.Run.train_step

        def timed_step(run):
            self.began = time.monotonic()
            if not self.steps:
                self.ends = self.began + last
                print("first step", flush=True)
            if self.began >= self.ends:
                time.sleep(IDLE_SECONDS)
                return
            self.steps += 1
            train_step(run)

        worker.Run.train_step = timed_step
        register_optimizer_step_pre_hook(self.sleep)

    def sleep(self, *_):
        """Sleep until the step that is under way has taken its time, less what earlier ones took too
        long."""
        left = self.began + self.seconds - time.monotonic() - self.behind
        self.behind = max(0.0, -left)
        time.sleep(max(0.0, left))


def main():
    throttle = Throttle(float(sys.argv[1]), float(sys.argv[2]))
    status = worker.main(sys.argv[3:])
    print(f"made {throttle.steps} steps, {throttle.behind:.2f} s behind their time", flush=True)
    return status


if __name__ == "__main__":
    status = main()
    protocol.flush_output()
    sys.exit(status)
