"""The slow average of a gradient: where it is kept, in which type, and how it is rounded to bfloat16.

Rounding to nearest would stall a bfloat16 average: its neighbors are 1/256 apart, and with a decay of 0.98 a
change of the gradient by less than a tenth never moves it. So it is rounded up or down at random with the
probabilities that make the expected value right. The random bits are a function of the step, the parameter
and the element: a resumed run draws the same ones, and no state is kept for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

# The key of the average in the optimizer's state of a parameter.
SLOW = "slow_gradient"
# Of the moving average: the latest gradients, and how many there were.
WINDOW = "gradient_window"
COUNT = "gradient_count"
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class LinearFilter:
    """A gradient filter that is linear in the gradient and its exponential average.

    Args:
        decay: ``average = decay * average + (1 - decay) * gradient``, before use.
        of_gradient, of_average: the filtered gradient is ``of_gradient * gradient + of_average * average``.
        half: the average is kept in bfloat16.
    """

    decay: float
    of_gradient: float
    of_average: float
    half: bool = False

    def dtype(self, grad: Tensor) -> torch.dtype:
        """The type of the average of this gradient: bfloat16, or float32 and wider."""
        return torch.bfloat16 if self.half else torch.promote_types(grad.dtype, torch.float32)

    def seeds(self, step: int, count: int) -> list[int]:
        """For each of ``count`` parameters a seed of this step; none are needed without rounding."""
        if not self.half:
            return []
        return [mix(step * 0x9E3779B9 + mix(position + 1)) for position in range(count)]


def mix(x: int) -> int:
    """A 32-bit hash of an integer's low 32 bits; the one that the kernel and :func:`hash_bits` compute.

    Source: the ``lowbias32`` of Chris Wellons' hash prospector.
    """
    x &= _WORD
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def hash_bits(x: Tensor) -> Tensor:
    """:func:`mix` of each element, int64 in [0, 2**32)."""
    x = x & _WORD
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def round_to_bfloat16(x: Tensor, seed: int) -> Tensor:
    """Round to a neighbor in bfloat16, up with a probability equal to the part that is cut off.

    Args:
        x: float32, any shape.
        seed: 0 to 2**32 - 1; other seeds round other elements up.

    Returns:
        bfloat16 of the same shape. What bfloat16 holds already stays as it is.

    Example:
        >>> round_to_bfloat16(torch.full((4000,), 1 + 2**-9), 1).float().mean().sub(1).mul(512).round().item()
        1.0
    """
    noise = hash_bits(torch.arange(x.numel(), device=x.device).view(x.shape) + seed) >> 16
    bits = (x.contiguous().view(torch.int32).long() & _WORD) + noise
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def filter_in_float32_(
    grads: Sequence[Tensor], averages: Sequence[Tensor], linear: LinearFilter, seeds: Sequence[int]
) -> None:
    """Apply a linear filter where average and gradient differ in type: computed in float32, in place.

    Args:
        grads: gradients, overwritten. averages: of the same shapes, overwritten.
        linear: the filter. seeds: for the rounding of bfloat16 averages, one for each.
    """
    for position, (grad, average) in enumerate(zip(grads, averages, strict=True)):
        g, slow = grad.float(), average.float()
        slow = slow.lerp(g, 1 - linear.decay)
        average.copy_(round_to_bfloat16(slow, seeds[position]) if linear.half else slow)
        grad.copy_(g * linear.of_gradient + slow * linear.of_average)


def divides_by_second_moment(optimizer: Optimizer) -> bool:
    """Whether the optimizer is of the Adam family: its state has a "step" and an "exp_avg_sq"."""
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def ignores_scale(optimizer: Optimizer) -> bool:
    """Whether ten times the gradient is known to give the same step, as with Adam, and with Muon."""
    return divides_by_second_moment(optimizer) or isinstance(optimizer, torch.optim.Muon)


def steady_gain(optimizer: Optimizer, decay: float) -> float:
    """The greatest gain with which the slow average cannot make an optimizer with momentum swing.

    The average lags behind the gradient and momentum behind that. On a quadratic, a gain of up to
    ``(1 - momentum) / (1 - decay)`` leaves every rate stable that is stable without a filter, once the
    gradient is divided by 1 + gain; beyond it, rates a hundred times smaller diverge. A decay of 0.95 and a
    momentum of 0.9 give 2.

    Args:
        optimizer: its groups have "momentum" or "betas", or no momentum.
        decay: of the slow average, in [0, 1).
    """
    momenta = [group.get("momentum", group.get("betas", (0.0,))[0]) for group in optimizer.param_groups]
    return (1 - max(momenta, default=0.0)) / (1 - decay)
