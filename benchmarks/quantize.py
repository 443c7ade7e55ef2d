"""What do few bits and fewer channels cost, and does a Diverse Branch Block make it dearer? Over seeds, as records.

    python benchmarks/quantize.py --list                               what there is to do, and what is done
    python benchmarks/quantize.py --budget 9m                          the next ones, on scikit-learn's digits
    python benchmarks/quantize.py --data digits_slow                   trained at a lower rate, "post" alone
    python benchmarks/quantize.py --data cifar10_jpeg --seeds 5        the small ResNet, where these images are
    python benchmarks/quantize.py --latency                            seconds in int8 and float; needs a C++ compiler

Each job is one network and one seed, and appends its records to `data/results/quantization.jsonl` when it is done, so a
stopped one begins anew and no other. Trained networks are kept in `build/runs`.

"bits": a trained network is folded and quantized by torchao, in each of six grids (8, 4, 3 bits, a scale for each
channel or one in all), activations in 8 bits: as it is ("post"), after finetuning the folded network ("finetuned") or
the folded network with norms behind its convolutions ("norms", the authors' remedy), and after training with rounded
kernels for some grids: those that the blocks fold to ("qat"), each branch's own ("qat_branches"), the folded ones
("qat_folded").
All finetuning has the same length and rate; the rate is the best for "qat" of those tried on two seeds at half the
width, and not far from the best for the others. At the recipe's rate of training, blocks learn the digits less well
than plain convolutions do; "digits_slow" trains both at a third of it, where they differ little, and quantizes them
as is.

"channels": trained from the start with proximal steps of the group lasso on merged channels or on those of the
branches, then folded and cut. "decay": weight decay on the blocks' kernels, the branches' own or the merged one.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor, nn

import dbb
from dbb.checkpoint import load_model
from dbb.data import ImageSet, load
from dbb.matrix import seconds as seconds_of
from dbb.models import build_model, input_shape
from dbb.prune import blocks, channel_sizes, decay_merged_, remove_channels, shrink_channels_
from dbb.quantize import Grid, convert_qat, crest, finetune, insert_norms, post_training, prepare_qat
from dbb.recipes import TrainingRecipe, recipe
from dbb.results import append, commit, hardware, read
from dbb.train import MODEL, Trainer, launch

RESULTS = "quantization.jsonl"
GRIDS = [Grid(bits, per_channel) for bits in (8, 4, 3) for per_channel in (True, False)]
TRAINED_GRIDS = [Grid(4, False), Grid(3, True), Grid(3, False)]
METHODS = ("post", "finetuned", "norms", "qat", "qat_folded", "qat_branches")
RATE, BATCH = 0.003, 64
LASSO = (0.3, 0.5, 0.7)
DECAY = (0.005, 0.05)
CALIBRATION = 512  # images


@dataclass(frozen=True)
class Setting:
    """A data set, the recipe for it, and how much of both is used."""

    recipe: TrainingRecipe
    epochs: int  # of finetuning
    tests: int | None = None  # images; None for all
    only: tuple[str, ...] = ("bits", "channels", "decay")
    methods: tuple[str, ...] = METHODS  # of "bits"
    blocks: tuple[str, ...] = ("plain", "dbb")


SETTINGS = {
    "digits": Setting(recipe("digits", test_every=12), epochs=4),
    "digits_slow": Setting(recipe("digits", test_every=12, lr=0.03), epochs=0, only=("bits",), methods=("post",)),
    "cifar10_jpeg": Setting(
        recipe("cifar10_small", data="cifar10_jpeg", epochs=6, test_every=6), epochs=1, tests=2000, only=("bits",)
    ),
}


@dataclass(frozen=True)
class Images:
    """The images of a setting, in memory as the network sees them."""

    train: ImageSet
    calibration: Tensor
    tests: Tensor
    labels: Tensor

    @classmethod
    def of(cls, setting: Setting, root: Path) -> Images:
        train, test = load(setting.recipe.data, root)
        train = train.first_of_each_class(setting.recipe.train_images) if setting.recipe.train_images else train
        test = test.first_of_each_class(setting.tests) if setting.tests else test
        mean, std = train.mean_and_std()
        look = {"mean": mean, "std": std}
        some = train.first_of_each_class(min(CALIBRATION, len(train)) // len(train.classes) * len(train.classes))
        ((seen, _),) = some.batches(CALIBRATION, **look).epoch()
        ((images, labels),) = test.batches(len(test), **look).epoch()
        return cls(train, seen, images, labels)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(self.tests.split(500), self.labels.split(500))]
        return (sum(right) / len(self.labels)).item()


@dataclass(frozen=True)
class Job:
    """One network and one seed."""

    kind: str
    data: str
    block: str
    seed: int
    options: tuple = ()

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.data, self.kind, self.block, *self.options, self.seed)))

    @property
    def recipe(self) -> TrainingRecipe:
        return SETTINGS[self.data].recipe.with_changes(block=self.block, seed=self.seed)


def jobs_of(data: str, seeds: int) -> Iterator[Job]:
    """All jobs on some data, seed by seed, so that pairs are complete early."""
    setting = SETTINGS[data]
    for seed in range(seeds):
        for kind in setting.only:
            for block in setting.blocks if kind != "decay" else ("dbb",):
                yield from (Job(kind, data, block, seed, options) for options in options_of(kind, block))


def options_of(kind: str, block: str) -> list[tuple]:
    """What a kind of job is done with."""
    if kind == "bits":
        return [()]
    groups = ("merged", "branches") if block == "dbb" else ("merged",)  # one branch is the merged one
    return [(group, weight) for weight in (LASSO if kind == "channels" else DECAY) for group in groups]


# Bits


def bits(job: Job, images: Images, root: Path) -> Iterator[dict]:
    """A trained network in every grid, by every method of its setting."""
    trained, setting = trained_network(job, root), SETTINGS[job.data]
    folded = dbb.reparameterize(trained).requires_grad_()
    before, tune = images.accuracy(folded), partial(finetuned, images=images, recipe=job.recipe, epochs=setting.epochs)
    networks = {
        "post": lambda: folded,
        "finetuned": lambda: tune(copy.deepcopy(folded)),
        "norms": lambda: dbb.reparameterize(tune(insert_norms(folded, images.calibration))),
    }
    for method in (method for method in networks if method in setting.methods):
        network = networks[method]()
        about = {"method": method, "before": before, "crest": crests(network)}
        for grid in GRIDS:
            rounded = images.accuracy(prepare_qat(network, grid).eval())
            yield about | quantized(network, grid, images) | {"trained_form": rounded}
    ways = {"qat": (trained, "equivalent"), "qat_folded": (folded, "equivalent")}
    ways |= {"qat_branches": (trained, "branches")} if job.block != "plain" else {}
    for method, grid in product((method for method in ways if method in setting.methods), TRAINED_GRIDS):
        model = tune(prepare_qat(ways[method][0], grid, ways[method][1]))
        about = {"method": method, "before": before, "trained_form": images.accuracy(model)}
        network = convert_qat(model)
        yield about | {"crest": crests(network)} | quantized(network, grid, images)


def quantized(folded: nn.Module, grid: Grid, images: Images) -> dict:
    """Accuracy of a folded network in float and, by torchao, in integers."""
    accuracy = images.accuracy(post_training(folded, images.calibration, grid))
    return {"bits": grid.bits, "per_channel": grid.per_channel, "float": images.accuracy(folded), "accuracy": accuracy}


def trained_network(job: Job, root: Path) -> nn.Module:
    """The trained network of a job, in eval mode; trained now where it is not kept."""
    folder = Path("build/runs") / f"quantize-{job.data}-{job.block}-{job.seed}"
    launch(job.recipe, folder, root=root)
    return load_model(folder / MODEL)[0].eval()


def finetuned(model: nn.Module, images: Images, recipe: TrainingRecipe, epochs: int) -> nn.Module:
    """The model after some epochs of `finetune`."""
    mean, std = images.train.mean_and_std()
    look = {"mean": mean, "std": std, "train": True, "augmentation": recipe.augmentation, "seed": recipe.seed + 1000}
    batches = images.train.batches(BATCH, **look)
    finetune(model, batches, epochs * len(batches), RATE)
    return model


def crests(model: nn.Module) -> dict[str, list[float]]:
    """The crest of each convolution, for the whole and as a mean of channels."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return {
        name: [crest(w, name == "per_channel").mean().item() for w in weights] for name in ("per_tensor", "per_channel")
    }


