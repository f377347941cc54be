"""Sweeps: plan many runs, freeze the code, run each in a separate process, collect the results.

Public, by module; all else is private to this folder.

frozen: resume_in_copy
process: make_context
results: summary_of, write_page, write_table
run: run
"""
