"""How a model is scored: token losses, surprisals of words, statistics of differences."""
