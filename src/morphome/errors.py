"""One exception and one warning for everything a user can mend."""

from __future__ import annotations


class MorphomeError(Exception):
    """A failure that a user can mend: says what is wrong, in which file or key, and what to do.

    Args:
        problem: what is wrong; names the file, key, slide or fold.
        remedy: what the user can do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        # The name of a file may hold bytes that are no UTF-8, which no file of ours and few terminals take.
        self.problem = problem = problem.encode("utf-8", "backslashreplace").decode("utf-8")
        self.remedy = remedy
        super().__init__(f"{problem}\n  Remedy: {remedy}" if remedy else problem)


class MorphomeWarning(UserWarning):
    """Something a reader of the results should know; the run goes on."""
