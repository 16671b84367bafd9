"""Finding the run that a person names."""

from pathlib import Path

from phase5_training.errors import UsageError, nearest_match
from phase5_training.records import RunDirectory


def open_run(folder: str) -> RunDirectory:
    """The run in a folder.

    Raises:
        UsageError: there is none; names the nearest.
    """
    run = RunDirectory(folder)
    if not run.exists():
        parent = Path(folder).parent
        others = [p.name for p in parent.iterdir() if RunDirectory(p).exists()] if parent.is_dir() else []
        near = nearest_match(Path(folder).name, others)
        hint = (
            f"; did you mean {str(parent / near)!r}?"
            if near
            else "; give the folder of a run, as runs/my_run"
        )
        raise UsageError(f"{folder} holds no run{hint}")
    return run
