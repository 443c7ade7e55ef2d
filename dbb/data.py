"""Data sets, and batches of those that fit into memory (see `dbb.imagenet` for those that do not).

Small sets live in memory as uint8, on the device, and are augmented there, a batch at a time. What is drawn at random
follows from (seed, epoch, step) alone, so a run that was interrupted goes on as if it never had been, and two processes
draw what one would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dbb.imagenet import ImageFiles
from dbb.sampling import check_batches, evenly, generator, order_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TEST_FOLDERS = ("test", "val")
REACH = {"none": 0, "shift": 1, "crop_flip": 4}  # pixels to each side by which an augmentation moves an image
DIGITS_FOR_TRAINING = 1400  # of 1797, in their order: the rest was written by other people


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images in memory.

    images: uint8 "n c h w"; labels: int64 "n"; classes: their names; name: what to call the data in a record
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same on that device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def first_of_each_class(self, number: int) -> ImageSet:
        """`number` images in all, as many of each class, the first ones. Raises ValueError where there are too few."""
        kept = evenly(self, number)
        return replace(self, images=self.images[kept], labels=self.labels[kept])

    def fingerprint(self) -> str:
        """SHA-256 of images and labels."""
        content = hashlib.sha256(self.images.cpu().contiguous().numpy().tobytes())
        content.update(self.labels.cpu().numpy().tobytes())
        return content.hexdigest()

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of each channel, values 0 to 1."""
        pixels = self.images.transpose(0, 1).flatten(1)
        values = torch.arange(256, dtype=torch.float64, device=pixels.device) / 255
        counts = torch.stack([torch.bincount(channel, minlength=256) for channel in pixels]).double()
        mean = counts @ values / pixels.shape[1]
        return mean.float(), (counts @ values.square() / pixels.shape[1] - mean.square()).sqrt().float()

    def batches(self, batch_size: int, device: str = "cpu", size: int = 0, workers: int = 0, **options) -> Batches:
        """`Batches` of it on that device; `size` and `workers` are for images that are not in memory."""
        return Batches(self.to(device), batch_size, **options)


Images = ImageSet | ImageFiles


def load(data: str | Path, root: str | Path = "data/cache", streamed: bool = False) -> tuple[Images, Images]:
    """The training and the test images of "digits", "cifar10", "cifar100", or of an image folder.

    data: of a folder its path, "NAME=PATH", or its name where it lies in `root`, as "imagenet" does
    root: where torchvision keeps (or puts) its downloads, and where folders are looked for
    streamed: leave the images of a folder on disk, see `dbb.imagenet`

    A folder has `train/CLASS/*.jpg` and `test/` or `val/` alike.
    Raises ValueError where the data is missing or broken, and says what to do.
    """
    if data == "digits":
        return _digits()
    if data in ("cifar10", "cifar100"):
        return _cifar(data, Path(root))
    return _folder(*find_folder(data, root), streamed)


def find_folder(data: str | Path, root: str | Path) -> tuple[str, Path]:
    """The name and the path of a folder of data: given as its path, as "NAME=PATH", or as its name in `root`."""
    name, _, place = str(data).rpartition("=")
    path = Path(place).expanduser()
    if path.name == place and not path.exists():
        path = Path(root) / place
    return name or path.name, path


@lru_cache(maxsize=1)
def _digits() -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (torch.tensor(found.images, dtype=torch.float32)[:, None] * 255 / 16).round().to(torch.uint8)
    labels, classes = torch.tensor(found.target), tuple(map(str, found.target_names))
    parts = slice(None, DIGITS_FOR_TRAINING), slice(DIGITS_FOR_TRAINING, None)
    return tuple(ImageSet("digits", images[part], labels[part], classes) for part in parts)


@lru_cache(maxsize=2)
def _cifar(name: str, root: Path) -> tuple[ImageSet, ImageSet]:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        sets = [kind(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} is neither in {root} nor could it be downloaded ({error}): get {kind.filename} from {kind.url}, "
            f"put it into {root}, or give an image folder with --data PATH"
        ) from error
    return tuple(
        ImageSet(name, torch.tensor(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets), tuple(s.classes))
        for s in sets
    )


@lru_cache(maxsize=2)
def _folder(name: str, path: Path, streamed: bool) -> tuple[Images, Images]:
    tests = [path / test for test in TEST_FOLDERS if (path / test).is_dir()]
    if not (path / "train").is_dir() or not tests:
        raise ValueError(
            f"{path} is no image folder: it needs train/ and test/ (or val/), each with a folder of images a class"
        )
    classes = _classes(path / "train")
    if _classes(tests[0]) != classes:
        raise ValueError(f"{tests[0]} and {path / 'train'} have other classes: make them the same")
    read = _listed if streamed else _decoded
    return tuple(read(name, folder, classes) for folder in (path / "train", tests[0]))


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(child.name for child in folder.iterdir() if child.is_dir()))


