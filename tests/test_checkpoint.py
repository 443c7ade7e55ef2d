"""Checkpoints: the authors' whole networks against what their code answers, ours, and every way to mistake them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dbb import assert_equivalent, randomize_norms_, reparameterize, replace_convs
from dbb.checkpoint import (
    convert,
    describe,
    example_input,
    form_of,
    inspect_file,
    load_model,
    load_weights,
    read_pth,
    save_model,
)
from dbb.models import build_model
from dbb.recipes import recipe

pytestmark = pytest.mark.slow  # whole networks, through files

GOLDEN = sorted(Path(__file__).with_name("golden").glob("upstream_*.json"))
BLOCKS = {"base": "plain", "DBB": "dbb"}
FORMS = {"train": "training", "deploy": "folded"}


def drawn(golden: dict) -> dict[str, Tensor]:
    """The weights of the file, drawn as the README of the golden values says."""
    generator, state = torch.Generator().manual_seed(golden["seed"]), {}
    for name, shape in golden["shapes"].items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("running_mean"):
            state[name] = torch.randn(shape, generator=generator) * 0.1
        elif len(shape) == 4:
            spread = (golden["gain"] / (shape[1] * shape[2] * shape[3])) ** 0.5
            state[name] = torch.randn(shape, generator=generator) * spread
        elif len(shape) == 2:
            state[name] = torch.randn(shape, generator=generator) * (1 / shape[1]) ** 0.5
        elif name.endswith("weight"):
            state[name] = torch.rand(shape, generator=generator) * 0.5 + 0.5
        else:
            state[name] = torch.randn(shape, generator=generator) * 0.1
    return state


def answers(model: nn.Module, golden: dict, dtype: torch.dtype = torch.float64) -> float:
    """How far the model's logits are from the authors', relative to the largest."""
    x = torch.randn(golden["input"]["shape"], generator=torch.Generator().manual_seed(golden["input"]["seed"]))
    wanted = torch.tensor(golden["logits_float64"], dtype=torch.float64)
    with torch.no_grad():
        given = model.to(dtype)(x.to(dtype))[:, : wanted.shape[1]].double()
    return ((given - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda path: path.stem)
def golden(request) -> dict:
    return json.loads(request.param.read_text())


@pytest.fixture(scope="module")
def file(golden, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("authors") / f"{golden['arch']}_{golden['block']}_{golden['form']}.pth"
    torch.save(drawn(golden), path)
    return path


# The authors' files


def test_the_authors_networks_answer_what_their_code_answers(golden, file):
    model, about = load_model(file)
    assert about["form"] == FORMS[golden["form"]] and about["recipe"]["block"] == BLOCKS[golden["block"]]
    assert about["recipe"]["model"].startswith(golden["arch"]) and len(about["classes"]) == 1000
    assert not model.training
    assert answers(model, golden, torch.float32) < 1e-4
    assert answers(model, golden) < 1e-9
    folded = reparameterize(model)
    assert form_of(folded) == "folded"
    assert answers(folded, golden) < 1e-9


def test_every_convolution_counts(golden, file):
    """With any one of them at zero, the answers are no longer the authors'."""
    state = drawn(golden)
    model, _ = load_model(file)
    convs = [p for p in model.parameters() if p.dim() == 4]
    assert len(convs) == sum(len(shape) == 4 for shape in golden["shapes"].values())
    unnoticed = 0
    for weight in convs:
        kept = weight.detach().clone()
        weight.data.zero_()
        unnoticed += answers(model, golden, torch.float32) < 1e-3
        weight.data.copy_(kept)
    assert unnoticed == 0
    assert answers(model, golden, torch.float32) < 1e-4 and len(state) == len(golden["shapes"])


def test_prefixes_and_wrappings_are_taken_off(tmp_path):
    state = {name: torch.rand(2) for name in ("stage0.conv1.conv.weight", "module.weight", "a.module.b")}
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    for content in (state, prefixed, {"state_dict": state}, {"state_dict": prefixed, "epoch": 3}):
        torch.save(content, tmp_path / "some.pth")
        found = read_pth(tmp_path / "some.pth")
        assert list(found) == list(state) and all(torch.equal(found[name], state[name]) for name in state)


