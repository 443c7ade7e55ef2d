"""Blocks of linear branches that stand for one convolution: Diverse Branch Block, ACB, RepVGG, and your own.

A block is a list of *recipes*. A recipe takes the convolution that the block stands for, a `ConvSpec`, and answers one
branch as ordinary layers. All branches read the same padded input through the same windows; a kernel smaller than the
block's stands on the tap `(K - 1) // 2` of the window. The equivalent kernel follows from the layers, by `fold`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbb.affine import Affine, Pair, Sides, pair, sides
from dbb.fold import fold, fold_shape, is_norm, precise, rule
from dbb.layers import BiasPad, IdentityBasedConv1x1, Parallel, WindowMean
from dbb.steps import LeanStep

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class ConvSpec:
    """The convolution that a block stands for: `nn.Conv2d`'s arguments, each in one form."""

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Sides
    dilation: Pair
    groups: int

    @classmethod
    def of(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
    ) -> ConvSpec:
        """From the arguments as `nn.Conv2d` takes them. Raises ValueError for what is no convolution."""
        kernel_size, stride, dilation = pair(kernel_size), pair(stride), pair(dilation)
        around = _padding_in_numbers(padding, kernel_size, stride, dilation)
        spec = cls(in_channels, out_channels, kernel_size, stride, around, dilation, groups)
        for name, value in vars(spec).items():
            smallest = min(map(min, value)) if name == "padding" else min(pair(value))
            if smallest < (name != "padding"):
                raise ValueError(f"{name}={value} is too small: a convolution needs {int(name != 'padding')} or more")
        for name in ("in_channels", "out_channels"):
            if getattr(spec, name) % groups:
                raise ValueError(f"{name}={getattr(spec, name)} must be divisible by groups={groups}")
        return spec

    @property
    def depthwise(self) -> bool:
        """One group an output channel; a single output channel without groups mixes its inputs, so it is dense."""
        return self.groups == self.out_channels > 1

    def shrunk(self, kernel_size: int | Pair) -> ConvSpec:
        """A smaller kernel in the middle of the same windows: less padding (negative: it crops), the same output."""
        smaller, padding = pair(kernel_size), []
        for (before, behind), size, small, step in zip(self.padding, self.kernel_size, smaller, self.dilation):
            skipped = (size - 1) // 2 - (small - 1) // 2  # taps of the window in front of the smaller kernel
            padding.append((before - step * skipped, behind - step * (size - small - skipped)))
        return replace(self, kernel_size=smaller, padding=tuple(padding))


Recipe = Callable[[ConvSpec], nn.Module]


# Recipes: one branch each


def conv_norm(spec: ConvSpec, kernel_size: int | Pair | None = None) -> nn.Sequential:
    """Convolution and batch norm, of the block's kernel size or a smaller one."""
    spec = spec if kernel_size is None else spec.shrunk(kernel_size)
    return _named(pad=_pad_in_front(spec), conv=_conv(spec), bn=nn.BatchNorm2d(spec.out_channels))


def pointwise_conv_norm(
    spec: ConvSpec,
    internal_channels: int | None = None,
    border: str = "running",
    *,
    internal_ratio: float | None = None,
    identity: bool = True,
) -> nn.Sequential:
    """1x1 convolution and norm, then KxK convolution and norm: the paper's 1x1-KxK branch.

    internal_channels, internal_ratio: channels in between, or that as a share of the input's; default the input's,
    and twice that for a depthwise block
    identity: whether the first is identity-based where it keeps the number of channels
    """
    ratio = internal_ratio or (2 if spec.depthwise else 1)
    internal = internal_channels or round(spec.in_channels * ratio)
    if internal < 1 or internal % spec.groups:
        raise ValueError(f"internal_channels={internal} must be a multiple of groups={spec.groups}, and at least that")
    if identity and internal == spec.in_channels:
        pointwise = IdentityBasedConv1x1(internal, spec.groups)
    else:
        pointwise = nn.Conv2d(spec.in_channels, internal, 1, groups=spec.groups, bias=False)
    inner = replace(spec, in_channels=internal, padding=sides(0))
    prefix = _named(conv=pointwise, bn=nn.BatchNorm2d(internal))
    padded = BiasPad(prefix, spec.padding, border)
    return _named(pointwise=padded, conv=_conv(inner), bn=nn.BatchNorm2d(spec.out_channels))


