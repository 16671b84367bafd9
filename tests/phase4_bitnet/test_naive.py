"""The fake-quant layer that Forge is compared with is the published one."""

import numpy as np
import torch
from torch import nn

from oracles.bitnet import int8_rows, linear_backward, ternary
from phase4_bitnet import build_model
from phase4_bitnet.naive import NaiveBitLinear, activation_quant, convert_model_to_naive, weight_quant


def test_quantizers_follow_the_published_formula():
    x = torch.randn(7, 33, dtype=torch.float64)
    codes, mean = ternary(x.numpy())
    np.testing.assert_allclose(weight_quant(x).numpy(), codes * mean, rtol=1e-12)
    rows, scale = int8_rows(x.numpy())
    np.testing.assert_allclose(activation_quant(x).numpy(), rows * scale, rtol=1e-12)


def test_gradients_pass_straight_through():
    layer = NaiveBitLinear(33, 5, bias=False, dtype=torch.float64)
    x = torch.randn(7, 33, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 5, dtype=torch.float64)
    out = layer(x)
    out.backward(grad)
    codes, mean = ternary(layer.weight.detach().numpy())
    rows, scale = int8_rows(x.detach().numpy())
    np.testing.assert_allclose(out.detach().numpy(), (rows * scale) @ (codes * mean).T, rtol=1e-9)
    to_input, to_weight = linear_backward(grad.numpy(), rows * scale, codes * mean)
    np.testing.assert_allclose(x.grad.numpy(), to_input, rtol=1e-9)
    np.testing.assert_allclose(layer.weight.grad.numpy(), to_weight, rtol=1e-9)


def test_conversion_keeps_parameters_biases_and_the_head():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = dict(model.named_parameters())
    convert_model_to_naive(model)
    assert isinstance(model[0], NaiveBitLinear)
    assert type(model[2]) is nn.Linear
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_conversion_takes_the_hidden_layers_of_the_reference_decoder():
    model = convert_model_to_naive(
        build_model("decoder", vocab_size=7, dim=16, layers=2, heads=2, num_classes=5, ternary=False)
    )
    layers = [type(m) for m in model.modules() if isinstance(m, nn.Linear)]
    assert layers.count(NaiveBitLinear) == 8  # query-key-value, output, up, down of two blocks
    assert layers.count(nn.Linear) == 1
    assert model(torch.zeros(2, 4, dtype=torch.long)).shape == (2, 5)
