"""A board's install: the package alone, without any extra, in an environment of its own, passes its self-test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import lacking

ROOT = Path(__file__).resolve().parent.parent
NOT_FOR_BOARDS = {"torch", "onnx", "transformers", "tokenizers", "optimum", "iotcore", "safetensors"}


@pytest.mark.slow
def test_the_base_install_alone_passes_the_self_test(tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    # a copy, so that setuptools writes nothing into the checkout
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "*.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    install = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "-c", "constraints.txt", "."],
        cwd=source,
        capture_output=True,
        text=True,
    )
    if install.returncode and "No matching distribution" in install.stderr + install.stdout:
        lacking("a package index", "connect this machine to one, or set PIP_INDEX_URL")
    assert install.returncode == 0, install.stderr[-2000:]
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    installed = {item["name"].lower() for item in json.loads(listed.stdout)}
    assert "spacemoe-kit" in installed
    assert not installed & NOT_FOR_BOARDS

    agent = environment / "bin" / "node-agent"
    check = subprocess.run([str(agent), "selftest", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
    assert json.loads(check.stdout)
    help = subprocess.run(
        [str(environment / "bin" / "spacemoe"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert help.returncode == 0 and "demo" in help.stdout
    # what needs an extra says so in one line
    demo = subprocess.run(
        [str(environment / "bin" / "spacemoe"), "evaluate", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert demo.returncode != 0 and len(demo.stderr.strip().splitlines()) == 1
