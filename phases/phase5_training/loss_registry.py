"""What the training loop calls a loss: a mean, the units it is over, and what it learns itself.

``build_loss`` makes one from a name, a callable, a module or the task. A window of micro-batches is
weighted by :meth:`Loss.units`, so accumulation gives the gradient of the whole window.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from phase5_training.errors import UsageError, nearest_match
from phase5_training.outputs import as_mean, count_units, unwrap_outputs
from phase5_training.pipeline.loss_functions import (
    bitnet_classification_loss,
    cross_entropy,
    grokfast_distillation_loss,
    huber_loss,
    mae_loss,
    mse_loss,
    next_token_loss,
)


class Loss:
    """A model's outputs and a batch in, the mean loss over the batch's units out.

    Args:
        name: what it is called in records.
        fn: called as ``fn(outputs, batch)``, outputs unwrapped by :func:`unwrap_outputs`.
        kind: what figures go with it: "classification", "regression", "multi_task" or "custom".
        module: holds the parameters the loss learns, if any.
        teacher: a frozen network that has to be on the model's device, if any.
        is_nll: True when the value is exactly the mean negative log likelihood in nats, so
            that its exponential is the perplexity.

    Example:
        >>> loss = build_loss("mse")
        >>> batch = {"target": torch.tensor([1.0, 3.0])}
        >>> float(loss(torch.tensor([1.0, 1.0]), batch)), loss.units(batch)
        (2.0, 2)
    """

    def __init__(
        self,
        name: str,
        fn: Callable[[Any, Mapping[str, Any]], Tensor],
        *,
        kind: str,
        module: nn.Module | None = None,
        teacher: nn.Module | None = None,
        is_nll: bool = False,
    ) -> None:
        self.name, self.kind, self.is_nll = name, kind, is_nll
        self.module, self.teacher = module, teacher
        self._fn = fn

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """The mean loss, 0-dim, of what the model returned for ``batch``."""
        return as_mean(self._fn(unwrap_outputs(outputs, _target(batch)), batch), self.name)

    def units(self, batch: Mapping[str, Any]) -> int | Tensor:
        """How many samples or valid tokens the mean is over, from the targets alone.

        An int for float targets and for several tasks (the samples); for integer targets a 0-dim
        tensor on their device, which nothing has waited for. With several tasks the weighting of
        micro-batches is exact when every sample has a label for every task.
        """
        return count_units(_target(batch))

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the loss itself learns; give it to the optimizer. Empty for most."""
        return iter(()) if self.module is None else self.module.parameters()

    def to(self, device: torch.device | str) -> Loss:
        """Move the learned parameters and the teacher; returns the loss."""
        for module in (self.module, self.teacher):
            if module is not None:
                module.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The learned parameters; the teacher is not part of it."""
        return {} if self.module is None else dict(self.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if self.module is not None:
            self.module.load_state_dict(state)
        elif state:
            raise UsageError(f"loss {self.name} learns nothing, but the checkpoint holds {sorted(state)}")


class MultiTaskLoss(nn.Module):
    """Several losses in one, weighted by an uncertainty s = log sigma^2 learned for each.

    ``sum_k  c_k * exp(-s_k) * L_k + s_k / 2``, with c_k = 1/2 for a regression loss and 1 for a
    classification loss (a Gaussian and a scaled softmax likelihood). At s = 0 this is the plain sum
    with regression halved.

    Args:
        losses: name -> a :class:`Loss`, or anything :func:`build_loss` takes. The names are the keys of the
            model's outputs and of ``batch["target"]``.

    Raises:
        UsageError: no losses; a task missing from the outputs or the targets.

    Example:
        >>> loss = MultiTaskLoss({"digit": "cross_entropy", "angle": "mse"})
        >>> outputs = {"digit": torch.zeros(2, 10), "angle": torch.ones(2)}
        >>> batch = {"target": {"digit": torch.tensor([3, 4]), "angle": torch.zeros(2)}}
        >>> round(loss(outputs, batch).item(), 4)
        2.8026

    Source: Kendall, Gal and Cipolla 2018 (arXiv:1705.07115), equations 7 and 10; the learned
        quantity is log sigma^2, as section 3.2 there advises for stability.
    """

    factors: Tensor

    def __init__(self, losses: Mapping[str, Loss | str | Callable[..., Tensor]]) -> None:
        super().__init__()
        if not losses:
            raise UsageError(
                "multi_task was given no losses; name one for each task, as {'digit': 'classification'}"
            )
        # A model handed to a single loss stays out of this module's parameters: Loss is no Module.
        self.losses = {k: v if isinstance(v, Loss) else build_loss(v) for k, v in losses.items()}
        self.log_variances = nn.Parameter(torch.zeros(len(self.losses)))
        halves = [0.5 if loss.kind == "regression" else 1.0 for loss in self.losses.values()]
        self.register_buffer("factors", torch.tensor(halves), persistent=False)

    def forward(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """The weighted sum for ``outputs`` and ``batch["target"]``, both task name -> tensor."""
        values = torch.stack([value.float() for value in self.task_losses(outputs, batch).values()])
        s = self.log_variances
        return (self.factors * torch.exp(-s) * values + 0.5 * s).sum()

    def task_losses(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Each task's own loss, unweighted."""
        targets = _target(batch)
        for what, found in (("the model's output", outputs), ("batch['target']", targets)):
            missing = [name for name in self.losses if not isinstance(found, Mapping) or name not in found]
            if missing:
                keys = sorted(found) if isinstance(found, Mapping) else type(found).__name__
                raise UsageError(
                    f"multi_task: {what} has {keys}, without {missing}; return a dict of all tasks"
                )
        return {
            name: loss(outputs[name], {**batch, "target": targets[name]})
            for name, loss in self.losses.items()
        }


