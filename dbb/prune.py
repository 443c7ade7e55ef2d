"""Fewer channels: penalties on the convolution that a block folds to, and a network without the channels that they end.

A penalty on the branches makes branches sparse, each in its own places, and their sum is not. What is deployed is the
sum, so these penalties act on it, through the branches' parameters:

- `shrink_channels_` is a proximal step of the group lasso, sum of `|(W_o, b_o)|` over the output channels of the merged
  map. A channel of it is scaled by scaling the last norm of every branch, so channels end exactly at zero;
- `decay_merged_` is a step of weight decay on the merged kernel, as the authors do it for RepVGG.

`remove_channels` cuts what answers nothing out of a folded network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from dbb.affine import Affine
from dbb.blocks import BranchBlock
from dbb.fold import is_norm

GROUPS = ("merged", "branches")
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh)
BY_CHANNEL = (*ACTIVATIONS, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout, nn.Identity)
IN_A_ROW = (nn.Conv2d, nn.Linear, *BY_CHANNEL)


def channel_sizes(a: Affine) -> Tensor:
    """The size `|(W_o, b_o)|` of each output channel "o" of a map: zero where it answers zero to everything."""
    squares = a.weight.flatten(1).square().sum(1)
    return (squares if a.bias is None else squares + a.bias.square()).sqrt()


@torch.no_grad()
def shrink_channels_(model: nn.Module, amount: float, group: str = "merged") -> None:
    """Make every output channel of every block smaller by `amount`, or zero: a proximal step, after one of the loss.

    group: "merged", channels of the map that the block folds to; "branches", each branch's own, for comparison
    amount: learning rate times the weight of the penalty

    The norms count with their running statistics. Raises ValueError for an unknown group, and for a branch that does
    not end in a batch norm with scale and shift.
    """
    if group not in GROUPS:
        raise ValueError(f"group={group!r} is not known: choose from {', '.join(GROUPS)}")
    for block in blocks(model):
        merged = channel_sizes(block.equivalent()) if group == "merged" else None
        for norm, branch in zip(last_norms(block), block.branches.fold_branches()):
            sizes = channel_sizes(branch) if merged is None else merged
            kept = (1 - amount / sizes.clamp_min(1e-30)).clamp_min(0).to(norm.weight)
            norm.weight *= kept
            norm.bias *= kept


def decay_merged_(model: nn.Module, rate: float) -> None:
    """A step of weight decay on the merged kernel of every block, taken by the kernels of its branches.

    The penalty is half of `|W_o|^2 / sum_b t_bo^2`, summed over the output channels, with the merged kernel `W` and
    `t = gamma / sigma` of each branch's last norm; neither gets a gradient. So the length of `t` does not count, and
    for a single branch this is weight decay as ever. (As in RepVGG's code, for blocks of any branches.)

    rate: learning rate times the weight of the penalty
    """
    for block in blocks(model):
        kernels = [p for p in block.branches.parameters() if p.dim() > 1]
        for kernel, grad in zip(kernels, torch.autograd.grad(merged_decay(block), kernels)):
            kernel.data.sub_(grad, alpha=rate)


def merged_decay(block: BranchBlock) -> Tensor:
    """The penalty of `decay_merged_` for one block: a number, differentiable."""
    scales = [norm.weight.square() / (norm.running_var + norm.eps) for norm in last_norms(block)]
    lengths = torch.stack(scales).sum(0).detach().double().clamp_min(1e-30)
    return (block.equivalent().weight.flatten(1).square().sum(1) / lengths).sum() / 2


@torch.no_grad()
def remove_channels(folded: nn.Module) -> nn.Sequential:
    """The same network without the output channels whose kernel is zero, and without what reads them.

    folded: convolutions, linear layers and what works on each channel by itself (activations, pooling), in a row

    Such a channel answers its bias everywhere, sent through the activation. Where that is zero, nothing is lost with
    it. Another constant moves into the next bias, if the next layer does not pad; if it does, the constant ends at the
    border, no bias can say that, and the channel stays. The answer is one flat `nn.Sequential`; a layer keeps at least
    one channel. Raises ValueError for a network that is no such row.
    """
    layers = [copy.deepcopy(layer) for layer in _in_a_row(folded)]
    weighted = [place for place, layer in enumerate(layers) if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for first, second in pairwise(weighted):
        layer, following, between = layers[first], layers[second], layers[first + 1 : second]
        constant = _answer_without_kernel(layer, between)
        removed = (layer.weight == 0).flatten(1).all(1) & ((constant == 0) | _sees_no_border(following, between))
        if removed.all():
            removed[0] = False
        _cut(layer, following, ~removed, constant)
    return nn.Sequential(*layers).train(folded.training)


def _in_a_row(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested `nn.Sequential`s, in order."""
    if isinstance(module, nn.Sequential):
        for layer in module:
            yield from _in_a_row(layer)
        return
    grouped = isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros")
    if type(module) not in IN_A_ROW or grouped:
        raise ValueError(
            f"{type(module).__name__} is nothing that channels can be followed through: give convolutions without "
            f"groups, linear layers, {', '.join(kind.__name__ for kind in BY_CHANNEL)}, in a row and folded"
        )
    yield module


def _answer_without_kernel(layer: nn.Module, between: list[nn.Module]) -> Tensor:
    """What each channel "o" of the layer answers away from the border if its kernel is zero, behind activations."""
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return nn.Sequential(*(m for m in between if type(m) in ACTIVATIONS))(bias.clone())


def _sees_no_border(following: nn.Module, between: list[nn.Module]) -> bool:
    """Whether a constant channel reaches the next layer, and every window of it, as a constant."""
    padded = [m for m in (following, *between) if getattr(m, "padding", 0) not in (0, (0, 0), "valid")]
    return not any(isinstance(m, (nn.Conv2d, nn.AvgPool2d)) for m in padded)


def _cut(layer: nn.Module, following: nn.Module, kept: Tensor, constant: Tensor) -> None:
    """Leave the other channels out of a layer and out of what the next one reads; its bias takes their constants."""
    weight = following.weight.unflatten(1, (len(kept), -1))  # behind a flatten, some features are one channel
    lost = torch.einsum("oi...,i->o", weight.flatten(2).sum(2), constant * ~kept)
    layer.weight, layer.bias = (None if t is None else nn.Parameter(t[kept]) for t in (layer.weight, layer.bias))
    following.weight = nn.Parameter(weight[:, kept].flatten(1, 2))
    if lost.any():
        following.bias = nn.Parameter(lost if following.bias is None else following.bias + lost)
    _say_sizes(layer)
    _say_sizes(following)


def _say_sizes(layer: nn.Module) -> None:
    """Let the attributes of a layer say what its weight is."""
    names = ("out_channels", "in_channels") if isinstance(layer, nn.Conv2d) else ("out_features", "in_features")
    for name, size in zip(names, layer.weight.shape):
        setattr(layer, name, size)


def blocks(model: nn.Module) -> Iterator[BranchBlock]:
    """The blocks of a model that are in training form."""
    return (m for m in model.modules() if isinstance(m, BranchBlock) and not m.deploy)


def last_norms(block: BranchBlock) -> list[nn.BatchNorm2d]:
    """The batch norm that each branch ends in. Raises ValueError for a branch that ends in something else."""
    norms = []
    for name, branch in block.branches.named_children():
        last = branch[-1] if isinstance(branch, nn.Sequential) else branch
        if not is_norm(last) or not isinstance(last.weight, nn.Parameter):
            raise ValueError(
                f"the branch {name!r} ends in {type(last).__name__}: its channels are scaled by a last batch norm with "
                f"scale and shift, so give it one"
            )
        norms.append(last)
    return norms
