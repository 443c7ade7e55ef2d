"""Trained models on disk: safetensors with what is needed to build the model again, in either form."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from dbb.blocks import BranchBlock
from dbb.figures import write_atomically
from dbb.models import build_model
from dbb.recipes import TrainingRecipe
from dbb.surgery import reparameterize

FORMS = ("training", "folded")
# The authors' names for our parts.
REFERENCE_PARTS = {
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


def from_reference(name: str) -> str:
    """Our name of what the authors' code calls `name`: a parameter or buffer of a block in training form.

    Raises ValueError for a name that their blocks do not have.
    """
    for theirs, ours in REFERENCE_PARTS.items():
        if name.startswith(f"{theirs}."):
            return f"branches.{ours}{name.removeprefix(theirs)}"
    raise ValueError(f"{name!r} is no tensor of the authors' blocks: they have {', '.join(REFERENCE_PARTS)}")


def form_of(model: nn.Module) -> str:
    """ "training" where the model holds a block in training form, else "folded"."""
    return "training" if any(isinstance(m, BranchBlock) and not m.deploy for m in model.modules()) else "folded"


def save_model(path: Path, model: nn.Module, recipe: TrainingRecipe, classes: tuple[str, ...], **facts) -> None:
    """Write the model's weights, its recipe, its classes and further `facts`, atomically."""
    from safetensors.torch import save

    about = {"recipe": recipe.as_dict(), "classes": list(classes), "form": form_of(model), **facts}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(tensors, metadata={"dbb": json.dumps(about)}))


def load_model(path: Path, device: str = "cpu") -> tuple[nn.Module, dict]:
    """The model in eval mode, in the form in which it was saved, and what was said about it.

    Raises ValueError for a file that is missing, broken or not written by `save_model`.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["dbb"])
        tensors = load_file(path, device=device)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}: give a checkpoint that `dbb train` has written") from error
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a model that `dbb train` has written ({error!r})") from error
    with torch.device("meta"):
        recipe = about["recipe"]
        model = build_model(recipe["model"], len(about["classes"]), recipe["block"], **recipe["model_options"]).eval()
        model = reparameterize(model) if about["form"] == "folded" else model
    model.load_state_dict(tensors, assign=True)
    return model.eval(), about
