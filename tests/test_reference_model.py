"""The reference model against transformers: likelihoods through the export, and every gradient of the hand-written backward.

References: Qwen3MoeForCausalLM and Qwen3ForCausalLM in float32, torch's autograd in float64. Each comparison has a control
that must fail it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from quantize.reference import model as reference  # noqa: E402
from quantize.reference.export import evaluate_bits_per_byte, hugging_face_config, hugging_face_tensors  # noqa: E402
from quantize.reference.model import ModelConfig, ReferenceModel, flat_size, layout  # noqa: E402

MOE = ModelConfig(
    vocab=96,
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    experts=4,
    experts_per_token=2,
    intermediate=32,
    context=256,
)
BALANCE, Z = 0.5, 0.05  # large, so that the router's gradient depends on them


def filled(config: ModelConfig) -> ReferenceModel:
    """A model in which every parameter matters, its master weights exact in bf16 (the export rounds)."""
    size = flat_size(layout(config))
    model = ReferenceModel(config, torch.zeros(size), torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size))
    generator = torch.Generator().manual_seed(5)
    for slot in model.slots:
        view = model.master_view(slot.name)
        if "norm" in slot.name:
            view.uniform_(0.5, 1.5, generator=generator)
        else:
            view.normal_(0, {"embed": 0.5}.get(slot.name, 1.5 * slot.shape[-1] ** -0.5), generator=generator)
    model.master.copy_(model.master.bfloat16().float())
    model.refresh()
    return model


def in_transformers(model: ReferenceModel, **changed):
    """The exported weights in transformers, float32."""
    values = hugging_face_config(model.config) | changed
    kind = getattr(transformers, values["architectures"][0])
    theirs = kind(kind.config_class(**values)).float().eval()
    tensors = {name: tensor.float() for name, tensor in hugging_face_tensors(model).items()}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # tied
    theirs.tie_weights()
    return theirs


def text(config: ModelConfig, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(0, config.vocab, (2, 257), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1], rows[:, 1:]


def their_nll(theirs, ids, target) -> torch.Tensor:
    logits = theirs(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.reshape(-1), reduction="none").view(
        target.shape
    )


@pytest.fixture(scope="module", params=["moe", "dense"])
def model(request):
    return filled(MOE if request.param == "moe" else MOE.as_dense())


# --- likelihoods -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_token_likelihoods_equal_transformers(model):
    ids, target = text(model.config)
    ours, theirs = model.token_nll(ids, target), their_nll(in_transformers(model), ids, target)
    gap = (ours - theirs).abs()
    # bf16 keeps 8 bits: a per cent or so of logits whose spread is about 4; a token near a tie may choose another expert
    assert theirs.std() > 1
    assert gap.median() < 0.04 and gap.quantile(0.95) < 0.2
    assert abs(float(ours.mean() - theirs.mean())) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("fault", ["rope_theta", "gate and up swapped", "k_norm", "one head off"])
def test_a_different_model_is_noticed(model, fault):
    ids, target = text(model.config)
    theirs = in_transformers(model, **({"rope_theta": 100.0} if fault == "rope_theta" else {}))
    weights = theirs.state_dict()
    if fault == "gate and up swapped":
        place = "model.layers.1.mlp." + ("" if model.config.dense_intermediate else "experts.2.")
        gate, up = weights[place + "gate_proj.weight"], weights[place + "up_proj.weight"]
        kept = gate.clone()
        gate.copy_(up)
        up.copy_(kept)
    elif fault == "k_norm":
        weights["model.layers.0.self_attn.k_norm.weight"].fill_(1)
    elif fault == "one head off":
        q = weights["model.layers.0.self_attn.q_proj.weight"]
        q.copy_(q.roll(model.config.head_dim, 0))
    gap = (model.token_nll(ids, target) - their_nll(theirs, ids, target)).abs()
    assert gap.quantile(0.95) > 0.3


@torch.no_grad()
def test_gates_that_do_not_sum_to_one_are_noticed():
    moe = filled(MOE)
    ids, target = text(MOE)
    gap = (moe.token_nll(ids, target) - their_nll(in_transformers(moe, norm_topk_prob=False), ids, target)).abs()
    assert gap.quantile(0.95) > 0.3


@torch.no_grad()
def test_no_token_sees_what_follows(model):
    ids, target = text(model.config)
    later = ids.clone()
    later[:, 200:] = (later[:, 200:] + 1) % model.config.vocab
    a, b = model.token_nll(ids, target), model.token_nll(later, target)
    assert torch.equal(a[:, :200], b[:, :200]) and not torch.equal(a[:, 200:], b[:, 200:])


# --- gradients of the whole model ------------------------------------------------------------------------------------


def their_gradients(theirs, config: ModelConfig, ids, target, balance: float, z: float) -> dict[str, torch.Tensor]:
    """Gradients by autograd under our names; balance loss (Switch Transformer, per layer) and z-loss (ST-MoE) written out."""
    theirs.zero_grad()
    dense = bool(config.dense_intermediate)
    out = theirs(input_ids=ids, use_cache=False, **({} if dense else {"output_router_logits": True}))
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), target.reshape(-1))
    for logits in () if dense else out.router_logits:
        probability = logits.softmax(-1)
        chosen = torch.zeros_like(probability).scatter(1, probability.topk(config.experts_per_token).indices, 1.0)
        share = chosen.mean(0) / config.experts_per_token
        loss = loss + balance * config.experts * (share * probability.mean(0)).sum()
        loss = loss + z * logits.logsumexp(-1).square().mean()
    loss.backward()
    g = {name.removeprefix("model.").removesuffix(".weight"): p.grad for name, p in theirs.named_parameters()}
    ours = {"embed": g["embed_tokens"], "norm": g["norm"]}
    for n in range(config.layers):
        at = f"layers.{n}."
        ours[f"{n}.norm1"], ours[f"{n}.norm2"] = g[at + "input_layernorm"], g[at + "post_attention_layernorm"]
        ours[f"{n}.q_norm"], ours[f"{n}.k_norm"] = g[at + "self_attn.q_norm"], g[at + "self_attn.k_norm"]
        ours[f"{n}.qkv"] = torch.cat([g[f"{at}self_attn.{letter}_proj"] for letter in "qkv"])
        ours[f"{n}.o"] = g[at + "self_attn.o_proj"]
        mlps = [at + "mlp."] if dense else [f"{at}mlp.experts.{e}." for e in range(config.experts)]
        ours[f"{n}.gate_up"] = torch.stack([torch.cat((g[m + "gate_proj"], g[m + "up_proj"])) for m in mlps])
        ours[f"{n}.down"] = torch.stack([g[m + "down_proj"] for m in mlps])
        if not dense:
            ours[f"{n}.router"] = g[at + "mlp.gate"]
    return ours


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_gradients_equal_autograd(model):
    ids, target = text(model.config)
    theirs = in_transformers(model)
    expected = their_gradients(theirs, model.config, ids, target, BALANCE, Z)
    model.gradient.fill_(7)  # `first` must overwrite what was there
    loss, balance = model.backward(ids, target, BALANCE, Z, first=True)
    assert loss == pytest.approx(float(their_nll(theirs, ids, target).mean()), abs=0.01)
    if model.config.dense_intermediate:
        assert balance == 0
    else:
        assert 1 <= balance < 3  # 1 when the experts are used evenly
    assert set(expected) == {slot.name for slot in model.slots}
    for name, gradient in expected.items():
        assert distance(model.gradient_view(name), gradient) < 0.12, name
    once = model.gradient.clone()

    model.backward(ids, target, BALANCE, Z, first=False)
    for name in expected:  # the second micro-batch is added
        slot = next(s for s in model.slots if s.name == name)
        torch.testing.assert_close(
            model.gradient_view(name), 2 * once[slot.start : slot.start + slot.size].view(slot.shape)
        )

    other = their_gradients(theirs, model.config, *text(model.config, 1), BALANCE, Z)
    assert min(distance(model.gradient_view(name) / 2, other[name]) for name in other) > 0.2
    if not model.config.dense_intermediate:
        without = their_gradients(theirs, model.config, ids, target, 0, 0)
        assert distance(model.gradient_view("0.router") / 2, without["0.router"]) > 0.3


# --- gradients of the pieces -----------------------------------------------------------------------------------------


def test_experts_backward_with_one_expert_unused():
    n, hidden, width, experts, k = 70, 32, 16, 4, 2
    generator = torch.Generator().manual_seed(2)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    h, residual = normal(n, hidden), normal(n, hidden).float()
    gate_up, down = normal(experts, 2 * width, hidden, scale=0.3), normal(experts, hidden, width, scale=0.3)
    index = torch.stack([torch.randperm(3, generator=generator)[:k] for _ in range(n)])  # expert 3 is never chosen
    index[1:40] = torch.tensor([2, 0])  # uneven
    weight = torch.rand(n, k, generator=generator)
    upstream = torch.randn(n, hidden, generator=generator)

    leaves = [t.clone().requires_grad_() for t in (h, weight, gate_up, down, residual)]
    out = reference._Experts.apply(leaves[0], leaves[1], index, *leaves[2:])
    out.backward(upstream)

    exact = [t.double().requires_grad_() for t in (h, weight, gate_up, down, residual)]
    x, w, gu, dn, r = exact
    expected = r
    for slot in range(k):
        gate, up = torch.einsum("nh,nih->ni", x, gu[index[:, slot]]).chunk(2, -1)
        act = torch.nn.functional.silu(gate) * up
        expected = expected + w[:, slot : slot + 1] * torch.einsum("ni,nhi->nh", act, dn[index[:, slot]])
    expected.backward(upstream.double())
    assert distance(out.double(), expected) < 0.01
    for ours, theirs in zip(leaves, exact):
        assert distance(ours.grad.double(), theirs.grad) < 0.015
    assert not leaves[2].grad[3].any() and not leaves[3].grad[3].any()
    assert distance(leaves[1].grad.double().flip(1), exact[1].grad) > 0.5


def test_attention_backward_against_sdpa():
    batch, kv, group, s, d = 2, 2, 2, 256, 16
    block = reference.ATTENTION_BLOCK
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(batch, kv, group, s, d, generator=generator).bfloat16()
    k, v = (torch.randn(batch * kv, s, d, generator=generator).bfloat16() for _ in range(2))
    upstream = torch.randn(batch, kv, group, s, d, generator=generator).bfloat16()

    def to_blocks(x):  # [B,KV,G,S,D] -> [S/block, B*KV, G*block, D]
        x = x.reshape(batch * kv, group, s // block, block, d).permute(2, 0, 1, 3, 4)
        return x.reshape(s // block, batch * kv, group * block, d).contiguous()

    ours = [to_blocks(q).requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()]
    out = reference._Attention.apply(*ours)
    out.backward(to_blocks(upstream))
    exact = [t.double().requires_grad_() for t in (q.view(batch * kv, group, s, d), k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        exact[0], *(t.unsqueeze(1).expand(-1, group, -1, -1) for t in exact[1:]), is_causal=True, scale=1.0
    )
    expected.backward(upstream.view(batch * kv, group, s, d).double())
    assert distance(out.double(), to_blocks(expected)) < 0.015
    assert distance(ours[0].grad.double(), to_blocks(exact[0].grad)) < 0.03
    for mine, theirs in zip(ours[1:], exact[1:]):
        assert distance(mine.grad.double(), theirs.grad) < 0.03
    assert distance(ours[2].grad.double(), exact[1].grad) > 0.5


def test_head_backward_over_several_chunks():
    n, hidden, vocab = reference.LOGITS_CHUNK + 300, 32, 50
    generator = torch.Generator().manual_seed(6)
    h = torch.randn(n, hidden, generator=generator).bfloat16()
    embed = (torch.randn(vocab, hidden, generator=generator) * 0.5).bfloat16()
    target = torch.randint(0, vocab, (n,), generator=generator)
    leaf, gradient = h.clone().requires_grad_(), torch.zeros(vocab, hidden)
    loss = reference._Head.apply(leaf, embed, target, gradient)
    loss.backward()
    x, e = h.double().requires_grad_(), embed.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(x @ e.t(), target)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)
    assert distance(leaf.grad.double(), x.grad) < 0.02
    assert distance(gradient.double(), e.grad) < 0.02
    assert distance(gradient.double(), e.grad.roll(1, 0)) > 0.5


# --- bits per byte ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Scored:
    """Stands where a model stands; what it answers is known, so the sum says which tokens were counted."""

    nats: object  # (ids, target) -> [B,S]

    def token_nll(self, ids, target):
        assert ids.shape == target.shape
        return self.nats(ids, target)


LENGTHS = (1, 2, 255, 511, 512, 513, 767, 768, 769, 1000, 1024, 2500)


@pytest.mark.parametrize("length", LENGTHS)
def test_uniform_model_needs_log2_of_the_vocabulary(length):
    tokens = np.random.default_rng(length).integers(0, 4096, length).astype(np.uint16)
    uniform = Scored(lambda ids, target: torch.full(target.shape, math.log(4096)))
    assert evaluate_bits_per_byte(uniform, tokens, 3 * length) == pytest.approx(12 / 3, rel=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_token_is_scored_once_with_the_context_promised(length):
    tokens = np.arange(1, length + 1).astype(np.uint16)  # a token is its own position
    for digit in (1, 7, 64):  # sums with different weights: a token scored twice for one left out would show
        weigh = Scored(lambda ids, target, digit=digit: (target // digit % 11).float() * math.log(2))
        assert evaluate_bits_per_byte(weigh, tokens, 1) == pytest.approx(int((tokens // digit % 11).sum()), rel=1e-6)

    def short(ids, target):
        """1 bit for a target with fewer than 256 tokens before it in its window though the text has them."""
        at = torch.arange(ids.shape[1]).expand_as(ids)
        assert torch.equal(ids[:, 1:][target[:, 1:] > 0], target[:, :-1][target[:, 1:] > 0])
        return ((at < 255) & (target > at + 1)).float() * math.log(2)

    assert evaluate_bits_per_byte(Scored(short), tokens, 1) == 0


def test_a_trained_model_would_score_below_uniform_and_a_wrong_order_above():
    """A model that knows the next token of a counting text: nothing for it, the whole alphabet for any other."""
    knows = Scored(lambda ids, target: torch.where(target == ids + 1, 0.0, math.log(4096)))
    text = np.arange(1, 900).astype(np.uint16)
    assert evaluate_bits_per_byte(knows, text, 899) == 0
    assert evaluate_bits_per_byte(knows, text[::-1].copy(), 899) == pytest.approx(12)
