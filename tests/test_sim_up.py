"""`spacemoe sim up`: simulated boards as a user starts them, seen by a broker and a data plane of one's own on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ground_station import cli
from ground_station.broker import Broker
from ground_station.control import Control
from ground_station.link import Link

ROOT = Path(__file__).resolve().parents[1]


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "ground_station.cli", "sim", "up", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.broker
def test_boards_join_and_end_with_the_command(tmp_path):
    with Broker(tmp_path) as broker:
        link = Link()
        process = start("--boards", "2", "--broker", f"{broker.host}:{broker.port}", "--data", link.endpoint)
        try:
            told = json.loads(process.stdout.readline())
            nodes = {board["node"] for board in told["boards"]}
            assert nodes == {"sat-1-rpi5", "sat-2-orin"} and all(
                board["provenance"] == "simulated" for board in told["boards"]
            )
            assert sum(board["shards"] for board in told["boards"]) == 2 * 4 * 16  # every expert, and a replica of each
            assert not link.wait_for(nodes, 60.0), "both have said HELLO on the data plane"
            with Control("demo", broker.host, broker.port) as control:
                assert not control.wait_for(nodes, 60.0)
                states = control.snapshot()
                sensors = states["sat-1-rpi5"].birth.sensors
            assert {sensor.provenance for sensor in sensors if sensor.unit == "degC"} == {"simulated"}
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == cli.EXIT_INTERRUPTED
            for board in told["boards"]:
                with pytest.raises(ProcessLookupError):
                    os.kill(board["pid"], 0)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            link.close()


def test_boards_that_cannot_be(capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        for arguments, code, words in (
            (["--broker", address], cli.EXIT_FAILED, "no MQTT 5 broker answers"),
            (["--broker", "nowhere"], cli.EXIT_USAGE, "is not HOST:PORT"),
            (["--boards", "65"], cli.EXIT_USAGE, "from 1 to 64"),
            (["--empty"], cli.EXIT_USAGE, "give its ENDPOINT"),
        ):
            assert cli.main(["sim", "up", *arguments]) == code
            told = capsys.readouterr().err
            assert words in told and told.count("\n") == 1
