"""What the site's reference makes of a docstring: an ``Example:`` is code, as griffe takes ``Examples:`` to be."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section. mkdocs.yml loads this."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe with each class, function and attribute that it reads."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
