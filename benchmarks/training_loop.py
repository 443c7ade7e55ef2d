"""How fast is our training loop, and how long does the model wait for data? Against a textbook loop, in one run.

    python benchmarks/training_loop.py --data cifar10_jpeg --device cuda --batches 100

Ours: `dbb.train.Trainer`, images in memory as uint8, augmented there a batch at a time. Textbook: a torchvision
`ImageFolder`, transforms on each image in worker processes, the usual dozen lines of training. The same network
(VGG-16, plain), batch, optimizer and precision; batches of both are interleaved, so that the textbook's workers may
decode while ours computes; medians are compared, ratios are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dbb.data import load
from dbb.models import build_model
from dbb.recipes import recipe
from dbb.train import Hardware, Trainer

Batch = tuple[torch.Tensor, torch.Tensor]


class Textbook:
    """What one writes after reading a tutorial."""

    def __init__(self, folder: Path, mean: torch.Tensor, std: torch.Tensor, batch_size: int, device: str, workers: int):
        prepare = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean.tolist(), std.tolist()),
            ]
        )
        options = {"num_workers": workers, "pin_memory": device != "cpu", "drop_last": True, "persistent_workers": True}
        self.device = device
        self.loader = DataLoader(ImageFolder(folder / "train", prepare), batch_size, shuffle=True, **options)
        self.model = build_model("vgg16", 10).to(device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def batches(self) -> Iterator[Batch]:
        """Batches without end."""
        while True:
            for images, labels in self.loader:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()


def ours(trainer: Trainer) -> Iterator[Batch]:
    """Batches without end."""
    epoch = 0
    while True:
        yield from trainer.batches.epoch(epoch)
        epoch += 1


def timed(batches: Iterator[Batch], step, device: str) -> tuple[float, float]:
    """Seconds of one turn: waiting for the batch, and all of it."""
    start = time.perf_counter()
    batch = next(batches)
    synchronise(device)
    waited = time.perf_counter() - start
    step(*batch)
    synchronise(device)
    return waited, time.perf_counter() - start


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--data", default="cifar10_jpeg", help="an image folder of 32x32 images, by name or path")
    ask.add_argument("--root", type=Path, default=Path("data/cache"))
    ask.add_argument("--device", default="cpu")
    ask.add_argument("--batches", type=int, default=8, help="measured, of each loop")
    ask.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="of the textbook loop")
    asked = ask.parse_args()

    chosen = recipe("cifar10_vgg16", data=asked.data)
    train, test = load(chosen.data, asked.root)
    trainer = Trainer(chosen, train, test, hardware=Hardware(asked.device))
    trainer.trained.train()
    folder = asked.root / asked.data if (asked.root / asked.data).exists() else Path(asked.data)
    textbook = Textbook(folder, *train.mean_and_std(), chosen.batch_size, asked.device, asked.workers)
    loops = {
        "ours": (ours(trainer), trainer._train_step),
        "textbook": (textbook.batches(), textbook.step),
    }
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for n in range(asked.batches + 2):
        for name, (batches, step) in loops.items():
            turn = timed(batches, step, asked.device)
            if n >= 2:  # the first ones warm up
                turns[name].append(turn)
    report(turns, chosen.batch_size, asked.device)


def report(turns: dict[str, list[tuple[float, float]]], batch_size: int, device: str) -> None:
    """Print medians and their ratios."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(f"VGG-16, plain, batch {batch_size}, {name}; medians of {len(turns['ours'])} batches, interleaved")
    for loop, measured in turns.items():
        waited, whole = (statistics.median(column) for column in zip(*measured))
        share = sum(w for w, _ in measured) / sum(all_of_it for _, all_of_it in measured)
        print(f"{loop:<9} {batch_size / whole:8.1f} images/s   waits for data {1000 * waited:7.2f} ms, {share:.2%}")
    ratio = statistics.median(t for _, t in turns["textbook"]) / statistics.median(t for _, t in turns["ours"])
    print(f"ours is {ratio:.2f} times as fast as the textbook loop")


if __name__ == "__main__":
    main()
