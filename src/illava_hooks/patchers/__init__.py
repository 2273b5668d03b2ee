"""Model surgery: one file per family, and what both families do in the two stages."""
