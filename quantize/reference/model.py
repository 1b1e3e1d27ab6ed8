"""The reference model (Qwen3-MoE, or Qwen3 dense as its control), written for fast training on a CPU.

The semantics are those of transformers' Qwen3MoeForCausalLM and Qwen3ForCausalLM; the code is not. What is
different is only how it is computed: matrix products in bfloat16 (AVX512_BF16 through oneDNN, four times the
fp32 rate), tokens sorted by expert once per layer, hand-written backward passes for experts, attention and
cross-entropy, and `torch.compile` for what is element by element in between.

Left out: generation, a key-value cache, attention across documents being masked, float16, GPUs.

Shapes: B sequences of S tokens, N = B*S tokens, H hidden, E experts, K experts per token, I expert width,
D head width, G query heads per key/value head, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

ATTENTION_BLOCK = 128
LOGITS_CHUNK = 1024
ROW_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. `dense_intermediate` > 0 replaces the experts by one SwiGLU MLP of that width."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 16
    experts_per_token: int = 4
    intermediate: int = 128
    dense_intermediate: int = 0
    rope_theta: float = 10000.0
    eps: float = 1e-6
    context: int = 512

    def as_dense(self) -> ModelConfig:
        """The control: the same active size without routing."""
        return dataclasses.replace(self, dense_intermediate=self.experts_per_token * self.intermediate)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat buffers. kind: 'matrix' (Muon) or 'other' (AdamW)."""

    name: str
    shape: tuple[int, ...]
    kind: str
    low_precision: bool
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def layout(config: ModelConfig) -> list[Slot]:
    """Every parameter in order; 'other' first (one contiguous AdamW region), then the matrices layer by layer."""
    c = config
    other: list[tuple[str, tuple[int, ...], str, bool]] = [("embed", (c.vocab, c.hidden), "other", True)]
    matrices: list[tuple[str, tuple[int, ...], str, bool]] = []
    for n in range(c.layers):
        other += [
            (f"{n}.norm1", (c.hidden,), "other", False),
            (f"{n}.norm2", (c.hidden,), "other", False),
            (f"{n}.q_norm", (c.head_dim,), "other", False),
            (f"{n}.k_norm", (c.head_dim,), "other", False),
        ]
        qkv_rows = (c.heads + 2 * c.kv_heads) * c.head_dim
        matrices += [
            (f"{n}.qkv", (qkv_rows, c.hidden), "matrix", True),
            (f"{n}.o", (c.hidden, c.heads * c.head_dim), "matrix", True),
        ]
        if c.dense_intermediate:
            experts, width = 1, c.dense_intermediate
        else:
            experts, width = c.experts, c.intermediate
            other.append((f"{n}.router", (c.experts, c.hidden), "other", False))
        matrices += [
            (f"{n}.gate_up", (experts, 2 * width, c.hidden), "matrix", True),
            (f"{n}.down", (experts, c.hidden, width), "matrix", True),
        ]
    other.append(("norm", (c.hidden,), "other", False))
    slots, start = [], 0
    for name, shape, kind, low in other + matrices:
        slots.append(Slot(name, shape, kind, low, start))
        start += math.prod(shape)
        start += -start % 32
    return slots


def flat_size(slots: list[Slot]) -> int:
    end = slots[-1].start + slots[-1].size
    return end + (-end % 32)


# --- element-wise pieces; compiled by `compile_pieces`, usable without -------------------------------------


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def _attention_in(x, norm, qkv, q_norm, k_norm, cos, sin, kv_heads: int, group: int, head: int, eps: float):
    """x [B,S,H] fp32 -> q [S/block, B*KV, G*block, D], k and v [B*KV, S, D], all bf16; q carries the 1/sqrt(D)."""
    b, s, width = x.shape
    h = _rms(x, norm, eps).bfloat16().view(b * s, width)
    y = torch.mm(h, qkv.t()).view(b, s, (group + 2) * kv_heads, head)
    heads = group * kv_heads
    q = _rotate(_rms(y[:, :, :heads].float(), q_norm, eps), cos, sin) * head**-0.5
    k = _rotate(_rms(y[:, :, heads : heads + kv_heads].float(), k_norm, eps), cos, sin)
    v = y[:, :, heads + kv_heads :]
    blocks = s // ATTENTION_BLOCK
    q = q.bfloat16().view(b, blocks, ATTENTION_BLOCK, kv_heads, group, head)
    q = q.permute(1, 0, 3, 4, 2, 5).reshape(blocks, b * kv_heads, group * ATTENTION_BLOCK, head)
    k = k.bfloat16().permute(0, 2, 1, 3).reshape(b * kv_heads, s, head)
    v = v.permute(0, 2, 1, 3).reshape(b * kv_heads, s, head)
    return q.contiguous(), k.contiguous(), v.contiguous()


