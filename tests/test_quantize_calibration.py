"""Layer sensitivities: against the theory of weak noise, against a second way to run the model, resumed, and put into a bundle.

Theory: KL(p || p') of logits that move by d is d'Fd / 2 with F = diag(p) - pp', Fisher's information of the softmax (Kullback,
Information Theory and Statistics, 1959, chapter 2.6), so that white noise gives half its variance times the sum of the
variances under p of the logits' derivatives. Left out: int8dyn shards, which need Optimum.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from scipy.special import log_softmax, rel_entr, softmax

pytest.importorskip("tokenizers")

from ground_station import cli, evaluate, rates, selection  # noqa: E402
from ground_station.selection_choice import Choice  # noqa: E402
from ground_station.selection_world import Calibration  # noqa: E402
from node_agent import bundle_file, shard  # noqa: E402
from quantize import calibrate, recalibrate, sensitivity  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent / "quantize/reference"
BUNDLE, TEXT = ROOT / "bundle", ROOT / "checkpoint/calibration.txt"
MANIFEST = shard.read_manifest(BUNDLE)


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    found = calibrate.token_sequences(BUNDLE / "tokenizer.json", TEXT, 4096, MANIFEST.dims.max_context, MANIFEST.bos_id)
    return [found[0][:96], found[3][:64]]


class Bar:
    def update(self, n: float = 1) -> None:
        pass


# --- numerics --------------------------------------------------------------------------------------------------------


def test_divergence_is_scipys():
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((5, 300)).astype(np.float32) * 3 for _ in range(2))
    p, p_log_p = sensitivity._distribution(first)
    expected = rel_entr(softmax(first.astype(float), 1), softmax(second.astype(float), 1)).sum(1)
    assert sensitivity.divergence(p, p_log_p, second) == pytest.approx(expected, rel=1e-5)
    near = first + np.float32(1e-3) * second  # a divergence of 1e-6 is still seen
    expected = rel_entr(softmax(first.astype(float), 1), softmax(near.astype(float), 1)).sum(1)
    assert sensitivity.divergence(p, p_log_p, near) == pytest.approx(expected, rel=0.05, abs=1e-7)
    assert np.abs(sensitivity.divergence(p, p_log_p, first)).max() < 1e-6


def test_fit_by_hand():
    levels, weights = np.array([0.1, 0.2]), np.array([0.5, 0.5])
    # KL / r^2: 2 and 4 at the first level, 2 and 4 at the second: the levels agree, the texts differ by 2: 1 / sqrt(1)
    assert sensitivity.fit(np.array([[0.02, 0.04], [0.08, 0.16]]), levels, weights) == pytest.approx((3.0, 1.0))
    # 2 at the first level and 4 at the second for both texts: the law is off, ((1 + 1) / 1 / 2) ** 0.5
    assert sensitivity.fit(np.array([[0.02, 0.02], [0.16, 0.16]]), levels, weights) == pytest.approx((3.0, 1.0))
    assert sensitivity.fit(np.array([[0.02, 0.02], [0.08, 0.08]]), levels, weights) == pytest.approx((2.0, 0.0))


def test_fewer_tokens_for_deeper_models():
    deep = dataclasses.replace(MANIFEST, moe_layers=tuple(range(48)))
    assert sensitivity.plan_for(deep).tokens < sensitivity.plan_for(MANIFEST).tokens == sensitivity.MAX_TOKENS
    assert sensitivity.plan_for(dataclasses.replace(MANIFEST, moe_layers=tuple(range(999)))).tokens == 256


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_last_layers_sensitivity_is_what_fisher_information_says(sequences, tmp_path):
    plan, sequences = sensitivity.Plan((0.03, 0.06), 2), [sequences[1][:20], sequences[0][:12]]
    run = sensitivity._Run(BUNDLE, MANIFEST, sequences, tmp_path, plan)
    for position in range(4):
        run.layer(position, Bar())
    state = np.load(run.file(3))[0]
    before = np.load(run.file(2))[0]
    segment = sensitivity._session(BUNDLE / MANIFEST.segments[3].files[0].path)
    experts = [MANIFEST.shard(3, e, "int8").files[0].path for e in range(16)]
    residual, parts = run._moe(3, segment, [sensitivity._session(BUNDLE / path) for path in experts], before)
    assert residual + parts.sum(0) == pytest.approx(state, abs=1e-5)
    rms = np.sqrt(np.square(parts.sum(0), dtype=float).mean())

    head = onnxruntime.InferenceSession(str(BUNDLE / MANIFEST.segments[4].files[0].path))
    zero = np.zeros((1, *state.shape), np.float32)

    def logits(moved: np.ndarray) -> np.ndarray:
        return head.run(["logits"], {"residual": state[None] + moved, "moe_out": zero})[0][0].astype(float)

    p, step, variance = softmax(logits(zero), 1), np.float32(0.05 * rms), np.zeros(len(state))
    for channel in range(MANIFEST.dims.hidden):
        moved = zero.copy()
        moved[0, :, channel] = step
        slope = (logits(moved) - logits(-moved)) / (2 * step)
        variance += (p * slope**2).sum(1) - (p * slope).sum(1) ** 2
    expected = rms**2 * variance.mean() / 2

    kl = run.divergences(Bar())
    weights = np.array([len(ids) for ids in sequences], float)
    found = sensitivity.collect(kl, weights, 4, plan)["sensitivity"]
    assert found[3] == pytest.approx(expected, rel=0.05)
    assert abs(found[0] / expected - 1) > 0.2  # another layer's is not the same


class Leaves:
    """topk that leaves out the pair of one rank in one layer."""

    def __init__(self, layer: int | None, rank: int) -> None:
        dims = MANIFEST.dims
        self.topk = selection.make("topk", MANIFEST.routing, dims.top_k, dims.experts)
        self.layer, self.rank = layer, rank

    def __call__(self, layer: int, logits: np.ndarray) -> Choice:
        choice = self.topk(layer, logits)
        if layer != self.layer:
            return choice
        order = np.argsort(-choice.gates, axis=1, kind="stable")
        gates = choice.gates.copy()
        np.put_along_axis(gates, order[:, self.rank : self.rank + 1], 0, 1)
        return Choice(choice.experts, gates)


def test_left_out_pairs_cost_what_the_ground_stations_own_run_says(sequences, tmp_path):
    """The second way: the decode loop's trunk with its cache, experts summed per node, float64 divergences by scipy."""
    found = sensitivity.measure(BUNDLE, MANIFEST, sequences, tmp_path, sensitivity.Plan((0.1,), 1), progress=False)
    assert not any(tmp_path.iterdir())  # nothing is left behind
    decoder = evaluate.model(BUNDLE, MANIFEST, "int8", 1)

    def logs(policy: Leaves) -> np.ndarray:
        decoder.policy = policy
        rows = []
        for ids in sequences:
            rows.append(decoder.trunk.sequence(len(ids)).prefill(ids, decoder.moe, every_position=True))
        return log_softmax(np.concatenate(rows).astype(float), 1)

    exact = logs(Leaves(None, 0))
    for layer, rank in ((0, 0), (1, 3), (3, 1)):
        other = logs(Leaves(layer, rank))
        expected = (np.exp(exact) * (exact - other)).sum(1).mean()
        assert found["drop_kl"][layer, rank] == pytest.approx(expected, rel=0.02), (layer, rank)
    assert (found["drop_kl"][:, :1] > 2 * found["drop_kl"][:, 1:]).all()  # the largest gate counts most
    assert found["sensitivity_tokens"] == sum(map(len, sequences))


