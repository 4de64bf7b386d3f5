"""One complete, commented YAML file per experiment; a package so that an installed copy finds them."""
