"""Whole models: blocks into them, and out of them again.

The order that works: surgery, SyncBatchNorm, optimizer, DDP, compile. An optimizer holds parameters, not names: one
that was built before surgery goes on training layers that no longer stand in the model. `check_optimizer` tells.
"""

from __future__ import annotations

import copy
import gc
import re
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dbb.blocks import Block, BranchBlock, ConvBlock, DiverseBranchBlock, block_type, takes_block
from dbb.fold import fold, is_frozen_norm, is_norm
from dbb.pairs import Readers, find_pairs, skeleton

WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")
# Batch norms whose forward is known: torch's, and timm's, which end in a dropout and an activation.
PLAIN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORMS_WITH_MORE = ("BatchNormAct2d", "SyncBatchNormAct")

Where = Callable[[str, nn.Conv2d], bool] | str
Pairs = Mapping[str, str | None]


# Blocks in


@dataclass(frozen=True)
class Choice:
    """What surgery does with one convolution: replace it and its norm, or leave it alone for a reason."""

    name: str
    conv: nn.Conv2d
    norm: str | None
    reason: str

    @property
    def replaced(self) -> bool:
        """Whether it is replaced."""
        return not self.reason

    def __str__(self) -> str:
        c = self.conv
        size, stride = ("x".join(map(str, pair)) for pair in (c.kernel_size, c.stride))
        shape = f"{c.in_channels} -> {c.out_channels}, {size}, stride {stride}, groups {c.groups}"
        end = f"with {self.norm or 'no norm'}" if self.replaced else f"left alone: {self.reason}"
        return f"{self.name or 'the model itself'} ({shape}) {end}"


class Survey(tuple[Choice, ...]):
    """Every convolution of a model and what surgery does with it. `str` is one line each, `summary` a few in all."""

    @property
    def replaced(self) -> list[Choice]:
        """Those that are replaced."""
        return [choice for choice in self if choice.replaced]

    def summary(self) -> str:
        """How many are replaced, and how many are left alone for which reason."""
        left = defaultdict(list)
        for choice in self:
            if not choice.replaced:
                left[choice.reason].append(choice.name or "the model itself")
        lines = [f"{len(self.replaced)} of {len(self)} convolutions replaced"]
        for reason, names in left.items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"  {len(names)} left alone, {reason}: {shown}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def survey_convs(
    model: nn.Module,
    block: Block = DiverseBranchBlock,
    where: Where | None = None,
    pairs: Pairs | None = None,
    **options,
) -> Survey:
    """What `replace_convs` would do with every `nn.Conv2d` of the model, and why; nothing is changed.

    Arguments and errors as those of `replace_convs`, but that no convolution need be chosen.
    """
    _refuse_wrapped(model, "put the blocks into")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("the model has lazy layers without weights: send one batch through it first")
    kind, options = _kind(block, options)
    chosen = _selector(where)
    if not hasattr(kind, "from_conv"):
        raise ValueError(f"block={block!r} cannot take the place of a convolution: give a subclass of dbb.ConvBlock")
    found = {"": Readers()} if isinstance(model, nn.Conv2d) else find_pairs(model)
    readers = _with_pairs_by_hand(model, found, pairs or {})
    owners = _owners_of_parameters(model)
    choices = []
    refusals: dict[str, str] = {}

    def refusal(conv: nn.Conv2d) -> str:
        """Of the block; asked once for each geometry, of which a network has few."""
        if str(conv) not in refusals:
            refusals[str(conv)] = _no_block(kind, conv, options)
        return refusals[str(conv)]

    for name, reader in readers.items():
        conv = model.get_submodule(name)
        reason = (
            _not_chosen(name, conv, where, chosen)
            or _no_plain_conv(conv, owners)
            or reader.reason
            or _no_plain_norm(conv, reader.norm and model.get_submodule(reader.norm), owners)
            or refusal(conv)
        )
        choices.append(Choice(name, conv, reader.norm, reason))
    return Survey(choices)