def _attention_out(x, a, o, norm, kv_heads: int, group: int, head: int, eps: float):
    """Adds the attention result to the residual; returns (residual fp32 [N,H], normed bf16 [N,H])."""
    b, s, width = x.shape
    blocks = s // ATTENTION_BLOCK
    a = a.view(blocks, b, kv_heads, group, ATTENTION_BLOCK, head).permute(1, 0, 4, 2, 3, 5)
    y = torch.mm(a.reshape(b * s, kv_heads * group * head), o.t())
    x = x.view(b * s, width) + y
    return x, _rms(x, norm, eps).bfloat16()


def _route(h, router, k: int):
    """h [N,H] bf16 -> weights [N,K] fp32, experts [N,K], balance loss (1 when even) and z-loss (both scalars)."""
    logits = torch.mm(h.float(), router.t())
    probability = torch.softmax(logits, -1)
    top, index = torch.topk(probability, k, -1)
    experts = router.shape[0]
    share = (index.unsqueeze(-1) == torch.arange(experts)).float().sum((0, 1)) / index.numel()
    balance = experts * (share * probability.mean(0)).sum()
    z = torch.logsumexp(logits, -1).square().mean()
    return top / top.sum(-1, keepdim=True), index, balance, z


def _swiglu(h, weight):
    """h [M,2I] bf16 (gate, up), weight [M,1] fp32 -> the gated product times the routing weight, bf16 [M,I]."""
    gate, up = h.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up * weight).bfloat16()


def _swiglu_backward(h, weight, da):
    """Gradients of `_swiglu`: (d h, the output again, d weight [M])."""
    gate, up = h.float().chunk(2, -1)
    da = da.float()
    sig = torch.sigmoid(gate)
    silu = gate * sig
    product = silu * up
    dw = (da * product).sum(-1)
    da = da * weight
    dgate = da * up * (sig + silu * (1 - sig))
    return torch.cat((dgate, da * silu), -1).bfloat16(), (product * weight).bfloat16(), dw


def _combine(y, inverse, residual):
    """residual [N,H] plus the K rows of y [N*K,H] that belong to each token, in fixed order."""
    total = residual
    for slot in range(inverse.shape[1]):
        total = total + y[inverse[:, slot]].float()
    return total


def _combine_only(y, inverse):
    total = y[inverse[:, 0]].float()
    for slot in range(1, inverse.shape[1]):
        total = total + y[inverse[:, slot]].float()
    return total.bfloat16()


def _softmax_backward(p, dp):
    p32, dp32 = p.float(), dp.float()
    return (p32 * (dp32 - (p32 * dp32).sum(-1, keepdim=True))).bfloat16()


def _cross_entropy(logits, target, scale: float):
    """logits [M,V] bf16 -> (nll [M] fp32, gradient of scale * sum(nll) with respect to logits, bf16)."""
    x = logits.float()
    lse = torch.logsumexp(x, -1, keepdim=True)
    hit = target.unsqueeze(-1) == torch.arange(x.shape[-1])
    nll = lse.squeeze(-1) - torch.gather(x, 1, target.unsqueeze(-1)).squeeze(-1)
    return nll, ((torch.exp(x - lse) - hit.float()) * scale).bfloat16()


def _final_norm(x, norm, eps: float):
    return _rms(x, norm, eps).bfloat16()


PIECES = {
    "attention_in": _attention_in,
    "attention_out": _attention_out,
    "route": _route,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "combine": _combine,
    "combine_only": _combine_only,
    "softmax_backward": _softmax_backward,
    "cross_entropy": _cross_entropy,
    "final_norm": _final_norm,
}


