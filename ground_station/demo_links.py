"""What `spacemoe demo --scenario FILE --links` adds: the ways to the hub imposed on hidden states, and the ledger's part about it.

The ways are those that the twin steps and shows; each mission moment's delay and rate hold in real seconds, also where the scenario's time
runs faster, and contacts come and go at the scenario's pace. Everything is emulated. When no board at all is in contact a layer waits
for the first, up to HOLD_S of real time. Leaves out: telemetry and commands, which are not held up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from firmware_sim.scenario import Scenario
from ground_station.link import Link
from ground_station.link_ways import Live
from ground_station.paced_link import PacedLink
from ground_station.rates import Allocator, Links
from node_agent import shard

if TYPE_CHECKING:
    from firmware_sim.contact import Reach

HOLD_S = 60.0
RADIO_W = 8.0  # assumed of a satellite's radio while it sends or receives: a byte takes 8 RADIO_W / rate joules


class NoLinks(ValueError):
    """Links are to be imposed and there are none; the text names the next step."""


def check(scenario: Scenario | None) -> None:
    """Raises: NoLinks."""
    if scenario is None:
        raise NoLinks("--links imposes a scenario's links: give --scenario FILE too")
    if scenario.links is None:
        raise NoLinks(f"scenario {scenario.name} has no links: add a table [links], or leave --links out")


def check_rates(links: bool, link_ms: float | None, codec: str, record: object) -> None:
    """Raises: NoLinks for a time limit that nothing could keep, or rates that a recording does not hold."""
    if link_ms is not None and not (links and codec == "importance" and 0 < link_ms < math.inf):
        raise NoLinks(
            "--link-ms MS steers rates over imposed links: give it with --links and --codec importance, above 0"
        )
    if links and codec == "importance" and record is not None:
        raise NoLinks("--record does not hold rates that follow links: leave out --links, or take another --codec")


def impose(link: Link, scenario: Scenario, reach: Callable[[], Reach]) -> PacedLink:
    """`reach`: the twin's newest state of the ways, in the order of the scenario's boards."""
    return PacedLink(link, Live(tuple(board.node for board in scenario.boards), reach), hold_s=HOLD_S)


def follow(
    allocator: Allocator,
    ways: Live,
    nodes: list[str],
    dims: shard.Dims,
    link_ms: float | None,
    prices: Callable[[], tuple[np.ndarray, np.ndarray] | None],
) -> None:
    """Rates of the codec follow the links: each pass asks for their state and for `prices`, (nats per joule, nats per byte) [N] of `nodes`.

    `link_ms`: milliseconds that the messages of a token may be under way in all layers. A node out of contact counts as free: it
    is not asked.
    """
    layer_s = math.inf if link_ms is None else link_ms / 1e3 / dims.layers

    def links() -> Links:
        known = ways.rates()
        rate_bps, delay_s = (np.array(column) for column in zip(*(known.get(node, (math.inf, 0.0)) for node in nodes)))
        now = prices()
        joule, byte = (np.zeros(len(nodes)),) * 2 if now is None else now
        return Links(rate_bps, delay_s, byte, joule, 8 * RADIO_W / rate_bps, layer_s)

    allocator.follow(links, dims.hidden)


def part(
    paced: PacedLink, ways: Live, out_of_contact: Mapping[str, int], nodes: list[str], allocator: Allocator | None
) -> dict:
    """The ledger's part (JSON). `out_of_contact`, `allocator`: remote.RemoteExperts'; rates follow where there is one."""
    imposed = paced.imposed
    levels = np.array(allocator.used) if allocator is not None and allocator.used else None
    return {
        "emulated": True,
        "imposed_on": "hidden states, both ways",
        "exchanges": imposed.exchanges,
        "messages": imposed.messages,
        "bytes": imposed.bytes,
        "link_s": round(imposed.link_s, 3),
        "exchange_s": round(imposed.waited_s, 3),
        "held_without_contact_s": round(imposed.held_s, 3),
        "latest_ms": round(1e3 * imposed.late_s, 3),
        "delay_ms": {
            node: [round(1e3 * least, 3), round(1e3 * most, 3)] for node, (least, most) in sorted(ways.delays_s.items())
        },
        "levels": None
        if levels is None
        else {
            node: [round(float(least), 5), round(float(most), 5)]
            for node, least, most in zip(nodes, levels.min(0), levels.max(0))
        },
        "radio_w_assumed": None if levels is None else RADIO_W,
        "misses": dict(sorted(imposed.misses.items())),
        "rungs_out_of_contact": dict(out_of_contact),
    }


def lines(links: dict | None) -> list[str]:
    """The same as text of at most 80 columns."""
    if links is None:
        return []
    rungs = ", ".join(f"{rung} {count}" for rung, count in links["rungs_out_of_contact"].items())
    delays = [delay for pair in links["delay_ms"].values() for delay in pair]
    span = f"{min(delays):.1f}-{max(delays):.1f} ms one way" if delays else "no contact"
    return [
        f"links, whole run (emulated, imposed on hidden states): {span},",
        f"  {links['link_s']:.1f} s on links, {links['held_without_contact_s']:.1f} s without any contact, "
        f"{sum(links['misses'].values())} misses",
        f"  ladder for want of contact: {rungs or 'not used'}",
    ]
