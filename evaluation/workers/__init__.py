"""Tasks in worker processes, here or on a cluster, and the memory that they may take."""
