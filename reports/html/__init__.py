"""The HTML report: the page (report), its questions (questions) and pictures (pictures, inline)."""
