"""The regression gate: what a baseline holds (baseline) and what has changed since (gate)."""
