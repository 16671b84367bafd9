"""A callback for ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from phase5_training.adapters.foreign_loop import ForeignLoop
from phase5_training.errors import UsageError
from phase5_training.pipeline.grokfast_trainer import GrokfastConfig


class BitNetCallback(TrainerCallback):
    """Our filter, phases and codes in a run of ``transformers.Trainer``.

    The Trainer clips the gradient (``max_grad_norm``), then the filter acts, then its optimizer steps. With a
    schedule, the Trainer's own scheduler follows it, whatever ``lr_scheduler_type`` says.

    Args:
        grokfast: the gradient filter; None for none.
        schedule: "phases", "constant", "cosine" or "linear"; None keeps the Trainer's.
        options: figures of the schedule, such as ``warmup_steps``; see :func:`build_schedule`.

    Raises:
        UsageError: at the start of training, a model without ternary layers.

    Example:
        ::

            model = convert_model_to_bitnet(model)
            callback = BitNetCallback(GrokfastConfig(alpha=0.9, lambda_reg=0.5), schedule="phases")
            Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(
        self, grokfast: GrokfastConfig | None = None, schedule: str | None = None, **options: Any
    ) -> None:
        self._loop = ForeignLoop(grokfast, schedule, **options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over codes, filter and rate."""
        optimizer = _unwrapped(kwargs["optimizer"])
        self._loop.begin(kwargs["model"], [optimizer], state.max_steps, lambda: state.global_step)
        if self._loop.schedule is not None:
            _follow(kwargs["lr_scheduler"], self._loop.schedule.lr_multiplier)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Filter the gradients, which the Trainer has clipped."""
        self._loop.before(_unwrapped(kwargs["optimizer"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the codes back to the layers."""
        self._loop.end()


def _unwrapped(optimizer: Any) -> Any:
    """Torch's own optimizer in that of Accelerate."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _follow(scheduler: Any, multiplier: Any) -> None:
    """Have the Trainer's scheduler, which it logs and saves, take its rates from ours."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(scheduler, LambdaLR):
        raise UsageError(
            f"schedule= cannot steer a {type(scheduler).__name__}; use lr_scheduler_type='constant', or "
            "leave out schedule"
        )
    scheduler.lr_lambdas = [multiplier] * len(scheduler.base_lrs)
    # The scheduler has set the rate of the next step already, by its own rule.
    rates = [base * multiplier(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
