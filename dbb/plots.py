"""How the suite draws: each function puts one thing on one matplotlib `Axes` and answers it.

No training, no files (see `figures.show`). One style for all: colours that colour-blind readers tell apart, and scales
that survive a black-and-white printer: brightness grows with the value, and where the sign matters it is also written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count, pairwise, product
from textwrap import fill
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from torch import Tensor, fx, nn

from dbb._diagrams import SIGN, layout
from dbb.affine import Affine, Pair

if TYPE_CHECKING:
    from dbb.matrix import Comparison

# Okabe and Ito's palette, told apart with every kind of colour vision; a branch has one colour everywhere.
INK, GREY, PAPER = "#222222", "#8a8a8a", "#f1f1ee"
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
BRANCH_COLOURS = {"kxk": BLUE, "1x1": ORANGE, "1x1_kxk": GREEN, "1x1_avg": PURPLE, "folded": INK}
BRANCH_NAMES = {"kxk": "K×K", "1x1": "1×1", "1x1_kxk": "1×1–K×K", "1x1_avg": "1×1–AVG", "folded": "folded"}
VARIANTS = {  # of a network: the colour and the name of each; plain ones are kin of the K×K branch
    "plain": (BLUE, "plain"),
    "acb": (GREY, "ACB"),
    "dbb": (RED, "DBB"),
    "plain_as_long": (SKY, "plain, as long"),
}
STATUSES = {  # of claims: the colour, the sign and the word of each; dark, middle, pale, white and hatched when printed
    "holds": (BLUE, "✓", "holds"),
    "differs": (ORANGE, "≠", "differs"),
    "undecided": ("#f0dce7", "?", "undecided"),
    "pending": ("white", "…", "pending"),
    "cannot be tested here": ("#e4e4e1", "×", "cannot be tested here"),
}

CLASS_COLOURS = ("#e4e4e1", BLUE, "#b07800", GREEN, "#a0527d", RED, SKY)  # of pixels; the first is the background

MAPS = "cividis"  # for activations: brightness follows the value
SIGNED = "PuOr_r"  # for kernels and differences: white is zero, orange positive, purple negative
ERRORS = "magma"  # for sizes of errors: black is none
SPECTRA = "bone"  # for frequency responses: black lets nothing through


def use_style() -> None:
    """Set matplotlib up for the suite; call once at the top of a notebook."""
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, SKY, RED]),
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "image.interpolation": "nearest",
            "lines.linewidth": 2,
        }
    )


def panels(rows: int = 1, columns: int = 1, size: float = 2.4, aspect: float = 1.0) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, and its axes in reading order; `size` is a panel's width in inches."""
    figure, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * size * aspect), squeeze=False)
    return figure, list(axes.flat)


def photograph(x: Tensor, ax: Axes | None = None, title: str = "") -> Axes:
    """A colour image "3 h w" or a grey one "h w", values 0 to 1."""
    ax = _bare(ax, title)
    picture = x.detach().float().clamp(0, 1).cpu()
    ax.imshow(picture.permute(1, 2, 0) if picture.dim() == 3 else picture, cmap="gray", vmin=0, vmax=1)
    return ax


def tiles(rows: Mapping[str, Sequence[Tensor | None]], ax: Axes | None = None, title: str = "") -> Axes:
    """Colour images "3 h w" on grey, a named row each; smaller ones fill less of their place, None leaves it empty."""
    side = max(max(x.shape[1:]) for images in rows.values() for x in images if x is not None)
    gap = side // 12 + 1
    step, columns = side + gap, max(map(len, rows.values()))
    sheet = torch.full((3, len(rows) * step + gap, columns * step + gap), 0.88)
    for row, images in enumerate(rows.values()):
        for column, x in enumerate(images):
            if x is not None:
                place = sheet[:, row * step + gap :, column * step + gap :]
                place[:, : x.shape[1], : x.shape[2]] = x.detach().cpu()
    ax = photograph(sheet, ax, title)
    for row, name in enumerate(rows):
        ax.text(-gap, (row + 0.5) * step + gap / 2, name, ha="right", va="center", color=INK)
    return ax


def frame(
    ax: Axes, corner: tuple[float, float], size: tuple[float, float], colour: str = ORANGE, line: str = "-"
) -> None:
    """Outline a part of a picture: its left and top, its width and height, in pixels."""
    ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=2, linestyle=line))


def boxed(
    x: Tensor,
    boxes: Tensor,
    labels: Sequence[str],
    ax: Axes | None = None,
    title: str = "",
    colour: str = ORANGE,
    line: str = "-",
) -> Axes:
    """A photograph "3 h w" with boxes "n 4" (left, top, right, bottom edge, in pixels), each with its label."""
    ax = photograph(x, ax, title)
    for (left, top, right, bottom), label in zip(boxes.tolist(), labels, strict=True):
        frame(ax, (left - 0.5, top - 0.5), (right - left, bottom - top), colour, line)
        style = {"color": "white", "fontsize": 7, "va": "top", "bbox": {"color": INK, "pad": 1, "linewidth": 0}}
        ax.text(left, top, label, **style)
    return ax


def class_map(classes: Tensor, names: Sequence[str], ax: Axes | None = None, title: str = "") -> Axes:
    """The class of each pixel "h w", in the colours of `CLASS_COLOURS`, and a letter on each patch for its name.

    The first class is the background; its pixels have no letter.
    """
    ax = _bare(ax, title)
    colours = ListedColormap(CLASS_COLOURS[: len(names)])
    ax.imshow(_numpy(classes), cmap=colours, vmin=-0.5, vmax=len(names) - 0.5)
    for number, name in enumerate(names[1:], start=1):
        for row, column in _middles(classes == number):
            ax.text(column, row, name[0], ha="center", va="center", fontsize=7, color="white", weight="bold")
    return ax


