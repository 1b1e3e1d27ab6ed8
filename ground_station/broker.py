"""Starts, watches and restarts the fleet's MQTT 5 broker as a child: plain on loopback, or with mutual TLS for a fleet's folder.

Leaves out: what the fleet's broker is told (broker_fleet.py) and which node may do what (broker_rights.py).
Two kinds. `mosquitto`, when the program is there: the one for real fleets. Otherwise `embedded`: rumqttd out of the PyPI
package iotcore, for a demo and tests on one machine. Known limits of the embedded kind (iotcore 0.4): no access control,
no client certificates, no persistence (retained messages are gone after a restart: nodes publish their birth again when
they reconnect), noLocal is ignored, a client that subscribes to $SYS is dropped. A third kind, `external`, is somebody
else's broker, found by its address and never started or stopped here.

The child is a guard (`python -m ground_station.broker KIND CONFIG`) that ends when its standard input closes, so a
broker never outlives the process that wanted it, even one that was killed. It has its own session: a Ctrl-C reaches the
parent alone, which can then let nodes say goodbye before it stops the broker.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import getpass
import ipaddress
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from node_agent import wire

if TYPE_CHECKING:
    import ssl

    from ground_station.fleet_records import FleetFolder

LOOPBACK = "127.0.0.1"
PORTS = range(20_000, 32_000)  # below what Linux takes for outgoing connections (ip_local_port_range)
# Room for the largest control message with its topic and properties.
MAX_PACKET_BYTES = wire.MAX_MESSAGE_BYTES + 64 * 1024
MAX_CLIENTS = 1000
# What may wait for one client: the retained state of MAX_CLIENTS nodes, of 32 KiB each, comes at once to a ground station that connects.
MAX_QUEUED_BYTES = 32 * 1024 * 1024
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1

Kind = Literal["auto", "mosquitto", "embedded", "external"]


class BrokerError(RuntimeError):
    """The broker cannot be started or reached; the text names the next step."""


class AddressError(BrokerError, ValueError):
    """No broker is meant by that text."""


def find_mosquitto() -> str | None:
    """Path of the mosquitto program, or None. Debian's /usr/sbin is not on an ordinary user's PATH."""
    return shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def mosquitto_config(port: int, folder: Path) -> str:
    """Configuration of a loopback listener that needs no password; state is kept in `folder`."""
    return "\n".join([f"listener {port} {LOOPBACK}", "allow_anonymous true", *common_config(folder)]) + "\n"


def common_config(folder: Path) -> list[str]:
    """Lines that hold for every listener."""
    lines = [
        # Without it QoS 1 and fan-out wait 40 ms and more for delayed acknowledgements.
        "set_tcp_nodelay true",
        "max_inflight_messages 200",
        "max_queued_messages 10000",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        f"max_packet_size {MAX_PACKET_BYTES}",
        # No client of the kit keeps a session beyond its connection; one that does shall not hold its queue for ever.
        "persistent_client_expiration 1h",
        "persistence true",
        f"persistence_location {folder}/",
        "autosave_interval 60",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
    ]
    if os.geteuid() == 0:
        # As root mosquitto changes to its own user, who may not write into the run folder.
        lines.append(f"user {getpass.getuser()}")
    return lines


def embedded_config(port: int) -> str:
    """rumqttd's TOML for one MQTT 5 listener on loopback; its own payload cap (20 KB) is below our largest message."""
    return f"""id = 0
[router]
id = 0
max_connections = {MAX_CLIENTS}
max_outgoing_packet_count = 200
max_segment_size = {8 * 1024 * 1024}
max_segment_count = 4
[v5.1]
name = "mqtt5"
listen = "{LOOPBACK}:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 5000
max_payload_size = {MAX_PACKET_BYTES}
max_inflight_count = 200
"""


def accepts_mqtt5(host: str, port: int, timeout_s: float = 1.0, tls: ssl.SSLContext | None = None) -> bool:
    """True when an MQTT 5 CONNECT to host:port, with `tls` inside TLS, is answered by a CONNACK of reason 0."""
    client_id = f"spacemoe-probe-{os.getpid()}".encode()
    # MQTT 5 section 3.1: protocol name and version 5, clean start, keep-alive 5 s, no properties, client id.
    variable = b"\x00\x04MQTT\x05\x02\x00\x05\x00" + len(client_id).to_bytes(2, "big") + client_id
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as plain,
            tls.wrap_socket(plain, server_hostname=host) if tls else contextlib.nullcontext(plain) as link,
        ):
            link.sendall(b"\x10" + bytes([len(variable)]) + variable)
            answer = b""
            while len(answer) < 4:
                part = link.recv(64)
                if not part:
                    return False
                answer += part
            link.sendall(b"\xe0\x00")
            return answer[0] == 0x20 and answer[3] == 0
    except OSError:
        return False


