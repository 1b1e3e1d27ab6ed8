"""Temperatures against closed forms, hand-calculated equilibria, and scipy's Radau integrator."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from firmware_sim import bus, environment, orbit, thermal
from firmware_sim.thermal import SIGMA_W_M2_K4, Network, ThermalError

RADIUS_KM = orbit.EARTH_RADIUS_KM + 550.0
ONE = Network((3000.0,), (0.119,))


def test_view_factors_at_550_km():
    assert environment.sphere_view_factor(RADIUS_KM) == pytest.approx(0.304763, abs=5e-7)
    assert environment.nadir_view_factor(RADIUS_KM) == pytest.approx(0.847529, abs=5e-7)


def test_cooling_to_deep_space():
    """T(t) = (T0^-3 + 3 eps A sigma t / C)^(-1/3): 253.577992 K after an hour."""
    closed = (300.0**-3 + 3.0 * 0.119 * SIGMA_W_M2_K4 * 3600.0 / 3000.0) ** (-1.0 / 3.0)
    assert closed == pytest.approx(253.577992, abs=5e-7)
    ours = thermal.advance(ONE, np.array([300.0]), np.array([0.0]), 3600.0)[0]
    assert ours == pytest.approx(closed, abs=1e-6)
    # control: one Euler step per 10 s misses it
    temp_k = 300.0
    for _ in range(360):
        temp_k -= 10.0 / 3000.0 * 0.119 * SIGMA_W_M2_K4 * temp_k**4
    assert abs(temp_k - closed) > 1e-3


def test_heating_to_equilibrium():
    """From 250 to 280 K with an equilibrium of 290 K takes 7078.21 s."""
    heat_w = np.array([0.119 * SIGMA_W_M2_K4 * 290.0**4])
    assert thermal.equilibrium_k(heat_w, 0.119)[0] == pytest.approx(290.0)
    after = thermal.advance(ONE, np.array([250.0]), heat_w, 7078.21)[0]
    assert after == pytest.approx(280.0, abs=2e-5)
    assert abs(thermal.advance(ONE, np.array([250.0]), heat_w, 7078.21 + 1.0)[0] - 280.0) > 1e-3, (
        "control: a second more"
    )


@pytest.mark.parametrize(
    "absorbing_m2, radiating_m2, temp_k",
    [(0.25, 1.0, 278.321), (1.0, 1.0, 393.606), (1.0, 2.0, 330.982)],
    ids=["sphere", "plate, one side", "plate, both sides"],
)
def test_equilibria_in_deep_space(absorbing_m2, radiating_m2, temp_k):
    """Absorptivity equal to emissivity, 1361 W/m2."""
    heat_w = environment.sunlight_w(absorbing_m2, 1.0)
    assert thermal.equilibrium_k(heat_w, radiating_m2) == pytest.approx(temp_k, abs=5e-4)


@pytest.mark.parametrize(
    "lit, cos_zenith, temp_k",
    [(1.0, 1.0, 315.838), (1.0, 0.0, 295.523), (0.0, -1.0, 188.919)],
    ids=["subsolar", "no albedo", "eclipse"],
)
def test_equilibria_of_a_sphere_at_550_km(lit, cos_zenith, temp_k):
    """Absorptivity 0.9, emissivity 0.85."""
    view = environment.sphere_view_factor(RADIUS_KM)
    heat_w = (
        environment.sunlight_w(0.9 / 4.0, lit)
        + environment.albedo_w(0.9, view, cos_zenith)
        + environment.infrared_w(0.85, view)
    )
    assert thermal.equilibrium_k(heat_w, 0.85) == pytest.approx(temp_k, abs=5e-4)


def test_radiator():
    """At 313.15 K with emissivity 0.85 it sheds 463.49 W/m2; 20 W need 0.0432 m2."""
    shed = -thermal.net_heat_w(Network((1.0,), (0.85,)), np.array([313.15]), np.array([0.0]))[0]
    assert shed == pytest.approx(463.49, abs=0.005)
    assert 20.0 / shed == pytest.approx(0.0432, abs=5e-5)
    assert thermal.equilibrium_k(20.0, 0.85 * 0.0432) == pytest.approx(313.15, abs=0.1)


def radau(network: Network, temp_k: np.ndarray, heat_w: np.ndarray, span_s: float) -> np.ndarray:
    """scipy's implicit Runge-Kutta with tight tolerances; the right-hand side is written out again here."""
    capacity = np.array(network.capacity_j_per_k)
    laplace = np.zeros((capacity.size, capacity.size))
    for a, b, conductance in network.links:
        laplace[[a, b], [a, b]] -= conductance
        laplace[[a, b], [b, a]] += conductance

    def slope(_: float, temp: np.ndarray) -> np.ndarray:
        return (heat_w - np.array(network.radiating_m2) * SIGMA_W_M2_K4 * temp**4 + laplace @ temp) / capacity

    return solve_ivp(slope, (0.0, span_s), temp_k, method="Radau", rtol=1e-11, atol=1e-11).y[:, -1]


