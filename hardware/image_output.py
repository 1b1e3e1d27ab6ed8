"""What is published of an image: OUT.img.zst, its block map, its SHA-256, and the manifest that rpi-imager reads.

zstd's bytes depend on its version, not on the number of threads; the raw image's SHA-256 (in the manifest) depends on neither.
Leaves out: the bill of materials (image_sbom.py), signatures.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hardware import program
from hardware.flash_front import look_at_front
from hardware.image_boards import ImageBoard
from hardware.image_source import look
from hardware.sparse_copy import data_pieces
from node_agent.shard import atomic_file

ZSTD_LEVEL = 10
BLOCK_BYTES = 4096


class OutputError(ValueError):
    """The output cannot be what was asked for."""


@dataclass(frozen=True)
class Published:
    image: Path
    bytes: int
    sha256: str
    raw_bytes: int
    raw_sha256: str
    mapped_bytes: int
    """Of the raw image, in blocks that hold data."""


def beside(image: Path, ending: str) -> Path:
    """OUT.img.zst -> OUT.img + ending, except .sha256, which is of the compressed file.  Raises: OutputError."""
    if not image.name.endswith(".img.zst") or len(image.name) == len(".img.zst"):
        raise OutputError(f"{image.name!r} does not end in .img.zst: call the image NAME.img.zst")
    return image.with_name((image.name if ending == ".sha256" else image.name[: -len(".zst")]) + ending)


def publish(raw: Path, image: Path, private: bool) -> Published:
    """Compresses `raw` to `image`, with block map and SHA-256 beside it; `private`: for its owner's eyes, it holds a claim token.

    Raises: program.ProgramError, OutputError, OSError.
    """
    raw_bytes, raw_sha256, ranges = _mapped(raw)
    partial = image.with_name(image.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        words = [
            "zstd",
            f"-{ZSTD_LEVEL}",
            "-T0",
            "--check",
            "--quiet",
            str(raw.absolute()),
            "-o",
            str(partial.absolute()),
        ]
        program.run(words, cwd=image.absolute().parent)
        partial.chmod(0o600 if private else 0o644)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, image)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sha256 = _sha256(image)
    with atomic_file(beside(image, ".bmap")) as file:
        file.write(bmap(raw_bytes, ranges))
    write_sha256(image, sha256)
    mapped = sum(last - first + 1 for first, last, _ in ranges) * BLOCK_BYTES
    return Published(image, image.stat().st_size, sha256, raw_bytes, raw_sha256, min(mapped, raw_bytes))


def write_sha256(image: Path, sha256: str) -> None:
    """As sha256sum writes it.  Raises: OSError."""
    with atomic_file(beside(image, ".sha256")) as file:
        file.write(f"{sha256}  {image.name}\n".encode())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _mapped(raw: Path) -> tuple[int, str, list[tuple[int, int, str]]]:
    """(bytes, SHA-256, [(first block, last block, SHA-256 of the range)]) of an image.

    Blocks of zeros only are left out, but for those that a FAT has in use: a card that was used before would give its old bytes there.
    """
    size, whole, ranges = raw.stat().st_size, hashlib.sha256(), []
    if size % BLOCK_BYTES:
        raise OutputError(f"{raw} has {size} bytes, which is not a multiple of {BLOCK_BYTES}")
    zeros, at, begin, digest = bytes(1 << 20), 0, -1, hashlib.sha256()
    used = look_at_front(look(raw)).used
    kept = sorted({block for start, end in used for block in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))})
    kept_set = set(kept)

    def close(block: int) -> None:
        nonlocal begin, digest
        if begin >= 0:
            ranges.append((begin, block - 1, digest.hexdigest()))
        begin, digest = -1, hashlib.sha256()

    def skip(file_at: int, to: int) -> None:
        while file_at < to:
            step = min(len(zeros), to - file_at)
            whole.update(memoryview(zeros)[:step])
            file_at += step

    def hole(file_at: int, to: int) -> None:
        nonlocal begin
        skip(file_at, to)
        while file_at < to:
            number = file_at // BLOCK_BYTES
            if number in kept_set:
                begin = number if begin < 0 else begin
                digest.update(zeros[:BLOCK_BYTES])
                file_at += BLOCK_BYTES
                continue
            close(number)
            after = bisect.bisect_left(kept, number)
            file_at = kept[after] * BLOCK_BYTES if after < len(kept) else to

    with open(raw, "rb") as file:
        for start, data in _aligned(file, size):
            hole(at, start)
            whole.update(data)
            for place in range(0, len(data), BLOCK_BYTES):
                block = data[place : place + BLOCK_BYTES]
                number = (start + place) // BLOCK_BYTES
                if block == zeros[:BLOCK_BYTES] and number not in kept_set:
                    close(number)
                    continue
                if begin < 0:
                    begin = number
                digest.update(block)
            at = start + len(data)
    hole(at, size)
    close(size // BLOCK_BYTES)
    return size, whole.hexdigest(), ranges


def _aligned(file: BinaryIO, size: int):
    """Pieces of data in whole blocks; the file's holes are whole blocks, as every Linux file system makes them."""
    for start, data in data_pieces(file.fileno(), 0, size):
        if start % BLOCK_BYTES or len(data) % BLOCK_BYTES:
            raise OutputError(
                f"the image's holes are not in blocks of {BLOCK_BYTES} bytes: build on another file system"
            )
        yield start, data


