"""Training: the data, the schedule, the groups of parameters, and runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dbb import reparameterize
from dbb.checkpoint import load_model, save_model
from dbb.cli import main
from dbb.data import Batches, ImageSet, load, shifted
from dbb.imagenet import Lighting, for_training
from dbb.models import build_model
from dbb.recipes import RECIPES, recipe
from dbb.train import Hardware, Trainer, TrainingError, launch, parameter_groups, score
from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # training runs, killed and resumed

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


# Images that stay on disk


def photographs(root: Path) -> Path:
    """Two classes of photographs, larger and smaller than what is cropped."""
    from sklearn.datasets import load_sample_image

    for split, number in (("train", 6), ("val", 3)):
        for name in ("china", "flower"):
            (root / split / name).mkdir(parents=True)
            image = Image.fromarray(load_sample_image(f"{name}.jpg"))
            for n in range(number):
                side = 60 + 10 * n
                image.crop((30 * n, 20 * n, 30 * n + side, 20 * n + 60)).save(root / split / name / f"{n}.jpg")
    return root


@pytest.mark.parametrize("augmentation", ["imagenet", "imagenet_strong"])
def test_streamed_batches_depend_on_seed_epoch_and_step_alone(tmp_path, augmentation):
    train, _ = load(photographs(tmp_path), streamed=True)

    def batches(seed=0, workers=0, **rank):
        options = {"train": True, "augmentation": augmentation, "seed": seed, "size": 32, "workers": workers}
        return train.batches(4, mean=torch.zeros(3), std=torch.ones(3), **options, **rank)

    before = torch.get_rng_state()
    whole = list(batches().epoch(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert [x.shape for x, _ in whole] == [(4, 3, 32, 32)] * 3
    later = list(batches(workers=2).epoch(2, start=1))
    for (x, y), (x_later, y_later) in zip(whole[1:], later, strict=True):
        assert torch.equal(x, x_later) and torch.equal(y, y_later)
    halves = zip(batches(rank=0, world=2).epoch(2), batches(rank=1, world=2).epoch(2))
    for (x, _), ((first, _), (second, _)) in zip(whole, halves, strict=True):
        assert torch.equal(x[::2], first) and torch.equal(x[1::2], second)
    assert not torch.equal(whole[0][0], next(batches(seed=1).epoch(2))[0])
    assert not torch.equal(whole[0][0], next(batches().epoch(3))[0])


def test_strong_augmentation_changes_colours():
    torch.manual_seed(0)
    grey = Image.new("RGB", (80, 80), (120, 130, 140))
    standard, strong = (for_training(32, strong)(grey) for strong in (False, True))
    torch.testing.assert_close(standard, torch.tensor([120, 130, 140])[:, None, None].expand(3, 32, 32) / 255)
    assert (strong - standard).abs().max() > 0.01
    shifts = torch.stack([Lighting()(torch.zeros(3, 1, 1))[:, 0, 0] for _ in range(4000)])
    assert (shifts.std(0) - shifts.std(0).mean()).abs().max() < 0.003  # AlexNet's first component is nearly grey
    assert 0.010 < shifts.std(0).mean() < 0.015


def test_streamed_evaluation_shows_the_middle_of_each_image_once(tmp_path):
    _, test = load(photographs(tmp_path), streamed=True)
    batches = test.batches(4, mean=torch.zeros(3), std=torch.ones(3), size=28)
    seen = list(batches.epoch())
    assert torch.cat([y for _, y in seen]).tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(test.files[0]) as image:
        wanted = torch.tensor(np.array(image.convert("RGB").resize((32, 32))))[2:30, 2:30]
    assert (seen[0][0][0].permute(1, 2, 0) * 255 - wanted).abs().mean() < 8  # two ways of resizing


def test_a_broken_file_on_disk_is_named_while_it_runs(tmp_path):
    (photographs(tmp_path) / "train/china/3.jpg").write_bytes(b"no image")
    train, _ = load(tmp_path, streamed=True)
    batches = train.batches(4, train=True, mean=torch.zeros(3), std=torch.ones(3), size=32, workers=2)
    with pytest.raises(ValueError, match=r"^1 broken image files: .*china/3\.jpg: mend or remove them$"):
        list(batches.epoch())


def test_an_image_folder_is_trained_on_and_scored(tmp_path):
    small = {"model_options": {"width": 0.25}, "image_size": 32, "batch_size": 4, "epochs": 1, "block": "dbb"}
    root = tmp_path / "cache"
    photographs(root / "imagenet")
    line = launch(recipe("imagenet_mobilenet", **small), tmp_path / "run", Hardware(workers=0), root)
    assert line["data"]["name"] == "imagenet" and line["images"] == {"train": 12, "test": 6}
    scores = score(tmp_path / "run/model.safetensors", root=root, hardware=Hardware(workers=0))
    assert scores == {"training": line["test_accuracy"], "folded": line["test_accuracy"]}
    with pytest.raises(ValueError, match=r"tells 2 classes apart \(china, flower, \.\.\.\), the data has 10"):
        score(tmp_path / "run/model.safetensors", data="digits")


def test_a_model_that_was_saved_by_hand_is_not_scored(tmp_path):
    small = recipe("digits", model_options={"width": 4})
    classes = tuple("0123456789")
    save_model(tmp_path / "by_hand.safetensors", build_model("digits_net", 10, width=4), small, classes)
    with pytest.raises(ValueError, match="does not say what its images were normalised by"):
        score(tmp_path / "by_hand.safetensors")


def test_augmentations_of_files_do_not_fit_images_in_memory():
    with pytest.raises(ValueError, match="is for images on disk, digits is in memory: use none, shift, crop_flip"):
        Trainer(recipe("digits", augmentation="imagenet"), *load("digits"))


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
     ({"warmup_epochs": 99}, "must be below"), ({"frozen_norms": True}, "a classifier has none"),
     ({"starts_from": "other.safetensors"}, "starts_from='other.safetensors'.*a classifier has none")],
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


@pytest.mark.parametrize(
    "error, message",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), r"out of memory on cpu with batch_size=50: raise accumulate=1"),
        (OSError(28, "No space left on device"), r"the state cannot be saved \(.*No space left"),
    ],
)
def test_what_ends_a_run_from_outside_is_explained(tmp_path, monkeypatch, error, message):
    good = Trainer(recipe("digits", **TINY), *load("digits"), tmp_path)
    good._save()
    kept = (tmp_path / "resume.pt").read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr("os.replace" if isinstance(error, OSError) else "torch.optim.SGD.step", fail)
    with pytest.raises(TrainingError, match=message):
        Trainer(recipe("digits", **TINY), *load("digits"), tmp_path).run()
    assert (tmp_path / "resume.pt").read_bytes() == kept and [p.name for p in tmp_path.iterdir()] == ["resume.pt"]


def test_tensorboard_gets_the_curves_or_is_asked_for(tmp_path, monkeypatch):
    written = []
    writer = SimpleNamespace(add_scalar=lambda *point: written.append(point), flush=lambda: None)
    fake = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    launch(recipe("digits", **TINY), tmp_path / "with", tensorboard=True)
    assert {(name, epoch) for name, _, epoch in written} >= {("train_loss", 1), ("test_accuracy", 2), ("lr", 2)}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard, or leave out"):
        launch(recipe("digits", **TINY), tmp_path / "without", tensorboard=True)


def test_a_short_run_leaves_no_trace_of_a_bar_in_a_notebook(tmp_path, capsys):
    """There standard error is no terminal, and what a bar clears stays as an empty strip under the cell."""
    launch(recipe("digits", **TINY), tmp_path)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    launch(recipe("digits", **TINY), tmp_path)
    assert "digits plain" in capsys.readouterr().err


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


# The commands


def test_the_commands_train_go_on_and_score(tmp_path, capsys):
    out = str(tmp_path / "run")
    call = ["train", "digits", "--block", "acb", "--epochs", "1", "--seed", "3", "--data", "digits", "--out", out]
    call += ["--set", "train_images=200", "--channels-last", "--accumulate", "2", "--workers", "0"]
    assert main([*call, "--results", str(tmp_path / "results")]) == 0
    first = capsys.readouterr().out
    assert main(call) == 0  # it was finished: says the same again, trains nothing
    assert capsys.readouterr().out == first and "test accuracy" in first
    (line,) = [json.loads(text) for text in (tmp_path / "results/runs.jsonl").read_text().splitlines()]
    assert (line["recipe"]["block"], line["recipe"]["seed"], line["settings"]["channels_last"]) == ("acb", 3, True)
    assert main(["eval", f"{out}/model.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert shown == "".join(f"{form}: test accuracy {line['test_accuracy']:.2%}\n" for form in ("training", "folded"))


@pytest.mark.parametrize(
    "call, message",
    [
        (["train", "nothing"], "no recipe 'nothing'"),
        (["train", "digits", "--set", "momentun=1"], "a recipe has no 'momentun'"),
        (["train", "digits", "--block", "vgg"], "block='vgg' is not known"),
        (["train", "digits", "--device", "cuda:99"], "device='cuda:99' cannot be used here"),
        (["train", "digits", "--precision", "float8"], "precision='float8' is not known"),
        (["train", "digits", "--data", "nowhere"], "nowhere is no image folder"),
        (["eval", "nowhere.safetensors"], "nowhere.safetensors cannot be read (No such file"),
    ],
)
def test_a_wrong_call_is_answered_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, call, message):
    monkeypatch.chdir(tmp_path)
    assert main(call) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# Several processes


def run(*command: str, **options) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300, **options)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_two_processes_train_what_one_does():
    """The same batches, shared; norms that share their statistics; each test image counted once."""
    one, two = run("-m", "tests.together", cwd=ROOT), run(*TORCHRUN, "-m", "tests.together", cwd=ROOT)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    alone, together = (json.loads(done.stdout.splitlines()[-1]) for done in (one, two))
    assert (alone.pop("processes"), together.pop("processes")) == (1, 2)
    assert alone.keys() == together.keys() and len(alone["train_loss"]) == 2
    for name, values in alone.items():
        assert together[name] == pytest.approx(values, rel=2e-4), name


APART = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from dbb.data import load
from dbb.recipes import recipe
from dbb.train import Trainer
dist.init_process_group("gloo")
Trainer(recipe("digits", **{tiny!r}), *load("digits"), Path(sys.argv[1], os.environ["RANK"]))
"""


