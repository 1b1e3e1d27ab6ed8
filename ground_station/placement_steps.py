"""The steps of the local search behind `budgeted`: change one expert's copies, add copies by gain per byte, swap two experts.

Each goes once over the experts, takes what lowers the objective and returns by how much. Leaves out: starts, kicks and the order
of the steps (placement_budgeted); what a change costs (placement_search).
"""

from __future__ import annotations

import numpy as np

from ground_station.placement_problem import Copy
from ground_station.placement_search import MIN_GAIN_MS, Search

PATIENCE = 10  # offers in a row for which no room could be made: those after them are worth less per byte
EVICTIONS = 3  # copies that are tried in turn to make room for another


def _values(search: Search, layer: int, expert: int, nodes: np.ndarray) -> tuple[np.ndarray, dict, np.ndarray]:
    """Of one expert: offers [C, nodes, V]; the cost [C] of each of its copies by node; the cost [C] of none."""
    served, missed = search.offers(layer, expert, nodes)
    at = {int(node): i for i, node in enumerate(nodes)}
    own = {node: served[:, at[node], variant] for node, variant in search.held[layer, expert].items()}
    return served, own, missed


def _nodes_for(search: Search, layer: int, expert: int) -> np.ndarray:
    extra = [node for node in search.held[layer, expert] if not search.candidates[layer, node]]
    return np.append(search.near[layer], extra).astype(int) if extra else search.near[layer]


def each(search: Search) -> float:
    """For every expert the best of: move a copy, change its precision, drop it."""
    gain = 0.0
    for layer, expert in search.held:
        nodes = _nodes_for(search, layer, expert)
        served, own, missed = _values(search, layer, expert, nodes)
        held = search.held[layer, expert]
        price = search.price[layer, expert]
        now = np.minimum(missed, np.min(list(own.values()), axis=0)).sum()
        options: list[tuple[float, list[Copy], list[Copy]]] = []
        for node, variant in held.items():
            old = Copy(layer, expert, node, variant)
            rest = np.minimum(missed, np.min([own[n] for n in held if n != node] or [missed], axis=0))
            if len(held) > 1:
                lost = search.dark[layer, expert, len(held) - 1] - search.dark[layer, expert, len(held)]
                options.append((now - rest.sum() + price[node, variant] - lost, [old], []))
            value = now - np.minimum(rest[:, None, None], served).sum(0) + price[node, variant] - price[nodes]
            room = np.minimum(search.free[nodes], search.fleet + search.sizes[variant])[:, None] >= search.sizes
            room |= (nodes[:, None] == node) & (
                search.sizes <= search.sizes[variant] + min(search.free[node], search.fleet)
            )
            taken = np.isin(nodes, [n for n in held if n != node])
            value[taken] = -np.inf
            value[:, search.sizes > search.sizes[variant]] = -np.inf  # growing competes with replicas, by gain per byte
            value[np.flatnonzero(nodes == node), variant] = -np.inf
            for allowed in (room, ~room):
                i, v = np.unravel_index(int(np.argmax(np.where(allowed, value, -np.inf))), value.shape)
                options.append(
                    (
                        float(value[i, v]) if allowed[i, v] else -np.inf,
                        [old],
                        [Copy(layer, expert, int(nodes[i]), int(v))],
                    )
                )
        for value, remove, add in sorted(options, key=lambda option: -option[0])[:3]:
            if value > MIN_GAIN_MS:
                fits = search.fits(remove, add)
                fall = search.attempt(remove, add) if fits else _make_room(search, remove, add[0])
                gain += fall
                if fall:
                    break
    return gain


def add(search: Search) -> float:
    """Copies by gain per byte, the best first, as far as they still help when their turn comes."""
    offers, gain = [], 0.0
    for layer, expert in search.held:
        nodes = _nodes_for(search, layer, expert)
        served, own, missed = _values(search, layer, expert, nodes)
        now = np.minimum(missed, np.min(list(own.values()), axis=0))
        value = (now[:, None, None] - np.minimum(now[:, None, None], served)).sum(0) - search.price[
            layer, expert, nodes
        ]
        count = len(search.held[layer, expert])
        value[np.isin(nodes, list(search.held[layer, expert]))] = -np.inf
        if count < len(search.problem.nodes):
            value = value + search.dark[layer, expert, count] - search.dark[layer, expert, count + 1]
        value = value / search.sizes
        for node, variant in search.held[layer, expert].items():
            offers += _growths(search, Copy(layer, expert, node, variant), nodes, served, own, missed, now)
        room = np.minimum(search.free[nodes], search.fleet)[:, None] >= search.sizes
        for allowed in (room, ~room):
            if not allowed.any():
                continue
            i, v = np.unravel_index(int(np.argmax(np.where(allowed, value, -np.inf))), value.shape)
            if np.isfinite(value[i, v]) and value[i, v] > 0:
                offers.append((float(value[i, v]), Copy(layer, expert, int(nodes[i]), int(v)), None))
    in_vain = 0
    for _, new, old in sorted(offers, key=lambda offer: (-offer[0], offer[1])):
        held = search.held[new.layer, new.expert]
        if (new.node in held) if old is None else (held.get(old.node) != old.variant):
            continue  # an offer before it has changed this expert
        remove = [] if old is None else [old]
        if search.fits(remove, [new]):
            gain += search.attempt(remove, [new], wide=old is None)
        elif in_vain < PATIENCE:
            fall = _make_room(search, remove, new)
            in_vain = 0 if fall else in_vain + 1
            gain += fall
    return gain


