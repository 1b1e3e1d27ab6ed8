"""The agent's TOML file: what a good one gives, and that each bad field is refused in one line with the next step."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from node_rig import toml

from node_agent import config
from node_agent.errors import ConfigError

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"  # the public key of ZeroMQ's curve example (RFC 26 test vectors' form)
BASE = {
    "node": {"id": "sat-1", "fleet": "demo", "board": "Raspberry Pi 5", "state_dir": "state", "memory_limit_mb": 512},
    "bundle": {"path": "bundle", "shards": ["L00E003.int8", "L11E127.int4"]},
    "broker": {"host": "127.0.0.1", "port": 1884},
    "data": {"endpoint": "tcp://127.0.0.1:5555"},
    "telemetry": {"period_s": 2, "sample_hz": 50.0},
    "guard": {"temp_limit_c": 75, "silent_s": 20, "memory_floor_mb": 100},
    "history": {"max_messages": 600},
}


def changed(table: str, **fields) -> dict:
    tables = copy.deepcopy(BASE)
    tables[table] = {key: value for key, value in (tables[table] | fields).items() if value is not None}
    return tables


def parse(tables: dict) -> config.Config:
    return config.parse(toml(tables), Path("/etc/spacemoe"))


def test_a_good_file():
    got = parse(BASE)
    assert (got.node.id, got.node.fleet, got.node.memory_limit_mb) == ("sat-1", "demo", 512)
    assert got.node.state_dir == Path("/etc/spacemoe/state") and got.node.sysroot == Path("/")
    assert got.bundle == config.BundleConfig(Path("/etc/spacemoe/bundle"), ("L00E003.int8", "L11E127.int4"), 1)
    assert (got.broker.host, got.broker.port, got.broker.ca) == ("127.0.0.1", 1884, None)
    assert got.link == config.LinkConfig("tcp://127.0.0.1:5555")
    assert (got.telemetry.period_s, got.telemetry.sample_hz) == (2.0, 50.0)
    assert got.guard == config.GuardConfig(temp_limit_c=75.0, silent_s=20.0, memory_floor_mb=100)
    assert got.history == config.HistoryConfig(600, 8_000_000)


def test_what_may_be_left_out():
    got = parse({"node": {"id": "a", "fleet": "b", "state_dir": "/s"}, "data": BASE["data"]})
    assert got.broker is None and got.bundle.path is None and got.telemetry.period_s == 1.0
    assert got.guard == config.GuardConfig() and got.guard.temp_limit_c is None
    assert got.history == config.HistoryConfig(3600, 8_000_000)  # an hour at 1 Hz
    assert got.node.state_dir == Path("/s") and got.node.memory_limit_mb is None


@pytest.mark.parametrize(
    "table, fields, said",
    [
        ("node", {"id": None}, "lacks id"),
        ("node", {"id": "Sat_1"}, "[node] id is 'Sat_1'"),
        ("node", {"id": "x" * 33}, "1-32"),
        ("node", {"fleet": "a/b"}, "[node] fleet"),
        ("node", {"state_dir": ""}, "[node] state_dir"),
        ("node", {"memory_limit_mb": 0}, "an integer of 1 to"),
        ("node", {"memory_limit_mb": True}, "memory_limit_mb is 'True'"),
        ("node", {"memory_limit_mb": 0.5}, "an integer"),
        ("node", {"nmae": "x"}, "'nmae', which is unknown"),
        ("bundle", {"shards": ["experts/L00E003.int8"]}, "names such as 'L00E003.int8'"),
        ("bundle", {"shards": ["../L00E003.int8"]}, "names such as"),
        ("bundle", {"shards": ["L00E003.int8", "L00E003.int8"]}, "twice"),
        ("bundle", {"shards": "L00E003.int8"}, "a list"),
        ("bundle", {"path": None}, "no path"),
        ("bundle", {"threads": 0}, "threads"),
        ("broker", {"port": 0}, "an integer of 1 to 65535"),
        ("broker", {"port": "1883"}, "port is '1883'"),
        ("broker", {"host": None}, "lacks host"),
        ("broker", {"host": "192.0.2.7"}, "allow_insecure"),
        ("broker", {"host": "localhost.evil.example"}, "allow_insecure"),
        ("broker", {"cert": "c"}, "cert and key go together"),
        ("broker", {"cert": "c", "key": "k"}, "without ca"),
        ("broker", {"ca": "missing.crt"}, "missing.crt is missing"),
        ("broker", {"password": "p"}, "without a username"),
        ("data", {"endpoint": "udp://127.0.0.1:1"}, "tcp://HOST:PORT"),
        ("data", {"endpoint": "tcp://127.0.0.1"}, "tcp://HOST:PORT"),
        ("data", {"endpoint": "tcp://127.0.0.1:99999"}, "tcp://HOST:PORT"),
        ("data", {"endpoint": "tcp://[::1"}, "tcp://HOST:PORT"),
        ("data", {"endpoint": "tcp://192.0.2.7:5555"}, "allow_insecure"),
        ("data", {"server_public_key": KEY}, "go together"),
        ("data", {"server_public_key": "short", "secret_key_file": "k"}, "key of 40 characters"),
        ("telemetry", {"period_s": 0}, "[telemetry] period_s"),
        ("telemetry", {"sample_hz": "fast"}, "[telemetry] sample_hz"),
        ("guard", {"temp_limit_c": 20}, "a number of 30 to 120"),
        ("guard", {"temp_limit_c": True}, "temp_limit_c is 'True'"),
        ("guard", {"hysteresis_k": 0}, "[guard] hysteresis_k is '0'"),
        ("guard", {"floor_duty": -0.1}, "a number of 0 to 1"),
        ("guard", {"unknown_duty": 1.1}, "a number of 0 to 1"),
        ("guard", {"silent_duty": "half"}, "silent_duty is 'half'"),
        ("guard", {"silent_s": 0.5}, "a number of 1 to 86400"),
        ("guard", {"memory_floor_mb": 1.5}, "an integer of 0"),
        ("guard", {"hang_s": 0}, "[guard] hang_s"),
        ("history", {"max_messages": 0}, "[history] max_messages is '0': give an integer of 1 to 100000"),
        ("history", {"max_messages": 60.5}, "[history] max_messages is '60.5': give an integer"),
        ("history", {"max_bytes": 99_999}, "[history] max_bytes is '99999': give an integer of 100000 to 1e+09"),
        ("history", {"max_mb": 8}, "'max_mb', which is unknown: use max_messages, max_bytes"),
        ("guard", {"temp_limit": 80}, "'temp_limit', which is unknown"),
    ],
)
def test_a_bad_field_is_named_with_what_to_give(table, fields, said):
    with pytest.raises(ConfigError) as caught:
        parse(changed(table, **fields))
    text = str(caught.value)
    assert said in text and "\n" not in text
    assert f"[{table}]" in text


@pytest.mark.parametrize(
    "table, fields",
    [
        ("broker", {"host": "192.0.2.7", "allow_insecure": True}),
        ("broker", {"host": "localhost"}),
        ("broker", {"host": "::1"}),
        ("data", {"endpoint": "tcp://192.0.2.7:5555", "allow_insecure": True}),
        ("data", {"endpoint": "tcp://192.0.2.7:5555", "server_public_key": KEY, "secret_key_file": "k"}),
        ("data", {"endpoint": "tcp://[::1]:5555"}),
    ],
)
def test_what_is_safe_or_allowed_is_taken(table, fields):
    tables = changed(table, **fields)
    tables["bundle"]["allow_unsigned"] = True
    parse(tables)


def test_a_certificate_authority_makes_another_host_safe(tmp_path):
    (tmp_path / "ca.crt").write_text("x")
    tables = changed("broker", host="192.0.2.7", ca=str(tmp_path / "ca.crt"))
    assert parse(tables).broker.ca == tmp_path / "ca.crt"


@pytest.mark.parametrize(
    "text, said",
    [
        ("[node", "not TOML"),
        ("node = 3\n[data]\n", "[node] is not a table"),
        ("[nodes]\n", "[nodes] is unknown"),
        ("", "[node] is missing"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, said):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_binary_or_huge_file_is_refused(tmp_path):
    path = tmp_path / "a.toml"
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        config.load(path)
    path.write_bytes(b"#" * (config.MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="over"):
        config.load(path)
