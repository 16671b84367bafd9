"""The step in one pass: formulas in float64, the numbers of the general path, and when it steps aside."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from oracles import grokfast
from phase4_bitnet import native
from phase4_bitnet.layers import BitLinear
from phase4_bitnet.ternary import quantize_weight
from phase5_training import fused_step as module
from phase5_training.pipeline import bitnet_optimizer
from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
from phase5_training.pipeline.grokfast_trainer import GradientFilter, GrokfastConfig

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")

FILTERS = {
    "none": (None, lambda s: s),
    "ema": (GrokfastConfig(alpha=0.9), lambda s: grokfast.ema(s, 0.9, 2.0)),
    "high_pass": (
        GrokfastConfig(filter="high_pass", alpha=0.8, lambda_reg=0.5),
        lambda s: grokfast.high_pass(s, 0.8, 0.5),
    ),
    "unit gain": (
        GrokfastConfig(alpha=0.9, unit_gain=True),
        lambda s: (g / 3 for g in grokfast.ema(s, 0.9, 2.0)),
    ),
}


class Net(nn.Module):
    """Sizes that fill blocks and vectors of the kernel and ones that do not; one weight in two layers."""

    def __init__(self, **options):
        super().__init__()
        self.first = BitLinear(150, 120, **options)
        self.second = BitLinear(120, 7, **options)
        self.tied = BitLinear(120, 7, bias=False, **options)
        self.tied.weight = self.second.weight
        self.norm = nn.LayerNorm(5)
        self.one = nn.Parameter(torch.randn(()))


@pytest.fixture
def taken(monkeypatch):
    """Return the list of steps: True for each that the kernel took."""
    seen = []
    real = module.fused_step

    def watch(*args):
        job = real(*args)
        seen.append(job is not None)
        return job

    monkeypatch.setattr(bitnet_optimizer, "fused_step", watch)
    return seen


def adamw(model, **options):
    """Two groups that differ in all figures."""
    params = list(model.parameters())
    groups = [
        {"params": params[:3], "lr": 0.02, "weight_decay": 0.1},
        {"params": params[3:], "lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), **options)


def wrapped(model, config=None, clip=0.5, **options):
    gradient_filter = GradientFilter(config) if config else None
    return BitNetOptimizer(
        adamw(model, **options), model, gradient_filter=gradient_filter, max_grad_norm=clip
    )


def series(model, steps=6, seed=0):
    """Gradients of several sizes, so that some steps are clipped and some are not."""
    generator = np.random.default_rng(seed)
    sizes = [1.0, 1e-4, 3.0, 1e-3, 1.0, 10.0, 1e-4, 1.0][:steps]
    return [
        [(generator.normal(size=tuple(p.shape)) * size).astype(np.float32) for p in model.parameters()]
        for size in sizes
    ]


def give(model, gradients):
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = torch.tensor(g)


def train(model, optimizer, gradients):
    for own in gradients:
        give(model, own)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("path", ["one pass", "general", "torch"])
@pytest.mark.parametrize("name", FILTERS)
def test_both_paths_follow_the_formulas_in_float64(monkeypatch, taken, path, name):
    config, oracle = FILTERS[name]
    if path == "general":
        monkeypatch.setattr(bitnet_optimizer, "fused_step", lambda *args: None)
    elif path == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    model = Net()
    weights = [p.detach().double().numpy().copy() for p in model.parameters()]
    gradients = series(model)
    found = train(model, wrapped(model, config), gradients)
    clipped = [grokfast.clip(own, 0.5)[0] for own in gradients]
    for i, (p, weight) in enumerate(zip(found, weights, strict=True)):
        figures = (0.02, (0.9, 0.98), 1e-8, 0.1) if i < 3 else (0.05, (0.8, 0.95), 1e-4, 0.0)
        *_, expected = grokfast.adamw(oracle([own[i] for own in clipped]), weight, *figures)
        np.testing.assert_allclose(p.numpy(), expected, rtol=2e-5, atol=2e-6)
    # The first step is the optimizer's own: it makes the state.
    assert taken == {"one pass": [False] + [True] * 5, "general": [], "torch": [False] * 6}[path]


@pytest.mark.parametrize("bits", [1.58, 1])
def test_codes_are_those_of_the_new_latents(taken, bits):
    model = Net(weight_bits=bits)
    optimizer = wrapped(model, GrokfastConfig())
    for own in series(model, 8):
        train(model, optimizer, [own])
        for layer in (model.first, model.second, model.tied):
            codes, scale = quantize_weight(layer.weight, bits)
            assert torch.equal(layer.codes, codes)
            assert torch.equal(layer.scale, scale)
    assert sum(taken) == 7


def test_stochastic_and_frozen_layers_are_left_to_the_general_path(taken):
    model = nn.Sequential(
        BitLinear(20, 20, quantization_mode="stochastic"), BitLinear(20, 20), BitLinear(20, 20)
    )
    model[2].weight.requires_grad_(False)
    frozen = model[2].codes.clone()
    with torch.no_grad():
        model[2].weight.mul_(-1)
    optimizer = BitNetOptimizer(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), model)
    model[2].codes.copy_(frozen)
    for step in range(3):
        before = model[0].codes.clone()
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
        assert not torch.equal(model[0].codes, before), step  # drawn anew
        assert torch.equal(model[1].codes, quantize_weight(model[1].weight)[0])
        assert torch.equal(model[2].codes, frozen)
    assert taken == [False, True, True]


def test_results_do_not_depend_on_the_threads():
    before = torch.get_num_threads()
    ends = []
    try:
        for threads in (1, 3):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            model = Net()
            train(model, wrapped(model, GrokfastConfig(average_dtype="bfloat16")), series(model))
            ends.append(model.state_dict())
    finally:
        torch.set_num_threads(before)
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def _add_pre_hook(optimizer):
    optimizer.register_step_pre_hook(lambda *args: optimizer.calls.append("pre"))


def _add_post_hook(optimizer):
    optimizer.register_step_post_hook(lambda *args: optimizer.calls.append("post"))


def _replace_step(optimizer):
    real = optimizer.step
    optimizer.step = lambda *args: (optimizer.calls.append("own"), real(*args))[1]


@pytest.mark.parametrize("add", [_add_pre_hook, _add_post_hook, _replace_step])
def test_what_hangs_on_the_optimizers_step_is_called_each_time(taken, add):
    model = Net()
    optimizer = wrapped(model)
    inner = optimizer.optimizers[0]
    inner.calls = []
    add(inner)
    train(model, optimizer, series(model, 3))
    assert len(inner.calls) == 3
    assert taken == [False] * 3


def test_global_hooks_see_the_wrapped_optimizer(taken):
    model = Net()
    optimizer = wrapped(model)
    seen = []
    handle = register_optimizer_step_pre_hook(lambda o, *args: seen.append(o))
    try:
        train(model, optimizer, series(model, 3))
    finally:
        handle.remove()
    assert seen.count(optimizer.optimizers[0]) == 3


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"foreach": True}], ids=str)
def test_options_give_what_torch_gives(taken, options):
    """Options of other formulas go to torch's step; foreach is the same formula and does not."""
    model = Net()
    twin = copy.deepcopy(model)
    gradients = series(model, 4)
    found = train(model, wrapped(model, clip=None, **options), gradients)
    for got, wanted in zip(found, train(twin, adamw(twin, **options), gradients), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert any(taken) == ("foreach" in options)


@pytest.mark.parametrize("kind", ["bfloat16", "float64", "strided weight"])
def test_other_types_and_layouts_give_what_torch_gives(taken, kind):
    torch.manual_seed(0)
    layer = nn.Linear(6, 9, bias=False)
    if kind == "strided weight":
        layer.weight = nn.Parameter(torch.randn(6, 9).t())
    else:
        layer = layer.to(getattr(torch, kind))
    twin = copy.deepcopy(layer)
    optimizer = BitNetOptimizer(torch.optim.AdamW(layer.parameters(), 0.1), layer)
    reference = torch.optim.AdamW(twin.parameters(), 0.1)
    for _ in range(3):
        layer.weight.grad = torch.randn_like(layer.weight)
        twin.weight.grad = layer.weight.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(layer.weight, twin.weight)
    assert taken == [False] * 3


def test_a_gradient_of_another_layout_is_read_as_it_is_meant(taken):
    torch.manual_seed(0)
    layer = nn.Linear(6, 9, bias=False)
    twin = copy.deepcopy(layer)
    optimizer = BitNetOptimizer(torch.optim.AdamW(layer.parameters(), 0.1), layer)
    reference = torch.optim.AdamW(twin.parameters(), 0.1)
    for _ in range(3):
        layer.weight.grad = torch.randn(6, 9).t()
        twin.weight.grad = layer.weight.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-5, atol=1e-6)
    assert taken == [False, True, True]


