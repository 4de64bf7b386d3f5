"""The networks that blocks are searched in and built into: cells, stacks, the supernet."""
