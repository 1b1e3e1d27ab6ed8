"""A placement for the nodes of a running fleet: what they hold by their births, the steps to a plan, and whether it is so in the end.

Births say what is loaded and with which sha256, so a node that serves another bundle, or another version of a shard, is refused
before anything is sent. Leaves out: the policies (placement_policies.py), sending and the journal (carry_out.py), requests under
way while shards move.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ground_station import placement_problem as pp
from ground_station.carry_out import Journal, Step, steps_of, undone
from ground_station.control import Control
from ground_station.delivery import Delivered, Deliverer, DeliveryError, DeliveryRefused
from ground_station.placement import PlacementError
from ground_station.placement_moves import moves, worth_moving
from ground_station.placement_policies import place
from ground_station.placement_serving import serve
from ground_station.plan_fleet import MAX_NODES, Fleet, Node, problem
from node_agent.delivery_frame import Shard
from node_agent.shard import Manifest
from node_agent.wire import Birth

if TYPE_CHECKING:
    from ground_station.allow_list import AllowList

LOOK_S = 3.0
POLL_S = 0.05
SHOWN = 8
LEAST_S = 0.5
NO_SHARD = Shard(65_535, 65_535, "fp32")  # in no bundle: dropping it does nothing, and is answered


class FleetNotReady(RuntimeError):
    """Nodes are not there, or do not hold what they should; the text names them and the next step."""


@dataclass(frozen=True)
class Planned:
    """Steps from what is held to what a policy wants, and both by the one evaluator. `worth`: the gain is above the moves' price.

    `latency_ms`, `objective_ms`: of what the policy wants; `stays_ms`: latency of what is held (None: experts are missing).
    """

    steps: tuple[Step, ...]
    latency_ms: float
    objective_ms: float
    worth: bool
    stays_ms: float | None


class PatientDeliverer(Deliverer):
    """A Deliverer that waits as long for each node as it was told to."""

    def __init__(
        self,
        endpoint: str,
        curve_keys: tuple[bytes, bytes] | None,
        patience_s: float,
        allowed: AllowList | None = None,
        any_key: bool = False,
    ):
        super().__init__(endpoint, curve_keys, allowed, any_key)
        self.patience_s = patience_s

    def deliver(self, *args, **options) -> Delivered:
        return super().deliver(*args, **{"patience_s": self.patience_s} | options)

    def drop(self, node: str, which: Shard, patience_s: float | None = None) -> None:
        super().drop(node, which, self.patience_s if patience_s is None else patience_s)

    def reach(self, nodes: Iterable[str]) -> None:
        """Returns when every node has dialled in and answers.  Raises: FleetNotReady that names those that have not in time."""
        end_s, missing = time.monotonic() + self.patience_s, []
        for node in sorted(set(nodes)):
            try:
                super().drop(node, NO_SHARD, max(end_s - time.monotonic(), LEAST_S))
            except DeliveryRefused:
                pass  # an answer all the same
            except DeliveryError:
                missing.append(node)
        if missing:
            names = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if missing[SHOWN:] else "")
            raise FleetNotReady(
                f"not dialled in within {self.patience_s:g} s: {names}; nothing was moved: see that their agents run and that "
                f"delivery_endpoint in their configuration is {self.endpoint}"
            )


def births(control: Control, nodes: Sequence[str], patience_s: float) -> dict[str, Birth]:
    """Births of these nodes, all online; without names: of all that are online after LOOK_S.  Raises: FleetNotReady."""
    if nodes:
        missing = control.wait_for(nodes, patience_s)
        if missing:
            names = ", ".join(sorted(missing)[:SHOWN])
            raise FleetNotReady(f"not online within {patience_s:g} s: {names}; start their agents, check --fleet")
        known = control.snapshot()
        return {node: known[node].birth for node in nodes}
    end_s = time.monotonic() + min(LOOK_S, patience_s)
    while time.monotonic() < end_s:  # nobody says how many there are
        time.sleep(POLL_S)
    at = control.now()
    found = {name: state.birth for name, state in sorted(control.snapshot().items()) if state.ready(at)}
    if not found:
        raise FleetNotReady("no node is online: start the nodes' agents, check --broker and --fleet")
    return found


def fleet_of(found: Iterable[str], memory_mb: float) -> Fleet:
    """The nodes that are online, alike, with `memory_mb` for experts each."""
    names = tuple(found)
    if len(names) > MAX_NODES:
        raise PlacementError(f"{len(names)} nodes are online: name up to {MAX_NODES} in a file by --nodes FILE")
    return Fleet(tuple(Node(name, memory_mb) for name in names))


def held(manifest: Manifest, found: Mapping[str, Birth]) -> frozenset[pp.Copy]:
    """What is on the nodes, as indices of a problem with these nodes in this order.  Raises: PlacementError for other shards."""
    entries = {(entry.layer, entry.expert, entry.precision): entry.sha256 for entry in manifest.shards}
    layers = {layer: index for index, layer in enumerate(manifest.moe_layers)}
    copies = set()
    for number, (node, birth) in enumerate(found.items()):
        if birth.shards and birth.bundle != manifest.name:
            raise PlacementError(f"{node} serves bundle {birth.bundle[:80]}, not {manifest.name}: give that bundle")
        for there in birth.shards:
            key = (there.layer, there.expert, there.precision)
            if entries.get(key) != there.sha256:
                raise PlacementError(
                    f"{node} holds a version of {Shard(*key).stem} that bundle {manifest.name} here does not: "
                    f"give the bundle that it is from"
                )
            copies.add(pp.Copy(layers[there.layer], there.expert, number, manifest.precisions.index(there.precision)))
    return frozenset(copies)


def planned(
    bundle: Path, manifest: Manifest, fleet: Fleet, found: Mapping[str, Birth], policy: str, seed: int
) -> Planned:
    """Raises: PlacementError, shard.BundleError."""
    for node in fleet.nodes:
        limit_mb = found[node.id].memory_bytes / 1e6
        if node.memory_mb > limit_mb:
            raise PlacementError(f"{node.id} may use {limit_mb:.1f} MB in all, not {node.memory_mb:g}: give less")
    task, _ = problem(bundle, manifest, fleet, seed)
    task = replace(task, held=held(manifest, {node.id: found[node.id] for node in fleet.nodes}))
    for number, node in enumerate(fleet.nodes):
        used = sum(int(task.bytes[copy.variant]) for copy in task.held if copy.node == number)
        if used > task.memory[number]:
            text = f"{node.id} holds {used / 1e6:.2f} MB of experts now, more than the {node.memory_mb:g} MB given"
            raise PlacementError(f"{text}: give at least that")
    placement = place(policy, task, seed)
    listed = moves(task.held, placement.copies, task.bytes, task.memory)
    result = pp.evaluate(task, placement)
    return Planned(
        steps_of(listed, task.nodes, manifest.precisions, manifest.moe_layers),
        float(result.latency_ms),
        float(result.objective_ms),
        bool(listed) and worth_moving(task, placement),
        None if len({copy[:2] for copy in task.held}) < task.layers * task.experts else _latency_of_held(task),
    )


def _latency_of_held(task: pp.Problem) -> float:
    return float(pp.evaluate(task, serve(task, "held", task.held)).latency_ms)


def unlike(steps: Iterable[Step], found: Mapping[str, Birth]) -> list[str]:
    """What is not as these steps leave it, by the births: "n1 lacks L00E001.int8", "n2 still holds ..."."""
    last = {(step.node, step.shard): step.kind for step in steps}
    problems = []
    for (node, which), kind in last.items():
        birth = found.get(node)
        there = birth is not None and any(
            (row.layer, row.expert, row.precision) == (which.layer, which.expert, which.precision)
            for row in birth.shards
        )
        if there != (kind == "copy"):
            problems.append(f"{node} {'lacks' if kind == 'copy' else 'still holds'} {which.stem}")
    return problems


def orphaned(steps: Iterable[Step], found: Mapping[str, Birth]) -> list[str]:
    """Drops among these steps that would leave an expert on no node, in no precision: "L00E001.int8 on n1"."""
    copies = {(row.layer, row.expert, row.precision, node) for node, birth in found.items() for row in birth.shards}
    problems = []
    for step in steps:
        key = (step.shard.layer, step.shard.expert, step.shard.precision, step.node)
        if step.kind == "copy":
            copies.add(key)
            continue
        copies.discard(key)
        if not any(copy[:2] == key[:2] for copy in copies):
            problems.append(f"{step.shard.stem} on {step.node}")
    return problems


def way_back(journal: Journal) -> Journal:
    """As carry_out.undone, and the next step too: it may be done on the node without being in the journal.

    Without that, a drop that was not noted would stay, and the way back would drop the copy that replaced it.
    """
    return undone(replace(journal, done=min(journal.done + 1, len(journal.steps))))


def settled(journal: Journal) -> tuple[Step, ...]:
    """The done steps whose outcome must still be seen: all but those of the shard that the next step is about."""
    if journal.done == len(journal.steps):
        return journal.steps
    open_step = journal.steps[journal.done]
    about = (open_step.node, open_step.shard)
    return tuple(step for step in journal.steps[: journal.done] if (step.node, step.shard) != about)


def confirm(control: Control, steps: Sequence[Step], patience_s: float, remedy: str) -> None:
    """Waits until the nodes' births say that it is as the steps leave it.  Raises: FleetNotReady."""
    end_s = time.monotonic() + patience_s
    while True:
        known = {name: state.birth for name, state in control.snapshot().items() if state.birth and state.online}
        problems = unlike(steps, known)
        if not problems:
            return
        if time.monotonic() > end_s:
            raise FleetNotReady(f"by their births {', '.join(problems[:SHOWN])}: {remedy}")
        time.sleep(POLL_S)
