"""Frozen batch norms, as detectors use them: folded, replaced, given back, and kept frozen while training."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import dbb
from dbb import assert_equivalent, fold, freeze_norms, randomize_norms_, reparameterize, replace_convs, survey_convs
from dbb.blocks import BLOCKS
from dbb.steps import BranchStep, LeanStep, set_training_step
from tests.support import assert_folds, image

pytestmark = pytest.mark.slow  # finetuning detectors


def frozen_pair(channels: int = 4, **conv) -> nn.Sequential:
    options = {"bias": False, "padding": 1} | conv
    layers = nn.Conv2d(channels, channels, 3, **options), FrozenBatchNorm2d(channels, 1e-3)
    return randomize_norms_(nn.Sequential(*layers)).double()


def norms(model: nn.Module, kind: type) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kind)]


# One frozen norm


def test_it_folds():
    assert_folds(frozen_pair(), image(4))
    assert_folds(nn.Sequential(*frozen_pair(), *frozen_pair(bias=True, padding=0)), image(4))


def test_a_subclass_with_another_forward_is_refused():
    class Other(FrozenBatchNorm2d):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="a FrozenBatchNorm2d with a forward of its own"):
        fold(Other(4))


def test_a_rule_by_name_needs_no_import():
    class Scaled(nn.Module):
        def forward(self, x):
            return 2 * x

    with pytest.raises(ValueError, match=r"Scaled has no rule"):
        fold(Scaled())
    name = f"{Scaled.__module__}.{Scaled.__qualname__}"
    dbb.rule(name)(lambda layer: dbb.Affine(torch.full((4, 1, 1, 1), 2.0, dtype=torch.float64), groups=4))
    assert_folds(Scaled(), image(4))
    del dbb.fold.__globals__["RULES"][name]


# Surgery


@pytest.mark.parametrize("block", sorted(BLOCKS))
@pytest.mark.parametrize("bias", [False, True])
def test_a_pair_becomes_a_block_with_frozen_norms(block, bias):
    model = frozen_pair(bias=bias)
    replaced = replace_convs(model, block, say=None)
    assert not norms(replaced, nn.BatchNorm2d) and len(norms(replaced, FrozenBatchNorm2d)) >= 1
    assert {norm.eps for norm in norms(replaced, FrozenBatchNorm2d)} == {1e-3}
    assert all(t.dtype == torch.float64 for t in replaced.state_dict().values())
    randomize_norms_(replaced).eval()
    assert_equivalent(replaced, reparameterize(replaced), image(4))


@pytest.mark.parametrize("block", ["dbb", "acb", "repvgg"])
def test_preserved_it_starts_where_it_was_and_every_branch_can_learn(block):
    model, x = frozen_pair(), image(4)
    replaced = replace_convs(model, block, preserve=True, say=None)
    assert_equivalent(model.eval(), replaced.eval(), x)
    optimizer = torch.optim.SGD(replaced.parameters(), 0.1)
    for _ in range(2):  # a kernel in front of one that is zero moves in the second step
        replaced.train()(x).square().mean().backward()
        optimizer.step()
    assert [name for name, p in replaced.named_parameters() if not p.grad.any()] == []


def test_preserved_a_branch_without_a_kernel_stays_silent():
    """RepVGG's identity has none, and its scale is frozen."""
    replaced = replace_convs(frozen_pair(), "repvgg", preserve=True, say=None)
    identity = replaced[0].branches["identity"]
    assert not identity.bn.weight.any() and not list(identity.parameters())


def test_restored_it_loads_strictly_into_the_original():
    model = frozen_pair(bias=True)
    replaced = randomize_norms_(replace_convs(model, say=None)).eval()
    restored = reparameterize(replaced, restore=True, say=None)
    assert type(restored[1]) is FrozenBatchNorm2d
    model.load_state_dict(restored.state_dict())
    assert_equivalent(replaced, model.eval(), image(4))


