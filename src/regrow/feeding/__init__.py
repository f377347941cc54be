"""From examples to batches: splits, the order of an epoch, feeds from memory and files.

Public, by module; all else is private to this folder.

batch: LoadedBatch, each, noise, parts_of
broken_images: BrokenImages
decoding: BrokenImage, fit, size_of
files: shown, without_gone
images: class_folders, image_folder
items: collated
loaders: Data
masks: as_written, mask_folder
mixing: Mix
preprocess: in_units, Normalizer, Preprocessing
sampling: balanced_weights
shards: shards
splits: as_tensor, check_fractions, cut_examples, Examples, GIVEN, MapStyle, origins_of, Splits,
    strata_of
tables: csv
texts: text
tokens: IGNORED
vocabulary: from_record, Vocabulary
writing_shards: Layout, of_data, of_datasets, refuse_other, write_shards
"""