def feature_map(x: Tensor, ax: Axes | None = None, title: str = "", limits: tuple[float, float] | None = None) -> Axes:
    """One channel of activations "h w", bright for large; `limits` share a scale between panels."""
    ax = _bare(ax, title)
    low, high = limits or limits_of([x])
    ax.imshow(_numpy(x), cmap=MAPS, vmin=low, vmax=high)
    return ax


def signed_map(x: Tensor, ax: Axes | None = None, title: str = "", limit: float | None = None) -> Axes:
    """An image "h w" whose values have a sign: white is zero, orange positive, purple negative; with its scale."""
    ax = _bare(ax, title)
    limit = limit or x.abs().max().item() or 1
    ax.imshow(_numpy(x), cmap=SIGNED, vmin=-limit, vmax=limit)
    scale(ax, SIGNED, (-limit, limit))
    return ax


def marked(maps: Tensor, rows: Sequence[int], columns: Sequence[int], axes: Sequence[Axes]) -> None:
    """Feature maps "n h w" on one scale, a panel each, with a dot on the pixels where `rows` and `columns` meet."""
    limits = limits_of([maps])
    for ax, x in zip(axes, maps):
        feature_map(x, ax, limits=limits)
        ax.scatter(*zip(*product(columns, rows)), s=8, color=ORANGE, edgecolor=INK, linewidth=0.3)


def difference(x: Tensor, ax: Axes | None = None, title: str = "", limit: float | None = None, unit: str = "") -> Axes:
    """The size of a difference "h w", black where there is none; its largest value is written underneath."""
    ax = _bare(ax, title)
    size = x.detach().abs()
    largest = size.max().item()
    ax.imshow(_numpy(size), cmap=ERRORS, vmin=0, vmax=limit or largest or 1)
    text = f"largest {largest:.2g} {unit}" if unit else f"largest {largest:.1e}"
    ax.text(0.5, -0.04, text, transform=ax.transAxes, ha="center", va="top", color=INK)
    return ax


def kernel(weight: Tensor, ax: Axes | None = None, title: str = "", limit: float | None = None) -> Axes:
    """One kernel "kh kw": a colour for each tap, and its value."""
    ax = _bare(ax, title)
    limit = limit or weight.abs().max().item() or 1
    shown = ax.imshow(_numpy(weight), cmap=SIGNED, vmin=-limit, vmax=limit)
    for (y, x), value in _cells(weight):
        colour = "white" if sum(shown.cmap(shown.norm(value))[:3]) < 1.4 else INK
        ax.text(x, y, _short(value), ha="center", va="center", fontsize=8, color=colour)
    return ax


def kernel_grid(weights: Tensor, ax: Axes | None = None, title: str = "", limit: float | None = None) -> Axes:
    """All kernels "o i kh kw" of a convolution as tiles: a row for each output channel, a column for each input's."""
    ax = _bare(ax, title)
    rows, columns, height, width = weights.shape
    limit = limit or weights.abs().max().item() or 1
    sheet = torch.full((rows * (height + 1) + 1, columns * (width + 1) + 1), float("nan"))
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + 1) + 1, column * (width + 1) + 1
            sheet[top : top + height, left : left + width] = weights[row, column].detach().float().cpu()
    colours = colormaps[SIGNED].with_extremes(bad=GREY)
    ax.imshow(sheet.numpy(), cmap=colours, vmin=-limit, vmax=limit)
    return ax


def label_tiles(ax: Axes, rows: Sequence[str], columns: Sequence[str], tile: Pair = (3, 3)) -> None:
    """Names beside the rows of a `kernel_grid` and above its columns; `tile` is the size of a kernel."""
    for n, name in enumerate(rows):
        ax.text(-0.8, (n + 0.5) * (tile[0] + 1), name, ha="right", va="center", color=INK)
    for n, name in enumerate(columns):
        ax.text((n + 0.5) * (tile[1] + 1), -0.8, name, ha="center", va="bottom", color=INK)


