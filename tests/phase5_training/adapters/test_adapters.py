"""Our layers, filter and phases in the trainers of others, held against the loop written out by hand."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oracles.grokfast import ema
from oracles.schedule import phase_table
from phase4_bitnet import convert_model_to_bitnet, ternary_layers
from phase5_training import BitNetOptimizer, GrokfastConfig, create_training_pipeline
from phase5_training.adapters.foreign_loop import ForeignLoop
from phase5_training.errors import UsageError
from phase5_training.pipeline.grokfast_trainer import GradientFilter

STEPS, RATE, CLIP = 12, 1e-2, 0.5
PHASES = {"warmup_steps": 3, "acceleration_steps": 3, "consolidation_steps": 2}
GROKFAST = GrokfastConfig(alpha=0.9, lambda_reg=0.5)


def by_hand(model: nn.Module, loss_of: Any, rates: list[float]) -> None:
    """Clip, g + lambda mu, AdamW; the layers derive their codes in each forward."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=0.0)
    seen: list[list[Any]] = [[] for _ in params]
    for rate in rates:
        optimizer.zero_grad()
        loss_of(model).backward()
        norm = sum(p.grad.double().square().sum() for p in params).sqrt()
        for p, gradients in zip(params, seen, strict=True):
            gradients.append((p.grad.double() * min(1.0, CLIP / (norm + 1e-6))).numpy())
            p.grad = torch.as_tensor(list(ema(gradients, 0.9, 0.5))[-1], dtype=torch.float32)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def planned_rates() -> list[float]:
    return [RATE * x for x in phase_table(*PHASES.values(), STEPS)]


def same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# -- transformers.Trainer ------------------------------------------------------------------------------


@pytest.fixture
def llama() -> nn.Module:
    """A small Llama as its class makes it; nothing is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return convert_model_to_bitnet(LlamaForCausalLM(LlamaConfig(**sizes, **heads)))


TEXT = torch.randint(0, 40, (12,), generator=torch.Generator().manual_seed(1)).tolist()


def text_data() -> Any:
    """One sentence many times, so that the order in which a trainer draws says nothing."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [TEXT] * 64, "labels": [TEXT] * 64})


def hf_trainer(model: nn.Module, folder: Path, callback: Any, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    options = {"max_steps": STEPS, "save_strategy": "no", **changes}
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=RATE,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=args, train_dataset=text_data(), callbacks=[callback])


def hf_callback() -> Any:
    from phase5_training.adapters.huggingface import BitNetCallback

    return BitNetCallback(GROKFAST, schedule="phases", **PHASES)


def test_transformers_trainer_takes_the_steps_of_the_loop_by_hand(llama: nn.Module, tmp_path: Path) -> None:
    plain = copy.deepcopy(llama)
    trainer = hf_trainer(llama, tmp_path, hf_callback())
    trainer.train()
    ids = torch.tensor([TEXT] * 4)
    by_hand(plain, lambda model: model(input_ids=ids, labels=ids).loss, planned_rates())
    same_weights(llama, plain)
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx(planned_rates(), rel=1e-6)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert not any(layer.codes_are_current for _, layer in ternary_layers(llama))


def test_transformers_trainer_resumes_filter_and_phases(llama: nn.Module, tmp_path: Path) -> None:
    whole = copy.deepcopy(llama)
    hf_trainer(whole, tmp_path / "whole", hf_callback()).train()
    saving = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 3}
    hf_trainer(copy.deepcopy(llama), tmp_path / "cut", hf_callback(), **saving).train()
    resumed = hf_trainer(llama, tmp_path / "cut", hf_callback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    same_weights(llama, whole)


def test_transformers_trainer_with_a_scheduler_that_cannot_follow(llama: nn.Module, tmp_path: Path) -> None:
    trainer = hf_trainer(llama, tmp_path, hf_callback())
    optimizer = torch.optim.AdamW(llama.parameters(), lr=RATE)
    trainer.optimizer = optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with pytest.raises(UsageError, match="cannot steer a CosineAnnealingLR"):
        trainer.train()


# -- Lightning -----------------------------------------------------------------------------------------


INPUT = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
TARGET = torch.randint(0, 4, (16,), generator=torch.Generator().manual_seed(3))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return convert_model_to_bitnet(nn.Sequential(*layers))


def lightning_module(model: nn.Module) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0)

    return Module()


