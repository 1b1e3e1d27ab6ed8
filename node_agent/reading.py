"""One sensor and how it is read: within a time limit, bounded in size, with a validity that says how far to believe it.

A reading that hangs costs its limit once: later readings of the same file are refused at once until the first comes back, and
what it then brings is delivered as 'stale', with the time at which it came. Leaves out: which sensors there are (sensors.py).
Source: Documentation/hwmon/sysfs-interface.rst of the Linux kernel (an attribute is one fixed-point number as text).
"""

from __future__ import annotations

import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from node_agent.sensors_doubt import Watch
from node_agent.wire import Provenance, Sample, Validity

READ_LIMIT_S = 0.25
MAX_READ_BYTES = 4096
MAX_HUNG = 32  # threads that may hang at once; a board with more hung drivers than that is left alone
NUMBER = re.compile(r"[+-]?[0-9]{1,20}")

T = TypeVar("T")


@dataclass(frozen=True)
class Late:
    """What a call brought that had been given up: its result, and the UTC time in s at which it came."""

    value: Any
    at: float


class TimedCalls:
    """Runs calls that may hang in threads of their own. Callers never wait for each other; one key hangs at most one thread."""

    def __init__(self, limit_s: float = READ_LIMIT_S):
        self.limit_s = limit_s
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue] = []
        self._hung: dict[Hashable, Future] = {}

    def call(self, key: Hashable, function: Callable[[], T], limit_s: float | None = None) -> T | Late:
        """What `function` returns, or a Late of an earlier call for `key` that had hung.

        Raises: TimeoutError where it takes over the limit, still hangs from earlier, or too many others hang; what it raises.
        """
        limit_s = self.limit_s if limit_s is None else limit_s
        with self._lock:
            hung = self._hung.get(key)
            if hung is not None:
                if not hung.done():
                    raise TimeoutError("still hangs from an earlier try")
                del self._hung[key]
            elif len(self._hung) >= MAX_HUNG:
                self._hung = {other: future for other, future in self._hung.items() if not future.done()}
                if len(self._hung) >= MAX_HUNG:
                    raise TimeoutError(f"not tried: {MAX_HUNG} other sensors hang")
            worker = None if hung is not None else self._idle.pop() if self._idle else self._start()
        if worker is None:
            value, at = hung.result()
            return Late(value, at)
        future: Future = Future()
        worker.put((function, future))
        try:
            return future.result(limit_s)[0]
        except FutureTimeout:
            if future.done():  # it came in this very moment, or raised a TimeoutError of its own
                return future.result()[0]
            raise TimeoutError(f"took longer than {limit_s:g} s") from None
        finally:
            if future.done():
                self._rest(worker)
            else:
                with self._lock:
                    self._hung[key] = future
                worker.put(None)  # ends that thread, should the call ever return

    def _rest(self, worker: queue.SimpleQueue) -> None:
        with self._lock:
            self._idle.append(worker)

    def _start(self) -> queue.SimpleQueue:
        requests: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_work, args=(requests,), name="sensors", daemon=True).start()
        return requests

    def read(self, path: Path) -> str | Late:
        """A small file's text, stripped. Links are not followed: the kernel's attributes are none, and a link could lead out of
        the sysroot.  Raises: OSError (TimeoutError is one); ValueError for a file over MAX_READ_BYTES."""
        return self.call(path, lambda: _read_file(path))

    def text(self, path: Path) -> str:
        """As `read`, where it does not matter when the text came.  Raises: OSError, ValueError."""
        got = self.read(path)
        return got.value if isinstance(got, Late) else got


def _work(requests: queue.SimpleQueue) -> None:
    while (request := requests.get()) is not None:
        function, future = request
        try:
            future.set_result((function(), time.time()))
        except BaseException as error:
            future.set_exception(error)
        del request, function, future  # an idle thread keeps nothing alive


