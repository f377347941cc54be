"""The record of a run: its folder, trackers, manifest, plots and report page.

Public, by module; all else is private to this folder.

by_class: table
comparison: as_text, compare, Comparison, label_of, OUT_OF_FOLD, REPEATS, Row, rows_of, shown,
    table_of, write_csv, write_out_of_fold
earlier: differences, write_over
importances: Importance, of_study
locks: in_use_by, TELL_SECONDS, wait_for
loggers: check_choice, check_required, KILLED, open_loggers
manifest: CHANGED, code_changes, code_sha256, cores, latest, NAME, name_some, namespace_files,
    not_restored, note_packages, OF_RECORDS, own_packages, own_root, read, set_step, way_back,
    write, write_origin
meter: Meter
monitor: by_name, contradiction, lacks_val, of_metrics, of_run, refuse_unmeasured, refuse_without
moved: GONE, in_config, in_text
names: LOCK, refuse_foreign_run, refuse_foreign_sweep
output: refuse_existing, refuse_existing_folder, remove_unfinished, whole_file, write_bytes,
    write_csv, write_images, write_text
ownership: check_sweep, digest_of_code, digest_of_run, DIGITS, enter, enter_run, ListedFolder, find,
    is_own_run, owner_of_job, reason_of, remove_caches, sealed, SWEEP, take_trust, trust_of
pages: short_names
pictures: by_range, has_room, in_the_set, joined, of_masks, of_wrong
plots
records: as_json, by_set, create, link_latest, linked_latest, load_status, load_summary, Lock,
    METRICS, NOT_SETS, read_json, refuse_links, remove_start, remove_unused, set_status, set_step,
    sets_of, SUMMARY, sync_folder, unlink_latest, whole_lines, write_json, write_text
redact: MASK, redact, redact_all
report: draw, find_runs, is_run, load, Run, write
side_by_side: write_page
"""
