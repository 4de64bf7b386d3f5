"""Stage two: NSGA-II assembles blocks into networks."""
