"""The training loop: one process, or several under torchrun, on CPU or GPU; the same code for notebooks and the shell.

A run can be killed at any moment. It is resumed by the same call, and ends in the weights that it would have had: what
is random depends on seed, epoch and step alone (see `dbb.data`), the rest is in `resume.pt`, written atomically.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dbb.data import Batches, Images, load
from dbb.figures import write_atomically
from dbb.imagenet import FileBatches
from dbb.recipes import SCHEDULES, TrainingRecipe
from dbb.sampling import generator
from dbb.surgery import freeze_norms, reparameterize
from dbb.tasks import Task, key_of, word_of

RESUME, METRICS, MODEL, RECORD = "resume.pt", "metrics.jsonl", "model.safetensors", "record.json"
TEST_BATCH = 256  # a process
STEPS_BETWEEN_TALKS = 10  # of processes that train together
FORMS_AGREE = 1e-3  # in accuracy: rounding may tip an image that stands between two classes
LONG = 60  # seconds after which a run shows a bar also where no terminal is, and each bar leaves a trace
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class TrainingStoppedError(Exception):
    """Training was asked to stop; what it had reached is saved."""


class TrainingError(RuntimeError):
    """Training cannot go on; nothing was overwritten."""


@dataclass(frozen=True)
class Hardware:
    """How a run uses the machine; it changes the speed, and rounding, but not what is trained.

    precision: "float32", or "bfloat16" by autocast
    accumulate: in how many pieces a batch goes through the model
    workers: processes that decode images which are not in memory; below 0 for one a core, at most 8
    save_seconds: how often at least the state is saved, besides the end of each epoch
    """

    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    workers: int = -1
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuse a device that is not there, and a precision that is not known."""
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not known: choose from {', '.join(PRECISIONS)}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate} must be 1 or more")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={self.device!r} cannot be used here: {str(error).splitlines()[0]}") from error

    def autocast(self) -> torch.autocast:
        """The precision, as a context for a forward pass."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not None)

    def laid_out(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """The images in the memory layout of the model; a list, as detectors take it, is left to them."""
        last = self.channels_last and isinstance(images, Tensor)
        return images.contiguous(memory_format=torch.channels_last) if last else images


@dataclass
class State:
    """How far a run has come: the epoch and the step within it that come next, and what was measured."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0  # summed over the steps of this epoch
    seconds: float = 0.0  # of training, without testing, over all sittings
    history: list[dict] = field(default_factory=list)


