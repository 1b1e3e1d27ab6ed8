"""The token engine: requests that come at any time share one batch, which goes through trunk and experts in lockstep.

One thread decodes. Before each step requests join and leave: those that have their prompt behind them feed one token each, and prompts
are read a chunk at a time beside them, so that a long one does not hold up the others. Each request draws with its own seed, so it gets
the tokens that it would get alone. A second thread reads the boards' meters, so that no token waits for them.
Leaves out HTTP (api_openai.py) and what puts a fleet together (serving.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ground_station.archive_records import RequestRecord, TokenRecord
from ground_station.decode import Decoder, TokenCost
from ground_station.engine_energy import NO_METER, SCOPE, Meter, Metered, Shares
from ground_station.engine_lockstep import lockstep
from ground_station.engine_request import (
    Ended,
    Energy,
    EngineClosed,
    EngineFull,
    Failed,
    Handle,
    Request,
    RequestRefused,
    Token,
    Usage,
)
from ground_station.engine_sequence import NotFinite, Running, Spending
from ground_station.engine_text import TokenBytes
from ground_station.remote import RemoteExperts, Traffic
from ground_station.text import Text
from node_agent.shard import Manifest

log = logging.getLogger("spacemoe.engine")

IDLE_S = 0.2
FLOAT_BYTES = 4
STATES = {"stop": "done", "length": "done", "cancelled": "stopped"}


@dataclass(frozen=True)
class Options:
    """`batch`: sequences at once; `queue`: that may wait; `prefill_rows`: of prompts in one step; `cache_bytes`: of all KV caches;
    `meter_s`: between two readings of the boards while something runs; `energy_wait_s`: how long usage waits for the last one."""

    batch: int = 8
    queue: int = 64
    prefill_rows: int = 256
    cache_bytes: int = 1 << 30
    meter_s: float = 1.0
    energy_wait_s: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= 256 or not 1 <= self.queue <= 10_000 or self.prefill_rows < 1:
            raise ValueError("an engine needs a batch of 1 to 256, a queue of 1 to 10000 and at least 1 row of prompts")


def _nothing(*_: object) -> None:
    pass


class Engine:
    """Starts on entry; use as a context manager. All methods may be called from any thread.

    Args:
        decoder: trunk, policy and experts (serving.Serving.decoder); from the entry on the engine alone uses it.
        meter: reads the boards; None: joules are unknown.
        before_step, after_step: called in the engine's thread, the latter with what the step cost (n = rows): for prices that follow
            telemetry, and a policy that remembers.
        on_token, on_request: hear what happened, in the engine's threads. What any of the four raises is logged.
    """

    def __init__(
        self,
        decoder: Decoder,
        manifest: Manifest,
        text: Text,
        options: Options = Options(),
        *,
        meter: Meter | None = None,
        before_step: Callable[[], None] = _nothing,
        after_step: Callable[[TokenCost], None] = _nothing,
        on_token: Callable[[TokenRecord], None] = _nothing,
        on_request: Callable[[RequestRecord], None] = _nothing,
    ) -> None:
        self.decoder, self.manifest, self.text, self.options = decoder, manifest, text, options
        self.names = TokenBytes(text)
        self.steps = self.rows = 0  # since the start
        self._meter, self._before_step, self._after_step = meter, before_step, after_step
        self._on_token, self._on_request = on_token, on_request
        self._changed = threading.Condition()
        self._queue: deque[Handle] = deque()
        self._running: list[Running] = []
        self._settling: list[Running] = []  # ended, but their last joules are not read yet
        self._cache_bytes = 0
        self._closed = self._started = False
        self._metering = threading.Event()
        self._shares = Shares(time.monotonic())
        self._threads = [threading.Thread(target=self._run, name="engine", daemon=True)]
        if meter is not None:
            self._threads.append(threading.Thread(target=self._read_meters, name="engine-meter", daemon=True))

    def __enter__(self) -> Engine:
        self._started = True
        self._metering.set()  # where the count begins
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._metering.set()
        for thread in self._threads:
            thread.join(10.0)

    # ------------------------------------------------------------ what others ask

    def cache_bytes(self, request: Request) -> int:
        """Of the request's KV cache."""
        dims = self.manifest.dims
        layers = sum(len(segment.attention_layers) for segment in self.manifest.segments)
        rows = len(request.prompt_ids) + request.max_tokens
        return 2 * layers * dims.kv_heads * dims.head_dim * FLOAT_BYTES * rows

    def check(self, request: Request) -> None:
        """Raises: RequestRefused for what can never be served here."""
        dims = self.manifest.dims
        count, room = len(request.prompt_ids), dims.max_context
        if not count:
            raise RequestRefused("the prompt has no tokens: give at least one", "empty_prompt", "prompt")
        if not all(0 <= token < dims.vocab for token in request.prompt_ids):
            raise RequestRefused(f"a token of the prompt is not within 0..{dims.vocab - 1}", "invalid_token", "prompt")
        if count + request.max_tokens > room:
            raise RequestRefused(
                f"this model's context is {room} tokens, but {count} of the prompt and {request.max_tokens} to write were asked for",
                "context_length_exceeded",
                "max_tokens" if count < room else "prompt",
            )
        if request.max_tokens < (0 if request.echo else 1):
            raise RequestRefused(
                "max_tokens is below 1, and the prompt is not to be echoed", "invalid_value", "max_tokens"
            )
        if self.cache_bytes(request) > self.options.cache_bytes:
            raise RequestRefused(
                f"it needs {self.cache_bytes(request)} bytes of cache, {self.options.cache_bytes} are there: ask for fewer tokens",
                "out_of_memory",
                "max_tokens",
            )

    def submit(self, *requests: Request, wake: Callable[[], None] | None = None) -> list[Handle]:
        """All of them or none.  Raises: RequestRefused, EngineFull, EngineClosed."""
        for request in requests:
            self.check(request)
        if len(requests) > self.options.queue:
            raise RequestRefused(
                f"{len(requests)} answers at once are over the limit of {self.options.queue}", "too_many", "n"
            )
        handles = [Handle(request, wake) for request in requests]
        with self._changed:
            if self._closed or not self._started:
                raise EngineClosed("the token engine is not running")
            waiting = len(self._queue)
            if waiting + len(handles) > self.options.queue:
                raise EngineFull(f"{waiting} requests are waiting, {self.options.queue} may: ask again later")
            self._queue.extend(handles)
            self._changed.notify_all()
        return handles

    @property
    def load(self) -> dict[str, int]:
        """How many run and wait, and bytes of their caches."""
        with self._changed:
            return {"running": len(self._running), "waiting": len(self._queue), "cache_bytes": self._cache_bytes}

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while not self._closed:
                self._leave_cancelled()
                self._join()
                if self._running:
                    self._step()
                else:
                    self._idle()
                self._settle_late()
        except Exception:  # a fault of ours: nobody may wait for ever
            log.exception("the token engine has ended")
        finally:
            self._close()

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            left = [run.handle for run in [*self._running, *self._settling]] + list(self._queue)
            running, self._running, self._settling = self._running, [], []
            self._queue.clear()
        for run in running:
            self._record(run, "failed", None, "the ground station was stopped")
        for handle in left:
            handle.put(Failed("the ground station was stopped"))

    def _idle(self) -> None:
        experts = self.decoder.experts
        if isinstance(experts, RemoteExperts):  # who comes and goes is noticed, and spot checks come to an end
            experts.link.drain()
            experts.settle(IDLE_S / 10)
        with self._changed:
            if not self._queue and not self._closed:
                self._changed.wait(IDLE_S)

    def _join(self) -> None:
        was_idle = not self._running
        while len(self._running) < self.options.batch:
            with self._changed:
                if not self._queue:
                    break
                needed = self.cache_bytes(self._queue[0].request)
                if self._cache_bytes + needed > self.options.cache_bytes:
                    break  # it is the next as soon as there is room
                handle = self._queue.popleft()
                self._cache_bytes += needed
            request = handle.request
            try:
                sequence = self.decoder.trunk.sequence(len(request.prompt_ids) + request.max_tokens)
            except Exception as error:  # memory, most likely: the others go on
                log.exception("a sequence could not be made")
                with self._changed:
                    self._cache_bytes -= needed
                handle.put(Failed(f"no cache could be made for it ({type(error).__name__})"))
                continue
            run = Running.begin(handle, sequence, self.names, self.manifest.eos_ids)
            self._running.append(run)
            self._record(run, "running", None, "")
        if was_idle and self._running:
            self._metering.set()

    def _leave_cancelled(self) -> None:
        with self._changed:
            gone = [handle for handle in self._queue if handle.cancelled]
            for handle in gone:
                self._queue.remove(handle)
        for handle in gone:
            handle.put(Ended("cancelled"))
            handle.put(Usage(len(handle.request.prompt_ids), 0, Energy(None, reason="it did not run")))
        for run in [run for run in self._running if run.handle.cancelled]:
            run.reason, run.ended_s = "cancelled", time.monotonic()
            run.handle.put(Ended("cancelled"))
            self._leave(run)

    def _choose(self) -> list[tuple[Running, tuple[int, ...]]]:
        """Who is fed what: all that decode, and prompts in the order they came as far as there are rows, but one in any case."""
        chosen = [(run, run.next_ids()) for run in self._running if run.decoding]
        room, reading = self.options.prefill_rows, False
        for run in self._running:
            if not run.decoding and (not reading or len(run.next_ids()) <= room):
                chosen.append((run, run.next_ids()))
                room, reading = room - len(run.next_ids()), True
        return chosen

    def _step(self) -> None:
        chosen = self._choose()
        self._told(self._before_step)
        started_ns = time.perf_counter_ns()
        decoder, traffic = self.decoder, Traffic()
        decoder.moe_ns = decoder.select_ns = 0
        if isinstance(decoder.experts, RemoteExperts):
            decoder.experts.traffic = traffic
        try:
            results = lockstep([run.sequence.walk(ids) for run, ids in chosen], decoder.moe)
        except Exception as error:  # of the experts: whoever was in the step has lost it, others have not
            log.exception("a step failed")
            for run, _ in chosen:
                self._fail(run, f"the experts could not be run ({type(error).__name__})")
            return
        rows = sum(len(ids) for _, ids in chosen)
        cost = decoder.cost(-1, rows, time.perf_counter_ns() - started_ns, traffic)
        self.steps, self.rows = self.steps + 1, self.rows + rows
        if self._meter is not None:
            with self._changed:
                self._shares.ran({run.handle.request.id: len(ids) for run, ids in chosen}, cost.total_ms / 1e3)
        for (run, ids), logits in zip(chosen, results):
            self._take(run, ids, logits, cost)
        self._told(self._after_step, cost)

    def _take(self, run: Running, ids: tuple[int, ...], logits: np.ndarray | Exception, cost: TokenCost) -> None:
        run.spending.add(cost, len(ids))
        if isinstance(logits, Exception):
            log.error("a sequence failed: %r", logits)
            return self._fail(run, f"the trunk could not be run ({type(logits).__name__})")
        try:
            token = run.take(ids, logits)
        except NotFinite as error:
            return self._fail(run, str(error))
        if token is not None:
            self._told(self._on_token, self._token_record(run, token))
        if run.reason is not None:
            self._leave(run)

    def _leave(self, run: Running) -> None:
        """It has ended: its place is free; its usage is told as soon as its joules are read."""
        self._release(run)
        if self._meter is None:
            return self._settle(run, NO_METER)
        with self._changed:
            self._settling.append(run)
        self._metering.set()

    def _fail(self, run: Running, text: str) -> None:
        self._release(run)
        with self._changed:
            energy = self._shares.leave(run.handle.request.id)
        self._record(run, "failed", energy, text)
        run.handle.put(Failed(text))

    def _release(self, run: Running) -> None:
        with self._changed:
            self._running.remove(run)
            self._cache_bytes -= self.cache_bytes(run.handle.request)

    # ------------------------------------------------------------ joules

    def _read_meters(self) -> None:
        """The second thread: reads while something runs, when it begins, and when a request has ended."""
        while not self._closed:
            busy = bool(self._running)
            self._metering.wait(self.options.meter_s if busy else None)
            self._metering.clear()
            asked_s = time.monotonic()
            try:
                metered = self._meter()
            except Exception as error:
                log.exception("the meters could not be read")
                metered = Metered(None, reason=f"the meters could not be read ({type(error).__name__})")
            with self._changed:
                self._shares.reading(metered, time.monotonic())
                done = [run for run in self._settling if run.ended_s <= asked_s]
                self._settling = [run for run in self._settling if run.ended_s > asked_s]
                energies = [self._shares.leave(run.handle.request.id) for run in done]
                if self._settling:
                    self._metering.set()
            for run, energy in zip(done, energies):
                self._settle(run, energy)

    def _settle_late(self) -> None:
        """Nobody waits for boards that do not answer."""
        now_s = time.monotonic()
        with self._changed:
            late = [run for run in self._settling if now_s - run.ended_s > self.options.energy_wait_s]
            self._settling = [run for run in self._settling if run not in late]
            energies = [self._shares.leave(run.handle.request.id) for run in late]
        for run, energy in zip(late, energies):
            self._settle(run, energy)

    def _settle(self, run: Running, energy: Energy) -> None:
        self._record(run, STATES[run.reason], energy, "")
        run.handle.put(Usage(len(run.handle.request.prompt_ids), run.tokens, energy))

    # ------------------------------------------------------------ records

    def _record(self, run: Running, state: str, energy: Energy | None, text: str) -> None:
        request = run.handle.request
        scope = "" if energy is None else SCOPE if energy.joules is not None else energy.reason
        joules = None if energy is None else energy.joules
        record = RequestRecord(
            request.id, request.kind, run.at_utc_s, len(request.prompt_ids), run.tokens, state, joules, scope, text
        )
        self._told(self._on_request, record)

    def _token_record(self, run: Running, token: Token) -> TokenRecord:
        spent, run.spending = run.spending, Spending()
        times = {name: round(getattr(spent, name), 4) for name in _TIMES}
        return TokenRecord(
            run.handle.request.id,
            run.tokens - 1,
            token.token_id,
            self.names(token.token_id).decode("utf-8", "replace"),
            time.time(),
            **times,
            sent_bytes=round(spent.sent_bytes),
            received_bytes=round(spent.received_bytes),
            rungs=spent.rungs,
        )

    def _told(self, listener: Callable, *what: object) -> None:
        try:
            listener(*what)
        except Exception:
            log.exception("whoever listens to the token engine failed")


_TIMES = ("total_ms", "trunk_ms", "select_ms", "codec_ms", "wire_ms", "expert_ms")
