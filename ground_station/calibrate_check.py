"""`spacemoe calibrate --dry-run`: is what would be calibrated there? Reads what the broker retains, and publishes nothing.

Leaves out what only telemetry shows: whether the board rests, and whether its power rises. `calibrate` says that before it goes on.
"""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt import MQTTException

from ground_station.broker_fleet import use_certificates
from ground_station.calibrate import reachable
from ground_station.fleet_access import Tls
from ground_station.local_fleet import check_profile
from ground_station.power_step import CalibrateError
from node_agent import shard, wire
from node_agent.mqtt_mend import Mended

LOOK_S = 3.0
MAX_NODES = 1000
SHOWN = 8


def simulated_board(profile: str, bundle: Path) -> str:
    """What would be started, in one line.  Raises: local_fleet.ProfileError, shard.BundleError."""
    check_profile(profile)
    manifest = shard.read_manifest(bundle)
    return f"a simulated {profile} would be started beside a broker of its own, with experts of {manifest.name}"


def node(wanted: str, fleet: str, host: str, port: int, tls: Tls | None = None) -> str:
    """What the broker retains of the node `wanted`, in one line.  Raises: CalibrateError, wire.WireError."""
    wire.check_id(wanted)
    topics = wire.Topics(fleet)
    reachable(host, port, tls)
    births, statuses = _retained(topics, wanted, host, port, tls)
    birth, status = births.get(wanted), statuses.get(wanted)
    if birth is None:
        others = ", ".join(sorted(births)[:SHOWN])
        there = f"there are {others}" if others else "there is none at all: check --fleet, and start the node's agent"
        raise CalibrateError(f"no node {wanted} in fleet {fleet} within {LOOK_S:g} s; {there}")
    if status is None or status.status != "online" or status.bd_seq != birth.bd_seq:
        raise CalibrateError(f"{wanted} is known but not online: start its agent, then calibrate again")
    units = [sensor.unit for sensor in birth.sensors]
    if "degC" not in units:
        raise CalibrateError(f"{wanted} has no temperature sensor: see `node-agent sensors` on the board")
    if not {"W", "J"} & set(units):
        raise CalibrateError(f"{wanted} has no power sensor: attach one (an INA226 in its supply)")
    power = units.count("W") + units.count("J")
    return f"{wanted} is online: {birth.board}, {units.count('degC')} temperatures and {power} power or energy readings"


class _Client(Mended, mqtt.Client):
    """paho's client, which lives on after a message that it cannot decode."""

    decode_errors = (MQTTException,)


def _retained(
    topics: wire.Topics, wanted: str, host: str, port: int, tls: Tls | None
) -> tuple[dict[str, wire.Birth], dict[str, wire.Status]]:
    """Births and status of the nodes, until those of `wanted` are there or the time is over."""
    births: dict[str, wire.Birth] = {}
    statuses: dict[str, wire.Status] = {}
    changed = threading.Condition()

    def take(_client: mqtt.Client, _userdata: object, message: mqtt.MQTTMessage) -> None:
        try:
            name, leaf = topics.parse_node(message.topic)
            known, kind = {"birth": (births, wire.Birth), "status": (statuses, wire.Status)}[leaf]
            got = wire.decode(kind, message.payload)
        except (wire.WireError, KeyError):
            return
        with changed:
            if len(known) < MAX_NODES or name == wanted:
                known[name] = got
            changed.notify_all()

    client = _Client(mqtt.CallbackAPIVersion.VERSION2, client_id=f"look-{secrets.token_hex(4)}", protocol=mqtt.MQTTv5)
    if tls is not None:
        use_certificates(client, *tls)
    client.unreadable = lambda error: None
    client.on_message = take
    client.on_connect = lambda *_: client.subscribe([(topics.birth("+"), 1), (topics.status("+"), 1)])
    client.connect_async(host, port, keepalive=10, clean_start=True)
    client.loop_start()
    try:
        with changed:
            changed.wait_for(lambda: wanted in births and wanted in statuses, LOOK_S)
            return dict(births), dict(statuses)
    finally:
        client.disconnect()
        client.loop_stop()
