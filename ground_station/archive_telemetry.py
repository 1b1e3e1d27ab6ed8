"""A telemetry message as a row of the archive and back, values exact; names, units, scopes and provenances are kept once per set.

Pure functions. Leaves out: the database (archive.py writes, archive_read.py reads).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ground_station.fleet import Instant, Taken
from node_agent.wire import Sample, Telemetry

VALIDITIES = ("ok", "stale", "missing", "invalid")
CODES = {text: code for code, text in enumerate(VALIDITIES)}
INT64 = range(-(2**63), 2**63)
# A sample's stamp is kept as float32 seconds after the message's: to 1 us for up to 8 s, as closely in proportion beyond.
MAX_FLOAT32_OFFSET_S = 1e6

Signal = tuple[str, str, str, str]  # name, unit, scope, provenance


class CannotKeep(ValueError):
    """A message has a number that no column holds."""


@dataclass(frozen=True)
class Packed:
    """A message without its node's and set's keys. `row`: run, number, session, seq, generated_utc_s, ground_utc_s, uncertainty_s,
    received_utc_s, late, vals, codes, offsets."""

    node: str
    signals: tuple[Signal, ...]
    row: tuple

    @property
    def weight(self) -> int:
        """Bytes in memory, about; the signals are shared."""
        return 900 + sum(len(part) for part in self.row[-3:] if part is not None)


def clean(text: str) -> str:
    """`text` as a database and a file can hold it: half a surrogate pair, which JSON may bring, is written out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def pack(node: str, taken: Taken) -> Packed:
    """`taken` of `node` as a row.  Raises: CannotKeep."""
    telemetry, samples = taken.telemetry, taken.telemetry.samples
    numbers = (telemetry.run, telemetry.number, telemetry.bd_seq - telemetry.run, telemetry.seq)
    if not all(number in INT64 for number in numbers):
        raise CannotKeep(f"{node}: a run, number, session or seq of more than 64 bits")
    values = np.array([np.nan if sample.value is None else sample.value for sample in samples], "<f8")
    codes = bytes(CODES[sample.validity] for sample in samples)
    at = telemetry.generated_at
    offsets = None
    if any(sample.generated_at != at for sample in samples):
        seconds = np.array([sample.generated_at - at for sample in samples], "<f8")
        small = bool((np.abs(seconds) < MAX_FLOAT32_OFFSET_S).all())
        offsets = (seconds.astype("<f4") if small else seconds).tobytes()
    times = (at, taken.generated_utc_s, taken.uncertainty_s, taken.received.utc_s)
    row = (*numbers, *times, int(taken.late), values.tobytes(), codes if any(codes) else None, offsets)
    signals = tuple((sample.name, sample.unit, sample.scope, sample.provenance) for sample in samples)
    return Packed(node, signals, row)


def signals_text(signals: Sequence[Signal]) -> tuple[bytes, str]:
    """(digest, JSON) of a set of signals."""
    text = json.dumps([[clean(part) for part in signal] for signal in signals], separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:16], text


def signals_of(text: str) -> tuple[Signal, ...]:
    """The set of signals in JSON.  Raises: ValueError."""
    tree = json.loads(text)
    if not isinstance(tree, list) or not all(
        isinstance(one, list) and len(one) == 4 and all(isinstance(part, str) for part in one) for one in tree
    ):
        raise ValueError("a set of signals is no list of names, units, scopes and provenances")
    return tuple(tuple(one) for one in tree)


def values_of(vals: bytes, count: int) -> np.ndarray:
    """(count,) float64, NaN where there was no value.  Raises: ValueError for a blob of another size."""
    if not isinstance(vals, bytes) or len(vals) != 8 * count:
        raise ValueError(f"{len(vals) if isinstance(vals, bytes) else 'no'} bytes of values for {count} signals")
    return np.frombuffer(vals, "<f8")


def codes_of(codes: bytes | None, count: int) -> np.ndarray:
    """(count,) uint8, indices in VALIDITIES.  Raises: ValueError."""
    if codes is None:
        return np.zeros(count, np.uint8)
    if not isinstance(codes, bytes) or len(codes) != count or max(codes, default=0) >= len(VALIDITIES):
        raise ValueError(f"the validities of {count} signals cannot be")
    return np.frombuffer(codes, np.uint8)


def offsets_of(offsets: bytes | None, count: int) -> np.ndarray:
    """(count,) float64 s: each sample's stamp after the message's.  Raises: ValueError."""
    if offsets is None:
        return np.zeros(count)
    if not isinstance(offsets, bytes) or len(offsets) not in (4 * count, 8 * count):
        raise ValueError(f"the times of {count} signals cannot be")
    return np.frombuffer(offsets, "<f4" if len(offsets) == 4 * count else "<f8").astype(np.float64)


def unpack(node: str, run: int, signals: Sequence[Signal], row: Sequence) -> Taken:
    """The message back. `row`: number, session, then as in Packed.  Raises: ValueError when the row cannot be."""
    number, session, seq, generated_s, ground_s, uncertainty_s, received_s, late, vals, codes, offsets = row
    count = len(signals)
    values = values_of(vals, count).tolist()
    validities, after_s = codes_of(codes, count).tolist(), offsets_of(offsets, count).tolist()
    samples = tuple(
        Sample(name, None if value != value else value, unit, VALIDITIES[code], provenance, scope, generated_s + after)
        for (name, unit, scope, provenance), value, code, after in zip(signals, values, validities, after_s)
    )
    telemetry = Telemetry(node, run + session, seq, generated_s, samples, run, number)
    return Taken(telemetry, Instant(received_s, received_s), bool(late), ground_s, uncertainty_s)
