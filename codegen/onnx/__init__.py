"""ONNX: a Spec becomes ONNX Runtime operators or a decomposition, and the graph around it is tidied."""