def load_model_of(state: dict, folder: Path):
    torch.save(state, folder / "state.pth")
    return load_model(folder / "state.pth")


def names_of_resnet50(block: bool, deploy: bool):
    """The authors' names and shapes of a ResNet-50, for which there are no golden answers."""

    def place(name: str, out: int, inside: int, size: int):
        shape = [out, inside, size, size]
        if size != 3 or not block:
            return conv_norm(f"{name}.conv", f"{name}.bn", shape)
        if deploy:
            return {f"{name}.dbb_reparam.weight": shape, f"{name}.dbb_reparam.bias": [out]}
        square = [inside, inside, 1, 1]
        return {
            **conv_norm(f"{name}.dbb_origin.conv", f"{name}.dbb_origin.bn", shape),
            **conv_norm(f"{name}.dbb_avg.conv", f"{name}.dbb_avg.bn.bn", [out, inside, 1, 1]),
            **norm(f"{name}.dbb_avg.avgbn", out),
            **conv_norm(f"{name}.dbb_1x1.conv", f"{name}.dbb_1x1.bn", [out, inside, 1, 1]),
            **conv_norm(f"{name}.dbb_1x1_kxk.idconv1", f"{name}.dbb_1x1_kxk.bn1.bn", square),
            **conv_norm(f"{name}.dbb_1x1_kxk.conv2", f"{name}.dbb_1x1_kxk.bn2", shape),
        }

    def conv_norm(conv: str, bn: str, shape: list[int]):
        weight = {f"{conv}.weight": shape}
        return weight | ({f"{conv}.bias": shape[:1]} if deploy else norm(bn, shape[0]))

    def norm(name: str, out: int):
        of = {part: [out] for part in ("weight", "bias", "running_mean", "running_var")}
        return {f"{name}.{part}": shape for part, shape in (of | {"num_batches_tracked": []}).items()}

    shapes, inside = place("stage0.conv1", 64, 3, 7), 64
    for stage, repeats in enumerate((3, 4, 6, 3), start=1):
        width = 32 * 2**stage
        for number in range(repeats):
            unit = f"stage{stage}.{number}"
            if number == 0:
                shapes |= place(f"{unit}.shortcut", 4 * width, inside, 1)
            shapes |= place(f"{unit}.conv1", width, inside, 1)
            shapes |= place(f"{unit}.conv2", width, width, 3)
            shapes |= place(f"{unit}.conv3", 4 * width, width, 1)
            inside = 4 * width
    return shapes | {"linear.weight": [1000, inside], "linear.bias": [1000]}


@pytest.mark.parametrize("block, deploy", [(True, False), (True, True), (False, False), (False, True)])
def test_resnet50_of_the_authors(block, deploy, tmp_path):
    state = drawn({"seed": 1, "gain": 1, "shapes": names_of_resnet50(block, deploy)})
    model, about = load_model_of(state, tmp_path)
    kind = "dbb" if block else "plain"
    assert (about["recipe"]["model"], about["recipe"]["block"]) == ("resnet50", kind)
    assert about["form"] == ("folded" if deploy else "training")
    assert sum(t.numel() for t in model.state_dict().values()) == sum(t.numel() for t in state.values())
    first = reparameterize(model).layer2[0]  # as in the authors' code, the 3x3 has the stride
    assert {name: conv.stride[0] for name, conv in first.named_children() if "conv" in name} == {
        "conv1": 1,
        "conv2": 2,
        "conv3": 1,
    }
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).isfinite().all()
    if block and not deploy:
        torchvision.models.resnet50().load_state_dict(reparameterize(model, restore=True, say=None).state_dict())


