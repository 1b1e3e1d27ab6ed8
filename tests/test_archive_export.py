"""Exports: what other programs read (pyarrow, Python's csv and json) is what was put in; the commands, their errors and exit codes."""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from archive_rig import NOW_UTC_S, birth, event, taken
from test_archive import ALARM, COMMAND, HOSTILE, REQUEST

from ground_station import archive_export, archive_schema, cli_archive
from ground_station.archive import Archive
from ground_station.archive_read import ArchiveReader
from ground_station.archive_records import Retention, TokenRecord
from ground_station.fleet import Taken
from node_agent.wire import Birth, Sample

VALUES = (0.1, -0.0, 1e308, 5e-324, 1 / 3, 123456789.123456789, None, 2.0**53 + 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two nodes with different signals, hostile names, times corrected and not, and a few of all records."""
    folder = tmp_path_factory.mktemp("kept")
    with Archive(folder, Retention(None)) as kept:
        for number in range(1, 1301):
            values = [VALUES[(number + place) % len(VALUES)] for place in range(3)]
            made = taken("n1", number, values, NOW_UTC_S + number)
            if number % 2:
                made = replace(made, generated_utc_s=NOW_UTC_S + number + 0.25, uncertainty_s=0.01)
            kept.telemetry("n1", made)
            if number % 5 == 0:
                samples = tuple(
                    Sample(text, float(number), text, "stale", "virtual", "", NOW_UTC_S + number - 0.5)
                    for text in HOSTILE
                )
                made = taken("n2", number, [], NOW_UTC_S + number)
                kept.telemetry("n2", replace(made, telemetry=replace(made.telemetry, samples=samples)))
        kept.birth("n1", birth("n1", NOW_UTC_S), NOW_UTC_S)
        for place, text in enumerate(HOSTILE):
            kept.event(event("n1" if place % 2 else "n2", NOW_UTC_S, text, "critical"), NOW_UTC_S + place)
        kept.command(COMMAND)
        kept.request(REQUEST)
        kept.token(TokenRecord("r1", 0, 5, 'a,\n"b', NOW_UTC_S, 1.5, None, 0.25))
        kept.alarm(ALARM)
    return folder


def run(*words: str) -> argparse.Namespace:
    """(exit code) of the sub-commands as the umbrella command would run them."""
    root = argparse.ArgumentParser()
    commands = root.add_subparsers()

    def command(name, help, run, group=commands):
        sub = group.add_parser(name, help=help.replace("%", "%%"), description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true")
        return sub

    cli_archive.add(commands, command)
    args = root.parse_args([str(word) for word in words])
    return args.run(args)


def expected(folder) -> list[dict]:
    """Rows of the telemetry as the reader says them, sample by sample."""
    rows = []
    with ArchiveReader(folder) as reader:
        for kept in reader.messages():
            if isinstance(kept.message, Taken):
                came, message = kept.message, kept.message.telemetry
                for sample in message.samples:
                    at_s = came.sample_utc_s(sample)
                    rows.append(
                        {
                            **{"node": message.node, "signal": sample.name, "unit": sample.unit, "value": sample.value},
                            **{"validity": sample.validity, "provenance": sample.provenance, "scope": sample.scope},
                            "generated_utc_s": sample.generated_at if at_s is None else at_s,
                            **{"received_utc_s": kept.at_utc_s, "corrected": at_s is not None, "late": came.late},
                            **{"run": message.run, "number": message.number},
                        }
                    )
    return rows


def same(rows: list[dict], wanted: list[dict]) -> None:
    assert len(rows) == len(wanted)
    for row, want in zip(rows, wanted):
        assert row["generated_utc_s"] == pytest.approx(want["generated_utc_s"], abs=1e-6)
        assert {**row, "generated_utc_s": 0} == {**want, "generated_utc_s": 0}
        assert row["value"] is None or math.copysign(1, row["value"]) == math.copysign(1, want["value"])


def test_parquet_holds_what_was_put_in(folder, tmp_path, monkeypatch, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(archive_export, "CHUNK_SAMPLES", 1000)  # several row groups
    assert run("export", folder, "-o", tmp_path / "out", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    wanted = expected(folder)
    table = parquet.read_table(tmp_path / "out" / "telemetry.parquet")
    assert parquet.ParquetFile(tmp_path / "out" / "telemetry.parquet").num_row_groups > 3
    same(table.to_pylist(), wanted)
    assert said["rows"]["telemetry"] == len(wanted) == 1300 * 3 + 260 * len(HOSTILE)
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        f"{name}.parquet" for name in ("telemetry", "births", "events", "commands", "requests", "tokens", "alarms")
    }
    assert [each.name for each in tmp_path.iterdir()] == ["out"]

    def rows(name):
        return parquet.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()

    assert [row["text"] for row in rows("events")] == [text.replace("\ud83d", "\\ud83d") for text in HOSTILE]
    assert {row["severity"] for row in rows("events")} == {"critical"}
    assert {**rows("commands")[0], "arguments": json.loads(rows("commands")[0]["arguments"])} == vars(COMMAND)
    assert rows("requests") == [vars(REQUEST)] and rows("alarms") == [vars(ALARM)]
    assert (rows("tokens")[0]["piece"], rows("tokens")[0]["select_ms"], rows("tokens")[0]["trunk_ms"]) == (
        'a,\n"b',
        0.25,
        None,
    )
    assert Birth(**{**json.loads(rows("births")[0]["birth"]), "sensors": (), "shards": ()}) == birth("n1", NOW_UTC_S)


def read_csv(path) -> list[dict]:
    number = {"value", "generated_utc_s", "received_utc_s"}
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {
                name: (float(text) if text else None)
                if name in number
                else text == "True"
                if name in ("corrected", "late")
                else int(text)
                if name in ("run", "number")
                else text
                for name, text in row.items()
            }
            for row in csv.DictReader(file)
        ]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="csv reads no NUL before Python 3.11")
def test_csv_holds_what_was_put_in(folder, tmp_path):
    assert run("export", folder, "-o", tmp_path / "out", "--format", "csv") == 0
    same(read_csv(tmp_path / "out" / "telemetry.csv"), expected(folder))
    with open(tmp_path / "out" / "events.csv", newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == [text.replace("\ud83d", "\\ud83d") for text in HOSTILE]


def test_json_lines_hold_what_was_put_in(folder, tmp_path):
    assert run("export", folder, "-o", tmp_path / "telemetry.jsonl") == 0
    same([json.loads(line) for line in open(tmp_path / "telemetry.jsonl", encoding="utf-8")], expected(folder))
    assert [each.name for each in tmp_path.iterdir()] == ["telemetry.jsonl"]


def test_what_is_chosen_is_written_and_nothing_else(folder, tmp_path):
    since_s, until_s = NOW_UTC_S + 100, NOW_UTC_S + 200
    words = (
        "--since",
        f"{since_s:.6f}",
        "--until",
        f"{until_s:.6f}",
        "--node",
        "n1",
        "--signal",
        "s1",
        "--signal",
        "s2",
    )
    assert run("export", folder, "-o", tmp_path / "out", "--format", "jsonl", *words) == 0
    rows = [json.loads(line) for line in open(tmp_path / "out" / "telemetry.jsonl")]

    def made_s(row):
        return row["generated_utc_s"] if row["corrected"] else row["received_utc_s"]

    wanted = [
        row
        for row in expected(folder)
        if row["node"] == "n1" and row["signal"] in ("s1", "s2") and since_s <= made_s(row) <= until_s
    ]
    same(rows, wanted)
    assert 150 < len(rows) < 250
    assert (tmp_path / "out" / "events.jsonl").read_bytes() == b""
    words = ("--since", f"{NOW_UTC_S + 1e6:.0f}")
    assert run("export", folder, "-o", tmp_path / "none.csv", *words) == 0
    assert (tmp_path / "none.csv").read_text().count("\n") == 1


def test_a_file_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_export, "_records", broken)
    with pytest.raises(OSError):
        run("export", folder, "-o", tmp_path / "out")
    monkeypatch.setattr(archive_export, "_columns", broken)
    with pytest.raises(OSError):
        run("export", folder, "-o", tmp_path / "one.csv")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for words, text in (
        ((folder, "-o", tmp_path / "full"), "there already: give -o a new folder"),
        ((folder, "-o", tmp_path / "x.csv", "--format", "jsonl"), "give one or the other"),
        ((folder, "-o", tmp_path / "x.csv", "--node", "n9"), "archive show` names its nodes"),
        ((folder, "-o", tmp_path / "x.csv", "--since", "then"), "'then' is no time: give 2026-11-30T12:00Z"),
        ((folder, "-o", tmp_path / "x.csv", "--since=-1h", "--until=-2h"), "--since -1h is not before --until -2h"),
        ((tmp_path / "nowhere", "-o", tmp_path / "x.csv"), "is not there: name the folder"),
    ):
        with pytest.raises(ValueError, match=text):
            run("export", *words)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["full"]
    assert (tmp_path / "full" / "mine").read_text() == "x"


def test_show_and_check(folder, tmp_path, capsys):
    assert run("archive", "show", folder, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tables"]["telemetry"]["rows"] == 1560 and shown["tables"]["events"]["rows"] == len(HOSTILE)
    assert [each["node"] for each in shown["nodes"]] == ["n1", "n2"]
    assert run("archive", "show", folder / archive_schema.FILE) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("telemetry") and "1560" in line for line in lines)
    assert max(map(len, lines)) <= 80 or str(folder) in max(lines, key=len)
    assert run("archive", "check", folder) == 0 and capsys.readouterr().out.strip().endswith("ok")
    whole = bytearray((folder / archive_schema.FILE).read_bytes())
    for place in range(len(whole) // 2, len(whole) // 2 + 50_000):
        whole[place] ^= 0xFF
    (tmp_path / archive_schema.FILE).write_bytes(whole)
    assert run("archive", "check", tmp_path) == 3
    assert "damaged; get back what can be read" in " ".join(capsys.readouterr().out.split())
    assert run("archive", "check", tmp_path, "--json") == 3
    assert json.loads(capsys.readouterr().out)["found"]


def test_the_command_line_names_the_formats_there_are_and_loads_nothing_heavy():
    assert cli_archive.FORMATS == archive_export.FORMATS
    code = "import sys, ground_station.cli_archive; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "sqlite3", "pyarrow", "node_agent"} & {*done.stdout.split()}
