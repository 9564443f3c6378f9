"""Which tokens of a row belong together: packed pieces, and how other libraries tell them."""
