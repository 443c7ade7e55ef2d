"""Blocks in two processes, each with its half of every batch: run under torchrun as `-m tests.halves FOLDER`.

Each process leaves there what it ended in. `alone` and `whole` say in one process what that has to be.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import dbb
from dbb import BranchStep, LeanStep, SampledStep, set_training_step
from tests.together import SharedNorm

STEPS, IMAGES = 4, 6  # images in a half
SAMPLED = SampledStep(64, always=True)  # of 6 * 12 * 12 pixels
CASES = {  # the step, and how DDP is called
    "sampled": (SAMPLED, {}),
    "sampled, static graph": (SAMPLED, {"static_graph": True}),
    "sampled, looking for unused parameters": (SAMPLED, {"find_unused_parameters": True}),
    "sampled, each its own buffers": (SAMPLED, {"broadcast_buffers": False}),
    "lean": (LeanStep(always=True), {}),
}
WITH_SHARED_NORMS = {  # steps that leave synchronised norms to themselves
    "lean": LeanStep(always=True),
    "sampled where that does not pay": SampledStep(10**6),
}


def build(step) -> nn.Sequential:
    """A dense and a depthwise DBB, an ACB with a stride, and a classifier.

    Without padding, a shift in front of a KxK and its norm changes nothing: its gradient is zero, and has to be there.
    """
    torch.manual_seed(0)
    layers = [dbb.DiverseBranchBlock(3, 8, 3, padding=1), nn.ReLU()]
    layers += [dbb.DiverseBranchBlock(8, 8, 3, groups=8), nn.ReLU(), dbb.ACBlock(8, 8, 3, 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 5 * 5, 4))
    return set_training_step(dbb.randomize_norms_(model).double().train(), step)


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Images and classes; the halves differ in mean and scale, so that it shows whose statistics are used."""
    images = torch.randn(2 * IMAGES, 3, 12, 12, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    images[IMAGES:] = 2 * images[IMAGES:] + 1
    return images, torch.arange(2 * IMAGES) % 4


def loss_of_half(model: nn.Module, number: int, rank: int) -> Tensor:
    images, classes = (both.chunk(2)[rank] for both in batch(number))
    torch.manual_seed(10 * number + rank)  # for the places of the sample
    return F.cross_entropy(model(images), classes)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


# In one process


def alone(step, broadcast_buffers: bool = True, **_) -> list[dict[str, Tensor]]:
    """What both processes end in: steps by the mean of their gradients, buffers of the first one or their own."""
    models = [build(step), build(step)]
    first, second = models
    optimizer = sgd(first)
    for number in range(STEPS):
        if broadcast_buffers:
            second.load_state_dict(first.state_dict())
        for rank, model in enumerate(models):
            model.zero_grad()
            loss_of_half(model, number, rank).backward()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad = (p.grad + q.grad) / 2
        optimizer.step()
        second.load_state_dict(dict(first.named_parameters()), strict=False)
    return [model.state_dict() for model in models]


def whole() -> dict[str, Tensor]:
    """What processes end in that share the statistics of their norms: the whole batch, by the definition."""
    model = build(BranchStep())
    optimizer = sgd(model)
    for number in range(STEPS):
        images, classes = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()
    return model.state_dict()


# In two


def halves(step, **options) -> dict[str, Tensor]:
    """Under DDP, as a user has it."""
    model = build(step)
    trained = nn.parallel.DistributedDataParallel(model, **options)
    optimizer = sgd(model)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss_of_half(trained, number, dist.get_rank()).backward()
        optimizer.step()
    return model.state_dict()


def halves_with_shared_norms(step) -> dict[str, Tensor]:
    """With SyncBatchNorm. On a CPU it refuses to run, and DDP to have it: its sums go over gloo, and gradients, too."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build(step))
    optimizer = sgd(model)
    for number in range(STEPS):
        optimizer.zero_grad()
        with patch.object(nn.SyncBatchNorm, "forward", SharedNorm.forward):
            loss_of_half(model, number, dist.get_rank()).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= 2
        optimizer.step()
    return model.state_dict()


def refusal() -> str:
    """What a sampled step says to synchronised norms."""
    try:
        loss_of_half(nn.SyncBatchNorm.convert_sync_batchnorm(build(SAMPLED)), 0, dist.get_rank())
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: halves(step, **options) for name, (step, options) in CASES.items()}
    shared = {name: halves_with_shared_norms(step) for name, step in WITH_SHARED_NORMS.items()}
    ended = {"own norms": found, "shared norms": shared, "refusal": refusal()}
    torch.save(ended, Path(sys.argv[1], f"{os.environ['RANK']}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
