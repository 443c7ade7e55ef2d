"""Images with boxes or with masks, on disk: COCO, Cityscapes, and whatever is laid out as they are.

As in `dbb.imagenet`, images stay on disk and are decoded and augmented by worker processes, and what is drawn at random
follows from (seed, epoch, step) and an image's place in the batch alone. Boxes and masks move with their image.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dbb.data import find_folder
from dbb.imagenet import FileBatches, OnDisk, decoded, fingerprint_of
from dbb.scenes import CLASSES, find_scenes

if TYPE_CHECKING:
    from PIL.Image import Image
    from pycocotools.coco import COCO
    from torchvision.datasets import CocoDetection

IGNORED = 255  # the class of pixels that count for nothing
SCALES = (0.5, 2.0)  # by which an image is resized before it is cropped
GET_COCO = "get train2017.zip, val2017.zip and annotations_trainval2017.zip from https://cocodataset.org/#download"
GET_CITYSCAPES = (
    "get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com (free, with "
    "an account)"
)


@dataclass(frozen=True, eq=False)
class BoxedImages(OnDisk):
    """Images of a COCO annotation file.

    name: what to call the data in a record; path: of that file; dataset: torchvision's, which knows images and objects
    categories: the ids of the classes in the file; classes: their names, which detectors know as 1, 2, ...
    """

    name: str
    path: Path
    dataset: CocoDetection
    categories: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    @property
    def ids(self) -> list[int]:
        """Of the images, in the file."""
        return self.dataset.ids

    @property
    def coco(self) -> COCO:
        """The file as pycocotools has read it, with all of its images."""
        return self.dataset.coco

    @property
    def files(self) -> list[Path]:
        """One image each."""
        return [Path(self.dataset.root, self.coco.imgs[number]["file_name"]) for number in self.ids]

    def only(self, ids: Sequence[int]) -> BoxedImages:
        """Those images alone."""
        dataset = copy.copy(self.dataset)
        dataset.ids = list(ids)
        return replace(self, dataset=dataset)

    def first_of_each_class(self, number: int) -> BoxedImages:
        """The first `number` images, in which every class may have many objects. Raises ValueError for too few."""
        _check_enough(self, number)
        return self.only(self.ids[:number])

    def fingerprint(self) -> str:
        """SHA-256 of the annotation file and of which of its images are used."""
        return hashlib.sha256(self.path.read_bytes() + json.dumps(self.ids).encode()).hexdigest()

    def batches(self, batch_size: int, **options) -> BoxedBatches:
        """`BoxedBatches` of it."""
        return BoxedBatches(self, batch_size, **options)

    def read(self, place: int) -> tuple[Image, dict[str, Tensor]]:
        """An image, decoded, and its objects: boxes "n 4" (left, top, right, bottom), labels "n"; crowds left out."""
        image, found = self.dataset[place]
        found = [entry for entry in found if not entry.get("iscrowd")]
        boxes = torch.tensor([entry["bbox"] for entry in found], dtype=torch.float32).reshape(-1, 4)
        labels = [self.categories.index(entry["category_id"]) + 1 for entry in found]
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        return image, {"boxes": corners, "labels": torch.tensor(labels, dtype=torch.int64), "image_id": self.ids[place]}


@dataclass(frozen=True, eq=False)
class MaskedImages(OnDisk):
    """Images, and for each a picture of the classes of its pixels.

    name: what to call the data in a record; folder: what `files` and `masks` lie in
    table: uint8 "256": the class of each value in a mask, `IGNORED` for what counts for nothing
    classes: their names
    """

    name: str
    folder: Path
    files: Sequence[Path]
    masks: Sequence[Path]
    table: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def first_of_each_class(self, number: int) -> MaskedImages:
        """The first `number` images, on which there may be many classes. Raises ValueError for too few."""
        _check_enough(self, number)
        return replace(self, files=self.files[:number], masks=self.masks[:number])

    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of the files."""
        return fingerprint_of([*self.files, *self.masks], self.folder)

    def batches(self, batch_size: int, **options) -> MaskedBatches:
        """`MaskedBatches` of it."""
        return MaskedBatches(self, batch_size, **options)

    def read(self, place: int) -> tuple[Image, Tensor]:
        """An image, decoded, and the class of each of its pixels: uint8 "h w"."""
        import numpy as np

        values = torch.from_numpy(np.array(decoded(self.masks[place], mode=None)))
        return decoded(self.files[place]), self.table[values.long()]


