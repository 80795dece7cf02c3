"""What a run executes: a model, its data and its objective."""
