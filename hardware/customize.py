"""`spacemoe image customize`: a vendor's base image and a provision pack become an image that comes up as that node. No root, no mounting.

The input is opened for reading only. Everything is done on a copy in a folder beside the output, which is renamed when the checks
hold and removed whatever happens; a dry run reads a raw input in place. The agent's files and units go into the root file system by
debugfs, on every base in the same way, so that nothing depends on a script of the first boot; the pack goes on the FAT partition,
where the first boot takes the claim token from. Host name, WLAN and SSH key are given to the base in its own way (first_boot_files.py).
After writing: e2fsck, fsck.vfat, every injected file read back by its sha256, the partition table compared.
Leaves out: growing the root file system (the bases do that at their first boot), and how the payload is made (payload.py).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hardware import base_kinds, ext4_files, ext4_write, image_source, partitions, program, sparse_copy
from hardware.base_kinds import Base
from hardware.customize_plan import (
    CustomizeError,
    Pack,
    Settings,
    brought_python,
    payload_items,
    plan,
    read_pack,
    tree_items,
)
from hardware.ext4_write import File, Folder, Item, Link
from hardware.fat_files import open_fat
from hardware.image_errors import ImageTooLarge

HEADROOM_BYTES = 16 * 1024**2
"""Left free in the root file system: the first boot writes before it grows it."""
COMPRESSORS = {".zst": ("zstd", "-q", "-T0", "-10"), ".xz": ("xz", "-k", "-T0")}
ENDINGS = (".img", *COMPRESSORS)
PROGRAMS = ("mcopy", "debugfs", "e2fsck", "fsck.vfat")
COMPRESS_TIMEOUT_S = 6 * 3600.0

Stage = Callable[[str], None]
BuildPayload = Callable[[Path, str], None]
"""(a new folder, the base's Python): makes the tree that is laid over the root file system."""
BringPackages = Callable[[Path, bytes, str], tuple[str, ...]]
"""(a new folder, the base's dpkg status, its Debian release): unpacks the packages that it lacks, and names them."""


@dataclass(frozen=True)
class Report:
    kind: str
    base: str
    python: str
    node: str
    board: str
    image_bytes: int
    fat_files: tuple[str, ...]
    fat_needed_bytes: int
    fat_free_bytes: int
    root_items: int
    root_needed_bytes: int
    root_free_bytes: int
    packages: tuple[str, ...]
    """Of Debian, that the base lacked."""
    notes: tuple[str, ...]
    output: str | None
    """None for a dry run."""

    def tree(self) -> dict:
        return asdict(self)


def customize(
    source: Path,
    pack_folder: Path,
    output: Path,
    settings: Settings,
    build_payload: BuildPayload,
    bring_packages: BringPackages,
    stage: Stage = lambda text: None,
    copied: sparse_copy.Progress = lambda done, total: None,
) -> Report:
    """Writes `output`; with `dry_run` everything up to the check of free space is done, and nothing is left.

    Raises: CustomizeError and other ValueErrors for what was given; ProgramError; OSError. Nothing is left behind then.
    """
    pack = read_pack(pack_folder)
    _check_output(source, output)
    for name in (*PROGRAMS, *COMPRESSORS.get(output.suffix, ())[:1]):
        program.find(name)
    found = _look(source, output, settings)
    work = Path(tempfile.mkdtemp(prefix=".spacemoe-customize-", dir=output.parent.absolute()))
    try:
        image = work / "card.img"
        if settings.dry_run and found.kind == image_source.RAW:
            stage(f"reading {found.bytes} bytes where they are")
            image.symlink_to(source.absolute())  # programs leave their temporary files beside the link
        else:
            stage(f"copying {found.bytes} bytes")
            sparse_copy.unpack(found, image, copied)
        base = _recognise(image, source)
        stage(f"found {base.kind}: {base.name}, {f'Python {base.python}' if base.python else 'without Python'}")
        report, items, fat = _prepare(image, base, pack, settings, build_payload, bring_packages, work, stage)
        if settings.dry_run:
            return report
        _write(image, base, items, fat, stage)
        os.replace(_finished(image, output, stage), output)
        _flush_folder(output.parent)
        return replace(report, output=str(output))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_output(source: Path, output: Path) -> None:
    if output.suffix not in ENDINGS:
        raise CustomizeError(f"{output} must end in .img, .img.zst or .img.xz")
    if not output.absolute().parent.is_dir():
        raise CustomizeError(f"there is no folder {output.absolute().parent}: make it, or name another output")
    if output.exists():
        if source.exists() and output.samefile(source):
            raise CustomizeError(f"{output} is the base image itself, which is never altered: name another output")
        if not output.is_file():
            raise CustomizeError(f"{output} is no plain file: name another output (`spacemoe flash` writes cards)")


def _look(source: Path, output: Path, settings: Settings) -> image_source.ImageSource:
    try:
        found = image_source.look(source, settings.max_bytes)
    except ImageTooLarge as error:
        raise CustomizeError(
            f"{source} has {error.bytes} bytes unpacked, more than --max-size {settings.max_bytes}"
        ) from None
    free = shutil.disk_usage(output.absolute().parent).free
    if found.kind != image_source.RAW and found.bytes > free:
        raise CustomizeError(
            f"{source} has {found.bytes} bytes unpacked, {output.absolute().parent} has {free} free: {found.bytes - free} are lacking"
        )
    return found


def _recognise(image: Path, source: Path) -> Base:
    """Errors name the file that the user gave, not the copy."""
    try:
        return base_kinds.recognise(image)
    except partitions.PartitionError as error:
        raise CustomizeError(
            f"{str(error).replace(str(image), str(source))}; take one of: {base_kinds.TAKEN}"
        ) from None
    except ValueError as error:
        raise CustomizeError(str(error).replace(str(image), str(source)).replace(image.name, source.name)) from None


def _prepare(
    image: Path,
    base: Base,
    pack: Pack,
    settings: Settings,
    build: BuildPayload,
    bring: BringPackages,
    work: Path,
    stage: Stage,
) -> tuple[Report, list[Item], dict[str, bytes]]:
    """The report, the items of the root file system and the files of the FAT, once it is certain that they fit."""

    def old(path: str) -> bytes | None:
        if path.startswith("fat:"):
            return base.fat.read(path.removeprefix("fat:"), base_kinds.MAX_TEXT_BYTES)
        return ext4_files.read(base.root, path, base_kinds.MAX_TEXT_BYTES)

    planned = plan(base, pack, settings, old)
    items: list[Item] = [Folder(path, mode) for path, mode in planned.folders.items()]
    packages: tuple[str, ...] = ()
    python = base.python
    if base.kind != "spacemoe":
        if not python:
            (work / "packages").mkdir()
            status = ext4_files.read(base.root, base_kinds.DPKG_STATUS, base_kinds.MAX_STATUS_BYTES) or b""
            packages = bring(work / "packages", status, base.codename)
            python = brought_python(work / "packages")
            items += tree_items(work / "packages")
        stage(f"making the offline package set for Python {python}")
        build(work / "payload", python)
        items += payload_items(work / "payload")
    staged = work / "staged"
    staged.mkdir()
    for index, (path, (data, mode)) in enumerate(planned.root.items()):
        (staged / str(index)).write_bytes(data)
        items.append(File(path, staged / str(index), mode))
    items += [Link(path, target) for path, target in planned.links.items()]
    root_needed = ext4_write.needed_bytes(base.root, items) if items else 0
    root_free = base.root.free_blocks * base.root.block_bytes
    fat_needed = base.fat.needed_bytes(planned.fat) if planned.fat else 0
    fat_free = base.fat.free_bytes() if base.fat else 0
    for what, needed, free in (("root file system", root_needed, root_free), ("FAT partition", fat_needed, fat_free)):
        lacking = needed + HEADROOM_BYTES - free if what[0] == "r" else needed - free
        if needed and lacking > 0:
            raise CustomizeError(
                f"the {what} of the base has {free} bytes free, {needed} are written: {lacking} are lacking; take a base with more room"
            )
    inodes = 2 * len(items)  # at most as many folders as files
    if inodes > base.root.free_inodes:
        raise CustomizeError(
            f"the root file system of the base has {base.root.free_inodes} free inodes, {inodes} are wanted: take a base with more room"
        )
    return (
        Report(
            base.kind, base.name, python, pack.node, settings.board or pack.board, image.stat().st_size,
            tuple(sorted(planned.fat)), fat_needed, fat_free, len(items), root_needed, root_free, packages, planned.notes, None,
        ),
        items,
        planned.fat,
    )  # fmt: skip


def _write(image: Path, base: Base, items: list[Item], fat: dict[str, bytes], stage: Stage) -> None:
    if items:
        stage(f"writing {len(items)} files into the root file system")
        written = ext4_write.write(base.root, items, _mtime(image))
        stage("checking the root file system")
        ext4_files.check(ext4_files.open_ext4(image, base.root.offset_bytes, base.root.size_bytes))
        ext4_write.verify(base.root, written)
    if fat:
        stage(f"writing {len(fat)} files on the FAT partition")
        before = set(base.fat.findings())
        base.fat.put(fat)
        after = open_fat(image, base.fat.offset_bytes, base.fat.size_bytes)
        if new := [line for line in after.findings() if line not in before]:
            raise program.ProgramError(
                f"fsck.vfat finds the FAT partition damaged after writing: {' '.join(new)[:300]}"
            )
        for path, data in fat.items():
            if hashlib.sha256(after.read(path) or b"").digest() != hashlib.sha256(data).digest():
                raise program.ProgramError(
                    f"{path} on the FAT partition reads back with another sha256 than it was written with"
                )
    if partitions.read_table(image) != base.table:
        raise program.ProgramError("the partition table changed while files were written: the image is not kept")


def _mtime(image: Path) -> int:
    """One time for all files: when the copy was made."""
    return int(image.stat().st_ctime)


def _finished(image: Path, output: Path, stage: Stage) -> Path:
    """The file that is to be renamed to `output`, flushed; only its owner may read it, for it holds a claim token."""
    result = image
    if output.suffix in COMPRESSORS:
        stage(f"compressing to {output.suffix}")
        result = image.with_name(f"{image.name}{output.suffix}")
        program.run([*COMPRESSORS[output.suffix], image.name], cwd=image.parent, timeout_s=COMPRESS_TIMEOUT_S)
    result.chmod(0o600)
    with open(result, "rb+") as file:
        os.fsync(file.fileno())
    return result


def _flush_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
