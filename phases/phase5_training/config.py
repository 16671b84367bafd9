"""One schema for keyword arguments, YAML keys and command-line flags.

Every option of a run is a field of :class:`TrainingConfig`. ``create_training_pipeline`` takes the
fields as keywords, a YAML file has them as keys, and ``forge train`` has a flag for each.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from phase5_training.errors import UsageError, nearest_match

# What may differ from the run that is resumed without making it another run.
RESUME_OPTIONS = (
    "epochs",
    "max_steps",
    "max_seconds",
    "train_data_path",
    "val_data_path",
    "num_workers",
    "data_timeout",
    "device",
    "patience",
    "early_stopping",
    "eval_interval",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "nonfinite",
    "max_nonfinite",
    "loss_spikes",
    "spike_threshold",
    "progress",
    "target",
    "trackers",
    "tracker_project",
    "parallel",
)

Positive = Annotated[int, Field(ge=1)]
Switch = bool | Literal["auto"]


def _known_bits(value: float) -> float:
    if value not in (1.58, 1):
        raise ValueError(
            f"weight_bits={value} is not supported; use 1.58 (codes -1, 0, 1) or 1 (codes -1, 1)"
        )
    return value


class TrainingConfig(BaseModel):
    """The options of a run. Steps are optimizer steps; None leaves the choice to Forge."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    # What is trained, on what
    model: str = "auto"
    """auto, mlp, decoder, llama, the folder of a saved model or of one of transformers, or
    package.module:function that returns one."""
    model_options: dict[str, bool | int | float | str | list[int] | None] = {}
    """Options of the architecture, such as dim, layers, heads (decoder, llama) or hidden (mlp)."""
    train_data_path: str | list[str] | None = None
    """A file, several files, or a folder."""
    val_data_path: str | list[str] | None = None
    """Validation data; None holds out validation_split of the training data."""
    experiment_name: str | None = None
    """Name of the run's folder; None makes one from the model and the time."""
    output_dir: str = "runs"
    """Folder that holds the runs."""
    overwrite: bool = False
    """Delete a finished run of the same name first."""
    auto_resume: bool = False
    """Continue the run of this name from its newest checkpoint, if there is one."""

    # Data
    task: Literal["classification", "next_token", "regression", "multi_task"] | None = None
    """What is learned; None infers it from the targets."""
    batch_size: Annotated[int, Field(ge=1, le=2**31)] = 32
    """Samples per optimizer step."""
    micro_batch_size: Positive | None = None
    """Samples per forward; smaller ones take less memory and give the same gradient."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read data; 0 reads in this one."""
    data_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait for a batch of the worker processes before the run ends, saved."""
    cache_size: Annotated[int, Field(ge=0)] = 1000
    """Decoded samples kept in memory, where they are decoded at each use and all of them fit."""
    streaming: bool = False
    """Read in file order through a shuffle buffer, in bounded memory."""
    quality_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Drop records whose metadata quality is below this."""
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training data held out when there is no val_data_path; 0 for none."""
    shuffle: bool = True
    """Draw a new order of the training data each epoch."""
    drop_last: bool = False
    """Leave out the last batch of an epoch when it is not full."""
    max_length: Positive | None = None
    """Longest text in tokens, and the block length of token streams."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json."""
    invalid_records: Literal["fail", "drop"] = "fail"
    """fail stops at the first bad record; drop leaves bad records out and lists them in quarantine.jsonl."""
    record_policies: dict[str, Literal["drop", "fail"]] = Field(default_factory=dict)
    """drop or fail for single checks, as label=fail; too_long and duplicate are checked only if named."""
    max_dropped_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Largest share of the records that may be left out; a run that would lose more does not start."""
    num_classes: Positive | None = None
    """Classes of the labels, from 0; a label beyond is a bad record. None takes those that occur."""
    input_kind: Literal["auto", "features", "tokens"] = "auto"
    """What lists of whole numbers are; auto takes them for tokens."""
    pad_id: Annotated[int, Field(ge=0)] | None = None
    """Token that pads lists of token ids of different lengths; None refuses such lists."""
    pack_text: bool = False
    """Join texts end to end into blocks of max_length tokens for next-token training, without padding."""
    bucket_by_length: bool = False
    """Make batches of texts of like length, so that less of them is padding."""
    inputs_path: str | None = None
    """Array of the inputs in an HDF5 file, where it is not /dataset/inputs."""
    targets_path: str | None = None
    """Array or group of the targets in an HDF5 file."""
    cache_mb: Positive = 64
    """MiB that the samples of cache_size may take."""
    memory_limit_mb: Annotated[int, Field(ge=0)] = 1024
    """MiB of data that are held in memory; larger ones are read in place."""

    # Training
    epochs: Positive = 100
    """Passes over the training data."""
    max_steps: Positive | None = None
    """Stop after this many steps."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Stop after this much time."""
    optimizer: str = "auto"
    """auto, muon (AdamW for what is no hidden matrix), adamw or sgd; auto is muon where the batch is large
    enough for its cost, else adamw."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] | None = None
    """Base rate; None takes the default of the optimizer, auto tries some in short trials first."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Decoupled decay of matrices; None takes the default of the optimizer."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = (
        None
    )
    """Averages of AdamW, also beside Muon: of the gradient and of its square; None takes 0.9 and 0.98."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Average of the gradient in Muon and sgd; None takes 0.95 and 0.9."""
    ns_steps: Positive | None = None
    """Newton-Schulz iterations of Muon; None takes 5. Each costs a fifth of what Muon adds to a step."""
    ns_coefficients: Literal["jordan", "polar_express"] | None = None
    """Polynomials of these iterations; None takes jordan. polar_express does with two or three."""
    loss: str | None = None
    """Name of the loss; None takes the task's own."""
    quantization_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the pull of latents towards their codes, in the classification loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes."""
    distillation_temperature: Annotated[float, Field(gt=0)] = 2.0
    """Softness of the teacher's targets."""
    distillation_alpha: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the teacher in the distillation loss."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of weights, order of data, dropout and stochastic rounding."""
    deterministic: bool = False
    """Use only kernels that give the same bits each time; the run says what they cost."""

    # BitNet
    use_bitnet: bool = True
    """Make the hidden linear layers ternary."""
    weight_bits: Annotated[float, AfterValidator(_known_bits)] = 1.58
    """1.58 for codes -1, 0, 1; 1 for -1, 1."""
    quantization_mode: Literal["deterministic", "stochastic"] = "deterministic"
    """How latents are rounded to codes."""
    activation_bits: Literal[8] | None = 8
    """8 for int8 inputs of ternary layers, None for float ones."""
    backward: Literal["auto", "int8", "bf16", "float32"] = "auto"
    """Arithmetic of the gradient products of ternary layers; see BitLinear for auto."""
    float_layers: list[str] | None = None
    """Names or patterns of linear layers to keep in float; None keeps the output head."""

    # Grokfast and schedule
    use_grokfast: bool | None = None
    """Amplify the slow part of the gradient; None does when a grokfast figure or a filter is named."""
    grokfast_alpha: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the slow average; None is 0.98, and 0.95 for auto."""
    grokfast_lambda: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Gain of the slow average, with auto the greatest; None is 2, and 10 for auto."""
    filter: Literal["auto", "ema", "ma", "high_pass", "ademamix"] | None = None
    """auto amplifies the slow part while validation lags training, ema and ma always, high_pass the fast
    part, ademamix the slow part in Adam's numerator; None is auto, or ema where a figure of it is named."""
    grokfast_window: Positive = 100
    """Steps that the moving average of filter=ma is taken over."""
    grokfast_unit_gain: bool = False
    """Divide by 1 + lambda, so that a constant gradient passes unchanged."""
    grokfast_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the gain of the slow average rises from 0."""
    grokfast_phase_gains: dict[str, float] = Field(default_factory=dict)
    """Factors on the gain of the slow average by phase, as acceleration=0.5; others have 1."""
    grokfast_average: Literal["float32", "bfloat16"] = "float32"
    """Type of the slow average; bfloat16 takes half the memory."""
    schedule: Literal["phases", "constant", "cosine", "linear"] = "phases"
    """Shape of the learning rate; phases is warmup, acceleration, consolidation, refinement."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Length of the warmup; None scales the default to the run."""
    acceleration_steps: Annotated[int, Field(ge=0)] | None = None
    """Length of the acceleration phase; None scales the default to the run."""
    consolidation_steps: Annotated[int, Field(ge=0)] | None = None
    """Length of the consolidation phase; None scales the default to the run."""
    acceleration_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Factor on the rate in the acceleration phase; None is 5."""
    consolidation_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Factor on the rate in the consolidation phase; None is 0.2."""

    # Precision and speed
    use_amp: Switch = "auto"
    """Mixed precision; auto is on for CUDA, and on a CPU where bf16 is measured to be faster."""
    amp_dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """Type of mixed precision; auto is bf16 where the device has it."""
    gradient_clipping: bool = True
    """Clip the norm of the gradient."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm that the gradient is clipped to."""
    nonfinite: Literal["stop", "rollback", "skip"] = "stop"
    """After max_nonfinite skipped steps in a row: fail, go to the last checkpoint at half the rate, go on."""
    max_nonfinite: Positive = 50
    """Steps in a row with a loss or gradient that is not finite; each is skipped and listed."""
    loss_spikes: Literal["record", "rollback"] = "record"
    """List batches whose loss is far above those before, or also go back to a checkpoint at half the rate."""
    spike_threshold: Annotated[float, Field(gt=0)] = 10.0
    """Robust z-score from which a loss is a spike."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Among the processes of torchrun: ddp gives each the whole model, fsdp a part; auto goes by size."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """Type in which processes exchange gradients; bf16 sends half the bytes."""
    compile: Switch = "auto"
    """Compile the model with torch.compile; auto does for long runs where a compiler is installed."""
    memory_budget: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the activations a compiled model keeps for backward; it computes the cheapest again."""

    # Validation, saving, progress
    eval_interval: Positive = 500
    """Steps between validations; one more at the end."""
    early_stopping: bool = True
    """Stop when validation no longer improves, and return the best weights."""
    patience: Positive = 5
    """Validations without improvement before stopping."""
    monitor: str | None = None
    """Validation figure that decides which weights are best; None is accuracy for classes, else loss."""
    checkpoint_interval: Positive = 1000
    """Most steps that a kill can cost; a checkpoint is begun after every half of them, and at the end."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept."""
    resume_from: str | None = None
    """A checkpoint of this run to go on from, in place of the newest; newer ones are set aside."""
    log_interval: Positive = 10
    """Steps between lines of figures."""
    progress: Literal["auto", "plain", "quiet"] = "auto"
    """Live display on a terminal, plain lines, or nothing."""
    target: float | None = None
    """Figure of monitor to head for: the display says when it may be reached, and nothing else changes."""
    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = []
    """Where else the figures go: wandb, tensorboard, trackio, each in a process of its own."""
    tracker_project: str = "forge"
    """Project that W&B and trackio list the run in."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainingConfig":
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            micro, batch = self.micro_batch_size, self.batch_size
            fit = next(m for m in range(micro, 0, -1) if batch % m == 0)
            raise ValueError(
                f"batch_size={batch} is not a multiple of micro_batch_size={micro}; "
                f"use micro_batch_size={fit} or batch_size={-(-batch // micro) * micro}"
            )
        return self


def parse_config(values: Mapping[str, Any], where: str = "") -> TrainingConfig:
    """Validate options.

    Args:
        values: option names to values.
        where: what is named in the message, such as the YAML file.

    Raises:
        UsageError: an unknown name (with the nearest that exists) or a value that does not fit.

    Example:
        >>> parse_config({"batch_size": 8}).batch_size
        8
        >>> parse_config({"batchsize": 8})
        Traceback (most recent call last):
        ...
        phase5_training.errors.UsageError: unknown option 'batchsize'; did you mean 'batch_size'?
    """
    try:
        return TrainingConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        prefix = f"{where}: " if where else ""
        raise UsageError(prefix + _one_line(first)) from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        UsageError: the file is missing, is not YAML, or holds something other than options.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        near = nearest_match(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent else None
        hint = f"; did you mean {str(path.with_name(near))!r}?" if near else ""
        raise UsageError(f"configuration {str(path)!r} does not exist{hint}") from None
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UsageError(
            f"{path} holds a {type(values).__name__}; write one option per line, as 'epochs: 10'"
        )
    return values


def check_same_run(run: str, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Whether options resume the run that was recorded, and do not make it another.

    Args:
        run: what is named in the message.
        recorded: options as config.yaml holds them.
        given: options in the same form.

    Raises:
        UsageError: an option that decides the result differs.
    """
    free = {
        *RESUME_OPTIONS,
        "overwrite",
        "auto_resume",
        "resume_from",
        "experiment_name",
        "output_dir",
        "compile",
        "memory_budget",
        "cache_size",
        "cache_mb",
    }
    for name, old in recorded.items():
        new = given.get(name)
        if name not in free and new != old:
            raise UsageError(
                f"{run} was started with {name}={old!r} and cannot go on with {name}={new!r}; "
                "use the old value, or another experiment_name"
            )


