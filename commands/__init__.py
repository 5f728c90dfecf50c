"""The commands of the command line, by subject; what they share is in ``shared``."""