LOSSES = (
    "classification",
    "cross_entropy",
    "distillation",
    "next_token",
    "mse",
    "huber",
    "mae",
    "multi_task",
)

TASK_LOSSES = {
    "classification": "classification",
    "next_token": "next_token",
    "regression": "mse",
    "multi_task": "multi_task",
}

_OWN: tuple[tuple[Any, str], ...] = (
    (bitnet_classification_loss, "classification"),
    (grokfast_distillation_loss, "distillation"),
    (next_token_loss, "next_token"),
)


def build_loss(
    loss: str | Callable[..., Tensor] | Loss | None = None,
    *,
    task: str | None = None,
    model: nn.Module | None = None,
    teacher: nn.Module | None = None,
    tasks: Mapping[str, Any] | None = None,
    penalty: float = 0.01,
    label_smoothing: float = 0.0,
    temperature: float = 2.0,
    alpha: float = 0.3,
    huber_delta: float = 1.0,
) -> Loss:
    """A :class:`Loss` from a name, a callable, a module, or the task.

    Args:
        loss: one of ``LOSSES``; a callable ``fn(outputs, targets)`` or ``fn(outputs, targets, model)``
            returning a 0-dim mean, an ``nn.Module`` among them; None for the task's own loss.
        task: "classification", "next_token", "regression" or "multi_task"; used when ``loss`` is None.
        model: the model in training; "classification" penalizes its ternary layers.
        teacher: a trained network called on ``batch["input"]``; required by "distillation". It
            is frozen and put in eval mode here.
        tasks: for "multi_task", task name -> loss name; :func:`infer_task_losses` reads it off a batch.
        penalty: weight of the quantization penalty of "classification"; a multi-task loss has none.
        label_smoothing: share of the target spread over the classes; "classification", "cross_entropy".
        temperature: softness of "distillation", above 0.
        alpha: share of the teacher in "distillation", 0 to 1.
        huber_delta: where "huber" turns from squared to linear, above 0.

    Raises:
        UsageError: an unknown name, a callable of another shape, a missing teacher or tasks,
            a number out of its range.

    Example:
        >>> build_loss("hubert")
        Traceback (most recent call last):
        ...
        phase5_training.errors.UsageError: loss='hubert' is unknown; did you mean 'huber'? choose one of ...
    """
    if isinstance(loss, Loss):
        return loss
    if loss is None:
        if task not in TASK_LOSSES:
            raise UsageError(_unknown("task", task, TASK_LOSSES))
        loss = TASK_LOSSES[task]
    # Our own functions may be handed over as callables; they mean what their names mean.
    loss = next((name for fn, name in _OWN if fn is loss), loss)
    _check_range("penalty", penalty, 0, math.inf)
    _check_range("label_smoothing", label_smoothing, 0, 1)
    _check_range("alpha", alpha, 0, 1)
    _check_range("temperature", temperature, 0, math.inf, above=True)
    _check_range("huber_delta", huber_delta, 0, math.inf, above=True)

    if isinstance(loss, MultiTaskLoss):
        return Loss("multi_task", loss, kind="multi_task", module=loss)
    if not isinstance(loss, str):
        return _from_callable(loss, model)
    if loss == "classification":
        return _of_targets(
            loss,
            lambda logits, y: bitnet_classification_loss(logits, y, model, penalty, label_smoothing),
            is_nll=label_smoothing == 0 and (penalty == 0 or model is None),
        )
    if loss == "cross_entropy":
        smooth = functools.partial(cross_entropy, label_smoothing=label_smoothing)
        return _of_targets(loss, smooth, is_nll=label_smoothing == 0)
    if loss == "next_token":
        return _of_targets(loss, next_token_loss, is_nll=True)
    if loss == "distillation":
        return _distillation(model, teacher, temperature, alpha)
    if loss == "multi_task":
        if not tasks:
            raise UsageError(
                "loss='multi_task' needs tasks; name a loss for each, as {'digit': 'classification'}"
            )
        single = functools.partial(
            build_loss, penalty=penalty, label_smoothing=label_smoothing, huber_delta=huber_delta
        )
        several = MultiTaskLoss({name: single(one) for name, one in tasks.items()})
        return Loss("multi_task", several, kind="multi_task", module=several)
    if loss == "huber":
        return _of_targets(loss, functools.partial(huber_loss, delta=huber_delta), kind="regression")
    if loss in ("mse", "mae"):
        return _of_targets(loss, mse_loss if loss == "mse" else mae_loss, kind="regression")
    raise UsageError(_unknown("loss", loss, LOSSES))


