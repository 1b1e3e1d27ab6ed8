"""What an agent has done since it started: counts and seconds, written by the data plane, read by telemetry.

Each number has one writing thread, so no lock is needed. Leaves out: how they are published (telemetry.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counters:
    """`tokens`: rows of hidden states served; `requests`: EXPERTS frames answered by a PARTIAL; errors by kind."""

    requests: int = 0
    tokens: int = 0
    pairs: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    compute_s: float = 0.0
    codec_s: float = 0.0
    link_errors: dict[str, int] = field(default_factory=dict)  # written by the data plane
    control_errors: dict[str, int] = field(default_factory=dict)  # written by the control plane

    @staticmethod
    def count(errors: dict[str, int], kind: str) -> bool:
        """Adds one to errors[kind]; True for the first of its kind."""
        errors[kind] = errors.get(kind, 0) + 1
        return errors[kind] == 1
