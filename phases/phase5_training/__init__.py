"""How a 1.58-bit network is trained: pipeline, data, optimizer, filter, validation, records.

The names below are imported when they are first used: reading a run's records must not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "BitNetOptimizer": "phase5_training.pipeline.bitnet_optimizer",
    "CallbackRegistry": "phase5_training.events",
    "DataConfig": "phase5_training.pipeline.data_config",
    "DataError": "phase5_training.errors",
    "DataLoaderFactory": "phase5_training.pipeline.data_loader",
    "EarlyStopping": "phase5_training.pipeline.validation",
    "Event": "phase5_training.events",
    "ForgeError": "phase5_training.errors",
    "GrokfastConfig": "phase5_training.pipeline.grokfast_trainer",
    "GrokfastScheduler": "phase5_training.pipeline.scheduler",
    "GrokfastSchedulerConfig": "phase5_training.pipeline.scheduler",
    "GrokfastTrainer": "phase5_training.pipeline.grokfast_trainer",
    "LoopConfig": "phase5_training.loop_config",
    "Phase": "phase5_training.phases",
    "PhaseSchedule": "phase5_training.phases",
    "RealTimeValidator": "phase5_training.pipeline.validation",
    "RunFailed": "phase5_training.errors",
    "TrainingLoop": "phase5_training.pipeline.training_loop",
    "TrainingPipeline": "phase5_training.factory",
    "TrainingResult": "phase5_training.results",
    "UsageError": "phase5_training.errors",
    "bitnet_classification_loss": "phase5_training.pipeline.loss_functions",
    "create_training_pipeline": "phase5_training.factory",
    "grokfast_distillation_loss": "phase5_training.pipeline.loss_functions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
