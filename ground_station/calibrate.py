"""`spacemoe calibrate NODE`: a power step on a board, and the Foster network (K/W, seconds) that its die answers with.

Idle until the temperature rests, then the agent's command `burn` at full duty, then, if asked for, cooling. The burn is ordered
for RENEWED_FOR_S at a time: a ground station that goes away leaves no board burning. The board's guard holds all the while; the
fit uses the power that really flowed. A bench's network must never be taken for the one in orbit (arXiv 2401.03435: 7.28 K/W
became 16.6). Leaves out: the fit (power_step.py), changing ambient, power that the board's sensor does not see, fans that change
their speed.
"""

from __future__ import annotations

import queue
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from firmware_sim.foster import FitError
from ground_station import calibrate_report
from ground_station.broker import Broker, accepts_mqtt5
from ground_station.broker_fleet import client_context
from ground_station.control import Control
from ground_station.fleet import Taken
from ground_station.fleet_access import Tls
from ground_station.link import Link
from ground_station.local_fleet import Board, LocalFleet, check_profile
from ground_station.placement import round_robin
from ground_station.power_step import CalibrateError, Measurement, Options, Reading, drift_k_per_min, reading
from ground_station.run_folder import run_folder
from node_agent import shard, wire

READY_S = 10.0
SILENT_S = 15.0  # without telemetry: the board, its agent or the broker is gone
RENEW_S, RENEWED_FOR_S = 5.0, 20.0
LOOK_AFTER_S = 10.0  # of the step: by then the power must have risen
MAX_IDLE_DUTY = 0.1
MIN_IDLE_READINGS = 10
SHOW_S = 5.0
PHASES = {"settle": "waiting until the board rests, at most", "step": "burning for", "cool": "cooling for"}


def plan(options: Options) -> list[str]:
    """What `calibrate` would do, in words."""
    steps = [
        f"find {options.node} in fleet {options.fleet}: ready, with a power sensor and a temperature, and at rest",
        f"idle until it drifts by less than {options.drift_k_per_min:g} K/min over {options.window_s:g} s, at most {options.settle_s:g} s",
        f"command burn at duty 1 for {options.step_s:g} s, renewed every {RENEW_S:g} s; the board's own guard holds",
        "command burn with 0 seconds: stop",
    ]
    if options.cool_s:
        steps.append(f"watch it cool for {options.cool_s:g} s")
    return [*steps, f"fit {options.branches} branches to the power and the temperature of its telemetry"]


class Watch:
    """The readings of one node, from paho's thread to whoever asks for the next."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._queue: queue.Queue[Reading] = queue.Queue(10_000)
        self.run: int | None = None

    def take(self, node: str, taken: Taken) -> None:
        """For Control's on_telemetry."""
        if node == self._node and not taken.late and (got := reading(taken.telemetry)) is not None:
            self._queue.put_nowait(got)

    def next(self) -> Reading:
        """Raises: CalibrateError when the node is silent, or was started again meanwhile."""
        try:
            got = self._queue.get(timeout=SILENT_S)
        except queue.Empty:
            raise CalibrateError(
                f"no telemetry of {self._node} for {SILENT_S:g} s: look after the board and the broker, then calibrate again"
            ) from None
        if self.run is not None and got.run != self.run:
            raise CalibrateError(
                f"the agent of {self._node} started again meanwhile: see its log, then calibrate again"
            )
        self.run = got.run
        return got


