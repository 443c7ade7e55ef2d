"""The README's Python runs as it stands, and what it links to is there."""

from __future__ import annotations

import re

from torch import nn

from tests.broken import ROOT
from tests.test_architectures import REPLACED

README = (ROOT / "README.md").read_text()


def test_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    exec(compile("\n".join(blocks), "README.md", "exec"), names)
    assert type(names["conv"]).__name__ == "Conv2d"
    assert type(names["folded"].layer1[0].bn1) is nn.Identity
    assert "multiply-adds" in capsys.readouterr().out


def test_its_numbers_are_those_of_the_tests():
    assert f"{len(REPLACED)} networks of torchvision and timm" in README


def test_links_and_pictures_exist():
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if not t.startswith("http")]
    assert len(targets) >= 6
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_every_notebook_is_in_the_table():
    assert [p.name for p in sorted((ROOT / "notebooks").glob("*.ipynb")) if f"notebooks/{p.name}" not in README] == []


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert targets >= {"reproduce", "test", "lab", "clean-notebooks"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