class Trainer:
    """A recipe being trained: `Trainer(recipe, *load("digits")).run()`.

    folder: where the state is kept, and found again; None keeps none
    synchronise: what turns the model's norms into ones that all processes share; `nn.SyncBatchNorm`'s conversion on
        GPUs, and needed only with several processes
    say: takes each epoch's measurements, a dict
    tick: called after each step

    Raises ValueError for a folder that holds another run, or not the same for all processes.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        train_images: Images,
        test_images: Images,
        folder: Path | None = None,
        hardware: Hardware | None = None,
        synchronise: Callable[[nn.Module], nn.Module] | None = None,
        say: Callable[[dict], None] = lambda line: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.recipe, self.task, self.folder, self.say, self.tick = recipe, task_of(recipe), folder, say, tick
        self.hardware = hardware or Hardware()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if recipe.train_images:
            train_images = train_images.first_of_each_class(recipe.train_images)
        self.train_images, self.test_images = train_images, test_images
        self._make_batches()
        self._make_model(synchronise)
        self.state = State()
        self._resume()
        self._check_together()

    def _make_batches(self) -> None:
        mean, std = self.train_images.mean_and_std()
        recipe, hardware = self.recipe, self.hardware
        share = {"mean": mean, "std": std, "rank": self.rank, "world": self.world}
        share |= {"device": hardware.device, "size": recipe.image_size, "workers": hardware.workers}
        shuffled = {"train": True, "augmentation": recipe.augmentation, "seed": recipe.seed}
        self.batches = self.train_images.batches(recipe.batch_size, **shuffled, **share)
        self.tests = self.test_images.batches(self.task.test_batch * self.world, **share)

    def _make_model(self, synchronise: Callable[[nn.Module], nn.Module] | None) -> None:
        recipe, hardware = self.recipe, self.hardware
        torch.manual_seed(recipe.seed)
        model = recipe.build_model(len(self.train_images.classes))
        _start_backbone(model, recipe)
        if self.world > 1 and synchronise is None and hardware.device.startswith("cuda"):
            synchronise = nn.SyncBatchNorm.convert_sync_batchnorm
        model = synchronise(model) if synchronise else model
        memory = torch.channels_last if hardware.channels_last else torch.contiguous_format
        self.model = model.to(hardware.device, memory_format=memory)
        self.optimizer = torch.optim.SGD(
            parameter_groups(model, recipe), recipe.lr, recipe.momentum, nesterov=recipe.nesterov
        )
        average = get_ema_multi_avg_fn(recipe.ema) if recipe.ema else None
        self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True) if average else None
        self.trained: nn.Module = self.model
        if self.world > 1:
            ids = [torch.device(hardware.device)] if hardware.device.startswith("cuda") else None
            self.trained = nn.parallel.DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False)
        if hardware.compile:
            self.trained = torch.compile(self.trained)

    @property
    def best_model(self) -> nn.Module:
        """What is evaluated and kept: the model, or the average of its weights where the recipe has one."""
        return self.average.module if self.average else self.model

    def run(self) -> nn.Module:
        """Train to the end, from wherever the run stands, and return the trained model in eval mode.

        Raises TrainingStoppedError after SIGTERM, with the state saved, and TrainingError for a loss that is no number.
        """
        with sigterm() as asked_to_stop, self._explained():
            while self.state.epoch < self.recipe.epochs:
                self._train_epoch(asked_to_stop)
        self.trained = self.model  # as long as its reducer lives, the process group does, see `_processes`
        return self.best_model.eval()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what to do about what ends a run from outside: no memory left, a disk that takes no more."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise TrainingError(
                f"out of memory on {self.hardware.device} with batch_size={self.recipe.batch_size}: raise accumulate="
                f"{self.hardware.accumulate}, or use precision='bfloat16'; the last state saved is kept"
            ) from error
        except OSError as error:
            raise TrainingError(f"the state cannot be saved ({error}): the last one saved is kept") from error

    def _train_epoch(self, asked_to_stop: threading.Event) -> None:
        self.trained.train()
        if self.recipe.frozen_norms:
            freeze_norms(self.model.backbone)
        saved = started = time.perf_counter()
        loss = torch.tensor(self.state.loss, dtype=torch.float64, device=self.hardware.device)
        for images, targets in self.batches.epoch(self.state.epoch, self.state.step):
            loss += self._train_step(images, targets)
            self.state.step += 1
            self.tick()
            now = time.perf_counter()
            stop = self._must_stop(asked_to_stop)
            if stop or now - saved > self.hardware.save_seconds:
                self.state.loss, self.state.seconds = loss.item(), self.state.seconds + now - started
                saved = started = now
                self._save()
            if stop:
                raise TrainingStoppedError(f"stopped in epoch {self.state.epoch + 1}, step {self.state.step}")
        if self.world > 1:
            dist.all_reduce(loss)  # each process has seen its share of every batch
        self._finish_epoch(loss.item() / self.world / len(self.batches), started)

    def _must_stop(self, asked: threading.Event) -> bool:
        """Whether this process, or any other of the run, was asked to stop; all of them hear of it at the same step."""
        if self.world == 1:
            return asked.is_set()
        if self.state.step % STEPS_BETWEEN_TALKS:
            return False
        any_asked = torch.tensor(float(asked.is_set()), device=self.hardware.device)
        dist.all_reduce(any_asked, dist.ReduceOp.MAX)
        return bool(any_asked)

    def _finish_epoch(self, loss: float, started: float) -> None:
        state, recipe = self.state, self.recipe
        state.seconds += time.perf_counter() - started
        state.epoch, state.step, state.loss = state.epoch + 1, 0, 0.0
        tested = state.epoch % recipe.test_every == 0 or state.epoch == recipe.epochs
        score, test_loss = self.evaluate(self.best_model) if tested else (None, None)
        state.history.append(
            {
                "epoch": state.epoch,
                "train_loss": loss,
                "test_loss": test_loss,
                key_of(recipe.as_dict()): score,
                "lr": self.learning_rate(state.epoch * len(self.batches) - 1),
                "seconds": round(state.seconds, 3),
            }
        )
        if self.rank == 0:
            self.say(state.history[-1])
        self._save()

    def _train_step(self, images: Tensor | list, targets: Tensor | list) -> Tensor:
        """One step; answers the loss."""
        recipe, state, pieces = self.recipe, self.state, self.hardware.accumulate
        torch.manual_seed(generator(recipe.seed, state.epoch, state.step, self.rank).initial_seed())  # for dropout
        lr = self.learning_rate(state.epoch * len(self.batches) + state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        total = torch.zeros((), device=self.hardware.device)
        for x, y in zip(_in_pieces(images, pieces), _in_pieces(targets, pieces)):
            with self.hardware.autocast():
                loss = self.task.loss(self.trained, self.hardware.laid_out(x), y, recipe)
            (loss * (len(x) / len(images))).backward()
            total += loss.detach() * (len(x) / len(images))
        if recipe.largest_gradient:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.largest_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update_parameters(self.model)
        return total

    def learning_rate(self, step: int) -> float:
        """At that step of the whole run: a rise, then the schedule of the recipe."""
        per_epoch = len(self.batches)
        warmup, total = self.recipe.warmup_epochs * per_epoch, self.recipe.epochs * per_epoch
        if step < warmup:
            return self.recipe.lr * (step + 1) / warmup
        return self.recipe.lr * SCHEDULES[self.recipe.schedule]((step - warmup) / (total - warmup))

    def evaluate(self, model: nn.Module) -> tuple[float, float | None]:
        """Score and mean loss on the test images, as the task has them: accuracy for classes, see `evaluate`."""
        return self.task.evaluate(model, self.tests, self.hardware)

    # What is kept

    def _save(self) -> None:
        """Write the state, from one process; a run that has gone wrong is not written over one that had not."""
        broken = [name for name, p in self.model.named_parameters() if not p.isfinite().all()]
        if broken:
            raise TrainingError(
                f"{broken[0]} holds inf or nan in epoch {self.state.epoch + 1}: lower lr={self.recipe.lr} or raise "
                f"warmup_epochs={self.recipe.warmup_epochs}; the last good state is kept"
            )
        if self.folder is None or self.rank != 0:
            return
        content = io.BytesIO()
        torch.save(
            {
                "recipe": self.recipe.as_dict(),
                "data": self.data_facts(),
                "state": vars(self.state),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else None,
            },
            content,
        )
        write_atomically(self.folder / RESUME, content.getvalue())

    def _resume(self) -> None:
        """Take up a run that was saved in the folder."""
        if self.folder is None or not (self.folder / RESUME).exists():
            return
        path = self.folder / RESUME
        try:
            saved = torch.load(path, map_location=self.hardware.device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it to start anew") from error
        for what, own in (("recipe", self.recipe.as_dict()), ("data", self.data_facts())):
            other = [f"{key}={saved[what].get(key)!r}" for key in own if saved[what].get(key) != own[key]]
            if other:
                raise ValueError(f"{path} is of another run, with {', '.join(other)}: use another folder, or remove it")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        self.state = State(**saved["state"])

    def _check_together(self) -> None:
        """Refuse to go on where processes stand at different steps, as where a machine sees another folder."""
        if self.world == 1:
            return
        here = torch.tensor((self.state.epoch, self.state.step), device=self.hardware.device)
        places = [torch.empty_like(here) for _ in range(self.world)]
        dist.all_gather(places, here)
        found = sorted({tuple(place.tolist()) for place in places})
        if len(found) > 1:
            raise ValueError(
                f"{self.folder} holds different states for different processes, at (epoch, step) "
                f"{', '.join(map(str, found))}: give a folder that all machines see"
            )

    def data_facts(self) -> dict:
        """The name and the fingerprints of the data."""
        return {
            "name": self.train_images.name,
            "train": self.train_images.fingerprint(),
            "test": self.test_images.fingerprint(),
        }


def launch(
    recipe: TrainingRecipe,
    folder: Path,
    hardware: Hardware | None = None,
    root: str | Path = "data/cache",
    results: Path | None = None,
    tensorboard: bool = False,
) -> dict | None:
    """Train, or go on training, in `folder`; keep the model and a record there, and append the record to `results`.

    root: see `dbb.data.load`; tensorboard: write the curves for TensorBoard, too
    Under torchrun each process calls this. Returns the record, from the first process.
    """
    from tqdm import tqdm

    with _processes(hardware or Hardware()) as (hardware, first):
        train_images, test_images = task_of(recipe).load(recipe, root)
        trainer = Trainer(recipe, train_images, test_images, folder, hardware)
        done, steps = trainer.state.epoch * len(trainer.batches) + trainer.state.step, len(trainer.batches)
        about = {"desc": f"{recipe.name} {recipe.block}", "total": recipe.epochs * steps, "initial": done}
        delay = 0 if sys.stderr.isatty() else LONG
        with tqdm(**about, disable=not first, leave=False, delay=delay) as bar:
            board = _board(folder) if tensorboard and first else None
            trainer.say, trainer.tick = partial(_say, trainer, bar, board), bar.update
            model = trainer.run()
        if done == recipe.epochs * steps and (folder / RECORD).exists():
            return json.loads((folder / RECORD).read_text(encoding="utf-8"))  # it was finished before
        folded_score, _ = trainer.evaluate(reparameterize(model))
        return _keep(trainer, model, folded_score, results) if first else None


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches | FileBatches, hardware: Hardware) -> tuple[float, float]:
    """Accuracy and mean loss of a model, put into eval mode; each image counts once, over all processes."""
    model.eval()
    right, loss = (torch.zeros((), dtype=torch.float64, device=hardware.device) for _ in range(2))
    for images, labels in batches.epoch():
        with hardware.autocast():
            answers = model(hardware.laid_out(images)).float()
        right += (answers.argmax(1) == labels).sum()
        loss += F.cross_entropy(answers, labels, reduction="sum")
    if dist.is_initialized():
        dist.all_reduce(right)
        dist.all_reduce(loss)
    return (right / len(batches.data)).item(), (loss / len(batches.data)).item()


def score(
    checkpoint: Path, data: str | None = None, root: str | Path = "data/cache", hardware: Hardware | None = None
) -> dict[str, float]:
    """The score of a saved model on the test images, by form: {"training": ..., "folded": ...}.

    data: other data than the model was trained on. A file in training form is scored in both forms.
    Raises ValueError for a file, or data, that does not fit, and TrainingError where the two forms disagree.
    """
    from dbb.checkpoint import load_model

    hardware = hardware or Hardware()
    model, about = load_model(checkpoint, hardware.device)
    recipe = TrainingRecipe(**about["recipe"])
    if "normalised_by" not in about:
        raise ValueError(
            f"{checkpoint} does not say what its images were normalised by: score one of `dbb train`'s files"
        )
    task = task_of(recipe)
    _, images = task.load(recipe.with_changes(data=str(data or recipe.data)), root)
    unnamed = "authors" in about and len(images.classes) == len(about["classes"])  # their files tell only how many
    if images.classes != tuple(about["classes"]) and not unnamed:
        raise ValueError(
            f"{checkpoint} tells {len(about['classes'])} classes apart ({', '.join(about['classes'][:3])}, ...), the "
            f"data has {len(images.classes)} ({', '.join(images.classes[:3])}, ...): give data of the model's classes"
        )
    mean, std = map(torch.tensor, about["normalised_by"])
    place = {"device": hardware.device, "size": recipe.image_size, "workers": hardware.workers}
    tests = images.batches(task.test_batch, mean=mean, std=std, **place)
    scores = {about["form"]: task.evaluate(model, tests, hardware)[0]}
    if about["form"] == "training":
        scores["folded"] = task.evaluate(reparameterize(model), tests, hardware)[0]
    if max(scores.values()) - min(scores.values()) > FORMS_AGREE:
        raise TrainingError(f"{checkpoint}: the two forms disagree, {scores}: the fold must be wrong, please report it")
    return scores


def _loss(model: nn.Module, images: Tensor, labels: Tensor, recipe: TrainingRecipe) -> Tensor:
    return F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)


CLASSIFY = Task(TEST_BATCH, lambda recipe, root: load(recipe.data, root, recipe.streamed), _loss, evaluate)


def task_of(recipe: TrainingRecipe) -> Task:
    """What the recipe trains for."""
    if recipe.task == "classify":
        return CLASSIFY
    from dbb.detect import TASKS

    return TASKS[recipe.task]


def _in_pieces(batch: Tensor | list, number: int) -> list:
    """A batch in so many pieces, or fewer, as `torch.chunk` cuts it."""
    if isinstance(batch, Tensor):
        return list(batch.chunk(number))
    size = math.ceil(len(batch) / number)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _start_backbone(model: nn.Module, recipe: TrainingRecipe) -> None:
    """Load the weights that the recipe starts from; refuses frozen norms without any."""
    if recipe.starts_from:
        from dbb.detect import load_backbone

        load_backbone(model, Path(recipe.starts_from.format(block=recipe.block)), recipe.block)
    elif recipe.frozen_norms:
        raise ValueError(
            f"frozen_norms=True keeps the statistics of a trained backbone, and {recipe.name} has none: name its file "
            f"with starts_from=, or train with frozen_norms=False"
        )


def _board(folder: Path):
    """TensorBoard's writer. Raises ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("TensorBoard is not installed: pip install tensorboard, or leave out --tensorboard") from error
    return SummaryWriter(folder / "tensorboard")


