"""What is stored: records of a cell and their hashes (records), of a question (samples), run folders (store), profiles,
and files that are whole or not there (disk).
"""
