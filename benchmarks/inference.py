"""Is the folded network as fast as the original one, and what does folding itself cost? All forms in one run.

    python benchmarks/inference.py                                     ResNet-18 and ResNet-50 at 224, batch 1
    python benchmarks/inference.py --arch timm.regnety_002 --batch 16 --ways eager onnxruntime
    python benchmarks/inference.py --device cuda --batch 64

The networks: the original one (convolutions and batch norms), the same with Diverse Branch Blocks, and that folded.
Each runs in eager mode, compiled, and in ONNX Runtime (CPU). A round times every form once, in an order drawn anew, so
that a busy machine is unfair to none; medians over the rounds are printed, and the median of the rounds' ratios to the
original network in the same way of running. The folded form has lost the norms behind its blocks, so it may be faster
than the original; "all folded" has no norm at all; "restored" is the original architecture again.

Folding, in a process of its own: seconds, and the peak of memory above what the model in training form takes already,
as a copy (which stays beside the model) and in place.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import dbb
from dbb.export import onnx_bytes, onnx_session
from dbb.models import library_model

FORMS = ("original", "training form", "folded", "all folded", "restored")
WAYS = ("eager", "compiled", "onnxruntime")


def networks(arch: str) -> dict[str, nn.Module]:
    """The network in every form, in eval mode."""
    torch.manual_seed(0)
    original = library_model(arch, 1000).eval()
    training = dbb.randomize_norms_(dbb.replace_convs(original, say=None)).eval()
    everywhere = dbb.replace_convs(training, "plain", where=lambda name, conv: True, say=None)
    return {
        "original": original,
        "training form": training,
        "folded": dbb.reparameterize(training),
        "all folded": dbb.reparameterize(everywhere),
        "restored": dbb.reparameterize(training, restore=True, say=None),
    }


def runner(model: nn.Module, way: str, x: torch.Tensor) -> Callable[[], object]:
    """What is timed: one forward pass."""
    if way == "onnxruntime":
        session = onnx_session(onnx_bytes(model, x))
        feed = {session.get_inputs()[0].name: x.numpy()}
        return lambda: session.run(None, feed)
    run = torch.compile(model) if way == "compiled" else model
    return lambda: _forward(run, x)


@torch.no_grad()
def _forward(model: Callable, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return y


def measure(runs: dict[tuple[str, str], Callable[[], object]], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of every run, by round."""
    for run in runs.values():  # compiles, allocates
        run(), run()
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def folding_cost(arch: str, device: str, inplace: bool) -> str:
    """Seconds and peak memory of folding, in a process of its own, in which nothing else has used memory."""
    call = [sys.executable, __file__, "--fold-only", arch, "--device", device, *["--inplace"] * inplace]
    # The C library would keep much of what is freed, which is then no use of folding's: give large pieces back at once.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(call, check=True, capture_output=True, text=True, env=env).stdout.strip()


def fold_once(arch: str, device: str, inplace: bool) -> str:
    """Fold the network, in a fresh process."""
    torch.manual_seed(0)
    model = dbb.replace_convs(library_model(arch, 1000), say=None).eval().to(device)
    dbb.reparameterize(nn.Sequential(dbb.DiverseBranchBlock(8, 8, 3)).eval().to(device))  # loads all that it needs
    own = sum(p.nbytes for p in model.parameters())
    before, start = reset_peak(device), time.perf_counter()
    folded = dbb.reparameterize(model, inplace=inplace)
    seconds, peak = time.perf_counter() - start, peak_bytes(device) - before
    result = sum(p.nbytes for p in folded.parameters())
    mib = [f"{number / 2**20:.0f} MiB" for number in (own, result, peak)]
    return (
        f"{arch} on {device}, {'in place' if inplace else 'as a copy'}: {seconds:.2f} s; training form {mib[0]}, "
        f"folded {mib[1]}, peak above the training form {mib[2]}: {peak / own:.2f} of it"
    )


def reset_peak(device: str) -> int:
    """Forget the largest use of memory so far; answers the use now, in bytes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status_of_process("VmRSS")


def peak_bytes(device: str) -> int:
    """The largest use of memory since it was reset."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else status_of_process("VmHWM")


def status_of_process(what: str) -> int:
    """A number of bytes that Linux knows of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def compare(arch: str, options: argparse.Namespace) -> None:
    """Print the table of one architecture."""
    x = torch.rand(options.batch, 3, options.size, options.size).to(options.device)
    forms = {name: model.to(options.device) for name, model in networks(arch).items() if name in options.forms}
    ways = [way for way in options.ways if not (way == "onnxruntime" and x.is_cuda)]
    runs = {(form, way): runner(model, way, x) for way in ways for form, model in forms.items()}
    seconds = measure(runs, options.rounds)
    print(f"\n{arch}, batch {options.batch} of {options.size}x{options.size}, {options.device}")
    print(f"{'':16}" + "".join(f"{way:>14} {'ratio':>7}" for way in ways))
    for form in forms:
        cells = []
        for way in ways:
            ratio = statistics.median(a / b for a, b in zip(seconds[form, way], seconds["original", way]))
            cells.append(f"{1000 * statistics.median(seconds[form, way]):>11.2f} ms {ratio:>7.3f}")
        print(f"{form:16}" + "".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["torchvision.resnet18", "torchvision.resnet50"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="the original is always needed")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--fold-only", metavar="NAME", help="only fold this network once, and say what it cost")
    parser.add_argument("--inplace", action="store_true", help="of --fold-only")
    options = parser.parse_args()
    if options.fold_only:
        print(fold_once(options.fold_only, options.device, options.inplace))
        return
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {threads} threads; seed 0")
    for arch in options.arch:
        for inplace in (False, True):
            print(f"folding {folding_cost(arch, options.device, inplace)}", flush=True)
    for arch in options.arch:
        compare(arch, options)


if __name__ == "__main__":
    main()
