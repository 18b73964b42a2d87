"""Other programs' forms of a model: GGUF, ONNX, a model card, and models of others that come in."""
