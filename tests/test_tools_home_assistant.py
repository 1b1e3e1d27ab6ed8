"""Home Assistant discovery: templates are rendered by jinja2, which Home Assistant uses, over telemetry as the agent's wire encodes it."""

from __future__ import annotations

import json
import re

import pytest
from mission_cli import here
from web_rig import sample, station, until

from ground_station import home_assistant
from ground_station.home_assistant import Signal
from node_agent import wire

jinja2 = pytest.importorskip("jinja2")
HOSTILE = "a') }}{{ 7*7 }}"


def rendered(content: dict, payload: bytes) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment().from_string(content["value_template"]).render(value_json=json.loads(payload))


def telemetry(*samples: wire.Sample) -> bytes:
    return wire.encode(wire.Telemetry("sat-1", 1, 1, 1.0, samples, 1, 1))


def one(name: str, value: float | None, unit: str = "degC", validity: str = "ok") -> wire.Sample:
    return wire.Sample(name, value, unit, validity, "measured", "board", 1.0)


def by_name(made: dict) -> dict[str, dict]:
    return {content["name"]: content for content in made.values()}


def test_values_are_picked_by_name_and_only_valid_ones():
    made = by_name(home_assistant.messages("lab", [("sat-1", "Pi 5", home_assistant.BASE)]))
    payload = telemetry(
        one("duty", 0.5, "1"),
        one("temp_c", 47.5),
        one("power_w", None, "W", "missing"),
        one("energy_j", 3.5, "J", "stale"),
    )
    assert rendered(made["temp_c"], payload) == "47.5" and rendered(made["duty"], payload) == "0.5"
    for name in ("power_w", "energy_j", "uptime_s"):  # missing, stale, not there: Home Assistant takes None as unknown
        assert rendered(made[name], payload) == "None"


def test_messages_are_as_the_documentation_says():
    made = home_assistant.messages("lab", [("sat-1", "Pi 5", home_assistant.BASE), ("sat-2", "", home_assistant.BASE)])
    assert len(made) == 10 and len({content["unique_id"] for content in made.values()}) == 10
    for topic, content in made.items():
        assert re.fullmatch(r"homeassistant/sensor/[a-zA-Z0-9_-]+/[a-zA-Z0-9_-]+/config", topic)
        assert content["state_class"] in ("measurement", "total_increasing")
        (there,) = content["availability"]
        node = content["device"]["name"].split()[1]
        assert there["topic"] == f"spacemoe/v1/lab/node/{node}/status"
        assert content["state_topic"] == f"spacemoe/v1/lab/node/{node}/telemetry"
        status = wire.encode(wire.Status(node, "online", 1))
        assert rendered({"value_template": there["value_template"]}, status) == there["payload_available"]
    classes = {
        content["name"]: (content.get("device_class"), content.get("unit_of_measurement")) for content in made.values()
    }
    assert (
        classes["temp_c"] == ("temperature", "°C")
        and classes["energy_j"] == ("energy", "J")
        and classes["duty"] == (None, None)
    )


def test_hostile_names_stay_out_of_templates():
    made = home_assistant.messages("lab", [("sat-1", HOSTILE, [Signal(HOSTILE, "W"), Signal("ok_w", HOSTILE)])])
    (content,) = made.values()
    assert (
        content["name"] == "ok_w" and HOSTILE not in content["value_template"] and content["device"]["model"] == HOSTILE
    )
    with pytest.raises(wire.WireError):
        home_assistant.messages("lab/#", [("sat-1", "", [])])


@pytest.mark.broker
def test_of_a_running_station(tmp_path):
    with station(tmp_path) as running:
        running.board("sat-1").telemetry(
            sample("temp_c", 41.0, "degC"), sample("fan_rpm", 900.0, "rpm"), sample(HOSTILE, 1.0, "W")
        )
        until(lambda: running.mission.nodes() and running.mission.nodes()[0]["signals"])
        done = here(
            "tools", "home-assistant", "--fleet", "test", "-o", tmp_path / "ha.json", "--json", SPACEMOE_URL=running.url
        )
        assert json.loads(done.stdout)["messages"] == 2, done.stderr
        made = by_name(json.loads((tmp_path / "ha.json").read_text()))
        assert set(made) == {"temp_c", "fan_rpm"} and made["fan_rpm"]["unit_of_measurement"] == "rpm"


def test_nobody_to_ask():
    done = here("tools", "home-assistant", "--fleet", "lab", SPACEMOE_URL="http://127.0.0.1:9")
    assert done.returncode == 1 and "spacemoe up" in done.stderr
    assert len(json.loads(here("tools", "home-assistant", "--fleet", "lab", "--node", "sat-1").stdout)) == len(
        home_assistant.BASE
    )
    assert here("tools", "home-assistant", "--fleet", "lab", "--node", "Sat 1").returncode == 2