def pointwise_average(spec: ConvSpec, border: str = "running") -> nn.Sequential:
    """1x1 convolution and norm, then the window's average and a norm: the paper's 1x1-AVG branch.

    A depthwise block goes without the 1x1, as it has nothing to mix.
    """
    norm = nn.BatchNorm2d(spec.out_channels)
    if spec.depthwise and spec.in_channels == spec.out_channels:
        return _named(avg=_average(spec), bn=norm)
    pointwise = nn.Conv2d(spec.in_channels, spec.out_channels, 1, groups=spec.groups, bias=False)
    padded = BiasPad(_named(conv=pointwise, bn=nn.BatchNorm2d(spec.out_channels)), spec.padding, border)
    return _named(pointwise=padded, avg=_average(replace(spec, padding=sides(0))), bn=norm)


def identity_norm(spec: ConvSpec) -> nn.Sequential:
    """Batch norm of the input itself: RepVGG's third branch. Needs stride 1 and as many channels out as in."""
    if spec.in_channels != spec.out_channels or spec.stride != (1, 1):
        raise ValueError(
            f"an identity branch answers its input, so it needs equal channels (here {spec.in_channels} -> "
            f"{spec.out_channels}) and stride 1 (here {spec.stride}): leave it out"
        )
    return _named(pad=_zero_pad(spec.shrunk(1).padding), bn=nn.BatchNorm2d(spec.out_channels))


def _named(**layers: nn.Module | None) -> nn.Sequential:
    """An `nn.Sequential` whose layers have names; None leaves a place empty."""
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers.items() if layer is not None))


def _conv(spec: ConvSpec) -> nn.Conv2d:
    shape = (spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, _own_padding(spec) or 0)
    return nn.Conv2d(*shape, spec.dilation, spec.groups, bias=False)


def _pad_in_front(spec: ConvSpec) -> nn.ZeroPad2d | None:
    """What `nn.Conv2d` cannot pad itself: unequal sides, or pixels cut off."""
    return None if _own_padding(spec) else _zero_pad(spec.padding)


def _own_padding(spec: ConvSpec) -> Pair | None:
    """The padding as `nn.Conv2d` knows it: equal sides, none negative; else None."""
    own = tuple(before for before, _ in spec.padding)
    return own if spec.padding == sides(own) and min(own) >= 0 else None


def _zero_pad(padding: Sides) -> nn.ZeroPad2d | None:
    (top, bottom), (left, right) = padding
    return nn.ZeroPad2d((left, right, top, bottom)) if any((top, bottom, left, right)) else None


