"""The vision stage, the same for all families."""
