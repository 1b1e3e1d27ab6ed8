"""Writes a provision pack: the folder that goes onto a board's card, with all that it needs to claim its certificate.

It holds the agent's configuration, the authority's certificate and the one-time claim token, and no private key: those are made on
the board and stay there. Leaves out: what the board does with it (node_agent), the card (`spacemoe flash`, `spacemoe image`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from ground_station import fleet_records
from ground_station.fleet_records import FleetFolder, FleetFolderError, NodeRecord
from node_agent import enrolment
from node_agent.shard import atomic_file

STATE_DIR = "/var/lib/spacemoe"
PACKS = "packs"
"""Where packs go below the fleet folder unless told otherwise."""


def configuration(folder: FleetFolder, record: NodeRecord, provisioned_utc_s: int) -> str:
    """The pack's spacemoe.toml.  Raises: FleetFolderError."""
    info = folder.info
    host = info.hosts[0]
    at = f"[{host}]" if ":" in host else host
    tables = {
        "node": {"id": record.id, "fleet": info.fleet, "board": record.board, "state_dir": STATE_DIR},
        "bundle": {"signers": [folder.signer()]},
        "broker": {
            "host": host,
            "port": info.ports.broker,
            "ca": enrolment.CA,
            "cert": enrolment.CERT,
            "key": enrolment.KEY,
        },
        "data": {
            "endpoint": f"tcp://{at}:{info.ports.data}",
            "delivery_endpoint": f"tcp://{at}:{info.ports.delivery}",
            "server_public_key": folder.curve_keys()[0].decode(),
            "secret_key_file": enrolment.CURVE_KEY,
        },
        "enrol": {
            "url": f"https://{at}:{info.ports.enrol}",
            "ca": enrolment.CA,
            "token_file": enrolment.CLAIM,
            "provisioned_utc_s": provisioned_utc_s,
        },
    }
    lines = [
        f"# Provision pack of node {record.id}, fleet {info.fleet}. Relative paths are relative to this file's folder."
    ]
    for name, table in tables.items():
        # JSON's strings, lists and whole numbers are TOML's too
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def check_place(out: Path, node: str) -> None:
    """Raises: FleetFolderError where no pack of `node` can be written below `out`; asked before its token is made."""
    for path in (out, out / node, *((out / node / name) for name in (enrolment.CONFIG, enrolment.CA, enrolment.CLAIM))):
        kind = Path.is_file if path.parent.name == node and path.parent.parent == out else Path.is_dir
        if os.path.lexists(path) and (path.is_symlink() or not kind(path)):
            raise FleetFolderError(f"{path} is in the way of the pack: move it away or give another --out")


def write_pack(folder: FleetFolder, record: NodeRecord, token: str, out: Path) -> Path:
    """The pack's folder OUT/NODE, for its owner alone. Writes over an older pack of the node.  Raises: FleetFolderError, OSError."""
    check_place(out, record.id)
    pack = out / record.id
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    pack.mkdir(exist_ok=True, mode=0o700)
    pack.chmod(0o700)
    # an older pack's token is dead: it must not lie beside the new configuration if the power fails now
    for name in (enrolment.CLAIM, enrolment.FLASHED):  # and the new one has been on no card yet
        with contextlib.suppress(FileNotFoundError):
            (pack / name).unlink()
    text = configuration(folder, record, int(time.time()))
    for name, data, mode in (
        (enrolment.CONFIG, text.encode(), 0o644),
        (enrolment.CA, folder.read(fleet_records.CA_CERT), 0o644),
        (enrolment.CLAIM, token.encode() + b"\n", 0o600),
    ):
        with atomic_file(pack / name) as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
    return pack


def remove_pack(out: Path, node: str) -> str:
    """Removes the pack OUT/NODE of a node that is revoked, whose claim is worth nothing; what is of no pack stays there.

    The claim goes first. '' when it is gone or was never there, else why it could not be removed.
    """
    pack = out / node
    if pack.is_symlink():
        return f"{pack} is a link: remove what it points to by hand"
    try:
        for name in (enrolment.CLAIM, enrolment.CONFIG, enrolment.CA, enrolment.FLASHED):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (pack / name).unlink()
        if pack.is_dir() and not os.listdir(pack):
            pack.rmdir()
    except OSError as error:
        return f"{pack} ({error.strerror}): remove it by hand"
    return ""
