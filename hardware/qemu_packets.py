"""Who a machine spoke to: reads QEMU's packet file (pcap) and names every packet that went anywhere but to the ground station.

Set aside, and counted: DHCP, ARP, IPv6 neighbour discovery, and the multicast listener reports that neighbour discovery
requires (RFC 4861, 7.2.1; RFC 4862, 5.4.2: a node joins its solicited-node group before it speaks).
Leaves out: what is in the packets, other link types than Ethernet, pcapng.

Source: draft-ietf-opsawg-pcap (file format), RFC 791, 8200, 4443, 4861, 2710, 3810, 2131, 8415.
"""

from __future__ import annotations

import ipaddress
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

MAX_PACKET_BYTES = 256 * 1024
SLIRP_MAC = b"\x52\x55"
"""The addresses of QEMU's own network begin so; all others are the machine's."""
_NEIGHBOUR = {
    133: "router solicitation",
    134: "router advertisement",
    135: "neighbour solicitation",
    136: "neighbour advertisement",
}
_LISTENER = {130, 131, 132, 143}
_OPTIONS = {0, 43, 60}


class PacketError(ValueError):
    """A packet file cannot be read."""


@dataclass(frozen=True)
class Packet:
    """One that the machine sent. `kind`: ground, dhcp, arp, neighbour, listener or other."""

    time_s: float
    kind: str
    text: str


def read(path: Path, ground: str) -> list[Packet]:
    """Every packet that the machine sent.  Raises: PacketError, OSError."""
    station = ipaddress.ip_address(ground)
    return [Packet(at, *classify(frame, station)) for at, frame in _frames(path) if frame[6:8] != SLIRP_MAC]


def summary(packets: list[Packet]) -> dict:
    """Counts by kind, seconds between first and last, and the text of each that should not be, with how often."""
    other = Counter(each.text for each in packets if each.kind == "other")
    seconds = packets[-1].time_s - packets[0].time_s if packets else 0.0
    return {
        "packets": len(packets),
        "seconds": round(seconds, 1),
        "kinds": dict(Counter(each.kind for each in packets)),
        "elsewhere": dict(other),
    }


def _frames(path: Path) -> Iterator[tuple[float, bytes]]:
    with open(path, "rb") as file:
        head = file.read(24)
        if len(head) < 24 or head[:4] not in (b"\xd4\xc3\xb2\xa1", b"\xa1\xb2\xc3\xd4"):
            raise PacketError(f"{path} is no pcap file")
        order = "<" if head[:4] == b"\xd4\xc3\xb2\xa1" else ">"
        if struct.unpack(order + "I", head[20:24])[0] != 1:
            raise PacketError(f"{path} holds no Ethernet frames")
        while len(record := file.read(16)) == 16:
            seconds, micros, length, _ = struct.unpack(order + "IIII", record)
            if length > MAX_PACKET_BYTES:
                raise PacketError(f"{path} has a packet of {length} bytes, more than {MAX_PACKET_BYTES}")
            frame = file.read(length)
            if len(frame) < length:
                return  # power was cut while it was written
            if length >= 14:
                yield seconds + micros / 1e6, frame


def classify(frame: bytes, ground: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[str, str]:
    """(kind, text) of an Ethernet frame."""
    kind = int.from_bytes(frame[12:14], "big")
    data = frame[14:]
    if kind == 0x0806:
        return "arp", "ARP"
    if kind == 0x0800 and len(data) >= 20:
        return _version_4(data, ground)
    if kind == 0x86DD and len(data) >= 40:
        return _version_6(data, ground)
    return "other", f"EtherType {kind:#06x} to {frame[:6].hex(':')}"


def _version_4(data: bytes, ground) -> tuple[str, str]:
    head, protocol = (data[0] & 15) * 4, data[9]
    target = ipaddress.ip_address(data[16:20])
    source_port, target_port = _ports(protocol, data[head:])
    text = f"IPv4 protocol {protocol} to {target}" + (f" port {target_port}" if target_port else "")
    if protocol == 17 and (source_port, target_port) == (68, 67):
        return "dhcp", text
    return ("ground" if target == ground else "other"), text


def _version_6(data: bytes, ground) -> tuple[str, str]:
    following, at = data[6], 40
    target = ipaddress.ip_address(data[24:40])
    while following in _OPTIONS and len(data) >= at + 8:
        following, at = data[at], at + 8 + data[at + 1] * 8
    source_port, target_port = _ports(following, data[at:])
    text = f"IPv6 protocol {following} to {target}" + (f" port {target_port}" if target_port else "")
    if following == 58 and len(data) > at:
        if data[at] in _NEIGHBOUR:
            return "neighbour", _NEIGHBOUR[data[at]]
        if data[at] in _LISTENER:
            return "listener", "multicast listener report"
        text += f" ICMPv6 type {data[at]}"
    if following == 17 and (source_port, target_port) == (546, 547):
        return "dhcp", text
    return ("ground" if target == ground else "other"), text


def _ports(protocol: int, data: bytes) -> tuple[int, int]:
    if protocol not in (6, 17) or len(data) < 4:
        return 0, 0
    return struct.unpack(">HH", data[:4])
