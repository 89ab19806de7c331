"""Defects in what a mechanism says that it costs."""

from __future__ import annotations

from dataclasses import replace

import torch

from efficient_attn import Mechanism
from efficient_attn.complexity import Cost, Flops

from .defect import broken, defect, dense, fast_path, preferred


def misstated(mechanism: Mechanism, lie) -> Mechanism:
    """`mechanism` whose cost is `lie` of the true one and the basis."""
    cls = type(mechanism)

    def _cost(self, shape, training, phase, basis, backend):
        return lie(cls._cost(self, shape, training, phase, basis, backend), basis)

    return broken(mechanism, _cost=_cost)


@defect(
    "declared by hand: one product of the two",
    "window",
    {
        "model_flops_are_the_pairs_of_the_matrix": "declared",
        "hardware_flops_are_counted": "counted",
        "training_flops_are_counted": "counted",
    },
)
def flops_are_halved(m):
    def lie(cost: Cost, basis: str) -> Cost:
        terms = {name: flops // 2 for name, flops in cost.terms.items()}
        return replace(cost, flops=replace(cost.flops, forward=sum(terms.values())), terms=terms)

    return misstated(m, lie)


@defect(
    "torch FlopCounterMode: causal never halves",
    "full_causal",
    {"model_flops_are_the_pairs_of_the_matrix": "declared .* pairs at 2 x 2"},
    missed=("hardware_flops_are_counted",),
)
def causal_is_counted_as_full(m):
    cls = type(m)

    def _cost(self, shape, training, phase, basis, backend):
        counted = "hardware" if basis == "model" else basis
        return cls._cost(self, shape, training, phase, counted, backend)

    return broken(m, _cost=_cost)


@defect(
    "torch FlopCounterMode: an unregistered custom operator counts 0",
    "linear_causal",
    {"torch_flops_are_what_torch_counts": "counted", "hardware_flops_are_counted": "counted"},
)
def operators_count_nothing(m):
    return misstated(m, lambda cost, basis: replace(cost, flops=Flops(0)))


@defect(
    "recomputation left out",
    "window",
    {"training_flops_are_counted": "counted"},
    missed=("hardware_flops_are_counted", "model_flops_are_the_pairs_of_the_matrix"),
)
def recomputation_is_not_declared(m):
    return misstated(m, lambda cost, basis: replace(cost, flops=replace(cost.flops, recompute=0)))


@defect(
    "the terms leave something out",
    "window",
    {"hardware_flops_are_counted": "the terms do not sum"},
)
def terms_do_not_sum(m):
    return misstated(m, lambda cost, basis: replace(cost, terms=dict(list(cost.terms.items())[1:])))


@defect(
    "weights kept for the backward pass, log-sums declared",
    "window",
    {"saved_bytes_are_measured": "bytes kept, declared"},
    missed=("equals_its_matrix",),
)
def weights_are_kept_for_the_backward_pass(m):
    return fast_path(m, dense)


@defect(
    "a linear mechanism that builds an (L, S) mask in each call",
    "linear_causal",
    {"largest_intermediate_grows_as_declared": r"grew like L\^(1\.[5-9]|2\.0)"},
    missed=("equals_its_matrix", "saved_bytes_are_measured"),
)
def intermediate_is_quadratic(m):
    run = preferred(m).run

    def with_a_mask(p):
        visible = torch.ones(p.q.shape[2], p.k.shape[2], dtype=torch.bool).tril()
        return run(p) + 0 * visible[:1, :1].sum()

    return fast_path(m, with_a_mask)


@defect(
    "a formula that its counts do not follow",
    "full",
    {"declared_time_is_the_cost": r"grow like L\^2"},
    missed=("model_flops_are_the_pairs_of_the_matrix",),
)
def time_is_declared_linear(m):
    return broken(m, complexity=replace(type(m).complexity, time="L*E"))


@defect(
    "a window said to see the whole sequence in two layers",
    "window",
    {"declared_path_is_that_of_the_graph": "layers to cross"},
    missed=("declared_time_is_the_cost",),
)
def path_is_declared_short(m):
    return broken(m, complexity=replace(type(m).complexity, path="2"))


@defect(
    "a cache of every key behind a window, declared as the window",
    "full_causal",
    {"declared_decoding_is_the_cost": r"state grows like L\^1\.000, declared L\^0"},
    missed=("declared_time_is_the_cost", "state_size_is_declared"),
)
def state_is_declared_constant(m):
    return broken(m, complexity=replace(type(m).complexity, state="w*E"))


@defect(
    "decoding declared as the forward pass over as many tokens",
    "linear_causal",
    {"decoding_flops_are_counted": "counted .* declared"},
    missed=("hardware_flops_are_counted", "state_size_is_declared"),
)
def steps_are_declared_as_passes(m):
    cls = type(m)

    def _cost(self, shape, training, phase, basis, backend):
        if phase == "decode":
            shape, phase = replace(shape, kv_len=shape.q_len), "prefill"
        return cls._cost(self, shape, training, phase, basis, backend)

    return broken(m, _cost=_cost)


@defect(
    "parameters that nobody reads",
    "linformer",
    {"declared_traffic_is_every_tensor_once": "bytes to read, declared"},
    missed=("saved_bytes_are_measured", "hardware_flops_are_counted"),
)
def projections_are_not_read(m):
    size = sum(p.numel() for p in m.parameters())
    return misstated(m, lambda cost, basis: replace(cost, bytes_read=cost.bytes_read - 4 * size))


@defect(
    "workspace takes no memory",
    "window",
    {"peak_bytes_are_bounded": "bytes at once, declared"},
    missed=("saved_bytes_are_measured", "largest_intermediate_grows_as_declared"),
)
def peak_forgets_the_workspace(m):
    return misstated(m, lambda cost, basis: replace(cost, peak_bytes=cost.peak_bytes - cost.transient_bytes))


@defect(
    "decoding reads one token's keys, not the cache",
    "full_causal",
    {"decoding_traffic_is_the_state_once": "bytes to read, declared"},
    missed=("declared_traffic_is_every_tensor_once", "state_size_is_declared"),
)
def decoding_does_not_read_the_cache(m):
    cls = type(m)

    def _cost(self, shape, training, phase, basis, backend):
        cost = cls._cost(self, shape, training, phase, basis, backend)
        return replace(cost, bytes_read=cost.bytes_read - cost.state_bytes) if phase == "decode" else cost

    return broken(m, _cost=_cost)
