"""Every loss against the formulas in oracles/losses.py; the registry's roll call."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oracles import losses as oracle
from phase4_bitnet.layers import BitLinear
from phase5_training.errors import UsageError
from phase5_training.loss_registry import (
    LOSSES,
    MultiTaskLoss,
    build_loss,
    infer_loss_name,
    infer_task_losses,
)
from phase5_training.outputs import count_units, unwrap_outputs
from phase5_training.pipeline.loss_functions import (
    bitnet_classification_loss,
    cross_entropy,
    grokfast_distillation_loss,
    huber_loss,
    mae_loss,
    mse_loss,
    next_token_loss,
    quantization_penalty,
)


def randn(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(*shape: int, classes: int = 5, ignored: bool = False) -> torch.Tensor:
    y = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(7))
    if ignored:
        y.view(-1)[::3] = -100
    return y


def ternary_model(bits: float = 1.58) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        BitLinear(6, 4, weight_bits=bits), nn.Linear(4, 4), BitLinear(4, 5, weight_bits=bits)
    )


def triples(model: nn.Module) -> list:
    return [
        (m.weight.detach().numpy(), m.codes.numpy(), float(m.scale))
        for m in model
        if isinstance(m, BitLinear)
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(6,), (3, 4)])
@pytest.mark.parametrize("ignored", [False, True])
def test_cross_entropy(shape: tuple[int, ...], ignored: bool, smoothing: float) -> None:
    logits, y = randn(*shape, 5), labels(*shape, ignored=ignored)
    want = oracle.cross_entropy(logits.numpy(), y.numpy(), smoothing)
    assert float(cross_entropy(logits, y, smoothing)) == pytest.approx(want, rel=1e-12)


def test_cross_entropy_of_nothing_is_zero_with_zero_gradient() -> None:
    logits = randn(2, 3, 5).requires_grad_()
    loss = cross_entropy(logits, torch.full((2, 3), -100))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99), st.floats(-500, 500))
def test_cross_entropy_is_shift_invariant_and_not_negative(n: int, t: int, seed: int, shift: float) -> None:
    logits, y = randn(n, t, 5, seed=seed), labels(n, t)
    base = float(cross_entropy(logits, y))
    assert base >= 0
    assert float(cross_entropy(logits + shift, y)) == pytest.approx(base, rel=1e-9, abs=1e-9)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, y = randn(64, 50, 5).bfloat16(), labels(64, 50)
    loss = next_token_loss(logits, y)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(oracle.cross_entropy(logits.double().numpy(), y.numpy()), rel=1e-5)


@pytest.mark.parametrize("bits", [1.58, 1])
def test_penalty_is_the_distance_to_the_codes(bits: float) -> None:
    model = ternary_model(bits)
    want = oracle.quantization_penalty(triples(model))
    assert want > 0.01
    assert float(quantization_penalty(model).detach()) == pytest.approx(want, rel=1e-5)


def test_penalty_gradient_treats_codes_and_scale_as_constants() -> None:
    model = ternary_model()
    quantization_penalty(model).backward()
    for weight, codes, scale in triples(model):
        want = 2 * (weight / scale - codes) / scale / weight.size
        layer = next(
            m for m in model if getattr(m, "weight", None) is not None and m.weight.shape == weight.shape
        )
        np.testing.assert_allclose(layer.weight.grad.numpy(), want, rtol=1e-4, atol=1e-7)
    assert model[1].weight.grad is None


def test_penalty_follows_an_optimizer_that_does_not_requantize() -> None:
    model = ternary_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    fresh = [m.current_codes() for m in model if isinstance(m, BitLinear)]
    layers = [
        (m.weight.detach().numpy(), codes.numpy(), float(scale))
        for m, (codes, scale) in zip((model[0], model[2]), fresh, strict=True)
    ]
    got = float(quantization_penalty(model).detach())
    assert got == pytest.approx(oracle.quantization_penalty(layers), rel=1e-5)


def test_penalty_of_a_zero_layer_and_of_no_layer() -> None:
    layer = BitLinear(3, 2)
    nn.init.zeros_(layer.weight)
    layer.requantize_()
    assert float(quantization_penalty(layer).detach()) == 0.0
    assert float(quantization_penalty(nn.Linear(3, 2))) == 0.0


@pytest.mark.parametrize("penalty", [0.0, 0.01, 0.5])
def test_classification_adds_the_weighted_penalty(penalty: float) -> None:
    model, logits, y = ternary_model(), randn(6, 5), labels(6)
    want = oracle.cross_entropy(logits.numpy(), y.numpy()) + penalty * oracle.quantization_penalty(
        triples(model)
    )
    got = bitnet_classification_loss(logits, y, model, penalty=penalty)
    assert float(got.detach()) == pytest.approx(want, rel=1e-6)


def test_classification_default_penalty_is_one_hundredth() -> None:
    model, logits, y = ternary_model(), randn(6, 5), labels(6)
    want = oracle.cross_entropy(logits.numpy(), y.numpy()) + 0.01 * oracle.quantization_penalty(
        triples(model)
    )
    for got in (
        bitnet_classification_loss(logits, y, model),
        build_loss("classification", model=model)(logits, {"target": y}),
        build_loss(bitnet_classification_loss, model=model)(logits, {"target": y}),
    ):
        assert float(got.detach()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("temperature", "alpha"), [(2.0, 0.3), (1.0, 1.0), (5.0, 0.0)])
@pytest.mark.parametrize("shape", [(6,), (3, 4)])
@pytest.mark.parametrize("ignored", [False, True])
def test_distillation(shape, ignored: bool, temperature: float, alpha: float) -> None:
    student, teacher, y = randn(*shape, 5), randn(*shape, 5, seed=1), labels(*shape, ignored=ignored)
    want = oracle.distillation(student.numpy(), teacher.numpy(), y.numpy(), temperature, alpha)
    got = grokfast_distillation_loss(student, teacher, y, temperature, alpha)
    assert float(got) == pytest.approx(want, rel=1e-10)


def test_distillation_defaults_and_torch_batchmean() -> None:
    student, teacher, y = randn(6, 5), randn(6, 5, seed=1), labels(6)
    kl = nn.functional.kl_div(
        torch.log_softmax(student / 2, -1), torch.softmax(teacher / 2, -1), reduction="batchmean"
    )
    want = 0.7 * nn.functional.cross_entropy(student, y) + 0.3 * 4 * kl
    assert float(grokfast_distillation_loss(student, teacher, y)) == pytest.approx(float(want), rel=1e-10)


def test_distillation_gradient_stays_with_the_student() -> None:
    student, teacher = randn(4, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    y = labels(4)
    grokfast_distillation_loss(student, teacher, y).backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s: grokfast_distillation_loss(s, teacher, y), (student,))


@pytest.mark.parametrize(
    ("kind", "fn"),
    [("mse", mse_loss), ("mae", mae_loss), ("huber", functools.partial(huber_loss, delta=0.7))],
)
@pytest.mark.parametrize("shapes", [((6,), (6,)), ((6, 1), (6,)), ((6,), (6, 1)), ((3, 4), (3, 4))])
def test_regression_losses(kind: str, fn, shapes) -> None:
    outputs, targets = randn(*shapes[0]), randn(*shapes[1], seed=2)
    want = oracle.regression(kind, outputs.numpy(), targets.numpy(), delta=0.7)
    assert float(fn(outputs, targets)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mse_loss(randn(6, 2), randn(6)), r"shape \(6, 2\) do not go with float targets"),
        (lambda: mse_loss(randn(6), randn(3)), r"shape \(6,\)"),
        (lambda: cross_entropy(randn(6, 5), labels(5)), "wanted logits"),
        (lambda: cross_entropy(randn(6, 5), randn(6)), "wants integer classes"),
        (lambda: next_token_loss(randn(6, 5), labels(6)), r"wanted \(batch, time, vocabulary\)"),
        (lambda: grokfast_distillation_loss(randn(6, 5), randn(6, 4), labels(6)), "same classes"),
    ],
)
def test_shapes_that_do_not_go_together(call, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call()


# The roll call: name, outputs, targets, the value by the oracle, the units. A new loss is a new row.
N, T = 6, 4
ROLL = {
    "classification": (randn(N, 5), labels(N, ignored=True), oracle.cross_entropy, 4),
    "cross_entropy": (randn(N, T, 5), labels(N, T, ignored=True), oracle.cross_entropy, 16),
    "next_token": (randn(N, T, 5), labels(N, T, ignored=True), oracle.cross_entropy, 16),
    "mse": (randn(N, 2), randn(N, 2, seed=1), functools.partial(oracle.regression, "mse"), N),
    "mae": (randn(N, 2), randn(N, 2, seed=1), functools.partial(oracle.regression, "mae"), N),
    "huber": (randn(N, 2), randn(N, 2, seed=1), functools.partial(oracle.regression, "huber"), N),
}


def test_the_roll_is_complete() -> None:
    assert set(ROLL) | {"distillation", "multi_task"} == set(LOSSES)


@pytest.mark.parametrize("name", ROLL)
def test_every_named_loss(name: str) -> None:
    outputs, targets, value, units = ROLL[name]
    loss = build_loss(name, model=nn.Linear(1, 1))
    batch = {"input": None, "target": targets}
    assert loss.name == name
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert float(loss(outputs, batch)) == pytest.approx(value(outputs.numpy(), targets.numpy()), rel=1e-6)
    assert int(loss.units(batch)) == units


@pytest.mark.parametrize("name", ROLL)
def test_units_weight_micro_batches_exactly(name: str) -> None:
    outputs, targets, _, _ = ROLL[name]
    loss = build_loss(name)
    whole = loss(outputs, {"target": targets})
    parts = [{"target": targets[:1]}, {"target": targets[1:]}]
    units = [loss.units(part) for part in parts]
    sum_ = loss(outputs[:1], parts[0]) * units[0] + loss(outputs[1:], parts[1]) * units[1]
    assert float(sum_ / (units[0] + units[1])) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("next_token", {}, True),
        ("cross_entropy", {}, True),
        ("cross_entropy", {"label_smoothing": 0.1}, False),
        ("classification", {"model": ternary_model()}, False),
        ("classification", {"model": ternary_model(), "penalty": 0.0}, True),
        ("mse", {}, False),
    ],
)
def test_is_nll_only_for_the_plain_likelihood(name: str, options: dict, want: bool) -> None:
    assert build_loss(name, **options).is_nll is want


def test_options_reach_the_loss() -> None:
    logits, y = randn(N, 5), labels(N)
    smooth = build_loss("classification", label_smoothing=0.2)(logits, {"target": y})
    assert float(smooth) == pytest.approx(oracle.cross_entropy(logits.numpy(), y.numpy(), 0.2), rel=1e-10)
    huber = build_loss("huber", huber_delta=0.3)(randn(N), {"target": randn(N, seed=1)})
    want = oracle.regression("huber", randn(N).numpy(), randn(N, seed=1).numpy(), 0.3)
    assert float(huber) == pytest.approx(want, rel=1e-10)


def test_distillation_calls_a_frozen_teacher() -> None:
    torch.manual_seed(0)
    student = nn.Linear(3, 5).double()
    teacher = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5)).double()
    loss = build_loss("distillation", model=student, teacher=teacher, temperature=3.0, alpha=0.6)
    x, y = randn(N, 3), labels(N)
    value = loss(student(x), {"input": x, "target": y})
    want = oracle.distillation(
        student(x).detach().numpy(), teacher[0](x).detach().numpy(), y.numpy(), 3.0, 0.6
    )
    assert float(value.detach()) == pytest.approx(want, rel=1e-10)
    value.backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert list(loss.parameters()) == []
    assert loss.to("meta") is loss
    assert teacher[0].weight.is_meta


def test_our_own_functions_mean_their_names() -> None:
    teacher = nn.Linear(3, 5)
    assert build_loss(grokfast_distillation_loss, teacher=teacher).teacher is teacher
    assert [build_loss(fn).name for fn in (bitnet_classification_loss, next_token_loss)] == [
        "classification",
        "next_token",
    ]


def test_a_builtin_without_a_signature_takes_two_arguments() -> None:
    a, b = randn(4), randn(4, seed=1)
    want = np.linalg.norm((a - b).numpy())
    assert float(build_loss(torch.dist)(a, {"target": b})) == pytest.approx(want)


def test_the_model_cannot_teach_itself() -> None:
    model = nn.Linear(3, 5)
    with pytest.raises(UsageError, match="deepcopy"):
        build_loss("distillation", model=model, teacher=model)
    assert model.weight.requires_grad


def multi_batch() -> tuple[dict, dict]:
    outputs = {"digit": randn(N, 5), "angle": randn(N, 2)}
    return outputs, {"target": {"digit": labels(N), "angle": randn(N, 2, seed=1)}}


def test_multi_task_weighting_is_kendalls() -> None:
    outputs, batch = multi_batch()
    loss = build_loss("multi_task", tasks={"digit": "classification", "angle": "mse"})
    (s,) = loss.parameters()
    each = [
        oracle.cross_entropy(outputs["digit"].numpy(), batch["target"]["digit"].numpy()),
        oracle.regression("mse", outputs["angle"].numpy(), batch["target"]["angle"].numpy()),
    ]
    for sigmas in ([1.0, 1.0], [0.5, 3.0]):
        s.data.copy_(2 * torch.tensor(sigmas).log())
        want = oracle.kendall(each, sigmas, [False, True])
        assert float(loss(outputs, batch).detach()) == pytest.approx(want, rel=1e-5)
    assert loss.units(batch) == N
    tasks = loss.module.task_losses(outputs, batch)
    assert [float(v) for v in tasks.values()] == pytest.approx(each, rel=1e-6)


def test_multi_task_learns_its_weights() -> None:
    outputs, batch = multi_batch()
    loss = build_loss("multi_task", tasks={"digit": "cross_entropy", "angle": "mse"})
    (s,) = loss.parameters()
    optimizer = torch.optim.SGD([s], lr=0.2)
    for _ in range(400):
        optimizer.zero_grad()
        loss(outputs, batch).backward()
        optimizer.step()
    # The minimum over s: exp(s) = 2 c L.
    tasks = loss.module.task_losses(outputs, batch)
    want = [2 * float(tasks["digit"]), float(tasks["angle"])]
    assert s.detach().exp().tolist() == pytest.approx(want, rel=1e-3)
    other = build_loss("multi_task", tasks={"digit": "cross_entropy", "angle": "mse"})
    other.load_state_dict(loss.state_dict())
    assert torch.equal(next(iter(other.parameters())), s)


@pytest.mark.parametrize(
    "call",
    [
        lambda loss, outputs, batch: loss({"digit": outputs["digit"]}, batch),
        lambda loss, outputs, batch: loss(outputs, {"target": {"digit": batch["target"]["digit"]}}),
        lambda loss, outputs, batch: loss(outputs["digit"], batch),
    ],
)
def test_multi_task_names_what_is_missing(call) -> None:
    outputs, batch = multi_batch()
    with pytest.raises(UsageError, match="angle"):
        call(build_loss("multi_task", tasks={"digit": "cross_entropy", "angle": "mse"}), outputs, batch)


def test_a_multi_task_module_of_the_users_own() -> None:
    module = MultiTaskLoss({"digit": build_loss("cross_entropy"), "angle": "huber"})
    loss = build_loss(module)
    assert list(loss.parameters()) == [module.log_variances]
    assert module.factors.tolist() == [1.0, 0.5]


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, outputs, targets):
        return self.gain * (outputs - targets).square().mean()


def test_callables_of_two_and_three_arguments() -> None:
    model = nn.Linear(1, 1)
    outputs, batch = randn(N), {"target": randn(N, seed=1)}
    mse = oracle.regression("mse", outputs.numpy(), batch["target"].numpy())
    seen = []

    def three(outputs, targets, model):
        seen.append(model)
        return mse_loss(outputs, targets)

    def optional(outputs, targets, model=None, gain=3.0):
        seen.append(model)
        return gain * mse_loss(outputs, targets)

    def weight(outputs, targets, weight=None):
        assert weight is None
        return mse_loss(outputs, targets)

    for fn, factor in (
        (three, 1),
        (optional, 3),
        (weight, 1),
        (nn.functional.mse_loss, 1),
        (nn.MSELoss(), 1),
        (lambda *args: mse_loss(*args), 1),
        (functools.partial(three, model=model), 1),
    ):
        loss = build_loss(fn, model=model)
        assert float(loss(outputs, batch)) == pytest.approx(factor * mse, rel=1e-6)
        assert loss.units(batch) == N
    assert seen == [model] * 3
    module = Squared()
    loss = build_loss(module)
    assert list(loss.parameters()) == [module.gain]
    assert float(loss(outputs, batch).detach()) == pytest.approx(2 * mse, rel=1e-6)
    assert loss.name == "Squared"
    assert build_loss(loss) is loss


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_loss("clasification"), "did you mean 'classification'"),
        (lambda: build_loss("zzz"), "choose one of classification"),
        (lambda: build_loss(3), "give one of classification"),
        (lambda: build_loss(None, task="regresion"), "did you mean 'regression'"),
        (lambda: build_loss(lambda outputs: 0), "wanted fn"),
        (lambda: build_loss(lambda outputs, targets, weights: 0), "wanted fn"),
        (lambda: build_loss(lambda outputs, targets, *, model: 0), "wanted fn"),
        (lambda: build_loss("distillation"), "needs a teacher"),
        (lambda: build_loss("multi_task"), "needs tasks"),
        (lambda: MultiTaskLoss({}), "no losses"),
        (lambda: build_loss("mse", penalty=-1.0), "penalty=-1.0"),
        (lambda: build_loss("mse", label_smoothing=1.5), "at most 1"),
        (lambda: build_loss("mse", temperature=0.0), "above 0"),
        (lambda: build_loss("mse", alpha=float("nan")), "alpha=nan"),
        (lambda: build_loss("mse").load_state_dict({"s": 1}), "learns nothing"),
        (lambda: build_loss("mse")(randn(3), {"input": 1}), "no 'target'"),
        (lambda: build_loss("mse")({"a": randn(3), "b": randn(3)}, {"target": randn(3)}), "multi_task"),
        (lambda: build_loss("mse")(randn(3), {"target": {"a": randn(3)}}), "multi_task"),
        (lambda: build_loss(lambda o, t: o - t)(randn(3), {"target": randn(3)}), "wanted a 0-dim"),
        (lambda: build_loss(lambda o, t: 1.0)(randn(3), {"target": randn(3)}), "float; wanted a 0-dim"),
        (lambda: infer_loss_name(SimpleNamespace(target_kind="graph")), "target_kind='graph'"),
    ],
)
def test_bad_use_is_refused_in_one_line(call, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("class", "classification"),
        ("float", "mse"),
        ("tokens", "next_token"),
        (None, "next_token"),
        ("multi", "multi_task"),
    ],
)
def test_loss_from_the_data(kind: str | None, want: str) -> None:
    assert infer_loss_name(SimpleNamespace(target_kind=kind)) == want


@pytest.mark.parametrize(
    ("task", "want"),
    [("classification", "classification"), ("regression", "mse"), ("next_token", "next_token")],
)
def test_loss_from_the_task(task: str, want: str) -> None:
    assert build_loss(task=task).name == want


def test_task_losses_from_a_batch() -> None:
    _, batch = multi_batch()
    assert infer_task_losses(batch["target"]) == {"digit": "classification", "angle": "mse"}


def test_outputs_are_unwrapped() -> None:
    x, other = randn(2, 3), randn(1)
    for wrapped in (
        x,
        SimpleNamespace(logits=x),
        {"logits": x, "past": other},
        {"out": x},
        (x, other),
        [x],
    ):
        assert unwrap_outputs(wrapped) is x
        assert build_loss(mse_loss)(wrapped, {"target": x}) == 0
    both = {"a": x, "b": other}
    assert unwrap_outputs(both) is both
    one = {"logits": x}
    assert unwrap_outputs(one, {"logits": x}) is one
    loss = build_loss("multi_task", tasks={"angle": "mse"})
    assert float(loss({"angle": x}, {"target": {"angle": x}}).detach()) == 0


def test_units_are_counted_from_targets() -> None:
    assert count_units(randn(4, 3)) == 4
    assert count_units({"a": labels(5), "b": randn(5)}) == 5
    assert int(count_units(torch.tensor([[1, -100], [-100, -100]]))) == 1
