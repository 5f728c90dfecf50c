"""What a model does with its visual tokens, and the settings of methods that follow from it (fit)."""
