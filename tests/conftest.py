"""What the tests share: a real server as a process, toy workers as processes, and deadlines.

Run all of them:  pip install -r requirements.txt -r tests/requirements.txt && python -m pytest
"""

import contextlib
import functools
import json
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(1)
DEADLINE = 60.0  # seconds after which an awaited event counts as missing, on a busy machine too
ENV = {
    **{k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")},
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": ROOT,
    "HF_HUB_OFFLINE": "1",
}
# What processes have imported when they start; the second is what an optimizer's first step imports.
TORCH = ("torch", "torch._dynamo")
LAUNCHER = (*TORCH, "torch.distributed.run")
TRAINER = (*TORCH, "transformers.trainer", "transformers.models.gpt2.modeling_gpt2")


def lacking(what, command):
    """Skip a test for something that this machine lacks and that a command would install."""
    pytest.skip(f"{what} is missing here: {command}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With DILOCO_ALL_TESTS=1 a test that is skipped has failed."""
    report = yield
    if report.skipped and os.environ.get("DILOCO_ALL_TESTS") == "1":
        report.outcome, report.longrepr = "failed", f"{report.longrepr[2]} (DILOCO_ALL_TESTS=1)"
    return report


def pytest_terminal_summary(terminalreporter):
    """Say loudly, once for each reason, that tests were skipped."""
    reports = terminalreporter.stats.get("skipped", [])
    for reason, count in Counter(report.longrepr[2] for report in reports).items():
        terminalreporter.write_line(f"NOT run: {count} test(s). {reason}", red=True, bold=True)


def until(condition, what, seconds=DEADLINE):
    """Poll `condition` until it is true and return its value; fail after a deadline."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    pytest.fail(f"not within {seconds:.0f} s: {what}")


@functools.cache
def forker(imports):
    """A tests/forker.py that has imported these modules, and the socket on which it is asked. It
    ends with the tests. Its output is a pipe as theirs are, or Python took it for a file."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, os.path.join(ROOT, "tests", "forker.py"), str(theirs.fileno())]
    process = subprocess.Popen(
        [*command, *imports],
        stdout=subprocess.PIPE,
        env=ENV,
        cwd=ROOT,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return process, ours


class Forked:
    """A process of tests/forker.py, with as much of a Popen as the tests need."""

    def __init__(self, command, env, cwd, imports):
        self.told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        output, its_output = os.pipe()
        request = json.dumps({"command": command, "env": env, "cwd": os.fspath(cwd)}).encode()
        _, asked = forker(imports)
        socket.send_fds(asked, [request], [its_output, theirs.fileno()])
        os.close(its_output)
        theirs.close()
        self.stdout, self.returncode = os.fdopen(output), None
        self.pid = int(self.told.recv(32))

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a process", timeout)
            self.returncode = int(self.told.recv(32))
            self.told.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Process:
    """A script of the project as a process whose output can be waited for. It has imported torch,
    or `imports`, unless it is to be `fresh`."""

    def __init__(self, *command, env=None, cwd=None, fresh=False, imports=TORCH):
        command, env, cwd = list(map(str, command)), {**ENV, **(env or {})}, cwd or ROOT
        if fresh or sys.platform != "linux":
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
                cwd=cwd,
            )
        else:
            self.process = Forked(command, env, cwd, imports)
        self.lines, self.queue = [], queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self.queue.put(line)
        self.queue.put(None)

    @property
    def output(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern, seconds=DEADLINE):
        """The match of a regular expression with a line of output, past or to come."""
        end, seen = time.monotonic() + seconds, 0
        while True:
            for line in self.lines[seen:]:
                seen += 1
                if match := re.search(pattern, line):
                    return match
            left = end - time.monotonic()
            try:
                ended = self.queue.get(timeout=max(0.0, left)) is None
            except queue.Empty:
                pytest.fail(f"no line matches {pattern!r} in:\n{self.output}")
            if ended and seen == len(self.lines):
                pytest.fail(f"ended without a line that matches {pattern!r}:\n{self.output}")

    def wait(self, seconds=DEADLINE):
        """The exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds:.0f} s:\n{self.output}")
        self.reader.join(5)
        return code

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        """End it at once, whatever it is doing."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def clean(monkeypatch):
    """No settings of the surroundings; workers of this process that a test leaves are closed."""
    from diloco_callback import STARTED

    for name in [name for name in os.environ if name.startswith("DILOCO_")]:
        monkeypatch.delenv(name, raising=False)
    yield
    for worker in list(STARTED):
        worker.close()


@contextlib.contextmanager
def ending(make, end):
    """Yields a function that makes things as `make` does, and calls end(thing) of each at the end."""
    with contextlib.ExitStack() as stack:

        def run(*command, **options):
            found = make(*command, **options)
            stack.callback(end, found)
            return found

        yield run


@pytest.fixture
def start():
    """start(script, *args): a Process that is ended with the test."""
    with ending(Process, Process.kill) as run:
        yield run


@pytest.fixture
def mesh():
    """A mesh of one rank of torch.distributed, in this process."""
    import torch.distributed as dist  # for those tests only, as it takes long to import
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def serve(start, tmp_path):
    """serve(*args): a server on a free port, with `.port` and `.address`. `-m` is the folder
    `model` in the test's folder unless it is among the arguments."""

    def run(*args, **options):
        folder = [] if "-m" in args else ["-m", tmp_path / "model"]
        server = start(os.path.join(ROOT, "server.py"), *folder, "--port", 0, *args, **options)
        server.port = int(server.wait_for(r"listening on port (\d+)")[1])
        server.address = f"127.0.0.1:{server.port}"
        return server

    return run


@pytest.fixture
def toy(start):
    """toy(server, worker_id, **options): tests/toy_worker.py as a process; see there. Its last
    line is JSON, which `result(process)` returns."""

    def run(server, worker_id, **options):
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        script = os.path.join(ROOT, "tests", "toy_worker.py")
        return start(script, "--server", server.address, "--worker-id", worker_id, *arguments)

    return run


def result(process):
    """What a toy worker that has ended well says of itself."""
    assert process.wait() == 0, process.output
    return json.loads(process.lines[-1])


def digest_of(folder):
    """The same hash as toy_worker.digest of the model that a server has written."""
    import toy_worker
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return toy_worker.digest_of(tensors[name] for name in toy_worker.build((5, 7, 2)).state_dict())


def status(server):
    """What the server tells status.py."""
    import protocol

    conn, _ = protocol.connect(server.address, {})
    with contextlib.closing(conn):
        return conn.request("status").fields


# --- What a run should come to, worked out in one process on whole tensors -------------------


def flat(model):
    """All parameters of a model as one float32 vector."""
    return torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])


