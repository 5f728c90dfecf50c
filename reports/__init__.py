"""What readers are handed: an HTML page (html), and runs and reports on W&B (wandb)."""
