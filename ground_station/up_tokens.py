"""Tokens of a flashed fleet inside `spacemoe up --bundle`: waits for boards, sends them their shards, and serves the API from then on.

A thread of its own, so that enrolment and the page never wait for it. The boards that take part are those that were online when it
began; one that enrols later takes part after the next start. Leaves out a single text (generate.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack

from ground_station import generate, serving, spot_fleet
from ground_station.allow_list import AllowList
from ground_station.api_late import LateApi
from ground_station.control import Control
from ground_station.delivery import Deliverer
from ground_station.fleet_records import FleetFolder
from ground_station.link import Link
from ground_station.mission import Mission
from ground_station.serving_engine import serving_api, tell_heat

log = logging.getLogger("spacemoe.up")

AGAIN_S = 5.0
STOP_S = 15.0
WAITING = "no model is served yet: the ground station waits for boards"


class Tokens:
    """Use as a context manager, inside the lives of `control` and `mission`. `say` gets a line for each step."""

    def __init__(
        self,
        folder: FleetFolder,
        options: generate.Options,
        control: Control,
        mission: Mission,
        late: LateApi,
        say: Callable[[str], None],
    ) -> None:
        """Raises: shard.BundleError, ValueError: what cannot be is told before anything starts."""
        self._model = serving.model_of(options)
        self._folder, self._options, self._control, self._mission = folder, options, control, mission
        self._late, self._say = late, say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tokens", daemon=True)
        late.why = WAITING

    def __enter__(self) -> Tokens:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        said = ""
        while not self._stop.is_set():
            try:
                self._serve()
            except Exception as error:  # boards that are not there yet, a link that is busy: again, until they are
                if not isinstance(error, (RuntimeError, ValueError, OSError)):
                    log.exception("tokens cannot be made")
                why = " ".join(str(error).split()) or type(error).__name__
                self._late.withdraw(f"no model is served yet: {why}")
                if why != said and not self._stop.is_set():
                    self._say(f"tokens: {why}")
                    said = why
            self._stop.wait(AGAIN_S)

    def _serve(self) -> None:
        folder, options, model = self._folder, self._options, self._model
        ports, keys, allowed = folder.info.ports, folder.curve_keys(), AllowList(folder)
        births = generate.online(self._control, folder, options)  # the data plane is free for others until then
        with ExitStack() as stack:
            link = stack.enter_context(Link(f"tcp://{options.bind}:{ports.data}", keys, allowed))
            deliverer = stack.enter_context(Deliverer(f"tcp://{options.bind}:{ports.delivery}", keys, allowed))

            def show(text: str) -> None:
                if text.strip():
                    self._say(f"tokens: {text.strip()}")

            table, _ = generate.equip(births, model.manifest, options, deliverer, show, lambda done, total, what: None)
            if missing := link.wait_for(set(table.nodes), options.patience_s):
                raise generate.BoardsError(f"not on the data plane: {', '.join(sorted(missing))}")
            spot = stack.enter_context(
                spot_fleet.checking(folder, self._control, options.bundle, model.manifest, births, show)
            )
            made = serving.Serving(model, table, link, self._control, show, options.timeout_s, spot)
            made.price()
            tell_heat(made, self._mission)
            stack.enter_context(serving_api(made, self._mission, self._late))
            self._say(f"tokens: {model.manifest.name} is served by {len(table.nodes)} boards, see /v1/models")
            self._stop.wait()
