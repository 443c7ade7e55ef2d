"""Few bits: the codes are torchao's, those trained with are those deployed, and norms come back without a change."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dbb
from dbb.blocks import BLOCKS
from dbb.models import build_model
from dbb.quantize import (
    Grid,
    RoundedLayer,
    _no_word_on_enums,
    codes_of,
    convert_qat,
    crest,
    finetune,
    insert_norms,
    noise,
    post_training,
    prepare_qat,
    trained_codes,
)

pytestmark = pytest.mark.slow  # trains, and goes through the compilers

GRIDS = [Grid(8, True), Grid(8, False), Grid(3, True), Grid(2, False)]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.per_channel}")


def network(block: str = "dbb", name: str = "digits_net", **options) -> nn.Module:
    torch.manual_seed(0)
    return dbb.randomize_norms_(build_model(name, 10, block, **{"width": 4} | options)).eval()


def digits(number: int = 8, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.randn(number, channels, size, size, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, steps: int = 3, lr: float = 0.01) -> nn.Module:
    """After a few steps on noise."""
    x, y = digits(16), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.train().parameters(), lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


# The grid


@each_grid
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_codes_are_those_of_torchao(grid, seed, size):
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver

    weight = size * torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    weight[0] *= 10 ** (seed % 7 - 6)  # channels of other sizes, down to nothing
    weight[1] = -weight[1].abs()  # the end of the range on one side
    limits = {"dtype": torch.int8, "quant_min": grid.low, "quant_max": grid.high, "eps": 2**-12}
    if grid.per_channel:
        observer = PerChannelMinMaxObserver(qscheme=torch.per_channel_symmetric, **limits)
    else:
        observer = MinMaxObserver(qscheme=torch.per_tensor_symmetric, **limits)
    observer(weight)
    scale, zero = observer.calculate_qparams()
    ops = torch.ops.quantized_decomposed
    if grid.per_channel:
        theirs = ops.quantize_per_channel(weight, scale, zero, 0, grid.low, grid.high, torch.int8)
    else:
        theirs = ops.quantize_per_tensor(weight, scale.item(), 0, grid.low, grid.high, torch.int8)
    assert torch.equal(grid.codes(weight), theirs)
    assert torch.equal(grid.scale(weight).flatten(), scale)


@each_grid
def test_rounding_is_to_the_nearest_value_and_its_gradient_passes(grid):
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded, scale = grid.round(weight), grid.scale(weight)
    codes = rounded.detach() / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.min() > grid.low - 0.5 and codes.max() < grid.high + 0.5
    assert ((rounded - weight).abs() / scale).max() < 0.5 + 1e-4  # 127.5 steps, in float32, are the largest
    (gradient,) = torch.autograd.grad((rounded * 3).sum(), weight)
    assert (gradient == 3).all()


def test_the_noise_is_that_of_the_crest():
    """Mean square of the rounding over that of the weights: (largest / root mean square)^2 / (12 * 127.5^2)."""
    weight = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    for bits in (8, 6, 5):
        grid, crest = Grid(bits, False), weight.abs().max() / weight.square().mean().sqrt()
        noise = (grid.round(weight) - weight).square().mean() / weight.square().mean()
        assert noise / (crest / (2 ** (bits - 1) - 0.5)) ** 2 == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize("bits", [8, 5])
def test_noise_follows_from_the_crest_channel_by_channel(bits):
    weight = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [9], [0.1], [1]])
    weight[3, 0] = 20.0  # a peak
    found, crests = noise(weight, Grid(bits)), crest(weight)
    assert found.shape == crests.shape == (4,) and crests[3] > 3 * crests[:3].max()
    torch.testing.assert_close(found, crests / (2 ** (bits - 1) - 0.5) / 12**0.5, rtol=0.1, atol=0)


def test_crests_by_hand():
    weight = torch.tensor([[3.0, -4.0], [0.0, 5.0]])
    torch.testing.assert_close(crest(weight), torch.tensor([4 / 12.5**0.5, 2**0.5]))
    torch.testing.assert_close(crest(weight, per_channel=False), torch.tensor([5 / 12.5**0.5]))


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_int8_does_not_hold_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be 2 to 8"):
        Grid(bits)


# After training


@pytest.mark.parametrize(
    "grid, model, x",
    [
        (Grid(), network("dbb", "small_resnet"), digits(4, 3, 32)),
        (Grid(3, False), network("acb"), digits()),
        (
            Grid(4),
            nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)),
            digits(4, 4),
        ),
    ],
    ids=["residual", "per tensor", "groups"],
)
def test_post_training(grid, model, x):
    folded = dbb.reparameterize(model) if any(isinstance(m, dbb.BranchBlock) for m in model.modules()) else model.eval()
    quantized = post_training(folded, x, grid)
    codes = codes_of(quantized)
    layers = {name: layer for name, layer in folded.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    assert sorted(codes) == sorted(layers)
    for name, layer in layers.items():
        assert codes[name].dtype == torch.int8 and torch.equal(codes[name], grid.codes(layer.weight))
    for number in (1, 3):
        wanted = prepare_qat(folded, grid).eval()(x[:number])
        given = quantized(x[:number])
        assert given.shape == wanted.shape
        assert (given - wanted).std() < 0.05 * wanted.std()  # activations of 8 bits


def test_a_shared_activation_is_no_obstacle():
    """torchvision's residual blocks call one ReLU twice."""
    block = torchvision.models.resnet.BasicBlock(4, 4)
    folded = dbb.reparameterize(dbb.replace_convs(nn.Sequential(block, copy.deepcopy(block)).eval()))
    quantized, x = post_training(folded, digits(4, 4)), digits(4, 4)
    assert len(codes_of(quantized)) == 4
    assert (quantized(x) - folded(x)).std() < 0.05 * folded(x).std()


