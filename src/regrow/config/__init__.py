"""A config, from the command line to a checked job. Nothing here imports torch.

Public, by module; all else is private to this folder.

changed_data: CHANGED, change_of_split, refuse_other_data
check: check, check_data, check_group, check_once, check_values
class_folders: classes_in_words, formats_by_suffix, is_hidden, NOT_READ, OPENED_AS, suffixes_of
command_line: command, escaped, key_of, override, path_of, paths_as_typed, PATHS, quoted, read,
    refuse_unusable, shell, typed
composition: composition, hydra_as_it_was
entries: accepted, KeyEntry, inherited, of_file, option, repeated, set_at
explain: composition_error, hydras_value_error, wrong_options
flags: absolute, arguments_of, check, CHECK, copied_source, COPIES, DEFAULT, folders, folders_of,
    followed, in_copy, MULTIRUN, of_sweep, others, PLACES, recorded, refuse_records, SEARCH_PATH,
    source_of, split, typed, WITH_A_VALUE
foreign: check_roles_of_run, downloads_elsewhere, if_trusted, is_foreign, is_own, places_of_conf,
    refuse_remote
hydra_access: is_named, output_dir, plain, register_resolver, typed_overrides,
    version_arguments, without_hydra
hydras: check_settings, refuse_typed
job: as_recorded, Job, job_of, with_override
keys: known_keys
leads: lead, RECIPES, shown
older: ADDED_PREPROCESSING, AddedKey, adopt, as_override, as_overrides, complete, earlier,
    earlier_defaults, EarlierDefault, EARLY_EXTENSIONS, line, removed
origins: composed, located, located_in, Origins, origins, shown, TYPED
own_code: own_place, owner_of, places_of, shown
own_modules: import_own_modules
places: file_of, folders, groups, is_group, names_in, options, primary_file
ranges: check_ranges
recorded: as_shown, ELSEWHERE, gives_masks, is_of_the_launcher, recorded_config,
    recorded_overrides, refuse_other_folder
registered: ELSEWHERE, NAME, take_up, write
resume: expand
resumed_config: differences, has_changes, is_done, LACKED, lacked_before, lacked_keys, reached,
    resumed
roles: check_roles
rules: applies, integer, number, of_shipped, require, Rule, RULES
schemas: write
started: CHECK, check_only, is_check, is_started, is_train, note_missing, note_start, remove_created
target_docs: said_by_target
targets: allow, call_failed, HYDRAS_OWN, instantiate, locate, named_packages, note_typed, place_in,
    SHOWS_ALL, typed_below
yaml_files: plain_value, read_yaml, readable, redact_yaml
yaml_keys: head_of
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regrow.config.hydra_access import register_resolver

__all__ = ["register_resolver"]


def __getattr__(name: str) -> object:
    if name == "register_resolver":  # it imports OmegaConf, which reading data does not need
        from regrow.config.hydra_access import register_resolver

        return register_resolver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
