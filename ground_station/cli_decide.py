"""`spacemoe plan`, `experiment` and `study`: decisions worked out without boards.

Leaves out: the decisions (plan.py, experiment.py, the study_*.py modules).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from ground_station.cli_shared import (
    EXIT_CHECK,
    EXIT_OK,
    PLACEMENTS,
    UsageError,
    bundle_of,
    check_writable,
    positive,
    scenario_of,
    wrapped,
)


def add(commands, command) -> None:
    """Declares them in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    plan = command("plan", "who would hold which expert, the expected latency, and what binds", _plan)
    plan.add_argument("bundle", type=Path, nargs="?", help="bundle (default: the reference model)")
    plan.add_argument("--nodes", default="4", metavar="N|FILE", help="equal nodes, or a TOML file (default: 4)")
    plan.add_argument("--memory", type=float, metavar="MB", help="per node for experts (default: 1.25 copies in all)")
    plan.add_argument("--policy", choices=PLACEMENTS, default="budgeted", help="default: %(default)s")
    plan.add_argument("--seed", type=int, default=0, help="of routing sets and of random (default: %(default)s)")

    experiment = commands.add_parser("experiment", help="selection policies side by side on one scenario")
    experiments = experiment.add_subparsers(dest="kind", metavar="KIND", required=True)
    played = command("run", "play a scenario with each policy, in mission time", _experiment_run, experiments)
    played.add_argument("file", help="experiment file (TOML), or the name of one of the kit, such as hot-eclipse")
    played.add_argument("--bundle", type=Path, help="bundle (default: the reference model)")
    played.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="instead of the file's")
    played.add_argument("--slots", type=positive, help="instead of the file's")
    played.add_argument("--no-bound", action="store_true", help="leave out the upper bound (a linear programme)")
    played.add_argument("--only", nargs="+", metavar="LABEL", help="only these of the file's policies")
    played.add_argument("-o", "--out", type=Path, metavar="DIR", help="write all results there; goes on if stopped")
    played.add_argument("--no-resume", action="store_true", help="replace what an experiment left in DIR")
    played.add_argument("--jobs", type=positive, default=1, metavar="N", help="on N processes (default: %(default)s)")
    played.add_argument("--dask", metavar="HOST:PORT", help="on a Dask cluster, which must be trusted: its scheduler")
    report = command(
        "report", "one HTML page about what `experiment run -o DIR` wrote", _experiment_report, experiments
    )
    report.add_argument("folder", type=Path, metavar="DIR", help="folder of results, also of a stopped run")
    report.add_argument("-o", "--out", type=Path, metavar="FILE.html", help="default: report.html in DIR")
    report.add_argument("--compression", type=Path, metavar="FILE", help="JSON of `benchmark compression --json`")
    study = commands.add_parser("study", help="studies without boards: constellations, placement")
    studies = study.add_subparsers(dest="kind", metavar="KIND", required=True)
    xnet = command("space-xnet", "placements on 1056 satellites, beside the published figures", _study_xnet, studies)
    xnet.add_argument("--slots", type=positive, default=200, help="of one orbit (default: %(default)s)")
    xnet.add_argument("--seeds", type=positive, default=5, help="default: %(default)s")
    dark = command(
        "coverage", "perplexity as nodes go out of contact, at 1.25 copies of memory", _study_coverage, studies
    )
    dark.add_argument("--bundle", type=Path, help="bundle (default: the reference model)")
    dark.add_argument("--nodes", type=positive, default=8, help="in a ring (default: %(default)s)")
    dark.add_argument("--tokens", type=positive, default=2048, help="of held-out text (default: %(default)s)")
    dark.add_argument("--draws", type=positive, default=12, help="random subsets of nodes (default: %(default)s)")
    dark.add_argument("--seed", type=int, default=0, help="of text and draws (default: %(default)s)")
    life = command(
        "battery", "cycles to 80 % capacity under policies that serve the same tokens", _study_battery, studies
    )
    life.add_argument("--bundle", type=Path, help="bundle (default: the reference model)")
    life.add_argument("--scenario", default="small-battery", help="name or file (TOML) (default: %(default)s)")
    life.add_argument("--orbits", type=positive, default=2, help="the first is dropped (default: %(default)s)")
    life.add_argument("--seeds", type=positive, default=3, help="draws of the text (default: %(default)s)")
    life.add_argument("--seed", type=int, default=0, help="the first one (default: %(default)s)")
    life.add_argument(
        "--tokens-per-s", type=float, default=150.0, metavar="N", help="what all must serve (default: %(default)g)"
    )
    gap = command("placement", "budgeted against the exact optimum; half of the nodes dark", _study_placement, studies)
    gap.add_argument("--bundle", type=Path, help="bundle of the second part (default: the reference model)")
    gap.add_argument("--instances", type=positive, default=20, help="random small fleets (default: %(default)s)")
    gap.add_argument("--seed", type=int, default=0, help="of the first instance (default: %(default)s)")
    gap.add_argument("--nodes", type=positive, default=8, help="of the second part (default: %(default)s)")
    gap.add_argument("--limit-s", type=positive, default=30, help="per exact programme (default: %(default)s)")


