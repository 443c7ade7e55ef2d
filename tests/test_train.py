"""Training: the data, the schedule, the groups of parameters, and runs that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from dbb import reparameterize
from dbb.checkpoint import load_model, save_model
from dbb.data import Batches, ImageSet, load, shifted
from dbb.recipes import RECIPES, recipe
from dbb.train import Hardware, Trainer, TrainingError, parameter_groups
from tests.conftest import ROOT

TINY = {"epochs": 2, "batch_size": 50, "train_images": 200, "model_options": {"width": 4}}


def pictures(number: int = 20, size: int = 8) -> ImageSet:
    images = torch.randint(256, (number, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet("noise", images, torch.arange(number) % 2, ("a", "b"))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([t.flatten().double() for t in model.state_dict().values()])


# Data


def test_digits_are_there_without_a_download():
    train, test = load("digits")
    assert (len(train), len(test), train.images.dtype, train.images.max()) == (1400, 397, torch.uint8, 255)


def test_normalised_by_mean_and_std():
    data = pictures()
    mean, std = data.mean_and_std()
    wanted = (data.images.double() / 255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), wanted.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), wanted.std(1, correction=0), rtol=1e-6, atol=0)
    (images, labels), *_ = Batches(data, 20, mean, std).epoch()
    assert torch.equal(labels, data.labels)
    assert images.mean((0, 2, 3)).abs().max() < 1e-5 and (images.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_shifted_is_a_crop_of_the_padded_image():
    images = pictures(2).images
    moved = shifted(images, torch.tensor([0, 8]), torch.tensor([4, 4]), reach=4)
    assert torch.equal(moved[0, :, 4:], images[0, :, :4]) and not moved[0, :, :4].any()
    assert torch.equal(moved[1, :, :4], images[1, :, 4:]) and not moved[1, :, 4:].any()


@pytest.mark.parametrize("augmentation", ["none", "shift", "crop_flip"])
def test_batches_depend_on_seed_epoch_and_step_alone(augmentation):
    def batches(seed=0, **rank):
        data = pictures()
        return Batches(data, 4, *data.mean_and_std(), train=True, augmentation=augmentation, seed=seed, **rank)

    whole = list(batches().epoch(3))
    for (x, y), (x_later, y_later) in zip(whole[2:], batches().epoch(3, start=2)):
        assert torch.equal(x, x_later) and torch.equal(y, y_later)
    for (x, _), (first, _), (second, _) in zip(
        whole, batches(rank=0, world=2).epoch(3), batches(rank=1, world=2).epoch(3)
    ):
        assert torch.equal(x[::2], first) and torch.equal(x[1::2], second)
    assert not torch.equal(whole[0][0], next(iter(batches(seed=1).epoch(3)))[0])
    assert not torch.equal(whole[0][0], next(iter(batches().epoch(4)))[0])
    assert torch.cat([y for _, y in whole]).bincount().tolist() == [10, 10]


def test_evaluation_shows_each_image_once():
    data = pictures(21)
    seen = [y for rank in range(2) for _, y in Batches(data, 4, *data.mean_and_std(), rank=rank, world=2).epoch()]
    assert torch.cat(seen).bincount().tolist() == data.labels.bincount().tolist()


def folder(root: Path, size: int = 8) -> Path:
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for n in range(3):
                Image.new("RGB", (size, size), (100 * number, n, 0)).save(root / split / name / f"{n}.png")
    return root


def test_an_image_folder(tmp_path):
    train, test = load(f"pets={folder(tmp_path)}")
    assert (train.name, train.classes, len(train), len(test)) == ("pets", ("cat", "dog"), 6, 6)
    assert train.images[3, :, 0, 0].tolist() == [100, 0, 0] and train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="is no image folder: it needs train/"):
        load(tmp_path / "nothing")
    good = folder(tmp_path / "broken")
    (good / "train/cat/1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 broken image files: .*train/cat/1\.png"):
        load(good)
    other = folder(tmp_path / "sizes")
    Image.new("RGB", (9, 8)).save(other / "train/dog/2.png")
    with pytest.raises(ValueError, match=r"one size are needed, and .*dog/2\.png"):
        load(other)


def test_as_many_of_each_class():
    part = pictures(21).first_of_each_class(10)
    assert part.labels.bincount().tolist() == [5, 5]
    with pytest.raises(ValueError, match="100 images, 50 a class"):
        pictures().first_of_each_class(100)


# Recipes and parameters


def test_every_recipe_is_complete():
    assert {"cifar10_vgg16", "cifar100_vgg16", "imagenet_resnet18", "imagenet_mobilenet"} <= set(RECIPES)
    assert all(name == r.name for name, r in RECIPES.items())


@pytest.mark.parametrize(
    "changes, message",
    [({"lr": 0}, "lr=0 must be above 0"), ({"momentun": 1}, "no 'momentun'"), ({"decay": "all"}, "decay='all'"),
     ({"warmup_epochs": 99}, "must be below")],
)  # fmt: skip
def test_bad_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("digits", **changes)


def test_parameter_groups():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Linear(4, 2))
    by_type = parameter_groups(model, recipe("digits"))
    assert {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in by_type} == {5e-4: 36 + 8, 0: 4 + 8 + 2}
    authors = parameter_groups(model, recipe("digits", decay="authors"))
    found = {(g["weight_decay"], g["lr_factor"]): sum(p.numel() for p in g["params"]) for g in authors}
    assert found == {(0, 1): 36, (0, 2): 4, (5e-4, 1): 4 + 8, (5e-4, 2): 4 + 2}


def test_learning_rate_rises_then_falls_to_zero():
    trainer = Trainer(recipe("digits", **TINY | {"epochs": 5}, warmup_epochs=1), *load("digits"))
    per_epoch = len(trainer.batches)
    rates = [trainer.learning_rate(step) for step in range(5 * per_epoch + 1)]
    assert rates[per_epoch - 1] == rates[per_epoch] == max(rates) == 0.1 and rates[-1] < 1e-12
    assert abs(rates[3 * per_epoch] - 0.05) < 1e-12 and rates[0] == 0.1 / per_epoch


# Runs


def test_it_learns_and_both_forms_agree(tmp_path):
    said = []
    trainer = Trainer(recipe("digits", block="dbb", epochs=3), *load("digits"), folder=tmp_path, say=said.append)
    model = trainer.run()
    assert [line["epoch"] for line in said] == [1, 2, 3] and said[-1]["test_accuracy"] > 0.85
    folded = reparameterize(model)
    assert trainer.evaluate(folded)[0] == trainer.evaluate(model)[0] == said[-1]["test_accuracy"]
    for form in (model, folded):
        save_model(tmp_path / "model.safetensors", form, trainer.recipe, trainer.train_images.classes)
        again, about = load_model(tmp_path / "model.safetensors")
        assert about["form"] == ("training" if form is model else "folded")
        assert trainer.evaluate(again)[0] == said[-1]["test_accuracy"]


def test_in_pieces_it_is_the_same_step():
    whole, pieces = (
        Trainer(recipe("digits", **TINY | {"epochs": 1}), *load("digits"), hardware=Hardware(accumulate=n))
        for n in (1, 2)
    )
    for trainer in (whole, pieces):
        for norm in (m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.forward = lambda x: x  # a norm sees another batch where the batch comes in pieces
        trainer.run()
    torch.testing.assert_close(weights(whole.model), weights(pieces.model), rtol=1e-4, atol=1e-6)


def test_options_run(tmp_path):
    options = {"ema": 0.9, "label_smoothing": 0.1, "nesterov": True, "decay": "authors"}
    trainer = Trainer(recipe("digits", **TINY, **options), *load("digits"), tmp_path, Hardware(channels_last=True))
    assert trainer.run() is trainer.average.module
    again = Trainer(recipe("digits", **TINY, **options), *load("digits"), tmp_path)
    assert torch.equal(weights(again.run()), weights(trainer.best_model))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_was_saved(tmp_path):
    good = Trainer(recipe("digits", **TINY), *load("digits"), tmp_path)
    good._save()
    kept = (tmp_path / "resume.pt").read_bytes()
    bad = Trainer(recipe("digits", **TINY), *load("digits"), tmp_path)
    bad.model[0].branches["kxk"].conv.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"lower lr=0\.1"):
        bad.run()
    assert (tmp_path / "resume.pt").read_bytes() == kept


def test_another_run_in_the_folder_is_refused(tmp_path):
    Trainer(recipe("digits", **TINY), *load("digits"), tmp_path)._save()
    with pytest.raises(ValueError, match=r"is of another run, with block='plain'"):
        Trainer(recipe("digits", block="dbb", **TINY), *load("digits"), tmp_path)
    (tmp_path / "resume.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="remove it to start anew"):
        Trainer(recipe("digits", **TINY), *load("digits"), tmp_path)


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device='cuda:99' cannot be used"):
        Hardware(device="cuda:99")


CHILD = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from dbb.data import load
from dbb.recipes import recipe
from dbb.train import Hardware, Trainer, TrainingStoppedError
TINY = {tiny!r}
hardware = Hardware(save_seconds=0.0)  # after every step
trainer = Trainer(recipe("digits", block="dbb", **TINY), *load("digits"), Path(sys.argv[1]), hardware)
print("ready", flush=True)
try:
    trainer.run()
except TrainingStoppedError as stopped:
    sys.exit(str(stopped))
torch.save(trainer.model.state_dict(), Path(sys.argv[1]) / "end.pt")
"""


def start(folder: Path, **settings) -> subprocess.Popen:
    code = CHILD.format(tiny=TINY | {"epochs": 4} | settings)
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = start(folder)
    assert run.wait(300) == 0, run.stderr.read()
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path, undisturbed, kill):
    run = start(tmp_path)
    assert run.stdout.readline() == "ready\n"
    while not (tmp_path / "resume.pt").exists():
        time.sleep(0.001)
    time.sleep(0.05)
    run.send_signal(kill)
    assert run.wait(300) != 0 and not (tmp_path / "end.pt").exists()
    assert (kill == signal.SIGKILL) or "stopped in epoch" in run.stderr.read()
    again = start(tmp_path)
    assert again.wait(300) == 0, again.stderr.read()
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert end.keys() == undisturbed.keys() and all(torch.equal(end[name], undisturbed[name]) for name in end)
