"""The record of a run: its folder, trackers, manifest, pictures and page."""
