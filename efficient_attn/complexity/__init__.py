"""What a mechanism declares about its cost: symbols in `Complexity`, exact integers in `Cost`."""

from .cost import Cost, Flops, Shape
from .counting import FlopCount, count_flops
from .symbolic import Complexity

__all__ = ["Complexity", "Cost", "FlopCount", "Flops", "Shape", "count_flops"]
