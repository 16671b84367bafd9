"""llama.cpp as a judge of GGUF files, through the package xllamacpp.

Also a program, which imports nothing of ours and no torch: llama.cpp ends the whole process where it meets
what it does not expect, so a file is first run in one of its own.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LlamaEngine:
    """A GGUF file with a byte vocabulary, loaded by llama.cpp on the CPU with its cache in float32.

    Args:
        path: the file.
        length: most tokens of prompt and answer together.
        threads: CPU threads.

    Raises:
        ImportError: xllamacpp is not installed.
        RuntimeError: llama.cpp cannot load the file.
    """

    def __init__(self, path: str | Path, length: int = 512, threads: int = 1) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel = length, 1
        parameters.n_gpu_layers, parameters.warmup = 0, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.fit_params = False
        parameters.verbosity = 0
        self._server = xllamacpp.Server(parameters)

    def generate(self, prompt: str, tokens: int) -> str:
        """The text that follows a prompt, by the likeliest token each time.

        Args:
            prompt: text.
            tokens: how many at most; the end of the text may come before.
        """
        return self._ask(prompt, tokens)["text"]

    def log_probabilities(self, prompt: str | Sequence[int], vocabulary: int) -> list[float]:
        """Log-probabilities of the next token.

        Args:
            prompt: text, or token ids.
            vocabulary: number of token ids.

        Returns:
            One a token.
        """
        # The server holds back an answer that ends within a character; the bias does not reach probabilities.
        letter = [[ord("A"), 1e9]]
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        answer = self._ask(prompt, 1, n_probs=vocabulary, logit_bias=letter)
        out = [-math.inf] * vocabulary
        for entry in answer["logprobs"]["content"][0]["top_logprobs"]:
            out[entry["id"]] = entry["logprob"]
        return out

    def _ask(self, prompt: str | list[int], tokens: int, **options: Any) -> dict[str, Any]:
        request = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0.0,
            "cache_prompt": False,
            **options,
        }
        answer = self._server.handle_completions(request)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp refused the request: {answer}")
        return answer["choices"][0]


def log_probabilities_apart(
    path: str | Path, rows: Sequence[Sequence[int]], vocabulary: int
) -> list[list[float]]:
    """Log-probabilities of the token after each row, computed by llama.cpp in a process of its own.

    Args:
        path: a GGUF file with a byte vocabulary.
        rows: token ids.
        vocabulary: number of token ids.

    Returns:
        (rows, vocabulary).

    Raises:
        ValueError: llama.cpp ended without an answer.
    """
    request = json.dumps({"path": str(path), "rows": [list(row) for row in rows], "vocabulary": vocabulary})
    done = subprocess.run(
        [sys.executable, __file__], input=request, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ValueError(f"{path}: llama.cpp cannot run it: exit code {done.returncode}, last line: {said}")
    return json.loads(lines[-1])


def _main() -> None:
    request = json.load(sys.stdin)
    engine = LlamaEngine(request["path"], length=max(map(len, request["rows"])) + 8)
    print(json.dumps([engine.log_probabilities(row, request["vocabulary"]) for row in request["rows"]]))


if __name__ == "__main__":
    _main()
