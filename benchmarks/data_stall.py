"""How long the steps of real tasks wait for data; part ``stall`` of bench_data.py."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from interleave import quartiles

# About as many as are read together, or a multiple: what is read for steps that do not come counts too.
STALL_STEPS = {"digits": 512, "breast_cancer": 1024, "modular_mul": 150, "python_text": 300}


class ProcessorTime:
    """Processor seconds of making training batches, and of the steps between them.

    A wait that another program lengthens is the machine's: its share of a wall clock says little.
    """

    def __init__(self) -> None:
        self.making = 0.0
        self.steps: list[float] = []

    @contextlib.contextmanager
    def watch(self, loader: type) -> Iterator[None]:
        """Count what all loaders of this class do meanwhile."""
        made = loader.__iter__  # type: ignore[misc]

        def batches(own: Any) -> Iterator[Any]:
            found, asked, given = made(own), time.process_time(), None
            while True:
                if given is not None and own.split == "train":
                    self.steps.append(asked - given)
                batch = next(found, None)
                given = time.process_time()
                if own.split == "train":
                    self.making += given - asked
                if batch is None:
                    return
                yield batch
                asked = time.process_time()

        loader.__iter__ = batches  # type: ignore[misc]
        try:
            yield
        finally:
            loader.__iter__ = made  # type: ignore[misc]

    def share(self) -> float:
        """Of the time of all steps; a median step, since validation and saving lie between some."""
        steps = len(self.steps) * quartiles(self.steps)[1]
        return self.making / (self.making + steps)


def prepare_stall(name: str, steps: int, folder: Path, threads: int) -> Any:
    """A turn: a task of the suite, once for the wall clock and once for processor time.

    To read the latter is a call of the system, which would lengthen the waits of the former.
    """
    torch.set_num_threads(threads)
    from phase5_training import create_training_pipeline
    from phase5_training.contest import built_in
    from phase5_training.pipeline.data_loader import ForgeDataLoader

    options = built_in(name, str(folder), max_steps=steps).options
    data = [options.pop(key) for key in ("model", "train_data_path", "val_data_path")]

    def run() -> Path:
        result = create_training_pipeline(
            *data,
            output_dir=str(folder),
            experiment_name=name,
            early_stopping=False,
            overwrite=True,
            progress="quiet",
            **options,
        ).run()
        return Path(result.run_dir) / "metrics.jsonl"

    def turn() -> dict[str, Any]:
        rows = [json.loads(line) for line in run().read_text().splitlines()]
        clock = ProcessorTime()
        with clock.watch(ForgeDataLoader):
            run()
        return {
            "steps": steps,
            "batch_size": options["batch_size"],
            **stalls(rows, options["batch_size"]),
            "cpu_share": clock.share(),
        }

    return turn, {}


def stalls(rows: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """Of the log lines of a run: seconds of its steps, seconds in which they waited, shares line by line."""
    logged, last = [], 0
    for row in rows:
        if "data_wait_share" in row:
            logged.append((batch_size * (row["step"] - last) / row["samples_per_s"], row["data_wait_share"]))
            last = row["step"]
    seconds = sum(length for length, _ in logged)
    waited = sum(length * share for length, share in logged)
    return {
        "seconds": seconds, "waited_s": waited, "wait_share": waited / seconds,
        "shares": [round(share, 6) for _, share in logged],
    }  # fmt: skip