# Channels, and decay


def channels(job: Job, images: Images, root: Path) -> Iterator[dict]:
    """Trained with proximal steps, folded, cut."""
    group, weight = job.options
    model = trained_with(job, images, lambda model, lr: shrink_channels_(model, weight * lr, group))
    folded = dbb.reparameterize(model)
    cut = remove_channels(folded)
    dbb.assert_equivalent(folded, cut, images.tests[:100])
    cost = dbb.cost(cut, images.tests[:1]).folded
    found = [channel_sizes(block.equivalent()) == 0 for block in blocks(model)]
    apart = [channel_sizes(branch) == 0 for block in blocks(model) for branch in block.branches.fold_branches()]
    yield {
        "group": group,
        "weight": weight,
        "float": images.accuracy(folded),
        "accuracy": images.accuracy(cut),
        "channels": [layer.out_channels for layer in cut if isinstance(layer, nn.Conv2d)],
        "zero_merged": torch.cat(found).double().mean().item(),
        "zero_branches": torch.cat(apart).double().mean().item(),
        "macs": cost.macs,
        "parameters": cost.parameters,
        "whole": {"macs": dbb.cost(folded, images.tests[:1]).folded.macs},
    }


def decay(job: Job, images: Images, root: Path) -> Iterator[dict]:
    """Trained with weight decay on the merged kernels or the branches', in no other layer, then quantized."""
    group, weight = job.options
    step = decay_merged_ if group == "merged" else decay_branches_
    model = trained_with(job, images, lambda model, lr: step(model, weight * lr), weight_decay=0.0)
    folded = dbb.reparameterize(model)
    about = {"group": group, "weight": weight, "before": images.accuracy(folded), "crest": crests(folded)}
    sizes = [block.equivalent().weight.square().sum().item() ** 0.5 for block in blocks(model)]
    for grid in GRIDS:
        yield about | {"sizes": sizes} | quantized(folded, grid, images)


