"""What the verbs of the command line do, as functions of plain arguments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from phase4_bitnet.store import load_compressed_model
from phase5_training.config import TrainingConfig, load_yaml, parse_config
from phase5_training.errors import UsageError, nearest_match
from phase5_training.factory import TrainingPipeline, create_training_pipeline
from phase5_training.hardware import resolve_device
from phase5_training.loss_registry import build_loss, infer_loss_name, infer_task_losses
from phase5_training.models import check_against_data, prepare_model
from phase5_training.pipeline.data_loader import DataConfig, DataLoaderFactory
from phase5_training.pipeline.validation import RealTimeValidator
from phase5_training.records import RunDirectory
from phase5_training.results import TrainingResult

# What may differ from the run that is resumed without making it another run.
RESUME_OPTIONS = (
    "epochs",
    "max_steps",
    "max_seconds",
    "train_data_path",
    "val_data_path",
    "num_workers",
    "device",
    "patience",
    "early_stopping",
    "eval_interval",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "progress",
)


def pipeline_from(values: Mapping[str, Any]) -> TrainingPipeline:
    """The pipeline of a configuration whose parts are all names and paths."""
    named = dict(values)
    model, train = named.pop("model", "auto"), named.pop("train_data_path", None)
    return create_training_pipeline(model, train, named.pop("val_data_path", None), **named)


def train(config_file: str | None, overrides: Mapping[str, Any]) -> TrainingResult:
    """Train from a YAML file, flags, or both; flags win.

    Raises:
        UsageError: options that do not exist or do not fit.
    """
    values = load_yaml(config_file) if config_file else {}
    parse_config(values, where=config_file or "")
    return pipeline_from({**values, **overrides}).run()


def resume(folder: str, overrides: Mapping[str, Any]) -> TrainingResult:
    """Continue a run from its newest checkpoint that can be read.

    Raises:
        UsageError: there is no run, it is complete, or it cannot be rebuilt from its records.
    """
    run = open_run(folder)
    values = _rebuildable(run)
    result = run.read_result()
    if result and result.get("success") and not overrides:
        steps = result["metrics"].get("steps")
        more = "--patience" if result.get("stop_reason") == "early_stop" else "--epochs or --max-steps"
        raise UsageError(
            f"{folder} is complete at step {steps} ({result['stop_reason']}); give {more} to go on"
        )
    if not run.checkpoints.is_dir():
        raise UsageError(f"{folder} has no checkpoint yet; start it again with `forge train --overwrite`")
    path = run.path.resolve()
    values.update(
        overrides, auto_resume=True, overwrite=False, experiment_name=path.name, output_dir=str(path.parent)
    )
    return pipeline_from(values).run()


def evaluate(folder: str, data: str | Sequence[str] | None = None, device: str = "auto") -> dict[str, Any]:
    """Measure the best weights of a run.

    Args:
        folder: the run.
        data: a file or files; None takes the run's validation data.
        device: where to compute.

    Returns:
        The validation figures.

    Raises:
        UsageError: the run has no finished model or no validation data.
        DataError: the data cannot be read.
    """
    run = open_run(folder)
    if not (run.best / "manifest.json").is_file():
        raise UsageError(f"{folder} has no finished model; continue it with `forge resume {folder}`")
    config = parse_config(_rebuildable(run))
    loader_config = DataConfig(
        batch_size=config.batch_size,
        quality_threshold=config.quality_threshold,
        validation_split=0.0 if config.val_data_path else config.validation_split,
        seed=config.seed,
        max_length=config.max_length,
        tokenizer=config.tokenizer,
        task=config.task,
    )
    training, loader = DataLoaderFactory.create_loaders(config.train_data_path, loader_config)
    if data is not None or config.val_data_path:
        # The training data number the classes.
        loader = DataLoaderFactory.create_loader(
            data if data is not None else config.val_data_path,
            loader_config,
            split="validation",
            spec=training.spec,
        )
    if loader is None:
        raise UsageError(f"{folder} was trained without validation data; give --data FILE")
    where = resolve_device(device)
    model = _stored_model(run, config, training.spec).to(where)
    batch = next(iter(loader))
    check_against_data(model, batch, loader.spec, where)
    several = isinstance(batch["target"], Mapping)
    loss = build_loss(
        config.loss if config.loss not in (None, "distillation") else infer_loss_name(loader.spec),
        model=model,
        penalty=config.quantization_penalty,
        label_smoothing=config.label_smoothing,
        tasks=infer_task_losses(batch["target"]) if several else None,
    ).to(where)
    one_byte = loader.spec.tokenizer in (None, "bytes")
    validator = RealTimeValidator(
        model, task=loader.spec.task, device=where, bytes_per_token=1.0 if one_byte else None
    )
    return validator.run_validation(loader, loss)


def open_run(folder: str) -> RunDirectory:
    """The run in a folder.

    Raises:
        UsageError: there is none; names the nearest.
    """
    run = RunDirectory(folder)
    if not run.exists():
        parent = Path(folder).parent
        others = [p.name for p in parent.iterdir() if RunDirectory(p).exists()] if parent.is_dir() else []
        near = nearest_match(Path(folder).name, others)
        hint = (
            f"; did you mean {str(parent / near)!r}?"
            if near
            else "; give the folder of a run, as runs/my_run"
        )
        raise UsageError(f"{folder} holds no run{hint}")
    return run


def _rebuildable(run: RunDirectory) -> dict[str, Any]:
    values = run.read_config()
    values.pop("teacher", None)
    for key, value in values.items():
        if isinstance(value, str) and value.startswith("<"):
            raise UsageError(
                f"{run.path} was started from Python with its own {key} ({value}), which no file holds; call "
                "create_training_pipeline with the same objects and auto_resume=True"
            )
    return values


def _stored_model(run: RunDirectory, config: TrainingConfig, spec: Any) -> torch.nn.Module:
    try:
        return load_compressed_model(run.best)
    except ValueError:
        if ":" not in config.model:
            raise
        # The user's own class: made by the function that made it for training, then filled.
        return load_compressed_model(run.best, model=prepare_model(config.model, config, spec))
