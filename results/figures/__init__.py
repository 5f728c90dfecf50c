"""Pictures: accuracy against compute (plots, series) and stage times (timeplot)."""
