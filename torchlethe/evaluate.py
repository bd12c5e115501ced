"""``lethe evaluate``: judge weights that were unlearned elsewhere with every metric.

Parsing needs no PyTorch; what judges is imported when the command line has been understood.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from torchlethe._cli.catalog import find_config
from torchlethe._cli.errors import UsageError, close_match
from torchlethe._cli.parser import Parser
from torchlethe._cli.paths import check_output
from torchlethe.files import atomic_write, file_hash, to_json

USAGE = "lethe evaluate WEIGHTS [--reference WEIGHTS] [--original WEIGHTS] --network … --data … --forget … [options]"
EPILOG = """\
Network, data and request are given as to lethe test, by class name or in a configuration file:

  lethe evaluate unlearned.pt --reference retrain/weights.safetensors \\
      --network SmallCNN --data DigitsDataModule --forget ForgetClasses --forget.classes '[3]'
  lethe evaluate unlearned.pt --reference retrain/weights.safetensors \\
      --config digits/forget_class.yaml --config digits/evaluate.yaml

--forget 3 or --forget 3,5 is short for ForgetClasses. All other options are those of lethe test, such as
--trainer.accelerator gpu. lethe study FILE --explain-metrics defines each metric.
"""
ROW_TITLES = {"": "", "original_": "Original", "reference_": "Retrain"}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lethe evaluate",
        usage=USAGE,
        description="Judge weights that were unlearned anywhere: accuracies, membership attacks, distances to Retrain.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--reference", metavar="WEIGHTS", help="the model retrained without the forget set")
    parser.add_argument("--original", metavar="WEIGHTS", help="the model before unlearning")
    parser.add_argument("--output", metavar="DIR", help="folder of the results (default: NAME_evaluation)")
    parser.add_argument(
        "--membership",
        metavar="NAMES",
        default="all",
        help="attacks: all, headline (the two usual ones), or names with commas between them",
    )
    parser.add_argument(
        "--relearning",
        action="store_true",
        help="also fine-tune copies on the forget set until they know it again (needs --original)",
    )
    parser.add_argument("--report", action="store_true", help="also write tables, figures and report.html")
    return parser


def evaluate(words: Sequence[str]) -> int:
    """Run ``lethe evaluate``.

    Args:
        words: the command line after ``evaluate``.

    Returns:
        The exit status.

    Raises:
        UsageError: something is missing or wrong, before any data is read.
    """
    words = list(words)
    parser = _parser()
    if any(word in ("-h", "--help") for word in words):
        parser.print_help()
        return 0
    if not words or words[0].startswith("-"):
        raise UsageError(f"the weights to judge come first: {USAGE}")
    options, rest = parser.parse_known_args(words[1:])
    weights = _weights("WEIGHTS", words[0])
    others = {
        f"{name}_": _weights(f"--{name}", path)
        for name in ("original", "reference")
        if (path := getattr(options, name)) is not None
    }
    output = Path(options.output or f"{weights.name.split('.')[0]}_evaluation")
    if options.relearning and options.original is None:
        raise UsageError("--relearning is measured against the original's forget accuracy: give --original")
    rest = _lightning_words(rest)
    membership = _membership(options.membership)
    check_output("--output", output)
    _refuse_other_weights(output, weights)

    from torchlethe._cli.judge import BesideUntrained, JudgeCLI
    from torchlethe._cli.lightning import run
    from torchlethe.callbacks import UnlearningEvaluation
    from torchlethe.metrics.evaluation import DIVERGENCES
    from torchlethe.metrics.relearning import RelearningSettings

    measure = UnlearningEvaluation(
        reference=others.get("reference_"),
        original=others.get("original_"),
        membership=membership,
        divergences=DIVERGENCES,
        stages=["test"],
        table=False,
        relearning=RelearningSettings() if options.relearning else None,
    )
    beside = BesideUntrained(others)
    line = [
        "--model=torchlethe._cli.judge.JudgedModel",
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--verbose=false"),
        *rest,
        f"--model.weights={weights}",
        "--trainer.logger=false",
        f"--trainer.default_root_dir={output}",
    ]
    cli = run("test", line, lambda _, resolved: JudgeCLI(resolved, measure, beside))
    if not cli.trainer.is_global_zero:
        return 0
    metrics, content = _complete(output / "evaluation.json", beside.metrics, weights)
    meta = content["meta"]
    written = [output / "evaluation.json", output / "evaluation.npz"]
    if options.report:
        written.append(_report(metrics, content, weights, output, shlex.join(["lethe", "evaluate", *words])))
    _show(metrics, weights, meta)  # last, as nobody may be there any more to read it
    sys.stdout.write("".join(f"{'files' if position == 0 else '':<7}{path}\n" for position, path in enumerate(written)))
    return 0


def _weights(name: str, path: str) -> Path:
    if not Path(path).is_file():
        raise UsageError(f"{name}: there is no file '{path}'")
    return Path(path)


def _membership(text: str) -> list[str]:
    """Names of attacks, the first of which counts in the average gap."""
    from torchlethe.metrics.evaluation import HEADLINE_MEMBERSHIP, MEMBERSHIP

    if text == "headline":
        return list(HEADLINE_MEMBERSHIP)
    if text == "all":
        return list(dict.fromkeys([*HEADLINE_MEMBERSHIP, *MEMBERSHIP]))
    names = [name.removeprefix("mia_") for name in text.split(",") if name]
    for name in names:
        if name not in MEMBERSHIP:
            hint = close_match(name, MEMBERSHIP)
            raise UsageError(
                f"--membership names '{name}'{hint or ', allowed are all, headline, ' + ', '.join(MEMBERSHIP)}"
            )
    if not names:
        raise UsageError("--membership is empty, allowed are all, headline, or names of attacks")
    return names


def _lightning_words(words: list[str]) -> list[str]:
    """The words for LightningCLI: the network is the model's, and a request by number is one of classes.

    Raises:
        UsageError: nothing says what the network or the data are.
    """
    keys = set[str]()
    found: list[str] = []
    for position, word in enumerate(words):
        before = words[position - 1] if position else ""
        if word.startswith("--config=") or before in ("--config", "-c"):
            keys |= _keys_of(word.removeprefix("--config="))
        keys.add(re.split(r"[=.+]", word.removeprefix("--"), maxsplit=1)[0] if word.startswith("--") else "")
        word = re.sub(r"^--network(?=[=.]|$)", "--model.network", word)
        numbers = (
            word.removeprefix("--forget=") if word.startswith("--forget=") else word if before == "--forget" else ""
        )
        if re.fullmatch(r"\d+(,\d+)*", numbers):
            if before == "--forget":
                found.pop()
            found += ["--forget=ForgetClasses", f"--forget.classes=[{numbers}]"]
            continue
        found.append(word)
    for key, what in (("network", "a network"), ("data", "a datamodule")):
        if key not in keys and not (key == "network" and "model" in keys):
            example = {"network": "SmallCNN", "data": "DigitsDataModule"}[key]
            raise UsageError(f"give the name of {what} with --{key}, such as {example}, or a --config that has it")
    return found


def _keys_of(path: str) -> set[str]:
    """The top-level keys of a configuration file; none where it is unreadable, which the parser then says better."""
    try:
        content = yaml.safe_load(Path(find_config(path)).read_text("utf-8"))
    except (OSError, yaml.YAMLError):
        return set()
    return set(content) if isinstance(content, dict) else set()


def _refuse_other_weights(output: Path, weights: Path) -> None:
    """An evaluation of other weights is not overwritten."""
    path = output / "evaluation.json"
    if not path.exists():
        return
    try:
        judged = json.loads(path.read_text("utf-8"))["meta"]["weights"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        judged = None
    if judged != file_hash(weights):
        raise UsageError(f"the folder '{output}' holds another evaluation; choose another --output")


def _complete(path: Path, more: Mapping[str, float], weights: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Add what the callback does not know: ZRF, unlearning accuracy, and which weights were judged.

    Returns:
        The numbers, NaN where the file has ``null``, and everything that is in the file.
    """
    content = json.loads(path.read_text("utf-8"))
    content["meta"]["weights"] = {"path": str(weights), "sha256": file_hash(weights)}
    beside = {name: content.pop(name) for name in [*content] if isinstance(content[name], dict | list)}
    for prefix in ROW_TITLES:
        if content.get(f"{prefix}forget_accuracy") is not None:
            content[f"{prefix}unlearning_accuracy"] = 100.0 - content[f"{prefix}forget_accuracy"]
    content |= {name: value if math.isfinite(value) else None for name, value in more.items()}
    with atomic_write(path) as temporary:
        temporary.write_text(to_json({**content, **beside}), "utf-8")
    metrics = {name: math.nan if value is None else float(value) for name, value in content.items()}
    return metrics, {**content, **beside}


