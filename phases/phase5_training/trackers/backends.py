"""The libraries of the trackers: each takes rows of figures and writes files of its own.

W&B and TensorBoard write below ``RUN/trackers``, trackio into its own data base (``TRACKIO_DIR``). Each
library is imported in the process of its tracker, when the first row comes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
import warnings
from datetime import datetime
from typing import Any

from phase5_training.records import TRACKERS, RunDirectory

Figures = dict[str, float | int | str]
REACH_S = 3.0  # to find out whether W&B can be reached


class WandbTracker:
    """W&B: a run of the experiment's name in the project.

    ``WANDB_MODE`` decides between online and offline; without it, online where there is a key and the
    server can be reached, else offline. An offline run that is resumed is written anew, whole. Online, W&B
    goes on with the run it has, and takes no row of a step that it has already.
    """

    def __init__(self, run: RunDirectory, project: str) -> None:
        self.run, self.project = run, project
        self._folder = run.path / TRACKERS
        self._first_step = 0
        self._wandb_run: Any = None

    def begin(self) -> None:
        """Start the W&B run."""
        import wandb

        own = _own_id(self.run, "wandb")
        for left in (self._folder / "wandb").glob(f"offline-run-*-{own}"):
            shutil.rmtree(left)
        mode = os.environ.get("WANDB_MODE") or ("online" if _reaches_wandb() else "offline")
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_stats_pid=os.getppid(),  # the process that trains
        )
        options: dict[str, Any] = {
            "project": self.project,
            "name": self.run.name,
            "id": own,
            "dir": str(self._folder),
            "config": self.run.read_config(),
            "settings": settings,
        }
        try:
            # Offline, "allow" would only warn that nothing can be looked up.
            resume = {"resume": "allow"} if mode == "online" else {}
            self._wandb_run = wandb.init(mode=mode, **resume, **options)  # type: ignore[arg-type]
        except wandb.errors.CommError:
            if mode != "online" or os.environ.get("WANDB_MODE"):
                raise
            self._wandb_run = wandb.init(mode="offline", **options)
        if not self._wandb_run.offline and self._wandb_run.resumed:
            self._first_step = self._wandb_run.step

    def add(self, step: int, figures: Figures, seconds: float) -> None:
        """Log a row; W&B joins those of one step."""
        if step >= self._first_step:
            self._wandb_run.log(figures, step=step)

    def end(self) -> None:
        """Finish the W&B run."""
        if self._wandb_run is not None:
            self._wandb_run.finish()


class TensorBoardTracker:
    """TensorBoard: event files in ``RUN/trackers/tensorboard``, so ``tensorboard --logdir runs`` finds all.

    Figures are scalars in float32, TensorBoard's own type for them; words, as the phase, are text where
    they change.
    """

    def __init__(self, run: RunDirectory, project: str) -> None:
        self.run, self._folder = run, run.path / TRACKERS / "tensorboard"
        self._words: dict[str, str] = {}
        self._began = 0.0

    def begin(self) -> None:
        """Start the event file."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        shutil.rmtree(self._folder, ignore_errors=True)
        self._began = _time_of_begin(self.run)
        self._writer = EventFileWriter(str(self._folder))
        # A TensorBoard that is open drops what it has read of the file that is gone.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=self._began, step=0, session_log=start))

    def add(self, step: int, figures: Figures, seconds: float) -> None:
        """Write the figures of a row as one event."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=figure)
            for name, figure in figures.items()
            if not isinstance(figure, str)
        ]
        words = {name: word for name, word in figures.items() if isinstance(word, str)}
        values += [_text(name, word) for name, word in words.items() if self._words.get(name) != word]
        self._words |= words
        self._writer.add_event(
            Event(wall_time=self._began + seconds, step=step, summary=Summary(value=values))
        )

    def end(self) -> None:
        """Write what is left."""
        self._writer.close()


class TrackioTracker:
    """trackio: a run of the experiment's name in the local data base of the project."""

    def __init__(self, run: RunDirectory, project: str) -> None:
        self.run, self.project = run, project

    def begin(self) -> None:
        """Start the trackio run in place of the one that an earlier session wrote."""
        import trackio

        own = self.run.path / TRACKERS / "trackio_id.txt"
        before = own.read_text().strip() if own.is_file() else ""
        with contextlib.suppress(ValueError):  # no such project yet
            for run in trackio.Api().runs(self.project):
                if run.id == before:
                    run.delete()
        # trackio tells of rows that it could not write by a warning, and of nothing else.
        self._listening = contextlib.ExitStack()
        self._warnings = self._listening.enter_context(warnings.catch_warnings(record=True))
        self._trackio_run = trackio.init(
            self.project,
            name=self.run.name,
            config=self.run.read_config(),
            embed=False,
            auto_log_gpu=False,  # of the tracker's own process, which does not train
            auto_log_cpu=False,
        )
        own.parent.mkdir(exist_ok=True)
        own.write_text(self._trackio_run.id)

    def add(self, step: int, figures: Figures, seconds: float) -> None:
        """Log a row."""
        self._trackio_run.log(figures, step=step)

    def end(self) -> None:
        """Write what is left.

        Raises:
            RuntimeError: rows could not be written.
        """
        self._trackio_run.finish()
        self._listening.close()
        said = [str(warning.message) for warning in self._warnings]
        print(*said, sep="\n", file=sys.stderr)
        lost = next((words for words in said if words.startswith("trackio failed")), None)
        if lost is not None:
            raise RuntimeError(lost)


BACKENDS: dict[str, Any] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
}


def _own_id(run: RunDirectory, name: str) -> str:
    """An id for the run with a tracker, the same in each session; a run that is overwritten gets another."""
    path = run.path / TRACKERS / f"{name}_id.txt"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _reaches_wandb() -> bool:
    import wandb

    if not wandb.setup().settings.api_key and not os.environ.get("WANDB_API_KEY"):
        return False
    host = wandb.setup().settings.base_url.split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=REACH_S).close()
    except OSError:
        return False
    return True


def _time_of_begin(run: RunDirectory) -> float:
    """When the run began, in seconds since 1970."""
    for event in run.read_events():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return datetime.fromisoformat(event["time"]).timestamp()
    return run.path.stat().st_ctime


def _text(tag: str, word: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text import metadata

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[word.encode()])
    about = metadata.create_summary_metadata(display_name="", description="")
    return Summary.Value(tag=tag, metadata=about, tensor=tensor)
