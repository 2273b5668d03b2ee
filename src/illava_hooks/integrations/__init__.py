"""Ready-made adapters for evaluation harnesses and servers; each needs its package only when it is used."""
