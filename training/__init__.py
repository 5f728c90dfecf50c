"""How ``tiny`` was made; not needed at run time. ``python -m visibench.training.train`` reproduces it."""
