"""The command `dbb`: thin, every line of work is in the package."""

import argparse
import os
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  dbb list                               the notebooks, and when each last ran
  dbb run                                run all of them, quick profile: CPU, offline, minutes
  dbb run 01 09                          two of them, by number
  dbb run verify --set seed=3            by a part of the name, with another seed
  dbb run --profile gpu --jobs 1         the same cells at the size that a GPU can do
  dbb run 01 --update                    and keep the outputs in notebooks/
  dbb figures                            run all, redraw figures/ and its manifest
  dbb figures --update                   both, before a commit
  dbb clean                              bring notebooks that you saved in JupyterLab to their committed form
  dbb clean --check 01 path/to/a.ipynb   change nothing, only say which are not in it
  dbb train digits --block dbb           train a recipe, in seconds on a CPU; again: go on, or say what came of it
  dbb train cifar10_vgg16 --block dbb --device cuda --precision bfloat16 --set epochs=100
  dbb eval build/runs/digits-dbb-0/model.safetensors
  dbb verify build/runs/digits-dbb-0/model.safetensors   is the folded model the same model? block by block
  dbb verify --arch torchvision.resnet50                 the same for a network with random statistics
  dbb convert trained.safetensors folded.safetensors     fold; the authors' .pth files are read as they are
  dbb convert ResNet-18_DBB_7101.pth plain.pth --restore weights that load strictly into torchvision's resnet18()
  dbb export trained.safetensors model.onnx              fold, write ONNX, compare with ONNX Runtime
  dbb inspect FILE                                       which model, which form, and what can be done with it
  dbb reproduce --list                   the runs behind the recorded numbers, done and pending
  dbb claims                             what the suite claims, and how each claim stands by the records
  dbb reproduce --budget 9m              do the next ones that this machine can, for nine minutes

