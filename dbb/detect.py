"""torchvision's detectors and segmenters with blocks in their backbones: built, trained, scored, made one graph.

A name is head and backbone: "retinanet_resnet18", "fasterrcnn_resnet50", "fcn_small", "deeplabv3_resnet18". Blocks
stand in the backbone alone, as in the paper (Table 3). Images come normalised, from `dbb.annotated`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import ResNet
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from dbb.annotated import IGNORED, BoxedBatches, BoxedImages, MaskedBatches, load_boxes, load_masks
from dbb.blocks import Block
from dbb.models import small_resnet
from dbb.surgery import replace_convs
from dbb.tasks import Task

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval

    from dbb.train import Hardware

NORMALISED = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # what detectors are told, as images come normalised
SMALL_ANCHORS = ((12, 16), (20, 26), (30, 36))  # sides in pixels, at strides 4, 8 and 16
SMALL_STAGE = -2  # that a small segmenter reads, a quarter of the image's size: its last one outlines nothing
DILATED = ("layer3", "layer4")  # stages of a ResNet whose stride a segmenter takes out


# Building


@dataclass(frozen=True)
class Trunk:
    """A network up to its last feature map, and the channels of its stages by name, fine to coarse."""

    network: nn.Module
    stages: dict[str, int]

    def pyramid(self, levels: int, channels: int, extra: nn.Module) -> BackboneWithFPN:
        """A feature pyramid on the last so many stages."""
        used = dict(list(self.stages.items())[-levels:])
        names = {name: str(n) for n, name in enumerate(used)}
        return BackboneWithFPN(self.network, names, list(used.values()), channels, extra)

    def up_to(self, stage: int) -> tuple[IntermediateLayerGetter, int]:
        """The network as a segmenter reads it, up to that stage, -1 for the last one, and the channels there."""
        name, channels = list(self.stages.items())[stage]
        return IntermediateLayerGetter(self.network, {name: "out"}), channels


def build(
    name: str, num_classes: int, block: Block = "plain", *, width: int = 16, dilate: bool = False, **options
) -> nn.Module:
    """The detector or segmenter of that name, without weights, with a block for each 3x3 of its backbone.

    num_classes: of objects, for a detector, or of pixels, the background among them, for a segmenter
    width: of the small backbone; dilate: keep the last two stages of a ResNet at the size of the one before them
    options: of torchvision's class, as min_size

    A detector takes a list of images "3 h w" (and, in training, targets) and answers boxes, labels and scores of each
    (in training, losses); a segmenter takes "n 3 h w" and answers {"out": "n classes h w"}.
    Raises ValueError for an unknown name.
    """
    head, _, backbone = name.partition("_")
    if head not in HEADS or backbone not in ("small", "resnet18", "resnet50"):
        raise ValueError(
            f"model={name!r} is not known: choose a head out of {', '.join(HEADS)}, and small, resnet18 or resnet50 "
            f"behind it, as in 'retinanet_resnet18'"
        )
    trunk = small_trunk(block, width) if backbone == "small" else resnet_trunk(backbone, block, dilate)
    return HEADS[head](trunk, num_classes, small=backbone == "small", **options)


def small_trunk(block: Block, width: int) -> Trunk:
    """The small ResNet of `dbb.models`, at half the size of the image from its first convolution on."""
    network = small_resnet(block=block, width=width, stem_stride=2)
    return Trunk(network, {"1": width, "2": 2 * width, "3": 4 * width})


def resnet_trunk(name: str, block: Block, dilate: bool = False) -> Trunk:
    """torchvision's ResNet, with blocks through `replace_convs`."""
    resnet = get_model(name, weights=None)
    if dilate:
        take_strides_out(resnet)
    channels = resnet.fc.in_features
    replace_convs(resnet, block, inplace=True, say=None)
    return Trunk(resnet, {f"layer{n}": channels >> (4 - n) for n in range(1, 5)})


def take_strides_out(resnet: ResNet) -> ResNet:
    """Put dilation in the place of the strides of the last two stages, in place.

    What follows a stride that is gone steps over the pixels that the stride would have left out. So the answers at
    those places stay what they were, and the others are new. torchvision does this for bottlenecks alone.
    """
    dilation = 1
    for unit in (unit for stage in DILATED for unit in getattr(resnet, stage)):
        for conv in (m for m in unit.modules() if isinstance(m, nn.Conv2d)):
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation, dilation)
                dilation *= conv.stride[0]
            conv.stride = (1, 1)
    return resnet


