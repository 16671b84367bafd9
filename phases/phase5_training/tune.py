"""``learning_rate="auto"`` and ``forge tune``: rate, decay, optimizer and filter from short paired trials.

A trial is the run itself with fewer steps: same pipeline, seed, data order and first weights, and the whole
schedule squeezed into the trial's length. Trials that are cut out of a long schedule favor rates that are too
small (Wu et al. 2018, "Understanding Short-Horizon Bias in Stochastic Meta-Optimization",
arXiv:1803.02021); so the survivors of a round start again at the next length instead of going on.

The rounds are successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) over rates and optimizers,
then one paired comparison for the decay and the filter:

    round 1   optimizers x four rates           s steps each
    round 2   the best three                   3s steps each
    round 3   the winner with other decays     3s steps each
              and with the filter switched

Where the training loss has to judge (:func:`judged_by`) the decay stays: less would always look better.

All of it takes at most a tenth of the steps of the run it serves. With a budget too small for that, round 1
is left out and round 2 begins with three rates of the default optimizer. Muon is tried where the run itself
would take it ("auto", :func:`phase5_training.assembly.optimizer_of`): on a small batch its steps cost many
times those of AdamW, which a loss after equal steps does not show.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import yaml

from phase5_training.config import TrainingConfig
from phase5_training.defaults import grokfast_config, rates
from phase5_training.errors import RunFailed, UsageError
from phase5_training.hardware import resolve_amp, resolve_device
from phase5_training.records import now, plain, write_atomic

SHARE = 10  # a run pays one part in so many for its tuning
SHORTEST = 10  # steps; less shows nothing but the warmup
FACTORS = (1.0, 3.0, 1 / 3, 1 / 9)  # of the default rate, the likeliest first
DECAY_FACTORS = (10.0, 0.1)
KEPT, GROWTH = 3, 3
# Validation decides where it has moved by at least this share of what training has.
MOVED = 0.1
COLUMNS = "round, steps, training loss, validation loss, options"
_LENGTHS = ("warmup_steps", "acceleration_steps", "consolidation_steps")

Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one short run showed.

    Args:
        round: 1, 2 or 3.
        options: learning_rate, weight_decay, optimizer, use_grokfast.
        steps: optimizer steps taken. seconds: with setup and validation.
        first_loss: training loss of the first step. train_loss: mean over the last quarter of the steps.
        untrained_loss, val_loss: validation loss before the first step and after the last; None without
            validation data.
        error: why it has no figures; empty when it has.
    """

    round: int
    options: Options
    steps: int
    seconds: float = 0.0
    first_loss: float | None = None
    train_loss: float | None = None
    untrained_loss: float | None = None
    val_loss: float | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a search has found, and what it cost.

    Args:
        options: what to train with.
        trials: all of them, in the order in which they ran.
        total_steps: of the run that it serves.
        seconds: of wall time, everything included.
        judged_by: "validation", or "training" where validation did not move or there is none.
    """

    options: Options
    trials: list[Trial] = field(default_factory=list)
    total_steps: int
    seconds: float
    judged_by: str

    @property
    def steps(self) -> int:
        """Optimizer steps of all trials together."""
        return sum(trial.steps for trial in self.trials)

    def sentence(self) -> str:
        """What was chosen, and at which cost, in one line."""
        return (
            f"learning_rate=auto chose {in_short(self.options)} by the {self.judged_by} loss of "
            f"{len(self.trials)} trials: {self.steps} steps in {self.seconds:.1f} s, "
            f"{self.steps / self.total_steps:.1%} of the run's {self.total_steps} steps"
        )

    def events(self) -> list[dict[str, Any]]:
        """Rows for a run's events.jsonl: each trial, and what they cost together."""
        trials = [{"event": "tuning_trial", **trial_row(trial)} for trial in self.trials]
        return [*trials, {"event": "tuned", **self.record()}]

    def record(self) -> dict[str, Any]:
        """The cost and the choice, as a row of a record."""
        return {
            "tuning_steps": self.steps,
            "tuning_seconds": round(self.seconds, 3),
            "tuning_trials": len(self.trials),
            "judged_by": self.judged_by,
            **self.options,
        }


