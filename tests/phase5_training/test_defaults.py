"""What Forge chooses where the user named nothing."""

import pytest
import yaml

from phase5_training.config import TrainingConfig, parse_config
from phase5_training.defaults import grokfast_config

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        ({}, None),
        ({"filter": "ema"}, ("ema", 0.98, 2.0)),
        ({"use_grokfast": True}, ("auto", 0.95, 10.0)),
        ({"use_grokfast": True, "grokfast_alpha": 0.9}, ("ema", 0.9, 2.0)),
        ({"grokfast_alpha": 0.9}, ("ema", 0.9, 2.0)),
        ({"grokfast_lambda": 0.0}, ("ema", 0.98, 0.0)),
        ({"filter": "auto", "grokfast_lambda": 5.0}, ("auto", 0.95, 5.0)),
        ({"filter": "ma"}, ("ma", 0.98, 2.0)),
        ({"filter": "high_pass", "grokfast_lambda": 1.0}, ("high_pass", 0.98, 1.0)),
        ({"filter": "ma", "use_grokfast": False}, None),
        ({"grokfast_alpha": 0.9, "use_grokfast": False}, None),
        ({"grokfast_warmup_steps": 5}, ("auto", 0.95, 10.0)),
        ({"grokfast_unit_gain": True}, ("auto", 0.95, 10.0)),
        ({"grokfast_unit_gain": True, "use_grokfast": False}, None),
    ],
    ids=str,
)
def test_what_turns_the_filter_on(options, figures):
    found = grokfast_config(TrainingConfig(**options))
    assert (found and (found.filter, found.alpha, found.lambda_reg)) == figures


def test_a_window_belongs_to_the_moving_average():
    with pytest.raises(ValueError, match="grokfast_window=7 is for filter='ma', and the filter is 'auto'"):
        grokfast_config(TrainingConfig(grokfast_window=7))


def test_every_figure_reaches_the_filter():
    found = grokfast_config(
        TrainingConfig(
            filter="ma",
            grokfast_window=7,
            grokfast_unit_gain=True,
            grokfast_warmup_steps=5,
            grokfast_phase_gains={"warmup": 0.0},
        )
    )
    assert (found.window, found.unit_gain, found.gain_warmup_steps) == (7, True, 5)
    assert found.phase_gains == {"warmup": 0.0}
    assert (
        grokfast_config(TrainingConfig(filter="ema", grokfast_average="bfloat16")).average_dtype == "bfloat16"
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"filter": "ma"}, {"use_grokfast": True}, {"filter": "ma", "use_grokfast": False}],
    ids=str,
)
def test_a_recorded_run_keeps_its_filter(pipeline, task_files, options):
    """A resume, and config.yaml given back, decide as the first call did."""
    first = pipeline("mlp", *task_files(), max_steps=2, **options)
    first.run()
    on = options in ({"filter": "ma"}, {"use_grokfast": True})
    assert (first.optimizer.gradient_filter is not None) == on
    again = pipeline("mlp", *task_files(), max_steps=4, auto_resume=True, **options)
    assert again.run().metrics["steps"] == 4
    assert (again.optimizer.gradient_filter is not None) == on
    recorded = yaml.safe_load((again.run_directory.path / "config.yaml").read_text())
    assert recorded["use_grokfast"] is on
    assert (grokfast_config(parse_config(recorded)) is not None) == on
    assert recorded["filter"] == (options.get("filter", "auto") if on else None)
