"""What a run has forgotten and kept: accuracies, membership attacks and distances to Retrain, for any classifier."""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler

from torchlethe.data import PADDING_LABEL, as_batch
from torchlethe.functional.summary import TUG_OF_WAR_METRICS, average_gap, speed_up, tug_of_war
from torchlethe.functional.uncertainty import drop_padding
from torchlethe.io import atomic_write, file_hash, load_weights
from torchlethe.metrics.definitions import define_metric
from torchlethe.metrics.evaluation import (
    DIVERGENCES,
    HEADLINE_MEMBERSHIP,
    Outputs,
    check_membership,
    divergence_metrics,
    unlearning_metrics,
)
from torchlethe.metrics.passes import gather_rows, own_batches
from torchlethe.metrics.roles import distinct_rows
from torchlethe.metrics.summary import RuntimeMeter
from torchlethe.metrics.support_vectors import SVCMode

REQUIRED = ("forget", "remain", "test")
BEFORE = ("forget", "test")


class UnlearningEvaluation(Callback):
    """Evaluate unlearning at the end of a fit or test, for any LightningModule whose ``forward(image)`` gives logits.

    Each evaluation set passes through the model once, in eval mode without gradients; all numbers come from these
    logits, in float64 on the CPU. Written beside the run's other files, on rank 0 and atomically:

    * ``evaluation.json``: metric name → number (``null`` where a diverged model gives none), and ``meta`` with the
      split's hash, the sizes of the sets, the reference, settings, hardware, and ``seconds`` of ``prepare`` (from fit
      start to the first epoch), ``fit`` (the loop) and ``evaluation``, the first two without validation. A test in a
      process of its own knows neither times nor original weights;
    * ``evaluation.npz``: ``confidence_<set>`` (float32, the true label's probability of each sample),
      ``confidence_<set>_original`` and ``confidence_<set>_reference`` where known, and ``index_<set>`` (int64).

    The numbers also go to ``trainer.callback_metrics`` and the loggers. Accuracies and attacks are in percent;
    :data:`torchlethe.metrics.METRIC_DEFINITIONS` defines each. With a ``reference`` the metrics of Retrain appear as
    ``reference_…``, with the average gap, the tug of war and, when the reference's own evaluation file lies beside its
    weights, the speed-up. That file is also used instead of passes through the reference where it was made on the same
    split with the same settings.

    Args:
        reference: weights of the model retrained without the forget set, for :func:`torchlethe.io.load_weights` into a
            copy of the module's ``network``.
        original: weights of the model before unlearning; without them the module's own weights at fit start serve.
        before: whether to evaluate the module on the forget and test set at fit start as the original; without effect
            when ``original`` is given or a fit is resumed (the checkpoint remembers).
        membership: attacks, names out of :data:`torchlethe.metrics.evaluation.MEMBERSHIP`; the first one counts in the
            average gap.
        divergences: distances to the reference on the forget set: ``kl``, ``js``, ``activation_distance``,
            ``completeness``, ``wasserstein1_confidence``, ``wasserstein1_loss``.
        stages: when to evaluate: at the end of ``fit``, of ``test``, or both.
        filename: name of the JSON file in the Trainer's ``default_root_dir``; the arrays get the suffix ``.npz``.
        loaders: data loaders by set name, at least ``forget``, ``remain`` and ``test``, in place of the datamodule's
            ``evaluation_loaders()``. Batches may be plain ``(image, label)`` tuples and are given to ``forward`` as
            they are (uint8 images divided by 255); they must not be shuffled.
        seed: seed of the attacks' random choices.
        svc_mode: ``auto`` merges scalar features on a grid (fast), ``exact`` does not.
        table: whether to show a table on rank 0 when the Trainer shows progress.

    Raises:
        ValueError: an argument is unknown; or, before training starts, no data are available, a weight file is
            missing, or the reference was retrained on another split.

    Note:
        Under DDP each rank evaluates its own share; the logits are gathered once, padding is dropped and the order is
        that of the samples' index, so the numbers do not depend on the number of ranks. Randomness that training uses
        is left untouched. The fit's evaluation runs when training has ended and the weights are still on their device
        (``on_train_end``). A ``fast_dev_run`` evaluates that many batches of each set and writes nothing.

    Example:
        >>> evaluation = UnlearningEvaluation(membership=["entropy_logistic", "simple"], table=False)
        >>> evaluation.filename
        'evaluation.json'
    """

    def __init__(
        self,
        reference: str | Path | None = None,
        original: str | Path | None = None,
        before: bool = True,
        membership: Sequence[str] = HEADLINE_MEMBERSHIP,
        divergences: Sequence[str] = ("kl", "js"),
        stages: Sequence[Literal["fit", "test"]] = ("fit", "test"),
        filename: str = "evaluation.json",
        loaders: dict[str, Any] | None = None,
        seed: int = 0,
        svc_mode: SVCMode = "auto",
        table: bool = True,
    ) -> None:
        for argument, values, allowed in (
            ("divergences", divergences, DIVERGENCES),
            ("stages", stages, ("fit", "test")),
        ):
            if isinstance(values, str) or any(value not in allowed for value in values):
                raise ValueError(f"{argument}={values!r} must be a list out of {', '.join(allowed)}.")
        if not filename.endswith(".json"):
            raise ValueError(f"filename={filename!r} must end in .json.")
        if svc_mode not in ("auto", "fast", "exact"):
            raise ValueError(f"svc_mode={svc_mode!r} is unknown, allowed are auto, fast, exact.")
        self.reference = Path(reference) if reference is not None else None
        self.original = Path(original) if original is not None else None
        self.before = before
        self.membership = check_membership(membership)
        self.divergences = tuple(divergences)
        self.stages = tuple(stages)
        self.filename = filename
        self.loaders = loaders
        self.seed = seed
        self.svc_mode: SVCMode = svc_mode
        self.table = table
        self.clock = RuntimeMeter()
        self._paused: str | None = None
        self._before: dict[str, Any] | None = None

    # ---- checks before anything runs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be evaluated before training starts."""
        if stage == "fit":
            self._before, self._paused = None, None
            self.clock = RuntimeMeter(trainer.strategy.root_device)
        if stage not in self.stages:
            return
        if self.loaders is None and not hasattr(getattr(trainer, "datamodule", None), "evaluation_loaders"):
            raise ValueError(
                "UnlearningEvaluation has no data: pass UnlearningDataModule(data, forget) to the Trainer, or "
                "loaders={'forget': …, 'remain': …, 'test': …} to the callback."
            )
        for name, loader in (self.loaders or {}).items():
            sampler = getattr(loader, "sampler", None)
            if isinstance(sampler, RandomSampler) or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
                raise ValueError(f"loaders[{name!r}] is shuffled; evaluation needs a fixed order, use shuffle=False.")
        if self.loaders is not None:
            self._check_sets(self.loaders)
        for argument, path in (("reference", self.reference), ("original", self.original)):
            if path is None:
                continue
            if not path.is_file():
                raise ValueError(f"{argument}='{path}' does not exist.")
            if not isinstance(getattr(pl_module, "network", None), nn.Module):
                raise ValueError(f"{argument}='{path}' needs a module with a 'network' to load the weights into.")
            if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
                raise ValueError(
                    f"{argument}='{path}' cannot be loaded beside a sharded network, evaluate it with DDP."
                )
        own, other = _split_hash(trainer), self._reference_evaluation().get("meta", {}).get("split_hash")
        if own and other and own != other:
            raise ValueError(
                f"reference='{self.reference}' was retrained on another split ({other[:9]}…, this run has {own[:9]}…)."
            )

    # ---- the run's own time: prepare and fit, without validation and evaluation

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the weights as they come, then start the clock."""
        resumed = trainer.ckpt_path is not None or self._before is not None
        if self.before and self.original is None and "fit" in self.stages and not resumed:
            outputs = self._collect(trainer, pl_module, BEFORE)
            if trainer.is_global_zero:
                self._before = self._summarise(outputs)
        self.clock.start("prepare")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Preparation is over; modules may prepare up to the end of their own ``on_train_start``."""
        if self.clock.running == "prepare":
            self.clock.start("fit")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The same for a fit that resumes within an epoch, where no epoch starts."""
        if self.clock.running == "prepare":
            self.clock.start("fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock for a validation."""
        self._paused = self.clock.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on after a validation."""
        if self._paused is not None:
            self.clock.start(self._paused)
            self._paused = None

    def state_dict(self) -> dict[str, Any]:
        """The original's numbers and the time spent so far, for a resumed fit."""
        return {"before": self._before, "seconds": self.clock.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._before = state_dict["before"]
        self.clock.load(state_dict["seconds"])

    # ---- evaluation

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and evaluate."""
        self.clock.stop()
        if "fit" in self.stages:
            self._evaluate(trainer, pl_module, "fit")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate."""
        if "test" in self.stages:
            self._evaluate(trainer, pl_module, "test")

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        started = time.perf_counter()
        known = trainer.strategy.broadcast(self._usable_reference(trainer), src=0)
        sets = {"": self._collect(trainer, pl_module)}
        if self.original:
            sets["original"] = self._collect(trainer, pl_module, weights=self.original)
        if self.reference:
            names = ("forget",) if known else REQUIRED
            sets["reference"] = self._collect(trainer, pl_module, names, self.reference)
        problem: Exception | None = None
        metrics: dict[str, float] = {}
        if trainer.is_global_zero:
            # an error here must reach the ranks that wait for the numbers
            try:
                summaries = {title: self._summarise(outputs) for title, outputs in sets.items()}
                metrics = self._numbers(sets, summaries, known)
                if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                    meta = self._meta(trainer, pl_module, stage, sets[""], time.perf_counter() - started)
                    self._record(trainer, metrics, meta, sets[""], summaries)
            except (ValueError, OSError) as error:
                problem = error
        problem, metrics = trainer.strategy.broadcast((problem, metrics), src=0)
        if problem is not None:
            raise problem
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
        trainer.callback_metrics.update(tensors)

    def _numbers(
        self, sets: Mapping[str, Mapping[str, Outputs]], summaries: dict[str, Any], known: dict[str, float]
    ) -> dict[str, float]:
        """The flat metrics; completes the summaries by what is known of the original and the reference."""
        if self._before and "original" not in summaries:
            summaries["original"] = self._before
        metrics: dict[str, float] = dict(summaries[""]["metrics"])
        own_time = sum(self.clock.seconds.values())
        if own_time:
            metrics["run_seconds"] = own_time
        if "reference" in sets:
            retrained = summaries["reference"]["metrics"]
            retrained |= known
            metrics |= divergence_metrics(sets[""]["forget"], sets["reference"]["forget"], self.divergences)
            metrics["average_gap"] = average_gap(metrics, retrained, self._gap_names)
            metrics["tug_of_war"] = tug_of_war(metrics, retrained)
            spent = self._reference_evaluation().get("run_seconds")
            if own_time and spent:
                metrics["speed_up"] = speed_up(own_time, spent)
        for title in ("original", "reference"):
            found = summaries[title]["metrics"] if title in summaries else {}
            metrics |= {f"{title}_{name}": value for name, value in found.items()}
        return metrics

    def _meta(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, after: Mapping[str, Outputs], spent: float
    ) -> dict[str, Any]:
        seconds = self.clock.seconds
        return {
            "stage": stage,
            "module": type(pl_module).__name__,
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "split_hash": _split_hash(trainer),
            "counts": {name: len(outputs.labels) for name, outputs in after.items()},
            "reference": _describe(self.reference),
            "original": _describe(self.original),
            "settings": self._settings,
            "hardware": _hardware(trainer),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "seconds": {"prepare": seconds.get("prepare"), "fit": seconds.get("fit"), "evaluation": spent},
        }

    def _record(
        self,
        trainer: Trainer,
        metrics: Mapping[str, float],
        meta: Mapping[str, Any],
        after: Mapping[str, Outputs],
        summaries: Mapping[str, Any],
    ) -> None:
        """Write the two files, log, and show the table."""
        arrays = {f"index_{name}": outputs.index.numpy() for name, outputs in after.items()}
        for title, summary in summaries.items():
            for name, values in summary["confidence"].items():
                arrays[f"confidence_{name}_{title}".rstrip("_")] = values.cpu().numpy()
        path = Path(trainer.default_root_dir) / self.filename
        with atomic_write(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        # the JSON file comes last: where it exists, the evaluation is complete
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({**plain, "meta": meta}, indent=2, allow_nan=False) + "\n")
        for logger in trainer.loggers:
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            logger.log_metrics(finite, step=trainer.global_step)
        if self.table and trainer.progress_bar_callback is not None:
            _show(metrics)

    @property
    def _gap_names(self) -> tuple[str, ...]:
        first = next((f"mia_{name}" for name in self.membership), None)
        return (*TUG_OF_WAR_METRICS, first) if first else TUG_OF_WAR_METRICS

    @property
    def _settings(self) -> dict[str, Any]:
        return {"membership": list(self.membership), "svc_mode": self.svc_mode, "seed": self.seed}

    def _summarise(self, sets: Mapping[str, Outputs]) -> dict[str, Any]:
        return {
            "metrics": unlearning_metrics(sets, membership=self.membership, svc_mode=self.svc_mode, seed=self.seed),
            "confidence": {name: outputs.confidence() for name, outputs in sets.items()},
        }

    def _reference_evaluation(self) -> dict[str, Any]:
        path = self.reference.parent / self.filename if self.reference else None
        if path is None or not path.is_file():
            return {}
        try:
            return json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"the reference's evaluation '{path}' is no JSON file, remove or repeat it.") from None

    def _usable_reference(self, trainer: Trainer) -> dict[str, float]:
        """Retrain's numbers from its own evaluation, where split and settings are the same; else empty."""
        found = self._reference_evaluation()
        meta = found.get("meta", {})
        same = meta.get("split_hash") == _split_hash(trainer) is not None and meta.get("settings") == self._settings
        prefixes = ("original_", "reference_")
        metrics = {
            name: float(value)
            for name, value in found.items()
            if isinstance(value, int | float)
            and not name.startswith(prefixes)
            and (name.endswith("_accuracy") or name.startswith("mia_"))
        }
        return metrics if same and all(name in metrics for name in self._gap_names) else {}

    # ---- passes through the model

    def _check_sets(self, loaders: Mapping[str, Any]) -> None:
        missing = [name for name in REQUIRED if name not in loaders]
        if missing:
            raise ValueError(f"the evaluation lacks the sets {', '.join(missing)}, it needs {', '.join(REQUIRED)}.")

    def _collect(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        names: Sequence[str] | None = None,
        weights: Path | None = None,
    ) -> dict[str, Outputs]:
        """Pass evaluation sets through the model; the outputs are complete on rank 0 and empty elsewhere."""
        # an iterator over a DataLoader draws from the global generator; training must not notice
        with isolate_rng(), torch.no_grad(), _evaluating(pl_module), _with_weights(pl_module, weights):
            loaders = self.loaders if self.loaders is not None else trainer.datamodule.evaluation_loaders()  # type: ignore[attr-defined]
            self._check_sets(loaders)
            chosen = {name: loader for name, loader in loaders.items() if names is None or name in names}
            return {name: self._pass(trainer, pl_module, name, loader) for name, loader in chosen.items()}

    def _pass(self, trainer: Trainer, pl_module: LightningModule, name: str, loader: Any) -> Outputs:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        limit = int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]
        rank, world = trainer.global_rank, trainer.world_size
        for raw, positions, repeated in own_batches(loader, rank, world, count=_count, limit=limit):
            batch = self._prepare(trainer, pl_module, raw)
            image, label = trainer.precision_plugin.convert_input(batch["image"]), batch["label"]
            with trainer.precision_plugin.forward_context():
                logits = pl_module(image)
            if not isinstance(logits, Tensor) or logits.ndim != 2 or label.shape != logits.shape[:1]:
                got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                raise ValueError(
                    f"{type(pl_module).__name__}.forward(image) must give logits ({len(image)}, classes) for the "
                    f"labels {tuple(label.shape)} of the set '{name}', got {got}."
                )
            logits, label, index = logits.cpu(), label.cpu(), batch.get("index", positions).cpu()
            keep = (label != PADDING_LABEL) & (index >= 0) & (not repeated)
            logits, label = drop_padding(logits[keep], label[keep])
            parts.append((logits if logits.dtype == torch.float64 else logits.float(), label, index[keep]))
        if not parts:
            raise ValueError(f"the evaluation set '{name}' is empty.")
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        if world > 1:
            keep_here, device = trainer.is_global_zero, trainer.strategy.root_device
            columns = [gather_rows(c, trainer.strategy.all_gather, keep=keep_here, device=device) for c in columns]
        rows = columns[2].argsort(stable=True) if world == 1 else distinct_rows(columns[2])
        return Outputs(*(column[rows] for column in columns))

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> dict[str, Any]:
        if self.loaders is None and hasattr(trainer.datamodule, "prepare_batch"):  # type: ignore[attr-defined]
            return trainer.datamodule.prepare_batch(batch, pl_module.device)  # type: ignore[attr-defined]
        batch = move_data_to_device(as_batch(batch), pl_module.device)
        image = batch["image"]
        return {**batch, "image": image.float() / 255 if image.dtype == torch.uint8 else image}


