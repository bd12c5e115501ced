"""SAM, F-SAM and their relatives for any LightningModule with automatic optimization, its code untouched."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torchmetrics import Metric

from torchlethe.arguments import check_above, check_choice, check_within
from torchlethe.callbacks.two_passes import PassOptions, TwoPasses
from torchlethe.components import SharpnessEngine, normalisation_parameters
from torchlethe.components.ascent_rules import EfficientRule
from torchlethe.optimizers import SharpnessAwareOptimizer

Method = Literal["fsam", "sam", "asam", "vasso", "gsam", "wsam", "looksam", "esam"]


class SharpnessAware(Callback):
    """Make every training step of a module sharpness-aware: climb to w + ε, take the gradient there, step from w.

    Works with any LightningModule with automatic optimization and any base optimizer (plain, foreach or fused), with
    gradient accumulation (one climb per micro-batch), clipping (of the gradient that is stepped with), bf16-mixed, fp16
    with loss scaling, DDP, ``torch.compile`` and resume. What the module logs and counts is the first pass at w; the
    second pass is silent, leaves torchmetrics and running statistics alone, and shows itself only as
    ``pl_module.sam_pass == 2``. ``global_step``, schedulers and checkpoints see the base optimizer as ever.

    Args:
        method: ``fsam`` (arXiv:2403.12350), ``sam`` (2010.01412), ``asam`` (2102.11600), ``vasso`` (2309.15639),
            ``gsam`` (2203.08065), ``wsam`` (2305.15817), ``looksam`` (2203.02714) or ``esam`` (2110.03141).
        rho: radius of the climb, positive; 0.05 by default, for ``asam`` 0.5 (``eta``) or 2 (``w2``). A parameter
            group of the optimizer may have a ``rho`` of its own.
        sigma: fsam: share of the moving average that is removed from the gradient (1).
        lmbda: fsam: decay of the average (0.9; 0.6 in the published CIFAR-100 script).
        order: fsam: remove the average from before the batch (``code``) or after it (``paper``).
        min_noise_ratio: fsam: no climb where ‖d‖ is below this share of ‖g‖ (0).
        theta: vasso: weight of the new gradient in the average (0.9).
        alpha: gsam: weight of the orthogonal part (0.4); looksam: strength of the remembered part (0.7).
        gamma: wsam: weight of the sharpness (0.9); esam: share of samples in the second pass (0.5).
        decoupled: wsam: keep the sharpness out of momentum and moments (True).
        beta: esam: probability that a step perturbs a tensor (0.6).
        adaptive: scale the climb by the weights, for any method: ``w2`` or ``eta``; ``asam`` is SAM with ``eta``.
        eta: added to |w| with ``adaptive="eta"``.
        norm: ``global`` normalises the direction as one vector, ``layerwise`` each tensor.
        interval: two passes every so many optimizer steps (1; looksam 5). Averages follow in the other steps too.
        warmup_steps: optimizer steps at the beginning with one pass.
        rho_schedule: ``constant``; ``linear`` from ``rho`` to ``rho_end`` over the run; ``lr`` with the learning
            rate, from ``rho`` at its peak to ``rho_end`` at 0 (or at a ``min_lr`` of the optimizer's parameter group).
        rho_end: radius at the end of the schedule.
        perturb: ``all`` parameters, those of normalisation layers (``norm_only``, SAM-ON, arXiv:2306.04226), or a
            regular expression that is searched in their names. Weight gradients that the climb does not need are not
            computed in the first pass.
        ascent_fraction: share of the batch, its first samples, that the first pass runs on; what the module logs is
            then of these.
        scope: ``global`` climbs along the gradient of all ranks, so the result does not depend on their number;
            ``local`` along each rank's own (the SAM paper's m-sharpness, m the batch of a rank), which saves a
            reduction.
        replay_rng: give the second pass the random numbers of the first (dropout, augmentation in ``training_step``).
        freeze: what the second pass leaves alone: the running statistics of BatchNorm and InstanceNorm (``bn``), every
            buffer (``buffers``: spectral norm, queues, teachers; one compiled graph rather than two), or ``none``.
        memory_dtype: dtype of averages, as a name such as ``bfloat16``; that of the gradients by default.
        sample_losses: esam: function of (module, batch) that gives the losses ``(B,)``; by default the cross-entropy
            of the module's ``forward``.
        seed: of ESAM's choice of tensors, a pure function of seed and step.

    Raises:
        ValueError: an argument is out of range or belongs to another method, or, before training, the module, its
            optimizers, the precision or the strategy cannot be served.
        NonFiniteGradientError: a first pass gave NaN or Inf (on a GPU noticed at the next logging step).

    Note:
        Logged every ``log_every_n_steps`` of the Trainer: ``sam/loss_perturbed``, ``sam/sharpness`` (its difference
        to the clean loss), ``sam/grad_norm``, ``sam/noise_norm``, ``sam/cos_g_m``, ``sam/rho``; rank 0's values.

        Under DDP with ``local`` scope the averages are averaged over ranks when a checkpoint is saved, in the run as
        in the checkpoint; a run that saves at other times differs in their rounding. With accumulation ``global``
        reduces in every micro-batch, ``local`` once. Sharded strategies are refused.
        ``find_unused_parameters`` and ``static_graph`` need ``global`` scope and a climb of all parameters, anything
        else is refused. With ``local`` scope the rank that meets a NaN in its own climb raises, the others end with the
        process group.

        ``training_step`` runs twice on the same batch: what it writes into the batch's dicts and lists is undone for
        the second pass, what it changes inside a tensor is not.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SharpnessAware("fsam", rho=0.1, lmbda=0.6)], logger=False)
    """

    def __init__(
        self,
        method: Method = "fsam",
        rho: float | None = None,
        sigma: float | None = None,
        lmbda: float | None = None,
        order: Literal["code", "paper"] | None = None,
        min_noise_ratio: float | None = None,
        theta: float | None = None,
        alpha: float | None = None,
        gamma: float | None = None,
        decoupled: bool | None = None,
        beta: float | None = None,
        adaptive: Literal["w2", "eta"] | None = None,
        eta: float = 0.01,
        norm: Literal["global", "layerwise"] = "global",
        interval: int | None = None,
        warmup_steps: int = 0,
        rho_schedule: Literal["constant", "linear", "lr"] = "constant",
        rho_end: float = 0.0,
        perturb: str = "all",
        ascent_fraction: float = 1.0,
        scope: Literal["global", "local"] = "global",
        replay_rng: bool = False,
        freeze: Literal["bn", "buffers", "none"] = "bn",
        memory_dtype: str | None = None,
        sample_losses: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> None:
        check_within(0, 1, "(]", ascent_fraction=ascent_fraction)
        check_choice(("global", "local"), scope=scope)
        check_choice(("bn", "buffers", "none"), freeze=freeze)
        try:
            re.compile(perturb)
        except re.error as error:
            raise ValueError(f"perturb is {perturb!r}, which is no regular expression: {error}.") from None
        self.engine = SharpnessEngine(
            method,
            rho,
            adaptive=adaptive,
            eta=eta,
            norm=norm,
            interval=interval,
            warmup_steps=warmup_steps,
            rho_schedule=rho_schedule,
            rho_end=rho_end,
            memory_dtype=memory_dtype,
            seed=seed,
            sigma=sigma,
            lmbda=lmbda,
            order=order,
            min_noise_ratio=min_noise_ratio,
            theta=theta,
            alpha=alpha,
            gamma=gamma,
            decoupled=decoupled,
            beta=beta,
        )
        rule = self.engine.rule
        self.chooses_samples = isinstance(rule, EfficientRule) and rule.gamma < 1
        if ascent_fraction < 1 and (self.chooses_samples or rule.keeps_first):
            raise ValueError(
                f"ascent_fraction is {ascent_fraction}, but method={method!r} needs both gradients of one batch."
            )
        if sample_losses is not None and not self.chooses_samples:
            raise ValueError(
                f"sample_losses is only used by method='esam' with gamma below 1, the method is {method!r}."
            )
        self.method, self.perturb = method, perturb
        self.options = PassOptions(ascent_fraction, scope, replay_rng, freeze, sample_losses)
        self._passes: TwoPasses | None = None
        self._loaded: dict[str, Any] | None = None

    # --- before and after training ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check module, precision and strategy, and put the two passes in place of the module's backward pass."""
        if stage != "fit":
            return
        self._refuse(trainer, pl_module)
        self._remove()
        self._loaded = None  # what a fit resumes from is loaded after this
        self._passes = TwoPasses(
            trainer, pl_module, self.engine, self.options, start=lambda: self._begin(trainer, pl_module)
        )

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{name} optimizes manually, where SharpnessAware cannot see its steps: "
                "call torchlethe.optimizers.sam_step in its training_step."
            )
        if isinstance(trainer.precision_plugin, HalfPrecision):
            raise ValueError(
                f"precision is {trainer.precision_plugin.precision}, in which a climb of radius rho is rounded away: "
                "use bf16-mixed, 16-mixed or 32."
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"the strategy is {type(trainer.strategy).__name__}, SharpnessAware runs on one device or with ddp."
            )
        self._refuse_ddp_options(trainer.strategy)
        if sum(isinstance(callback, SharpnessAware) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("the Trainer has two SharpnessAware callbacks, one is allowed.")
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ValueError(
                f"the training_step of {name} takes a dataloader_iter, but two passes need one batch: take a batch."
            )
        if self.chooses_samples and self.options.sample_losses is None and _has_no_forward(pl_module):
            raise ValueError(
                f"{name} has no forward that gives the losses of samples, as method='esam' needs them: "
                "give sample_losses, or gamma=1 for all samples."
            )

    def _refuse_ddp_options(self, strategy: Any) -> None:
        """What DDP expects of every backward pass is not so where it does not reduce, or some gradients are missing."""
        rule, reason = self.engine.rule, None
        if self.options.scope == "local":
            reason = "scope='local'"
        elif self.perturb != "all" and not rule.keeps_first:
            reason = f"perturb={self.perturb!r}"
        elif isinstance(rule, EfficientRule) and rule.beta < 1:
            reason = f"beta={rule.beta:g}"
        for option in ("find_unused_parameters", "static_graph"):
            if reason and getattr(strategy, "_ddp_kwargs", {}).get(option):
                raise ValueError(
                    f"the strategy has {option}=True, with which ranks would part ways under {reason}: "
                    f"train without {option}, or with scope='global', perturb='all' and, for method='esam', beta=1."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer, find the parameters to perturb, and start from what was loaded."""
        self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(pl_module).__name__
        if len(trainer.optimizers) != 1:
            raise ValueError(f"{name} has {len(trainer.optimizers)} optimizers, SharpnessAware serves one.")
        (optimizer,) = trainer.optimizers
        if isinstance(optimizer, SharpnessAwareOptimizer | torch.optim.LBFGS):
            raise ValueError(
                f"the optimizer is a {type(optimizer).__name__}, which runs passes of its own: give a plain one."
            )
        if not optimizer.param_groups:
            raise ValueError(
                f"{name} has no optimizer, but SharpnessAware perturbs what an optimizer trains: "
                "return one from configure_optimizers."
            )
        for layer_name, layer in pl_module.named_modules():
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
                raise ValueError(f"the parameter '{layer_name}.weight' has a sparse gradient: use sparse=False.")
        for group in optimizer.param_groups:
            check_above(0, **{"rho of a parameter group": group.get("rho", 1)})
        passes = self._running
        passes.begin(optimizer, _parameter_names(pl_module, optimizer), self._to_perturb(pl_module))
        if self.engine.rho_schedule == "linear":
            total = trainer.estimated_stepping_batches
            if not 0 < total < float("inf"):  # Lightning says -1 for streams of unknown length
                raise ValueError("rho_schedule is 'linear', which needs a run of a known number of steps (max_steps).")
            self.engine.total_steps = int(total)
        self.engine.forget()
        self._take_over_loaded()

    def _to_perturb(self, pl_module: LightningModule) -> set[Tensor] | None:
        if self.perturb == "all":
            return None
        if self.perturb == "norm_only":
            found: set[Tensor] = set(normalisation_parameters(pl_module))
        else:
            found = {param for name, param in pl_module.named_parameters() if re.search(self.perturb, name)}
        if not any(param.requires_grad for param in found):
            raise ValueError(
                f"perturb is {self.perturb!r}, which no trainable parameter of {type(pl_module).__name__} fits; "
                "allowed are 'all', 'norm_only' and a regular expression for parameter names."
            )
        return found

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its backward pass back."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its backward pass and its weights back, as there is no teardown then."""
        self._remove()

    def _remove(self) -> None:
        if self._passes is not None:
            self._passes.remove()

    @property
    def _running(self) -> TwoPasses:
        assert self._passes is not None, "the callback's setup has not run"
        return self._passes

    # --- during training ------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the module's layers and metrics anew."""
        self._running.look_at_module()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget what was measured in another step."""
        self._running.logs = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured."""
        self._running.end_of_batch()
        if self._running.logs:
            pl_module.log_dict(self._running.logs, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look a last time whether a gradient was not finite."""
        self.engine.check()

    @property
    def freeze(self) -> Literal["bn", "buffers", "none"]:
        """What is done about running statistics."""
        return self.options.freeze

    @property
    def _names(self) -> dict[Tensor, str]:
        return self._running.names

    @property
    def _layers(self) -> list[nn.Module]:
        return self._running.layers

    @property
    def _metrics(self) -> list[Metric]:
        return self._running.metrics

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The method, and what it remembers by parameter name; no copy of the weights."""
        if self._passes is None or not self._passes.begun:
            return self._loaded or {}
        if self.options.scope == "local":
            for buffer in self.engine.buffers().values():
                self._passes.sync.average_(buffer.values())
        return {"method": self.method, **self.engine.state_dict(self._passes.names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, or keep it until the parameters are known."""
        self._loaded = state_dict or None
        if self._passes is not None and self._passes.installed and self._passes.begun:
            self._take_over_loaded()

    def _take_over_loaded(self) -> None:
        state, self._loaded = self._loaded, None
        if state is None:
            return
        if state["method"] != self.method:
            raise ValueError(
                f"the checkpoint is of method={state['method']!r}, but the callback's method is {self.method!r}: "
                "resume with the method it is from."
            )
        self.engine.load_state_dict(state, self._running.names)


def _has_no_forward(pl_module: LightningModule) -> bool:
    return type(pl_module).forward is LightningModule.forward


def _parameter_names(pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """Names of the parameters of a module, and of those that only its optimizer knows."""
    names: dict[Tensor, str] = {param: name for name, param in pl_module.named_parameters()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            names.setdefault(param, f"optimizer.{len(names)}")
    return names
