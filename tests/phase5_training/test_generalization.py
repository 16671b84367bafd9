"""The evidence for delayed generalization, against figures worked out by hand."""

import json

import pytest

from phase5_training.generalization import GeneralizationLag


def observed(training, validation):
    lag = GeneralizationLag()
    for each in training:
        lag.observe_training(each)
    lag.observe_validation(validation)
    return lag


@pytest.mark.parametrize(
    ("accuracy", "validation", "evidence"),
    [(1.0, 1.0, 0.0), (1.0, 0.8, 0.0), (1.0, 0.65, 0.5), (1.0, 0.5, 1.0), (0.3, 0.01, 0.3), (0.1, 0.9, 0.0)],
)
def test_by_accuracy(accuracy, validation, evidence):
    lag = observed([{"loss": 1.0, "accuracy": accuracy}], {"loss": 50.0, "accuracy": validation})
    assert lag.evidence == pytest.approx(evidence)


@pytest.mark.parametrize(
    ("loss", "validation", "evidence"),
    [(0.4, 0.6, 0.0), (0.0, 1.4, 0.5 / 0.3), (0.4, 1.2, 0.2 / 0.3), (0.0, 90.0, 1.0), (3.0, 9.0, 0.0)],
)
def test_by_loss_where_there_is_no_accuracy(loss, validation, evidence):
    """fit = 1 - loss / 2, the first loss being 2."""
    lag = observed([{"loss": 2.0, "accuracy": None}, {"loss": loss, "accuracy": None}], {"loss": validation})
    assert lag.evidence == pytest.approx(min(1.0, evidence))


@pytest.mark.parametrize(
    ("later", "units", "evidence"),
    [
        (0.5, None, 1.0),
        (0.47, None, 1.0),  # one margin below the best
        (0.455, None, 0.5),
        (0.44, None, 0.0),
        (0.3, None, 0.0),
        (0.44, 10_000, 0.0),  # two standard errors are 0.01
        (0.4, 100, 1.0),  # two standard errors are 0.1
        (0.35, 100, 0.5),
    ],
)
def test_a_network_that_was_better_overfits_and_does_not_wait(later, units, evidence):
    lag = observed([{"loss": 2.0, "accuracy": 1.0}], {"loss": 3.0, "accuracy": 0.5, "units": units})
    assert lag.evidence == 1.0
    lag.observe_validation({"loss": 9.0, "accuracy": later, "units": units})
    assert lag.evidence == pytest.approx(evidence)
    lag.observe_validation({"loss": 9.0, "accuracy": 0.5, "units": units})
    assert lag.evidence == 1.0


def test_falling_back_by_the_loss():
    """1 - loss / 2 falls from 0.3 to 0.255 while training fits all of it."""
    lag = observed([{"loss": 2.0}, {"loss": 0.0}], {"loss": 1.4})
    assert lag.evidence == 1.0
    lag.observe_validation({"loss": 1.49})
    assert lag.evidence == pytest.approx(0.5)


def test_without_figures_there_is_no_evidence():
    assert observed([], {"loss": 1.0, "accuracy": 0.0}).evidence == 0.0
    nan = float("nan")
    lag = observed([{"loss": nan, "accuracy": nan}], {"loss": nan, "accuracy": nan})
    assert lag.evidence == 0.0
    lag.observe_training({"loss": 3.0, "accuracy": 1.0})
    lag.observe_validation({"loss": 3.0, "accuracy": 0.0})
    lag.observe_validation({"loss": nan, "accuracy": nan})
    assert lag.evidence == 1.0, "a validation that failed is no news"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_news(bad):
    """Taken for a fit of 0, one failed validation of a regression would set the whole gain."""
    training = [{"loss": 2.0, "accuracy": None}, {"loss": 0.1, "accuracy": None}]
    assert observed(training, {"loss": bad}).evidence == 0.0
    lag = observed(training, {"loss": 2.0})
    assert lag.evidence == 1.0
    lag.observe_training({"loss": bad, "accuracy": None})
    lag.observe_validation({"loss": 2.0})
    assert lag.evidence == 1.0


def test_state_survives_json():
    lag = observed([{"loss": 2.0, "accuracy": None}, {"loss": 0.1, "accuracy": None}], {"loss": 3.0})
    again = GeneralizationLag()
    again.load_state_dict(json.loads(json.dumps(lag.state_dict())))
    assert again.state_dict() == lag.state_dict()
    again.observe_validation({"loss": 0.1})
    assert again.evidence == 0.0
    state = lag.state_dict()
    del state["best"]  # as written by earlier versions
    again.load_state_dict(state)
    again.observe_validation({"loss": 1.9})
    assert again.evidence == 1.0
