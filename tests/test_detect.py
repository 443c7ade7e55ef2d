"""Detectors and segmenters with blocks in their backbones: both forms answer the same, and scores are what they are."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.segmentation import fcn_resnet50

from dbb import assert_equivalent, detect, models, randomize_norms_, reparameterize
from dbb.annotated import IGNORED, load_boxes, load_masks
from dbb.checkpoint import load_model, save_model
from dbb.cli import main
from dbb.detect import Dense, average_precision, build, find_boxes, intersection_over_union, take_strides_out
from dbb.export import export_onnx
from dbb.models import build_model
from dbb.recipes import RECIPES, SCHEDULES, recipe
from dbb.results import read, score_of
from dbb.scenes import write_scenes
from dbb.surgery import outermost_blocks
from dbb.train import Hardware, Trainer, score, task_of
from tests.conftest import ROOT
from tests.test_annotated import cityscapes, coco

pytestmark = pytest.mark.slow  # detectors and segmenters

ALONE = Hardware(workers=0)
TINY = {"epochs": 1, "batch_size": 4, "model_options": {"width": 4}, "test_every": 1, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "scenes"
    write_scenes(path, {"train": 8, "val": 5})
    return path


def ready(name: str, block: str = "dbb", **options) -> nn.Module:
    """A model as training might leave it, heads that are sure of something included, in float64."""
    torch.manual_seed(0)
    model = randomize_norms_(build(name, 3, block, **options))
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None):
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model.double().eval()


def pictures(number: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(number, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# Models


SMALL = {"retinanet_small": 9, "fasterrcnn_small": 9, "fcn_small": 6, "deeplabv3_small": 6}  # and how many blocks
BIG = [
    ("retinanet_resnet18", {"min_size": 64, "max_size": 64}, 16),
    ("retinanet_resnet50", {"min_size": 64, "max_size": 64}, 16),
    ("fasterrcnn_resnet18", {"min_size": 64, "max_size": 64}, 16),
    ("fcn_resnet18", {}, 16),
    ("fcn_resnet18", {"dilate": True}, 16),
    ("deeplabv3_resnet50", {"dilate": True}, 16),
]


@pytest.mark.parametrize(
    "name, options, number", [*((name, {}, number) for name, number in SMALL.items()), *BIG], ids=str
)
def test_folded_it_answers_the_same(name, options, number):
    """Boxes, labels and scores, or logits; the graph under them; and blocks are in the backbone alone."""
    model = ready(name, **options)
    blocks = outermost_blocks(model)
    assert len(blocks) == number and all(block.startswith("backbone.") for block in blocks)
    folded = reparameterize(model)
    assert not outermost_blocks(folded)
    assert_equivalent(Dense(model), Dense(folded), pictures())
    with torch.no_grad():
        before, after = (
            form(list(pictures()) if "cnn" in name or "net_" in name else pictures()) for form in (model, folded)
        )
    if isinstance(before, list):
        assert sum(len(one["boxes"]) for one in before) > 0, "nothing found proves nothing"
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one["labels"], other["labels"])
            for part in ("boxes", "scores"):
                torch.testing.assert_close(one[part], other[part], rtol=1e-8, atol=1e-8)
    else:
        torch.testing.assert_close(before["out"], after["out"], rtol=1e-8, atol=1e-8)
        assert torch.equal(before["out"].argmax(1), after["out"].argmax(1))


@pytest.mark.parametrize("name", ["retinanet", "retinanet_vgg16", "yolo_small", "fcn_resnet34"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=rf"model='{name}' is not known"):
        build(name, 3)
    assert build_model("fcn_small", 3, "dbb", width=4) is not None


def test_a_resnet_without_strides_is_torchvisions():
    """Which it builds of bottlenecks."""
    with torch.device("meta"):
        ours, theirs = (
            take_strides_out(get_model("resnet50")),
            fcn_resnet50(weights=None, weights_backbone=None).backbone,
        )
    assert sorted(ours.state_dict()) == sorted([*theirs.state_dict(), "fc.weight", "fc.bias"])
    for name, conv in theirs.named_modules():
        if isinstance(conv, nn.Conv2d):
            assert str(ours.get_submodule(name)) == str(conv), name


def test_a_resnet18_without_strides_answers_the_same_at_the_places_that_it_had():
    torch.manual_seed(0)
    plain = randomize_norms_(get_model("resnet18")).double().eval()
    dense = take_strides_out(copy.deepcopy(plain))
    for model in (plain, dense):
        model.avgpool, model.fc = nn.Identity(), nn.Unflatten(1, (512, -1))
    x = pictures(1, 96)
    with torch.no_grad():
        coarse, fine = plain(x).reshape(1, 512, 3, 3), dense(x).reshape(1, 512, 12, 12)
    torch.testing.assert_close(fine[:, :, ::4, ::4], coarse, rtol=1e-9, atol=1e-9)


def test_one_stage_and_segmenters_leave_python(tmp_path):
    for name in ("retinanet_small", "fcn_small"):
        folded = Dense(reparameterize(ready(name).float()))
        assert export_onnx(folded, tmp_path / f"{name}.onnx", pictures(1).float()) < 1e-4


# A backbone that was trained


def trained(path: Path, block: str) -> None:
    torch.manual_seed(1)
    model = randomize_norms_(build_model("resnet18", 2, block))
    save_model(path, model, recipe("imagenet_resnet18", block=block), ("cat", "dog"))


def of_coco(block: str, **changes):
    small = {"epochs": 1, "batch_size": 2, "model_options": {"min_size": 64, "max_size": 64}, "warmup_epochs": 0}
    return recipe("coco_retinanet_resnet18", block=block, **small | changes)


def test_a_detector_starts_from_a_trained_backbone_and_keeps_its_norms(tmp_path):
    trained(tmp_path / "dbb.safetensors", "dbb")
    data = load_boxes(coco(tmp_path / "coco"))
    trainer = Trainer(of_coco("dbb", starts_from=f"{tmp_path}/{{block}}.safetensors"), *data, hardware=ALONE)
    start, body = load_model(tmp_path / "dbb.safetensors")[0].state_dict(), trainer.model.backbone.body
    assert all(torch.equal(value, start[name]) for name, value in body.state_dict().items())
    model = trainer.run()
    moved = {name for name, value in body.state_dict().items() if not torch.equal(value, start[name])}
    assert moved and not any(".bn" in name or "bn1" in name or "downsample.1" in name for name in moved)
    assert {name for name, p in body.named_parameters() if p.requires_grad} == moved
    assert trainer.evaluate(model)[0] == trainer.evaluate(reparameterize(model))[0] == score_of_last(trainer)


def score_of_last(trainer: Trainer) -> float:
    return trainer.state.history[-1][f"test_{'ap' if trainer.recipe.task == 'detect' else 'miou'}"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"starts_from": "nowhere.safetensors"}, "is not there: dbb train imagenet_resnet18 --block plain makes it"),
        ({"starts_from": ""}, "frozen_norms=True keeps the statistics of a trained backbone, and coco_.* has none"),
        (
            {"starts_from": "{here}/dbb.safetensors"},
            "does not fit the backbone with its 'plain' blocks .* the same network",
        ),
    ],
)
def test_a_backbone_that_cannot_be_started_from_is_refused(tmp_path, changes, message):
    trained(tmp_path / "dbb.safetensors", "dbb")
    changes = {name: value.replace("{here}", str(tmp_path)) for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        Trainer(of_coco("plain", **changes), *load_boxes(coco(tmp_path / "coco")), hardware=ALONE)


def test_a_segmenter_trains_on_cityscapes(tmp_path):
    trained(tmp_path / "dbb.safetensors", "dbb")
    small = {"epochs": 1, "batch_size": 2, "image_size": 32, "starts_from": f"{tmp_path}/{{block}}.safetensors"}
    chosen = recipe("cityscapes_fcn_resnet18", block="dbb", **small)
    trainer = Trainer(chosen, *load_masks(cityscapes(tmp_path / "roads")), hardware=ALONE)
    model = trainer.run()
    assert 0 <= trainer.evaluate(model)[0] == trainer.evaluate(reparameterize(model))[0] == score_of_last(trainer)


# Scores


def test_average_precision(scenes):
    _, test = load_boxes(scenes)
    truth = [entry for number in test.ids for entry in test.coco.imgToAnns[number]]
    sure = [{"score": 0.9} | {key: entry[key] for key in ("image_id", "category_id", "bbox")} for entry in truth]
    assert average_precision(sure, test)["AP"] == pytest.approx(1)
    assert average_precision([], test)["AP"] == 0
    wrong = [entry | {"category_id": entry["category_id"] % 4 + 1} for entry in sure]
    assert average_precision(wrong, test)["AP50"] < 0.2
    # Boxes that are half as large again overlap by two thirds: right at 0.50, 0.55, 0.60 and 0.65, wrong at six more.
    larger = [entry | {"bbox": [*entry["bbox"][:2], 1.5 * entry["bbox"][2], entry["bbox"][3]]} for entry in sure]
    found = average_precision(larger, test)
    assert (found["AP50"], found["AP75"]) == (pytest.approx(1), 0) and found["AP"] == pytest.approx(0.4)
    doubled = average_precision([*sure, *(entry | {"score": 0.95} for entry in wrong)], test)
    assert doubled["AP50"] < 0.9, "what is wrong and surer costs precision"


class Answers(nn.Module):
    """A segmenter that always answers the same classes."""

    def __init__(self, classes: torch.Tensor, number: int) -> None:
        super().__init__()
        self.out = nn.functional.one_hot(classes, number).permute(0, 3, 1, 2).float()

    def forward(self, x):
        return {"out": self.out[: len(x)]}


def test_intersection_over_union(tmp_path):
    """By hand: ignored pixels count for nothing, over all images, absent classes not in the mean."""
    _, test = load_masks(cityscapes(tmp_path))
    batches = test.batches(2, mean=torch.zeros(3), std=torch.ones(3))
    ((_, truth),) = batches.epoch()
    seen = truth.where(truth != IGNORED, 0)
    assert intersection_over_union(Answers(seen, 19), batches, ALONE) == (pytest.approx(1), pytest.approx([1] * 19))
    answer = seen.clone()
    answer[0, :16] = 1  # a half of one of two images is called sidewalk
    answer[answer == 13] = 12
    counted = truth != IGNORED
    wanted = [
        ((answer == c) & (truth == c) & counted).sum() / (((answer == c) | (truth == c)) & counted).sum().clamp_min(1)
        for c in range(19)
    ]
    mean, each = intersection_over_union(Answers(answer, 19), batches, ALONE)
    assert each == pytest.approx(torch.tensor(wanted).tolist()) and mean == pytest.approx(sum(wanted).item() / 19)
    few = test.table.clone()
    few[few > 2] = IGNORED  # now sixteen classes are neither there nor answered
    object.__setattr__(test, "table", few)
    ((_, truth),) = batches.epoch()
    assert intersection_over_union(Answers(truth.where(truth != IGNORED, 0), 19), batches, ALONE)[0] == pytest.approx(1)


# Runs


@pytest.mark.parametrize("name", ["scenes_detect", "scenes_segment"])
def test_a_run_resumed_ends_as_one_undisturbed(scenes, tmp_path, name):
    chosen = recipe(name, block="dbb", data=str(scenes), **TINY | {"epochs": 2}, train_images=None)
    data = task_of(chosen).load(chosen, tmp_path)
    whole = Trainer(chosen, *data, hardware=ALONE).run()

    def fail():
        if (broken.state.epoch, broken.state.step) == (1, 1):
            raise KeyboardInterrupt

    broken = Trainer(chosen, *data, tmp_path, Hardware(workers=0, save_seconds=0), tick=fail)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = Trainer(chosen, *data, tmp_path, ALONE)
    assert resumed.state.epoch == 1
    for one, other in zip(whole.state_dict().values(), resumed.run().state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["scenes_detect", "scenes_segment"])
def test_in_pieces_it_is_the_same_step(scenes, tmp_path, name):
    chosen, weights = recipe(name, data=str(scenes), **TINY, train_images=None), []
    for pieces in (1, 2):
        trainer = Trainer(
            chosen, *task_of(chosen).load(chosen, tmp_path), hardware=Hardware(workers=0, accumulate=pieces)
        )
        for module in trainer.model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
                module.forward = lambda x: x  # a norm sees another batch where it comes in pieces
        trainer.task = replace(trainer.task, evaluate=lambda *_: (0.0, None))
        trainer.run()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=2e-3, atol=2e-5)


def test_a_gradient_that_is_too_long_is_shortened(scenes, tmp_path):
    steps = {}
    for longest in (None, 1e-3):
        chosen = recipe("scenes_detect", data=str(scenes), **TINY | {"batch_size": 8}, train_images=None, momentum=0.0,
                        weight_decay=0.0, largest_gradient=longest)  # fmt: skip
        trainer = Trainer(chosen, *task_of(chosen).load(chosen, tmp_path), hardware=ALONE)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer._train_step(*next(iter(trainer.batches.epoch(0))))
        after = trainer.model.parameters()
        steps[longest] = torch.cat([(a - b).flatten() for a, b in zip(after, before)]).norm().item()
    assert steps[1e-3] == pytest.approx(1e-3 * 0.02, rel=1e-2) and steps[None] > 10 * steps[1e-3]


def test_the_heads_that_models_knows_are_those_that_can_be_built():
    assert tuple(detect.HEADS) == models.HEADS


def test_schedules():
    assert [SCHEDULES["steps"](done / 126) for done in (0, 80, 81, 107, 108, 125)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert SCHEDULES["poly"](0.5) == pytest.approx(0.5**0.9) and SCHEDULES["poly"](1) == 0
    assert {r.schedule for r in RECIPES.values()} == set(SCHEDULES)


def test_the_commands_train_score_prove_fold_and_export(scenes, tmp_path, capsys):
    small = ["--set", "model_options={'width': 4}", "--set", "batch_size=4", "--set", "train_images=8", "--epochs", "1"]
    small += ["--set", "warmup_epochs=0"]
    for name, word, key in (("scenes_detect", "AP", "test_ap"), ("scenes_segment", "mIoU", "test_miou")):
        out, results = tmp_path / name, tmp_path / "results" / name
        call = ["train", name, "--block", "dbb", "--data", str(scenes), *small, "--workers", "0", "--out", str(out)]
        assert main([*call, "--results", str(results)]) == 0
        assert f"test {word} " in capsys.readouterr().out
        (line,) = read(results)
        assert line[key] == line[f"folded_{key}"] == score_of(line) == line["epochs"][-1][key]
        assert line["data"]["name"] == "scenes" and line["images"] == {"train": 8, "test": 5}
        file, folded = str(out / "model.safetensors"), str(tmp_path / f"{name}.safetensors")
        assert main(["eval", file]) == 0
        assert capsys.readouterr().out.count(f"test {word} {line[key]:.2%}") == 2
        assert main(["verify", file]) == 0 and main(["convert", file, folded]) == 0
        assert main(["eval", folded]) == 0 and f"folded: test {word} {line[key]:.2%}" in capsys.readouterr().out
        assert main(["inspect", file]) == 0 and key.replace("_", " ") in capsys.readouterr().out
        assert main(["export", file, str(tmp_path / f"{name}.onnx")]) == 0


def test_a_missing_set_is_one_line_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, words in (("coco_retinanet_resnet18", "cocodataset.org"), ("cityscapes_fcn_resnet18", "cityscapes-data")):
        assert main(["train", name, "--data", "nowhere"]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.parametrize("name, key", [("scenes_detect", "test_ap"), ("scenes_segment", "test_miou")])
def test_two_processes_leave_one_record_with_the_score_that_one_finds(scenes, tmp_path, name, key):
    """Each image counts once, though they are five: one process has one more."""
    settings = ["--set", "batch_size=4", "--set", "model_options={'width': 4}", "--set", "train_images=8"]
    places = ["--data", str(scenes), "--out", str(tmp_path / "run"), "--results", str(tmp_path / "results")]
    call = ["-m", "dbb", "train", name, "--block", "dbb", "--epochs", "2", "--workers", "0", *settings, *places]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *TORCHRUN, *call], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(text) for text in (tmp_path / "results/runs.jsonl").read_text().splitlines()]
    assert line["processes"] == 2 and line[key] == line[f"folded_{key}"]
    alone = score(tmp_path / "run/model.safetensors", hardware=ALONE)
    assert alone["training"] == pytest.approx(line[key], abs=1e-6)


def test_what_is_found_names_its_image_and_its_category(tmp_path):
    _, test = load_boxes(coco(tmp_path))
    model = ready("retinanet_small").float()
    found = find_boxes(model, test.batches(3, mean=torch.zeros(3), std=torch.ones(3)), ALONE)
    assert {entry["image_id"] for entry in found} <= {3, 7, 8, 9} and len(found) > 0
    assert {entry["category_id"] for entry in found} <= {1, 18, 90}
    assert all(min(entry["bbox"][2:]) >= 0 for entry in found)
