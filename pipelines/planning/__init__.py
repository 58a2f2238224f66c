"""What a run will cost, and what can be checked of it before it starts.

sizes      bytes that a run has in memory, reads and writes
preflight  what can be checked of storage, shards, earlier stages and the cluster
calibrate  `jest plan --calibrate`: what a machine sustains, by real steps of a run
stage_status  which stages are done, and which can run
plan       `jest plan`: cost by part, beside other methods
"""
