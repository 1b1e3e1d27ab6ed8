"""`quantize.pipeline` from a folder to a verified bundle: calibration statistics, resuming, a full disk, refusals.

Statistics are checked against a second computation that runs the finished bundle (bundle_runner), not against calibrate's code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from bundle_runner import BundleRunner  # noqa: E402
from tiny_checkpoints import make_without_torch  # noqa: E402

from node_agent.shard import MANIFEST, PARTIAL_SUFFIX, read_manifest, verify_file  # noqa: E402
from quantize import calibrate  # noqa: E402
from quantize.journal import JOURNAL, WORK, ResumeError  # noqa: E402
from quantize.pipeline import quantize  # noqa: E402
from quantize.recipe import RecipeError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MAX_TOKENS = 2048
WORDS = "the of a heaven earth expert token state router gate board orbit light dark water node shard 7 42 link".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_without_torch(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    words = np.random.default_rng(0).choice(
        WORDS, 4000, p=np.arange(len(WORDS), 0, -1) / (len(WORDS) * (len(WORDS) + 1) / 2)
    )
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def bundle(model, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "b"
    quantize(model, out, fp32=True, calibration_text=text, max_tokens=MAX_TOKENS, progress=False)
    return out


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(PARTIAL_SUFFIX)]


def test_the_bundle_is_whole(bundle, model):
    manifest = read_manifest(bundle)
    assert manifest.precisions == ("fp32", "int8", "int4")
    assert len(manifest.shards) == 2 * 6 * 3  # layer 0 is dense
    entries = [
        *manifest.files,
        *(f for s in manifest.segments for f in s.files),
        *(f for s in manifest.shards for f in s.files),
    ]
    for entry in entries:
        verify_file(bundle, entry)
    on_disk = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert on_disk == {entry.path for entry in entries} | {MANIFEST}  # nothing forgotten, nothing left over
    assert (manifest.licence, manifest.family, manifest.eos_ids, manifest.bos_id) == (
        "apache-2.0",
        "qwen3_moe",
        (2,),
        None,
    )
    assert "GPTQ" in manifest.recipe["int4"]


def test_errors_are_measured_and_in_order(bundle):
    mean = {}
    for precision in ("fp32", "int8", "int4"):
        errors = [shard.rel_error for shard in read_manifest(bundle).shards if shard.precision == precision]
        mean[precision] = np.mean(errors)
    assert mean["fp32"] < 1e-5 < mean["int8"] < 0.05 < mean["int4"] < 0.2


def test_calibrated_4_bits_beat_rounding(bundle, model, text, tmp_path):
    """On tokens of the held-back sequences, both measured here by the weighted output of all experts of a layer."""
    quantize(model, tmp_path / "rtn", precisions=("int4",), rtn=True, progress=False)
    assert "round-to-nearest" in read_manifest(tmp_path / "rtn").recipe["int4"]
    sequences = calibrate.token_sequences(model / "tokenizer.json", text, MAX_TOKENS, 128)
    held = [ids for n, ids in enumerate(sequences) if n % calibrate.HOLD_EVERY == calibrate.HOLD_EVERY - 1]
    exact, calibrated, rounded = (
        BundleRunner(root, precision, 128)
        for root, precision in ((bundle, "fp32"), (bundle, "int4"), (tmp_path / "rtn", "int4"))
    )
    error = {"calibrated": 0.0, "rounded": 0.0}
    plain = exact._experts

    def spy(layer, hidden, logits):
        right = plain(layer, hidden, logits)
        for name, runner in (("calibrated", calibrated), ("rounded", rounded)):
            error[name] += float(np.square(runner._experts(layer, hidden, logits) - right).sum())
        return right

    exact._experts = spy
    for ids in held:
        exact.reset()
        exact.step_logits(list(ids))
    assert 0 < error["calibrated"] < 0.8 * error["rounded"]


def test_statistics_equal_a_second_computation(bundle, model, text):
    sequences = calibrate.token_sequences(model / "tokenizer.json", text, MAX_TOKENS, 128)
    tokens = sum(map(len, sequences))
    runner = BundleRunner(bundle, "fp32", 128)
    counts, pairs = np.zeros((2, 6)), np.zeros((2, 6, 6))
    norms, gated = np.zeros((2, 6)), np.zeros((2, 6))
    chosen: dict[int, list[np.ndarray]] = {1: [], 2: []}
    plain = runner._experts

    def spy(layer, hidden, logits):
        probability = np.exp(logits - logits.max(1, keepdims=True))
        probability /= probability.sum(1, keepdims=True)
        top = np.argsort(-logits, 1, kind="stable")[:, :2]
        chosen[layer].append(top)
        for row, pair in enumerate(top):
            for e in pair:
                counts[layer - 1, e] += 1
                pairs[layer - 1, e, pair] += 1
                norm = np.linalg.norm(runner.experts_output(layer, int(e), hidden[row : row + 1]))
                norms[layer - 1, e] += norm
                gated[layer - 1, e] += norm * probability[row, e] / probability[row, pair].sum()
        return plain(layer, hidden, logits)

    runner._experts = spy
    for ids in sequences:
        runner.reset()
        runner.step_logits(list(ids))
    saved = np.load(bundle / "calibration.npz", allow_pickle=False)
    assert int(saved["tokens"]) == tokens <= MAX_TOKENS + len(sequences)
    assert list(saved["moe_layers"]) == [1, 2]
    np.testing.assert_array_equal(saved["counts"], counts)
    np.testing.assert_array_equal(saved["coactivation"], pairs)
    np.testing.assert_allclose(saved["output_norm"], norms / counts, rtol=1e-4)
    np.testing.assert_allclose(saved["gate_norm"], gated / counts, rtol=1e-4)
    first, then = np.concatenate(chosen[1]), np.concatenate(chosen[2])
    assert saved["successive"][0, 3, 5] == sum(3 in a and 5 in b for a, b in zip(first, then))
    assert saved["distance"].shape == (2, 6, 6) and (np.diagonal(saved["distance"], axis1=1, axis2=2) == 0).all()
    assert saved["layer_error_int8"].max() < saved["layer_error_int4"].min()


def test_killed_and_started_again_gives_the_same_bundle(bundle, model, text, tmp_path):
    out = tmp_path / "b"
    command = [sys.executable, "-c", RUN, str(model), str(out), str(text)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while (
        not (out / JOURNAL).exists() or (out / JOURNAL).read_bytes().count(b'"shard"') < 25
    ):  # in the middle of the second layer
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / MANIFEST).exists()
    finished = {path: path.stat().st_mtime_ns for path in (out / "experts").glob("L01*.bin")}
    manifest = quantize(model, out, fp32=True, calibration_text=text, max_tokens=MAX_TOKENS, progress=False)
    assert len(finished) == 18 and all(path.stat().st_mtime_ns == then for path, then in finished.items())
    assert manifest.shards == read_manifest(bundle).shards
    assert manifest.segments == read_manifest(bundle).segments
    first, second = (np.load(root / "calibration.npz") for root in (bundle, out))
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, err_msg=name)
    assert not leftovers(out) and not (out / WORK).exists() and not (out / JOURNAL).exists()


RUN = """
import sys
from pathlib import Path
from quantize.pipeline import quantize
quantize(Path(sys.argv[1]), Path(sys.argv[2]), fp32=True, calibration_text=Path(sys.argv[3]), max_tokens=2048, progress=False)
"""
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
"""


