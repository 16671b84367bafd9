import pytest

from phase5_training.config import TrainingConfig, parse_config
from phase5_training.errors import UsageError
from phase5_training.flags import Parser, add_config_flags, config_values


def values(*words):
    parser = Parser("forge train")
    parser.add_argument("config", nargs="?")
    add_config_flags(parser)
    found = parser.parse_strictly(words)
    return found.config, config_values(found)


def test_every_option_is_a_flag():
    shown = Parser("forge train")
    add_config_flags(shown)
    text = shown.format_help()
    for name in TrainingConfig.model_fields:
        assert "--" + name.replace("_", "-") in text, name


def test_only_some_options():
    parser = Parser("forge resume")
    add_config_flags(parser, ["epochs"])
    assert config_values(parser.parse_strictly(["--epochs", "3"])) == {"epochs": 3}
    with pytest.raises(UsageError, match="unknown flag '--batch-size'"):
        parser.parse_strictly(["--batch-size", "8"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--learning-rate 1e-3", {"learning_rate": 1e-3}),
        ("--learning-rate=5e-4", {"learning_rate": 5e-4}),
        ("--epochs 3 --seed 7", {"epochs": 3, "seed": 7}),
        ("--weight-bits 1", {"weight_bits": 1}),
        ("--use-bitnet", {"use_bitnet": True}),
        ("--no-use-bitnet", {"use_bitnet": False}),
        ("--use-bitnet false", {"use_bitnet": False}),
        ("--use-amp auto", {"use_amp": "auto"}),
        ("--use-amp", {"use_amp": True}),
        ("--compile=no", {"compile": False}),
        ("--activation-bits none", {"activation_bits": None}),
        ("--max-steps none", {"max_steps": None}),
        ("--loss none", {"loss": None}),
        ("--experiment-name 123", {"experiment_name": "123"}),
        ("--train-data-path a.json", {"train_data_path": "a.json"}),
        ("--train-data-path a.json b.json", {"train_data_path": ["a.json", "b.json"]}),
        ("--float-layers head", {"float_layers": ["head"]}),
        ("--float-layers head *.fc1", {"float_layers": ["head", "*.fc1"]}),
        (
            "--model-options dim=64 hidden=[8,8] norm=false rate=1e-3",
            {"model_options": {"dim": 64, "hidden": [8, 8], "norm": False, "rate": 1e-3}},
        ),
    ],
)
def test_a_flag_means_what_the_line_of_yaml_means(words, expected):
    config, found = values(*words.split())
    assert config is None
    assert found == expected
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in expected.items()}
    parse_config({k: v for k, v in found.items() if k != "model_options"})


def test_a_switch_before_the_file_does_not_swallow_it():
    assert values("--overwrite", "run.yaml", "--epochs", "3") == (
        "run.yaml",
        {"overwrite": True, "epochs": 3},
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batchsize 8", "unknown flag '--batchsize'; did you mean '--batch-size'?"),
        ("--epoch 8", "unknown flag '--epoch'; did you mean '--epochs'?"),  # no silent abbreviation
        ("--grokfast_alpa=0.9", "unknown flag '--grokfast_alpa'; did you mean '--grokfast-alpha'?"),
        ("--zzz", "unknown flag '--zzz'; see `forge train --help`"),
        ("a.yaml b.yaml", "'b.yaml' is one argument too many"),
        ("--epochs", "expected one argument"),
        ("--model-options dim", "--model-options has 'dim'; write key=value, as dim=128"),
    ],
)
def test_a_bad_flag_is_one_line_with_the_remedy(words, message):
    with pytest.raises(UsageError) as caught:
        values(*words.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
