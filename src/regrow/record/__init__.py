"""The record of a run: its folder, trackers, manifest, plots and report page."""
