"""Many cells: their configuration (config), what it comes to (cells), and the run (sweep).

Who runs them: executor is the interface, in_process the engine by default; claims are between processes on one folder.
Around them: what is told meanwhile (events), what a run would cost (dry_run, pace), what comes along (references), and
what cells share (feature_sharing).
"""
