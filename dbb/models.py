"""The networks of the paper, each with plain convolutions or with blocks: `vgg16(10, block="dbb")`.

Where the paper puts blocks holds everywhere: on convolutions with 1 < K < 7 (section 4.1). 1x1, 7x7 and 11x11 stay
plain. A plain convolution is a `ConvBlock`, one branch with its batch norm, so that `reparameterize` folds that, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dbb.blocks import Block, ConvBlock, block_type, takes_block
from dbb.surgery import replace_convs


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    *,
    block: Block = "plain",
    relu: bool = True,
) -> nn.Module:
    """A convolution with its batch norm, as a block where the paper puts one; padded to keep the size unless told."""
    kind = block_type(block) if takes_block(kernel_size) else ConvBlock
    padding = kernel_size // 2 if padding is None else padding
    nonlinear = nn.ReLU(inplace=True) if relu else None
    return kind(in_channels, out_channels, kernel_size, stride, padding, groups=groups, nonlinear=nonlinear)


def vgg16(num_classes: int = 10, block: Block = "plain", width: float = 1.0) -> nn.Sequential:
    """VGG-16 for 32x32 images: 13 convolutions, then one hidden layer of 512 instead of two (section 4.1).

    width: of every layer, as a share of the original's. Five poolings leave one pixel, so the paper's global average
    pooling has nothing to do and is left out.
    """
    layers: list[nn.Module] = []
    channels = 3
    for stage, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            out = _scaled(stage, width)
            layers.append(convolution(channels, out, 3, block=block))
            channels = out
        layers.append(nn.MaxPool2d(2))
    hidden = _scaled(512, width)
    head = [nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, num_classes)]
    return nn.Sequential(*layers, *head)


def alexnet(num_classes: int = 1000, block: Block = "plain") -> nn.Sequential:
    """AlexNet with batch norms and without local response normalisation, as in ACNet (section 4.1).

    The 11x11 stays plain, the 5x5 and the 3x3 take blocks. The hidden layers are torchvision's (the paper names none).
    """
    return nn.Sequential(
        convolution(3, 64, 11, stride=4, padding=2, block=block),
        nn.MaxPool2d(3, stride=2),
        convolution(64, 192, 5, block=block),
        nn.MaxPool2d(3, stride=2),
        convolution(192, 384, 3, block=block),
        convolution(384, 384, 3, block=block),
        convolution(384, 256, 3, block=block),
        nn.MaxPool2d(3, stride=2),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        *(nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True)),
        *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True)),
        nn.Linear(4096, num_classes),
    )


def mobilenet_v1(num_classes: int = 1000, block: Block = "plain", width: float = 1.0) -> nn.Sequential:
    """MobileNet v1: pairs of a depthwise 3x3, which takes a block, and a 1x1, which stays plain."""
    channels = _scaled(32, width)
    layers = [convolution(3, channels, 3, stride=2, block=block)]
    steps = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for out, stride in steps:
        layers.append(convolution(channels, channels, 3, stride, groups=channels, block=block))
        layers.append(convolution(channels, _scaled(out, width), 1))
        channels = _scaled(out, width)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def resnet18(num_classes: int = 1000, block: Block = "plain", others: Block | None = None) -> nn.Module:
    """torchvision's ResNet-18 with a block for each 3x3 convolution and its batch norm.

    others: a block for the convolutions of other sizes; "plain" lets their norms be folded, too
    """
    from torchvision.models import resnet18 as build

    return _with_blocks(build(weights=None, num_classes=num_classes), block, others)


def resnet50(num_classes: int = 1000, block: Block = "plain", others: Block | None = None) -> nn.Module:
    """torchvision's ResNet-50 with a block for each 3x3 convolution and its batch norm; `others` as for ResNet-18."""
    from torchvision.models import resnet50 as build

    return _with_blocks(build(weights=None, num_classes=num_classes), block, others)