def tune(
    config: TrainingConfig,
    total_steps: int,
    make: Callable[[TrainingConfig], Any],
    tell: Callable[[Trial], None] | None = None,
) -> Tuning:
    """Find the options of a run by short trials of it.

    Args:
        config: of the run; see :func:`search`.
        total_steps: of the run that is served.
        make: the pipeline of a configuration, on the data of the run.
        tell: called with each trial when it is over.

    Returns:
        What was found, and what it cost.

    Raises:
        UsageError: as :func:`search`.
    """
    # "auto" is a measurement: paired trials are to be in one precision.
    device = resolve_device(config.device)
    use_amp, _ = resolve_amp(config.use_amp, config.amp_dtype, device)
    config = config.model_copy(update={"use_amp": use_amp})
    with tempfile.TemporaryDirectory() as folder:
        kept = config.model_copy(update={"output_dir": folder})
        if config.optimizer == "auto":
            config = config.model_copy(update={"optimizer": _optimizer_worth_trying(kept, total_steps, make)})

        def run(options: Options, steps: int) -> Trial:
            return run_trial(make, trial_config(kept, options, steps, total_steps), options)

        return search(config, total_steps, run, tell)


def search(
    config: TrainingConfig,
    total_steps: int,
    run: Callable[[Options, int], Trial],
    tell: Callable[[Trial], None] | None = None,
) -> Tuning:
    """Find the options of a run by short trials.

    Args:
        config: of the run. What it names of optimizer, weight_decay and the filter stays; a number as
            learning_rate is where the search for the rate begins.
        total_steps: of the run that is served.
        run: makes one trial of ``(options, steps)``.
        tell: called with each trial when it is over.

    Raises:
        UsageError: the run is too short to spare a tenth for trials, or no trial gave a finite loss.
    """
    started = time.perf_counter()
    candidates = _rates(config)
    long, short = _lengths(total_steps, len(candidates), KEPT + len(_variants(config, candidates[0])))
    trials: list[Trial] = []
    judged: list[str] = []

    def tried(options: Options, number: int, steps: int) -> Trial:
        trials.append(replace(run(options, steps), round=number))
        if tell is not None:
            tell(trials[-1])
        return trials[-1]

    def ranked(found: Sequence[Trial]) -> list[Trial]:
        by = judged_by(found)
        judged.append(by)
        finished = [t for t in found if math.isfinite(score(t, by))]
        return sorted(finished, key=lambda t: score(t, by))

    if short:
        first = ranked([tried(options, 1, short) for options in candidates])
        candidates = [trial.options for trial in first[:KEPT]]
    else:
        candidates = candidates[:KEPT]
    second = ranked([tried(options, 2, long) for options in candidates])
    if not second:
        reasons = [trial.error for trial in trials if trial.error] or ["the loss is not finite"]
        raise UsageError(f"no trial of learning_rate=auto could be trained ({reasons[0]}); check the data")
    winner = second[0]
    found = [(key, tried(options, 3, long)) for key, options in _variants(config, winner.options)]
    by = judged_by([winner, *(trial for _, trial in found)])
    judged.append(by)
    best = dict(winner.options)
    # By the training loss less decay would always be better.
    for key in ("weight_decay", "use_grokfast") if by == "validation" else ("use_grokfast",):
        better = [t for k, t in found if k == key and score(t, by) < score(winner, by)]
        if better:
            best[key] = min(better, key=lambda t: score(t, by)).options[key]
    return Tuning(
        options=best,
        trials=trials,
        total_steps=total_steps,
        seconds=time.perf_counter() - started,
        judged_by=judged[-1],
    )


def judged_by(trials: Sequence[Trial]) -> str:
    """The loss that ranks trials of one length.

    Where a network first learns its samples by heart, the validation loss of a short trial rises with
    everything that trains well, and ranking by it would choose the rate that learns least.

    Example:
        >>> trial = Trial(round=1, options={}, steps=9, first_loss=4.0, train_loss=1.0, val_loss=3.0)
        >>> judged_by([replace(trial, untrained_loss=4.0)]), judged_by([replace(trial, untrained_loss=3.1)])
        ('validation', 'training')
    """
    training = max((_fall(t.first_loss, t.train_loss) for t in trials), default=0.0)
    validation = max((_fall(t.untrained_loss, t.val_loss) for t in trials), default=0.0)
    return "validation" if validation > MOVED * training and validation > 0 else "training"


