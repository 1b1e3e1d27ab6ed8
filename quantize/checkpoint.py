"""Reads a Hugging Face folder lazily: config.json, tokenizer.json and one tensor at a time of its safetensors files.

Files are mapped, not read, so a checkpoint may be larger than memory; bfloat16, float16 and float32 become float32.
Needs neither torch nor transformers. Leaves out: what the tensors mean (families) and formats other than safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 256 * 1024 * 1024
FINGERPRINT_BYTES = 4096  # of each tensor's start and end
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class CheckpointError(ValueError):
    """A model folder cannot be read; the text names the file and the next step."""


@dataclass(frozen=True)
class _Slot:
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model folder.  Raises: CheckpointError."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes: it is no Hugging Face {path.name}")
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): copy the model folder again") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not JSON: copy the model folder again") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds no JSON object: copy the model folder again")
    return tree


def _header(path: Path) -> dict[str, _Slot]:
    """Where each tensor of one safetensors file lies.  Raises: CheckpointError for a damaged file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is cut short or no safetensors file: download it again")
            tree = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): download the missing file") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has a damaged header: download it again") from None
    base, slots = 8 + length, {}
    try:
        for name, item in tree.items():
            if name == "__metadata__":
                continue
            begin, end = (int(value) for value in item["data_offsets"])
            shape = tuple(int(value) for value in item["shape"])
            dtype = item["dtype"]
            if begin < 0 or end < begin or min(shape, default=1) < 0:
                raise ValueError
            if dtype in _STORED and end - begin != math.prod(shape) * _STORED[dtype].itemsize:
                raise ValueError
            if base + end > size:
                raise CheckpointError(
                    f"{path} is cut short ({size} bytes, {name} ends at {base + end}): download it again"
                )
            slots[name] = _Slot(path.name, dtype, shape, base + begin, base + end)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} has a damaged header: download it again") from None
    return slots


class Checkpoint:
    """An open model folder. `config` is config.json; tensors are read by name.

    Raises on opening: CheckpointError when the folder, config.json, tokenizer.json or the safetensors files are missing or
    damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder: give a Hugging Face model folder")
        self.config = self._required("config.json")
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json: download it with the model, or save it by AutoTokenizer.save_pretrained"
            )
        self._slots: dict[str, _Slot] = {}
        for name in self._files():
            self._slots.update(_header(folder / name))
        self._maps: dict[str, mmap.mmap] = {}

    def _required(self, name: str) -> dict[str, Any]:
        if not (self.folder / name).is_file():
            raise CheckpointError(f"{self.folder} has no {name}: give the folder that holds the model's {name}")
        return read_json(self.folder / name)

    def _files(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) and Path(name).name == name for name in weight_map.values()
            ):
                raise CheckpointError(f"{self.folder / INDEX} has no usable weight_map: download it again")
            return sorted(set(weight_map.values()))
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        raise CheckpointError(
            f"{self.folder} has neither {SINGLE} nor {INDEX}: download the safetensors files (pickled .bin weights are not read)"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def _slot(self, name: str) -> _Slot:
        try:
            return self._slots[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder} lacks the tensor {name}: download all safetensors files, or check model_type in config.json"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._slot(name).shape

    def read(self, name: str, shape: tuple[int, ...] | None = None, part: int | slice | None = None) -> np.ndarray:
        """A tensor as float32, or a part of it along its first axis; only that part is read from disk.

        `shape` is what the whole tensor must have.  Raises: CheckpointError when it is missing or of another shape or type.
        """
        slot = self._slot(name)
        if shape is not None and slot.shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(slot.shape)}, config.json says {list(shape)}: config.json and weights do not belong together"
            )
        dtype = _STORED.get(slot.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{name} is stored as {slot.dtype}: convert the model to bfloat16, float16 or float32 first"
            )
        stored = np.frombuffer(self._map(slot.file), dtype, math.prod(slot.shape), slot.start).reshape(slot.shape)
        if part is not None:
            stored = stored[part]
        if slot.dtype == "BF16":
            wide = stored.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return stored.astype(np.float32)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with open(self.folder / file, "rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def fingerprint(self) -> str:
        """sha256 over config.json, tokenizer.json, every tensor's name, shape and type, and its first and last 4 KiB.

        It tells two checkpoints apart without reading them whole; it is no proof against a deliberate change.
        """
        digest = hashlib.sha256()
        for name in ("config.json", "tokenizer.json"):
            digest.update((self.folder / name).read_bytes())
        for name in sorted(self._slots):
            slot = self._slots[name]
            digest.update(f"{name} {slot.dtype} {slot.shape}".encode())
            stored = self._map(slot.file)
            digest.update(stored[slot.start : min(slot.start + FINGERPRINT_BYTES, slot.end)])
            digest.update(stored[max(slot.start, slot.end - FINGERPRINT_BYTES) : slot.end])
        return digest.hexdigest()

    def bytes(self) -> int:
        return sum(os.path.getsize(self.folder / name) for name in {slot.file for slot in self._slots.values()})
