"""Figures of a table (plots, and a file each: scores, layers, components) and of a profile (timeplot)."""
