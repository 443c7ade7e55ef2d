"""Blocks: every configuration that is accepted folds exactly, and behaves as a module should."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import dbb
from dbb import ACBlock, BranchBlock, ConvBlock, DiverseBranchBlock, RepVGGBlock, randomize_norms_
from dbb.blocks import ConvSpec, conv_norm, identity_norm
from dbb.layers import BiasPad, IdentityBasedConv1x1, WindowMean
from dbb.verify import summed_scale
from tests.support import assert_same, image

# The table of configurations

KINDS = {
    "dbb": (DiverseBranchBlock, {}),
    "dbb 2x internal": (DiverseBranchBlock, {"internal_channels": 16}),
    "dbb batch border": (DiverseBranchBlock, {"border": "batch"}),
    "dbb single init": (DiverseBranchBlock, {"single_init": True}),
    "kxk": (DiverseBranchBlock, {"branches": ["kxk"]}),
    "1x1": (DiverseBranchBlock, {"branches": ["1x1"]}),
    "kxk 1x1": (DiverseBranchBlock, {"branches": ["kxk", "1x1"]}),
    "1x1-kxk": (DiverseBranchBlock, {"branches": ["1x1_kxk"]}),
    "1x1-avg": (DiverseBranchBlock, {"branches": ["1x1_avg"]}),
    "double kxk": (DiverseBranchBlock, {"branches": {"one": "kxk", "two": "kxk"}}),
    "acb": (ACBlock, {}),
    "repvgg": (RepVGGBlock, {}),
    "plain": (ConvBlock, {}),
}
AXES = {
    "kind": list(KINDS),
    "kernel": [1, 2, 3, 4, 5, (1, 3), (3, 1), (3, 5), (2, 3)],
    "stride": [1, 2, 3, (2, 1)],
    "padding": ["none", "half", "more", "lopsided"],
    "dilation": [1, 2, (1, 3)],
    "groups": ["dense", "two", "depthwise"],
    "channels": [(8, 8), (8, 16), (8, 4)],
    "size": [(19, 23), (20, 17)],
}


@dataclass(frozen=True)
class Case:
    kind: str
    kernel: int | tuple
    stride: int | tuple
    padding: str
    dilation: int | tuple
    groups: str
    channels: tuple
    size: tuple

    def arguments(self) -> dict:
        kernel, dilation = dbb.affine.pair(self.kernel), dbb.affine.pair(self.dilation)
        half = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel))
        padding = {"none": 0, "half": half, "more": tuple(h + 2 for h in half), "lopsided": (half[0] + 1, half[1])}
        return {
            "in_channels": self.channels[0],
            "out_channels": self.channels[1],
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": padding[self.padding],
            "dilation": self.dilation,
            "groups": {"dense": 1, "two": 2, "depthwise": self.channels[1]}[self.groups],
        }

    def possible(self) -> bool:
        return not (self.groups == "depthwise" and self.channels[1] > self.channels[0])

    def build(self) -> ConvBlock:
        block, options = KINDS[self.kind]
        return randomize_norms_(block(**self.arguments(), **options, dtype=torch.float64)).eval()

    def __str__(self) -> str:
        return "-".join(str(v).replace(" ", "") for v in vars(self).values())


def table(count: int = 640) -> list[Case]:
    """A random sample of the full product; the seed makes it the same every time."""
    cases = [case for values in itertools.product(*AXES.values()) if (case := Case(*values)).possible()]
    return random.Random(2103_13425).sample(cases, count)


CASES = table()


def test_the_table_spans_every_axis():
    assert len(set(CASES)) >= 500
    for axis, values in AXES.items():
        seen = Counter(getattr(case, axis) for case in CASES)
        assert set(seen) == set(values)
        assert min(seen.values()) >= 20, f"{axis}: {seen}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fold_is_forward(case):
    torch.manual_seed(0)
    block, x = case.build(), image(8, *case.size)
    plain = nn.Conv2d(**case.arguments(), dtype=torch.float64)
    with torch.no_grad():
        training, scale = block(x), summed_scale(block, x)
        conv = block.fuse()
        assert type(conv) is nn.Conv2d
        assert (conv.weight.shape, conv.stride, conv.padding) == (plain.weight.shape, plain.stride, plain.padding)
        assert (conv.dilation, conv.groups) == (plain.dilation, plain.groups)
        assert_same(conv(x), training, scale)
        kernel, bias = block.get_equivalent_kernel_bias()
        assert torch.equal(kernel, conv.weight) and torch.equal(bias, conv.bias)
        block.switch_to_deploy()
        assert_same(block(x), training, scale)


BATCH_CASES = [case for case in CASES if case.kind == "dbb batch border"]


@pytest.mark.parametrize("case", BATCH_CASES, ids=str)
def test_a_training_step_with_batch_border_is_one_convolution(case):
    """Put the batch's statistics into the running ones: the eval form, and so the fold, answers what training did."""
    torch.manual_seed(0)
    block, x = case.build(), image(8, *case.size)
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(remember_statistics) for norm in norms]
    with torch.no_grad():
        y = block.train()(x)
        for norm, handle in zip(norms, handles):
            handle.remove()
            norm.running_var.copy_(norm.seen[0])
            norm.running_mean.copy_(norm.seen[1])
        assert_same(block.eval().fuse()(x), y, summed_scale(block, x), 1e-9)


