"""What every feed-forward class of transformers is, and whether configs are obeyed.

job        one model type: its classes identified, its config audited
sources    a second opinion that reads names and sources only
tallies    from rows to figures
rendering  docs/identify.md
"""
