"""Which text is trained on next, and the optimiser: shares by hand, windows of a counted stream, SVD, torch's AdamW."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from quantize.reference.mix import TokenMix, domain_weights  # noqa: E402
from quantize.reference.model import ModelConfig, ReferenceModel, flat_size, layout  # noqa: E402
from quantize.reference.muon import Optimiser, orthogonalise  # noqa: E402
from quantize.reference.state import Recipe  # noqa: E402

SIZES = {"a": 100, "b": 400, "c": 900}  # square roots 10, 20, 30
CONTEXT = 16


# --- shares and windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected_tokens", "max_epochs", "shares"),
    [
        (1000, 5, (1 / 6, 1 / 3, 1 / 2)),  # no cap reached
        (5000, 4, (0.08, 0.32, 0.60)),  # a and b capped at 4 passes, c takes the rest
        (14000, 4, (1 / 14, 4 / 14, 9 / 14)),  # all capped: by size
    ],
)
def test_domain_weights_by_hand(expected_tokens, max_epochs, shares):
    weights = domain_weights(SIZES, expected_tokens, max_epochs)
    assert [weights[d] for d in "abc"] == pytest.approx(shares)
    assert sum(weights.values()) == pytest.approx(1)


def test_domain_weights_respect_the_cap_at_any_size():
    rng = np.random.default_rng(1)
    capped = 0
    for _ in range(200):
        sizes = {str(n): int(size) for n, size in enumerate(10 ** rng.uniform(2, 6, rng.integers(1, 9)))}
        expected = float(10 ** rng.uniform(3, 7))
        weights = domain_weights(sizes, expected, 5.0)
        assert sum(weights.values()) == pytest.approx(1)
        caps = {d: 5 * n / expected for d, n in sizes.items()}
        if sum(caps.values()) >= 1:
            assert all(weights[d] <= caps[d] * (1 + 1e-9) for d in sizes)
            capped += any(weights[d] >= caps[d] * (1 - 1e-9) for d in sizes)
    assert capped > 10


@pytest.fixture
def tokens(tmp_path):
    """Streams that count upwards, so that a window says where it stood; dev and held-out ones must not be read."""
    for name, (start, stop) in {
        "oak": (0, 700),
        "ink": (1000, 1333),
        "dev-oak": (5000, 6000),
        "heldout-ink": (7000, 8000),
    }.items():
        np.save(tmp_path / f"{name}.npy", np.arange(start, stop, dtype=np.uint16))
    return tmp_path


def recipe(**values) -> Recipe:
    return Recipe(expected_tokens=1000, **values)


def test_windows_are_contiguous_and_a_pass_scores_no_token_twice(tokens):
    mix = TokenMix(tokens, recipe(), CONTEXT)
    assert mix.names == ["ink", "oak"] and mix.weights.sum() == pytest.approx(1)
    # sqrt(333) : sqrt(700) of the draws
    assert mix.weights[0] == pytest.approx(333**0.5 / (333**0.5 + 700**0.5))
    rows = np.concatenate([mix.batch(step, 8) for step in range(40)])
    assert rows.shape == (320, CONTEXT + 1) and rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all()
    starts = {"ink": [], "oak": []}
    for first in rows[:, 0]:
        starts["ink" if first >= 1000 else "oak"].append(first - 1000 * (first >= 1000))
    for name, size in (("ink", 333), ("oak", 700)):
        per_pass = (size - CONTEXT) // CONTEXT
        assert len(starts[name]) > 2 * per_pass  # several passes were seen
        passes = [starts[name][at : at + per_pass] for at in range(0, len(starts[name]) - per_pass, per_pass)]
        for one in passes:
            assert len(set(one)) == per_pass and len({start % CONTEXT for start in one}) == 1
            assert min(one) >= 0 and max(one) + CONTEXT + 1 <= size
        assert passes[0] != passes[1]  # another order or offset
    share = len(starts["ink"]) / len(rows)
    assert abs(share - mix.weights[0]) < 4 * (0.25 / len(rows)) ** 0.5


def test_mix_goes_on_from_its_counters_and_follows_the_seed(tokens):
    whole = TokenMix(tokens, recipe(), CONTEXT)
    batches = [whole.batch(step, 4) for step in range(60)]
    begun = TokenMix(tokens, recipe(), CONTEXT)
    for step in range(31):
        begun.batch(step, 4)
    resumed = TokenMix(tokens, recipe(), CONTEXT)
    resumed.counters = json.loads(json.dumps(begun.counters))
    assert all((resumed.batch(step, 4) == batches[step]).all() for step in range(31, 60))
    fresh = TokenMix(tokens, recipe(), CONTEXT)
    assert any(
        (fresh.batch(step, 4) != batches[step]).any() for step in range(31, 60)
    )  # without the counters it would not
    other = TokenMix(tokens, recipe(seed=2), CONTEXT)
    assert any((other.batch(step, 4) != batches[step]).any() for step in range(3))


# --- Muon ------------------------------------------------------------------------------------------------------------


def polar(matrix: np.ndarray) -> np.ndarray:
    """U V^T of the singular value decomposition: what Newton-Schulz approximates."""
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def test_orthogonalise_against_svd():
    """Keller Jordan 2024: the quintic takes singular values to about 0.7 .. 1.2, not to 1, and keeps the singular vectors."""
    matrices = np.random.default_rng(0).normal(size=(3, 24, 64)) * np.array([1e-3, 1, 1e3])[:, None, None]
    result = orthogonalise(torch.from_numpy(matrices).float()).double().numpy()
    for before, after in zip(matrices, result):
        values = np.linalg.svd(after, compute_uv=False)
        assert 0.6 < values.min() and values.max() < 1.3
        u, s, vt = np.linalg.svd(before, full_matrices=False)
        assert s.max() / s.min() > 2  # it was not orthogonal before
        cross = u.T @ after @ vt.T  # diagonal if the singular vectors are kept
        assert np.abs(cross - np.diag(np.diag(cross))).max() < 0.05 and np.diag(cross).min() > 0.6
        expected = u @ vt
        cosine = (after * expected).sum() / np.linalg.norm(after) / np.linalg.norm(expected)
        assert cosine > 0.98
        turned = expected[::-1]
        assert abs((after * turned).sum()) / np.linalg.norm(after) / np.linalg.norm(turned) < 0.3


# --- the optimiser on a small model ----------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab=40,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    experts=4,
    experts_per_token=2,
    intermediate=24,
    context=128,
)
STEPS = 3


def small_model() -> ReferenceModel:
    model = ReferenceModel.allocate(CONFIG)
    model.initialise(3)
    with torch.no_grad():
        for slot in model.slots:
            if slot.name.endswith((".o", ".down")):
                model.master_view(slot.name).normal_(0, 0.1, generator=torch.Generator().manual_seed(slot.start))
    model.refresh()
    return model


def gradients(model: ReferenceModel, scale: float) -> list[list[torch.Tensor]]:
    """[step][process] fp32 [P], nought in the gaps between parameters, as `backward` leaves them."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for _ in range(STEPS):
        row = []
        for _ in range(2):
            flat = torch.zeros_like(model.master)
            for slot in model.slots:
                flat[slot.start : slot.start + slot.size].normal_(0, scale, generator=generator)
            row.append(flat)
        rows.append(row)
    return rows


