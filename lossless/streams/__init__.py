"""Stream rows inside the frozen model's layers."""
