"""The decode loop: prompt in, tokens out, with what each token cost. The same loop serves one process and many nodes.

Imports only contract modules, onnxruntime (by trunk.py) and whatever `experts` is given, so that it can run on a board as
the gateway. Leaves out: text (text.py turns ids into it) and who starts the nodes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Iterator, Protocol

import numpy as np

from ground_station.dispatch import Named
from ground_station.remote import RemoteExperts, Rung, Traffic
from ground_station.sampling import Sampler, Sampling
from ground_station.selection_choice import Policy
from ground_station.selection_world import World
from ground_station.trunk import Trunk


class Experts(Protocol):
    """Whoever runs experts: local.LocalExperts or remote.RemoteExperts."""

    def run(
        self,
        layer: int,
        hidden: np.ndarray,
        experts: np.ndarray,
        gates: np.ndarray,
        named: Named | None = None,
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class TokenCost:
    """Where one token's time and bytes went. Times in ms; `expert_ms` is the critical path over nodes, `wire_ms` what is left
    of the exchange after compute and codec on the slowest node. The first entry of a text is its prefill (n = prompt length).
    """

    token_id: int
    n: int
    total_ms: float
    trunk_ms: float
    select_ms: float
    codec_ms: float
    wire_ms: float
    expert_ms: float
    sent_bytes: int
    received_bytes: int
    rungs: tuple[Rung, ...] = ()


class Decoder:
    """One model ready to generate: trunk, selection policy and experts. Whoever hears the telemetry sets `world` between tokens."""

    def __init__(self, trunk: Trunk, policy: Policy, experts: Experts, eos_ids: tuple[int, ...] = ()):
        self.trunk, self.policy, self.experts, self.eos_ids = trunk, policy, experts, eos_ids
        self.world: World | None = None
        self.moe_ns = self.select_ns = 0

    def moe(self, layer: int, hidden: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Select, then run: what the trunk calls between two segments."""
        started = time.perf_counter_ns()
        choice = self.policy(layer, logits) if self.world is None else self.policy(layer, logits, self.world)
        selected = time.perf_counter_ns()
        named = None if choice.nodes is None else Named(choice.nodes, choice.precisions)
        if isinstance(self.experts, RemoteExperts):  # its ladder may need the router's next expert
            out = self.experts.run(layer, hidden, choice.experts, choice.gates, named, logits)
        else:
            out = self.experts.run(layer, hidden, choice.experts, choice.gates, named)
        self.select_ns += selected - started
        self.moe_ns += time.perf_counter_ns() - selected
        return out

    def generate(
        self,
        prompt_ids: list[int],
        max_tokens: int,
        sampling: Sampling = Sampling(),
        capacity: int | None = None,
        keep_logits: list[np.ndarray] | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[TokenCost]:
        """Yields one TokenCost per new token (the first includes the prefill); ends early at an end-of-text token.

        keep_logits: a list that receives a copy of the logits [V] each token was drawn from.
        Raises: trunk.ContextFull when prompt and new tokens do not fit `capacity` (default: the model's context).
        """
        sequence = self.trunk.sequence(min(capacity or len(prompt_ids) + max_tokens, self.trunk.dims.max_context))
        sampler, token = Sampler(sampling), -1
        for index in range(max_tokens):
            started = time.perf_counter_ns()
            self.moe_ns = self.select_ns = 0
            traffic = Traffic()
            if isinstance(self.experts, RemoteExperts):
                self.experts.traffic = traffic
            if index == 0:
                logits = sequence.prefill(prompt_ids, self.moe)
            else:
                logits = sequence.step(token, self.moe)
            if keep_logits is not None:
                keep_logits.append(logits.copy())
            token = sampler(logits)
            yield self.cost(token, len(prompt_ids) if index == 0 else 1, time.perf_counter_ns() - started, traffic)
            if token in self.eos_ids and not ignore_eos:
                return

    def cost(self, token: int, n: int, total_ns: int, traffic: Traffic) -> TokenCost:
        """What a step of `n` rows took since `moe_ns` and `select_ns` were set to 0."""
        local = not isinstance(self.experts, RemoteExperts)
        expert_ns = self.moe_ns if local else traffic.expert_us * 1000
        codec_ns = traffic.codec_ns + traffic.node_codec_us * 1000
        wire_ns = 0 if local else max(0, traffic.exchange_ns - expert_ns - traffic.node_codec_us * 1000)
        return TokenCost(
            token,
            n,
            total_ns / 1e6,
            (total_ns - self.moe_ns - self.select_ns) / 1e6,
            self.select_ns / 1e6,
            codec_ns / 1e6,
            wire_ns / 1e6,
            expert_ns / 1e6,
            traffic.sent_bytes,
            traffic.received_bytes,
            tuple(traffic.rungs),
        )
