"""A dozen kills and every other fault; ``make faults`` has every moment of a save and a hundred kills."""

import random
import signal
from collections.abc import Iterator

import pytest

from faults import cases
from faults.nursery import Nursery
from faults.trials import DAMAGE, Trials, damaged, full_disk, left_by, phase, read_only


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
NEW = "checkpoints/.step-00000003.PID.new.tmp"
MOMENTS = {
    "the configuration": ("os.rename .config.yaml.PID.tmp", 1),
    "the first checkpoint's tensors": (f"write {NEW}/tensors.safetensors", 2),
    "the first checkpoint's manifest": (f"write {NEW}/manifest.json", 1),
    "the first checkpoint's rename": (f"os.rename {NEW}", 1),
    "its parent's sync": ("fsync checkpoints", 1),
    "a row after it": ("open metrics.jsonl", 6),
    "the pruning": ("os.rename checkpoints/step-00000003", 1),
    "the removal": ("os.remove checkpoints/.step-00000003.PID.gone.tmp/manifest.json", 1),
    "the returned model": ("write .best.PID.new.tmp/manifest.json", 1),
    "the result": ("os.rename .result.json.PID.tmp", 1),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_before(held: Trials, name: str) -> None:
    assert held.killed(name, kill_at=MOMENTS[name])


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
    cases.quota(held)


@pytest.mark.parametrize("within", cases.SIGNALED)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_once(held: Trials, number: int, within: str | None) -> None:
    cases.signaled(held, number, within)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(held: Trials, number: int) -> None:
    cases.signaled_twice(held, number)


@pytest.mark.parametrize("at", [2, 8])
def test_a_model_that_raises(held: Trials, at: int) -> None:
    """Before the first checkpoint, and after it; the run can be continued under its name."""
    cases.raises(held, at)


def test_a_batch_that_is_not_finite(held: Trials) -> None:
    cases.nonfinite(held)


def test_out_of_memory(held: Trials) -> None:
    cases.out_of_memory(held)


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_worker_that_fails(held: Trials, how: str) -> None:
    cases.worker(held, how)


def test_hostile_checkpoints(held: Trials) -> None:
    cases.hostile(held)


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
    assert phase("fsync checkpoints/.step-00000005.PID.new.tmp") == "fsync checkpoints/.step-N.PID.new.tmp"
