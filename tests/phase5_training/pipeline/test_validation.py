"""Validation figures against numpy over the whole set at once; mode, sync and early stopping."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from oracles import losses as oracle
from phase5_training.errors import DataError, UsageError
from phase5_training.loss_registry import build_loss
from phase5_training.pipeline.validation import EarlyStopping, RealTimeValidator


class Echo(nn.Module):
    """Returns its input, so that a test states the outputs; records the mode it was called in."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Dropout(0.5)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled()))
        return x


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(outputs, targets, sizes: list[int]) -> list[dict]:
    def split(value):
        if isinstance(value, dict):
            parts = {k: split(v) for k, v in value.items()}
            return [{k: v[i] for k, v in parts.items()} for i in range(len(sizes))]
        return list(value.split(sizes))

    return [{"input": o, "target": t} for o, t in zip(split(outputs), split(targets), strict=True)]


def classes(*shape: int) -> Tensor:
    y = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(4))
    y.view(-1)[::4] = -100
    return y


@pytest.mark.parametrize("style", ["loss", "function"])
@pytest.mark.parametrize("sizes", [[10], [7, 3], [1, 8, 1]])
def test_classification_is_weighted_by_valid_samples(sizes: list[int], style: str) -> None:
    logits, y = randn(10, 5), classes(10)
    loss_fn = build_loss("cross_entropy") if style == "loss" else F.cross_entropy
    if style == "function" and 1 in sizes:
        y[0] = 2  # torch's own mean over no valid target is nan
    got = RealTimeValidator(Echo(), task="classification").run_validation(cut(logits, y, sizes), loss_fn)
    want = oracle.cross_entropy(logits.numpy(), y.numpy())
    valid = y.numpy() != -100
    hits = (logits.numpy().argmax(-1) == y.numpy())[valid].mean()
    assert got["loss"] == got["avg_loss"] == pytest.approx(want, rel=1e-12)
    assert got["accuracy"] == got["avg_accuracy"] == pytest.approx(hits, rel=1e-12)
    assert (got["samples"], got["units"]) == (10, int(valid.sum()))
    assert [got[k] for k in ("perplexity", "bits_per_byte", "mse", "mae", "r2")] == [None] * 5


@pytest.mark.parametrize("loss_fn", ["next_token", "smoothed"])
@pytest.mark.parametrize("bytes_per_token", [1.0, 3.5, None])
def test_token_figures(loss_fn: str, bytes_per_token: float | None) -> None:
    logits, y = randn(6, 4, 5), classes(6, 4)
    y[:2] = -100  # a batch of padding only
    nats = oracle.cross_entropy(logits.numpy(), y.numpy())
    smoothing = 0.0 if loss_fn == "next_token" else 0.3
    fn = build_loss("next_token") if not smoothing else build_loss("cross_entropy", label_smoothing=smoothing)
    validator = RealTimeValidator(Echo(), task="next_token", bytes_per_token=bytes_per_token)
    got = validator.run_validation(cut(logits, y, [2, 3, 1]), fn)
    assert got["loss"] == pytest.approx(oracle.cross_entropy(logits.numpy(), y.numpy(), smoothing), rel=1e-10)
    assert got["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    if bytes_per_token is None:
        assert got["bits_per_byte"] is None
    else:
        assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_per_token, rel=1e-5)
    assert got["units"] == int((y != -100).sum())
    assert got["samples"] == 6


def test_a_batch_of_padding_does_not_spoil_a_plain_function() -> None:
    logits, y = randn(4, 5), torch.tensor([-100, -100, 2, 3])
    got = RealTimeValidator(Echo()).run_validation(cut(logits, y, [2, 2]), F.cross_entropy)
    assert got["loss"] == pytest.approx(oracle.cross_entropy(logits.numpy(), y.numpy()))


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    logits = torch.zeros(1, 1, 2)
    logits[0, 0, 1] = 1000.0
    batch = {"input": logits, "target": torch.tensor([[0]])}
    got = RealTimeValidator(Echo(), task="next_token").run_validation([batch], build_loss("next_token"))
    assert got["loss"] == 1000.0
    assert got["perplexity"] == math.inf


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([0.0, 1e6]))
def test_regression_figures_do_not_depend_on_the_batches(sizes: list[int], width: int, offset: float) -> None:
    n = sum(sizes) + 2
    outputs, y = randn(n, width) + offset, randn(n, width, seed=1) + offset
    got = RealTimeValidator(Echo(), task="regression").run_validation(
        cut(outputs, y, [*sizes, 2]), build_loss("mse")
    )
    o, t = outputs.numpy(), y.numpy()
    assert [got["mse"], got["loss"]] == pytest.approx([oracle.regression("mse", o, t)] * 2, rel=1e-9)
    assert got["mae"] == pytest.approx(oracle.regression("mae", o, t), rel=1e-9)
    assert got["r2"] == pytest.approx(oracle.r2(o, t), rel=1e-6, abs=1e-6)
    assert got["accuracy"] is None
    assert got["samples"] == n


