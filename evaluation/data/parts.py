"""The parts of a set that its maker may have divided it into, and how people spell their names."""

TRAIN, VALID, TEST = range(3)
PARTS = {"train": TRAIN, "val": VALID, "test": TEST}  # our own spelling
LEFT_OUT = len(PARTS)  # the part of images that nothing uses
SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_PART_OF = {spelling: part for part, spellings in SPELLINGS.items() for spelling in spellings}


def part_of(name: str) -> str | None:
    """Return the part that a name means, in any case of its letters; None if it means none."""
    return _PART_OF.get(name.casefold())
