"""What any training run needs besides its method."""
