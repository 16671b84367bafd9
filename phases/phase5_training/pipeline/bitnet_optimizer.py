"""The optimizer of a ternary model: any torch optimizer on the latents, then one re-quantization.

Order within :meth:`BitNetOptimizer.step`: norm and finite check, clip, gradient filter, the wrapped
optimizer, re-quantize. The next forward sees the codes of the weights as they are after the step.
A step whose gradients are not finite changes nothing, the filter's average included.

On a CPU, AdamW takes all of this in one pass (:mod:`phase5_training.fused_step`); every other optimizer, and
AdamW where that does not apply, takes one after the other, the general path. On CUDA that is torch's
multi-tensor operators, without a wait for the device; no figures were taken there.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phase4_bitnet import native
from phase4_bitnet.layers import TernaryWeight, requantize_layers, ternary_layers
from phase4_bitnet.ternary import quantize_weight
from phase5_training.errors import UsageError
from phase5_training.fused_step import fused_step
from phase5_training.slow_average import COUNT, SLOW, WINDOW, LinearFilter


class Filter(Protocol):
    """A gradient filter; see :class:`phase5_training.pipeline.grokfast_trainer.GradientFilter`."""

    def begin_step(self, optimizers: Sequence[Optimizer]) -> bool:
        """Get ready for a step; returns whether it is filtered. Where not, it is as without a filter."""

    def linear(self, step: int) -> LinearFilter | None:
        """The filter of a step as a gradient and its average determine it; None where they do not."""

    def before_step(self, optimizer: Optimizer, params: Sequence[nn.Parameter], step: int) -> None:
        """Change ``p.grad`` in place, of the parameters that have one."""

    def after_step(self, optimizer: Optimizer, params: Sequence[nn.Parameter], step: int) -> None:
        """Hand new state to the optimizer, and change the parameters further."""

    def state_dict(self) -> dict[str, Any]:
        """What is not in the optimizer's state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


@dataclass(frozen=True)
class StepReport:
    """Figures of one step, still on the device: reading one with ``float()`` waits for it.

    Args:
        grad_norm: () float32, before clipping.
        nonfinite: () bool, True when the step was skipped.
        slow_ratio: () float32, norm of the slow average over norm of the clipped gradient.
        flip_share: () float32, share of codes that changed in this step.
        layer_flip_share: (layers,) float32, the same for each ternary layer.
    """

    grad_norm: Tensor
    nonfinite: Tensor
    slow_ratio: Tensor | None = None
    flip_share: Tensor | None = None
    layer_flip_share: Tensor | None = None