def replace_convs(
    model: nn.Module,
    block: Block = DiverseBranchBlock,
    where: Where | None = None,
    inplace: bool = False,
    preserve: bool = False,
    pairs: Pairs | None = None,
    say: Callable[[str], None] | None = print,
    **options,
) -> nn.Module:
    """The model with a block in the place of each chosen convolution and the batch norm that reads it.

    block: a subclass of `ConvBlock`, `functools.partial` of one, or its name: "dbb", "acb", "repvgg", "plain"
    where: which convolutions, as `where(name, conv)`, a pattern of names ("layer1.*") or "re:" and a regular
        expression that a name holds; default those with 1 < K < 7, as in the paper (section 4.1)
    inplace: change the model itself; default a copy. A convolution as root is answered as its block, either way
    preserve: start as what the model computes now, in eval mode: the other branches' last scales are zero
    pairs: convolution and batch norm by name, where the model cannot be traced; None instead of a norm's name
        replaces a convolution that has none
    say: is told what was replaced, what was left alone, and why; None for silence. See `survey_convs`
    options: of the block

    A convolution's weights, and its norm's, go into the block's "kxk" branch. Device, dtype, mode, hooks and
    `requires_grad` are kept; a layer used in several places stays one layer. Where the norm was there stands an
    `Absorbed`, so that names do not move. Build the optimizer afterwards: a warning names one that was built before.

    For torchvision's `FrozenBatchNorm2d` all norms of the block are frozen ones; `preserve` then silences the other
    branches by their last kernel, as a scale that is frozen at zero would never learn to speak.

    Raises ValueError where no convolution is chosen, for a wrapped model, and for names that do not exist.
    """
    kind, options = _kind(block, options)
    survey = survey_convs(model, kind, where, pairs, **options)
    if not survey.replaced:
        raise ValueError(f"there is nothing to replace: {survey.summary() if survey else 'no nn.Conv2d in the model'}")
    _warn_of_optimizers(model)
    model = model if inplace else copy.deepcopy(model)
    new: dict[int, nn.Module] = {}
    for choice in survey.replaced:
        conv = model.get_submodule(choice.name)
        norm = None if choice.norm is None else model.get_submodule(choice.norm)
        new |= _block_for(conv, norm, kind, preserve, options)
    if say:
        say(survey.summary())
    return _swap(model, new)


class Absorbed(nn.Sequential):
    """The place of a batch norm that lives in a block now: answers its input, or what else the norm did to it."""

    def fuse(self) -> nn.Module:
        """What stays of it in the folded model; timm's `reparameterize_model` asks by this name."""
        rest = [child for child in self if not isinstance(child, nn.Identity)]
        kept = rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()
        return kept.train(self.training)


@dataclass(frozen=True)
class Origin:
    """What a block stands for: the layers that it took the place of, without their weights, and the norm's place."""

    conv: nn.Conv2d
    norm: nn.Module | None
    place: Absorbed | None


@torch.no_grad()
def _block_for(
    conv: nn.Conv2d, norm: nn.Module | None, kind: type[ConvBlock], preserve: bool, options: dict
) -> dict[int, nn.Module]:
    """The block for a pair, and what stands in the norm's place, by the id of what they replace."""
    frozen = norm is not None and is_frozen_norm(norm)
    block = kind.from_conv(conv, _thawed(norm) if frozen else norm, **options)
    if preserve:
        _silence_others(block, by_kernel=frozen)
    if frozen:
        _freeze(block, type(norm))
    if isinstance(norm, nn.SyncBatchNorm):
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block, norm.process_group)
    if _channels_last(conv.weight):
        block = block.to(memory_format=torch.channels_last)
    mode = conv if norm is None else norm
    learns = any(p.requires_grad for layer in (conv, norm) if layer is not None for p in layer.parameters())
    block.train(mode.training).requires_grad_(learns)
    _move_hooks(conv, block)
    place = None
    if norm is not None:
        place = Absorbed(OrderedDict(norm.named_children())).train(norm.training)
        _move_hooks(norm, place)
    block.origin = Origin(skeleton(conv), None if norm is None else skeleton(norm), place)
    return {id(conv): block} | ({id(norm): place} if norm is not None else {})


def _kind(block: Block, options: dict) -> tuple[Callable[..., nn.Module], dict]:
    """The class of block, and all options that are given for it."""
    kind = block_type(block)
    return (kind.func, kind.keywords | options) if isinstance(kind, partial) else (kind, options)


def _thawed(frozen: nn.Module) -> nn.BatchNorm2d:
    """The batch norm that computes, in eval mode, what torchvision's frozen one does."""
    like = {"device": frozen.weight.device, "dtype": frozen.weight.dtype}
    norm = nn.BatchNorm2d(len(frozen.weight), frozen.eps, **like)
    norm.load_state_dict(frozen.state_dict(), strict=False)  # but for the count of batches, which nobody reads
    return norm


def _freeze(block: ConvBlock, kind: Callable[..., nn.Module]) -> None:
    """Exchange all batch norms of a block for frozen ones of torchvision's kind."""
    new = {}
    for norm in (m for m in block.modules() if type(m) is nn.BatchNorm2d):
        frozen = kind(norm.num_features, norm.eps).to(norm.running_mean)
        frozen.load_state_dict(norm.state_dict())
        new[id(norm)] = frozen
    _swap(block, new)


