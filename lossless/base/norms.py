"""RMS norms in one call, where the base's take six.

Knows: which modules are x / sqrt(mean(x^2) + eps) times a weight, or times 1 + that weight (found by trying), and how to compute it with
a kernel of ours. Does not know: models, or which of their modules are to be replaced (base/packed.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import kernels

_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.03}  # of outputs that are about as large as the weight


class FusedNorm(nn.Module):
    """Stands in for an RMS norm, over the same weight: the same numbers but for rounding, and a row's bits are its own.

    Args:
        module: the norm.
        eps: what it adds to the mean of squares; offset: to its weight, 0 or 1.
    """

    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        super().__init__()
        self.weight: Any = module.weight
        self._module, self.eps, self.offset = [module], eps, offset  # in a list: it is no part of the model

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` -> `[..., dim]`."""
        if rows.dtype is not self.weight.dtype or rows.dtype not in _CLOSE or (rows.requires_grad and torch.is_grad_enabled()):
            return self.original()(rows)
        return kernels.norm(rows, self.weight, self.offset, self.eps)

    def original(self) -> nn.Module:
        """The norm that it stands in for, with the weight as it is now."""
        module: Any = self._module[0]
        module.weight = self.weight
        return module


def _eps(module: Any) -> float | None:
    """What a norm adds to the mean of squares, None if that is not to be seen."""
    found = [getattr(module, name) for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)]
    return found[0] if found else None


@torch.no_grad()
def fused(module: nn.Module) -> FusedNorm | None:
    """What may stand in for a module, None if it is no norm of this kind, or there is no kernel here."""
    weight: Any = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or (eps := _eps(module)) is None or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    if module._forward_hooks or module._forward_pre_hooks or weight.ndim != 1 or weight.device.type != "cpu" or weight.dtype not in _CLOSE or not kernels.available():
        return None
    rows = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [1.0], [30.0]])
    expected = module(rows.to(weight.dtype)).float()
    for offset in (0.0, 1.0):
        made = FusedNorm(module, eps, offset)
        if (made(rows.to(weight.dtype)).float() - expected).abs().max() < _CLOSE[weight.dtype] * expected.abs().max():
            return made
    return None
