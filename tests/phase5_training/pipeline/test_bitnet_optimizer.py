import copy
import gc

import numpy as np
import pytest
import torch
from torch import nn

from oracles import bitnet, grokfast
from phase4_bitnet.layers import BitLinear
from phase5_training.optimizers import build_optimizer
from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
from phase5_training.pipeline.grokfast_trainer import AVERAGE_DTYPES, FILTERS, GradientFilter, GrokfastConfig


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), BitLinear(8, 8, **options), nn.ReLU(), BitLinear(8, 8, **options), nn.Linear(8, 3)
    )


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=g), torch.randint(0, 3, (16,), generator=g)


def backward(model, seed=0):
    x, y = batch(seed)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def test_codes_are_those_of_the_weights_after_the_step():
    model = model_of()
    optimizer = BitNetOptimizer(sgd(model, 5.0), model)
    before = model[1].codes.clone()
    backward(model)
    optimizer.step()
    codes, _ = bitnet.ternary(model[1].weight.detach().numpy())
    assert np.array_equal(model[1].codes.numpy(), codes)
    assert not torch.equal(before, model[1].codes)


@pytest.mark.parametrize("bits", [1.58, 1])
def test_quantize_weights_is_what_the_layers_do(bits):
    model = model_of(weight_bits=bits)
    optimizer = BitNetOptimizer(sgd(model), model)
    latent = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    before = latent.clone()
    codes, scale = optimizer.quantize_weights(latent)
    wanted, _ = bitnet.ternary(latent.numpy()) if bits == 1.58 else (np.where(latent < 0, -1, 1), None)
    assert np.array_equal(codes.numpy(), wanted)
    assert codes.dtype == torch.int8
    assert scale.item() == pytest.approx(latent.double().abs().mean().item(), rel=1e-3)
    assert torch.equal(latent, before)
    for own, layer in zip(
        optimizer.quantize_weights(model[1].weight), (model[1].codes, model[1].scale), strict=True
    ):
        assert torch.equal(own, layer)


def test_quantize_weights_goes_by_the_layer_of_the_weight():
    model = nn.Sequential(BitLinear(8, 8), BitLinear(8, 8, weight_bits=1))
    optimizer = BitNetOptimizer(sgd(model), model)
    assert (optimizer.quantize_weights(model[0].weight)[0] == 0).any()
    assert not (optimizer.quantize_weights(model[1].weight)[0] == 0).any()
    plain = nn.Linear(8, 8)
    codes, _ = BitNetOptimizer(sgd(plain), plain).quantize_weights(torch.tensor([1.0, 0.1, -1.0]))
    assert codes.tolist() == [1, 0, -1]


def test_codes_are_derived_once_a_step(monkeypatch):
    from phase4_bitnet import layers

    model = model_of()
    optimizer = BitNetOptimizer(sgd(model), model)
    calls = []
    real = layers.requantize_
    monkeypatch.setattr(layers, "requantize_", lambda w, *a: (calls.append(len(w)), real(w, *a)))
    monkeypatch.setattr(layers, "quantize_weight", lambda *a: pytest.fail("quantized in a forward"))
    for micro_batch in range(3):
        x, y = batch(micro_batch)
        nn.functional.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        model.eval()(x)
    optimizer.step()
    assert calls == [2]


def test_k_steps_of_sgd_equal_a_plain_float64_reimplementation():
    torch.manual_seed(3)
    layer = BitLinear(12, 7, bias=False)
    optimizer = BitNetOptimizer(sgd(layer, 0.5), layer)
    weight = layer.weight.detach().double().numpy().copy()
    for step in range(10):
        x = torch.randn(9, 12, generator=torch.Generator().manual_seed(step))
        target = torch.randn(9, 7, generator=torch.Generator().manual_seed(100 + step))
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), target).backward()
        optimizer.step()
        out, _, x_hat, w_hat = bitnet.linear_forward(x.numpy(), weight)
        grad = 2 * (out - target.double().numpy()) / out.size
        weight -= 0.5 * bitnet.linear_backward(grad, x_hat, w_hat)[1]
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight, atol=1e-5)
    assert np.array_equal(layer.codes.numpy(), bitnet.ternary(weight)[0])


