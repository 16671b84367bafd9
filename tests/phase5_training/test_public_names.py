"""Holds what users write in their programs, so that a change of it is deliberate."""

import inspect

import phase4_bitnet
import phase5_training
from phase5_training.config import TrainingConfig
from phase5_training.events import Event

PHASE4 = """
BitConv1d BitConv2d BitEmbedding BitLinear build_model convert_model_to_bitnet load_compressed_model
load_session save_compressed_model ternary_layers
"""
PHASE5 = """
BitNetOptimizer CallbackRegistry DataConfig DataError DataLoaderFactory EarlyStopping Event ForgeError
GrokfastConfig GrokfastScheduler GrokfastSchedulerConfig GrokfastTrainer LoopConfig Phase PhaseSchedule
RealTimeValidator RunFailed TrainingLoop TrainingPipeline TrainingResult UsageError
bitnet_classification_loss create_training_pipeline grokfast_distillation_loss
"""
EVENTS = """
fit_start epoch_start phase_change step_end log nonfinite_step eval_start eval_end early_stop
checkpoint_saved epoch_end fit_end
"""
OPTIONS = """
model model_options train_data_path val_data_path experiment_name output_dir overwrite auto_resume
task batch_size micro_batch_size num_workers cache_size streaming quality_threshold validation_split
shuffle drop_last max_length tokenizer invalid_records input_kind pad_id
epochs max_steps max_seconds optimizer learning_rate weight_decay loss quantization_penalty
label_smoothing distillation_temperature distillation_alpha seed
use_bitnet weight_bits quantization_mode activation_bits float_layers
use_grokfast grokfast_alpha grokfast_lambda filter schedule warmup_steps acceleration_steps
consolidation_steps acceleration_multiplier consolidation_multiplier
use_amp amp_dtype gradient_clipping max_grad_norm device compile
eval_interval early_stopping patience monitor checkpoint_interval keep_checkpoints log_interval progress
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
