"""Trained networks as files for devices, and what they say of pictures."""
