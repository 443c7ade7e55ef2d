"""What does a training step cost, in time and memory, in each form of a block? All forms in one run.

    python benchmarks/training_cost.py --list                          what can be chosen
    python benchmarks/training_cost.py --layers 64-64-56 512-512-7 --dtypes bfloat16
    python benchmarks/training_cost.py --layers --networks resnet18 --batch 64 --ways eager compiled
    python benchmarks/training_cost.py --reference PATH --results data/results/training_cost.jsonl

A step is forward, backward and SGD. The forms: "plain", a convolution and its batch norm; the block "branch" by branch,
"lean" (the same step, the default), "sampled", with that many pixels or more, or "exact sum", the same with a norm
behind the kernel (`dbb.steps`); "orepa", DBB's branches without norms but for one behind their sum, merged in every
step, which is another network; "reference", the authors' block, imported from the folder PATH that holds their
diversebranchblock.py.

A round runs every form once, in an order drawn anew, so that a busy machine is unfair to none. Printed are medians over
the rounds, the median of the rounds' ratios to plain, and memory: on a CPU what is saved for the backward pass, on a
GPU the peak of a step above what was there before it. With --results each row is also a record, a line of JSON.
On a CPU that others use, too, `--threads 1 --clock processor` counts only what the process itself computes.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import dbb
from dbb.blocks import BLOCKS, Block, ConvBlock, takes_block
from dbb.models import MODELS, build_model, input_shape
from dbb.results import commit, hardware
from dbb.steps import BranchStep, LeanStep, SampledStep, set_training_step
from dbb.verify import _saved_bytes

STEPS = {"branch": BranchStep(), "lean": LeanStep()}
STEPS |= {f"sampled {pixels}": SampledStep(pixels) for pixels in (2048, 8192)}
STEPS |= {"exact sum 2048": SampledStep(2048, exact_sum=True)}
FORMS = ("plain", *STEPS, "orepa", "reference")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


# What is measured


@dataclass(frozen=True)
class Case:
    """A layer or a network, built of plain blocks that give way to those of a form.

    inner: whether its input wants a gradient, as a layer's does and an image does not
    """

    name: str
    build: Callable[[], nn.Module]
    image: tuple[int, int, int]
    batch: int
    block: str = "dbb"
    inner: bool = False

    @property
    def forms(self) -> tuple[str, ...]:
        """Those that there are of such a block."""
        return FORMS if self.block == "dbb" else ("plain", "branch", "lean")


def layer(name: str, batch: int, stride: int = 1, groups: int = 1, block: str = "dbb") -> Case:
    """A single 3x3; its name says channels in, channels out and the height and width of its images."""
    channels, out, size = (int(number) for number in name.removeprefix(f"{block}-").split("-")[:3])
    conv = partial(ConvBlock, channels, out, 3, stride, 1, groups=groups)
    return Case(name, lambda: nn.Sequential(conv()), (channels, size, size), batch, block, inner=True)


def network(name: str) -> Case:
    """A whole network, at the size of its images."""
    image = input_shape(name)
    classes, batch = (1000, 32) if image[1] == 224 else (10, 64)
    return Case(name, lambda: build_model(name, classes, "plain"), image, batch)


SHAPES = [
    *(layer("64-64-56", 32), layer("64-128-56-s2", 32, stride=2), layer("128-128-28", 64)),
    *(layer("256-256-14", 64), layer("512-512-7", 64), layer("16-16-32", 128), layer("64-64-56-g64", 32, groups=64)),
    *(layer("acb-64-64-56", 32, block="acb"), layer("repvgg-64-64-56", 32, block="repvgg")),
]
LAYERS = {case.name: case for case in SHAPES}


# The forms


class OrepaStyle(nn.Module):
    """DBB's branches of a 3x3, scaled by channel instead of normed, merged in every step, and one norm behind the sum.

    What OREPA (CVPR 2022) does, with the branches of a DBB. Under autocast the merging, too, has few bits and is fast.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, self.groups, depthwise = stride, groups, groups == out_channels > 1
        between = in_channels * (2 if depthwise else 1)
        shapes = {"kxk": (in_channels, out_channels, 3), "second": (between, out_channels, 3)}
        shapes["first"] = (in_channels, between, 1)
        if not depthwise:  # which has no 1x1, and nothing to mix in front of its average
            shapes["average"] = shapes["1x1"] = (in_channels, out_channels, 1)
        self.kernels = nn.ParameterDict({n: nn.Conv2d(*shape, groups=groups).weight for n, shape in shapes.items()})
        self.scales = nn.Parameter(torch.ones(3 if depthwise else 4, out_channels))
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """One convolution and its norm."""
        return self.norm(F.conv2d(x, self.kernel(), None, self.stride, 1, 1, self.groups))

    def kernel(self) -> Tensor:
        """The branches as one kernel."""
        k, scales = self.kernels, self.scales[..., None, None, None]
        first = rearrange(k["first"], "(g m) i 1 1 -> g m i", g=self.groups)
        second = rearrange(k["second"], "(g o) m h w -> g (o h w) m", g=self.groups)
        both = rearrange(second @ first, "g (o h w) i -> (g o) i h w", h=3, w=3)
        kernel = scales[0] * k["kxk"] + scales[1] * both + scales[2] * k.get("average", 1) / 9
        return kernel + F.pad(scales[3] * k["1x1"], (1, 1, 1, 1)) if "1x1" in k else kernel


