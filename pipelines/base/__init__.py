"""What every stage stands on.

storage      atomic files and manifests on any storage that fsspec opens
blocks       arrays as columns of Arrow blocks
cluster      the Ray that stages run on
prefetch     an iterator drawn from in a thread, ahead of its reader
checkpoints  open_clip's dictionary and one key of ours
commits      which parts of the selection log each checkpoint commits
progress     bars on a terminal, plain lines elsewhere
stopwatch    which part of a pipeline limits it
"""
