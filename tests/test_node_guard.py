"""The guard's decisions: heat in closed loop with simulated boards, flags, memory, the ground station's cap, silence.

The truth is firmware_sim's noiseless die temperature, which the guard never sees: it gets readings with the sensor's noise and
steps. firmware_sim computes an exact Foster step; the guard's model has other time constants and learns.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest

from firmware_sim import board
from firmware_sim.profiles import PROFILES
from node_agent import guard, heat
from node_agent.config import GuardConfig
from node_agent.errors import CommandError

CONFIG = GuardConfig()
TICK_S = 0.5


@dataclass
class Flight:
    """What happened to a board: seconds above the limit and the hottest, on the noiseless truth."""

    over_s: float = 0.0
    top_c: float = -math.inf
    duties: tuple[float, ...] = ()
    events: tuple[guard.Event, ...] = ()


def reading_c(profile: board.Profile, state: board.BoardState, noise: random.Random) -> float:
    """The hottest zone that is to be believed, with noise and in the sensor's steps."""
    hottest = -math.inf
    for zone in profile.zones:
        temp_c = board.zone_c(profile, zone, state)
        if zone.says_c is None and temp_c > -200:
            step_c = profile.zone_step_mc / 1000
            hottest = max(hottest, round((temp_c + noise.gauss(0, profile.zone_noise_k)) / step_c) * step_c)
    return hottest


def fly(
    profile: board.Profile,
    config: GuardConfig,
    load=lambda t_s: 1.0,
    seconds=1000.0,
    guarded=True,
    warm=0.0,
    sensor=None,
) -> Flight:
    """Closed loop: the board computes as much as the load wants and the guard allows. `warm`: load it comes from."""
    limit_c = guard.limit_c(config, [trip for zone in profile.zones for trip in zone.trips])
    truth, noise = profile.equilibrium(board.power_w(profile, warm)), random.Random(7)
    state, duty, flight, duties, events = guard.start(0.0), 0.0, Flight(), [], []
    for tick in range(int(seconds / TICK_S)):
        t_s = tick * TICK_S
        temp_c = reading_c(profile, truth, noise)
        seen = guard.Seen(t_s, sensor(t_s, temp_c) if sensor else temp_c, duty)
        state, decision = guard.step(config, limit_c, state, seen)
        events += decision.events
        duty = min(load(t_s), decision.duty if guarded else 1.0)
        duties.append(decision.duty)
        truth = board.step(profile, truth, duty, TICK_S)
        flight.over_s += TICK_S * (board.die_c(profile, truth) > limit_c)
        flight.top_c = max(flight.top_c, board.die_c(profile, truth))
    flight.duties, flight.events = tuple(duties), tuple(events)
    return flight


def steady_duty(profile: board.Profile, limit_c: float) -> float:
    """The constant duty that ends at the set point, by hand: P sum(R) = T - T_ambient, P linear in the duty."""
    power_w = (limit_c - 0.5 - profile.ambient_c) / sum(branch.r_k_per_w for branch in profile.foster)
    return (power_w - profile.idle_w) / (profile.max_w - profile.idle_w)


# Profile, ambient (hotter where the board's own limit is out of reach on the bench), configured limit, limit, and the load that
# the board comes from, of which the guard knows nothing.
CASES = [
    ("raspberry-pi-5", 35.0, None, 80.0, 0.0),
    ("raspberry-pi-4-ina226", 35.0, None, 80.0, 0.3),
    ("jetson-orin-nano", 70.0, None, 95.0, 0.0),
    ("jetson-agx-orin", 70.0, None, 95.0, 0.3),
    ("raspberry-pi-5", 24.7, 60.0, 60.0, 0.3),
    ("jetson-orin-nano", 24.7, 50.0, 50.0, 0.3),
    ("jetson-agx-orin", 24.7, 50.0, 50.0, 0.0),
]


