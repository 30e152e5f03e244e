"""What a GPU may do otherwise than a CPU: numbers, streams, ranks, time. Real servers and workers.

    python tests/gpu.py                     # all checks, on a machine with CUDA
    python tests/gpu.py --only bits,kinds   # some of them
    python tests/gpu.py --device cpu        # what a CPU can do of it, so that this file is known to work

Each check prints a line: ok, FAILED, or not here and why. Exit status: 0 if none has failed, 1 if one
has, 2 where there is no CUDA.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from fractions import Fraction

import torch
import torch.distributed as dist
import toy_worker

from diloco_callback import DiLoCoWorker

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PLAIN = ["--upload-codec", "fp32", "--download-codec", "fp32"]
SMALL = ["--set=model.hidden_size=32", "--set=train.context=32", "--set=model.num_hidden_layers=1",
         "--set=data.source=builtin", "--set=output.eval_tokens=64"]  # fmt: skip
DEADLINE = 120.0  # seconds that anything may take
CHECKS = {}  # name -> function of a torch.device


class NotHere(Exception):
    """A check needs something that this machine lacks; the message names it."""


def check(function):
    CHECKS[function.__name__] = function
    return function


def needs(condition, what):
    if not condition:
        raise NotHere(what)


# --- Servers and workers -------------------------------------------------------------------------


@contextlib.contextmanager
def serving(*options):
    """The address of a server with a folder of its own, in a process that ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        place = [
            os.path.join(ROOT, "server.py"),
            "-m",
            os.path.join(folder, "model"),
            "--port",
            "0",
        ]
        with process(*place, *options) as server:
            for line in server.stdout:
                if found := re.search(r"listening on port (\d+)", line):
                    break
            else:
                raise RuntimeError("the server has ended before it listened")
            threading.Thread(target=server.stdout.read, daemon=True).start()
            yield f"127.0.0.1:{found[1]}"


@contextlib.contextmanager
def process(*command):
    """A script of the project as a process, which ends with the block."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": ROOT}
    running = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def output_of(*commands):
    """What processes that run at the same time have said, if all of them end well."""
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(process(*command)) for command in commands]
        found = together(
            *(functools.partial(each.communicate, timeout=DEADLINE) for each in running)
        )
        for each, (text, _) in zip(running, found, strict=True):
            assert each.returncode == 0, text[-3000:]
        return [text for text, _ in found]


def together(*calls):
    """The results of calls that are made at the same time, each in a thread. Raises their errors."""
    results, errors = {}, []

    def run(i, call):
        try:
            results[i] = call()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(i, call), daemon=True) for i, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    if errors:
        raise errors[0]
    assert len(results) == len(calls), f"still running after {DEADLINE:.0f} s"
    return [results[i] for i in range(len(calls))]


def until(condition):
    """Wait for something; False where it does not come in time."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


def flat(model):
    """All parameters as one float32 vector on the CPU."""
    parameters = (getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters())
    return torch.cat([p.detach().float().reshape(-1).cpu() for p in parameters])


def train(address, name, model, optimizers, step, steps, **options):
    """Train with a server, by step(index) -> loss; returns (worker, final parameters, losses)."""
    options = {"sync_every": 8, **options}
    with DiLoCoWorker(model, optimizers, address, worker_id=name, **options) as worker:
        losses = [torch.as_tensor(step(i)).item() for i in range(steps)]
    assert worker.replica.mismatches == 0, "an entry led to other bits here than on the server"
    return worker, flat(model), losses


