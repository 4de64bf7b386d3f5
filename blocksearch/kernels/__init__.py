"""Cells and ops on compiled loops for CPUs; two doors: `fused.mixed_cell` and `units.run_op`."""
