"""The doctor's look at the clock: what on this machine contradicts it, and, where a time server is named, how far it is off.

Certificates, the stamps of telemetry and the time that boards get all come from it. Leaves out setting it.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from ground_station.doctor import Check, Setting

WRITTEN_UTC_S = 1_780_272_000.0  # 2026-06-01: this program is not older
PLAUSIBLE_S = 25 * 365.25 * 86_400.0  # nor does anybody run it so long after
SLACK_S = 120.0  # by which a file may be younger than now: a share's server has a clock of its own
MAX_OFFSET_S = 1.0
NTP_TIMEOUT_S = 3.0
NTP_UNIX_S = 2_208_988_800  # from 1900 to 1970, RFC 5905 figure 4
MAX_FILES = 2000
SET_BY_NETWORK = "sudo timedatectl set-ntp true"
SET_BY_HAND = "sudo date -u -s 'YYYY-MM-DD HH:MM:SS'"


def clock(setting: Setting) -> Iterator[Check]:
    now_utc_s = setting.now_utc_s()
    files = [
        Path(__file__).parent,
        *(path for path in (setting.fleet, setting.bundle, setting.state) if path is not None),
    ]
    why = implausible(now_utc_s, youngest(files))
    fix = f"{SET_BY_NETWORK}   # or, without the internet: {SET_BY_HAND}"
    if why:
        yield Check("clock", False, f"the clock says {_day(now_utc_s)}: {why}", fix)
    else:
        yield Check("clock", True, f"the clock says {_day(now_utc_s)}, and nothing here contradicts it")
    if (synchronized := timedatectl()) is not None:
        on, done = synchronized
        if on and not done:
            yield Check(
                "clock_sync", False, "a time service runs and has not set the clock", "timedatectl timesync-status"
            )
        else:
            yield Check("clock_sync", True, "a time service keeps the clock" if on else "no time service runs")
    if setting.ntp:
        yield asked(setting.ntp, setting.now_utc_s, fix)


def implausible(now_utc_s: float, youngest_file: tuple[float, Path] | None) -> str:
    """Why the time cannot be right, or empty."""
    if now_utc_s < WRITTEN_UTC_S:
        return f"this program was written after {_day(WRITTEN_UTC_S)}"
    if now_utc_s > WRITTEN_UTC_S + PLAUSIBLE_S:
        return f"that is over {PLAUSIBLE_S / (365.25 * 86_400):.0f} years after this program was written"
    if youngest_file is not None and youngest_file[0] > now_utc_s + SLACK_S:
        return f"{youngest_file[1]} was written at {_day(youngest_file[0])}"
    return ""


def youngest(folders: Iterable[Path]) -> tuple[float, Path] | None:
    """(time of writing, path) of the youngest among the first MAX_FILES files directly in `folders`."""
    found = None
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                for _, entry in zip(range(MAX_FILES), entries):
                    if entry.is_file(follow_symlinks=False):
                        each = (entry.stat(follow_symlinks=False).st_mtime, Path(entry.path))
                        found = each if found is None else max(found, each)
        except OSError:
            continue  # whether it is there is another check's question
    return found


def timedatectl() -> tuple[bool, bool] | None:
    """(a time service is on, the clock is synchronized) as systemd says it; None where there is no systemd to ask."""
    command = ["timedatectl", "show", "--property=NTP", "--property=NTPSynchronized"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    facts = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if done.returncode or not {"NTP", "NTPSynchronized"} <= facts.keys():
        return None
    return facts["NTP"] == "yes", facts["NTPSynchronized"] == "yes"


def asked(server: str, now_utc_s: Callable[[], float], fix: str) -> Check:
    """The clock against a time server's."""
    host, _, port = server.partition(":") if server.count(":") == 1 else (server, "", "")
    if port and not (port.isdecimal() and 0 < int(port) < 65_536):
        raise ValueError(f"--ntp {server[:80]!r} is not HOST or HOST:PORT")
    try:
        offset_s, delay_s = offset(host, int(port or 123), now_utc_s)
    except (OSError, ValueError) as error:
        return Check(
            "clock_offset", False, f"{host[:80]} did not tell the time ({error})", "name another by --ntp HOST"
        )
    ok = abs(offset_s) <= MAX_OFFSET_S + delay_s
    text = f"the clock is {abs(offset_s):.3f} s {'behind' if offset_s > 0 else 'ahead of'} {host[:80]}"
    return Check("clock_offset", ok, text, "" if ok else fix)


def offset(host: str, port: int, now_utc_s: Callable[[], float]) -> tuple[float, float]:
    """(seconds to add to this clock, seconds on the way) by one question of SNTP (RFC 4330).  Raises: OSError, ValueError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    cookie = secrets.token_bytes(8)  # of the transmit time, which the answer gives back: no other packet will do
    with socket.socket(family, kind) as link:
        link.settimeout(NTP_TIMEOUT_S)
        link.connect(address)
        began_s, sent_utc_s = time.monotonic(), now_utc_s()
        link.send(b"\x23" + bytes(39) + cookie)
        packet = link.recv(512)
        delay_s = time.monotonic() - began_s
    if len(packet) < 48 or packet[0] & 7 != 4 or packet[1] == 0 or packet[24:32] != cookie:
        raise ValueError("its answer is no time")
    received, sent = (_unix(packet[at : at + 8]) for at in (32, 40))
    return (received - sent_utc_s + sent - (sent_utc_s + delay_s)) / 2, delay_s


def _unix(stamp: bytes) -> float:
    """UTC seconds of an NTP stamp; its 32 bits of seconds are of the era from 1968 on."""
    seconds, fraction = struct.unpack("!II", stamp)
    era = 1 << 32 if seconds < 1 << 31 else 0  # RFC 4330, section 3
    return seconds + era - NTP_UNIX_S + fraction / 2**32


def _day(utc_s: float) -> str:
    try:
        return datetime.fromtimestamp(utc_s, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{utc_s:g} s"
