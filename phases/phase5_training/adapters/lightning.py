"""A callback for Lightning's ``Trainer``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from phase5_training.adapters.foreign_loop import ForeignLoop
from phase5_training.errors import UsageError
from phase5_training.pipeline.grokfast_trainer import GrokfastConfig


class BitNetCallback(Callback):
    """Our filter, phases and codes in a run of Lightning's ``Trainer``.

    Lightning clips after its callbacks, and the filter has to act on the clipped gradient: so the callback
    clips, and ``gradient_clip_val`` is refused.

    Args:
        grokfast: the gradient filter; None for none.
        schedule: "phases", "constant", "cosine" or "linear"; None leaves the rate to the module.
        max_grad_norm: norm that the gradient is clipped to before the filter; None for no clipping.
        options: figures of the schedule, such as ``warmup_steps``; see :func:`build_schedule`.

    Raises:
        UsageError: at the start of training, a model without ternary layers, ``gradient_clip_val``, or
            schedulers of the module beside ``schedule``.

    Example:
        ::

            module.model = convert_model_to_bitnet(module.model)
            callback = BitNetCallback(GrokfastConfig(alpha=0.9, lambda_reg=0.5), schedule="phases")
            Trainer(max_steps=1000, callbacks=[callback]).fit(module, loader)
    """

    def __init__(
        self,
        grokfast: GrokfastConfig | None = None,
        schedule: str | None = None,
        *,
        max_grad_norm: float | None = 1.0,
        **options: Any,
    ) -> None:
        self._loop = ForeignLoop(grokfast, schedule, max_grad_norm=max_grad_norm, **options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over codes, filter and rate."""
        if trainer.gradient_clip_val:
            raise UsageError(
                f"gradient_clip_val={trainer.gradient_clip_val} would clip after the filter; leave it out "
                f"and give the callback max_grad_norm={trainer.gradient_clip_val}"
            )
        total = trainer.estimated_stepping_batches
        steps = int(total) if total not in (-1, float("inf")) else 0
        self._loop.begin(pl_module, trainer.optimizers, steps, lambda: trainer.global_step)
        if self._loop.schedule is None:
            return
        if trainer.lr_scheduler_configs:
            raise UsageError("schedule= and a scheduler of the module would both set the rate; leave out one")
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])  # of a run that is resumed it is there already

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Set the rate, clip and filter."""
        if self._loop.schedule is not None:
            multiplier = self._loop.schedule.lr_multiplier(trainer.global_step)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
        self._loop.before(optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the codes back to the layers."""
        self._loop.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the codes back to the layers."""
        self._loop.end()
