"""ONNX: a Spec becomes ONNX Runtime operators or a plain decomposition, and the graph around it is tidied exactly."""
