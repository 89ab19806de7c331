"""Linear attention in chunks: features, sums and normaliser in the same kernels.

Tokens stand at positions, in chunks of CHUNK, and these in spans. `states.py` sums up the keys of each span and scans
the sums over spans; `forward.py` walks each span chunk by chunk from the state before it. The backward pass does the
same in both directions. A step starts from the state that it is given; `both_ways.py` walks documents without causality
twice. Features are computed in blocks of BLOCK_M where they are used, and never written.
"""