def _retinanet(trunk: Trunk, num_classes: int, small: bool, **options) -> RetinaNet:
    if not small:
        pyramid = trunk.pyramid(3, 256, LastLevelP6P7(256, 256))
        return RetinaNet(pyramid, num_classes + 1, **NORMALISED, **options)
    pyramid = trunk.pyramid(2, 24, LastLevelMaxPool())
    anchors = AnchorGenerator(SMALL_ANCHORS, ((1.0,),) * len(SMALL_ANCHORS))
    # With norms it learns in minutes from random weights, which torchvision's plain head does not.
    head = RetinaNetHead(24, len(SMALL_ANCHORS[0]), num_classes + 1, norm_layer=partial(nn.GroupNorm, 8))
    sizes = {"min_size": 64, "max_size": 64, "detections_per_img": 20, "topk_candidates": 100} | options
    return RetinaNet(pyramid, num_classes + 1, anchor_generator=anchors, head=head, **NORMALISED, **sizes)


def _faster_rcnn(trunk: Trunk, num_classes: int, small: bool, **options) -> FasterRCNN:
    if not small:
        pyramid = trunk.pyramid(4, 256, LastLevelMaxPool())
        return FasterRCNN(pyramid, num_classes + 1, **NORMALISED, **options)
    pyramid = trunk.pyramid(2, 24, LastLevelMaxPool())
    anchors = AnchorGenerator(SMALL_ANCHORS, ((1.0,),) * len(SMALL_ANCHORS))
    parts = {"rpn_anchor_generator": anchors, "box_roi_pool": MultiScaleRoIAlign(["0", "1"], 7, 2)}
    sizes = {"min_size": 64, "max_size": 64, "box_detections_per_img": 20, "rpn_post_nms_top_n_test": 100} | options
    return FasterRCNN(pyramid, num_classes + 1, **parts, **NORMALISED, **sizes)


def _fcn(trunk: Trunk, num_classes: int, small: bool, **options) -> FCN:
    backbone, channels = trunk.up_to(SMALL_STAGE if small else -1)
    return FCN(backbone, FCNHead(channels, num_classes), **options)


def _deeplab(trunk: Trunk, num_classes: int, small: bool, **options) -> DeepLabV3:
    backbone, channels = trunk.up_to(SMALL_STAGE if small else -1)
    return DeepLabV3(backbone, DeepLabHead(channels, num_classes), **options)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "retinanet": _retinanet,
    "fasterrcnn": _faster_rcnn,
    "fcn": _fcn,
    "deeplabv3": _deeplab,
}


def load_backbone(model: nn.Module, path: Path, block: str) -> None:
    """Load the weights of a trained network into the backbone of a detector or segmenter; its classifier is left out.

    path: a checkpoint of `dbb train`, or of the authors, in training form
    Raises ValueError where it is missing, or does not fit.
    """
    from dbb.checkpoint import describe, load_model

    if not path.exists():
        raise ValueError(
            f"{path}, whose weights the backbone starts from, is not there: dbb train imagenet_resnet18 --block "
            f"{block} makes it, --set starts_from=PATH names another, and with --set starts_from='' --set "
            f"frozen_norms=False the weights are random"
        )
    trained, about = load_model(path)
    body = model.backbone.body if isinstance(model.backbone, BackboneWithFPN) else model.backbone
    given, wanted = trained.state_dict(), body.state_dict()
    parts = dict(body.named_children())  # without the classifier
    given = {name: value for name, value in given.items() if name.partition(".")[0] in parts}
    misfits = [name for name in given.keys() | wanted.keys() if _shape(given, name) != _shape(wanted, name)]
    if misfits:
        raise ValueError(
            f"{path} is {describe(about)}, and does not fit the backbone with its {block!r} blocks "
            f"({', '.join(sorted(misfits)[:3])}): give the same network with the same block, in training form"
        )
    body.load_state_dict(given)


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


# One tensor in, one tensor out