@pytest.mark.parametrize("name", bus.BUSES)
def test_every_bus_against_radau(name):
    network = bus.BUSES[name].network(40.0)
    start_k, heat_w = np.array([330.0, 280.0, 300.0, 290.0]), np.array([80.0, 60.0, 18.0, 0.5])
    ours = thermal.advance(network, start_k, heat_w, 3600.0)
    np.testing.assert_allclose(ours, radau(network, start_k, heat_w, 3600.0), rtol=0, atol=1e-5)


def test_a_fast_die_needs_the_implicit_step():
    """A die of 4 J/K behind 2 W/K (2 s) on a slow plate, in steps of 10 s."""
    network = Network((4.0, 5000.0), (0.0, 0.2), ((0, 1, 2.0),))
    start_k, heat_w = np.array([290.0, 290.0]), np.array([20.0, 10.0])
    assert thermal.fastest_s(network, start_k) == pytest.approx(2.0, rel=1e-3)
    exact = radau(network, start_k, heat_w, 1800.0)
    ours = thermal.advance(network, start_k, heat_w, 1800.0)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=0.01)
    assert ours[0] - ours[1] == pytest.approx(10.0, abs=0.02)  # 20 W over 2 W/K
    # control: the explicit step explodes
    temp_k = start_k
    with np.errstate(all="ignore"):
        for _ in range(180):
            temp_k = thermal.rk4_step(network, temp_k, heat_w, 10.0)
    assert not np.abs(temp_k - exact).max() < 100.0


def test_the_implicit_step_is_of_second_order():
    network = Network((40.0, 500.0), (0.01, 0.05), ((0, 1, 1.0),))
    start_k, heat_w = np.array([350.0, 280.0]), np.array([5.0, 3.0])
    exact = radau(network, start_k, heat_w, 64.0)

    def error_k(step_s: float) -> float:
        temp_k = start_k
        for _ in range(int(64.0 / step_s)):
            temp_k = thermal.implicit_step(network, temp_k, heat_w, step_s)
        return float(np.abs(temp_k - exact).max())

    assert error_k(1.0) / error_k(0.5) == pytest.approx(4.0, abs=0.6)


def test_conduction_keeps_the_heat():
    network = Network((10.0, 20.0, 30.0), (0.0, 0.0, 0.0), ((0, 1, 0.3), (1, 2, 0.7)))
    start_k = np.array([[300.0, 310.0], [280.0, 250.0], [350.0, 260.0]])
    after = thermal.advance(network, start_k, np.zeros((3, 2)), 500.0)
    capacity = np.array([10.0, 20.0, 30.0])
    np.testing.assert_allclose(capacity @ after, capacity @ start_k, rtol=1e-12)
    single = thermal.advance(network, start_k[:, 1], np.zeros(3), 500.0)
    np.testing.assert_allclose(after[:, 1], single, rtol=1e-12)


def test_what_cannot_be_is_refused():
    for arguments in (
        ((), ()),
        ((1.0,), (0.1, 0.2)),
        ((0.0,), (0.1,)),
        ((1.0,), (-0.1,)),
        ((1.0,), (0.1,), ((0, 0, 1.0),)),
    ):
        with pytest.raises(ThermalError):
            Network(*arguments)
    for temp_k, dt_s in (([-1.0], 1.0), ([np.nan], 1.0), ([300.0, 300.0], 1.0), ([300.0], -1.0)):
        with pytest.raises(ThermalError):
            thermal.advance(ONE, np.array(temp_k), np.zeros(len(temp_k)), dt_s)
