"""Break the algebra line by line, and see that the tests notice: `python -m tests.mutation [--jobs 2] [FILE ...]`.

Each mutant is one small change to `affine.py` or `fold.py`: another operator, comparison or number, a swapped branch. A
mutant that the tests do not kill is a missing test, or a change that means nothing; the list at the end says which.
"""

from __future__ import annotations

import argparse
import ast
import copy
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.broken import ROOT, copy_package, import_for_all, verdict

FILES = ("dbb/affine.py", "dbb/fold.py")
TESTS = (["tests/test_affine.py"], ["tests/test_fold.py"], ["tests/test_blocks.py", "-k", "is_forward or refused"])

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
             ast.Mod: ast.Mult}  # fmt: skip
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
               ast.Is: ast.IsNot, ast.IsNot: ast.Is}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "gcd": "max"}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every way to change this one node, with words for it."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not isinstance(node.left, ast.JoinedStr):
        other = OPERATORS[type(node.op)]
        yield f"{type(node.op).__name__} -> {other.__name__}", ast.BinOp(node.left, other(), node.right)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {other.__name__}", ast.Compare(node.left, [other()], node.comparators)
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{type(node.op).__name__} -> {other.__name__}", ast.BoolOp(other(), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield f"no {type(node.op).__name__}", node.operand
    if isinstance(node, ast.IfExp):
        yield "branches swapped", ast.IfExp(node.test, node.orelse, node.body)
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        other = not node.value if isinstance(node.value, bool) else node.value + 1
        yield f"{node.value} -> {other}", ast.Constant(other)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        other = NAMES[node.func.id]
        yield f"{node.func.id} -> {other}", ast.Call(ast.Name(other, ast.Load()), node.args, node.keywords)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, words and source of every mutant; annotations, docstrings and messages are left alone."""
    tree = ast.parse(source)
    for number, node in enumerate(ast.walk(tree)):
        for way, (words, _) in enumerate(changes(node)):
            if _is_talk(tree, node):
                continue
            broken = copy.deepcopy(tree)
            target = list(ast.walk(broken))[number]
            replacement = [new for _, new in changes(target)][way]
            yield node.lineno, words, ast.unparse(ast.fix_missing_locations(_Swap(target, replacement).visit(broken)))


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def _is_talk(tree: ast.Module, node: ast.AST) -> bool:
    """Whether the node stands in an annotation, a message, a default argument of one tap, or a type alias."""
    spans = [n for n in ast.walk(tree) if isinstance(n, (ast.JoinedStr, ast.arg, ast.AnnAssign))]
    spans += [n.returns for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.returns]
    spans += [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__repr__"]
    return any(node is inner for span in spans for inner in ast.walk(span))


def fate(file: str, source: str) -> str:
    """What comes of the tests with this source in place of the file, the quick ones first; "OK" where all pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = copy_package(Path(name))
        (folder / file).write_text(source)
        verdicts = (verdict(folder, tests) for tests in TESTS)
        return next((found for found in verdicts if found != "OK"), "OK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()

    import_for_all()
    work = [(file, *mutant) for file in chosen.files for mutant in mutants((ROOT / file).read_text())]
    if fate(chosen.files[0], (ROOT / chosen.files[0]).read_text()) != "OK":
        print("the tests fail on the unbroken code: nothing to measure")
        return 1
    alive = late = 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for (file, line, words, _), end in zip(work, pool.map(lambda job: fate(job[0], job[3]), work)):
            alive, late = alive + (end == "OK"), late + (end == "SIGALRM")
            if end in ("OK", "SIGALRM"):
                code = (ROOT / file).read_text().splitlines()[line - 1].strip()
                print(f"{'survived' if end == 'OK' else 'no end'}  {file}:{line}  {words}  |  {code}", flush=True)
    print(f"{len(work) - alive} of {len(work)} mutants killed, {late} of them since the tests did not end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
