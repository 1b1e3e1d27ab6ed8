"""The shipped JSON Schemas are current, are schemas, and say of real and of broken messages what our decoder says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import pytest
from conftest import lacking
from node_rig import AgentProcess, Ground, Observer, agent_tables

from ground_station.broker import Broker
from ground_station.control import Control
from node_agent import schema, wire

try:
    import jsonschema
except ImportError:
    jsonschema = None

SAMPLE = wire.Sample("power_w", None, "W", "missing", "derived", "board", 1.5)
TELEMETRY = wire.Telemetry("n1", 4, 2, 1.7e9, (SAMPLE, dataclasses.replace(SAMPLE, value=3.0, validity="ok")), 3, 9)
EXAMPLES = {
    "birth": wire.Birth(
        *("n1", 4, "0.1.0", "bench", 1.0),
        (wire.SensorInfo("power_w", "W", "board", "measured", 200.0),),
        (wire.HostedShard(0, 3, "int8", "ab"),),
        *("bundle", 2**33, "tcp://127.0.0.1:1"),
    ),
    "status": wire.Status("n1", "offline", 4),
    "telemetry": TELEMETRY,
    "history": wire.History("n1", 3, 1, 0, 5, (TELEMETRY, TELEMETRY)),
    "clock": wire.ClockQuery("n1", "a", 20.0),
    "event": wire.Event("n1", 1.0, "watch", "kind", "text"),
    "result": wire.Result("n1", "a", True, "pong"),
    "command": wire.Command("ping", "a", 2.0, {"b": "c"}),
    "satellite": wire.Satellite("n1", 1.0, 60.0, 2.0, (SAMPLE,), "why"),
    "ground_status": wire.GroundStatus("online", 3.0),
}


@pytest.fixture(scope="module")
def validators():
    """By message name, of the shipped files."""
    if jsonschema is None:
        lacking("jsonschema", "pip install -e .[dev]")
    made = {}
    for path in sorted(schema.FOLDER.glob("*.json")):
        tree = json.loads(path.read_text())
        jsonschema.Draft202012Validator.check_schema(tree)
        made[path.stem] = jsonschema.Draft202012Validator(tree)
    return made


def test_the_shipped_files_are_current(tmp_path):
    shipped = {path.name: path.read_bytes() for path in schema.FOLDER.iterdir()}
    assert shipped == schema.files(), "run: python -m node_agent.schema"
    subprocess.run([sys.executable, "-m", "node_agent.schema", str(tmp_path)], check=True, timeout=60)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shipped


def test_every_message_has_a_schema_and_an_example(validators):
    assert set(validators) == set(EXAMPLES) == set(schema.MESSAGES)
    for name, message in EXAMPLES.items():
        validators[name].validate(json.loads(wire.encode(message)))


def broken(tree: dict):
    """Copies of a message with one thing wrong."""
    for key in tree:
        yield {other: value for other, value in tree.items() if other != key}
        for wrong in ({"a": []}, "x", -1.5, True, None, 2**64, [3]):
            yield {**tree, key: wrong}


def test_the_schema_takes_what_the_decoder_takes(validators):
    """Each way around, for each field, left out or of another type."""
    refused = 0
    for name, message in EXAMPLES.items():
        tree = json.loads(wire.encode(message))
        for candidate in (tree, {**tree, "unknown": 1}, *broken(tree)):
            try:
                wire.decode(schema.MESSAGES[name], json.dumps(candidate).encode())
                taken = True
            except wire.WireError:
                taken = False
            refused += not taken
            assert validators[name].is_valid(candidate) == taken, (name, candidate)
    assert refused > 100


@pytest.mark.broker
def test_messages_of_a_real_agent_are_valid(validators, mosquitto, tmp_path):
    with Broker(tmp_path, "mosquitto") as broker, Ground() as ground, Observer(broker.host, broker.port) as observer:
        with AgentProcess(tmp_path, agent_tables(tmp_path, ground.endpoint, broker=broker)):
            observer.next("birth")
            with Control("test", broker.host, broker.port) as station:
                assert station.command("n1", "ping").ok
            for _ in range(8):  # the ground station is offline: they are kept
                time.sleep(0.1)
            with Control("test", broker.host, broker.port):
                observer.next("history", lambda tree: tree["messages"])
        observer.next("status", lambda tree: tree["status"] == "offline")
    seen = {leaf for leaf, _, _ in observer.all}
    assert seen == {"birth", "status", "telemetry", "history", "clock", "event", "result"}
    for leaf, tree, _ in observer.all:
        validators[leaf].validate(tree)
