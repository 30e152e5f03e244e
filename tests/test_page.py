"""The page, the JSON and the metrics of `status.py --web`, as browsers and Prometheus get them.

python -m pytest tests/test_page.py

A browser is Debian's chromium, driven by playwright; promtool is in Debian's package prometheus.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
from conftest import ROOT, lacking, status, until

import protocol
import status as status_program

TOKEN = "an example of a token that is long"
HOSTILE = "<img src=x onerror=document.title='owned'></script>\"'&"
PHONE = {"width": 320, "height": 568}


@pytest.fixture
def web(start):
    """web(server, *arguments): status.py --web at a free port, with `.port`."""

    def run(server, *arguments, at="0", **options):
        address = server if isinstance(server, str) else server.address
        script = os.path.join(ROOT, "status.py")
        process = start(script, "--server", address, "--web", at, *arguments, **options)
        process.port = int(process.wait_for(r"the page: http://.*:(\d+)/")[1])
        return process

    return run


@pytest.fixture
def nobody():
    """The address of a server that does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{free.getsockname()[1]}"


def fetch(page, path, method="GET", body=None, **headers):
    """(status code, headers, text) of a reply."""
    conn = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    with contextlib.closing(conn):
        body = json.dumps(body) if isinstance(body, dict) else body
        conn.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        reply = conn.getresponse()
        return reply.status, reply.headers, reply.read().decode()


def look(page, path="/status.json"):
    """The JSON at a path."""
    code, _, text = fetch(page, path)
    assert code == 200, text
    return json.loads(text)


def post(page, path, body, **headers):
    return fetch(page, path, "POST", body, **{"Origin": f"http://127.0.0.1:{page.port}", **headers})


# --- What anybody may ask ---------------------------------------------------------------------


def test_the_page_is_one_text_that_nothing_else_can_get_into(web, nobody):
    page = web(nobody)
    nonces = set()
    for _ in range(2):
        code, headers, text = fetch(page, "/")
        policy = headers["Content-Security-Policy"]
        nonce = re.search(r"script-src 'nonce-([\w-]{20,})'", policy)[1]
        nonces.add(nonce)
        assert code == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy
        for rule in ("connect-src 'self'", "form-action 'none'", "base-uri 'none'",
                     "frame-ancestors 'none'", f"style-src 'nonce-{nonce}'"):  # fmt: skip
            assert rule in policy
        assert text.count(f'nonce="{nonce}"') == 2 and "NONCE" not in text
    assert len(nonces) == 2
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    elsewhere = set(re.findall(r"https?://[^\s'\"]+", text))
    assert elsewhere == {"http://www.w3.org/2000/svg"}  # the name of SVG, which nobody fetches
    assert "innerHTML" not in text and "insertAdjacent" not in text and "document.write" not in text


def test_unknown_paths_methods_and_bodies_are_refused(web, nobody):
    page = web(nobody)
    assert fetch(page, "/etc/passwd")[0] == 404
    assert fetch(page, "/status.json/")[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "BREW"):
        assert fetch(page, "/", method)[0] == (405 if method == "POST" else 501), method
    assert fetch(page, "/do")[0] == 405
    assert fetch(page, "/rounds.json?after=x&span=1")[0] == 400
    assert fetch(page, "/rounds.json?self=1&known=2")[0] == 200
    assert post(page, "/do", "not JSON")[0] == 400
    assert post(page, "/do", "[]")[0] == 400
    assert post(page, "/do", {"action": "format"})[0] == 400
    assert post(page, "/do", "{" + " " * 5000 + "}")[0] == 413
    assert post(page, "/do", "", Content_Length="-1")[0] == 413
    assert fetch(page, "/", Cookie="c" * 70_000)[0] == 431


def test_hosts_and_origins_of_other_sites_are_refused(web, nobody):
    page = web(nobody)
    port = page.port
    own = socket.gethostname()
    for host in (f"localhost:{port}", "127.0.0.1", "10.1.2.3:80", "[::1]:8513", own, f"{own}:1"):
        assert fetch(page, "/", Host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "a b", "["):
        assert fetch(page, "/status.json", Host=host)[0] in (400, 403), host
    save = {"action": "save"}
    for origin in (
        "null",
        "http://evil.example",
        f"http://localhost:{port}",
        f"http://127.0.0.1:{port}0",
    ):
        assert post(page, "/do", save, Origin=origin)[0] == 403
    assert fetch(page, "/do", "POST", save)[0] == 403  # without any origin
    assert post(page, "/do", save)[0] == 502  # let through, to a server that is not there


