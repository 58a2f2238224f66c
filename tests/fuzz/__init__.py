"""What others wrote, or damaged: mutated inputs give a result, or an error that says what is wrong. `make fuzz`.

harness           seeds, mutations of bytes, failing inputs that are kept
test_pictures     bytes of pictures -> pixels or BadImage, within a bound of time and memory
test_shards       Parquet and tars -> rows, or an error that names the file; no row is lost
test_run_files    text of a run file -> Run, or what is wrong with it
test_own_files    checkpoints, parts, logs and manifests -> what was written, or an error that names the file
test_http         answers of servers -> a whole body or an error, within a bound of time
"""