def batch(model, seed, index):
    """float32 [8, 20] on the device of the model's first layer."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    return torch.randn(8, 20, generator=generator).to(next(model.parameters()).device)


def plainly(device, dtype="float32", seed=0):
    """(model, optimizers, step) with nothing special about it."""
    model = toy_worker.build((20, 67, 5), dtype).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(i):
        x = batch(model, seed, i).to(getattr(torch, dtype))
        loss = (model(x) - x[:, :5]).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return model, optimizer, step


# --- Numbers -------------------------------------------------------------------------------------


@check
def fractions(device):
    """Full sync and streaming come to the numbers of exact fractions."""
    try:
        from peers import Counter, simulate, spread
    except ModuleNotFoundError as error:
        raise NotHere(f"pip install -r tests/requirements.txt ({error})") from None
    kinds = [(1, 0, "rebase"), (2, 1, "mix"), (4, 2, "rebase"), (4, 2, "predict")]
    for count, delay, update in kinds:
        nesterov = update != "predict"
        outer = ["--outer-lr", "0.5", "--outer-momentum", "0.5", "--no-momentum-warmup"]
        options = {"sync_every": 8, "num_fragments": count, "fragment_sync_delay": delay}
        plain = [*PLAIN, *outer, *([] if nesterov else ["--no-nesterov"])]
        with serving("-n", "2", *plain) as address, torch.device(device):
            server = type("Server", (), {"address": address})
            made = [
                Counter(server, f"w{i}", gain, fragment_update=update, **options)
                for i, gain in enumerate((1.0, 0.5))
            ]
            for counter in made:
                counter.finish(21)
            ends = [counter.result() for counter in made]
        half = Fraction(1, 2)
        trails, end = simulate((1.0, 0.5), 21, 8, count, delay, update, half, half, half, nesterov)
        assert ends == [spread(end)] * 2, (count, delay, update)
        for counter, trail in zip(made, trails, strict=True):
            assert counter.trail == [spread(row) for row in trail], (count, delay, update)


def side_by_side(first, second, *options):
    """Train two workers in one run, given as what `train` takes behind the name; check that they end
    with the same bits. Returns what `train` returned for the first."""
    with serving("-n", "2", *options) as address:
        calls = [
            functools.partial(train, address, f"w{k}", *given, **more)
            for k, (given, more) in enumerate((first, second))
        ]
        (worker, here, losses), (_, there, _) = together(*calls)
    assert torch.equal(here, there), "the two workers end with different bits"
    assert losses[-1] < losses[0], losses
    return worker


@check
def bits(device):
    """A worker on the device and one on the CPU adopt the same bits, with each codec."""
    for up, down, dtype, count in [
        ("fp32", "fp32", "float32", 1),
        ("bf16", "bf16", "bfloat16", 3),
        ("int8", "int8", "float32", 3),
        ("int4", "int4", "bfloat16", 1),
        ("int2", "int2", "float32", 3),
        ("top16", "int4", "float32", 3),
        ("top32", "bf16", "float32", 1),
    ]:
        pair = [
            ((*plainly(place, dtype, k), 21), {"num_fragments": count})
            for k, place in enumerate((device, "cpu"))
        ]
        side_by_side(*pair, "--upload-codec", up, "--download-codec", down)


def kinds_of(device):
    """Yield (name, model, optimizers, step, steps that are none) of training in many ways."""
    for name in ("autocast", "scaler", "fused", "muon", "compiled"):
        model = toy_worker.build((20, 67, 5)).to(device)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        fused = {"fused": True} if name in ("fused", "scaler") else {}
        adamw = torch.optim.AdamW(
            vectors if name == "muon" else [*model.parameters()], 0.01, **fused
        )
        optimizers = [torch.optim.Muon(matrices, 0.01), adamw] if name == "muon" else [adamw]
        scaler = torch.amp.GradScaler(device.type, init_scale=8.0, enabled=name == "scaler")
        backend = "inductor" if device.type == "cuda" else "eager"
        called = torch.compile(model, backend=backend) if name == "compiled" else model
        low = {"autocast": torch.bfloat16, "scaler": torch.float16}.get(name)
        low = torch.bfloat16 if low and device.type == "cpu" else low

        def step(i, name=name, model=model, called=called, low=low, own=optimizers, scaler=scaler):
            x = batch(model, 0, i)
            with torch.autocast(device.type, low, enabled=low is not None):
                loss = (called(x) - x[:, :5]).float().square().mean()
            for optimizer in own:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
            if name == "scaler" and i in (3, 9):
                model[0].weight.grad[0, 0] = torch.inf
            for optimizer in own:
                scaler.step(optimizer)
            scaler.update()
            return loss

        yield name, called, optimizers, step, 2 if name == "scaler" else 0


@check
def kinds(device):
    """Autocast, GradScaler, fused AdamW, torch.compile, Muon: steps count once, all end alike."""
    told = []
    for name, model, optimizers, step, none in kinds_of(device):
        own = (model, optimizers, step, 20 + none), {"num_fragments": 2}
        worker = side_by_side(own, ((*plainly("cpu"), 20), {"num_fragments": 2}))
        assert worker.local_step == 20 and worker.skipped in (0, none), (name, worker.local_step)
        told.append(name)
    return ", ".join(told)


@check
def drops(device):
    """Numbers that are not finite cost the steps since the push before, and no more."""
    model, optimizer, step = plainly(device)

    def bad(i):
        if i == 9:
            model[0].weight.data[0, 0] = torch.nan
        return step(i)

    with serving() as address:
        worker, final, _ = train(address, "w0", model, optimizer, bad, 21, num_fragments=2)
    assert 0 < worker.dropped_steps <= 8 and final.isfinite().all()


@check
def devices(device):
    """A model on two devices, next to one on the CPU."""
    needs(torch.cuda.device_count() > 1 and device.type == "cuda", "two GPUs")
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    model, _, _ = plainly("cpu")
    model[0].to(first), model[1].to(second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(i):
        x = batch(model, 0, i)
        loss = (model[1](model[0](x).to(second)) - x[:, :5].to(second)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    own = (model, optimizer, step, 21), {"num_fragments": 3}
    side_by_side(own, ((*plainly("cpu"), 21), {"num_fragments": 3}))


# --- Streams -------------------------------------------------------------------------------------


@check
def pinned(device):
    """What goes to the network and comes from it lies in pinned memory."""
    needs(device.type == "cuda", "a GPU")
    with serving() as address:
        worker, *_ = train(address, "w0", *plainly(device), 9)
    slice = worker.slices[0]
    assert slice.payload.raw.is_pinned() and slice.update.raw.is_pinned()
    assert slice.anchor.is_cuda and all(stage.raw.is_cuda for stage in slice.stages.values())


@check
def waits(device):
    """Between boundaries no step waits for the GPU, also where a slice travels."""
    needs(device.type == "cuda", "a GPU")
    model, optimizer, _ = plainly(device)
    training, seen, inside = threading.get_ident(), [], []

    def note(message, *_, **more):
        if threading.get_ident() == training and not inside and "synchroniz" in str(message):
            seen.append("".join(traceback.format_stack(limit=12)[:-1]))

    x = batch(model, 0, 0)

    def step_alone():
        loss = (model(x) - x[:, :5]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with (
        serving() as address,
        warnings.catch_warnings(),
        DiLoCoWorker(model, optimizer, address, 16, "w0", num_fragments=4) as worker,
    ):
        is_busy = worker.leader.is_busy
        worker.leader.is_busy = lambda: bool(is_busy()) and not inside.append(1)
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(100):
                step_alone()
                inside.clear()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert worker.sync_count > 3
    assert not seen, f"{len(seen)} times, such as in\n{seen[0]}"


@check
def overtakes(device):
    """A slice travels while training's steps still wait for the GPU: it does not queue behind them."""
    needs(device.type == "cuda", "a GPU")
    model, optimizer, step = plainly(device)
    options = {"num_fragments": 2, "fragment_sync_delay": 4}
    with serving() as address, DiLoCoWorker(model, optimizer, address, 8, **options) as worker:
        for i in range(24):  # all kernels are loaded by then, which waits for a GPU itself
            step(i)
        torch.cuda.synchronize()
        for i in range(4):
            step(i)
        torch.cuda._sleep(4_000_000_000)  # cycles; about two seconds
        asleep = torch.cuda.Event()
        asleep.record()
        assert until(lambda: worker.replica.listed or asleep.query())
        was_asleep = not asleep.query()
        torch.cuda.synchronize()
    assert was_asleep, "the push was not through before the steps that were queued behind it"


