"""Cells of the tables: short, exact, and empty where nothing is known."""

from __future__ import annotations

from dbb import claims, tables
from dbb.claims import CANNOT, HOLDS, PENDING
from dbb.matrix import EXPERIMENTS
from dbb.results import read
from tests.broken import ROOT

PAPER = ROOT / "data/paper"


def test_published_cells():
    table2 = claims.paper_cells(PAPER, "table2")
    dbb, plain = ("CIFAR-10 VGG-16", "DBB"), ("CIFAR-10 VGG-16", "original")
    assert tables.published(table2[dbb]) == (f"{table2[dbb]['value']} ± {table2[dbb]['spread']}", "")
    assert tables.published(table2["ImageNet AlexNet", "DBB"]) == (table2["ImageNet AlexNet", "DBB"]["value"], "")
    gap = float(table2[dbb]["value"]) - float(table2[plain]["value"])
    assert tables.published_gap(table2, dbb, plain) == (f"+{gap:.2f}", "")
    assert tables.published_gap(table2, plain, dbb) == (f"−{gap:.2f}", "")
    ablation = claims.paper_cells(PAPER, "ablation")
    top1 = "ImageNet top-1 %"
    assert tables.published_gap(ablation, ("without_1x1", top1), ("dbb", top1)) == ("", "")  # not known


def test_recorded_cells():
    records, small = read(ROOT / "data/results"), EXPERIMENTS["small_cpu"]
    wanted = ("cifar10_small", "dbb", 12, {}, None)
    found = [
        record["test_accuracy"]
        for record in records
        for r in [record["recipe"]]
        if (r["name"], r["block"], r["epochs"], r.get("block_options", {}), r.get("sampled_pixels")) == wanted
    ]
    text, status = tables.recorded_accuracy(small, "dbb", records)
    assert len(found) >= 10 and text.startswith(f"{100 * sum(found) / len(found):.2f} ± ")
    assert text.endswith(f"\n{len(found)} of {small.seeds} seeds") and status == ""
    assert tables.recorded_accuracy(small, "dbb", records[:0]) == ("", PENDING)


def test_recorded_gaps():
    found = {f.claim.id: f for f in claims.evaluate(ROOT, claims.ledger(ROOT))}
    text, status = tables.recorded_gap(found["small"])
    assert status == HOLDS and text == tables.minus(found["small"].recorded.replace(", 10 seeds", "\n10 seeds"))
    assert tables.recorded_gap(found["coco"]) == ("", CANNOT)
    assert tables.recorded_gap(found["cifar10"]) == ("0 of 10 runs", PENDING)
