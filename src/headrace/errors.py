"""The one exception that means "the user's input is wrong" (exit code 2).

Every other exception is a fault of ours or of the machine and exits with 1 and a traceback. Nothing else lives here.
"""


class UserError(ValueError):
    """What is wrong, where, and what to do about it, in one line that is shown to the user as it stands."""