def _say(trainer: Trainer, bar, board, line: dict) -> None:
    """Show the last epoch in the progress bar, and keep all of them in a file, one JSON line each."""
    about = trainer.recipe.as_dict()
    score = line[key_of(about)]
    tested = {} if score is None else {word_of(about): f"{score:.2%}"}
    bar.set_postfix(loss=f"{line['train_loss']:.3f}", **tested, refresh=False)  # shown with the next step
    lines = "".join(json.dumps(epoch) + "\n" for epoch in trainer.state.history)
    write_atomically(trainer.folder / METRICS, lines.encode())
    if board:
        for name, value in line.items():
            if name != "epoch" and value is not None:
                board.add_scalar(name, value, line["epoch"])
        board.flush()


def _keep(trainer: Trainer, model: nn.Module, folded_score: float, results: Path | None) -> dict:
    """Write down the model and what came of the run."""
    from dbb.checkpoint import save_model
    from dbb.results import append, record

    line, key = record(trainer, folded_score), key_of(trainer.recipe.as_dict())
    facts = {"data": line["data"], key: line[key], "commit": line["commit"]}
    facts["normalised_by"] = [value.tolist() for value in trainer.train_images.mean_and_std()]
    save_model(trainer.folder / MODEL, model, trainer.recipe, trainer.train_images.classes, **facts)
    if results:
        append(results, line)
    write_atomically(trainer.folder / RECORD, (json.dumps(line, indent=1) + "\n").encode())
    return line


