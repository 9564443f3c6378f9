"""What attnzoo finds on a machine: versions, devices, packages, and the backends that run there."""