def test_a_missing_gradient_leaves_its_parameter_alone(taken):
    model = Net()
    optimizer = wrapped(model, GrokfastConfig())
    gradients = series(model, 4)
    train(model, optimizer, gradients[:2])
    give(model, gradients[2])
    model.norm.weight.grad = None
    before = model.norm.weight.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[model.norm.weight].items()}
    optimizer.step()
    assert torch.equal(model.norm.weight, before)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[model.norm.weight].items())
    assert taken == [False, True, True]


def test_gradients_stay_as_they_are():
    model = Net()
    optimizer = wrapped(model, GrokfastConfig())
    gradients = series(model, 2)
    train(model, optimizer, gradients)
    for p, g in zip(model.parameters(), gradients[1], strict=True):
        assert np.array_equal(p.grad.numpy(), g)


@pytest.mark.parametrize("first", ["one pass", "general"])
def test_state_passes_between_the_paths(monkeypatch, first):
    """Three steps on one, three on the other, by way of a checkpoint: as six on one."""
    gradients = None
    ends = []
    for mixed in (False, True):
        torch.manual_seed(0)
        model = Net()
        gradients = gradients or series(model)
        for part in (gradients[:3], gradients[3:]):
            kernel = not mixed or (first == "one pass") == (part is gradients[:3])
            own = wrapped(model, GrokfastConfig())
            if part[0] is not gradients[0]:
                own.load_state_dict(saved)  # noqa: F821
            with monkeypatch.context() as patched:
                if not kernel:
                    patched.setattr(bitnet_optimizer, "fused_step", lambda *args: None)
                train(model, own, part)
            saved = copy.deepcopy(own.state_dict())  # noqa: F841
        ends.append([p.detach().clone() for p in model.parameters()])
    for mine, mixed_end in zip(*ends, strict=True):
        torch.testing.assert_close(mine, mixed_end, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average_dtype", ["float32", "bfloat16"])
def test_resume_is_bit_identical(taken, average_dtype):
    config = GrokfastConfig(average_dtype=average_dtype)
    model = Net()
    gradients = series(model, 8)
    optimizer = wrapped(model, config)
    train(model, optimizer, gradients[:4])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, gradients[4:])
    twin = Net()
    other = wrapped(twin, config)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(twin, other, gradients[4:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert other.state[twin.one]["slow_gradient"].dtype == getattr(torch, average_dtype)
    assert taken == [False] + [True] * 11


def test_bfloat16_averages_are_the_same_on_all_paths(monkeypatch):
    """The same random bits: only where float32 rounds apart may an average land on the other neighbor."""
    averages = []
    for path in ("one pass", "general", "torch"):
        with monkeypatch.context() as patched:
            if path == "general":
                patched.setattr(bitnet_optimizer, "fused_step", lambda *args: None)
            elif path == "torch":
                patched.setattr(native, "available", lambda: False)
            torch.manual_seed(0)
            model = Net()
            optimizer = wrapped(model, GrokfastConfig(average_dtype="bfloat16"))
            train(model, optimizer, series(model))
            averages.append([optimizer.state[p]["slow_gradient"] for p in model.parameters()])
    for other in averages[1:]:
        same = [(a == b).double().mean().item() for a, b in zip(averages[0], other, strict=True)]
        assert min(same) > 0.99


def test_measured_figures(taken):
    model = Net()
    optimizer = wrapped(model, GrokfastConfig(alpha=0.5), clip=0.5)
    gradients = series(model, 3)
    train(model, optimizer, gradients[:2])
    before = [layer.codes.clone() for layer in (model.first, model.second, model.tied)]
    optimizer.measure = True
    train(model, optimizer, gradients[2:])
    after = [layer.codes for layer in (model.first, model.second, model.tied)]
    flips = sum((a != b).sum().item() for a, b in zip(after, before, strict=True))
    assert optimizer.report.flip_share.item() == pytest.approx(flips / sum(b.numel() for b in before))
    assert flips
    slow = (
        torch.cat([optimizer.state[p]["slow_gradient"].double().flatten() for p in model.parameters()])
        .norm()
        .item()
    )
    clipped = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grokfast.clip(gradients[2], 0.5)[0]))
    assert optimizer.report.slow_ratio.item() == pytest.approx(slow / clipped, rel=1e-5)
    assert taken == [False, True, True]


