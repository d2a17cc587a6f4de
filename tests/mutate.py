"""Slips that a test must notice: puts them into a copy of the code one at a time, and runs the test that is to fail.

    python tests/mutate.py                      # all; a quarter of an hour or so
    python tests/mutate.py --only evaler.py     # those whose file or line contains the word
    python tests/mutate.py --list               # what there is; runs nothing

One line each: killed (the test failed), SURVIVED (it passed), or ERROR: the line is not found exactly once, or the test
ended otherwise than by failing, as where a fixture breaks or a name is missing, which proves nothing about the test.
Exit code 1 if anything survived or was an error.

Run the tests first: one that fails on the code as it is kills every slip and proves nothing. Who changes a line that
stands below changes it here too; who adds a promise may add the slip that would break it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SECONDS = 300  # a test that takes longer hangs
BROKEN = ("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "UnboundLocalError")

# file: (what stands there, on one line and once in the file; what is put in its place; the test)
# fmt: off
MUTATIONS = {
    "download.py": [
        ("read = module.read if others else", "read = module.read if True else",
         "test_datasets.py::test_photographs_of_the_original_archives_are_not_decoded_again"),
    ],
    "command.py": [
        ("sys.unraisablehook = ask_again", "pass",
         "test_command.py::test_a_signal_that_comes_while_objects_are_freed_is_not_lost[15-143-terminated]"),
    ],
    "trainer.py": [
        ("if learning_rate_at(step, config) != learning_rate_at(step, extended):", "if False:",
         "test_resume.py::test_a_schedule_that_would_have_been_another_is_refused[cosine]"),
        ("            variable.assign(value)", "            pass",
         "test_replicas.py::test_own_statistics_differ_from_the_whole_batch_and_are_averaged"),
        ("return agreed or (self.alone and self.signal)", "return self.signal",
         "test_replicas.py::test_two_workers_are_two_devices_also_when_they_are_stopped_killed_and_resumed"),
        ("if state.checkpoints.saved != step:", "if state.checkpoints.saved == step:",
         "test_trainer.py::test_the_last_step_is_saved"),
        ("first_step=step,", "first_step=0,",
         "test_trainer.py::test_a_stopped_test_is_made_up_for"),
        ("(name, config.data_dir, validation=config.validation)", "(name, config.data_dir)",
         "test_trainer.py::test_held_out_images_are_neither_trained_on_nor_the_test_split"),
        ("correct = tf.equal(tf.argmax(logits, axis=1,", "correct = tf.not_equal(tf.argmax(logits, axis=1,",
         "test_trainer.py::test_totals_are_the_sums_of_losses_right_predictions_and_images"),
        ("tf.reduce_sum(tf.cast(losses, tf.float64))", "tf.cast(loss, tf.float64)",
         "test_trainer.py::test_totals_are_the_sums_of_losses_right_predictions_and_images"),
        ('{"adam": 0.0, "momentum": 1e-4}', '{"adam": 0.0, "momentum": 0.0}',
         "test_trainer.py::test_defaults_of_a_dataset"),
        ('("adam" if model == "convnet" else', '("adam" if model == "convnet" or flags.dataset == "ImageNet" else',
         "test_trainer.py::test_defaults_of_a_dataset"),
        ("epoch = math.ceil(len(train) / max_batch_size)", "epoch = len(train) // max_batch_size",
         "test_trainer.py::test_defaults_of_a_dataset"),
        ("@tf.function(jit_compile=jit_compile or None)", "@tf.function",
         "test_trainer.py::test_jit_compile_is_asked_of_tensorflow"),
        ('recipe["momentum_rate"] * max_batch_size / recipe["max_batch_size"]', 'recipe["momentum_rate"]',
         "test_trainer.py::test_flags_win_over_a_recipe"),
        ('recipe.get("lr_schedule", "cosine")', '"cosine"',
         "test_trainer.py::test_imagenet_is_trained_as_in_the_paper"),
        ("(max(1, most // number) if most % (usual * number) else usual)", "usual",
         "test_trainer.py::test_flags_win_over_a_recipe"),
        ("set_threads(config.batch_size, network_image_shape(train))", "pass",
         "test_trainer.py::test_threads_are_set_for_the_images_of_an_update_before_the_network_is_built"),
        ("set_threads(config.batch_size,", "set_threads(config.max_batch_size,",
         "test_trainer.py::test_threads_are_set_for_the_images_of_an_update_before_the_network_is_built"),
        ("        config.augment,", "        None,",
         "test_trainer.py::test_a_run_trains_on_augmented_images_of_its_seed"),
        ("        config.seed,", "        0,",
         "test_trainer.py::test_a_run_trains_on_augmented_images_of_its_seed"),
        ("keras.utils.set_random_seed(config.seed)", "keras.utils.set_random_seed(0)",
         "test_trainer.py::test_a_run_starts_from_the_weights_of_its_seed"),
        ("state.totals.assign(tf.zeros_like(state.totals))", "pass",
         "test_trainer.py::test_a_row_is_the_mean_over_the_steps_since_the_last"),
        ("tf.cond(norm > runs.CLIP_NORM,", "tf.cond(norm < runs.CLIP_NORM,",
         "test_trainer.py::test_two_updates_against_the_papers_formulas"),
        ("[g * (runs.CLIP_NORM / norm) for g in gradients]", "[g / norm for g in gradients]",
         "test_trainer.py::test_two_updates_against_the_papers_formulas[10000.0-momentum]"),
        ("objective += weight_decay *", "objective -= weight_decay *",
         "test_trainer.py::test_weight_decay_pulls_every_weight_to_zero"),
        ("grad=gradient, momentum=0.9", "grad=gradient, momentum=0.99",
         "test_trainer.py::test_two_updates_against_the_papers_formulas[1.0-momentum]"),
        ("power2.assign(power2 * 0.999)", "power2.assign(power2 * 0.9)",
         "test_trainer.py::test_two_updates_against_the_papers_formulas[1.0-adam]"),
        ("for i in tf.range(updates):", "for i in tf.range(1, updates):",
         "test_trainer.py::test_a_step_is_max_batch_size_images_in_equal_updates"),
        ("peak * (step + 1) / warmup", "peak * step / warmup", "test_trainer.py::test_schedules"),
        ("peak * 0.5 * (1 + math.cos(", "peak * 0.5 * (1 - math.cos(", "test_trainer.py::test_schedules"),
        ("(step - warmup) / max(1, steps - warmup)", "(step - warmup) / steps", "test_trainer.py::test_schedules"),
        ('"linear": share, "square root": math.sqrt(share)', '"linear": math.sqrt(share), "square root": share',
         "test_trainer.py::test_the_rate_scales_as_its_optimizer_needs"),
        ("batch_norm_momentum=0.9**share,", "batch_norm_momentum=0.9,",
         "test_trainer.py::test_the_horizon_of_moving_statistics_is_the_same_at_every_batch_size"),
        ("train, test = load_data(flags)", "train, test = load_data(flags)[:1] * 2",
         "test_trainer.py::test_testing_is_in_inference_mode_and_learns_nothing"),
    ],
    "runs.py": [
        ('= stored["derived"]["max_training_step"] = config.max_training_step', '= config.max_training_step',
         "test_resume.py::test_a_run_is_trained_longer_as_if_it_had_been_so_from_the_start"),
        ('{"adam": 1e-3, "momentum": 0.2}', '{"adam": 1e-3, "momentum": 20.0}',
         "test_trainer.py::test_defaults_of_a_dataset"),
        ("CLIP_NORM = 20.0 ", "CLIP_NORM = 5.0 ",
         "test_trainer.py::test_two_updates_against_the_papers_formulas[10000.0-momentum]"),
        ("for variable in model.variables}", "for variable in model.trainable_variables}",
         "test_evaler.py::test_it_agrees_with_the_trainers_last_test"),
        ('IGNORED = PLACES | {', 'IGNORED = PLACES | {"lr_schedule", ',
         "test_compare.py::test_each_setting_that_changes_the_result_makes_a_row_of_its_own"),
        ('    "seed",', '',
         "test_compare.py::test_seeds_share_a_cell_and_other_settings_do_not"),
        ('rows[-1]["step"] >= config.max_training_step', 'rows[-1]["step"] > config.max_training_step',
         "test_compare.py::test_batch_norm_has_three_rows"),
        ('if row["step"] > start and', "if", "test_compare.py::test_imagenet_has_the_median_of_its_last_epochs"),
        ('if record["step"] != config.max_training_step or record', "if record",
         "test_compare.py::test_an_evaluation_of_another_step_or_split_does_not_count"),
    ],
    "summaries.py": [
        ("            mark_start(self.writer, first_step)", "            pass",
         "test_resume.py::test_rows_and_events_after_the_checkpoint_are_dropped"),
        ("step=first_step + 1 if first_step else 0,", "step=first_step,",
         "test_resume.py::test_rows_and_events_after_the_checkpoint_are_dropped"),
        ("self.clock += time.perf_counter() - began", "pass",
         "test_trainer.py::test_speed_counts_neither_the_first_step_nor_what_is_not_training"),
        ("if step == self.first_step + 1:", "if step == self.first_step:",
         "test_trainer.py::test_speed_counts_neither_the_first_step_nor_what_is_not_training"),
        ("if writes and first_step == 0:", "if writes and first_step < 0:",
         "test_trainer.py::test_hparams_has_every_setting_that_is_not_its_default"),
        ('np.argsort(-result["losses"][wrong]', 'np.argsort(result["losses"][wrong]',
         "test_evaler.py::test_the_worst_mistakes_come_first"),
        ("confusion.sum(axis=1, keepdims=True)", "confusion.sum(axis=0, keepdims=True)",
         "test_evaler.py::test_the_confusion_picture_shows_shares_of_each_label"),
        ("np.round((images - low) / (high - low) * 255)", "np.round(images * 255)",
         "test_evaler.py::test_floats_of_any_range_become_pictures"),
        ("low, high = min(0.0, float(images.min())), max(1.0,", "low, high = float(images.min()), max(0.0,",
         "test_evaler.py::test_floats_of_any_range_become_pictures"),
        (".transpose(0, 2, 1, 3, 4)", ".transpose(0, 1, 2, 3, 4)", "test_evaler.py::test_image_grids"),
    ],
    "evaler.py": [
        ("if any(os.path.realpath(file) == place for file in files):", "if False:",
         "test_predict.py::test_paths_that_cannot_be_predicted"),
        ('config = dataclasses.replace(config, dtype="float32")', "",
         "test_export.py::test_a_bfloat16_run_is_exported_in_float32"),
        ("variances.mean(axis=0) + means.var(axis=0)", "variances.mean(axis=0)",
         "test_evaler.py::test_reestimation_joins_the_variances_within_and_between_batches_and_drops_nothing_out"),
        ("model(images, training=False)  #", "model(images, training=True)  #",
         "test_evaler.py::test_reestimation_joins_the_variances_within_and_between_batches_and_drops_nothing_out"),
        ("by_batch(model, momentum=0.0)", "by_batch(model, momentum=0.9)",
         "test_evaler.py::test_reestimation_joins_the_variances_within_and_between_batches_and_drops_nothing_out"),
        ("by_batch(model, momentum=1.0)", "by_batch(model, momentum=0.0)",
         "test_evaler.py::test_statistics_of_the_test_batch_are_those_of_training"),
        ('"bfloat16": "mixed_bfloat16"', '"bfloat16": "float32"',
         "test_evaler.py::test_the_network_computes_in_the_dtype_of_the_run"),
        ("np.add.at(confusion, (labels, predictions), 1)", "np.add.at(confusion, (predictions, labels), 1)",
         "test_evaler.py::test_evaluate_by_hand"),
        ("int(row[k]) / int(row.sum())", "int(row[k]) / len(labels)", "test_evaler.py::test_evaluate_by_hand"),
        ("in_top_k(labels, logits, 5)", "in_top_k(labels, logits, 4)",
         "test_evaler.py::test_top5_accuracy_where_there_are_many_classes"),
        ("logits = model(images, training=False)", "logits = model(images, training=True)",
         "test_trainer.py::test_testing_is_in_inference_mode_and_learns_nothing"),
        ('split = test if flags.split == "test" else train', 'split = train if flags.split == "test" else test',
         "test_evaler.py::test_it_agrees_with_the_trainers_last_test"),
        ("top_k(tf.nn.softmax(model(images, training=False)),", "top_k(model(images, training=False),",
         "test_predict.py::test_files_that_a_folder_was_packed_of_are_predicted_as_evaluated"),
        ("if bits in folder.BITS:", "if bits is NotImplemented:",
         "test_predict.py::test_a_dim_deep_image_is_as_dim_as_in_the_dataset"),
        ("        sys.exit(1)", "        pass",
         "test_predict.py::test_a_broken_file_is_one_line_and_the_others_go_on"),
    ],
    "input_ops.py": [
        ("folder.load(path, dataset.image_shape[:2], bits)", "folder.load(path, dataset.image_shape[1::-1], bits)",
         "test_predict.py::test_other_sizes_are_resized_to_height_and_width"),
        ("    if folder.is_upright_jpeg(path):", "    if False:",
         "test_predict.py::test_jpeg_files_are_cut_as_in_evaluation"),
        ("resample(pixels, *centre(pixels.shape[:2]))", "tf.image.resize(pixels, [IMAGENET_SIZE, IMAGENET_SIZE])",
         "test_predict.py::test_other_files_are_cut_like_jpeg_files"),
        ("chosen = draws if rows is None else tf.gather(draws, rows, axis=1)", "chosen = draws[:, : len(rows)]",
         "test_replicas.py::test_the_rows_of_all_workers_are_the_batch[flip+crop]"),
        ("place = step * batch_size +", "place = step +",
         "test_input_ops.py::test_encoded_images_are_cropped_anew_in_every_place_and_by_the_seed"),
        ("key(AUGMENTATION, seed, place)", "key(AUGMENTATION, 0, place)",
         "test_input_ops.py::test_encoded_images_are_cropped_anew_in_every_place_and_by_the_seed"),
        ("IMAGENET_RESIZE / tf.cast(tf.reduce_min(size)", "IMAGENET_RESIZE / tf.cast(tf.reduce_max(size)",
         "test_input_ops.py::test_encoded_images_are_cut_from_the_centre"),
        ("DECODER_MARGIN = 2 ", "DECODER_MARGIN = 0 ",
         "test_input_ops.py::test_the_test_crop_is_that_of_the_whole_picture_resized"),
        ("translation=tf.stack([0.0, -begin[axis] * scale[axis]])", "translation=tf.stack([0.0, -begin[axis]])",
         "test_input_ops.py::test_the_test_crop_is_that_of_the_whole_picture_resized"),
        ("antialias=True,", "antialias=False,",
         "test_input_ops.py::test_the_test_crop_is_that_of_the_whole_picture_resized"),
        ("tf.image.resize(image, [IMAGENET_SIZE, IMAGENET_SIZE])",
         "tf.image.resize(image, [IMAGENET_SIZE, IMAGENET_SIZE], antialias=True)",
         "test_input_ops.py::test_a_training_crop_is_its_window_interpolated"),
        (">= [ratio * IMAGENET_SIZE for", "> [ratio * IMAGENET_SIZE for",
         "test_input_ops.py::test_large_windows_are_decoded_at_a_fraction_of_the_size"),
        ("(jpeg, window // ratio, channels=3, ratio=ratio)", "(jpeg, window, channels=3)",
         "test_input_ops.py::test_large_windows_are_decoded_at_a_fraction_of_the_size"),
        ("(image, flip_seed) if flip else image", "(image, flip_seed) if not flip else image",
         "test_input_ops.py::test_encoded_images_are_crops_of_8_to_100_percent_of_the_area"),
        ('key(AUGMENTATION, seed, place), flip=augment == "flip+crop")', "key(AUGMENTATION, seed, place), flip=False)",
         "test_input_ops.py::test_encoded_images_are_mirrored_half_of_the_time"),
        ("return tf.image.stateless_random_flip_left_right(image, flip_seed) if flip else image", "return image",
         "test_input_ops.py::test_encoded_images_are_mirrored_half_of_the_time"),
        ("area_range=(0.08, 1.0)", "area_range=(0.9, 1.0)",
         "test_input_ops.py::test_encoded_images_are_crops_of_8_to_100_percent_of_the_area"),
        ("aspect_ratio_range=(3 / 4, 4 / 3)", "aspect_ratio_range=(1, 4 / 3)",
         "test_input_ops.py::test_encoded_images_are_crops_of_8_to_100_percent_of_the_area"),
        ("IMAGENET_RESIZE = 256 ", "IMAGENET_RESIZE = 224 ",
         "test_input_ops.py::test_encoded_images_are_cut_from_the_centre"),
        ('chosen, flip=augment == "flip+crop")', "chosen, flip=True)",
         "test_input_ops.py::test_augmentation_is_drawn_anew_by_seed_and_step"),
        ("key(AUGMENTATION, seed, step)", "key(AUGMENTATION, 0, step)",
         "test_input_ops.py::test_augmentation_is_drawn_anew_by_seed_and_step"),
        ("key(AUGMENTATION, seed, step)", "key(AUGMENTATION, seed, 0)",
         "test_input_ops.py::test_augmentation_is_drawn_anew_by_seed_and_step"),
        ("key(ORDER, seed, epoch)", "key(ORDER, 0, epoch)",
         "test_input_ops.py::test_every_epoch_is_another_permutation"),
        ("key(ORDER, seed, epoch)", "key(ORDER, seed, 0)",
         "test_input_ops.py::test_every_epoch_is_another_permutation"),
        ("start = first_step * batch_size ", "start = first_step ",
         "test_input_ops.py::test_a_run_that_starts_later_sees_the_same_batches"),
        ("range(len(dataset)).batch(batch_size)", "range(len(dataset)).batch(batch_size, drop_remainder=True)",
         "test_input_ops.py::test_the_test_split_comes_whole_in_order_and_as_it_is"),
        ("augment = augment if is_training else None", "augment = augment",
         "test_input_ops.py::test_the_test_split_comes_whole_in_order_and_as_it_is"),
        ("tf.cast(images, tf.float32) / 255", "tf.cast(images, tf.float32) / 256",
         "test_input_ops.py::test_the_test_split_comes_whole_in_order_and_as_it_is"),
        ("draw * (2 * padding + 1)", "draw * (2 * padding)",
         "test_input_ops.py::test_flip_and_crop_against_all_the_pictures_it_may_make"),
        ("draws[2] < 0.5", "draws[2] < 0.05",
         "test_input_ops.py::test_flip_and_crop_against_all_the_pictures_it_may_make"),
    ],
    "ops.py": [
        ("self.trainable and not self.freeze_statistics", "self.trainable",
         "test_conversion.py::test_frozen_batch_norm_keeps_its_statistics_and_trains_the_rest"),
        ("sign = 1 if twin.gamma is None else np.where(np.asarray(twin.gamma) < 0, -1, 1)", "sign = 1",
         "test_conversion.py::test_every_channel_has_the_moments_that_batch_norm_gave_it"),
        ("layer.beta.assign(wanted_mean - gamma * mean)", "layer.beta.assign(wanted_mean)",
         "test_conversion.py::test_every_channel_has_the_moments_that_batch_norm_gave_it"),
        ("axis=0, weights=sizes) + between)", "axis=0, weights=sizes))",
         "test_conversion.py::test_every_channel_has_the_moments_that_batch_norm_gave_it"),
        ("ours.finalize_state()", "pass", "test_conversion.py::test_settings_and_adapted_means_are_kept"),
        ("ours.trainable = theirs.trainable", "pass", "test_conversion.py::test_settings_and_adapted_means_are_kept"),
        ("if len(record) != len(starts):", "if False:",
         "test_conversion.py::test_what_cannot_be_replaced_is_refused_by_name"),
        ("tf.reduce_mean(variances, 0) + between, number", "tf.reduce_mean(variances, 0), number",
         "test_replicas.py::test_synchronized_batch_norm_is_that_of_the_whole_batch[0.0]"),
        ("                count *= replicas", "",
         "test_replicas.py::test_synchronized_batch_norm_is_that_of_the_whole_batch[0.0]"),
        ("tf.random.fold_in(tf.cast(self.seed_generator.next(), tf.int64), replica)",
         "tf.cast(self.seed_generator.next(), tf.int64)",
         "test_replicas.py::test_each_replica_draws_a_dropout_mask_of_its_own"),
        ("        momentum=0.99,", "        momentum=0.9,",
         "test_layers.py::test_layers_take_the_arguments_of_keras"),
        ("return math.gcd(positions, 1 <<", "return math.gcd(1, 1 <<",
         "test_group_norm.py::test_positions_lie_side_by_side_where_rows_are_short_or_columns_long"),
        ("EPSILON = 1e-5 ", "EPSILON = 1e-3 ", "test_group_norm.py::test_group_norm_epsilon_counts"),
        ("elif dtype == tf.float64 or _compiled_by_xla():", "elif dtype == tf.float64:",
         "test_group_norm.py::test_large_mean_keeps_its_digits_when_xla_compiles[batch]"),
        ("tf.where(tf.size(x) > 0, new, old)", "new",
         "test_batch_norm.py::test_a_batch_without_values_teaches_nothing"),
        ("self.autocast = False", "self.autocast = True",
         "test_layers.py::test_float32_inputs_reach_the_statistics_of_mixed_float16"),
        ("group_norm(x, gamma, beta, 1, epsilon, data_format)", "group_norm(x, gamma, beta, 1, EPSILON, data_format)",
         "test_group_norm.py::test_layer_and_instance_norm_pass_epsilon_on"),
        ("dx -= centred * wide(slope)", "dx += centred * wide(slope)",
         "test_group_norm.py::test_group_norm_is_the_formula"),
        ("dx = dy * wide_scale - wide(offset)", "dx = dy * wide_scale",
         "test_group_norm.py::test_group_norm_is_the_formula"),
        ("mean = tf.reduce_mean(values, axis=3)", "mean = tf.reduce_mean(values[..., ::-1, :], axis=3)",
         "test_group_norm.py::test_group_norm_is_the_formula"),
        ("inverse_std = tf.sqrt(variance) / variance", "inverse_std = tf.math.rsqrt(variance)",
         "test_group_norm.py::test_an_example_is_bitwise_the_same_in_every_batch"),
        ("0], [0, -columns % LANES]]", "0], [0, 0]]",
         "test_group_norm.py::test_an_example_is_bitwise_the_same_in_every_batch"),
        ("exponential_avg_factor=1.0 - momentum", "exponential_avg_factor=momentum",
         "test_batch_norm.py::test_moving_statistics_learn_the_mean_and_the_unbiased_variance"),
        ("unbiased = variance * count / tf.maximum(count - 1, 1)", "unbiased = variance",
         "test_batch_norm.py::test_moving_statistics_learn_the_mean_and_the_unbiased_variance"),
        ("bool(training) and self.trainable and not", "bool(training) and not",
         "test_layers.py::test_frozen_batch_norm_uses_and_keeps_its_statistics"),
        ("axes = list(range(kernel.shape.rank - 1))", "axes = list(range(kernel.shape.rank))",
         "test_convolution.py::test_standardized_weights_have_mean_0_and_variance_1_by_fan_in"),
        ("tf.math.rsqrt(fan_in * (variance + epsilon / fan_in))", "tf.math.rsqrt(variance + epsilon)",
         "test_convolution.py::test_standardized_weights_have_mean_0_and_variance_1_by_fan_in"),
    ],
    "model.py": [
        ("[: 6 if bottleneck else 4]", "[:4]", "test_model.py::test_channels_of_a_network_are_those_of_its_norms"),
        ("                epsilon=ops.EPSILON,", "",
         "test_model.py::test_batch_renorm_is_keras_own_with_the_papers_bounds"),
        ('        kernel_initializer="he_normal",', '',
         "test_model.py::test_he_initialisation"),
        ("LOGITS_STDDEV = 0.01 ", "LOGITS_STDDEV = 1.0 ",
         "test_model.py::test_every_network_starts_near_the_loss_of_a_guess[resnet8-group]"),
        ("max(height, width) <= 64", "max(height, width) < 64",
         "test_model.py::test_default_model_is_chosen_by_the_image"),
        ("return 16 if model in SMALL_RESNETS else 32", "return 32 if model in SMALL_RESNETS else 16",
         "test_model.py::test_default_groups"),
        ("number = channels // group_size", "number = group_size", "test_model.py::test_groups_of_every_norm"),
        ("ops.StandardizedConv2D if weight_standardization", "ops.StandardizedConv2D if not weight_standardization",
         "test_model.py::test_weight_standardization_and_momentum_reach_every_layer"),
        ("use_bias=norm is None", "use_bias=True",
         "test_model.py::test_parameters_are_those_published[resnet20-shape5-10-272474]"),
        ('f"{name}_2", gamma="zeros")', 'f"{name}_2", gamma="ones")',
         "test_model.py::test_the_last_gamma_of_each_block_starts_at_0"),
        ("ops.Dropout(0.5,", "ops.Dropout(0.05,", "test_model.py::test_dropout_of_the_convnet"),
        ('"leaky_relu": 0.2}', '"leaky_relu": 0.02}', "test_blocks.py::test_conv2d_is_convolution_norm_activation"),
    ],
    "figure/results.py": [
        ('settings["max_training_step"] * settings["max_batch_size"] /',
         'settings["max_training_step"] * settings["batch_size"] /',
         "test_compare.py::test_the_title_says_what_the_runs_share"),
        ('text = f"{100 * statistics.median(values):.1f}"', 'text = f"{100 * statistics.mean(values):.1f}"',
         "test_compare.py::test_seeds_share_a_cell_and_other_settings_do_not"),
        ("(statistics.median(other) - statistics.median(base))", "(statistics.median(base) - statistics.median(other))",
         "test_compare.py::test_sentences_say_what_the_numbers_support"),
        ("min(other) > max(base) or min(base) > max(other)", "min(other) > max(base)",
         "test_compare.py::test_ranges_that_do_not_overlap_are_seen_from_below_too"),
        ("                middle,", "                high,",
         "test_compare.py::test_the_picture_has_the_median_and_the_range"),
    ],
    "replicas.py": [
        ("parts = max(1, strategy.num_replicas_in_sync // len(workers().addresses))",
         "parts = strategy.num_replicas_in_sync // len(workers().addresses)",
         "test_replicas.py::test_a_worker_tests_alone_what_is_no_run_of_all"),
        ("return values[size * place // parts :", "return values[0 * place // parts :",
         "test_replicas.py::test_devices_share_the_images_of_a_test[7]"),
        ("tf.distribute.ReduceOp.MEAN, values, options)", "tf.distribute.ReduceOp.SUM, values, options)",
         "test_replicas.py::test_with_group_norm_two_devices_are_one_of_twice_the_batch[momentum-20.0]"),
        ("reshape(updates, len(who.addresses), -1)[:, who.index]", "reshape(len(who.addresses), -1)[who.index]",
         "test_replicas.py::test_the_rows_of_all_workers_are_the_batch[None]"),
        ('set(cluster) != {"worker"} or', "", "test_replicas.py::test_a_wrong_tf_config_is_one_line"),
        ("    if verdict:", "    if verdict and False:",
         "test_replicas.py::test_workers_that_differ_are_refused_by_name"),
        ("joined = joined[:: len(joined) // len(shares)]", "joined = joined[::-1]",
         "test_replicas.py::test_two_workers_are_two_devices_also_when_they_are_stopped_killed_and_resumed"),
    ],
    "figure/compare.py": [
        ("if run.config.seed == self.seed and run.settings", "if run.settings",
         "test_compare.py::test_a_run_is_that_of_one_cell_alone"),
        ('{"norm_type", "weight_standardization", "batch_size"}', '{"norm_type", "weight_standardization"}',
         "test_compare.py::test_runs_of_other_settings_do_not_belong_beside_a_grid"),
        ('({"groups", "group_size"} if alike is None', '({"groups", "group_size"} if alike is not None',
         "test_compare.py::test_runs_of_other_settings_do_not_belong_beside_a_grid"),
        ("for seed in range(flags.seeds)", "for seed in range(1, flags.seeds + 1)",
         "test_compare.py::test_the_grid_has_a_cell_for_each_seed_batch_size_and_norm"),
        ("math.ceil(len(train) / trainer.batch_sizes(probe)[1])", "(len(train) // trainer.batch_sizes(probe)[1])",
         "test_compare.py::test_the_grid_has_a_cell_for_each_seed_batch_size_and_norm"),
        ('["--weight_standardization"] if arm != norm else []', "[]",
         "test_compare.py::test_the_grid_has_a_cell_for_each_seed_batch_size_and_norm"),
        ("(1 / size - x2) / (x1 - x2)", "(1 / size - x1) / (x1 - x2)",
         "test_compare.py::test_the_time_left_is_what_the_logs_say"),
        ("seconds(cell.batch_size) for cell in cells) / jobs", "seconds(cell.batch_size) for cell in cells)",
         "test_compare.py::test_the_time_left_is_what_the_logs_say"),
        ("(cell.images - images_done(cell, runs))", "cell.images",
         "test_compare.py::test_the_time_left_is_what_the_logs_say"),
        ('"by_batch" in found.evaluation if of_batch_norm else', '"accuracy" in found.evaluation if of_batch_norm else',
         "test_compare.py::test_batch_norm_is_evaluated_until_it_has_its_three_rows"),
    ],
    "figure/scaling.py": [
        ("[len(of_run) + 1 for of_run in rows]", "[1 for of_run in rows]",
         "test_figure.py::test_speeds_are_of_rows_written_while_all_runs_train"),
        ("return 2 * (devices - 1) *", "return (devices - 1) *",
         "test_figure.py::test_the_model_of_two_devices_is_what_was_measured"),
        ("max(compute + communicate, images_on_host / images_per_second)", "compute + communicate",
         "test_figure.py::test_the_model_of_two_devices_is_what_was_measured"),
        ("            process.kill()", "            pass",
         "test_figure.py::test_scaling_ends_its_workers_when_it_is_ended"),
    ],
    "datasets/mnist.py": [
        ("EPOCHS, MIRRORED, FETCHED_ON_FIRST_USE = 5, False,", "EPOCHS, MIRRORED, FETCHED_ON_FIRST_USE = 5, True,",
         "test_trainer.py::test_defaults_of_a_dataset"),
    ],
    "datasets/cifar10.py": [
        ("FETCHED_ON_FIRST_USE = 30,", "FETCHED_ON_FIRST_USE = 3,", "test_trainer.py::test_defaults_of_a_dataset"),
        ("for i in range(1, 6)] +", "for i in range(1, 5)] +",
         "test_datasets.py::test_images_and_labels_are_those_of_the_archive"),
        (".transpose(0, 2, 3, 1), np", ".transpose(0, 3, 2, 1), np",
         "test_datasets.py::test_cifar_pixels_are_channel_row_column_in_the_archive"),
    ],
    "export.py": [
        ("fixed = place.is_symlink()", "fixed = False", "test_export.py::test_bad_requests_are_named_before_any_work"),
        ("ops.standardize_weights(tf.cast(weights[0], layer.compute_dtype)).numpy()", "weights[0]",
         "test_export.py::test_a_network_of_keras_layers_computes_the_same[resnet8-group-True]"),
        ("[scale * weight for weight in twin.get_weights()]", "twin.get_weights()",
         "test_export.py::test_a_network_of_keras_layers_computes_the_same[resnet8-none-False]"),
        ("if not difference <= allowed:", "if difference > allowed:",
         "test_export.py::test_the_difference_allowed_grows_with_the_logits"),
        ("for path in paths if Path(path).resolve() != HERE", "for path in paths",
         "test_export.py::test_a_file_that_needs_this_repo_is_refused"),
        ("model(to_float(images), training=training)", "model(to_float(images), training=False)",
         "test_export.py::test_a_saved_model_trains_as_the_network_does"),
        ("tf.cast(tf.round(images * 255), tf.uint8)", "tf.cast(images * 255, tf.uint8)",
         "test_export.py::test_stored_pixels_are_served_and_photographs_cut"),
        ("if os.path.lexists(place) and (fixed or not place.is_dir() or any(place.iterdir())):", "if place.is_file():",
         "test_export.py::test_bad_requests_are_named_before_any_work"),
    ],
    "datasets/__init__.py": [
        ("order = order[np.argsort(train.labels[order]", "order = order[np.argsort(0 * train.labels[order]",
         "test_trainer.py::test_held_out_images_are_neither_trained_on_nor_the_test_split"),
        ("train.subset(np.flatnonzero(~held), True)", "train.subset(np.arange(len(train)), True)",
         "test_trainer.py::test_held_out_images_are_neither_trained_on_nor_the_test_split"),
    ],
    "datasets/hdf5.py": [
        ("rest = add_chunks(image, b\"\".join([rest, *images]))", "rest = add_chunks(image, b\"\".join(images))",
         "test_datasets.py::test_encoded_images_of_any_size_are_stored_in_a_row"),
        ("image.resize(sum(lengths), axis=0)", "image.resize(len(image) + len(rest) // 2, axis=0)",
         "test_datasets.py::test_encoded_images_of_any_size_are_stored_in_a_row"),
        ("labels=self.labels[positions],", "labels=self.labels[: len(positions)],",
         "test_trainer.py::test_held_out_images_are_neither_trained_on_nor_the_test_split"),
        ("kept = np.arange(max_examples) * len(ids) // max_examples", "kept = np.arange(max_examples)",
         "test_datasets.py::test_max_examples_are_spread_over_the_split"),
        ("[jpegs[i] for i in inverse]", "jpegs",
         "test_input_ops.py::test_encoded_images_keep_their_labels_in_any_order"),
    ],
    "datasets/svhn.py": [
        ("y.astype(np.int64) % 10", "y.astype(np.int64) - 1",
         "test_datasets.py::test_images_and_labels_are_those_of_the_archive"),
    ],
    "datasets/imagenet.py": [
        ("wnids = sorted(words_of)", "wnids = list(words_of)",
         "test_datasets.py::test_imagenet_index_is_the_rank_of_the_wnid"),
        ("truth[number - 1]", "truth[number - 2]", "test_datasets.py::test_imagenet_index_is_the_rank_of_the_wnid"),
    ],
    "datasets/tinyimagenet.py": [
        ('text(archive, path, "wnids.txt").split()', 'sorted(text(archive, path, "wnids.txt").split())',
         "test_datasets.py::test_tinyimagenet_maps_val_labels_by_file_name"),
    ],
    "datasets/digits.py": [
        ("NUM_TRAIN, SPLIT_SEED = 1437, 0", "NUM_TRAIN, SPLIT_SEED = 1438, 0",
         "test_datasets.py::test_digits_are_those_of_scikit_learn"),
        ("* 255 / 16)", "* 240 / 16)", "test_datasets.py::test_digits_are_those_of_scikit_learn"),
    ],
    "datasets/fashion.py": [
        ("mnist.read(archive_dir, CLASS_NAMES)", "mnist.read(archive_dir)",
         "test_datasets.py::test_images_and_labels_are_those_of_the_archive"),
    ],
    "datasets/folder.py": [
        ("is_special = os.path.exists(path) and not os.path.isfile(path)", "is_special = False",
         "test_predict.py::test_folders_are_searched_and_files_are_taken_as_named"),
        ("tuple(image_size)[::-1]", "tuple(image_size)", "test_download.py::test_a_test_folder_and_a_size"),
        ("image.getexif().get(ORIENTATION) not in TURNED", "True",
         "test_predict.py::test_other_files_are_cut_like_jpeg_files"),
        ('np.asarray(Image.fromarray(pixels).convert("L"))[..., np.newaxis]', "pixels[..., 1:2]",
         "test_predict.py::test_gray_data_sees_the_luminance"),
    ],
    "datasets/own.py": [
        ("order[num - num // 5 :]", "order[:num // 5]", "test_datasets.py::test_own_data"),
    ],
}
# fmt: on


def mutated(file, old, new):
    """The text of a file with `old` replaced; ValueError unless it stands there once."""
    text = (REPO / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"stands there {text.count(old)} times, not once")
    compile(text.replace(old, new), file, "exec")
    return text.replace(old, new)


def outcome(folder, test):
    """(killed, SURVIVED or ERROR, why) of a test in a copy of the repo."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-x",
        "--tb=line",
        f"--basetemp={folder.parent / 'pytest'}",
        f"tests/{test}",
    ]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # else the last second's may pass for it
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "ERROR", f"the test takes longer than {SECONDS} s"
    last = (done.stdout.strip() or "nothing printed").splitlines()[-1]
    if done.returncode == 0:
        return "SURVIVED", last
    if done.returncode != 1 or " failed" not in last:
        return "ERROR", f"pytest's exit code {done.returncode}: {last}"
    found = re.search(r"^\S+:\d+: ([\w.]+)", done.stdout, re.MULTILINE)
    why = found[1].split(".")[-1] if found else "no reason given"
    return ("ERROR" if why in BROKEN else "killed"), why


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="only those whose file or line contains WORD")
    parser.add_argument("--list", action="store_true", help="print them, and whether the lines are there; run nothing")
    arguments = parser.parse_args()
    chosen = [
        (file, *mutation)
        for file, mutations in MUTATIONS.items()
        for mutation in mutations
        if arguments.only in file or arguments.only in mutation[0]
    ]
    if not chosen:
        parser.error(f"no file or line contains {arguments.only!r}: --list prints them all")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, check=True, capture_output=True, text=True).stdout
    results, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repo"
        for name in filter(None, tracked.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, copy / name)
        for file, old, new, test in chosen:
            line, start = f"{file}: {old.strip()}  →  {new.strip()}", time.monotonic()
            try:
                text = mutated(file, old, new)
                if arguments.list:
                    result, why = "listed", test
                else:
                    (copy / file).write_text(text)
                    result, why = outcome(copy, test)
                    shutil.copy2(REPO / file, copy / file)
            except (OSError, ValueError, SyntaxError) as error:
                result, why = "ERROR", error
            results.append((result, line, test))
            print(f"{result:<8}  {line}  ({why}, {time.monotonic() - start:.0f} s)", flush=True)
    count = [result for result, *_ in results].count
    print(
        f"{count('listed')} listed, {count('killed')} killed, {count('SURVIVED')} survived, {count('ERROR')} errors "
        f"in {time.monotonic() - began:.0f} s"
    )
    for result, line, test in results:
        if result in ("SURVIVED", "ERROR"):
            print(f"{result:<8}  {line}  ({test})")
    sys.exit(bool(count("SURVIVED") + count("ERROR")))


if __name__ == "__main__":
    main()
