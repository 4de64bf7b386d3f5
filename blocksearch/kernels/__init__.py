"""Cells on compiled loops for CPUs; two doors: `fused.mixed_cell` and `found.found_cell`."""
