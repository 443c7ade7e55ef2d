"""Few bits: a folded network in integers, and training that ends in them.

A kernel of few bits is integers, its *codes*, times a scale. `Grid` says which, by the rule of torchao's quantizer for
x86, so that both find the same codes. What is quantized is always what a network folds to:

- `post_training` takes a folded network and images, and lets torchao do the rest;
- `insert_norms` puts batch norms back behind folded convolutions, to finetune before that;
- `crest` foretells what rounding costs, `noise` measures it;
- `prepare_qat` lets a network train with the rounded kernels that its blocks fold to, `convert_qat` folds it, and the
  integers are those that were trained with.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dbb.affine import Affine
from dbb.blocks import BranchBlock, ConvBlock
from dbb.fold import conv_map, is_norm, precise, rule
from dbb.surgery import reparameterize

if TYPE_CHECKING:
    from dbb.data import Batches

SMALLEST_SCALE = 2**-12  # torchao's for x86: a channel of tiny weights has fewer codes
DEQUANTIZE = "dequantize_per_"
KERNELS = ("equivalent", "branches")


@dataclass(frozen=True)
class Grid:
    """The values that a kernel may take: integers of `bits` bits, times one scale, or one for each output channel.

    It is symmetric: zero is a code, and the largest magnitude lies at the end of the range.
    Raises ValueError for bits below 2 or above 8.
    """

    bits: int = 8
    per_channel: bool = True

    def __post_init__(self) -> None:
        """Refuse what int8 does not hold."""
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be 2 to 8: codes are kept as int8")

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def scale(self, weight: Tensor) -> Tensor:
        """The distance between neighbours for a kernel "o ...": "o 1 ...", or "1 1 ..." for the whole; float32."""
        size = weight.detach().float().abs().flatten(1).amax(1)
        largest = size if self.per_channel else size.amax(0, keepdim=True)
        scale = (largest / ((self.high - self.low) / 2)).clamp_min(SMALLEST_SCALE)
        return scale.view(-1, *[1] * (weight.dim() - 1))

    def codes(self, weight: Tensor) -> Tensor:
        """The integers of a kernel, int8 and of its shape.

        Always from float32, which is what a quantizer is given: half a step may be another code in another precision.
        """
        steps = weight.detach().float() * (1 / self.scale(weight))
        return steps.round().clamp(self.low, self.high).to(torch.int8)

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values of the grid; their gradient passes as if nothing was rounded ("straight-through")."""
        rounded = self.codes(weight) * self.scale(weight)
        return rounded.to(weight) + (weight - weight.detach())  # plus exactly zero, which carries the gradient


def crest(weight: Tensor, per_channel: bool = True) -> Tensor:
    """The largest magnitude of a kernel "o ..." over its root mean square: of each channel "o", or of all, "1".

    Zero for a channel that is zero.
    """
    rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    return rows.abs().amax(1) / rows.square().mean(1).sqrt().clamp_min(1e-30)


def noise(weight: Tensor, grid: Grid) -> Tensor:
    """The root mean square that rounding moves a kernel by, over that of its weights, for each output channel "o".

    Of many weights it is near `crest / (2^(bits - 1) - 1/2) / sqrt(12)`, as errors are even over a step.
    """
    moved = (grid.round(weight) - weight).detach().flatten(1)
    return (moved.square().mean(1) / weight.detach().flatten(1).square().mean(1)).sqrt()


# After training


@torch.no_grad()
def post_training(model: nn.Module, images: Tensor, grid: Grid | None = None) -> fx.GraphModule:
    """The folded network in integers, by torchao: weights on the grid, activations in 8 bits.

    images: "n c h w", whose activations set the ranges; the answer takes any number of images
    grid: of the weights; default 8 bits, per channel

    What comes back computes in float32 with rounded values; `torch.compile` turns it into integer arithmetic.
    Raises ValueError for a model that is not folded, and where torchao is not installed.
    """
    _refuse_unfolded(model)
    convert, prepare = _torchao()
    batch = {0: torch.export.Dim("batch", min=1, max=2**16)}
    two = images[:1].repeat(2, 1, 1, 1)  # of one image torch would make a network for one
    exported = torch.export.export(model.eval(), (two,), dynamic_shapes=(batch,)).module()
    prepared = prepare(_with_calls_apart(exported), grid or Grid())
    prepared(images)
    return convert(prepared)


def codes_of(quantized: fx.GraphModule) -> dict[str, Tensor]:
    """The integer weights "o ..." of a network that torchao has quantized, by the names of the layers."""
    found = {}
    for node in quantized.graph.nodes:
        weight = node.args[1] if len(node.args) > 1 else None
        if isinstance(weight, fx.Node) and DEQUANTIZE in str(weight.target) and weight.args[0].op == "get_attr":
            *_, (path, _) = node.meta["nn_module_stack"].values()
            found[path] = getattr(quantized, weight.args[0].target)
    return found