class Dense(nn.Module):
    """What of a detector or segmenter is one graph of tensors: input "n 3 h w", normalised, of any form.

    RetinaNet: for each anchor its logits and its box, "n anchors classes+4"; a segmenter: "n classes h w"; Faster
    R-CNN: the features that its second stage reads, "n values", as that stage has as many boxes as the first one finds.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        if isinstance(self.model, RetinaNet):
            answer = self.model.head(list(self.model.backbone(x).values()))
            return torch.cat([answer["cls_logits"], answer["bbox_regression"]], -1)
        if isinstance(self.model, FasterRCNN):
            return torch.cat([level.flatten(1) for level in self.model.backbone(x).values()], 1)
        return self.model(x)["out"]


# Scores


@torch.no_grad()
def find_boxes(model: nn.Module, batches: BoxedBatches, hardware: Hardware) -> list[dict]:
    """What a detector, put into eval mode, finds in all images, as COCO lists results; from all processes.

    image_id, category_id, bbox (left, top, width, height) in pixels, score
    """
    model.eval()
    found = []
    for images, targets in batches.epoch():
        with hardware.autocast():
            answers = model(images)
        found += [entry for pair in zip(answers, targets) for entry in _entries(*pair, batches.data)]
    if not dist.is_initialized():
        return found
    parts: list[list[dict]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, found)
    return [entry for part in parts for entry in part]


def _entries(answer: dict[str, Tensor], target: dict, images: BoxedImages) -> list[dict]:
    corners = answer["boxes"].double().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    return [
        {"image_id": target["image_id"], "category_id": images.categories[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes, answer["labels"].tolist(), answer["scores"].tolist())
    ]


def average_precision(found: list[dict], images: BoxedImages) -> dict[str, float]:
    """COCO's scores by pycocotools, shares of 1: AP is the mean over overlaps of 0.50 to 0.95, AP50 and AP75 at one."""
    names = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
    if not found:  # pycocotools cannot read an empty list
        return dict.fromkeys(names, 0.0)
    stats = coco_evaluation(found, images).stats
    return {name: max(float(value), 0.0) for name, value in zip(names, stats)}  # it says -1 where there is nothing


def coco_evaluation(found: list[dict], images: BoxedImages) -> COCOeval:
    """pycocotools' evaluation of what was found: `stats`, and precision by overlap, recall and class in `eval`."""
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(StringIO()):
        evaluation = COCOeval(images.coco, images.coco.loadRes(found), "bbox")
        evaluation.params.imgIds = images.ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@torch.no_grad()
def intersection_over_union(model: nn.Module, batches: MaskedBatches, hardware: Hardware) -> tuple[float, list[float]]:
    """Of a segmenter, put into eval mode: the mean over classes (mIoU), and each class's, over all images' pixels.

    By torchmetrics, from all processes. A class that is neither there nor answered does not count in the mean.
    """
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassJaccardIndex

    model.eval()
    arguments = {"num_classes": len(batches.data.classes), "ignore_index": IGNORED}
    averages = {"mean": "macro", "each": None}
    kinds = {name: MulticlassJaccardIndex(average=average, **arguments) for name, average in averages.items()}
    metrics = MetricCollection(kinds).to(hardware.device)
    for images, classes in batches.epoch():
        with hardware.autocast():
            answers = model(hardware.laid_out(images))["out"]
        metrics.update(answers.argmax(1), classes)
    found = metrics.compute()
    return found["mean"].item(), found["each"].tolist()


# Training


def _detection_loss(model: nn.Module, images: list[Tensor], targets: list[dict], recipe) -> Tensor:
    return sum(model(images, targets).values())


def _segmentation_loss(model: nn.Module, images: Tensor, classes: Tensor, recipe) -> Tensor:
    answers = model(images)["out"]
    return F.cross_entropy(answers, classes, ignore_index=IGNORED, label_smoothing=recipe.label_smoothing)


def _evaluate_detector(model: nn.Module, batches: BoxedBatches, hardware: Hardware) -> tuple[float, None]:
    return average_precision(find_boxes(model, batches, hardware), batches.data)["AP"], None


def _evaluate_segmenter(model: nn.Module, batches: MaskedBatches, hardware: Hardware) -> tuple[float, None]:
    return intersection_over_union(model, batches, hardware)[0], None


TASKS = {
    "detect": Task(8, lambda recipe, root: load_boxes(recipe.data, root), _detection_loss, _evaluate_detector),
    "segment": Task(4, lambda recipe, root: load_masks(recipe.data, root), _segmentation_loss, _evaluate_segmenter),
}