def infer_loss_name(spec: Any) -> str:
    """The loss that goes with a data set, from its ``target_kind``.

    "class" -> "classification", "float" -> "mse", "multi" -> "multi_task", "tokens" or None ->
    "next_token".

    Example:
        >>> from types import SimpleNamespace
        >>> infer_loss_name(SimpleNamespace(target_kind="float"))
        'mse'
    """
    names = {"class": "classification", "float": "mse", "multi": "multi_task", "tokens": "next_token"}
    kind = getattr(spec, "target_kind", None)
    if kind is None:
        return "next_token"
    if kind not in names:
        raise UsageError(f"target_kind={kind!r} has no loss of its own; pass loss= a name or a callable")
    return names[kind]


def infer_task_losses(targets: Mapping[str, Tensor]) -> dict[str, str]:
    """Task name -> loss name from one batch of targets: integers are classes, floats are regressed.

    Example:
        >>> infer_task_losses({"digit": torch.tensor([1]), "angle": torch.tensor([0.5])})
        {'digit': 'classification', 'angle': 'mse'}
    """
    return {name: "mse" if y.is_floating_point() else "classification" for name, y in targets.items()}


def _of_targets(
    name: str, fn: Callable[[Tensor, Tensor], Tensor], kind: str = "classification", is_nll: bool = False
) -> Loss:
    def call(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        targets = _target(batch)
        for what, value in (("the model returned", outputs), ("batch['target'] is", targets)):
            if not isinstance(value, Tensor):
                found = f"a dict of {sorted(value)}" if isinstance(value, Mapping) else type(value).__name__
                raise UsageError(f"{name}: {what} {found}; wanted a tensor, or use loss='multi_task'")
        return fn(outputs, targets)

    return Loss(name, call, kind=kind, is_nll=is_nll)


def _distillation(
    model: nn.Module | None, teacher: nn.Module | None, temperature: float, alpha: float
) -> Loss:
    if not isinstance(teacher, nn.Module):
        raise UsageError(
            f"loss='distillation' needs a teacher, got {type(teacher).__name__}; pass teacher= a model"
        )
    if model is not None and {id(p) for p in model.parameters()} & {id(p) for p in teacher.parameters()}:
        # Freezing the teacher would freeze the student with it.
        raise UsageError("the teacher shares parameters with the model; pass teacher=copy.deepcopy(model)")
    teacher.requires_grad_(False).eval()

    def call(outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        with torch.no_grad():
            soft = unwrap_outputs(teacher(batch["input"]))
        return grokfast_distillation_loss(outputs, soft, _target(batch), temperature, alpha)

    return Loss("distillation", call, kind="classification", teacher=teacher)


def _from_callable(fn: Callable[..., Tensor], model: nn.Module | None) -> Loss:
    name = getattr(fn, "__name__", type(fn).__name__)
    if not callable(fn):
        raise UsageError(f"loss={fn!r} is no name, function or module; give one of {', '.join(LOSSES)}")
    with_model = _wants_model(name, fn.forward if isinstance(fn, nn.Module) else fn)

    def call(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        targets = _target(batch)
        return fn(outputs, targets, model) if with_model else fn(outputs, targets)

    return Loss(name, call, kind="custom", module=fn if isinstance(fn, nn.Module) else None)


def _wants_model(name: str, fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` takes (outputs, targets, model) rather than (outputs, targets)."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except ValueError:  # a builtin without a signature
        return False
    ordered = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    needed = [p.name for p in ordered if p.default is p.empty]
    keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    third = ordered[2].name if len(ordered) > 2 else None
    fits = (len(ordered) >= 2 or rest) and (needed[2:] in ([], ["model"]))
    if not fits or keyword:
        raise UsageError(
            f"loss {name}{inspect.signature(fn)} cannot be called; wanted fn(outputs, targets) or "
            "fn(outputs, targets, model), other arguments with defaults"
        )
    return third == "model"


def _target(batch: Mapping[str, Any]) -> Any:
    if not isinstance(batch, Mapping) or "target" not in batch:
        keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise UsageError(
            f"a batch of {keys} has no 'target'; give batches as {{'input': ..., 'target': ...}}"
        )
    return batch["target"]


def _check_range(name: str, value: float, low: float, high: float, above: bool = False) -> None:
    if not (low < value if above else low <= value) or value > high or value == math.inf:
        words = f"above {low}" if above else f"{low} or more"
        raise UsageError(
            f"{name}={value!r} is out of range; wanted {words}" + (f", at most {high}" * (high < 9))
        )


def _unknown(what: str, name: object, choices: Iterable[str]) -> str:
    near = nearest_match(str(name), choices)
    hint = f"did you mean {near!r}? " if near else ""
    return f"{what}={name!r} is unknown; {hint}choose one of {', '.join(choices)}"
