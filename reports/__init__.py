"""Reports of a run: one HTML page (html), Weights & Biases (wandb), and images of questions for both (question_image,
image_loader).
"""
