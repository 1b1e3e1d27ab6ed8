"""Delivery contract: binary frames by which shards move over the data plane's second socket (never pickle, never JSON).

The ground station offers a shard (OFFER: names, sizes and sha256 of its files, and a signature of all that); the node answers what
it has of each (STATE: bytes, and the sha256 of just those bytes, so that what it resumes from is verified); chunks follow (CHUNK), each
acknowledged by what is written of its file (ACK); a shard that is whole, verified and loaded is reported (DONE), anything else refused
with a kind and a text (REFUSED). DROP takes a shard away (DROPPED). An update of the agent itself comes the same way, as one file
(OFFER_AGENT); it is STAGED when it is whole and verified, and DONE when it is offered again after it has proved good. Sizes are checked
before anything is allocated; a name cannot leave its folder. All integers little-endian.
Leaves out: sockets, windows and time (ground_station.delivery), disks (delivery_store.py), trust: that is the socket's CURVE key and, for
what an OFFER says, its signature (signature.py). DROP is not signed: it brings nothing, and the CURVE key is enough for that.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from node_agent.bundle_file import SIGNATURE_BYTES
from node_agent.frame import PRECISION_ID, PRECISIONS
from node_agent.shard import FileEntry, shard_stem

MAGIC = b"SMoD"
VERSION = 1
SIGNED_VERSION = 2  # of an OFFER that ends with a signature: an older node says that it is the older side
MAX_CHUNK_BYTES = 256 * 1024
MAX_FILES = 8
MAX_FILE_BYTES = 1 << 40
MAX_HIDDEN = 32_768
MAX_TEXT_BYTES = 512
FOLDER = "experts/"  # of a bundle; names on the wire are without it
PACKAGES = "packages/"  # the same of updates of the agent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

OFFER, STATE, CHUNK, ACK, DONE, REFUSED, DROP, DROPPED, OFFER_AGENT, STAGED = range(1, 11)

REFUSALS = (
    "malformed",
    "unknown",
    "other",
    "name",
    "memory",
    "disk",
    "hash",
    "load",
    "busy",
    "clash",
    "signature",
    "failed",
)
"""Kinds of REFUSED. 'unknown': of a transfer that the node does not know (it restarted), to be offered again; 'other': of another
bundle or hidden size; 'busy': it is computing just now; 'clash': another version of it is loaded (of older
nodes; now it is replaced); 'signature': it is not signed by one of the node's signers; 'failed': this update was
tried and did not become good."""

# magic, version, kind, index of the file or kind of refusal, transfer, offset, bytes of the body
_HEADER = struct.Struct("<4sBBHQQI")
HEADER_BYTES = _HEADER.size
MAX_FRAME_BYTES = HEADER_BYTES + MAX_CHUNK_BYTES
MAX_ANSWER_BYTES = HEADER_BYTES + 1024  # what a node sends
_WHICH = struct.Struct("<HHB")  # layer, expert, precision
_OFFER = struct.Struct("<HHBBIB")  # layer, expert, precision, files, hidden, bytes of the bundle's name
_FILE = struct.Struct("<Q32sB")  # bytes, sha256, bytes of the name
_AGENT = struct.Struct(f"<Q32s{SIGNATURE_BYTES}sB")  # bytes, sha256, signature, bytes of the name
_HAVE = struct.Struct("<Q32s")  # bytes that are there, their sha256


class DeliveryFrameError(ValueError):
    """A frame does not follow the contract. `transfer` is the frame's, or 0 where it could not be read."""

    def __init__(self, text: str, transfer: int = 0):
        super().__init__(text)
        self.transfer = transfer


@dataclass(frozen=True)
class Shard:
    """Which shard; `stem` such as 'L00E003.int8'."""

    layer: int
    expert: int
    precision: str

    @property
    def stem(self) -> str:
        return shard_stem(self.layer, self.expert, self.precision).removeprefix(FOLDER)


@dataclass(frozen=True)
class Offer:
    """`files[0]` is the ONNX graph, as in shard.ShardEntry; `hidden` is D, `bundle` the bundle's name.

    `signature` (signature.py) is of all of this; empty: it is not signed.
    """

    shard: Shard
    hidden: int
    bundle: str
    files: tuple[FileEntry, ...]
    signature: bytes = b""


