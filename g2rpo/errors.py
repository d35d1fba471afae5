"""The exception for errors that the user can fix."""


class UserError(Exception):
    """An error that the user can fix: one line with what is wrong and how to fix it.

    The command line prints the message without a traceback and exits with code 2.
    """


def reason(error: BaseException, limit: int = 200) -> str:
    """The message of ``error`` as one line of at most ``limit`` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
