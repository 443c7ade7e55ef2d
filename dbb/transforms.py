"""The six transforms of the paper (section 3.2) by their names and numbers, each an operator of `affine.py`."""

from __future__ import annotations

from torch import nn

from dbb.affine import Affine, Pair, average, concat, pair
from dbb.fold import fold


def transform_1_conv_norm(conv: nn.Conv2d | Affine, norm: nn.BatchNorm2d) -> Affine:
    """Transform I: a convolution and its batch norm are a convolution (formulas 5 and 6)."""
    return _affine(conv) >> fold(norm)


def transform_2_branch_addition(*convs: nn.Conv2d | Affine) -> Affine:
    """Transform II: convolutions on the same input, added, are a convolution with the sum of the kernels."""
    first, *others = map(_affine, convs)
    return sum(others, start=first)


def transform_3_sequential_convs(first: nn.Conv2d | Affine, second: nn.Conv2d | Affine) -> Affine:
    """Transform III: a 1x1 convolution and a KxK convolution are a KxK convolution (and K1, K2 one of K1 + K2 - 1)."""
    return _affine(first) >> _affine(second)


def transform_4_depth_concatenation(*convs: nn.Conv2d | Affine) -> Affine:
    """Transform IV: convolutions on the same input, outputs stacked, are a convolution with stacked kernels."""
    return concat(*map(_affine, convs))


def transform_5_average_pooling(
    channels: int, kernel_size: int | Pair, stride: int | Pair = 1, padding: int | Pair = 0
) -> Affine:
    """Transform V: average pooling is a convolution of 1/K^2 from each channel to itself, zero elsewhere."""
    return average(kernel_size, stride, padding).on(channels)


def transform_6_multi_scale(conv: nn.Conv2d | Affine, kernel_size: int | Pair) -> Affine:
    """Transform VI: a small kernel is a larger one with zeros around it, and with padding grown by as much.

    Raises ValueError where the small kernel cannot stand in the middle of the large one.
    """
    small = _affine(conv)
    grow = [large - axis.taps for large, axis in zip(pair(kernel_size), small.axes)]
    if any(g < 0 or g % 2 for g in grow):
        raise ValueError(
            f"cannot put a kernel {small.kernel_size} into the middle of one of kernel_size={kernel_size}: it needs an "
            f"even number of taps more, half on each side; elsewhere say where with Affine.widened"
        )
    more = [g // 2 * axis.dilation for g, axis in zip(grow, small.axes)]
    return small.widened(tuple((a.left + m, a.right + m) for a, m in zip(small.axes, more)), small.dilation)


def _affine(conv: nn.Module | Affine) -> Affine:
    return conv if isinstance(conv, Affine) else fold(conv)
