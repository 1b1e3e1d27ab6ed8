"""The archive when things go wrong: a kill, a full disk, a disk that keeps waiting, threads, and files that are not to be used."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from archive_rig import NOW_UTC_S, event, taken, telemetry_of

from ground_station import archive, archive_schema
from ground_station.archive import Archive
from ground_station.archive_read import ArchiveReader
from ground_station.archive_records import ArchiveBusy, ArchiveDamaged, ArchiveError, Retention

RIG = Path(__file__).with_name("archive_rig.py")

# ---------------------------------------------------------------- a kill, a full disk, a disk that does not answer


def killed_writer(folder: Path, *more: str) -> tuple[list[tuple[int, float]], float]:
    """(number, monotonic s) of what a writer had handed over when it was killed, and when that was."""
    writer = subprocess.Popen([sys.executable, str(RIG), str(folder), *more], stdout=subprocess.PIPE, text=True)
    printed = []
    try:
        for line in writer.stdout:
            number, at_s = line.split()
            printed.append((int(number), float(at_s)))
            if len(printed) == 517:
                break
    finally:
        killed_s = time.monotonic()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    return printed, killed_s


@pytest.mark.alone
def test_kill_9_loses_at_most_the_last_second(tmp_path):
    printed, killed_s = killed_writer(tmp_path / "killed")
    assert len(printed) == 517
    before = {number for number, at_s in printed if at_s < killed_s - 1.0}
    assert len(before) > 100
    with ArchiveReader(tmp_path / "killed") as reader:
        there = [one.telemetry.number for one in telemetry_of(reader)]
    assert before <= set(there), f"{len(before - set(there))} older than a second are lost"
    assert there == list(range(1, len(there) + 1))
    assert archive_schema.damage(tmp_path / "killed" / archive_schema.FILE) == []
    # the next ground station goes on in the same file
    with Archive(tmp_path / "killed") as kept:
        kept.telemetry("n1", taken("n1", len(there) + 1, [1.0], time.time()))
    with ArchiveReader(tmp_path / "killed") as reader:
        assert len(telemetry_of(reader)) == len(there) + 1
    # control: one that commits every 60 s loses what this one keeps
    killed_writer(tmp_path / "control", "60")
    with ArchiveReader(tmp_path / "control") as reader:
        assert not before & {one.telemetry.number for one in telemetry_of(reader)}


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from archive_rig import NOW_UTC_S, taken
from ground_station.archive import Archive
from ground_station.archive_read import ArchiveReader

said = []
with Archive(Path(sys.argv[1]), say=said.append) as kept:
    kept.telemetry("n1", taken("n1", 1, [1.0] * 30, NOW_UTC_S))
    kept.flush()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    for number in range(2, 1502):
        kept.telemetry("n1", taken("n1", number, [1.0] * 30, NOW_UTC_S + number))
    filled = kept.flush(2.5)
    during = kept.counts
    with ArchiveReader(Path(sys.argv[1])) as reader:
        readable = reader.summary()["telemetry"]["rows"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    again = kept.flush(20.0)
    after = kept.counts
print(json.dumps([said, filled, during.queued, during.failures, during.trouble, readable, again, after.queued, after.trouble]))
"""


def test_a_full_disk_is_said_once_and_tried_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        **{"capture_output": True, "text": True, "timeout": 60, "cwd": RIG.parent},
    )
    assert done.returncode == 0, done.stderr
    said, filled, queued, failures, trouble, readable, again, left, after = json.loads(done.stdout)
    assert not filled and queued == 1500 and failures >= 2 and "free space" in trouble and readable == 1
    assert again and left == 0 and after is None
    assert len(said) == 2 and "free space on its disk; what comes is queued" in said[0] and "written again" in said[1]
    with ArchiveReader(tmp_path) as reader:
        assert [one.telemetry.number for one in telemetry_of(reader)] == list(range(1, 1502))


