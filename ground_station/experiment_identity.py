"""Which experiment it is: digests of everything that a run's figures depend on, so that runs of two are never mixed.

Used when a stopped experiment goes on (experiment_store.py) and by worker processes on other machines (experiment_sweep.py). Leaves
out: the processor. Sums of other vector units differ in their last bits, and now and then a choice with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path

from firmware_sim.scenario import Scenario
from ground_station.experiment import Experiment, documents
from node_agent import shard

LIBRARIES = ("numpy", "onnxruntime", "scipy", "sgp4", "tokenizers")
"""Those whose version may change a figure."""
CODE = (
    *(f"ground_station/experiment{part}.py" for part in ("", "_orbit", "_text")),
    *(f"ground_station/{name}.py" for name in ("dispatch", "local", "placement", "text", "trunk", "wear_price")),
    "ground_station/selection*.py",
    "firmware_sim/*.py",
    *(f"node_agent/{name}.py" for name in ("frame", "partial", "routing")),
)
"""The kit's own files that may."""


def parts(experiment: Experiment, scenario: Scenario, bundle: Path) -> dict[str, str]:
    """What it depends on -> sha256, or for `libraries` and `machine` in words.  Raises: shard.BundleError, EvaluationError."""
    shard.read_manifest(bundle)
    return {
        "experiment": _of_json(dataclasses.asdict(experiment)),
        "scenario": _of_json(dataclasses.asdict(scenario)),
        "bundle": shard.sha256_of(bundle / shard.MANIFEST),  # it holds the digests of trunk, experts and tokenizer
        "calibration": shard.sha256_of(bundle / "calibration.npz"),
        "text": _of_json(documents(bundle)),
        "code": _code(),
        "libraries": ", ".join(f"{name} {_version(name)}" for name in LIBRARIES),
        "machine": platform.machine(),
    }


def digest(found: dict[str, str]) -> str:
    """sha256 over `parts`."""
    return _of_json(found)


def difference(mine: dict[str, str], other: object) -> str:
    """Names of the parts that are not the same, as words of a sentence; "" where all are."""
    if not isinstance(other, dict):
        return "all that it depends on"
    return ", ".join(name for name in mine if mine[name] != other.get(name))


def versions() -> dict[str, str]:
    """For the record."""
    return {name: _version(name) for name in ("spacemoe-kit", *LIBRARIES, "pyarrow", "joblib", "distributed")} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _of_json(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


def _code() -> str:
    root = Path(__file__).resolve().parent.parent
    files = sorted(path for pattern in CODE for path in root.glob(pattern))
    return _of_json([(path.relative_to(root).as_posix(), shard.sha256_of(path)) for path in files])
