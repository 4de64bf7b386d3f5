"""Training: the one loop, its checkpoints, retraining from scratch, weights, known networks."""
