"""What a mechanism declares about its cost: symbols in `Complexity`, exact integers in `Cost`."""

from .cost import Cost, Flops, Shape
from .symbolic import Complexity

__all__ = ["Complexity", "Cost", "Flops", "Shape"]
