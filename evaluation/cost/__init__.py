"""What a network costs: exact counts, and milliseconds measured here or on another device."""
