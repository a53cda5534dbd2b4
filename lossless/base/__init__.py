"""What is computed with: the frozen model, its weights packed, its structure copied."""
