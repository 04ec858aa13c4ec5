"""What the numbers of an experiment say: comparisons, findings, tables, pictures, pages."""
