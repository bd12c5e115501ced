"""``lethe push`` and ``lethe pull``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torchlethe._cli.parser import Parser


def push(words: Sequence[str]) -> int:
    """Run ``lethe push``.

    Args:
        words: the command line after ``push``.

    Returns:
        0.
    """
    parser = Parser(
        prog="lethe push",
        description="Publish weights with a model card: on the Hugging Face Hub, or in a folder of the same layout.",
        epilog="example: lethe push runs/digits/sfron/one_class/seed-0 ./export --report runs/digits",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", metavar="RUN_OR_WEIGHTS", help="folder of a run, weight file, or folder of a study (its report alone)"
    )
    parser.add_argument("destination", metavar="DESTINATION", help="repository (name/repository), or ./FOLDER")
    parser.add_argument("--report", metavar="STUDY", help="folder of a study, whose report and tables go along")
    parser.add_argument("--evaluation", metavar="FILE", help="evaluation.json of the weights, instead of the run's own")
    parser.add_argument("--license", metavar="NAME", default="unknown", help="as the Hub names it: apache-2.0, mit, …")
    parser.add_argument("--private", action="store_true", help="only you can see the repository")
    options = parser.parse_args(list(words))

    from torchlethe.hub.transfer import push as run

    place = run(
        options.source,
        options.destination,
        report=options.report,
        evaluation=options.evaluation,
        license=options.license,
        private=options.private,
    )
    sys.stdout.write(f"pushed  {place}\n")
    return 0


def pull(words: Sequence[str]) -> int:
    """Run ``lethe pull``.

    Args:
        words: the command line after ``pull``.

    Returns:
        0.
    """
    parser = Parser(
        prog="lethe pull",
        description="Fetch weights and reports from the Hugging Face Hub or a folder; unsafe files are refused.",
        epilog="example: lethe pull name/repository ./downloaded",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="repository (name/repository), or ./FOLDER")
    parser.add_argument("folder", metavar="FOLDER", help="where to put it: new, empty, or of an earlier pull")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the repository")
    options = parser.parse_args(list(words))

    from torchlethe.hub.transfer import pull as run

    sys.stdout.write(f"pulled  {run(options.source, options.folder, revision=options.revision)}\n")
    return 0
