"""Stage one: gradient-based block search in a supernet."""