def _listed(name: str, folder: Path, classes: tuple[str, ...]) -> ImageFiles:
    """The image files of a folder, with the number of their class."""
    files = [
        (file, label)
        for label, of_class in enumerate(classes)
        for file in sorted((folder / of_class).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    paths, labels = zip(*files)
    return ImageFiles(name, folder, paths, torch.tensor(labels), classes)


def _decoded(name: str, folder: Path, classes: tuple[str, ...]) -> ImageSet:
    """Read all images of a folder into memory; names those that are broken or of another size."""
    listed = _listed(name, folder, classes)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_decode, listed.files, chunksize=256))
    broken = [str(file) for file, image in zip(listed.files, images) if image is None]
    if broken:
        raise ValueError(f"{len(broken)} broken image files: {', '.join(broken[:5])}: mend or remove them")
    odd = [str(file) for file, image in zip(listed.files, images) if image.shape != images[0].shape]
    if odd:
        raise ValueError(
            f"images of one size are needed, and {odd[0]} is not {tuple(images[0].shape[1:])} as {listed.files[0]}: "
            f"resize them, or use an augmentation that does (imagenet)"
        )
    return ImageSet(name, torch.stack(images), listed.labels, classes)


def _decode(file: Path) -> Tensor | None:
    """An image as uint8 "3 h w"; None where the file is broken."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError):
        return None


class Batches:
    """Batches of an `ImageSet`, normalised, and for training shuffled and augmented.

    mean, std: "c" each, of the training images, values 0 to 1
    augmentation: "none", "shift" (a pixel to each side) or "crop_flip" (4 pixels of padding, crop, mirror)
    rank, world: this process takes every `world`-th image of each batch, so that all together see what one would

    Training drops the last images where they do not fill a batch; evaluation shows each image once.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        *,
        train: bool = False,
        augmentation: str = "none",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_batches(data, batch_size, train, world)
        if augmentation not in REACH:
            raise ValueError(
                f"augmentation={augmentation!r} is for images on disk, {data.name} is in memory: use {', '.join(REACH)}"
            )
        self.data, self.batch_size, self.train, self.augmentation = data, batch_size, train, augmentation
        self.seed, self.rank, self.world = seed, rank, world
        self.scale = (1 / (255 * std)).to(data.images.device)[:, None, None]
        self.shift = (-mean / std).to(data.images.device)[:, None, None]

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.data) // self.batch_size if self.train else -(-len(self.data) // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images "n c h w" and labels "n" from batch `start` of that epoch on."""
        order = order_of(len(self.data), self.train, self.seed, epoch).to(self.data.images.device)
        for step in range(start, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            draws = self._draw(len(chosen), epoch, step)
            mine = slice(self.rank, None, self.world)
            yield (
                self._images(chosen[mine], {name: drawn[mine] for name, drawn in draws.items()}),
                self.data.labels[chosen[mine]],
            )

    def _draw(self, number: int, epoch: int, step: int) -> dict[str, Tensor]:
        """What augmentation leaves to chance, for the whole batch: from the seed, the epoch and the step alone."""
        reach = REACH[self.augmentation] if self.train else 0
        if not reach:
            return {}
        dice = generator(self.seed, epoch, step)
        drawn = {side: torch.randint(2 * reach + 1, (number,), generator=dice) for side in ("top", "left")}
        if self.augmentation == "crop_flip":
            drawn["mirror"] = torch.randint(2, (number,), generator=dice).bool()
        return {name: value.to(self.data.images.device) for name, value in drawn.items()}

    def _images(self, chosen: Tensor, draws: dict[str, Tensor]) -> Tensor:
        images = self.data.images[chosen]
        if draws:
            images = shifted(images, draws["top"], draws["left"], REACH[self.augmentation])
        if "mirror" in draws:
            images = torch.where(draws["mirror"][:, None, None, None], images.flip(3), images)
        return images * self.scale + self.shift


def shifted(images: Tensor, top: Tensor, left: Tensor, reach: int) -> Tensor:
    """Each image cropped out of itself with `reach` black pixels around, at its own (top, left)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (reach,) * 4)
    rows = (top[:, None] + torch.arange(height, device=top.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=left.device))[:, None, None, :]
    number = torch.arange(len(images), device=top.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=top.device)[None, :, None, None]
    return padded[number, channel, rows, columns]
