"""From streams to a draft tree that fits the machine."""
