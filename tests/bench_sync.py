"""What a round costs beside what bare sockets need for the same bytes: seconds, CPU, memory.

    python tests/bench_sync.py                                    # 100 million parameters, 2 workers
    python tests/bench_sync.py --upload-codec int4 --download-codec int4
    python tests/bench_sync.py --parameters 10e6 --workers 8 --fragments 4 --rounds 10
    python tests/bench_sync.py --parameters 1e6 --workers 50
    python tests/bench_sync.py --token --tls                      # and what a token and TLS cost

A real server and real workers, as processes on loopback; the trainer does nothing but change a few
numbers. Workers are forked from a process that has imported torch, so that fifty start in seconds, and join
at once. Between rounds the workers wait for each other, so that a round's time runs from the last
push to the last adoption. Then processes of the same number, with the same socket options, send the
same bytes up, and down again, with nothing in between; what is compared has been measured in one run.

Every number of the model is adopted by every worker, and their digests are compared at the end.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import protocol
import server
from diloco_callback import DiLoCoWorker, Slice
from protocol import CODECS, NONE, FlatModel, TensorSpec, Version

ROOT = os.path.dirname(os.path.abspath(protocol.__file__))
TENSOR = 1 << 20  # elements of one tensor of the model: a few large ones, as models have


def usage(pid="self"):
    """(CPU seconds, peak of resident memory in bytes) of a process."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        peak = next(line.split()[1] for line in file if line.startswith("VmHWM"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(peak) * 1024


def say(**fields):
    print(json.dumps(fields), flush=True)


# --- Roles: each is a process that is told when to go on by a line on its standard input -----


class Nothing(torch.optim.Optimizer):
    """An optimizer that does nothing, and calls its hooks."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        """Do nothing."""


def moved_by(link):
    """(bytes sent, bytes received) on a link's data connections, all of which are idle."""
    return [sum(getattr(c, name) for c in link.idle) for name in ("bytes_out", "bytes_in")]


def worker_role(args):
    """Sync `--rounds` times, one fragment after the other where there are several."""
    torch.set_num_threads(1)
    sizes = [TENSOR] * (args.parameters // TENSOR) + [args.parameters % TENSOR]
    model = torch.nn.ParameterList([torch.zeros(size) for size in sizes if size])
    with torch.no_grad():
        for k, parameter in enumerate(model):
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k))
            )
    optimizer = Nothing(model.parameters())
    optimizer.step()  # what torch imports for it is not of ours
    say(event="alone", usage=usage())
    sys.stdin.readline()
    began = time.monotonic()
    options = {"num_fragments": args.fragments, "fragment_sync_delay": 0}
    with DiLoCoWorker(
        model, optimizer, args.server, args.fragments, args.name, **options
    ) as worker:
        say(event="ready", began=began, ended=time.monotonic(), usage=usage())
        drift = torch.randn(TENSOR, generator=torch.Generator().manual_seed(hash(args.name) % 1000))
        trained = 0.0  # CPU seconds that the trainer has spent
        for line in sys.stdin:
            if line.strip() == "end":
                break
            trained -= time.thread_time()
            with torch.no_grad():
                for parameter in model:
                    parameter.add_(drift[: parameter.numel()], alpha=1e-3)
            trained += time.thread_time()
            say(event="set")
            sys.stdin.readline()
            began = time.monotonic()
            sent = moved_by(worker.link)
            for _ in range(args.fragments):
                optimizer.step()
            ended = time.monotonic()
            moved = [b - a for a, b in zip(sent, moved_by(worker.link), strict=True)]
            spent = {"usage": usage(), "trained": trained}
            say(event="round", began=began, ended=ended, bytes=moved, **spent)
        checksums = [bytes(protocol.checksum_of(s.anchor).tolist()).hex() for s in worker.slices]
    say(event="done", checksums=checksums, mismatches=worker.replica.mismatches)


def bare_worker_role(args):
    """Send as many bytes as a push has, and receive as many as an update has, each round."""
    up, down = (torch.ones(n, dtype=torch.uint8) for n in args.bytes)
    conn = protocol.Connection(
        socket.create_connection(protocol.parse_address(args.server)), "server"
    )
    say(event="ready")
    for line in sys.stdin:
        if line.strip() == "end":
            break
        say(event="set")
        sys.stdin.readline()
        began = time.monotonic()
        conn._send_all([protocol.memory(up)])
        conn._receive_into(protocol.memory(down), None)
        say(event="round", began=began, ended=time.monotonic(), usage=usage())