def test_slow_and_broken_readers_cost_others_nothing(web, nobody):
    page = web(nobody)
    address = "127.0.0.1", page.port
    with contextlib.ExitStack() as stack:
        slow = []
        for k in range(status_program.MAX_READERS + 50):  # a byte of each, and no more
            slow.append(stack.enter_context(socket.create_connection(address)))
            slow[-1].sendall(b"G")
            if k % 50 == 0:
                assert fetch(page, "/")[0] == 200
        assert slow[0].recv(1) == b""  # it has made room for the others
    with socket.create_connection(address) as conn:
        conn.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert b"Error" in conn.recv(1000)
    with socket.create_connection(address) as conn:
        conn.sendall(b"GET /" + b"x" * 70_000)
        conn.recv(1000)
    with socket.create_connection(address) as conn:
        conn.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")  # and does not wait for it
    assert fetch(page, "/")[0] == 200
    assert "Traceback" not in page.output and len(page.lines) == 1


# --- The token --------------------------------------------------------------------------------


@pytest.fixture
def guarded(serve, web, tmp_path):
    """A server with a token, and a page of it at an address that is not loopback."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    server = serve("-n", 1, "--token-file", file)
    return web(server, "--token-file", file, at="0.0.0.0:0")


def test_elsewhere_than_at_loopback_the_page_needs_a_token(start, nobody):
    script = os.path.join(ROOT, "status.py")
    process = start(script, "--server", nobody, "--web", "0.0.0.0:0")
    assert process.wait() == 2
    assert "could stop the run" in process.output and "--token-file" in process.output
    assert len(process.lines) == 1


def test_the_token_opens_the_page(guarded):
    assert fetch(guarded, "/")[0] == 200  # the form, and nothing of the run
    for path in ("/status.json", "/rounds.json", "/metrics"):
        assert fetch(guarded, path)[0] == 401
        assert fetch(guarded, path, Authorization=f"Bearer {TOKEN}")[0] == 200
    assert post(guarded, "/do", {"action": "stop"})[0] == 401
    assert fetch(guarded, "/metrics", Authorization="Bearer wrong")[0] == 401
    assert post(guarded, "/login", {})[0] == 401
    known = {"Authorization": f"Bearer {TOKEN}"}
    assert post(guarded, "/login", {}, **known, Origin="http://evil.example")[0] == 403

    code, headers, _ = post(guarded, "/login", {}, **known)
    cookie = headers["Set-Cookie"]
    assert code == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    session = cookie.partition(";")[0]
    assert fetch(guarded, "/status.json", Cookie=f"a=b; {session}")[0] == 200
    assert fetch(guarded, "/status.json", Cookie=session[:-1])[0] == 401


# --- JSON and metrics -------------------------------------------------------------------------


def test_json_is_what_the_server_says_and_comes_in_parts(serve, web, toy):
    server = serve("-n", 1)
    page = web(server)
    toy(server, "ada", steps=100000, sync_every=5, pause=0.001, lr=0.001)
    until(lambda: status(server)["round"] >= 5, "rounds")
    found = until(lambda: (s := look(page)).get("round", 0) >= 5 and s, "the page's rounds")
    assert found["watch"]["error"] == "" and found["watch"]["heard_seconds_ago"] < 10
    assert found.keys() - {"watch"} == status(server).keys()
    whole = look(page, "/rounds.json")
    last = whole["points"][-2]["n"]
    more = look(page, f"/rounds.json?after={last}&span={whole['span']}")
    assert more["points"][0]["n"] == last + 1
    assert more["recent"][0]["n"] == last + 1
    for other in ("span=64", f"span={whole['span']}&session=of+another+server"):
        assert look(page, f"/rounds.json?after={last}&{other}")["points"][0]["n"] == 1


def test_many_readers_are_few_requests(serve, web):
    server = serve("-n", 1)
    page = web(server)
    look(page)
    asked = []
    original = status_program.ask
    feed = status_program.Feed(server.address, protocol.PLAIN)
    try:
        status_program.ask = lambda *a, **k: (asked.append(a), original(*a, **k))[1]
        began = time.monotonic()
        for _ in range(200):
            feed.fresh()
        lasted = time.monotonic() - began
        assert len(asked) <= 2 * (1 + lasted / status_program.PAUSE_SECONDS)
    finally:
        status_program.ask = original


def promtool(*arguments, text=""):
    """Run promtool, which has to agree without a word of complaint."""
    if shutil.which("promtool") is None:
        lacking("promtool", "apt-get install -y --no-install-recommends prometheus")
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def samples(text):
    """{name with labels: value} of metrics."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_are_those_of_the_run_and_as_prometheus_wants_them(serve, web, toy):
    server = serve("-n", 1)
    page = web(server)
    toy(server, HOSTILE, steps=100000, sync_every=5, pause=0.001, lr=0.001, evaluate=1)
    until(lambda: (status(server)["evaluation"] or {}).get("step"), "an evaluation")
    before = status(server)

    def read():
        code, headers, text = fetch(page, "/metrics")
        assert code == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return (
            samples(text)["diloco_rounds_total"] >= before["round"] and text
            if "rounds_total " in text
            else None
        )

    text = until(read, "metrics of these rounds")
    after = status(server)
    found = samples(text)
    assert found["diloco_up"] == 1 and found["diloco_running"] == 1 and found["diloco_members"] == 1
    for name, field in (("rounds", "rounds"), ("received_bytes", "bytes_up"), ("steps", "steps")):
        value = found[f"diloco_{name}_total"]
        assert before["totals"][field] <= value <= after["totals"][field]
    label = HOSTILE.replace('"', '\\"')
    assert found[f'diloco_worker_up{{worker="{label}"}}'] == 1
    assert promtool("check", "metrics", text=text) == ""


