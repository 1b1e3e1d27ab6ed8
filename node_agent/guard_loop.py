"""The guard's thread: reads what the guard must know, lets it decide, and gives the duty cap to the data plane.

Temperatures are read every PERIOD_S, the rest every SLOW_S. A reading that hangs costs its time limit (sensors.py); a thread
that ends is reported by `failed`, one that hangs by `beat_s`. Leaves out: the decisions (guard.py).
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Callable

import psutil

from node_agent import frame, guard, sensors
from node_agent.config import GuardConfig
from node_agent.counters import Counters
from node_agent.pacing import Pacer
from node_agent.wire import Provenance, Sample

log = logging.getLogger("node_agent.guard")

PERIOD_S = 0.5
SLOW_S = 1.0
LOG_LEVELS = {"info": logging.INFO, "watch": logging.INFO}


class GuardLoop:
    """Use as a context manager. `on_event(severity, kind, text)` is called in the guard's thread."""

    def __init__(
        self,
        config: GuardConfig,
        sysroot: Path,
        found: sensors.Found,
        counters: Counters,
        pacer: Pacer,
        on_event: Callable[[str, str, str], None],
    ):
        self.limit_c = guard.limit_c(config, sensors.trip_points(sysroot))
        self.failed: Exception | None = None
        self.beat_s = time.monotonic()
        self._config, self._found, self._counters, self._pacer, self._on_event = (
            config,
            found,
            counters,
            pacer,
            on_event,
        )
        self._provenance: Provenance = "simulated" if sensors.is_simulated(sysroot) else "measured"
        self._temps = tuple(sensor for sensor in found.sensors if sensor.unit == "degC")
        self._state = guard.start(self.beat_s)
        self._decision = guard.Decision(1.0, "", 0, None)
        self._order: guard.Order | None = None
        self._heard_s: float | None = None
        self._commanded_s: float | None = None
        self._bytes_in = counters.bytes_in
        self._busy_s, self._told_s, self._told_busy_s = 0.0, self.beat_s, 0.0
        self._slow_due_s = 0.0
        self._flags: frozenset[str] = frozenset()
        self._memory_bytes: int | None = None
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)

    def __enter__(self) -> GuardLoop:
        """Decides once before anything is served."""
        if self.limit_c is None:
            log.warning("no trip point and no [guard] temp_limit_c: heat is not guarded; set temp_limit_c")
        self._tick()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join(5.0)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def decision(self) -> guard.Decision:
        """The last one."""
        return self._decision

    def heard(self) -> None:
        """The ground station has sent a command. Any thread."""
        self._commanded_s = time.monotonic()

    def order(self, arguments: dict[str, str]) -> str:
        """Carries out the command `duty`; returns what is to be answered. Any thread.  Raises: CommandError."""
        order = guard.parse_order(arguments, time.monotonic())
        self._order = order
        self.heard()
        self._wake.set()
        if order.cap >= 1.0:
            return "no duty cap of the ground station's any more"
        valid_s = order.until_s - self._commanded_s
        return (
            f"duty at most {order.cap:g} for {valid_s:.1f} s, then {self._config.silent_duty:g} until another command"
        )

    def samples(self, at: float) -> tuple[Sample, ...]:
        """For telemetry; the measured duty is since the last call."""
        now_s, busy_s = time.monotonic(), self._busy_now_s()
        passed_s = max(now_s - self._told_s, 1e-3)
        duty = min(1.0, max(0.0, (busy_s - self._told_busy_s) / passed_s))
        self._told_s, self._told_busy_s = now_s, busy_s
        return guard.samples(self._decision, self.limit_c, duty, self._provenance, at)

    def give_up(self) -> None:
        """This guard hangs: the duty for an unknown temperature holds until it comes round again. Any thread."""
        self._pacer.set(min(self._pacer.duty, self._config.unknown_duty))

    def _busy_now_s(self) -> float:
        """Seconds computed so far, those of the request that is under way too."""
        return self._counters.serving.seconds("compute") + self._counters.codec_s

    def _run(self) -> None:
        try:
            due_s = time.monotonic() + PERIOD_S
            while not self._stop.is_set():
                if self._wake.wait(max(0.0, due_s - time.monotonic())):
                    self._wake.clear()
                    if self._stop.is_set():
                        return
                due_s = time.monotonic() + PERIOD_S
                self._tick()
        except Exception as error:  # the agent reports it and ends: a board without its guard must not go on
            self.failed = error
            self._pacer.set(0.0, frame.NO_GUARD, "the guard of this node failed: start the agent again")

    def _tick(self) -> None:
        temp_c = self._hottest_c()
        now_s = time.monotonic()
        passed_s, self.beat_s = now_s - self.beat_s, now_s
        if now_s >= self._slow_due_s:
            self._slow_due_s = now_s + SLOW_S
            self._flags = frozenset(name for name, here in sensors.flags(self._found).items() if here)
            self._memory_bytes = psutil.virtual_memory().available
        busy_s = self._busy_now_s()
        duty = min(1.0, max(0.0, (busy_s - self._busy_s) / passed_s)) if passed_s > 0 else 0.0
        self._busy_s = busy_s
        seen = guard.Seen(
            now_s, temp_c, duty, self._flags, self._memory_bytes, self._ground_heard_s(now_s), self._order
        )
        self._state, decision = guard.step(self._config, self.limit_c, self._state, seen)
        self._decision = decision
        self._pacer.set(decision.duty, frame.NO_MEMORY if decision.refusal else "", decision.refusal)
        for event in decision.events:
            log.log(LOG_LEVELS.get(event[0], logging.WARNING), "%s: %s", event[1], event[2])
            self._on_event(*event)

    def _hottest_c(self) -> float | None:
        readings = (sensors.read(sensor) for sensor in self._temps)
        return max((sample.value for sample in readings if sample.validity == "ok"), default=None)

    def _ground_heard_s(self, now_s: float) -> float | None:
        """Any frame or command counts; frames are seen by the bytes that came in, which costs the data plane nothing."""
        bytes_in = self._counters.bytes_in
        if bytes_in != self._bytes_in:
            self._bytes_in = bytes_in
            self._heard_s = now_s
        times = [at for at in (self._heard_s, self._commanded_s) if at is not None]
        return max(times, default=None)
