"""What differences mean: intervals and exact tests (stats), figures of a cell (metrics), comparisons within a table
(inference) and of two cells (paired).
"""