def _check_enough(images: BoxedImages | MaskedImages, number: int) -> None:
    if not 0 < number <= len(images):
        raise ValueError(f"{number} images are asked of {images.name}, which has {len(images)}")


# Where they are found


def load_boxes(data: str | Path, root: str | Path = "data/cache") -> tuple[BoxedImages, BoxedImages]:
    """The training and the test images of "scenes", or of a folder as COCO's, as for `dbb.data.load`.

    A folder has `annotations/instances_NAME.json` and the images in `NAME/`, for a NAME that starts with "train" and
    one that starts with "val". Images without an object are not trained on.
    Raises ValueError where the data is missing, and says where to get it.
    """
    name, path = _place(data, root)
    train, test = (_boxed(name, path, split) for split in ("train", "val"))
    if train.classes != test.classes:
        raise ValueError(f"the annotation files in {path} name other classes for training and for testing")
    return train.only([number for number in train.ids if _has_objects(train.coco, number)]), test


def load_masks(data: str | Path, root: str | Path = "data/cache") -> tuple[MaskedImages, MaskedImages]:
    """The training and the test images of "scenes", or of a folder as Cityscapes', as for `dbb.data.load`.

    A folder has `leftImg8bit/` and `gtFine/`; or images in `train/` and `val/`, and under the same names in `masks/`
    pictures of the classes, which are those of the generated scenes.
    Raises ValueError where the data is missing, and says where to get it.
    """
    name, path = _place(data, root)
    read = _scenes if (path / "masks").is_dir() else _cityscapes
    return tuple(read(name, path, split) for split in ("train", "val"))


def _place(data: str | Path, root: str | Path) -> tuple[str, Path]:
    return ("scenes", find_scenes(root)) if data == "scenes" else find_folder(data, root)


def _boxed(name: str, path: Path, split: str) -> BoxedImages:
    from torchvision.datasets import CocoDetection

    found = sorted(path.glob(f"annotations/instances_{split}*.json"))
    folder = path / found[0].stem.removeprefix("instances_") if found else path
    if not found or not folder.is_dir():
        missing = folder if found else path / f"annotations/instances_{split}2017.json"
        raise ValueError(f"{missing} is not there: {GET_COCO}, and unpack all into {path}")
    with redirect_stdout(StringIO()):  # pycocotools tells how long it took
        dataset = CocoDetection(folder, found[0])
    categories = sorted(dataset.coco.cats)
    names = tuple(dataset.coco.cats[number]["name"] for number in categories)
    return BoxedImages(name, found[0], dataset, categories, names)


def _has_objects(coco: COCO, number: int) -> bool:
    return any(not entry.get("iscrowd") and min(entry["bbox"][2:]) >= 1 for entry in coco.imgToAnns[number])


def _cityscapes(name: str, path: Path, split: str) -> MaskedImages:
    from torchvision.datasets import Cityscapes

    try:
        found = Cityscapes(path, split, target_type="semantic")
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is no Cityscapes: {GET_CITYSCAPES}, and unpack both into it") from error
    pairs = sorted((Path(image), Path(mask)) for image, (mask,) in zip(found.images, found.targets))
    scored = sorted((c for c in Cityscapes.classes if not c.ignore_in_eval), key=lambda c: c.train_id)
    table = torch.full((256,), IGNORED, dtype=torch.uint8)
    for kind in scored:
        table[kind.id] = kind.train_id
    files, masks = zip(*pairs)
    return MaskedImages(name, path, files, masks, table, tuple(kind.name for kind in scored))


