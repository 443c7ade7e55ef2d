"""The runs behind the suite's recorded numbers: which there are, which are done, and doing the next ones.

An experiment is one recipe in several variants, each with the same seeds. A run is done when `data/results/` holds its
record; one that was cut short goes on where it stopped. Whoever has other hardware for an hour can add rows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from dbb.ablation import VARIANTS
from dbb.recipes import TrainingRecipe, recipe
from dbb.results import read, score_of
from dbb.tasks import word_of
from dbb.train import sigterm

RUNS_FOLDER = Path("build/runs")
FEWEST_SEEDS = 5  # with fewer, the scatter itself is known from almost nothing, and two seeds may agree by luck
STOPPED = 143  # what `dbb train` answers after SIGTERM
MINUTE_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Run:
    """One training run of the matrix."""

    experiment: str
    variant: str
    recipe: TrainingRecipe
    device: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name, and that of its folder."""
        return f"{self.experiment}-{self.variant}-{self.recipe.seed}"

    def command(self, root: Path, results: Path) -> list[str]:
        """The command that trains it, or goes on with it."""
        base = recipe(self.recipe.name)
        names = [f.name for f in fields(TrainingRecipe) if getattr(self.recipe, f.name) != getattr(base, f.name)]
        settings = [word for name in names for word in ("--set", f"{name}={getattr(self.recipe, name)!r}")]
        places = ["--out", str(RUNS_FOLDER / self.name), "--results", str(results), "--root", str(root)]
        start = [sys.executable, "-m", "dbb", "train", self.recipe.name]
        return [*start, "--device", self.device, *self.options, *settings, *places]


