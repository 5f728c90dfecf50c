"""What differences mean.

figures of a cell by image (metrics) → intervals, sign_flip (exact tests), power (detectable differences, equivalence)
→ comparison (two methods, families of tests) → inference (all rows of a table) and paired (two cells).
"""
