"""What a thermal model says of a recorded run's temperatures, from the run's own power: beside what the nodes' sensors said. Pure.

Models, per node: "foster": the network and ambient of the simulated board's profile (firmware_sim), which is what the simulator ran, so
that what is left is the sensor's noise and the power's means; "one_node": R, C and ambient identified from this same run's readings
(heat_fit.py), which is all that a real board without calibration has. Each starts at the node's first reading. "Measured" is what the
sensor said, with the provenance it gave itself. Leaves out: fans, an ambient that moves, firmware that throttles (power tells).

Shape letters: N nodes, M telemetry messages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from firmware_sim import foster
from firmware_sim.board import Branch
from firmware_sim.profiles import PROFILES
from ground_station import heat_fit
from ground_station.recording import Board, Recording
from ground_station.recording_tape import MESSAGE


@dataclass(frozen=True, eq=False)
class Course:
    """A node's readings [m]: uptime_s, temp_c; power_w: mean since the reading before (nan for the first)."""

    uptime_s: np.ndarray
    temp_c: np.ndarray
    power_w: np.ndarray


@dataclass(frozen=True, eq=False)
class Network:
    """A Foster network over an ambient. source: in words."""

    branches: tuple[Branch, ...]
    ambient_c: float
    source: str


def course(messages: np.ndarray, node: int) -> Course:
    """The readings of one node, of messages [M, 9] by recording_tape.MESSAGE; those without temperature or joules are left out, and so is
    what comes after a restart of its agent."""
    mine = messages[messages[:, 0] == node]
    uptime_s, temp_c, energy_j = (mine[:, MESSAGE.index(name)] for name in ("uptime_s", "temp_c", "energy_j"))
    good = np.isfinite(uptime_s) & np.isfinite(temp_c) & np.isfinite(energy_j)
    uptime_s, temp_c, energy_j = uptime_s[good], temp_c[good], energy_j[good]
    back = np.flatnonzero((np.diff(uptime_s) <= 0) | (np.diff(energy_j) < 0))
    end = int(back[0]) + 1 if len(back) else len(uptime_s)
    uptime_s, temp_c, energy_j = uptime_s[:end], temp_c[:end], energy_j[:end]
    power_w = np.full(end, np.nan)
    power_w[1:] = np.diff(energy_j) / np.diff(uptime_s)
    return Course(uptime_s, temp_c, power_w)


def of_profile(board: Board) -> Network | None:
    """The network of a simulated board's profile, with what its scenario changed; None for a board that is not simulated, or where its
    entries cannot be."""
    profile = PROFILES.get(board.profile)
    try:
        changed = json.loads(board.simulated)
        if profile is None or not isinstance(changed, dict):
            return None
        branches = (
            tuple(Branch(float(r), float(tau_s)) for r, tau_s in changed["foster"]) if "foster" in changed else None
        )
        ambient_c = float(changed.get("ambient_c", profile.ambient_c))
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None
    branches = profile.foster if branches is None else branches
    if not branches or not all(0 < each.r_k_per_w < 1e4 and 0 < each.tau_s < 1e7 for each in branches):
        return None
    if not -273.15 <= ambient_c <= 1000:
        return None
    return Network(branches, ambient_c, f"firmware_sim's profile {board.profile}: what the simulator itself runs")


def identified(run: Course) -> tuple[Network | None, str]:
    """The one-node model of the run's own readings, and why there is none."""
    fit = heat_fit.start(1)
    for time_s, power_w, temp_c in zip(run.uptime_s, run.power_w, run.temp_c):
        fit = heat_fit.update(fit, *(np.array([value]) for value in (time_s, power_w, temp_c)))
    model = heat_fit.estimate(fit)
    if not model.known[0]:
        return None, model.why[0]
    r, c = float(model.r_k_per_w[0]), float(model.c_j_per_k[0])
    return Network((Branch(r, r * c),), float(model.ambient_c[0]), model.why[0] + " (this same run)"), ""


def predict(network: Network, run: Course) -> np.ndarray:
    """Temperatures [m] in degrees Celsius. At the first reading the network is as warm as the reading, its branches in the proportion of a
    long time at one power."""
    if not len(run.temp_c):
        return np.zeros(0)
    r = np.array([branch.r_k_per_w for branch in network.branches])
    rises = (run.temp_c[0] - network.ambient_c) * r / r.sum()
    found = [run.temp_c[0]]
    for dt_s, power_w in zip(np.diff(run.uptime_s), run.power_w[1:]):
        rises = foster.filter_step(network.branches, rises, float(power_w), float(dt_s))
        found.append(network.ambient_c + rises.sum())
    return np.array(found)


def differences(modelled_c: np.ndarray, measured_c: np.ndarray) -> dict:
    """Modelled less measured: mean, rms and largest in K over n readings, the first (where they are equal by definition) left out."""
    error = (modelled_c - measured_c)[1:]
    if not len(error):
        return {"n": 0, "mean_k": None, "rms_k": None, "largest_k": None}
    return {
        "n": len(error),
        "mean_k": round(float(error.mean()), 4),
        "rms_k": round(float(np.sqrt((error**2).mean())), 4),
        "largest_k": round(float(error[np.abs(error).argmax()]), 4),
    }


def compare(recording: Recording) -> tuple[dict[str, dict], dict[int, tuple[np.ndarray, np.ndarray]]]:
    """For each node what each model says; and by node index (uptime_s, modelled temperature) of the model that stands for it: foster, else
    one_node."""
    report, stands = {}, {}
    for index, board in enumerate(recording.head.boards):
        run = course(recording.messages, index)
        one, why = identified(run)
        row: dict = {
            "measured": {
                "temp_c": recording.head.temp_provenance.get(board.node, "unknown"),
                "power_w": recording.head.power_provenance.get(board.node, "unknown"),
                "readings": len(run.temp_c),
                "range_c": [round(float(run.temp_c.min()), 2), round(float(run.temp_c.max()), 2)]
                if len(run.temp_c)
                else None,
            }
        }
        for name, network, lack in (
            ("foster", of_profile(board), "no simulated board's profile"),
            ("one_node", one, why),
        ):
            if network is None:
                row[name] = {"source": lack, "n": 0, "mean_k": None, "rms_k": None, "largest_k": None}
                continue
            modelled = predict(network, run)
            row[name] = {"source": network.source, **differences(modelled, run.temp_c)}
            stands.setdefault(index, (run.uptime_s, modelled))
        report[board.node] = row
    return report, stands


def replaced(
    looks: np.ndarray, columns: tuple[str, ...], stands: dict[int, tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Looks [U, C, N] with the modelled temperature in place of the one that was read, at the same message's uptime."""
    changed = looks.copy()
    temp, uptime = columns.index("temp_c"), columns.index("uptime_s")
    for node, (uptime_s, modelled_c) in stands.items():
        if len(uptime_s):
            read = np.isfinite(looks[:, temp, node]) & np.isfinite(looks[:, uptime, node])
            changed[read, temp, node] = np.interp(looks[read, uptime, node], uptime_s, modelled_c)
    return changed
