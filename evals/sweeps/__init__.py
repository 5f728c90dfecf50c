"""Many cells: their configuration (config), what it comes to (cells), which are taken (claims), who runs them (sweep,
processes, ray, torchrun), what is told meanwhile (events), what it would cost (dry_run, pace), and what comes along
(references).
"""
