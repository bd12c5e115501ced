"""What a run has forgotten and kept: accuracies, membership attacks and distances to Retrain, for any classifier."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from torchlethe.arguments import check_choice
from torchlethe.callbacks.evaluation_passes import check_loaders, check_weights, collect_outputs
from torchlethe.callbacks.evaluation_record import OTHERS, describe_run, publish, split_hash, write_evaluation
from torchlethe.callbacks.evaluation_reference import (
    KnownReference,
    known_reference,
    known_relearning,
    read_reference_evaluation,
)
from torchlethe.callbacks.evaluation_summary import (
    Summary,
    answers_of,
    compare,
    layer_distances,
    per_class,
    summarise,
    with_known,
)
from torchlethe.callbacks.relearning_passes import check_relearning, collect_samples, measure_relearning
from torchlethe.callbacks.run_clock import RunEvaluation
from torchlethe.callbacks.run_folder import run_folder
from torchlethe.functional.summary import TUG_OF_WAR_METRICS, speed_up
from torchlethe.metrics.evaluation import (
    DIVERGENCES,
    HEADLINE_MEMBERSHIP,
    Outputs,
    check_membership,
    divergence_metrics,
)
from torchlethe.metrics.relearning import RelearningSettings
from torchlethe.metrics.support_vectors import SVCMode

OutputSets = Mapping[str, Mapping[str, Outputs]]
STAGES = ("fit", "test")


class UnlearningEvaluation(RunEvaluation):
    """Evaluate unlearning at the end of a fit or test, for any LightningModule whose ``forward(image)`` gives logits.

    Each evaluation set passes through the model once, in eval mode without gradients; all numbers come from these
    logits, in float64 on the CPU. Written beside the run's other files, on rank 0 and atomically:

    * ``evaluation.json``: metric name → number (``null`` where a diverged model gives none); ``per_class``, lists with
      the accuracy of each class (own, ``original``, ``reference``) by set; ``layers``, the distance of each parameter
      to the reference's; and ``meta`` with the split's hash, the sizes of the sets, the reference, settings, hardware,
      and ``seconds`` of ``prepare`` (from fit start to the first epoch), ``fit`` (the loop) and ``evaluation``, the
      first two without validation. A test in a process of its own knows neither times nor original weights;
    * ``evaluation.npz``: ``confidence_<set>`` (float32, the true label's probability of each sample) and
      ``prediction_<set>`` (the most probable class), the same with ``_original`` and ``_reference`` where known,
      ``index_<set>`` (int64), ``label_<set>``, and ``logits_forget`` (float32, up to 16 MiB).

    The numbers also go to ``trainer.callback_metrics`` and the loggers. Accuracies and attacks are in percent;
    :data:`torchlethe.metrics.METRIC_DEFINITIONS` defines each. With a ``reference`` the metrics of Retrain appear as
    ``reference_…``, with the average gap, the tug of war, agreement sample by sample, over-forgetting class by class,
    distances of outputs and weights and, when the reference's own evaluation file lies beside its weights, the
    speed-up. That file is also used instead of passes through the reference where it was made on the same split with
    the same settings.

    Args:
        reference: weights of the model retrained without the forget set, for :func:`torchlethe.io.load_weights` into a
            copy of the module's ``attribute``.
        original: weights of the model before unlearning; without them the module's own weights at fit start serve.
        before: whether to evaluate the module on the forget and test set at fit start as the original; without effect
            when ``original`` is given or a fit is resumed (the checkpoint remembers).
        membership: attacks, names out of :data:`torchlethe.metrics.evaluation.MEMBERSHIP`; the first one counts in the
            average gap.
        divergences: distances to the reference on the forget set: ``kl``, ``js``, ``activation_distance``,
            ``completeness``, ``wasserstein1_confidence``, ``wasserstein1_loss``.
        stages: when to evaluate: at the end of ``fit``, of ``test``, or both.
        filename: name of the JSON file in the run's folder (the logger's, else the Trainer's ``default_root_dir``); the
            arrays get the suffix ``.npz``.
        loaders: data loaders by set name, at least ``forget``, ``remain`` and ``test``, in place of the datamodule's
            ``evaluation_loaders()``. Batches may be plain ``(image, label)`` tuples and are given to ``forward`` as
            they are (uint8 images divided by 255); they must not be shuffled.
        seed: seed of the attacks' random choices.
        svc_mode: ``auto`` merges scalar features on a grid (fast), ``exact`` does not.
        table: whether to show a table on rank 0 when the Trainer shows progress.
        attribute: the part of the module that takes the weights of ``reference`` and ``original``.
        relearning: how to measure relearning time, ``{}`` for the defaults of
            :class:`~torchlethe.metrics.RelearningSettings`; not measured without. A copy of the network is fine-tuned
            on the forget set, in eval mode, until it is back within a margin of the original's forget accuracy, and so
            is the reference, unless its own run measured that in the same way. Needs the original: the run of a
            reference, which starts from random weights, must be given ``original``.

    Raises:
        ValueError: an argument is unknown; or, before training starts, no data are available, a weight file is
            missing, or the reference was retrained on another split.

    Note:
        Under DDP each rank evaluates its own share; the logits are gathered once, padding is dropped and the order is
        that of the samples' index, so the numbers do not depend on the number of ranks. Relearning takes place on rank
        0 with the samples of all ranks, while the others wait. Randomness that training uses
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
        attribute: str = "network",
        relearning: RelearningSettings | None = None,
    ) -> None:
        super().__init__()
        for argument, values, allowed in (("divergences", divergences, DIVERGENCES), ("stages", stages, STAGES)):
            if isinstance(values, str) or any(value not in allowed for value in values):
                raise ValueError(f"{argument}={values!r} must be a list out of {', '.join(allowed)}.")
        if not filename.endswith(".json"):
            raise ValueError(f"filename={filename!r} must end in .json.")
        check_choice(("auto", "fast", "exact"), svc_mode=svc_mode)
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
        self.attribute = attribute
        self.relearning = RelearningSettings(**relearning) if isinstance(relearning, Mapping) else relearning
        self._before: Summary | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be evaluated before training starts."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._before = None
        if stage not in self.stages:
            return
        if self.loaders is not None:
            check_loaders(self.loaders)
        elif not hasattr(getattr(trainer, "datamodule", None), "evaluation_loaders"):
            raise ValueError(
                "UnlearningEvaluation has no data: pass UnlearningDataModule(data, forget) to the Trainer, or "
                "loaders={'forget': …, 'remain': …, 'test': …} to the callback."
            )
        for argument, path in (("reference", self.reference), ("original", self.original)):
            if path is not None:
                check_weights(trainer, pl_module, argument, path, self.attribute)
        if self.relearning is not None:
            check_relearning(trainer, pl_module, self.attribute)
            if self.original is None and (stage == "test" or not self.before):
                raise ValueError(
                    "relearning is measured against the original's forget accuracy: give original, the weights before "
                    "unlearning" + ("." if stage == "test" else ", or set before=True.")
                )
        own, other = split_hash(trainer), self._reference_evaluation().get("meta", {}).get("split_hash")
        if own and other and own != other:
            raise ValueError(
                f"reference='{self.reference}' was retrained on another split ({other[:9]}…, this run has {own[:9]}…)."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the weights as they come, then start the clock."""
        resumed = trainer.ckpt_path is not None or self._before is not None
        if self.before and self.original is None and "fit" in self.stages and not resumed:
            outputs = collect_outputs(trainer, pl_module, self.loaders, names=("forget", "test"))
            if trainer.is_global_zero:
                self._before = self._summarise(outputs)
        super().on_fit_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The original's numbers and the time spent so far, for a resumed fit."""
        return {"before": self._before, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state_dict)
        self._before = state_dict["before"]

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.perf_counter()
        retrain = self._reference_evaluation()
        known = trainer.strategy.broadcast(self._known(trainer, retrain), src=0)
        sets = {"": collect_outputs(trainer, pl_module, self.loaders)}
        folder = run_folder(trainer)  # on every rank
        for title, weights, names in (
            ("original", self.original, None),
            ("reference", self.reference, ("forget",) if known else None),
        ):
            if weights:
                sets[title] = collect_outputs(
                    trainer, pl_module, self.loaders, names=names, weights=weights, attribute=self.attribute
                )
        samples = None
        if self.relearning is not None:
            index = sets[""]["forget"].index
            samples = collect_samples(trainer, pl_module, self.loaders, index, self.relearning)
        result: dict[str, float] | Exception = {}
        if trainer.is_global_zero:
            try:
                result = self._conclude(trainer, pl_module, folder, sets, known, retrain, samples, started)
            except (ValueError, OSError) as error:
                result = error  # it must reach the ranks that wait for the numbers
        result = trainer.strategy.broadcast(result, src=0)
        if isinstance(result, Exception):
            raise result
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in result.items()}
        trainer.callback_metrics.update(tensors)

    def _conclude(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        folder: Path,
        sets: OutputSets,
        known: KnownReference | None,
        retrain: Mapping[str, Any],
        samples: tuple[Tensor, Tensor] | None,
        started: float,
    ) -> dict[str, float]:
        """The flat metrics of the run (named ``""``) and the other models, written, logged and shown."""
        summaries = {title: self._summarise(outputs) for title, outputs in sets.items()}
        if self._before:
            summaries.setdefault("original", self._before)
        if known:
            summaries["reference"] = with_known(summaries["reference"], known)
        labels = {name: outputs.labels for name, outputs in sets[""].items()}
        metrics: dict[str, float] = dict(summaries[""]["metrics"])
        lists: dict[str, Any] = {"per_class": per_class(summaries, labels, _class_names(trainer))}
        own_seconds = sum(self.clock.seconds.values())
        if own_seconds:
            metrics["run_seconds"] = own_seconds
        if self.reference:
            metrics |= divergence_metrics(sets[""]["forget"], sets["reference"]["forget"], self.divergences)
            metrics |= compare(summaries[""], summaries["reference"], labels, self._gap_names)
            distances, lists["layers"] = layer_distances(getattr(pl_module, self.attribute), self.reference)
            metrics |= distances
            if own_seconds and retrain.get("run_seconds"):
                metrics["speed_up"] = speed_up(own_seconds, retrain["run_seconds"])
        record: dict[str, Any] = {}
        if self.relearning is not None and samples is not None:
            levels = {title: answers_of(summary).get("forget") for title, summary in summaries.items()}
            settings = asdict(self.relearning)
            found, record = measure_relearning(
                pl_module,
                samples,
                self.relearning,
                levels,
                labels["forget"],
                reference=self.reference,
                known=lambda target: known_relearning(retrain, split_hash(trainer), settings, target),
                attribute=self.attribute,
            )
            metrics |= found
        for title in OTHERS:
            if title in summaries:
                metrics |= {f"{title}_{name}": value for name, value in summaries[title]["metrics"].items()}
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            seconds = {**self.clock.seconds, "evaluation": time.perf_counter() - started}
            weights = {"reference": self.reference, "original": self.original}
            meta = describe_run(trainer, sets[""], weights, self._settings, seconds)
            meta |= {"relearning": record} if record else {}
            answers = {title: answers_of(summary) for title, summary in summaries.items()}
            write_evaluation(folder / self.filename, metrics, lists, meta, sets[""], answers)
            publish(trainer, metrics, self.table)
        return metrics

    def _summarise(self, sets: Mapping[str, Outputs]) -> Summary:
        return summarise(sets, membership=self.membership, svc_mode=self.svc_mode, seed=self.seed)

    def _known(self, trainer: Trainer, retrain: Mapping[str, Any]) -> KnownReference | None:
        if self.reference is None:
            return None
        path = self.reference.parent / self.filename
        return known_reference(path, retrain, split_hash(trainer), self._settings, self._gap_names)

    @property
    def _gap_names(self) -> tuple[str, ...]:
        return (*TUG_OF_WAR_METRICS, *(f"mia_{name}" for name in self.membership[:1]))

    @property
    def _settings(self) -> dict[str, Any]:
        return {"membership": list(self.membership), "svc_mode": self.svc_mode, "seed": self.seed}

    def _reference_evaluation(self) -> dict[str, Any]:
        return read_reference_evaluation(self.reference.parent / self.filename) if self.reference else {}


def _class_names(trainer: Trainer) -> list[str] | None:
    """The names of the classes, where the datamodule knows them."""
    found = getattr(getattr(trainer, "datamodule", None), "classes", None)
    return [str(name) for name in found] if isinstance(found, list | tuple) else None
