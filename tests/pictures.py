"""Make the README's pictures, tests/page.png and tests/screen.png, from a real run of four workers.

    python tests/pictures.py             # a minute; needs chromium, as tests/test_page.py does
    python tests/pictures.py --measure   # print how long the page takes for an update, too

One of the workers is slower than the others, so that there is something to see.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time

from playwright.sync_api import sync_playwright

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from conftest import ROOT, Process, until
from terminals import Terminal

HERE = os.path.join(ROOT, "tests")
COLORS = {"red": "#d8605a", "green": "#7ab06a", "brown": "#d0a850", "yellow": "#d0a850"}
# Milliseconds that updates of the page take, with all that it has: [median, most].
MEASURE = """() => {
  const times = [];
  for (let k = 0; k < 40; k++) {
    const begin = performance.now();
    show(run, {...rounds, points: [], recent: []});
    document.body.getBoundingClientRect();
    times.push(performance.now() - begin);
  }
  times.sort((a, b) => a - b);
  return [times[20], times[39]];
}"""


def run(folder, rounds):
    """Start a server, four workers and a page, and wait for so many rounds. Returns the server's
    address, the page's, and the processes."""
    processes = [Process(os.path.join(ROOT, "server.py"), "-m", folder, "--port", 0, "-n", 4)]
    port = processes[0].wait_for(r"listening on port (\d+)")[1]
    address = f"127.0.0.1:{port}"
    for k, name in enumerate(("ada", "bob", "cleo", "dan")):
        options = {
            "server": address, "worker-id": name, "steps": 4000, "sync-every": 20, "seed": k,
            "pause": 0.016 + 0.008 * (name == "cleo"), "lr": 0.0004, "evaluate": 1, "sizes": "64,192,64",
        }  # fmt: skip
        arguments = [f"--{key}={value}" for key, value in options.items()]
        processes.append(Process(os.path.join(HERE, "toy_worker.py"), *arguments))
    processes.append(Process(os.path.join(ROOT, "status.py"), "--server", address, "--web", "0"))
    web = processes[-1].wait_for(r"the page: (http://\S+/)")[1]
    until(lambda: count(address) >= rounds, f"{rounds} rounds", 600)
    return address, web, processes


def count(address):
    """The number of rounds so far."""
    with os.popen(f"{sys.executable} {ROOT}/status.py --server {address} --json") as file:
        return json.load(file)["totals"]["rounds"]


def page_of(display):
    """A terminal's screen as HTML: its characters in their colours and weights."""
    lines = []
    for y in range(display.lines):
        spans = []
        for x in range(display.columns):
            cell = display.buffer[y][x]
            style = (
                f"color:{COLORS.get(cell.fg, 'inherit')};font-weight:{700 if cell.bold else 400}"
            )
            text = cell.data.replace("&", "&amp;").replace("<", "&lt;")
            spans.append(f'<span style="{style}">{text}</span>')
        lines.append("".join(spans))
    body = "\n".join(lines).rstrip()
    style = "display:inline-block;margin:0;padding:16px;background:#16181b;color:#d8d6d0;font:13px/1.3 'DejaVu Sans Mono',monospace"
    return f'<meta charset="utf-8"><pre style="{style}">{body}</pre>'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=90)
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        address, web, processes = run(folder, args.rounds)
        try:
            script = os.path.join(ROOT, "status.py")
            terminal = Terminal(script, "--server", address, "--watch", columns=100, lines=29)
            terminal.see("cleo")
            browser = play.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", "--disable-lcd-text"],
            )
            tab = browser.new_page(viewport={"width": 880, "height": 1110})
            tab.goto(web)
            tab.get_by_role("cell", name="cleo", exact=True).wait_for()
            tab.wait_for_function("rounds.points.length > 40")
            time.sleep(2.0)  # the terminal has drawn once more
            tab.screenshot(path=os.path.join(HERE, "page.png"))
            if args.measure:
                print(
                    "an update of the page takes {:.0f} ms, at most {:.0f} ms".format(
                        *tab.evaluate(MEASURE)
                    )
                )
            with terminal.lock:
                text = page_of(terminal.display)
            terminal.close()
            tab.goto("about:blank")
            tab.set_content(text)
            tab.locator("pre").screenshot(path=os.path.join(HERE, "screen.png"))
            browser.close()
        finally:
            for process in reversed(processes):
                process.kill()
    for name in ("page.png", "screen.png"):
        print(f"tests/{name}: {os.path.getsize(os.path.join(HERE, name)):,} bytes")


if __name__ == "__main__":
    main()
