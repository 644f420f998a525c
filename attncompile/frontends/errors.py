"""Errors that a person reads: bad input and models that cannot be captured. Each message is one plain
sentence."""


class InputError(ValueError):
    """Something the user gave (a path, a file, a function) cannot be used.

    The message is one sentence: what is wrong, where, and what to do about it.
    """

    def __init__(self, what: str, where: object, advice: str) -> None:
        self.what = what
        self.where = str(where)
        self.advice = advice
        super().__init__(f"{what}: {where}; {advice}")


def unreadable(path: object) -> InputError:
    """The error for a file or folder that may not be read."""
    return InputError("no permission to read", path, "change its permissions or copy it elsewhere")


class CaptureError(ValueError):
    """A model runs, but no graph of it could be taken.

    ``route`` is "export" or "dynamo"; ``reason`` is torch's own explanation, shortened to its first line.
    """

    def __init__(self, route: str, subject: str, reason: str, advice: str) -> None:
        self.route = route
        self.subject = subject
        self.reason = reason
        self.advice = advice
        super().__init__(f"no graph of {subject} could be taken by {route}: {reason}; {advice}")
