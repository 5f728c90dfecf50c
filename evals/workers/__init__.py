"""Sweeps on several workers (worker): processes of this machine (pool), or actors of Ray (ray), each on a device of its
own (devices). A driver in the sweep's process hands them cells and shards, and stores what they return.
"""
