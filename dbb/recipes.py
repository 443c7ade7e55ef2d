"""How each network is trained: one frozen dataclass for each row of the paper's tables, and small ones for a CPU.

A value is the paper's where its source is named, and "assumed" where nothing of the paper is known. The sources are
those of the project's notes on the paper: follow-ups and the authors' code where the paper itself was not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace

from torch import nn

from dbb.steps import SampledStep, set_training_step
from dbb.tasks import SCORES

AUGMENTATIONS = ("none", "shift", "crop_flip", "imagenet", "imagenet_strong", "flip", "scale_crop_flip")
DECAY_RULES = ("by_type", "authors")
SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the learning rate at that share of the run
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "poly": lambda done: (1 - done) ** 0.9,
    "steps": lambda done: 0.1 ** ((done >= 81 / 126) + (done >= 108 / 126)),  # the paper's, on COCO
}


@dataclass(frozen=True)
class TrainingRecipe:
    """All that decides a training run but the hardware.

    task: "classify", "detect" or "segment" (see `dbb.detect`)
    model, model_options, block: see `dbb.models`
    block_options: of each block, as {"branches": ["kxk", "1x1"]}
    sampled_pixels: the norms of all blocks take their statistics from so many pixels, by `SampledStep`; None for all
    sampled_exact_sum: whether the sum of a block's branches is then normalised with all pixels
    data: "digits", "cifar10", "cifar100" or the path of an image folder; "scenes", or a folder as of COCO or Cityscapes
    batch_size: of all processes together
    lr: at the start of the schedule, which is stepped by iteration
    schedule: "cosine" and "poly" end at zero, "steps" falls twice to a tenth (`SCHEDULES`)
    warmup_epochs: in which lr rises from zero, before the schedule
    largest_gradient: norm to which the gradient of all parameters is shortened where it is longer; None never
    decay: "by_type" spares norms and biases; "authors" is the rule of the authors' code (see `dbb.train`)
    image_size: pixels of the crops that "imagenet" and "scale_crop_flip" augmentations make
    test_every: epochs from one test to the next; the last epoch is always tested
    train_images: how many of the training images are used, evenly from each class; None for all
    ema: decay per step of an average of the weights that is evaluated instead of them; None for none
    starts_from: checkpoint of the network whose weights a backbone starts with, "{block}" in it is the block's name;
        empty for random weights
    frozen_norms: whether the backbone's batch norms stay as they are there

    Raises ValueError for values that cannot be trained with.
    """

    name: str
    model: str
    data: str
    epochs: int
    batch_size: int
    lr: float
    block: str = "plain"
    block_options: dict = field(default_factory=dict)
    model_options: dict = field(default_factory=dict)
    sampled_pixels: int | None = None
    sampled_exact_sum: bool = False
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay: str = "by_type"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    ema: float | None = None
    augmentation: str = "crop_flip"
    image_size: int = 224
    test_every: int = 1
    train_images: int | None = None
    seed: int = 0
    task: str = "classify"
    schedule: str = "cosine"
    largest_gradient: float | None = None
    starts_from: str = ""
    frozen_norms: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name in ("epochs", "batch_size", "lr", "image_size", "test_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0")
        words = {"augmentation": AUGMENTATIONS, "decay": DECAY_RULES, "task": SCORES, "schedule": SCHEDULES}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: choose from {', '.join(known)}")
        if self.task == "classify" and (self.starts_from or self.frozen_norms):
            raise ValueError(
                f"starts_from={self.starts_from!r} and frozen_norms={self.frozen_norms} are about a backbone, and a "
                f"classifier has none: leave both out, or choose the task detect or segment"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}")

    @property
    def streamed(self) -> bool:
        """Whether the images stay on disk (see `dbb.imagenet`)."""
        return self.augmentation.startswith("imagenet")

    def with_changes(self, **changes) -> TrainingRecipe:
        """This recipe with other values. Raises ValueError for a name that no recipe has."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"a recipe has no {name!r}; it has {', '.join(known)}")
        return replace(self, **changes)

    def build_model(self, num_classes: int) -> nn.Module:
        """The network that the recipe trains, with random weights."""
        from dbb.models import build_model

        options = {"block_options": self.block_options, **self.model_options}
        model = build_model(self.model, num_classes, self.block, **options)
        if self.sampled_pixels is not None:
            step = SampledStep(self.sampled_pixels, always=True, exact_sum=self.sampled_exact_sum)
            set_training_step(model, step)
        return model

    def as_dict(self) -> dict:
        """All values, for records and checkpoints."""
        return asdict(self)


