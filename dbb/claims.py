"""The ledger: every statement of weight, evaluated anew from what is computed now, recorded, or published.

`data/claims.toml` says what is claimed and how it stood, `data/paper/` what was published, `data/results/` what was
measured. No recorded value is typed: each is computed from the records here.
"""

from __future__ import annotations

import copy
import csv
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from dbb import matrix
from dbb.figures import write_atomically
from dbb.matrix import FEWEST_SEEDS
from dbb.results import read
from dbb.steps import BranchStep, LeanStep, SampledStep

HOLDS, DIFFERS, UNDECIDED, PENDING, CANNOT = STATUSES = (
    "holds",
    "differs",
    "undecided",
    "pending",
    "cannot be tested here",
)
KINDS = ("check", "notebooks", "experiment", "paired", "cannot")
SECTION = "<!-- written by `dbb claims --update` -->"


@dataclass(frozen=True)
class Claim:
    """One statement, as the ledger has it.

    published: the published difference in percentage points (or points of AP or mIoU), where it is known
    direction: the sign that is claimed
    """

    id: str
    says: str
    paper: str
    status: str
    entry: dict
    published: float | None
    direction: int

    @property
    def kind(self) -> str:
        """How it is evaluated: one of `KINDS`."""
        return next(kind for kind in KINDS if kind in self.entry)

    @property
    def comparable(self) -> bool:
        """Whether the published value is of the same network and data, so that its size counts, not only its sign."""
        return self.entry.get("comparable", True)

    @property
    def published_words(self) -> str:
        """The published value as it is shown; nothing where it is not known."""
        if self.published is None:
            return ""
        return f"{self.published:+.2f}" + ("" if self.comparable else ", of another network")


@dataclass(frozen=True)
class Finding:
    """What became of a claim: its status now, and in words what that rests on."""

    claim: Claim
    status: str
    recorded: str

    @property
    def broken(self) -> bool:
        """Whether it was recorded as holding and does not any more."""
        return self.claim.status == HOLDS != self.status


def ledger(root: Path) -> list[Claim]:
    """All claims of `data/claims.toml` under `root`.

    Raises ValueError for an entry that lacks something, is evaluated in no way or in two, or cites an unknown cell.
    """
    path = root / "data/claims.toml"
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["claim"]
    claims = [_claim(entry, root / "data/paper") for entry in entries]
    ids = [claim.id for claim in claims]
    if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
        raise ValueError(f"{path} has two claims with the id {', '.join(twice)}: give each its own")
    return claims


def evaluate(root: Path, claims: list[Claim]) -> list[Finding]:
    """Each claim against what is there now."""
    records = read(root / "data/results")
    ways: dict[str, Callable[[Claim], tuple[str, str]]] = {
        "check": lambda claim: CHECKS[claim.entry["check"]](root),
        "notebooks": lambda claim: _ran(root, claim.entry["notebooks"]),
        "experiment": lambda claim: _compared(claim, records),
        "paired": lambda claim: _paired(claim, root),
        "cannot": lambda claim: (CANNOT, claim.entry["cannot"]),
    }
    return [Finding(claim, *ways[claim.kind](claim)) for claim in claims]


def paper_cells(folder: Path, file: str) -> dict[tuple[str, str], dict[str, str]]:
    """The cells of one file of `data/paper/`, by row and column; an unknown value is an empty string."""
    with (folder / f"{file}.csv").open(newline="", encoding="utf-8") as lines:
        return {(cell["row"], cell["column"]): cell for cell in csv.DictReader(lines)}


def judge(low: float | None, high: float | None, published: float | None, direction: int) -> str:
    """The status of a measured difference, from its 95% interval.

    It holds where the interval leaves zero out on the claimed side, differs where it does on the other side or where
    it excludes the published value without excluding zero, and is undecided where it holds both.
    """
    if low is None or high is None:
        return UNDECIDED
    if low > 0 or high < 0:
        return HOLDS if (low > 0) == (direction > 0) else DIFFERS
    return DIFFERS if published is not None and not low <= published <= high else UNDECIDED