def arithmetic_role(args):
    """A worker's and then the server's arithmetic of a round, on one core."""
    torch.set_num_threads(1)
    up, down = CODECS[args.upload_codec], CODECS[args.download_codec]
    local = torch.randn(args.parameters)
    slice = Slice(FlatModel([local]), up, down, has_residual=up.feedback)
    manifest = [TensorSpec("weight", torch.float32, (args.parameters,))]
    model = server.GlobalModel(manifest, [], 1, args.upload_codec, args.download_codec, True)
    model.threads = concurrent.futures.ThreadPoolExecutor(1)
    say(event="ready")
    for line in sys.stdin:
        if line.strip() == "end":
            break
        local.add_(1e-3)
        say(event="set")
        sys.stdin.readline()
        times = [time.process_time()]
        slice.begin(has_numbers=True, goes_on=False)
        for _ in slice.pieces():
            pass
        times.append(time.process_time())
        entry = fold(model, slice.payload, args.workers)
        times.append(time.process_time())
        update = entry.payload.raw
        slice.update.raw[: len(update)].copy_(update)
        times.append(time.process_time())
        slice.take(moves=True, learns=True)
        times.append(time.process_time())
        encode, step, _, adopt = (after - before for before, after in itertools.pairwise(times))
        say(event="round", began=0, ended=0, worker=encode + adopt, server=step)


def fold(model, payload, workers):
    """The Entry of a round of so many workers that have pushed the same."""
    version = Version("", len(model.logs[0]))
    pushes = [
        server.Push(worker=str(k), session="", k=0, seq=1, base=NONE, payload=payload)
        for k in range(workers)
    ]
    closed = server.Round(
        k=0, base=NONE, version=version, pushes=pushes, members=[], plain=False, share=1.0,
        opened=0.0, closed=0.0,
    )  # fmt: skip
    entry = model.announce(closed, 0)
    model.fold(closed, entry, server.Outer())
    return entry


def bare_server_role(args):
    """Receive the bytes of all, each in a thread, then send all theirs."""
    up, down = args.bytes
    listener = socket.create_server(("127.0.0.1", 0))
    say(port=listener.getsockname()[1])
    barrier = threading.Barrier(args.workers)
    update = torch.ones(down, dtype=torch.uint8)

    def serve(conn):
        buffer = torch.ones(up, dtype=torch.uint8)
        with contextlib.suppress(ConnectionError):
            while True:
                conn._receive_into(protocol.memory(buffer), None)
                barrier.wait()
                conn._send_all([protocol.memory(update)])

    for _ in range(args.workers):
        conn = protocol.Connection(listener.accept()[0], "worker")
        threading.Thread(target=serve, args=[conn], daemon=True).start()
    for _ in sys.stdin:
        say(usage=usage())
    os._exit(0)


ROLES = {
    "worker": worker_role,
    "bare-worker": bare_worker_role,
    "bare-server": bare_server_role,
    "arithmetic": arithmetic_role,
}


# --- The benchmark ---------------------------------------------------------------------------


# An optimizer's first step imports torch._dynamo, which takes longer than all else that a worker does here.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo"])


def play(role, options, environment, line):
    """Be a role, in a process of its own that is spoken to over the socket `line`."""
    os.environ.update(environment)
    sys.stdin, sys.stdout = line.makefile("r"), line.makefile("w")
    ROLES[role](SimpleNamespace(**options))


class Peer:
    """A role as a process, spoken to in lines."""

    def __init__(self, role, **options):
        ours, theirs = socket.socketpair()
        names = [name for name in os.environ if name.startswith("DILOCO_")]
        environment = {name: os.environ[name] for name in names}
        self.process = FORKS.Process(target=play, args=(role, options, environment, theirs))
        self.process.start()
        theirs.close()
        self.line = ours.makefile("rw")
        ours.close()

    def tell(self, text):
        self.line.write(text + "\n")
        self.line.flush()

    def hear(self):
        line = self.line.readline()
        if not line:
            self.process.join(60)
            raise SystemExit(f"a process ended with code {self.process.exitcode}")
        return json.loads(line)

    def end(self):
        self.line.close()
        self.process.join(60)


