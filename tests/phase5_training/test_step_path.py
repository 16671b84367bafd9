"""What a step must not do: wait for the device, or quantize a weight twice."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import phase4_bitnet.layers as layers

pytestmark = pytest.mark.usefixtures("no_report")

# What reading a value off the device, or a shape that depends on one, comes down to.
WAITING = {
    f"aten::{name}"
    for name in [
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "_unique2",
        "allclose",
    ]
}


class WaitedError(AssertionError):
    """A step read a tensor's value."""


class Watch(TorchDispatchMode):
    """Raises at what would wait on an accelerator; here tensors are on the CPU, so it is only slow there."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.monkeypatch, self.operations, self.on = monkeypatch, 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        name = function.name().split(".")[0]
        if name in WAITING:
            raise WaitedError(name)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        def refuse(what):
            def call(*args, **kwargs):
                raise WaitedError(what)

            return call

        # These read memory without an operator, or copy from the host and wait for the copy.
        for name in ("tolist", "numpy", "cpu", "__array__"):
            self.monkeypatch.setattr(torch.Tensor, name, refuse(name))
        self.monkeypatch.setattr(torch, "tensor", refuse("torch.tensor"))
        self.on = True
        return super().__enter__()

    def __exit__(self, *error):
        if self.on:
            self.on = False
            self.monkeypatch.undo()
            super().__exit__(*error)


class Watched:
    """Batches during which the steps are watched: all but the first and the one that ends in a log."""

    def __init__(self, batches, watch):
        self.batches, self.watch = batches, watch

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        last = len(self.batches) - 1
        for i, batch in enumerate(self.batches):
            if i == 1:
                self.watch.__enter__()
            if i == last:
                self.watch.__exit__(None, None, None)
            yield batch


@pytest.fixture
def watch_steps(pipeline):
    """Return a function that trains a few steps and fails where one of them waits."""

    def run(*given, steps=6, **options):
        run = pipeline(*given, epochs=1, log_interval=steps, batch_size=8, **options).setup()
        # As on an accelerator: the flag of a bad step stays there.
        run.optimizer._undo_on_device = True
        batches = list(run.train_loader)[:steps]
        assert len(batches) == steps
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            try:
                run.loop.train(Watched(batches, watch), run.loss)
            finally:
                watch.__exit__(None, None, None)
        assert watch.operations > 20
        assert run.loop.state.step == steps
        return run

    return run


def net():
    return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.Linear(16, 3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_batch_size": 4},
        {"optimizer": "adamw"},
        {"optimizer": "sgd"},
        {"use_grokfast": True},
        {"use_grokfast": True, "filter": "ma"},
        {"use_grokfast": True, "filter": "high_pass"},
        {"use_grokfast": False, "gradient_clipping": False},
        {"quantization_mode": "stochastic"},
        {"weight_bits": 1},
        {"use_amp": True},
        {"use_bitnet": False},
        {"quantization_penalty": 0.01, "label_smoothing": 0.1},
        {"schedule": "cosine"},
    ],
    ids=str,
)
def test_no_step_waits(watch_steps, task_files, options):
    run = watch_steps(net(), task_files()[0], **options)
    assert (run.optimizer.gradient_filter is not None) == bool(options.get("use_grokfast"))


def test_no_step_waits_with_a_teacher(watch_steps, task_files):
    watch_steps(net(), task_files()[0], teacher=net(), micro_batch_size=4)


def test_no_step_waits_with_text(watch_steps, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, " * 200)
    small = {"dim": 16, "layers": 1, "heads": 2}
    watch_steps("decoder", str(tmp_path / "text.txt"), model_options=small, max_length=32, micro_batch_size=4)


def test_no_step_waits_with_regression(watch_steps, task_files):
    watch_steps("mlp", task_files("diabetes")[0], model_options={"hidden": [8, 8]})


def test_no_step_waits_with_several_tasks(watch_steps):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 1)

        def forward(self, x):
            x = torch.relu(self.body(x))
            return {"a": self.a(x), "b": self.b(x)}

    g = np.random.default_rng(0)
    batches = [
        {
            "input": torch.from_numpy(g.normal(size=(8, 4))).float(),
            "target": {"a": torch.from_numpy(g.integers(0, 2, 8)), "b": torch.randn(8, 1)},
        }
        for _ in range(6)
    ]
    watch_steps(Two(), batches, float_layers=["a", "b"])


def test_the_watch_sees_what_it_is_for(watch_steps, task_files):
    """The test of the test: each way to read a value is caught."""
    reads = [float, bool, int, torch.Tensor.item, torch.Tensor.nonzero]
    reads += [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: torch.tensor([1.0]),
    ]
    for i, read in enumerate(reads):

        def loss(outputs, targets, read=read):
            value = nn.functional.cross_entropy(outputs, targets)
            read(value.detach())
            return value

        with pytest.raises(WaitedError):
            watch_steps(net(), task_files()[0], loss=loss, experiment_name=f"run{i}")


def test_a_bad_step_is_undone_without_a_wait(watch_steps, task_files, pipeline):
    """Step 3 of 6 has infinite gradients; nobody reads that until the log."""
    model = net()
    calls = []

    def spoil(module, args, output):
        calls.append(module.training)
        return output * float("inf") if module.training and sum(calls) == 3 else output

    model[-1].register_forward_hook(spoil)
    run = watch_steps(model, task_files()[0])
    assert run.loop.state.nonfinite == 1
    assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_weights_are_quantized_once_a_step(pipeline, task_files, monkeypatch, mode):
    """Not once a forward, micro-batch or validation batch."""
    calls = {"requantize_": 0, "quantize_weight": 0}
    for name in calls:
        real = getattr(layers, name)

        def counted(*args, name=name, real=real):
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(layers, name, counted)
    options = {
        "quantization_mode": mode, "micro_batch_size": 4, "eval_interval": 2, "early_stopping": False,
        "optimizer": "muon",  # the one pass of AdamW makes the codes itself
    }  # fmt: skip
    run = pipeline("mlp", *task_files(), **options).setup()
    seen = []
    calls.update(dict.fromkeys(calls, 0))
    run.register_callback("step_end", lambda step, metrics: seen.append(dict(calls)))
    run.register_callback("fit_end", lambda step, metrics: seen.append(dict(calls)))
    run.run()
    steps = [*range(1, 16), 15]
    assert seen == [{"requantize_": step, "quantize_weight": 0} for step in steps]


def test_the_forward_after_a_step_uses_the_codes_of_that_step(pipeline, task_files):
    run = pipeline("mlp", *task_files(), max_steps=3, learning_rate=0.1, schedule="constant").setup()
    checked = []

    def check(step, metrics):
        for _, layer in layers.ternary_layers(run.model):
            codes, scale = layers.quantize_weight(layer.weight, layer.weight_bits)
            assert torch.equal(codes, layer.codes)
            assert torch.equal(scale, layer.scale)
            used = layer.current_codes()
            assert used[0] is layer.codes
        checked.append(step)

    run.register_callback("step_end", check)
    run.run()
    assert checked == [1, 2, 3]
