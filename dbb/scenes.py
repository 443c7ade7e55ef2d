"""Generated scenes to detect and to segment: shapes and digits on crops of photographs, for whoever has no COCO.

The photographs and the handwritten digits are scikit-learn's. Scenes are written to disk as COCO is, with a picture of
the classes beside each image, so that the loaders of the real sets read them. Test scenes show other parts of the
photographs, and digits of other writers. A scene depends on its split and its number alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dbb.data import load
from dbb.figures import write_atomically
from dbb.sampling import generator

CLASSES = ("disk", "square", "triangle", "digit")
SIZE = 64  # height and width
NUMBERS = {"train": 600, "val": 200}
MOST_OBJECTS = 4
TRIES = 20  # to place an object apart from the others
APART = 0.8  # of the sum of two radii: what lies behind stays mostly visible
TYPICAL = ((0.9, 0.2, 0.2), (0.2, 0.3, 0.9), (0.9, 0.8, 0.1), (0.9, 0.9, 0.9))  # colour of each class, values 0 to 1
LIKE_IT = 0.6  # share of an object's colour that is its class's, the rest is random
FOR_TRAINING = 0.65  # of the width of a photograph, from the left


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what is on it.

    image: uint8 "3 h w"; masks: bool "n h w", of what is visible of each object; labels: int64 "n", 1 for `CLASSES[0]`
    """

    image: Tensor
    masks: Tensor
    labels: Tensor

    @property
    def classes(self) -> Tensor:
        """The class of each pixel: uint8 "h w", 0 for the background."""
        return (self.masks * self.labels[:, None, None]).sum(0).to(torch.uint8)

    @property
    def boxes(self) -> Tensor:
        """Around each object "n 4": left, top, right and bottom edge, in pixels."""
        return torch.stack([_box(mask) for mask in self.masks])


def draw_scene(split: str, number: int) -> Scene:
    """A scene of "train" or "val", always the same."""
    dice = generator("scenes", split, number)
    image, masks, labels = _background(dice, split), [], []
    for middle, radius in _places(dice):
        label = int(torch.randint(len(CLASSES), (), generator=dice))
        cover = _shape(dice, split, label, middle, radius)
        paint = torch.rand(3, generator=dice).lerp(torch.tensor(TYPICAL[label]), LIKE_IT)[:, None, None]
        image = image.lerp(paint.expand_as(image), cover * _between(dice, 0.65, 0.95))
        masks = [mask & (cover <= 0.4) for mask in masks] + [cover > 0.4]
        labels.append(label + 1)
    return Scene((image * 255).round().to(torch.uint8), torch.stack(masks), torch.tensor(labels))


def find_scenes(root: str | Path, numbers: Mapping[str, int] = NUMBERS) -> Path:
    """The folder of the scenes in `root`; they are written there where they are not yet, in seconds.

    A change of this file makes new ones in a new folder: nobody trains on what older code has drawn.
    """
    code = hashlib.sha256(Path(__file__).read_bytes() + json.dumps(dict(numbers)).encode()).hexdigest()
    folder = Path(root) / f"scenes-{code[:12]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=root, prefix=".scenes-"))
        try:
            write_scenes(unfinished, numbers)
            with suppress(OSError):  # another process was first, with the same ones
                unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def write_scenes(folder: Path, numbers: Mapping[str, int] = NUMBERS) -> None:
    """Write scenes as COCO is: `train/`, `val/` and `annotations/`; and `masks/`, pictures of the classes."""
    from PIL import Image

    for split, number in numbers.items():
        scenes = [draw_scene(split, n) for n in range(number)]
        for n, scene in enumerate(scenes):
            for kind, pixels in ((split, scene.image.permute(1, 2, 0)), (f"masks/{split}", scene.classes)):
                path = folder / kind / f"{n:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.numpy()).save(path, compress_level=1)
        content = json.dumps(annotations(scenes))
        write_atomically(folder / f"annotations/instances_{split}.json", content.encode())


