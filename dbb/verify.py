"""Is the folded model the same model, and what does it save?"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from dbb.blocks import BranchBlock
from dbb.fold import is_norm
from dbb.surgery import reparameterize

# Largest error that rounding explains, relative to the largest output: float64 judges, the others are a budget.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class BlockError:
    """How far a block's folded form is from its training form, on the input that the block sees in the model.

    The relative errors are in units of the scale of what is summed, the branches' `|W| * |x| + |b|`: branches that
    cancel neither hide an error nor make one up.
    """

    name: str
    absolute64: float
    relative64: float
    absolute32: float
    relative32: float


@dataclass(frozen=True)
class Report:
    """A `BlockError` for every block of a model; prints as a table, worst block first."""

    blocks: tuple[BlockError, ...]

    @property
    def worst(self) -> BlockError:
        """The block with the largest relative error in float64."""
        return max(self.blocks, key=lambda b: b.relative64)

    def __str__(self) -> str:
        """A table, worst block first."""
        rows = sorted(self.blocks, key=lambda b: b.relative64, reverse=True)
        head = ("block", "float64 abs", "rel", "float32 abs", "rel")
        errors = [(b.absolute64, b.relative64, b.absolute32, b.relative32) for b in rows]
        return _table(head, [(b.name, *(f"{e:.1e}" for e in row)) for b, row in zip(rows, errors)])


@torch.no_grad()
def assert_equivalent(before: nn.Module, after: nn.Module, x: Tensor, rtol: float | None = None) -> float:
    """Prove that both models answer the same to `x`; answers the error, relative to the largest output.

    before: the training form, in eval mode; after: the folded form
    rtol: largest error allowed; by default 1e-10 in float64, and a budget for rounding in lower precision

    Raises AssertionError, which names the block that is worst, and ValueError for a model in training mode.
    """
    for name, model in (("before", before), ("after", after)):
        if model.training and not _exported(model):
            raise ValueError(f"`{name}` is in training mode, where norms use the batch: call {name}.eval() first")
    wanted, given = before(x), after(x)
    _check_outputs(wanted, given)
    rtol = TOLERANCE[wanted.dtype] if rtol is None else rtol
    error = _error(given, wanted) / _largest(wanted)
    if not error <= rtol:  # written so that nan fails
        raise AssertionError(
            f"the outputs differ by {error:.1e} of the largest, {rtol:.0e} is allowed in {wanted.dtype}"
            f"{_worst_block(before, after, x)}"
        )
    return error


@torch.no_grad()
def report(model: nn.Module, x: Tensor) -> Report:
    """Fold every block of `model` and compare it with its training form, each on the input that it sees.

    The model is left as it is; the comparison is made in float64 and float32 copies of each block, in eval mode.
    Raises ValueError where the model has no block in training form.
    """
    inputs = _block_inputs(copy.deepcopy(model).eval(), x)
    if not inputs:
        raise ValueError("the model has no block in training form: report needs it before it is folded")
    return Report(tuple(_block_error(name, block, seen) for name, block, seen in inputs))


def randomize_norms_(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Give every batch norm of `model`, in place, statistics and parameters as training might.

    A fresh norm hides errors of a fold: with mean 0, variance 1, scale 1 and shift 0 it is nearly the identity, and
    its border is zero. Answers the model.
    """
    for norm in filter(is_norm, model.modules()):
        for tensor, low, high in (
            (norm.running_mean, -0.5, 0.5),
            (norm.running_var, 0.5, 2.0),
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.5, 0.5),
        ):
            if tensor is not None:
                tensor.data.uniform_(low, high, generator=generator)
    return model


@dataclass(frozen=True)
class FormCost:
    """What one form of a model costs.

    parameters: numbers that are trained
    macs: multiply-adds of one forward pass, of convolutions and linear layers; one is a multiplication and an addition
    saved_bytes: what a forward pass keeps for the backward pass, its input included, parameters not
    seconds: median of a forward pass in eval mode
    """

    parameters: int
    macs: int
    saved_bytes: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """A model in training form and folded; prints as a table."""

    training: FormCost
    folded: FormCost

    def __str__(self) -> str:
        """A table of both forms and their ratio."""
        scales = {
            "parameters": ("parameters, M", 1e6),
            "macs": ("multiply-adds, M", 1e6),
            "saved_bytes": ("saved for backward, MiB", 2**20),
            "seconds": ("forward, ms", 1e-3),
        }
        rows = []
        for field in fields(FormCost):
            (label, unit), training = scales[field.name], getattr(self.training, field.name)
            folded = getattr(self.folded, field.name)
            rows.append(
                (
                    label,
                    f"{training / unit:.2f}",
                    f"{folded / unit:.2f}",
                    f"{training / folded:.2f}x" if folded else "-",
                )
            )
        return _table(("", "training form", "folded", "ratio"), rows)


