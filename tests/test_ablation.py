"""The blocks that only the ablation needs, and that each variant is what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dbb import DiverseBranchBlock, assert_equivalent, fold, randomize_norms_, reparameterize
from dbb.ablation import VARIANTS, FoldedStartBlock, LinearBlock
from dbb.blocks import ConvBlock
from dbb.layers import IdentityBasedConv1x1
from dbb.recipes import recipe
from tests.support import image

pytestmark = pytest.mark.slow  # whole networks

SMALL = {"model_options": {"width": 4}}


def blocks(variant: str) -> list[ConvBlock]:
    """The 3x3 blocks of the network that the variant trains."""
    torch.manual_seed(0)
    model = recipe("cifar10_small", **SMALL, **VARIANTS[variant]).build_model(10)
    return [m for m in model.modules() if isinstance(m, ConvBlock) and m.kernel_size == (3, 3)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_folds_to_the_plain_network(variant):
    torch.manual_seed(0)
    model = randomize_norms_(recipe("cifar10_small", **SMALL, **VARIANTS[variant]).build_model(10)).double().eval()
    plain = recipe("cifar10_small", **SMALL).build_model(10).eval()
    folded = reparameterize(model)
    assert_equivalent(model, folded, image(3, 32, 32))
    shapes = {name: tensor.shape for name, tensor in folded.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reparameterize(plain).state_dict().items()}


def names(block: ConvBlock) -> list[str]:
    return [name for name, _ in block.branches.named_children()]


def norms(block: ConvBlock) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in block.modules())


def test_branches_are_those_named():
    everything = ["kxk", "1x1", "1x1_kxk", "1x1_avg"]
    assert names(blocks("dbb")[0]) == everything
    for missing in everything:
        assert names(blocks(f"without_{missing}")[0]) == [name for name in everything if name != missing]
    assert names(blocks("kxk_1x1")[0]) == ["kxk", "1x1"]
    for number, variant in ((2, "double_duplicate"), (3, "triple_duplicate")):
        convs = [m for m in blocks(variant)[0].modules() if isinstance(m, nn.Conv2d)]
        assert [conv.kernel_size for conv in convs] == [(3, 3)] * number
        assert norms(blocks(variant)[0]) == number


def test_linear_is_linear_while_it_trains():
    """Twice the input is twice what enters the one norm, whatever the batch."""
    block = LinearBlock(3, 4, 3, padding=1).double()
    assert norms(block) == 1 and norms(blocks("kxk_1x1")[0]) == 2
    convs, x = block.branches["sum"].convs, image(3)
    assert torch.allclose(convs(2 * x), 2 * convs(x))
    assert not torch.allclose(block(x), block(x * torch.rand_like(x)))
    with pytest.raises(ValueError, match=r"parts \['avg'\] are not known: choose from kxk, 1x1"):
        LinearBlock(3, 4, 3, parts=["kxk", "avg"])


@pytest.mark.parametrize("geometry", [{"padding": 1}, {"padding": 1, "stride": 2}, {"kernel_size": 5, "padding": 2}])
def test_folded_start_is_where_a_dbb_starts(geometry):
    shape = {"in_channels": 3, "out_channels": 4, "kernel_size": 3} | geometry
    torch.manual_seed(0)
    block = FoldedStartBlock(**shape)
    assert names(block) == ["kxk"]
    torch.manual_seed(0)
    nn.Conv2d(3, 4, shape["kernel_size"], bias=False)  # which the branch drew first
    kernel, _ = DiverseBranchBlock(**shape).get_equivalent_kernel_bias()
    assert torch.equal(block.branches["kxk"].conv.weight, kernel)


def test_the_other_questions():
    assert {float(b.branches[name].bn.weight.mean()) for b in blocks("gamma_half") for name in names(b)} == {0.5}
    single = blocks("single_init")[0]
    assert [bool(fold(single.branches[name]).weight.any()) for name in names(single)] == [True, False, False, False]
    for variant, ratio in (("internal_half", 0.5), ("dbb", 1), ("internal_double", 2)):
        block = blocks(variant)[1]
        assert block.branches["1x1_kxk"].conv.in_channels == ratio * block.in_channels
    first = {v: type(blocks(v)[1].branches["1x1_kxk"].pointwise.prefix.conv) for v in ("dbb", "without_identity")}
    assert first == {"dbb": IdentityBasedConv1x1, "without_identity": nn.Conv2d}
    assert blocks("border_batch")[0].branches["1x1_kxk"].pointwise.border == "batch"
