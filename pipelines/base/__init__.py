"""What every stage stands on.

storage      atomic files and manifests on any storage that fsspec opens
blocks       arrays as columns of Arrow blocks
cluster      the Ray that stages run on
prefetch     an iterator drawn from in a thread, ahead of its reader
checkpoints  open_clip's dictionary and one key of ours
progress     bars on a terminal, plain lines elsewhere
log_level    how much a command prints
stage_table  the stages: what each needs, makes and refuses
stopwatch    which part of a pipeline limits it
"""
