"""Scores and the search for alike tokens in a fixed number of launches: kernels where Triton is, else large blocks.

``devices`` tells who goes through here, ``ops`` holds the functions. The latter registers operators with PyTorch,
which takes a while: it is imported where it is used.
"""
