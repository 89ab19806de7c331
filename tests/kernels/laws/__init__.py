"""The laws that a kernel is held to in Triton's interpreter: those of the package, at sizes that it gets through.

The interpreter takes milliseconds for each block and computes fp32 and fp16 alone, so that here each case is judged
by the error of plain torch against fp64, and not by agreement in fp64.
"""

from . import exactness, masking, numerics, operators
from .law import LAWS

__all__ = ["LAWS", "exactness", "masking", "numerics", "operators"]
