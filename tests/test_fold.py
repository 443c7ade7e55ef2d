"""`fold`: the rule of every layer, trees of them drawn at random, and what is refused."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import dbb
from dbb import Affine, BiasPad, Concat, IdentityBasedConv1x1, Parallel, fold, randomize_norms_, rule
from dbb.fold import FEW_NUMBERS, RULES, fold_shape
from dbb.layers import WindowMean
from dbb.transforms import (
    transform_1_conv_norm,
    transform_2_branch_addition,
    transform_3_sequential_convs,
    transform_4_depth_concatenation,
    transform_5_average_pooling,
    transform_6_multi_scale,
)
from tests.support import assert_folds, assert_same, image

# One rule a layer

LAYERS = {
    "conv": nn.Conv2d(4, 6, 3),
    "conv, all arguments": nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 3), (1, 2), 2, bias=False),
    "conv, same": nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)),
    "conv, valid": nn.Conv2d(4, 6, 3, padding="valid", padding_mode="reflect"),
    "norm": nn.BatchNorm2d(4),
    "norm, no affine": nn.BatchNorm2d(4, affine=False, eps=0.1),
    "sync norm": nn.SyncBatchNorm(4),
    "pool": nn.AvgPool2d(3),
    "pool, all arguments": nn.AvgPool2d((4, 3), (1, 2), (2, 1)),
    "pool, divisor": nn.AvgPool2d(2, 1, divisor_override=3),
    "pool, padding not counted but none": nn.AvgPool2d(2, 1, count_include_pad=False),
    "window mean": WindowMean((3, 2), (1, 2), ((1, 0), (2, 5)), (2, 3)),
    "zero pad": nn.ZeroPad2d((1, -2, 0, 3)),
    "identity": nn.Identity(),
    "identity-based": IdentityBasedConv1x1(4, 2),
    "empty": nn.Sequential(),
    "conv norm": nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)),
    "pool norm": nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4)),
    "parallel": Parallel(nn.Conv2d(4, 4, 3, padding=1), nn.Identity(), nn.AvgPool2d(3, 1, 1)),
    "concat": Concat({"a": nn.Conv2d(4, 4, 3, padding=1, groups=4), "b": nn.Identity(), "c": nn.AvgPool2d(3, 1, 1)}),
    "bias pad": BiasPad(nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)), ((1, 2), (3, 0))),
    "bias pad, wide prefix": BiasPad(nn.Conv2d(4, 6, 3, 2, padding=2), (1, 2)),
    "bias pad, no bias": BiasPad(nn.Conv2d(4, 6, 1, bias=False), 1),
    "bias pad, cropping": BiasPad(nn.Conv2d(4, 6, 3), ((-1, 0), (-2, -1))),
    "bias pad of a tree": BiasPad(Parallel(nn.Conv2d(4, 4, 1), nn.Identity()), 1),
    "nested": nn.Sequential(
        BiasPad(nn.Sequential(IdentityBasedConv1x1(4), nn.BatchNorm2d(4)), 1),
        Parallel(nn.Conv2d(4, 6, 3, groups=2), nn.Sequential(nn.AvgPool2d(3, 1), nn.Conv2d(4, 6, 1, groups=2))),
        nn.BatchNorm2d(6),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    layer = randomize_norms_(copy.deepcopy(LAYERS[name]))
    for parameter in layer.parameters():
        if parameter.dim() == 4:
            nn.init.normal_(parameter)
    for size in ((13, 14), (14, 17)):
        assert_folds(layer, image(4, *size))


def test_no_affine_norm_has_scale_one():
    norm = nn.BatchNorm2d(3, affine=False).double()
    norm.running_var.fill_(4.0)
    assert torch.allclose(
        fold(norm).weight.flatten(), torch.full((3,), (4 + 1e-5) ** -0.5, dtype=torch.float64), atol=0
    )
    assert_same(fold(norm).bias, torch.zeros(3, dtype=torch.float64), 1.0)


def test_fold_is_float64_and_differentiable():
    layer = nn.Sequential(nn.Conv2d(2, 3, 1).half(), nn.BatchNorm2d(3).half())
    folded = fold(layer)
    assert folded.weight.dtype == folded.bias.dtype == torch.float64
    (folded.weight.sum() + folded.bias.sum()).backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_fold_in_training_mode_uses_running_statistics():
    layer = randomize_norms_(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    assert torch.equal(fold(layer.train()).weight, fold(layer.eval()).weight)


@pytest.mark.parametrize("few", [0, FEW_NUMBERS], ids=["many numbers", "few numbers"])
def test_fold_shape_changes_nothing(few, monkeypatch):
    monkeypatch.setattr(sys.modules["dbb.fold"], "FEW_NUMBERS", few)
    layer = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = copy.deepcopy(layer.state_dict())
    shape = fold_shape(layer)
    assert shape.weight.shape == (3, 2, 3, 3) and not shape.weight.requires_grad
    assert shape.weight.device.type == ("cpu" if few else "meta")
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_fold_shape_of_a_large_module_computes_nothing():
    wide = nn.Sequential(nn.Conv2d(1, 2**20, 1), nn.Conv2d(2**20, 1, 1))
    assert fold_shape(wide).weight.device.type == "meta"


def test_a_rule_of_ones_own():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x * self.weight[:, None, None]

    with pytest.raises(ValueError, match=r"Scale has no rule: if it is linear .* register one with @dbb.rule\(Scale\)"):
        fold(Scale())
    try:
        rule(Scale)(lambda layer: dbb.affine.scaling(layer.weight.double()))
        assert_folds(nn.Sequential(Scale(), nn.Conv2d(4, 4, 3, padding=1)), image(4))
    finally:
        RULES.pop(Scale, None)


def test_subclasses_that_keep_forward_are_folded():
    class Named(nn.Conv2d):
        pass

    assert_folds(Named(4, 4, 3), image(4))
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    assert_folds(parametrized, image(4))


# The paper's transforms


def test_transforms():
    x = image(4)
    conv, norm = nn.Conv2d(4, 6, 3, padding=1).double(), randomize_norms_(nn.BatchNorm2d(6)).double().eval()
    other, point = nn.Conv2d(4, 6, 3, padding=1, groups=2).double(), nn.Conv2d(4, 4, 1, bias=False).double()
    pool = nn.AvgPool2d(3, 2, 1)
    for folded, wanted in {
        transform_1_conv_norm(conv, norm): norm(conv(x)),
        transform_2_branch_addition(conv, other, conv): 2 * conv(x) + other(x),
        transform_3_sequential_convs(point, conv): conv(point(x)),
        transform_4_depth_concatenation(conv, other): torch.cat([conv(x), other(x)], 1),
        transform_5_average_pooling(4, 3, 2, 1): pool(x),
        transform_6_multi_scale(conv, 5): conv(x),
        transform_6_multi_scale(point, (3, 1)): point(x),
    }.items():
        assert_same(folded(x), wanted, 1 + folded.abs()(x.abs()))
    assert transform_6_multi_scale(conv, 5).kernel_size == (5, 5)
    dilated = transform_6_multi_scale(nn.Conv2d(4, 4, 3, padding=2, dilation=2), 5)
    assert (dilated.kernel_size, dilated.dilation, dilated.padding) == ((5, 5), (2, 2), ((4, 4), (4, 4)))
    assert transform_5_average_pooling(4, 3).groups == 4


# Trees drawn at random

SIZES = st.integers(1, 3)
SHORT = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def conv(draw, inputs, outputs, stride, slack, bias=True):
    """A convolution with given stride and `padding - reach`, so that it may stand beside others."""
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if inputs % g == 0 and outputs % g == 0]))
    kernel, dilation = (draw(SIZES), draw(SIZES)), (draw(SIZES), draw(SIZES))
    around = []
    for axis in (1, 0):  # ZeroPad2d counts from the last dimension
        total = slack[axis] + dilation[axis] * (kernel[axis] - 1)
        before = draw(st.integers(min(0, total), max(0, total)))
        around += [before, total - before]
    layer = nn.Conv2d(inputs, outputs, kernel, stride, 0, dilation, groups, bias=bias)
    return nn.Sequential(nn.ZeroPad2d(tuple(around)), layer)


@st.composite
def tree(draw, inputs, outputs, stride=(1, 1), slack=(0, 0), depth=3):
    """A tree of layers with given channels, stride and `padding - reach`."""
    kinds = ["conv", "conv norm", *(["sequence", "border", "parallel", "concat", "pool"] if depth else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "conv":
        return draw(conv(inputs, outputs, stride, slack, bias=draw(st.booleans())))
    if kind == "conv norm":
        return nn.Sequential(draw(conv(inputs, outputs, stride, slack)), nn.BatchNorm2d(outputs))
    if kind == "parallel":
        return Parallel(
            *[draw(tree(inputs, outputs, stride, slack, depth - 1)) for _ in range(draw(st.integers(1, 3)))]
        )
    if kind == "concat":
        half = outputs // 2
        widths = [half, outputs - half] if half else [outputs]
        return Concat(*[draw(tree(inputs, width, stride, slack, depth - 1)) for width in widths])
    middle = draw(st.sampled_from([2, 4]))
    if kind == "border":  # pointwise prefix, its border, then anything unpadded
        prefix = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=draw(st.booleans())), nn.BatchNorm2d(middle))
        kernel = (draw(SIZES), draw(SIZES))
        total = [s + k - 1 for s, k in zip(slack, kernel)]
        before = [draw(st.integers(min(0, t), max(0, t))) for t in total]
        padding = tuple((b, t - b) for b, t in zip(before, total))
        return nn.Sequential(BiasPad(prefix, padding), nn.Conv2d(middle, outputs, kernel, stride))
    if kind == "pool":
        kernel = (draw(SIZES), draw(SIZES))
        pool = nn.AvgPool2d(kernel, draw(SIZES), divisor_override=draw(st.sampled_from([None, 5])))
        steps = (pool.stride, pool.stride)
        if any(s % p for s, p in zip(stride, steps)):
            pool = nn.AvgPool2d(kernel, 1)
            steps = (1, 1)
        rest = tuple(s // p for s, p in zip(stride, steps))
        inner = tuple(s + k - 1 for s, k in zip(slack, kernel))  # what the convolution in front has to bring
        first = draw(conv(inputs, outputs, (1, 1), inner))
        return nn.Sequential(first, pool, nn.Conv2d(outputs, outputs, 1, rest), nn.BatchNorm2d(outputs))
    first_stride = stride if draw(st.booleans()) else (1, 1)
    then_stride = (1, 1) if first_stride == stride else stride
    kernel = (draw(SIZES), draw(SIZES))
    needed = tuple(s + f * (k - 1) for s, f, k in zip(slack, first_stride, kernel))
    first = draw(tree(inputs, middle, first_stride, needed, depth - 1))
    return nn.Sequential(first, nn.Conv2d(middle, outputs, kernel, then_stride))


@SHORT
@given(st.data())
def test_random_trees_fold_exactly(data):
    stride = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 3)]))
    slack = data.draw(st.sampled_from([(0, 0), (-2, 1), (2, -1), (3, 3)]))
    module = randomize_norms_(data.draw(tree(4, 4, stride, slack)))
    assert_folds(module, image(4, data.draw(st.integers(19, 22)), 23, batch=1))


LAYER = st.one_of(
    st.builds(
        lambda k, s, p, d, g, bias: nn.Conv2d(4, 4, k, s, p, d, g, bias=bias),
        st.tuples(SIZES, SIZES), SIZES, st.tuples(st.integers(0, 3), st.integers(0, 3)), SIZES,
        st.sampled_from([1, 2, 4]), st.booleans(),
    ),
    st.builds(lambda k, s: nn.AvgPool2d(k, s, k // 2), SIZES, SIZES),
    st.builds(lambda: nn.BatchNorm2d(4)),
    st.builds(lambda: nn.Identity()),
    st.builds(lambda p: nn.ZeroPad2d(tuple(p)), st.lists(st.integers(-1, 2), min_size=4, max_size=4)),
)  # fmt: skip


@SHORT
@given(st.lists(LAYER, min_size=1, max_size=4))
def test_any_sequence_is_refused_or_exact(layers):
    """Padding anywhere: whatever is not refused is exact, border included."""
    module = randomize_norms_(nn.Sequential(*layers)).double().eval()
    x = image(4, 33, 30, batch=1)
    try:
        fold(module)
    except ValueError as error:
        assert "cannot fold a map with padding" in str(error)
        return
    try:
        module(x)
    except RuntimeError:  # strides have eaten the image
        return
    assert_folds(module, x)


@SHORT
@given(st.lists(LAYER, min_size=2, max_size=3))
def test_any_sum_is_refused_or_exact(layers):
    module = randomize_norms_(Parallel(*layers)).double().eval()
    try:
        fold(module)
    except ValueError as error:
        assert "cannot lay maps over each other" in str(error)
        with torch.no_grad():  # the refusal is right: for some size the outputs cannot be added
            assert not all(adds_up(module, size) for size in range(24, 30))
        return
    for size in (24, 25, 27):
        assert_folds(module, image(4, size, size + 3, batch=1))


def adds_up(module: nn.Module, size: int) -> bool:
    shapes = {branch(image(4, size, size + 1, batch=1)).shape for branch in module.children()}
    strides = {getattr(branch, "stride", 1) for branch in module.children()}
    return len(shapes) == 1 and len({dbb.affine.pair(s) for s in strides}) == 1


# What is refused


class Shifted(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def patched() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3)
    layer.forward = lambda x: x
    return layer


REFUSED = {
    "ReLU has no rule: .*fold what lies on either side": lambda: nn.ReLU(),
    "MaxPool2d has no rule": lambda: nn.MaxPool2d(2),
    "ConvTranspose2d has no rule": lambda: nn.ConvTranspose2d(4, 4, 2),
    "1: 0: ReLU has no rule": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU())),
    "left: ReLU has no rule": lambda: Parallel({"left": nn.ReLU(), "right": nn.Identity()}),
    "prefix: Tanh has no rule": lambda: nn.Sequential(BiasPadUnchecked(nn.Tanh())),
    "track_running_stats=False depends on the batch even in eval": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "ceil_mode=True": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    r"count_include_pad=False with padding=1": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "padding_mode='circular' is not the zero padding": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "Shifted is a Conv2d with a forward of its own": lambda: Shifted(4, 4, 3),
    "Standardised is a Conv2d with a _conv_forward of its own": lambda: Standardised(4, 4, 3),
    "Conv2d is a Conv2d with a forward of its own": patched,
    "1: cannot fold a map with padding=.*behind one with a bias": lambda: nn.Sequential(
        nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
    ),
}


class BiasPadUnchecked(BiasPad):
    def __init__(self, prefix):
        super().__init__(nn.Identity(), 1)
        self.prefix = prefix


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        fold(REFUSED[message]())


@pytest.mark.parametrize("kernel_size", [2, 4, 1, (3, 4)])
def test_a_kernel_has_a_middle_only_among_equal_parity(kernel_size):
    with pytest.raises(ValueError, match="it needs an even number of taps more, half on each side"):
        transform_6_multi_scale(nn.Conv2d(4, 4, 3), kernel_size)


def test_synchronised_norms_know_no_batch_border(monkeypatch):
    layer = BiasPad(nn.Sequential(nn.Conv2d(2, 2, 1), nn.SyncBatchNorm(2)), 1, border="batch")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="knows the statistics of one process"):
        layer(torch.randn(2, 2, 4, 4))


def test_affine_is_what_fold_returns():
    assert isinstance(fold(nn.Identity()), Affine)
