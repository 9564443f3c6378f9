"""One file a variant: the paper, the equation, and only what is different. Discovered by
`attnzoo.registry`."""