Executed notebooks go to build/notebooks/, a report to read goes to build/report/index.html.
"""


CHECKPOINT = "a file of `dbb train` or `dbb convert`, or a .pth file of the authors"
SIZE = "height and width of the images (default the model's)"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 fine, 1 something failed, 2 a wrong call, 130 interrupted."""
    options = parser().parse_args(arguments)
    try:
        return options.action(options)
    except ValueError as error:
        print(f"dbb: {error}", file=sys.stderr)
        return 2
    except ImportError as error:  # of a package that only some commands need
        print(f"dbb: this command needs {error.name}: pip install {error.name}", file=sys.stderr)
        return 2
    except AssertionError as error:  # two forms of a model that should agree do not
        print(f"dbb: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("dbb: interrupted; notebooks that had not ended are as they were", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, which the site shows, too."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = argparse.ArgumentParser("dbb", description="Run the notebooks of the suite, train networks.", **layout)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="run notebooks through papermill, write a report", **layout)
    _add_selection(run)
    run.add_argument("--profile", default="quick", help="quick (default), gpu or paper")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a parameter; may be repeated")
    run.set_defaults(action=_run)
    figures = commands.add_parser("figures", help="run notebooks, redraw figures/ and its manifest", **layout)
    _add_selection(figures)
    figures.set_defaults(action=_figures)
    clean = commands.add_parser("clean", help="bring saved notebooks to their committed form", **layout)
    clean.add_argument(
        "names", nargs="*", metavar="NAME", help="number, part of the name, or file; all if none is given"
    )
    clean.add_argument("--check", action="store_true", help="change nothing; exit status 1 if one is not clean")
    clean.set_defaults(action=_clean)
    train = commands.add_parser("train", help="train a recipe; the same call goes on after a stop", **layout)
    _add_training(train)
    train.set_defaults(action=_train)
    score = commands.add_parser("eval", help="score a trained model in both forms", **layout)
    score.add_argument("checkpoint", type=Path, help=CHECKPOINT)
    score.add_argument("--data", help="other data than it was trained on: digits, cifar10, cifar100 or a folder")
    score.add_argument("--root", default="data/cache", help="where downloads are kept (default data/cache)")
    score.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    score.set_defaults(action=_eval)
    _add_files(commands, layout)
    again = commands.add_parser("reproduce", help="do the next runs of the matrix, or list them", **layout)
    again.add_argument("--list", action="store_true", help="only list them: done, pending, and what they wait for")
    again.add_argument("--budget", default="9m", metavar="TIME", help="as 90s, 9m (default) or 2h; then stop cleanly")
    again.add_argument("--select", default="", metavar="TEXT", help="only runs with this in their name")
    again.add_argument(
        "--jobs", type=int, metavar="N", help="how many at once (default: one a core, or what a GPU holds)"
    )
    again.add_argument("--results", type=Path, default=Path("data/results"), help="where records are kept")
    again.add_argument("--root", type=Path, default=Path("data/cache"), help="where data sets are kept")
    again.set_defaults(action=_reproduce)
    claims = commands.add_parser(
        "claims", help="evaluate every claim anew; exit status 1 if one holds no more", **layout
    )
    claims.add_argument("--update", action="store_true", help="write the statuses, and the table in README.md")
    claims.set_defaults(action=_claims)
    commands.add_parser("list", help="list the notebooks and when each last ran").set_defaults(action=_list)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="number or part of the name; all where none is given")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at once (default 2)")
    parser.add_argument("--update", action="store_true", help="keep the outputs in notebooks/ (quick profile only)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="its name in dbb/recipes.py")
    parser.add_argument("--block", help="plain, acb, dbb or repvgg")
    parser.add_argument(
        "--data", help="digits, cifar10, cifar100 or a folder with train/ and test/, as PATH or NAME=PATH"
    )
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the recipe")
    parser.add_argument("--out", type=Path, help="folder of the run (default build/runs/RECIPE-BLOCK-SEED)")
    parser.add_argument("--results", type=Path, help="folder whose runs.jsonl gets the record, too (default none)")
    parser.add_argument("--root", default="data/cache", help="where downloads are kept (default data/cache)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    parser.add_argument("--precision", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=-1, metavar="N", help="that decode images (default one a core)")
    parser.add_argument("--tensorboard", action="store_true", help="write the curves for TensorBoard, too")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="send each batch through in N pieces")


def _add_files(commands, layout: dict) -> None:
    convert = commands.add_parser("convert", help="fold a trained model into another file", **layout)
    convert.add_argument("source", type=Path, metavar="IN", help=CHECKPOINT)
    convert.add_argument("target", type=Path, metavar="OUT", help=".safetensors, or .pth for the weights alone")
    convert.add_argument("--restore", action="store_true", help="back to the architecture before replace_convs")
    convert.set_defaults(action=_convert)
    verify = commands.add_parser(
        "verify", help="prove that folding changes no answer; exit status 1 if it does", **layout
    )
    chosen = verify.add_mutually_exclusive_group(required=True)
    chosen.add_argument("checkpoint", type=Path, nargs="?", help=f"{CHECKPOINT}, in training form")
    chosen.add_argument(
        "--arch", metavar="NAME", help="instead: a model of dbb/models.py, torchvision.NAME or timm.NAME"
    )
    verify.add_argument("--block", default="dbb", help="of --arch: plain, acb, dbb (default) or repvgg")
    verify.add_argument("--seed", type=int, default=0, help="of --arch: of its weights and statistics (default 0)")
    verify.add_argument("--size", type=int, metavar="PIXELS", help=SIZE)
    verify.set_defaults(action=_verify)
    export = commands.add_parser("export", help="fold a model and write it as ONNX, checked", **layout)
    export.add_argument("checkpoint", type=Path, metavar="MODEL", help=CHECKPOINT)
    export.add_argument("target", type=Path, metavar="OUT.onnx")
    export.add_argument("--size", type=int, metavar="PIXELS", help=SIZE)
    export.set_defaults(action=_export)
    inspect = commands.add_parser("inspect", help="say what a file of a model is", **layout)
    inspect.add_argument("file", type=Path, help=f"{CHECKPOINT}, or an .onnx file")
    inspect.set_defaults(action=_inspect)


def _convert(options: argparse.Namespace) -> int:
    from dbb.checkpoint import convert, describe

    about = convert(options.source, options.target, options.restore)
    _say(f"{options.target}: {describe(about)}; answers as {options.source} does")
    if options.restore:
        _say("its batch norms only add the biases: for inference, or for finetuning with frozen norms")
    return 0


def _verify(options: argparse.Namespace) -> int:
    import torch

    from dbb.checkpoint import as_graph, describe, example_input, load_model
    from dbb.surgery import reparameterize
    from dbb.verify import assert_equivalent, report

    model, about = _random_model(options) if options.arch else load_model(options.checkpoint)
    if about["form"] != "training":
        raise ValueError(f"{options.checkpoint} is in {about['form']} form, without branches: give the training form")
    _say(describe(about))
    model, x = as_graph(model, about), example_input(about, size=options.size)
    _say(str(report(model, x)))
    for dtype in (torch.float32, torch.float64):
        model, x = model.to(dtype), x.to(dtype)
        error = assert_equivalent(model, reparameterize(model), x)
        _say(f"the whole model in {str(dtype).removeprefix('torch.')}: off by {error:.1e} of the largest answer")
    return 0


def _random_model(options: argparse.Namespace):
    """A model with random weights and statistics, to be verified, and what is said about it."""
    import torch

    from dbb.models import build_model
    from dbb.verify import randomize_norms_

    torch.manual_seed(options.seed)
    classes = [str(number) for number in range(10)]
    recipe = {"model": options.arch, "block": options.block, "model_options": {}}
    model = randomize_norms_(build_model(options.arch, len(classes), options.block)).eval()
    return model, {"recipe": recipe, "classes": classes, "form": "training"}


def _export(options: argparse.Namespace) -> int:
    from dbb.checkpoint import as_graph, describe, example_input, load_model
    from dbb.export import export_onnx, onnx_operators
    from dbb.surgery import reparameterize

    model, about = load_model(options.checkpoint)
    folded = as_graph(reparameterize(model), about)
    error = export_onnx(folded, options.target, example_input(about, size=options.size))
    counts = ", ".join(f"{number} {name}" for name, number in onnx_operators(options.target).most_common())
    _say(f"{options.target}: {describe(about | {'form': 'folded'})}\n  {counts}")
    _say(f"  ONNX Runtime differs by {error:.1e} of the largest answer")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from dbb.checkpoint import inspect_file

    _say(inspect_file(options.file))
    return 0


def _train(options: argparse.Namespace) -> int:
    from dbb.recipes import recipe
    from dbb.suite import parse_settings
    from dbb.tasks import key_of, word_of
    from dbb.train import Hardware, TrainingError, TrainingStoppedError, launch

    given = {name: getattr(options, name) for name in ("block", "data", "epochs", "seed")}
    changes = parse_settings(options.set) | {name: value for name, value in given.items() if value is not None}
    chosen = recipe(options.recipe, **changes)
    folder = options.out or Path("build/runs", f"{chosen.name}-{chosen.block}-{chosen.seed}")
    settings = ("device", "precision", "channels_last", "compile", "accumulate", "workers")
    machine = Hardware(**{name: getattr(options, name) for name in settings})
    try:
        line = launch(chosen, folder, machine, options.root, options.results, options.tensorboard)
    except TrainingStoppedError as stopped:
        print(f"dbb: {stopped}; the same call goes on from there", file=sys.stderr)
        return 143
    except TrainingError as error:
        print(f"dbb: {error}", file=sys.stderr)
        return 1
    if line:
        key, word = key_of(line["recipe"]), word_of(line["recipe"])
        _say(f"{folder}: test {word} {line[key]:.2%}, folded {line[f'folded_{key}']:.2%}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    from dbb.checkpoint import facts_of
    from dbb.tasks import word_of
    from dbb.train import Hardware, TrainingError, score

    try:
        scores = score(options.checkpoint, options.data, options.root, Hardware(options.device))
    except TrainingError as error:
        print(f"dbb: {error}", file=sys.stderr)
        return 1
    word = word_of(facts_of(options.checkpoint)["recipe"])
    for form, value in scores.items():
        _say(f"{form}: test {word} {value:.2%}")
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from dbb import matrix

    runs = matrix.all_runs(options.select)
    if options.list:
        for line in matrix.listing(runs, options.results, options.root):
            _say(line)
        _say(matrix.summary(options.results, options.select))
        return 0
    budget = matrix.seconds(options.budget)
    ended = matrix.reproduce(runs, budget, options.results, options.root, options.jobs, _say)
    _say(", ".join(f"{len(names)} {end}" for end, names in ended.items()))
    return 1 if ended["failed"] else 0


def _claims(options: argparse.Namespace) -> int:
    from dbb import claims, suite

    root = suite.find_project().root
    findings = claims.evaluate(root, claims.ledger(root))
    _say(claims.table(findings))
    broken = [finding.claim.id for finding in findings if finding.broken]
    if options.update:
        _say(f"changed: {', '.join(claims.update(root, findings)) or 'nothing'}")
    if broken:
        print(f"dbb: held before and does not now: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def _run(options: argparse.Namespace) -> int:
    from dbb import suite

    if options.update and (options.profile != "quick" or options.set):
        raise ValueError("--update keeps the outputs of the quick profile as it is: leave out --profile and --set")
    project = suite.find_project()
    outcomes = suite.run(
        project, options.names, options.profile, suite.parse_settings(options.set), jobs=options.jobs, say=_say
    )
    return _conclude(project, outcomes, options.update)


def _figures(options: argparse.Namespace) -> int:
    from dbb import suite
    from dbb.figures import publish

    project = suite.find_project()
    built = project.build / "figures"
    env = {"DBB_FIGURES": str(built)}
    outcomes = suite.run(project, options.names, jobs=options.jobs, env=env, say=_say)
    ran = {outcome.notebook: list(outcome.figures) for outcome in outcomes if not outcome.error}
    changed = publish(ran, built, project.figures, everything=len(ran) == len(suite.discover(project)))
    _say(f"figures changed: {', '.join(changed) or 'none'}")
    return _conclude(project, outcomes, options.update)


def _clean(options: argparse.Namespace) -> int:
    from dbb import suite

    changed, stale = suite.clean(suite.find_project(), options.names, options.check)
    _say(f"{'not clean' if options.check else 'cleaned'}: {', '.join(changed) or 'none'}")
    for name, reason in stale.items():
        print(f"dbb: {name} has stale outputs: {reason}; dbb run {name} --update", file=sys.stderr)
    return 1 if stale or (options.check and changed) else 0


def _list(options: argparse.Namespace) -> int:
    from dbb import notebook, suite

    project = suite.find_project()
    paths = suite.discover(project)
    width = max(len(path.stem) for path in paths)
    for path in paths:
        last = suite.last_outcome(project.build, path.stem)
        state = f"{last.finished}  {last.profile}  {last.seconds:.1f} s  {last.status}" if last else "never run here"
        _say(f"{path.stem:<{width}}  {notebook.title(notebook.read(path))}\n{'':<{width}}  {state}")
    return 0


def _conclude(project, outcomes, update: bool) -> int:
    """Write the report, print the table and what failed, keep the outputs if asked to; return the exit status."""
    from dbb import pages, suite

    _say(f"\n{suite.table(outcomes)}\nreport: {pages.write(project)}")
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"\n{suite.complaint(outcome)}", file=sys.stderr)
    if update:
        _say(f"outputs updated: {', '.join(suite.update(project, outcomes)) or 'none changed'}")
    return 1 if failed else 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
