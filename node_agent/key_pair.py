"""A certificate and its private key, two files that change as one.

A new key waits in `<key>.next` while its certificate is asked for. The rename that puts the new certificate in place is the
moment of change: should the power fail before the key has followed, `settle` lets it follow, since the certificate says which
of the two keys it belongs to. So a crash leaves the old pair or the new one. Needs no cryptography package: it runs at every start.
Leaves out: how keys and certificates are made (enrol.py).
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from node_agent import secret_file


def next_key(key: Path) -> Path:
    """Where the key waits that is to follow `key`."""
    return key.with_name(key.name + ".next")


def matches(cert: Path, key: Path) -> bool:
    """True where both files are there and the certificate is of that key."""
    if not (cert.is_file() and key.is_file()):  # OpenSSL would wait for ever on a pipe
        return False
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError):  # ssl.SSLError is an OSError
        return False
    return True


def _no_password() -> bytes:
    raise ValueError("the key is encrypted")  # else OpenSSL would ask on the terminal


def settle(cert: Path, key: Path) -> bool:
    """Finishes a change that was cut short; True where there was one. May run in several processes at once."""
    waiting = next_key(key)
    if not matches(cert, waiting):
        return False
    try:
        os.replace(waiting, key)
    except FileNotFoundError:  # another process was quicker
        return False
    secret_file.sync_folder(key.parent)
    return True


def store(cert: Path, key: Path, certificate: bytes) -> None:
    """Puts a certificate in place, and after it the key it belongs to, if that one is waiting."""
    secret_file.write(cert, certificate, secret_file.PUBLIC)
    settle(cert, key)
