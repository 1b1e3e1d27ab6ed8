"""Configuration of an agent: a TOML file turned into frozen dataclasses, every field checked before anything starts.

A path in the file is relative to the file's folder. Leaves out: what the values do.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from node_agent import history, toml_file, wire
from node_agent.errors import ConfigError

MAX_CONFIG_BYTES = 4 * 1024 * 1024
STEM_PATTERN = re.compile(r"L(\d{2,4})E(\d{3,5})\.([a-z0-9]{1,16})")
Z85_PATTERN = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class NodeConfig:
    """Who this node is. `memory_limit_mb` None: what the machine has available at the start."""

    id: str
    fleet: str
    board: str
    state_dir: Path
    sysroot: Path = Path("/")
    memory_limit_mb: int | None = None


@dataclass(frozen=True)
class BundleConfig:
    """Which shards to load: stems as shard.shard_stem gives them, without 'experts/'. `path` None: no shard."""

    path: Path | None = None
    shards: tuple[str, ...] = ()
    threads: int = 1


@dataclass(frozen=True)
class BrokerConfig:
    """The MQTT broker. TLS is used where `ca` is given; `cert` and `key` are this node's own."""

    host: str
    port: int
    username: str = ""
    password: str = ""
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    allow_insecure: bool = False


@dataclass(frozen=True)
class LinkConfig:
    """The data plane's far end, which we dial. With `server_public_key` (Z85) the connection is CURVE.

    `delivery_endpoint`: its second socket, over which shards come, under the same key; empty: this node takes none.
    """

    endpoint: str
    server_public_key: str = ""
    secret_key_file: Path | None = None
    allow_insecure: bool = False
    delivery_endpoint: str = ""


@dataclass(frozen=True)
class TelemetryConfig:
    """`period_s` between telemetry messages, `sample_hz` of the power sampler behind the energy counter."""

    period_s: float = 1.0
    sample_hz: float = 10.0


@dataclass(frozen=True)
class HistoryConfig:
    """How much telemetry is kept in memory while nobody takes it in: at most `max_messages` and `max_bytes` (compressed; some
    0.6 kB a message), whichever is reached first. Then the oldest is dropped, and counted."""

    max_messages: int = history.MAX_MESSAGES
    max_bytes: int = history.MAX_BYTES


@dataclass(frozen=True)
class GuardConfig:
    """How the board protects itself. Duties are shares of time spent computing, 0-1.

    `temp_limit_c` None: from the board's trip points. `hysteresis_k`: how far under the set point heat stops being a cause.
    `floor_duty`: the least that heat leaves; `unknown_duty`: without a valid temperature; `silent_duty`: once the ground
    station has been silent for `silent_s`, or has let its cap run out. `memory_floor_mb` 0: memory is not guarded.
    `hang_s`: a loop that does not come round for so long hangs, and systemd is told no more that all is well.
    """

    temp_limit_c: float | None = None
    hysteresis_k: float = 2.0
    floor_duty: float = 0.05
    unknown_duty: float = 0.3
    silent_s: float = 30.0
    silent_duty: float = 0.5
    memory_floor_mb: int = 64
    hang_s: float = 30.0


@dataclass(frozen=True)
class PowerModelConfig:
    """What a board without a power sensor takes: `idle_w`, and `w_per_busy_core` for each core that is busy.

    `fitted_on` (in the file `from`): which board and meter it comes from; `residual_w`: rms of what the fit left, if known.
    """

    idle_w: float
    w_per_busy_core: float
    fitted_on: str = ""
    residual_w: float | None = None


@dataclass(frozen=True)
class Config:
    """The whole file. `broker` None: this node has no control plane, it only serves the data plane."""

    node: NodeConfig
    bundle: BundleConfig
    broker: BrokerConfig | None
    link: LinkConfig
    telemetry: TelemetryConfig
    guard: GuardConfig = GuardConfig()
    power_model: PowerModelConfig | None = None
    history: HistoryConfig = HistoryConfig()


