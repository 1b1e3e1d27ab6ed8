"""The command line and the self-test: exit codes, one-line errors, what an import of the agent loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from node_rig import EXPERTS, LAYERS, PRECISIONS, make_bundle, toml

from node_agent import selftest, selftest_costs

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, module: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, *(("-m", "node_agent.cli") if module else ()), *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_importing_the_agent_loads_no_torch_onnx_or_sibling():
    code = "import sys, node_agent.agent, node_agent.cli, node_agent.selftest; print(*sorted(sys.modules))"
    loaded = set(run("-c", code, module=False).stdout.split())
    assert {"node_agent.dataplane", "onnxruntime", "zmq", "paho.mqtt.client"} <= loaded  # the import did happen
    roots = {name.partition(".")[0] for name in loaded}
    assert not roots & {"torch", "onnx", "transformers", "tokenizers", "iotcore", "safetensors", "tqdm"}
    assert not roots & {"quantize", "ground_station", "firmware_sim", "hardware"}


def test_help_and_errors_of_usage_load_nothing_heavy():
    code = "import sys; from node_agent.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sorted(sys.modules))"
    loaded = {name.partition(".")[0] for name in run("-c", code, module=False).stdout.split()}
    assert not loaded & {"numpy", "onnxruntime", "zmq", "paho", "psutil"}
    assert run("--version").stdout.startswith("node-agent ")
    assert run("fly").returncode == 2


@pytest.mark.parametrize(
    "change, code, said",
    [
        ({"node": {"id": "A!"}}, 2, "[node] id is 'A!'"),
        ({"bundle": {"path": "nothing", "shards": ["L00E000.int8"]}}, 3, "is no bundle"),
        ({"node": {"id": "a", "fleet": "b", "state_dir": "state", "memory_limit_mb": 1}}, 4, "raise memory_limit_mb"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(tmp_path, change, code, said):
    make_bundle(tmp_path / "bundle")
    tables = {
        "node": {"id": "a", "fleet": "b", "state_dir": "state"},
        "bundle": {"path": "bundle", "shards": ["L00E000.int8"]},
        "data": {"endpoint": "tcp://127.0.0.1:9"},
    } | change
    (tmp_path / "a.toml").write_text(toml(tables))
    got = run("run", "--config", str(tmp_path / "a.toml"))
    assert got.returncode == code and said in got.stderr
    assert len(got.stderr.splitlines()) == 1 and got.stderr.startswith("node-agent: ")


def test_selftest_passes_here_without_a_bundle():
    got = run("selftest", "--json")
    tree = json.loads(got.stdout)
    assert got.returncode == 0 and tree["ok"], [check for check in tree["checks"] if not check["ok"]]
    assert {"onnxruntime kernels", "codecs", "sensors", "clock", "disk"} <= {check["name"] for check in tree["checks"]}
    assert tree["timings"] == []  # nothing is timed that is not there


def test_selftest_of_a_bundle_verifies_and_times(tmp_path):
    make_bundle(tmp_path)
    report = selftest.run(tmp_path)
    assert report.ok
    assert [timing.precision for timing in report.timings] == list(PRECISIONS)
    for timing in report.timings:
        assert timing.n == LAYERS * EXPERTS * selftest_costs.TIMED_RUNS
        assert 0 < timing.p10_ms <= timing.median_ms <= timing.p90_ms
    path = tmp_path / "experts/L01E002.int4.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    got = run("selftest", "--bundle", str(tmp_path))
    assert got.returncode == 1 and "L01E002.int4.bin" in got.stdout and "FAIL" in got.stdout
    assert "ms per row" not in got.stdout  # a damaged bundle is not timed


def test_selftest_of_what_is_no_bundle_fails(tmp_path):
    report = selftest.run(tmp_path)
    assert not report.ok and [check.name for check in report.checks if not check.ok] == ["bundle manifest"]


def test_the_built_in_expert_is_the_formula():
    """The stored numbers against a computation here in float64, from the weights' pattern; and that an error is seen."""

    def weights(n: int, k: int, a: int, b: int) -> np.ndarray:
        row, column = np.mgrid[0:n, 0:k]
        return ((a * row + b * column + (row * column) % 5) % 16 - 8) * (0.02 + 0.002 * (np.arange(n) % 4))[:, None]

    x = ((np.arange(64) * 37) % 101 - 50) / 50
    hidden = weights(64, 64, 7, 3) @ x
    gate, up = hidden[:32], hidden[32:]
    y = weights(64, 32, 5, 11) @ (gate / (1 + np.exp(-gate)) * up)
    assert selftest.relative_error(y) < 1e-3  # stored with four decimals
    assert selftest.relative_error(y * 1.1) > selftest.EXPERT_TOLERANCE
    assert selftest.relative_error(np.roll(y, 1)) > selftest.EXPERT_TOLERANCE


def test_a_failing_check_does_not_hide_the_others(monkeypatch):
    monkeypatch.setattr(selftest, "_kernels", lambda: 1 / 0)
    report = selftest.run()
    failed = [check for check in report.checks if not check.ok]
    assert not report.ok and len(failed) == 1 and "ZeroDivisionError" in failed[0].text
    assert report.checks[-1].name == "disk"
