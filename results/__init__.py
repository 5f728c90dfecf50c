"""Results: what is stored of a run, and the tables, figures and comparisons made of it."""