def cost(model: nn.Module, x: Tensor, min_seconds: float = 0.2) -> Cost:
    """Parameters, multiply-adds, bytes saved for backward and time on `x`: training form against folded.

    The model is left as it is; a copy of it is measured, folded and measured again. `x`: "n c h w".
    """
    training = copy.deepcopy(model).eval()
    return Cost(_form_cost(training, x, min_seconds), _form_cost(reparameterize(training), x, min_seconds))


def summed_scale(block: BranchBlock, x: Tensor) -> Tensor:
    """The scale of what the block adds up, per output pixel: each branch's `|W| * |x| + |b|`, summed."""
    padding_mode = getattr(block, "padding_mode", "zeros")
    if padding_mode != "zeros":
        (top, bottom), (left, right) = block.spec.padding
        x = nn.functional.pad(x, (left, right, top, bottom), mode=padding_mode)
    return sum(branch.to(x.dtype).abs()(x.abs()) for branch in block.branches.fold_branches())


def _block_error(name: str, block: BranchBlock, x: Tensor) -> BlockError:
    errors = []
    for dtype in (torch.float64, torch.float32):
        training, seen = copy.deepcopy(block).to(dtype), x.to(dtype)
        training.nonlinear = None
        difference = (training.fuse()(seen) - training(seen)).abs().double()
        scale = summed_scale(training, seen).double().clamp_min(torch.finfo(dtype).tiny)
        errors += [difference.max().item(), (difference / scale).max().item()]
    return BlockError(name, *errors)


def _block_inputs(model: nn.Module, x: Tensor) -> list[tuple[str, BranchBlock, Tensor]]:
    """The blocks of a model in training form, each with the input that it sees when the model sees `x`."""
    inputs = {}
    with _hooks(model, lambda name, block, seen, _: inputs.setdefault(name, (name, block, seen))):
        model(x)
    return list(inputs.values())


def _worst_block(before: nn.Module, after: nn.Module, x: Tensor) -> str:
    """Which block of `before` its namesake in `after` follows least, on the same input."""
    errors = {}

    def compare(name: str, block: BranchBlock, seen: Tensor, answer: Tensor) -> None:
        given = after.get_submodule(name)(seen)
        errors[name or type(block).__name__] = _error(given, answer) / _largest(answer)

    try:
        with _hooks(before, compare):
            before(x)
    except AttributeError:
        return "; the models' blocks have different names, so none can be blamed"
    if not errors:
        return "; `before` has no blocks in training form"
    name = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    return f"; the worst block is {name!r}, off by {errors[name]:.1e} on its own input"


@contextmanager
def _hooks(model: nn.Module, seen: Callable[[str, BranchBlock, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `seen(name, block, input, output)` for every block in training form that runs."""
    handles = [
        block.register_forward_hook(lambda block, args, output, name=name: seen(name, block, args[0], output) and None)
        for name, block in model.named_modules()
        if isinstance(block, BranchBlock) and not block.deploy
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _exported(model: nn.Module) -> bool:
    """Whether it is a graph of torch.export, whose operators have one mode and whose `training` says nothing."""
    layers = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return isinstance(model, fx.GraphModule) and not any(isinstance(m, layers) for m in model.modules())


def _check_outputs(wanted: Tensor, given: Tensor) -> None:
    if not isinstance(wanted, Tensor) or not isinstance(given, Tensor):
        raise ValueError(
            f"the models answer {type(wanted).__name__} and {type(given).__name__}: compare models that answer one "
            f"tensor, or wrap them so that they do"
        )
    if wanted.shape != given.shape or wanted.dtype != given.dtype:
        raise AssertionError(
            f"the outputs are {tuple(wanted.shape)} {wanted.dtype} and {tuple(given.shape)} {given.dtype}"
        )


def _error(given: Tensor, wanted: Tensor) -> float:
    return (given.double() - wanted.double()).abs().max().item()


def _largest(x: Tensor) -> float:
    return max(x.abs().max().item(), torch.finfo(x.dtype).tiny)


def _form_cost(model: nn.Module, x: Tensor, min_seconds: float) -> FormCost:
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(x)
        timer = _timer()("model(x)", globals={"model": model, "x": x}, num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=min_seconds).median
    parameters = sum(p.numel() for p in model.parameters())
    return FormCost(parameters, counter.get_total_flops() // 2, _saved_bytes(model, x), seconds)


def _timer() -> type:
    """Return torch's `Timer`, imported late: that is slow, and looks for compilers, which nobody needs here.

    Where it finds those of CUDA and no GPU it would complain, in the middle of a table.
    """
    search = logging.getLogger("torch.utils.cpp_extension")
    before, search.disabled = search.disabled, True
    try:
        from torch.utils.benchmark import Timer
    finally:
        search.disabled = before
    return Timer


def _saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps in a training step, without parameters and buffers."""
    training = copy.deepcopy(model).train()
    own = {t.untyped_storage().data_ptr() for t in chain(training.parameters(), training.buffers())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = training(x)
    del output  # held until here, so that no address was used twice
    return sum(kept.values())


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns wide enough for their cells, names to the left and numbers to the right."""
    widths = [max(len(row[n]) for row in [head, *rows]) for n in range(len(head))]
    lines = [
        [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])] for row in [head, *rows]
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
