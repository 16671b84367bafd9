import numpy as np
import pytest
import torch
from torch import nn

from oracles import grokfast
from phase5_training.events import CallbackRegistry, Event
from phase5_training.phases import PhaseSchedule, build_schedule
from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
from phase5_training.pipeline.grokfast_trainer import GradientFilter, GrokfastConfig, GrokfastTrainer


def gradients(steps=12, shape=(3, 4), seed=0):
    return np.random.default_rng(seed).normal(size=(steps, *shape)).astype(np.float32)


def run_filter(config, series, make=torch.optim.SGD, evidence=0.0):
    """Feed a series of gradients to one parameter of an optimizer that does not step."""
    parameter = nn.Parameter(torch.zeros(series[0].shape))
    optimizer, subject = make([parameter], lr=0.1), GradientFilter(config)
    subject.lag.evidence = evidence
    for step, g in enumerate(series):
        parameter.grad = torch.tensor(g)
        subject.before_step(optimizer, [parameter], step)
        subject.after_step(optimizer, [parameter], step)
        yield parameter.grad.numpy().copy()


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
            subject.before_step(optimizer, [layer.weight], step)
        optimizer.step()
        if not hosted:
            subject.after_step(optimizer, [layer.weight], step)
        np.testing.assert_allclose(layer.weight.detach().numpy(), want, rtol=1e-4, atol=1e-5)


def test_ademamix_maximizes_as_its_optimizer_does():
    moved = []
    for sign in (1.0, -1.0):
        p = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0, maximize=sign < 0, amsgrad=True)
        subject = GradientFilter(GrokfastConfig(filter="ademamix", lambda_reg=5.0))
        for step, size in enumerate((1.0, 0.1, 0.2)):
            p.grad = torch.full((3,), sign * size)
            subject.before_step(optimizer, [p], step)
            optimizer.step()
            subject.after_step(optimizer, [p], step)
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


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.Muon])
def test_auto_amplifies_by_the_evidence(make):
    series = gradients()
    config = GrokfastConfig(filter="auto", alpha=0.9, lambda_reg=2.0)
    for e in (0.0, 0.25, 1.0):
        expected = grokfast.ema(series, 0.9, 2.0 * e, average=0.0)
        for found, want in zip(run_filter(config, series, make, e), expected, strict=True):
            np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("momentum", "most"), [(0.0, 2.0), (0.9, 1.0), (0.95, 0.5)])
def test_auto_does_not_raise_the_rate_of_sgd(momentum, most):
    """(1 - momentum) / (1 - alpha) is the greatest gain, and it is divided by."""

    def make(params, lr):
        return torch.optim.SGD(params, lr, momentum=momentum)

    series = gradients()
    config = GrokfastConfig(filter="auto", alpha=0.9, lambda_reg=2.0)
    expected = grokfast.ema(series, 0.9, most, average=0.0)
    for found, want in zip(run_filter(config, series, make, 1.0), expected, strict=True):
        np.testing.assert_allclose(found, want / (1 + most), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.9, True), (0.95, True)]
)
def test_what_sgd_bears_it_bears_with_the_adaptive_filter(momentum, nesterov):
    """On curvatures up to the edge of SGD's own stability, at full evidence."""
    rate = 0.1
    curvatures = grokfast.stable_curvatures(momentum, rate, nesterov=nesterov)
    parameter = nn.Parameter(torch.ones(len(curvatures)))
    inner = torch.optim.SGD([parameter], rate, momentum=momentum, nesterov=nesterov)
    subject = GradientFilter(GrokfastConfig(filter="auto", alpha=0.95, lambda_reg=10.0))
    subject.lag.evidence = 1.0
    optimizer = BitNetOptimizer(inner, nn.Identity(), gradient_filter=subject)
    for _ in range(3000):
        parameter.grad = torch.tensor(curvatures, dtype=torch.float32) * parameter.detach()
        optimizer.step()
    assert parameter.abs().max() < 10
    assert parameter[1:].abs().max() < 0.9  # the flattest has hardly begun


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


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD])
def test_auto_rests_without_evidence_and_forgets_what_it_knew_before(make):
    """Steps at rest are those without a filter, to the bit; each time it wakes its average begins at 0."""
    evidence = [0, 0, 1, 1, 1, 0, 0, 0.5, 0.5]
    series = gradients(len(evidence), (4, 6))
    layer, twin = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    twin.load_state_dict(layer.state_dict())
    config = GrokfastConfig(filter="auto", alpha=0.75, lambda_reg=2.0)
    subject = GradientFilter(config)
    optimizer = BitNetOptimizer(make(layer.parameters(), lr=0.1), layer, gradient_filter=subject)
    other = make(twin.parameters(), lr=0.1)
    mu = np.zeros((4, 6))
    for g, share in zip(series, evidence, strict=True):
        subject.lag.evidence = share
        layer.weight.grad = torch.tensor(g)
        optimizer.step()
        if share:
            mu = 0.75 * mu + 0.25 * g
            g = (g + 2.0 * share * mu) / (1 + 2.0 * share if make is torch.optim.SGD else 1)
        else:
            mu = 0 * mu
        twin.weight.grad = torch.tensor(g, dtype=torch.float32)
        other.step()
        kept = optimizer.state.get(layer.weight, {}).get("slow_gradient")
        assert (kept is not None) == bool(share)
        if share:
            np.testing.assert_allclose(kept, mu, atol=1e-6)
        torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ema", "ma"])
