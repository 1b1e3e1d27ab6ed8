"""The requests of the last while and their tokens, as they come, and how often each expert ran. In memory; the archive keeps all.

Leaves out who generates (engine.py, demo.py) and what joules a request took (ledger.py): they say so in its record.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from ground_station.archive_records import RequestRecord, TokenRecord

MAX_REQUESTS = 32
MAX_TOKENS = 2000  # of one request
MAX_LAYERS, MAX_EXPERTS = 512, 4096


class LiveTokens:
    """Bounded and thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.totals = {"requests": 0, "tokens": 0}  # since the start
        self._requests: OrderedDict[str, tuple[RequestRecord, list[TokenRecord]]] = OrderedDict()

    def request(self, record: RequestRecord) -> None:
        """A request that begins or goes on; the oldest that has ended makes room."""
        with self._lock:
            self.totals["requests"] += record.request not in self._requests
            _, tokens = self._requests.get(record.request, (record, []))
            self._requests[record.request] = (record, tokens)
            while len(self._requests) > MAX_REQUESTS:
                ended = [name for name, (old, _) in self._requests.items() if old.state != "running"]
                del self._requests[ended[0] if ended else next(iter(self._requests))]

    def token(self, record: TokenRecord) -> None:
        with self._lock:
            self.totals["tokens"] += 1
            if record.request in self._requests:
                tokens = self._requests[record.request][1]
                if len(tokens) < MAX_TOKENS:
                    tokens.append(record)

    def requests(self) -> list[dict[str, Any]]:
        """The latest first."""
        with self._lock:
            return [asdict(record) for record, _ in reversed(self._requests.values())]

    def one(self, request: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """A request and its tokens; None where it is not among the latest."""
        with self._lock:
            found = self._requests.get(request)
            return None if found is None else (asdict(found[0]), [asdict(token) for token in found[1]])


class Heat:
    """Runs of each expert [layer, expert] since the start; layers are the model's own numbers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[int, np.ndarray] = {}

    def ran(self, layer: int, experts: Iterable[int] | np.ndarray) -> None:
        """Counts one run for each of `experts` (any shape).  Raises: ValueError for numbers that no model has."""
        chosen = np.asarray(experts, dtype=np.int64).ravel()
        if not chosen.size:
            return
        if not 0 <= layer < MAX_LAYERS or chosen.min() < 0 or chosen.max() >= MAX_EXPERTS:
            raise ValueError(f"layer {layer}, experts {chosen.min()} to {chosen.max()}: no model has them")
        counts = np.bincount(chosen)
        with self._lock:
            before = self._runs.get(layer, np.zeros(0, np.int64))
            size = max(len(before), len(counts))
            self._runs[layer] = np.pad(before, (0, size - len(before))) + np.pad(counts, (0, size - len(counts)))

    def counts(self) -> dict[int, list[int]]:
        with self._lock:
            return {layer: runs.tolist() for layer, runs in sorted(self._runs.items())}
