"""A dozen kills and every other fault; ``make faults`` has every moment of a save and a hundred kills."""

import random
import signal
from collections.abc import Iterator

import pytest

from faults.nursery import Nursery
from faults.trials import DAMAGE, Trials, damaged, full_disk, left_by, phase, read_only, taken


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    folder = tmp_path_factory.mktemp("faults")
    with Nursery(folder) as nursery:
        yield Trials(folder, nursery)


@pytest.fixture
def held(trials: Trials) -> Iterator[Trials]:
    """The trials, whose rows must all be good at the end of the test."""
    trials.rows.clear()
    yield trials
    assert trials.rows
    assert all(row.good for row in trials.rows.values()), "\n" + trials.table()


# One moment of each kind; the third save is the first that has an older checkpoint to remove.
MOMENTS = {
    "the configuration": ("os.rename .config.yaml", 1),
    "the first checkpoint's tensors": ("write checkpoints/.step-00000005", 1),
    "the first checkpoint's manifest": ("write checkpoints/.step-00000005", -1),
    "the first checkpoint's rename": ("os.rename checkpoints/.step-00000005", 1),
    "its parent's sync": ("fsync checkpoints", 1),
    "a row after it": ("open metrics.jsonl", 6),
    "the pruning": ("os.rename checkpoints/step-00000005", 1),
    "the removal": ("os.remove checkpoints/.step-00000005", 2),
    "the returned model": ("write best", -1),
    "the result": ("os.rename .result.json", 1),
}


@pytest.fixture(scope="module")
def moments(trials: Trials) -> dict[str, int]:
    """The number of each moment among all changes of files."""
    points = trials.points()
    found = {}
    for name, (start, which) in MOMENTS.items():
        start = start.replace("write best", "write .best")
        numbers = [number for number, point in points.items() if point.startswith(start)]
        found[name] = numbers[which if which < 0 else which - 1]
    return found


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_before(held: Trials, moments: dict[str, int], name: str) -> None:
    assert held.killed(name, kill_at=moments[name])


def test_killed_at_random_times(held: Trials) -> None:
    generator, kills = random.Random(0), 0
    while kills < 3:
        kills += held.killed("at a random time", after=generator.uniform(0, held.seconds))


def test_killed_again_and_again(held: Trials) -> None:
    held.killed_often("again and again", random.Random(1), 3)


@pytest.mark.parametrize(
    ("how", "name"),
    [("flipped", "tensors.safetensors"), ("truncated", "state.json"), ("removed", "manifest.json")],
)
def test_a_damaged_newest_checkpoint(held: Trials, how: str, name: str) -> None:
    assert how in DAMAGE
    damaged(held, how, name)


def test_a_full_disk(held: Trials) -> None:
    try:
        for kilobytes in (64, 1100):
            full_disk(held, kilobytes)
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_read_only_folder(held: Trials) -> None:
    try:
        read_only(held)
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_quota(held: Trials) -> None:
    """No file may grow past a size, as under a quota: the checkpoint is not saved, and says so."""
    code, said = held.train("quota", fault={"limit": 9000})
    assert (code, said.count("\n")) == (1, 1)
    assert "the checkpoint of step 5 cannot be written" in said
    assert not list((held.run("quota") / "checkpoints").iterdir())
    held.ends("a quota", held.run("quota"), taken(held.run("quota")))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_once(held: Trials, number: int, code: int) -> None:
    name = f"signal{code}"
    found, said = held.train(name, fault={"at": 8, "signals": [number]})
    assert (found, "interrupted at step 8" in said) == (code, True)
    assert (held.run(name) / "checkpoints" / "step-00000008").is_dir()
    held.ends("a signal", held.run(name), 8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(held: Trials, number: int) -> None:
    name = f"twice{number}"
    found, said = held.train(name, fault={"at": 8, "signals": [number, number]})
    assert found == (130 if number == signal.SIGINT else -signal.SIGTERM), said
    assert not (held.run(name) / "checkpoints" / "step-00000008").exists()
    held.ends("two signals", held.run(name), taken(held.run(name)))


def test_a_model_that_raises(held: Trials) -> None:
    """Before the first checkpoint, and after it; the run can be continued under its name."""
    for at in (2, 8):
        name = f"raises{at}"
        code, said = held.train(name, fault={"at": at, "raise": "a bad day"})
        assert (code, said.count("\n")) == (1, 1)
        assert "unexpected RuntimeError: a bad day" in said
        result = (held.run(name) / "result.json").read_text()
        assert '"RuntimeError: a bad day"' in result
        held.ends("a model that raises", held.run(name), taken(held.run(name)))


def test_steps_that_are_not_finite(trials: Trials) -> None:
    """They change nothing and are counted; a run of them fails, and is not called a success."""
    code, said = trials.train("nan", fault={"at": 8, "nan": True})
    assert (code, said.count("\n")) == (1, 1)
    assert "17 of 24 steps were skipped" in said


def test_the_same_run_is_recognized(trials: Trials) -> None:
    """The comparison sees one changed bit, and a file too many."""
    run = trials.run("again")
    assert left_by(run) == trials.whole
    (run / ".a.1.new.tmp").mkdir()
    assert left_by(run) != trials.whole
    (run / ".a.1.new.tmp").rmdir()
    DAMAGE["flipped"](run / "best" / "weights.safetensors")
    assert left_by(run) != trials.whole
    assert phase("fsync checkpoints/.step-00000005.77.new.tmp") == "fsync checkpoints/.step-N.PID.new.tmp"