def _growths(search: Search, old: Copy, nodes, served, own, missed, now) -> list[tuple[float, Copy, Copy]]:
    """A copy in each larger variant: gain per byte more, the new copy, the old one."""
    found = []
    at = int(np.flatnonzero(nodes == old.node)[0])
    rest = np.minimum(missed, np.min([row for n, row in own.items() if n != old.node] or [missed], axis=0))
    price = search.price[old.layer, old.expert, old.node]
    for variant in np.flatnonzero(search.sizes > search.sizes[old.variant]):
        fall = float((now - np.minimum(rest, served[:, at, variant])).sum() - price[variant] + price[old.variant])
        if fall > MIN_GAIN_MS:
            more = int(search.sizes[variant] - search.sizes[old.variant])
            found.append((fall / more, old._replace(variant=int(variant)), old))
    return found


def _make_room(search: Search, remove: list[Copy], new: Copy) -> float:
    """Makes a change that lacks room, at the price of another copy: dropped where it has a sister, shrunk, or moved elsewhere.

    The least used are tried first, EVICTIONS of each kind.
    """
    problem = search.problem
    size = int(search.sizes[new.variant])
    back = sum(int(search.sizes[copy.variant]) for copy in remove if copy.node == new.node)
    here = size > search.free[new.node] + back
    smallest = int(search.sizes.argmin())
    drops, shrinks, moves = [], [], []
    for (layer, expert), held in search.held.items():
        if (layer, expert) == (new.layer, new.expert):
            continue
        for node in (new.node,) if here else held:
            if node not in held:
                continue
            copy, use = Copy(layer, expert, node, held[node]), problem.use[layer, expert]
            if len(held) > 1:
                drops.append((use, copy, []))
            if held[node] != smallest:
                shrinks.append((use, copy, [copy._replace(variant=smallest)]))
            if here:
                free = [n for n in search.near[layer] if n not in held and search.free[n] >= search.sizes[held[node]]]
                if free:
                    to = min(free, key=lambda n, layer=layer, v=held[node]: search.paths[layer, n] + search.solo[n, v])
                    moves.append((use, copy, [copy._replace(node=int(to))]))
    if len(shrinks) > 1:  # as many as it takes
        lack, several = size - back - int(min(search.free[new.node], search.fleet) if here else search.fleet), []
        for _, copy, instead in sorted(shrinks, key=lambda option: option[:2])[:3]:
            several.append((copy, instead[0]))
            lack -= int(search.sizes[copy.variant] - search.sizes[smallest])
            if lack <= 0:
                break
        if lack <= 0 and len(several) > 1:
            fall = search.attempt([*remove, *(a for a, _ in several)], [*(b for _, b in several), new])
            if fall:
                return fall
    for options in (drops, shrinks, moves):
        for _, copy, instead in sorted(options, key=lambda option: option[:2])[:EVICTIONS]:
            fall = search.attempt([*remove, copy], [*instead, new])
            if fall:
                return fall
    return 0.0


def swap(search: Search) -> float:
    """Two experts change all their homes, or two copies change nodes.

    Of pairs in different layers only those are tried that promise a gain in latency, heat left aside (unless a node is over its cap).
    """
    gain = 0.0
    keys = list(search.held)
    every = np.arange(len(search.problem.nodes))
    version = dict.fromkeys(range(search.problem.layers), 0)
    made: dict[tuple[int, int], tuple[int, tuple]] = {}

    def latency(key, homes: dict[int, int]) -> float:
        if key not in made or made[key][0] != version[key[0]]:
            weight, search.heat = search.heat, 0.0
            made[key] = (version[key[0]], search.offers(*key, every))
            search.heat = weight
        served, missed = made[key][1]
        return float(np.minimum(missed, served[:, list(homes), list(homes.values())].min(1)).sum())

    def attempt(first, second, homes: dict[int, int], others: dict[int, int]) -> float:
        """The first takes `others`, the second `homes`."""
        mine, theirs = search.held[first], search.held[second]
        if not all(search.candidates[first[0], n] for n in others) or not all(
            search.candidates[second[0], n] for n in homes
        ):
            return 0.0
        hot = (search.watts > search.cap).any()
        if first[0] != second[0] and not hot:
            before = latency(first, mine) + latency(second, theirs)
            after = latency(first, others) + latency(second, homes)
            if len(mine) != len(others):
                before += search.dark[first][len(mine)] + search.dark[second][len(theirs)]
                after += search.dark[first][len(others)] + search.dark[second][len(homes)]
            if after >= before - MIN_GAIN_MS:
                return 0.0
        remove = [Copy(*first, n, v) for n, v in mine.items() if others.get(n) != v]
        remove += [Copy(*second, n, v) for n, v in theirs.items() if homes.get(n) != v]
        add = [Copy(*first, n, v) for n, v in others.items() if mine.get(n) != v]
        add += [Copy(*second, n, v) for n, v in homes.items() if theirs.get(n) != v]
        fall = search.attempt(remove, add)
        if fall:
            version[first[0]] += 1
            version[second[0]] += 1
        return fall

    for i, first in enumerate(keys):
        for second in keys[i + 1 :]:
            mine, theirs = dict(search.held[first]), dict(search.held[second])
            if mine == theirs:
                continue
            gain += attempt(first, second, mine, theirs)
            for a in list(mine):
                for b in list(theirs):
                    mine, theirs = search.held[first], search.held[second]
                    if a == b or a not in mine or b not in theirs or b in mine or a in theirs:
                        continue
                    if len(mine) == len(theirs) == 1:
                        continue  # that was the exchange of all homes
                    others = {n: v for n, v in mine.items() if n != a} | {b: mine[a]}
                    homes = {n: v for n, v in theirs.items() if n != b} | {a: theirs[b]}
                    gain += attempt(first, second, homes, others)
    return gain
