"""Softmax attention over a structured mask, as Triton kernels; importing this package imports no Triton.

A mask is a chain of `parts`, each walked as a band in closed form or by a table of blocks; the kernels of one part
take up the sums where those of the part before left them.
"""
