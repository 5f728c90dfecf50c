"""The vision side at work: merging and cutting inside the tower (tower), methods behind the projector (images), and the
hooks at tower and projector (tap)."""