def trained_with(job: Job, images: Images, step: Callable[[nn.Module, float], None], **changes) -> nn.Module:
    """Train by the recipe, with another step after each of the optimizer."""
    trainer = Trainer(job.recipe.with_changes(**changes), *load(job.recipe.data))
    trainer.tick = lambda: step(trainer.model, trainer.learning_rate(steps_done(trainer) - 1))
    return trainer.run()


def steps_done(trainer: Trainer) -> int:
    return trainer.state.epoch * len(trainer.batches) + trainer.state.step


@torch.no_grad()
def decay_branches_(model: nn.Module, rate: float) -> None:
    for block in blocks(model):
        for kernel in (p for p in block.branches.parameters() if p.dim() > 1):
            kernel.mul_(1 - rate)


KINDS = {"bits": bits, "channels": channels, "decay": decay}


# Latency

NETWORKS = {"digits_net": 64, "small_resnet": 64, "vgg16": 16, "resnet18": 1}  # and how many images at once


def latency(name: str, batch: int, rounds: int) -> Iterator[dict]:
    """A folded network in float and in int8: seconds of a forward pass, in eager mode and compiled."""
    torch.manual_seed(0)
    options = {"others": "plain"} if name == "resnet18" else {}
    model = dbb.reparameterize(dbb.randomize_norms_(build_model(name, 10, "dbb", **options)).eval())
    x = torch.randn(batch, *input_shape(name))
    integers = post_training(model, x)
    forms = {
        ("float", "eager"): model,
        ("float", "compiled"): compiled(model, x),
        ("int8", "compiled"): compiled(integers, x),
    }
    found = timed(forms, x, rounds)
    for (form, way), seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, found["float", "compiled"]))
        facts = {"rounds": rounds, "threads": torch.get_num_threads(), "clock": "processor"}
        yield {
            "network": name, "batch": batch, "form": form, "way": way,
            "seconds": statistics.median(seconds), "ratio": ratio, "bytes": weight_bytes(form, model), **facts,
        }  # fmt: skip


