"""Block maps (bmaptool's XML format 1.4 and 2.0): which blocks of an image hold data, so that the others need not be written.

A map is believed only if its own checksum and every count in it agree; the ranges' checksums are for flash.py to compare.
Leaves out: version 1.3 and older (SHA-1), and making maps.
"""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ElementTree
import xml.parsers.expat
from dataclasses import dataclass
from pathlib import Path

from hardware.image_errors import ImageError
from hardware.image_source import read_small

MAX_BMAP_BYTES = 8 * 1024 * 1024  # a range takes about 100 bytes: far more of them than a card of 64 GB has in use
MAX_ELEMENTS = 200_000
MAX_DEPTH = 3  # bmap / BlockMap / Range
MAX_PIECE_BYTES = 64 * 1024  # from one '>' to the next: a million attributes cost the parser many seconds
MAX_BLOCK_BYTES = 1 << 20
CHECKSUMS = ("sha256", "sha384", "sha512")
_RANGE = re.compile(r"\s*(\d{1,15})\s*(?:-\s*(\d{1,15})\s*)?")


@dataclass(frozen=True)
class Mapped:
    """A range of the image that holds data; `checksum` is lower-case hex or '' where the map has none."""

    start: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Bmap:
    """Ranges in order, none touching another's bytes. `algorithm` is hashlib's name of the checksums, `checksum` the map's own."""

    image_bytes: int
    block_bytes: int
    algorithm: str
    checksum: str
    ranges: tuple[Mapped, ...]

    @property
    def mapped_bytes(self) -> int:
        return sum(each.bytes for each in self.ranges)


def beside(image: Path) -> Path | None:
    """The map that lies beside an image, by bmaptool's rule: IMAGE.bmap, then with one ending after another taken off."""
    name = image.name
    while True:
        path = image.with_name(name + ".bmap")
        if path.is_file():
            return path
        shorter, dot, _ = name.rpartition(".")
        if not dot or not shorter:
            return None
        name = shorter


def read(path: Path) -> Bmap:
    """Raises: ImageError, OSError."""
    return parse(read_small(path, MAX_BMAP_BYTES), str(path))


def parse(raw: bytes, name: str = "the block map") -> Bmap:
    """Raises: ImageError, one line that names `name`."""

    def wrong(what: str) -> ImageError:
        return ImageError(f"{name} {what}: make it again by `bmaptool create`, or give --no-bmap")

    try:
        if odd := _odd_shape(raw):
            raise wrong(odd)
        root = ElementTree.fromstring(raw)
    except ImageError:
        raise
    except (xml.parsers.expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise wrong(f"is no XML ({' '.join(str(error).split())[:80]})") from None
    version = root.get("version", "")
    if root.tag != "bmap" or not re.fullmatch(r"1\.4|2\.\d{1,3}", version):
        raise wrong(f"is no block map of version 1.4 or 2 but <{root.tag[:20]}> {version[:20]!r}")

    def text(tag: str) -> str:
        element = root.find(tag)
        if element is None or element.text is None:
            raise wrong(f"has no {tag}")
        return element.text.strip()

    def number(tag: str, most: int) -> int:
        value = text(tag)
        if not re.fullmatch(r"\d{1,18}", value) or not int(value) <= most:
            raise wrong(f"has {value[:40]!r} for {tag}")
        return int(value)

    algorithm, own = text("ChecksumType").lower(), text("BmapFileChecksum").lower()
    if algorithm not in CHECKSUMS:
        raise wrong(f"has checksums of type {algorithm[:20]!r}, not {', '.join(CHECKSUMS)}")
    digits = hashlib.new(algorithm).digest_size * 2
    if not re.fullmatch(f"[0-9a-f]{{{digits}}}", own) or raw.lower().count(own.encode()) != 1:
        raise wrong("has no checksum of its own")
    at = raw.lower().index(own.encode())
    # bmaptool's rule: the checksum of the file in which the checksum is zeros
    if hashlib.new(algorithm, raw[:at] + b"0" * digits + raw[at + digits :]).hexdigest() != own:
        raise wrong("is damaged: its own checksum does not hold")
    image_bytes, block = number("ImageSize", 1 << 50), number("BlockSize", MAX_BLOCK_BYTES)
    if block < 512 or block & (block - 1):
        raise wrong(f"has blocks of {block} bytes")
    count = number("BlocksCount", 1 << 50)
    if image_bytes < 1 or count != -(-image_bytes // block):
        raise wrong(f"has {count} blocks of {block} for {image_bytes} bytes")
    ranges, after = [], 0
    for element in root.findall("BlockMap/Range"):
        found = _RANGE.fullmatch(element.text or "")
        first = int(found[1]) if found else -1
        last = int(found[2] or found[1]) if found else -1
        if not after <= first <= last < count:
            raise wrong(f"has a range {(element.text or '').strip()[:40]!r} that is out of place")
        checksum = element.get("chksum", "").lower()
        if checksum and not re.fullmatch(f"[0-9a-f]{{{digits}}}", checksum):
            raise wrong(f"has a checksum {checksum[:20]!r} that is none")
        start = first * block
        ranges.append(Mapped(start, min((last + 1) * block, image_bytes) - start, checksum))
        after = last + 1
    if number("MappedBlocksCount", count) != sum(-(-each.bytes // block) for each in ranges):
        raise wrong("counts other blocks than it lists")
    return Bmap(image_bytes, block, algorithm, own, tuple(ranges))


class _Odd(Exception):
    """Stops the parser at the first thing that no block map has."""


def _odd_shape(raw: bytes) -> str:
    """What of an XML document's shape no block map has, or ''; builds nothing, so that a few megabytes cannot become gigabytes.

    Raises: ExpatError, ValueError, LookupError.
    """
    if max(map(len, raw.split(b">"))) > MAX_PIECE_BYTES:
        return f"has a tag or text of over {MAX_PIECE_BYTES} bytes"
    parser, depth, count = xml.parsers.expat.ParserCreate(), 0, 0

    def start(tag: str, attributes: dict) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > MAX_DEPTH:
            raise _Odd("is nested deeper than any block map")
        if count > MAX_ELEMENTS:
            raise _Odd(f"has over {MAX_ELEMENTS} elements")

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1

    def doctype(*_: object) -> None:
        raise _Odd("declares a document type, which no block map does")

    parser.StartElementHandler, parser.EndElementHandler, parser.StartDoctypeDeclHandler = start, end, doctype
    try:
        parser.Parse(raw, True)
    except _Odd as odd:
        return str(odd)
    return ""


def with_used(ranges: tuple[Mapped, ...], used: tuple[tuple[int, int], ...]) -> tuple[Mapped, ...]:
    """The ranges, and between them those bytes of `used` (in order, not overlapping) that they leave out; the latter without checksum."""
    found, at = [], 0
    edges = [*ranges, Mapped(1 << 62, 0, "")]
    for mapped in edges:
        found += [
            Mapped(max(start, at), min(end, mapped.start) - max(start, at), "")
            for start, end in used
            if max(start, at) < min(end, mapped.start)
        ]
        found.append(mapped)
        at = mapped.start + mapped.bytes
    return tuple(found[:-1])
