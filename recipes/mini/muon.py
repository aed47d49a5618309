"""Muon (Jordan et al., 2024) for matrices and convolutions, AdamW for other parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

COEFFICIENTS = ((8.28721, -23.59589, 17.30039), (4.10706, -2.94785, 0.54484), (3.94869, -2.90890, 0.55182))
"""The first steps of the Polar Express (Amsel et al., 2025)."""


def orthogonalize(matrix: Tensor) -> Tensor:
    """Approximates the nearest semi-orthogonal matrix with three quintic steps towards the polar factor."""
    x = matrix / (1.02 * matrix.norm() + 1e-7)
    flat = x.shape[0] <= x.shape[1]
    x = x if flat else x.T
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if flat else x.T


class Muon(torch.optim.Optimizer):
    """Muon for hidden weights with two or more dimensions, AdamW for biases, norms, embeddings and outer layers.

    Args:
        module: module to train.
        lr: learning rate of AdamW.
        ratio: Muon's learning rate as a multiple of ``lr``.
        outer: substrings of the names of the outer layers, which AdamW optimizes.
        weight_decay: decoupled weight decay of both.
    """

    def __init__(self, module: nn.Module, lr: float, ratio: float, outer: tuple[str, ...], weight_decay: float = 0.01):
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        hidden = [p for n, p in named if p.ndim >= 2 and not any(o in n for o in outer)]
        ids = {id(p) for p in hidden}
        rest = [p for _, p in named if id(p) not in ids]
        groups = [{"params": hidden, "muon": True, "lr": lr * ratio}, {"params": rest, "muon": False, "lr": lr}]
        super().__init__([g for g in groups if g["params"]], {"weight_decay": weight_decay, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state["step"] = 0
                    if not group["muon"]:
                        state["square"] = torch.zeros_like(p)
                state["step"] += 1
                if group["muon"]:
                    state["momentum"].lerp_(p.grad, 0.05)
                    update = orthogonalize(p.grad.lerp(state["momentum"], 0.95).flatten(1))
                    update = update * max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"])
                else:
                    b1, b2 = group["betas"]
                    state["momentum"].lerp_(p.grad, 1 - b1)
                    state["square"].lerp_(p.grad.square(), 1 - b2)
                    mean = state["momentum"] / (1 - b1 ** state["step"])
                    square = state["square"] / (1 - b2 ** state["step"])
                    p.add_(mean / (square.sqrt() + 1e-8), alpha=-group["lr"])
