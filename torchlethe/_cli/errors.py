"""Errors as one readable sentence.

jsonargparse reports a wrong argument as an indented tree of everything that it tried. The cause is the deepest leaf of
that tree; the lines above it name the key and the class. This module turns the tree into one sentence and adds the
close matches of a misspelt name. It imports nothing heavy: candidates are looked up among what is imported already.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

READABLE = (argparse.ArgumentError, ValueError, TypeError, RuntimeError, OSError, ImportError)
SPEAKING = ("torchlethe", "lightning", "lightning_fabric", "jsonargparse", "torchmetrics")
BASES = (
    "lightning.pytorch.LightningModule",
    "lightning.pytorch.LightningDataModule",
    "lightning.pytorch.Callback",
    "torch.nn.Module",
    "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler",
)
# a class to name where only the base class is known
EXAMPLES = {"Optimizer": "SGD", "LRScheduler": "CosineAnnealingLR", "Union": "CosineAnnealingLR"}


class UsageError(ValueError):
    """A wrong command line or file; its message is one sentence for the user."""


def is_readable(error: BaseException) -> bool:
    """Whether an error is about what the user gave, not a defect that needs its traceback."""
    named = any(kind.__name__ == "MisconfigurationException" for kind in type(error).__mro__)  # of Lightning
    return named or (isinstance(error, READABLE) and not isinstance(error, NotImplementedError | RecursionError))


def close_match(word: str, candidates: Iterable[str]) -> str:
    """The hint ``; did you mean 'x'?`` for a misspelt word, or an empty string.

    Example:
        >>> close_match("tset", ["test", "fit"])
        "; did you mean 'test'?"
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower(), by_lower, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(by_lower[f]) for f in found)}?" if found else ""


def suggest(word: str, candidates: Iterable[str]) -> str:
    """The close matches of a misspelt word, or else everything that is allowed.

    Example:
        >>> suggest("tset", ["test", "fit"]), suggest("x", ["test", "fit"])
        ("; did you mean 'test'?", '; allowed are test, fit')
    """
    options = list(candidates)
    return close_match(word, options) or (f"; allowed are {', '.join(options)}" if options else "")


def explain(error: BaseException) -> str:
    """One sentence for an error: the key, the value, what is allowed.

    Args:
        error: any exception, also one of jsonargparse.

    Returns:
        The sentence, on one line.
    """
    if isinstance(error, argparse.ArgumentError):
        return _sentence(_explain_parser(error.message))
    message = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.strerror}: '{error.filename}'"
    if "\n" in message and ("Parser key " in message or "Does not validate against" in message):
        return _sentence(_explain_parser(message))
    where = _raised_in(error)
    if where and not isinstance(error, UsageError):
        message = f"{_one_line(message)} ({type(error).__name__} in {where}; --debug shows the traceback)"
    return _sentence(message)


