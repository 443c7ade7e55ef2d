"""What several test files share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dbb import Affine, fold

EXACT = 1e-10  # float64, in units of the scale of what is summed


def random_affine(
    out: int, in_per_group: int, kernel, *, groups: int | None = 1, bias: bool = True, **geometry
) -> Affine:
    weight = torch.randn(out, in_per_group, *kernel, dtype=torch.float64)
    return Affine(weight, torch.randn(out, dtype=torch.float64) if bias else None, groups=groups, **geometry)


def image(channels: int, height: int = 19, width: int = 23, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, height, width, dtype=torch.float64)


def assert_same(given: Tensor, wanted: Tensor, scale: Tensor | float, tolerance: float = EXACT) -> None:
    """Equal to rounding, in units of `scale` (a number, or one for each pixel)."""
    assert given.shape == wanted.shape
    scale = torch.as_tensor(scale, dtype=wanted.dtype).clamp_min(1e-30)
    error = ((given - wanted).abs() / scale).max().item()
    assert error <= tolerance, f"off by {error:.1e} of what is summed"


def assert_folds(module: nn.Module, x: Tensor) -> Affine:
    """`fold(module)` and the `nn.Conv2d` made of it answer what `module` answers in eval mode."""
    module = module.double().eval()
    folded = fold(module)
    with torch.no_grad():
        wanted, scale = module(x), 1 + folded.abs()(x.abs())
        assert_same(folded(x), wanted, scale)
        assert_same(folded.on(x.shape[1]).to_conv2d()(x), wanted, scale)
    return folded
