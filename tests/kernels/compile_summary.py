"""Lines at the end of a test run: which GPU kernels were compiled for it, which were not, and why.

Tests give them with `record_property(PROPERTY, line)`. They travel with the tests' reports, so from the processes of
pytest-xdist too; tests/conftest.py has the hook, since that of a deeper folder is not read by the process that prints.
"""

from __future__ import annotations

PROPERTY = "compiled GPU kernels"


def pytest_terminal_summary(terminalreporter) -> None:
    """pytest's hook."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    lines = dict.fromkeys(value for name, value in properties if name == PROPERTY)
    if lines:
        terminalreporter.section(PROPERTY)
    for line in sorted(lines):
        terminalreporter.write_line(line)
