"""A run on disk: the folder, its files, and how they survive a killed process.

    runs/<experiment>/  config.yaml  metrics.jsonl  events.jsonl  quarantine.jsonl  bad_batches.jsonl
                        checkpoints/  best/  report.html  result.json  trackers/

``metrics.jsonl`` is the truth about a run; everything else that shows figures is derived from it.
Lines are appended with one write each, so a killed process leaves at most one unfinished line, at
the end: it is ignored on reading and removed by the next append. ``config.yaml``, ``result.json``
and ``report.html`` are replaced whole: a reader sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson
import yaml

from phase5_training.errors import DataError, UsageError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
QUARANTINE = "quarantine.jsonl"
BAD_BATCHES = "bad_batches.jsonl"
RESULT = "result.json"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
BEST = "best"
TRACKERS = "trackers"
EXPORT = "export"
RUN_FILES = (CONFIG, METRICS, EVENTS, QUARANTINE, BAD_BATCHES, RESULT, REPORT)
RUN_ENTRIES = (*RUN_FILES, CHECKPOINTS, BEST, TRACKERS, EXPORT)

_JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


class RunDirectory:
    """The folder of one run and the only code that writes its records.

    Args:
        path: the folder of a run that exists; use :meth:`create` to start one.

    Example:
        >>> import tempfile
        >>> run = RunDirectory.create(tempfile.mkdtemp(), "digits")
        >>> run.append_metrics({"kind": "train", "step": 10, "loss": float("nan")})
        >>> run.read_metrics()
        [{'kind': 'train', 'step': 10, 'loss': None}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @classmethod
    def create(
        cls,
        output_dir: str | os.PathLike[str],
        name: str,
        resume: bool = False,
        overwrite: bool = False,
    ) -> RunDirectory:
        """Make the folder of a new run, or open the one to resume.

        Args:
            output_dir: the folder that holds all runs; made when absent.
            name: the experiment's name, which becomes the folder's name.
            resume: open a run that exists instead of starting one.
            overwrite: delete the records of a run of that name first. Only a run's own entries are
                deleted; a folder with anything else in it is left alone and refused.

        Returns:
            The run's directory, empty unless resumed.

        Raises:
            UsageError: the name cannot be a folder's name, the folder is taken, or there is no run
                to resume.
        """
        if resume and overwrite:
            raise UsageError("resume=True and overwrite=True were both given; choose one of them")
        run = cls(Path(output_dir) / _checked_name(name))
        if resume:
            if not run.exists():
                raise UsageError(f"{run.path} holds no run to resume; leave out resume or check the name")
            for left in run.path.glob(".*.tmp"):
                if left.is_file():  # a killed write_atomic left it; folders are their writer's to recover
                    left.unlink()
            return run
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            present = sorted(entry.name for entry in run.path.iterdir())
        except (FileExistsError, NotADirectoryError):
            raise UsageError(
                f"{run.path} cannot be made: a file is in the way; use another output_dir or experiment_name"
            ) from None
        foreign = [entry for entry in present if entry not in RUN_ENTRIES and not _is_temporary(entry)]
        if foreign:
            raise UsageError(
                f"{run.path} is not empty and holds {foreign[0]!r}, which is not part of a run; "
                "use another experiment_name or output_dir"
            )
        if present and not overwrite:
            raise UsageError(
                f"{run.path} already holds a run; continue it with `forge resume {run.path}`, "
                "or use another experiment_name, or overwrite=True to delete it first"
            )
        for entry in present:
            target = run.path / entry
            shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
        return run

    def exists(self) -> bool:
        """Whether the folder holds a run: a configuration or metrics are in it."""
        return (self.path / CONFIG).is_file() or (self.path / METRICS).is_file()

    @property
    def name(self) -> str:
        """The experiment's name: the folder's."""
        return self.path.resolve().name

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints; made by whoever writes the first one."""
        return self.path / CHECKPOINTS

    @property
    def best(self) -> Path:
        """The folder of the best weights."""
        return self.path / BEST

    @property
    def report(self) -> Path:
        """The path of the report."""
        return self.path / REPORT

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl and hand it to the operating system.

        Args:
            row: names to figures; tensors and arrays of one element become numbers, and NaN and the
                infinities become null, since JSON has no word for them.
        """
        _append_line(self.path / METRICS, row)

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Append one event to events.jsonl, adding ``time`` (UTC, ISO 8601) unless it has one."""
        _append_line(self.path / EVENTS, {"time": now(), **event})

    def append_quarantine(self, record: Mapping[str, Any]) -> None:
        """Append one dropped data record to quarantine.jsonl; ``reason`` is the key reports count by."""
        _append_line(self.path / QUARANTINE, record)

    def append_bad_batch(self, batch: Mapping[str, Any]) -> None:
        """Append one batch to bad_batches.jsonl: step, epoch, sample ids, and what was bad about it."""
        _append_line(self.path / BAD_BATCHES, batch)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl in the order written; an unfinished last line is left out."""
        return _read_lines(self.path / METRICS)

    def read_events(self) -> list[dict[str, Any]]:
        """All events in the order written; an unfinished last line is left out."""
        return _read_lines(self.path / EVENTS)

    def read_quarantine(self) -> list[dict[str, Any]]:
        """All dropped data records in the order written; an unfinished last line is left out."""
        return _read_lines(self.path / QUARANTINE)

    def read_bad_batches(self) -> list[dict[str, Any]]:
        """All batches with bad numbers in the order written; an unfinished last line is left out."""
        return _read_lines(self.path / BAD_BATCHES)

    def truncate_metrics(
        self,
        step: int,
        epoch: int | None = None,
        *,
        logged: int | None = None,
        validated: int | None = None,
    ) -> int:
        """Drop the rows past a step, so that a resumed run does not report those steps twice.

        Args:
            step: the optimizer step of the checkpoint that is resumed; rows of that step stay.
            epoch: the epoch in progress there: rows that report its end go, since it ends once more.
            logged: the last step logged there, if not ``step``: later logs go.
            validated: the same for validations.

        Returns:
            How many rows of metrics.jsonl were dropped.
        """
        last = {
            "train": step if logged is None else logged,
            "validation": step if validated is None else validated,
        }

        def stays(row: Mapping[str, Any]) -> bool:
            if row.get("kind") == "epoch" and epoch is not None and row["epoch"] >= epoch:
                return False
            return not isinstance(row.get("step"), int) or row["step"] <= last.get(str(row.get("kind")), step)

        return self._keep(METRICS, stays)

    def truncate_bad_batches(self, step: int, rollbacks: int) -> None:
        """Drop the bad batches that a resumed run finds again.

        Args:
            step: the last step logged in the checkpoint that is resumed.
            rollbacks: how often the run had gone back to a checkpoint by then; what it found before that
                stays, whatever the step.
        """
        self._keep(BAD_BATCHES, lambda row: (row["rollbacks"], row["step"]) <= (rollbacks, step))

    def _keep(self, name: str, stays: Callable[[Mapping[str, Any]], bool]) -> int:
        """Rewrite a file without the rows that do not stay; returns how many those were."""
        rows = _read_lines(self.path / name)
        kept = [row for row in rows if stays(row)]
        if len(kept) < len(rows):
            write_atomic(self.path / name, b"".join(_line(row) for row in kept))
        return len(rows) - len(kept)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace config.yaml, keys in the order given; infinities are kept, since YAML has them."""
        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=100)
        write_atomic(self.path / CONFIG, text.encode())

    def read_config(self) -> dict[str, Any]:
        """The run's configuration.

        Raises:
            FileNotFoundError: there is no config.yaml.
            DataError: it is not a YAML mapping.
        """
        path = self.path / CONFIG
        try:
            config = yaml.safe_load(path.read_bytes())
        except yaml.YAMLError as error:
            raise DataError(f"{path} is not YAML ({error}); restore it from a copy") from None
        if not isinstance(config, dict):
            found = type(config).__name__
            raise DataError(f"{path} holds a {found}, not a mapping; restore it from a copy")
        return config

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Replace result.json; NaN and the infinities become null."""
        write_atomic(self.path / RESULT, _json(result, orjson.OPT_INDENT_2) + b"\n")

    def read_result(self) -> dict[str, Any] | None:
        """The run's result, or None while it has none.

        Raises:
            DataError: result.json is not a JSON object.
        """
        path = self.path / RESULT
        try:
            result = orjson.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON ({error}); delete it and evaluate the run again") from None
        if not isinstance(result, dict):
            raise DataError(f"{path} holds no JSON object; delete it and evaluate the run again")
        return result


def machine() -> dict[str, Any]:
    """What a run's figures were measured on, for result.json and the report.

    Returns:
        ``cpu`` (model name), ``cores`` (usable by this process), ``memory_gb`` (GiB of RAM),
        ``platform``, ``python``, ``device`` (the accelerator's name, or "cpu"), ``torch``,
        ``versions`` (of the packages that matter to the figures).

    Example:
        >>> machine()["cores"] >= 1
        True
    """
    import torch  # here, so that reading records does not load torch

    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gb": _memory_gb(),
        "platform": f"{platform.system()} {platform.machine()} {'-'.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "device": device,
        "torch": torch.__version__,
        "versions": _versions(("forge-training", "numpy", "h5py", "orjson", "safetensors", "tokenizers")),
    }


