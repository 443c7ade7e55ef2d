"""What a network is trained to do, as the loop of `dbb.train` needs to know it: data, loss, score.

Classification is in `dbb.train` itself, detection and segmentation in `dbb.detect`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

SCORES = {"classify": ("test_accuracy", "accuracy"), "detect": ("test_ap", "AP"), "segment": ("test_miou", "mIoU")}


@dataclass(frozen=True)
class Task:
    """A kind of training.

    test_batch: images that a process is tested on at once
    load: (recipe, root) -> training and test images, which have `batches`, `classes` and `fingerprint`
    loss: (model, images, targets, recipe) -> what is to become small, for a batch or a piece of one
    evaluate: (model, batches, hardware) -> the score of a model, a share of 1, and its mean loss where it has one; each
        image counts once, over all processes
    """

    test_batch: int
    load: Callable[..., tuple[Any, Any]]
    loss: Callable[..., Tensor]
    evaluate: Callable[..., tuple[float, float | None]]


def key_of(recipe: dict) -> str:
    """Under which name a recipe, as a record holds it, has its score there: "test_accuracy", "test_ap", "test_miou"."""
    return SCORES[recipe.get("task", "classify")][0]


def word_of(recipe: dict) -> str:
    """What that score is called: "accuracy", "AP" or "mIoU"."""
    return SCORES[recipe.get("task", "classify")][1]
