"""`spacemoe completion`: real shells source the script and are asked to complete, as they do it when a person presses Tab."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from conftest import lacking
from mission_cli import here, parser

from ground_station import cli_completion


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for shell in cli_completion.SHELLS:
        done = here("completion", shell)
        assert done.returncode == 0, done.stderr
        (folder / shell).write_text(done.stdout)
    return folder


def run(shell: str, text: str, cwd=None) -> list[str]:
    if shutil.which(shell) is None:
        lacking(shell, f"apt-get install {shell}")
    flags = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run([shell, *flags, "-c", text], capture_output=True, text=True, timeout=60, cwd=cwd)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [line.partition("\t")[0] for line in done.stdout.split("\n") if line]


def bash(scripts, words: list[str], cwd=None) -> list[str]:
    """What bash offers for the last of `words`."""
    quoted = " ".join(f"'{word}'" for word in words)
    return run(
        "bash",
        f"""source {scripts / "bash"}
        COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}
        offer=$(complete -p spacemoe | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        "$offer" spacemoe "${{COMP_WORDS[$COMP_CWORD]}}" ""
        printf '%s\\n' "${{COMPREPLY[@]}}" """,
        cwd,
    )


CASES = [
    (["doct"], ["doctor"]),
    (["alarms", "sh"], ["shelve"]),
    (["events", "--severity", "w"], ["warning", "watch"]),
    (["events", "--foll"], ["--follow"]),
    (["fleet", "re"], ["release", "renew-ground", "revoke"]),
    (["completion", ""], ["bash", "fish", "zsh"]),
    (["no-such-command-of-ours"], []),
]


@pytest.mark.parametrize("words, offered", CASES)
def test_bash(scripts, words, offered):
    assert sorted(bash(scripts, ["spacemoe", *words])) == offered


def test_bash_offers_files_for_paths(scripts, tmp_path):
    (tmp_path / "a-bundle").mkdir()
    assert bash(scripts, ["spacemoe", "doctor", "--bundle", "a-b"], tmp_path) == ["a-bundle"]


@pytest.mark.parametrize("words, offered", CASES)
def test_fish(scripts, words, offered):
    line = " ".join(["spacemoe", *words])
    assert sorted(run("fish", f"source {scripts / 'fish'}; complete -C '{line}'")) == offered


def test_zsh_registers_it(scripts, tmp_path):
    """By eval, and from a folder of $fpath; both end in a function for the command."""
    for how in (
        f'compinit -D -u; eval "$(cat {scripts / "zsh"})"',
        f"fpath=({tmp_path} $fpath); compinit -D -u; autoload +X _spacemoe",
    ):
        shutil.copy(scripts / "zsh", tmp_path / "_spacemoe")
        said = run("zsh", f"autoload -Uz compinit; {how}; print -r -- $_comps[spacemoe]; whence -w $_comps[spacemoe]")
        assert said[-1] == f"{said[0]}: function"


def test_every_command_is_in_each(scripts):
    commands = next(action.choices for action in parser()._actions if action.dest == "command")
    assert len(commands) > 20
    for shell in cli_completion.SHELLS:
        text = (scripts / shell).read_text()
        assert not [name for name in commands if name not in text]


def test_another_shell_is_wrong_usage():
    assert here("completion", "ksh").returncode == 2
