"""Orbits of real satellites: two-line elements through SGP4 (the `sgp4` library). Positions in TEME, km.

Leaves out fetching them, and covariances. A TLE is good for days, not for months: the caller decides how old is too old.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sgp4.api import SGP4_ERRORS, WGS72, Satrec, SatrecArray

from firmware_sim.orbit import MU_KM3_S2, OrbitError, Orbits

MAX_TLE_BYTES = 16 * 1024 * 1024
MAX_TLES = 100_000
MAX_STATES = 20_000_000
# SGP4 walks a resonant orbit in steps of half a day: a nonsense epoch would keep it busy for hours.
MAX_AGE_DAYS = 3653.0
_LINE_CHARS = 69
_J2000_JD = 2451545.0


class TleError(ValueError):
    """Two-line elements cannot be read or propagated; the text names the line or the satellite."""


@dataclass(frozen=True)
class Tles:
    """Satellites in the order of the file. `names` holds the title line, or the catalogue number where there is none."""

    names: tuple[str, ...]
    satellites: tuple[Satrec, ...]

    def __len__(self) -> int:
        return len(self.satellites)


def _checksum(line: str) -> int:
    return sum(int(char) if char.isdigit() else char == "-" for char in line[: _LINE_CHARS - 1]) % 10


def _element_line(line: str, number: int, where: str, checksums: bool) -> str:
    if len(line) < _LINE_CHARS or not line.isascii():
        raise TleError(f"{where} line {number} has {len(line)} characters; an element line has {_LINE_CHARS} (ASCII)")
    line = line[:_LINE_CHARS]
    if checksums and line[-1] != str(_checksum(line)):
        raise TleError(f"{where} line {number} ends in {line[-1]!r}, its checksum is {_checksum(line)}; copy it again")
    return line


def parse(text: str, where: str = "TLE", checksums: bool = True) -> Tles:
    """Satellites from two- or three-line elements; `#` starts a comment.  Raises: TleError."""
    if len(text) > MAX_TLE_BYTES:
        raise TleError(f"{where} has {len(text)} bytes; at most {MAX_TLE_BYTES}")
    names: list[str] = []
    satellites: list[Satrec] = []
    title, first = "", None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.rstrip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("1 ") and first is None:
            first = _element_line(line, number, where, checksums)
        elif line.startswith("2 ") and first is not None:
            second = _element_line(line, number, where, checksums)
            if first[2:7] != second[2:7]:
                raise TleError(
                    f"{where} line {number} is of satellite {second[2:7]!r}, the one before of {first[2:7]!r}"
                )
            if len(satellites) == MAX_TLES:
                raise TleError(f"{where} has more than {MAX_TLES} satellites; split the file")
            satellites.append(_satellite(first, second, number, where))
            names.append(title or first[2:7].strip())
            title, first = "", None
        elif first is None and not line.startswith("2 "):
            title = line[:100].removeprefix("0 ").strip()
        else:
            raise TleError(f"{where} line {number} is out of place; give line 1 and line 2 of each satellite in turn")
    if first is not None:
        raise TleError(f"{where} ends after line 1 of satellite {first[2:7]!r}; add its line 2")
    if not satellites:
        raise TleError(f"{where} has no two-line elements; give at least one satellite")
    return Tles(tuple(names), tuple(satellites))


def _satellite(first: str, second: str, number: int, where: str) -> Satrec:
    try:
        # Published elements are fitted with WGS72's constants: others make their positions worse.
        satellite = Satrec.twoline2rv(first, second, WGS72)
    except ValueError as error:
        raise TleError(f"{where} line {number}: {str(error).splitlines()[0][:200]}") from None
    numbers = (satellite.no_kozai, satellite.ecco, satellite.inclo, satellite.jdsatepoch, satellite.bstar)
    if not np.isfinite(numbers).all() or satellite.no_kozai <= 0.0:
        raise TleError(f"{where} line {number}: an element is no number, or the mean motion is zero; copy it again")
    if not (0.0 <= satellite.ecco < 1.0 and 1.0 <= satellite.epochdays < 367.0):
        raise TleError(
            f"{where} line {number}: eccentricity {satellite.ecco:g}, day {satellite.epochdays:g}; copy it again"
        )
    return satellite


def states_km(tles: Tles, j2000_days: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Positions (n, m, 3) in km and velocities (n, m, 3) in km/s at m times, TEME.

    `j2000_days`: UTC days since 2000-01-01 12:00.  Raises: TleError that names the first satellite SGP4 gives up on.
    """
    days = np.atleast_1d(np.asarray(j2000_days, float))
    if days.ndim != 1 or not np.isfinite(days).all() or days.size * len(tles) > MAX_STATES:
        raise TleError(
            f"{len(tles)} satellites at {days.size} times; give finite times, at most {MAX_STATES} states at once"
        )
    for name, satellite in zip(tles.names, tles.satellites):
        age_days = float(np.abs(days - epoch_j2000_days(satellite)).max(initial=0.0))
        if age_days > MAX_AGE_DAYS:
            raise TleError(f"satellite {name}: its elements are {age_days:.0f} days away; use some of that time")
    whole = np.floor(days)
    codes, position, velocity = SatrecArray(tles.satellites).sgp4(_J2000_JD + whole, days - whole)
    broken = codes.astype(bool) | ~np.isfinite(position).all(axis=-1)
    if broken.any():
        index = int(np.argmax(broken.any(axis=1)))
        code = int(codes[index][np.argmax(broken[index])])
        reason = SGP4_ERRORS.get(code, f"SGP4 gives no position (error {code})")
        raise TleError(f"satellite {tles.names[index]}: {reason}; use newer elements")
    return position, velocity


def epoch_j2000_days(satellite: Satrec) -> float:
    """When a satellite's elements hold, UTC days since 2000-01-01 12:00."""
    return (satellite.jdsatepoch - _J2000_JD) + satellite.jdsatepochF


def circular(tles: Tles, max_eccentricity: float = 0.01) -> Orbits:
    """The circular orbits nearest to near-circular elements, each at its own epoch (what J2 in orbit.py can carry on).

    Raises: OrbitError where an orbit is too eccentric for that.
    """
    for name, satellite in zip(tles.names, tles.satellites):
        if satellite.ecco > max_eccentricity:
            raise OrbitError(
                f"satellite {name} has eccentricity {satellite.ecco:.4f} > {max_eccentricity}; propagate its TLE"
            )
    # The radius comes from Brouwer's mean motion with our own constant, so that the mean motion is kept: it is what adds up.
    mean_motion_rad_s = np.array([s.xke * s.a**-1.5 for s in tles.satellites]) / 60.0
    rows = [(satellite.inclo, satellite.nodeo, satellite.argpo + satellite.mo) for satellite in tles.satellites]
    return Orbits(np.cbrt(MU_KM3_S2 / mean_motion_rad_s**2), *np.array(rows, float).T)
