"""`spacemoe experiment report`: one self-contained HTML page about a folder of results, finished or not.

Figures and spreads are worked out of the folder's tables; each section says what its figures are. The page holds no time of its own:
the same folder gives the same page to the byte. Leaves out: reading (results_folder.py), the sections (experiment_sections.py,
experiment_traces.py).
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

from ground_station import experiment_html as html
from ground_station import experiment_sections as sections
from ground_station import experiment_traces as over_time
from ground_station import results_folder
from ground_station.experiment_standing import Standing, best_of, standings
from ground_station.results_folder import Results
from ground_station.results_head import Bound
from node_agent import shard

PAGE = "report.html"


def write(folder: Path, out: Path | None = None, compression: Path | None = None) -> dict:
    """Writes the page of `folder` to `out` (default: report.html in it), whole or not at all; what it is, for JSON.

    compression: a file of `spacemoe benchmark compression --json`.  Raises: ResultsError, OSError.
    """
    results = results_folder.read(folder)
    content = render(results, compression)
    out = folder / PAGE if out is None else out
    with shard.atomic_file(out) as file:
        file.write(content)
    return {
        "page": str(out),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "experiment": results.head.experiment.name,
        "runs": len(results.runs or ()),
        "of_runs": results.expected,
        "finished": results.finished,
        "provenance": results.head.provenance,
    }


def text(result: dict) -> str:
    """For people, in lines of at most 80 columns where the path allows."""
    state = "" if result["finished"] else "; unfinished, and the page says so"
    return (
        f"{result['page']}: {result['bytes'] / 1e6:.2f} MB, {result['experiment']}, {result['runs']} of "
        f"{result['of_runs']} runs{state}"
    )


def render(results: Results, compression: Path | None = None) -> bytes:
    """Raises: ResultsError."""
    found = standings(results)
    parts = [_head(results, found)]
    if found:
        traced = over_time.Traced(results, found)
        parts += [
            sections.policies(found),
            sections.budget(results, found),
            over_time.heat(traced),
            over_time.battery(traced),
            over_time.prices(traced),
            over_time.precision(traced),
            sections.latency(results, found),
            sections.wire_bytes(found, compression),
        ]
    parts += [_played(results), _repeat(results)]
    return html.page(f"Experiment {results.head.experiment.name}", *parts)


def _head(results: Results, found: tuple[Standing, ...]) -> str:
    head, played = results.head, results.head.experiment
    seeds = "one seed" if len(played.seeds) == 1 else f"{len(played.seeds)} seeds"
    lines = [
        html.paragraph(
            f"{len(played.contenders)} policies, {seeds} each, through {played.slots * played.slot_s:,g} s of mission time in the scenario "
            f"{head.scenario.name} with {len(head.scenario.nodes)} nodes. Everything is {head.provenance} but the model, its text and "
            "what the costs say of themselves."
        )
    ]
    if not results.finished:
        runs = len(results.runs or ()) or results.parts
        lines.append(
            html.paragraph(
                f"Unfinished: {runs} of {results.expected} runs are there"
                + ("" if results.summary else ", and no summary.json, so no upper bound")
                + ". The page shows what there is. `spacemoe experiment run` with the same file and folder goes on where it was.",
                "banner",
            )
        )
    ours, base = best_of(found, True), best_of(found, False)
    for who, each in (("budgeted", ours), ("the baselines", base)):
        if each is not None:
            share = "" if each.share is None else f", {each.share.text('.1f', 100)}\u00a0% of the upper bound"
            lines.append(
                html.paragraph(
                    f"Best of {who} within the limits: {each.label}, {each['useful_tokens'].text(',.0f')} useful tokens (n = "
                    f"{each['useful_tokens'].n}){share}, {each['perplexity_ratio'].text('.4f')} times the perplexity, "
                    f"{each['joules_per_token'].text('.5f')} J per token."
                )
            )
    if wrong := [each for each in found if each.wrong]:
        told = "; ".join(f"{each.label} ({each.wrong})" for each in wrong)
        lines.append(html.paragraph(f"Not valid: {told}."))
    return "".join(lines)


def _played(results: Results) -> str:
    head, played, scenario = results.head, results.head.experiment, results.head.scenario
    useful = f"coverage at least {played.coverage:g} in every layer and divergence at most {played.kl_nats:g} nats"
    costs = "; ".join(f"{name}: {joules:g} J, {ms:g} ms" for name, (joules, ms) in played.costs.items())
    facts = [
        ("provenance", f"{head.provenance}; the model and its text are real"),
        ("scenario", f"{scenario.name}: {', '.join(scenario.nodes)}"),
        ("limits", f"{scenario.limit_c:g} °C; charge at least {100 * scenario.floor_soc:g} %"),
        ("a board's payload", f"{scenario.idle_w:g} W idle, {scenario.busy_w:g} W busy"),
        ("mission time", f"{played.slots} slots of {played.slot_s:g} s, {played.slots * played.slot_s:,g} s"),
        (
            "demand",
            f"{played.tokens_per_s:g} tokens per s, {played.slots * played.slot_s * played.tokens_per_s:,.0f} in all",
        ),
        ("useful", results.summary.useful if results.summary else useful),
        ("links", "nodes out of contact cannot be used" if played.contacts else "every node always in contact"),
        ("seeds", ", ".join(map(str, played.seeds))),
        ("precisions", ", ".join(played.precisions)),
        ("costs of one row through one expert", costs),
        ("costs: source", played.source),
        ("model", f"{head.bundle.name}, manifest sha256 {head.bundle.manifest_sha256}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in head.versions.items())),
        ("digest of all that a run depends on", head.digest),
        ("written", head.written_utc),
    ]
    if results.summary:
        facts += [("note", each) for each in results.summary.notes]
        if bound := results.summary.bound:
            facts.append(("upper bound", _bound(bound)))
    knobs = [
        html.Row(
            f"{number}  {each.label}",
            (
                each.policy,
                each.admission,
                ", ".join(f"{name} = {value:g}" for name, value in each.knobs.items()) or "–",
            ),
        )
        for number, each in enumerate(played.contenders, 1)
    ]
    table = html.table(
        "Policies", ["number and label", "policy", "what bounds its load", "knobs"], knobs, texts=(1, 2, 3)
    )
    means = (
        "cap: the ground station's duty caps bound what a node may draw. throttle: nothing does but the board's own firmware, which at the "
        "limit falls to its floor until it has cooled."
    )
    return html.section("What was played", html.facts(facts), table, html.paragraph(means, "note"))


def _bound(bound: Bound) -> str:
    if bound.useful_tokens is None:
        return bound.why or "none"
    said = [
        f"{bound.useful_tokens:,.0f} useful tokens, by a plan that knows the orbit ahead and mixes what these runs did"
    ]
    if bound.share_of_demand is not None:
        said.append(f"{100 * bound.share_of_demand:.1f} % of the demand")
    if bound.disagreement_of_two_formulations is not None:
        said.append(f"two formulations differ by {bound.disagreement_of_two_formulations:.2g}")
    if bound.too_kind_k is not None:
        said.append(f"its true heat is {bound.too_kind_k:+.2f} K from the limit")
    return "; ".join(said)


def _repeat(results: Results) -> str:
    played = results.head.experiment
    seeds = " ".join(map(str, played.seeds))
    run = f"spacemoe experiment run {shlex.quote(played.name)} --seeds {seeds} --slots {played.slots} -o DIR"
    return html.section(
        "How to repeat it",
        html.command(f"{run}\nspacemoe experiment report DIR"),
        html.paragraph(
            "Where the experiment is none of the kit, give its file in place of its name; with --only LABEL ... where some of the file's "
            "policies were left out. The same versions on the same kind of processor give the same figures.",
            "note",
        ),
    )
