"""The sun against ERFA, eclipses against hand-calculated fractions and the geometry of two discs."""

from __future__ import annotations

import importlib.util
from datetime import datetime, timezone

import numpy as np
import pytest
from conftest import lacking

from firmware_sim import eclipse, orbit, sun

RADIUS_KM = orbit.EARTH_RADIUS_KM + 550.0


def erfa_sun(days: np.ndarray, frame: str) -> np.ndarray:
    """Apparent direction of the sun by ERFA, (m, 3): `date` true equator and equinox of date, `gcrs` not turned."""
    if importlib.util.find_spec("erfa") is None:
        lacking("pyerfa", "pip install -c constraints.txt -e .[dev]")
    import erfa

    # Our argument is UTC. TT - UT went from 29 s in 1950 to 69 s in 2025 and has stayed there; a straight line is within 12 s.
    terrestrial = 2451545.0 + days + (29.0 + np.clip((days + 18262.5) / 27394.0, 0.0, 1.0) * 40.0) / 86400.0
    heliocentric, barycentric = erfa.epv00(terrestrial, 0.0)
    unit = -heliocentric["p"] / np.linalg.norm(heliocentric["p"], axis=1)[:, None]
    velocity = barycentric["v"] / 173.1446327
    lorentz = np.sqrt(1.0 - np.sum(velocity * velocity, axis=1))
    apparent = erfa.ab(unit, velocity, np.linalg.norm(heliocentric["p"], axis=1), lorentz)
    return apparent if frame == "gcrs" else np.einsum("nij,nj->ni", erfa.pnm06a(terrestrial, 0.0), apparent)


def degrees_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), np.sum(a * b, axis=-1)))


def test_sun_within_0_0142_degrees_of_erfa_for_a_century():
    # 1950 to 2050, every third day: the error's fast parts have periods of a month and of half a year
    days = np.arange(-18262.5, 18262.5, 3.0)
    assert degrees_between(sun.direction(days), erfa_sun(days, "date")).max() <= 0.0142


def test_a_gcrs_sun_is_half_a_degree_off():
    """Control: the frame matters. 0.49 degrees at most in 2025-2035."""
    days = np.arange(9132.0, 13149.0, 1.0)
    off = degrees_between(sun.direction(days), erfa_sun(days, "gcrs"))
    assert off.max() == pytest.approx(0.49, abs=0.02)


def test_sidereal_time_is_the_reference_implementations():
    from sgp4.propagation import gstime

    days = np.linspace(-18262.5, 18262.5, 999)
    ours = sun.gmst_rad(days)
    theirs = np.array([gstime(2451545.0 + day) for day in days])
    assert np.abs(np.angle(np.exp(1j * (ours - theirs)))).max() < 1e-8


def test_days_since_j2000():
    assert sun.j2000_days(datetime(2000, 1, 1, 12, tzinfo=timezone.utc)) == 0.0
    assert sun.j2000_days(datetime(2008, 9, 20, 12, 25, 40, 104192, tzinfo=timezone.utc)) == pytest.approx(
        2454730.01782528 - 2451545.0, abs=1e-8
    )


def test_beta_by_hand():
    """sin beta = cos l sin O sin i - sin l cos e cos O sin i + sin l sin e cos i: i 51.6, O 100, l 200, e 23.439."""
    inclination, node, longitude, obliquity = np.radians([51.6, 100.0, 200.0, 23.439])
    orbits = orbit.Orbits(RADIUS_KM, inclination, node, 0.0)
    across = np.sin(longitude)
    direction = np.array([np.cos(longitude), np.cos(obliquity) * across, np.sin(obliquity) * across])
    beta = np.degrees(sun.beta_rad(orbit.normals(orbits), direction))
    assert beta[0] == pytest.approx(-58.479321, abs=1e-6)


