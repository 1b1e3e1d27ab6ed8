"""The doctor's look at what is kept on disk: bundles, the fleet's folder with its keys and certificates, the archive.

Leaves out the hashes of a bundle (`spacemoe bundle verify`) and a large archive's every page (`spacemoe archive check`).
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

from ground_station.doctor import Check

QUICK_BYTES = 200_000_000  # an archive up to this size is read whole
WARN_DAYS = 7.0  # a ground station that is up renews its certificate long before


def reference() -> Iterator[Check]:
    from ground_station.cli_shared import reference_bundle
    from ground_station.doctor_machine import is_clone, root

    path = reference_bundle()
    if not path.is_dir() and not is_clone():
        yield Check("reference_bundle", True, "an installed wheel holds no model: give --bundle DIR")
        return
    yield _bundle("reference_bundle", path, f"git -C {shlex.quote(str(root()))} checkout -- quantize/reference/bundle")


def bundle(path: Path | None) -> Iterator[Check]:
    if path is not None:
        yield _bundle("bundle", path, f"spacemoe quantize MODEL -o {shlex.quote(str(path))}")


def _bundle(name: str, path: Path, make: str) -> Check:
    """There, its manifest readable, each file of the right size; and what its signature says."""
    from ground_station import bundle_sign
    from node_agent import shard

    if not path.is_dir():
        return Check(name, False, f"there is no bundle at {path}", make)
    try:
        manifest = shard.read_manifest(path)
    except (shard.BundleError, OSError) as error:
        return Check(name, False, str(error), make)
    wrong = []
    for entry in bundle_sign.files_of(manifest):
        try:
            size = (path / entry.path).stat().st_size
        except OSError:
            wrong.append(f"{entry.path} is missing")
            continue
        if size != entry.bytes:
            wrong.append(f"{entry.path} has {size} bytes and not {entry.bytes}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return Check(name, False, f"{path}: {wrong[0]}{more}", make)
    _, signed = bundle_sign.words(path, manifest)
    if ", but " in signed or "not known" in signed:
        return Check(name, False, f"{path} is {signed}", f"spacemoe bundle sign {shlex.quote(str(path))} --dir FLEET")
    return Check(name, True, f"{path}: {manifest.name}, {len(manifest.shards)} shards, {signed}")


def fleet(path: Path | None, now_utc_s: float) -> Iterator[Check]:
    """The folder, who may read its keys, and what expires."""
    if path is None:
        return
    from ground_station import fleet_authority, fleet_changes, fleet_records

    shown = shlex.quote(str(path))
    if not path.is_dir():
        yield Check(
            "fleet", False, f"there is no fleet at {path}", f"spacemoe fleet init NAME --host HOST --dir {shown}"
        )
        return
    open_to_all = _open_to_others(path, fleet_records.SECRETS)
    if open_to_all:
        text = f"others can read or write {', '.join(open_to_all)}"
        yield Check("fleet_keys", False, text, f"chmod -R go= {shown}")
    else:
        yield Check("fleet_keys", True, "the keys are for their owner alone")
    try:
        folder = fleet_records.FleetFolder.open(path)
        ends = {
            name: fleet_authority.certificate_of(folder, name)
            for name in (fleet_records.CA_CERT, fleet_records.GROUND_CERT)
        }
        standings = fleet_changes.standings(folder, now_utc_s)
    except (ValueError, OSError) as error:
        yield Check("fleet", False, str(error), f"cp -a BACKUP/. {shown}/   # the backup of the fleet's folder")
        return
    yield Check(
        "fleet", True, f"fleet {folder.info.fleet}, {len(standings)} nodes, hosts {', '.join(folder.info.hosts)}"
    )
    yield from _certificates(ends, now_utc_s, shown, fleet_records.CA_CERT)
    late = [each for each in standings if each.warning]
    if late:
        more = f" (and {len(late) - 1} more)" if len(late) > 1 else ""
        text, first = f"{late[0].id}: {late[0].warning}{more}", late[0]
        fix = f"spacemoe fleet add {first.id} --board {first.board} --again --dir {shown}   # and flash it again"
        yield Check("fleet_nodes", False, text, fix)
    elif standings:
        yield Check("fleet_nodes", True, "no node's certificate or claim token is near its end")


def _open_to_others(path: Path, keys: tuple[str, ...]) -> list[str]:
    found = []
    for each in (path, *(path / key for key in keys)):
        try:
            facts = each.stat()
        except OSError:
            continue  # a file that is missing is named by whoever opens the folder
        if stat.S_IMODE(facts.st_mode) & 0o077 or (os.geteuid() not in (0, facts.st_uid)):
            found.append(each.name)
    return found


def _certificates(ends, now_utc_s: float, shown: str, ca: str) -> Iterator[Check]:
    for name, certificate in ends.items():
        check = "fleet_authority" if name == ca else "fleet_certificate"
        begins, until = (
            when.timestamp() for when in (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        )
        days = (until - now_utc_s) / 86_400.0
        whose = "the authority's" if name == ca else "the ground station's"
        renew = f"spacemoe fleet renew-ground --dir {shown}"
        if name == ca:
            renew = f"spacemoe fleet init NAME --host HOST --dir NEW   # an authority lasts as long as its fleet: {shown} ends"
        if begins > now_utc_s:
            text = f"{whose} certificate begins {(begins - now_utc_s) / 86_400.0:.1f} days from now: the clock is wrong"
            yield Check(check, False, text, "sudo timedatectl set-ntp true")
        elif days < WARN_DAYS:
            ended = f"ended {-days:.0f} days ago" if days < 0 else f"ends in {days:.1f} days"
            yield Check(check, False, f"{whose} certificate {ended}", renew)
        else:
            yield Check(check, True, f"{whose} certificate is good for {days:.0f} days")


def archive(state: Path) -> Iterator[Check]:
    """The archive in the state's folder, where there is one."""
    from ground_station import archive_schema
    from ground_station.archive_records import ArchiveError

    file = archive_schema.file_of(state)
    if not file.exists():
        return
    shown = shlex.quote(str(file))
    mend = f"mv {shown} {shown}.damaged && sqlite3 {shown}.damaged .recover | sqlite3 {shown}"
    try:
        size = file.stat().st_size
        db = archive_schema.open_to_read(file)
        try:
            found = [] if size > QUICK_BYTES else [row[0] for row in db.execute("PRAGMA quick_check(3)")]
        finally:
            db.close()
    except (ArchiveError, sqlite3.Error, OSError) as error:
        yield Check("archive", False, str(error), mend)
        return
    if found and found != ["ok"]:
        yield Check("archive", False, f"{file} is damaged: {str(found[0])[:200]}", mend)
        return
    whole = f"; it was not read whole: spacemoe archive check {shown}" if size > QUICK_BYTES else ""
    yield Check("archive", True, f"{file}, {size / 1e6:.1f} MB, is sound{whole}")