def test_a_run_cut_off_goes_on_from_its_last_layer(sequences, tmp_path, monkeypatch):
    plan = sensitivity.Plan((0.1,), 1)
    whole = sensitivity.measure(BUNDLE, MANIFEST, sequences, tmp_path / "a", plan, progress=False)
    layer, seen = sensitivity._Run.layer, []

    def dies(self, position, bar):
        if position == 2:
            raise KeyboardInterrupt
        layer(self, position, bar)

    monkeypatch.setattr(sensitivity._Run, "layer", dies)
    with pytest.raises(KeyboardInterrupt):
        sensitivity.measure(BUNDLE, MANIFEST, sequences, tmp_path / "b", plan, progress=False)
    monkeypatch.setattr(sensitivity._Run, "layer", lambda *a: (seen.append(a[1]), layer(*a)))
    again = sensitivity.measure(BUNDLE, MANIFEST, sequences, tmp_path / "b", plan, progress=False)
    assert seen == [2, 3]
    for name, value in whole.items():
        assert np.array_equal(again[name], value), name


# --- in the bundle ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path) -> Path:
    """The reference bundle without sensitivities; its large files are links."""
    root = tmp_path / "bundle"
    shutil.copytree(BUNDLE, root, copy_function=lambda source, target: Path(target).symlink_to(source))
    with np.load(BUNDLE / "calibration.npz") as found:
        kept = {name: found[name] for name in found.files if "sensitivity" not in name and name != "drop_kl"}
    for name in ("calibration.npz", "manifest.json"):
        (root / name).unlink()
    shutil.copy(BUNDLE / "manifest.json", root)
    np.savez(root / "calibration.npz", **kept)
    bundle_file.put(root, "calibration.npz", (root / "calibration.npz").read_bytes())
    return root


