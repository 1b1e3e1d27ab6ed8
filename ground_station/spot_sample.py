"""A request that is computed again: as it was sent, cut to fewer rows, without a codec, or one expert of it on further rows.

Pure. Leaves out: whom it is sent to (spot_checker.py), and what the sums mean (spot_check.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ground_station import spot_check
from ground_station.link import Failure
from ground_station.spot_check import Part
from node_agent import compress, frame

log = logging.getLogger("spacemoe.spot_check")

ROWS_COMPARED = 32  # of a single expert, where two differ


class Sent(NamedTuple):
    """A request as it went out: rows float32 [R, D], their payload, and the pairs frame.PAIR [P] with rows into them."""

    x: np.ndarray
    payload: bytes
    codec: str
    reply_codec: str
    reply_step: float
    pairs: np.ndarray


@dataclass(frozen=True, eq=False)
class Sample:
    """An answer that is to be computed again. `answer` float32 [R, D]; None: it was not finite."""

    layer: int
    node: int
    sent: Sent
    answer: np.ndarray | None
    reason: str
    without: frozenset[int] = frozenset()  # nodes that gave no opinion when they were asked
    tries: int = 0


def copies(node: int, layer: int, pairs: np.ndarray) -> set[tuple[int, int, int, int]]:
    return {(node, layer, expert, precision) for _, expert, precision, _ in pairs.tolist()}


def keys(pairs: np.ndarray) -> set[tuple[int, int]]:
    return {(expert, precision) for _, expert, precision, _ in pairs.tolist()}


def each(part: Part, pairs: np.ndarray) -> list[Part]:
    """The same node, one expert at a time."""
    return [
        Part(part.node, part.pairs & (pairs["expert"] == expert) & (pairs["precision"] == precision))
        for expert, precision in sorted(keys(pairs[part.pairs]))
    ]


def as_received(sent: Sent) -> np.ndarray:
    """The rows as a node decodes them."""
    return compress.decode(compress.CODECS[sent.codec].id, sent.payload, *sent.x.shape)


def precise(sent: Sent, which: np.ndarray) -> Sent:
    """The same rows as the node saw them, some of the pairs, and no codec either way."""
    x = as_received(sent)
    return Sent(x, compress.encode("fp32", x), "fp32", "fp32", 0.0, sent.pairs[which])


def through(sent: Sent, total: np.ndarray) -> np.ndarray | None:
    """A sum as it comes back by the request's reply codec; None for one that it cannot hold."""
    try:
        payload = compress.encode(sent.reply_codec, total, sent.reply_step and frame.sent_step(sent.reply_step))
        return compress.decode(compress.CODECS[sent.reply_codec].id, payload, *total.shape)
    except compress.CodecError:
        return None


def fewer_rows(sample: Sample, most: int, draw: Callable[[], float]) -> Sample:
    """Rows of a long request that are computed again: the largest sums where size is the doubt, else any."""
    sent = sample.sent
    rows = len(sent.x)
    if rows <= most:
        return sample
    order = sorted(range(rows), key=lambda _: draw())
    if sample.reason == "norm":
        order = np.argsort(-np.abs(sample.answer).max(1)).tolist()
    # without an answer nobody knows which row it was
    kept = np.sort(order[: most if sample.answer is not None else rows])
    place = np.full(rows, -1)
    place[kept] = np.arange(len(kept))
    pairs = sent.pairs[place[sent.pairs["row"]] >= 0].copy()
    pairs["row"] = place[pairs["row"]]
    x = as_received(sent)[kept]
    shorter = Sent(x, compress.encode("fp32", x), "fp32", sent.reply_codec, sent.reply_step, pairs)
    return replace(sample, sent=shorter, answer=None if sample.answer is None else sample.answer[kept])


def one_expert(sent: Sent, which: np.ndarray, more: np.ndarray) -> Sent:
    """The expert of these pairs on the rows of the request and on further ones, each with a gate of 1."""
    x = np.concatenate([as_received(sent), more])[:ROWS_COMPARED]
    _, expert, precision, _ = sent.pairs[which][0].item()
    pairs = np.array([(row, expert, precision, 1.0) for row in range(len(x))], frame.PAIR)
    return Sent(x, compress.encode("fp32", x), "fp32", "fp32", 0.0, pairs)


def sum_of(answer: frame.Frame | Failure, shape: tuple[int, int]) -> np.ndarray | Failure:
    """An opinion that is not finite is one: it differs from every other."""
    if isinstance(answer, Failure):
        return np.full(shape, np.nan, np.float32) if spot_check.NOT_FINITE in answer.text else answer
    return answer.x if answer.x.shape == shape else Failure("error", f"partial sum has shape {list(answer.x.shape)}")


def result_of(future: Future) -> np.ndarray | Failure:
    error = future.exception()
    if error is None:
        return future.result()
    log.warning("no opinion from the bundle: %s", error)
    return Failure("error", str(error)[:200])
