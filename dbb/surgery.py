"""Whole models: blocks out of them (and, later, into them)."""

from __future__ import annotations

import copy

from torch import nn

from dbb.blocks import BranchBlock

WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


def reparameterize(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The model with every block folded into a plain `nn.Conv2d`, its answers the same up to rounding.

    Answers a copy, in which the branches were never copied; with `inplace=True` the model itself. A bare block is
    answered as its convolution. A model without blocks is answered as it is, so that folding twice is harmless.
    An optimizer that was built before knows nothing of the new parameters.

    Raises ValueError for a model in training mode, and for one inside a DDP or compile wrapper.
    """
    _check_ready(model)
    folded = {id(block): block.fuse() for block in _outermost_blocks(model)}
    if not inplace or id(model) in folded:
        return copy.deepcopy(model, folded)  # deepcopy takes what it finds in its memo: here, the folded blocks
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in folded:
                parent._modules[name] = folded[id(child)]
    return model


def _outermost_blocks(model: nn.Module) -> list[BranchBlock]:
    """The blocks that stand in no other block."""
    if isinstance(model, BranchBlock):
        return [model]
    return [block for child in model.children() for block in _outermost_blocks(child)]


def _check_ready(model: nn.Module) -> None:
    if type(model).__name__ in WRAPPERS:
        inner = "_orig_mod" if type(model).__name__ == "OptimizedModule" else "module"
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}, which would keep running the branches: fold "
            f"model.{inner} and wrap the result"
        )
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"the model is in training mode ({training[0]} and {len(training) - 1} more), where batch norms do not use "
            f"the statistics that folding uses: call model.eval() first"
        )
