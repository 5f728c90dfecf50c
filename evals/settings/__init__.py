"""What users write: methods as text (method_spec), YAML files that include each other (include)."""
