"""Layer sensitivities for calibration.npz: of a bundle that is being written, and of one that is finished (`spacemoe bundle calibrate`).

Leaves out: the measurement (sensitivity.py), and the statistics that need the checkpoint (calibrate.py): a bundle without
calibration.npz is refused.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np

from node_agent import bundle_file
from node_agent.npz_file import DAMAGE, MAX_FILE_BYTES
from node_agent.shard import Manifest, read_manifest, verify_file
from quantize import calibrate, sensitivity
from quantize.calibrate import CalibrationError

CALIBRATION = "calibration.npz"
WORK = ".work"


def measured(
    root: Path, manifest: Manifest, sequences: list[np.ndarray], work: Path, progress: bool = True
) -> dict[str, np.ndarray]:
    """The sensitivities of a bundle's trunk and shards on as many of the sequences as its depth allows.

    Raises: CalibrationError for a trunk that is not cut at the MoE layers, OSError.
    """
    plan = sensitivity.plan_for(manifest)
    return sensitivity.measure(root, manifest, sensitivity.spread(sequences, plan.tokens), work, plan, progress)


def merged(path: Path, arrays: dict[str, np.ndarray]) -> bytes:
    """The .npz file at `path` with `arrays` in it, which go before those of the same name.  Raises: CalibrationError."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > MAX_FILE_BYTES:
            raise CalibrationError(f"{path} holds {size} bytes, {MAX_FILE_BYTES} are allowed: write the bundle again")
        with np.load(path, allow_pickle=False) as found:
            kept = {name: found[name] for name in found.files}
    except CalibrationError:
        raise
    except DAMAGE as error:
        raise CalibrationError(f"{path} cannot be read ({str(error)[:80]}): write the bundle again") from None
    content = io.BytesIO()
    np.savez_compressed(content, **(kept | arrays))
    return content.getvalue()


def recalibrate(root: Path, text: Path, max_tokens: int | None = None, progress: bool = True) -> dict[str, np.ndarray]:
    """Measures the layer sensitivities of a finished bundle on a text, stores them in it and returns them.

    Raises: shard.BundleError, CalibrationError, OSError.
    """
    with bundle_file.alone(root):
        manifest = read_manifest(root)
        entry = bundle_file.entry_of(manifest, CALIBRATION)
        if entry is None:
            raise CalibrationError(
                f"bundle {manifest.name} has no {CALIBRATION}: quantize its checkpoint again with a calibration text"
            )
        bundle_file.finish(root, entry)
        pieces = (*manifest.segments, *manifest.shards)
        for item in (*manifest.files, *(file for piece in pieces for file in piece.files)):
            verify_file(root, item)
        limit = max_tokens or sensitivity.DEFAULT_TEXT_TOKENS
        sequences = calibrate.token_sequences(
            root / "tokenizer.json", text, limit, manifest.dims.max_context, manifest.bos_id
        )
        found = measured(root, manifest, sequences, root / WORK, progress)
        bundle_file.put(root, CALIBRATION, merged(root / CALIBRATION, found))
        shutil.rmtree(root / WORK, ignore_errors=True)
    return found
