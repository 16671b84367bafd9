"""Gradients that have no gradient of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _NotTwice(torch.autograd.Function):
    """Gives back what it gets, as results that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "a second derivative goes through a native product, norm or attention of phase4_bitnet; those "
            "have none; leave gradient penalties and Hessian products out, or apply them to float layers only"
        )


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Have the ``backward`` of a torch.autograd.Function refuse to be differentiated.

    torch's ``once_differentiable`` does so only where the incoming gradient itself requires one. Under a loss
    that is a plain sum it does not, and a gradient penalty would be left out in silence.

    Args:
        backward: takes the context and gradients, returns a tuple of gradients or None.

    Returns:
        The same; with ``create_graph=True`` its results raise RuntimeError when they are differentiated.

    Example:
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        ...
        ...     @staticmethod
        ...     @first_order_only
        ...     def backward(ctx, grad):
        ...         return (2 * grad,)
        >>> x = torch.ones((), requires_grad=True)
        >>> (slope,) = torch.autograd.grad(Double.apply(x), x, create_graph=True)
        >>> slope.item()
        2.0
        >>> slope.backward()
        Traceback (most recent call last):
        RuntimeError: a second derivative goes through ...
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        # Something has to require a gradient for the results to lead anywhere.
        return _NotTwice.apply(torch.empty(0, requires_grad=True), *found)

    return once
