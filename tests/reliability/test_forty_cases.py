"""The forty bad inputs and faults that the project is held against, and the tests that hold each.

The numbers are those of the project's list of reliability cases: container (1 to 10), pickle, archives and paths (11 to
18), configuration and semantics (19 to 29), output and environment (30 to 40). A test that is renamed or removed leaves
its case without proof, which fails here.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

CASES: dict[int, tuple[str, ...]] = {
    # A. Container
    1: (
        "storage/test_safetensors_reader.py::test_file_cut_anywhere_is_refused",
        "storage/test_safetensors_reader.py::test_large_file_cut_in_its_data_names_the_first_tensor_lost",
    ),
    2: ("storage/test_safetensors_reader.py::test_wrong_header_length_is_refused_without_allocating",),
    3: (
        "storage/test_safetensors_reader.py::test_misnamed_file_is_refused_as_what_it_is",
        "storage/test_sniff.py::test_file_is_named_with_a_way_out",
    ),
    4: ("storage/test_safetensors_reader.py::test_malformed_header_is_refused_by_name",),
    5: ("storage/test_safetensors_reader.py::test_malformed_header_is_refused_by_name",),
    6: (
        "storage/test_safetensors_reader.py::test_packed_dtypes_are_listed_and_located",
        "ops/merge/test_merges_without_effect.py::test_weight_of_a_dtype_that_is_not_computed_with_is_named",
    ),
    7: (
        "storage/test_safetensors_reader.py::test_malformed_header_is_refused_by_name",
        "storage/test_safetensors_reader.py::test_what_is_accepted_the_reference_accepts",
    ),
    8: (
        "storage/test_json_file.py::test_bad_json_is_refused_by_name",
        "storage/test_safetensors_reader.py::test_malformed_header_is_refused_by_name",
    ),
    9: (
        "storage/test_safetensors_reader.py::test_many_tensors_take_linear_time",
        "storage/test_safetensors_reader.py::test_zero_size_tensors_at_one_place_are_accepted",
    ),
    10: (
        "storage/test_safetensors_reader.py::test_odd_names_are_kept_as_they_are",
        "storage/test_safetensors_reader.py::test_names_in_messages_are_on_one_line_and_harmless",
        "cli/test_output.py::test_markup_in_a_name_is_not_obeyed",
    ),
    # B. Pickle, archives, paths
    11: (
        "storage/test_torch_pickle.py::test_code_in_a_pickle_is_named_and_not_run",
        "checkpoints/test_pytorch.py::test_a_pickle_that_would_run_code_is_refused",
    ),
    12: (
        "storage/test_torch_pickle.py::test_unsound_archives_are_refused",
        "storage/test_pickle_bombs.py::test_small_pickle_takes_little_time_and_memory",
    ),
    13: ("checkpoints/test_huggingface.py::test_index_that_names_a_file_elsewhere_opens_none",),
    14: (
        "checkpoints/test_huggingface.py::test_missing_shard_is_named",
        "checkpoints/test_huggingface.py::test_name_absent_from_its_shard_is_named",
        "checkpoints/test_huggingface.py::test_name_in_two_shards_is_named",
        "checkpoints/test_huggingface.py::test_stale_shard_is_left_out_with_a_warning",
        "checkpoints/test_huggingface.py::test_wrong_total_size_is_a_warning",
    ),
    15: (
        "storage/test_json_file.py::test_size_is_checked_before_reading",
        "checkpoints/test_huggingface.py::test_index_of_200_megabytes_is_refused_unread",
        "formats/test_malformed.py::test_config_nested_deeply_is_refused",
    ),
    16: (
        "storage/test_safetensors_reader.py::test_missing_file_and_folder_and_fifo_are_refused_at_once",
        "checkpoints/test_huggingface.py::test_pipe_and_socket_in_place_of_weights_do_not_block",
    ),
    17: (
        "checkpoints/test_huggingface.py::test_snapshot_of_the_hugging_face_cache_is_opened",
        "checkpoints/test_huggingface.py::test_link_that_leads_out_of_the_folder_is_not_opened",
    ),
    18: (
        "checkpoints/test_side_files.py::test_code_that_comes_with_a_model_is_copied_and_not_run",
        "checkpoints/test_pytorch.py::test_safetensors_win_where_there_are_pickles_too",
    ),
    # C. Configuration and semantics
    19: (
        "formats/peft_parts/test_peft_read.py::test_values_that_cannot_be_meant_are_refused_by_the_name_of_the_field",
        "formats/peft_parts/test_peft_read.py::test_an_alpha_that_is_not_finite_is_refused",
        "formats/peft_parts/test_peft_read.py::test_a_rank_that_differs_from_the_tensors_is_a_doubt_until_someone_decides",
    ),
    20: (
        "formats/peft_parts/test_patterns.py::test_a_regex_that_takes_years_is_stopped_and_named",
        "formats/peft_parts/test_patterns.py::test_a_key_that_is_no_regex_is_refused_by_name",
        "formats/test_malformed.py::test_pattern_of_ia3_that_takes_for_ever_is_refused",
    ),
    21: (
        "ops/merge/test_merge.py::test_names_that_do_not_match_are_listed_with_the_nearest_and_nothing_is_written",
        "ops/merge/test_merge.py::test_allow_partial_does_not_allow_nothing_at_all",
    ),
    22: ("ops/merge/test_merge.py::test_allow_partial_leaves_out_and_reports_what_does_not_fit",),
    23: (
        "formats/peft_parts/test_peft_read.py::test_all_faults_of_the_factors_are_named_at_once",
        "formats/peft_parts/test_peft_read.py::test_two_adapters_in_one_file_are_refused_by_their_names",
        "formats/peft_parts/test_peft_read.py::test_a_magnitude_and_its_flag_go_together",
    ),
    24: (
        "ops/merge/test_merge.py::test_a_base_of_other_sizes_is_refused_with_the_sizes",
        "ops/merge/test_merge.py::test_a_vocabulary_that_is_resized_in_one_place_only_is_refused",
    ),
    25: (
        "ops/merge/test_base_identity.py::test_a_base_whose_config_says_it_is_another_model_is_warned_of",
        "ops/verify/test_defects.py",
    ),
    26: (
        "ops/merge/test_merge.py::test_an_adapter_that_is_not_finite_is_refused_by_tensor",
        "ops/merge/test_merge.py::test_a_base_that_is_not_finite_is_refused_by_tensor",
        "ops/merge/test_merge.py::test_a_result_beyond_float16_is_refused_with_its_size",
    ),
    27: (
        "ops/merge/test_merges_without_effect.py::test_untrained_adapter_is_warned_of_with_the_number",
        "ops/merge/test_merges_without_effect.py::test_update_that_is_lost_to_rounding_is_warned_of_with_the_number",
        "ops/merge/test_merge.py::test_adapters_that_cancel_leave_the_base_as_it_was",
    ),
    28: (
        "ops/merge/test_merge.py::test_a_tied_head_with_an_update_of_its_own_is_untied",
        "ops/merge/test_merge.py::test_a_resized_vocabulary_resizes_embedding_head_and_config",
        "ops/merge/test_merge.py::test_tokens_trained_in_a_tied_head_alone_are_not_dropped",
    ),
    29: ("ops/merge/test_quantised.py::test_a_quantised_target_is_refused_by_its_name_and_nothing_is_written",),
    # D. Output and environment
    30: (
        "ops/merge/test_merge.py::test_too_little_disk_is_refused_before_anything_is_written",
        "storage/test_faults.py::test_full_disk_is_said_before_any_work_and_leaves_the_old_output",
    ),
    31: (
        "reliability/test_nth_call.py::test_failure_of_any_call_leaves_old_or_new",
        "reliability/test_nth_call.py::test_short_reads_and_writes_change_nothing",
        "storage/test_faults.py::test_failure_of_any_call_leaves_old_or_new",
    ),
    32: (
        "reliability/test_kills.py::test_a_merge_killed_at_any_call_is_resumed_to_the_same_bytes",
        "reliability/test_kills.py::test_a_merge_killed_at_random_times_is_resumed_to_the_same_bytes",
        "storage/test_faults.py::test_killed_process_leaves_nothing_under_the_final_name",
        "ops/test_clean.py::test_killed_runs_are_listed_with_sizes_and_removed",
    ),
    33: (
        "cli/test_interrupted.py::test_a_merge_ended_by_a_signal_before_anything_is_done_leaves_nothing",
        "cli/test_interrupted.py::test_a_merge_ended_by_a_signal_with_work_done_says_how_to_go_on",
        "cli/test_interrupted.py::test_a_second_signal_does_not_stop_the_cleaning_up",
        "cli/test_interrupted.py::test_closed_streams_change_nothing_about_a_merge",
        "cli/test_errors.py::test_closed_pipe_ends_with_141_and_without_a_word",
    ),
    34: (
        "reliability/test_power_cut.py::test_every_file_is_on_the_disk_before_the_output_has_its_name",
        "reliability/test_power_cut.py::test_a_merge_whose_unflushed_bytes_are_lost_is_resumed",
        "ops/verify/test_files.py::test_damage_is_told_by_name",
    ),
    35: (
        "storage/test_commit.py::test_existing_outputs_are_refused_with_the_way_out",
        "storage/test_commit.py::test_overwrite_keeps_what_others_wrote_and_the_very_same_files",
        "storage/test_commit.py::test_output_that_is_holds_or_lies_in_an_input_is_always_refused",
    ),
    36: (
        "storage/test_commit.py::test_file_output_appears_complete_and_keeps_a_link",
        "storage/test_commit.py::test_devices_and_fifos_are_never_replaced",
    ),
    37: (
        "storage/test_commit.py::test_long_names_leave_room_for_the_staging_folder",
        "storage/test_commit.py::test_file_output_needs_no_hard_links",
        "storage/test_commit.py::test_empty_folder_that_cannot_be_renamed_is_filled_in_place",
        "storage/test_files.py::test_copy_goes_on_without_the_kernel_after_part_of_it",
    ),
    38: (
        "reliability/test_concurrency.py::test_two_merges_to_one_output_have_one_winner",
        "reliability/test_concurrency.py::test_a_reader_of_the_old_output_keeps_its_bytes",
        "ops/test_clean.py::test_where_locks_mean_nothing_the_process_id_counts",
    ),
    39: (
        "ops/test_held_inputs.py::test_input_rewritten_during_the_run_ends_it",
        "ops/merge/test_resume.py::test_a_changed_input_is_refused_by_name",
        "storage/test_files.py::test_input_that_shrinks_while_open_raises_instead_of_killing",
    ),
    # No verb reads from a network: what is meant as an address is refused with how to get it.
    40: ("checkpoints/test_huggingface.py::test_name_of_a_hub_repository_gets_a_hint_to_download_it",),
}


@cache
def functions_in(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_there_are_forty_cases() -> None:
    assert sorted(CASES) == list(range(1, 41))


@pytest.mark.parametrize("case", CASES)
def test_each_case_is_held_by_tests_that_exist(case: int) -> None:
    assert CASES[case]
    for held_by in CASES[case]:
        file, _, name = held_by.partition("::")
        assert (TESTS / file).is_file(), held_by
        functions = functions_in(file)
        assert name in functions if name else any(each.startswith("test_") for each in functions), held_by