def remember_statistics(norm: nn.BatchNorm2d, args: tuple) -> None:
    norm.seen = torch.var_mean(args[0], (0, 2, 3), correction=0)


# Options


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("kind", ["dbb", "acb", "repvgg"])
@pytest.mark.parametrize("kernel, padding", [(3, 1), (5, (2, 1)), (4, "same"), (3, 0)])
def test_padding_modes(kind, mode, kernel, padding):
    block, _ = KINDS[kind]
    block = randomize_norms_(block(8, 8, kernel, padding=padding, padding_mode=mode, dtype=torch.float64)).eval()
    conv, x = block.fuse(), image(8)
    assert conv.padding_mode == mode and conv.kernel_size == (kernel, kernel)
    with torch.no_grad():
        assert_same(conv(x), block(x), summed_scale(block, x))
        block.switch_to_deploy()
        assert torch.equal(block(x), conv(x))


@pytest.mark.parametrize("kernel", [2, 3, 4, (2, 5)])
def test_same_padding(kernel):
    block = randomize_norms_(DiverseBranchBlock(8, 8, kernel, padding="same", dtype=torch.float64)).eval()
    conv, x = block.fuse(), image(8)
    assert conv.kernel_size == dbb.affine.pair(kernel)
    assert_same(conv(x), block(x), summed_scale(block, x))
    assert conv(x).shape == x.shape
    assert DiverseBranchBlock(8, 8, 3, padding="valid").fuse().padding == (0, 0)


def test_depthwise_has_no_pointwise_branches():
    block = DiverseBranchBlock(8, 8, 3, padding=1, groups=8)
    assert [name for name, _ in block.branches.named_children()] == ["kxk", "1x1_kxk", "1x1_avg"]
    assert isinstance(block.branches["1x1_avg"].avg, nn.AvgPool2d)
    assert block.branches["1x1_kxk"].conv.in_channels == 16
    assert DiverseBranchBlock(8, 8, 3, groups=8, branches=["kxk", "1x1"]).branches["1x1"] is not None


def test_attributes_are_those_of_a_conv():
    shape = (4, 6, (3, 5), (2, 1), (1, 2), (1, 2), 2)
    block, conv = DiverseBranchBlock(*shape), nn.Conv2d(*shape)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(block, name) == getattr(conv, name)


def test_a_single_output_is_dense():
    assert len(DiverseBranchBlock(4, 1, 3).branches) == len(DiverseBranchBlock(1, 1, 3).branches) == 4


def test_dense_block_has_identity_based_pointwise_convs():
    first = DiverseBranchBlock(8, 16, 3, padding=1).branches["1x1_kxk"].pointwise.prefix.conv
    assert isinstance(first, IdentityBasedConv1x1) and first.weight.abs().max() == 0
    wide = DiverseBranchBlock(8, 16, 3, internal_channels=4).branches["1x1_kxk"]
    assert wide.pointwise.prefix.conv.out_channels == wide.conv.in_channels == 4


def test_gammas():
    block = DiverseBranchBlock(4, 4, 3, padding=1, single_init=True)
    gammas = {name: branch.bn.weight for name, branch in block.branches.named_children()}
    assert all((g == (name == "kxk")).all() for name, g in gammas.items())
    block.init_gamma(0.25)
    assert all((g == 0.25).all() for g in gammas.values())
    block.init_gamma({"1x1": 3.0})
    assert (gammas["1x1"] == 3).all() and (gammas["kxk"] == 0.25).all()