def in_form(case: Case, form: str, reference: Block | None = None) -> nn.Module:
    """The layer or network of a case with blocks of that form, in training mode."""
    torch.manual_seed(0)
    model = case.build().train()
    for name, block in list(model.named_modules()):
        if type(block) is ConvBlock and takes_block(max(block.spec.kernel_size)):
            model.set_submodule(name, _replacement(block, case.block, form, reference))
    blocks = any(hasattr(type(m), "training_step") for m in model.modules())
    return set_training_step(model, STEPS.get(form, BranchStep())) if blocks else model


def _replacement(old: ConvBlock, kind: str, form: str, reference: Block | None) -> nn.Module:
    s, after = old.spec, old.nonlinear or nn.Identity()
    if (s.kernel_size, s.padding, s.dilation) != ((3, 3), ((1, 1), (1, 1)), (1, 1)):
        raise ValueError(f"every form is there for 3x3 kernels with padding 1, and this is {s}")
    geometry = (s.in_channels, s.out_channels, 3, s.stride[0], 1)
    if form == "plain":
        return nn.Sequential(nn.Conv2d(*geometry, groups=s.groups, bias=False), nn.BatchNorm2d(s.out_channels), after)
    if form == "orepa":
        return nn.Sequential(OrepaStyle(s.in_channels, s.out_channels, s.stride[0], s.groups), after)
    block = reference if form == "reference" else BLOCKS[kind]
    return block(*geometry, groups=s.groups, nonlinear=old.nonlinear)


# Measuring


@dataclass(frozen=True)
class Setting:
    """How a case is run."""

    device: str
    dtype: str
    layout: str
    way: str
    clock: str = "wall"

    def autocast(self) -> torch.autocast:
        """For the forward pass; without effect in float32."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bfloat16")


def training_step(model: nn.Module, x: Tensor, setting: Setting) -> Callable[[], None]:
    """What is timed."""
    run = torch.compile(model) if setting.way == "compiled" else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    with setting.autocast(), torch.no_grad():
        grad = torch.randn_like(model(x))

    def step() -> None:
        x.grad = None
        optimizer.zero_grad()
        with setting.autocast():
            y = run(x)
        y.backward(grad)
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds of every step, by round."""
    now = CLOCKS[clock]
    for step in steps.values():  # compiles, allocates
        step()
    seconds: dict[str, list[float]] = {form: [] for form in steps}
    for _ in range(rounds):
        for form in random.sample(list(steps), len(steps)):
            start = now()
            steps[form]()
            seconds[form].append(now() - start)
    return seconds


