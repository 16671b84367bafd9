import pytest
import torch

from phase4_bitnet import BitLinear, native
from phase4_bitnet.int8_linear import (
    AUTO_INT8_ROWS,
    GRADIENT_BLOCK,
    GRADIENT_FLOOR,
    int8_linear,
    int8_linear_backward,
    quantize_input,
)
from phase4_bitnet.ternary import quantize_rows

needs_native = pytest.mark.skipif(not native.available(), reason="no native kernels on this machine")

# (rows, in, out): one of each, odd ones, whole tiles, more than one block of rows, more than one panel.
SHAPES = [(1, 1, 1), (5, 7, 3), (64, 128, 128), (300, 65, 50), (257, 49, 100), (513, 100, 33), (1100, 48, 96)]


@pytest.fixture(params=["native", "torch"])
def implementation(request, monkeypatch):
    if request.param == "native" and not native.available():
        pytest.skip("no native kernels on this machine")
    if request.param == "torch":
        monkeypatch.setattr("phase4_bitnet.int8_linear.native.available", lambda: False)
    return request.param


def make(m, k, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, row_scale = quantize_rows(torch.randn(m, k, generator=generator))
    codes = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    grad = torch.randn(m, n, generator=generator) * 10.0 ** torch.randint(-9, 0, (m, 1), generator=generator)
    return rows, row_scale, codes, torch.tensor(0.37), grad


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_exact_up_to_the_scaling(implementation, shape):
    rows, row_scale, codes, scale, _ = make(*shape)
    exact = rows.long() @ codes.long().t()
    assert torch.equal(int8_linear(rows, row_scale, codes, scale), exact.float() * (row_scale * scale))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_within_half_a_step_a_term(implementation, shape):
    rows, row_scale, codes, scale, grad = make(*shape)
    grad_input, grad_weight = int8_linear_backward(grad, rows, row_scale, codes, scale)
    assert grad_input is not None
    assert grad_weight is not None
    g, x = grad.double(), rows.double() * row_scale.double()
    step = g.abs().amax(1, keepdim=True) / 127
    bound = 0.5 * step * codes.double().abs().sum(0) * scale.double()
    error = (grad_input - g @ codes.double() * scale.double()).abs()
    assert (error <= bound * (1 + 1e-4) + 1e-30).all()
    folded = g * row_scale.double()
    bound = sum(
        0.5 * f.abs().amax(0)[:, None] / 127 * r.double().abs().sum(0)
        for f, r in zip(folded.split(GRADIENT_BLOCK), rows.split(GRADIENT_BLOCK), strict=True)
    )
    error = (grad_weight - g.t() @ x).abs()
    # The blocks are added up in float32.
    assert (error <= bound * (1 + 1e-4) + 1e-6 * (g.abs().t() @ x.abs())).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_and_torch_give_the_same_bits(monkeypatch, shape, block, dtype):
    monkeypatch.setattr("phase4_bitnet.int8_linear.GRADIENT_BLOCK", block)
    rows, row_scale, codes, scale, grad = make(*shape)
    x, grad = torch.randn(shape[0], shape[1]).to(dtype), grad.to(dtype)

    def results():
        return [
            *quantize_input(x),
            int8_linear(rows, row_scale, codes, scale, dtype),
            *int8_linear_backward(grad, rows, row_scale, codes, scale),
        ]

    ours = results()
    monkeypatch.setattr("phase4_bitnet.int8_linear.native.available", lambda: False)
    for a, b in zip(ours, results(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_the_float32_result_rounded_once(implementation, shape):
    rows, row_scale, codes, scale, grad = make(*shape)
    grad = grad.bfloat16()
    wide = int8_linear(rows, row_scale, codes, scale)
    assert torch.equal(int8_linear(rows, row_scale, codes, scale, torch.bfloat16), wide.bfloat16())
    grad_input, grad_weight = int8_linear_backward(grad, rows, row_scale, codes, scale)
    want_input, want_weight = int8_linear_backward(grad.float(), rows, row_scale, codes, scale)
    assert torch.equal(grad_input, want_input.bfloat16())
    assert torch.equal(grad_weight, want_weight)
    assert grad_weight.dtype == torch.float32


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(threads):
    before = torch.get_num_threads()
    rows, row_scale, codes, scale, grad = make(600, 96, 130)
    want = [
        int8_linear(rows, row_scale, codes, scale),
        *int8_linear_backward(grad, rows, row_scale, codes, scale),
    ]
    try:
        torch.set_num_threads(threads)
        got = [
            int8_linear(rows, row_scale, codes, scale),
            *int8_linear_backward(grad, rows, row_scale, codes, scale),
        ]
    finally:
        torch.set_num_threads(before)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_so(implementation, value, dtype):
    rows, row_scale, codes, scale, grad = make(20, 8, 16)
    grad = grad.to(dtype)
    grad[3, 5] = value
    grad_input, grad_weight = int8_linear_backward(grad, rows, row_scale, codes, scale)
    assert not grad_input[3].isfinite().any()
    assert not grad_weight[5].isfinite().any()
    assert grad_input[4:].isfinite().all()


def test_an_input_that_is_not_finite_stays_so(implementation):
    x = torch.ones(2, 20)
    x[1, 17] = float("nan")
    _, scale = quantize_input(x)
    assert scale.isnan().flatten().tolist() == [False, True]


def test_only_what_is_wanted_is_computed(implementation):
    rows, row_scale, codes, scale, grad = make(9, 8, 16)
    both = int8_linear_backward(grad, rows, row_scale, codes, scale)
    assert torch.equal(int8_linear_backward(grad, rows, row_scale, codes, scale, True, False)[0], both[0])
    assert torch.equal(int8_linear_backward(grad, rows, row_scale, codes, scale, False, True)[1], both[1])
    assert int8_linear_backward(grad, rows, row_scale, codes, scale, False, True)[0] is None


@pytest.mark.parametrize("shape", [(0, 8, 16), (4, 0, 16), (4, 8, 0)])
def test_empty_shapes(implementation, shape):
    rows, row_scale, codes, scale, grad = make(*shape)
    m, k, n = shape
    assert torch.equal(int8_linear(rows, row_scale, codes, scale), torch.zeros(m, n))
    grad_input, grad_weight = int8_linear_backward(grad, rows, row_scale, codes, scale)
    assert torch.equal(grad_input, torch.zeros(m, k))
    assert torch.equal(grad_weight, torch.zeros(n, k))


def test_gradients_far_below_the_floor_of_activations_survive(implementation):
    rows, row_scale, codes, scale, grad = make(16, 8, 12)
    small = int8_linear_backward(grad * 2.0**-60, rows, row_scale, codes, scale)
    for a, b in zip(small, int8_linear_backward(grad, rows, row_scale, codes, scale), strict=True):
        torch.testing.assert_close(a, b * 2.0**-60, rtol=1e-5, atol=0)
    assert GRADIENT_FLOOR < 2.0**-100


@needs_native
def test_compiled_without_a_break_to_the_same_codes():
    x = torch.randn(40, 30)
    rows, scale = torch.compile(quantize_input, fullgraph=True)(x)
    assert torch.equal(rows, quantize_rows(x)[0])
    assert torch.equal(scale, quantize_rows(x)[1])


@pytest.mark.parametrize(
    ("rows", "like"), [(AUTO_INT8_ROWS, "int8"), (AUTO_INT8_ROWS - 1, "float32")], ids=["many", "few"]
)
def test_auto_takes_int8_for_many_rows_where_it_is_native(implementation, rows, like):
    torch.manual_seed(0)
    x, found = torch.randn(rows, 8), {}
    layer = BitLinear(8, 5, bias=False)
    for how in ("auto", "int8", "float32"):
        layer.backward, layer.weight.grad = how, None
        layer(x).square().sum().backward()
        found[how] = layer.weight.grad
    assert not torch.equal(found["int8"], found["float32"])
    assert torch.equal(found["auto"], found[like if implementation == "native" else "float32"])
