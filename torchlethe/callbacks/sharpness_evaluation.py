"""How sharp the minimum is that a run has found, and how well it generalises, for any classifier."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from torchlethe.arguments import check_above
from torchlethe.callbacks.evaluation_record import describe_run, publish
from torchlethe.callbacks.run_clock import RunEvaluation
from torchlethe.callbacks.run_folder import run_folder
from torchlethe.callbacks.sharpness_data import (
    Source,
    find_test_source,
    find_train_source,
    seed_generators,
    set_up_test_data,
)
from torchlethe.components import all_reduce_sum, eval_mode
from torchlethe.functional.group_sharpness import Adaptive
from torchlethe.functional.hessian import hessian_top_eigenvalues
from torchlethe.functional.mean_loss import widest
from torchlethe.io import atomic_write
from torchlethe.metrics.sharpness import HessianTopEigenvalue, HessianTrace, MSharpness, SharpnessMetric

METRICS: tuple[Literal["hessian_top_eigenvalue", "hessian_trace", "m_sharpness"], ...] = (
    "hessian_top_eigenvalue",
    "hessian_trace",
    "m_sharpness",
)
SETS: tuple[Literal["train", "test"], ...] = ("train", "test")
STAGES: tuple[Literal["fit", "test"], ...] = ("fit", "test")


class SharpnessEvaluation(RunEvaluation):
    """Measure sharpness and accuracy at the end of a fit or test, for any LightningModule that gives logits.

    The sharpness metrics are those of the mean loss over a fixed subset of the training data, in eval mode and in full
    precision: ``hessian_top_eigenvalue``, ``hessian_trace``, ``m_sharpness``. Accuracy (percent) and loss are those of
    all training and test data, in the Trainer's precision: ``train_accuracy``, ``train_loss``, ``test_accuracy``,
    ``test_loss``. After a fit there is ``run_seconds``, its time without validation and evaluation. All go to
    ``trainer.callback_metrics``, to the loggers (but for names that the module has logged itself) and, by rank 0 and
    atomically, into ``evaluation.json`` beside the run's other files: metric name → number (``null`` where a diverged
    model gives none), and ``meta`` with settings, sizes, residual and standard error.
    :data:`torchlethe.metrics.METRIC_DEFINITIONS` defines each.

    Training data are taken in stored order and without augmentation: from Lethe's datamodules (the whole training set
    of an ``UnlearningDataModule``); from any other training loader its data set, with the transform of the test set
    where both are of one class, otherwise with its own under a fixed seed. A loader without a map-style data set gives
    its first samples. Batches pass the transfer hooks as in validation. After a fit the test set is the datamodule's or
    module's ``test_dataloader``; without one there are no test metrics.

    Args:
        samples: size of the random subset of the training data for the sharpness metrics; ``None`` for all. The subset
            stays on the device.
        metrics: which sharpness metrics.
        accuracy: the sets whose accuracy and loss are measured.
        batch_size: samples per pass of the sharpness metrics; it bounds their memory and changes no value.
        tolerance: of :class:`~torchlethe.metrics.HessianTopEigenvalue`, like ``max_sweeps``.
        max_sweeps: bound on the passes over the subset for the eigenvalue.
        probes: of :class:`~torchlethe.metrics.HessianTrace`.
        rho: of :class:`~torchlethe.metrics.MSharpness`, like ``m``, ``adaptive`` and ``eta``.
        m: samples in a group.
        adaptive: ``None`` for SAM's climb, ``w2`` or ``eta`` for ASAM's.
        eta: η of ``adaptive="eta"``.
        loss: maps logits and labels to the mean over the batch; cross-entropy by default.
        stages: when to evaluate: at the end of ``fit``, of ``test``, or both.
        filename: name of the file in the run's folder (the logger's, else ``default_root_dir``).
        loaders: data loaders ``train`` and ``test`` in place of those found; batches are given to ``forward`` as they
            are (uint8 images divided by 255). Of ``train`` the data set is used, in stored order.
        seed: seed of subset, eigenvalue and trace.

    Raises:
        ValueError: an argument is unknown or out of range; or, before training starts, the network cannot be
            differentiated twice, is sharded or in half precision, no training data are found, or another callback
            writes the same file.

    Note:
        Under DDP each rank passes its share and sums are all-reduced: values do not depend on the number of ranks.
        Training is the same with and without this callback. The fit is evaluated in ``on_train_end``, while the weights
        are on their device. A ``fast_dev_run`` evaluates that many batches of each set and writes nothing.

    Example:
        >>> evaluation = SharpnessEvaluation(samples=512, rho=0.1, metrics=["hessian_top_eigenvalue", "m_sharpness"])
        >>> evaluation.filename
        'evaluation.json'
    """

    def __init__(
        self,
        samples: int | None = 1000,
        metrics: Sequence[Literal["hessian_top_eigenvalue", "hessian_trace", "m_sharpness"]] = METRICS,
        accuracy: Sequence[Literal["train", "test"]] = SETS,
        batch_size: int = 64,
        tolerance: float = 1e-4,
        max_sweeps: int = 200,
        probes: int = 32,
        rho: float = 0.05,
        m: int | None = 128,
        adaptive: Adaptive | None = None,
        eta: float = 0.01,
        loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        stages: Sequence[Literal["fit", "test"]] = STAGES,
        filename: str = "evaluation.json",
        loaders: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for argument, values, allowed in (
            ("metrics", metrics, METRICS),
            ("accuracy", accuracy, SETS),
            ("stages", stages, STAGES),
            ("loaders", list(loaders or ()), SETS),
        ):
            if isinstance(values, str) or any(value not in allowed for value in values):
                raise ValueError(f"{argument}={values!r} must be a list out of {', '.join(allowed)}.")
        if not filename.endswith(".json"):
            raise ValueError(f"filename={filename!r} must end in .json.")
        check_above(0, samples=1 if samples is None else samples, batch_size=batch_size)
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.metrics, self.accuracy, self.stages = tuple(metrics), tuple(accuracy), tuple(stages)
        self.loss, self.filename, self.loaders = loss, filename, loaders
        self.settings: dict[str, dict[str, Any]] = {
            "hessian_top_eigenvalue": {"tolerance": tolerance, "max_sweeps": max_sweeps, "seed": seed},
            "hessian_trace": {"probes": probes, "seed": seed},
            "m_sharpness": {"rho": rho, "m": m, "adaptive": adaptive, "eta": eta},
        }
        self._measures(nn.Identity())  # their arguments are refused here rather than after the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be evaluated."""
        super().setup(trainer, pl_module, stage)
        if stage not in self.stages:
            return
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError("SharpnessEvaluation does not differentiate sharded networks twice: use the strategy ddp.")
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is not self and getattr(other, "filename", None) == self.filename:
                raise ValueError(
                    f"filename='{self.filename}' of SharpnessEvaluation is also that of {type(other).__name__}: "
                    "give one of them another."
                )
        if stage == "test" and (self.metrics or "train" in self.accuracy):
            find_train_source(trainer, pl_module, self.loaders)
        if stage == "fit":
            set_up_test_data(trainer, self.loaders)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Differentiate the loss of two samples twice, so that a fit does not end in a surprise."""
        if "fit" not in self.stages or not (self.metrics or "train" in self.accuracy):
            return
        with isolate_rng(), trainer.precision_plugin.forward_context():
            share = self._training_share(trainer, pl_module, samples=2 * trainer.world_size, group=2)
            if share:
                self._check_logits(pl_module, share[0][0])
            if share and self.metrics:
                hessian_top_eigenvalues(pl_module, share, loss=self.loss, max_sweeps=2)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started, folder = time.perf_counter(), run_folder(trainer)  # the folder on every rank
        # reading data draws from the global generators; training must not notice
        with isolate_rng(), torch.inference_mode(False):
            metrics, details = self._sharpness(trainer, pl_module)
            counts = {"sharpness": details.pop("samples", 0)}
            for name in self.accuracy:
                source = (find_train_source if name == "train" else find_test_source)(trainer, pl_module, self.loaders)
                if source is not None:
                    seed_generators(self.seed)
                    right, mean, counts[name] = self._accuracy(trainer, pl_module, source)
                    metrics |= {f"{name}_accuracy": right, f"{name}_loss": mean}
        if not self._announce(trainer, metrics):
            return
        seconds = {**self.clock.seconds, "evaluation": time.perf_counter() - started}
        settings = {name: self.settings[name] for name in self.metrics} | {"loss": _title(self.loss)}
        meta = {**describe_run(trainer, {}, {}, settings, seconds), "counts": counts, "details": details}
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with atomic_write(folder / self.filename) as temporary:
            temporary.write_text(json.dumps({**plain, "meta": meta}, indent=2, allow_nan=False) + "\n")
        # a series that the module logs itself, maybe in another unit, gets no point more
        publish(trainer, {k: v for k, v in metrics.items() if k not in trainer.logged_metrics}, table=False)

    def _measures(self, network: nn.Module) -> dict[str, SharpnessMetric]:
        classes: Mapping[str, Callable[..., SharpnessMetric]] = {
            "hessian_top_eigenvalue": HessianTopEigenvalue,
            "hessian_trace": HessianTrace,
            "m_sharpness": MSharpness,
        }
        return {name: classes[name](network, loss=self.loss, **self.settings[name]) for name in METRICS}

    def _sharpness(self, trainer: Trainer, pl_module: LightningModule) -> tuple[dict[str, float], dict[str, Any]]:
        if not self.metrics:
            return {}, {}
        share = self._training_share(trainer, pl_module, self.samples, self.settings["m_sharpness"]["m"])
        if share:
            self._check_logits(pl_module, share[0][0])
        values: dict[str, float] = {}
        measures = self._measures(pl_module)
        for name in self.metrics:
            for image, label in share:
                measures[name].update(image, label)
            with trainer.precision_plugin.forward_context():
                values[name] = measures[name].to(pl_module.device).compute().item()
        own = torch.tensor(float(sum(len(label) for _, label in share)), device=pl_module.device)
        details: dict[str, Any] = {"samples": int(all_reduce_sum(own))}
        top, trace = measures["hessian_top_eigenvalue"], measures["hessian_trace"]
        if isinstance(top, HessianTopEigenvalue) and top.found is not None:
            residual, sweeps = top.found.residuals[0].item(), top.found.sweeps
            details["hessian_top_eigenvalue"] = {"residual": _finite(residual), "sweeps": sweeps}
            if not top.found.converged and math.isfinite(residual):
                rank_zero_warn(
                    f"hessian_top_eigenvalue is within {residual:.2g} after max_sweeps={sweeps} passes only."
                )
        if isinstance(trace, HessianTrace) and trace.found is not None:
            details["hessian_trace"] = {"standard_error": _finite(trace.found.standard_error.item())}
        return values, details

    def _training_share(
        self, trainer: Trainer, pl_module: LightningModule, samples: int | None, group: int | None
    ) -> list[tuple[Tensor, Tensor]]:
        """This rank's groups of the fixed subset, in pieces of at most ``batch_size`` samples."""
        source = find_train_source(trainer, pl_module, self.loaders)
        if limit := int(trainer.fast_dev_run) * self.batch_size:  # type: ignore[attr-defined]
            samples = min(limit, samples or limit)
        seed_generators(self.seed)
        ranks = trainer.global_rank, trainer.world_size
        pairs = source.groups(samples, group or self.batch_size, self.seed, *ranks)
        images = (
            part for image, _ in pairs for part in trainer.precision_plugin.convert_input(image).split(self.batch_size)
        )
        labels = (part for _, label in pairs for part in label.split(self.batch_size))
        return list(zip(images, labels, strict=True))

    def _accuracy(self, trainer: Trainer, pl_module: LightningModule, source: Source) -> tuple[float, float, int]:
        """Accuracy in percent, mean loss and size of a whole set."""
        loss = self.loss or nn.functional.cross_entropy
        limit = int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]
        sums = torch.zeros(3, device=pl_module.device, dtype=widest(pl_module.device))
        with torch.no_grad(), eval_mode(pl_module):
            for image, label in source.batches(trainer.global_rank, trainer.world_size, limit):
                with trainer.precision_plugin.forward_context():
                    logits = pl_module(trainer.precision_plugin.convert_input(image))
                logits = logits if logits.dtype == torch.float64 else logits.float()
                hits = (logits.argmax(1) == label).sum()
                sums += torch.stack([hits, len(label) * loss(logits, label), hits.new_tensor(len(label))])
        right, total, count = all_reduce_sum(sums).tolist()
        return 100 * right / count, total / count, int(count)

    @staticmethod
    def _check_logits(pl_module: LightningModule, images: Tensor) -> None:
        with torch.no_grad(), eval_mode(pl_module):
            logits = pl_module(images[:1])
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(f"{type(pl_module).__name__}.forward(image) must give logits (1, classes), got {got}.")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _title(loss: Any) -> str:
    return "cross_entropy" if loss is None else getattr(loss, "__name__", repr(loss))
