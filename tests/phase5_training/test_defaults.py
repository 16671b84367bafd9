"""What Forge chooses where the user named nothing."""

import pytest
import yaml

from phase5_training.config import TrainingConfig, parse_config
from phase5_training.defaults import grokfast_figures

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        ({}, None),
        ({"filter": "ema"}, None),  # the default, as config.yaml writes it
        ({"use_grokfast": True}, (0.98, 2.0)),
        ({"grokfast_alpha": 0.9}, (0.9, 2.0)),
        ({"grokfast_lambda": 0.0}, (0.98, 0.0)),
        ({"filter": "ma"}, (0.98, 2.0)),
        ({"filter": "high_pass", "grokfast_lambda": 1.0}, (0.98, 1.0)),
        ({"filter": "ma", "use_grokfast": False}, None),
        ({"grokfast_alpha": 0.9, "use_grokfast": False}, None),
    ],
    ids=str,
)
def test_what_turns_the_filter_on(options, figures):
    assert grokfast_figures(TrainingConfig(**options)) == figures


@pytest.mark.parametrize("options", [{}, {"filter": "ma"}, {"filter": "ma", "use_grokfast": False}], ids=str)
def test_a_recorded_run_keeps_its_filter(pipeline, task_files, options):
    """A resume, and config.yaml given back, decide as the first call did."""
    first = pipeline("mlp", *task_files(), max_steps=2, **options)
    first.run()
    on = options == {"filter": "ma"}
    assert (first.optimizer.gradient_filter is not None) == on
    again = pipeline("mlp", *task_files(), max_steps=4, auto_resume=True, **options)
    assert again.run().metrics["steps"] == 4
    assert (again.optimizer.gradient_filter is not None) == on
    recorded = yaml.safe_load((again.run_directory.path / "config.yaml").read_text())
    assert recorded["use_grokfast"] is on
    assert (grokfast_figures(parse_config(recorded)) is not None) == on
