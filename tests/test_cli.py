"""The commands on files of models: each option once, exit statuses, nothing half done."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dbb import randomize_norms_, reparameterize
from dbb.checkpoint import load_model, save_model
from dbb.cli import main
from dbb.models import build_model
from dbb.recipes import recipe
from tests.broken import ROOT
from tests.test_checkpoint import drawn

pytestmark = pytest.mark.slow  # each command is a process of its own

COMMANDS = ("clean", "convert", "verify", "export", "inspect", "eval")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a network in training form, in which the commands are called."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    model = randomize_norms_(build_model("digits_net", 10, "dbb", width=4))
    chosen = recipe("digits", block="dbb", model_options={"width": 4})
    save_model(tmp_path / "trained.safetensors", model, chosen, tuple("0123456789"), normalised_by=[[0.5], [0.2]])
    return tmp_path


def said(capsys, *arguments: str, status: int = 0) -> str:
    assert main(list(arguments)) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


@pytest.mark.parametrize("target", ["folded.safetensors", "folded.pth"])
def test_convert(files, capsys, target):
    assert f"{target}: digits_net" in said(capsys, "convert", "trained.safetensors", target)
    assert (files / target).exists()


def test_convert_and_restore(files, capsys):
    model = randomize_norms_(build_model("timm.resnet10t", 10, "acb"))
    save_model(
        "net.safetensors", model, recipe("imagenet_resnet18", model="timm.resnet10t", block="acb"), tuple("0123456789")
    )
    assert "frozen norms" in said(capsys, "convert", "net.safetensors", "plain.pth", "--restore")
    timm.create_model("resnet10t", num_classes=10).load_state_dict(torch.load("plain.pth", weights_only=True))


def test_verify(files, capsys):
    told = said(capsys, "verify", "trained.safetensors")
    assert "digits_net, width=4 with block 'dbb'" in told and "float64 abs" in told
    assert "the whole model in float64: off by" in told and "the whole model in float32: off by" in told
    said(capsys, "convert", "trained.safetensors", "folded.safetensors")
    told = said(capsys, "verify", "folded.safetensors", status=2)
    assert "folded.safetensors is in folded form, without branches: give the training form" in told


@pytest.mark.parametrize("block", ["plain", "acb", "dbb", "repvgg"])
def test_verify_a_network_with_random_statistics(capsys, block):
    told = [said(capsys, "verify", "--arch", "digits_net", "--block", block, "--seed", seed) for seed in "001"]
    assert told[0] == told[1] != told[2]
    assert f"digits_net with block '{block}'" in told[0]


def test_verify_a_network_of_a_library(capsys):
    assert "layer1.0.conv1" in said(capsys, "verify", "--arch", "torchvision.resnet18", "--size", "32")
    assert "torchvision cannot build it (Unknown model resnet)" in said(
        capsys, "verify", "--arch", "torchvision.resnet", status=2
    )
    assert "model='resnet' is not known" in said(capsys, "verify", "--arch", "resnet", status=2)


def test_a_fold_that_is_wrong_has_status_1(files, capsys, monkeypatch):
    monkeypatch.setattr("dbb.surgery.reparameterize", lambda model: reparameterize(model)[:1].eval())
    told = said(capsys, "verify", "trained.safetensors", status=1)
    assert "the outputs" in told


@pytest.mark.parametrize("given", ["trained", "folded"])
def test_export(files, capsys, given):
    said(capsys, "convert", "trained.safetensors", "folded.safetensors")
    told = said(capsys, "export", f"{given}.safetensors", "model.onnx")
    assert "2 Conv" in told and "2 Relu" in told and "ONNX Runtime differs by" in told
    assert "2 Conv" in said(capsys, "inspect", "model.onnx")
    assert "must end in .onnx" in said(capsys, "export", "trained.safetensors", "model.pt", status=2)
    assert not (files / "model.pt").exists()


def test_export_at_another_size(files, capsys):
    torch.manual_seed(0)
    model = randomize_norms_(build_model("small_resnet", 10, "dbb", width=4))
    chosen = recipe("cifar10_small", block="dbb", model_options={"width": 4})
    save_model("net.safetensors", model, chosen, tuple("0123456789"))
    said(capsys, "export", "net.safetensors", "net.onnx", "--size", "20")

    from dbb.export import run_onnx

    x = torch.rand(5, 3, 20, 20)
    with torch.no_grad():
        assert torch.allclose(run_onnx("net.onnx", x), load_model("net.safetensors")[0](x), atol=1e-5)


def test_inspect(files, capsys):
    assert "training form" in said(capsys, "inspect", "trained.safetensors")
    assert "cannot be read" in said(capsys, "inspect", "nothing.pth", status=2)


def test_eval_in_every_form(files, capsys):
    told = said(capsys, "eval", "trained.safetensors")
    assert "training: test accuracy" in told and "folded: test accuracy" in told
    said(capsys, "convert", "trained.safetensors", "folded.safetensors")
    assert said(capsys, "eval", "folded.safetensors").strip() == told.splitlines()[1]


def test_eval_of_the_authors_files(files, capsys):
    """Their files have no names for classes: any data with as many will do."""
    golden = json.loads((ROOT / "tests/golden/upstream_mobilenet_dbb.json").read_text())
    golden["shapes"] |= {"linear.weight": [3, 1024], "linear.bias": [3]}
    torch.save(drawn(golden), "MobileNet_DBB.pth")
    for part, name in itertools.product(("train", "val"), ("ant", "bee", "cat", "dog")):
        path = files / "four" / part / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    shutil.copytree(files / "four", files / "three", ignore=shutil.ignore_patterns("dog"))
    told = said(capsys, "eval", "MobileNet_DBB.pth", "--data", "three", "--device", "cpu", "--root", ".")
    assert "training: test accuracy" in told and "folded: test accuracy" in told
    told = said(capsys, "eval", "MobileNet_DBB.pth", "--data", "four", status=2)
    assert "tells 3 classes apart" in told and "has 4 (ant, bee, cat, ...)" in told


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"dbb {command} " in capsys.readouterr().out.partition("examples:")[2]


@pytest.mark.parametrize("call", [[], ["verify"], ["verify", "a", "--arch", "b"], ["convert", "a"], ["export", "a"]])
def test_calls_that_lack_something(call):
    with pytest.raises(SystemExit) as ended:
        main(call)
    assert ended.value.code == 2


def test_a_missing_package_is_named(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "this command needs safetensors: pip install safetensors" in said(
        capsys, "inspect", "trained.safetensors", status=2
    )


def test_as_a_command(files):
    command = [sys.executable, "-m", "dbb", "convert", "trained.safetensors", "folded.pth"]
    assert subprocess.run(command, capture_output=True, check=True).stdout.decode().startswith("folded.pth: digits_net")
    assert sorted(path.name for path in files.iterdir()) == ["folded.pth", "trained.safetensors"]
