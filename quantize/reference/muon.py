"""The optimiser: Muon for matrices, AdamW for the rest, each process updating its share of the shared weights.

Muon: Keller Jordan et al. 2024 (Newton-Schulz orthogonalised momentum). Leaves out: rates over time (train).
"""

from __future__ import annotations

import dataclasses

import torch

from quantize.reference.model import ReferenceModel
from quantize.reference.state import Recipe

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration of Muon on [M, rows, columns] with rows <= columns, in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        gram = torch.bmm(x, x.transpose(1, 2))
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


class Optimiser:
    """Muon for the matrices, AdamW for the rest; process `rank` of `world` updates its share of both.

    state fp32 [2, P] in shared memory: first moment (or Muon's momentum) and second moment.
    """

    def __init__(self, model: ReferenceModel, recipe: Recipe, state: torch.Tensor, rank: int, world: int) -> None:
        self.model, self.recipe, self.state = model, recipe, state
        slots = model.slots
        other_end = next(s.start for s in slots if s.kind == "matrix")
        if recipe.optimiser == "adamw":
            other_end = model.master.numel()
        share = -(-other_end // world)
        self.other_all = slice(0, other_end)
        self.other = slice(rank * share, min(other_end, (rank + 1) * share))
        self.matrices = [
            s for s in slots if s.kind == "matrix" and int(s.name.split(".")[0]) % world == rank
        ]  # fmt: skip
        if recipe.optimiser == "adamw":
            self.matrices = []

    def _parts(self, slot, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The separate matrices of one parameter as views [M, rows, columns]."""
        c = self.model.config
        view = tensor[slot.start : slot.start + slot.size].view(slot.shape)
        if slot.name.endswith(".qkv"):
            q, k, v = view.split([c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim])
            return [q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)]
        if slot.name.endswith(".gate_up"):
            return [view.view(-1, view.shape[1] // 2, view.shape[2])]
        return [view if view.dim() == 3 else view.unsqueeze(0)]

    @torch.no_grad()
    def step(self, gradients: list[torch.Tensor], scale: float, number: int, multiplier: float) -> float:
        """One update from the sum of `gradients` times `scale`; returns the norm of AdamW's gradient."""
        r, model = self.recipe, self.model
        everything = gradients[0][self.other_all]
        for g in gradients[1:]:
            everything = everything + g[self.other_all]
        norm = float(everything.norm()) * scale
        grad = everything[self.other] * (scale * min(1.0, r.clip / (norm + 1e-6)))
        first, second = self.state[0, self.other], self.state[1, self.other]
        first.lerp_(grad, 1 - r.other_betas[0])
        second.mul_(r.other_betas[1]).addcmul_(grad, grad, value=1 - r.other_betas[1])
        correct1 = 1 - r.other_betas[0] ** (number + 1)
        correct2 = 1 - r.other_betas[1] ** (number + 1)
        denominator = second.sqrt().div_(correct2**0.5).add_(1e-8)
        master = model.master[self.other]
        rate = r.other_rate * multiplier
        if r.optimiser == "adamw":
            master.mul_(1 - rate * 0.05)
        master.addcdiv_(first, denominator, value=-rate / correct1)
        model.compute[self.other].copy_(master)

        groups: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, bool]]] = {}
        for slot in self.matrices:
            where = slice(slot.start, slot.start + slot.size)
            grad = gradients[0][where]
            for g in gradients[1:]:
                grad = grad + g[where]
            momentum = self.state[0, where]
            momentum.lerp_(grad, 1 - r.matrix_momentum)
            update = grad.lerp(momentum, r.matrix_momentum)
            flat = dataclasses.replace(slot, start=0)
            for part, target in zip(self._parts(flat, update), self._parts(slot, model.master), strict=True):
                tall = part.shape[1] > part.shape[2]
                wide = part.transpose(1, 2) if tall else part
                groups.setdefault(tuple(wide.shape[1:]), []).append((wide, target, tall))
        rate = r.matrix_rate * multiplier
        for members in groups.values():
            result = orthogonalise(torch.cat([wide for wide, _, _ in members]))
            for piece, (_, target, tall) in zip(
                result.split([len(wide) for wide, _, _ in members]), members, strict=True
            ):
                stretch = max(1.0, target.shape[1] / target.shape[2]) ** 0.5
                target.mul_(1 - rate * r.matrix_decay)
                target.add_(piece.transpose(1, 2) if tall else piece, alpha=-rate * stretch)
        for slot in self.matrices:
            where = slice(slot.start, slot.start + slot.size)
            model.compute[where].copy_(model.master[where])
        return norm
