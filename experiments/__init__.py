"""Recipes of experiments, their results, and the report of them."""