def _read_file(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        content = os.read(descriptor, MAX_READ_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_READ_BYTES:
        raise ValueError(f"{path} is over the limit of {MAX_READ_BYTES} bytes")
    return content.decode("ascii", "replace").strip()


CALLS = TimedCalls()
WATCH = Watch()


@dataclass(frozen=True)
class Sensor:
    """One quantity: the product of the integers in `paths`, times `scale`, in `unit`; or what `ask` returns.

    `ask` -> (value in `unit`, UTC time in s it is of), for what is no file.  It raises OSError or ValueError.
    `limits`: what is outside is no reading. `wraps_at`: an energy counter's range in `unit`. `in_total`: one of the sensors
    whose sum is the board's power (or energy). `rate_hz`: how often it has new data, where the driver says so or `ask` limits
    it. `state`: what a flag says is so now. `doubt`: what sensors_doubt.py judges: whether it stands still ('stuck'), and
    whether its value ('step') or the first path's voltage in mV ('volts') jumps; `stuck_after_s`: where standing still for so
    long is impossible by itself.
    """

    name: str
    unit: Literal["degC", "W", "J", "V", "flag"]
    scope: str
    provenance: Provenance
    paths: tuple[Path, ...]
    scale: float
    limits: tuple[float, float]
    wraps_at: float | None = None
    in_total: bool = False
    rate_hz: float | None = None
    doubt: Literal["stuck", "step", "volts"] | None = None
    stuck_after_s: float | None = None
    state: str | None = None
    ask: Callable[[], tuple[float, float]] | None = None


@dataclass(frozen=True)
class LeftOut:
    """Something that looks like a sensor and is not used."""

    path: Path
    reason: str


def why(error: Exception) -> str:
    """A failed reading in words."""
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())[:160] or type(error).__name__


def number(text: str) -> int:
    """A whole number as the kernel writes it.  Raises: ValueError."""
    if not NUMBER.fullmatch(text):
        raise ValueError(f"says {ascii(text)[:24]}, which is no number" if text else "is empty")
    return int(text)


def take(sensor: Sensor, calls: TimedCalls = CALLS, watch: Watch | None = WATCH) -> tuple[Sample, str | None]:
    """The sensor's value now, and why it is not 'ok' where it is not.

    Unreadable or hung: 'missing'. Not a possible value: 'invalid'. Both with value None. Came late, or has been the same for
    too long: 'stale', with the value and the time it is of. `watch` knows what came before; None: nothing does.
    """
    value: float | None = None
    validity: Validity = "ok"
    reason, at = None, time.time()
    try:
        if sensor.ask is not None:
            value, at = sensor.ask()
            raw: tuple[float, ...] = (value,)
        else:
            texts = [calls.read(path) for path in sensor.paths]
            late = [text for text in texts if isinstance(text, Late)]
            if late:
                validity, at = "stale", min(text.at for text in late)
                reason = f"came late, over {calls.limit_s:g} s"
            raw = tuple(number(text.value if isinstance(text, Late) else text) for text in texts)
            value = math.prod(raw) * sensor.scale
        low, high = sensor.limits
        if not low <= value <= high:
            validity, reason = "invalid", f"{value:g} {sensor.unit} is no possible value"
        elif validity == "ok" and watch is not None and sensor.doubt is not None:
            key, now_s = (sensor.name, sensor.paths), time.monotonic()
            if reason := watch.stuck(key, raw, now_s, sensor.stuck_after_s, whole=sensor.in_total):
                validity = "stale"
            if sensor.doubt != "stuck":
                volts = sensor.doubt == "volts"
                seen = raw[0] * 1e-3 if volts else value
                if jump := watch.jumped(key, seen, now_s, volts):
                    validity, reason = "invalid", f"{jump} {'V' if volts else sensor.unit}"
    except ValueError as error:
        validity, reason = "invalid", why(error)
    except OSError as error:  # TimeoutError is one
        validity, reason = "missing", why(error)
    value = float(value) if validity in ("ok", "stale") else None
    return Sample(sensor.name, value, sensor.unit, validity, sensor.provenance, sensor.scope, at), reason


def read(sensor: Sensor, calls: TimedCalls = CALLS) -> Sample:
    """The sensor's value now: `take` without the reason."""
    return take(sensor, calls)[0]


def measured_rate_hz(sensor: Sensor, seconds: float = 0.5, calls: TimedCalls = CALLS) -> float | None:
    """How often new values are seen in a short burst of readings as fast as they come; None where none changes.

    A lower bound: a new value that equals the last one is not seen. Stops early at a reading that fails.
    """
    start_s = now_s = time.monotonic()
    first_s = last_s = last = None
    changes = 0
    while now_s - start_s < seconds:
        value = take(sensor, calls, None)[0].value
        now_s = time.monotonic()
        if value is None:
            return None
        if last is not None and value != last:
            # From change to change: the time before the first and after the last belongs to no whole period.
            changes += 1
            first_s, last_s = first_s or now_s, now_s
        last = value
    if changes < 2 or last_s <= first_s:
        return None
    return (changes - 1) / (last_s - first_s)
