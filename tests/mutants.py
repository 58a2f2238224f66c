"""Faults of one line each, and the tests that are to catch them: `make mutants`, or python -m tests.mutants [NAME...].

A copy of the tree gets the fault, and the tests that are named run in it; one of them has to fail (a fault that keeps
the tests from being collected is not caught). Before that they have to pass without the fault. --fast: only the faults
that a fast test catches.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_COPIED = ("jest_core", "pipelines", "tests", "pyproject.toml", "README.md", "Makefile")
_LINKED = ("deploy", "docker")
_HEAVY = ("torch", "torchvision", "open_clip", "timm", "pyarrow.parquet", "ray.data", "pandas", "scipy.stats")
_PASSED, _FAILED = 0, 1  # of pytest's exit statuses


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    line: str  # once in the file; indentation does not count
    fault: str
    tests: tuple[str, ...]  # below tests/
    fast: bool = True  # whether they are


def _mutants() -> Iterator[Mutant]:
    def of(file: str, *tests: str, fast: bool = True, **faults: tuple[str, str]) -> Iterator[Mutant]:
        for name, (line, fault) in faults.items():
            yield Mutant(name, file, line, fault, tests, fast)

    # losses and scores
    yield from of(
        "jest_core/losses.py",
        "core/test_losses.py::test_tiled_loss_and_gradients_equal_the_dense_ones",
        gradient_of_matches=("batch.matched(slope, rows, columns).neg_()", "batch.matched(slope, rows, columns)"),
        softmax_of_one_side=("slope += torch.exp(logits - over_images[columns])", "slope *= 2"),
    )
    yield from of(
        "jest_core/losses.py",
        "core/test_losses.py::test_global_loss_and_gradients_equal_one_process_with_skewed_shares",
        texts_of_the_first_learner=(
            "self.local_rows = slice(self.offset, self.offset + len(text))",
            "self.local_rows = slice(0, len(text))",
        ),
    )
    yield from of(
        "jest_core/selection/learnability.py",
        "core/selection/test_learnability.py::test_learnability_is_what_the_learner_loses_more_than_the_reference",
        sign_of_the_reference=(
            'signed = (("learner", traits.learner_sign, learner), ("reference", traits.reference_sign, reference))',
            'signed = (("learner", traits.learner_sign, learner), ("reference", -traits.reference_sign, reference))',
        ),
    )
    yield from of(
        "jest_core/selection/learnability.py",
        "core/selection/test_learnability.py::test_the_score_of_a_set_matches_plain_loops",
        pairs_of_a_set_twice=(
            'share = 0.5 if self.loss == "sigmoid" else 1.0',
            "share = 1.0",
        ),
    )
    yield from of(
        "jest_core/selection/learnability.py",
        "core/selection/test_algorithm.py::test_draw_scores_match_algorithm_1_as_plain_loops",
        earlier_chunks_forgotten=(
            "self.sums[rows] += self._mismatches(drawn, rows)",
            "self.sums[rows] = self._mismatches(drawn, rows)",
        ),
    )

    # selection
    yield from of(
        "jest_core/selection/algorithm.py",
        "core/selection/test_distribution.py::test_noise_shared_by_the_chunks_would_be_another_distribution",
        noise_shared_by_chunks=(
            "keys = keys + noise.gumbel(share.uids, share.occurrences, settings.seed, settings.step, chunk)",
            "keys = keys + noise.gumbel(share.uids, share.occurrences, settings.seed, settings.step, 0)",
        ),
    )
    yield from of(
        "jest_core/selection/algorithm.py",
        "core/selection/test_algorithm.py::test_exactly_b_distinct_at_the_papers_ratios",
        drawn_with_replacement=(
            "available[local_positions(new, offsets, learners.rank)] = False",
            "available[local_positions(new, offsets, learners.rank)] = True",
        ),
    )
    yield from of(
        "jest_core/selection/algorithm.py",
        "core/selection/test_distribution.py::test_distribution_of_a_small_draw_equals_enumeration",
        conditioning_dropped=("keys = settings.gain * scores", "keys = settings.gain * conditional.diagonal"),
        scores_halved=("keys = settings.gain * scores", "keys = 0.5 * settings.gain * scores"),
    )
    yield from of(
        "jest_core/selection/arguments.py",
        "core/selection/test_algorithm.py::test_distinct_and_valid_for_all_sizes",
        masked_slots_drawn=(
            "return words, times.to(device, torch.int64), valid.to(device)",
            "return words, times.to(device, torch.int64), torch.ones_like(valid).to(device)",
        ),
    )
    yield from of(
        "jest_core/selection/algorithm.py",
        "core/selection/test_algorithm.py::test_ties_are_broken_by_uid_and_not_by_place",
        ties_by_place=(
            "by_tie = torch.argsort(ties, stable=True)",
            "by_tie = torch.arange(len(ties), device=ties.device)",
        ),
    )
    yield from of(
        "jest_core/selection/gibbs.py",
        "core/selection/test_gibbs.py::test_gibbs_sampling_is_stationary_at_the_set_scores",
        gibbs_keeps_no_old_member=("available[old] = True", "available[old] = False"),
    )
    yield from of(
        "jest_core/noise.py",
        "core/test_noise.py::test_every_key_matters",
        occurrences_share_noise=(
            "return hash_integers(zero, [*context, uids[:, 0], uids[:, 1], occurrences])",
            "return hash_integers(zero, [*context, uids[:, 0], uids[:, 1]]).expand(len(occurrences))",
        ),
    )
    yield from of(
        "jest_core/noise.py",
        "core/test_noise.py::test_uniform_and_gumbel_have_their_moments",
        gumbel_of_the_minimum=(
            "return -(-uniform(uids, occurrences, *context).log()).log()",
            "return (-uniform(uids, occurrences, *context).log()).log()",
        ),
    )

    # the order of examples, and who trains on which
    yield from of(
        "jest_core/examples/order.py",
        "core/examples/test_order.py::test_an_epoch_of_all_streams_is_every_row_once",
        a_row_skipped=(
            "self.cuts = np.arange(n_streams + 1) * self.n_rows // n_streams",
            "self.cuts = np.arange(n_streams + 1) * (self.n_rows - 1) // n_streams",
        ),
        a_row_twice_at_the_cut=(
            "low, high = int(self.cuts[stream]), int(self.cuts[stream + 1])",
            "low, high = int(self.cuts[stream]), int(self.cuts[stream + 1]) + (stream + 1 < self.n_streams)",
        ),
    )
    yield from of(
        "jest_core/examples/order.py",
        "core/examples/test_order.py::test_the_tail_after_any_cursor_is_the_rest",
        a_row_skipped_at_an_epochs_border=("epoch = first_row // length", "epoch = (first_row + 1) // length"),
    )
    yield from of(
        "jest_core/examples/order.py",
        "core/examples/test_order.py::test_the_order_is_pinned",
        epochs_shuffled_alike=(
            "return noise.permutation(len(self), self.seed, Purpose.ROWS, self.epoch, self.stream, self.number)",
            "return noise.permutation(len(self), self.seed, Purpose.ROWS, 0, self.stream, self.number)",
        ),
    )
    yield from of(
        "jest_core/training/spreading.py",
        "core/training/test_spreading.py::test_every_learner_ends_with_its_quota_and_only_the_surplus_moves",
        one_of_the_surplus_lost=(
            "surplus = torch.cat([some[quota:] for some in selected])",
            "surplus = torch.cat([some[quota + 1 :] for some in selected])",
        ),
    )

    # training
    yield from of(
        "jest_core/training/step.py",
        "core/training/test_step.py::test_several_learners_do_what_one_does",
        gradients_averaged_twice=(
            "(loss * n_learners).backward()  # gradients are averaged over the learners, and their sum is wanted",
            "loss.backward()",
        ),
    )
    yield from of(
        "jest_core/training/step.py",
        "core/training/test_step.py::test_the_scale_is_bounded_for_the_softmax_loss_alone",
        scale_without_bounds=("optim.limit_scale(learner.towers.model)", "pass"),
    )
    yield from of(
        "jest_core/training/optim.py",
        "core/training/test_optim.py::test_warm_up_then_cosine_to_zero",
        cosine_rises=(
            "rate = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))",
            "rate = peak * 0.5 * (1 - math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))",
        ),
        warm_up_starts_at_zero=(
            "rate = peak * (step + 1) / warmup_steps",
            "rate = peak * step / warmup_steps",
        ),
    )
    yield from of(
        "jest_core/training/optim.py",
        "core/training/test_optim.py::test_gains_biases_and_temperature_are_not_decayed",
        biases_decayed=(
            '{"params": plain, "weight_decay": 0.0},',
            '{"params": plain, "weight_decay": weight_decay},',
        ),
    )
    yield from of(
        "jest_core/models/sharding.py",
        "core/models/test_sharding.py::test_sharded_learners_do_what_one_does",
        scalars_gradients_summed=(
            "parameter.grad = learners.sum(parameter.grad) / learners.size",
            "parameter.grad = learners.sum(parameter.grad)",
        ),
    )
    yield from of(
        "jest_core/models/flexible.py",
        "core/models/test_flexible.py::test_another_grid_has_the_position_embeddings_that_timm_gives_it",
        class_tokens_position_resized=(
            "return torch.cat([embeddings[..., :n_prefix, :], resized], -2)",
            "return torch.cat([resized, embeddings[..., :n_prefix, :]], -2)",
        ),
    )

    # pictures
    yield from of(
        "jest_core/examples/view.py",
        "core/examples/test_view.py::test_a_bomb_of_few_bytes_costs_no_memory",
        bombs_decoded=(
            "if image.width * image.height > MAX_PIXELS:",
            "if image.width * image.height > MAX_PIXELS * MAX_PIXELS:",
        ),
    )
    yield from of(
        "jest_core/examples/view.py",
        "core/examples/test_view.py::test_a_margin_is_cut_off_after_open_clips_transform",
        margin_cut_at_once=(
            "return _centre(_centre(picture, self._resized), self.image_size)",
            "return _centre(picture, self.image_size)",
        ),
    )
    yield from of(
        "jest_core/examples/tokenizer.py",
        "core/examples/test_tokenizer.py::test_hard_captions_are_tokenised_as_open_clip_does",
        rare_pairs_merged_first=(
            "best = min(pairwise(parts), key=lambda pair: ranks.get(pair, inf))",
            "best = max(pairwise(parts), key=lambda pair: ranks.get(pair, -1))",
        ),
        cut_without_an_end=(
            "tokens = [numbers[_START], *_tokens(caption)][: self.context_length - 1]",
            "tokens = [numbers[_START], *_tokens(caption)][: self.context_length - 2]",
        ),
    )
    yield from of(
        "pipelines/data/rows.py",
        "core/examples/test_inputs.py::test_readers_import_neither_pytorch_nor_open_clip",
        readers_import_pytorch=("import hashlib", "import hashlib, torch"),
    )
    yield from of(
        "pipelines/base/cluster.py",
        "pipelines/base/test_cluster.py::test_what_reads_ahead_ends_before_ray_is_left",
        ray_left_while_it_is_read=("reader.stop()", "reader.stop"),
    )
    yield from of(
        "jest_core/examples/preprocess.py",
        "core/examples/test_preprocess.py::test_augmentation_belongs_to_the_example",
        every_step_augments_alike=(
            "return 2 * noise.uniform(uids, occurrences, seed, step, Purpose.AUGMENTATION, i) - 1  # (-1, 1)",
            "return 2 * noise.uniform(uids, occurrences, seed, 0, Purpose.AUGMENTATION, i) - 1",
        ),
    )
    yield from of(
        "pipelines/data/tars.py",
        "pipelines/data/test_shards.py::test_samples_without_a_picture_text_or_json_stay_rows",
        texts_of_any_length=(
            'elif kind in ("txt", "json") and member.size <= _MAX_TEXT:',
            'elif kind in ("txt", "json"):',
        ),
    )
    yield from of(
        "pipelines/data/tars.py",
        "pipelines/data/test_shards.py::test_hostile_names_are_labels_only",
        links_are_samples=(
            "if not (split and member.isreg()) or member.issparse():",
            "if not split or member.issparse():",
        ),
    )
    yield from of(
        "pipelines/data/tars.py",
        "pipelines/data/test_shards.py::test_an_unreadable_header_in_the_middle_is_not_taken_for_the_end",
        rest_of_a_tar_lost=("_refuse_more(file, tar.offset)", "pass"),
    )

    # run files, rules, subsets
    yield from of(
        "jest_core/run_file/consistency.py",
        "core/run_file/test_consistency.py::test_a_line_names_fields_values_and_a_remedy",
        chunks_need_not_divide=("if b % selection.n_chunks:", "if b < selection.n_chunks:"),
        learners_need_not_divide=("if b % training.n_learners:", "if b < training.n_learners:"),
    )
    yield from of(
        "jest_core/run_file/consistency.py",
        "core/run_file/test_consistency.py::test_warm_up_and_cool_down_fit_into_the_run",
        cool_down_longer_than_the_run=(
            "if training.warmup_steps + training.cooldown_steps > run.n_steps and training.cooldown_steps:",
            "if training.warmup_steps > run.n_steps and training.cooldown_steps:",
        ),
    )
    yield from of(
        "jest_core/run_file/parts.py",
        "core/run_file/test_load.py::test_errors_name_field_value_and_remedy",
        secrets_in_run_files=(
            'model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)',
            'model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)',
        ),
    )
    yield from of(
        "pipelines/data/rules.py",
        "pipelines/data/test_rules.py::test_what_a_rule_keeps",
        unknown_is_safe=(
            "keep = shard.numbers(row_group, rule.rule) < rule.below  # NaN is not below",
            "keep = ~(shard.numbers(row_group, rule.rule) >= rule.below)",
        ),
        sides_above_the_least=(
            "keep = (small >= rule.min_side) & (small > 0)",
            "keep = (small > rule.min_side) & (small > 0)",
        ),
    )
    yield from of(
        "pipelines/data/rules.py",
        "pipelines/data/test_rules.py::test_deny_lists_by_uid_url_and_hash",
        deny_lists_by_letter=(
            'return (value.strip().lower() if by == "uid" else value.strip()).encode("utf-8", "surrogatepass")',
            'return value.strip().encode("utf-8", "surrogatepass")',
        ),
    )
    yield from of(
        "pipelines/data/rules.py",
        "pipelines/data/test_rules.py::test_counts_in_a_subset_are_those_of_a_loop",
        up_weights_lost=(
            'times[i] = np.searchsorted(part, uids[i, 1], "right") - np.searchsorted(part, uids[i, 1], "left")',
            "times[i] = uids[i, 1] in part",
        ),
    )

    # storage
    yield from of(
        "pipelines/base/storage.py",
        "pipelines/base/test_storage.py::test_a_reader_sees_a_whole_local_file_or_none",
        written_in_place=('temporary = f"{path}.{uuid.uuid4().hex}.tmp"', "temporary = path"),
    )
    yield from of(
        "pipelines/base/manifests.py",
        "pipelines/base/test_manifests.py::test_a_directory_of_another_configuration_is_refused_with_the_difference",
        another_configuration_accepted=(
            'if manifest["stage"] != stage or (differing and not extends(old, differing)):',
            'if manifest["stage"] != stage:',
        ),
    )
    yield from of(
        "pipelines/base/checkpoints.py",
        "pipelines/base/test_checkpoints.py::test_a_checkpoint_that_would_run_code_is_refused",
        checkpoints_run_code=(
            'checkpoint: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)',
            'checkpoint: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)',
        ),
    )
    yield from of(
        "pipelines/base/checkpoints.py",
        "pipelines/base/test_checkpoints.py::test_the_last_few_checkpoints_stay_and_those_of_every_so_many_steps",
        kept_checkpoints_removed=(
            "if keep_every is None or step % keep_every:",
            "if keep_every is None or step // keep_every:",
        ),
    )
    yield from of(
        "pipelines/base/commits.py",
        "pipelines/training/test_selection_log.py::test_readers_see_what_a_checkpoint_commits_and_each_step_once",
        uncommitted_parts_read=(
            'return [line["part"] for line in lines if line["step"] <= newest]',
            'return [line["part"] for line in lines]',
        ),
    )
    yield from of(
        "pipelines/training/selection_log.py",
        "pipelines/training/test_selection_log.py::test_readers_see_what_a_checkpoint_commits_and_each_step_once",
        a_repeated_part_twice=(
            "self.committed = [*(part for part in self.committed if part != name), name]"
            "  # a try that failed is repeated",
            "self.committed = [*self.committed, name]",
        ),
        earlier_parts_forgotten=("return self.committed", "return self.committed[-1:]"),
    )
    yield from of(
        "pipelines/scores/score_cache.py",
        "pipelines/scores/test_score_cache.py::test_rows_are_read_by_position_and_checked_by_uid",
        scores_of_other_uids=(
            'if not rows["uid"].equals(pa.chunked_array([pa.array(uids, pa.string())])):',
            "if len(rows) != len(uids):",
        ),
    )
    yield from of(
        "pipelines/submit.py",
        "test_cluster.py::test_what_cannot_be_submitted_is_refused_at_once",
        secrets_in_a_jobs_variables=(
            "if secrets := [name for name in env if _SECRET.search(name)]:",
            "if secrets := [name for name in env if _SECRET.match(name)]:",
        ),
    )

    # numbers
    yield from of(
        "jest_core/evaluation.py",
        "core/test_evaluation.py::test_a_collapsed_or_diverged_model_scores_nothing",
        ties_count_for_the_model=(
            "ranks = (~(scores < of_class)).sum(1) - 1  # a NaN is a tie with everything",
            "ranks = (scores > of_class).sum(1)",
        ),
        retrieval_ties_count_for_the_model=(
            "rank = (~(scores < best) & ~same).sum(1)",
            "rank = ((scores > best) & ~own).sum(1)",
        ),
    )
    yield from of(
        "jest_core/flops.py",
        "core/test_flops.py::test_the_papers_table_of_cost_ratios",
        backward_as_dear_as_forward=(
            "train = (3.0 + n_recomputed) * (forward * (b - n_low_resolution) + low_forward * n_low_resolution)",
            "train = (2.0 + n_recomputed) * (forward * (b - n_low_resolution) + low_forward * n_low_resolution)",
        ),
        reuse_is_no_saving=("return self.total - self.reusable", "return self.total"),
    )
    yield from of(
        "pipelines/planning/sizes.py",
        "pipelines/planning/test_plan.py::test_sharded_weights_need_less_of_each_device",
        moments_are_free=(
            "_BYTES_A_PARAMETER = 16  # float32 weight, gradient, and AdamW's two moments",
            "_BYTES_A_PARAMETER = 8",
        ),
    )
    yield from of(
        "pipelines/reports/comparison.py",
        "pipelines/reports/test_comparison.py::test_a_table_has_the_last_scores_and_the_costs_with_seeds_put_together",
        the_best_of_the_seeds=("text = form.format(mean(values))", "text = form.format(max(values))"),
        scores_of_the_first_checkpoint=(
            "return lambda run: 100 * run.curve(key, metric)[-1][1] if run.curve(key, metric) else None",
            "return lambda run: 100 * run.curve(key, metric)[0][1] if run.curve(key, metric) else None",
        ),
    )
    yield from of(
        "pipelines/training/run_directory.py",
        "pipelines/training/test_run_directory.py::test_a_budget_may_change_before_the_cool_down",
        longer_after_its_cool_down=("if reached <= same_until:", "if reached <= run.n_steps:"),
    )
    yield from of(
        "jest_core/run_file/identity.py",
        "core/run_file/test_identity.py::test_an_earlier_version_had_more_circumstances_and_fewer_fields",
        new_field_refuses_older_runs=("return identity(Run.model_validate(values))", "return saved"),
    )
    yield from of(
        "pipelines/training/replay.py",
        "pipelines/training/test_replay.py::test_a_replay_that_goes_on_reads_its_own_steps_alone",
        a_replay_starts_again=(
            "wanted = range(max(first, first_step), min(last + 1, run.n_steps))",
            "wanted = range(first, min(last + 1, run.n_steps))",
        ),
    )
    yield from of(
        "pipelines/offline/export.py",
        "pipelines/offline/test_export.py::test_files_hold_neighbouring_shards_up_to_their_size",
        a_file_begins_a_shard_early=(
            "file = (np.cumsum(totals[numbers]) - totals[numbers]) // file_rows",
            "file = np.cumsum(totals[numbers]) // file_rows",
        ),
    )

    # what only Ray can show
    yield from of(
        "pipelines/data/catalogue_parts.py",
        "pipelines/data/test_catalogue.py::test_each_row_is_charged_to_the_first_rule_that_drops_it",
        fast=False,
        rows_charged_to_the_last_rule=(
            "dropped[(times == 0) & (multiplicity > 0)] = rule.rule",
            "dropped[times == 0] = rule.rule",
        ),
    )
    yield from of(
        "pipelines/scores/parts.py",
        "pipelines/scores/test_reference_scores.py::test_too_many_bad_rows_fail_with_the_counts",
        fast=False,
        any_number_of_bad_rows=("if n_bad(counts) > max_bad_share * n_kept:", "if n_bad(counts) > n_kept:"),
    )
    yield from of(
        "pipelines/scores/score_cache.py",
        "pipelines/scores/test_reference_scores.py::test_a_cache_of_another_catalogue_is_refused_by_training",
        fast=False,
        a_cache_of_another_catalogue=(
            'if not catalogue.lines_up_with(manifest["config"]["catalogue"]):',
            "if not manifest:",
        ),
    )
    yield from of(
        "pipelines/data/uid_lists.py",
        "pipelines/offline/test_export.py::test_a_selection_log_counts_how_often",
        fast=False,
        exports_what_a_crash_left=(
            'return _gather(f"{directory}/selection", commits.read(directory), "selected", _where)',
            'return _gather(f"{directory}/selection", storage.names(f"{directory}/selection", ".parquet"), "selected",'
            " _where)",
        ),
    )
    yield from of(
        "pipelines/training/loop.py",
        "pipelines/training/test_train.py::test_a_run_logs_checkpoints_and_resumes_to_the_same_bits",
        fast=False,
        log_part_after_its_checkpoint=(
            "parts = self.log.commit(steps_logged)",
            "parts = [*self.log.committed, *self.log.commit(steps_logged)][: len(self.log.committed) - 1]",
        ),
    )


MUTANTS = list(_mutants())


def copy(root: str | Path, folder: str) -> None:
    """The tree, as far as tests need it."""
    for name in _COPIED:
        source, target = Path(root, name), f"{folder}/{name}"
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    for name in _LINKED:
        os.symlink(ROOT / name, f"{folder}/{name}")


def place_of(mutant: Mutant, root: str | Path = ROOT) -> tuple[list[str], int]:
    """The lines of its file, and which of them is meant. Raises ValueError where there is not just one."""
    lines = Path(root, mutant.file).read_text().splitlines()
    found = [i for i, line in enumerate(lines) if line.strip() == mutant.line]
    if len(found) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.file} has {len(found)} lines `{mutant.line}`; correct tests/mutants.py"
        )
    return lines, found[0]


def apply(mutant: Mutant, folder: str) -> None:
    lines, i = place_of(mutant, folder)
    indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
    lines[i] = indent + mutant.fault
    Path(folder, mutant.file).write_text("\n".join(lines) + "\n")


def run_tests(folder: str, tests: Iterable[str], fast: bool) -> int:
    """Run tests of a copy in this process, whose standard output is a file then; pytest's exit status.

    This is for a process that was forked for it: it forgets the modules that it has of another copy.
    """
    for name in [name for name in sys.modules if name.split(".")[0] in _COPIED + _LINKED]:
        del sys.modules[name]
    with open(f"{folder}/output", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = folder  # the second is for processes that tests start
    import pytest

    marks = ["-m", "fast"] if fast else []
    chosen = [f"tests/{test}" for test in sorted(set(tests))]
    status = int(pytest.main(["-x", "-q", "-rf", "-p", "no:cacheprovider", *marks, *chosen]))
    sys.stdout.flush()
    os._exit(status)  # of a test's threads and handlers none is waited for


def start(folder: str, tests: Iterable[str], fast: bool) -> Any:
    process = get_context("fork").Process(target=run_tests, args=(folder, list(tests), fast))
    process.start()
    return process


def by_what(status: int, folder: str) -> tuple[bool, str]:
    """Whether a fault was caught, and by which test."""
    output = Path(folder, "output").read_text(errors="replace")
    if status == _FAILED:
        found = re.search(r"^FAILED tests/(.*?)(?: - |$)", output, re.MULTILINE)
        return found is not None, found[1] if found else f"no test, but what it needs: {output[-2000:]}"
    return False, "nothing" if status == _PASSED else f"pytest ended with {status}: {output[-2000:]}"


def try_all(mutants: Sequence[Mutant], root: str, at_once: int) -> Iterator[tuple[Mutant, bool, str]]:
    """Each with what `by_what` says of it, as they end."""
    waiting, running = list(mutants), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            mutant, folder = waiting.pop(0), tempfile.mkdtemp()
            copy(root, folder)
            apply(mutant, folder)
            process = start(folder, mutant.tests, mutant.fast)
            running[process.sentinel] = mutant, folder, process
        for sentinel in wait(list(running)):
            mutant, folder, process = running.pop(sentinel)
            process.join()
            yield mutant, *by_what(process.exitcode, folder)
            shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults; all, where none is given")
    parser.add_argument("--fast", action="store_true", help="only those that fast tests catch")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant {', '.join(sorted(unknown))}; there are {' '.join(m.name for m in MUTANTS)}")
    chosen = [m for m in MUTANTS if (not given.names or m.name in given.names) and (m.fast or not given.fast)]

    os.environ["OMP_NUM_THREADS"] = "1"
    for name in _HEAVY:  # what takes most of a test's time is imported once, here, and forked
        import_module(name)
    survivors = []
    with tempfile.TemporaryDirectory() as root:  # what is edited meanwhile is of the next time
        copy(ROOT, root)
        for at_once, fast in ((len(os.sched_getaffinity(0)), True), (1, False)):
            some = [mutant for mutant in chosen if mutant.fast is fast]
            if not some:
                continue
            process = start(root, [test for mutant in some for test in mutant.tests], fast)
            process.join()
            if process.exitcode != _PASSED:
                print("the tests do not pass without a fault:", Path(root, "output").read_text()[-5000:], sep="\n")
                return 1
            for mutant, caught, by in try_all(some, root, at_once):
                told = ("caught, fast" if fast else "caught") if caught else "SURVIVES"
                print(f"{mutant.name:40}  {told:12}  {by}", flush=True)
                survivors += [] if caught else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are caught" + ": not " * bool(survivors), end="")
    print(", ".join(survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