def _show(metrics: Mapping[str, float], weights: Path, meta: Mapping[str, Any]) -> None:
    """The metrics as a table: the model, the others and the difference to Retrain."""
    from rich.console import Console
    from rich.table import Table

    from torchlethe.study.tables import number, signed

    console = Console(highlight=False)
    present = [prefix for prefix in ROW_TITLES if any(name.startswith(prefix) for name in metrics)]
    counts = ", ".join(f"{name} {count}" for name, count in meta["counts"].items())
    table = Table(
        title=f"{weights.name}  ({counts})", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("metric", style="cyan", overflow="fold")
    for prefix in present:
        table.add_column(ROW_TITLES[prefix] or "model", justify="right", no_wrap=True)
    if "reference_" in present:
        table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("good is", style="dim", no_wrap=True)
    for name, found in _definitions(metrics).items():
        values = [metrics.get(prefix + name) for prefix in present]
        cells = ["" if value is None else "–" if math.isnan(value) else number(value, found.unit) for value in values]
        if "reference_" in present:
            both = metrics.get(name), metrics.get(f"reference_{name}")
            known = both[0] is not None and both[1] is not None and math.isfinite(both[0] - both[1])
            cells.append(signed(both[0] - both[1], found.unit) if known else "")  # type: ignore[operator]
        goal = {"reference": "Retrain's", "higher": "high", "lower": "low"}[found.orientation]
        table.add_row(found.title + (f" ({found.unit})" if found.unit else ""), *cells, goal)
    console.print(table)


def _definitions(metrics: Mapping[str, float]) -> dict[str, Any]:
    """The definitions of the model's own metrics: accuracies, summaries and distances first, then the attacks."""
    from torchlethe.metrics.definitions import MetricDefinition, define_metric

    own = [name for name in metrics if not name.startswith(tuple(filter(None, ROW_TITLES)))]
    own.sort(key=lambda name: (name.startswith("mia_"), not name.endswith("_accuracy")))
    return {name: define_metric(name) or MetricDefinition(name, "", "", "reference") for name in own}


def _report(
    metrics: Mapping[str, float], content: Mapping[str, Any], weights: Path, output: Path, command: str
) -> Path:
    """The report of a study with one method, one request and one seed."""
    from torchlethe.study.collect import derive, per_class_of, plain_numbers
    from torchlethe.study.output import write_report
    from torchlethe.study.results import Results, Run

    runs = []
    for prefix, title in ROW_TITLES.items():
        own = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        if not prefix:
            own = {name: value for name, value in own.items() if name in _definitions(metrics)}
        if own:
            arrays = output / "evaluation.npz"
            part = prefix.rstrip("_")
            classes = per_class_of(content, part)
            runs.append(Run(title or weights.name, "all", 0, plain_numbers(own), arrays, part, classes=classes))
    counts = content["meta"]["counts"]
    description = (
        f"{counts['forget']} training samples were to be forgotten, {counts['remain']} remain; "
        f"{counts['test']} test samples."
    )
    titles = {run.method for run in runs}
    derive(runs, "Retrain")
    results = Results(
        name=f"Evaluation of {weights.name}",
        description=description,
        seeds=(0,),
        titles={"all": "all"},
        runs=tuple(runs),
        reference="Retrain" if "Retrain" in titles else None,
        original="Original" if "Original" in titles else None,
    )
    return write_report(results, output, command, Path.cwd())
