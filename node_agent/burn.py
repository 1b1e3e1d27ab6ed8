"""A load on purpose: the command `burn` keeps this node's own experts busy for a while (`spacemoe calibrate` asks for it).

The guard's duty cap holds for the burn and the data plane together: what the data plane computes counts against the burn, which
gives way, and to the guard and the energy meter a burn is computing like any other (Serving). onnxruntime lets several threads run
one session; the data plane's one-row buffers, which they must not share, are not used here. Without a shard the self-test's
expert is run. One thread: a burn is what one busy data plane is. Leaves out: what the cap is (guard.py).
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import Callable, Iterator, Mapping

import numpy as np

from node_agent import selftest_graph
from node_agent.counters import Activity
from node_agent.errors import CommandError
from node_agent.experts import Experts, open_session
from node_agent.pacing import CREDIT_S, Pacer

log = logging.getLogger("node_agent.burn")

MAX_SECONDS = 3600.0
DUTIES = (0.01, 1.0)
BURST_S = 0.02  # computed without a look at the cap
LOOK_S = 0.1  # longest wait without a look at it
# A decoding node computes one row at a time. Where that is quicker (a tiny expert), rows are added: Python's part of each call
# would keep the interpreter from the data plane.
SHORTEST_CALL_S = 5e-4
MAX_ROWS = 512

OnEvent = Callable[[str, str, str], None]


class Serving(Activity):
    """The data plane's activity and, beside it, the burn's, which counts as 'compute' to whoever reads."""

    def __init__(self) -> None:
        super().__init__()
        self.burning = Activity()  # written by the burn's thread

    def seconds(self, kind: str) -> float:
        """Time spent on `kind` until now, by both."""
        return self.served_s(kind) + (self.burning.seconds("compute") if kind == "compute" else 0.0)

    def served_s(self, kind: str) -> float:
        """The data plane's alone."""
        return super().seconds(kind)


@dataclass(frozen=True)
class Order:
    """Burn at `duty` (share of time, 0-1) until `until_s` of time.monotonic()."""

    duty: float
    until_s: float


def parse_order(arguments: Mapping[str, str], now_s: float) -> Order | None:
    """The command `burn` with {"seconds": "60", "duty": "1.0"}; None: `seconds` is 0, stop, whatever `duty` says: a load that
    is to end must not go on for a mistake beside it.  Raises: CommandError."""
    unknown = set(arguments) - {"seconds", "duty"}
    if unknown:
        raise CommandError(f"burn has the argument {min(unknown)[:40]!r}, which is unknown: give seconds and duty")
    values = {}
    for name, default, (low, high), zero in (
        ("seconds", "", (0.0, MAX_SECONDS), " (0 stops a burn)"),
        ("duty", "1", DUTIES, ""),
    ):
        text = arguments.get(name, default)
        try:
            values[name] = float(text) if len(text) <= 32 else math.nan
        except ValueError:
            values[name] = math.nan
        if not low <= values[name] <= high:
            raise CommandError(f"burn's {name} is {text[:40]!r}: give a number of {low:g} to {high:g}{zero}")
        if name == "seconds" and not values[name]:
            return None
    return Order(values["duty"], now_s + values["seconds"])


class Allowance:
    """When the next burst may begin: an absolute time line as in pacing.py, on which all computing of the node is charged."""

    def __init__(self, now_s: float) -> None:
        self._next_s = now_s

    def charge(self, now_s: float, computed_s: float, duty: float) -> None:
        """`computed_s` were computed until now, at a cap of `duty` (above 0; 1: nothing is held back)."""
        begun_s = now_s - computed_s - CREDIT_S / duty
        self._next_s = now_s if duty >= 1.0 else max(self._next_s, begun_s) + computed_s / duty

    def wait_s(self, now_s: float) -> float:
        return max(0.0, self._next_s - now_s)