@pytest.mark.parametrize("name, ambient_c, configured_c, limit_c, warm", CASES)
def test_full_load_never_exceeds_the_limit(name, ambient_c, configured_c, limit_c, warm):
    profile = replace(PROFILES[name], ambient_c=ambient_c)
    config = replace(CONFIG, temp_limit_c=configured_c)
    assert guard.limit_c(config, [t for z in profile.zones for t in z.trips]) == limit_c
    bare = fly(profile, config, guarded=False, warm=warm, seconds=900)
    assert bare.over_s > 100 and bare.top_c > limit_c + 1  # the control: without the guard it is exceeded
    got = fly(profile, config, warm=warm, seconds=2400)
    assert got.over_s == 0.0
    assert limit_c - 1.5 < got.top_c < limit_c  # and the room that there is, is used
    tail = got.duties[-600:]
    assert sum(tail) / len(tail) == pytest.approx(steady_duty(profile, limit_c), abs=0.05)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "name, limit_c", [("raspberry-pi-5", 60.0), ("jetson-orin-nano", 48.0), ("jetson-agx-orin", 48.0)]
)
def test_bursts_never_exceed_the_limit(name, limit_c, seed):
    """Bursts and pauses of 1 to 100 s, beginning while the guard knows nothing of the board yet."""
    chance = random.Random(seed)
    switches, t_s = [], 0.0
    while t_s < 1000:
        t_s += chance.uniform(1, chance.choice((3, 20, 100)))
        switches.append(t_s)
    busy = {tick: sum(at <= tick * TICK_S for at in switches) % 2 for tick in range(2001)}
    config = replace(CONFIG, temp_limit_c=limit_c)
    flight = fly(PROFILES[name], config, lambda t_s: float(busy[int(t_s / TICK_S)]), warm=0.2)
    assert flight.over_s == 0.0


def test_hysteresis_no_chatter():
    """Around the set point for 40 minutes: one event that it begins, and one that it is over when the load has gone."""
    config = replace(CONFIG, temp_limit_c=60.0)
    flight = fly(PROFILES["raspberry-pi-5"], config, lambda t_s: float(t_s < 2400), seconds=3000)
    assert [(severity, kind) for severity, kind, _ in flight.events] == [("watch", "thermal"), ("info", "thermal")]
    assert flight.duties[-1] == 1.0
    steps = [abs(b - a) for a, b in zip(flight.duties[2000:4700], flight.duties[2001:4700])]
    assert max(steps) < 0.2  # no bang-bang


def test_a_slow_load_that_the_guard_does_not_control_is_met_with_less_duty():
    """The board gets 8 K warmer from outside within 5 minutes, at the set point."""
    profile, limit_c = PROFILES["jetson-orin-nano"], 50.0
    config = replace(CONFIG, temp_limit_c=limit_c)
    truth, noise, state, duty, over_s = (
        profile.equilibrium(profile.idle_w),
        random.Random(1),
        guard.start(0.0),
        0.0,
        0.0,
    )
    for tick in range(3600):
        outside_k = 8.0 * min(1.0, max(0.0, tick * TICK_S - 900) / 300)
        temp_c = reading_c(profile, truth, noise) + outside_k
        state, decision = guard.step(config, limit_c, state, guard.Seen(tick * TICK_S, temp_c, duty))
        duty = decision.duty
        truth = board.step(profile, truth, duty, TICK_S)
        over_s += TICK_S * (board.die_c(profile, truth) + outside_k > limit_c)
    assert over_s == 0.0 and duty < steady_duty(profile, limit_c) - 0.2


def test_a_board_that_is_too_hot_without_any_load_is_at_the_floor_and_says_so():
    profile = replace(PROFILES["raspberry-pi-5"], ambient_c=60.0)
    flight = fly(profile, replace(CONFIG, temp_limit_c=70.0), seconds=60)
    assert set(flight.duties) == {CONFIG.floor_duty}
    assert [kind for _, kind, _ in flight.events] == ["thermal", "over_limit"]


def test_unknown_temperature_is_not_full_speed():
    """None for 3 s is borne, then the duty for an unknown temperature holds; it ends with the first reading."""
    gone = fly(PROFILES["raspberry-pi-5"], CONFIG, seconds=60, sensor=lambda t_s, c: None if 20 <= t_s < 40 else c)
    at = {t_s: gone.duties[int(t_s / TICK_S)] for t_s in (19.5, 21, 22.5, 23.5, 39.5, 40)}
    assert at == {19.5: 1.0, 21: 1.0, 22.5: 1.0, 23.5: CONFIG.unknown_duty, 39.5: CONFIG.unknown_duty, 40: 1.0}
    assert [(s, k) for s, k, _ in gone.events] == [("warning", "temperature"), ("info", "temperature")]
    never = fly(PROFILES["raspberry-pi-5"], CONFIG, seconds=10, sensor=lambda t_s, c: None)
    assert set(never.duties) == {CONFIG.unknown_duty}


