"""The commands of `speeder`, a file each: SUMMARY, EXAMPLE, add_arguments(parser) and run(options).

Each imports what it needs only when it runs, so that `--help` and mistakes answer at once.
"""
