"""Diverse Branch Block: train a convolution as several branches, fold it exactly into one.

`DiverseBranchBlock` takes the place of a convolution and its batch norm, `reparameterize` folds a trained model back,
`assert_equivalent` proves it. Underneath, `fold` turns any tree of linear layers into one `Affine` convolution.
"""

import dbb.ablation  # noqa: F401 - gives its blocks their names
from dbb.affine import Affine, concat, direct_sum
from dbb.blocks import ACBlock, BranchBlock, ConvBlock, DiverseBranchBlock, RepVGGBlock
from dbb.fold import fold, rule
from dbb.layers import BiasPad, Concat, IdentityBasedConv1x1, Parallel
from dbb.steps import BranchStep, LeanStep, SampledStep, set_training_step
from dbb.surgery import check_optimizer, freeze_norms, reparameterize, replace_convs, survey_convs
from dbb.verify import assert_equivalent, cost, randomize_norms_, report

__version__ = "0.1.0"

__all__ = [
    "ACBlock",
    "Affine",
    "BiasPad",
    "BranchBlock",
    "BranchStep",
    "Concat",
    "ConvBlock",
    "DiverseBranchBlock",
    "IdentityBasedConv1x1",
    "LeanStep",
    "Parallel",
    "RepVGGBlock",
    "SampledStep",
    "assert_equivalent",
    "check_optimizer",
    "concat",
    "cost",
    "direct_sum",
    "fold",
    "freeze_norms",
    "randomize_norms_",
    "reparameterize",
    "replace_convs",
    "report",
    "rule",
    "set_training_step",
    "survey_convs",
]
