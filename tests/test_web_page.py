"""The page in headless Chromium, against a running ground station with four boards over a real broker.

What is on the screen is read from the document by Playwright. Screenshots (light, dark, phone) are kept in $SPACEMOE_ARTEFACTS
where it is set: a person looks at them. Boards' sensors are simulated; all else is what an operator has.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import lacking
from test_mission import HOSTILE, LIMITS
from web_rig import Options, sample, station

from ground_station import web_tokens
from ground_station.archive_records import RequestRecord, TokenRecord

pytestmark = [pytest.mark.slow, pytest.mark.broker]

WAIT_MS = 30_000  # this machine may have other work
NODES = ("sat-1", "sat-2", "sat-3", "sat-4")


@pytest.fixture(scope="module")
def chromium():
    program = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("playwright", "pip install playwright")
    if program is None:
        lacking("chromium", "apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A ground station, and four boards that send twice a second."""
    folder = tmp_path_factory.mktemp("page")
    limits = folder / "limits.toml"
    limits.write_text(LIMITS)
    with station(folder, limits=limits) as running:
        for node in NODES:
            running.board(node, keepalive_s=3).run_at(0.5)
        yield running


@pytest.fixture
def open_page(chromium):
    """Opens pages and fails the test for whatever the browser has to say against them."""
    contexts, wrong = [], []

    def make(url: str, **options):
        options.setdefault("viewport", {"width": 1440, "height": 900})
        context = chromium.new_context(**options)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        # an answer of 400 is what some tests ask for, and Chromium calls it an error
        told = "the server responded with a status of 400"
        page.on(
            "console",
            lambda said: (
                wrong.append(f"console: {said.text}") if said.type == "error" and told not in said.text else None
            ),
        )
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        own = (url.partition("#")[0], "data:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else wrong.append(asked.url))
        page.goto(url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert wrong == []


def cell(page, node: str, column: int) -> list[str]:
    """The parts of a cell of the fleet table, by node and column (0: the node itself)."""
    row = page.locator("#fleet-table tbody tr", has=page.locator(f"th button:text-is('{node}')"))
    return [part for part in row.locator("th, td").nth(column).locator("> *").all_inner_texts() if part]


def wait(page, expression: str, argument=None) -> None:
    page.wait_for_function(expression, arg=argument)


def text_has(page, selector: str, text: str) -> None:
    wait(page, "([s, t]) => [...document.querySelectorAll(s)].some(e => e.textContent.includes(t))", [selector, text])


def painted(page, selector: str) -> int:
    """How many colours a canvas shows."""
    return page.evaluate(
        """(selector) => {
            const canvas = document.querySelector(selector);
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const seen = new Set();
            for (let i = 0; i < data.length; i += 4) if (data[i + 3]) seen.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
            return seen.size;
        }""",
        selector,
    )


def keep(page, name: str) -> None:
    if folder := os.environ.get("SPACEMOE_ARTEFACTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def speak(running, request: str, pieces: list[str]) -> None:
    """A request with its tokens, as the engine would tell of it."""
    record = RequestRecord(request, "generate", time.time(), 3)
    running.mission.request(record)
    for i, piece in enumerate(pieces):
        running.mission.token(TokenRecord(request, i, i, piece, time.time(), 25.0, 5.0, 1.0, 2.0, 9.0, 8.0, 4200, 3900))
        running.mission.heat.ran(i % 2, [i % 2])
    running.mission.request(replace(record, state="done", tokens=len(pieces), energy_j=12.5, energy_scope="boards"))


def orbit(running, node: str, up: float) -> None:
    values = (("link_up", up), ("lit_share", 0.2), ("temp_c", 61.5), ("soc", 0.7), ("duty_cap", 0.9))
    state = {
        "node": node,
        "mission_at": 1.8e9,
        "scale": 60.0,
        "generated_at": time.time(),
        "invalid": "",
        "samples": [sample(name, value, "1", "virtual") for name, value in values],
    }
    running.boards[0].client.publish(running.control.topics.satellite(node), json.dumps(state))


def test_every_part_shows_live_values(live, open_page):
    page = open_page(live.url)
    text_has(page, "#link", "live")
    text_has(page, "#counts", "4 online · 0 stale · 0 offline")
    text_has(page, "#timeline-body", "No scenario is running")
    # fleet: value, unit, badge, and it goes on
    assert cell(page, "sat-1", 3) == ["45", "°C", "S"]
    live.boards[0].values["temp_c"] = (47.5, "degC", "simulated")
    text_has(page, "#fleet-table .v", "47.50")
    # trends
    wait(page, "() => [...document.querySelectorAll('#trend-charts .chart')].every(c => Number(c.dataset.points) > 8)")
    assert page.locator("#trend-charts figcaption b").all_inner_texts() == ["temp_c", "power_w"]
    wait(page, "() => document.querySelector('#trend-charts canvas').width > 100")
    page.wait_for_timeout(1100)
    assert painted(page, "#trend-charts canvas") > 5  # lines of four nodes and the limits' bands
    # orbit
    orbit(live, "sat-1", 1.0)
    orbit(live, "sat-2", 0.0)
    text_has(page, "#timeline-body table", "no contact")
    text_has(page, "#timeline-body table", "61.50")
    # experts
    text_has(page, "#experts-note", "2 layers × 2 experts, 16 shards, 12 of them replicas")
    assert painted(page, "#experts-canvas") > 4
    # tokens
    speak(live, "first", ["Hello", ", ", "<b>world</b>", "\n"])
    text_has(page, "#token-text", "Hello, <b>world</b>")
    text_has(page, "#token-note", "12.50 J (boards)")
    assert page.locator("#token-table tbody tr").count() == 4
    # events, alarms, commands
    live.boards[1].event("watch", "update", "the new agent is good")
    text_has(page, "#event-table", "the new agent is good")
    text_has(page, "#alarm-list", "Nothing is wrong")
    text_has(page, "#limit-set", "bench")
    page.select_option("#command-node", "sat-2")
    page.select_option("#command-name", "ping")
    page.click("#command-send")
    text_has(page, "#command-out", "ok: did ping")
    text_has(page, "#command-table tbody", "did ping")
    keep(page, "light")
    page.keyboard.press("Escape")
    page.locator("body").press("t")
    page.locator("body").press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 18, 25)"
    page.wait_for_timeout(1200)
    keep(page, "dark")


def test_a_limit_is_crossed_the_alarm_latches_and_is_acknowledged_by_keyboard(live, open_page):
    page = open_page(live.url)
    text_has(page, "#counts", "4 online")
    live.boards[2].values["temp_c"] = (85.0, "degC", "simulated")
    text_has(page, "#alarm-list", "sat-3 · temp_c")
    text_has(page, "#alarm-say", "critical alarm, sat-3 temp_c")  # for whoever hears the page
    text_has(page, "#alarm-count", "1 of 1 alarm waits")
    text_has(page, "#fleet-table td.critical b.level", "▲C")
    live.boards[2].values["temp_c"] = (50.0, "degC", "simulated")
    text_has(page, "#alarm-list .tag", "returned")
    page.wait_for_timeout(1500)
    assert page.locator("#alarm-list .card").count() == 1  # it latches
    page.locator("body").press("a")
    page.keyboard.type("seen <it>")
    page.keyboard.press("Enter")
    text_has(page, "#alarm-list", "Nothing is wrong")
    assert live.mission.alarm_list() == []
    live.mission.archive.flush()
    last = live.get("/api/v1/alarms?since=0").tree["changes"][-1]
    assert (last["state"], last["text"], last["who"]) == ("cleared", "seen <it>", "local")


def test_hazardous_commands_ask_again_and_a_cancelled_one_is_not_sent(live, open_page):
    page = open_page(live.url)
    text_has(page, "#counts", "4 online")
    page.select_option("#command-node", "sat-1")
    page.select_option("#command-name", "duty")
    text_has(page, "#command-about", "Hazardous")
    page.click("#command-send")
    text_has(page, "#command-out", "cap")  # without arguments it is refused, with the reason
    page.fill("input[name=cap]", "0.5")
    page.fill("input[name=valid_s]", "30")
    page.click("#command-dry")
    text_has(page, "#command-out", "spacemoe/v1/test/node/sat-1/command/duty")
    sent = [command for command in live.boards[0].commands if command["name"] == "duty"]
    assert sent == []
    page.click("#command-send")
    page.click("#confirm button[value=no]")
    text_has(page, "#command-out", "Not sent.")
    assert [command for command in live.boards[0].commands if command["name"] == "duty"] == []
    page.click("#command-send")
    page.click("#confirm button[value=yes]")
    text_has(page, "#command-out", "ok: did duty")
    assert [c["arguments"] for c in live.boards[0].commands if c["name"] == "duty"] == [{"cap": "0.5", "valid_s": "30"}]


def test_history_survives_a_reload_and_a_replay_shows_the_same_traces(live, open_page):
    page = open_page(live.url)
    for value in (51.25, 52.5, 53.75):
        live.boards[0].values["temp_c"] = (value, "degC", "simulated")
        wait(page, "v => missionControl.trends.cache.get('sat-1', 'temp_c').value.includes(v)", value)
    before = page.evaluate("missionControl.trends.cache.get('sat-1', 'temp_c')")
    live.mission.archive.flush()
    page.reload()
    wait(page, "n => missionControl.trends.cache.get('sat-1', 'temp_c').at.length >= n", len(before["at"]))
    after = page.evaluate("missionControl.trends.cache.get('sat-1', 'temp_c')")
    assert after["at"][0] <= before["at"][0] + 0.01 and {51.25, 52.5, 53.75} <= set(after["value"])

    page.click("#mode-replay")
    text_has(page, "#link", "replay")
    wait(
        page,
        "() => document.getElementById('replay-text').textContent.endsWith('UTC') && !document.getElementById('replay-play').disabled",
    )
    page.select_option("#replay-speed", "60")
    until = before["at"][-1]
    wait(page, "t => missionControl.store.playhead_s >= t || !missionControl.replay.playing", until)
    wait(
        page,
        "t => { const s = missionControl.trends.cache.get('sat-1', 'temp_c'); return s.at.some(at => at >= t - 0.01); }",
        until,
    )
    replayed = page.evaluate("missionControl.trends.cache.get('sat-1', 'temp_c')")
    shown = {round(at, 2): value for at, value in zip(replayed["at"], replayed["value"])}
    recorded = [(round(at, 2), value) for at, value in zip(before["at"], before["value"]) if value is not None]
    assert len(recorded) >= 3
    differing = [(at, value) for at, value in recorded if shown.get(at, shown.get(round(at + 0.01, 2))) != value]
    assert differing == [], (differing[:5], list(shown.items())[:5])
    assert page.locator("#command-send").is_disabled()
    page.click("#mode-live")
    text_has(page, "#link", "live")
    text_has(page, "#counts", "4 online")


def test_what_was_chosen_is_in_the_address(live, open_page):
    page = open_page(live.url)
    text_has(page, "#counts", "4 online")
    page.click("#trend-signals-summary")
    page.locator("#trend-signals label", has_text="duty").locator("input").check()
    page.keyboard.press("Escape")
    page.select_option("#trend-span", "300")
    page.locator("#fleet-table th button", has_text="power").click()
    address = page.url
    again = open_page(live.url + address[len(live.url) :])
    text_has(again, "#trend-charts figcaption", "duty")
    assert again.input_value("#trend-span") == "300"
    assert again.locator("#fleet-table th[aria-sort=ascending]").inner_text() == "power ▲"
    hostile = open_page(
        live.url + "#%7B%22nodes%22%3A%22x%22%2C%22signals%22%3A%5B%7B%7D%5D%2C%22span%22%3A%22%3Cb%3E%22%7D"
    )
    text_has(hostile, "#counts", "4 online")


def test_keys_focus_and_names(live, open_page):
    page = open_page(live.url)
    text_has(page, "#counts", "4 online")
    page.locator("body").press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.locator("body").press("/")
    page.keyboard.type("sat-3")
    wait(page, "() => document.querySelectorAll('#fleet-table tbody tr').length === 1")
    page.fill("#fleet-filter", "")
    page.locator("#fleet-filter").blur()
    page.locator("body").press("6")
    assert page.evaluate("document.activeElement.id") == "tokens"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a, canvas[tabindex]")].filter(e =>
            !(e.innerText || e.ariaLabel || (e.labels && e.labels.length) || e.title || e.placeholder)).map(e => e.outerHTML)"""
    )
    assert nameless == []
    outlines = set()
    for _ in range(9):
        page.keyboard.press("Tab")
        outlines.add(page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
    assert outlines == {"solid"} or outlines == {"solid", "auto"}
    page.locator("#fleet-table th button:text-is('sat-2')").press("Enter")
    text_has(page, "#node-table tbody", "energy_j")
    text_has(page, "#node-about", "test board")
    page.keyboard.press("Escape")


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_it_without_scrolling_sideways(live, open_page, width):
    page = open_page(
        live.url, viewport={"width": width, "height": 800}, device_scale_factor=2, is_mobile=True, has_touch=True
    )
    text_has(page, "#counts", "4 online")
    wait(page, "() => document.querySelector('#trend-charts .chart').dataset.points > 4")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    keep(page, f"phone-{width}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(live, open_page, scheme):
    """WCAG 2.1, 1.4.3: a contrast of 4.5 at least; computed here from the colours that the browser uses."""
    page = open_page(live.url, color_scheme=scheme, reduced_motion="reduce")
    text_has(page, "#counts", "4 online")
    found = page.evaluate(
        """() => {
            const probe = document.createElement("div");
            document.body.append(probe);
            const rgb = (name) => {
                probe.style.color = `var(${name})`;
                return getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(Number);
            };
            const pairs = [["--accent", "--panel"], ["--good", "--panel"], ["--good", "--good-bg"]];
            pairs.push(["--bad", "--bad-bg"], ["--bad", "--panel"]);
            for (const ink of ["--text", "--muted"]) for (const ground of ["--panel", "--panel-2"]) pairs.push([ink, ground]);
            for (const level of ["watch", "warning", "distress", "critical", "severe"]) pairs.push([`--level-${level}`, `--bg-${level}`]);
            return pairs.map(([ink, ground]) => [ink, ground, rgb(ink), rgb(ground)]);
        }"""
    )

    def luminance(rgb):
        parts = [c / 255 for c in rgb]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low = []
    for ink, ground, a, b in found:
        light, dark = sorted((luminance(a), luminance(b)), reverse=True)
        if (light + 0.05) / (dark + 0.05) < 4.5:
            low.append((ink, ground, round((light + 0.05) / (dark + 0.05), 2)))
    assert low == []


def test_hostile_strings_are_text_and_break_nothing(tmp_path, open_page):
    limits = tmp_path / "limits.toml"
    limits.write_text(LIMITS)
    with station(tmp_path, limits=limits) as running:
        board = running.board("n1", board=HOSTILE[0])
        values = (1e308, -1e308, 5e-324, 0.0, 1.0, 2.0, 3.0)
        board.telemetry(*(sample(name, value, HOSTILE[0]) for name, value in zip(HOSTILE, values)))
        for text in HOSTILE:
            board.event("severe", text[:50], text)
        speak(running, "<script>alert(1)</script>", HOSTILE)
        page = open_page(running.url)
        text_has(page, "#event-table", HOSTILE[0])
        text_has(page, "#fleet-table .board", HOSTILE[0])
        text_has(page, "#token-text", HOSTILE[0])
        text_has(page, "#alarm-list", HOSTILE[0])
        page.click("#trend-signals-summary")
        page.locator("#trend-signals label", has_text="onerror").locator("input").check()
        page.keyboard.press("Escape")
        text_has(page, "#trend-charts figcaption", "onerror")
        page.locator("#fleet-table th button:text-is('n1')").click()
        text_has(page, "#node-table", "1.00e+308")
        page.keyboard.press("Escape")
        board.telemetry(sample("temp_c", 50.0, "degC"))
        text_has(page, "#fleet-table .v", "50")  # it goes on
        assert page.locator("img, b b, script:not([src])").count() == 0
        assert page.evaluate("document.body.innerText.includes('\\u202e')") is False


def test_a_silent_board_turns_stale_and_then_offline(tmp_path, open_page):
    with station(tmp_path) as running:
        board = running.board("n1", keepalive_s=60).run_at(0.3)
        page = open_page(running.url)
        text_has(page, "#fleet-table .state", "online")
        seen = page.evaluate_handle(
            """() => {
                const seen = [];
                const look = () => {
                    const state = document.querySelector("#fleet-table .state").textContent.slice(2);
                    if (seen[seen.length - 1] !== state) seen.push(state);
                };
                const table = document.getElementById("fleet-table");
                new MutationObserver(look).observe(table, {subtree: true, childList: true, characterData: true});
                return seen; }"""
        )
        board.fall_silent()  # a hang: the connection stays open, and the broker waits for its keep-alive
        text_has(page, "#fleet-table .state", "stale")
        board.client.socket().close()  # now the machine is gone
        text_has(page, "#fleet-table .state", "offline")
        assert [state for state in seen.json_value() if state != "online"] == ["stale", "offline"]


def test_a_viewer_signs_in_and_has_no_buttons_and_the_page_comes_back_after_a_restart(tmp_path, open_page, chromium):
    path = tmp_path / "tokens.json"
    token = web_tokens.add(path, "eve", "viewer")
    with station(tmp_path, Options(port=0, tokens=path)) as running:
        running.board("n1").run_at(0.5)
        port = running.served.port
        context = chromium.new_context()
        page = context.new_page()
        page.goto(running.url)
        assert page.locator("#fleet").count() == 0
        page.fill("#token", token)
        page.keyboard.press("Enter")
        text_has(page, "#counts", "1 online")
        text_has(page, "#role", "you are a viewer")
        assert page.locator("#command-send").is_disabled()
        assert page.context.cookies()[0]["httpOnly"] and "spacemoe" not in page.evaluate("document.cookie")
    text_has(page, "#link", "no connection")
    with station(tmp_path, Options(port=port, tokens=path, fallback=False)):
        page.wait_for_selector("#token")  # its session went with the server: it is asked for again
    context.close()
