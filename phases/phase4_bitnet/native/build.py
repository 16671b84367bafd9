"""Compiles the C++ kernels of this folder at first use and registers them as ``torch.ops.forge``.

The kernels are built for the processor they run on (``-march=native``), which a wheel cannot do. The
library is kept in the user's cache folder under a hash of the sources, the compiler, the flags, the
processor and torch's version, so a machine compiles once. Where there is no compiler or no AVX-512 VNNI,
``available()`` is False and callers use torch's own operators: the results are the same, the time is not.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("forge")

SOURCES = Path(__file__).parent
# Instructions that the matrix kernels are written in; Linux spells them so in /proc/cpuinfo.
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni")
# No -ffast-math: the kernels promise the bits that torch's operators give. Contraction to FMA is off for
# the same reason.
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-ffp-contract=off")


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether ``torch.ops.forge`` holds the kernels; compiles and loads them at the first call.

    ``FORGE_NATIVE=0`` in the environment turns them off, to compare with torch's operators.
    """
    return not why_not()


@cache
def why_not() -> str:
    """Why the kernels are not there, "" where they are."""
    reason = _load()
    if reason:
        logger.info("native kernels are off (%s); torch's operators are used, which are slower", reason)
    return reason


def _load() -> str:
    if os.environ.get("FORGE_NATIVE") == "0":
        return "FORGE_NATIVE=0"
    missing = sorted(set(NEEDED) - processor_flags())
    if missing:
        return f"the processor has no {' '.join(missing)}"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return "no C++ compiler; install g++, or name one in CXX"
    try:
        library = _library_path(compiler)
        if not library.exists():
            _build(compiler, library)
        torch.ops.load_library(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"building or loading them failed: {detail.strip().splitlines()[0] if detail else error}"
    return ""


def processor_flags() -> set[str]:
    """The instruction sets of this processor, as Linux names them; empty where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def _library_path(compiler: str) -> Path:
    """Where the library for these sources on this machine is kept."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    digest = hashlib.sha256()
    for part in (version, torch.__version__, " ".join(FLAGS), platform.machine()):
        digest.update(part.encode())
    digest.update(" ".join(sorted(processor_flags())).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + source.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "forge-training" / f"native-{digest.hexdigest()[:20]}.so"


def _build(compiler: str, library: Path) -> None:
    """Compile into a temporary file and rename it, so that processes that start together do not clash."""
    library.parent.mkdir(parents=True, exist_ok=True)
    logger.info("compiling the native kernels into %s; once per machine and version, half a minute", library)
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = []
        running = []
        for source in sorted(SOURCES.glob("*.cpp")):
            target = Path(folder) / f"{source.stem}.o"
            compile_flags = [flag for flag in FLAGS if flag != "-shared"]
            command = [compiler, *compile_flags, abi, *includes, "-c", str(source), "-o", str(target)]
            running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
            objects.append(str(target))
        for command, process in running:
            _, stderr = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=stderr)
        built = Path(folder) / library.name
        link = [compiler, *FLAGS, *objects, *libraries, "-o", str(built)]
        subprocess.run(link, check=True, capture_output=True, text=True)
        os.replace(built, library)
