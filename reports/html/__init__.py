"""The HTML report: the page (report), what stands in cards (cards), which questions (questions), figures (inline)."""
