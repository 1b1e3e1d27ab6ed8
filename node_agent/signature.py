"""Signature contract: what a fleet's key signs of a bundle, and how a node finds a signature right (Ed25519).

`manifest.sig` is the raw signature (64 bytes) of manifest.json's bytes, for a bundle that is flashed as a whole:
    openssl pkeyutl -verify -rawin -pubin -inkey KEY -sigfile manifest.sig -in manifest.json
`shards.sig` holds one signature per shard, for shards that are sent one by one, over `shard_statement`: the bundle's name, D, the shard's
name and for each file its name, size and sha256, which is exactly what an OFFER says. An update of the agent itself is signed over
`update_statement`. The beginnings of the three differ, so that no signature can stand for another kind of content.
A signature says who made a shard, not when: that of an older version stays right, so a ground station can always go back to one.
DROP is not signed: the socket's CURVE key says that it is the ground station who takes a shard away.
Leaves out: signing and private keys (the ground station), sizes and sha256 of files (shard.py).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from node_agent.bundle_file import SHARD_SIGNATURES, SIGNATURE, SIGNATURE_BYTES
from node_agent.shard import MANIFEST, MAX_MANIFEST_BYTES, BundleError, FileEntry

MAX_SIGNERS = 16
MAX_SHARD_SIGNATURES_BYTES = 64 * 1024 * 1024
MAX_BUNDLE_NAME_BYTES = 255  # an OFFER's
FORMAT = "spacemoe-shard-signatures-1"
REMEDY = "sign the bundle with the key of this fleet (`spacemoe bundle sign BUNDLE --dir FLEET`)"
SIGNER = re.compile(r"[0-9a-f]{64}")
_SHARD = b"spacemoe-shard-1\n"
_UPDATE = b"spacemoe-agent-update-1\n"


class SignatureError(ValueError):
    """Something is not signed by one who may; the text names it and the next step."""


class Offered(Protocol):
    """What is signed of a shard; delivery_frame.Offer is one."""

    hidden: int
    bundle: str
    files: tuple[FileEntry, ...]
    signature: bytes


def check_signer(text: str) -> str:
    """An Ed25519 public key as 64 hex characters, in lower case.  Raises: SignatureError."""
    if not isinstance(text, str) or not SIGNER.fullmatch(text.lower()):
        raise SignatureError(f"{str(text)[:80]!r} is no signer: give an Ed25519 public key as 64 hex characters")
    return text.lower()


def _plain(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()


def shard_statement(bundle: str, hidden: int, stem: str, files: Iterable[FileEntry]) -> bytes:
    """What is signed of one shard: a line that says what it is, then JSON without spaces, ASCII only."""
    rows = [[file.path, file.bytes, file.sha256] for file in files]
    return _SHARD + _plain([bundle, hidden, stem, rows])


def update_statement(name: str, size_bytes: int, sha256: str) -> bytes:
    """What is signed of an update of the agent: its name, size and sha256."""
    return _UPDATE + _plain([name, size_bytes, sha256])


def is_signed(statement: bytes, signature: bytes, signers: Iterable[str]) -> bool:
    """Whether one of `signers` made the signature."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if len(signature) != SIGNATURE_BYTES:
        return False
    for signer in signers:
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer)).verify(signature, statement)
            return True
        except (InvalidSignature, ValueError):  # ValueError: 32 bytes that are no point of the curve
            continue
    return False


@dataclass(frozen=True)
class Trust:
    """Whose shards a node takes; without `signers` everybody's, which its configuration had to say in so many words."""

    signers: tuple[str, ...] = ()

    def check_shard(self, stem: str, offer: Offered) -> None:
        """Raises: SignatureError for a shard that none of the signers has signed as it is offered."""
        if not self.signers:
            return
        if not offer.signature:
            raise SignatureError(f"{stem} is not signed, and this node takes signed shards only: {REMEDY}")
        if not is_signed(shard_statement(offer.bundle, offer.hidden, stem, offer.files), offer.signature, self.signers):
            raise SignatureError(f"{stem} of {offer.bundle[:60]!r} has a wrong signature: {REMEDY}")

    def check_bundle(self, root: Path) -> None:
        """Of a bundle on this disk.  Raises: SignatureError, BundleError."""
        if self.signers and signed_by(root, self.signers) is None:
            raise SignatureError(
                f"{root / SIGNATURE} is no signature of {MANIFEST} by a signer of this node: "
                f"{REMEDY}, and copy both again"
            )


def _read(path: Path, limit: int) -> bytes:
    """Raises: SignatureError where there is no such plain file, BundleError for one that is too large."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise SignatureError(f"{path} is no plain file: sign the bundle by `spacemoe bundle sign`")
            data = file.read(limit + 1)
    except OSError as error:
        raise SignatureError(
            f"{path} cannot be read ({error.strerror}): sign the bundle by `spacemoe bundle sign`"
        ) from None
    if len(data) > limit:
        raise BundleError(f"{path} is over {limit} bytes: not of a bundle of ours")
    return data


def signed_by(root: Path, signers: Iterable[str]) -> str | None:
    """Which of `signers` signed the bundle's manifest as it is now; None: none.  Raises: SignatureError, BundleError."""
    signature = _read(root / SIGNATURE, SIGNATURE_BYTES)
    manifest = _read(root / MANIFEST, MAX_MANIFEST_BYTES)
    return next((signer for signer in signers if is_signed(manifest, signature, (signer,))), None)


@dataclass(frozen=True)
class ShardSignatures:
    """shards.sig: who signed, and one signature for each stem."""

    signer: str
    signatures: dict[str, bytes]

    def pack(self) -> bytes:
        shards = {stem: base64.b64encode(value).decode() for stem, value in sorted(self.signatures.items())}
        return json.dumps({"format": FORMAT, "signer": self.signer, "shards": shards}, indent=1).encode() + b"\n"


def read_shard_signatures(root: Path) -> ShardSignatures:
    """Raises: SignatureError where there are none or they cannot be read, BundleError."""
    path = root / SHARD_SIGNATURES
    data = _read(path, MAX_SHARD_SIGNATURES_BYTES)
    try:
        tree = json.loads(data)
        if tree["format"] != FORMAT:
            raise ValueError(f"format {str(tree['format'])[:40]!r}")
        signatures = {}
        for stem, text in tree["shards"].items():
            signatures[stem] = base64.b64decode(text, validate=True)
            if len(signatures[stem]) != SIGNATURE_BYTES:
                raise ValueError(f"{stem[:40]} has {len(signatures[stem])} bytes")
        return ShardSignatures(check_signer(tree["signer"]), signatures)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        raise SignatureError(f"{path} is damaged ({str(error)[:100]}): sign the bundle again") from None
