"""An affine convolution as a value, and the operators that combine several of them into one.

Every linear layer of a convolutional network in inference is an `Affine`: a kernel, perhaps a bias, and the geometry
that lays the kernel on the image. Three operators turn a tree of such layers into a single one:

    a >> b           first `a`, then `b`
    a + b            both on the same input, the outputs added
    concat(a, b)     both on the same input, the outputs stacked

and `direct_sum(a, b)` is their cousin for groups: each on its own slice of the input, the outputs stacked.

A map with `groups=None` is *channelwise*: one kernel of one channel, applied to every channel alike, however many there
are (identity, padding, average pooling). It takes on a number of channels when it meets a map that has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

Pair = tuple[int, int]
Sides = tuple[Pair, Pair]


@dataclass(frozen=True)
class Axis:
    """How the taps of a kernel lie along one dimension of the image.

    Output pixel `t` reads, with tap `v`, the image at `stride * t + dilation * v - left`; the image has `left` zeros in
    front and `right` zeros behind (negative: cropped). Every rule of this file is that one line, for two maps at once.
    """

    taps: int
    stride: int
    left: int
    right: int
    dilation: int

    @property
    def reach(self) -> int:
        """Pixels from the first tap to the last."""
        return self.dilation * (self.taps - 1)

    @property
    def slack(self) -> int:
        """Padding less reach: together with the stride it decides the size of the output, for every input."""
        return self.left + self.right - self.reach

    @property
    def steps(self) -> list[int]:
        """The distance between taps, if there are any two."""
        return [self.dilation] if self.taps > 1 else []

    def reads(self, output: int) -> list[int]:
        """The pixels that an output pixel reads, tap by tap; those outside are padding."""
        first = self.stride * output - self.left
        return [first + self.dilation * tap for tap in range(self.taps)]

    def then(self, second: Axis) -> Axis:
        """The geometry of both in a row: put the line of the first into the line of the second."""
        spacing = replace(second, dilation=self.stride * second.dilation)  # the second's taps, in pixels of the input
        dilation = _gcd(self.steps + spacing.steps)
        return Axis(
            taps=(self.reach + spacing.reach) // dilation + 1,
            stride=self.stride * second.stride,
            left=self.left + self.stride * second.left,
            right=self.right + self.stride * second.right,
            dilation=dilation,
        )

    def widened(self, left: int, right: int, steps: Sequence[int] = ()) -> Axis:
        """Larger paddings, the same slack: more taps, on the coarsest grid that holds the old ones (and `steps`).

        Raises ValueError where a side shrinks.
        """
        if left < self.left or right < self.right:
            raise ValueError(
                f"cannot widen padding ({self.left}, {self.right}) to ({left}, {right}): a side would shrink, and taps "
                f"that read there would be lost; ask for paddings as large or larger"
            )
        # A single tap that stays alone has no step; it keeps the word it came with.
        dilation = gcd(*self.steps, *steps, left - self.left, right - self.right) or self.dilation
        return replace(
            self, taps=(left + right - self.slack) // dilation + 1, left=left, right=right, dilation=dilation
        )


@dataclass(frozen=True, eq=False)
class Affine:
    """The map `x -> conv2d(pad(x), weight) + bias`.

    weight: "o i kh kw", with `i` the input channels of one group
    bias: "o", or None where the map sends zero to exactly zero (which lets a padded map follow, see `>>`)
    stride, dilation: one int, or (vertical, horizontal)
    padding: zeros around the input: one int, (vertical, horizontal) or ((top, bottom), (left, right))
    groups: as in `nn.Conv2d`; None makes the map channelwise (weight "1 1 kh kw")

    Raises ValueError where shapes and groups do not fit.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int | Pair = 1
    padding: int | Pair | Sides = 0
    dilation: int | Pair = 1
    groups: int | None = 1

    def __post_init__(self) -> None:
        """Bring every argument to its one form, and refuse what is no convolution."""
        _check_shapes(self.weight, self.bias, self.groups)
        for name, normal in {"stride": pair, "padding": sides, "dilation": pair}.items():
            object.__setattr__(self, name, normal(getattr(self, name)))

    # What it is

    @property
    def out_channels(self) -> int | None:
        """Number of output channels; None for a channelwise map."""
        return None if self.groups is None else self.weight.shape[0]

    @property
    def in_channels(self) -> int | None:
        """Number of input channels; None for a channelwise map."""
        return None if self.groups is None else self.weight.shape[1] * self.groups

    @property
    def kernel_size(self) -> Pair:
        """Taps per axis."""
        return tuple(self.weight.shape[2:])

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The geometry, one dimension at a time: vertical, horizontal."""
        return tuple(
            Axis(taps, stride, *padding, dilation)
            for taps, stride, padding, dilation in zip(self.kernel_size, self.stride, self.padding, self.dilation)
        )

    def __repr__(self) -> str:
        """Shape and geometry, not the numbers."""
        kernel = " ".join(str(n) for n in self.weight.shape)
        bias = "no bias" if self.bias is None else "bias"
        places = f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        return f"Affine({kernel}, {bias}, {places})"

    # What it does

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map: "n i h w" -> "n o h' w'"."""
        a = self.on(x.shape[1], like=x)
        (top, bottom), (left, right) = a.padding
        weight = plain_strides(a.weight)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, a.bias, a.stride, 0, a.dilation, a.groups)

    def constant_response(self, value: Tensor | None) -> Tensor | None:
        """The answer "o", away from the border, to an image that is `value` ("i") everywhere; None is exactly zero."""
        if value is None:
            return self.bias
        a = self.on(len(value), like=value)
        weight = rearrange(a.weight, "(g o) i kh kw -> g o i kh kw", g=a.groups)
        answer = weight.sum((3, 4)) @ rearrange(value, "(g i) -> g i 1", g=a.groups)
        return _add_biases(answer.flatten(), a.bias)

    # The operators

    def __rshift__(self, then: Affine) -> Affine:
        """`self >> then`: first this map, then that one (the paper's transforms I and III).

        Exact only if what `then` pads with zero is zero in the merged map, too. So where `then` pads, this map must
        answer zero outside the image: no bias, and padding that already covers every window that touches the image.
        Raises ValueError otherwise, and where channels do not fit.
        """
        first, then, channelwise = _meet(self, then, "out_channels", "in_channels")
        _check_channels(first, then)
        _check_border(first, then)
        axes = [a.then(b) for a, b in zip(first.axes, then.axes)]
        groups = gcd(first.groups, then.groups)
        weight = _compose_kernels(first, then, groups, axes)
        return _laid_on(axes, weight, then.constant_response(first.bias), None if channelwise else groups)

    def __add__(self, other: Affine) -> Affine:
        """`self + other`: both maps on the same input, outputs added (the paper's transforms II and VI).

        The smaller kernel is *placed* where its taps read; that is the centre only where both have half padding.
        Raises ValueError where the outputs differ in channels, or in size for some input.
        """
        a, b, channelwise = _meet(self, other, "in_channels", "in_channels")
        _check_addable(a, b)
        a, b = align(a, b)
        groups = gcd(a.groups, b.groups)
        weight = a.regroup(groups).weight + b.regroup(groups).weight
        return replace(a, weight=weight, bias=_add_biases(a.bias, b.bias), groups=None if channelwise else groups)

    # The same map, written differently

    def on(self, channels: int, like: Tensor | None = None) -> Affine:
        """The same map for a given number of channels; only a channelwise map changes, also in dtype and device."""
        if self.groups is not None:
            return self
        a = self if like is None else self.to(device=like.device, dtype=like.dtype)
        bias = None if a.bias is None else a.bias.expand(channels)
        return replace(a, weight=a.weight.expand(channels, -1, -1, -1), bias=bias, groups=channels)

    def regroup(self, groups: int) -> Affine:
        """The same map with fewer groups: its kernels as blocks on a diagonal, zeros elsewhere."""
        if self.groups is None or self.groups % groups:
            raise ValueError(
                f"cannot write groups={self.groups} as {groups} groups: the new number must divide the old"
            )
        if groups == self.groups:
            return self
        blocks = rearrange(self.weight, "(g r o) i kh kw -> g r o i kh kw", g=groups, r=self.groups // groups)
        diagonal = torch.eye(self.groups // groups, dtype=self.weight.dtype, device=self.weight.device)
        weight = einsum(blocks, diagonal, "g r o i kh kw, r s -> g r o s i kh kw")
        return replace(self, weight=rearrange(weight, "g r o s i kh kw -> (g r o) (s i) kh kw"), groups=groups)

    def split(self) -> list[Affine]:
        """Its groups as maps of their own: `direct_sum(*a.split())` is `a` again."""
        weights = self.weight.chunk(self.groups)
        biases = [None] * self.groups if self.bias is None else self.bias.chunk(self.groups)
        return [replace(self, weight=w, bias=b, groups=1) for w, b in zip(weights, biases)]

    def widened(self, padding: int | Pair | Sides, dilation: int | Pair = 0) -> Affine:
        """The same map with larger paddings: its kernel among zeros, so that every tap still reads the same pixel.

        The new taps stand as far apart as they can, and at most `dilation` where one is given.
        """
        geometry = zip(self.axes, sides(padding), pair(dilation))
        return _place(self, [axis.widened(*around, [step]) for axis, around, step in geometry])

    def symmetric(self) -> Affine:
        """The same map with equal, non-negative paddings on both sides of an axis, as `nn.Conv2d` wants them."""
        return self.widened(tuple(max(*p, 0) for p in self.padding))

    def to(self, *args, **kwargs) -> Affine:
        """Weight and bias moved or cast, as by `Tensor.to`."""
        bias = None if self.bias is None else self.bias.to(*args, **kwargs)
        return replace(self, weight=self.weight.to(*args, **kwargs), bias=bias)

    def abs(self) -> Affine:
        """The map of `|W|` and `|b|`: on `|x|` it is the scale of what is summed, the yardstick of rounding errors."""
        return replace(self, weight=self.weight.abs(), bias=None if self.bias is None else self.bias.abs())

    def to_conv2d(self) -> nn.Conv2d:
        """An ordinary `nn.Conv2d` with a bias that computes the map, with parameters of its own.

        A padding that differs between sides is kept where it is what `padding="same"` means; elsewhere `symmetric`
        turns the difference into zero taps. Raises ValueError for a channelwise map.
        """
        if self.groups is None:
            raise ValueError(
                "a channelwise map fits any number of channels, a conv has one: choose it with .on(channels)"
            )
        lopsided = any(a.left != a.right for a in self.axes)
        same = lopsided and all(a.stride == 1 and a.left == a.reach // 2 and a.slack == 0 for a in self.axes)
        a = self if same else self.symmetric()
        padding = "same" if same else tuple(axis.left for axis in a.axes)
        conv = nn.Conv2d(
            a.in_channels, a.out_channels, a.kernel_size, a.stride, padding, a.dilation, a.groups, device="meta"
        )
        bias = a.weight.new_zeros(a.out_channels) if a.bias is None else a.bias
        conv.weight = nn.Parameter(plain_strides(a.weight.detach().clone()))
        conv.bias = nn.Parameter(bias.detach().clone())
        return conv


# Operators on any number of maps


def concat(*maps: Affine) -> Affine:
    """All maps on the same input, outputs stacked (the paper's transform IV).

    The result is dense: the outputs of one group of a grouped map would no longer stand where a group's outputs must.
    Raises ValueError where the maps differ in input channels, or their outputs in size.
    """
    known = next((m for m in maps if m.groups is not None), None)
    if known is None:
        raise ValueError("cannot stack channelwise maps alone: give one of them channels with .on(channels)")
    maps = [m.on(known.in_channels, like=known.weight) for m in maps]
    if len({m.in_channels for m in maps}) > 1:
        raise ValueError(
            f"cannot stack maps that read {[m.in_channels for m in maps]} channels: they share one input, so the "
            f"numbers must be equal; for slices of an input use direct_sum"
        )
    maps = [m.regroup(1) for m in align(*maps)]
    return replace(maps[0], weight=torch.cat([m.weight for m in maps]), bias=_cat_biases(maps))


def direct_sum(*maps: Affine) -> Affine:
    """Each map on its own slice of the input channels, outputs stacked: a grouped convolution is one of its groups.

    Groups of equal shape stay groups; else the result is dense, with blocks on the diagonal.
    Raises ValueError where a map is channelwise, or the outputs differ in size.
    """
    if any(m.groups is None for m in maps):
        raise ValueError(
            "cannot give a slice of the input to a channelwise map: choose its channels with .on(channels)"
        )
    maps = align(*maps)
    if len({(m.out_channels // m.groups, m.weight.shape[1]) for m in maps}) == 1:
        weight, groups = torch.cat([m.weight for m in maps]), sum(m.groups for m in maps)
    else:
        weight, groups = _block_diagonal([m.regroup(1).weight for m in maps]), 1
    return replace(maps[0], weight=weight, bias=_cat_biases(maps), groups=groups)


def align(*maps: Affine) -> list[Affine]:
    """The same maps on one grid of taps: equal kernel size, padding and dilation (the paper's transform VI).

    Raises ValueError where there is no such grid, because the outputs differ in size.
    """
    for what, values in {
        "stride": {m.stride for m in maps},
        "padding - dilation * (kernel - 1)": {tuple(a.slack for a in m.axes) for m in maps},
    }.items():
        if len(values) > 1:
            raise ValueError(
                f"cannot lay maps over each other whose {what} is {' and '.join(map(str, sorted(values)))}: their "
                f"outputs would differ in size; make it equal (padding counts both sides)"
            )
    axes = [_common_axis(column) for column in zip(*(m.axes for m in maps))]
    return [_place(m, axes) for m in maps]


# Constants


def identity() -> Affine:
    """The map that changes nothing, for any number of channels: the unit of `>>`."""
    return Affine(torch.ones(1, 1, 1, 1, dtype=torch.float64), groups=None)


def zero_pad(padding: int | Pair | Sides) -> Affine:
    """Zeros put around the image (negative: cropped), for any number of channels."""
    return replace(identity(), padding=padding)


def scaling(scale: Tensor, shift: Tensor | None = None) -> Affine:
    """Each channel times its `scale` ("c") plus its `shift` ("c"): a depthwise 1x1, which is what a batch norm is."""
    return Affine(rearrange(scale, "c -> c 1 1 1"), shift, groups=len(scale))


def average(
    kernel_size: int | Pair,
    stride: int | Pair = 1,
    padding: int | Pair | Sides = 0,
    dilation: int | Pair = 1,
    divisor: int | None = None,
) -> Affine:
    """Average pooling, for any number of channels: a constant kernel of 1/K^2 (the paper's transform V).

    Padded zeros count, as in `nn.AvgPool2d` by default; `divisor` replaces the number of taps.
    """
    height, width = pair(kernel_size)
    weight = torch.full((1, 1, height, width), 1 / (divisor or height * width), dtype=torch.float64)
    return Affine(weight, None, stride, padding, dilation, groups=None)


# Arguments, brought to one form


def pair(value: int | Pair) -> Pair:
    """One int for both axes, or two."""
    return (value, value) if isinstance(value, int) else tuple(value)


def sides(value: int | Pair | Sides) -> Sides:
    """Padding as ((top, bottom), (left, right)), from one int, one an axis, or one a side."""
    return tuple(pair(p) for p in pair(value))


def plain_strides(weight: Tensor) -> Tensor:
    """The kernel with strides that mean something: those of a fresh tensor, where an axis of length 1 may have any.

    Products leave odd ones there: torch 2.15 takes a 1x1 kernel with some of them for channels_last, and on a CPU the
    backward pass of its convolution then writes where it must not.
    """
    return weight.flatten().view(weight.shape) if 1 in weight.shape else weight


# How it is computed


def _laid_on(axes: Sequence[Axis], weight: Tensor, bias: Tensor | None, groups: int | None) -> Affine:
    stride, dilation = tuple(a.stride for a in axes), tuple(a.dilation for a in axes)
    return Affine(weight, bias, stride, tuple((a.left, a.right) for a in axes), dilation, groups)


def _meet(a: Affine, b: Affine, of_a: str, of_b: str) -> tuple[Affine, Affine, bool]:
    """Give a channelwise map the channels of the one it meets; two channelwise maps meet on a single channel."""
    if a.groups is None and b.groups is None:
        return a.on(1), b.on(1, like=a.weight), True
    if a.groups is None:
        return a.on(getattr(b, of_b), like=b.weight), b, False
    return a, b.on(getattr(a, of_a), like=a.weight), False


def _compose_kernels(first: Affine, then: Affine, groups: int, axes: Sequence[Axis]) -> Tensor:
    """Lay a copy of the first kernel at every tap of the second, weighed by it, and add what overlaps."""
    if first.kernel_size == (1, 1) and first.groups == first.in_channels == first.out_channels:  # a scaling
        scale = rearrange(first.weight, "(g m) 1 1 1 -> g 1 m 1 1", g=then.groups)
        weight = rearrange(then.weight, "(g o) m kh kw -> g o m kh kw", g=then.groups)
        return rearrange(weight * scale, "g o m kh kw -> (g o) m kh kw")
    # The second map keeps its own groups here: each reads a few rows of the first, which makes a batch norm cheap.
    outer = rearrange(then.weight, "(g o) m kh kw -> g o m (kh kw)", g=then.groups)
    inner = rearrange(first.regroup(groups).weight, "(g m) i kh kw -> g m (i kh kw)", g=then.groups)
    copies = einsum(outer, inner, "g o m u, g m v -> g o v u")
    (height, width), taps = first.kernel_size, then.kernel_size
    if height * width == 1 or taps == (1, 1):  # one pixel at every tap, or one copy: nothing overlaps
        sizes = dict(zip("abcd", (height, width, *taps)))
        return rearrange(copies, "g o (i a b) (c d) -> (g o) i (a c) (b d)", **sizes)
    # In steps of the merged grid; an axis with a single tap has no steps, any positive number will do.
    apart = [max(1, a.stride * b.dilation // axis.dilation) for a, b, axis in zip(first.axes, then.axes, axes)]
    within = [max(1, a.dilation // axis.dilation) for a, axis in zip(first.axes, axes)]
    copies = rearrange(copies, "g o v u -> (g o) v u")
    return F.fold(copies, [axis.taps for axis in axes], first.kernel_size, dilation=within, stride=apart)


def _common_axis(axes: Sequence[Axis]) -> Axis:
    """The coarsest grid that begins at the first of all first taps and meets every tap of every map."""
    left, right = max(a.left for a in axes), max(a.right for a in axes)
    steps = [step for a in axes for step in a.widened(left, right).steps]
    return axes[0].widened(left, right, steps)


def _place(a: Affine, axes: Sequence[Axis]) -> Affine:
    """Embed the kernel among zeros: its first tap moves by what the padding grew."""
    if a.axes == tuple(axes):
        return a
    window = [slice(None), slice(None)]
    for old, new in zip(a.axes, axes):
        start, step = (new.left - old.left) // new.dilation, max(1, old.dilation // new.dilation)
        window.append(slice(start, start + step * (old.taps - 1) + 1, step))
    weight = a.weight.new_zeros(*a.weight.shape[:2], *(axis.taps for axis in axes))
    weight[tuple(window)] = a.weight
    return _laid_on(axes, weight, a.bias, a.groups)


def _block_diagonal(weights: Sequence[Tensor]) -> Tensor:
    """Dense kernels "o i kh kw" as blocks on a diagonal: each reads its own slice of the input."""
    slices = [w.shape[1] for w in weights]
    before = [sum(slices[:n]) for n in range(len(slices))]
    rows = [F.pad(w, (0, 0, 0, 0, b, sum(slices) - b - s)) for w, b, s in zip(weights, before, slices)]
    return torch.cat(rows)


def _add_biases(*biases: Tensor | None) -> Tensor | None:
    present = [b for b in biases if b is not None]
    return reduce(torch.add, present) if present else None


def _cat_biases(maps: Sequence[Affine]) -> Tensor | None:
    if all(m.bias is None for m in maps):
        return None
    return torch.cat([m.weight.new_zeros(m.out_channels) if m.bias is None else m.bias for m in maps])


def _gcd(numbers: Sequence[int]) -> int:
    return gcd(*numbers) or 1


# What is refused


def _check_shapes(weight: Tensor, bias: Tensor | None, groups: int | None) -> None:
    shape = tuple(weight.shape)
    if len(shape) != 4:
        raise ValueError(f"weight has shape {shape}: a 2-D convolution needs (out, in / groups, kh, kw)")
    if groups is None and shape[:2] != (1, 1):
        raise ValueError(f"weight has shape {shape}: a channelwise map has one kernel (1, 1, kh, kw); give groups")
    if groups is not None and (groups < 1 or shape[0] % groups):
        raise ValueError(f"groups={groups} must divide the {shape[0]} output channels of the weight")
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: {shape[0]} output channels need ({shape[0]},)")


def _check_channels(first: Affine, then: Affine) -> None:
    if first.out_channels != then.in_channels:
        raise ValueError(
            f"cannot chain a map that answers {first.out_channels} channels and a map that reads {then.in_channels}: "
            f"make the two numbers equal"
        )


def _check_addable(a: Affine, b: Affine) -> None:
    if (a.in_channels, a.out_channels) != (b.in_channels, b.out_channels):
        raise ValueError(
            f"cannot add a map {a.in_channels} -> {a.out_channels} channels and a map {b.in_channels} -> "
            f"{b.out_channels}: branches that are added need equal channels; change one, or concat them"
        )


def _check_border(first: Affine, then: Affine) -> None:
    """Refuse a padded second map whose zeros are not what the first would have answered there."""
    for a, b in zip(first.axes, then.axes):
        for seen, padded in ((a.left, b.left), (a.right, b.right)):
            if padded > 0 and first.bias is not None:
                raise ValueError(
                    f"cannot fold a map with padding={then.padding} behind one with a bias: the border is padded with "
                    f"zero, where the first map answers its bias; pad before the first map, or let BiasPad do it"
                )
            if padded > 0 and seen < a.reach:
                raise ValueError(
                    f"cannot fold a map with padding={then.padding} behind one with kernel_size={first.kernel_size} "
                    f"and padding={first.padding}: zeros would stand where its windows still touch the image; pad the "
                    f"first map by dilation * (kernel - 1) = {a.reach}, and the second less"
                )