def fit(
    model: nn.Module, folder: Path, callback: Any, *, checkpoint: str | None = None, **options: Any
) -> Any:
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        max_steps=options.pop("max_steps", STEPS),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
        **options,
    )
    data = torch.utils.data.DataLoader([(INPUT, TARGET)] * 4, batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        trainer.fit(lightning_module(model), data, ckpt_path=checkpoint)


def lightning_callback(**options: Any) -> Any:
    from phase5_training.adapters.lightning import BitNetCallback

    return BitNetCallback(GROKFAST, schedule="phases", max_grad_norm=CLIP, **PHASES, **options)


def cross_entropy(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(INPUT), TARGET)


def test_lightning_takes_the_steps_of_the_loop_by_hand(tmp_path: Path) -> None:
    model, plain = network(), network()
    fit(model, tmp_path, lightning_callback())
    by_hand(plain, cross_entropy, planned_rates())
    same_weights(model, plain)
    assert not any(layer.codes_are_current for _, layer in ternary_layers(model))


def test_lightning_resumes_filter_and_phases(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class SaveAtFive(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt")

    whole, resumed = network(), network()
    adapter = lightning_callback()
    adapter.on_train_batch_end = SaveAtFive().on_train_batch_end
    fit(whole, tmp_path, adapter)
    fit(resumed, tmp_path, lightning_callback(), checkpoint=str(tmp_path / "five.ckpt"))
    same_weights(resumed, whole)


def test_lightning_would_clip_after_the_filter(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"max_grad_norm=0\.5"):
        fit(network(), tmp_path, lightning_callback(), gradient_clip_val=0.5)


# -- Accelerate, and what all have in common ---------------------------------------------------------------


def test_a_loop_with_accelerate_needs_no_adapter() -> None:
    from accelerate import Accelerator

    model, plain = network(), network()
    accelerator = Accelerator(cpu=True)
    inner = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    wrapped = BitNetOptimizer(inner, model, gradient_filter=GradientFilter(GROKFAST), max_grad_norm=CLIP)
    model, optimizer = accelerator.prepare(model, wrapped)
    for _ in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model))
        optimizer.step()
    by_hand(plain, cross_entropy, [RATE] * STEPS)
    same_weights(model, plain)


@pytest.mark.parametrize("example", ["transformers", "lightning", "accelerator"])
def test_the_examples_of_the_guide_run_as_they_stand(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[3] / "docs" / "ecosystem.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if example in block)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    floats = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    theirs: dict[str, Any] = {
        "model": LlamaForCausalLM(LlamaConfig(**sizes)) if example == "transformers" else floats,
        "args": TrainingArguments(max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True),
        "data": text_data(),
        "module": lightning_module(floats),
        "loader": torch.utils.data.DataLoader([(INPUT, TARGET)] * 4, batch_size=None),
        "accelerator": Accelerator(cpu=True),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        exec(code.replace("max_steps=1000", "max_steps=3, accelerator='cpu'"), theirs)
    assert ternary_layers(theirs["module"].model if example == "lightning" else theirs["model"])


def test_codes_follow_the_steps_and_a_bad_gradient_leaves_the_average(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loop = ForeignLoop(GROKFAST)
    loop.begin(model, [optimizer], 0, lambda: 0)
    layer = next(layer for _, layer in ternary_layers(model))
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model).backward()
        loop.before(optimizer)
        optimizer.step()
        fresh = copy.deepcopy(layer)
        fresh.requantize_()
        assert torch.equal(layer.codes, fresh.codes)
        assert torch.equal(layer.scale, fresh.scale)
    average = optimizer.state[layer.weight]["slow_gradient"].clone()
    layer.weight.grad[0, 0] = float("inf")
    loop.before(optimizer)
    assert torch.equal(optimizer.state[layer.weight]["slow_gradient"], average)
    loop.end()
    assert not layer.codes_are_current


def test_a_first_step_that_is_not_finite_is_not_filtered():
    """A loop without a loss scaler steps all the same: there is no average to add then."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    loop = ForeignLoop(GrokfastConfig(filter="ademamix"))
    loop.begin(model, [optimizer], 0, lambda: 0)
    cross_entropy(model).backward()
    next(model.parameters()).grad.fill_(float("inf"))
    loop.before(optimizer)
    optimizer.step()
    assert not any("slow_gradient" in own for own in optimizer.state.values())
    loop.end()


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((GrokfastConfig(filter="auto"),), {}, "filter='auto' needs our own loop"),
        ((None, "phase"), {}, "did you mean 'phases'"),
        ((), {"warmup_steps": 3}, "give schedule='phases'"),
    ],
)
def test_mistakes_are_told_before_training(arguments: Any, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ForeignLoop(*arguments, **options)


def test_a_float_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="call convert_model_to_bitnet"):
        ForeignLoop().begin(model, [torch.optim.SGD(model.parameters())], 10, lambda: 0)


# -- data sets of Hugging Face, in our own loop ------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_a_dataset_of_datasets_trains_as_a_torch_dataset_does(form: str | None, tmp_path: Path) -> None:
    from datasets import Dataset

    inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(4))
    records = {"input": inputs.tolist(), "target": (inputs[:, 0] > 0).long().tolist()}
    ours = [{"input": x, "target": int(x[0] > 0)} for x in inputs]

    class TorchDataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(ours)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return ours[index]

    losses = []
    for name, data in (("theirs", Dataset.from_dict(records).with_format(form)), ("torch", TorchDataset())):
        options = {"epochs": 2, "output_dir": str(tmp_path), "experiment_name": name, "progress": "quiet"}
        pipeline = create_training_pipeline(network(), data, validation_split=0.25, **options)
        losses.append(pipeline.run().metrics["final_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
