"""The layers that branches need beside torch's own, each with its rule for `fold`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbb.affine import Affine, Pair, Sides, average, concat, sides, zero_pad
from dbb.fold import fold, fold_shape, normalisation, precise, rule, within

BORDERS = ("running", "batch")


class _Branches(nn.Module):
    """Named branches that read the same input."""

    def __init__(self, *branches: nn.Module, **named: nn.Module) -> None:
        super().__init__()
        if len(branches) == 1 and isinstance(branches[0], Mapping):
            named = {**branches[0], **named}
        else:
            named = {**{str(n): branch for n, branch in enumerate(branches)}, **named}
        if not named:
            raise ValueError(f"{type(self).__name__} needs at least one branch, got none")
        for name, branch in named.items():
            self.add_module(name, branch)

    def __getitem__(self, name: str) -> nn.Module:
        """A branch by its name."""
        return self._modules[name]

    def __len__(self) -> int:
        """How many branches there are."""
        return len(self._modules)

    def fold_branches(self) -> Iterator[Affine]:
        """Each branch as a map, one at a time."""
        for name, branch in self.named_children():
            with within(name):
                folded = fold(branch)
            yield folded


class Parallel(_Branches):
    """Branches on the same input, their outputs added: `Parallel(a, b)` or `Parallel({"name": a, ...})`."""

    def forward(self, x: Tensor) -> Tensor:
        """Add what the branches answer."""
        return reduce(add, [branch(x) for branch in self.children()])


class Concat(_Branches):
    """Branches on the same input, their outputs stacked: `Concat(a, b)` or `Concat({"name": a, ...})`."""

    def forward(self, x: Tensor) -> Tensor:
        """Stack what the branches answer."""
        return torch.cat([branch(x) for branch in self.children()], dim=1)


@rule(Parallel)
def _parallel(layer: Parallel) -> Affine:
    return reduce(add, layer.fold_branches())


@rule(Concat)
def _concat(layer: Concat) -> Affine:
    return concat(*layer.fold_branches())


class IdentityBasedConv1x1(nn.Module):
    """A 1x1 convolution that starts as the identity: its weight is the deviation from it (section 3.3 of the paper).

    Input and output "n c h w"; `weight` "c c/groups 1 1", zero at the start.
    """

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"groups={groups} must divide channels={channels}")
        self.channels, self.groups = channels, groups
        self.weight = nn.Parameter(torch.zeros(channels, channels // groups, 1, 1))

    def kernel(self) -> Tensor:
        """The whole kernel: deviation plus identity."""
        width = self.channels // self.groups
        # Made on the fly: a buffer would be lost on the meta device and would have to follow every cast.
        eye = torch.eye(width, dtype=self.weight.dtype, device=self.weight.device)
        return self.weight + eye.repeat(self.groups, 1)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution."""
        return F.conv2d(x, self.kernel(), groups=self.groups)

    def extra_repr(self) -> str:
        """Channels and groups."""
        return f"{self.channels}, groups={self.groups}"


@rule(IdentityBasedConv1x1)
def _identity_based(conv: IdentityBasedConv1x1) -> Affine:
    return Affine(precise(conv.kernel()), groups=conv.groups)


class WindowMean(nn.Module):
    """Average pooling as a depthwise convolution, for what `nn.AvgPool2d` cannot: dilation, and any padding."""

    def __init__(self, kernel_size: Pair, stride: Pair, padding: Sides, dilation: Pair) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation

    def forward(self, x: Tensor) -> Tensor:
        """The mean of each window's taps, padded zeros included."""
        return fold(self)(x)

    def extra_repr(self) -> str:
        """The geometry."""
        return f"{self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


@rule(WindowMean)
def _window_mean(pool: WindowMean) -> Affine:
    return average(pool.kernel_size, pool.stride, pool.padding, pool.dilation)


class BiasPad(nn.Module):
    """`prefix`, then padding with what the prefix answers to zero, so that what follows folds exactly (transform III).

    Zero padding behind a bias has no equivalent convolution: merged, the border would be the bias. So this layer pads
    with it. In eval mode that is exact. In training mode the batch norms of the prefix use the batch's statistics, and
    `border` says which ones the padding uses:

    - "running": the running statistics, after they took in this batch, without gradient, as the authors' code does;
    - "batch": the batch's own, with gradient, which makes the training step itself a zero-padded convolution.

    padding: as in `Affine`. Input "n i h w", output "n o h' w'".
    Raises ValueError where the prefix cannot be folded, or has not seen every window that touches the image.
    """

    def __init__(self, prefix: nn.Module, padding: int | Pair | Sides, border: str = "running") -> None:
        super().__init__()
        if border not in BORDERS:
            raise ValueError(f"border={border!r} is not known: choose one of {', '.join(map(repr, BORDERS))}")
        self.prefix, self.padding, self.border = prefix, sides(padding), border
        fold_shape(self)  # refuses now what could not be folded later
        if border == "batch" and any(_is_norm(m) and m not in set(_chain(prefix)) for m in prefix.modules()):
            raise ValueError(
                "border='batch' needs the input of each batch norm, so they must stand in a plain nn.Sequential: "
                "rearrange the prefix, or use border='running'"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Run the prefix and pad its answer."""
        if self.training and self.border == "batch":
            y, border = self._forward_with_batch_border(x)
        else:
            y = self.prefix(x)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
                border = answer_to_zero(self.prefix)
        (top, bottom), (left, right) = self.padding
        around = (left, right, top, bottom)
        padded = F.pad(y, around)
        if border is None or max(around) <= 0:
            return padded
        outside = 1 - F.pad(y.new_ones(y.shape[2:]), around)
        return padded + border.to(y)[:, None, None] * outside

    def _forward_with_batch_border(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prefix layer by layer, and beside it what it answers to zero under the statistics of this very batch."""
        answer = None
        for layer in _chain(self.prefix):
            affine = _batch_normalisation(layer, x) if _is_norm(layer) and layer.training else fold(layer)
            answer, x = affine.constant_response(answer), layer(x)
        return x, answer

    def extra_repr(self) -> str:
        """Padding and border."""
        return f"padding={self.padding}, border={self.border!r}"


@rule(BiasPad)
def _bias_pad(layer: BiasPad) -> Affine:
    with within("prefix"):
        prefix = fold(layer.prefix)
    # The answer outside the image is the bias, and that is what was padded: more padding in front says the same.
    padded = replace(prefix, bias=None) >> zero_pad(layer.padding)
    return replace(padded, bias=prefix.bias)


def _chain(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested `nn.Sequential`s, in order."""
    if isinstance(module, nn.Sequential):
        for layer in module:
            yield from _chain(layer)
    else:
        yield module


def answer_to_zero(prefix: nn.Module) -> Tensor | None:
    """The bias of the folded prefix, without merging kernels: zero sent through, layer by layer."""
    return reduce(lambda value, layer: fold(layer).constant_response(value), _chain(prefix), None)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _batch_normalisation(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Affine:
    """The norm under the statistics of the batch that it is about to see."""
    if isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_initialized():
        raise ValueError(
            "border='batch' knows the statistics of one process, SyncBatchNorm uses those of all: use border='running'"
        )
    var, mean = torch.var_mean(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, (0, 2, 3), correction=0)
    return normalisation(mean, var, norm)
