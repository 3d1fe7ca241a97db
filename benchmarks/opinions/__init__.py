"""A second opinion on where the FFN blocks are, that shares no code and no idea with the finder.

graph        read off the autograd graph of one forward of the whole model
comparing    the two opinions on one model
resolutions  what was decided, in writing, where they differ
"""
