"""The vision side at work: shared outputs of the tower (features), merging and cutting inside it (tower), methods
behind the projector (images), who can act where (limits), and the hooks at tower and projector (tap)."""
