"""The widespread BitLinear, to compare with: quantization is pretended in float, the product is float.

Nothing of Forge trains with it. It stands here, once, for the benchmarks and ``forge bench``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from phase4_bitnet.convert import hidden_linears


class NaiveBitLinear(nn.Linear):
    """A linear layer with fake-quantized weights and activations, straight through in backward.

    Microsoft, "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (2024), figure 3, without its RMSNorm,
    since the reference models have norms of their own:
    https://github.com/microsoft/unilm/blob/master/bitnet/The-Era-of-1-bit-LLMs__Training_Tips_Code_FAQ.pdf

    Example:
        >>> import torch
        >>> layer = NaiveBitLinear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.5, -1.5]]))
        >>> layer(torch.tensor([[127.0, 1.0]])).item()  # scale 1, codes 0 and -1: 0.5 rounds to even
        -1.0
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) float -> (..., out_features) of the same dtype."""
        w = self.weight
        x_quant = x + (activation_quant(x) - x).detach()
        w_quant = w + (weight_quant(w) - w).detach()
        return F.linear(x_quant, w_quant, self.bias)


def activation_quant(x: Tensor) -> Tensor:
    """Per-token int8 values in float: x (..., features) -> the same shape and dtype."""
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127) / scale


def weight_quant(w: Tensor) -> Tensor:
    """{-1, 0, 1} times the mean absolute value, in float: the shape and dtype of w."""
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


def convert_model_to_naive(model: nn.Module) -> nn.Module:
    """Put a :class:`NaiveBitLinear` in the place of each hidden linear layer, with its parameters.

    Args:
        model: float; the layers that ``convert_model_to_bitnet`` would take are taken.

    Returns:
        ``model``, changed.

    Example:
        >>> model = convert_model_to_naive(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [type(layer).__name__ for layer in model]
        ['NaiveBitLinear', 'ReLU', 'Linear']
    """
    for name in hidden_linears(model):
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = NaiveBitLinear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.weight, new.bias = old.weight, old.bias
        model.set_submodule(name, new)
    return model