def put(model, vector):
    """Fill the parameters of a model from a vector, in place."""
    parts = vector.split([p.numel() for p in model.parameters()])
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.copy_(part.view(parameter.shape))
    return model


ROUNDING = "fp32", "bf16"  # codecs of which no residual is kept


def rounded(vector, codec):
    """What a vector is after a codec has had it, worked out with numpy on the whole of it."""
    if codec == "fp32":
        return vector.float()
    if codec == "bf16":
        return vector.bfloat16().float()
    if codec.startswith("top"):
        return torch.cat(
            [largest(chunk.float(), int(codec[3:])) for chunk in vector.split(1 << 19)]
        )
    blocks = blocks_of(vector.float(), 64)
    scale, inverse = scales_of(blocks, {"int8": 127, "int4": 7, "int2": 2.5}[codec])
    if codec == "int2":
        levels = np.clip(np.floor(blocks * inverse), -2, 1) + np.float32(0.5)
    else:
        levels = np.rint(blocks * inverse) + np.float32(0)  # which has no -0.0
    return torch.from_numpy((levels * scale).reshape(-1)[: vector.numel()].copy())


def blocks_of(vector, size):
    """A vector as rows of so many numbers, the last one filled with zeros."""
    padded = np.zeros(-(-vector.numel() // size) * size, dtype=np.float32)
    padded[: vector.numel()] = vector.numpy()
    return padded.reshape(-1, size)


def scales_of(blocks, top):
    """(scales, their reciprocals) of rows whose largest number is `top` scales, as columns."""
    largest = np.abs(blocks).max(1, keepdims=True) / np.float32(top)
    scale = ((largest.view(np.uint32) + 0xFFFF) & 0xFFFF0000).view(np.float32)  # up, to bfloat16
    with np.errstate(divide="ignore"):
        return scale, np.where(scale > 1e-30, np.float32(1) / scale, np.float32(0))


def largest(vector, every):
    """What is left of a chunk of which one of `every` numbers is kept, in sizes from 0 to
    128 / every - 1. Numbers
    that differ in their last bits only count as equal; then the last one is kept."""
    columns = blocks_of(vector, 64 * every).reshape(every, -1)
    sizes = (np.abs(columns).view(np.uint32) & np.uint32(-every & 0xFFFFFFFF)).view(np.float32)
    places = every - 1 - sizes[::-1].argmax(0)
    kept, at = sizes.max(0), np.arange(columns.shape[1])
    scale, inverse = scales_of(kept.reshape(-1, 64), 128 // every - 1)
    levels = np.rint(kept.reshape(-1, 64) * inverse)
    found = np.zeros_like(columns)
    found[places, at] = (levels * scale).reshape(-1) * np.sign(columns[places, at])
    return torch.from_numpy(found.reshape(-1)[: vector.numel()].copy())


class Outer:
    """The server's arithmetic written out: the mean of the pushes, SGD with Nesterov momentum,
    and an update in the download codec with error feedback."""

    def __init__(self, params, codec="bf16", lr=0.7, momentum=0.9, nesterov=True, warmup=True):
        self.params, self.codec, self.lr, self.nesterov = params.clone(), codec, lr, nesterov
        self.momentum, self.warmup, self.round = momentum, warmup, 0
        self.velocity, self.residual = torch.zeros_like(params), torch.zeros_like(params)

    def step(self, pushes, closing=False):
        """One round of pushes that are not empty; `closing`: a plain mean."""
        mu = min(self.momentum, self.round / (self.round + 3)) if self.warmup else self.momentum
        self.round += 1
        if not pushes:
            return self
        mean = sum([p.float() for p in pushes[1:]], pushes[0].float()) / len(pushes)
        if closing:
            update = -mean
        else:
            self.velocity = self.velocity * mu + mean
            update = mean.add(self.velocity, alpha=mu) if self.nesterov else self.velocity
            update = update * -self.lr
        if self.codec not in ROUNDING:
            update = update + self.residual
            self.residual = update - rounded(update, self.codec)
        update = rounded(update, self.codec)
        self.params = self.params + update
        return self


def simulate(seeds, steps, sync_every, codec="bf16", dtype="float32", sizes=(5, 7, 2), **outer):
    """The run of toy workers with these data seeds: (Outer, a model with the final parameters)."""
    import toy_worker

    models = [toy_worker.build(sizes, dtype) for _ in seeds]
    runs = []
    for model, seed in zip(models, seeds, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        runs.append(toy_worker.train(model, optimizer, steps, seed))
    outer = Outer(flat(models[0]), codec, **outer)
    residuals = [torch.zeros_like(outer.params) for _ in seeds]
    while True:
        count = min(sync_every, steps)
        steps -= count
        pushes = []
        for k, (model, run) in enumerate(zip(models, runs, strict=True)):
            for _ in range(count):
                next(run)
            delta = outer.params.to(model[0].weight.dtype).float() - flat(model)
            if codec not in ROUNDING:
                delta = delta + residuals[k]
                residuals[k] = delta - rounded(delta, codec)
            delta = rounded(delta, codec)
            pushes += [delta] if count else []
        outer.step(pushes, closing=count < sync_every)
        for model in models:
            put(model, outer.params)
        if count < sync_every:
            return outer, models[0]