def test_order_is_clip_then_filter_then_adamw():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False)
    weight = layer.weight.detach().double().numpy().copy()
    inner = torch.optim.AdamW(layer.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    optimizer = BitNetOptimizer(
        inner, layer, gradient_filter=GradientFilter(GrokfastConfig(alpha=0.9)), max_grad_norm=0.5
    )
    series = (
        np.random.default_rng(0).normal(size=(8, 4, 5))
        * np.array([0.01, 1, 5, 1, 0.01, 3, 1, 1])[:, None, None]
    )
    clipped = [grokfast.clip([g], 0.5)[0][0] for g in series]
    expected = list(grokfast.adamw(grokfast.ema(clipped, 0.9, 2.0), weight, 0.01, (0.9, 0.98), 1e-8, 0.1))
    for g, after in zip(series, expected, strict=True):
        layer.weight.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        assert optimizer.report.grad_norm.item() == pytest.approx(np.linalg.norm(g), rel=1e-5)
        np.testing.assert_allclose(layer.weight.detach().numpy(), after, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guarded", [False, True], ids=["read flag", "undo on device"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first step"])
def test_a_nonfinite_step_changes_nothing(guarded, bad, first):
    model = model_of()
    optimizer = BitNetOptimizer(
        build_optimizer("muon", model, learning_rate=0.01, weight_decay=0.1),
        model,
        gradient_filter=GradientFilter(GrokfastConfig()),
        max_grad_norm=1.0,
    )
    # The path for devices whose flag is not read, forced here on the CPU.
    optimizer._undo_on_device = guarded
    if not first:
        backward(model)
        optimizer.step()
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    backward(model, 1)
    model[1].weight.grad[0, 0] = bad
    optimizer.step()
    assert bool(optimizer.report.nonfinite)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for old, new in zip(state["optimizers"], optimizer.state_dict()["optimizers"], strict=True):
        for index, own in new["state"].items():
            for key, value in own.items():
                before = old["state"].get(index, {}).get(key, torch.zeros_like(value))
                assert torch.equal(value, before), key


@pytest.mark.parametrize(
    ("name", "average"),
    [(name, dtype) for name in FILTERS for dtype in AVERAGE_DTYPES if (name, dtype) != ("ma", "bfloat16")],
)
@pytest.mark.parametrize("optimizer_name", ["muon", "adamw", "sgd"])
def test_resume_is_bit_identical_for_each_optimizer_and_filter(name, optimizer_name, average):
    def make():
        model = model_of()
        inner = build_optimizer(optimizer_name, model, learning_rate=0.01, weight_decay=0.1)
        config = GrokfastConfig(filter=name, window=4, gain_warmup_steps=5, average_dtype=average)
        own = GradientFilter(config)
        own.lag.evidence = 0.5
        return model, BitNetOptimizer(inner, model, gradient_filter=own, max_grad_norm=1.0)

    model, optimizer = make()
    for step in range(6):
        backward(model, step)
        optimizer.step()
        if step == 2:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed, other = make()
    resumed.load_state_dict(saved[0])
    other.gradient_filter.lag.evidence = 0.0
    other.load_state_dict(saved[1])
    for step in range(3, 6):
        backward(resumed, step)
        other.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("optimizer_name", ["muon", "adamw", "sgd"])
def test_parameters_that_come_later_or_now_and_then_are_filtered_by_what_they_have_seen(name, optimizer_name):
    """A frozen one has no average, one added later begins its own, one without a gradient keeps it."""
    model = model_of()
    model[3].weight.requires_grad_(False)
    inner = build_optimizer(optimizer_name, model, learning_rate=0.01, weight_decay=0.0)
    config = GrokfastConfig(filter=name, window=2)
    optimizer = BitNetOptimizer(inner, model, gradient_filter=GradientFilter(config))
    optimizer.gradient_filter.lag.evidence = 1.0
    late = nn.Parameter(torch.ones(3))
    for step in range(4):
        backward(model, step)
        if step == 1:
            optimizer.add_param_group({"params": [late], "weight_decay": 0.0})
        if step >= 1:
            late.grad = torch.full((3,), 2.0)
        if step == 3:
            model[1].weight.grad = None
            kept = optimizer.state[model[1].weight]["slow_gradient"].clone()
        optimizer.step()
    assert model[3].weight not in optimizer.state
    assert torch.equal(optimizer.state[model[1].weight]["slow_gradient"], kept)
    seen = 2.0 * (1 - 0.98**3) if name in ("ademamix", "auto") else 2.0
    torch.testing.assert_close(optimizer.state[late]["slow_gradient"], torch.full((3,), seen))
    assert (late < 1).all()
    assert all(p.isfinite().all() for p in model.parameters())


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = model_of()
    muon, adamw = build_optimizer("auto", model, learning_rate=0.02, weight_decay=0.1)
    assert isinstance(muon, torch.optim.Muon)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(8, 8), (8, 8)]
    decayed, plain = adamw.param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    total = sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups)
    assert total == len(list(model.parameters()))


