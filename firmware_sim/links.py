"""Which satellites and ground stations see each other, how far apart they are, and what a radio link carries.

Leaves out pointing, acquisition, rain and protocols. Every link figure of this package is emulated, never measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from firmware_sim.orbit import EARTH_RADIUS_KM
from firmware_sim.sun import gmst_rad

LIGHT_KM_S = 299792.458
BOLTZMANN_DB = -228.5991672  # 10 lg k, dBW/K/Hz
# Below that height air bends and swallows an optical link.
CLEARANCE_KM = 80.0


class LinkError(ValueError):
    """A link or a ground station cannot be; the text says which value and what to give."""


@dataclass(frozen=True)
class Ellipsoid:
    """The Earth's figure."""

    radius_km: float
    flattening: float


WGS84 = Ellipsoid(6378.137, 1.0 / 298.257223563)
WGS72 = Ellipsoid(6378.135, 1.0 / 298.26)


def delay_s(distance_km: np.ndarray | float) -> np.ndarray:
    """One-way time of flight."""
    return np.asarray(distance_km, float) / LIGHT_KM_S


def line_of_sight(a_km: np.ndarray, b_km: np.ndarray, clearance_km: float = CLEARANCE_KM) -> np.ndarray:
    """Whether the segments from a to b, each (..., 3), stay above the Earth's radius plus `clearance_km`."""
    along = b_km - a_km
    squared = np.maximum(np.sum(along * along, axis=-1), 1e-12)
    share = np.clip(-np.sum(a_km * along, axis=-1) / squared, 0.0, 1.0)
    nearest = a_km + share[..., None] * along
    return np.sum(nearest * nearest, axis=-1) >= (EARTH_RADIUS_KM + clearance_km) ** 2


def longest_isl_km(altitude_km: np.ndarray | float, clearance_km: float = CLEARANCE_KM) -> np.ndarray:
    """Longest link between two satellites of the same altitude."""
    radius_km = EARTH_RADIUS_KM + np.asarray(altitude_km, float)
    return 2.0 * np.sqrt(radius_km**2 - (EARTH_RADIUS_KM + clearance_km) ** 2)


def in_plane_km(altitude_km: np.ndarray | float, per_plane: int) -> np.ndarray:
    """Distance of neighbours in a plane of evenly spread satellites."""
    return 2.0 * (EARTH_RADIUS_KM + np.asarray(altitude_km, float)) * np.sin(np.pi / per_plane)


def ground_km(
    latitude_deg: float, longitude_deg: float, height_km: float = 0.0, ellipsoid: Ellipsoid = WGS84
) -> np.ndarray:
    """A ground station in Earth-fixed axes, (3,), from geodetic coordinates.  Raises: LinkError."""
    if not (-90.0 <= latitude_deg <= 90.0 and -360.0 <= longitude_deg <= 360.0 and -1.0 <= height_km < 100.0):
        raise LinkError(
            f"no ground station can be at latitude {latitude_deg:g}, longitude {longitude_deg:g}, {height_km:g} km; "
            "give degrees north and east, and a height in km"
        )
    latitude, longitude = np.radians(latitude_deg), np.radians(longitude_deg)
    squared = ellipsoid.flattening * (2.0 - ellipsoid.flattening)
    curvature_km = ellipsoid.radius_km / np.sqrt(1.0 - squared * np.sin(latitude) ** 2)
    across_km = (curvature_km + height_km) * np.cos(latitude)
    return np.array(
        [
            across_km * np.cos(longitude),
            across_km * np.sin(longitude),
            (curvature_km * (1.0 - squared) + height_km) * np.sin(latitude),
        ]
    )


def ground_teme_km(fixed_km: np.ndarray, j2000_days: np.ndarray | float) -> np.ndarray:
    """Earth-fixed positions (..., 3) in TEME, where satellites are, at a time or one time each."""
    angle = gmst_rad(j2000_days)
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y, z = fixed_km[..., 0], fixed_km[..., 1], fixed_km[..., 2]
    return np.stack(np.broadcast_arrays(cosine * x - sine * y, sine * x + cosine * y, z), axis=-1)


def elevation_rad(station_km: np.ndarray, satellite_km: np.ndarray) -> np.ndarray:
    """How high satellites (..., 3) stand over a station's horizon (of the sphere: 0.2 degrees from the ellipsoid's at most)."""
    path = satellite_km - station_km
    up = station_km / np.linalg.norm(station_km, axis=-1, keepdims=True)
    return np.arcsin(np.clip(np.sum(path * up, axis=-1) / np.linalg.norm(path, axis=-1), -1.0, 1.0))


def longest_gsl_km(altitude_km: float, elevation_deg: float) -> float:
    """Distance of a satellite that stands at `elevation_deg` over a spherical Earth."""
    radius_km = EARTH_RADIUS_KM + altitude_km
    sine = np.sin(np.radians(elevation_deg))
    return float(np.sqrt(radius_km**2 - EARTH_RADIUS_KM**2 * (1.0 - sine * sine)) - EARTH_RADIUS_KM * sine)


def in_range(station_km: np.ndarray, satellites_km: np.ndarray, longest_km: float) -> tuple[np.ndarray, np.ndarray]:
    """Satellites (n, 3) that a station reaches: their numbers and distances."""
    distance_km = np.linalg.norm(satellites_km - station_km, axis=-1)
    numbers = np.flatnonzero(distance_km <= longest_km)
    return numbers, distance_km[numbers]


def path_loss_db(distance_km: np.ndarray | float, frequency_hz: float) -> np.ndarray:
    """Free-space path loss."""
    return 20.0 * np.log10(4.0 * np.pi * np.asarray(distance_km, float) * frequency_hz / LIGHT_KM_S)


def carrier_to_noise_dbhz(
    transmit_w: float,
    gains_dbi: float,
    losses_db: float,
    distance_km: np.ndarray | float,
    frequency_hz: float,
    noise_k: float,
) -> np.ndarray:
    """C/N0; `gains_dbi` of both antennas together, `losses_db` besides the path's."""
    received_dbw = 10.0 * np.log10(transmit_w) + gains_dbi - losses_db - path_loss_db(distance_km, frequency_hz)
    return received_dbw - 10.0 * np.log10(noise_k) - BOLTZMANN_DB


def shannon_bps(carrier_to_noise: np.ndarray | float, bandwidth_hz: float) -> np.ndarray:
    """The most that a channel of `bandwidth_hz` can carry at a C/N0 in dBHz."""
    return bandwidth_hz * np.log2(1.0 + 10.0 ** (np.asarray(carrier_to_noise, float) / 10.0) / bandwidth_hz)
