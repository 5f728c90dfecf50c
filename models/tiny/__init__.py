"""``tiny``: a small LLaVA, trained on synthetic scenes and shipped with the package."""
