"""Faults that the tests must see: each is put into a copy of the tree, and the tests named with it must fail there.

`python scripts/mutants.py` tries all, `python scripts/mutants.py epoch kernel` those whose words hold one of these.
Exit codes: 0 all were caught, 1 one survived, 2 the list or the tests without a fault are not in order.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("lpft_nb", "tests", "pyproject.toml")  # what a fault changes, and what must find it there
LEFT = {".git", ".venv", "_build", "runs"}  # everything else is a link to the original
FAILED, PASSED = 1, 0  # pytest's exit codes; any other means that it could not run the tests
FOREIGN = 70  # ours: the package that was tested is not the copy
LIMIT = 300  # seconds for the tests of one fault
# Imported once, in a process from which those of the tests are forked: most of their time is the import of these.
PRELOADED = "pytest hypothesis torch transformers datasets peft pandas matplotlib.pyplot scipy.stats sklearn.linear_model"


class Mutant(NamedTuple):
    "One fault."

    words: str  # what goes wrong, for the table
    file: str  # below lpft_nb
    old: str  # a text that stands there once
    new: str  # what stands there instead
    tests: tuple[str, ...]  # node ids below tests, of which one at least must fail


MUTANTS = (
    # --- store
    Mutant(
        "classes of unequal size count by their size in Σ_B",
        "collapse.py",
        "    means = centred_means(sums)\n    squares, vectors = _directions(means)",
        "    means = centred_means(sums) * (sums.counts / sums.examples).sqrt()[:, None]\n"
        "    squares, vectors = _directions(means)",
        ("test_collapse.py::test_nc1_equals_the_trace_of_explicit_matrices",),
    ),
    Mutant(
        "the corners of a simplex have another norm",
        "collapse.py",
        "simplex / math.sqrt(size - 1)",
        "simplex / math.sqrt(size)",
        ("test_collapse.py::test_at_the_corners_with_an_aligned_head_everything_is_zero",),
    ),
    Mutant(
        "spreads of two parts forget how far their means are apart",
        "geometry/sums.py",
        "spread_1 + spread_2 + weights[:, 0] * gap.square().sum(dim=2)",
        "spread_1 + spread_2",
        ("test_collapse.py::test_merged_parts_are_the_whole_also_where_a_part_lacks_a_class",),
    ),
    Mutant(
        "a class of one example is drawn anew",
        "collapse.py",
        "if lone := lone_classes(sums):",
        "if lone := []:",
        ("test_collapse.py::test_a_class_of_one_is_named_and_not_drawn",),
    ),
    Mutant(
        "a damaged file is believed",
        "store/cache.py",
        "if checksum != right:",
        "if False:",
        ("store/test_cache.py::test_a_damaged_file_is_computed_again",),
    ),
    Mutant(
        "an edited record keeps its name",
        "store/record.py",
        'if record["run_id"] != name:',
        "if False:",
        ("store/test_record.py::test_a_faulty_file_is_refused_by_name_and_skipped",),
    ),
    Mutant(
        "a gathered table of other records is read",
        "store/tables.py",
        "if now == told:",
        "if True:",
        ("store/test_tables.py::test_a_changed_folder_is_read_as_json",),
    ),
    # --- data
    Mutant(
        "a file is split without regard to its classes",
        "data/splits.py",
        "by_label.setdefault(label, [])",
        "by_label.setdefault(0, [])",
        ("test_tasks.py::test_a_single_file_is_split_stratified",),
    ),
    # --- models
    Mutant(
        "padding moves the positions of the words",
        "models/backbones.py",
        "(mask.long().cumsum(dim=1) - 1).clamp(min=0) + offset",
        "torch.arange(mask.shape[1]).expand(mask.shape) + offset",
        ("models/test_backbones.py::test_positions_from_mask",),
    ),
    Mutant(
        "a new head without a bias keeps the old one's",
        "models/head.py",
        "head.bias.zero_() if bias is None else head.bias.copy_(bias)",
        "bias is None or head.bias.copy_(bias)",
        ("models/test_head.py::test_set_head",),
    ),
    Mutant(
        "an older model's files stay beside the new ones",
        "models/saving.py",
        "path.is_file() and path.name not in new and belongs_to_a_model(path.name)",
        "path.is_file() and path.name in new and belongs_to_a_model(path.name)",
        ("models/test_saving.py::test_nothing_of_the_old_model_is_left",),
    ),
    # --- solvers, probe
    Mutant(
        "the probe's penalty counts twice",
        "solvers/newton.py",
        "shrinkage = problems.ridge[:, None, None]",
        "shrinkage = 2 * problems.ridge[:, None, None]",
        ("test_linear_probe.py::test_gradient_vanishes_and_objective_is_the_stated_one",),
    ),
    Mutant(
        "of equal penalties the weakest is taken",
        "linear_probe.py",
        "best = int(accuracy.mean(dim=1).mul(1e12).round().argmax())",
        "best = len(grid) - 1 - int(accuracy.mean(dim=1).mul(1e12).round().flip(0).argmax())",
        ("test_linear_probe.py::test_ties_go_to_the_strongest_penalty_whatever_the_order",),
    ),
    # --- geometry
    Mutant(
        "merging forgets the gap between two means",
        "geometry/sums.py",
        "+= (weights * gap[l]).T @ gap[r]",
        "+= 0 * (weights * gap[l]).T @ gap[r]",
        ("geometry/test_sums.py::test_batches_merge_to_the_whole",),
    ),
    Mutant(
        "fourth powers are not moved to the common mean",
        "geometry/sums.py",
        "+ 4 * a @ scatter @ b",
        "+ 2 * a @ scatter @ b",
        ("geometry/test_sums.py::test_batches_merge_to_the_whole",),
    ),
    Mutant(
        "the diagonal stays in an unbiased HSIC",
        "geometry/similarity.py",
        "* count / (count - 2)",
        "* (count - 2) / count",
        ("geometry/test_similarity.py::test_hsic_is_the_mean_over_quadruples",),
    ),
    Mutant(
        "small angles are taken from their cosine",
        "geometry/similarity.py",
        "cosines.square() > 0.5",
        "cosines.square() > 5",
        ("geometry/test_similarity.py::test_small_and_right_angles_are_known",),
    ),
    Mutant(
        "the effective rank counts variances",
        "geometry/spread.py",
        "shares = values[values > SMALLEST * values[0]].sqrt()",
        "shares = values[values > SMALLEST * values[0]]",
        ("geometry/test_spread.py::test_effective_rank_equals_that_of_singular_values",),
    ),
    Mutant(
        "what is not defined goes unnamed",
        "features.py",
        "undefined |= dict.fromkeys(names.split(), str(reason))",
        "undefined |= {}",
        ("test_features.py::test_what_sums_do_not_have_is_named",),
    ),
    Mutant(
        "head rows are drawn with what they have in common",
        "feature_figures.py",
        "return rows - rows.mean(dim=0)",
        "return rows",
        ("test_feature_figures.py::test_the_plane_is_that_of_scikit_learn",),
    ),
    # --- training
    Mutant(
        "a finished stage gives back its head only",
        "training/checkpoints.py",
        "for name, parameter in wanted.items():",
        'for name, parameter in ((n, p) for n, p in wanted.items() if n.startswith("head.")):',
        ("test_stages.py::test_a_finished_stage_comes_back_with_every_parameter",),
    ),
    Mutant(
        "every epoch has the same order",
        "training/batches.py",
        "manual_seed(1_000_003 * seed + epoch)",
        "manual_seed(1_000_003 * seed)",
        ("training/test_batches.py::test_a_sampler_gives_each_epoch_the_order_of_that_epoch",),
    ),
    Mutant(
        "the sampler forgets its epoch",
        "training/batches.py",
        "epoch=self.epoch,",
        "epoch=0,",
        ("training/test_batches.py::test_no_two_epochs_of_a_training_see_the_same_order",),
    ),
    Mutant(
        "the last epoch is kept, not the best",
        "training/checkpoints.py",
        "if metrics[self.metric] > self.value:",
        "if True:",
        ("training/test_loop.py::test_best_epoch_is_kept",),
    ),
    # --- one layer
    Mutant(
        "block k is entry k of its list",
        "models/layers.py",
        'inside = tuple(f"{name}.{layer - 1}." for name in lists)',
        'inside = tuple(f"{name}.{min(layer, depth - 1)}." for name in lists)',
        ("models/test_layers.py::test_layer_k_is_what_block_k_gives",),
    ),
    Mutant(
        "hidden states are believed to be those of the blocks",
        "models/layers.py",
        "_depends(states[k + 1], block) and not _depends(states[k], block)",
        "_depends(states[k + 1], block)",
        (
            "models/test_layers.py::test_states_that_are_not_the_blocks_are_refused_and_nothing_is_left",
        ),
    ),
    Mutant(
        "a skip starts a layer too early",
        "models/fine_tuned.py",
        "read(output.hidden_states[config.skip])",
        "read(output.hidden_states[config.skip - 1])",
        ("models/test_layers.py::test_a_skip_adds_what_the_block_gives_to_the_features",),
    ),
    Mutant(
        "a skip does not change the features that a probe sees",
        "stages.py",
        "moved = moved or model.config.skip != data.skip",
        "moved = moved or False",
        ("training/test_layer_stages.py::test_a_probe_behind_the_skip_fits_the_features_with_it",),
    ),
    Mutant(
        "the layer with the most NC1 is taken",
        "training/layer_stages.py",
        "chosen = min(known, key=lambda layer: known[layer])",
        "chosen = max(known, key=lambda layer: known[layer])",
        (
            "training/test_layer_stages.py::test_auto_takes_the_layer_with_the_least_nc1_and_says_why",
        ),
    ),
    Mutant(
        "a class of the followed examples may be alone",
        "training/collapse_rows.py",
        "max(2, int(share * len(group)))",
        "max(1, int(share * len(group)))",
        ("training/test_collapse_rows.py::test_a_choice_is_small_fixed_and_stratified",),
    ),
    Mutant(
        "a resumed training is looked at anew",
        "training/collapse_rows.py",
        "if state.global_step == 0:",
        "if True:",
        ("training/test_collapse_rows.py::test_a_resumed_training_keeps_the_rows_of_before",),
    ),
    Mutant(
        "ties in a drawn rank correlation count as below",
        "lab/collapse_answers.py",
        "(x[:, None] < x) + 0.5 * (x[:, None] == x)",
        "(x[:, None] < x) + 1.0 * (x[:, None] == x)",
        (
            "lab/test_collapse_answers.py::test_a_drawn_rank_correlation_is_scipys_of_the_drawn_cases",
        ),
    ),
    Mutant(
        "all layers of a backbone are models",
        "lab/collapse_answers.py",
        '"models": table["last"],',
        '"models": table["last"] | True,',
        ("lab/test_collapse_answers.py::test_models_are_the_last_layers_of_all_backbones",),
    ),
    Mutant(
        "a rate at the end at one share counts at all",
        "lab/collapse_answers.py",
        "share in (None, one[1])",
        "True",
        ("lab/test_collapse_answers.py::test_a_rate_at_an_end_counts_at_its_share_only",),
    ),
    Mutant(
        "training texts of a share need not be the same for all methods",
        "lab/comparisons.py",
        'refuse_mixtures(of_seed, f"{folder}, {cell}, seed {seed}")',
        "pass",
        (
            "lab/test_collapse_answers.py::test_other_texts_are_refused_but_for_shares_drawn_by_the_seed",
        ),
    ),
    # --- prepared heads
    Mutant(
        "smoothed targets leave out a class",
        "solvers/descent.py",
        "return (1 - smoothing) * one_hot + smoothing / classes",
        "return (1 - smoothing) * one_hot + smoothing * (1 - one_hot) / (classes - 1)",
        (
            "training/test_prepared_heads.py::test_smoothed_targets_are_fitted_up_to_h_plus_one_examples",
        ),
    ),
    Mutant(
        "a probe stops an epoch after the energy was reached",
        "solvers/descent.py",
        "arrived = energy is not None and records[epoch, 3].item() <= energy",
        "arrived = energy is not None and epoch > 0 and records[epoch - 1, 3].item() <= energy",
        (
            "training/test_prepared_heads.py::test_the_path_stops_at_the_first_epoch_with_so_little_energy",
        ),
    ),
    Mutant(
        "scores of the squared loss are read as probabilities",
        "training/head_stages.py",
        "bias - 1 / len(bias)",
        "bias - 0 / len(bias)",
        (
            "training/test_prepared_heads.py::test_the_stage_gives_the_head_of_the_solver_and_comes_back_from_its_folder",
        ),
    ),
    Mutant(
        "a shared walk hands out its last head",
        "training/head_stages.py",
        'return stored[f"weight/{epochs}"], stored.get(f"bias/{epochs}")',
        'return stored[f"weight/{max(keep)}"], stored.get(f"bias/{max(keep)}")',
        (
            "training/test_prepared_heads.py::test_probes_of_several_lengths_share_one_walk_bit_for_bit",
        ),
    ),
    Mutant(
        "the start of a shared walk is in no key",
        "training/head_stages.py",
        'content_hash({"features": features, "labels": labels, **start})',
        'content_hash({"features": features, "labels": labels})',
        ("training/test_prepared_heads.py::test_another_start_or_setting_is_another_walk",),
    ),
    Mutant(
        "a larger head is probed with dropout on",
        "training/larger_heads.py",
        "cast(nn.Module, model).eval()",
        "cast(nn.Module, model).train()",
        ("training/test_larger_heads.py::test_the_walk_is_a_plain_loop_without_dropout",),
    ),
    Mutant(
        "pieces of a batch are not added up",
        "training/larger_heads.py",
        "/ len(rows)).backward()",
        "/ len(part) * 2).backward()",
        ("training/test_larger_heads.py::test_the_walk_is_a_plain_loop_without_dropout",),
    ),
    Mutant(
        "features that are measured are those behind the hidden layer",
        "training/measuring.py",
        """    with below_hidden_layer(model):
        return {split""",
        """    if model:
        return {split""",
        (
            "training/test_larger_heads.py::test_features_that_are_measured_are_those_below_the_hidden_layer",
        ),
    ),
    # --- energy
    Mutant(
        "the energy of a stage's end is that of its last row",
        "training/measuring.py",
        "energy(logits[split], labels[split])",
        "energy(logits[split][-1:], labels[split][-1:])",
        ("test_stages.py::test_every_stage_end_has_the_energy_of_the_whole_training_set",),
    ),
    Mutant(
        "the peak of a curve is looked up on the seed that it is judged on",
        "lab/preparation_answers.py",
        "others = np.delete(curves.values, place, axis=0)",
        "others = curves.values[[place]]",
        ("lab/test_preparation_answers.py::test_the_peak_is_looked_up_on_the_other_seeds",),
    ),
    Mutant(
        "the length between is chosen by the lowest validation accuracy",
        "lab/preparation_answers.py",
        "ascending=[True, False, True]",
        "ascending=[True, True, True]",
        (
            "lab/test_preparation_answers.py::test_a_gain_is_chosen_on_validation_and_judged_on_test",
        ),
    ),
    Mutant(
        "a probe that does not fit is asked what one that fits does",
        "lab/preparation_answers.py",
        "if not fits.empty and fits.min() >= FITTED:",
        "if not fits.empty:",
        ("lab/test_preparation_answers.py::test_places_that_cannot_tell_say_why",),
    ),
    Mutant(
        "a recommendation is judged with any number of tasks",
        "advice.py",
        "if len(names) < FEWEST_TASKS:",
        "if len(names) < 1:",
        ("test_advice.py::test_ten_tasks_are_needed_for_a_verdict",),
    ),
    Mutant(
        "a task chooses its own best arm as if it were another",
        "advice.py",
        "means.drop(index=name).mean().idxmax()",
        "means.mean().idxmax()",
        ("test_advice.py::test_a_task_does_not_choose_for_itself",),
    ),
    Mutant(
        "a probe stops before as little is left as it should leave",
        "advice.py",
        "if epoch and left <= target",
        "if epoch and left <= 2 * target",
        ("test_advice.py::test_a_probe_stops_where_as_much_is_left_as_it_does_not_know",),
    ),
    Mutant(
        "fine-tuning that learned nothing is solved by any kernel",
        "kernel_behaviour.py",
        "if fine_tuned <= largest_class:",
        "if fine_tuned < 0:",
        ("test_kernel_behaviour.py::test_solving_is_a_share_of_what_fine_tuning_reached",),
    ),
    Mutant(
        "first order is the change alone",
        "kernel_behaviour.py",
        "rows.append((values + change).detach().cpu())",
        "rows.append(change.detach().cpu())",
        ("test_kernel_behaviour.py::test_first_order_and_gradients_are_those_of_brute_force",),
    ),
    Mutant(
        "gradients are compared with the size of the end's",
        "kernel_behaviour.py",
        "size = sum(float(a.double().square().sum()) for a, _ in pairs)",
        "size = sum(float(b.double().square().sum()) for _, b in pairs)",
        ("test_kernel_behaviour.py::test_first_order_and_gradients_are_those_of_brute_force",),
    ),
    Mutant(
        "a random subspace keeps the kernel itself",
        "subspaces.py",
        "return (drawn / dimension).reshape",
        "return (drawn / dimension + matrix).reshape",
        ("test_subspaces.py::test_draws_have_the_moments_of_real_projections",),
    ),
    Mutant(
        "an opposite kernel is a multiple",
        "subspaces.py",
        "(first * second).sum().clamp(min=0)",
        "(first * second).sum()",
        ("test_subspaces.py::test_no_negative_scale_makes_an_opposite_kernel_near",),
    ),
    Mutant(
        "advice for other training texts is judged",
        "lab/advice_runs.py",
        """if set(of_task["fingerprint"]) != {record["task"]["fingerprint"]}:""",
        """if not set(of_task["fingerprint"]):""",
        ("lab/test_advice_runs.py::test_other_training_texts_are_refused",),
    ),
    Mutant(
        "a task without one of the arms is judged",
        "lab/advice_runs.py",
        """transform("nunique") == len(ARMS)""",
        """transform("nunique") >= 1""",
        ("lab/test_advice_runs.py::test_what_cannot_be_judged_is_left_out",),
    ),
    Mutant(
        "smoothed heads with another factor count as smoothed alone",
        "lab/preparation_answers.py",
        """others = [axis for axis in AXES if axis != "smoothing"]""",
        """others = [axis for axis in AXES if axis not in ("smoothing", "head_scale")]""",
        (
            "lab/test_preparation_answers.py::test_smoothing_is_compared_with_the_plain_converged_probe_of_its_seed",
        ),
    ),
    Mutant(
        "the longest of equal arms is the best",
        "lab/advice_runs.py",
        """.to_numpy().argmax())""",
        """.to_numpy()[::-1].argmax())""",
        ("lab/test_advice_runs.py::test_nearer_tasks_want_longer_probes_where_they_do",),
    ),
    Mutant(
        "splits that the kernel does not solve count as not followed",
        "lab/kernel_view_answers.py",
        "reindex(solved[solved >= SOLVES].index)",
        "reindex(solved.index)",
        ("lab/test_kernel_view_answers.py::test_only_splits_that_the_kernel_solves_can_follow",),
    ),
    Mutant(
        "adapters' kernels are compared on splits without kernel behaviour too",
        "lab/kernel_view_answers.py",
        "reindex(behaves[behaves == 1].index)",
        "reindex(behaves.index)",
        (
            "lab/test_kernel_view_answers.py::test_the_declared_parts_meet_records_of_which_the_answer_is_known",
        ),
    ),
    Mutant(
        "sides that differ in a setting nobody named are compared",
        "lab/worlds.py",
        "{name: one for name, one in used[text].items() if name not in left_out}",
        "{name: one for name, one in used[text].items() if name in ('task', 'alpha')}",
        (
            "lab/test_kernel_view_answers.py::test_two_settings_beside_what_a_side_names_are_not_compared",
        ),
    ),
    Mutant(
        "a readout's updates are not scaled",
        "models/readout.py",
        "weight += (readout.scale * up @ down).to(weight)",
        "weight += (up @ down).to(weight)",
        ("models/test_readout.py::test_put_on_changes_what_it_names_and_nothing_else",),
    ),
    Mutant(
        "a readout of other weights is taken",
        "models/readout.py",
        "if found != readout.base:",
        "if not found:",
        ("models/test_readout.py::test_a_readout_of_other_weights_is_refused",),
    ),
    Mutant(
        "gaps depend on where a training was cut",
        "training/masked_words.py",
        """own = 1_000_003 * (self.seed + 1) + examples[0]["position"]""",
        "own = int(torch.randint(10**9, ()))",
        (
            "training/test_masked_words.py::test_a_training_that_was_cut_goes_on_to_the_same_weights",
        ),
    ),
    Mutant(
        "what judges is learned",
        "data/open_texts.py",
        "seen, kept = set(judged_texts(root)), []",
        "seen, kept = set(), []",
        ("data/test_open_texts.py::test_what_another_set_judges_by_is_left_out",),
    ),
    Mutant(
        "features that training has moved keep the numbers of the start",
        "stages.py",
        "known = described if features is reference else None",
        "known = described",
        ("training/test_described_once.py::test_only_features_that_moved_are_described_again",),
    ),
    Mutant(
        "a class without examples has an energy",
        "energy.py",
        "if empty:",
        "if False:",
        ("test_energy.py::test_refuses",),
    ),
    Mutant(
        "energy is measured as a sum of differences, not a length",
        "energy.py",
        "return residuals(logits, labels).norm(dim=1)",
        "return residuals(logits, labels).norm(p=1, dim=1)",
        ("test_energy.py::test_energy_is_the_length_of_the_gradient_by_the_logits",),
    ),
    Mutant(
        "the kernel's factor holds the direction once more",
        "energy.py",
        "kernel=_ratio(answered, asked.expand_as(answered)),",
        "kernel=answered,",
        ("test_energy.py::test_factors_multiply_to_the_summands_and_sum_to_the_step",),
    ),
    # --- teachers
    Mutant(
        "a probe of the linear model takes one step too many",
        "teachers/linear_energy.py",
        "** torch.tensor(steps)[:, None]",
        "** (torch.tensor(steps)[:, None] + 1)",
        ("teachers/test_linear_energy.py::test_the_probe_in_closed_form_is_the_probe_by_steps",),
    ),
    Mutant(
        "the backbone of the linear model follows the head of the next step",
        "teachers/linear_energy.py",
        "weights = weights + step * features.mT @ residual",
        "weights = weights + step * moved.mT @ residual",
        ("teachers/test_linear_energy.py::test_tuning_takes_the_steps_of_autograd",),
    ),
    Mutant(
        "the flow of one example turns the wrong way",
        "teachers/linear_energy.py",
        "rising, falling = (half + logit) / 2, (half - logit) / 2",
        "falling, rising = (half + logit) / 2, (half - logit) / 2",
        ("teachers/test_linear_energy.py::test_one_example_ends_where_the_flow_ends",),
    ),
    # --- kernel
    Mutant(
        "the sums of another computation are gone on from",
        "kernel/progress.py",
        'if metadata.get("key") != key:',
        "if False:",
        ("kernel/test_progress.py::test_the_state_of_another_computation_is_refused",),
    ),
    Mutant(
        "a contraction takes the mean over tokens",
        "kernel/contractions.py",
        "return product.sum(dim=(2, 5)).view(n * c, m * c)",
        "return product.mean(dim=(2, 5)).view(n * c, m * c)",
        ("kernel/test_contractions.py::test_matrices",),
    ),
    Mutant(
        "P lacks the gradient of the bias",
        "kernel/sides.py",
        "return gram + 1 if",
        "return gram if",
        ("test_tangent_kernel.py::test_poolings_and_heads",),
    ),
    Mutant(
        "a projection has the wrong size",
        "kernel/projection.py",
        "result.div_(self.dimension**0.5)",
        "result.div_(self.dimension)",
        ("kernel/test_projection.py::test_projection_is_unbiased_and_its_variance_falls",),
    ),
    Mutant(
        "a tensor that is rounding as a whole keeps its signs",
        "kernel/signs.py",
        "torch.where(one.largest <= threshold * overall, everything, threshold * one.largest)",
        "threshold * one.largest",
        (
            "kernel/test_signs.py::test_the_share_taken_away_names_the_biases_of_keys_and_nothing_else",
        ),
    ),
    Mutant(
        "the asymmetric kernel takes the signs of the left side too",
        "kernel/signs.py",
        'if side == 0 and self.formula == "asymmetric_signgd":',
        "if False:",
        ("kernel/test_signs.py::test_laws_of_the_asymmetric_kernel",),
    ),
    Mutant(
        "signs of an embedding's uses are added, not the sign of their sum",
        "kernel/signs.py",
        "sign_in_place(values.flatten(0, 1), limits)",
        "values.flatten(0, 1)",
        ("kernel/test_signs.py::test_products_of_every_kind",),
    ),
    Mutant(
        "signs are added up in the model's type",
        "tangent_kernel.py",
        "dtype = weight.dtype if work.signs is None else torch.float64",
        "dtype = weight.dtype",
        (
            "kernel/test_signs.py::test_signs_are_exact_to_the_last_bit_also_in_float32",
            "kernel/test_signs.py::test_the_type_of_signs",
        ),
    ),
    # --- instruments
    Mutant(
        "the start is added to the scores but not taken from the targets",
        "kernel_grid.py",
        "alpha = vectors @ (spectrum * (wanted - known / scale))",
        "alpha = vectors @ (spectrum * wanted)",
        ("test_kernel_grid.py::test_least_squares_solves_its_system_at_every_point",),
    ),
    Mutant(
        "the two machines of the asymmetric system are exchanged",
        "kernel_grid.py",
        "alpha = answers * (right.T @ ((q / gamma - sigma * p) / gap))",
        "alpha = answers * (right.T @ ((p / gamma - sigma * q) / gap))",
        ("test_kernel_grid.py::test_the_asymmetric_machine_solves_its_system_at_every_point",),
    ),
    Mutant(
        "the FT ratio is taken over P's part",
        "decomposition.py",
        "(apply_kernel(first, delta) + from_backbone).norm(dim=1)",
        "apply_kernel(first, delta).norm(dim=1)",
        ("test_decomposition.py::test_ft_ratio_equals_the_double_loop_also_on_new_examples",),
    ),
    Mutant(
        "a confidence on an edge falls into the upper bin",
        "binning.py",
        "numbers -= confidence <= edges[numbers]",
        "numbers -= confidence < edges[numbers]",
        ("test_binning.py::test_bins_are_those_of_a_search_among_the_edges",),
    ),
    Mutant(
        "a repair is fitted on the split that judges it",
        "temperature.py",
        "fit_scaling(logits_by_split[fit_on], labels_by_split[fit_on], method)",
        "fit_scaling(logits_by_split[judge_on[0]], labels_by_split[judge_on[0]], method)",
        ("test_temperature.py::test_repair_fits_on_one_split_and_changes_the_others",),
    ),
    Mutant(
        "a bootstrap does not look at its seed",
        "bootstrap.py",
        "generator, step = np.random.default_rng(seed),",
        "generator, step = np.random.default_rng(),",
        ("test_bootstrap.py::test_resamples_do_not_depend_on_memory",),
    ),
    Mutant(
        "a conformal threshold forgets the new example",
        "conformal.py",
        "rank = math.ceil(round((examples + 1) * coverage, 9))",
        "rank = math.ceil(round(examples * coverage, 9))",
        ("test_conformal.py::test_rank_by_exact_arithmetic",),
    ),
    Mutant(
        "an interval takes the one-sided quantile",
        "intervals.py",
        "stdtrit(n - 1, (1 + level) / 2)",
        "stdtrit(n - 1, level)",
        ("test_intervals.py::test_interval_is_scipys",),
    ),
    # --- records, drawing
    Mutant(
        "methods are compared by rank instead of seed by seed",
        "evidence.py",
        "[values[a][seed] - values[b][seed] for seed in seeds]",
        "[x - y for x, y in zip(*(sorted(values[m][seeds]) for m in (a, b)), strict=True)]",
        ("test_records.py::test_compare_is_the_paired_t_test",),
    ),
    Mutant(
        "a table is bold where intervals overlap",
        "plot.py",
        "sign * points.loc[best, near] > sign * others[far]",
        'sign * points.loc[best, near] > sign * others["mean"]',
        ("test_plot.py::test_the_best_has_an_interval_beyond_the_ends_of_all_others",),
    ),
    # --- lab, command line
    Mutant(
        "an unknown parameter is ignored",
        "lab/parameters.py",
        "for name in requested.keys() - declared.keys()",
        "for name in ()",
        ("lab/test_parameters.py::test_wrong_parameters_are_named",),
    ),
    Mutant(
        "a free parameter changes a run's name",
        "lab/runs.py",
        '"free": False,',
        '"free": True,',
        ("lab/test_runs.py::test_a_new_parameter_is_in_the_name_without_a_line_elsewhere",),
    ),
    Mutant(
        "an open place is no hindrance to a verdict",
        "evidence.py",
        "if len(sides[side]) == len(telling)]",
        "if len(sides[side])]",
        ("test_evidence.py::test_the_word_follows_from_all_intervals_and_turns_with_the_claim",),
    ),
    Mutant(
        "publishing with refusals exits 0",
        "command_line.py",
        'return 1 if (outcome["outcome"] == "refused").any() else 0',
        "return 0",
        ("test_command_line.py::test_publishing_exits_1_where_one_record_is_refused",),
    ),
    # --- linear teachers
    Mutant(
        "fine-tuning learns what no input shows",
        "teachers/regression.py",
        "return source + span.onto(target - source)",
        "return source + (target - source)",
        ("teachers/test_regression.py::test_projections_and_end_point_against_the_pseudo_inverse",),
    ),
    Mutant(
        "noise is not squared",
        "teachers/regression.py",
        "shares / torch.where(seen, span.values, 1.0), 0.0).square()",
        "shares / torch.where(seen, span.values, 1.0), 0.0)",
        ("teachers/test_regression.py::test_mean_over_the_noise",),
    ),
    Mutant(
        "the hidden variance enters a bound once too little",
        "teachers/bounds.py",
        "(math.sqrt(hidden) * head + tail)",
        "(head + tail)",
        ("teachers/test_regression.py::test_the_gaussian_bound_by_hand",),
    ),
    Mutant(
        "a deep network rescales by the squared length",
        "teachers/deep.py",
        "** ((1 - 1 / depth) / 2)",
        "** (1 - 1 / depth)",
        (
            "teachers/test_deep.py::test_a_negative_multiple_is_reached_where_something_keeps_the_path_from_zero",
        ),
    ),
    Mutant(
        "the saddle is not looked for",
        "teachers/deep.py",
        "if meets_saddle(one, source[index], target[index], depth=depth):",
        "if False:",
        ("teachers/test_deep.py::test_the_straight_path_into_the_saddle_is_refused_and_named",),
    ),
    Mutant(
        "a negative multiple is reached behind the saddle",
        "teachers/freezing.py",
        "multiple = multiple.clamp(min=0)",
        "multiple = multiple.clone()",
        ("teachers/test_freezing.py::test_the_flow_with_frozen_layers",),
    ),
    Mutant(
        "a flow from a start that fits chases rounding errors",
        "teachers/flow.py",
        "if first <= ROUNDING * float(answers @ answers):",
        "if first < 0:",
        ("teachers/test_deep.py::test_a_start_that_fits_to_rounding_is_the_end",),
    ),
    Mutant(
        "plain numbers pass through float32",
        "teachers/spans.py",
        "values = torch.as_tensor(values, dtype=torch.float64)",
        "values = torch.as_tensor(values)",
        ("teachers/test_regression.py::test_plain_numbers_keep_their_digits",),
    ),
    Mutant(
        "the kernel counts neurons that are on for one input only",
        "teachers/relu.py",
        "return left @ right.mT * (math.pi - angles(left, right)) / (2 * math.pi)",
        "return left @ right.mT * (math.pi - angles(left, right) / 2) / (2 * math.pi)",
        ("teachers/test_relu.py::test_the_kernel_against_random_neurons",),
    ),
    Mutant(
        "neurons that are off are trained",
        "teachers/relu.py",
        "through = torch.where(hidden > 0, errors[..., None], 0.0)",
        "through = torch.where(hidden == hidden, errors[..., None], 0.0)",
        ("teachers/test_relu.py::test_training_takes_the_steps_of_autograd",),
    ),
    Mutant(
        "parallel inputs are fitted to the end",
        "teachers/relu.py",
        "if share > SINGULAR:",
        "if True:",
        ("teachers/test_relu.py::test_refuses",),
    ),
    Mutant(
        "what was found counts once in the bound on the sphere",
        "teachers/relu.py",
        "left = whole - 2 * found + fit.squared_norm",
        "left = whole - found",
        ("teachers/test_relu.py::test_what_a_linear_difference_promises",),
    ),
    Mutant(
        "a distance forgets the training inputs",
        "teachers/similarity.py",
        "difference = span.off(difference)",
        "difference = difference.clone()",
        ("teachers/test_task_similarity.py::test_distances_by_hand_and_as_a_risk",),
    ),
    Mutant(
        "a prompt's padding may be its gap",
        "models/language_heads.py",
        ' & (batch["attention_mask"] != 0)',
        "",
        (
            "models/test_language_heads.py::test_the_gap_is_found_on_either_side_of_padding_and_must_be_one",
        ),
    ),
    Mutant(
        "P stays in the share of tied embeddings and counts twice",
        "tangent_kernel.py",
        "shares[labels[name]][:, c, :, c] -= products",
        "shares[labels[name]][:, c, :, c] -= 0 * products",
        ("test_prompts.py::test_logits_and_kernel_are_the_language_models",),
    ),
    Mutant(
        "a tied head gives each label word the features of the first",
        "models/language_heads.py",
        "cotangent[..., None] * features[:, None, None]",
        "cotangent[..., None] * features[:1, None, None]",
        ("test_prompts.py::test_logits_and_kernel_are_the_language_models",),
    ),
    Mutant(
        "a causal prompt is read at the token that the tokenizer appends",
        "prompts.py",
        "{name: ids[: last + 1] for name, ids in example.items()}",
        "{name: ids[: last + 2] for name, ids in example.items()}",
        ("test_prompts.py::test_logits_and_kernel_are_the_language_models",),
    ),
    Mutant(
        "tokens of one template serve another",
        "training/measuring.py",
        "[model.config.template, model.config.gap_id]",
        "[model.config.gap_id]",
        ("test_prompts.py::test_tokens_kept_for_one_template_do_not_serve_another",),
    ),
    Mutant(
        "the bias of the label words is left behind",
        "models/prompted.py",
        "cast(torch.Tensor, head.bias).copy_(parts.bias)",
        "cast(torch.Tensor, head.bias).copy_(0 * parts.bias)",
        ("test_prompts.py::test_logits_and_kernel_are_the_language_models",),
    ),
)


def occurrences(
    mutant: Mutant,
    tree: Path = ROOT,
) -> int:  # must be 1
    "How often the text that a fault replaces stands in its file."
    return (tree / "lpft_nb" / mutant.file).read_text(encoding="utf-8").count(mutant.old)


def copy_tree(tree: Path) -> Path:
    "Package and tests as they are now, with links to all the rest."
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.name not in COPIED and path.name not in LEFT:
            (tree / path.name).symlink_to(path)
        elif path.is_file():
            shutil.copyfile(path, tree / path.name)
        elif path.name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, tree / path.name, ignore=ignored)
    return tree


def play(
    tree: Path,  # a copy
    words: list[str],  # of pytest's command line
    log: Path,  # gets what is said
) -> None:
    "What a forked process does: pytest, on the copy and on nothing else."
    os.chdir(tree)
    sys.path[:] = [
        path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "scripts")
    ]
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import pytest

    code = int(pytest.main(words))
    package = sys.modules.get("lpft_nb")
    if package is not None and not Path(str(package.__file__)).is_relative_to(tree.resolve()):
        print(f"{package.__file__} was tested instead of the copy")
        code = FOREIGN
    sys.stdout.flush()
    os._exit(code)


def run_tests(
    tree: Path,  # a copy
    tests: Iterable[str],  # node ids below tests
    limit: float | None = LIMIT,  # seconds; None: as long as they take
) -> tuple[int | None, str]:  # the exit code, None for tests that took too long; what pytest said
    "The tests in a process of their own, that stops at the first failure and imports the copy."
    words = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    words += [f"tests/{test}" for test in tests]
    log = tree.with_suffix(".log")
    process = multiprocessing.get_context("forkserver").Process(
        target=play, args=(tree, words, log)
    )
    process.start()
    process.join(limit)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, log.read_text(encoding="utf-8", errors="replace")


def outcome(
    mutant: Mutant,
    tree: Path,  # a copy; afterwards as before
) -> tuple[str, str]:  # caught, survived, error or too slow; what pytest said
    "Put the fault in, run its tests, take it out."
    file = tree / "lpft_nb" / mutant.file
    source = file.read_text(encoding="utf-8")
    file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, said = run_tests(tree, mutant.tests)
    finally:
        file.write_text(source, encoding="utf-8")
    return {FAILED: "caught", PASSED: "survived", None: "too slow"}.get(code, "error"), said


def try_all(
    mutants: list[Mutant],
    folder: Path,  # for copies
    *,
    workers: int,  # copies in use at a time
) -> list[str]:  # outcomes, in the order of the mutants
    "Print a line for each fault as soon as it is known."
    trees: SimpleQueue[Path] = SimpleQueue()
    for number in range(workers):
        trees.put(copy_tree(folder / str(number)))

    def one(mutant: Mutant) -> str:
        tree, start = trees.get(), time.monotonic()
        found, said = outcome(mutant, tree)
        trees.put(tree)
        seconds = time.monotonic() - start
        print(f"{mutant.words:54} {mutant.file:24} {found:8} {seconds:4.0f} s", flush=True)
        if found in ("error", "too slow"):
            print(said, flush=True)
        return found

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, mutants))


def main(arguments: list[str] | None = None) -> int:
    "Returns the exit code."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help="try only faults whose words or file hold one of these"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="faults tried at a time (default: 2)"
    )
    options = parser.parse_args(arguments)
    chosen = [
        mutant
        for mutant in MUTANTS
        if not options.words or any(w in mutant.words or w in mutant.file for w in options.words)
    ]
    lost = [
        f"{m.words}: {m.old!r} must stand once in {m.file}" for m in chosen if occurrences(m) != 1
    ]
    if lost or not chosen:
        print("\n".join(lost) or "no fault has such words", file=sys.stderr)
        return 2
    os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
    # a lock of tqdm lives as long as the process that has imported it
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED.split())
    with tempfile.TemporaryDirectory(prefix="lpft-mutants-") as folder:
        named = dict.fromkeys(test for mutant in chosen for test in mutant.tests)
        tree = copy_tree(Path(folder, "whole"))
        code, said = run_tests(tree, named, limit=None)
        if code != PASSED:
            print(f"the tests fail without a fault:\n{said}", file=sys.stderr)
            return 2
        found = try_all(chosen, Path(folder), workers=options.workers)
    print(f"{found.count('caught')} of {len(found)} faults caught")
    return 1 if "survived" in found else 0 if set(found) == {"caught"} else 2


if __name__ == "__main__":
    raise SystemExit(main())