class _Pieces:
    """The functions above, compiled or not."""

    def __init__(self) -> None:
        self.__dict__.update(PIECES)

    def compile(self) -> None:
        torch._dynamo.config.cache_size_limit = 64
        self.__dict__.update({name: torch.compile(f, dynamic=False) for name, f in PIECES.items()})


pieces = _Pieces()


def compile_pieces() -> None:
    """Compile the element-wise pieces (needs a C++ compiler; about a minute the first time, cached after)."""
    pieces.compile()


# --- hand-written forward and backward ---------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Causal attention in query blocks, each against the keys up to its own end only.

    torch's CPU flash kernel took three times as long at this size (512 x 64), forward and backward.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        blocks, rows, _, _ = q.shape
        group = q.shape[2] // ATTENTION_BLOCK
        mask = torch.full((ATTENTION_BLOCK, ATTENTION_BLOCK), -math.inf, dtype=q.dtype).triu_(1)
        out = torch.empty_like(q)
        kept = []
        for j in range(blocks):
            end = (j + 1) * ATTENTION_BLOCK
            scores = torch.bmm(q[j], k[:, :end].transpose(1, 2))
            scores.view(rows, group, ATTENTION_BLOCK, end)[..., j * ATTENTION_BLOCK :].add_(mask)
            p = torch.softmax(scores, -1)
            torch.bmm(p, v[:, :end], out=out[j])
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, *kept = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk = dv = None
        for j in reversed(range(q.shape[0])):
            end = (j + 1) * ATTENTION_BLOCK
            p = kept[j]
            ds = pieces.softmax_backward(p, torch.bmm(dout[j], v[:, :end].transpose(1, 2)))
            torch.bmm(ds, k[:, :end], out=dq[j])
            dk_j, dv_j = torch.bmm(ds.transpose(1, 2), q[j]), torch.bmm(p.transpose(1, 2), dout[j])
            if dk is None:
                dk, dv = dk_j.float(), dv_j.float()
            else:
                dk[:, :end] += dk_j
                dv[:, :end] += dv_j
        return dq, dk.bfloat16(), dv.bfloat16()


class _Experts(torch.autograd.Function):
    """residual + sum of the chosen experts' outputs; tokens sorted by expert, one matrix product per expert.

    The routing weight multiplies the gated product (width I) rather than the output (width H): the same by
    linearity, and its gradient then needs no copy of the expert outputs. Each expert's rows are padded to a
    multiple of ROW_MULTIPLE (token 0 with weight 0): oneDNN generates code for every new shape, and with the bare
    counts a third of the time went into that.
    """

    @staticmethod
    def forward(ctx, h, weight, index, gate_up, down, residual):
        experts = gate_up.shape[0]
        n, k = index.shape
        if experts == 1:
            order = place = token = inverse = None
            counts, x, w = [n], h, weight
        else:
            flat = index.view(-1)
            order = torch.argsort(flat, stable=True)
            real = torch.bincount(flat, minlength=experts)
            padded = (real + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
            counts = padded.tolist()
            shift = (padded.cumsum(0) - padded) - (real.cumsum(0) - real)
            place = torch.arange(n * k) + shift[flat[order]]
            rows = n * k + experts * ROW_MULTIPLE  # constant, so that the compiled pieces fit every batch
            token = torch.zeros(rows, dtype=torch.long)
            token[place] = order // k
            inverse = torch.empty_like(order)
            inverse[order] = place
            inverse = inverse.view(n, k)
            x = h.index_select(0, token)
            w = torch.zeros(rows, 1)
            w[place, 0] = weight.reshape(-1)[order]
        up = torch.empty(x.shape[0], gate_up.shape[1], dtype=h.dtype)
        start = 0
        for e, count in enumerate(counts):
            if count:
                torch.mm(x[start : start + count], gate_up[e].t(), out=up[start : start + count])
            start += count
        act = pieces.swiglu(up, w)
        y = torch.empty(x.shape[0], down.shape[1], dtype=h.dtype)
        start = 0
        for e, count in enumerate(counts):
            if count:
                torch.mm(act[start : start + count], down[e].t(), out=y[start : start + count])
            start += count
        ctx.counts = counts
        ctx.save_for_backward(x, up, w, order, place, token, inverse, gate_up, down)
        return residual + y if inverse is None else pieces.combine(y, inverse, residual)

    @staticmethod
    def backward(ctx, dout):
        x, up, w, order, place, token, inverse, gate_up, down = ctx.saved_tensors
        dy = dout.bfloat16()
        if token is not None:
            dy = dy.index_select(0, token)
        da = torch.empty(x.shape[0], down.shape[2], dtype=x.dtype)
        start = 0
        for e, count in enumerate(ctx.counts):
            if count:
                torch.mm(dy[start : start + count], down[e], out=da[start : start + count])
            start += count
        dup, act, dw = pieces.swiglu_backward(up, w, da)
        dx = torch.empty_like(x)
        dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)
        start = 0
        for e, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            if count:
                torch.mm(dup[rows], gate_up[e], out=dx[rows])
                torch.mm(dup[rows].t(), x[rows], out=dgate_up[e])
                torch.mm(dy[rows].t(), act[rows], out=ddown[e])
            else:
                dgate_up[e].zero_()
                ddown[e].zero_()
            start += count
        if token is None:
            return dx, None, None, dgate_up, ddown, dout
        dweight = torch.empty(order.shape[0])
        dweight[order] = dw[place]
        return pieces.combine_only(dx, inverse), dweight.view(inverse.shape), None, dgate_up, ddown, dout


