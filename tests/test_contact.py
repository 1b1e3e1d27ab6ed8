"""Ways from the hub to the satellites: passes in closed form, Hypatia's outage, a plain search over all paths, and a dense look."""

from __future__ import annotations

import math
from datetime import datetime, timezone

import numpy as np
import pytest
from test_physics_links import CITIES, GSL_KM, ISL_KM, PER_PLANE, PLANES, START_DAYS, kuiper  # noqa: F401

from firmware_sim import contact, links, orbit, paths, scenario, sun
from firmware_sim.links import LinkError
from ground_station import contacts

LIGHT_KM_S = 299792.458
HEAD = 'name = "net"\n[time]\nstart = 2026-06-21T00:00:00Z\n[constellation]\n'


def net(shape: str, table: str, satellites: tuple[int, ...] = (0,)) -> scenario.Scenario:
    boards = "".join(f'[[board]]\nnode = "sat-{n}"\nprofile = "any"\nsatellite = {n}\n' for n in satellites)
    return scenario.parse(f"{HEAD}{shape}\n[links]\n{table}\n{boards}")


GROUND = 'gateway = "ground"\nlatitude_deg = 0\nlongitude_deg = {at}\nleast_elevation_deg = {up}'


def equator_longitude_deg(ahead_deg: float) -> float:
    """Where a satellite over the vernal equinox at the start comes by after `ahead_deg` of its way."""
    days = sun.j2000_days(datetime(2026, 6, 21, tzinfo=timezone.utc))
    return (ahead_deg - math.degrees(float(sun.gmst_rad(days)))) % 360.0


@pytest.mark.parametrize("least_deg", [0.0, 10.0, 40.0])
def test_a_pass_over_the_equator_lasts_as_long_as_the_angles_say(least_deg):
    """Above `e` within an angle acos(R cos e / (R + h)) - e; it moves by the orbit's rate less the Earth's turning."""
    radius_km, ground_km = 6378.137 + 550.0, 6378.137
    up = math.radians(least_deg)
    half_rad = math.acos(ground_km * math.cos(up) / radius_km) - up
    n = math.sqrt(398600.4418 / radius_km**3)
    j2 = 1.5 * 1.08262668e-3 * (ground_km / radius_km) ** 2
    rate = n * (1.0 + 3.0 * j2) - n * j2 - 7.2921159e-5  # argument, node, Earth
    middle_s = math.radians(90.0) / rate
    shape = "altitude_km = 550\ninclination_deg = 0"
    passes = net(shape, GROUND.format(at=equator_longitude_deg(90.0), up=least_deg) + "\ngsl_rate_bps = 5e6")
    [found] = contact.contact_plan(passes, 0.0, 3000.0, 40.0)
    assert found.node == "sat-0" and found.hops == 1 and found.rate_bps == 5e6
    assert found.to_s - found.from_s == pytest.approx(2.0 * half_rad / rate, abs=0.03)
    assert (found.from_s + found.to_s) / 2.0 == pytest.approx(middle_s, abs=0.5)  # nodes precess while the Earth turns
    low, high = found.delay_s
    assert high == pytest.approx(links.longest_gsl_km(550.0, least_deg) / LIGHT_KM_S, abs=1e-6)
    assert 550.0 / LIGHT_KM_S <= low < 560.0 / LIGHT_KM_S + 20 * 7.6 / LIGHT_KM_S
    # the same seconds from steps, whatever their length
    network = contact.make(passes)
    for dt_s in (7.0, 60.0, 150.0):
        state = contact.at(network, 0.0)
        for _ in range(math.ceil(3000.0 / dt_s)):
            state = contact.step(network, state, dt_s)
        assert float(state.contact_s[0]) == pytest.approx(found.to_s - found.from_s, abs=0.02)


