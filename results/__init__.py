"""Results: what is stored of a run (store), what it shows (statistics), and the tables, figures, checks and comparisons
with printed figures made of it.
"""