class _Table:
    """One table of the file; takes its keys one by one, checked, and refuses those left over."""

    def __init__(self, name: str, tree: Any, base: Path):
        if not isinstance(tree, dict):
            raise ConfigError(f"[{name}] is not a table: write it as [{name}] with key = value lines below")
        self._name, self._left, self._base, self._known = name, dict(tree), base, []

    def fail(self, key: str, value: Any, want: str) -> ConfigError:
        try:
            text = repr(str(value)[:80])
        except ValueError:  # Python writes no number of more than 4300 digits
            text = "a number of thousands of digits"
        return ConfigError(f"[{self._name}] {key} is {text}: give {want}")

    def _take(self, key: str, required: bool, want: str) -> Any:
        self._known.append(key)
        if key not in self._left and required:
            raise ConfigError(f"[{self._name}] lacks {key}: give {want}")
        return self._left.pop(key, None)

    def text(self, key: str, want: str, default: str | None = None) -> str:
        value = self._take(key, default is None, want)
        if value is None:
            return default or ""
        if not isinstance(value, str) or (not value and default is None) or len(value) > 4096 or "\0" in value:
            raise self.fail(key, value, want)
        return value

    def path(self, key: str, want: str, required: bool = False) -> Path | None:
        value = self.text(key, want, None if required else "")
        return self._base / value if value else None

    def number(
        self, key: str, low: float, high: float, default: float | None, whole: bool = False, required: bool = False
    ) -> Any:
        want = f"{'an integer' if whole else 'a number'} of {low:g} to {high:g}"
        value = self._take(key, required, want)
        if value is None:
            return default
        kinds = (int,) if whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, value, want)
        return value if whole else float(value)

    def flag(self, key: str) -> bool:
        value = self._take(key, False, "true or false")
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return bool(value)

    def texts(self, key: str, want: str) -> tuple[str, ...]:
        value = self._take(key, False, want)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > 65_536 or not all(isinstance(item, str) for item in value):
            raise self.fail(key, value, want)
        return tuple(value)

    def close(self) -> None:
        if self._left:
            key = str(next(iter(self._left)))[:40]
            raise ConfigError(f"[{self._name}] has {key!r}, which is unknown: use {', '.join(self._known)}")


def is_loopback(host: str) -> bool:
    """True where traffic to `host` cannot leave this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _node(table: _Table) -> NodeConfig:
    ids = {}
    for key in ("id", "fleet"):
        ids[key] = table.text(key, "1-32 of a-z, 0-9 and inner '-'")
        try:
            wire.check_id(ids[key])
        except wire.WireError:
            raise table.fail(key, ids[key], "1-32 of a-z, 0-9 and inner '-'") from None
    return NodeConfig(
        ids["id"],
        ids["fleet"],
        table.text("board", "the kind of board in words, such as 'Raspberry Pi 5'", "unknown"),
        table.path("state_dir", "a folder that this agent may write", required=True),
        table.path("sysroot", "the folder that /sys is below") or Path("/"),
        table.number("memory_limit_mb", 1, 2**24, None, whole=True),
    )


def _bundle(table: _Table) -> BundleConfig:
    path = table.path("path", "the folder that `spacemoe quantize` wrote")
    shards = table.texts("shards", "a list such as ['L00E003.int8']")
    for stem in shards:
        if not STEM_PATTERN.fullmatch(stem):
            raise table.fail("shards", stem, "names such as 'L00E003.int8'")
    if len(set(shards)) != len(shards):
        raise ConfigError("[bundle] shards names a shard twice: list each once")
    if shards and path is None:
        raise ConfigError("[bundle] has shards and no path: give the folder that `spacemoe quantize` wrote")
    return BundleConfig(path, shards, table.number("threads", 1, 256, 1, whole=True))


def _broker(table: _Table) -> BrokerConfig:
    port = table.number("port", 1, 65_535, None, whole=True)
    broker = BrokerConfig(
        table.text("host", "the broker's name or address"),
        1883 if port is None else port,
        table.text("username", "a user name", ""),
        table.text("password", "a password", ""),
        table.path("ca", "the file of the fleet's certificate authority"),
        table.path("cert", "the file of this node's certificate"),
        table.path("key", "the file of this node's private key"),
        table.flag("allow_insecure"),
    )
    if bool(broker.cert) != bool(broker.key):
        raise ConfigError("[broker] cert and key go together: give both or neither")
    if broker.cert and not broker.ca:
        raise ConfigError("[broker] has cert without ca: give the file of the fleet's certificate authority too")
    if broker.password and not broker.username:
        raise ConfigError("[broker] has a password without a username: give both")
    for file in (broker.ca, broker.cert, broker.key):
        if file and not file.is_file():
            raise ConfigError(f"[broker] {file} is missing: copy the node's certificates again")
    if not broker.ca and not is_loopback(broker.host) and not broker.allow_insecure:
        raise ConfigError(
            f"[broker] {broker.host} is not this machine and there is no ca: give ca, cert and key, or set allow_insecure = true"
        )
    return broker


def _host(table: _Table, key: str, endpoint: str) -> str:
    """Host of a tcp://HOST:PORT.  Raises: ConfigError."""
    try:
        url = urlsplit(endpoint)
        usable = url.scheme == "tcp" and url.hostname and url.port and not (url.path or url.query or url.username)
    except ValueError:
        usable = False
    if not usable:
        raise table.fail(key, endpoint, "tcp://HOST:PORT of the ground station")
    return url.hostname


