"""How other libraries spell the same: a table, values turned from one spelling into another, and
functions in theirs over the engines here."""

from attnzoo.conventions.dialects.facts import SPELLINGS, Spelling
from attnzoo.conventions.dialects.turning import from_, to

__all__ = ["SPELLINGS", "Spelling", "from_", "to"]
