import numpy as np
import pytest
import torch
from torch import nn

from oracles import grokfast
from phase5_training.events import CallbackRegistry, Event
from phase5_training.phases import PhaseSchedule
from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
from phase5_training.pipeline.grokfast_trainer import GradientFilter, GrokfastConfig, GrokfastTrainer


def gradients(steps=12, shape=(3, 4), seed=0):
    return np.random.default_rng(seed).normal(size=(steps, *shape)).astype(np.float32)


def run_filter(config, series, schedule=None):
    """Feed a series of gradients to one parameter; the optimizer's state is a plain dict."""
    parameter = nn.Parameter(torch.zeros(series[0].shape))
    state = {parameter: {}}
    subject = GradientFilter(config, schedule)
    for step, g in enumerate(series):
        parameter.grad = torch.tensor(g)
        subject.filter_([parameter], state, step)
        subject.store_(state.__getitem__)
        yield parameter.grad.numpy()


CASES = [
    ("ema", GrokfastConfig(alpha=0.9, lambda_reg=3.0), lambda s: grokfast.ema(s, 0.9, 3.0)),
    ("high_pass", GrokfastConfig(filter="high_pass"), lambda s: grokfast.high_pass(s, 0.98, 2.0)),
    ("ma", GrokfastConfig(filter="ma", window=5, lambda_reg=5.0), lambda s: grokfast.ma(s, 5, 5.0)),
]