def _link(table: _Table) -> LinkConfig:
    link = LinkConfig(
        table.text("endpoint", "tcp://HOST:PORT of the ground station"),
        table.text("server_public_key", "the ground station's key of 40 characters", ""),
        table.path("secret_key_file", "a file for this node's secret key (made when it is missing)"),
        table.flag("allow_insecure"),
        table.text("delivery_endpoint", "tcp://HOST:PORT of the ground station's socket for shards", ""),
    )
    dialled = {link.endpoint: _host(table, "endpoint", link.endpoint)}
    if link.delivery_endpoint:
        dialled[link.delivery_endpoint] = _host(table, "delivery_endpoint", link.delivery_endpoint)
    if link.server_public_key and not Z85_PATTERN.fullmatch(link.server_public_key):
        raise table.fail("server_public_key", link.server_public_key, "the ground station's key of 40 characters")
    if bool(link.server_public_key) != bool(link.secret_key_file):
        raise ConfigError("[data] server_public_key and secret_key_file go together: give both or neither")
    for endpoint, host in dialled.items():
        if not link.server_public_key and not is_loopback(host) and not link.allow_insecure:
            raise ConfigError(
                f"[data] {endpoint} is not this machine and there is no server_public_key: "
                f"give it with secret_key_file, or set allow_insecure = true"
            )
    return link


def _guard(table: _Table) -> GuardConfig:
    default = GuardConfig()
    return GuardConfig(
        table.number("temp_limit_c", 30, 120, default.temp_limit_c),
        table.number("hysteresis_k", 0.1, 30, default.hysteresis_k),
        table.number("floor_duty", 0.0, 1.0, default.floor_duty),
        table.number("unknown_duty", 0.0, 1.0, default.unknown_duty),
        table.number("silent_s", 1, 86_400, default.silent_s),
        table.number("silent_duty", 0.0, 1.0, default.silent_duty),
        table.number("memory_floor_mb", 0, 2**24, default.memory_floor_mb, whole=True),
        table.number("hang_s", 1, 3600, default.hang_s),
    )


def _history(table: _Table) -> HistoryConfig:
    default = HistoryConfig()
    return HistoryConfig(
        table.number("max_messages", *history.MESSAGES_BOUNDS, default.max_messages, whole=True),
        table.number("max_bytes", *history.BYTES_BOUNDS, default.max_bytes, whole=True),
    )


def _power_model(table: _Table) -> PowerModelConfig:
    return PowerModelConfig(
        table.number("idle_w", 0.0, 1000.0, None, required=True),
        table.number("w_per_busy_core", 0.0, 1000.0, None, required=True),
        table.text("from", "in words which board and meter it was fitted on", ""),
        table.number("residual_w", 0.0, 1000.0, None),
    )


def parse(text: str, base: Path) -> Config:
    """Configuration in `text`; relative paths are below `base`.  Raises: ConfigError."""
    try:
        tree = toml_file.loads(text)
    except toml_file.TomlError as error:
        raise ConfigError(f"not TOML: {str(error)[:200]}: correct that line") from None
    known = {"node": True, "bundle": False, "broker": False, "data": True, "telemetry": False, "guard": False}
    known |= {"power_model": False, "history": False}
    for name in tree:
        if name not in known:
            raise ConfigError(f"[{name}] is unknown: use {', '.join(known)}")
    tables = {}
    for name, required in known.items():
        if name not in tree and required:
            raise ConfigError(f"[{name}] is missing: add that table")
        tables[name] = _Table(name, tree.get(name, {}), base)
    telemetry = tables["telemetry"]
    config = Config(
        _node(tables["node"]),
        _bundle(tables["bundle"]),
        _broker(tables["broker"]) if "broker" in tree else None,
        _link(tables["data"]),
        TelemetryConfig(telemetry.number("period_s", 0.05, 3600, 1.0), telemetry.number("sample_hz", 0.1, 1000, 10.0)),
        _guard(tables["guard"]),
        _power_model(tables["power_model"]) if "power_model" in tree else None,
        _history(tables["history"]),
    )
    for name, table in tables.items():
        if name in tree:
            table.close()
    return config


def load(path: Path) -> Config:
    """The configuration in a file.  Raises: ConfigError naming the file, the field and the next step."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give the agent's TOML file by --config") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is over {MAX_CONFIG_BYTES} bytes: not a configuration of ours")
    try:
        return parse(raw.decode(), path.resolve().parent)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: save it again as UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
