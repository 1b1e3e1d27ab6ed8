"""`spacemoe boards [NAME]`: which kinds of board there are, and what is known of one: supply, sensors, trip points, meter, modes.

Leaves out: what the files mean and how they are checked (hardware/board_file.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from ground_station.cli_shared import EXIT_OK, wrapped


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    boards = command("boards", "kinds of board: supply, sensors, trip points, where a power meter goes", _boards)
    boards.add_argument("name", nargs="?", metavar="NAME", help="one of them, in full")


def _boards(args: argparse.Namespace) -> int:
    """Raises: board_file.BoardFileError for a name that has no file, or a damaged file."""
    from hardware import board_file

    found = [board_file.read(name) for name in ((args.name,) if args.name else board_file.names())]
    if args.json:
        trees = [dataclasses.asdict(board) | {"meter_limits": _limits(board)} for board in found]
        print(json.dumps(trees[0] if args.name else {"boards": trees}, indent=1))
        return EXIT_OK
    for line in _one(found[0]) if args.name else _table(found):
        print(line)
    return EXIT_OK


def _limits(board) -> dict | None:
    if board.meter is None:
        return None
    shunt = board.meter.shunt
    full_w = shunt.loss_w(board.supply.max_current_a)
    return {"clips_at_a": shunt.max_current_a, "step_a": shunt.step_a, "loss_w_at_max_current": full_w}


def _image(board) -> str:
    ways = ["image build"] if board.builds else []
    return ", ".join(ways + (["image customize"] if board.bases else [])) or "none"


def _table(boards) -> list[str]:
    lines = [f"{'board':17} {'own power reading':18} {'meter':13} image"]
    for board in boards:
        own = next((rail.name for rail in board.rails if rail.total and rail.name != "power_w.ina226"), "none")
        meter = "no place" if board.meter is None else f"INA226, {board.meter.shunt_uohm / 1000:g} mOhm"
        lines.append(f"{board.name:17} {own.removeprefix('power_w.'):18} {meter:13} {_image(board)}")
    if not any(board.verified_on_a_board for board in boards):
        lines.append("nothing of this was verified on a board; `spacemoe boards NAME` shows the sources")
    return lines


def _one(board) -> list[str]:
    tried = "verified on a board" if board.verified_on_a_board else "not verified on a board"
    lines = [f"{board.name}: {board.title}; {tried}", f"image: {_image(board)}"]
    if board.bases:
        lines.append(f"  vendors' images: {', '.join(board.bases)}")
    if board.meter is not None:
        lines.append(f"supply: {board.supply.voltage_v:g} V, {board.supply.max_current_a:g} A ({board.supply.source})")
    for rail in board.rails:
        part = "total of the " + rail.scope if rail.total else "a part"
        lines.append(f"power: {rail.name}, {part} ({rail.source})")
    for zone in board.zones:
        trips = ", ".join(f"{trip.kind} {trip.temp_c:g} C" for trip in zone.trips)
        what = zone.sensor or f"left out: {zone.why}"
        lines.append(f"zone {zone.type}: {what}" + (f"; {trips}" if trips else ""))
    lines.append(f"firmware: {board.firmware.does} ({board.firmware.source})")
    if board.meter is not None:
        meter, limits = board.meter, _limits(board)
        lines += [
            f"meter: INA226 at {meter.address:#x} on I2C bus {meter.bus}: SDA pin {meter.sda_pin}, SCL {meter.scl_pin}, "
            f"3.3 V {meter.power_pin}, ground {meter.ground_pin} ({meter.source})",
            f"  shunt {meter.shunt_uohm / 1000:g} mOhm: clips at {limits['clips_at_a']:.2f} A, steps of "
            f"{limits['step_a'] * 1000:.3g} mA, {limits['loss_w_at_max_current']:.2f} W lost at "
            f"{board.supply.max_current_a:g} A",
        ]
    for mode in board.power_modes:
        budget = "no budget" if mode.budget_w is None else f"{mode.budget_w:g} W"
        lines.append(f"power mode {mode.id}: {mode.name}, {budget}")
    lines += [f"note: {note}" for note in board.notes] + [f"source: {source}" for source in board.sources]
    return [part for line in lines for part in wrapped(line).splitlines()]
