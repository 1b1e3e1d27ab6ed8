"""`spacemoe up` and `spacemoe generate`: a fleet of flashed boards, and text from it. Leaves out: the work (up.py, generate.py)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ground_station.cli_shared import (
    CODECS,
    EXIT_CHECK,
    EXIT_OK,
    POLICIES,
    UsageError,
    bundle_of,
    plain,
    positive,
    wrapped,
)
from ground_station.cli_watch import watch_arguments, watch_of

if TYPE_CHECKING:
    from ground_station import generate

LOOPBACK = "127.0.0.1"
LIMITS = "limits.toml"  # in the fleet folder: instead of the kit's own


def add(commands, command) -> None:
    """Declares them in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    up = command("up", "the ground station of a flashed fleet: broker, enrolment, time; runs until Ctrl-C", _up)
    up.add_argument("--dir", type=Path, required=True, metavar="FLEET", help="folder of `spacemoe fleet init`")
    up.add_argument("--bind", default=LOOPBACK, metavar="ADDRESS", help="to listen on (default: %(default)s)")
    up.add_argument("--time-port", type=int, default=123, metavar="N", help="of SNTP; 0: none (default: %(default)s)")
    watch_arguments(up)
    up.add_argument(
        "--bundle", type=Path, help="serve its model to the API, on the fleet's boards (default: no tokens are made)"
    )
    _making(up)
    up.add_argument(
        "--web-bind",
        default=LOOPBACK,
        metavar="ADDRESS",
        help="of page and API; beyond loopback: TLS, and a token of `spacemoe token` (default: %(default)s)",
    )
    generate = command("generate", "text from the boards of a fleet; `spacemoe up` runs beside it", _generate)
    generate.add_argument(
        "prompt", nargs="?", default="In the beginning", help="text to go on from (default: %(default)r)"
    )
    generate.add_argument("--dir", type=Path, required=True, metavar="FLEET", help="folder of `spacemoe fleet init`")
    generate.add_argument("--bundle", type=Path, help="bundle to run (default: the reference model)")
    generate.add_argument("--tokens", type=positive, default=64, help="tokens to write (default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: %(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="of sampling and of random (default: %(default)s)")
    _making(generate)
    generate.add_argument(
        "--bind", default=LOOPBACK, metavar="ADDRESS", help="of the data plane (default: %(default)s)"
    )
    generate.add_argument("--broker", default=LOOPBACK, metavar="HOST", help="where `up` runs (default: %(default)s)")
    generate.add_argument(
        "--parity", action="store_true", help="compare with one process here; exit code 3 where tokens differ"
    )


def _making(sub: argparse.ArgumentParser) -> None:
    """How tokens are made on the boards."""
    sub.add_argument("--precision", default="int8", help="of the primary shards (default: %(default)s)")
    sub.add_argument("--replica", default="int4", help="of the replicas, or 'none' (default: %(default)s)")
    sub.add_argument("--codec", choices=CODECS, default="q8", help="of hidden states (default: %(default)s)")
    sub.add_argument("--bits-per-value", type=float, metavar="BITS", help="as of demo")
    sub.add_argument("--policy", choices=POLICIES, default="topk", help="default: %(default)s")
    sub.add_argument("--temp-limit", type=float, default=85.0, metavar="C", help="for budgeted (default: %(default)s)")
    sub.add_argument(
        "--nodes", default="", metavar="A,B", help="which boards (default: all that are enrolled and online)"
    )
    sub.add_argument("--patience", type=float, default=30.0, metavar="S", help="for a board (default: %(default)s)")
    sub.add_argument(
        "--timeout", type=float, default=2.0, metavar="S", help="for a layer's answer (default: %(default)s)"
    )


def _up(args: argparse.Namespace) -> int:
    from ground_station import up
    from ground_station.fleet_records import GROUND_CERT, GROUND_KEY, FleetFolder

    if not 0 <= args.time_port < 65_536:
        raise UsageError(f"--time-port {args.time_port} is no port: give 0 to 65535")

    def say(line: str) -> None:
        print(json.dumps({"said": line}) if args.json else wrapped(line), flush=True)

    watch = None
    if args.web_port:
        from ground_station.cli_token import FILE

        folder = FleetFolder.open(args.dir)
        beyond = {} if up.is_loopback(args.web_bind) else {"tokens": folder.path(FILE), "hosts": folder.info.hosts}
        if beyond:
            beyond |= {"certificate": folder.path(GROUND_CERT), "key": folder.path(GROUND_KEY)}
        limits = args.limits or (folder.path(LIMITS) if folder.path(LIMITS).exists() else None)
        watch = watch_of(args, folder.path("archive"), limits, bind=args.web_bind, **beyond)
    made = _generate_options(args, bind=args.bind, broker=args.bind) if args.bundle is not None else None
    if made is not None and watch is None:
        raise UsageError("--bundle is served by the API: give it a --web-port")
    with up.running(up.Options(args.dir, args.bind, args.time_port, watch, made), say) as ground:
        info = ground.folder.info
        say(f"fleet {info.fleet}: {len(ground.folder.nodes())} nodes on record; Ctrl-C ends it")
        up.follow(ground, say)
    return EXIT_OK


def _generate_options(args: argparse.Namespace, **more: object) -> generate.Options:
    """Raises: UsageError."""
    from ground_station import generate

    for name, value in (("--patience", args.patience), ("--timeout", args.timeout)):
        if not 0 < value < 1e6:
            raise UsageError(f"{name} {value:g} is no number of seconds above 0")
    return generate.Options(
        folder=args.dir,
        bundle=bundle_of(args),
        precision=args.precision,
        replica=None if args.replica == "none" else args.replica,
        codec=args.codec,
        bits_per_value=args.bits_per_value,
        policy=args.policy,
        temp_limit_c=args.temp_limit,
        nodes=tuple(filter(None, args.nodes.split(","))),
        patience_s=args.patience,
        timeout_s=args.timeout,
        **more,
    )


def _generate(args: argparse.Namespace) -> int:
    from ground_station import demo_report, generate
    from ground_station.sampling import Sampling
    from ground_station.text_stream import show

    options = _generate_options(
        args,
        prompt=args.prompt,
        tokens=args.tokens,
        sampling=Sampling(args.temperature, args.top_p, args.seed),
        bind=args.bind,
        broker=args.broker,
        parity=args.parity,
    )
    quiet = args.json or not sys.stderr.isatty()
    result = generate.run(
        options, (lambda text: None) if args.json else show, (lambda done, total, what: None) if quiet else _progress
    )
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(map(plain, demo_report.report(result).split("\n"))))
    return EXIT_CHECK if result["parity"] is not None and result["parity"]["equal"] is False else EXIT_OK


def _progress(done: int, total: int, what: str) -> None:
    share = done / total if total else 1.0
    end = "\n" if done >= total else ""
    print(
        f"\r[{'#' * int(24 * share):24}] {done / 1e6:.1f}/{total / 1e6:.1f} MB {what[:34]:34}",
        end=end,
        file=sys.stderr,
        flush=True,
    )
