"""Seconds a round of ours, of torchft's DiLoCo, and of plain HTTP with torch.save, in turn on one machine.

    python tests/bench_peers.py                                 # 50 million parameters, 2 workers
    python -m venv peer && peer/bin/pip install torch==2.13.0 torchft==0.2.0
    python tests/bench_peers.py --torchft peer/bin/python       # torchft too

Every side has processes that wait for each other before a round, a trainer that does nothing, and an
outer step of SGD with Nesterov momentum. Ours and HTTP send bf16 both ways; torchft all-reduces
float32 with gloo. HTTP is what many write first: each worker posts its pseudo-gradient to a server that
folds when it has all, and the answer is the new model.
"""

import argparse
import datetime
import http.client
import http.server
import io
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import torch

TENSOR = 1 << 20  # elements of one tensor of the model
PATIENCE = 300.0  # seconds


def shapes(count):
    return [min(TENSOR, count - start) for start in range(0, count, TENSOR)]


def rounds_of(once, barrier, count):
    """Seconds of each round, from the last start to the last end, as the first worker sees them."""
    seconds = []
    for _ in range(count):
        barrier.wait(PATIENCE)
        began = time.monotonic()
        once()
        barrier.wait(PATIENCE)
        seconds.append(time.monotonic() - began)
    return seconds


def processes(role, workers, *given):
    """Run `role(index, *given, barrier, out)` in a process for each worker: what the first one sends."""
    spawn = multiprocessing.get_context("spawn")
    barrier, (here, there) = spawn.Barrier(workers), spawn.Pipe(duplex=False)
    for index in range(workers):
        spawn.Process(target=role, args=(index, *given, barrier, there), daemon=True).start()
    if not here.poll(PATIENCE):
        sys.exit(f"{role.__name__} had no result within {PATIENCE:.0f} s")
    return here.recv()


# --- Plain HTTP with torch.save -------------------------------------------------------------


def packed(tensors):
    with io.BytesIO() as file:
        torch.save([tensor.bfloat16() for tensor in tensors], file)
        return file.getvalue()


def http_server(workers, out):
    """Fold when all have posted; everybody gets the new model."""
    torch.set_num_threads(1)
    posted, answers = [], {}
    changed, state = threading.Condition(), SimpleNamespace(model=None, outer=None, round=0)

    def fold():
        gradients = [sum(each) / workers for each in zip(*posted, strict=True)]
        if state.model is None:
            state.model = [torch.zeros_like(gradient) for gradient in gradients]
            state.outer = torch.optim.SGD(state.model, lr=0.7, momentum=0.9, nesterov=True)
        for parameter, gradient in zip(state.model, gradients, strict=True):
            parameter.grad = gradient
        state.outer.step()
        posted.clear()
        state.round += 1
        answers.clear()
        answers[state.round] = packed(state.model)
        changed.notify_all()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            gradients = [tensor.float() for tensor in torch.load(io.BytesIO(body))]
            with changed:
                wanted = state.round + 1
                posted.append(gradients)
                if len(posted) == workers:
                    fold()
                changed.wait_for(lambda: state.round >= wanted, PATIENCE)
                answer = answers[wanted]
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    out.send(server.server_port)
    server.serve_forever()


def http_worker(index, count, port, turns, barrier, out):
    torch.set_num_threads(1)
    model = [torch.zeros(size) for size in shapes(count)]
    anchor = [tensor.clone() for tensor in model]
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def once():
        difference = [old - new for old, new in zip(anchor, model, strict=True)]
        link.request("POST", "/", packed(difference))
        for old, own, new in zip(
            anchor, model, torch.load(io.BytesIO(link.getresponse().read())), strict=True
        ):
            old.copy_(new)
            own.copy_(new)

    seconds = rounds_of(once, barrier, turns)
    if index == 0:
        out.send(seconds)


def http_rounds(args):
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    server = spawn.Process(target=http_server, args=(args.workers, there), daemon=True)
    server.start()
    seconds = processes(http_worker, args.workers, args.parameters, here.recv(), args.rounds)
    server.kill()
    return seconds


# --- torchft, with the interpreter of a venv that has it ------------------------------------


def torchft_worker(index, count, lighthouse, turns, barrier, out):
    import torch.distributed as dist
    from torchft import Manager, ProcessGroupGloo
    from torchft.local_sgd import DiLoCo

    class Nothing(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            """Do nothing."""

    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=PATIENCE)
    model = torch.nn.Module()
    model.parts = torch.nn.ParameterList([torch.zeros(size) for size in shapes(count)])
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=patience), load_state_dict=lambda state: None, state_dict=dict,
        min_replica_size=2, use_async_quorum=False, replica_id=f"r{index}", store_addr="127.0.0.1",
        store_port=store.port, rank=0, world_size=1, lighthouse_addr=lighthouse, init_sync=False,
        timeout=patience, quorum_timeout=patience,
    )  # fmt: skip
    inner = Nothing(list(model.parameters()))
    with DiLoCo(manager, [model], inner, outer, sync_every=1):
        seconds = rounds_of(inner.step, barrier, turns)
    if index == 0:
        out.send(seconds)
    manager.shutdown(wait=False)
    os._exit(0)


def torchft_role(args):
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=200)
    address = lighthouse.address().replace(socket.gethostname(), "127.0.0.1")
    seconds = processes(torchft_worker, args.workers, args.parameters, address, args.rounds)
    print(json.dumps(seconds), flush=True)
    os._exit(0)


def torchft_rounds(args):
    options = ["--parameters", args.parameters, "--workers", args.workers, "--rounds", args.rounds]
    command = [args.torchft, os.path.abspath(__file__), *map(str, options), "--is-torchft"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- Ours -----------------------------------------------------------------------------------


def our_rounds(args):
    import bench_sync

    given = {"upload_codec": "bf16", "download_codec": "bf16", "fragments": 1, "save_every": 0}
    given |= {"guard": [], **vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        results, _ = bench_sync.measure(SimpleNamespace(**given), folder)
    return [seconds for seconds, _ in results]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--parameters", type=lambda text: int(float(text)), default=50_000_000)
    add("--workers", type=int, default=2)
    add("--rounds", type=int, default=6, help="of each turn; the first one of them is not counted")
    add("--turns", type=int, default=3)
    add("--torchft", metavar="PYTHON", help="an interpreter that has torchft")
    add("--is-torchft", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.is_torchft:
        return torchft_role(args)
    sides = {"ours, bf16": our_rounds, "HTTP with torch.save, bf16": http_rounds}
    sides |= {"torchft, gloo, fp32": torchft_rounds} if args.torchft else {}
    found = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, measure in sides.items():
            found[name].append(statistics.median(measure(args)[1:]))
    ours = statistics.median(found["ours, bf16"])
    print(f"{args.parameters:,} parameters, {args.workers} workers, {args.turns} turns")
    for name, medians in found.items():
        median = statistics.median(medians)
        each = ", ".join(f"{value:.3f}" for value in medians)
        print(f"  {name:<28}{median:.3f} s a round ({each}), {median / ours:.2f} times ours")


if __name__ == "__main__":
    main()