def _raised_in(error: BaseException) -> str:
    """Where a foreign library raised the error; empty when Lethe or Lightning spoke to the user on purpose."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    if module.split(".")[0] in SPEAKING:
        return ""
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    text = _one_line(text)
    return text if text.endswith((".", "?", "!")) else f"{text}."


@dataclass
class _Leaf:
    """The cause at the bottom of a jsonargparse message, with the keys and the class above it."""

    depth: int
    text: str
    keys: list[str] = field(default_factory=list)
    class_path: str = ""


def _leaves(message: str) -> Iterator[_Leaf]:
    """Read the indented tree line by line."""
    above: list[tuple[int, str, str]] = []  # indentation, kind, value
    for raw in message.splitlines():
        if not raw.strip():
            continue
        depth = len(raw) - len(raw.lstrip(" "))
        text = raw.strip()
        if text.startswith("- "):
            depth, text = depth + 2, text[2:]
        # "Parser key "x": cause" on one line is a key with its leaf
        key = re.match(r'Parser key "(.+?)":\s*(.*)', text)
        problem = re.match(r"Problem with given class_path '(.+?)':\s*(.*)", text)
        while above and above[-1][0] >= depth:
            above.pop()
        if key or problem:
            found = key or problem
            assert found is not None
            above.append((depth, "key" if key else "class", found.group(1)))
            text = found.group(2)
            depth += 1
        if text:
            classes = [value for _, kind, value in above if kind == "class"]
            keys = [value for _, kind, value in above if kind == "key"]
            yield _Leaf(depth, text, keys, classes[-1] if classes else "")


NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Not a valid subclass of",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
    "a dict without",
)


def _explain_parser(message: str) -> str:
    """The cause in a message of jsonargparse; the message itself when it is no tree."""
    if "Parser key" not in message and "Subtypes:" not in message and "required: " not in message:
        return message
    leaves = [leaf for leaf in _leaves(message) if not leaf.text.startswith(NOISE)]
    if not leaves:
        return message
    leaf = max(leaves, key=lambda candidate: candidate.depth)
    option = "--" + ".".join(leaf.keys) if leaf.keys else ""
    owner = leaf.class_path.rsplit(".", 1)[-1]
    given = re.search(r"Given value: (.*)", message)

    if found := re.search(r"Option '(.+?)' is not accepted", leaf.text):
        name = found.group(1).removeprefix("init_args.").split(".")[0]
        class_path = leaf.class_path
        # the classes of factories are only named in the value
        inner = re.findall(r"class_path='([^']+)'", leaf.text)
        if inner:
            class_path = inner[-1]
        if _is_base(class_path):
            key = ".".join(leaf.keys) or "model"
            example = EXAMPLES.get(class_path.rsplit(".", 1)[-1], "CLASS")
            typed = re.search(
                rf"Given value: NestedArg\(key='[^']*\b{name}', val='?([^'\s]{{1,40}}?)'?\)$", message, re.M
            )
            first = f"--{key} {example}" + (f" --{key}.{name} {typed[1]}" if typed else "")
            return f"'{key}.{name}' is given before its class; name the class first: {first}, or class_path in YAML"
        accepted = parameters(class_path)
        if name in accepted:
            return f"{option}.{name}: the arguments around it decide about '{name}', it cannot be given here"
        return f"{option}.{name}: {class_path.rsplit('.', 1)[-1]} has no argument '{name}'{suggest(name, accepted)}"
    if found := re.match(r"the following arguments are required: (.+)", leaf.text):
        names = [re.sub(r"^(fit|validate|test|predict)\.", "--", name) for name in found.group(1).split(", ")]
        return f"{f'{option}: {owner}' if owner else 'this command'} needs {', '.join(names)}"
    if found := re.match(r"Expected a dot import path string: (.+)", leaf.text):
        name = found.group(1)
        hint = close_match(name, class_names())
        if leaf.keys and leaf.keys[-1] == "network":
            hint = f"{hint or ';'} lethe list models shows the networks"
        hint = hint or "; lethe list shows what there is"
        return f"{option}: there is no class '{name}'{hint}"
    expected = [other.text for other in leaves if other.depth == leaf.depth and other.text.startswith("Expected")]
    text = " or ".join(dict.fromkeys(_plain(part) for part in expected)) if len(expected) > 1 else _plain(leaf.text)
    if given and text.startswith("expected") and ", got " not in text and len(given.group(1)) < 80:
        text += f", got {_plain(given.group(1))}"
    return f"{option}: {text}" if option and text.startswith("expected") else text


def _is_base(class_path: str) -> bool:
    """Whether a class stands for its subclasses: nobody has named one yet."""
    module, _, name = class_path.rpartition(".")
    if class_path == "typing.Union" or name in {base.rsplit(".", 1)[-1] for base in BASES}:  # a Union: LR schedulers
        return True
    target = getattr(sys.modules.get(module), name, None)
    return inspect.isclass(target) and bool(target.__subclasses__()) and not parameters(class_path)


def _plain(text: str) -> str:
    """Types and values as people write them."""
    text = re.sub(r"NestedArg\(key='.*?', val='(.*?)'\)", r"\1", text)
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"Expected an? typing.Literal\[(.+?)\]", r"expected one of \1", text)
    text = re.sub(r"^Expected (?:an? )?", "expected ", text)
    return re.sub(r"\.? ?Got value: ", ", got ", text).strip()


def parameters(class_path: str) -> list[str]:
    """The argument names of an imported class or function, those of its base classes included."""
    module, _, name = class_path.rpartition(".")
    target = getattr(sys.modules.get(module), name, None)
    if target is None:
        return []
    sources = [target]
    if inspect.isclass(target):
        sources = [base.__dict__["__init__"] for base in target.__mro__ if "__init__" in base.__dict__]
    names: dict[str, None] = {}
    for source in sources:
        try:
            signature = inspect.signature(source)
        except (TypeError, ValueError):
            continue
        kinds = [p.kind for p in signature.parameters.values()]
        names |= {
            p.name: None
            for p in signature.parameters.values()
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"
        }
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return list(names)


def class_names() -> list[str]:
    """Short names that the command line knows: subclasses of the usual bases among the imported modules."""
    names: dict[str, None] = {}
    for path in BASES:
        module, _, name = path.rpartition(".")
        base = getattr(sys.modules.get(module), name, None)
        waiting = [base] if base is not None else []
        while waiting:
            current = waiting.pop()
            waiting += current.__subclasses__()
            if not current.__name__.startswith("_"):
                names[current.__name__] = None
    return list(names)
