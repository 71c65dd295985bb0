"""Options of `pytest benchmarks`."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.addoption("--quick", action="store_true", help="tiny shapes: a check, not a measurement")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
