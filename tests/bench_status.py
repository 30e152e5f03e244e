"""What it costs a run to be watched by 50 pages: a round's seconds with and without them.

    python tests/bench_status.py                       # some two minutes
    python tests/bench_status.py --pages 200 --workers 4

A server, real workers on noise (tests/toy_worker.py) and one `status.py --web`. Pages are threads that
ask as the page does, for the status and for new rounds, every second. Phases with and without them
take turns, so that what else the machine does falls on both; the ratio is of the medians of a round.
"""

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from conftest import ROOT, Process, until

import protocol


def get(port, path):
    """The bytes of a reply."""
    conn = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    conn.request("GET", path)
    raw = conn.getresponse().read()
    conn.close()
    return raw


class Page(threading.Thread):
    """Asks as a page does, until it is closed. Notes the sizes of the replies, in bytes."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.closed, self.sizes = port, threading.Event(), []
        self.start()

    def run(self):
        after = span = 0
        while not self.closed.is_set():
            status = get(self.port, "/status.json")
            raw = get(self.port, f"/rounds.json?after={after}&span={span}")
            said = json.loads(raw)
            span = said["span"]
            after = max([after, *(p["n"] for p in said["points"] if p["n"] % span == 0)])
            self.sizes.append((len(status), len(raw)))
            self.closed.wait(1.0)


def cpu_seconds(pid):
    """CPU time that a process has used."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(server, web, seconds, pages):
    """Seconds of each round in a phase with so many pages, the CPU shares of the server and of
    status.py, and the sizes of the replies."""
    open_ = [Page(web.port) for _ in range(pages)]
    conn, _ = protocol.connect(f"127.0.0.1:{server.port}", {})
    pids = server.process.pid, web.process.pid
    first = conn.request("history").fields["count"]
    began, before = time.monotonic(), [cpu_seconds(pid) for pid in pids]
    time.sleep(seconds)
    shares = [
        (cpu_seconds(p) - b) / (time.monotonic() - began) for p, b in zip(pids, before, strict=True)
    ]
    recent = conn.request("history").fields["recent"]
    conn.close()
    for page in open_:
        page.closed.set()
    for page in open_:
        page.join()
    lengths = [line["seconds"] for line in recent if line["n"] > first]
    return lengths, shares, [size for page in open_ for size in page.sizes]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--phases", type=int, default=5, help="with pages, and as many without")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a phase")
    args = parser.parse_args()
    processes = []

    def start(*command):
        processes.append(Process(*command))
        return processes[-1]

    with tempfile.TemporaryDirectory() as folder:
        try:
            server = start(
                os.path.join(ROOT, "server.py"), "-m", folder, "--port", 0, "-n", args.workers
            )
            server.port = int(server.wait_for(r"listening on port (\d+)")[1])
            address = f"127.0.0.1:{server.port}"
            for k in range(args.workers):
                start(os.path.join(ROOT, "tests", "toy_worker.py"), "--server", address, "--worker-id", f"w{k}",
                      "--steps", 10**9, "--sync-every", 10, "--pause", 0.02, "--lr", 0.001)  # fmt: skip
            web = start(os.path.join(ROOT, "status.py"), "--server", address, "--web", "0")
            web.port = int(web.wait_for(r"the page: http://.*:(\d+)/")[1])
            until(lambda: json.loads(get(web.port, "/status.json")).get("round", 0) > 5, "rounds")
            phases = {0: [], args.pages: []}
            for turn in range(2 * args.phases):
                pages = args.pages * (turn % 2)
                phases[pages].append(measure(server, web, args.seconds, pages))
        finally:
            for process in reversed(processes):
                process.kill()
    medians = {}
    for pages, found in phases.items():
        lengths = [length for phase in found for length in phase[0]]
        medians[pages] = statistics.median(lengths)
        server, web = (100 * statistics.mean(phase[1][k] for phase in found) for k in (0, 1))
        print(f"{pages} pages: a round takes {1000 * medians[pages]:.1f} ms (median of {len(lengths)}); CPU: server "
              f"{server:.1f}%, status.py {web:.1f}%")  # fmt: skip
    status, rounds = zip(*(size for phase in phases[args.pages] for size in phase[2]), strict=True)
    print(f"ratio: {medians[args.pages] / medians[0]:.3f}")
    print(f"a reply: {statistics.median(status):,.0f} bytes of status, {statistics.median(rounds):,.0f} of new rounds, "
          f"{max(rounds):,} of all rounds")  # fmt: skip


if __name__ == "__main__":
    main()
