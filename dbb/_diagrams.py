"""Where the boxes and wires of a module's diagram go: read from the module, measured, placed. `plots` draws them.

All lengths are inches. The wire comes in at (0, 0) and leaves to the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from dbb.affine import Pair, pair
from dbb.blocks import BranchBlock
from dbb.layers import BiasPad, Concat, IdentityBasedConv1x1, Parallel, WindowMean

BOX, PITCH, LINE = 0.34, 0.5, 0.15  # a box of one line of text; the row it stands in; what a second line adds
LETTER, MARGIN = 0.088, 0.24  # a letter of a box, and both its margins
GAP, FORK, SIGN = 0.18, 0.4, 0.15  # between layers; where the wires spread, and meet; the radius of a sign


@dataclass
class Drawing:
    """Boxes (x, y, width, height, lines), wires (points) and signs (x, y, sign), the first two with their branch."""

    width: float
    height: float
    boxes: list[tuple[float, float, float, float, Sequence[str], str]] = field(default_factory=list)
    wires: list[tuple[list[tuple[float, float]], str]] = field(default_factory=list)
    signs: list[tuple[float, float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Layer:
    """A box with a word, and perhaps a line below it; without either a bare wire."""

    lines: Sequence[str] = ()

    @property
    def width(self) -> float:
        """Room for the longer line; letters of the second are smaller."""
        letters = [len(line) * size for line, size in zip(self.lines, (1, 0.8))]
        return max(0.5, LETTER * max(letters) + MARGIN) if letters else 0.4

    @property
    def height(self) -> float:
        """A row, higher for two lines."""
        return PITCH + LINE * (len(self.lines) > 1)

    def place(self, on: Drawing, x: float, y: float, width: float, branch: str) -> None:
        """A wire over all of `width`, the box in its middle."""
        on.wires.append(([(x, y), (x + width, y)], branch))
        if self.lines:
            on.boxes.append((x + width / 2, y, self.width, self.height - PITCH + BOX, self.lines, branch))


@dataclass(frozen=True)
class Row:
    """Parts one behind the other."""

    parts: Sequence[Part]

    @property
    def width(self) -> float:
        """That of all parts, and the gaps."""
        return sum(part.width + GAP for part in self.parts) - GAP

    @property
    def height(self) -> float:
        """That of the highest part."""
        return max(part.height for part in self.parts)

    def place(self, on: Drawing, x: float, y: float, width: float, branch: str) -> None:
        """The parts, close together in the middle of `width`."""
        end, gap = x + width, (width - self.width) / 2
        for part in self.parts:
            on.wires.append(([(x, y), (x + gap, y)], branch))
            part.place(on, x + gap, y, part.width, branch)
            x, gap = x + gap + part.width, GAP
        on.wires.append(([(x, y), (end, y)], branch))


@dataclass(frozen=True)
class Branches:
    """Named parts on one input, one below the other, and the sign that joins them."""

    parts: Mapping[str, Part]
    sign: str

    @property
    def width(self) -> float:
        """That of the widest branch, between the wires that spread and meet."""
        return max(part.width for part in self.parts.values()) + 2 * FORK + SIGN

    @property
    def height(self) -> float:
        """That of all branches."""
        return sum(part.height for part in self.parts.values())

    def place(self, on: Drawing, x: float, y: float, width: float, branch: str) -> None:
        """The branches around `y`; one inside of another keeps the outer name."""
        left, right, join, top = x + FORK, x + width - FORK - SIGN, x + width - SIGN, y + self.height / 2
        for name, part in self.parts.items():
            middle, own = top - part.height / 2, branch or name
            on.wires.append(([(x, y), (left, middle)], own))
            part.place(on, left, middle, right - left, own)
            on.wires.append(([(right, middle), (join, y)], own))
            top -= part.height
        on.signs.append((join, y, self.sign))


Part = Layer | Row | Branches


def layout(module: nn.Module) -> Drawing:
    """The diagram of a module: its layers, sequences, branches and blocks, in place."""
    part = part_of(module)
    drawing = Drawing(part.width, part.height)
    part.place(drawing, 0, 0, part.width, "")
    return drawing


def part_of(module: nn.Module) -> Part:
    """What a module looks like."""
    parts = list(_steps(module))
    return parts[0] if len(parts) == 1 else Row(parts) if parts else Layer()


def label(layer: nn.Module) -> list[str]:
    """A layer in a word, and in a second line what is out of the ordinary."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return ["norm"]
    if isinstance(layer, nn.ZeroPad2d):
        return ["crop" if min(layer.padding) < 0 else "pad"]
    if isinstance(layer, IdentityBasedConv1x1):
        return ["1×1", *_extras(layer)]
    if isinstance(layer, nn.AvgPool2d | WindowMean):
        return [f"mean {_by(layer.kernel_size)}", *_extras(layer)]
    if type(layer) is nn.Conv2d:
        return [_by(layer.kernel_size), *_extras(layer)]
    return [type(layer).__name__]


def _steps(module: nn.Module) -> Iterator[Part]:
    """The parts of a module, one behind the other; the identity has none."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _steps(child)
    elif isinstance(module, BiasPad):
        yield from _steps(module.prefix)
        yield Layer(["bias pad"])
    elif isinstance(module, BranchBlock):
        if not module.deploy and getattr(module, "padding_mode", "zeros") != "zeros":
            yield Layer([f"pad {module.padding_mode}"])
        yield from _steps(module.conv if module.deploy else module.branches)
        yield from _steps(module.nonlinear or nn.Identity())
    elif isinstance(module, Parallel | Concat):
        parts = {name: part_of(branch) for name, branch in module.named_children()}
        yield Branches(parts, "+" if isinstance(module, Parallel) else "≡")
    elif not isinstance(module, nn.Identity):
        yield Layer(label(module))


def _extras(layer: nn.Module) -> list[str]:
    """Stride, dilation and groups, where they are not 1; a single tap has no dilation."""
    values = {name: pair(getattr(layer, name, 1)) for name in ("stride", "dilation", "groups")}
    if pair(getattr(layer, "kernel_size", 1)) == (1, 1):
        del values["dilation"]
    words = [f"{name} {a if a == b else _by((a, b))}" for name, (a, b) in values.items() if (a, b) != (1, 1)]
    return [", ".join(words)] if words else []


def _by(size: int | Pair) -> str:
    """Height × width."""
    return "{}×{}".format(*pair(size))
