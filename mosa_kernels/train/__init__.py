"""Training: recipes, the loop, its state, evaluation, and whole runs in a folder."""
