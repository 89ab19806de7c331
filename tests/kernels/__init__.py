"""The kernels' own tests: the laws over Triton's interpreter, the screen of what is compiled, and GPUs where there are.

`PYTHONPATH=tests python -m kernels sliding_window` runs the laws over one mechanism and says what failed.
"""
