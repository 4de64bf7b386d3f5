"""How good a network is before it is trained for long."""