def test_one_image_is_enough_and_more_fit():
    quantized = post_training(dbb.reparameterize(network()), digits(1))
    assert quantized(digits(5)).shape == (5, 10)


def test_what_is_not_folded_is_not_quantized():
    with pytest.raises(ValueError, match=r"0 is a DiverseBranchBlock, .* call reparameterize"):
        post_training(network(), digits())
    with pytest.raises(ValueError, match="1 is a BatchNorm2d"):
        insert_norms(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), digits())


def test_words_to_authors_of_torchao_are_kept_back_and_no_others():
    words = ("%s: register_constant() on Enum subclasses is deprecated", "something else is wrong")
    kept = [
        _no_word_on_enums(logging.LogRecord("torch", logging.WARNING, "", 0, said, ("x",) * ("%s" in said), None))
        for said in words
    ]
    assert kept == [False, True]


def test_without_torchao_it_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization.pt2e", None)
    with pytest.raises(ValueError, match="torchao is not installed: pip install torchao"):
        post_training(dbb.reparameterize(network()), digits())


@pytest.mark.parametrize("name, x", [("digits_net", digits()), ("small_resnet", digits(4, 3, 32))])
def test_norms_are_inserted_without_a_change(name, x):
    folded = dbb.reparameterize(network("dbb", name)).double()
    normed = insert_norms(folded, x.double())
    dbb.assert_equivalent(folded, normed, x.double())
    seen = {}
    blocks = [m for m in normed.modules() if isinstance(m, dbb.ConvBlock)]
    assert len(blocks) == sum(isinstance(m, nn.Conv2d) for m in folded.modules())
    for block in blocks:
        block.branches["kxk"].conv.register_forward_hook(lambda _, __, y, block=block: seen.update({block: y}))
    normed(x.double())
    for block in blocks:
        norm, y = block.branches["kxk"].bn, seen[block]
        torch.testing.assert_close(norm.running_mean, y.mean((0, 2, 3)))
        torch.testing.assert_close(norm.running_var, y.var((0, 2, 3), correction=0))
    training = copy.deepcopy(normed).train()
    torch.testing.assert_close(training(x.double()), folded(x.double()))  # these statistics are those of the batch
    dbb.assert_equivalent(folded, dbb.reparameterize(normed), x.double())
    assert not any(m._forward_hooks for m in insert_norms(folded, x.double()).modules())


def test_a_bare_convolution_takes_a_norm():
    conv = nn.Conv2d(1, 3, 3, padding=1).eval()
    dbb.assert_equivalent(conv, insert_norms(conv, digits()), digits())


# While training


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("grid", [Grid(8, True), Grid(3, False)], ids=["8", "3"])
def test_the_codes_trained_with_are_those_deployed(block, grid):
    model = prepare_qat(network(block), grid)
    before = trained_codes(model)
    after = trained_codes(trained(model))
    folded = convert_qat(model)
    deployed = codes_of(post_training(folded, digits(), grid))
    assert len(deployed) == len(after) == 3
    for trained_with, found in zip(after.values(), deployed.values()):
        assert trained_with.dtype == torch.int8 and torch.equal(trained_with, found)  # to the last code
    assert any(not torch.equal(before[name], after[name]) for name in after)  # and it did learn
    torch.testing.assert_close(prepare_qat(folded, grid).eval()(digits()), model(digits()))


