"""How the policies of an experiment stand: means and spreads over seeds, validity in words, and which ones a picture of few lines shows.

Worked out of runs.parquet, not taken from summary.json, of which only the upper bound is used. Leaves out: drawing and HTML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ground_station.picture_svg import Style
from ground_station.results_folder import Results

OURS = "budgeted"
STYLES = (
    Style("c1", width=2.0),
    Style("c2", (6, 2.5), marker="s"),
    Style("c3", (2, 2), width=1.8, marker="^"),
    Style("c4", (8, 2, 2, 2), marker="D"),
)


@dataclass(frozen=True)
class Spread:
    """sd: standard deviation (n - 1), None of a single run; mean NaN: not known."""

    mean: float
    sd: float | None
    n: int

    @property
    def bar(self) -> float:
        return self.sd or 0.0

    def text(self, form: str, scale: float = 1.0) -> str:
        """ "mean ± sd" by a format such as ",.0f"; a dash where it is not known."""
        if not math.isfinite(self.mean):
            return "–"
        spread = "" if self.sd is None else f"\u00a0±\u00a0{self.sd * scale:{form}}"
        return f"{self.mean * scale:{form}}{spread}"


def spread(values: list[float]) -> Spread:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), sd, len(values))


@dataclass(frozen=True, eq=False)
class Standing:
    """A policy. number: the same in every table and picture; figures: by name (results_folder.FIGURES); share: of the upper bound, None
    where there is none or the policy is over the limit; wrong: why it is not valid, "" where it is; style: of its lines, if it has any."""

    number: int
    label: str
    policy: str
    figures: dict[str, Spread]
    share: Spread | None
    wrong: str
    style: Style | None = None

    @property
    def ours(self) -> bool:
        return self.policy == OURS

    def __getitem__(self, name: str) -> Spread:
        return self.figures[name]


def standings(results: Results) -> tuple[Standing, ...]:
    """Of every policy with at least one run, in the order of the experiment's file."""
    scenario, bound = results.head.scenario, results.summary.bound if results.summary else None
    found = []
    for number, contender in enumerate(results.head.experiment.contenders, 1):
        rows = results.of(contender.label)
        if not rows:
            continue
        figures = {name: spread([row.figures[name] for row in rows]) for name in rows[0].figures}
        over_s = [row.figures["over_limit_s"] for row in rows]
        least = [row.figures["lowest_soc"] for row in rows]
        wrong = []
        if not all(value <= 0 for value in over_s):
            wrong.append(f"{figures['over_limit_s'].mean:,.0f} s over {scenario.limit_c:g} °C")
        if not all(value >= scenario.floor_soc for value in least):
            wrong.append(f"charge under its floor of {100 * scenario.floor_soc:g} %")
        share = None
        if bound is not None and bound.useful_tokens and all(value <= 0 for value in over_s):
            share = spread([row.figures["useful_tokens"] / bound.useful_tokens for row in rows])
        found.append(Standing(number, contender.label, contender.policy, figures, share, "; ".join(wrong)))
    return _styled(found, {each.label: each.admission for each in results.head.experiment.contenders})


def _styled(found: list[Standing], admission: dict[str, str]) -> tuple[Standing, ...]:
    """The best of ours, the best valid baseline, topk with and without the ground station's caps, and others up to four."""
    best = sorted(found, key=lambda each: (bool(each.wrong), -_useful(each), each.number))
    topk = [each for each in best if each.policy == "topk"]
    roles = [
        [each for each in best if each.ours],
        [each for each in best if not each.ours and each.policy != "topk" and not each.wrong],
        [each for each in topk if admission[each.label] == "cap"],
        [each for each in topk if admission[each.label] != "cap"],
    ]
    chosen = [role[0] for role in roles if role]
    chosen += [each for each in best if each not in chosen]
    styles = {each.number: style for each, style in zip(chosen, STYLES)}
    return tuple(
        Standing(each.number, each.label, each.policy, each.figures, each.share, each.wrong, styles.get(each.number))
        for each in found
    )


def _useful(each: Standing) -> float:
    useful = each["useful_tokens"].mean
    return useful if math.isfinite(useful) else -1.0


def shown(found: tuple[Standing, ...]) -> list[tuple[Standing, Style]]:
    """Those with a style, in the order of STYLES."""
    chosen = [(each, each.style) for each in found if each.style is not None]
    return sorted(chosen, key=lambda each: STYLES.index(each[1]))


def best_of(found: tuple[Standing, ...], ours: bool) -> Standing | None:
    """The valid one with the most useful tokens, among ours or among the baselines."""
    valid = [each for each in found if each.ours == ours and not each.wrong]
    return max(valid, key=_useful, default=None)


def short(text: str, most: int = 34) -> str:
    """For pictures; tables have the whole."""
    return text if len(text) <= most else text[: most - 1] + "…"
