"""Rows of the study that the package does without: subclasses of what it has, nothing else."""
