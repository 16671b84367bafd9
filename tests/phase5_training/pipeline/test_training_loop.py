import copy
import re

import pytest
import torch
from torch import nn

import phase5_training.events as events
from phase4_bitnet.layers import BitLinear
from phase5_training.checkpoint import CheckpointStore, load_checkpoint
from phase5_training.errors import RunFailed, UsageError
from phase5_training.events import CallbackRegistry, Event
from phase5_training.optimizers import build_optimizer
from phase5_training.phases import PhaseSchedule
from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
from phase5_training.pipeline.grokfast_trainer import GradientFilter, GrokfastConfig
from phase5_training.pipeline.scheduler import GrokfastScheduler
from phase5_training.pipeline.training_loop import LoopConfig, TrainingLoop
from phase5_training.pipeline.validation import EarlyStopping, RealTimeValidator

cross_entropy = nn.functional.cross_entropy


class Loader:
    """Batches whose order is a function of the epoch, with a seek."""

    def __init__(self, batches=6, size=10, seed=0, classes=3):
        g = torch.Generator().manual_seed(seed)
        centers = torch.randn(classes, 5, generator=g)
        self.target = torch.randint(0, classes, (batches * size,), generator=g)
        self.input = centers[self.target] + 0.3 * torch.randn(batches * size, 5, generator=g)
        self.size, self.position = size, (0, 0)

    def __len__(self):
        return len(self.target) // self.size

    def set_position(self, epoch, batch):
        self.position = (epoch, batch)

    def __iter__(self):
        epoch, first = self.position
        order = torch.randperm(len(self.target), generator=torch.Generator().manual_seed(epoch))
        for start in range(first * self.size, len(order), self.size):
            index = order[start : start + self.size]
            yield {"input": self.input[index], "target": self.target[index], "index": index}


def make_loop(tmp_path=None, *, early=None, registry=None, dropout=0.0, mode="deterministic", **config):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 16),
        nn.Dropout(dropout),
        BitLinear(16, 16, quantization_mode=mode),
        nn.ReLU(),
        nn.Linear(16, 3),
    )
    options = {"epochs": 4, "eval_interval": 5, "log_interval": 4, **config}
    schedule = PhaseSchedule.fit(24)
    optimizer = BitNetOptimizer(
        build_optimizer("auto", model, learning_rate=0.02, weight_decay=0.01),
        model,
        gradient_filter=GradientFilter(GrokfastConfig(), schedule),
        max_grad_norm=1.0,
    )
    return TrainingLoop(
        model,
        optimizer,
        LoopConfig(**options),
        scheduler=GrokfastScheduler(optimizer, schedule),
        validator=RealTimeValidator(model),
        early_stopping=early,
        checkpoints=CheckpointStore(folder=tmp_path) if tmp_path else None,
        callbacks=registry,
    )


def record(registry):
    fired = []
    for event in Event:
        registry.register(
            event, lambda index, metrics, event=event: fired.append((event, index, dict(metrics)))
        )
    return fired


def test_trains_to_a_low_loss():
    loop = make_loop(epochs=30)
    state = loop.train(Loader(), cross_entropy, Loader(seed=0))
    assert (state.step, state.epoch, state.stop_reason) == (180, 30, "finished")
    assert state.validation["accuracy"] > 0.9


def test_validate_measures_and_changes_nothing():
    loop = make_loop(early=EarlyStopping(patience=1))
    before = copy.deepcopy(loop.state_dict())
    figures = loop.validate(Loader(), cross_entropy)
    assert figures == RealTimeValidator(loop.module).run_validation(Loader(), cross_entropy)
    assert loop.early_stopping.best is None
    assert loop.state.validation is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(before["model"].values(), loop.module.state_dict().values(), strict=True)
    )
    loop.validator = None
    with pytest.raises(UsageError, match=r"without a validator; make it with validator="):
        loop.validate(Loader(), cross_entropy)


