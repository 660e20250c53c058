"""Ways to break a run in one line, each with the test that must notice.

Run by `python -m tests.sabotage`. The tests were chosen to be cheap.
"""

from tests.sabotage import Sabotage

SABOTAGES = (
  Sabotage(
    "an error of one record that nobody foresaw ends the run",
    "narvl_jax/data/batches/bad_records.py",
    "except Exception as error:",
    "except (ValueError, OSError, LookupError) as error:",
    "tests/data/batches/test_bad_records.py::test_no_error_of_a_record_escapes",
  ),
  Sabotage(
    "fields of records are used unchecked",
    "narvl_jax/data/batches/bad_records.py",
    "value = use(checked_record(record))",
    "value = use(record)",
    "tests/data/test_record_checks.py"
    "::test_all_that_reads_records_leaves_them_out",
  ),
  Sabotage(
    "a defect that fails every record passes for bad data",
    "narvl_jax/data/batches/bad_records.py",
    "elif not self._sound and not isinstance(error, MemoryError):",
    "elif False:",
    "tests/data/batches/test_bad_records.py"
    "::test_all_records_failing_alike_is_a_defect[TypeError-40]",
  ),
  Sabotage(
    "a machine without memory drops its records",
    "narvl_jax/data/batches/bad_records.py",
    "if self._short_of_memory >= _SHORT_OF_MEMORY:",
    "if False:",
    "tests/data/batches/test_bad_records.py"
    "::test_memory_of_one_record_and_of_the_machine",
  ),
  Sabotage(
    "halves of surrogate pairs are passed to the tokenizer",
    "narvl_jax/data/answer_text.py",
    "text.encode()",
    'text.encode(errors="replace")',
    "tests/data/batches/test_bad_records.py::test_half_a_surrogate_pair",
  ),
  Sabotage(
    "control characters reach the terminal",
    "narvl_jax/terminal/text.py",
    'shown = escape(text, keep="\\n\\t").encode(encoding, "backslashreplace")',
    'shown = text.encode(encoding, "backslashreplace")',
    "tests/terminal/test_text.py::test_show_on_any_terminal[utf-8]",
  ),
  Sabotage(
    "control characters are written into JSON lines",
    "narvl_jax/terminal/text.py",
    'lambda found: found[0] if found[0] == "\\n" else json.dumps(found[0])'
    "[1:-1],",
    "lambda found: found[0],",
    "tests/terminal/test_text.py::test_readable_json",
  ),
  Sabotage(
    "an id of 0 is no id",
    "narvl_jax/data/sources/jsonl.py",
    'name = f"{file.path.name}:{index + 1}" if given is None else str(given)',
    'name = str(given or f"{file.path.name}:{index + 1}")',
    "tests/data/sources/test_jsonl.py::test_an_id_that_is_given_counts[0-0]",
  ),
  Sabotage(
    "any name behind a tilde is a home folder",
    "narvl_jax/files/stores.py",
    'at_home = name == "~" or name.startswith("~/")',
    'at_home = name.startswith("~")',
    "tests/data/sources/test_jsonl.py"
    "::test_only_a_leading_tilde_is_the_home_folder",
  ),
  Sabotage(
    "an object is read without its generation",
    "narvl_jax/files/store_path.py",
    "str(self), start=start, end=stop, generation=state.version",
    "str(self), start=start, end=stop",
    "tests/data/sources/test_stores.py"
    "::test_an_index_belongs_to_one_version[gcs]",
  ),
  Sabotage(
    "the oldest copies of files in stores are kept",
    "narvl_jax/files/store_cache.py",
    "for _, size, path in sorted(copies):",
    "for _, size, path in sorted(copies, reverse=True):",
    "tests/data/shards/test_stores.py"
    "::test_the_cache_removes_what_was_not_used[gcs]",
  ),
  Sabotage(
    "an index of rows belongs to a size and a time only",
    "narvl_jax/data/sources/rows/index.py",
    "if header.content != opened.digest():",
    "if False:",
    "tests/data/sources/rows/test_index.py"
    "::test_index_of_a_file_with_the_same_size_and_time[False]",
  ),
  Sabotage(
    "a file in use may change behind its size and time",
    "narvl_jax/data/sources/rows/files.py",
    "if file.digest() != self._content:",
    "if False:",
    "tests/data/sources/rows/test_files.py"
    "::test_file_in_use_that_keeps_its_size_and_time",
  ),
  Sabotage(
    "the position in the data is not read",
    "narvl_jax/run/training_run.py",
    'stored.get("data_position", int(state.step)),',
    "0,",
    "tests/checkpointing/test_exact_resume.py::test_every_split[stand-in-9]",
  ),
  Sabotage(
    "the position in the data is not stored",
    "narvl_jax/run/loop.py",
    '"data_position": self.batches.position,',
    '"data_position": step,',
    "tests/run/test_loop_bad_numbers.py"
    "::test_rollback_before_the_first_checkpoint_and_twice",
  ),
  Sabotage(
    "saved before the update",
    "narvl_jax/run/loop.py",
    "self._checkpoints.save(step, state, score=score, run=stored)",
    "self._checkpoints.save(step + 1, state, score=score, run=stored)",
    "tests/run/test_loop.py::test_evaluations_and_checkpoints_when_due",
  ),
  Sabotage(
    "saved before its numbers are known",
    "narvl_jax/run/loop.py",
    "bad = self._settle(pending, 0 if saves else _MAX_AHEAD)",
    "bad = self._settle(pending, _MAX_AHEAD)",
    "tests/run/test_loop_bad_numbers.py::test_broken_state_is_not_saved",
  ),
  Sabotage(
    "a rollback also leaves out a good batch",
    "narvl_jax/run/loop.py",
    "self.batches.seek(bad.position + 1)",
    "self.batches.seek(bad.position + 2)",
    "tests/run/test_loop_bad_numbers.py"
    "::test_rollback_continues_after_the_bad_batch",
  ),
  Sabotage(
    "a bad number is ignored",
    "narvl_jax/training/train_step.py",
    'finite = jnp.isfinite(metrics["loss"])'
    ' & jnp.isfinite(metrics["grad_norm"])',
    "finite = jnp.bool_(True)",
    "tests/run/test_bad_numbers.py"
    "::test_a_bad_update_changes_nothing_but_the_step",
  ),
  Sabotage(
    "accumulation is a mean of means",
    "narvl_jax/training/train_step.py",
    'weight = metrics["weight"]',
    'weight = metrics["weight"] = jnp.float32(1.0)',
    "tests/training/test_train_step.py::test_micro_batches_count_by_their_rows",
  ),
  Sabotage(
    "dropout does not depend on the step",
    "narvl_jax/training/train_step.py",
    "key = jax.random.fold_in(key, state.step)",
    "key = jax.random.fold_in(key, 0)",
    "tests/training/test_train_step.py::test_dropout_depends_on_the_step_only",
  ),
  Sabotage(
    "moving averages are not restored",
    "narvl_jax/checkpointing/reading.py",
    'ema=read.get("ema"),',
    'ema=jax.tree.map(jax.numpy.zeros_like, read.get("ema")),',
    "tests/checkpointing/test_writing.py::test_state_comes_back_exactly[True]",
  ),
  Sabotage(
    "the statistics of BatchNorm are not restored",
    "narvl_jax/checkpointing/reading.py",
    'batch_stats=read["params"]["batch_stats"],',
    "batch_stats=jax.tree.map("
    'jax.numpy.zeros_like, read["params"]["batch_stats"]),',
    "tests/checkpointing/test_writing.py::test_state_comes_back_exactly[True]",
  ),
  Sabotage(
    "the optimizer starts again",
    "narvl_jax/checkpointing/reading.py",
    'opt_state=read["optimizer"]["opt_state"],',
    "opt_state=jax.tree.map("
    'jax.numpy.zeros_like, read["optimizer"]["opt_state"]),',
    "tests/checkpointing/test_writing.py::test_state_comes_back_exactly[True]",
  ),
  Sabotage(
    "checksums of arrays are not compared",
    "narvl_jax/checkpointing/reading.py",
    "if different:",
    "if False:",
    "tests/checkpointing/test_integrity.py::test_values_that_were_read_are_compared",
  ),
  Sabotage(
    "no digests are written",
    "narvl_jax/checkpointing/writing.py",
    "write_digests(self._folder / str(step), jax.process_index(), hosts)",
    "del hosts",
    "tests/checkpointing/test_integrity.py::test_an_intact_one",
  ),
  Sabotage(
    "the best checkpoint is not kept",
    "narvl_jax/checkpointing/retention.py",
    "best = ranked(steps, scores)[: self.best]",
    "best: list[int] = []",
    "tests/checkpointing/test_writing.py"
    "::test_best_of_an_earlier_process_is_kept",
  ),
  Sabotage(
    "a checkpoint is accepted under the name of another step",
    "narvl_jax/checkpointing/record.py",
    "if str(record.step) != folder.name:",
    "if False:",
    "tests/checkpointing/test_integrity.py"
    "::test_a_step_under_another_name_is_reported[copied-False]",
  ),
  Sabotage(
    "the final report is of the last checkpoint",
    "narvl_jax/run/start.py",
    'while (step := choose_step(checkpoints, "best")) != int(state.step):',
    'while (step := choose_step(checkpoints, "last")) != int(state.step):',
    "tests/run/test_start.py"
    "::test_the_final_report_is_of_the_best_checkpoint[3]",
  ),
  Sabotage(
    "an evaluation overwrites that of another step",
    "narvl_jax/evaluation/reporting.py",
    'parts = [report["split"], report["step"], report.get("decoding_name")]',
    'parts = [report["split"], report.get("decoding_name")]',
    "tests/evaluation/test_results.py"
    "::test_only_the_evaluation_of_the_config_is_the_main_one",
  ),
  Sabotage(
    "an evaluation that was stopped is forgotten",
    "narvl_jax/run/loop.py",
    "EVALUATION_DUE: missed,",
    "EVALUATION_DUE: False,",
    "tests/run/test_loop.py::test_evaluation_that_is_stopped",
  ),
  Sabotage(
    "a run folder that was renamed during a save is made again",
    "narvl_jax/checkpointing/held_folder.py",
    "self.path = through if through.is_dir() else folder",
    "self.path = folder",
    "tests/checkpointing/test_failed_saves.py"
    "::test_a_folder_removed_during_a_save_is_not_created_again"
    "[write-rename]",
  ),
  Sabotage(
    "an edited config is used without a word",
    "narvl_jax/checkpointing/record_checks.py",
    "if rejected:",
    "if False:",
    "tests/checkpointing/test_record_checks.py"
    "::test_an_edited_config_is_rejected[seed-3-3 there and 0 in the]",
  ),
  Sabotage(
    "a checkpoint that was removed while it was read ends the reading",
    "narvl_jax/checkpointing/chosen.py",
    "except RemovedCheckpoint:",
    "except KeyError:",
    "tests/checkpointing/test_chosen.py"
    "::test_a_newer_one_is_read_instead[record]",
  ),
  Sabotage(
    "the lock of another run is overwritten",
    "narvl_jax/run_folder/lock.py",
    "while not self._create(stage):",
    "while not self._create(stage) and False:",
    "tests/run_folder/test_lock.py"
    "::test_a_run_of_this_machine_is_alive_and_then_killed",
  ),
  Sabotage(
    "the watchdog sees progress everywhere",
    "narvl_jax/reliability/watchdog.py",
    "self._still += passed",
    "self._still = 0.0",
    "tests/reliability/test_watchdog.py::test_every_move_counts",
  ),
  Sabotage(
    "a drop of init_drops does not count",
    "narvl_jax/warm_start/init_from.py",
    "sources = {x: y for x, y in sources.items() if x not in dropped}",
    "sources = dict(sources)",
    "tests/warm_start/test_sizes.py::test_renamed_dropped_and_new_parameters",
  ),
  Sabotage(
    "the line of the resumed step is taken out of metrics.jsonl",
    "narvl_jax/run_folder/metrics.py",
    'lines = [line for line in written if line["step"] <= resumed_step]',
    'lines = [line for line in written if line["step"] < resumed_step]',
    "tests/run_folder/test_metrics.py::test_a_killed_run_has_lost_no_line",
  ),
  Sabotage(
    "what is added to a line of metrics.jsonl becomes another line",
    "narvl_jax/run_folder/metrics.py",
    "self._is_written = True",
    "self._is_written = False",
    "tests/run_folder/test_metrics.py::test_flushed_line_includes_later_values",
  ),
  Sabotage(
    "an object that another process has written is replaced",
    "narvl_jax/files/store_path.py",
    'ifGenerationMatch=version or "0",',
    "ifGenerationMatch=None,",
    "tests/run_folder/test_in_store.py::test_one_of_many_runs_has_the_folder",
  ),
  Sabotage(
    "damaged lines are thrown away",
    "narvl_jax/files/side_files.py",
    'append(aside, b"".join(text + b"\\n" for text in damaged), sync=True)',
    'append(aside, b"", sync=True)',
    "tests/files/test_side_files.py::test_damaged_lines_are_kept_elsewhere",
  ),
  Sabotage(
    "a tracking service without network ends the run",
    "narvl_jax/run_folder/services.py",
    "except Exception as error:",
    "except ValueError as error:",
    "tests/run_folder/test_trackers.py"
    "::test_a_service_that_fails_is_one_warning[log]",
  ),
  Sabotage(
    "steps that a resumed run repeats are tracked twice",
    "narvl_jax/run_folder/services.py",
    "if step < self._step:",
    "if False:",
    "tests/run_folder/test_trackers.py"
    "::test_a_resumed_run_continues_its_tracked_run",
  ),
  Sabotage(
    "work that a kill has lost counts as useful",
    "narvl_jax/run_folder/goodput.py",
    "reached = first if reached is None else min(first, reached)",
    "reached = None",
    "tests/run_folder/test_goodput.py"
    "::test_updates_after_the_checkpoint_and_the_time_between_are_lost",
  ),
  Sabotage(
    "the time of a stopped process is recorded twice",
    "narvl_jax/reliability/guard.py",
    "lock, self._lock = self._lock, None",
    "lock = self._lock",
    "tests/reliability/test_guard.py::test_a_run_with_a_stop_request",
  ),
  Sabotage(
    "records are not looked at before they are used",
    "narvl_jax/run_folder/restarts.py",
    "if needed is None or not needed <= record.keys():",
    "if needed is None:",
    "tests/files/test_side_files.py::test_readers_change_nothing",
  ),
  Sabotage(
    "a link that leads nowhere stays in the place of a file",
    "narvl_jax/files/side_files.py",
    "if not path.is_symlink():",
    "if True:",
    "tests/files/test_side_files.py"
    "::test_something_else_in_the_place_of_a_file[sharding.txt-loop]",
  ),
  Sabotage(
    "leftovers of killed processes stay",
    "narvl_jax/files/leftovers.py",
    'return process_start(int(match["pid"])) != match["start"]',
    "return False",
    "tests/files/test_leftovers.py::test_a_killed_writer_and_a_live_one",
  ),
  Sabotage(
    "what a live process writes is removed",
    "narvl_jax/files/leftovers.py",
    'return process_start(int(match["pid"])) != match["start"]',
    "return True",
    "tests/files/test_leftovers.py::test_a_killed_writer_and_a_live_one",
  ),
  Sabotage(
    "empty paths are the current folder",
    "narvl_jax/files/paths.py",
    "if not value.strip() and name not in _MAY_BE_EMPTY:",
    "if False:",
    "tests/files/test_paths.py::test_empty_paths",
  ),
  Sabotage(
    "a disk without inodes is told as one without room",
    "narvl_jax/files/disk_errors.py",
    "if inodes is not None:",
    "if False:",
    "tests/files/test_disk.py::test_a_disk_that_can_hold_no_more_files",
  ),
  Sabotage(
    "a run of one host ends with its terminal",
    "narvl_jax/reliability/session.py",
    "opened = [] if left else self._opened_log(error)",
    "opened: list[TextIO] = []",
    "tests/reliability/test_session.py"
    "::test_a_single_process_outlives_the_reader_of_its_output",
  ),
  Sabotage(
    "the probability of an answer is that of its best alignment",
    "narvl_jax/decoding/likelihood.py",
    "add: Callable[[jax.Array, jax.Array], jax.Array] = jnp.logaddexp,",
    "add: Callable[[jax.Array, jax.Array], jax.Array] = jnp.maximum,",
    "tests/decoding/test_greedy.py"
    "::test_answer_has_the_sum_over_all_its_alignments",
  ),
  Sabotage(
    "a request alone is compiled otherwise than in a batch",
    "narvl_jax/decoding/steps.py",
    "if count == 1:",
    "if False:",
    "tests/prediction/test_batch_invariance.py"
    "::test_any_batch_size_gives_the_numbers_of_one[3-beam-constrained]",
  ),
  Sabotage(
    "the probability of overlap uses another IoU than 0.5",
    "narvl_jax/prediction/box_confidence.py",
    "good = 3 * np.outer(common_x, common_y) >= both",
    "good = 2 * np.outer(common_x, common_y) >= both",
    "tests/prediction/test_box_confidence.py"
    "::test_equals_the_sum_over_all_boxes",
  ),
  Sabotage(
    "the kernel attends to masked keys",
    "narvl_jax/kernels/attention.py",
    "logits = jnp.where(valid, logits, _LOWEST)",
    "del valid",
    "tests/kernels/test_attention.py"
    "::test_kernel_is_plain_attention[2-13-13-2-16]",
  ),
  Sabotage(
    "the gradient of the bias is that of the last example",
    "narvl_jax/kernels/attention.py",
    "d_bias_sum[head, rows] += d_logits",
    "d_bias_sum[head, rows] = d_logits",
    "tests/kernels/test_attention.py"
    "::test_kernel_is_plain_attention[2-13-13-2-16]",
  ),
  Sabotage(
    "rows of the image's bias are shifted the wrong way",
    "narvl_jax/kernels/relative_bias.py",
    "part = rows_ref[0][:, start : start + split]",
    "part = rows_ref[0][:, row * width : row * width + split]",
    "tests/kernels/test_relative_bias.py"
    "::test_kernel_adds_what_slices_add[grid0-5-float32]",
  ),
)
