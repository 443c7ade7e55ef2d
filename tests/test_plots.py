"""What the drawings say is what the numbers are, where a picture could be turned or scaled without anybody noticing."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle

from dbb import Affine, plots
from dbb.matrix import Comparison


@pytest.fixture
def ax():
    return Figure().subplots()


def test_spectrum_of_an_average_along_the_rows(ax):
    """Zero for stripes of period 3 across, one for stripes down."""
    image = plots.spectrum(torch.full((1, 3), 1 / 3), ax, limit=2).images[0]
    response = torch.as_tensor(image.get_array())
    left, right, bottom, top = image.get_extent()
    assert (left, right, bottom, top, image.get_clim()) == (-0.5, 0.5, 0.5, -0.5, (0, 2))
    middle, third = len(response) // 2, round(len(response) / 3)
    assert response[middle, middle] == pytest.approx(1)
    assert response[middle, middle + third] < 0.01
    assert torch.allclose(response[:, middle], torch.ones(1))


def test_spectrum_takes_kernels_of_any_size(ax):
    response = plots.spectrum(torch.ones(1, 300), ax).images[0].get_array()
    assert response.max() == 300


def test_response_curves(ax):
    """Several kernels by the root of the mean of squares; names apart even where lines end at one place."""
    average = torch.full((2, 3), 1 / 6)
    plots.response_curves({"kxk": torch.stack([average, 3 * average])[:, None], "other": average}, ax)
    (branch, single), (low, high) = ax.lines, ax.texts
    frequency, response = (torch.as_tensor(values) for values in single.get_data())
    expected = torch.sin(3 * math.pi * frequency) / (3 * torch.sin(math.pi * frequency))
    torch.testing.assert_close(response[1:], expected[1:].abs().to(response), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.as_tensor(branch.get_ydata()), math.sqrt(5) * response)
    assert branch.get_color() == plots.BRANCH_COLOURS["kxk"]
    assert {low.get_text(), high.get_text()} == {"K×K", "other"}
    assert abs(low.get_position()[1] - high.get_position()[1]) > 0.1


def test_sampling_grid_marks_the_pixels_that_outputs_depend_on(ax):
    """Marks by gradient, padding in grey, one frame for each output."""
    maps = {
        "large": Affine(torch.ones(1, 1, 3, 2), stride=2, padding=((1, 1), (2, 0)), dilation=(1, 2)),
        "small": Affine(torch.ones(1, 1, 1, 1), stride=2),
    }
    outputs = [(0, 0), (1, 2)]
    plots.sampling_grid(maps, (5, 6), outputs, ax)
    x = torch.zeros(1, 1, 5, 6, requires_grad=True)
    sum(a(x)[0, 0, t, u] for a in maps.values() for t, u in outputs).backward()
    boxes = {kind: [p.get_extents() for p in ax.patches if type(p) is kind] for kind in (PathPatch, FancyBboxPatch)}
    places = [ax.transData.inverted().transform((b.x0 + b.x1, b.y0 + b.y1) / np.array(2)) for b in boxes[PathPatch]]
    marks = Counter((round(row), round(column)) for column, row in places)
    inside = {at: n for at, n in marks.items() if 0 <= at[0] < 5 and 0 <= at[1] < 6}
    assert inside == {tuple(at): int(x.grad[0, 0, *at]) for at in x.grad[0, 0].nonzero().tolist()}
    assert sum(marks.values()) == 2 * (6 + 1) and len(boxes[FancyBboxPatch]) == 2
    pixels = [p for p in ax.patches if type(p) is Rectangle]
    assert (len(pixels), sum(p.get_facecolor() == (1, 1, 1, 1) for p in pixels)) == (7 * 8, 5 * 6)


def test_tiles_lie_in_their_rows(ax):
    """One number a tile, a smaller one in the corner of its place, none where there is none."""
    small, large = torch.full((3, 6, 9), 0.25), torch.full((3, 12, 12), 0.5)
    sheet = torch.as_tensor(plots.tiles({"a": [large, small], "b": [None, large]}, ax).images[0].get_array())
    assert sheet.shape == (2 + 2 * 14, 2 + 2 * 14, 3)
    for value, rows, columns in ((0.5, (2, 14), (2, 14)), (0.25, (2, 8), (16, 25)), (0.5, (16, 28), (16, 28))):
        assert (sheet[slice(*rows), slice(*columns)] == value).all()
    assert (sheet > 0.8).sum() == sheet.numel() - 3 * (2 * 144 + 54)
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [("a", (-2, 8)), ("b", (-2, 22))]


def test_curves_leave_out_what_was_not_measured(ax):
    plots.curves({"plain": [3.0, None, 1.0], "mine": [2.0, 2.0, 2.0]}, ax)
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1, 3], [3, 1]], [[1, 2], [2, 2], [3, 2]]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "mine"]
    assert ax.lines[0].get_color() == plots.VARIANTS["plain"][0]


def test_strip_joins_equal_seeds(ax):
    """A seed that one variant lacks is a dot without a line; the bars stand at the means."""
    plots.strip({"plain": {0: 1.0, 1: 2.0}, "dbb": {1: 5.0, 2: 7.0}}, ax)
    joined, *means = [line.get_xydata().tolist() for line in ax.lines]
    assert joined == [[0, 2], [1, 5]]
    assert [mean[0][1] for mean in means] == [1.5, 6]
    assert [dots.get_offsets().tolist() for dots in ax.collections] == [[[0, 1], [0, 2]], [[1, 5], [1, 7]]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["plain", "DBB"]


@pytest.mark.parametrize("limit, drawn", [(None, 2), (5, 5)])
def test_a_signed_map_is_white_at_zero_and_has_a_scale(ax, limit, drawn):
    """Symmetric, whatever the values are; orange above zero, purple below."""
    image = plots.signed_map(torch.tensor([[0.0, 1.0], [-2.0, 0.5]]), ax, limit=limit).images[0]
    assert image.get_array().tolist() == [[0, 1], [-2, 0.5]] and image.get_clim() == (-drawn, drawn)
    (zero, above), (below, _) = image.cmap(image.norm(image.get_array()))[..., :3].tolist()
    assert min(zero) > 0.95 and above[0] > above[2] and below[0] < below[2]
    assert ax.figure.axes[1].get_ylim() == (-drawn, drawn)


def test_a_signed_map_of_nothing_is_white(ax):
    image = plots.signed_map(torch.zeros(2, 2), ax).images[0]
    assert image.get_clim() == (-1, 1) and image.norm(0.0) == 0.5


def test_marks_stand_where_rows_and_columns_meet_on_maps_of_one_scale():
    maps, axes = torch.stack([torch.zeros(4, 6), torch.full((4, 6), 8.0)]), Figure().subplots(1, 2)
    plots.marked(maps, [0, 2], [1, 3, 5], axes)
    for ax, x in zip(axes, maps):
        assert ax.images[0].get_array().tolist() == x.tolist() and ax.images[0].get_clim() == (0, 8)
        dots = {(row, column) for column, row in ax.collections[0].get_offsets().tolist()}
        assert dots == {(row, column) for row in (0, 2) for column in (1, 3, 5)}


def test_parts_of_a_stack_stand_one_behind_the_other(ax):
    """In the order of the colours; a part that a bar lacks has no width, and the first bar is on top."""
    colours = {"conv": plots.BLUE, "norm": plots.ORANGE, "sum": plots.INK}
    plots.stacks({"plain": {"norm": 0.25, "conv": 0.75}, "dbb": {"conv": 2.0, "norm": 1.0, "sum": 0.5}}, colours, ax)
    drawn = [(p.get_x(), p.get_width(), p.get_y() + p.get_height() / 2, p.get_facecolor()[:3]) for p in ax.patches]
    blue, orange, ink = map(to_rgb, colours.values())
    assert drawn[::2] == [(0, 0.75, 0, blue), (0.75, 0.25, 0, orange), (1, 0, 0, ink)]
    assert drawn[1::2] == [(0, 2, 1, blue), (2, 1, 1, orange), (3, 0.5, 1, ink)]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["plain", "dbb"] and ax.yaxis_inverted()


def test_a_colour_key_names_the_colours():
    figure = Figure(layout="constrained")
    plots.colour_key(figure, {"conv": plots.BLUE, "norm": plots.ORANGE}, columns=1)
    (key,) = figure.legends
    named = {text.get_text(): patch.get_facecolor()[:3] for text, patch in zip(key.get_texts(), key.get_patches())}
    assert named == {"conv": to_rgb(plots.BLUE), "norm": to_rgb(plots.ORANGE)}


@pytest.mark.parametrize(
    "logarithmic, scales", [("xy", ("log", "log")), ("x", ("log", "linear")), ("", ("linear",) * 2)]
)
def test_lines_have_the_values_and_the_scales_they_are_asked_for(ax, logarithmic, scales):
    plots.lines([1, 10, 100], {"a": [3, 2, 1], "b": [5, 5, 5]}, ax, "title", "pixels", logarithmic)
    assert [line.get_xydata().tolist() for line in ax.lines] == [
        [[1, 3], [10, 2], [100, 1]],
        [[1, 5], [10, 5], [100, 5]],
    ]
    assert (ax.get_xscale(), ax.get_yscale()) == scales and (ax.get_title(), ax.get_xlabel()) == ("title", "pixels")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == 2  # told apart without colour


def test_a_single_line_needs_no_legend_and_one_of_another_length_is_refused(ax):
    plots.lines([1, 2], {"only": [1, 2]}, ax)
    assert ax.get_legend() is None
    with pytest.raises(ValueError, match="same first dimension"):
        plots.lines([1, 2], {"long": [1, 2, 3]}, ax)


def test_costs_are_dots_around_the_one_that_is_not_drawn(ax):
    """Every measurement lies inside, and lines at 1 stand for what the others are measured by."""
    plots.costs({"branches": [(4.0, 3.0), (40.0, 2.0)], "sampled": [(1.0, 0.5)]}, ax)
    assert [dots.get_offsets().tolist() for dots in ax.collections] == [[[4, 3], [40, 2]], [[1, 0.5]]]
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[0, 1], [1, 1]], [[1, 0], [1, 1]]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["branches", "sampled"]
    marks = [tuple(map(tuple, dots.get_paths()[0].vertices)) for dots in ax.collections]
    assert marks[0] != marks[1]  # told apart without colour
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert left < 1 and right > 40 and bottom == 0 and top > 3
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("time", "memory", "log")


def test_costs_that_were_not_measured_are_said_to_be(ax):
    plots.costs({}, ax)
    assert [text.get_text() for text in ax.texts] == ["nothing is recorded yet"] and ax.get_legend() is None


def test_shares_stack_up_from_zero_and_hang_below_it(ax):
    plots.shares({"a": {"kxk": 0.7, "1x1": 0.5, "1x1_avg": -0.2}}, ax, before={"a": {"kxk": 1.0}})
    pale, *now = ax.patches
    assert (pale.get_y(), pale.get_height()) == (0, 1) and pale.get_alpha() < now[0].get_alpha()
    assert [(round(p.get_y(), 3), round(p.get_height(), 3)) for p in now] == [(0, 0.7), (0.7, 0.5), (0, -0.2)]
    assert now[0].get_facecolor()[:3] == to_rgb(plots.BRANCH_COLOURS["kxk"])
    assert pale.get_x() < now[0].get_x()


def test_cosines_say_their_values_where_they_belong(ax):
    table = torch.tensor([[1.0, 0.34, math.nan], [-0.52, 1.0, -0.01], [math.nan, 0.9, 1.0]])
    plots.cosines(table, ["kxk", "1x1", "1x1_avg"], ax)
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (1, 0): "0.3",
        (0, 1): "−0.5",
        (2, 1): "0.0",
        (1, 2): "0.9",
    }
    assert [patch.get_xy() for patch in ax.patches] == [(-0.5, -0.5), (0.5, 0.5), (1.5, 1.5)]


def test_the_graph_of_a_forward_joins_what_reads_what(ax):
    net = torch.nn.Sequential(OrderedDict(conv=torch.nn.Conv2d(1, 1, 1), norm=torch.nn.BatchNorm2d(1)))
    plots.forward_graph(net, {"conv": "norm"}, ax)
    places = {text.get_text(): text.get_position() for text in ax.texts}
    columns = [places[name][0] for name in ("conv", "norm", "output")]
    assert columns == sorted(columns) and len(set(columns)) == 3


def test_names_stand_beside_their_tiles(ax):
    plots.label_tiles(ax, ["a", "b"], ["c"], (3, 3))
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [
        ("a", (-0.8, 2)),
        ("b", (-0.8, 6)),
        ("c", (2, -0.8)),
    ]


def test_a_scoreboard_tells_by_colour_and_sign(ax):
    plots.scoreboard([("row", [("1.0", "holds"), ("", "pending"), ("2.0", ""), None])], ["a", "b", "c", "d"], ax)
    inside = [(int(x), t.get_text()) for t in ax.texts for x, y in [t.get_position()] if x > 0 < y and t.get_text()]
    assert inside == [(0, "✓"), (0, "1.0"), (1, "…"), (2, "2.0")]
    faces = [patch.get_facecolor()[:3] for patch in ax.patches]
    assert faces == [to_rgb(plots.BLUE), to_rgb("white"), to_rgb(plots.PAPER)]  # None is no cell


def test_a_forest_shows_every_seed_the_interval_and_the_published_value(ax):
    rows = {"here": ([1.0, 3.0], (0.5, 3.5), 2.5, "holds"), "there": ([], None, 0.7, "pending")}
    plots.forest(rows, ax, hollow=["there"])
    assert ax.collections[0].get_offsets().tolist() == [[1.0, 0.3], [3.0, 0.3]]
    lines = [(line.get_xydata().tolist(), line.get_color()) for line in ax.lines]
    assert lines[:3] == [([[0.5, 0], [3.5, 0]], plots.BLUE), ([[2.5, 0]], plots.INK), ([[2.0, 0]], "white")]
    assert lines[3] == ([[0.7, 1]], "white")
    assert [text.get_text() for text in ax.texts] == ["✓  holds", "…  pending"]


def test_verdicts_say_what_the_comparison_says(ax):
    found = Comparison("dbb", 5, 0.5, 0.01, 0.02, 0.01, 0.03, 1.0)
    rows = {
        "enough": ([1.0, 3.0], found, 0.5),
        "few": ([2.0], replace(found, seeds=2), None),
        "one": ([2.0], replace(found, seeds=1, low=None, high=None), None),
        "none": ([], None, None),
    }
    plots.verdicts(rows, ax)
    assert [text.get_text() for text in ax.texts] == ["better, 5 pairs", "undecided, 2 pairs", "one seed", "pending"]
    assert [line.get_xydata().tolist() for line in ax.lines if len(line.get_xdata()) == 2][:2] == [
        [[1.0, 0], [3.0, 0]],
        [[1.0, 1], [3.0, 1]],
    ]


def test_boxes_lie_where_they_are_on_the_pixels(ax):
    plots.boxed(torch.zeros(3, 20, 30), torch.tensor([[2.0, 3.0, 12.0, 8.0]]), ["dog"], ax)
    (box,), (word,) = ax.patches, ax.texts
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (1.5, 2.5, 10, 5)  # a pixel reaches half to each side
    assert (word.get_text(), word.get_position()) == ("dog", (2, 3))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        plots.boxed(torch.zeros(3, 20, 30), torch.zeros(2, 4), ["one"], ax)


def test_patches_of_a_class_have_its_colour_and_its_letter(ax):
    """Two patches of one class, one of another, and one that is too small to write on."""
    classes = torch.zeros(20, 20, dtype=torch.int64)
    classes[:4, :4] = classes[10:15, 10:14] = 1
    classes[:4, 10:14], classes[19, 19] = 2, 2
    plots.class_map(classes, ("background", "cat", "dog"), ax)
    assert sorted((text.get_text(), *text.get_position()) for text in ax.texts) == [
        ("c", 1.5, 1.5), ("c", 11.5, 12.0), ("d", 11.5, 1.5)
    ]  # fmt: skip
    (image,) = ax.images
    for number in range(3):
        assert image.cmap(image.norm(number))[:3] == pytest.approx(to_rgb(plots.CLASS_COLOURS[number]))


def test_colours_of_classes_differ_in_grey():
    """From the background and from the letters on them."""
    grey = [0.3 * r + 0.59 * g + 0.11 * b for r, g, b in map(to_rgb, plots.CLASS_COLOURS)]
    assert all(grey[0] - value > 0.25 and value < 0.75 for value in grey[1:])


def test_weights_lie_on_their_grid(ax):
    weight = torch.linspace(-1, 1, 900).reshape(3, 300)
    plots.on_grid(weight, torch.tensor([-0.5, 0.0, 0.5]), ax, "title", plots.RED)
    assert sum(patch.get_height() for patch in ax.patches) == 900
    (lines,) = ax.collections
    assert [line.vertices[0, 0] for line in lines.get_paths()] == [-0.5, 0.0, 0.5]
    assert ax.get_title() == "title" and to_rgb(ax.patches[0].get_facecolor()) == to_rgb(plots.RED)


def test_noise_that_follows_the_formula_lies_on_its_line(ax):
    crests = torch.tensor([2.0, 3.0])
    of_bits = {bits: (crests, crests / (2 ** (bits - 1) - 0.5) / 12**0.5) for bits in (8, 4)}
    plots.noise_by_crest({"plain": of_bits, "dbb": of_bits}, ax)
    marks, formula = ax.lines[:4], ax.lines[4:]
    assert [text.get_text() for text in ax.texts] == ["8 bits", "4 bits"] and len(formula) == 2
    for mark in marks:
        slopes = [line.get_ydata()[0] / line.get_xdata()[0] for line in formula]
        assert any(mark.get_ydata() / mark.get_xdata() == pytest.approx([slope] * 2) for slope in slopes)
    assert {mark.get_color() for mark in marks} == {plots.VARIANTS[kind][0] for kind in ("plain", "dbb")}


def test_panels_take_one_height():
    _, axes = plots.panels(1, 2)
    axes[0].set_ylim(0, 1), axes[1].set_ylim(-2, 0.5)
    plots.same_height(axes)
    assert [ax.get_ylim() for ax in axes] == [(-2, 1)] * 2
