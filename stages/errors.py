"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake in the user's files, config or arguments: one message that names the place, the rule and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
