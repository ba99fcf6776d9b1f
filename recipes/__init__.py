"""The scripts that a person runs, as `python recipes/train.py` in a clone and `capszoo train` anywhere."""
