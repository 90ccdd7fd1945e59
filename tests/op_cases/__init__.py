"""Tables of cases, keyed by the operation's name in `minipar.ops`."""

from tests.op_cases import elementwise, linalg, nn, shape
from tests.op_cases.case import Case, Cases, listed

ALL: Cases = {**elementwise.CASES, **shape.SHAPE, **shape.REDUCE, **linalg.CASES, **nn.CASES}

__all__ = ["ALL", "Case", "Cases", "elementwise", "linalg", "listed", "nn", "shape"]
