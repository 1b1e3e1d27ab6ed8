"""A node's own CURVE key for the data plane: read from its file, or made there.

Apart from the data plane, so that a board that enrols loads no inference runtime. Leaves out: sockets (dataplane.py).
"""

from __future__ import annotations

from pathlib import Path

import zmq

from node_agent import secret_file
from node_agent.config import Z85_PATTERN
from node_agent.errors import ConfigError


def own_key(path: Path) -> tuple[bytes, bytes]:
    """(public, secret) CURVE key of this node, Z85; made in `path` (readable by its owner alone) when there is none.

    Raises: ConfigError for a file that holds no key or that others may read.
    """
    try:
        mode = path.stat().st_mode
        secret = path.read_text().strip()
    except FileNotFoundError:
        public, made = zmq.curve_keypair()
        path.parent.mkdir(parents=True, exist_ok=True)
        secret_file.write(path, made + b"\n")
        return public, made
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"[data] secret_key_file {path} cannot be read ({error}): mend or remove it") from None
    if mode & 0o077:
        raise ConfigError(f"[data] secret_key_file {path} can be read by others: chmod 600 {path}")
    if not Z85_PATTERN.fullmatch(secret):
        raise ConfigError(
            f"[data] secret_key_file {path} holds no key of 40 characters: remove it and a new one is made"
        )
    return zmq.curve_public(secret.encode()), secret.encode()
