"""A second derivative through a gradient that has none is refused, and never left out in silence."""

import pytest
import torch
from torch import nn

from phase4_bitnet import native
from phase4_bitnet.attention import rope_table, rotary_attention
from phase4_bitnet.first_order import first_order_only
from phase4_bitnet.layers import BitLinear
from phase4_bitnet.rms_norm import RMSNorm

COS, SIN = rope_table(8, 16)
CASES = {
    "linear": lambda: (BitLinear(16, 4), torch.randn(8, 16)),
    "linear, int8 gradients": lambda: (BitLinear(16, 4, backward="int8"), torch.randn(8, 16)),
    "norm": lambda: (RMSNorm(16, eps=1e-5, squared_relu=True), torch.randn(8, 16)),
    "attention": lambda: (lambda qkv: rotary_attention(qkv, COS, SIN), torch.randn(2, 8, 3, 1, 16)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
def test_a_penalty_on_a_gradient_is_refused(case, loss):
    """Under a sum the incoming gradient is a constant, so torch's once_differentiable says nothing."""
    if case in ("norm", "attention") and not native.available():
        pytest.skip("torch's own operators, which have second derivatives")
    function, x = CASES[case]()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(loss(function(x)), x, create_graph=True)
    (alone,) = torch.autograd.grad(loss(function(x)), x)
    assert torch.equal(slope, alone)
    with pytest.raises(RuntimeError, match="second derivative goes through a native product"):
        (x.sum() + slope.square().sum()).backward()


def test_a_second_derivative_elsewhere_in_the_model_goes_on():
    """Only what leads through the refused gradient raises."""
    ternary, head = BitLinear(16, 16), nn.Linear(16, 1)
    loss = head(ternary(torch.randn(4, 16))).square().sum()
    (slope,) = torch.autograd.grad(loss, head.bias, create_graph=True)
    slope.sum().backward(inputs=[head.bias])
    assert head.bias.grad.item() == pytest.approx(8.0)  # of sum (y + b)^2 over four rows


def test_missing_gradients_stay_missing():
    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x + y

        @staticmethod
        @first_order_only
        def backward(ctx, grad):
            return grad, None

    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    grads = torch.autograd.grad(Pair.apply(x, y).sum(), (x, y), create_graph=True, allow_unused=True)
    assert torch.equal(grads[0], torch.ones(2))
    assert grads[1] is None
