"""Job: a task checkpoint to one ONNX graph with exits, float32 and int8, checked against PyTorch."""
