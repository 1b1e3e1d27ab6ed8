"""What a bundle says of itself: special tokens, licence, the files copied beside the shards, the manifest.

Leaves out: shards and segments (pipeline) and reading the manifest again (node_agent.shard).
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from node_agent.shard import FileEntry, Manifest, Segment, ShardEntry, sha256_of, write_file
from quantize.checkpoint import CheckpointError, read_json
from quantize.families import Architecture
from quantize.recipe import Recipe

CALIBRATION = "calibration.npz"
COPIED = ("tokenizer.json", "config.json", "README.md")


def extra_files(model_dir: Path, out: Path, recipe: Recipe) -> tuple[FileEntry, ...]:
    entries = [
        write_file(out, item, (model_dir / item).read_bytes()) for item in COPIED if (model_dir / item).is_file()
    ]
    if recipe.calibrated:
        size = (out / CALIBRATION).stat().st_size
        entries.append(FileEntry(CALIBRATION, size, sha256_of(out / CALIBRATION)))
    return tuple(entries)


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids from an int, a list of ints, or nothing."""
    return tuple(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


def special_tokens(model_dir: Path) -> tuple[int | None, tuple[int, ...]]:
    """(token that a prompt starts with or None, tokens that end a text).

    bos_token_id alone does not say that the model was trained with it (Qwen never puts it in front), so it counts only when
    the tokenizer puts it in front itself or tokenizer_config.json says `add_bos_token`.
    """
    from tokenizers import Tokenizer

    config = read_json(model_dir / "config.json")
    generation = (
        read_json(model_dir / "generation_config.json") if (model_dir / "generation_config.json").is_file() else {}
    )
    eos = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    bos = _ids(config.get("bos_token_id"))
    extra = read_json(model_dir / "tokenizer_config.json") if (model_dir / "tokenizer_config.json").is_file() else {}
    try:
        first = Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode("").ids[:1]
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{model_dir}/tokenizer.json is damaged ({str(error)[:80]}): copy the model folder again"
        ) from None
    used = bool(bos) and (first == [bos[0]] or extra.get("add_bos_token") is True)
    return (bos[0] if used else None), eos


def _licence(model_dir: Path) -> str:
    """The `license:` line of the model card's front matter."""
    card = model_dir / "README.md"
    if card.is_file():
        match = re.search(
            r"^licen[sc]e:\s*[\"']?([^\"'\n]+)", card.read_text("utf-8", errors="replace")[:4096], re.MULTILINE
        )
        if match:
            return match.group(1).strip()
    return "unknown"


def describe(
    model_dir: Path,
    arch: Architecture,
    recipe: Recipe,
    recipe_hash: str,
    fingerprint: str,
    segments: list[Segment],
    shards: list[ShardEntry],
    files: tuple[FileEntry, ...],
    name: str | None,
) -> Manifest:
    config = read_json(model_dir / "config.json")
    bos_id, eos_ids = special_tokens(model_dir)
    return Manifest(
        name=name or model_dir.resolve().name,
        family=arch.family,
        base_model=str(config.get("_name_or_path") or model_dir.resolve().name),
        revision=f"fingerprint {fingerprint}",
        licence=_licence(model_dir),
        dims=arch.dims,
        routing=arch.routing,
        bos_id=bos_id,
        eos_ids=eos_ids,
        moe_layers=arch.moe_layers,
        trunk_precision=recipe.trunk_precision,
        segments=tuple(segments),
        shards=tuple(shards),
        files=files,
        recipe=recipe.words() | {"hash": recipe_hash},
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
