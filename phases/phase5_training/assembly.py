"""The parts of a run, each made from its configuration; the factory and ``forge evaluate`` use them."""

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phase4_bitnet.convert import hidden_linears
from phase5_training import hardware
from phase5_training.batches import to_device
from phase5_training.checks import check_optimizer
from phase5_training.config import TrainingConfig
from phase5_training.defaults import rates
from phase5_training.distributed import Ranks
from phase5_training.errors import UsageError
from phase5_training.loop_config import LoopConfig
from phase5_training.loss_registry import Loss, build_loss, infer_loss_name, infer_task_losses
from phase5_training.models import READS
from phase5_training.modes import eval_mode
from phase5_training.muon import NS_STEPS, iteration_flops
from phase5_training.optimizers import AVERAGES, build_optimizer, check_optimizer_name
from phase5_training.phases import Schedule, build_schedule
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.grokfast_trainer import GrokfastConfig
from phase5_training.pipeline.validation import EarlyStopping, RealTimeValidator
from phase5_training.random_state import random_state, set_random_state


def data_config(config: TrainingConfig, *, split: bool, ranks: Ranks | None = None) -> DataConfig:
    """How the data of a run are read; ``split`` says whether some are held out for validation.

    Each of several ranks reads its part of every batch.
    """
    ranks = ranks or Ranks()
    return DataConfig(
        rank=ranks.rank,
        world_size=ranks.world_size,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        timeout=config.data_timeout,
        cache_size=config.cache_size,
        streaming=config.streaming,
        quality_threshold=config.quality_threshold,
        validation_split=config.validation_split if split else 0.0,
        seed=config.seed,
        shuffle=config.shuffle,
        drop_last=config.drop_last,
        max_length=config.max_length,
        tokenizer=config.tokenizer,
        task=config.task,
        invalid_records=config.invalid_records,
        record_policies=config.record_policies,
        max_dropped_share=config.max_dropped_share,
        num_classes=config.num_classes,
        input_kind=config.input_kind,
        reads=READS.get(config.model),
        pad_id=config.pad_id,
        pack_text=config.pack_text,
        bucket_by_length=config.bucket_by_length,
        inputs_path=config.inputs_path,
        targets_path=config.targets_path,
        cache_mb=config.cache_mb,
        memory_limit_mb=config.memory_limit_mb,
    )


def optimizer_of(
    given: Any,
    model: nn.Module,
    batch: Mapping[str, Any],
    device: torch.device,
    ranks: Ranks,
    ns_steps: int | None = None,
) -> tuple[Any, list[str]]:
    """The optimizer of a run as it was given, "auto" decided where it can be, and what to say about that.

    Muon orthogonalizes each hidden matrix once a step, whatever the batch, and the products of a step grow
    with the rows that the layers see. "auto" is Muon while its iteration costs no more than those products,
    and AdamW where the batch is too small for it: on the digits a step of 64 rows would take seven times as
    long, for the same accuracy (docs/findings.md).

    Args:
        given: a name or an instance.
        model: its hidden linear layers are what Muon would move.
        batch: this rank's part of one, with the rows that the layers see.
        device: of the model.
        ranks: whose parts make up the batch.
        ns_steps: iterations of Muon; None for its default.
    """
    if not isinstance(given, str) or given != "auto":
        return given, []
    modules = dict(model.named_modules())
    layers = [modules[name] for name in hidden_linears(model)]
    products: dict[Any, int] = {}

    def count(layer: Any, args: tuple[Any, ...]) -> None:
        products[layer] = products.get(layer, 0) + 6 * args[0].numel() * layer.weight.shape[0]

    hooks = [
        layer.register_forward_pre_hook(count)
        for layer in layers
        if layer.weight.requires_grad and layer.weight.dim() == 2
    ]
    try:
        with eval_mode(model), torch.no_grad():
            model(to_device(batch["input"], device))
    finally:
        for hook in hooks:
            hook.remove()
    own = sum(ranks.gathered(sum(products.values())))
    if not own:  # no hidden matrix, or none that is called as a layer
        return given, []
    shapes = [(layer.weight.shape[0], layer.weight.shape[1]) for layer in products]
    share = sum(iteration_flops(*shape, ns_steps or NS_STEPS) for shape in shapes) / own
    name = "muon" if share <= 1 else "adamw"
    return name, [f"optimizer {name}: Muon's iteration would be {share:.2g} times the products of a step"]


def filter_notices(
    grokfast: GrokfastConfig | None, config: TrainingConfig, total_steps: int, *, validated: bool
) -> list[str]:
    """What is to be said of a filter that will not act.

    Args:
        grokfast: the filter; None for none.
        config: of the run.
        total_steps: of the run.
        validated: whether there are validation data.
    """
    if grokfast is None or grokfast.filter != "auto":
        return []
    why = ""
    if not validated:
        why = "there are no validation data; give some"
    elif config.eval_interval >= total_steps:
        why = f"the first is at step {config.eval_interval} of {total_steps}; lower eval_interval"
    if not why:
        return []
    return [
        f"filter=auto stays off: it acts once a validation lags training, and {why}, or name grokfast_alpha "
        "and grokfast_lambda"
    ]


