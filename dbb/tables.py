"""What the tables of the ledger say in their cells: published, recorded, and how it stands, short enough to be drawn.

Each answers a text and a status of `dbb.claims`, as `dbb.plots.scoreboard` takes them; an unknown cell is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dbb import matrix
from dbb.claims import CANNOT, PENDING, Finding
from dbb.results import score_of

Cell = tuple[str, str]
Place = tuple[str, str]


def published(cell: Mapping[str, str]) -> Cell:
    """A cell of `data/paper/` with its spread."""
    return cell["value"] + (f" ± {cell['spread']}" if cell["spread"] else ""), ""


def published_gap(cells: Mapping[Place, Mapping[str, str]], one: Place, other: Place) -> Cell:
    """The difference of two published cells; nothing where one is not known."""
    values = [cells[place]["value"] for place in (one, other)]
    return (minus(f"{float(values[0]) - float(values[1]):+.2f}") if all(values) else ""), ""


def recorded_accuracy(experiment: matrix.Experiment, variant: str, records: Sequence[dict]) -> Cell:
    """Mean and spread of a variant's recorded accuracies in %, and over how many seeds; pending where there is none."""
    runs = [run for run in experiment.runs if run.variant == variant]
    found = [100 * score_of(record) for run in runs if (record := matrix.find_record(run, records))]
    if not found:
        return "", PENDING
    spread = f" ± {torch.tensor(found, dtype=torch.float64).std():.2f}" if len(found) > 1 else ""
    return f"{sum(found) / len(found):.2f}{spread}\n{len(found)} of {len(runs)} seeds", ""


def recorded_gap(finding: Finding) -> Cell:
    """What is recorded for a claim, and its status."""
    if finding.status == CANNOT:
        return "", CANNOT
    words, _, number = finding.recorded.split(" done")[0].replace(" from one seed", "").rpartition(", ")
    return minus(f"{words}\n{number}".strip()), finding.status


def minus(text: str) -> str:
    """With true minus signs."""
    return text.replace("-", "−")
