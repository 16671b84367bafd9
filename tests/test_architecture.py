"""Holds the shape of the house: imports point one way, one spelling, short modules, telling names.

The layers, from the top: cli -> commands -> factory -> the parts (pipeline/*, callbacks, report, ...) ->
the leaves.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "phases"
PACKAGES = ("phase4_bitnet", "phase5_training")
LONGEST_MODULE = 500

P5 = "phase5_training"
LEAVES = {
    f"{P5}.{name}"
    for name in (
        "background",
        "batches",
        "checkpoint_parts",
        "device_feed",
        "distributed",
        "errors",
        "events",
        "follow",
        "forecast",
        "generalization",
        "loop_config",
        "loop_state",
        "memory",
        "modes",
        "outputs",
        "phases",
        "protocols",
        "random_state",
        "records",
        "signals",
        "slow_average",
        "tensor_files",
    )
}
# Parts of the loop that live outside pipeline/: they import leaves only, so pipeline/ may import them.
SUPPORT = {
    f"{P5}.{name}"
    for name in ("bad_batches", "checkpoint", "feed", "fused_step", "gradients", "meter", "muon", "saving")
}
PHASE4_LEAVES = {
    f"phase4_bitnet.{name}"
    for name in (
        "durable_folder",
        "first_order",
        "int8_matmul",
        "native",
        "native.build",
        "packing",
        "ternary",
    )
}
FACTORY = f"{P5}.factory"
# What may know the factory: the package's public face, the command line, and whole programs built on it.
ABOVE_FACTORY = {
    P5,
    *(f"{P5}.{name}" for name in ("__main__", "bench", "bench_run", "cli", "commands", "demo")),
}
CLI = f"{P5}.cli"
MAY_IMPORT_CLI = {f"{P5}.__main__"}


def module_name(path: Path, root: Path = SOURCE) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (SOURCE / package).rglob("*.py"))


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, those inside functions and type checks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}" if node.module else f"{prefix}{alias.name}"


def resolve(name: str, known: set[str]) -> str | None:
    """Return the module of ours that a dotted import name reaches, or None.

    `from a.b import c` is a.b.c where that is a module, and a.b where c is a name inside it.
    """
    if name in known:
        return name
    parent = name.rpartition(".")[0]
    return parent if parent in known else None


def imports_of_ours() -> dict[str, set[tuple[int, str]]]:
    files = {module_name(path): path for path in source_files()}
    return {
        module: {
            (line, target)
            for line, name in imported_names(path.read_text(encoding="utf-8"))
            if (target := resolve(name, set(files))) and target != module
        }
        for module, path in files.items()
    }


def complaint(importer: str, imported: str) -> str | None:
    """Return why this import points the wrong way, or None where it is fine."""
    if importer.startswith("phase4_bitnet"):
        if imported.startswith(P5):
            return "phase4_bitnet never imports phase5_training"
        if importer in PHASE4_LEAVES and imported not in PHASE4_LEAVES:
            return "a phase 4 leaf imports nothing of ours but another leaf"
        return None
    if importer in LEAVES and imported != f"{P5}.errors":
        return "a leaf imports nothing of ours but errors"
    if importer in SUPPORT and imported.startswith(P5) and imported not in LEAVES:
        return "what pipeline/ builds on imports leaves only"
    if imported == CLI and importer not in MAY_IMPORT_CLI:
        return "only __main__ imports cli"
    if imported == FACTORY and importer not in ABOVE_FACTORY:
        return "only cli and the public face import factory"
    if importer.startswith(f"{P5}.pipeline."):
        return pipeline_complaint(importer, imported)
    if importer.startswith((f"{P5}.callbacks", f"{P5}.report")) and imported.startswith(f"{P5}.pipeline"):
        return "callbacks and report read records and events, never the pipeline"
    return None


def pipeline_complaint(importer: str, imported: str) -> str | None:
    formats = f"{P5}.pipeline.formats"
    if imported in LEAVES | SUPPORT or imported.startswith("phase4_bitnet"):
        return None
    if imported == formats or imported.startswith(f"{formats}."):
        # data_loader and what is split from it (data_*.py) read files; nothing else does.
        if importer.startswith((f"{formats}", f"{P5}.pipeline.data_")):
            return None
        return "only data_loader imports formats"
    if importer.startswith(f"{P5}.pipeline.data_") and imported.startswith(f"{P5}.pipeline.data_"):
        return None
    if imported.startswith(f"{P5}.pipeline"):
        return "files in pipeline/ do not import siblings; the loop receives them as protocols"
    return "pipeline/ imports only leaves and phase4_bitnet"


def test_imports_point_one_way() -> None:
    wrong = [
        f"{importer}:{line} imports {imported}: {reason}"
        for importer, targets in imports_of_ours().items()
        for line, imported in sorted(targets)
        if (reason := complaint(importer, imported))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("phase4_bitnet.layers", f"{P5}.records"),
        ("phase4_bitnet.ternary", "phase4_bitnet.layers"),
        (f"{P5}.events", f"{P5}.records"),
        (f"{P5}.records", FACTORY),
        (f"{P5}.checkpoint", f"{P5}.pipeline.training_loop"),
        (f"{P5}.factory", CLI),
        (f"{P5}.callbacks", FACTORY),
        (f"{P5}.callbacks", f"{P5}.pipeline.training_loop"),
        (f"{P5}.report.page", f"{P5}.pipeline.validation"),
        (f"{P5}.pipeline.training_loop", f"{P5}.pipeline.validation"),
        (f"{P5}.pipeline.training_loop", f"{P5}.pipeline"),
        (f"{P5}.pipeline.training_loop", f"{P5}.pipeline.formats.json"),
        (f"{P5}.pipeline.formats.json", f"{P5}.pipeline.data_loader"),
        (f"{P5}.pipeline.scheduler", f"{P5}.callbacks"),
    ],
)
def test_the_rules_catch(importer: str, imported: str) -> None:
    assert complaint(importer, imported)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        (f"{P5}.cli", FACTORY),
        (f"{P5}.factory", f"{P5}.pipeline.training_loop"),
        (f"{P5}.pipeline.data_loader", f"{P5}.pipeline.formats.json"),
        (f"{P5}.pipeline.training_loop", f"{P5}.events"),
        (f"{P5}.pipeline.bitnet_optimizer", "phase4_bitnet.layers"),
        (f"{P5}.events", f"{P5}.errors"),
    ],
)
def test_the_rules_allow(importer: str, imported: str) -> None:
    assert complaint(importer, imported) is None


def test_no_import_cycle() -> None:
    graph = {module: {target for _, target in targets} for module, targets in imports_of_ours().items()}
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


def test_one_spelling_of_each_package() -> None:
    """`phases.phase5_training` and `phase5_training` would be two modules with two sets of classes."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for folder in ("phases", "tests", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imported_names(path.read_text(encoding="utf-8"))
        if name.startswith(".") or name == "phases" or name.startswith("phases.")
    ]
    assert not wrong, "import with the package's own name, phase5_training...:\n" + "\n".join(wrong)
    assert not (SOURCE / "__init__.py").exists(), "phases/ is a source root, not a package"


def test_modules_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LONGEST_MODULE}
    assert not long, f"past {LONGEST_MODULE} lines a module is two: {long}"


def test_names_say_what_is_inside() -> None:
    vague = [path for path in SOURCE.rglob("*") if path.stem in {"utils", "util", "helpers", "misc"}]
    assert not vague, f"name these after what they hold: {vague}"


def test_every_package_folder_is_a_package() -> None:
    """The build leaves out folders without __init__.py, so an installed copy would lack them."""
    missing = {path.parent for path in source_files()} - {
        path.parent for path in source_files() if path.name == "__init__.py"
    }
    assert not missing, f"no __init__.py in {sorted(map(str, missing))}"
