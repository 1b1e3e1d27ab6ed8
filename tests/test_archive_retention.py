"""What an archive removes: by age, by room on the disk, oldest telemetry first, while it goes on writing and others read."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from archive_rig import NOW_UTC_S, birth, event, taken, telemetry_of

from ground_station import archive, archive_retention, archive_schema
from ground_station.archive import Archive
from ground_station.archive_read import ArchiveReader
from ground_station.archive_records import DAY_S, AlarmRecord, CommandRecord, Retention, TokenRecord

LIMIT_BYTES = 16_000_000


def settled(kept: Archive, done, wait_s: float = 60.0) -> None:
    """Until `done()` is true, or fails."""
    ends_s = time.monotonic() + wait_s
    while not done():
        assert time.monotonic() < ends_s, kept.counts
        time.sleep(0.05)


def test_what_is_too_old_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "TEND_EVERY_S", 0.1)
    now_s = time.time()
    with Archive(tmp_path, Retention(None)) as kept:
        for number in range(1, 1001):
            at_s = now_s - (2.5 * DAY_S if number <= 900 else 0.5 * DAY_S)
            kept.telemetry("n1", taken("n1", number, [1.0], at_s, unit="old" if number <= 900 else "new"))
        for at_s, name in ((now_s - 2.5 * DAY_S, "old"), (now_s, "new")):
            kept.event(event("n1", at_s, name), at_s)
            kept.birth("n1", birth("n1", at_s), at_s)
            kept.command(CommandRecord(name, "ann", at_s, "n1", "ping", {}, "ok"))
            kept.token(TokenRecord(name, 0, 1, "x", at_s, 1.0))
            kept.alarm(AlarmRecord(name, at_s, "n1", "s0", "red high", "critical", "active"))
        assert kept.flush()
        time.sleep(1.0)
        assert kept.counts.removed == 0  # control: nothing is removed without an age
    with Archive(tmp_path, Retention(days=2.0)) as kept:
        settled(kept, lambda: kept.counts.removed >= 906)
    with ArchiveReader(tmp_path) as reader:
        assert [one.telemetry.number for one in telemetry_of(reader)] == list(range(901, 1001))
        assert [each.event.text for each in reader.events()] == ["new"]
        assert [each.id for each in reader.commands()] == [each.id for each in reader.alarms()] == ["new"]
        assert reader.tokens("old") == [] and len(reader.tokens("new")) == 1
        assert [each.unit for each in reader.signals("n1")] == ["new"]
        assert len(reader.page("SELECT * FROM signal_sets")) == 1
    assert archive_schema.damage(tmp_path / archive_schema.FILE) == []


def test_the_disk_limit_is_kept_while_it_is_written_and_read(tmp_path, monkeypatch):
    """Three times what there is room for: the youngest stay, the records too, pages go back to the disk."""
    monkeypatch.setattr(archive, "TEND_EVERY_S", 0.1)
    file, largest, number = tmp_path / archive_schema.FILE, 0, 0
    large = taken("n1", 0, [1.5] * 500, NOW_UTC_S)
    with Archive(tmp_path, Retention(None, LIMIT_BYTES)) as kept, ArchiveReader(tmp_path) as reader:
        kept.event(event("n1", NOW_UTC_S - 1e6, "the oldest of all"), NOW_UTC_S - 1e6)
        for _ in range(10):
            for _ in range(800):
                number += 1
                telemetry = replace(large.telemetry, number=number, generated_at=NOW_UTC_S + number)
                kept.telemetry("n1", replace(large, telemetry=telemetry, generated_utc_s=NOW_UTC_S + number))
            assert kept.flush(30.0)
            largest = max(largest, archive_retention.disk_bytes(file))
            assert reader.trend("n1", "s5", NOW_UTC_S, NOW_UTC_S + number + 1, 50).count[-1] > 0
        settled(kept, lambda: archive_retention.disk_bytes(file) <= LIMIT_BYTES)
        counts = kept.counts
        assert counts.dropped == {} and counts.trouble is None and counts.written["telemetry"] == number
        assert counts.removed > number / 2
        assert len(reader.events()) == 1
    there = [
        row[0] for row in ArchiveReader(tmp_path).page("SELECT number FROM telemetry ORDER BY number LIMIT 100000")
    ]
    assert there == list(range(number - len(there) + 1, number + 1)) and len(there) == number - counts.removed
    assert len(there) > 2000  # it is no use to remove more than must go
    assert largest < 3 * LIMIT_BYTES and file.stat().st_size <= LIMIT_BYTES
    assert archive_schema.damage(file) == []


def test_other_records_go_when_there_is_no_telemetry_left(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "TEND_EVERY_S", 0.1)
    with Archive(tmp_path, Retention(None, LIMIT_BYTES)) as kept:
        for place in range(300):
            kept.event(event("n1", NOW_UTC_S, "x" * 100_000), NOW_UTC_S + place)
        assert kept.flush(30.0)
        settled(kept, lambda: archive_retention.disk_bytes(kept.file) <= LIMIT_BYTES)
    with ArchiveReader(tmp_path) as reader:
        left = reader.events()
    assert 120 < len(left) < 170 and left[-1].at_utc_s == NOW_UTC_S + 299


@pytest.mark.parametrize("wrong", [{"days": 0}, {"days": -1}, {"days": float("nan")}, {"disk_bytes": 1000}])
def test_a_retention_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="give"):
        Retention(**wrong)
