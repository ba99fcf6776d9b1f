"""Labelled images: data sets by name, readers of files, and the loader that makes batches of them."""

from capszoo.errors import DataError

from .augment import Augmentation
from .loader import Loader
from .seeding import seeded_generator
from .sets import DataSplits, Split, default_translate, list_datasets, load_data, load_test_folder

__all__ = [
    "Augmentation",
    "DataError",
    "DataSplits",
    "Loader",
    "Split",
    "default_translate",
    "list_datasets",
    "load_data",
    "load_test_folder",
    "seeded_generator",
]