def matrix(
    weights: Tensor, ax: Axes | None = None, title: str = "", groups: int = 1, colours: Sequence[str] = (BLUE,)
) -> Axes:
    """Kernels "o i kh kw" from afar, one square each: its side grows with the kernel's norm, none where all is zero.

    A row for each output channel, a column for each input's; equal slices of the input have the `colours`, and the
    outlines are the blocks that so many `groups` have room for.
    """
    ax = _bare(ax, title)
    norms = weights.detach().flatten(2).norm(dim=2)
    rows, columns = norms.shape
    ax.add_patch(Rectangle((0, 0), columns, rows, facecolor=PAPER))
    for (row, column), norm in _cells(norms / norms.max()):
        side = 0.3 + 0.55 * norm if norm else 0
        corner = (column + 0.5 - side / 2, row + 0.5 - side / 2)
        ax.add_patch(Rectangle(corner, side, side, facecolor=colours[column * len(colours) // columns]))
    width, height = columns / groups, rows / groups
    for n in range(groups):
        block = Rectangle((n * width, n * height), width, height, fill=False, edgecolor=INK, linewidth=1.5)
        ax.add_patch(block).set_clip_on(False)
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    return ax


def spectrum(kernel: Tensor, ax: Axes | None = None, title: str = "", limit: float = 1) -> Axes:
    """Which waves a kernel "... kh kw" lets through: |H| over their cycles per pixel across and down.

    The middle is a constant image, the edges are stripes of two pixels; black is 0, white `limit` or more. Of several
    kernels it is the root of the mean of |H|².
    """
    ax = ax or plt.gca()
    size = 2 * max(64, *kernel.shape[-2:]) + 1  # odd: frequency zero has a pixel, in the middle
    response = torch.fft.fft2(kernel.detach().cpu().double(), s=(size, size)).abs()
    if response.dim() > 2:
        response = response.square().flatten(0, -3).mean(0).sqrt()
    response = torch.fft.fftshift(response)
    ax.imshow(_numpy(response), cmap=SPECTRA, vmin=0, vmax=limit, extent=(-0.5, 0.5, 0.5, -0.5))
    ticks = {"ticks": (-0.5, 0, 0.5), "labels": ("−½", "0", "½")}
    ax.set_xticks(**ticks)
    ax.set_yticks(**ticks)
    ax.tick_params(labelsize=8)
    ax.set_title(title)
    ax.set_xlabel("cycles per pixel", fontsize=8)
    return ax


def response_curves(kernels: Mapping[str, Tensor], ax: Axes | None = None, title: str = "") -> Axes:
    """How much of a wave along the rows comes through kernels "... kh kw": a named line each, over cycles per pixel.

    Of several kernels under one name it is the root of the mean of |H|²; branches have their colours.
    """
    ax, ends = ax or plt.gca(), []
    for name, weights in kernels.items():
        taps = weights.detach().cpu().double().sum(-2)  # the wave is the same in every row
        response = torch.fft.rfft(taps, n=256).abs().square().reshape(-1, 129).mean(0).sqrt()
        (line,) = ax.plot(torch.linspace(0, 0.5, 129), response, color=BRANCH_COLOURS.get(name))
        ends.append((response[-1].item(), BRANCH_NAMES.get(name, name), line.get_color()))
    ax.set(title=title, xlabel="cycles per pixel", ylabel="$|H|$", xlim=(0, 0.5), ylim=(0, None))
    lowest = -1.0
    for end, name, colour in sorted(ends):  # the names at the ends of the lines, pushed up where they would overlap
        lowest = max(end, lowest + 0.08 * ax.get_ylim()[1])
        ax.text(0.508, lowest, name, va="center", color=colour)
    return ax


def bars(values: Mapping[str, float], ax: Axes | None = None, title: str = "", unit: str = "", digits: int = 2) -> Axes:
    """A horizontal bar for each name, its value written at the end; branches in their colours."""
    ax = ax or plt.gca()
    names = list(values)
    colours = [BRANCH_COLOURS.get(name, BLUE) for name in names]
    drawn = ax.barh([BRANCH_NAMES.get(name, name) for name in names], list(values.values()), color=colours)
    ax.bar_label(drawn, [f"{value:.{digits}f}{unit}" for value in values.values()], padding=4, color=INK)
    ax.invert_yaxis()
    ax.margins(x=0.25)
    ax.set_title(title)
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(bottom=False, labelbottom=False, left=False)
    return ax


def stacks(
    bars: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], ax: Axes | None = None, title: str = ""
) -> Axes:
    """A horizontal bar for each name, made of its parts, which have the `colours` (see `colour_key`)."""
    ax, ends = ax or plt.gca(), [0.0] * len(bars)
    for part, colour in colours.items():
        sizes = [parts.get(part, 0) for parts in bars.values()]
        ax.barh(list(bars), sizes, left=ends, color=colour, edgecolor="white", linewidth=0.5)
        ends = [end + size for end, size in zip(ends, sizes)]
    ax.invert_yaxis()
    ax.set_title(title)
    ax.tick_params(left=False)
    return ax


def shares(
    parts: Mapping[str, Mapping[str, float]],
    ax: Axes | None = None,
    title: str = "",
    before: Mapping[str, Mapping[str, float]] | None = None,
) -> Axes:
    """An upright bar for each name, made of its branches' shares of one whole; negative ones hang below zero.

    before: earlier shares under the same names, as pale bars on the left of the others
    """
    ax, columns = ax or plt.gca(), [(before, -0.2, 0.4), (parts, 0.2, 1)] if before else [(parts, 0, 1)]
    for values, shift, opacity in columns:
        for n, pieces in enumerate(values.values()):
            ends = {True: 0.0, False: 0.0}  # of the pieces above zero, and of those below
            for branch, piece in pieces.items():
                style = {"color": BRANCH_COLOURS.get(branch, BLUE), "alpha": opacity, "edgecolor": "white"}
                ax.bar(n + shift, piece, 0.37 if before else 0.75, ends[piece > 0], **style)
                ends[piece > 0] += piece
    ax.set_xticks(range(len(parts)), list(parts))
    ax.set_title(title)
    ax.tick_params(axis="x", length=0)
    return ax


def cosines(table: Tensor, names: Sequence[str], ax: Axes | None = None, title: str = "") -> Axes:
    """Cosines between branches, with their values; the diagonal has the branches' colours, a nan stays empty."""
    ax = _bare(ax, title)
    shown = ax.imshow(_numpy(table), cmap=SIGNED, vmin=-1, vmax=1)
    for (row, column), value in _cells(table):
        colour = "white" if sum(shown.cmap(shown.norm(value))[:3]) < 1.4 else INK
        if row == column:
            patch = Rectangle((column - 0.5, row - 0.5), 1, 1, color=BRANCH_COLOURS.get(names[row], GREY))
            ax.add_patch(patch)
        elif value == value:
            text = f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")
            ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return ax


def branch_key(figure: Figure, names: Iterable[str] = BRANCH_NAMES) -> None:
    """The colours of the branches, under a figure."""
    squares = [Rectangle((0, 0), 1, 1, color=BRANCH_COLOURS[name], label=BRANCH_NAMES[name]) for name in names]
    figure.legend(handles=squares, loc="outside lower center", ncols=len(squares), handlelength=1)


def colour_key(figure: Figure, colours: Mapping[str, str], columns: int = 4) -> None:
    """What colours mean, under a figure."""
    squares = [Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=squares, loc="outside lower center", ncols=columns, handlelength=1)


def lines(
    xs: Sequence[float],
    named: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    title: str = "",
    label: str = "",
    logarithmic: str = "xy",
    styles: Sequence[str] = ("-o", "--s", ":^", "-.D", "-v"),
) -> Axes:
    """Values over `xs`, a named line each; `logarithmic` says which axes are."""
    ax = ax or plt.gca()
    for (name, values), style in zip(named.items(), styles):
        ax.plot(xs, values, style, markersize=4, label=name)
    ax.set(title=title, xlabel=label)
    ax.set_xscale("log" if "x" in logarithmic else "linear")
    ax.set_yscale("log" if "y" in logarithmic else "linear")
    if len(named) > 1:
        ax.legend(fontsize=8)
    return ax


def costs(points: Mapping[str, Sequence[tuple[float, float]]], ax: Axes | None = None, title: str = "") -> Axes:
    """Time and memory of ways to do the same, in units of one that is not drawn: a dot for each measurement."""
    ax = ax or plt.gca()
    for (name, dots), colour, marker in zip(points.items(), (RED, SKY, BLUE, GREEN, INK, PURPLE, ORANGE), "os^PDvx"):
        ax.scatter(*zip(*dots), s=24, color=colour, marker=marker, linewidth=1, label=name)
    for line in (ax.axhline, ax.axvline):
        line(1, color=GREY, linewidth=1)
    if points:
        ax.legend(loc="upper right", fontsize="small")
    else:
        ax.text(0.05, 0.9, "nothing is recorded yet", transform=ax.transAxes)
    longest = max((time for dots in points.values() for time, _ in dots), default=1)
    ax.set(title=title, xlabel="time", ylabel="memory", xscale="log", ylim=(0, None))
    ax.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"], minor=False)
    ax.set_xticks([], minor=True)
    ax.set_xlim(0.8, max(2, 1.3 * longest))
    return ax


def curves(
    lines: Mapping[str, Sequence[float | None]], ax: Axes | None = None, title: str = "", unit: str = ""
) -> Axes:
    """A value after each epoch, a line for each variant, named in the legend; None where it was not measured."""
    ax = ax or plt.gca()
    for (name, values), marker in zip(lines.items(), "os^D" * len(lines)):
        colour, label = VARIANTS.get(name, (None, name))
        points = [(epoch, value) for epoch, value in enumerate(values, start=1) if value is not None]
        every = max(1, len(points) // 20)
        ax.plot(*zip(*points), color=colour, label=label, marker=marker, markersize=5, markevery=every, linewidth=1.5)
    ax.set(title=title, xlabel="epoch", ylabel=unit)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return ax


def on_grid(weight: Tensor, values: Tensor, ax: Axes | None = None, title: str = "", colour: str = BLUE) -> Axes:
    """How often weights occur, and the values "n" that they are rounded to, as upright lines."""
    ax = ax or plt.gca()
    ax.hist(_numpy(weight.flatten()), 90, color=colour)
    ax.vlines(_numpy(values), 0, ax.get_ylim()[1], color=INK, linewidth=0.8)
    ax.set(title=title, xlabel="weight", yticks=[])
    return ax


def noise_by_crest(
    channels: Mapping[str, Mapping[int, tuple[Tensor, Tensor]]], ax: Axes | None = None, title: str = ""
) -> Axes:
    """Rounding noise of channels by their crest, on the formula's lines: (crest "o", noise "o") by variant and bits."""
    ax, limits = ax or plt.gca(), (1.6, 7)
    for (name, of_bits), marker in zip(channels.items(), "o^sD"):
        for crest, noise in of_bits.values():
            ax.plot(_numpy(crest), _numpy(noise), marker, color=VARIANTS[name][0], markersize=3.5)
    for bits in next(iter(channels.values())):
        line = [crest / (2 ** (bits - 1) - 0.5) / 12**0.5 for crest in limits]
        ax.loglog(limits, line, color=INK, linewidth=1)
        ax.text(limits[0], 1.2 * line[0], f"{bits} bits")
    ax.set_xticks([2, 3, 4, 6], ["2", "3", "4", "6"])
    ax.minorticks_off()
    ax.set(title=title, xlabel="crest of a channel")
    return ax


def strip(groups: Mapping[str, Mapping[int, float]], ax: Axes | None = None, title: str = "", unit: str = "") -> Axes:
    """Measurements by variant and seed: a dot for each, thin lines that join one seed's, a bar at each mean."""
    ax, columns = ax or plt.gca(), list(groups.values())
    for n, (left, right) in enumerate(pairwise(columns)):
        for seed in left.keys() & right.keys():
            ax.plot((n, n + 1), (left[seed], right[seed]), color=GREY, linewidth=0.7, zorder=1)
    for n, (name, values) in enumerate(groups.items()):
        colour, mean = VARIANTS.get(name, (BLUE,))[0], sum(values.values()) / len(values)
        ax.scatter([n] * len(values), list(values.values()), color=colour, edgecolor="white", s=45, zorder=2)
        ax.plot((n - 0.2, n + 0.2), (mean, mean), color=INK, linewidth=2.5, zorder=3)
    ax.set_xticks(range(len(groups)), [VARIANTS.get(name, (BLUE, name))[1] for name in groups])
    ax.set(title=title, ylabel=unit, xlim=(-0.5, len(groups) - 0.5))
    return ax


def tallies(
    counts: Mapping[str, Mapping[str, int]],
    kinds: Sequence[str],
    ax: Axes | None = None,
    colours: Sequence[str] = (BLUE, RED, ORANGE, "#dddddd"),
) -> Axes:
    """A bar for each name, how often each of the `kinds` was counted: its pieces, with the numbers in them."""
    ax, starts = ax or plt.gca(), [0] * len(counts)
    for kind, colour in zip(kinds, colours):
        values = [count.get(kind, 0) for count in counts.values()]
        drawn = ax.barh(list(counts), values, left=starts, color=colour, label=kind)
        ink = "white" if sum(to_rgb(colour)) < 1.4 else INK
        ax.bar_label(drawn, [str(value or "") for value in values], label_type="center", color=ink)
        starts = [start + value for start, value in zip(starts, values)]
    ax.invert_yaxis()
    ax.margins(0)
    ax.spines[:].set_visible(False)
    ax.tick_params(left=False, bottom=False, labelbottom=False)
    ax.figure.legend(loc="outside upper center", ncols=len(kinds))
    return ax


def scoreboard(
    rows: Sequence[tuple[str, Sequence[tuple[str, str] | None]]],
    columns: Sequence[str],
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """A table of named rows of (text, status), each of `STATUSES` with its colour and sign; other cells are grey.

    A cell without a text stays visibly empty; None is no cell.
    """
    ax = _bare(ax, "")
    ax.set_title(title, pad=20)  # above the names of the columns
    for row, (name, cells) in enumerate(rows):
        ax.text(-0.04, row + 0.5, name, ha="right", va="center", color=INK)
        for column, cell in enumerate(cells):
            if cell is not None:
                _scored(ax, column, row, *cell)
    for column, name in enumerate(columns):
        ax.text(column + 0.5, -0.12, name, ha="center", va="bottom", color=INK)
    ax.set(xlim=(0, len(columns)), ylim=(len(rows), -0.25))
    return ax


def forest(
    rows: Mapping[str, tuple[Sequence[float], tuple[float, float] | None, float | None, str]],
    ax: Axes | None = None,
    title: str = "",
    hollow: Collection[str] = (),
) -> Axes:
    """Differences, a named row each: (one dot a seed, interval of the mean, published value, status of `STATUSES`).

    What is published is a diamond, an empty one in rows that are `hollow`: another network's.
    """
    ax = ax or plt.gca()
    for y, (name, (dots, ends, published, status)) in enumerate(rows.items()):
        if ends is not None:
            ax.plot(ends, (y, y), color=BLUE, linewidth=4, solid_capstyle="butt")
        if published is not None:
            face = "white" if name in hollow else INK
            ax.plot(published, y, "D", color=face, markeredgecolor=INK, markersize=6, zorder=4)
        if dots:
            ax.scatter(dots, [y + 0.3] * len(dots), s=12, color=INK, linewidth=0)
            ax.plot(sum(dots) / len(dots), y, "|", color="white", markersize=7, markeredgewidth=1.5, zorder=3)
        face, symbol, word = STATUSES[status]
        ink, box = "white" if sum(to_rgb(face)) < 1.4 else INK, {"facecolor": face, "edgecolor": GREY}
        place = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 8}
        ax.text(1.03, y, f"{symbol}  {word}", color=ink, bbox=box, **place)
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(title=title, xlabel="difference, percentage points", ylim=(len(rows) - 0.4, -0.6))
    if engine := ax.figure.get_layout_engine():
        engine.set(w_pad=0.1)  # for the boxes around the words
    return ax


def verdicts(
    rows: Mapping[str, tuple[Sequence[float], Comparison | None, float | None]],
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Paired differences in points, a named row each: (one dot a seed, their comparison, a published difference).

    What is published is a hollow diamond, of another network; a row without a comparison says "pending".
    """
    ax, colours = ax or plt.gca(), {"better": BLUE, "worse": RED, "undecided": GREY}
    for y, (dots, compared, published) in enumerate(rows.values()):
        word = "pending" if compared is None else compared.verdict or "one seed"
        colour = colours.get(word, INK)
        if published is not None:
            ax.plot(published, y - 0.24, "D", color="white", markeredgecolor=INK)
        if compared is not None:
            ax.scatter(dots, [y + 0.24] * len(dots), s=14, color=INK, linewidth=0)
        if compared is not None and compared.low is not None:
            ax.plot(100 * compared.difference, y, "|", color=colour, markersize=11, markeredgewidth=3)
            word = f"{word}, {compared.seeds} pairs"
            ends = (100 * compared.low, 100 * compared.high)
            ax.plot(ends, (y, y), color=colour, linewidth=3, solid_capstyle="butt")
        ax.text(1.02, y, word, transform=ax.get_yaxis_transform(), va="center", color=INK)
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(title=title, ylim=(len(rows) - 0.4, -0.6), xlabel="difference, percentage points of test accuracy")
    if not ax.collections and not any(published is not None for _, _, published in rows.values()):
        ax.set(xlim=(-1, 1), xticks=[0])  # nothing to show has no scale
    return ax


def status_key(figure: Figure, statuses: Iterable[str] = STATUSES) -> None:
    """Colours, signs and words of the statuses, under a figure."""
    handles = []
    for face, symbol, word in (STATUSES[status] for status in statuses):
        label, hatch = f"{symbol}  {word}", "////" if symbol == "×" else None
        handles.append(Rectangle((0, 0), 1, 1, facecolor=face, edgecolor=GREY, hatch=hatch, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2)


def branch_diagram(branches: Mapping[str, Sequence[str]], folded: str, ax: Axes | None = None) -> Axes:
    """A block as a diagram: on the left its branches, each a row of layers, added; on the right what they fold into."""
    ax = _bare(ax, "")
    depth, middle = max(map(len, branches.values())), (len(branches) - 1) / 2
    plus, deployed = 1.1 * depth + 0.75, 1.1 * depth + 4.25
    for row, (name, layers) in enumerate(branches.items()):
        y, colour = len(branches) - 1 - row, BRANCH_COLOURS.get(name, BLUE)
        _wire(ax, [(-0.55, middle), (0, y), (plus - 0.7, y), (plus, middle)], colour)
        for n, layer in enumerate(layers):
            _layer(ax, 0.45 + 1.1 * (n + (depth - len(layers)) / 2), y, layer, colour)
    for left, right in ((-0.75, -0.5), (plus, plus + 0.6), (deployed - 1, deployed + 1)):
        _wire(ax, [(left, middle), (right, middle)], INK)
    ax.plot(plus, middle, "o", markersize=17, color="white", markeredgecolor=INK, markeredgewidth=2)
    ax.text(plus, middle, "+", ha="center", va="center_baseline", fontsize=15, color=INK)
    _layer(ax, deployed, middle, folded, INK)
    for text, left, right in (("input", -0.8, deployed - 1.05), ("output", plus + 0.65, deployed + 1.05)):
        for x in (left, right):
            ax.text(x, middle, text, ha="right" if text == "input" else "left", va="center", color=INK)
    heading = {"y": len(branches) - 0.3, "va": "center", "ha": "center", "color": INK}
    ax.text(plus / 2, s="training form", weight="bold", **heading)
    ax.text(deployed, s="folded", weight="bold", **heading)
    _arrow(ax, (plus / 2 + 1.1, heading["y"]), (deployed - 0.6, heading["y"]))
    ax.text((plus / 2 + deployed) / 2 + 0.25, s="fold", bbox={"color": "white"}, **heading)
    ax.set_xlim(-1.5, deployed + 1.8)
    ax.set_ylim(-0.5, len(branches))
    return ax


def module_diagram(module: nn.Module, ax: Axes | None = None, title: str = "") -> Axes:
    """A tree of linear layers as a diagram, drawn from the module itself: `+` adds branches, `≡` stacks their outputs.

    Without `ax` the figure is as large as the diagram; with it all of the picture, letters too, shrinks to fit.
    """
    drawing = layout(module)
    width, height = drawing.width + 0.5, drawing.height + 0.1
    ax = _bare(ax or plt.subplots(figsize=(width, height + 0.3 * bool(title)))[1], title)
    stubs = [([(x, 0), (x + 0.25, 0)], "") for x in (-0.25, drawing.width)]
    for points, branch in drawing.wires + stubs:
        ax.plot(*zip(*points), color=BRANCH_COLOURS.get(branch, INK), zorder=0, solid_capstyle="round")
    for x, y, wide, high, lines, branch in drawing.boxes:
        _rounded(ax, x - wide / 2, y - high / 2, wide, high, "white", BRANCH_COLOURS.get(branch, INK))
        for n, (line, points) in enumerate(zip(lines, (10, 8))):
            _words(ax, x, y + 0.08 * (len(lines) - 1) - 0.17 * n, line, points)
    for x, y, symbol in drawing.signs:
        ax.add_patch(Circle((x, y), SIGN, facecolor="white", edgecolor=INK, linewidth=1.5))
        _words(ax, x, y, symbol, 15)
    wider = max(0.0, ax.get_window_extent().width / ax.figure.dpi - width) / 2  # small ones are not blown up
    ax.set(xlim=(-0.25 - wider, width - 0.25 + wider), ylim=(-height / 2, height / 2), aspect="equal")
    return ax


def forward_graph(
    module: nn.Module, pairs: Mapping[str, str | None] | None = None, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Who reads whom in a module's forward, from left to right; each convolution and norm in `pairs` share a colour.

    What reads the same as another stands below it, and what is read from afar sends its wire around the others.
    """
    ax, at, taken = _bare(ax, title), {}, set()
    colours = {name: c for pair, c in zip((pairs or {}).items(), (BLUE, RED, PURPLE, ORANGE)) for name in pair}
    for node in fx.symbolic_trace(module).graph.nodes:
        sources = [at[source] for source in node.all_input_nodes]
        x = 1 + max((place[0] for place in sources), default=-1)
        y = next(-level for level in count() if (x, -level) not in taken)
        name, at[node] = str(node.target) if node.op == "call_module" else node.name, (x, y)
        taken.add((x, y))
        for start, level in sources:
            height = min(level, y) if level or y else 0.7 * (x - start > 1)  # around what stands between
            bend = [(start + 0.45, height), (x - 0.45, height)] if x - start > 1 else []
            _wire(ax, [(start, level), *bend, (x, y)], GREY)
        _layer(ax, x, y, "\n.".join(name.rsplit(".", 1)) if len(name) > 9 else name, colours.get(name, GREY))
    ax.set(xlim=(-0.5, x + 0.5), ylim=(min(y for _, y in taken) - 0.5, 1))
    return ax


def same_height(axes: Sequence[Axes]) -> None:
    """One vertical range for all panels, the union of theirs."""
    limits = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def one_scale(axes: Iterable[Axes]) -> None:
    """Give diagrams the scale of the widest."""
    axes = list(axes)
    widest = max(right - left for left, right in (ax.get_xlim() for ax in axes)) / 2
    for ax in axes:
        middle = sum(ax.get_xlim()) / 2
        ax.set_xlim(middle - widest, middle + widest)


def shapes(tensors: Mapping[str, Mapping[str, int]], signs: str = "", summed: str = "", ax: Axes | None = None) -> Axes:
    """Tensors as boxes of cells in a row, `signs` between them; the dimension that is `summed` over stands out.

    The first dimension of a tensor runs down, the second across, the third (if there is one) into the page.
    """
    ax, x = _bare(ax, ""), 0.0
    for (title, sizes), mark in zip(tensors.items(), [*signs, ""]):
        (height, width, depth), corner = [*sizes.values(), 0][:3], complex(x, next(iter(sizes.values())) / 2)
        down, across, back = -1j * height, width + 0j, 0.3 * depth * (1 + 1j)  # the page as the complex plane
        _face(ax, corner, (down, height), (across, width), "#eef3f8")
        if depth:
            _face(ax, corner, (back, depth), (across, width), "#dbe6f0")
            _face(ax, corner + across, (down, height), (back, depth), "#c8d7e6")
        places = (
            (corner, down, -0.2, "right"),
            (corner + down, across, -0.6j, "center"),
            (corner, back, -0.3, "right"),
        )
        for (name, size), (start, side, gap, ha) in zip(sizes.items(), places):
            colour, strong = (RED, True) if name == summed else (INK, False)
            middle = start + side / 2 + gap
            ax.plot(*_points(start, start + side), color=colour, linewidth=4 if strong else 1.5)
            weight = "bold" if strong else "normal"
            ax.text(middle.real, middle.imag, f"{name} = {size}", ha=ha, va="center", color=colour, weight=weight)
        end = corner + across + back
        ax.text((x + end.real) / 2, end.imag + 0.4, title, ha="center", va="bottom", color=INK, fontsize=12)
        ax.text(end.real + 0.9, 0, mark, ha="center", va="center", color=INK, fontsize=20)
        x = end.real + 3
    ax.set_aspect("equal")
    return ax


def sampling_grid(
    maps: Mapping[str, Affine],
    image: Pair,
    outputs: Sequence[Pair] = ((0, 0),),
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Where maps read an image of (height, width) pixels: for each output (row, column) a frame, in it their taps.

    Pixels are white and what is padded around them is grey; each map has a mark of its own that leaves the others seen.
    """
    ax = _bare(ax, title)
    around = [(max(a.left for a in pair), max(a.right for a in pair)) for pair in zip(*(m.axes for m in maps.values()))]
    (top, bottom), (left, right) = [(max(before, 0), max(behind, 0)) for before, behind in around]
    for row in range(-top, image[0] + bottom):
        for column in range(-left, image[1] + right):
            face = "white" if 0 <= row < image[0] and 0 <= column < image[1] else "#d9d9d6"
            corner = (column - 0.5, row - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, facecolor=face, edgecolor="#bdbdb8", linewidth=0.8))
    reads = {name: [[axis.reads(t) for axis, t in zip(m.axes, at)] for at in outputs] for name, m in maps.items()}
    for windows in zip(*reads.values()):
        (first, last), (start, end) = [(min(map(min, rows)), max(map(max, rows))) for rows in zip(*windows)]
        _rounded(ax, start - 0.46, first - 0.46, end - start + 0.92, last - first + 0.92, "none", INK)
    handles = [_tap(ax, n, places) for n, places in enumerate(reads.values())]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": len(maps)}
    ax.legend(handles, list(maps), handletextpad=0.1, columnspacing=1, **place)
    ax.set(xlim=(-left - 0.6, image[1] + right - 0.4), ylim=(image[0] + bottom - 0.4, -top - 0.6), aspect="equal")
    return ax


def roadmap(
    groups: Mapping[str, tuple[float, float, str]],
    arrows: Collection[tuple[str, str]],
    filled: Collection[str],
    ax: Axes | None = None,
) -> Axes:
    """The way through numbered stops: groups of them ("one · two"), each at its (column, row), joined by arrows.

    The stops are numbered in order, 00 first; those whose number is in `filled` stand out.
    """
    ax, edges, numbers = _bare(ax, ""), {}, count()
    for title, (left, row, text) in groups.items():
        stops, top = text.split(" · "), -1.5 * row
        width = max(len(stops), 2)
        edges[title] = (left + width / 2, top, top - 1.18)
        _rounded(ax, left, top - 1.18, width, 1.18, PAPER, "none")
        ax.text(left + 0.1, top - 0.17, title, va="center", weight="bold", color=INK, fontsize=9)
        for n, stop in enumerate(stops):
            number, step = f"{next(numbers):02}", width / len(stops)
            face, colour = (BLUE, "white") if number in filled else ("white", INK)
            middle = {"x": left + (n + 0.5) * step, "ha": "center", "va": "center", "color": colour}
            _rounded(ax, left + n * step + 0.05, top - 1.1, step - 0.1, 0.76, face, BLUE)
            ax.text(y=top - 0.5, s=number, fontsize=9, weight="bold", **middle)
            ax.text(y=top - 0.83, s=fill(stop, int(12 * step)), fontsize=8, linespacing=1.1, **middle)
    for start, end in arrows:
        (x, _, bottom), (to, top, _) = edges[start], edges[end]
        _arrow(ax, (x, bottom), (to, top))
    ax.set_aspect("equal")
    ax.autoscale_view()
    return ax


def sign(ax: Axes, symbol: str) -> None:
    """Write `+`, `=` or `→` in the gap to the left of a panel, so that a row of panels reads as a formula."""
    ax.annotate(
        symbol, (0, 0.5), (-7, 0), xycoords="axes fraction", textcoords="offset points", ha="right", va="center",
        fontsize=16, color=INK,
    )  # fmt: skip


def signs(axes: Sequence[Axes], symbols: str) -> None:
    """A `sign` for each panel, in order; a space leaves a gap empty."""
    for ax, symbol in zip(axes, symbols):
        sign(ax, symbol)


def scale(ax: Axes, colours: str, limits: tuple[float, float], label: str = "") -> None:
    """A slim colour bar to the right of a panel."""
    mappable = plt.cm.ScalarMappable(Normalize(*limits), colours)
    bar = ax.figure.colorbar(mappable, ax=ax, fraction=0.05, pad=0.03, label=label)
    bar.outline.set_visible(False)


def limits_of(xs: Sequence[Tensor], tail: float = 0.005) -> tuple[float, float]:
    """A scale that panels share: the range of all values, without the outermost half percent."""
    values = torch.cat([x.detach().float().flatten().cpu() for x in xs])
    return torch.quantile(values[:: max(1, len(values) // 200_000)], values.new_tensor([tail, 1 - tail])).tolist()


def _bare(ax: Axes | None, title: str) -> Axes:
    """Axes for a picture: no ticks, no frame."""
    ax = ax or plt.gca()
    ax.set_title(title)
    ax.set_axis_off()
    return ax


def _middles(inside: Tensor, smallest: int = 12) -> list[tuple[float, float]]:
    """The middle (row, column) of each connected patch of at least so many pixels."""
    from scipy import ndimage

    patches, number = ndimage.label(inside.cpu().numpy())
    kept = [n for n in range(1, number + 1) if (patches == n).sum() >= smallest]
    return ndimage.center_of_mass(patches > 0, patches, kept) if kept else []


def _numpy(x: Tensor):
    return x.detach().float().cpu().numpy()


def _tap(ax: Axes, n: int, windows: Sequence[Sequence[Sequence[int]]]) -> Line2D:
    """Mark the taps of windows (rows, columns) with the n-th mark, sized in pixels of the image; answers its key."""
    shape, side, colour, face = (
        ("s", 0.62, BLUE, "none"),
        ("o", 0.42, ORANGE, "none"),
        ("D", 0.2, INK, INK),
        ("P", 0.4, RED, RED),
    )[n % 4]
    style = MarkerStyle(shape)
    path = style.get_path().transformed(style.get_transform())
    size = side / max(path.get_extents().size)
    for rows, columns in windows:
        for y, x in product(rows, columns):
            place = Affine2D().scale(size).translate(x, y)
            ax.add_patch(PathPatch(path.transformed(place), facecolor=face, edgecolor=colour, linewidth=2.5, zorder=2))
    return Line2D([], [], linestyle="", marker=shape, color=colour, markerfacecolor=face, markeredgewidth=2)


def _scored(ax: Axes, column: int, row: int, text: str, status: str) -> None:
    """A cell of a scoreboard."""
    face, symbol, _ = STATUSES.get(status, (PAPER, "", ""))
    style = {"facecolor": face, "edgecolor": "white" if symbol == "" else GREY, "linewidth": 0.8}
    if symbol == "×":
        style |= {"hatch": "////", "edgecolor": "#c4c4bf"}
    ax.add_patch(Rectangle((column + 0.02, row + 0.06), 0.96, 0.88, **style))
    ink = "white" if sum(to_rgb(face)) < 1.4 else INK
    ax.text(column + 0.05, row + 0.5, symbol, ha="left", va="center", color=ink, weight="bold")
    shift = 0.03 if symbol and text else 0
    ax.text(column + 0.5 + shift, row + 0.5, text, ha="center", va="center", color=ink, fontsize=8, linespacing=1.05)


def _wire(ax: Axes, points: Sequence[tuple[float, float]], colour: str) -> None:
    """A line of a diagram, under its layers."""
    ax.plot(*zip(*points), color=colour, zorder=0, solid_joinstyle="round")


def _layer(ax: Axes, x: float, y: float, text: str, colour: str) -> None:
    """A layer of a diagram: its name in a box."""
    box = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": colour, "linewidth": 2}
    ax.text(x, y, text, ha="center", va="center", color=INK, bbox=box)


def _words(ax: Axes, x: float, y: float, text: str, points: float) -> None:
    """Text as a shape around (x, y), in a diagram whose unit is an inch: it scales with the rest."""
    size = points / 72
    outline = TextPath((0, 0), text, size=size)
    box = outline.get_extents()
    place = Affine2D().translate(x - (box.x0 + box.x1) / 2, y - 0.365 * size)  # half as high as a digit
    ax.add_patch(PathPatch(place.transform_path(outline), facecolor=INK, linewidth=0))


def _rounded(ax: Axes, x: float, y: float, width: float, height: float, face: str, edge: str) -> None:
    """A rectangle with round corners."""
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=face, edgecolor=edge, linewidth=1.5))


def _face(ax: Axes, corner: complex, one: tuple[complex, int], other: tuple[complex, int], colour: str) -> None:
    """A side of a box: a parallelogram on two (edge, number of cells), its cells ruled."""
    ax.fill(*_points(corner, corner + one[0], corner + one[0] + other[0], corner + other[0]), color=colour)
    for (edge, cells), (across, _) in ((one, other), (other, one)):
        for n in range(cells + 1):
            start = corner + edge * n / cells
            ax.plot(*_points(start, start + across), color=GREY, linewidth=0.6)


def _points(*points: complex) -> tuple[list[float], list[float]]:
    """Points of the complex plane as matplotlib wants them."""
    return [p.real for p in points], [p.imag for p in points]


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A grey arrow."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.5})


def _cells(weight: Tensor) -> list[tuple[tuple[int, int], float]]:
    """Every tap's (row, column) and value."""
    values = weight.detach().float().cpu()
    return [((y, x), values[y, x].item()) for y in range(values.shape[0]) for x in range(values.shape[1])]


def _short(value: float) -> str:
    """Two digits behind the point, a true minus, and a bare 0 for exactly zero."""
    return "0" if value == 0 else f"{value:.2f}".replace("-", "−")
