"""What tokens of a text are worth and cost under a selection policy, a batch at a time, in this process.

The unconstrained model (every expert in reach, the model's own routing, the best precision of the bundle) is run once over the same
tokens; a policy's batch is compared with it token by token. Times and joules are not measured here: runs are counted, and
whoever knows what a run costs multiplies. Leaves out: the fleet's state, from which a policy's world comes.

Shape letters: T tokens of a batch, N nodes, P precisions (ids of frame.PRECISIONS), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ground_station import dispatch, selection
from ground_station.local import LocalExperts
from ground_station.placement import round_robin
from ground_station.selection_choice import Policy
from ground_station.selection_world import PRECISIONS, World
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import shard

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
    layers of the model's own gates that was run; runs [N, P]: rows through experts; visits [N]: rows that went to the node.
    """

    nats: np.ndarray
    kl: np.ndarray
    coverage: np.ndarray
    runs: np.ndarray
    visits: np.ndarray


def joined(batches: list[Batch]) -> Batch:
    """Batches as one."""
    tokens = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("nats", "kl", "coverage"))
    return Batch(*tokens, sum(batch.runs for batch in batches), sum(batch.visits for batch in batches))


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
        best = next(name for name in ("fp32", "int8", "int4") if name in manifest.precisions)
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
    """A policy under way: `next(world)` reads one more batch; after the last one it begins again."""

    def __init__(self, rehearsal: Rehearsal, policy: Policy):
        self._rehearsal, self._policy = rehearsal, policy
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

        def moe(layer: int, hidden: np.ndarray, logits: np.ndarray) -> np.ndarray:
            choice = self._policy(layer, logits, world)
            named = None if choice.nodes is None else dispatch.Named(choice.nodes, choice.precisions)
            up = world.up.tolist()
            if named is not None:
                named = named.among(up)
            work = dispatch.split(
                layer, choice.experts, choice.gates, partial(dispatch.assign, r.table, usable=up), named
            )
            ran = np.zeros(logits.shape, bool)
            for item in work:
                np.add.at(runs[item.node], item.pairs["precision"], 1)
                rows = item.pairs["row"] if item.rows is None else item.rows[item.pairs["row"]]
                visits[item.node] += len(np.unique(rows))
                ran[rows, item.pairs["expert"]] = True
            own = r._own(layer, logits)
            covered = np.where(np.take_along_axis(ran, own.experts, 1), own.gates, 0).sum(1) / own.gates.sum(1)
            np.minimum(coverage, covered, out=coverage)
            out = r._experts.run_work(layer, hidden, work)
            lost = np.where(np.take_along_axis(ran, choice.experts, 1), 0, choice.gates).sum(1)
            if lost.any():  # out of everybody's reach: the ladder's last rung, as remote.RemoteExperts has it
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
        return Batch(nats, np.maximum(kl, 0), coverage, runs, visits)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [T, V]."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
