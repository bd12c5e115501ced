"""LightningCLI with the defaults of Lethe and errors that talk to the user."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# LightningCLI's own calls of older names are nothing that a user could change
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO

from torchlethe._cli.catalog import find_config
from torchlethe._cli.cleaning import unpatch_loaders
from torchlethe._cli.errors import UsageError, close_match
from torchlethe._cli.overrides import (
    DroppedArguments,
    brief,
    config_options,
    dotted_key,
    holds,
    not_in_file,
    short_name,
    taken_over,
    target_of,
    top_keys,
    typed_files,
    value_at,
)
from torchlethe._cli.records import RecordConfig, record_metrics
from torchlethe._cli.stored import stored_hyperparameters

# Importing a package registers its classes, which is what makes short names like `--model SFRon` work.
REGISTERED = ("lightning_modules", "datamodules", "callbacks", "models", "optimizers", "data")
# a module that brings its own data overrides the one of its command
LOADERS = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}
ADVERTISEMENTS = ("💡 Tip",)
ARGUMENTS_LOG = logging.getLogger("torchlethe.arguments")
ARGUMENTS_LOG.addHandler(logging.NullHandler())


def run(command: str, words: Sequence[str], cli: Callable[[str, list[str]], LetheCLI] | None = None) -> LetheCLI:
    """Run one LightningCLI command.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        words: the command line after it.
        cli: what runs it, :class:`LetheCLI` by default.

    Returns:
        The finished CLI, with its ``trainer``, ``model`` and ``datamodule``.

    Raises:
        argparse.ArgumentError: jsonargparse refused the configuration.
        UsageError: an argument would have been dropped or ignored.
    """
    for name in REGISTERED:
        if importlib.util.find_spec(f"torchlethe.{name}"):
            importlib.import_module(f"torchlethe.{name}")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.`")
    try:
        return (cli or LetheCLI)(command, _resolve_configs(words))
    except BaseException:
        unpatch_loaders()
        raise


def _no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ADVERTISEMENTS)


def _resolve_configs(words: Sequence[str]) -> list[str]:
    """Let ``--config digits/sfron.yaml`` find shipped files, as ``lethe list configs`` names them."""
    resolved = list(words)
    for position, word in enumerate(resolved):
        if word.startswith("--config="):
            resolved[position] = "--config=" + _find_config(word.removeprefix("--config="))
        elif position and resolved[position - 1] in ("--config", "-c"):
            resolved[position] = _find_config(word)
    return resolved


def _find_config(name: str) -> str:
    found = find_config(name)
    # what is no name of a file is a configuration written out, or an address
    if re.fullmatch(r"[^\s:{}]+\.(ya?ml|json)", found) and not Path(found).exists():
        raise UsageError(f"--config: there is no file '{name}'; lethe list configs shows the shipped ones")
    return found


class LetheCLI(LightningCLI):
    """One plain call of LightningCLI, with four additions.

    What a user typed is never dropped in silence: changing a class in a later layer drops the arguments that the new
    class lacks, which is an error for typed arguments and a note for those of files; what an unrelated class takes over
    is a note too. The hyper-parameters of ``--ckpt_path`` go in front of the configuration (Lightning's rule), behind
    what was typed; each difference is one note. Every run gets :class:`~torchlethe.checkpoint_io.AtomicCheckpointIO`
    and :class:`~torchlethe.callbacks.NonFiniteGuard`, a fit :class:`~torchlethe.callbacks.ExportWeights`
    and :class:`~torchlethe.callbacks.NothingToForget`, and a prediction
    :class:`~torchlethe.callbacks.SavePredictions` (unless another callback writes predictions), unless the
    configuration brings its own. And a method that changes a trained network is refused a random one.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        words: the command line after it.
    """

    def __init__(self, command: str, words: Sequence[str]) -> None:
        self.command = command
        self.words = list(words)
        ARGUMENTS_LOG.propagate = False
        ARGUMENTS_LOG.setLevel(logging.DEBUG)
        options: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "logger": ARGUMENTS_LOG}
        super().__init__(
            args=[command, *words],
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            save_config_callback=RecordConfig,
            parser_kwargs={"prog": "lethe", **options, command: dict(options)},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command that runs: building the other three parsers costs most of a second."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then tell about arguments that were dropped or kept on the way."""
        # a handler holds a lock, which no attribute of this object may: `ddp_spawn` pickles it with its callbacks
        dropped = DroppedArguments()
        ARGUMENTS_LOG.addHandler(dropped)
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            message = error.message or ""
            if missing := next(((key, path) for key, path in typed_files(self.words) if not path.is_file()), None):
                raise UsageError(f"--{missing[0]}: there is no file '{missing[1]}'") from None
            options = [option.lstrip("-") for option in self._parser(self.command)._option_string_actions]
            if unknown := re.match(r"unrecognized arguments: --([^\s=]+)", message):
                raise UsageError(f"unknown argument --{unknown[1]}{close_match(unknown[1], options)}") from None
            if unknown := re.match(r"Subcommand '\w+' does not accept option '(.+?)'", message):
                first = unknown[1].split(".")[0]
                key = unknown[1] if first == "trainer" else first
                raise UsageError(f"unknown key '{key}' in a configuration{close_match(key, options)}") from None
            raise
        finally:
            ARGUMENTS_LOG.removeHandler(dropped)
        final = self.config[self.command]
        # what was typed and is not there any more; an argument of the same name elsewhere is none of our business
        typed = {word.rsplit(".", 1)[-1] for word in self._typed() if not holds(final, word)}
        for old, new, name in dropped.found:
            change = f"the class changes from {short_name(old)} to {short_name(new)}, which has no argument '{name}'"
            if name in typed:
                raise UsageError(f"'{name}' would be dropped: {change}; name the class before its arguments")
            self._note(f"{change}; the earlier value is dropped")
        for key, names in self._kept(parser).items():
            values = ", ".join(f"{name}={value}" for name, value in names.items())
            self._note(f"{key}: {values} {'is' if len(names) == 1 else 'are'} kept from a file")

    def _kept(self, parser: LightningArgumentParser) -> dict[str, dict[str, str]]:
        """The arguments that a class takes over from an unrelated one of an earlier file, by key and name."""
        files = [option.removeprefix("--config=") for option in config_options(self.words)]
        # parsing once more takes a while: only where a file or an option can change the class of an earlier file
        layers, seen = [], set[str]()
        for position, file in enumerate(files):
            keys = top_keys(file)
            if keys & seen:
                layers.append(position)
            seen |= keys
        final = self.config[self.command]
        found: dict[str, dict[str, str]] = {}
        for place, path in typed_files(self.words):
            if value_at(final, place) is None or list(self._typed()).count(place) > 1:
                continue
            below = tuple(f"{key}." for key in self._typed() if key.startswith(f"{place}."))
            content = yaml.safe_load(path.read_text("utf-8"))
            for key, name, value in not_in_file(value_at(final, place), content, place):
                if not f"{key}.{name}.".startswith(below):
                    found.setdefault(key, {})[name] = value
        if files and any("class_path" in (value_at(final, key) or {}) for key in self._typed()):
            layers.append(len(files))
        for position in layers:
            try:
                before = parser.parse_args([self.command, *(f"--config={file}" for file in files[:position])])
            except argparse.ArgumentError:  # these files alone are no whole configuration
                continue
            for key, name, value in taken_over(before[self.command], final):
                if f"{key}.{name}" not in self._typed():
                    found.setdefault(key, {})[name] = value
        return found

    def _typed(self) -> Iterator[str]:
        """The dotted keys that the user wrote on the command line, without ``init_args``."""
        for word in self.words:
            if word.startswith("--") and not word.startswith("--config"):
                yield dotted_key(word)

    def _note(self, text: str) -> None:
        sys.stderr.write(f"lethe {self.command}: note: {text}.\n")

    def _parse_ckpt_path(self) -> None:
        """Merge the hyper-parameters of ``--ckpt_path`` and say what replaces what."""
        path = self.config[self.command].get("ckpt_path")
        if not path:
            return
        if str(path) in ("best", "last", "hpc") or str(path).startswith("registry") or Path(path).is_dir():
            self._note(f"--ckpt_path {path}: the hyper-parameters stored there are not read, the configuration counts")
            return
        stored = stored_hyperparameters(path)
        if not stored:
            return
        model = self.config[self.command].model
        kind, class_path = short_name(model.class_path), stored.pop("_class_path", None)
        if class_path is not None and class_path != model.class_path:
            other = short_name(class_path)
            raise UsageError(
                f"--ckpt_path {path} holds a {other}, but the model is a {kind}; "
                f"give --model {other}, or load only the weights with --model.weights"
            )
        current = self._model_arguments()
        typed = {key.split(".")[1] for key in self._typed() if key.startswith("model.")}
        for name in [name for name in stored if name not in current]:
            del stored[name]
            self._note(
                f"{path} stores the hyper-parameter '{name}', which {short_name(model.class_path)} does not have"
            )
        for name in [name for name in stored if stored[name] != current[name]]:
            if name in typed:
                old = stored.pop(name)
                self._note(f"model.{name} is {brief(current[name])} as typed, {path} was trained with {brief(old)}")
            else:
                self._note(f"model.{name} is {brief(stored[name])} from {path}, not {brief(current[name])}")
        update = {"class_path": model.class_path, "init_args": stored}
        self.config = self.parser.parse_object({self.command: {"model": update}}, self.config)

    def _model_arguments(self) -> dict[str, Any]:
        dump = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False, skip_none=False, format="yaml"))
        return dict(dump[self.command]["model"].get("init_args", {}))

    def before_instantiate_classes(self) -> None:
        """Refuse a run without data, and to unlearn, attack or protect with a random network."""
        config = self.config[self.command]
        kind = target_of(config.model.class_path) if config.get("model") else None
        loader = LOADERS[self.command]
        if config.get("data") is None and getattr(kind, loader, None) is getattr(LightningModule, loader):
            raise UsageError(
                "the configuration has no data: name a datamodule with --data, such as --data DigitsDataModule, "
                "or give a --config that has 'data'"
            )
        arguments = (config.get("model") or Namespace()).get("init_args") or Namespace()
        given = arguments.get("weights") or config.get("ckpt_path") or _sets(arguments.get("network"), "pretrained")
        deed = _deed_on_a_trained_network(kind, self.command, arguments)
        if kind is not None and deed and not given and not config.trainer.fast_dev_run:
            # checkpoints of attacks do not hold the network
            other = (
                ""
                if self.command == "predict" or deed == "attacks"
                else ", or a checkpoint to resume from with --ckpt_path"
            )
            raise UsageError(f"{kind.__name__} {deed} a trained network: give its weights with --model.weights{other}")

    def after_fit(self) -> None:
        """Write the last metrics, and say where the files of the run are."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        record_metrics(self.trainer)
        folder = self.trainer.log_dir or self.trainer.default_root_dir  # on every rank, as it is broadcast
        if self.trainer.is_global_zero:
            sys.stdout.write(f"files  {_relative(folder)}\n")

    def after_validate(self) -> None:
        """Write the metrics."""
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            record_metrics(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add Lethe's checkpoint writer, guard and writer of results, each unless the configuration has one."""
        from torchlethe.callbacks import ExportWeights, NonFiniteGuard, NothingToForget, SavePredictions
        from torchlethe.checkpoint_io import AtomicCheckpointIO

        config = self._get(self.config_init, "trainer")
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        outputs: dict[str, list[type[Callback]]] = {
            "fit": [ExportWeights, NothingToForget],
            "predict": [SavePredictions],
        }
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        if any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            outputs["predict"] = []
        kinds: list[type[Callback]] = [NonFiniteGuard, *outputs.get(self.command, [])]
        # somebody else's module may call its network by another name: then the whole module is exported
        own = "network" if hasattr(self.model, "network") else None
        options: dict[type[Callback], Any] = {ExportWeights: {"attribute": getattr(self.model, "exported", own)}}
        for kind in kinds:
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(kind(**options.get(kind, {})))
        trainer = super().instantiate_trainer(plugins=plugins, callbacks=callbacks, **kwargs)
        cores = os.cpu_count() or 1
        if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > max(cores, 2):
            # each device is a process with a copy of everything: a slip of the finger takes the machine down
            raise UsageError(f"--trainer.devices is {trainer.num_devices}, but this machine has {cores} CPU cores")
        return trainer


def _deed_on_a_trained_network(kind: Any, command: str, arguments: Any) -> str | None:
    """What a method does to, or with, a network that makes no sense with a random one, or None."""
    from torchlethe.lightning_modules import ProtectionModule, UniversalPerturbation, UnlearningModule

    if not inspect.isclass(kind):
        return None
    if issubclass(kind, UnlearningModule) and command == "fit":
        return "changes"
    if issubclass(kind, UniversalPerturbation) and command != "predict":
        return "attacks"
    if issubclass(kind, ProtectionModule) and command == "predict" and kind.needs_weights(arguments):
        return "protects with"
    return None


def _sets(config: Any, name: str) -> bool:
    """Whether an argument of this name is true (set to anything but false) anywhere below."""
    if isinstance(config, list | tuple):
        return any(_sets(value, name) for value in config)
    values = vars(config) if isinstance(config, Namespace) else config if isinstance(config, dict) else {}
    return any((key == name and bool(value)) or _sets(value, name) for key, value in values.items())


def _relative(path: str) -> str:
    """A path below the working directory without its front part."""
    if "://" in path:
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
