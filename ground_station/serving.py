"""What makes tokens from a fleet, put together once for `demo`, `generate` and the API: trunk, policy, experts on nodes, prices.

Whoever uses it brings the fleet: which node holds what (a Table), the data plane (a Link) and the control plane (a Control).
Leaves out: where boards come from (local_fleet.py, up.py), shards that have to be sent (delivery.py), several texts at once (engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firmware_sim.scenario import Payload
from ground_station import ledger, live_costs, rates, selection
from ground_station.control import Control
from ground_station.decode import Decoder, TokenCost
from ground_station.dispatch import Table
from ground_station.link import Link
from ground_station.live_prices import Costs, Orbit
from ground_station.live_setting import BLIND, policy_of, setting_of
from ground_station.parity import with_one_process
from ground_station.price_loop import Chosen, PriceLoop, Tape, View, play
from ground_station.remote import RemoteExperts
from ground_station.sampling import Sampling
from ground_station.selection_choice import Policy
from ground_station.selection_world import World
from ground_station.spot_checker import SpotChecker
from ground_station.text import Text
from ground_station.text_stream import Show
from ground_station.trunk import ContextFull, Trunk
from node_agent import compress, shard

MEASURING = "measuring what a run of an expert costs on each board ...\n"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How tokens are made, wherever the boards are. `replica` None: no second copies; `temp_limit_c`: for budgeted."""

    bundle: Path
    prompt: str = "In the beginning"
    tokens: int = 64
    sampling: Sampling = Sampling()
    precision: str = "int8"
    replica: str | None = "int4"
    codec: str = "q8"
    bits_per_value: float | None = None
    policy: str = "topk"
    temp_limit_c: float = 85.0
    parity: bool = True


@dataclass(frozen=True)
class Model:
    """A bundle, its tokenizer, and the prompt in its tokens."""

    options: Options
    manifest: shard.Manifest
    text: Text
    prompt_ids: list[int]

    def policy(self) -> Policy:
        return policy_of(self.options.policy, self.options.sampling.seed, self.options.bundle, self.manifest)

    def allocator(self) -> rates.Allocator | None:
        """Of codec importance, else None."""
        options = self.options
        return rates.for_codec(options.codec, options.bundle, self.manifest, bits_per_value=options.bits_per_value)


def model_of(options: Options) -> Model:
    """Reads the bundle, and finds what cannot be before anything is started.  Raises: shard.BundleError, ContextFull, ValueError."""
    if options.codec not in compress.CODECS:
        raise ValueError(f"codec {options.codec!r} is unknown: use one of {', '.join(compress.CODECS)}")
    if not 0 < options.temp_limit_c < 1000:
        raise ValueError(f"temperature limit {options.temp_limit_c} °C is not between 0 and 1000")
    manifest = shard.read_manifest(options.bundle)
    text = Text(options.bundle, manifest)
    prompt_ids = ([manifest.bos_id] if manifest.bos_id is not None else []) + text.encode(options.prompt)
    needed, room = len(prompt_ids) + options.tokens, manifest.dims.max_context
    if needed > room:
        raise ContextFull(
            f"prompt and answer need {needed} tokens, {manifest.name} has a context of {room}: ask for at most "
            f"{max(0, room - len(prompt_ids))}"
        )
    model = Model(options, manifest, text, prompt_ids)
    model.policy()
    model.allocator()  # a bundle without calibration is told now
    return model


class Serving:
    """Ready to make tokens once its nodes are on the data plane. `costs`: what a run costs on each board, for a policy that prices."""

    def __init__(
        self,
        model: Model,
        table: Table,
        link: Link,
        control: Control,
        show: Show,
        timeout_s: float | None = None,
        spot: SpotChecker | None = None,
    ) -> None:
        """Waits for baselines and measures costs where the policy needs them.  Raises: shard.BundleError, live_costs' errors."""
        options, self.model, self.table, self.control = model.options, model, table, control
        self.trunk = Trunk(options.bundle, model.manifest)
        patience = {} if timeout_s is None else {"timeout_s": timeout_s}
        self.remote = RemoteExperts(link, table, options.codec, allocator=model.allocator(), spot=spot, **patience)
        self.chosen = Chosen(model.policy(), len(table.nodes))
        self.decoder = Decoder(self.trunk, self.chosen, self.remote, model.manifest.eos_ids)
        self.prices: PriceLoop | None = None
        ledger.wait_for_baselines(control, table.nodes)  # without it nothing could be told from idling
        self.costs = Costs.none(len(table.nodes))
        if options.policy not in BLIND:
            show(MEASURING)
            self.costs = live_costs.measure(link, control, table, model.manifest, options.codec)

    def price(
        self,
        orbit: Orbit | None = None,
        satellites: Callable[[], Mapping[str, View]] | None = None,
        payload: Payload | None = None,
        tape: Tape | None = None,
    ) -> None:
        """Prices follow the telemetry from here on, where the policy looks at them; the rest is of a scenario and of a recording."""
        options, table, manifest = self.model.options, self.table, self.model.manifest
        if options.policy in BLIND:
            return
        self.prices = PriceLoop(
            self.decoder,
            self.chosen,
            setting_of(table, manifest, self.costs, options.temp_limit_c, orbit),
            World.of(table, manifest.dims.experts, self.costs.joules, self.costs.ms),
            self.control.snapshot,
            self.control.now,
            self.remote.link.is_up,
            satellites,
            payload,
            tape,
        )

    def generate(self, logits: list[np.ndarray] | None = None, tape: Tape | None = None) -> Iterator[TokenCost]:
        """The text that the options ask for, once more with each call; `logits` receives those of each token."""
        options = self.model.options
        return play(
            self.decoder,
            self.chosen,
            self.model.prompt_ids,
            options.tokens,
            options.sampling,
            self.prices,
            tape,
            lambda: tuple(map(self.remote.link.is_up, self.table.nodes)),
            logits,
        )

    def parity(self, costs: list[TokenCost], logits: list[np.ndarray], links: bool = False) -> dict:
        """The same text in one process (parity.with_one_process). Prices moved with that moment's temperatures, so a policy that goes by
        them is not asked again: its choices are repeated; with `links`, whose rates moved as well, so are the allocator's levels."""
        model, options = self.model, self.model.options
        again = model.policy() if options.policy in BLIND else selection.Replay(self.chosen.choices)
        allocator = model.allocator()
        if links and allocator is not None:
            allocator.repeat(self.remote.allocator.used)
        return with_one_process(
            options.bundle,
            model.manifest,
            self.table,
            self.trunk,
            again,
            options.codec,
            allocator,
            model.prompt_ids,
            options.sampling,
            costs,
            logits,
        )

    def runs_per_token(self, ran: int, rows: int) -> float | None:
        """Expert runs of a token over all layers, of `ran` in `rows` rows."""
        return round(ran * len(self.model.manifest.moe_layers) / rows, 3) if rows else None