def bmap(size: int, ranges: list[tuple[int, int, str]]) -> bytes:
    """bmaptool's format 2.0."""
    mapped = sum(last - first + 1 for first, last, _ in ranges)
    blocks = size // BLOCK_BYTES
    lines = [
        f'        <Range chksum="{checksum}">{first}{f"-{last}" if last > first else ""}</Range>'
        for first, last, checksum in ranges
    ]
    head = [
        '<?xml version="1.0" ?>',
        '<bmap version="2.0">',
        f"    <ImageSize>{size}</ImageSize>",
        f"    <BlockSize>{BLOCK_BYTES}</BlockSize>",
        f"    <BlocksCount>{blocks}</BlocksCount>",
        f"    <MappedBlocksCount>{mapped}</MappedBlocksCount>",
        "    <ChecksumType>sha256</ChecksumType>",
    ]
    # the file's own checksum is made with zeros in its place
    text = "\n".join(
        [
            *head,
            f"    <BmapFileChecksum>{'0' * 64}</BmapFileChecksum>",
            "    <BlockMap>",
            *lines,
            "    </BlockMap>",
            "</bmap>",
            "",
        ]
    )
    own = hashlib.sha256(text.encode()).hexdigest()
    return text.replace("0" * 64, own, 1).encode()


def manifest(published: Published, board: ImageBoard, version: str, epoch_s: int) -> dict:
    """An os_list of one entry, as rpi-imager 2 reads with "use custom repository"; paths are relative to the manifest.

    Source: rpi-imager, doc/json-schema/os-list-schema.json.
    """
    entry = {
        "name": f"SpaceMoE {version} ({board.title})",
        "description": "Serves experts of a mixture-of-experts model; configured by its provision pack",
        "url": published.image.absolute().as_uri(),
        "release_date": time.strftime("%Y-%m-%d", time.gmtime(epoch_s)),
        "extract_size": published.raw_bytes,
        "extract_sha256": published.raw_sha256,
        "image_download_size": published.bytes,
        "image_download_sha256": published.sha256,
        "init_format": "none",
        "devices": list(board.imager_devices),
    }
    return {"os_list": [entry]}


def write_json(path: Path, tree: dict) -> None:
    """Raises: OSError."""
    with atomic_file(path) as file:
        file.write(json.dumps(tree, indent=1, sort_keys=True).encode() + b"\n")
