"""Text files, their cleaning, and the shards of token ids made from them."""
