"""Self-test of a board: is everything here that an agent needs, does it compute correctly, and how fast are a bundle's experts.

Without a bundle nothing is timed and nothing is made up. The built-in expert (selftest_graph.py) checks the kernels.
Leaves out: how ms and joules are measured (selftest_costs.py), the network (broker, ground station) and long runs under heat.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Callable

import numpy as np

from node_agent import selftest_graph
from node_agent.config import PowerModelConfig
from node_agent.costs import BoardCosts, words

PACKAGES = ("numpy", "onnxruntime", "paho-mqtt", "psutil", "pyzmq", "cryptography")
MIN_FREE_BYTES = 200_000_000
EARLIEST_CLOCK_S = 1_767_225_600  # 2026-01-01: before it a board's clock was not set, and TLS would fail
EXPERT_TOLERANCE = 0.05  # 8-bit activations against float64; measured 0.011 on AVX2
COLUMNS = 80
BURST_S = 2.0  # of each rest and each burst under the meter


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `text` says what was found and, where it failed, the next step."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one expert for one row: n runs, over the timed shards of a precision."""

    precision: str
    n: int
    median_ms: float
    p10_ms: float
    p90_ms: float


@dataclass(frozen=True)
class Report:
    """`timings` is empty without a bundle; `costs` is what `spacemoe bundle costs` stores."""

    checks: tuple[Check, ...]
    timings: tuple[Timing, ...]
    costs: BoardCosts | None = None

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def _guarded(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    """A check that raises has failed; the others go on."""
    try:
        return Check(name, *check())
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _python() -> tuple[bool, str]:
    text = f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    return sys.version_info >= (3, 10), text if sys.version_info >= (
        3,
        10,
    ) else f"{text}: Python 3.10 or newer is needed"


def _package(name: str) -> tuple[bool, str]:
    try:
        return True, metadata.version(name)
    except metadata.PackageNotFoundError:
        return False, f"missing: pip install {name}"


def _kernels() -> tuple[bool, str]:
    from node_agent.experts import open_session

    session = open_session(selftest_graph.onnx_bytes())
    x = (((np.arange(64) * 37) % 101 - 50) / 50).reshape(1, 64).astype(np.float32)
    error = relative_error(session.run(["y"], {"x": x})[0][0])
    text = f"4-bit expert: relative error {error:.4f} against float64, {EXPERT_TOLERANCE} allowed"
    return (
        error <= EXPERT_TOLERANCE,
        text if error <= EXPERT_TOLERANCE else f"{text}: do not use this onnxruntime build",
    )


def relative_error(y: np.ndarray) -> float:
    """||y - expected|| / ||expected|| for y [64] of the built-in expert."""
    expected = np.array(selftest_graph.EXPECTED)
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


def _codecs() -> tuple[bool, str]:
    from node_agent import compress, frame

    x = np.sin(np.arange(2 * 200, dtype=np.float32)).reshape(2, 200)
    # Largest error by each format's definition: half a step (q4's range is lopsided, so a whole one), fp16's 2^-11 of scale and value.
    limits = {"fp32": 0.0, "fp16": 2.0**-11, "q8": 0.5 / 127 + 2.0**-10, "q4": 1 / 8 + 2.0**-10}
    limits["importance"] = 0.5 / 4 * 0.75  # half of a quarter of the rows' RMS, 0.71
    worst = []
    for name, limit in limits.items():
        pairs = np.array([(0, 3, 1, 0.5)], frame.PAIR)
        back = frame.unpack(frame.pack(frame.Frame(frame.EXPERTS, 7, codec=name, x=x, pairs=pairs)))
        error = float(np.abs(back.x - x).max())
        if error > limit:
            return False, f"{name} round trip errs by {error:.2e}, {limit:.2e} is allowed: report this machine"
        worst.append(f"{name} {error:.1e}")
    if set(limits) != set(compress.CODECS):
        return False, f"codecs {', '.join(set(compress.CODECS) ^ set(limits))} are not covered by this self-test"
    return True, "largest error " + ", ".join(worst)


def _sensors(sysroot: Path) -> tuple[bool, str]:
    from node_agent import sensors

    found = sensors.find(sysroot)
    samples = [sensors.read(sensor) for sensor in found.sensors]
    valid = [sample for sample in samples if sample.validity == "ok"]
    parts = [f"{len(valid)} of {len(samples)} readable"]
    parts.append(
        "total power: "
        + (" + ".join(sensor.name for sensor in found.total) or "no sensor, so no joules will be published")
    )
    parts += [f"left out {item.path}: {item.reason}" for item in found.left_out[:8]]
    return True, "; ".join(parts)


def _clock() -> tuple[bool, str]:
    now = time.time()
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    return now > EARLIEST_CLOCK_S, text if now > EARLIEST_CLOCK_S else f"{text}: set the clock (NTP), or TLS will fail"


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    text = f"{free / 1e9:.2f} GB free"
    return (
        free >= MIN_FREE_BYTES,
        text if free >= MIN_FREE_BYTES else f"{text}: free {MIN_FREE_BYTES / 1e6:.0f} MB at least",
    )


def _bundle(root: Path, *how: Any) -> tuple[list[Check], BoardCosts | None]:
    """Verifies every listed file; then loads one shard after the other and measures it. `how`: as selftest_costs.measure."""
    from node_agent import shard

    try:
        manifest = shard.read_manifest(root)
    except shard.BundleError as error:
        return [Check("bundle manifest", False, str(error))], None
    entries = [*manifest.files, *(item for part in (*manifest.segments, *manifest.shards) for item in part.files)]
    unique = {entry.path: entry for entry in entries}
    checks, damaged = [Check("bundle manifest", True, f"{manifest.name}, {len(manifest.shards)} shards")], 0
    for entry in unique.values():
        try:
            shard.verify_file(root, entry)
        except shard.BundleError as error:
            damaged += 1
            if damaged <= 10:
                checks.append(Check(f"file {entry.path}", False, str(error)))
    checks.append(
        Check("bundle files", not damaged, f"{len(unique) - damaged} of {len(unique)} are as the manifest says")
    )
    if damaged:
        return checks, None
    found: list[BoardCosts] = []

    def experts() -> tuple[bool, str]:
        from node_agent import selftest_costs

        costs = selftest_costs.measure(root, manifest, *how)
        if isinstance(costs, str):
            return False, costs
        found.append(costs)
        return True, f"{len(manifest.shards)} shards run"

    checks.append(_guarded("bundle experts", experts))
    return checks, found[0] if found else None


def run(
    bundle: Path | None = None,
    sysroot: Path = Path("/"),
    board: str = "unknown",
    model: PowerModelConfig | None = None,
    burst_s: float = BURST_S,
) -> Report:
    """All checks, in order; none stops the others. `board`: what it is called in the costs; `model`: for joules without a power
    sensor; `burst_s`: seconds of each rest and burst under the meter, 0 for no joules."""
    checks = [_guarded("python", _python)]
    checks += [_guarded(name, lambda name=name: _package(name)) for name in PACKAGES]
    checks += [
        _guarded("onnxruntime kernels", _kernels),
        _guarded("codecs", _codecs),
        _guarded("sensors", lambda: _sensors(sysroot)),
        _guarded("clock", _clock),
        _guarded("disk", _disk),
    ]
    if bundle is None:
        return Report(tuple(checks), ())
    more, costs = _bundle(bundle, board, sysroot, model, burst_s)
    timings = () if costs is None else tuple(Timing(each.precision, **asdict(each.row)) for each in costs.costs)
    return Report((*checks, *more), timings, costs)


def as_tree(report: Report) -> dict[str, Any]:
    """For --json."""
    return {"ok": report.ok, **asdict(report)}


def _wrapped(line: str) -> str:
    """Lines of at most 80 columns; words stay whole, so that paths can be copied."""
    return textwrap.fill(line, COLUMNS, subsequent_indent=" " * 5, break_long_words=False, break_on_hyphens=False)


def as_table(report: Report) -> str:
    """For people."""
    lines = [_wrapped(f"{'ok  ' if check.ok else 'FAIL'} {check.name:20} {check.text}") for check in report.checks]
    if report.costs is not None:
        lines += [_wrapped(f"     {line}") for line in words(report.costs)]
    return "\n".join(lines)
