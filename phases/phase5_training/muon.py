"""Muon for processors whose matrix products in bfloat16 are no faster than those in float32.

``torch.optim.Muon`` orthogonalizes in bfloat16. Without units made for it (AMX, tensor cores) that takes
twice the time of float32, at an accuracy of 1%. This one computes in float32, and for matrices that are not
square it iterates on the small Gram matrix alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from phase4_bitnet.native.build import processor_flags

# From this ratio of the sides on, iterating on the Gram matrix takes fewer multiplications.
_GRAM_RATIO = 1.5
# Of torch.optim.Muon.
NS_STEPS = 5
Coefficients = tuple[float, float, float]
# a, b, c of one iteration after the other, the last for all that follow; None: torch.optim.Muon has its own.
# Polar Express is Amsel et al. 2025 (arXiv:2505.16932), algorithm 1: each polynomial is the best for what the
# ones before it leave of singular values between 0.001 and 1.
ITERATIONS: dict[str, tuple[Coefficients, ...] | None] = {
    "jordan": None,
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
}


class Muon(torch.optim.Muon):
    """:class:`torch.optim.Muon` with its iteration in float32; the same options, formula and state.

    A checkpoint of either loads into the other. An update differs from torch's by torch's rounding to
    bfloat16, about 1% of its norm. ``ns_coefficients`` may also be one triple for each iteration
    (:data:`ITERATIONS`), which torch's does not take.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Muon([weight], lr=1.0, weight_decay=0.0)
        >>> weight.grad = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> optimizer.step()
        >>> bool((weight.diagonal() < -0.6).all()), weight[0, 1].item()
        (True, 0.0)

    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025 (arXiv:2502.16982) for
    "match_rms_adamw".
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: recomputes loss and gradients first; optional.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        tall, left, right = self._factors(self._update_of(p, grad, group), group)
        keep, scale = self._rates(p, group)
        target = p.t() if tall else p
        if p.dtype == torch.float32:  # the last product adds to the weight itself
            target.addmm_(left, right, beta=keep, alpha=scale)
        else:
            target.mul_(keep).add_(left @ right, alpha=scale)

    def _update_of(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient with momentum, which this advances."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def _factors(self, update: Tensor, group: dict[str, Any]) -> tuple[bool, Tensor, Tensor]:
        """Whether the update is tall, and the factors of its direction, transposed if so."""
        tall = update.shape[0] > update.shape[1]
        wide = (update.t() if tall else update).float()
        coefficients = coefficients_of_steps(group["ns_coefficients"], group["ns_steps"])
        return tall, *orthogonalize(wide, coefficients, group["eps"])

    def _rates(self, whole: Tensor, group: dict[str, Any]) -> tuple[float, float]:
        """Factors on the weights and on the direction, for a matrix of the shape of ``whole``."""
        rate = float(group["lr"])
        return 1 - rate * group["weight_decay"], -rate * rate_factor(group["adjust_lr_fn"], *whole.shape)


def coefficients_of_steps(given: Coefficients | Sequence[Coefficients], steps: int) -> Sequence[Coefficients]:
    """What each iteration multiplies with, from one triple or from several of which the last goes on.

    Args:
        given: a, b, c, or a sequence of such triples.
        steps: how many iterations, 1 or more.

    Raises:
        ValueError: no steps.

    Example:
        >>> coefficients_of_steps([(3.0, -3.0, 1.0), (2.0, -1.5, 0.5)], 3)
        [(3.0, -3.0, 1.0), (2.0, -1.5, 0.5), (2.0, -1.5, 0.5)]
    """
    if steps < 1:
        raise ValueError(
            f"ns_steps={steps} leaves Muon no iteration; use 5, its default, or SGD with momentum for none"
        )
    triples: list[Any] = [given] if isinstance(given[0], (int, float)) else list(given)
    return (triples + triples[-1:] * (steps - len(triples)))[:steps]


def orthogonalize(x: Tensor, coefficients: Sequence[Coefficients], eps: float) -> tuple[Tensor, Tensor]:
    """Newton-Schulz iteration towards the nearest matrix with singular values about 1.

    With A = X Xᵀ one step is X <- (a I + b A + c A²) X. All these polynomials of one A commute, so a step may
    also be taken on A alone, A <- Q A Q, and the product of the Q applied to X once at the end.

    Args:
        x: (m, n) float32, m <= n.
        coefficients: a, b, c of each step, at least one.
        eps: least norm that x is divided by.

    Returns:
        (m, m) and (m, n); the result is their product.
    """
    gram = x @ x.t()
    # The trace of the Gram matrix is the squared norm of x.
    squared_norm = gram.diagonal().sum().clamp_(min=eps**2)
    gram /= squared_norm
    by_gram = x.shape[1] >= _GRAM_RATIO * x.shape[0]
    left: Tensor | None = None
    for step, (a, b, c) in enumerate(coefficients, 1):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        last = step == len(coefficients)
        if by_gram:
            left = factor if left is None else factor @ left
            if not last:
                gram = factor @ (factor @ gram)
        elif last:
            left = factor
        else:
            x = factor @ x
            gram = (x @ x.t()).div_(squared_norm)
    assert left is not None
    return left.div_(squared_norm.sqrt()), x


def rate_factor(adjust: str | None, rows: int, columns: int) -> float:
    """Factor on the rate for a matrix of this shape; see :class:`torch.optim.Muon`, ``adjust_lr_fn``."""
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def iteration_flops(rows: int, columns: int, steps: int = NS_STEPS) -> int:
    """Floating point operations that Muon adds to a step for a matrix of this shape.

    Example:
        >>> iteration_flops(1, 2)
        42
    """
    m, n = sorted((rows, columns))
    if n >= _GRAM_RATIO * m:
        return 2 * m * m * (2 * n + m * (4 * steps - 3))
    return 2 * m * m * (n + m * steps + 2 * n * (steps - 1) + n)


def muon_class(params: Iterable[Tensor], iteration: str = "jordan") -> type[torch.optim.Muon]:
    """The faster Muon for these parameters: torch's where bfloat16 has units of its own.

    Args:
        params: what it is to move.
        iteration: key of :data:`ITERATIONS`; torch's has the first alone.
    """
    on_cpu = all(p.device.type == "cpu" for p in params)
    if iteration != "jordan" or (on_cpu and "amx_bf16" not in processor_flags()):
        return Muon
    return torch.optim.Muon
