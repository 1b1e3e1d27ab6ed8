"""The whole constellation's step: against an independent integration of satellites, against itself compiled; its memory."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from conftest import lacking
from scipy.integrate import solve_ivp

from firmware_sim import battery, benchmark, bus, constellation, eclipse, environment, orbit, sun, thermal
from firmware_sim.battery import Battery
from firmware_sim.constellation import Constellation, ConstellationError, State
from ground_station import cli

EPOCH_DAYS = 9497.0
LOAD_W = 18.0
STEP_S = 10.0


def walker(planes: int = 8, per_plane: int = 5, inclination_deg: float = 53.0, **store: float) -> Constellation:
    orbits = orbit.walker("delta", 550.0, inclination_deg, planes, per_plane, 1)
    return Constellation(orbits, EPOCH_DAYS, bus.BUSES["6U"], Battery(**store), 40.0)


def positions_km(fleet: Constellation, time_s: float) -> np.ndarray:
    return orbit.positions_km(fleet.orbits, time_s)


def test_view_is_the_geometry_of_positions():
    fleet = walker()
    for time_s in (0.0, 1234.5, 86400.0):
        direction = sun.direction(EPOCH_DAYS + time_s / 86400.0)
        limb, cos_zenith, sun_rad, flux = constellation.view(fleet, time_s)
        positions = positions_km(fleet, time_s)
        unit = positions / np.linalg.norm(positions, axis=1)[:, None]
        np.testing.assert_allclose(cos_zenith, unit @ direction, atol=1e-12)
        distance_km = float(sun.distance_km(EPOCH_DAYS + time_s / 86400.0))
        lit = eclipse.lit_share_at(positions, direction, distance_km)
        np.testing.assert_allclose(eclipse.lit_share(limb, sun_rad), lit, atol=1e-9)
        assert flux == pytest.approx(1361.0 * (149597870.7 / distance_km) ** 2)


def oracle(fleet: Constellation, index: int, span_s: float) -> tuple[np.ndarray, float]:
    """One satellite by scipy's RK45 with tight tolerances, never stepping more than 4 s: temperatures and energy, written out again."""
    network, kind, store = fleet.network, fleet.bus, fleet.battery
    orbits = orbit.Orbits(
        *(getattr(fleet.orbits, name)[[index]] for name in ("radius_km", "inclination_rad", "raan_rad", "argument_rad"))
    )
    panel_m2 = 40.0 / (1361.0 * kind.cell_efficiency)
    view = float(environment.sphere_view_factor(fleet.orbits.radius_km[index]))

    def slope(time_s: float, values: np.ndarray) -> np.ndarray:
        temp, days = values[:4], EPOCH_DAYS + time_s / 86400.0
        position, direction = orbit.positions_km(orbits, time_s)[0], sun.direction(days)
        flux = float(sun.flux_w_m2(days))
        lit = float(eclipse.lit_share_at(position, direction, float(sun.distance_km(days))))
        day = max(0.0, float(position @ direction) / float(np.linalg.norm(position)))
        array_w = 40.0 * flux / 1361.0 * lit
        charge_w, discharge_w = max(array_w - LOAD_W, 0.0), max(LOAD_W - array_w, 0.0)
        heat = np.array(
            [
                (kind.cell_absorptivity - kind.cell_efficiency) * panel_m2 * flux * lit
                + 2.0 * kind.cell_absorptivity * panel_m2 * 0.3 * flux * view * day
                + 2.0 * kind.panel_emissivity * panel_m2 * 237.0 * view,
                kind.body_absorptivity * kind.area_m2 * (flux * lit / 4.0 + 0.3 * flux * view * day)
                + kind.body_emissivity * kind.area_m2 * 237.0 * view,
                LOAD_W,
                0.05 * charge_w + (1.0 / 0.95 - 1.0) * discharge_w,
            ]
        )
        net = heat - np.array(network.radiating_m2) * 5.670374419e-8 * temp**4
        for a, b, conductance in network.links:
            net[a] += conductance * (temp[b] - temp[a])
            net[b] += conductance * (temp[a] - temp[b])
        change_w = 0.95 * charge_w - discharge_w / 0.95
        return np.append(net / np.array(network.capacity_j_per_k), change_w)

    begin = np.append(np.full(4, 293.15), 0.4 * store.capacity_j)
    found = solve_ivp(slope, (0.0, span_s), begin, method="RK45", rtol=1e-9, atol=1e-7, max_step=4.0)
    return found.y[:4, -1], float(found.y[4, -1])