def rounds(peers, count):
    """[(seconds from the last start to the last end, what the peers say)] of some rounds."""
    results = []
    for _ in range(count):
        for step in ("set", "round"):
            for peer in peers:
                peer.tell(step)
            said = [peer.hear() for peer in peers]
        seconds = max(s["ended"] for s in said) - max(s["began"] for s in said)
        results.append((seconds, said))
    return results


def bare(args, up, down):
    """Seconds of each round with bare sockets, and the CPU seconds of one."""
    server = Peer("bare-server", workers=args.workers, bytes=(up, down))
    address = f"127.0.0.1:{server.hear()['port']}"
    peers = [Peer("bare-worker", server=address, bytes=(up, down)) for _ in range(args.workers)]
    for peer in peers:
        peer.hear()

    def cpu(said):
        server.tell("usage")
        return server.hear()["usage"][0] + sum(s["usage"][0] for s in said)

    first = cpu(rounds(peers, 1)[0][1])
    results = rounds(peers, args.rounds)
    spent = (cpu(results[-1][1]) - first) / args.rounds
    for peer in peers:
        peer.end()
    server.end()
    return [seconds for seconds, _ in results], spent


def arithmetic(args):
    """CPU seconds of a round's arithmetic: (of a worker, of the server)."""
    options = {"parameters": args.parameters, "workers": args.workers}
    options |= {"upload_codec": args.upload_codec, "download_codec": args.download_codec}
    peers = [Peer("arithmetic", **options) for _ in range(args.workers)]
    for peer in peers:
        peer.hear()
    said = [s for _, all in rounds(peers, 4)[1:] for s in all]
    for peer in peers:
        peer.end()
    return tuple(statistics.median(s[name] for s in said) for name in ("worker", "server"))


def start_server(args, folder):
    """The server's process, and its address."""
    codecs = ["--upload-codec", args.upload_codec, "--download-codec", args.download_codec]
    server = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "server.py"), "-m", os.path.join(folder, "model"),
         "-n", str(args.workers), "--host", "127.0.0.1", "--port", "0", "--save-every", str(args.save_every),
         "--until-done", *codecs, *args.guard],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in server.stdout:
        if "listening on port" in line:
            threading.Thread(target=lambda: [None for _ in server.stdout], daemon=True).start()
            return server, f"127.0.0.1:{line.split('port ')[1].split(';')[0]}"
    raise SystemExit("the server did not start")


def measure(args, folder):
    """Run the rounds with a real server: (results of `rounds`, server's and workers' figures)."""
    server, address = start_server(args, folder)
    options = {"server": address, "parameters": args.parameters, "fragments": args.fragments}
    peers = [Peer("worker", name=f"w{k}", **options) for k in range(args.workers)]
    alone = [peer.hear()["usage"] for peer in peers]
    for peer in peers:
        peer.tell("join")
    joined = [peer.hear() for peer in peers]
    ready = [said["usage"] for said in joined]
    before = usage(server.pid)
    results = rounds(peers, args.rounds)
    after = usage(server.pid)
    for peer in peers:
        peer.tell("end")
    ends = [peer.hear() for peer in peers]
    assert all(end["checksums"] == ends[0]["checksums"] and not end["mismatches"] for end in ends)
    for peer in peers:
        peer.end()
    server.wait(120)
    last = results[-1][1]
    figures = {
        "joins": max(s["ended"] for s in joined) - min(s["began"] for s in joined),
        "server cpu": (after[0] - before[0]) / args.rounds,
        "server peak": after[1],
        "worker cpu": (last[0]["usage"][0] - ready[0][0] - last[0]["trained"]) / args.rounds,
        "worker overhead": max(s["usage"][1] - a[1] for s, a in zip(last, alone, strict=True)),
    }
    return results, figures


@contextlib.contextmanager
def guarded(args, folder, token, tls):
    """Within the block the server asks for a token and speaks TLS, as told, and the workers know."""
    ours = {"DILOCO_TOKEN": secrets.token_hex(16)} if token else {}
    if tls:
        cert, key = (os.path.join(folder, name) for name in ("cert.pem", "key.pem"))
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=diloco"],
            check=True, capture_output=True,
        )  # fmt: skip
        args.guard = ["--tls-cert", cert, "--tls-key", key]
        ours["DILOCO_TLS"] = protocol.certificate_fingerprint(cert)
    os.environ.update(ours)
    yield
    args.guard = []
    for name in ours:
        del os.environ[name]