@dataclass(frozen=True)
class AgentOffer:
    """An update of the agent itself, as one file; `signature` is of the other three (signature.update_statement)."""

    name: str
    bytes: int
    sha256: str
    signature: bytes

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return (FileEntry(f"{PACKAGES}{self.name}", self.bytes, self.sha256),)


@dataclass(frozen=True)
class Have:
    """What a node has of a file: its first `bytes`, and their sha256 (hex)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Message:
    """One frame. What is set beyond `kind` and `transfer` depends on the kind:

    OFFER `offer`; STATE `have` (one for each file); CHUNK `index`, `offset`, `body`; ACK `index`, `offset` (bytes of that file that
    are written); OFFER_AGENT `update`; REFUSED `refusal` (one of REFUSALS) and `text`; DROP `shard`.
    """

    kind: int
    transfer: int
    index: int = 0
    offset: int = 0
    body: bytes | memoryview = b""
    offer: Offer | None = None
    update: AgentOffer | None = None
    shard: Shard | None = None
    have: tuple[Have, ...] = ()
    refusal: str = ""
    text: str = ""


def _body(message: Message) -> bytes | memoryview:
    if message.kind == OFFER:
        return _pack_offer(message.offer)
    if message.kind == OFFER_AGENT:
        update, name = message.update, message.update.name.encode()
        return _AGENT.pack(update.bytes, bytes.fromhex(update.sha256), update.signature, len(name)) + name
    if message.kind == STATE:
        return b"".join(_HAVE.pack(have.bytes, bytes.fromhex(have.sha256)) for have in message.have)
    if message.kind == REFUSED:
        return message.text.encode()[:MAX_TEXT_BYTES]
    if message.kind == DROP:
        which = message.shard
        return _WHICH.pack(which.layer, which.expert, PRECISION_ID[which.precision])
    return message.body if message.kind == CHUNK else b""


def _pack_offer(offer: Offer) -> bytes:
    name, which = offer.bundle.encode()[:255], offer.shard
    parts = [
        _OFFER.pack(
            which.layer, which.expert, PRECISION_ID[which.precision], len(offer.files), offer.hidden, len(name)
        ),
        name,
    ]
    for file in offer.files:
        own = file.path.removeprefix(FOLDER).encode()
        parts += (_FILE.pack(file.bytes, bytes.fromhex(file.sha256), len(own)), own)
    if len(offer.signature) not in (0, SIGNATURE_BYTES):
        raise ValueError(f"a signature of {len(offer.signature)} bytes")
    return b"".join((*parts, offer.signature))


def pack(message: Message) -> bytes:
    """Bytes of a message.  Raises: DeliveryFrameError for one that is over a limit or holds what the contract cannot say."""
    index = REFUSALS.index(message.refusal) if message.kind == REFUSED else message.index
    try:
        body = _body(message)
        signed = message.kind == OFFER and message.offer.signature
        version = SIGNED_VERSION if signed else VERSION
        header = _HEADER.pack(MAGIC, version, message.kind, index, message.transfer, message.offset, len(body))
    except (struct.error, ValueError, KeyError, AttributeError) as error:
        raise DeliveryFrameError(f"kind {message.kind} cannot be sent: {error!r}", message.transfer) from None
    if len(body) > MAX_CHUNK_BYTES:
        raise DeliveryFrameError(f"a body of {len(body)} bytes is over {MAX_CHUNK_BYTES}", message.transfer)
    return header + body


def unpack(data: bytes | memoryview) -> Message:
    """The message in `data`; a CHUNK's body is a view of it.  Raises: DeliveryFrameError."""
    if not HEADER_BYTES <= len(data) <= MAX_FRAME_BYTES:
        raise DeliveryFrameError(f"{len(data)} bytes is outside {HEADER_BYTES}..{MAX_FRAME_BYTES}")
    magic, version, kind, index, transfer, offset, size = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DeliveryFrameError("not a frame of delivery")
    if version != VERSION and (version, kind) != (SIGNED_VERSION, OFFER):
        raise DeliveryFrameError(f"version {version}; this build speaks {VERSION}: update the older side", transfer)
    body = memoryview(data)[HEADER_BYTES:]
    if len(body) != size:
        raise DeliveryFrameError(f"the header says {size} bytes of body, there are {len(body)}", transfer)
    try:
        if kind == OFFER:
            return Message(kind, transfer, offer=_unpack_offer(body, version == SIGNED_VERSION))
        if kind == OFFER_AGENT:
            return Message(kind, transfer, update=_unpack_update(body))
        if kind == STATE:
            return Message(kind, transfer, have=_unpack_have(body))
        if kind == CHUNK and size and index < MAX_FILES and offset + size <= MAX_FILE_BYTES:
            return Message(kind, transfer, index, offset, body)
        if kind == ACK and not size and index < MAX_FILES and offset <= MAX_FILE_BYTES:
            return Message(kind, transfer, index, offset)
        if kind in (DONE, DROPPED, STAGED) and not size:
            return Message(kind, transfer)
        if kind == REFUSED and index < len(REFUSALS) and size <= MAX_TEXT_BYTES:
            return Message(kind, transfer, refusal=REFUSALS[index], text=bytes(body).decode("utf-8", "replace"))
        if kind == DROP:
            return Message(kind, transfer, shard=_which(*_WHICH.unpack(body)))
    except (struct.error, ValueError) as error:
        raise DeliveryFrameError(str(error)[:200], transfer) from None
    raise DeliveryFrameError(f"kind {kind} is unknown or holds what it may not", transfer)


