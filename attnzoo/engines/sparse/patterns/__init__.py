"""Which keys a query may see: the support of a sparse A."""