def spacemoe(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(each) for each in arguments])
    return code, *capsys.readouterr()


def test_the_command_adds_sensitivities_and_keeps_the_rest(bundle, capsys):
    (bundle / "manifest.sig").write_bytes(b"old")
    before = dict(np.load(bundle / "calibration.npz"))
    code, out, _ = spacemoe(capsys, "bundle", "calibrate", bundle, "--text", TEXT, "--max-tokens", 300, "--json")
    printed = json.loads(out)
    assert code == 0 and len(printed["sensitivity"]) == 4 and "sign the bundle again" in printed["note"]
    after = dict(np.load(bundle / "calibration.npz", allow_pickle=False))
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    assert after["sensitivity"].tolist() == pytest.approx(printed["sensitivity"]) and (after["sensitivity"] > 0).all()
    assert spacemoe(capsys, "bundle", "verify", bundle)[0] == 0
    manifest = shard.read_manifest(bundle)
    rates.Sensitivity.read(bundle, manifest)  # readers take the new file
    Calibration.load(bundle / "calibration.npz", manifest.moe_layers, manifest.dims.experts)
    assert not (bundle / ".work").exists() and not (bundle / "calibration.npz.new").exists()


def test_what_cannot_be_calibrated_is_one_line(bundle, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("In the beginning")
    for text, said in ((tmp_path / "none", "cannot be read"), (short, "longer text")):
        code, _, err = spacemoe(capsys, "bundle", "calibrate", bundle, "--text", text)
        assert code == 2 and said in err and err.count("\n") == 1
    manifest = shard.read_manifest(bundle)
    shard.write_manifest(bundle, dataclasses.replace(manifest, files=()))
    code, _, err = spacemoe(capsys, "bundle", "calibrate", bundle, "--text", TEXT)
    assert code == 2 and "quantize its checkpoint again" in err
    shard.write_manifest(bundle, manifest)
    path = bundle / manifest.shards[0].files[1].path
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + b"x")
    code, _, err = spacemoe(capsys, "bundle", "calibrate", bundle, "--text", TEXT)
    assert code == 2 and "altered" in err
    with bundle_file.alone(bundle), pytest.raises(shard.BundleError, match="wait for it"):
        recalibrate.recalibrate(bundle, TEXT)


def test_a_cut_between_manifest_and_file_is_mended(bundle, monkeypatch):
    old = (bundle / "calibration.npz").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(bundle_file, "finish", lambda *_: None)  # the power goes before the rename
        manifest = bundle_file.put(bundle, "calibration.npz", old + b"new")
    new = bundle_file.entry_of(manifest, "calibration.npz")
    with pytest.raises(shard.BundleError, match="calibration.npz has"):
        shard.verify_file(bundle, new)
    bundle_file.finish(bundle, new)
    assert shard.verify_file(bundle, new).read_bytes() == old + b"new"
    # the other way round: a new file that no manifest speaks of is dropped
    (bundle / "calibration.npz.new").write_bytes(old)
    bundle_file.finish(bundle, new)
    assert not (bundle / "calibration.npz.new").exists() and shard.verify_file(bundle, new)


def test_an_array_that_unpacks_to_too_much_is_refused(bundle, monkeypatch):
    monkeypatch.setattr(recalibrate, "MAX_FILE_BYTES", 1000)
    with pytest.raises(calibrate.CalibrationError, match="1000 are allowed"):
        recalibrate.merged(bundle / "calibration.npz", {})
    (bundle / "calibration.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(calibrate.CalibrationError, match="cannot be read"):
        recalibrate.merged(bundle / "calibration.npz", {})


def test_the_shipped_bundle_has_them_and_the_proxy_is_near():
    """The claim of LOG.md: 1 / (residual^2 + sum^2), which rates and selection use, is the measured one within a tenth in noise."""
    with np.load(BUNDLE / "calibration.npz", allow_pickle=False) as found:
        measured, error = found["sensitivity"], found["sensitivity_error"]
        out_rms = np.sqrt(np.square(found["moe_out_rms"], dtype=float).mean(1))
    assert measured.shape == (4,) and (error < 0.3 * measured).all()
    proxy = rates.Sensitivity.read(BUNDLE, MANIFEST).residual_rms / out_rms
    ratio = proxy * np.sqrt(measured)
    assert ratio == pytest.approx(ratio.mean(), rel=0.15)
    assert np.sqrt(measured).max() / np.sqrt(measured).min() > 1.5  # without any weight it would be off by this