@check
def elsewhere(device):
    """Training in a stream that is not the default one ends with the same bits as on the CPU."""
    needs(device.type == "cuda", "a GPU")
    stream, (model, optimizer, step) = torch.cuda.Stream(), plainly(device)

    def inside(i):
        with torch.cuda.stream(stream):
            return step(i).item()

    own = (model, optimizer, inside, 60), {"num_fragments": 4}
    side_by_side(own, ((*plainly("cpu"), 60), {"num_fragments": 4}))


# --- Ranks ---------------------------------------------------------------------------------------


@check
def ranks(device):
    """Two ranks with DistributedDataParallel have the same bits: NCCL with two GPUs, else gloo."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [os.path.join(ROOT, "tests", "ddp_worker.py"), "--device", device.type]
    with serving() as address:
        (text,) = output_of([*torchrun, *script, "--server", address, "--worker-id", "w0"])
    said = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert len(said) == 2 and said[0]["digests"] == said[1]["digests"]
    assert {line["syncs"] for line in said} == {4}


@check
def shards(device):
    """A model in shards (FSDP2, one rank) and one on the CPU end with the same bits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (1,))
        model = toy_worker.build((20, 67, 5)).to(device)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], 0.01)
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1], 0.01)

        def step(i):
            x = batch(model, 0, i)
            loss = (model(x) - x[:, :5]).square().mean()
            loss.backward()
            for each in (optimizer, adamw):
                each.step()
                each.zero_grad()
            return loss

        own = (model, [optimizer, adamw], step, 21), {"num_fragments": 2}
        side_by_side(own, ((*plainly("cpu"), 21), {"num_fragments": 2}))
    finally:
        dist.destroy_process_group()


