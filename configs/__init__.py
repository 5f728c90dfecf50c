"""Sweep configurations that ship with the package, and named settings of methods: ``presets/METHOD/NAME.yaml``."""