def run(model: ReferenceModel, settings: Recipe, rows, world: int, multiplier: float) -> list[float]:
    state = torch.zeros(2, flat_size(layout(CONFIG)))
    optimisers = [Optimiser(model, settings, state, rank, world) for rank in range(world)]
    norms = []
    for number, row in enumerate(rows):
        norms.append([optimiser.step(row, 0.25, number, multiplier) for optimiser in optimisers][0])
    return norms


@pytest.mark.parametrize("scale", [1e-3, 1.0])  # below and above the clipping norm
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_adamw_part_against_torch(kind, world, scale):
    model = small_model()
    settings = recipe(optimiser=kind)
    names = [slot.name for slot in model.slots if kind == "adamw" or slot.kind == "other"]
    copies = {name: torch.nn.Parameter(model.master_view(name).clone()) for name in names}
    before = model.master.clone()
    rows = gradients(model, scale)
    norms = run(model, settings, rows, world, 0.5)
    theirs = torch.optim.AdamW(
        copies.values(),
        lr=settings.other_rate * 0.5,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.05 if kind == "adamw" else 0,
    )
    for row, norm in zip(rows, norms):
        for slot in model.slots:
            if slot.name in copies:
                where = slice(slot.start, slot.start + slot.size)
                copies[slot.name].grad = (0.25 * (row[0][where] + row[1][where])).view(slot.shape)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(copies.values(), settings.clip)), rel=1e-4)
        theirs.step()
    assert (norms[0] > settings.clip) == (scale == 1.0)
    for name, copy in copies.items():
        torch.testing.assert_close(model.master_view(name), copy.detach(), rtol=1e-5, atol=1e-7)
    assert (model.master - before).abs().max() > 1e-3  # three steps of about the rate
    assert torch.equal(model.compute, model.master.bfloat16())


def test_muon_part_against_svd():
    """First step from rest: every matrix moves by rate * stretch along U V^T of its gradient, after its decay."""
    model = small_model()
    settings = recipe(matrix_rate=0.1, matrix_decay=0.2)
    before = {slot.name: model.master_view(slot.name).clone() for slot in model.slots}
    [row, *_] = gradients(model, 1.0)
    run(model, settings, [row], 2, 0.5)
    summed = row[0] + row[1]
    seen = 0
    for slot in model.slots:
        if slot.kind != "matrix":
            continue
        moved = model.master_view(slot.name) - before[slot.name] * (1 - 0.05 * 0.2)
        gradient = summed[slot.start : slot.start + slot.size].view(slot.shape)
        if slot.name.endswith("qkv"):  # q [64,32], k [32,32] and v [32,32] apart
            pairs = list(zip(moved.split([64, 32, 32]), gradient.split([64, 32, 32])))
        elif slot.name.endswith("gate_up"):  # gate and up of each expert apart
            pairs = [(m, g) for e in range(4) for m, g in zip(moved[e].chunk(2), gradient[e].chunk(2))]
        else:
            pairs = list(zip(moved, gradient)) if moved.dim() == 3 else [(moved, gradient)]
        for move, grad in pairs:
            rows, columns = move.shape
            unit = move.double().numpy() / (-0.05 * max(1, rows / columns) ** 0.5)
            expected = polar(grad.double().numpy())
            values = np.linalg.svd(unit, compute_uv=False)
            assert values.max() < 1.3 and np.median(values) > 0.6
            cosine = (unit * expected).sum() / np.linalg.norm(unit) / np.linalg.norm(expected)
            assert cosine > 0.95, slot.name
            seen += 1
    assert seen == 2 * (3 + 1 + 8 + 4)
    assert torch.equal(model.compute, model.master.bfloat16())
