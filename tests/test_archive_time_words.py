"""Moments as people write them: checked against Python's own ISO 8601 parser and against seconds worked out by hand."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ground_station import time_words

NOW_UTC_S = 1_796_040_000.0
NOON_UTC_S = 1_796_040_000.0  # `date -u -d 2026-11-30T12:00Z +%s`


@pytest.mark.parametrize(
    ("text", "utc_s"),
    [
        ("2026-11-30T12:00Z", NOON_UTC_S),
        ("2026-11-30T12:00", NOON_UTC_S),
        ("2026-11-30 12:00:00", NOON_UTC_S),
        ("2026-11-30T14:00+02:00", NOON_UTC_S),
        ("2026-11-30T07:30-0430", NOON_UTC_S),
        ("2026-11-30T13:00+01", NOON_UTC_S),
        ("2026-11-30T12:00:00.25z", NOON_UTC_S + 0.25),
        ("2026-11-30", NOON_UTC_S - 43_200),
        (" -10m ", NOW_UTC_S - 600),
        ("10m", NOW_UTC_S - 600),
        ("-2h", NOW_UTC_S - 7200),
        ("1d", NOW_UTC_S - 86_400),
        ("1.5s", NOW_UTC_S - 1.5),
        ("2w", NOW_UTC_S - 14 * 86_400),
        ("now", NOW_UTC_S),
        ("1796040000", NOON_UTC_S),
        ("1796040000.5", NOON_UTC_S + 0.5),
    ],
)
def test_what_people_write(text, utc_s):
    assert time_words.utc_s(text, NOW_UTC_S) == utc_s


@pytest.mark.parametrize(
    "text",
    [
        *("", "yesterday", "10", "-10", "10 m", "-10y", "m", "nan", "inf", "1e9", "--5m", "1_796_040_000", "٣m"),
        *("2026-13-01", "2026-02-30T00:00Z", "2026-11-30T25:00", "2026-11-30T12:00+25:00", "2026-11-30T12:00 CET"),
        *("0001-01-01T00:00+23:00", "20261130", "2026-11-30T", "9" * 400, "<b>", "2026-11-30T12:00Z\x00"),
    ],
)
def test_what_says_no_moment_is_refused_with_the_forms_that_do(text):
    with pytest.raises(time_words.TimeError, match="such as 10m, 2h or 1d") as caught:
        time_words.utc_s(text, NOW_UTC_S)
    assert isinstance(caught.value, ValueError) and caught.value.text == text
    assert len(str(caught.value)) < 300


moments = st.datetimes(datetime(1902, 1, 1), datetime(2400, 1, 1))
zones = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(moments, zones)
def test_iso_means_what_python_says(moment, zone):
    moment = moment.replace(tzinfo=zone)
    assert abs(time_words.utc_s(moment.isoformat(), NOW_UTC_S) - moment.timestamp()) < 2e-6


@given(moments)
def test_what_is_printed_is_read_again(moment):
    utc_s = moment.replace(tzinfo=timezone.utc).timestamp()
    assert abs(time_words.utc_s(time_words.iso(utc_s), NOW_UTC_S) - utc_s) < 1e-3 + 1e-6


def test_times_that_no_calendar_has_are_printed_as_numbers():
    assert time_words.iso(None) == "-"
    assert time_words.iso(1e308) == "1e+308 s" and time_words.iso(float("nan")) == "nan s"
    assert time_words.iso(0.0) == "1970-01-01T00:00:00.000Z"
