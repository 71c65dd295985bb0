"""What to train, as YAML: the schema, and the recipes that come with the package."""
