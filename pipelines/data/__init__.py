"""Lists of URLs -> image shards -> catalogue: which rows there are, and which are kept.

fetch      the bounds within which pictures are fetched
ingest     lists of URLs -> image shards, by img2dataset
shards     image shards -> rows: what all layouts share; names and drifting types of columns
parquet    Parquet shards -> rows
tars       webdataset tars -> rows: an index, then ranges of bytes
layouts    a shard's path -> the shard, in whichever layout
uid_lists  the uids of a stage, and DataComp's file of them
quantiles  the score that the best share of a cache reaches
rules      a row group's metadata -> which rows each rule keeps
catalogue  shards -> kept rows, and the rule that dropped each of the others
rows       rows of shards -> examples: what tasks that read do
"""