def rates_of(config: TrainingConfig, optimizer: Any) -> tuple[float, float]:
    """(base learning rate, weight decay) of a named optimizer, or those that an instance has already."""
    if not isinstance(optimizer, str):
        if config.learning_rate is not None or config.weight_decay is not None:
            raise UsageError(
                "learning_rate and weight_decay belong to the optimizer instance; set them there"
            )
        first = optimizer.param_groups[0]
        return first["lr"], first.get("weight_decay", 0.0)
    check_optimizer_name(optimizer)
    return rates(config, optimizer)


def torch_optimizers(
    given: Any,
    model: nn.Module,
    loss: Loss,
    config: TrainingConfig,
    learning_rate: float,
    weight_decay: float,
) -> Any:
    """What moves the weights: the instance that was given, or the torch optimizers of a name.

    Raises:
        UsageError: an average or iteration is named that this optimizer does not have.
    """
    named = {n: value for n in AVERAGES if (value := getattr(config, n)) is not None}
    if not isinstance(given, str):
        for name in named:
            raise UsageError(f"{name} belongs to the optimizer instance; set it there")
        check_optimizer(given, model, loss)
        return given
    # "auto" decides by the batch; what is named holds for whichever it takes, also when that run goes on
    # under the name of the optimizer that was taken.
    decided = config.optimizer == "auto" or config.auto_resume or config.resume_from is not None
    for name in named:
        if not decided and given not in AVERAGES[name]:
            raise UsageError(
                f"optimizer {given} has no {name}, which is for {' and '.join(AVERAGES[name])}; leave it out"
            )
    return build_optimizer(
        given,
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        extra=list(loss.parameters()),
        **named,
    )


def validator_of(
    model: nn.Module,
    spec: Any,
    device: torch.device,
    use_amp: bool,
    amp_dtype: torch.dtype,
    ranks: Ranks | None = None,
) -> RealTimeValidator:
    """What measures a model on data of ``spec``."""
    byte_tokens = spec.tokenizer in (None, "bytes")
    return RealTimeValidator(
        model,
        task=spec.task,
        device=device,
        use_amp=use_amp,
        amp_dtype=amp_dtype,
        bytes_per_token=1.0 if byte_tokens else None,
        ranks=ranks,
    )


def loss_of(
    config: TrainingConfig,
    given: Any,
    *,
    model: nn.Module,
    spec: Any,
    batch: Mapping[str, Any],
    teacher: nn.Module | None = None,
) -> Loss:
    """The loss of a run.

    Args:
        config: figures of the losses that have some.
        given: a name, a callable, a module, or None for the one that goes with the data.
        model: the model in training.
        spec: what the data are.
        batch: of the data; names the tasks where there are several.
        teacher: to distil from.

    Raises:
        UsageError: a teacher for targets that are no classes.
    """
    if teacher is not None and getattr(spec, "target_kind", None) in ("float", "multi"):
        raise UsageError(
            "teacher= distils the logits of classes, and the targets of these data are numbers or several "
            "tasks; leave teacher out"
        )
    if given is None:
        given = "distillation" if teacher is not None else infer_loss_name(spec)
    target = batch["target"]
    return build_loss(
        given,
        model=model,
        teacher=teacher,
        tasks=infer_task_losses(target) if isinstance(target, Mapping) else None,
        penalty=config.quantization_penalty,
        label_smoothing=config.label_smoothing,
        temperature=config.distillation_temperature,
        alpha=config.distillation_alpha,
    )


def monitor_of(config: TrainingConfig, task: str, loss: Loss) -> str:
    """The figure that decides which weights are best: the one named, else accuracy or the loss.

    Accuracy for classification: a network that is sure of itself gets a higher loss from the same number
    of mistakes, and stopping on that returns the worse classifier.
    """
    if config.monitor is not None:
        return config.monitor
    return "accuracy" if task == "classification" and loss.kind == "classification" else "loss"


def early_stopping_of(config: TrainingConfig, monitor: str) -> EarlyStopping:
    """The rule of a run; without early stopping it never stops and still knows the best."""
    return EarlyStopping(config.patience if config.early_stopping else None, monitor)


def schedule_of(config: TrainingConfig, total_steps: int) -> Schedule:
    """The learning rate over a run of ``total_steps`` optimizer steps."""
    phases = {
        key: getattr(config, key)
        for key in (
            "warmup_steps",
            "acceleration_steps",
            "consolidation_steps",
            "acceleration_multiplier",
            "consolidation_multiplier",
        )
    }
    return build_schedule(config.schedule, total_steps, **phases)


