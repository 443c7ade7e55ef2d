"""Other ways to compute a block's training step: from the same parameters, to the same folded convolution.

`blocks.py` defines what a block computes: every branch, layer by layer, then the sum. That is dear in memory and time,
mostly for its many norms. Two other ways are here. Both hold what stands in front of a norm as a map of the block's
input, an `Affine`, and ask only for the mean and the variance of what that map would answer:

- `LeanStep` gets them, for pointwise maps, from the moments of the input, without computing any answer. It is the same
  training step up to rounding, and what blocks use unless told otherwise.
- `SampledStep` gets them from a sample of the batch's pixels, folds the whole block, and lays one kernel on the batch.
  That is another training step, unless the sample is the batch, so nobody gets it unasked.

`set_training_step(model, SampledStep(8192))` chooses; `BranchStep()` is the definition itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from itertools import pairwise
from math import prod
from operator import add

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dbb.affine import Affine, Axis, Pair, Sides, identity, plain_strides, sides, zero_pad
from dbb.fold import conv_map, fold, is_norm, normalisation
from dbb.layers import BiasPad, IdentityBasedConv1x1, Parallel, WindowMean, answer_to_zero

SMALL = 2**18  # numbers of an input, a megabyte in float32: below, there is no memory to save
MOVED = 48  # multiply-adds that take as long as it takes to move a number there and back
GRIDS = 8  # that a sample has: more see more, and cost more small operations

Norm = nn.modules.batchnorm._BatchNorm
Grids = list[tuple[slice, tuple[range, range]]]  # some of the images, and which output rows and columns of them
Statistics = Callable[[Affine, Norm], tuple[Tensor, Tensor]]  # mean "c" and biased variance "c", over the batch


@dataclass(frozen=True)
class BranchStep:
    """The definition: branch by branch, layer by layer."""

    def __call__(self, branches: nn.Module, x: Tensor) -> Tensor:
        """Run the branches."""
        return branches(x)


def set_training_step(model: nn.Module, step: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """Let every block of the model compute its training steps that way; returns the model.

    step: `LeanStep()`, `SampledStep(pixels)`, `BranchStep()`, or a function of a block's branches and its input
    Raises ValueError for a model without blocks.
    """
    blocks = [m for m in model.modules() if hasattr(type(m), "training_step")]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks: put some in, as with dbb.replace_convs(model)")
    for block in blocks:
        block.training_step = step
    return model


# Folding in training: a norm counts with the statistics of this very batch


def fold_in_training(layer: nn.Module, before: Affine | None, statistics: Statistics, dtype: torch.dtype) -> Affine:
    """The map of `layer` behind the map `before`, as they compute it in this very training step; differentiable.

    statistics: answers mean and variance, over the batch, of what a map answers in front of a norm
    """
    step = partial(fold_in_training, statistics=statistics, dtype=dtype)
    if isinstance(layer, nn.Sequential):
        return reduce(lambda a, child: step(child, a), layer, before)
    if isinstance(layer, Parallel):
        return reduce(add, [step(child, before) for child in layer.children()])
    if isinstance(layer, BiasPad):
        prefix = step(layer.prefix, before)
        return replace(replace(prefix, bias=None) >> zero_pad(layer.padding), bias=prefix.bias)
    if isinstance(layer, Norm) and layer.training:
        before = (before or identity()).on(layer.num_features, like=layer.running_mean.to(dtype))
        return before >> normalisation(*statistics(before, layer), layer).to(dtype)
    after = conv_map(layer, dtype) if type(layer) is nn.Conv2d else fold(layer).to(dtype)
    if before is None:
        return after
    return _Averaged.of(before, after) if _is_average(layer) and before.kernel_size == (1, 1) else before >> after


@dataclass(frozen=True, eq=False)
class _Averaged(Affine):
    """A pointwise map and the average of its windows, which remembers both: they commute, and one by one cost less."""

    pointwise: Affine | None = None
    tap: Tensor | None = None  # which share of the average each pixel of a window has

    @classmethod
    def of(cls, pointwise: Affine, average: Affine) -> _Averaged:
        """Both in one."""
        both, tap = pointwise >> average, average.weight[0, 0, 0, 0]
        return cls(both.weight, both.bias, both.stride, both.padding, both.dilation, both.groups, pointwise, tap)


def track_(norm: Norm, mean: Tensor, var: Tensor, count: int) -> None:
    """Let the running statistics take in those of `count` pixels, as the norm does when it sees them."""
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        weight = _weight_of_batch(norm)
        norm.running_mean.lerp_(mean.to(norm.running_mean), weight)
        norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var), weight)


def _weight_of_batch(norm: Norm) -> float | Tensor:
    """How much the last batch counts in the running statistics."""
    return 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum


# The same step, leaner


@dataclass(frozen=True)
class LeanStep:
    """The same training step as `BranchStep`, up to rounding, in a third to a half of the memory.

    - The statistics of a pointwise map `W x + b` need no answer of it: with the mean `m` and the covariance `S` of the
      input's pixels they are `W m + b` and `diag(W S W^T)`.
    - So the norm behind a 1x1 is part of its kernel before that runs. A KxK behind it is one kernel on the input
      (transform III, within the training step), or reads an answer that is not kept.
    - An average runs before its 1x1, with which it commutes, and is not kept.
    - With frozen norms (see `dbb.freeze_norms`) the whole block is linear: it is folded, and runs as one kernel.

    What has another shape runs as it is defined: branches of your own, SyncBatchNorm. So does a block with hooks on its
    layers, as not every layer runs here.

    always: whether also where that saves memory only, and costs time: in blocks without sequences (ACB, RepVGG), where
    there are few pixels (in bfloat16: fewer than 24 for each channel), and where the input is so small that its many
    small operations take longer than all numbers
    """

    always: bool = False

    def __call__(self, branches: nn.Module, x: Tensor) -> Tensor:
        """Run the branches: "n i h w" -> "n o h' w'"."""
        if not isinstance(branches, Parallel) or _is_watched(branches):
            return branches(x)
        if _is_frozen(branches) and (self.always or _has_many_pixels(x)):
            return _as_one_kernel(branches, x)
        if not self.always and not _moments_pay(branches, x):
            return branches(x)
        total = _Total()
        moments = _MomentsOf(_as_computed(x))
        for branch in branches.children():
            _run_lean(branch, x, moments, total)
        return total.answer()


class _Total:
    """What the branches answer, as it comes in: finished, constant, or still to be normalised."""

    def __init__(self) -> None:
        self.finished: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.waiting: list[tuple[Tensor, nn.BatchNorm2d, Tensor | None]] = []

    def answer(self) -> Tensor:
        """The sum. The constants ride on the bias of the first norm, where they cost nothing."""
        constant = sum(self.constants) if self.constants else None
        normed = [_normalise(*waiting, constant if n == 0 else None) for n, waiting in enumerate(self.waiting)]
        if not normed:  # what is finished may be the input itself
            total = reduce(add, self.finished)
            return total if constant is None else total + constant.to(total.dtype)[:, None, None]
        return reduce(_add_to, normed[1:] + self.finished, normed[0])


def _add_to(total: Tensor, answer: Tensor) -> Tensor:
    """The sum, in place where it can be: a fresh image costs as much as the adding."""
    return total.add_(answer) if total.dtype == answer.dtype else total + answer


def _normalise(y: Tensor, norm: nn.BatchNorm2d, missing: Tensor | None, constant: Tensor | None) -> Tensor:
    """`norm(y + missing) + constant`; the norm takes `missing` out again, so that only its running mean has to know."""
    if constant is None:
        normed = norm(y)
    elif norm.bias is None:
        normed = norm(y) + constant.to(y.dtype)[:, None, None]
    else:
        normed = torch.func.functional_call(norm, {"bias": norm.bias + constant.to(norm.bias.dtype)}, (y,))
    if missing is not None:
        # `.data`, as autograd holds the running mean for a backward pass that, in training, does not read it.
        norm.running_mean.data.add_(missing.detach().to(norm.running_mean) * _weight_of_batch(norm))
    return normed


def _run_lean(branch: nn.Module, x: Tensor, moments: _MomentsOf, total: _Total) -> None:
    """Run a branch, the short way where there is one."""
    *front, norm = branch if isinstance(branch, nn.Sequential) else [branch]
    if not _is_live_norm(norm):
        total.finished.append(branch(x))
        return
    if all(map(_is_pointwise, front)):
        moments.add_answer(moments.fold(branch), total)
        return
    *front, last = front
    padded = len(front) == 1 and isinstance(front[0], BiasPad) and _is_pointwise(front[0].prefix)
    if _is_average(last) and (padded or not front):
        _run_average(_Padded.of(front, moments), last, norm, moments.x, total)
    elif padded and type(last) is nn.Conv2d and last.bias is None:
        _run_padded_conv(_Padded.of(front, moments), last, norm, moments.x, total)
    else:
        total.waiting.append((branch[:-1](x), norm, None))


def _moments_pay(branches: nn.Module, x: Tensor) -> bool:
    """Whether there are sequences to shorten, and pixels enough for their moments to cost less than their answers."""
    shortens = any(isinstance(m, BiasPad) for m in branches.modules())
    # what goes into a kernel, and how kernels merge, is float32, which takes many times longer than few bits do
    few_bits = _as_computed(x[:0]).dtype in (torch.bfloat16, torch.float16)
    return shortens and x.numel() >= SMALL and _has_many_pixels(x, 24 if few_bits else 2)


def _has_many_pixels(x: Tensor, many: int = 2) -> bool:
    """Whether there are `many` pixels or more for each channel."""
    return x.numel() >= many * x.shape[1] ** 2


def _is_frozen(branches: nn.Module) -> bool:
    """Whether nothing in the branches looks at the batch, and the border's value has no gradient: they are linear."""
    leaves = [m for m in branches.modules() if not isinstance(m, (Parallel, BiasPad)) and type(m) is not nn.Sequential]
    return all(map(_is_linear, leaves))