def test_metrics_of_a_server_that_is_away(web, nobody):
    page = web(nobody)
    text = fetch(page, "/metrics")[2]
    assert samples(text) == {"diloco_up": 0}
    assert "\\" not in text and promtool("check", "metrics", text=text) == ""


def test_labels_are_escaped():
    worker = dict.fromkeys(["step", "loss", "training"], 1) | {"id": 'a"b\\c\nd', "state": "away"}
    fields = {"state": "running", "workers": [worker], "stalls": [], "save_error": None}
    fields |= {"watch": {"error": ""}}
    assert 'diloco_worker_up{worker="a\\"b\\\\c\\nd"} 0\n' in status_program.metrics(fields)


def test_the_alerts_and_the_scrape_config_of_the_readme(tmp_path):
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"```yaml\n(.*?)```", file.read(), re.DOTALL)
    [config] = [block for block in blocks if "scrape_configs:" in block]
    [rules] = [block for block in blocks if "groups:" in block]
    (tmp_path / "diloco-alerts.yml").write_text(rules)
    (tmp_path / "prometheus.yml").write_text(config)
    (tmp_path / "token").write_text(TOKEN)
    assert "5 rules found" in promtool("check", "rules", str(tmp_path / "diloco-alerts.yml"))
    promtool("check", "config", str(tmp_path / "prometheus.yml"))
    known = {"diloco_" + line.split()[0] for line in status_program.METRICS.splitlines()}
    assert set(re.findall(r"diloco_\w+", rules)) <= known


