"""What the files and folders of a run are called, where more than one room must know."""

RETRAINED = "retrained"  # the folder of the members
EXPORTS = "exports"  # the folder of exported files
WEIGHTS = "weights.safetensors"  # of a retrained network, in its own folder
SHARED_WEIGHTS = "shared_weights.safetensors"
