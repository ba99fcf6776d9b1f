"""Labelled images: data sets by name, readers of files, and the loader that makes batches of them."""

from capszoo.errors import DataError

from .loader import Loader, Split, seeded_generator
from .sets import DataSplits, default_translate, list_datasets, load_data

__all__ = [
    "DataError",
    "DataSplits",
    "Loader",
    "Split",
    "default_translate",
    "list_datasets",
    "load_data",
    "seeded_generator",
]