def test_finetuning_is_sgd_along_half_a_cosine():
    model, drawn, rates = nn.Linear(3, 2), [], []
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])

    class Batches:
        def epoch(self, number: int):
            drawn.append(number)
            yield from [(x, y)] * 3

    start, last = copy.deepcopy(model), copy.deepcopy(model)
    modes = []
    seen = finetune(
        model, Batches(), 8, 0.1, lambda m, rate: rates.append(rate), lambda m: modes.append(m.training) or 7, every=3
    )
    assert drawn == [0, 1, 2] and seen == [7, 7] and modes == [False, False] and not model.training
    torch.testing.assert_close(torch.tensor(rates), 0.05 * (1 + torch.cos(torch.pi * torch.arange(8) / 8)))
    optimizer = torch.optim.SGD(last.parameters(), 0.1, momentum=0.9)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(last(x.float()), y).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, last.weight)
    assert not torch.equal(model.weight, start.weight)
    assert finetune(start, Batches(), 2, 0.1) == []


def test_statistics_stay_and_every_branch_learns():
    net = network()
    model = prepare_qat(net, Grid(4))
    x = digits(16)
    F.cross_entropy(model.train()(x), torch.arange(16) % 10).backward()
    for (name, buffer), (_, old) in zip(model.named_buffers(), net.named_buffers()):
        assert torch.equal(buffer, old), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert torch.equal(model.train()(x), model.eval()(x))


def test_the_gradient_is_that_of_the_fold():
    block = network().get_submodule("1")
    x = digits(4, 4)
    rounded = RoundedLayer(copy.deepcopy(block), Grid(8))
    kernel, bias = block.get_equivalent_kernel_bias()
    kernel = kernel + (Grid(8).round(kernel) - kernel).detach()
    (F.conv2d(x, kernel, bias, 2, 1).relu() ** 2).sum().backward()
    (rounded(x) ** 2).sum().backward()
    for one, other in zip(block.parameters(), rounded.layer.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_block_keeps_its_padding_and_what_follows():
    block = dbb.randomize_norms_(
        dbb.DiverseBranchBlock(2, 3, 3, padding=1, padding_mode="circular", nonlinear=nn.ReLU())
    )
    x = digits(2, 2)
    fine = RoundedLayer(block.eval(), Grid(8))(x)
    assert (fine >= 0).all() and (fine - block(x)).abs().max() < 0.02 * block(x).max()
    assert dict(RoundedLayer(block, Grid()).named_parameters()).keys() == {
        f"layer.{n}" for n, _ in block.named_parameters()
    }


def test_a_bare_block_and_float64():
    block = dbb.randomize_norms_(dbb.DiverseBranchBlock(2, 3, 3)).double().eval()
    model = prepare_qat(block, Grid(8))
    assert isinstance(model, RoundedLayer) and model(digits(2, 2).double()).dtype == torch.float64
    folded = convert_qat(model)
    assert torch.equal(Grid(8).codes(folded.weight), model.codes())


def test_rounded_branches_fold_to_no_grid():
    model = trained(prepare_qat(network(), Grid(3), "branches"))
    rounded = [m for m in model.modules() if isinstance(m, RoundedLayer)]
    assert (
        len(rounded) == len(trained_codes(model)) == 2 * 5 - 1
    )  # an identity-based 1x1 is left alone; the linear layer
    folded = convert_qat(model)
    dbb.assert_equivalent(model[:2].eval(), folded[:2].eval(), digits())
    assert torch.equal(folded[3].weight, model[3].layer.weight)
    for conv in (m for m in folded.modules() if isinstance(m, nn.Conv2d)):
        assert not torch.allclose(Grid(3).round(conv.weight), conv.weight, atol=1e-2)


def test_a_rounded_block_is_no_layer_to_fold():
    with pytest.raises(ValueError, match="a rounded DiverseBranchBlock is folded before it is rounded"):
        dbb.fold(prepare_qat(network())[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: prepare_qat(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))),
            "1 is a batch norm outside of blocks",
        ),
        (lambda: prepare_qat(network(), kernels="merged"), "kernels='merged' is not known: choose from equivalent"),
        (lambda: convert_qat(network()), "has no rounded layers: it must come from prepare_qat"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_copies_leave_the_model_alone():
    net = network()
    state, kinds = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    for model in (prepare_qat(net), prepare_qat(net, kernels="branches")):
        convert_qat(trained(model))
    assert [type(m) for m in net.modules()] == kinds
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