class Burn:
    """At most one burn at a time, in a thread that lives as long as it. Use as a context manager: it ends with the agent."""

    def __init__(self, experts: Experts, serving: Serving, pacer: Pacer, on_event: OnEvent):
        """`pacer`: of the data plane, read and never written; `on_event(severity, kind, text)`."""
        self._experts, self._serving, self._pacer, self._on_event = experts, serving, pacer, on_event
        self._order: Order | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # holds the three above together

    def __enter__(self) -> Burn:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._closed, self._order, thread = True, None, self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(5.0)

    def order(self, arguments: Mapping[str, str]) -> str:
        """Carries out the command; returns what is to be answered. A burn under way goes on as the new order says. Any thread.

        Raises: CommandError.
        """
        now_s = time.monotonic()
        order = parse_order(arguments, now_s)
        with self._changed:
            if self._closed:
                raise CommandError("the agent is about to stop: send burn again when it is back")
            before, self._order = self._order, order
            self._changed.notify_all()
            if order is None:
                return "the burn is stopped" if before is not None else "there is no burn"
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(order,), name="burn", daemon=True)
                self._thread.start()
        return f"burning at duty {order.duty:g} for {order.until_s - now_s:g} s"

    def _run(self, order: Order) -> None:
        while True:
            failed = self._one(order)
            with self._changed:
                if (
                    failed or self._order is None or self._closed
                ):  # an order that came with a failure is answered by its event
                    self._order = self._thread = None
                    return
                order = self._order  # it came between the end of one and here

    def _one(self, order: Order) -> bool:
        """A burn from begin to end; returns whether it failed."""
        start_s = time.monotonic()
        computed_s = self._serving.burning.seconds("compute")
        self._tell("info", f"begins: duty {order.duty:g} for {order.until_s - start_s:.1f} s, or as told meanwhile")
        failed = False
        try:
            self._burn()
        except Exception as error:  # onnxruntime's have no common base; the node serves on, and whoever asked is told
            failed = True
            self._tell("warning", f"failed: {type(error).__name__}: {str(error)[:200]}: run node-agent selftest")
        self._serving.burning.leave()
        passed_s = time.monotonic() - start_s
        computed_s = self._serving.burning.seconds("compute") - computed_s
        self._tell("info", f"over after {passed_s:.1f} s, {computed_s:.1f} s of it computed")
        return failed

    def _burn(self) -> None:
        calls = self._calls()
        allowance = Allowance(time.monotonic())
        served_s = self._serving.served_s("compute")
        while (order := self._now()) is not None:
            duty = 0.0 if self._pacer.refusal[0] else min(order.duty, self._pacer.duty)
            now_s = time.monotonic()
            now_served_s = self._serving.served_s("compute")
            if duty > 0.0:
                allowance.charge(now_s, now_served_s - served_s, duty)
                served_s = now_served_s
            wait_s = allowance.wait_s(now_s) if duty > 0.0 else LOOK_S
            if wait_s > 0.0:
                with self._changed:
                    if self._order is not None:
                        self._changed.wait(min(wait_s, LOOK_S))
                continue
            self._serving.burning.enter("compute")
            while time.monotonic() - now_s < BURST_S:
                next(calls)
            self._serving.burning.leave()
            end_s = time.monotonic()
            allowance.charge(end_s, end_s - now_s, duty)

    def _now(self) -> Order | None:
        """The order in force; None ends the thread, and from then on a new order starts another."""
        with self._changed:
            if self._order is not None and time.monotonic() < self._order.until_s and not self._closed:
                return self._order
            self._order = None
            return None

    def _calls(self) -> Iterator[None]:
        """Each step runs one expert, all in turn, on random rows."""
        # Of our own package: Experts has no other use for the sessions than the data plane's.
        sessions = [loaded.session for loaded in self._experts._loaded.values()]
        sessions = sessions or [open_session(selftest_graph.onnx_bytes())]
        hidden = sessions[0].get_inputs()[0].shape[-1]
        random = np.random.default_rng()
        x = random.standard_normal((1, hidden), np.float32)
        for session in itertools.cycle(sessions):
            start_s = time.perf_counter()
            session.run(["y"], {"x": x})
            if time.perf_counter() - start_s < SHORTEST_CALL_S and 2 * len(x) <= MAX_ROWS:
                x = random.standard_normal((2 * len(x), hidden), np.float32)
            yield

    def _tell(self, severity: str, text: str) -> None:
        log.log(logging.WARNING if severity == "warning" else logging.INFO, "burn: %s", text)
        self._on_event(severity, "burn", text)
