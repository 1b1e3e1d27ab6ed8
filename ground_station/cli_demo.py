"""`spacemoe demo` and `spacemoe replay`: their arguments, and the one call that runs each.

Leaves out: the demo itself (demo.py), the replay (replay.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ground_station.cli_shared import (
    CODECS,
    EXIT_CHECK,
    EXIT_OK,
    POLICIES,
    UsageError,
    bundle_of,
    check_writable,
    positive,
    scenario_of,
)
from ground_station.cli_watch import watch_arguments, watch_of


def add(commands, command) -> None:
    """Declares them in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    demo = command("demo", "the main job on this machine: broker, four simulated boards, ground station, tokens", _demo)
    demo.add_argument("--prompt", default="In the beginning", help="text to go on from (default: %(default)r)")
    demo.add_argument("--tokens", type=positive, default=64, help="tokens to write (default: %(default)s)")
    _sampling_arguments(demo)
    demo.add_argument("--bundle", type=Path, help="bundle to run (default: the reference model)")
    demo.add_argument("--precision", default="int8", help="precision of the primary shards (default: %(default)s)")
    demo.add_argument("--replica", default="int4", help="precision of the replicas, or 'none' (default: %(default)s)")
    demo.add_argument(
        "--codec", choices=CODECS, default="q8", help="of hidden states on the wire (default: %(default)s)"
    )
    demo.add_argument(
        "--bits-per-value",
        type=float,
        metavar="BITS",
        help="payload that --codec importance is steered to (default: free, at a quality of about +1 %% perplexity)",
    )
    demo.add_argument(
        "--policy", choices=POLICIES, default="topk", help="which experts a token uses (default: %(default)s)"
    )
    demo.add_argument(
        "--temp-limit",
        type=float,
        default=85.0,
        metavar="C",
        help="of the boards, for budgeted (default: %(default)s °C)",
    )
    demo.add_argument("--nodes", type=positive, help="simulated boards (default: 4, or those of the scenario)")
    demo.add_argument(
        "--scenario",
        metavar="FILE",
        help="virtual satellites for the boards: a scenario file, or one of the kit's by name (hot-eclipse)",
    )
    demo.add_argument(
        "--links", action="store_true", help="impose the scenario's links on hidden states (default: they are shown)"
    )
    demo.add_argument(
        "--link-ms",
        type=float,
        metavar="MS",
        help="with --links and --codec importance: time on links that a token's messages are coded to fit into",
    )
    demo.add_argument("--broker", default="auto", help="auto, mosquitto, embedded or HOST:PORT (default: %(default)s)")
    demo.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and simulated boards in DIR")
    demo.add_argument("--ledger", type=Path, metavar="FILE", help="write one JSON line per token to FILE")
    demo.add_argument("--record", type=Path, metavar="DIR", help="write what `spacemoe replay DIR` needs to repeat it")
    demo.add_argument(
        "--no-parity", action="store_true", help="skip the single-process run that the text is checked against"
    )
    demo.add_argument(
        "--serve", action="store_true", help="page and API while it runs, and after the text until Ctrl-C"
    )
    watch_arguments(demo)
    replay = command(
        "replay", "repeat the decisions of a recorded run without boards, and compare them one by one", _replay
    )
    replay.add_argument("recording", type=Path, metavar="DIR", help="folder of `spacemoe demo --record DIR`")
    replay.add_argument("--bundle", type=Path, help="bundle of the recorded run (default: the reference model)")


def _sampling_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    sub.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of sampling and of the random policy (default: %(default)s)")


def _source(args: argparse.Namespace) -> str:
    if not args.scenario or args.record is None:
        return ""
    from ground_station import scenario_demo

    return scenario_demo.source(args.scenario)


def _replay(args: argparse.Namespace) -> int:
    try:
        from ground_station import replay
    except ModuleNotFoundError as error:
        raise RuntimeError(f"replay needs {error.name}: pip install 'spacemoe-kit[sim]'") from None

    result = replay.run(args.recording, bundle_of(args))
    print(json.dumps(result) if args.json else replay.report(result))
    return EXIT_CHECK if result["equal"] is False else EXIT_OK


def _demo(args: argparse.Namespace) -> int:
    from ground_station import demo
    from ground_station.local_fleet import FleetError
    from ground_station.sampling import Sampling
    from ground_station.text_stream import show

    if args.scenario and args.nodes:
        raise UsageError("--nodes goes without --scenario: a scenario names its boards")
    check_writable(args.ledger, "--ledger")
    if args.keep is not None and args.keep.exists() and not args.keep.is_dir():
        raise UsageError(f"{args.keep} is no folder: give another --keep DIR")
    options = demo.Options(
        bundle=bundle_of(args),
        prompt=args.prompt,
        tokens=args.tokens,
        sampling=Sampling(args.temperature, args.top_p, args.seed),
        precision=args.precision,
        replica=None if args.replica == "none" else args.replica,
        codec=args.codec,
        bits_per_value=args.bits_per_value,
        policy=args.policy,
        temp_limit_c=args.temp_limit,
        nodes=args.nodes or 4,
        broker=args.broker,
        keep=args.keep,
        ledger=args.ledger,
        parity=not args.no_parity,
        scenario=scenario_of(args.scenario) if args.scenario else None,
        scenario_source=_source(args),
        links=args.links,
        link_ms=args.link_ms,
        record=args.record,
        watch=watch_of(args, Path("archive"), args.limits) if args.serve else None,
    )
    quiet = args.json

    def hold(result: dict, watch, made) -> None:
        from ground_station import demo_serve

        print(json.dumps(result | {"url": watch.served.url}) if args.json else demo.report(result), flush=True)
        demo_serve.hold(watch, made, (lambda text: None) if quiet else show)

    try:
        result = demo.run(options, (lambda text: None) if quiet else show, hold)
    except FleetError as error:
        # the temporary folder that the text names is gone by now
        if args.keep is not None or isinstance(error, ValueError):  # what was asked for cannot be: there is no log
            raise
        raise FleetError(f"{error}; --keep DIR keeps the logs") from None
    if not args.serve:
        print(json.dumps(result) if args.json else demo.report(result))
    return EXIT_OK if result["parity"] is None or result["parity"]["equal"] is not False else EXIT_CHECK
