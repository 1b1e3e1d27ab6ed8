"""The agent process against real brokers: birth, will, telemetry, commands, reconnection; experts without a broker.

Messages are read as plain JSON, not through our decoder. Semantics: Sparkplug 3.0 (bdSeq ties a death to its birth).
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
from conftest import lacking
from node_rig import HIDDEN, WAIT_S, AgentProcess, Ground, Observer, agent_tables, make_bundle, toml
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from ground_station.broker import Broker, find_mosquitto, free_port
from node_agent import config, frame, shard, wire
from node_agent.births import BirthCounter
from node_agent.control import Control
from node_agent.counters import Counters
from node_agent.errors import AlreadyRunningError, ConfigError

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def rig(bundle, broker, tmp_path):
    """(ground, observer, agent, broker) with an agent that is online."""
    with Ground() as ground, Observer(broker.host, broker.port) as observer:
        with AgentProcess(tmp_path, agent_tables(tmp_path, ground.endpoint, bundle, broker)) as agent:
            observer.next("status", lambda tree: tree["status"] == "online")
            yield ground, observer, agent, broker


def command(name: str, **fields) -> dict:
    return {"name": name, "id": secrets.token_hex(4), "expires_at": time.time() + 30, "arguments": {}} | fields


def ask(observer: Observer, name: str, **fields) -> dict:
    tree = command(name, **fields)
    observer.command(name, tree)
    return observer.next("result", lambda result: result["id"] == tree["id"])


def names(telemetry: dict) -> dict[str, dict]:
    return {sample["name"]: sample for sample in telemetry["samples"]}


PAIRS = np.array([(0, 1, 1, 0.5), (2, 3, 2, 0.5)], frame.PAIR)
REQUEST = frame.Frame(frame.EXPERTS, 5, x=np.ones((3, HIDDEN), np.float32), pairs=PAIRS)


def served(ground: Ground) -> frame.Frame:
    return ground.ask(REQUEST)


def test_birth_status_event_and_telemetry(rig, bundle):
    ground, observer, _, _ = rig
    births = [tree for leaf, tree, _ in observer.all if leaf == "birth"]
    assert len(births) == 1
    birth = births[0]
    assert (birth["node"], birth["board"], birth["bundle"], birth["protocol"]) == ("n1", "test rig", "rig", 1)
    manifest = shard.read_manifest(bundle.root)
    want = {(s.layer, s.expert, s.precision, s.sha256) for s in manifest.shards}
    assert {(s["layer"], s["expert"], s["precision"], s["sha256"]) for s in birth["shards"]} == want
    assert birth["data_endpoint"] == ground.endpoint and birth["memory_bytes"] > 10**8
    assert abs(birth["generated_at"] - time.time()) < WAIT_S
    assert observer.next("event")["kind"] == "started"

    first = observer.next("telemetry")
    assert first["seq"] == 1 and first["bd_seq"] == birth["bd_seq"]
    assert observer.next("telemetry")["seq"] == 2
    assert served(ground).kind == frame.PARTIAL
    assert ground.ask(b"rubbish").kind == frame.ERROR
    last = names(observer.next("telemetry", lambda tree: "errors.link.malformed" in names(tree)))
    assert last["tokens_served"]["value"] == 3 and last["requests_served"]["value"] == 1
    assert last["errors.link.malformed"]["value"] == 1
    assert last["expert_compute_s"]["value"] > 0 and last["agent_cpu_s"]["value"] > 0.05
    assert 10e6 < last["rss_bytes"]["value"] < 2e9
    for sample in last.values():  # never a fake zero
        assert (sample["value"] is None) == (sample["validity"] in ("missing", "invalid")), sample
    bad = observer.next("event", lambda tree: tree["kind"] == "bad_frame")
    assert bad["severity"] == "warning" and "malformed" in bad["text"]


def test_retained_birth_and_status_reach_those_who_come_later(rig):
    _, observer, _, broker = rig
    with Observer(broker.host, broker.port) as late:
        birth = late.next("birth")
        status = late.next("status")
    assert status == {"node": "n1", "status": "online", "bd_seq": birth["bd_seq"]}
    assert [retained for leaf, _, retained in late.all if leaf in ("birth", "status")][:2] == [True, True]


def test_rebirth_starts_the_count_of_telemetry_again(rig):
    _, observer, _, _ = rig
    observer.next("birth")
    observer.next("telemetry", lambda tree: tree["seq"] >= 3)
    assert ask(observer, "rebirth")["ok"]
    observer.next("birth")
    observer.next("telemetry", lambda tree: tree["seq"] == 1)
    assert observer.next("telemetry")["seq"] == 2


def test_ping_answers_with_the_correlation_data(rig):
    _, observer, _, _ = rig
    properties = Properties(PacketTypes.PUBLISH)
    properties.CorrelationData = b"\x00\x01corr"
    tree = command("ping")
    observer.command("ping", tree, properties=properties)
    result = observer.next("result", lambda result: result["id"] == tree["id"])
    assert result == {"node": "n1", "id": tree["id"], "ok": True, "text": "pong"}
    index = next(i for i, (leaf, got, _) in enumerate(observer.all) if leaf == "result" and got["id"] == tree["id"])
    assert observer.properties[index].CorrelationData == b"\x00\x01corr"


def test_expired_replayed_malformed_and_unknown_commands_are_refused_and_counted(rig):
    _, observer, agent, _ = rig
    late = ask(observer, "stop", expires_at=time.time() - 5)
    assert not late["ok"] and "late" in late["text"]

    once = command("ping")
    observer.command("ping", once)
    assert observer.next("result", lambda tree: tree["id"] == once["id"])["ok"]
    observer.command("ping", once)
    again = observer.next("result", lambda tree: tree["id"] == once["id"])
    assert not again["ok"] and "already" in again["text"]

    for payload in ("{", b"\xff\xfe", "[]", '{"name":"ping"}', command("ping", expires_at="soon"), command("stop")):
        observer.command("ping", payload)  # the last one: its name is not its topic's
        refused = observer.next("result", lambda tree: tree["id"] == "")
        assert not refused["ok"] and "malformed" in refused["text"]

    unknown = ask(observer, "self-destruct")
    assert not unknown["ok"] and "unknown" in unknown["text"]

    last = observer.next("telemetry", lambda tree: "errors.control.command" in names(tree))
    counted = {name: sample["value"] for name, sample in names(last).items() if name.startswith("errors.")}
    assert counted == {
        "errors.control.expired": 1,
        "errors.control.replayed": 1,
        "errors.control.malformed": 6,
        "errors.control.command": 1,
    }
    assert agent.process.poll() is None


def test_a_stored_command_does_not_stop_an_agent_that_starts(rig, tmp_path):
    """A retained `stop` would stop the node at every start."""
    _, observer, agent, _ = rig
    kept = command("stop", expires_at=time.time() + 3600)
    observer.command("stop", kept, retain=True)
    assert agent.process.wait(WAIT_S) == 0  # it was live for the running agent
    agent.restart()
    refused = observer.next("result", lambda tree: tree["id"] == kept["id"] and not tree["ok"])
    assert "retained" in refused["text"]
    time.sleep(0.5)
    assert agent.process.poll() is None
    assert ask(observer, "ping")["ok"]
    observer.command("stop", b"", retain=True)


def test_stop_command_says_offline_and_exits_0(rig):
    _, observer, agent, _ = rig
    assert ask(observer, "stop")["ok"]
    assert observer.next("status")["status"] == "offline"
    assert agent.process.wait(WAIT_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_gracefully(rig, number):
    _, observer, agent, _ = rig
    agent.process.send_signal(number)
    assert agent.process.wait(WAIT_S) == 0
    assert observer.next("status")["status"] == "offline"
    assert "Traceback" not in agent.text() and "closes the connection" not in agent.text()


def test_kill_fires_the_will_and_a_restart_has_a_higher_bd_seq(rig):
    ground, observer, agent, _ = rig
    first = next(tree for leaf, tree, _ in observer.all if leaf == "birth")
    agent.kill()
    death = observer.next("status")
    assert death == {"node": "n1", "status": "offline", "bd_seq": first["bd_seq"]}
    agent.restart()
    second = observer.next("birth", lambda tree: tree["bd_seq"] != first["bd_seq"])
    assert second["bd_seq"] == first["bd_seq"] + 1
    online = observer.next("status", lambda tree: tree["status"] == "online")
    assert online["bd_seq"] == second["bd_seq"]
    assert observer.next("telemetry", lambda tree: tree["bd_seq"] == second["bd_seq"])["seq"] == 1
    answer, _ = ground.ask_until_answered(REQUEST)  # the identity is taken over by the restarted node
    assert answer.kind == frame.PARTIAL


def test_a_late_will_of_an_earlier_connection_is_put_right(rig):
    _, observer, _, broker = rig
    birth = next(tree for leaf, tree, _ in observer.all if leaf == "birth")
    old = {"node": "n1", "status": "offline", "bd_seq": birth["bd_seq"] - 1}
    observer.client.publish(observer.prefix + "status", json.dumps(old), 1, retain=True)
    assert observer.next("status", lambda tree: tree["status"] == "online")["bd_seq"] == birth["bd_seq"]
    with Observer(broker.host, broker.port) as late:
        assert late.next("status")["status"] == "online"


def test_broker_restart_experts_go_on_and_the_node_is_born_again(rig):
    ground, observer, agent, broker = rig
    first = next(tree for leaf, tree, _ in observer.all if leaf == "birth")
    broker.stop()
    for _ in range(3):
        assert served(ground).kind == frame.PARTIAL
        time.sleep(0.2)
    broker.start()
    birth = observer.next("birth", lambda tree: tree["bd_seq"] > first["bd_seq"])
    telemetry = observer.next("telemetry", lambda tree: tree["bd_seq"] == birth["bd_seq"])
    assert telemetry["seq"] >= 1
    assert agent.process.poll() is None
    assert agent.text().count("no broker at") <= 1  # one line, not one for each try


def test_without_a_broker_experts_are_served(bundle, tmp_path):
    port = free_port()
    with Ground() as ground:
        tables = agent_tables(tmp_path, ground.endpoint, bundle)
        tables["broker"] = {"host": "127.0.0.1", "port": port}
        with AgentProcess(tmp_path, tables) as agent:
            ground.hello()
            time.sleep(1.0)
            assert served(ground).kind == frame.PARTIAL
            assert agent.text().count("no broker at") == 1
            agent.process.terminate()
            assert agent.process.wait(WAIT_S) == 0
    counted = (tmp_path / "state/bd_seq").read_text()
    assert counted == "1"  # tries that reached no broker cost no number, and no write


def test_no_broker_table_means_no_control_plane(bundle, tmp_path):
    with Ground() as ground, AgentProcess(tmp_path, agent_tables(tmp_path, ground.endpoint, bundle)) as agent:
        ground.hello()
        assert served(ground).kind == frame.PARTIAL
        assert "no [broker]" in agent.text()


def test_an_exception_in_the_control_plane_costs_one_connection_and_not_the_control_plane(broker, tmp_path, caplog):
    """make_birth fails at the first connection, as a defect would; the next connection is a good one."""
    births = []

    def make_birth(bd_seq: int) -> wire.Birth:
        births.append(bd_seq)
        if len(births) == 1:
            raise ZeroDivisionError("a defect")
        return wire.Birth("n1", bd_seq, "0", "b", time.time(), (), (), "", 0, "tcp://127.0.0.1:1")

    tables = agent_tables(tmp_path, "tcp://127.0.0.1:1", broker=broker)
    settings = config.parse(toml(tables), tmp_path)
    counters = Counters()
    with Observer(broker.host, broker.port) as observer:
        with Control(settings, settings.broker, counters, make_birth, lambda *a: (False, "no")) as control:
            control.event("info", "early", "before there is a connection")
            assert observer.next("birth")["bd_seq"] == 2
            assert observer.next("event")["text"] == "before there is a connection"
        assert observer.next("status", lambda tree: tree["bd_seq"] == 2 and tree["status"] == "offline")
    assert births == [1, 2] and counters.control_errors["internal"] == 1
    assert caplog.text.count("ZeroDivisionError") == 1


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate authority and a server's certificate for 127.0.0.1, made by the openssl program."""
    if shutil.which("openssl") is None:
        lacking("openssl", "apt-get install openssl")
    folder = tmp_path_factory.mktemp("pki")
    openssl = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    for name, subject in (("ca", "/CN=fleet"), ("other", "/CN=stranger")):
        subprocess.run(
            [*openssl, "-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", subject],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    for name, extra in (("server", "subjectAltName=IP:127.0.0.1"), ("node", "extendedKeyUsage=clientAuth")):
        signed = [
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            extra,
        ]
        subprocess.run(
            [*openssl, *signed, "-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    return folder


@pytest.fixture
def tls_port(authority, tmp_path):
    """A mosquitto that wants certificates of the authority from its clients."""
    program = find_mosquitto()
    if program is None:
        lacking("mosquitto", "apt-get install mosquitto")
    port = free_port()
    (tmp_path / "mosquitto.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nrequire_certificate true\nuser root\n"
        f"cafile {authority}/ca.crt\ncertfile {authority}/server.crt\nkeyfile {authority}/server.key\n"
    )
    process = subprocess.Popen([program, "-c", str(tmp_path / "mosquitto.conf")], stderr=subprocess.DEVNULL)
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.02)
    yield port
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "certificates, said",
    [
        ({"ca": "ca.crt", "cert": "node.crt", "key": "node.key"}, "connected to the broker"),
        ({"ca": "other.crt", "cert": "node.crt", "key": "node.key"}, "TLS with the broker fails"),
        ({"ca": "ca.crt"}, "closes the connection before it answers"),
        ({"ca": "ca.crt", "cert": "other.crt", "key": "other.key"}, "closes the connection before it answers"),
    ],
)
def test_mutual_tls_connects_or_says_why_not_in_one_line(authority, tls_port, tmp_path, certificates, said):
    with Ground() as ground:
        tables = agent_tables(tmp_path, ground.endpoint)
        files = {key: str(authority / name) for key, name in certificates.items()}
        tables["broker"] = {"host": "127.0.0.1", "port": tls_port, **files}
        with AgentProcess(tmp_path, tables) as agent:
            end = time.monotonic() + WAIT_S
            while said not in agent.text() and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(1.0)  # further tries are silent
            assert agent.text().count(said) == 1
            assert agent.process.poll() is None
            ground.hello()


def test_bd_seq_survives_restarts_and_damage(tmp_path):
    counter = BirthCounter(tmp_path)
    assert [counter.next(), counter.next()] == [1, 2]
    with pytest.raises(AlreadyRunningError, match="another agent"):
        BirthCounter(tmp_path)
    counter.close()
    again = BirthCounter(tmp_path)
    assert again.next() == 3
    again.close()
    (tmp_path / "bd_seq").write_text("\0\0\0")  # as after a power cut without fsync
    damaged = BirthCounter(tmp_path)
    assert damaged.next() > 1_700_000_000  # above anything that was counted one by one
    damaged.close()


def test_a_state_dir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state_dir"):
        BirthCounter(tmp_path / "file" / "state")


def test_birth_of_a_large_node_fits_a_message():
    """1,500 shards, a quarter of a 48-layer model with 128 experts, are below the limit of a control message."""
    one = wire.HostedShard(47, 127, "int4", "f" * 64)
    birth = wire.Birth("n" * 32, 2**40, "1", "b", 1.0, (), (one,) * 1536, "bundle", 2**40, "tcp://127.0.0.1:1")
    assert len(wire.encode(birth)) < wire.MAX_MESSAGE_BYTES


def test_joules_of_requests_are_divided_and_add_up(bundle, mosquitto, tmp_path):
    """A simulated board of 3 W that takes 9 W while it serves: the parts are those of the requests, to the last bit."""
    folder = tmp_path / "sys/class/hwmon/hwmon0"
    folder.mkdir(parents=True)
    for name, value in {"name": "ina226", "update_interval": 5, "power1_input": 3_000_000, "curr1_input": 600}.items():
        (folder / name).write_text(f"{value}\n")
    with Broker(tmp_path, "mosquitto") as broker, Ground() as ground, Observer(broker.host, broker.port) as observer:
        tables = agent_tables(tmp_path, ground.endpoint, bundle, broker)
        tables["node"]["sysroot"] = str(tmp_path)
        with AgentProcess(tmp_path, tables):
            observer.next("telemetry", lambda tree: names(tree)["power_baseline_w"]["value"] is not None)
            before = names(observer.next("telemetry"))
            (folder / "new").write_text("9000000\n")
            (folder / "new").replace(folder / "power1_input")
            count, end_s = 0, time.monotonic() + 1.0
            while time.monotonic() < end_s:
                assert served(ground).kind == frame.PARTIAL
                count += 1
            assert ask(observer, "sample")["ok"]
            after = names(observer.next("telemetry", lambda tree: names(tree)["requests_served"]["value"] == count))
    kinds = ("energy_compute_j", "energy_radio_j", "energy_idle_j", "energy_telemetry_j")
    for sample in (before, after):
        parts = [sample[kind]["value"] for kind in kinds]
        assert parts[0] + parts[1] + parts[2] + parts[3] == sample["energy_j"]["value"]
        assert {sample[kind]["provenance"] for kind in kinds} == {"simulated"}
    assert before["power_baseline_w"]["value"] == pytest.approx(3.0)
    assert after["energy_compute_j"]["value"] > 0 and after["energy_radio_j"]["value"] > 0
    assert after["energy_cost_percent"]["validity"] == "ok" and after["energy_rate_hz"]["value"] > 0
    assert after["history_owed"]["value"] == 0