def test_scheduler_of_torch_reaches_the_wrapped_optimizers():
    model = model_of()
    inner = build_optimizer("muon", model, learning_rate=1.0, weight_decay=0.0)
    optimizer = BitNetOptimizer(inner, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    backward(model)
    optimizer.step()
    schedule.step()
    assert {g["lr"] for o in inner for g in o.param_groups} == {0.5}


def test_measured_steps_report_flips_and_the_slow_ratio():
    model = model_of()
    optimizer = BitNetOptimizer(sgd(model, 5.0), model, gradient_filter=GradientFilter(GrokfastConfig()))
    optimizer.measure = True
    before = [model[i].codes.clone() for i in (1, 3)]
    backward(model)
    optimizer.step()
    flips = [(old != model[i].codes).double().mean().item() for old, i in zip(before, (1, 3), strict=True)]
    assert sum(flips) > 0
    assert optimizer.report.layer_flip_share.tolist() == pytest.approx(flips)
    # The first average is the first gradient.
    assert optimizer.report.slow_ratio.item() == pytest.approx(1.0, rel=1e-5)
    zeros = [(model[i].codes == 0).double().mean().item() for i in (1, 3)]
    assert optimizer.layer_zero_share().tolist() == pytest.approx(zeros)


def test_shares_of_layers_make_the_share_of_all_codes():
    model = nn.Sequential(BitLinear(8, 4), BitLinear(4, 2), nn.Linear(2, 1))
    model[1].weight.requires_grad_(False)  # a frozen layer keeps its codes
    optimizer = BitNetOptimizer(sgd(model, 5.0), model)
    optimizer.measure = True
    before = model[0].codes.clone()
    model(torch.randn(16, 8)).square().sum().backward()
    optimizer.step()
    moved = (before != model[0].codes).sum().item()
    assert optimizer.report.layer_flip_share.tolist() == pytest.approx([moved / 32, 0.0])
    assert optimizer.report.flip_share.item() == pytest.approx(moved / 40)
    zeros = sum((model[i].codes == 0).sum().item() for i in (0, 1)) / 40
    assert optimizer.overall(optimizer.layer_zero_share()).item() == pytest.approx(zeros)


def test_release_returns_the_layers_to_following_their_latent():
    model = model_of()
    optimizer = BitNetOptimizer(sgd(model), model)
    optimizer.release()
    x, _ = batch()
    before = model(x)
    with torch.no_grad():
        model[1].weight.normal_()
    assert not torch.allclose(before, model(x))


def test_unknown_names_and_frozen_models_are_refused():
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        build_optimizer("adam", model_of(), learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="unfreeze"):
        build_optimizer("adamw", model_of().requires_grad_(False), learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="gradient_clipping=False"):
        BitNetOptimizer(sgd(model_of()), model_of(), max_grad_norm=0)


def test_stochastic_codes_and_frozen_layers_survive_a_skipped_step():
    for guarded in (False, True):
        model = model_of(quantization_mode="stochastic")
        model[3].weight.requires_grad_(False)
        optimizer = BitNetOptimizer(
            torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1), model
        )
        optimizer._undo_on_device = guarded
        frozen = model[3].codes.clone()
        backward(model)
        optimizer.step()
        drawn = model[1].codes.clone()
        backward(model)
        model[1].weight.grad[0, 0] = float("nan")
        optimizer.step()
        assert torch.equal(model[1].codes, drawn)
        assert torch.equal(model[3].codes, frozen)


