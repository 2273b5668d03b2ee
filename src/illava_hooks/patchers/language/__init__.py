"""The language stage, the same for all families."""
