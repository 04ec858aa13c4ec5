"""What any training run needs besides its method: nothing in here imports a module of the root."""
