"""The networks of the paper: their sizes, where they take blocks, and that they fold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dbb import DiverseBranchBlock, assert_equivalent, randomize_norms_, reparameterize
from dbb.blocks import BLOCKS, BranchBlock, ConvBlock
from dbb.models import MODELS, build_model

pytestmark = pytest.mark.slow  # whole networks

# Trainable numbers of 1000 classes, as torchvision (plain) and the authors' code (DBB) have them.
KNOWN = {
    ("resnet18", "plain"): 11_689_512,
    ("resnet50", "plain"): 25_557_032,
    ("resnet18", "dbb"): 26_288_296,
    ("resnet50", "dbb"): 40_684_456,
    ("mobilenet_v1", "plain"): 4_231_976,
    ("mobilenet_v1", "dbb"): 4_372_183,
}
INPUTS = {"vgg16": 32, "alexnet": 96, "mobilenet_v1": 64, "resnet18": 64, "resnet50": 64, "small_resnet": 32}
SMALL = {"vgg16": {"width": 0.125}, "mobilenet_v1": {"width": 0.25}, "small_resnet": {"width": 8}}


def on_meta(name: str, block: str, classes: int = 1000) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, classes, block)


def blocks_of(model: nn.Module) -> list[BranchBlock]:
    return [m for m in model.modules() if isinstance(m, BranchBlock)]


@pytest.mark.parametrize("name, block", KNOWN)
def test_sizes_are_those_known(name, block):
    assert sum(p.numel() for p in on_meta(name, block).parameters()) == KNOWN[name, block]


def test_vgg16_is_as_the_paper_says():
    convs = [m for m in on_meta("vgg16", "dbb", 10).modules() if isinstance(m, DiverseBranchBlock)]
    assert [c.out_channels for c in convs] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    linear = [m for m in on_meta("vgg16", "plain", 10).modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(512, 512), (512, 10)]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_stand_where_the_paper_puts_them(name):
    for block in blocks_of(on_meta(name, "dbb")):
        assert isinstance(block, DiverseBranchBlock) == (1 < max(block.kernel_size) < 7)
    assert all(type(block) is ConvBlock for block in blocks_of(on_meta(name, "plain")))
    assert any(block.stride == (2, 2) for block in blocks_of(on_meta("small_resnet", "dbb")))


def test_alexnet_takes_a_block_for_its_5x5_but_not_its_11x11():
    kinds = {block.kernel_size: type(block) for block in blocks_of(on_meta("alexnet", "dbb"))}
    assert kinds == {(11, 11): ConvBlock, (5, 5): DiverseBranchBlock, (3, 3): DiverseBranchBlock}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["vgg16", "mobilenet_v1", "small_resnet", "digits_net"])
def test_they_fold(name, block):
    torch.manual_seed(0)
    model = randomize_norms_(build_model(name, 10, block, **SMALL.get(name, {}))).double().eval()
    channels, size = (1, 8) if name == "digits_net" else (3, INPUTS[name])
    folded = reparameterize(model)
    assert blocks_of(folded) == []
    assert_equivalent(model, folded, torch.rand(2, channels, size, size, dtype=torch.float64))


def test_resnet18_folds():
    model = randomize_norms_(build_model("resnet18", 10, "dbb")).double().eval()
    assert_equivalent(model, reparameterize(model), torch.rand(1, 3, 64, 64, dtype=torch.float64))


def test_a_block_of_ones_own():
    model = build_model("digits_net", 10, lambda *shape, **options: ConvBlock(*shape, **options))
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("arguments, message", [(("vgg19", 10), "vgg19"), (("vgg16", 10, "rep"), "'rep' is not known")])
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(*arguments)