def _silence_others(block: ConvBlock, by_kernel: bool) -> None:
    """Leave only the "kxk" branch to be heard. Raises ValueError where the block cannot start so."""
    branches = dict(block.branches.named_children()) if block.branches is not None else {}
    if "kxk" not in branches:
        raise ValueError(
            f'preserve=True keeps the trained weights in the branch "kxk", which {type(block).__name__} does not have '
            f"here ({', '.join(branches) or 'it is folded'}): add it to branches, or leave preserve out"
        )
    for name, branch in branches.items():
        kernels = [m.weight for m in branch.modules() if isinstance(m, nn.Conv2d)]
        if name != "kxk" and by_kernel and kernels:
            kernels[-1].zero_()
        elif name != "kxk":
            block.init_gamma({name: 0.0})
    for name, branch in branches.items():
        if name != "kxk" and any(t is not None and t.any() for t in (fold(branch).weight, fold(branch).bias)):
            raise ValueError(
                f"preserve=True silences a branch by the scale of its last norm, which does not silence {name!r}: let "
                f"the branch end in a batch norm with no shift, or leave preserve out"
            )


def _selector(where: Where | None) -> Callable[[str, nn.Conv2d], bool]:
    if where is None:
        return lambda name, conv: takes_block(max(conv.kernel_size))
    if callable(where):
        return where
    if not isinstance(where, str):
        raise ValueError(f'where={where!r} is no rule: give where(name, conv), "layer1.*" or "re:conv[12]$"')
    if not where.startswith("re:"):
        return lambda name, conv: fnmatchcase(name, where)
    try:
        pattern = re.compile(where.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"where={where!r} is no regular expression: {error}") from error
    return lambda name, conv: pattern.search(name) is not None


# Why a convolution is left alone: a sentence, or nothing


def _not_chosen(name: str, conv: nn.Conv2d, where: Where | None, chosen: Callable[[str, nn.Conv2d], bool]) -> str:
    if chosen(name, conv):
        return ""
    if where is not None:
        return "not chosen by where" if callable(where) else f"not chosen by where={where!r}"
    return f"kernel {'x'.join(map(str, conv.kernel_size))}, outside of 1 < K < 7"


def _no_plain_conv(conv: nn.Conv2d, owners: Mapping[int, int]) -> str:
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is a kind of nn.Conv2d whose forward may differ"
    if set(conv._parameters) != {"weight", "bias"} or conv.weight is None:
        return "its weight is computed from others (parametrized)"
    return "it shares a parameter with another layer" if _shares(conv, owners) else ""


def _no_plain_norm(conv: nn.Conv2d, norm: nn.Module | None, owners: Mapping[int, int]) -> str:
    if norm is None:
        return ""
    kind = type(norm).__name__
    if type(norm) not in PLAIN_NORMS and kind not in NORMS_WITH_MORE and not is_frozen_norm(norm):
        return f"its norm is a {kind}, whose forward may differ from a batch norm's"
    if norm.running_mean is None:
        return f"its {kind} keeps no running statistics, so it has no fixed kernel to fold into"
    if len(norm.running_mean) != conv.out_channels or norm.running_mean.dtype != conv.weight.dtype:
        return (
            f"its {kind} is of {len(norm.running_mean)} channels in {norm.running_mean.dtype}, unlike the convolution"
        )
    return f"its {kind} shares a parameter with another layer" if _shares(norm, owners) else ""


def _no_block(kind: type[ConvBlock], conv: nn.Conv2d, options: dict) -> str:
    """Why no such block can stand for the convolution: tried without memory."""
    try:
        kind.from_conv(skeleton(conv), **options)
    except ValueError as error:
        return str(error)
    return ""


def _owners_of_parameters(model: nn.Module) -> dict[int, int]:
    """How many layers hold each parameter, by its id."""
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] += parameter is not None
    return owners


def _shares(layer: nn.Module, owners: Mapping[int, int]) -> bool:
    return any(owners[id(parameter)] > 1 for parameter in layer.parameters())


def _with_pairs_by_hand(model: nn.Module, found: dict[str, Readers], pairs: Pairs) -> dict[str, Readers]:
    """The pairs of the graph, overruled by those that the caller names."""
    layers = dict(model.named_modules())
    for conv, norm in pairs.items():
        if conv not in found:
            raise ValueError(f"pairs names {conv!r}, which is no nn.Conv2d of the model: it has {_some(found)}")
        if norm is not None and not (norm in layers and is_norm(layers[norm])):
            norms = [name for name, layer in layers.items() if is_norm(layer)]
            raise ValueError(f"pairs names {norm!r}, which is no batch norm of the model: it has {_some(norms)}")
    readers = found | {conv: Readers(norm) for conv, norm in pairs.items()}
    norms = [reader.norm for reader in readers.values() if reader.norm is not None]
    if twice := {norm for norm in pairs.values() if norms.count(norm) > 1}:
        raise ValueError(f"pairs gives {_some(twice)} to two convolutions: a batch norm can go into one block only")
    return readers


