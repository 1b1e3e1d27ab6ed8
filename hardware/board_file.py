"""Board files: what a kind of board is like, for people who wire it and for commands that name it. One TOML file per kind.

A file says supply, rails and temperatures by the names that the agent gives them, trip points, what the firmware does, where a meter
goes, power modes, and which images boot it. `verified_on_a_board` is true only for what was tried on one; nothing has been so far.
Every key is checked, unknown ones are refused. Leaves out: reading sensors (node_agent.sensors) and building images (image_*.py).
"""

from __future__ import annotations

import dataclasses
import math
import os
import stat
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from node_agent import toml_file

FOLDER = Path(__file__).with_name("boards")
MAX_FILE_BYTES = 64 * 1024
MAX_ITEMS = 64
MAX_TEXT = 400
# INA226 data sheet (TI SBOS547): a 16-bit signed shunt voltage in steps of 2.5 uV, a bus voltage in steps of 1.25 mV.
SHUNT_STEP_V = 2.5e-6
SHUNT_FULL_SCALE_V = 81.92e-3


class BoardFileError(ValueError):
    """A board file cannot be used, or there is none of that name; the text names it and what to do."""


@dataclass(frozen=True)
class Supply:
    """What the board is fed with; `max_current_a` is what the maker asks a supply to give, and what a meter must carry."""

    voltage_v: float
    max_current_a: float
    source: str


@dataclass(frozen=True)
class Rail:
    """A power reading by the agent's name (`power_w.*`). `total`: it is the whole of its scope; others are parts and are not added."""

    name: str
    scope: Literal["rail", "module", "board"]
    total: bool
    source: str


@dataclass(frozen=True)
class Trip:
    """From `temp_c` on the kernel acts: active cools, passive slows down, hot warns, critical powers off."""

    kind: Literal["active", "passive", "hot", "critical"]
    temp_c: float


@dataclass(frozen=True)
class Zone:
    """A thermal zone by its kernel `type`, and the agent's name of it; without one the agent leaves it out, `why` says why."""

    type: str
    trips: tuple[Trip, ...] = ()
    sensor: str = ""
    why: str = ""
    source: str = ""


@dataclass(frozen=True)
class Firmware:
    """What slows the board down without asking Linux. `flags`: by the agent's names."""

    does: str
    source: str
    throttles_from_c: float | None = None
    strongly_from_c: float | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Meter:
    """Where an INA226 goes: pins of the 40-pin header, Linux' number of the bus, the I2C address, the shunt in micro-ohm."""

    bus: int
    address: int
    sda_pin: int
    scl_pin: int
    power_pin: int
    ground_pin: int
    shunt_uohm: int
    source: str

    @property
    def shunt(self) -> Shunt:
        return shunt(self.shunt_uohm * 1e-6)


@dataclass(frozen=True)
class PowerMode:
    """A mode of `nvpmodel`; None: no budget is set."""

    id: int
    name: str
    budget_w: float | None = None


