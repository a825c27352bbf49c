"""Tasks: data and evaluation. No model code."""
