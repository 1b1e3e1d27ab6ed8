"""Where satellites are: circular orbits with J2's secular drift, and Walker patterns. Vectorised over satellites.

Leaves out eccentricity, drag and J2's short-period terms: against SGP4 the position is off by at most 18 km over one day.
For elements of a real satellite see tle.py. Frame: the Earth's true equator and mean equinox of date (TEME).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MU_KM3_S2 = 398600.4418
EARTH_RADIUS_KM = 6378.137
J2 = 1.08262668e-3
DAY_S = 86400.0
# One turn of the mean sun per tropical year: what a sun-synchronous node has to keep up with.
SUN_NODE_RATE_RAD_S = 2.0 * np.pi / (365.2421897 * DAY_S)


class OrbitError(ValueError):
    """An orbit or a constellation cannot be: the text says which value and what to give."""


@dataclass(frozen=True)
class Orbits:
    """Circular orbits of n satellites at time 0: each field an array of n, float64.

    `argument_rad` is the argument of latitude, the angle from the ascending node.
    """

    radius_km: np.ndarray
    inclination_rad: np.ndarray
    raan_rad: np.ndarray
    argument_rad: np.ndarray

    def __post_init__(self) -> None:
        fields = ("radius_km", "inclination_rad", "raan_rad", "argument_rad")
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(getattr(self, name), float)) for name in fields))
        for name, array in zip(fields, arrays):
            if array.ndim != 1 or not np.isfinite(array).all():
                raise OrbitError(f"{name} is not a row of finite numbers; give one number per satellite")
            object.__setattr__(self, name, np.ascontiguousarray(array))
        if self.radius_km.size and self.radius_km.min() <= EARTH_RADIUS_KM:
            low = self.radius_km.min()
            raise OrbitError(
                f"an orbit's radius of {low:g} km is inside the Earth; give more than {EARTH_RADIUS_KM} km"
            )

    def __len__(self) -> int:
        return self.radius_km.size


def mean_motion_rad_s(radius_km: np.ndarray | float) -> np.ndarray:
    """Kepler's angular rate of a circular orbit of `radius_km`."""
    return np.sqrt(MU_KM3_S2 / np.asarray(radius_km, float) ** 3)


def period_s(radius_km: np.ndarray | float) -> np.ndarray:
    """Kepler's period of a circular orbit."""
    return 2.0 * np.pi / mean_motion_rad_s(radius_km)


def radius_km_of_revs_per_day(revs_per_day: np.ndarray | float) -> np.ndarray:
    """Radius of the circular orbit with that many revolutions a day (Kepler)."""
    return np.cbrt(MU_KM3_S2 / (2.0 * np.pi * np.asarray(revs_per_day, float) / DAY_S) ** 2)


def raan_rate_rad_s(radius_km: np.ndarray | float, inclination_rad: np.ndarray | float, j2: float = J2) -> np.ndarray:
    """Drift of the ascending node by J2, -1.5 n J2 (R/a)^2 cos i."""
    ratio = (EARTH_RADIUS_KM / np.asarray(radius_km, float)) ** 2
    return -1.5 * mean_motion_rad_s(radius_km) * j2 * ratio * np.cos(inclination_rad)


def argument_rate_rad_s(
    radius_km: np.ndarray | float, inclination_rad: np.ndarray | float, j2: float = J2
) -> np.ndarray:
    """Rate of the argument of latitude, n [1 + 1.5 J2 (R/a)^2 (4 cos^2 i - 1)]: perigee and mean anomaly together."""
    ratio = (EARTH_RADIUS_KM / np.asarray(radius_km, float)) ** 2
    return mean_motion_rad_s(radius_km) * (1.0 + 1.5 * j2 * ratio * (4.0 * np.cos(inclination_rad) ** 2 - 1.0))


def sun_synchronous_inclination_deg(altitude_km: float) -> float:
    """Inclination at which the node follows the mean sun.  Raises: OrbitError where there is none."""
    radius_km = EARTH_RADIUS_KM + altitude_km
    cosine = SUN_NODE_RATE_RAD_S / float(raan_rate_rad_s(radius_km, 0.0))
    if not -1.0 <= cosine <= 0.0:
        raise OrbitError(f"no inclination is sun-synchronous at {altitude_km:g} km; give an altitude below 5975 km")
    return float(np.degrees(np.arccos(cosine)))


def angles_rad(orbits: Orbits, time_s: float, j2: float = J2) -> tuple[np.ndarray, np.ndarray]:
    """Node and argument of latitude `time_s` after time 0, each (n,)."""
    raan = orbits.raan_rad + raan_rate_rad_s(orbits.radius_km, orbits.inclination_rad, j2) * time_s
    argument = orbits.argument_rad + argument_rate_rad_s(orbits.radius_km, orbits.inclination_rad, j2) * time_s
    return raan, argument


def directions(orbits: Orbits, time_s: float, j2: float = J2) -> np.ndarray:
    """Unit vectors from the Earth's centre to the satellites, (3, n)."""
    raan, argument = angles_rad(orbits, time_s, j2)
    cos_u, sin_u = np.cos(argument), np.sin(argument)
    cos_o, sin_o = np.cos(raan), np.sin(raan)
    cos_i, sin_i = np.cos(orbits.inclination_rad), np.sin(orbits.inclination_rad)
    across = sin_u * cos_i
    return np.stack([cos_o * cos_u - sin_o * across, sin_o * cos_u + cos_o * across, sin_u * sin_i])


def positions_km(orbits: Orbits, time_s: float, j2: float = J2) -> np.ndarray:
    """Positions `time_s` after time 0, (n, 3), km, TEME."""
    return (directions(orbits, time_s, j2) * orbits.radius_km).T


def normals(orbits: Orbits, time_s: float = 0.0, j2: float = J2) -> np.ndarray:
    """Unit vectors along the orbits' angular momentum, (n, 3)."""
    raan, _ = angles_rad(orbits, time_s, j2)
    sin_i = np.sin(orbits.inclination_rad)
    return np.stack([np.sin(raan) * sin_i, -np.cos(raan) * sin_i, np.cos(orbits.inclination_rad)], axis=1)


def walker(
    kind: str,
    altitude_km: float,
    inclination_deg: float,
    planes: int,
    per_plane: int,
    phasing: int = 0,
    raan_deg: float = 0.0,
    argument_deg: float = 0.0,
) -> Orbits:
    """A Walker pattern i:t/p/f; satellite number = plane * per_plane + place in the plane.

    `kind` "delta" spreads the nodes over 360 degrees, "star" over 180. `phasing` f shifts each plane by 360 f / t degrees
    against the one before.  Raises: OrbitError.
    """
    if kind not in ("delta", "star"):
        raise OrbitError(f"{kind!r} is no Walker pattern; use delta or star")
    if planes < 1 or per_plane < 1:
        raise OrbitError(f"{planes} planes of {per_plane} satellites; give at least 1 of each")
    plane = np.repeat(np.arange(planes), per_plane)
    place = np.tile(np.arange(per_plane), planes)
    span_deg = 360.0 if kind == "delta" else 180.0
    phase_deg = 360.0 * phasing / (planes * per_plane)
    return Orbits(
        radius_km=np.full(plane.size, EARTH_RADIUS_KM + altitude_km),
        inclination_rad=np.full(plane.size, np.radians(inclination_deg)),
        raan_rad=np.radians(raan_deg + plane * span_deg / planes),
        argument_rad=np.radians(argument_deg + place * 360.0 / per_plane + plane * phase_deg),
    )
