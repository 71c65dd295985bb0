"""The base of every error that a user of Speeder can cause and fix."""


class SpeederError(Exception):
    """A mistake in the input, the files or the set-up. Its message is one readable line, which the CLI prints."""