def test_without_any_limit_nothing_is_capped_and_the_state_says_so():
    state, decision = guard.step(CONFIG, None, guard.start(0.0), guard.Seen(0.0, 95.0, 1.0))
    assert (decision.duty, decision.state, decision.events) == (1.0, guard.NO_LIMIT, ())
    limit = guard.samples(decision, None, 0.0, "measured", 0.0)[3]
    assert (limit.name, limit.value, limit.validity) == ("guard_limit_c", None, "missing")


def test_single_wild_readings_change_little_and_lasting_ones_are_believed():
    config = replace(CONFIG, temp_limit_c=60.0)
    calm = fly(PROFILES["jetson-orin-nano"], config, seconds=200)
    wild = fly(PROFILES["jetson-orin-nano"], config, seconds=200, sensor=lambda t_s, c: 100.0 if t_s % 10 == 5 else c)
    assert max(abs(a - b) for a, b in zip(calm.duties, wild.duties)) < 0.05
    lasting = fly(PROFILES["jetson-orin-nano"], config, seconds=200, sensor=lambda t_s, c: 100.0 if t_s > 100 else c)
    assert lasting.duties[-1] == config.floor_duty and ("distress", "over_limit") in [e[:2] for e in lasting.events]


def test_the_model_learns_a_foster_network():
    """Pseudo-random load on a network with time constants of the model's own: each horizon is predicted within 0.2 K."""
    truth_k, taus_s = (4.0, 9.0), (4.0, 64.0)
    state, chance, rises, duty = heat.start(0.0), random.Random(3), [0.0, 0.0], 0.0
    for tick in range(4000):
        if tick % 40 == 0:
            duty = chance.random()
        rises = [duty * g + (rise - duty * g) * math.exp(-TICK_S / tau) for rise, g, tau in zip(rises, truth_k, taus_s)]
        state, _ = heat.step(state, 30.0 + sum(rises) + chance.gauss(0, 0.2), duty, (tick + 1) * TICK_S)
    for horizon_s in heat.HORIZONS_S:
        wanted = sum((g - rise) * (1 - math.exp(-horizon_s / tau)) for rise, g, tau in zip(rises, truth_k, taus_s))
        reach = state.parameters[1:] * (1 - np.exp(-horizon_s / heat.TAUS_S))
        assert float(reach @ (1.0 - state.phi)) == pytest.approx(wanted, abs=0.2)
    with pytest.raises(ValueError, match="no temperature"):
        heat.largest_duty(heat.start(0.0), 60.0)


@dataclass(frozen=True)
class Trip:
    kind: str
    temp_c: float


@pytest.mark.parametrize(
    "trips, want",
    [
        ([Trip("critical", 104.5), Trip("hot", 99.0), Trip("passive", 95.0)], 95.0),  # tegra234 device tree
        ([Trip("critical", 110.0), Trip("active", 50.0), Trip("active", 75.0)], 80.0),  # bcm2712, firmware's 80 C
        ([Trip("critical", 104.5), Trip("hot", 99.0)], 94.0),
        ([Trip("passive", 95.0), Trip("passive", 90.0)], 90.0),
        ([Trip("passive", 0.05), Trip("passive", 45.0)], None),
        ([], None),
    ],
)
def test_the_limit_comes_from_the_trip_points(trips, want):
    assert guard.limit_c(CONFIG, trips) == want
    assert guard.limit_c(replace(CONFIG, temp_limit_c=66.0), trips) == 66.0


# ---------------------------------------------------------------- flags, memory, the ground station


def steps(config: GuardConfig, seen: list[guard.Seen]) -> list[guard.Decision]:
    state, decisions = guard.start(0.0), []
    for item in seen:
        state, decision = guard.step(config, None, state, item)
        decisions.append(decision)
    return decisions


def test_flags_halve_the_duty_until_they_have_been_gone_for_a_while():
    on = {5, 6, 9}  # s: it flickers
    got = steps(
        CONFIG,
        [guard.Seen(float(t), None, 0.0, frozenset({"under_voltage"} if t in on else ())) for t in range(30)],
    )
    assert [t for t, decision in enumerate(got) if decision.duty == 0.5] == list(range(5, 19))
    assert {decision.duty for decision in got} == {0.5, 1.0}
    said = [event for decision in got for event in decision.events]
    assert [(severity, kind) for severity, kind, _ in said] == [("warning", "power_flags"), ("info", "power_flags")]
    assert "under_voltage" in said[0][2]