def kuiper_net(orbits: orbit.Orbits, city: str, wanted: list[int]) -> contact.Network:
    return contact.Network(
        tuple(f"sat-{number}" for number in wanted),
        orbits,
        np.array(wanted),
        paths.plus_grid(PLANES, PER_PLANE),
        ISL_KM,
        100e6,
        START_DAYS,
        station_km=links.ground_km(*CITIES[city], ellipsoid=links.WGS72),
        longest_gsl_km=GSL_KM,
        gsl_rate_bps=10e6,
    )


def test_hypatias_outage_at_st_petersburg(kuiper):  # noqa: F811
    """No way to any satellite from 155.4 to 165.2 s (Hypatia); the J2 propagator is within a second (154.7 to 165.8 s on a grid)."""
    from firmware_sim import tle

    network = kuiper_net(tle.circular(kuiper), "St Petersburg", [0, 600, 1155])
    state, looks = contact.at(network, 140.0), []
    assert state.up.all()
    for _ in range(8):
        state = contact.step(network, state, 5.0)
        looks.append((state.time_s, bool(state.up[0])))
        assert state.up.all() or not state.up.any()
    assert looks[2:6] == [(155.0, False), (160.0, False), (165.0, False), (170.0, True)]
    lost_s = 40.0 - state.contact_s
    assert (lost_s == lost_s[0]).all()  # all ways hang on one station
    assert 9.6 - 1.0 < lost_s[0] < 9.8 + 2.0
    # control: from Manila there is a way all the time
    other = contact.at(kuiper_net(network.orbits, "Manila", [0]), 140.0)
    for _ in range(8):
        other = contact.step(kuiper_net(network.orbits, "Manila", [0]), other, 5.0)
    assert float(other.contact_s[0]) == pytest.approx(40.0)


def test_the_way_from_manila_to_the_satellite_over_dalian_is_hypatias(kuiper):  # noqa: F811
    """29.423138 ms there and back over satellites 184, 183, 217 at 0 s: three links to 217, and the last one down."""
    from firmware_sim import tle

    network = kuiper_net(tle.circular(kuiper), "Manila", [217, 184])
    reach = contact.at(network, 0.0)
    station_km = links.ground_teme_km(links.ground_km(*CITIES["Dalian"], ellipsoid=links.WGS72), START_DAYS)
    down_km = np.linalg.norm(orbit.positions_km(network.orbits, 0.0)[217] - station_km)
    assert 2e3 * (float(reach.delay_s[0]) + down_km / LIGHT_KM_S) == pytest.approx(29.423138, abs=0.1)  # 15 km off
    assert reach.hops.tolist() == [3, 1] and reach.rate_bps.tolist() == [10e6, 10e6]


