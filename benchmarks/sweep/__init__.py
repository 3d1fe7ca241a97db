"""What `benchmarks.coverage` does for one model type, and how many types are done beside each other.

row        what is recorded of a model type
forking    a server that runs each job in a forked child, with a time and a memory limit
outputs    the tensors of one forward by name; needs torch only
converting a type is built, searched, converted, measured, trained one step, and saved
reading    what was saved is loaded by a process that knew nothing of it
scrubbing  what names a machine goes before a row is written
pool       types dealt out to pairs of servers, rows appended to a file
rendering  rows to docs/coverage.md
"""
