"""Greedy text of one exported byte model in three engines: Forge, transformers and llama.cpp.

    forge write-data python_text
    forge train examples/text_llama.yaml
    python benchmarks/same_tokens.py runs/text_llama --record benchmarks/records/same_tokens.jsonl

Each prompt is a row: the text that each engine appends, whether the three agree, and why they may not: the
smallest gap between the two likeliest tokens on the way, against the largest difference of log-probabilities
that the other engine shows on the same way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phase4_bitnet import load_compressed_model
from phase4_bitnet.export import export_gguf, export_huggingface
from phase4_bitnet.export.llama_engine import LlamaEngine
from phase5_training.records import machine

PROMPTS = (
    "import os\nimport sys\n",
    "def __init__(self",
    "    def close(self):\n",
    "class Error(Exception):\n",
    "    if not isinstance(",
    "        raise ValueError(",
    "    return self._",
    "for i in range(",
)


def compare(
    model: nn.Module, folder: Path, file: Path, prompts: tuple[str, ...], tokens: int
) -> list[dict[str, Any]]:
    """One row a prompt; the engines load what `export_huggingface` and `export_gguf` wrote."""
    import transformers

    rows = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        engine = LlamaEngine(file, length=max(map(len, prompts)) + tokens + 8)
        for prompt in prompts:
            ids = torch.tensor([list(prompt.encode())])
            assert tokenizer(prompt)["input_ids"] == ids[0].tolist()
            ours = greedy(model, ids, tokens)
            generated = theirs.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
            texts = {
                "forge": text_of(ours[0, ids.shape[1] :]),
                "transformers": tokenizer.decode(generated),
                "llama.cpp": engine.generate(prompt, tokens),
            }
            ways = range(ids.shape[1], ours.shape[1])
            scores = model(ours)[0].log_softmax(-1)
            others = {
                "transformers": theirs(ours).logits[0].log_softmax(-1)[ids.shape[1] - 1 : -1],
                "llama.cpp": torch.tensor(
                    [engine.log_probabilities(ours[0, :n].tolist(), 256) for n in ways]
                ),
            }
            scores = scores[ids.shape[1] - 1 : -1]
            best = scores.topk(2, dim=-1).values
            rows.append(
                {
                    "prompt": prompt,
                    "tokens": tokens,
                    "texts": texts,
                    "same": len(set(texts.values())) == 1,
                    "smallest_gap": float((best[:, 0] - best[:, 1]).min()),
                    # Of the two likeliest tokens: it is their order that decides.
                    "largest_difference": {
                        name: float((other - scores).gather(1, scores.topk(2, dim=-1).indices).abs().max())
                        for name, other in others.items()
                    },
                }
            )
    return rows


def greedy(model: nn.Module, ids: Tensor, tokens: int) -> Tensor:
    """`ids` (1, length) and the likeliest tokens after them, each computed from the whole text."""
    for _ in range(tokens):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids


def versions() -> dict[str, str]:
    """Of what takes part."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "xllamacpp", "gguf")}


def text_of(ids: Tensor) -> str:
    """The text of byte tokens."""
    return bytes(ids.tolist()).decode("utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a run of a byte Llama")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--tensor-type", nargs="+", default=["TQ2_0", "TQ1_0", "F16"])
    parser.add_argument("--record", help="JSON lines to write")
    found = parser.parse_args()
    model = load_compressed_model(Path(found.run) / "best")
    made_on, rows = machine() | {"versions": versions()}, []
    with tempfile.TemporaryDirectory() as place:
        folder, file = Path(place) / "hf", Path(place) / "model.gguf"
        size = {"huggingface": export_huggingface(model, folder).bytes}
        for kind in found.tensor_type:
            size["gguf"] = export_gguf(model, file, tensor_type=kind, overwrite=True).bytes
            for row in compare(model, folder, file, PROMPTS, found.tokens):
                row |= {"tensor_type": kind, "bytes": dict(size), "model": model.config.to_dict()}
                rows.append(
                    row | {"command": f"python benchmarks/same_tokens.py {found.run}", "machine": made_on}
                )
                print(
                    kind,
                    repr(row["prompt"]),
                    "same" if row["same"] else row["texts"],
                    f"{row['smallest_gap']:.3f}",
                )
    if found.record:
        Path(found.record).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
