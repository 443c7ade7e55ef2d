"""Trained models on disk: ours as safetensors that know how to build the model again, and the authors' `.pth` files.

The authors publish theirs at https://drive.google.com/drive/folders/1BPuqY_ktKz8LvHjFK5abD0qy3ESp8v6H and
https://pan.baidu.com/s/1wPaQnLKyNjF_bEMNRo4z6Q (access code dbbk), named like `ResNet-18_DBB_7101.pth` (training form)
and `ResNet-18_DBB_7101_deploy.pth` (folded). See `dbb.reference` for how their names become ours.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from dbb import reference
from dbb.blocks import BranchBlock
from dbb.figures import write_atomically
from dbb.models import HEADS, MODELS, input_shape
from dbb.recipes import TrainingRecipe
from dbb.surgery import outermost_blocks, reparameterize
from dbb.tasks import key_of
from dbb.verify import assert_equivalent

FORMS = ("training", "folded", "restored")
SUFFIXES = (".safetensors", ".pth")
NEXT = {  # what is usually done with a file of each form
    "training": "fold it with `dbb convert {path} folded.safetensors`, prove it with `dbb verify {path}`",
    "folded": "run it anywhere with `dbb export {path} model.onnx`, score it with `dbb eval {path}`",
    "restored": "its weights load strictly into the original architecture: for inference, or with frozen norms",
}


def form_of(model: nn.Module) -> str:
    """ "training" where the model holds a block in training form, else "folded"."""
    return "training" if any(isinstance(m, BranchBlock) and not m.deploy for m in model.modules()) else "folded"


def save_model(path: Path, model: nn.Module, recipe: TrainingRecipe, classes: tuple[str, ...], **facts) -> None:
    """Write the model's weights, its recipe, its classes and further `facts`, atomically."""
    about = {"recipe": recipe.as_dict(), "classes": list(classes), "form": form_of(model), **facts}
    _write(path, model, about)


def load_model(path: Path, device: str = "cpu") -> tuple[nn.Module, dict]:
    """The model in eval mode, in the form in which it was saved, and what is known about it.

    path: what `dbb train` or `dbb convert` has written, or a checkpoint of the authors

    Raises ValueError for a file that is missing, broken, of another kind, or that does not fit the model it names.
    """
    model, about = _model_with_blocks(Path(path), device)
    return (reparameterize(model) if about["form"] == "folded" else model), about


def facts_of(path: Path) -> dict:
    """What is known about the model in a file: its recipe, its classes, its form; with the errors of `load_model`."""
    return _read(Path(path))[1]


def load_weights(model: nn.Module, path: Path) -> dict:
    """Load a checkpoint, ours or the authors', strictly into a model of your own; answers what is known about it.

    Raises ValueError, and leaves the model as it was, where form, architecture or shapes do not fit; it says which, and
    the call that fits.
    """
    source, about = _model_with_blocks(Path(path))
    wanted = model.state_dict()
    for state in (source.state_dict(), reparameterize(source).state_dict() if about["form"] == "folded" else {}):
        if {k: t.shape for k, t in state.items()} == {k: t.shape for k, t in wanted.items()}:
            model.load_state_dict(state)
            return about
    raise ValueError(_why_it_does_not_fit(path, about, model, source.state_dict()))


def convert(source: Path, target: Path, restore: bool = False) -> dict:
    """Fold the model of one file into another, after the proof that both answer the same; answers what is known of it.

    source: as for `load_model`, in training form; with `restore` either form
    target: ends in .safetensors (knows how to build the model again) or .pth (its weights and nothing else)
    restore: write the original architecture, convolution and batch norm (see `reparameterize`)

    Raises ValueError for files that do not fit and where there is nothing to do, and AssertionError where the proof
    fails; nothing is written then.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target)
    model, about = _model_with_blocks(source)
    if about["form"] != "training" and not restore:
        raise ValueError(f"{source} is {about['form']} already: {describe(about)}")
    precise = copy.deepcopy(model).double()
    forms = (precise, reparameterize(precise, restore=restore, say=None))
    assert_equivalent(*(as_graph(form, about) for form in forms), example_input(about).double())
    about |= {"form": "restored" if restore else "folded", "converted_from": source.name}
    _write(target, reparameterize(model, restore=restore, say=None), about)
    return about


def as_graph(model: nn.Module, about: Mapping) -> nn.Module:
    """The model as a graph from one tensor to one: of a detector or segmenter what `dbb.detect.Dense` says."""
    if about["recipe"]["model"].partition("_")[0] not in HEADS:
        return model
    from dbb.detect import Dense

    return Dense(model)


def example_input(about: Mapping, batch: int = 2, size: int | None = None) -> Tensor:
    """Noise of the shape "n c h w" that the model takes, always the same."""
    channels, height, width = input_shape(about["recipe"]["model"])
    shape = (batch, channels, size or height, size or width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def describe(about: Mapping) -> str:
    """In a line: which network, which block, which form, how many classes."""
    recipe = about["recipe"]
    chosen = recipe["model_options"] | recipe.get("block_options", {})
    options = "".join(f", {name}={value}" for name, value in chosen.items())
    return f"{recipe['model']}{options} with block {recipe['block']!r}, {_classes(about)} classes, {about['form']} form"


def inspect_file(path: Path) -> str:
    """What a file is, in a few lines: its model and form, its tensors, what is known of it, what can be done with it.

    Raises ValueError for a file that holds no model.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        from dbb.export import onnx_operators

        counts = onnx_operators(path)
        return f"{path}: an ONNX model of {counts.total()} operators\n" + "\n".join(
            f"  {number:4} {name}" for name, number in counts.most_common()
        )
    if path.suffix == ".pth" and not reference.is_theirs(state := read_pth(path)):
        shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()]
        some = ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")
        return f"{path}: {len(state)} tensors by name, which do not tell their model: {some}"
    model, about = load_model(path)
    tensors = model.state_dict()
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}))
    known = ("authors", "converted_from", key_of(about["recipe"]), "commit")
    facts = {name: about[name] for name in known if name in about}
    return "\n".join(
        [
            f"{path}: {describe(about)}",
            f"  {len(tensors)} tensors in {kinds}, {sum(p.numel() for p in model.parameters()):,} parameters",
            *(f"  {name.replace('_', ' ')}: {value}" for name, value in facts.items()),
            f"  next: {NEXT[about['form']].format(path=path)}",
        ]
    )


