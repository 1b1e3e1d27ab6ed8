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

from node_agent import history, signature, toml_file, wire
from node_agent.errors import ConfigError

MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_UTC_S = 2**32  # a clock is never set beyond the year 2106
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
    """Which shards to load: stems as shard.shard_stem gives them, without 'experts/'. `path` None: no shard.

    `signers`: Ed25519 public keys (hex), one of which must have signed every shard, flashed or sent. Without them any shard is
    taken: on loopback, elsewhere only if `allow_unsigned` says so.
    """

    path: Path | None = None
    shards: tuple[str, ...] = ()
    threads: int = 1
    signers: tuple[str, ...] = ()
    allow_unsigned: bool = False


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
class EnrolConfig:
    """Where this node gets its certificate ([broker] cert), how the server is known, and the one-time token for the first.

    `provisioned_utc_s`: when the pack was written; it is later now. `renew_share`: of a certificate's life, after which the
    agent gets the next one.
    """

    host: str
    port: int
    ca: Path
    token_file: Path | None = None
    provisioned_utc_s: float | None = None
    renew_share: float = 2 / 3


@dataclass(frozen=True)
class UpdateConfig:
    """Updates of the agent itself. `signers`: who may sign one ([bundle] signers if none); without any there are no updates.

    A new agent is good once it has served for `hold_s` in one piece, with broker and ground station; one that is not within
    `deadline_s` gives way to the one before.
    """

    signers: tuple[str, ...] = ()
    hold_s: float = 60.0
    deadline_s: float = 900.0


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
    enrol: EnrolConfig | None = None
    update: UpdateConfig = UpdateConfig()
    metrics: tuple[str, int] | None = None  # host and port to show metrics on; None: no port is opened


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
    threads = table.number("threads", 1, 256, 1, whole=True)
    signers, allow_unsigned = _signers(table), table.flag("allow_unsigned")
    if signers and allow_unsigned:
        raise ConfigError("[bundle] has signers and allow_unsigned = true: give one of the two")
    return BundleConfig(path, shards, threads, signers, allow_unsigned)


def _signers(table: _Table) -> tuple[str, ...]:
    want = f"a list of at most {signature.MAX_SIGNERS} Ed25519 public keys of 64 hex characters"
    signers = table.texts("signers", want)
    try:
        if len(signers) <= signature.MAX_SIGNERS:
            return tuple(signature.check_signer(signer) for signer in signers)
    except signature.SignatureError:
        pass
    raise table.fail("signers", signers, want)


def _check_trust(bundle: BundleConfig, link: LinkConfig) -> None:
    """Raises: ConfigError where shards of anybody would be served to another machine without saying so."""
    for endpoint in (link.endpoint, link.delivery_endpoint):
        if (
            endpoint
            and not is_loopback(urlsplit(endpoint).hostname)
            and not bundle.signers
            and not bundle.allow_unsigned
        ):
            raise ConfigError(
                f"[data] {endpoint} is not this machine and [bundle] does not say whose shards are to be trusted: give "
                f'signers = ["<the fleet\'s signing.pub>"], or set allow_unsigned = true'
            )


def _broker(table: _Table, enrolled: bool, remedy: str) -> BrokerConfig:
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
        if enrolled and file and not file.is_file():
            copy = (
                "copy the node's certificates again"  # the authority's comes with the configuration, not by enrolling
            )
            raise ConfigError(f"[broker] {file} is missing: {copy if file == broker.ca or not remedy else remedy}")
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


