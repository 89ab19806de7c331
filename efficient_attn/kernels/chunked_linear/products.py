"""Products of tiles at the precision of their dtype, and loads and stores of rows.

PRECISION is "ieee" for fp32, "bf16" for bf16 and "tf32" for fp16: features have no bound, so that fp16 could not hold
them, while tf32 has the same significand and the exponents of fp32. "fp16" rounds to fp16 nevertheless: in Triton's
interpreter, which cannot compute in bf16, it goes through the steps of "bf16".
"""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x rounded to what the matrix units take."""
    if PRECISION == "bf16":
        return x.to(tl.bfloat16)
    elif PRECISION == "fp16":
        return x.to(tl.float16)
    elif PRECISION == "tf32":
        # The matrix units cut the last 13 bits off; rounding to nearest first makes the error half of that.
        x = x.to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)
    else:
        return x.to(tl.float32)


@triton.jit
def as_given(x, PRECISION: tl.constexpr):
    """x, which has the inputs' dtype, as an operand: exact."""
    if PRECISION == "bf16" or PRECISION == "fp16":
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def product(x, y, total, PRECISION: tl.constexpr):
    """total + x @ y for operands x and y."""
    if PRECISION == "tf32":
        return tl.dot(x, y, total, input_precision="tf32")
    else:
        return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def product_split(x, y, total, PRECISION: tl.constexpr):
    """total + x @ y for x in fp32, of which the second half of the bits counts too, and an operand y."""
    high = operand(x, PRECISION)
    total = product(high, y, total, PRECISION)
    if PRECISION != "ieee":
        low = operand(x - high.to(tl.float32), PRECISION)
        total = product(low, y, total, PRECISION)
    return total


@triton.jit
def _inside(rows, columns, num_rows, NUM_COLUMNS: tl.constexpr):
    """Where x[rows, columns] exists. Columns start at a multiple of their number, a power of two."""
    inside = ((rows >= 0) & (rows < num_rows))[:, None]
    if ((columns.shape[0] - 1) & NUM_COLUMNS) != 0:
        inside = inside & (columns < NUM_COLUMNS)[None, :]
    return inside


@triton.jit
def load_rows(x, rows, columns, stride, num_rows, NUM_COLUMNS: tl.constexpr):
    """x[rows, columns], zero outside."""
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=_inside(rows, columns, num_rows, NUM_COLUMNS), other=0.0)


@triton.jit
def store_rows(x, rows, columns, stride, num_rows, NUM_COLUMNS: tl.constexpr, values):
    """x[rows, columns] = values, where that exists."""
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=_inside(rows, columns, num_rows, NUM_COLUMNS))


@triton.jit
def load_numbers(x, rows, num_rows, other):
    """x[rows], `other` outside."""
    return tl.load(x + rows, mask=(rows >= 0) & (rows < num_rows), other=other)


@triton.jit
def load_nearest(x, position, num_rows):
    """x[position], from the nearest row if there is none."""
    return tl.load(x + tl.minimum(tl.maximum(position, 0), num_rows - 1))