def _plan(args: argparse.Namespace) -> int:
    from ground_station import plan, plan_fleet
    from node_agent.shard import read_manifest

    assumed = None
    if re.fullmatch(r"[+-]?[0-9]+", args.nodes):
        count = int(args.nodes[:9])
        if args.memory is None:
            fleet, assumed = plan_fleet.sharing(count, read_manifest(bundle_of(args)))
        else:
            fleet = plan_fleet.alike(count, args.memory)
    elif args.memory is not None:
        raise UsageError("--memory goes with --nodes N: a file of nodes names each one's memory_mb")
    else:
        fleet = plan_fleet.read(Path(args.nodes))
    result = plan.plan(bundle_of(args), fleet, args.policy, args.seed) | {"assumed": assumed}
    if args.json:
        print(json.dumps(result))
        return EXIT_OK
    lines = plan.report(result).splitlines()
    table = len(result["nodes"]) + 1  # may be up to 100 columns; it would be no table in wrapped lines
    print("\n".join([*([wrapped(assumed)] if assumed else []), *lines[:table], *map(wrapped, lines[table:])]))
    return EXIT_OK


def _experiment_run(args: argparse.Namespace) -> int:
    from ground_station import experiment, experiment_report, experiment_sweep

    if args.no_resume and args.out is None:
        raise UsageError("--no-resume goes with -o DIR")
    chosen = experiment.find(args.file).narrowed(args.seeds, args.slots, args.only)
    where = experiment_sweep.Where(args.jobs, args.dask)
    result = experiment_report.run(
        chosen, scenario_of(chosen.scenario), bundle_of(args), not args.no_bound, where, args.out, not args.no_resume
    )
    print(json.dumps(result) if args.json else experiment_report.text(result))
    if args.out is not None and not args.json:
        print(wrapped(f"kept in {args.out}; a page about it: spacemoe experiment report {args.out}"))
    return EXIT_OK


def _experiment_report(args: argparse.Namespace) -> int:
    from ground_station import experiment_page

    check_writable(args.out, "-o")
    result = experiment_page.write(args.folder, args.out, args.compression)
    print(json.dumps(result) if args.json else wrapped(experiment_page.text(result)))
    return EXIT_OK


def _study_xnet(args: argparse.Namespace) -> int:
    from ground_station import study_space_xnet as study

    result = study.run(study.Options(slots=args.slots, seeds=args.seeds))
    print(json.dumps(result) if args.json else study.report(result))
    return EXIT_OK


def _study_coverage(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ground_station import study_coverage as study

    study.check(args.nodes)
    with tqdm(total=study.plays(args.nodes, args.draws), desc="coverage", disable=None, leave=False) as bar:
        result = study.run(bundle_of(args), args.nodes, args.tokens, args.draws, args.seed, bar.update)
    print(json.dumps(result) if args.json else study.report(result))
    return EXIT_OK


def _study_battery(args: argparse.Namespace) -> int:
    import sys

    from tqdm import tqdm

    from ground_station import study_battery as study

    seeds = tuple(args.seed + i for i in range(min(args.seeds, study.MAX_SEEDS + 1)))
    total = len(seeds) * len(study.VARIANTS)
    with tqdm(total=total, unit="run", disable=None if sys.stderr is not None else True, leave=False) as bar:

        def show(text: str) -> None:
            bar.set_description(text)
            bar.update(bar.n < show.begun)
            show.begun += 1

        show.begun = 0
        scenario = scenario_of(args.scenario)
        result = study.run(bundle_of(args), scenario, args.orbits, seeds, args.tokens_per_s, progress=show)
    print(json.dumps(result) if args.json else study.report(result))
    return EXIT_OK if result["valid"] else EXIT_CHECK


def _study_placement(args: argparse.Namespace) -> int:
    from ground_station import study_placement as study

    result = study.run(bundle_of(args), args.instances, args.seed, args.limit_s, args.nodes)
    print(json.dumps(result) if args.json else study.report(result))
    return EXIT_OK
