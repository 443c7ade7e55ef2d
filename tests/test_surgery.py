"""Folding whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dbb import BranchBlock, DiverseBranchBlock, RepVGGBlock, assert_equivalent, randomize_norms_, reparameterize
from tests.support import image


class Shared(nn.Module):
    """One block used twice, under two names."""

    def __init__(self):
        super().__init__()
        self.one = DiverseBranchBlock(4, 4, 3, padding=1)
        self.two = self.one
        self.head = nn.Sequential(RepVGGBlock(4, 6, 3, 2, 1, nonlinear=nn.ReLU()), nn.BatchNorm2d(6), nn.Dropout(0.5))

    def forward(self, x):
        return self.head(self.one(self.two(x)))


def model() -> nn.Module:
    return randomize_norms_(Shared()).double().eval()


@pytest.mark.parametrize("inplace", [True, False])
def test_reparameterize(inplace):
    before = model()
    untouched = copy.deepcopy(before)
    after = reparameterize(before, inplace=inplace)
    assert (after is before) is inplace
    assert_equivalent(untouched, after, image(4))
    assert not any(isinstance(m, BranchBlock) for m in after.modules())
    assert type(after.one) is nn.Conv2d and after.one is after.two
    assert [type(m) for m in after.head[0]] == [nn.Conv2d, nn.ReLU]
    assert not any(m.training for m in after.modules())
    if not inplace:
        assert_equivalent(before, untouched, image(4))
        after.one.weight.data.zero_()
        after.head[1].weight.data.zero_()
        assert_equivalent(before, untouched, image(4))


def test_folding_twice_is_harmless():
    once = reparameterize(model())
    twice = reparameterize(once)
    assert once is not twice
    assert torch.equal(once(image(4)[:0]), twice(image(4)[:0]))
    assert all(torch.equal(v, twice.state_dict()[k]) for k, v in once.state_dict().items())


@pytest.mark.parametrize("inplace", [True, False])
def test_bare_block(inplace):
    block = randomize_norms_(DiverseBranchBlock(4, 4, 3, padding=1)).double().eval()
    conv = reparameterize(block, inplace=inplace)
    assert type(conv) is nn.Conv2d
    assert_equivalent(block, conv, image(4))


def test_deploy_blocks_become_plain_convs():
    net = nn.Sequential(DiverseBranchBlock(4, 4, 3, deploy=True)).eval()
    folded = reparameterize(net)
    assert type(folded[0]) is nn.Conv2d and folded[0] is not net[0].conv
    assert torch.equal(folded[0].weight, net[0].conv.weight)


def test_block_inside_a_block():
    inner = DiverseBranchBlock(4, 4, 3, padding=1)
    net = randomize_norms_(nn.Sequential(BranchBlock({"dbb": inner, "id": nn.Identity()}))).double().eval()
    folded = reparameterize(net)
    assert type(folded[0]) is nn.Conv2d
    assert_equivalent(net, folded, image(4))


def test_branches_are_not_copied():
    """The copy is made around them: a block that cannot be copied shows it."""
    net = nn.Sequential(DiverseBranchBlock(4, 4, 3)).eval()

    class Uncopied(nn.BatchNorm2d):
        def __deepcopy__(self, memo):
            raise AssertionError("a branch was copied")

    net[0].branches["kxk"].bn.__class__ = Uncopied
    assert type(reparameterize(net)[0]) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_requires_grad_survive(dtype):
    net = nn.Sequential(DiverseBranchBlock(4, 4, 3), DiverseBranchBlock(4, 4, 3)).to(dtype).eval()
    net[0].requires_grad_(False)
    folded = reparameterize(net)
    assert folded[0].weight.dtype == dtype
    assert [c.weight.requires_grad for c in folded] == [False, True]


def test_training_mode_is_refused():
    net = model()
    net.head[2].train()
    with pytest.raises(ValueError, match=r"training mode \(head.2 and 0 more\).*call model.eval\(\) first"):
        reparameterize(net)
    with pytest.raises(ValueError, match="the model is in training mode \\(DiverseBranchBlock"):
        reparameterize(DiverseBranchBlock(4, 4, 3))


@pytest.mark.slow
def test_wrapped_models_are_refused():
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*fold model\.module and wrap the result"):
        reparameterize(nn.DataParallel(model()))
    with pytest.raises(ValueError, match=r"wrapped in OptimizedModule.*fold model\._orig_mod"):
        reparameterize(torch.compile(model()))


def test_timm_folds_our_blocks():
    timm = pytest.importorskip("timm.utils.model", reason="timm is not installed")
    before = model()
    before.two = nn.Identity()  # timm replaces a shared module under one of its names only
    after = timm.reparameterize_model(before)
    assert not any(isinstance(m, BranchBlock) for m in after.modules())
    assert_equivalent(before, after.eval(), image(4))