def unsplit(fleet: Constellation, state: State, steps: int) -> State:
    """The same with the sunlight of each step's begin held through it: the eclipse's edge anywhere in a step."""
    for _ in range(steps):
        after = constellation.step(fleet, state, STEP_S, LOAD_W)
        lit = (state.limb_rad > 0.0).astype(float)
        day = np.maximum(state.cos_zenith, 0.0)
        temp_k, flow = constellation._stretch(
            fleet, state.temp_k, state.energy_j, lit, day, after.flux_w_m2, STEP_S, np.full(len(fleet), LOAD_W), None
        )
        state = State(**{**vars(after), "temp_k": temp_k, "energy_j": flow.energy_j})
    return state


def test_one_orbit_against_an_independent_integration():
    """574 steps of 10 s with one eclipse: within 2 mK and 6 J; without the split at the edge far off.

    The joules are of the penumbra, where charging turns into discharging within one stretch and both are netted: 4.6 J of the
    some 36 kJ that the eclipse takes.
    """
    # a battery that neither fills nor empties, so that the oracle needs no limits
    fleet = walker(1, 2, capacity_wh=200.0)
    begin = constellation.start(fleet, temp_c=20.0, charge=0.4)
    *_, state = constellation.run(fleet, begin, STEP_S, 574, LOAD_W)
    rough = unsplit(fleet, begin, 574)
    for index in range(2):
        temp_k, energy_j = oracle(fleet, index, 5740.0)
        np.testing.assert_allclose(state.temp_k[:, index], temp_k, rtol=0, atol=2e-3)
        assert state.energy_j[index] == pytest.approx(energy_j, abs=6.0)
        # control: with the edge anywhere in a step
        assert abs(rough.energy_j[index] - energy_j) > 100.0
        assert np.abs(rough.temp_k[:, index] - temp_k).max() > 0.02
    assert state.unmet_j.max() == 0.0 and state.spilled_j.max() == 0.0


def test_lit_share_of_an_orbit_is_the_closed_forms():
    """Each plane's eclipse against 1 - f(h, beta)."""
    fleet = walker(6, 20)
    lit = np.zeros(len(fleet))
    steps = 574
    for state in constellation.run(fleet, constellation.start(fleet), STEP_S, steps, LOAD_W):
        lit += state.lit_share
    beta = sun.beta_rad(orbit.normals(fleet.orbits, 2870.0), sun.direction(EPOCH_DAYS + 2870.0 / 86400.0))
    expected = 1.0 - eclipse.eclipse_fraction(550.0, beta)
    by_plane = (lit / steps).reshape(6, 20).mean(axis=1)
    np.testing.assert_allclose(by_plane, expected.reshape(6, 20).mean(axis=1), atol=2e-3)
    assert np.ptp(by_plane) > 0.01, "control: the planes differ"


def test_the_batterys_step_is_what_moves_the_energy():
    """Every step of full sun or full shadow, for batteries that fill and that run empty, beside battery.step by itself."""
    fleet = walker(5, 4, capacity_wh=8.0)
    state = constellation.start(fleet, charge=0.5)
    checked = 0
    for _ in range(574):
        before, state = state, constellation.step(fleet, state, STEP_S, LOAD_W)
        lit = (before.lit_share == 1.0) & (state.lit_share == 1.0)
        plain = lit | ((before.lit_share == 0.0) & (state.lit_share == 0.0))
        array_w = 40.0 * state.flux_w_m2 / 1361.0 * lit
        temp_c = before.temp_k[bus.BATTERY] - 273.15
        flow = battery.step(fleet.battery, before.energy_j, array_w, LOAD_W, STEP_S, temp_c)
        np.testing.assert_allclose(state.energy_j[plain], flow.energy_j[plain], rtol=1e-12)
        np.testing.assert_allclose((state.unmet_j - before.unmet_j)[plain], flow.unmet_j[plain], atol=1e-9)
        np.testing.assert_allclose((state.spilled_j - before.spilled_j)[plain], flow.spilled_j[plain], atol=1e-9)
        checked += int(plain.sum())
    assert checked > 0.98 * 574 * len(fleet)
    assert state.energy_j.min() >= 0.0 and state.energy_j.max() <= fleet.battery.capacity_j
    assert state.unmet_j.max() > 1000.0 and state.spilled_j.max() > 1000.0


