"""Real training processes that fail as they are told to.

A nursery is a process that has imported everything and forks one child for each run, so that a process
to kill costs a fraction of a second and not the seconds that importing takes. The child runs the
command line, its output goes to a file, and its exit status is the real one.
"""

import collections
import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PHASES = Path(__file__).resolve().parents[2] / "phases"
# What changes files, by the names of Python's audit events; each is a moment to die just before.
_CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


class Nursery:
    """Starts runs; use as a context manager.

    Args:
        folder: where the runs stand, and find their data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(PHASES), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *rest: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def run(
        self, words: Sequence[str], fault: dict[str, Any] | None = None, kill_after: float | None = None
    ) -> tuple[int, str]:
        """Run ``forge`` with these words.

        Args:
            words: the command line.
            fault: what goes wrong inside; see :func:`_arrange`.
            kill_after: SIGKILL from outside after so many seconds.

        Returns:
            The exit status (negative: the signal that ended it) and what it printed.
        """
        log = self.folder / "output.txt"
        self._say({"words": [*words], "fault": fault or {}, "log": str(log)})
        pid = self._hear()["pid"]
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                # Its parent has not waited for it before the next line is read, or the number may be
                # another's; the parent waits for our word.
                os.kill(pid, signal.SIGKILL)
        self._say({"wait": True})
        return self._hear()["code"], log.read_text(errors="replace")

    def _say(self, message: dict[str, Any]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the nursery has died"
        heard: dict[str, Any] = json.loads(line)
        return heard


def serve() -> None:
    """Fork a child for each line of standard input; the answers go to standard output."""
    import phase5_training.commands
    import phase5_training.report
    from phase5_training.records import write_atomic

    # Drawing takes most of the time of a tiny run; the file is written as it would be.
    phase5_training.report.write_report = lambda runs, output=None: write_atomic(
        Path(runs[0]) / "report.html", b"a page"
    )
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _live(job)
        print(json.dumps({"pid": pid}), flush=True)
        sys.stdin.readline()
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


def _live(job: dict[str, Any]) -> None:
    """The child: run the command line and leave; never returns."""
    code = 99
    try:
        output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
        _arrange(job["fault"])
        from phase5_training.cli import main

        code = main(job["words"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _arrange(fault: dict[str, Any]) -> None:
    """Prepare what shall go wrong.

    - ``kill_at``: [name, n]: SIGKILL at the nth change of that name to a file in ``folder``; ``points``: a
      file that lists them instead. Of writes of a checkpoint's files, the first half is done. Checkpoints
      are written beside the steps, so only changes of one name have an order.
    - ``limit``: no file may be larger than so many bytes.
    - ``at``: from this step on, ``raise`` an error in the model, make the loss ``nan`` (``once``: at this
      step only), or have no memory for more than ``memory`` samples; at it, get ``signals``, ``within`` the
      validation after it or after its first micro-batch. At step ``end`` comes a SIGTERM.
    - ``worker``: a data worker dies (``die``) or hangs (``hang``) at its third batch.
    """
    if "kill_at" in fault or "points" in fault:
        _die_at(fault["folder"], fault.get("kill_at"), fault.get("points"))
    if "limit" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], fault["limit"]))
    if "at" in fault:
        _break_step(fault)
    if "worker" in fault:
        _break_workers(fault["worker"])


def _die_at(folder: str, moment: tuple[str, int] | None, listing: str | None) -> None:
    import phase4_bitnet.durable_folder as durable

    counts: collections.Counter[str] = collections.Counter()
    names = os.open(listing, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if listing else None

    def inside(path: Any, directory: int = -1) -> str | None:
        if isinstance(path, int) or not isinstance(path, (str, os.PathLike)):
            return None
        whole = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path) if directory >= 0 else path
        whole = os.path.abspath(whole)
        return os.path.relpath(whole, folder) if f"{whole}/".startswith(f"{folder}/") else None

    def arrived(what: str) -> bool:
        what = re.sub(r"\.\d+\.", ".PID.", what)
        counts[what] += 1
        if names is not None:
            os.write(names, f"{what}\n".encode())
        return moment is not None and [what, counts[what]] == [*moment]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES or (event == "os.mkdir" and os.path.isdir(arguments[0])):
            return
        if event == "open":
            path, _, flags = arguments
            name = inside(path) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
        elif event in ("os.remove", "os.rmdir"):
            name = inside(*arguments)
        else:
            name = inside(arguments[0])
        if name is not None and arrived(f"{event} {name}"):
            os.kill(os.getpid(), signal.SIGKILL)

    class Torn(io.FileIO):
        def write(self, data: Any) -> int:
            if arrived(f"write {inside(self.name)}"):
                super().write(bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    fsync = os.fsync

    def sync(descriptor: int) -> None:
        name = inside(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name is not None and arrived(f"fsync {name}"):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = sync
    durable.open = lambda path, mode, buffering: Torn(path, mode)  # type: ignore[attr-defined]
    sys.addaudithook(hook)


def _break_step(fault: dict[str, Any]) -> None:
    from phase5_training.meter import Meter
    from phase5_training.pipeline.training_loop import TrainingLoop
    from phase5_training.pipeline.validation import RealTimeValidator

    step: Callable[..., None] = TrainingLoop._step
    left = list(fault.get("signals", ()))
    reached = False

    def send() -> None:
        while left:
            os.kill(os.getpid(), left.pop(0))
            # Two that come while neither was handled are one; any thread may get them, the main one handles.
            time.sleep(0.02)

    def broken(loop: TrainingLoop, batch: Any) -> None:
        nonlocal reached
        if loop.state.step + 1 >= fault["at"]:
            if fault.get("raise"):
                raise RuntimeError(fault["raise"])
            if fault.get("nan") and not (reached and fault["nan"] == "once"):
                batch = {**batch, "input": batch["input"] * float("nan")}
            if fault.get("memory") and not reached:
                loop._gradient.model = _with_memory_for(fault["memory"], loop._gradient.model)
            reached = True
            if "within" not in fault:
                send()
        if loop.state.step + 1 == fault.get("end"):
            os.kill(os.getpid(), signal.SIGTERM)
        step(loop, batch)

    TrainingLoop._step = broken  # type: ignore[method-assign]
    within = {"validation": (RealTimeValidator, "_add"), "accumulation": (Meter, "count_correct")}
    if "within" in fault:
        owner, name = within[fault["within"]]
        method = getattr(owner, name)

        def interrupted(*arguments: Any) -> Any:
            if reached:
                send()
            return method(*arguments)

        setattr(owner, name, interrupted)


def _with_memory_for(samples: int, model: Callable[..., Any]) -> Callable[..., Any]:
    def run(inputs: Any) -> Any:
        if len(inputs) > samples:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return model(inputs)

    return run


def _break_workers(how: str) -> None:
    from torch.utils.data import get_worker_info

    from phase5_training.pipeline.data_prepared import Prepared

    batches: Callable[..., Any] = Prepared.batches
    calls = 0

    def broken(prepared: Any, portion: Any) -> Any:
        nonlocal calls
        if get_worker_info() is not None:
            calls += 1
            if calls == 3 and how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if calls == 3:
                time.sleep(3600)
        return batches(prepared, portion)

    Prepared.batches = broken  # type: ignore[method-assign]


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """Mount a memory disk of ``size`` bytes at a folder; yields a function that mounts it again otherwise.

    Raises:
        PermissionError: mounting is not allowed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "forge-faults", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError("a memory disk cannot be mounted here") from error
    try:
        yield (
            lambda options: (
                subprocess.run(
                    ["mount", "-o", f"remount,{options}", str(folder)], check=True, capture_output=True
                )
                and None
            )
        )
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


if __name__ == "__main__":
    serve()
