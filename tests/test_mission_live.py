"""Mission control as a user has it: `spacemoe demo --serve` with four simulated boards in orbit, its page in Chromium, OpenAI's client,
mosquitto_sub beside it. Leaves out a flashed fleet (test_fleet_up.py) and each part by itself (test_web_page.py, test_api_openai.py).

SPACEMOE_TEST_LISTEN_S: for how long messages are judged by their schemas (default: 15 s).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import psutil
import pytest
from test_web_page import chromium, open_page, text_has, wait  # noqa: F401  (fixtures)

from ground_station.broker import free_port
from ground_station.limits_file import SHIPPED
from node_agent import schema

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
pytestmark = [pytest.mark.slow, pytest.mark.broker]
LISTEN_S = float(os.environ.get("SPACEMOE_TEST_LISTEN_S", 15))


class Demo:
    def __init__(self, folder: Path):
        self.port, self.log = free_port(), folder / "demo.log"
        limits = folder / "limits.toml"
        text = SHIPPED.read_text()
        assert text.count("green_high = 70\nyellow_high = 78\nred_high = 84\n") == 1
        # simulated boards run at 40 to 60 degrees
        limits.write_text(text.replace("green_high = 70\nyellow_high = 78\nred_high = 84\n", "yellow_high = 20\n", 1))
        words = ("demo", "--serve", "--scenario", "hot-eclipse", "--tokens", "12", "--broker", "mosquitto")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "ground_station.cli", *words]
                + ["--web-port", str(self.port), "--limits", str(limits)],
                stdout=log,
                stderr=log,
                env=ENV,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def wait(self, pattern: str, timeout_s: float = 120.0) -> re.Match:
        end_s = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.log.read_text(errors="replace"))):
            assert self.process.poll() is None and time.monotonic() < end_s, self.log.read_text(errors="replace")[
                -2000:
            ]
            time.sleep(0.1)
        return found

    def agents(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "node_agent.cli" in child.cmdline()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    if shutil.which("mosquitto") is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    running = Demo(tmp_path_factory.mktemp("demo"))
    running.wait(r"API: http")
    yield running
    running.process.send_signal(signal.SIGINT)
    try:
        assert running.process.wait(30) == 130
    finally:
        running.process.kill()


def test_every_message_follows_its_schema(demo):
    """mosquitto_sub shows JSON that a person can read, and each message is what its schema says."""
    port = demo.wait(r"broker mosquitto on 127\.0\.0\.1:(\d+)").group(1)
    # %U stamps are not needed; a line each: topic, a blank, payload
    line = ["mosquitto_sub", "-V", "5", "-p", port, "-t", "spacemoe/#", "-F", "%t %p", "-W", str(int(LISTEN_S))]
    lines = subprocess.run(line, capture_output=True, text=True, timeout=LISTEN_S + 30).stdout.splitlines()
    of_leaf = {name: jsonschema.Draft202012Validator(schema.schema(kind)) for name, kind in schema.MESSAGES.items()}
    seen: dict[str, int] = {}
    for each in lines:
        topic, _, payload = each.partition(" ")
        parts = topic.split("/")
        assert parts[:2] == ["spacemoe", "v1"], topic
        name = "satellite" if parts[3] == "satellite" else f"ground_{parts[4]}" if parts[3] == "ground" else parts[5]
        name = "event" if name == "ground_event" else name
        of_leaf[name].validate(json.loads(payload))
        seen[name] = seen.get(name, 0) + 1
    assert seen["birth"] == 4 and seen["telemetry"] >= 4 * (LISTEN_S - 5) and seen["satellite"] > 4, seen
    broken = json.loads(next(each for each in lines if "/telemetry " in each).partition(" ")[2])
    broken["samples"][0]["provenance"] = "guessed"
    with pytest.raises(jsonschema.ValidationError):
        of_leaf["telemetry"].validate(broken)


def test_openais_client_is_served_by_the_boards(demo):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{demo.url}v1", api_key="none on loopback", max_retries=0, timeout=60)
    (model,) = client.models.list().data
    greedy = {"model": model.id, "prompt": "In the beginning", "max_tokens": 8, "temperature": 0}
    one, two = client.completions.create(**greedy), client.completions.create(**greedy)
    assert one.choices[0].text == two.choices[0].text and one.usage.completion_tokens == 8
    extra = one.usage.model_extra
    assert extra["energy_j"] > 0 and extra["energy"]["provenance"] == "simulated", extra
    chat = client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": "Say something"}], max_tokens=6, seed=1, stream=True
    )
    assert len([part for part in chat if part.choices]) >= 2


def test_every_part_of_the_page_lives(demo, open_page):  # noqa: F811
    page = open_page(demo.url)
    text_has(page, "#counts", "4 online")
    text_has(page, "#fleet-table .badge, #fleet-table td", "S")
    wait(page, "() => [...document.querySelectorAll('#trend-charts .chart')].every(c => Number(c.dataset.points) > 8)")
    text_has(page, "#timeline-body table", "sunlight")
    text_has(page, "#experts-note", "experts")
    wait(page, "() => document.querySelector('#token-text').textContent.length > 8")
    assert page.locator("#token-table tbody tr").count() >= 6
    text_has(page, "#alarm-list", "temp_c")
    text_has(page, "#event-table", "started")
    page.locator("#command-send").click()
    text_has(page, "#command-table tbody", "ping")
    if folder := os.environ.get("SPACEMOE_ARTEFACTS"):
        page.screenshot(path=str(Path(folder) / "demo.png"), full_page=True)


def test_a_stopped_agent_is_stale_and_a_dead_one_offline(demo, open_page):  # noqa: F811
    """The last test: it takes a board away."""
    page = open_page(demo.url)
    text_has(page, "#counts", "4 online")
    agent = demo.agents()[0]
    agent.suspend()
    try:
        text_has(page, "#counts", "3 online · 1 stale")
    finally:
        agent.resume()
    text_has(page, "#counts", "4 online")
    agent.kill()
    text_has(page, "#counts", "3 online · 0 stale · 1 offline")
    text_has(page, "#alarm-list", "(node)")
