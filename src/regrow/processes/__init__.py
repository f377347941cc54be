"""Processes: started on this machine or by Slurm, met, signalled, and ended with their parent."""