def plain_search(network: contact.Network, time_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Kilometres and links to every relay (Bellman and Ford, link by link); the station is one more node that relays nothing."""
    positions = orbit.positions_km(network.orbits, time_s)
    count = len(positions)
    km, hops = np.full(count, np.inf), np.full(count, -1)
    if network.gateway is not None:
        km[network.gateway], hops[network.gateway] = 0.0, 0
    else:
        station = links.ground_teme_km(network.station_km, network.epoch_days + time_s / 86400.0)
        for i, position in enumerate(positions):
            away = position - station
            high = math.asin(float(away @ station) / float(np.linalg.norm(away) * np.linalg.norm(station)))
            if high >= network.least_elevation_rad:
                km[i], hops[i] = float(np.linalg.norm(away)), 1
    for _ in range(count):
        for a, b in [*network.pairs.tolist(), *network.pairs[:, ::-1].tolist()]:
            length = float(np.linalg.norm(positions[a] - positions[b]))
            seen = bool(links.line_of_sight(positions[a], positions[b]))
            if seen and length <= network.longest_isl_km and km[a] + length < km[b]:
                km[b], hops[b] = km[a] + length, hops[a] + 1
    return km[network.wanted], hops[network.wanted]


@pytest.mark.parametrize("topology", ["grid", "sight"])
@pytest.mark.parametrize("gateway", [GROUND.format(at=300, up=10), "gateway = 7", 'gateway = "sat-3"'])
def test_ways_are_those_of_a_plain_search(topology, gateway):
    shape = "altitude_km = 1400\ninclination_deg = 60\nplanes = 5\nper_plane = 8\nphasing = 2"
    boards = (3, 0, 12, 20, 27, 9, 14, 35, 38, 23, 31)
    network = contact.make(net(shape, f'{gateway}\ntopology = "{topology}"\nlongest_isl_km = 8000', boards))
    ways = 0
    for time_s in (0.0, 500.0, 2222.0, 4321.0):
        reach = contact.at(network, time_s)
        km, hops = plain_search(network, time_s)
        np.testing.assert_array_equal(reach.up, np.isfinite(km))
        np.testing.assert_allclose(reach.delay_s[reach.up], km[reach.up] / LIGHT_KM_S, rtol=1e-12)
        np.testing.assert_array_equal(reach.hops, hops)
        ways += int(reach.up.sum())
    assert 8 <= ways


def test_rates_are_of_the_slowest_link_and_the_gateway_needs_none():
    shape = "altitude_km = 550\ninclination_deg = 53\nper_plane = 12"
    rates = "isl_rate_bps = 2e6"
    reach = contact.at(contact.make(net(shape, f"gateway = 3\n{rates}", (3, 4, 9))), 100.0)
    assert reach.hops.tolist() == [0, 1, 6] and reach.delay_s[0] == 0.0
    assert np.isnan(reach.rate_bps[0]) and reach.rate_bps[1:].tolist() == [2e6, 2e6]
    side_km = 2 * 6928.137 * math.sin(math.radians(15.0))
    assert reach.delay_s == pytest.approx(np.array([0.0, 1.0, 6.0]) * side_km / LIGHT_KM_S, rel=1e-9)
    down = GROUND.format(at=equator_longitude_deg(0.0), up=10) + f"\n{rates}\ngsl_rate_bps = 7e6"
    reach = contact.at(contact.make(net(shape, down, (0, 1))), 0.0)
    assert reach.hops.tolist() == [1, 2] and reach.rate_bps.tolist() == [7e6, 2e6]
    # control: a ring of four does not see around the Earth
    alone = contact.at(contact.make(net(shape.replace("12", "4"), "gateway = 3", (3, 0))), 0.0)
    assert alone.hops.tolist() == [0, contact.NO_PATH] and np.isnan(alone.delay_s[1])


@pytest.mark.parametrize("planes, phasing", [(6, 3), (5, 1), (6, 5), (4, 7)])
def test_links_across_the_seam_are_as_long_as_the_others(planes, phasing):
    """A Walker delta looks the same from each of its planes: mean squared lengths are equal only with the phasing's places."""
    shape = f"altitude_km = 1000\ninclination_deg = 60\nplanes = {planes}\nper_plane = 9\nphasing = {phasing}"
    network = contact.make(net(shape, "gateway = 0"))
    assert len(network.pairs) == 2 * planes * 9  # O(satellites)
    positions = orbit.positions_km(network.orbits, 777.0)
    across = network.pairs[network.pairs[:, 0] // 9 != network.pairs[:, 1] // 9]
    squared = (paths.lengths_km(positions, across) ** 2).reshape(planes, 9).mean(axis=1)
    np.testing.assert_allclose(squared, squared[0], rtol=1e-9)
    plain = paths.plus_grid(planes, 9, shift=-round(phasing / planes))
    plain = plain[plain[:, 0] // 9 != plain[:, 1] // 9]
    untold = (paths.lengths_km(positions, plain) ** 2).reshape(planes, 9).mean(axis=1)
    assert abs(untold[-1] / untold[0] - 1.0) > 0.01  # control


def test_a_plan_says_at_every_second_what_a_look_at_that_second_says():
    shape = "altitude_km = 1400\ninclination_deg = 60\nplanes = 5\nper_plane = 8\nphasing = 2"
    case = net(shape, GROUND.format(at=300, up=15) + '\ntopology = "sight"', tuple(range(0, 40, 3)))
    plan = contact.contact_plan(case, 100.0, 2100.0, 20.0)
    assert [item.from_s for item in plan] == sorted(item.from_s for item in plan)
    network = contact.make(case)
    total_s = {node: 0.0 for node in network.nodes}
    for item in plan:
        total_s[item.node] += item.to_s - item.from_s
    seen = 0
    for time_s in np.arange(100.5, 2100.0, 1.0):
        reach = contact.at(network, float(time_s))
        for i, node in enumerate(network.nodes):
            here = [item for item in plan if item.node == node and item.from_s <= time_s < item.to_s]
            assert len(here) == int(reach.up[i])
            if here:
                assert here[0].hops == reach.hops[i] and here[0].rate_bps == reach.rate_bps[i]
                low, high = here[0].delay_s
                assert low - 2e-4 < reach.delay_s[i] < high + 2e-4  # extremes between two looks
                seen += 1
    assert 1000 < seen < 27000 and len({item.hops for item in plan}) >= 2 and len(plan) > 6
    # where only the number of links changes, one contact begins as the other ends
    by_node = [[item for item in plan if item.node == node] for node in network.nodes]
    gaps_s = [after.from_s - item.to_s for row in by_node for item, after in zip(row, row[1:])]
    assert gaps_s.count(0.0) > 3 and all(gap_s == 0.0 or gap_s > 0.1 for gap_s in gaps_s)
    # the twin's steps count the same seconds
    state = contact.at(network, 100.0)
    for _ in range(40):
        state = contact.step(network, state, 50.0)
    assert state.contact_s == pytest.approx([total_s[node] for node in network.nodes], abs=0.2)


def test_a_plan_goes_into_routing_there_and_back():
    case = net("altitude_km = 550\ninclination_deg = 53\nper_plane = 12", "gateway = 3\nisl_rate_bps = 1e6", (3, 4))
    plan = contact.contact_plan(case, 0.0, 600.0, 60.0)
    assert [(item.node, item.hops, item.rate_bps) for item in plan] == [("sat-3", 0, None), ("sat-4", 1, 1e6)]
    routed = contacts.plan(contact.one_way(plan, "hub"))
    assert [(item.source, item.target) for item in routed.contacts] == [("hub", "sat-4"), ("sat-4", "hub")]
    side_s = 2 * 6928.137 * math.sin(math.radians(15.0)) / LIGHT_KM_S
    sent = routed.send(0, 125_000, 10.0)  # a million bits
    assert sent.arrive_s == pytest.approx(11.0 + side_s, abs=1e-9)


def test_edges_do_not_hang_on_the_step():
    case = net("altitude_km = 550\ninclination_deg = 53\nper_plane = 12", GROUND.format(at=20, up=10), (0, 6))
    coarse = contact.contact_plan(case, 0.0, 20000.0, 60.0)
    fine = contact.contact_plan(case, 0.0, 20000.0, 13.0)
    long = [item for item in fine if item.to_s - item.from_s > 60.0]
    assert len(long) > 3
    for item in long:
        assert any(
            abs(other.from_s - item.from_s) < 0.03 and other.hops == item.hops and other.node == item.node
            for other in coarse
        )


def test_a_plan_that_cannot_be_is_refused():
    case = net("per_plane = 2", "gateway = 0")
    for span in ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.0, math.nan, 1.0), (0.0, 1e9, 1.0)):
        with pytest.raises(LinkError, match="a plan"):
            contact.contact_plan(case, *span)
    with pytest.raises(LinkError, match=r"\[links\]"):
        contact.make(scenario.parse(HEAD + '[[board]]\nnode = "n"\nprofile = "any"\n'))
