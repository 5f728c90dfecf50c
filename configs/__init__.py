"""Sweep configurations that ship with the package."""