def _average(spec: ConvSpec) -> nn.Module:
    """The mean of a window: torch's pooling where it can, a constant kernel where it cannot."""
    own = _own_padding(spec)
    if own and spec.dilation == (1, 1) and all(p <= k // 2 for p, k in zip(own, spec.kernel_size)):
        return nn.AvgPool2d(spec.kernel_size, spec.stride, own)
    return WindowMean(spec.kernel_size, spec.stride, spec.padding, spec.dilation)


# Blocks


class BranchBlock(nn.Module):
    """Linear branches of your own on one input, added, that fold into one `nn.Conv2d`.

    branches: modules by name, or a `Parallel`; whatever `fold` knows, and what you teach it with `rule`
    nonlinear: what follows the sum, kept by folding

    Input "n i h w", output "n o h' w'". Raises ValueError where the branches cannot be folded exactly.

    `branches` holds the training form; after `switch_to_deploy` it is None and `conv` holds the folded form.

    training_step: how `branches(x)` is computed in training mode, see `dbb.steps`; `LeanStep` saves memory
    """

    training_step: Callable[[nn.Module, Tensor], Tensor] = LeanStep()

    def __init__(self, branches: Mapping[str, nn.Module] | Parallel, nonlinear: nn.Module | None = None) -> None:
        super().__init__()
        self.branches: Parallel | None = branches if isinstance(branches, Parallel) else Parallel(branches)
        self.conv: nn.Conv2d | None = None
        self.nonlinear = nonlinear
        self._check(fold_shape(self.branches))  # refuses now what could not be folded later

    def _check(self, folded: Affine) -> None:
        """Refuse branches that fold to something else than the block promises; this kind promises nothing."""

    @property
    def deploy(self) -> bool:
        """Whether the block is folded."""
        return self.branches is None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, in either form."""
        if self.branches is None:
            y = self.conv(x)
        else:
            y = self.training_step(self.branches, x) if self.training else self.branches(x)
        return y if self.nonlinear is None else self.nonlinear(y)

    def equivalent(self) -> Affine:
        """The convolution that the block computes in eval mode, in float64, differentiable; without `nonlinear`."""
        return fold(self.conv if self.branches is None else self.branches)

    def get_equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Kernel "o i kh kw" and bias "o" of that convolution in the block's own dtype; in either form, at any time.

        Differentiable in all parameters of the branches. Batch norms count with their running statistics.
        """
        a = self.equivalent().to(_example(self))
        return a.weight, a.weight.new_zeros(a.out_channels) if a.bias is None else a.bias

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """A new `nn.Conv2d` that computes what the block computes in eval mode, followed by `nonlinear` if it has one.

        Device, dtype and mode are kept; its parameters require a gradient if any of the block's does.
        """
        if self.branches is None:
            conv = copy.deepcopy(self.conv)
        else:
            conv = self._folded_conv(self.equivalent().to(_example(self))).train(self.training)
            conv.requires_grad_(any(p.requires_grad for p in self.branches.parameters()))
        if self.nonlinear is None:
            return conv
        return nn.Sequential(conv, copy.deepcopy(self.nonlinear)).train(self.training)

    def _folded_conv(self, affine: Affine) -> nn.Conv2d:
        return affine.to_conv2d()

    def switch_to_deploy(self) -> None:
        """Fold in place, which the authors' code calls by this name; again does nothing.

        The parameters are new ones: an optimizer that was built before knows nothing of them.
        """
        if self.branches is not None:
            nonlinear, self.nonlinear = self.nonlinear, None
            self.conv, self.nonlinear = self.fuse(), nonlinear
            self.branches = None

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        """Name the cause where the weights are those of the other form, before torch lists every key."""
        forms = {form for form in ("branches", "conv") if any(key.startswith(f"{prefix}{form}.") for key in state_dict)}
        if forms == {"conv"} and not self.deploy:
            errors.append(
                f"{prefix or 'this block'}: the weights are of the folded form, the block is in training form: build "
                f"it with deploy=True, or call switch_to_deploy() before loading"
            )
        if forms == {"branches"} and self.deploy:
            errors.append(
                f"{prefix or 'this block'}: the weights are of the training form, the block is folded: build it in "
                f"training form, load, then call switch_to_deploy()"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


@rule(BranchBlock)
def _block(block: BranchBlock) -> Affine:
    if block.nonlinear is not None:
        name = type(block.nonlinear).__name__
        raise ValueError(f"the block ends in {name}, which is not linear: fold block.branches, or call block.fuse()")
    return block.equivalent()


class ConvBlock(BranchBlock):
    """A block that stands for one convolution: built from recipes, with `nn.Conv2d`'s arguments in its order.

    bias: accepted so that the signature is `nn.Conv2d`'s; the norms' shifts are the bias
    padding_mode: the input is padded by it once, for all branches alike
    branches: names out of the block's recipes, or {name: name or recipe}; default all that the geometry allows
    gamma: the scale that each branch's last norm, or those named, starts with; default 1, see `init_gamma`
    nonlinear: what follows the sum; there is none unless given
    deploy: build the folded form, one convolution
    options: of the block's recipes

    Raises ValueError for arguments that are no convolution, and for branches that cannot be folded into it.
    For a kind of block of your own, subclass it and say its `recipes`; this one has a single branch, KxK and norm.
    """

    origin = None  # what the block took the place of, where `dbb.surgery` put it into a model

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        branches: Iterable[str] | Mapping[str, str | Recipe] | None = None,
        gamma: float | Mapping[str, float] | None = None,
        nonlinear: nn.Module | None = None,
        deploy: bool = False,
        **options,
    ) -> None:
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={padding_mode!r} is not known: choose one of {', '.join(PADDING_MODES)}")
        spec = ConvSpec.of(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        windows = spec if padding_mode == "zeros" else replace(spec, padding=sides(0))
        place = "meta" if deploy else device  # branches that are only checked need no memory
        with nullcontext() if place is None else torch.device(place):
            built = _build(self.recipes(windows, **options), branches, self.default_branches(windows), windows)
        self.windows = windows  # what the branches are held to, by `_check`
        super().__init__(built.to(dtype=dtype), nonlinear)
        self.spec, self.padding, self.padding_mode = spec, padding, padding_mode
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
            setattr(self, name, getattr(spec, name))  # what code that meets an nn.Conv2d asks for
        if gamma is not None:
            self.init_gamma(gamma)
        if deploy:
            self.branches, self.conv = None, self._plain_conv(device=device, dtype=dtype)

    def _check(self, folded: Affine) -> None:
        _check_windows(folded, self.windows)

    @staticmethod
    def recipes(spec: ConvSpec) -> dict[str, Recipe]:
        """The branches that this kind of block knows, by name."""
        return {"kxk": conv_norm}

    @classmethod
    def default_branches(cls, spec: ConvSpec) -> Iterable[str]:
        """The names of the branches that it has where the caller does not choose."""
        return list(cls.recipes(spec))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d | None = None, **options) -> Self:
        """A block with the geometry, device, dtype and mode of `conv`; its weight and `bn` go into the "kxk" branch.

        The other branches start fresh, so the output changes: `init_gamma` weighs them. All norms of the block take
        the eps and the momentum of `bn`. With `deploy` the block is the convolution that both fold to.
        Raises ValueError for a `conv` that is no plain `nn.Conv2d`.
        """
        if type(conv) is not nn.Conv2d:
            raise ValueError(f"from_conv takes an nn.Conv2d, not {type(conv).__name__}: its forward may differ")
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        like = {"device": conv.weight.device, "dtype": conv.weight.dtype, "padding_mode": conv.padding_mode}
        block = cls(*shape, conv.groups, **like, **options).train(conv.training)
        if block.branches is None:
            _adopt_folded(block.conv, ConvBlock.from_conv(conv, bn))
        elif "kxk" in dict(block.branches.named_children()):
            _adopt(block.branches["kxk"], conv, bn)
        for norm in (m for m in block.modules() if bn is not None and isinstance(m, nn.BatchNorm2d)):
            norm.eps, norm.momentum = bn.eps, bn.momentum
        return block

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, in either form."""
        if self.padding_mode != "zeros" and self.branches is not None:
            (top, bottom), (left, right) = self.spec.padding
            x = F.pad(x, (left, right, top, bottom), mode=self.padding_mode)
        return super().forward(x)

    def equivalent(self) -> Affine:
        """The convolution of the block in float64, with the kernel size and the groups that the block was built with.

        With a padding_mode other than zeros it is to be laid on the padded input.
        """
        w = self.windows
        if self.branches is not None:
            return fold(self.branches).widened(w.padding, w.dilation).regroup(w.groups)
        return Affine(precise(self.conv.weight), precise(self.conv.bias), w.stride, w.padding, w.dilation, w.groups)

    def _folded_conv(self, affine: Affine) -> nn.Conv2d:
        folded, conv = affine.to_conv2d(), self._plain_conv(device="meta")
        conv.weight, conv.bias = folded.weight, folded.bias
        return conv

    def _plain_conv(self, **factory) -> nn.Conv2d:
        """The convolution that the block stands for."""
        s, own = self.spec, _own_padding(self.spec)
        padding = "same" if own is None else own  # the only word for sides that differ
        shape = (s.in_channels, s.out_channels, s.kernel_size, s.stride, padding, s.dilation, s.groups)
        return nn.Conv2d(*shape, padding_mode=self.padding_mode, **factory)

    @torch.no_grad()
    def init_gamma(self, gamma: float | Mapping[str, float]) -> Self:
        """Set the scale of the last batch norm of every branch, or of those named; answers the block."""
        wanted = gamma if isinstance(gamma, Mapping) else dict.fromkeys(dict(self.branches.named_children()), gamma)
        for name, value in wanted.items():
            norms = [m for m in self.branches[name].modules() if is_norm(m)]
            norms[-1].weight.fill_(value)
        return self

    def extra_repr(self) -> str:
        """The convolution that the block stands for."""
        s = self.spec
        shape = f"{s.in_channels}, {s.out_channels}, kernel_size={s.kernel_size}, stride={s.stride}"
        return f"{shape}, padding={s.padding}, dilation={s.dilation}, groups={s.groups}, deploy={self.deploy}"


@rule(ConvBlock)
def _conv_block(block: ConvBlock) -> Affine:
    if block.padding_mode != "zeros" and block.spec.padding != sides(0):
        raise ValueError(
            f"padding_mode={block.padding_mode!r} of the block is no zero padding, which is all that an affine map "
            f"has: call block.fuse(), or fold block.branches, which read the padded input"
        )
    return _block(block)


class DiverseBranchBlock(ConvBlock):
    """Diverse Branch Block (CVPR 2021): KxK, 1x1, 1x1-KxK and 1x1-AVG, each with its batch norms, added.

    Arguments as `nn.Conv2d`, and

    internal_channels: between the two convolutions of 1x1-KxK; default the input's, twice that for depthwise
    internal_ratio: the same as a share of the input's channels
    identity: whether the first of the two starts as the identity, where it keeps the number of channels
    border: with which statistics the padding inside the two sequences is made while training, see `BiasPad`
    single_init: start as the KxK branch alone, the scales of the others at zero

    A depthwise block (groups == out_channels) has no 1x1, and no 1x1 in front of its average, as in the authors' code.
    See also `BranchBlock` for `fuse`, `get_equivalent_kernel_bias` and `switch_to_deploy`.
    """

    def __init__(self, *args, single_init: bool = False, **options) -> None:
        super().__init__(*args, **options)
        if single_init and self.branches is not None:
            self.init_gamma({name: float(name == "kxk") for name, _ in self.branches.named_children()})

    @staticmethod
    def recipes(
        spec: ConvSpec,
        internal_channels: int | None = None,
        border: str = "running",
        internal_ratio: float | None = None,
        identity: bool = True,
    ) -> dict[str, Recipe]:
        """The paper's four branches."""
        between = {"internal_channels": internal_channels, "internal_ratio": internal_ratio, "identity": identity}
        return {
            "kxk": conv_norm,
            "1x1": partial(conv_norm, kernel_size=1),
            "1x1_kxk": partial(pointwise_conv_norm, border=border, **between),
            "1x1_avg": partial(pointwise_average, border=border),
        }

    @classmethod
    def default_branches(cls, spec: ConvSpec) -> Iterable[str]:
        """All four; a depthwise block goes without the 1x1."""
        return [name for name in cls.recipes(spec) if not (spec.depthwise and name == "1x1")]


class ACBlock(ConvBlock):
    """Asymmetric Convolution Block (ICCV 2019): KxK, Kx1 and 1xK, each with its batch norm, added.

    Arguments as `nn.Conv2d`. See `BranchBlock` for `fuse`, `get_equivalent_kernel_bias` and `switch_to_deploy`.
    """

    @staticmethod
    def recipes(spec: ConvSpec) -> dict[str, Recipe]:
        """The square kernel and its skeleton."""
        height, width = spec.kernel_size
        return {
            "kxk": conv_norm,
            "kx1": partial(conv_norm, kernel_size=(height, 1)),
            "1xk": partial(conv_norm, kernel_size=(1, width)),
        }


class RepVGGBlock(ConvBlock):
    """RepVGG block (CVPR 2021): KxK, 1x1 and, where the shape allows, the identity, each with its batch norm, added.

    Arguments as `nn.Conv2d`. See `BranchBlock` for `fuse`, `get_equivalent_kernel_bias` and `switch_to_deploy`.
    """

    @staticmethod
    def recipes(spec: ConvSpec) -> dict[str, Recipe]:
        """Two convolutions and the identity."""
        return {"kxk": conv_norm, "1x1": partial(conv_norm, kernel_size=1), "identity": identity_norm}

    @classmethod
    def default_branches(cls, spec: ConvSpec) -> Iterable[str]:
        """The identity only at stride 1 with equal channels."""
        keeps_shape = spec.in_channels == spec.out_channels and spec.stride == (1, 1)
        return [name for name in cls.recipes(spec) if keeps_shape or name != "identity"]


Block = str | Callable[..., nn.Module]

BLOCKS: dict[str, type[ConvBlock]] = {
    "plain": ConvBlock,
    "acb": ACBlock,
    "dbb": DiverseBranchBlock,
    "repvgg": RepVGGBlock,
}


def block_type(block: Block) -> Callable[..., nn.Module]:
    """The class that a name means; a class, or a function with `nn.Conv2d`'s arguments, stands for itself.

    Raises ValueError for an unknown name.
    """
    if not isinstance(block, str):
        return block
    if block not in BLOCKS:
        raise ValueError(f"block={block!r} is not known: choose from {', '.join(BLOCKS)}, or give a class")
    return BLOCKS[block]


def takes_block(kernel_size: int) -> bool:
    """Whether the paper replaces a convolution of this size (section 4.1)."""
    return 1 < kernel_size < 7


def _build(
    recipes: Mapping[str, Recipe],
    chosen: Iterable[str] | Mapping[str, str | Recipe] | None,
    default: Iterable[str],
    spec: ConvSpec,
) -> Parallel:
    """One branch for each chosen recipe."""
    chosen = default if chosen is None else chosen
    if isinstance(chosen, str):
        raise ValueError(f"branches={chosen!r} is one string: give a list of names, [{chosen!r}]")
    by_name = dict(chosen) if isinstance(chosen, Mapping) else {name: name for name in chosen}
    unknown = [r for r in by_name.values() if isinstance(r, str) and r not in recipes]
    if unknown:
        raise ValueError(f"branches {unknown} are not known: choose from {', '.join(recipes)}, or give a recipe")
    return Parallel({name: (recipes[r] if isinstance(r, str) else r)(spec) for name, r in by_name.items()})


def _check_windows(branches: Affine, spec: ConvSpec) -> None:
    """Refuse branches that are not the convolution that the block stands for."""
    wanted = f"{spec.in_channels} -> {spec.out_channels} channels, kernel_size={spec.kernel_size}, stride={spec.stride}"
    problem = ValueError(
        f"the branches add up to {branches}, which does not fit the block's {wanted}, padding={spec.padding}, "
        f"dilation={spec.dilation}: a recipe must keep to the windows of the spec that it is given"
    )
    channels = (branches.in_channels, branches.out_channels)
    if channels != (spec.in_channels, spec.out_channels) or branches.stride != spec.stride:
        raise problem
    if branches.groups % spec.groups:
        raise ValueError(
            f"the branches add up to a map with groups={branches.groups}, which does not fit the block's groups="
            f"{spec.groups}: give every branch groups={spec.groups} or a multiple, or build the block with groups="
            f"{gcd(branches.groups, spec.groups)}"
        )
    try:
        widened = branches.widened(spec.padding, spec.dilation)
    except ValueError as error:
        raise problem from error
    if widened.kernel_size != spec.kernel_size:
        raise problem


@torch.no_grad()
def _adopt(branch: nn.Sequential, conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> None:
    """Make a conv-norm branch compute what `conv` and `bn` compute in eval mode."""
    branch.conv.weight.copy_(conv.weight)
    if bn is None:
        branch.bn.running_var.fill_(1 - branch.bn.eps)  # so that the norm's root is one
        if conv.bias is not None:
            branch.bn.bias.copy_(conv.bias)
        return
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        if getattr(bn, name) is not None:
            getattr(branch.bn, name).copy_(getattr(bn, name))
    if conv.bias is not None:
        branch.bn.running_mean.sub_(conv.bias)  # a bias in front of a norm only moves the mean


@torch.no_grad()
def _adopt_folded(conv: nn.Conv2d, plain: ConvBlock) -> None:
    """Make a convolution compute what a block computes in eval mode."""
    kernel, bias = plain.get_equivalent_kernel_bias()
    conv.weight.copy_(kernel)
    conv.bias.copy_(bias)


def _example(block: BranchBlock) -> Tensor:
    """A tensor of the dtype and device of the block."""
    return next(block.parameters(), torch.empty(0))


def _padding_in_numbers(padding: int | Pair | str, kernel_size: Pair, stride: Pair, dilation: Pair) -> Sides:
    if not isinstance(padding, str):
        return sides(padding)
    if padding == "valid":
        return sides(0)
    if padding != "same" or stride != (1, 1):
        raise ValueError(f"padding={padding!r} with stride={stride}: a word is 'valid', or 'same' with stride 1")
    reach = [d * (k - 1) for d, k in zip(dilation, kernel_size)]
    return tuple((r // 2, r - r // 2) for r in reach)
