"""What every version of ONNX Runtime can do with every attention operator, found by trying.

    python -m benchmarks.onnx_capabilities --versions FOLDER

writes ``codegen/onnx/tried.tsv``, from which operators are chosen, and ``docs/onnx-operators.md``. "Right" is what
loads, runs, and gives what the operator's definition gives (:mod:`benchmarks.onnx_capabilities.formulas`) up to
rounding, at two lengths and twice in a row. An attribute that is accepted and has no effect is told apart as "ignored".
"""