@torch.no_grad()
def compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Compiled for inference on `x`, the weights as constants, which is when torchao's passes make integers of them."""
    run = torch.compile(model)
    with torch._inductor.config.patch(freezing=True):
        run(x)
    return run


@torch.no_grad()
def timed(forms: dict, x: Tensor, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of this process, by round; a round runs every form."""
    for form in forms.values():
        form(x), form(x)  # allocates
    found = {key: [] for key in forms}
    for _ in range(rounds):
        for key, form in forms.items():
            start = time.process_time()
            form(x)
            found[key].append(time.process_time() - start)
    return found


def weight_bytes(form: str, model: nn.Module) -> int:
    """What the weights take: a byte each in int8, with a scale for each channel; biases stay float."""
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    biases = sum(4 * len(w) for w in weights)
    return biases + sum(4 * w.numel() if form == "float" else w.numel() + 4 * len(w) for w in weights)


# The command


def facts() -> dict:
    import torchao

    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchao": torchao.__version__}
    return {"hardware": hardware("cpu"), "versions": versions | {"dbb": dbb.__version__}, "commit": commit()}


def do(job: Job, images: Images, results: Path, root: Path) -> None:
    started = time.perf_counter()
    found = list(KINDS[job.kind](job, images, root))
    about = {"job": job.name, "kind": job.kind, "block": job.block, "seed": job.seed, "recipe": job.recipe.as_dict()}
    about |= {"data": {"name": images.train.name, "train": images.train.fingerprint()}, **facts()}
    for record in found:
        append(results, record | about, RESULTS)
    print(f"{job.name}: {len(found)} records, {time.perf_counter() - started:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the jobs and which are done, run nothing")
    parser.add_argument("--latency", action="store_true", help="time int8 against float, instead of the jobs")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="of --latency")
    parser.add_argument("--rounds", type=int, default=30, help="of --latency")
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--select", default="", metavar="TEXT", help="only jobs with this in their name")
    parser.add_argument("--budget", default="24h", metavar="TIME", help="begin no job after 90s, 9m or 2h")
    parser.add_argument("--results", type=Path, default=Path("data/results"), metavar="FOLDER")
    parser.add_argument("--root", type=Path, default=Path("data/cache"), help="where the images are")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # small tensors
    if options.latency:
        for name in options.networks:
            for record in latency(name, NETWORKS[name], options.rounds):
                print({key: record[key] for key in ("network", "form", "way", "seconds", "ratio")}, flush=True)
                append(options.results, {"kind": "latency"} | record | facts(), RESULTS)
        return
    done = {record.get("job") for record in read(options.results, RESULTS)}
    waiting = [job for job in jobs_of(options.data, options.seeds) if options.select in job.name]
    if options.list:
        print("\n".join(f"{job.name:<40} {'done' if job.name in done else 'pending'}" for job in waiting))
        return
    images, deadline = Images.of(SETTINGS[options.data], options.root), time.monotonic() + seconds_of(options.budget)
    for job in waiting:
        if job.name not in done and time.monotonic() < deadline:
            do(job, images, options.results, options.root)


if __name__ == "__main__":
    main()
