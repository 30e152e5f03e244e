"""What does a slow link cost? Seconds per step of two workers: alone, full sync, streaming.

    python tests/bench_link.py                          # 100 Mbit/s each way, some 100 seconds
    python tests/bench_link.py --mbit 20                # a fragment's round trip does not fit
    python tests/bench_link.py --fragments 8 --modes standalone,streaming
    python tests/bench_link.py --upload-codec fp32 --download-codec fp32
    python tests/bench_link.py --parameters 100e6 --mbit 1000 --step-ms 300 --sync-every 40

Puts the real server and two workers into network namespaces of their own, joined by a bridge, and
limits each worker's link with `tc ... tbf`, both ways; the server's link has no limit, and none has
latency. A worker trains a fake model: a step takes a fixed time, most of it asleep, so that the
link is what is measured and not the cores. The first cycle is not timed. The columns:

    vs alone    seconds per step, divided by those of two trainers that never synchronize
    hook        share of the time that the training thread spent in DiLoCo's hook; where a step is
                slower by more than that, the cores are busy: look again on an idle machine
    waits       of it, waiting, as the worker says
    boundary    seconds in the hook from one push to the next, without waiting: what a boundary takes
    its CPU     CPU seconds of the training thread of it, which other processes do not make longer
    forced      the share of waiting if only the link took time: full sync waits for every byte,
                streaming for what does not fit into the training time
    link/train  what a cycle's payload, up and then down, takes on the link with TCP/IP headers,
                divided by the time of its steps
    trip        seconds from the start of encoding a push to the end of decoding its reply,
                waiting for the other worker's push included
    up, down    MB per cycle and worker on the wire (the interface's counters: with headers and
                acknowledgements), the payload (the worker's metrics), and the link's use

Needs Linux, root, and `ip` and `tc` of iproute2. It removes all that it makes.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ADDRESS = {"server": "10.77.0.1", "w0": "10.77.0.10", "w1": "10.77.0.11"}
WORKERS = ("w0", "w1")
PORT = 8512
PROBE_SECONDS = 1.5  # of plain transfer each way
BURST_SECONDS = 0.005  # what tbf lets through at once: above the timers' grain, below all else
QUEUE_MS = 50  # what tbf holds before it drops
WITH_HEADERS = 1514 / 1448  # of a full segment: Ethernet, IP, and TCP with timestamps
TOLERANCE = 1.03  # how much longer than alone a step may take with streaming
MODES = ("standalone", "full", "streaming")


# --- The network ----------------------------------------------------------------------------


def run(*command):
    """Run a command to its end; leave with its words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