def table(findings: list[Finding]) -> str:
    """The ledger for a terminal: status, id, published and recorded, what is said."""
    wide, name = max(len(f.status) for f in findings), max(len(f.claim.id) for f in findings)
    lines = []
    for finding in findings:
        claim = finding.claim
        changed = f"  (was: {claim.status})" if finding.status != claim.status else ""
        lines.append(f"{finding.status:<{wide}}  {claim.id:<{name}}  {claim.says}{changed}")
        published = f"published {claim.published_words}; " if claim.published_words else ""
        lines.append(f"{'':<{wide}}  {'':<{name}}  {published}{finding.recorded}")
    return "\n".join(lines)


def markdown(findings: list[Finding]) -> str:
    """The findings on what training brings, as the README shows them."""
    head = "| Claim | Published | Recorded here, mean and 95 % interval | Status |\n|---|---|---|---|"
    rows = [
        f"| {f.claim.says} (`{f.claim.id}`) | {f.claim.published_words} | "
        f"{f.recorded if f.status != PENDING else ''} | {f.status} |"
        for f in findings
        if f.claim.kind == "experiment" and (f.status != PENDING or f.claim.paper == "Table 2")
    ]
    return "\n".join([head, *rows])


def update(root: Path, findings: list[Finding]) -> list[str]:
    """Write the statuses into the ledger and the table into README.md; answers the files that changed."""
    changed = []
    for path, text in (
        (root / "data/claims.toml", _with_statuses((root / "data/claims.toml").read_text(), findings)),
        (root / "README.md", _with_section((root / "README.md").read_text(), markdown(findings))),
    ):
        if text != path.read_text():
            write_atomically(path, text.encode())
            changed.append(str(path.relative_to(root)))
    return changed


def _with_statuses(text: str, findings: list[Finding]) -> str:
    for finding in findings:
        entry = rf'(\[\[claim\]\]\nid = "{re.escape(finding.claim.id)}"\n(?:(?!\[\[claim\]\]).*\n)*?status = )"[^"]*"'
        text = re.sub(entry, rf'\1"{finding.status}"', text)
    return text


def _with_section(text: str, section: str) -> str:
    before, _, rest = text.partition(SECTION)
    _, _, after = rest.partition(SECTION)
    return f"{before}{SECTION}\n\n{section}\n\n{SECTION}{after}"


def _claim(entry: dict, paper: Path) -> Claim:
    missing = [name for name in ("id", "says", "paper", "status") if name not in entry]
    if missing or entry["status"] not in STATUSES:
        raise ValueError(f"the claim {entry} lacks {missing or 'a status out of ' + ', '.join(STATUSES)}")
    if sum(kind in entry for kind in KINDS) != 1:
        raise ValueError(f"the claim {entry['id']!r} must have one of {', '.join(KINDS)}: that is how it is evaluated")
    for kind, known in (("check", CHECKS), ("experiment", matrix.EXPERIMENTS)):
        if entry.get(kind) not in (None, *known):
            raise ValueError(f"the claim {entry['id']!r} has {kind} {entry[kind]!r}: there are {', '.join(known)}")
    published = _published(entry, paper)
    direction = entry.get("direction") or (1 if published is None or published > 0 else -1)
    return Claim(*(entry[name] for name in ("id", "says", "paper", "status")), entry, published, direction)


def _published(entry: dict, paper: Path) -> float | None:
    """The published difference between two cells."""
    cite = entry.get("published")
    if cite is None:
        return None
    cells = paper_cells(paper, cite["file"])
    places = [(cite["row"], cite["column"]), (cite["row"], cite["against"]), (cite["against"], cite["column"])]
    found = [place for place in places if place in cells]
    if len(found) != 2 or found[0] != places[0]:
        raise ValueError(f"the claim {entry['id']!r} cites {cite}, which is not in data/paper/{cite['file']}.csv")
    values = [cells[place]["value"] for place in found]
    return round(float(values[0]) - float(values[1]), 4) if all(values) else None


# How each kind is evaluated: status, and what it rests on


