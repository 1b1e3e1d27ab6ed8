"""Foster networks from synthetic power steps, and the throttled plateau of the Raspberry Pi that flew (BUPT-1)."""

from __future__ import annotations

import numpy as np
import pytest

from firmware_sim import foster, throttle
from firmware_sim.board import Branch, Throttle
from firmware_sim.foster import FitError, OnlineFit
from firmware_sim.profiles import PROFILES
from firmware_sim.thermal import ThermalError

TRUTH = (Branch(3.0, 8.0), Branch(12.0, 300.0))
AMBIENT_C = 25.0


def closed_form_c(time_s: np.ndarray, power_w: float) -> np.ndarray:
    """dT = sum_i P R_i (1 - exp(-t / tau_i)) from a step at time 0, written out."""
    after = np.maximum(time_s, 0.0)
    return AMBIENT_C + power_w * (3.0 * (1.0 - np.exp(-after / 8.0)) + 12.0 * (1.0 - np.exp(-after / 300.0)))


def step_of_7_w(seed: int | None, idle_s: int = 60, cool_s: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """PHYSICS's case: 7 W for 20 min at 1 Hz, noise 0.3 K, steps of 0.55 K (none of both without a seed)."""
    time_s = np.arange(-float(idle_s), 1201.0 + cool_s)
    power_w = np.where((time_s >= 0.0) & (time_s < 1200.0), 7.0, 0.0)
    temp_c = closed_form_c(time_s, 7.0) - (closed_form_c(time_s - 1200.0, 7.0) - AMBIENT_C)
    if seed is not None:
        noisy = temp_c + np.random.default_rng(seed).normal(0.0, 0.3, time_s.size)
        temp_c = np.round(noisy / 0.55) * 0.55
    return time_s, power_w, temp_c


def parameters(fit: foster.FosterFit) -> np.ndarray:
    return np.array([value for branch in fit.branches for value in (branch.r_k_per_w, branch.tau_s)])


TRUE = np.array([3.0, 8.0, 12.0, 300.0])


def test_without_noise_the_fit_is_exact():
    fit = foster.fit(*step_of_7_w(None))
    np.testing.assert_allclose(parameters(fit), TRUE, rtol=1e-6)
    assert fit.ambient_c == pytest.approx(AMBIENT_C, abs=1e-6)
    assert fit.residual_k < 1e-6


def test_synthetic_case_within_1_percent():
    """Both resistances, the slow time and the sum within 1 % for every seed; the fast time as well as 1200 samples allow.

    One run knows tau = 8 s no better than 1.4 % (its Cramer-Rao bound, worked out here), so for it the mean of 20 runs has to be
    within 1 % and no run farther off than 3.5 bounds.
    """
    fits = [foster.fit(*step_of_7_w(seed)) for seed in range(20)]
    relative = np.array([parameters(fit) for fit in fits]) / TRUE - 1.0
    assert np.abs(relative[:, [0, 2, 3]]).max() < 0.01
    assert np.abs([fit.r_k_per_w / 15.0 - 1.0 for fit in fits]).max() < 0.01
    assert np.abs(relative.mean(axis=0)).max() < 0.01
    # the bound: columns are the derivatives of the closed form
    time_s, _, _ = step_of_7_w(None)
    t = np.maximum(time_s, 0.0)
    columns = [np.ones_like(t)]
    for r, tau in ((3.0, 8.0), (12.0, 300.0)):
        columns += [7.0 * (1.0 - np.exp(-t / tau)), -7.0 * r * t / tau**2 * np.exp(-t / tau)]
    slopes = np.stack(columns, axis=1)
    deviation = np.sqrt((0.3**2 + 0.55**2 / 12.0) * np.diag(np.linalg.inv(slopes.T @ slopes)))[2] / 8.0
    assert 0.010 < deviation < 0.016
    assert np.abs(relative[:, 1]).max() < 3.5 * deviation
    for fit in fits:
        assert fit.residual_k == pytest.approx(np.sqrt(0.3**2 + 0.55**2 / 12.0), rel=0.08)


def test_one_branch_or_a_straight_line_does_not_describe_it():
    """Controls: what a wrong model leaves over is far above the noise."""
    time_s, power_w, temp_c = step_of_7_w(0)
    assert foster.fit(time_s, power_w, temp_c, branches=1).residual_k > 1.0
    line = np.polyval(np.polyfit(time_s[60:], temp_c[60:], 1), time_s[60:])
    assert np.sqrt(np.mean((line - temp_c[60:]) ** 2)) > 5.0


def test_online_and_batch_agree():
    """Sample by sample in constant memory, at even and at uneven times: the same network."""
    online = OnlineFit()
    time_s, power_w, temp_c = step_of_7_w(1, cool_s=600)
    for sample in zip(time_s, power_w, temp_c):
        online.update(*sample)
    batch = foster.fit(time_s, power_w, temp_c)
    estimate = online.estimate()
    np.testing.assert_allclose(parameters(estimate), parameters(batch), rtol=5e-4)
    assert estimate.ambient_c == pytest.approx(batch.ambient_c, abs=1e-3)
    assert estimate.residual_k == pytest.approx(batch.residual_k, rel=1e-4)
    assert estimate.samples == time_s.size

    uneven = np.cumsum(np.random.default_rng(3).uniform(0.2, 1.8, 1500)) - 100.0
    loaded = np.where(uneven >= 0.0, 7.0, 0.0)
    first = uneven[uneven >= 0.0][0]
    exact_c = closed_form_c(uneven - first, 7.0)
    np.testing.assert_allclose(parameters(foster.fit(uneven, loaded, exact_c)), TRUE, rtol=1e-6)
    online = OnlineFit()
    for sample in zip(uneven, loaded, exact_c):
        online.update(*sample)
    np.testing.assert_allclose(parameters(online.estimate()), TRUE, rtol=1e-3)


def test_a_board_that_was_not_settled():
    time_s, power_w, temp_c = step_of_7_w(2, cool_s=1200)
    begun = slice(400, None)
    free = foster.fit(time_s[begun], power_w[begun], temp_c[begun], settled=False)
    np.testing.assert_allclose(parameters(free), TRUE, rtol=0.05)
    # control: taken for settled, it comes out wrong (or not at all)
    try:
        wrong = parameters(foster.fit(time_s[begun], power_w[begun], temp_c[begun]))
        assert np.abs(wrong / TRUE - 1.0).max() > 0.10
    except FitError:
        pass


def test_filter_step_is_the_closed_form_for_any_step():
    rises_k = np.zeros(2)
    for dt_s in (0.1, 3.0, 50.0, 146.9):
        rises_k = foster.filter_step(TRUTH, rises_k, 7.0, dt_s)
    assert AMBIENT_C + rises_k.sum() == pytest.approx(float(closed_form_c(np.array(200.0), 7.0)), abs=1e-9)
    many = foster.filter_step(TRUTH, np.zeros((2, 3)), np.array([0.0, 7.0, 14.0]), 200.0)
    assert many.sum(axis=0) == pytest.approx([0.0, rises_k.sum(), 2.0 * rises_k.sum()])


def test_measurements_that_say_too_little():
    time_s, power_w, temp_c = step_of_7_w(None)
    for arguments, says in (
        ((time_s, power_w * 0.0, temp_c), "load the board"),
        ((time_s[:5], power_w[:5], temp_c[:5]), "5 samples"),
        ((time_s[::-1], power_w, temp_c), "do not rise"),
        ((time_s, power_w, np.where(time_s == 7.0, np.nan, temp_c)), "no number"),
        ((time_s, power_w[:-1], temp_c), "same length"),
        ((time_s, power_w, -temp_c, 1), "fell as the power rose"),
        ((time_s, power_w, -temp_c), "too short"),
        ((time_s, power_w, temp_c, 9), "give 1 to"),
    ):
        with pytest.raises(FitError, match=says):
            foster.fit(*arguments)
    # it rises ever faster: slower than anything that 40 s can show
    with pytest.raises(FitError, match="too short.*not below the longest"):
        foster.fit(time_s[:100], power_w[:100], AMBIENT_C + 0.01 * np.maximum(time_s[:100], 0.0) ** 2, 1)
    online = OnlineFit()
    with pytest.raises(FitError, match="too few"):
        online.estimate()
    online.update(0.0, 1.0, 30.0)
    with pytest.raises(FitError, match="rising times"):
        online.update(0.0, 1.0, 30.0)
    with pytest.raises(FitError, match="leave it out"):
        online.update(1.0, float("nan"), 30.0)
    for second in range(1, 60):
        online.update(float(second), 1.0, 30.0)
    with pytest.raises(FitError, match="load the board"):
        online.estimate()


# BUPT-1 in orbit (arXiv 2401.03435): cores busy -> W, C. On the ground 3 and 4 cores draw 5.25 and 5.91 W.
ORBIT = {1: (3.20, 57.2), 2: (4.08, 72.7), 3: (4.60, 82.8), 4: (4.78, 83.6)}
GROUND_W = {3: 5.25, 4: 5.91}


def bupt_1() -> tuple[float, float, float]:
    """K/W, ambient and idle power (no core busy) from the two runs that did not throttle."""
    (one_w, one_c), (two_w, two_c) = ORBIT[1], ORBIT[2]
    r_k_per_w = (two_c - one_c) / (two_w - one_w)
    return r_k_per_w, one_c - r_k_per_w * one_w, 2.0 * one_w - two_w


@pytest.mark.parametrize("cores", [3, 4])
def test_bupt_1_throttled_plateau_within_3_k(cores, record_property):
    """Residuals (predicted less measured): 3 cores -0.95 K, -0.00 W; 4 cores -0.70 K, -0.12 W.

    From the resistance of the unthrottled runs, the load that the ground measured, and the Pi 4's throttle (80-85 C).
    """
    r_k_per_w, ambient_c, idle_w = bupt_1()
    pi_4 = next(profile.throttle for name, profile in PROFILES.items() if "pi-4" in name)
    power_w, temp_c = throttle.plateau(GROUND_W[cores], idle_w, ambient_c, r_k_per_w, pi_4)
    measured_w, measured_c = ORBIT[cores]
    record_property("residual_k", round(temp_c - measured_c, 2))
    record_property("residual_w", round(power_w - measured_w, 3))
    print(
        f"BUPT-1, {cores} cores: {temp_c - measured_c:+.2f} K, {power_w - measured_w:+.3f} W (predicted less measured)"
    )
    assert abs(temp_c - measured_c) <= 3.0
    assert abs(power_w - measured_w) <= 0.15
    # control: the straight line through the two runs, without the throttle, is 10 K and more too hot
    line_w, line_c = throttle.plateau(GROUND_W[cores], idle_w, ambient_c, r_k_per_w, None)
    assert line_w == GROUND_W[cores] and line_c - measured_c > 10.0
    # control: the bench's resistance (7.28 K/W, ambient 24.7 C) predicts no throttling at all
    bench_w, bench_c = throttle.plateau(GROUND_W[cores], idle_w, 24.7, 7.28, pi_4)
    assert bench_w == GROUND_W[cores] and measured_c - bench_c > 10.0


@pytest.mark.parametrize("full_w", [2.5, 4.5, 5.25, 9.0, 14.0])
def test_plateau_is_where_power_and_temperature_meet(full_w):
    """Against a search along all temperatures, below, on and beyond the ramp."""
    r_k_per_w, ambient_c, idle_w = bupt_1()
    power_w, temp_c = throttle.plateau(full_w, idle_w, ambient_c, r_k_per_w, Throttle(80.0, 85.0, 0.4))
    temps_c = np.linspace(0.0, 200.0, 2_000_001)
    share = 1.0 - 0.6 * np.clip((temps_c - 80.0) / 5.0, 0.0, 1.0)
    off = np.abs(ambient_c + r_k_per_w * (idle_w + (full_w - idle_w) * share) - temps_c)
    assert temp_c == pytest.approx(temps_c[np.argmin(off)], abs=2e-4)
    assert ambient_c + r_k_per_w * power_w == pytest.approx(temp_c, abs=1e-9)


def test_plateaus_that_cannot_be():
    with pytest.raises(ThermalError):
        throttle.plateau(1.0, 2.0, 20.0, 10.0, None)
