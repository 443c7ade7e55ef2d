"""One notebook as a document: read it, write it, what it says about itself, and its form for committing."""

import ast
import re
import sys
from pathlib import Path

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"}
ADDED_BY_PAPERMILL = {"injected-parameters", "papermill-error-cell-tag"}
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(path: Path):
    """Read the notebook at `path`, in the current format; ValueError for what is not a whole notebook."""
    import nbformat

    content = Path(path).read_bytes()
    try:
        notebook = nbformat.reads(content.decode(), as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat has another one for each way in which a file can be something else
        reason = str(error).strip().partition("\n")[0][:100]
        raise ValueError(f"{path} is not a whole notebook ({reason}): save it again, or take it from git") from error
    return notebook


def dump(notebook) -> str:
    """Return the text of the notebook's file, as JupyterLab writes it: sorted keys, one space of indent."""
    import nbformat

    return nbformat.writes(notebook, version=4) + "\n"


def tags(cell) -> set[str]:
    """Return the tags of a cell."""
    return set(cell["metadata"].get("tags", ()))


def code_cells(notebook) -> list:
    """Return the code cells that hold code and were written by the author; cell 3 is the third of them."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip())
    return [cell for cell in cells if not tags(cell) & ADDED_BY_PAPERMILL]


def staleness(notebook) -> str:
    """Return why the outputs are not those of one run from top to bottom in a fresh kernel; nothing where they are."""
    cells = code_cells(notebook)
    if any(output.output_type == "error" for cell in cells for output in cell.outputs):
        return "a cell failed"
    counts = [cell.execution_count for cell in cells]
    if missing := counts.count(None):
        return f"{missing} of {len(cells)} code cells did not run"
    if counts != list(range(1, len(cells) + 1)):
        return "the cells did not run once each, from top to bottom, in a fresh kernel"
    return ""


def title(notebook) -> str:
    """Return the first heading of the notebook, or nothing where it has none."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^# +(.+)$", prose, re.MULTILINE)
    return heading[1].strip() if heading else ""


def parameters(notebook, name: str) -> dict:
    """Return names and values of the cell tagged `parameters`.

    Raises ValueError where there is no such cell, more than one, or where it holds more than `name = literal`.
    """
    cells = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(cells) != 1:
        raise ValueError(f"notebook {name} has {len(cells)} cells tagged `parameters`, it needs exactly one")
    try:
        return dict(_literal(statement) for statement in ast.parse(cells[0].source).body)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"the parameters of notebook {name} must be lines `name = literal`: {error}") from error


def checks(notebook) -> int:
    """Count what the executed cells check: assert statements, and calls of functions named `assert...`."""
    executed = (cell for cell in code_cells(notebook) if cell.execution_count is not None)
    return sum(_is_check(node) for cell in executed for node in ast.walk(parse(cell.source)))


def parse(code: str) -> ast.Module:
    """Parse the code of a cell, IPython's magics included."""
    try:
        return ast.parse(code)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        return ast.parse(TransformerManager().transform_cell(code))


def normalise(notebook, root: Path | None = None):
    """Return a copy fit for committing: the same on every machine and after every run, outputs and counts kept.

    Goes: cells and metadata that papermill and JupyterLab add, timings, versions, warnings and progress bars, widgets,
    addresses of objects, and the paths of this machine (`root`, the folder of the project, becomes a dot). Solutions
    are folded away.
    """
    from nbformat import from_dict

    cells = [cell for cell in notebook.cells if not tags(cell) & ADDED_BY_PAPERMILL]
    counts = {id(cell): n for n, cell in enumerate((c for c in cells if c.get("execution_count")), start=1)}
    content = [_normal_cell(cell, counts.get(id(cell)), root) for cell in cells]
    metadata = {"kernelspec": KERNEL, "language_info": LANGUAGE}
    return from_dict({"cells": content, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def _literal(statement: ast.stmt) -> tuple[str, object]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return name, ast.literal_eval(value)
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            return name, ast.literal_eval(value)
    raise ValueError(ast.unparse(statement))


def _is_check(node: ast.AST) -> bool:
    match node:
        case ast.Assert():
            return True
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name.startswith("assert")
    return False


def _normal_cell(cell, count: int | None, root: Path | None) -> dict:
    kept = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    if "solution" in tags(cell) or cell.metadata.get("jupyter", {}).get("source_hidden"):
        kept["jupyter"] = {"source_hidden": True}  # a solution is folded away, also after somebody has looked at it
    normal = {"cell_type": cell.cell_type, "id": cell.id, "metadata": kept, "source": cell.source}
    if cell.get("attachments"):
        normal["attachments"] = cell.attachments
    if cell.cell_type == "code":
        normal |= {"execution_count": count, "outputs": _normal_outputs(cell.outputs, count, root)}
    return normal


def _normal_outputs(outputs, count: int | None, root: Path | None) -> list[dict]:
    normal: list[dict] = []
    for output in outputs:
        if output.output_type != "stream":
            normal.append(_normal_output(output, count, root))
        elif output.name == "stdout" and normal and normal[-1]["output_type"] == "stream":
            normal[-1]["text"] += _plain(output.text, root)  # how prints are cut into messages is a matter of luck
        elif output.name == "stdout":
            normal.append({"name": "stdout", "output_type": "stream", "text": _plain(output.text, root)})
    return [output for output in normal if output.get("data", True) and output.get("text", True)]


def _normal_output(output, count: int | None, root: Path | None) -> dict:
    normal = {key: value for key, value in output.items() if key != "transient"}
    if "data" in normal:
        texts = {kind: value for kind, value in output.data.items() if kind != WIDGET}
        normal["data"] = {k: _plain(v, root) if k.startswith("text/") else v for k, v in texts.items()}
    if "execution_count" in normal:
        normal["execution_count"] = count
    return normal


def _plain(text: str, root: Path | None) -> str:
    """Drop what another machine or another run would print differently."""
    text = "\n".join(line for line in text.split("\n") if "\r" not in line)  # a bar redraws itself after a return
    text = re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x...", text)
    for path, short in ((root, "."), (sys.prefix, ".venv"), (Path.home(), "~")):
        text = text.replace(str(path), short) if path else text
    return text
