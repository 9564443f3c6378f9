"""What a package index shows of the README: its text without links into the checkout, which lead
nowhere there. Hatchling calls this when it builds."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: A link that is neither an address nor a place on the page, and the comments that frame tables.
RELATIVE = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)[^)]+\)")
COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)


class Readme(MetadataHookInterface):
    """The README as the package's description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put the description into the metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = RELATIVE.sub(r"\1", COMMENT.sub("", text))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