def test_events_fire_in_the_order_of_the_picture(tmp_path):
    registry = CallbackRegistry()
    fired = record(registry)
    loop = make_loop(
        tmp_path,
        registry=registry,
        log_interval=5,
        checkpoint_interval=5,
        early=EarlyStopping(patience=1, mode="max"),
    )
    loop.train(Loader(), cross_entropy, Loader())
    picture = events.__doc__.split("::", 1)[1]
    order = [name for name in re.findall(r"\b[a-z_]+\b", re.sub(r"#.*", "", picture)) if name in set(Event)]
    assert sorted(order) == sorted(Event), "the picture names every event once"
    names = [event.value for event, _, _ in fired]
    assert names[0] == "fit_start"
    assert names[-1] == "fit_end"
    # Between two steps, what fires does so in the picture's order.
    group = []
    for name in [*names, "step_end"]:
        if name in ("step_end", "phase_change", "epoch_start", "fit_end", "epoch_end"):
            assert group == sorted(group, key=order.index), group
            group = []
        else:
            group.append(name)
    assert names.index("phase_change") < names.index("step_end")
    assert {"log", "eval_start", "eval_end", "checkpoint_saved", "early_stop"} <= set(names)


def test_validation_counts_optimizer_steps_and_epochs_still_end():
    registry = CallbackRegistry()
    fired = record(registry)
    make_loop(registry=registry).train(Loader(), cross_entropy, Loader())
    assert [index for event, index, _ in fired if event == Event.EVAL_END] == [5, 10, 15, 20, 24]
    epochs = [(index, metrics) for event, index, metrics in fired if event == Event.EPOCH_END]
    assert [index for index, _ in epochs] == [0, 1, 2, 3]
    assert epochs[-1][1]["loss"] < epochs[0][1]["loss"]
    assert 0 <= epochs[-1][1]["accuracy"] <= 1
    assert [index for event, index, _ in fired if event == Event.LOG] == [4, 8, 12, 16, 20, 24]


