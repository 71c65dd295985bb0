"""Freed memory is kept where that is asked for, and the user's own settings stand."""

import os
import subprocess
import sys

FAULTS = """
import resource, torch
from speeder.io.memory import keep_freed_memory
kept = {keep} and keep_freed_memory()
for _ in range(24):  # until freed blocks beside each other have grown into one that serves every step
    torch.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 23)
print(bool(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool, **settings: str) -> tuple[bool, int]:
    """Whether a fresh process was told to keep memory, and how many pages it was given in eight steps of 32 MB."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | settings)
    told, faults = done.stdout.split()
    return told == "True", int(faults)


def test_large_blocks_are_not_given_back():
    _, given_back = page_faults(False)
    told, kept = page_faults(True)
    assert told and kept < given_back / 4


def test_the_users_settings_stand():
    told, _ = page_faults(True, MALLOC_TRIM_THRESHOLD_="131072")
    assert not told
