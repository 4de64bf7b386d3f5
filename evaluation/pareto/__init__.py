"""Fronts of networks, and the choice of one of their members."""