def test_what_finds_no_room_is_counted_by_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "QUEUE_BYTES", 100_000)

    def say(text):
        raise RuntimeError("one who listens badly")

    with Archive(tmp_path, say=say) as kept:
        other = sqlite3.connect(tmp_path / archive_schema.FILE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # somebody else's transaction keeps the writer waiting
        for number in range(500):
            kept.telemetry("n1", taken("n1", number + 1, [1.0] * 30, NOW_UTC_S + number))
        for place in range(10):
            kept.event(event("n1", NOW_UTC_S, "x" * 50_000), NOW_UTC_S + place)
        assert not kept.flush(0.1)
        dropped = kept.counts.dropped
        assert dropped["event"] == 10 and 300 < dropped["telemetry"] < 500
        assert kept.counts.queued + dropped["telemetry"] == 500
        other.execute("ROLLBACK")
        other.close()
        assert kept.flush(20.0)
        assert kept.counts.written["telemetry"] + dropped["telemetry"] == 500
        kept.event(event("n1", NOW_UTC_S, "room again"), NOW_UTC_S)
        assert kept.flush() and kept.counts.written["event"] == 1
    with ArchiveReader(tmp_path) as reader:
        assert len(telemetry_of(reader)) == 500 - dropped["telemetry"]


def test_many_threads_hand_over_and_others_read_meanwhile(tmp_path):
    with Archive(tmp_path, Retention(None)) as kept, ArchiveReader(tmp_path) as reader:
        stop, wrong, reads = threading.Event(), [], []

        def write(node: str) -> None:
            for number in range(1, 801):
                kept.telemetry(node, taken(node, number, [float(number), 1.0], NOW_UTC_S + number))
                if number % 100 == 0:
                    time.sleep(0.05)

        def read() -> None:
            try:
                while not stop.is_set():
                    for node in ("n0", "n1", "n2"):
                        there = reader.trend(node, "s0", NOW_UTC_S, NOW_UTC_S + 1000, 2000)
                        values = [] if there is None else [value for value in there.last if value is not None]
                        assert values == [float(number) for number in range(1, len(values) + 1)]
                        reads.append(len(values))
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=write, args=(f"n{place}",)) for place in range(3)]
        readers = [threading.Thread(target=read) for _ in range(3)]
        for thread in (*threads, *readers):
            thread.start()
        for thread in threads:
            thread.join()
        assert kept.flush()
        code = (
            "import sys; from pathlib import Path; from ground_station.archive_read import ArchiveReader; "
            "print(len(list(ArchiveReader(Path(sys.argv[1])).messages())))"
        )
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
        stop.set()
        for thread in readers:
            thread.join()
    assert wrong == [] and other.stdout.strip() == "2400", other.stderr
    assert reads


# ---------------------------------------------------------------- files that are not to be used


def test_one_archive_has_one_writer(tmp_path):
    with Archive(tmp_path):
        with pytest.raises(ArchiveBusy, match="another ground station: stop it"):
            Archive(tmp_path)
    with Archive(tmp_path):
        pass


def filled(folder: Path, messages: int = 3000) -> Path:
    with Archive(folder, Retention(None)) as kept:
        for number in range(messages):
            kept.telemetry("n1", taken("n1", number + 1, [float(number)] * 30, NOW_UTC_S + number))
        kept.event(event("n1", NOW_UTC_S, "x"), NOW_UTC_S)
    return folder / archive_schema.FILE


def test_a_newer_archive_is_refused_by_name(tmp_path):
    file = filled(tmp_path, 3)
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    before = file.read_bytes()
    for opened in (Archive, ArchiveReader):
        with pytest.raises(
            ArchiveError, match="schema 2, written by a newer spacemoe .*: update spacemoe-kit"
        ) as caught:
            opened(tmp_path)
        assert str(file) in str(caught.value) and not isinstance(caught.value, ArchiveDamaged)
    assert file.read_bytes() == before


