"""The command line: parsing and exit codes. What the verbs do is in ``commands`` and ``demo``."""

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from phase5_training.errors import (
    ForgeError,
    OtherRankFailed,
    UsageError,
    in_one_line,
    nearest_match,
    printable,
)
from phase5_training.flags import Parser, add_config_flags, config_values
from phase5_training.signals import Interrupted, Terminated

USAGE = """forge: train 1.58-bit networks

  forge demo                       train on a real task and compare with float, under 4 minutes
  forge train [CONFIG.yaml] ...    train from a file, flags, or both
  forge resume RUN                 continue a run from its newest checkpoint, or from RUN/checkpoints/step-N
  forge evaluate RUN               measure the best weights of a run
  forge inspect-data FILE ...      counts, shapes, ranges, classes, quality, bad records of data files
  forge tune CONFIG.yaml           find rate, decay, optimizer and filter for a run, in a tenth of its steps
  forge bench [CONFIG.yaml]        time to a target: Forge against float, plain and tuned
  forge export RUN --format F      write the model for transformers, llama.cpp, onnxruntime or torch
  forge report RUN [RUN ...]       write the report of a run, or of several side by side
  forge watch RUN                  show a run that another process trains
  forge track RUN TRACKER ...      mirror a run into wandb, tensorboard or trackio, afterwards
  forge write-data TASK            write a real task's data files, to train on

`forge VERB --help` lists the flags. --debug shows the traceback of an error.
Exit code: 0 done, 1 the run failed, 2 a mistake in the call or the data, 130 or 143 interrupted and saved.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after ``forge``; None takes those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    if os.getcwd() not in sys.path:
        # A package.module:function is looked for where the command is called, after all that is installed.
        sys.path.append(os.getcwd())
    rank = int(os.environ.get("RANK", "0"))
    name = f"forge (rank {rank})" if rank else "forge"
    with contextlib.ExitStack() as inside:
        if rank:  # of several processes the first speaks
            inside.enter_context(contextlib.redirect_stdout(inside.enter_context(open(os.devnull, "w"))))
        return _guarded(words, debug, name)


def _guarded(words: Sequence[str], debug: bool, name: str) -> int:
    """Call a verb; an error becomes one line that begins with ``name``, and an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return _call(words)
    except OtherRankFailed as error:
        return error.exit_code
    except (ForgeError, OSError, MemoryError) as error:
        return _failed(error, f"{name}: {_one_line(error)}", debug)
    except (Interrupted, Terminated) as stopped:
        _tell(stopped.result)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        kind = type(error).__name__
        return _failed(error, f"{name}: unexpected {kind}: {_one_line(error)}; --debug shows where", debug)


def _failed(error: BaseException, line: str, debug: bool) -> int:
    """Say what failed, to torchrun too, and give the exit code."""
    code: int = getattr(error, "exit_code", 1)
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun shows it when it ends, in place of a link to its manual; the form is that of its `record`.
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with open(place, "w", encoding="utf-8") as file:
            json.dump({"message": told}, file)
    if debug:
        traceback.print_exc()
    elif code != UsageError.exit_code or os.environ.get("LOCAL_RANK", "0") == "0":
        # A mistake is the same for all processes of a machine. One write, as they share the terminal.
        sys.stderr.write(f"{line}\n")
    return code