def _torchao() -> tuple:
    """torchao's `convert_pt2e`, and its `prepare_pt2e` for a grid."""
    try:
        logging.getLogger("torch.utils._pytree").addFilter(_no_word_on_enums)
        from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import QuantizationSpec
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise ValueError("torchao is not installed: pip install torchao") from error

    def prepare(exported: fx.GraphModule, grid: Grid) -> fx.GraphModule:
        observer, scheme = (
            (PerChannelMinMaxObserver, torch.per_channel_symmetric)
            if grid.per_channel
            else (MinMaxObserver, torch.per_tensor_symmetric)
        )
        smallest = {"eps": SMALLEST_SCALE}
        image = QuantizationSpec(torch.uint8, HistogramObserver.with_args(**smallest), 0, 255, torch.per_tensor_affine)
        kernel = QuantizationSpec(
            torch.int8, observer.with_args(**smallest), grid.low, grid.high, scheme, 0 if grid.per_channel else None
        )
        config = x86.QuantizationConfig(image, image, kernel, None)
        return prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))

    return convert_pt2e, prepare


def _with_calls_apart(exported: fx.GraphModule) -> fx.GraphModule:
    """A name for each call of an activation: torchao asks for one, and torchvision's ResNets call one ReLU twice."""
    for number, node in enumerate(exported.graph.nodes):
        stack = node.meta.get("nn_module_stack")
        *_, (key, (path, kind)) = stack.items() if stack else [("", ("", ""))]
        if str(kind).startswith("torch.nn.modules.activation."):
            node.meta["nn_module_stack"] = {**stack, key: (f"{path}#{number}", kind)}
    return exported


def _no_word_on_enums(record: logging.LogRecord) -> bool:
    """Keep back what torch tells torchao's authors, and nothing else."""
    return "register_constant() on Enum subclasses" not in record.getMessage()


@torch.no_grad()
def insert_norms(folded: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose convolutions are plain blocks, a convolution and a batch norm, and which computes what it did.

    Each norm holds the statistics of what the images "n c h w" send through it, and a scale and a shift that undo them.
    To be finetuned before it is quantized, as the authors of the paper advise; `reparameterize` folds it again.
    Raises ValueError for a model that is not folded.
    """
    _refuse_unfolded(folded)
    model = copy.deepcopy(folded).eval()
    hooks = []
    for name, conv in [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Conv2d]:
        block = ConvBlock.from_conv(conv)
        model.set_submodule(name, block) if name else (model := block)
        branch = block.branches["kxk"]
        hooks.append(branch.conv.register_forward_hook(lambda conv, _, y, norm=branch.bn: _undo_statistics(norm, y)))
    model(images)
    for hook in hooks:
        hook.remove()
    return model


def _undo_statistics(norm: nn.BatchNorm2d, y: Tensor) -> None:
    """Give the norm the statistics of `y`, with the scale and shift that leave its answer as it was."""
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm.weight.copy_((var + norm.eps).sqrt())
    norm.bias.add_(mean)


# While training


def finetune(
    model: nn.Module,
    batches: Batches,
    steps: int,
    lr: float,
    after: Callable[[nn.Module, float], None] | None = None,
    watch: Callable[[nn.Module], Any] | None = None,
    every: int = 6,
) -> list:
    """Some steps of SGD, with a rate that falls along half a cosine; leaves the model in eval mode.

    after: called with the model and the rate behind each step, for proximal ones
    watch: called with the model in eval mode behind every `every`-th step; its answers are what comes back
    """
    optimizer, seen, like = torch.optim.SGD(model.parameters(), lr, momentum=0.9), [], next(model.parameters())
    for step, (x, y) in enumerate(islice(chain.from_iterable(map(batches.epoch, count())), steps)):
        rate = optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x.to(like)), y).backward()
        optimizer.step()
        if after:
            after(model, rate)
        if watch and step % every == every - 1:
            seen.append(watch(model.eval()))
    model.eval()
    return seen


class RoundedLayer(nn.Module):
    """A block, convolution or linear layer that computes with its kernel rounded to a grid, in both modes.

    Of a block it is the *equivalent* kernel that is rounded, the one that will be deployed, and the gradient passes
    through rounding and fold into every branch. The norms count with their running statistics, which stay as they are:
    under the statistics of a batch there would be other integers in every step.
    """

    def __init__(self, layer: BranchBlock | nn.Conv2d | nn.Linear, grid: Grid) -> None:
        super().__init__()
        self.layer, self.grid = layer, grid
        # the folded form, for its geometry; in a tuple, so that it is no part of this module
        self.folded = (_bare(layer).to("meta"),)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the rounded layer."""
        kernel, bias = self._kernel_bias()
        kernel, (folded,) = self.grid.round(kernel), self.folded
        if isinstance(folded, nn.Linear):
            return F.linear(x, kernel, bias)
        y = folded._conv_forward(x, kernel, bias)
        after = getattr(self.layer, "nonlinear", None)
        return y if after is None else after(y)

    def codes(self) -> Tensor:
        """The integers that it computes with, int8: "o i kh kw", or "o i" of a linear layer."""
        return self.grid.codes(self._kernel_bias()[0])

    def _kernel_bias(self) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.layer, BranchBlock):
            return self.layer.get_equivalent_kernel_bias()
        return self.layer.weight, self.layer.bias

    def extra_repr(self) -> str:
        """The grid."""
        return f"bits={self.grid.bits}, per_channel={self.grid.per_channel}"