def test_a_file_that_may_not_grow_is_one_line_and_resumable(model, text, tmp_path):
    """RLIMIT_FSIZE makes write(2) fail as a full disk does, without root; the limit falls between graph and weights sizes."""
    out = tmp_path / "b"
    script = RUN.replace("import sys\n", "import sys\n" + LIMITED).replace(
        "quantize(Path", "\nfrom quantize.pipeline import DiskFullError\ntry:\n    quantize(Path"
    )
    script += "except DiskFullError as error:\n    print(error.strerror, end='')\n    sys.exit(9)\n"
    command = [sys.executable, "-c", script, str(model), str(out), str(text), "50000"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 9, run.stderr
    assert "again" in run.stdout and "\n" not in run.stdout
    assert not leftovers(out) and not (out / MANIFEST).exists()
    quantize(model, out, fp32=True, calibration_text=text, max_tokens=MAX_TOKENS, progress=False)
    assert len(read_manifest(out).shards) == 36


@pytest.mark.parametrize("room_kib", [150, 450, 700, 900])
def test_a_full_disk_is_one_line_and_resumable(model, text, tmp_path, room_kib):
    """A real full file system (tmpfs), at several stages: trunk, hidden states, shards."""
    out = tmp_path / "disk"
    out.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room_kib}k", "tmpfs", out], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(OSError, match="again") as caught:
            quantize(model, out / "b", fp32=True, calibration_text=text, max_tokens=512, progress=False)
        assert "\n" not in str(caught.value) and not leftovers(out) and not (out / "b" / MANIFEST).exists()
        subprocess.run(["mount", "-o", "remount,size=8m", out], check=True)
        quantize(model, out / "b", fp32=True, calibration_text=text, max_tokens=512, progress=False)
        assert len(read_manifest(out / "b").shards) == 36
    finally:
        subprocess.run(["umount", "-l", out], check=True)


