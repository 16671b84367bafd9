"""The data of a run: opened, split, and held against each other."""

from dataclasses import dataclass
from typing import Any

from phase5_training.assembly import data_config, has_samples
from phase5_training.config import TrainingConfig
from phase5_training.distributed import Ranks
from phase5_training.pipeline.data_loader import DataLoaderFactory
from phase5_training.quarantine import Quarantine


@dataclass(frozen=True)
class OpenedData:
    """Loaders of both splits, and the records that were left out.

    Args:
        train: of the training data.
        validation: of the held-out records or the validation data; None without.
        dropped: records left out of either.
    """

    train: Any
    validation: Any
    dropped: Quarantine


def open_data(config: TrainingConfig, train: Any, validation: Any, ranks: Ranks) -> OpenedData:
    """Open the data of a run.

    Args:
        config: the options.
        train, validation: as they were given; without ``validation`` some of ``train`` is held out.
        ranks: each of several reads its part of every batch.

    Raises:
        DataError: files that cannot be read.
    """
    ready_batches = not has_samples(train)
    data = data_config(config, split=validation is None and not ready_batches, ranks=ranks)
    dropped = Quarantine()
    loader, held_out = DataLoaderFactory.create_loaders(train, data, quarantine=dropped.append)
    if validation is not None:
        held_out = DataLoaderFactory.create_loader(
            validation,
            data,
            split="validation",
            spec=None if ready_batches else loader.spec,
            quarantine=dropped.append,
        )
    return OpenedData(loader, held_out, dropped)