def _call(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        from importlib import metadata

        print(metadata.version("forge-training"))
        return 0
    verb = words[0]
    if verb not in VERBS:
        near = nearest_match(verb, VERBS)
        hint = f"did you mean '{near}'?" if near else f"use one of {', '.join(VERBS)}"
        raise UsageError(f"unknown command {verb!r}; {hint}")
    return VERBS[verb](words[1:])


def _warn(message: Warning | str, *rest: Any, **more: Any) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"forge: warning: {in_one_line(str(message))}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return in_one_line(str(error)) or type(error).__name__


def _demo(words: Sequence[str]) -> int:
    parser = Parser("forge demo", description="Train on a real task and compare with float.")
    parser.add_argument("--output-dir", default="runs", help="folder for the runs; default runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and split")
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    found = parser.parse_strictly(words)
    from phase5_training.demo import run_demo

    run_demo(found.output_dir, seed=found.seed, quiet=found.quiet)
    return 0


def _train(words: Sequence[str]) -> int:
    parser = Parser(
        "forge train",
        usage="forge train [CONFIG.yaml] [--option value ...]",
        description="Train from a YAML file, flags, or both; flags win. Every key of the file is a flag.",
    )
    parser.add_argument("config", nargs="?", help="YAML file with one option per line")
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    add_config_flags(parser)
    found = parser.parse_strictly(words)
    overrides = config_values(found)
    if found.quiet:
        overrides["progress"] = "quiet"
    from phase5_training.commands import train

    return _tell(train(found.config, overrides))


def _resume(words: Sequence[str]) -> int:
    from phase5_training.commands import resume
    from phase5_training.config import RESUME_OPTIONS

    parser = Parser("forge resume", description="Continue a run from its newest checkpoint that can be read.")
    parser.add_argument("run", help="folder of the run, or of one of its checkpoints")
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    add_config_flags(parser, RESUME_OPTIONS)
    found = parser.parse_strictly(words)
    overrides = config_values(found)
    if found.quiet:
        overrides["progress"] = "quiet"
    return _tell(resume(found.run, overrides))


def _evaluate(words: Sequence[str]) -> int:
    parser = Parser("forge evaluate", description="Measure the best weights of a run.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--data", nargs="+", help="data to measure on; default the run's validation data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    found = parser.parse_strictly(words)
    from phase5_training.commands import evaluate

    data = found.data[0] if found.data and len(found.data) == 1 else found.data
    figures = evaluate(found.run, data, found.device)
    if found.json:
        print(json.dumps(figures))
    else:
        print(_figures({k: v for k, v in figures.items() if not k.startswith("avg_")}))
    return 0


def _inspect_data(words: Sequence[str]) -> int:
    parser = Parser(
        "forge inspect-data",
        description="Show what data files hold: counts, shapes, ranges, class balance, quality, samples, and "
        "the records that training would leave out.",
    )
    parser.add_argument("data", nargs="+", help="files, folders or patterns of one format")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--samples", type=int, default=3, help="records to show; default 3")
    parser.add_argument("--quarantine", help="JSON lines to write every bad record to")
    add_config_flags(parser, INSPECT_OPTIONS)
    found = parser.parse_strictly(words)
    from phase5_training.commands import inspect_files

    inspect_files(
        found.data,
        config_values(found),
        samples=found.samples,
        as_json=found.json,
        quarantine=found.quarantine,
    )
    return 0


def _tune(words: Sequence[str]) -> int:
    parser = Parser(
        "forge tune",
        description="Find learning rate, weight decay, optimizer and filter for a run by short trials, in at "
        "most a tenth of its steps. What the file names of optimizer, decay and filter stays.",
    )
    parser.add_argument("config", help="YAML file of the run, as for `forge train`")
    parser.add_argument("--output", help="YAML file to write; default CONFIG-tuned.yaml beside it")
    found = parser.parse_strictly(words)
    from phase5_training.commands import tune
    from phase5_training.tune import COLUMNS, in_columns

    print(f"short trials: {COLUMNS}")
    tuning, written, trials = tune(found.config, found.output, lambda t: print(in_columns(t), flush=True))
    print(tuning.sentence())
    print(f"trials: {trials}")
    print(f"train with: forge train {written}")
    return 0


def _bench(words: Sequence[str]) -> int:
    from pathlib import Path

    parser = Parser(
        "forge bench",
        description="Train with several recipes on the same model, data and batch, and compare the time and "
        "steps to a target that is held.",
    )
    parser.add_argument("config", nargs="?", help="YAML file of a run with training and validation data")
    parser.add_argument("--task", help="a built-in comparison instead, as modular_mul, digits or python_text")
    parser.add_argument("--recipes", nargs="+", help="default plain float float_muon naive forge")
    parser.add_argument("--attribution", action="store_true", help="add weights x filter x int8 x tuned")
    parser.add_argument("--seeds", type=int, default=5, help="how many; default 5")
    parser.add_argument(
        "--first-seed", type=int, help="the first of them; default 0, or the first after those tuned on"
    )
    parser.add_argument(
        "--target", nargs="+", help="figures to hold, or a recipe whose held figure is the target"
    )
    parser.add_argument("--full", action="store_true", help="go on after the target, to the end of the run")
    parser.add_argument("--tuned", help="JSON lines of an earlier bench, whose tuned figures are taken")
    parser.add_argument("--cap-steps", type=int, help="length of each run; default that of the task or file")
    parser.add_argument("--cap-seconds", type=float, help="most seconds a run may take")
    parser.add_argument("--output-dir", default="runs", help="folder for the runs; default runs")
    parser.add_argument(
        "--record", help="JSON lines to append every row to; default bench.jsonl by the report"
    )
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    found = parser.parse_strictly(words)
    from phase5_training.bench import run_bench

    run_bench(found.config, found.task, record=Path(found.record) if found.record else None, **{
        name: getattr(found, name)
        for name in ("recipes", "attribution", "seeds", "first_seed", "target", "full", "tuned", "cap_steps",
                     "cap_seconds", "output_dir", "quiet")
    })  # fmt: skip
    return 0


def _export(words: Sequence[str]) -> int:
    parser = Parser(
        "forge export",
        description="Write the best weights of a run for other tools, and compare what they read with it.",
    )
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--format", required=True, help="huggingface, gguf, onnx or torch")
    parser.add_argument("--output", help="file or folder to write; default in RUN/export/")
    parser.add_argument("--tensor-type", help="gguf: TQ2_0 (default), TQ1_0 or F16")
    parser.add_argument("--linear-class", help="huggingface: autobitlinear (default) or bitlinear")
    parser.add_argument("--data", nargs="+", help="data to compare outputs on; default the run's")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    found = parser.parse_strictly(words)
    from phase5_training.commands import export

    report = export(
        found.run,
        found.format,
        found.output,
        tensor_type=found.tensor_type,
        linear_class=found.linear_class,
        data=found.data,
        overwrite=found.overwrite,
    )
    print("\n".join(report.lines()))
    return 0


def _report(words: Sequence[str]) -> int:
    parser = Parser("forge report", description="Write the report of a run, or of several side by side.")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--output", help="file to write; default report.html in the run's folder")
    found = parser.parse_strictly(words)
    from pathlib import Path

    from phase5_training.report import write_report
    from phase5_training.run_folder import open_run

    paths = [open_run(folder).path for folder in found.runs]
    print(write_report(paths, Path(found.output) if found.output else None))
    return 0


def _watch(words: Sequence[str]) -> int:
    parser = Parser("forge watch", description="Show a run that another process trains, until it ends.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--plain", action="store_true", help="lines instead of a live view")
    found = parser.parse_strictly(words)
    from phase5_training.run_folder import open_run
    from phase5_training.watch import RunWatcher

    try:
        return RunWatcher(open_run(found.run), "lines" if found.plain else "auto").follow()
    except KeyboardInterrupt:
        return 0  # the run is another process and goes on


def _track(words: Sequence[str]) -> int:
    parser = Parser(
        "forge track",
        description="Mirror a run into trackers; `forge train --trackers NAME` does so while it goes on.",
    )
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("trackers", nargs="+", help="wandb, tensorboard or trackio")
    parser.add_argument("--project", default="forge", help="that W&B and trackio list it in; default forge")
    found = parser.parse_strictly(words)
    from phase5_training.run_folder import open_run
    from phase5_training.trackers import check_trackers
    from phase5_training.trackers.mirror import mirror

    run = open_run(found.run)
    check_trackers(found.trackers)
    for name in found.trackers:
        print(f"{name}: {mirror(run, name, found.project)} rows of {run.path / 'metrics.jsonl'}")
    return 0


def _write_data(words: Sequence[str]) -> int:
    parser = Parser("forge write-data", description="Write a real task's data files; nothing is downloaded.")
    parser.add_argument(
        "task", help="modular_arithmetic, digits, python_text, breast_cancer, wine or diabetes"
    )
    parser.add_argument(
        "--format", default="json", help="json, jsonl, hdf5, pickle, npz, npy, safetensors or bin"
    )
    parser.add_argument("--output", default="data", help="folder; default data")
    found = parser.parse_strictly(words)
    from phase5_training.tasks import load_task

    for path in load_task(found.task).write(found.output, found.format):
        print(path)
    return 0


def _tell(result: Any) -> int:
    """Print a run's result; the exit code of one that came to its end."""
    shown = {k: v for k, v in result.metrics.items() if k in _SHOWN and v is not None}
    print(f"{result.stop_reason} at step {result.metrics['steps']}: {_figures(shown)}")
    print(f"report: {result.run_dir / 'report.html'}")
    if result.notice:
        print(f"note: {result.notice}")
    if result.success:
        print(f"model: {result.run_dir / 'best'}")
    else:
        print(f"continue with: forge resume {result.run_dir}")
    return 0


INSPECT_OPTIONS = (
    "task", "streaming", "quality_threshold", "max_length", "tokenizer", "num_classes",
    "input_kind", "pad_id", "inputs_path", "targets_path",
)  # fmt: skip

_SHOWN = (
    "final_loss",
    "final_accuracy",
    "best_val_loss",
    "best_accuracy",
    "perplexity",
    "bits_per_byte",
    "mse",
    "r2",
    "training_time_seconds",
)


def _figures(values: dict[str, Any]) -> str:
    shown = {printable(key): value for key, value in values.items() if value is not None}
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": _demo,
    "train": _train,
    "resume": _resume,
    "evaluate": _evaluate,
    "inspect-data": _inspect_data,
    "tune": _tune,
    "bench": _bench,
    "export": _export,
    "report": _report,
    "track": _track,
    "watch": _watch,
    "write-data": _write_data,
}
