"""The hub of mission control: what real boards say reaches fleet, archive, alarms and watchers; commands are checked, sent and kept.

Boards are MQTT clients whose JSON is written by hand; the stream is read as the standard for server-sent events says.
"""

from __future__ import annotations

import json
import math
import threading
import time

import pytest
from web_rig import Events, sample, station, until

from ground_station import mission_commands, mission_fleet
from ground_station.archive_records import RequestRecord, TokenRecord
from ground_station.fleet import Instant, NodeState, Taken
from ground_station.mission import NoSuchNode
from ground_station.mission_contacts import Contacts
from ground_station.mission_feed import Feed, TooManyWatchers, encode
from ground_station.mission_tokens import MAX_REQUESTS, Heat, LiveTokens
from node_agent import wire

LIMITS = """
active = "bench"
[node]
stale_after_s = 1.0
[sets.bench]
[[sets.bench.signals]]
name = "temp_c"
yellow_high = 70
red_high = 80
hysteresis = 2
[sets.hot]
[[sets.hot.signals]]
name = "temp_c"
yellow_high = 90
"""


@pytest.fixture
def limits(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text(LIMITS)
    return path


@pytest.fixture
def running(tmp_path, limits):
    with station(tmp_path, limits=limits) as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One for the tests that change nothing."""
    with station(tmp_path_factory.mktemp("shared")) as made:
        made.board("n1")
        until(lambda: "n1" in made.control.snapshot())
        yield made


def temp(value: float) -> dict:
    return sample("temp_c", value, "degC", "simulated")


# ---------------------------------------------------------------- from board to watcher and archive


def test_what_a_board_says_is_seen_and_kept(running):
    board = running.board("n1")
    board.telemetry()
    with Events(running.url) as stream:
        first = stream.next("snapshot")
        row = (
            stream.next("fleet", lambda frame: frame["rows"][0][2] is not None) if not first["fleet"]["rows"] else None
        )
        board.telemetry(temp(46.25), sample("power_w", None, "W", "measured", "missing"))
        frame = stream.next("fleet", lambda frame: frame["rows"] and len(frame["rows"][0][4]) == 2)
    node, set_id, at_s, state, values, levels, validities = frame["rows"][0]
    assert (node, state, values, levels, validities) == ("n1", "online", [46.25, None], "g.", "om"), row
    assert frame["sets"][set_id] == [
        ["temp_c", "degC", "board", "simulated"],
        ["power_w", "W", "board", "measured"],
    ]
    assert abs(at_s - frame["at"]) < 5
    running.mission.archive.flush()
    trend = running.get(f"/api/v1/trend?node=n1&signal=temp_c&since={at_s - 60}&until={at_s + 60}").tree
    assert (trend["last"][-1], trend["unit"], trend["provenances"]) == (46.25, "degC", ["simulated"])
    one = running.get("/api/v1/nodes/n1").tree
    assert one["signals"]["temp_c"]["value"] == 46.25 and one["counts"]["telemetry"] == 2
    assert len(one["hosted"]) == 4 and one["board"] == "test board"


def test_a_limit_is_crossed_its_alarm_latches_is_acknowledged_and_goes(running):
    board = running.board("n1")
    with Events(running.url) as stream:
        stream.next("snapshot")
        board.telemetry(temp(50))
        board.telemetry(temp(85))
        raised = stream.next("alarm")
        assert (raised["signal"], raised["severity"], raised["state"], raised["value"]) == (
            *("temp_c", "critical", "unacknowledged"),
            85,
        )
        board.telemetry(temp(50))
        assert stream.next("alarm")["state"] == "returned"  # it latches: nobody has seen it yet
        assert [alarm["id"] for alarm in running.get("/api/v1/alarms").tree["alarms"]] == [raised["id"]]
        done = running.post(f"/api/v1/alarms/{raised['id']}/ack", {"comment": "fan was off"})
        assert done.status == 200 and done.tree["state"] == "cleared" and done.tree["who"] == "local"
        assert stream.next("alarm")["state"] == "cleared"
    assert running.get("/api/v1/alarms").tree["alarms"] == []
    running.mission.archive.flush()
    changes = running.get("/api/v1/alarms?since=0").tree["changes"]
    assert [change["state"] for change in changes] == ["unacknowledged", "returned", "cleared"]
    assert changes[-1]["text"] == "fan was off"
    again = running.post(f"/api/v1/alarms/{raised['id']}/ack", {})
    assert again.status == 404 and again.tree["error"]["fix"]


def test_an_alarm_is_shelved_and_not_cleared_while_its_cause_holds(running):
    board = running.board("n1")
    board.telemetry(temp(85))
    alarm = until(lambda: running.get("/api/v1/alarms").tree["alarms"])[0]["id"]
    assert running.post(f"/api/v1/alarms/{alarm}/clear", {}).status == 409
    assert running.post(f"/api/v1/alarms/{alarm}/shelve", {"for_s": math.pi * 1e9}).status == 409
    assert running.post(f"/api/v1/alarms/{alarm}/shelve", {"for_s": "long"}).status == 400
    assert running.post(f"/api/v1/alarms/{alarm}/shelve", {"for_s": 60}).tree["state"] == "shelved"
    assert running.post(f"/api/v1/alarms/{alarm}/unshelve", {}).tree["state"] == "unacknowledged"
    assert running.post(f"/api/v1/alarms/{alarm}/explode", {}).status == 404
    assert running.post(f"/api/v1/alarms/{alarm}/clear", {"yes": True}).tree["state"] == "cleared"


def test_a_board_that_hangs_is_stale_and_then_offline(running):
    board = running.board("n1", keepalive_s=2).run_at(0.2)
    with Events(running.url) as stream:
        stream.next("snapshot")
        stream.next("fleet", lambda frame: frame["rows"][0][3] == "online")
        board.fall_silent()
        assert stream.next("alarm")["level"] == "stale"
        states = [stream.next("fleet")["rows"][0][3]]
        while states[-1] != "offline":  # its will, when the broker has missed its keep-alive
            states.append(stream.next("fleet")["rows"][0][3])
        assert stream.next("alarm", lambda alarm: alarm["level"] == "offline")["severity"] == "critical"


def test_limits_follow_their_file_and_another_set_can_be_put_in_force(running, limits):
    board = running.board("n1")
    board.telemetry(temp(75))
    until(lambda: running.get("/api/v1/alarms").tree["alarms"])
    assert running.get("/api/v1/limits").tree["signals"]["temp_c"] == {"yellow_high": 70.0, "red_high": 80.0}
    assert running.post("/api/v1/limits", {"set": "nowhere"}).status == 400
    assert running.post("/api/v1/limits", {"set": "hot"}).tree["signals"]["temp_c"] == {"yellow_high": 90.0}
    limits.write_text(LIMITS.replace("yellow_high = 90", "yellow_high = 95"))
    until(lambda: running.get("/api/v1/limits").tree["signals"]["temp_c"] == {"yellow_high": 95.0})
    limits.write_text("active = ")
    texts = until(lambda: [e["text"] for e in running.mission.events() if e["severity"] == "warning"])
    assert "the old limits hold" in texts[0]
    assert running.get("/api/v1/limits").tree["signals"]["temp_c"] == {"yellow_high": 95.0}


def test_alarms_outlive_the_ground_station(tmp_path, limits):
    with station(tmp_path, limits=limits) as first:
        first.board("n1").telemetry(temp(85))
        alarm = until(lambda: first.mission.alarm_list())[0]["id"]
    with station(tmp_path, limits=limits) as second:
        assert alarm in [each["id"] for each in second.mission.alarm_list()]


def test_events_and_satellites_of_the_ground_are_heard(running):
    board = running.board("n1")
    board.event("warning", "refused", "memory is short")
    satellite = {
        "node": "n1",
        "mission_at": 1e9,
        "scale": 60.0,
        "generated_at": 1.0,
        "invalid": "",
        "samples": [sample("link_up", 1.0, "1", "virtual"), sample("lit_share", 0.0, "1", "virtual")],
    }
    topics = running.control.topics
    board.client.publish(topics.satellite("n1"), json.dumps(satellite))
    board.client.publish(topics.satellite("n2"), json.dumps(satellite))  # of another than its topic says
    event = {"node": "n1", "generated_at": 1.0, "severity": "watch", "kind": "spot", "text": "differs"}
    board.client.publish(topics.ground_event(), json.dumps(event), qos=1)
    until(lambda: len(running.mission.events()) == 2)
    assert [(e["source"], e["kind"]) for e in running.mission.events()] == [("node", "refused"), ("ground", "spot")]
    found = until(lambda: running.get("/api/v1/contacts").tree["satellites"])
    assert [each["node"] for each in found] == ["n1"] and found[0]["values"]["link_up"] == 1
    assert len(found[0]["contact"]) == len(found[0]["eclipse"]) == 1
    assert running.control.malformed == {"topic": 1}
    running.mission.archive.flush()
    kept = running.get("/api/v1/events?severity=warning&filter=MEMORY").tree
    assert kept["source"] == "archive" and [event["text"] for event in kept["events"]] == ["memory is short"]


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "\x1b[2J\x07\x00",
    "\u202egnp.exe",
    "\U0001f4a9" * 30,
    "x" * 5000,
    "\ud800",
    "__proto__",
]


def test_hostile_names_and_numbers_break_nothing(running):
    board = running.board("n1", board=HOSTILE[0])
    samples = [sample(name, value, name) for name, value in zip(HOSTILE, (1e308, -1e308, 5e-324, 0.0, 1.0, 2.0, 3.0))]
    board.telemetry(*samples)
    board.event("severe", *HOSTILE[1:3])
    node = until(lambda: running.get("/api/v1/nodes/n1").tree.get("signals") and running.get("/api/v1/nodes/n1").tree)
    assert len(node["signals"]) == len(HOSTILE) and node["signals"][HOSTILE[0]]["value"] == 1e308
    assert all(len(name) <= mission_fleet.MAX_CHARS for name in node["signals"])
    board.publish("telemetry", b'{"node":"n1","bd_seq":1,"seq":9,"generated_at":NaN,"samples":[]}')
    until(lambda: running.control.malformed.get("telemetry") == 1)
    running.mission.archive.flush()
    for path in ("nodes", "fleet", "events", "frames", "alarms", "archive", "health"):
        assert running.get(f"/api/v1/{path}").status == 200, path


# ---------------------------------------------------------------- commands


def test_a_command_is_answered_and_kept_with_who_when_and_outcome(running):
    board = running.board("n1")
    until(lambda: "n1" in running.control.snapshot())
    done = running.post("/api/v1/commands", {"node": "n1", "name": "ping"}).tree
    assert (done["state"], done["who"], done["text"]) == ("ok", "local", "did ping")
    assert done["done_utc_s"] >= done["at_utc_s"]
    running.mission.archive.flush()
    kept = running.get("/api/v1/commands?node=n1&filter=ping").tree
    assert kept["source"] == "archive" and kept["commands"] == [done]
    board.fall_silent()
    lost = running.post("/api/v1/commands", {"node": "n1", "name": "sample"}).tree
    assert lost["state"] == "no answer" and "sample" in lost["text"]


def test_hazardous_ones_ask_for_a_yes_and_a_dry_run_sends_nothing(running):
    board = running.board("n1")
    until(lambda: "n1" in running.control.snapshot())
    duty = {"node": "n1", "name": "duty", "arguments": {"cap": "0.4", "valid_s": "10"}}
    assert running.post("/api/v1/commands", duty).status == 409
    dry = running.post("/api/v1/commands", duty | {"dry_run": True}).tree
    assert dry["topic"] == "spacemoe/v1/test/node/n1/command/duty" and dry["hazard"]
    assert board.commands == [] and running.mission.commands() == []
    assert running.post("/api/v1/commands", duty | {"yes": True}).tree["state"] == "ok"
    assert [(c["name"], c["arguments"]) for c in board.commands] == [("duty", {"cap": "0.4", "valid_s": "10"})]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"node": "n1", "name": "reformat"}, 400),
        ({"node": "n1", "name": "ping", "arguments": {"x": "1"}}, 400),
        ({"node": "n1", "name": "duty", "arguments": {"cap": "2", "valid_s": "10"}, "yes": True}, 400),
        ({"node": "n1", "name": "duty", "arguments": {"cap": "nan", "valid_s": "10"}, "yes": True}, 400),
        ({"node": "n1", "name": "history", "arguments": {"run": "1", "ranges": "1-2;3"}}, 400),
        ({"node": "n1", "name": "ping", "arguments": {"x": 1}}, 400),
        ({"node": "n9", "name": "ping"}, 404),
        ({"node": "../x", "name": "ping"}, 404),
        ({"nodes": "n1"}, 400),
        ({"node": 1, "name": "ping"}, 400),
        (["ping"], 400),
        ("{", 400),
        ('{"node": NaN}', 400),
        ("[" * 50_000, 400),
    ],
)
def test_a_wrong_command_is_told_and_not_sent(shared, body, status):
    answer = shared.post("/api/v1/commands", body)
    assert (answer.status, set(answer.tree)) == (status, {"error"}) and answer.tree["error"]["fix"]
    assert shared.boards[0].commands == [] and shared.mission.commands() == []


def test_every_command_of_the_catalogue_is_known_to_the_agent():
    """The agent's own text is asked: what it refuses as unknown would be a button that never works."""
    from pathlib import Path

    import node_agent.agent
    import node_agent.control

    text = "".join(Path(module.__file__).read_text() for module in (node_agent.agent, node_agent.control))
    for name in mission_commands.CATALOGUE:
        assert f'name == "{name}"' in text, name
    assert 'name == "reboot"' not in text


# ---------------------------------------------------------------- past times


@pytest.mark.parametrize(
    "query",
    ["since=x", "since=nan", "until=-1", "until=1e999", "since=2&until=1", "lines=0", "lines=-1", "lines=9999999999"],
)
def test_wrong_times_and_counts_are_told(shared, query):
    answer = shared.get(f"/api/v1/frames?{query}")
    assert answer.status == 400 and answer.tree["error"]["fix"]


def test_times_may_be_iso_8601(running):
    running.board("n1").event("info", "a", "b")
    until(lambda: running.mission.events())
    running.mission.archive.flush()
    for since in ("2020-01-01T00:00:00Z", "2020-01-01", "1577836800"):
        assert len(running.get(f"/api/v1/events?since={since}").tree["events"]) == 1
    assert running.get("/api/v1/events?since=2999-01-01T00:00:00%2B02:00").tree["events"] == []


def test_frames_of_the_archive_are_those_that_were_seen_live(running):
    board = running.board("n1")
    with Events(running.url) as stream:
        stream.next("snapshot")
        live = []
        for value in (50.5, 75.0, 60.0):
            board.telemetry(temp(value))
            live.append(stream.next("fleet", lambda frame, v=value: frame["rows"][0][4] == [v])["rows"][0])
    running.mission.archive.flush()
    replay = running.get(f"/api/v1/frames?since={live[0][2] - 30}&until={live[-1][2] + 1}").tree
    rows = [row for step in replay["steps"] for row in step["rows"]]
    assert [row[:6] for row in rows] == [row[:6] for row in live]
    assert [birth["node"] for step in replay["steps"] for birth in step["births"]] == ["n1"]
    cut = running.get(f"/api/v1/frames?since={live[0][2] - 30}&until={live[-1][2] + 1}&lines=2").tree
    assert abs(cut["until"] - live[1][2]) < 0.01 and len(cut["steps"]) == 1  # birth and first row; where to go on


# ---------------------------------------------------------------- tokens, experts, feed


def test_tokens_are_seen_live_and_kept(running):
    with Events(running.url) as stream:
        stream.next("snapshot")
        record = RequestRecord("r1", "generate", time.time(), 3)
        running.mission.request(record)
        token = TokenRecord("r1", 0, 42, "<b>hi", time.time(), 20.0, 5.0, 1.0, 2.0, 4.0, 8.0, 100, 50, 1)
        running.mission.token(token)
        assert stream.next("request")["state"] == "running"
        assert stream.next("token")["piece"] == "<b>hi"
        running.mission.heat.ran(1, [[0, 3], [3, 2]])
        assert stream.next("heat") == {"1": [1, 0, 1, 2]}
    live = running.get("/api/v1/requests/r1").tree
    assert live["source"] == "memory" and live["ledger"][0]["total_ms"] == 20.0
    running.mission.archive.flush()
    assert [row["request"] for row in running.get("/api/v1/requests").tree["requests"]] == ["r1"]
    assert running.get("/api/v1/requests/nowhere").status == 404


def test_the_expert_map_names_holders_and_runs(running):
    running.board("n1", shards=4)
    running.board("n2", shards=2)
    experts = until(lambda: (e := running.get("/api/v1/experts").tree) and len(e["nodes"]) == 2 and e)
    assert experts["precisions"] == ["int4", "int8"]
    assert sorted(experts["holds"]) == sorted(
        [[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]]
    )


def test_heat_counts_and_refuses_what_no_model_has():
    heat = Heat()
    heat.ran(3, [5])
    heat.ran(3, [[0, 5], [1, 5]])
    assert heat.counts() == {3: [1, 1, 0, 0, 0, 3]}
    for layer, experts in ((-1, [0]), (0, [-1]), (0, [10**7]), (10**6, [0])):
        with pytest.raises(ValueError):
            heat.ran(layer, experts)


def test_live_requests_are_bounded_and_running_ones_stay():
    live = LiveTokens()
    live.request(RequestRecord("first", "chat", 0.0))
    for i in range(3 * MAX_REQUESTS):
        live.request(RequestRecord(f"r{i}", "chat", float(i), state="done"))
    names = [row["request"] for row in live.requests()]
    assert len(names) == MAX_REQUESTS and names[-1] == "first" and names[0] == f"r{3 * MAX_REQUESTS - 1}"
    live.token(TokenRecord("gone", 0, 0, "", 0.0, 1.0))
    assert live.one("gone") is None


def test_a_slow_watcher_loses_frames_is_told_and_holds_nobody_up():
    feed = Feed(max_watchers=2, max_bytes=500)
    woken = threading.Event()
    slow, quick = feed.watch(woken.set), feed.watch(lambda: None)
    for i in range(100):
        feed.publish("event", {"i": i})
        quick.take()
    assert woken.is_set()
    frames = slow.take()
    told = json.loads(frames[-1].partition(b"data: ")[2])
    assert frames[-1].startswith(b"event: lost\n") and told["frames"] + len(frames) - 1 == 100
    assert [json.loads(f.partition(b"data: ")[2])["i"] for f in frames[:-1]] == list(range(len(frames) - 1))
    feed.publish("event", {"i": 100})
    assert slow.take() == [encode("event", {"i": 100})] and quick.lost == 0
    with pytest.raises(TooManyWatchers):
        feed.watch(lambda: None)
    feed.leave(slow)
    assert feed.lost == told["frames"] and feed.watch(lambda: None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_nan_leaves(value):
    with pytest.raises(ValueError):
        encode("event", {"value": value})


def test_a_row_keeps_its_set_and_bounds_a_flood_of_names():
    at = Instant(10.0, 1.0)

    def taken(*names: str) -> Taken:
        samples = tuple(wire.Sample(name, 1.23456789012, "W", "ok", "measured", "board", 10.0) for name in names)
        return Taken(wire.Telemetry("n1", 1, 1, 10.0, samples), at, False)

    first = mission_fleet.row_of(taken("a", "b"), {"a": "r"}, None)
    again = mission_fleet.row_of(taken("a", "b"), {}, first)
    assert (first.levels, again.levels, first.set_id) == ("r.", "..", again.set_id) and again.signals is first.signals
    assert mission_fleet.row_of(taken("a", "c"), {}, first).set_id != first.set_id
    assert first.values == (1.23456789, 1.23456789)
    flood = mission_fleet.row_of(taken(*(f"s{i}" for i in range(1500))), {}, None)
    assert (len(flood.values), flood.left_out) == (mission_fleet.MAX_SIGNALS, 1500 - mission_fleet.MAX_SIGNALS)
    assert mission_fleet.state_of(NodeState("n1"), at) == "offline"


def test_contacts_join_while_they_are_told_of_and_break_after_a_silence():
    contacts = Contacts()

    def state(up: float | None, lit: float, at_s: float) -> None:
        samples = [("link_up", up), ("lit_share", lit)]
        made = tuple(wire.Sample(n, v, "1", "ok", "virtual", "satellite", at_s) for n, v in samples)
        contacts.heard(wire.Satellite("n1", at_s, 1.0, at_s, made), at_s)

    for at_s, up, lit in ((0, 1, 1), (1, 1, 0), (2, 0, 0), (3, 1, 0.6), (20, 1, 1), (21, 1, 1)):
        state(float(up), lit, float(at_s))
    found = contacts.snapshot(0.0, 100.0)["satellites"][0]
    assert found["contact"] == [[0, 1], [3, 3], [20, 21]] and found["eclipse"] == [[1, 2]]
    assert contacts.snapshot(20.5, 20.7)["satellites"][0]["contact"] == [[20.5, 20.7]]


def test_a_command_to_nobody_is_refused(shared):
    with pytest.raises(NoSuchNode):
        shared.mission.command("me", "n9", "ping", {})