def measure_guarded(args, plain):
    """Run the rounds again with a token, with TLS, or both, as asked, and print what they cost."""
    ways = [(True, False)] * args.token + [(args.token, True)] * args.tls
    for token, tls in ways:
        with tempfile.TemporaryDirectory() as folder, guarded(args, folder, token, tls):
            results, figures = measure(args, folder)
        median = statistics.median(seconds for seconds, _ in results[1:])
        name = " and ".join(["token"] * token + ["TLS"] * tls)
        print(
            f"  with {name:<19}{median:.3f} s, {median / plain:.2f} times the round above; CPU: server "
            f"{figures['server cpu']:.3f} s, worker {figures['worker cpu']:.3f} s"
        )


def report(args, results, figures, bare_seconds, bare_cpu, worker, server):
    first, rest = results[0][0], [seconds for seconds, _ in results[1:]]
    up, down = results[-1][1][0]["bytes"]
    median, base = statistics.median(rest), statistics.median(bare_seconds)
    floor = (bare_cpu + args.workers * worker + server) / os.cpu_count()
    count, gb = args.parameters, 1e9
    print(f"{count:,} parameters, {args.workers} workers, up {args.upload_codec}, down "
          f"{args.download_codec}, {args.fragments} fragment(s), {len(rest)} rounds after the first")  # fmt: skip
    print(f"  joins, all at once      {figures['joins']:.3f} s")
    print(
        f"  round                   {median:.3f} s (from {min(rest):.3f} to {max(rest):.3f}), first {first:.3f} s"
    )
    print(
        f"  bare sockets            {base:.3f} s (from {min(bare_seconds):.3f} to {max(bare_seconds):.3f})"
    )
    print(f"  ratio                   {median / base:.2f}, first round {first / base:.2f}")
    print(
        f"  bound by the cores      {floor:.3f} s, ratio {median / floor:.2f}: bare sockets {bare_cpu:.3f} CPU s, "
        f"arithmetic {worker:.3f} s a worker and {server:.3f} s on the server, over {os.cpu_count()} cores"
    )
    print(f"  bytes per worker        up {up / 1e6:.2f} MB ({up / count:.4f} B/parameter), down "
          f"{down / 1e6:.2f} MB ({down / count:.4f})")  # fmt: skip
    print(
        f"  CPU per round           server {figures['server cpu']:.3f} s, worker {figures['worker cpu']:.3f} s"
    )
    print(f"  server memory, peak     {figures['server peak'] / gb:.3f} GB, {figures['server peak'] / count / 4:.2f} "
          "times 4 bytes a parameter")  # fmt: skip
    limit = (
        (8 + 4 * CODECS[args.download_codec].feedback) * count + args.workers * up + down + 400e6
    )
    print(f"    against the bound     {figures['server peak'] / limit:.2f} of {limit / gb:.3f} GB")
    limit = (4 + 4 * CODECS[args.upload_codec].feedback) * count + up + down + 100e6
    print(f"  worker overhead, peak   {figures['worker overhead'] / gb:.3f} GB, {figures['worker overhead'] / limit:.2f} "
          f"of its bound {limit / gb:.3f} GB")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--parameters", type=lambda text: int(float(text)), default=100_000_000)
    add("--workers", type=int, default=2)
    add("--upload-codec", default="bf16")
    add("--download-codec", default="bf16")
    add("--fragments", type=int, default=1)
    add("--rounds", type=int, default=6, help="the first one is reported apart")
    add("--save-every", type=int, default=0, help="checkpoints, as server.py has it")
    add("--token", action="store_true", help="measure again with a token")
    add("--tls", action="store_true", help="measure again with TLS (needs openssl)")
    args = parser.parse_args()
    args.guard = []  # options of the server
    with tempfile.TemporaryDirectory() as folder:
        results, figures = measure(args, folder)
    up, down = results[-1][1][0]["bytes"]
    report(args, results, figures, *bare(args, up, down), *arithmetic(args))
    measure_guarded(args, statistics.median(seconds for seconds, _ in results[1:]))


if __name__ == "__main__":
    main()
