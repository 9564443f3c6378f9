"""The commands of the command line, each with its arguments and what it does; the exit codes."""

#: Exit codes: a fault of ours or, of `bench`, times that rose; a request that cannot be met; a lost
#: CUDA device; a callable that breaks a rule; Ctrl-C.
FAILED = GOT_SLOWER = 1
REFUSED, DEVICE_LOST, BROKEN, INTERRUPTED = 2, 3, 4, 130
