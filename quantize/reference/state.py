"""What a training run keeps: its recipe and sizes, read back from a checkpoint, and files that appear whole or not at all.

Leaves out: the run itself (train).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from quantize.reference.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the result of a run apart from the model's sizes. Kept in the checkpoint."""

    sequences_per_step: int = 16
    sequences_per_micro: int = 4
    matrix_rate: float = 0.02
    matrix_decay: float = 0.02
    matrix_momentum: float = 0.95
    other_rate: float = 3e-3
    other_betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    warmup_steps: int = 200
    balance_weight: float = 0.01
    z_weight: float = 1e-4
    optimiser: str = "muon"
    expected_tokens: float = 40e6
    max_epochs: float = 5.0
    seed: int = 1


def write_atomically(path: Path, write) -> None:
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict:
    """A run's checkpoint.  Raises: SystemExit that says where it was looked for."""
    try:
        return torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path} is missing: check --work and --name, or train that run first") from None


def config_of(saved: dict) -> ModelConfig:
    return ModelConfig(**saved["config"])


def recipe_of(saved: dict) -> Recipe:
    return Recipe(**{**saved["recipe"], "other_betas": tuple(saved["recipe"]["other_betas"])})
