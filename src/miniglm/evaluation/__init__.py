"""How good answers and models are. `scores` and `keys` compare texts, `measure` and `evaluate` ask a model, `summary`
turns what it said into figures, `report`, `pictures` and `compare` show them. Knows nothing of how a model is trained."""