def _some(names) -> str:
    names = list(names)
    return (", ".join(names[:5]) + (", ..." if len(names) > 5 else "")) or "none"


# Blocks out


def reparameterize(
    model: nn.Module, inplace: bool = False, restore: bool = False, say: Callable[[str], None] | None = print
) -> nn.Module:
    """The model with every block folded into a plain `nn.Conv2d`, its answers the same up to rounding.

    Answers a copy, in which the branches were never copied; with `inplace=True` the model itself. A bare block is
    answered as its convolution. A model without blocks is answered as it is, so that folding twice is harmless.
    An optimizer that was built before knows nothing of the new parameters.

    timm's function of the same name folds our blocks, too. Networks of timm that fold layers of their own, such as its
    RepVGG, want to see these again: give it `reparameterize(model, restore=True)`.

    restore: give back the architecture that `replace_convs` was given, convolution and batch norm, so that the weights
        load strictly into it. The norm that comes back only adds the bias (mean 0, variance 1): it is for inference,
        or for finetuning with frozen norms, since its statistics are not those of the data, and `say` is told so

    Raises ValueError for a model in training mode, for one inside a DDP or compile wrapper, and for `restore` where no
    block was put in by `replace_convs`, or one holds what its place has no room for.
    """
    _check_ready(model)
    blocks = outermost_blocks(model)
    if restore:
        _check_restorable(blocks)
        if say:
            norms = sum(block.origin is not None and block.origin.norm is not None for block in blocks.values())
            say(
                f"{len(blocks)} blocks folded, {norms} batch norms back with mean 0 and variance 1: load the weights "
                f"for inference, or finetune with the norms frozen (norm.eval() after model.train())"
            )
    if inplace and blocks:
        _warn_of_optimizers(model)
    new: dict[int, nn.Module] = {}
    # From the narrow end of the network in place, where each block's memory serves the next; else from the wide one.
    order = list(blocks.values())[:: -1 if inplace else 1]
    del blocks
    while order:
        block = order.pop()
        layers = _restored(block) if restore and block.origin else [(block, block.fuse())]
        model = _exchange(model, layers, new, inplace)
    places = [m for m in model.modules() if isinstance(m, Absorbed) and id(m) not in new]
    rests = [(place if inplace else copy.deepcopy(place)).fuse() for place in places]
    model = _exchange(model, list(zip(places, rests)), new, inplace)
    return model if inplace else copy.deepcopy(model, new)  # deepcopy takes what it finds in its memo: the new layers


def _exchange(model: nn.Module, layers: list[tuple[nn.Module, nn.Module]], new: dict, inplace: bool) -> nn.Module:
    """Put new layers in the place of old ones; not in place, only note them in `new`, by the id of the old."""
    for old, layer in layers:
        _move_hooks(old, layer, shared=inplace)
    exchanged = {id(old): layer for old, layer in layers}
    if inplace:
        return _swap(model, exchanged)
    new |= exchanged
    return model


def _check_restorable(blocks: Mapping[str, BranchBlock]) -> None:
    """Refuse before anything is changed."""
    if not any(block.origin for block in blocks.values()):
        raise ValueError(
            f"restore=True gives back what replace_convs took out, and none of the model's {len(blocks)} blocks was "
            f"put in by it: leave restore out, which answers plain convolutions"
        )
    for name, block in blocks.items():
        if block.origin and block.nonlinear is not None:
            raise ValueError(
                f"{name} ends in {type(block.nonlinear).__name__}, for which the restored pair has no room: leave "
                f"restore out"
            )
        if block.origin and block.origin.norm is None and block.origin.conv.bias is None and block.fuse().bias.any():
            raise ValueError(
                f"{name} was a convolution without bias and norm, which cannot hold a bias: leave restore out"
            )


