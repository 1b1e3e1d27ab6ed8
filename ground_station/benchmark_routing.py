"""`spacemoe benchmark routing`: transfer times of shards over paced links, measured on a real agent, beside the contact plan.

A stock agent with nothing on its disk takes the shards of a bundle over loopback sockets, on which a contact's rate and delay are
imposed (absolute deadlines): every time here is emulated, and what is tested is that the imposed link is the planned one. A
transfer's time is from the first bit of its first chunk to the acknowledged write of the last; the offer before it is left out.
Leaves out: links that lose anything, and contacts that are not paced.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from ground_station import contacts
from ground_station.broker import Broker
from ground_station.contacts import Contact, ContactPlan
from ground_station.delivery import Delivered, Deliverer
from ground_station.delivery_pace import MAX_CHUNK_BYTES, chunk_bytes, wire_bytes
from ground_station.delivery_route import windows_over
from ground_station.local_fleet import LocalFleet
from ground_station.routes import earliest_arrival
from ground_station.run_folder import run_folder
from node_agent import delivery_frame, shard
from node_agent.delivery_frame import HEADER_BYTES, Message, Offer, Shard

NODE = "sat-1"
GROUND = "ground"
LIMIT_PERCENT = 2.0
LONG_S = 1e6
GAP_S = 0.5


@dataclass(frozen=True)
class Case:
    """A link, and the precision whose shard goes over it."""

    rate_bps: float
    delay_s: float
    precision: str


CASES = (Case(1e6, 0.120, "int4"), Case(1e7, 0.020, "int8"), Case(1e8, 0.005, "fp32"))
INTERRUPTED = CASES[1]


def open_link(case: Case, windows_s: tuple[tuple[float, float], ...] = ((0.0, LONG_S),)) -> ContactPlan:
    rows = (Contact(GROUND, NODE, from_s, to_s, case.delay_s, case.rate_bps) for from_s, to_s in windows_s)
    return contacts.plan(rows)


def planned_arrival_s(case: Case, sizes: tuple[int, ...], start_s: float) -> float:
    """When files of these sizes are at the node, headers included, if their first bit leaves at `start_s`."""
    route = earliest_arrival(open_link(case), GROUND, NODE, wire_bytes(sizes, case.rate_bps), start_s)
    return route.arrive_s


def interrupted_arrival_s(case: Case, offer_bytes: int, sizes: tuple[int, ...], ends_s: float, again_s: float) -> float:
    """The same for a contact from 0 to `ends_s` and one from `again_s` on, by hand: an offer and its answer, then chunks, in each."""
    byte_s = 8.0 / case.rate_bps
    before_s = offer_bytes * byte_s + 2 * case.delay_s  # of each contact, until the first chunk leaves
    room = (ends_s - before_s) / byte_s
    chunk = chunk_bytes(case.rate_bps)
    left = sum(sizes)
    for size in sizes:  # whole chunks while there is room, then a piece
        while size > 0:
            part = min(size, chunk, int(room) - HEADER_BYTES)
            if part < 1:
                break
            size, left, room = size - part, left - part, room - part - HEADER_BYTES
    return again_s + before_s + (left + HEADER_BYTES * -(-left // chunk)) * byte_s + case.delay_s


def _spread(values: list[float], digits: int = 4) -> dict:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }


class _Bench:
    """A deliverer, an agent without shards, and a bundle whose first expert goes there and away again."""

    def __init__(self, root: Path, deliverer: Deliverer):
        self.root, self.deliverer = root, deliverer
        self.manifest = shard.read_manifest(root)

    def entry(self, precision: str) -> shard.ShardEntry:
        return self.manifest.shard(self.manifest.moe_layers[0], 0, precision)

    def sizes(self, precision: str) -> tuple[int, ...]:
        return tuple(file.bytes for file in self.entry(precision).files)

    def offer_bytes(self, precision: str) -> int:
        entry = self.entry(precision)
        offer = Offer(
            Shard(entry.layer, entry.expert, precision), self.manifest.dims.hidden, self.manifest.name, entry.files
        )
        return len(delivery_frame.pack(Message(delivery_frame.OFFER, 0, offer=offer))) + HEADER_BYTES

    def deliver(self, precision: str, plan: ContactPlan, epoch_s: float) -> Delivered:
        entry = self.entry(precision)
        windows = windows_over(plan, GROUND, NODE, epoch_s)
        got = self.deliverer.deliver(NODE, self.root, self.manifest, entry, windows)
        self.deliverer.drop(NODE, Shard(entry.layer, entry.expert, precision))
        return got


def _link_row(bench: _Bench, case: Case, times: list[float]) -> dict:
    sizes = bench.sizes(case.precision)
    planned_s = planned_arrival_s(case, sizes, 0.0)
    errors = [100.0 * (seconds / planned_s - 1.0) for seconds in times]
    return {
        "rate_bps": case.rate_bps,
        "delay_s": case.delay_s,
        "payload_bytes": sum(sizes),
        "wire_bytes": wire_bytes(sizes, case.rate_bps),
        "chunk_bytes": min(chunk_bytes(case.rate_bps), MAX_CHUNK_BYTES),
        "planned_s": round(planned_s, 6),
        "measured_s": _spread(times, 6),
        "error_percent": _spread(errors),
        "within": abs(statistics.median(errors)) <= LIMIT_PERCENT,
        "all_within": max(map(abs, errors)) <= LIMIT_PERCENT,
    }


def _interrupted(bench: _Bench) -> dict:
    """One transfer whose contact ends when about half of it is through."""
    case = INTERRUPTED
    sizes = bench.sizes(case.precision)
    ends_s = 0.5 * 8 * sum(sizes) / case.rate_bps + 2 * case.delay_s
    again_s = ends_s + GAP_S
    epoch_s = time.monotonic() + 0.05
    got = bench.deliver(case.precision, open_link(case, ((0.0, ends_s), (again_s, LONG_S))), epoch_s)
    planned_s = interrupted_arrival_s(case, bench.offer_bytes(case.precision), sizes, ends_s, again_s)
    measured_s = got.arrived_s - epoch_s
    return {
        "rate_bps": case.rate_bps,
        "delay_s": case.delay_s,
        "contacts_s": [[0.0, round(ends_s, 4)], [round(again_s, 4), None]],
        "payload_bytes": got.total_bytes,
        "sent_bytes": got.sent_bytes,
        "sent_twice_bytes": got.sent_bytes + got.had_bytes - got.total_bytes,
        "offers": got.offers,
        "verified_and_loaded_s": round(got.done_s - epoch_s, 6),
        "planned_s": round(planned_s, 6),
        "measured_s": round(measured_s, 6),
        "error_percent": round(100.0 * (measured_s / planned_s - 1.0), 4),
        "within": abs(measured_s / planned_s - 1.0) <= LIMIT_PERCENT / 100.0,
    }


def routing(bundle: Path, rounds: int = 5) -> dict:
    """The figures of `spacemoe benchmark routing --json`; `bundle` has int4, int8 and fp32 shards.

    Raises: shard.BundleError, local_fleet.FleetError, delivery.DeliveryError.
    """
    from tqdm import tqdm

    times: dict[Case, list[float]] = {case: [] for case in CASES}
    with run_folder("benchmark") as folder, Deliverer() as deliverer:
        bench = _Bench(bundle, deliverer)
        endpoint = "tcp://127.0.0.1:9"  # nobody serves hidden states here
        with (
            Broker(folder) as broker,
            LocalFleet(
                folder,
                bundle,
                (),
                endpoint,
                (broker.host, broker.port),
                delivery_endpoint=deliverer.endpoint,
                empty=(NODE,),
            ),
        ):
            bench.deliver(CASES[2].precision, open_link(CASES[2]), time.monotonic())  # warm-up
            for _ in tqdm(range(rounds), desc="benchmark", disable=None, leave=False):
                for case in CASES:
                    got = bench.deliver(case.precision, open_link(case), time.monotonic())
                    times[case].append(got.arrived_s - got.first_s)
            interrupted = _interrupted(bench)
    rows = [_link_row(bench, case, seconds) for case, seconds in times.items()]
    return {
        "bundle": bench.manifest.name,
        "emulated": True,
        "n": rounds,
        "limit_percent": LIMIT_PERCENT,
        "links": rows,
        "interrupted": interrupted,
        "holds": all(row["within"] for row in rows) and interrupted["within"] and not interrupted["sent_twice_bytes"],
    }


def report(result: dict) -> str:
    """The figures in words."""
    lines = ["paced links (emulated), from the first bit to the last chunk's acknowledged write:"]
    for row in result["links"]:
        measured, error = row["measured_s"], row["error_percent"]
        lines.append(
            f"{row['rate_bps'] / 1e6:5g} Mb/s  planned {row['planned_s']:.4f} s  measured {measured['median']:.4f} s  "
            f"error {error['median']:+.3f} % ({error['min']:+.3f} to {error['max']:+.3f}, n {error['n']})"
        )
    cut = result["interrupted"]
    lines.append(
        f"contact cut in the middle: planned {cut['planned_s']:.4f} s, measured {cut['measured_s']:.4f} s "
        f"({cut['error_percent']:+.3f} %), {cut['sent_twice_bytes']} of {cut['payload_bytes']} bytes sent twice, {cut['offers']} offers"
    )
    if not result["holds"]:
        lines.append(
            f"not within {result['limit_percent']:g} %: was the machine busy? close other programs and measure again"
        )
    return "\n".join(lines)