def test_flags_of_the_past_do_nothing():
    got = steps(CONFIG, [guard.Seen(0.0, None, 0.0, frozenset({"under_voltage_since_boot", "throttled_since_boot"}))])
    assert got[0].duty == 1.0 and not got[0].events


def test_memory_guard_has_a_hysteresis():
    """Floor 100 MB: refused below it, taken again from 125 MB on."""
    megabytes = [200, 101, 99, 101, 120, 124, 126, 110, 99, 126]
    got = steps(
        replace(CONFIG, memory_floor_mb=100),
        [guard.Seen(float(t), None, 0.0, memory_bytes=mb * 10**6) for t, mb in enumerate(megabytes)],
    )
    assert [bool(d.refusal) for d in got] == [False, False, True, True, True, True, False, False, True, False]
    assert "99 MB" in got[2].refusal and "100 MB" in got[2].refusal
    assert [k for d in got for _, k, _ in d.events] == ["memory"] * 4
    off = steps(replace(CONFIG, memory_floor_mb=0), [guard.Seen(0.0, None, 0.0, memory_bytes=1)])
    assert not off[0].refusal


def test_ground_cap_runs_out_to_the_silent_duty_and_one_lifts_it():
    config = replace(CONFIG, silent_s=5.0, silent_duty=0.4)
    order = guard.parse_order({"cap": "0.25", "valid_s": "10"}, 100.0)
    assert order == guard.Order(0.25, 110.0)
    seen = [guard.Seen(t, None, 0.0, heard_s=t, order=order) for t in (100.0, 109.9, 110.1, 200.0)]
    lifted = guard.Seen(201.0, None, 0.0, heard_s=201.0, order=guard.parse_order({"cap": "1", "valid_s": "1"}, 201.0))
    late = replace(lifted, time_s=300.0, heard_s=300.0)
    assert [d.duty for d in steps(config, [*seen, lifted, late])] == [0.25, 0.25, 0.4, 0.4, 1.0, 1.0]


def test_a_silent_ground_station_and_one_that_was_never_there():
    config = replace(CONFIG, silent_s=5.0, silent_duty=0.4)
    never = steps(config, [guard.Seen(t, None, 0.0) for t in (0.0, 1e3, 1e6)])
    assert {d.duty for d in never} == {1.0}
    got = steps(
        config, [guard.Seen(t, None, 0.0, heard_s=h) for t, h in ((1, 1), (5.9, 1), (6.1, 1), (9, 1), (10, 10))]
    )
    assert [d.duty for d in got] == [1.0, 1.0, 0.4, 0.4, 1.0]
    assert [e[:2] for d in got for e in d.events] == [("warning", "ground_silent"), ("info", "ground_silent")]


def test_the_least_cap_counts():
    seen = guard.Seen(10.0, None, 0.0, frozenset({"throttled"}), heard_s=10.0, order=guard.Order(0.7, 20.0))
    decision = steps(CONFIG, [seen])[0]
    assert decision.duty == 0.5 and decision.state == guard.FLAGS | guard.GROUND | guard.NO_LIMIT
    assert "firmware flags" in decision.text and "0.50" in decision.text


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, "cap is ''"),
        ({"cap": "0.5"}, "valid_s is ''"),
        ({"cap": "-0.1", "valid_s": "1"}, "cap is '-0.1'"),
        ({"cap": "1.01", "valid_s": "1"}, "0 to 1"),
        ({"cap": "nan", "valid_s": "1"}, "cap is 'nan'"),
        ({"cap": "inf", "valid_s": "1"}, "cap is 'inf'"),
        ({"cap": "0.5", "valid_s": "0"}, "0.1 to 86400"),
        ({"cap": "0.5", "valid_s": "1e9"}, "valid_s is '1e9'"),
        ({"cap": "0" * 1000, "valid_s": "1"}, "cap is"),
        ({"cap": "0.5", "valid_s": "1", "x" * 900: "1"}, "unknown"),
    ],
)
def test_a_bad_duty_command_is_refused_in_one_line(arguments, said):
    with pytest.raises(CommandError) as caught:
        guard.parse_order(arguments, 0.0)
    assert said in str(caught.value) and len(str(caught.value)) < 200 and "\n" not in str(caught.value)
