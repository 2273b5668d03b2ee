"""One patched model while it runs: its session, its hooks, its cache, masks, report and provenance."""
