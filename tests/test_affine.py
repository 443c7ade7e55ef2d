"""The algebra: every operator says of kernels what it says of functions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from dbb.affine import Affine, Axis, align, average, concat, direct_sum, identity, pair, scaling, sides, zero_pad
from tests.support import assert_same, image, random_affine


def same(a: Affine, function, x: torch.Tensor) -> None:
    assert_same(a(x), function(x), 1 + a.abs()(x.abs()))


def test_arguments_take_one_form():
    assert pair(3) == (3, 3)
    assert pair((2, 5)) == (2, 5)
    assert sides(1) == ((1, 1), (1, 1))
    assert sides((1, 2)) == ((1, 1), (2, 2))
    assert sides(((0, 1), (2, 3))) == ((0, 1), (2, 3))
    a = Affine(torch.ones(2, 1, 3, 1), stride=2, padding=(1, 0), dilation=3, groups=2)
    assert (a.stride, a.padding, a.dilation) == ((2, 2), ((1, 1), (0, 0)), (3, 3))
    assert (a.in_channels, a.out_channels, a.kernel_size) == (2, 2, (3, 1))
    assert "2 1 3 1" in repr(a) and "no bias" in repr(a) and "stride=(2, 2)" in repr(a)


def test_a_map_is_a_value():
    a = random_affine(2, 2, (3, 3))
    with pytest.raises(AttributeError):
        a.bias = None
    with pytest.raises(AttributeError):
        a.axes[0].taps = 4
    assert a == a and a != random_affine(2, 2, (3, 3)) and len({a, a}) == 1  # one tensor is never compared with another


def test_axis_geometry():
    axis = Axis(taps=3, stride=2, left=1, right=2, dilation=4)
    assert (axis.reach, axis.slack, axis.steps) == (8, -5, [4])
    assert Axis(1, 2, 0, 0, 4).steps == []
    assert axis.widened(3, 4) == Axis(taps=7, stride=2, left=3, right=4, dilation=2)
    assert axis.widened(3, 4, [1]).taps == 13
    assert axis.then(Axis(3, 3, 1, 0, 1)) == Axis(taps=7, stride=6, left=3, right=2, dilation=2)


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"padding": ((2, -1), (-1, 3)), "dilation": 2}])
def test_reads_are_the_pixels_that_an_output_depends_on(geometry):
    a, x = random_affine(1, 1, (3, 2), **geometry), image(1).requires_grad_()
    a(x)[0, 0, 1, 2].backward()
    rows, columns = (axis.reads(t) for axis, t in zip(a.axes, (1, 2)))
    read = [[y, z] for y in rows for z in columns if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]]
    assert x.grad[0, 0].nonzero().tolist() == read != []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride, padding, dilation, groups", [(1, 0, 1, 1), ((2, 1), (1, 3), (1, 2), 2), (3, 2, 3, 4)])
def test_affine_is_conv2d(stride, padding, dilation, groups, bias):
    a = random_affine(
        8, 8 // groups, (3, 2), groups=groups, bias=bias, stride=stride, padding=padding, dilation=dilation
    )
    conv = nn.Conv2d(8, 8, (3, 2), stride, padding, dilation, groups, bias=bias, dtype=torch.float64)
    conv.weight.data, conv.bias = a.weight, nn.Parameter(a.bias) if bias else None
    same(a, conv, image(8))


STRIDES, DILATIONS = [1, 2, (1, 3)], [1, 2, (3, 1)]


@pytest.mark.parametrize("groups", [(1, 1), (2, 4), (4, 2), (2, 3), (12, 12), (12, 1), (3, 3)])
@pytest.mark.parametrize("kernels", [((1, 1), (3, 3)), ((3, 3), (1, 1)), ((3, 2), (2, 3)), ((1, 4), (3, 1))])
def test_sequence(groups, kernels):
    """Unpadded second map: any bias, any geometry."""
    for (sa, sb), (da, db) in itertools.product(
        itertools.product(STRIDES, STRIDES), itertools.product(DILATIONS, DILATIONS)
    ):
        a = random_affine(
            12, 12 // groups[0], kernels[0], groups=groups[0], stride=sa, dilation=da, padding=((1, 2), (2, 0))
        )
        b = random_affine(24, 12 // groups[1], kernels[1], groups=groups[1], stride=sb, dilation=db)
        x = image(12, 25, 31, batch=1)
        same(a >> b, lambda x, a=a, b=b: b(a(x)), x)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)])
def test_sequence_with_a_padded_second_map(kernel, stride, dilation):
    """Exact where the first map has no bias and has seen every window that touches the image."""
    enough = tuple(dilation * (k - 1) for k in kernel)
    for size in (11, 12, 13, 14):
        a = random_affine(4, 3, kernel, bias=False, stride=stride, dilation=dilation, padding=enough)
        b = random_affine(5, 4, (3, 3), stride=2, padding=((1, 2), (0, 3)))
        same(a >> b, lambda x, a=a, b=b: b(a(x)), image(3, size, size + 5))


def test_sequence_with_a_cropping_second_map():
    a = random_affine(4, 3, (3, 3), stride=2, padding=1)
    b = random_affine(5, 4, (2, 2), padding=((-1, -2), (0, -1)))
    for size in (13, 14):
        same(a >> b, lambda x: b(a(x)), image(3, size, size))


def test_two_pointwise_maps_have_no_dilation():
    a = random_affine(3, 2, (1, 1), dilation=3) >> random_affine(4, 3, (1, 1), dilation=2)
    assert (a.kernel_size, a.dilation) == ((1, 1), (1, 1))


def test_dilated_kernel_after_pointwise_stays_small():
    a = random_affine(4, 3, (1, 1)) >> random_affine(4, 4, (3, 3), dilation=2)
    assert (a.kernel_size, a.dilation) == ((3, 3), (2, 2))
    a = random_affine(4, 3, (3, 3), dilation=2) >> random_affine(4, 4, (1, 1), dilation=5)
    assert (a.kernel_size, a.dilation) == ((3, 3), (2, 2))
    a = random_affine(4, 3, (3, 3), dilation=4, stride=2) >> random_affine(4, 4, (3, 3), dilation=3)
    assert (a.kernel_size, a.dilation) == ((11, 11), (2, 2))


def test_sum_keeps_groups_in_common():
    a = random_affine(12, 3, (3, 3), groups=4, padding=1)
    b = random_affine(12, 2, (1, 1), groups=6, bias=False)
    both = a + b
    assert both.groups == 2
    same(both, lambda x: a(x) + b(x), image(12))
    assert (a + a).groups == 4


SUMMANDS = [
    # kernel, padding, dilation: all with padding - reach of (0, 0), or all of (-2, -2)
    [
        ((3, 3), 1, 1),
        ((1, 1), 0, 1),
        ((3, 1), (1, 0), 1),
        ((5, 5), 2, 1),
        ((3, 3), 2, 2),
        ((2, 2), ((0, 1), (1, 0)), 1),
    ],
    [((3, 3), 0, 1), ((1, 1), -1, 1), ((2, 2), ((0, -1), (-1, 0)), 1), ((1, 1), ((0, -2), (-2, 0)), 1), ((3, 3), 1, 2)],
    [((1, 1), ((0, -2), (0, -2)), 1), ((1, 1), -1, 7), ((2, 2), ((0, 0), (0, 0)), 2)],
    [((1, 1), ((3, 0), (3, 0)), 1), ((1, 1), ((0, 3), (0, 3)), 1), ((3, 3), ((6, 9), (9, 6)), 6)],
]


@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("family", SUMMANDS)
def test_sum_and_concat_place_kernels(family, stride):
    maps = [random_affine(4, 3, k, stride=stride, padding=p, dilation=d) for k, p, d in family]
    for size in (12, 13):
        x = image(3, size, size + 4)
        for a, b in itertools.permutations(maps, 2):
            same(a + b, lambda x, a=a, b=b: a(x) + b(x), x)
        same(concat(*maps), lambda x: torch.cat([m(x) for m in maps], 1), x)
        for aligned, m in zip(align(*maps), maps):
            same(aligned, m, x)


def test_common_grid_is_the_coarsest():
    a, b = random_affine(2, 2, (3, 3), dilation=2, padding=2), random_affine(2, 2, (1, 1))
    assert ((a + b).kernel_size, (a + b).dilation) == ((3, 3), (2, 2))
    c = random_affine(2, 2, (3, 3), dilation=3, padding=3)
    assert ((a + c).kernel_size, (a + c).dilation) == ((7, 7), (1, 1))


def test_concat_of_grouped_maps_is_dense():
    a, b = random_affine(4, 2, (3, 3), groups=2, padding=1), random_affine(6, 4, (1, 1), bias=False)
    both = concat(a, b, identity())
    assert (both.groups, both.out_channels) == (1, 14)
    same(both, lambda x: torch.cat([a(x), b(x), x], 1), image(4))
    assert concat(b, b).bias is None


def test_direct_sum():
    a = random_affine(6, 2, (3, 3), groups=3, padding=1, bias=False)
    assert a.split()[0].groups == 1
    again = direct_sum(*a.split())
    assert again.groups == 3 and again.bias is None and torch.equal(again.weight, a.weight)
    c = random_affine(6, 2, (3, 3), groups=3, padding=1)
    assert torch.equal(direct_sum(*c.split()).bias, c.bias)
    b = random_affine(5, 4, (1, 1))
    mixed = direct_sum(a, b)
    assert (mixed.groups, mixed.in_channels, mixed.out_channels) == (1, 10, 11)
    same(mixed, lambda x: torch.cat([a(x[:, :6]), b(x[:, 6:])], 1), image(10))
    assert direct_sum(a, random_affine(2, 2, (3, 3), padding=1)).groups == 4
    assert torch.equal(direct_sum(a).weight, a.weight) and direct_sum(a).groups == a.groups


def test_direct_sum_of_slices_of_other_widths():
    a, b = random_affine(2, 1, (3, 3)), random_affine(2, 3, (3, 3))
    both, x = direct_sum(a, b), image(4)
    assert both.groups == 1 and both.weight.shape == (4, 4, 3, 3)
    assert_same(both(x), torch.cat([a(x[:, :1]), b(x[:, 1:])], 1), 1 + both.abs()(x.abs()))


def test_grouped_pointwise_then_kernel_is_a_direct_sum_of_merges():
    first, second = random_affine(8, 3, (1, 1), groups=2), random_affine(6, 4, (3, 3), groups=2)
    merges = [a >> b for a, b in zip(first.split(), second.split())]
    whole, parts = first >> second, direct_sum(*merges)
    assert whole.groups == parts.groups == 2
    assert_same(parts.weight, whole.weight, 1 + whole.weight.abs())
    assert_same(parts.bias, whole.bias, 1 + whole.bias.abs())


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_regroup_changes_nothing(groups):
    a = random_affine(12, 2, (3, 2), groups=6)
    assert a.regroup(groups).groups == groups
    same(a.regroup(groups), a, image(12))


def test_constants():
    x = image(5)
    assert torch.equal(identity()(x), x)
    same(zero_pad(((1, 2), (-3, 0))), lambda x: nn.functional.pad(x, (-3, 0, 1, 2)), x)
    scale, shift = torch.randn(2, 5, dtype=torch.float64)
    same(scaling(scale, shift), lambda x: x * scale[:, None, None] + shift[:, None, None], x)
    same(average((3, 2), 2, (1, 0)), nn.AvgPool2d((3, 2), 2, (1, 0)), x)
    same(average(3, divisor=4), nn.AvgPool2d(3, 1, divisor_override=4), x)


def test_channelwise_maps_take_the_channels_they_meet():
    pool, x = average(3, padding=1), image(4)
    unpadded = random_affine(6, 2, (3, 3), groups=2)
    same(pool >> unpadded, lambda x: unpadded(pool(x)), x)
    same(unpadded >> average(2), lambda x: average(2)(unpadded(x)), x)
    square = random_affine(4, 4, (3, 3), padding=1)
    same(square + identity(), lambda x: square(x) + x, x)
    same(pool + square, lambda x: square(x) + pool(x), x)
    both = pool + identity() >> zero_pad(0)
    assert both.groups is None and both.in_channels is None and both.out_channels is None
    same(both, lambda x: pool(x) + x, x)
    assert pool.on(3).groups == 3
    assert pool.on(3, like=torch.zeros(1)).weight.dtype == torch.float32


def test_constant_response():
    a = random_affine(6, 2, (3, 3), groups=2)
    value = torch.randn(4, dtype=torch.float64)
    x = value[None, :, None, None].expand(1, 4, 9, 9)
    assert_same(a.constant_response(value), a(x)[0, :, 4, 4], 1 + a.abs()(x.abs())[0, :, 4, 4])
    assert a.constant_response(None) is a.bias
    assert average(3).constant_response(None) is None
    assert_same(average(3).constant_response(value), value, 1.0)


def test_symmetric_and_to_conv2d():
    for padding, stride in [(((0, 1), (0, 1)), 2), (((-1, -1), (2, 0)), 1), (((0, 1), (1, 2)), 1)]:
        a = random_affine(4, 3, (2, 4), stride=stride, padding=padding, bias=False)
        x = image(3)
        same(a.symmetric(), a, x)
        assert all(left == right >= 0 for left, right in a.symmetric().padding)
        assert_same(a.to_conv2d()(x), a(x), 1 + a.abs()(x.abs()))
    for kernel, padding in [((2, 4), ((0, 1), (1, 2))), ((2, 3), ((0, 1), (1, 1)))]:
        same_padding = random_affine(4, 3, kernel, padding=padding)
        assert same_padding.to_conv2d().padding == "same"
        assert same_padding.to_conv2d().kernel_size == kernel


def test_to_conv2d_owns_its_parameters():
    a = random_affine(4, 3, (3, 3))
    conv = a.to_conv2d()
    conv.weight.data.zero_()
    conv.bias.data.zero_()
    assert a.weight.abs().min() > 0 and a.bias.abs().min() > 0
    assert type(conv) is nn.Conv2d


def test_widened():
    a = random_affine(4, 3, (3, 1), padding=(1, 0), dilation=2)
    wide = a.widened((3, 2))
    assert (wide.kernel_size, wide.dilation) == ((5, 3), (2, 2))
    same(wide, a, image(3))
    assert a.widened((3, 2), dilation=1).kernel_size == (9, 5)
    assert torch.equal(a.widened(a.padding).weight, a.weight)


def test_laws():
    """`>>` is associative and distributes over `+` from the right of an unpadded map."""
    a, b, c = (random_affine(4, 4, k, bias=False) for k in ((1, 1), (3, 2), (2, 2)))
    d = random_affine(4, 4, (3, 2))
    for left, right in [((a >> b) >> c, a >> (b >> c)), (a >> (b + d), (a >> b) + (a >> d)), (b + d, d + b)]:
        assert_same(left.weight, right.weight, 1 + left.weight.abs())
        assert (left.stride, left.padding, left.dilation, left.groups) == (
            right.stride,
            right.padding,
            right.dilation,
            right.groups,
        )


def test_everything_is_differentiable():
    a, b = random_affine(4, 2, (1, 1), groups=2), random_affine(4, 4, (3, 3))
    leaves = [t.requires_grad_() for t in (a.weight, a.bias, b.weight, b.bias)]
    torch.autograd.gradcheck(lambda wa, ba, wb, bb: (Affine(wa, ba, groups=2) >> Affine(wb, bb)).weight, leaves)
    torch.autograd.gradcheck(lambda wa, ba, wb, bb: (Affine(wa, ba, groups=2) >> Affine(wb, bb)).bias, leaves)
    torch.autograd.gradcheck(
        lambda wa, ba, wb, bb: (Affine(wa, ba, groups=2) + Affine(wb, bb, padding=1)).weight, leaves
    )


W = torch.ones(4, 2, 3, 3)
REFUSED = {
    "weight has shape .*needs \\(out, in / groups, kh, kw\\)": lambda: Affine(torch.ones(2, 2)),
    "a channelwise map has one kernel": lambda: Affine(W, groups=None),
    "groups=3 must divide the 4 output channels": lambda: Affine(W, groups=3),
    "groups=0 must divide": lambda: Affine(W, groups=0),
    "bias has shape \\(3,\\)": lambda: Affine(W, torch.ones(3)),
    "answers 4 channels and a map that reads 2": lambda: Affine(W) >> Affine(W),
    "behind one with a bias": lambda: Affine(W, torch.ones(4)) >> Affine(torch.ones(1, 4, 3, 3), padding=1),
    "zeros would stand where its windows still touch": lambda: Affine(W) >> Affine(torch.ones(1, 4, 3, 3), padding=1),
    "pad the first map by dilation \\* \\(kernel - 1\\) = 4": lambda: (
        Affine(W, padding=3, dilation=2) >> Affine(torch.ones(1, 4, 3, 3), padding=((0, 0), (0, 1)))
    ),
    "cannot add a map 2 -> 4 channels and a map 4 -> 4": lambda: Affine(W) + Affine(W, groups=2),
    "whose stride is \\(1, 1\\) and \\(2, 2\\)": lambda: Affine(W) + Affine(W, stride=2),
    "whose padding - dilation \\* \\(kernel - 1\\) is \\(-2, -2\\) and \\(0, 0\\)": lambda: (
        Affine(W) + Affine(W, padding=1)
    ),
    "cannot stack channelwise maps alone": lambda: concat(average(3), identity()),
    "cannot stack maps that read \\[2, 4\\] channels": lambda: concat(Affine(W), Affine(W, groups=2)),
    "to a channelwise map: choose its channels": lambda: direct_sum(Affine(W), average(3)),
    "cannot write groups=1 as 2 groups": lambda: Affine(W).regroup(2),
    "cannot write groups=None as 1 groups": lambda: average(3).regroup(1),
    "cannot widen padding \\(1, 1\\) to \\(0, 1\\)": lambda: Affine(W, padding=1).widened(((0, 1), (1, 1))),
    "cannot widen padding \\(1, 1\\) to \\(1, 0\\)": lambda: Affine(W, padding=1).widened(((1, 0), (1, 1))),
    "a channelwise map fits any number of channels": lambda: average(3).to_conv2d(),
}


@pytest.mark.parametrize("message", REFUSED, ids=lambda pattern: pattern.replace("\\", ""))
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