def _compared(claim: Claim, records: list[dict]) -> tuple[str, str]:
    """A variant against a baseline, over the seeds that both have."""
    experiment = matrix.EXPERIMENTS[claim.entry["experiment"]]
    variant, baseline = claim.entry["variant"], claim.entry["baseline"]
    pair = replace(experiment, variants={name: experiment.variants[name] for name in (baseline, variant)})
    compared = matrix.compare(pair, records, baseline)
    if not compared:
        done = sum(matrix.find_record(run, records) is not None for run in pair.runs)
        return PENDING, f"{done} of {len(pair.runs)} runs done, {_waits_for(experiment)}"
    return _judged(claim, compared[-1])


def _judged(claim: Claim, result: matrix.Comparison) -> tuple[str, str]:
    """What a comparison makes of a claim, in percentage points."""
    published = claim.published if claim.comparable else None
    low, high = (None if end is None else 100 * end for end in (result.low, result.high))
    interval = "no interval from one seed" if low is None else f"[{low:+.2f}, {high:+.2f}]"
    words = f"{100 * result.difference:+.2f} {interval}, {result.seeds} seeds"
    if result.seeds < FEWEST_SEEDS:
        return UNDECIDED, f"{words}: too few to decide"
    return judge(low, high, published, claim.direction), words


def pairs(claim: Claim, root: Path) -> tuple[list[float], matrix.Comparison | None]:
    """What a claim of kind "paired" rests on: differences by seed, in percentage points, and their comparison.

    These are other records than those of the matrix, a variant against a baseline, over the seeds that both have.
    """
    about = {**claim.entry["paired"]}
    differences, found = matrix.compare_records(read(root / "data/results", about.pop("file")), **about)
    return [100 * difference for difference in differences], found


def _paired(claim: Claim, root: Path) -> tuple[str, str]:
    _, found = pairs(claim, root)
    if found is None:
        return PENDING, "no pair of records"
    return _judged(claim, found)


def _waits_for(experiment: matrix.Experiment) -> str:
    place = "a GPU" if experiment.device == "cuda" else "time on a CPU"
    return f"waits for {place} and {experiment.recipe.data}: dbb reproduce --select {experiment.name}-"


def _ran(root: Path, numbers: list[str]) -> tuple[str, str]:
    """Notebooks whose assertions are the claim: they hold while every cell ran, and none with an error."""
    from dbb import notebook

    sound = True
    for number in numbers:
        (path,) = (root / "notebooks").glob(f"{number}_*.ipynb")
        cells = [cell for cell in notebook.read(path).cells if cell.cell_type == "code"]
        errors = [out for cell in cells for out in cell.outputs if out.output_type == "error"]
        sound &= not errors and all(cell.execution_count for cell in cells)
    return (HOLDS if sound else DIFFERS), f"asserted in notebooks {', '.join(numbers)}"


# Checks that compute a claim now


def fold_is_exact(root: Path) -> tuple[str, str]:
    """The largest error of a fold over kinds of geometry, in float64."""
    from dbb import DiverseBranchBlock, assert_equivalent, randomize_norms_

    torch.manual_seed(0)
    errors = []
    for geometry in ({}, {"stride": 2}, {"groups": 4}, {"dilation": 2, "padding": 2}, {"kernel_size": 5, "padding": 2}):
        block = DiverseBranchBlock(4, 4, **{"kernel_size": 3, "padding": 1} | geometry)
        block = randomize_norms_(block).double().eval()
        errors.append(assert_equivalent(block, block.fuse(), torch.randn(2, 4, 17, 19, dtype=torch.float64), 1.0))
    return _exact(errors)


