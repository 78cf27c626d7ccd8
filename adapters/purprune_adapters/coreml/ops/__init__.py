"""MIL operations, computed with torch."""

from . import elementwise, layers, recurrent, reductions, shapes
from .registry import OPS as OPS
from .registry import Args as Args

__all__ = ["OPS", "Args", "elementwise", "layers", "recurrent", "reductions", "shapes"]
