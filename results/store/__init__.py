"""What is stored: records and their hashes (records), run folders (store), profiles, where visual tokens lie in an
image (token_grids), and files that are whole or not there (disk).
"""
