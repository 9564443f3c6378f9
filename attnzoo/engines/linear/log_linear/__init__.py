"""Linear attention whose past lies in the buckets of a Fenwick tree, which rows weigh each."""
