"""Diagrams of modules: every layer has its box, and no two overlap."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from dbb import BranchBlock, Concat, DiverseBranchBlock, Parallel, RepVGGBlock, plots
from dbb._diagrams import layout

conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
mean = nn.Sequential(nn.AvgPool2d(2, stride=2), nn.Conv2d(4, 8, 1, groups=4, dilation=2))
nested = nn.Sequential(nn.Identity(), Parallel(conv, nn.Sequential(norm, Concat(conv, mean)), nn.Identity()), nn.ReLU())
block = DiverseBranchBlock(4, 4, 3, padding=1, nonlinear=nn.ReLU())
MODULES = {
    "a layer": (conv, "3×3", ""),
    "nothing": (nn.Sequential(nn.Identity()), "", ""),
    "nested": (nested, "3×3 norm 3×3 mean 2×2 stride 2 1×1 groups 4 ReLU", "≡+"),
    "block": (block, "3×3 norm 1×1 norm 1×1 norm bias pad 3×3 norm 1×1 norm bias pad mean 3×3 norm ReLU", "+"),
    "folded": (DiverseBranchBlock(4, 4, 3, deploy=True), "3×3", ""),
    "reflect": (
        RepVGGBlock(4, 4, (1, 3), padding=(0, 1), padding_mode="reflect"),
        "pad reflect 1×3 norm crop 1×1 norm crop norm",
        "+",
    ),
    "strides": (BranchBlock({"a": nn.Conv2d(4, 4, 3, (1, 2), dilation=2)}), "3×3 stride 1×2, dilation 2", "+"),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_layer_is_drawn_in_its_place(name):
    module, words, signs = MODULES[name]
    drawing = layout(module)
    assert " ".join(line for box in drawing.boxes for line in box[4]) == words
    assert [symbol for _, _, symbol in drawing.signs] == list(signs)
    for x, y, width, height, *_ in drawing.boxes:
        assert width / 2 <= x <= drawing.width - width / 2 and abs(y) <= (drawing.height - height) / 2
    for a, b in itertools.combinations(drawing.boxes, 2):
        assert abs(a[0] - b[0]) > (a[2] + b[2]) / 2 or abs(a[1] - b[1]) > (a[3] + b[3]) / 2
    for points, _ in drawing.wires:
        assert all(0 <= x <= drawing.width + 1e-9 and abs(y) <= drawing.height / 2 for x, y in points)


def test_branches_have_their_colours():
    ax = plots.module_diagram(block, title="a block")
    assert {line.get_color() for line in ax.lines} == {*list(plots.BRANCH_COLOURS.values())[:4], plots.INK}
    assert ax.get_title() == "a block" and ax.figure.get_size_inches()[0] > 6
