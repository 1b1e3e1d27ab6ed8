"""The sections of an experiment's report that are not over time: a picture, and beside it a table that says the same in words.

Every section is told what it may draw and gives HTML; one without data says which file is missing. Leaves out: traces over time
(experiment_traces.py), what was played, and the page around them (experiment_page.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ground_station import experiment_pictures as pictures
from ground_station.experiment_html import Row, figure, legend, pair, paragraph, section, table
from ground_station.experiment_pictures import Bar, Point
from ground_station.experiment_standing import Standing, short, shown
from ground_station.picture_svg import Style
from ground_station.results_folder import Results, token_latencies
from ground_station.results_head import ResultsError, clean, read_json

COLUMNS = (
    ("useful_tokens", "useful tokens", ",.0f", 1),
    ("perplexity_ratio", "perplexity ratio", ".4f", 1),
    ("joules_per_token", "J per token", ".5f", 1),
    ("over_limit_s", "s over the limit", ",.0f", 1),
    ("hottest_c", "hottest, °C", ".1f", 1),
    ("lowest_soc", "lowest charge, %", ".1f", 100),
    ("latency_ms_p50", "latency p50, ms", ".2f", 1),
    ("latency_ms_p99", "latency p99, ms", ".2f", 1),
    ("bytes_per_token", "bytes per token", ",.0f", 1),
)


def _row(each: Standing, cells: Sequence[str]) -> Row:
    return Row(f"{each.number}  {each.label}", tuple(cells), each.ours)


def policies(found: Sequence[Standing]) -> str:
    rows = []
    for each in found:
        cells = [each[name].text(form, scale) for name, _, form, scale in COLUMNS]
        share = "–" if each.share is None else each.share.text(".1f", 100)
        validity = f"invalid: {each.wrong}" if each.wrong else "valid"
        rows.append(_row(each, [str(each["useful_tokens"].n), *cells, share, validity]))
    names = ["policy", "n", *(name for _, name, _, _ in COLUMNS), "share of the bound, %", "validity"]
    return section(
        "Policies side by side",
        table("Mean ± standard deviation over n seeds", names, rows, texts=(len(names) - 1,)),
        paragraph(
            "Perplexity ratio: to the unconstrained model on the same tokens, weighted by what was served. Joules are over idle. "
            "Hottest and lowest charge: of any node at the end of any slot. A dash in the share: over the limit, so not bounded, or "
            "no bound was worked out.",
            "note",
        ),
    )


def _points(found: Sequence[Standing], x: str, y: str) -> list[Point]:
    known = [each for each in found if math.isfinite(each[x].mean) and math.isfinite(each[y].mean)]
    return [Point(each.number, each[x].mean, each[y].mean, each[x].bar, each[y].bar, each.style) for each in known]


def _against(ident: str, found: Sequence[Standing], x: str, across: str, form: str, title: str) -> str:
    """Perplexity ratio against a cost: lower and further left is better."""
    points = _points(found, x, "perplexity_ratio")
    if not points:
        return paragraph(f"{title}: no run has both figures.")
    alt = f"{title}: {len(points)} numbered points, the figures are in the table beside it; lower and further left is better"
    svg = pictures.plane(ident, alt, points, across, "perplexity ratio")
    names = ["number and policy", across, "perplexity ratio", "n"]
    ordered = sorted(found, key=lambda each: (not math.isfinite(each[x].mean), each[x].mean))
    rows = [_row(e, [e[x].text(form), e["perplexity_ratio"].text(".4f"), str(e[x].n)]) for e in ordered]
    over = [point for point in points if point.y > pictures.OFF_SCALE]
    edge = (
        f" Ratios over {pictures.OFF_SCALE:g} are at the upper edge, with their value."
        if 0 < len(over) < len(points)
        else ""
    )
    entries = [(style, each.label) for each, style in shown(tuple(found))] + [(Style("other"), "the others")]
    left = figure(svg, title) + legend(entries[: len(found)], "mark")
    left += paragraph(
        f"Lower and further left is better. Bars: ± one standard deviation, where it is wider than the sign.{edge}",
        "note",
    )
    return pair(left, table("In order of the cost", names, rows))


def budget(results: Results, found: Sequence[Standing]) -> str:
    parts = [
        _against(
            "budget",
            found,
            "joules_per_token",
            "joules per token, over idle",
            ".5f",
            "Perplexity against joules per token",
        )
    ]
    known = [each for each in found if math.isfinite(each["useful_tokens"].mean)]
    known.sort(key=lambda each: -each["useful_tokens"].mean)
    if known:
        limit = results.summary.bound.useful_tokens if results.summary and results.summary.bound else None
        bars = [
            Bar(
                f"{each.number}  {short(each.label)}",
                each["useful_tokens"].text(",.0f"),
                each["useful_tokens"].mean,
                each["useful_tokens"].bar,
                each.style,
                bool(each.wrong),
            )
            for each in known
        ]
        demand = _demand(results)
        alt = f"Useful tokens of {len(bars)} policies as bars, most first" + (
            f"; upper bound {limit:,.0f}" if limit else ""
        )
        svg = pictures.bars("useful", alt, bars, limit, "useful tokens in the run")
        says = f"Upright mark: the upper bound, {limit:,.0f}. " if limit else "No upper bound was worked out. "
        says += f"Hollow: not valid. The demand is {demand:,.0f} tokens."
        rows = [
            _row(
                e,
                [
                    e["useful_tokens"].text(",.0f"),
                    e["tokens"].text(",.0f"),
                    f"{100 * e['useful_tokens'].mean / demand:.1f}",
                    "–" if e.share is None else e.share.text(".1f", 100),
                    str(e["tokens"].n),
                ],
            )
            for e in known
        ]
        names = [
            "number and policy",
            "useful tokens",
            "tokens served",
            "useful, % of the demand",
            "share of the bound, %",
            "n",
        ]
        left = figure(svg, "Useful tokens, and the upper bound") + paragraph(says, "note")
        parts.append(pair(left, table("Most useful tokens first", names, rows)))
    return section("Quality against budget", *parts)


def _demand(results: Results) -> float:
    played = results.head.experiment
    return played.slots * played.slot_s * played.tokens_per_s


def latency(results: Results, found: Sequence[Standing]) -> str:
    title = "Latency of a token"
    known = token_latencies(results)
    styled = [(each, style) for each, style in shown(tuple(found)) if each.label in known]
    if not styled:
        return section(
            title, paragraph("No latencies: tokens.parquet is missing or has no row of a policy that is shown.")
        )
    alt = f"{title}: cumulative distributions of {len(styled)} policies; the percentiles are in the table beside it"
    svg = pictures.distributions("latency", alt, [(known[each.label], style) for each, style in styled], "latency, ms")
    rows = []
    for each in (each for each in found if each.label in known):
        values = known[each.label]
        cells = [f"{value:.2f}" for value in (*np.percentile(values, (10, 50, 90, 99)), values[-1])]
        rows.append(_row(each, [*cells, f"{len(values):,}"]))
    left = figure(svg, "Distributions of latency") + legend([(style, each.label) for each, style in styled])
    names = ["number and policy", "p10", "p50", "p90", "p99", "longest", "tokens"]
    return section(
        title,
        paragraph(
            "Estimated from the costs of the experiment, not measured: see the notes below. All seeds together.", "note"
        ),
        pair(left, table("Latency in ms", names, rows)),
    )


def wire_bytes(found: Sequence[Standing], compression: Path | None) -> str:
    parts = [
        _against(
            "bytes",
            found,
            "bytes_per_token",
            "bytes per token, both ways",
            ",.0f",
            "Perplexity against bytes per token",
        )
    ]
    parts.append(paragraph("Bytes are counted, of frames that carry one token: see the notes below.", "note"))
    if compression is not None:
        parts.append(_compression(compression))
    return section("Bytes against quality", *parts)


FAMILIES = (
    ("blocks of 32", "uniform blocks of 32", Style("c2", (6, 2.5), marker="s")),
    ("blocks of 64", "uniform blocks of 64", Style("c2", (2, 2), marker="^")),
    ("top-", "fewer experts, 4 bits", Style("c4", (8, 2, 2, 2), marker="D")),
    ("no importance", "entropy code, without importance", Style("c3", (2, 2), marker="v")),
    ("importance", "importance-aware rates", Style("c1", width=2.0)),
)
LEAST_LOSS = 0.05


def _compression(path: Path) -> str:
    """The curve of `spacemoe benchmark compression --json`.  Raises: ResultsError."""
    hint = "give the JSON of `spacemoe benchmark compression --json`"
    tree = read_json(path, hint)
    curve, n, bundle = tree.get("curve"), tree.get("n"), tree.get("bundle")
    if (
        not isinstance(curve, dict)
        or not 1 <= len(curve) <= 500
        or not isinstance(n, int)
        or not isinstance(bundle, str)
    ):
        raise ResultsError(f"{path} has no curve, n or bundle: {hint}")
    points: dict[str, tuple[float, float, float]] = {}
    for name, each in curve.items():
        keys = ("bits_per_value", "bytes_per_token", "loss_percent")
        values = [each.get(key) for key in keys] if isinstance(each, dict) else []
        good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e12 for v in values)
        if len(values) != 3 or not good or values[0] < 0:
            raise ResultsError(f"{path}: {clean(name)[:40]} has no {', '.join(keys)}: {hint}")
        points[clean(name)] = (float(values[0]), float(values[1]), float(values[2]))
    lines, rows, entries = [], [], []
    for prefix, title, style in FAMILIES:
        chosen = {name: values for name, values in points.items() if name.startswith(prefix)}
        if chosen:
            lines.append(([(bits, loss) for bits, _, loss in chosen.values()], style))
            entries.append((style, title))
    for name, (bits, size, loss) in points.items():
        rows.append(Row(name, (f"{bits:.2f}", f"{size:,.0f}", f"{loss:+.2f}"), name.startswith("importance")))
    if not lines:
        raise ResultsError(f"{path}: its curve has no setting of a known kind: {hint}")
    alt = f"Perplexity loss in percent against bits per value for {len(lines)} kinds of codec; the figures are in the table"
    svg = pictures.curves("codecs", alt, lines, "bits per value", "perplexity loss, % (log scale)", LEAST_LOSS, (1, 5))
    left = figure(svg, "Codecs: bits per value against perplexity") + legend(entries, "both")
    left += paragraph(
        f"Measured on held-out text with {clean(bundle)}, {n} draws together, both directions, headers included, by "
        f"`spacemoe benchmark compression`; not part of the experiment. Losses under {LEAST_LOSS:g} % are drawn at {LEAST_LOSS:g} %.",
        "note",
    )
    return pair(
        left, table("Codecs, all draws together", ["setting", "bits per value", "bytes per token", "loss, %"], rows)
    )