# --- The page in a browser --------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """A browser without a screen."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("playwright", "pip install -r tests/requirements.txt")
    if shutil.which("chromium") is None:
        lacking("chromium", "apt-get install -y --no-install-recommends chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(page, **options): the page in a tab. The console has to stay empty, and nothing but the
    page's own host may be asked for anything."""
    with contextlib.ExitStack() as stack:
        said, asked = [], []

        def run(page, **options):
            context = chromium.new_context(**options)
            stack.callback(context.close)
            tab = context.new_page()
            tab.set_default_timeout(30_000)
            tab.on(
                "console", lambda m: said.append(m.text) if m.type in ("error", "warning") else 0
            )
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            tab.own = f"http://127.0.0.1:{page.port}/"
            tab.said = said
            tab.goto(tab.own)
            return tab

        yield run
        assert said == []
        own = r"(http://127\.0\.0\.1:\d+/|data:,)"
        assert [url for url in asked if not re.match(own, url)] == []


def shows(tab, text):
    """Wait until a text is on the page."""
    tab.get_by_text(text).first.wait_for()


def asks(tab, button, answer):
    """Press a button, and accept or dismiss what is asked. Returns the question."""
    said = []
    tab.once("dialog", lambda dialog: (said.append(dialog.message), getattr(dialog, answer)()))
    tab.get_by_role("button", name=button).click()
    return said[0]


def run_of_two(serve, toy, *arguments):
    """A server with two workers that have done some rounds."""
    server = serve("-n", 2, *arguments)
    toys = [
        toy(server, id, steps=100000, sync_every=5, pause=0.01, lr=0.001, evaluate=1)
        for id in ("ada", "bob")
    ]
    until(lambda: status(server)["round"] >= 4, "rounds")
    return server, toys


def test_the_page_shows_what_the_run_says(serve, web, toy, visit):
    server, _ = run_of_two(serve, toy)
    page = web(server)
    tab = visit(page)
    shows(tab, "DiLoCo is running")
    before = status(server)
    read = (
        "id => [...document.querySelectorAll('#figures div')].map(d => d.children[1].textContent)"
    )
    step, number, *_ = until(
        lambda: (f := tab.evaluate(read)) and int(f[1].replace(",", "")) >= before["round"] and f,
        "the page is as new",
    )
    after = status(server)
    assert before["step"] <= int(step.replace(",", "")) <= after["step"]
    assert before["round"] <= int(number.replace(",", "")) <= after["round"]
    workers = tab.locator("#workers tr").all_inner_texts()
    assert [line.split("\t")[0] for line in workers[1:]] == ["ada", "bob"]
    # The curve of the global model goes through the evaluations of the history.
    values = tab.evaluate("rounds.points.map(p => [p.n, p.evaluation, p.losses.ada])")
    told = {
        p["n"]: [p["evaluation"], p["losses"]["ada"]] for p in look(page, "/rounds.json")["points"]
    }
    assert len(values) >= 4 and all(told[n] == rest for n, *rest in values[:-1])
    # The arrow keys read what the history says of its last round.
    chart = tab.locator("#bytes > svg")
    chart.focus()
    chart.press("Home")
    assert tab.locator("#bytes .tip").inner_text().split("\n")[0] == "round 1"
    assert "up 0.000232" in tab.locator("#bytes .tip").inner_text()  # 58 numbers of 2 bytes, twice
    chart.press("Escape")
    assert tab.locator("#bytes .tip").is_hidden()
    tab.locator("#loss > svg").hover()
    tab.locator("#loss .tip").wait_for()
    assert re.search(r"^step [\d,]+\n(.*\n)*ada \d", tab.locator("#loss .tip").inner_text())


def test_odd_losses_and_clocks_do_not_hang_the_page(serve, web, toy, visit):
    server, _ = run_of_two(serve, toy)
    tab = visit(web(server))
    until(lambda: tab.evaluate("rounds.points.length") > 2, "charts")
    drawn = """change => {
      const point = rounds.points[0], row = (_, k) => ({...point, n: k + 1, time: point.time + k});
      const points = Array.from({length: 60}, row);
      points.forEach((p, k) => Object.assign(p, change.all, k < 2 ? change.first : {}));
      show(run, {...rounds, session: "", points});
      return ["loss", "members"].map(id => [...$(id).querySelectorAll("svg text")].map(t => t.textContent));
    }"""
    none, some = {"losses": {}, "evaluation": None}, {"losses": {"ada": 2.5}}
    far = {"all": {"step": 1 << 53}, "first": {"time": 0}}
    for change in ({"all": none}, {"all": none, "first": some}, {"first": {"time": -1e18}}, far):
        assert all(5 < len(texts) < 120 for texts in tab.evaluate(drawn, change)), change
    labels = tab.evaluate(drawn, {"all": {"losses": {"ada": 3e-13}, "evaluation": 1e30}})[0]
    assert "1e+30" in labels and max(map(len, labels)) < 8


def test_the_page_follows_a_death_and_a_return(serve, web, toy, visit):
    server, toys = run_of_two(serve, toy, "--worker-timeout", 3)
    page = web(server)
    tab = visit(page)
    row = tab.get_by_role("button", name="Drop bob")
    row.wait_for()
    toys[1].kill()
    row.wait_for(state="detached")
    shows(tab, re.compile(r"^bob left \d+s ago: "))
    assert status(server)["gone"][0]["id"] == "bob"
    toy(server, "bob", steps=100000, sync_every=5, pause=0.01, lr=0.001)
    row.wait_for()
    tab.get_by_text(re.compile(r"^bob left")).wait_for(state="detached")


def test_a_server_that_dies_is_said_and_what_it_said_stays(serve, web, toy, visit):
    server, _ = run_of_two(serve, toy)
    page = web(server)
    tab = visit(page)
    tab.get_by_role("button", name="Drop bob").wait_for()
    server.kill()
    shows(tab, re.compile(r"has not answered since \d\d:\d\d:\d\d"))
    assert tab.locator("#workers tr").count() == 3
    page.kill()
    tab.said.clear()  # what a browser says of a refused connection comes from here on
    shows(tab, re.compile(r"status.py has not answered since \d\d:\d\d:\d\d"))
    tab.close()
    tab.said.clear()


def test_a_server_that_hangs_counts_as_away_and_comes_back(serve, web, visit):
    server = serve("-n", 2)
    page = web(server)
    tab = visit(page)
    shows(tab, "DiLoCo is waiting for workers")
    server.signal(signal.SIGSTOP)
    try:
        shows(tab, "it takes long to answer")
        assert samples(fetch(page, "/metrics")[2]) == {"diloco_up": 0}
    finally:
        server.signal(signal.SIGCONT)
    shows(tab, "DiLoCo is waiting for workers")


def test_the_buttons_do_what_they_say(serve, web, toy, visit):
    server, toys = run_of_two(serve, toy)
    tab = visit(web(server))
    assert asks(tab, "Save", "dismiss").startswith("Save a checkpoint?")
    asks(tab, "Save", "accept")
    server.wait_for(r"saved .*checkpoint-\d+")
    assert asks(tab, "Drop bob", "accept").startswith("Drop bob?")
    assert toys[1].wait() == 0
    until(lambda: [w["id"] for w in status(server)["workers"]] == ["ada"], "bob is dropped")
    asks(tab, "Stop", "accept")
    assert toys[0].wait() == 0, toys[0].output
    server.wait_for("the model of round")
    tab.said.clear()


def test_a_hostile_worker_stays_text(serve, web, toy, visit):
    server = serve("-n", 1)
    toy(server, HOSTILE, steps=100000, sync_every=5, pause=0.01, lr=0.001)
    tab = visit(web(server))
    tab.get_by_role("cell", name=protocol.shown(HOSTILE), exact=True).wait_for()
    assert asks(tab, f"Drop {HOSTILE}", "dismiss").startswith(f"Drop {HOSTILE}?")
    until(lambda: tab.evaluate("rounds.points.length") > 1, "charts")
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 1
    assert "owned" not in tab.title()


def test_names_that_javascript_knows_are_names(serve, web, toy, visit):
    server = serve("-n", 2)
    for id in ("__proto__", "constructor"):
        toy(server, id, steps=100000, sync_every=5, pause=0.01, lr=0.001)
    tab = visit(web(server))
    until(lambda: tab.evaluate("rounds.points.length") > 2, "charts")
    text = tab.locator("#loss .legend").inner_text()
    assert "__proto__" in text and "constructor" in text


def test_a_phone_shows_it_without_scrolling_sideways(serve, web, toy, visit):
    server, _ = run_of_two(serve, toy)
    toy(server, "w" * 100, steps=100000, sync_every=5, pause=0.01, lr=0.001)
    page = web(server)
    for scheme in ("light", "dark"):
        tab = visit(page, viewport=PHONE, color_scheme=scheme)
        tab.get_by_role("button", name="Drop www").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert tab.locator("tr:last-child td:nth-child(2)").bounding_box()["width"] > 40
        wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 321)"
        assert tab.evaluate(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []


def test_the_keyboard_reaches_every_control(serve, web, toy, visit):
    server, _ = run_of_two(serve, toy)
    tab = visit(web(server))
    tab.get_by_role("button", name="Drop bob").wait_for()
    until(lambda: tab.evaluate("rounds.points.length") > 2, "charts")
    reached = []
    for _ in range(10):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate(
            "[document.activeElement.ariaLabel ?? document.activeElement.textContent,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        ))  # fmt: skip
    names = [name.partition(".")[0] for name, _ in reached]
    assert names == [
        "Save", "Stop", "over steps or over time", "Loss of each worker and of the global model",
        "What each worker did in the last rounds", "Seconds per round", "Bytes per round",
        "Members over time", "Drop ada", "Drop bob",
    ]  # fmt: skip
    assert {outline for _, outline in reached} == {"solid"}  # the focus is seen


def test_a_reader_logs_in_with_the_token(guarded, visit):
    tab = visit(guarded)
    tab.get_by_label("token of the run").fill("wrong")
    with tab.expect_event("dialog") as said:
        tab.on("dialog", lambda dialog: dialog.accept())
        tab.keyboard.press("Enter")
    assert said.value.message == "this is not the token of the run"
    tab.get_by_label("token of the run").fill(TOKEN)
    tab.keyboard.press("Enter")
    shows(tab, "DiLoCo is waiting for workers")
    assert tab.get_by_label("token of the run").is_hidden()
    tab.said[:] = [line for line in tab.said if "401" not in line]  # of before the log-in