class Lab:
    """Namespaces for a server and two workers, around a bridge in one more. A context manager that
    removes them, and ends the processes that were started in them."""

    def __init__(self, mbit):
        self.mbit, self.processes, self.made = mbit, [], []

    def name(self, host):
        return f"bench-link-{os.getpid()}-{host}"

    def __enter__(self):
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self):
        for host in ("hub", *ADDRESS):
            self.made.append(host)
            run("ip", "netns", "add", self.name(host))
        hub = self.name("hub")
        run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", hub, "link", "set", "bridge", "up")
        for host, address in ADDRESS.items():
            inside, port = self.name(host), f"to-{host}"
            run(*f"ip -n {hub} link add {port} type veth peer name eth0 netns {inside}".split())
            run(*f"ip -n {inside} addr add {address}/24 dev eth0".split())
            run(*f"ip -n {hub} link set {port} master bridge".split())
            run(*f"ip -n {inside} link set lo up".split())
            for namespace, device in ((inside, "eth0"), (hub, port)):
                # One packet a segment, so that the counters see every header.
                run(*f"ip -n {namespace} link set {device} gso_max_segs 1 up".split())
                if host in WORKERS:
                    self._limit(namespace, device)

    def _limit(self, namespace, device):
        burst = max(16_000, int(self.mbit * 1e6 / 8 * BURST_SECONDS))
        limit = f"rate {round(self.mbit * 1000)}kbit burst {burst} latency {QUEUE_MS}ms"
        run(*f"tc -n {namespace} qdisc add dev {device} root tbf {limit}".split())

    def start(self, host, log, *command, cwd=None):
        """Start a Python script there, with its output in the file `log`."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")}
        inside = ["ip", "netns", "exec", self.name(host), sys.executable]
        with open(log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*inside, *map(str, command)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": "1"},
                cwd=cwd,
                start_new_session=True,  # a Ctrl-C is ours to handle
            )
        process.log = log
        self.processes.append(process)
        return process

    def play(self, host, log, role, **settings):
        """Start a role of this script there."""
        return self.start(host, log, os.path.abspath(__file__), role, json.dumps(settings))

    def results(self, processes, seconds):
        """The JSON in the last line of each role's output, once they have ended, and end all
        others. Leaves with the output of the first process that fails or takes too long."""
        end = time.monotonic() + seconds
        while slow := [p for p in processes if p.poll() is None]:
            failed = [p for p in self.processes if p.poll()]
            if failed or time.monotonic() > end:
                self._give_up((failed or slow)[0])
            time.sleep(0.05)
        if failed := [p for p in processes if p.returncode]:
            self._give_up(failed[0])
        self.end_processes()
        return [json.loads(text_of(process.log).splitlines()[-1]) for process in processes]

    def _give_up(self, process):
        ended = "took too long" if process.poll() is None else f"exit code {process.returncode}"
        sys.exit(f"{os.path.basename(process.log)}: {ended}:\n{text_of(process.log)}")

    def end_processes(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)
        self.processes.clear()

    def __exit__(self, *_):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # removing takes a moment and must be whole
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.end_processes()
        for host in self.made:
            command = ["ip", "netns", "del", self.name(host)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, timeout=10, check=False)


def text_of(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


# --- Roles: what runs in the namespaces -----------------------------------------------------


def receive_all(sock):
    """Bits per second from the first byte to the last."""
    count, began = len(sock.recv(1 << 16)), time.monotonic()
    while part := sock.recv(1 << 16):
        count += len(part)
    return count * 8 / (time.monotonic() - began)


def send_for(sock, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sock.sendall(bytes(1 << 16))
    sock.shutdown(socket.SHUT_WR)


def probe_server():
    """Measure what comes up, then send down."""
    sock = socket.create_server(("", PORT)).accept()[0]
    print(json.dumps(receive_all(sock)))
    send_for(sock, PROBE_SECONDS)


def probe_client():
    """Send up, then measure what comes down."""
    sock = None
    while sock is None:  # the other may be slower to start
        with contextlib.suppress(ConnectionRefusedError):
            sock = socket.create_connection((ADDRESS["server"], PORT), 30)
        time.sleep(0.1)
    send_for(sock, PROBE_SECONDS)
    print(json.dumps(receive_all(sock)))


def readings(worker):
    """What the training's clocks and counters show now."""
    values = {"time": time.monotonic()}
    for name in ("tx_bytes", "rx_bytes"):
        values[name] = int(text_of(f"/sys/class/net/eth0/statistics/{name}"))
    if worker:
        metrics = worker.metrics()
        values["stall"] = metrics["diloco/stall_time"]
        values["trips"] = metrics["diloco/total_sync_time"]
        values["pushes"] = metrics["diloco/fragment_syncs"]
    return values


