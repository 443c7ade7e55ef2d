"""Other ways to compute a training step: the lean one is the same, and the sampled one if it samples all."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dbb
from dbb.affine import Affine
from dbb.steps import (
    BranchStep,
    LeanStep,
    SampledStep,
    _draw_grid,
    _draw_grids,
    _MomentsOf,
    sampling_pays,
    set_training_step,
)
from dbb.verify import _saved_bytes
from tests.test_blocks import CASES, image

EXACT = 1e-10
F64 = torch.float64
ALL = SampledStep(pixels=10**9, always=True)
STEPS = {
    "lean": LeanStep(always=True),
    "sampled": SampledStep(64, always=True),
    "exact sum": SampledStep(64, always=True, exact_sum=True),
}
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def batch(case) -> torch.Tensor:
    """Images that differ in mean and scale, so that a forgotten mean shows."""
    x = image(8, *case.size)
    return torch.cat([x, 0.7 * x.flip(0) + 0.5, 1.3 * x - 0.2])


def training_step(block: nn.Module, step, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, all gradients and all buffers after one training step."""
    block, x = copy.deepcopy(block).train(), x.clone().requires_grad_()
    set_training_step(block, step)
    y = block(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype).to(y.dtype))
    gradients = {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    return {"output": y.detach(), "gradient of input": x.grad, **gradients, **dict(block.named_buffers())}


def differences(given: dict, wanted: dict) -> dict[str, float]:
    """The largest error of each tensor, relative to it; gradients that vanish by nature to the largest of the block."""
    assert given.keys() == wanted.keys()
    missing = [name for name in wanted if (given[name] is None) != (wanted[name] is None)]
    assert missing == [], "a gradient that is zero is not the same as none"
    largest = max(w.abs().max().item() for name, w in wanted.items() if name.startswith("gradient") and w is not None)
    found = {}
    for name, w in wanted.items():
        if w is not None:
            scale = max(w.abs().max().item(), 1e-2 * largest if name.startswith("gradient") else 0, 1e-12)
            found[name] = (given[name].double() - w.double()).abs().max().item() / scale
    return found


def assert_same_step(block: nn.Module, step, x: torch.Tensor, tolerance: float = EXACT) -> None:
    found = differences(training_step(block, step, x), training_step(block, BranchStep(), x))
    assert {name: error for name, error in found.items() if not error <= tolerance} == {}


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_lean_is_the_branches_in_training(case):
    torch.manual_seed(0)
    assert_same_step(case.build(), LeanStep(always=True), batch(case))


@pytest.mark.parametrize("case", CASES[1::7], ids=str)
def test_lean_is_the_branches_where_torch_averages_fast(case, monkeypatch):
    """The way of GPUs."""
    monkeypatch.setattr("dbb.steps._pools_fast", lambda x: True)
    torch.manual_seed(0)
    assert_same_step(case.build(), LeanStep(always=True), batch(case))


@pytest.mark.parametrize("case", [c for c in CASES if c.kind in ("dbb batch border", "acb", "repvgg")][::3], ids=str)
def test_sampled_with_all_pixels_is_the_branches_in_training(case):
    torch.manual_seed(0)
    assert_same_step(case.build(), ALL, batch(case))
    assert_same_step(case.build(), replace(ALL, exact_sum=True), batch(case))


LAYERS = {
    "merged": ((8, 12, 3), {"padding": 1}, (4, 8, 24, 24)),
    "stride 2": ((8, 12, 3), {"padding": 1, "stride": 2}, (4, 8, 24, 24)),
    "in two steps": ((16, 48, 3), {"padding": 1}, (2, 16, 12, 12)),
    "depthwise": ((16, 16, 3), {"padding": 1, "groups": 16}, (2, 16, 12, 12)),
    "groups": ((8, 8, 5), {"padding": 2, "groups": 2}, (4, 8, 20, 20)),
    "few pixels": ((64, 64, 3), {"padding": 1}, (2, 64, 5, 5)),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def build(layer: str, kind=dbb.DiverseBranchBlock, **options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    shape, arguments, size = LAYERS[layer]
    return dbb.randomize_norms_(kind(*shape, **arguments, **options)), torch.randn(size).relu()


@each_layer
@pytest.mark.parametrize("channels_last", [False, True])
def test_lean_in_float32_and_both_layouts(layer, channels_last):
    block, x = build(layer)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert_same_step(
        block.to(memory_format=memory_format), LeanStep(always=True), x.to(memory_format=memory_format), 2e-4
    )


@each_layer
@pytest.mark.parametrize("momentum", [None, 1.0])
def test_lean_tracks_running_statistics_as_norms_do(layer, momentum):
    block, x = build(layer, dtype=torch.float64)
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = momentum
    assert_same_step(block, LeanStep(always=True), x.double())
    assert_same_step(block, LeanStep(always=True), 2 * x.double() + 1)


@each_layer
@each_step
def test_under_autocast_it_stays_close_to_float32(layer, step):
    """bfloat16 has eight bits: an answer is off by a few hundredths of its scale, and no more."""
    block, x = build(layer)
    block.train()
    set_training_step(block, step)
    torch.manual_seed(0)
    wanted = copy.deepcopy(block)(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        given = block(x)
    assert given.dtype == torch.bfloat16
    assert (given.float() - wanted).square().mean().sqrt() < 0.03 * wanted.std()
    given.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_second_moments_are_centred():
    """A channel with a large mean and a small variance: sums of products that are not centred would be noise."""
    block = set_training_step(dbb.DiverseBranchBlock(4, 4, 3, padding=1).train(), LeanStep(always=True))
    torch.manual_seed(0)
    x = (100 + torch.randn(8, 4, 16, 16)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    inner = block.branches["1x1_kxk"].pointwise.prefix.bn
    assert torch.allclose(inner.running_var, 0.9 + 0.1 * x.float().var((0, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shift", [0, 30])
def test_in_few_bits_the_roundings_of_moments_cancel(channels_last, shift):
    """Each sum of products is rounded to eight bits, up to 4e-3, but there are many; pixels lose hardly anything."""
    torch.manual_seed(0)
    x = (torch.randn(32, 16, 16, 16) @ torch.randn(16, 16) / 4).relu().bfloat16() + shift
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    kernel = torch.randn(64, 16, 1, 1)
    mean, var = _MomentsOf(x).through(Affine(kernel))
    true = F.conv2d(x.double(), kernel.double())
    assert (var / true.var((0, 2, 3), correction=0) - 1).abs().max() < 1.5e-3
    assert ((mean - true.mean((0, 2, 3))).abs() / true.std((0, 2, 3))).max() < 1e-4


def test_in_few_bits_kernels_get_the_gradient_that_is_left_of_large_numbers():
    """Where gradient and image have a mean, most of their product is what the norm takes off again."""
    torch.manual_seed(0)
    block = dbb.randomize_norms_(dbb.DiverseBranchBlock(32, 32, 3, padding=1)).train()
    x, grad = torch.randn(16, 32, 28, 28).relu().bfloat16(), (torch.randn(16, 32, 28, 28) + 0.5).bfloat16()
    kernels = {"1x1": "1x1.conv.weight", "1x1_avg": "1x1_avg.pointwise.prefix.conv.weight"}
    found = {}
    for step, dtype in (
        (BranchStep(), torch.float32),
        (BranchStep(), torch.bfloat16),
        (LeanStep(True), torch.bfloat16),
    ):
        one = set_training_step(copy.deepcopy(block), step)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            answer = one(x.to(dtype))
        answer.backward(grad.to(dtype))
        found[step, dtype] = {n: one.branches.get_parameter(name).grad for n, name in kernels.items()}
    true, by_branches, lean = found.values()
    for name, wanted in true.items():
        assert (lean[name] - wanted).norm() < 2 * (by_branches[name] - wanted).norm() < 0.5 * wanted.norm(), name


@pytest.mark.parametrize("layer", ["merged", "stride 2", "in two steps", "depthwise"])
def test_lean_keeps_half_of_what_the_branches_keep(layer):
    block, x = build(layer)
    branches = _saved_bytes(set_training_step(block, BranchStep()), x)
    assert _saved_bytes(set_training_step(block, LeanStep(always=True)), x) <= branches / 2


@pytest.mark.parametrize("kind", [dbb.DiverseBranchBlock, dbb.ACBlock, dbb.RepVGGBlock])
def test_a_small_sample_keeps_hardly_more_than_the_input(kind):
    block = kind(64, 64, 3, padding=1)
    x = torch.rand(8, 64, 56, 56)
    set_training_step(block, SampledStep(512, always=True))
    assert _saved_bytes(block, x) < 1.3 * x.nbytes


@each_layer
@pytest.mark.parametrize("kind", [dbb.DiverseBranchBlock, dbb.ACBlock, dbb.RepVGGBlock])
def test_sampled_trains_every_parameter_and_tracks_every_norm(layer, kind):
    block, x = build(layer, kind)
    block.train()
    before = {name: b.clone() for name, b in block.named_buffers()}
    set_training_step(block, SampledStep(64, always=True))(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert all(not torch.equal(b, before[name]) for name, b in block.named_buffers())


def test_the_sample_is_spread_over_all_images():
    """Images that are constant, each another value: only the mean of them all is right."""
    conv_norm = dbb.BranchBlock({"kxk": nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, momentum=1.0))})
    nn.init.ones_(conv_norm.branches["kxk"][0].weight)
    x = torch.arange(32.0)[:, None, None, None].expand(32, 1, 16, 16).contiguous()
    set_training_step(conv_norm, SampledStep(32, always=True)).train()(x)
    assert conv_norm.branches["kxk"][1].running_mean.item() == pytest.approx(15.5)


def test_grids_move_from_step_to_step_and_reach_every_place():
    torch.manual_seed(0)
    grids = [_draw_grid(9, 4) for _ in range(200)]
    assert {place for grid in grids for place in grid} == set(range(9))
    assert {(len(grid), grid.step) for grid in grids} == {(2, 4)}


def test_parts_of_the_batch_have_grids_of_their_own():
    torch.manual_seed(0)
    drawn = _draw_grids(64, [32, 32], (8, 8))
    assert [images for images, _ in drawn] == [slice(n, n + 8) for n in range(0, 64, 8)]
    assert len({(rows.start, columns.start) for _, (rows, columns) in drawn}) > 4
    assert len(_draw_grids(3, [32, 32], (8, 8))) == 3 and len(_draw_grids(64, [32, 32], (1, 1))) == 1


def test_an_exact_sum_has_the_mean_of_the_norms_and_leaves_only_the_mix_to_the_sample():
    block, x = build("merged", dtype=torch.float64)
    wanted, few = training_step(block, BranchStep(), x.double())["output"], SampledStep(64, always=True)
    torch.manual_seed(0)
    sampled, exact = (training_step(block, replace(few, exact_sum=e), x.double())["output"] for e in (False, True))
    shifts = sum(branch[-1].bias for branch in block.branches.children())
    assert (exact.mean((0, 2, 3)) - shifts).abs().max() < 1e-10 < 1e-2 < (sampled.mean((0, 2, 3)) - shifts).abs().max()
    spread = [(y.std((0, 2, 3)) / wanted.std((0, 2, 3)) - 1).abs().mean() for y in (sampled, exact)]
    assert spread[1] < spread[0]


def test_a_single_normed_branch_with_an_exact_sum_is_exact():
    """One branch has nothing to mix with."""
    block, x = build("merged", branches=["kxk"], dtype=torch.float64)
    few = SampledStep(64, always=True, exact_sum=True)
    wanted = training_step(block, BranchStep(), x.double())["output"]
    assert torch.allclose(training_step(block, few, x.double())["output"], wanted, rtol=0, atol=1e-3)


def test_a_branch_without_a_norm_keeps_its_mean():
    """Where a branch does not end in a norm, the sum has no mean to be brought to."""
    conv = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12))
    block = dbb.BranchBlock({"normed": conv, "free": nn.Conv2d(8, 12, 1)}).double()
    x = torch.randn(4, 8, 12, 12).double()
    steps = []
    for exact_sum in (False, True):
        torch.manual_seed(0)
        steps.append(training_step(block, SampledStep(64, always=True, exact_sum=exact_sum), x))
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


def test_sampled_repeats_itself_under_a_seed():
    block, x = build("merged")
    steps = []
    for _ in range(2):
        torch.manual_seed(3)
        steps.append(training_step(block, SampledStep(100, always=True), x))
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


@pytest.mark.parametrize("kind, shortened", [(dbb.DiverseBranchBlock, True), (dbb.RepVGGBlock, False)])
def test_blocks_without_sequences_are_left_as_they_are_unless_asked(kind, shortened):
    block, x = kind(16, 16, 3, padding=1), torch.rand(16, 16, 32, 32)
    by_step = [_saved_bytes(set_training_step(block, s), x) for s in (BranchStep(), LeanStep(), LeanStep(always=True))]
    assert (by_step[1] < by_step[0]) == shortened and by_step[2] < by_step[0]


@pytest.fixture
def norms_ran(monkeypatch) -> Counter:
    """How many batch norms ran, by the number of images in the batch."""
    ran, forward = Counter(), nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda norm, x: (ran.update([len(x)]), forward(norm, x))[1])
    return ran


def test_a_small_input_is_run_branch_by_branch(norms_ran):
    """Its memory is not worth the many small operations of the lean way: every layer runs, until there is more."""
    for images in (15, 16):
        dbb.DiverseBranchBlock(16, 16, 3, padding=1).train()(torch.rand(images, 16, 32, 32))
    assert norms_ran[15] == 6 > norms_ran[16]


def test_in_few_bits_more_pixels_are_asked_for(norms_ran):
    """There a convolution is fast, and what is merged, in float32, is not."""
    block = dbb.DiverseBranchBlock(128, 128, 3, padding=1).train()
    block(torch.rand(10, 128, 17, 17))
    assert norms_ran.pop(10) < 6
    with torch.autocast("cpu", torch.bfloat16):
        for images in (10, 11):  # 22 and 24 pixels a channel
            block(torch.rand(images, 128, 17, 17))
    assert norms_ran[10] == 6 > norms_ran[11]


@pytest.mark.parametrize("channels, size, batch, pixels, pays", [
    (64, 56, 32, 8192, True), (128, 28, 64, 8192, True), (256, 14, 64, 2048, True), (256, 14, 64, 8192, False),
    (512, 7, 64, 512, True), (512, 7, 64, 2048, False), (16, 32, 128, 8192, True),
])  # fmt: skip
def test_what_pays(channels, size, batch, pixels, pays):
    """Few pixels of many: the folded form. Hardly any pixels and many channels: the branches. As float32 measured."""
    block = dbb.DiverseBranchBlock(channels, channels, 3, padding=1, device="meta")
    assert sampling_pays(block.branches, torch.empty(batch, channels, size, size, device="meta"), pixels) == pays


def test_without_convolutions_or_with_few_norms_less_is_saved():
    image = torch.empty(32, 64, 56, 56, device="meta")
    few = dbb.RepVGGBlock(64, 64, 3, padding=1, device="meta").branches
    assert sampling_pays(few, image, 2048) and not sampling_pays(few, image, 8192)
    assert not sampling_pays(dbb.Parallel(nn.AvgPool2d(3)), image, 2048)


def test_under_autocast_the_sample_is_multiplied_in_few_bits():
    """As the convolution of the batch is: products of float32 would take longer than the batch does."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm) and len(args[0].flatten(1)) >= 512:
                seen.append(args[0].dtype)
            return operator(*args, **(kwargs or {}))

    seen = []
    block = set_training_step(dbb.DiverseBranchBlock(8, 8, 3, padding=1), SampledStep(512, always=True)).train()
    with torch.autocast("cpu", torch.bfloat16), Products():
        block(torch.rand(16, 8, 16, 16))
    assert set(seen) == {torch.bfloat16} and len(seen) == 6  # norms


def test_where_sampling_does_not_pay_the_step_is_exact():
    block, x = build("few pixels", dtype=torch.float64)
    assert_same_step(block, SampledStep(8192), x.double())


# Where the lean way is not taken


def test_hooks_see_every_layer_run():
    block, x = build("merged")
    set_training_step(block, LeanStep(always=True))
    seen = []
    block.branches["1x1"].bn.register_forward_hook(lambda *_: seen.append("1x1"))
    block.train()(x)
    assert seen == ["1x1"]


def test_frozen_norms_keep_their_statistics():
    block, x = build("merged", dtype=torch.float64)
    block.train()
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    before = {name: b.clone() for name, b in block.named_buffers()}
    wanted = copy.deepcopy(block).eval()(x.double())
    for step in (LeanStep(always=True), SampledStep(16, always=True)):
        assert torch.allclose(set_training_step(block, step)(x.double()), wanted, rtol=0, atol=1e-10)
    assert all(torch.equal(b, before[name]) for name, b in block.named_buffers())


def test_synchronised_norms_run_as_they_are_defined():
    """They would need the moments of all processes; alone in one, they are batch norms."""
    block, x = build("merged", dtype=torch.float64)
    ran = []
    block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert_same_step(block, LeanStep(always=True), x.double())
    forward, nn.SyncBatchNorm.forward = (
        nn.SyncBatchNorm.forward,
        lambda norm, x: (ran.append(norm), forward(norm, x))[1],
    )
    try:
        block.train()(x.double())
    finally:
        nn.SyncBatchNorm.forward = forward
    assert len(ran) == sum(isinstance(m, nn.SyncBatchNorm) for m in block.modules()) == 6


class HalfNorm(nn.BatchNorm2d):
    """A norm that a user has changed, as those do that synchronise in a way of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def test_norms_with_a_forward_of_their_own_run_it_or_are_refused():
    block, x = build("merged", dbb.ACBlock, dtype=torch.float64)
    for parent in list(block.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, HalfNorm(norm.num_features, dtype=torch.float64))
    assert_same_step(block, LeanStep(always=True), x.double())
    with pytest.raises(ValueError, match=r"HalfNorm is a batch norm with a forward of its own.* choose LeanStep\(\)"):
        set_training_step(block, ALL).train()(x.double())


def test_sampled_has_no_quarrel_with_synchronised_norms_that_are_frozen_or_alone(monkeypatch):
    block, x = build("merged", dtype=torch.float64)
    wanted = copy.deepcopy(block).eval()(x.double())
    block = set_training_step(nn.SyncBatchNorm.convert_sync_batchnorm(block).train(), ALL)
    plain = set_training_step(build("merged", dtype=torch.float64, border="batch")[0].train(), BranchStep())
    assert torch.allclose(copy.deepcopy(block)(x.double()), plain(x.double()), rtol=0, atol=1e-10)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="SyncBatchNorm uses those of all: choose LeanStep"):
        copy.deepcopy(block)(x.double())
    for norm in (m for m in block.modules() if isinstance(m, nn.SyncBatchNorm)):
        norm.eval()
    assert torch.allclose(block(x.double()), wanted, rtol=0, atol=1e-10)


def test_a_branch_that_answers_its_input_leaves_it_alone():
    norm = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    block = dbb.BranchBlock({"input": nn.Identity(), "kxk": norm}).double().train()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    before = x.clone()
    assert_same_step(block, LeanStep(always=True), x)
    block(x)
    assert torch.equal(x, before)


def test_kernels_of_maps_have_plain_strides():
    """Odd ones, on axes of length 1, made torch write past the end of a gradient: a stem of stride 2 crashed."""
    folded = dbb.fold(build("stride 2")[0].branches["1x1"])
    odd = replace(folded, weight=folded.weight.as_strided(folded.weight.shape, (8, 1, 8, 8)))
    assert odd.to_conv2d().weight.stride() == (8, 1, 1, 1) != odd.weight.stride()


def test_a_sequence_of_another_shape_counts_its_batch_once():
    """A convolution with a bias behind the padding runs as it is defined, and so must what stands in front of it."""
    prefix = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    sequence = nn.Sequential(dbb.BiasPad(prefix, 1), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12))
    torch.manual_seed(0)
    block, x = dbb.BranchBlock({"sequence": sequence}).double(), torch.randn(4, 8, 12, 12).double()
    assert_same_step(block, LeanStep(always=True), x)


# How they live with the rest


@pytest.mark.slow
@each_step
@pytest.mark.parametrize("layer", ["merged", "in two steps", "depthwise"])
def test_compiled(layer, step):
    block, x = build(layer)
    set_training_step(block.train(), step)
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager")
    answers = []
    for b in (block, compiled):
        torch.manual_seed(5)
        answers.append(b(x))
        answers[-1].square().sum().backward()
    assert torch.allclose(*answers, rtol=1e-4, atol=1e-4)
    for p, q in zip(block.parameters(), compiled.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-2 * p.grad.abs().max().item() + 1e-6)


@each_step
def test_shapes_alone_on_the_meta_device(step):
    for layer in LAYERS:
        block, x = build(layer)
        shape = block(x).shape
        meta = set_training_step(block.to("meta"), step).train()
        answer = meta(x.to("meta").requires_grad_())
        answer.sum().backward()
        assert answer.shape == shape and all(p.grad is not None for p in meta.parameters())


def test_weights_move_between_the_forms():
    """One set of parameters and buffers, one fold."""
    block, x = build("merged", dtype=torch.float64)
    set_training_step(block, SampledStep(64, always=True)).train()
    block(x.double()).sum().backward()
    other = dbb.DiverseBranchBlock(8, 12, 3, padding=1, dtype=torch.float64)
    other.load_state_dict(block.state_dict())
    a, b = block.eval().fuse(), other.eval().fuse()
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)
    dbb.assert_equivalent(block, a, x.double())


def test_the_choice_survives_copies():
    block = set_training_step(build("merged")[0], SampledStep(64))
    assert copy.deepcopy(block).training_step == SampledStep(64)
    assert pickle.loads(pickle.dumps(block)).training_step == SampledStep(64)


def test_it_is_set_for_every_block_of_a_model():
    model = nn.Sequential(build("merged")[0], nn.ReLU(), nn.Sequential(dbb.ACBlock(12, 12, 3, padding=1)))
    set_training_step(model, SampledStep(77))
    assert [m.training_step for m in (model[0], model[2][0])] == [SampledStep(77)] * 2


def test_refused():
    with pytest.raises(ValueError, match="Linear has no blocks: put some in"):
        set_training_step(nn.Linear(2, 2), LeanStep())
    with pytest.raises(ValueError, match="pixels=1 is no sample"):
        SampledStep(1)