@rule(RoundedLayer)
def _rounded_layer(rounded: RoundedLayer) -> Affine:
    if type(rounded.layer) is not nn.Conv2d:
        raise ValueError(
            f"a rounded {type(rounded.layer).__name__} is folded before it is rounded: call convert_qat(model)"
        )
    kernel = rounded.layer.weight
    return replace(conv_map(rounded.layer, torch.float64), weight=precise(rounded.grid.round(kernel)))


def prepare_qat(model: nn.Module, grid: Grid | None = None, kernels: str = "equivalent") -> nn.Module:
    """A copy that computes with kernels on the grid, to be trained so: quantization-aware training, of weights.

    grid: default 8 bits, per channel
    kernels: "equivalent", those that its blocks fold to, see `RoundedLayer`; "branches", each convolution's own, which
    is what general tools do: their sum is on no grid, so it is rounded again when it is deployed

    Build the optimizer afterwards: the parameters are the copy's. Raises ValueError for another word, and where a batch
    norm stands outside of blocks, as it will be folded into a kernel later on and move it off the grid.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r} is not known: choose from {', '.join(KERNELS)}")
    grid, model = grid or Grid(), nn.Sequential(copy.deepcopy(model))  # a bare block has a place in it, too
    outermost = dict(_outermost(model))
    for name in (name for name, layer in outermost.items() if is_norm(layer)):
        raise ValueError(
            f"{name.removeprefix('0.')} is a batch norm outside of blocks: put it into one with its convolution, "
            f"replace_convs(model, 'plain', where=lambda name, conv: True), or fold it first"
        )
    layers = outermost if kernels == "equivalent" else dict(model.named_modules())
    kinds = (BranchBlock,) * (kernels == "equivalent") + (nn.Conv2d, nn.Linear)
    for name in [name for name, layer in layers.items() if isinstance(layer, kinds)]:
        model.set_submodule(name, RoundedLayer(model.get_submodule(name), grid))
    return model[0]


def convert_qat(model: nn.Module) -> nn.Module:
    """The folded network of a trained one of `prepare_qat`, in float: a copy, in eval mode.

    It is not rounded yet. Of equivalent kernels the same grid finds the codes that were trained with, and so does
    `post_training`. Raises ValueError for a model that was not prepared.
    """
    trained = nn.Sequential(copy.deepcopy(model))
    if not any(isinstance(layer, RoundedLayer) for layer in trained.modules()):
        raise ValueError(f"{type(model).__name__} has no rounded layers: it must come from prepare_qat")
    for name in [name for name, layer in _outermost(trained) if isinstance(layer, RoundedLayer)]:
        trained.set_submodule(name, trained.get_submodule(name).layer)
    return reparameterize(trained.eval())[0]


def trained_codes(model: nn.Module) -> dict[str, Tensor]:
    """The integers, int8, that the layers of a model of `prepare_qat` compute with, by their names."""
    return {name: layer.codes() for name, layer in model.named_modules() if isinstance(layer, RoundedLayer)}


def _bare(layer: nn.Module) -> nn.Module:
    """The layer, or what a block folds to without the nonlinearity behind it."""
    if not isinstance(layer, BranchBlock):
        return copy.deepcopy(layer)
    folded = layer.fuse()
    return folded if layer.nonlinear is None else folded[0]


def _outermost(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by name, without what stands inside of blocks and rounded layers."""
    for name, layer in model.named_children():
        yield f"{prefix}{name}", layer
        if not isinstance(layer, (BranchBlock, RoundedLayer)):
            yield from _outermost(layer, f"{prefix}{name}.")


def _refuse_unfolded(model: nn.Module) -> None:
    """Refuse blocks in training form, and batch norms."""
    for name, layer in model.named_modules():
        if is_norm(layer) or (isinstance(layer, BranchBlock) and not layer.deploy):
            raise ValueError(
                f"{name or 'the model'} is a {type(layer).__name__}, and what is quantized is what it folds to: call "
                f"reparameterize(model) first"
            )