class BitNetOptimizer(Optimizer):
    """Wraps one torch optimizer, or several that share the model, for training through ternary codes.

    Takes over from the layers the task of deriving codes: once per step, all layers together. Call
    :meth:`release` to give it back. A model without ternary layers trains as with the bare optimizer.

    Args:
        optimizer: an optimizer instance, or a list of them with disjoint parameters.
        model: its ternary layers are re-quantized after each step.
        gradient_filter: applied after clipping.
        max_grad_norm: clip the global 2-norm of the gradient to this; None for no clipping.

    Example:
        >>> from phase4_bitnet.layers import BitLinear
        >>> layer = BitLinear(8, 8)
        >>> optimizer = BitNetOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), layer)
        >>> layer(torch.randn(4, 8)).pow(2).sum().backward()
        >>> optimizer.step()
        >>> bool(optimizer.report.nonfinite)
        False
    """

    # A process that has parts of the layers overrides these three, as phase5_training.sharded does.
    _whole_layers = True

    def _total_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        return _total_norm(tensors)

    def _requantize(self, layers: Sequence[TernaryWeight]) -> None:
        requantize_layers(layers)

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        model: nn.Module,
        *,
        gradient_filter: Filter | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise UsageError(
                f"max_grad_norm={max_grad_norm} is not positive; use gradient_clipping=False for none"
            )
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        for own in self.optimizers:
            if isinstance(own, torch.optim.LBFGS):
                raise UsageError(
                    "LBFGS evaluates the loss several times a step; use an optimizer that does so once"
                )
        # The group dicts are shared with the wrapped optimizers, so a scheduler's rate reaches them.
        super().__init__([g for o in self.optimizers for g in o.param_groups], {})
        self.gradient_filter, self.max_grad_norm = gradient_filter, max_grad_norm
        self.steps = 0
        self.measure = False
        self.report = StepReport(torch.zeros(()), torch.zeros((), dtype=torch.bool))
        self._layers = [layer for _, layer in ternary_layers(model)]
        sizes = [layer.codes.numel() for layer in self._layers]
        self._weights = [size / max(1, sum(sizes)) for size in sizes]  # of each layer among all codes
        # On the host the flag of a bad step is read for free; elsewhere reading it would wait.
        self._undo_on_device = any(p.device.type != "cpu" for g in self.param_groups for p in g["params"])
        self.requantize()
        self._owner = object()
        for layer in self._layers:
            layer.codes_are_current, layer.codes_owner = True, self._owner
        # A wrapper that is dropped without release() must not leave layers waiting for it.
        weakref.finalize(self, _release, self._layers, self._owner)

    def release(self) -> None:
        """Return the task of deriving codes to the layers."""
        _release(self._layers, self._owner)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give a further group to the last of the wrapped optimizers, as torch does to its own."""
        if hasattr(self, "report"):
            self.optimizers[-1].add_param_group(param_group)
            self.param_groups = [g for o in self.optimizers for g in o.param_groups]
        else:  # the base class, sharing the groups while it is made
            super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def requantize(self) -> None:
        """Derive the codes of all layers from their latents, after the latents were changed by hand."""
        self._requantize(self._layers)

    def quantize_weights(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scale of a latent as this model's layers quantize it; changes nothing.

        Args:
            weights: floating point, any shape. The weight of a layer goes by that layer's weight_bits
                and mode, any other tensor by those of the first ternary layer. Stochastic layers draw
                from torch's generator.

        Returns:
            Codes int8 of the same shape, and the scale, () float32.

        Example:
            >>> from phase4_bitnet.layers import BitLinear
            >>> layer = BitLinear(2, 2)
            >>> optimizer = BitNetOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), layer)
            >>> codes, scale = optimizer.quantize_weights(torch.tensor([[0.9, -0.1], [-0.5, 0.5]]))
            >>> codes.tolist(), scale.item()
            ([[1, 0], [-1, 1]], 0.5)
        """
        own = next((layer for layer in self._layers if layer.weight is weights), None)
        layer = own if own is not None else next(iter(self._layers), None)
        if layer is None:
            return quantize_weight(weights)
        return quantize_weight(weights, layer.weight_bits, layer.quantization_mode)

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        """Per-parameter state of the wrapped optimizers; each value is the very dict they use."""
        return {p: own for o in self.optimizers for p, own in o.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """Ignored: the base class assigns an empty one when it is made."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, loss: Tensor | None = None
    ) -> float | None:
        """Take one step on the gradients that the parameters hold.

        Args:
            closure: recomputes loss and gradients first, as in torch; optional.
            loss: () tensor; a step whose loss is not finite is skipped too.

        Returns:
            What the closure returned.

        Raises:
            UsageError: a gradient is sparse.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not params:
            return result
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise UsageError(
                    f"the gradient of a parameter of shape {tuple(p.shape)} is {p.grad.layout}, which is "
                    "neither clipped nor filtered here; make the embedding with sparse=False"
                )
            # torch's fused kernels read a gradient that was set by hand in the memory order of its parameter.
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        norm = self._total_norm(grads)
        nonfinite = ~norm.isfinite()
        if loss is not None:
            nonfinite = nonfinite | ~loss.detach().isfinite().to(norm.device)
        ratio = flips = None
        # The first step has no state to go back to, so its flag is read: one wait in the whole run.
        if self._undo_on_device and all(o.state for o in self.optimizers):
            ratio, flips = self._update_or_undo(params, grads, norm, nonfinite)
        elif not nonfinite:
            ratio, flips = self._update_on_host(params, norm)
        self.steps += 1
        overall = None if flips is None else self.overall(flips)
        self.report = StepReport(norm, nonfinite, ratio, overall, flips)
        return result

    def _update_on_host(
        self, params: list[nn.Parameter], norm: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Update and re-quantize, in one pass where the kernel can; returns slow ratio and flip shares."""
        acting = self._acting_filter()
        linear = None if acting is None else acting.linear(self.steps)
        factor, layers = self._clip_factor(norm), self._trained_layers()
        before = [layer.codes.clone() for layer in layers] if self.measure else []
        general = self.optimizers
        if acting is None or linear is not None:
            general = []
            for optimizer in self.optimizers:
                known = layers if self._whole_layers else []
                left = fused_step(optimizer, known, linear, float(factor), self.steps)
                if left is None:
                    general.append(optimizer)
                elif self._whole_layers:
                    layers = left
        if general:
            own = {id(p) for o in general for g in o.param_groups for p in g["params"]}
            self._general_update([p for p in params if id(p) in own], factor, general, acting)
        self._requantize(layers)
        return self._slow_ratio(params, norm * factor), self._flip_shares(before)

    def _acting_filter(self) -> Filter | None:
        """The filter of the step that begins."""
        own = self.gradient_filter
        return own if own is not None and own.begin_step(self.optimizers) else None

    def _clip_factor(self, norm: Tensor) -> Tensor:
        """Factor on the gradients, () float32: that of torch.nn.utils.clip_grad_norm_."""
        if self.max_grad_norm is None:
            return torch.ones_like(norm)
        return (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def _general_update(
        self,
        params: list[nn.Parameter],
        factor: Tensor,
        optimizers: Sequence[Optimizer],
        acting: Filter | None,
    ) -> None:
        """Clip, filter and let the wrapped optimizers step, one after the other."""
        if not params:
            return
        # On the host the factor is read for free.
        if self.max_grad_norm is not None and (self._undo_on_device or factor < 1):
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], factor)
        for optimizer in optimizers:
            if acting is None:
                optimizer.step()
                continue
            own = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            acting.before_step(optimizer, own, self.steps)
            optimizer.step()
            acting.after_step(optimizer, own, self.steps)

    def _slow_ratio(self, params: Sequence[nn.Parameter], clipped_norm: Tensor) -> Tensor | None:
        """When measuring: norm of the slow average over norm of the clipped gradient."""
        if not self.measure or self.gradient_filter is None:
            return None
        state = self.state
        slow = [state[p][SLOW] for p in params if SLOW in state.get(p, {})]
        return self._total_norm(slow) / clipped_norm if slow else None

    def _flip_shares(self, before: Sequence[Tensor]) -> Tensor | None:
        """Share of codes of each layer that differ from those ``before`` of the trained layers, (layers,)."""
        if not before:
            return None
        old = {id(layer): codes for layer, codes in zip(self._trained_layers(), before, strict=True)}
        return torch.stack([_share(old.get(id(m), m.codes) != m.codes) for m in self._layers])

    def _update_or_undo(
        self, params: list[nn.Parameter], grads: list[Tensor], norm: Tensor, nonfinite: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """As ``_update`` and re-quantize, undone on the device where ``nonfinite`` is set: no wait.

        Costs one copy of latents, codes and state while the step runs. State that an optimizer keeps on
        the host (the step count of an AdamW that is neither fused nor capturable) is not undone.
        """
        changed: list[Tensor] = [p.detach() for p in params]
        changed += [t for layer in self._trained_layers() for t in (layer.codes, layer.scale)]
        changed += [
            value
            for own in self.state.values()
            for value in own.values()
            if isinstance(value, Tensor) and value.device == norm.device
        ]
        before = [t.clone() for t in changed]
        torch._foreach_copy_(grads, [torch.where(nonfinite, 0.0, g) for g in grads])
        norm = torch.where(nonfinite, 1.0, norm)
        factor, layers = self._clip_factor(norm), self._trained_layers()
        codes = [layer.codes.clone() for layer in layers] if self.measure else []
        self._general_update(params, factor, self.optimizers, self._acting_filter())
        self._requantize(layers)
        ratio, flips = self._slow_ratio(params, norm * factor), self._flip_shares(codes)
        for now, old in zip(changed, before, strict=True):
            now.copy_(torch.where(nonfinite, old, now))
        return ratio, flips

    def _trained_layers(self) -> list[TernaryWeight]:
        """Layers whose latent may move; a frozen one keeps its codes, drawn ones too."""
        return [layer for layer in self._layers if layer.weight.requires_grad]

    def layer_zero_share(self) -> Tensor | None:
        """Share of zero codes of each ternary layer, (layers,) float32; None without any."""
        if not self._layers:
            return None
        return torch.stack([_share(layer.codes == 0) for layer in self._layers])

    def overall(self, shares: Tensor) -> Tensor:
        """The share among all codes, (), that shares of each layer's codes, (layers,), make."""
        return (shares * shares.new_tensor(self._weights)).sum()

    def state_dict(self) -> dict[str, Any]:
        """State of the wrapped optimizers, filter averages included, and the step count."""
        return {
            "optimizers": [o.state_dict() for o in self.optimizers],
            "steps": self.steps,
            "filter": self.gradient_filter.state_dict() if self.gradient_filter is not None else None,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. Load the model first: the codes are not derived again.

        Raises:
            ValueError: another number of optimizers, groups of other sizes, or averages of another filter.
        """
        saved = state_dict["optimizers"]
        if len(saved) != len(self.optimizers):
            raise ValueError(
                f"the checkpoint has {len(saved)} optimizers and this run {len(self.optimizers)}; "
                "resume with the optimizer= that the run was started with"
            )
        if self.gradient_filter is not None and state_dict.get("filter"):
            self.gradient_filter.load_state_dict(state_dict["filter"])
        for optimizer, own in zip(self.optimizers, saved, strict=True):
            optimizer.load_state_dict(own)
            _restore_averages(optimizer, own)
        self.steps = state_dict["steps"]
        # Loading replaces the group dicts of the wrapped optimizers.
        self.param_groups = [g for o in self.optimizers for g in o.param_groups]


def _release(layers: Iterable[TernaryWeight], owner: object) -> None:
    """Give the codes back, those excepted that another optimizer has taken over since."""
    for layer in layers:
        if layer.codes_owner is owner:
            layer.codes_are_current, layer.codes_owner = False, None


def _restore_averages(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Give a filter's state the type that it was saved in; torch loads all state in that of the parameter."""
    indices = (i for g in saved["param_groups"] for i in g["params"])
    for index, p in zip(indices, (p for g in optimizer.param_groups for p in g["params"]), strict=True):
        for name in (SLOW, WINDOW, COUNT):
            kept = saved["state"].get(index, {}).get(name)
            if kept is not None and kept.dtype != p.dtype:
                optimizer.state[p][name] = kept.to(p.device, copy=True)


def _share(mask: Tensor) -> Tensor:
    """Share of a mask that is set, () float32; counted in integers, which is exact for any size."""
    return mask.sum().float() / max(1, mask.numel())


def _total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, () float32.

    On a CPU by a kernel in float64, or by dot products: torch's norm adds up in float32 one by one there,
    0.1% off at 4096 x 4096.
    """
    if tensors[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(tensors)
    if native.available() and all(
        t.dtype is torch.float32 and t.layout is torch.strided and t.is_contiguous() for t in tensors
    ):
        return torch.ops.forge.sum_of_squares(list(tensors)).sqrt().float()
    flat = [t.detach().float().reshape(-1) for t in tensors]
    return torch.stack([torch.dot(t, t) for t in flat]).double().sum().sqrt().float()
