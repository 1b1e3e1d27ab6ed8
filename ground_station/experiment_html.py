"""The HTML of an experiment's report: one page without scripts that fetches nothing, its tables, figures and legends.

Everything that comes from a file goes through `escaped`. Leaves out: what the page says (experiment_page.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ground_station.picture_svg import Style, css, escaped, swatch

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1200px;margin:0 auto;padding:16px}
h1{font-size:1.5rem;line-height:1.25;margin:.4em 0}
h2{font-size:1.2rem;margin:2.2em 0 .3em;border-top:1px solid var(--faint);padding-top:.8em}
p{max-width:75ch;margin:.5em 0}
.banner{border:2px solid var(--c2);border-radius:6px;padding:8px 12px;max-width:75ch}
.note{color:var(--other);font-size:.9rem}
.pair{display:grid;grid-template-columns:minmax(0,1fr);gap:8px 32px;align-items:start}
@media(min-width:960px){.pair{grid-template-columns:minmax(0,500px) minmax(0,1fr)}}
.many{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:4px 24px}
figure{margin:8px 0;max-width:520px}
figcaption{font-size:.9rem;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:6px 0;padding:0;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:7px}
.scroll{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:4px 9px;text-align:right;border-bottom:1px solid var(--faint);vertical-align:top;white-space:nowrap}
thead th{vertical-align:bottom;white-space:normal;min-width:4.5em}
th.text,td.text{text-align:left;white-space:normal;min-width:9em;overflow-wrap:anywhere}
tbody th{font-weight:600;position:sticky;left:0;background:var(--page)}
td small{color:var(--other);font-size:inherit;display:block}
caption{text-align:left;color:var(--other);padding:4px 0}
tr.mine th,tr.mine td{background:var(--shade)}
dl{display:grid;grid-template-columns:minmax(0,1fr);margin:8px 0}
@media(min-width:600px){dl{grid-template-columns:12em minmax(0,1fr);gap:4px 16px}}
dt{color:var(--other)}
dd{margin:0 0 6px;overflow-wrap:anywhere}
pre{overflow-x:auto;background:var(--shade);padding:8px 12px;border-radius:6px;font-size:.85rem}
"""


@dataclass(frozen=True)
class Row:
    """One row: its name, the cells after it, and whether it is marked (the policy that the page is about)."""

    name: str
    cells: tuple[str, ...]
    marked: bool = False


def table(caption: str, columns: Sequence[str], rows: Sequence[Row], texts: Sequence[int] = ()) -> str:
    """Plain texts, escaped here, a spread under its mean. columns: the first is that of the rows' names; texts: those that are words."""

    def cell(tag: str, index: int, text: str, more: str = "") -> str:
        kind = ' class="text"' if index == 0 or index in texts else ""
        mean, sign, sd = text.partition("\u00a0±\u00a0")
        small = f" <small>± {escaped(sd)}</small>" if tag == "td" and sign and index not in texts else ""
        return f"<{tag}{kind}{more}>{escaped(mean if small else text)}{small}</{tag}>"

    head = "".join(cell("th", index, text, ' scope="col"') for index, text in enumerate(columns))
    body = "".join(
        ('<tr class="mine">' if row.marked else "<tr>")
        + cell("th", 0, row.name, ' scope="row"')
        + "".join(cell("td", index, text) for index, text in enumerate(row.cells, 1))
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(caption)}"><table><caption>{escaped(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def figure(svg: str, caption: str) -> str:
    return f"<figure><figcaption>{escaped(caption)}</figcaption>\n{svg}\n</figure>\n"


def legend(entries: Sequence[tuple[Style, str]], kind: str = "line", areas: Sequence[tuple[Style, str]] = ()) -> str:
    """kind: as `swatch` has it; `areas`: after the entries."""
    items = [(swatch(style, kind), text) for style, text in entries] + [(swatch(s, "area"), t) for s, t in areas]
    return '<ul class="legend">' + "".join(f"<li>{key}{escaped(text)}</li>" for key, text in items) + "</ul>\n"


def pair(left: str, right: str) -> str:
    return f'<div class="pair"><div>{left}</div><div>{right}</div></div>\n'


def many(figures: Sequence[str]) -> str:
    return f'<div class="many">{"".join(figures)}</div>\n'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>\n{''.join(parts)}</section>\n"


def paragraph(text: str, kind: str = "") -> str:
    start = f'<p class="{kind}">' if kind else "<p>"
    return f"{start}{escaped(text)}</p>\n"


def facts(entries: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>\n" for name, text in entries) + "</dl>\n"


def command(text: str) -> str:
    return f'<pre tabindex="0"><code>{escaped(text)}</code></pre>\n'


def page(title: str, *parts: str) -> bytes:
    """The whole page. Its policy forbids a browser to fetch or run anything, should an escape ever be missing."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escaped(title)}</title>\n<style>\n{css()}{_CSS}</style></head>\n<body><main>\n"
        f"<h1>{escaped(title)}</h1>\n{''.join(parts)}</main></body></html>\n"
    ).encode()
