"""Bad input from strangers: each is one line that names the next step. Leaves out what the rooms' own tests cover."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ground_station.broker import Broker, BrokerError
from ground_station.cli import main
from ground_station.sampling import Sampling
from ground_station.text import Text
from ground_station.trunk import Trunk
from node_agent import shard
from node_agent.config import ConfigError, parse
from quantize.journal import Journal, ResumeError
from quantize.pipeline import _alone

HASH = "0" * 64
DIMS = {
    "hidden": 8,
    "intermediate": 8,
    "layers": 1,
    "experts": 2,
    "top_k": 1,
    "vocab": 16,
    "heads": 1,
    "kv_heads": 1,
    "head_dim": 8,
    "max_context": 32,
}


def tree() -> dict:
    """A manifest that is right, as JSON."""

    def file(path: str) -> dict:
        return {"path": path, "bytes": 1, "sha256": HASH}

    return {
        "name": "n",
        "family": "qwen3_moe",
        "base_model": "b",
        "revision": "r",
        "licence": "l",
        "dims": dict(DIMS),
        "routing": {"kind": "softmax_topk", "renormalise": True},
        "bos_id": None,
        "eos_ids": [0],
        "moe_layers": [0],
        "trunk_precision": "fp32",
        "segments": [
            {"files": [file("trunk/S00.onnx")], "attention_layers": [0], "moe_layer": 0},
            {"files": [file("trunk/S01.onnx")], "attention_layers": [], "moe_layer": None},
        ],
        "shards": [
            {"layer": 0, "expert": e, "precision": "int8", "files": [file(f"experts/L00E00{e}.int8.onnx")]}
            for e in range(2)
        ],
        "files": [file("tokenizer.json")],
        "recipe": {},
        "created_at": "now",
        "format": shard.FORMAT,
        "format_version": 1,
    }


def put(root: Path, content: dict) -> Path:
    (root / shard.MANIFEST).write_text(json.dumps(content))
    return root


def test_the_manifest_that_the_cases_below_damage_is_read(tmp_path):
    assert shard.read_manifest(put(tmp_path, tree())).dims.vocab == 16


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m["dims"].update(vocab=10**12),
        lambda m: m["dims"].update(hidden=-1),
        lambda m: m["dims"].update(top_k=0),
        lambda m: m["dims"].update(top_k=3),
        lambda m: m["routing"].update(kind="nonsense"),
        lambda m: m.update(bos_id=10**9),
        lambda m: m.update(eos_ids=[-1]),
        lambda m: m["segments"][0].update(files=[]),
        lambda m: m.update(moe_layers=[0, 0]),
        lambda m: m["shards"].append(m["shards"][0]),
        lambda m: m["shards"][0].update(files=[]),
        lambda m: m["shards"][0].update(precision="nonsense"),
        lambda m: m["shards"][0].update(expert=2),
        lambda m: m["shards"][0].update(layer=7),
        lambda m: m["files"][0].update(path="a\0b"),
        lambda m: m["files"][0].update(bytes=-1),
        lambda m: m.update(format_version=-1),
    ],
)
def test_a_manifest_without_sense_is_refused_before_anything_is_allocated(tmp_path, damage):
    content = tree()
    damage(content)
    with pytest.raises(shard.BundleError, match="write or copy the bundle again"):
        shard.read_manifest(put(tmp_path, content))


def test_a_trunk_with_a_segment_missing_is_refused(tmp_path):
    content = tree()
    content["segments"].pop()
    with pytest.raises(shard.BundleError, match="one per MoE layer"):
        Trunk(tmp_path, shard.read_manifest(put(tmp_path, content)))


def test_a_deeply_nested_manifest_is_refused(tmp_path):
    (tmp_path / shard.MANIFEST).write_text("[" * 200_000)
    with pytest.raises(shard.BundleError, match="not JSON"):
        shard.read_manifest(tmp_path)


def test_atomic_file_never_puts_a_file_in_the_place_of_a_pipe_or_device(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError), shard.atomic_file(pipe):
        pass
    assert pipe.is_fifo() and [item.name for item in tmp_path.iterdir()] == ["pipe"]


def test_an_altered_tokenizer_is_refused_though_it_still_is_one(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    content = tree()
    good = tmp_path / "tokenizer.json"
    content["files"] = [{"path": good.name, "bytes": good.stat().st_size, "sha256": shard.sha256_of(good)}]
    manifest = shard.read_manifest(put(tmp_path, content))
    text = Text(tmp_path, manifest)
    assert text.encode("ab") == [0, 1]
    for prompt in ("a\udcff", "\ud800"):
        with pytest.raises(ValueError, match="UTF-8"):
            text.encode(prompt)
    good.write_text(good.read_text().replace('"b"', '"c"'))
    with pytest.raises(shard.BundleError, match="altered"):
        Text(tmp_path, manifest)


def test_an_unknown_broker_is_refused_and_not_replaced(tmp_path):
    with pytest.raises(BrokerError, match="auto, mosquitto, embedded or HOST:PORT"):
        Broker(tmp_path, "127.0.0.1")


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed -1"):
        Sampling(seed=-1)


def test_version_works_in_a_source_checkout(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("spacemoe-kit ")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "bundle"
    with _alone(out):
        (out / "x").touch()
        folder = os.open(out, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        with pytest.raises(ResumeError, match="another run"), _alone(out):
            pass
    with _alone(out):
        (out / "x").unlink()
    assert out.exists()  # it was there before that last run


def test_a_journal_with_nothing_finished_does_not_stop_another_model(tmp_path):
    Journal(tmp_path, "one")
    Journal(tmp_path, "two")
    (tmp_path / "experts").mkdir()
    with pytest.raises(ResumeError):
        Journal(tmp_path, "three")


@pytest.mark.broker
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_told_to_end_leaves_no_folder_behind(tmp_path, number):
    demo = subprocess.Popen(
        [sys.executable, "-m", "ground_station.cli", "demo", "--tokens", "900", "--no-parity"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 30
    while not list(tmp_path.glob("spacemoe-demo-*/sat-1*")) and time.monotonic() < end:
        time.sleep(0.02)
    demo.send_signal(number)
    assert "terminated" in demo.communicate(timeout=30)[1]
    assert demo.returncode == 143 and not list(tmp_path.iterdir())


@pytest.mark.broker
def test_mosquitto_goes_with_its_guard_even_if_that_is_killed(tmp_path, mosquitto):
    with Broker(tmp_path, "mosquitto") as broker:
        (child,) = psutil.Process(broker._child.pid).children()
        broker._child.kill()
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_deeply_nested_configuration_is_one_line():
    with pytest.raises(ConfigError, match="not TOML"):
        parse("a = " + "[" * 100_000, Path())
