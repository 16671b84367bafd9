import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from oracles import bitnet
from phase4_bitnet.layers import (
    BitConv1d,
    BitConv2d,
    BitEmbedding,
    BitLinear,
    requantize_layers,
    ternary_layers,
)

ORACLE = {1.58: bitnet.ternary, 1: bitnet.binary}


def make_layer(k=24, n=10, seed=0, **options):
    torch.manual_seed(seed)
    return BitLinear(k, n, **options)


def relative_error(found, expected):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bits", [1.58, 1])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (2, 3, 24)])
def test_forward_equals_the_float64_formula(bits, norm, bias, shape):
    layer = make_layer(bias=bias, weight_bits=bits, norm=norm)
    x = torch.randn(shape)
    rows = x.reshape(-1, 24).numpy()
    if norm:
        rows = bitnet.rms_norm(rows).astype(np.float32)
    expected, *_ = bitnet.linear_forward(
        rows, layer.weight.detach().numpy(), layer.bias.detach().numpy() if bias else None, ORACLE[bits]
    )
    assert relative_error(layer(x), expected.reshape(*shape[:-1], 10)) < 1e-5


@pytest.mark.parametrize(
    ("backward", "bound"), [("auto", 1e-6), ("float32", 1e-6), ("bf16", 1e-2), ("int8", 2e-2)]
)
def test_gradients_are_straight_through(backward, bound):
    layer = make_layer(k=64, n=48, backward=backward)
    x = torch.randn(33, 64, requires_grad=True)
    grad = torch.randn(33, 48)
    layer(x).backward(grad)
    _, _, x_hat, w_hat = bitnet.linear_forward(x.detach().numpy(), layer.weight.detach().numpy())
    dx, dw = bitnet.linear_backward(grad.numpy(), x_hat, w_hat)
    assert relative_error(x.grad, dx) < bound
    assert relative_error(layer.weight.grad, dw) < bound
    assert relative_error(layer.bias.grad, grad.double().sum(0)) < 1e-6


def test_weight_only_leaves_the_input_in_float():
    layer = make_layer(activation_bits=None)
    x = torch.randn(5, 24)
    codes, mean = bitnet.ternary(layer.weight.detach().numpy())
    expected = x.double().numpy() @ (codes * float(np.float16(mean))).T + layer.bias.detach().double().numpy()
    assert relative_error(layer(x), expected) < 1e-6


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (24,)])
def test_empty_and_single_rows(shape):
    layer = make_layer()
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], 10)
    out.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_on_its_own_a_layer_follows_its_latent():
    layer = make_layer()
    x = torch.randn(4, 24)
    before = layer(x)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    assert not torch.allclose(before, layer(x))
    layer.codes_are_current = True
    stale = layer(x)
    layer.requantize_()
    assert not torch.allclose(stale, layer(x))


def test_autocast_gives_bf16_out_and_float32_gradients():
    layer = make_layer()
    x = torch.randn(4, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32


def test_frozen_weight_still_passes_the_input_gradient():
    layer = make_layer()
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 24, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("backward", ["float32", "int8"])
def test_activation_checkpointing_gives_the_same_gradients(backward):
    layer = make_layer(backward=backward)
    twin = copy.deepcopy(layer)
    x = torch.randn(6, 24)
    layer(x).pow(2).sum().backward()
    torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=False).pow(2).sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)


def test_state_dict_round_trip_is_exact_and_accepts_a_float_checkpoint():
    layer = make_layer(quantization_mode="stochastic")
    layer.codes_are_current = True
    other = make_layer(seed=5, quantization_mode="stochastic")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.codes, layer.codes)
    assert other.scale == layer.scale
    linear = nn.Linear(24, 10)
    deterministic = make_layer(seed=6)
    deterministic.load_state_dict(linear.state_dict())
    codes, _ = bitnet.ternary(linear.weight.detach().numpy())
    assert np.array_equal(deterministic.codes.numpy(), codes)


