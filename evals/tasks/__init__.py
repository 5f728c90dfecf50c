"""What is asked: task definitions and data (tasks), the hub's cache (hub), lmms-eval as a library (lmms_eval), and a
question as it asks it (question).
"""
