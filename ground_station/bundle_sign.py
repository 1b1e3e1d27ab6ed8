"""Signs a bundle with a fleet's key and checks whose signature it carries: manifest.sig and shards.sig (node_agent.signature).

What is signed is read and verified first: nobody signs a file that is not as the manifest says. A change of the bundle makes the
signature of its manifest wrong, never that of a shard whose files stay as they are.
Leaves out: where a fleet keeps its key (fleet_records.py), what nodes do with signatures (node_agent.delivery, experts).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from node_agent import bundle_file, shard, signature
from node_agent.delivery_frame import FOLDER, Shard
from node_agent.signature import SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_KEY_BYTES = 16 * 1024


class SigningKeyError(ValueError):
    """A private key cannot be used; the text names its file, never what is in it."""


@dataclass(frozen=True)
class Signed:
    """`signer`: public key, 64 hex characters."""

    signer: str
    shards: int


def load_key(path: Path) -> Ed25519PrivateKey:
    """A private Ed25519 key in PEM, in a plain file that nobody but its owner may read.  Raises: SigningKeyError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise SigningKeyError(f"{path} is no plain file: give a private key in PEM")
            if found.st_mode & 0o077:
                raise SigningKeyError(f"{path} can be read or written by others: chmod 600 {path}")
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise SigningKeyError(f"{path} cannot be read ({error.strerror}): give a private key in PEM") from None
    try:
        key = load_pem_private_key(data[:MAX_KEY_BYTES], None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        raise SigningKeyError(
            f"{path} is no private key in PEM without a password: make one by `openssl genpkey -algorithm ed25519`"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyError(f"{path} is no Ed25519 key: make one by `openssl genpkey -algorithm ed25519`")
    return key


def signer_of(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def _stem(entry: shard.ShardEntry) -> str:
    return Shard(entry.layer, entry.expert, entry.precision).stem


def sign(root: Path, key: Ed25519PrivateKey) -> Signed:
    """Writes manifest.sig and shards.sig.  Raises: shard.BundleError for a file that is not as the manifest says, OSError."""
    with bundle_file.alone(root):
        manifest = shard.read_manifest(root)
        data = shard.read_plain(root / shard.MANIFEST, shard.MAX_MANIFEST_BYTES)
        if len(manifest.name.encode()) > signature.MAX_BUNDLE_NAME_BYTES:
            raise shard.BundleError(
                f"the bundle's name {manifest.name[:40]!r}... has over {signature.MAX_BUNDLE_NAME_BYTES} bytes: quantize it again"
            )
        for entry in files_of(manifest):
            shard.verify_file(root, entry)
        signatures = {}
        for entry in manifest.shards:
            statement = signature.shard_statement(manifest.name, manifest.dims.hidden, _stem(entry), entry.files)
            signatures[_stem(entry)] = key.sign(statement)
        signer = signer_of(key)
        with shard.atomic_file(root / bundle_file.SHARD_SIGNATURES) as file:
            file.write(signature.ShardSignatures(signer, signatures).pack())
        with shard.atomic_file(root / bundle_file.SIGNATURE) as file:
            file.write(key.sign(data))
    return Signed(signer, len(signatures))


def files_of(manifest: shard.Manifest) -> list[shard.FileEntry]:
    """Every file that a manifest lists."""
    pieces = (*manifest.segments, *manifest.shards)
    return [*manifest.files, *(entry for piece in pieces for entry in piece.files)]


def problems(root: Path, manifest: shard.Manifest, signers: tuple[str, ...]) -> list[str]:
    """What is not signed by one of `signers`, in words; files themselves are verified elsewhere."""
    found = []
    try:
        if signature.signed_by(root, signers) is None:
            found.append(
                f"{bundle_file.SIGNATURE} is no signature of {shard.MANIFEST} by that signer: sign the bundle again"
            )
    except SignatureError as error:
        found.append(str(error))
    try:
        signatures = signature.read_shard_signatures(root).signatures
    except SignatureError as error:
        return [*found, str(error)]
    for entry in manifest.shards:
        stem = _stem(entry)
        statement = signature.shard_statement(manifest.name, manifest.dims.hidden, stem, entry.files)
        if stem not in signatures:
            found.append(f"{FOLDER}{stem} has no signature: sign the bundle again")
        elif not signature.is_signed(statement, signatures[stem], signers):
            found.append(f"{FOLDER}{stem} has a wrong signature: sign the bundle again")
    return found


def words(root: Path, manifest: shard.Manifest) -> tuple[str, str]:
    """(signer or "", in words) of a bundle: who signed it and whether the signature is of what is there now."""
    if not any((root / name).exists() for name in (bundle_file.SIGNATURE, bundle_file.SHARD_SIGNATURES)):
        return "", "not signed"
    try:
        signer = signature.read_shard_signatures(root).signer
    except (SignatureError, shard.BundleError) as error:
        return "", f"signed, by whom is not known: {error}"
    wrong = problems(root, manifest, (signer,))
    if wrong:
        return signer, f"signed by {signer}, but {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else "")
    return signer, f"signed by {signer}"
