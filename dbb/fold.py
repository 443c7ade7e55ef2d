"""`fold(module)`: any tree of linear layers as a single affine convolution, by one rule per type of layer.

A rule says what its layer computes in inference, in float64; trees follow from the operators of `affine.py`. To teach
`fold` a layer of your own, register its rule:

    @rule(Scale)
    def _(layer: Scale) -> Affine:
        return scaling(layer.weight.double())

float64 is the precision of all folding. Autocast leaves float64 alone, so a fold within it loses nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from dbb.affine import Affine, Sides, average, identity, pair, scaling, sides, zero_pad

Rule = Callable[[nn.Module], Affine]
AnyRule = TypeVar("AnyRule", bound=Rule)
RULES: dict[type[nn.Module] | str, Rule] = {}
FEW_NUMBERS = 2**18  # a block of about 100 channels
FROZEN_NORM = "torchvision.ops.misc.FrozenBatchNorm2d"


def rule(*layer_types: type[nn.Module] | str) -> Callable[[AnyRule], AnyRule]:
    """Register the decorated function as the rule of these types, and of subclasses that keep their `forward`.

    A type of a library that need not be installed is given by its name, "package.module.Class".
    """

    def register(function: AnyRule) -> AnyRule:
        RULES.update(dict.fromkeys(layer_types, function))
        return function

    return register


def fold(module: nn.Module) -> Affine:
    """The affine convolution that `module` computes in eval mode: float64, differentiable in all its parameters.

    Batch norms count with their running statistics, whatever mode the module is in.
    Raises ValueError where the module is not linear, or where one zero-padded convolution cannot be exact.
    """
    return _rule_of(module)(module)


@torch.no_grad()
def fold_shape(module: nn.Module) -> Affine:
    """`fold` for its shape alone: raises what `fold` would raise, in milliseconds however large the module is.

    Without numbers, on the meta device; where there are few, with them: torch infers shapes in Python, which takes
    longer than the numbers do, and loads its compiler for it.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if sum(t.numel() for t in tensors) <= FEW_NUMBERS and all(t.device.type == "cpu" for t in tensors):
        return fold(module)
    hollow = {id(t): nn.Parameter(t.to("meta")) if isinstance(t, nn.Parameter) else t.to("meta") for t in tensors}
    return fold(copy.deepcopy(module, hollow))  # deepcopy takes from its memo what it finds there: tensors without data


@contextmanager
def within(name: str) -> Iterator[None]:
    """Put the name of the part in front of an error from inside it, so that the message tells where in the tree."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def normalisation(mean: Tensor, var: Tensor, norm: nn.modules.batchnorm._BatchNorm) -> Affine:
    """Batch norm as a map: `gamma / sqrt(var + eps) * (x - mean) + beta`, per channel (section 3.1 of the paper)."""
    mean, var = precise(mean), precise(var)
    gamma = torch.ones_like(mean) if norm.weight is None else precise(norm.weight)
    beta = torch.zeros_like(mean) if norm.bias is None else precise(norm.bias)
    scale = gamma / torch.sqrt(var + norm.eps)
    return scaling(scale, beta - scale * mean)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm: one of torch's, or the frozen one of torchvision's detectors."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_frozen_norm(module)


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether it is torchvision's `FrozenBatchNorm2d`, a batch norm of buffers alone."""
    return name_of(type(module)) == FROZEN_NORM


def name_of(kind: type) -> str:
    """A class as "package.module.Class"."""
    return f"{kind.__module__}.{kind.__qualname__}"


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where the device has no float64."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


# The rules of torch's own layers


@rule(nn.Conv2d)
def _conv(conv: nn.Conv2d) -> Affine:
    return conv_map(conv, torch.float64)


def conv_map(conv: nn.Conv2d, dtype: torch.dtype) -> Affine:
    """A convolution as a map, in any dtype: a training step has no need of float64 for its kernels."""
    if type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        raise ValueError(_not_kept(conv, nn.Conv2d, "_conv_forward"))
    padding = _conv_padding(conv)
    if conv.padding_mode != "zeros" and padding != sides(0):
        raise ValueError(
            f"padding_mode={conv.padding_mode!r} is not the zero padding of an affine map: pad before the whole tree "
            f"instead (blocks do, with their own padding_mode), or use 'zeros'"
        )
    cast = precise if dtype == torch.float64 else partial(torch.Tensor.to, dtype=dtype)
    weight, bias = cast(conv.weight), None if conv.bias is None else cast(conv.bias)
    return Affine(weight, bias, conv.stride, padding, conv.dilation, conv.groups)


@rule(nn.BatchNorm2d, nn.SyncBatchNorm, FROZEN_NORM)
def _batch_norm(norm: nn.BatchNorm2d) -> Affine:
    if norm.running_mean is None:
        raise ValueError(
            "a batch norm with track_running_stats=False depends on the batch even in eval mode, so no convolution "
            "equals it: build it with track_running_stats=True"
        )
    return normalisation(norm.running_mean, norm.running_var, norm)


@rule(nn.AvgPool2d)
def _average_pool(pool: nn.AvgPool2d) -> Affine:
    if pool.ceil_mode:
        raise ValueError("ceil_mode=True makes windows that hang over the border, smaller ones: use ceil_mode=False")
    if not pool.count_include_pad and pair(pool.padding) != (0, 0):
        raise ValueError(
            f"count_include_pad=False with padding={pool.padding} divides by fewer pixels at the border, which no "
            f"kernel does: use count_include_pad=True or padding=0"
        )
    return average(pool.kernel_size, pool.stride, pool.padding, divisor=pool.divisor_override)


@rule(nn.ZeroPad2d)
def _zero_pad(pad: nn.ZeroPad2d) -> Affine:
    left, right, top, bottom = pad.padding
    return zero_pad(((top, bottom), (left, right)))


@rule(nn.Identity)
def _identity(_: nn.Identity) -> Affine:
    return identity()


@rule(nn.Sequential)
def _sequential(layers: nn.Sequential) -> Affine:
    folded = None
    for name, layer in layers.named_children():
        with within(name):
            folded = fold(layer) if folded is None else folded >> fold(layer)
    return folded or identity()


def _conv_padding(conv: nn.Conv2d) -> Sides:
    """The padding in numbers: "same" puts the odd pixel behind."""
    if conv.padding == "valid":
        return sides(0)
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        return tuple((r // 2, r - r // 2) for r in reach)
    return sides(conv.padding)


def _rule_of(module: nn.Module) -> Rule:
    """The rule of the nearest registered ancestor, if the module still computes what that ancestor does."""
    kind = type(module)
    for ancestor in kind.__mro__:
        found = RULES.get(ancestor) or RULES.get(name_of(ancestor))
        if found:
            if kind.forward is not ancestor.forward or "forward" in vars(module):
                raise ValueError(_not_kept(module, ancestor, "forward"))
            return found
    raise ValueError(
        f"{kind.__name__} has no rule: if it is linear in inference, register one with @dbb.rule({kind.__name__}); if "
        f"it is not, fold what lies on either side of it"
    )


def _not_kept(module: nn.Module, ancestor: type[nn.Module], method: str) -> str:
    name = type(module).__name__
    return (
        f"{name} is a {ancestor.__name__} with a {method} of its own, so the rule of {ancestor.__name__} may not hold "
        f"for it: register one with @dbb.rule({name})"
    )
