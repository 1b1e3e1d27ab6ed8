"""What has to be written into a base image so that it comes up as a provision pack's node: read, checked and decided, nothing written.

Leaves out: how it is written (customize.py), the texts themselves (first_boot_files.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hardware import base_kinds, first_boot_files, image_source
from hardware.base_kinds import CLOUD_INIT, Base
from hardware.ext4_write import File, Item, Link
from hardware.first_boot_files import Wlan
from node_agent import enrolment, toml_file, wire

MAX_IMAGE_BYTES = 64 * 1024**3
MAX_PAYLOAD_FILES = 60_000
STATE = "/var/lib/spacemoe"
EXT4_PACK = "/boot/spacemoe"
"""Of a base that mounts no FAT partition: readable by root only, the token is taken from there as it is from a FAT."""


class CustomizeError(ValueError):
    """The image cannot be made of what was given; nothing was written. The text says what to give."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for. `host_name` None: the node's id."""

    board: str | None = None
    host_name: str | None = None
    network: Wlan | None = None
    ssh_key: str | None = None
    max_bytes: int = MAX_IMAGE_BYTES
    dry_run: bool = False


@dataclass(frozen=True)
class Pack:
    """A provision pack, checked as far as it matters here."""

    node: str
    board: str
    files: dict[str, bytes] = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"".join(self.files[name] for name in sorted(self.files))).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What goes where: files of the FAT partition, and files of the root file system as (bytes, mode)."""

    fat: dict[str, bytes] = field(repr=False)
    root: dict[str, tuple[bytes, int]] = field(repr=False)
    links: dict[str, str]
    folders: dict[str, int]
    notes: tuple[str, ...] = ()


def read_pack(folder: Path) -> Pack:
    """Raises: CustomizeError; OSError."""
    files = {}
    for name in (enrolment.CONFIG, enrolment.CA, enrolment.CLAIM):
        path = folder / name
        try:
            files[name] = image_source.read_small(path, enrolment.MAX_PACK_FILE_BYTES)
        except ValueError as error:
            raise CustomizeError(
                f"{error}; a pack is made by `spacemoe fleet add NODE --board BOARD --dir FLEET`"
            ) from None
    try:
        table = toml_file.loads(files[enrolment.CONFIG]).get("node", {})
        node, board = table.get("id"), table.get("board", "")
        wire.check_id(node)
    except (ValueError, AttributeError, TypeError) as error:
        raise CustomizeError(f"{folder / enrolment.CONFIG} names no node: {error}") from None
    if not enrolment.TOKEN.fullmatch(files[enrolment.CLAIM].decode("ascii", "replace").strip()):
        raise CustomizeError(
            f"{folder / enrolment.CLAIM} holds no claim token: make the pack anew by `spacemoe fleet add`"
        )
    return Pack(node, board if isinstance(board, str) else "", files)


def plan(base: Base, pack: Pack, settings: Settings, old: Callable[[str], bytes | None]) -> Plan:
    """What has to be written so that `base` comes up as the pack's node; `old` reads a file of the base by its path, FAT's as "fat:/...".

    Raises: CustomizeError, SettingError.
    """
    board = settings.board or pack.board
    if base.kind != "spacemoe" and board.startswith("jetson") != (base.kind == "jetson"):
        raise CustomizeError(
            f"{board or 'a node without a board'} does not boot from {base.kind} ({base.name}): take a base for that board"
        )
    mount = base.fat_mount
    pack_files = {f"/{enrolment.PACK_FOLDER}/{name}": data for name, data in pack.files.items()}
    if base.kind == "spacemoe":
        if settings.host_name or settings.network or settings.ssh_key:
            raise CustomizeError(
                "an image of `image build` takes the pack only: leave out --hostname, --wifi-* and --ssh-key"
            )
        return Plan(pack_files, {}, {}, {})
    host = first_boot_files.host_name(settings.host_name or pack.node.lower().replace("_", "-"))
    network, key = settings.network, settings.ssh_key
    fat, root, links, notes = {}, {}, {}, []
    folders = {STATE: 0o750}
    if mount is not None:
        fat |= pack_files
    else:
        folders[EXT4_PACK] = 0o700
        root |= {f"{EXT4_PACK}/{name}": (data, 0o600) for name, data in pack.files.items()}
        notes.append(f"the base mounts no FAT partition: the pack is in {EXT4_PACK}, for root only")
    if mount != "/boot/firmware":
        where = EXT4_PACK if mount is None else f"{mount}/{enrolment.PACK_FOLDER}"
        root[f"{base_kinds.FIRST_BOOT_UNIT}.d/pack.conf"] = (first_boot_files.pack_drop_in(where, mount), 0o644)
    if base.kind in CLOUD_INIT:
        fat["/user-data"] = first_boot_files.user_data(host, key)
        fat["/meta-data"] = first_boot_files.meta_data(pack.node, pack.sha256)
        if network is not None:
            fat["/network-config"] = first_boot_files.network_config(network)
    elif base.kind == "raspios-bookworm":
        fat["/firstrun.sh"] = first_boot_files.first_run(host, network, key, mount)
        fat["/cmdline.txt"] = first_boot_files.command_line(old("fat:/cmdline.txt") or b"", network, mount)
    else:
        root["/etc/hostname"] = (f"{host}\n".encode(), 0o644)
        root["/etc/hosts"] = (first_boot_files.hosts(old("/etc/hosts"), host), 0o644)
        if key is not None:
            folders["/root/.ssh"] = 0o700
            root["/root/.ssh/authorized_keys"] = (f"{key}\n".encode(), 0o600)
        if network is not None:
            root["/etc/modprobe.d/spacemoe-wlan.conf"] = (first_boot_files.regulatory_domain(network), 0o644)
            if base.kind == "jetson":
                path = "/etc/NetworkManager/system-connections/spacemoe-wlan.nmconnection"
                root[path] = (first_boot_files.nm_connection(network), 0o600)
            else:
                root["/etc/network/interfaces.d/spacemoe-wlan"] = (first_boot_files.interfaces(network), 0o600)
    if base.kind == "jetson":
        # the vendor's wizard waits for a screen and keeps multi-user.target, and so the agent, away
        links["/etc/systemd/system/default.target"] = "/lib/systemd/system/multi-user.target"
        links |= {
            f"/etc/systemd/system/{name}": "/dev/null"
            for name in ("nv-oem-config.service", "nv-oem-config-gui.service")
        }
        notes.append(
            "the vendor's first-boot wizard (nv-oem-config) is skipped: it would also have made a user and grown the root"
        )
    return Plan(fat, root, links, folders, tuple(notes))


def payload_items(tree: Path) -> list[Item]:
    """Every file and link of the payload.  Raises: CustomizeError for a tree without the first-boot unit."""
    items = tree_items(tree)
    if base_kinds.FIRST_BOOT_UNIT not in {item.path for item in items}:
        raise CustomizeError(f"the payload has no {base_kinds.FIRST_BOOT_UNIT}: delete the cache, build again")
    return items


def tree_items(tree: Path) -> list[Item]:
    """Every file and link below `tree`, with its mode, as root's.  Raises: CustomizeError when there are too many."""
    items: list[Item] = []
    for folder, folders, files in os.walk(tree):
        for name in [*files, *folders]:
            path = Path(folder) / name
            where = f"/{path.relative_to(tree).as_posix()}"
            if path.is_symlink():
                items.append(Link(where, os.readlink(path)))
            elif path.is_file():
                items.append(File(where, path, path.stat().st_mode & 0o755))
    if len(items) > MAX_PAYLOAD_FILES:
        raise CustomizeError(
            f"{len(items)} files would be written, more than {MAX_PAYLOAD_FILES}: delete the cache, build again"
        )
    return sorted(items, key=lambda item: item.path)


def brought_python(tree: Path) -> str:
    """The version ("3.13") of the standard library in `tree`.  Raises: CustomizeError for none or several."""
    found = [path.parent.name.removeprefix("python") for path in tree.glob("usr/lib/python3.*/ssl.py")]
    if len(found) != 1:
        raise CustomizeError(f"the packages for the base bring {len(found)} Pythons instead of one: take a newer image")
    return found[0]