def test_r2_of_a_constant_target_is_none() -> None:
    batches = cut(randn(6), torch.full((6,), 0.1, dtype=torch.float64), [3, 3])
    got = RealTimeValidator(Echo(), task="regression").run_validation(batches, build_loss("mae"))
    assert got["r2"] is None
    assert got["mae"] == got["loss"]


def test_columns_beside_flat_targets() -> None:
    outputs, y = randn(6, 1), randn(6, seed=1)
    got = RealTimeValidator(Echo()).run_validation(cut(outputs, y, [4, 2]), build_loss("mse"))
    assert got["r2"] == pytest.approx(oracle.r2(outputs.numpy(), y.numpy()), rel=1e-9)
    assert got["mse"] == pytest.approx(got["loss"], rel=1e-12)


def test_multi_task_figures_for_each_task() -> None:
    outputs = {"digit": randn(9, 5), "color": randn(9, 3), "angle": randn(9, 2)}
    targets = {
        "digit": torch.randint(0, 5, (9,)),
        "color": torch.randint(0, 3, (9,)),
        "angle": randn(9, 2, seed=2),
    }
    loss = build_loss(
        "multi_task", tasks={"digit": "cross_entropy", "color": "cross_entropy", "angle": "mse"}
    )
    got = RealTimeValidator(Echo(), task="multi_task").run_validation(cut(outputs, targets, [5, 4]), loss)
    ce = [oracle.cross_entropy(outputs[k].numpy(), targets[k].numpy()) for k in ("digit", "color")]
    mse = oracle.regression("mse", outputs["angle"].numpy(), targets["angle"].numpy())
    assert got["loss"] == pytest.approx(oracle.kendall([*ce, mse], [1, 1, 1], [0, 0, 1]), rel=1e-5)
    hits = [(outputs[k].numpy().argmax(-1) == targets[k].numpy()).mean() for k in ("digit", "color")]
    assert [got["digit/accuracy"], got["color/accuracy"]] == pytest.approx(hits)
    assert got["accuracy"] == pytest.approx(np.mean(hits))
    assert got["angle/mse"] == pytest.approx(mse)
    assert got["angle/r2"] == pytest.approx(oracle.r2(outputs["angle"].numpy(), targets["angle"].numpy()))
    assert got["mse"] is None
    assert got["samples"] == 9


def test_wrapped_outputs_and_the_document_style_step() -> None:
    class Wrapped(Echo):
        def forward(self, x):
            return {"logits": x, "hidden": None}

    batch = {"input": randn(4, 5), "target": torch.tensor([0, 1, 2, 3])}
    validator = RealTimeValidator(Wrapped(), task="classification")
    step = validator.validate_step(batch, lambda outputs, targets: F.cross_entropy(outputs, targets))
    assert step == validator.run_validation([batch], build_loss("cross_entropy"))
    assert step["loss"] == pytest.approx(oracle.cross_entropy(batch["input"].numpy(), [0, 1, 2, 3]))


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_gets_its_own_mode_back(fails: bool) -> None:
    model = nn.Sequential(Echo(), nn.BatchNorm1d(5))
    model.train()
    model[1].eval()  # a frozen norm in a model in training
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.random.get_rng_state()

    def loss_fn(outputs, targets):
        if fails:
            raise RuntimeError("broken")
        return F.cross_entropy(outputs, targets)

    batch = {
        "input": torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),
        "target": torch.arange(4),
    }
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            RealTimeValidator(model).run_validation([batch], loss_fn)
    else:
        RealTimeValidator(model).run_validation([batch], loss_fn)
    assert model[0].calls == [(False, False)]
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert torch.is_grad_enabled()
    assert torch.equal(rng, torch.random.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_training_works_after_a_forward_that_caches_in_validation() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.table: Tensor | None = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(3.0).cos()
            return x * self.weight * self.table

    model = Caching()
    batch = {"input": torch.ones(2, 3), "target": torch.tensor([0, 1])}
    RealTimeValidator(model).run_validation([batch], F.cross_entropy)
    F.cross_entropy(model(batch["input"]), batch["target"]).backward()
    assert model.weight.grad is not None


def test_the_device_is_read_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, spy)
    batches = cut(randn(12, 4, 5), classes(12, 4), [4, 4, 4])
    RealTimeValidator(Echo(), task="next_token").run_validation(batches, build_loss("next_token"))
    assert reads == ["tolist"]


