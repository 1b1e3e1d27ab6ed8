"""The agent process: puts experts, data plane, control plane, sensors and energy together, and runs until it is told to stop.

Experts are served whether or not there is a broker. Leaves out: the command line (cli.py).
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from contextlib import ExitStack
from importlib import metadata

import psutil

from node_agent import (
    agent_slots,
    burn,
    energy,
    enrol,
    experts,
    frame,
    guard_loop,
    power_model,
    renewal,
    sensors,
    signature,
    telemetry,
    wire,
)
from node_agent.agent_update import AgentUpdates
from node_agent.config import Config
from node_agent.control import Control
from node_agent.counters import Counters
from node_agent.dataplane import DataPlane
from node_agent.delivery import Delivery, Receiver
from node_agent.delivery_store import Store
from node_agent.errors import CommandError, DataPlaneError, GuardError, StartAgainError
from node_agent.pacing import Pacer
from node_agent.watchdog import Notifier, Watchdog

log = logging.getLogger("node_agent")

DISTRIBUTION = "spacemoe-kit"
GROUND_PATIENCE_S = 5.0
ANSWER_S = 0.5  # between an update that is in its slot and the end of the agent: its answer is on the way
SWITCH_INTERVAL_S = (
    0.0005  # a request waits so long at most for the interpreter while telemetry is made; 5 ms is the default
)


def version() -> str:
    """Version of the installed distribution; 'source' when run from a checkout that is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "source"


def memory_limit_bytes(config: Config) -> int:
    """What this agent may use: the configured limit, or what the machine has available now and the agent has already."""
    if config.node.memory_limit_mb is not None:
        return config.node.memory_limit_mb * 1_000_000
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


