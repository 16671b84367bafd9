"""That the options about data reach what reads them."""

import json

import pytest
import torch
from torch import nn

from phase5_training.assembly import data_config, monitor_of
from phase5_training.config import TrainingConfig
from phase5_training.errors import DataError, UsageError
from phase5_training.loss_registry import build_loss
from phase5_training.pipeline.data_config import DataConfig

pytestmark = pytest.mark.usefixtures("no_report")

# What DataConfig has and a run has not: figures of reading that do not change what is learned, and which
# part of each batch a process takes.
NOT_OPTIONS = {"shuffle_buffer", "memory_limit_mb", "rank", "world_size"}


def written(path, samples):
    path.write_text(json.dumps({"samples": samples}))
    return path


def test_every_field_of_the_data_is_an_option_and_is_passed_on():
    given = {
        "batch_size": 8, "num_workers": 1, "cache_size": 3, "streaming": True, "quality_threshold": 0.5,
        "validation_split": 0.2, "seed": 4, "shuffle": False, "drop_last": True, "max_length": 6,
        "tokenizer": "t.json", "task": "regression", "invalid_records": "drop", "input_kind": "features",
        "pad_id": 7, "data_timeout": 9.0, "record_policies": {"duplicate": "drop"},
        "pack_text": True, "bucket_by_length": True, "inputs_path": "x", "targets_path": "y", "cache_mb": 5,
        "max_dropped_share": 0.5, "num_classes": 3,
    }  # fmt: skip
    fields = {name.removeprefix("data_"): value for name, value in given.items()}
    assert set(fields) == set(DataConfig.__dataclass_fields__) - NOT_OPTIONS
    made = data_config(TrainingConfig(**given), split=True)
    assert {name: getattr(made, name) for name in fields} == fields
    assert data_config(TrainingConfig(), split=False) == DataConfig()


@pytest.mark.parametrize("name", ["null.json", "nan.jsonl"])
def test_a_bad_record_stops_the_run_or_is_dropped_and_listed(pipeline, tmp_path, runs, name):
    """JSON has no NaN: a file as one document says null, and a line with the word is one bad record."""
    samples = [{"input": [float(i), 1.0], "target": i % 2} for i in range(40)]
    path = written(tmp_path / "null.json", samples)
    if name == "nan.jsonl":
        samples[7]["input"][1] = float("nan")
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, samples)))
    else:
        path.write_text(path.read_text().replace("[7.0, 1.0]", "[7.0, null]"))
    with pytest.raises(DataError, match=f"{name} record 7"):
        pipeline("mlp", path, epochs=1).run()
    result = pipeline("mlp", path, epochs=1, invalid_records="drop").run()
    assert result.success
    lines = (runs / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [7]


def test_whole_numbers_are_features_where_the_run_says_so(pipeline, tmp_path):
    path = written(tmp_path / "w.json", [{"input": [i, i % 3], "target": i % 2} for i in range(40)])
    assert pipeline("auto", path, experiment_name="tokens").setup().spec.input_kind == "tokens"
    run = pipeline("mlp", path, input_kind="features", experiment_name="features").setup()
    assert run.spec.input_kind == "features"
    assert next(iter(run.train_loader))["input"].dtype == torch.float32


def test_token_lists_of_different_lengths_need_a_pad_id(pipeline, tmp_path):
    samples = [{"input": [1 + i % 5] * (1 + i % 4), "target": i % 2} for i in range(40)]
    path = written(tmp_path / "ragged.json", samples)
    small = {"model_options": {"dim": 16, "layers": 1, "heads": 2}}
    with pytest.raises((DataError, UsageError), match="pad_id"):
        pipeline("decoder", path, **small).setup()
    run = pipeline("decoder", path, pad_id=9, **small).setup()
    assert any((batch["input"] == 9).any() for batch in run.train_loader)
    own = nn.Sequential(nn.Embedding(6, 8), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(
        UsageError, match=r"^padding is token 9 and the model embeds 6 tokens .*vocab_size=10"
    ):
        pipeline(own, path, pad_id=9, use_bitnet=False, experiment_name="own").setup()


@pytest.mark.parametrize(
    ("task", "loss", "named", "expected"),
    [
        ("classification", "classification", None, "accuracy"),
        ("classification", "classification", "loss", "loss"),
        ("next_token", "next_token", None, "loss"),
        ("regression", "mse", None, "loss"),
        ("classification", lambda outputs, targets: outputs.sum(), None, "loss"),
    ],
)
def test_accuracy_decides_for_classes_unless_another_figure_is_named(task, loss, named, expected):
    assert monitor_of(TrainingConfig(monitor=named), task, build_loss(loss)) == expected