def _with_blocks(resnet: nn.Module, block: Block, others: Block | None) -> nn.Module:
    replace_convs(resnet, block, inplace=True, say=None)
    if others is not None:
        replace_convs(resnet, others, where=lambda name, conv: True, inplace=True, say=None)
    return resnet


def small_resnet(
    num_classes: int = 10, block: Block = "plain", width: int = 16, depth: int = 1, stem_stride: int = 1
) -> nn.Sequential:
    """A ResNet for 32x32 images: three stages of `depth` residual blocks; the second and third begin with stride 2."""
    layers: list[nn.Module] = [convolution(3, width, 3, stem_stride, block=block)]
    channels = width
    for stage in range(3):
        for n in range(depth):
            out = width * 2**stage
            layers.append(Residual(channels, out, stride=2 if stage and not n else 1, block=block))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def digits_net(num_classes: int = 10, block: Block = "plain", width: int = 16) -> nn.Sequential:
    """Two blocks and a linear layer, for scikit-learn's 8x8 digits: what a notebook trains in seconds."""
    return nn.Sequential(
        convolution(1, width, 3, block=block),
        convolution(width, 2 * width, 3, stride=2, block=block),
        nn.Flatten(),
        nn.Linear(2 * width * 4 * 4, num_classes),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, block: Block = "plain") -> None:
        super().__init__()
        self.first = convolution(in_channels, out_channels, 3, stride, block=block)
        self.second = convolution(out_channels, out_channels, 3, block=block, relu=False)
        keeps_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if keeps_shape else convolution(in_channels, out_channels, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add both, then ReLU."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


MODELS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build for build in (vgg16, alexnet, mobilenet_v1, resnet18, resnet50, small_resnet, digits_net)
}


HEADS = ("retinanet", "fasterrcnn", "fcn", "deeplabv3")  # of detectors and segmenters, see `dbb.detect`
INPUT_SHAPES = {"digits_net": (1, 8, 8), "small_resnet": (3, 32, 32), "vgg16": (3, 32, 32)}


def input_shape(name: str) -> tuple[int, int, int]:
    """The channels, height and width of an image that the model takes; ImageNet's where nothing is known."""
    return (3, 64, 64) if name.endswith("_small") else INPUT_SHAPES.get(name, (3, 224, 224))


def build_model(
    name: str, num_classes: int, block: Block = "plain", *, block_options: dict | None = None, **options
) -> nn.Module:
    """The model of that name, with blocks: one of ours, or "torchvision.NAME" or "timm.NAME" (see `replace_convs`).

    A name such as "retinanet_resnet18" is a detector or segmenter of `dbb.detect`.

    block_options: of each block; options: of the function that builds the model

    Raises ValueError for an unknown model or block.
    """
    if block_options:
        block = partial(block_type(block), **block_options)
    if name.startswith(("torchvision.", "timm.")):
        return replace_convs(library_model(name, num_classes, **options), block, inplace=True, say=None)
    if name.partition("_")[0] in HEADS:
        from dbb.detect import build

        return build(name, num_classes, block, **options)
    if name not in MODELS:
        raise ValueError(f"model={name!r} is not known: choose from {', '.join(MODELS)}, torchvision.NAME, timm.NAME")
    return MODELS[name](num_classes, block, **options)


def library_model(name: str, num_classes: int, **options) -> nn.Module:
    """A network of another library as it stands there, without weights: "torchvision.NAME" or "timm.NAME".

    Raises ValueError for a name that the library does not know, and for a library that is not installed.
    """
    library, _, architecture = name.partition(".")
    try:
        if library == "timm":
            from timm import create_model

            return create_model(architecture, num_classes=num_classes, **options)
        from torchvision.models import get_model

        return get_model(architecture, weights=None, num_classes=num_classes, **options)
    except ImportError as error:
        raise ValueError(f"model={name!r} needs {library}: pip install {library}") from error
    except (ValueError, RuntimeError) as error:  # each says "unknown model" in its own way
        raise ValueError(f"model={name!r}: {library} cannot build it ({error})") from error


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))
