"""An extension of griffe, which reads the docstrings: it marks their examples as Python sessions."""

import re

import griffe

# From a line that begins with `>>>` to the next empty line or the end.
_SESSION = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


def fenced(text: str) -> str:
    """Return a docstring in which fences surround the examples, so that they are shown as code."""
    return _SESSION.sub(r"```pycon\n\g<0>\n```", text)


class Doctests(griffe.Extension):
    """Put the examples in docstrings between fences, so that they are shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
