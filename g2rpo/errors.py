"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong and how to mend it.

    The command line prints the message without a traceback and exits with code 2.
    """
