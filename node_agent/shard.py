"""Bundle contract: the manifest, and how a shard is written, read and verified.

A bundle is a folder (ARCHITECTURE in README): `manifest.json`, `trunk/`, `experts/`, `calibration.npz`, `tokenizer.json`,
`config.json`, `README.md`. A shard is one expert of one layer in one precision: a small ONNX graph (`x` float32 [T, D] ->
`y` float32 [T, D]) and its weights as ONNX external data beside it. Every file is listed with its size and sha256;
a half-written or altered file is refused by name. Files are written to a temporary name, flushed and renamed.
Leaves out: how graphs are built (quantize) and run (node_agent.experts, ground_station).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator

from node_agent import wire

FORMAT = "spacemoe-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
PARTIAL_SUFFIX = ".partial"
MAX_DIM = 1 << 24  # no size in a manifest is larger: it is checked before anything is allocated by it


class BundleError(ValueError):
    """A bundle or shard cannot be used; the text names the file and the next step."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle; `path` is relative, with '/' as separator."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """One expert of one layer in one precision. `files[0]` is the ONNX graph, the rest its external data.

    `rel_error`: ||y - y_fp32|| / ||y_fp32|| on calibration inputs; `ms` and `joules` per token are None until measured.
    """

    layer: int
    expert: int
    precision: str
    files: tuple[FileEntry, ...]
    rel_error: float | None = None
    ms: float | None = None
    joules: float | None = None

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.files)

    @property
    def sha256(self) -> str:
        """One digest for the whole shard: that of its files' digests in order."""
        return hashlib.sha256("".join(item.sha256 for item in self.files).encode()).hexdigest()


@dataclass(frozen=True)
class Segment:
    """A piece of the trunk between two MoE layers; `files[0]` is the ONNX graph.

    Segment 0 takes `input_ids` int64 [B, S]; the others `residual` and `moe_out` float32 [B, S, D]. Each attention layer l
    in `attention_layers` takes `past_key_l`, `past_value_l` float32 [B, KV, C, head] (fixed buffers of capacity C, also
    bound as `present_key_l`, `present_value_l`), and there are `seqlens_k` int32 [B] (valid length after this step, less 1) and
    `total_sequence_length` int32 [1]. Outputs: `residual_out` [B, S, D], `hidden` [B, S, D] (input of the experts) and
    `router_logits` [B, S, E] of MoE layer `moe_layer`; the last segment (`moe_layer` None) gives `logits` [B, S, V].
    """

    files: tuple[FileEntry, ...]
    attention_layers: tuple[int, ...]
    moe_layer: int | None


@dataclass(frozen=True)
class Dims:
    """Sizes of the model: D hidden, E experts per MoE layer, K experts per token, V vocabulary."""

    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int


@dataclass(frozen=True)
class Routing:
    """How gates follow from router logits. 'softmax_topk': softmax over all E, then the K largest, divided by their sum
    where `renormalise`; 'topk_softmax': the K largest logits, then softmax over them."""

    kind: str
    renormalise: bool


@dataclass(frozen=True)
class Manifest:
    """Everything that is in a bundle. `recipe` says in words and numbers how each precision was made."""

    name: str
    family: str
    base_model: str
    revision: str
    licence: str
    dims: Dims
    routing: Routing
    bos_id: int | None
    eos_ids: tuple[int, ...]
    moe_layers: tuple[int, ...]
    trunk_precision: str
    segments: tuple[Segment, ...]
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...]
    recipe: dict[str, str]
    created_at: str
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that every expert has, best first."""
        return tuple(sorted({shard.precision for shard in self.shards}, key=_PRECISION_ORDER.index))

    def shard(self, layer: int, expert: int, precision: str) -> ShardEntry:
        """Raises: BundleError when the bundle has no such shard."""
        for entry in self.shards:
            if (entry.layer, entry.expert, entry.precision) == (layer, expert, precision):
                return entry
        raise BundleError(
            f"bundle {self.name} has no {precision} shard of layer {layer} expert {expert}: it holds {', '.join(self.precisions)}"
        )


_PRECISION_ORDER = ["fp32", "int8", "int8dyn", "int4", "int2"]
ROUTING_KINDS = ("softmax_topk", "topk_softmax")


def shard_stem(layer: int, expert: int, precision: str) -> str:
    """Name of a shard's files below the bundle, without suffix (`.onnx` graph, `.bin` weights)."""
    return f"experts/L{layer:02d}E{expert:03d}.{precision}"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:  # Python 3.10 (JetPack 6) lacks hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def read_plain(path: Path, most_bytes: int) -> bytes:
    """All of a plain file; a pipe is not waited for.  Raises: OSError, BundleError for what is no plain file or larger."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{path} is no plain file: write or copy the bundle again")
        if found.st_size > most_bytes:
            raise BundleError(f"{path} is over {most_bytes} bytes: not a bundle of ours")
        return file.read(found.st_size)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that appears under `path` whole or not at all, also after a power cut.

    Raises: OSError, also when `path` is a device, pipe or folder: the rename would put a plain file in its place.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise FileExistsError(f"{path} is no plain file: name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(path)  # a write names no file
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_file(root: Path, relative: str, data: bytes) -> FileEntry:
    """Writes `data` atomically below a bundle's root and returns its entry for the manifest."""
    with atomic_file(root / relative) as file:
        file.write(data)
    return FileEntry(relative, len(data), hashlib.sha256(data).hexdigest())