def _is_linear(layer: nn.Module) -> bool:
    if is_norm(layer):
        live = isinstance(layer, Norm) and (layer.training or layer.running_mean is None)
        return not live and not any(p.requires_grad for p in layer.parameters())
    if type(layer) is nn.Conv2d:
        return layer.bias is None and layer.padding_mode == "zeros"
    return type(layer) in (IdentityBasedConv1x1, WindowMean, nn.AvgPool2d, nn.ZeroPad2d, nn.Identity)


def _as_one_kernel(branches: nn.Module, x: Tensor) -> Tensor:
    """The answer of branches that are linear, by the kernel that they fold to; its gradient goes through the fold."""
    x = _as_computed(x)
    with _full_precision(x):
        folded = fold_in_training(branches, None, _no_statistics, torch.promote_types(x.dtype, torch.float32))
    return _apply(folded, x)


def _no_statistics(a: Affine, norm: Norm) -> tuple[Tensor, Tensor]:
    raise AssertionError(f"{norm} was taken for frozen and asks for the statistics of a batch")


def _is_watched(branches: nn.Module) -> bool:
    """Whether somebody waits for a layer to run."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(layer, kind) for layer in branches.modules() for kind in kinds)


def _is_live_norm(layer: nn.Module) -> bool:
    """Whether it normalises with the statistics of this batch, in this process, and keeps count of them."""
    return type(layer) is nn.BatchNorm2d and layer.training and layer.running_mean is not None


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether every pixel of its answer reads one pixel of its input, or none; all norms in it live."""
    if type(layer) is nn.Sequential:
        return all(map(_is_pointwise, layer))
    if type(layer) is nn.Conv2d:
        return layer.kernel_size == (1, 1)
    return _is_live_norm(layer) or type(layer) in (IdentityBasedConv1x1, nn.Identity, nn.ZeroPad2d)


