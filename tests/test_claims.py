"""The ledger: what it says is what the records say, and what is falsified or stale is noticed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import nbformat
import pytest
import torch

from dbb import claims
from dbb.blocks import ConvBlock
from dbb.claims import CANNOT, DIFFERS, HOLDS, PENDING, UNDECIDED, judge
from dbb.cli import main
from dbb.results import read
from tests.broken import ROOT

MEASURED = re.compile(r"\d+[.,]\d+\s*(?:%|percent|points|pp\b)")


@pytest.fixture(scope="module")
def findings():
    return claims.evaluate(ROOT, claims.ledger(ROOT))


@pytest.fixture
def project(tmp_path):
    """A copy of what the ledger reads, to be falsified."""
    for name in ("data/paper", "data/results", "data/trained", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("data/claims.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def status(root, id_: str) -> str:
    (found,) = claims.evaluate(root, [claim for claim in claims.ledger(root) if claim.id == id_])
    return found.status


@pytest.mark.parametrize(
    "low, high, published, direction, wanted",
    [
        (0.1, 1.0, 0.5, 1, HOLDS),
        (0.1, 0.3, 0.5, 1, HOLDS),  # another size, the same sign
        (-1.0, -0.1, 0.5, 1, DIFFERS),
        (-1.0, -0.1, -0.5, -1, HOLDS),
        (-0.2, 0.6, 0.5, 1, UNDECIDED),  # both no effect and the published one
        (-0.2, 0.3, 0.5, 1, DIFFERS),  # no effect, but not the published one
        (-0.2, 0.3, None, 1, UNDECIDED),
        (None, None, 0.5, 1, UNDECIDED),  # one seed
    ],
)
def test_judge(low, high, published, direction, wanted):
    assert judge(low, high, published, direction) == wanted


def test_the_ledger_says_what_is_found(findings):
    """Statuses are those of now, the README's table too: where this fails, run `dbb claims --update`."""
    assert {f.claim.id: f.claim.status for f in findings} == {f.claim.id: f.status for f in findings}
    assert f"{claims.SECTION}\n\n{claims.markdown(findings)}\n\n{claims.SECTION}" in (ROOT / "README.md").read_text()
    assert {f.status for f in findings} == {HOLDS, DIFFERS, UNDECIDED, PENDING, CANNOT}


def test_recorded_values_are_those_of_the_records(findings):
    """Computed here once more, from the lines themselves."""
    accuracy = {"plain": {}, "dbb": {}}
    for record in read(ROOT / "data/results"):
        recipe = record["recipe"]
        changed = recipe.get("block_options") or recipe.get("sampled_pixels")  # runs of other experiments
        if recipe["epochs"] == 12 and recipe["block"] in accuracy and not changed:
            accuracy[recipe["block"]][recipe["seed"]] = record["test_accuracy"]
    seeds = sorted(accuracy["plain"].keys() & accuracy["dbb"].keys())
    gain = 100 * sum(accuracy["dbb"][s] - accuracy["plain"][s] for s in seeds) / len(seeds)
    found = next(f for f in findings if f.claim.id == "small")
    assert found.recorded.startswith(f"{gain:+.2f} [")


def test_a_falsified_record_is_noticed(project, monkeypatch, capsys):
    path = project / "data/results/runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["recipe"]["name"] == "cifar10_small" and line["recipe"]["block"] == "dbb":
            line["test_accuracy"] -= 0.03
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert status(project, "small") == DIFFERS
    monkeypatch.chdir(project)
    assert main(["claims"]) == 1
    said = capsys.readouterr()
    assert "held before and does not now: small" in said.err and "(was: holds)" in said.out


def test_a_few_seeds_decide_nothing(project):
    """However well they agree."""
    path = project / "data/results/runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, wanted in ((claims.FEWEST_SEEDS, HOLDS), (claims.FEWEST_SEEDS - 1, UNDECIDED)):
        kept = [line for line in lines if line["recipe"]["seed"] < number]
        for line in kept:
            if line["recipe"]["epochs"] == 12:
                line["test_accuracy"] = {"plain": 0.4, "dbb": 0.5}.get(line["recipe"]["block"], 0.4)
                line["test_accuracy"] += line["recipe"]["seed"] / 1000 * (line["recipe"]["block"] == "dbb")
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        assert status(project, "small") == wanted


def test_pairs_of_other_records_are_judged(project):
    """By their sign, and not while they are few."""
    path = project / "data/results/quantization.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    bits = [line for line in lines if line["kind"] == "bits" and line["method"] == "post"]
    for number, size, wanted in ((12, 0.1, HOLDS), (12, -0.1, DIFFERS), (4, 0.1, UNDECIDED), (0, 0.1, PENDING)):
        kept = [line | {"accuracy": line["before"]} for line in bits if line["seed"] < number]
        for line in kept:
            line["accuracy"] -= (size + line["seed"] / 1000) * (line["block"] == "dbb")
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        assert status(project, "few-bits") == wanted


