"""The files behind the figures: shown in a notebook, written byte-stably, listed in a manifest.

`dbb.plots` draws; this module does the input and output. A cell ends with `show(fig, "01-fold", "what it shows")`: the
reader sees the picture, and where the environment variable `DBB_FIGURES` names a folder, the file is written there.
"""

import base64
import hashlib
import io
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

DPI = 120
MANIFEST = "manifest.json"
NAME = re.compile(r"\d\d-[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True, order=True)
class Figure:
    """One drawn figure: its file name, the notebook that drew it, the hash of that notebook's code, its alt text.

    rounding: whether it shows rounding errors, and so looks another way on another processor
    """

    file: str
    notebook: str
    code: str
    alt: str
    rounding: bool = False


def show(fig, name: str, alt: str, vector: bool = False, rounding: bool = False) -> None:
    """Show `fig` as the output of this cell and close it; write it to the folder in `DBB_FIGURES`, where that is set.

    `name` is `NN-slug`, NN being the number of the notebook; `alt` says what the figure shows to who cannot see it.
    With `vector` the file is an SVG instead of a PNG (the notebook itself always holds a PNG). `rounding` says that
    the picture shows rounding errors: they differ from processor to processor, so nobody expects the same pixels.
    Raises ValueError for another pattern, another notebook's number or an empty `alt`.
    """
    from IPython.display import display
    from matplotlib import pyplot as plt

    _check(name, alt)
    file = f"{name}.{'svg' if vector else 'png'}"
    png = _render(fig, "png")  # first, always: a layout engine moves things a little each time it draws
    if folder := os.environ.get("DBB_FIGURES"):
        write_atomically(Path(folder, file), _render(fig, "svg", name) if vector else png)
    plt.close(fig)
    data = {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": alt}
    facts = {"figure": file, "alt": alt} | ({"rounding": True} if rounding else {})
    display(data, metadata={"image/png": {"alt": alt}, "dbb": facts}, raw=True)


def drawn(notebook: str, cells) -> list[Figure]:
    """List the figures that the executed `cells` of `notebook` (a name such as `01_conv_bn`) have shown.

    Raises ValueError where two cells show a figure of the same name.
    """
    code = code_hash(cells)
    outputs = (output for cell in cells for output in cell.get("outputs", ()))
    facts = [output["metadata"]["dbb"] for output in outputs if "dbb" in output.get("metadata", {})]
    return _unique([Figure(fact["figure"], notebook, code, fact["alt"], fact.get("rounding", False)) for fact in facts])


def code_hash(cells) -> str:
    """Return the SHA-256 of the code of `cells`, outputs and prose left out."""
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return sha256(code.encode())


def publish(ran: dict[str, list[Figure]], built: Path, folder: Path, everything: bool = False) -> list[str]:
    """Bring the figures just drawn from `built` into `folder`, drop stale ones, write the manifest.

    `ran` holds the figures of each notebook that ran. Stale is what those notebooks no longer draw and, with
    `everything` (all notebooks ran), whatever was not drawn. Returns the names of the files that changed.
    """
    figures = [figure for drawn_by_one in ran.values() for figure in drawn_by_one]
    others = [] if everything else [old for old in read_manifest(folder) if old.notebook not in ran]
    wanted = _unique([*figures, *(old for old in others if (folder / old.file).exists())])
    changed = [figure.file for figure in figures if _copy(built / figure.file, folder / figure.file)]
    return sorted(changed + _prune(folder, wanted) + write_manifest(folder, wanted))


def write_manifest(folder: Path, figures: list[Figure]) -> list[str]:
    """Write `folder/manifest.json`: per figure its file, hash, size, notebook, code hash and alt text, sorted.

    Raises ValueError where two notebooks draw the same name. Returns what changed: the manifest's name, or nothing.
    """
    entries = [_entry(folder, figure) for figure in sorted(_unique(figures))]
    text = json.dumps({"figures": entries}, indent=1, ensure_ascii=False) + "\n"
    path = folder / MANIFEST
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return []
    write_atomically(path, text.encode())
    return [MANIFEST]


def read_manifest(folder: Path) -> list[Figure]:
    """Read back the figures that `folder/manifest.json` lists; none where there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return [Figure(**{name: entry[name] for name in Figure.__dataclass_fields__ if name in entry}) for entry in entries]


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a kill, meets the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _check(name: str, alt: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"the figure name {name!r} must be NN-slug, small letters and digits: say '01-fold'")
    notebook = os.environ.get("DBB_NOTEBOOK", "")
    if notebook and notebook[:2] != name[:2]:
        raise ValueError(f"the figure name {name!r} must start with its notebook's number: {notebook[:2]}{name[2:]}")
    if not alt.strip():
        raise ValueError(f"the figure {name!r} needs an alt text: say in a sentence what it shows")


def _render(fig, kind: str, salt: str = "") -> bytes:
    """Draw `fig` to bytes that hold no version, no date and no random identifier."""
    from matplotlib import rc_context

    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "path", "savefig.bbox": None}):
        fig.savefig(stream, format=kind, dpi=DPI, metadata=metadata)
    return stream.getvalue()


def _unique(figures: list[Figure]) -> list[Figure]:
    owners: dict[str, Figure] = {}
    for figure in figures:
        if figure.file in owners:
            names = " and ".join(sorted({owners[figure.file].notebook, figure.notebook}))
            raise ValueError(f"the figure {figure.file} is drawn twice (by {names}): give each its own name")
        owners[figure.file] = figure
    return figures


def sha256(content: bytes) -> str:
    """Return the SHA-256 of `content` as the manifest writes it."""
    return hashlib.sha256(content).hexdigest()


def _entry(folder: Path, figure: Figure) -> dict:
    content = (folder / figure.file).read_bytes()
    return asdict(figure) | {"bytes": len(content), "sha256": sha256(content)}


def _copy(source: Path, target: Path) -> bool:
    content = source.read_bytes()
    if target.exists() and target.read_bytes() == content:
        return False
    write_atomically(target, content)
    return True


def _prune(folder: Path, wanted: list[Figure]) -> list[str]:
    files = {figure.file for figure in wanted}
    stale = [path for kind in ("png", "svg") for path in folder.glob(f"*.{kind}") if path.name not in files]
    for path in stale:
        path.unlink()
    return [path.name for path in stale]
