"""Heat from outside that falls on a satellite: sun, sunlight from the Earth, the Earth's own infrared.

The Earth is a uniform sphere; its reflected sunlight goes with the cosine of the sun's zenith angle (no twilight). Leaves out
weather, the albedo's and the infrared's variation over the globe.
"""

from __future__ import annotations

import numpy as np

from firmware_sim.orbit import EARTH_RADIUS_KM

SOLAR_W_M2 = 1361.0
# Common engineering values for the whole Earth [U]: parameters, not facts.
ALBEDO = 0.30
EARTH_INFRARED_W_M2 = 237.0


def sphere_view_factor(radius_km: np.ndarray | float) -> np.ndarray:
    """Share of a small sphere's whole surface that sees the Earth, (1 - sqrt(1 - (R/r)^2)) / 2."""
    ratio = EARTH_RADIUS_KM / np.asarray(radius_km, float)
    return (1.0 - np.sqrt(1.0 - ratio * ratio)) / 2.0


def nadir_view_factor(radius_km: np.ndarray | float) -> np.ndarray:
    """The same of a plate that faces the Earth, (R/r)^2."""
    return (EARTH_RADIUS_KM / np.asarray(radius_km, float)) ** 2


def sunlight_w(absorbing_m2: float, lit_share: np.ndarray | float, flux_w_m2: float = SOLAR_W_M2) -> np.ndarray:
    """From the sun: absorptivity times the area that faces it."""
    return absorbing_m2 * flux_w_m2 * np.asarray(lit_share, float)


def albedo_w(
    absorbing_m2: float,
    view_factor: np.ndarray | float,
    cos_zenith: np.ndarray | float,
    flux_w_m2: float = SOLAR_W_M2,
    albedo: float = ALBEDO,
) -> np.ndarray:
    """Sunlight from the Earth: absorptivity times the whole area that `view_factor` is of."""
    return absorbing_m2 * albedo * flux_w_m2 * view_factor * np.maximum(0.0, cos_zenith)


def infrared_w(
    emitting_m2: float, view_factor: np.ndarray | float, earth_w_m2: float = EARTH_INFRARED_W_M2
) -> np.ndarray:
    """The Earth's infrared: emissivity (which is the absorptivity there) times area."""
    return emitting_m2 * earth_w_m2 * np.asarray(view_factor, float)
