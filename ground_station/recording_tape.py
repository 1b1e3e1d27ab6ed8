"""Collects a run while it goes, for recording.py to write: looks and prices, tokens, telemetry as it comes. Bounded in memory.

Leaves out: the choices, which price_loop.Chosen keeps, and files.
"""

from __future__ import annotations

import threading

import numpy as np

from ground_station.decode import TokenCost
from ground_station.fleet import Taken
from ground_station.live_prices import Look

MAX_TOKENS = 1_000_000
MAX_CALLS = 500_000  # some 300 MB while they are collected
MAX_MESSAGES = 1_000_000
MESSAGE = ("node", "uptime_s", "utc_s", "mono_s", "temp_c", "power_w", "energy_j", "duty", "duty_cap")


class Tape:
    """Collects a run as it goes. `hear` may be called from any thread, the rest from that of the decode loop."""

    def __init__(self, nodes: tuple[str, ...]):
        self.nodes = nodes
        self.looks: list[tuple[int, Look, np.ndarray, np.ndarray]] = []
        self.tokens: list[tuple[int, int, bool]] = []
        self.text_tokens: list[int] = []
        self.full = self.truncated = False
        self._messages: list[tuple[float, ...]] = []
        self._kinds: dict[str, dict[str, set[str]]] = {
            name: {node: set() for node in nodes} for name in ("temp_c", "power_w")
        }
        self._lock = threading.Lock()

    def hear(self, node: str, taken: Taken) -> None:
        """control's on_telemetry; what comes late as history is no part of what prices could follow."""
        if node not in self.nodes or taken.late:
            return
        samples = {sample.name: sample for sample in taken.telemetry.samples if sample.validity == "ok"}
        values = tuple(samples[name].value if name in samples else np.nan for name in MESSAGE if name != "node")
        uptime_s = samples["uptime_s"].value if "uptime_s" in samples else np.nan
        row = (self.nodes.index(node), uptime_s, taken.received.utc_s, taken.received.mono_s, *values[3:])
        with self._lock:
            if len(self._messages) < MAX_MESSAGES:
                self._messages.append(row)
            for name, kinds in self._kinds.items():
                if name in samples:
                    kinds[node].add(samples[name].provenance)

    def look(self, call: int, look: Look, joule_price: np.ndarray, byte_price: np.ndarray) -> None:
        self.looks.append((call, look, joule_price, byte_price))

    def token(self, cost: TokenCost, call: int, whole: bool) -> None:
        self.tokens.append((cost.token_id, call, whole))

    def begin_text(self) -> bool:
        """Whether there is room for another text; what has none is said in the head."""
        self.truncated |= self.full
        return not self.full

    def end_text(self, calls: int) -> None:
        """A text is whole; `calls` of the policy so far."""
        self.text_tokens.append(len(self.tokens) - sum(self.text_tokens))
        self.full = calls > MAX_CALLS // 2 or len(self.tokens) > MAX_TOKENS // 2

    @property
    def messages(self) -> np.ndarray:
        with self._lock:
            return np.array(self._messages, float).reshape(-1, len(MESSAGE))

    def provenance(self, name: str) -> dict[str, str]:
        """What each node said of `name` over the run."""
        with self._lock:
            return {node: ", ".join(sorted(kinds)) or "unknown" for node, kinds in self._kinds[name].items()}