@pytest.mark.parametrize(
    "altitude_km, fraction, minutes, limit_deg",
    [
        (400, 0.390100, 36.108, 70.218),
        (420, 0.387525, 36.028, 69.754),
        (550, 0.372311, 35.611, 67.016),
        (600, 0.367036, 35.488, 66.067),
    ],
)
def test_eclipse_of_a_circular_orbit(altitude_km, fraction, minutes, limit_deg):
    assert eclipse.eclipse_fraction(altitude_km, 0.0) == pytest.approx(fraction, abs=5e-7)
    period_s = orbit.period_s(orbit.EARTH_RADIUS_KM + altitude_km)
    assert eclipse.eclipse_fraction(altitude_km, 0.0) * period_s / 60.0 == pytest.approx(minutes, abs=5e-4)
    assert np.degrees(eclipse.beta_limit_rad(altitude_km)) == pytest.approx(limit_deg, abs=5e-4)
    assert eclipse.eclipse_fraction(altitude_km, np.radians(limit_deg + 0.001)) == 0.0
    assert eclipse.eclipse_fraction(altitude_km, np.radians(limit_deg - 0.001)) > 0.0


@pytest.mark.parametrize("beta_deg, fraction", [(30, 0.351110), (45, 0.313783), (60, 0.214735), (65, 0.124948)])
def test_eclipse_fraction_with_beta(beta_deg, fraction):
    assert eclipse.eclipse_fraction(550.0, np.radians(beta_deg)) == pytest.approx(fraction, abs=5e-7)
    assert eclipse.eclipse_fraction(550.0, np.radians(-beta_deg)) == pytest.approx(fraction, abs=5e-7)


def circle(beta_deg: float, points: int = 2_000_000) -> tuple[np.ndarray, np.ndarray]:
    """Positions (m, 3) along an orbit at 550 km, and the sun's direction `beta_deg` out of its plane."""
    around = np.arange(points) * (2.0 * np.pi / points)
    beta = np.radians(beta_deg)
    positions = RADIUS_KM * np.stack([np.cos(around), np.sin(around), np.zeros(points)], axis=1)
    return positions, np.array([np.cos(beta), 0.0, np.sin(beta)])


@pytest.mark.parametrize("beta_deg", [0.0, 30.0, 65.0])
def test_cylinder_has_the_closed_forms_share_of_the_orbit(beta_deg):
    positions, direction = circle(beta_deg)
    share = eclipse.in_cylinder(positions, direction).mean()
    assert share == pytest.approx(eclipse.eclipse_fraction(550.0, np.radians(beta_deg)), abs=2e-6)


def test_umbra_and_penumbra_at_550_km():
    """35.471 min of umbra and 8.49 s of penumbra each side (with the sun at 1 au; 35.470 and 8.495 here)."""
    positions, direction = circle(0.0)
    lit = eclipse.lit_share_at(positions, direction)
    period_s = float(orbit.period_s(RADIUS_KM))
    assert (lit <= 0.0).mean() * period_s / 60.0 == pytest.approx(35.471, abs=0.0015)
    assert ((lit > 0.0) & (lit < 1.0)).mean() * period_s / 2.0 == pytest.approx(8.49, abs=0.01)
    # the penumbra lies half in and half out of the cylinder
    assert 1.0 - lit.mean() == pytest.approx(float(eclipse.eclipse_fraction(550.0, 0.0)), abs=2e-6)


def test_the_cone_sees_a_partial_eclipse_where_the_cylinder_sees_none():
    limit = float(np.degrees(eclipse.beta_limit_rad(550.0)))
    positions, direction = circle(limit + 0.1, 20_000)
    assert not eclipse.in_cylinder(positions, direction).any()
    lit = eclipse.lit_share_at(positions, direction)
    assert 0.0 < lit.min() < 0.9
    positions, direction = circle(limit + 0.5, 20_000)
    assert eclipse.lit_share_at(positions, direction).min() == 1.0


def test_lit_share_against_the_area_of_two_discs():
    """Montenbruck and Gill, Satellite Orbits, 3.4.2: overlap of two discs, here with the Earth's limb as curved as it looks."""
    sun_rad = float(eclipse.sun_radius_rad())
    earth = np.tan(np.arcsin(orbit.EARTH_RADIUS_KM / RADIUS_KM))
    for height in np.linspace(-0.99, 0.99, 41) * sun_rad:
        apart = earth + height
        x = (apart**2 + sun_rad**2 - earth**2) / (2.0 * apart)
        y = np.sqrt(sun_rad**2 - x**2)
        hidden = sun_rad**2 * np.arccos(x / sun_rad) + earth**2 * np.arccos((apart - x) / earth) - apart * y
        assert float(eclipse.lit_share(height, sun_rad)) == pytest.approx(1.0 - hidden / (np.pi * sun_rad**2), abs=1e-3)
