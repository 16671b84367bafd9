"""How data are read and put into batches: the options of a loader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from phase5_training.errors import UsageError
from phase5_training.pipeline.formats.batches import BatchStream
from phase5_training.pipeline.formats.policies import Policy, check_policies
from phase5_training.pipeline.formats.source import ReadOptions, Source
from phase5_training.pipeline.formats.spec import normalize_task
from phase5_training.pipeline.formats.text import make_tokenizer

DEFAULT_BLOCK = 256  # tokens of a training sequence cut from a stream when max_length is not set


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How data are read and put into batches.

    Args:
        batch_size: samples per batch.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        cache_size: parsed samples kept in memory, where a sample has to be parsed at each use; none are where
            the data have more samples than these, or it is 0.
        streaming: never hold a whole file; shuffle within windows of ``shuffle_buffer`` records.
        quality_threshold: records whose metadata state a lower quality are left out.
        validation_split: share of the records kept for validation, in [0, 1).
        seed: fixes the order of every epoch and the split.
        shuffle: a new order each epoch; False reads in file order. Validation is never shuffled.
        drop_last: leave out the last batch of an epoch when it is smaller than the others.
        max_length: tokens a sequence may have; longer ones are cut, and counted.
        tokenizer: "bytes", or the path of a tokenizer.json.
        task: "classification", "regression", "next_token", "multi_task", or None to infer it.
        invalid_records: "fail" stops at the first bad record, "drop" leaves bad records out.
        record_policies: "drop" or "fail" for single checks: unreadable, quality, nonfinite, shape, kind,
            target, label, empty, and too_long and duplicate, which are checked only where named here.
        max_dropped_share: largest share of the records that may be left out, in [0, 1].
        num_classes: labels beyond it are bad; None takes the classes that occur.
        input_kind: "tokens" or "features" where whole numbers could be either; "auto" takes lists of
            whole numbers for tokens.
        reads: "tokens" or "features", what the model reads where that is known; data of the other kind are
            refused, at once where their first records tell.
        pad_id: token with which to pad lists of token ids of different lengths; None refuses them.
        pack_text: join texts end to end and cut them into blocks of ``max_length`` tokens, for next-token
            training without padding.
        bucket_by_length: make batches of texts of like length, so that less of them is padding.
        inputs_path: array of the inputs in an HDF5 file, where it is not /dataset/inputs.
        targets_path: array or group of the targets in an HDF5 file.
        cache_mb: MiB that kept samples may take.
        shuffle_buffer: records shuffled together when streaming.
        memory_limit_mb: larger files are mapped or indexed, not loaded.
        timeout: seconds to wait for a batch of the worker processes.
        rank: which part of each batch this process takes, from 0.
        world_size: processes that divide each batch of ``batch_size`` samples among them.

    Example:
        >>> DataConfig(batch_size=64, validation_split=0.1).batch_size
        64
    """

    batch_size: int = 32
    num_workers: int = 0
    cache_size: int = 1000
    streaming: bool = False
    quality_threshold: float = 0.0
    validation_split: float = 0.0
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    max_length: int | None = None
    tokenizer: str | Path = "bytes"
    task: str | None = None
    invalid_records: Policy = "fail"
    record_policies: Mapping[str, Policy] = field(default_factory=dict)
    max_dropped_share: float = 0.2
    num_classes: int | None = None
    input_kind: Literal["auto", "features", "tokens"] = "auto"
    reads: Literal["features", "tokens"] | None = None
    pad_id: int | None = None
    pack_text: bool = False
    bucket_by_length: bool = False
    inputs_path: str | None = None
    targets_path: str | None = None
    cache_mb: int = 64
    shuffle_buffer: int = 4096
    memory_limit_mb: int = 1024
    timeout: float = 600.0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1), ("num_workers", 0), ("cache_size", 0), ("seed", 0), ("max_length", 1),
            ("pad_id", 0), ("shuffle_buffer", 1), ("memory_limit_mb", 0), ("rank", 0), ("world_size", 1),
            ("cache_mb", 1),
            ("num_classes", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("max_length", "pad_id", "num_classes"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}={value!r} is not a whole number of at least {least}")
        if self.rank >= self.world_size:
            raise UsageError(f"rank={self.rank} of world_size={self.world_size}; ranks count from 0")
        if self.batch_size < self.world_size:
            raise UsageError(
                f"batch_size={self.batch_size} is fewer than one sample for each of {self.world_size} ranks; "
                f"it counts all ranks together: use a multiple of {self.world_size}"
            )
        if not 0 <= self.validation_split < 1:
            raise UsageError(f"validation_split={self.validation_split} is not in [0, 1); 0.1 keeps a tenth")
        if not self.timeout > 0:
            raise UsageError(f"timeout={self.timeout} is not above 0; 600 waits ten minutes for a batch")
        if not math.isfinite(self.quality_threshold):
            raise UsageError(f"quality_threshold={self.quality_threshold} is not a finite number")
        for name, known in (
            ("invalid_records", ("fail", "drop")),
            ("input_kind", ("auto", "features", "tokens")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name}={getattr(self, name)!r} is unknown; wanted one of {', '.join(known)}"
                )
        if not 0 <= self.max_dropped_share <= 1:
            raise UsageError(f"max_dropped_share={self.max_dropped_share} is not in [0, 1]; 0.2 is a fifth")
        check_policies(self.record_policies, self.max_length)
        normalize_task(self.task)

    def read_options(self) -> ReadOptions:
        """How files are opened."""
        return ReadOptions(
            streaming=self.streaming, window=self.shuffle_buffer,
            block_length=self.max_length or DEFAULT_BLOCK, memory_limit=self.memory_limit_mb << 20,
            inputs_path=self.inputs_path, targets_path=self.targets_path,
            tokenizer=make_tokenizer(self.tokenizer),
        )  # fmt: skip

    def check_format(self, source: Source | BatchStream) -> None:
        """Refuse options that these data cannot follow.

        Raises:
            UsageError: names the option.
        """
        for name in ("inputs_path", "targets_path"):
            if getattr(self, name) is not None and source.format != "hdf5":
                raise UsageError(
                    f"{name}={getattr(self, name)!r} names an array of an HDF5 file, and {source.paths[0]} "
                    f"holds {source.format}; leave it out"
                )
