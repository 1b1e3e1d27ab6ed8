"""What `spacemoe calibrate` found, as JSON's tree, as text, and as a TOML fragment for a scenario.

Leaves out: how it is measured (calibrate.py) and fitted (power_step.py).
"""

from __future__ import annotations

import json
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from firmware_sim.foster import FosterFit
from ground_station.power_step import Measurement, Options, Reading, drift_k_per_min
from node_agent import shard


def tree(
    options: Options,
    board: str,
    measurement: Measurement,
    found: FosterFit,
    idle: list[Reading],
    seconds: tuple[float, float],
) -> dict:
    """`seconds`: of idling and of the step; `idle`: the last readings before the step."""
    busy_w = measurement.busy_w
    return {
        "node": options.node,
        "board": board,
        "fit": {
            "branches": [
                {"r_k_per_w": round(each.r_k_per_w, 4), "tau_s": round(each.tau_s, 3)} for each in found.branches
            ],
            "r_k_per_w": round(found.r_k_per_w, 4),
            "ambient_c": round(found.ambient_c, 3),
            "residual_k": round(found.residual_k, 4),
            "n": found.samples,
        },
        "idle_w": round(measurement.idle_w, 4),
        "busy_w": None if busy_w is None else round(busy_w, 4),
        "idle_c": round(sum(each.temp_c for each in idle) / len(idle), 3),
        "hottest_c": round(measurement.hottest_c, 3),
        "limit_c": measurement.limit_c,
        "seconds": {
            "settle": round(seconds[0], 1),
            "step": round(seconds[1], 1),
            "cool": options.cool_s,
        },
        "drift_k_per_min": round(drift_k_per_min(idle), 3),
        "readings_skipped": measurement.skipped,
        "provenance": dict(zip(("temp_c", "power_w"), idle[-1].provenance)),
        "cautions": measurement.cautions,
    }


def report(result: dict) -> str:
    """The result for people."""
    fit, provenance = result["fit"], result["provenance"]
    busy = "not reached" if result["busy_w"] is None else f"{result['busy_w']:.3f} W"
    lines = [
        f"{result['node']} ({result['board']}): temperature {provenance['temp_c']}, power {provenance['power_w']}",
        f"idle {result['idle_w']:.3f} W at {result['idle_c']:.1f} °C, busy {busy}, hottest {result['hottest_c']:.1f} °C",
        f"{'branch':8}{'K/W':>9}{'tau s':>10}",
        *(
            f"{index + 1:<8}{each['r_k_per_w']:>9.3f}{each['tau_s']:>10.2f}"
            for index, each in enumerate(fit["branches"])
        ),
        f"sum {fit['r_k_per_w']:.3f} K/W, ambient {fit['ambient_c']:.2f} °C, residual {fit['residual_k']:.2f} K rms, "
        f"n {fit['n']}",
        *(f"caution: {text}" for text in result["cautions"]),
    ]
    return "\n".join(lines)


def fragment(result: dict) -> str:
    """The result as TOML for a scenario: what the coupling needs, and a simulated board that is like this one."""
    fit = result["fit"]
    branches = ", ".join(f"[{each['r_k_per_w']}, {each['tau_s']}]" for each in fit["branches"])
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    provenance = ", ".join(f"{name} {text}" for name, text in result["provenance"].items())
    busy_w = result["busy_w"]
    lines = [
        f"# spacemoe calibrate {result['node']}, {stamp}; {provenance}; n {fit['n']}, residual {fit['residual_k']} K rms",
        *(f"# caution: {' '.join(text.split())}" for text in result["cautions"]),
        "[payload]",
        f"idle_w = {result['idle_w']}",
        "# busy_w: the board never computed all the time" if busy_w is None else f"busy_w = {busy_w}",
        "",
        "# The bench, as a simulated board; add its profile. In orbit a board is far hotter per watt: the branches of [payload]",
        "# are the mission's and not these.",
        "[[board]]",
        f"node = {json.dumps(result['node'])}",
        f"ambient_c = {fit['ambient_c']}",
        f"idle_w = {result['idle_w']}",
        *([] if busy_w is None else [f"max_w = {busy_w}"]),
        f"foster = [{branches}]",
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Whole or not at all.  Raises: OSError whose text names the next step."""
    try:
        with shard.atomic_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror}): give another --output FILE") from None


def check_writable(path: Path) -> None:
    """A path that cannot be written is told now, and not after the step.  Raises: OSError."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("no plain file")
        with tempfile.TemporaryFile(dir=path.resolve().parent) as probe:  # what root may, and a full disk, show only so
            probe.write(bytes(4096))
            probe.flush()
    except (OSError, ValueError) as error:
        raise OSError(f"{path} cannot be written ({error}): give --output a file in a folder that is there") from None
