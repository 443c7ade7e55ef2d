"""Steps in data-parallel training: two processes, each its half of every batch, against what one computes."""

from __future__ import annotations

import pytest
import torch

from tests import halves
from tests.conftest import ROOT
from tests.test_train import TORCHRUN, run

pytestmark = pytest.mark.slow  # processes side by side

EXACT = 1e-10
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> list[dict]:
    """What each of the two processes ended in."""
    folder = tmp_path_factory.mktemp("halves")
    done = run(*TORCHRUN, "-m", "tests.halves", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def parameters(state: dict) -> dict:
    return {name: value for name, value in state.items() if not name.endswith(BUFFERS)}


def assert_same(given: dict, wanted: dict) -> None:
    assert given.keys() == wanted.keys()
    apart = {name: (given[name] - wanted[name]).abs().max().item() for name in wanted}
    assert {name: error for name, error in apart.items() if not error <= EXACT} == {}


@pytest.mark.parametrize("case", halves.CASES)
def test_gradients_are_averaged_and_buffers_broadcast(ended, case):
    """No parameter is left out, else plain DDP would stop in its second step."""
    step, options = halves.CASES[case]
    first, second = (process["own norms"][case] for process in ended)
    assert all(torch.equal(value, parameters(second)[name]) for name, value in parameters(first).items())
    for given, wanted in zip((first, second), halves.alone(step, **options), strict=True):
        assert_same(given, wanted)
    means = [name for name in first if name.endswith("running_mean")]
    assert not any(torch.equal(first[name], second[name]) for name in means)  # each has seen another half last


def test_the_halves_tell_the_cases_apart():
    """Else what is asserted above would hold for whatever a process trains on."""
    sampled, apart, lean = (
        halves.alone(halves.CASES[case][0], **halves.CASES[case][1])[1]
        for case in ("sampled", "sampled, each its own buffers", "lean")
    )
    assert parameters(apart).keys() == parameters(sampled).keys()
    assert all(torch.equal(value, parameters(apart)[name]) for name, value in parameters(sampled).items())
    assert all((apart[name] - sampled[name]).abs().max() > 1e-3 for name in sampled if name.endswith("running_mean"))
    assert (lean["0.branches.kxk.conv.weight"] - sampled["0.branches.kxk.conv.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("case", halves.WITH_SHARED_NORMS)
def test_synchronised_norms_see_both_halves(ended, case):
    wanted = {name: value for name, value in halves.whole().items() if not name.endswith("num_batches_tracked")}
    for process in ended:
        given = process["shared norms"][case]
        assert_same({name: given[name] for name in wanted}, wanted)


def test_a_sampled_step_refuses_synchronised_norms(ended):
    for process in ended:
        assert "SampledStep knows the statistics of one process" in process["refusal"]
        assert process["refusal"].endswith("choose LeanStep() or BranchStep(), or leave the norms unsynchronised")