@dataclass(frozen=True)
class Experiment:
    """A recipe, in variants that change some of its values, each with all seeds.

    question: what it is to decide; device: "cpu" or "cuda"; options: of `dbb train`, further ones
    """

    name: str
    question: str
    recipe: TrainingRecipe
    variants: Mapping[str, dict]
    seeds: int
    device: str = "cuda"
    options: tuple[str, ...] = ()
    runs: tuple[Run, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Lay out the runs, seed by seed, so that pairs are complete early."""
        runs = [
            Run(self.name, variant, self.recipe.with_changes(seed=seed, **changes), self.device, self.options)
            for seed in range(self.seeds)
            for variant, changes in self.variants.items()
        ]
        object.__setattr__(self, "runs", tuple(runs))


BLOCKS = {name: {"block": name} for name in ("plain", "acb", "dbb")}
ON_GPU = ("--precision", "bfloat16", "--channels-last")
EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        # A DBB step takes 4.56 plain ones of this network (interleaved medians of CPU time on two cores, measured
        # before the first run): so "plain, as long" has 4.56 times the epochs, and the same wall-clock time.
        Experiment(
            "small_cpu",
            "does a DBB help a small ResNet, at equal epochs and at equal time?",
            recipe("cifar10_small", data="cifar10_jpeg"),
            {**BLOCKS, "plain_as_long": {"epochs": 55, "test_every": 11}},
            seeds=20,
            device="cpu",
            options=("--channels-last",),
        ),
        Experiment(
            "ablation_cpu",
            "which part of a DBB does the work?",
            recipe("cifar10_small", data="cifar10_jpeg"),
            VARIANTS,
            seeds=10,
            device="cpu",
            options=("--channels-last",),
        ),
        # At most 131072 pixels a batch and layer here, 8192 in the last stage; plain and dbb are those of small_cpu.
        Experiment(
            "sampled_cpu",
            "what do norms lose that see a sample of the batch?",
            recipe("cifar10_small", data="cifar10_jpeg"),
            {
                "plain": {"block": "plain"},
                "dbb": {"block": "dbb"},
                **{f"sampled_{n}": {"block": "dbb", "sampled_pixels": n} for n in (512, 2048, 8192)},
            },
            seeds=10,
            device="cpu",
            options=("--channels-last",),
        ),
        Experiment(
            "sampled_sum_cpu",
            "and if the sum of the branches is normalised with all pixels?",
            recipe("cifar10_small", data="cifar10_jpeg"),
            {
                "plain": {"block": "plain"},
                "dbb": {"block": "dbb"},
                "sampled_2048": {"block": "dbb", "sampled_pixels": 2048},
                "exact_sum_2048": {"block": "dbb", "sampled_pixels": 2048, "sampled_exact_sum": True},
            },
            seeds=10,
            device="cpu",
            options=("--channels-last",),
        ),
        # Backbones in one of torchvision's detectors and one of its segmenters, on generated scenes.
        *(
            Experiment(
                f"{name}_cpu",
                f"does a DBB backbone help to {name.partition('_')[2]}, at a small scale?",
                recipe(name),
                {"plain": {"block": "plain"}, "dbb": {"block": "dbb"}},
                seeds=10,
                device="cpu",
                options=("--workers", "0"),
            )
            for name in ("scenes_detect", "scenes_segment")
        ),
        Experiment(
            "small_gpu",
            "the same with all images and more epochs",
            recipe("cifar10_small", data="cifar10_jpeg", epochs=40, train_images=None, model_options={"width": 16}),
            {**BLOCKS, "plain_as_long": {"epochs": 160}},
            seeds=20,
            options=ON_GPU,
        ),
        Experiment(
            "vgg16_100_epochs",
            "the paper's CIFAR network, a sixth of the epochs",
            recipe("cifar10_vgg16", data="cifar10_jpeg", epochs=100),
            BLOCKS,
            seeds=5,
            options=ON_GPU,
        ),
        Experiment("cifar10", "Table 2, CIFAR-10", recipe("cifar10_vgg16"), BLOCKS, seeds=5, options=ON_GPU),
        Experiment("cifar100", "Table 2, CIFAR-100", recipe("cifar100_vgg16"), BLOCKS, seeds=5, options=ON_GPU),
        *(
            Experiment(name, "Table 2, ImageNet", recipe(f"imagenet_{name}"), BLOCKS, seeds=1, options=ON_GPU)
            for name in ("alexnet", "mobilenet", "resnet18", "resnet50")
        ),
    )
}


def all_runs(select: str = "") -> list[Run]:
    """The runs whose name contains `select`, in the order in which they are to be done, each once.

    Experiments share runs, such as their baselines. Raises ValueError where there is none.
    """
    selected = [run for experiment in EXPERIMENTS.values() for run in experiment.runs if select in run.name]
    runs = list({(str(run.recipe), run.device): run for run in reversed(selected)}.values())[::-1]
    if not runs:
        raise ValueError(
            f"no run has {select!r} in its name; there are {', '.join(EXPERIMENTS)}, as dbb reproduce --list"
        )
    return runs


def find_record(run: Run, records: Iterable[dict]) -> dict | None:
    """The record of that run: the same recipe on the same kind of device."""
    for record in records:
        if record["device"] == run.device and TrainingRecipe(**record["recipe"]) == run.recipe:
            return record
    return None


def state_of(run: Run, records: Sequence[dict], root: Path) -> str:
    """ "done", "started" or "pending", or what it waits for."""
    if find_record(run, records):
        return "done"
    if run.device == "cuda" and not torch.cuda.is_available():
        return "needs a GPU"
    if not _data_is_there(run.recipe.data, root):
        return f"needs {run.recipe.data} in {root}"
    return "started" if (RUNS_FOLDER / run.name / "resume.pt").exists() else "pending"


def listing(runs: Sequence[Run], results: Path, root: Path) -> Iterator[str]:
    """A line for each run: its name, recipe, block, seed, data, hardware, state and, where it is done, its accuracy."""
    records = read(results)
    for run in runs:
        r, record, state = run.recipe, find_record(run, records), state_of(run, records, root)
        score = f"{score_of(record):.2%}" if record else ""
        yield (
            f"{run.name:<34} {r.name:<19} {r.block:<12} seed {r.seed:<3} {r.epochs:>4} epochs  {r.data:<13} "
            f"{run.device:<5} {state} {score}".rstrip()
        )


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline of its experiment, over the seeds that both have; scores are shares of 1.

    mean, spread: of the variant's scores (accuracy, AP or mIoU, as the task has it), and their standard deviation
    difference, low, high: mean of the paired differences, and its 95% interval (Student's t); None below two seeds
    seconds: mean time of training, where it is known
    """

    variant: str
    seeds: int
    mean: float
    spread: float | None
    difference: float | None
    low: float | None
    high: float | None
    seconds: float | None

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval of enough seeds leaves zero out, else "undecided", or ""."""
        if self.low is None:
            return ""
        if self.seeds < FEWEST_SEEDS:
            return "undecided"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


def compare(experiment: Experiment, records: Sequence[dict], baseline: str = "plain") -> list[Comparison]:
    """Each variant of the experiment against its baseline, from the records of the seeds that all variants have."""
    found = {(run.variant, run.recipe.seed): find_record(run, records) for run in experiment.runs}
    complete = [s for s in range(experiment.seeds) if all(found[variant, s] for variant in experiment.variants)]
    if not complete:
        return []
    score = {
        v: torch.tensor([score_of(found[v, s]) for s in complete], dtype=torch.float64) for v in experiment.variants
    }
    time_taken = {v: [found[v, s]["seconds"] for s in complete] for v in experiment.variants}
    return [
        Comparison(
            variant,
            len(complete),
            values.mean().item(),
            values.std().item() if len(complete) > 1 else None,
            *(paired(values - score[baseline]) if variant != baseline else (None, None, None)),
            sum(time_taken[variant]) / len(complete),
        )
        for variant, values in score.items()
    ]


def compare_records(
    records: Sequence[dict], variant: Mapping, baseline: Mapping, value: str = "accuracy", less: str | None = None
) -> tuple[list[float], Comparison | None]:
    """Records that hold all of `variant` against those that hold all of `baseline`, paired by seed.

    value: the score, a share of 1; less: another value of the same record, to be taken from it
    Answers the differences, one a seed, and their comparison, None where there is no pair. Of two records for the same
    seed the last one counts.
    """
    scores = [
        {r["seed"]: r[value] - (r[less] if less else 0) for r in records if holds(r, wanted)}
        for wanted in (variant, baseline)
    ]
    seeds = sorted(scores[0].keys() & scores[1].keys())
    if not seeds:
        return [], None
    ours, theirs = (torch.tensor([found[seed] for seed in seeds], dtype=torch.float64) for found in scores)
    spread = ours.std().item() if len(seeds) > 1 else None
    compared = Comparison(str(variant), len(seeds), ours.mean().item(), spread, *paired(ours - theirs), None)
    return (ours - theirs).tolist(), compared


def holds(record: Mapping, wanted: Mapping) -> bool:
    """Whether a record has all the wanted values, at any depth."""
    return all(
        key in record and (holds(record[key], value) if isinstance(value, Mapping) else record[key] == value)
        for key, value in wanted.items()
    )


def summary(results: Path, select: str = "") -> str:
    """What the finished runs say, a line for each variant: score and paired difference, in percentage points."""
    records, lines = read(results), []
    for experiment in (e for e in EXPERIMENTS.values() if any(select in run.name for run in e.runs)):
        for c in compare(experiment, records):
            spread = "" if c.spread is None else f" ± {100 * c.spread:.2f}"
            paired = c.low is not None and f"  {100 * c.difference:+.2f} [{100 * c.low:+.2f}, {100 * c.high:+.2f}]"
            lines.append(
                f"{experiment.name} {c.variant}: {word_of(experiment.recipe.as_dict())} {100 * c.mean:.2f}{spread} "
                f"over {c.seeds} seeds{paired or ''}  "
                f"{c.seconds:.0f} s {c.verdict}".rstrip()
            )
    return "\n".join(lines)


def paired(differences: torch.Tensor) -> tuple[float | None, float | None, float | None]:
    """The mean of the differences, and the ends of its 95% interval."""
    from scipy.stats import t

    number, mean = len(differences), differences.mean().item()
    if number < 2:
        return mean, None, None
    reach = t.ppf(0.975, number - 1).item() * differences.std().item() / number**0.5
    return mean, mean - reach, mean + reach


def seconds(budget: str) -> float:
    """ "90s", "9m" or "2h" in seconds. Raises ValueError for anything else."""
    number, unit = budget[:-1], budget[-1:]
    try:
        return float(number) * MINUTE_UNITS[unit]
    except (KeyError, ValueError) as error:
        raise ValueError(f"the budget {budget!r} must be a number and s, m or h: say --budget 9m") from error


def reproduce(
    runs: Sequence[Run],
    budget: float,
    results: Path,
    root: Path,
    jobs: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, list[str]]:
    """Do those of the runs that this machine can and that are not done, in order, `jobs` at once, for `budget` seconds.

    What is not finished by then, or when SIGTERM comes, is stopped, its state saved, and goes on another time. Returns
    the names of the runs that are "done", "stopped" and "failed".
    """
    records = read(results)
    waiting = [run for run in runs if state_of(run, records, root) in ("started", "pending")]
    jobs = jobs or _side_by_side(waiting)
    deadline, running = time.monotonic() + budget, {}
    ended: dict[str, list[str]] = {"done": [], "stopped": [], "failed": []}
    try:
        with sigterm() as asked_to_stop:
            while (waiting or running) and time.monotonic() < deadline and not asked_to_stop.is_set():
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[_start(run, root, results, jobs)] = run
                _collect(running, ended, say)
                time.sleep(0.2)
    finally:  # in time, out of time, or interrupted: no run is left without its state saved
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
        _collect(running, ended, say)
    return ended


def _start(run: Run, root: Path, results: Path, jobs: int) -> subprocess.Popen:
    """Start a run in a process of its own, with its share of the cores; what it says goes into its folder."""
    folder = RUNS_FOLDER / run.name
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with (folder / "train.log").open("w") as log:
        return subprocess.Popen(
            run.command(root, results),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then asks the runs to stop
        )


def _collect(running: dict[subprocess.Popen, Run], ended: dict[str, list[str]], say: Callable[[str], None]) -> None:
    """Take the runs that have ended out of `running`, and tell what came of them."""
    for process in [process for process in running if process.poll() is not None]:
        run = running.pop(process)
        end = {0: "done", STOPPED: "stopped"}.get(process.returncode, "failed")
        lines = (RUNS_FOLDER / run.name / "train.log").read_text(errors="replace").strip().splitlines()
        ended[end].append(run.name)
        say(f"{end:<8} {run.name}: {lines[-1] if lines else f'exit status {process.returncode}'}")


def _side_by_side(runs: Sequence[Run]) -> int:
    """How many runs at once: one a core on a CPU; on a GPU as many of the small ones as its memory holds."""
    if not runs or runs[0].device == "cpu":
        return os.cpu_count() or 1
    if runs[0].recipe.streamed:
        return 1
    return max(1, int(torch.cuda.get_device_properties(0).total_memory / 2**30 // 10))


def _data_is_there(data: str, root: Path) -> bool:
    folders = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
    return data in ("digits", "scenes") or (root / folders.get(data, data)).exists()