# Table 2, CIFAR: lr and schedule of the paper; batch 128 from DyRep's configuration of DBB and from ACNet's code; 600
# epochs and weight decay 1e-4 from DyRep's configuration alone (assumed for the paper); crops and flips of the paper.
_CIFAR = {"epochs": 600, "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "augmentation": "crop_flip"}
# Table 2, ImageNet ResNets: lr, cosine, augmentation of the paper; epochs, batch, decay rule of the authors' code.
_RESNET = {"epochs": 120, "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "decay": "authors"}

# Where `dbb train imagenet_resnet18` puts what detectors and segmenters start from.
_BACKBONE = "build/runs/imagenet_resnet18-{block}-0/model.safetensors"

_ALL = [
    TrainingRecipe("cifar10_vgg16", "vgg16", "cifar10", **_CIFAR),
    TrainingRecipe("cifar100_vgg16", "vgg16", "cifar100", **_CIFAR),
    TrainingRecipe("imagenet_resnet18", "resnet18", "imagenet", **_RESNET, augmentation="imagenet_strong"),
    TrainingRecipe("imagenet_resnet50", "resnet50", "imagenet", **_RESNET, augmentation="imagenet_strong"),
    # lr, cosine, augmentation of the paper; 90 epochs, batch 256, decay 4e-5 from DyRep's configuration.
    TrainingRecipe(
        "imagenet_mobilenet", "mobilenet_v1", "imagenet", epochs=90, batch_size=256, lr=0.1, weight_decay=4e-5,
        decay="authors", augmentation="imagenet",
    ),
    # lr, cosine, augmentation of the paper; epochs, batch and weight decay assumed, as of MobileNet.
    TrainingRecipe(
        "imagenet_alexnet", "alexnet", "imagenet", epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4,
        decay="authors", augmentation="imagenet",
    ),
    # Ours: seconds on a CPU, to show that the path works. Not a result.
    TrainingRecipe(
        "digits", "digits_net", "digits", epochs=12, batch_size=64, lr=0.1, weight_decay=5e-4, augmentation="shift",
    ),
    # Ours: the experiment that decides at small scale, minutes on two cores.
    TrainingRecipe(
        "cifar10_small", "small_resnet", "cifar10", epochs=12, batch_size=128, lr=0.1, weight_decay=5e-4,
        warmup_epochs=1, model_options={"width": 8}, train_images=5_000, test_every=4,
    ),
    # Ours: the paper's network at a quarter of its width.
    TrainingRecipe(
        "cifar10_vgg16_quarter", "vgg16", "cifar10", epochs=15, batch_size=128, lr=0.1, weight_decay=5e-4,
        warmup_epochs=1, model_options={"width": 0.25},
    ),
    # Table 3, COCO, but for CenterNet: lr, its two steps and 126k iterations of the paper. Assumed: batch 32, of which
    # 34 epochs are as many iterations, the size of the images, the weight decay, the warm-up.
    TrainingRecipe(
        "coco_retinanet_resnet18", "retinanet_resnet18", "coco", task="detect", epochs=34, batch_size=32, lr=0.02,
        schedule="steps", weight_decay=1e-4, warmup_epochs=0.25, largest_gradient=10.0, augmentation="flip",
        starts_from=_BACKBONE, frozen_norms=True, test_every=2,
    ),
    # Table 3, Cityscapes, but for PSPNet: 200 epochs, lr and poly of the paper. Assumed: batch 16, crops of 768 pixels,
    # the weight decay. PSPNet's augmentation is scales of 0.5 to 2, crops and mirror.
    TrainingRecipe(
        "cityscapes_fcn_resnet18", "fcn_resnet18", "cityscapes", task="segment", epochs=200, batch_size=16, lr=0.01,
        schedule="poly", weight_decay=1e-4, augmentation="scale_crop_flip", image_size=768,
        model_options={"dilate": True}, starts_from=_BACKBONE, test_every=10,
    ),
    # Ours: shapes and digits on crops of photographs, some two minutes on one core with blocks, less without.
    TrainingRecipe(
        "scenes_detect", "retinanet_small", "scenes", task="detect", epochs=8, batch_size=8, lr=0.02,
        weight_decay=1e-4, warmup_epochs=1, largest_gradient=10.0, augmentation="flip", train_images=400,
        model_options={"width": 16}, test_every=8,
    ),
    TrainingRecipe(
        "scenes_segment", "fcn_small", "scenes", task="segment", epochs=8, batch_size=8, lr=0.05,
        weight_decay=1e-4, warmup_epochs=1, largest_gradient=5.0, augmentation="flip", train_images=400,
        model_options={"width": 16}, test_every=8,
    ),
]  # fmt: skip
RECIPES: dict[str, TrainingRecipe] = {recipe.name: recipe for recipe in _ALL}


def recipe(name: str, **changes) -> TrainingRecipe:
    """The recipe of that name, with changes. Raises ValueError for an unknown name or change."""
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name].with_changes(**changes)
