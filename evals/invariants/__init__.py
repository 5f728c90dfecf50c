"""What must hold for every method, asserted on miniature models (miniature): tokens, caches, positions and logits
(prefills), generation (generation), compute by two counters (counters), and all of it as one table (table).
"""