def test_casting_the_model_keeps_the_scale_in_float32():
    layer = make_layer().to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert layer.codes.dtype == torch.int8
    assert layer(torch.randn(3, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_stochastic_layer_without_an_owner_evaluates_and_saves_the_nearest_codes():
    layer = make_layer(quantization_mode="stochastic")
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    expected = bitnet.ternary(layer.weight.detach().numpy())[0]
    assert np.array_equal(layer.eval().current_codes()[0].numpy(), expected)
    assert np.array_equal(layer.train().state_dict()["codes"].numpy(), expected)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_follows_its_own_latent(copy_of):
    layer = make_layer()
    layer.codes_are_current = True
    twin = copy_of(layer)
    assert layer.codes_are_current
    with torch.no_grad():
        twin.weight.copy_(torch.randn_like(twin.weight))
    expected = bitnet.ternary(twin.weight.detach().numpy())[0]
    assert np.array_equal(twin.current_codes()[0].numpy(), expected)


def test_float_checkpoint_into_a_layer_on_meta():
    linear = nn.Linear(24, 10)
    layer = BitLinear(24, 10, device="meta")
    assert layer(torch.randn(2, 24, device="meta")).shape == (2, 10)
    layer.load_state_dict(linear.state_dict(), assign=True)
    assert np.array_equal(layer.codes.numpy(), bitnet.ternary(linear.weight.detach().numpy())[0])


@pytest.mark.parametrize("size", [1e-5, 1e-7, 1e-9])
def test_int8_backward_keeps_small_gradients(size):
    layer = make_layer(k=64, n=48, backward="int8")
    x, grad = torch.randn(33, 64), torch.randn(33, 48) * size
    layer(x).backward(grad)
    _, _, x_hat, w_hat = bitnet.linear_forward(x.numpy(), layer.weight.detach().numpy())
    assert relative_error(layer.weight.grad, bitnet.linear_backward(grad.numpy(), x_hat, w_hat)[1]) < 2e-2


def test_stochastic_mode_draws_in_training_and_not_in_evaluation():
    layer = make_layer(quantization_mode="stochastic")
    x = torch.randn(4, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (BitConv1d(3, 8, 3, padding=1), torch.randn(2, 3, 9)),
        (BitConv2d(3, 8, 3, stride=2), torch.randn(2, 3, 9, 9)),
    ],
)
def test_convolutions_use_codes_times_scale(layer, x):
    codes, mean = bitnet.ternary(layer.weight.detach().numpy())
    weight = torch.tensor(codes * float(np.float16(mean)), dtype=torch.float32)
    expected = layer._conv_forward(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_embedding_uses_codes_times_scale():
    layer = BitEmbedding(11, 6, padding_idx=0)
    index = torch.tensor([[1, 2, 10]])
    codes, mean = bitnet.ternary(layer.weight.detach().numpy())
    expected = (codes * float(np.float16(mean)))[index.numpy()]
    assert relative_error(layer(index), expected) < 1e-6


def test_all_layers_of_a_model_are_refreshed_together():
    model = nn.Sequential(make_layer(), make_layer(10, 24, 1, weight_bits=1), BitEmbedding(4, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    layers = [layer for _, layer in ternary_layers(model)]
    assert len(layers) == 3
    requantize_layers(layers)
    for layer in layers:
        codes, _ = ORACLE[layer.weight_bits](layer.weight.detach().numpy())
        assert np.array_equal(layer.codes.numpy(), codes)


@pytest.mark.parametrize(
    "options",
    [{"weight_bits": 2}, {"quantization_mode": "random"}, {"activation_bits": 4}, {"backward": "fp8"}],
)
def test_unknown_options_are_refused_with_the_choices(options):
    with pytest.raises(ValueError, match="use "):
        BitLinear(4, 4, **options)


def test_input_that_no_linear_layer_takes_is_refused():
    layer = BitLinear(4, 2)
    with pytest.raises(ValueError, match=r"got torch.int64 input of shape \(3, 4\)"):
        layer(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"takes floating point \(\.\.\., 4\)"):
        layer(torch.ones(3, 5))


def test_a_cast_leaves_the_scale_of_an_owned_layer_as_it_is():
    layer = BitLinear(64, 4)
    layer.codes_are_current = True
    scale = layer.scale.clone()
    assert torch.equal(layer.bfloat16().scale, scale)
    assert scale.bfloat16().float() != scale, "else the test shows nothing"


def test_the_gradient_keeps_its_arithmetic_under_a_compiled_autocast():
    torch.manual_seed(0)
    layer, x = BitLinear(64, 32, bias=False, backward="float32"), torch.randn(16, 64, requires_grad=True)

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).float().square().sum()

    want = torch.autograd.grad(loss(x), [x, layer.weight])
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x), [x, layer.weight]), want, strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        within = torch.autograd.grad(loss(x), [x, layer.weight])
    for a, b in zip(within, want, strict=True):
        assert torch.equal(a, b)
