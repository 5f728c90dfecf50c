"""W&B: what a run holds (content), how it is sent (sink), and its report (document)."""
