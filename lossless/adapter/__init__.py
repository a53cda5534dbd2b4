"""What is trained: weights, saving, the hub, and what fits which base."""
