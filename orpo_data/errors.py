"""Errors that a user can mend: one line each, naming the file, the row or the key."""


class OrpoError(Exception):
    """Something the user can mend. The command line prints the message alone and exits with 1."""


class UsageError(OrpoError):
    """A wrong recipe, key or argument. The command line exits with 2."""
