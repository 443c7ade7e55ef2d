"""Which images, in which order: one answer for all kinds of data, from numbers that a run can be resumed with."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def evenly(images, number: int) -> Tensor:
    """The places of the first images of each class, `number` in all. Raises ValueError where there are too few."""
    share = number // len(images.classes)
    places = [(images.labels == label).nonzero()[:share, 0] for label in range(len(images.classes))]
    if share == 0 or min(map(len, places)) < share:
        raise ValueError(f"{number} images, {share} a class, are asked of {images.name}, which has {len(images)}")
    return torch.cat(places).sort().values


def check_batches(data, batch_size: int, train: bool, world: int) -> None:
    """Refuse a size that leaves no batch, or that processes cannot share."""
    if train and len(data) < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {len(data)} images of {data.name}: make it less")
    if batch_size % world:
        raise ValueError(f"batch_size={batch_size} must be divisible by the number of processes, {world}")


def order_of(number: int, train: bool, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch shows the images."""
    return torch.randperm(number, generator=generator(seed, epoch)) if train else torch.arange(number)


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that depend on all of `numbers`, and on nothing else."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