class Progress:
    """A bar on stderr for one phase of at most `total_s`; one plain line where stderr is no terminal."""

    def __init__(self, phase: str, total_s: float) -> None:
        self._start_s = time.monotonic()
        if total_s and not sys.stderr.isatty():
            what = PHASES.get(phase, f"a load of {phase} for")
            print(f"calibrate: {what} {total_s:g} s", file=sys.stderr, flush=True)
        form = "{desc} {n:.0f} of {total:.0f} s |{bar}| {postfix}"
        self._bar = tqdm(
            total=total_s, desc=f"{phase:6}", bar_format=form, file=sys.stderr, disable=None, dynamic_ncols=True
        )

    @property
    def passed_s(self) -> float:
        return time.monotonic() - self._start_s

    def show(self, got: Reading, more: str = "") -> None:
        cells = [f"{value:.2f} {unit}" for value, unit in ((got.temp_c, "°C"), (got.power_w, "W")) if value is not None]
        self._bar.n = min(self.passed_s, self._bar.total)
        self._bar.set_postfix_str(", ".join([*cells, *([more] if more else [])]), refresh=False)
        self._bar.refresh()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def calibrate(options: Options, host: str, port: int, tls: Tls | None = None) -> dict:
    """Runs the step on a node of a running broker and returns what was found (calibrate_report.tree).

    However it ends, the burn is stopped.  Raises: CalibrateError, control.ControlError, wire.WireError.
    """
    wire.check_id(options.node)
    reachable(host, port, tls)
    watch = Watch(options.node)
    with Control(options.fleet, host, port, on_telemetry=watch.take, tls=tls) as control:
        board = find(control, options.node, options.fleet)
        _fit_for_it(watch, options)
        idle, settle_s, rested = _settle(watch, options)
        measurement = Measurement(idle, options)
        if idle[-1].provenance[1] == "estimated":
            measurement.warn(
                "the power is a model's estimate and not a sensor's: the network is wrong by as much as that"
            )
        if not rested:
            measurement.warn(
                f"after {options.settle_s:g} s it still drifted by {drift_k_per_min(idle):+.2f} K/min: slow branches are "
                "less certain; let it idle for longer"
            )
        try:
            step_s = _step(control, watch, measurement, options)
        finally:
            stop(control, options.node)
        with Progress("cool", options.cool_s) as progress:
            while progress.passed_s < options.cool_s:
                got = watch.next()
                measurement.add(got)
                progress.show(got, measurement.glimpse_at(SHOW_S))
    try:
        found = measurement.estimate()
    except FitError as error:
        busy = "" if measurement.busy_w is None else f", busy {measurement.busy_w:.3f} W"
        raise CalibrateError(f"idle {measurement.idle_w:.3f} W{busy}; but {error} (--step-s, --branches)") from None
    measurement.judge(found)
    return calibrate_report.tree(options, board, measurement, found, idle, (settle_s, step_s))


def reachable(host: str, port: int, tls: Tls | None = None) -> None:
    """Raises: CalibrateError where no broker is, OSError for certificates that cannot be read."""
    if not accepts_mqtt5(host, port, 5.0, client_context(*tls) if tls else None):
        raise CalibrateError(
            f"no MQTT 5 broker answers at {host}:{port}: start the fleet's broker or give its --broker HOST:PORT "
            "(--simulated PROFILE needs neither broker nor board)"
        )


def find(control: Control, node: str, fleet: str) -> str:
    """The kind of board.  Raises: CalibrateError."""
    if not control.wait_for([node], READY_S):
        return control.snapshot()[node].birth.board
    states = control.snapshot()
    state = states.get(node)
    if state is None or state.birth is None:
        others = ", ".join(sorted(name for name, other in states.items() if other.birth is not None)[:8])
        there = f"there are {others}" if others else "there is none at all: check --fleet, and start the node's agent"
        raise CalibrateError(f"no node {node} in fleet {fleet} within {READY_S:g} s; {there}")
    raise CalibrateError(f"{node} is known but not online: start its agent, then calibrate again")


def _fit_for_it(watch: Watch, options: Options) -> None:
    """Waits for the first readings that have all it takes.  Raises: CalibrateError."""
    end_s = time.monotonic() + READY_S
    while True:
        got = watch.next()
        lacking = [
            text
            for value, text in (
                (got.temp_c, "no valid temperature: see `node-agent sensors` on the board"),
                (got.energy_j, "no power sensor that measures the whole board: attach one (an INA226 in its supply)"),
            )
            if value is None
        ]
        if not lacking and got.power_w is not None:
            return
        if time.monotonic() > end_s:
            why = lacking[0] if lacking else "no valid power: see `node-agent sensors` on the board"
            raise CalibrateError(f"{options.node} has {why}")


