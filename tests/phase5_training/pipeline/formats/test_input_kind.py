"""Data of another kind than the model reads are refused, at their first records where those decide."""

import json

import numpy as np
import pytest

from phase5_training.cli import main
from phase5_training.errors import UsageError
from phase5_training.pipeline.formats.columns import Columns
from phase5_training.pipeline.formats.scan import ScanOptions, scan
from phase5_training.pipeline.formats.source import ArraySource
from phase5_training.pipeline.formats.text import ByteTokenizer

WHOLE = np.array([[1, 2], [3, 4]])


class TwoChunks(ArraySource):
    """Data whose second part takes for ever."""

    def __init__(self, first):
        super().__init__("npy", ["x.npy"], np.zeros((4, 2)), np.array([0, 1, 2, 1]))
        self.first, self.walked = first, 0

    def iterate(self):
        yield Columns(np.arange(2), self.first, np.array([0, 1]))
        self.walked += 1
        yield Columns(np.arange(2, 4), np.full((2, 2), 0.5), np.array([2, 1]))


@pytest.mark.parametrize(
    ("reads", "first", "options", "said"),
    [
        ("features", ["ab", "c"], {}, "the mlp reads features and the inputs are text; use model='decoder'"),
        ("tokens", -WHOLE, {}, "reads token ids and the inputs are features; use model='mlp'"),
        ("tokens", WHOLE + 0.5, {}, "reads token ids and the inputs are features; use model='mlp'"),
        ("tokens", WHOLE, {"input_kind": "features"}, "the inputs are features; use model='mlp'"),
    ],
)
def test_at_the_first_records(reads, first, options, said):
    source = TwoChunks(first)
    with pytest.raises(UsageError) as caught:
        scan(source, ByteTokenizer(), ScanOptions(reads=reads, **options))
    assert said in str(caught.value)
    assert not source.walked


@pytest.mark.parametrize(
    ("reads", "options"), [("features", {"input_kind": "features"}), ("features", {}), (None, {})]
)
def test_what_fits_is_read_to_the_end(reads, options):
    """Whole numbers at first are no reason to refuse: fractions make features of them."""
    source = TwoChunks(WHOLE)
    found = scan(source, ByteTokenizer(), ScanOptions(reads=reads, **options))
    assert source.walked == 1
    assert found.spec.input_kind == "features"


@pytest.mark.parametrize(
    ("reads", "data", "said"),
    [("features", WHOLE, "set input_kind='features' where"), ("tokens", None, "inputs are features")],
)
def test_at_the_end_where_the_first_records_do_not_decide(reads, data, said):
    whole = ArraySource("npy", ["x.npy"], WHOLE, np.array([0, 1]))
    with pytest.raises(UsageError, match=said):
        scan(TwoChunks(WHOLE) if data is None else whole, ByteTokenizer(), ScanOptions(reads=reads))


def test_whole_numbers_for_an_mlp_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"input": [i % 5, 3, 1, i % 2], "target": i % 2} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["train", "--train-data-path", "a.jsonl", "--model", "mlp", "--max-steps", "2", "--quiet"]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "forge: the mlp reads features and lists of whole numbers are read as token ids; set "
        "input_kind='features' where they are quantities, or use model='decoder'\n"
    )
    assert main([*words, "--input-kind", "features"]) == 0