def test_machines_that_see_different_folders_are_refused(tmp_path):
    first = Trainer(recipe("digits", **TINY), *load("digits"), tmp_path / "0")
    first.state.step = 3
    first._save()
    (tmp_path / "apart.py").write_text(APART.format(tiny=TINY))
    done = run(*TORCHRUN, str(tmp_path / "apart.py"), str(tmp_path), cwd=tmp_path)
    assert done.returncode != 0
    assert "at (epoch, step) (0, 0), (0, 3): give a folder that all machines see" in done.stderr


WATCHED = """
import json, os, runpy, time
from pathlib import Path
import torch.distributed as dist

def name_of(path):
    try:
        return path.read_text().strip()
    except OSError:  # it has ended
        return ""

def gloo():
    return [name for name in map(name_of, Path("/proc/self/task").glob("*/comm")) if "gloo" in name]

def destroy():
    before, until = gloo(), time.monotonic() + 10
    really_destroy()
    while gloo() and time.monotonic() < until:  # a thread that was joined may be listed for a moment
        time.sleep(0.1)
    Path(os.environ["RANK"] + ".json").write_text(json.dumps([before, gloo()]))

really_destroy, dist.destroy_process_group = dist.destroy_process_group, destroy
runpy.run_module("dbb", run_name="__main__", alter_sys=True)
"""


def test_the_command_runs_under_torchrun_and_leaves_one_record_and_no_thread(tmp_path):
    """A thread of gloo that gave its tensors back while Python ends would abort the process, once in many runs."""
    settings = ["--epochs", "1", "--set", "batch_size=200", "--set", "model_options={'width': 4}"]
    places = ["--out", str(tmp_path / "run"), "--results", str(tmp_path / "results")]
    (tmp_path / "watched.py").write_text(WATCHED)
    done = run(*TORCHRUN, str(tmp_path / "watched.py"), "train", "digits", *settings, *places, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    (line,) = [json.loads(text) for text in (tmp_path / "results/runs.jsonl").read_text().splitlines()]
    assert line["processes"] == 2 and line["test_accuracy"] == line["folded_test_accuracy"]
    for rank in range(2):
        before, after = json.loads((tmp_path / f"{rank}.json").read_text())
        assert ("pt_gloo_runloop" in before) == (sys.platform == "linux") and after == []  # as /proc has them
