"""The matrix of runs: what is done, what is pending, and doing the next ones within a budget."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dbb import matrix
from dbb.checkpoint import facts_of, load_model
from dbb.cli import main
from dbb.matrix import EXPERIMENTS, Experiment, compare, find_record, reproduce, seconds, state_of
from dbb.recipes import TrainingRecipe, recipe
from dbb.results import append, read
from dbb.tasks import key_of
from tests.conftest import ROOT

TINY = recipe("digits", epochs=1, batch_size=100, train_images=200, model_options={"width": 2})
PAIR = {"plain": {}, "dbb": {"block": "dbb"}}
EXPERIMENT = Experiment("tiny", "does it run?", TINY, PAIR, seeds=2, device="cpu")


def line_of(run: matrix.Run, accuracy: float = 0.5) -> dict:
    return {"recipe": run.recipe.as_dict(), "device": run.device, "test_accuracy": accuracy, "seconds": 2.0}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder of its own, in which the runs use this package and one thread each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_every_run_has_its_own_name_and_a_complete_recipe():
    runs = matrix.all_runs()
    assert len({run.name for run in runs}) == len({(run.recipe.name, str(run.recipe), run.device) for run in runs})
    assert len({run.name for run in runs}) == len(runs) > 100


def test_experiments_share_their_runs():
    shared = [run for run in EXPERIMENTS["ablation_cpu"].runs if run.variant in ("plain", "dbb")]
    assert len(shared) == 20
    names = {run.name for run in matrix.all_runs()}
    assert not any(run.name in names for run in shared)
    own = {run.name for run in matrix.all_runs("ablation_cpu")}
    assert {run.name for run in shared} <= own


def test_the_experiment_that_decides_compares_equal_epochs_and_equal_time():
    small = EXPERIMENTS["small_cpu"]
    assert small.device == "cpu" and small.seeds >= 10 and small.recipe.data == "cifar10_jpeg"
    assert list(small.variants) == ["plain", "acb", "dbb", "plain_as_long"]
    assert small.variants["plain_as_long"]["epochs"] > 4 * small.recipe.epochs


def test_a_run_is_done_when_its_record_is_there(tmp_path):
    first, other, *_ = EXPERIMENT.runs
    assert state_of(first, [], tmp_path) == "pending"
    assert state_of(first, [line_of(first)], tmp_path) == "done" and find_record(other, [line_of(first)]) is None
    assert find_record(replace(first, device="cuda"), [line_of(first)]) is None
    older = line_of(first)
    del older["recipe"]["image_size"]  # a value that recipes learned later has its default
    assert find_record(first, [older]) is older


def test_what_a_run_waits_for_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (gpu,) = [run for run in EXPERIMENTS["cifar10"].runs if run.name == "cifar10-dbb-3"]
    assert state_of(gpu, [], tmp_path) == "needs a GPU"
    (cpu,) = [run for run in EXPERIMENTS["small_cpu"].runs if run.name == "small_cpu-dbb-3"]
    assert state_of(cpu, [], tmp_path) == f"needs cifar10_jpeg in {tmp_path}"
    (tmp_path / "cifar10_jpeg").mkdir()
    assert state_of(cpu, [], tmp_path) == "pending"


def test_differences_are_paired():
    """Two seeds that scatter alike: the difference is known far better than either accuracy."""
    records = [line_of(run, 0.4 + 0.1 * run.recipe.seed + 0.02 * (run.variant == "dbb")) for run in EXPERIMENT.runs]
    records[-1]["test_accuracy"] += 0.002
    plain, dbb = compare(EXPERIMENT, records)
    assert (plain.mean, plain.spread, plain.difference) == (pytest.approx(0.45), pytest.approx(0.0707, abs=1e-4), None)
    assert dbb.difference == pytest.approx(0.021) and dbb.seeds == 2
    # Student's t of one degree of freedom: 12.706 standard errors, of 0.001
    assert (dbb.low, dbb.high) == (pytest.approx(0.021 - 0.012706, abs=1e-6), pytest.approx(0.021 + 0.012706, abs=1e-6))
    assert dbb.verdict == "undecided"  # two seeds may agree by luck
    assert replace(dbb, seeds=matrix.FEWEST_SEEDS).verdict == "better"


@pytest.mark.parametrize("shift, verdict", [(0.02, "better"), (-0.02, "worse"), (0.0, "undecided")])
def test_a_verdict_leaves_zero_out(shift, verdict):
    noise = [0.001, -0.001]
    records = [line_of(run, 0.5 + (shift + noise[run.recipe.seed]) * (run.variant == "dbb")) for run in EXPERIMENT.runs]
    assert replace(compare(EXPERIMENT, records)[1], seeds=matrix.FEWEST_SEEDS).verdict == verdict


def records_of(**scores: list[float]) -> list[dict]:
    return [
        {"seed": seed, "block": block, "data": {"name": "digits"}, "accuracy": score, "before": 0.5}
        for block, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]


def test_other_records_are_compared_by_what_they_hold():
    records = records_of(plain=[0.50, 0.60, 0.70], dbb=[0.52, 0.61, 0.75, 0.99])
    records += [r | {"data": {"name": "other"}, "accuracy": 0.0} for r in records]
    wanted = [{"block": block, "data": {"name": "digits"}} for block in ("dbb", "plain")]
    dots, found = matrix.compare_records(records[::-1], *wanted)
    assert dots == pytest.approx([0.02, 0.01, 0.05])
    assert (found.seeds, found.seconds) == (3, None)
    assert (found.difference, found.low, found.high) == pytest.approx(matrix.paired(torch.tensor(dots).double()))
    assert found.mean == pytest.approx((0.52 + 0.61 + 0.75) / 3)
    assert matrix.compare_records(records, wanted[0], {"block": "acb"}) == ([], None)
    assert matrix.compare_records(records, wanted[0] | {"bits": 8}, wanted[1]) == ([], None)


def test_a_value_may_be_taken_less_another_and_the_last_record_counts():
    records = records_of(plain=[0.4], dbb=[0.9])
    records += [records[1] | {"accuracy": 0.6, "before": 0.3}]
    dots, found = matrix.compare_records(records, {"block": "dbb"}, {"block": "plain"}, "accuracy", "before")
    assert dots == pytest.approx([0.4]) and found.low is None and found.spread is None


def test_only_seeds_that_all_variants_have_are_compared():
    records = [line_of(run) for run in EXPERIMENT.runs[:3]]
    assert [c.seeds for c in compare(EXPERIMENT, records)] == [1, 1]
    assert compare(EXPERIMENT, records)[1].low is None and compare(EXPERIMENT, records)[1].verdict == ""
    assert compare(EXPERIMENT, records[:1]) == []


@pytest.mark.parametrize("text, wanted", [("90s", 90), ("9m", 540), ("1.5h", 5400)])
def test_budgets(text, wanted):
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["9", "m", "", "nine minutes"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(ValueError, match="must be a number and s, m or h"):
        seconds(text)


@pytest.mark.slow
def test_the_next_runs_are_done_once(here):
    said: list[str] = []
    ended = reproduce(EXPERIMENT.runs[:2], 240, here / "results", here, jobs=2, say=said.append)
    assert sorted(ended["done"]) == ["tiny-dbb-0", "tiny-plain-0"] and not ended["failed"] + ended["stopped"]
    assert all("test accuracy" in line for line in said)
    records = read(here / "results")
    assert [state_of(run, records, here) for run in EXPERIMENT.runs] == ["done", "done", "pending", "pending"]
    assert reproduce(EXPERIMENT.runs[:2], 60, here / "results", here, say=said.append)["done"] == []


def test_a_run_that_fails_is_told_and_leaves_no_record(here):
    bad = replace(EXPERIMENT.runs[0], recipe=replace(TINY, data="nowhere", seed=7))
    (here / "nowhere").mkdir()
    said: list[str] = []
    assert reproduce([bad], 120, here / "results", here, say=said.append)["failed"] == ["tiny-plain-7"]
    assert "is no image folder" in said[0] and read(here / "results") == []


LONG = Experiment("long", "does it stop?", recipe("digits", epochs=100_000), {"plain": {}}, seeds=1, device="cpu")
STATE = Path("build/runs/long-plain-0/resume.pt")


def run_long(here: Path, said: list[str]) -> dict[str, list[str]]:
    return reproduce(LONG.runs, 300, here / "results", here, jobs=1, say=said.append)


def assert_stopped_with_its_state(here: Path, said: list[str]) -> None:
    assert "stopped in epoch" in said[0] and STATE.exists() and read(here / "results") == []


@pytest.mark.slow
def test_out_of_time_a_run_is_stopped_with_its_state_saved(here, monkeypatch):
    real, said = time.monotonic, []
    clock = SimpleNamespace(monotonic=lambda: real() + 1000 * STATE.exists(), sleep=time.sleep)
    monkeypatch.setattr(matrix, "time", clock)  # time is up as soon as there is something to save
    assert run_long(here, said)["stopped"] == ["long-plain-0"]
    assert_stopped_with_its_state(here, said)


@pytest.mark.slow
def test_interrupted_it_leaves_no_run_behind(here, monkeypatch):
    def sleep(pause: float) -> None:
        time.sleep(pause)
        if STATE.exists():
            raise KeyboardInterrupt

    said: list[str] = []
    monkeypatch.setattr(matrix, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    with pytest.raises(KeyboardInterrupt):
        run_long(here, said)
    assert_stopped_with_its_state(here, said)


@pytest.mark.slow
def test_asked_to_end_it_leaves_no_run_behind(here, monkeypatch):
    """SIGTERM, as a batch system sends it."""

    def sleep(pause: float) -> None:
        time.sleep(pause)
        if STATE.exists():
            os.kill(os.getpid(), signal.SIGTERM)

    said: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(matrix, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    run_long(here, said)
    assert_stopped_with_its_state(here, said)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_lists(here, capsys):
    run = next(r for r in EXPERIMENTS["small_cpu"].runs if r.name == "small_cpu-dbb-0")
    append(here / "results", line_of(run, 0.5) | {"test_accuracy": 0.5})
    assert main(["reproduce", "--list", "--select", "small_cpu-", "--results", "results"]) == 0
    shown = capsys.readouterr().out
    assert "small_cpu-dbb-0" in shown and "done 50.00%" in shown and "needs cifar10_jpeg" in shown
    assert main(["reproduce", "--select", "nothing"]) == 2
    assert "no run has 'nothing' in its name" in capsys.readouterr().err
    assert main(["reproduce", "--budget", "9"]) == 2


def test_records_lie_in_files_of_any_name(tmp_path):
    append(tmp_path, {"a": 1}, "other.jsonl")
    append(tmp_path, {"a": 2}, "other.jsonl")
    assert read(tmp_path, "other.jsonl") == [{"a": 1}, {"a": 2}] and read(tmp_path) == []


def test_the_records_kept_are_of_runs_of_the_matrix():
    """What is on file belongs to an experiment, is complete, and was made from a commit without changes."""
    records = read(ROOT / "data/results")
    runs = [run for run in matrix.all_runs() if find_record(run, records)]
    assert len(runs) == len(records) > 0
    for record in records:
        key = key_of(record["recipe"])
        assert record[key] == record[f"folded_{key}"] == record["epochs"][-1][key]
        assert len(record["epochs"]) == record["recipe"]["epochs"]
        assert record["commit"] and not record["commit"].endswith("+")
        assert json.dumps(record["data"])


@pytest.mark.parametrize("name", ["scenes_detect_cpu", "scenes_segment_cpu"])
def test_a_detector_or_segmenter_that_is_kept_is_that_of_its_record(name):
    (run,) = (run for run in EXPERIMENTS[name].runs if (run.variant, run.recipe.seed) == ("dbb", 0))
    record = find_record(run, read(ROOT / "data/results"))
    about = facts_of(path := ROOT / f"data/trained/{run.name}-training.safetensors")
    key = key_of(about["recipe"])
    assert (about["form"], about[key], about["commit"]) == ("training", record[key], record["commit"])
    assert TrainingRecipe(**about["recipe"]) == run.recipe
    assert path.stat().st_size < 2_500_000


def test_the_network_that_is_kept_is_that_of_its_record():
    record = find_record(EXPERIMENTS["small_cpu"].runs[2], read(ROOT / "data/results"))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    answers = {}
    for form in ("training", "folded"):
        path = ROOT / f"data/trained/small_cpu-dbb-0-{form}.safetensors"
        model, about = load_model(path)
        assert (about["form"], about["test_accuracy"]) == (form, record["test_accuracy"])
        assert TrainingRecipe(**about["recipe"]) == EXPERIMENTS["small_cpu"].runs[2].recipe
        assert path.stat().st_size < 2_500_000
        answers[form] = model(x).detach()
    torch.testing.assert_close(answers["training"], answers["folded"], rtol=1e-4, atol=1e-4)
