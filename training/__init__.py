"""Parts of any training run, without a line of the method."""
