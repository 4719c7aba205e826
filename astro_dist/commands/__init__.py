"""The commands: each parses its options, calls one function and prints what that returns.

Most functions import torch, which takes seconds that `--help` need not wait for; so each command imports what it calls.
"""
