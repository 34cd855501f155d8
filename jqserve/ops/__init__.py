"""The one switch between what a layer wants and which kernel runs: matmuls by weight scheme, attention over pages."""