def test_compiled_step_gives_the_same_numbers():
    if importlib.util.find_spec("numba") is None:
        lacking("numba", "pip install -c constraints.txt -e .[sim-fast]")
    # 87 degrees and many planes: grazing eclipses, a battery that fills, one that empties, a cold one
    orbits = orbit.walker("delta", 550.0, 87.0, 40, 50, 1)
    fleet = Constellation(orbits, EPOCH_DAYS, bus.BUSES["3U"], Battery(6.0), 20.0)
    load_w = np.linspace(2.0, 14.0, len(fleet))
    plain = constellation.start(fleet, temp_c=-15.0, charge=0.3)
    fast = plain
    grazing = 0
    for _ in range(300):
        plain = constellation.step(fleet, plain, STEP_S, load_w)
        fast = constellation.accelerated("numba")(fleet, fast, STEP_S, load_w)
        grazing += int(((plain.lit_share > 0.0) & (plain.lit_share < 1.0)).sum())
    assert grazing > 300 and plain.unmet_j.max() > 0.0 and plain.spilled_j.max() > 0.0
    for name in ("temp_k", "energy_j", "limb_rad", "cos_zenith", "unmet_j", "spilled_j"):
        np.testing.assert_allclose(getattr(fast, name), getattr(plain, name), rtol=1e-10, atol=1e-6, err_msg=name)
    # control: one joule or a microkelvin would be seen
    assert not np.allclose(fast.temp_k + 1e-4, plain.temp_k, rtol=1e-10, atol=1e-6)


def test_memory_is_of_one_state_whatever_the_number_of_steps():
    fleet = benchmark.build(2000)
    few = benchmark.traced_peak_mb(fleet, STEP_S, 5, "none")
    many = benchmark.traced_peak_mb(fleet, STEP_S, 100, "none")
    assert many == pytest.approx(few, rel=0.1)
    state_mb = 2000 * 9 * 8 / 1e6
    assert many < 8.0 * state_mb
    twice = benchmark.traced_peak_mb(benchmark.build(4000), STEP_S, 5, "none")
    assert twice == pytest.approx(2.0 * few, rel=0.15)
    # control: keeping the states is seen
    kept = []

    def keep() -> None:
        kept.extend(constellation.run(fleet, constellation.start(fleet), STEP_S, 100, LOAD_W))

    import tracemalloc

    tracemalloc.start()
    keep()
    assert tracemalloc.get_traced_memory()[1] / 1e6 > 5.0 * many
    tracemalloc.stop()


@pytest.mark.parametrize("accelerator", ["none", "auto"])
def test_benchmark_command(accelerator, capsys):
    arguments = ["benchmark", "sim", "--satellites", "60", "--rounds", "2", "--accelerator", accelerator, "--json"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["satellites"] == 60 and result["steps"] == 574 and result["n"] == 2
    assert 0.0 < result["seconds"] and result["spread"]["min"] <= result["seconds"] <= result["spread"]["max"]
    assert result["accelerator"] == ("none" if accelerator == "none" else constellation.accelerators()[-1])
    # physics, not only seconds: some 63 to 70 % of the orbit in the sun, temperatures a satellite can have
    assert 0.6 < result["lit_share"] < 0.8
    assert -80.0 < result["coldest_c"] < result["hottest_c"] < 100.0
    assert result["peak_mb"] > result["step_peak_mb"] > 0.0


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--satellites", "1000001"], "1 to 1000000"),
        (["--step-s", "60"], "0.1 to 10 s"),
        (["--step-s", "nan"], "0.1 to 10 s"),
    ],
)
def test_benchmark_refuses_in_one_line(arguments, says, capsys):
    assert cli.main(["benchmark", "sim", *arguments]) != 0
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_what_cannot_be_is_refused(monkeypatch):
    fleet = walker(1, 2)
    state = constellation.start(fleet)
    for dt_s, load_w in ((0.0, 1.0), (11.0, 1.0), (10.0, -1.0), (10.0, np.ones(3)), (10.0, np.nan)):
        with pytest.raises(ConstellationError):
            constellation.step(fleet, state, dt_s, load_w)
    with pytest.raises(ConstellationError, match="none"):
        constellation.accelerated("cuda")
    with pytest.raises(ConstellationError):
        constellation.start(fleet, charge=1.5)
    # where numba is not installed, asking for it says how to get it
    import sys

    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "firmware_sim.constellation_numba", raising=False)
    monkeypatch.delattr("firmware_sim.constellation_numba", raising=False)
    with pytest.raises(ConstellationError, match="sim-fast"):
        constellation.accelerated("numba")
    assert thermal.MAX_STEP_S == constellation.MAX_STEP_S