def _classes(about: Mapping) -> int:
    return len(about["classes"])


def _model_with_blocks(path: Path, device: str = "cpu") -> tuple[nn.Module, dict]:
    """The model of a file with its blocks in place, folded ones in their folded form, which `restore` builds upon."""
    tensors, about, theirs = _read(path)
    recipe = about["recipe"]
    # Libraries compute some constants while building, which would stay without memory.
    with torch.device("meta" if recipe["model"] in MODELS else "cpu"):
        model = TrainingRecipe(**recipe).build_model(_classes(about)).eval()
    if about["form"] == "restored":
        model = reparameterize(model, restore=True, say=None)
    if about["form"] == "folded":
        for name, block in outermost_blocks(model).items():
            block.switch_to_deploy()
            if not theirs:
                tensors = _renamed(tensors, f"{name}.0." if block.nonlinear else f"{name}.", f"{name}.conv.")
    if theirs:
        tensors = reference.to_our_names(tensors, model)
    _check_fit(path, about, model, tensors)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval(), about


def _renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + n.removeprefix(old) if n.startswith(old) else n: tensor for n, tensor in tensors.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], dict, bool]:
    """A file's tensors, what is known of the model, and whether the names are still the authors'."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give a checkpoint, ours or the authors'"
        ) from error
    if start[8:] == b"{":
        return *_read_safetensors(path), False
    state = read_pth(path)
    return state, reference.about(state, path.name), True


def _readable(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give a checkpoint, ours or the authors'"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["dbb"])
        return load_file(path), about
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a model that `dbb train` or `dbb convert` has written ({error!r})") from error


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file by name, without "module." in front, and out of {"state_dict": ...}.

    Raises ValueError for a file that holds anything but tensors and plain values: code in it is never run.
    """
    with _readable(path) as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged, or holds more than tensors, such as a pickled model, which would run code: save "
                f"model.state_dict() instead"
            ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} holds no weights by name: give a state_dict, or {{'state_dict': ...}}")
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def _check_fit(path: Path, about: Mapping, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if misfit := _misfit(model.state_dict(), tensors):
        raise ValueError(f"{path} says it is {describe(about)}, but {misfit}: it is broken, or of another version")


def _misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """How names and shapes differ; nothing where they do not."""
    differ = {
        "missing": [name for name in wanted if name not in given],
        "surplus": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in given and given[name].shape != tensor.shape
        ],
    }
    return "; ".join(
        f"{len(names)} tensors are {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in differ.items()
        if names
    )


def _why_it_does_not_fit(path: Path, about: Mapping, model: nn.Module, given: Mapping[str, Tensor]) -> str:
    file, own = about["form"], form_of(model)
    if file == "training" and own == "folded":
        call = "load it before folding, or fold the file: dbb convert"
    elif file != "training" and own == "training":
        call = "load it into the folded model: load_weights(reparameterize(model.eval()), path)"
    else:
        call = "load_model(path) builds the model that it fits"
    misfit = _misfit(model.state_dict(), given)
    return f"{path} is {describe(about)}; the model is in {own} form, and {misfit}: {call}"


def _check_target(source: Path, target: Path) -> None:
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target} must end in {' or '.join(SUFFIXES)}")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the file that is read: give another name, or the trained weights are lost")


def _write(path: Path, model: nn.Module, about: Mapping) -> None:
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".pth":
        content = io.BytesIO()
        torch.save(tensors, content)
        write_atomically(path, content.getvalue())
    else:
        write_atomically(path, save(tensors, metadata={"dbb": json.dumps(about)}))
