"""The table `data` of a config: which images, how they are divided, and how they are changed."""

from typing import Literal

from pydantic import BaseModel, Field

from evaluation.data.pictures import MIN_SIDE_PX, Fit

MAX_SIDE_PX = 4096
MAX_IMAGES = 10**9

OWN = "own"  # images that a user brings from Python
Name = Literal["digits", "cifar10", "cifar100", "fashion_mnist", "mnist", "npz", "folder", "own"]


class AugmentConfig(BaseModel, frozen=True, extra="forbid"):
    """Random changes of training images, drawn for each image anew."""

    # black border, from which a crop takes the original size
    pad_px: int = Field(default=0, ge=0, le=MAX_SIDE_PX)
    flip: bool = False  # mirror left to right with probability 1/2
    # side of a square set to the mean; 0 = off
    cutout_px: int = Field(default=0, ge=0, le=MAX_SIDE_PX)


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """Which images, and how they are divided; fractions are for parts that the source lacks."""

    name: Name = "digits"
    root: str | None = None  # the .npz file, the folder, or where torchvision's sets are
    download: bool = False  # let torchvision download its set into root
    # square; folder needs it
    image_size_px: int | None = Field(default=None, ge=MIN_SIDE_PX, le=MAX_SIDE_PX)
    fit: Fit = "crop"  # how a picture of other proportions fills the square
    color: Literal["auto", "grey", "rgb"] = "auto"  # auto: grey only if every image is grey
    valid_fraction: float = Field(default=0.25, gt=0, lt=1)  # of train, becomes search_valid
    test_fraction: float = Field(default=0.2, gt=0, lt=1)  # of all images
    # stratified subset; None = all
    max_train_images: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    max_test_images: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    augment: AugmentConfig = AugmentConfig()  # for whoever calls batches