def memory(model: nn.Module, x: Tensor, step: Callable[[], None], setting: Setting) -> dict[str, int]:
    """In bytes: what eager code saves for the backward pass; on a GPU the peak of a step above what was there."""
    if not x.is_cuda:
        with setting.autocast():
            return {"saved_bytes": _saved_bytes(model, x)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


def compare(case: Case, forms: list[str], setting: Setting, rounds: int, reference: Block | None = None) -> list[dict]:
    """A record for each form of a case, in one setting."""
    layout = LAYOUTS[setting.layout]
    # between layers autocast leaves its own dtype, while images come in float32
    dtype = torch.bfloat16 if case.inner and setting.dtype == "bfloat16" else torch.float32
    x = torch.rand(case.batch, *case.image).to(setting.device, dtype, memory_format=layout).requires_grad_(case.inner)
    models = {form: in_form(case, form, reference) for form in forms if form in case.forms}
    models = {form: model.to(setting.device, memory_format=layout) for form, model in models.items()}
    steps = {form: training_step(model, x, setting) for form, model in models.items()}
    seconds = measure(steps, rounds, setting.clock)
    facts = {"case": case.name, "block": case.block, "image": case.image, "batch": case.batch, **vars(setting)}
    facts |= {"rounds": rounds, "threads": torch.get_num_threads(), "hardware": hardware(setting.device)}
    facts["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "dbb": dbb.__version__}
    facts["commit"] = commit()
    records = []
    for form, model in models.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[form], seconds["plain"]))
        costs = {"seconds": statistics.median(seconds[form]), "ratio": ratio} | memory(model, x, steps[form], setting)
        records.append({"form": form} | costs | facts)
    return records


def table(records: list[dict]) -> str:
    """One case in one setting, a line each form."""
    first, kind = records[0], "peak" if "peak_bytes" in records[0] else "saved"
    settings = ", ".join(first[name] for name in ("device", "dtype", "layout", "way", "clock"))
    lines = [f"\n{first['case']}, batch {first['batch']}, {settings} time\n{'':14}{'step':>11} ratio {kind:>13} ratio"]
    for r in records:
        size, share = r[f"{kind}_bytes"] / 2**20, r[f"{kind}_bytes"] / first[f"{kind}_bytes"]
        lines.append(f"{r['form']:14}{1000 * r['seconds']:>8.2f} ms {r['ratio']:>5.2f} {size:>9.1f} MiB {share:>5.2f}")
    return "\n".join(lines)


# The command


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print what can be chosen, run nothing")
    parser.add_argument("--layers", nargs="*", default=["all"], metavar="NAME", help="shapes, or all; none for none")
    parser.add_argument("--networks", nargs="+", default=[], metavar="NAME", help="as build_model knows them")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="plain is always there")
    parser.add_argument("--reference", type=Path, metavar="PATH", help="folder with the authors' diversebranchblock.py")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    parser.add_argument("--devices", nargs="+", default=devices)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["channels_last"])
    parser.add_argument("--ways", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--batch", type=int, help="instead of each case's own")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for one thread on a busy machine")
    parser.add_argument("--results", type=Path, metavar="FILE", help="append the records here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    names = LAYERS if options.layers == ["all"] else options.layers
    if options.list:
        print("layers:", *LAYERS, "\nnetworks:", *MODELS, "torchvision.NAME timm.NAME\nforms:", ", ".join(FORMS))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    reference = None
    if options.reference:
        sys.path.insert(0, str(options.reference))
        reference = importlib.import_module("diversebranchblock").DiverseBranchBlock
    forms = [f for f in FORMS if f == "plain" or (f in options.forms and (f != "reference" or reference))]
    cases = [LAYERS[name] for name in names] + [network(name) for name in options.networks]
    random.seed(0)
    for case in cases:
        case = replace(case, batch=options.batch or case.batch)
        for choice in itertools.product(options.devices, options.dtypes, options.layouts, options.ways):
            records = compare(case, forms, Setting(*choice, options.clock), options.rounds, reference)
            print(table(records), flush=True)
            if options.results:
                with options.results.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