def planned_steps(config: TrainingConfig, train_loader: Any) -> int:
    """Optimizer steps of the whole run.

    Raises:
        UsageError: neither the data nor the options say.
    """
    try:
        steps = config.epochs * len(train_loader)
    except TypeError:
        if config.max_steps is None:
            raise UsageError("the data have no length, so the run has none either; give max_steps=") from None
        return config.max_steps
    return min(steps, config.max_steps or steps)


def estimated_seconds(
    config: TrainingConfig, model: nn.Module, batch: Mapping[str, Any], steps: int, device: torch.device
) -> float:
    """Length of a run of ``steps`` optimizer steps without compilation."""
    inputs = to_device(batch["input"], device)
    with eval_mode(model):
        seconds = hardware.estimate_seconds(model, inputs, steps, device)
    return min(seconds, config.max_seconds or float("inf"))


def compiles(
    config: TrainingConfig, model: nn.Module, batch: Mapping[str, Any], steps: int, device: torch.device
) -> tuple[bool, str]:
    """Whether the model of a run of ``steps`` optimizer steps is compiled, and why."""
    seconds = None
    if config.compile == "auto":
        seconds = estimated_seconds(config, model, batch, steps, device)
    return hardware.resolve_compile(config.compile, device, seconds)


def free_name(output_dir: str, model: nn.Module) -> str:
    """A name for a run that has none: the model's class and the time, numbered where that is taken."""
    first = f"{type(model).__name__.lower()}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([first], (f"{first}-{i}" for i in itertools.count(2)))
    return next(n for n in names if not (Path(output_dir) / n).exists())


def loop_config(config: TrainingConfig, use_amp: bool, amp_dtype: torch.dtype) -> LoopConfig:
    """Lengths and intervals of a run, as the loop takes them."""
    return LoopConfig(
        epochs=config.epochs,
        max_steps=config.max_steps,
        max_seconds=config.max_seconds,
        micro_batch_size=config.micro_batch_size,
        eval_interval=config.eval_interval,
        log_interval=config.log_interval,
        checkpoint_interval=config.checkpoint_interval,
        use_amp=use_amp,
        amp_dtype=amp_dtype,
        nonfinite=config.nonfinite,
        max_nonfinite=config.max_nonfinite,
        loss_spikes=config.loss_spikes,
        spike_threshold=config.spike_threshold,
    )


def resolved_config(config: TrainingConfig, grokfast: GrokfastConfig | None, **found: Any) -> TrainingConfig:
    """The options as config.yaml records them: what they left open is settled.

    Args:
        config: the options.
        grokfast: the filter; None for none.
        found: options by name, with the values that were settled.
    """
    return config.model_copy(
        update={
            **found,
            "use_grokfast": grokfast is not None,
            "grokfast_alpha": grokfast.alpha if grokfast else None,
            "grokfast_lambda": grokfast.lambda_reg if grokfast else None,
            "filter": grokfast.filter if grokfast else None,
            "overwrite": False,
            "auto_resume": False,
            "resume_from": None,
        }
    )


def has_samples(source: Any) -> bool:
    """Whether the source has samples to split, as opposed to ready batches."""
    if isinstance(source, (str, Path)) or (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        return not isinstance(source, (list, tuple)) or all(isinstance(s, (str, Path)) for s in source)
    return False


def cost_of_determinism(model: nn.Module, loss: Loss, batch: Mapping[str, Any], device: torch.device) -> str:
    """What ``deterministic=True`` costs here, in words: a forward and backward of a batch, both ways.

    Weights, gradients and generators stay as they are. The ways take turns, the fastest of five counts.

    Raises:
        UsageError: a part of the model has no deterministic kernel.
    """
    own = to_device(batch, device)
    before = random_state()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with eval_mode(model), torch.enable_grad():
        for turn in range(12):
            with hardware.deterministic_kernels(turn % 2 == 1):
                began = time.perf_counter()
                try:
                    loss(model(own["input"]), own).backward()
                except RuntimeError as error:
                    if "deterministic" not in str(error):
                        raise
                    said = str(error).splitlines()[0]
                    raise UsageError(
                        f"deterministic=True cannot be kept: {said}; replace that part, or leave it out"
                    ) from error
                hardware.wait_for(device)
            seconds[turn % 2 == 1].append(time.perf_counter() - began)
    for parameter in [*model.parameters(), *loss.parameters()]:
        parameter.grad = None
    set_random_state(before)
    plain, deterministic = min(seconds[False][1:]), min(seconds[True][1:])
    return (
        f"deterministic=True: forward and backward take {deterministic / plain:.2f} times as long "
        f"({deterministic * 1e3:.3g} ms against {plain * 1e3:.3g} ms for a batch)"
    )
