"""The Spec language: index expressions, operations on named axes, and everything that reads them."""

from attncompile.ir.attend import NO_SINK, Attend, Normalizer, grouped
from attncompile.ir.expr import Expr, Index, Load, Size
from attncompile.ir.operation import Operation
from attncompile.ir.operators import Kind
from attncompile.ir.ops import Cache, Position, Project, Quantize
from attncompile.ir.refusal import Refusal, RefusalError
from attncompile.ir.regroup import Regroup
from attncompile.ir.scan import Scan
from attncompile.ir.simplify import simplify
from attncompile.ir.spec import Spec, parse_spec, print_spec
from attncompile.ir.storage import Dequantize, Gather
from attncompile.ir.text import parse_expr, print_expr
from attncompile.ir.types import Axis, TensorType, Value, tensor_type

__all__ = [
    "NO_SINK",
    "Attend",
    "Axis",
    "Cache",
    "Dequantize",
    "Expr",
    "Gather",
    "Index",
    "Kind",
    "Load",
    "Normalizer",
    "Operation",
    "Position",
    "Project",
    "Quantize",
    "Refusal",
    "RefusalError",
    "Regroup",
    "Scan",
    "Size",
    "Spec",
    "TensorType",
    "Value",
    "grouped",
    "parse_expr",
    "parse_spec",
    "print_expr",
    "print_spec",
    "simplify",
    "tensor_type",
]
