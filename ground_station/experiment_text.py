"""What tokens of a text are worth and cost under a selection policy, a batch at a time, in this process.

The unconstrained model (every expert in reach, the model's own routing, the best precision of the bundle) is run once over the same
tokens; a policy's batch is compared with it token by token. Times and joules are not measured here: runs are counted, and what
each takes is given (the world's `ms`).

A token's latency is, summed over the layers, that of the node that takes longest with the token's own pairs, one after the other. Its
bytes are those of frames that carry this token alone, as in decoding: per node that it visits a request (header, pairs, one input)
and a reply (header, one partial sum), each of D values by the codec CODEC. What a batch computes never goes through that codec.
Leaves out: the fleet's state, from which a policy's world comes; of the latency the trunk, queueing behind other tokens, the codec
and the flight of frames; of the bytes frames that are sent again, and those of ZeroMQ, TCP and the control plane.

Shape letters: T tokens of a batch, N nodes, P precisions (ids of frame.PRECISIONS), V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ground_station import dispatch, selection
from ground_station.local import LocalExperts
from ground_station.placement import round_robin
from ground_station.selection_choice import Choice, Policy
from ground_station.selection_world import PRECISIONS, World
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import compress, frame, shard

CODEC = "q8"
"""Of hidden states on the wire, in counting bytes: blocks of 32 values with an fp16 scale, 8.5 bits per value."""
PASSAGE_TOKENS = 256
"""A text is read in passages of so many tokens, each without what came before it."""


class TextTooShort(ValueError):
    """The text does not give as many tokens as are asked for; the text of the error names the next step."""


def passages(text: Text, documents: list[str], start: int, tokens: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Passages int64 [PASSAGE_TOKENS] that begin with the token `start`, at least `tokens` in all, in random order.

    Raises: TextTooShort.
    """
    ids = np.concatenate([text.encode(document) for document in documents if document] or [[]]).astype(np.int64)
    body = PASSAGE_TOKENS - 1
    found = [np.concatenate([[start], ids[i : i + body]]) for i in range(0, len(ids) - body + 1, body)]
    wanted = -(-tokens // PASSAGE_TOKENS)
    if len(found) < wanted:
        raise TextTooShort(
            f"the text gives {len(found)} passages of {PASSAGE_TOKENS} tokens, {wanted} are needed: give more text"
        )
    return [found[i] for i in rng.permutation(len(found))[:wanted]]


@dataclass(frozen=True, eq=False)
class Batch:
    """What a batch of T tokens came to. nats, kl, coverage [T]: negative log-likelihood of the next token, over that of the
    unconstrained model (nan for the last token of a passage, whose next one is not known); divergence from it; least share over the
    layers of the model's own gates that was run; latency_ms and wire_bytes [T] (both ways): see the module's text; runs [N, P]: rows
    through experts; visits [N]: rows that went to the node.
    """

    nats: np.ndarray
    kl: np.ndarray
    coverage: np.ndarray
    latency_ms: np.ndarray
    wire_bytes: np.ndarray
    runs: np.ndarray
    visits: np.ndarray


def joined(batches: list[Batch]) -> Batch:
    """Batches as one."""
    names = ("nats", "kl", "coverage", "latency_ms", "wire_bytes")
    tokens = (np.concatenate([getattr(batch, name) for batch in batches]) for name in names)
    return Batch(*tokens, sum(batch.runs for batch in batches), sum(batch.visits for batch in batches))


def wire_bytes_per_token(hidden: int, visits: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Bytes both ways of tokens that go alone: `visits` nodes, asked for `pairs` runs in all; arrays of the same shape.

    Source: node_agent.frame (header and pairs), node_agent.compress (payload).
    """
    one_way = frame.HEADER_BYTES + compress.CODECS[CODEC].size(1, hidden)
    return visits * (2 * one_way) + pairs * frame.PAIR.itemsize


class Decisions:
    """A digest of all choices so far, in order. Gates are not in it: they follow from the model, and are no decision."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, layer: int, choice: Choice, work: list[dispatch.Work]) -> None:
        """One layer of a batch: the experts chosen, and for each node the rows, experts and precisions that it was asked for."""
        chosen = np.where(choice.gates != 0, choice.experts, -1)
        self._numbers(np.array([layer, *chosen.shape, len(work)]), chosen)
        for item in work:
            rows = item.pairs["row"] if item.rows is None else item.rows[item.pairs["row"]]
            self._numbers(np.array([item.node, len(item.pairs)]), rows, item.pairs["expert"], item.pairs["precision"])

    def _numbers(self, *arrays: np.ndarray) -> None:
        for array in arrays:
            self._digest.update(np.ascontiguousarray(array, "<i4").tobytes())

    def sha256(self) -> str:
        return self._digest.hexdigest()


class Rehearsal:
    """A bundle, a table of copies and a text. `batches` of `batch_tokens`; any policy may play them, in order."""

    def __init__(
        self,
        root: Path,
        manifest: shard.Manifest,
        table: dispatch.Table,
        texts: list[np.ndarray],
        batch_tokens: int,
        threads: int = 1,
    ):
        """Raises: ValueError for a batch size that does not divide a passage; shard.BundleError."""
        if batch_tokens < 1 or PASSAGE_TOKENS % batch_tokens:
            raise ValueError(
                f"{batch_tokens} tokens per batch do not divide a passage of {PASSAGE_TOKENS}: use 16, 32 or 64"
            )
        self.manifest, self.table, self.batch_tokens = manifest, table, batch_tokens
        self.texts = texts
        self._trunk = Trunk(root, manifest, threads)
        best = next(name for name in ("fp32", "int8", "int4", "int2") if name in manifest.precisions)
        whole = dispatch.Table(round_robin(manifest, {"whole": 2**62}, best))
        own = selection.make("topk", manifest.routing, manifest.dims.top_k, manifest.dims.experts)
        self._own = own
        self.precision = table.copies[min(table.copies)][0][1]  # what dispatch prefers
        self._experts = LocalExperts(root, manifest, table, None, threads)
        unconstrained = LocalExperts(root, manifest, whole, None, threads)
        self._log_p: list[np.ndarray] = []  # per passage [PASSAGE_TOKENS, V]
        for ids in texts:

            def moe(layer: int, hidden: np.ndarray, logits: np.ndarray) -> np.ndarray:
                choice = own(layer, logits)
                return unconstrained.run(layer, hidden, choice.experts, choice.gates)

            logits = self._trunk.sequence(PASSAGE_TOKENS).prefill(ids, moe, every_position=True)
            self._log_p.append(_log_softmax(logits))

    @property
    def batches(self) -> int:
        return len(self.texts) * (PASSAGE_TOKENS // self.batch_tokens)

    def unconstrained_nats(self) -> np.ndarray:
        """[tokens with a next one]: of the unconstrained model, over all passages."""
        return np.concatenate([-log_p[np.arange(len(ids) - 1), ids[1:]] for ids, log_p in zip(self.texts, self._log_p)])

    def play(self, policy: Policy) -> Playing:
        """A policy at the beginning of the text."""
        return Playing(self, policy)


class Playing:
    """A policy under way: `next(world)` reads one more batch; after the last one it begins again. `decisions`: all its choices."""

    def __init__(self, rehearsal: Rehearsal, policy: Policy):
        self._rehearsal, self._policy = rehearsal, policy
        self.decisions = Decisions()
        self._index = 0
        self._sequence = None

    def next(self, world: World) -> Batch:
        r = self._rehearsal
        size, per_passage = r.batch_tokens, PASSAGE_TOKENS // r.batch_tokens
        passage, part = divmod(self._index % r.batches, per_passage)
        self._index += 1
        if part == 0 or self._sequence is None:
            self._sequence = r._trunk.sequence(PASSAGE_TOKENS)
        ids = r.texts[passage]
        start = part * size
        runs = np.zeros((len(r.table.nodes), PRECISIONS))
        visits = np.zeros(len(r.table.nodes))
        coverage = np.ones(size)
        latency_ms, visited, pairs = np.zeros(size), np.zeros(size), np.zeros(size)
        every_ms = np.broadcast_to(world.ms, world.hosted.shape)

        def moe(layer: int, hidden: np.ndarray, logits: np.ndarray) -> np.ndarray:
            choice = self._policy(layer, logits, world)
            named = None if choice.nodes is None else dispatch.Named(choice.nodes, choice.precisions)
            up = world.up.tolist()
            experts, gates, lost = choice.experts, choice.gates, np.zeros(size)
            if not all(up):  # the ladder's last rungs, as remote.RemoteExperts has them: similar expert, then skip
                there = np.array(
                    [any(up[node] for node, _ in r.table.copies[layer, each]) for each in range(logits.shape[1])]
                )
                experts, gates, lost, _ = dispatch.stand_ins(experts, gates, logits, there)
                if named is not None:
                    changed = np.where(experts != choice.experts, -1, named.nodes)
                    named = dispatch.Named(changed, named.precisions).among(up)
            work = dispatch.split(layer, experts, gates, partial(dispatch.assign, r.table, usable=up), named)
            self.decisions.add(layer, choice, work)
            ran = np.zeros(logits.shape, bool)
            ms = np.zeros((len(r.table.nodes), size))
            for item in work:
                np.add.at(runs[item.node], item.pairs["precision"], 1)
                rows = item.pairs["row"] if item.rows is None else item.rows[item.pairs["row"]]
                went = np.unique(rows)
                visits[item.node] += len(went)
                visited[went] += 1
                np.add.at(pairs, rows, 1)
                each_ms = every_ms[world.position[layer], item.pairs["expert"], item.node, item.pairs["precision"]]
                np.add.at(ms[item.node], rows, each_ms)
                ran[rows, item.pairs["expert"]] = True
            np.add(latency_ms, ms.max(0), out=latency_ms)
            own = r._own(layer, logits)
            covered = np.where(np.take_along_axis(ran, own.experts, 1), own.gates, 0).sum(1) / own.gates.sum(1)
            np.minimum(coverage, covered, out=coverage)
            out = r._experts.run_work(layer, hidden, work)
            if lost.any():  # the row's sum of gates is restored
                whole = choice.gates.sum(1)
                left = whole - lost
                scale = np.divide(whole, left, out=np.zeros_like(whole), where=left > 1e-6 * whole)
                out *= scale[:, None].astype(np.float32)
            return out

        logits = self._sequence.prefill(ids[start : start + size], moe, every_position=True)
        log_q = _log_softmax(logits)
        log_p = r._log_p[passage][start : start + size]
        kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
        nats = np.full(size, np.nan)
        known = min(size, len(ids) - 1 - start)
        at = np.arange(known), ids[start + 1 : start + 1 + known]
        nats[:known] = log_p[at] - log_q[at]
        wire = wire_bytes_per_token(r.manifest.dims.hidden, visited, pairs)
        return Batch(nats, np.maximum(kl, 0), coverage, latency_ms, wire, runs, visits)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [T, V]."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
