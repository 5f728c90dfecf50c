"""The vision side: merging inside the tower (tower), where images land in the rows (rows), and the hooks at tower and
projector (tap)."""
