"""Checks that what the documentation names is there: links, headings, paths, make targets, subcommands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "phases/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
# Paths inside these are in the repository; runs/... and the like come into being on the user's disk.
TRACKED_FOLDERS = ("phases/", "tests/", "docs/", "benchmarks/", "tools/", ".ci/")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def headings(text: str) -> set[str]:
    """Return the anchors that a Markdown file's headings make, as the usual hosts spell them."""
    lines = re.findall(r"^#{1,6}[ \t]+(.+?)[ \t]*#*$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.replace("`", "").lower()).replace(" ", "-") for line in lines}


def broken_links(document: Path) -> list[str]:
    text = document.read_text(encoding="utf-8")
    broken = []
    for target in LINK.findall(INLINE_CODE.sub("", FENCE.sub("", text))):
        if EXTERNAL.match(target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        if not path.exists():
            broken.append(f"{target}: no such file")
        elif anchor and path.suffix == ".md" and anchor not in headings(path.read_text(encoding="utf-8")):
            broken.append(f"{target}: no such heading")
    return broken


def commands(text: str) -> list[str]:
    """Return the command lines a document shows: lines of code blocks, and code inside sentences."""
    blocks = [block.group() for block in FENCE.finditer(text)]
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()[1:-1]]
    return lines + INLINE_CODE.findall(FENCE.sub("", text))


def missing_targets(lines: list[str], makefile: str) -> list[str]:
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    asked = {m.group(1) for line in lines if (m := re.match(r"make (?:[A-Z]+=\S+ )*([a-z]+)\b", line))}
    return sorted(asked - targets)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    assert not broken_links(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_named_paths_exist(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    code = [
        c for c in INLINE_CODE.findall(text) if c.startswith(TRACKED_FOLDERS) and not set(c) & set("<>*{ ")
    ]
    missing = [c for c in code if not (ROOT / c.partition("::")[0].rstrip(":0123456789")).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_make_targets_exist(document: Path) -> None:
    lines = commands(document.read_text(encoding="utf-8"))
    assert not missing_targets(lines, (ROOT / "Makefile").read_text(encoding="utf-8"))


def test_forge_subcommands_exist() -> None:
    asked = {
        (named(document), m.group(1))
        for document in DOCUMENTS
        for line in commands(document.read_text(encoding="utf-8"))
        if (m := re.match(r"(?:\.venv/bin/|python -m )?(?:forge|phase5_training) ([a-z][a-z-]+)\b", line))
    }
    if asked:
        help_text = subprocess.run(
            [sys.executable, "-m", "phase5_training", "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert not {(where, name) for where, name in asked if not re.search(rf"\b{name}\b", help_text)}


def test_the_checks_catch(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n[a](gone.md) [b](#three) [c](#one-two) [d](page.md)\n", encoding="utf-8")
    assert broken_links(page) == ["gone.md: no such file", "#three: no such heading"]
    shown = commands("text `make nothing`\n```bash\n$ make test\nmake PYTHON=x never\n```\n")
    assert missing_targets(shown, "test: x\n") == ["never", "nothing"]