def annotations(scenes: list[Scene]) -> dict:
    """What COCO's annotation file says of the scenes; the first has the id 1."""
    pixels = hashlib.sha256(b"".join(scene.image.numpy().tobytes() for scene in scenes)).hexdigest()
    objects = [entry for n, scene in enumerate(scenes) for entry in _objects(n + 1, scene)]
    return {
        "info": {"description": "generated scenes", "pixels": pixels},
        "images": [
            {"id": n, "file_name": f"{n - 1:04}.png", "width": SIZE, "height": SIZE} for n in range(1, len(scenes) + 1)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(CLASSES, start=1)],
        "annotations": [{"id": n, **entry} for n, entry in enumerate(objects, start=1)],
    }


def _objects(image: int, scene: Scene) -> Iterator[dict]:
    from pycocotools.mask import encode

    for mask, label, box in zip(scene.masks, scene.labels.tolist(), scene.boxes.tolist()):
        runs = encode(mask.to(torch.uint8).T.contiguous().T.numpy())  # it wants columns one after another
        left, top, right, bottom = box
        yield {
            "image_id": image,
            "category_id": label,
            "bbox": [left, top, right - left, bottom - top],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": runs | {"counts": runs["counts"].decode()},
        }


def _box(mask: Tensor) -> Tensor:
    rows, columns = (mask.any(axis).nonzero() for axis in (1, 0))
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


@lru_cache(maxsize=1)
def _photographs() -> tuple[Tensor, ...]:
    """scikit-learn's two, at half their size, values 0 to 1: "3 h w"."""
    from sklearn.datasets import load_sample_image

    pictures = [torch.tensor(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]
    return tuple(F.avg_pool2d(picture.permute(2, 0, 1).float() / 255, 2) for picture in pictures)


def _background(dice: torch.Generator, split: str) -> Tensor:
    photograph = _photographs()[int(torch.randint(2, (), generator=dice))]
    height, width = photograph.shape[1:]
    border = round(FOR_TRAINING * width)
    first, last = (0, border - SIZE) if split == "train" else (border, width - SIZE)
    left = int(torch.randint(first, last + 1, (), generator=dice))
    top = int(torch.randint(height - SIZE + 1, (), generator=dice))
    return photograph[:, top : top + SIZE, left : left + SIZE]


def _places(dice: torch.Generator) -> Iterator[tuple[tuple[float, float], float]]:
    """Middles and radii of one to `MOST_OBJECTS` objects; one for which there is no room is left out."""
    taken: list[tuple[float, float, float]] = []
    for _ in range(int(torch.randint(1, MOST_OBJECTS + 1, (), generator=dice))):
        for _ in range(TRIES):
            radius = _between(dice, 7, 14)
            x, y = (_between(dice, radius, SIZE - radius) for _ in range(2))
            if all(math.dist((x, y), (a, b)) > APART * (radius + r) for a, b, r in taken):
                taken.append((x, y, radius))
                yield (x, y), radius
                break


def _shape(dice: torch.Generator, split: str, label: int, middle: tuple[float, float], radius: float) -> Tensor:
    """How much of each pixel an object covers: "h w", 0 to 1."""
    pixels = torch.arange(SIZE) + 0.5
    x, y = (pixels - middle[0]).expand(SIZE, SIZE) / radius, (pixels - middle[1])[:, None].expand(SIZE, SIZE) / radius
    if CLASSES[label] == "digit":
        digits = load("digits")[split == "val"].images
        chosen = digits[int(torch.randint(len(digits), (), generator=dice))].float() / 255
        return F.grid_sample(chosen[None], torch.stack([x, y], -1)[None], align_corners=False)[0, 0]
    angle = _between(dice, 0, 2 * math.pi)
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    inside = {
        "disk": u.square() + v.square() < 1,
        "square": (u.abs() < 0.8) & (v.abs() < 0.8),
        "triangle": (v > -0.55) & (v + math.sqrt(3) * u.abs() < 1.1),
    }
    return inside[CLASSES[label]].float()


def _between(dice: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=dice).item()
