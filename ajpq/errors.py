"""The one exception that means "your input, not our bug"."""


class AjpqError(ValueError):
    """Bad input, told in one sentence: the thing, the rule, the value and the way out.

    The command line prints it without a traceback and exits with status 2.
    """
