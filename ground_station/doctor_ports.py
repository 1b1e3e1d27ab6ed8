"""The doctor's look at the ports a ground station listens on: free, held by this kit, or held by whom.

A port is tried by binding it, on all addresses, and let go at once. Leaves out firewalls, and ports that boards listen on: none.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ground_station.doctor import Check

WEB_PORT, MQTT_PORT, TIME_PORT = 8642, 1883, 123
TIME_SERVICES = ("chronyd", "ntpd", "ntpsec", "systemd-timesyncd")
OURS = re.compile(r"(?:^|[/\s])(?:spacemoe|ground_station\.\w+)(?:\s|$)")


@dataclass(frozen=True)
class Wanted:
    """`name`: of the check; `other`: how to do with another port."""

    name: str
    port: int
    other: str
    udp: bool = False


@dataclass(frozen=True)
class Holder:
    """Who holds a port. `unit`: of systemd, or empty; `ours`: a process of this kit, or its child."""

    pid: int
    name: str
    unit: str
    ours: bool


def wanted(fleet: Path | None) -> list[Wanted]:
    """The ports of a ground station, and of the fleet in `fleet` where it can be read."""
    found = [Wanted("port_web", WEB_PORT, "--port N"), Wanted("port_mqtt", MQTT_PORT, "another broker")]
    if fleet is None:
        return found
    from ground_station import fleet_records

    try:
        ports = fleet_records.FleetFolder.open(fleet).info.ports
    except (ValueError, OSError):  # the fleet's own check says what is wrong with it
        ports = fleet_records.Ports()
    for name in ("broker", "enrol", "data", "delivery"):
        found.append(Wanted(f"port_{name}", getattr(ports, name), f"a new fleet with --{name}-port N"))
    return [*found, Wanted("port_time", TIME_PORT, "`spacemoe up --time-port 0`", udp=True)]


def ports(fleet: Path | None) -> Iterator[Check]:
    for each in wanted(fleet):
        yield look(each)


def look(each: Wanted) -> Check:
    kind = "UDP" if each.udp else "TCP"
    error = bind_error(each.port, each.udp)
    if error == 0:
        return Check(each.name, True, f"{kind} port {each.port} is free")
    if error in (errno.EACCES, errno.EPERM):
        text = f"{kind} port {each.port} is only for root here; or {each.other}"
        return Check(each.name, False, text, f"sudo sysctl -w net.ipv4.ip_unprivileged_port_start={each.port}")
    if error != errno.EADDRINUSE:
        return Check(each.name, False, f"{kind} port {each.port} cannot be had: {os.strerror(error)}", "ip address")
    holder = holder_of(each.port, each.udp)
    if holder is None:
        text = f"{kind} port {each.port} is held by another user's process; or {each.other}"
        return Check(each.name, False, text, f"sudo ss -{'u' if each.udp else 't'}lnp 'sport = :{each.port}'")
    said = f"{kind} port {each.port} is held by {holder.name} (process {holder.pid})"
    if holder.ours:
        return Check(each.name, True, f"{said}, of this kit")
    if each.udp and holder.name in TIME_SERVICES:
        return Check(each.name, True, f"{said}, which tells boards the time as well")
    stop = f"sudo systemctl stop {holder.unit}" if holder.unit else f"kill {holder.pid}"
    return Check(each.name, False, f"{said}; or {each.other}", stop)


def bind_error(port: int, udp: bool = False) -> int:
    """0, or the errno of binding it on all addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as probe:
        if not udp:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as those do who will listen: old connections do not count
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno or errno.EIO
    return 0


def holder_of(port: int, udp: bool) -> Holder | None:
    """Who listens there; None where that is not for this user to know."""
    try:
        links = psutil.net_connections("udp" if udp else "tcp")
    except (psutil.Error, OSError):
        return None
    for link in links:
        if link.pid and link.laddr and link.laddr.port == port and (udp or link.status == psutil.CONN_LISTEN):
            try:
                return _holder(psutil.Process(link.pid))
            except psutil.Error:
                continue
    return None


def _holder(process: psutil.Process) -> Holder:
    line = [process, *process.parents()[:3]]  # the kit's mosquitto is a child of its guard
    ours = any(OURS.search(" ".join(_arguments(each))) for each in line)
    return Holder(process.pid, process.name()[:40], _unit(process.pid), ours)


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()[:4]
    except psutil.Error:
        return []


def _unit(pid: int) -> str:
    """The systemd service that a process belongs to, or empty."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(errors="replace")[:4000]
    except OSError:
        return ""
    found = re.search(r"/system\.slice/([A-Za-z0-9@_.-]+\.service)", text)
    return found[1] if found else ""
