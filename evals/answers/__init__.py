"""What a model answers: batches generated (generate) and kept (checkpoint), scored by lmms-eval (score), stored as one
cell (cell); and the model that lmms-eval's own command line finds by its entry point (lmms_model, lmms_manifest).
"""
