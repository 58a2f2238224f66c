"""Lists of URLs -> image shards -> catalogue: which rows there are, and which are kept.

addresses        which addresses a picture may be fetched from
fetch            limits on fetching pictures: bytes, time, pixels, requests per host, addresses
plain_columns    columns of any Parquet type -> columns that JSON can hold
url_lists        metadata of URLs -> the rows that the rules keep, one list for each shard that will be fetched
outcomes         what became of the URLs of a shard, by reason
ingest           the stage: lists of URLs -> image shards, by img2dataset
shards           a shard, whatever its layout: captions, images, uids; names and types of columns
local_cache      bytes of shards on a disk of the node, shared by its processes
page_headers     the headers of the pages of a Parquet file: bytes and rows of each page
pages            the pages of large row groups of Parquet, by which groups of some 1,000 rows are read alone
parquet          shards that are Parquet files
tar_index        a webdataset tar -> its index: the samples, and where their pictures are
tars             shards that are webdataset tars: ranges of bytes, by the index
layouts          open a shard by its path, in whichever layout
listed           lists of uids, URLs or hashes that people write -> their entries
uid_lists        the uids that a stage kept or selected, and DataComp's files of them
quantiles        the threshold that keeps the best share of a score cache
rules            the metadata of a row group -> which rows each rule keeps
first_shards     the first shards of each source, looked at before Ray starts
places           where a shard and its part of the catalogue are
catalogue_parts  one shard -> its part of the catalogue, with the rule that dropped each row
duplicates       the rule `duplicate`: drop all but the first row of each key, over all shards
catalogue        the stage: shards -> catalogue; and a finished catalogue, open for reading
descriptions     what the parts of all shards say, and the tables that are made of it
rows             rows of shards -> examples, read and decoded by Ray tasks
"""
