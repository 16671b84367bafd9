"""Small data sets and pipelines for the tests of whole runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phase5_training import TrainingPipeline, create_training_pipeline
from phase5_training.tasks import load_task


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    """Return a function (task, format, **options) -> paths of its training and validation file."""
    made: dict[Any, tuple[str, str]] = {}

    def files(name: str = "wine", format: str = "npz", **options: Any) -> tuple[str, str]:
        key = (name, format, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            train, validation = load_task(name, **options).write(folder, format)
            made[key] = (str(train), str(validation))
        return made[key]

    return files


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing of reports, which takes most of the time of a tiny run."""
    monkeypatch.setattr("phase5_training.report.write_report", lambda runs, output=None: Path())


@pytest.fixture
def pipeline(runs: Path) -> Callable[..., TrainingPipeline]:
    """Return create_training_pipeline with settings for tiny runs that are the same on every machine."""

    def make(model: Any = "mlp", *data: Any, **options: Any) -> TrainingPipeline:
        small = {
            "experiment_name": "run",
            "output_dir": str(runs),
            "epochs": 3,
            "learning_rate": 0.01,
            "use_amp": False,
            "compile": False,
            "device": "cpu",
            "progress": "quiet",
        }
        if model == "mlp":
            small["model_options"] = {"hidden": [16, 16]}
        if isinstance(options.get("optimizer", ""), torch.optim.Optimizer):
            del small["learning_rate"]
        return create_training_pipeline(model, *data, **{**small, **options})

    return make


@pytest.fixture
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Return a function that reads the stored weights of a run's folder."""
    return lambda run: load_file(Path(run) / "best" / "weights.safetensors")


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """Return a function that reads the rows of a run's metrics, of one kind."""

    def read(run: Path, kind: str) -> list[dict[str, Any]]:
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    return read


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Fail unless two states are bit for bit equal."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


@pytest.fixture(name="assert_same")
def _assert_same() -> Callable[..., None]:
    """Return the comparison of two states, bit for bit."""
    return assert_same
