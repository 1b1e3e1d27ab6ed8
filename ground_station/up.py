"""`spacemoe up`: what a flashed fleet dials into (broker with mutual TLS and rights, enrolment, time), and what changes in the fleet.

The fleet folder is the one source of truth: `spacemoe fleet add|revoke|release` write there, and what runs here follows within a
quarter of a second. Leaves out: tokens (generate.py binds the data plane while it runs), and what mission control
is made of (mission_up.py).
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from ground_station import fleet_authority
from ground_station.allow_list import FleetWatch
from ground_station.broker import Broker
from ground_station.broker_rights import Rights
from ground_station.control import Control
from ground_station.enrol_server import EnrolServer
from ground_station.fleet import NodeState
from ground_station.fleet_records import CA_CERT, GROUND_CERT, GROUND_KEY, FleetFolder
from ground_station.node_record import NodeRecord
from ground_station.time_server import TimeServer, TimeServerError

if TYPE_CHECKING:  # a web server is loaded only where one is wanted
    from ground_station import generate, mission_up

LOOK_S = 0.25
MAX_TEXT = 300  # characters of what a node says about itself
REFRESH_S = 86_400.0
SETTLED_S = 2.0
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Options:
    """`bind`: the address to listen on; `time_port` 0: no time for boards; `watch` None: no mission control;
    `tokens`: how they are made for its API, None: they are not."""

    folder: Path
    bind: str = LOOPBACK
    time_port: int = 123
    watch: mission_up.Options | None = None
    tokens: generate.Options | None = None


@dataclass(frozen=True)
class Ground:
    """What runs."""

    folder: FleetFolder
    broker: Broker
    control: Control
    enrol: EnrolServer
    time: TimeServer | None
    watch: mission_up.Running | None


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def control_of(folder: FleetFolder, host: str, port: int, **listeners: Callable) -> Control:
    """The ground station's own client of the fleet's broker, with its certificate; not started."""
    tls = (folder.path(CA_CERT), folder.path(GROUND_CERT), folder.path(GROUND_KEY))
    return Control(folder.info.fleet, host, port, tls=tls, **listeners)


@contextmanager
def running(options: Options, say: Callable[[str], None]) -> Iterator[Ground]:
    """Everything that boards dial but the data plane; `say` gets a line for each part.

    Raises: FleetFolderError, BrokerError, ControlError, OSError for a port that cannot be had.
    """
    folder = FleetFolder.open(options.folder)
    for line in fleet_authority.refresh(folder):
        say(line)
    ports = folder.info.ports
    if line := reach(folder.info.hosts, options.bind):
        say(line)
    with ExitStack() as stack:
        broker = stack.enter_context(
            Broker(folder.path("run"), "mosquitto", ports.broker, fleet=folder, bind=options.bind)
        )
        say(f"broker: mosquitto with mutual TLS on {options.bind}:{broker.port}, rights per node")
        rights = stack.enter_context(Rights(folder, broker.host, broker.port))
        stack.enter_context(FleetWatch(folder, rights=rights, broker=broker))
        enrol = stack.enter_context(EnrolServer(folder, options.bind, ports.enrol))
        say(f"enrolment: https://{options.bind}:{enrol.port}")
        clock = None
        if options.time_port:
            try:
                clock = stack.enter_context(TimeServer(options.bind, options.time_port))
                say(f"time: UDP {options.bind}:{clock.port}")
            except TimeServerError as error:  # a board's clock is set forward by its pack: it lives without
                say(error.strerror)
        control = stack.enter_context(control_of(folder, broker.host, broker.port))
        watch = None
        if options.watch is not None:
            from ground_station import mission_up

            watch = stack.enter_context(mission_up.running(control, options.watch, say))
            say(f"mission control: {watch.served.url}")
            if options.tokens is not None:
                from ground_station import up_tokens

                stack.enter_context(up_tokens.Tokens(folder, options.tokens, control, watch.mission, watch.api, say))
        yield Ground(folder, broker, control, enrol, clock, watch)


def reach(hosts: tuple[str, ...], bind: str) -> str:
    """What to say where boards cannot reach what listens on `bind`; empty where they may."""
    if not is_loopback(bind) or any(map(is_loopback, hosts)):
        return ""
    return (
        f"caution: boards dial {hosts[0]}, and this listens on {bind} alone: say --bind {hosts[0]}, or 0.0.0.0 for every address "
        "of this machine"
    )


def record_changes(before: dict[str, NodeRecord], after: dict[str, NodeRecord]) -> list[str]:
    """A line for each node whose record changed its state, or that has a new certificate."""
    lines = []
    for name, record in sorted(after.items()):
        old = before.get(name)
        if old is not None and (old.state, old.serial) == (record.state, record.serial):
            continue
        until = f"{datetime.fromtimestamp(record.not_after_utc_s, timezone.utc):%Y-%m-%d}"
        why = f": {record.reason}" if record.reason else ""
        if record.state == "enrolled":
            what = "has enrolled" if old is None or not old.serial else "has a new certificate"
            lines.append(f"{name} {what}, until {until}")
        elif old is not None:
            lines.append(f"{name} is {record.state}{why}")
    return lines


def changes(before: dict[str, NodeState], after: dict[str, NodeState]) -> list[str]:
    """What a line is due for, between two looks at the fleet: nodes that came or went, events, alarms."""
    lines = []
    for name, state in sorted(after.items()):
        old = before.get(name, NodeState(name))
        if state.online != old.online:
            birth = state.birth
            what = (
                f"online: {birth.board[:MAX_TEXT]}, {len(birth.shards)} shards" if state.online and birth else "offline"
            )
            lines.append(f"{name} {what if state.online else 'offline'}")
        known = {(event.generated_at, event.kind, event.text) for event in old.events}
        for event in state.events:
            if (event.generated_at, event.kind, event.text) not in known and event.severity != "info":
                lines.append(f"{name} {event.severity}: {event.kind[:MAX_TEXT]}: {event.text[:MAX_TEXT]}")
    return lines


def follow(ground: Ground, say: Callable[[str], None], stop: Callable[[], bool] = lambda: False) -> None:
    """Says what changes, until `stop()` or an exception such as KeyboardInterrupt."""
    before: dict[str, NodeState] = {}
    version, records = ground.folder.version(), ground.folder.scan()[0]
    held: dict[str, tuple[int, float]] = {}  # node -> (shards, since when)
    said: dict[str, int] = {}
    due_s = time.monotonic() + REFRESH_S
    while not stop():
        if time.monotonic() > due_s:  # one that runs for months outlives its own certificate
            due_s = time.monotonic() + REFRESH_S
            for line in fleet_authority.refresh(ground.folder):
                say(line)
        if (now := ground.folder.version()) != version:
            version, now_records = now, ground.folder.scan()[0]
            for line in record_changes(records, now_records):
                say(line)
            records = now_records
        after = ground.control.snapshot()
        for line in changes(before, after):
            say(line)
        before, now_s = after, time.monotonic()
        for name, state in after.items():
            if state.birth is None:
                continue
            count = len(state.birth.shards)
            if held.get(name, (-1, 0.0))[0] != count:
                held[name] = (count, now_s)
                said.setdefault(name, count)  # "online" has just told it
            elif said[name] != count and now_s - held[name][1] > SETTLED_S:  # not one line for each of a hundred
                said[name] = count
                say(f"{name} holds {count} shards")
        time.sleep(LOOK_S)