def test_a_scheduler_on_the_wrapped_optimizer_reaches_the_kernel_and_does_not_warn(taken):
    model = nn.Linear(3, 3)
    inner = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5), weight_decay=0.0, fused=True)
    optimizer = BitNetOptimizer(inner, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.0 if step else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        schedule.step()
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, before)  # the rate is 0
    assert taken == [False, True, True]


def test_a_backward_through_old_values_is_refused():
    model = nn.Linear(4, 4)
    optimizer = BitNetOptimizer(torch.optim.AdamW(model.parameters()), model)
    for _ in range(2):
        loss = model(model(torch.randn(2, 4))).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_pair_of_optimizers_is_split(taken):
    """SGD by itself, AdamW by the kernel; one norm and one filter for both."""
    torch.manual_seed(0)
    model = nn.Sequential(BitLinear(8, 8, bias=False), BitLinear(8, 8, bias=False))
    weights = [p.detach().double().numpy().copy() for p in model.parameters()]
    inner = [
        torch.optim.SGD(model[0].parameters(), 0.1),
        torch.optim.AdamW(model[1].parameters(), 0.01, betas=(0.9, 0.98), weight_decay=0.1),
    ]
    optimizer = BitNetOptimizer(
        inner, model, gradient_filter=GradientFilter(GrokfastConfig()), max_grad_norm=0.5
    )
    gradients = series(model, 5)
    train(model, optimizer, gradients)
    clipped = [grokfast.clip(own, 0.5)[0] for own in gradients]
    sgd = weights[0] - 0.1 * sum(grokfast.ema([own[0] for own in clipped], 0.98, 2.0))
    *_, adam = grokfast.adamw(
        grokfast.ema([own[1] for own in clipped], 0.98, 2.0), weights[1], 0.01, (0.9, 0.98), 1e-8, 0.1
    )
    np.testing.assert_allclose(model[0].weight.detach().numpy(), sgd, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[1].weight.detach().numpy(), adam, rtol=1e-5, atol=1e-6)
    for layer in model:
        assert torch.equal(layer.codes, quantize_weight(layer.weight)[0])
    assert sum(taken) == 4


def test_eight_bit_state_of_a_library_goes_the_general_path():
    optim = pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    model = nn.Sequential(BitLinear(128, 128), nn.ReLU(), BitLinear(128, 64))
    inner = optim.AdamW8bit(model.parameters(), lr=1e-2)
    optimizer = BitNetOptimizer(
        inner,
        model,
        gradient_filter=GradientFilter(GrokfastConfig(lambda_reg=0.5)),
        max_grad_norm=1.0,
    )
    x, y = torch.randn(64, 128), torch.randn(64, 64)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert torch.equal(model[0].codes, quantize_weight(model[0].weight)[0])
    assert losses[-1] < losses[0]
    kind = type(inner.state[model[0].weight]["exp_avg"])
    assert "8bit" in kind.__name__
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert type(inner.state[model[0].weight]["exp_avg"]) is kind
