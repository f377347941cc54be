"""From examples to batches: splits, the order of an epoch, feeds from memory and files.

Public, by module; all else is private to this folder.

images: image_folder
loaders
masks: as_written, mask_folder
preprocess: in_units, Preprocessing
splits: check_fractions, cut_examples, Examples, MapStyle, Splits, strata_of
tables: csv
"""
