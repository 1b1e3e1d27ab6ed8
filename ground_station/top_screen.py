"""The live view of `spacemoe top`: the fleet as lines of text of any width, kept up to date by the stream. Pure, but for `Terminal`.

What is shown never depends on colour alone: each value's level has its letter. Leaves out the connection (mission_client.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ground_station.cli_shared import plain

COLUMNS = ("temp_c", "power_w", "duty")  # signals; those of every board
ORDER = "srdyw?g."  # of levels, the gravest first: letters of limits.LETTERS
LEVEL_WORDS = {
    "g": "ok",
    "w": "watch",
    "y": "warning",
    "d": "distress",
    "r": "critical",
    "s": "severe",
    "?": "unknown",
    ".": "-",
}
COLOURS = {"g": "32", "w": "36", "y": "33", "d": "33;1", "r": "31", "s": "31;1"}
SORTS = {"n": "name", "t": "temp_c", "p": "power_w", "l": "level", "a": "age"}
MAX_NODES = 2000
EVENTS = 4
MIN_WIDTH, MIN_HEIGHT = 20, 4


@dataclass
class Node:
    """`values`: (value, letter of its level, letter of its validity) by signal."""

    state: str = "offline"
    board: str = ""
    received_utc_s: float | None = None
    values: dict[str, tuple[float | None, str, str]] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """The gravest letter."""
        return min((level for _, level, _ in self.values.values()), key=ORDER.index, default=".")


@dataclass
class View:
    """What is known; changed by `apply`. `shift_s`: the station's clock against this one."""

    nodes: dict[str, Node] = field(default_factory=dict)
    sets: dict[str, list[Any]] = field(default_factory=dict)
    alarms: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: deque = field(default_factory=lambda: deque(maxlen=EVENTS))
    tokens: int = 0
    shift_s: float = 0.0
    note: str = ""

    def apply(self, kind: str, content: Any, now_utc_s: float) -> None:
        """One frame of the stream. What does not fit is left out: it is a stranger's."""
        with contextlib.suppress(TypeError, ValueError, KeyError, IndexError, AttributeError):
            if kind == "snapshot":
                new = View()
                new.alarms = {str(row["id"]): row for row in content.get("alarms", [])}
                for row in content.get("events", []):
                    new.apply("event", row, now_utc_s)
                fleet = content["fleet"]
                new._fleet(fleet, now_utc_s)
                for birth in fleet.get("births", []):
                    new.apply("birth", birth, now_utc_s)
                vars(self).update(vars(new) | {"tokens": self.tokens})
            elif kind == "fleet":
                self._fleet(content, now_utc_s)
            elif kind == "birth":
                self._node(str(content["node"])).board = str(content["board"])
            elif kind == "event":
                self.events.append(
                    (float(content["at_utc_s"]), *(str(content[key]) for key in ("severity", "node", "text")))
                )
            elif kind == "alarm":
                alarm = content.get("alarm", content)
                if alarm.get("state") == "cleared":
                    self.alarms.pop(str(alarm["id"]), None)
                else:
                    self.alarms[str(alarm["id"])] = alarm
            elif kind == "token":
                self.tokens += 1
            elif kind == "beat":
                self.shift_s = float(content["at"]) - now_utc_s

    def _node(self, name: str) -> Node:
        if name not in self.nodes and len(self.nodes) >= MAX_NODES:
            raise ValueError("too many nodes")
        return self.nodes.setdefault(name, Node())

    def _fleet(self, content: dict[str, Any], now_utc_s: float) -> None:
        self.shift_s = float(content["at"]) - now_utc_s
        self.sets.update(content.get("sets", {}))
        for name, set_id, received, state, values, levels, validities in content["rows"]:
            node = self._node(str(name))
            node.state = str(state)
            if set_id:
                node.received_utc_s = float(received)
                signals = self.sets[set_id]
                node.values = {
                    str(signal[0]): (value, level if level in ORDER else ".", validity)
                    for signal, value, level, validity in zip(signals, values, levels, validities)
                }


@dataclass(frozen=True)
class Look:
    """How it is shown. `top`: the first node that is; `sort`: a key of SORTS."""

    width: int = 80
    height: int = 24
    colour: bool = False
    sort: str = "n"
    top: int = 0


def number(value: Any, digits: int = 1) -> str:
    """At most 9 characters."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-"
    text = f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"
    return text if len(text) <= 9 else f"{value:.2g}"


def age(seconds: float | None) -> str:
    """At most 5 characters."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("m", 60.0)):
        if seconds >= 2 * size:
            return f"{min(seconds / size, 9999):.0f}{unit}"
    return f"{max(seconds, 0.0):.0f}s"