@pytest.mark.parametrize(("config", "oracle"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_filters_follow_the_published_loops(config, oracle):
    series = gradients()
    for found, expected in zip(run_filter(config, series), oracle(series), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_ademamix_follows_the_published_algorithm(make, hosted):
    series, start = gradients(steps=20), gradients(steps=1, seed=1)[0]
    # Adam's own decay enters the gradient, which is another algorithm: none there.
    decay = 0.1 if make is torch.optim.AdamW else 0.0
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = torch.tensor(start)
    inner = make(layer.parameters(), lr=0.05, betas=(0.9, 0.98), weight_decay=decay)
    config = GrokfastConfig(filter="ademamix", alpha=0.99, lambda_reg=3.0)
    subject = GradientFilter(config)
    optimizer = BitNetOptimizer(inner, layer, gradient_filter=subject) if hosted else inner
    expected = grokfast.ademamix(series, start, 0.05, (0.9, 0.98, 0.99), 1e-8, decay, 3.0)
    for step, (g, want) in enumerate(zip(series, expected, strict=True)):
        layer.weight.grad = torch.tensor(g)
        if not hosted:
            subject.filter_([layer.weight], optimizer.state, step, divides=True)
        optimizer.step()
        if not hosted:
            subject.store_(optimizer.state.__getitem__)
            subject.add_slow_(optimizer, [layer.weight], step)
        np.testing.assert_allclose(layer.weight.detach().numpy(), want, rtol=1e-4, atol=1e-5)


def test_ademamix_maximizes_as_its_optimizer_does():
    moved = []
    for sign in (1.0, -1.0):
        p = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0, maximize=sign < 0, amsgrad=True)
        subject = GradientFilter(GrokfastConfig(filter="ademamix", lambda_reg=5.0))
        for step, size in enumerate((1.0, 0.1, 0.2)):
            p.grad = torch.full((3,), sign * size)
            subject.filter_([p], optimizer.state, step, divides=True)
            optimizer.step()
            subject.store_(optimizer.state.__getitem__)
            subject.add_slow_(optimizer, [p], step)
        moved.append(p.detach())
    assert torch.equal(*moved)
    assert (moved[0] < 1).all()


def test_ademamix_of_a_bf16_model_is_finite():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = BitNetOptimizer(
        torch.optim.AdamW([p], betas=(0.9, 0.999), weight_decay=0.0, lr=0.125),
        nn.Identity(),
        gradient_filter=GradientFilter(GrokfastConfig(filter="ademamix")),
    )
    p.grad = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.bfloat16)
    optimizer.step()
    assert p.isfinite().all()
    # AdamW's first step is lr, the slow part lr * 2 * 0.02.
    np.testing.assert_allclose(p.detach().float().numpy(), [1, 1, 0.87, 0.87], atol=4e-3)


def test_ademamix_without_a_second_moment_adds_to_the_gradient():
    series = gradients()
    config = GrokfastConfig(filter="ademamix", alpha=0.9, lambda_reg=2.0)
    slow = 0.0
    for g, found in zip(series, run_filter(config, series), strict=True):
        slow = 0.9 * slow + 0.1 * g.astype(np.float64)
        np.testing.assert_allclose(found, g + 2.0 * slow, rtol=2e-5, atol=1e-5)


def test_auto_amplifies_by_the_evidence():
    series = gradients()
    config = GrokfastConfig(filter="auto", alpha=0.9, lambda_reg=2.0)
    for e in (0.0, 0.25, 1.0):
        parameter = nn.Parameter(torch.zeros(3, 4))
        state, subject = {parameter: {}}, GradientFilter(config)
        subject.lag.evidence = e
        for step, (g, want) in enumerate(zip(series, grokfast.ema(series, 0.9, 2.0 * e), strict=True)):
            parameter.grad = torch.tensor(g)
            subject.filter_([parameter], state, step)
            subject.store_(state.__getitem__)
            np.testing.assert_allclose(parameter.grad.numpy(), want, rtol=2e-5, atol=1e-5)


def test_auto_watches_a_loop_and_its_evidence_survives_a_checkpoint():
    layer = nn.Linear(2, 2)
    optimizer = BitNetOptimizer(
        torch.optim.SGD(layer.parameters(), 0.1),
        layer,
        gradient_filter=GradientFilter(GrokfastConfig(filter="auto")),
    )
    callbacks = CallbackRegistry()
    optimizer.gradient_filter.watch(callbacks)
    callbacks.fire(Event.LOG, 1, {"loss": 4.0, "accuracy": 0.9})
    callbacks.fire(Event.EVAL_END, 1, {"loss": 9.0, "accuracy": 0.1})
    assert optimizer.gradient_filter.gain(0) == 2.0
    again = BitNetOptimizer(
        torch.optim.SGD(layer.parameters(), 0.1),
        layer,
        gradient_filter=GradientFilter(GrokfastConfig(filter="auto")),
    )
    assert again.gradient_filter.gain(0) == 0.0
    again.load_state_dict(optimizer.state_dict())
    assert again.gradient_filter.gain(0) == 2.0


@pytest.mark.parametrize("name", ["ema", "ma"])
def test_unit_gain_passes_a_constant_gradient(name):
    series = np.ones((8, 2), dtype=np.float32)
    config = GrokfastConfig(filter=name, window=1, unit_gain=True, lambda_reg=4.0)
    for found in run_filter(config, series):
        np.testing.assert_allclose(found, 1.0, rtol=1e-6)


def test_gain_warms_up_and_follows_the_phase():
    schedule = PhaseSchedule(total_steps=40, warmup_steps=10, acceleration_steps=10, consolidation_steps=10)
    config = GrokfastConfig(lambda_reg=2.0, gain_warmup_steps=4, phase_gains={"consolidation": 0.25})
    subject = GradientFilter(config, schedule)
    assert [subject.gain(t) for t in (0, 1, 3, 9, 15, 25, 35)] == [0.5, 1.0, 2.0, 2.0, 2.0, 0.5, 2.0]


def test_first_average_waits_for_the_optimizer_to_make_its_state():
    # AdamW initializes only parameters without state; storing first would break its step.
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    trainer = GrokfastTrainer(layer, optimizer, GrokfastConfig())
    batch = {"input": torch.randn(5, 3), "target": torch.randn(5, 2)}
    for _ in range(3):
        trainer.train_step(batch, nn.functional.mse_loss)
    assert set(optimizer.state[layer.weight]) == {"step", "exp_avg", "exp_avg_sq", "slow_gradient"}


def test_trainer_reports_the_document_keys_and_moves_through_the_phases():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    schedule = PhaseSchedule(total_steps=8, warmup_steps=2, acceleration_steps=2, consolidation_steps=2)
    trainer = GrokfastTrainer(model, torch.optim.SGD(model.parameters(), 0.05), GrokfastConfig(), schedule)
    batch = {"input": torch.randn(16, 3), "target": torch.ones(16, 1)}
    reports = [trainer.train_step(batch, nn.functional.mse_loss) for _ in range(8)]
    phases = ["warmup"] * 2 + ["acceleration"] * 2 + ["consolidation"] * 2 + ["refinement"] * 2
    assert [r["phase"] for r in reports] == phases
    assert [r["multiplier"] for r in reports] == [1, 1, 5, 5, 0.2, 0.2, 1, 1]
    assert reports[-1]["loss"] < reports[0]["loss"]


def test_by_hand_equals_filter_then_sgd():
    torch.manual_seed(1)
    model = nn.Linear(4, 2, bias=False)
    weight = model.weight.detach().double().numpy().copy()
    trainer = GrokfastTrainer(
        model, torch.optim.SGD(model.parameters(), 0.1), GrokfastConfig(alpha=0.8, lambda_reg=1.5)
    )
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    average = None
    for _ in range(5):
        trainer.train_step({"input": x, "target": y}, nn.functional.mse_loss)
        residual = x.double().numpy() @ weight.T - y.double().numpy()
        g = 2 * residual.T @ x.double().numpy() / residual.size
        average = g if average is None else average
        average = 0.8 * average + 0.2 * g
        weight -= 0.1 * (g + 1.5 * average)
    np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.0}, r"not in \[0, 1\)"),
        ({"lambda_reg": -1.0}, "negative"),
        ({"filter": "emma"}, "did you mean 'ema'"),
        ({"window": 0}, "at least 1"),
        ({"phase_gains": {"cooldown": 1.0}}, "the phases are warmup"),
        ({"filter": "ademamix", "unit_gain": True}, "no gain to divide by"),
    ],
)
def test_bad_figures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GrokfastConfig(**options)
