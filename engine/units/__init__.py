"""Images as units, tiles or images of any shape: their shapes (shapes), what a tower computed of them (encoding), where
they land in the rows (rows), what methods see of them (view)."""