def lines(view: View, look: Look, now_utc_s: float) -> list[str]:
    """At most `look.height` lines of at most `look.width` characters (colours not counted)."""
    width, height = max(look.width, MIN_WIDTH), max(look.height, MIN_HEIGHT)
    now_utc_s += view.shift_s
    states = [node.state for node in view.nodes.values()]
    open_alarms = [each for each in view.alarms.values() if each.get("state") in ("unacknowledged", "returned")]
    head = (
        f"spacemoe top  {time.strftime('%H:%M:%S', time.gmtime(max(0.0, min(now_utc_s, 4e9))))}Z  {len(states)} nodes: "
        f"{states.count('online')} on, {states.count('stale')} stale, {states.count('offline')} off  "
        f"alarms: {len(view.alarms)}, {len(open_alarms)} open"
    )
    rows = [_cut(head, width)]
    if view.note:
        rows.append(_cut(f"! {plain(view.note, 200)}", width))
    wide = max([4, *(min(len(plain(name, 32)), 32) for name in view.nodes)])
    wide = min(wide, max(12, width - 52))  # a name is worth more than the columns behind it
    rows.append(
        _cut(f"{'node':{wide}} {'state':7} {'age':>5} {'temp C':>9}   {'power W':>9}   {'duty':>6}   level", width)
    )
    events = [
        _cut(
            f"{time.strftime('%H:%M:%S', time.gmtime(max(0.0, min(at, 4e9))))} {plain(f'{severity} {node}: {text}', 300)}",
            width,
        )
        for at, severity, node, text in view.events
    ]
    room = height - len(rows) - 1
    events = events[-max(0, min(len(events), room // 4)) :] if room >= 8 else []
    room -= len(events)
    order = sorted(view.nodes.items(), key=lambda item: _key(item, look.sort))
    top = max(0, min(look.top, len(order) - room))
    for name, node in order[top : top + room]:
        rows.append(_row(name, node, wide, width, look.colour, now_utc_s))
    rows += events
    left = len(order) - room
    rest = f"  {top + 1}-{min(top + room, len(order))} of {len(order)}, j/k scroll" if left > 0 else ""
    sorts = " ".join(f"{key}:{word.partition('_')[0]}" for key, word in SORTS.items())
    rows.append(_cut(f"q quit  sort {sorts}{rest}", width))
    return rows[:height]


def _key(item: tuple[str, Node], sort: str) -> tuple:
    name, node = item
    what = SORTS.get(sort, "name")
    if what == "level":
        return ORDER.index(node.level), name
    if what == "age":
        return -(node.received_utc_s or 0.0), name
    value = node.values.get(what, (None, "", ""))[0]
    return (-value if isinstance(value, (int, float)) else float("inf"), name) if what != "name" else (0, name)


def _row(name: str, node: Node, wide: int, width: int, colour: bool, now_utc_s: float) -> str:
    old = None if node.received_utc_s is None else now_utc_s - node.received_utc_s
    cells = [(f"{_cut(plain(name, 32), wide):{wide}} {node.state[:7]:7} {age(old):>5}", "")]
    for signal, columns in zip(COLUMNS, (9, 9, 6)):
        value, level, validity = node.values.get(signal, (None, ".", "m"))
        mark = level if level not in ".g" else "~" if validity == "s" else " "
        cells.append((f" {number(value, 2 if signal == 'duty' else 1):>{columns}} {mark}", COLOURS.get(level, "")))
    level = node.level
    cells.append((f" {LEVEL_WORDS[level]:8}", COLOURS.get(level, "")))
    cells.append((f" {plain(node.board, 200)}", ""))
    shown, left = "", width
    for text, paint in cells:
        text = _cut(text, left)
        left -= len(text)
        shown += f"\x1b[{paint}m{text}\x1b[0m" if colour and paint and text.strip() else text
    return shown.rstrip()


def _cut(text: str, width: int) -> str:
    """Text as wide as its number of characters: wide ones become '?' so that columns stand."""
    text = "".join(each if each.isascii() or _narrow(each) else "?" for each in text)
    return text if len(text) <= width else text[: max(0, width - 1)] + "~"[:width]


def _narrow(each: str) -> bool:
    import unicodedata

    return unicodedata.east_asian_width(each) not in "WF" and not unicodedata.combining(each)


class Terminal:
    """The screen while the view is live: the other page of the terminal, keys without Enter; all is put back at the end."""

    def __init__(self) -> None:
        self._in, self._out = sys.stdin.fileno(), sys.stdout
        self._shown: list[str] = []
        self._size = (0, 0)

    def __enter__(self) -> Terminal:
        self._saved = termios.tcgetattr(self._in)
        tty.setcbreak(self._in)
        self._out.write("\x1b[?1049h\x1b[?25l\x1b[2J")
        self._out.flush()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._out.write("\x1b[0m\x1b[?25h\x1b[?1049l")
            self._out.flush()
        termios.tcsetattr(self._in, termios.TCSADRAIN, self._saved)

    def size(self) -> tuple[int, int]:
        try:
            return tuple(os.get_terminal_size(self._out.fileno()))
        except OSError:
            return tuple(shutil.get_terminal_size())

    def draw(self, rows: list[str]) -> None:
        """Only the lines that have changed are written."""
        size = self.size()
        if size != self._size:
            self._out.write("\x1b[2J")
            self._shown, self._size = [], size
        rows = rows[: max(1, size[1])]
        for i, row in enumerate(rows):
            if i >= len(self._shown) or self._shown[i] != row:
                self._out.write(f"\x1b[{i + 1};1H\x1b[0m\x1b[2K{row}")
        if len(rows) < len(self._shown):
            self._out.write(f"\x1b[{len(rows) + 1};1H\x1b[0J")
        self._out.flush()
        self._shown = rows

    def key(self, wait_s: float) -> str:
        """A key within that time, or empty; 'eof' where nobody can press one any more."""
        try:
            ready, _, _ = select.select([self._in], [], [], wait_s)
        except InterruptedError:
            return ""
        if not ready:
            return ""
        raw = os.read(self._in, 16)
        return {b"": "eof", b"\x1b[A": "k", b"\x1b[B": "j"}.get(raw, raw[:1].decode("ascii", "replace"))
