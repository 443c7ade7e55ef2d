"""Fewer channels: the proximal step is one, decay is decay, and what is removed was nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dbb
from dbb.ablation import VARIANTS
from dbb.blocks import BLOCKS, block_type
from dbb.models import build_model
from dbb.prune import channel_sizes, decay_merged_, last_norms, merged_decay, remove_channels, shrink_channels_
from tests.support import image


def block_of(kind: str = "dbb", channels: int = 4, **options) -> dbb.BranchBlock:
    torch.manual_seed(0)
    return dbb.randomize_norms_(block_type(kind)(channels, channels, 3, padding=1, **options)).double().eval()


def maps(block: dbb.BranchBlock, group: str) -> list[dbb.Affine]:
    return [block.equivalent()] if group == "merged" else list(block.branches.fold_branches())


# The proximal step


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("group", ["merged", "branches"])
def test_every_channel_shrinks_by_the_amount_or_to_zero(kind, group):
    block = block_of(kind)
    before = maps(block, group)
    amount = channel_sizes(before[0]).sort().values[1:3].mean().item()  # between the second and the third
    shrink_channels_(block, amount, group)
    for old, new in zip(before, maps(block, group)):
        factor = (1 - amount / channel_sizes(old)).clamp_min(0)
        torch.testing.assert_close(channel_sizes(new), channel_sizes(old) * factor, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(new.weight, old.weight * factor[:, None, None, None], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(new.bias, old.bias * factor, rtol=1e-10, atol=1e-12)
    dead = channel_sizes(maps(block, group)[0]) == 0  # exactly
    assert dead.sum() == 2
    if group == "merged":
        assert (block(image(4))[:, dead] == 0).all() and (block(image(4))[:, ~dead] != 0).any()


def test_it_is_the_proximal_step():
    """The smallest of `|z - z0|^2 / 2 + amount * |z|`, against a search around it."""
    block, amount = block_of(), 0.3
    start = rows(block)
    shrink_channels_(block, amount)
    found = rows(block)
    cost = lambda z: (z - start).square().sum(1) / 2 + amount * z.norm(dim=1)  # noqa: E731
    for step in (1e-2, 1e-4):
        other = found + step * torch.randn(500, *found.shape, dtype=torch.float64)
        assert all((cost(one) >= cost(found)).all() for one in other)


def rows(block: dbb.BranchBlock) -> torch.Tensor:
    a = block.equivalent()
    return torch.cat([a.weight.flatten(1), a.bias[:, None]], 1).detach()


def test_branches_are_sparse_where_their_sum_is_not():
    block = block_of(channels=8)
    sizes = torch.stack([channel_sizes(a) for a in maps(block, "branches")])
    shrink_channels_(block, sizes.median().item(), "branches")
    gone = torch.stack([channel_sizes(a) == 0 for a in maps(block, "branches")])
    assert 0.4 < gone.double().mean() < 0.6
    assert torch.equal(channel_sizes(block.equivalent()) == 0, gone.all(0))
    assert gone.all(0).double().mean() < gone.double().mean() / 2


def test_whole_models_and_folded_blocks():
    model = dbb.randomize_norms_(build_model("digits_net", 10, "dbb", width=4))
    model[1].eval().switch_to_deploy()
    folded = copy.deepcopy(model[1].state_dict())
    shrink_channels_(model, 1e9)
    assert channel_sizes(model[0].equivalent()).max() == 0
    assert all(torch.equal(folded[name], tensor) for name, tensor in model[1].state_dict().items())


@pytest.mark.parametrize(
    "block, group, message",
    [
        (block_of(), "all", "group='all' is not known: choose from merged, branches"),
        (block_of("linear", **VARIANTS["kxk_1x1_linear"].get("block_options", {})), "merged", None),
        (dbb.BranchBlock({"a": nn.Conv2d(2, 2, 1)}), "merged", "the branch 'a' ends in Conv2d: .* scale and shift"),
        (dbb.BranchBlock({"a": nn.BatchNorm2d(2, affine=False)}), "branches", "the branch 'a' ends in BatchNorm2d"),
    ],
    ids=["group", "linear", "no norm", "no scale"],
)
def test_refused(block, group, message):
    if message is None:  # one branch, whose norm stands behind a sum
        shrink_channels_(block, 1e9, group)
        assert channel_sizes(block.equivalent()).max() == 0
        return
    with pytest.raises(ValueError, match=message):
        shrink_channels_(block, 0.1, group)


# Decay


def test_of_one_branch_it_is_weight_decay():
    block = block_of("plain")
    before = block.branches["kxk"].conv.weight.detach().clone()
    decay_merged_(block, 0.1)
    torch.testing.assert_close(block.branches["kxk"].conv.weight.detach(), 0.9 * before, rtol=1e-10, atol=0)


def test_the_penalty_by_hand():
    """Of K x K and 1 x 1: the merged taps over the summed squares of both scales, as RepVGG's is of the centre."""
    block = block_of("dbb", branches=["kxk", "1x1"])
    t = [norm.weight / (norm.running_var + norm.eps).sqrt() for norm in last_norms(block)]
    big, small = (block.branches[name].conv.weight for name in ("kxk", "1x1"))
    merged = t[0][:, None, None, None] * big + nn.functional.pad(t[1][:, None, None, None] * small, (1, 1, 1, 1))
    wanted = (merged.square().sum((1, 2, 3)) / (t[0] ** 2 + t[1] ** 2)).sum() / 2
    torch.testing.assert_close(merged_decay(block), wanted)