@contextmanager
def _evaluating(pl_module: nn.Module) -> Iterator[None]:
    # each submodule gets its own mode back: a method may hold BatchNorm in eval mode while it trains the rest
    modes = [(module, module.training) for module in pl_module.modules()]
    pl_module.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _with_weights(pl_module: LightningModule, weights: Path | None) -> Iterator[None]:
    if weights is None:
        yield
        return
    own: nn.Module = pl_module.network  # type: ignore[assignment]
    pl_module.network = load_weights(copy.deepcopy(own), weights).eval()
    try:
        yield
    finally:
        pl_module.network = own


def _count(batch: Any) -> int:
    return len(as_batch(batch)["label"])


def _split_hash(trainer: Trainer) -> str | None:
    return getattr(getattr(getattr(trainer, "datamodule", None), "split", None), "hash", None)


def _describe(weights: Path | None) -> dict[str, str] | None:
    return {"path": str(weights), "sha256": file_hash(weights)} if weights is not None else None


def _hardware(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.processor() or platform.machine()}"


def _show(metrics: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", title="Unlearning evaluation", title_justify="left")
    titles = ["", *(t for t in ("original", "reference") if any(name.startswith(f"{t}_") for name in metrics))]
    for title in titles:
        table.add_column({"": "this run", "reference": "Retrain"}.get(title, title), justify="right")
    for name in metrics:
        if name.startswith(("original_", "reference_")):
            continue
        definition = define_metric(name)
        cells = [metrics.get(f"{title}_{name}" if title else name) for title in titles]
        unit = f" ({definition.unit})" if definition and definition.unit else ""
        table.add_row(
            (definition.title if definition else name) + unit, *("" if v is None else f"{v:.4g}" for v in cells)
        )
    Console().print(table)