class _Embed(torch.autograd.Function):
    """Rows of the embedding; the gradient is added to an fp32 buffer (bf16 sums lose the frequent tokens).

    `anchor` is a scalar that requires a gradient, so that autograd calls `backward` at all.
    """

    @staticmethod
    def forward(ctx, embed, ids, gradient, anchor):
        ctx.ids, ctx.gradient = ids, gradient
        return embed.index_select(0, ids.reshape(-1)).float().view(*ids.shape, -1)

    @staticmethod
    def backward(ctx, dout):
        ctx.gradient.index_add_(0, ctx.ids.reshape(-1), dout.reshape(-1, dout.shape[-1]))
        return None, None, None, None


class _Head(torch.autograd.Function):
    """Mean cross-entropy of the tied head, its gradient computed in the forward pass chunk by chunk."""

    @staticmethod
    def forward(ctx, h, embed, target, gradient):
        n = h.shape[0]
        dh = torch.empty_like(h)
        total = 0.0
        for start in range(0, n, LOGITS_CHUNK):
            rows = slice(start, start + LOGITS_CHUNK)
            logits = torch.mm(h[rows], embed.t())
            nll, dlogits = pieces.cross_entropy(logits, target[rows], 1.0 / n)
            total += nll.sum()
            torch.mm(dlogits, embed, out=dh[rows])
            gradient.add_(torch.mm(dlogits.t(), h[rows]))
        ctx.save_for_backward(dh)
        return total / n

    @staticmethod
    def backward(ctx, dloss):
        (dh,) = ctx.saved_tensors
        return dh, None, None, None