@pytest.mark.parametrize("kind", BLOCKS)
def test_kernels_decay_and_nothing_else(kind):
    block = block_of(kind)
    before, penalty = copy.deepcopy(block.state_dict()), merged_decay(block).item()
    decay_merged_(block, 0.01)
    moved = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, p in block.named_parameters() if p.dim() > 1}
    assert merged_decay(block).item() < penalty
    assert all(p.grad is None and p.requires_grad for p in block.parameters())


def test_the_length_of_the_scales_does_not_count():
    block = block_of()
    before = merged_decay(block)
    for norm in last_norms(block):
        norm.weight.data *= 3
    torch.testing.assert_close(merged_decay(block), before)


# Removing


def sparse(model: nn.Module, share: float = 0.5, bias: float | None = 0.0) -> nn.Module:
    """With zero kernels in some channels of all layers but the last, and that bias there."""
    torch.manual_seed(3)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers[:-1]:
        dead = torch.rand(len(layer.weight)) < share
        layer.weight.data[dead] = 0
        if bias is not None and layer.bias is not None:
            layer.bias.data[dead] = bias
    return model.double().eval()


def row(padding: int = 1, pool: nn.Module | None = None, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=padding), act()),
        nn.Sequential(nn.Conv2d(8, 6, 3, stride=2, padding=padding, bias=False), act(), pool or nn.Identity()),
        nn.Conv2d(6, 5, 3, padding=padding),
        act(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 7),
        act(),
        nn.Linear(7, 4),
    )