def _enrol(table: _Table, broker: BrokerConfig | None, link: LinkConfig) -> EnrolConfig:
    url = table.text("url", "https://HOST:PORT of the ground station")
    try:
        parts = urlsplit(url)
        usable = parts.scheme == "https" and parts.hostname and parts.port and url.isprintable() and " " not in url
        usable = usable and not (parts.path.strip("/") or parts.query or parts.fragment or parts.username)
    except ValueError:
        usable = False
    if not usable:
        raise table.fail("url", url, "https://HOST:PORT of the ground station")
    config = EnrolConfig(
        parts.hostname,
        parts.port,
        table.path("ca", "the file of the fleet's certificate authority", required=True),
        table.path("token_file", "the file of the one-time claim token"),
        table.number("provisioned_utc_s", 0, MAX_UTC_S, None),
        table.number("renew_share", 0.05, 0.95, EnrolConfig.renew_share),
    )
    if broker is None or not broker.cert:
        raise ConfigError("[enrol] gets a certificate and [broker] has no cert and key: say there where they belong")
    if link.secret_key_file is None:
        raise ConfigError(
            "[enrol] binds the data plane's key and [data] has none: give server_public_key, secret_key_file"
        )
    return config


def _update(table: _Table) -> UpdateConfig:
    default = UpdateConfig()
    hold_s = table.number("hold_s", 0.1, 86_400, default.hold_s)
    deadline_s = table.number("deadline_s", 0.1, 7 * 86_400, max(default.deadline_s, 4 * hold_s))
    if deadline_s <= hold_s:
        raise table.fail("deadline_s", deadline_s, "more than hold_s")
    return UpdateConfig(_signers(table), hold_s, deadline_s)


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


def _metrics(table: _Table) -> tuple[str, int]:
    want = "IP:PORT, for example 127.0.0.1:9464"
    text = table.text("listen", want)
    host, _, port = text.rpartition(":")
    try:
        address = str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        address = ""
    if not address or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65_536:
        raise table.fail("listen", text, want)
    return address, int(port)


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


def parse(text: str, base: Path, enrolled: bool = True, file: str = "FILE") -> Config:
    """Configuration in `text`; relative paths are below `base`.  Raises: ConfigError.

    `enrolled` False: before the first start, when certificate and key may not be there yet. `file`: what `text` was read from.
    """
    try:
        tree = toml_file.loads(text)
    except toml_file.TomlError as error:
        raise ConfigError(f"not TOML: {str(error)[:200]}: correct that line") from None
    known = {"node": True, "bundle": False, "broker": False, "data": True, "telemetry": False, "guard": False}
    known |= {"power_model": False, "history": False, "enrol": False, "update": False, "metrics": False}
    for name in tree:
        if name not in known:
            raise ConfigError(f"[{name}] is unknown: use {', '.join(known)}")
    tables = {}
    for name, required in known.items():
        if name not in tree and required:
            raise ConfigError(f"[{name}] is missing: add that table")
        tables[name] = _Table(name, tree.get(name, {}), base)
    telemetry = tables["telemetry"]
    remedy = f"run `node-agent enrol --config {file}`" if "enrol" in tree else ""
    broker = _broker(tables["broker"], enrolled, remedy) if "broker" in tree else None
    link = _link(tables["data"])
    bundle = _bundle(tables["bundle"])
    _check_trust(bundle, link)
    config = Config(
        _node(tables["node"]),
        bundle,
        broker,
        link,
        TelemetryConfig(telemetry.number("period_s", 0.05, 3600, 1.0), telemetry.number("sample_hz", 0.1, 1000, 10.0)),
        _guard(tables["guard"]),
        _power_model(tables["power_model"]) if "power_model" in tree else None,
        _history(tables["history"]),
        _enrol(tables["enrol"], broker, link) if "enrol" in tree else None,
        _update(tables["update"]),
        _metrics(tables["metrics"]) if "metrics" in tree else None,
    )
    for name, table in tables.items():
        if name in tree:
            table.close()
    return config


def load(path: Path, enrolled: bool = True) -> Config:
    """The configuration in a file; `enrolled` as in `parse`.

    Raises: ConfigError naming the file, the field and the next step.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give the agent's TOML file by --config") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is over {MAX_CONFIG_BYTES} bytes: not a configuration of ours")
    try:
        return parse(raw.decode(), path.resolve().parent, enrolled, str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: save it again as UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
