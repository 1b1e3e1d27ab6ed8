"""`spacemoe calibrate NODE --power-model`: a few loads on a board that has a power sensor, and the model that a like board without
one can be given.

The loads are the agent's own command `burn` at some duties (one thread: up to about one core, or as many as [bundle] threads),
renewed as calibrate.py does; the board's guard holds, and what it lets through is what is measured. Leaves out: the fit
(power_fit.py); loads on more cores, which no agent makes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from ground_station.calibrate import (
    MAX_IDLE_DUTY,
    READY_S,
    RENEW_S,
    RENEWED_FOR_S,
    Progress,
    Watch,
    find,
    reachable,
    stop,
)
from ground_station.control import Control
from ground_station.fleet_access import Tls
from ground_station.power_fit import WINDOW_S, Options, Window, fit, tree, window
from ground_station.power_step import GUARD_CAUSES, CalibrateError, Reading
from node_agent import wire

SKIP_S = 1.5  # of each level: the guard looks twice a second, a meter's averages lag


def plan(options: Options) -> list[str]:
    """What would be done, in words."""
    duties = ", ".join(f"{duty:g}" for duty in options.duties)
    return [
        f"find {options.node} in fleet {options.fleet}: ready, with a power sensor and its CPU time, and at rest",
        f"command burn at the duties {duties}, for {options.level_s:g} s each; the board's own guard holds",
        "command burn with 0 seconds: stop",
        "fit watts to busy cores, and print the table [power_model] for a like board without a power sensor",
    ]


def calibrate(options: Options, host: str, port: int, tls: Tls | None = None) -> dict:
    """Runs the loads on a node of a running broker and returns what was found (power_fit.tree).

    However it ends, the burn is stopped.  Raises: CalibrateError, control.ControlError, wire.WireError.
    """
    wire.check_id(options.node)
    reachable(host, port, tls)
    watch = Watch(options.node)
    with Control(options.fleet, host, port, on_telemetry=watch.take, tls=tls) as control:
        board = find(control, options.node, options.fleet)
        provenance = _fit_for_it(watch, options.node)
        windows: list[Window] = []
        cautions: dict[str, None] = {}  # each once, in order
        try:
            for duty in options.duties:
                for first, last in _level(control, watch, options, duty):
                    cautions |= dict.fromkeys(_cautions(last))
                    if (made := window(duty, first, last)) is not None:
                        windows.append(made)
        finally:
            stop(control, options.node)
    return tree(options, board, fit(windows), windows, provenance, list(cautions))


def _fit_for_it(watch: Watch, node: str) -> str:
    """Waits for a reading that has all it takes; the power's provenance.  Raises: CalibrateError."""
    end_s = time.monotonic() + READY_S
    while True:
        got = watch.next()
        if got.provenance[1] == "estimated":
            raise CalibrateError(
                f"{node} has no power sensor, its joules are a model's already: calibrate a like board with one"
            )
        if None not in (got.energy_j, got.power_w, got.cpu_busy_s):
            return got.provenance[1]
        if time.monotonic() > end_s:
            why = "CPU time below its sysroot (proc/stat)" if got.energy_j is not None else "power sensor that works"
            raise CalibrateError(f"{node} has no {why}: see `node-agent sensors` on the board")


def _level(control: Control, watch: Watch, options: Options, duty: float) -> Iterator[tuple[Reading, Reading]]:
    """Pairs of readings, WINDOW_S or more apart, while the board is at `duty`.  Raises: CalibrateError."""
    renewed_s = -RENEW_S
    first: Reading | None = None
    if not duty:
        stop(control, options.node)
    with Progress(f"{duty:.0%}", options.level_s) as progress:
        while progress.passed_s < options.level_s:
            if duty and progress.passed_s - renewed_s >= RENEW_S:
                renewed_s = progress.passed_s
                _burn(control, options.node, duty)
            got = watch.next()
            progress.show(got)
            if progress.passed_s < SKIP_S:
                continue
            if not duty and got.duty > MAX_IDLE_DUTY:
                raise CalibrateError(
                    f"{options.node} computes {got.duty:.0%} of the time unasked: stop its work, then calibrate again"
                )
            if first is None:
                first = got
            elif got.time_s - first.time_s >= WINDOW_S:
                yield first, got
                first = got


def _burn(control: Control, node: str, duty: float) -> None:
    """Raises: CalibrateError."""
    answer = control.command(node, "burn", arguments={"seconds": f"{RENEWED_FOR_S:g}", "duty": f"{duty:g}"})
    if not answer.ok:
        raise CalibrateError(f"{node} does not burn: {answer.text[:200]}; look after its agent and its version")


def _cautions(got: Reading) -> list[str]:
    found = [
        f"the board's guard limited the duty ({name}): the loads are smaller than asked for"
        for bit, name in GUARD_CAUSES.items()
        if got.guard & bit
    ]
    return found + [
        f"the firmware set the flag {flag}: a throttled core takes less power and is as busy; cool or supply the board better and "
        "calibrate again"
        for flag in sorted(got.flags)
    ]