def test_unit_gain_passes_a_constant_gradient(name):
    series = np.ones((8, 2), dtype=np.float32)
    config = GrokfastConfig(filter=name, window=1, unit_gain=True, lambda_reg=4.0)
    for found in run_filter(config, series):
        np.testing.assert_allclose(found, 1.0, rtol=1e-6)


def test_unit_gain_divides_by_nothing_before_the_window_is_full():
    """There is nothing added yet: divided, the first steps of a run would be too small by (1 + l)."""
    config = GrokfastConfig(filter="ma", window=3, unit_gain=True, lambda_reg=4.0)
    series = gradients()
    oracle = grokfast.ma(series, 3, 4.0)
    for step, (found, want) in enumerate(zip(run_filter(config, series), oracle, strict=True)):
        np.testing.assert_allclose(found, want / (1 if step < 2 else 5), rtol=2e-5, atol=1e-5)


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
        ({"lambda_reg": -1.0}, "grokfast_lambda=-1.0 is not a number of 0 or more"),
        ({"filter": "emma"}, "did you mean 'ema'"),
        ({"window": 0}, "at least 1"),
        ({"phase_gains": {"cooldown": 1.0}}, "the phases are warmup"),
        ({"filter": "ademamix", "unit_gain": True}, "no gain to divide by"),
        ({"alpha": float("nan")}, r"not in \[0, 1\)"),
        ({"lambda_reg": float("inf")}, "grokfast_lambda=inf is not a number of 0 or more"),
        ({"lambda_reg": float("nan")}, "grokfast_lambda=nan is not a number of 0 or more"),
        ({"phase_gains": {"warmup": -1.0}}, "warmup=-1.0; a factor on the gain is 0 or more"),
        ({"phase_gains": {"warmup": float("nan")}}, "warmup=nan; a factor on the gain is 0 or more"),
    ],
)
def test_bad_figures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GrokfastConfig(**options)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [(None, "there is no schedule"), ("cosine", "the schedule has no such phase")],
)
def test_gains_of_phases_that_never_come_are_refused(schedule, message):
    config = GrokfastConfig(phase_gains={"acceleration": 0.5})
    with pytest.raises(ValueError, match=f"phase_gains names acceleration, and {message}"):
        GradientFilter(config, build_schedule(schedule, 100) if schedule else None)


def test_a_trainer_without_validation_refuses_the_filter_that_goes_by_it():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with pytest.raises(ValueError, match="filter='auto' goes by validation"):
        GrokfastTrainer(layer, optimizer, GrokfastConfig(filter="auto"))


@pytest.mark.parametrize(
    ("saved", "now", "fits"),
    [
        ("ema", "ema", True),
        ("ema", "auto", True),
        ("auto", "high_pass", True),
        ("ma", "ma", True),
        ("ma", "ema", False),
        ("ema", "ma", False),
        ("ademamix", "ema", False),
    ],
)
def test_averages_of_another_filter_are_refused(saved, now, fits):
    """Taken over, the mean of a window would pass for an exponential average, and the reverse."""
    layer = nn.Linear(2, 2)

    def make(name, window=3):
        config = GrokfastConfig(filter=name, window=window)
        inner = torch.optim.AdamW(layer.parameters())
        return BitNetOptimizer(inner, layer, gradient_filter=GradientFilter(config))

    first = make(saved)
    layer(torch.ones(1, 2)).sum().backward()
    first.step()
    state = first.state_dict()
    if fits:
        make(now).load_state_dict(state)
    else:
        with pytest.raises(ValueError, match="go on with the filter that it was started with"):
            make(now).load_state_dict(state)
    if saved == now == "ma":
        with pytest.raises(ValueError, match="window=3 and this run filter='ma' with window=4"):
            make(now, window=4).load_state_dict(state)
    del state["filter"]["average"]  # as written before averages had a name
    make(saved).load_state_dict(state)
