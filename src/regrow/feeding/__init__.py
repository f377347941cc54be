"""From examples to batches: splits, the order of an epoch, feeds from memory and files.

Public, by module; all else is private to this folder.

batch: noise
images: image_folder
loaders
preprocess: in_units, Preprocessing
splits: check_fractions, cut_examples, Examples, MapStyle, Splits, strata_of
tables: csv
"""
