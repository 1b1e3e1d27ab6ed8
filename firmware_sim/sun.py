"""Where the sun is, how the Earth is turned, and the angle between sun and orbit plane.

The sun is of date (Astronomical Almanac, low precision; within 0.015 deg of ERFA from 1950 to 2050): dot it with TEME
vectors, not with GCRS (0.5 deg off by now). Leaves out polar motion and UT1 - UTC (below 1 s, 0.5 km on the ground).
"""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np

AU_KM = 149597870.7
SUN_RADIUS_KM = 695700.0
_J2000 = datetime(2000, 1, 1, 12, tzinfo=timezone.utc)


def j2000_days(instant: datetime) -> float:
    """Days since 2000-01-01 12:00, on the time scale of `instant` (UTC throughout this package)."""
    elapsed = instant - _J2000
    return elapsed.days + (elapsed.seconds + elapsed.microseconds * 1e-6) / 86400.0


def ecliptic(days: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Apparent longitude (rad), obliquity (rad) and distance (km) of the sun `days` after J2000."""
    days = np.asarray(days, float)
    anomaly = np.radians(357.528 + 0.9856003 * days)
    longitude = np.radians(280.460 + 0.9856474 * days + 1.915 * np.sin(anomaly) + 0.020 * np.sin(2.0 * anomaly))
    obliquity = np.radians(23.439 - 4.0e-7 * days)
    distance = AU_KM * (1.00014 - 0.01671 * np.cos(anomaly) - 0.00014 * np.cos(2.0 * anomaly))
    return longitude, obliquity, distance


def direction(days: np.ndarray | float) -> np.ndarray:
    """Unit vector to the sun, equator and equinox of date, (..., 3).  Source: Astronomical Almanac, section C."""
    longitude, obliquity, _ = ecliptic(days)
    sine = np.sin(longitude)
    return np.stack([np.cos(longitude), np.cos(obliquity) * sine, np.sin(obliquity) * sine], axis=-1)


def distance_km(days: np.ndarray | float) -> np.ndarray:
    """Distance of the sun from the Earth's centre."""
    return ecliptic(days)[2]


def flux_w_m2(days: np.ndarray | float, at_1_au_w_m2: float = 1361.0) -> np.ndarray:
    """Solar flux at the Earth; 1361 W/m2 at 1 au (Kopp and Lean 2011)."""
    return at_1_au_w_m2 * (AU_KM / distance_km(days)) ** 2


def beta_rad(normals: np.ndarray, sun: np.ndarray) -> np.ndarray:
    """Elevation of the sun above orbit planes with unit normals (..., 3); both vectors of date."""
    return np.arcsin(np.clip(np.sum(normals * sun, axis=-1), -1.0, 1.0))


def gmst_rad(days: np.ndarray | float) -> np.ndarray:
    """Greenwich mean sidereal time (IAU 1982), 0 to 2 pi, `days` of UT1 after J2000: turns TEME into Earth-fixed axes."""
    days = np.asarray(days, float)
    century = days / 36525.0
    seconds = 67310.54841 + (876600.0 * 3600.0 + 8640184.812866) * century + (0.093104 - 6.2e-6 * century) * century**2
    return np.radians(seconds / 240.0) % (2.0 * np.pi)
