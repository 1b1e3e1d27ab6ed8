"""When a scenario's satellites reach the hub of the data plane, over how many links, how late and how fast. Pure.

The hub is a ground station or a gateway satellite. At each moment one search of shortest paths (Dijkstra, by delay) goes out
from it through the constellation; everything is O(satellites + links). Every figure is emulated: geometry and the mission's own
rates, imposed on nothing here. Leaves out queues, capacity shared between satellites, pointing, weather and protocols.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from firmware_sim import links, orbit, paths, satellite, sun
from firmware_sim.links import LinkError
from firmware_sim.orbit import DAY_S, Orbits
from firmware_sim.scenario import Scenario

EDGE_S = 0.01  # how finely the begin and end of a contact are found
LOOK_S = 10.0  # mission time between two looks in a step
MOST_LOOKS = 20  # in one step, whatever its length
MOST_PLAN_LOOKS = 1_000_000
NEAREST_KM = 1e-3  # planes cross: two satellites of a model may stand in one point
NO_PATH = -1


@dataclass(frozen=True)
class Network:
    """Who relays (`orbits`), which of them stand behind boards (`wanted`, in the order of `nodes`) and which pairs (m, 2) may link.

    `gateway`: number of a relay, or None for a ground station at `station_km` (Earth-fixed axes, (3,)) that reaches what stands
    at `least_elevation_rad` or higher and no farther than `longest_gsl_km`. `epoch_days`: UTC days from J2000 to time 0.
    """

    nodes: tuple[str, ...]
    orbits: Orbits
    wanted: np.ndarray
    pairs: np.ndarray
    longest_isl_km: float
    isl_rate_bps: float
    epoch_days: float = 0.0
    gateway: int | None = None
    station_km: np.ndarray | None = None
    least_elevation_rad: float = 0.0
    longest_gsl_km: float = np.inf
    gsl_rate_bps: float = np.inf


@dataclass(frozen=True)
class Reach:
    """The way from the hub to each wanted satellite at `time_s`, each (n,): `hops` links (NO_PATH where there is no way, 0 at
    the gateway itself), `delay_s` one way (NaN where there is none), `rate_bps` of the slowest link (NaN where there is no way
    or no link). `contact_s`: how long there was a way so far.
    """

    time_s: float
    hops: np.ndarray
    delay_s: np.ndarray
    rate_bps: np.ndarray
    contact_s: np.ndarray

    @property
    def up(self) -> np.ndarray:
        return self.hops != NO_PATH


@dataclass(frozen=True)
class Contact:
    """From `from_s` to `to_s` (mission time) there is a way of `hops` links to the node's satellite; `delay_s`: least and most of
    the moments looked at, one way; `rate_bps`: of the slowest link, None at the gateway itself."""

    node: str
    from_s: float
    to_s: float
    delay_s: tuple[float, float]
    rate_bps: float | None
    hops: int


@dataclass(frozen=True)
class OneWay:
    """A contact as routing takes it (ground_station.contacts): `source` may send to `target`."""

    source: str
    target: str
    from_s: float
    to_s: float
    delay_s: float
    rate_bps: float


def make(scenario: Scenario) -> Network:
    """The network of a scenario with a table [links].  Raises: LinkError."""
    chosen = scenario.links
    if chosen is None:
        raise LinkError("the scenario has no links; add a table [links]")
    shape = scenario.constellation
    every, wanted, gateway = (
        satellite.orbits_of(scenario),
        [board.satellite for board in scenario.boards],
        chosen.gateway,
    )
    if chosen.topology == "grid":
        relays = list(range(shape.satellites))
        delta = shape.kind == "delta"
        pairs = paths.plus_grid(
            shape.planes,
            shape.per_plane,
            shift=-round(shape.phasing / shape.planes),
            seam=delta,
            seam_shift=shape.phasing if delta else 0,
        )
    else:
        relays = list(dict.fromkeys(wanted if gateway is None else [*wanted, gateway]))
        pairs = np.stack(np.triu_indices(len(relays), 1), axis=1)
    place = {number: index for index, number in enumerate(relays)}
    orbits = Orbits(
        every.radius_km[relays], every.inclination_rad[relays], every.raan_rad[relays], every.argument_rad[relays]
    )
    # all are at one altitude, so a length says whether there is a line of sight
    longest_km = float(links.longest_isl_km(shape.altitude_km))
    if chosen.longest_isl_km is not None:
        longest_km = min(longest_km, chosen.longest_isl_km)
    network = Network(
        tuple(board.node for board in scenario.boards),
        orbits,
        np.array([place[number] for number in wanted]),
        pairs,
        longest_km,
        chosen.isl_rate_bps,
        sun.j2000_days(scenario.time.start),
    )
    if gateway is not None:
        return replace(network, gateway=place[gateway])
    return replace(
        network,
        station_km=links.ground_km(chosen.latitude_deg, chosen.longitude_deg, chosen.height_km),
        least_elevation_rad=float(np.radians(chosen.least_elevation_deg or 0.0)),
        longest_gsl_km=np.inf if chosen.longest_gsl_km is None else chosen.longest_gsl_km,
        gsl_rate_bps=chosen.gsl_rate_bps,
    )


def at(network: Network, time_s: float) -> Reach:
    """The ways from the hub at a moment of mission time; `contact_s` is 0."""
    positions_km = orbit.positions_km(network.orbits, time_s)
    lengths_km = np.maximum(paths.lengths_km(positions_km, network.pairs), NEAREST_KM)
    graph = paths.graph(len(network.orbits), network.pairs, lengths_km, network.longest_isl_km)
    if network.gateway is None:
        station_km = links.ground_teme_km(network.station_km, network.epoch_days + time_s / DAY_S)
        reached, distance_km = links.in_range(station_km, positions_km, network.longest_gsl_km)
        high = links.elevation_rad(station_km, positions_km[reached]) >= network.least_elevation_rad
        total_km, before = paths.shortest_from_ground(graph, reached[high], distance_km[high])
    else:
        (total_km,), (before,) = paths.shortest(graph, np.array([network.gateway]))
    total_km = total_km[network.wanted]
    there = np.isfinite(total_km)
    hops, here = np.full(there.shape, 1 if network.gateway is None else 0), network.wanted
    while True:
        back = before[here]
        more = there & (back >= 0)
        if not more.any():
            break
        hops, here = hops + more, np.where(more, back, here)
    if network.gateway is None:
        rate_bps = np.where(hops > 1, min(network.gsl_rate_bps, network.isl_rate_bps), network.gsl_rate_bps)
    else:
        rate_bps = np.where(hops > 0, network.isl_rate_bps, np.nan)
    return Reach(
        time_s,
        np.where(there, hops, NO_PATH),
        np.where(there, links.delay_s(total_km), np.nan),
        np.where(there, rate_bps, np.nan),
        np.zeros(there.shape),
    )


def step(network: Network, before: Reach, dt_s: float) -> Reach:
    """The ways `dt_s` later, with `contact_s` carried on; the edges of contacts are found to EDGE_S.

    Looks every LOOK_S, or MOST_LOOKS times in a longer step: a contact or a gap that lies between two looks is not seen.
    """
    looks = min(MOST_LOOKS, max(1, int(np.ceil(dt_s / LOOK_S))))
    contact_s, last = before.contact_s, before
    for time_s in before.time_s + dt_s * np.arange(1, looks + 1) / looks:
        for now in _between(network, last, at(network, float(time_s))):
            contact_s = contact_s + (now.time_s - last.time_s) * 0.5 * (last.up.astype(float) + now.up)
            last = now
    return replace(last, contact_s=contact_s)


def contact_plan(scenario: Scenario, start_s: float, end_s: float, step_s: float) -> tuple[Contact, ...]:
    """All contacts from `start_s` to `end_s` of mission time, looked for every `step_s`, in the order in which they begin.

    A stretch of constant `hops` is one contact: where the way changes to another number of links the next one begins at that
    moment. Edges are found to EDGE_S by bisection, and no contact claims more than was seen. One that lies wholly between two
    looks is missed.  Raises: LinkError.
    """
    if not (np.isfinite([start_s, end_s]).all() and start_s < end_s and 0.0 < step_s < np.inf):
        raise LinkError(f"a plan from {start_s} to {end_s} s by {step_s} s; give a later end and a step above 0")
    count = int(np.ceil((end_s - start_s) / step_s))
    if count > MOST_PLAN_LOOKS:
        raise LinkError(f"a plan of {count} looks; give a step of {(end_s - start_s) / MOST_PLAN_LOOKS:g} s or more")
    network = make(scenario)
    last = at(network, start_s)
    from_s, least_s, most_s = np.full(len(network.nodes), start_s), last.delay_s, last.delay_s
    found: list[Contact] = []

    def close(i: int, to_s: float) -> None:
        if last.up[i] and to_s > from_s[i]:
            rate_bps = None if np.isnan(last.rate_bps[i]) else float(last.rate_bps[i])
            delays = (float(least_s[i]), float(most_s[i]))
            found.append(Contact(network.nodes[i], float(from_s[i]), to_s, delays, rate_bps, int(last.hops[i])))

    for number in range(1, count + 1):
        for now in _between(network, last, at(network, min(start_s + number * step_s, end_s))):
            changed = now.hops != last.hops
            for i in np.flatnonzero(changed):
                close(i, now.time_s if now.up[i] else last.time_s)
            from_s = np.where(changed, now.time_s, from_s)
            least_s = np.where(changed, now.delay_s, np.minimum(least_s, now.delay_s))
            most_s = np.where(changed, now.delay_s, np.maximum(most_s, now.delay_s))
            last = now
    for i in range(len(network.nodes)):
        close(i, end_s)
    return tuple(sorted(found, key=lambda contact: (contact.from_s, contact.node)))


def one_way(plan: tuple[Contact, ...], hub: str) -> tuple[OneWay, ...]:
    """Each contact there and back between `hub` and its node, with its longest delay. A node at the gateway itself has none: it
    is where the hub is."""
    return tuple(
        OneWay(source, target, item.from_s, item.to_s, item.delay_s[1], item.rate_bps)
        for item in plan
        if item.rate_bps is not None
        for source, target in ((hub, item.node), (item.node, hub))
    )


def _between(network: Network, first: Reach, second: Reach) -> Iterator[Reach]:
    """Looks after `first` up to `second`, so that whatever differs between two of them lies within EDGE_S."""
    if second.time_s - first.time_s > EDGE_S and (first.hops != second.hops).any():
        middle = at(network, 0.5 * (first.time_s + second.time_s))
        yield from _between(network, first, middle)
        yield from _between(network, middle, second)
    else:
        yield second