def folded_is_the_plain_network(root: Path) -> tuple[str, str]:
    """Shapes of all tensors, and multiply-adds, of a folded network and a plain one."""
    from dbb import reparameterize
    from dbb.models import build_model

    shapes, macs = [], []
    for block in ("plain", "dbb"):
        folded = reparameterize(build_model("small_resnet", 10, block, width=8).eval())
        shapes.append({name: tuple(tensor.shape) for name, tensor in folded.state_dict().items()})
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            folded(torch.rand(1, 3, 32, 32))
        macs.append(counter.get_total_flops() // 2)
    same = shapes[0] == shapes[1] and macs[0] == macs[1] > 0
    words = f"{len(shapes[0])} tensors of the same names and shapes, {macs[0]:,} multiply-adds"
    return (HOLDS if same else DIFFERS), words


def zero_padding_is_not_exact(root: Path) -> tuple[str, str]:
    """A sequence that pads its second convolution with zeros, against the merge of its parts: the border differs."""
    from dbb import fold
    from dbb.blocks import ConvSpec, pointwise_conv_norm
    from dbb.verify import randomize_norms_

    torch.manual_seed(0)
    branch = randomize_norms_(pointwise_conv_norm(ConvSpec.of(3, 4, 3, padding=1))).double().eval()
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        naive = branch.bn(torch.nn.functional.conv2d(branch.pointwise.prefix(x), branch.conv.weight, padding=1))
        wrong = (naive - fold(branch)(x)).abs()
        right = (branch(x) - fold(branch)(x)).abs().max()
    inside = wrong[..., 1:-1, 1:-1].max()
    holds = max(inside, right) < 1e-10 < 1e-3 < wrong.max()
    return (HOLDS if holds else DIFFERS), "zeros are wrong at the border and only there; the prefix's answer is right"


def norms_are_nonlinear_in_training(root: Path) -> tuple[str, str]:
    """What twice the input gives, in training and in eval mode, in a branch with a norm."""
    from dbb.blocks import ConvSpec, conv_norm

    torch.manual_seed(0)
    branch, x = conv_norm(ConvSpec.of(3, 4, 3)).double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        training = torch.allclose(branch(2 * x), 2 * branch(x))
        linear = torch.allclose(branch.eval()(2 * x), 2 * branch(x) - branch(0 * x))
    holds = linear and not training
    return (HOLDS if holds else DIFFERS), "twice the input is not twice the answer in training; it is, folded"


def lean_step_is_the_training_step(root: Path) -> tuple[str, str]:
    """Output and gradients of one training step, branch by branch and from the moments of the input, in float64."""
    return _steps_agree("running", LeanStep(always=True))


def full_sample_is_the_training_step(root: Path) -> tuple[str, str]:
    """The same for one folded kernel, where the sample is the batch and the border takes the batch's statistics."""
    return _steps_agree("batch", SampledStep(10**9, always=True))


def codes_trained_with_are_deployed(root: Path) -> tuple[str, str]:
    """A training step with rounded equivalent kernels, then the folded network's codes, for every kind of block."""
    from dbb.blocks import BLOCKS
    from dbb.models import build_model
    from dbb.quantize import Grid, convert_qat, prepare_qat, trained_codes
    from dbb.verify import randomize_norms_

    torch.manual_seed(0)
    other, codes = 0, 0
    for block, grid in ((block, grid) for block in BLOCKS for grid in (Grid(8), Grid(3, False))):
        model = prepare_qat(randomize_norms_(build_model("digits_net", 10, block, width=4)), grid).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        deployed = [m.weight for m in convert_qat(model).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
        for trained, weight in zip(trained_codes(model).values(), deployed, strict=True):
            other, codes = other + int((trained != grid.codes(weight)).sum()), codes + trained.numel()
    return (DIFFERS if other else HOLDS), f"{other} of {codes:,} codes are others"


def _steps_agree(border: str, step: Callable) -> tuple[str, str]:
    from dbb import DiverseBranchBlock, randomize_norms_, set_training_step

    torch.manual_seed(0)
    errors = []
    for geometry in ({}, {"stride": 2}, {"groups": 4}, {"groups": 2, "kernel_size": 5, "padding": 2}):
        options = {"kernel_size": 3, "padding": 1, "border": border, "dtype": torch.float64} | geometry
        block = randomize_norms_(DiverseBranchBlock(4, 4, **options)).train()
        # copies, as a step moves the running statistics
        ways = [set_training_step(copy.deepcopy(block), way) for way in (BranchStep(), step)]
        errors.append(_step_error(*((own, own.parameters()) for own in ways)))
    return _exact(errors)


def frozen_step_is_one_convolution(root: Path) -> tuple[str, str]:
    """Output and gradients of one training step with frozen norms, by branches and by the equivalent kernel."""
    from dbb import DiverseBranchBlock, freeze_norms, randomize_norms_, set_training_step

    torch.manual_seed(0)
    errors = []
    for geometry in ({}, {"stride": 2}, {"groups": 4}, {"groups": 2, "kernel_size": 5, "padding": 2}):
        options = {"kernel_size": 3, "padding": 1, "dtype": torch.float64} | geometry
        block = freeze_norms(randomize_norms_(DiverseBranchBlock(4, 4, **options)).train())
        learned = [p for p in block.parameters() if p.requires_grad]
        errors.append(_step_error((set_training_step(block, BranchStep()), learned), (block.equivalent(), learned)))
    return _exact(errors)


def _step_error(*ways: tuple[Callable[[torch.Tensor], torch.Tensor], Iterable[torch.Tensor]]) -> float:
    """How far two ways of one training step, each with its parameters, are apart in output and gradients; relative."""
    seen = []
    for way, parameters in ways:
        x = torch.ones(2, 4, 17, 19, dtype=torch.float64).cumsum(2).sin().requires_grad_()
        y = way(x)
        gradients = torch.autograd.grad((y * y.detach().cos()).sum(), [x, *parameters])
        seen.append(torch.cat([t.flatten() for t in (y.detach(), *gradients)]))
    return ((seen[0] - seen[1]).abs().max() / seen[0].abs().max()).item()


def _exact(errors: list[float]) -> tuple[str, str]:
    """Whether errors in float64 are those of rounding."""
    return (HOLDS if max(errors) < 1e-10 else DIFFERS), f"off by less than {_power_of_ten(max(errors))} in float64"


def average_at_stride_2(root: Path) -> tuple[str, str]:
    """The scale of the 1x1-AVG branch against its block's mean, at both strides, in the networks that are kept."""
    from dbb.checkpoint import load_model

    paths = sorted((root / "data/trained").glob("small_cpu-dbb-*-training.safetensors"))
    networks = [load_model(path)[0] for path in paths]
    one, two = (torch.tensor([_scale_of_average(model, stride) for model in networks]).double() for stride in (1, 2))
    gain, low, high = matrix.paired(two - one)
    words = (
        f"{gain:+.2f} of its block's mean scale at stride 2 against stride 1, in {len(networks)} network (notebook 10)"
    )
    return (judge(low, high, None, 1) if len(networks) >= FEWEST_SEEDS else UNDECIDED), words


def _scale_of_average(model: torch.nn.Module, stride: int) -> float:
    """The 1x1-AVG branch's scaling factors over the mean of its block's, averaged over the blocks of that stride."""
    from dbb.blocks import DiverseBranchBlock

    shares = []
    for block in (m for m in model.modules() if isinstance(m, DiverseBranchBlock) and m.stride[0] == stride):
        scales = {name: branch.bn.weight.abs().mean().item() for name, branch in block.branches.named_children()}
        shares.append(scales["1x1_avg"] / (sum(scales.values()) / len(scales)))
    return sum(shares) / len(shares)


CHECKS: dict[str, Callable[[Path], tuple[str, str]]] = {
    check.__name__: check
    for check in (
        fold_is_exact,
        folded_is_the_plain_network,
        zero_padding_is_not_exact,
        norms_are_nonlinear_in_training,
        average_at_stride_2,
        lean_step_is_the_training_step,
        full_sample_is_the_training_step,
        frozen_step_is_one_convolution,
        codes_trained_with_are_deployed,
    )
}


def _power_of_ten(value: float) -> str:
    """The next power of ten above a value: rounding differs from machine to machine."""
    return f"1e{int(torch.tensor(value).clamp_min(1e-300).log10().ceil())}"
