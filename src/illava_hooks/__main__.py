"""``python -m illava_hooks`` is ``illava-hooks``."""

from illava_hooks.cli import app

if __name__ == "__main__":
    app()
