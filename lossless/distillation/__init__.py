"""The model's own answers, collected to learn from."""