def _settle(watch: Watch, options: Options) -> tuple[list[Reading], float, bool]:
    """(the last readings, seconds, whether they rest).  Raises: CalibrateError."""
    window: deque[Reading] = deque(maxlen=100_000)
    with Progress("settle", options.settle_s) as progress:
        while True:
            got = watch.next()
            if got.temp_c is not None and got.energy_j is not None:
                window.append(got)
            while len(window) > MIN_IDLE_READINGS and window[-1].time_s - window[1].time_s >= options.window_s:
                window.popleft()
            full = len(window) >= MIN_IDLE_READINGS and window[-1].time_s - window[0].time_s >= options.window_s
            drift = drift_k_per_min(window) if full else None
            progress.show(got, "" if drift is None else f"{drift:+.2f} K/min")
            rested = drift is not None and abs(drift) < options.drift_k_per_min
            if rested or (progress.passed_s >= options.settle_s and full):
                break
            if progress.passed_s >= options.settle_s + options.window_s:
                raise CalibrateError(
                    f"{len(window)} readings of {options.node} are too few: shorten its telemetry period"
                )
        idle = list(window)
        duty = sum(each.duty for each in idle) / len(idle)
        if duty > MAX_IDLE_DUTY:
            raise CalibrateError(f"{options.node} computes {duty:.0%} of the time: stop its work, then calibrate again")
        return idle, progress.passed_s, rested


def _step(control: Control, watch: Watch, measurement: Measurement, options: Options) -> float:
    """The burn; returns its seconds.  Raises: CalibrateError."""
    burn = {"seconds": f"{RENEWED_FOR_S:g}", "duty": "1"}
    answer = control.command(options.node, "burn", arguments=burn)
    if not answer.ok:
        raise CalibrateError(f"{options.node} does not burn: {answer.text[:200]}; look after its agent and its version")
    renewed_s, looked = 0.0, False
    with Progress("step", options.step_s) as progress:
        while progress.passed_s < options.step_s:
            got = watch.next()
            measurement.add(got, burning_s=progress.passed_s)
            progress.show(got, measurement.glimpse_at(SHOW_S))
            if progress.passed_s - renewed_s >= RENEW_S:
                renewed_s = progress.passed_s
                control.tell(options.node, "burn", burn, RENEW_S)
            if progress.passed_s >= LOOK_AFTER_S and not looked:
                looked = True
                measurement.check_step()
        measurement.check_step()
        return progress.passed_s


def stop(control: Control, node: str) -> None:
    """Ends a burn; says so on stderr where the node does not confirm it."""
    answer = control.command(node, "burn", arguments={"seconds": "0"})
    if not answer.ok:
        print(
            f"spacemoe: {node} did not confirm the end of its burn ({answer.text[:100]}): it ends by itself within "
            f"{RENEWED_FOR_S:g} s",
            file=sys.stderr,
        )


@contextmanager
def simulated(
    profile: str, node: str, bundle: Path, fleet_id: str = "demo", **keys: object
) -> Iterator[tuple[str, int]]:
    """A broker and one simulated board with a stock agent, which one busy core loads fully; gives the broker's (host, port).

    `keys`: further ones of firmware_sim.spec.  Raises: broker.BrokerError, FleetError, ProfileError, shard.BundleError.
    """
    wire.check_id(node)
    check_profile(profile)
    manifest = shard.read_manifest(bundle)
    precision = "int8" if "int8" in manifest.precisions else manifest.precisions[0]
    memory_bytes = 512 * 1024 * 1024
    holdings = tuple(
        each
        for each in round_robin(manifest, {node: 1 << 40}, precision)
        if each.layer == manifest.moe_layers[0]  # a layer's experts are load enough
    )
    board = Board(node, profile, memory_bytes, {"cores": 1.0, **keys})
    with ExitStack() as stack:
        run_dir = stack.enter_context(run_folder("calibrate"))
        broker = stack.enter_context(Broker(run_dir))
        link = stack.enter_context(Link())
        address = (broker.host, broker.port)
        fleet = stack.enter_context(LocalFleet(run_dir, bundle, holdings, link.endpoint, address, fleet_id, (board,)))
        fleet.wait_joined(link)
        yield address
