"""The paper's ablation (section 4.3): the blocks that only it needs, and what each variant changes.

Which of a DBB's parts does the work: more branches, other branches, or the norms that make a branch nonlinear while it
is trained? Every variant folds to the same network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn

from dbb.blocks import BLOCKS, ConvBlock, ConvSpec, DiverseBranchBlock, Recipe, conv_norm
from dbb.layers import Parallel


class LinearBlock(ConvBlock):
    """Convolutions without norms of their own, added, then one batch norm: linear in training, too.

    Arguments as `nn.Conv2d`, and parts: the kernels that are added, "kxk" or "1x1".
    """

    @staticmethod
    def recipes(spec: ConvSpec, parts: Iterable[str] = ("kxk", "1x1")) -> dict[str, Recipe]:
        """One branch, which holds all."""
        return {"sum": lambda spec: _sum_norm(spec, parts)}


class FoldedStartBlock(ConvBlock):
    """A plain convolution and norm that starts with the kernel that a fresh DBB folds to.

    Arguments as `nn.Conv2d`.
    """

    @staticmethod
    def recipes(spec: ConvSpec) -> dict[str, Recipe]:
        """One branch, KxK and norm."""
        return {"kxk": _folded_start}


def _sum_norm(spec: ConvSpec, parts: Iterable[str]) -> nn.Sequential:
    sizes = {"kxk": None, "1x1": 1}
    unknown = [part for part in parts if part not in sizes]
    if unknown:
        raise ValueError(f"parts {unknown} are not known: choose from {', '.join(sizes)}")
    convs = {part: conv_norm(spec, sizes[part])[:-1] for part in parts}
    return nn.Sequential(OrderedDict(convs=Parallel(convs), bn=nn.BatchNorm2d(spec.out_channels)))


@torch.no_grad()
def _folded_start(spec: ConvSpec) -> nn.Sequential:
    branch = conv_norm(spec)
    # Its kernel does not depend on where the windows lie.
    block = DiverseBranchBlock(spec.in_channels, spec.out_channels, spec.kernel_size, groups=spec.groups)
    kernel, _ = block.get_equivalent_kernel_bias()
    branch.conv.weight.copy_(kernel)
    return branch


BLOCKS.update(linear=LinearBlock, folded_start=FoldedStartBlock)


def _branches(*names: str) -> dict:
    return {"block": "dbb", "block_options": {"branches": list(names)}}


def _copies(number: int) -> dict:
    return {"block": "dbb", "block_options": {"branches": {f"kxk_{n}": "kxk" for n in range(1, number + 1)}}}


# Each variant by name: what it changes in a recipe. The paper's rows first, then questions that its text leaves open.
VARIANTS = {
    "plain": {"block": "plain"},
    "dbb": {"block": "dbb"},
    "without_1x1": _branches("kxk", "1x1_kxk", "1x1_avg"),
    "without_1x1_kxk": _branches("kxk", "1x1", "1x1_avg"),
    "without_1x1_avg": _branches("kxk", "1x1", "1x1_kxk"),
    "without_kxk": _branches("1x1", "1x1_kxk", "1x1_avg"),
    "kxk_1x1": _branches("kxk", "1x1"),
    "double_duplicate": _copies(2),
    "triple_duplicate": _copies(3),
    "kxk_1x1_linear": {"block": "linear"},
    "folded_start": {"block": "folded_start"},
    "gamma_half": {"block": "dbb", "block_options": {"gamma": 0.5}},
    "single_init": {"block": "dbb", "block_options": {"single_init": True}},
    "internal_half": {"block": "dbb", "block_options": {"internal_ratio": 0.5}},
    "internal_double": {"block": "dbb", "block_options": {"internal_ratio": 2}},
    "without_identity": {"block": "dbb", "block_options": {"identity": False}},
    "border_batch": {"block": "dbb", "block_options": {"border": "batch"}},
}