def free_port() -> int:
    """A free port that outgoing connections do not use: while a broker is away, one of them could take its port (or, dialling it
    again and again from that very port, connect to itself), and it could not come back."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _own_address(bind: str) -> str:
    """Where this machine finds what listens on `bind`.  Raises: AddressError."""
    try:
        address = ipaddress.ip_address(LOOPBACK if bind == "localhost" else bind)
    except ValueError:
        raise AddressError(
            f"{bind[:80]!r} is no IP address to listen on: give one of this machine, or 0.0.0.0"
        ) from None
    if address.is_unspecified:
        return LOOPBACK if address.version == 4 else "::1"
    return str(address)


class Broker:
    """A broker that runs between `start` and `stop` (or inside `with`); `host`, `port` and `kind` hold after `start`.

    Args:
        run_dir: existing or new folder for configuration, log and mosquitto's persistence (in `run_dir/broker`).
        kind: 'auto' takes mosquitto when it is there, else the embedded broker; a kind that is named is never replaced.
        port: 0 takes a free one, which `restart` keeps.
        external: 'HOST:PORT' of a broker that runs already; then nothing is started.
        fleet: its certificates are asked for, and its records say who may do what; needs mosquitto.
        bind: address to listen on; another than a loopback one only with `fleet`. `host` is then where this machine finds it.
    Raises: BrokerError.
    """

    def __init__(
        self,
        run_dir: Path,
        kind: Kind = "auto",
        port: int = 0,
        external: str = "",
        fleet: FleetFolder | None = None,
        bind: str = LOOPBACK,
    ) -> None:
        self.host, self.port = _own_address(bind), port
        self.bind, self.fleet = bind, fleet
        if fleet is None and not ipaddress.ip_address(self.host if bind == "localhost" else bind).is_loopback:
            raise AddressError(
                f"a broker without certificates does not listen on {bind}: give a fleet, or bind {LOOPBACK}"
            )
        self.folder = Path(run_dir).resolve() / "broker"
        self._child: subprocess.Popen | None = None
        self._lock: int | None = None
        if external or kind == "external":
            host, colon, number = external.rpartition(":")
            if not (colon and host and number.isdecimal() and 0 < int(number) < 65536):
                raise AddressError(f"external broker {external!r} is not HOST:PORT; write for example 192.0.2.7:1883")
            self.kind, self.host, self.port = "external", host, int(number)
            return
        program = find_mosquitto()
        if kind == "auto":
            kind = "mosquitto" if program or fleet is not None else "embedded"
        if kind == "embedded" and fleet is not None:
            raise BrokerError("the embedded broker knows no certificates: apt-get install mosquitto for a fleet")
        if kind == "mosquitto" and program is None:
            other = "" if fleet is not None else ", or use the embedded broker"
            raise BrokerError(f"mosquitto is not installed; apt-get install mosquitto{other}")
        if kind not in ("mosquitto", "embedded"):
            raise AddressError(f"broker {kind[:80]!r} is unknown: use auto, mosquitto, embedded or HOST:PORT")
        self.kind = kind

    @property
    def running(self) -> bool:
        """Whether the child runs; of an external broker, whether it answers."""
        if self.kind == "external":
            return accepts_mqtt5(self.host, self.port)
        return self._child is not None and self._child.poll() is None

    def start(self) -> Broker:
        """Starts the broker and returns when it accepts MQTT 5 clients.  Raises: BrokerError."""
        if self.kind == "external":
            if not accepts_mqtt5(self.host, self.port, timeout_s=5.0):
                raise BrokerError(
                    f"no MQTT 5 broker answers at {self.host}:{self.port}; start it or correct the address"
                )
            return self
        if self.running:
            return self
        self.port = self.port or free_port()
        tls = self._tls()
        try:
            self._take_folder()
            self._refuse_taken_port()
            self._launch()
        except BaseException:
            self.stop()
            raise
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.running:
            if accepts_mqtt5(self.host, self.port, tls=tls):
                return self
            time.sleep(0.02)
        self.stop()
        raise BrokerError(f"the {self.kind} broker did not start on port {self.port}: {self._last_log_line()}")

    def _take_folder(self) -> None:
        """A second broker, on another address, would write over the configuration and the rights of the first.  Raises: BrokerError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = (
                f"`spacemoe up` runs on {self.fleet.root}"
                if self.fleet is not None
                else f"broker runs in {self.folder}"
            )
            raise BrokerError(f"another {what}: stop it first") from None
        except OSError as error:
            raise BrokerError(f"cannot write {self.folder}: {error.strerror}; choose another run folder") from error

    def _launch(self) -> None:
        """Raises: BrokerError."""
        try:
            # iotcore knows the format of its configuration by the suffix.
            config = self.folder / ("mosquitto.conf" if self.kind == "mosquitto" else "rumqttd.toml")
            config.write_text(self._config())
            log = open(self.folder / "broker.log", "ab")
        except OSError as error:
            raise BrokerError(f"cannot write {self.folder}: {error.strerror}; choose another run folder") from error
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "ground_station.broker", self.kind, str(config)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )

    def stop(self) -> None:
        """Stops the child (mosquitto saves its state first); leaves an external broker alone. Safe to call twice."""
        child, self._child = self._child, None
        if child is not None:
            child.stdin.close()
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                # The guard is the leader of its own session: this ends it and mosquitto together.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def restart(self) -> None:
        """Stops and starts again on the same port.  Raises: BrokerError."""
        if self.kind == "external":
            raise BrokerError(f"the broker at {self.host}:{self.port} is external; restart it where it runs")
        self.stop()
        self.start()

    def reload(self) -> None:
        """Makes mosquitto read the certificates and the revocation list again; who is connected stays.  Raises: BrokerError."""
        try:
            # not by way of the guard, which could be slow: what is asked of the broker next must come after this
            psutil.Process(self._child.pid).children()[0].send_signal(signal.SIGHUP)
        except (AttributeError, IndexError, psutil.Error):  # not started, or it ends just now
            text = f"no mosquitto runs on port {self.port} that could read its certificates again; restart it"
            raise BrokerError(text) from None

    def _config(self) -> str:
        if self.fleet is not None:
            from ground_station import broker_fleet

            return broker_fleet.prepare(self.fleet, self.port, self.bind, self.folder)
        return mosquitto_config(self.port, self.folder) if self.kind == "mosquitto" else embedded_config(self.port)

    def _tls(self) -> ssl.SSLContext | None:
        if self.fleet is None:
            return None
        from ground_station import broker_fleet

        try:
            return broker_fleet.client_context(*broker_fleet.ground_files(self.fleet))
        except (OSError, ValueError) as error:
            raise BrokerError(
                f"the ground station's certificate in {self.fleet.root} cannot be used ({error}): restore it from a backup"
            ) from None

    def __enter__(self) -> Broker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _refuse_taken_port(self) -> None:
        """A broker that already listens there would answer the readiness probe in our child's name."""
        with socket.socket(socket.AF_INET6 if ":" in self.bind else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.bind, self.port))
            except OSError as error:
                raise BrokerError(
                    f"port {self.port} cannot be used ({error.strerror}); "
                    + (
                        "does another `spacemoe up` run? stop it; a new fleet takes other ports by `fleet init --broker-port`"
                        if self.fleet is not None
                        else "choose another, or name the broker there as external"
                    )
                ) from error

    def _last_log_line(self) -> str:
        try:
            lines = (self.folder / "broker.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return (lines[-1][-200:] if lines else "it said nothing") + f" (see {self.folder / 'broker.log'})"


# ---------------------------------------------------------------- the guard, a process of its own


def _when_abandoned(action: Callable[[], object]) -> None:
    """Calls `action` once when standard input closes (the parent stopped us or died) or a SIGTERM comes."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        action()

    signal.signal(signal.SIGTERM, lambda *_: action())
    threading.Thread(target=watch, daemon=True).start()


def _die_with_guard() -> None:
    """In mosquitto's process before exec: SIGTERM when the guard goes, also when that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _guard_mosquitto(config: str) -> int:
    program = find_mosquitto()
    if program is None:
        print("mosquitto is gone", file=sys.stderr)
        return 1
    child = subprocess.Popen([program, "-c", config], stdin=subprocess.DEVNULL, preexec_fn=_die_with_guard)
    _when_abandoned(child.terminate)
    return child.wait()


def _guard_embedded(config: str) -> int:
    import iotcore

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    # rumqttd marks each packet it routes as an error record.
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
    # rumqttd cannot be shut down, and keeps nothing that an orderly end would save.
    _when_abandoned(lambda: os._exit(0))
    try:
        iotcore.IotCoreBroker(config_path=config).run_forever()
    except (OSError, RuntimeError, ValueError) as error:
        print(f"iotcore: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(_guard_mosquitto(sys.argv[2]) if sys.argv[1] == "mosquitto" else _guard_embedded(sys.argv[2]))
