"""What do strangers cost? The rounds a second of a run, and the server's memory, while they connect.

    python tests/strangers.py                       # 1,000 strangers, a minute and a half
    python tests/strangers.py --kinds idle,big      # idle, garbage, trickle, big, join, status

A real server and two workers train a tiny model. Meanwhile 1,000 strangers connect, over and over: to
that server, and by turns, for a base, to a listener on the same machine that accepts and closes. So
the strangers' own work takes the same of the cores. They are, in equal parts:

    idle      connect and say nothing
    garbage   send what is no message
    trickle   send their hello a byte a second
    big       say hello with a worker's name, then send headers of 16 MB, of very many parts
    join      ask to join with a model of 60,000 tensors that is not the run's
    status    ask for the status as fast as they get it

A stranger whose connection ends comes again after a second. Prints both rates, their ratio, and by how
much the server's memory has grown at most. Fails where it is over 100 MB, or the ratio below 0.9.
"""

import argparse
import asyncio
import contextlib
import os
import resource
import secrets
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import protocol

ROOT = os.path.dirname(os.path.abspath(protocol.__file__))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
KINDS = ("idle", "garbage", "trickle", "big", "join", "status")
MEGABYTES, RATIO = 100, 0.9  # the most and the least that is fine


# --- The strangers --------------------------------------------------------------------------


def hello(name=""):
    """A hello as a worker or, without a name, as status.py says it."""
    who = {"worker": name, "session": secrets.token_hex(4)} if name else {}
    fields = {
        "type": "hello",
        "protocol": protocol.PROTOCOL_VERSION,
        "nonce": secrets.token_hex(16),
    }
    return protocol.encode_header({**fields, **who}, ())


def big():
    """A header of 16 MB with 280,000 tensors."""
    entry = '"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    raw = ("{" + ",".join(entry % k for k in range(280_000)) + "}").encode()[
        : protocol.MAX_HEADER_BYTES
    ]
    return struct.pack("<Q", len(raw)) + raw


def join():
    """A request to join with a large model."""
    manifest = [
        [f"model.layers.{k}.self_attn.q_proj.weight", "F32", [64, 64]] for k in range(60_000)
    ]
    fields = {
        "type": "join",
        "manifest": manifest,
        "sync_every": 5,
        "num_fragments": 1,
        "host": "h",
    }
    return protocol.encode_header({**fields, "versions": [protocol.FRESH]}, ())


async def stranger(kind, number, address, sent, raw):
    """Connect, and behave in one way, until the connection ends; again after a second."""
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(*address)
            sent[kind] = sent.get(kind, 0) + 1
            try:
                await behave(kind, number, reader, writer, raw)
            finally:
                writer.close()
        await asyncio.sleep(1.0)


async def behave(kind, number, reader, writer, raw):
    if kind == "garbage":
        writer.write(os.urandom(2000))
    elif kind == "trickle":
        for byte in hello():
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(1.0)
    elif kind in ("big", "join"):
        writer.write(hello(f"stranger-{number}"))
        while True:
            writer.write(raw[kind])
            await writer.drain()
            if not await reader.read(1 << 16):
                return
    elif kind == "status":
        writer.write(hello())
        while True:
            writer.write(raw[kind])
            await writer.drain()
            if not await reader.read(1 << 16):
                return
    await reader.read()  # until the server has had enough


async def crowd(address, count, kinds, seconds):
    """Let strangers of these kinds loose on an address for a while."""
    raw = {"big": big(), "join": join(), "status": protocol.encode_header({"type": "status"}, ())}
    raw = {kind: raw[kind] for kind in kinds if kind in raw}
    sent = {}
    tasks = [
        asyncio.create_task(stranger(kinds[k % len(kinds)], k, address, sent, raw))
        for k in range(count)
    ]
    print("there", flush=True)
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(sent, flush=True)


# --- The run --------------------------------------------------------------------------------


def bare_listener():
    """(host, port) of a listener that only accepts and closes."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)

    def accept():
        while True:
            with contextlib.suppress(OSError):
                listener.accept()[0].close()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()


def run_of(folder, stack):
    """(server process, its port) of a run with two workers."""
    command = [sys.executable, f"{ROOT}/server.py", "-m", folder, "--port", "0", "-n", "2"]
    command += ["--outer-lr", "0.3", "--outer-momentum", "0"]  # the toy diverges in a long run
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV)
    stack.callback(server.kill)
    for line in server.stdout:
        if "listening on port " in line:
            port = int(line.split("listening on port ")[1].split(";")[0])
            break
    threading.Thread(target=server.stdout.read, daemon=True).start()
    for name in ("w0", "w1"):
        command = [sys.executable, f"{ROOT}/tests/toy_worker.py", "--server", f"127.0.0.1:{port}"]
        command += ["--worker-id", name, "--steps", "10000000", "--pause", "0.01"]
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENV)
        stack.callback(worker.kill)
    return server, port


def rounds(folder):
    with contextlib.suppress(OSError), open(f"{folder}/rounds.jsonl", "rb") as file:
        return file.read().count(b"\n")
    return 0


def resident(process):
    """Megabytes of a process that are in memory."""
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(folder, server, address, args):
    """(rounds a second, most megabytes of the server) while strangers connect to an address; without
    one, while there are none."""
    strangers = None
    if address:
        command = [sys.executable, __file__, "--crowd", f"{address[0]}:{address[1]}"]
        command += [
            "--kinds",
            args.kinds,
            "--count",
            str(args.count),
            "--seconds",
            str(args.seconds + 4),
        ]
        strangers = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        strangers.stdout.readline()
        time.sleep(2.0)  # all of them are there
    before, began, most = rounds(folder), time.monotonic(), 0.0
    while time.monotonic() - began < args.seconds:
        time.sleep(0.05)
        most = max(most, resident(server))
    rate = (rounds(folder) - before) / (time.monotonic() - began)
    if strangers:
        said, _ = strangers.communicate(timeout=120)
        print(f"  {rate:7.2f} rounds/s, {most:6.1f} MB; connections: {said.strip()}", flush=True)
    return rate, most


def main():
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="strangers (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase (%(default)s)")
    parser.add_argument("--phases", type=int, default=3, help="of each kind (%(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="(%(default)s)")
    parser.add_argument("--crowd", help=argparse.SUPPRESS)
    args = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if args.crowd:
        address = protocol.parse_address(args.crowd)
        asyncio.run(crowd(address, args.count, args.kinds.split(","), args.seconds))
        return 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) + "/model"
        server, port = run_of(folder, stack)
        while rounds(folder) < 20:
            time.sleep(0.1)
        alone, before = measure(folder, server, None, args)
        print(f"{alone:.2f} rounds/s and {before:.1f} MB without strangers", flush=True)
        bare, places = bare_listener(), {"server": ("127.0.0.1", port)}
        places["listener"] = bare
        found = {name: [] for name in places}
        for _ in range(args.phases):
            for name, address in places.items():
                print(f"{args.count} strangers at the {name}:")
                found[name].append(measure(folder, server, address, args))
        rates = {name: statistics.median(rate for rate, _ in each) for name, each in found.items()}
        grown = max(most for each in found.values() for _, most in each) - before
    ratio = rates["server"] / rates["listener"]
    print(
        f"{rates['server']:.2f} rounds/s with strangers at the server, {rates['listener']:.2f} with "
        f"the same at a listener that accepts and closes: {ratio:.2f}; memory grew by {grown:.1f} MB"
    )
    return int(ratio < RATIO or grown > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