def test_max_batches_draws_no_more_than_it_uses() -> None:
    drawn = []

    def loader():
        for batch in cut(randn(6, 5), torch.arange(6) % 5, [2, 2, 2]):
            drawn.append(batch)
            yield batch

    got = RealTimeValidator(Echo(), max_batches=2).run_validation(loader(), F.cross_entropy)
    assert got["samples"] == 4
    assert len(drawn) == 2


def test_autocast_and_device() -> None:
    seen = []

    class Linear(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append((out.dtype, x.device.type))
            return out

    batch = {"input": torch.ones(2, 3), "target": torch.tensor([0, 1])}
    for use_amp, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        validator = RealTimeValidator(Linear(3, 2), device="cpu", use_amp=use_amp)
        validator.run_validation([batch], F.cross_entropy)
        assert seen[-1] == (dtype, "cpu")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RealTimeValidator(Echo(), task="clasification"), "did you mean 'classification'"),
        (lambda: RealTimeValidator(Echo(), max_batches=0), "max_batches=0"),
        (lambda: RealTimeValidator(Echo(), bytes_per_token=0.0), "bytes_per_token=0.0"),
        (lambda: RealTimeValidator(Echo()).run_validation([], F.cross_entropy), "no batches"),
        (
            lambda: RealTimeValidator(Echo()).run_validation(
                cut(randn(3, 5), torch.full((3,), -100), [3]), build_loss("cross_entropy")
            ),
            "none of the 3 validation samples",
        ),
        (lambda: EarlyStopping(patience=0), "patience=0"),
        (lambda: EarlyStopping(mode="mx"), "mode='mx'"),
        (lambda: EarlyStopping(min_delta=-1.0), "min_delta=-1.0"),
        (lambda: EarlyStopping(monitor="accuracy").update(None, 1), "monitor='accuracy' is not measured"),
    ],
)
def test_bad_use_is_refused_in_one_line(call, words: str) -> None:
    with pytest.raises((UsageError, DataError), match=words):
        call()


def outcomes(rule: EarlyStopping, values: list[float]) -> list[tuple[bool, bool]]:
    return [rule.update(value, step) for step, value in enumerate(values)]


def test_early_stopping_counts_evaluations_in_a_row() -> None:
    rule = EarlyStopping(patience=2)
    got = outcomes(rule, [3.0, 2.0, 2.0, 1.0, 1.5, 1.5])
    assert [improved for improved, _ in got] == [True, True, False, True, False, False]
    assert [stop for _, stop in got] == [False] * 5 + [True]
    assert (rule.best, rule.best_step) == (1.0, 3)


@pytest.mark.parametrize(
    ("monitor", "mode", "higher_wins"),
    [
        ("loss", None, False),
        ("accuracy", None, True),
        ("avg_accuracy", None, True),
        ("digit/accuracy", None, True),
        ("angle/r2", None, True),
        ("perplexity", None, False),
        ("mine", "max", True),
        ("accuracy", "min", False),
    ],
)
def test_the_direction_follows_the_figure(monitor: str, mode: str | None, higher_wins: bool) -> None:
    rule = EarlyStopping(monitor=monitor, mode=mode)
    rule.update(1.0, 0)
    assert rule.update(2.0, 1)[0] is higher_wins


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_value_that_is_not_finite_never_improves(bad: float, mode: str) -> None:
    assert outcomes(EarlyStopping(patience=2, mode=mode), [bad, 1.0, bad, bad]) == [
        (False, False),
        (True, False),
        (False, False),
        (False, True),
    ]


def test_min_delta_and_no_patience() -> None:
    rule = EarlyStopping(patience=None, min_delta=0.5)
    assert [improved for improved, _ in outcomes(rule, [3.0, 2.5, 2.4, 2.0, 1.4])] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert not any(stop for _, stop in outcomes(rule, [9.0] * 50))


@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan]), max_size=20), st.integers(0, 20), st.integers(1, 4)
)
def test_early_stopping_resumes_exactly(values: list[float], stop: int, patience: int) -> None:
    whole = outcomes(EarlyStopping(patience), values)
    first, second = EarlyStopping(patience), EarlyStopping(patience)
    start = outcomes(first, values[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert start + outcomes(second, values[stop:]) == whole
