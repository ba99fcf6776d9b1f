"""Benchmarks of routing, training steps and inference against plain PyTorch: recipes/benchmark.py runs them."""