def test_pairs_are_in_points_and_without_records_there_are_none(project):
    path = project / "data/results/quantization.jsonl"
    (claim,) = [claim for claim in claims.ledger(project) if claim.id == "qat"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        line | {"accuracy": 0.5 + 0.25 * (line.get("method") == "qat")} for line in lines if line.get("seed") in (0, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    differences, found = claims.pairs(claim, project)
    assert differences == [25, 25] and (found.difference, found.seeds) == (0.25, 2)
    path.unlink()
    assert claims.pairs(claim, project) == ([], None)


def test_a_changed_cell_of_the_paper_is_noticed(project):
    path = project / "data/paper/table2.csv"
    path.write_text(path.read_text().replace("94.62", "94.92"))
    found = claims.evaluate(project, claims.ledger(project))
    assert claims.markdown(found) not in (project / "README.md").read_text()


def test_a_notebook_that_failed_is_noticed(project):
    assert status(project, "transforms") == HOLDS
    (path,) = project.glob("notebooks/03_*.ipynb")
    notebook = nbformat.read(path, 4)
    next(c for c in notebook.cells if c.cell_type == "code").execution_count = None
    nbformat.write(notebook, path)
    assert status(project, "transforms") == DIFFERS


def test_the_checks_can_fail(monkeypatch):
    exact = ConvBlock.equivalent
    broken = {
        "fold": (
            "dbb.blocks.ConvBlock.equivalent",
            lambda self: replace(exact(self), weight=exact(self).weight * 1.001),
        ),
        "same-network": ("dbb.reparameterize", lambda model: model),
        "border": ("dbb.verify.randomize_norms_", lambda module: module),  # fresh norms hide the border
        "nonlinear-in-training": ("torch.nn.BatchNorm2d.forward", lambda self, x: x),
        "codes": ("dbb.quantize.Grid.scale", lambda self, weight: weight.abs().mean() * torch.rand(())),
    }
    for id_, (place, wrong) in broken.items():
        assert status(ROOT, id_) == HOLDS
        with monkeypatch.context() as patch:
            patch.setattr(place, wrong)
            assert status(ROOT, id_) == DIFFERS, id_


def test_wrong_entries_are_named(project):
    path = project / "data/claims.toml"
    text = path.read_text()
    for old, new, message in (
        ('status = "holds"', 'status = "true"', "lacks a status out of holds"),
        ('check = "fold_is_exact"', "", "'fold' must have one of check"),
        ('check = "fold_is_exact"', 'check = "fold"', "'fold' has check 'fold': there are fold_is_exact, "),
        ('experiment = "resnet50"', 'experiment = "resnet"', "'resnet50' has experiment 'resnet': there are small_cpu"),
        ('id = "same-network"', 'id = "fold"', "two claims with the id fold"),
        ('column = "COCO AP"', 'column = "COCO"', "'coco' cites .* which is not in data/paper/table3.csv"),
    ):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            claims.ledger(project)


@pytest.mark.slow
def test_update_writes_what_is_found_and_only_that(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    assert main(["claims", "--update"]) == 0
    assert "changed: nothing" in capsys.readouterr().out
    text = (project / "data/claims.toml").read_text()
    stale = re.sub(r'(id = "small"\n(?:.*\n)*?status = )"holds"', r'\1"pending"', text, count=1)
    (project / "data/claims.toml").write_text(stale)
    assert stale != text
    assert main(["claims", "--update"]) == 0
    assert "changed: data/claims.toml" in capsys.readouterr().out
    assert (project / "data/claims.toml").read_text() == text


@pytest.mark.slow
def test_more_networks_decide_on_the_average_at_stride_2(project, monkeypatch):
    path = project / "data/trained/small_cpu-dbb-0-training.safetensors"
    for number in range(1, claims.FEWEST_SEEDS):
        shutil.copy(path, path.with_name(path.name.replace("-0-", f"-{number}-")))
    noise = iter(range(100))
    scale = lambda model, stride: stride * 0.1 + next(noise) * 1e-4  # noqa: E731
    monkeypatch.setattr(claims, "_scale_of_average", scale)
    assert status(project, "stride-2-average") == HOLDS
    monkeypatch.setattr(claims, "_scale_of_average", lambda model, stride: -scale(model, stride))
    assert status(project, "stride-2-average") == DIFFERS


@pytest.mark.parametrize("path", sorted((ROOT / "data/paper").glob("*.csv")), ids=lambda path: path.stem)
def test_every_cell_of_the_paper_has_a_source(path):
    cells = claims.paper_cells(path.parent, path.stem)
    assert len(cells) > 4
    for place, cell in cells.items():
        assert cell["source"].strip(), place
        assert cell["value"] or "not established" in cell["source"] or "no number" in cell["source"], place


def test_no_measured_number_stands_in_prose():
    """A share with a decimal is measured, or published: it comes from the ledger, a table or a computation."""
    readme = (ROOT / "README.md").read_text().split(claims.SECTION)
    prose = {"README.md": readme[0] + readme[2]}
    for path in sorted((ROOT / "notebooks").glob("1*.ipynb")):
        cells = nbformat.read(path, 4).cells
        prose[path.name] = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert len(prose) > 3
    assert {name: MEASURED.findall(text) for name, text in prose.items() if MEASURED.search(text)} == {}
    assert MEASURED.search("DBB gains 1.49 points") and MEASURED.search("94.62 %")
