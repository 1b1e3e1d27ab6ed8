"""From a new fleet folder to tokens on loopback: the commands a user gives, boards as stock `node-agent` processes, a real mosquitto.

Boards differ from flashed ones in two things: the pack's state_dir is a folder of the test, and no card is written.
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
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ground_station.broker import free_port
from ground_station.cli_shared import reference_bundle

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
PORTS = ("broker", "enrol", "data", "delivery")


def spacemoe(*arguments: object, ok: bool = True) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "ground_station.cli", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=120,
    )
    assert (done.returncode == 0) is ok, done.stderr + done.stdout
    return json.loads(done.stdout) if done.stdout.strip() else {"stderr": done.stderr}


class Rig:
    """A fleet folder, its ground station, and boards; ended with the test."""

    def __init__(self, folder: Path):
        self.folder, self.fleet = folder, folder / "lab"
        self.processes: dict[str, subprocess.Popen] = {}
        ports = [argument for name in PORTS for argument in (f"--{name}-port", free_port())]
        spacemoe("fleet", "init", "lab", "--host", "127.0.0.1", "--dir", self.fleet, *ports)

    def start(self, name: str, *command: object) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)], stdout=log, stderr=log, env=ENV
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait(self, name: str, pattern: str, timeout_s: float = 30.0, after: int = 0) -> float:
        """Until the log holds `pattern` beyond `after`; how long it took."""
        began_s = time.monotonic()
        while not re.search(pattern, self.log(name)[after:]):
            assert time.monotonic() - began_s < timeout_s, f"{pattern!r} not in {name}.log:\n{self.log(name)[-3000:]}"
            time.sleep(0.02)
        return time.monotonic() - began_s

    def add(self, node: str) -> Path:
        spacemoe("fleet", "add", node, "--board", "qemu-virt", "--dir", self.fleet, "--out", self.folder / "packs")
        pack = self.folder / "packs" / node
        config = pack / "spacemoe.toml"
        state = self.folder / node / "state"
        state.mkdir(parents=True)
        text = config.read_text()
        assert '"/var/lib/spacemoe"' in text
        config.write_text(text.replace('"/var/lib/spacemoe"', json.dumps(str(state))))
        return pack

    def board(self, node: str, pack: Path) -> None:
        """What a card's first boot does, then the agent."""
        home = self.folder / node / "node"
        subprocess.run(
            [sys.executable, "-m", "node_agent.cli", "first-boot", "--pack", pack, "--to", home],
            check=True,
            env=ENV,
            timeout=60,
            capture_output=True,
        )
        self.start(node, "node_agent.cli", "run", "--config", home / "spacemoe.toml")

    def end(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGINT)
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
def rig(tmp_path, mosquitto):
    made = Rig(tmp_path)
    yield made
    made.end()


@pytest.mark.slow
@pytest.mark.broker
def test_a_new_fleet_writes_what_one_process_writes_and_a_revoked_node_is_out(rig):
    bundle = rig.folder / "bundle"
    shutil.copytree(reference_bundle(), bundle)
    spacemoe("bundle", "sign", bundle, "--dir", rig.fleet)
    rig.start("up", "ground_station.cli", "up", "--dir", rig.fleet, "--time-port", 0)
    rig.wait("up", "nodes on record")
    for node in ("sat-1", "sat-2"):
        rig.board(node, rig.add(node))
        rig.wait("up", f"{node} online")
    generate = ("generate", "In the beginning", "--dir", rig.fleet, "--bundle", bundle, "--tokens", 8, "--parity")
    first = spacemoe(*generate)
    assert first["parity"]["equal"] is True and first["parity"]["max_logit_diff"] == 0
    assert set(first["boards"]) == {"sat-1", "sat-2"} and first["ladder"] == {}
    assert first["delivered"]["bytes"] > 1e6
    again = spacemoe(*generate)  # the boards keep what they got
    assert again["delivered"] == {"shards": 0, "bytes": 0, "s": again["delivered"]["s"]}
    assert again["text"] == first["text"]

    seen = len(rig.log("up"))
    spacemoe("fleet", "revoke", "sat-2", "--yes", "--dir", rig.fleet)
    assert rig.wait("up", "sat-2 offline", after=seen) < 2.0
    alone = spacemoe(*generate)  # its experts go to the one that is left
    assert set(alone["boards"]) == {"sat-1"} and alone["parity"]["equal"] is True
    time.sleep(1.0)
    assert "sat-2 online" not in rig.log("up")[seen:]
    listed = {row["id"]: row["state"] for row in spacemoe("fleet", "list", "--dir", rig.fleet)["nodes"]}
    assert listed == {"sat-1": "enrolled", "sat-2": "revoked"}


def ask(url: str, path: str, body: dict | None = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
@pytest.mark.broker
def test_up_serves_its_fleets_model_and_keeps_what_happened(rig):
    bundle = rig.folder / "bundle"
    shutil.copytree(reference_bundle(), bundle)
    spacemoe("bundle", "sign", bundle, "--dir", rig.fleet)
    words = ("up", "--dir", rig.fleet, "--time-port", 0, "--web-port", free_port(), "--bundle", bundle)
    rig.start("up", "ground_station.cli", *words, "--patience", 2)
    rig.wait("up", "nodes on record")
    url = re.search(r"mission control: (http://127\.0\.0\.1:\d+)/", rig.log("up")).group(1)
    code, told = ask(url, "/v1/models")
    assert code == 503 and "no model is served yet" in told["error"]["message"]
    rig.board("sat-1", rig.add("sat-1"))
    rig.wait("up", "is served by 1 boards", 60)
    greedy = {"model": "spacemoe-reference-8m", "prompt": "In the beginning", "max_tokens": 8, "temperature": 0}
    code, answer = ask(url, "/v1/completions", greedy)
    assert code == 200 and answer["usage"]["completion_tokens"] == 8
    end_s = time.monotonic() + 20  # its joules are read after its last token
    while (request := ask(url, "/api/v1/requests")[1]["requests"][0])["state"] == "running":
        assert time.monotonic() < end_s, request
        time.sleep(0.2)
    assert request["tokens"] == 8 and request["state"] == "done"
    # what another process would bind is taken, and it says so
    taken = spacemoe("generate", "--dir", rig.fleet, "--bundle", bundle, "--tokens", 1, "--patience", 5, ok=False)
    assert taken["stderr"].count("\n") == 1 and "port" in taken["stderr"]
    rig.processes["up"].send_signal(signal.SIGINT)
    assert rig.processes["up"].wait(30) == 130
    kept = spacemoe("archive", "show", rig.fleet / "archive")
    rows = {table: each["rows"] for table, each in kept["tables"].items()}
    assert rows["tokens"] == 8 and rows["telemetry"] > 0 and rows["births"] > 0
    assert spacemoe("archive", "check", rig.fleet / "archive")


@pytest.mark.broker
def test_generate_says_who_is_missing(rig):
    rig.start("up", "ground_station.cli", "up", "--dir", rig.fleet, "--time-port", 0)
    rig.wait("up", "nodes on record")
    nobody = spacemoe("generate", "--dir", rig.fleet, "--tokens", 1, "--patience", 1, ok=False)
    assert "no node has enrolled yet" in nobody["stderr"] and nobody["stderr"].count("\n") == 1
    stranger = spacemoe("generate", "--dir", rig.fleet, "--nodes", "sat-9", "--patience", 1, ok=False)
    assert "sat-9: not of this fleet" in stranger["stderr"]
