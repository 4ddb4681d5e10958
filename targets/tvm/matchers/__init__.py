"""Which kernels compute a node: a file per kind of operator, a function per node that begins one.

Such a function takes the `State` and a node of its operator (the table is in `partition.py`). If
it knows a kernel, it claims the node, and the neighbours that ride along, for a call; if not, it
leaves all as it is.
"""