BROKEN = {
    "is none of the authors' checkpoints (it has 'fc.weight')": lambda s: {"fc.weight": s["linear.weight"]},
    "1 tensors are missing (layer1.0.conv1.conv.bias)": lambda s: without(s, "stage1.0.conv1.dbb_reparam.bias"),
    "of another shape (fc.weight (1000, 100) for (1000, 512))": lambda s: s | {"linear.weight": torch.ones(1000, 100)},
    "a network of (2, 2, 2, 1) blocks that end in 'conv2'": lambda s: {k: v for k, v in s.items() if "e4.1" not in k},
    "of (2, 2, 2, 2) blocks that end in 'conv3'": lambda s: s | {"stage1.0.conv3.conv.weight": torch.ones(1, 1, 1, 1)},
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_does_not_fit_is_named(message, tmp_path):
    golden = json.loads(next(path for path in GOLDEN if path.stem.endswith("resnet18_deploy")).read_text())
    with pytest.raises(ValueError) as caught:
        load_model_of(BROKEN[message](drawn(golden)), tmp_path)
    assert message in str(caught.value)


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    "content, message",
    [
        (nn.Linear(2, 2), "holds more than tensors, such as a pickled model, which would run code: save model.state"),
        ([1, 2], r"holds no weights by name: give a state_dict, or \{'state_dict': ...\}"),
        ({}, "holds no weights by name"),
        ({"state_dict": {"epoch": 3}}, "holds no weights by name"),
        ({"weight": torch.ones(2)}, "plain weights do not tell their model"),
    ],
    ids=str,
)
def test_other_files_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "other.pth")


def test_damaged_and_missing_files_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "short.pth").write_text("")
    (tmp_path / "head.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    for name, message in {
        "text.pth": "is damaged, or holds more",
        "short.pth": "is damaged, or holds more",
        "head.safetensors": "is not a model that `dbb train` or `dbb convert` has written",
        "none.pth": "cannot be read",
        "": "cannot be read",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / name)


# Ours


@pytest.fixture
def trained(tmp_path) -> Path:
    """A small network with random statistics, as `dbb train` keeps one."""
    torch.manual_seed(0)
    model = randomize_norms_(build_model("digits_net", 10, "dbb", width=4))
    save_model(
        tmp_path / "model.safetensors",
        model,
        recipe("digits", block="dbb", model_options={"width": 4}),
        tuple("0123456789"),
        test_accuracy=0.5,
    )
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("resnet") / "resnet18.safetensors"
    model = randomize_norms_(build_model("resnet18", 10, "dbb"))
    save_model(path, model, recipe("imagenet_resnet18", block="dbb"), tuple("0123456789"))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_convert(trained, suffix):
    target = trained.with_name(f"folded{suffix}")
    about = convert(trained, target)
    assert describe(about) == "digits_net, width=4 with block 'dbb', 10 classes, folded form"
    assert (about["converted_from"], about["test_accuracy"]) == ("model.safetensors", 0.5)
    before, _ = load_model(trained)
    if suffix == ".pth":  # nothing but the weights
        after = reparameterize(before)
        after.load_state_dict(torch.load(target, weights_only=True))
        with pytest.raises(ValueError, match="plain weights do not tell their model"):
            load_model(target)
    else:
        after, again = load_model(target)
        assert again == about
    assert_equivalent(before, after, torch.rand(4, 1, 8, 8))


@pytest.mark.parametrize("by_way_of_folded", [False, True])
def test_restored_weights_load_strictly_into_torchvision(resnet, tmp_path, by_way_of_folded):
    before, _ = load_model(resnet)
    source = resnet
    if by_way_of_folded:
        source = tmp_path / "folded.safetensors"
        convert(resnet, source)
    plain = torchvision.models.resnet18(num_classes=10).eval()
    convert(source, tmp_path / "plain.pth", restore=True)
    plain.load_state_dict(torch.load(tmp_path / "plain.pth", weights_only=True))
    x = torch.rand(1, 3, 64, 64)
    assert_equivalent(before, plain, x)
    convert(source, tmp_path / "plain.safetensors", restore=True)
    again, about = load_model(tmp_path / "plain.safetensors")
    assert about["form"] == "restored"
    assert_equivalent(before, again, x)
    with pytest.raises(ValueError, match=r"plain\.safetensors is restored already"):
        convert(tmp_path / "plain.safetensors", tmp_path / "again.safetensors")


def test_networks_of_the_libraries_are_kept_like_ours(tmp_path):
    for name in ("timm.lcnet_050", "torchvision.regnet_x_400mf"):
        model = randomize_norms_(build_model(name, 10, "acb")).eval()
        chosen = recipe("imagenet_mobilenet", model=name, block="acb")
        save_model(tmp_path / "model.safetensors", model, chosen, tuple("0123456789"))
        convert(tmp_path / "model.safetensors", tmp_path / "folded.safetensors")
        again, about = load_model(tmp_path / "folded.safetensors")
        assert_equivalent(model, again, example_input(about, size=64))


