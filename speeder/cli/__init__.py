"""The commands of `speeder`, one file each: SUMMARY, EXAMPLE, add_arguments(parser) and run(options).

Each imports what it needs only when it runs, so that `--help` and error messages come at once.
"""
