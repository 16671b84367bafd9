"""How a 1.58-bit network is trained: pipeline, data, optimizer, filter, validation, records."""

from phase5_training.errors import DataError, ForgeError, RunFailed, UsageError
from phase5_training.events import CallbackRegistry, Event
from phase5_training.factory import TrainingPipeline, create_training_pipeline
from phase5_training.loop_config import LoopConfig
from phase5_training.phases import Phase, PhaseSchedule
from phase5_training.pipeline.bitnet_optimizer import BitNetOptimizer
from phase5_training.pipeline.data_config import DataConfig
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.pipeline.grokfast_trainer import GrokfastConfig, GrokfastTrainer
from phase5_training.pipeline.loss_functions import bitnet_classification_loss, grokfast_distillation_loss
from phase5_training.pipeline.scheduler import GrokfastScheduler, GrokfastSchedulerConfig
from phase5_training.pipeline.training_loop import TrainingLoop
from phase5_training.pipeline.validation import EarlyStopping, RealTimeValidator
from phase5_training.results import TrainingResult

__all__ = [
    "BitNetOptimizer",
    "CallbackRegistry",
    "DataConfig",
    "DataError",
    "DataLoaderFactory",
    "EarlyStopping",
    "Event",
    "ForgeError",
    "GrokfastConfig",
    "GrokfastScheduler",
    "GrokfastSchedulerConfig",
    "GrokfastTrainer",
    "LoopConfig",
    "Phase",
    "PhaseSchedule",
    "RealTimeValidator",
    "RunFailed",
    "TrainingLoop",
    "TrainingPipeline",
    "TrainingResult",
    "UsageError",
    "bitnet_classification_loss",
    "create_training_pipeline",
    "grokfast_distillation_loss",
]
