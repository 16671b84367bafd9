"""Writes the API reference from the docstrings: ``python tools/make_docs.py FOLDER``."""

import importlib
import pkgutil
import sys
from pathlib import Path

import pdoc


def main() -> None:
    """Document every module of both packages."""
    modules = []
    for name in ("phase4_bitnet", "phase5_training"):
        package = importlib.import_module(name)
        for public in package.__all__:
            getattr(package, public)  # names that are imported when they are used
        modules.append(name)
        found = pkgutil.iter_modules(package.__path__, f"{name}.")  # pdoc walks on by itself
        modules += [module.name for module in found if not module.name.endswith("__main__")]
    pdoc.render.configure(docformat="google", footer_text="Forge")
    pdoc.pdoc(*modules, output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