def test_a_network_of_frozen_norms():
    """As torchvision's detectors have it, traced through and through."""
    model = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    assert len(survey_convs(model).replaced) == 16
    model = randomize_norms_(replace_convs(model, say=None)).double().eval()
    assert_equivalent(model, reparameterize(model), torch.rand(1, 3, 32, 32, dtype=torch.float64))


def test_whole_detectors_and_segmenters_of_torchvision():
    with torch.device("meta"):
        detector = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        segmenter = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    chosen = [choice.name for choice in survey_convs(detector).replaced]
    assert len(chosen) == 16 and all(name.startswith("backbone.body.layer") for name in chosen)
    assert len(survey_convs(segmenter, where="backbone.*conv2").replaced) == 16  # dilated ones among them


# Training with frozen norms


def block_of(kind: str, **options) -> nn.Module:
    options = {"groups": 2, "stride": 2, "padding": 1} | options
    return randomize_norms_(BLOCKS[kind](8, 8, 3, dtype=torch.float64, **options)).train()


def gradients(answer: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad((answer * answer.detach().cos()).sum(), inputs)


@pytest.mark.parametrize("step", [BranchStep(), LeanStep(), LeanStep(always=True)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "acb", "dbb"])
def test_a_frozen_step_is_that_of_the_equivalent_kernel(kind, step):
    """Answer, gradient of the input, and gradient of every parameter, in training mode; and nothing is tracked."""
    block, x = set_training_step(freeze_norms(block_of(kind)), step), image(8).requires_grad_()
    before = copy.deepcopy(block.state_dict())
    kernel, bias = block.get_equivalent_kernel_bias()
    learned = [p for p in block.parameters() if p.requires_grad]
    one = nn.functional.conv2d(x, kernel, bias, stride=2, padding=1, groups=2)
    for given, wanted in zip(
        [block(x), *gradients(block(x), x, *learned)], [one, *gradients(one, x, *learned)], strict=True
    ):
        torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_frozen_step_keeps_what_one_convolution_keeps():
    """It is folded in each step: for the backward pass there is the input, and no inner image."""

    def kept(block: nn.Module, x: torch.Tensor) -> int:
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x).sum().backward()
        return sum(sizes.values())

    x = torch.randn(4, 8, 64, 64, dtype=torch.float64, requires_grad=True)
    frozen = freeze_norms(block_of("dbb"))
    assert kept(frozen, x) < 1.2 * x.nbytes
    assert kept(set_training_step(frozen, BranchStep()), x) > 3 * x.nbytes


def test_a_norm_that_still_learns_runs_as_it_is_defined():
    """In eval mode, but with a scale to learn: then the border, which has no gradient, is no part of a kernel's."""
    block, x, sides = block_of("dbb"), image(8), []
    for norm in norms(block, nn.BatchNorm2d):
        norm.eval()
    for step in (BranchStep(), LeanStep(always=True)):
        own = set_training_step(copy.deepcopy(block), step)
        sides.append(gradients(own(x), *own.parameters()))
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_under_autocast_a_frozen_step_runs_in_its_dtype():
    block = freeze_norms(block_of("dbb")).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(image(8).float()).dtype == torch.bfloat16


def test_freezing_is_undone_by_train_and_done_again():
    model = nn.Sequential(block_of("dbb"), nn.BatchNorm2d(8), frozen_pair(8)).train()
    assert freeze_norms(model) is model
    assert not any(norm.training for norm in norms(model, nn.BatchNorm2d))
    assert not any(p.requires_grad for norm in norms(model, nn.BatchNorm2d) for p in norm.parameters())
    assert model[0].branches["kxk"].conv.weight.requires_grad
    assert all(norm.training for norm in norms(model.train(), nn.BatchNorm2d))


def test_a_norm_without_statistics_cannot_be_frozen():
    with pytest.raises(ValueError, match=r"^1 keeps no running statistics, so there is nothing to freeze it with"):
        freeze_norms(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False)))
