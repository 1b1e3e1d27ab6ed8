"""Scenario files: what is read is what was written, and every wrong entry is named with what to write instead."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from firmware_sim.scenario import MAX_SCENARIO_BYTES, ScenarioError, parse, read

GOOD = """
name = "two in a ring"
[time]
start = 2026-06-21T14:00:00+02:00
scale = 60
[constellation]
altitude_km = 600
inclination_deg = 97.8
planes = 2
per_plane = 3
[bus]
kind = "6U"
[power]
battery_wh = 40.0
[payload]
r_k_per_w = [3.0, 13.6]
tau_s = [8, 400.0]
[[board]]
node = "sat-1"
profile = "jetson-orin-nano"
satellite = 4
ambient_c = 45
guard = { temp_limit_c = 85, silent_s = 5 }
[[board]]
node = "sat-2"
profile = "raspberry-pi-4-ina226"
"""


def test_what_is_read_is_what_was_written():
    scenario = parse(GOOD)
    assert scenario.name == "two in a ring"
    assert scenario.time.start == datetime(2026, 6, 21, 12, tzinfo=timezone.utc) and scenario.time.scale == 60.0
    assert scenario.constellation.satellites == 6 and scenario.constellation.altitude_km == 600.0
    assert scenario.bus.kind == "6U" and scenario.power.battery_wh == 40.0
    assert scenario.payload.r_k_per_w == (3.0, 13.6) and scenario.payload.tau_s == (8.0, 400.0)
    first, second = scenario.boards
    assert (first.node, first.profile, first.satellite) == ("sat-1", "jetson-orin-nano", 4)
    assert first.guard == {"temp_limit_c": 85, "silent_s": 5} and second.guard == {}
    assert first.simulated == {"ambient_c": 45}  # checked by the simulator of boards
    assert second.satellite == 1 and second.simulated == {}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "two in a ring"', "", "give name"),
        ("scale = 60", "scale = 0", "scale is 0; give a number from 0.01"),
        ("scale = 60", "scale = nan", "scale is nan"),
        ("scale = 60", "speed = 60", r"\[time\] speed is unknown; use start, scale"),
        ("2026-06-21T14:00:00+02:00", "2026-06-21T14:00:00", "give a time with its zone"),
        ("2026-06-21T14:00:00+02:00", "1900-06-21T14:00:00Z", "a year from 1957"),
        ("start = 2026-06-21T14:00:00+02:00", "", r"\[time\] needs start"),
        ("planes = 2", "planes = 2.5", "planes is 2.5; give a whole number"),
        ("planes = 2", "planes = true", "planes is True"),
        ("planes = 2\nper_plane = 3", "planes = 1000\nper_plane = 1000", "1000000 satellites; at most 100000"),
        ('kind = "6U"', 'kind = "7U"', "kind is '7U'; use 3U, 6U, 12U"),
        ("tau_s = [8, 400.0]", "tau_s = [8]", "r_k_per_w and tau_s go together"),
        ("tau_s = [8, 400.0]", "tau_s = []", "give a list of 1 to 8 numbers"),
        ("satellite = 4", "satellite = 6", "satellite 6 is not there; the constellation has 0 to 5"),
        ("satellite = 4", "satellite = 1", "two boards have the same satellite"),
        ('node = "sat-2"', 'node = "sat-1"', "two boards have the same node"),
        ('node = "sat-2"', 'node = "../etc"', r"\[\[board\]\] 2"),
        ('node = "sat-2"', "", "needs the texts node and profile"),
        ("ambient_c = 45", 'sysroot = "/"', "sysroot is set by whoever starts the boards"),
        ("guard = {", "guard = 7 # {", "guard is '7'"),
        ("guard = { temp_limit_c = 85", "guard = { temp_limit_c = nan", "give a table such as"),
        ("guard = { temp", 'guard = { "x = 5\\n[telemetry]\\nperiod_s" = 1, temp', "give a table such as"),
        ("ambient_c = 45", "ambient_c = 2026-01-01", "holds a date, or a number that is none"),
        ("ambient_c = 45", "ambient_c = nan", "holds a date, or a number that is none"),
        ("satellite = 4", "satellite = 0x1" + "0" * 400, "satellite is .*; give a whole number"),
        ("satellite = 4", "satellite = 1" + "0" * 5000, "is not TOML"),
        ("satellite = 4", "satellite = 0x1" + "f" * 8000, "a number that is too long"),
        ("[bus]", "[busses]", "busses is unknown; use name, time"),
        ("[bus]", "[bus", "is not TOML"),
    ],
)
def test_a_wrong_entry_is_named(old, new, said):
    assert old in GOOD
    with pytest.raises(ScenarioError, match=said) as caught:
        parse(GOOD.replace(old, new))
    assert "\n" not in str(caught.value)


GROUND = '[links]\ngateway = "ground"\nlatitude_deg = 48.1\nlongitude_deg = 11.6\nleast_elevation_deg = 10\n'


def with_links(table: str):
    return parse(GOOD.replace("[[board]]", table + "[[board]]", 1))


def test_links_are_read_and_the_gateway_may_be_named_in_three_ways():
    assert parse(GOOD).links is None
    links = with_links(GROUND + 'topology = "sight"\nisl_rate_bps = 2.5e9\nlongest_isl_km = 4000\n').links
    assert links.gateway is None and (links.latitude_deg, links.least_elevation_deg) == (48.1, 10.0)
    assert (links.topology, links.isl_rate_bps, links.gsl_rate_bps, links.longest_isl_km) == (
        "sight",
        2.5e9,
        10e6,
        4000.0,
    )
    assert with_links("[links]\ngateway = 5\n").links.gateway == 5
    assert with_links('[links]\ngateway = "sat-1"\n').links.gateway == 4
    assert with_links("[links]\ngateway = 0\n").links.gateway == 0


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[links]\n", 'gateway is None; give "ground", a satellite'),
        ("[links]\ngateway = true\n", "gateway is True"),
        ("[links]\ngateway = 6\n", "gateway 6 is not there; the constellation has 0 to 5"),
        ("[links]\ngateway = -1\n", "gateway -1 is not there"),
        ('[links]\ngateway = "sat-9"\n', "gateway 'sat-9' is no board's node"),
        (
            '[links]\ngateway = "ground"\nlongitude_deg = 0\nleast_elevation_deg = 10\n',
            "needs latitude_deg and longitude_deg",
        ),
        ('[links]\ngateway = "ground"\nlatitude_deg = 0\nlongitude_deg = 0\n', "needs one of least_elevation_deg and"),
        (GROUND + "longest_gsl_km = 1260\n", "needs one of least_elevation_deg and longest_gsl_km"),
        ("[links]\ngateway = 1\ngsl_rate_bps = 1e6\n", "gsl_rate_bps is of a ground station; remove it"),
        (GROUND + "isl_rate_bps = 0\n", "isl_rate_bps is 0; give a number from 1"),
        (GROUND + "isl_rate_bps = inf\n", "isl_rate_bps is inf"),
        (GROUND.replace("48.1", "91"), "latitude_deg is 91; give a number from -90 to 90"),
        (GROUND + 'topology = "mesh"\n', "topology is 'mesh'; use grid, sight"),
        (GROUND + "topology = 3\n", "topology is '3'; use grid, sight"),
        (GROUND + "rate = 3\n", r"\[links\] rate is unknown; use gateway, topology"),
        ("[power]\nstart_capacity_share = 0\n", "start_capacity_share is 0; give a number from 0.2 to 1"),
        ("[power]\nstart_capacity_share = 1.1\n", "start_capacity_share is 1.1"),
    ],
)
def test_wrong_links_and_ages_are_named(table, said):
    text = GOOD.replace("[power]\nbattery_wh = 40.0\n", "")
    with pytest.raises(ScenarioError, match=said) as caught:
        parse(text.replace("[[board]]", table + "[[board]]", 1))
    assert "\n" not in str(caught.value)


def test_links_that_are_no_table_are_named():
    with pytest.raises(ScenarioError, match=r"links is no table; write \[links\]"):
        parse("links = 3\n" + GOOD)


def test_files_that_are_no_scenario(tmp_path):
    with pytest.raises(ScenarioError, match="cannot be read"):
        read(tmp_path / "absent.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ScenarioError, match="not UTF-8"):
        read(tmp_path / "binary")
    (tmp_path / "long").write_bytes(b"#" * (MAX_SCENARIO_BYTES + 1))
    with pytest.raises(ScenarioError, match="over the limit"):
        read(tmp_path / "long")
    (tmp_path / "good.toml").write_text(GOOD)
    assert read(tmp_path / "good.toml") == parse(GOOD)