def test_refused_conversions_leave_nothing_behind(trained):
    convert(trained, trained.with_name("folded.safetensors"))
    kept = {path.name: path.read_bytes() for path in trained.parent.iterdir()}
    for source, target, options, message in (
        ("folded.safetensors", "again.safetensors", {}, "folded already: digits_net, width=4"),
        ("model.safetensors", "model.safetensors", {}, "the file that is read: give another name, or the trained"),
        ("model.safetensors", "model.onnx", {}, r"must end in .safetensors or .pth"),
        ("model.safetensors", "plain.pth", {"restore": True}, "gives back what replace_convs took out"),
        ("none.safetensors", "plain.pth", {}, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(trained.with_name(source), trained.with_name(target), **options)
    assert {path.name: path.read_bytes() for path in trained.parent.iterdir()} == kept


def test_a_wrong_fold_is_not_written(trained, monkeypatch):
    wrong = lambda model, **options: reparameterize(model).apply(double_convolutions)  # noqa: E731
    monkeypatch.setattr("dbb.checkpoint.reparameterize", wrong)
    with pytest.raises(AssertionError, match="the outputs differ by"):
        convert(trained, trained.with_name("folded.safetensors"))
    assert not trained.with_name("folded.safetensors").exists()


def double_convolutions(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.weight.data *= 2


# Into a model of one's own


def test_load_weights(trained, resnet, tmp_path):
    own = build_model("digits_net", 10, "dbb", width=4).eval()
    assert load_weights(own, trained)["form"] == "training"
    assert_equivalent(load_model(trained)[0], own, torch.rand(2, 1, 8, 8))

    convert(resnet, tmp_path / "folded.safetensors")
    for own in (
        reparameterize(replace_convs(torchvision.models.resnet18(num_classes=10), say=None).eval()),
        replace_convs(torchvision.models.resnet18(num_classes=10), deploy=True, say=None).eval(),
    ):
        assert load_weights(own, tmp_path / "folded.safetensors")["form"] == "folded"
        assert_equivalent(load_model(resnet)[0], own, torch.rand(1, 3, 64, 64))


def test_load_weights_says_what_does_not_fit_and_changes_nothing(trained):
    convert(trained, trained.with_name("folded.safetensors"))
    training = build_model("digits_net", 10, "dbb", width=4).eval()
    for own, file, message in (
        (
            reparameterize(training),
            "model",
            "model is in folded form.*load it before folding, or fold the file: dbb",
        ),
        (training, "folded", r"the model is in training form.*load_weights\(reparameterize\(model.eval\(\)\), path\)"),
        (build_model("digits_net", 10, "acb", width=4), "model", r"with block 'dbb'.*missing \(0.branches.kx1"),
        (
            build_model("digits_net", 3, "dbb", width=4),
            "model",
            r"shape \(3.weight \(10, 128\) for \(3, 128\)",
        ),
        (nn.Linear(2, 2), "folded", r"missing \(weight, bias\).*load_model\(path\) builds the model that it fits"),
    ):
        state = {name: tensor.clone() for name, tensor in own.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_weights(own, trained.with_name(f"{file}.safetensors"))
        assert all(torch.equal(tensor, state[name]) for name, tensor in own.state_dict().items())


# What is it?


def test_inspect(trained, tmp_path):
    told = inspect_file(trained)
    assert "digits_net, width=4 with block 'dbb', 10 classes, training form" in told
    assert "test accuracy: 0.5" in told and "dbb convert" in told and "float32" in told
    convert(trained, tmp_path / "folded.safetensors")
    told = inspect_file(tmp_path / "folded.safetensors")
    assert "folded form" in told and "converted from: model.safetensors" in told and "dbb export" in told
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "plain.pth")
    assert "1 tensors by name, which do not tell their model: weight (2, 3)" in inspect_file(tmp_path / "plain.pth")
    (tmp_path / "not.onnx").write_text("no model")
    with pytest.raises(ValueError, match="is no ONNX file"):
        inspect_file(tmp_path / "not.onnx")