class ReferenceModel:
    """The model over flat buffers: `master` fp32 [P] holds the truth, `compute` bf16 [P] what the products read.

    Gradients: `backward` adds to `gradient` fp32 [P]. The loss must be used with weight 1 (the head's gradient
    is computed in its forward pass).
    """

    def __init__(self, config: ModelConfig, master: Tensor, compute: Tensor, gradient: Tensor | None = None) -> None:
        self.config = config
        self.slots = layout(config)
        self.master, self.compute, self.gradient = master, compute, gradient
        self.parameters: dict[str, Tensor] = {}
        for slot in self.slots:
            source = compute if slot.low_precision else master
            view = source[slot.start : slot.start + slot.size].view(slot.shape)
            self.parameters[slot.name] = view.detach().requires_grad_(slot.name != "embed")
        position = torch.arange(config.context, dtype=torch.float32)
        rate = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        angle = torch.outer(position, rate)
        self._cos, self._sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        self._anchor = torch.zeros((), requires_grad=True)

    @classmethod
    def allocate(cls, config: ModelConfig) -> ReferenceModel:
        """A model with buffers of its own (zeros), for evaluation and export."""
        size = flat_size(layout(config))
        return cls(config, torch.zeros(size), torch.zeros(size, dtype=torch.bfloat16))

    def master_view(self, name: str) -> Tensor:
        slot = next(s for s in self.slots if s.name == name)
        return self.master[slot.start : slot.start + slot.size].view(slot.shape)

    def gradient_view(self, name: str) -> Tensor:
        slot = next(s for s in self.slots if s.name == name)
        return self.gradient[slot.start : slot.start + slot.size].view(slot.shape)

    def initialise(self, seed: int) -> None:
        """Normal weights of deviation 0.5/sqrt(fan in); the projections into the residual stream start at zero."""
        generator = torch.Generator().manual_seed(seed)
        for slot in self.slots:
            view = self.master_view(slot.name)
            if slot.name == "embed":
                view.normal_(0, 0.02, generator=generator)
            elif "norm" in slot.name:
                view.fill_(1)
            elif slot.name.endswith((".o", ".down")):
                view.zero_()
            else:
                view.normal_(0, 0.5 * slot.shape[-1] ** -0.5, generator=generator)
        self.refresh()

    def refresh(self) -> None:
        self.compute.copy_(self.master)

    def _trunk(self, ids: Tensor, embed_gradient: Tensor | None):
        """ids [B,S] -> (final normed state bf16 [N,H], balance loss, z-loss), the losses summed over layers."""
        c, p = self.config, self.parameters
        b, s = ids.shape
        group = c.heads // c.kv_heads
        cos, sin = self._cos[:s], self._sin[:s]
        x = _Embed.apply(p["embed"], ids, embed_gradient, self._anchor)
        balance = z = torch.zeros(())
        for n in range(c.layers):
            q, k, v = pieces.attention_in(
                x, p[f"{n}.norm1"], p[f"{n}.qkv"], p[f"{n}.q_norm"], p[f"{n}.k_norm"], cos, sin,
                c.kv_heads, group, c.head_dim, c.eps,
            )  # fmt: skip
            a = _Attention.apply(q, k, v)
            x, h = pieces.attention_out(x, a, p[f"{n}.o"], p[f"{n}.norm2"], c.kv_heads, group, c.head_dim, c.eps)
            if c.dense_intermediate:
                weight, index = torch.ones(b * s, 1), torch.zeros(b * s, 1, dtype=torch.long)
            else:
                weight, index, balance_n, z_n = pieces.route(h, p[f"{n}.router"], c.experts_per_token)
                balance, z = balance + balance_n, z + z_n
            x = _Experts.apply(h, weight, index, p[f"{n}.gate_up"], p[f"{n}.down"], x).view(b, s, c.hidden)
        return pieces.final_norm(x.view(b * s, c.hidden), p["norm"], c.eps), balance, z

    def backward(self, ids: Tensor, target: Tensor, balance_weight: float, z_weight: float, first: bool):
        """Adds the gradients of one micro-batch (ids, target [B,S]) to `gradient`; `first` overwrites instead.

        Returns (cross-entropy in nats, balance loss per layer) as floats.
        """
        embed_gradient = self.gradient_view("embed")
        if first:
            embed_gradient.zero_()
        h, balance, z = self._trunk(ids, embed_gradient)
        loss = _Head.apply(h, self.parameters["embed"], target.reshape(-1), embed_gradient)
        (loss + balance_weight * balance + z_weight * z).backward()
        for slot in self.slots:
            parameter = self.parameters[slot.name]
            if slot.name == "embed":
                continue
            view = self.gradient[slot.start : slot.start + slot.size].view(slot.shape)
            if first:
                view.copy_(parameter.grad)
            else:
                view.add_(parameter.grad)
            parameter.grad = None
        return float(loss), float(balance) / self.config.layers

    @torch.no_grad()
    def token_nll(self, ids: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood in nats of every target, [B,S] fp32."""
        h, _, _ = self._trunk(ids, None)
        embed, flat = self.parameters["embed"], target.reshape(-1)
        out = []
        for start in range(0, h.shape[0], LOGITS_CHUNK):
            logits = torch.mm(h[start : start + LOGITS_CHUNK], embed.t()).float()
            out.append(torch.nn.functional.cross_entropy(logits, flat[start : start + LOGITS_CHUNK], reduction="none"))
        return torch.cat(out).view(target.shape)
