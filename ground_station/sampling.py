"""The next token from logits: greedy, temperature, top-p, seeded. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from node_agent.routing import softmax


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_p` keeps the smallest set of tokens whose probability reaches it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature {self.temperature} is outside 0..100")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is outside (0, 1]")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is negative: give 0 or more")


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.rng = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """Token id from logits float32 [V]."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = softmax(logits.astype(np.float64) / self.sampling.temperature)
        order = np.argsort(-probabilities, kind="stable")
        total = np.cumsum(probabilities[order])
        kept = order[: int(np.searchsorted(total, self.sampling.top_p)) + 1]
        share = probabilities[kept] / probabilities[kept].sum()
        return int(kept[np.searchsorted(np.cumsum(share), self.rng.random(), side="right").clip(max=len(kept) - 1)])
