"""One file for each ecosystem, imported on first use; each is the only place that imports its package."""
