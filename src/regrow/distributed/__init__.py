"""Several ranks: the exchange of a step, DDP and FSDP2.

Public, by module; all else is private to this folder.

activation_checkpointing: apply
parallel: DDPOptions, distribute, Exchange, lost_the_others, stopping_together,
    synchronise_batch_norm, synchronises, World
sharding: as_in, free, FSDPOptions, is_sharded, local, part_like, shard, whole
"""
