import pytest
import yaml

from phase5_training import create_training_pipeline
from phase5_training.config import TrainingConfig, check_same_run, in_words, load_yaml, parse_config
from phase5_training.errors import UsageError


def test_the_defaults_stand_for_themselves():
    config = parse_config({})
    assert config == TrainingConfig()
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 8}, "unknown option 'batchsize'; did you mean 'batch_size'?"),
        ({"grokfast_alfa": 0.9}, "unknown option 'grokfast_alfa'; did you mean 'grokfast_alpha'?"),
        ({"zzz": 1}, "unknown option 'zzz'; see `forge train --help` for all options"),
        ({"epochs": 0}, "epochs=0 does not fit: input should be greater than or equal to 1"),
        ({"epochs": "many"}, "epochs='many' does not fit: input should be a valid integer"),
        ({"learning_rate": -1}, "learning_rate=-1 does not fit: input should be greater than 0"),
        (
            {"weight_bits": 2},
            "weight_bits=2.0 is not supported; use 1.58 (codes -1, 0, 1) or 1 (codes -1, 1)",
        ),
        ({"quantization_mode": "random"}, "quantization_mode='random' does not fit: input should be"),
        ({"use_amp": "maybe"}, "use_amp='maybe' does not fit"),
        ({"validation_split": 1.0}, "validation_split=1.0 does not fit: input should be less than 1"),
        (
            {"keep_checkpoints": 1},
            "keep_checkpoints=1 does not fit: input should be greater than or equal to 2",
        ),
        ({"train_data_path": 3}, "train_data_path=3 does not fit: input should be a valid string"),
        (
            {"batch_size": 30, "micro_batch_size": 8},
            "batch_size=30 is not a multiple of micro_batch_size=8; use micro_batch_size=6 or batch_size=32",
        ),
    ],
)
def test_a_bad_option_is_one_line_with_the_remedy(values, message):
    with pytest.raises(UsageError) as caught:
        parse_config(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"^run\.yaml: "):
        parse_config(values, where="run.yaml")


def test_keyword_arguments_meet_the_same_schema():
    with pytest.raises(UsageError, match="did you mean 'learning_rate'"):
        create_training_pipeline(train_data_path="x.json", learning_rat=1e-3)


def test_no_data_is_an_error_with_the_remedy():
    with pytest.raises(UsageError, match="train_data_path is missing; give"):
        create_training_pipeline("mlp")


@pytest.mark.parametrize("value", [1.58, 1, 1.0])
def test_both_widths(value):
    assert parse_config({"weight_bits": value}).weight_bits == value


def test_the_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        TrainingConfig().epochs = 3


class TestYaml:
    def test_reads_options(self, tmp_path):
        (tmp_path / "a.yaml").write_text("epochs: 3\nlearning_rate: 1e-3\nmodel_options: {hidden: [8]}\n")
        values = load_yaml(tmp_path / "a.yaml")
        config = parse_config(values)
        assert (config.epochs, config.learning_rate, config.model_options) == (3, 1e-3, {"hidden": [8]})

    def test_an_empty_file_is_no_options(self, tmp_path):
        (tmp_path / "a.yaml").write_text("# nothing yet\n")
        assert load_yaml(tmp_path / "a.yaml") == {}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("epochs: [3", "cannot be read as YAML"),
            ("- epochs", "holds a list; write one option per line"),
            ("3: 4", "write one option per line"),
        ],
    )
    def test_other_content_is_one_line(self, tmp_path, content, message):
        (tmp_path / "a.yaml").write_text(content)
        with pytest.raises(UsageError, match=message) as caught:
            load_yaml(tmp_path / "a.yaml")
        assert "a.yaml" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_missing_file_names_the_nearest(self, tmp_path):
        (tmp_path / "digits.yaml").write_text("")
        with pytest.raises(UsageError, match=r"digit\.yaml' does not exist; did you mean '.*digits\.yaml'"):
            load_yaml(tmp_path / "digit.yaml")

    def test_a_folder_is_one_line(self, tmp_path):
        with pytest.raises(UsageError, match="cannot be read as YAML"):
            load_yaml(tmp_path)

    def test_no_code_runs(self, tmp_path):
        (tmp_path / "a.yaml").write_text("model: !!python/object/apply:os.mkdir [made]\n")
        with pytest.raises(UsageError, match="cannot be read as YAML"):
            load_yaml(tmp_path / "a.yaml")
        assert not (tmp_path / "made").exists()


def test_what_a_resumed_run_may_change():
    old = {"epochs": 3, "batch_size": 32, "device": "cpu"}
    check_same_run("runs/a", old, {"epochs": 9, "batch_size": 32, "device": "cuda"})
    with pytest.raises(
        UsageError, match=r"runs/a was started with batch_size=32 .* batch_size=64; use the old"
    ):
        check_same_run("runs/a", old, {**old, "batch_size": 64})


def test_objects_are_recorded_in_words(tmp_path):
    assert in_words([tmp_path, "b"]) == [str(tmp_path), "b"]
    assert in_words({"model": 1}) == "<dict>"
    assert in_words(None) is None
