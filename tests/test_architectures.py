"""Surgery on the networks of torchvision and timm: blocks in, a few steps of training, blocks out, nothing lost."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from dbb import DiverseBranchBlock, assert_equivalent, randomize_norms_, reparameterize, replace_convs, survey_convs
from dbb.blocks import BranchBlock

pytestmark = pytest.mark.slow  # other libraries' networks

CLASSES = 5
# How many convolutions of 1 < K < 7 have a batch norm of their own behind them.
REPLACED = {
    "torchvision.resnet18": 16,
    "torchvision.resnext50_32x4d": 16,
    "torchvision.regnet_y_400mf": 17,
    "torchvision.mobilenet_v2": 18,
    "torchvision.mobilenet_v3_small": 12,
    "torchvision.efficientnet_b0": 17,
    "torchvision.shufflenet_v2_x0_5": 20,
    "torchvision.vgg11_bn": 8,
    "torchvision.inception_v3": 29,
    "torchvision.googlenet": 19,
    "torchvision.mnasnet0_5": 18,
    "timm.resnet10t": 11,
    "timm.seresnext26d_32x4d": 11,
    "timm.regnety_002": 14,
    "timm.tf_mobilenetv3_small_minimal_100": 7,
    "timm.ghostnet_050": 42,
    "timm.skresnet18": 24,
    "timm.lcnet_050": 14,
    "timm.dla34": 26,
    "timm.cspresnet50": 16,
    "timm.repvgg_a0": 22,
    "timm.repvit_m0_9": 28,
}
# Networks with none, and what is said of their convolutions.
NOTHING = {
    "torchvision.densenet121": "58 left alone, no batch norm reads it, but cat: features.denseblock1.denselayer1.conv2",
    "torchvision.convnext_tiny": "18 left alone, kernel 7x7, outside of 1 < K < 7",
    "torchvision.squeezenet1_1": "9 left alone, no batch norm reads it, but ReLU",
    "timm.convnext_atto": "1 left alone, no batch norm reads it, but permute: stem.0",
    "timm.densenet121": "58 left alone, no batch norm reads it, but cat",
}
SIZES = {"torchvision.inception_v3": 299}  # its second head, which is there in training only, needs all of them
FOLD_THEMSELVES = ("timm.repvgg_a0", "timm.repvit_m0_9")  # their layers read those that they fold


def build(name: str) -> nn.Module:
    library, name = name.split(".")
    if library == "timm":
        return timm.create_model(name, num_classes=CLASSES)
    extra = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **extra)
    if name.startswith("vgg"):  # 120 million weights that have no part in this
        model.classifier = nn.Linear(512 * 7 * 7, CLASSES)
    return model


def trained(model: nn.Module, size: int) -> nn.Module:
    """A few steps on noise, from random statistics."""
    randomize_norms_(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        answers = model(torch.rand(2, 3, size, size, dtype=torch.float64))
        heads = [answers] if isinstance(answers, torch.Tensor) else answers  # some have others for training
        loss = sum(F.cross_entropy(head, torch.arange(2)) for head in heads)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    return model.eval()


@pytest.mark.parametrize("name", REPLACED)
def test_blocks_in_trained_and_out_again(name):
    torch.manual_seed(0)
    size = SIZES.get(name, 64)
    untouched = build(name).double().eval()
    model = replace_convs(untouched, say=None)
    blocks = [m for m in model.modules() if isinstance(m, DiverseBranchBlock)]
    assert len(blocks) == REPLACED[name]
    model = trained(model, size)
    assert all(block.branches["1x1_kxk"].conv.weight.grad.any() for block in blocks)
    x = torch.rand(1, 3, min(size, 96), min(size, 96), dtype=torch.float64)
    folded = reparameterize(model)
    assert not any(isinstance(m, BranchBlock) for m in folded.modules())
    assert_equivalent(model, folded, x)

    restored = reparameterize(model, restore=True, say=None)
    untouched.load_state_dict(restored.state_dict())  # strictly
    assert_equivalent(model, untouched, x)
    by_timm = timm.utils.model.reparameterize_model((restored if name in FOLD_THEMSELVES else model).float())
    assert not any(isinstance(m, BranchBlock) for m in by_timm.modules())
    assert_equivalent(folded.float(), by_timm, x.float())  # timm's own folding knows only float32


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_fits_it_is_said_why(name):
    model = build(name)
    with pytest.raises(ValueError, match="nothing to replace: 0 of") as caught:
        replace_convs(model)
    assert NOTHING[name] in str(caught.value)
    assert not survey_convs(model).replaced