def test_deploy_form_is_built_directly(monkeypatch):
    monkeypatch.setattr(DiverseBranchBlock, "fuse", None)
    block = DiverseBranchBlock(4, 6, (3, 5), 2, (1, 2), 1, 2, deploy=True)
    assert block.deploy and list(block.state_dict()) == ["conv.weight", "conv.bias"]
    plain = nn.Conv2d(4, 6, (3, 5), 2, (1, 2), 1, 2)
    plain.load_state_dict({k.removeprefix("conv."): v for k, v in block.state_dict().items()})
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(block(x), plain(x))


def test_nonlinear_stays():
    block = randomize_norms_(DiverseBranchBlock(4, 4, 3, padding=1, nonlinear=nn.ReLU(), dtype=torch.float64)).eval()
    x = image(4)
    fused, wanted = block.fuse(), block(x)
    assert isinstance(fused, nn.Sequential) and isinstance(fused[1], nn.ReLU)
    assert wanted.min() == 0
    assert_same(fused(x), wanted, 1 + wanted.max())
    block.switch_to_deploy()
    assert_same(block(x), wanted, 1 + wanted.max())


def test_own_branches():
    def sobel(spec: ConvSpec) -> nn.Module:
        conv = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        conv.weight.data[:] = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        return nn.Sequential(conv, nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    block = DiverseBranchBlock(4, 4, 3, padding=1, branches={"kxk": "kxk", "sobel": sobel}, dtype=torch.float64)
    x = image(4)
    randomize_norms_(block).eval()
    assert_same(block.fuse()(x), block(x), summed_scale(block, x))

    own = BranchBlock({"conv": nn.Conv2d(4, 4, 3, padding=1), "pool": nn.AvgPool2d(3, 1, 1), "id": nn.Identity()})
    own = own.double().eval()
    assert_same(own.fuse()(x), own(x), summed_scale(own, x))
    own.switch_to_deploy()
    assert list(own.state_dict()) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_branches_of_more_groups_fold_into_those_of_the_block(groups):
    finer = {"a": lambda spec: nn.Conv2d(12, 12, 3, padding=1, groups=6)}
    block = ConvBlock(12, 12, 3, padding=1, groups=groups, branches=finer).double().eval()
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(block.fuse()(x), block(x))
    assert block.fuse().groups == block.equivalent().groups == groups


def test_blocks_within_blocks():
    inner = DiverseBranchBlock(4, 4, 3, padding=1)
    outer = randomize_norms_(BranchBlock({"dbb": inner, "id": nn.Identity()})).double().eval()
    x = image(4)
    assert_same(outer.fuse()(x), outer(x), summed_scale(outer, x))


@pytest.mark.parametrize("kind", ["dbb", "acb", "repvgg", "plain"])
@pytest.mark.parametrize("with_bn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_from_conv(kind, with_bn, bias):
    block, _ = KINDS[kind]
    conv = nn.Conv2d(4, 6, (3, 5), 2, (1, 2), groups=2, bias=bias, dtype=torch.float64).eval()
    bn = randomize_norms_(nn.BatchNorm2d(6, eps=1e-3, momentum=0.3, dtype=torch.float64)).eval() if with_bn else None
    made = block.from_conv(conv, bn)
    assert not made.training and made.get_equivalent_kernel_bias()[0].dtype == torch.float64
    x = image(4)
    wanted = conv(x) if bn is None else bn(conv(x))
    assert_same(made.branches["kxk"](x), wanted, 1 + wanted.abs().max())
    folded = block.from_conv(conv, bn, deploy=True)
    assert folded.deploy
    assert_same(folded(x), wanted, 1 + wanted.abs().max())
    if bn is not None:
        assert (made.branches["kxk"].bn.eps, made.branches["kxk"].bn.momentum) == (1e-3, 0.3)


# Equivalent kernels and folding


def test_equivalent_kernel_in_both_forms():
    block = randomize_norms_(DiverseBranchBlock(4, 6, 3, padding=1)).eval()
    kernel, bias = block.get_equivalent_kernel_bias()
    block.switch_to_deploy()
    again, bias_again = block.get_equivalent_kernel_bias()
    assert torch.equal(kernel, again) and torch.equal(bias, bias_again)
    assert DiverseBranchBlock(4, 6, 3, deploy=True).get_equivalent_kernel_bias()[0].shape == (6, 4, 3, 3)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_through_the_equivalent_kernel_reaches_every_parameter(training):
    block = randomize_norms_(DiverseBranchBlock(4, 6, 3, padding=1)).train(training)
    kernel, bias = block.get_equivalent_kernel_bias()
    (kernel.square().sum() + bias.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())
    block.switch_to_deploy()
    block.get_equivalent_kernel_bias()[0].sum().backward()
    assert block.conv.weight.grad.abs().max() > 0


def test_gradients_of_eval_form_equal_those_of_the_equivalent_kernel():
    block = randomize_norms_(DiverseBranchBlock(3, 5, 3, padding=1, dtype=torch.float64)).eval()
    x = image(3, 7, 8)
    weights = torch.randn_like(block(x))
    through_branches = torch.autograd.grad((block(x) * weights).sum(), list(block.parameters()))
    through_kernel = torch.autograd.grad((block.equivalent()(x) * weights).sum(), list(block.parameters()))
    for a, b in zip(through_branches, through_kernel):
        assert_same(a, b, 1 + b.abs().max())


def test_folding_twice_is_harmless():
    block = randomize_norms_(DiverseBranchBlock(4, 4, 3, padding=1)).eval()
    block.switch_to_deploy()
    conv = block.conv
    block.switch_to_deploy()
    assert block.conv is conv
    fused = block.fuse()
    assert fused is not conv and torch.equal(fused.weight, conv.weight)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_folded_parameters_keep_requires_grad_and_mode(trainable, training):
    block = DiverseBranchBlock(4, 4, 3, padding=1).requires_grad_(trainable).train(training)
    conv = block.fuse()
    assert conv.weight.requires_grad is conv.bias.requires_grad is trainable
    assert conv.training is training
    assert conv.weight.is_leaf
    if trainable:
        conv(torch.randn(1, 4, 5, 5)).sum().backward()
        assert conv.weight.grad is not None


def test_fusing_leaves_the_block_alone():
    block = randomize_norms_(DiverseBranchBlock(4, 4, 3, padding=1)).eval()
    before = copy.deepcopy(block.state_dict())
    conv = block.fuse()
    conv.weight.data.zero_()
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


# Types, devices, modes


@pytest.mark.parametrize("kind", ["dbb", "dbb 2x internal", "acb", "repvgg"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("groups", [1, 8])
def test_low_precision(kind, dtype, tolerance, groups):
    block, options = KINDS[kind]
    block = randomize_norms_(block(8, 8, 3, padding=1, groups=groups, dilation=1, dtype=dtype, **options))
    x = image(8).to(dtype)
    block(x).float().sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    conv = block.eval().fuse()
    assert conv.weight.dtype == conv.bias.dtype == dtype
    with torch.no_grad():
        assert_same(conv(x).double(), block(x).double(), summed_scale(block, x).double(), tolerance)


def test_dilated_average_in_low_precision():
    block = randomize_norms_(DiverseBranchBlock(8, 8, 3, padding=2, dilation=2, dtype=torch.bfloat16)).eval()
    assert isinstance(block.branches["1x1_avg"].avg, WindowMean)
    assert block(image(8).bfloat16()).dtype == torch.bfloat16


def test_fold_is_in_float64_whatever_autocast_says():
    block = randomize_norms_(DiverseBranchBlock(16, 16, 3, padding=1)).eval()
    kernel, bias = block.get_equivalent_kernel_bias()
    exact = copy.deepcopy(block).double().get_equivalent_kernel_bias()[0]
    assert torch.equal(kernel, exact.float())
    assert (block.equivalent().weight - exact).abs().max() < 1e-14
    with torch.autocast("cpu", torch.bfloat16):
        inside, bias_inside = block.get_equivalent_kernel_bias()
        conv = block.fuse()
    assert torch.equal(inside, kernel) and torch.equal(bias_inside, bias) and torch.equal(conv.weight, kernel)


def test_autocast_training():
    block, x = DiverseBranchBlock(8, 8, 3, padding=1), image(8).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_meta_device():
    block = DiverseBranchBlock(8, 8, 3, padding=1, device="meta")
    assert block.fuse().weight.device.type == "meta"
    with torch.device("meta"):
        block = DiverseBranchBlock(8, 8, 3, padding=1, dilation=2, stride=2)
    block.to_empty(device="cpu")
    block.load_state_dict(DiverseBranchBlock(8, 8, 3, padding=1, dilation=2, stride=2).state_dict())
    assert block.eval()(torch.randn(1, 8, 9, 9)).isfinite().all()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("deploy", [True, False])
def test_copies_and_pickles(kind, deploy):
    block, options = KINDS[kind]
    block = block(8, 8, 3, padding=1, deploy=deploy, **options).eval()
    x = image(8).float()
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), block(x))
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = KINDS[kind][0](8, 8, 3, padding=1, deploy=deploy, **options).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), block(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dbb", "dbb batch border", "acb", "repvgg"])
@pytest.mark.parametrize("groups", [1, 8])
def test_compile(kind, groups):
    """One graph, no break, in both modes; the same numbers."""
    block, options = KINDS[kind]
    block, x = randomize_norms_(block(8, 8, 3, padding=1, groups=groups, **options)), image(8).float()
    for training in (True, False):
        torch._dynamo.reset()
        eager, compiled = copy.deepcopy(block).train(training), copy.deepcopy(block).train(training)
        y = torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
        assert_same(y, eager(x), 1 + eager(x).abs().max(), 1e-5)
        y.sum().backward()
        assert all(p.grad is not None for p in compiled.parameters())


@pytest.mark.parametrize("kind", ["dbb", "acb", "repvgg"])
def test_export(kind):
    block, options = KINDS[kind]
    block, x = randomize_norms_(block(8, 8, 3, padding=1, **options)).eval(), image(8).float()
    assert torch.equal(torch.export.export(block, (x,)).module()(x), block(x))
    block.switch_to_deploy()
    exported = torch.export.export(block, (x,))
    assert torch.equal(exported.module()(x), block(x))
    assert sum("conv2d" in str(node.target) for node in exported.graph.nodes) == 1


@pytest.mark.parametrize("kind", ["dbb", "acb", "repvgg"])
def test_sync_batch_norm(kind):
    """Conversion keeps the padding and the fold; the converted norm runs on GPU in training, here in eval."""
    block, options = KINDS[kind]
    block = randomize_norms_(block(8, 8, 3, padding=1, dtype=torch.float64, **options)).eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    norms = [m for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    x = image(8)
    assert torch.equal(synced.fuse().weight, block.fuse().weight)
    assert_same(synced(x), block(x), summed_scale(block, x))
    assert_same(synced.fuse()(x), synced(x), summed_scale(block, x))


def test_channels_last():
    block = randomize_norms_(DiverseBranchBlock(8, 8, 3, padding=1)).eval()
    x = image(8).float()
    y = block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert_same(y, block.fuse()(x), summed_scale(block, x), 1e-5)


def test_trains():
    """A block learns what a convolution can."""
    torch.manual_seed(0)
    target, block = nn.Conv2d(3, 4, 3, padding=1), DiverseBranchBlock(3, 4, 3, padding=1)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(60):
        x = torch.randn(8, 3, 10, 10)
        loss = (block(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 50


# The border in training


def test_running_border_uses_statistics_after_this_batch_without_gradient():
    pad = BiasPad(nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)), 1)
    x = 5 + 3 * torch.randn(4, 2, 6, 6)
    y = pad(x)
    norm = pad.prefix[1]
    border = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
    assert_same(y[0, :, 0, 0].double(), border.double(), 1.0, 1e-6)
    (gradient,) = torch.autograd.grad(y[:, :, 0].sum(), norm.bias, retain_graph=True)
    assert gradient.abs().max() == 0
    pad.eval()
    (gradient,) = torch.autograd.grad(pad(x)[:, :, 0].sum(), norm.bias)
    assert gradient.abs().min() > 0


def test_batch_border_uses_the_batch_with_gradient():
    pad = BiasPad(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), ((1, 0), (0, 2)), border="batch").double()
    x = (5 + 3 * torch.randn(4, 2, 6, 6)).double()
    y = pad(x)
    z = pad.prefix[0](x)
    zero = pad.prefix[0].bias[:, None, None]
    wanted = (zero - z.mean((0, 2, 3))[:, None, None]) / torch.sqrt(z.var((0, 2, 3), correction=0) + 1e-5)[
        :, None, None
    ]
    assert_same(y[0, :, 0, 0], wanted.flatten(), 1.0)
    assert y.shape == (4, 3, 7, 8)
    (gradient,) = torch.autograd.grad(y[:, :, 0].sum(), pad.prefix[1].bias)
    assert gradient.abs().min() > 0


# What is refused, and how


def tanh_branch(spec: ConvSpec) -> nn.Module:
    return nn.Sequential(conv_norm(spec), nn.Tanh())


REFUSED = {
    "kernel_size=\\(0, 0\\) is too small": lambda: DiverseBranchBlock(4, 4, 0),
    "stride=\\(1, 0\\) is too small": lambda: DiverseBranchBlock(4, 4, 3, (1, 0)),
    "dilation=\\(0, 0\\) is too small": lambda: DiverseBranchBlock(4, 4, 3, dilation=0),
    "groups=0 is too small": lambda: DiverseBranchBlock(4, 4, 3, groups=0),
    "in_channels=0 is too small": lambda: DiverseBranchBlock(0, 4, 3),
    "padding=.* is too small: a convolution needs 0": lambda: DiverseBranchBlock(4, 4, 3, padding=-1),
    "in_channels=4 must be divisible by groups=3": lambda: DiverseBranchBlock(4, 6, 3, groups=3),
    "out_channels=5 must be divisible by groups=2": lambda: DiverseBranchBlock(4, 5, 3, groups=2),
    "padding='same' with stride=\\(2, 2\\)": lambda: DiverseBranchBlock(4, 4, 3, 2, "same"),
    "padding='half' with stride": lambda: DiverseBranchBlock(4, 4, 3, padding="half"),
    "padding_mode='mirror' is not known": lambda: DiverseBranchBlock(4, 4, 3, padding_mode="mirror"),
    "border='zeros' is not known": lambda: DiverseBranchBlock(4, 4, 3, border="zeros"),
    "internal_channels=3 must be a multiple of groups=2": lambda: DiverseBranchBlock(
        4, 4, 3, groups=2, internal_channels=3
    ),
    "branches \\['3x3'\\] are not known: choose from kxk, 1x1": lambda: DiverseBranchBlock(4, 4, 3, branches=["3x3"]),
    "branches='kxk' is one string": lambda: DiverseBranchBlock(4, 4, 3, branches="kxk"),
    "needs at least one branch": lambda: DiverseBranchBlock(4, 4, 3, branches=[]),
    "an identity branch answers its input": lambda: RepVGGBlock(4, 6, 3, branches=["identity"]),
    "and stride 1 \\(here \\(2, 2\\)\\)": lambda: ConvBlock(4, 4, 3, 2, branches={"id": identity_norm}),
    "tanh: 1: Tanh has no rule": lambda: ConvBlock(4, 4, 3, branches={"tanh": tanh_branch}),
    "does not fit the block's 4 -> 4": lambda: ConvBlock(
        4, 4, 3, branches={"a": lambda spec: nn.Conv2d(4, 4, 5, padding=1)}
    ),
    "does not fit the block's 4 -> 6": lambda: ConvBlock(4, 6, 3, branches={"a": lambda spec: nn.Conv2d(4, 4, 3)}),
    "recipe must keep to the windows": lambda: ConvBlock(4, 4, 3, branches={"a": lambda spec: nn.Conv2d(4, 4, 3, 2)}),
    "keep to the windows of the spec": lambda: ConvBlock(
        4, 4, 3, branches={"a": lambda s: nn.Conv2d(4, 4, 5, padding=2)}
    ),
    "groups=1, .* give every branch groups=4 or a multiple": lambda: ConvBlock(
        4, 4, 3, groups=4, branches={"a": lambda spec: nn.Conv2d(4, 4, 3)}
    ),
    "cannot lay maps over each other": lambda: BranchBlock({"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 1)}),
    "from_conv takes an nn.Conv2d, not Conv1d": lambda: DiverseBranchBlock.from_conv(nn.Conv1d(4, 4, 3)),
    "the block ends in ReLU, which is not linear": lambda: dbb.fold(DiverseBranchBlock(4, 4, 3, nonlinear=nn.ReLU())),
    "padding_mode='reflect' .* is no zero padding": lambda: dbb.fold(
        DiverseBranchBlock(4, 4, 3, padding=1, padding_mode="reflect")
    ),
    "groups=3 must divide channels=4": lambda: IdentityBasedConv1x1(4, 3),
    "they must stand in a plain nn.Sequential": lambda: BiasPad(
        dbb.Parallel(nn.BatchNorm2d(4), nn.Identity()), 1, border="batch"
    ),
    "zeros would stand where its windows still touch": lambda: BiasPad(nn.Conv2d(4, 4, 3), 1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_when_it_is_built(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_weights_of_the_other_form_are_named():
    training, folded = DiverseBranchBlock(4, 4, 3), DiverseBranchBlock(4, 4, 3, deploy=True)
    with pytest.raises(
        RuntimeError, match=r"weights are of the folded form, the block is in training form: .*deploy=True"
    ):
        training.load_state_dict(folded.state_dict())
    with pytest.raises(
        RuntimeError, match=r"weights are of the training form, the block is folded: .*switch_to_deploy"
    ):
        nn.Sequential(folded).load_state_dict(nn.Sequential(training).state_dict())