@contextmanager
def _processes(hardware: Hardware) -> Iterator[tuple[Hardware, bool]]:
    """The processes that torchrun started, joined; the hardware of this one, and whether it is the first.

    The group ends where it is destroyed if nothing holds it any more. Its threads must not outlive that: one that lags
    behind, and gives its tensors back while Python ends, aborts the process.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield hardware, True
        return
    from torch.distributed.nn import functional  # noqa: F401 - later its defaults would be the group, and hold it

    gpu = hardware.device.startswith("cuda")
    if gpu:
        hardware = replace(hardware, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(hardware.device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield hardware, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def parameter_groups(model: nn.Module, recipe: TrainingRecipe) -> list[dict]:
    """The parameters in groups of one weight decay and one factor of the learning rate.

    "by_type": kernels and matrices decay, norms and biases do not.
    "authors": everything decays, gammas and biases too, but nothing that belongs to a depthwise convolution; biases
    learn twice as fast. (The authors' code goes by names: `depth` and `bias`.)
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    depthwise = {p for m in model.modules() if _is_depthwise(m) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if recipe.decay == "authors":
            decays, factor = parameter not in depthwise, 2.0 if name.endswith("bias") else 1.0
        else:
            decays, factor = parameter.dim() > 1, 1.0
        groups.setdefault((recipe.weight_decay if decays else 0.0, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]


def _is_depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) == getattr(module, "in_channels", None) != 1


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where signals can be caught: in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
