"""miniGLM: from books to a small GLM that answers questions about them, on the machine at hand."""

__version__ = "0.1.0"