@dataclass(frozen=True)
class Board:
    """One kind of board. `profile` and `meter_profile`: firmware_sim's, without and with a meter; `builds`: `image build` makes an
    image for it; `bases`: vendor's images that `image customize` takes for it (base_kinds)."""

    name: str
    title: str
    maker: str
    verified_on_a_board: bool
    builds: bool
    supply: Supply
    firmware: Firmware
    sources: tuple[str, ...]
    profile: str = ""
    meter_profile: str = ""
    bases: tuple[str, ...] = ()
    rails: tuple[Rail, ...] = ()
    zones: tuple[Zone, ...] = ()
    meter: Meter | None = None
    power_modes: tuple[PowerMode, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shunt:
    """What a shunt in front of an INA226 comes to: the current at which it clips, and one step of the current reading."""

    ohm: float
    max_current_a: float
    step_a: float

    def loss_w(self, current_a: float) -> float:
        return current_a * current_a * self.ohm

    def drop_v(self, current_a: float) -> float:
        return current_a * self.ohm


def shunt(ohm: float) -> Shunt:
    return Shunt(ohm, SHUNT_FULL_SCALE_V / ohm, SHUNT_STEP_V / ohm)


def largest_shunt_ohm(max_current_a: float) -> float:
    """Above it the meter clips before the current is reached."""
    return SHUNT_FULL_SCALE_V / max_current_a


def names(folder: Path = FOLDER) -> tuple[str, ...]:
    """Boards that have a file."""
    return tuple(sorted(path.stem for path in folder.glob("*.toml")))


def read(name: str, folder: Path = FOLDER) -> Board:
    """The board of that name.  Raises: BoardFileError."""
    if name not in names(folder):
        raise BoardFileError(f"there is no board {name[:40]!r}: use one of {', '.join(names(folder))}")
    board = load(folder / f"{name}.toml")
    if board.name != name:
        raise BoardFileError(f"{folder / name}.toml says it is {board.name!r}: rename it")
    return board


def load(path: Path) -> Board:
    """The board in a file.  Raises: BoardFileError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise BoardFileError(f"{path} is no plain file: give a board file")
            raw = os.read(file, MAX_FILE_BYTES + 1)
        finally:
            os.close(file)
    except OSError as error:
        raise BoardFileError(f"{path} cannot be read ({error.strerror}): give a board file") from None
    if len(raw) > MAX_FILE_BYTES:
        raise BoardFileError(f"{path} is over {MAX_FILE_BYTES} bytes: a board file is a page of text")
    try:
        board = _build(Board, toml_file.loads(raw), "")
        _check(board)
        return board
    except (toml_file.TomlError, _Wrong) as error:
        raise BoardFileError(f"{path}: {error}") from None


class _Wrong(ValueError):
    pass


def _build(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise _Wrong(f"{where or 'the file'} is no table")
        hints = typing.get_type_hints(hint)
        fields = {item.name: item for item in dataclasses.fields(hint)}
        if unknown := sorted(set(value) - set(fields)):
            raise _Wrong(f"{where}{unknown[0]} is not known: use {', '.join(fields)}")
        for name, item in fields.items():
            if name not in value and item.default is dataclasses.MISSING:
                raise _Wrong(f"{where}{name} is missing")
        return hint(**{name: _build(hints[name], value[name], f"{where}{name}.") for name in value})
    name = where.rstrip(".")
    if origin is tuple:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise _Wrong(f"{name} is no list of at most {MAX_ITEMS}")
        return tuple(_build(inner[0], item, f"{name}[{index}].") for index, item in enumerate(value))
    if origin is Literal:
        if value not in inner:
            raise _Wrong(f"{name} is {str(value)[:40]!r}: use {', '.join(inner)}")
        return value
    if type(None) in inner:
        return _build(inner[0], value, where)
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is hint and hint in (bool, int):
        return value
    if hint is str and isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable():
        return value
    kind = {float: "number", int: "whole number", bool: "true or false", str: f"line of at most {MAX_TEXT} characters"}
    raise _Wrong(f"{name} is {str(value)[:40]!r}, no {kind.get(hint, 'value that is known')}")


def _check(board: Board) -> None:
    """What types do not say.  Raises: _Wrong."""

    def must(holds: bool, text: str) -> None:
        if not holds:
            raise _Wrong(text)

    must(0 < board.supply.voltage_v <= 60, f"supply.voltage_v {board.supply.voltage_v} is outside 0..60")
    must(0 < board.supply.max_current_a <= 30, f"supply.max_current_a {board.supply.max_current_a} is outside 0..30")
    must(bool(board.sources), "sources is empty: say where the facts are from")
    for rail in board.rails:
        must(rail.name.startswith("power_w."), f"rails: {rail.name!r} is no power reading of the agent")
    for zone in board.zones:
        must(bool(zone.sensor) != bool(zone.why), f"zones: {zone.type} needs either sensor or why it is left out")
        for trip in zone.trips:
            must(-50 <= trip.temp_c <= 150, f"zones: {zone.type} trips at {trip.temp_c} C, outside -50..150")
    if (meter := board.meter) is not None:
        must(0x40 <= meter.address <= 0x4F, f"meter.address {meter.address:#x} is outside 0x40..0x4f of an INA226")
        must(0 <= meter.bus <= 63 and meter.shunt_uohm > 0, "meter: bus is 0..63 and shunt_uohm above 0")
        pins = (meter.sda_pin, meter.scl_pin, meter.power_pin, meter.ground_pin)
        must(len({*pins}) == 4 and all(1 <= pin <= 40 for pin in pins), f"meter: pins {pins} are not four of 1..40")
        must(
            meter.shunt.max_current_a >= board.supply.max_current_a,
            f"meter.shunt_uohm {meter.shunt_uohm} clips at {meter.shunt.max_current_a:.2f} A, below the supply's "
            f"{board.supply.max_current_a:g} A: at most {largest_shunt_ohm(board.supply.max_current_a) * 1e6:.0f}",
        )
