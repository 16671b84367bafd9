"""The data of a run: opened, split, and held against each other."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phase5_training.assembly import data_config, has_samples
from phase5_training.callbacks import fitting_mode
from phase5_training.config import TrainingConfig
from phase5_training.distributed import Ranks
from phase5_training.pipeline.data_loader import DataLoaderFactory, names_files
from phase5_training.pipeline.formats import data_files
from phase5_training.pipeline.formats.reading import listening
from phase5_training.quarantine import Quarantine
from phase5_training.reading_view import ReadingProgress


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
    with _shown(config, [train, validation], ranks):
        return _opened(config, train, validation, ranks)


def _opened(config: TrainingConfig, train: Any, validation: Any, ranks: Ranks) -> OpenedData:
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


@contextlib.contextmanager
def _shown(config: TrainingConfig, sources: Sequence[Any], ranks: Ranks) -> Iterator[None]:
    """Show a long first pass over files, in the way that the run is going to be shown."""
    if config.progress == "quiet" or not ranks.first:
        yield
        return
    files = [file for source in sources if names_files(source) for file in data_files(source)]
    sizes = {str(file): file.stat().st_size for file in files}
    show = ReadingProgress(config.progress == "auto" and fitting_mode() == "live", sizes)
    with contextlib.closing(show), listening(show):
        yield
