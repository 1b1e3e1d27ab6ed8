"""Levels of values against tables worked by hand, and what must hold of any sequence; which limit a signal has."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ground_station import limits
from ground_station.limits import Limit, Limits, LimitSet, Standing, advance

# both sides: green 10-70, yellow 5-75, red 0-80; ranks watch, warning, critical
SIX = Limit(
    "temp_c",
    low=(10.0, 5.0, 0.0),
    high=(70.0, 75.0, 80.0),
    low_bands=("green", "yellow", "red"),
    high_bands=("green", "yellow", "red"),
    low_severity=(1, 2, 4),
    high_severity=(1, 2, 4),
)


def two(hysteresis: float = 0.0, up: int = 1, down: int = 1) -> Limit:
    return Limit(
        "temp_c",
        high=(75.0, 80.0),
        high_bands=("yellow", "red"),
        high_severity=(2, 4),
        hysteresis=hysteresis,
        up=up,
        down=down,
    )


def levels(limit: Limit, values: list[float], standing: Standing = limits.NOTHING_YET) -> list[str]:
    seen = []
    for value in values:
        standing = advance(limit, standing, value)
        seen.append(limit.level(standing.zone))
    return seen


N, YH, RH, YL, RL = "nominal", "yellow_high", "red_high", "yellow_low", "red_low"


@pytest.mark.parametrize(
    ("value", "level", "severity"),
    [
        (-0.1, "red_low", 4),
        (0.0, "yellow_low", 2),  # at the limit is not beyond it
        (4.9, "yellow_low", 2),
        (5.0, "green_low", 1),
        (9.9, "green_low", 1),
        (10.0, "nominal", 0),
        (70.0, "nominal", 0),
        (70.1, "green_high", 1),
        (75.0, "green_high", 1),
        (75.1, "yellow_high", 2),
        (80.0, "yellow_high", 2),
        (80.1, "red_high", 4),
        (1e308, "red_high", 4),
    ],
)
def test_bands(value, level, severity):
    zone = SIX.zone(value)
    assert (SIX.level(zone), SIX.severity(zone)) == (level, severity)


@pytest.mark.parametrize(
    ("limit", "table"),
    [
        (two(), [(76, YH), (81, RH), (80, YH), (75, N)]),
        # out of red only at 78 or below, out of yellow at 73 or below
        (two(hysteresis=2), [(75.1, YH), (74, YH), (73.1, YH), (73, N), (74, N), (75, N), (81, RH), (79, RH), (78, YH)]),
        (two(hysteresis=2), [(81, RH), (73.5, YH), (73, N)]),
        (two(hysteresis=2), [(81, RH), (20, N)]),
        # three in a row up, two in a row down
        (two(up=3, down=2), [(76, N), (76, N), (70, N), (76, N), (76, N), (76, YH), (70, YH), (76, YH), (70, YH), (70, N)]),
        # three are beyond yellow at the third, and beyond red at the fourth
        (two(up=3), [(76, N), (81, N), (81, YH), (81, RH)]),
        # down to the gravest of the two that were less grave
        (two(down=2), [(81, RH), (76, RH), (70, YH), (70, N)]),
        (two(up=2, hysteresis=2), [(76, N), (74, N), (76, N), (76, YH), (74, YH)]),
        # straight from one side to the other
        (SIX, [(81, RH), (-1, RL), (4, YL), (50, N)]),
    ],
)  # fmt: skip
def test_sequences(limit, table):
    assert levels(limit, [value for value, _ in table]) == [level for _, level in table]


def test_a_missing_value_breaks_a_return_and_not_a_rise():
    limit = two(up=2, down=2)
    standing = advance(limit, limits.NOTHING_YET, 76.0)
    standing = advance(limit, limits.skip(limit, standing), 76.0)
    assert limit.level(standing.zone) == YH
    standing = advance(limit, standing, 70.0)
    standing = advance(limit, limits.skip(limit, standing), 70.0)
    assert limit.level(standing.zone) == YH, "not two in a row"
    assert limit.level(advance(limit, standing, 70.0).zone) == N


def test_bits():
    limit = Limit("guard_state", bits=(limits.Bit(0, 1, "heat"), limits.Bit(5, 3, "memory")))
    assert [limit.severity(limit.zone(value)) for value in (0, 1, 2, 32, 33, 64)] == [0, 1, 0, 3, 3, 0]
    assert [limit.usable(value) for value in (0.5, -1.0, 2.0**53, math.nan, None, 3.0)] == [False] * 5 + [True]


@given(st.lists(st.floats(73.001, 75.0), max_size=50), st.sampled_from([0, 1]), st.integers(1, 4), st.integers(1, 4))
def test_no_flapping_within_the_hysteresis(values, zone, up, down):
    """Between limit - hysteresis and limit, what is well stays well and what is bad stays bad."""
    limit, standing = two(2.0, up, down), Standing(zone)
    for value in values:
        standing = advance(limit, standing, value)
        assert standing == Standing(zone)


def test_it_does_flap_without_hysteresis():
    assert levels(two(), [75.1, 74.9, 75.1, 74.9]) == [YH, N, YH, N]


@given(st.lists(st.sampled_from([70.0, 76.0]), max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_persistence_against_windows_of_the_whole_history(values, up, down):
    """The definition said another way: a level is taken when the last n samples, looked up in the history, all say so."""
    limit, expected, since, now = two(up=up, down=down), [], 0, False
    for i in range(1, len(values) + 1):
        last = values[max(since, i - (down if now else up)) : i]
        if len(last) == (down if now else up) and all((value > 75) != now for value in last):
            now, since = not now, i
        expected.append(YH if now else N)
    assert levels(limit, values) == expected


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40))
def test_without_memory_the_level_is_that_of_the_value(values):
    assert levels(SIX, values) == [SIX.level(SIX.zone(value)) for value in values]


@given(
    st.lists(st.floats(-20, 100), max_size=60), st.integers(1, 5), st.integers(1, 5), st.floats(0, 4), st.booleans()
)  # fmt: skip
def test_what_is_steady_is_taken(values, up, down, hysteresis, high):
    """Whatever came before, and however it is tuned: a steady value far out is red in the end, and a good one nominal."""
    limit = Limit(**{**SIX.__dict__, "up": up, "down": down, "hysteresis": hysteresis})
    levels_seen = levels(limit, values + [120.0 if high else -40.0] * 15 + [40.0] * 15)
    assert levels_seen[-16] == (RH if high else RL) and levels_seen[-1] == N


# ---------------------------------------------------------------- which limit


def test_the_first_that_matches_counts():
    first, second = Limit("temp_c.*", node="sat-*", high=(1.0,)), Limit("temp_c.*", board="*Pi 5*", high=(2.0,))
    off, rest = Limit("temp_c.gpu", off=True), Limit("temp_?", high=(3.0,))
    made = Limits({"bench": LimitSet("bench", "", (first, off, second, rest))}, "bench")
    sat, pi, other = (made.of_node("sat-1", "x"), made.of_node("n1", "Raspberry Pi 5 8GB"), made.of_node("n1", "x"))
    assert sat["temp_c.gpu"] is first and pi["temp_c.cpu"] is second and pi["temp_c.gpu"] is None
    assert other["temp_c.cpu"] is None and other["temp_c"] is rest and other["temp_cc"] is None
    assert "temp_c.cpu" in pi, "remembered"


def test_names_of_strangers_do_not_fill_memory():
    known = Limits({"a": LimitSet("a", "", (Limit("*", high=(1.0,)),))}, "a").of_node("n", "b")
    for i in range(5000):
        assert known[f"signal{i}"] is not None
    assert len(known) == limits.MAX_KNOWN and known["x" * 121] is None


def test_patterns_take_all_but_stars_and_question_marks_literally():
    assert limits.matches("a.c", "a.c") and not limits.matches("a.c*", "abc") and limits.matches("*\n?", "x\n\u202e")
    assert not limits.matches("temp_c", "temp_c\n")


def test_an_unknown_set_is_refused_with_the_ones_there_are():
    with pytest.raises(limits.LimitsError, match="'flihgt': choose one of none"):
        Limits().using("flihgt")
