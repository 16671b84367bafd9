"""Holds what users write in their programs, so that a change of it is deliberate."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import phase4_bitnet
import phase5_training
from phase4_bitnet.layers import BitLinear
from phase5_training import (
    BitNetOptimizer,
    DataConfig,
    GrokfastConfig,
    GrokfastScheduler,
    GrokfastSchedulerConfig,
    GrokfastTrainer,
    LoopConfig,
    RealTimeValidator,
    TrainingLoop,
    TrainingResult,
)
from phase5_training.checkpoint import CheckpointStore
from phase5_training.config import TrainingConfig
from phase5_training.events import Event
from phase5_training.loop_state import LoopState
from phase5_training.phases import Phase, PhaseSchedule
from phase5_training.results import result_metrics

PHASE4 = """
BitConv1d BitConv2d BitEmbedding BitLinear PackedBitConv1d PackedBitConv2d PackedBitEmbedding
PackedBitLinear build_model convert_model_to_bitnet load_compressed_model load_packed_model load_session
pack_model save_compressed_model ternary_layers
"""
PHASE5 = """
BitNetOptimizer CallbackRegistry DataConfig DataError DataLoaderFactory EarlyStopping Event ForgeError
GrokfastConfig GrokfastScheduler GrokfastSchedulerConfig GrokfastTrainer LoopConfig Phase PhaseSchedule
RealTimeValidator RunFailed TrainingLoop TrainingPipeline TrainingResult UsageError
bitnet_classification_loss create_training_pipeline grokfast_distillation_loss
"""
EVENTS = """
fit_start epoch_start phase_change out_of_memory step_end log nonfinite_step loss_spike rollback
eval_start eval_end early_stop
checkpoint_saved epoch_end fit_end
"""
OPTIONS = """
model model_options train_data_path val_data_path experiment_name output_dir overwrite auto_resume
task batch_size micro_batch_size num_workers data_timeout cache_size streaming quality_threshold
validation_split shuffle drop_last max_length tokenizer invalid_records
record_policies max_dropped_share num_classes input_kind pad_id
pack_text bucket_by_length inputs_path targets_path cache_mb memory_limit_mb
epochs max_steps max_seconds optimizer learning_rate weight_decay betas momentum ns_steps ns_coefficients loss
quantization_penalty label_smoothing distillation_temperature distillation_alpha seed deterministic
use_bitnet weight_bits quantization_mode activation_bits backward float_layers
use_grokfast grokfast_alpha grokfast_lambda filter grokfast_window grokfast_unit_gain
grokfast_warmup_steps grokfast_phase_gains grokfast_average schedule warmup_steps acceleration_steps
consolidation_steps acceleration_multiplier consolidation_multiplier
use_amp amp_dtype gradient_clipping max_grad_norm nonfinite max_nonfinite loss_spikes spike_threshold
device parallel gradient_compression compile memory_budget
eval_interval early_stopping patience monitor checkpoint_interval keep_checkpoints resume_from
log_interval progress target trackers tracker_project
"""


def test_names_of_the_packages():
    assert sorted(phase4_bitnet.__all__) == sorted(PHASE4.split())
    assert sorted(phase5_training.__all__) == sorted(PHASE5.split())
    for package in (phase4_bitnet, phase5_training):
        assert all(hasattr(package, name) for name in package.__all__)


def test_names_of_the_events():
    assert sorted(e.value for e in Event) == sorted(EVENTS.split())


def test_names_of_the_options_and_that_help_shows_them():
    assert sorted(TrainingConfig.model_fields) == sorted(OPTIONS.split())
    shown = inspect.signature(phase5_training.create_training_pipeline).parameters
    assert set(OPTIONS.split()) <= set(shown)
    assert shown["batch_size"].default == TrainingConfig().batch_size


def test_every_option_is_described():
    undescribed = [name for name, field in TrainingConfig.model_fields.items() if not field.description]
    assert not undescribed


# -- the methods and keys that programs use, by hand and without a pipeline ---------------------------

PARAMETERS = {
    "DataLoaderFactory.create_loader": "source config",
    "TrainingLoop.train": "train_loader loss_fn val_loader",
    "TrainingLoop.validate": "val_loader loss_fn",
    "TrainingLoop.save_checkpoint": "",
    "BitNetOptimizer.step": "",
    "BitNetOptimizer.quantize_weights": "weights",
    "GrokfastTrainer.train_step": "batch loss_fn",
    "GrokfastTrainer.get_current_phase": "",
    "GrokfastTrainer.get_phase_multiplier": "",
    "GrokfastScheduler.get_lr": "",
    "GrokfastScheduler.step": "",
    "RealTimeValidator.validate_step": "batch loss_fn",
    "RealTimeValidator.run_validation": "val_loader loss_fn",
    "TrainingPipeline.setup": "",
    "TrainingPipeline.train": "",
    "TrainingPipeline.register_callback": "event callback",
    "bitnet_classification_loss": "logits targets model",
    "grokfast_distillation_loss": "student_logits teacher_logits targets temperature",
}
DATA = """
batch_size num_workers cache_size streaming quality_threshold validation_split seed shuffle drop_last
max_length tokenizer task invalid_records record_policies
max_dropped_share num_classes input_kind reads pad_id shuffle_buffer memory_limit_mb timeout
rank world_size
pack_text bucket_by_length inputs_path targets_path cache_mb
"""
cross_entropy = nn.functional.cross_entropy


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_methods(name):
    """These names, in this order; what follows them has a default or is optional."""
    found = phase5_training
    for part in name.split("."):
        found = getattr(found, part)
    wanted = PARAMETERS[name].split()
    names = [p for p in inspect.signature(found).parameters if p != "self"]
    assert names[: len(wanted)] == wanted
    rest = [p for n, p in inspect.signature(found).parameters.items() if n not in (*wanted, "self")]
    assert all(p.default is not p.empty for p in rest)


def test_fields_of_the_data():
    assert sorted(f.name for f in dataclasses.fields(DataConfig)) == sorted(DATA.split())


@pytest.fixture
def parts():
    """Return a model, an optimizer over it and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), BitLinear(8, 8), nn.Linear(8, 3))
    optimizer = BitNetOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    return model, optimizer, {"input": torch.randn(6, 4), "target": torch.tensor([0, 1, 2] * 2)}


