"""One new token: kernels that read what is remembered once."""
