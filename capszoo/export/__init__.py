"""Trained models and operators for other software: compiled packages, and folders for the Hugging Face hub."""

from .card import model_card
from .compiled import compile_package
from .kernel_hub import write_kernel

__all__ = ["compile_package", "model_card", "write_kernel"]
