"""The moving network of a whole constellation, for studies: links slot by slot, gateways of a model's layers, path delays.

One slot's network at a time, so memory is O(satellites). What `study space-xnet` and `sim run` share. Leaves out queues, link rates (at
100 Gb/s a hidden state takes no time) and ground stations.

Letters: L layers, N satellites, C slots. Satellite number = plane * per_plane + place in the plane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from firmware_sim import links, orbit, paths
from firmware_sim.scenario import Constellation

GATEWAYS = ("central", "ring", "anywhere")


@dataclass(frozen=True)
class Links:
    """Four links per satellite at most: to the next in its plane on both sides, and to its neighbours in the planes beside it (over the
    seam only in a Walker delta, in a star the planes there move against each other).

    `survival`: chance that a link holds in a slot, drawn anew for each slot; `slew_limit_rad_s`: a link whose direction turns faster is
    left out. A link also ends where its line of sight comes within 80 km of the ground.
    """

    survival: float = 1.0
    slew_limit_rad_s: float = np.inf


def orbits_of(shape: Constellation) -> orbit.Orbits:
    """All satellites, at time 0."""
    return orbit.walker(
        shape.kind,
        shape.altitude_km,
        shape.inclination_deg,
        shape.planes,
        shape.per_plane,
        shape.phasing,
        shape.raan_deg,
        shape.argument_deg,
    )


def networks(shape: Constellation, rules: Links, slots: int, slot_s: float, seed: int) -> Iterator[tuple[Any, int]]:
    """Per slot the graph of one-way delays in ms (csr [N, N]), and how many links were left out for their slew. The same arguments
    give the same graphs."""
    rng = np.random.default_rng([seed, 1])
    orbits = orbits_of(shape)
    delta = shape.kind == "delta"
    pairs = paths.plus_grid(
        shape.planes,
        shape.per_plane,
        shift=-round(shape.phasing / shape.planes),
        seam=delta,
        seam_shift=shape.phasing if delta else 0,
    )
    longest_km = float(links.longest_isl_km(shape.altitude_km))
    for slot in range(slots):
        here, next_s = orbit.positions_km(orbits, slot * slot_s), orbit.positions_km(orbits, slot * slot_s + 1.0)
        line, then = here[pairs[:, 1]] - here[pairs[:, 0]], next_s[pairs[:, 1]] - next_s[pairs[:, 0]]
        slew = np.linalg.norm(np.cross(line, then - line), axis=1) / np.sum(line * line, axis=1)
        length_km = paths.lengths_km(here, pairs)
        good = (slew < rules.slew_limit_rad_s) & (rng.random(len(pairs)) < rules.survival) & (length_km <= longest_km)
        delay_ms = links.delay_s(length_km) * 1e3
        yield paths.graph(len(here), pairs[good], delay_ms[good]), int((slew >= rules.slew_limit_rad_s).sum())


def gateways(kind: str, layers: int, shape: Constellation, rng: np.random.Generator) -> np.ndarray:
    """The satellite [L] that is each layer's gateway, all different. "central": at the layer's place, in the middle plane; "ring": there
    in a plane drawn at random (two layers of one place: a plane of its own each); "anywhere": drawn at random.

    `rng` is used alike for every kind, so that a study may compare kinds on the same draw.
    """
    place = np.arange(layers) * shape.per_plane // layers
    first = np.searchsorted(place, place)  # of the layers that share a place
    drawn = rng.integers(0, shape.planes, layers)
    anywhere = rng.choice(shape.satellites, layers, replace=False)
    if kind == "anywhere":
        return anywhere
    plane = drawn[first] if kind == "ring" else shape.planes // 2
    return (plane + np.arange(layers) - first) % shape.planes * shape.per_plane + place


def there_ms(graph: Any, gateways: np.ndarray) -> np.ndarray:
    """One way from each layer's gateway to each satellite [L, N], float32 (infinite where no path is)."""
    return paths.shortest(graph, gateways)[0].astype(np.float32)


def path_ms(there: np.ndarray, gateways: np.ndarray, own: bool = False) -> np.ndarray:
    """[..., L, N] from there [..., L, N]: gateway of the layer -> satellite -> gateway of the next layer, the last layer's next is the
    first's; `own`: back by its own gateway."""
    if own:
        on = there[..., np.arange(len(gateways)), np.roll(gateways, -1)]
        return 2 * there + on[..., None]
    return there + np.roll(there, -1, axis=-2)
