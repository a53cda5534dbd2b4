"""The decode loop, and what it measures and decides by."""
