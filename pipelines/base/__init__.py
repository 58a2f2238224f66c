"""What every stage uses: files on any storage, the Ray cluster, progress messages, checkpoints.

storage      files on any storage that fsspec opens: read, written atomically, listed
shard_paths  the patterns of data.shards -> paths of shards: folders, globs, brace ranges
owner_files  the files of a directory that say who writes it, and whether that process is gone
owner        who writes a stage's output directory: one process at a time, with a lease
integrity    whether a file is as it was written: digests and checksums
raw_file     what Python and pyarrow ask of a file that is read at any place
damage       notes beside damaged parts, which are made again
manifests    manifest.json of a stage's output directory: its settings, its results, whether it is finished
blocks       NumPy arrays <-> columns of Arrow tables
in_parallel  functions and Ray tasks, a limited number of them at once
tokens       the token that a Ray cluster asks for, and the one of a local Ray
local_ray    a Ray on this machine, started and ended by one process
demand       what a Ray cluster has, and what it has no room for now
own_work     whether tasks of this process's Ray job run, and how many wait
waiting      says what Ray waits for, and ends a stage that waits in vain
growth       how many tasks to submit at once on a cluster that grows
cluster      start, join and leave Ray; how many tasks and actors it has room for
node_checks  what the nodes lack that compute: an NVIDIA driver, a C compiler
user_code    modules of the user that travel with a job
prefetch     a thread that draws from an iterator, ahead of its reader
checkpoints  model, optimizer and state of a run, in a file that open_clip reads too
commits      which files of the selection log belong to each checkpoint
progress     progress bars on a terminal, plain lines elsewhere
log_level    how much a command prints
stage_table  the stages: what each needs and makes, and when it is done
stopwatch    which part of a pipeline limits its speed
"""
