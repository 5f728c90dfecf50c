"""Images as units, tiles or images of any shape.

Their shapes (shapes), which of them a prompt has (packing), what a tower computed of them (encoding), attention among
their patches (bidirectional), where they land in the rows (rows), what methods see of them (view).
"""
