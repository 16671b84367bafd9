"""The byte vocabulary as the files of other tools: token i is byte i, and nothing is merged.

Both transformers' tokenizers and llama.cpp write a byte as one character, by GPT-2's table (Radford et al.
2019; openai/gpt-2 `src/encoder.py`, bytes_to_unicode): a printable byte stands for itself, the others take
the characters from U+0100 on, in order. A byte-level BPE vocabulary with these 256 tokens and no merges is
the byte vocabulary.
"""

from __future__ import annotations

from typing import Any

BYTES = 256
# The byte that pads text in training; no text holds it, so it can end one.
END = 0


def byte_characters() -> list[str]:
    """The character that stands for each byte.

    >>> [byte_characters()[b] for b in (0, 32, 65, 255)]
    ['Ā', 'Ġ', 'A', 'ÿ']
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(c) for c in range(BYTES, 2 * BYTES))
    return [chr(b) if b in printable else next(others) for b in range(BYTES)]


def tokenizer_json() -> dict[str, Any]:
    """The content of tokenizer.json, the format of the `tokenizers` library."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character: b for b, character in enumerate(byte_characters())},
            "merges": [],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """The content of tokenizer_config.json: which class of transformers reads the former."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
