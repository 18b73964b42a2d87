"""Scores of answers and of models. Knows nothing of how a model is trained or asked."""
