"""Records of training runs: one JSON line each, with all that is needed to trust or repeat it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import dbb
from dbb.tasks import key_of
from dbb.train import Trainer

RUNS = "runs.jsonl"


def record(trainer: Trainer, folded_score: float) -> dict:
    """What a finished run was, on what, and what came of it.

    seconds and images_per_second count training, without testing, over all sittings; scores are shares of 1.
    """
    recipe, state = trainer.recipe, trainer.state
    key = key_of(recipe.as_dict())
    return {
        "recipe": recipe.as_dict(),
        "data": trainer.data_facts(),
        "images": {"train": len(trainer.train_images), "test": len(trainer.test_images)},
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        key: state.history[-1][key],
        f"folded_{key}": folded_score,
        "epochs": state.history,
        "seconds": round(state.seconds, 3),
        "images_per_second": round(recipe.epochs * len(trainer.batches) * recipe.batch_size / state.seconds, 1),
        "peak_memory_mib": _peak_memory(trainer.hardware.device),
        "processes": trainer.world,
        "device": torch.device(trainer.hardware.device).type,
        "hardware": hardware(trainer.hardware.device),
        "settings": {name: getattr(trainer.hardware, name) for name in ("precision", "channels_last", "compile")},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "dbb": dbb.__version__},
        "commit": commit(),
    }


def append(folder: Path, line: dict, name: str = RUNS) -> Path:
    """Add a record to the file `name` in `folder`, as one line, in one write; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, (json.dumps(line, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(handle)
    return path


def read(folder: Path, name: str = RUNS) -> list[dict]:
    """All records of the file `name` in `folder`, in their order; none where there is no such file."""
    path = folder / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def score_of(record: dict) -> float:
    """The score of a finished run, a share of 1: accuracy, AP or mIoU, as its task has it."""
    return record[key_of(record["recipe"])]


def hardware(device: str) -> str:
    """The device in words: the GPU's name, or the processor and the threads that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of the source tree that the package lies in, "+" behind it where files differ; None outside of git."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "."], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _peak_memory(device: str) -> float | None:
    """Of torch's allocator on a GPU; None on a CPU, where it does not count."""
    if torch.device(device).type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
