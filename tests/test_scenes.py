"""Generated scenes: always the same, annotated as they are drawn, and readable as COCO is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from dbb import scenes
from dbb.data import load
from dbb.scenes import CLASSES, SIZE, draw_scene, find_scenes, write_scenes

NUMBERS = {"train": 6, "val": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes")
    write_scenes(path, NUMBERS)
    return path


def test_a_scene_depends_on_its_split_and_number_alone():
    first, again = draw_scene("train", 3), draw_scene("train", 3)
    assert torch.equal(first.image, again.image) and torch.equal(first.masks, again.masks)
    others = [draw_scene("train", 4), draw_scene("val", 3)]
    assert not any(torch.equal(first.image, other.image) for other in others)


@pytest.mark.parametrize("number", range(20))
def test_boxes_and_classes_are_those_of_the_masks(number):
    scene = draw_scene("train", number)
    assert scene.image.shape == (3, SIZE, SIZE) and 1 <= len(scene.labels) <= scenes.MOST_OBJECTS
    assert not (scene.masks.sum(0) > 1).any(), "a pixel shows one object at most"
    for mask, label, box in zip(scene.masks, scene.labels, scene.boxes.int().tolist(), strict=True):
        left, top, right, bottom = box
        inside = torch.zeros_like(mask)
        inside[top:bottom, left:right] = True
        assert not (mask & ~inside).any()
        assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
        assert (scene.classes[mask] == label).all()
    assert (scene.classes[~scene.masks.any(0)] == 0).all()


def test_every_class_comes_up_and_is_painted_over_the_photograph():
    drawn = [draw_scene("train", number) for number in range(40)]
    counts = torch.cat([scene.labels for scene in drawn]).bincount(minlength=5)[1:]
    assert (counts > 5).all() and len(counts) == len(CLASSES)
    sizes = torch.cat([scene.masks.sum((1, 2)) for scene in drawn])
    assert sizes.min() > 10 and sizes.max() < 800


def test_test_scenes_show_other_photographs_and_digits(monkeypatch):
    """Where the part for training is painted black, and its digits are gone, a test scene is the same."""
    before = draw_scene("val", 5), draw_scene("train", 5)
    border = round(scenes.FOR_TRAINING * 320)
    halved = tuple(photograph.clone() for photograph in scenes._photographs())
    for photograph in halved:
        photograph[:, :, :border] = 0
    train, test = load("digits")
    blank = type(train)("blank", torch.zeros_like(train.images), train.labels, train.classes)
    monkeypatch.setattr(scenes, "_photographs", lambda: halved)
    monkeypatch.setattr(scenes, "load", lambda name: (blank, test))
    assert torch.equal(draw_scene("val", 5).image, before[0].image)
    assert not torch.equal(draw_scene("train", 5).image, before[1].image)


def test_what_is_written_is_what_was_drawn(folder):
    for split, number in NUMBERS.items():
        coco = COCO(folder / f"annotations/instances_{split}.json")
        assert len(coco.imgs) == number and [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
        for n, image in enumerate(coco.loadImgs(sorted(coco.imgs))):
            scene = draw_scene(split, n)
            with Image.open(folder / split / image["file_name"]) as file:
                assert torch.equal(torch.tensor(np.array(file)).permute(2, 0, 1), scene.image)
            with Image.open(folder / "masks" / split / image["file_name"]) as file:
                assert torch.equal(torch.tensor(np.array(file)), scene.classes)
            found = coco.loadAnns(coco.getAnnIds(image["id"]))
            assert [entry["category_id"] for entry in found] == scene.labels.tolist()
            for entry, mask, box in zip(found, scene.masks, scene.boxes):
                assert torch.equal(torch.tensor(coco.annToMask(entry)).bool(), mask)
                left, top, width, height = entry["bbox"]
                assert [left, top, left + width, top + height] == box.tolist() and entry["area"] == mask.sum()


def test_pixels_are_part_of_the_annotations(folder):
    """So that a record of them, by its hash of the annotation file, is one of the pictures, too."""
    content = json.loads((folder / "annotations/instances_val.json").read_text())
    assert len(content["info"]["pixels"]) == 64


def test_they_are_written_once_and_anew_for_other_code(tmp_path, monkeypatch):
    first = find_scenes(tmp_path, NUMBERS)
    stamp = (first / "annotations/instances_val.json").stat().st_mtime_ns
    assert find_scenes(tmp_path, NUMBERS) == first
    assert (first / "annotations/instances_val.json").stat().st_mtime_ns == stamp
    assert find_scenes(tmp_path, NUMBERS | {"val": 2}) != first
    other = tmp_path / "other.py"
    other.write_text("# other code")
    monkeypatch.setattr(scenes, "__file__", str(other))
    assert find_scenes(tmp_path, NUMBERS) != first
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_two_processes_that_write_at_once_are_no_matter(tmp_path, monkeypatch):
    real = write_scenes

    def slower(folder, numbers):
        monkeypatch.setattr(scenes, "write_scenes", real)
        find_scenes(tmp_path, numbers)  # the other one is done first
        real(folder, numbers)

    monkeypatch.setattr(scenes, "write_scenes", slower)
    folder = find_scenes(tmp_path, {"train": 1, "val": 1})
    assert (folder / "train/0000.png").exists() and list(tmp_path.iterdir()) == [folder]
