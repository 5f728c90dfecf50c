"""Evaluation, in the order of the arrows: what is asked (tasks), what a user's text means (settings), compute and time
(compute), what a model answers and how it is scored (answers), many such cells (sweeps), and who else may run them
(workers).
"""
