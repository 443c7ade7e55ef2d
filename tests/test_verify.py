"""The checks check: they pass what is right, fail what is wrong, and name it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from dbb import ACBlock, DiverseBranchBlock, assert_equivalent, cost, randomize_norms_, reparameterize, report
from dbb.verify import summed_scale
from tests.support import image


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    blocks = [DiverseBranchBlock(4, 8, 3, padding=1, nonlinear=nn.ReLU()), ACBlock(8, 8, 3, 2, 1)]
    return randomize_norms_(nn.Sequential(*blocks)).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equivalent_models_pass(dtype):
    before = model(dtype)
    error = assert_equivalent(before, reparameterize(before), image(4).to(dtype))
    assert 0 <= error < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_block_is_named(dtype):
    before = model(dtype)
    after = reparameterize(before)
    after[1].weight.data[0, 0, 0, 0] += 0.1
    with pytest.raises(
        AssertionError, match=r"differ by .* is allowed in torch.float.*; the worst block is '1', off by"
    ):
        assert_equivalent(before, after, image(4).to(dtype))
    assert_equivalent(before, after, image(4).to(dtype), rtol=0.5)


def test_nan_is_not_equal():
    before = model()
    after = reparameterize(before)
    after[0][0].bias.data[0] = float("nan")
    with pytest.raises(AssertionError, match="worst block is '0'"):
        assert_equivalent(before, after, image(4))


def test_differences_outside_blocks_are_told_apart():
    before = nn.Sequential(model(), nn.Conv2d(8, 2, 1).double()).eval()
    after = reparameterize(before)
    after[1].weight.data.zero_()
    with pytest.raises(AssertionError, match=r"worst block is .*e-1\d on its own input"):
        assert_equivalent(before, after, image(4))
    plain = nn.Conv2d(4, 8, 3, 2, 1).double().eval()
    with pytest.raises(AssertionError, match="`before` has no blocks in training form"):
        assert_equivalent(plain, nn.Conv2d(4, 8, 3, 2, 1).double().eval(), image(4))
    with pytest.raises(AssertionError, match="blocks have different names"):
        assert_equivalent(model(), plain, image(4))


def test_training_mode_and_other_outputs_are_refused():
    before = model()
    after = reparameterize(before)
    with pytest.raises(ValueError, match=r"`before` is in training mode.*before.eval\(\)"):
        assert_equivalent(copy.deepcopy(before).train(), after, image(4))
    with pytest.raises(ValueError, match="`after` is in training mode"):
        assert_equivalent(before, copy.deepcopy(after).train(), image(4))
    with pytest.raises(AssertionError, match=r"the outputs are \(2, 8, 10, 12\).* and \(2, 8, 10, 12\) torch.float32"):
        assert_equivalent(before, nn.Sequential(before, Cast()).eval(), image(4))
    with pytest.raises(ValueError, match="answer Tensor and tuple: compare models that answer one tensor"):
        assert_equivalent(before, nn.Sequential(before, Pack()).eval(), image(4))


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


class Pack(nn.Module):
    def forward(self, x):
        return (x,)


def test_report():
    net = model(torch.float32).train()
    before = copy.deepcopy(net.state_dict())
    found = report(net, image(4).float())
    assert [b.name for b in found.blocks] == ["0", "1"]
    assert all(b.relative64 < 1e-14 < b.relative32 < 1e-5 for b in found.blocks)
    assert all(b.absolute64 < 1e-13 < b.absolute32 < 1e-4 for b in found.blocks)
    assert found.worst in found.blocks
    assert str(found).splitlines()[0].split() == ["block", "float64", "abs", "rel", "float32", "abs", "rel"]
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="no block in training form"):
        report(reparameterize(net.eval()), image(4).float())


def test_report_sees_a_wrong_fold(monkeypatch):
    right = DiverseBranchBlock.fuse

    def forgets_the_bias(block):
        conv = right(block)
        conv.bias.data.zero_()
        return conv

    monkeypatch.setattr(DiverseBranchBlock, "fuse", forgets_the_bias)
    found = report(model(), image(4))
    assert found.worst.name == "0" and found.worst.relative64 > 1e-3


def test_summed_scale_bounds_what_cancels():
    block = DiverseBranchBlock(2, 2, 3, padding=1, branches={"a": "kxk", "b": "kxk"}).double().eval()
    block.branches["b"].conv.weight.data = -block.branches["a"].conv.weight.data
    x = image(2)
    assert block(x).abs().max() < 1e-12
    assert summed_scale(block, x).min() > 0.1


def test_summed_scale_of_another_padding_mode():
    block = randomize_norms_(DiverseBranchBlock(2, 2, 3, padding=1, padding_mode="circular")).double().eval()
    assert summed_scale(block, image(2)).shape == block(image(2)).shape


def test_randomize_norms_leaves_nothing_fresh():
    net = randomize_norms_(DiverseBranchBlock(64, 64, 3), torch.Generator().manual_seed(1))
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            assert tensor.std() > 0.1
        assert norm.running_var.min() >= 0.5
    again = randomize_norms_(DiverseBranchBlock(64, 64, 3), torch.Generator().manual_seed(1))
    assert torch.equal(again.branches["1x1"].bn.bias, net.branches["1x1"].bn.bias)
    randomize_norms_(nn.BatchNorm2d(4, affine=False, track_running_stats=False))


def test_cost():
    net = nn.Sequential(DiverseBranchBlock(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 100, 5))
    before = copy.deepcopy(net.state_dict())
    found = cost(net, torch.randn(2, 8, 10, 10), min_seconds=0.01)
    head = 8 * 100 * 5 + 5
    assert found.folded.parameters == 8 * 8 * 9 + 8 + head
    assert found.training.parameters == 8 * 8 * (9 + 1 + 1 + 9 + 1) + 6 * 16 + head
    assert found.folded.macs == 2 * (8 * 8 * 9 * 100 + 8 * 100 * 5)
    # the two sequences convolve once on the image itself before their border is put around it
    assert found.training.macs == 2 * (8 * 8 * (9 + 1 + 1 + 9 + 1) * 100 + 8 * 100 * 5)
    assert found.training.saved_bytes > 2 * found.folded.saved_bytes > 0
    assert found.training.seconds > 0 and found.folded.seconds > 0
    assert str(found).splitlines()[0].split() == ["training", "form", "folded", "ratio"]
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_saved_bytes_are_those_of_the_activations():
    """conv - relu - conv: each convolution keeps its input, ReLU its output, and that is the second one's input."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))
    net = nn.Sequential(*net, DiverseBranchBlock(4, 4, 3, deploy=True))
    found = cost(net, torch.randn(1, 2, 10, 10), min_seconds=0.01)
    assert found.training.saved_bytes == found.folded.saved_bytes == 4 * (2 * 100 + 3 * 100 + 4 * 100)


@pytest.mark.slow
def test_the_cost_of_a_model_says_nothing_about_compilers(tmp_path):
    """Compilers of CUDA without a GPU are none of the reader's business, in a notebook least of all."""
    script = "import torch, dbb; dbb.cost(torch.nn.Conv2d(1, 1, 1), torch.ones(1, 1, 1, 1), min_seconds=0.01)"
    env = os.environ | {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_traced_graph_in_training_mode_is_refused():
    """Unlike an exported one it holds batch norms, which use the batch."""
    block = DiverseBranchBlock(3, 4, 3)
    with pytest.raises(ValueError, match="in training mode"):
        assert_equivalent(block.eval(), torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3)).train()), image(3))
