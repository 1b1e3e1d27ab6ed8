"""The recipe of a bundle: what was asked, checked, with a hash that tells two recipes apart and words for the manifest.

Leaves out: carrying it out (pipeline).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from node_agent.shard import sha256_of
from quantize import optimum_int8
from quantize.calibrate import MIN_TOKENS
from quantize.trunk_graph import TRUNK_PRECISIONS

RECIPE_VERSION = 1
# (bits, block). Blocks of 32: with larger ones the kernel for one row and that for many differ in the last bits, and a row's
# result must not depend on the rest of its batch.
BLOCKS = {"int8": (8, 32), "int4": (4, 32), "int2": (2, 32)}
# With four levels GPTQ leans hard on the calibration text, cuts ranges and shrinks outputs, which all costs perplexity elsewhere:
# more damping, ranges cut by a fifth at most, and every row's gain put right afterwards.
GPTQ = {"int2": {"damp": 0.1, "least_range": 0.8, "act_order": False, "keep_gain": True}}
_BLOCKS_AT_FIRST = (
    "int8",
    "int4",
)  # in every recipe's hash, used or not: bundles made before there was int2 keep theirs
DYNAMIC = "int8dyn"
PRECISIONS = ("fp32", *BLOCKS, DYNAMIC)
DEFAULT_MAX_TOKENS = 32_768
MIN_CONTEXT = 16
CALIBRATION_TEXT = "calibration.txt"


class RecipeError(ValueError):
    """What was asked cannot be made; the text names the next step."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a bundle's bytes, beside the model."""

    precisions: tuple[str, ...]
    trunk_precision: str
    calibration_sha256: str  # '' without calibration
    max_tokens: int
    max_context: int
    version: int = RECIPE_VERSION

    @property
    def calibrated(self) -> bool:
        return bool(self.calibration_sha256)

    def hash(self, fingerprint: str) -> str:
        blocks = {name: each for name, each in BLOCKS.items() if name in _BLOCKS_AT_FIRST or name in self.precisions}
        return hashlib.sha256(json.dumps([asdict(self), blocks, fingerprint], sort_keys=True).encode()).hexdigest()

    def words(self) -> dict[str, str]:
        """The manifest's description of how each precision was made."""
        how = "GPTQ on calibration inputs weighted by the gate" if self.calibrated else "round-to-nearest"
        text = {"fp32": "float32 as in the checkpoint"} | {
            name: f"MatMulNBits, {bits} bit, blocks of {block}, asymmetric, accuracy_level 4, {how}"
            for name, (bits, block) in BLOCKS.items()
        }
        text[DYNAMIC] = (
            "Optimum's AutoQuantizationConfig.arm64: dynamic int8, weights per channel; to be run row by row"
        )
        if self.calibrated and DYNAMIC in self.precisions and optimum_int8.kernels_saturate():
            text[DYNAMIC] += "; errors measured on a processor whose 8 bit products saturate: smaller on Arm"
        result = {name: text[name] for name in self.precisions}
        trunk = TRUNK_PRECISIONS[self.trunk_precision]
        if trunk is not None:
            result["trunk"] = (
                f"MatMulNBits, {trunk[0]} bit, blocks of {trunk[1]}, round-to-nearest; norms, router, embedding float32"
            )
        else:
            result["trunk"] = "float32"
        if self.calibrated:
            result["calibration"] = (
                f"sha256 {self.calibration_sha256}, at most {self.max_tokens} tokens, one eighth held back"
            )
        return result


def choose_recipe(
    folder: Path,
    precisions: tuple[str, ...],
    trunk_precision: str,
    text: Path | None,
    rtn: bool,
    max_tokens: int,
    max_context: int,
) -> tuple[Recipe, Path | None]:
    """The recipe and the calibration text, from what was asked and what the model folder holds.  Raises: RecipeError."""
    unknown = [name for name in precisions if name not in PRECISIONS]
    if unknown or not precisions:
        raise RecipeError(f"precision {', '.join(unknown) or '(none)'} is unknown: choose from {', '.join(PRECISIONS)}")
    if DYNAMIC in precisions and not optimum_int8.available():
        raise RecipeError(f"{DYNAMIC} needs Optimum: pip install 'spacemoe-kit[reference]', or choose int8")
    if trunk_precision not in TRUNK_PRECISIONS:
        raise RecipeError(f"trunk precision {trunk_precision!r} is unknown: choose from {', '.join(TRUNK_PRECISIONS)}")
    if max_tokens < MIN_TOKENS or max_context < MIN_CONTEXT:
        raise RecipeError(
            f"at least {MIN_TOKENS} calibration tokens and a context of {MIN_CONTEXT} are needed: raise the number"
        )
    if text is None and not rtn and (folder / CALIBRATION_TEXT).is_file():
        text = folder / CALIBRATION_TEXT
    if text is not None and rtn:
        raise RecipeError("--rtn rounds without calibration: leave out --rtn or --calibration")
    few = next((name for name in ("int4", "int2") if name in precisions), None)
    if text is None and few and not rtn:
        raise RecipeError(
            f"{BLOCKS[few][0]} bit needs a calibration text: give --calibration FILE "
            "(or --rtn to round to nearest, at a clear loss of quality)"
        )
    sha256 = ""
    if text is not None:
        try:
            sha256 = sha256_of(text)
        except OSError as error:
            raise RecipeError(
                f"{text} cannot be read ({error.strerror}): give a text file by --calibration FILE"
            ) from None
    ordered = tuple(name for name in PRECISIONS if name in precisions)
    return Recipe(ordered, trunk_precision, sha256, max_tokens, max_context), text