def test_epoch_loss_is_the_mean_of_its_steps():
    registry = CallbackRegistry()
    steps, epochs = [], []
    registry.register("step_end", lambda i, m: steps.append(float(m["loss"])))
    registry.register("epoch_end", lambda i, m: epochs.append(m["loss"]))
    make_loop(registry=registry).train(Loader(), cross_entropy)
    expected = [sum(steps[i : i + 6]) / 6 for i in range(0, 24, 6)]
    assert epochs == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("micro", [1, 3, 7])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro):
    grads = []
    for size in (None, micro):
        loop = make_loop(epochs=1, max_steps=1, micro_batch_size=size)
        seen = []
        loop.optimizer.step = lambda loop=loop, seen=seen, **given: seen.extend(
            p.grad.clone() for p in loop.module.parameters()
        )
        loop.train(Loader(), cross_entropy)
        grads.append(seen)
    for whole, cut in zip(*grads, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_micro_batches_weight_tokens_not_samples():
    """With -100 in the targets the micro-batch means are over unequal counts."""
    target = torch.tensor([[1, -100, -100], [0, 2, 1]])
    batch = {"input": torch.randn(2, 3, 5), "target": target}
    grads = []
    for size in (None, 1):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = BitNetOptimizer(torch.optim.SGD(model.parameters(), 1.0), model)
        before = model.weight.detach().clone()
        loss = lambda out, t: cross_entropy(out.flatten(0, 1), t.flatten())  # noqa: E731
        TrainingLoop(model, optimizer, LoopConfig(micro_batch_size=size)).train([batch], loss)
        grads.append(before - model.weight.detach())
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
@pytest.mark.parametrize("at", [3, 6, 11])
def test_resume_is_bit_identical_to_never_having_stopped(tmp_path, at, mode):
    """Dropout and stochastic rounding on: the generators must continue too. Step 6 ends an epoch."""

    def run(stop_at, folder, source=None):
        registry = CallbackRegistry()
        rows = record(registry)
        registry.register("step_end", lambda step, metrics: loop.stop() if step == stop_at else None)
        loop = make_loop(
            folder,
            registry=registry,
            dropout=0.2,
            mode=mode,
            max_steps=20,
            early=EarlyStopping(patience=50),
        )
        if source:
            loop.load_state_dict(load_checkpoint(source))
        loop.train(Loader(), cross_entropy, Loader(seed=1))
        logs = [m for e, _, m in rows if e in (Event.LOG, Event.EVAL_END, Event.EPOCH_END)]
        return loop, logs

    whole, whole_logs = run(None, tmp_path / "whole")
    run(at, tmp_path / "part")
    resumed, logs = run(None, tmp_path / "part", tmp_path / "part" / f"step-{at:08d}")
    a, b = whole.state_dict(), resumed.state_dict()
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    assert torch.equal(a["random"]["torch"], b["random"]["torch"])
    for name, value in a["best_weights"].items():
        assert torch.equal(value, b["best_weights"][name]), name
    timing = {"elapsed_s", "samples_per_s", "data_wait_share", "memory_mb"}
    final = [{k: v for k, v in m.items() if k not in timing} for m in (whole_logs[-1], logs[-1])]
    assert final[0] == final[1]


def test_early_stopping_keeps_the_best_weights():
    loop = make_loop(epochs=50, eval_interval=2, early=EarlyStopping(patience=3))
    seen = []

    class Scripted:
        def run_validation(self, loader, loss):
            seen.append(copy.deepcopy(loop.module.state_dict()))
            return {"loss": [3.0, 1.0, 2.0, 2.0, 2.0, 0.0][len(seen) - 1], "accuracy": None}

    loop.validator = Scripted()
    state = loop.train(Loader(), cross_entropy, [None])
    assert (state.stop_reason, state.step, state.best_loss) == ("early_stop", 10, 1.0)
    for name, value in seen[1].items():
        assert torch.equal(value, loop.best_weights[name]), name


def test_a_bad_batch_is_skipped_counted_and_reported():
    loader = Loader()
    loader.input[3] = float("nan")
    registry = CallbackRegistry()
    fired = record(registry)
    state = make_loop(registry=registry, epochs=2).train(loader, cross_entropy)
    assert state.nonfinite == 2
    assert sum(m["skipped"] for e, _, m in fired if e == Event.NONFINITE_STEP) == 2
    losses = [m["loss"] for e, _, m in fired if e in (Event.LOG, Event.EPOCH_END)]
    assert all(loss == loss for loss in losses)


def test_only_bad_batches_end_the_run_with_the_remedy():
    loader = Loader()
    loader.input[:] = float("inf")
    with pytest.raises(RunFailed, match=r"lower learning_rate"):
        make_loop(epochs=50, max_nonfinite=8).train(loader, cross_entropy)


def test_stop_saves_and_returns(tmp_path):
    registry = CallbackRegistry()
    loop = make_loop(tmp_path, registry=registry)
    registry.register("step_end", lambda step, m: loop.stop() if step == 7 else None)
    state = loop.train(Loader(), cross_entropy)
    assert (state.step, state.stop_reason) == (7, "interrupted")
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_limits_of_time_and_data():
    state = make_loop(epochs=10_000, max_seconds=0.2).train(Loader(), cross_entropy)
    assert state.stop_reason == "max_seconds"
    assert 0.2 <= state.seconds < 5
    with pytest.raises(RunFailed, match="no batch"):
        make_loop().train([], cross_entropy)


def test_float16_scaler_skips_and_backs_off():
    """The scaler's protocol on the CPU: unscale, our finite check, update."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = BitNetOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=100)
    loop = TrainingLoop(model, optimizer, LoopConfig(), scaler=scaler)
    good = {"input": torch.randn(4, 4), "target": torch.tensor([0, 1, 0, 1])}
    bad = {**good, "input": torch.full((4, 4), float("inf"))}
    reference = nn.Linear(4, 2)
    reference.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(reference.parameters(), 0.1)
    loop.train([good, bad, good], cross_entropy)
    for _ in range(2):
        plain.zero_grad()
        cross_entropy(reference(good["input"]), good["target"]).backward()
        plain.step()
    torch.testing.assert_close(model.weight, reference.weight)
    assert scaler.get_scale() == 2.0**14
    assert loop.state.nonfinite == 1


@pytest.mark.parametrize(
    "option", [{"epochs": 0}, {"eval_interval": 0}, {"max_steps": 0}, {"micro_batch_size": -1}]
)
def test_bad_lengths_are_refused(option):
    with pytest.raises(UsageError, match=next(iter(option))):
        LoopConfig(**option)


def test_unknown_event_lists_the_events():
    with pytest.raises(UsageError, match=r"did you mean 'epoch_end'.*fit_start, epoch_start"):
        CallbackRegistry().register("epochend", print)


def simple_loop(model=None, **config):
    torch.manual_seed(0)
    model = model or nn.Linear(5, 3)
    optimizer = BitNetOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    return TrainingLoop(model, optimizer, LoopConfig(log_interval=1, **config))


NO_TARGET = {"input": torch.ones(4, 5), "target": torch.full((4,), -100)}


def test_a_micro_batch_without_a_valid_target_counts_for_nothing():
    batch = {
        "input": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),
        "target": torch.tensor([0, 1, 2, -100, -100, -100]),
    }
    loops = [simple_loop(micro_batch_size=size) for size in (None, 3)]
    whole, cut = (loop.train([batch], cross_entropy) for loop in loops)
    assert cut.nonfinite == 0
    assert cut.train_loss == pytest.approx(whole.train_loss)
    torch.testing.assert_close(loops[1].module.weight, loops[0].module.weight)


@pytest.mark.parametrize("micro", [None, 2])
def test_a_batch_without_a_valid_target_is_not_averaged(micro):
    loop = simple_loop(micro_batch_size=micro, epochs=1)
    epochs = []
    loop.callbacks.register("epoch_end", lambda epoch, metrics: epochs.append(metrics["loss"]))
    first = cross_entropy(loop.module(torch.ones(4, 5)), torch.zeros(4, dtype=torch.long)).item()
    state = loop.train([{**NO_TARGET, "target": torch.zeros(4, dtype=torch.long)}, NO_TARGET], cross_entropy)
    assert state.nonfinite == 0
    assert epochs == [pytest.approx(first)]
    assert loop.module.weight.isfinite().all()


def test_a_loss_that_is_not_finite_skips_the_step_though_its_gradient_is():
    loop = simple_loop()
    before = loop.module.weight.detach().clone()
    batch = {"input": torch.ones(4, 5), "target": torch.ones(4, 3)}
    state = loop.train([batch], lambda outputs, target: (outputs - target).mean() + float("inf"))
    assert (state.nonfinite, state.train_loss) == (1, None)
    assert torch.equal(loop.module.weight, before)


def test_the_last_training_loss_is_that_of_the_last_step_that_had_one():
    good = {"input": torch.ones(4, 5), "target": torch.zeros(4, dtype=torch.long)}
    bad = {**good, "input": torch.full((4, 5), float("nan"))}
    alone, followed = (simple_loop().train(batches, cross_entropy) for batches in ([good], [good, bad]))
    assert followed.nonfinite == 1
    assert followed.train_loss == alone.train_loss


class TestEarlyStop:
    def loop(self, tmp_path, patience=2, registry=None):
        loop = make_loop(
            tmp_path, epochs=9, eval_interval=2, checkpoint_interval=2, registry=registry,
            early=EarlyStopping(patience=patience, mode="max"),
        )  # fmt: skip
        loop.validator = self
        self.calls = 0
        return loop

    def run_validation(self, loader, loss):
        self.calls += 1
        return {"loss": float(-self.calls), "accuracy": None}

    def test_the_event_names_the_monitored_figure_and_its_best(self, tmp_path):
        registry = CallbackRegistry()
        fired = record(registry)
        loop = self.loop(tmp_path, registry=registry)
        state = loop.train(Loader(), cross_entropy, [None])
        (metrics,) = [m for event, _, m in fired if event == Event.EARLY_STOP]
        assert metrics == {"step": 6, "monitor": "loss", "best": -1.0}
        assert state.best_loss == -3.0  # the lowest, which mode="max" does not go by

    @pytest.mark.parametrize("patience", [2, 4, None])
    def test_a_stopped_run_stays_stopped_unless_patience_changed(self, tmp_path, patience):
        first = self.loop(tmp_path).train(Loader(), cross_entropy, [None])
        assert (first.step, first.stop_reason) == (6, "early_stop")
        again = self.loop(tmp_path, patience)
        again.load_state_dict(load_checkpoint(tmp_path / "step-00000006"))
        state = again.train(Loader(), cross_entropy, [None])
        if patience == 2:
            assert (state.step, state.stop_reason, self.calls) == (6, "early_stop", 0)
            assert state.validation == first.validation
        else:
            assert state.step > 6
        # And the same loop, called again.
        assert again.train(Loader(), cross_entropy, [None]).step == state.step

    def test_an_interrupt_at_the_same_step_changes_nothing(self, tmp_path):
        registry = CallbackRegistry()
        loop = self.loop(tmp_path, registry=registry)
        registry.register("early_stop", lambda step, metrics: loop.stop())
        assert loop.train(Loader(), cross_entropy, [None]).stop_reason == "early_stop"


class TestModes:
    def model(self):
        return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    def test_a_part_in_eval_mode_stays_in_it(self):
        model = self.model()
        model[1].eval()
        loop = simple_loop(model, epochs=2)
        loop.train(Loader(), cross_entropy)
        assert model[1].num_batches_tracked == 0
        assert [m.training for m in model] == [True, False, True]
        model.eval()  # as a pipeline does with what it returns
        loop.config = LoopConfig(epochs=3)
        assert loop.train(Loader(), cross_entropy).step == 18
        assert model[1].num_batches_tracked == 0
        assert model[0].training

    def test_a_model_in_eval_mode_is_trained_whole(self):
        model = self.model().eval()
        simple_loop(model).train(Loader(), cross_entropy)
        assert model[1].num_batches_tracked == 6


def test_targets_with_classes_in_another_place_are_not_counted():
    """Segmentation: logits (n, classes, h, w) with targets (n, h, w)."""
    batch = {"input": torch.randn(2, 1, 4, 5), "target": torch.randint(0, 3, (2, 4, 5))}
    state = simple_loop(nn.Conv2d(1, 3, 1)).train([batch], cross_entropy)
    assert state.train_accuracy is None
    assert state.train_loss > 0


@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.ones(4), r"shape \(4,\)"), (torch.ones(1), r"shape \(1,\)"), (None, "NoneType")],
)
def test_a_loss_that_is_no_number_is_refused(value, found):
    def own_loss(outputs, target):
        return value

    with pytest.raises(UsageError, match=f"loss own_loss returned {found}; wanted a 0-dim tensor"):
        simple_loop().train(Loader(), own_loss)


def test_an_exhausted_iterator_is_named():
    with pytest.raises(
        RunFailed, match=r"train_loader is a generator.*exhausted after epoch 1 of 2: pass a list"
    ):
        simple_loop(epochs=2).train((batch for batch in Loader()), cross_entropy)
    assert simple_loop(epochs=1).train(iter(Loader()), cross_entropy).step == 6
