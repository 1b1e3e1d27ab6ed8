"""Builds a bootable image: recipe -> layers -> disk -> OUT.img.zst and what lies beside it.

    packages of Debian (image_bootstrap)  +  agent and wheels (payload)  +  settings (image_root)   ->  root.ext4 (image_stage)
    kernel, initial RAM disk, firmware, command line, provision pack                                ->  FAT
    both                                                                                            ->  disk (image_disk) -> output

Every layer is kept in the cache under the hash of its inputs. The same inputs give the same bytes.
Leaves out: signing the image, boards whose vendor's image is customised instead (customize.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterator

from hardware import (
    image_boards,
    image_bootstrap,
    image_disk,
    image_output,
    image_root,
    image_sbom,
    image_stage,
    payload,
)
from node_agent.enrolment import CA, CLAIM, CONFIG, MAX_PACK_FILE_BYTES, PACK_FOLDER

RECIPE = 1
MAX_COMPRESSED_BYTES = 350_000_000
MAX_SHARDS_BYTES = 32 * 1024**3
Progress = Callable[[str], None]


class BuildError(ValueError):
    """The recipe cannot be built; the text says what to change."""


@dataclass(frozen=True)
class Recipe:
    board: str
    output: Path
    cache: Path
    size_mb: int | None = None
    read_only_root: bool = False
    pack: Path | None = None
    shards: Path | None = None
    ssh_key: Path | None = None
    mirror: str | None = None
    offline: bool = False
    console: bool = False


@dataclass(frozen=True)
class Built:
    published: image_output.Published
    board: str
    files: tuple[Path, ...]
    packages: int
    wheels: int
    seconds: float
    from_cache: bool
    warnings: tuple[str, ...]

    def as_tree(self) -> dict:
        tree = asdict(self.published) | {"board": self.board, "files": [str(each) for each in self.files]}
        tree |= {"packages": self.packages, "wheels": self.wheels, "seconds": round(self.seconds, 1)}
        return tree | {
            "image": str(self.published.image),
            "from_cache": self.from_cache,
            "warnings": list(self.warnings),
        }

    def as_text(self) -> list[str]:
        made = self.published
        size, card, written = (f"{each / 1e6:.0f} MB" for each in (made.bytes, made.raw_bytes, made.mapped_bytes))
        lines = [f"{made.image}: {size}; {card} on the card, of which {written} are written"]
        lines.append(f"sha256 {made.sha256} (unpacked {made.raw_sha256})")
        lines.append(
            f"{self.packages} Debian packages, {self.wheels} wheels; {self.seconds:.0f} s{', from the cache' if self.from_cache else ''}"
        )
        lines.append("beside it: " + ", ".join(each.name for each in self.files))
        return lines + [f"warning: {each}" for each in self.warnings]


def check(recipe: Recipe) -> tuple[image_boards.ImageBoard, image_root.Options, dict[str, Path]]:
    """What can be known before anything is made: the board, the root's options, the pack's files.

    Raises: BuildError, BoardError, OutputError, OSError.
    """
    board = image_boards.find(recipe.board)
    image_output.beside(recipe.output, ".bmap")
    if not recipe.output.absolute().parent.is_dir() or (recipe.output.exists() and not recipe.output.is_file()):
        raise BuildError(f"{recipe.output} cannot be written: give -o a file in a folder that is there")
    key = image_root.ssh_key(recipe.ssh_key) if recipe.ssh_key is not None else ""
    pack = {}
    if recipe.pack is not None:
        for name in (CONFIG, CA, CLAIM):
            path = recipe.pack / name
            if not path.is_file() or not 0 < path.stat().st_size <= MAX_PACK_FILE_BYTES:
                raise BuildError(f"{path} is missing, empty or too large: make the pack by `spacemoe fleet add`")
            pack[f"{PACK_FOLDER}/{name}"] = path
    if recipe.shards is not None and not (recipe.shards / "manifest.json").is_file():
        raise BuildError(f"{recipe.shards} holds no manifest.json: give --shards a bundle of `spacemoe quantize`")
    if recipe.shards is not None:
        total = sum(path.stat().st_size for path in recipe.shards.rglob("*") if path.is_file())
        if total > MAX_SHARDS_BYTES:
            raise BuildError(f"{recipe.shards} has {total} bytes, more than {MAX_SHARDS_BYTES}: take fewer experts")
    return board, image_root.Options(recipe.read_only_root, key, recipe.console), pack


def plan(recipe: Recipe) -> dict:
    """What a build would be made of, without making or asking anything.  Raises: as check()."""
    board, options, pack = check(recipe)
    sources = image_bootstrap.sources(recipe.mirror)
    return {
        "board": f"{board.name} ({board.title})",
        "output": str(recipe.output),
        "packages": " ".join(_packages(options)),
        "mirror": " ".join(f"{each.uri} {each.suite}" for each in sources),
        "python": image_bootstrap.PYTHON,
        "root": "read-only, with a writable partition" if options.read_only else "read-write, grows to the card",
        "pack": str(recipe.pack) if pack else "none: put one on the card, by `spacemoe flash` or by hand",
        "shards": str(recipe.shards) if recipe.shards else "none: delivered by the ground station",
        "ssh": "for one key" if options.ssh_key else "none",
        "cache": str(recipe.cache),
    }


def build(recipe: Recipe, progress: Progress) -> Built:
    """Raises: BuildError and the other ValueErrors of the parts, RuntimeError when a program fails, OSError."""
    started = time.monotonic()
    board, options, pack = check(recipe)
    with _locked(recipe.cache):
        sources = image_bootstrap.sources(recipe.mirror)
        bootstrap = image_bootstrap.make(sources, _packages(options), recipe.cache, recipe.offline, progress)
        tar, key, wheels = payload.packed(image_bootstrap.PYTHON, recipe.cache, progress)
        shards_key = _tree_key(recipe.shards) if recipe.shards is not None else ""
        layers = image_stage.Layers(bootstrap, tar, key, options, recipe.shards, shards_key)
        stage = image_stage.make(layers, recipe.cache, progress)
        seed = _seed(recipe, board, stage, pack)
        published, from_cache = _image(recipe, board, options, stage, pack, seed, bootstrap.epoch_s, progress)
    version = payload.kit_version()
    sbom = image_output.beside(recipe.output, ".sbom.json")
    status = stage.status.read_text(errors="replace")
    image_output.write_json(
        sbom, image_sbom.document(f"spacemoe-{board.name}", version, seed, bootstrap, status, stage.licences, wheels)
    )
    manifest = image_output.beside(recipe.output, ".rpi-imager.json")
    image_output.write_json(manifest, image_output.manifest(published, board, version, bootstrap.epoch_s))
    files = (image_output.beside(recipe.output, ".bmap"), image_output.beside(recipe.output, ".sha256"), sbom, manifest)
    warnings = [board.notes] if board.notes else []
    if published.bytes > MAX_COMPRESSED_BYTES and recipe.shards is None:
        warnings.append(f"the image has {published.bytes} bytes, over the budget of {MAX_COMPRESSED_BYTES}")
    seconds = time.monotonic() - started
    return Built(
        published, board.name, files, len(bootstrap.packages), len(wheels), seconds, from_cache, tuple(warnings)
    )


def _packages(options: image_root.Options) -> tuple[str, ...]:
    return image_bootstrap.PACKAGES + (image_bootstrap.SSH_PACKAGES if options.ssh_key else ())


def _seed(recipe: Recipe, board: image_boards.ImageBoard, stage: image_stage.Stage, pack: dict[str, Path]) -> str:
    """Hash of everything that the image is made of."""
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in pack.items()}
    texts = image_boards.boot_files(board, quiet=not recipe.console)
    what = [
        RECIPE,
        stage.key,
        asdict(board),
        texts,
        files,
        recipe.size_mb,
        image_disk.FAT_BYTES,
        image_output.ZSTD_LEVEL,
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _image(recipe, board, options, stage, pack, seed: str, epoch_s: int, progress: Progress):
    """(what was published, whether it came from the cache). An image with a claim token in it is never kept in the cache."""
    kept = recipe.cache / "image" / f"{seed}.img.zst"
    record = kept.with_suffix(".json")
    if not pack and kept.is_file() and record.is_file():
        progress("the image is in the cache")
        for ending in ("", ".bmap"):
            source = kept if not ending else image_output.beside(kept, ending)
            target = recipe.output if not ending else image_output.beside(recipe.output, ending)
            _copy(source, target)
        facts = json.loads(record.read_text())
        image_output.write_sha256(recipe.output, facts["sha256"])
        return image_output.Published(recipe.output, **facts), True
    with tempfile.TemporaryDirectory(prefix="image.", dir=recipe.cache) as name:
        work = Path(name)
        progress("putting the disk together")
        files = image_stage.boot_files(stage, board.device_trees, board.firmware, work)
        for index, (path, text) in enumerate(image_boards.boot_files(board, quiet=not recipe.console).items()):
            files[path] = work / f"text-{index}"
            files[path].write_text(text)
        systems = (stage.root, stage.data) if stage.data is not None else (stage.root,)
        size = recipe.size_mb * 10**6 // image_disk.ALIGN_BYTES * image_disk.ALIGN_BYTES if recipe.size_mb else None
        disk = image_disk.Disk(image_root.BOOT_LABEL, files | pack, systems, seed, epoch_s, size)
        raw = work / "disk.img"
        image_disk.assemble(disk, raw)
        progress("compressing")
        if pack:
            return image_output.publish(raw, recipe.output, private=True), False
        kept.parent.mkdir(parents=True, exist_ok=True)
        published = image_output.publish(raw, kept, private=False)
        facts = {name: value for name, value in asdict(published).items() if name != "image"}
        image_output.write_json(record, facts)
    published, _ = _image(recipe, board, options, stage, pack, seed, epoch_s, lambda step: None)
    return published, False


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def _tree_key(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            with open(path, "rb") as file:
                digest.update(
                    hashlib.file_digest(file, "sha256").digest()
                    if hasattr(hashlib, "file_digest")
                    else hashlib.sha256(file.read()).digest()
                )
    return digest.hexdigest()


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One build at a time uses a cache.  Raises: BuildError."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"another build uses {cache}: wait for it, or give another --cache") from None
        yield
