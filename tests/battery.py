"""The 24 properties that every mechanism is held to, and which law or test holds each: the map of the tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Property:
    """A claim, the laws of `efficient_attn.testing` that hold it, and the tests that do, as `file::function`."""

    claim: str
    laws: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()


PROPERTIES: dict[int, Property] = {
    1: Property(
        "exact: the paper's definition written out densely in fp64",
        ("equals_its_matrix", "honours_bias", "rows_sum_to_one", "error_is_within_budget"),
        (
            "laws/test_laws.py::test_matrix_is_the_paper",
            "test_layers.py::test_equals_the_formula_written_out",
        ),
    ),
    2: Property(
        "causal: no future content moves a bit of the past, in fp32, bf16 and fp16",
        ("sees_no_future", "sends_no_gradient_to_the_future", "matrix_is_lower_triangular"),
        (
            "test_properties.py::test_performer_past_is_bit_equal_under_any_future_at_any_scale",
            "test_regressions.py::test_masking_the_future_moves_no_bit_of_the_past",
        ),
    ),
    3: Property(
        "a prefix gives the prefix; some of the queries give their rows",
        ("prefix_equals_whole", "some_queries_give_their_rows"),
    ),
    4: Property(
        "padding, NaN and Inf included, moves no bit of outputs and gradients; padded = unpadded",
        ("padding_content_is_invisible", "padded_equals_unpadded", "masked_keys_have_no_weight"),
        (
            "test_layers.py::test_padding_reaches_neither_outputs_nor_gradients",
            "test_regressions.py::test_nan_in_a_padding_segment_reaches_nobody",
        ),
    ),
    5: Property(
        "a row with nothing to attend to is zero, with finite zero gradients",
        ("nothing_to_attend_to_gives_zero",),
    ),
    6: Property(
        "a row beside others is the row alone; a NaN neighbour has no effect",
        ("batch_neighbours_are_invisible",),
        ("test_properties.py::test_bigbird_draws_over_the_whole_sequence_whatever_the_batch",),
    ),
    7: Property(
        "any shape: nothing, one token, edges of windows, blocks and tiles, primes, L != S, grouped heads",
        ("takes_empty_inputs", "steps_take_nothing", "grouped_heads_equal_repeated_heads"),
        (
            "properties/test_lengths.py::test_the_output_is_matrix_times_values_at_every_length",
            "test_layers.py::test_small_shapes",
        ),
    ),
    8: Property(
        "a window sees the keys that it says, and no more",
        ("model_flops_are_the_pairs_of_the_matrix",),
        (
            "test_properties.py::test_a_causal_window_sees_exactly_window_size_keys",
            "test_properties.py::test_sinks_come_beside_the_window",
            "test_masks.py::test_every_view_is_the_predicate",
        ),
    ),
    9: Property(
        "at its limit a mechanism is full attention",
        ("equals_full_attention_at_its_limit",),
        (
            "test_properties.py::test_performer_approaches_softmax_attention_and_beats_the_mean_of_v",
            "test_properties.py::test_full_attention_is_sdpa",
        ),
    ),
    10: Property(
        "at once, in any chunks, token by token: the same, on every backend",
        ("stepping_equals_forward", "stepping_keeps_precision", "state_can_be_moved_about"),
        ("test_layers.py::test_steps_equal_forward",),
    ),
    11: Property(
        "inputs x30, x1000 and at the largest fp16 number give finite outputs and gradients",
        ("stays_finite", "cancels_nothing_far_from_zero"),
    ),
    12: Property(
        "a million tokens within 1e-5 of fp64, outputs and state",
        (),
        (
            "properties/test_long_sequences.py::test_linear_sums_over_a_million_tokens_are_those_of_fp64",
            "properties/test_long_sequences.py::test_the_state_of_a_million_tokens_is_that_of_fp64",
            "test_properties.py::test_long_sequences_run_forward_and_backward",
        ),
    ),
    13: Property(
        "the layout of q, k, v and of the output's gradient does not matter",
        ("layout_does_not_matter",),
    ),
    14: Property(
        "addresses beyond 2^31 elements",
        ("reaches_far_memory",),
        ("properties/test_long_sequences.py::test_keys_beyond_two_to_the_31_elements",),
    ),
    15: Property(
        "a state survives copies, pickle, safetensors, another seed, other versions; damage loads nothing",
        ("survives_copies",),
        (
            "properties/test_checkpoints.py::test_a_performer_with_the_state_of_another_seed_is_that_performer",
            "properties/test_checkpoints.py::test_safetensors_round_trip",
            "properties/test_checkpoints.py::test_a_state_of_a_newer_version_is_refused",
            "properties/test_checkpoints.py::test_a_state_of_an_older_version_or_of_none_loads",
            "properties/test_checkpoints.py::test_a_damaged_state_is_refused_by_name_and_nothing_is_loaded",
            "properties/test_checkpoints.py::test_a_damaged_projection_is_named_within_a_whole_model",
            "properties/test_checkpoints.py::test_a_truncated_file_is_refused_and_nothing_is_loaded",
        ),
    ),
    16: Property(
        "no call touches a global random generator; what was drawn stays drawn",
        ("leaves_random_state_alone", "random_draws_are_uniform", "training_is_evaluation_without_dropout"),
        ("test_masks.py::test_random_blocks_are_distinct_uniform_and_pure",),
    ),
    17: Property(
        "two ranks, DDP and FSDP2, draw the same at every step and after resuming, and train as one process",
        (),
        ("properties/test_ranks.py::test_two_ranks_draw_the_same_and_train_as_one_process",),
    ),
    18: Property(
        "meta, to_empty, reset_parameters",
        ("reset_parameters_fills_empty_memory", "runs_on_meta"),
        (
            "test_layers.py::test_meta_device_then_reset_parameters",
            "test_properties.py::test_meta_then_to_empty_then_reset_gives_the_same_module",
        ),
    ),
    19: Property(
        "one graph for all lengths, one recompilation at most by default; export; torch's checks of operators",
        ("compiles_to_one_graph", "exports"),
        (
            "properties/test_recompilation.py::test_all_lengths_take_two_graphs_at_most",
            "test_layers.py::test_decoding_compiles_once",
            "test_operators.py::test_blocked_attention",
            "test_operators.py::test_linear_scan",
        ),
    ),
    20: Property(
        "derivatives: gradcheck; second, forward-mode and by torch.func right, or refused in words",
        (
            "passes_gradcheck",
            "gradients_do_not_depend_on_who_asks",
            "second_derivatives_are_right_or_refused",
        ),
        (
            "test_regressions.py::test_forward_mode_refuses_instead_of_losing_the_tangent",
            "properties/test_transforms.py::test_vmap_is_a_loop",
            "properties/test_transforms.py::test_transforms_give_the_gradients_of_autograd",
            "properties/test_transforms.py::test_jacrev_is_the_matrix_where_the_values_are_the_variable",
            "properties/test_transforms.py::test_second_and_forward_derivatives_are_right_or_refused",
            "properties/test_transforms.py::test_gradients_of_parameters_by_example",
            "properties/test_transforms.py::test_what_cannot_be_mapped_is_refused_by_name",
        ),
    ),
    21: Property(
        "autocast; checkpointing bit-equal with dropout; inference_mode",
        ("respects_autocast", "works_under_checkpointing", "works_in_inference_mode"),
        ("properties/test_recomputation.py::test_recomputed_gradients_are_the_same_bits",),
    ),
    22: Property(
        "dropout: one seed, one result; kept share within 5 sigma; unbiased",
        ("dropout_is_dropout", "dropout_keeps_its_share"),
        ("properties/test_dropout.py::test_linformer_keeps_its_share_of_compressed_weights",),
    ),
    23: Property("250 repeats are bit-equal", ("repeats_bit_for_bit",)),
    24: Property(
        "packed documents are the documents alone, empty ones included",
        ("packed_equals_separate", "interleaved_segments_are_isolated", "refuses_segments_by_name"),
        (
            "test_masks.py::test_segment_ids_from_cu_seqlens",
            "test_layers.py::test_negative_segments_are_padding_too",
        ),
    ),
}

COSTS = (
    "hardware_flops_are_counted",
    "decoding_flops_are_counted",
    "training_flops_are_counted",
    "torch_flops_are_what_torch_counts",
    "saved_bytes_are_measured",
    "peak_bytes_are_bounded",
    "declared_path_is_that_of_the_graph",
    "decoding_traffic_is_the_state_once",
    "largest_intermediate_grows_as_declared",
    "declared_time_is_the_cost",
    "declared_decoding_is_the_cost",
    "declared_traffic_is_every_tensor_once",
    "state_size_is_declared",
)
"""The laws that hold what a mechanism says about itself, beside the 24."""