def _scenes(name: str, path: Path, split: str) -> MaskedImages:
    files = sorted((path / split).iterdir())
    masks = [path / "masks" / split / file.name for file in files]
    return MaskedImages(name, path, files, masks, torch.arange(256, dtype=torch.uint8), ("background", *CLASSES))


# Batches


class BoxedBatches(FileBatches):
    """Batches of `BoxedImages`, normalised, and for training shuffled and augmented.

    An epoch yields a list of images "3 h w", each of its own size, and a list of what is on them: boxes, labels and the
    image's id. augmentation: "none" or "flip"; other arguments as of `dbb.imagenet.FileBatches`
    """

    def prepare(self, augmentation: str, size: int) -> Callable:
        """What makes tensors out of an image and its objects."""
        return _Boxed(_chosen(augmentation, self.train, "none", "flip") == "flip")

    def collate(self, items: list) -> tuple[list[Tensor], list[dict], list[str]]:
        """Images, what is on them, and the paths of what was broken."""
        images, targets = zip(*items)
        return list(images), list(targets), [image for image in images if isinstance(image, str)]

    def on_device(self, images: list[Tensor], targets: list[dict]) -> tuple[list[Tensor], list[dict]]:
        """Both where the model is, the images normalised."""
        moved = [{key: _to(value, self.device) for key, value in target.items()} for target in targets]
        return [self.normalised(image) for image in images], moved


class MaskedBatches(FileBatches):
    """Batches of `MaskedImages`, normalised, and for training shuffled and augmented.

    An epoch yields images "n 3 h w" and the classes of their pixels, int64 "n h w". augmentation: "none", "flip", or
    "scale_crop_flip": another size, a crop of `size` pixels, mirrored or not; other arguments as of `FileBatches`
    """

    def prepare(self, augmentation: str, size: int) -> Callable:
        """What makes tensors out of an image and its mask."""
        return _Masked(_chosen(augmentation, self.train, "none", "flip", "scale_crop_flip"), size)


def _chosen(augmentation: str, train: bool, *known: str) -> str:
    if train and augmentation not in known:
        raise ValueError(f"augmentation={augmentation!r} is not for boxes or masks: use {', '.join(known)}")
    return augmentation if train else "none"


def _to(value, device: torch.device):
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class _Boxed:
    """Image and objects as tensors, mirrored by chance; boxes without an area are left out."""

    flip: bool

    def __call__(self, image: Image, target: dict) -> tuple[Tensor, dict]:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.size[::-1])
        steps = [v2.RandomHorizontalFlip()] if self.flip else []
        change = v2.Compose([*steps, v2.SanitizeBoundingBoxes(min_size=1), v2.ToPureTensor()])
        picture, changed = change(_as_numbers(image), target | {"boxes": boxes})
        return picture, changed


@dataclass(frozen=True)
class _Masked:
    """Image and mask as tensors, changed alike."""

    augmentation: str
    size: int

    def __call__(self, image: Image, mask: Tensor) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        fill = {tv_tensors.Image: 0.0, tv_tensors.Mask: IGNORED}
        crop = [_rescaled, v2.RandomCrop(self.size, pad_if_needed=True, fill=fill)]
        steps = crop if self.augmentation == "scale_crop_flip" else []
        steps = [*steps, v2.RandomHorizontalFlip()] if self.augmentation != "none" else steps
        picture, classes = _as_numbers(image), tv_tensors.Mask(mask)
        for step in [*steps, v2.ToPureTensor()]:
            picture, classes = step(picture, classes)
        return picture, classes.long()


def _rescaled(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both resized by one factor, drawn anew."""
    from torchvision.transforms.v2 import functional

    factor = SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(()).item()
    size = [max(1, round(factor * length)) for length in image.shape[-2:]]
    return functional.resize(image, size, antialias=True), functional.resize(mask, size)


def _as_numbers(image: Image) -> Tensor:
    """An image "3 h w", values 0 to 1, that torchvision's transforms take for one."""
    from torchvision.transforms import v2

    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])(image)
