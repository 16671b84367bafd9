"""The losses, as plain functions of tensors.

Logits have the classes on their last axis; integer targets of -100 do not count. Every loss is computed
in float32 or wider, whatever the model's dtype. ``phase5_training.loss_registry`` turns a name or a
callable into the object that the training loop takes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phase4_bitnet.layers import ternary_layers
from phase5_training.errors import UsageError
from phase5_training.outputs import IGNORE_INDEX


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy over the valid targets, in nats, computed in float32 or wider.

    Args:
        logits: (..., classes), any float dtype.
        targets: (...), integers below ``classes``; -100 does not count.
        label_smoothing: share of the target probability spread evenly over the classes, 0 to 1.

    Returns:
        0-dim tensor; 0, with zero gradients, when no target is valid.

    Raises:
        UsageError: shapes or dtypes that do not go together.

    Example:
        >>> round(float(cross_entropy(torch.zeros(2, 5, 4), torch.ones(2, 5, dtype=torch.long))), 4)
        1.3863

    Source: label smoothing, Szegedy et al. 2016 (arXiv:1512.00567), section 7.
    """
    _check_class_shapes(logits, targets)
    targets = targets.reshape(-1).long()
    total = F.cross_entropy(
        _wide(logits).reshape(-1, logits.shape[-1]),
        targets,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def quantization_penalty(model: nn.Module) -> Tensor:
    """Sum over the ternary layers of mean((weight / scale - codes)^2).

    It says how far the latents are from their codes. The codes and the scale are constants, so the
    gradient pulls each latent towards the level it rounds to. The plain 1-bit form of this penalty
    measures the distance of a latent from sign(latent); with 1.58 bits the levels are -1, 0 and 1
    in units of the layer's scale, and the distance is to the nearest of those.

    Args:
        model: any module; layers without codes add nothing.

    Returns:
        0-dim float32 tensor, 0 for a model without ternary layers.

    Example:
        >>> float(quantization_penalty(nn.Linear(2, 2)))
        0.0
    """
    total: Tensor | None = None
    for _, layer in ternary_layers(model):
        with torch.no_grad():
            codes, scale = layer.current_codes()  # the scale of a layer of zeros is above 0
        term = (layer.weight / scale - codes).square().mean()
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else total


def bitnet_classification_loss(
    logits: Tensor,
    targets: Tensor,
    model: nn.Module | None,
    penalty: float = 0.01,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy + ``penalty`` times :func:`quantization_penalty` of the model.

    Args:
        logits: (..., classes); 3-d logits with 2-d targets are scored per token.
        targets: (...), integers; -100 does not count.
        model: the model whose ternary layers are penalized; None for no penalty.
        penalty: weight of the penalty; 0 leaves it out.
        label_smoothing: see :func:`cross_entropy`.

    Returns:
        0-dim tensor.

    Example:
        >>> loss = bitnet_classification_loss(torch.zeros(3, 10), torch.tensor([1, 2, 3]), nn.Linear(1, 1))
        >>> round(float(loss), 4)
        2.3026
    """
    loss = cross_entropy(logits, targets, label_smoothing)
    if model is None or penalty == 0:
        return loss
    return loss + penalty * quantization_penalty(model).to(loss.device)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the next token, in nats per valid token, in float32 or wider.

    Args:
        logits: (batch, time, vocabulary).
        targets: (batch, time), the input shifted by one; -100 where there is nothing to predict.

    Returns:
        0-dim tensor.

    Example:
        >>> targets = torch.tensor([[5, 7, -100]])
        >>> round(float(next_token_loss(torch.zeros(1, 3, 256), targets)), 4)
        5.5452
    """
    if logits.ndim != 3:
        raise UsageError(
            f"next_token: the model returned shape {tuple(logits.shape)}; wanted (batch, time, vocabulary), "
            "one row of logits for each token"
        )
    return cross_entropy(logits, targets)


def grokfast_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    temperature: float = 2.0,
    alpha: float = 0.3,
) -> Tensor:
    """(1 - alpha) * cross entropy + alpha * T^2 * KL(teacher || student), both at temperature T.

    The divergence is summed over the classes and averaged over the valid targets, so over samples for
    2-d logits and over tokens for 3-d ones.

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes), the student's shape; no gradient reaches them.
        targets: (...), integers; -100 does not count in either term.
        temperature: above 0; larger is softer.
        alpha: share of the divergence, 0 to 1.

    Returns:
        0-dim tensor.

    Example:
        >>> same = torch.eye(2)
        >>> loss = grokfast_distillation_loss(same, same, torch.tensor([0, 1]), alpha=1.0)
        >>> round(float(loss), 6)
        0.0

    Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 2.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UsageError(
            f"distillation: the teacher returned shape {tuple(teacher_logits.shape)} and the student "
            f"{tuple(student_logits.shape)}; use a teacher with the same classes, on the same input"
        )
    hard = cross_entropy(student_logits, targets)
    teacher = F.log_softmax(_wide(teacher_logits.detach()) / temperature, dim=-1)
    student = F.log_softmax(_wide(student_logits) / temperature, dim=-1)
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    valid = targets != IGNORE_INDEX
    soft = torch.where(valid, each, 0.0).sum() / valid.sum().clamp(min=1)
    return (1 - alpha) * hard + alpha * temperature**2 * soft


def mse_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over all elements; (n, 1) and (n,) go together, other shapes must agree."""
    return F.mse_loss(*_same_shape(outputs, targets))


def mae_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error over all elements; shapes as for :func:`mse_loss`."""
    return F.l1_loss(*_same_shape(outputs, targets))


def huber_loss(outputs: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    """Huber's loss: e^2 / 2 where abs(e) <= delta, else delta * (abs(e) - delta / 2); mean over all elements.

    Source: Huber 1964, doi:10.1214/aoms/1177703732.
    """
    return F.huber_loss(*_same_shape(outputs, targets), delta=delta)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_class_shapes(logits: Tensor, targets: Tensor) -> None:
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise UsageError(
            f"targets are {targets.dtype}; cross entropy wants integer classes, or use loss='mse'"
        )
    if logits.shape[:-1] != targets.shape or logits.ndim == 0:
        raise UsageError(
            f"logits of shape {tuple(logits.shape)} do not go with targets of shape {tuple(targets.shape)}; "
            f"wanted logits {(*targets.shape, 'classes')}, the classes on the last axis"
        )


def _same_shape(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if outputs.shape != targets.shape:
        # (n, 1) against (n,) would broadcast to (n, n) and train towards the mean in silence.
        if (
            outputs.shape not in ((*targets.shape, 1), targets.shape[:-1])
            or outputs.numel() != targets.numel()
        ):
            raise UsageError(
                f"outputs of shape {tuple(outputs.shape)} do not go with float targets of shape "
                f"{tuple(targets.shape)}; give the model's last layer as many outputs as the targets have"
            )
        outputs = outputs.reshape(targets.shape)
    outputs = _wide(outputs)
    return outputs, targets.to(outputs.dtype)
