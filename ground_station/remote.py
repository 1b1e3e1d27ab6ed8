"""Experts on nodes: sends a layer's work to all nodes at once, sums what comes back, and climbs down the fallback ladder.

Ladder (ALGORITHMS): retry -> replica -> lower-precision replica -> similar expert -> skip with renormalised gates. Every rung that
is used is recorded with the loss it stands for; never an exception to the user while one rung is left. The similar expert is the
router's next one for that row that is in reach, with its own gate by the model's rule (dispatch.stand_ins); it needs the router's logits.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ground_station import dispatch, spot_check
from ground_station.link import OUT_OF_CONTACT, Failure, Link
from ground_station.rates import Allocator
from ground_station.spot_checker import SpotChecker
from ground_station.spot_sample import Sent
from node_agent import compress, frame

if TYPE_CHECKING:
    from ground_station.paced_link import PacedLink

TIMEOUT_S = 1.0
TIMEOUT_PER_ROW_S = 0.02


@dataclass(frozen=True)
class Rung:
    """One step down the ladder for one expert of one layer. `loss`: of a row's gate mass what is left out (skip) or run by another
    expert (similar_expert, whose `node` is the stand-in's), the most of the rows; else 0."""

    rung: str
    layer: int
    expert: int
    node: str
    reason: str
    loss: float = 0.0


@dataclass
class Traffic:
    """What the current token cost on the wire and where its time went (nanoseconds)."""

    sent_bytes: int = 0
    received_bytes: int = 0
    codec_ns: int = 0
    exchange_ns: int = 0
    expert_us: int = 0  # slowest node's compute of each layer, summed: the critical path
    node_codec_us: int = 0
    busy_us: int = 0  # compute of all nodes, summed
    rungs: list[Rung] = field(default_factory=list)


class RemoteExperts:
    """Runs the pairs of a layer on nodes. `traffic` is replaced by the caller at each token."""

    def __init__(
        self,
        link: Link | PacedLink,
        table: dispatch.Table,
        codec: str,
        reply_codec: str | None = None,
        timeout_s: float = TIMEOUT_S,
        allocator: Allocator | None = None,
        spot: SpotChecker | None = None,
    ):
        """`allocator`: gives the steps of codecs that take some (rates.for_codec); `spot`: computes some answers again elsewhere.

        Raises: ValueError for such a codec without an allocator.
        """
        if allocator is None and None in (compress.CODECS[codec].size, compress.CODECS[reply_codec or codec].size):
            raise ValueError(f"codec {codec} needs an allocator of its rates")
        self.allocator, self.spot = allocator, spot
        self.link, self.table, self.codec = link, table, codec
        self.reply_codec = reply_codec or codec
        self.timeout_s = timeout_s
        self.traffic = Traffic()
        self.served: Counter[str] = Counter()
        self.out_of_contact: Counter[str] = Counter()  # rungs that were used because a contact was closed or ended
        self._request_id = 0

    def run(
        self,
        layer: int,
        hidden: np.ndarray,
        experts: np.ndarray,
        gates: np.ndarray,
        named: dispatch.Named | None = None,
        logits: np.ndarray | None = None,
    ) -> np.ndarray:
        """sum of gate * expert(hidden), float32 [T, D], for chosen experts [T, K] and their gates.

        `logits` [T, E], the router's: with them a similar expert takes the place of one that nobody can run.
        """
        total = np.zeros_like(hidden)
        if self.allocator is not None:
            self.allocator.begin(layer)
        self.link.drain()
        up = [self.link.is_up(node) for node in self.table.nodes]
        if not any(up) and self.link.hold(self.table.nodes):
            up = [self.link.is_up(node) for node in self.table.nodes]
        everyone = partial(dispatch.assign, self.table)
        if named is not None and not all(up):
            named = named.among(up)
        whole, lost = gates.sum(1), np.zeros(len(hidden))
        if not all(up):
            experts, gates, lost = self._in_reach(layer, experts, gates, up, None, logits)
        work = dispatch.split(layer, experts, gates, everyone if all(up) else self._assign(up, None), named)
        failed = self._exchange(layer, hidden, work, total)
        if failed:
            taken = None if logits is None else dispatch.taken(experts, gates, logits.shape[1])
            lost += self._climb_down(layer, hidden, failed, total, logits, taken)
        if lost.any():
            kept = whole - lost
            scale = np.divide(whole, kept, out=np.zeros_like(whole), where=kept > 1e-6 * whole)
            total *= scale[:, None].astype(np.float32)
        if self.spot is not None:
            self.spot.step(self.link, self.table, self._next_id)
        return total

    def settle(self, timeout_s: float) -> bool:
        """Brings the spot checks that are due to an end, in idle time; whether none is left."""
        end_s = time.monotonic() + timeout_s
        while self.spot is not None and self.spot.busy and time.monotonic() < end_s:
            self.spot.step(self.link, self.table, self._next_id)
            self.link.drain()
            time.sleep(0.001)
        return self.spot is None or not self.spot.busy

    def _next_id(self) -> int:
        self._request_id += 1
        return self._request_id

    def _assign(self, usable: list[bool], reason: str | None) -> dispatch.Assign:
        """`dispatch.assign` over usable nodes, which notes the rung for every expert whose primary is not among them.

        `reason` None: what the link says of the primary's node.
        """

        def assignment(layer: int, load: dict[int, int]) -> dict[int, dispatch.Copy | None]:
            chosen = dispatch.assign(self.table, layer, load, usable)
            for expert, copy in chosen.items():
                primary = self.table.copies[layer, expert][0]
                if copy is not None and not usable[primary[0]]:
                    rung = "replica" if copy[1] == primary[1] else "lower_precision"
                    self._note(rung, layer, expert, copy[0], reason or self._why_down(primary[0]))
            return chosen

        return assignment

    def _note(self, rung: str, layer: int, expert: int, node: int, reason: str, loss: float = 0.0) -> None:
        name = self.table.nodes[node]
        if OUT_OF_CONTACT in reason:
            self.out_of_contact[rung] += 1
        self.traffic.rungs.append(Rung(rung, layer, expert, name, reason, round(loss, 6)))

    def _why_down(self, node: int) -> str:
        return self.link.why_down(self.table.nodes[node])

    def _in_reach(
        self,
        layer: int,
        experts: np.ndarray,
        gates: np.ndarray,
        usable: list[bool],
        reason: str | None,
        logits: np.ndarray | None,
        taken: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """experts and gates [T, K] with stand-ins for those without a copy on a usable node, and the gate mass [T] that is lost.

        Notes each that stands in or is skipped; adds those that stand in to `taken` (see dispatch.stand_ins).
        """
        gone = {
            expert
            for expert in np.unique(experts[gates != 0]).tolist()
            if not any(usable[node] for node, _ in self.table.copies[layer, expert])
        }
        if not gone:
            return experts, gates, np.zeros(len(experts))
        found: list[dispatch.StandIn] = []
        if logits is None:
            lost = np.where(np.isin(experts, list(gone)), gates, 0).sum(1, dtype=np.float64)
        else:
            copies = [self.table.copies.get((layer, expert), ()) for expert in range(logits.shape[1])]
            reachable = np.array([any(usable[node] for node, _ in each) for each in copies])
            experts, gates, lost, found = dispatch.stand_ins(experts, gates, logits, reachable, taken)
        for expert in sorted(gone):
            node = self.table.copies[layer, expert][0][0]
            text = reason or self._why_down(node)
            stood = [item for item in found if item.lost == expert]
            if stood:
                copies = self.table.copies[layer, stood[0].expert]
                there = next(node for node, _ in copies if usable[node])
                self._note("similar_expert", layer, expert, there, text, max(item.lost_gate for item in stood))
            left = np.where(experts == expert, gates, 0).sum(1)
            if left.any():
                self._note("skip", layer, expert, node, text, float(left.max()))
        if taken is not None:
            for item in found:
                taken[item.row, item.expert] = True
        return experts, gates, lost

    def _exchange(
        self, layer: int, hidden: np.ndarray, work: list[dispatch.Work], total: np.ndarray
    ) -> list[tuple[dispatch.Work, Failure]]:
        """Asks all nodes at once and adds the answers in node order; returns what failed."""
        if not work:
            return []
        timeout_s = self.timeout_s + TIMEOUT_PER_ROW_S * len(hidden)
        allocator = self.allocator
        started = time.perf_counter_ns()
        shared_payload = None
        requests = {}
        sent: dict[int, Sent] = {}
        for item in sorted(work, key=lambda item: -len(item.pairs)):  # whoever has most to do hears of it first
            if allocator is not None:
                x = hidden if item.rows is None else hidden[item.rows]
                payload = compress.encode(self.codec, x, allocator.input_steps(layer, x, item.pairs, item.node))
                allocator.spent(len(payload), x.size, item.node)
            elif item.rows is None:
                shared_payload = shared_payload or compress.encode(self.codec, hidden)
                x, payload = hidden, shared_payload
            else:
                x = hidden[item.rows]
                payload = compress.encode(self.codec, x)
            reply_step = 0.0 if allocator is None else allocator.reply_step(layer, item.node)
            if self.spot is not None:
                sent[item.node] = Sent(x, payload, self.codec, self.reply_codec, reply_step, item.pairs)
            request_id = self._next_id()
            data = frame.pack(
                frame.Frame(
                    frame.EXPERTS,
                    request_id,
                    layer,
                    destination=self.link.peers[self.table.nodes[item.node]].number,
                    codec=self.codec,
                    reply_codec=self.reply_codec,
                    x=x,
                    pairs=item.pairs,
                    budget_us=int(timeout_s * 1e6),
                    reply_step=reply_step,
                ),
                payload,
            )
            requests[self.table.nodes[item.node]] = (request_id, data)
            self.traffic.sent_bytes += len(data)
        packed = time.perf_counter_ns()
        answers = self.link.exchange(requests, timeout_s)
        gathered = time.perf_counter_ns()
        failed = []
        slowest_us = slowest_codec_us = 0
        for item in work:
            node = self.table.nodes[item.node]
            answer = answers[node]
            if isinstance(answer, frame.Frame) and (answer.x.shape[0], answer.x.shape[1]) != (
                len(hidden) if item.rows is None else len(item.rows),
                hidden.shape[1],
            ):
                answer = Failure("error", f"partial sum has shape {list(answer.x.shape)}")
            answer = self._believed(layer, item.node, answer, sent.get(item.node))
            if isinstance(answer, Failure):
                failed.append((item, answer))
                continue
            dispatch.add_partial(total, item, answer.x)
            self.served[node] += len(item.pairs)
            self.traffic.received_bytes += answer.size
            if allocator is not None:
                allocator.spent(answer.size - frame.HEADER_BYTES, answer.x.size, item.node)
            self.traffic.busy_us += answer.compute_us
            if answer.compute_us + answer.codec_us > slowest_us + slowest_codec_us:
                slowest_us, slowest_codec_us = answer.compute_us, answer.codec_us
        self.traffic.codec_ns += packed - started + time.perf_counter_ns() - gathered
        self.traffic.exchange_ns += gathered - packed
        self.traffic.expert_us += slowest_us
        self.traffic.node_codec_us += slowest_codec_us
        return failed

    def _believed(
        self, layer: int, node: int, answer: frame.Frame | Failure, sent: Sent | None
    ) -> frame.Frame | Failure:
        """The answer, or why it must not be added: what is not finite never reaches the hidden state, checked elsewhere or not."""
        energy = spot_check.energy_of(answer.x) if isinstance(answer, frame.Frame) else 0.0
        if spot_check.too_large(energy):
            if sent is not None:
                self.spot.absurd(layer, node, sent, answer.x)
            return Failure("error", "a partial sum is larger than any model's")
        if sent is None:
            return answer
        return self.spot.answered(layer, node, sent, answer, energy) or answer

    def _climb_down(
        self,
        layer: int,
        hidden: np.ndarray,
        failed: list[tuple[dispatch.Work, Failure]],
        total: np.ndarray,
        logits: np.ndarray | None,
        taken: np.ndarray | None,
    ) -> np.ndarray:
        """Retry, then other copies, then similar experts, then skip. Returns the gate mass [T] that was lost.

        Who is unreachable or refuses is not asked again; who refuses, to protect itself, stays in use for the next layer.
        """
        once = ("unreachable", "refused")
        again = [(item, failure) for item, failure in failed if failure.kind in once]
        retried = [(item, failure) for item, failure in failed if failure.kind not in once]
        for item, failure in retried:
            for expert in np.unique(item.pairs["expert"]).tolist():
                self._note("retry", layer, expert, item.node, f"{failure.kind}: {failure.text}")
        again += self._exchange(layer, hidden, [item for item, _ in retried], total)
        usable = [True] * len(self.table.nodes)
        t = len(hidden)
        lost = np.zeros(t, np.float64)
        while again:
            for item, failure in again:
                if failure.kind != "refused":
                    self.link.mark_down(self.table.nodes[item.node], failure)
                usable[item.node] = False
            usable = [here and self.link.is_up(node) for here, node in zip(usable, self.table.nodes)]
            reason = "; ".join(sorted({f"{self.table.nodes[i.node]} {f.why}" for i, f in again}))
            experts, gates = self._pairs_as_matrix([item for item, _ in again], t)
            experts, gates, missed = self._in_reach(layer, experts, gates, usable, reason, logits, taken)
            lost += missed
            work = dispatch.split(layer, experts, gates, self._assign(usable, reason))
            again = self._exchange(layer, hidden, work, total)
        return lost

    @staticmethod
    def _pairs_as_matrix(work: list[dispatch.Work], t: int) -> tuple[np.ndarray, np.ndarray]:
        """Experts int [T, K'] and gates float32 [T, K'] of the pairs in `work`; what is not filled has gate 0."""
        of_row: list[list[tuple[int, float]]] = [[] for _ in range(t)]
        for item in work:
            rows = item.pairs["row"] if item.rows is None else item.rows[item.pairs["row"]]
            for row, expert, gate in zip(rows.tolist(), item.pairs["expert"].tolist(), item.pairs["gate"].tolist()):
                of_row[row].append((expert, gate))
        width = max(map(len, of_row))
        experts, gates = np.zeros((t, width), np.int64), np.zeros((t, width), np.float32)
        for row, pairs in enumerate(of_row):
            for column, (expert, gate) in enumerate(pairs):
                experts[row, column], gates[row, column] = expert, gate
        return experts, gates