def verify_file(root: Path, entry: FileEntry) -> Path:
    """The file's path, once its size and sha256 are what the manifest says.  Raises: BundleError."""
    path = root / entry.path
    if ".." in Path(entry.path).parts or Path(entry.path).is_absolute():
        raise BundleError(f"{entry.path!r} points outside the bundle: do not use this bundle")
    try:
        found = path.stat()
    except OSError:
        raise BundleError(f"{path} is missing: write or copy the bundle again") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise BundleError(f"{path} is no plain file: write or copy the bundle again")
    size = found.st_size
    if size != entry.bytes:
        what = "it is cut short" if size < entry.bytes else "it is not the file that was listed"
        raise BundleError(f"{path} has {size} bytes, the manifest says {entry.bytes}: {what}; copy it again")
    if sha256_of(path) != entry.sha256:
        raise BundleError(f"{path} is altered (sha256 differs from the manifest): copy it again")
    return path


def write_manifest(root: Path, manifest: Manifest) -> None:
    with atomic_file(root / MANIFEST) as file:
        file.write(json.dumps(dataclasses.asdict(manifest), indent=1, allow_nan=False).encode() + b"\n")


def read_manifest(root: Path) -> Manifest:
    """Raises: BundleError when there is none, it is not readable, or a newer version wrote it."""
    path = root / MANIFEST
    try:
        tree = json.loads(read_plain(path, MAX_MANIFEST_BYTES))
    except BundleError:
        raise
    except OSError:
        raise BundleError(
            f"{root} is no bundle (no readable {MANIFEST}): make one by `spacemoe quantize MODEL -o BUNDLE`"
        ) from None
    except (ValueError, RecursionError):
        raise BundleError(f"{path} is not JSON: write or copy the bundle again") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise BundleError(f"{path} is not of format {FORMAT}: give the folder that `spacemoe quantize` wrote")
    version = tree.get("format_version")
    if isinstance(version, int) and version < 1:
        raise BundleError(f"{path} is damaged (format version {version}): write or copy the bundle again")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}, this build reads up to {FORMAT_VERSION}: update spacemoe-kit"
        )
    try:
        manifest = wire.build(Manifest, tree)
        _check_sense(manifest)
        return manifest
    except wire.WireError as error:
        raise BundleError(f"{path} is damaged ({error}): write or copy the bundle again") from None


def _check_sense(manifest: Manifest) -> None:
    """Sizes and references that no writer of bundles makes: found here, they are one line instead of a crash far away.

    Raises: wire.WireError.
    """

    def must(holds: bool, text: str) -> None:
        if not holds:
            raise wire.WireError(text)

    dims = manifest.dims
    for name, size in vars(dims).items():
        must(0 < size <= MAX_DIM, f"dims.{name} is {size}, outside 1..{MAX_DIM}")
    must(dims.top_k <= dims.experts, f"top-{dims.top_k} of {dims.experts} experts")
    must(manifest.routing.kind in ROUTING_KINDS, f"routing {manifest.routing.kind[:40]!r} is unknown")
    for token in (*manifest.eos_ids, *(() if manifest.bos_id is None else (manifest.bos_id,))):
        must(0 <= token < dims.vocab, f"token {token} is outside the vocabulary of {dims.vocab}")
    must(len({*manifest.moe_layers}) == len(manifest.moe_layers), "a MoE layer is listed twice")
    seen = set()
    for entry in manifest.shards:
        key = (entry.layer, entry.expert, entry.precision)
        must(
            key not in seen,
            f"the {entry.precision[:40]} shard of layer {entry.layer} expert {entry.expert} is there twice",
        )
        seen.add(key)
        must(entry.precision in _PRECISION_ORDER, f"precision {entry.precision[:40]!r} is unknown")
        must(
            entry.layer in manifest.moe_layers and 0 <= entry.expert < dims.experts,
            f"there is a shard of layer {entry.layer} expert {entry.expert}, which the model has not",
        )
    for piece in (*manifest.segments, *manifest.shards):
        must(bool(piece.files), "a trunk segment or shard has no files")
    for entry in (*manifest.files, *(item for piece in (*manifest.segments, *manifest.shards) for item in piece.files)):
        must("\0" not in entry.path and entry.path != "", f"{entry.path[:40]!r} is no path")
        must(entry.bytes >= 0, f"{entry.path[:40]} has {entry.bytes} bytes")