def _is_average(layer: nn.Module) -> bool:
    return type(layer) is WindowMean or (type(layer) is nn.AvgPool2d and layer.divisor_override is None)


@dataclass(frozen=True)
class _Padded:
    """A `BiasPad` in this training step: a pointwise map, and what is put around its answer.

    outside: by how much the padding differs from the map's bias, "c"; None where it does not
    """

    map: Affine
    padding: Sides = ((0, 0), (0, 0))
    outside: Tensor | None = None

    @classmethod
    def of(cls, front: list[nn.Module], moments: _MomentsOf) -> _Padded:
        """From what stands in front of a KxK: nothing, or a `BiasPad` with a pointwise prefix; its norms keep count."""
        if not front:
            return cls(identity().on(moments.x.shape[1]).to(moments.x.device, moments.dtype))
        prefix = moments.fold(front[0].prefix)
        if front[0].border == "batch" or prefix.bias is None:
            return cls(prefix, front[0].padding)
        with torch.no_grad():
            border = answer_to_zero(front[0].prefix).to(prefix.bias)  # with the statistics that the fold has tracked
        return cls(prefix, front[0].padding, border - prefix.bias)


def _run_padded_conv(padded: _Padded, conv: nn.Conv2d, norm: Norm, x: Tensor, total: _Total) -> None:
    """A KxK behind a padded pointwise map: as one kernel on the input, or in two steps, whichever is cheaper."""
    with _full_precision(x):
        then, first = zero_pad(padded.padding) >> conv_map(conv, padded.map.weight.dtype), padded.map
        linear = replace(first, bias=None)
        if _merging_pays(then, x):
            y = _apply(linear >> then, x)
            ring = None if padded.outside is None else _Ring.of(then, x)
            if ring:
                y = ring.add_(y, _by_tap(then, padded.outside) @ ring.outside.T)
            constant = then.constant_response(first.bias)
        else:
            # to pad with a value: subtract it, pad with zero, and add its answer
            shifted = linear if padded.outside is None else replace(first, bias=-padded.outside)
            z = _apply(shifted, x)
            with _not_kept(z, _once(lambda: _apply(shifted, x))):
                y = _apply(then, z)
            border = first.bias if padded.outside is None else first.bias + padded.outside
            constant = then.constant_response(border)
        total.waiting.append((y, norm, constant))
        if first.bias is not None:
            total.constants.append(0 * first.bias.sum())  # where its gradient is zero, that is not the same as none


def _by_tap(a: Affine, value: Tensor) -> Tensor:
    """What each tap of the kernel answers to `value`: "o taps"."""
    weight = rearrange(a.weight, "(g o) m kh kw -> g o (kh kw) m", g=a.groups)
    return rearrange(weight @ rearrange(value, "(g m) -> g 1 m 1", g=a.groups), "g o t 1 -> (g o) t")


def _run_average(padded: _Padded, pool: nn.Module, norm: Norm, x: Tensor, total: _Total) -> None:
    """The average of a padded pointwise map and its norm, as the normalised map of the sums of windows."""
    average = (zero_pad(padded.padding) >> fold(pool)).to(padded.map.weight.dtype)
    sums, again = _window_sums(average, x), _once(lambda: _window_sums(average, x))
    a = replace(padded.map, weight=padded.map.weight * average.weight[0, 0, 0, 0])
    ring = None if padded.outside is None else _Ring.of(average, x)
    with _not_kept(sums, again), _full_precision(x):
        moments = _MomentsOf(sums, ring, again)
        mean, var = moments.through(a)
        if ring:  # the share of a window that lies outside is one more channel of the image
            outside, common = padded.outside, replace(a, bias=None).constant_response(moments.with_ring())
            mean = mean + outside * ring.mean
            var = var + 2 * outside * common + outside**2 * ring.var
        track_(norm, mean, var, moments.pixels)
        scale = normalisation(mean, var, norm).to(moments.dtype)
        moments.add_answer(a >> scale, total)
        if ring:
            values = torch.outer(scale.weight.flatten() * outside, ring.share)
            total.finished[-1] = ring.add_(total.finished[-1], values)


def _merging_pays(then: Affine, x: Tensor) -> bool:
    """Whether one kernel on the input costs fewer multiply-adds than two: with gradients 3 merges against 4 answers."""
    merge = then.weight.shape[0] // then.groups * prod(then.kernel_size)
    return 3 * merge < 4 * x.numel() // x.shape[1]


