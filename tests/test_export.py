"""Folded models in other runtimes: the same answers, fewer operators."""

from __future__ import annotations

import pytest
import torch
import torchvision

from dbb import assert_equivalent, randomize_norms_, reparameterize, replace_convs
from dbb.export import export_onnx, onnx_operators, operators, run_onnx
from dbb.models import build_model

pytestmark = pytest.mark.slow  # through the compilers


@pytest.fixture(scope="module")
def resnet():
    """ResNet-18 as torchvision has it, with blocks, and folded."""
    torch.manual_seed(0)
    original = torchvision.models.resnet18(num_classes=10).eval()
    training = randomize_norms_(replace_convs(original, say=None)).eval()
    return original, training, reparameterize(training)


def test_onnx_runtime_answers_the_same(resnet, tmp_path):
    _, training, folded = resnet
    x = torch.rand(3, 3, 64, 64)
    error = export_onnx(folded, tmp_path / "model.onnx", x[:2])
    assert 0 < error < 1e-5
    with torch.no_grad():
        wanted = training(x)
    assert (run_onnx(tmp_path / "model.onnx", x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    counts = onnx_operators(tmp_path / "model.onnx")
    assert counts["Conv"] == 20 and counts["Relu"] == 17 and "BatchNormalization" not in counts


def test_torch_export_answers_the_same_with_the_operators_of_the_original(resnet):
    original, training, folded = resnet
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert_equivalent(training, torch.export.export(folded, (x,)).module(), x)
    before, after, plain = (operators(model, x) for model in (training, folded, original))
    assert after["conv2d"] == plain["conv2d"] == 20 and before["conv2d"] == 84
    assert before["avg_pool2d"] == 16 and "avg_pool2d" not in after
    assert plain - after == {"batch_norm": 16}  # the norms behind what was replaced, and nothing else
    assert not after - plain


def test_compiled_it_answers_the_same():
    torch.manual_seed(0)
    model = randomize_norms_(build_model("digits_net", 10, "dbb", width=4)).eval()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        wanted = model(x)
        given = torch.compile(reparameterize(model), fullgraph=True)(x)
    assert (given - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_what_is_not_folded_is_not_exported(resnet, tmp_path):
    _, training, folded = resnet
    for model in (training, reparameterize(training).train()):
        with pytest.raises(ValueError, match=r"still has branches, or is in training mode: export reparameterize\(mod"):
            export_onnx(model, tmp_path / "model.onnx", torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"model.pt must end in .onnx"):
        export_onnx(folded, tmp_path / "model.pt", torch.rand(2, 3, 64, 64))
    assert list(tmp_path.iterdir()) == []


def test_other_answers_are_not_kept(tmp_path, monkeypatch):
    model = reparameterize(build_model("digits_net", 10, "dbb", width=4).eval())
    monkeypatch.setattr("dbb.export.run_onnx", lambda file, x: run_onnx(file, x) * 1.001)
    with pytest.raises(ValueError, match=r"ONNX Runtime differs by 1\.\de-03 of the largest answer, 1e-04 is allowed"):
        export_onnx(model, tmp_path / "model.onnx", torch.rand(2, 1, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    model = reparameterize(build_model("digits_net", 10, "dbb", width=4).eval())
    with pytest.raises(ValueError, match="exporting needs onnxscript: pip install onnx onnxruntime onnxscript"):
        export_onnx(model, tmp_path / "model.onnx", torch.rand(2, 1, 8, 8))
