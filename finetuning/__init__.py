"""Tasks of classifying texts, and the model that classifies them."""
