"""Imposes a link's rate and delay on messages of a real process: when each is through. Pure: no clock, no sleep.

The rule is one of absolute deadlines: a message starts when it is there and the one before is through, however late the sleeper
woke. Counting from the moment of waking instead loses 2 to 24 % of the rate. Time without messages earns no credit. Whoever uses
it sleeps until the deadline (no spinning) and labels every figure as emulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from firmware_sim.links import LinkError


@dataclass(frozen=True)
class Pacer:
    """A link's rate and one-way delay, and until when it is busy."""

    rate_bps: float
    delay_s: float = 0.0
    busy_until_s: float = -math.inf

    def __post_init__(self) -> None:
        if not (0.0 < self.rate_bps < math.inf and 0.0 <= self.delay_s < math.inf):
            raise LinkError(
                f"a link of {self.rate_bps} bit/s and {self.delay_s} s; give a rate above 0, a delay of 0 or more"
            )

    def admit(self, arrival_s: float, size_bytes: int) -> tuple[Pacer, float]:
        """The link after a message that was handed over at `arrival_s`, and when its last bit is at the other end.

        `arrival_s` is when the message was there to be sent, not when somebody woke up to send it.
        """
        start_s = max(arrival_s, self.busy_until_s)
        busy_until_s = start_s + 8.0 * size_bytes / self.rate_bps
        return replace(self, busy_until_s=busy_until_s), busy_until_s + self.delay_s
