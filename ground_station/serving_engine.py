"""The token engine over a Serving, told to mission control: prices follow each step, and the page sees tokens, requests and heat of use.

Leaves out the engine (engine.py), the API (api_openai.py) and where the boards come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ground_station import api_chat, api_openai, engine
from ground_station.api_late import LateApi
from ground_station.decode import TokenCost
from ground_station.engine_meter import FleetMeter
from ground_station.mission import Mission
from ground_station.selection_choice import Choice
from ground_station.serving import Serving


def tell_heat(made: Serving, mission: Mission) -> None:
    """Whatever the policy chooses from here on counts as use of its experts."""

    def heard(layer: int, choice: Choice) -> None:
        mission.heat.ran(layer, choice.experts[np.asarray(choice.gates) != 0])

    made.chosen.heard = heard


@contextmanager
def serving_api(
    made: Serving, mission: Mission, late: LateApi, options: engine.Options = engine.Options()
) -> Iterator[engine.Engine]:
    """Runs an engine and puts its API into `late`. `made` is the engine's alone meanwhile.  Raises: shard.BundleError."""
    chosen, prices = made.chosen, made.prices
    kept, calls = len(chosen.choices), chosen.calls

    def before() -> None:
        nonlocal calls
        calls = chosen.calls
        if prices is not None:
            prices.update()

    def after(cost: TokenCost) -> None:
        if prices is not None:
            prices.spent(cost, chosen.calls - calls)
        chosen.forget(kept)

    manifest = made.model.manifest
    template = api_chat.template_of(made.model.options.bundle, manifest)
    with engine.Engine(
        made.decoder,
        manifest,
        made.model.text,
        options,
        meter=FleetMeter(made.control, made.table.nodes),
        before_step=before,
        after_step=after,
        on_token=mission.token,
        on_request=mission.request,
    ) as running:
        late.serve(api_openai.create_routes(running, template))
        try:
            yield running
        finally:
            late.withdraw("the model is served no more")
