"""C++ kernels for the CPU, compiled on the machine that runs them."""

from phase4_bitnet.native.build import available

__all__ = ["available"]
