"""Same seed, same machine, same bits: with workers and without, compiled and not."""

import pytest
import torch
from torch import nn

from phase5_training import UsageError, create_training_pipeline, hardware
from phase5_training.pipeline.training_loop import TrainingLoop


@pytest.fixture
def train(task_files, runs, no_report, monkeypatch, weights):
    """Return a function that trains a run of a name and gives its weights."""
    monkeypatch.setattr(hardware, "has_compiler", lambda device: True)
    compiled = hardware.compile_model
    # The default backend needs a C++ compiler and a minute; what is held here is the loop around it.
    monkeypatch.setattr(hardware, "compile_model", lambda model, budget: compiled(model, backend="aot_eager"))

    def run(name, **options):
        torch.compiler.reset()
        config = {
            "experiment_name": name, "output_dir": str(runs), "epochs": 2, "learning_rate": 0.01,
            "use_amp": False, "compile": False, "device": "cpu", "progress": "quiet", "batch_size": 16,
            "model_options": {"hidden": [16, 16]}, "quantization_mode": "stochastic",
        }  # fmt: skip
        pipeline = create_training_pipeline("mlp", *task_files(), **{**config, **options})
        result = pipeline.run()
        return weights(result.run_dir), pipeline

    return run


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2}, {"deterministic": True}, {"compile": True}, {"compile": True, "num_workers": 2}],
    ids=["again", "workers", "deterministic", "compiled", "compiled, workers"],
)
def test_the_same_seed_gives_the_same_bits(train, assert_same, options):
    first, _ = train("first", **({"compile": True} if "compile" in options else {}))
    second, _ = train("second", **options)
    assert_same(first, second)
    other, _ = train("other", seed=1)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_what_it_costs_is_said_and_the_switch_is_given_back(train):
    _, pipeline = train("run", deterministic=True)
    (said,) = [n for n in pipeline.notices if n.startswith("deterministic=True")]
    assert "times as long" in said
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_kernels_are_deterministic_inside(train, monkeypatch):
    seen = []
    run = "phase5_training.pipeline.training_loop.TrainingLoop._step"
    step = TrainingLoop._step
    monkeypatch.setattr(
        run,
        lambda loop, batch: seen.append(torch.are_deterministic_algorithms_enabled()) or step(loop, batch),
    )
    train("run", deterministic=True)
    assert seen
    assert all(seen)


def test_a_model_without_deterministic_kernels_is_refused(task_files, pipeline):
    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(13, 3)

        def forward(self, x):
            if torch.are_deterministic_algorithms_enabled():
                raise RuntimeError("put_ does not have a deterministic implementation, but you set ...")
            return self.layer(x)

    with pytest.raises(UsageError, match=r"deterministic=True cannot be kept: put_ does not .*leave it out"):
        pipeline(Refuses(), *task_files(), use_bitnet=False, deterministic=True).setup()
