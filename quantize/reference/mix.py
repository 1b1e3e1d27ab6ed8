"""Which training text comes next: windows of the domains' token streams, shuffled, weighted and resumable.

Leaves out: making the tokens (corpus).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantize.reference.state import Recipe

DOCUMENT_START = 0


def domain_weights(sizes: dict[str, int], expected_tokens: float, max_epochs: float) -> dict[str, float]:
    """Shares proportional to sqrt(tokens), none above `max_epochs` passes over its text in `expected_tokens`.

    What a capped domain loses goes to the others; if all are capped, shares are proportional to tokens.
    """
    cap = {d: max_epochs * n / expected_tokens for d, n in sizes.items()}
    if sum(cap.values()) <= 1:
        total = sum(sizes.values())
        return {d: n / total for d, n in sizes.items()}
    weights: dict[str, float] = {}
    free = set(sizes)
    while True:
        left = 1 - sum(weights.values())
        scale = left / sum(sizes[d] ** 0.5 for d in free)
        over = {d for d in free if sizes[d] ** 0.5 * scale > cap[d]}
        if not over:
            return weights | {d: sizes[d] ** 0.5 * scale for d in sorted(free)}
        weights |= {d: cap[d] for d in over}
        free -= over


class TokenMix:
    """Windows of `context`+1 tokens: a domain by weight, then its windows in a shuffled order per pass.

    The order depends on (seed, domain, pass) and the domain on (seed, step), so `counters` is the whole state.
    """

    def __init__(self, folder: Path, recipe: Recipe, context: int) -> None:
        names = sorted(p.stem for p in folder.glob("*.npy") if not p.stem.startswith(("dev-", "heldout-")))
        self.streams = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        self.names, self.seed, self.context = names, recipe.seed, context
        weights = domain_weights(
            {n: len(s) for n, s in self.streams.items()}, recipe.expected_tokens, recipe.max_epochs
        )
        self.weights = np.array([weights[n] for n in names])
        self.weights /= self.weights.sum()
        short = [name for name in names if len(self.streams[name]) < 2 * context]
        if short:
            raise ValueError(f"{folder}: too little text for windows of {context} tokens in {', '.join(short)}")
        self.counters = [0] * len(names)
        self._order: dict[int, tuple[int, int, np.ndarray]] = {}

    def _window(self, domain: int) -> np.ndarray:
        stream = self.streams[self.names[domain]]
        per_pass = (len(stream) - self.context) // self.context  # one window is left out: the random offset
        number, place = divmod(self.counters[domain], per_pass)
        if self._order.get(domain, (-1,))[0] != number:
            rng = np.random.default_rng((self.seed, domain, number))
            self._order[domain] = (number, int(rng.integers(self.context)), rng.permutation(per_pass))
        _, offset, order = self._order[domain]
        self.counters[domain] += 1
        start = offset + int(order[place]) * self.context
        window = stream[start : start + self.context + 1]
        return window if len(window) == self.context + 1 else stream[-self.context - 1 :]

    def batch(self, step: int, sequences: int) -> np.ndarray:
        """[sequences, context+1] int64."""
        rng = np.random.default_rng((self.seed, 7, step))
        chosen = rng.choice(len(self.names), size=sequences, p=self.weights)
        return np.stack([self._window(int(d)) for d in chosen]).astype(np.int64)