@pytest.mark.parametrize(
    "model, bias",
    [
        (row(), 0.0),
        (row(), -0.7),  # ReLU answers zero to it
        (row(padding=0), 0.9),
        (row(padding=0, act=nn.Sigmoid), 0.3),
        (row(pool=nn.MaxPool2d(3, 2, 1)), 0.0),
        (row(padding=0, pool=nn.MaxPool2d(3, 1, 1)), 0.4),
        (row(padding=0, pool=nn.AvgPool2d(2)), 0.4),
    ],
    ids=["zero", "negative", "constant", "sigmoid", "max pool", "constant through max pool", "through average pool"],
)
def test_what_is_removed_was_nothing(model, bias):
    model, x = sparse(model, bias=bias), image(3)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    wanted = [max(1, int((m.weight != 0).flatten(1).any(1).sum())) for m in layers]
    state = copy.deepcopy(model.state_dict())
    cut = remove_channels(model)
    dbb.assert_equivalent(model, cut, x)
    small = [m for m in cut if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [len(m.weight) for m in small] == wanted and sum(wanted) < sum(len(m.weight) for m in layers)
    for layer in small:
        sizes = (
            (layer.out_channels, layer.in_channels)
            if isinstance(layer, nn.Conv2d)
            else (layer.out_features, layer.in_features)
        )
        assert sizes == tuple(layer.weight.shape[:2])
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("pool", [nn.Identity(), nn.AvgPool2d(3, 1, 1)], ids=["padded convolution", "padded average"])
def test_a_constant_that_ends_at_the_border_stays(pool):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        pool,
        nn.Conv2d(8, 4, 3, padding=int(not isinstance(pool, nn.AvgPool2d))),
    )
    sparse(model, bias=0.8)
    cut = remove_channels(model)
    dbb.assert_equivalent(model, cut, image(3))
    assert cut[0].out_channels == 8
    model[0].bias.data[:] = -0.8  # now it is zero behind the activation
    assert remove_channels(model)[0].out_channels < 8


def test_a_dead_layer_keeps_one_channel():
    model = sparse(row(), share=1.0)
    cut = remove_channels(model)
    assert [len(m.weight) for m in cut if isinstance(m, (nn.Conv2d, nn.Linear))] == [1, 1, 1, 1, 4]
    dbb.assert_equivalent(model, cut, image(3))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), bias=st.sampled_from([None, 0.0, -1.0, 0.5]))
def test_any_network_answers_the_same(seed, share, bias):
    torch.manual_seed(seed)
    act = (nn.ReLU, nn.GELU, nn.Sigmoid, nn.LeakyReLU)[seed % 4]
    layers, channels = [], 3
    for _ in range(3):
        out = int(torch.randint(1, 6, ()))
        layers += [
            nn.Conv2d(channels, out, 3, padding=int(torch.randint(2, ())), bias=bool(torch.randint(2, ()))),
            act(),
        ]
        channels = out
    model = sparse(nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4)), 0.0)
    model(image(3, 9, 8))
    dbb.assert_equivalent(sparse(model, share, bias), remove_channels(model), image(3, 9, 8))


@pytest.mark.parametrize(
    "model, message",
    [
        (
            dbb.reparameterize(build_model("small_resnet", 10, width=4).eval()),
            "Residual is nothing that channels can be followed through",
        ),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "Conv2d is nothing .* give convolutions without groups"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), "Conv2d is nothing"),
        (build_model("digits_net", 10, "dbb"), "DiverseBranchBlock is nothing .* in a row and folded"),
    ],
    ids=["residual", "groups", "padding mode", "not folded"],
)
def test_what_is_no_row_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        remove_channels(model)


def test_from_the_step_to_the_smaller_network():
    model = dbb.randomize_norms_(build_model("digits_net", 10, "dbb", width=8)).double().eval()
    for block in model[:2]:
        sizes = channel_sizes(block.equivalent()).sort().values
        shrink_channels_(block, sizes[len(sizes) // 2 - 1 :][:2].mean().item())  # above one half, below the other
    folded = dbb.reparameterize(model)
    cut, x = remove_channels(folded), image(1, 8, 8, batch=1)
    dbb.assert_equivalent(model, cut, x)
    whole, small = (dbb.cost(net, x, 1e-3).folded for net in (folded, cut))
    assert [m.out_channels for m in cut if isinstance(m, nn.Conv2d)] == [4, 8]
    assert small.macs == 4 * 9 * 64 + 4 * 8 * 9 * 16 + 8 * 16 * 10 < whole.macs / 2
    assert small.parameters < whole.parameters / 2