def _which(layer: int, expert: int, precision: int) -> Shard:
    if precision >= len(PRECISIONS):
        raise ValueError(f"precision id {precision} is unknown")
    return Shard(layer, expert, PRECISIONS[precision])


def _unpack_have(body: memoryview) -> tuple[Have, ...]:
    if len(body) % _HAVE.size or not 0 < len(body) <= MAX_FILES * _HAVE.size:
        raise ValueError(f"{len(body)} bytes are no list of what a node has")
    return tuple(Have(count, digest.hex()) for count, digest in _HAVE.iter_unpack(body))


def _unpack_offer(body: memoryview, signed: bool) -> Offer:
    layer, expert, precision, count, hidden, name_bytes = _OFFER.unpack_from(body)
    which = _which(layer, expert, precision)
    if not 0 < count <= MAX_FILES or not 0 < hidden <= MAX_HIDDEN:
        raise ValueError(f"an offer of {count} files with D={hidden}")
    at = _OFFER.size + name_bytes
    bundle = bytes(body[_OFFER.size : at]).decode()
    files = []
    for _ in range(count):
        size, digest, name_bytes = _FILE.unpack_from(body, at)
        at += _FILE.size
        name = bytes(body[at : at + name_bytes]).decode()
        at += name_bytes
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:70]!r} is no name of a file in a bundle's {FOLDER[:-1]} folder")
        if not 0 < size <= MAX_FILE_BYTES:
            raise ValueError(f"{name} of {size} bytes")
        files.append(FileEntry(FOLDER + name, size, digest.hex()))
    if at + (SIGNATURE_BYTES if signed else 0) != len(body):
        raise ValueError("an offer's length is not what it says")
    _check_names(which.stem, files)
    return Offer(which, hidden, bundle, tuple(files), bytes(body[at:]))


def _unpack_update(body: memoryview) -> AgentOffer:
    size, digest, signed, name_bytes = _AGENT.unpack_from(body)
    name = bytes(body[_AGENT.size :]).decode()
    if len(body) != _AGENT.size + name_bytes or not NAME.fullmatch(name) or not 0 < size <= MAX_FILE_BYTES:
        raise ValueError(f"no update of the agent: {name[:70]!r} of {size} bytes")
    return AgentOffer(name, size, digest.hex(), signed)


def _check_names(stem: str, files: list[FileEntry]) -> None:
    names = [file.path.removeprefix(FOLDER) for file in files]
    if names[0] != f"{stem}.onnx" or len(set(names)) != len(names):
        raise ValueError(f"files {', '.join(names)[:120]!r} are not those of {stem}")
    for name in names:
        if not name.startswith(f"{stem}."):
            raise ValueError(f"{name!r} is no file of {stem}")
