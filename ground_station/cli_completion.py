"""`spacemoe completion bash|zsh|fish`: a script for a shell that knows every sub-command, option and choice (shtab writes it).

It is printed and installed nowhere, and never starts `spacemoe` to complete. Leaves out names of nodes and alarms, which only a running
ground station knows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ground_station.cli_shared import EXIT_OK

SHELLS = ("bash", "zsh", "fish")
INSTALL = (
    'for this shell only: bash: source <(spacemoe completion bash); zsh: eval "$(spacemoe completion zsh)" after compinit; '
    "fish: spacemoe completion fish | source. To keep it: write it to ~/.local/share/bash-completion/completions/spacemoe, to "
    "_spacemoe in a folder of zsh's $fpath, or to ~/.config/fish/completions/spacemoe.fish"
)


def add(commands, command) -> None:
    """Declares it in `commands`, the group of sub-commands; command(name, help, run, group) makes one with --json."""
    completion = command("completion", "a script that completes spacemoe's words in a shell", _completion)
    completion.add_argument("shell", choices=SHELLS)
    completion.epilog = INSTALL


def _completion(args: argparse.Namespace) -> int:
    from ground_station import cli

    text = script(cli.parser(), args.shell)
    print(json.dumps({"shell": args.shell, "script": text}) if args.json else text)
    return EXIT_OK


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script. Arguments that are paths complete to files."""
    try:
        import shtab
    except ModuleNotFoundError:
        raise RuntimeError(
            "completion needs shtab, which is not installed: pip install 'spacemoe-kit[ground]'"
        ) from None
    _mark_paths(parser, shtab.FILE)
    return shtab.complete(parser, shell=shell)


def _mark_paths(parser: argparse.ArgumentParser, file: dict) -> None:
    for action in parser._actions:  # argparse has no public way to walk a parser; shtab goes this way as well
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _mark_paths(sub, file)
        elif action.type is Path and not action.choices:
            action.complete = file
