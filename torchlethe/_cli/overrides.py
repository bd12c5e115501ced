"""What later layers of a configuration do to the arguments of earlier ones."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace


class DroppedArguments(logging.Handler):
    """Collects the arguments that jsonargparse drops when a later layer names another class.

    jsonargparse says so only in its debug log; this handler listens there.
    """

    PATTERN = re.compile(r"Due to class_path change from '(.+?)' to '(.+?)', discarding init_args: (.*)\.$", re.DOTALL)

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: dict[tuple[str, str, str], None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message if it is about dropped arguments."""
        message = self.PATTERN.match(record.getMessage())
        if not message:
            return
        old, new, values = message.groups()
        defaults = defaults_of(old)
        # `{'momentum': 0.9, 'nesterov': False}`: what equals the old class's default was not set by anyone
        for name, value in re.findall(r"'(\w+)': (.+?)(?=, '\w+': |\}$)", values):
            if repr(defaults.get(name, ...)) != value:
                self.found[old, new, name] = None


def target_of(class_path: str | None) -> Any:
    """The class or factory of a path whose module is imported; None otherwise."""
    module, _, name = (class_path or "").rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def defaults_of(class_path: str) -> dict[str, Any]:
    """The default values of its arguments, by name."""
    target = target_of(class_path)
    if target is None:
        return {}
    return {key: parameter.default for key, parameter in inspect.signature(target).parameters.items()}


def config_options(words: Sequence[str]) -> Iterator[str]:
    """``--config=FILE`` for each configuration file on the command line."""
    for position, word in enumerate(words):
        if word.startswith("--config="):
            yield word
        elif word in ("--config", "-c") and position + 1 < len(words):
            yield f"--config={words[position + 1]}"


def dotted_key(option: str) -> str:
    """The key of ``--model.init_args.network=…`` without ``init_args``: ``model.network``."""
    key = re.split(r"[=+]", option[2:], maxsplit=1)[0]
    return ".".join(part for part in key.split(".") if part != "init_args")


def typed_files(words: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Dotted key and path of each YAML file that is given for a part of model, data or Trainer."""
    for position, word in enumerate(words):
        if not word.startswith(("--model", "--data", "--trainer")):
            continue
        value = word.partition("=")[2] if "=" in word else words[position + 1] if position + 1 < len(words) else ""
        if re.fullmatch(r"[^\s:{}\[\]-][^\s:{}\[\]]*\.ya?ml", value):
            yield dotted_key(word), Path(value)


def top_keys(path: str) -> set[str]:
    """Whether a file configures the model, the data or both."""
    content = yaml.safe_load(Path(path).read_text("utf-8")) if Path(path).is_file() else None
    return {"model", "data"} & content.keys() if isinstance(content, dict) else set()


def value_at(config: Any, key: str) -> Any:
    """The value at a dotted key without ``init_args``; None when there is none."""
    for part in key.split("."):
        config = config.get("init_args", config) if isinstance(config, Namespace) else None
        config = config.get(part) if isinstance(config, Namespace) else None
    return config if isinstance(config, Namespace) else None


def holds(config: Any, key: str) -> bool:
    """Whether a configuration has an argument at a dotted key without ``init_args``, or something that is no class."""
    parent, _, name = key.rpartition(".")
    at = value_at(config, parent) if parent else config
    return at is None or name in (at.get("init_args") or at)


def taken_over(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, name and value of the arguments that outlive a change to an unrelated class, and are not its defaults."""
    if not isinstance(before, Namespace) or not isinstance(after, Namespace):
        return
    old, new = before.get("class_path"), after.get("class_path")
    before, after = (part.get("init_args") or part for part in (before, after))
    kinds = target_of(old), target_of(new)
    related = all(map(inspect.isclass, kinds)) and issubclass(kinds[1], kinds[0])
    defaults = defaults_of(new) if old != new and not related else None
    for name in [name for name in vars(before) if name in vars(after)]:
        value, now = before[name], after[name]
        if defaults is not None and value == now and value != defaults.get(name, ...):
            is_class = isinstance(value, Namespace) and "class_path" in value
            yield key, name, short_name(value.class_path) if is_class else brief(value)
        yield from taken_over(value, now, f"{key}.{name}" if key else name)


def not_in_file(final: Any, content: Any, key: str) -> Iterator[tuple[str, str, str]]:
    """Key, name and value of the arguments of a class that are no defaults, although the class's file lacks them.

    Args:
        final: the class in the final configuration.
        content: what the file says that was given for it.
        key: its dotted key.
    """
    if not isinstance(final, Namespace) or not isinstance(content, dict) or "class_path" not in content:
        return
    said, arguments = content.get("init_args") or {}, final.get("init_args") or Namespace()
    defaults = defaults_of(final.class_path)
    for name, value in vars(arguments).items():
        if name not in said and not isinstance(value, Namespace) and value != defaults.get(name, value):
            yield key, name, brief(value)
        yield from not_in_file(value, said.get(name), f"{key}.{name}")


def short_name(class_path: str) -> str:
    """The class alone, without its module."""
    return class_path.rsplit(".", 1)[-1]


def brief(value: Any) -> str:
    """A plain value as YAML on one line, cut after 80 characters."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 80 else text[:79] + "…"
