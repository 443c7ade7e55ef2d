"""The authors' checkpoints: which network a file holds, and what our names of its tensors are."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from dbb.blocks import BranchBlock
from dbb.imagenet import MEAN, STD
from dbb.recipes import recipe

# Their names for the parts of a block, and ours.
PARTS = {
    "dbb_origin": "kxk",
    "dbb_1x1": "1x1",
    "dbb_1x1_kxk.idconv1": "1x1_kxk.pointwise.prefix.conv",
    "dbb_1x1_kxk.conv1": "1x1_kxk.pointwise.prefix.conv",
    "dbb_1x1_kxk.bn1.bn": "1x1_kxk.pointwise.prefix.bn",
    "dbb_1x1_kxk.conv2": "1x1_kxk.conv",
    "dbb_1x1_kxk.bn2": "1x1_kxk.bn",
    "dbb_avg.conv": "1x1_avg.pointwise.prefix.conv",
    "dbb_avg.bn.bn": "1x1_avg.pointwise.prefix.bn",
    "dbb_avg.avgbn": "1x1_avg.bn",
    "square_conv": "kxk.conv",
    "square_bn": "kxk.bn",
    "ver_conv": "kx1.conv",
    "ver_bn": "kx1.bn",
    "hor_conv": "1xk.conv",
    "hor_bn": "1xk.bn",
}
FOLDED = "dbb_reparam"
# What stands in one place of their networks: a convolution with its norm, a block, or the linear layer.
PLACE = re.compile(
    r"(conv1|stage0\.conv1|stage\d\.\d+\.(?:conv\d|shortcut)|stem\.\d+\.(?:depthwise|pointwise)|linear)\.(.+)"
)
RESNETS = {((2, 2, 2, 2), "conv2"): "resnet18", ((3, 4, 6, 3), "conv3"): "resnet50"}  # blocks a stage, last layer


def is_theirs(state: Mapping[str, Tensor]) -> bool:
    """Whether all names are names of the authors' networks."""
    return all(map(PLACE.fullmatch, state))


def about(state: Mapping[str, Tensor], file: str) -> dict:
    """What the names and shapes of an authors' checkpoint say of its network, in the words of our checkpoints.

    The recipe is the one of the paper's table, for evaluation: the file does not tell how it was trained. Its images
    are taken to be normalised as ImageNet's usually are.
    Raises ValueError for weights that are none of theirs.
    """
    if not is_theirs(state):
        stranger = next(name for name in state if not PLACE.fullmatch(name))
        raise ValueError(
            f"{file} is none of the authors' checkpoints (it has {stranger!r}), and plain weights do not tell "
            f"their model: load them with model.load_state_dict, or give a file of `dbb train`"
        )
    model, block = _network(state, file), _block(state)
    folded = not any(".running_mean" in name for name in state)
    classes = [str(number) for number in range(len(state["linear.bias"]))] if "linear.bias" in state else []
    # Their folded form has no batch norm anywhere; a mobilenet of ours has none outside of blocks, a resnet does.
    options = {"others": "plain"} if folded and model.startswith("resnet") else {}
    trained = recipe(f"imagenet_{model.removesuffix('_v1')}", block=block, model_options=options)
    return {
        "recipe": trained.as_dict(),
        "classes": classes,
        "form": "folded" if folded else "training",
        "normalised_by": [list(MEAN), list(STD)],
        "authors": file,
    }


def to_our_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an authors' checkpoint by the names that they have in our `model`, blocks in place."""
    ours: dict[str, Tensor] = {}
    layers = dict(model.named_modules())
    for name, tensor in state.items():
        theirs, part = PLACE.fullmatch(name).groups()
        place = _place(theirs, model)
        layer = layers.get(place)
        if isinstance(layer, BranchBlock):
            ours[f"{place}.{_part_of_block(part, layer.deploy)}"] = tensor
        elif part.startswith("bn."):
            ours[_norm_behind(place) + part.removeprefix("bn")] = tensor
        else:
            ours[f"{place}.{part.removeprefix('conv.')}"] = tensor
    return ours


def from_reference(name: str) -> str:
    """Our name of what the authors' code calls `name`: a parameter or buffer of a block in training form.

    Raises ValueError for a name that their blocks do not have.
    """
    for theirs, ours in PARTS.items():
        if name.startswith(f"{theirs}."):
            return f"branches.{ours}{name.removeprefix(theirs)}"
    raise ValueError(f"{name!r} is no tensor of the authors' blocks: they have {', '.join(PARTS)}")


def _network(state: Mapping[str, Tensor], file: str) -> str:
    if any(name.startswith("stem.") for name in state):
        return "mobilenet_v1"
    units = {tuple(name.split(".")[:3]) for name in state if name.startswith("stage")}
    depths = tuple(len({unit for stage, unit, _ in units if stage == f"stage{n}"}) for n in range(1, 5))
    last = max((layer for _, _, layer in units if layer.startswith("conv")), default="")
    if (depths, last) not in RESNETS:
        raise ValueError(f"{file} is a network of {depths} blocks that end in {last!r}; known are {RESNETS}")
    return RESNETS[depths, last]


def _block(state: Mapping[str, Tensor]) -> str:
    if any(".dbb_" in name for name in state):
        return "dbb"
    return "acb" if any(".square_" in name for name in state) else "plain"


def _place(theirs: str, model: nn.Module) -> str:
    """Our name of a place in their networks."""
    if theirs == "linear":
        return str(len(model) - 1) if isinstance(model, nn.Sequential) else "fc"
    if theirs == "conv1":
        return "0"
    stage, _, rest = theirs.partition(".")
    if stage == "stem":
        number, _, half = rest.partition(".")
        return str(1 + 2 * int(number) + (half == "pointwise"))
    place = rest if stage == "stage0" else f"layer{stage[-1]}.{rest}"
    return place.replace("shortcut", "downsample.0")


def _norm_behind(place: str) -> str:
    """torchvision's name of the norm behind a convolution."""
    return place.replace("conv", "bn") if "conv" in place else f"{place.rpartition('.')[0]}.1"


def _part_of_block(part: str, folded: bool) -> str:
    """Our name of what stands in the place of a block; a plain convolution and its norm are one branch of it."""
    if folded:
        return f"conv.{part.removeprefix(f'{FOLDED}.').removeprefix('conv.')}"
    return f"branches.kxk.{part}" if part.startswith(("conv.", "bn.")) else from_reference(part)