@torch.no_grad()
def _restored(block: ConvBlock) -> list[tuple[nn.Module, nn.Module]]:
    """The convolution and the batch norm that compute what the block computes, each behind what it replaces."""
    folded, origin = block.fuse(), block.origin
    conv, norm = _like_new(origin.conv, folded), None
    conv.weight.copy_(folded.weight)
    if origin.norm is not None:
        norm = _like_new(origin.norm, folded)
        for child, layer in origin.place.named_children():
            setattr(norm, child, copy.deepcopy(layer))
        if not is_frozen_norm(norm):
            norm.num_batches_tracked.zero_()
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)  # so that its root is one
        if norm.weight is not None:
            norm.weight.fill_(1.0)
            norm.bias.copy_(folded.bias)
        else:
            norm.running_mean.copy_(-folded.bias)
        if conv.bias is not None:
            conv.bias.zero_()
    elif conv.bias is not None:
        conv.bias.copy_(folded.bias)
    for layer in (conv, norm):
        if layer is not None:
            layer.train(block.training).requires_grad_(folded.weight.requires_grad)
    return [(block, conv)] if norm is None else [(block, conv), (origin.place, norm)]


# Norms that are frozen


def freeze_norms(model: nn.Module) -> nn.Module:
    """Put every batch norm of the model, in blocks and elsewhere, into eval mode, without gradients; answers the model.

    As detectors are finetuned: their batches are too small for statistics. `model.train()` wakes the statistics again,
    so call this after it, each time. With frozen norms a block is linear in training, too: its step is that of one
    convolution with the equivalent kernel (see `dbb.LeanStep`).

    Raises ValueError for a norm without running statistics, which uses those of the batch in any mode.
    """
    for name, norm in [(name, m) for name, m in model.named_modules() if is_norm(m)]:
        if norm.running_mean is None:
            raise ValueError(
                f"{name} keeps no running statistics, so there is nothing to freeze it with: build it with "
                f"track_running_stats=True"
            )
        norm.eval().requires_grad_(False)
    return model


# Optimizers that were built too early


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that does not train what the model holds, as after surgery or folding.

    Raises ValueError for parameters that are not the model's, and for parameters of the model that are not trained.
    """
    held = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    everything = {id(p) for p in model.parameters()}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers, forgotten = len(trained - everything), [name for key, name in held.items() if key not in trained]
    if strangers or forgotten:
        raise ValueError(
            f"the optimizer trains {strangers} parameters that the model does not hold, and leaves out "
            f"{len(forgotten)} that it does ({_some(forgotten)}): build it anew, after replace_convs or reparameterize"
        )


def _warn_of_optimizers(model: nn.Module) -> None:
    """Warn where an optimizer already holds parameters of the model: the mistake that costs days."""
    if _optimizers_of(model):
        gc.collect()  # one that nobody can use any more is no mistake
    for optimizer in _optimizers_of(model):
        warnings.warn(
            f"{type(optimizer).__name__} was built before the layers were exchanged and does not train the new ones: "
            f"build it anew, and see check_optimizer",
            stacklevel=3,
        )


def _optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    held = {id(p) for p in model.parameters()}
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    return [o for o in optimizers if any(id(p) in held for group in o.param_groups for p in group["params"])]


# What both ways need


def _swap(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Put each new module wherever the old one stood, by its id; answers the model, or what replaces it."""
    if id(model) in new:
        return new[id(model)]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return model


def outermost_blocks(model: nn.Module) -> dict[str, BranchBlock]:
    """The blocks that stand in no other block, each once, by name."""
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, BranchBlock)}
    inner = {id(m) for block in blocks.values() for m in block.modules() if m is not block}
    return {name: block for name, block in blocks.items() if id(block) not in inner}


def _check_ready(model: nn.Module) -> None:
    _refuse_wrapped(model, "fold")
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"the model is in training mode ({training[0]} and {len(training) - 1} more), where batch norms do not use "
            f"the statistics that folding uses: call model.eval() first"
        )


def _refuse_wrapped(model: nn.Module, to_do: str) -> None:
    if type(model).__name__ in WRAPPERS:
        inner = "_orig_mod" if type(model).__name__ == "OptimizedModule" else "module"
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}, which would go on running the old layers: {to_do} "
            f"model.{inner} and wrap the result"
        )


def _move_hooks(old: nn.Module, new: nn.Module, shared: bool = True) -> None:
    """Give the hooks on forward and backward to another layer; where shared, a handle still removes its hook."""
    for name, value in vars(old).items():
        if name.startswith(("_forward", "_backward")) and "hooks" in name and value:
            new.__dict__[name] = value if shared else copy.copy(value)


def _like_new(layer: nn.Module, example: nn.Conv2d) -> nn.Module:
    """A copy of a skeleton with memory where the example is, in its dtype; what is in it is to be overwritten."""
    return copy.deepcopy(layer).to(example.weight.dtype).to_empty(device=example.weight.device)


def _channels_last(weight: torch.Tensor) -> bool:
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return last and not weight.is_contiguous()