def now() -> str:
    """The time in UTC to the second, ISO 8601, as events carry it."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def plain(value: Any) -> Any:
    """The value made of dict, list, str, int, float, bool and None only.

    Tensors and arrays become numbers or lists, paths and enums strings, dataclasses mappings, and
    anything unknown its ``str``. Text that UTF-8 cannot hold (a file name with stray bytes) gets
    replacement characters: a record must never fail to be written because of a name in it.

    Example:
        >>> plain({"path": Path("a") / "b", 3: (1, 2)})
        {'path': 'a/b', '3': [1, 2]}
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {plain(str(_key(key))): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # tensors, arrays and numpy scalars
        return plain(value.tolist())
    return plain(str(value))


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file whole: readers and a power cut see the old content or the new, never a mix."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the rename itself is durable once the folder is synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _key(key: Any) -> Any:
    return key.value if isinstance(key, Enum) else key


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not name.strip() or name in (".", ".."):
        raise UsageError(f"experiment_name={name!r} cannot name a folder; use letters, digits, '-' and '_'")
    if any(character in '/\\:*?"<>|' or not character.isprintable() for character in name):
        raise UsageError(
            f"experiment_name={name!r} has characters a folder's name cannot have everywhere; "
            "use letters, digits, '-' and '_'"
        )
    if len(name.encode("utf-8", "replace")) > 200:
        raise UsageError(f"experiment_name is {len(name)} characters long; use at most 200")
    return name


def _is_temporary(entry: str) -> bool:
    return entry.startswith(".") and entry.endswith(".tmp")


def _json(value: Mapping[str, Any], extra: int = 0) -> bytes:
    try:
        return orjson.dumps(value, option=_JSON_OPTIONS | extra)
    except TypeError:  # tensors, paths, text that is not UTF-8
        return orjson.dumps(plain(value), option=_JSON_OPTIONS | extra)


def _line(row: Mapping[str, Any]) -> bytes:
    return _json(row) + b"\n"


def _append_line(path: Path, row: Mapping[str, Any]) -> None:
    content = _line(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened anew each time (some 30 microseconds): nothing to close, and a file replaced by
    # truncate_metrics is never written to under its old handle.
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.lseek(handle, 0, os.SEEK_END)
        if size:
            os.lseek(handle, size - 1, os.SEEK_SET)
            if os.read(handle, 1) != b"\n":
                _repair_tail(path, handle)
        while content:  # one write, unless the disk took only a part of it
            content = content[os.write(handle, content) :]
    finally:
        os.close(handle)


def _repair_tail(path: Path, handle: int) -> None:
    """Finish or remove a last line without its newline."""
    content = path.read_bytes()
    start = content.rfind(b"\n") + 1
    if _parsed(content[start:]) is not None:
        os.write(handle, b"\n")
    else:
        os.ftruncate(handle, start)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = content.split(b"\n")
    tail = lines.pop()  # empty when the last line was finished
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if row is None:
            raise DataError(
                f"{path} line {number} is not a JSON object; only the last line may be unfinished: "
                "delete that line or restore the file"
            )
        rows.append(row)
    last = _parsed(tail)
    if last is not None:
        rows.append(last)
    return rows


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
