"""From examples to batches: splits, the order of an epoch, feeds from memory and files.

Public, by module; all else is private to this folder.

batch: each, Inputs, noise, parts_of
feeds: collated
images: fit, image_folder, size_of
loaders
masks: as_written, mask_folder
mixing: Mix
preprocess: in_units, Normalizer, Preprocessing
splits: as_tensor, check_fractions, cut_examples, Examples, MapStyle, Splits, strata_of
tables: csv
texts: text
tokens: IGNORED
vocabulary: from_record, Vocabulary
"""