def train(server, name, parameters, step_seconds, sync_every, rounds, fragments):
    """Train a fake model, with `server` synchronized and without alone, and print what all cycles
    but the first took."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from diloco_callback import DiLoCoWorker

    torch.set_num_threads(1)
    sizes = [parameters // 2, parameters // 4, parameters // 8]
    sizes.append(parameters - sum(sizes))
    model = torch.nn.ParameterList(torch.zeros(size) for size in sizes)
    for parameter in model:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    began, hooked = time.monotonic(), []  # by step: the seconds of DiLoCo's hook, those of its CPU

    def sleep(*_):
        time.sleep(max(0.0, began + step_seconds - time.monotonic()))
        hooked.append([-time.monotonic(), -time.thread_time()])

    def hook_has_ended(*_):
        hooked[-1][0] += time.monotonic()
        hooked[-1][1] += time.thread_time()

    register_optimizer_step_post_hook(sleep)  # hooks are called in this order: DiLoCo's is next
    worker, synchronized = None, contextlib.nullcontext()
    if server:
        worker = synchronized = DiLoCoWorker(
            model, optimizer, server, sync_every, name, num_fragments=fragments
        )
    with synchronized:
        register_optimizer_step_post_hook(hook_has_ended)
        for step in range(rounds * sync_every):
            if step == sync_every:
                first = readings(worker)
            began = time.monotonic()
            optimizer.step()
        last = readings(worker)
        found = {key: last[key] - first[key] for key in first}
        found["hook"], found["hook CPU"] = map(sum, zip(*hooked[sync_every:], strict=True))
        if worker:
            found["send_mb"] = worker.metrics()["diloco/last_send_mb"] * fragments
            found["recv_mb"] = worker.metrics()["diloco/last_recv_mb"] * fragments
    print(json.dumps(found))


ROLES = {"_train": train, "_probe_server": probe_server, "_probe_client": probe_client}


# --- Measuring ------------------------------------------------------------------------------


def probe(lab, folder):
    """What a plain socket gets through a worker's link, up and down, in Mbit/s."""
    server = lab.play("server", f"{folder}/probe-server.log", "_probe_server")
    client = lab.play("w0", f"{folder}/probe-w0.log", "_probe_client")
    return [rate / 1e6 for rate in lab.results([server, client], 60)]


def measure(lab, folder, mode, args):
    """Train once: a row of the table."""
    fragments = args.fragments if mode == "streaming" else 1
    if mode != "standalone":
        options = ["-n", len(WORKERS), "--port", PORT, "--save-every", 0, "--until-done"]
        options += ["--upload-codec", args.upload_codec, "--download-codec", args.download_codec]
        script, model = os.path.join(ROOT, "server.py"), os.path.join(folder, f"model-{mode}")
        lab.start("server", f"{folder}/{mode}-server.log", script, "-m", model, *options)
    settings = {
        "server": None if mode == "standalone" else f"{ADDRESS['server']}:{PORT}",
        "parameters": args.parameters,
        "step_seconds": args.step_ms / 1000,
        "sync_every": args.sync_every,
        "rounds": args.rounds,
        "fragments": fragments,
    }
    processes = [
        lab.play(name, f"{folder}/{mode}-{name}.log", "_train", name=name, **settings)
        for name in WORKERS
    ]
    training = args.rounds * args.sync_every * args.step_ms / 1000
    sending = (args.rounds + 3) * args.parameters * 8 * 8 / (args.mbit * 1e6)
    found = lab.results(processes, 60 + 3 * (training + sending))
    return summarize(mode, found, fragments, args)


def summarize(mode, found, fragments, args):
    """The numbers of a row, from what both workers found."""
    cycles = args.rounds - 1
    median = {key: statistics.median(one[key] for one in found) for key in found[0]}
    bandwidth = args.mbit * 1e6 / 8
    row = {"mode": mode, "step": median["time"] / (cycles * args.sync_every)}
    if mode == "standalone":
        return row
    row["hook"] = median["hook"] / median["time"]
    row["waits"] = median["stall"] / median["time"]
    boundaries = cycles * fragments
    row["boundary"] = (median["hook"] - median["stall"]) / boundaries
    row["its CPU"] = median["hook CPU"] / boundaries
    row["trip"] = median["trips"] / median["pushes"]
    train = (median["time"] - median["stall"]) / cycles
    link = (median["send_mb"] + median["recv_mb"]) * 1e6 * WITH_HEADERS / bandwidth
    row["link trip"], row["link/train"] = link / fragments, link / train
    unhidden = link if mode == "full" else max(0.0, link - train)
    row["forced"] = unhidden / (train + unhidden)
    for way, count, payload in (("up", "tx_bytes", "send_mb"), ("down", "rx_bytes", "recv_mb")):
        row[f"{way} MB"] = median[count] / cycles / 1e6
        row[f"{way} payload"] = median[payload]
        row[f"{way} use"] = median[count] / median["time"] / bandwidth
    return row


