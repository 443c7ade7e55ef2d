"""Sabotage: break the library in a named place, and a named test must fail; where a notebook teaches it, that one, too.

A fault is one replacement in one file. The test that guards it runs against a broken copy of the package, and so does
the notebook: a suite that stays green with a broken library proves nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.broken import ROOT, copy_package

pytestmark = pytest.mark.slow  # a hundred broken packages


@dataclass(frozen=True)
class Fault:
    """What is broken, where, who must notice."""

    what: str
    file: str
    old: str
    new: str
    test: str
    notebook: str | None = None

    def plant(self, folder: Path) -> None:
        """Copy the package and its tests, with the fault in it."""
        broken = copy_package(folder) / "dbb" / self.file
        source = broken.read_text()
        assert source.count(self.old) == 1, f"{self.old!r} must stand once in {self.file}, to be broken"
        broken.write_text(source.replace(self.old, self.new))


FAULTS = [
    Fault(
        "batch norm divides by the variance instead of its root",
        "fold.py",
        "gamma / torch.sqrt(var + norm.eps)",
        "gamma / (var + norm.eps)",
        "tests/test_fold.py::test_layer[norm]",
        "01",
    ),
    Fault(
        "batch norm forgets eps",
        "fold.py",
        "torch.sqrt(var + norm.eps)",
        "torch.sqrt(var)",
        "tests/test_fold.py::test_layer[norm, no affine]",
        "01",
    ),
    Fault(
        "batch norm forgets the running mean",
        "fold.py",
        "beta - scale * mean",
        "beta",
        "tests/test_fold.py::test_layer[conv norm]",
        "01",
    ),
    Fault(
        "a padded convolution behind a bias is folded anyway",
        "affine.py",
        "if padded > 0 and first.bias is not None:",
        "if False:",
        "tests/test_affine.py::test_refused[behind one with a bias]",
        "01",
    ),
    Fault(
        "the last branch is forgotten",
        "layers.py",
        "reduce(add, layer.fold_branches())",
        "reduce(add, list(layer.fold_branches())[:-1])",
        "tests/test_fold.py::test_layer[parallel]",
        "00",
    ),
    Fault(
        "the border is filled with zeros",
        "layers.py",
        "if border is None or max(around) <= 0:",
        "if True:",
        "tests/test_fold.py::test_layer[bias pad]",
        "00",
    ),
    Fault(
        "the average divides by K instead of K * K",
        "affine.py",
        "1 / (divisor or height * width)",
        "1 / (divisor or height)",
        "tests/test_fold.py::test_layer[pool]",
        "00",
    ),
    Fault(
        "kernels are centred instead of placed",
        "affine.py",
        "start, step = (new.left - old.left) // new.dilation, max(1, old.dilation // new.dilation)",
        "step = max(1, old.dilation // new.dilation)\n        start = (new.taps - step * (old.taps - 1)) // 2",
        "tests/test_affine.py::test_sum_and_concat_place_kernels",
        "06",
    ),
    Fault(
        "a common grid is too coarse for one of its maps",
        "affine.py",
        "return axes[0].widened(left, right, steps)",
        "return axes[0].widened(left, right)",
        "tests/test_affine.py::test_sum_and_concat_place_kernels",
        "06",
    ),
    Fault(
        "the outputs of groups are interleaved",
        "affine.py",
        '"g o (i a b) (c d) -> (g o) i (a c) (b d)"',
        '"g o (i a b) (c d) -> (o g) i (a c) (b d)"',
        "tests/test_affine.py::test_grouped_pointwise_then_kernel_is_a_direct_sum_of_merges",
    ),
    Fault(
        "the bias of the first map is lost",
        "affine.py",
        "then.constant_response(first.bias)",
        "then.bias",
        "tests/test_fold.py::test_layer[nested]",
        "00",
    ),
    Fault(
        "the batch norm's factor is rounded to float32",
        "fold.py",
        "gamma / torch.sqrt(var + norm.eps)",
        "(gamma / torch.sqrt(var + norm.eps)).float().double()",
        "tests/test_fold.py::test_layer[norm]",
        "09",
    ),
    Fault(
        "the identity is left out of the identity-based convolution",
        "layers.py",
        "return self.weight + eye",
        "return self.weight + 0 * eye",
        "tests/test_golden.py::test_float64[dbb_dense_s1-branches]",
        "08",
    ),
    Fault(
        "the border in training mode carries a gradient",
        "layers.py",
        "torch.is_grad_enabled() and not self.training",
        "torch.is_grad_enabled()",
        "tests/test_blocks.py::test_running_border_uses_statistics_after_this_batch_without_gradient",
    ),
    Fault(
        "the border of the lean step carries a gradient",
        "steps.py",
        "        with torch.no_grad():\n            border = answer_to_zero",
        "        with torch.enable_grad():\n            border = answer_to_zero",
        "tests/test_golden.py::test_float64[dbb_dense_s2-lean]",
        "14",
    ),
    Fault(
        "equivalence is asserted, whatever the error",
        "verify.py",
        "if not error <= rtol:",
        "if False:",
        "tests/test_verify.py::test_a_wrong_block_is_named[dtype0]",
        "09",
    ),
    Fault(
        "a model in training mode is folded",
        "surgery.py",
        "    if training:\n",
        "    if False:\n",
        "tests/test_surgery.py::test_training_mode_is_refused",
        "09",
    ),
    Fault(
        "a padded convolution behind a kernel with taps is folded anyway",
        "affine.py",
        "if padded > 0 and seen < a.reach:",
        "if False:",
        "tests/test_affine.py::test_refused[zeros would stand where its windows still touch]",
        "03",
    ),
    Fault(
        "the padding behind a stride is not stretched by it",
        "affine.py",
        "left=self.left + self.stride * second.left",
        "left=self.left + second.left",
        "tests/test_affine.py::test_sequence_with_a_padded_second_map",
        "03",
    ),
    Fault(
        "a stack of grouped maps keeps their groups",
        "affine.py",
        "maps = [m.regroup(1) for m in align(*maps)]",
        "maps = align(*maps)",
        "tests/test_affine.py::test_concat_of_grouped_maps_is_dense",
        "04",
    ),
    Fault(
        "a sum of grouped maps is dense",
        "affine.py",
        "groups = gcd(a.groups, b.groups)",
        "groups = 1",
        "tests/test_affine.py::test_sum_keeps_groups_in_common",
    ),
    Fault(
        "a block takes branches of fewer groups than its own",
        "blocks.py",
        "if branches.groups % spec.groups:",
        "if False:",
        "tests/test_blocks.py::test_refused_when_it_is_built[groups=1, .* give every branch groups=4 or a multiple]",
    ),
    Fault(
        "the bias of every branch but the first is lost",
        "affine.py",
        "bias=_add_biases(a.bias, b.bias), groups",
        "bias=a.bias, groups",
        "tests/test_affine.py::test_sum_and_concat_place_kernels",
        "02",
    ),
    Fault(
        "maps whose windows differ are added all the same",
        "affine.py",
        "if len(values) > 1:",
        "if False:",
        "tests/test_affine.py::test_refused[whose stride is (1, 1) and (2, 2)]",
        "02",
    ),
    Fault(
        "average pooling that does not count its padding is folded anyway",
        "fold.py",
        "if not pool.count_include_pad and pair(pool.padding) != (0, 0):",
        "if False:",
        "tests/test_fold.py::test_refused[count_include_pad=False with padding=1]",
        "05",
    ),
    Fault(
        "the padding of average pooling is forgotten",
        "fold.py",
        "pool.stride, pool.padding, divisor",
        "pool.stride, 0, divisor",
        "tests/test_fold.py::test_layer[pool, all arguments]",
        "05",
    ),
    Fault(
        "the exact border in training mode keeps the gradient out",
        "layers.py",
        "return x, answer",
        "return x, None if answer is None else answer.detach()",
        "tests/test_blocks.py::test_batch_border_uses_the_batch_with_gradient",
    ),
    Fault(
        "batch norm forgets its scale",
        "fold.py",
        "scale = gamma / torch.sqrt(var + norm.eps)",
        "scale = torch.ones_like(gamma) / torch.sqrt(var + norm.eps)",
        "tests/test_fold.py::test_layer[norm]",
        "10",
    ),
    Fault(
        "the schedule's length is a constant, as in the authors' code",
        "train.py",
        "self.recipe.epochs * per_epoch",
        "self.recipe.epochs * 1_281_167 // self.recipe.batch_size",
        "tests/test_train.py::test_learning_rate_rises_then_falls_to_zero",
        "11",
    ),
    Fault(
        "differences are not paired by seed",
        "matrix.py",
        "values - score[baseline]",
        "values - score[baseline].mean()",
        "tests/test_matrix.py::test_differences_are_paired",
        "11",
    ),
    Fault(
        "a sequence is folded backwards",
        "fold.py",
        "folded >> fold(layer)",
        "fold(layer) >> folded",
        "tests/test_golden.py::test_float64[dbb_dense_s1-branches]",
        "07",
    ),
    Fault(
        "branches are stacked in the wrong order",
        "layers.py",
        "return concat(*layer.fold_branches())",
        "return concat(*list(layer.fold_branches())[::-1])",
        "tests/test_fold.py::test_layer[concat]",
        "07",
    ),
    Fault(
        "every process reads the same images",
        "imagenet.py",
        "places[self.rank :: self.world]",
        "places[:: self.world]",
        "tests/test_train.py::test_streamed_batches_depend_on_seed_epoch_and_step_alone[imagenet]",
        "12",
    ),
    Fault(
        "lighting mixes up colours and their axes",
        "imagenet.py",
        "torch.tensor(EIGENVECTORS) @ multiples",
        "multiples @ torch.tensor(EIGENVECTORS)",
        "tests/test_train.py::test_strong_augmentation_changes_colours",
        "12",
    ),
    Fault(
        "a convolution that others read, too, loses its answer to a block",
        "pairs.py",
        "if found != norms or len(norms) > 1:",
        "if len(norms) > 1:",
        "tests/test_replace.py::test_left_alone_and_said_why[more than one batch norm reads it: BatchNorm2d, add]",
        "16",
    ),
    Fault(
        "the norm that is given back forgets its eps",
        "surgery.py",
        "norm.running_var.fill_(1 - norm.eps)",
        "norm.running_var.fill_(1.0)",
        "tests/test_replace.py::test_restore_loads_strictly_and_answers_the_same[1e-05-True-True]",
        "16",
    ),
    Fault(
        "an optimizer that trains other parameters is let through",
        "surgery.py",
        "if strangers or forgotten:",
        "if False:",
        "tests/test_replace.py::test_an_optimizer_built_too_early_is_noticed",
        "16",
    ),
    Fault(
        "an interval that holds zero is called a success",
        "claims.py",
        "not low <= published <= high else UNDECIDED",
        "not low <= published <= high else HOLDS",
        "tests/test_claims.py::test_judge[-0.2-0.6-0.5-1-undecided]",
        "15",
    ),
    Fault(
        "one seed is enough for a status",
        "claims.py",
        "if low is None or high is None:\n        return UNDECIDED",
        "if low is None or high is None:\n        return HOLDS",
        "tests/test_claims.py::test_judge[None-None-0.5-1-undecided]",
        "15",
    ),
    Fault(
        "the block that is linear in training has a norm for each kernel",
        "ablation.py",
        "conv_norm(spec, sizes[part])[:-1]",
        "conv_norm(spec, sizes[part])",
        "tests/test_ablation.py::test_linear_is_linear_while_it_trains",
        "13",
    ),
    Fault(
        "the start of a DBB is forgotten",
        "ablation.py",
        "branch.conv.weight.copy_(kernel)",
        "branch.conv.weight.copy_(branch.conv.weight)",
        "tests/test_ablation.py::test_folded_start_is_where_a_dbb_starts[geometry0]",
        "13",
    ),
    Fault(
        "what the padding adds at the border is forgotten",
        "steps.py",
        "        ring.add_to_(y, values)\n",
        "        pass\n",
        "tests/test_steps.py::test_lean_in_float32_and_both_layouts[False-merged]",
    ),
    Fault(
        "all parts of a batch are sampled at one place",
        "steps.py",
        "for ends in pairwise(bounds)",
        "for ends in [(0, images)]",
        "tests/test_steps.py::test_parts_of_the_batch_have_grids_of_their_own",
    ),
    Fault(
        "the gradient of a sample does not reach the image",
        "steps.py",
        "            grad[read] += grad_windows[place].permute(0, 3, 1, 2)\n",
        "            pass\n",
        "tests/test_steps.py::test_sampled_with_all_pixels_is_the_branches_in_training",
        "14",
    ),
    Fault(
        "an average of the sample is a sum",
        "steps.py",
        "weight=a.tap * a.pointwise.weight",
        "weight=a.pointwise.weight",
        "tests/test_steps.py::test_sampled_with_all_pixels_is_the_branches_in_training",
        "14",
    ),
    Fault(
        "second moments are not centred",
        "steps.py",
        "known = _rounded(mean, x.dtype)",
        "known = mean = 0 * mean",
        "tests/test_steps.py::test_second_moments_are_centred",
        "14",
    ),
    Fault(
        "the kernel that is trained is not rounded",
        "quantize.py",
        "kernel, (folded,) = self.grid.round(kernel), self.folded",
        "(folded,) = self.folded",
        "tests/test_quantize.py::test_the_gradient_is_that_of_the_fold",
        "17",
    ),
    Fault(
        "a channel's shift is not shrunk with its scale",
        "prune.py",
        "            norm.bias *= kept\n",
        "",
        "tests/test_prune.py::test_it_is_the_proximal_step",
        "17",
    ),
    Fault(
        "a stride that is taken out leaves no dilation",
        "detect.py",
        "dilation *= conv.stride[0]",
        "dilation = 1",
        "tests/test_detect.py::test_a_resnet18_without_strides_answers_the_same_at_the_places_that_it_had",
        "18",
    ),
]
TAUGHT = [fault for fault in FAULTS if fault.notebook]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[tuple[Fault | None, str], str]:
    """What came of the named test and the notebook of each fault; under None, of all of them on a sound copy."""
    sound = str(copy_package(tmp_path_factory.mktemp("sound")))
    broken = {fault: str(tmp_path_factory.mktemp("broken")) for fault in FAULTS}
    for fault, folder in broken.items():
        fault.plant(Path(folder))
    keys, jobs = [], []
    for number in sorted({fault.notebook for fault in TAUGHT}, reverse=True):  # the last ones take longest
        faults = [fault for fault in TAUGHT if fault.notebook == number]
        keys.append([*((fault, "notebook") for fault in faults), (None, number)])
        jobs.append([notebook(number), [broken[fault] for fault in faults], sound])
    keys += [(None, "tests"), *((fault, "test") for fault in FAULTS)]
    jobs += [[sound, sorted({fault.test for fault in FAULTS})], *([broken[fault], [fault.test]] for fault in FAULTS)]
    found = {}
    for key, answer in zip(keys, run(jobs), strict=True):
        found |= dict(zip(key, answer, strict=True)) if isinstance(key, list) else {key: answer}
    return found


def notebook(number: str) -> str:
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return str(path)


def run(jobs: list) -> list:
    """The answers of a process of `tests.broken`."""
    command = [sys.executable, "-m", "tests.broken"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=ROOT, env=env, input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_there_are_enough_faults():
    names = {path.name[:2] for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert len({fault.old for fault in FAULTS}) >= 8 and {fault.notebook for fault in TAUGHT} == names


def test_all_passes_on_the_sound_library(verdicts):
    assert {key: answer for (fault, key), answer in verdicts.items() if fault is None and answer != "OK"} == {}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_named_test_fails(fault, verdicts):
    assert verdicts[fault, "test"] == "TESTS_FAILED", f"{fault.what}: {fault.test} did not notice"


@pytest.mark.parametrize("fault", TAUGHT, ids=lambda fault: fault.what)
def test_the_notebook_that_teaches_it_fails(fault, verdicts):
    error = verdicts[fault, "notebook"]
    assert re.fullmatch(r"(Assertion|Value)Error in cell \d+", error), f"{fault.what}: {fault.notebook} ended: {error}"