def full_signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function that takes the options as keywords, each spelled out, for help()."""
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    known = {p.name for p in kept}
    fields = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=f.get_default(call_default_factory=True)
        )
        for name, f in TrainingConfig.model_fields.items()
        if name not in known
    ]
    return own.replace(parameters=[*kept, *fields])


def in_words(value: Any) -> Any:
    """A name or path as it is; an object that a file cannot hold by its type, in angle brackets.

    Example:
        >>> in_words("mlp"), in_words(print), in_words(object())
        ('mlp', '<print>', '<object>')
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(v, (str, Path)) for v in value):
        return [str(v) for v in value]
    return f"<{getattr(value, '__name__', type(value).__name__)}>"


def only_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the objects given is a name or a path, or a list of paths, as text.

    Example:
        >>> only_names({"model": object(), "train_data_path": Path("a.json"), "val_data_path": None})
        {'train_data_path': 'a.json'}
    """
    names: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, (str, Path)):
            names[key] = str(value)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, (str, Path)) for v in value):
            names[key] = [str(v) for v in value]
    return names


def record_of(config: TrainingConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """What config.yaml holds: options that `forge train` takes, and objects in words.

    Args:
        config: the options as they were resolved.
        given: model, train, val, loss, optimizer and teacher as they were given.
    """
    record = config.model_dump()
    for key, name in (("model", "model"), ("train_data_path", "train"), ("val_data_path", "val")):
        record[key] = in_words(given[name])
    for key in ("loss", "optimizer", "teacher"):
        if key != "teacher" or given[key] is not None:
            record[key] = in_words(given[key])
    return record


def _one_line(error: Mapping[str, Any]) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        near = nearest_match(name, TrainingConfig.model_fields)
        hint = f"did you mean {near!r}?" if near else "see `forge train --help` for all options"
        return f"unknown option {name!r}; {hint}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{name}={error['input']!r} does not fit: {message}"
