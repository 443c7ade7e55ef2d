"""Images that stay on disk, as ImageNet's must: decoded and augmented by worker processes while the model trains.

As in `dbb.data`, what is drawn at random follows from (seed, epoch, step) and an image's place in the batch alone, so
the number of workers, an interruption or a second machine changes nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dbb.sampling import check_batches, evenly, generator, order_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Of ImageNet's training images, values 0 to 1; the eigenvalues and eigenvectors of their colours are those of AlexNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
MOST_WORKERS = 8


class OnDisk:
    """Images that are too many to be measured: what all kinds of them share."""

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Those of ImageNet, whatever the images are: what everybody trains and publishes with."""
        return torch.tensor(MEAN), torch.tensor(STD)


@dataclass(frozen=True, eq=False)
class ImageFiles(OnDisk):
    """Labelled images on disk.

    name: what to call the data in a record; folder: what the `files` lie in
    labels: int64 "n"; classes: their names
    """

    name: str
    folder: Path
    files: Sequence[Path]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def first_of_each_class(self, number: int) -> ImageFiles:
        """`number` images in all, as many of each class, the first ones. Raises ValueError where there are too few."""
        kept = evenly(self, number)
        return replace(self, files=[self.files[place] for place in kept], labels=self.labels[kept])

    def read(self, place: int) -> tuple[Image, Tensor]:
        """An image, decoded, and its label."""
        return decoded(self.files[place]), self.labels[place]

    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of the files; their content would take an hour to read."""
        return fingerprint_of(self.files, self.folder)

    def batches(
        self, batch_size: int, device: str = "cpu", size: int = 224, workers: int = 0, **options
    ) -> FileBatches:
        """`FileBatches` of it."""
        return FileBatches(self, batch_size, device=device, size=size, workers=workers, **options)


def decoded(file: Path, mode: str | None = "RGB") -> Image:
    """The image in a file, in that mode; None for the file's own."""
    from PIL import Image

    with Image.open(file) as image:
        return image.copy() if mode is None else image.convert(mode)


def fingerprint_of(files: Sequence[Path], folder: Path) -> str:
    """SHA-256 of the names, within `folder`, and the sizes of files."""
    lines = [f"{file.relative_to(folder).as_posix()} {file.stat().st_size}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class FileBatches:
    """Batches of `ImageFiles`, cropped to `size`, normalised, and for training shuffled and augmented.

    augmentation: "imagenet" (random crop and mirror) or "imagenet_strong" (colours and lighting, too); other arguments
        as in `dbb.data.Batches`
    workers: processes that decode; 0 for none but this one, below 0 for one a core

    Raises ValueError, while it runs, for a file that cannot be decoded.
    """

    def __init__(
        self,
        data: ImageFiles,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        *,
        train: bool = False,
        augmentation: str = "imagenet",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str = "cpu",
        size: int = 224,
        workers: int = 0,
    ) -> None:
        check_batches(data, batch_size, train, world)
        self.data, self.batch_size, self.train, self.seed = data, batch_size, train, seed
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.workers = min(MOST_WORKERS, os.cpu_count() or 1) if workers < 0 else workers
        self.decoded = _Decoded(data, self.prepare(augmentation, size))
        self.mean, self.std = (value.to(self.device)[:, None, None] for value in (mean, std))

    def prepare(self, augmentation: str, size: int) -> Callable:
        """What makes an input and a target out of what the data reads."""
        strong = augmentation == "imagenet_strong"
        return _Pictured(for_training(size, strong) if self.train else for_testing(size))

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.data) // self.batch_size if self.train else -(-len(self.data) // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images "n 3 size size" and labels "n" from batch `start` of that epoch on."""
        order = order_of(len(self.data), self.train, self.seed, epoch).tolist()
        wanted = []
        for step in range(start, len(self)):
            places = range(step * self.batch_size, min(len(order), (step + 1) * self.batch_size))
            mine = places[self.rank :: self.world]
            wanted.append([(order[place], (self.seed, epoch, place)) for place in mine])
        loader = DataLoader(
            self.decoded,
            batch_sampler=wanted,
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=self.device.type == "cuda",
            generator=generator(self.seed, epoch),  # else it draws from the numbers of the model
        )
        for images, targets, broken in loader:
            if broken:
                raise ValueError(f"{len(broken)} broken image files: {', '.join(broken[:5])}: mend or remove them")
            yield self.on_device(images, targets)

    def collate(self, items: list[tuple[Tensor | str, Tensor]]) -> tuple[Tensor, Tensor, list[str]]:
        """Images, targets, and the paths of what was broken: an error raised in a worker would bury them."""
        images, targets = zip(*items)
        broken = [image for image in images if isinstance(image, str)]
        if broken:
            return torch.empty(0), torch.empty(0), broken
        return torch.stack(images), torch.stack(targets), []

    def on_device(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Both where the model is, the images normalised."""
        return self.normalised(images), targets.to(self.device, non_blocking=True)

    def normalised(self, images: Tensor) -> Tensor:
        """Images, or one, by the mean and the standard deviation of their channels."""
        return (images.to(self.device, non_blocking=True) - self.mean) / self.std


class Lighting(torch.nn.Module):
    """Add a random multiple of each principal component of ImageNet's colours: AlexNet's augmentation.

    Input and output "3 h w", values 0 to 1; `strength` is the standard deviation of the multiples.
    """

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, image: Tensor) -> Tensor:
        """Shift the colours of one image."""
        multiples = self.strength * torch.randn(3) * torch.tensor(EIGENVALUES)
        return image + (torch.tensor(EIGENVECTORS) @ multiples)[:, None, None]


def for_training(size: int, strong: bool) -> Callable:
    """An image as a random crop "3 size size", values 0 to 1.

    strong: the augmentation of the paper's ResNets (section 4.2): brightness, saturation and hue as the authors' code
    jitters them, without contrast, and lighting
    """
    from torchvision.transforms import v2

    colours = [v2.ColorJitter(brightness=0.4, saturation=0.4, hue=0.4)] if strong else []
    lighting = [Lighting()] if strong else []
    as_numbers = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *colours, *as_numbers, *lighting])


def for_testing(size: int) -> Callable:
    """An image as its middle "3 size size", values 0 to 1: of 224 the middle of 256, and so in proportion."""
    from torchvision.transforms import v2

    as_numbers = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), *as_numbers])


@dataclass(frozen=True)
class _Pictured:
    """Changes an image and leaves its label; a class, as workers may have to be sent it."""

    change: Callable

    def __call__(self, image: Image, label: Tensor) -> tuple[Tensor, Tensor]:
        return self.change(image), label


class _Decoded(Dataset):
    """Item (place, numbers) is image number `place`, augmented as `numbers` say; a path where the file is broken."""

    def __init__(self, data: ImageFiles, prepare: Callable) -> None:
        self.data, self.prepare = data, prepare

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> tuple[Tensor | str, Tensor]:
        """Decode and augment one image."""
        place, numbers = item
        try:
            image, target = self.data.read(place)
        except (OSError, SyntaxError):
            return str(self.data.files[place]), torch.empty(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(*numbers).initial_seed())
            return self.prepare(image, target)
