"""`spacemoe calibrate --dry-run` against a real broker: what it says of a node, and that it publishes nothing."""

from __future__ import annotations

import json
import threading
import time

import paho.mqtt.client as mqtt
import pytest

from ground_station import calibrate_check, cli
from ground_station.broker import Broker
from node_agent import wire

TOPICS = wire.Topics("demo")


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with Broker(tmp_path_factory.mktemp("broker"), "auto") as running:
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        client.connect(running.host, running.port)
        client.loop_start()
        for node, status, units in (
            ("n1", "online", ("degC", "W", "W")),
            ("asleep", "offline", ("degC", "W")),
            ("blind", "online", ("W",)),
            ("unmetered", "online", ("degC", "flag")),
        ):
            sensors = tuple(wire.SensorInfo(f"s{i}", unit, "board", "measured", 1.0) for i, unit in enumerate(units))
            birth = wire.Birth(node, 3, "1", "Raspberry Pi 5", 0.0, sensors, (), "", 0, "")
            client.publish(TOPICS.birth(node), wire.encode(birth), 1, retain=True).wait_for_publish(5)
            status = wire.encode(wire.Status(node, status, 3))
            client.publish(TOPICS.status(node), status, 1, retain=True).wait_for_publish(5)
        client.publish(TOPICS.birth("junk"), b"{", 1, retain=True).wait_for_publish(5)
        yield running
        client.disconnect()
        client.loop_stop()


def dry_run(capsys, broker, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["calibrate", *arguments, "--broker", f"{broker.host}:{broker.port}", "--dry-run"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_node_that_is_there(capsys, broker):
    code, out, _ = dry_run(capsys, broker, "n1", "--step-s", "60")
    assert code == 0 and "n1 is online: Raspberry Pi 5, 1 temperatures and 2 power" in " ".join(out.split())
    assert "burn at duty 1 for 60 s" in out and "nothing was sent" in out and max(map(len, out.splitlines())) <= 80
    code, out, _ = dry_run(capsys, broker, "n1", "--json")
    tree = json.loads(out)
    assert code == 0 and len(tree["plan"]) == 5 and tree["found"].startswith("n1 is online")


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("n2", "no node n2 in fleet demo within 0.3 s; there are asleep, blind, n1, unmetered"),
        ("asleep", "known but not online"),
        ("blind", "no temperature sensor"),
        ("unmetered", "no power sensor: attach one"),
    ],
)
def test_a_node_that_cannot_be_calibrated(capsys, broker, monkeypatch, node, says):
    monkeypatch.setattr(calibrate_check, "LOOK_S", 0.3)
    code, out, error = dry_run(capsys, broker, node)
    assert (code, out) == (1, "") and says in error and error.count("\n") == 1


def test_it_publishes_nothing(capsys, broker):
    """Everything that others receive meanwhile; control: what one does publish comes."""
    came: list[str] = []
    subscribed, end = threading.Event(), threading.Event()

    def take(_client, _userdata, message) -> None:
        if not message.retain:
            came.append(message.topic)
            if message.topic == "end":
                end.set()

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.on_message, client.on_subscribe = take, lambda *_: subscribed.set()
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.subscribe("#", 1)
    assert subscribed.wait(5)
    time.sleep(0.1)
    assert dry_run(capsys, broker, "n1")[0] == 0
    client.publish("end", b"", 1)
    assert end.wait(5) and came == ["end"]
    client.disconnect()
    client.loop_stop()


def test_a_simulated_board(capsys):
    code = cli.main(["calibrate", "n1", "--simulated", "jetson-nano", "--dry-run"])
    out = capsys.readouterr().out
    assert code == 0 and "a simulated jetson-nano would be started" in out
    assert cli.main(["calibrate", "n1", "--simulated", "jetson-nano", "--bundle", "/none", "--dry-run"]) == 2
