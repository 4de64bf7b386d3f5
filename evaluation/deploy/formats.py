"""The formats of files for devices."""

from enum import StrEnum


class Format(StrEnum):
    """What an exported file is."""

    ONNX = "onnx"
    ONNX_INT8 = "onnx-int8"
    PT2 = "pt2"
    WEIGHTS = "weights"

    @property
    def suffix(self) -> str:
        """With which a file's name ends."""
        return SUFFIXES[self]

    def name_of(self, id: str) -> str:
        """Return what the file of a member is called by those who time it, beside other files."""
        return f"{id}.int8" if self is Format.ONNX_INT8 else id


SUFFIXES = {
    Format.ONNX: ".onnx",
    Format.ONNX_INT8: ".int8.onnx",
    Format.PT2: ".pt2",
    Format.WEIGHTS: ".safetensors",
}
