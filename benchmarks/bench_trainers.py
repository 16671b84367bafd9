"""One network in four loops: Forge, transformers.Trainer, Lightning, Accelerate; processor time of a step.

    python benchmarks/bench_trainers.py --record benchmarks/records/trainers.jsonl

Ternary layers of Forge, AdamW at one rate, gradients clipped, batches of 64 from one Dataset in memory, each
tool's own way of loading it, figures every 10 steps; no checkpoints, no trackers, no report. A turn trains
few steps and then many; the difference is that of the steps alone. Processor time of one thread, not wall
time: other work on the machine counts little. The network is small, so that the loop shows.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import interleave
from phase4_bitnet import convert_model_to_bitnet

FEW, MANY, BATCH, RATE, LOG = 50, 450, 64, 1e-3, 10


class Digits(Dataset[dict[str, Tensor]]):
    """Random features and classes of the size of the handwritten digits."""

    def __init__(self, names: tuple[str, str]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.names = names
        self.x = torch.randn(1438, 64, generator=generator)
        self.y = torch.randint(10, (1438,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(self.names, (self.x[index], self.y[index]), strict=True))


class Network(nn.Module):
    """Two ternary hidden layers; gives the loss too, as transformers.Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        self.layers = convert_model_to_bitnet(nn.Sequential(*layers))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.layers(x)
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def forge(steps: int, folder: str) -> None:
    """Our loop."""
    from phase5_training import create_training_pipeline, report

    # Drawn at the end of a run, and the longer for a longer one: no part of a step.
    with mock.patch.object(report, "write_report", return_value=Path(folder)):
        create_training_pipeline(
            Network(),
            Digits(("input", "target")),
            output_dir=folder,
            experiment_name=f"run{steps}",
            overwrite=True,
            max_steps=steps,
            batch_size=BATCH,
            optimizer="adamw",
            learning_rate=RATE,
            weight_decay=0.01,
            schedule="constant",
            warmup_steps=0,
            log_interval=LOG,
            checkpoint_interval=10**6,
            device="cpu",
            compile=False,
            use_amp=False,
            progress="quiet",
            validation_split=0.0,
        ).run()


def transformers(steps: int, folder: str) -> None:
    """transformers.Trainer."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        logging_steps=LOG,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=Network(), args=args, train_dataset=Digits(("x", "labels")))
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def lightning(steps: int, folder: str) -> None:
    """Lightning's Trainer."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.network(**batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=RATE)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=LOG,
        gradient_clip_val=1.0,
        default_root_dir=folder,
    ).fit(Module(), DataLoader(Digits(("x", "labels")), BATCH, shuffle=True))


def accelerate(steps: int, folder: str) -> None:
    """A loop of one's own with Accelerate."""
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    loader = DataLoader(Digits(("x", "labels")), BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    done = 0
    while done < steps:
        for batch in loader:
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done % LOG == 0:
                loss.item()
            if done == steps:
                break


LOOPS = {loop.__name__: loop for loop in (forge, transformers, lightning, accelerate)}


def prepare(name: str, few: int, many: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """A turn of a loop: microseconds of processor time a step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def seconds(steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            LOOPS[name](steps, folder)
            return time.process_time() - began

    seconds(few)
    return lambda: 1e6 * (seconds(many) - seconds(few)) / (many - few), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs=2, default=(FEW, MANY), help="few and many")
    parser.add_argument("--record", help="JSON lines to append to")
    found = parser.parse_args()
    about = interleave.timing_circumstances(1)
    workers = {name: interleave.Worker(prepare, name, *found.steps) for name in LOOPS}
    times: dict[str, list[float]] = {name: [] for name in LOOPS}
    for _ in range(found.rounds):
        for name, worker in workers.items():
            times[name].append(worker.turn())
    rows = []
    for name, own in times.items():
        workers[name].close()
        row = {"loop": name, "us_a_step": [round(x, 1) for x in own]}
        row["ratio_to_forge"] = interleave.ratio_quartiles(own, times["forge"])
        rows.append(row | about)
        print(name, [round(q) for q in interleave.quartiles(own)], "us;", row["ratio_to_forge"], "of forge's")
    if found.record:
        interleave.write_rows(Path(found.record), rows)


if __name__ == "__main__":
    main()