COLUMNS = {
    "mode": "{}",
    "step": "{:.5f} s",
    "vs alone": "{:.3f}",
    "hook": "{:.1%}",
    "waits": "{:.1%}",
    "boundary": "{:.4f} s",
    "its CPU": "{:.4f} s",
    "forced": "{:.1%}",
    "link/train": "{:.2f}",
    "trip": "{:.3f} s",
    "up MB": "{:.3f}",
    "up payload": "{:.3f}",
    "up use": "{:.0%}",
    "down MB": "{:.3f}",
    "down payload": "{:.3f}",
    "down use": "{:.0%}",
}


def show(rows):
    """Print the table."""
    lines = [list(COLUMNS)]
    lines += [[f.format(row[c]) if c in row else "-" for c, f in COLUMNS.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def reading(row, args):
    """What a streaming row says, in one line."""
    interval = args.sync_every // args.fragments * args.step_ms / 1000
    fits = "fits" if max(row["trip"], row["link trip"]) <= interval else "does NOT fit"
    text = f"a fragment's round trip ({row['trip']:.2f} s, {row['link trip']:.2f} s of it on the "
    text += f"link) {fits} into its interval of {interval:.2f} s"
    if "vs alone" in row:
        near = "within" if row["vs alone"] <= TOLERANCE else "NOT within"
        text += f"; streaming is {near} {TOLERANCE - 1:.0%} of standalone: {row['vs alone']:.3f}"
    return text


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mbit", type=float, default=100.0, help="of a worker's link, each way")
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default=4_000_000)
    parser.add_argument("--step-ms", type=float, default=30.0, help="what a step takes")
    parser.add_argument("--sync-every", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6, help="cycles, the first not timed")
    parser.add_argument("--fragments", type=int, default=4, help="of streaming")
    parser.add_argument("--upload-codec", default="bf16")
    parser.add_argument("--download-codec", default="bf16")
    parser.add_argument("--modes", default=",".join(MODES), help="(%(default)s)")
    args = parser.parse_args()
    chosen = args.modes.split(",")
    if not set(chosen) <= set(MODES):
        parser.error(f"--modes: choose from {', '.join(MODES)}")
    args.modes = [mode for mode in MODES if mode in chosen]
    if args.rounds < 2 or not 2 <= args.fragments <= args.sync_every or args.mbit <= 0:
        parser.error("needs 2 rounds, 2 to sync_every fragments, and a rate above 0")
    if sys.platform != "linux" or os.geteuid():
        sys.exit("network namespaces need Linux and root: run it as root")
    if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
        sys.exit(f"there is no {' and no '.join(missing)}: install iproute2")
    return args


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    with tempfile.TemporaryDirectory() as folder, Lab(args.mbit) as lab:
        up, down = probe(lab, folder)
        print(f"a plain socket gets {up:.1f} Mbit/s up and {down:.1f} down, without headers, of "
              f"{args.mbit:g}", flush=True)  # fmt: skip
        rows = []
        for mode in args.modes:
            rows.append(measure(lab, folder, mode, args))
            print(f"{mode}: {rows[-1]['step']:.5f} s a step", flush=True)
    if rows[0]["mode"] == "standalone":
        for row in rows:
            row["vs alone"] = row["step"] / rows[0]["step"]
    print()
    show(rows)
    for row in rows:
        if row["mode"] == "streaming":
            print(f"\n{reading(row, args)}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ROLES:
        ROLES[sys.argv[1]](**json.loads(sys.argv[2]))
    else:
        try:
            main()
        except KeyboardInterrupt:
            sys.exit("interrupted")
