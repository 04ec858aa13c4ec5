"""A grammar of simple English that writes an invented corpus and minimal pairs to test on."""
