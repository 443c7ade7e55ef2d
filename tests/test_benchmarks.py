"""The benchmarks: that they run, print what they promise, and compare what they say they compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbb import DiverseBranchBlock
from dbb.recipes import recipe
from dbb.results import read
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # the scripts

FIELDS = {"case", "block", "image", "batch", "device", "dtype", "layout", "way", "clock", "form", "seconds"}
FIELDS |= {"ratio", "saved_bytes", "rounds", "threads", "hardware", "versions", "commit"}


@pytest.fixture
def training_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training_cost

    monkeypatch.setitem(training_cost.LAYERS, "4-4-256", training_cost.layer("4-4-256", 2))
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
    records = run(training_cost, tmp_path, "--layers", "4-4-256", "--reference", str(authors))
    monkeypatch.delitem(sys.modules, "diversebranchblock")
    assert [r["form"] for r in records] == list(training_cost.FORMS) * 2
    assert all(set(r) == FIELDS and r["seconds"] > 0 and r["rounds"] == 2 for r in records)
    plain, branch, lean = (records[n] for n in range(3))
    assert plain["ratio"] == 1 and plain["saved_bytes"] < lean["saved_bytes"] < branch["saved_bytes"]
    printed = capsys.readouterr().out
    assert "4-4-256, batch 2, cpu, bfloat16, channels_last, eager, wall time" in printed
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


# What few bits and fewer channels cost

ALL = {"job", "kind", "block", "seed", "recipe", "data", "hardware", "versions", "commit"}
BITS = ALL | {"method", "before", "crest", "bits", "per_channel", "float", "accuracy", "trained_form"}


@pytest.fixture
def quantize(monkeypatch, tmp_path):
    """The benchmark with everything small, in a folder of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quantize

    small = recipe("digits", epochs=1, batch_size=200, model_options={"width": 4}, train_images=400)
    monkeypatch.setitem(quantize.SETTINGS, "digits", quantize.Setting(small, epochs=1, tests=50))
    monkeypatch.setattr(quantize, "GRIDS", [quantize.Grid(8), quantize.Grid(3, False)])
    monkeypatch.setattr(quantize, "TRAINED_GRIDS", [quantize.Grid(3, False)])
    monkeypatch.chdir(tmp_path)
    return quantize


def quantized(quantize, *arguments: str) -> list[dict]:
    quantize.main([*arguments, "--seeds", "1", "--results", "results"])
    return read(Path("results"), quantize.RESULTS)


def test_bits_of_a_network(quantize, capsys):
    records = quantized(quantize, "--select", "bits-dbb")
    trained = ["qat", "qat_folded", "qat_branches"]
    assert [r["method"] for r in records] == [m for m in ("post", "finetuned", "norms") for _ in range(2)] + trained
    assert all(set(r) == BITS and r["block"] == "dbb" and 0 <= r["accuracy"] <= 1 for r in records)
    assert len({r["before"] for r in records}) == 1 and records[0]["float"] == records[0]["before"]
    quantize.main(["--list", "--seeds", "1", "--results", "results"])
    assert "digits-bits-dbb-0                        done\n" in capsys.readouterr().out
    assert quantized(quantize, "--select", "bits-dbb") == records  # nothing is done twice


def test_channels_and_decay(quantize):
    """However the penalties are weighed, what is cut answers the same, or the benchmark stops."""
    records = quantized(quantize, "--select", "0.5")
    assert [(r["block"], r["group"]) for r in records if r["kind"] == "channels"] == [
        ("plain", "merged"), ("dbb", "merged"), ("dbb", "branches")
    ]  # fmt: skip
    for r in (r for r in records if r["kind"] == "channels"):
        assert r["accuracy"] == r["float"] and r["macs"] <= r["whole"]["macs"] and r["weight"] == 0.5
    records = quantized(quantize, "--select", "decay-dbb-merged-0.05-")
    decayed = [r for r in records if r["kind"] == "decay"]
    assert [(r["bits"], r["group"]) for r in decayed] == [(8, "merged"), (3, "merged")]
    assert all(len(r["sizes"]) == 2 and r["recipe"]["weight_decay"] == 5e-4 for r in decayed)


def test_each_setting_reads_its_own_recipe(quantize):
    jobs = list(quantize.jobs_of("digits", 2))
    assert len({job.name for job in jobs}) == len(jobs)
    assert {(job.recipe.block, job.recipe.seed) for job in jobs} == {(b, s) for b in ("plain", "dbb") for s in (0, 1)}
    assert {job.kind for job in quantize.jobs_of("cifar10_jpeg", 1)} == {"bits"}


def test_weights_take_a_byte_in_int8(quantize):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    assert quantize.weight_bytes("float", model) == 4 * (72 + 4 + 12 + 3)
    assert quantize.weight_bytes("int8", model) == 72 + 12 + 2 * 4 * (4 + 3)


def test_latency_says_what_it_timed(quantize, monkeypatch):
    monkeypatch.setattr(quantize, "compiled", lambda model, x: model)  # a compiler takes minutes
    found = list(quantize.latency("digits_net", 2, rounds=2))
    assert [(r["form"], r["way"]) for r in found] == [("float", "eager"), ("float", "compiled"), ("int8", "compiled")]
    assert found[1]["ratio"] == 1 and all(r["seconds"] > 0 and r["network"] == "digits_net" for r in found)
    assert found[2]["bytes"] < 0.4 * found[1]["bytes"]
