import math

import numpy as np
import pytest
import torch

from phase5_training.bad_batches import WINDOW, BatchWatch, judge, robust_score
from phase5_training.checkpoint import load_checkpoint, save_checkpoint
from phase5_training.loop_config import LoopConfig


def oracle(value, before):
    """Iglewicz and Hoaglin's modified z-score in float64, with the floor on the deviation."""
    x = np.asarray(before, np.float64)
    deviation = 1.4826 * np.median(np.abs(x - np.median(x)))
    return (value - np.median(x)) / max(deviation, 0.05 * abs(np.median(x)), 1e-12)


def test_the_score_is_the_modified_z_score():
    generator = np.random.default_rng(0)
    for _ in range(50):
        before = generator.normal(3, generator.uniform(0, 2), generator.integers(1, 200)).tolist()
        value = float(generator.normal(3, 10))
        assert robust_score(value, before) == pytest.approx(oracle(value, before))


def fill(watch, losses, first=1, skipped=()):
    for step, loss in enumerate(losses, start=first):
        watch.note(step, 0, torch.tensor([step, -step]), torch.tensor(loss), torch.tensor(step in skipped))


def test_spikes_and_skipped_steps_are_found_with_their_samples():
    watch = BatchWatch(10.0)
    losses = [2.0 + 0.01 * math.sin(i) for i in range(60)]
    losses[40], losses[50] = 9.0, math.nan
    fill(watch, losses, skipped={51})
    spike, skipped = watch.look(rollbacks=2)
    assert (spike.kind, spike.step, spike.samples, spike.loss, spike.rollbacks) == (
        "spike",
        41,
        [41, -41],
        9.0,
        2,
    )
    assert spike.score > 50
    assert (skipped.kind, skipped.step, skipped.loss, skipped.score) == ("nonfinite", 51, None, None)
    assert watch.look() == []


def test_no_loss_is_a_spike_before_there_are_some_to_compare_with_nor_when_losses_fall():
    watch = BatchWatch(10.0)
    fill(watch, [1.0] * 20 + [100.0] + [3.0 * 0.9**i for i in range(100)])
    assert watch.look() == []


def test_the_window_forgets():
    watch = BatchWatch(10.0)
    fill(watch, [1.0] * 50 + [100.0] * 3 * WINDOW)
    found = [bad.step for bad in watch.look()]
    assert found[0] == 51
    assert found[-1] < 51 + WINDOW  # a new level is no spike for ever


@pytest.mark.parametrize("cut", [1, 33, 41, 45, 60])
def test_a_resumed_watch_finds_what_an_uninterrupted_one_finds(tmp_path, cut):
    losses = [2.0 + 0.01 * math.sin(i) for i in range(60)]
    losses[40] = 9.0
    whole, before, after = BatchWatch(10.0), BatchWatch(10.0), BatchWatch(10.0)
    fill(whole, losses, skipped={44, 45})
    fill(before, losses[:cut], skipped={44, 45})
    after.load_state_dict(load_checkpoint(save_checkpoint(tmp_path / "c", before.state_dict(), step=1)))
    fill(after, losses[cut:], cut + 1, skipped={44, 45})
    assert whole.look() == after.look()
    assert whole.state_dict() == after.state_dict()


def test_batches_without_ids_have_none(tmp_path):
    watch = BatchWatch(10.0)
    watch.note(1, 0, None, torch.tensor(math.inf), torch.tensor(True))
    again = BatchWatch(10.0)
    again.load_state_dict(load_checkpoint(save_checkpoint(tmp_path / "c", watch.state_dict(), step=1)))
    assert [bad.samples for bad in again.look()] == [[]]


@pytest.mark.parametrize(
    ("policy", "found"), [("stop", (False, True)), ("rollback", (True, True)), ("skip", None)]
)
def test_what_follows_skipped_steps_in_a_row(policy, found):
    trouble = judge([], 5, 100, LoopConfig(nonfinite=policy, max_nonfinite=5))
    assert (trouble and (trouble.roll_back, trouble.fatal)) == found
    assert trouble is None or trouble.first_step == 96
    assert judge([], 4, 100, LoopConfig(nonfinite=policy, max_nonfinite=5)) is None
