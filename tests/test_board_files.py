"""Board files against what the agent reads of the same board, against the images that exist, and the shunt's arithmetic in wiring.md.

The boards' sensor files are the simulator's, written from the kernel's and the makers' pages; the agent's own reader is the judge of
names, totals and trip points. The table's figures are computed here from the chip's two constants.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from firmware_sim.profiles import PROFILES
from firmware_sim.run import SimulatedBoard
from firmware_sim.spec import BoardSpec, Trace
from hardware import base_kinds, board_file, image_boards
from node_agent import sensors, vcgencmd

ROOT = Path(__file__).parent.parent
NAMES = {"pi5", "pi4", "pi3", "zero2w", "jetson-orin-nano", "jetson-nano", "qemu-virt"}
BOARDS = {name: board_file.read(name) for name in board_file.names()}


def test_there_is_a_file_for_each_board_and_none_claims_to_be_verified():
    assert set(BOARDS) == NAMES
    assert not any(board.verified_on_a_board for board in BOARDS.values())  # see hardware/tried.md
    assert "Nothing of this kit has met a real board" in (ROOT / "hardware" / "tried.md").read_text()
    assert {board.profile for board in BOARDS.values()} | {b.meter_profile for b in BOARDS.values()} <= {*PROFILES, ""}


def read_by_the_agent(profile: str, folder: Path) -> sensors.Found:
    spec = BoardSpec("n1", PROFILES[profile], folder, None, Trace((0.0,), (0.6,)))
    SimulatedBoard(spec).advance(1.0)
    return sensors.find(folder)


def differences(board: board_file.Board, profile: str, folder: Path) -> list[str]:
    """What the file says of a board that the agent does not find, and the other way round where it must."""
    found = read_by_the_agent(profile, folder)
    by_name = {sensor.name: sensor for sensor in found.sensors}
    wrong = []
    for rail in board.rails:
        if rail.name == "power_w.ina226" and profile == board.profile:
            continue  # this one has no meter
        if rail.name not in by_name:
            wrong.append(f"{rail.name} is not there")
        elif by_name[rail.name].scope != rail.scope:
            wrong.append(f"{rail.name} is of the {by_name[rail.name].scope}")
    totals = {sensor.name for sensor in found.total if sensor.unit == "W"}
    if not totals <= {rail.name for rail in board.rails if rail.total}:
        wrong.append(f"total is {totals}")
    if totals & {rail.name for rail in board.rails if not rail.total}:
        wrong.append("a part is the total")
    trips = sensors.trip_points(folder)
    for zone in board.zones:
        if zone.why:
            if any(zone.type.lower().replace("-", "_") in name for name in by_name):
                wrong.append(f"{zone.type} is believed")
            continue
        if zone.sensor not in by_name or not by_name[zone.sensor].unit == "degC":
            wrong.append(f"{zone.sensor} is not there")
        theirs = {(trip.kind, trip.temp_c) for trip in trips if trip.zone == zone.type}
        if theirs != {(trip.kind, trip.temp_c) for trip in zone.trips}:
            wrong.append(f"{zone.type} trips at {sorted(theirs)}")
    for flag in board.firmware.flags:
        if flag not in by_name:
            wrong.append(f"{flag} is not there")
    throttle = PROFILES[profile].throttle
    if (throttle.soft_c, throttle.hard_c) != (board.firmware.throttles_from_c, board.firmware.strongly_from_c):
        wrong.append("throttles elsewhere")
    return wrong


CASES = [
    (name, profile)
    for name, board in BOARDS.items()
    for profile in sorted({board.profile, board.meter_profile})
    if profile
]


@pytest.mark.parametrize("name, profile", CASES)
def test_the_agent_finds_what_the_file_says(name, profile, tmp_path):
    assert differences(BOARDS[name], profile, tmp_path) == []


def test_the_comparison_can_fail(tmp_path):
    """Another board's file, of the same maker, does not pass for this one's."""
    assert differences(BOARDS["pi5"], "raspberry-pi-4-ina226", tmp_path / "a")
    assert differences(BOARDS["jetson-nano"], "jetson-orin-nano", tmp_path / "b")


def test_flags_images_and_bases_are_those_that_exist():
    flags = {f"flag.{name}" for name in vcgencmd.FLAGS.values()} | {"flag.under_voltage_alarm"}
    for board in BOARDS.values():
        assert set(board.firmware.flags) <= flags
        assert set(board.bases) <= set(base_kinds.KINDS)
        assert board.builds == (board.name in image_boards.BOARDS)
        assert board.sources and board.supply.source and board.firmware.source


# ---------------------------------------------------------------- shunts


def wrong_cells(text: str) -> list[str]:
    """Cells of wiring.md's table that are not what the chip's constants give: 2.5 uV a step, 81.92 mV at most."""
    wrong, seen = [], set()
    for row in re.findall(r"^\| (.+) \|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in row.split("|")]
        if len(cells) != 10 or not re.fullmatch(r"[\d.]+", cells[1]):
            continue
        volt, ampere, most, milliohm, clips, step, step_mw, drop, heat = map(float, cells[1:])
        seen.add(cells[0])
        expected = (
            81.92 / ampere,
            81.92 / milliohm,
            2.5 / milliohm,
            2.5 / milliohm * volt,
            ampere * milliohm,
            ampere * ampere * milliohm / 1000,
        )
        for shown, right, text_ in zip((most, clips, step, step_mw, drop, heat), expected, cells[3:4] + cells[5:]):
            places = len(text_.partition(".")[2])
            if abs(shown - right) > 0.5 * 10**-places * 1.001:
                wrong.append(f"{cells[0]}: {shown} is {right}")
        board = BOARDS.get(cells[0])
        if board is None:
            continue
        if (board.supply.voltage_v, board.supply.max_current_a, board.meter.shunt_uohm) != (
            volt,
            ampere,
            milliohm * 1000,
        ):
            wrong.append(f"{cells[0]}: not as in its board file")
        if milliohm > most:
            wrong.append(f"{cells[0]}: clips")
    missing = {name for name, board in BOARDS.items() if board.meter} - seen
    return wrong + [f"{name} is missing" for name in missing]


def test_the_table_of_shunts_is_right():
    text = (ROOT / "hardware" / "wiring.md").read_text()
    assert wrong_cells(text) == []
    # control: one digit, one missing row
    assert wrong_cells(text.replace("| 8.192 |", "| 8.195 |"))
    assert wrong_cells(re.sub(r"^\| pi4 .*\n", "", text, flags=re.MULTILINE)) == ["pi4 is missing"]


def test_a_shunt_by_hand():
    ours = board_file.shunt(0.01)
    assert (ours.max_current_a, ours.step_a) == (pytest.approx(8.192), pytest.approx(250e-6))
    assert ours.loss_w(5.0) == pytest.approx(0.25) and ours.drop_v(5.0) == pytest.approx(0.05)
    assert board_file.largest_shunt_ohm(0.8192) == pytest.approx(0.1)  # what is on a module as sold


# ---------------------------------------------------------------- a file that is wrong


def altered(tmp_path: Path, old: str, new: str) -> Path:
    text = (board_file.FOLDER / "pi5.toml").read_text()
    assert text.count(old) >= 1
    path = tmp_path / "pi5.toml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("[supply]\n", "[supply]\nwatts = 3\n", "supply.watts is not known"),
        ("voltage_v = 5.1", 'voltage_v = "5.1"', "supply.voltage_v"),
        ("voltage_v = 5.1", "voltage_v = nan", "supply.voltage_v"),
        ("voltage_v = 5.1", "voltage_v = 230", "outside 0..60"),
        ("voltage_v = 5.1\n", "", "supply.voltage_v is missing"),
        ("shunt_uohm = 10000", "shunt_uohm = 100000", "clips at 0.82 A"),
        ("address = 0x40", "address = 0x70", "0x70 is outside"),
        ("scl_pin = 5", "scl_pin = 3", "not four of 1..40"),
        ('kind = "critical"', 'kind = "deadly"', "'deadly': use active"),
        ('name = "power_w.pmic_sum"', 'name = "watts"', "no power reading"),
        ('sensor = "temp_c.cpu_thermal"', "", "needs either sensor or why"),
        ("builds = false", 'builds = "no"', "builds is 'no'"),
        ("[supply]", "[supply", "pi5.toml"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(tmp_path, old, new, says):
    with pytest.raises(board_file.BoardFileError, match=re.escape(says)) as caught:
        board_file.load(altered(tmp_path, old, new))
    assert "\n" not in str(caught.value) and "pi5.toml" in str(caught.value)


def test_only_plain_files_of_some_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * (board_file.MAX_FILE_BYTES + 1))
    for name in ("pipe", "large", "missing"):
        with pytest.raises(board_file.BoardFileError, match=name):
            board_file.load(tmp_path / f"{name}.toml")
    with pytest.raises(board_file.BoardFileError, match="'../pi5': use one of"):
        board_file.read("../pi5")
    (tmp_path / "pi9.toml").write_text((board_file.FOLDER / "pi5.toml").read_text())
    with pytest.raises(board_file.BoardFileError, match="says it is 'pi5'"):
        board_file.read("pi9", tmp_path)


# ---------------------------------------------------------------- the command, and what is shipped


def boards(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ground_station.cli", "boards", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


def test_the_command_shows_them():
    listed = json.loads(boards("--json").stdout)["boards"]
    assert {board["name"] for board in listed} == NAMES
    done = boards("pi5")
    assert done.returncode == 0 and "clips at 8.19 A" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    refused = boards("pi6")
    assert refused.returncode == 2 and "use one of jetson-nano" in refused.stderr and not refused.stdout


def test_board_files_are_part_of_the_package():
    tomllib = pytest.importorskip("tomllib")
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hardware"]
    files = {path for pattern in shipped for path in (ROOT / "hardware").glob(pattern)}
    assert {path.stem for path in files if path.suffix == ".toml"} == NAMES
