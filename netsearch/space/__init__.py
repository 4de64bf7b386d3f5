"""The space of networks: genomes, what they describe, and what they cost."""