@check
def script(device):
    """worker.py trains there, saves, and goes on from its checkpoint."""
    with tempfile.TemporaryDirectory() as folder, serving() as address:
        place = [os.path.join(ROOT, "worker.py"), os.path.join(ROOT, "default.yaml"), *SMALL]
        place += ["--server", address, "--worker-id", "w0", "--sync-every", "4"]
        place += [f"--output-dir={folder}/out", f"--device={device.type}"]
        output_of([*place, "--max-steps=10"])
        (text,) = output_of([*place, "--max-steps=18", "--resume"])
    assert "resumed from" in text and "final validation loss" in text, text


# --- Time ----------------------------------------------------------------------------------------


@check
def seconds(device):
    """Says how long a step takes, alone and with four fragments, in turn."""
    width, layers, count = (2048, 12, 60) if device.type == "cuda" else (64, 3, 20)
    model = toy_worker.build([width] * (layers + 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(4096 if device.type == "cuda" else 8, width, device=device)

    def steps():
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        wait()
        return (time.perf_counter() - began) / count

    steps()
    alone, along = [], []
    for turn in range(3):
        alone.append(steps())
        with serving() as address:
            options = {"sync_every": count // 2, "num_fragments": 4}
            with DiLoCoWorker(model, optimizer, address, worker_id=f"w{turn}", **options) as worker:
                steps()
                along.append(steps())
                waited = worker.waited
    ratios = sorted(b / a for a, b in zip(alone, along, strict=True))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{size:.1f} million parameters, a step of {min(alone) * 1e3:.2f} ms takes {ratios[1]:.3f} "
        f"times as long ({ratios[0]:.3f} to {ratios[2]:.3f}), waited {waited:.2f} s"
    )


def run(names, device):
    """Run checks and print a line for each; returns how many have failed."""
    failed = 0
    for name in names:
        began, log = time.monotonic(), io.StringIO()
        try:
            with contextlib.redirect_stderr(log):
                told = CHECKS[name](device) or ""
            verdict = "ok" + (f": {told}" if told else "")
        except NotHere as lack:
            verdict = f"not here: needs {lack}"
        except Exception:
            failed += 1
            verdict = f"FAILED\n{log.getvalue()[-2000:]}{traceback.format_exc()}"
        print(f"{name:10} {time.monotonic() - began:6.1f} s  {verdict}", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description="What a GPU may do otherwise than a CPU.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--only", help="names of checks: " + ",".join(CHECKS))
    args = parser.parse_args()
    device = torch.device(args.device)
    names = args.only.split(",") if args.only else [*CHECKS]
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"there is no check {unknown[0]!r}: {', '.join(CHECKS)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("not here: this machine has no CUDA, or torch was built without it")
        return 2
    if device.type == "cuda":
        print(f"{torch.cuda.device_count()} times {torch.cuda.get_device_name(device)}")
    print(f"torch {torch.__version__}, checks on {device}", flush=True)
    return 1 if run(names, device) else 0


if __name__ == "__main__":
    sys.exit(main())
