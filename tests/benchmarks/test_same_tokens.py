"""One model, three engines, the same greedy tokens."""

import pytest
import torch
import torch.nn.functional as F

from phase4_bitnet import build_model
from phase4_bitnet.export import export_gguf, export_huggingface

for library in ("transformers", "accelerate", "gguf", "xllamacpp"):
    pytest.importorskip(library)

TEXT = """def add(first, second):
    return first + second


def twice(value):
    return add(value, value)


"""


@pytest.fixture(scope="module")
def trained():
    """A byte Llama that has learned a few lines by heart, so that its choices are clear."""
    torch.manual_seed(0)
    model = build_model("llama", vocab_size=256, dim=256, layers=1, heads=4, mlp_ratio=1, max_length=192)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    stream = torch.tensor(list((TEXT * 4).encode()))
    for step in range(60):
        starts = torch.randint(len(TEXT), (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([stream[s : s + 97] for s in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    return model.eval()


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
def test_the_same_32_tokens_in_all_three(trained, kind, tmp_path):
    from same_tokens import compare

    export_huggingface(trained, tmp_path / "hf")
    export_gguf(trained, tmp_path / "m.gguf", tensor_type=kind)
    rows = compare(trained, tmp_path / "hf", tmp_path / "m.gguf", ("def add(", "def twice(value"), 32)
    for row in rows:
        assert row["same"], row["texts"]
        assert len(row["texts"]["forge"]) == 32
        # Not by luck: the gap is wider than what the engines differ by.
        assert row["smallest_gap"] > 2 * max(row["largest_difference"].values())
    assert rows[0]["texts"]["forge"].startswith("first, second):\n    return")
