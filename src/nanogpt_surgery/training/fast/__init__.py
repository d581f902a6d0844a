"""The same numbers, only faster: nothing here is needed to train.

`fit` calls `accelerate` once (accelerate.py); with `fast=False` nothing of this folder is loaded.
"""
