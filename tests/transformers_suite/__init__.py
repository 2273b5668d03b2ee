"""transformers' own model tests on stock and patched models; ``make hf-tests``."""
