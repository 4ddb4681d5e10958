"""ONNX -> .mlpackage, on any machine, and an evaluator for what was saved."""
