"""/metrics of ground station and agent, judged by promtool (Debian's prometheus) and read back by prometheus_client's parser."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import psutil
import pytest
from conftest import lacking
from prometheus_client.parser import text_string_to_metric_families
from web_rig import sample, station, until

from ground_station import metrics, metrics_names, mission_up
from ground_station.archive_records import Counts as ArchiveCounts
from ground_station.fleet import Counts, Instant, NodeState, apply
from ground_station.web_server import Options, serving
from node_agent import wire
from node_agent.errors import ConfigError

HOSTILE = 'a"b\\c\nd\x1b[31m\u202e<b>\U0001f6f0\ud800{x="y"} 7'


def promtool(text: bytes) -> str:
    """What `promtool check metrics` has to say; empty when all is well."""
    if shutil.which("promtool") is None:
        lacking("promtool", "apt-get install --no-install-recommends prometheus")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60)
    return (done.stdout + done.stderr).decode() + ("" if done.returncode == 0 else f"exit code {done.returncode}")


def values(text: bytes) -> dict[tuple, float]:
    """(name, (label, value), ...) -> value, as another reader understands it."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for each in family.samples:
            key = (each.name, *sorted(each.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = each.value
    return found


def state_of(*samples: dict, at: Instant = Instant(1000.0, 50.0)) -> NodeState:
    """As fleet.apply makes it of JSON from the wire."""
    birth = {
        "node": "sat-1", "bd_seq": 1, "agent_version": "1", "board": HOSTILE, "generated_at": 1.0, "sensors": [], "shards": [],
        "bundle": "b", "memory_bytes": 1, "data_endpoint": "",
    }  # fmt: skip
    telemetry = {"node": "sat-1", "bd_seq": 1, "seq": 1, "generated_at": 1.0, "samples": samples, "run": 1, "number": 1}
    state = NodeState("sat-1")
    for kind, tree in (
        (wire.Birth, birth),
        (wire.Status, {"node": "sat-1", "status": "online", "bd_seq": 1}),
        (wire.Telemetry, telemetry),
    ):
        state, _ = apply(state, wire.decode(kind, json.dumps(tree).encode()), at)
    return state


NODE = (
    sample("temp_c", 45.5, "degC"),
    sample("power_w", 5.25, "W", "simulated"),
    sample("energy_j", 1234.5, "J", "derived"),
    sample("duty", 0.5, "1"),
    sample("agent_cpu_percent", 12.5, "%"),
    sample("uptime_s", 77.0, "s"),
    sample("expert_compute_s", 3.5, "s"),
    sample("rss_bytes", 1e8, "bytes"),
    sample("bytes_sent", 2e6, "bytes"),
    sample("tokens_served", 9.0, "rows"),
    sample("errors.link.timeout", 2.0, "errors"),
    sample("guard_state", 4.0, "bits"),
    sample("volts", 5.1, "V"),
    sample("lost", None, "degC", validity="missing"),
    sample(HOSTILE, 1e308, HOSTILE, "virtual"),
    sample(HOSTILE + "2", -1e308, "J", "virtual"),
    sample("x" * 5000, 1.0, "W"),
    sample("x" * 5001, 2.0, "W"),
)
FULL = metrics.Station(
    True, 900.0, {"telemetry": 3, HOSTILE: 1}, ArchiveCounts({"event": 5}, {"event": 1}, {}, 2, 3, 4, 0, None),
    [{"state": "unacknowledged", "severity": "critical"}] * 2 + [{"state": HOSTILE, "severity": "watch"}],
    3, 7, {"tokens": 11, "requests": 2},
)  # fmt: skip


def test_promtool_finds_nothing():
    text = metrics.render({"sat-1": state_of(*NODE)}, Instant(1001.0, 51.0), FULL)
    assert promtool(text) == ""
    milli = text.replace(b"spacemoe_node_age_seconds", b"spacemoe_node_age_milliseconds")
    assert "base unit" in promtool(milli)  # it does look
    assert "exit code" in promtool(text + b'bad{label="open} 1\n')


def test_values_in_base_units():
    found = values(metrics.render({"sat-1": state_of(*NODE)}, Instant(1001.0, 51.5), FULL))

    def of(name: str, **labels: str) -> float:
        keys = [key for key in found if key[0] == name and set(labels.items()) <= set(key[1:])]
        assert len(keys) == 1, (name, labels, keys)
        return found[keys[0]]

    assert of("spacemoe_node_up", node="sat-1") == 1 and of("spacemoe_node_age_seconds", node="sat-1") == 1.5
    assert of("spacemoe_node_temperature_celsius", sensor="temp_c", provenance="measured", scope="board") == 45.5
    assert of("spacemoe_node_power_watts", sensor="power_w", provenance="simulated") == 5.25
    assert of("spacemoe_node_energy_joules_total", sensor="energy_j") == 1234.5
    assert of("spacemoe_node_share_ratio", sensor="duty") == 0.5
    assert of("spacemoe_node_share_ratio", sensor="agent_cpu_percent") == 0.125
    assert (
        of("spacemoe_node_uptime_seconds") == 77 and of("spacemoe_node_seconds_total", sensor="expert_compute_s") == 3.5
    )
    assert of("spacemoe_node_memory_bytes", sensor="rss_bytes") == 1e8
    assert of("spacemoe_node_transferred_bytes_total", sensor="bytes_sent") == 2e6
    assert of("spacemoe_node_served_total", sensor="tokens_served") == 9
    assert of("spacemoe_node_errors_total", plane="link", kind="timeout") == 2
    assert of("spacemoe_node_sample", sensor="guard_state", unit="bits") == 4
    assert of("spacemoe_node_samples", validity="missing") == 1 and of("spacemoe_node_samples", validity="ok") == 17
    assert of("spacemoe_node_messages_total", kind="telemetry") == 1
    assert of("spacemoe_alarms", state="unacknowledged", severity="critical") == 2
    assert of("spacemoe_archive_written_total", kind="event") == 5 and of("spacemoe_archive_queued_records") == 4
    assert of("spacemoe_tokens_total") == 11 and of("spacemoe_malformed_messages_total", kind="telemetry") == 3
    assert 1e308 in found.values()


def test_hostile_labels_are_text():
    text = metrics.render({"sat-1": state_of(*NODE)}, Instant(1001.0, 51.0), FULL)
    assert b"\x1b" not in text and "\u202e" not in text.decode() and max(map(len, text.splitlines())) < 1500
    names = {key[0] for key in values(text)}
    assert names <= {name for name in metrics_names.FAMILIES}  # no label became a metric
    shown = [dict(key[1:])["board"] for key in values(text) if key[0] == "spacemoe_node_info"]
    assert shown == ['a"b\\c d\\x1b[31m\\u202e<b>\U0001f6f0\\ud800{x="y"} 7']


def test_what_is_not_up_shows_no_values():
    text = values(metrics.render({"sat-1": state_of(*NODE)}, Instant(1100.0, 150.0)))
    assert (
        text["spacemoe_node_up", ("node", "sat-1")] == 0 and text["spacemoe_node_age_seconds", ("node", "sat-1")] == 100
    )
    assert not any(key[0] == "spacemoe_node_temperature_celsius" for key in text)


def test_every_count_of_a_node_is_shown():
    told = {*metrics_names.NODE_MESSAGES.values(), *metrics_names.NODE_NOT_TAKEN.values(), "rebirths_asked"}
    assert told == {field.name for field in dataclasses.fields(Counts)}


def test_names_follow_the_rules():
    for name, family in metrics_names.FAMILIES.items():
        assert name.endswith("_total") == family.counter and family.help
    assert promtool(metrics.render({}, Instant(1.0, 1.0))) == ""


@pytest.mark.broker
def test_a_running_station(tmp_path):
    with station(tmp_path) as running:
        with serving(running.mission, Options(port=0), [mission_up.metrics_route(running.mission)]) as served:
            running.board("sat-1").telemetry(sample("temp_c", 41.5, "degC"), sample(HOSTILE, 1.0, "W"))

            def fetch():
                with urllib.request.urlopen(served.url + "metrics", timeout=10) as answer:
                    assert answer.headers["content-type"].startswith("text/plain; version=")
                    return answer.read()

            key = (
                "spacemoe_node_temperature_celsius",
                *sorted({"node": "sat-1", "sensor": "temp_c", "scope": "board", "provenance": "measured"}.items()),
            )
            until(lambda: values(fetch()).get(key) == 41.5)
            assert promtool(fetch()) == ""
            assert values(fetch())["spacemoe_broker_connected",] == 1
            began = values(fetch())["spacemoe_start_time_seconds",]
            assert abs(began - time.time()) < 600


# ---------------------------------------------------------------- the agent's own


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        return answer.read()


@pytest.mark.parametrize("with_broker", [False, True])
def test_an_agent_that_was_asked_to(tmp_path, with_broker):
    from node_rig import AgentProcess, Ground, agent_tables

    from ground_station.broker import Broker, free_port

    with contextlib.ExitStack() as stack:
        ground = stack.enter_context(Ground())
        broker = stack.enter_context(Broker(tmp_path / "broker", "embedded")) if with_broker else None
        port = free_port()
        tables = agent_tables(tmp_path, ground.endpoint, broker=broker) | {"metrics": {"listen": f"127.0.0.1:{port}"}}
        tables["telemetry"] = {"period_s": 0.2}
        agent = stack.enter_context(AgentProcess(tmp_path, tables))
        url = f"http://127.0.0.1:{port}/metrics"

        def look():
            try:
                return fetch(url) or None
            except OSError:
                return None

        text = until(look, agent.text())
        assert promtool(text) == ""
        found = values(text)
        key = ("spacemoe_agent_size_bytes", ("provenance", "measured"), ("scope", "agent"), ("sensor", "rss_bytes"))
        rss_bytes = psutil.Process(agent.process.pid).memory_info().rss
        assert 1e7 < found[key] < 2 * rss_bytes
        for path, status in (("/", 404), ("/metrics/../x", 404)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10)
            assert caught.value.code == status
        post = urllib.request.Request(url, data=b"x")
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(post, timeout=10)


def test_an_agent_opens_no_port_by_itself(tmp_path):
    """The control: the same agent without the table listens nowhere."""
    from node_rig import AgentProcess, Ground, agent_tables

    with Ground() as ground, AgentProcess(tmp_path, agent_tables(tmp_path, ground.endpoint)) as agent:
        ground.hello()
        assert not [link for link in psutil.Process(agent.process.pid).net_connections() if link.status == "LISTEN"]


def wire_sample(name: str, value: float | None, unit: str, validity: str = "ok") -> wire.Sample:
    return wire.Sample(name, value, unit, validity, "measured", HOSTILE, 1.0)


def test_the_agents_text_by_hand():
    from node_agent.metrics import exposition

    samples = [
        wire_sample(each, 1.5, unit) for each in ("a", HOSTILE, "a") for unit in ("degC", "W", "J", "%", HOSTILE)
    ]
    samples += [wire_sample("e", -1.0, "J"), wire_sample("m", None, "W", "missing"), wire_sample("big", 1e308, "V")]
    text = exposition(samples)
    assert promtool(text) == ""
    found = values(text)
    assert {dict(key[1:])["sensor"] for key in found} >= {"a", "big"} and len(found) == 12
    assert found[next(key for key in found if key[0] == "spacemoe_agent_share_ratio")] == 0.015


def test_the_agents_server_is_bounded():
    from node_agent.metrics import MAX_CONNECTIONS, MetricsServer

    with MetricsServer("127.0.0.1", 0, 0.1) as server:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        assert fetch(url) == b""  # nothing was published
        server.show([wire_sample("a", 1.0, "W")])
        assert b"spacemoe_agent_power_watts" in fetch(url)
        idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(MAX_CONNECTIONS)]
        until(lambda: not server._room._value)
        with pytest.raises(OSError):  # one too many is hung up on
            fetch(url)
        for link in idle:
            link.close()
        until(lambda: server._room._value == MAX_CONNECTIONS)
        assert fetch(url)
        until(lambda: fetch(url) == b"", wait_s=5)  # what is old is not shown as new
        with pytest.raises(ConfigError, match="cannot listen"):
            MetricsServer("127.0.0.1", server.server_port, 0.1)


@pytest.mark.parametrize(
    "listen", ["9464", "127.0.0.1", "localhost:1", "1.2.3.4:99999", "1.2.3.4:-1", "1.2.3.4:0", 5, ""]
)
def test_where_an_agent_may_not_listen(tmp_path, listen):
    from node_agent import config

    text = '[node]\nfleet = "f"\nid = "n1"\nboard = "b"\nstate_dir = "s"\n[data]\nendpoint = "tcp://127.0.0.1:5570"\n[metrics]\nlisten = '
    assert config.parse(text + '"[::1]:9464"', tmp_path).metrics == ("::1", 9464)
    with pytest.raises(ConfigError, match="listen"):
        config.parse(text + (f'"{listen}"' if isinstance(listen, str) else str(listen)), tmp_path)
