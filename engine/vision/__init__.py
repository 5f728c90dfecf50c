"""The vision side: what the tower encodes by itself (units), where it lands in the rows (rows), what methods see of it
(view), merging inside the tower (tower), methods behind the projector (images), and the hooks at tower and projector
(tap)."""
