"""Loaders of boxes and masks: a folder as COCO's and one as Cityscapes', each of a few tiny images, and the scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes

from dbb.annotated import IGNORED, load_boxes, load_masks
from dbb.scenes import CLASSES, write_scenes

pytestmark = pytest.mark.slow  # writes and reads sets of images

WHOLE = {"mean": torch.zeros(3), "std": torch.ones(3)}


def gradient(width: int, height: int) -> Image.Image:
    """Each pixel says where it is: red its column, green its row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def coco(root: Path) -> Path:
    """As COCO's: image 7 with two objects, 9 with a crowd and an object without an area, 8 with none, 3 with one."""
    sizes = {7: (40, 30), 9: (24, 36), 8: (20, 20), 3: (30, 30)}
    objects = [(7, 90, [8, 5, 20, 15], 0), (7, 18, [0, 0, 5, 5], 0), (9, 18, [1, 2, 20, 20], 1)]
    objects += [(9, 18, [3, 3, 0, 4], 0), (3, 1, [2, 4, 6, 8], 0)]
    names = {1: "person", 18: "dog", 90: "toothbrush"}  # the ids of COCO have gaps
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        for number, size in sizes.items():
            gradient(*size).save(root / split / f"{number:012}.png")
        content = {
            "images": [{"id": n, "file_name": f"{n:012}.png", "width": w, "height": h} for n, (w, h) in sizes.items()],
            "categories": [{"id": number, "name": name} for number, name in names.items()],
            "annotations": [
                {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": k}
                for n, (i, c, b, k) in enumerate(objects, start=1)
            ],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def cityscapes(root: Path) -> Path:
    """As Cityscapes': cities with two images each, whose mask's columns count through the ids."""
    for split, cities in {"train": ("ulm", "aachen"), "val": ("bonn",)}.items():
        for city in cities:
            for folder in ("leftImg8bit", "gtFine"):
                (root / folder / split / city).mkdir(parents=True)
            for n in range(2):
                stem = f"{city}_{n:06}_000019"
                gradient(64, 32).save(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
                ids = np.tile(np.arange(64) % 34, (32, 1)).astype(np.uint8)
                Image.fromarray(ids).save(root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png")
    return root


def mirrored(image: torch.Tensor) -> bool:
    """Whether columns count down."""
    return bool(image[0, 0, 0] > image[0, 0, -1])


# Boxes


def test_images_of_coco_with_their_objects(tmp_path):
    train, test = load_boxes(coco(tmp_path))
    assert (train.classes, len(train), len(test)) == (("person", "dog", "toothbrush"), 2, 4)
    assert train.ids == [3, 7], "what has no object to learn from is left out"
    ((image,), (target,)), *_ = train.only([7]).batches(1, **WHOLE).epoch()
    assert image.shape == (3, 30, 40) and not mirrored(image) and image[0].max() == 39 / 255
    assert target["boxes"].tolist() == [[8, 5, 28, 20], [0, 0, 5, 5]] and target["labels"].tolist() == [3, 2]
    assert target["image_id"] == 7


def test_testing_shows_every_image_once_with_crowds_left_out(tmp_path):
    _, test = load_boxes(coco(tmp_path))
    seen = [target for _, targets in test.batches(3, **WHOLE).epoch() for target in targets]
    assert [target["image_id"] for target in seen] == [3, 7, 8, 9]
    assert [len(target["boxes"]) for target in seen] == [1, 2, 0, 0]
    assert seen[2]["boxes"].shape == (0, 4) and seen[2]["labels"].dtype == torch.int64
    halves = [
        [t["image_id"] for _, ts in test.batches(2, **WHOLE, rank=r, world=2).epoch() for t in ts] for r in (0, 1)
    ]
    assert halves == [[3, 8], [7, 9]]


def test_boxes_move_with_their_image(tmp_path):
    train = load_boxes(coco(tmp_path))[0].only([7])
    ways = set()
    for epoch in range(12):
        ((image,), (target,)), *_ = train.batches(1, **WHOLE, train=True, augmentation="flip").epoch(epoch)
        way = mirrored(image)
        ways.add(way)
        assert target["boxes"].tolist() == (
            [[12, 5, 32, 20], [35, 0, 40, 5]] if way else [[8, 5, 28, 20], [0, 0, 5, 5]]
        )
    assert ways == {True, False}


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(same, one, other)) if isinstance(one, (list, tuple)) else one == other


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "scenes"
    write_scenes(path, {"train": 8, "val": 4})
    return path


@pytest.mark.parametrize("read, augmentation", [(load_boxes, "flip"), (load_masks, "scale_crop_flip")])
def test_batches_depend_on_seed_epoch_and_step_alone(scenes, read, augmentation):
    train, _ = read(scenes)

    def batches(seed=0, workers=0, **rank):
        options = {"train": True, "augmentation": augmentation, "seed": seed, "size": 48, "workers": workers}
        return list(train.batches(4, **WHOLE, **options, **rank).epoch(2))

    whole = batches()
    assert len(whole) == 2 and same(whole, batches(workers=2))
    parts = [batches(rank=rank, world=2) for rank in range(2)]
    for (images, targets), *halves in zip(whole, *parts, strict=True):
        for rank, (mine, wanted) in enumerate(halves):
            assert same(list(mine), list(images[rank::2])) and same(list(wanted), list(targets[rank::2]))
    assert not same(whole, batches(seed=1))


def test_images_are_normalised_and_the_backbones_way(scenes):
    train, _ = load_boxes(scenes)
    mean, std = train.mean_and_std()
    assert [round(value, 3) for value in mean.tolist()] == [0.485, 0.456, 0.406]
    (plain, _), *_ = train.batches(2, **WHOLE).epoch()
    (images, _), *_ = train.batches(2, mean=mean, std=std).epoch()
    torch.testing.assert_close(images[1], (plain[1] - mean[:, None, None]) / std[:, None, None])


def test_a_missing_set_says_in_one_line_where_to_get_it(tmp_path):
    for read, words in ((load_boxes, "annotations/instances_train2017.json is not there: get train2017.zip"),
                        (load_masks, "is no Cityscapes: get leftImg8bit_trainvaltest.zip")):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            read("nowhere", tmp_path)
        assert "\n" not in str(error.value) and "unpack" in str(error.value) and "https://" in str(error.value)
    (coco(tmp_path) / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="val2017 is not there"):
        load_boxes(tmp_path)


def test_annotation_files_of_other_classes_are_refused(tmp_path):
    path = coco(tmp_path) / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace("dog", "cat"))
    with pytest.raises(ValueError, match="other classes for training and for testing"):
        load_boxes(tmp_path)


def test_a_broken_image_is_named(tmp_path):
    train, _ = load_boxes(coco(tmp_path))
    (tmp_path / "train2017/000000000007.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^1 broken image files: .*000000000007\.png: mend or remove them$"):
        list(train.batches(2, **WHOLE, train=True, augmentation="flip").epoch())


def test_the_fingerprint_tells_other_data_and_other_parts_of_it(tmp_path):
    train, test = load_boxes(coco(tmp_path / "coco"))
    assert len({train.fingerprint(), train.first_of_each_class(1).fingerprint(), test.fingerprint()}) == 3
    assert train.fingerprint() == load_boxes(tmp_path / "coco")[0].fingerprint()
    roads, _ = load_masks(cityscapes(tmp_path / "roads"))
    before = roads.fingerprint()
    roads.masks[0].write_bytes(b"longer or shorter")
    assert roads.fingerprint() != before
    for data in (train, roads):
        with pytest.raises(ValueError, match="100 images are asked of"):
            data.first_of_each_class(100)


def test_unknown_augmentations_are_refused(scenes):
    for read in (load_boxes, load_masks):
        with pytest.raises(ValueError, match="augmentation='imagenet' is not for boxes or masks: use none, flip"):
            read(scenes)[0].batches(2, **WHOLE, train=True, augmentation="imagenet")


# Masks


def test_images_of_cityscapes_with_the_classes_that_count(tmp_path):
    train, test = load_masks(cityscapes(tmp_path))
    assert (len(train), len(test), len(train.classes)) == (4, 2, 19)
    assert train.classes[:3] == ("road", "sidewalk", "building") and train.classes[-1] == "bicycle"
    assert [path.name.split("_")[0] for path in train.files] == ["aachen", "aachen", "ulm", "ulm"]
    (images, classes), *_ = test.batches(2, **WHOLE).epoch()
    assert images.shape == (2, 3, 32, 64) and classes.shape == (2, 32, 64) and classes.dtype == torch.int64
    for kind in Cityscapes.classes:
        if 0 <= kind.id < 34:
            wanted = IGNORED if kind.ignore_in_eval else kind.train_id
            assert (classes[:, :, kind.id] == wanted).all(), kind.name
    assert classes[0, 0, 7] == 0 and classes[0, 0, 0] == IGNORED  # road; unlabeled


def test_masks_of_scenes(scenes):
    train, test = load_masks(scenes)
    assert train.classes == ("background", *CLASSES) and (len(train), len(test)) == (8, 4)
    (_, classes), *_ = test.batches(4, **WHOLE).epoch()
    assert classes.max() <= 4 and (classes == 0).float().mean() > 0.3


def test_masks_move_with_their_image(tmp_path):
    """Scaled, cropped and mirrored, a column's class still is that of the column that its red tells."""
    train = load_masks(cityscapes(tmp_path))[0].first_of_each_class(1)
    options = {"train": True, "augmentation": "scale_crop_flip", "size": 48}
    ways, scales = set(), set()
    for epoch in range(12):
        (images, classes), *_ = train.batches(1, **WHOLE, **options).epoch(epoch)
        assert images.shape == (1, 3, 48, 48) and classes.shape == (1, 48, 48)
        inside = images[0, 1] + images[0, 0] > 0
        columns = (images[0, 0] * 255).round().long().clamp(0, 63) % 34
        wanted = train.table[columns].long()
        agrees = (
            (classes[0] == wanted)
            | (classes[0] == train.table[(columns + 1) % 34])
            | (classes[0] == train.table[(columns - 1) % 34])
        )
        assert agrees[inside].float().mean() > 0.9
        ways.add(mirrored(images[0]))
        scales.add(int(inside.any(1).sum()))
    assert len(ways) == 2 and len(scales) > 3


def test_what_is_padded_counts_for_nothing(tmp_path):
    train = load_masks(cityscapes(tmp_path))[0].first_of_each_class(1)
    options = {"train": True, "augmentation": "scale_crop_flip", "size": 200}
    (images, classes), *_ = train.batches(1, **WHOLE, **options).epoch()
    assert (classes[0][images[0].sum(0) == 0] == IGNORED).float().mean() > 0.9
