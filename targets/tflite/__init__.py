"""The lowered ONNX graph as a .tflite file, operator by operator, with the graph's own scales."""