def test_an_altered_shard_is_made_again_on_resume(model, tmp_path):
    out = tmp_path / "b"
    whole = quantize(model, out, precisions=("int8",), progress=False)
    victim = out / whole.shards[3].files[1].path
    lines = [{"recipe": whole.recipe["hash"]}]
    lines += [
        {"segment": json.loads(json.dumps(segment, default=vars)), "index": n}
        for n, segment in enumerate(whole.segments)
    ]
    lines += [{"shard": json.loads(json.dumps(shard, default=vars))} for shard in whole.shards]
    (out / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"shard": {"lay')  # cut short
    (out / MANIFEST).unlink()
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x7f")
    others = {path: path.stat().st_mtime_ns for path in (out / "experts").iterdir() if path.stem != victim.stem}
    again = quantize(model, out, precisions=("int8",), progress=False)
    assert again.shards == whole.shards
    assert all(path.stat().st_mtime_ns == then for path, then in others.items())


def test_another_recipe_or_model_is_refused(model, tmp_path):
    out = tmp_path / "b"
    first = quantize(model, out, precisions=("int8",), progress=False)
    assert quantize(model, out, precisions=("int8",), progress=False) == first  # nothing to do
    with pytest.raises(ResumeError, match="--force"):
        quantize(model, out, precisions=("fp32",), progress=False)
    other = make_without_torch(tmp_path / "other", seed=1)
    with pytest.raises(ResumeError, match="--force"):
        quantize(other, out, precisions=("int8",), progress=False)
    forced = quantize(other, out, precisions=("int8",), progress=False, force=True)
    assert {s.sha256 for s in forced.shards}.isdisjoint(s.sha256 for s in first.shards)
    (out / MANIFEST).unlink()
    (out / JOURNAL).write_text('{"recipe":"of something else"}\n')
    with pytest.raises(ResumeError, match="unfinished"):
        quantize(model, out, precisions=("int8",), progress=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("do not touch")
    for force in (False, True):
        with pytest.raises(ResumeError, match="not empty"):
            quantize(model, foreign, precisions=("int8",), progress=False, force=force)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--calibration FILE"),
        ({"precisions": ("int3",)}, "int3"),
        ({"precisions": ("int2",)}, "2 bit needs a calibration text"),
        ({"trunk_precision": "int3", "rtn": True}, "int3"),
        ({"calibration_text": Path("/nowhere/text")}, "/nowhere/text"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(model, tmp_path, options, said):
    with pytest.raises(RecipeError, match=said) as caught:
        quantize(model, tmp_path / "b", progress=False, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "b").exists()


def test_a_text_too_short_is_refused(model, tmp_path):
    (tmp_path / "short.txt").write_text("In the beginning")
    with pytest.raises(calibrate.CalibrationError, match="longer text"):
        quantize(model, tmp_path / "b", calibration_text=tmp_path / "short.txt", progress=False)


def test_the_models_own_text_is_the_default(tmp_path, text):
    folder = make_without_torch(tmp_path / "model", layers=2)
    (folder / "calibration.txt").write_bytes(text.read_bytes())
    manifest = quantize(folder, tmp_path / "b", precisions=("int4",), max_tokens=600, progress=False)
    assert "GPTQ" in manifest.recipe["int4"] and (tmp_path / "b/calibration.npz").exists()


def test_command_line_prints_one_json_object(model, tmp_path, capsys):
    import argparse

    from quantize import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(model), "-o", str(tmp_path / "b"), "--precision", "int8", "--json"])) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["shards"], printed["family"], list(printed["precisions"])) == (12, "qwen3_moe", ["int8"])


def test_a_start_token_counts_only_when_the_tokenizer_says_so(tmp_path, text):
    """bos_token_id in config.json alone says nothing: Qwen has one and never uses it."""
    folder = make_without_torch(tmp_path / "model", layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 1}))
    without = quantize(folder, tmp_path / "a", precisions=("int8",), progress=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    with_start = quantize(folder, tmp_path / "b", precisions=("int8",), progress=False)
    assert (without.bos_id, with_start.bos_id) == (None, 1)
    sequences = calibrate.token_sequences(folder / "tokenizer.json", text, 600, 128, 1)
    assert all(ids[0] == 1 and len(ids) <= 128 for ids in sequences)


def test_optimums_recipe_without_optimum_names_the_package(model, tmp_path):
    from quantize import optimum_int8

    if optimum_int8.available():
        pytest.skip("Optimum is installed: test_quantize_optimum runs the recipe itself")
    with pytest.raises(RecipeError, match="pip install"):
        quantize(model, tmp_path / "b", precisions=("int8dyn",), progress=False)
