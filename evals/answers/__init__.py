"""What a model answers: one cell is specified (cell_spec), its batches generated (generate) and kept (checkpoint),
scored by lmms-eval (score) and stored (cell); and the model that lmms-eval's own command line finds by its entry point
(lmms_model, lmms_manifest).
"""
