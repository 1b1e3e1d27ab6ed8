"""When a satellite is in the Earth's shadow: a cylinder, and the cone with umbra and penumbra.

The Earth is a sphere without air; the limb is taken as straight across the sun's disc (less than 0.1 % of the disc).
Near the beta angle at which eclipses end the cone is the right one; elsewhere both agree to some seconds.
"""

from __future__ import annotations

import numpy as np

from firmware_sim.orbit import EARTH_RADIUS_KM
from firmware_sim.sun import AU_KM, SUN_RADIUS_KM


def in_cylinder(position_km: np.ndarray, sun: np.ndarray) -> np.ndarray:
    """Whether positions (..., 3) are in the cylinder behind the Earth; `sun` is the unit vector to it."""
    along = np.sum(position_km * sun, axis=-1)
    across_squared = np.sum(position_km**2, axis=-1) - along**2
    return (along < 0.0) & (across_squared < EARTH_RADIUS_KM**2)


def sun_radius_rad(distance_km: np.ndarray | float = AU_KM) -> np.ndarray:
    """Angular radius of the sun."""
    return np.arcsin(SUN_RADIUS_KM / np.asarray(distance_km, float))


def limb_rad(cos_zenith: np.ndarray, radius_km: np.ndarray | float) -> np.ndarray:
    """How far the sun's centre stands above the Earth's limb; `cos_zenith` of the angle between zenith and sun."""
    earth_rad = np.arcsin(EARTH_RADIUS_KM / np.asarray(radius_km, float))
    return np.pi - np.arccos(np.clip(cos_zenith, -1.0, 1.0)) - earth_rad


def lit_share(limb: np.ndarray, sun_radius: np.ndarray | float) -> np.ndarray:
    """Visible share of the sun's disc, 0 in the umbra to 1, from the height of its centre above a straight limb (rad)."""
    height = np.clip(limb / sun_radius, -1.0, 1.0)
    return 1.0 - (np.arccos(height) - height * np.sqrt(1.0 - height * height)) / np.pi


def lit_share_at(position_km: np.ndarray, sun: np.ndarray, sun_distance_km: float = AU_KM) -> np.ndarray:
    """Visible share of the sun's disc at positions (..., 3)."""
    radius_km = np.linalg.norm(position_km, axis=-1)
    cos_zenith = np.sum(position_km * sun, axis=-1) / radius_km
    return lit_share(limb_rad(cos_zenith, radius_km), sun_radius_rad(sun_distance_km))


def beta_limit_rad(altitude_km: np.ndarray | float) -> np.ndarray:
    """Beta angle from which a circular orbit has no eclipse any more (cylinder)."""
    return np.arcsin(EARTH_RADIUS_KM / (EARTH_RADIUS_KM + np.asarray(altitude_km, float)))


def eclipse_fraction(altitude_km: np.ndarray | float, beta: np.ndarray | float) -> np.ndarray:
    """Share of a circular orbit that lies in the cylinder, for the sun `beta` rad out of its plane."""
    altitude_km = np.asarray(altitude_km, float)
    chord = np.sqrt(altitude_km**2 + 2.0 * EARTH_RADIUS_KM * altitude_km)
    cosine = chord / ((EARTH_RADIUS_KM + altitude_km) * np.maximum(np.cos(beta), 1e-300))
    return np.arccos(np.minimum(cosine, 1.0)) / np.pi
