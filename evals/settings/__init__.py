"""What users write: methods as text (method_spec), what they may cost (target), YAML files that include each other
(include), and what every configuration says (config).
"""