def test_what_is_no_archive_is_left_as_it_is(tmp_path):
    file = tmp_path / archive_schema.FILE
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    for content, error, text in (
        (file.read_bytes(), ArchiveError, "something else"),
        (b"no database at all, " * 500, ArchiveDamaged, "not a database.*move it away"),
    ):
        file.write_bytes(content)
        for opened in (Archive, ArchiveReader):
            with pytest.raises(error, match=text):
                opened(tmp_path)
        assert file.read_bytes() == content
        assert sorted(each.name for each in tmp_path.iterdir()) == ["archive.lock", "archive.sqlite"]
    with pytest.raises(ArchiveError, match="is not there"):
        ArchiveReader(tmp_path / "nowhere")


def test_an_archive_that_was_only_begun_is_taken_up(tmp_path):
    file = tmp_path / archive_schema.FILE
    db = sqlite3.connect(file)
    db.execute("PRAGMA journal_mode = WAL")
    db.close()
    assert file.stat().st_size > 0
    with pytest.raises(ArchiveError, match="holds nothing yet: start the ground station"):
        ArchiveReader(tmp_path)
    filled(tmp_path, 3)
    with ArchiveReader(tmp_path) as reader:
        assert len(telemetry_of(reader)) == 3
        assert reader.page("PRAGMA auto_vacuum") == [(2,)]


@pytest.mark.parametrize("damage", ["flipped", "cut", "head"])
def test_damage_is_named_and_nothing_is_deleted(tmp_path, damage):
    file = filled(tmp_path)
    whole = bytearray(file.read_bytes())
    assert archive_schema.damage(file) == []  # control
    middle = len(whole) // 2
    if damage == "flipped":
        for place in range(middle - 100_000, middle + 100_000):
            whole[place] ^= 0xFF
    elif damage == "cut":
        del whole[middle:]
    else:
        whole[100:4096] = os.urandom(3996)
    file.write_bytes(whole)
    with pytest.raises(ArchiveDamaged, match="is damaged .*move it away") as caught:
        with ArchiveReader(tmp_path) as reader:
            list(reader.messages())
            reader.trend("n1", "s3", NOW_UTC_S, NOW_UTC_S + 5000)
    assert str(file) in str(caught.value)
    try:
        found = archive_schema.damage(file)
    except ArchiveError as error:
        found = [str(error)]
    assert found
    assert file.read_bytes() == whole
    # the ground station says so too, at its start or when it writes, and goes on
    said = []
    try:
        kept = Archive(tmp_path, Retention(None), say=said.append)
    except ArchiveDamaged as error:
        said.append(str(error))
    else:
        for number in range(3000):
            kept.telemetry("n1", taken("n1", number + 1, [0.0] * 30, NOW_UTC_S + number))
        kept.flush(1.5)
        kept.close()
    assert file.exists()
    if damage != "flipped":
        assert any("damaged" in text for text in said)


def test_a_row_that_cannot_be_is_damage_and_no_traceback(tmp_path):
    file = filled(tmp_path, 3)
    for sql in (
        "UPDATE telemetry SET vals = x'00' WHERE number = 2",
        "UPDATE signal_sets SET signals = '[[1]]'",
        "UPDATE events SET severity = 99",
    ):
        copy = tmp_path / sql.split()[1] / archive_schema.FILE
        copy.parent.mkdir()
        copy.write_bytes(file.read_bytes())
        with sqlite3.connect(copy) as db:
            db.execute(sql)
        db.close()
        with ArchiveReader(copy) as reader:
            with pytest.raises(ArchiveDamaged):
                list(reader.messages())


def test_a_folder_that_may_not_be_written_can_be_read():
    code = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from ground_station.archive import Archive
        from ground_station.archive_read import ArchiveReader
        if os.getuid() == 0:  # whom modes do not bind
            os.setgid(65534), os.setuid(65534)
        print(len(list(ArchiveReader(Path(sys.argv[1])).messages())))
        try:
            Archive(Path(sys.argv[1]))
        except PermissionError as error:
            print(error.filename)
        """
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        file = filled(Path(name), 3)
        assert not file.with_name(file.name + "-wal").exists()  # a closed archive is one file
        Path(name).chmod(0o555)
        file.with_name(archive_schema.LOCK).chmod(0o444)
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60)
        Path(name).chmod(0o755)
    assert done.stdout.split() == ["4", f"{name}/{archive_schema.LOCK}"], done.stderr
