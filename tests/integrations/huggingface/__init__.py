"""Tests over tiny models of transformers, randomly initialised: nothing is downloaded."""
