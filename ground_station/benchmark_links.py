"""`spacemoe benchmark links`: hidden states over emulated links, measured on agents beside the plan; and what the links' state is used for.

Four stock agents on loopback answer through PacedLink over a contact plan of one contact each way per node. Every flight, a request and
its answer, is measured without the node's own time and compared with the plan, computed here from the frames' sizes: delay + size /
rate, both ways. Then the same agents read the same text with one node at a tenth of the rate, at one level for all and with rates
that follow the link. Every time over a link is emulated. The held-out text's part is benchmark_links_text.py.
Leaves out: contacts that end (tests), more than one hop.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ground_station import contacts, rates, selection
from ground_station.benchmark_links_text import (
    FOLLOWING_LEVEL,
    NODES,
    HeldOut,
    following,
    ladder,
    layer_s_for,
    slow_links,
)
from ground_station.broker import Broker
from ground_station.contacts import Contact, ContactPlan
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.link import Link
from ground_station.link_ways import Planned
from ground_station.local_fleet import LocalFleet, cores_of
from ground_station.paced_link import Flown, PacedLink
from ground_station.placement import round_robin
from ground_station.remote import RemoteExperts
from ground_station.run_folder import run_folder
from ground_station.trunk import Trunk
from node_agent import shard

GROUND = "ground"
LIMIT_PERCENT = 2.0
LONG_S = 1e6
TIMEOUT_S = 5.0
MEASURED_BITS = 1.5  # of the held-out part's settings, the one that agents decode with


@dataclass(frozen=True)
class Case:
    """A link that all nodes have."""

    rate_bps: float
    delay_s: float


Links = dict[str, tuple[float, float]]
"""node -> (bit/s, seconds one way)."""

CASES = (Case(1e6, 0.120), Case(1e7, 0.020), Case(1e8, 0.005))


def open_plan(nodes: list[str], rate_bps: list[float], delay_s: list[float]) -> ContactPlan:
    """One contact each way that does not end."""
    return contacts.plan(
        Contact(source, target, 0.0, LONG_S, delay, rate)
        for node, rate, delay in zip(nodes, rate_bps, delay_s)
        for source, target in ((GROUND, node), (node, GROUND))
    )


@dataclass
class _Times:
    """Of the tokens of a text: seconds each, in all and in exchanges; of every flight the plan, and how much longer it took."""

    token_s: list[float] = field(default_factory=list)
    link_s: list[float] = field(default_factory=list)
    plan_s: list[float] = field(default_factory=list)
    error_percent: list[float] = field(default_factory=list)
    bytes: int = 0


class _Bench:
    """Agents that serve a bundle without replicas, and a trunk."""

    def __init__(self, bundle: Path, manifest: shard.Manifest, table: Table, link: Link):
        self.manifest, self.table, self.link = manifest, table, link
        self._topk = selection.make("topk", manifest.routing, manifest.dims.top_k, manifest.dims.experts)
        self._trunk = Trunk(bundle, manifest)

    def feed(self, ids: list[int], codec: str, links: Links, allocator: rates.Allocator | None = None) -> _Times:
        """Decodes these tokens one by one over the links.  Raises: RuntimeError when the ladder was used."""
        times = _Times()

        def flown(flight: Flown) -> None:
            rate_bps, delay_s = links[flight.node]
            size_bytes = flight.sent_bytes + flight.received_bytes
            plan_s = 2 * delay_s + 8 * size_bytes / rate_bps
            times.plan_s.append(plan_s)
            times.error_percent.append(100 * (flight.measured_s / plan_s - 1))
            times.bytes += size_bytes

        plan = open_plan([*links], *([*column] for column in zip(*links.values())))
        paced = PacedLink(self.link, Planned(plan, GROUND, time.monotonic()), flown)
        remote = RemoteExperts(paced, self.table, codec, None, TIMEOUT_S, allocator)
        decoder = Decoder(self._trunk, self._topk, remote)
        sequence = self._trunk.sequence(len(ids))
        for token in ids:
            before_s, began_s = paced.imposed.link_s, time.perf_counter()
            sequence.step(token, decoder.moe)
            times.token_s.append(time.perf_counter() - began_s)
            times.link_s.append(paced.imposed.link_s - before_s)
        if rungs := remote.traffic.rungs:
            raise RuntimeError(
                f"the ladder was used ({rungs[0].rung}, {rungs[0].reason}): close other programs and measure again"
            )
        return times


def _spread(values: list[float], digits: int = 4) -> dict:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }


def _case_row(bench: _Bench, case: Case, texts: list[list[int]]) -> dict:
    """A link on some texts, q8: every flight (request and answer) beside delay + size / rate, both ways."""
    rounds = [
        bench.feed(ids, "q8", {node: (case.rate_bps, case.delay_s) for node in bench.table.nodes}) for ids in texts
    ]
    tokens = sum(map(len, texts))
    errors = [error for times in rounds for error in times.error_percent]
    return {
        "rate_bps": case.rate_bps,
        "delay_s": case.delay_s,
        "bytes_per_token": round(sum(times.bytes for times in rounds) / tokens, 1),
        "flight_plan_ms": round(1e3 * statistics.mean(s for times in rounds for s in times.plan_s), 4),
        "flight_error_percent": _spread(errors),
        "round_error_percent": [round(statistics.median(times.error_percent), 4) for times in rounds],
        "link_ms_per_token": round(1e3 * statistics.mean(s for times in rounds for s in times.link_s), 3),
        "measured_ms_per_token": _spread([1e3 * statistics.mean(times.token_s) for times in rounds], 3),
        "tokens": tokens,
        "within": abs(statistics.median(errors)) <= LIMIT_PERCENT,
        "p99_within": sorted(map(abs, errors))[int(0.99 * len(errors))] <= LIMIT_PERCENT,
    }


def _slow_node(bench: _Bench, bundle: Path, texts: list[list[int]], step: Callable[[], None]) -> dict:
    """One node at a tenth of the rate, with one level for all and with rates that follow the link, measured."""
    sensitivity = rates.Sensitivity.read(bundle, bench.manifest)
    whole = slow_links()
    links = dict(zip(bench.table.nodes, zip(whole.rate_bps.tolist(), whole.delay_s.tolist())))
    ms: dict[str, list[float]] = {"uniform": [], "following": []}
    link_ms: dict[str, list[float]] = {"uniform": [], "following": []}
    for ids in texts:
        for name in ms:
            allocator = rates.Allocator(sensitivity, rates.LEVEL if name == "uniform" else FOLLOWING_LEVEL)
            if name == "following":
                hidden = bench.manifest.dims.hidden
                allocator.follow(slow_links(layer_s_for(MEASURED_BITS, hidden)), hidden)
            times = bench.feed(ids, "importance", links, allocator)
            ms[name].append(1e3 * statistics.mean(times.token_s))
            link_ms[name].append(1e3 * statistics.mean(times.link_s))
        step()
    return {
        "level": rates.LEVEL,
        "following_level": FOLLOWING_LEVEL,
        "bits_on_slow_link": MEASURED_BITS,
        "measured_ms_per_token": {name: _spread(values, 2) for name, values in ms.items()},
        "link_ms_per_token": {name: round(statistics.mean(values), 2) for name, values in link_ms.items()},
        "tokens": sum(map(len, texts)),
    }


def run(bundle: Path, heldout: Path, rounds: int = 3, tokens: int = 24, text_tokens: int = 2560) -> dict:
    """The figures of `spacemoe benchmark links --json`.

    Raises: shard.BundleError, local_fleet.FleetError, evaluate.EvaluationError, experiment_text.TextTooShort, RuntimeError where
    the machine was so busy that agents did not answer in time.
    """
    from tqdm import tqdm

    text = HeldOut(bundle, heldout, text_tokens)
    manifest = text.manifest
    names = {f"node-{n + 1}": 2**62 for n in range(NODES)}
    holdings = round_robin(manifest, names, manifest.precisions[0])
    parts = [text.texts[round_ % len(text.texts)][:tokens].tolist() for round_ in range(rounds)]
    with tqdm(desc="benchmark", disable=None, leave=False) as bar:

        def step() -> None:
            bar.update()

        with run_folder("benchmark") as folder, Link() as link, Broker(folder) as broker:
            with LocalFleet(folder, bundle, holdings, link.endpoint, (broker.host, broker.port)) as fleet:
                fleet.wait_joined(link)
                bench = _Bench(bundle, manifest, Table(holdings, cores_of(names)), link)
                rows = []
                for case in CASES:
                    rows.append(_case_row(bench, case, parts))
                    step()
                slow = _slow_node(bench, bundle, parts, step)
        follow = following(text, step)
        rungs = ladder(text, step)
    return {
        "bundle": manifest.name,
        "emulated": True,
        "nodes": NODES,
        "n": rounds,
        "limit_percent": LIMIT_PERCENT,
        "links": rows,
        "slow_node": slow,
        "following": follow,
        "ladder": rungs,
        "holds": all(row["within"] for row in rows),
    }


def report(result: dict) -> str:
    """The figures in words."""
    lines = ["hidden states over paced links (emulated), four agents:"]
    for row in result["links"]:
        error = row["flight_error_percent"]
        lines.append(
            f"{row['rate_bps'] / 1e6:5g} Mb/s, {1e3 * row['delay_s']:3g} ms: a flight is to take {row['flight_plan_ms']:8.3f} ms, error "
            f"{error['median']:+.3f} % ({error['min']:+.3f} to {error['max']:+.3f}, n {error['n']})"
        )
        lines.append(
            f"    a token took {row['measured_ms_per_token']['median']:.2f} ms, {row['link_ms_per_token']:.2f} of them on links"
        )
    slow = result["slow_node"]
    lines += ["", "one node of four at a tenth of the rate (codec importance), measured on the agents:"]
    for name, each in slow["measured_ms_per_token"].items():
        plan = slow["link_ms_per_token"][name]
        lines.append(
            f"  {name:10} {each['median']:7.1f} ms per token ({each['min']:.1f} to {each['max']:.1f}, n {each['n']}), "
            f"{plan:.1f} of them on links"
        )
    follow = result["following"]
    lines += [
        "",
        f"the same on {follow['tokens']} tokens of held-out text, time on links by the plan; (least, most) of {follow['draws']} draws:",
    ]
    for row in follow["equal_perplexity"]:
        lines.append(f"  +{row['loss_percent']:g} % perplexity: {_pair(row, 'ms per token')}")
    for row in follow["equal_time"]:
        lines.append(f"  {row['ms_per_token']:g} ms per token: {_pair(row, '% of perplexity lost')}")
    rungs = result["ladder"]
    lines += [
        "",
        f"one node of four dead, no replicas, {rungs['tokens']} tokens: perplexity over that of all nodes, mean of four",
    ]
    for name, row in rungs["rungs"].items():
        lines.append(f"  {name.replace('_', ' '):36}{row['perplexity_ratio']:.3f}")
    if not result["holds"]:
        lines.append(
            f"not within {result['limit_percent']:g} %: was the machine busy? close other programs and measure again"
        )
    return "\n".join(lines)


def _pair(row: dict, unit: str) -> str:
    if row["ratio"] is None:
        return f"uniform {row['uniform'] or '-'}, following {row['following'] or '-'} {unit}: outside one of the curves"
    spread = "" if row["ratio_of_draws"] is None else " ({}, {})".format(*row["ratio_of_draws"])
    return f"uniform {row['uniform']:g}, following {row['following']:g} {unit}: ratio {row['ratio']:.3f}{spread}"
