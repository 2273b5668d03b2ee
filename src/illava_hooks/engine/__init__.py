"""The engine that knows no family: what it changes in a model, what travels through one forward, what that leaves.

From below to above: `compat`, `records` and `hookset` stand alone; `transport` and `session` carry what belongs to a
call and to a model; `encoder`, `prompt`, `decoder` and `cache` do the work of the two stages on tensors; `family` is
what they ask of a model's family; the hooks bring them into the model; `install` puts everything in, or nothing.
"""
