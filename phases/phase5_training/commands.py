"""What the verbs of the command line do, as functions of plain arguments."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from phase4_bitnet import export as exporters
from phase4_bitnet.durable_folder import recover
from phase4_bitnet.store import load_compressed_model
from phase5_training.assembly import data_config, loss_of, validator_of
from phase5_training.checkpoint import CheckpointStore
from phase5_training.config import TrainingConfig, load_yaml, parse_config
from phase5_training.errors import DataError, UsageError, nearest_match
from phase5_training.factory import TrainingPipeline, create_training_pipeline
from phase5_training.hardware import resolve_amp, resolve_device
from phase5_training.inspection import inspect_data
from phase5_training.inspection_text import as_text
from phase5_training.models import check_against_data, is_huggingface, prepare_model
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.records import CHECKPOINTS, EXPORT, RunDirectory
from phase5_training.results import TrainingResult
from phase5_training.run_folder import open_run
from phase5_training.tune import Trial, Tuning, write_tuned

# What lets a complete run go on.
PATIENCE = {"patience", "early_stopping"}
EXTENDING = {"epochs", "max_steps", "max_seconds", *PATIENCE}
# Format of `forge export` -> how the file is called by default, in RUN/export/.
EXPORT_NAMES = {
    "huggingface": "huggingface",
    "gguf": "model.gguf",
    "onnx": "model.onnx",
    "torch": "model.pt2",
}
# Rows of the run's data that an exported file is held to.
EXPORT_SAMPLE_ROWS = 4


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


def tune(
    config_file: str, output: str | None = None, tell: Callable[[Trial], None] | None = None
) -> tuple[Tuning, Path, Path]:
    """Find rate, decay, optimizer and filter for the run of a YAML file, and write them into another.

    Args:
        config_file: as for :func:`train`.
        output: the file to write; None writes ``<name>-tuned.yaml`` beside the first.
        tell: called with each trial when it is over.

    Returns:
        What was found, the file written, and the file of the trials.

    Raises:
        UsageError: options that do not fit, a run too short for trials, or an output that is the input.
    """
    source = Path(config_file)
    values = load_yaml(source)
    parse_config(values, where=config_file)
    written = Path(output) if output else source.with_name(f"{source.stem}-tuned.yaml")
    if written.resolve() == source.resolve():
        raise UsageError(f"--output {written} is the file that is tuned; give another name")
    tuning = pipeline_from({**values, "auto_resume": False}).tune(tell)
    return tuning, *write_tuned(tuning, values, config_file, written)


def resume(folder: str, overrides: Mapping[str, Any]) -> TrainingResult:
    """Continue a run from its newest checkpoint that can be read, or from one that is named.

    Args:
        folder: of the run, or of one of its checkpoints (RUN/checkpoints/step-00001000), from which a run
            also goes on when it is complete.
        overrides: options that may differ.

    Raises:
        UsageError: there is no run, it is complete, or it cannot be rebuilt from its records.
        CheckpointError: the checkpoint that is named does not verify.
    """
    chosen = Path(folder) if Path(folder).parent.name == CHECKPOINTS else None
    run = open_run(str(chosen.parent.parent) if chosen else folder)
    values = run.read_config()
    again = "call create_training_pipeline with the same objects and auto_resume=True"
    _refuse_objects(run, values, [k for k in values if k not in overrides], again)
    result = run.read_result()
    early = result is not None and result.get("stop_reason") == "early_stop"
    longer = bool((PATIENCE if early else EXTENDING) & set(overrides))
    if result and result.get("success") and not chosen and not longer:
        steps = result["metrics"].get("steps")
        more = "--patience" if early else "--epochs or --max-steps"
        raise UsageError(
            f"{folder} is complete at step {steps} ({result['stop_reason']}); give {more} to go on"
        )
    if not CheckpointStore(folder=run.checkpoints).paths():
        raise UsageError(f"{folder} has no checkpoint yet; start it again with `forge train --overwrite`")
    path = run.path.resolve()
    values.update(
        overrides, auto_resume=True, overwrite=False, experiment_name=path.name, output_dir=str(path.parent)
    )
    values["resume_from"] = str(chosen) if chosen else None
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
    run = _finished_run(folder)
    recorded = run.read_config()
    _refuse_objects(run, recorded, ["loss"], "measure it in Python, with RealTimeValidator")
    source = data if data is not None else recorded.get("val_data_path")
    wanted = ["val_data_path" if source else "train_data_path"] if data is None else []
    _refuse_objects(run, recorded, wanted, "give --data FILE")
    recorded.pop("teacher", None)
    config = parse_config(recorded)
    spec, loader = None, None
    if not _is_object(config.train_data_path):
        # The training data number the classes.
        training, loader = DataLoaderFactory.create_loaders(
            config.train_data_path, data_config(config, split=source is None)
        )
        spec = training.spec
    if source is not None:
        loader = DataLoaderFactory.create_loader(
            source, data_config(config, split=False), split="validation", spec=spec
        )
    if loader is None:
        raise UsageError(f"{folder} was trained without validation data; give --data FILE")
    where = resolve_device(device)
    model = _stored_model(run, config).to(where)
    # A teacher is not part of a run's records: its student is judged by the labels alone.
    name = config.loss if config.loss != "distillation" else None
    loss = loss_of(config, name, model=model, spec=loader.spec, batch=loader.first()).to(where)
    check_against_data(model, loss, loader.first(), loader.spec, where)
    learned = (run.read_result() or {}).get("loss", {}).get("learned")
    if learned:
        loss.load_state_dict({k: torch.tensor(v) for k, v in learned.items()})
    same_device = where.type == torch.device(config.device).type
    use_amp, amp_dtype = resolve_amp(config.use_amp if same_device else False, config.amp_dtype, where)
    validator = validator_of(model, loader.spec, where, use_amp, amp_dtype)
    return validator.run_validation(loader, loss)


def inspect_files(
    paths: Sequence[str],
    values: Mapping[str, Any],
    *,
    samples: int = 3,
    as_json: bool = False,
    quarantine: str | None = None,
) -> None:
    """Print what data files hold.

    Args:
        paths: files, folders or patterns of one format.
        values: options of a run about its data.
        samples: records to show.
        as_json: print JSON and not text.
        quarantine: a file for the records that training would leave out.

    Raises:
        DataError: the files cannot be opened, or no run could use them; what they hold is printed first.
    """
    config = data_config(parse_config(values), split=False)
    with open(quarantine, "w", encoding="utf-8") if quarantine else contextlib.nullcontext() as file:

        def note(record: dict[str, Any]) -> None:
            if file is not None:
                file.write(json.dumps(record) + "\n")

        found = inspect_data(paths, config, samples=samples, quarantine=note)
    print(json.dumps(found, indent=2, allow_nan=False) if as_json else as_text(found))
    if found["problem"]:
        raise DataError(found["problem"])


def export(
    folder: str,
    format: str,
    output: str | None = None,
    *,
    tensor_type: str | None = None,
    linear_class: str | None = None,
    data: str | Sequence[str] | None = None,
    overwrite: bool = False,
) -> exporters.ExportReport:
    """Write the best weights of a run for other tools, and hold what they read against the model.

    Args:
        folder: the run.
        format: "huggingface", "gguf", "onnx" or "torch".
        output: file or folder to write; None is RUN/export/ and the name of `EXPORT_NAMES`.
        tensor_type: of GGUF, as for :func:`phase4_bitnet.export.export_gguf`.
        linear_class: of Hugging Face, as for :func:`phase4_bitnet.export.export_huggingface`.
        data: a file or files whose first samples outputs are compared on; None takes the run's data, or
            random tokens or features where they cannot be read.
        overwrite: replace what is there.

    Raises:
        UsageError: no such run or format, an option of another format, or a model that the format cannot
            hold.
    """
    if format not in EXPORT_NAMES:
        near = nearest_match(format, EXPORT_NAMES)
        hint = f"did you mean {near!r}?" if near else f"use one of {', '.join(EXPORT_NAMES)}"
        raise UsageError(f"format {format!r} is unknown; {hint}")
    options: dict[str, Any] = {}
    for name, value, wanted in (
        ("tensor_type", tensor_type, "gguf"),
        ("linear_class", linear_class, "huggingface"),
    ):
        if value is not None and format != wanted:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --format {wanted}; leave it out")
        options |= {name: value} if value is not None else {}
    run = _finished_run(folder)
    recorded = run.read_config()
    _refuse_objects(run, recorded, ["model"], "export it in Python, with phase4_bitnet.export")
    recorded = {k: v for k, v in recorded.items() if k != "teacher" and not _is_object(v)}
    config = parse_config(recorded)
    if format == "huggingface" and config.tokenizer != "bytes":
        options["tokenizer"] = config.tokenizer
    write = getattr(exporters, f"export_{format}")
    place = Path(output) if output else run.path / EXPORT / EXPORT_NAMES[format]
    try:
        model = _stored_model(run, config)
        return write(model, place, sample=_sample(config, data), overwrite=overwrite, **options)
    except FileExistsError:
        raise UsageError(f"{place} exists; give --overwrite, or another --output") from None
    except ValueError as error:
        raise UsageError(str(error).replace("tensor_type=", "--tensor-type ")) from error


def _sample(config: TrainingConfig, data: str | Sequence[str] | None) -> torch.Tensor | None:
    """The first inputs of some data; None where there are none to read."""
    source = data or config.val_data_path or config.train_data_path
    if source is None:
        return None
    try:
        loader = DataLoaderFactory.create_loader(source, data_config(config, split=False), split="validation")
        return loader.first()["input"][:EXPORT_SAMPLE_ROWS]
    except DataError as error:
        if data:
            raise
        warnings.warn(f"outputs are compared on random input: {error}", stacklevel=2)
        return None


def _finished_run(folder: str) -> RunDirectory:
    run = open_run(folder)
    recover(run.path)
    if not (run.best / "manifest.json").is_file():
        raise UsageError(f"{folder} has no finished model; continue it with `forge resume {folder}`")
    return run


def _refuse_objects(run: RunDirectory, values: Mapping[str, Any], keys: Iterable[str], remedy: str) -> None:
    for key in keys:
        if _is_object(values.get(key)):
            raise UsageError(
                f"{run.path} was started from Python with its own {key} ({values[key]}), which no file "
                f"holds; {remedy}"
            )


def _is_object(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("<")


def _stored_model(run: RunDirectory, config: TrainingConfig) -> torch.nn.Module:
    try:
        return load_compressed_model(run.best)
    except (ValueError, FileNotFoundError) as error:
        if ":" not in config.model and not is_huggingface(config.model):
            raise UsageError(str(error)) from error
    # Not a class of ours: made as it was made for training, then filled.
    model = prepare_model(config.model, config, spec=None)
    try:
        return load_compressed_model(run.best, model=model)
    except ValueError as error:
        raise UsageError(str(error)) from error
