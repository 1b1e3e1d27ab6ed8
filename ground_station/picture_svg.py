"""Draws with matplotlib and gives SVG for the inside of an HTML page: text as text, colours as CSS variables, ids of its own.

The same drawing gives the same bytes. No state of pyplot is touched, and no matplotlibrc of a user is obeyed. Leaves out: what is drawn
(experiment_pictures.py), and the page.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 360.0
"""Units of every picture's width: 360 pixels wide, a unit is a little less than a pixel, so that text of TEXT units can be read."""
TEXT = 11.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 22.0, 34.0  # margins of the axes

# name -> (on white, on black). Series: Okabe and Ito's colours that anyone can tell apart, each with 3:1 contrast on its background.
THEME = {
    "ink": ("#1b1f24", "#e6e9ec"),
    "faint": ("#d5dae0", "#3a4148"),
    "shade": ("#e3e7ec", "#2b3138"),
    "other": ("#6b7280", "#9aa3ad"),
    "c1": ("#0072b2", "#56b4e9"),
    "c2": ("#c75400", "#e69f00"),
    "c3": ("#00805d", "#2bc6a0"),
    "c4": ("#9b3d83", "#e09bc4"),
}
# what stands for each of them while matplotlib draws
STAND_IN = {name: f"#01{index:02x}fd" for index, name in enumerate(THEME)}
_BY_STAND_IN = {colour: f"var(--{name})" for name, colour in STAND_IN.items()}


@dataclass(frozen=True)
class Style:
    """A line of a picture and of its legend. dash: lengths on and off, () for none."""

    colour: str
    dash: tuple[float, ...] = ()
    width: float = 1.6
    marker: str = "o"

    def line(self) -> dict:
        """As matplotlib takes it."""
        return {
            "color": STAND_IN[self.colour],
            "linestyle": (0, self.dash) if self.dash else "-",
            "linewidth": self.width,
        }


_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label of a file may hold dollars
    "lines.scale_dashes": False,
    "font.size": TEXT,
    "axes.labelsize": TEXT,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": STAND_IN["other"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": STAND_IN["faint"],
    "grid.linewidth": 0.7,
    "text.color": STAND_IN["ink"],
    "axes.labelcolor": STAND_IN["ink"],
    "xtick.color": STAND_IN["other"],
    "xtick.labelcolor": STAND_IN["ink"],
    "ytick.color": STAND_IN["other"],
    "ytick.labelcolor": STAND_IN["ink"],
    "axes.formatter.useoffset": False,
}


def picture(ident: str, alt: str, height: float, draw: Callable[[Axes], None], up: str = "", across: str = "") -> str:
    """One pair of axes as an `<svg>` element. `ident`: of letters, digits and hyphens, another one for every picture of a page; `alt`:
    what a reader who does not see it is told; up, across: what the axes show, with units."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS | {"svg.hashsalt": ident})
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_axes(
            (LEFT / WIDTH, BOTTOM / height, 1 - (LEFT + RIGHT) / WIDTH, 1 - (TOP + BOTTOM) / height), facecolor="none"
        )
        axes.tick_params(length=0, pad=4)
        figure.text(2 / WIDTH, 1 - 3 / height, up, ha="left", va="top", size=TEXT)
        axes.set_xlabel(across, labelpad=2)
        draw(axes)
        out = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the font that measures lacks a sign of some label: the reader's has it
            figure.savefig(out, format="svg", metadata={name: None for name in ("Date", "Creator", "Format", "Type")})
    return _inline(out.getvalue(), ident, alt)


def _inline(svg: bytes, ident: str, alt: str) -> str:
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = _local(element.tag)
        for name in [name for name in element.attrib if name.startswith("{")]:
            element.set(_local(name), element.attrib.pop(name))
    used = set(re.findall(r"#([\w.-]+)", " ".join(_references(root))))
    _tidy(root, ident, used, False)
    view = root.get("viewBox")
    root.attrib.clear()
    root.attrib |= {"class": "picture", "viewBox": view, "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _references(root: ElementTree.Element) -> list[str]:
    return [element.get(name, "") for element in root.iter() for name in ("href", "clip-path")]


def _tidy(element: ElementTree.Element, ident: str, used: set[str], defined: bool) -> None:
    """In place: ids that are referred to get the picture's name, others go; colours, fonts, digits."""
    defined = defined or element.tag == "defs"
    for name, value in list(element.attrib.items()):
        if name == "id" and value not in used:
            del element.attrib[name]
        elif name == "id":
            element.set(name, f"{ident}-{value}")
        elif name in ("href", "clip-path"):
            element.set(name, value.replace("#", f"#{ident}-"))
        elif name == "style":
            value = re.sub(r"font-family:[^;]*;?\s*", "", value)
            value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)  # as matplotlib before 3.11 writes both
            element.set(name, re.sub(r"#[0-9a-f]{6}", lambda found: _BY_STAND_IN.get(found[0], found[0]), value))
        elif name in ("d", "x", "y"):
            element.set(name, _rounded(value, 2 if defined else 1))
        elif name == "transform" and value.startswith(("rotate(-0 ", "rotate(0 ")):
            del element.attrib[name]
    if element.tag != "text":
        element.text = None
    element.tail = None
    for child in list(element):
        if child.tag in ("style", "metadata"):
            element.remove(child)
        else:
            _tidy(child, ident, used, defined)


def _rounded(path: str, digits: int) -> str:
    return " ".join(re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.{digits}f}", path).split())


_MARKS = {
    "o": "M11 5a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "s": "M11.5 1.5H18.5V8.5H11.5z",
    "D": "M15 0.5L19.5 5L15 9.5L10.5 5z",
    "^": "M15 1L19 8.5H11z",
    "v": "M15 9L19 1.5H11z",
}


def swatch(style: Style, kind: str = "line") -> str:
    """A legend's sample of a style, as an `<svg>` element of 30 x 10 units. kind: "line", "mark", "both" or "area"."""
    inside = ""
    if kind in ("line", "both"):
        dash = f"stroke-dasharray:{','.join(f'{each:g}' for each in style.dash)};" if style.dash else ""
        inside = f'<path d="M0 5H30" style="fill:none;{dash}stroke-width:{style.width + 0.6:g};stroke:var(--{style.colour})"/>'
    if kind != "line":
        path = "M0 0H30V10H0z" if kind == "area" else _MARKS[style.marker]
        inside += f'<path d="{path}" style="fill:var(--{style.colour})"/>'
    return f'<svg class="key" viewBox="0 0 30 10" aria-hidden="true">{inside}</svg>'


def css() -> str:
    """The variables that the pictures' colours are, on white and on black."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in THEME.items()) for i in (0, 1))
    return (
        f":root{{color-scheme:light dark;--page:#ffffff;{light}}}\n"
        f"@media(prefers-color-scheme:dark){{:root{{--page:#14171a;{dark}}}}}\n"
        ".picture{display:block;width:100%;height:auto;font-family:inherit}\n"
        ".picture *{stroke-linejoin:round}\n"
        ".key{width:30px;height:10px;flex:none}\n"
    )


def escaped(text: object) -> str:
    """Any text as HTML shows it, also inside an attribute."""
    return html.escape(str(text), quote=True)
