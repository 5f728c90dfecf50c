"""What is asked: what defines a task (definitions), facts about those with embedded data (known), tasks with their data
(tasks), questions of one's own (own) and how they are scored (scorers), the hub's cache (hub), lmms-eval as a library
(lmms_eval), and a question as it asks it (question).
"""
