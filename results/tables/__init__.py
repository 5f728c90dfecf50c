"""Tables: rows (tables), columns, notes, a summary in words (summary), and forms from Markdown to LaTeX (render,
formats, paper), and in notebooks.
"""
