"""The members of a front: their weights, files, baselines, and what a report says of them."""
