"""Processes: started on this machine or by Slurm, met, signalled, and ended with their parent.

Public, by module; all else is private to this folder.

begin: built, child, data_worker, ending, handed, imported, job, main,
    python_path, rank, refuse_separator, server, sweep
interrupt: Interrupted, StopRequest
outside: arrive, check_environment, check_size, have_met, is_in_a_shell, meet, PATIENCE,
    srun_environment, started_from_outside, wait_for_all, wait_for_others, wait_until
parent: die_with_parent
ranks: count_of, run, STOPPED
signals: before_the_run, handled, held, name_of, STOPPING, tell_of_nothing
slurm: check, check_request, is_missing, SlurmOptions, submit, submit_array, waiting_or_running
terminal: drop_unread, may_be_unread
"""
