"""The benchmarks: that they run, print what they promise, and compare what they say they compare."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbb import DiverseBranchBlock
from tests.conftest import ROOT

FIELDS = {"case", "block", "image", "batch", "device", "dtype", "layout", "way", "clock", "form", "seconds"}
FIELDS |= {"ratio", "saved_bytes", "rounds", "threads", "hardware", "versions", "commit"}


@pytest.fixture
def training_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training_cost

    monkeypatch.setitem(training_cost.LAYERS, "4-4-6", training_cost.layer("4-4-6", 2))
    return training_cost


def run(training_cost, tmp_path, *arguments: str) -> list[dict]:
    results = tmp_path / "results.jsonl"
    training_cost.main(["--devices", "cpu", "--rounds", "2", "--results", str(results), *arguments])
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_training_cost_of_a_layer(training_cost, tmp_path, monkeypatch, capsys):
    authors = tmp_path / "authors"
    authors.mkdir()
    (authors / "diversebranchblock.py").write_text("from dbb import DiverseBranchBlock\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    records = run(training_cost, tmp_path, "--layers", "4-4-6", "--reference", str(authors))
    monkeypatch.delitem(sys.modules, "diversebranchblock")
    assert [r["form"] for r in records] == list(training_cost.FORMS) * 2
    assert all(set(r) == FIELDS and r["seconds"] > 0 and r["rounds"] == 2 for r in records)
    plain, branch, lean = (records[n] for n in range(3))
    assert plain["ratio"] == 1 and plain["saved_bytes"] < lean["saved_bytes"] < branch["saved_bytes"]
    printed = capsys.readouterr().out
    assert "4-4-6, batch 2, cpu, bfloat16, channels_last, eager, wall time" in printed
    assert all(f"\n{form} " in printed for form in training_cost.FORMS) and printed.count(" 1.00 ") >= 2


def test_training_cost_of_a_network(training_cost, tmp_path):
    arguments = ["--layers", "--networks", "small_resnet", "--batch", "2", "--dtypes", "float32"]
    records = run(training_cost, tmp_path, *arguments, "--forms", "lean", "orepa")
    assert [(r["case"], r["form"], r["batch"]) for r in records] == [
        ("small_resnet", form, 2) for form in ("plain", "lean", "orepa")
    ]


def test_training_cost_lists_without_running(training_cost, capsys):
    training_cost.main(["--list"])
    assert "64-128-56-s2" in capsys.readouterr().out


def test_forms_differ_only_where_blocks_are(training_cost):
    case = training_cost.network("small_resnet")
    models = {form: training_cost.in_form(case, form) for form in ("plain", "lean", "orepa")}
    for form, kind in (("lean", DiverseBranchBlock), ("orepa", training_cost.OrepaStyle)):
        assert sum(isinstance(m, kind) for m in models[form].modules()) == 7
    assert sum(type(m) is nn.Conv2d for m in models["plain"].modules()) == 9


@pytest.mark.parametrize("shape", [(4, 4, 1, 1), (4, 6, 2, 1), (4, 6, 2, 2), (4, 4, 1, 4)])
def test_orepa_merges_exactly(training_cost, shape):
    torch.manual_seed(0)
    block = training_cost.OrepaStyle(*shape).double()
    nn.init.normal_(block.scales)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), branch_by_branch(block, x))


def branch_by_branch(block: nn.Module, x: Tensor) -> Tensor:
    """The definition of what the merged block computes."""
    k, stride, groups = block.kernels, block.stride, block.groups
    mixed = F.conv2d(x, k["average"], groups=groups) if "average" in k else x
    branches = [
        F.conv2d(x, k["kxk"], None, stride, 1, 1, groups),
        F.conv2d(F.conv2d(x, k["first"], groups=groups), k["second"], None, stride, 1, 1, groups),
        F.avg_pool2d(mixed, 3, stride, 1),
    ]
    if "1x1" in k:
        branches.append(F.conv2d(x, k["1x1"], None, stride, 0, 1, groups))
    return block.norm(sum(scale * branch for scale, branch in zip(block.scales[..., None, None], branches)))