class Agent:
    """One node. `run` blocks until `stop` is called (from a signal, a command or another thread)."""

    def __init__(self, config: Config):
        """Loads the shards.  Raises: AgentError, shard.BundleError."""
        self.config = config
        serving = burn.Serving()
        self.counters = Counters(serving=serving)
        self._memory_bytes = memory_limit_bytes(config)
        bundle = config.bundle
        store = Store(config.node.state_dir / "shards", bundle.path)
        flashed = tuple(stem for stem in bundle.shards if not store.dropped(stem))
        trust = signature.Trust(bundle.signers)
        self.experts = experts.load(bundle.path, flashed, self._memory_bytes, bundle.threads, trust)
        cpu, model = power_model.CpuTime(config.node.sysroot), config.power_model
        self.found = power_model.with_model(sensors.find(config.node.sysroot), cpu, model)
        if self.found.estimate:
            log.warning("no power sensor: joules are estimated by [power_model], %s", self.found.estimate)
        self._simulated = sensors.is_simulated(config.node.sysroot)
        self._probe = telemetry.ProcessProbe()
        self._started_s = time.monotonic()
        self._stop = threading.Event()
        self._publishing = threading.Lock()
        self._meter = energy.EnergyMeter(self.found, config.telemetry.sample_hz, self.counters, cpu=cpu, model=model)
        pacer = Pacer()
        self._link = DataPlane(config.node.id, config.link, self.experts, self.counters, self._bad_frame, pacer)
        slots = agent_slots.Slots.found()
        updates = None
        if slots is not None:
            signers = config.update.signers or bundle.signers
            updates = AgentUpdates(slots, config.node.state_dir / "update", signers, self._start_again)
        self._again = ""  # why the launcher is to start another agent
        self._trial = agent_slots.Trial(
            slots, config.update.hold_s, config.update.deadline_s, self._healthy, self._update_news, self._start_again
        )
        receiver = Receiver(
            store,
            self.experts,
            self.counters,
            self._memory_bytes,
            self._shards_changed,
            self._bad_delivery,
            trust,
            updates,
        )
        self._delivery = Delivery(config.node.id, config.link, receiver)
        self._guard = guard_loop.GuardLoop(
            config.guard, config.node.sysroot, self.found, self.counters, pacer, self._event
        )
        self._burn = burn.Burn(self.experts, serving, pacer, self._event)
        self._notifier = Notifier()
        self._beat_s = time.monotonic()
        self._metrics = None
        if config.metrics is not None:
            from node_agent.metrics import MetricsServer  # it loads http.server

            self._metrics = MetricsServer(*config.metrics, config.telemetry.period_s)
        self._control = None
        if config.broker is not None:
            self._control = Control(
                config, config.broker, self.counters, self._birth, self._command, on_heard=self._guard.heard
            )
        self._renewal = None
        if config.enrol is not None:  # then there is a [broker]
            share = config.enrol.renew_share
            self._renewal = renewal.Renewal(enrol.identity(config), share, self._control.reconnect, self._event)
        receiver.restore()

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Serves until stopped.  Raises: DataPlaneError, should the data plane end by itself."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with ExitStack() as stack:
            stack.enter_context(self._meter)
            stack.enter_context(self._guard)
            stack.enter_context(self._link)
            if self._control is None:
                log.warning("no [broker] in the configuration: neither telemetry nor commands")
            else:
                stack.enter_context(self._control)
            if self._renewal is not None:
                stack.enter_context(self._renewal)
            if self._metrics is not None:
                stack.enter_context(self._metrics)
            stack.enter_context(self._delivery)
            stack.enter_context(self._burn)  # after the control plane: it ends before, and can still say so
            node = self.config.node
            counts = f"{len(self.experts.hosted)} shards, {len(self.found.sensors)} sensors"
            text = f"{node.id}: {counts}, data plane {self.config.link.endpoint}"
            log.info("started %s", text)
            self._event("info", "started", text)
            self.samples(time.time())  # percentages and means are since the last reading: this is the first
            period_s = self.config.telemetry.period_s
            ground_said = ""
            stack.enter_context(Watchdog(self._notifier, self._hung, lambda: self._guard.decision.text, self._on_hang))
            stack.enter_context(self._trial)
            self._beat_s = time.monotonic()
            due_s = self._beat_s + period_s
            while not self._stop.wait(max(0.0, due_s - time.monotonic())):
                self._beat_s = time.monotonic()
                if not self._guard.alive:
                    raise GuardError(f"the guard ended ({self._guard.failed!r}): start the agent again") from None
                if not self._link.alive:
                    raise DataPlaneError(
                        f"the data plane ended ({self._link.failed!r}): start the agent again"
                    ) from None
                self._publish()
                ground_said = self._say_ground(ground_said)
                due_s = max(due_s + period_s, time.monotonic())  # after a delay: go on, without a burst
        log.info("stopped %s", self.config.node.id)
        if self._again:
            raise StartAgainError(self._again)

    def _healthy(self) -> bool:
        """What a new agent has to be for a while before it is called good: served by everything it needs."""
        connected = self._control is None or self._control.connected
        return connected and self._link.service.welcomed and not self._hung()

    def _update_news(self, severity: str, text: str) -> None:
        log.info("%s", text)
        self._event(severity, "update", text)

    def _start_again(self, text: str) -> None:
        """Ends this agent for the launcher to start another, once the ground station has been told."""
        self._again = text
        self._update_news("info", text)
        threading.Timer(ANSWER_S, self.stop).start()

    def _hung(self) -> str:
        """What does not come round any more, or an empty text; asked by the watchdog's thread."""
        now_s, hang_s = time.monotonic(), self.config.guard.hang_s
        for name, beat_s, patience_s in (
            ("the data plane", self._link.beat_s, hang_s),
            ("the guard", self._guard.beat_s, hang_s),
            ("the telemetry loop", self._beat_s, hang_s + self.config.telemetry.period_s),
        ):
            if now_s - beat_s > patience_s:
                return f"{name} hangs: it has not come round for {patience_s:g} s"
        return ""

    def _on_hang(self, text: str) -> None:
        if "guard" in text:  # nobody watches the temperature
            self._guard.give_up()
        self._event("critical", "hang", text)

    def _say_ground(self, said: str) -> str:
        """Logs once that the ground station is there, or that it is not there yet; returns what has been said."""
        endpoint = self.config.link.endpoint
        if self._link.service.welcomed:
            if said != "there":
                log.info("the ground station at %s is there", endpoint)
            return "there"
        if not said and time.monotonic() - self._started_s > GROUND_PATIENCE_S:
            log.warning("no ground station answers at %s yet: waiting for it", endpoint)
            return "waiting"
        return said

    def _publish(self, asked: bool = False) -> None:
        """Telemetry now: from the loop each period, and from paho's thread for the command `sample` (`asked`)."""
        if self._control is not None or self._metrics is not None:
            with self._publishing:
                self.counters.reporting.enter("telemetry")
                try:
                    now = time.time()
                    samples = (*self.samples(now), *(() if self._control is None else self._control.samples(now)))
                    if self._metrics is not None:
                        self._metrics.show(samples)
                    if self._control is not None:
                        self._control.telemetry(samples, now, asked)
                finally:
                    self.counters.reporting.leave()

    def samples(self, generated_at: float) -> tuple[wire.Sample, ...]:
        """What telemetry says now."""
        readings = tuple(sensors.read(sensor) for sensor in self.found.sensors)
        certificate = self._renewal.samples(generated_at) if self._renewal is not None else ()
        return telemetry.snapshot(
            readings,
            self._meter.snapshot(),
            self._probe.read(),
            self.counters,
            time.monotonic() - self._started_s,
            self._simulated,
            generated_at,
        ) + (*self._guard.samples(generated_at), *certificate)

    def _birth(self, bd_seq: int) -> wire.Birth:
        config = self.config
        rate_hz = 1.0 / config.telemetry.period_s
        return wire.Birth(
            node=config.node.id,
            bd_seq=bd_seq,
            agent_version=version(),
            board=config.node.board,
            generated_at=time.time(),
            sensors=tuple(sensors.info(sensor, rate_hz) for sensor in self.found.sensors),
            shards=self.experts.hosted,
            bundle=self.experts.bundle,
            memory_bytes=self._memory_bytes,
            data_endpoint=config.link.endpoint,
            data_public_key=self._link.public_key,
        )

    def _command(self, name: str, arguments: dict[str, str]) -> tuple[bool, str]:
        self._guard.heard()
        if name == "stop":
            self.stop()
            return True, "stopping"
        if name == "duty":
            try:
                return True, self._guard.order(arguments)
            except CommandError as error:
                return False, str(error)
        if name == "burn":
            try:
                return True, self._burn.order(arguments)
            except CommandError as error:
                return False, str(error)
        if name == "sample":  # joules up to this moment: what the ledger of one text is made of
            self._meter.sample()
            self._publish(asked=True)
            return True, "telemetry published"
        return (
            False,
            f"command {name[:40]!r} is unknown to this agent: use rebirth, ping, sample, history, duty, burn or stop",
        )

    def _bad_frame(self, kind: str, text: str) -> None:
        if kind in frame.REFUSALS:
            log.warning("first work refused: %s", text)
            self._event("warning", "refused", text)
            return
        log.warning("first data-plane error of kind %s: %s", kind, text)
        self._event("warning", "bad_frame", f"{kind}: {text}")

    def _shards_changed(self, text: str) -> None:
        """From delivery's thread: the fleet learns of it by a new birth."""
        log.info("%s", text)
        if self._control is not None:
            self._control.changed()
        self._event("info", "shards", text)

    def _bad_delivery(self, kind: str, text: str) -> None:
        log.warning("first error of delivery of kind %s: %s", kind, text)
        self._event("warning", "delivery", f"{kind}: {text}")

    def _event(self, severity: str, kind: str, text: str) -> None:
        if self._control is not None:
            self._control.event(severity, kind, text)


def run(config: Config) -> None:
    """Runs an agent in the main thread until SIGTERM, SIGINT or the command `stop`.  Raises: AgentError, BundleError."""
    agent = Agent(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()