def score(trial: Trial, by: str) -> float:
    """The figure that is to be low; infinity for a trial without one."""
    value = trial.val_loss if by == "validation" else trial.train_loss
    return value if value is not None and math.isfinite(value) and not trial.error else math.inf


def trial_config(config: TrainingConfig, options: Options, steps: int, total_steps: int) -> TrainingConfig:
    """The configuration of a trial: the run's own, its lengths in steps squeezed to ``steps``."""
    lengths = {
        name: round(getattr(config, name) * steps / total_steps)
        for name in _LENGTHS
        if getattr(config, name) is not None
    }
    return config.model_copy(
        update={
            **options,
            **lengths,
            "max_steps": steps,
            "max_seconds": None,
            "epochs": max(config.epochs, steps),
            "eval_interval": max(1, steps // 4),
            "log_interval": max(1, steps // 4),
            "checkpoint_interval": total_steps + 1,
            "early_stopping": False,
            "compile": False,
            "progress": "quiet",
            "experiment_name": "trial",
            "overwrite": True,
            "auto_resume": False,
        }
    )


def run_trial(make: Callable[[TrainingConfig], Any], config: TrainingConfig, options: Options) -> Trial:
    """One trial: set up, train and validate; nothing is kept.

    Args:
        make: the pipeline of a configuration.
        config: made by :func:`trial_config`.
        options: what the trial tries.
    """
    started = time.perf_counter()
    trial = Trial(round=0, options=options, steps=0)
    pipeline, untrained = _set_up(make, config), None
    try:
        loop = pipeline.loop
        loop.checkpoints = None
        if loop.validator is not None:
            # A large validation set must not cost more than the steps.
            loop.validator.max_batches = max(4, loop.config.max_steps // 4)
            untrained = loop.validate(pipeline.val_loader, pipeline.loss)["loss"]
        state = loop.train(pipeline.train_loader, pipeline.loss, pipeline.val_loader)
        trial = replace(
            trial,
            steps=state.step,
            first_loss=state.first_loss,
            untrained_loss=untrained,
            train_loss=state.train_loss,
            val_loss=(state.validation or {}).get("loss"),
        )
    except RunFailed as error:
        trial = replace(trial, steps=pipeline.loop.state.step, error=str(error))
    return replace(trial, seconds=time.perf_counter() - started)


def check_tunable(config: TrainingConfig, optimizer: Any) -> None:
    """Whether trials can choose for this run.

    Raises:
        UsageError: the optimizer is an object, or the length of the run in steps is open.
    """
    if not isinstance(optimizer, str):
        raise UsageError(
            f"learning_rate='auto' makes an optimizer for every trial, and optimizer is a "
            f"{type(optimizer).__name__}; give its name, or leave learning_rate out"
        )
    if config.max_seconds is not None and config.max_steps is None:
        raise UsageError(
            f"learning_rate='auto' takes a tenth of the run's steps, and max_seconds={config.max_seconds:g} "
            "does not say how many there are; give max_steps= as well"
        )


def write_tuned(
    tuning: Tuning, values: Mapping[str, Any], source: str, output: str | Path
) -> tuple[Path, Path]:
    """Write the YAML that ``forge train`` takes, and all trials as JSON lines beside it.

    Args:
        tuning: what was found.
        values: the options of ``source``, which keep their order.
        source: the file they came from, for the comments.
        output: the YAML file; the trials go to ``<stem>.trials.jsonl``.

    Returns:
        Both paths.
    """
    output = Path(output)
    lines = [
        f"Written by `forge tune {source}` on {now()}.",
        f"Chosen by the {tuning.judged_by} loss of {len(tuning.trials)} trials; {tuning.steps} steps in "
        f"{tuning.seconds:.1f} s, {tuning.steps / tuning.total_steps:.1%} of the run's "
        f"{tuning.total_steps} steps.",
        f"Tried ({COLUMNS}):",
    ]
    lines += [f"  {in_columns(trial)}" for trial in tuning.trials]
    body = yaml.safe_dump(plain({**values, **tuning.options}), sort_keys=False, allow_unicode=True, width=100)
    text = "".join(f"# {' '.join(line.split()) if line[0] != ' ' else line}\n" for line in lines) + body
    output.parent.mkdir(parents=True, exist_ok=True)
    trials = output.with_name(f"{output.stem}.trials.jsonl")
    write_atomic(output, text.encode())
    rows = [trial_row(trial) for trial in tuning.trials]
    write_atomic(trials, b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return output, trials


def trial_row(trial: Trial) -> dict[str, Any]:
    """A trial as a row of a record: its options beside its figures."""
    row = {key: value for key, value in plain(trial).items() if key != "options"}
    return {**row, **plain(trial.options)}


def in_columns(trial: Trial) -> str:
    """A trial in one line, as ``COLUMNS`` says."""
    losses = "  ".join("-" if v is None else f"{v:.4g}" for v in (trial.train_loss, trial.val_loss))
    failed = f"  failed: {trial.error}" if trial.error else ""
    return f"{trial.round}  {trial.steps}  {losses}  {in_short(trial.options)}{failed}"


def in_short(options: Mapping[str, Any]) -> str:
    """Options in one line.

    Example:
        >>> in_short({"optimizer": "muon", "learning_rate": 1 / 300, "use_grokfast": False})
        'optimizer=muon learning_rate=0.00333 use_grokfast=False'
    """
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in options.items())


def _optimizer_worth_trying(
    config: TrainingConfig, total_steps: int, make: Callable[[TrainingConfig], Any]
) -> str:
    """What is left of "auto": "adamw" where the run itself would not take Muon.

    Trials are ranked by the loss after equal numbers of steps and cannot see what a step costs.
    """
    options = {"learning_rate": None, "use_grokfast": False}
    pipeline = _set_up(make, trial_config(config, options, SHORTEST, total_steps))
    return "adamw" if pipeline.run_directory.read_config()["optimizer"] == "adamw" else "auto"


def _set_up(make: Callable[[TrainingConfig], Any], config: TrainingConfig) -> Any:
    """The pipeline of a trial, set up in silence: what is to be said, the run itself will say, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(config).setup()


def _rates(config: TrainingConfig) -> list[Options]:
    """The candidates of the first round; the three that a small budget tries come first."""
    names = ("muon", "adamw") if config.optimizer == "auto" else (config.optimizer,)
    candidates: list[Options] = []
    for name in names:
        rate, decay = rates(config, name)
        candidates += [
            {
                "optimizer": name,
                # Three digits: nobody can tell more of a rate, and someone will type it in.
                "learning_rate": float(f"{rate * factor:.3g}"),
                "weight_decay": decay,
                "use_grokfast": grokfast_config(config) is not None,
            }
            for factor in FACTORS
        ]
    return candidates


def _variants(config: TrainingConfig, winner: Options) -> list[tuple[str, Options]]:
    """(what is changed, options) of the third round: what the configuration leaves open."""
    found: list[tuple[str, Options]] = []
    if config.weight_decay is None:
        for factor in DECAY_FACTORS:
            decay = float(f"{winner['weight_decay'] * factor:.3g}")
            found.append(("weight_decay", {**winner, "weight_decay": decay}))
    if config.use_grokfast is None and not winner["use_grokfast"]:
        found.append(("use_grokfast", {**winner, "use_grokfast": True}))
    return found


def _lengths(total_steps: int, candidates: int, most: int) -> tuple[int, int]:
    """(steps of a long trial, of a short one or 0 for no first round), within a tenth of the run.

    Args:
        total_steps: of the run.
        candidates: of the first round.
        most: long trials there may be.
    """
    budget = total_steps // SHARE
    short = budget // (candidates + GROWTH * most)
    if candidates > KEPT and short >= SHORTEST:
        return GROWTH * short, short
    long = budget // most
    if long < SHORTEST:
        least = SHORTEST * most
        raise UsageError(
            f"the run has {total_steps} steps and spares a tenth for learning_rate='auto', {budget} steps; "
            f"the smallest search takes {least}: train {least * SHARE} steps or more, or name a "
            "learning_rate (for a bench, --tuned FILE)"
        )
    return long, 0


def _fall(first: float | None, last: float | None) -> float:
    """By how much a loss has fallen; 0 where either is missing or not finite."""
    if first is None or last is None or not (math.isfinite(first) and math.isfinite(last)):
        return 0.0
    return max(0.0, first - last)