def _window_sums(average: Affine, x: Tensor) -> Tensor:
    """The sum over the window of each output pixel, of an average's windows."""
    around = tuple(before for before, _ in average.padding)
    half = all(0 <= p <= k // 2 for p, k in zip(around, average.kernel_size)) and average.padding == sides(around)
    if _pools_fast(x) and half and average.dilation == (1, 1):
        return F.avg_pool2d(x, average.kernel_size, average.stride, around, divisor_override=1)
    return _WindowSums.apply(x, average)


def _pools_fast(x: Tensor) -> bool:
    """Whether torch's averages are made for its device; on a CPU a convolution takes a fraction of their time."""
    return x.is_cuda


class _WindowSums(torch.autograd.Function):
    """The sums by a convolution with ones.

    So is their adjoint: as many windows read a pixel as it reads, once a stride's gaps are filled with zeros.
    """

    @staticmethod
    def forward(x: Tensor, average: Affine) -> Tensor:
        ones = replace(average, weight=torch.ones_like(average.weight))
        return _apply(ones.on(x.shape[1], like=x), x)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.size, ctx.average = inputs[0].shape[2:], inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        a = ctx.average
        if a.stride != (1, 1):
            grad = _spread(grad, a.stride, [n + axis.slack for n, axis in zip(ctx.size, a.axes)])
        around = tuple(tuple(axis.reach - side for side in (axis.left, axis.right)) for axis in a.axes)
        return _WindowSums.apply(grad, replace(a, stride=1, padding=around)), None


class _EveryFew(torch.autograd.Function):
    """Every few pixels. Its gradient lies in memory as the image does, so that it is added to others fast."""

    @staticmethod
    def forward(x: Tensor, stride: Pair) -> Tensor:
        return x[:, :, :: stride[0], :: stride[1]].clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.size, ctx.stride = inputs[0].shape[2:], inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _spread(grad, ctx.stride, ctx.size), None


def _spread(x: Tensor, stride: Pair, size: Sequence[int]) -> Tensor:
    """The pixels as far apart as a stride says, zeros between them; in the same layout."""
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    spread = torch.empty(*x.shape[:2], *size, dtype=x.dtype, device=x.device, memory_format=layout).zero_()
    spread[:, :, :: stride[0], :: stride[1]] = x
    return spread


def _as_computed(x: Tensor) -> Tensor:
    """The input in the dtype that autocast would give the convolutions."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast does not know the meta device
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast off: second moments and merged kernels want more than eight bits."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _apply(a: Affine, x: Tensor) -> Tensor:
    """`a(x)` in the dtype of `x`; the convolution pads itself where it can."""
    bias = None if a.bias is None else a.bias.to(x.dtype)
    around = [before for before, _ in a.padding]
    if a.padding != sides(tuple(around)) or min(around) < 0:
        (top, bottom), (left, right) = a.padding
        x, around = F.pad(x, (left, right, top, bottom)), 0
    return F.conv2d(x, plain_strides(a.weight.to(x.dtype)), bias, a.stride, around, a.dilation, a.groups)


def _once(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same function, which computes its answer only once."""
    found: list[Tensor] = []

    def answer() -> Tensor:
        if not found:
            found.append(function())
        return found[0]

    return answer


@contextmanager
def _not_kept(tensor: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """What operations in here keep of `tensor` for the backward pass is not kept, but computed `again` there."""
    if torch.compiler.is_compiling() or tensor.is_meta:  # the compiler decides that itself
        yield
        return
    place = tensor.untyped_storage().data_ptr()

    def pack(kept: Tensor) -> Tensor | tuple:
        if kept.untyped_storage().data_ptr() != place:
            return kept
        return kept.size(), kept.stride(), kept.storage_offset()

    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return again().detach().as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# Another step: statistics from a sample, one kernel for the batch


@dataclass(frozen=True)
class SampledStep:
    """The block folded in every step, with statistics from a sample of the batch's pixels: ghost batch norm, no more.

    pixels: of a map's answer that its norm sees at least, spread over all images by grids whose places are drawn anew
    in each step, from torch's CPU generator
    always: whether also where the branches themselves cost less; else those blocks take a `LeanStep`
    exact_sum: whether the sum of the branches gets the mean and the variance that it has with exact norms, by one norm
        behind the kernel that sees all pixels. Then only how the branches mix rests on the sample. It costs what the
        norm of a plain convolution costs, and serves blocks whose every branch ends in a norm

    With all pixels in the sample it is the training step of `border="batch"`; whatever `border` the block has, its
    padding takes the statistics of this step. In data-parallel training each process draws from its own batch.
    Raises ValueError for SyncBatchNorm, which would need the samples of all processes, and for a norm with a forward of
    its own, where it would stand in front of a fold; frozen norms are no matter.
    """

    pixels: int = 8192
    always: bool = False
    exact_sum: bool = False

    def __post_init__(self) -> None:
        if self.pixels < 2:
            raise ValueError(f"pixels={self.pixels} is no sample: a variance needs 2 pixels or more; say 8192")

    def __call__(self, branches: nn.Module, x: Tensor) -> Tensor:
        """Run the branches, folded: "n i h w" -> "n o h' w'"."""
        if not self.always and not sampling_pays(branches, x, self.pixels, self.exact_sum):
            return LeanStep()(branches, x)
        x = _as_computed(x)
        sample = _Sample(x, self.pixels)
        with _full_precision(x):
            folded = fold_in_training(branches, None, sample.statistics, sample.dtype)
            if self.exact_sum and all(map(_ends_in_norm, branches.children())):
                return sample.normalised_alike(folded)
        return _apply(folded, sample.x)


def _ends_in_norm(branch: nn.Module) -> bool:
    """Whether the last thing that a branch does is to normalise with the statistics of the batch."""
    last = branch[-1] if isinstance(branch, nn.Sequential) else branch
    return isinstance(last, Norm) and last.training


def sampling_pays(branches: nn.Module, x: Tensor, pixels: int, exact_sum: bool = False) -> bool:
    """Whether the folded form is clearly cheaper than the branches, on this input, with that sample.

    Counts the multiply-adds of a forward pass, as the backward pass has twice as many of either. A number that a norm
    normalises, or that is gathered for the sample, counts as `MOVED` of them: with that the choice agrees with what
    `benchmarks/training_cost.py` measured, in bfloat16 nearly always. The folded form has to win by a fifth.
    """
    convs = [m for m in branches.modules() if isinstance(m, nn.Conv2d)]
    if not convs:
        return False
    largest = max(convs, key=_numbers)
    kernel, inside = _numbers(largest), x.numel() // x.shape[1]
    outside = inside // prod(largest.stride)
    by_branches = in_sample = merging = 0
    for branch in branches.children():
        # what stands in front of a padding sees every pixel, and merges into the kernel behind it
        padded = [m for pad in branch.modules() if isinstance(pad, BiasPad) for m in pad.modules()]
        prefix, before = sum(map(_numbers, padded)), sum(map(_normalised, padded))
        behind, after = sum(map(_numbers, branch.modules())) - prefix, sum(map(_normalised, branch.modules())) - before
        by_branches += (prefix + MOVED * before) * inside + (behind + MOVED * after) * outside
        last = kernel if prefix and behind else prefix or behind  # an average answers before its 1x1 does
        in_sample += prefix * _seen(x, (1, 1), pixels) + last * _seen(x, largest.stride, pixels)
        merging += behind * largest.weight.shape[1] if prefix else 0
    uses_of_a_number = largest.out_channels // largest.groups
    sampled = kernel * outside + merging + in_sample * (1 + MOVED / uses_of_a_number)
    sampled += MOVED * largest.out_channels * outside if exact_sum else 0
    return sampled < 0.8 * by_branches


def _seen(x: Tensor, stride: Pair, pixels: int) -> int:
    """How many pixels the grids have that a sample of `pixels` takes."""
    outputs = [-(-n // s) for n, s in zip(x.shape[2:], stride)]
    return len(x) * prod(n // s for n, s in zip(outputs, _grid_steps(outputs, len(x), pixels)))


def _numbers(layer: nn.Module) -> int:
    return layer.weight.numel() if isinstance(layer, (nn.Conv2d, IdentityBasedConv1x1)) else 0


def _normalised(layer: nn.Module) -> int:
    return layer.num_features if isinstance(layer, Norm) else 0


class _Sample:
    """Some pixels of what maps answer to an image, and their statistics."""

    def __init__(self, x: Tensor, pixels: int) -> None:
        self.x, self.wanted, self.dtype = x, pixels, torch.promote_types(x.dtype, torch.float32)
        self.windows: dict[tuple, tuple[Tensor, Callable[[], Tensor]]] = {}
        self.grids: dict[tuple, Grids] = {}

    def statistics(self, a: Affine, norm: Norm) -> tuple[Tensor, Tensor]:
        """Mean and variance of what a map answers in the sample; the norm takes them into its running ones."""
        _check_its_own(norm)
        mean, var, count = self._seen_of(a)
        track_(norm, mean, var, count)
        return mean, var

    def normalised_alike(self, a: Affine) -> Tensor:
        """What a map answers to the whole image, with the mean and the variance that it has in the sample.

        There the norms in the map are exact; elsewhere they are a little off, and their sum with them.
        """
        mean, var, _ = self._seen_of(a)
        y, eps = _apply(replace(a, bias=None), self.x), 1e-5
        return F.batch_norm(y, None, None, (var + eps).sqrt(), mean, training=True, eps=eps)

    def _seen_of(self, a: Affine) -> tuple[Tensor, Tensor, int]:
        """Mean and variance of what a map answers in the sample, and of how many pixels."""
        windows, again = self._windows_of(a)
        with _not_kept(windows, again):
            answers = _answers(a, windows)  # as few bits as a convolution's; only what they add up to needs more
        mean, var = _MeanAndVariance.apply(answers, self.dtype)
        return mean if a.bias is None else mean + a.bias, var, len(answers)

    def _windows_of(self, a: Affine) -> tuple[Tensor, Callable[[], Tensor]]:
        """The windows that the map reads, "sample taps channels", and what gathers them again."""
        key = (a.axes, a.kernel_size)
        if key not in self.windows:
            outputs = [(n + axis.slack - 1) // axis.stride + 1 for axis, n in zip(a.axes, self.x.shape[2:])]
            windows_of = a.axes, self._grids(outputs)
            again = _once(partial(_gather, self.x, *windows_of))
            self.x, windows = _Windows.apply(self.x, *windows_of)
            self.windows[key] = windows, again
        return self.windows[key]

    def _grids(self, outputs: list[int]) -> Grids:
        """Where the sample lies: for all maps with so many outputs at the same pixels, as they may be added."""
        key = tuple(outputs)
        if key not in self.grids:
            steps = _grid_steps(outputs, len(self.x), self.wanted)
            self.grids[key] = _draw_grids(len(self.x), outputs, steps)
        return self.grids[key]


def _check_its_own(norm: Norm) -> None:
    """Refuse a norm that is not, or may not be, one over the batch of this process alone."""
    if isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_initialized():
        raise ValueError(
            "SampledStep knows the statistics of one process, SyncBatchNorm uses those of all: choose LeanStep() "
            "or BranchStep(), or leave the norms unsynchronised"
        )
    if type(norm).forward not in (Norm.forward, nn.SyncBatchNorm.forward):
        raise ValueError(
            f"{type(norm).__name__} is a batch norm with a forward of its own, which SampledStep would not run: choose "
            f"LeanStep() or BranchStep(), which do, or use nn.BatchNorm2d"
        )


def _answers(a: Affine, windows: Tensor) -> Tensor:
    """What the linear part of a map answers to windows "sample taps channels": "sample o"."""
    if isinstance(a, _Averaged):
        scaled = replace(a.pointwise, weight=a.tap * a.pointwise.weight)
        return _answers(scaled, windows.sum(1, keepdim=True))
    weight = a.weight.to(windows.dtype)
    if a.groups == 1:
        return F.linear(windows.flatten(1), rearrange(weight, "o i kh kw -> o (kh kw i)"))
    if a.groups == a.in_channels == a.out_channels:
        return (windows * rearrange(weight, "c 1 kh kw -> (kh kw) c")).sum(1)
    weight = rearrange(weight, "(g o) i kh kw -> g (kh kw i) o", g=a.groups)
    answers = rearrange(windows, "p t (g i) -> g p (t i)", g=a.groups) @ weight
    return rearrange(answers, "g p o -> p (g o)")


class _MeanAndVariance(torch.autograd.Function):
    """Mean "c" and biased variance "c" of answers "sample c", in a wider dtype; of the answers nothing else is kept."""

    @staticmethod
    def forward(answers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mean = answers.mean(0, dtype=dtype)
        return mean, (answers - mean).square_().mean(0)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None]:
        answers, mean = ctx.saved_tensors
        # The mean moves, too, but that adds nothing to the variance: the centred answers add up to zero.
        slope = 2 * grad_var / len(answers)
        return torch.addcmul(grad_mean / len(answers) - slope * mean, answers, slope).to(answers.dtype), None


def _grid_steps(outputs: list[int], images: int, pixels: int) -> Pair:
    """The coarsest grid, its two steps at most one apart, that has so many pixels in all the images."""
    chosen = (1, 1)
    for step in range(1, max(outputs) + 1):
        for steps in ((step, step), (step, step + 1)):
            if all(s <= n for s, n in zip(steps, outputs)):
                grid = prod(n // s for n, s in zip(outputs, steps))
                if grid * images >= pixels:
                    chosen = steps
    return chosen


def _draw_grids(images: int, outputs: list[int], steps: Pair) -> Grids:
    """A grid for every few images: places are alike in all images, so one grid for all would see less."""
    parts = 1 if steps == (1, 1) else min(images, GRIDS)
    bounds = [images * part // parts for part in range(parts + 1)]
    return [(slice(*ends), tuple(_draw_grid(n, step) for n, step in zip(outputs, steps))) for ends in pairwise(bounds)]


def _draw_grid(outputs: int, step: int) -> range:
    """Every `step`-th output, from a first one that is drawn; as many of them wherever it begins."""
    count = outputs // step
    spare = outputs - (count - 1) * step
    first = int(torch.randint(spare, ())) if step > 1 else 0
    return range(first, first + (count - 1) * step + 1, step)


class _Windows(torch.autograd.Function):
    """The image once more, and the windows "sample taps channels" of some output pixels of a map.

    Who then reads this image, not the one from before, spares the backward pass a second gradient of its size: that of
    the windows is added, where they are, to the gradient that comes.
    """

    @staticmethod
    def forward(x: Tensor, axes: tuple[Axis, Axis], grids: Grids) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _gather(x, axes, grids)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        _, ctx.axes, ctx.grids = inputs

    @staticmethod
    def backward(ctx, grad: Tensor, grad_windows: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone() if torch.is_grad_enabled() else grad  # else nobody but this function ever sees it
        grad_windows = grad_windows.reshape(_shape(grad, ctx.axes, ctx.grids))
        for place, read in _tap_slices(ctx.axes, ctx.grids, grad.shape[2:]):
            grad[read] += grad_windows[place].permute(0, 3, 1, 2)
        return grad, None, None


def _gather(x: Tensor, axes: tuple[Axis, Axis], grids: Grids) -> Tensor:
    """The windows "sample taps channels"; padding reads as zero."""
    windows = x.new_zeros(_shape(x, axes, grids))
    for place, read in _tap_slices(axes, grids, x.shape[2:]):
        windows[place] = x[read].permute(0, 2, 3, 1)
    return windows.flatten(3, 4).flatten(0, 2)


def _shape(x: Tensor, axes: tuple[Axis, Axis], grids: Grids) -> tuple[int, ...]:
    """Of the windows: image, row and column of the grid, tap by row and column, channel."""
    (_, grid), *_ = grids
    return (x.shape[0], *map(len, grid), *(axis.taps for axis in axes), x.shape[1])


def _tap_slices(axes: tuple[Axis, Axis], grids: Grids, size: Sequence[int]) -> Iterator[tuple[tuple, tuple]]:
    """For each tap, in each part of the images: where in the windows it goes, and where in the image it comes from."""
    for images, grid in grids:
        along = [
            [_one_tap(axis, places, n, tap) for tap in range(axis.taps)] for axis, places, n in zip(axes, grid, size)
        ]
        for u, (into_row, from_row) in enumerate(along[0]):
            for v, (into_column, from_column) in enumerate(along[1]):
                yield (images, into_row, into_column, u, v), (images, slice(None), from_row, from_column)


def _one_tap(axis: Axis, grid: range, size: int, tap: int) -> tuple[slice, slice]:
    """Which outputs of the grid read inside the image with that tap, and what they read, along one axis."""
    reads = range(
        *(axis.stride * o + axis.dilation * tap - axis.left for o in (grid.start, grid.stop)), axis.stride * grid.step
    )
    inside = [place for place, read in enumerate(reads) if 0 <= read < size]
    if not inside:
        return slice(0, 0), slice(0, 0)
    return slice(inside[0], inside[-1] + 1), slice(reads[inside[0]], reads[inside[-1]] + 1, reads.step)


# Moments


class _MomentsOf:
    """Mean and covariance of the pixels of an image, as the pointwise maps of one block see them.

    again: makes the image once more, where it is not kept
    """

    def __init__(self, x: Tensor, ring: _Ring | None = None, again: Callable[[], Tensor] | None = None) -> None:
        self.x, self.ring, self.again = x, ring, again
        self.dtype, self.pixels = torch.promote_types(x.dtype, torch.float32), x.numel() // x.shape[1]
        self.seen: dict[tuple, Tensor] = {}
        self.known: dict[tuple, tuple[Tensor, ...]] = {}

    def fold(self, layer: nn.Module) -> Affine:
        """The pointwise map of the layer in this training step; its norms keep count."""
        with _full_precision(self.x):
            return fold_in_training(layer, None, self.statistics, self.dtype)

    def statistics(self, a: Affine, norm: Norm) -> tuple[Tensor, Tensor]:
        """Mean and variance of what a pointwise map answers; the norm takes them into its running ones."""
        mean, var = self.through(a)
        track_(norm, mean, var, self.x.shape[0] * prod(self._seen_by(a).shape[2:]))
        return mean, var

    def through(self, a: Affine) -> tuple[Tensor, Tensor]:
        """Mean and variance "o" of what a pointwise map answers."""
        mean, covariance, *_ = self._of(a)
        weight = rearrange(a.weight, "(g o) i 1 1 -> g o i", g=a.groups)
        return a.constant_response(mean), ((weight @ covariance) * weight).sum(-1).flatten()

    def add_answer(self, a: Affine, total: _Total) -> None:
        """Let a pointwise map answer to centred pixels; what it answers to their mean goes to the constants.

        Else the gradient of its kernel would be a small difference of large numbers, and in few bits mostly rounding.
        """
        mean, _, _, centred = self._of(a)
        image = self.again or partial(Tensor.detach, self._seen_by(a))
        with _full_precision(self.x):
            with _not_kept(centred, _once(lambda: _centred(image(), mean)[0])):
                total.finished.append(_apply(replace(a, bias=None, stride=1, padding=0), centred))
            total.constants.append(a.constant_response(_rounded(mean.detach(), centred.dtype)))

    def with_ring(self) -> Tensor:
        """The covariance "c" of the image and the share of the ring, of the last moments that were asked for."""
        mean, _, common, _ = next(reversed(self.known.values()))
        return common - mean * self.ring.mean

    def _of(self, a: Affine) -> tuple[Tensor, ...]:
        """The moments of the pixels that a pointwise map reads, and those pixels centred."""
        key = (a.stride, a.padding, a.groups)
        if key not in self.known:
            self.known[key] = _Moments.apply(self._seen_by(a), a.groups, self.ring)
        return self.known[key]

    def _seen_by(self, a: Affine) -> Tensor:
        """The pixels that the map reads."""
        key = (a.stride, a.padding)
        if key not in self.seen:
            (top, bottom), (left, right) = a.padding
            seen = F.pad(self.x, (left, right, top, bottom)) if any((top, bottom, left, right)) else self.x
            self.seen[key] = seen if a.stride == (1, 1) else _EveryFew.apply(seen, a.stride)
        return self.seen[key]


class _Moments(torch.autograd.Function):
    """Of pixels "n c h w": mean "c", covariance "g c c" in each group of channels, mean product "c" with a ring.

    And the pixels themselves, centred. Products are of those, and add up in float32 at least. In fewer bits each sum of
    products is rounded, so there are many short ones; and the mean that is taken off is rounded, too: what it lacks is
    put right afterwards.
    """

    @staticmethod
    def forward(x: Tensor, groups: int, ring: _Ring | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype, count = torch.promote_types(x.dtype, torch.float32), x.numel() // x.shape[1]
        mean = x.sum((2, 3), dtype=dtype).sum(0) / count
        common = torch.zeros_like(mean) if ring is None else ring.read(x).to(dtype) @ ring.share / count
        centred, missing = _centred(x, mean)
        if groups == len(mean):
            covariance = (centred.square().mean((0, 2, 3), dtype=dtype) - missing**2)[:, None, None]
        else:
            parts, missing = _in_parts(centred).unflatten(1, (groups, -1)), missing.view(groups, -1, 1)
            covariance = (parts @ parts.mT).sum(0, dtype=dtype) / count - missing @ missing.mT
        return mean, covariance, common, centred

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(inputs[0], output[0])
        ctx.groups, ctx.ring = inputs[1:]
        ctx.set_materialize_grads(False)  # nobody may have read the centred pixels, and their zeros would be an image

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        grad_mean, grad_covariance, grad_common, grad_centred = grads
        count = x.numel() // len(mean)
        centred, missing = _centred(x, mean)
        if grad_covariance is None:
            grad_covariance = mean.new_zeros(ctx.groups, *2 * [len(mean) // ctx.groups])
        # The mean moves, too, but that adds nothing to the covariance: the centred pixels add up to zero.
        matrix = (grad_covariance + grad_covariance.mT) / count
        constant = (0 if grad_mean is None else grad_mean / count) - (
            matrix @ missing.view(ctx.groups, -1, 1)
        ).flatten()
        grad = _apply(Affine(matrix.flatten(0, 1)[..., None, None], constant, groups=ctx.groups), centred)
        if grad_centred is not None:
            grad += grad_centred
        if ctx.ring is not None and grad_common is not None:
            ctx.ring.add_to_(grad, torch.outer(grad_common, ctx.ring.share) / count)
        return grad, None, None


def _centred(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels "n c h w" without their mean "c", which in few bits is rounded, and what of it is missing."""
    known = _rounded(mean, x.dtype)
    # a norm takes off its running mean in one pass, of whatever layout and dtype; a subtraction is slow for some
    return F.batch_norm(x, known, torch.ones_like(known), eps=0.0), mean - known


def _rounded(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """A mean that can be taken off pixels of few bits: of five, as on finer ones all large pixels would round alike."""
    if dtype == mean.dtype:
        return mean
    mantissa, exponent = torch.frexp(mean)
    return torch.ldexp((32 * mantissa).round() / 32, exponent)


def _in_parts(x: Tensor) -> Tensor:
    """ "n c h w" as matrices "b c p", several images in each where one has few pixels for its channels."""
    images, channels, *size = x.shape
    enough = (m for m in range(1, images) if images % m == 0 and m * prod(size) >= 2 * channels)
    return rearrange(x, "(b m) c h w -> b c (m h w)", m=next(enough, images))


# The ring of output pixels whose windows hang over the image


@dataclass(frozen=True, eq=False)
class _Ring:
    """The output pixels "r" of a map that read padding, as strips: some at the top, the bottom, the left, the right.

    outside: which taps of a pixel lie outside of the image, "r taps"
    pixels: of the whole output
    """

    strips: tuple[tuple[slice, slice], ...]
    outside: Tensor
    pixels: int

    @classmethod
    def of(cls, a: Affine, x: Tensor) -> _Ring | None:
        """The ring of the map `a` on the image `x`; None where no window hangs over."""
        size, dtype = tuple(x.shape[2:]), a.weight.dtype
        if torch.compiler.is_compiling():  # the compiler knows no such caches, and makes one pass of whole images
            outside = _outside(a.axes, size).to(x.device, dtype)
            return cls(((slice(None), slice(None)),), outside.flatten(0, 1), outside.shape[0] * outside.shape[1])
        return _ring(a.axes, size, x.device, dtype)

    @property
    def share(self) -> Tensor:
        """Which share "r" of a window lies outside; its mean and variance over the whole output follow."""
        return self.outside.mean(1)

    @property
    def mean(self) -> Tensor:
        return self.share.sum() / self.pixels

    @property
    def var(self) -> Tensor:
        return self.share.square().sum() / self.pixels - self.mean**2

    def read(self, x: Tensor) -> Tensor:
        """The sum over images "c r"."""
        return torch.cat([x[:, :, rows, columns].sum(0).flatten(1) for rows, columns in self.strips], 1)

    def add_to_(self, y: Tensor, values: Tensor) -> None:
        """Add `values` "c r" to each image, in place."""
        parts = [y[:, :, rows, columns] for rows, columns in self.strips]
        for part, added in zip(parts, values.to(y.dtype).split([part[0, 0].numel() for part in parts], 1)):
            part += added.unflatten(1, part.shape[2:])

    def add_(self, y: Tensor, values: Tensor) -> Tensor:
        """The same, differentiable."""
        if not torch.compiler.is_compiling():
            return _AddRing.apply(y, values, self)
        return y + values.unflatten(1, y.shape[2:]).to(y.dtype)


class _AddRing(torch.autograd.Function):
    """Adds values "c r" to the pixels of a ring, in place: the inside is neither read nor written."""

    @staticmethod
    def forward(y: Tensor, values: Tensor, ring: _Ring) -> Tensor:
        ring.add_to_(y, values)
        return y

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])
        ctx.ring, ctx.dtype = inputs[2], inputs[1].dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.ring.read(grad).to(ctx.dtype), None


@lru_cache(maxsize=256)
def _ring(axes: tuple[Axis, Axis], size: Pair, device: torch.device, dtype: torch.dtype) -> _Ring | None:
    outside = _outside(axes, size)
    whole = outside.sum(2) == 0  # a rectangle, as the two axes know nothing of each other
    (top, bottom), (left, right) = (_ends(whole.any(axis).tolist()) for axis in (1, 0))
    middle = slice(top, bottom)
    strips = [(slice(0, top), slice(None)), (slice(bottom, None), slice(None))]
    strips += [(middle, slice(0, left)), (middle, slice(right, None))]
    strips = tuple(strip for strip in strips if outside[strip].numel())
    if not strips:
        return None
    taps = torch.cat([outside[strip].flatten(0, 1) for strip in strips])
    return _Ring(strips, taps.to(device, dtype), whole.numel())


def _outside(axes: tuple[Axis, Axis], size: Pair) -> Tensor:
    """1 where a tap of an output pixel reads padding, 0 where it reads the image: "h w taps"."""
    vertical, horizontal = axes
    image = F.pad(torch.zeros(1, *size), (horizontal.left, horizontal.right, vertical.left, vertical.right), value=1.0)
    rows = (size[0] + vertical.slack - 1) // vertical.stride + 1
    taps, dilation, stride = zip(*((axis.taps, axis.dilation, axis.stride) for axis in axes))
    return F.unfold(image, taps, dilation, stride=stride).T.unflatten(0, (rows, -1))


def _ends(whole: list[bool]) -> Pair:
    """Where the true ones begin and end."""
    return (whole.index(True), len(whole) - whole[::-1].index(True)) if any(whole) else (len(whole), len(whole))