@pytest.mark.parametrize("name", ["ema", "ma", "high_pass"])
@pytest.mark.parametrize("bad", [0, 3])
def test_a_skipped_step_is_as_if_it_had_not_been(name, bad):
    """On the host and undone on the device: the same weights as without the bad gradient."""
    weights = []
    for guarded, skips in ((False, False), (False, True), (True, True)):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2, bias=False)
        config = GrokfastConfig(filter=name, window=3)
        optimizer = BitNetOptimizer(
            torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9),
            layer,
            gradient_filter=GradientFilter(config),
        )
        optimizer._undo_on_device = guarded
        for step in range(8):
            g = torch.Generator().manual_seed(step)
            if skips and step == bad:
                layer.weight.grad = torch.full((2, 3), float("inf"))
                optimizer.step()
            layer.weight.grad = torch.randn(2, 3, generator=g)
            optimizer.step()
        weights.append(layer.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2], rtol=0, atol=1e-7)


def test_a_loss_that_is_not_finite_skips_the_step_too():
    model = model_of()
    optimizer = BitNetOptimizer(sgd(model), model)
    before = model[1].weight.detach().clone()
    backward(model)
    optimizer.step(loss=torch.tensor(float("nan")))
    assert bool(optimizer.report.nonfinite)
    assert torch.equal(model[1].weight, before)


def test_an_added_group_is_trained():
    model = model_of()
    optimizer = BitNetOptimizer(torch.optim.SGD(model[1].parameters(), 0.1), model)
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.2})
    before = model[4].weight.detach().clone()
    backward(model)
    optimizer.step()
    torch.testing.assert_close(model[4].weight.detach(), before - 0.2 * model[4].weight.grad)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]


def test_layers_follow_their_latents_when_the_wrapper_is_gone():
    model = model_of()
    optimizer = BitNetOptimizer(sgd(model), model)
    assert model[1].codes_are_current
    del optimizer
    gc.collect()
    assert not model[1].codes_are_current


def test_a_copied_wrapper_works_on_its_own():
    model = model_of()
    optimizer = BitNetOptimizer(build_optimizer("muon", model, learning_rate=0.1, weight_decay=0.0), model)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = model[1].weight.detach().clone()
    backward(twin_model)
    twin.step()
    assert torch.equal(model[1].weight, before)
    assert not torch.equal(twin_model[1].weight, before)


def test_lbfgs_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="several times a step"):
        BitNetOptimizer(torch.optim.LBFGS(model.parameters()), model)


def test_the_norm_of_large_gradients_is_right():
    """torch's CPU norm is 0.06% off at this size."""
    layer = nn.Linear(4096, 4096, bias=False)
    layer.weight.grad = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    optimizer = BitNetOptimizer(sgd(layer), layer)
    optimizer.step()
    exact = layer.weight.grad.double().norm().item()
    assert optimizer.report.grad_norm.item() == pytest.approx(exact, rel=1e-4)


def test_a_second_optimizer_keeps_the_codes_when_the_first_is_dropped():
    layer = BitLinear(8, 8)
    optimizer = BitNetOptimizer(torch.optim.SGD(layer.parameters(), 0.1), layer)
    optimizer = BitNetOptimizer(torch.optim.SGD(layer.parameters(), 0.1), layer)
    gc.collect()
    assert layer.codes_are_current
    optimizer.release()
    assert not layer.codes_are_current


@pytest.mark.parametrize("average", ["float32", "bfloat16"])
def test_a_transposed_gradient_is_filtered(average):
    torch.manual_seed(0)
    grad, moved = torch.randn(6, 4), []
    for make in (torch.clone, lambda g: g.t().contiguous().t()):
        p = nn.Parameter(torch.ones(6, 4))
        config = GrokfastConfig(average_dtype=average)
        optimizer = BitNetOptimizer(
            torch.optim.AdamW([p], fused=True), nn.Identity(), gradient_filter=GradientFilter(config)
        )
        for _ in range(3):
            p.grad = make(grad)
            optimizer.step()
        moved.append(p.detach())
    torch.testing.assert_close(*moved)


def test_a_moving_average_of_a_bf16_model_goes_on_counting_after_a_resume():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    def make():
        config = GrokfastConfig(filter="ma", window=3)
        return BitNetOptimizer(
            torch.optim.SGD([p], 1e-3), nn.Identity(), gradient_filter=GradientFilter(config)
        )

    optimizer = make()
    for _ in range(258):
        p.grad = torch.ones_like(p)
        optimizer.step()
    again = make()
    again.load_state_dict(optimizer.state_dict())
    p.grad = torch.ones_like(p)
    again.step()
    assert again.state[p]["gradient_count"].item() == 259


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = BitNetOptimizer(sgd(embedding), embedding)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(5, 2\) is torch.sparse_coo, .* sparse=False"):
        optimizer.step()
