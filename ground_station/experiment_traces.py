"""The sections of an experiment's report over mission time: temperatures, charge, prices, precisions.

A small picture per node, of one seed and the few policies that matter, thinned to what a line can show; the tables beside them are of
all slots. Leaves out: the other sections (experiment_sections.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ground_station import experiment_pictures as pictures
from ground_station.experiment_html import Row, figure, legend, many, pair, paragraph, section, table
from ground_station.experiment_pictures import Line, stretch, thinned
from ground_station.experiment_standing import STYLES, Standing, shown
from ground_station.picture_svg import Style
from ground_station.results_folder import NodeTrace, Results, traces

MOST_NODES = 8


class Traced:
    """What is drawn over time: of the policies that pictures show, and of ours, the first seed that all of them have."""

    def __init__(self, results: Results, found: Sequence[Standing]):
        """Raises: ResultsError."""
        self.results, self.played = results, results.head.experiment
        self.shown = shown(tuple(found))
        ours = [each for each in found if each.ours][: len(STYLES)]
        self.ours = list(zip(ours, STYLES))
        labels = {each.label for each, _ in self.shown} | {each.label for each in ours}
        seeds = [set(row.seed for row in results.of(label)) for label in labels]
        common = [seed for seed in self.played.seeds if all(seed in each for each in seeds)]
        self.seed = common[0] if labels and common else None
        wanted = set() if self.seed is None else {(label, self.seed) for label in labels}
        self.found = {label: nodes for (label, _), nodes in traces(results, wanted).items()}

    def of(self, styled: Sequence[tuple[Standing, Style]]) -> list[tuple[Standing, Style]]:
        return [(each, style) for each, style in styled if each.label in self.found]

    def nodes(self) -> list[str]:
        """At most MOST_NODES, those that get hottest."""
        names = [name for name in self.results.head.scenario.nodes if any(name in each for each in self.found.values())]
        heat = {
            name: max(float(np.nanmax(n[name].values["temp_c"])) for n in self.found.values() if name in n)
            for name in names
        }
        hottest = sorted(names, key=lambda name: -heat[name])[:MOST_NODES]
        return [name for name in names if name in hottest]

    def says(self, how: str) -> str:
        step = stretch(self.played.slots)
        thin = f"; drawn is the {how} of every {step} slots ({step * self.played.slot_s:g} s)" if step > 1 else ""
        names, every = self.nodes(), self.results.head.scenario.nodes
        few = f"; the {len(names)} hottest of {len(every)} nodes" if len(names) < len(every) else ""
        return f"One run each, seed {self.seed}: no spread{thin}{few}. {self.results.head.provenance.capitalize()}."


def _minutes(trace: NodeTrace) -> np.ndarray:
    step = stretch(len(trace.values["mission_s"]))
    ends = list(range(step - 1, len(trace.values["mission_s"]), step))
    if ends[-1:] != [len(trace.values["mission_s"]) - 1]:
        ends.append(len(trace.values["mission_s"]) - 1)
    return trace.values["mission_s"][ends] / 60


def over_time(
    traced: Traced,
    styled: Sequence[tuple[Standing, Style]],
    title: str,
    name: str,
    unit: str,
    how: tuple[str, Callable[[np.ndarray], float]],
    axis: Callable[[float, float], tuple[float, float]],
    limit: tuple[float, str] | None,
    cell: Callable[[np.ndarray], str],
    column: str,
    scale: float = 1.0,
    note: str = "",
) -> str:
    """A small picture per node; the table: `cell` of each policy on each node, of all slots."""
    styled, nodes = traced.of(styled), traced.nodes()
    if not styled or not nodes:
        return section(
            title, paragraph("No traces: nodes.parquet is missing, or no seed has a run of every policy shown.")
        )
    every = [
        traced.found[each.label][node].values[name] * scale
        for each, _ in styled
        for node in nodes
        if node in traced.found[each.label]
    ]
    low, high = float(min(np.nanmin(v) for v in every)), float(max(np.nanmax(v) for v in every))
    values = axis(low, high)
    slot_min = traced.played.slot_s / 60
    drawn, away_any = [], False
    for index, node in enumerate(nodes):
        lines, lit, up = [], None, None
        for each, style in styled:
            trace = traced.found[each.label].get(node)
            if trace is not None:
                lines.append(Line(_minutes(trace), thinned(trace.values[name] * scale, how[1]), style))
                lit, up, minutes = trace.values["lit"], trace.values["up"], trace.values["mission_s"] / 60
        if not lines:
            continue
        dark = pictures.spans(minutes, lit < 0.5, slot_min)
        away = pictures.spans(minutes, up < 0.5, slot_min)
        away_any = away_any or bool(away)
        told = "; ".join(
            f"{e.label}: {cell(traced.found[e.label][node].values[name] * scale)}"
            for e, _ in styled
            if node in traced.found[e.label]
        )
        bound = f"; {limit[1]}" if limit else ""
        svg = pictures.over_time(
            f"{name}-{index}", f"{title}, {node}, {column}: {told}{bound}", lines, unit, values, limit, dark, away
        )
        drawn.append(figure(svg, node))
    rows = [
        Row(
            e.label,
            tuple(
                cell(traced.found[e.label][node].values[name] * scale) if node in traced.found[e.label] else "–"
                for node in nodes
            ),
            e.ours,
        )
        for e, _ in styled
    ]
    areas = [(Style("shade"), "eclipse")] + ([(Style("ink"), "at the foot: out of contact")] if away_any else [])
    return section(
        title,
        paragraph(" ".join(each for each in (note, traced.says(how[0])) if each), "note"),
        legend([(style, each.label) for each, style in styled], areas=areas),
        many(drawn),
        table(f"{column}, all slots", ["policy", *nodes], rows),
    )


def heat(traced: Traced) -> str:
    limit_c = traced.results.head.scenario.limit_c
    return over_time(
        traced,
        traced.shown,
        "Temperature of the nodes",
        "temp_c",
        "°C",
        ("highest", np.max),
        lambda low, high: (
            min(low, limit_c) - 3,
            max(high, limit_c) + 0.12 * (max(high, limit_c) - min(low, limit_c) + 3),
        ),
        (limit_c, f"limit {limit_c:g} °C"),
        lambda values: f"{np.max(values):.1f} °C, {traced.played.slot_s * int((values > limit_c).sum()):,.0f} s over",
        "hottest, and seconds over the limit",
    )


def battery(traced: Traced) -> str:
    floor = 100 * traced.results.head.scenario.floor_soc
    return over_time(
        traced,
        traced.shown,
        "Charge of the batteries",
        "soc",
        "charge, %",
        ("lowest", np.min),
        lambda low, high: (max(0.0, min(low, floor) - 8), max(high, floor) + 6),
        (floor, f"floor {floor:g} %"),
        lambda values: f"{np.min(values):.1f} % (end {values[-1]:.1f} %)",
        "lowest, and at the end",
        scale=100,
    )


def prices(traced: Traced) -> str:
    if not traced.ours:
        return section("Prices", paragraph("No policy of this experiment sets prices."))
    return over_time(
        traced,
        traced.ours,
        "Prices of a joule",
        "price",
        "nats per J",
        ("mean", np.mean),
        lambda low, high: (0, 1.08 * high or 1),
        None,
        lambda values: f"{np.mean(values):.3f} (highest {np.max(values):.3f})",
        "mean price, and the highest",
        note="What a joule on a node costs in nats, from its queues of heat and charge: the dearer, the more a run must be worth.",
    )


def precision(traced: Traced) -> str:
    title = "Precisions over time"
    drawn, rows, used = [], [], {}
    for index, (each, _) in enumerate(traced.of(traced.ours)):
        nodes = list(traced.found[each.label].values())
        length = min(len(node.values["mission_s"]) for node in nodes)
        runs = {name: np.sum([node.runs[name][:length] for node in nodes], 0) for name in nodes[0].runs}
        total = np.sum(list(runs.values()), 0) if runs else np.zeros(length)
        if not total.all():
            continue
        part = {name: 100 * values / total for name, values in runs.items()}
        mean = {name: float(100 * values.sum() / total.sum()) for name, values in runs.items()}
        used = {name: STYLES[i] for i, name in enumerate(part) if i < len(STYLES)}
        told = ", ".join(f"{name} {share:.1f} %" for name, share in mean.items())
        minutes = _minutes(nodes[0])
        parts = [thinned(part[name], np.mean) for name in used]
        rows.append(Row(each.label, tuple(f"{mean[name]:.1f}" for name in used), True))
        if drawn and max(mean.values()) > 99.9:  # one colour says nothing that the table does not
            continue
        svg = pictures.shares(
            f"precision-{index}", f"{title}, {each.label}: {told}", minutes[: len(parts[0])], parts, list(used.values())
        )
        drawn.append(figure(svg, each.label))
    if not drawn:
        return section(title, paragraph("No traces of a policy that chooses precisions."))
    return section(
        title,
        paragraph("Share of a token's expert runs, over all nodes. " + traced.says("mean"), "note"),
        legend([(style, name) for name, style in used.items()], "area"),
        pair("".join(drawn), table("Share of all runs, %", ["policy", *used], rows)),
    )
