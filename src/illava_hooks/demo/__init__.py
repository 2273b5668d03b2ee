"""A page in the browser: answers with and without merging side by side, what they cost, and which patches are left.

It is served with gradio (``pip install 'illava-hooks[demo]'``), which nothing needs until the page is built.
"""
