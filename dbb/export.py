"""Folded models for other runtimes: ONNX, kept only if ONNX Runtime answers what torch answers; operators counted."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from dbb.checkpoint import form_of
from dbb.figures import write_atomically

TOLERANCE = 1e-4  # of the largest answer, in float32: another runtime sums in another order


def export_onnx(model: nn.Module, path: Path, example: Tensor) -> float:
    """Write a folded model as an ONNX file for any batch size; answers the error of ONNX Runtime.

    example: an input "n c h w"; its size is the size that the file takes
    The error is relative to the largest answer. The file is written after the comparison, whole or not at all.

    Raises ValueError for a model in training mode or form, for a missing package, and where the answers differ by more
    than 1e-4.
    """
    if model.training or form_of(model) == "training":
        raise ValueError("the model still has branches, or is in training mode: export reparameterize(model.eval())")
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path} must end in .onnx")
    content = onnx_bytes(model, example)
    with torch.no_grad():
        wanted = model(torch.cat([example, example.flip(0)]))  # another batch size than that of the example
    given = run_onnx(content, torch.cat([example, example.flip(0)]))
    error = ((given - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= TOLERANCE:
        raise ValueError(f"ONNX Runtime differs by {error:.1e} of the largest answer, {TOLERANCE:.0e} is allowed")
    write_atomically(path, content)
    return error


def run_onnx(file: Path | bytes, x: Tensor) -> Tensor:
    """What ONNX Runtime answers to one input, on the CPU."""
    session = onnx_session(file)
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(answer)


def onnx_session(file: Path | bytes):
    """An inference session of ONNX Runtime on the CPU, silent, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    content = file if isinstance(file, bytes) else str(file)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def onnx_operators(path: Path) -> Counter[str]:
    """How often each operator stands in an ONNX file. Raises ValueError for a file that is none."""
    import onnx

    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf's own errors are of no common kind
        raise ValueError(f"{path} is no ONNX file ({error})") from error
    return Counter(node.op_type for node in graph.node)


def operators(model: nn.Module, example: Tensor) -> Counter[str]:
    """How often each operator stands in the graph that `torch.export` makes of a model in eval mode."""
    graph = torch.export.export(model, (example,)).graph
    return Counter(node.target.__name__.partition(".")[0] for node in graph.nodes if node.op == "call_function")


def onnx_bytes(model: nn.Module, example: Tensor) -> bytes:
    """A model in eval mode, in whatever form, as the content of an ONNX file for any batch size; unchecked."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"exporting needs {error.name}: pip install onnx onnxruntime onnxscript") from error
    batch = {0: torch.export.Dim("batch")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        options = {"dynamic_shapes": (batch,), "external_data": False, "verbose": False}
        torch.onnx.export(model, (example,), path, dynamo=True, **options)
        return path.read_bytes()