def test_the_trainer_by_hand(parts):
    model, optimizer, batch = parts
    config = GrokfastConfig(alpha=0.95, lambda_reg=3.0)
    trainer = GrokfastTrainer(model, optimizer, config, PhaseSchedule(total_steps=20_000))
    assert (trainer.alpha, trainer.lambda_reg) == (0.95, 3.0)
    assert trainer.get_current_phase() is Phase.WARMUP
    assert trainer.get_phase_multiplier() == 1.0
    report = trainer.train_step(batch, cross_entropy)
    assert set(report) == {"loss", "phase", "multiplier"}
    assert (report["phase"], report["multiplier"]) == ("warmup", 1.0)
    assert isinstance(report["loss"], float)


def test_the_scheduler_by_hand(parts):
    _, optimizer, _ = parts
    scheduler = GrokfastScheduler(optimizer, GrokfastSchedulerConfig(base_lr=0.1))
    first = scheduler.get_lr()
    assert scheduler.step() is None
    assert 0 < first < scheduler.get_lr() == optimizer.param_groups[0]["lr"]


def test_the_validator_by_hand(parts):
    model, _, batch = parts
    validator = RealTimeValidator(model)
    one = validator.validate_step(batch, cross_entropy)
    assert {"loss", "accuracy"} <= set(one)
    whole = validator.run_validation([batch, batch], cross_entropy)
    assert {"avg_loss", "avg_accuracy"} <= set(whole)
    assert whole["avg_loss"] == pytest.approx(one["loss"])
    assert whole["avg_accuracy"] == pytest.approx(one["accuracy"])


def test_the_optimizer_by_hand(parts):
    model, optimizer, _ = parts
    codes, scale = optimizer.quantize_weights(model[1].weight)
    assert set(codes.unique().tolist()) <= {-1, 0, 1}
    assert (codes.shape, scale.shape) == (model[1].weight.shape, ())


def test_the_loop_by_hand(parts, tmp_path):
    model, optimizer, batch = parts
    store = CheckpointStore(folder=tmp_path)
    loop = TrainingLoop(
        model, optimizer, LoopConfig(epochs=2), validator=RealTimeValidator(model), checkpoints=store
    )
    state = loop.train([batch] * 3, cross_entropy, [batch])
    assert (state.step, state.epoch) == (6, 2)
    figures = loop.validate([batch], cross_entropy)
    assert figures["avg_loss"] == state.validation["loss"]
    assert loop.save_checkpoint() is None  # this step has one
    state.step += 1
    assert loop.save_checkpoint() in store.paths()


def test_what_the_next_phase_takes(parts):
    result = TrainingResult(success=True, model=parts[0], metrics=result_metrics(LoopState()))
    given = result.to_phase6()
    assert set(given) == {"success", "model", "metrics"}
    assert {"final_accuracy", "training_time_hours", "epochs_completed", "best_val_loss"} <= set(
        given["metrics"]
    )
    assert {"final_loss", "best_accuracy"} <= set(given["metrics"])
