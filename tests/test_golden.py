"""The blocks compute what the authors' code computes: evaluation, equivalent kernel, and a whole training step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dbb
from dbb.reference import from_reference
from dbb.steps import BranchStep, LeanStep, set_training_step

FILES = sorted(Path(__file__).with_name("golden").glob("*.safetensors"))
BLOCKS = {"DiverseBranchBlock": dbb.DiverseBranchBlock, "ACBlock": dbb.ACBlock}
each_step = pytest.mark.parametrize("step", [BranchStep(), LeanStep(always=True)], ids=["branches", "lean"])


class Golden:
    """One file: a block in the reference's words, and the same block in ours."""

    def __init__(self, path: Path, dtype: torch.dtype, step=None) -> None:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata())
            self.tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
        self.block = BLOCKS[facts.pop("block")](**{k: int(v) for k, v in facts.items()}).to(dtype)
        set_training_step(self.block, step or LeanStep())
        self.block.load_state_dict({from_reference(k): v for k, v in self.under("state/").items()})
        self.input = self["eval/input"].to(dtype)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and gradient of the input."""
        x = self.input.clone().requires_grad_()
        y = self.block.train()(x)
        y.backward(self["train/grad_output"].to(y))
        return y, x.grad


def error(given: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor | float | None = None) -> float:
    largest = wanted.abs().max() if scale is None else scale
    return ((given.double() - wanted).abs().max() / largest).item()


def discrepancies(golden: Golden) -> dict[str, float]:
    """Every number that the file holds against ours, relative to what the README of the files asks."""
    block = golden.block.eval()
    kernel, bias = block.get_equivalent_kernel_bias()
    found = {
        "eval/output": error(block(golden.input), golden["eval/output"]),
        "fused/weight": error(kernel, golden["fused/weight"]),
        "fused/bias": error(bias, golden["fused/bias"]),
    }
    y, grad = golden.train_step()
    found |= {
        "train/output": error(y, golden["train/output"]),
        "train/grad_input": error(grad, golden["train/grad_input"]),
    }
    parameters, buffers = dict(block.named_parameters()), dict(block.named_buffers())
    wanted = golden.under("train/grad/")
    assert len(wanted) == len(parameters)
    # A gradient that is nearly zero by nature (of a scale in front of a norm) is measured by the block's largest.
    largest = max(w.abs().max() for w in wanted.values())
    for name, gradient in wanted.items():
        scale = max(gradient.abs().max(), 1e-2 * largest)
        found[f"train/grad/{name}"] = error(parameters[from_reference(name)].grad, gradient, scale)
    for name, buffer in golden.under("train/buffers_after/").items():
        found[f"train/buffers_after/{name}"] = error(buffers[from_reference(name)], buffer)
    return found


def too_large(found: dict[str, float], tolerance: float, fused: float) -> dict[str, float]:
    return {k: v for k, v in found.items() if not v <= (fused if k.startswith("fused/") else tolerance)}


def test_there_are_golden_files():
    assert len(FILES) == 6


@each_step
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_float64(path, step):
    found = discrepancies(Golden(path, torch.float64, step))
    assert len(found) >= 20
    assert too_large(found, 1e-9, 1e-7) == {}


@each_step
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_float32_up_to_rounding(path, step):
    found = discrepancies(Golden(path, torch.float32, step))
    gradients = {k: v for k, v in found.items() if k.startswith("train/grad/")}  # sums over a whole batch
    assert too_large(gradients, 1e-4, 1e-4) == {}
    assert too_large({k: v for k, v in found.items() if k not in gradients}, 1e-5, 1e-5) == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_comparison_notices_every_kernel(path):
    """A golden test that passes with a kernel zeroed would prove nothing."""
    kernels = [name for name, p in Golden(path, torch.float64).block.named_parameters() if p.dim() == 4]
    assert len(kernels) >= 3
    for name in kernels:
        golden = Golden(path, torch.float64)
        golden.block.get_parameter(name).data.zero_()
        found = too_large(discrepancies(golden), 1e-9, 1e-7)
        assert {"eval/output", "fused/weight", "train/output"} <= set(found), name


def test_a_name_that_the_authors_do_not_use():
    with pytest.raises(ValueError, match="is no tensor of the authors' blocks: they have dbb_origin, dbb_1x1"):
        from_reference("dbb_max.conv.weight")
